#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/* The path of one parameter vector: float64 oracle beside the operation, with the size of what rounding may
 * have moved so far. */
typedef struct {
  int64_t n;
  double *p, *m, *v, *size, *m_size;
} path;

static path new_path(const float *p, int64_t n) {
  return (path){n,
                ks_doubles(p, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n)};
}
static void free_path(path *p) {
  free(p->p), free(p->m), free(p->v), free(p->size), free(p->m_size);
}

/* One step: a few roundings of p, and of the update with |g| in place of g in its first moment. */
static void advance(path *p, const float *grad, int64_t step, const oracle_adamw_params *h) {
  double *g = ks_doubles(grad, p->n);
  oracle_adamw(p->p, p->m, p->v, g, p->n, step, h);
  for (int64_t i = 0; i < p->n; i++) {
    p->m_size[i] = h->beta1 * p->m_size[i] + (1 - h->beta1) * fabs(g[i] * h->grad_scale);
    double c1 = 1 - pow(h->beta1, (double)step), c2 = 1 - pow(h->beta2, (double)step);
    p->size[i] += fabs(p->p[i]) + h->lr * p->m_size[i] / c1 / (sqrt(p->v[i] / c2) + h->eps);
  }
  free(g);
}

typedef struct {
  int64_t n;
  double lr, decay;
} adamw_case;
static const adamw_case cases[] = {{0, 1e-3, 0}, {1, 1e-3, 0.1},    {31, 1e-2, 0},      {32, 1e-3, 0.01},
                                   {33, 1, 0},   {1025, 1e-3, 0.1}, {300007, 1e-4, 0.1}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const adamw_case *c = test_case;
  float *p = ks_floats(c->n, KS_FILL_SIGNED, 1), *zero = ks_floats(c->n, KS_FILL_SIGNED, 0),
        *grad = ks_floats(c->n, KS_FILL_SIGNED, 2);
  memset(zero, 0, (size_t)c->n * sizeof *zero);
  ks_guard gp = ks_guard_make(ctx, p, c->n), gm = ks_guard_make(ctx, zero, c->n),
           gv = ks_guard_make(ctx, zero, c->n);
  path ref = new_path(p, c->n);
  const oracle_adamw_params h = {c->lr, 0.9, 0.999, 1e-8, c->decay, 0.25};
  int64_t bad = 0;
  for (int64_t step = 1; step <= 3; step++) {
    ks_fill(grad, c->n, KS_FILL_SIGNED, (uint64_t)step);
    ks_guard gg = ks_guard_make(ctx, grad, c->n);
    ks_adamw_args a = {gp.p,    gm.p,    gv.p,  gg.p,           c->n,         h.lr,
                       h.beta1, h.beta2, h.eps, h.weight_decay, h.grad_scale, step};
    bad += ks_adamw(ctx, &a) != KS_OK;
    advance(&ref, grad, step, &h);
    bad += ks_guard_check_input(name, &gg) + ks_guard_check_output(name, &gp, ref.p, ref.size, (double)step);
    bad += ks_guard_check_output(name, &gm, ref.m, ref.m_size, (double)step) +
           ks_guard_check_output(name, &gv, ref.v, NULL, (double)step);
    ks_guard_free(&gg);
  }
  ks_guard *outs[] = {&gp, &gm, &gv};
  for (int i = 0; i < 3; i++) {
    ks_results_add_guard(out, outs[i]);
    ks_guard_free(outs[i]);
  }
  free_path(&ref);
  free(p), free(zero), free(grad);
  return bad;
}

Test(adamw, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("adamw", i, &cases[i], run);
  cr_assert(bad == 0);
}

static bool read_line(FILE *f, const char *name, float *x, int n) {
  char word[8];
  if (fscanf(f, "%7s", word) != 1 || strcmp(word, name) != 0) return false;
  for (int i = 0; i < n; i++)
    if (fscanf(f, "%a", &x[i]) != 1) return false;
  return true;
}

/* Twenty steps of torch.optim.AdamW, with and without clipping: torch and we are both near the float64 path.
 */
Test(adamw, torch_trajectories) {
  enum { MAX = 64 };
  FILE *f = fopen(KS_SOURCE_DIR "/tests/fixtures/kernels/adamw.txt", "r");
  cr_assert(f != NULL);
  cr_assert(fscanf(f, "# torch %*s") == 0);
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  oracle_adamw_params h;
  double max_norm;
  int n, steps, runs = 0;
  int64_t bad = 0;
  while (fscanf(f, " run %lf %lf %lf %lf %lf %lf %d %d", &h.lr, &h.beta1, &h.beta2, &h.eps, &h.weight_decay,
                &max_norm, &n, &steps) == 8) {
    float p[MAX], m[MAX] = {0}, v[MAX] = {0}, g[MAX], torch_p[MAX];
    cr_assert(n <= MAX && read_line(f, "p", p, n));
    path ref = new_path(p, n);
    for (int step = 1; step <= steps; step++) {
      double squares;
      cr_assert(read_line(f, "g", g, n) && read_line(f, "p", torch_p, n));
      cr_assert(ks_sum_squares(ctx, g, n, &squares) == KS_OK);
      h.grad_scale = max_norm > 0 ? fmin(1, max_norm / (sqrt(squares) + 1e-6)) : 1;
      ks_adamw_args a = {p, m, v, g, n, h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.grad_scale, step};
      cr_assert(ks_adamw(ctx, &a) == KS_OK);
      advance(&ref, g, step, &h);
      bad += ks_check_close("keepsake", p, ref.p, ref.size, n, step) +
             ks_check_close("torch", torch_p, ref.p, ref.size, n, step);
    }
    free_path(&ref);
    runs++;
  }
  cr_assert(runs == 3 && bad == 0);
  fclose(f);
  ks_ctx_destroy(ctx);
}

static int64_t run_squares(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const int64_t n = *(const int64_t *)test_case;
  int64_t bad = 0;
  for (int fill = 0; fill < KS_FILL_KINDS; fill++) {
    float *x = ks_floats(n, (ks_fill_kind)fill, 1);
    long double ref = 0;
    double got = NAN;
    for (int64_t i = 0; i < n; i++)
      ref += (long double)x[i] * x[i];
    bad += ks_sum_squares(ctx, x, n, &got) != KS_OK;
    /* The worst that n / 16 additions can do: squares near one often fall on ties, which do not average out.
     */
    if (!(fabsl(got - ref) <= (4 + (long double)n / 16) * 0x1p-53L * ref) ||
        (fill == KS_FILL_INTEGER && got != ref)) {
      fprintf(stderr, "%s: sum of squares %.17g, wants %.21Lg\n", name, got, ref);
      bad++;
    }
    ks_results_add_bytes(out, &got, sizeof got);
    free(x);
  }
  return bad;
}

Test(adamw, sum_squares) {
  static const int64_t sizes[] = {0, 1, 15, 16, 17, 97, 1023, 1025, 4096, 4097, 65537, 1000003};
  int64_t bad = 0;
  for (int i = 0; i < 12; i++)
    bad += ks_test_everywhere("sum_squares", i, &sizes[i], run_squares);
  cr_assert(bad == 0);
}

/* The bits of a parameter's step do not depend on what lies beside it; NaN stays where it is. */
Test(adamw, elements_stand_alone) {
  enum { N = 37 };
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}) == KS_OK);
  float p[N], g[N], m[N] = {0}, v[N] = {0};
  ks_fill(p, N, KS_FILL_SIGNED, 1), ks_fill(g, N, KS_FILL_SIGNED, 2);
  g[20] = NAN;
  float q[N];
  memcpy(q, p, sizeof p);
  ks_adamw_args a = {p, m, v, g, N, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1};
  cr_assert(ks_adamw(ctx, &a) == KS_OK);
  for (int i = 0; i < N; i++) {
    float m1 = 0, v1 = 0;
    a.p = &q[i], a.m = &m1, a.v = &v1, a.grad = &g[i], a.n = 1;
    cr_assert(ks_adamw(ctx, &a) == KS_OK);
    cr_assert(isnan(p[i]) == (i == 20));
  }
  cr_assert(ks_check_same("alone", p, q, N) == 0);
  ks_ctx_destroy(ctx);
}

Test(adamw, illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[4][8] = {{0}};
  const ks_adamw_args good = {x[0], x[1], x[2], x[3], 8, 1e-3, 0.9, 0.999, 1e-8, 0, 1, 1};
  ks_adamw_args a = good;
  cr_assert(ks_adamw(ctx, &a) == KS_OK);
  a.step = 0;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.beta1 = 1;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.beta2 = NAN;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.lr = INFINITY;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.m = x[0];
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.grad = NULL;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  a = good, a.n = -1;
  cr_assert(ks_adamw(ctx, &a) == KS_EINVAL);
  cr_assert(ks_sum_squares(ctx, x[0], 8, NULL) == KS_EINVAL &&
            ks_sum_squares(ctx, NULL, 8, &(double){0}) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}
