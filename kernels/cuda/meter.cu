/* Kernels of the meter (kernels/meter.h).
 *
 * null: what a launch costs.
 *
 * delay: one thread counts clock cycles; the device is busy, its memory is not. Behind it the host can queue,
 * so that a region of short kernels is not a measurement of the host.
 *
 * read: every 16 bytes of an array once, 16 n bytes, bound by memory: 8 loads in flight a thread. The xor of
 * what was read keeps the loads alive; it is stored when it has a value that an array of equal bytes cannot
 * give.
 *
 * random: x[i] = uniform in [-1, 1) from a hash of i. Matrix products draw more power, and so run slower, on
 * random data than on zeros. */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/meter.cuh"

enum { METER_THREADS = 512, METER_TURNS = 4, METER_UNROLL = 8 };

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

/* A block takes stretches of METER_THREADS * METER_UNROLL pieces, one after another across the grid. */
__global__ void meter_read_kernel(const uint4 *x, int64_t n, uint32_t *never) {
  enum { STRETCH = METER_THREADS * METER_UNROLL };
  uint32_t seen = 0;
  for (int64_t at = (int64_t)blockIdx.x * STRETCH; at < n; at += (int64_t)gridDim.x * STRETCH) {
    uint4 v[METER_UNROLL];
#pragma unroll
    for (int k = 0; k < METER_UNROLL; k++) {
      const int64_t i = at + k * METER_THREADS + threadIdx.x;
      v[k] = x[i < n ? i : 0];
    }
#pragma unroll
    for (int k = 0; k < METER_UNROLL; k++)
      seen ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (seen == 0x9e3779b9u) *never = seen;
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
  const unsigned n_blocks =
      ks_blocks_for((int64_t)(bytes / sizeof(uint4)), METER_THREADS * METER_UNROLL * METER_TURNS);
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
