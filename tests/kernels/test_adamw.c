#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/* The path of one parameter vector: float64 oracle beside the operation, with the size of what rounding may
 * have moved so far. */
typedef struct {
  int64_t n;
  double *p, *m, *v, *size, *m_size, *v_size;
} path;

static path new_path(const float *p, int64_t n) {
  return (path){n,
                ks_doubles(p, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n),
                ks_doubles(NULL, n)};
}
static void free_path(path *p) {
  free(p->p), free(p->m), free(p->v), free(p->size), free(p->m_size), free(p->v_size);
}

/* One step: a few roundings of p, and of the update with |g| in place of g in its first moment. What rounds g
 * * c counts twice in its square. */
static void advance(path *p, const float *grad, int64_t step, const oracle_adamw_params *h) {
  double *g = ks_doubles(grad, p->n);
  oracle_adamw(p->p, p->m, p->v, g, p->n, step, h);
  for (int64_t i = 0; i < p->n; i++) {
    p->m_size[i] = h->beta1 * p->m_size[i] + (1 - h->beta1) * fabs(g[i] * h->grad_scale);
    p->v_size[i] = 2 * p->v[i];
    double c1 = 1 - pow(h->beta1, (double)step), c2 = 1 - pow(h->beta2, (double)step);
    p->size[i] += fabs(p->p[i]) + h->lr * p->m_size[i] / c1 / (sqrt(p->v[i] / c2) + h->eps);
  }
  free(g);
}

enum { MAX_JOBS = 6 };
typedef struct {
  int64_t n[MAX_JOBS];
  int n_jobs, shift; /* elements by which the arrays of odd jobs are off their alignment */
  double lr, decay, max_norm;
} adamw_case;
/* Around the ends of vectors, of a GPU's chunk and of the CPU's stretches; adapters of very different sizes
 * together. */
static const adamw_case cases[] = {
    {{0}, 0, 0, 1e-3, 0, 1},
    {{0}, 1, 0, 1e-3, 0, 1},
    {{1}, 1, 0, 1e-3, 0.1, 0.25},
    {{31, 32, 33}, 3, 1, 1e-2, 0, 0},
    {{0, 1025, 0, 7, 97, 0}, 6, 0, 1e-3, 0.01, 2.5},
    {{5, 4095, 4096, 4097}, 4, 0, 1, 0.1, 0.3},
    {{8193, 20000, 3, 16}, 4, 2, 1e-3, 0.1, 1e6},
    {{300007}, 1, 0, 1e-4, 0.1, 3},
    {{270001, 270001, 0, 4097}, 4, 0, 1e-3, 0.1, 0.5}, /* more gradients than half of a small L2 */
};

/* One adapter on the backend and its float64 twin. */
typedef struct {
  ks_guard p, m, v, grad;
  path ref;
  float *host_grad;
  double norm;
} adapter;

static adapter new_adapter(ks_ctx *ctx, int64_t n, int shift, uint64_t seed) {
  float *p = ks_floats(n + shift, KS_FILL_SIGNED, seed),
        *zero = calloc((size_t)(n + shift) + 1, sizeof *zero);
  cr_assert(zero != NULL);
  const adapter a = {.p = ks_guard_make(ctx, p, n + shift),
                     .m = ks_guard_make(ctx, zero, n + shift),
                     .v = ks_guard_make(ctx, zero, n + shift),
                     .grad = ks_guard_make(ctx, zero, n + shift),
                     .ref = new_path(p + shift, n),
                     .host_grad = zero};
  free(p);
  return a;
}

static void free_adapter(adapter *a) {
  ks_guard_free(&a->p), ks_guard_free(&a->m), ks_guard_free(&a->v), ks_guard_free(&a->grad);
  free_path(&a->ref);
  free(a->host_grad);
}

static ks_adamw_job job_of(const adapter *a, int shift, int64_t step, const oracle_adamw_params *h,
                           double max_norm) {
  return (ks_adamw_job){ks_guard_at(&a->p, shift),
                        ks_guard_at(&a->m, shift),
                        ks_guard_at(&a->v, shift),
                        ks_guard_at(&a->grad, shift),
                        a->ref.n,
                        h->lr,
                        h->beta1,
                        h->beta2,
                        h->eps,
                        h->weight_decay,
                        max_norm,
                        step};
}

/* New gradients on host and backend; their exact norm. */
static void set_grad(ks_ctx *ctx, adapter *a, int shift, uint64_t seed) {
  long double squares = 0;
  ks_fill(a->host_grad, a->ref.n + shift, KS_FILL_SIGNED, seed);
  for (int64_t i = 0; i < a->ref.n; i++)
    squares += (long double)a->host_grad[shift + i] * a->host_grad[shift + i];
  a->norm = (double)sqrtl(squares);
  if (a->ref.n + shift > 0)
    cr_assert(ks_mem_upload(ctx, a->grad.p, a->host_grad, (size_t)(a->ref.n + shift) * sizeof(float)) ==
              KS_OK);
}

/* The worst that n / 16 additions in double can do to the norm: squares near one often fall on ties, which do
 * not average out. */
static bool norm_is_near(double got, double want, int64_t n) {
  return fabs(got - want) <= (4 + (double)n / 16) * 0x1p-53 * want;
}

/* Element i + shift of a guard against element i of the path; the shift's own elements keep their bits. */
static int64_t check_shifted(const char *name, const ks_guard *g, int shift, const double *ref,
                             const double *size, int64_t n, double chain) {
  float *got = ks_guard_read(g);
  int64_t bad = ks_guard_check_walls(name, g) + ks_check_close(name, got + shift, ref, size, n, chain);
  free(got);
  return bad;
}

static int64_t check_adapter(const char *name, adapter *a, int shift, int64_t step, double norm) {
  int64_t bad = check_shifted(name, &a->p, shift, a->ref.p, a->ref.size, a->ref.n, (double)step) +
                check_shifted(name, &a->m, shift, a->ref.m, a->ref.m_size, a->ref.n, (double)step) +
                check_shifted(name, &a->v, shift, a->ref.v, a->ref.v_size, a->ref.n, (double)step);
  float *grad = ks_guard_read(&a->grad);
  for (int64_t i = 0; i < a->ref.n; i++)
    bad += grad[shift + i] != 0;
  for (int i = 0; i < shift; i++)
    bad += grad[i] != a->host_grad[i];
  if (!norm_is_near(norm, a->norm, a->ref.n)) {
    fprintf(stderr, "%s: norm %.17g, wants %.17g\n", name, norm, a->norm);
    bad++;
  }
  free(grad);
  return bad;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const adamw_case *c = test_case;
  if (ks_test_is_shim() && c->n_jobs == 1 && c->n[0] > 100000) return 0;
  adapter adapters[MAX_JOBS];
  ks_adamw_job jobs[MAX_JOBS];
  double norms[MAX_JOBS];
  int64_t bad = 0;
  oracle_adamw_params h = {c->lr, 0.9, 0.999, 1e-8, c->decay, 1};
  for (int i = 0; i < c->n_jobs; i++)
    adapters[i] = new_adapter(ctx, c->n[i], i % 2 * c->shift, (uint64_t)i + 1);
  for (int64_t step = 1; step <= 3; step++) {
    for (int i = 0; i < c->n_jobs; i++) {
      const int shift = i % 2 * c->shift;
      set_grad(ctx, &adapters[i], shift, (uint64_t)(step * MAX_JOBS + i));
      jobs[i] = job_of(&adapters[i], shift, step, &h, c->max_norm);
      norms[i] = NAN;
    }
    bad += ks_adamw(ctx, &(ks_adamw_args){jobs, c->n_jobs, norms}) != KS_OK;
    bad += ks_sync(ctx) != KS_OK;
    for (int i = 0; i < c->n_jobs; i++) {
      const int shift = i % 2 * c->shift;
      h.grad_scale = c->max_norm > 0 ? fmin(1, c->max_norm / (adapters[i].norm + 1e-6)) : 1;
      advance(&adapters[i].ref, adapters[i].host_grad + shift, step, &h);
      bad += check_adapter(name, &adapters[i], shift, step, norms[i]);
    }
    ks_results_add_bytes(out, norms, c->n_jobs * (int64_t)sizeof *norms);
  }
  for (int i = 0; i < c->n_jobs; i++) {
    ks_results_add_guard(out, &adapters[i].p);
    ks_results_add_guard(out, &adapters[i].m);
    ks_results_add_guard(out, &adapters[i].v);
    free_adapter(&adapters[i]);
  }
  return bad;
}

Test(adamw, oracle_everywhere) {
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

/* One adapter of n parameters with gradients of any size: host values in, host values out. */
static double step_alone(ks_ctx *ctx, const ks_adamw_job *like, float *p, float *m, float *v, float *grad,
                         int64_t n) {
  float *host[] = {p, m, v, grad};
  ks_guard g[4];
  double norm = NAN;
  for (int i = 0; i < 4; i++)
    g[i] = ks_guard_make(ctx, host[i], n);
  ks_adamw_job job = *like;
  job.p = g[0].p, job.m = g[1].p, job.v = g[2].p, job.grad = g[3].p, job.n = n;
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){&job, 1, &norm}) == KS_OK && ks_sync(ctx) == KS_OK, "%s",
            ks_error_message());
  for (int i = 0; i < 4; i++) {
    float *now = ks_guard_read(&g[i]);
    memcpy(host[i], now, (size_t)n * sizeof *now);
    free(now);
    ks_guard_free(&g[i]);
  }
  return norm;
}

/* Twenty steps of torch.optim.AdamW, with and without clipping: torch and we are both near the float64 path.
 */
Test(adamw, torch_trajectories) {
  enum { MAX = 64 };
  FILE *f = fopen(KS_SOURCE_DIR "/tests/fixtures/kernels/adamw.txt", "r");
  cr_assert(f != NULL);
  cr_assert(fscanf(f, "# torch %*s") == 0);
  ks_ctx *ctx = ks_test_any_ctx();
  oracle_adamw_params h;
  double max_norm;
  int n, steps, runs = 0;
  int64_t bad = 0;
  while (fscanf(f, " run %lf %lf %lf %lf %lf %lf %d %d", &h.lr, &h.beta1, &h.beta2, &h.eps, &h.weight_decay,
                &max_norm, &n, &steps) == 8) {
    float p[MAX], m[MAX] = {0}, v[MAX] = {0}, g[MAX], given[MAX], torch_p[MAX];
    cr_assert(n <= MAX && read_line(f, "p", p, n));
    path ref = new_path(p, n);
    for (int step = 1; step <= steps; step++) {
      cr_assert(read_line(f, "g", g, n) && read_line(f, "p", torch_p, n));
      memcpy(given, g, sizeof given);
      const ks_adamw_job job = {.lr = h.lr,
                                .beta1 = h.beta1,
                                .beta2 = h.beta2,
                                .eps = h.eps,
                                .weight_decay = h.weight_decay,
                                .max_grad_norm = max_norm,
                                .step = step};
      const double norm = step_alone(ctx, &job, p, m, v, g, n);
      h.grad_scale = max_norm > 0 ? fmin(1, max_norm / (norm + 1e-6)) : 1;
      advance(&ref, given, step, &h);
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

/* Norms of every kind of gradient; of whole numbers exactly. */
static int64_t run_norm(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const int64_t n = *(const int64_t *)test_case;
  int64_t bad = 0;
  if (ks_test_is_shim() && n > 100000) return 0;
  for (int fill = 0; fill < KS_FILL_KINDS; fill++) {
    float *x = ks_floats(n, (ks_fill_kind)fill, 1), *p = ks_floats(n, KS_FILL_SIGNED, 2),
          *m = calloc((size_t)n + 1, sizeof *m), *v = calloc((size_t)n + 1, sizeof *v);
    cr_assert(m && v);
    long double squares = 0;
    for (int64_t i = 0; i < n; i++)
      squares += (long double)x[i] * x[i];
    const ks_adamw_job job = {
        .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .max_grad_norm = 1, .step = 1};
    const double got = step_alone(ctx, &job, p, m, v, x, n), want = (double)sqrtl(squares);
    if (!norm_is_near(got, want, n) || (fill == KS_FILL_INTEGER && got != sqrt((double)squares))) {
      fprintf(stderr, "%s: norm %.17g, wants %.17g\n", name, got, want);
      bad++;
    }
    ks_results_add_bytes(out, &got, sizeof got);
    free(x), free(p), free(m), free(v);
  }
  return bad;
}

Test(adamw, norms) {
  static const int64_t sizes[] = {0, 1, 15, 16, 17, 97, 1023, 1025, 4096, 4097, 12289, 65537, 1000003};
  int64_t bad = 0;
  for (int i = 0; i < 13; i++)
    bad += ks_test_everywhere("adamw norm", i, &sizes[i], run_norm);
  cr_assert(bad == 0);
}

/* A norm beyond float32 is still one. */
Test(adamw, large_gradients) {
  ks_ctx *ctx = ks_test_any_ctx();
  float p[2] = {1, 1}, m[2] = {0}, v[2] = {0}, g[2] = {3e30f, 4e30f};
  const ks_adamw_job job = {
      .lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1e-8, .max_grad_norm = 5, .step = 1};
  const double norm = step_alone(ctx, &job, p, m, v, g, 2);
  cr_assert(fabs(norm / 5e30 - 1) < 1e-7 && fabsf(m[0] - 1.5f) < 1e-6f && fabsf(m[1] - 2) < 1e-6f &&
            g[0] == 0);
  cr_assert(fabsf(p[0] - 0.5f) < 1e-6f && fabsf(p[1] - 0.5f) < 1e-6f); /* the first step is of length lr */
  ks_ctx_destroy(ctx);
}

/* The bits of an adapter's step do not depend on its company; one without a finite norm stays as it is. */
static int64_t run_company(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { JOBS = 4 };
  static const int64_t sizes[JOBS] = {37, 9000, 4500, 130};
  const float wrong = *(const float *)test_case;
  const oracle_adamw_params h = {1e-3, 0.9, 0.999, 1e-8, 0.1, 1};
  adapter together[JOBS], alone[JOBS];
  ks_adamw_job jobs[JOBS];
  double norms[JOBS], norm = NAN;
  int64_t bad = 0;
  for (int i = 0; i < JOBS; i++) {
    adapter *two[] = {&together[i], &alone[i]};
    for (int k = 0; k < 2; k++) {
      *two[k] = new_adapter(ctx, sizes[i], 0, (uint64_t)i + 1);
      set_grad(ctx, two[k], 0, (uint64_t)i + 20);
    }
    jobs[i] = job_of(&together[i], 0, 1, &h, 0.5);
  }
  bad += ks_mem_upload(ctx, ks_guard_at(&together[1].grad, 8999), &wrong, sizeof wrong) != KS_OK;
  bad += ks_adamw(ctx, &(ks_adamw_args){jobs, JOBS, norms}) != KS_OK;
  bad += ks_sync(ctx) != KS_OK;
  bad += isfinite(norms[1]);
  for (int i = 0; i < JOBS; i++) {
    const ks_adamw_job job = job_of(&alone[i], 0, 1, &h, 0.5);
    if (i != 1) bad += ks_adamw(ctx, &(ks_adamw_args){&job, 1, &norm}) != KS_OK;
    bad += ks_sync(ctx) != KS_OK;
    bad += i != 1 && norm != norms[i];
    ks_guard *a[] = {&together[i].p, &together[i].m, &together[i].v, &together[i].grad},
             *b[] = {&alone[i].p, &alone[i].m, &alone[i].v, &alone[i].grad};
    for (int k = 0; k < 4; k++) {
      float *x = ks_guard_read(a[k]), *y = ks_guard_read(b[k]);
      bad += ks_check_same(name, x, y, sizes[i] - (i == 1 && k == 3));
      free(x), free(y);
    }
    ks_results_add_guard(out, &together[i].p);
    free_adapter(&together[i]), free_adapter(&alone[i]);
  }
  return bad;
}

Test(adamw, adapters_stand_alone_and_a_wrong_one_stays_as_it_is) {
  static const float wrong[] = {NAN, INFINITY, -INFINITY};
  int64_t bad = 0;
  for (int i = 0; i < 3; i++)
    bad += ks_test_everywhere("adamw company", i, &wrong[i], run_company);
  cr_assert(bad == 0);
}

Test(adamw, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard x[4];
  double norm;
  for (int i = 0; i < 4; i++)
    x[i] = ks_guard_make(ctx, (float[8]){0}, 8);
  const ks_adamw_job good = {x[0].p, x[1].p, x[2].p, x[3].p, 8, 1e-3, 0.9, 0.999, 1e-8, 0, 1, 1};
  ks_adamw_job wrong[9];
  for (int i = 0; i < 9; i++)
    wrong[i] = good;
  wrong[0].step = 0, wrong[1].beta1 = 1, wrong[2].beta2 = NAN, wrong[3].lr = INFINITY, wrong[4].m = x[0].p;
  wrong[5].grad = NULL, wrong[6].n = -1, wrong[7].max_grad_norm = NAN, wrong[8].max_grad_norm = -1;
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){&good, 1, &norm}) == KS_OK && ks_sync(ctx) == KS_OK && norm == 0);
  for (int i = 0; i < 9; i++) {
    const ks_adamw_job jobs[] = {good, wrong[i]};
    double norms[2];
    cr_assert(ks_adamw(ctx, &(ks_adamw_args){jobs, 2, norms}) == KS_EINVAL, "%d", i);
  }
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){&good, 1, NULL}) == KS_EINVAL);
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){NULL, 1, &norm}) == KS_EINVAL);
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){&good, -1, &norm}) == KS_EINVAL);
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){NULL, 0, NULL}) == KS_OK);
  for (int i = 0; i < 4; i++)
    ks_guard_free(&x[i]);
  ks_ctx_destroy(ctx);
}
