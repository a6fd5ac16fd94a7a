/* Rotary embedding, half-split form, in place.
 *
 *   (x1, x2) = (x[h, j], x[h, j + d/2]);  x1' = x1 cos - x2 sin;  x2' = x2 cos + x1 sin
 *
 * Bytes: 8 n, n = rows * heads * head_dim.
 * Flops: 3 n, and some 40 double operations for each row and j < d/2.
 *
 * Determinism: elementwise; cos and sin come from fma polynomials in double (same bits for every instruction
 * set), each result element is one product and one fma. */
#include "kernels/cpu/cpu.h"
#include <math.h>

/* Beyond this the reduction below would lose digits; libm takes over. */
#define ROPE_MAX_ANGLE 0x1p40

/* cos and sin of |x| <= ROPE_MAX_ANGLE within 3e-16: x = n pi/2 + r with pi/2 in two parts, |r| <= pi/4,
 * Taylor to r^15 and r^16. Branch-free, so that loops over it become vectors. */
KS_INLINE void rope_cos_sin(double x, float *cos_out, float *sin_out) {
  const double round = 0x1.8p52; /* adding it leaves n in the low bits of the mantissa */
  double shifted = __builtin_fma(x, 0x1.45f306dc9c883p-1, round);
  double n = shifted - round;
  double r = __builtin_fma(n, -0x1.921fb54442d18p+0, x);
  r = __builtin_fma(n, -0x1.1a62633145c07p-54, r);
  double z = r * r;
  double s = -1.0 / 1307674368000.0;
  s = __builtin_fma(s, z, 1.0 / 6227020800.0);
  s = __builtin_fma(s, z, -1.0 / 39916800.0);
  s = __builtin_fma(s, z, 1.0 / 362880.0);
  s = __builtin_fma(s, z, -1.0 / 5040.0);
  s = __builtin_fma(s, z, 1.0 / 120.0);
  s = __builtin_fma(s, z, -1.0 / 6.0);
  s = __builtin_fma(s * z, r, r);
  double c = 1.0 / 20922789888000.0;
  c = __builtin_fma(c, z, -1.0 / 87178291200.0);
  c = __builtin_fma(c, z, 1.0 / 479001600.0);
  c = __builtin_fma(c, z, -1.0 / 3628800.0);
  c = __builtin_fma(c, z, 1.0 / 40320.0);
  c = __builtin_fma(c, z, -1.0 / 720.0);
  c = __builtin_fma(c, z, 1.0 / 24.0);
  c = __builtin_fma(c, z, -0.5);
  c = __builtin_fma(c, z, 1.0);
  int64_t quadrant;
  memcpy(&quadrant, &shifted, sizeof quadrant);
  bool odd = quadrant & 1, minus_sin = quadrant & 2, minus_cos = (quadrant + 1) & 2;
  double ss = odd ? c : s, cc = odd ? s : c;
  *sin_out = (float)(minus_sin ? -ss : ss);
  *cos_out = (float)(minus_cos ? -cc : cc);
}

/* angle[j] = position * inv_freq[j] for one row. */
static void rope_row_angles(double position, const double *inv_freq, int64_t half, float *cos_out,
                            float *sin_out) {
  bool far = false;
  for (int64_t j = 0; j < half; j++)
    far |= !(fabs(position * inv_freq[j]) <= ROPE_MAX_ANGLE);
  if (far) {
    for (int64_t j = 0; j < half; j++) {
      cos_out[j] = (float)cos(position * inv_freq[j]);
      sin_out[j] = (float)sin(position * inv_freq[j]);
    }
    return;
  }
  for (int64_t j = 0; j < half; j++)
    rope_cos_sin(position * inv_freq[j], &cos_out[j], &sin_out[j]);
}

KS_INLINE void rope_rotate(float *x1, float *x2, const float *cos_of, const float *sin_of, int64_t half,
                           float sign) {
  for (int64_t j = 0; j < half; j += KS_LANES) {
    int64_t n = half - j;
    ks_v c = ks_v_load_n(cos_of + j, n), s = ks_v_mul(ks_v_load_n(sin_of + j, n), ks_v_set(sign));
    ks_v a = ks_v_load_n(x1 + j, n), b = ks_v_load_n(x2 + j, n);
    ks_v_store_n(x1 + j, ks_v_fma(a, c, ks_v_sub(ks_v_zero(), ks_v_mul(b, s))), n);
    ks_v_store_n(x2 + j, ks_v_fma(b, c, ks_v_mul(a, s)), n);
  }
}

static ks_status rope(ks_ctx *ctx, const ks_rope_args *a) {
  const int64_t half = a->head_dim / 2, width = a->n_heads * a->head_dim;
  const float sign = a->inverse ? -1.0f : 1.0f;
  if (a->n_rows == 0 || width == 0) return KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, (size_t)(2 * half) * sizeof(float)));
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, a->n_rows *(width + 10 * half))) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    float *cos_of = ks_cpu_scratch(ctx, omp_get_thread_num()), *sin_of = cos_of + half;
    rope_row_angles((double)a->positions[i], a->inv_freq, half, cos_of, sin_of);
    for (int64_t h = 0; h < a->n_heads; h++) {
      float *x = ks_out(a->x) + i * width + h * a->head_dim;
      rope_rotate(x, x + half, cos_of, sin_of, half, sign);
    }
  }
  return KS_OK;
}
