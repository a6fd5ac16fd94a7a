/* Gradients of adapters, bf16 activations, of all maps of one input in one launch:
 *
 *   grad_b_t[r, c] += scale sum_i u[i, r] dy[i, c] of every map,   grad_a[r, c] += sum_i v[i, r] drop(x)[i, c] of all
 *
 * Bytes: each dy once and x once for all maps, 2 a column and row; u and v; sums of chunks of 256 rows 4 rank
 * a column, written and read (rank 8: an eighth of the chunk). FLOPs: 2 rank a column and row: memory-bound.
 *
 * Geometry: a block does 128 columns of a chunk, 4 warps of 32 columns: the columns are the mma's rows (16),
 * the ranks its columns (8), so that 8 ranks waste nothing. Stages of 32 rows through shared memory
 * (cp.async), three under way: 25 KB of x or dy a block, 5 or 6 blocks an SM. The last block of a segment's
 * chunks adds up what all gave, in the chunks' order, while others still read; no launch of its own. Chunks
 * are neighbours in the grid, so that this happens column by column. L = 16 mma a chunk + chunks.   More than
 * 24 ranks together: groups of 64, each of which reads x.
 *
 * Determinism: chunks are cut from a segment's first row; which block is last does not matter.
 *
 * H200, sm_90, from the compiler: 71 and 96 registers (8 and 24 ranks), no spills; 35 and 40 KB shared memory, 6 and 5 blocks an
 * SM. Hot loop: 4 and 12 mma a step of 32 rows, beside 110 and 190 instructions (190 and 400 with masks) of the 475 that a block's
 * warp has in the time of its bytes.
 * Computed (OpenLLaMA-3B, rank 8; not measured yet), predicted at 80 % of a read at 4.5 TB/s:
 *                               16384 rows                        2048 rows
 *   q, k, v                     420 + 78 MB, 110 us -> 130 us     52 + 10 MB, 13 us -> 16 us
 *   o                           210 + 26 MB, 52 us -> 65 us       26 + 3 MB, 6 us -> 10 us
 *
 * Ladder
 *   v1, v2  a map and side a launch and one more for the sums of chunks, four a map: lora_shrink.cu has what was measured.
 *   v3      this. Not measured yet. */
#include "kernels/cuda/lora.cuh"

enum {
  GRAD_ROWS = 32, /* of a step */
  GRAD_STAGES = 4,
  GRAD_Z = GRAD_ROWS * LORA_SLICE,
  GRAD_TOGETHER = 8 /* eights of ranks of A: beyond, a launch a job, their partial sums in one place */
};

/* NT: eights of ranks. w: u or v, [NT][rows][8]; mask: [maps][rows][16 bytes]. */
template <int NT> struct grad_room {
  enum {
    W = NT * GRAD_ROWS * 8,
    MAPS = NT < KS_LINEARS_MAX ? NT : KS_LINEARS_MAX,
    MASK = MAPS * GRAD_ROWS * 16
  };
  ks_bf16 *z, *w;
  uint8_t *mask;
  KS_DEVICE grad_room(ks_smem *smem, bool masked) {
    z = ks_smem_take<ks_bf16>(smem, GRAD_STAGES * GRAD_Z);
    w = ks_smem_take<ks_bf16>(smem, GRAD_STAGES * W);
    mask = ks_smem_take<uint8_t>(smem, masked ? GRAD_STAGES * MASK : 16);
  }
  static size_t bytes(bool masked) {
    return ks_smem_bytes<ks_bf16>(GRAD_STAGES * GRAD_Z) + ks_smem_bytes<ks_bf16>(GRAD_STAGES * W) +
           ks_smem_bytes<uint8_t>(masked ? GRAD_STAGES * MASK : 16);
  }
};

/* What a block works on. */
template <int NT> struct grad_place {
  lora_item chunk;
  int64_t col0;
  bool z_aligned;
  int map[NT], rank0[NT]; /* map -1: none */
  int mask_map[NT];       /* the mask's place in the buffer */
};

template <int NT>
KS_DEVICE void grad_find(grad_place<NT> *at, const lora_work &p, const lora_job &job, int group) {
  int n_masks = 0;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const lora_place place = lora_place_of(p, job, group * NT + j, 8);
    const bool there = place.map >= 0 && place.rank0 < p.map[place.map].segs[at->chunk.seg].rank;
    at->map[j] = there ? place.map : -1;
    at->rank0[j] = place.rank0;
    n_masks += there && (j == 0 || at->map[j - 1] != at->map[j]);
    at->mask_map[j] = n_masks > 0 ? n_masks - 1 : 0;
  }
}

/* Queues rows [row, row + 32) of the chunk. Ranks of u beyond a segment's hold anything: they make columns of the
 * product that nobody stores. */
template <int NT>
KS_DEVICE void grad_load(const grad_room<NT> &room, const lora_work &p, const lora_job &job,
                         const grad_place<NT> &at, int row0, int stage) {
  typedef grad_room<NT> S;
  tile_load_rows<16, LORA_THREADS / 16, GRAD_Z / 8 / LORA_THREADS>(
      room.z + stage * GRAD_Z, (int)threadIdx.x / 16, (int)threadIdx.x % 16,
      job.z + (at.chunk.row + row0) * job.n_cols, at.col0 + 8 * ((int)threadIdx.x % 16), job.n_cols,
      at.chunk.n_rows - row0, at.z_aligned);
  const int row = (int)threadIdx.x % GRAD_ROWS;
  const bool there = row0 + row < at.chunk.n_rows;
  const int64_t of = there ? at.chunk.row + row0 + row : at.chunk.row;
#pragma unroll
  for (int j = 0; j < NT; j++) { /* dealt out to the warps */
    if (j % LORA_WARPS != (int)threadIdx.x / GRAD_ROWS || at.map[j] < 0) continue;
    const lora_map &map = p.map[at.map[j]];
    const ks_bf16 *w = job.of_b ? map.u : map.v;
    tile_load_8(room.w + stage * S::W + (j * GRAD_ROWS + row) * 8, w + of * map.u_stride, at.rank0[j],
                map.u_stride, there, ks_is_vector_aligned(w, map.u_stride));
    if (job.masked)
      ks_cp_async_16(room.mask + stage * S::MASK + (at.mask_map[j] * GRAD_ROWS + row) * 16,
                     map.mask + of * p.mask_stride + at.col0 / 8, there);
  }
}

/* Masks of columns g and g + 8 of each of eight sixteens, rows k + 2t, + 1 (and 8 further). */
KS_DEVICE void grad_read_mask(uint32_t words[2], const uint8_t *mask, int k, int g, int t) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint8_t *at = mask + (k + 2 * t + 8 * h) * 16 + g;
    words[h] = at[0] | (uint32_t)at[16] << 8 | (uint32_t)at[8] << 16 | (uint32_t)at[24] << 24;
  }
}

template <bool MASKED, int NT>
KS_DEVICE void grad_multiply(float (&acc)[2][NT][4], const grad_room<NT> &room, const grad_place<NT> &at,
                             int stage) {
  typedef grad_room<NT> S;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  uint32_t a[2][2][4]; /* sixteens of rows, of columns */
#pragma unroll
  for (int i = 0; i < 4; i++)
    tile_frag_a_trans<16>(a[i / 2][i % 2], room.z + stage * GRAD_Z, 32 * warp + i % 2 * 16, i / 2 * 16);
#pragma unroll
  for (int j = 0; j < NT; j++) {
    if (at.map[j] < 0) continue;
    uint32_t b[4];
    ks_ldmatrix_x4_trans(b, room.w + stage * S::W + (j * GRAD_ROWS + lane) * 8);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      uint32_t mask[2];
      if (MASKED)
        grad_read_mask(mask, room.mask + stage * S::MASK + at.mask_map[j] * GRAD_ROWS * 16, 16 * k, g, t);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t kept[4];
        if (MASKED) lora_mask(kept, a[k][m], mask, 2 * warp + m);
        ks_mma_bf16(acc[m][j], MASKED ? kept : a[k][m], b + 2 * k);
      }
    }
  }
}

/* Adds to the gradient of rank `rank`. */
KS_DEVICE void grad_add(const lora_work &p, const lora_job &job, int map, int rank, int32_t seg, int64_t col,
                        float value) {
  const lora_seg &of = p.map[map].segs[seg];
  (job.of_b ? of.grad_b_t : of.grad_a)[rank * job.n_cols + col] += value;
}

/* The last block of a segment's chunks adds up what all wrote. */
template <int NT>
KS_DEVICE void grad_combine(const lora_work &p, const lora_job &job, const grad_place<NT> &at, int group) {
  const int64_t width = 8 * (int64_t)job.ranks, col = at.col0 + threadIdx.x, step = width * job.n_cols;
  if (col >= job.n_cols) return;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    if (at.map[j] < 0) continue;
    const lora_seg &seg = p.map[at.map[j]].segs[at.chunk.seg];
    for (int r = 0; r < 8 && at.rank0[j] + r < seg.rank; r++) {
      const float *from =
          job.partial + (seg.first_chunk * width + (group * NT + j) * 8 + r) * job.n_cols + col;
      float sum = __ldcg(from);
#pragma unroll 8
      for (int k = 1; k < seg.n_chunks; k++)
        sum += __ldcg(from + k * step);
      grad_add(p, job, at.map[j], at.rank0[j] + r, at.chunk.seg, col, sum);
    }
  }
}

template <int NT>
KS_DEVICE void grad_store(const float (&acc)[2][NT][4], const lora_work &p, const lora_job &job,
                          const grad_place<NT> &at, int group) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  const int64_t width = 8 * (int64_t)job.ranks;
#pragma unroll
  for (int i = 0; i < 8 * NT; i++) {
    const int m = i / (4 * NT), j = i / 4 % NT, r = 2 * t + i % 2;
    const int64_t col = at.col0 + 32 * warp + 16 * m + g + i % 4 / 2 * 8;
    if (at.map[j] < 0 || col >= job.n_cols) continue;
    const lora_seg &seg = p.map[at.map[j]].segs[at.chunk.seg];
    if (at.rank0[j] + r >= seg.rank) continue;
    const float factor = job.of_b ? seg.scale : job.masked ? p.keep : 1.0f, value = acc[m][j][i % 4] * factor;
    if (seg.n_chunks > 1)
      job.partial[(blockIdx.x * width + (group * NT + j) * 8 + r) * job.n_cols + col] = value;
    else
      grad_add(p, job, at.map[j], at.rank0[j] + r, at.chunk.seg, col, value);
  }
}

/* Blocks: chunks, slices of columns, jobs and groups of NT eights of ranks. */
template <int NT>
__global__ void __launch_bounds__(LORA_THREADS, NT == 8 ? 2 : 5)
    lora_gradient_kernel(const __grid_constant__ lora_work p, int64_t any_masked) {
  ks_smem smem;
  const grad_room<NT> room(&smem, any_masked != 0);
  const lora_job &job = p.job[blockIdx.z % (unsigned)p.n_jobs];
  const int group = (int)(blockIdx.z / (unsigned)p.n_jobs);
  grad_place<NT> at;
  at.chunk = p.chunks[blockIdx.x];
  at.col0 = (int64_t)blockIdx.y * LORA_SLICE;
  if (at.chunk.n_rows == 0 || at.col0 >= job.n_cols || group * NT >= job.ranks) return;
  at.z_aligned = ks_is_vector_aligned(job.z, job.n_cols);
  grad_find(&at, p, job, group);
  const int n_steps = (at.chunk.n_rows + GRAD_ROWS - 1) / GRAD_ROWS;
  float acc[2][NT][4] = {};
#pragma unroll
  for (int s = 0; s < GRAD_STAGES - 1; s++) {
    if (s < n_steps) grad_load(room, p, job, at, s * GRAD_ROWS, s);
    ks_cp_async_commit();
  }
  for (int s = 0; s < n_steps; s++) {
    ks_cp_async_wait<GRAD_STAGES - 2>();
    __syncthreads();
    const int ahead = s + GRAD_STAGES - 1;
    if (ahead < n_steps) grad_load(room, p, job, at, ahead * GRAD_ROWS, ahead % GRAD_STAGES);
    ks_cp_async_commit();
    if (job.masked)
      grad_multiply<true>(acc, room, at, s % GRAD_STAGES);
    else
      grad_multiply<false>(acc, room, at, s % GRAD_STAGES);
  }
  grad_store(acc, p, job, at, group);
  const int32_t n_chunks = p.map[0].segs[at.chunk.seg].n_chunks;
  if (n_chunks == 1) return;
  uint32_t *counter = p.counters + (blockIdx.z * gridDim.y + blockIdx.y) * p.n_segs + at.chunk.seg;
  if (ks_is_last_block(counter, (uint32_t)n_chunks)) grad_combine(p, job, at, group);
}

/* ---------------------------------------------------------------- launches */

/* B of each map from its dy and u; A of all from x and v. */
static lora_work work_of(const ks_linear_args *parts, const lora_group *g, void *room, size_t *bytes) {
  lora_work w = lora_work_of(parts, g);
  lora_job of_a = {};
  of_a.z = (const ks_bf16 *)parts->x;
  of_a.n_cols = parts->w->n_in;
  for (int64_t i = 0; i < g->n; i++) {
    if (g->of[i].max_rank == 0) continue;
    lora_add(&of_a, g, i, 8);
    of_a.masked = g->of[i].mask != NULL;
    if (parts[i].w->n_out == 0) continue;
    lora_job *job = &w.job[w.n_jobs++];
    lora_add(job, g, i, 8);
    job->of_b = 1;
    job->z = (const ks_bf16 *)parts[i].dy;
    job->n_cols = parts[i].w->n_out;
  }
  w.job[w.n_jobs++] = of_a;
  size_t most = 0, sum = 0;
  for (int i = 0; i < w.n_jobs; i++) {
    const size_t mine = (size_t)(g->of[0].n_chunks * 8 * w.job[i].ranks * w.job[i].n_cols) * sizeof(float);
    w.job[i].partial = (float *)(void *)((uint8_t *)room + sum);
    sum += mine;
    if (mine > most) most = mine;
  }
  *bytes = sum;
  if (of_a.ranks <= GRAD_TOGETHER) return w;
  *bytes = most;
  for (int i = 0; i < w.n_jobs; i++)
    w.job[i].partial = (float *)room;
  return w;
}

size_t ks_mma_gradient_bytes(const ks_linear_args *parts, const lora_group *g) {
  size_t bytes = 0;
  if (g->any) work_of(parts, g, NULL, &bytes);
  return bytes;
}

template <int NT> static ks_status launch(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_chunks) {
  bool masked = false;
  int64_t cols = 0;
  for (int i = 0; i < w.n_jobs; i++) {
    masked = masked || w.job[i].masked != 0;
    if (w.job[i].n_cols > cols) cols = w.job[i].n_cols;
  }
  const dim3 grid((unsigned)n_chunks, ks_blocks_for(cols, LORA_SLICE),
                  (unsigned)(w.n_jobs * lora_blocks_of(lora_most_ranks(w))));
  return ks_launch(ctx, op, lora_gradient_kernel<NT>, grid, dim3(LORA_THREADS), grad_room<NT>::bytes(masked),
                   w, (int64_t)masked);
}

static ks_status launch_width(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_chunks) {
  const int width = lora_width(lora_most_ranks(w));
  return width == 1   ? launch<1>(ctx, op, w, n_chunks)
         : width == 3 ? launch<3>(ctx, op, w, n_chunks)
                      : launch<8>(ctx, op, w, n_chunks);
}

ks_status ks_mma_gradient(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                          void *room) {
  size_t bytes;
  const lora_work w = work_of(parts, g, room, &bytes);
  if (w.n_jobs < 2 || w.job[0].partial != w.job[1].partial)
    return launch_width(ctx, op, w, g->of[0].n_chunks);
  for (int i = 0; i < w.n_jobs; i++) { /* they share the room */
    lora_work one = w;
    one.job[0] = w.job[i];
    one.n_jobs = 1;
    KS_TRY(launch_width(ctx, op, one, g->of[0].n_chunks));
  }
  return KS_OK;
}
