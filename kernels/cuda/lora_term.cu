/* What adapters add, bf16 activations, of all maps of one input in one launch:
 *
 *   y = scale u B^T (+ residual) of every map (forward),   dx = sum over maps drop'(v A) (+ dx) (backward)
 *
 * Written before the products, which cuBLASLt adds to it (beta = 1: C is read behind its main loop).
 * Afterwards it would be a read and a write of y; before, it is a write, or a read and a write where a
 * residual comes in, which the product then need not read. It is rounded to bf16 once, as y was before it was
 * added afterwards: as many roundings.
 *
 * Bytes: 2 an element of y or dx written (+ 2 read); u or v 2 rank a row; R 4 rank a column for each tile of
 * 128 rows, from the L2.
 * FLOPs: 2 rank an element. Memory-bound, but close to the rate of instructions: 1 KB of y is 64 clocks of an SM at the rate of
 * a copy, 256 instructions.
 *
 * Geometry: a warp does 32 columns of a tile of 128 rows, 16 rows at a time, and keeps R in registers (up to
 * 48 ranks together, in sixteens a map; beyond, it is read again for each 16 rows). Columns are dealt out so
 * that a lane holds eight neighbours: 16-byte accesses without exchange. No shared memory, no barrier. L =
 * rank / 16 mma.
 *
 * Determinism: a row's sum is one chain over its maps' ranks (with masks: one a sixteen, added in their
 * order), whatever the tile.
 *
 * H200, sm_90, from the compiler: 56 registers (one map), 96 (three), no spills: 9 and 5 blocks an SM. A loop
 * of 16 rows: 4 and 12 mma, 160 and 240 instructions on the path without odd sizes, 50 more where something is
 * there already, 70 a map for masks: three masked maps are bound by instructions.
 * Computed (OpenLLaMA-3B, rank 8; not measured yet), predicted at 82 % of a copy at 4.25 TB/s:
 *                               16384 rows                 2048 rows
 *   q, k, v: y                  315 MB, 74 us -> 90 us     39 MB, 9 us -> 12 us
 *   o: y with its residual      210 MB, 49 us -> 58 us     26 MB, 6 us -> 8 us
 *   q, k, v: dx; o: dx          105 MB each -> 30 us       13 MB each -> 5 us        three masked maps 50 and 8 us
 *
 * Ladder
 *   v1, v2  added to y after the product: 420 MB where this writes 210; lora_shrink.cu has what was measured.
 *   v3      this. Not measured yet. Until y was written by vectors (the compiler had made four stores of each) and addresses of a
 *           row were made once, one map was 220 instructions, three masked ones 600. */
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

/* Sixteen ranks of a map, as a lane reads them. */
struct term_unit {
  const ks_bf16 *u; /* of rank 2t, at the tile's first row */
  int64_t stride;
  const uint8_t *mask; /* of the lane's columns, at the tile's first row */
  uint32_t keep[2];    /* which halves of ranks 2t, 2t + 1 and of those 8 further are the segment's */
  bool words;          /* two ranks are one aligned word */
};

KS_DEVICE term_unit term_unit_of(const lora_work &p, const lora_job &job, const term_place &at, int k) {
  const lora_place place = lora_place_of(p, job, k, 16);
  const lora_map &map = p.map[place.map];
  const int left = map.segs[at.tile.seg].rank - place.rank0 - 2 * at.t;
  const ks_bf16 *u = job.of_b ? map.u : map.v;
  term_unit unit;
  unit.u = u + at.tile.row * map.u_stride + place.rank0 + 2 * at.t;
  unit.stride = map.u_stride;
  unit.mask = map.mask + at.tile.row * p.mask_stride + at.col / 128 * 16 + at.col % 16;
  unit.keep[0] = tile_select(left > 0, left > 1);
  unit.keep[1] = tile_select(left > 8, left > 9);
  unit.words = ((uintptr_t)u & 3) == 0 && map.u_stride % 2 == 0;
  return unit;
}

/* b of the four tiles of columns. */
KS_DEVICE void term_read_r(uint32_t (&b)[4][2], const lora_work &p, const lora_job &job, const term_place &at,
                           int k) {
  const lora_place place = lora_place_of(p, job, k, 16);
  const lora_seg &seg = p.map[place.map].segs[at.tile.seg];
  const float *r = lora_writes(seg, !job.of_b);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int64_t c = at.col0 + at.g / 2 * 8 + 2 * n + at.g % 2;
    b[n][0] = tile_read_column(r, job.n_cols, place.rank0 + 2 * at.t, seg.rank, c, 1.0f);
    b[n][1] = tile_read_column(r, job.n_cols, place.rank0 + 2 * at.t + 8, seg.rank, c, 1.0f);
  }
}

/* a of a lane's two rows. */
KS_DEVICE void term_read_u(uint32_t a[4], const term_unit &unit, const int rows[2]) {
  const ks_bf16 *from[2] = {unit.u + rows[0] * unit.stride, unit.u + rows[1] * unit.stride};
  if (unit.words) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t keep = unit.keep[i / 2];
      a[i] = keep ? *(const uint32_t *)(const void *)(from[i % 2] + i / 2 * 8) & keep : 0;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const ks_bf16 *two = from[i % 2] + i / 2 * 8;
    const uint32_t keep = unit.keep[i / 2];
    a[i] = (keep & 1u ? two[0].bits : 0u) | (keep >> 16 ? (uint32_t)two[1].bits << 16 : 0u);
  }
}

/* sum += acc where the mask keeps it. q: its bit of the lane's columns. */
KS_DEVICE void term_add_kept(float (&sum)[4][4], const float (&acc)[4][4], const uint8_t *mask,
                             int64_t mask_stride, const int rows[2], int q) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint2 bytes = *(const uint2 *)(const void *)(mask + rows[h] * mask_stride);
    const uint32_t bits[2] = {bytes.x >> q, bytes.y >> q};
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (bits[i / 4] >> (8 * (i % 4)) & 1u) sum[i / 2][2 * h + i % 2] += acc[i / 2][2 * h + i % 2];
  }
}

/* y = old + factor * sum, the lane's eight columns of the row that begins at y. */
KS_DEVICE void term_store(ks_bf16 *y, const float (&sum)[4][4], int h, float factor, const uint4 &old,
                          const lora_job &job, const term_place &at) {
  const uint32_t was[4] = {old.x, old.y, old.z, old.w};
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    w[i] = ks_pack_bf16(ks_bf16_lo(was[i]) + sum[i][2 * h] * factor,
                        ks_bf16_hi(was[i]) + sum[i][2 * h + 1] * factor);
  if (at.aligned) {
    *tile_vector(y, at.col) = make_uint4(w[0], w[1], w[2], w[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (at.col + i < job.n_cols) y[at.col + i].bits = (uint16_t)(w[i / 2] >> (i % 2 * 16));
}

/* HELD: sixteens of ranks whose R stays in registers for all rows; 0: any number, read again for each sixteen of rows.
 * MASKED: each sixteen is summed by itself; else all are one chain of products (several maps only backward, under factor 1). */
template <int HELD, bool MASKED>
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
  const int ranks = at.tile.seg < 0 ? 0 : job.ranks, q = (int)(at.col / 16 % 8);
  uint32_t held[HELD ? HELD : 1][4][2];
  term_unit unit[HELD ? HELD : 1];
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    if (k >= ranks) continue;
    unit[k] = term_unit_of(p, job, at, k);
    term_read_r(held[k], p, job, at, k);
  }
  float factor = MASKED ? p.keep : 1.0f;
  if (job.of_b && ranks > 0) factor = p.map[lora_place_of(p, job, 0, 16).map].segs[at.tile.seg].scale;
  for (int row0 = 0; row0 < at.tile.n_rows; row0 += 16) {
    const int first = row0 + at.g, last = at.tile.n_rows - 1;
    const int rows[2] = {first < last ? first : last, first + 8 < last ? first + 8 : last};
    const int64_t offset[2] = {(at.tile.row + rows[0]) * job.n_cols, (at.tile.row + rows[1]) * job.n_cols};
    uint4 old[2] = {};
    if (job.z)
#pragma unroll
      for (int h = 0; h < 2; h++)
        old[h] = tile_read_8(job.z + offset[h], at.col, job.n_cols, at.aligned);
    float sum[4][4] = {};
    auto add = [&](const term_unit &of, const uint32_t(&b)[4][2]) {
      float own[4][4] = {};
      uint32_t a[4];
      term_read_u(a, of, rows);
#pragma unroll
      for (int n = 0; n < 4; n++)
        ks_mma_bf16(MASKED ? own[n] : sum[n], a, b[n]);
      if (MASKED) term_add_kept(sum, own, of.mask, p.mask_stride, rows, q);
    };
    if (HELD) {
#pragma unroll
      for (int k = 0; k < HELD; k++)
        if (k < ranks) add(unit[k], held[k]);
    } else {
      for (int k = 0; k < ranks; k++) {
        uint32_t b[4][2];
        term_read_r(b, p, job, at, k);
        add(term_unit_of(p, job, at, k), b);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (first + 8 * h <= last && at.col < job.n_cols)
        term_store(job.y + offset[h], sum, h, factor, old[h], job, at);
  }
}

/* ---------------------------------------------------------------- launches */

static ks_status launch(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_tiles) {
  int64_t cols = 0;
  for (int i = 0; i < w.n_jobs; i++)
    if (w.job[i].n_cols > cols) cols = w.job[i].n_cols;
  const dim3 grid((unsigned)n_tiles, ks_blocks_for(cols, LORA_SLICE), (unsigned)w.n_jobs);
  const int ranks = lora_most_ranks(w);
  bool masked = false;
  for (int i = 0; i < w.n_jobs; i++)
    masked = masked || w.job[i].masked;
  void (*const kernels[3][2])(lora_work) = {
      {lora_term_kernel<0, false>, lora_term_kernel<0, true>},
      {lora_term_kernel<1, false>, lora_term_kernel<1, true>},
      {lora_term_kernel<TERM_HELD, false>, lora_term_kernel<TERM_HELD, true>}};
  return ks_launch(ctx, op,
                   kernels[ranks <= 1           ? 1
                           : ranks <= TERM_HELD ? 2
                                                : 0][masked],
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
      int64_t first = i; /* of the maps that add to this dx: it says whether there is anything to add to */
      for (int64_t k = i - 1; k >= 0; k--)
        if (backward && parts[k].dx == a->dx) first = k;
      job->z = (const ks_bf16 *)(!backward ? a->residual : parts[first].accumulate_dx ? a->dx : NULL);
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
