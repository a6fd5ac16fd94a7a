/* Launches and device arrays for the tests of the shim itself, without a backend between. Include criterion
 * first. */
#ifndef KS_TEST_LAUNCH_H
#define KS_TEST_LAUNCH_H

#include "kernels/cuda/device.cuh"
#include "ks_shim.h"

#include <stdlib.h>
#include <string.h>
#include <tuple>
#include <utility>

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
                              (int)sizeof...(P), smem, stream, 0, "test");
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

#endif
