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

/* One token for each sampler, all from the same logits. */
static void draw_many(ks_ctx *ctx, const float *logits, int64_t n, const ks_sampler *samplers, int64_t n_rows,
                      int32_t *tokens) {
  enum { AT_ONCE = 64 };
  for (int64_t row = 0; row < n_rows; row += AT_ONCE) {
    const int64_t rows = n_rows - row < AT_ONCE ? n_rows - row : AT_ONCE;
    float *x = ks_floats(rows * n, KS_FILL_INTEGER, 0);
    for (int64_t i = 0; i < rows; i++)
      memcpy(x + i * n, logits, (size_t)n * sizeof *x);
    ks_guard g = ks_guard_make(ctx, x, rows * n);
    int32_t there[AT_ONCE];
    void *drawn = NULL; /* every second time the tokens are wanted on the device too */
    if (row / AT_ONCE % 2 == 0) cr_assert(ks_mem_alloc(ctx, sizeof there, &drawn) == KS_OK);
    const ks_sample_args a = {g.p, rows, n, samplers + row, tokens + row, drawn};
    for (int64_t i = 0; i < rows; i++)
      tokens[row + i] = -7;
    cr_assert(ks_sample(ctx, &a) == KS_OK && ks_sync(ctx) == KS_OK, "%s", ks_error_message());
    cr_assert(ks_guard_check_input("logits", &g) == 0);
    if (drawn) {
      cr_assert(ks_mem_download(ctx, there, drawn, (size_t)rows * sizeof *there) == KS_OK);
      cr_assert(memcmp(there, tokens + row, (size_t)rows * sizeof *there) == 0);
    }
    ks_mem_free(ctx, drawn);
    for (int64_t i = 0; i < rows; i++)
      cr_assert(tokens[row + i] >= -1 && tokens[row + i] < n);
    ks_guard_free(&g);
    free(x);
  }
}

static int32_t draw(ks_ctx *ctx, const float *logits, int64_t n, ks_sampler s) {
  int32_t token;
  draw_many(ctx, logits, n, &s, 1, &token);
  cr_assert(token >= 0);
  return token;
}

Test(sample, greedy_takes_the_first_of_the_largest) {
  static const int64_t sizes[] = {1, 2, 15, 16, 17, 31, 33, 97, 255, 256, 257, 1025, 32000};
  static const ks_sampler how[] = {{0, 0, 1, 1, 1}, {0.8f, 1, 1, 1, 1}, {0.8f, 0, 1e-6f, 1, 1}};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    for (int i = 0; i < 13; i++) {
      const int64_t n = sizes[i], at[] = {0, n / 2, n - 1};
      for (int j = 0; j < 3; j++) {
        float *x = normal_logits(n, 1, 3);
        int32_t tokens[3];
        x[at[j]] = x[n - 1] = 50;
        draw_many(ctx, x, n, how, 3, tokens);
        cr_assert(tokens[0] == at[j] && tokens[1] == at[j] && tokens[2] == at[j]);
        free(x);
      }
    }
    const float zeros[] = {-0.0f, 0.0f, -1};
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
  const sample_case *c = test_case;
  const int64_t draws = ks_test_is_shim() ? 16 : c->draws;
  if (ks_test_is_shim() && c->n > 10000) return 0;
  float *x = normal_logits(c->n, c->deviation, 5);
  double *p = ks_doubles(NULL, c->n);
  int64_t *counts = calloc((size_t)c->n, sizeof *counts), freedom, bad = 0;
  int32_t *tokens = calloc((size_t)draws, sizeof *tokens);
  ks_sampler *samplers = calloc((size_t)draws, sizeof *samplers);
  cr_assert(counts && tokens && samplers);
  oracle_sample(x, c->n, (double)c->temperature, c->top_k, (double)c->top_p, p);
  for (int64_t i = 0; i < draws; i++)
    samplers[i] = (ks_sampler){c->temperature, c->top_k, c->top_p, 99, (uint64_t)i};
  draw_many(ctx, x, c->n, samplers, draws, tokens);
  for (int64_t i = 0; i < draws; i++)
    counts[tokens[i]]++;
  /* Tokens expected less than five times go together. */
  double rest = 0;
  int64_t rest_count = 0, first = -1;
  for (int64_t i = 0; i < c->n; i++) {
    if (p[i] == 0 || p[i] * (double)draws >= 5) continue;
    rest += p[i], rest_count += counts[i];
    p[i] = 0, counts[i] = 0;
    if (first < 0) first = i;
  }
  if (first >= 0) p[first] = rest, counts[first] = rest_count;
  double chi = oracle_chi_square(counts, p, c->n, draws, &freedom);
  if (!(freedom == 0 ? chi < 1e-9 : chi <= oracle_chi_square_limit(freedom))) {
    cr_log_error("%s: chi-square %g with %lld degrees of freedom", name, chi, (long long)freedom);
    bad++;
  }
  ks_results_add_bytes(out, tokens, draws * (int64_t)sizeof *tokens);
  free(x), free(p), free(counts), free(tokens), free(samplers);
  return bad;
}

Test(sample, draws_follow_the_exact_probabilities) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("sample", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Rows of every shape; the last kinds are hard for a selection: few values, and all in one stretch but one.
 */
enum { SHAPES = 9 };
static float *shaped_logits(int64_t n, int shape) {
  static const double deviations[] = {0, 1e-6, 1e-3, 0.5, 3, 12};
  float *x = normal_logits(n, shape < 6 ? deviations[shape] : 1, 11);
  for (int64_t i = 0; i < n; i++) {
    if (shape == 6) x[i] = (float)(i * 7 % 5);
    if (shape == 7) x[i] = i == n / 3 ? 20 : 1e-3f * x[i] + (i % 2 ? 0.0f : 1e-7f);
    if (shape == 8) x[i] = i % 3 ? -INFINITY : x[i] * 4;
  }
  return x;
}

/* Every draw lies in the oracle's set, and small sets are used up. */
Test(sample, truncated_sets) {
  static const ks_sampler samplers[] = {{1, 40, 1, 1, 0},        {1, 7, 0.9f, 1, 0},  {1, 0, 0.3f, 1, 0},
                                        {0.7f, 0, 0.9f, 1, 0},   {2, 31999, 1, 1, 0}, {1, 2000, 0.5f, 1, 0},
                                        {50, 3, 0.999999f, 1, 0}};
  enum { N = 32000, MAX_DRAWS = 25 };
  const int64_t n = ks_test_is_shim() ? 5000 : N, draws = ks_test_is_shim() ? 4 : MAX_DRAWS;
  double *p = ks_doubles(NULL, N);
  unsigned char *hit = calloc(N, 1);
  cr_assert(hit != NULL);
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    for (int shape = 0; shape < SHAPES; shape++) {
      float *x = shaped_logits(n, shape);
      for (int i = 0; i < 7; i++) {
        ks_sampler how[MAX_DRAWS];
        int32_t tokens[MAX_DRAWS];
        int64_t size = 0, seen = 0;
        double least = 1;
        oracle_sample(x, n, (double)samplers[i].temperature, samplers[i].top_k, (double)samplers[i].top_p, p);
        memset(hit, 0, N);
        for (int64_t j = 0; j < n; j++) {
          size += p[j] > 0;
          if (p[j] > 0 && p[j] < least) least = p[j];
        }
        for (int64_t t = 0; t < draws; t++) {
          how[t] = samplers[i];
          how[t].counter = (uint64_t)t;
        }
        draw_many(ctx, x, n, how, draws, tokens);
        for (int64_t t = 0; t < draws; t++) {
          cr_assert(p[tokens[t]] > 0, "shape %d sampler %d token %d on %s", shape, i, tokens[t], *place);
          seen += !hit[tokens[t]];
          hit[tokens[t]] = 1;
        }
        cr_assert(seen <= size);
        if (least * (double)draws > 8)
          cr_assert(seen == size, "%lld of %lld", (long long)seen, (long long)size);
      }
      free(x);
    }
    ks_ctx_destroy(ctx);
  }
  free(p), free(hit);
}

/* Another backend than the CPU's draws the CPU's token. */
Test(sample, tokens_are_those_of_the_cpu) {
  static const float temperatures[] = {0.01f, 0.7f, 1, 3, 100}, shares[] = {1, 0.999f, 0.9f, 0.4f, 1e-5f};
  static const int64_t sizes[] = {1, 7, 1000, 1025, 4096, 12003};
  enum { ROWS = 15 };
  if (!ks_test_is_cuda()) cr_skip_test("this is the CPU");
  ks_ctx *cuda = ks_test_any_ctx(), *cpu = NULL;
  cr_assert(ks_ctx_create(&cpu, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  for (int i = 0; i < 6; i++)
    for (int shape = 0; shape < SHAPES; shape++) {
      const int64_t n = sizes[i];
      float *x = shaped_logits(n, shape);
      const int32_t counts[] = {0, 1, 40, (int32_t)(n / 2 + 1)};
      ks_sampler how[ROWS];
      int32_t here[ROWS], there[ROWS];
      for (int r = 0; r < ROWS; r++)
        how[r] =
            (ks_sampler){temperatures[r % 5], counts[r % 4], shares[(r + r / 5 + i) % 5], 3, (uint64_t)r};
      draw_many(cuda, x, n, how, ROWS, here);
      draw_many(cpu, x, n, how, ROWS, there);
      for (int r = 0; r < ROWS; r++)
        cr_assert(here[r] == there[r], "size %d shape %d row %d: %d, the CPU %d", (int)n, shape, r, here[r],
                  there[r]);
      free(x);
    }
  ks_ctx_destroy(cpu);
  ks_ctx_destroy(cuda);
}

Test(sample, ties_go_to_lower_ids) {
  enum { N = 40, MAX_DRAWS = 400 };
  const int64_t draws = ks_test_is_shim() ? 100 : MAX_DRAWS;
  float x[N];
  for (int i = 0; i < N; i++)
    x[i] = i % 2 ? 1.25f : -3;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    unsigned seen[2] = {0, 0};
    for (int way = 0; way < 2; way++) { /* of twenty equals three: 1, 3, 5; and 0.29 of them: six */
      ks_sampler how[MAX_DRAWS];
      int32_t tokens[MAX_DRAWS];
      for (int64_t i = 0; i < draws; i++)
        how[i] = way ? (ks_sampler){1e-2f, 0, 0.29f, 4, (uint64_t)i} : (ks_sampler){1, 3, 1, 4, (uint64_t)i};
      draw_many(ctx, x, N, how, draws, tokens);
      for (int64_t i = 0; i < draws; i++) {
        cr_assert(tokens[i] < (way ? 12 : 6) && tokens[i] % 2 == 1, "%d", tokens[i]);
        seen[way] |= 1u << tokens[i];
      }
    }
    cr_assert(seen[0] == 0x2a && seen[1] == 0xaaa);
    ks_ctx_destroy(ctx);
  }
}

static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { ROWS = 9 };
  const int64_t n = *(const int64_t *)test_case;
  float *x = normal_logits(ROWS * n, 2, 6);
  ks_sampler samplers[ROWS];
  int32_t tokens[ROWS];
  int64_t bad = 0;
  ks_guard g = ks_guard_make(ctx, x, ROWS * n);
  for (int i = 0; i < ROWS; i++)
    samplers[i] = (ks_sampler){0.3f * (float)i, 5 * (i % 3), i % 2 ? 0.9f : 1, (uint64_t)(i % 4),
                               (uint64_t)i * 1000003};
  bad += ks_sample(ctx, &(ks_sample_args){g.p, ROWS, n, samplers, tokens, NULL}) != KS_OK;
  bad += ks_sync(ctx) != KS_OK;
  for (int i = 0; i < ROWS; i++)
    if (tokens[i] != draw(ctx, x + i * n, n, samplers[i])) {
      cr_log_error("%s: row %d", name, i);
      bad++;
    }
  ks_results_add_bytes(out, tokens, sizeof tokens);
  ks_guard_free(&g);
  free(x);
  return bad;
}

Test(sample, a_row_does_not_depend_on_its_batch) {
  static const int64_t sizes[] = {1025, 2048};
  int64_t bad = 0;
  for (int i = 0; i < 2; i++)
    bad += ks_test_everywhere("sample alone", sizes[i], &sizes[i], run_alone);
  cr_assert(bad == 0);
}

Test(sample, rows_without_a_finite_maximum) {
  enum { N = 37, STEP = 6 };
  const float wrong[] = {NAN, -NAN, INFINITY};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    for (int temperature = 0; temperature < 2; temperature++) {
      const ks_sampler how = {(float)temperature, 0, 1, 1, 1}, samplers[2] = {how, how};
      int32_t tokens[2];
      for (int w = 0; w < 3; w++)
        for (int at = 0; at < N; at += STEP) {
          float x[2 * N] = {0};
          x[N + at] = wrong[w];
          ks_guard g = ks_guard_make(ctx, x, 2 * N);
          cr_assert(ks_sample(ctx, &(ks_sample_args){g.p, 2, N, samplers, tokens, NULL}) == KS_OK &&
                    ks_sync(ctx) == KS_OK);
          cr_assert(tokens[0] >= 0 && tokens[1] == -1, "%d %d", tokens[0], tokens[1]);
          ks_guard_free(&g);
        }
      float x[N];
      for (int i = 0; i < N; i++)
        x[i] = -INFINITY;
      draw_many(ctx, x, N, &how, 1, tokens);
      cr_assert(tokens[0] == -1);
      x[35] = -1e30f; /* all others are masked */
      cr_assert(draw(ctx, x, N, how) == 35);
    }
    ks_ctx_destroy(ctx);
  }
}

Test(sample, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x = ks_guard_make(ctx, (float[4]){1, 2, 3, 4}, 4);
  int32_t token;
  const ks_sampler wrong[] = {{-1, 0, 1, 0, 0}, {NAN, 0, 1, 0, 0},  {INFINITY, 0, 1, 0, 0}, {1, -1, 1, 0, 0},
                              {1, 0, 0, 0, 0},  {1, 0, 1.5f, 0, 0}, {1, 0, NAN, 0, 0}};
  for (int i = 0; i < 7; i++)
    cr_assert(ks_sample(ctx, &(ks_sample_args){x.p, 1, 4, &wrong[i], &token, NULL}) == KS_EINVAL, "%d", i);
  const ks_sampler good = {1, 0, 1, 0, 0};
  cr_assert(ks_sample(ctx, &(ks_sample_args){x.p, 1, 0, &good, &token, NULL}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){NULL, 1, 4, &good, &token, NULL}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){x.p, 1, 4, &good, NULL, NULL}) == KS_EINVAL);
  cr_assert(ks_sample(ctx, &(ks_sample_args){x.p, 0, 4, NULL, NULL, NULL}) == KS_OK);
  ks_guard_free(&x);
  ks_ctx_destroy(ctx);
}
