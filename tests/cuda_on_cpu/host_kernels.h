/* Launchers of host_kernels.cu, for test_host.c. */
#ifndef KS_TEST_HOST_KERNELS_H
#define KS_TEST_HOST_KERNELS_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x p[0] + p[1]; p: host, staged. */
ks_status host_affine(ks_ctx *ctx, float *y, const float *x, const float p[2], int64_t n);
/* That twice, by way of the workspace. */
ks_status host_affine_twice(ks_ctx *ctx, float *y, const float *x, const float p[2], int64_t n);
/* y[0] = number of floats in smem_bytes, less one. */
ks_status host_launch(ks_ctx *ctx, float *y, dim3 grid, dim3 block, size_t smem_bytes);
/* Frees every array of ctx, and ctx. */
static inline void host_destroy(ks_ctx *ctx) {
  while (ctx && ctx->n_blocks > 0)
    ks_mem_free(ctx, ctx->blocks[0].p);
  ks_ctx_destroy(ctx);
}
/* A kernel that fails on the device. */
ks_status host_break(ks_ctx *ctx, float *y);

#ifdef __cplusplus
}
#endif
#endif
