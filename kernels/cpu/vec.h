/* Sixteen float lanes, whatever the instruction set: one zmm, two ymm, four xmm or NEON registers.
 * Because the number of lanes is the same everywhere, a reduction written with them has one order of
 * operations, and the instruction sets that have fma (all but "generic") give the same bits.
 *
 *   ks_v s = ks_v_zero();
 *   for (int64_t j = 0; j < n; j += KS_LANES) {                  // tails: ks_v_load_n fills with zeros
 *     ks_v x = ks_v_load_n(row + j, n - j);
 *     s = ks_v_fma(x, x, s);
 *   }
 *   float sum = ks_v_sum(s);                                     // fixed tree
 */
#ifndef KS_CPU_VEC_H
#define KS_CPU_VEC_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KS_LANES 16
#if defined(__AVX512F__)
#define KS_PART_LANES 16
#elif defined(__AVX2__)
#define KS_PART_LANES 8
#else
#define KS_PART_LANES 4
#endif
#define KS_PARTS (KS_LANES / KS_PART_LANES)

typedef float ks_part __attribute__((vector_size(KS_PART_LANES * 4)));
typedef int32_t ks_ipart __attribute__((vector_size(KS_PART_LANES * 4)));
typedef float ks_part_any
    __attribute__((vector_size(KS_PART_LANES * 4), aligned(4), may_alias)); /* in memory */
typedef struct {
  ks_part p[KS_PARTS];
} ks_v;
typedef struct {
  ks_ipart p[KS_PARTS];
} ks_vi; /* int32 lanes; as a mask: -1 true, 0 false */

#define KS_INLINE       static inline __attribute__((always_inline, unused))
#define KS_EACH_PART(i) _Pragma("GCC unroll 4") for (int i = 0; i < KS_PARTS; i++)

KS_INLINE ks_part ks_part_fma(ks_part a, ks_part b, ks_part c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

/* A scalar product and sum as the lanes do it: fused where the instruction set has fma. */
KS_INLINE float ks_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

KS_INLINE ks_v ks_v_set(float x) {
  ks_v r;
  KS_EACH_PART(i) r.p[i] = x - (ks_part){0};
  return r;
}
KS_INLINE ks_v ks_v_zero(void) {
  ks_v r;
  KS_EACH_PART(i) r.p[i] = (ks_part){0};
  return r;
}
/* Any alignment. */
KS_INLINE ks_v ks_v_load(const float *x) {
  ks_v r;
  KS_EACH_PART(i) r.p[i] = *(const ks_part_any *)(x + i * KS_PART_LANES);
  return r;
}
KS_INLINE void ks_v_store(float *x, ks_v a) {
  KS_EACH_PART(i) * (ks_part_any *)(x + i * KS_PART_LANES) = a.p[i];
}

#if defined(__AVX512F__)
KS_INLINE __mmask16 ks_tail_mask(int64_t n) {
  return (__mmask16)(n >= KS_LANES ? 0xffffu : (1u << n) - 1);
}
#elif defined(__AVX2__)
/* The mask of eight lanes from lane `from` on, of which n < 16 in all are wanted. */
KS_INLINE __m256i ks_tail_mask(int64_t n, int64_t from) {
  static const int32_t wanted[3 * KS_LANES] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                               -1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i *)(wanted + KS_LANES - n + from));
}
#endif
/* The first n lanes (n >= 16: all), the others 0; touches no byte beyond them. */
KS_INLINE ks_v ks_v_load_n(const float *x, int64_t n) {
  if (n >= KS_LANES) return ks_v_load(x);
#if defined(__AVX512F__)
  return (ks_v){{_mm512_maskz_loadu_ps(ks_tail_mask(n), x)}};
#elif defined(__AVX2__)
  return (ks_v){{_mm256_maskload_ps(x, ks_tail_mask(n, 0)), _mm256_maskload_ps(x + 8, ks_tail_mask(n, 8))}};
#else
  float all[KS_LANES] = {0};
  memcpy(all, x, (size_t)n * sizeof *x);
  return ks_v_load(all);
#endif
}
KS_INLINE void ks_v_store_n(float *x, ks_v a, int64_t n) {
  if (n >= KS_LANES) {
    ks_v_store(x, a);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(x, ks_tail_mask(n), a.p[0]);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(x, ks_tail_mask(n, 0), a.p[0]);
  _mm256_maskstore_ps(x + 8, ks_tail_mask(n, 8), a.p[1]);
#else
  float all[KS_LANES];
  ks_v_store(all, a);
  memcpy(x, all, (size_t)n * sizeof *x);
#endif
}

#define KS_V_BINARY(name, op)                                                                                \
  KS_INLINE ks_v name(ks_v a, ks_v b) {                                                                      \
    ks_v r;                                                                                                  \
    KS_EACH_PART(i) r.p[i] = a.p[i] op b.p[i];                                                               \
    return r;                                                                                                \
  }
KS_V_BINARY(ks_v_add, +)
KS_V_BINARY(ks_v_sub, -)
KS_V_BINARY(ks_v_mul, *)
KS_V_BINARY(ks_v_div, /)
#undef KS_V_BINARY

#define KS_V_COMPARE(name, op)                                                                               \
  KS_INLINE ks_vi name(ks_v a, ks_v b) {                                                                     \
    ks_vi r;                                                                                                 \
    KS_EACH_PART(i) r.p[i] = a.p[i] op b.p[i];                                                               \
    return r;                                                                                                \
  }
KS_V_COMPARE(ks_v_lt, <)
KS_V_COMPARE(ks_v_gt, >)
KS_V_COMPARE(ks_v_eq, ==)
KS_V_COMPARE(ks_v_ne, !=)
#undef KS_V_COMPARE

/* a * b + c */
KS_INLINE ks_v ks_v_fma(ks_v a, ks_v b, ks_v c) {
  ks_v r;
  KS_EACH_PART(i) r.p[i] = ks_part_fma(a.p[i], b.p[i], c.p[i]);
  return r;
}
/* mask ? a : b */
KS_INLINE ks_v ks_v_select(ks_vi mask, ks_v a, ks_v b) {
  ks_v r;
  KS_EACH_PART(i) r.p[i] = (ks_part)((mask.p[i] & (ks_ipart)a.p[i]) | (~mask.p[i] & (ks_ipart)b.p[i]));
  return r;
}
/* a > b ? a : b, so that a NaN in either gives b. */
KS_INLINE ks_v ks_v_max(ks_v a, ks_v b) {
#if defined(__AVX512F__)
  return (ks_v){{_mm512_max_ps(a.p[0], b.p[0])}};
#elif defined(__AVX2__)
  return (ks_v){{_mm256_max_ps(a.p[0], b.p[0]), _mm256_max_ps(a.p[1], b.p[1])}};
#else
  return ks_v_select(ks_v_gt(a, b), a, b);
#endif
}
/* a < b ? a : b, so that a NaN in either gives b. */
KS_INLINE ks_v ks_v_min(ks_v a, ks_v b) {
#if defined(__AVX512F__)
  return (ks_v){{_mm512_min_ps(a.p[0], b.p[0])}};
#elif defined(__AVX2__)
  return (ks_v){{_mm256_min_ps(a.p[0], b.p[0]), _mm256_min_ps(a.p[1], b.p[1])}};
#else
  return ks_v_select(ks_v_lt(a, b), a, b);
#endif
}
KS_INLINE ks_v ks_v_abs(ks_v a) {
  KS_EACH_PART(i) a.p[i] = (ks_part)((ks_ipart)a.p[i] & 0x7fffffff);
  return a;
}
KS_INLINE ks_v ks_v_sqrt(ks_v a) {
  KS_EACH_PART(i)
#if defined(__AVX512F__)
  a.p[i] = _mm512_sqrt_ps(a.p[i]);
#elif defined(__AVX2__)
  a.p[i] = _mm256_sqrt_ps(a.p[i]);
#elif defined(__x86_64__)
  a.p[i] = _mm_sqrt_ps(a.p[i]);
#elif defined(__aarch64__)
  a.p[i] = vsqrtq_f32(a.p[i]);
#else
  for (int j = 0; j < KS_PART_LANES; j++)
    a.p[i][j] = __builtin_sqrtf(a.p[i][j]);
#endif
  return a;
}

/* The first eight lanes and the last eight. */
#if defined(__AVX512F__)
#define KS_V_HALVES(a, lo, hi)                                                                               \
  __m256 lo = _mm512_castps512_ps256(a.p[0]), hi = _mm512_extractf32x8_ps(a.p[0], 1)
#elif defined(__AVX2__)
#define KS_V_HALVES(a, lo, hi) __m256 lo = a.p[0], hi = a.p[1]
#endif

/* Lanes whose bit is set, the others 0. */
KS_INLINE ks_v ks_v_keep(ks_v a, uint32_t bits) {
#if defined(__AVX512F__)
  return (ks_v){{_mm512_maskz_mov_ps((__mmask16)bits, a.p[0])}};
#else
  ks_ipart lane;
  for (int j = 0; j < KS_PART_LANES; j++)
    lane[j] = 1 << j;
  KS_EACH_PART(i) {
    ks_ipart here = ((ks_ipart){0} + (int32_t)(bits >> (i * KS_PART_LANES))) & lane;
    a.p[i] = (ks_part)((here == lane) & (ks_ipart)a.p[i]);
  }
  return a;
#endif
}
/* Lanes folded as a fixed tree: (i, i + 8), then 4, 2, 1. */
KS_INLINE float ks_v_sum(ks_v a) {
#if defined(__AVX2__)
  KS_V_HALVES(a, lo, hi);
  lo = _mm256_add_ps(lo, hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(lo), _mm256_extractf128_ps(lo, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  float x[KS_LANES];
  ks_v_store(x, a);
  for (int h = KS_LANES / 2; h > 0; h /= 2)
    for (int i = 0; i < h; i++)
      x[i] += x[i + h];
  return x[0];
#endif
}
/* The largest lane; NaN lanes may be ignored or win: not for input that can hold them unchecked. */
KS_INLINE float ks_v_max_lane(ks_v a) {
#if defined(__AVX2__)
  KS_V_HALVES(a, lo, hi);
  lo = _mm256_max_ps(lo, hi);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(lo), _mm256_extractf128_ps(lo, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
  float x[KS_LANES];
  ks_v_store(x, a);
  for (int h = KS_LANES / 2; h > 0; h /= 2)
    for (int i = 0; i < h; i++)
      x[i] = x[i] > x[i + h] ? x[i] : x[i + h];
  return x[0];
#endif
}

/* exp(x) within 1.5 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor to degree 7 (truncation 0.09 half ulps),
 * scaled by 2^n with one rounding, so that results down to the smallest denormal are right. NaN stays NaN
 * (the clamp keeps it, and then it spreads); above 88.73 inf; below -103.98 0. */
KS_INLINE ks_v ks_v_exp(ks_v x) {
  const float round = 0x1.8p23f; /* adding it leaves n in the low bits of the mantissa */
  ks_v c = ks_v_min(ks_v_set(89.0f), ks_v_max(ks_v_set(-104.0f), x));
  ks_v shifted = ks_v_fma(c, ks_v_set(0x1.715476p+0f), ks_v_set(round));
  ks_v n = ks_v_sub(shifted, ks_v_set(round));
  ks_v r = ks_v_fma(n, ks_v_set(-0x1.62e4p-1f), c); /* the product is exact: 15 bits times 8 */
  r = ks_v_fma(n, ks_v_set(-0x1.7f7d1cp-20f), r);
  ks_v q = ks_v_set(1.0f / 5040.0f);
  q = ks_v_fma(q, r, ks_v_set(1.0f / 720.0f));
  q = ks_v_fma(q, r, ks_v_set(1.0f / 120.0f));
  q = ks_v_fma(q, r, ks_v_set(1.0f / 24.0f));
  q = ks_v_fma(q, r, ks_v_set(1.0f / 6.0f));
  q = ks_v_fma(q, r, ks_v_set(0.5f));
  q = ks_v_fma(q, ks_v_mul(r, r), r);
  q = ks_v_add(q, ks_v_set(1.0f));
#if defined(__AVX512F__)
  return (ks_v){{_mm512_scalef_ps(q.p[0], n.p[0])}};
#else
  ks_v a, b; /* 2^n in two factors: the first product is exact */
  KS_EACH_PART(i) {
    ks_ipart k = (ks_ipart)shifted.p[i] - 0x4b400000;
    ks_ipart half = k >> 1;
    a.p[i] = (ks_part)((half + 127) << 23);
    b.p[i] = (ks_part)((k - half + 127) << 23);
  }
  return ks_v_mul(ks_v_mul(q, a), b);
#endif
}

#endif
