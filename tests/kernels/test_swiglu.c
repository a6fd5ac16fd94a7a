#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int64_t n;
  float gate_scale;
  bool alias;
  int shift; /* elements by which the arrays are off their alignment */
} swiglu_case;

static const swiglu_case cases[] = {
    {0, 1, false, 0},     {1, 1, false, 0},      {31, 4, true, 0},     {32, 1, false, 0},
    {33, 0.01f, true, 0}, {97, 20, false, 0},    {111, 80, true, 0},   {203, 1, false, 1},
    {256, 3, true, 2},    {1023, 1, true, 0},    {1025, 8, false, 0},  {2049, 2, false, 0},
    {2048, 2, true, 0},   {200003, 2, false, 0}, {73736, 3, false, 0}, {69632, 2, true, 0}};

enum { GATE, UP, DH, N_INPUTS };
enum { H, DGATE, DUP, N_OUTPUTS };
typedef struct {
  float *in[N_INPUTS];
  double *in64[N_INPUTS], *ref[N_OUTPUTS], *size[N_OUTPUTS];
} swiglu_arrays;

static swiglu_arrays arrays_of(const ks_ctx *ctx, const swiglu_case *c) {
  swiglu_arrays r;
  for (int i = 0; i < N_INPUTS; i++) {
    r.in[i] = ks_floats(c->n, KS_FILL_SIGNED, (uint64_t)i + 1);
    for (int64_t j = 0; i == GATE && j < c->n; j++)
      r.in[i][j] *= c->gate_scale;
    ks_act_round(ctx, r.in[i], c->n);
    r.in64[i] = ks_doubles(r.in[i], c->n);
    r.ref[i] = ks_doubles(NULL, c->n);
    r.size[i] = ks_doubles(NULL, c->n);
  }
  oracle_swiglu_forward(r.in64[GATE], r.in64[UP], c->n, r.ref[H], r.size[H]);
  oracle_swiglu_backward(r.in64[GATE], r.in64[UP], r.in64[DH], c->n, r.ref[DGATE], r.ref[DUP], r.size[DGATE],
                         r.size[DUP]);
  return r;
}

static void free_arrays(swiglu_arrays *r) {
  for (int i = 0; i < N_INPUTS; i++)
    free(r->in[i]), free(r->in64[i]), free(r->ref[i]), free(r->size[i]);
}

/* An array whose `shift` first elements do not count; values NULL: NaN. */
static ks_guard shifted(ks_ctx *ctx, const float *values, int64_t n, int shift) {
  float *wide = ks_floats(n + shift, KS_FILL_INTEGER, 9);
  if (values) memcpy(wide + shift, values, (size_t)n * sizeof *wide);
  ks_guard g = ks_guard_make_act(ctx, values ? wide : NULL, n + shift);
  free(wide);
  return g;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const swiglu_case *c = test_case;
  if (ks_test_is_shim() && c->n > 100000) return 0;
  swiglu_arrays r = arrays_of(ctx, c);
  const float *before[N_OUTPUTS] = {r.in[GATE], r.in[GATE], r.in[UP]};
  ks_guard in[N_INPUTS], outs[N_OUTPUTS];
  void *i_p[N_INPUTS], *o_p[N_OUTPUTS];
  for (int i = 0; i < N_INPUTS; i++) {
    in[i] = shifted(ctx, r.in[i], c->n, c->shift);
    outs[i] = shifted(ctx, c->alias ? before[i] : NULL, c->n, c->shift);
    i_p[i] = ks_guard_at(&in[i], c->shift), o_p[i] = ks_guard_at(&outs[i], c->shift);
  }
  ks_swiglu_args a = {.gate = c->alias ? o_p[H] : i_p[GATE], .up = i_p[UP], .h = o_p[H], .n = c->n};
  int64_t bad = ks_swiglu_forward(ctx, &a) != KS_OK;
  a.gate = c->alias ? o_p[DGATE] : i_p[GATE];
  a.up = c->alias ? o_p[DUP] : i_p[UP];
  a.dh = i_p[DH], a.dgate = o_p[DGATE], a.dup = o_p[DUP];
  bad += ks_swiglu_backward(ctx, &a) != KS_OK;
  for (int i = 0; i < N_INPUTS; i++) {
    float *got = ks_guard_read(&outs[i]);
    bad += ks_guard_check_walls(name, &outs[i]) + ks_guard_check_input(name, &in[i]);
    for (int64_t j = 0; j < c->n; j++)
      if (!(fabs((double)got[c->shift + j] - r.ref[i][j]) <=
            ks_tolerance_rounded(r.ref[i][j], r.size[i][j], 4, ks_act_roundoff(ctx), 0)) &&
          bad++ < 4)
        fprintf(stderr, "%s: output %d [%lld] is %.9g, wants %.9g\n", name, i, (long long)j,
                (double)got[c->shift + j], r.ref[i][j]);
    ks_results_add(out, got + c->shift, c->n);
    free(got);
    ks_guard_free(&in[i]);
    ks_guard_free(&outs[i]);
  }
  free_arrays(&r);
  return bad;
}

Test(swiglu, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("swiglu", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(swiglu, extremes) {
  enum { N = 9 };
  const float gate[N] = {0, -0.0f, 1e30f, -1e30f, 88.8f, -88.8f, -104, NAN, INFINITY};
  float ones[N];
  for (int i = 0; i < N; i++)
    ones[i] = 1;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    float z[N];
    memcpy(z, gate, sizeof z);
    ks_act_round(ctx, z, N);
    ks_guard g[6];
    for (int i = 0; i < 6; i++)
      g[i] = ks_guard_make_act(ctx, i == 0 ? z : i < 3 ? ones : NULL, N);
    ks_swiglu_args a = {
        .gate = g[0].p, .up = g[1].p, .dh = g[2].p, .h = g[3].p, .dgate = g[4].p, .dup = g[5].p, .n = N};
    cr_assert(ks_swiglu_forward(ctx, &a) == KS_OK && ks_swiglu_backward(ctx, &a) == KS_OK);
    float *h = ks_guard_read(&g[3]), *dgate = ks_guard_read(&g[4]), *dup = ks_guard_read(&g[5]);
    cr_assert(h[0] == 0 && h[1] == 0 && h[2] == z[2] && h[3] == 0 && h[4] == z[4] && fabsf(h[5]) < 1e-30f);
    cr_assert(h[6] == 0 || fabsf(h[6]) < 1e-40f);
    cr_assert(isnan(h[7]) && h[8] == INFINITY);
    cr_assert(dgate[0] == 0.5f && dgate[4] == 1 && isnan(dgate[7]) && dup[2] == z[2]);
    free(h), free(dgate), free(dup);
    for (int i = 0; i < 6; i++)
      ks_guard_free(&g[i]);
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
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x = ks_guard_make_act(ctx, NULL, 40);
  void *at[5];
  for (int i = 0; i < 5; i++)
    at[i] = ks_guard_at(&x, 8 * i);
  const ks_swiglu_args good = {
      .gate = at[0], .up = at[1], .h = at[2], .dh = at[3], .dgate = at[0], .dup = at[1], .n = 8};
  ks_swiglu_args a = good;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_OK && ks_swiglu_backward(ctx, &a) == KS_OK);
  a.n = -1;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  a = good, a.h = ks_guard_at(&x, 4);
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  a = good, a.dgate = at[3]; /* dh may not be overwritten */
  cr_assert(ks_swiglu_backward(ctx, &a) == KS_EINVAL);
  a = good, a.dgate = at[1]; /* up's gradient takes up's place, not the gate's */
  cr_assert(ks_swiglu_backward(ctx, &a) == KS_EINVAL);
  a = good, a.up = NULL;
  cr_assert(ks_swiglu_forward(ctx, &a) == KS_EINVAL);
  a = good, a.up = a.h = at[0], a.n = (int64_t)1 << 45; /* more blocks than a grid has; nothing runs */
  cr_assert(!ks_test_is_cuda() || ks_swiglu_forward(ctx, &a) == KS_EUNSUPPORTED);
  ks_guard_free(&x);
  ks_ctx_destroy(ctx);
}
