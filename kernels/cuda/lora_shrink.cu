/* The narrow products of adapters, bf16 activations, of all maps of one input in one launch:
 *
 *   u = drop(x) A^T of every map (forward),   v = scale dy B of every map (backward)
 *
 * A and B (here R) are float32 and rounded to bf16 on the way; sums are float32; u and v are stored as bf16.
 *
 * Bytes: forward x once for all maps, 2 n_in a row; backward each dy once, 2 n_out a row; masks n_in / 8 a
 * row and map; R 4 bytes a rank and column for each tile of 128 rows, from the L2 (for 24 ranks 0.4 bytes a
 * byte of x). FLOPs: 2 rank a column and row.
 * Memory-bound up to some 64 ranks together: FLOPs a byte of x = rank.
 *
 * Geometry: 4 warps, tiles of 128 rows (64 where these would leave SMs idle) through 2 to 4 stages of 64 columns of x and R in
 * shared memory (cp.async): 46 KB of x and R under way for 24 ranks, one block an SM at 16 k rows; 56 KB a block for 8 ranks,
 * three an SM. R stays float32 in shared memory and is rounded as it becomes an operand, once a warp and 32 rows.
 * Few rows: each block sums one slice of the columns, float32 sums go through memory, and the last block of a
 * tile adds them up in the slices' order. Many rows: a block sums one slice after another, with the same
 * additions. L = n_cols / 16 / slices mma + slices.   More than 24 ranks together: groups of 64, each of
 * which reads x.
 *
 * Determinism: slices depend on n_cols alone; which block is last does not matter; a row's u does not depend on its tile.
 * Alignment: rows of x that are no multiples of 16 bytes are read element by element, and so is R.
 *
 * H200, sm_90, from the compiler: 114 and 159 registers (8 and 24 ranks, 128 rows), no spills; 75 and 70 KB shared memory, three
 * blocks an SM. Hot loop: 8 mma a step of 64 columns and 32 rows of a warp for 8 ranks, 24 for 24; 200 and 290 instructions on
 * the path without odd sizes, 350 and 650 with masks, against 950 clocks in which the step's bytes come.
 * Computed (OpenLLaMA-3B, 3200 columns, rank 8; not measured yet), predicted at 80 % of a read at 4.5 TB/s, 2 to 3 us a launch:
 *                               16384 rows                2048 rows
 *   q, k, v forward             105 MB, 23 us -> 30 us    13 MB, 3 us -> 5 us
 *   q, k, v backward            315 MB, 70 us -> 85 us    39 MB, 9 us -> 12 us
 *   o forward, backward         105 MB each -> 28 us      13 MB each -> 5 us
 *
 * Ladder (H200, commit f74fb33, rank 8, dropout 0.05, 2048 rows; what an adapter adds to a product in all)
 *   v1  a map a launch; masks applied as they came, R read in its own step: n_out 8192, n_in 2048 forward 86 us, backward 106;
 *       2048, 8192: 157 and 149 us.
 *   v2  all loads of a step before any is used, 32 rows a block, operands straight to registers (some 200):
 *       at commit 2cc54c8 67 us forward, 97 backward for 8192, 2048: 64 blocks, one an SM, and x read once a
 *       map.
 *   v3  this. Not measured yet. Until addresses of a thread's rows, and bytes of masks, were read once a step and branches
 *       between products were gone, 24 ranks were 500 instructions a step, 1330 with masks.
 *   Next, not built: v and the gradient of B in one pass over dy: 75 us of q, k, v and o at 16384 rows.
 *   Next, not built: masks drawn here instead of in a launch before: a lane holds whole bytes of them already. */
#include "kernels/cuda/lora.cuh"

enum {
  SHRINK_K = 64,                  /* columns of a step */
  SHRINK_R_STRIDE = SHRINK_K + 8, /* floats between ranks of R: 8-byte reads without bank conflicts */
  SHRINK_MOST_SLICES = 8
};

/* A row of n_cols is summed in this many slices, each a chain of its own; slice s begins at step s * n_steps / n_slices. */
KS_HOST_DEVICE int shrink_steps(int64_t n_cols) {
  return (int)((n_cols + SHRINK_K - 1) / SHRINK_K);
}
KS_HOST_DEVICE int shrink_slices(int64_t n_cols) {
  const int n = shrink_steps(n_cols) / 2;
  return n < 1 ? 1 : n > SHRINK_MOST_SLICES ? SHRINK_MOST_SLICES : n;
}
KS_HOST_DEVICE int shrink_begin(int slice, int n_slices, int n_steps) {
  return (int)((int64_t)slice * n_steps / n_slices);
}

/* MT: sixteens of rows a warp; NT: eights of ranks. */
template <int MT, int NT> struct shrink_room {
  enum {
    ROWS = 16 * MT * LORA_WARPS,
    STAGES = NT == 1   ? 4
             : NT == 3 ? 3
                       : 2,
    X = ROWS * SHRINK_K,
    R = 8 * NT * SHRINK_R_STRIDE,
    MAPS = NT < KS_LINEARS_MAX ? NT : KS_LINEARS_MAX,
    MASK = MAPS * ROWS * 16
  };
  ks_bf16 *x;
  float *r;
  uint8_t *mask;
  KS_DEVICE shrink_room(ks_smem *smem, bool masked) {
    x = ks_smem_take<ks_bf16>(smem, STAGES * X);
    r = ks_smem_take<float>(smem, STAGES * R);
    mask = ks_smem_take<uint8_t>(smem, masked ? STAGES * MASK : 16);
  }
  static size_t bytes(bool masked) {
    return ks_smem_bytes<ks_bf16>(STAGES * X) + ks_smem_bytes<float>(STAGES * R) +
           ks_smem_bytes<uint8_t>(masked ? STAGES * MASK : 16);
  }
};

/* What a block works on. */
template <int NT> struct shrink_place {
  const ks_bf16 *z; /* first row */
  int64_t row, n_cols;
  int n_rows;
  bool z_aligned;
  const float *r[NT]; /* of this thread's rank of each eight; NULL: zeros */
  int map[NT];        /* -1: none */
  int mask_map[NT];   /* the mask's place in the buffer */
};

template <int MT, int NT>
KS_DEVICE void shrink_load(const shrink_room<MT, NT> &room, const lora_work &p, const shrink_place<NT> &at,
                           int step, int stage, bool masked) {
  typedef shrink_room<MT, NT> S;
  const int64_t col0 = (int64_t)step * SHRINK_K;
  const int thread = (int)threadIdx.x, g = thread / 16, c = thread % 16 * 4;
  tile_load_rows<8, LORA_THREADS / 8, S::ROWS * 8 / LORA_THREADS>(room.x + stage * S::X, thread / 8,
                                                                  thread % 8, at.z, col0 + 8 * (thread % 8),
                                                                  at.n_cols, at.n_rows, at.z_aligned);
#pragma unroll
  for (int j = 0; j < NT; j++) {
    float *to = room.r + stage * S::R + (8 * j + g) * SHRINK_R_STRIDE + c;
    const float *from = at.r[j];
    if (((uintptr_t)from & 15) == 0 && at.n_cols % 4 == 0) {
      const bool there = from && col0 + c < at.n_cols;
      ks_cp_async_16(
          to, there ? (const void *)(from + col0 + c) : (const void *)((uintptr_t)at.z & ~(uintptr_t)15),
          there);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      to[i] = from && col0 + c + i < at.n_cols ? from[col0 + c + i] : 0.0f;
  }
  if (!masked || thread >= S::ROWS) return;
  const bool there = thread < at.n_rows;
  const int64_t offset = there ? (at.row + thread) * p.mask_stride + col0 / 128 * 16 : 0;
#pragma unroll
  for (int j = 0; j < NT; j++)
    if (at.map[j] >= 0 && (j == 0 || at.map[j] != at.map[j - 1]))
      ks_cp_async_16(room.mask + stage * S::MASK + (at.mask_map[j] * S::ROWS + thread) * 16,
                     p.map[at.map[j]].mask + offset, there);
}

/* Of columns 2t, 2t + 1 (and 8 further) of each of eight sixteens, rows `row` and `row` + 8. */
KS_DEVICE void shrink_read_mask(uint32_t words[2], const uint8_t *mask, int row, int t) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint8_t *at = mask + row * 16 + 2 * t + 8 * h;
    words[h] = *(const uint16_t *)(const void *)at | (uint32_t) * (const uint16_t *)(const void *)(at + 128)
                                                         << 16;
  }
}

template <bool MASKED, int MT, int NT>
KS_DEVICE void shrink_multiply(float (&acc)[MT][NT][4], const shrink_room<MT, NT> &room,
                               const shrink_place<NT> &at, int step, int stage) {
  typedef shrink_room<MT, NT> S;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  ks_bf16 *x = room.x + stage * S::X;
  const float *r = room.r + stage * S::R + g * SHRINK_R_STRIDE + 2 * t;
  uint32_t mask[MT][NT][2];
  auto read_mask = [&](int m, int j) {
    shrink_read_mask(mask[m][j], room.mask + stage * S::MASK + at.mask_map[j] * S::ROWS * 16,
                     (warp * MT + m) * 16 + g, t);
  };
#pragma unroll
  for (int i = 0; MASKED && NT < 8 && i < MT * NT; i++)
    read_mask(i / NT, i % NT);
#pragma unroll
  for (int k = 0; k < SHRINK_K / 16; k++) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
      tile_frag_a<8>(a[m], x, (warp * MT + m) * 16, 16 * k);
#pragma unroll
    for (int j = 0; j < NT; j++) {
      if (NT == 8 && at.map[j] < 0) continue; /* of fewer, what is not there is multiplied too: no branches */
      const float *from = r + 8 * j * SHRINK_R_STRIDE + 16 * k;
      const float2 lo = *(const float2 *)(const void *)from, hi = *(const float2 *)(const void *)(from + 8);
      const uint32_t b[2] = {ks_pack_bf16(lo.x, lo.y), ks_pack_bf16(hi.x, hi.y)};
#pragma unroll
      for (int m = 0; m < MT; m++) {
        uint32_t kept[4];
        if (MASKED && NT == 8) read_mask(m, j); /* for each product: registers */
        if (MASKED) lora_mask(kept, a[m], mask[m][j], step % 2 * 4 + k);
        ks_mma_bf16(acc[m][j], MASKED ? kept : a[m], b);
      }
    }
  }
}

/* Rounds and stores rank `r` (of eight j) of row `row`. */
KS_DEVICE void shrink_store(const lora_work &p, const lora_job &job, int map, int rank, int32_t seg,
                            int64_t row, float value) {
  const lora_seg &of = p.map[map].segs[seg];
  if (rank >= of.rank) return;
  const float factor = job.of_b ? of.scale : job.masked ? p.keep : 1.0f;
  (job.of_b ? p.map[map].v : p.map[map].u)[row * p.map[map].u_stride + rank] =
      ks_from_float<ks_bf16>(value * factor);
}

template <int NT>
KS_DEVICE void shrink_find(shrink_place<NT> *at, const lora_work &p, const lora_job &job, int32_t seg) {
  int n_masks = 0;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const lora_place place = lora_place_of(p, job, (int)blockIdx.y * NT + j, 8);
    at->map[j] = -1;
    at->r[j] = NULL;
    if (place.map >= 0) {
      const lora_seg &of = p.map[place.map].segs[seg];
      const int rank = place.rank0 + (int)threadIdx.x / 16;
      if (place.rank0 < of.rank) at->map[j] = place.map;
      if (rank < of.rank) at->r[j] = lora_reads(of, job.of_b) + rank * job.n_cols;
    }
    n_masks += at->map[j] >= 0 && (j == 0 || at->map[j - 1] != at->map[j]);
    at->mask_map[j] = n_masks > 0 ? n_masks - 1 : 0;
  }
}

/* Sums over steps [begin, end), slice by slice. */
template <int MT, int NT>
KS_DEVICE void shrink_sum(float (&total)[MT][NT][4], const shrink_room<MT, NT> &room, const lora_work &p,
                          const shrink_place<NT> &at, int slice, int n_slices, bool split, bool masked) {
  typedef shrink_room<MT, NT> S;
  float acc[MT][NT][4] = {};
  const int n_steps = shrink_steps(at.n_cols), begin = shrink_begin(slice, n_slices, n_steps);
  int close = shrink_begin(slice + 1, n_slices, n_steps);
  const int end = split ? close : n_steps;
#pragma unroll
  for (int s = 0; s < S::STAGES - 1; s++) {
    if (begin + s < end) shrink_load<MT, NT>(room, p, at, begin + s, s, masked);
    ks_cp_async_commit();
  }
  for (int step = begin; step < end; step++) {
    ks_cp_async_wait<S::STAGES - 2>();
    __syncthreads();
    const int ahead = step + S::STAGES - 1;
    if (ahead < end) shrink_load<MT, NT>(room, p, at, ahead, (ahead - begin) % S::STAGES, masked);
    ks_cp_async_commit();
    if (masked)
      shrink_multiply<true>(acc, room, at, step, (step - begin) % S::STAGES);
    else
      shrink_multiply<false>(acc, room, at, step, (step - begin) % S::STAGES);
    if (step + 1 < close) continue;
    close = shrink_begin(++slice + 1, n_slices, n_steps);
#pragma unroll
    for (int i = 0; i < 4 * MT * NT; i++) {
      float &of = acc[i / (4 * NT)][i / 4 % NT][i % 4];
      total[i / (4 * NT)][i / 4 % NT][i % 4] += of;
      of = 0;
    }
  }
}

/* The last block of a tile adds up what all slices gave. */
template <int NT>
KS_DEVICE void shrink_combine(const lora_work &p, const lora_job &job, const shrink_place<NT> &at,
                              int32_t seg, int n_slices) {
  const int64_t width = 8 * (int64_t)job.ranks, step = p.n_rows * width;
  for (int i = (int)threadIdx.x; i < at.n_rows * 8 * NT; i += LORA_THREADS) {
    const int row = i / (8 * NT), c = i % (8 * NT);
    const lora_place place = lora_place_of(p, job, (int)blockIdx.y * NT + c / 8, 8);
    if (place.map < 0 || place.rank0 >= p.map[place.map].segs[seg].rank) continue;
    const float *from = job.partial + (at.row + row) * width + 8 * NT * (int64_t)blockIdx.y + c;
    float parts[SHRINK_MOST_SLICES], sum = 0;
#pragma unroll
    for (int s = 0; s < SHRINK_MOST_SLICES; s++)
      parts[s] = s < n_slices ? __ldcg(from + s * step) : 0.0f;
#pragma unroll
    for (int s = 0; s < SHRINK_MOST_SLICES; s++)
      sum += parts[s];
    shrink_store(p, job, place.map, place.rank0 + c % 8, seg, at.row + row, sum);
  }
}

/* split: a block does one slice of a row's columns, and the last of a tile's blocks adds them up. */
template <int MT, int NT>
__global__ void __launch_bounds__(LORA_THREADS, 3)
    lora_shrink_kernel(const __grid_constant__ lora_work p, int64_t split) {
  typedef shrink_room<MT, NT> S;
  constexpr int PIECES = LORA_TILE_ROWS / S::ROWS;
  ks_smem smem;
  const int most = split ? SHRINK_MOST_SLICES : 1, slice = (int)blockIdx.z % most;
  const lora_job &job = p.job[blockIdx.z / (unsigned)most];
  const bool masked = job.masked != 0;
  const S room(&smem, masked);
  const lora_item tile = p.tiles[blockIdx.x / PIECES];
  const int first_row = (int)blockIdx.x % PIECES * S::ROWS, n_slices = shrink_slices(job.n_cols);
  if (tile.seg < 0 || tile.n_rows <= first_row || slice >= n_slices || (int)blockIdx.y * NT >= job.ranks)
    return;
  const int lane = (int)threadIdx.x % KS_WARP, warp = (int)threadIdx.x / KS_WARP, g = lane / 4, t = lane % 4;
  shrink_place<NT> at;
  at.row = tile.row + first_row;
  at.n_rows = tile.n_rows - first_row < S::ROWS ? tile.n_rows - first_row : S::ROWS;
  at.n_cols = job.n_cols;
  at.z = job.z + at.row * job.n_cols;
  at.z_aligned = ks_is_vector_aligned(job.z, job.n_cols);
  shrink_find(&at, p, job, tile.seg);
  float total[MT][NT][4] = {};
  shrink_sum<MT, NT>(total, room, p, at, slice, n_slices, split != 0, masked);
  const int64_t width = 8 * (int64_t)job.ranks;
#pragma unroll
  for (int i = 0; i < 4 * MT * NT; i++) {
    const int m = i / (4 * NT), j = i / 4 % NT, row = (warp * MT + m) * 16 + g + i % 4 / 2 * 8,
              c = 8 * ((int)blockIdx.y * NT + j) + 2 * t + i % 2;
    if (row >= at.n_rows || at.map[j] < 0) continue;
    if (split)
      job.partial[(slice * p.n_rows + at.row + row) * width + c] = total[m][j][i % 4];
    else
      shrink_store(p, job, at.map[j], lora_place_of(p, job, c / 8, 8).rank0 + c % 8, tile.seg, at.row + row,
                   total[m][j][i % 4]);
  }
  if (!split) return;
  uint32_t *counter =
      p.counters + (blockIdx.z / (unsigned)most * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y;
  if (ks_is_last_block(counter, (uint32_t)n_slices)) shrink_combine(p, job, at, tile.seg, n_slices);
}

/* ---------------------------------------------------------------- launches */

/* Blocks of whole tiles. */
static int64_t full_blocks(const lora_work &w) {
  return w.n_rows / LORA_TILE_ROWS * w.n_jobs * lora_blocks_of(lora_most_ranks(w));
}

/* Slices meet in one block where tiles alone fill most of the device. */
static bool is_split(const ks_ctx *ctx, const lora_work &w) {
  return 8 * full_blocks(w) < 7 * ks_cuda_device_of(ctx)->n_sm;
}

/* Forward: x through A of all maps. Backward: each dy through its B. */
static lora_work work_of(const ks_ctx *ctx, const ks_linear_args *parts, const lora_group *g, bool backward,
                         void *room, size_t *bytes) {
  lora_work w = lora_work_of(parts, g);
  *bytes = 0;
  for (int64_t i = 0; i < g->n; i++) {
    if (g->of[i].max_rank == 0) continue;
    if (backward || w.n_jobs == 0) w.n_jobs++;
    lora_job *job = &w.job[w.n_jobs - 1];
    lora_add(job, g, i, 8);
    job->of_b = backward;
    job->n_cols = backward ? parts[i].w->n_out : parts[i].w->n_in;
    job->z = (const ks_bf16 *)(backward ? parts[i].dy : parts[i].x);
    job->masked = !backward && g->of[i].mask;
  }
  for (int i = 0; i < w.n_jobs && is_split(ctx, w); i++) {
    w.job[i].partial = (float *)(void *)((uint8_t *)room + *bytes);
    *bytes += (size_t)(shrink_slices(w.job[i].n_cols) * w.n_rows * 8 * w.job[i].ranks) * sizeof(float);
  }
  return w;
}

size_t ks_mma_shrink_bytes(const ks_ctx *ctx, const ks_linear_args *parts, const lora_group *g,
                           bool backward) {
  size_t bytes = 0;
  if (g->any) work_of(ctx, parts, g, backward, NULL, &bytes);
  return bytes;
}

template <int MT, int NT>
static ks_status launch(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_tiles, bool split) {
  typedef shrink_room<MT, NT> S;
  const dim3 grid((unsigned)(n_tiles * (LORA_TILE_ROWS / S::ROWS)), ks_blocks_for(lora_most_ranks(w), NT),
                  (unsigned)(w.n_jobs * (split ? SHRINK_MOST_SLICES : 1)));
  return ks_launch(ctx, op, lora_shrink_kernel<MT, NT>, grid, dim3(LORA_THREADS),
                   S::bytes(w.job[0].masked != 0), w, (int64_t)split);
}

/* Halves of tiles where slices do not fill the device either. */
template <int NT>
static ks_status launch_width(ks_ctx *ctx, const char *op, const lora_work &w, int64_t n_tiles) {
  const ks_cuda_device *device = ks_cuda_device_of(ctx);
  const bool split = is_split(ctx, w);
  if constexpr (NT < 8)
    if (full_blocks(w) * shrink_slices(w.job[0].n_cols) >= device->n_sm &&
        shrink_room<2, NT>::bytes(w.job[0].masked != 0) <= (size_t)device->smem_per_block)
      return launch<2, NT>(ctx, op, w, n_tiles, split);
  return launch<1, NT>(ctx, op, w, n_tiles, split);
}

ks_status ks_mma_shrink(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                        bool backward, void *room) {
  size_t bytes;
  const lora_work w = work_of(ctx, parts, g, backward, room, &bytes);
  const int width = lora_width(lora_most_ranks(w));
  return width == 1   ? launch_width<1>(ctx, op, w, g->of[0].n_tiles)
         : width == 3 ? launch_width<3>(ctx, op, w, g->of[0].n_tiles)
                      : launch_width<8>(ctx, op, w, g->of[0].n_tiles);
}
