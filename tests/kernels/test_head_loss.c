#include "kernels/quant.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n_rows, n_in, n_vocab;
  ks_fill_kind fill;
  float sharpness; /* factor on x */
  ks_dtype dtype;  /* of the head; F32 and BF16 mean the type of activations on a GPU */
  bool scale, loss_only, bias;
} head_case;

static const head_case cases[] = {
    {0, 4, 5, KS_FILL_SIGNED, 1, KS_DTYPE_F32, false, false, false},
    {1, 1, 1, KS_FILL_SIGNED, 1, KS_DTYPE_F32, false, false, false},
    {1, 0, 7, KS_FILL_SIGNED, 1, KS_DTYPE_F32, false, false, false},
    {3, 31, 33, KS_FILL_SIGNED, 1, KS_DTYPE_F32, true, false, true},
    {17, 100, 97, KS_FILL_SIGNED, 8, KS_DTYPE_F32, true, false, false},
    {33, 32, 1023, KS_FILL_SIGNED, 30, KS_DTYPE_F32, false, false, false},
    {40, 48, 260, KS_FILL_NEAR_ONE, 1, KS_DTYPE_F32, true, false, false},
    {29, 65, 203, KS_FILL_SIGNED, 1, KS_DTYPE_F32, false, true, true},
    {270, 8, 512, KS_FILL_SIGNED, 1, KS_DTYPE_F32, true, false, false}, /* two blocks of rows */
    {9, 64, 333, KS_FILL_SIGNED, 2, KS_DTYPE_BF16, true, true, false},
    {21, 50, 150, KS_FILL_SIGNED, 2, KS_DTYPE_BF16, true, false, false},
    /* tiles of 128 x 128, stages of 64 columns: one, one less, one more of each */
    {128, 64, 128, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, true},
    {127, 56, 127, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, false},
    {129, 72, 129, KS_FILL_SIGNED, 3, KS_DTYPE_F32, false, false, true},
    {5, 264, 400, KS_FILL_SIGNED, 1, KS_DTYPE_F32, true, true, true},
    /* tiles of 128 x 256: one less, one more, several, more of k than there are stages */
    {127, 136, 255, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, true, true},
    {129, 64, 257, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, false},
    {3, 520, 520, KS_FILL_SIGNED, 2, KS_DTYPE_F32, true, false, true},
    {13, 72, 136, KS_FILL_SIGNED, 2, KS_DTYPE_Q8_0, true, false, true},
    {7, 40, 61, KS_FILL_SIGNED, 2, KS_DTYPE_Q4_0, false, false, false},
    {4, 130, 40, KS_FILL_SIGNED, 2, KS_DTYPE_NF4, true, true, false},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

typedef struct {
  float *w, *bias, *x, *row_scale;
  int32_t *targets;
} inputs;

static inputs make_inputs(const ks_ctx *ctx, const head_case *c) {
  inputs in = {ks_floats(c->n_vocab * c->n_in, c->fill, 1), ks_floats(c->n_vocab, c->fill, 2),
               ks_floats(c->n_rows * c->n_in, c->fill, 3), ks_floats(c->n_rows, KS_FILL_SIGNED, 4),
               calloc((size_t)c->n_rows + 1, sizeof(int32_t))};
  for (int64_t i = 0; i < c->n_rows * c->n_in; i++)
    in.x[i] *= c->sharpness;
  ks_act_round(ctx, in.x, c->n_rows * c->n_in);
  for (int64_t i = 0; i < c->n_rows; i++)
    in.targets[i] = (int32_t)((i * 7919 + 3) % c->n_vocab);
  if (c->n_rows > 2) in.row_scale[2] = 0;
  return in;
}

static void free_inputs(inputs *in) {
  free(in->w), free(in->bias), free(in->x), free(in->row_scale), free(in->targets);
}

static ks_dtype dtype_in(const ks_ctx *ctx, const head_case *c) {
  return ks_test_is_cuda() && !ks_dtype_is_quantized(c->dtype) ? ks_ctx_act_dtype(ctx) : c->dtype;
}

static ks_weight *make_weight(ks_ctx *ctx, const head_case *c, const inputs *in) {
  ks_weight *w = NULL;
  const ks_weight_params wp = {.n_out = c->n_vocab,
                               .n_in = c->n_in,
                               .dtype = dtype_in(ctx, c),
                               .values = in->w,
                               .bias = c->bias ? in->bias : NULL};
  cr_assert(ks_weight_create(ctx, &wp, &w) == KS_OK, "%s", ks_error_message());
  return w;
}

/* What products see of the weights. */
static double *seen_weights(const ks_ctx *ctx, const head_case *c, const inputs *in) {
  const ks_dtype dtype = dtype_in(ctx, c);
  const int64_t n = c->n_vocab * c->n_in;
  float *w = ks_floats(n, KS_FILL_SIGNED, 0);
  memcpy(w, in->w, (size_t)n * sizeof *w);
  if (ks_dtype_is_quantized(dtype)) {
    uint8_t *codes = malloc((size_t)ks_quant_row_bytes(dtype, c->n_in) + 1);
    uint16_t *scales = malloc((size_t)ks_quant_row_scales(dtype, c->n_in) * 2 + 1);
    for (int64_t o = 0; o < c->n_vocab; o++) {
      cr_assert(ks_quant_row(dtype, w + o * c->n_in, c->n_in, codes, scales) == KS_OK);
      ks_dequant_row(dtype, codes, scales, c->n_in, w + o * c->n_in);
    }
    free(codes), free(scales);
    ks_act_round(ctx, w, n);
  }
  double *seen = ks_doubles(w, n);
  for (int64_t i = 0; dtype == KS_DTYPE_BF16 && i < n; i++)
    seen[i] = oracle_bf16(seen[i]);
  free(w);
  return seen;
}

/* Roundings between logits and dx: a bf16 product's left factor on the CPU; on a GPU exponentials, then their
 * differences. */
static double between(const ks_ctx *ctx, const head_case *c) {
  if (!ks_test_is_cuda()) return c->dtype == KS_DTYPE_BF16 ? 0x1p-8 : 0;
  return ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 ? 2 * ks_act_roundoff(ctx) : 0;
}

static int64_t check(ks_ctx *ctx, const head_case *c, const inputs *in, const float *loss, const ks_guard *dx,
                     const char *name) {
  const int64_t n_x = c->n_rows * c->n_in;
  double *w = seen_weights(ctx, c, in), *bias = ks_doubles(in->bias, c->n_vocab), *x = ks_doubles(in->x, n_x),
         *scale = ks_doubles(in->row_scale, c->n_rows),
         *ref[4] = {ks_doubles(NULL, c->n_rows), ks_doubles(NULL, c->n_rows), ks_doubles(NULL, n_x),
                    ks_doubles(NULL, n_x)};
  for (int64_t i = 0; dtype_in(ctx, c) == KS_DTYPE_BF16 && i < n_x; i++)
    x[i] = oracle_bf16(x[i]);
  oracle_head h = {
      c->n_rows, c->n_in, c->n_vocab, w, c->bias ? bias : NULL, x, in->targets, c->scale ? scale : NULL};
  oracle_head_loss(&h, ref[0], ref[1], c->loss_only ? NULL : ref[2], ref[3]);
  const double chain = (double)(c->n_in + c->n_vocab), u_out = ks_act_roundoff(ctx);
  int64_t bad = ks_check_close(name, loss, ref[0], ref[1], c->n_rows, chain) + ks_guard_check_walls(name, dx);
  float *got = ks_guard_read(dx);
  for (int64_t i = 0; i < n_x; i++) {
    const double tolerance = ks_tolerance_rounded(ref[2][i], ref[3][i], chain, u_out, between(ctx, c));
    if (c->loss_only ? isnan(got[i]) : fabs((double)got[i] - ref[2][i]) <= tolerance) continue;
    if (bad++ < 4)
      fprintf(stderr, "%s: dx[%lld] is %.9g, wants %.9g +- %.3g\n", name, (long long)i, (double)got[i],
              ref[2][i], tolerance);
  }
  free(got);
  double *all[] = {w, bias, x, scale, ref[0], ref[1], ref[2], ref[3]};
  for (int i = 0; i < 8; i++)
    free(all[i]);
  return bad;
}

/* One call; `loss` has room for one float more, which must stay. */
static int64_t call(ks_ctx *ctx, const ks_weight *w, const head_case *c, const inputs *in, int64_t row,
                    int64_t n_rows, const ks_guard *x, const ks_guard *dx, float *loss, const char *name) {
  ks_guard workspace =
      ks_guard_make(ctx, NULL, (int64_t)(ks_head_loss_workspace(ctx, w, n_rows) / sizeof(float)));
  const ks_head_loss_args a = {.w = w,
                               .x = ks_guard_at(x, row * c->n_in),
                               .targets = in->targets + row,
                               .row_scale = c->scale ? in->row_scale + row : NULL,
                               .loss = loss,
                               .dx = c->loss_only ? NULL : ks_guard_at(dx, row * c->n_in),
                               .n_rows = n_rows,
                               .workspace = workspace.p};
  loss[n_rows] = 4711;
  int64_t bad = ks_head_loss(ctx, &a) != KS_OK || ks_sync(ctx) != KS_OK;
  if (bad) fprintf(stderr, "%s: %s\n", name, ks_error_message());
  bad += (loss[n_rows] != 4711) + ks_guard_check_walls(name, &workspace);
  ks_guard_free(&workspace);
  return bad;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const head_case *c = test_case;
  inputs in = make_inputs(ctx, c);
  ks_weight *w = make_weight(ctx, c, &in);
  ks_guard x = ks_guard_make_act(ctx, in.x, c->n_rows * c->n_in),
           dx = ks_guard_make_act(ctx, NULL, c->n_rows * c->n_in);
  float *loss = ks_floats(c->n_rows, KS_FILL_SIGNED, 9);
  int64_t bad = call(ctx, w, c, &in, 0, c->n_rows, &x, &dx, loss, name);
  bad += check(ctx, c, &in, loss, &dx, name) + ks_guard_check_input(name, &x);
  if (c->dtype != KS_DTYPE_BF16 || ks_test_is_cuda() || strcmp(ks_ctx_isa_name(ctx), "avx512bf16") != 0) {
    ks_results_add(out, loss, c->n_rows);
    if (!c->loss_only) ks_results_add_guard(out, &dx);
  }
  ks_guard_free(&x), ks_guard_free(&dx);
  ks_weight_destroy(ctx, w);
  free(loss);
  free_inputs(&in);
  return bad;
}

/* The shim's: bytes of shared memory a block may have; compute capability. */
__attribute__((weak)) void ks_shim_set_smem(size_t bytes);
__attribute__((weak)) void ks_shim_set_capability(int major, int minor);

Test(head_loss, oracle_everywhere) {
  int64_t bad = 0;
  if (ks_shim_set_smem)
    ks_shim_set_smem(227 << 10); /* three stages as on Hopper; by_card: two, as on Ampere */
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("head_loss", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Where cuBLASLt has better than mma.sync: losses alone in tiles, with gradient in blocks of logits. */
Test(head_loss, by_card) {
  int64_t bad = 0;
  if (!ks_shim_set_capability) cr_skip_test("for the shim");
  ks_shim_set_capability(9, 0);
  ks_shim_set_smem(163 << 10);
  for (int64_t i = 11; i < 17; i++)
    bad += ks_test_everywhere("head_loss", 300 + i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Rows of a batch that crosses tiles and blocks of rows against the same rows alone. */
static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const head_case *c = test_case;
  const int64_t step = c->n_rows > 200 ? c->n_rows - 1 : 23;
  inputs in = make_inputs(ctx, c);
  ks_weight *w = make_weight(ctx, c, &in);
  ks_guard x = ks_guard_make_act(ctx, in.x, c->n_rows * c->n_in),
           dx = ks_guard_make_act(ctx, NULL, c->n_rows * c->n_in),
           alone = ks_guard_make_act(ctx, NULL, c->n_rows * c->n_in);
  float *loss = ks_floats(c->n_rows, KS_FILL_SIGNED, 9), one[2];
  int64_t bad = call(ctx, w, c, &in, 0, c->n_rows, &x, &dx, loss, name);
  float *in_batch = ks_guard_read(&dx);
  for (int64_t i = 0; i < c->n_rows; i += step) {
    bad += call(ctx, w, c, &in, i, 1, &x, &alone, one, name) + ks_check_same("loss alone", one, loss + i, 1);
    float *got = ks_guard_read(&alone);
    bad += ks_check_same("dx alone", got + i * c->n_in, in_batch + i * c->n_in, c->n_in);
    free(got);
  }
  ks_results_add(out, loss, c->n_rows);
  ks_guard_free(&x), ks_guard_free(&dx), ks_guard_free(&alone);
  ks_weight_destroy(ctx, w);
  free(loss), free(in_batch);
  free_inputs(&in);
  return bad;
}

Test(head_loss, row_alone_has_the_same_bits) {
  static const head_case alone[] = {
      {70, 33, 311, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, false},
      {140, 40, 150, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, true},
      {2049, 8, 5, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, false}}; /* blocks of a GPU */
  int64_t bad = 0;
  for (int64_t i = 0; i < 3; i++)
    bad += ks_test_everywhere("head_loss", 100 + i, &alone[i], run_alone);
  cr_assert(bad == 0);
}

/* One column that counts: the logits are x times 0 .. 39. n_in: 1, or 8 for the kernels that want it aligned.
 */
static int64_t run_extremes(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { VOCAB = 40, ROWS = 7 };
  const int64_t n_in = *(const int64_t *)test_case;
  const float first[ROWS] = {8192, -8192, 0, NAN, INFINITY, -INFINITY, 1};
  static const int32_t targets[ROWS] = {39, 39, 0, 0, 0, 5, 7};
  const head_case c = {ROWS, n_in, VOCAB, KS_FILL_SIGNED, 1, KS_DTYPE_F32, false, false, true};
  float w[VOCAB * 8] = {0}, x[ROWS * 8] = {0}, bias[VOCAB] = {0}, loss[ROWS + 1];
  for (int i = 0; i < VOCAB; i++)
    w[i * n_in] = (float)i;
  for (int i = 0; i < ROWS; i++)
    x[i * n_in] = first[i];
  bias[3] = -INFINITY; /* never predicted */
  const inputs in = {.w = w, .bias = bias, .x = x, .targets = (int32_t *)(uintptr_t)targets};
  ks_weight *weight = make_weight(ctx, &c, &in);
  ks_guard gx = ks_guard_make_act(ctx, x, ROWS * n_in), dx = ks_guard_make_act(ctx, NULL, ROWS * n_in);
  int64_t bad = call(ctx, weight, &c, &in, 0, ROWS, &gx, &dx, loss, name);
  float *g = ks_guard_read(&dx);
  bad += !(loss[0] == 0 && g[0] == 0);              /* a certain prediction has no loss */
  bad += !(loss[1] == 39 * 8192 && g[n_in] == -39); /* a certain error */
  bad += !(fabs((double)loss[2] - log(39)) <= ks_tolerance(log(39), 2, VOCAB));
  bad += !(isnan(loss[3]) && isnan(g[3 * n_in]) && isnan(loss[4]) && isnan(g[4 * n_in]) && isnan(loss[5]));
  bad += !(loss[6] > 31 && loss[6] < 33 && g[6 * n_in] > 31 && g[6 * n_in] < 32);
  if (bad)
    fprintf(stderr, "%s: losses %g %g %g, dx %g %g\n", name, (double)loss[0], (double)loss[1],
            (double)loss[2], (double)g[0], (double)g[n_in]);
  ks_results_add(out, loss, ROWS);
  ks_guard_free(&gx), ks_guard_free(&dx);
  ks_weight_destroy(ctx, weight);
  free(g);
  return bad;
}

Test(head_loss, extremes) {
  static const int64_t n_in[] = {1, 8};
  int64_t bad = 0;
  for (int i = 0; i < 2; i++)
    bad += ks_test_everywhere("head_loss", 200 + i, &n_in[i], run_extremes);
  cr_assert(bad == 0);
}

Test(head_loss, oracle_gradient_matches_central_differences) {
  enum { ROWS = 3, IN = 4, VOCAB = 9 };
  float *fw = ks_floats(VOCAB * IN, KS_FILL_SIGNED, 1), *fx = ks_floats(ROWS * IN, KS_FILL_SIGNED, 2);
  double *w = ks_doubles(fw, VOCAB * IN), *x = ks_doubles(fx, ROWS * IN), loss[ROWS], dx[ROWS * IN],
         scale[ROWS] = {1, -2, 0.5};
  int32_t targets[ROWS] = {8, 0, 3};
  oracle_head h = {ROWS, IN, VOCAB, w, NULL, x, targets, scale};
  oracle_head_loss(&h, loss, NULL, dx, NULL);
  for (int i = 0; i < ROWS * IN; i++) {
    const double step = 1e-5, saved = x[i];
    double side[2];
    for (int k = 0; k < 2; k++) {
      x[i] = saved + (k ? step : -step);
      oracle_head_loss(&h, loss, NULL, NULL, NULL);
      side[k] = scale[i / IN] * loss[i / IN];
    }
    x[i] = saved;
    cr_assert(fabs((side[1] - side[0]) / (2 * step) - dx[i]) <= 1e-9);
  }
  free(fw), free(fx), free(w), free(x);
}

Test(head_loss, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_weight *w = NULL;
  float values[12] = {0}, loss[2], scale[2] = {1, 1};
  int32_t targets[2] = {0, 2};
  cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = 3, .n_in = 4, .values = values}, &w) == KS_OK);
  ks_guard x = ks_guard_make_act(ctx, values, 8), dx = ks_guard_make_act(ctx, NULL, 8),
           workspace = ks_guard_make(ctx, NULL, (int64_t)(ks_head_loss_workspace(ctx, w, 2) / sizeof(float)));
  const ks_head_loss_args good = {w, x.p, targets, scale, loss, dx.p, 2, workspace.p};
#define BAD(change)                                                                                          \
  do {                                                                                                       \
    ks_head_loss_args a = good;                                                                              \
    cr_assert(ks_head_loss(ctx, &a) == KS_OK, "%s", ks_error_message());                                     \
    change;                                                                                                  \
    cr_assert(ks_head_loss(ctx, &a) == KS_EINVAL, "accepts " #change);                                       \
  } while (0)
  BAD(a.w = NULL);
  BAD(a.n_rows = -2);
  BAD(a.x = NULL);
  BAD(a.targets = NULL);
  BAD(a.loss = NULL);
  BAD(a.workspace = NULL);
  BAD(a.workspace = x.p);
  BAD(a.dx = x.p);
  int32_t high[2] = {0, 3}, low[2] = {-1, 0};
  BAD(a.targets = high);
  BAD(a.targets = low);
#undef BAD
  cr_assert(ks_head_loss_workspace(ctx, NULL, 2) == 0 && ks_head_loss_workspace(ctx, w, -1) == 0);
  cr_assert(ks_sync(ctx) == KS_OK);
  ks_guard_free(&x), ks_guard_free(&dx), ks_guard_free(&workspace);
  ks_weight_destroy(ctx, w);
  ks_ctx_destroy(ctx);
}
