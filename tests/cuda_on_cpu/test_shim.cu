/* The shim itself: order of threads, barriers, collectives, fragments, copies, memory, streams, graphs. */
#include <criterion/criterion.h>

#include "kernels/cuda/device.cuh"
#include "ks_shim.h"
#include <stdlib.h>
#include <string.h>
#include <tuple>
#include <utility>

/* ---------------------------------------------------------------- launching */

template <class... P, size_t... I>
static void call(void (*kernel)(P...), void **args, std::index_sequence<I...>) {
  (void)args;
  kernel(*static_cast<P *>(args[I])...);
}
template <class... P> static void invoke(const void *func, void **args) {
  call(reinterpret_cast<void (*)(P...)>(reinterpret_cast<uintptr_t>(func)), args,
       std::index_sequence_for<P...>{});
}
template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                          A... given) {
  std::tuple<P...> values(given...);
  return std::apply(
      [&](P &...value) {
        void *args[] = {&value..., nullptr};
        const size_t sizes[] = {sizeof(P)..., 0};
        return ks_shim_launch(reinterpret_cast<const void *>(kernel), invoke<P...>, grid, block, args, sizes,
                              (int)sizeof...(P), smem, stream, "test");
      },
      values);
}

template <class T> static T *device_array(int64_t n, const T *values) {
  void *p;
  cr_assert(cudaMalloc(&p, (size_t)n * sizeof(T)) == cudaSuccess);
  if (values) cr_assert(cudaMemcpy(p, values, (size_t)n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return static_cast<T *>(p);
}
template <class T> static void fetch(T *host, const T *device, int64_t n) {
  cr_assert(cudaMemcpy(host, device, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
}

static const int orders[] = {0, 1, 2, 3, 4};

/* ---------------------------------------------------------------- barriers, collectives */

static __global__ void reverse_kernel(const int *x, int *y, int n) {
  ks_smem smem;
  int *tile = ks_smem_take<int>(&smem, (size_t)n);
  const int i = (int)threadIdx.x, from = (int)blockIdx.x * n;
  tile[i] = x[from + i];
  __syncthreads();
  y[from + i] = tile[n - 1 - i];
}

Test(shim, barrier_and_orders) {
  enum { BLOCKS = 3, N = 97 };
  int x[BLOCKS * N], y[BLOCKS * N];
  for (int i = 0; i < BLOCKS * N; i++)
    x[i] = 7 * i;
  for (int order : orders) {
    ks_shim_set_order(order);
    int *dx = device_array(BLOCKS * N, x), *dy = device_array<int>(BLOCKS * N, NULL);
    cr_assert(launch(reverse_kernel, dim3(BLOCKS), dim3(N), ks_smem_bytes<int>(N), NULL, dx, dy, (int)N) ==
              cudaSuccess);
    fetch(y, dy, BLOCKS * N);
    for (int i = 0; i < BLOCKS * N; i++)
      cr_assert(y[i] == x[i / N * N + N - 1 - i % N]);
    cudaFree(dx), cudaFree(dy);
  }
  cr_assert(ks_shim_memory_used() == 0);
}
