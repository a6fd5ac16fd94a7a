#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t n_rows, n_cols;
  ks_fill_kind fill;
  bool alias, accumulate;
} norm_case;

/* Around the ends of warps, blocks and what a thread keeps of a row, in float32 and in bf16; the last: more rows than blocks
 * that a small device holds at once. */
static const norm_case cases[] = {
    {0, 8, KS_FILL_SIGNED, false, false},      {1, 1, KS_FILL_SIGNED, false, false},
    {1, 16, KS_FILL_INTEGER, false, true},     {3, 31, KS_FILL_SIGNED, false, true},
    {3, 32, KS_FILL_POSITIVE, true, false},    {5, 33, KS_FILL_NEAR_ONE, true, false},
    {17, 64, KS_FILL_SIGNED, false, true},     {7, 97, KS_FILL_SIGNED, false, false},
    {9, 128, KS_FILL_POSITIVE, true, false},   {2, 111, KS_FILL_LARGE, false, true},
    {9, 203, KS_FILL_SIGNED, true, false},     {4, 288, KS_FILL_SIGNED, false, true},
    {3, 1023, KS_FILL_POSITIVE, false, true},  {3, 1024, KS_FILL_SIGNED, false, false},
    {3, 1025, KS_FILL_NEAR_ONE, false, false}, {2, 3200, KS_FILL_SIGNED, false, true},
    {1, 4104, KS_FILL_SIGNED, true, false},    {1, 20000, KS_FILL_SIGNED, false, true},
    {1, 20003, KS_FILL_LARGE, false, false},   {1100, 64, KS_FILL_SIGNED, false, true},
    {300, 97, KS_FILL_SIGNED, true, false},    {19, 4104, KS_FILL_SIGNED, false, true},
    {19, 4100, KS_FILL_SIGNED, true, false}};
enum { N_CASES = sizeof cases / sizeof cases[0] };
static const float eps = 1e-5f;

/* Host arrays of a case, float32 and float64. */
enum { X, W, DY, BEFORE, N_INPUTS };
typedef struct {
  float *in[N_INPUTS];
  double *in64[N_INPUTS], *y, *rstd, *dx, *dx_size;
} norm_arrays;

static norm_arrays arrays_of(const ks_ctx *ctx, const norm_case *c) {
  const int64_t n = c->n_rows * c->n_cols, sizes[N_INPUTS] = {n, c->n_cols, n, n};
  const ks_fill_kind fills[N_INPUTS] = {c->fill, KS_FILL_POSITIVE, KS_FILL_SIGNED, KS_FILL_SIGNED};
  norm_arrays r;
  for (int i = 0; i < N_INPUTS; i++) {
    r.in[i] = ks_floats(sizes[i], fills[i], (uint64_t)i + 1);
    if (i != W) ks_act_round(ctx, r.in[i], n);
    r.in64[i] = ks_doubles(r.in[i], sizes[i]);
  }
  r.y = ks_doubles(NULL, n), r.dx = ks_doubles(NULL, n), r.dx_size = ks_doubles(NULL, n);
  r.rstd = ks_doubles(NULL, c->n_rows);
  oracle_rmsnorm_forward(r.in64[X], r.in64[W], c->n_rows, c->n_cols, (double)eps, r.y, r.rstd);
  oracle_rmsnorm_backward(r.in64[X], r.in64[W], r.in64[DY], c->accumulate ? r.in64[BEFORE] : NULL, c->n_rows,
                          c->n_cols, (double)eps, r.dx, r.dx_size);
  return r;
}

static void free_arrays(norm_arrays *r) {
  for (int i = 0; i < N_INPUTS; i++)
    free(r->in[i]), free(r->in64[i]);
  free(r->y), free(r->rstd), free(r->dx), free(r->dx_size);
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const norm_case *c = test_case;
  const int64_t n = c->n_rows * c->n_cols;
  norm_arrays h = arrays_of(ctx, c);
  ks_guard gx = ks_guard_make_act(ctx, h.in[X], n), gw = ks_guard_make(ctx, h.in[W], c->n_cols),
           gdy = ks_guard_make_act(ctx, h.in[DY], n), gr = ks_guard_make(ctx, NULL, c->n_rows);
  ks_guard gy = ks_guard_make_act(ctx, c->alias ? h.in[X] : NULL, n);
  ks_guard gdx = ks_guard_make_act(ctx, c->accumulate ? h.in[BEFORE] : c->alias ? h.in[DY] : NULL, n);
  ks_rmsnorm_args a = {.x = c->alias ? gy.p : gx.p,
                       .w = gw.p,
                       .y = gy.p,
                       .rstd = gr.p,
                       .n_rows = c->n_rows,
                       .n_cols = c->n_cols,
                       .eps = eps};
  int64_t bad = ks_rmsnorm_forward(ctx, &a) != KS_OK;
  a.x = gx.p;
  a.dy = c->alias ? gdx.p : gdy.p;
  a.dx = gdx.p;
  a.accumulate_dx = c->accumulate;
  bad += ks_rmsnorm_backward(ctx, &a) != KS_OK;
  bad += ks_guard_check_input(name, &gx) + ks_guard_check_input(name, &gw) + ks_guard_check_input(name, &gdy);
  /* The CPU: 64 lanes and their tree; a GPU: up to 32 elements a thread, more in the longest rows, and a
   * tree. */
  const double chain = (double)c->n_cols / 64 + 32 + 9;
  bad += ks_guard_check_output(name, &gy, h.y, NULL, chain) +
         ks_guard_check_output(name, &gr, h.rstd, NULL, chain) +
         ks_guard_check_output(name, &gdx, h.dx, h.dx_size, chain);
  ks_guard *guards[] = {&gy, &gr, &gdx, &gx, &gw, &gdy};
  for (int i = 0; i < 6; i++) {
    if (i < 3) ks_results_add_guard(out, guards[i]);
    ks_guard_free(guards[i]);
  }
  free_arrays(&h);
  return bad;
}

Test(norm, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("rmsnorm", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Forward and backward on rows [first, first + n_rows) of x; y, dx and rstd at `to` of their arrays. */
static void both(ks_ctx *ctx, const ks_guard *x, int64_t from, const ks_guard *w, const ks_guard *y,
                 const ks_guard *dx, const ks_guard *rstd, int64_t to, int64_t n_rows, int64_t n_cols) {
  const ks_rmsnorm_args a = {.x = ks_guard_at(x, from),
                             .w = w->p,
                             .y = ks_guard_at(y, to),
                             .rstd = rstd->p,
                             .n_rows = n_rows,
                             .n_cols = n_cols,
                             .eps = eps,
                             .dy = ks_guard_at(x, from),
                             .dx = ks_guard_at(dx, to)};
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_OK && ks_rmsnorm_backward(ctx, &a) == KS_OK, "%s",
            ks_error_message());
}

/* A row has the same bits alone and among others, and wherever it lies. */
static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { ROWS = 5, SHIFT = 1 };
  const int64_t cols = *(const int64_t *)test_case, n = ROWS * cols;
  float *x = ks_floats(n + SHIFT, KS_FILL_SIGNED, 5), *w = ks_floats(cols, KS_FILL_POSITIVE, 6);
  ks_guard gx = ks_guard_make_act(ctx, x, n), shifted = ks_guard_make_act(ctx, NULL, n + SHIFT);
  ks_guard gw = ks_guard_make(ctx, w, cols), rstd = ks_guard_make(ctx, NULL, ROWS);
  ks_guard y = ks_guard_make_act(ctx, NULL, n), dx = ks_guard_make_act(ctx, NULL, n);
  ks_guard y1 = ks_guard_make_act(ctx, NULL, n + SHIFT), dx1 = ks_guard_make_act(ctx, NULL, n + SHIFT);
  int64_t bad =
      ks_mem_copy(ctx, ks_guard_at(&shifted, SHIFT), gx.p, (size_t)n * ks_ctx_act_size(ctx)) != KS_OK;
  both(ctx, &gx, 0, &gw, &y, &dx, &rstd, 0, ROWS, cols);
  ks_results_add_guard(out, &y);
  float *wants[] = {ks_guard_read(&y), ks_guard_read(&dx)};
  for (int way = 0; way < 2; way++) {
    for (int64_t i = 0; way == 0 && i < ROWS; i++)
      both(ctx, &gx, i * cols, &gw, &y1, &dx1, &rstd, i * cols, 1, cols);
    if (way == 1) both(ctx, &shifted, SHIFT, &gw, &y1, &dx1, &rstd, SHIFT, ROWS, cols);
    float *got[] = {ks_guard_read(&y1), ks_guard_read(&dx1)};
    for (int i = 0; i < 2; i++) {
      bad += ks_check_same(name, got[i] + (way ? SHIFT : 0), wants[i], n);
      free(got[i]), way ? free(wants[i]) : (void)0;
    }
  }
  ks_guard *guards[] = {&gx, &shifted, &gw, &rstd, &y, &dx, &y1, &dx1};
  for (int i = 0; i < 8; i++) {
    bad += ks_guard_check_walls(name, guards[i]);
    ks_guard_free(guards[i]);
  }
  free(x), free(w);
  return bad;
}

Test(norm, a_row_depends_neither_on_its_batch_nor_on_its_place) {
  static const int64_t sizes[] = {1, 40, 64, 203, 256, 1000, 4096};
  int64_t bad = 0;
  for (int i = 0; i < 7; i++)
    bad += ks_test_everywhere("rmsnorm alone", sizes[i], &sizes[i], run_alone);
  cr_assert(bad == 0);
}

Test(norm, zero_rows_nan_and_infinity) {
  enum { COLS = 20 };
  float x[3 * COLS] = {0}, w[COLS];
  for (int j = 0; j < COLS; j++)
    w[j] = 1, x[COLS + j] = 1, x[2 * COLS + j] = 1;
  x[COLS + 19] = NAN;
  x[2 * COLS + 3] = INFINITY;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    ks_guard gx = ks_guard_make_act(ctx, x, 3 * COLS), gw = ks_guard_make(ctx, w, COLS),
             gy = ks_guard_make_act(ctx, NULL, 3 * COLS);
    const ks_rmsnorm_args a = {.x = gx.p, .w = gw.p, .y = gy.p, .n_rows = 3, .n_cols = COLS, .eps = eps};
    cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_OK);
    float *y = ks_guard_read(&gy);
    for (int j = 0; j < COLS; j++)
      cr_assert(y[j] == 0 && isnan(y[COLS + j]) && (j == 3 ? isnan(y[2 * COLS + j]) : y[2 * COLS + j] == 0));
    free(y);
    ks_guard_free(&gx), ks_guard_free(&gw), ks_guard_free(&gy);
    ks_ctx_destroy(ctx);
  }
}

/* Without eps tiny rows are scaled up to one, and their gradient does not overflow on the way. */
Test(norm, tiny_rows_without_eps) {
  enum { COLS = 24 };
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    float x[COLS], w[COLS], dy[COLS];
    for (int j = 0; j < COLS; j++)
      x[j] = j % 2 ? 0x1p-60f : -0x1p-60f, w[j] = 1, dy[j] = j == 0 ? 0x1p-60f : 0;
    ks_guard gx = ks_guard_make_act(ctx, x, COLS), gw = ks_guard_make(ctx, w, COLS),
             gdy = ks_guard_make_act(ctx, dy, COLS), gy = ks_guard_make_act(ctx, NULL, COLS),
             gr = ks_guard_make(ctx, NULL, 1);
    const ks_rmsnorm_args a = {
        .x = gx.p, .w = gw.p, .y = gy.p, .rstd = gr.p, .n_rows = 1, .n_cols = COLS, .dy = gdy.p, .dx = gdy.p};
    cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_OK && ks_rmsnorm_backward(ctx, &a) == KS_OK);
    float *y = ks_guard_read(&gy), *dx = ks_guard_read(&gdy);
    for (int j = 0; j < COLS; j++) /* dx = dy - xhat mean(dy xhat) at a scale of one */
      cr_assert(fabsf(y[j]) == 1 && fabsf(dx[j] - (j == 0  ? 23
                                                   : j % 2 ? 1
                                                           : -1) /
                                                      24.0f) < 0x1p-8f,
                "%d: %g %g", j, (double)y[j], (double)dx[j]);
    free(y), free(dx);
    ks_guard *guards[] = {&gx, &gw, &gdy, &gy, &gr};
    for (int i = 0; i < 5; i++)
      ks_guard_free(guards[i]);
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
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x = ks_guard_make_act(ctx, NULL, 40), y = ks_guard_make_act(ctx, NULL, 32),
           w = ks_guard_make(ctx, NULL, 8), r = ks_guard_make(ctx, NULL, 4);
  const ks_rmsnorm_args good = {
      .x = x.p, .w = w.p, .y = y.p, .rstd = r.p, .n_rows = 4, .n_cols = 8, .eps = eps, .dy = x.p, .dx = y.p};
  ks_rmsnorm_args a = good;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_OK);
  a.n_rows = -1;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.n_cols = INT64_MAX / 2;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.x = NULL;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.y = ks_guard_at(&x, 1);
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.eps = NAN;
  cr_assert(ks_rmsnorm_forward(ctx, &a) == KS_EINVAL);
  a = good, a.dx = x.p, a.accumulate_dx = true;
  cr_assert(ks_rmsnorm_backward(ctx, &a) == KS_EINVAL);
  a = good, a.rstd = NULL;
  cr_assert(ks_rmsnorm_backward(ctx, &a) == KS_EINVAL);
  cr_assert(ks_rmsnorm_forward(ctx, NULL) == KS_EINVAL);
  cr_assert(ks_rmsnorm_forward(NULL, &good) == KS_EINVAL);
  ks_guard_free(&x), ks_guard_free(&y), ks_guard_free(&w), ks_guard_free(&r);
  ks_ctx_destroy(ctx);
}
