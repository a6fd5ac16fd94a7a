/* Little-endian bytes of snapshots: written to a ks_text, read with every length checked. */
#ifndef KS_SELECT_BYTES_H
#define KS_SELECT_BYTES_H

#include "core/base/base.h"

static inline ks_status ks_bytes_put_u64(ks_text *t, uint64_t v) {
  char b[8];
  for (int i = 0; i < 8; i++)
    b[i] = (char)(unsigned char)(v >> (8 * i));
  return ks_text_add(t, b, sizeof b);
}

static inline ks_status ks_bytes_put_i64(ks_text *t, int64_t v) {
  return ks_bytes_put_u64(t, (uint64_t)v);
}

static inline ks_status ks_bytes_put_f64(ks_text *t, double v) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  return ks_bytes_put_u64(t, bits);
}

static inline ks_status ks_bytes_put_f32s(ks_text *t, const float *v, int64_t n) {
  enum { BLOCK = 256 };
  char b[4 * BLOCK];
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    int64_t count = ks_min_i64(n - begin, BLOCK);
    for (int64_t i = 0; i < count; i++) {
      uint32_t bits;
      memcpy(&bits, &v[begin + i], sizeof bits);
      for (int k = 0; k < 4; k++)
        b[4 * i + k] = (char)(unsigned char)(bits >> (8 * k));
    }
    KS_TRY(ks_text_add(t, b, (size_t)(4 * count)));
  }
  return KS_OK;
}

/* Length, then bytes. */
static inline ks_status ks_bytes_put_blob(ks_text *t, const void *bytes, size_t n) {
  KS_TRY(ks_bytes_put_u64(t, n));
  return ks_text_add(t, bytes, n);
}

typedef struct {
  const unsigned char *p;
  size_t n, pos;
  const char *what; /* for messages: "selector snapshot" */
} ks_bytes_reader;

static inline ks_status ks_bytes_need(ks_bytes_reader *r, size_t n) {
  if (n <= r->n - r->pos) return KS_OK;
  return KS_FAIL(KS_EDATA, "%s: ends at byte %zu, %zu more needed at byte %zu; it is damaged", r->what, r->n,
                 n, r->pos);
}

static inline ks_status ks_bytes_get_u64(ks_bytes_reader *r, uint64_t *v) {
  KS_TRY(ks_bytes_need(r, 8));
  *v = 0;
  for (int i = 0; i < 8; i++)
    *v |= (uint64_t)r->p[r->pos++] << (8 * i);
  return KS_OK;
}

static inline ks_status ks_bytes_get_i64(ks_bytes_reader *r, int64_t *v) {
  uint64_t u;
  KS_TRY(ks_bytes_get_u64(r, &u));
  *v = (int64_t)u;
  return KS_OK;
}

static inline ks_status ks_bytes_get_f64(ks_bytes_reader *r, double *v) {
  uint64_t u;
  KS_TRY(ks_bytes_get_u64(r, &u));
  memcpy(v, &u, sizeof *v);
  return KS_OK;
}

static inline ks_status ks_bytes_get_f32s(ks_bytes_reader *r, float *v, int64_t n) {
  size_t bytes;
  if (n < 0 || !ks_mul_size((size_t)n, 4, &bytes)) return KS_FAIL(KS_EDATA, "%s: impossible count", r->what);
  KS_TRY(ks_bytes_need(r, bytes));
  for (int64_t i = 0; i < n; i++, r->pos += 4) {
    uint32_t u = r->p[r->pos] | (uint32_t)r->p[r->pos + 1] << 8 | (uint32_t)r->p[r->pos + 2] << 16 |
                 (uint32_t)r->p[r->pos + 3] << 24;
    memcpy(&v[i], &u, sizeof u);
  }
  return KS_OK;
}

/* *bytes points into the reader's bytes. */
static inline ks_status ks_bytes_get_blob(ks_bytes_reader *r, const void **bytes, size_t *n) {
  uint64_t u;
  KS_TRY(ks_bytes_get_u64(r, &u));
  if (u > SIZE_MAX) return KS_FAIL(KS_EDATA, "%s: impossible length at byte %zu", r->what, r->pos - 8);
  KS_TRY(ks_bytes_need(r, (size_t)u));
  *bytes = r->p + r->pos;
  *n = (size_t)u;
  r->pos += *n;
  return KS_OK;
}

/* A NUL-terminated copy of a blob that must be UTF-8 without NUL; free() it. */
static inline ks_status ks_bytes_get_text(ks_bytes_reader *r, char **out) {
  const void *bytes;
  size_t n;
  KS_TRY(ks_bytes_get_blob(r, &bytes, &n));
  if (ks_utf8_check(bytes, n) != n || memchr(bytes, 0, n))
    return KS_FAIL(KS_EDATA, "%s: the text before byte %zu is not UTF-8; it is damaged", r->what, r->pos);
  return ks_strndup(bytes, n, out);
}

static inline ks_status ks_bytes_expect_u64(ks_bytes_reader *r, uint64_t expected, const char *field) {
  uint64_t u;
  KS_TRY(ks_bytes_get_u64(r, &u));
  if (u == expected) return KS_OK;
  return KS_FAIL(KS_EDATA, "%s: %s is %llu, here it is %llu; it is damaged or of another configuration",
                 r->what, field, (unsigned long long)u, (unsigned long long)expected);
}

static inline ks_status ks_bytes_end(const ks_bytes_reader *r) {
  if (r->pos == r->n) return KS_OK;
  return KS_FAIL(KS_EDATA, "%s: %zu bytes too many; it is damaged", r->what, r->n - r->pos);
}

#endif
