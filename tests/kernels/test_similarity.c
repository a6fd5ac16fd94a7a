#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n_q, n_k, n_cols;
  ks_metric metric;
  ks_fill_kind fill;
} sim_case;

static const sim_case cases[] = {
    {0, 5, 8, KS_METRIC_DOT, KS_FILL_SIGNED},           {1, 1, 1, KS_METRIC_COSINE, KS_FILL_SIGNED},
    {1, 128, 64, KS_METRIC_COSINE, KS_FILL_SIGNED},     {2, 31, 0, KS_METRIC_COSINE, KS_FILL_SIGNED},
    {3, 33, 97, KS_METRIC_DOT, KS_FILL_INTEGER},        {7, 64, 31, KS_METRIC_COSINE, KS_FILL_INTEGER},
    {5, 65, 111, KS_METRIC_COSINE, KS_FILL_LARGE},      {6, 0, 16, KS_METRIC_COSINE, KS_FILL_SIGNED},
    {97, 203, 32, KS_METRIC_DOT, KS_FILL_POSITIVE},     {121, 130, 48, KS_METRIC_COSINE, KS_FILL_SIGNED},
    {1, 1025, 257, KS_METRIC_COSINE, KS_FILL_NEAR_ONE}, {2, 2500, 20, KS_METRIC_COSINE, KS_FILL_SIGNED},
    {3, 3000, 3, KS_METRIC_DOT, KS_FILL_INTEGER},       {250, 70, 300, KS_METRIC_COSINE, KS_FILL_SIGNED}};
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* Inputs with a zero row and repeated rows among both. */
static float *rows(int64_t n, int64_t d, ks_fill_kind fill, uint64_t seed) {
  float *x = ks_floats(n * d, fill, seed);
  if (n > 2) memset(x + 2 * d, 0, (size_t)d * sizeof *x);
  if (n > 20) memcpy(x + 20 * d, x + 7 * d, (size_t)d * sizeof *x);
  if (n > 66) memcpy(x + 66 * d, x + 7 * d, (size_t)d * sizeof *x);
  return x;
}

static double norm(const float *x, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; c++)
    sum += (double)x[c] * (double)x[c];
  return sqrt(sum);
}

static void oracle(const sim_case *c, const float *q, const float *k, double *s, double *size) {
  const int64_t d = c->n_cols;
  for (int64_t i = 0; i < c->n_q; i++)
    for (int64_t j = 0; j < c->n_k; j++) {
      double dot = 0, abs = 0, scale = 1;
      for (int64_t x = 0; x < d; x++) {
        dot += (double)q[i * d + x] * (double)k[j * d + x];
        abs += fabs((double)q[i * d + x] * (double)k[j * d + x]);
      }
      if (c->metric == KS_METRIC_COSINE) {
        double product = norm(q + i * d, d) * norm(k + j * d, d);
        scale = product > 0 ? 1 / product : 0;
      }
      s[i * c->n_k + j] = dot * scale;
      size[i * c->n_k + j] = abs * scale;
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

static int64_t check_mean(ks_ctx *ctx, const ks_similarity_args *a, const float *s, bool grouped,
                          const char *name, ks_results *out) {
  int32_t *groups = calloc((size_t)a->n_k + 1, sizeof *groups),
          *own = calloc((size_t)a->n_q + 1, sizeof *own);
  double *mean = ks_doubles(NULL, a->n_q);
  int64_t *count = calloc((size_t)a->n_q + 1, sizeof *count), bad = 0;
  cr_assert(groups && own && count);
  for (int64_t j = 0; j < a->n_k; j++)
    groups[j] = (int32_t)(j * j % 5);
  for (int64_t i = 0; i < a->n_q; i++)
    own[i] = (int32_t)(i % 7);
  mean[a->n_q] = 4711;
  bad += ks_similarity_mean(ctx, a, grouped ? groups : NULL, grouped ? own : NULL, mean, count) != KS_OK;
  for (int64_t i = 0; i < a->n_q; i++) {
    long double sum = 0, size = 0;
    int64_t n = 0;
    for (int64_t j = 0; j < a->n_k; j++) {
      if (grouped && groups[j] != own[i]) continue;
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
  free(groups), free(own), free(mean), free(count);
  return bad;
}

/* Greedy traversal over the whole key-key and query-key matrices of ks_similarity. */
static int64_t check_farthest(ks_ctx *ctx, const ks_similarity_args *a, const float *s, int64_t n_pick,
                              const char *name) {
  const int64_t n = a->n_k, first = n / 2;
  ks_similarity_args self = *a;
  self.q = a->k, self.n_q = n;
  float *kk = ks_floats(n * n, KS_FILL_SIGNED, 0), *nearest = ks_floats(n, KS_FILL_SIGNED, 0);
  int64_t *picked = calloc((size_t)n_pick + 1, sizeof *picked), bad = ks_similarity(ctx, &self, kk) != KS_OK;
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

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const sim_case *c = test_case;
  const int64_t n = c->n_q * c->n_k;
  float *q = rows(c->n_q, c->n_cols, c->fill, 1), *k = rows(c->n_k, c->n_cols, c->fill, 2);
  double *ref = ks_doubles(NULL, n), *size = ks_doubles(NULL, n);
  oracle(c, q, k, ref, size);
  ks_guard gq = ks_guard_make(ctx, q, c->n_q * c->n_cols), gk = ks_guard_make(ctx, k, c->n_k * c->n_cols);
  ks_guard gs = ks_guard_make(ctx, NULL, n);
  const ks_similarity_args a = {gq.p, gk.p, c->n_q, c->n_k, c->n_cols, c->metric};
  int64_t bad = ks_similarity(ctx, &a, gs.p) != KS_OK;
  bad += ks_guard_check_output(name, &gs, ref, size, (double)c->n_cols);
  float *s = ks_guard_read(&gs);
  for (int64_t i = 0; c->fill == KS_FILL_INTEGER && c->metric == KS_METRIC_DOT && i < n; i++)
    bad += (double)s[i] != ref[i]; /* small integers: no rounding at all */
  static const int64_t best[] = {1, 3, 64, 100};
  for (int i = 0; i < (c->n_k > 1000 ? 2 : 4); i++)
    bad += check_top(ctx, &a, s, best[i], name);
  bad += check_mean(ctx, &a, s, false, name, out) + check_mean(ctx, &a, s, true, name, out);
  if (c->n_k > 0 && c->n_k < 1000) {
    ks_similarity_args none = a;
    none.n_q = 0;
    bad += check_farthest(ctx, &a, s, c->n_k / 2, name) + check_farthest(ctx, &none, s, c->n_k, name);
  }
  bad += ks_guard_check_input(name, &gq) + ks_guard_check_input(name, &gk);
  ks_results_add(out, s, n);
  ks_guard_free(&gq), ks_guard_free(&gk), ks_guard_free(&gs);
  free(q), free(k), free(ref), free(size), free(s);
  return bad;
}

Test(similarity, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("similarity", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* A query's results do not depend on the other queries, nor a score on the other keys. */
Test(similarity, queries_and_keys_stand_alone) {
  enum { Q = 125, K = 90, D = 70 };
  float *q = rows(Q, D, KS_FILL_SIGNED, 1), *k = rows(K, D, KS_FILL_SIGNED, 2),
        *s = ks_floats(Q * K, KS_FILL_SIGNED, 0);
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}) == KS_OK);
  cr_assert(ks_similarity(ctx, &(ks_similarity_args){q, k, Q, K, D, KS_METRIC_COSINE}, s) == KS_OK);
  double mean[Q], one_mean;
  int64_t count[Q], one_count;
  cr_assert(ks_similarity_mean(ctx, &(ks_similarity_args){q, k, Q, K, D, KS_METRIC_COSINE}, NULL, NULL, mean,
                               count) == KS_OK);
  for (int64_t i = 0; i < Q; i++) {
    float row[K];
    const ks_similarity_args one = {q + i * D, k, 1, K, D, KS_METRIC_COSINE};
    cr_assert(ks_similarity(ctx, &one, row) == KS_OK);
    cr_assert(ks_check_same("query alone", row, s + i * K, K) == 0);
    cr_assert(ks_similarity_mean(ctx, &one, NULL, NULL, &one_mean, &one_count) == KS_OK);
    cr_assert(one_mean == mean[i] && one_count == K && count[i] == K);
  }
  for (int64_t j = 0; j < K; j++) {
    float one;
    cr_assert(ks_similarity(ctx, &(ks_similarity_args){q + D, k + j * D, 1, 1, D, KS_METRIC_COSINE}, &one) ==
              KS_OK);
    cr_assert(ks_check_same("key alone", &one, s + K + j, 1) == 0);
  }
  free(q), free(k), free(s);
  ks_ctx_destroy(ctx);
}

Test(similarity, nan_and_infinity_rank_last) {
  enum { K = 9, D = 4 };
  for (int i = 0; ks_test_isas[i]; i++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[i], 1);
    if (!ctx) continue;
    float q[D] = {1, 0, 0, 0},
          k[K][D] = {{NAN}, {1}, {-1, 2}, {INFINITY}, {0}, {3}, {0, NAN}, {-INFINITY}, {2}};
    float scores[K + 2];
    int64_t index[K + 2], picked[K];
    ks_similarity_args a = {q, k[0], 1, K, D, KS_METRIC_DOT};
    cr_assert(ks_similarity_top(ctx, &a, K + 2, scores, index) == KS_OK);
    const int64_t by_dot[] = {3, 5, 8, 1, 4, 2, 7, 0, 6, -1, -1};
    cr_assert(memcmp(index, by_dot, sizeof by_dot) == 0);
    cr_assert(isnan(scores[7]) && isnan(scores[8]) && scores[9] == -INFINITY && scores[6] == -INFINITY);
    a.metric = KS_METRIC_COSINE;
    cr_assert(ks_similarity_top(ctx, &a, 5, scores, index) == KS_OK);
    const int64_t by_cosine[] = {1, 5, 8, 4, 2};
    cr_assert(memcmp(index, by_cosine, sizeof by_cosine) == 0 && scores[0] == 1 && scores[3] == 0);
    a.n_q = 0;
    cr_assert(ks_similarity_farthest_first(ctx, &a, K, 1, picked) == KS_OK);
    const int64_t order[] = {1, 2, 4, 5, 8, 0, 3, 6, 7}; /* the four that are not finite at the end */
    cr_assert(memcmp(picked, order, sizeof order) == 0);
    ks_ctx_destroy(ctx);
  }
}

/* Points on a circle: the traversal can be followed by hand. */
Test(similarity, farthest_first_by_hand) {
  const float k[][2] = {{1, 0}, {0.8f, 0.6f}, {0, 1}, {-1, 0}, {0, -1}, {1, 0}};
  int64_t picked[6];
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  ks_similarity_args a = {NULL, k[0], 0, 6, 2, KS_METRIC_COSINE};
  cr_assert(ks_similarity_farthest_first(ctx, &a, 6, 0, picked) == KS_OK);
  /* opposite first; then (0, 1) and (0, -1) tie at 0, the lower index wins; (0.8, 0.6) at 0.8; the double at
   * 1 */
  const int64_t from_0[] = {0, 3, 2, 4, 1, 5};
  cr_assert(memcmp(picked, from_0, sizeof from_0) == 0);
  a.q = k[3], a.n_q = 1; /* centre (-1, 0): both (1, 0) are opposite */
  cr_assert(ks_similarity_farthest_first(ctx, &a, 3, 99, picked) == KS_OK);
  const int64_t from_centre[] = {0, 2, 4};
  cr_assert(memcmp(picked, from_centre, sizeof from_centre) == 0);
  ks_ctx_destroy(ctx);
}

Test(similarity, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float q[8] = {1}, k[12] = {1}, s[6];
  double mean[2];
  int64_t index[8], count[2];
  int32_t groups[3] = {0};
  const ks_similarity_args good = {q, k, 2, 3, 4, KS_METRIC_COSINE};
  ks_similarity_args a = good;
  cr_assert(ks_similarity(ctx, &a, s) == KS_OK);
  a.metric = (ks_metric)2;
  cr_assert(ks_similarity(ctx, &a, s) == KS_EINVAL);
  a = good, a.n_k = -1;
  cr_assert(ks_similarity(ctx, &a, s) == KS_EINVAL);
  a = good, a.k = NULL;
  cr_assert(ks_similarity(ctx, &a, s) == KS_EINVAL);
  cr_assert(ks_similarity(ctx, &good, NULL) == KS_EINVAL && ks_similarity(ctx, &good, q) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 0, s, index) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 1025, s, index) == KS_EINVAL);
  cr_assert(ks_similarity_top(ctx, &good, 2, NULL, index) == KS_EINVAL);
  cr_assert(ks_similarity_mean(ctx, &good, groups, NULL, mean, count) == KS_EINVAL);
  cr_assert(ks_similarity_mean(ctx, &good, NULL, NULL, mean, NULL) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &good, 4, 0, index) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &good, -1, 0, index) == KS_EINVAL);
  a = good, a.n_q = 0;
  cr_assert(ks_similarity_farthest_first(ctx, &a, 2, 3, index) == KS_EINVAL);
  cr_assert(ks_similarity_farthest_first(ctx, &a, 0, 3, index) == KS_OK);
  ks_ctx_destroy(ctx);
}
