/* ks_cuda_matmul against plain loops: both directions, types, bias, accumulating, shapes that suit nobody. */
#include "kernels/cuda/cuda.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n_rows, n_out, n_in;
  bool transposed, accumulate, bias;
  ks_dtype type, y_type;
  ks_fill_kind fill;
  int64_t skip; /* elements that x and y begin behind an aligned address */
} matmul_case;

#define F32 KS_DTYPE_F32
#define BF16 KS_DTYPE_BF16
static const matmul_case cases[] = {
    {1, 1, 1, true, false, false, F32, F32, KS_FILL_SIGNED, 0},
    {1, 7, 31, true, true, true, F32, F32, KS_FILL_SIGNED, 0},
    {5, 31, 33, true, false, true, F32, F32, KS_FILL_SIGNED, 0},
    {17, 33, 97, false, false, false, F32, F32, KS_FILL_SIGNED, 0},
    {33, 97, 31, false, true, false, F32, F32, KS_FILL_SIGNED, 0},
    {64, 48, 100, true, true, false, F32, F32, KS_FILL_INTEGER, 0},
    {3, 204, 112, false, true, false, F32, F32, KS_FILL_INTEGER, 3},
    {1, 1, 1, false, false, false, BF16, BF16, KS_FILL_SIGNED, 0},
    {2, 31, 33, true, false, true, BF16, BF16, KS_FILL_SIGNED, 0},
    {31, 97, 64, true, true, true, BF16, BF16, KS_FILL_SIGNED, 0},
    {9, 64, 203, false, true, false, BF16, BF16, KS_FILL_SIGNED, 0},
    {40, 40, 40, false, false, false, BF16, BF16, KS_FILL_INTEGER, 1},
    {7, 111, 288, true, false, false, BF16, F32, KS_FILL_SIGNED, 0},
    {3, 65, 127, true, true, true, BF16, F32, KS_FILL_SIGNED, 8},
    {4, 31, 17, false, false, false, BF16, F32, KS_FILL_LARGE, 0},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

static void reference(const matmul_case *c, const float *x, const float *w, const float *y, const float *bias,
                      double *ref, double *size) {
  const int64_t m = c->transposed ? c->n_out : c->n_in, k = c->transposed ? c->n_in : c->n_out;
  for (int64_t i = 0; i < c->n_rows; i++)
    for (int64_t o = 0; o < m; o++) {
      double sum = 0, sum_size = 0;
      for (int64_t j = 0; j < k; j++) {
        const double term = (double)x[i * k + j] * (double)(c->transposed ? w[o * k + j] : w[j * m + o]);
        sum += term, sum_size += fabs(term);
      }
      if (c->accumulate) sum += (double)y[i * m + o], sum_size += fabs((double)y[i * m + o]);
      if (c->bias) sum += (double)bias[o], sum_size += fabs((double)bias[o]);
      ref[i * m + o] = sum, size[i * m + o] = sum_size;
    }
}

static int64_t run(ks_ctx *ctx, const matmul_case *c, const char *name) {
  const int64_t m = c->transposed ? c->n_out : c->n_in, k = c->transposed ? c->n_in : c->n_out,
                skip = c->skip;
  const int64_t n_x = c->n_rows * k, n_y = c->n_rows * m;
  float *x = ks_floats(n_x + skip, c->fill, 1), *w = ks_floats(c->n_out * c->n_in, c->fill, 2);
  float *y = ks_floats(n_y + skip, c->fill, 3), *bias = ks_floats(m, c->fill, 4);
  if (c->type == KS_DTYPE_BF16) ks_act_round(ctx, x, n_x + skip), ks_act_round(ctx, w, c->n_out * c->n_in);
  if (c->y_type == KS_DTYPE_BF16) ks_act_round(ctx, y, n_y + skip), ks_act_round(ctx, bias, m);
  ks_guard gx = ks_guard_make_as(ctx, c->type, x, n_x + skip),
           gw = ks_guard_make_as(ctx, c->type, w, c->n_out * c->n_in);
  ks_guard gy = ks_guard_make_as(ctx, c->y_type, c->accumulate || skip ? y : NULL, n_y + skip);
  ks_guard gb = ks_guard_make_as(ctx, c->y_type, bias, m);
  const ks_cuda_matmul_params p = {.x = ks_guard_at(&gx, skip),
                                   .w = gw.p,
                                   .y = ks_guard_at(&gy, skip),
                                   .bias = c->bias ? gb.p : NULL,
                                   .n_rows = c->n_rows,
                                   .n_out = c->n_out,
                                   .n_in = c->n_in,
                                   .w_transposed = c->transposed,
                                   .accumulate = c->accumulate,
                                   .x_dtype = c->type,
                                   .w_dtype = c->type,
                                   .y_dtype = c->y_type};
  int64_t bad = ks_cuda_matmul(ctx, &p) != KS_OK;
  if (bad) fprintf(stderr, "%s: %s\n", name, ks_error_message());
  double *ref = ks_doubles(y, n_y + skip), *size = ks_doubles(NULL, n_y + skip);
  reference(c, x + skip, w, y + skip, bias, ref + skip, size + skip);
  bad += ks_guard_check_input(name, &gx) + ks_guard_check_input(name, &gw) + ks_guard_check_input(name, &gb);
  bad += ks_guard_check_output(name, &gy, ref, size, (double)k + 2);
  ks_guard *guards[] = {&gx, &gw, &gy, &gb};
  for (int i = 0; i < 4; i++)
    ks_guard_free(guards[i]);
  void *all[] = {x, w, y, bias, ref, size};
  for (int i = 0; i < 6; i++)
    free(all[i]);
  return bad;
}

Test(cuda_matmul, plain_loops) {
  int64_t bad = 0;
  for (int place = 0; place < 2; place++) {
    ks_ctx *ctx = ks_test_ctx(place ? "cuda-bf16" : "cuda-f32", 1);
    cr_assert(ctx != NULL && ks_cuda_has_blas(ctx));
    for (int i = 0; i < N_CASES; i++) {
      char name[32];
      if ((cases[i].type == KS_DTYPE_BF16) != place) continue;
      snprintf(name, sizeof name, "matmul %d", i);
      bad += run(ctx, &cases[i], name);
    }
    cr_expect(ks_cuda_counts_of(ctx)->blas_exceptions == 1, "%d",
              (int)ks_cuda_counts_of(ctx)->blas_exceptions);
    ks_ctx_destroy(ctx);
  }
  cr_expect(bad == 0);
}

Test(cuda_matmul, a_row_does_not_depend_on_its_batch) {
  enum { ROWS = 37, OUT = 53, IN = 129 };
  ks_ctx *ctx = ks_test_ctx("cuda-f32", 1);
  float *x = ks_floats(ROWS * IN, KS_FILL_SIGNED, 1), *w = ks_floats(OUT * IN, KS_FILL_SIGNED, 2);
  ks_guard gx = ks_guard_make(ctx, x, ROWS * IN), gw = ks_guard_make(ctx, w, OUT * IN);
  ks_guard all = ks_guard_make(ctx, NULL, ROWS * OUT), one = ks_guard_make(ctx, NULL, ROWS * OUT);
  ks_cuda_matmul_params p = {
      .x = gx.p, .w = gw.p, .y = all.p, .n_rows = ROWS, .n_out = OUT, .n_in = IN, .w_transposed = true};
  cr_assert(ks_cuda_matmul(ctx, &p) == KS_OK);
  p.n_rows = 1;
  for (int i = 0; i < ROWS; i++) {
    p.x = ks_guard_at(&gx, i * IN);
    p.y = ks_guard_at(&one, i * OUT);
    cr_assert(ks_cuda_matmul(ctx, &p) == KS_OK);
  }
  float *a = ks_guard_read(&all), *b = ks_guard_read(&one);
  cr_expect(ks_check_same("rows one by one", a, b, ROWS * OUT) == 0);
  ks_guard *guards[] = {&gx, &gw, &all, &one};
  for (int i = 0; i < 4; i++)
    ks_guard_free(guards[i]);
  void *arrays[] = {x, w, a, b};
  for (int i = 0; i < 4; i++)
    free(arrays[i]);
  ks_ctx_destroy(ctx);
}

Test(cuda_matmul, what_it_does_not_do) {
  ks_ctx *ctx = ks_test_ctx("cuda-bf16", 1);
  void *p = NULL;
  cr_assert(ks_mem_alloc(ctx, 1 << 16, &p) == KS_OK);
  const ks_cuda_matmul_params good = {.x = p,
                                      .w = p,
                                      .y = p,
                                      .n_rows = 4,
                                      .n_out = 4,
                                      .n_in = 4,
                                      .w_transposed = true,
                                      .x_dtype = BF16,
                                      .w_dtype = BF16,
                                      .y_dtype = BF16};
  ks_cuda_matmul_params bad[5] = {good, good, good, good, good};
  bad[0].w_dtype = KS_DTYPE_F32;
  bad[1].x_dtype = KS_DTYPE_F16;
  bad[2].x_dtype = bad[2].w_dtype = KS_DTYPE_F32;
  bad[3].bias = p, bad[3].w_transposed = false;
  bad[4].n_in = 0;
  for (int i = 0; i < 5; i++)
    cr_expect(ks_cuda_matmul(ctx, &bad[i]) == (i == 4 ? KS_EUNSUPPORTED : KS_EINTERNAL), "case %d", i);
  ks_cuda_matmul_params nothing = good;
  nothing.n_rows = 0;
  cr_expect(ks_cuda_matmul(ctx, &nothing) == KS_OK);
  ks_ctx_destroy(ctx);
}
