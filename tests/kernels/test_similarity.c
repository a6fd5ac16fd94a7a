#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n_q, n_k, n_cols;
  ks_metric metric;
  ks_fill_kind fill;
  ks_dtype q_dtype, k_dtype; /* 0: F32 */
  bool scaled;               /* I8 rows have factors */
} sim_case;

/* The shim's: bytes of shared memory a block may have. */
__attribute__((weak)) void ks_shim_set_smem(size_t bytes);
__attribute__((weak)) void ks_shim_set_hopper(int on);
__attribute__((weak)) void ks_shim_set_multiprocessors(int n);
enum { SMEM_TURING = 64 << 10, SMEM_AMPERE = 163 << 10, SMEM_HOPPER = 227 << 10 };
static void set_smem(size_t bytes) {
  if (ks_shim_set_smem) ks_shim_set_smem(bytes);
}

#define DOT    KS_METRIC_DOT
#define COSINE KS_METRIC_COSINE
#define F32    KS_DTYPE_F32
#define BF16   KS_DTYPE_BF16
#define I8     KS_DTYPE_I8
static const sim_case cases[] = {{0, 5, 8, DOT, KS_FILL_SIGNED, F32, F32, false},
                                 {1, 1, 1, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                 {1, 128, 64, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                 {2, 31, 0, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                 {3, 33, 97, DOT, KS_FILL_INTEGER, F32, F32, false},
                                 {7, 64, 31, COSINE, KS_FILL_INTEGER, F32, F32, false},
                                 {5, 65, 111, COSINE, KS_FILL_LARGE, F32, F32, false},
                                 {6, 0, 16, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                 {9, 130, 36, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                 {33, 127, 32, DOT, KS_FILL_POSITIVE, F32, F32, false},
                                 {2, 65, 72, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                 {1, 1, 3, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                 {9, 129, 64, COSINE, KS_FILL_NEAR_ONE, BF16, BF16, false},
                                 {31, 40, 33, DOT, KS_FILL_SIGNED, BF16, BF16, false},
                                 {4, 63, 40, COSINE, KS_FILL_INTEGER, I8, I8, true},
                                 {10, 66, 72, DOT, KS_FILL_INTEGER, I8, I8, true},
                                 {3, 70, 21, DOT, KS_FILL_INTEGER, BF16, I8, false},
                                 {12, 30, 64, COSINE, KS_FILL_INTEGER, I8, BF16, true},
                                 {5, 40, 64, COSINE, KS_FILL_INTEGER, F32, I8, true},
                                 {10, 33, 65, DOT, KS_FILL_SIGNED, BF16, F32, false}};
enum { N_CASES = sizeof cases / sizeof cases[0] };
/* Too large for the shim. */
static const sim_case large_cases[] = {{97, 203, 32, DOT, KS_FILL_POSITIVE, F32, F32, false},
                                       {121, 130, 48, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                       {1, 1025, 257, COSINE, KS_FILL_NEAR_ONE, F32, F32, false},
                                       {2, 2500, 20, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                       {3, 3000, 3, DOT, KS_FILL_INTEGER, F32, F32, false},
                                       {250, 70, 300, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                       {200, 300, 320, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                       {130, 1000, 128, DOT, KS_FILL_INTEGER, I8, I8, true},
                                       {150, 140, 200, COSINE, KS_FILL_INTEGER, BF16, I8, true},
                                       {2, 5000, 96, COSINE, KS_FILL_SIGNED, BF16, BF16, false}};
enum { N_LARGE = sizeof large_cases / sizeof large_cases[0] };

/* Inputs with a zero row and repeated rows among both; LARGE: and one that is no number. */
static float *rows(int64_t n, int64_t d, ks_fill_kind fill, uint64_t seed) {
  float *x = ks_floats(n * d, fill, seed);
  if (n > 2) memset(x + 2 * d, 0, (size_t)d * sizeof *x);
  if (n > 20) memcpy(x + 20 * d, x + 7 * d, (size_t)d * sizeof *x);
  if (n > 66) memcpy(x + 66 * d, x + 7 * d, (size_t)d * sizeof *x);
  if (n > 130 && fill == KS_FILL_LARGE) x[130 * d] = NAN;
  return x;
}

/* Queries or keys in backend memory, and what they stand for. */
typedef struct {
  ks_guard stored, scales;
  float *values; /* as stored */
  float *factors;
  bool scaled;
} side;

static side make_side(ks_ctx *ctx, int64_t n, int64_t d, ks_fill_kind fill, ks_dtype dtype, bool scaled,
                      uint64_t seed) {
  float *x = rows(n, d, fill, seed);
  side s = {.stored = ks_guard_make_as(ctx, dtype, x, n * d),
            .factors = ks_floats(n, KS_FILL_SIGNED, seed + 7)};
  for (int64_t i = 0; i < n; i++)
    s.factors[i] = i % 5 == 3 ? 0 : s.factors[i] + 0.001f;
  s.scaled = scaled && dtype == I8;
  s.scales = ks_guard_make(ctx, s.factors, n);
  s.values = ks_guard_read(&s.stored);
  for (int64_t i = 0; !s.scaled && i < n; i++)
    s.factors[i] = 1;
  free(x);
  return s;
}
static int64_t free_side(side *s, const char *name) {
  const int64_t bad = ks_guard_check_input(name, &s->stored) + ks_guard_check_input(name, &s->scales);
  ks_guard_free(&s->stored), ks_guard_free(&s->scales);
  free(s->values), free(s->factors);
  return bad;
}
static ks_similarity_args args_of(const sim_case *c, const side *q, const side *k) {
  return (ks_similarity_args){.q = q->stored.p,
                              .k = k->stored.p,
                              .n_q = c->n_q,
                              .n_k = c->n_k,
                              .n_cols = c->n_cols,
                              .metric = c->metric,
                              .q_dtype = c->q_dtype,
                              .k_dtype = c->k_dtype,
                              .q_scales = q->scaled ? q->scales.p : NULL,
                              .k_scales = k->scaled ? k->scales.p : NULL};
}

static double norm(const float *x, double factor, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; c++)
    sum += (double)x[c] * (double)x[c];
  return fabs(factor) * sqrt(sum);
}

static void oracle(const sim_case *c, const side *q, const side *k, double *s, double *size) {
  const int64_t d = c->n_cols;
  for (int64_t i = 0; i < c->n_q; i++)
    for (int64_t j = 0; j < c->n_k; j++) {
      double dot = 0, abs = 0, scale = (double)q->factors[i] * (double)k->factors[j];
      for (int64_t x = 0; x < d; x++) {
        dot += (double)q->values[i * d + x] * (double)k->values[j * d + x];
        abs += fabs((double)q->values[i * d + x] * (double)k->values[j * d + x]);
      }
      if (c->metric == KS_METRIC_COSINE) {
        double product =
            norm(q->values + i * d, q->factors[i], d) * norm(k->values + j * d, k->factors[j], d);
        scale = product > 0 ? scale / product : 0;
      }
      s[i * c->n_k + j] = dot * scale;
      size[i * c->n_k + j] = abs * fabs(scale);
    }
}

/* Is candidate (a, i) before (b, j)?  Numbers fall, NaN last, ties to the lower index. */
static bool before(float a, int64_t i, float b, int64_t j) {
  if (isnan(a) != isnan(b)) return isnan(b);
  if (!isnan(a) && a != b) return a > b;
  return i < j;
}

/* The k-th best by definition: how many come before each. */
static void oracle_top(const float *s, int64_t n, int64_t best_k, float *scores, int64_t *index) {
  for (int64_t i = 0; i < best_k; i++)
    scores[i] = -INFINITY, index[i] = -1;
  for (int64_t j = 0; j < n; j++) {
    int64_t rank = 0;
    for (int64_t i = 0; i < n && rank < best_k; i++)
      rank += before(s[i], i, s[j], j);
    if (rank < best_k) scores[rank] = s[j], index[rank] = j;
  }
}

static int64_t check_top(ks_ctx *ctx, const ks_similarity_args *a, const float *s, int64_t best_k,
                         const char *name) {
  const int64_t n = a->n_q * best_k;
  float *scores = ks_floats(n, KS_FILL_SIGNED, 0), *ref = ks_floats(best_k, KS_FILL_SIGNED, 0);
  int64_t *index = calloc((size_t)n + 1, sizeof *index),
          *ref_index = calloc((size_t)best_k, sizeof *ref_index), bad = 0;
  cr_assert(index && ref_index);
  index[n] = 4711;
  bad += ks_similarity_top(ctx, a, best_k, scores, index) != KS_OK;
  for (int64_t i = 0; i < a->n_q; i++) {
    oracle_top(s + i * a->n_k, a->n_k, best_k, ref, ref_index);
    bad += ks_check_same(name, scores + i * best_k, ref, best_k);
    if (memcmp(index + i * best_k, ref_index, (size_t)best_k * sizeof *index) != 0) {
      fprintf(stderr, "%s: other best %lld of query %lld\n", name, (long long)best_k, (long long)i);
      bad++;
    }
  }
  bad += index[n] != 4711;
  free(scores), free(ref), free(index), free(ref_index);
  return bad;
}

/* what: 1: by groups, 2: but for a key, 3: both. */
static int64_t check_mean(ks_ctx *ctx, const ks_similarity_args *a, const float *s, int what,
                          const char *name, ks_results *out) {
  const bool grouped = what & 1;
  int32_t *groups = calloc((size_t)a->n_k + 1, sizeof *groups),
          *own = calloc((size_t)a->n_q + 1, sizeof *own);
  double *mean = ks_doubles(NULL, a->n_q);
  int64_t *count = calloc((size_t)a->n_q + 1, sizeof *count), bad = 0,
          *except = calloc((size_t)a->n_q + 1, sizeof *except);
  const ks_similarity_groups chosen = {
      .keys = grouped ? groups : NULL, .queries = grouped ? own : NULL, .except = what & 2 ? except : NULL};
  cr_assert(groups && own && count && except);
  for (int64_t j = 0; j < a->n_k; j++)
    groups[j] = (int32_t)(j * j % 5);
  for (int64_t i = 0; i < a->n_q; i++)
    own[i] = (int32_t)(i % 7), except[i] = i * 11 % (a->n_k + 2) - 1; /* before, among, and behind the keys */
  mean[a->n_q] = 4711;
  bad += ks_similarity_mean(ctx, a, what ? &chosen : NULL, mean, count) != KS_OK;
  for (int64_t i = 0; i < a->n_q; i++) {
    long double sum = 0, size = 0;
    int64_t n = 0;
    for (int64_t j = 0; j < a->n_k; j++) {
      if ((grouped && groups[j] != own[i]) || (what & 2 && except[i] == j)) continue;
      sum += s[i * a->n_k + j], size += fabsf(s[i * a->n_k + j]);
      n++;
    }
    const long double tolerance = (5 + (long double)a->n_k / 16) * 0x1p-53L * size / (long double)(n ? n : 1);
    if (count[i] != n || (n == 0 ? !isnan(mean[i]) : !(fabsl(mean[i] - sum / (long double)n) <= tolerance))) {
      fprintf(stderr, "%s: mean %g of %lld, wants %Lg of %lld\n", name, mean[i], (long long)count[i],
              sum / (long double)n, (long long)n);
      bad++;
    }
    if (n == 0) mean[i] = 0; /* its NaN has no fixed bits */
  }
  bad += mean[a->n_q] != 4711 || count[a->n_q] != 0;
  ks_results_add_bytes(out, mean, a->n_q * (int64_t)sizeof *mean);
  free(groups), free(own), free(mean), free(count), free(except);
  return bad;
}

/* Greedy traversal over the whole key-key and query-key matrices of ks_similarity. */
static int64_t check_farthest(ks_ctx *ctx, const ks_similarity_args *a, const float *s, int64_t n_pick,
                              const char *name) {
  const int64_t n = a->n_k, first = n / 2;
  ks_similarity_args self = *a;
  self.q = a->k, self.n_q = n, self.q_dtype = a->k_dtype, self.q_scales = a->k_scales;
  ks_guard between = ks_guard_make(ctx, NULL, n * n);
  int64_t *picked = calloc((size_t)n_pick + 1, sizeof *picked),
          bad = ks_similarity(ctx, &self, between.p) != KS_OK;
  float *kk = ks_guard_read(&between), *nearest = ks_floats(n, KS_FILL_SIGNED, 0);
  ks_guard_free(&between);
  unsigned char *taken = calloc((size_t)n + 1, 1);
  cr_assert(picked && taken);
  picked[n_pick] = 4711;
  bad += ks_similarity_farthest_first(ctx, a, n_pick, first, picked) != KS_OK;
  for (int64_t j = 0; j < n; j++) {
    nearest[j] = -INFINITY;
    for (int64_t i = 0; i < a->n_q; i++)
      nearest[j] = isnan(s[i * n + j]) ? INFINITY : fmaxf(nearest[j], s[i * n + j]);
  }
  for (int64_t p = 0; p < n_pick; p++) {
    int64_t best = -1;
    for (int64_t j = 0; j < n; j++)
      if (!taken[j] && (best < 0 || nearest[j] < nearest[best])) best = j;
    if (p == 0 && a->n_q == 0) best = first;
    if (picked[p] != best) {
      fprintf(stderr, "%s: pick %lld is %lld, wants %lld\n", name, (long long)p, (long long)picked[p],
              (long long)best);
      bad++;
      break;
    }
    taken[best] = 1;
    for (int64_t j = 0; j < n; j++)
      nearest[j] = isnan(kk[best * n + j]) ? INFINITY : fmaxf(nearest[j], kk[best * n + j]);
  }
  bad += picked[n_pick] != 4711;
  free(kk), free(nearest), free(picked), free(taken);
  return bad;
}

/* Float32 activations: cases with float32 rows; bf16: the others. The activations themselves do not matter.
 */
static bool is_for(const ks_ctx *ctx, const sim_case *c) {
  const bool has_f32 = c->q_dtype == F32 || c->k_dtype == F32;
  return !ks_test_is_cuda() || has_f32 == (ks_ctx_act_dtype(ctx) == F32);
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const sim_case *c = test_case;
  const int64_t n = c->n_q * c->n_k;
  if (!is_for(ctx, c)) return 0;
  side q = make_side(ctx, c->n_q, c->n_cols, c->fill, c->q_dtype, c->scaled, 1),
       k = make_side(ctx, c->n_k, c->n_cols, c->fill, c->k_dtype, c->scaled, 2);
  double *ref = ks_doubles(NULL, n), *size = ks_doubles(NULL, n);
  oracle(c, &q, &k, ref, size);
  ks_guard gs = ks_guard_make(ctx, NULL, n);
  const ks_similarity_args a = args_of(c, &q, &k);
  int64_t bad = ks_similarity(ctx, &a, gs.p) != KS_OK;
  bad += ks_guard_check_output(name, &gs, ref, size, (double)c->n_cols);
  float *s = ks_guard_read(&gs);
  for (int64_t i = 0; c->fill == KS_FILL_INTEGER && c->metric == DOT && !c->scaled && i < n; i++)
    bad += (double)s[i] != ref[i]; /* small integers: no rounding at all */
  static const int64_t best[] = {3, 64, 1, 100};
  for (int i = 0; i < (c->n_k > 1000 || ks_test_is_shim() ? 2 : 4); i++)
    bad += check_top(ctx, &a, s, best[i], name);
  for (int what = 0; what < 4; what++)
    bad += check_mean(ctx, &a, s, what, name, out);
  if (c->n_k > 0 && c->n_k < (ks_test_is_shim() ? 70 : 1000)) {
    ks_similarity_args none = a;
    none.n_q = 0;
    const int64_t most = ks_test_is_shim() ? 5 : c->n_k;
    bad += check_farthest(ctx, &a, s, most < c->n_k / 2 ? most : c->n_k / 2, name);
    bad += check_farthest(ctx, &none, s, most < c->n_k ? most : c->n_k, name);
  }
  bad += free_side(&q, name) + free_side(&k, name);
  ks_results_add(out, s, n);
  ks_guard_free(&gs);
  free(ref), free(size), free(s);
  return bad;
}

Test(similarity, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++) {
    set_smem(i % 2 ? SMEM_AMPERE : SMEM_HOPPER);
    bad += ks_test_everywhere("similarity", i, &cases[i], run);
  }
  for (int64_t i = 0; !ks_test_is_shim() && i < N_LARGE; i++)
    bad += ks_test_everywhere("similarity", N_CASES + i, &large_cases[i], run);
  cr_assert(bad == 0);
}

/* Every operation with tiles of one shape; results of the others are compared with the first's. */
static int64_t run_shape(ks_ctx *ctx, const sim_case *c, const char *name, ks_results *out) {
  enum { BEST = 20 };
  side q = make_side(ctx, c->n_q, c->n_cols, c->fill, c->q_dtype, c->scaled, 1),
       k = make_side(ctx, c->n_k, c->n_cols, c->fill, c->k_dtype, c->scaled, 2);
  ks_guard gs = ks_guard_make(ctx, NULL, c->n_q * c->n_k);
  const ks_similarity_args a = args_of(c, &q, &k);
  float *scores = ks_floats(c->n_q * BEST, KS_FILL_SIGNED, 0);
  int64_t *index = calloc((size_t)(c->n_q * BEST), sizeof *index),
          *count = calloc((size_t)c->n_q, sizeof *count);
  double *mean = ks_doubles(NULL, c->n_q);
  int64_t bad = ks_similarity(ctx, &a, gs.p) != KS_OK, picked[4];
  bad += ks_similarity_top(ctx, &a, BEST, scores, index) != KS_OK;
  bad += ks_similarity_mean(ctx, &a, NULL, mean, count) != KS_OK;
  bad += ks_similarity_farthest_first(ctx, &a, 4, 0, picked) != KS_OK;
  if (bad) fprintf(stderr, "%s: %s\n", name, ks_error_message());
  ks_results_add_guard(out, &gs);
  ks_results_add(out, scores, c->n_q * BEST);
  ks_results_add_bytes(out, index, c->n_q * BEST * (int64_t)sizeof *index);
  ks_results_add_bytes(out, mean, c->n_q * (int64_t)sizeof *mean);
  ks_results_add_bytes(out, picked, sizeof picked);
  bad += free_side(&q, name) + free_side(&k, name);
  ks_guard_free(&gs);
  free(scores), free(index), free(count), free(mean);
  return bad;
}

/* A kernel of choice on a device of so much shared memory. */
typedef struct {
  const char *variants;
  size_t smem;
} shape_case;

/* Results of each are those of the first. */
static int64_t check_shapes(const sim_case *c, const shape_case *shapes, int n) {
  ks_results first = {0};
  int64_t bad = 0;
  for (int v = 0; v < n; v++) {
    const char *variants = shapes[v].variants;
    const bool is_hopper = variants && strstr(variants, "wgmma");
    char name[96];
    ks_ctx *ctx = NULL;
    ks_results now = {0};
    set_smem(shapes[v].smem);
    if (ks_shim_set_hopper) ks_shim_set_hopper(is_hopper);
    snprintf(name, sizeof name, "similarity %lld x %lld x %lld, %s, %zu KiB", (long long)c->n_q,
             (long long)c->n_k, (long long)c->n_cols, variants ? variants : "by shape", shapes[v].smem >> 10);
    const ks_ctx_params params = {.backend = "cuda",
                                  .activations = c->k_dtype == F32 || c->q_dtype == F32 ? F32 : BF16,
                                  .variants = variants};
    const bool is_skipped = is_hopper && params.activations == F32;
    const ks_status status = is_skipped ? KS_EUNSUPPORTED : ks_ctx_create(&ctx, &params);
    if (!(is_hopper && status == KS_EUNSUPPORTED)) {
      cr_assert(status == KS_OK, "%s", ks_error_message());
      bad += run_shape(ctx, c, name, &now);
      if (v > 0) bad += ks_results_check_same(name, &now, &first);
    }
    ks_ctx_destroy(ctx);
    if (v == 0)
      first = now;
    else
      ks_results_free(&now);
  }
  if (ks_shim_set_hopper) ks_shim_set_hopper(0);
  ks_results_free(&first);
  return bad;
}

/* A score's bits do not depend on the kernel that made it. More queries and keys than a tile of any, and
 * several parts. */
Test(similarity, shapes_agree) {
  static const shape_case shapes[] = {{NULL, SMEM_AMPERE},
                                      {"similarity=few", SMEM_AMPERE},
                                      {"similarity=mid", SMEM_AMPERE},
                                      {"similarity=big", SMEM_AMPERE},
                                      {"similarity=big", SMEM_HOPPER},
                                      {"similarity=wgmma", SMEM_HOPPER},
                                      {NULL, SMEM_TURING}}; /* lists in device memory */
  static const sim_case both[] = {{131, 300, 40, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                  {130, 260, 72, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                  {5, 600, 24, DOT, KS_FILL_SIGNED, BF16, BF16, false},
                                  {3, 1300, 136, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                  {2, 800, 8, DOT, KS_FILL_INTEGER, BF16, BF16, false},
                                  {140, 150, 72, COSINE, KS_FILL_INTEGER, BF16, I8, true},
                                  {135, 140, 16, DOT, KS_FILL_INTEGER, I8, I8, true},
                                  {129, 130, 36, COSINE, KS_FILL_SIGNED, F32, BF16, false},
                                  {3, 2600, 4, DOT, KS_FILL_INTEGER, I8, BF16, false}};
  int64_t bad = 0;
  for (int64_t i = 0; ks_test_is_cuda() && i < (int64_t)(sizeof both / sizeof both[0]); i++)
    bad += check_shapes(&both[i], shapes, (int)(sizeof shapes / sizeof shapes[0]));
  cr_assert(bad == 0);
}

/* Parts of many tiles, the last one of a few keys; a key that is no number. */
Test(similarity, long_parts_agree) {
  static const shape_case shapes[] = {{"similarity=big", SMEM_HOPPER}, {"similarity=wgmma", SMEM_HOPPER}};
  static const sim_case both[] = {{140, 2570, 16, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                  {129, 1300, 8, DOT, KS_FILL_LARGE, BF16, BF16, false}};
  int64_t bad = 0;
  for (int i = 0; ks_test_is_cuda() && i < 2; i++)
    bad += check_shapes(&both[i], shapes, 2);
  cr_assert(bad == 0);
}

/* A query's results do not depend on the other queries, nor a score on the other keys. */
static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const sim_case *c = test_case;
  if (!is_for(ctx, c)) return 0;
  side q = make_side(ctx, c->n_q, c->n_cols, c->fill, c->q_dtype, c->scaled, 1),
       k = make_side(ctx, c->n_k, c->n_cols, c->fill, c->k_dtype, c->scaled, 2);
  ks_guard gs = ks_guard_make(ctx, NULL, c->n_q * c->n_k), alone = ks_guard_make(ctx, NULL, c->n_k);
  const ks_similarity_args a = args_of(c, &q, &k);
  double mean[256], one_mean;
  int64_t count[256], one_count, bad = ks_similarity(ctx, &a, gs.p) != KS_OK;
  bad += ks_similarity_mean(ctx, &a, NULL, mean, count) != KS_OK;
  float *s = ks_guard_read(&gs);
  for (int64_t i = 0; i < c->n_q; i += ks_test_is_shim() ? 31 : 1) {
    ks_similarity_args one = a;
    one.n_q = 1, one.q = ks_guard_at(&q.stored, i * c->n_cols);
    one.q_scales = q.scaled ? ks_guard_at(&q.scales, i) : NULL;
    bad += ks_similarity(ctx, &one, alone.p) != KS_OK;
    float *row = ks_guard_read(&alone);
    bad += ks_check_same("query alone", row, s + i * c->n_k, c->n_k);
    bad += ks_similarity_mean(ctx, &one, NULL, &one_mean, &one_count) != KS_OK;
    bad += one_mean != mean[i] || one_count != c->n_k || count[i] != c->n_k;
    free(row);
  }
  for (int64_t j = 0; j < c->n_k; j += ks_test_is_shim() ? 37 : 1) {
    ks_similarity_args one = a;
    one.n_q = 1, one.n_k = 1, one.k = ks_guard_at(&k.stored, j * c->n_cols);
    one.k_scales = k.scaled ? ks_guard_at(&k.scales, j) : NULL;
    bad += ks_similarity(ctx, &one, alone.p) != KS_OK;
    float *row = ks_guard_read(&alone);
    bad += ks_check_same("key alone", row, s + j, 1);
    free(row);
  }
  ks_results_add(out, s, c->n_q * c->n_k);
  bad += free_side(&q, name) + free_side(&k, name);
  ks_guard_free(&gs), ks_guard_free(&alone);
  free(s);
  return bad;
}

Test(similarity, queries_and_keys_stand_alone) {
  set_smem(SMEM_AMPERE);
  static const sim_case alone[] = {{125, 90, 70, COSINE, KS_FILL_SIGNED, F32, F32, false},
                                   {130, 90, 72, COSINE, KS_FILL_SIGNED, BF16, BF16, false},
                                   {40, 70, 33, DOT, KS_FILL_INTEGER, I8, I8, true}};
  int64_t bad = 0;
  for (int64_t i = 0; i < 3; i++)
    bad += ks_test_everywhere("similarity", 100 + i, &alone[i], run_alone);
  cr_assert(bad == 0);
}

/* Many equal scores among few numbers that are none, or scores that rise, so that the best lie side by side; lists shorter and
 * longer than a warp, and longer than there are keys; few parts and many. */
static int64_t run_lists(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { Q = 2, D = 4 };
  static const int64_t n_best[] = {5, 32, 33, 97, 200, 1024};
  const int64_t n_k = *(const int64_t *)test_case;
  float q[Q * D] = {0}, *k = ks_floats(n_k * D, KS_FILL_SIGNED, 0),
              *s = ks_floats(Q * n_k, KS_FILL_SIGNED, 0);
  int64_t bad = 0;
  for (int i = 0; i < Q; i++)
    q[i * D] = 1;
  for (int rises = n_k > 1000; rises < 2; rises++) {
    for (int64_t j = 0; j < n_k; j++)
      k[j * D] = j % 50 == 9 ? NAN : rises ? (float)(j / 3) : (float)(j * 7 % 5);
    ks_guard gq = ks_guard_make(ctx, q, Q * D), gk = ks_guard_make(ctx, k, n_k * D);
    const ks_similarity_args a = {.q = gq.p, .k = gk.p, .n_q = Q, .n_k = n_k, .n_cols = D, .metric = DOT};
    for (int64_t i = 0; i < Q * n_k; i++)
      s[i] = k[i % n_k * D];
    for (int i = 0; i < (n_k > 1000 ? 3 : ks_test_is_shim() ? 5 : 6); i++)
      bad += check_top(ctx, &a, s, n_best[i], name);
    ks_guard_free(&gq), ks_guard_free(&gk);
  }
  ks_results_add(out, s, 1);
  free(k), free(s);
  return bad;
}

Test(similarity, ties_and_long_lists) {
  static const int64_t n_k[] = {150, 2600}; /* on the shim 3 and 41 parts of up to 64 keys */
  for (int64_t i = 0; i < 2; i++) {
    if (ks_shim_set_multiprocessors) ks_shim_set_multiprocessors(n_k[i] > 1000 ? 70 : 4);
    cr_assert(ks_test_everywhere("similarity", 203 + i, &n_k[i], run_lists) == 0);
  }
  if (ks_shim_set_multiprocessors) ks_shim_set_multiprocessors(4);
}

static int64_t run_not_finite(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { K = 9, D = 4 };
  const float q[D] = {1, 0, 0, 0},
              k[K][D] = {{NAN}, {1}, {-1, 2}, {INFINITY}, {0}, {3}, {0, NAN}, {-INFINITY}, {2}};
  float scores[K + 2];
  int64_t index[K + 2], picked[K], bad = 0;
  (void)test_case;
  ks_guard gq = ks_guard_make(ctx, q, D), gk = ks_guard_make(ctx, k[0], (int64_t)K * D);
  ks_similarity_args a = {.q = gq.p, .k = gk.p, .n_q = 1, .n_k = K, .n_cols = D, .metric = DOT};
  bad += ks_similarity_top(ctx, &a, K + 2, scores, index) != KS_OK;
  const int64_t by_dot[] = {3, 5, 8, 1, 4, 2, 7, 0, 6, -1, -1};
  bad += memcmp(index, by_dot, sizeof by_dot) != 0;
  bad += !(isnan(scores[7]) && isnan(scores[8]) && scores[9] == -INFINITY && scores[6] == -INFINITY);
  const int32_t groups[K] = {0, 1, 2, 1, 3, 3, 4, 2, 4};
  const double means[] = {NAN, INFINITY, -INFINITY, 1.5, NAN};
  for (int32_t g = 0; g < 5; g++) {
    double mean;
    int64_t count;
    bad += ks_similarity_mean(ctx, &a, &(ks_similarity_groups){.keys = groups, .queries = &g}, &mean,
                              &count) != KS_OK;
    bad += count != (g ? 2 : 1) || !(mean == means[g] || (isnan(mean) && isnan(means[g])));
  }
  a.metric = COSINE;
  bad += ks_similarity_top(ctx, &a, 5, scores, index) != KS_OK;
  const int64_t by_cosine[] = {1, 5, 8, 4, 2};
  bad += memcmp(index, by_cosine, sizeof by_cosine) != 0 || scores[0] != 1 || scores[3] != 0;
  a.n_q = 0;
  bad += ks_similarity_farthest_first(ctx, &a, K, 1, picked) != KS_OK;
  const int64_t order[] = {1, 2, 4, 5, 8, 0, 3, 6, 7}; /* the four that are not finite at the end */
  bad += memcmp(picked, order, sizeof order) != 0;
  if (bad) fprintf(stderr, "%s: other order\n", name);
  ks_results_add_bytes(out, picked, sizeof picked);
  ks_guard_free(&gq), ks_guard_free(&gk);
  return bad;
}

Test(similarity, nan_and_infinity_rank_last) {
  cr_assert(ks_test_everywhere("similarity", 201, NULL, run_not_finite) == 0);
}

/* Rows whose squares leave float32, with norms that do and do not: cosines are those of the directions. */
static int64_t run_range(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { Q = 2, K = 6, D = 2 };
  (void)test_case;
  const float q[Q * D] = {1e-12f, 0, 2e18f, 0};
  const float k[K * D] = {1e-20f, 1e-20f, 1e19f, -1e19f, 3e-30f, 0, 1, 1, 0, 0, 1e-3f, 0};
  const double half = sqrt(0.5);
  /* Dot products below float32's range are zeros, as the definition has them. */
  const double ref[Q][K] = {{half, half, 1, half, 0, 1}, {half, half, 1, half, 0, 1}};
  ks_guard gq = ks_guard_make(ctx, q, Q * D), gk = ks_guard_make(ctx, k, K * D),
           gs = ks_guard_make(ctx, NULL, Q * K);
  const ks_similarity_args a = {.q = gq.p, .k = gk.p, .n_q = Q, .n_k = K, .n_cols = D, .metric = COSINE};
  int64_t bad = ks_similarity(ctx, &a, gs.p) != KS_OK;
  float *s = ks_guard_read(&gs);
  for (int i = 0; i < Q * K; i++) {
    const double dot = (double)q[i / K * D] * (double)k[i % K * D];
    if (fabs(dot) > 0 && fabs(dot) < 0x1p-120) continue; /* loses bits or all of them */
    if (ks_close((double)s[i], ref[i / K][i % K], fabs(ref[i / K][i % K]), D)) continue;
    fprintf(stderr, "%s: [%d] is %g, wants %g\n", name, i, (double)s[i], ref[i / K][i % K]);
    bad++;
  }
  ks_results_add(out, s, Q * K);
  ks_guard_free(&gq), ks_guard_free(&gk), ks_guard_free(&gs);
  free(s);
  return bad;
}

Test(similarity, norms_beyond_float32) {
  cr_assert(ks_test_everywhere("similarity", 202, NULL, run_range) == 0);
}

/* Means of scores below float32's normal range, of both signs, and of sizes far apart. */
static int64_t run_mean_range(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { K = 9, D = 4, GROUPS = 4 };
  (void)test_case;
  const float q[D] = {1}, of_key[K] = {1e-40f, 3e-40f, -1e-38f, -3e38f, -2e38f, 1, 0x1p-25f, -1, 0x1p-30f};
  const int32_t groups[K] = {0, 0, 1, 2, 2, 3, 3, 3, 3};
  const double means[GROUPS] = {((double)of_key[0] + (double)of_key[1]) / 2, (double)of_key[2],
                                ((double)of_key[3] + (double)of_key[4]) / 2, (0x1p-25 + 0x1p-30) / 4};
  float k[K * D] = {0};
  int64_t bad = 0;
  for (int j = 0; j < K; j++)
    k[j * D] = of_key[j];
  ks_guard gq = ks_guard_make(ctx, q, D), gk = ks_guard_make(ctx, k, K * D);
  const ks_similarity_args a = {.q = gq.p, .k = gk.p, .n_q = 1, .n_k = K, .n_cols = D, .metric = DOT};
  for (int32_t g = 0; g < GROUPS; g++) {
    double mean;
    int64_t count;
    bad += ks_similarity_mean(ctx, &a, &(ks_similarity_groups){.keys = groups, .queries = &g}, &mean,
                              &count) != KS_OK;
    if (mean != means[g]) fprintf(stderr, "%s: mean %g, wants %g\n", name, mean, means[g]);
    bad += mean != means[g];
  }
  ks_results_add(out, k, K * D);
  ks_guard_free(&gq), ks_guard_free(&gk);
  return bad;
}

Test(similarity, means_of_any_size) {
  cr_assert(ks_test_everywhere("similarity", 205, NULL, run_mean_range) == 0);
}

/* Scores below float32's range, of both signs, are as good as zeros: the lower index goes first. */
static int64_t run_vanishing(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { Q = 9, K = 40, D = 8, BEST = 33 };
  const ks_dtype dtype = *(const ks_dtype *)test_case;
  const float big = 0x1p59f, small = 0x1p-20f; /* 1 / norm is a float, and the dot product, too */
  float q[Q * D] = {0}, k[K * D] = {0}, scores[Q * BEST];
  for (int i = 0; i < Q; i++)
    q[i * D] = big, q[i * D + 7] = small;
  for (int j = 0; j < K; j++)
    k[j * D + 1] = big, k[j * D + 7] = j % 3 == 1 ? small : j % 3 == 2 ? 0 : -small;
  ks_guard gq = ks_guard_make_as(ctx, dtype, q, Q * D), gk = ks_guard_make_as(ctx, dtype, k, K * D);
  ks_similarity_args a = {
      .q = gq.p, .k = gk.p, .n_k = K, .n_cols = D, .metric = COSINE, .q_dtype = dtype, .k_dtype = dtype};
  int64_t bad = 0, index[Q * BEST];
  for (a.n_q = 1; a.n_q <= Q; a.n_q += Q - 1)
    for (int64_t best_k = 3; best_k <= BEST; best_k += BEST - 3) {
      bad += ks_similarity_top(ctx, &a, best_k, scores, index) != KS_OK;
      for (int64_t i = 0; i < a.n_q * best_k; i++)
        bad += index[i] != i % best_k || scores[i] != 0;
    }
  if (bad) fprintf(stderr, "%s: zeros in another order\n", name);
  ks_results_add_bytes(out, index, sizeof index);
  ks_guard_free(&gq), ks_guard_free(&gk);
  return bad;
}

Test(similarity, scores_that_vanish) {
  static const ks_dtype dtypes[] = {F32, BF16};
  for (int64_t i = 0; i < 2; i++)
    cr_assert(ks_test_everywhere("similarity", 206 + i, &dtypes[i], run_vanishing) == 0);
}

/* Points on a circle: the traversal can be followed by hand. */
Test(similarity, farthest_first_by_hand) {
  const float k[][2] = {{1, 0}, {0.8f, 0.6f}, {0, 1}, {-1, 0}, {0, -1}, {1, 0}};
  int64_t picked[6];
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard gk = ks_guard_make(ctx, k[0], 12);
  ks_similarity_args a = {.k = gk.p, .n_k = 6, .n_cols = 2, .metric = COSINE};
  cr_assert(ks_similarity_farthest_first(ctx, &a, 6, 0, picked) == KS_OK);
  /* opposite first; then (0, 1) and (0, -1) tie at 0, the lower index wins; (0.8, 0.6) at 0.8; the double at
   * 1 */
  const int64_t from_0[] = {0, 3, 2, 4, 1, 5};
  cr_assert(memcmp(picked, from_0, sizeof from_0) == 0);
  a.q = ks_guard_at(&gk, 6), a.n_q = 1; /* centre (-1, 0): both (1, 0) are opposite */
  cr_assert(ks_similarity_farthest_first(ctx, &a, 3, 99, picked) == KS_OK);
  const int64_t from_centre[] = {0, 2, 4};
  cr_assert(memcmp(picked, from_centre, sizeof from_centre) == 0);
  ks_guard_free(&gk);
  ks_ctx_destroy(ctx);
}

Test(similarity, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  const float values[12] = {1};
  double mean[2];
  float scores[8];
  int64_t index[8], count[2];
  int32_t groups[3] = {0};
  ks_guard q = ks_guard_make(ctx, values, 8), k = ks_guard_make(ctx, values, 12),
           s = ks_guard_make(ctx, NULL, 6);
  const ks_similarity_args good = {.q = q.p, .k = k.p, .n_q = 2, .n_k = 3, .n_cols = 4, .metric = COSINE};
  ks_similarity_args a = good;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_OK);
  a.metric = (ks_metric)2;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_EINVAL);
  a = good, a.n_k = -1;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_EINVAL);
  a = good, a.k = NULL;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_EINVAL);
  a = good, a.k_dtype = KS_DTYPE_F16;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_EINVAL);
  a = good, a.k_scales = k.p;
  cr_assert(ks_similarity(ctx, &a, s.p) == KS_EINVAL);
  cr_assert(ks_similarity(ctx, &good, NULL) == KS_EINVAL && ks_similarity(ctx, &good, q.p) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 0, scores, index) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 1025, scores, index) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 2, NULL, index) == KS_EINVAL);
  a = good, a.n_k = UINT32_MAX, a.n_cols = 0; /* more than an entry of a list can name */
  cr_assert(!ks_test_is_cuda() || ks_similarity_top(ctx, &a, 2, scores, index) == KS_EUNSUPPORTED);
  cr_assert(ks_similarity_mean(ctx, &good, &(ks_similarity_groups){.keys = groups}, mean, count) ==
            KS_EINVAL);
  cr_assert(ks_similarity_mean(ctx, &good, NULL, mean, NULL) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &good, 4, 0, index) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &good, -1, 0, index) == KS_EINVAL);
  a = good, a.n_q = 0;
  cr_assert(ks_similarity_farthest_first(ctx, &a, 2, 3, index) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &a, 0, 3, index) == KS_OK);
  ks_guard_free(&q), ks_guard_free(&k), ks_guard_free(&s);
  ks_ctx_destroy(ctx);
}
