/* What the CPU backend keeps for a weight. */
#ifndef KS_CPU_WEIGHT_H
#define KS_CPU_WEIGHT_H

#include "kernels/cpu/gemm_pack.h"

typedef struct {
  gemm_layout forward, backward; /* backward.data NULL until prepared */
  float *bias;                   /* padded to whole panels, or NULL */
} weight_impl;

static ks_status weight_backward(ks_ctx *ctx, const ks_weight *w, gemm_layout *out);

#endif
