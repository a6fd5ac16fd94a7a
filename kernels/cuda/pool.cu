/* Pooling of a sequence's rows: the last one, or the mean.
 *
 *   y[s, :] = x[end - 1, :]        y[s, :] = sum of the rows of s / their number
 *
 * Bytes, with e those of an activation: last (e + 4) n_seqs n_cols; mean e n_rows n_cols. Flops: mean 8
 * n_rows n_cols (a compensated sum), 2 to 4 a byte: bound by memory.
 *
 * The mean is exact to float32's rounding, as the CPU's sum in double is, without double's rate of 1 : 64 on
 * small cards: every sum is a pair hi + lo, where hi + x = s + e exactly (Knuth's two-sum) and lo gathers e.
 * Elements are scaled by the power of two below 1 / rows first, which is exact, so that no sum overflows; the
 * pair is divided in double, once an output.
 *
 * Geometry: a block of 8 warps takes one sequence and 32 pieces of 16 bytes of its columns; warp w adds rows
 * w, w + 8, ... of the sequence, 4 loads under way, then the 8 pairs are added in the order of the warps.
 *
 * Determinism: the order of a sum depends on the sequence's own number of rows only.
 *
 * Ladder (times: not measured yet)
 *   considered  a thread a column over all rows, in double: one load under way, and double's rate on small cards
 *   v1          this; expected: the card's read bandwidth once there are a few hundred blocks */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"

enum { POOL_WARPS = 8, POOL_UNROLL = 4 };

typedef struct {
  float hi, lo;
} pool_pair;

/* The compiler must not reorder these: float32 is not associative, and nothing here asks for fast arithmetic.
 */
KS_DEVICE void pool_add(pool_pair *sum, float x) {
  const float s = sum->hi + x, x_part = s - sum->hi;
  sum->lo += (sum->hi - (s - x_part)) + (x - x_part);
  sum->hi = s;
}

template <class T>
KS_DEVICE void pool_rows(pool_pair *sum, const T *x, int64_t n_rows, int64_t n_cols, int64_t n_left,
                         float scale, bool aligned) {
  enum { N = ks_piece<T>::N };
  const int warp = (int)threadIdx.x / KS_WARP;
  for (int64_t i = warp; i < n_rows; i += POOL_WARPS * POOL_UNROLL) {
    ks_piece<T> held[POOL_UNROLL];
#pragma unroll
    for (int k = 0; k < POOL_UNROLL; k++)
      if (i + k * POOL_WARPS < n_rows)
        held[k] = ks_piece_load(x + (i + k * POOL_WARPS) * n_cols, n_left, aligned);
#pragma unroll
    for (int k = 0; k < POOL_UNROLL; k++) {
      if (i + k * POOL_WARPS >= n_rows) break;
      float v[N];
      ks_piece_unpack(v, held[k]);
#pragma unroll
      for (int j = 0; j < N; j++)
        pool_add(&sum[j], v[j] * scale);
    }
  }
}

KS_DEVICE float pool_quotient(pool_pair sum, double scaled_rows) {
  const float infinite = sum.hi - sum.hi; /* 0, or NaN: then lo is one too, and hi alone says what came */
  return infinite == 0.0f ? (float)(((double)sum.hi + (double)sum.lo) / scaled_rows) : sum.hi;
}

/* n_chunks: stretches of 32 pieces that cover the columns. */
template <class T>
__global__ void pool_kernel(const T *x, const int64_t *offsets, float *y, int64_t n_cols, int64_t n_chunks,
                            bool last, bool x_aligned, bool y_aligned) {
  enum { N = ks_piece<T>::N };
  ks_smem smem;
  pool_pair *room = ks_smem_take<pool_pair>(&smem, POOL_WARPS * KS_WARP * N);
  const int64_t seq = blockIdx.x / n_chunks,
                column = (blockIdx.x % n_chunks * KS_WARP + threadIdx.x % KS_WARP) * N,
                n_left = n_cols - column, end = offsets[seq + 1], begin = last ? end - 1 : offsets[seq];
  const int exponent = 64 - __clzll((long long)(end - begin - 1)); /* 2^exponent >= rows; one row: 0 */
  pool_pair sum[N];
#pragma unroll
  for (int j = 0; j < N; j++)
    sum[j].hi = -0.0f, sum[j].lo = -0.0f; /* so that the sum of one row is that row */
  if (n_left > 0)
    pool_rows(sum, x + begin * n_cols + column, end - begin, n_cols, n_left, ldexpf(1.0f, -exponent),
              x_aligned);
#pragma unroll
  for (int j = 0; j < N; j++)
    room[j * POOL_WARPS * KS_WARP + threadIdx.x] = sum[j];
  __syncthreads();
  if (threadIdx.x >= KS_WARP || n_left <= 0) return;
  const double scaled_rows = ldexp((double)(end - begin), -exponent);
  float out[N];
#pragma unroll
  for (int j = 0; j < N; j++) {
    for (int w = 1; w < POOL_WARPS; w++) {
      const pool_pair other = room[j * POOL_WARPS * KS_WARP + w * KS_WARP + threadIdx.x];
      pool_add(&sum[j], other.hi);
      sum[j].lo += other.lo;
    }
    out[j] = pool_quotient(sum[j], scaled_rows);
  }
#pragma unroll
  for (int j = 0; j < N; j += 4)
    ks_piece_store(y + seq * n_cols + column + j, ks_piece_pack<float>(out + j), n_left - j, y_aligned);
}

template <class T> static ks_status pool(ks_ctx *ctx, const ks_pool_args *a) {
  const int64_t *offsets, n_chunks = (ks_pieces_of<T>(a->n_cols) + KS_WARP - 1) / KS_WARP;
  const bool last = a->pooling == KS_POOL_LAST, x_aligned = ks_is_vector_aligned((const T *)a->x, a->n_cols),
             y_aligned = ks_is_vector_aligned(a->y, a->n_cols);
  KS_TRY(
      ks_cuda_stage(ctx, a->seq_offsets, (size_t)(a->n_seqs + 1) * sizeof *offsets, (const void **)&offsets));
  return ks_launch(ctx, "pool", pool_kernel<T>, dim3(ks_blocks_for(a->n_seqs * n_chunks, 1)),
                   dim3(POOL_WARPS * KS_WARP),
                   ks_smem_bytes<pool_pair>(POOL_WARPS * KS_WARP * ks_piece<T>::N), (const T *)a->x, offsets,
                   a->y, a->n_cols, n_chunks, last, x_aligned, y_aligned);
}

extern "C" ks_status ks_cuda_pool(ks_ctx *ctx, const ks_pool_args *a) {
  return KS_CUDA_BY_ACT(ctx, pool, (ctx, a));
}
