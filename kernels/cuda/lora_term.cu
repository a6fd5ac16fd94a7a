/* What adapters add, bf16 activations, of all maps of one input in one launch:
 *
 *   y = scale u B^T (+ residual) of every map (forward),   dx = sum over maps drop'(v A) (+ dx) (backward)
 *
 * Written before the products, which are then added to it.
 */
#include "kernels/cuda/lora.cuh"

enum { TERM_COLS = 32 /* of a warp */, TERM_HELD = 3 /* sixteens of ranks whose R is held in registers */ };

/* What a warp works on: column 2t + i of its product's tile n is column 8t + 2n + i of its 32, so that a lane holds eight
 * neighbours of a row. */
struct term_place {
  lora_item tile;
  int64_t col0, col; /* of the warp, of the lane's eight */
  bool aligned;
  int g, t;
};

/* b of the four tiles of columns, ranks rank0 .. of a map. */
KS_DEVICE void term_read_r(uint32_t (&b)[4][2], const lora_work &p, const lora_job &job, const term_place &at,
                           lora_place place) {
  const lora_seg &seg = p.map[place.map].segs[at.tile.seg];
  const float *r = lora_writes(seg, !job.of_b);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int64_t c = at.col0 + at.g / 2 * 8 + 2 * n + at.g % 2;
    b[n][0] = tile_read_column(r, job.n_cols, place.rank0 + 2 * at.t, seg.rank, c, 1.0f);
    b[n][1] = tile_read_column(r, job.n_cols, place.rank0 + 2 * at.t + 8, seg.rank, c, 1.0f);
  }
}

/* a of rows row0 .. + 15 of the tile. */
KS_DEVICE void term_read_u(uint32_t a[4], const lora_work &p, const lora_job &job, const term_place &at,
                           lora_place place, int row0) {
  const lora_map &map = p.map[place.map];
  const int rank = map.segs[at.tile.seg].rank;
  const ks_bf16 *u = (job.of_b ? map.u : map.v) + at.tile.row * map.u_stride;
  const bool pairs = (((uintptr_t)u | (uintptr_t)(2 * map.u_stride)) & 3) == 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = row0 + at.g + i % 2 * 8, r = place.rank0 + 2 * at.t + i / 2 * 8;
    const ks_bf16 *from = u + row * map.u_stride;
    if (row >= at.tile.n_rows || r >= rank)
      a[i] = 0;
    else
      a[i] =
          pairs && r + 1 < rank ? *(const uint32_t *)(const void *)(from + r) : tile_read_pair(from, r, rank);
  }
}

/* sum += factor * acc where the map's mask keeps it; acc = 0. */
KS_DEVICE void term_close(float (&sum)[4][4], float (&acc)[4][4], const lora_work &p, const lora_map &map,
                          const term_place &at, int row0, float factor, bool masked) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + at.g + 8 * h;
    uint2 bits = make_uint2(~0u, ~0u);
    if (masked && row < at.tile.n_rows) {
      const uint8_t *from = map.mask + (at.tile.row + row) * p.mask_stride + at.col / 128 * 16 + at.col % 16;
      bits = *(const uint2 *)(const void *)from;
    }
    const int q = (int)(at.col / 16 % 8);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float &of = acc[i / 2][2 * h + i % 2];
      if ((i < 4 ? bits.x : bits.y) >> (8 * (i % 4) + q) & 1u) sum[i / 2][2 * h + i % 2] += of * factor;
      of = 0;
    }
  }
}

KS_DEVICE uint4 term_old(const lora_job &job, const term_place &at, int row) {
  if (!job.z || row >= at.tile.n_rows) return make_uint4(0, 0, 0, 0);
  return tile_read_8(job.z + (at.tile.row + row) * job.n_cols, at.col, job.n_cols, at.aligned);
}

/* y = old + sum, eight neighbours of two rows. */
KS_DEVICE void term_store(const float (&sum)[4][4], const uint4 old[2], const lora_job &job,
                          const term_place &at, int row0) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + at.g + 8 * h;
    if (row >= at.tile.n_rows || at.col >= job.n_cols) continue;
    const uint32_t was[4] = {old[h].x, old[h].y, old[h].z, old[h].w};
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      w[i] = ks_pack_bf16(ks_bf16_lo(was[i]) + sum[i][2 * h], ks_bf16_hi(was[i]) + sum[i][2 * h + 1]);
    ks_bf16 *y = job.y + (at.tile.row + row) * job.n_cols + at.col;
    if (at.aligned) {
      *(uint4 *)(void *)y = make_uint4(w[0], w[1], w[2], w[3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (at.col + i < job.n_cols) y[i].bits = (uint16_t)(w[i / 2] >> (i % 2 * 16));
  }
}

/* HELD: sixteens of ranks whose R stays in registers for all rows; 0: R is read again for each sixteen of rows. */
template <int HELD>
__global__ void __launch_bounds__(LORA_THREADS) lora_term_kernel(const __grid_constant__ lora_work p) {
  const lora_job &job = p.job[blockIdx.z];
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  term_place at;
  at.tile = p.tiles[blockIdx.x];
  at.g = lane / 4, at.t = lane % 4;
  at.col0 = ((int64_t)blockIdx.y * LORA_WARPS + warp) * TERM_COLS;
  at.col = at.col0 + 8 * at.t;
  at.aligned = ks_is_vector_aligned(job.y, job.n_cols) && ((uintptr_t)job.z & 15) == 0;
  /* Whole warps; no barrier below. Between the segments y is what was there already, or gets it. */
  if (at.tile.n_rows == 0 || at.col0 >= job.n_cols || (at.tile.seg < 0 && job.z == job.y)) return;
  const int ranks = at.tile.seg < 0 ? 0 : job.ranks;
  uint32_t held[HELD ? HELD : 1][4][2] = {};
#pragma unroll
  for (int k = 0; k < HELD; k++)
    if (k < ranks) term_read_r(held[k], p, job, at, lora_place_of(p, job, k, 16));
  for (int row0 = 0; row0 < at.tile.n_rows; row0 += 16) {
    const uint4 old[2] = {term_old(job, at, row0 + at.g), term_old(job, at, row0 + at.g + 8)};
    float sum[4][4] = {}, acc[4][4] = {};
    auto add = [&](int k, const uint32_t(&b)[4][2]) {
      const lora_place place = lora_place_of(p, job, k, 16), next = lora_place_of(p, job, k + 1, 16);
      uint32_t a[4];
      term_read_u(a, p, job, at, place, row0);
#pragma unroll
      for (int n = 0; n < 4; n++)
        ks_mma_bf16(acc[n], a, b[n]);
      if (k + 1 < ranks && next.map == place.map) return;
      const float factor = job.of_b ? p.map[place.map].segs[at.tile.seg].scale : job.masked ? p.keep : 1.0f;
      term_close(sum, acc, p, p.map[place.map], at, row0, factor, job.masked && at.col < job.n_cols);
    };
    if (HELD) {
#pragma unroll
      for (int k = 0; k < HELD; k++)
        if (k < ranks) add(k, held[k]);
    } else {
      for (int k = 0; k < ranks; k++) {
        uint32_t b[4][2];
        term_read_r(b, p, job, at, lora_place_of(p, job, k, 16));
        add(k, b);
      }
    }
    term_store(sum, old, job, at, row0);
  }
}

/* ---------------------------------------------------------------- launches */

static ks_status launch(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_tiles) {
  int64_t cols = 0;
  for (int i = 0; i < w.n_jobs; i++)
    if (w.job[i].n_cols > cols) cols = w.job[i].n_cols;
  const dim3 grid((unsigned)n_tiles, ks_blocks_for(cols, LORA_SLICE), (unsigned)w.n_jobs);
  const int ranks = lora_most_ranks(w);
  return ks_launch(ctx, op,
                   ranks <= 1           ? lora_term_kernel<1>
                   : ranks <= TERM_HELD ? lora_term_kernel<TERM_HELD>
                                        : lora_term_kernel<0>,
                   grid, dim3(LORA_THREADS), 0, w);
}

/* The job that makes `y` already, or a new one. */
static lora_job *job_of(lora_work *w, void *y) {
  for (int i = 0; i < w->n_jobs; i++)
    if (w->job[i].y == y) return &w->job[i];
  return &w->job[w->n_jobs++];
}

ks_status ks_mma_term(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                      bool backward, uint32_t which) {
  lora_work w = lora_work_of(parts, g);
  for (int64_t i = 0; i < g->n; i++) {
    const ks_linear_args *a = &parts[i];
    if (!(which >> i & 1)) continue;
    lora_job *job = job_of(&w, backward ? a->dx : a->y);
    if (job->maps == 0) {
      job->y = (ks_bf16 *)(backward ? a->dx : a->y);
      job->z = (const ks_bf16 *)(!backward ? a->residual : a->accumulate_dx ? a->dx : NULL);
      job->n_cols = backward ? a->w->n_in : a->w->n_out;
      job->of_b = !backward;
    }
    lora_add(job, g, i, 16);
    job->masked = backward && g->of[i].mask;
  }
  return launch(ctx, op, w, g->of[0].n_tiles);
}

ks_status ks_mma_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p) {
  lora_group g = {};
  ks_linear_args a = {};
  g.n = 1;
  g.of[0] = p->batch;
  a.u_stride = p->batch.u_stride;
  (p->backward ? a.v : a.u) = (void *)(uintptr_t)p->u;
  lora_work w = lora_work_of(&a, &g);
  lora_job *job = &w.job[w.n_jobs++];
  job->y = (ks_bf16 *)p->y;
  job->z = job->y;
  job->n_cols = p->n_cols;
  job->of_b = !p->backward;
  job->masked = p->backward && p->batch.mask;
  lora_add(job, &g, 0, 16);
  return launch(ctx, op, w, p->batch.n_tiles);
}
