/* Rotary embedding, half-split form, in place.
 *
 *   (x1, x2) = (x[h, j], x[h, j + d/2]);  x1' = x1 cos - x2 sin;  x2' = x2 cos + x1 sin
 *   angle = position * inv_freq[j];  inverse: the angle's sign turned
 *
 * Bytes, with e those of an activation and n = rows * heads * head_dim: 2 e n. Flops: 3 n, and for each row
 * and j < d/2 six double operations (the product, the reduction to [-pi/4, pi/4], a conversion) and 20 in
 * float32: bound by memory. Double's rate of 1 : 64 on small cards would not hide a whole sine in double
 * behind a row of few heads; the reduction, which alone needs it, is hidden from 2 heads on.
 *
 * Accuracy: the reduced angle carries the rounding of the product in double and, rounded to float32, 2^-25 of
 * itself; sine and cosine are then within 1.5 units in the last place of float32, for angles up to 2^40.
 * Beyond that the CUDA library's double functions take over.
 *
 * Geometry: a block of 256 threads takes up to 256 / (d/2) rows and at most 512 of the d/2 columns; it makes
 * their cosines and sines once, in shared memory, and turns all heads with them. Pairs go in the widest units
 * (16, 8, 4 or 2 bytes) that head_dim and x allow: 16 bytes for head sizes 64 and 128, 4 for bf16 heads of
 * 100.
 *
 * Determinism: elementwise.
 *
 * Ladder (H200, bf16, commit f74fb33; an empty kernel measures 3 us)
 *   considered  a table of cosines made on the host for every step: 4 MB to make and to copy for 8192 positions of 128
 *   v1          this; expected: the card's copy bandwidth from a few MB on, launch time for a decoding step. Measured: 2048
 *               rows of 32 heads of 64: 19 us, 0.88 TB/s, 21 % of a copy; hot, in a recorded step, 4.7 us */
#include "kernels/cuda/launch.cuh"

enum { ROPE_THREADS = 256, ROPE_MAX_COLUMNS = 512 };
#define ROPE_MAX_ANGLE 0x1p40

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

/* Sizes; no padding, launch arguments are compared as bytes. */
typedef struct {
  int64_t n_rows, n_heads, half;
  int rows, columns; /* of a block */
  int64_t is_inverse;
} rope_shape;

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

/* Turns E pairs, the first at p. */
template <class T, int E>
KS_DEVICE void rope_turn(T *p, int64_t half, const float *cos_of, const float *sin_of) {
  typedef typename rope_word<E *(int)sizeof(T)>::type word;
  rope_unit<T, E> first, second;
  float c[E], s[E];
  first.word = *(const word *)p;
  second.word = *(const word *)(p + half);
  rope_read<E>(c, cos_of);
  rope_read<E>(s, sin_of);
#pragma unroll
  for (int k = 0; k < E; k++) {
    const float x1 = ks_to_float(first.x[k]), x2 = ks_to_float(second.x[k]);
    first.x[k] = ks_from_float<T>(fmaf(x1, c[k], -(x2 * s[k])));
    second.x[k] = ks_from_float<T>(fmaf(x2, c[k], x1 * s[k]));
  }
  *(word *)p = first.word;
  *(word *)(p + half) = second.word;
}

template <class T, int E>
__global__ void rope_kernel(T *x, const int32_t *positions, const double *inv_freq, rope_shape a) {
  ks_smem smem;
  float *cos_of = ks_smem_take<float>(&smem, (size_t)(a.rows * a.columns)),
        *sin_of = ks_smem_take<float>(&smem, (size_t)(a.rows * a.columns));
  const int64_t row0 = (int64_t)blockIdx.x * a.rows, column0 = (int64_t)blockIdx.y * a.columns;
  const int rows = (int)min((int64_t)a.rows, a.n_rows - row0),
            columns = (int)min((int64_t)a.columns, a.half - column0);
  for (int i = (int)threadIdx.x; i < rows * columns; i += ROPE_THREADS) {
    const double angle = (double)positions[row0 + i / columns] * inv_freq[column0 + i % columns];
    rope_cos_sin(a.is_inverse ? -angle : angle, &cos_of[i], &sin_of[i]);
  }
  __syncthreads();
  const uint32_t units = (uint32_t)(columns / E), heads = (uint32_t)(rows * a.n_heads);
  for (uint32_t i = threadIdx.x; i < heads * units; i += ROPE_THREADS) {
    const uint32_t head = i / units, j = (i - head * units) * E, row = head / (uint32_t)a.n_heads,
                   at = row * (uint32_t)columns + j;
    rope_turn<T, E>(x + ((row0 * a.n_heads + head) * 2 * a.half + column0 + j), a.half, cos_of + at,
                    sin_of + at);
  }
}

template <class T, int E> static ks_status rope_launch(ks_ctx *ctx, const ks_rope_args *a) {
  const int64_t half = a->head_dim / 2, columns = ks_min_i64(half, ROPE_MAX_COLUMNS);
  const int64_t side_by_side = ROPE_THREADS / columns,
                spread = a->n_rows / (4 * ks_cuda_device_of(ctx)->n_sm);
  int64_t rows = spread < side_by_side ? spread : side_by_side;
  const int32_t *positions;
  const double *inv_freq;
  if (rows < 1) rows = 1;
  if (a->n_heads > UINT32_MAX / (rows * columns))
    return KS_FAIL(KS_EUNSUPPORTED, "rope: %lld heads of %lld in one row", (long long)a->n_heads,
                   (long long)a->head_dim);
  KS_TRY(ks_cuda_stage(ctx, a->positions, (size_t)a->n_rows * sizeof *positions, (const void **)&positions));
  KS_TRY(ks_cuda_stage(ctx, a->inv_freq, (size_t)half * sizeof *inv_freq, (const void **)&inv_freq));
  const rope_shape shape = {a->n_rows, a->n_heads, half, (int)rows, (int)columns, a->inverse};
  return ks_launch(ctx, "rope", rope_kernel<T, E>,
                   dim3(ks_blocks_for(a->n_rows, rows), ks_blocks_for(half, columns)), dim3(ROPE_THREADS),
                   2 * ks_smem_bytes<float>((size_t)(rows * columns)), (T *)a->x, positions, inv_freq, shape);
}

/* By the widest unit that divides half a head and the alignment of x. */
template <class T> static ks_status rope(ks_ctx *ctx, const ks_rope_args *a) {
  const uintptr_t bits = (uintptr_t)a->x | (uintptr_t)(a->head_dim / 2 * (int64_t)sizeof(T));
  if (bits % 16 == 0) return rope_launch<T, 16 / sizeof(T)>(ctx, a);
  if (bits % 8 == 0) return rope_launch<T, 8 / sizeof(T)>(ctx, a);
  if constexpr (sizeof(T) == 2) {
    if (bits % 4 == 0) return rope_launch<T, 2>(ctx, a);
  }
  return rope_launch<T, 1>(ctx, a);
}

extern "C" ks_status ks_cuda_rope(ks_ctx *ctx, const ks_rope_args *a) {
  return KS_CUDA_BY_ACT(ctx, rope, (ctx, a));
}
