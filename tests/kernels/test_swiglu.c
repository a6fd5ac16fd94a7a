#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t n;
  float gate_scale;
  bool alias;
} swiglu_case;

static const swiglu_case cases[] = {{0, 1, false},     {1, 1, false},    {31, 4, true},     {32, 1, false},
                                    {33, 0.01f, true}, {97, 20, false},  {111, 80, true},   {203, 1, false},
                                    {1023, 1, true},   {1025, 8, false}, {200003, 2, false}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const swiglu_case *c = test_case;
  const int64_t n = c->n;
  float *gate = ks_floats(n, KS_FILL_SIGNED, 1), *up = ks_floats(n, KS_FILL_SIGNED, 2),
        *dh = ks_floats(n, KS_FILL_SIGNED, 3);
  for (int64_t i = 0; i < n; i++)
    gate[i] *= c->gate_scale;
  double *gate64 = ks_doubles(gate, n), *up64 = ks_doubles(up, n), *dh64 = ks_doubles(dh, n);
  double *ref[6];
  for (int i = 0; i < 6; i++)
    ref[i] = ks_doubles(NULL, n);
  oracle_swiglu_forward(gate64, up64, n, ref[0], ref[1]);
  oracle_swiglu_backward(gate64, up64, dh64, n, ref[2], ref[3], ref[4], ref[5]);
  ks_guard g_gate = ks_guard_make(ctx, gate, n), g_up = ks_guard_make(ctx, up, n),
           g_dh = ks_guard_make(ctx, dh, n);
  ks_guard h = ks_guard_make(ctx, c->alias ? gate : NULL, n),
           dgate = ks_guard_make(ctx, c->alias ? gate : NULL, n);
  ks_guard dup = ks_guard_make(ctx, c->alias ? up : NULL, n);
  ks_swiglu_args f = {.gate = c->alias ? h.p : g_gate.p, .up = g_up.p, .h = h.p, .n = n};
  ks_swiglu_args b = {.gate = c->alias ? dgate.p : g_gate.p,
                      .up = c->alias ? dup.p : g_up.p,
                      .dh = g_dh.p,
                      .dgate = dgate.p,
                      .dup = dup.p,
                      .n = n};
  int64_t bad = ks_swiglu_forward(ctx, &f) != KS_OK;
  bad += ks_swiglu_backward(ctx, &b) != KS_OK;
  ks_guard *in[] = {&g_gate, &g_up, &g_dh}, *outs[] = {&h, &dgate, &dup};
  bad += ks_guard_check_output(name, &h, ref[0], ref[1], 4);
  bad += ks_guard_check_output(name, &dgate, ref[2], ref[4], 4) +
         ks_guard_check_output(name, &dup, ref[3], ref[5], 4);
  for (int i = 0; i < 3; i++) {
    bad += ks_guard_check_input(name, in[i]);
    ks_results_add_guard(out, outs[i]);
    ks_guard_free(in[i]);
    ks_guard_free(outs[i]);
  }
  void *all[] = {gate, up, dh, gate64, up64, dh64};
  for (int i = 0; i < 6; i++)
    free(all[i]), free(ref[i]);
  return bad;
}

Test(swiglu, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("swiglu", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(swiglu, extremes) {
  float gate[] = {0, -0.0f, 1e30f, -1e30f, 88.8f, -88.8f, -104, NAN, INFINITY}, up[9], h[9], dh[9], dgate[9],
        dup[9];
  for (int i = 0; i < 9; i++)
    up[i] = dh[i] = 1;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    ks_swiglu_args a = {.gate = gate, .up = up, .h = h, .dh = dh, .dgate = dgate, .dup = dup, .n = 9};
    cr_assert(ks_swiglu_forward(ctx, &a) == KS_OK && ks_swiglu_backward(ctx, &a) == KS_OK);
    cr_assert(h[0] == 0 && h[1] == 0 && h[2] == 1e30f && h[3] == 0 && h[4] == 88.8f && fabsf(h[5]) < 1e-30f);
    cr_assert(h[6] == 0 || fabsf(h[6]) < 1e-40f);
    cr_assert(isnan(h[7]) && h[8] == INFINITY);
    cr_assert(dgate[0] == 0.5f && dgate[4] == 1 && isnan(dgate[7]) && dup[2] == 1e30f);
    ks_ctx_destroy(ctx);
  }
}

Test(swiglu, oracle_gradient_matches_central_differences) {
  const double h = 1e-5, points[] = {-20, -3, -0.5, 0, 0.1, 2, 15};
  for (int i = 0; i < 7; i++) {
    double up = 1.7, dh = 0.3, dgate, dup, f[2];
    oracle_swiglu_backward(&points[i], &up, &dh, 1, &dgate, &dup, NULL, NULL);
    for (int side = 0; side < 2; side++) {
      double z = points[i] + (side ? h : -h);
      oracle_swiglu_forward(&z, &up, 1, &f[side], NULL);
    }
    cr_assert(fabs(dh * (f[1] - f[0]) / (2 * h) - dgate) <= h * h);
    double unit = 1, base;
    oracle_swiglu_forward(&points[i], &unit, 1, &base, NULL);
    cr_assert(fabs(dh * base - dup) <= 1e-15 * (1 + fabs(dup)));
  }
}

Test(swiglu, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[40] = {0};
  const ks_swiglu_args good = {
      .gate = x, .up = x + 8, .h = x + 16, .dh = x + 24, .dgate = x, .dup = x + 8, .n = 8};
  ks_swiglu_args a = good;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_OK && ks_swiglu_backward(ctx, &a) == KS_OK);
  a.n = -1;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  a = good, a.h = x + 4;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  a = good, a.dgate = x + 24; /* dh may not be overwritten */
  cr_assert(ks_swiglu_backward(ctx, &a) == KS_EINVAL);
  a = good, a.dgate = x + 8; /* up's gradient takes up's place, not the gate's */
  cr_assert(ks_swiglu_backward(ctx, &a) == KS_EINVAL);
  a = good, a.up = NULL;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}
