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
                                  {3, 1, 6, 1, 1, 1e-14, false},    {9, 2, 128, 1000000, 77, 1e6, true}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const rope_case *c = test_case;
  const int64_t n = c->n_rows * c->n_heads * c->head_dim, half = c->head_dim / 2;
  float *x = ks_floats(n, KS_FILL_SIGNED, 1);
  double *ref = ks_doubles(x, n), *size = ks_doubles(NULL, n), *inv_freq = ks_doubles(NULL, half);
  int32_t positions[64];
  for (int64_t j = 0; j < half; j++)
    inv_freq[j] = pow(c->base, -2.0 * (double)j / (double)c->head_dim);
  for (int64_t i = 0; i < c->n_rows; i++)
    positions[i] = c->first + c->stride * (int32_t)i;
  oracle_rope(ref, size, positions, inv_freq, c->n_rows, c->n_heads, c->head_dim, c->inverse);
  ks_guard g = ks_guard_make(ctx, x, n);
  ks_rope_args a = {g.p, positions, inv_freq, c->n_rows, c->n_heads, c->head_dim, c->inverse};
  int64_t bad = ks_rope(ctx, &a) != KS_OK;
  bad += ks_guard_check_output(name, &g, ref, size, 2);
  ks_results_add_guard(out, &g);
  ks_guard_free(&g);
  free(x), free(ref), free(size), free(inv_freq);
  return bad;
}

Test(rope, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("rope", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* A rotation keeps lengths, position 0 changes nothing, and a row depends on its own position only. */
Test(rope, rows_stand_alone) {
  enum { ROWS = 5, HEADS = 2, D = 36 };
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}) == KS_OK);
  float *x = ks_floats(ROWS * HEADS * D, KS_FILL_SIGNED, 2),
        *y = ks_floats(ROWS * HEADS * D, KS_FILL_SIGNED, 2);
  double inv_freq[D / 2];
  int32_t positions[ROWS] = {7, 0, 3, 7, 1000};
  for (int j = 0; j < D / 2; j++)
    inv_freq[j] = 1.0 / (1 + j);
  cr_assert(ks_rope(ctx, &(ks_rope_args){y, positions, inv_freq, ROWS, HEADS, D, false}) == KS_OK);
  for (int i = 0; i < ROWS; i++) {
    float one[HEADS * D];
    memcpy(one, x + i * HEADS * D, sizeof one);
    cr_assert(ks_rope(ctx, &(ks_rope_args){one, &positions[i], inv_freq, 1, HEADS, D, false}) == KS_OK);
    cr_assert(ks_check_same("row alone", one, y + i * HEADS * D, HEADS * D) == 0);
  }
  cr_assert(ks_check_same("position 0", x + HEADS * D, y + HEADS * D, HEADS * D) == 0);
  free(x), free(y);
  ks_ctx_destroy(ctx);
}

Test(rope, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[8] = {1};
  int32_t position = 3, negative = -1;
  double inv_freq[2] = {1, 0.5};
  const ks_rope_args good = {x, &position, inv_freq, 1, 2, 4, false};
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
  ks_ctx_destroy(ctx);
}
