#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t n_rows, n_heads, head_dim;
  int32_t first, stride; /* positions */
  double base;
  bool inverse;
} rope_case;

static const rope_case cases[] = {{0, 2, 8, 0, 1, 1e4, false},      {1, 1, 2, 0, 1, 1e4, false},
                                  {3, 6, 48, 0, 1, 1e4, false},     {5, 2, 100, 97, 1, 1e4, true},
                                  {33, 3, 64, 1023, 1, 5e5, false}, {2, 1, 256, 131071, 3, 5e5, true},
                                  {7, 32, 100, 11, 5, 1e4, false},  {4, 2, 34, 2147483000, 100, 1e4, false},
                                  {3, 1, 6, 1, 1, 1e-14, false},    {9, 2, 128, 1000000, 77, 1e6, true},
                                  {2, 3, 1040, 5, 9, 1e4, false},   {50, 4, 16, 0, 1, 1e4, true},
                                  {3, 1, 6, 1, 1, 1e-30, false}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const rope_case *c = test_case;
  const int64_t n = c->n_rows * c->n_heads * c->head_dim, half = c->head_dim / 2;
  float *x = ks_floats(n, KS_FILL_SIGNED, 1);
  ks_act_round(ctx, x, n);
  double *ref = ks_doubles(x, n), *size = ks_doubles(NULL, n), *inv_freq = ks_doubles(NULL, half);
  int32_t positions[64];
  for (int64_t j = 0; j < half; j++)
    inv_freq[j] = pow(c->base, -2.0 * (double)j / (double)c->head_dim);
  for (int64_t i = 0; i < c->n_rows; i++)
    positions[i] = c->first + c->stride * (int32_t)i;
  oracle_rope(ref, size, positions, inv_freq, c->n_rows, c->n_heads, c->head_dim, c->inverse);
  ks_guard g = ks_guard_make_act(ctx, x, n);
  ks_rope_args a = {g.p, positions, inv_freq, c->n_rows, c->n_heads, c->head_dim, c->inverse};
  int64_t bad = ks_rope(ctx, &a) != KS_OK;
  bad += ks_guard_check_output(name, &g, ref, size, 2);
  ks_results_add_guard(out, &g);
  ks_guard_free(&g);
  free(x), free(ref), free(size), free(inv_freq);
  return bad;
}

Test(rope, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("rope", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Angles around every multiple of an eighth turn, small and large: each quadrant, both sides of its edges. */
Test(rope, every_quadrant) {
  enum { HEADS = 1, D = 258, ROWS = 3 };
  static const int32_t positions[ROWS] = {1, 1000003, 2147483647};
  double inv_freq[D / 2];
  for (int j = 0; j < D / 2;
       j++) /* of position 1: -16 to 16 eighths of a turn, four steps of 1e-7 around each */
    inv_freq[j] = (j / 4 - 16) * 0.785398163397448309616 + (j % 4 - 1.5) * 1e-7;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    float *x = ks_floats(ROWS * D, KS_FILL_SIGNED, 4);
    ks_act_round(ctx, x, ROWS * D);
    double *ref = ks_doubles(x, ROWS * D), *size = ks_doubles(NULL, ROWS * D);
    oracle_rope(ref, size, positions, inv_freq, ROWS, HEADS, D, false);
    ks_guard g = ks_guard_make_act(ctx, x, ROWS * D);
    cr_assert(ks_rope(ctx, &(ks_rope_args){g.p, positions, inv_freq, ROWS, HEADS, D, false}) == KS_OK);
    cr_assert(ks_guard_check_output(*place, &g, ref, size, 2) == 0);
    ks_guard_free(&g);
    free(x), free(ref), free(size);
    ks_ctx_destroy(ctx);
  }
}

/* A rotation at position 0 changes nothing, and a row depends on its own position only, wherever it lies. */
static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { ROWS = 5, HEADS = 2, SHIFT = 1 };
  const int64_t d = *(const int64_t *)test_case, width = HEADS * d, n = ROWS * width;
  static const int32_t positions[ROWS] = {7, 0, 3, 7, 1000};
  float *x = ks_floats(n, KS_FILL_SIGNED, 2);
  double *inv_freq = ks_doubles(NULL, d / 2);
  int64_t bad = 0;
  ks_act_round(ctx, x, n);
  for (int64_t j = 0; j < d / 2; j++)
    inv_freq[j] = 1.0 / (double)(1 + j);
  ks_guard whole = ks_guard_make_act(ctx, x, n), alone = ks_guard_make_act(ctx, x, n),
           shifted = ks_guard_make_act(ctx, NULL, n + SHIFT);
  bad += ks_mem_copy(ctx, ks_guard_at(&shifted, SHIFT), whole.p, (size_t)n * ks_ctx_act_size(ctx)) != KS_OK;
  bad += ks_rope(ctx, &(ks_rope_args){whole.p, positions, inv_freq, ROWS, HEADS, d, false}) != KS_OK;
  bad += ks_rope(ctx, &(ks_rope_args){ks_guard_at(&shifted, SHIFT), positions, inv_freq, ROWS, HEADS, d,
                                      false}) != KS_OK;
  for (int i = 0; i < ROWS; i++)
    bad += ks_rope(ctx, &(ks_rope_args){ks_guard_at(&alone, i * width), &positions[i], inv_freq, 1, HEADS, d,
                                        false}) != KS_OK;
  float *y = ks_guard_read(&whole), *one = ks_guard_read(&alone), *moved = ks_guard_read(&shifted);
  bad += ks_check_same(name, one, y, n) + ks_check_same(name, moved + SHIFT, y, n);
  bad += ks_check_same(name, x + width, y + width, width);
  ks_results_add_guard(out, &whole);
  ks_guard *guards[] = {&whole, &alone, &shifted};
  for (int i = 0; i < 3; i++) {
    bad += ks_guard_check_walls(name, guards[i]);
    ks_guard_free(guards[i]);
  }
  free(x), free(y), free(one), free(moved), free(inv_freq);
  return bad;
}

Test(rope, rows_stand_alone) {
  static const int64_t sizes[] = {2, 36, 64, 100, 128};
  int64_t bad = 0;
  for (int i = 0; i < 5; i++)
    bad += ks_test_everywhere("rope alone", sizes[i], &sizes[i], run_alone);
  cr_assert(bad == 0);
}

Test(rope, nan_and_infinity_stay_in_their_pair) {
  enum { D = 8 };
  const int32_t position = 1;
  const double inv_freq[D / 2] = {1, 0.5, 0.25, 0.125};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    const float x[D] = {1, NAN, 1, INFINITY, 1, 1, 1, 1};
    ks_guard g = ks_guard_make_act(ctx, x, D);
    cr_assert(ks_rope(ctx, &(ks_rope_args){g.p, &position, inv_freq, 1, 1, D, false}) == KS_OK);
    float *y = ks_guard_read(&g);
    for (int j = 0; j < D; j++)
      cr_assert(j % 4 == 1   ? isnan(y[j])
                : j % 4 == 3 ? y[j] == INFINITY
                             : isfinite(y[j]),
                "%d: %g", j, (double)y[j]);
    free(y);
    ks_guard_free(&g);
    ks_ctx_destroy(ctx);
  }
}

Test(rope, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x = ks_guard_make_act(ctx, NULL, 8);
  int32_t position = 3, negative = -1;
  double inv_freq[2] = {1, 0.5};
  const ks_rope_args good = {x.p, &position, inv_freq, 1, 2, 4, false};
  ks_rope_args a = good;
  cr_assert(ks_rope(ctx, &a) == KS_OK);
  a.head_dim = 3;
  cr_assert(ks_rope(ctx, &a) == KS_EINVAL);
  a = good, a.positions = &negative;
  cr_assert(ks_rope(ctx, &a) == KS_EINVAL);
  a = good, a.x = NULL;
  cr_assert(ks_rope(ctx, &a) == KS_EINVAL);
  a = good, a.n_heads = INT64_MAX;
  cr_assert(ks_rope(ctx, &a) == KS_EINVAL);
  ks_guard_free(&x);
  ks_ctx_destroy(ctx);
}
