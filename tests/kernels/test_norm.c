#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t n_rows, n_cols;
  ks_fill_kind fill;
  bool alias, accumulate;
} norm_case;

static const norm_case cases[] = {
    {0, 8, KS_FILL_SIGNED, false, false},      {1, 1, KS_FILL_SIGNED, false, false},
    {1, 16, KS_FILL_INTEGER, false, true},     {3, 31, KS_FILL_SIGNED, false, true},
    {3, 32, KS_FILL_POSITIVE, true, false},    {5, 33, KS_FILL_NEAR_ONE, true, false},
    {7, 97, KS_FILL_SIGNED, false, false},     {2, 111, KS_FILL_LARGE, false, true},
    {9, 203, KS_FILL_SIGNED, true, false},     {4, 288, KS_FILL_SIGNED, false, true},
    {33, 1023, KS_FILL_POSITIVE, false, true}, {31, 1025, KS_FILL_NEAR_ONE, false, false},
    {2, 3200, KS_FILL_SIGNED, false, false}};
enum { N_CASES = sizeof cases / sizeof cases[0] };
static const float eps = 1e-5f;

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const norm_case *c = test_case;
  const int64_t n = c->n_rows * c->n_cols;
  float *x = ks_floats(n, c->fill, 1), *w = ks_floats(c->n_cols, KS_FILL_POSITIVE, 2);
  float *dy = ks_floats(n, KS_FILL_SIGNED, 3), *before = ks_floats(n, KS_FILL_SIGNED, 4);
  double *dx64 = ks_doubles(NULL, n), *size = ks_doubles(NULL, n), *y64 = ks_doubles(NULL, n);
  double *x64 = ks_doubles(x, n), *w64 = ks_doubles(w, c->n_cols), *dy64 = ks_doubles(dy, n);
  double *before64 = ks_doubles(before, n), *rstd64 = ks_doubles(NULL, c->n_rows);
  oracle_rmsnorm_forward(x64, w64, c->n_rows, c->n_cols, (double)eps, y64, rstd64);
  oracle_rmsnorm_backward(x64, w64, dy64, c->accumulate ? before64 : NULL, c->n_rows, c->n_cols, (double)eps,
                          dx64, size);
  ks_guard gx = ks_guard_make(ctx, x, n), gw = ks_guard_make(ctx, w, c->n_cols),
           gdy = ks_guard_make(ctx, dy, n);
  ks_guard gy = ks_guard_make(ctx, c->alias ? x : NULL, n), gr = ks_guard_make(ctx, NULL, c->n_rows);
  ks_guard gdx = ks_guard_make(ctx, c->accumulate ? before : c->alias ? dy : NULL, n);
  ks_rmsnorm_args f = {.x = c->alias ? gy.p : gx.p,
                       .w = gw.p,
                       .y = gy.p,
                       .rstd = gr.p,
                       .n_rows = c->n_rows,
                       .n_cols = c->n_cols,
                       .eps = eps};
  ks_rmsnorm_args b = {.x = gx.p,
                       .w = gw.p,
                       .rstd = gr.p,
                       .n_rows = c->n_rows,
                       .n_cols = c->n_cols,
                       .eps = eps,
                       .dy = c->alias ? gdx.p : gdy.p,
                       .dx = gdx.p,
                       .accumulate_dx = c->accumulate};
  int64_t bad = ks_rmsnorm_forward(ctx, &f) != KS_OK;
  bad += ks_rmsnorm_backward(ctx, &b) != KS_OK;
  bad += ks_guard_check_input(name, &gx) + ks_guard_check_input(name, &gw) + ks_guard_check_input(name, &gdy);
  const double chain = (double)c->n_cols / 64 + 6; /* 64 lanes and their tree */
  bad += ks_guard_check_output(name, &gy, y64, NULL, chain) +
         ks_guard_check_output(name, &gr, rstd64, NULL, chain);
  bad += ks_guard_check_output(name, &gdx, dx64, size, chain);
  ks_results_add_guard(out, &gy);
  ks_results_add_guard(out, &gdx);
  ks_guard *guards[] = {&gx, &gw, &gdy, &gy, &gr, &gdx};
  for (int i = 0; i < 6; i++)
    ks_guard_free(guards[i]);
  void *all[] = {x, w, dy, before, dx64, size, y64, x64, w64, dy64, before64, rstd64};
  for (int i = 0; i < 12; i++)
    free(all[i]);
  return bad;
}

Test(norm, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("norm", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(norm, a_row_does_not_depend_on_its_batch) {
  enum { ROWS = 9, COLS = 203 };
  float *x = ks_floats(ROWS * COLS, KS_FILL_SIGNED, 5), *w = ks_floats(COLS, KS_FILL_POSITIVE, 6);
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}) == KS_OK);
  float *y = ks_floats(ROWS * COLS, KS_FILL_SIGNED, 0), one[COLS];
  cr_assert(ks_rmsnorm_forward(
                ctx, &(ks_rmsnorm_args){
                         .x = x, .w = w, .y = y, .n_rows = ROWS, .n_cols = COLS, .eps = eps}) == KS_OK);
  for (int64_t i = 0; i < ROWS; i++) {
    cr_assert(
        ks_rmsnorm_forward(
            ctx, &(ks_rmsnorm_args){
                     .x = x + i * COLS, .w = w, .y = one, .n_rows = 1, .n_cols = COLS, .eps = eps}) == KS_OK);
    cr_assert(ks_check_same("single row", one, y + i * COLS, COLS) == 0);
  }
  free(x), free(w), free(y);
  ks_ctx_destroy(ctx);
}

Test(norm, zero_rows_nan_and_infinity) {
  float x[3][20] = {{0}}, w[20], y[3][20];
  for (int j = 0; j < 20; j++)
    w[j] = 1, x[1][j] = 1, x[2][j] = 1;
  x[1][19] = NAN;
  x[2][3] = INFINITY;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    cr_assert(ks_rmsnorm_forward(
                  ctx, &(ks_rmsnorm_args){
                           .x = x[0], .w = w, .y = y[0], .n_rows = 3, .n_cols = 20, .eps = eps}) == KS_OK);
    for (int j = 0; j < 20; j++)
      cr_assert(y[0][j] == 0 && isnan(y[1][j]) && (j == 3 ? isnan(y[2][j]) : y[2][j] == 0));
    ks_ctx_destroy(ctx);
  }
}

Test(norm, oracle_gradient_matches_central_differences) {
  enum { N = 7 };
  float *xf = ks_floats(N, KS_FILL_SIGNED, 7), *wf = ks_floats(N, KS_FILL_POSITIVE, 8),
        *dyf = ks_floats(N, KS_FILL_SIGNED, 9);
  double *x = ks_doubles(xf, N), *w = ks_doubles(wf, N), *dy = ks_doubles(dyf, N), dx[N], y[N];
  oracle_rmsnorm_backward(x, w, dy, NULL, 1, N, 1e-5, dx, NULL);
  for (int j = 0; j < N; j++) {
    const double h = 1e-5, at = x[j];
    double f[2] = {0, 0};
    for (int side = 0; side < 2; side++) {
      x[j] = at + (side ? h : -h);
      oracle_rmsnorm_forward(x, w, 1, N, 1e-5, y, NULL);
      for (int c = 0; c < N; c++)
        f[side] += y[c] * dy[c];
    }
    x[j] = at;
    cr_assert(fabs((f[1] - f[0]) / (2 * h) - dx[j]) <= 100 * h * h * (1 + fabs(dx[j])), "column %d", j);
  }
  void *all[] = {xf, wf, dyf, x, w, dy};
  for (int i = 0; i < 6; i++)
    free(all[i]);
}

Test(norm, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[32] = {1}, w[8] = {1}, y[32], r[4] = {1};
  const ks_rmsnorm_args good = {
      .x = x, .w = w, .y = y, .rstd = r, .n_rows = 4, .n_cols = 8, .eps = eps, .dy = x, .dx = y};
  ks_rmsnorm_args a = good;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_OK);
  a.n_rows = -1;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.n_cols = INT64_MAX / 2;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.x = NULL;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.y = x + 1;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.eps = NAN;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.dx = x, a.accumulate_dx = true;
  cr_assert(ks_rmsnorm_backward(ctx, &a) == KS_EINVAL);
  a = good, a.rstd = NULL;
  cr_assert(ks_rmsnorm_backward(ctx, &a) == KS_EINVAL);
  cr_assert(ks_rmsnorm_forward(ctx, NULL) == KS_EINVAL);
  cr_assert(ks_rmsnorm_forward(NULL, &good) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}
