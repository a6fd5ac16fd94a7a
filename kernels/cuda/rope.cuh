/* Turning pairs of a head by the angle of a position: for rope.cu and for kernels that turn what they just made.
 *
 *   float c, s;
 *   rope_cos_sin(position * inv_freq[j], &c, &s);            // once for all heads of a row: keep them in shared memory
 *   rope_turn<T, E>(&first, &second, cos_of + j, sin_of + j);  // E pairs (x[j..], x[j + d/2..]) in registers
 */
#ifndef KS_CUDA_ROPE_CUH
#define KS_CUDA_ROPE_CUH

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/row.cuh"

#define ROPE_MAX_ANGLE 0x1p40

/* Frequencies and positions of n_rows rows on the device, as one array. */
ks_status ks_rope_stage(ks_ctx *ctx, const double *host_inv_freq, int64_t head_dim,
                        const int32_t *host_positions, int64_t n_rows, const double **inv_freq,
                        const int32_t **positions);

/* E elements of T in one access. */
template <int BYTES> struct rope_word;
template <> struct rope_word<16> { typedef uint4 type; };
template <> struct rope_word<8> { typedef uint2 type; };
template <> struct rope_word<4> { typedef uint32_t type; };
template <> struct rope_word<2> { typedef uint16_t type; };
template <class T, int E> union rope_unit {
  typename rope_word<E *(int)sizeof(T)>::type word;
  T x[E];
};

/* A unit to memory, by one store. */
template <class T, int E> KS_DEVICE void rope_store_unit(T *p, const rope_unit<T, E> &u) {
  typedef typename rope_word<E *(int)sizeof(T)>::type word;
  if constexpr (sizeof(word) == 16)
    ks_store_16(p, u.word.x, u.word.y, u.word.z, u.word.w);
  else
    *(word *)p = u.word;
}

/* cos and sin of r = x - n pi/2, |r| <= pi/4 (Taylor to r^9 and r^10), turned by the quadrant n. pi/2 is the
 * sum of two doubles. */
KS_DEVICE void rope_near_cos_sin(double x, float *cos_out, float *sin_out) {
  const double round = 0x1.8p52; /* adding it leaves n in the low bits of the mantissa */
  const double shifted = fma(x, 0x1.45f306dc9c883p-1, round), n = shifted - round;
  const float r = (float)fma(n, -0x1.1a62633145c07p-54, fma(n, -0x1.921fb54442d18p+0, x)), z = r * r;
  float s = fmaf(1.0f / 362880.0f, z, -1.0f / 5040.0f);
  s = fmaf(s, z, 1.0f / 120.0f);
  s = fmaf(s, z, -1.0f / 6.0f);
  s = fmaf(s * z, r, r);
  float c = fmaf(-1.0f / 3628800.0f, z, 1.0f / 40320.0f);
  c = fmaf(c, z, -1.0f / 720.0f);
  c = fmaf(c, z, 1.0f / 24.0f);
  c = fmaf(c, z, -0.5f);
  c = fmaf(c, z, 1.0f);
  const int quadrant = (int)__double_as_longlong(shifted);
  const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
  *sin_out = quadrant & 2 ? -sine : sine;
  *cos_out = (quadrant + 1) & 2 ? -cosine : cosine;
}

/* Rare, so not inlined: it takes registers and a stack. */
static __device__ __noinline__ float2 rope_far_cos_sin(double x) {
  return make_float2((float)cos(x), (float)sin(x));
}

KS_DEVICE void rope_cos_sin(double x, float *cos_out, float *sin_out) {
  if (fabs(x) <= ROPE_MAX_ANGLE) {
    rope_near_cos_sin(x, cos_out, sin_out);
  } else {
    const float2 both = rope_far_cos_sin(x);
    *cos_out = both.x, *sin_out = both.y;
  }
}

/* E floats of shared memory, at a multiple of E. */
template <int E> KS_DEVICE void rope_read(float x[E], const float *p) {
  if constexpr (E >= 4) {
#pragma unroll
    for (int k = 0; k < E; k += 4) {
      const float4 v = *(const float4 *)(p + k);
      x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < E; k++)
      x[k] = p[k];
  }
}

/* Turns E pairs by the cosines and sines at cos_of and sin_of, in shared memory at multiples of E. */
template <class T, int E>
KS_DEVICE void rope_turn(rope_unit<T, E> *first, rope_unit<T, E> *second, const float *cos_of,
                         const float *sin_of) {
  float c[E], s[E];
  rope_read<E>(c, cos_of);
  rope_read<E>(s, sin_of);
#pragma unroll
  for (int k = 0; k < E; k++) {
    const float x1 = ks_to_float(first->x[k]), x2 = ks_to_float(second->x[k]);
    first->x[k] = ks_from_float<T>(fmaf(x1, c[k], -(x2 * s[k])));
    second->x[k] = ks_from_float<T>(fmaf(x2, c[k], x1 * s[k]));
  }
}

#endif
