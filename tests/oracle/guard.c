#include "tests/oracle/guard.h"
#include "kernels/base/rng.h"
#include <math.h>
#include <stdio.h>

enum { WALL = 4096, MAX_SAID = 4 };

const char *const ks_test_isas[] = {"avx512bf16", "avx512", "avx2", "neon", "generic", NULL};

bool ks_test_isa_has_fma(const char *isa) {
  return strcmp(isa, "generic") != 0;
}

ks_ctx *ks_test_ctx(const char *isa, int n_threads) {
  static unsigned said;
  ks_ctx *ctx = NULL;
  ks_ctx_params params = {.backend = "cpu", .n_threads = n_threads, .isa = isa};
  if (ks_ctx_create(&ctx, &params) == KS_OK) return ctx;
  for (unsigned i = 0; ks_test_isas[i]; i++)
    if (strcmp(isa, ks_test_isas[i]) == 0 && !(said & 1u << i)) {
      fprintf(stderr, "note: skipped %s: %s\n", isa, ks_error_message());
      said |= 1u << i;
    }
  return NULL;
}

static void *need(void *p) {
  if (!p) {
    fprintf(stderr, "test: out of memory: %s\n", ks_error_message());
    abort();
  }
  return p;
}

ks_guard ks_guard_make(ks_ctx *ctx, const float *values, int64_t n) {
  ks_guard g = {.ctx = ctx, .n = n};
  const size_t bytes = (size_t)n * sizeof(float);
  unsigned char *host = need(malloc(bytes + 2 * WALL));
  void *base = NULL;
  g.made = need(malloc(bytes + 1));
  for (int64_t i = 0; i < n; i++)
    g.made[i] = values ? values[i] : NAN;
  for (int i = 0; i < WALL; i++)
    host[i] = host[WALL + bytes + (size_t)i] = (unsigned char)(0xa5 ^ i);
  memcpy(host + WALL, g.made, bytes);
  if (ks_mem_alloc(ctx, bytes + 2 * WALL, &base) != KS_OK ||
      ks_mem_upload(ctx, base, host, bytes + 2 * WALL) != KS_OK)
    need(NULL);
  free(host);
  g.base = base;
  g.p = (float *)(void *)(g.base + WALL);
  return g;
}

void ks_guard_free(ks_guard *g) {
  ks_mem_free(g->ctx, g->base);
  free(g->made);
  *g = (ks_guard){0};
}

static unsigned char *read_all(const ks_guard *g) {
  const size_t bytes = (size_t)g->n * sizeof(float) + 2 * WALL;
  unsigned char *host = need(malloc(bytes));
  if (ks_mem_download(g->ctx, host, g->base, bytes) != KS_OK) need(NULL);
  return host;
}

float *ks_guard_read(const ks_guard *g) {
  unsigned char *all = read_all(g);
  float *x = need(malloc((size_t)g->n * sizeof(float) + 1));
  memcpy(x, all + WALL, (size_t)g->n * sizeof(float));
  free(all);
  return x;
}

int64_t ks_guard_check_walls(const char *what, const ks_guard *g) {
  unsigned char *all = read_all(g);
  const size_t bytes = (size_t)g->n * sizeof(float);
  int64_t bad = 0;
  for (int i = 0; i < WALL; i++)
    bad +=
        (all[i] != (unsigned char)(0xa5 ^ i)) + (all[WALL + bytes + (size_t)i] != (unsigned char)(0xa5 ^ i));
  if (bad) fprintf(stderr, "%s: %lld bytes outside the array were written\n", what, (long long)bad);
  free(all);
  return bad;
}

int64_t ks_guard_check_input(const char *what, const ks_guard *g) {
  float *now = ks_guard_read(g);
  int64_t bad = ks_guard_check_walls(what, g);
  if (memcmp(now, g->made, (size_t)g->n * sizeof(float)) != 0) {
    fprintf(stderr, "%s: an input was changed\n", what);
    bad++;
  }
  free(now);
  return bad;
}

int64_t ks_guard_check_output(const char *what, const ks_guard *g, const double *ref, const double *size,
                              double chain) {
  float *got = ks_guard_read(g);
  int64_t bad = ks_guard_check_walls(what, g) + ks_check_close(what, got, ref, size, g->n, chain);
  free(got);
  return bad;
}

double ks_tolerance(double ref, double size, double chain) {
  return 0x1p-24 * fabs(ref) + (4 + sqrt(chain)) * 0x1p-24 * size + 0x1p-149;
}

bool ks_close(double got, double ref, double size, double chain) {
  if (isnan(ref)) return isnan(got);
  if (isinf(ref)) return got == ref;
  return fabs(got - ref) <= ks_tolerance(ref, size, chain);
}

int64_t ks_check_close(const char *what, const float *got, const double *ref, const double *size, int64_t n,
                       double chain) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    double s = size ? size[i] : fabs(ref[i]);
    if (ks_close((double)got[i], ref[i], s, chain)) continue;
    if (bad++ < MAX_SAID)
      fprintf(stderr, "%s: [%lld] is %.9g, wants %.9g +- %.3g\n", what, (long long)i, (double)got[i], ref[i],
              ks_tolerance(ref[i], s, chain));
  }
  return bad;
}

int64_t ks_check_same(const char *what, const float *a, const float *b, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    if (memcmp(&a[i], &b[i], sizeof a[i]) == 0 || (isnan(a[i]) && isnan(b[i]))) continue;
    if (bad++ < MAX_SAID)
      fprintf(stderr, "%s: [%lld] %a and %a differ\n", what, (long long)i, (double)a[i], (double)b[i]);
  }
  return bad;
}

void ks_fill(float *x, int64_t n, ks_fill_kind kind, uint64_t seed) {
  ks_rng rng = ks_rng_make(seed, KS_RNG_TEST, (uint64_t)kind);
  for (int64_t i = 0; i < n; i++) {
    double u = ks_rng_uniform(&rng);
    switch (kind) {
    case KS_FILL_SIGNED:
      x[i] = (float)(2 * u - 1);
      break;
    case KS_FILL_POSITIVE:
      x[i] = (float)u;
      break;
    case KS_FILL_NEAR_ONE:
      x[i] = (float)(1 + 2e-3 * (u - 0.5));
      break;
    case KS_FILL_INTEGER:
      x[i] = (float)((int)(u * 7) - 3);
      break;
    default:
      x[i] = (float)(2e4 * (u - 0.5));
    }
  }
}

float *ks_floats(int64_t n, ks_fill_kind kind, uint64_t seed) {
  float *x = need(malloc(((size_t)n + 1) * sizeof *x));
  ks_fill(x, n, kind, seed);
  return x;
}

double *ks_doubles(const float *x, int64_t n) {
  double *y = need(calloc((size_t)n + 1, sizeof *y));
  for (int64_t i = 0; x && i < n; i++)
    y[i] = (double)x[i];
  return y;
}

void ks_results_add(ks_results *r, const float *x, int64_t n) {
  r->floats = need(realloc(r->floats, (size_t)(r->n_floats + n + 1) * sizeof(float)));
  memcpy(r->floats + r->n_floats, x, (size_t)n * sizeof(float));
  r->n_floats += n;
}

void ks_results_add_guard(ks_results *r, const ks_guard *g) {
  float *x = ks_guard_read(g);
  ks_results_add(r, x, g->n);
  free(x);
}

void ks_results_add_bytes(ks_results *r, const void *x, int64_t n) {
  r->bytes = need(realloc(r->bytes, (size_t)(r->n_bytes + n + 1)));
  memcpy(r->bytes + r->n_bytes, x, (size_t)n);
  r->n_bytes += n;
}

void ks_results_free(ks_results *r) {
  free(r->floats);
  free(r->bytes);
  *r = (ks_results){0};
}

int64_t ks_results_check_same(const char *what, const ks_results *a, const ks_results *b) {
  if (a->n_floats != b->n_floats || a->n_bytes != b->n_bytes) {
    fprintf(stderr, "%s: results of different sizes\n", what);
    return 1;
  }
  int64_t bad = ks_check_same(what, a->floats, b->floats, a->n_floats);
  if (a->n_bytes && memcmp(a->bytes, b->bytes, (size_t)a->n_bytes) != 0) {
    fprintf(stderr, "%s: results differ\n", what);
    bad++;
  }
  return bad;
}

int64_t ks_test_everywhere(const char *what, int64_t number, const void *test_case, ks_test_run run) {
  ks_results first = {0};
  bool have_first = false;
  int64_t bad = 0;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_results one_thread = {0};
    for (int threads = 1; threads <= 3; threads += 2) {
      char name[160];
      ks_results now = {0};
      ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], threads);
      if (!ctx) break;
      snprintf(name, sizeof name, "%s case %lld, %s, %d threads", what, (long long)number, ks_test_isas[s],
               threads);
      bad += run(ctx, test_case, name, &now);
      ks_ctx_destroy(ctx);
      if (threads == 1) {
        if (ks_test_isa_has_fma(ks_test_isas[s]) && have_first)
          bad += ks_results_check_same(name, &now, &first);
        one_thread = now;
        continue;
      }
      bad += ks_results_check_same(name, &now, &one_thread);
      ks_results_free(&now);
    }
    if (!have_first && ks_test_isa_has_fma(ks_test_isas[s]) && (one_thread.n_floats || one_thread.n_bytes)) {
      first = one_thread;
      have_first = true;
    } else {
      ks_results_free(&one_thread);
    }
  }
  ks_results_free(&first);
  return bad;
}
