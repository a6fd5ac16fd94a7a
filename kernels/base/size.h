/* Checked size arithmetic and allocation. Every product of sizes that comes from outside goes through here.
 */
#ifndef KS_SIZE_H
#define KS_SIZE_H

#include "kernels/base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* *out = a * b; false on overflow (then *out is undefined). */
static inline bool ks_mul_size(size_t a, size_t b, size_t *out) {
  return !__builtin_mul_overflow(a, b, out);
}
static inline bool ks_add_size(size_t a, size_t b, size_t *out) {
  return !__builtin_add_overflow(a, b, out);
}
static inline bool ks_mul_i64(int64_t a, int64_t b, int64_t *out) {
  return !__builtin_mul_overflow(a, b, out);
}

/* *out = zeroed array [n] of `size`-byte elements, aligned to 64 bytes; never NULL on KS_OK (n may be 0), NULL on failure.
 * The caller frees it with free(). `what` names it in the message: KS_EOVERFLOW or KS_ENOMEM. */
static inline ks_status ks_alloc_array(void *out, size_t n, size_t size, const char *what) {
  size_t bytes, rounded;
  void *p = NULL;
  memcpy(out, &p, sizeof p);
  if (!ks_mul_size(n, size, &bytes) || !ks_add_size(bytes, 64, &rounded))
    return KS_FAIL(KS_EOVERFLOW, "%s: %zu elements of %zu bytes do not fit an address space", what, n, size);
  rounded &= ~(size_t)63;
  if (rounded == 0) rounded = 64;
  p = aligned_alloc(64, rounded);
  if (!p)
    return KS_FAIL(KS_ENOMEM, "%s: no memory for %zu bytes; use a smaller model, batch or buffer", what,
                   bytes);
  memset(p, 0, rounded);
  memcpy(out, &p, sizeof p);
  return KS_OK;
}

static inline int64_t ks_min_i64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t ks_max_i64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

#endif
