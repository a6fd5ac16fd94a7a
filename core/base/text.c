#include "core/base/base.h"

#include <stdarg.h>
#include <stdio.h>

static ks_status text_reserve(ks_text *t, size_t more) {
  size_t need;
  if (!ks_add_size(t->len, more, &need) || !ks_add_size(need, 1, &need))
    return KS_FAIL(KS_EOVERFLOW, "text: too long");
  if (need <= t->cap) return KS_OK;
  size_t cap = t->cap ? t->cap : 64;
  while (cap < need)
    cap = cap > SIZE_MAX / 2 ? need : cap * 2;
  char *data = realloc(t->data, cap);
  if (!data) return KS_FAIL(KS_ENOMEM, "text: no memory for %zu bytes", cap);
  t->data = data;
  t->cap = cap;
  return KS_OK;
}

ks_status ks_text_add(ks_text *t, const char *bytes, size_t n) {
  KS_TRY(text_reserve(t, n));
  if (n) memcpy(t->data + t->len, bytes, n);
  t->len += n;
  t->data[t->len] = 0;
  return KS_OK;
}

ks_status ks_text_add_str(ks_text *t, const char *s) {
  return ks_text_add(t, s, strlen(s));
}

ks_status ks_text_addf(ks_text *t, const char *fmt, ...) {
  va_list args, again;
  va_start(args, fmt);
  va_copy(again, args);
  int n = vsnprintf(NULL, 0, fmt, args);
  va_end(args);
  ks_status status =
      n < 0 ? KS_FAIL(KS_EINVAL, "text: cannot format \"%s\"", fmt) : text_reserve(t, (size_t)n);
  if (status == KS_OK) {
    vsnprintf(t->data + t->len, (size_t)n + 1, fmt, again);
    t->len += (size_t)n;
  }
  va_end(again);
  return status;
}

void ks_text_clear(ks_text *t) {
  t->len = 0;
  if (t->data) t->data[0] = 0;
}

void ks_text_free(ks_text *t) {
  free(t->data);
  *t = (ks_text){0};
}

ks_status ks_strndup(const char *s, size_t n, char **out) {
  char *copy = malloc(n + 1);
  if (!copy) return KS_FAIL(KS_ENOMEM, "string: no memory for %zu bytes", n + 1);
  if (n) memcpy(copy, s, n);
  copy[n] = 0;
  *out = copy;
  return KS_OK;
}

ks_status ks_strdup(const char *s, char **out) {
  return ks_strndup(s, strlen(s), out);
}

int ks_utf8_decode(const char *s, size_t n, uint32_t *cp) {
  const unsigned char *b = (const unsigned char *)s;
  if (n == 0) return 0;
  if (b[0] < 0x80) {
    *cp = b[0];
    return 1;
  }
  static const struct {
    unsigned char mask, lead;
    int len;
    uint32_t least;
  } forms[] = {{0xE0, 0xC0, 2, 0x80}, {0xF0, 0xE0, 3, 0x800}, {0xF8, 0xF0, 4, 0x10000}};
  for (size_t f = 0; f < sizeof forms / sizeof forms[0]; f++) {
    if ((b[0] & forms[f].mask) != forms[f].lead) continue;
    if (n < (size_t)forms[f].len) return 0;
    uint32_t c = b[0] & (unsigned char)~forms[f].mask;
    for (int i = 1; i < forms[f].len; i++) {
      if ((b[i] & 0xC0) != 0x80) return 0;
      c = c << 6 | (b[i] & 0x3F);
    }
    if (c < forms[f].least || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 0;
    *cp = c;
    return forms[f].len;
  }
  return 0;
}

size_t ks_utf8_check(const char *s, size_t n) {
  size_t i = 0;
  while (i < n) {
    uint32_t cp;
    int len = ks_utf8_decode(s + i, n - i, &cp);
    if (len == 0) return i;
    i += (size_t)len;
  }
  return n;
}

int ks_utf8_encode(uint32_t cp, char out[4]) {
  if (cp < 0x80) {
    out[0] = (char)cp;
    return 1;
  }
  int len = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
  for (int i = len - 1; i > 0; i--) {
    out[i] = (char)(0x80 | (cp & 0x3F));
    cp >>= 6;
  }
  static const unsigned char lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
  out[0] = (char)(lead[len] | cp);
  return len;
}

size_t ks_edit_distance(const char *a, const char *b) {
  enum { MOST = 128 };
  size_t row[MOST + 1], na = strlen(a), nb = strlen(b);
  if (nb > MOST) nb = MOST;
  for (size_t j = 0; j <= nb; j++)
    row[j] = j;
  for (size_t i = 1; i <= na; i++) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= nb; j++) {
      size_t best = diagonal + (a[i - 1] != b[j - 1]);
      if (row[j] + 1 < best) best = row[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      diagonal = row[j];
      row[j] = best;
    }
  }
  return row[nb];
}
