#include "kernels/quant.h"
#include <math.h>
#include <string.h>

const float ks_nf4_values[16] = {-1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};
enum { NF4_ZERO = 7 };

/* ---------------------------------------------------------------- float16 */

float ks_f16_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, bits;
  if (exponent == 0) { /* zero and denormals: fraction * 2^-24 */
    float x = (float)fraction * 0x1p-24f;
    return sign ? -x : x;
  }
  bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

uint16_t ks_f16_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
  if (magnitude < 0x38800000) {                                  /* below 2^-14: a multiple of 2^-24 */
    float scaled = ldexpf(fabsf(x), 24), whole = floorf(scaled), rest = scaled - whole;
    uint32_t n = (uint32_t)whole;
    n += rest > 0.5f || (rest == 0.5f && n % 2);
    return (uint16_t)(sign | n);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | (rounded - 0x38000000) >> 13);
}

uint16_t ks_bf16_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* ---------------------------------------------------------------- one block */

typedef struct {
  int64_t block;
  int bits;   /* of a code */
  int lo, hi; /* smallest and largest code */
  int zero;   /* the code of the value 0 */
} quant_type;

static const quant_type *type_of(ks_dtype t) {
  static const quant_type types[] = {{32, 8, -128, 127, 0}, {32, 4, 0, 15, 8}, {64, 4, 0, 15, NF4_ZERO}};
  return t == KS_DTYPE_Q8_0   ? &types[0]
         : t == KS_DTYPE_Q4_0 ? &types[1]
         : t == KS_DTYPE_NF4  ? &types[2]
                              : NULL;
}

static float scale_of(ks_dtype t, const float *x, int64_t n) {
  float extreme = 0;
  for (int64_t i = 0; i < n; i++)
    if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
  if (t == KS_DTYPE_Q4_0) return extreme / -8;
  return t == KS_DTYPE_Q8_0 ? fabsf(extreme) / 127 : fabsf(extreme);
}

static float value_of(ks_dtype t, int code, float d) {
  return t == KS_DTYPE_NF4 ? d * ks_nf4_values[code] : d * (float)(t == KS_DTYPE_Q4_0 ? code - 8 : code);
}

static int nf4_code(double x) {
  int code = 0;
  while (code < 15 && x > ((double)ks_nf4_values[code] + (double)ks_nf4_values[code + 1]) / 2)
    code++;
  return code;
}

static int code_of(ks_dtype t, const quant_type *type, float x, float d) {
  if (d == 0) return type->zero;
  const double ratio = (double)x / (double)d;
  if (t == KS_DTYPE_NF4) return nf4_code(ratio);
  const double code = floor(ratio + 0.5) + type->zero;
  return code < type->lo ? type->lo : code > type->hi ? type->hi : (int)code;
}

static void put_code(const quant_type *type, uint8_t *codes, int64_t i, int code) {
  if (type->bits == 8)
    codes[i] = (uint8_t)code;
  else
    codes[i / 2] = (uint8_t)(i % 2 ? (codes[i / 2] & 15) | code << 4 : (codes[i / 2] & 240) | code);
}

static int get_code(const quant_type *type, const uint8_t *codes, int64_t i) {
  if (type->bits == 8) return codes[i] < 128 ? codes[i] : codes[i] - 256;
  return i % 2 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
}

/* ---------------------------------------------------------------- rows */

int64_t ks_quant_block(ks_dtype t) {
  const quant_type *type = type_of(t);
  return type ? type->block : 0;
}

int64_t ks_quant_row_scales(ks_dtype t, int64_t n) {
  const quant_type *type = type_of(t);
  return type ? (n + type->block - 1) / type->block : 0;
}

int64_t ks_quant_row_bytes(ks_dtype t, int64_t n) {
  const quant_type *type = type_of(t);
  return type ? ks_quant_row_scales(t, n) * type->block * type->bits / 8 : 0;
}

ks_status ks_quant_row(ks_dtype t, const float *x, int64_t n, uint8_t *codes, uint16_t *scales) {
  const quant_type *type = type_of(t);
  if (!type) return KS_FAIL(KS_EINVAL, "ks_quant_row: %s is not a type of blocks", ks_dtype_name(t));
  for (int64_t i = 0; i < n; i++)
    if (!isfinite(x[i]))
      return KS_FAIL(KS_EDATA,
                     "value %lld of a weight's row is not finite; blocks of %s hold finite values only",
                     (long long)i, ks_dtype_name(t));
  for (int64_t b = 0; b * type->block < n; b++) {
    const int64_t begin = b * type->block, end = begin + type->block, mine = (end < n ? end : n) - begin;
    scales[b] = ks_f16_from_float(scale_of(t, x + begin, mine));
    const float d = ks_f16_to_float(scales[b]);
    if (!isfinite(d))
      return KS_FAIL(KS_EDATA,
                     "values %lld to %lld of a weight's row are too large for blocks of %s; use bf16",
                     (long long)begin, (long long)(begin + mine - 1), ks_dtype_name(t));
    for (int64_t i = begin; i < end; i++)
      put_code(type, codes, i, i < n ? code_of(t, type, x[i], d) : type->zero);
  }
  return KS_OK;
}

void ks_dequant_row(ks_dtype t, const uint8_t *codes, const uint16_t *scales, int64_t n, float *x) {
  const quant_type *type = type_of(t);
  KS_ASSERT(type != NULL);
  for (int64_t i = 0; i < n; i++)
    x[i] = value_of(t, get_code(type, codes, i), ks_f16_to_float(scales[i / type->block]));
}
