/* What head_loss.cu and head_loss_wgmma.cu share: tiles of logits reduced to a maximum and a sum of exponentials. */
#ifndef KS_CUDA_HEAD_LOSS_CUH
#define KS_CUDA_HEAD_LOSS_CUH

#include "kernels/cuda/launch.cuh"

#define HEAD_LOG2E 1.4426950408889634f
enum { HEAD_WIDE_TILE = 256 }; /* vocabulary entries of a tile of head_loss_wgmma.cu */

/* exp(x - max); max -inf means that all are, and counts as 0. */
KS_DEVICE float head_exp(float x, float max) {
  return ks_exp2((x - (max == -INFINITY ? 0.0f : max)) * HEAD_LOG2E);
}

/* Over the lanes that share rows of a warp's tiles: columns lie in lanes 4 g .. 4 g + 3. */
KS_DEVICE float head_quad_max(float x) {
  x = ks_max_nan(x, __shfl_xor_sync(KS_FULL_MASK, x, 1));
  return ks_max_nan(x, __shfl_xor_sync(KS_FULL_MASK, x, 2));
}

/* Tiles of all logits of x W^T + bias. No padding: launches are compared byte by byte. */
struct head_wide_args {
  const float *bias; /* [n_vocab] or NULL */
  const int32_t *targets;
  float2 *partial; /* [n_rows, n_tiles]: maximum, sum */
  float *z_target; /* [n_rows] */
  ks_bf16 *e;      /* [n_rows, n_vocab] or NULL */
  int64_t n_rows, n_in, n_vocab, n_tiles;
};
/* head_loss_wgmma.cu. w: bf16 [n_vocab, n_in]; x and w as ks_tensor_map_takes wants them. */
ks_status ks_wgmma_head(ks_ctx *ctx, const void *x, const void *w, const head_wide_args *p);

#endif
