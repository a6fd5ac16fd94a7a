/* Shared memory and the machine instructions of kernels/cuda/device.cuh, for kernels run on the CPU. Included
 * by that file. */
#ifndef KS_SHIM_DEVICE_H
#define KS_SHIM_DEVICE_H

#include "ks_shim_threads.h"

struct ks_smem {
  int n_taken = 0;
};
/* An allocation of exactly n elements, filled with 0xff (NaN), the same for all threads of the block; freed
 * behind it. */
template <class T> inline T *ks_smem_take(ks_smem *s, size_t n) {
  return static_cast<T *>(ks_shim_smem(s->n_taken++, n * sizeof(T)));
}

/* ex2.approx.ftz: results and arguments below the normal range are 0; whole numbers are exact; everything
 * else is off by a relative 2^-22, as the instruction may be, up or down by the bits of x, so that no test
 * leans on better. */
inline float ks_exp2(float x) {
  if (x != x) return x;
  if (fabsf(x) < 0x1p-126f) return 1.0f;
  if (x < -126.0f) return 0.0f;
  const float y = exp2f(x);
  if (x == rintf(x) || y == INFINITY) return y;
  const unsigned side = __popc(ks_float_to_bits(x) * 2654435761u) & 1u;
  return y * (side ? 1.0f + 0x1p-22f : 1.0f - 0x1p-22f);
}
/* lg2.approx.ftz, as far off likewise. */
inline float ks_log2(float x) {
  if (fabsf(x) < 0x1p-126f) return -INFINITY;
  const float y = log2f(x), off = 0x1p-22f * fmaxf(fabsf(y), 1.0f);
  const unsigned side = __popc(ks_float_to_bits(x) * 2654435761u) & 1u;
  return side ? y + off : y - off;
}

/* Each lane reads its own row at once: what another lane wrote without a barrier between is seen in one order
 * only. */
inline void ks_shim_ldmatrix_row(uint32_t *r, int n, int transposed, const void *row) {
  if ((uintptr_t)row % 16 != 0)
    ks_shim_fail("ldmatrix: the address of a row, %p, is not a multiple of 16", row);
  const uint4 values = *static_cast<const uint4 *>(row);
  ks_shim_ldmatrix(r, n, transposed, &values);
}
KS_SHIM_WAITS void ks_ldmatrix_x4(uint32_t r[4], const void *row) {
  ks_shim_ldmatrix_row(r, 4, 0, row);
}
KS_SHIM_WAITS void ks_ldmatrix_x4_trans(uint32_t r[4], const void *row) {
  ks_shim_ldmatrix_row(r, 4, 1, row);
}
KS_SHIM_WAITS void ks_ldmatrix_x2(uint32_t r[2], const void *row) {
  ks_shim_ldmatrix_row(r, 2, 0, row);
}

KS_SHIM_WAITS void ks_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  ks_shim_mma(d, a, b);
}

/* The copy is made by the wait, as late as it may be; until then the place holds NaN. */
inline void ks_shim_cp_async_checked(void *smem, const void *src, bool pred, uint32_t bytes) {
  if ((uintptr_t)smem % bytes != 0)
    ks_shim_fail("cp.async: the destination %p is not a multiple of %u", smem, bytes);
  if (pred && (uintptr_t)src % bytes != 0)
    ks_shim_fail("cp.async: the source %p is not a multiple of %u", src, bytes);
  if (pred) { /* read here too, so that AddressSanitizer judges the address where it is used */
    const volatile uint32_t *from = static_cast<const volatile uint32_t *>(src);
    (void)from[0], (void)from[bytes / 4 - 1];
  }
  memset(smem, 0xff, bytes);
  ks_shim_cp_async(smem, pred ? src : nullptr, bytes);
}
inline void ks_cp_async_16(void *smem, const void *src, bool pred) {
  ks_shim_cp_async_checked(smem, src, pred, 16);
}
inline void ks_cp_async_8(void *smem, const void *src, bool pred) {
  ks_shim_cp_async_checked(smem, src, pred, 8);
}
inline void ks_cp_async_4(void *smem, const void *src, bool pred) {
  ks_shim_cp_async_checked(smem, src, pred, 4);
}
inline void ks_cp_async_commit() {
  ks_shim_cp_async_commit();
}
template <int N> inline void ks_cp_async_wait() {
  ks_shim_cp_async_wait(N);
}
#endif
