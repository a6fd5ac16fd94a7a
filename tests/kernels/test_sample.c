#include "kernels/base/rng.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_sample.h"
#include <criterion/criterion.h>
#include <math.h>

static float *normal_logits(int64_t n, double deviation, uint64_t seed) {
  float *x = ks_floats(n, KS_FILL_SIGNED, 0);
  ks_rng rng = ks_rng_make(seed, KS_RNG_TEST, 77);
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)(deviation * ks_rng_normal(&rng));
  return x;
}

static int32_t draw(ks_ctx *ctx, const float *logits, int64_t n, ks_sampler s) {
  int32_t token = -7;
  cr_assert(ks_sample(ctx, &(ks_sample_args){logits, 1, n, &s, &token}) == KS_OK, "%s", ks_error_message());
  cr_assert(token >= 0 && token < n);
  return token;
}

Test(sample, greedy_takes_the_first_of_the_largest) {
  static const int64_t sizes[] = {1, 2, 15, 16, 17, 31, 33, 97, 255, 256, 257, 1025, 32000};
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    for (int i = 0; i < 13; i++) {
      const int64_t n = sizes[i], at[] = {0, n / 2, n - 1};
      for (int j = 0; j < 3; j++) {
        float *x = normal_logits(n, 1, 3);
        x[at[j]] = x[n - 1] = 50;
        const ks_sampler greedy = {0, 0, 1, 1, 1}, one = {0.8f, 1, 1, 1, 1}, narrow = {0.8f, 0, 1e-6f, 1, 1};
        cr_assert(draw(ctx, x, n, greedy) == at[j]);
        cr_assert(draw(ctx, x, n, one) == at[j]);
        cr_assert(draw(ctx, x, n, narrow) == at[j]);
        free(x);
      }
    }
    float zeros[] = {-0.0f, 0.0f, -1};
    cr_assert(draw(ctx, zeros, 3, (ks_sampler){0, 0, 1, 1, 1}) == 0);
    cr_assert(draw(ctx, zeros, 3, (ks_sampler){1, 1, 1, 1, 1}) == 0); /* both zeros are equal */
    ks_ctx_destroy(ctx);
  }
}

typedef struct {
  int64_t n, draws;
  double deviation;
  float temperature, top_p;
  int32_t top_k;
} sample_case;

static const sample_case cases[] = {
    {1, 100, 1, 1, 1, 0},        {2, 4000, 1, 0.7f, 1, 0},       {10, 8000, 1, 1, 1, 0},
    {10, 8000, 2, 1.5f, 1, 4},   {31, 8000, 1, 1, 0.8f, 0},      {33, 8000, 1, 0.5f, 0.6f, 20},
    {97, 8000, 1, 1, 0.9f, 0},   {203, 8000, 3, 1, 0.95f, 50},   {1025, 3000, 6, 1, 0.9f, 0},
    {5000, 800, 4, 0.6f, 1, 12}, {32000, 200, 8, 0.7f, 0.7f, 0}, {1023, 3000, 4, 100, 0.02f, 0},
    {64, 8000, 1, 1e-3f, 1, 0},  {50, 8000, 0.01, 1, 0.5f, 0}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  (void)name;
  const sample_case *c = test_case;
  float *x = normal_logits(c->n, c->deviation, 5);
  double *p = ks_doubles(NULL, c->n);
  int64_t *counts = calloc((size_t)c->n, sizeof *counts), freedom, bad = 0;
  int32_t *tokens = calloc((size_t)c->draws, sizeof *tokens);
  cr_assert(counts && tokens);
  oracle_sample(x, c->n, (double)c->temperature, c->top_k, (double)c->top_p, p);
  for (int64_t i = 0; i < c->draws; i++) {
    tokens[i] = draw(ctx, x, c->n, (ks_sampler){c->temperature, c->top_k, c->top_p, 99, (uint64_t)i});
    counts[tokens[i]]++;
  }
  /* Tokens expected less than five times go together. */
  double rest = 0;
  int64_t rest_count = 0, first = -1;
  for (int64_t i = 0; i < c->n; i++) {
    if (p[i] == 0 || p[i] * (double)c->draws >= 5) continue;
    rest += p[i], rest_count += counts[i];
    p[i] = 0, counts[i] = 0;
    if (first < 0) first = i;
  }
  if (first >= 0) p[first] = rest, counts[first] = rest_count;
  double chi = oracle_chi_square(counts, p, c->n, c->draws, &freedom);
  if (!(freedom == 0 ? chi < 1e-9 : chi <= oracle_chi_square_limit(freedom))) {
    cr_log_error("%s: chi-square %g with %lld degrees of freedom", name, chi, (long long)freedom);
    bad++;
  }
  ks_results_add_bytes(out, tokens, c->draws * (int64_t)sizeof *tokens);
  free(x), free(p), free(counts), free(tokens);
  return bad;
}

Test(sample, draws_follow_the_exact_probabilities) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("sample", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Flat, steep and tied rows of a real vocabulary: every draw lies in the oracle's set, and small sets are
 * used up. */
Test(sample, truncated_sets) {
  enum { N = 32000, DRAWS = 25 };
  static const double deviations[] = {0, 1e-3, 0.5, 3, 12};
  static const ks_sampler samplers[] = {{1, 40, 1, 1, 0},        {1, 7, 0.9f, 1, 0},  {1, 0, 0.3f, 1, 0},
                                        {0.7f, 0, 0.9f, 1, 0},   {2, 31999, 1, 1, 0}, {1, 2000, 0.5f, 1, 0},
                                        {50, 3, 0.999999f, 1, 0}};
  double *p = ks_doubles(NULL, N);
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    for (int d = 0; d < 5; d++) {
      float *x = normal_logits(N, deviations[d], 11);
      for (int i = 0; i < 7; i++) {
        ks_sampler sampler = samplers[i];
        oracle_sample(x, N, (double)sampler.temperature, sampler.top_k, (double)sampler.top_p, p);
        int64_t size = 0, seen = 0;
        double least = 1;
        unsigned char *hit = calloc(N, 1);
        cr_assert(hit != NULL);
        for (int64_t j = 0; j < N; j++) {
          size += p[j] > 0;
          if (p[j] > 0 && p[j] < least) least = p[j];
        }
        for (int64_t t = 0; t < DRAWS; t++) {
          sampler.counter = (uint64_t)t;
          int32_t token = draw(ctx, x, N, sampler);
          cr_assert(p[token] > 0, "deviation %g sampler %d token %d on %s", deviations[d], i, token,
                    ks_test_isas[s]);
          seen += !hit[token];
          hit[token] = 1;
        }
        cr_assert(seen <= size);
        if (least * DRAWS > 8) cr_assert(seen == size, "%lld of %lld", (long long)seen, (long long)size);
        free(hit);
      }
      free(x);
    }
    ks_ctx_destroy(ctx);
  }
  free(p);
}

Test(sample, ties_go_to_lower_ids) {
  float x[40];
  for (int i = 0; i < 40; i++)
    x[i] = i % 2 ? 1.25f : -3;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    unsigned seen_k = 0, seen_p = 0;
    for (uint64_t i = 0; i < 400; i++) {
      int32_t k = draw(ctx, x, 40, (ks_sampler){1, 3, 1, 4, i});         /* of twenty equals: 1, 3, 5 */
      int32_t p = draw(ctx, x, 40, (ks_sampler){1e-2f, 0, 0.29f, 4, i}); /* 0.29 of twenty: six */
      cr_assert(k < 6 && k % 2 == 1 && p < 12 && p % 2 == 1, "%d %d", k, p);
      seen_k |= 1u << k, seen_p |= 1u << p;
    }
    cr_assert(seen_k == 0x2a && seen_p == 0xaaa);
    ks_ctx_destroy(ctx);
  }
}

Test(sample, a_row_does_not_depend_on_its_batch) {
  enum { ROWS = 9, N = 1025 };
  float *x = normal_logits(ROWS * N, 2, 6);
  ks_sampler samplers[ROWS];
  int32_t tokens[ROWS];
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 3}) == KS_OK);
  for (int i = 0; i < ROWS; i++)
    samplers[i] = (ks_sampler){0.3f * (float)i, 5 * (i % 3), i % 2 ? 0.9f : 1, (uint64_t)(i % 4),
                               (uint64_t)i * 1000003};
  cr_assert(ks_sample(ctx, &(ks_sample_args){x, ROWS, N, samplers, tokens}) == KS_OK);
  for (int i = 0; i < ROWS; i++)
    cr_assert(tokens[i] == draw(ctx, x + i * N, N, samplers[i]));
  free(x);
  ks_ctx_destroy(ctx);
}

Test(sample, rows_without_a_finite_maximum) {
  enum { N = 37 };
  const float wrong[] = {NAN, INFINITY};
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    for (int temperature = 0; temperature < 2; temperature++) {
      ks_sampler samplers[2] = {{(float)temperature, 0, 1, 1, 1}, {(float)temperature, 0, 1, 1, 1}};
      int32_t tokens[2];
      for (int w = 0; w < 2; w++)
        for (int at = 0; at < N; at++) {
          float x[2][N] = {{0}};
          x[1][at] = wrong[w];
          cr_assert(ks_sample(ctx, &(ks_sample_args){x[0], 2, N, samplers, tokens}) == KS_ENUMERIC);
          cr_assert(strstr(ks_error_message(), "row 1") != NULL);
        }
      float x[N];
      for (int i = 0; i < N; i++)
        x[i] = -INFINITY;
      cr_assert(ks_sample(ctx, &(ks_sample_args){x, 1, N, samplers, tokens}) == KS_ENUMERIC);
      x[35] = -1e30f; /* all others are masked */
      cr_assert(draw(ctx, x, N, samplers[0]) == 35);
    }
    ks_ctx_destroy(ctx);
  }
}

Test(sample, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[4] = {1, 2, 3, 4};
  int32_t token;
  const ks_sampler wrong[] = {{-1, 0, 1, 0, 0}, {NAN, 0, 1, 0, 0},  {INFINITY, 0, 1, 0, 0}, {1, -1, 1, 0, 0},
                              {1, 0, 0, 0, 0},  {1, 0, 1.5f, 0, 0}, {1, 0, NAN, 0, 0}};
  for (int i = 0; i < 7; i++)
    cr_assert(ks_sample(ctx, &(ks_sample_args){x, 1, 4, &wrong[i], &token}) == KS_EINVAL, "%d", i);
  const ks_sampler good = {1, 0, 1, 0, 0};
  cr_assert(ks_sample(ctx, &(ks_sample_args){x, 1, 0, &good, &token}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){NULL, 1, 4, &good, &token}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){x, 1, 4, &good, NULL}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){x, 0, 4, NULL, NULL}) == KS_OK);
  ks_ctx_destroy(ctx);
}
