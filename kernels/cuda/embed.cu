/* Token embedding: y[i, :] = W[tokens[i], :], unpacked from blocks where W is kept in them.
 *
 * Bytes: n_rows * (bytes of a row of W + bytes of a row of y) + 4 n_rows; no arithmetic to speak of: bound by memory (H200
 * 4.25 TB/s, Orin Nano Super 102 GB/s).
 *
 * Geometry: one block a row, as many threads as the row has vectors of 16 bytes, at most 256, striding. Rows of F32 and BF16
 * that are aligned to 16 bytes are copied as they are, others element by element. 17 to 21 registers (sm_90). Determinism: no
 * sums.
 *
 * Ladder (H200, bf16, commit f74fb33; an empty kernel measures 3 us)
 *   v1  vectors of 16 bytes, one block a row: 2048 rows of 2048 17 us (noisy), 3.9 us hot in a recorded step.
 *   Next, not built: sixteen codes a thread for blocks (now one element each, coalesced); rows are short, so little is to be
 *       had. */
#include "kernels/cuda/weight.cuh"

static const int64_t MAX_THREADS = 256;

/* Drawn tokens were not checked by the host: a row without a token holds -1. */
KS_DEVICE int64_t embed_row(const ks_weight_view &w, int32_t token) {
  return token >= 0 && token < w.n_out ? token : 0;
}

static __global__ void embed_copy_kernel(ks_weight_view w, const int32_t *tokens, uint4 *y, int64_t vectors) {
  ks_grid_wait();
  ks_grid_start_next();
  const uint4 *from = (const uint4 *)(w.values + embed_row(w, tokens[blockIdx.x]) * w.row_bytes);
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
    y[blockIdx.x * vectors + i] = from[i];
}

template <class T>
__global__ void embed_unpack_kernel(const __grid_constant__ ks_weight_view w, const int32_t *tokens, T *y) {
  ks_grid_wait();
  ks_grid_start_next();
  const int64_t row = embed_row(w, tokens[blockIdx.x]);
  for (int64_t i = threadIdx.x; i < w.n_in; i += blockDim.x)
    y[blockIdx.x * w.n_in + i] = ks_from_float<T>(ks_weight_at<T>(w, row, i));
}

static unsigned threads_for(int64_t n) {
  return (unsigned)(n >= MAX_THREADS ? MAX_THREADS : (n + KS_WARP - 1) / KS_WARP * KS_WARP);
}

template <class T> static ks_status launch_embed(ks_ctx *ctx, const ks_embed_args *a) {
  const ks_weight_view w = ks_weight_view_of(a->w);
  const int32_t *tokens = a->drawn;
  if (!tokens)
    KS_TRY(ks_cuda_stage(ctx, a->tokens, (size_t)a->n_rows * sizeof *tokens, (const void **)&tokens));
  const dim3 grid(ks_blocks_for(a->n_rows, 1));
  if (!w.scales && ks_is_vector_aligned((const T *)a->y, w.n_in)) {
    const int64_t vectors = w.row_bytes / (int64_t)sizeof(uint4);
    return ks_launch_early(ctx, "embed_forward", embed_copy_kernel, grid, dim3(threads_for(vectors)), 0, w,
                           tokens, (uint4 *)a->y, vectors);
  }
  return ks_launch_early(ctx, "embed_forward", embed_unpack_kernel<T>, grid, dim3(threads_for(w.n_in)), 0, w,
                         tokens, (T *)a->y);
}

extern "C" ks_status ks_cuda_embed_forward(ks_ctx *ctx, const ks_embed_args *a) {
  return KS_CUDA_BY_ACT(ctx, launch_embed, (ctx, a));
}
