#include "tests/oracle/guard.h"
#include <criterion/criterion.h>

typedef struct {
  int64_t n_rows, n_x_rows, n_cols;
  int shift; /* elements by which y is off its alignment */
} rows_case;

static const rows_case cases[] = {{0, 3, 8, 0},    {1, 1, 1, 0},    {5, 9, 3, 0},    {7, 7, 31, 0},
                                  {33, 40, 32, 0}, {33, 40, 32, 2}, {4, 11, 96, 1},  {9, 12, 100, 0},
                                  {6, 50, 203, 0}, {3, 4, 1025, 0}, {2, 3, 2048, 0}, {2, 300, 3200, 4},
                                  {300, 301, 2, 0}};

/* Gather to y at `shift`, and scatter from there into rows that keep what the index leaves out. */
static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const rows_case *c = test_case;
  const int64_t n = c->n_rows * c->n_cols, n_x = c->n_x_rows * c->n_cols;
  float *x = ks_floats(n_x, KS_FILL_SIGNED, 1), *kept = ks_floats(n_x, KS_FILL_INTEGER, 2);
  int64_t *index = calloc((size_t)c->n_rows + 1, sizeof *index), bad = 0;
  ks_act_round(ctx, x, n_x);
  for (int64_t i = 0; i < c->n_rows; i++) /* without repeats: rows from the last on, every other first */
    index[i] = c->n_x_rows - 1 - (2 * i < c->n_rows ? 2 * i : 2 * (i - (c->n_rows + 1) / 2) + 1);
  ks_guard gx = ks_guard_make_act(ctx, x, n_x), gy = ks_guard_make_act(ctx, NULL, n + c->shift),
           back = ks_guard_make_act(ctx, kept, n_x);
  ks_rows_args a = {gx.p, ks_guard_at(&gy, c->shift), index, c->n_rows, c->n_x_rows, c->n_cols};
  bad += ks_rows_gather(ctx, &a) != KS_OK;
  a.x = a.y, a.y = back.p;
  bad += ks_rows_scatter(ctx, &a) != KS_OK;
  float *y = ks_guard_read(&gy), *z = ks_guard_read(&back);
  for (int64_t i = 0; i < c->n_rows; i++) {
    bad += ks_check_same(name, y + c->shift + i * c->n_cols, x + index[i] * c->n_cols, c->n_cols);
    memcpy(kept + index[i] * c->n_cols, x + index[i] * c->n_cols, (size_t)c->n_cols * sizeof *kept);
  }
  bad += ks_check_same(name, z, kept, n_x);
  bad +=
      ks_guard_check_input(name, &gx) + ks_guard_check_walls(name, &gy) + ks_guard_check_walls(name, &back);
  ks_results_add_guard(out, &gy);
  ks_guard_free(&gx), ks_guard_free(&gy), ks_guard_free(&back);
  free(x), free(kept), free(index), free(y), free(z);
  return bad;
}

Test(rows, gather_and_scatter_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("rows", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(rows, gather_repeats_rows) {
  enum { COLS = 12 };
  static const int64_t index[] = {2, 0, 2, 2, 1};
  ks_ctx *ctx = ks_test_any_ctx();
  float *x = ks_floats(3 * COLS, KS_FILL_INTEGER, 1);
  ks_guard gx = ks_guard_make_act(ctx, x, 3 * COLS), gy = ks_guard_make_act(ctx, NULL, 5 * COLS);
  cr_assert(ks_rows_gather(ctx, &(ks_rows_args){gx.p, gy.p, index, 5, 3, COLS}) == KS_OK);
  float *y = ks_guard_read(&gy);
  for (int i = 0; i < 5; i++)
    cr_assert(memcmp(y + i * COLS, x + index[i] * COLS, COLS * sizeof *y) == 0);
  free(x), free(y);
  ks_guard_free(&gx), ks_guard_free(&gy);
  ks_ctx_destroy(ctx);
}

Test(rows, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x = ks_guard_make_act(ctx, NULL, 12), y = ks_guard_make_act(ctx, NULL, 8);
  const int64_t index[] = {2, 0}, beyond[] = {0, 3}, negative[] = {-1, 0};
  const ks_rows_args good = {x.p, y.p, index, 2, 3, 4};
  cr_assert(ks_rows_gather(ctx, &good) == KS_OK);
  const int64_t *wrong[] = {beyond, negative, NULL};
  for (int i = 0; i < 3; i++) {
    ks_rows_args a = good;
    a.index = wrong[i];
    cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
    a.x = y.p, a.y = x.p;
    cr_assert(ks_rows_scatter(ctx, &a) == KS_EINVAL);
  }
  ks_rows_args a = good;
  a.y = ks_guard_at(&x, 4);
  cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
  a = good, a.n_cols = -1;
  cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
  a = good, a.x = NULL;
  cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
  ks_guard_free(&x), ks_guard_free(&y);
  ks_ctx_destroy(ctx);
}
