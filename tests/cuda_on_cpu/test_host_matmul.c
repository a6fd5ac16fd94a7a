/* ks_cuda_matmul against plain loops: both directions, types, bias, accumulating, shapes that suit nobody. */
#include "kernels/cuda/cuda.h"
#include "ks_shim.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct {
  int64_t n_rows, n_out, n_in;
  bool transposed, accumulate, bias;
  ks_dtype type, y_type;
  ks_fill_kind fill;
  int64_t skip; /* elements that x and y begin behind an aligned address */
} matmul_case;

#define F32  KS_DTYPE_F32
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
                                   .c = c->accumulate ? ks_guard_at(&gy, skip) : NULL,
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

/* ---------------------------------------------------------------- shapes that cuBLASLt refuses */

enum { REFUSED_ROWS = 19, REFUSED_OUT = 37, REFUSED_IN = 45, REFUSED_RANK = 3 };

/* A layer with an adapter, forward and backward; returns y and dx, one after the other, and counts products. */
static float *layer(const char *place, const char *variants, int64_t *n_matmuls) {
  enum { N_Y = REFUSED_ROWS * REFUSED_OUT, N_X = REFUSED_ROWS * REFUSED_IN };
  ks_ctx *ctx = NULL;
  ks_weight *w = NULL;
  const bool bf16 = strcmp(place, "cuda-bf16") == 0;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cuda",
                                                 .activations = bf16 ? BF16 : F32,
                                                 .variants = variants}) == KS_OK,
            "%s", ks_error_message());
  float *values = ks_floats(REFUSED_OUT * REFUSED_IN, KS_FILL_SIGNED, 1);
  float *x = ks_floats(N_X, KS_FILL_SIGNED, 2), *dy = ks_floats(N_Y, KS_FILL_SIGNED, 3);
  float *ab = ks_floats(REFUSED_RANK * (REFUSED_IN + REFUSED_OUT), KS_FILL_SIGNED, 4);
  cr_assert(ks_weight_create(
                ctx,
                &(ks_weight_params){
                    .n_out = REFUSED_OUT, .n_in = REFUSED_IN, .dtype = bf16 ? BF16 : F32, .values = values},
                &w) == KS_OK);
  ks_guard gx = ks_guard_make_act(ctx, x, N_X), gdy = ks_guard_make_act(ctx, dy, N_Y);
  ks_guard gy = ks_guard_make_act(ctx, NULL, N_Y), gdx = ks_guard_make_act(ctx, NULL, N_X);
  ks_guard u = ks_guard_make_act(ctx, NULL, REFUSED_ROWS * REFUSED_RANK),
           v = ks_guard_make_act(ctx, NULL, REFUSED_ROWS * REFUSED_RANK);
  ks_guard lora = ks_guard_make(ctx, ab, REFUSED_RANK * (REFUSED_IN + REFUSED_OUT)),
           grad = ks_guard_make(ctx, ab, REFUSED_RANK * (REFUSED_IN + REFUSED_OUT));
  const ks_segment segment = {0, REFUSED_ROWS, 0, 0};
  const ks_lora l = {REFUSED_RANK, 0.5F,
                     lora.p,       ks_guard_at(&lora, REFUSED_RANK * REFUSED_IN),
                     grad.p,       ks_guard_at(&grad, REFUSED_RANK * REFUSED_IN)};
  const ks_linear_args a = {.w = w,
                            .x = gx.p,
                            .y = gy.p,
                            .n_rows = REFUSED_ROWS,
                            .segments = &segment,
                            .n_segments = 1,
                            .loras = &l,
                            .n_loras = 1,
                            .u = u.p,
                            .u_stride = REFUSED_RANK,
                            .dy = gdy.p,
                            .dx = gdx.p,
                            .v = v.p};
  cr_assert(ks_linear_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  cr_assert(ks_linear_backward(ctx, &a) == KS_OK, "%s", ks_error_message());
  float *y = ks_guard_read(&gy), *dx = ks_guard_read(&gdx), *both = ks_floats(N_Y + N_X, KS_FILL_SIGNED, 5);
  memcpy(both, y, N_Y * sizeof *y);
  memcpy(both + N_Y, dx, N_X * sizeof *dx);
  *n_matmuls = ks_cuda_counts_of(ctx)->matmuls;
  ks_guard *guards[] = {&gx, &gdy, &gy, &gdx, &u, &v, &lora, &grad};
  for (int i = 0; i < 8; i++)
    ks_guard_free(guards[i]);
  void *arrays[] = {values, x, dy, ab, y, dx};
  for (int i = 0; i < 6; i++)
    free(arrays[i]);
  ks_weight_destroy(ctx, w);
  ks_ctx_destroy(ctx);
  return both;
}

Test(cuda_matmul, refused_shapes_take_the_other_kernels) {
  static const struct {
    const char *place, *others;
    uint32_t alignment;
  } refused[] = {{"cuda-bf16", "linear_forward=mma,linear_backward=mma", 4},
                 {"cuda-f32", "linear_forward=simt,linear_backward=simt", 8}};
  for (int i = 0; i < 2; i++) {
    int64_t n[3];
    ks_shim_set_blas_alignment(1);
    float *by_blas = layer(refused[i].place, NULL, &n[0]),
          *expected = layer(refused[i].place, refused[i].others, &n[1]);
    ks_shim_set_blas_alignment(refused[i].alignment);
    float *got = layer(refused[i].place, NULL, &n[2]);
    ks_shim_set_blas_alignment(1);
    cr_expect(n[0] == 2 && n[1] == 0 && n[2] == 0, "%s: %d, %d, %d products", refused[i].place, (int)n[0],
              (int)n[1], (int)n[2]);
    cr_expect(ks_check_same(refused[i].place, got, expected, REFUSED_ROWS * (REFUSED_OUT + REFUSED_IN)) == 0);
    free(by_blas), free(expected), free(got);
  }
}
