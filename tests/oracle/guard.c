#include "tests/oracle/guard.h"
#include "kernels/base/rng.h"
#include <math.h>
#include <stdio.h>

enum { WALL = 4096, MAX_SAID = 4 };

static const char *const cpu_places[] = {"avx512bf16", "avx512", "avx2", "neon", "generic", NULL};
static const char *const cuda_places[] = {"cuda-f32", "cuda-bf16", NULL};

/* The shim's (tests/cuda_on_cpu/): in which order the threads of a block run. */
__attribute__((weak)) void ks_shim_set_order(int order);
/* And whether it is a GPU of compute capability 9.0, which some variants need. */
__attribute__((weak)) void ks_shim_set_hopper(int on);

bool ks_test_is_cuda(void) {
  const char *backend = getenv("KS_TEST_BACKEND");
  return backend && strcmp(backend, "cuda") == 0;
}
bool ks_test_is_shim(void) {
  return ks_test_is_cuda() && ks_shim_set_order != NULL;
}

const char *const *ks_test_places(void) {
  return ks_test_is_cuda() ? cuda_places : cpu_places;
}

static bool has_fma(const char *place) {
  return strcmp(place, "generic") != 0;
}

/* variants NULL: the defaults. */
static ks_ctx *make_ctx(const char *place, int n_threads, const char *variants) {
  static unsigned said;
  const char *const *places = ks_test_places();
  ks_ctx *ctx = NULL;
  ks_ctx_params params = {.backend = "cpu", .n_threads = n_threads, .isa = place};
  if (ks_test_is_cuda())
    params = (ks_ctx_params){.backend = "cuda",
                             .activations = strcmp(place, "cuda-bf16") == 0 ? KS_DTYPE_BF16 : KS_DTYPE_F32,
                             .variants = variants};
  if (ks_ctx_create(&ctx, &params) == KS_OK) return ctx;
  for (unsigned i = 0; places[i]; i++)
    if (strcmp(place, places[i]) == 0 && !(said & 1u << i)) {
      fprintf(stderr, "note: skipped %s: %s\n", place, ks_error_message());
      said |= 1u << i;
    }
  return NULL;
}

ks_ctx *ks_test_ctx(const char *place, int n_threads) {
  return make_ctx(place, n_threads, NULL);
}

static void *need(void *p) {
  if (!p) {
    fprintf(stderr, "test: out of memory: %s\n", ks_error_message());
    abort();
  }
  return p;
}

ks_ctx *ks_test_any_ctx(void) {
  ks_ctx *ctx = NULL;
  for (const char *const *place = ks_test_places(); !ctx && *place; place++)
    ctx = ks_test_ctx(*place, 2);
  return need(ctx);
}

/* The nearest bf16, ties to even; a NaN stays one. */
static uint16_t to_bf16(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  if (isnan(x)) return (uint16_t)(b >> 16 | 0x40u);
  return (uint16_t)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
static float from_bf16(uint16_t bits) {
  uint32_t b = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

void ks_act_round(const ks_ctx *ctx, float *x, int64_t n) {
  for (int64_t i = 0; ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 && i < n; i++)
    x[i] = from_bf16(to_bf16(x[i]));
}

double ks_act_roundoff(const ks_ctx *ctx) {
  return ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 ? 0x1p-8 : 0x1p-24;
}

static void encode(ks_dtype dtype, void *to, int64_t i, float x) {
  if (dtype == KS_DTYPE_F32) ((float *)to)[i] = x;
  if (dtype == KS_DTYPE_BF16) ((uint16_t *)to)[i] = to_bf16(x);
  if (dtype == KS_DTYPE_I8) ((int8_t *)to)[i] = isnan(x) ? INT8_MIN : (int8_t)x;
}
static float decode(ks_dtype dtype, const void *from, int64_t i) {
  if (dtype == KS_DTYPE_BF16) return from_bf16(((const uint16_t *)from)[i]);
  if (dtype == KS_DTYPE_I8) return (float)((const int8_t *)from)[i];
  return ((const float *)from)[i];
}

static int64_t wall_of(const ks_guard *g) {
  return (unsigned char *)g->p - g->base;
}

static size_t guarded_bytes(const ks_guard *g) {
  return (size_t)g->n * ks_dtype_size(g->dtype);
}

ks_guard ks_guard_make_as(ks_ctx *ctx, ks_dtype dtype, const float *values, int64_t n) {
  ks_guard g = {.ctx = ctx, .n = n, .dtype = dtype};
  /* On the shim AddressSanitizer's walls stand at the first and last byte, and see reads too. */
  const size_t bytes = guarded_bytes(&g), wall = ks_test_is_shim() ? 0 : WALL;
  unsigned char *host = need(malloc(bytes + 2 * wall + 1));
  void *base = NULL;
  g.made = need(malloc(bytes + 1));
  for (int64_t i = 0; i < n; i++)
    encode(dtype, g.made, i, values ? values[i] : NAN);
  for (size_t i = 0; i < wall; i++)
    host[i] = host[wall + bytes + i] = (unsigned char)(0xa5 ^ i);
  memcpy(host + wall, g.made, bytes);
  if (ks_mem_alloc(ctx, bytes + 2 * wall, &base) != KS_OK ||
      ks_mem_upload(ctx, base, host, bytes + 2 * wall) != KS_OK)
    need(NULL);
  free(host);
  g.base = base;
  g.p = g.base + wall;
  return g;
}

ks_guard ks_guard_make(ks_ctx *ctx, const float *values, int64_t n) {
  return ks_guard_make_as(ctx, KS_DTYPE_F32, values, n);
}
ks_guard ks_guard_make_act(ks_ctx *ctx, const float *values, int64_t n) {
  return ks_guard_make_as(ctx, ks_ctx_act_dtype(ctx), values, n);
}

void ks_guard_free(ks_guard *g) {
  ks_mem_free(g->ctx, g->base);
  free(g->made);
  *g = (ks_guard){0};
}

static unsigned char *read_all(const ks_guard *g) {
  const size_t bytes = guarded_bytes(g) + 2 * (size_t)wall_of(g);
  unsigned char *host = need(malloc(bytes + 1));
  if (ks_mem_download(g->ctx, host, g->base, bytes) != KS_OK) need(NULL);
  return host;
}

float *ks_guard_read(const ks_guard *g) {
  unsigned char *all = read_all(g);
  float *x = need(malloc((size_t)g->n * sizeof(float) + 1));
  for (int64_t i = 0; i < g->n; i++)
    x[i] = decode(g->dtype, all + wall_of(g), i);
  free(all);
  return x;
}

void *ks_guard_at(const ks_guard *g, int64_t i) {
  return (unsigned char *)g->p + i * (int64_t)ks_dtype_size(g->dtype);
}

int64_t ks_guard_check_walls(const char *what, const ks_guard *g) {
  unsigned char *all = read_all(g);
  const int64_t wall = wall_of(g), behind = wall + (int64_t)guarded_bytes(g);
  int64_t bad = 0;
  for (int64_t i = 0; i < wall; i++)
    bad += (all[i] != (unsigned char)(0xa5 ^ i)) + (all[behind + i] != (unsigned char)(0xa5 ^ i));
  if (bad) fprintf(stderr, "%s: %lld bytes outside the array were written\n", what, (long long)bad);
  free(all);
  return bad;
}

int64_t ks_guard_check_input(const char *what, const ks_guard *g) {
  unsigned char *now = read_all(g);
  int64_t bad = ks_guard_check_walls(what, g);
  if (memcmp(now + wall_of(g), g->made, guarded_bytes(g)) != 0) {
    fprintf(stderr, "%s: an input was changed\n", what);
    bad++;
  }
  free(now);
  return bad;
}

int64_t ks_guard_check_output(const char *what, const ks_guard *g, const double *ref, const double *size,
                              double chain) {
  return ks_guard_check_rounded(what, g, ref, size, chain, 0);
}

static bool is_close(double got, double ref, double tolerance) {
  if (isnan(ref)) return isnan(got);
  if (isinf(ref)) return got == ref;
  return fabs(got - ref) <= tolerance;
}

int64_t ks_guard_check_rounded(const char *what, const ks_guard *g, const double *ref, const double *size,
                               double chain, int n_roundings) {
  float *got = ks_guard_read(g);
  const bool narrow = ks_ctx_act_dtype(g->ctx) == KS_DTYPE_BF16;
  const double u_out = g->dtype == KS_DTYPE_BF16 ? 0x1p-8 : 0x1p-24,
               between = narrow ? n_roundings * 0x1p-8 : 0;
  int64_t bad = ks_guard_check_walls(what, g), wrong = 0;
  for (int64_t i = 0; i < g->n; i++) {
    double tolerance = ks_tolerance_rounded(ref[i], size ? size[i] : fabs(ref[i]), chain, u_out, between);
    if (is_close((double)got[i], ref[i], tolerance)) continue;
    if (wrong++ < MAX_SAID)
      fprintf(stderr, "%s: [%lld] is %.9g, wants %.9g +- %.3g\n", what, (long long)i, (double)got[i], ref[i],
              tolerance);
  }
  free(got);
  return bad + wrong;
}

double ks_tolerance(double ref, double size, double chain) {
  return ks_tolerance_rounded(ref, size, chain, 0x1p-24, 0);
}

double ks_tolerance_rounded(double ref, double size, double chain, double u_out, double between) {
  return u_out * fabs(ref) + ((4 + sqrt(chain)) * 0x1p-24 + between) * size + 0x1p-149;
}

bool ks_close(double got, double ref, double size, double chain) {
  return is_close(got, ref, ks_tolerance(ref, size, chain));
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

/* One place with one choice of kernels: several runs that must agree. First results go to *first. */
typedef struct {
  const char *what, *place, *variants;
  int64_t number;
  const void *test_case;
  ks_test_run run;
} test_place;

static int64_t run_place(const test_place *t, ks_results *first) {
  static const int threads[] = {1, 3, 0}, orders[] = {0, 1, 7};
  int64_t bad = 0;
  for (int i = 0; i < (ks_test_is_cuda() ? 3 : 2); i++) {
    char name[256];
    ks_results now = {0};
    if (ks_shim_set_hopper) ks_shim_set_hopper(t->variants && strstr(t->variants, "=wgmma"));
    ks_ctx *ctx = make_ctx(t->place, threads[i], t->variants);
    if (!ctx) break;
    if (ks_shim_set_order) ks_shim_set_order(orders[i]);
    snprintf(name, sizeof name, "%s case %lld, %s%s%s, run %d", t->what, (long long)t->number, t->place,
             t->variants ? " " : "", t->variants ? t->variants : "", i + 1);
    bad += t->run(ctx, t->test_case, name, &now);
    ks_ctx_destroy(ctx);
    if (i == 0) {
      *first = now;
      continue;
    }
    bad += ks_results_check_same(name, &now, first);
    ks_results_free(&now);
  }
  if (ks_shim_set_hopper) ks_shim_set_hopper(0);
  return bad;
}

/* The first of its operation that suits. */
static bool is_default(const ks_op_variant *variants, int64_t i, bool is_bf16) {
  for (int64_t j = 0; j < i; j++)
    if (strcmp(variants[j].op, variants[i].op) == 0 && (is_bf16 ? variants[j].bf16 : variants[j].f32))
      return false;
  return true;
}

static int64_t run_variants(test_place t) {
  enum { MOST = 64 };
  ks_op_variant variants[MOST];
  int64_t n = ks_backend_variants("cuda", variants, MOST), bad = 0;
  if (n > MOST) need(NULL);
  for (int64_t i = 0; i < n; i++) {
    char choice[96];
    bool suits = strcmp(t.place, "cuda-bf16") == 0 ? variants[i].bf16 : variants[i].f32;
    ks_results results = {0};
    if (!suits || strncmp(variants[i].op, t.what, strlen(t.what)) != 0) continue;
    if (is_default(variants, i, strcmp(t.place, "cuda-bf16") == 0)) continue; /* ran without variants */
    snprintf(choice, sizeof choice, "%s=%s", variants[i].op, variants[i].name);
    t.variants = choice;
    bad += run_place(&t, &results);
    ks_results_free(&results);
  }
  return bad;
}

int64_t ks_test_everywhere(const char *what, int64_t number, const void *test_case, ks_test_run run) {
  ks_results first = {0};
  bool have_first = false;
  int64_t bad = 0;
  for (const char *const *place = ks_test_places(); *place; place++) {
    const test_place t = {
        .what = what, .place = *place, .number = number, .test_case = test_case, .run = run};
    ks_results here = {0};
    bad += run_place(&t, &here);
    if (ks_test_is_cuda()) bad += run_variants(t);
    bool comparable = !ks_test_is_cuda() && has_fma(*place) && (here.n_floats || here.n_bytes);
    if (comparable && have_first) bad += ks_results_check_same(*place, &here, &first);
    if (comparable && !have_first) {
      first = here;
      have_first = true;
    } else {
      ks_results_free(&here);
    }
  }
  ks_results_free(&first);
  return bad;
}
