/* Pooling of a sequence's rows: the last one, or the mean.
 *
 *   y[s, :] = x[end - 1, :]        y[s, :] = sum of the rows of s / their number
 *
 * Bytes, with e those of an activation: last (e + 4) n_seqs n_cols; mean e n_rows n_cols. Flops: mean 8
 * n_rows n_cols (a compensated sum), 2 to 4 a byte: bound by memory.
 *
 * The mean is exact to float32's rounding, as the CPU's sum in double is, without double's rate of 1 : 64 on
 * small cards: every sum is a pair of floats (pair.cuh). Elements are scaled by the power of two below 1 / rows first,
 * which is exact, so that no sum overflows; the pair is divided in double, once an output.
 *
 * Geometry: a block of 256 threads takes one sequence and 8 pieces of 16 bytes of its columns: 128 bytes of a
 * row, a whole line. Its threads are 32 groups of 8; group g adds rows g, g + 32, ... of the sequence, 2
 * loads under way a thread, 32 KiB a multiprocessor. Then the pairs of the 4 groups of a warp are added by
 * shuffles, those of the 8 warps in their order. 63 registers (float32 54, sm_90): 4 blocks a multiprocessor.
 *
 * Determinism: the order of a sum depends on the sequence's own number of rows only.
 *
 * Ladder (H200, bf16, commit 2cc54c8; 16 x 128 tokens of 2048: 8.4 MB; an empty kernel measures 3 us, and 2 us more for staging)
 *   considered  a thread a column over all rows, in double: one load under way, and double's rate on small cards
 *   v1          blocks of 32 pieces, a row a warp: 128 blocks, 16 KiB under way where 26 would be enough, 4
 *               turns. Mean 12.8 us, hot in a recorded step 6.0 us; last 8.2 and 3.1 us
 *   v2          this: 512 blocks, half of the 8.4 MB asked for at once. Computed: 9 us, hot 4 us; not measured yet */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pair.cuh"
#include "kernels/cuda/row.cuh"

enum {
  POOL_THREADS = 256,
  POOL_WARPS = POOL_THREADS / KS_WARP,
  POOL_LANES = 8,
  POOL_GROUPS = POOL_THREADS / POOL_LANES,
  POOL_UNROLL = 2
};

template <class T>
KS_DEVICE void pool_rows(ks_pair *sum, const T *x, int64_t n_rows, int64_t n_cols, int64_t n_left,
                         float scale, bool aligned) {
  enum { N = ks_piece<T>::N };
  for (int64_t i = (int)threadIdx.x / POOL_LANES; i < n_rows; i += POOL_GROUPS * POOL_UNROLL) {
    ks_piece<T> held[POOL_UNROLL];
#pragma unroll
    for (int k = 0; k < POOL_UNROLL; k++)
      if (i + k * POOL_GROUPS < n_rows)
        held[k] = ks_piece_load(x + (i + k * POOL_GROUPS) * n_cols, n_left, aligned);
#pragma unroll
    for (int k = 0; k < POOL_UNROLL; k++) {
      if (i + k * POOL_GROUPS >= n_rows) break;
      float v[N];
      ks_piece_unpack(v, held[k]);
#pragma unroll
      for (int j = 0; j < N; j++)
        ks_pair_add(&sum[j], v[j] * scale);
    }
  }
}

KS_DEVICE float pool_quotient(ks_pair sum, double scaled_rows) {
  const float infinite = sum.hi - sum.hi; /* 0, or NaN: then lo is one too, and hi alone says what came */
  return infinite == 0.0f ? (float)(((double)sum.hi + (double)sum.lo) / scaled_rows) : sum.hi;
}

/* n_chunks: stretches of POOL_LANES pieces that cover the columns. */
template <class T>
__global__ void __launch_bounds__(POOL_THREADS, 4)
    pool_kernel(const T *x, const int64_t *offsets, float *y, int64_t n_cols, int64_t n_chunks, bool last,
                bool x_aligned) {
  enum { N = ks_piece<T>::N, STRETCH = POOL_LANES * N };
  ks_smem smem;
  ks_pair *room = ks_smem_take<ks_pair>(&smem, POOL_WARPS * STRETCH);
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, piece = lane % POOL_LANES;
  const int64_t seq = blockIdx.x / n_chunks, column = (blockIdx.x % n_chunks * POOL_LANES + piece) * N,
                n_left = n_cols - column, end = offsets[seq + 1], begin = last ? end - 1 : offsets[seq];
  const int exponent = 64 - __clzll((long long)(end - begin - 1)); /* 2^exponent >= rows; one row: 0 */
  ks_pair sum[N];
#pragma unroll
  for (int j = 0; j < N; j++)
    sum[j].hi = -0.0f, sum[j].lo = -0.0f; /* so that the sum of one row is that row */
  if (n_left > 0)
    pool_rows(sum, x + begin * n_cols + column, end - begin, n_cols, n_left, ldexpf(1.0f, -exponent),
              x_aligned);
#pragma unroll
  for (int j = 0; j < N; j++) {
#pragma unroll
    for (int d = POOL_LANES; d < KS_WARP; d *= 2) {
      const ks_pair other = {__shfl_xor_sync(KS_FULL_MASK, sum[j].hi, d),
                             __shfl_xor_sync(KS_FULL_MASK, sum[j].lo, d)};
      ks_pair_merge(&sum[j], other);
    }
    if (lane < POOL_LANES) room[warp * STRETCH + piece * N + j] = sum[j];
  }
  __syncthreads();
  const int64_t out = blockIdx.x % n_chunks * STRETCH + threadIdx.x;
  if (threadIdx.x >= STRETCH || out >= n_cols) return;
  ks_pair total = room[threadIdx.x];
  for (int w = 1; w < POOL_WARPS; w++)
    ks_pair_merge(&total, room[w * STRETCH + (int)threadIdx.x]);
  y[seq * n_cols + out] = pool_quotient(total, ldexp((double)(end - begin), -exponent));
}

template <class T> static ks_status pool(ks_ctx *ctx, const ks_pool_args *a) {
  const int64_t *offsets, n_chunks = (ks_pieces_of<T>(a->n_cols) + POOL_LANES - 1) / POOL_LANES;
  const bool last = a->pooling == KS_POOL_LAST, x_aligned = ks_is_vector_aligned((const T *)a->x, a->n_cols);
  KS_TRY(
      ks_cuda_stage(ctx, a->seq_offsets, (size_t)(a->n_seqs + 1) * sizeof *offsets, (const void **)&offsets));
  return ks_launch(ctx, "pool", pool_kernel<T>, dim3(ks_blocks_for(a->n_seqs * n_chunks, 1)),
                   dim3(POOL_THREADS), ks_smem_bytes<ks_pair>(POOL_WARPS * POOL_LANES * ks_piece<T>::N),
                   (const T *)a->x, offsets, a->y, a->n_cols, n_chunks, last, x_aligned);
}

extern "C" ks_status ks_cuda_pool(ks_ctx *ctx, const ks_pool_args *a) {
  return KS_CUDA_BY_ACT(ctx, pool, (ctx, a));
}
