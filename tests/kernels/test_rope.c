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
                                  {3, 1, 6, 1, 1, 1e-30, false},    {2, 70, 64, 3, 9, 1e4, false},
                                  {64, 1, 64, 3, 9, 1e4, false}};

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

/* In one call what rope and rows_scatter give one after another. */
typedef struct {
  int64_t n_rows, heads[2], head_dim, v_cols; /* heads of q and of k; 0: not turned */
  bool keys, values, inverse;                 /* stored */
} store_case;

static int64_t run_store(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { Q, K, V, K_CACHE, V_CACHE, N_ARRAYS, MORE = 3, MOST = 40 };
  const store_case *c = test_case;
  const int64_t d = c->head_dim, k_cols = (c->heads[1] ? c->heads[1] : 2) * d, n_cache = c->n_rows + MORE;
  const int64_t sizes[N_ARRAYS] = {c->n_rows * c->heads[0] * d, c->n_rows * k_cols, c->n_rows * c->v_cols,
                                   n_cache * k_cols, n_cache * c->v_cols};
  int32_t positions[MOST];
  int64_t index[MOST], bad = 0;
  double *inv_freq = ks_doubles(NULL, d / 2);
  for (int64_t j = 0; j < d / 2; j++)
    inv_freq[j] = pow(1e4, -2.0 * (double)j / (double)d);
  for (int64_t i = 0; i < c->n_rows; i++)
    positions[i] = (int32_t)(i * 37 % 101), index[i] = (i * 11 + 2) % n_cache;
  ks_guard g[2][N_ARRAYS]; /* one after another, in one call */
  for (int i = 0; i < N_ARRAYS; i++) {
    float *x = ks_floats(sizes[i], KS_FILL_SIGNED, (uint64_t)i + 3);
    ks_act_round(ctx, x, sizes[i]);
    for (int way = 0; way < 2; way++)
      g[way][i] = ks_guard_make_act(ctx, x, sizes[i]);
    free(x);
  }
  for (int way = 0; way < 2; way++) {
    ks_rope_args rope[2];
    ks_rows_args store[2];
    ks_rope_store_args a = {.rope = rope, .store = store};
    for (int i = Q; i <= K; i++)
      if (c->heads[i])
        rope[a.n_rope++] =
            (ks_rope_args){g[way][i].p, positions, inv_freq, c->n_rows, c->heads[i], d, c->inverse};
    if (c->keys)
      store[a.n_store++] = (ks_rows_args){g[way][K].p, g[way][K_CACHE].p, index, c->n_rows, n_cache, k_cols};
    if (c->values)
      store[a.n_store++] =
          (ks_rows_args){g[way][V].p, g[way][V_CACHE].p, index, c->n_rows, n_cache, c->v_cols};
    if (way == 1) {
      bad += ks_rope_store(ctx, &a) != KS_OK;
      continue;
    }
    for (int64_t i = 0; i < a.n_rope; i++)
      bad += ks_rope(ctx, &rope[i]) != KS_OK;
    for (int64_t i = 0; i < a.n_store; i++)
      bad += ks_rows_scatter(ctx, &store[i]) != KS_OK;
  }
  for (int i = 0; i < N_ARRAYS; i++) {
    float *one = ks_guard_read(&g[0][i]), *both = ks_guard_read(&g[1][i]);
    bad += ks_check_same(name, both, one, sizes[i]);
    ks_results_add_guard(out, &g[1][i]);
    for (int way = 0; way < 2; way++) {
      bad += ks_guard_check_walls(name, &g[way][i]);
      ks_guard_free(&g[way][i]);
    }
    free(one), free(both);
  }
  free(inv_freq);
  return bad;
}

Test(rope, with_store_as_one_after_another) {
  static const store_case store_cases[] = {
      {1, {8, 2}, 64, 128, true, true, false},  {5, {3, 1}, 100, 100, true, true, false},
      {33, {4, 2}, 16, 48, true, true, false},  {7, {2, 2}, 34, 68, false, false, true},
      {3, {2, 0}, 32, 64, true, true, false},   {4, {2, 1}, 32, 33, true, true, false},
      {2, {0, 0}, 8, 24, true, true, false},    {6, {2, 1}, 1040, 1040, true, false, false},
      {3, {2, 1}, 128, 128, false, true, false}};
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof store_cases / sizeof store_cases[0]); i++)
    bad += ks_test_everywhere("rope_store", i, &store_cases[i], run_store);
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
