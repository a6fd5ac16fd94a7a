#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n_rows, n_in, n_vocab;
  ks_fill_kind fill;
  float sharpness; /* factor on x */
  ks_dtype dtype;
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
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

typedef struct {
  float *w, *bias, *x, *row_scale;
  int32_t *targets;
} inputs;

static inputs make_inputs(const head_case *c) {
  inputs in = {ks_floats(c->n_vocab * c->n_in, c->fill, 1), ks_floats(c->n_vocab, c->fill, 2),
               ks_floats(c->n_rows * c->n_in, c->fill, 3), ks_floats(c->n_rows, KS_FILL_SIGNED, 4),
               calloc((size_t)c->n_rows + 1, sizeof(int32_t))};
  for (int64_t i = 0; i < c->n_rows * c->n_in; i++)
    in.x[i] *= c->sharpness;
  for (int64_t i = 0; i < c->n_rows; i++)
    in.targets[i] = (int32_t)((i * 7919 + 3) % c->n_vocab);
  if (c->n_rows > 2) in.row_scale[2] = 0;
  return in;
}

static void free_inputs(inputs *in) {
  free(in->w), free(in->bias), free(in->x), free(in->row_scale), free(in->targets);
}

static int64_t check(const head_case *c, const inputs *in, const float *loss, const ks_guard *dx,
                     const char *name) {
  const int64_t n_x = c->n_rows * c->n_in, n_w = c->n_vocab * c->n_in;
  double *w = ks_doubles(in->w, n_w), *bias = ks_doubles(in->bias, c->n_vocab), *x = ks_doubles(in->x, n_x),
         *scale = ks_doubles(in->row_scale, c->n_rows),
         *ref[4] = {ks_doubles(NULL, c->n_rows), ks_doubles(NULL, c->n_rows), ks_doubles(NULL, n_x),
                    ks_doubles(NULL, n_x)};
  for (int64_t i = 0; c->dtype == KS_DTYPE_BF16 && i < n_w; i++)
    w[i] = oracle_bf16(w[i]);
  for (int64_t i = 0; c->dtype == KS_DTYPE_BF16 && i < n_x; i++)
    x[i] = oracle_bf16(x[i]);
  oracle_head h = {
      c->n_rows, c->n_in, c->n_vocab, w, c->bias ? bias : NULL, x, in->targets, c->scale ? scale : NULL};
  oracle_head_loss(&h, ref[0], ref[1], c->loss_only ? NULL : ref[2], ref[3]);
  const double chain = (double)(c->n_in + c->n_vocab);
  int64_t bad = ks_check_close(name, loss, ref[0], ref[1], c->n_rows, chain);
  if (!c->loss_only) bad += ks_guard_check_output(name, dx, ref[2], ref[3], chain);
  double *all[] = {w, bias, x, scale, ref[0], ref[1], ref[2], ref[3]};
  for (int i = 0; i < 8; i++)
    free(all[i]);
  return bad;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const head_case *c = test_case;
  inputs in = make_inputs(c);
  ks_weight *w = NULL;
  ks_weight_params wp = {c->n_vocab, c->n_in, c->dtype, KS_DTYPE_F32, in.w, c->bias ? in.bias : NULL};
  cr_assert(ks_weight_create(ctx, &wp, &w) == KS_OK, "%s", ks_error_message());
  ks_guard x = ks_guard_make(ctx, in.x, c->n_rows * c->n_in),
           dx = ks_guard_make(ctx, NULL, c->n_rows * c->n_in), loss = ks_guard_make(ctx, NULL, c->n_rows);
  ks_guard workspace =
      ks_guard_make(ctx, NULL, (int64_t)(ks_head_loss_workspace(w, c->n_rows) / sizeof(float)));
  ks_head_loss_args a = {.w = w,
                         .x = x.p,
                         .targets = in.targets,
                         .row_scale = c->scale ? in.row_scale : NULL,
                         .loss = loss.p,
                         .dx = c->loss_only ? NULL : dx.p,
                         .n_rows = c->n_rows,
                         .workspace = workspace.p};
  int64_t bad = ks_head_loss(ctx, &a) != KS_OK;
  bad += check(c, &in, loss.p, &dx, name) + ks_guard_check_input(name, &x) +
         ks_guard_check_walls(name, &workspace) + ks_guard_check_walls(name, &loss);
  if (c->dtype == KS_DTYPE_F32 || strcmp(ks_ctx_isa_name(ctx), "avx512bf16") != 0) {
    ks_results_add_guard(out, &loss);
    if (!c->loss_only) ks_results_add_guard(out, &dx);
  }
  ks_guard *all[] = {&x, &dx, &loss, &workspace};
  for (int i = 0; i < 4; i++)
    ks_guard_free(all[i]);
  ks_weight_destroy(ctx, w);
  free_inputs(&in);
  return bad;
}

Test(head_loss, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("head_loss", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* With a bf16 head the gradient's left factor is rounded too: compared with the oracle fed with rounded
 * weights, within what rounding the factors to 8 bits may do. */
Test(head_loss, bf16_gradient) {
  const head_case c = {21, 50, 150, KS_FILL_SIGNED, 2, KS_DTYPE_BF16, true, false, false};
  inputs in = make_inputs(&c);
  const int64_t n_x = c.n_rows * c.n_in, n_w = c.n_vocab * c.n_in;
  double *w = ks_doubles(in.w, n_w), *x = ks_doubles(in.x, n_x), *scale = ks_doubles(in.row_scale, c.n_rows),
         *loss = ks_doubles(NULL, c.n_rows), *dx = ks_doubles(NULL, n_x), *size = ks_doubles(NULL, n_x);
  for (int64_t i = 0; i < n_w; i++)
    w[i] = oracle_bf16(w[i]);
  for (int64_t i = 0; i < n_x; i++)
    x[i] = oracle_bf16(x[i]);
  oracle_head h = {c.n_rows, c.n_in, c.n_vocab, w, NULL, x, in.targets, scale};
  oracle_head_loss(&h, loss, NULL, dx, size);
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    ks_weight *weight = NULL;
    ks_weight_params wp = {c.n_vocab, c.n_in, KS_DTYPE_BF16, KS_DTYPE_F32, in.w, NULL};
    cr_assert(ks_weight_create(ctx, &wp, &weight) == KS_OK);
    float *got = malloc(sizeof(float) * (size_t)n_x), losses[32];
    void *workspace = malloc(ks_head_loss_workspace(weight, c.n_rows));
    ks_head_loss_args a = {weight, in.x, in.targets, in.row_scale, losses, got, c.n_rows, workspace};
    cr_assert(ks_head_loss(ctx, &a) == KS_OK);
    for (int64_t i = 0; i < n_x; i++)
      cr_assert(fabs((double)got[i] - dx[i]) <= 0x1p-8 * size[i] + ks_tolerance(dx[i], size[i], 200));
    free(got), free(workspace);
    ks_weight_destroy(ctx, weight);
    ks_ctx_destroy(ctx);
  }
  double *all[] = {w, x, scale, loss, dx, size};
  for (int i = 0; i < 6; i++)
    free(all[i]);
  free_inputs(&in);
}

Test(head_loss, row_alone_has_the_same_bits) {
  const head_case c = {70, 33, 311, KS_FILL_SIGNED, 3, KS_DTYPE_F32, true, false, false};
  inputs in = make_inputs(&c);
  int64_t bad = 0;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    ks_weight *w = NULL;
    ks_weight_params wp = {c.n_vocab, c.n_in, KS_DTYPE_F32, KS_DTYPE_F32, in.w, NULL};
    cr_assert(ks_weight_create(ctx, &wp, &w) == KS_OK);
    float loss[70], one_loss, dx[70 * 33], one_dx[33];
    void *workspace = malloc(ks_head_loss_workspace(w, 70));
    ks_head_loss_args a = {w, in.x, in.targets, in.row_scale, loss, dx, c.n_rows, workspace};
    cr_assert(ks_head_loss(ctx, &a) == KS_OK);
    for (int i = 0; i < 70; i += 23) {
      ks_head_loss_args one = {w, in.x + i * 33, in.targets + i, in.row_scale + i, &one_loss, one_dx,
                               1, workspace};
      cr_assert(ks_head_loss(ctx, &one) == KS_OK);
      bad += ks_check_same("loss alone", &one_loss, loss + i, 1) +
             ks_check_same("dx alone", one_dx, dx + i * 33, 33);
    }
    free(workspace);
    ks_weight_destroy(ctx, w);
    ks_ctx_destroy(ctx);
  }
  free_inputs(&in);
  cr_assert(bad == 0);
}

Test(head_loss, extremes) {
  /* One input: the logits are x times the weights. */
  float w[40], x[5] = {1e4f, -1e4f, 0, NAN, INFINITY}, loss[5], dx[5];
  int32_t targets[5] = {39, 39, 0, 0, 0};
  for (int i = 0; i < 40; i++)
    w[i] = (float)i;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    ks_weight *weight = NULL;
    cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = 40, .n_in = 1, .values = w}, &weight) ==
              KS_OK);
    void *workspace = malloc(ks_head_loss_workspace(weight, 5));
    ks_head_loss_args a = {weight, x, targets, NULL, loss, dx, 5, workspace};
    cr_assert(ks_head_loss(ctx, &a) == KS_OK);
    cr_assert(loss[0] == 0 && dx[0] == 0, "a certain prediction has no loss: %g %g", (double)loss[0],
              (double)dx[0]);
    cr_assert(loss[1] == 390000 && dx[1] == -39);
    cr_assert(fabs((double)loss[2] - log(40)) <= 1e-6 && fabs((double)dx[2] - 19.5) <= 1e-5);
    cr_assert(isnan(loss[3]) && isnan(dx[3]) && isnan(loss[4]) && isnan(dx[4]));
    free(workspace);
    ks_weight_destroy(ctx, weight);
    ks_ctx_destroy(ctx);
  }
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
  ks_ctx *ctx = NULL;
  ks_weight *w = NULL;
  float values[12] = {0}, x[8] = {0}, dx[8], loss[2], scale[2] = {1, 1}, *workspace;
  int32_t targets[2] = {0, 2};
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = 3, .n_in = 4, .values = values}, &w) == KS_OK);
  workspace = malloc(ks_head_loss_workspace(w, 2));
  const ks_head_loss_args good = {w, x, targets, scale, loss, dx, 2, workspace};
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
  BAD(a.workspace = x);
  BAD(a.dx = x);
  int32_t high[2] = {0, 3}, low[2] = {-1, 0};
  BAD(a.targets = high);
  BAD(a.targets = low);
#undef BAD
  cr_assert(ks_head_loss_workspace(NULL, 2) == 0 && ks_head_loss_workspace(w, -1) == 0);
  free(workspace);
  ks_weight_destroy(ctx, w);
  ks_ctx_destroy(ctx);
}
