/* Type-safe launches:
 *
 *   return ks_launch(ctx, "pool", pool_kernel<float>, dim3(n_blocks), dim3(256), ks_smem_bytes<float>(32), x, y, n_cols);
 *
 * Arguments are converted to the kernel's parameter types, so that what is recorded in a step is what the kernel sees. */
#ifndef KS_CUDA_LAUNCH_CUH
#define KS_CUDA_LAUNCH_CUH

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.cuh"

#include <tuple>
#include <utility>

#ifdef KS_CUDA_ON_CPU
template <class... P, size_t... I>
static void ks_invoke_unpacked(void (*kernel)(P...), void **args, std::index_sequence<I...>) {
  (void)args;
  kernel(*static_cast<typename std::remove_cv<P>::type *>(args[I])...);
}
template <class... P> static void ks_invoke(const void *func, void **args) {
  ks_invoke_unpacked(reinterpret_cast<void (*)(P...)>(reinterpret_cast<uintptr_t>(func)), args,
                     std::index_sequence_for<P...>{});
}
#endif

template <class... P, size_t... I>
static ks_status ks_launch_packed(ks_ctx *ctx, ks_cuda_launch_params *p, std::tuple<P...> *values,
                                  std::index_sequence<I...>) {
  void *args[sizeof...(P) + 1] = {(void *)&std::get<I>(*values)...};
  const size_t sizes[sizeof...(P) + 1] = {sizeof(P)...};
  p->args = args;
  p->arg_sizes = sizes;
  p->n_args = (int)sizeof...(P);
  return ks_cuda_launch(ctx, p);
}

template <class... P, class... A>
static ks_status ks_launch_as(bool early, ks_ctx *ctx, const char *op, void (*kernel)(P...), dim3 grid, dim3 block,
                              size_t smem_bytes, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "a kernel's parameters and a launch's arguments");
  std::tuple<typename std::remove_cv<P>::type...> values(args...);
  ks_cuda_launch_params p = {};
  p.op = op;
  p.func = reinterpret_cast<const void *>(kernel);
#ifdef KS_CUDA_ON_CPU
  p.invoke = ks_invoke<P...>;
#endif
  p.grid = grid;
  p.block = block;
  p.smem_bytes = smem_bytes;
  p.early = early;
  return ks_launch_packed(ctx, &p, &values, std::make_index_sequence<sizeof...(P)>{});
}
template <class... P, class... A>
static ks_status ks_launch(ks_ctx *ctx, const char *op, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                           A... args) {
  return ks_launch_as(false, ctx, op, kernel, grid, block, smem_bytes, args...);
}
/* Of a kernel that calls ks_grid_wait: see ks_cuda_launch_params.early. */
template <class... P, class... A>
static ks_status ks_launch_early(ks_ctx *ctx, const char *op, void (*kernel)(P...), dim3 grid, dim3 block,
                                 size_t smem_bytes, A... args) {
  return ks_launch_as(true, ctx, op, kernel, grid, block, smem_bytes, args...);
}

/* For kernels that may begin before those queued earlier have ended (ks_launch_early). Every thread calls ks_grid_wait once; what
 * earlier kernels write is read, and anything that they read is written, behind it: above it only addresses are made and frozen
 * weights read. Also behind it no __ldg and no const __restrict__ pointer to such memory: those loads are for what nobody writes
 * while the kernel is there, and it is there before the writing ends. ks_grid_start_next: the next such kernel may begin; its
 * blocks come as room for them is left. */
KS_DEVICE void ks_grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(KS_CUDA_ON_CPU)
  ks_shim_grid_wait();
#endif
}
KS_DEVICE void ks_grid_start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Blocks of `per_block` for n things. Too many for a grid are refused by the launch, whatever their number. */
static inline unsigned ks_blocks_for(int64_t n, int64_t per_block) {
  int64_t blocks = (n + per_block - 1) / per_block;
  return (unsigned)(blocks < UINT32_MAX ? blocks : UINT32_MAX);
}

/* f<float> or f<ks_bf16> by the context's activations: return KS_CUDA_BY_ACT(ctx, launch_norm, (ctx, a)); */
#define KS_CUDA_BY_ACT(ctx, f, args)                                                                         \
  (ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 ? f<ks_bf16> args : f<float> args)

#endif
