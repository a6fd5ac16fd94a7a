/* What the CPU backend keeps for a weight. */
#ifndef KS_CPU_WEIGHT_H
#define KS_CPU_WEIGHT_H

#include "kernels/cpu/gemm_tile.h"

typedef struct {
  gemm_layout forward, backward; /* backward.data NULL until prepared */
  float *bias;                   /* padded to whole panels, or NULL */
} weight_impl;

/* The layout that input gradients read, made now if the caller has not. */
KS_INLINE ks_status weight_backward(ks_ctx *ctx, const ks_weight *w, const gemm_layout **out) {
  weight_impl *impl = w->impl;
  *out = &impl->backward;
  return impl->backward.data ? KS_OK : ks_weight_prepare_backward(ctx, (ks_weight *)w);
}

#endif
