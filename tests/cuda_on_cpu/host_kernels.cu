/* Small kernels for test_host.c. */
#include "host_kernels.h"

#include "kernels/cuda/launch.cuh"

/* y[i] = x[i] * p[0] + p[1] */
static __global__ void affine_kernel(float *y, const float *x, const float *p, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = fmaf(x[i], p[0], p[1]);
}

extern "C" ks_status host_affine(ks_ctx *ctx, float *y, const float *x, const float p[2], int64_t n) {
  const float *staged;
  KS_TRY(ks_cuda_stage(ctx, p, 2 * sizeof *p, (const void **)&staged));
  return ks_launch(ctx, "affine", affine_kernel, dim3(ks_blocks_for(n, 64)), dim3(64), 0, y, x, staged, n);
}

/* The same by way of the workspace. */
extern "C" ks_status host_affine_twice(ks_ctx *ctx, float *y, const float *x, const float p[2], int64_t n) {
  const float *staged;
  void *between;
  KS_TRY(ks_cuda_stage(ctx, p, 2 * sizeof *p, (const void **)&staged));
  KS_TRY(ks_cuda_workspace(ctx, (size_t)n * sizeof *y, &between));
  KS_TRY(ks_launch(ctx, "affine", affine_kernel, dim3(ks_blocks_for(n, 64)), dim3(64), 0, (float *)between, x,
                   staged, n));
  return ks_launch(ctx, "affine", affine_kernel, dim3(ks_blocks_for(n, 64)), dim3(64), 0, y,
                   (const float *)between, staged, n);
}

static __global__ void shared_kernel(float *y, int n) {
  ks_smem smem;
  float *all = ks_smem_take<float>(&smem, (size_t)n);
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
    all[i] = (float)i;
  __syncthreads();
  if (threadIdx.x == 0) y[0] = all[n - 1];
}

extern "C" ks_status host_launch(ks_ctx *ctx, float *y, dim3 grid, dim3 block, size_t smem_bytes) {
  return ks_launch(ctx, "shared", shared_kernel, grid, block, smem_bytes, y, (int)(smem_bytes / sizeof *y));
}

static __global__ void broken_kernel(float *y) {
  y[0] = 1;
  __trap();
}

extern "C" ks_status host_break(ks_ctx *ctx, float *y) {
  return ks_launch(ctx, "broken", broken_kernel, dim3(1), dim3(32), 0, y);
}
