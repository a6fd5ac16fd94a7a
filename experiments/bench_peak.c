/* Ceilings of the machine: what no program on it can pass. */
#include "core/base/base.h"
#include "experiments/bench.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { CHAINS = 12, ROUNDS = 400000 }; /* some milliseconds: waking the threads must not show */

/* Each runs ROUNDS rounds of CHAINS independent fma and returns a value that depends on all of them. */
#if defined(__x86_64__)
__attribute__((target("avx512f"))) static float spin_avx512(float seed) {
  __m512 a[CHAINS], x = _mm512_set1_ps(seed), y = _mm512_set1_ps(1e-9F);
  for (int i = 0; i < CHAINS; i++)
    a[i] = _mm512_set1_ps((float)i);
  for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
      a[i] = _mm512_fmadd_ps(a[i], x, y);
  }
  float sum = 0;
  for (int i = 0; i < CHAINS; i++)
    sum += _mm512_reduce_add_ps(a[i]);
  return sum;
}

__attribute__((target("avx512f,avx512bf16"))) static float spin_bf16(float seed) {
  __m512 a[CHAINS];
  union {
    __m512i bits;
    __m512bh pairs;
  } x = {_mm512_set1_epi32((int)seed * 0x3f803f80)}, y = {_mm512_set1_epi32(0x30003000)};
  for (int i = 0; i < CHAINS; i++)
    a[i] = _mm512_set1_ps((float)i);
  for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
      a[i] = _mm512_dpbf16_ps(a[i], x.pairs, y.pairs);
  }
  float sum = 0;
  for (int i = 0; i < CHAINS; i++)
    sum += _mm512_reduce_add_ps(a[i]);
  return sum;
}

__attribute__((target("avx2,fma"))) static float spin_avx2(float seed) {
  __m256 a[CHAINS], x = _mm256_set1_ps(seed), y = _mm256_set1_ps(1e-9F);
  for (int i = 0; i < CHAINS; i++)
    a[i] = _mm256_set1_ps((float)i);
  for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
      a[i] = _mm256_fmadd_ps(a[i], x, y);
  }
  float sum = 0;
  for (int i = 0; i < CHAINS; i++)
    sum += a[i][0] + a[i][7];
  return sum;
}
#endif

/* Four lanes, multiply and add as the compiler's baseline has them. */
static float spin_generic(float seed) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 a[CHAINS], x = {seed, seed, seed, seed}, y = {1e-9F, 1e-9F, 1e-9F, 1e-9F};
  for (int i = 0; i < CHAINS; i++)
    a[i] = (v4){(float)i, 1, 2, 3};
  for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
      a[i] = a[i] * x + y;
  }
  float sum = 0;
  for (int i = 0; i < CHAINS; i++)
    sum += a[i][0];
  return sum;
}

typedef struct {
  const char *isa; /* prefix of the context's */
  ks_dtype dtype;
  float (*spin)(float);
  double flops; /* of one fma instruction */
} peak_loop;

static const peak_loop loops[] = {
#if defined(__x86_64__)
    {"avx512bf16", KS_DTYPE_BF16, spin_bf16, 64},
    {"avx512", KS_DTYPE_F32, spin_avx512, 32},
    {"avx2", KS_DTYPE_F32, spin_avx2, 16},
#endif
    {"", KS_DTYPE_F32, spin_generic, 8},
};

double ks_bench_peak(const ks_ctx *ctx, ks_dtype dtype) {
  const char *isa = ks_ctx_isa_name(ctx);
  const peak_loop *loop = NULL;
  for (size_t i = 0; i < sizeof loops / sizeof *loops && !loop; i++)
    if (loops[i].dtype == dtype && strncmp(isa, loops[i].isa, strlen(loops[i].isa)) == 0) loop = &loops[i];
  if (!loop) return 0;
  enum { REPEATS = 7 };
  int n_threads = ks_ctx_n_threads(ctx);
  double best = 0;
  float sink = 0;
  for (int r = 0; r < REPEATS; r++) {
    double start = ks_clock_seconds();
#pragma omp parallel for num_threads(n_threads) reduction(+ : sink) schedule(static)
    for (int t = 0; t < n_threads; t++)
      sink += loop->spin(0.999F);
    double rate = (double)n_threads * ROUNDS * CHAINS * loop->flops / (ks_clock_seconds() - start) / 1e9;
    if (rate > best) best = rate;
  }
  return sink > -1e30F ? best : 0; /* keeps the loops alive */
}

typedef uint64_t v8 __attribute__((vector_size(64)));

#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static uint64_t
read_range(const v8 *data, size_t begin, size_t end) {
  v8 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  for (size_t i = begin; i + 4 <= end; i += 4) {
    s0 += data[i];
    s1 += data[i + 1];
    s2 += data[i + 2];
    s3 += data[i + 3];
  }
  s0 += s1 + s2 + s3;
  return s0[0] ^ s0[7];
}

double ks_bench_read(const ks_ctx *ctx, size_t bytes) {
  enum { REPEATS = 7 };
  size_t n = bytes / sizeof(v8);
  v8 *data;
  if (n == 0 || ks_alloc_array(&data, n, sizeof *data, "read bandwidth") != KS_OK) return 0;
  int n_threads = ks_ctx_n_threads(ctx);
  double best = 0;
  uint64_t sink = 0;
  for (int r = 0; r < REPEATS; r++) {
    double start = ks_clock_seconds();
#pragma omp parallel for num_threads(n_threads) reduction(+ : sink) schedule(static)
    for (int t = 0; t < n_threads; t++)
      sink += read_range(data, n * (size_t)t / (size_t)n_threads, n * (size_t)(t + 1) / (size_t)n_threads);
    double rate = (double)n * sizeof(v8) / (ks_clock_seconds() - start) / 1e9;
    if (rate > best) best = rate;
  }
  free(data);
  return sink == 1 ? 0 : best; /* the array is zero; keeps the loads alive */
}
