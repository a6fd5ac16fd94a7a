/* Kernels of the meter (kernels/meter.h): nothing, waiting, reading, random numbers.
 *
 *   null    what a launch costs
 *   delay   one thread counts clock cycles: the device is busy, its memory is not. Behind it the host can
 * queue, so that a region of short kernels is not a measurement of the host read    every 16 bytes of an
 * array once; bytes 16 n. The bound is memory's read bandwidth: 4 loads in flight a thread, 2048 threads an
 * SM, no store but one that never happens. What is added up (an xor) keeps the loads alive random  x[i] =
 * uniform in [-1, 1) from a hash of i: matrix products draw more power, and so run slower, on random data
 * than on zeros
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/meter.cuh"

enum { METER_THREADS = 512, METER_BLOCKS_PER_SM = 4, METER_UNROLL = 4 };

__global__ void meter_null_kernel(int nothing) {
  (void)nothing;
}

__global__ void meter_delay_kernel(int64_t cycles) {
#ifndef KS_CUDA_ON_CPU
  const int64_t start = clock64();
  while (clock64() - start < cycles) {
  }
#else
  (void)cycles;
#endif
}

__global__ void meter_read_kernel(const uint4 *x, int64_t n, uint32_t *never) {
  const int64_t stride = (int64_t)gridDim.x * METER_THREADS;
  uint32_t seen = 0;
  int64_t i = (int64_t)blockIdx.x * METER_THREADS + threadIdx.x;
  for (; i + (METER_UNROLL - 1) * stride < n; i += METER_UNROLL * stride) {
    uint4 v[METER_UNROLL];
#pragma unroll
    for (int k = 0; k < METER_UNROLL; k++)
      v[k] = x[i + k * stride];
#pragma unroll
    for (int k = 0; k < METER_UNROLL; k++)
      seen ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < n; i += stride)
    seen ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  if (seen == 0x9e3779b9u && n < 0) *never = seen;
}

template <class T> __global__ void meter_random_kernel(T *x, int64_t n, uint32_t seed) {
  const int64_t stride = (int64_t)gridDim.x * METER_THREADS;
  for (int64_t i = (int64_t)blockIdx.x * METER_THREADS + threadIdx.x; i < n; i += stride) {
    uint32_t h = (uint32_t)i * 0x9e3779b1u + seed; /* two rounds of multiply and fold */
    h = (h ^ h >> 15) * 0x85ebca77u;
    h = (h ^ h >> 13) * 0xc2b2ae3du;
    x[i] = ks_from_float<T>((float)(int32_t)(h ^ h >> 16) * 0x1p-31f);
  }
}

extern "C" ks_status ks_cuda_meter_null(ks_ctx *ctx) {
  return ks_launch(ctx, "meter", meter_null_kernel, dim3(1), dim3(32), 0, 0);
}

extern "C" ks_status ks_cuda_meter_delay(ks_ctx *ctx, int64_t cycles) {
  return ks_launch(ctx, "meter", meter_delay_kernel, dim3(1), dim3(1), 0, cycles);
}

extern "C" ks_status ks_cuda_meter_touch(ks_ctx *ctx, const void *x, size_t bytes, void *never) {
  const unsigned n_blocks = (unsigned)(ks_cuda_device_of(ctx)->n_sm * METER_BLOCKS_PER_SM);
  return ks_launch(ctx, "meter", meter_read_kernel, dim3(n_blocks), dim3(METER_THREADS), 0, (const uint4 *)x,
                   (int64_t)(bytes / sizeof(uint4)), (uint32_t *)never);
}

template <class T> static ks_status meter_random(ks_ctx *ctx, void *x, int64_t n, uint32_t seed) {
  const unsigned n_blocks = ks_blocks_for(n, 8 * METER_THREADS);
  return ks_launch(ctx, "meter", meter_random_kernel<T>, dim3(n_blocks), dim3(METER_THREADS), 0, (T *)x, n,
                   seed);
}

extern "C" ks_status ks_cuda_meter_random(ks_ctx *ctx, ks_dtype dtype, void *x, int64_t n, uint32_t seed) {
  return dtype == KS_DTYPE_BF16 ? meter_random<ks_bf16>(ctx, x, n, seed)
                                : meter_random<float>(ctx, x, n, seed);
}
