/* Hopper's instructions as kernels/cuda/wgmma.cuh names them, for kernels run on the CPU (hopper.c). Included by that file. */
#ifndef KS_SHIM_HOPPER_H
#define KS_SHIM_HOPPER_H

#include "ks_shim_threads.h"

extern "C" {
void ks_shim_barrier_init(uint64_t *b, uint32_t arrivals);
/* One arrival, after `bytes` more were announced. */
void ks_shim_barrier_arrive(uint64_t *b, uint32_t bytes);
void ks_shim_barrier_wait(uint64_t *b, uint32_t parity);
void ks_shim_tma_load(void *tile, const void *map, int col, int row, uint64_t *b);
void ks_shim_async_fence(void);
void ks_shim_wgmma_fence(const float *acc, int n_sums);
void ks_shim_wgmma(float *acc, int n_sums, uint64_t a, uint64_t b, int mn_major, int keep);
void ks_shim_wgmma_commit(void);
void ks_shim_wgmma_wait(int n_left);
}

inline uint32_t ks_smem_address(const void *p) {
  return ks_shim_smem_address(p);
}
inline void ks_barrier_init(uint64_t *b, uint32_t arrivals) {
  ks_shim_barrier_init(b, arrivals);
}
inline void ks_barrier_init_done() {
  ks_shim_async_fence();
}
inline void ks_barrier_arrive(uint64_t *b) {
  ks_shim_barrier_arrive(b, 0);
}
inline void ks_barrier_expect(uint64_t *b, uint32_t bytes) {
  ks_shim_barrier_arrive(b, bytes);
}
KS_SHIM_WAITS void ks_barrier_wait(uint64_t *b, uint32_t parity) {
  ks_shim_barrier_wait(b, parity);
}
inline void ks_tma_load(void *tile, const ks_tensor_map *map, int col, int row, uint64_t *b) {
  ks_shim_tma_load(tile, map, col, row, b);
}
inline void ks_tma_prefetch(const ks_tensor_map *) {}
inline void ks_async_fence() {
  ks_shim_async_fence();
}
template <int N> inline void ks_registers_fewer() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a number of registers that setmaxnreg takes");
}
template <int N> inline void ks_registers_more() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a number of registers that setmaxnreg takes");
}
template <int SUMS> inline void ks_wgmma_fence(float (&acc)[SUMS]) {
  ks_shim_wgmma_fence(acc, SUMS);
}
template <int MN_MAJOR, int SUMS> inline void ks_wgmma(float (&acc)[SUMS], uint64_t a, uint64_t b, int keep) {
  static_assert(SUMS == 64 || SUMS == 128, "m64n128k16 or m64n256k16");
  ks_shim_wgmma(acc, SUMS, a, b, MN_MAJOR, keep);
}
inline void ks_wgmma_commit() {
  ks_shim_wgmma_commit();
}
template <int N, int SUMS> inline void ks_wgmma_wait(float (&)[SUMS]) {
  ks_shim_wgmma_wait(N);
}
#endif
