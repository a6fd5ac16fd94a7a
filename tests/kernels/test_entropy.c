#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_entropy.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

static const char *const kinds[] = {"histogram", "clipped", "softmax", "abs"};

/* float64: as ks_tolerance, the masses' own rounding included. Masses of SOFTMAX and ABS on a GPU are float32, exact to 2^-22
 * (four of its units), and so are sums of 20. */
static bool near(double got, double ref, ks_entropy_kind kind, int64_t n) {
  if (ks_test_is_cuda() && kind >= KS_ENTROPY_SOFTMAX) return ks_close(got, ref, 4 * (ref + 1), 20);
  return fabs(got - ref) <= (4 + sqrt((double)n)) * 0x1p-53 * (ref + 1) * 2;
}

static double entropy_of(ks_ctx *ctx, const float *x, int64_t n, ks_entropy_kind kind, int64_t n_bins,
                         double clip) {
  double h = NAN;
  ks_guard g = ks_guard_make(ctx, x, n);
  cr_assert(ks_entropy(ctx, &(ks_entropy_args){g.p, &h, 1, n, kind, n_bins, clip}) == KS_OK, "%s",
            ks_error_message());
  ks_guard_free(&g);
  return h;
}

Test(entropy, numpy_fixtures) {
  enum { MAX = 512 };
  FILE *f = fopen(KS_SOURCE_DIR "/tests/fixtures/kernels/entropy.txt", "r");
  cr_assert(f != NULL);
  cr_assert(fscanf(f, "# numpy %*s") == 0);
  ks_ctx *ctx = ks_test_any_ctx();
  float x[MAX];
  char word[16], kind[16];
  int n = 0, rows = 0, values = 0, bad = 0;
  while (fscanf(f, "%15s", word) == 1) {
    if (strcmp(word, "row") == 0) {
      cr_assert(fscanf(f, "%d", &n) == 1 && n > 0 && n <= MAX);
      for (int i = 0; i < n; i++)
        cr_assert(fscanf(f, "%a", &x[i]) == 1);
      rows++;
      continue;
    }
    int n_bins;
    double clip, ref;
    cr_assert(fscanf(f, "%15s %d %lf %la", kind, &n_bins, &clip, &ref) == 4);
    for (int k = 0; k < 4; k++) {
      if (strcmp(kind, kinds[k]) != 0) continue;
      double h = entropy_of(ctx, x, n, (ks_entropy_kind)k, n_bins ? n_bins : 1, clip > 0 ? clip : 1);
      values++;
      if (near(h, ref, (ks_entropy_kind)k, n)) continue;
      fprintf(stderr, "row %d %s %d bins clip %g: %.17g, numpy %.17g\n", rows, kind, n_bins, clip, h, ref);
      bad++;
    }
  }
  cr_assert(rows == 16 && values == 16 * 10 && bad == 0);
  fclose(f);
  ks_ctx_destroy(ctx);
}

typedef struct {
  int64_t n_rows, n_cols, n_bins;
  double clip;
  ks_fill_kind fill;
} entropy_case;
static const entropy_case cases[] = {{0, 5, 100, 1, KS_FILL_SIGNED},    {3, 1, 100, 3, KS_FILL_SIGNED},
                                     {5, 31, 1, 1, KS_FILL_POSITIVE},   {4, 32, 2, 2, KS_FILL_INTEGER},
                                     {3, 33, 100, 3, KS_FILL_NEAR_ONE}, {2, 97, 64, 0.7, KS_FILL_LARGE},
                                     {9, 203, 100, 3, KS_FILL_SIGNED},  {2, 1025, 4096, 3, KS_FILL_SIGNED},
                                     {7, 3200, 100, 3, KS_FILL_SIGNED}, {1, 9217, 100, 2, KS_FILL_POSITIVE},
                                     {2, 257, 2049, 3, KS_FILL_SIGNED}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const entropy_case *c = test_case;
  float *x = ks_floats(c->n_rows * c->n_cols, c->fill, 1);
  ks_guard gx = ks_guard_make(ctx, x, c->n_rows * c->n_cols);
  double h[16];
  int64_t bad = 0;
  for (int k = 0; k < 4; k++) {
    for (int i = 0; i < 16; i++)
      h[i] = NAN;
    ks_entropy_args a = {gx.p, h, c->n_rows, c->n_cols, (ks_entropy_kind)k, c->n_bins, c->clip};
    bad += ks_entropy(ctx, &a) != KS_OK;
    for (int64_t i = 0; i < c->n_rows; i++) {
      double ref = oracle_entropy(x + i * c->n_cols, c->n_cols, a.kind, c->n_bins, c->clip);
      if (near(h[i], ref, a.kind, c->n_cols)) continue;
      fprintf(stderr, "%s: %s row %lld is %.17g, wants %.17g\n", name, kinds[k], (long long)i, h[i], ref);
      bad++;
    }
    bad += !isnan(h[c->n_rows]);
    ks_results_add_bytes(out, h, c->n_rows * (int64_t)sizeof *h);
  }
  bad += ks_guard_check_input(name, &gx);
  ks_guard_free(&gx);
  free(x);
  return bad;
}

Test(entropy, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("entropy", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Rows from the smallest numbers to the largest, around 0 and far from it, whose largest lies with any warp. */
static int64_t run_sizes(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { COLS = 1301, ROWS = 7 };
  static const int exponents[ROWS] = {-140, -100, -30, 0, 8, 60, 120};
  const int largest = *(const int *)test_case;
  float *x = ks_floats(ROWS * COLS, KS_FILL_SIGNED, 7);
  double h[ROWS];
  int64_t bad = 0;
  for (int64_t i = 0; i < ROWS * COLS; i++) {
    if (i % COLS == largest) x[i] = 5;
    if (largest % 2) x[i] += 20;
    x[i] = ldexpf(x[i], exponents[i / COLS]);
  }
  ks_guard g = ks_guard_make(ctx, x, ROWS * COLS);
  for (int k = 0; k < 4; k++) {
    bad += ks_entropy(ctx, &(ks_entropy_args){g.p, h, ROWS, COLS, (ks_entropy_kind)k, 100, 2}) != KS_OK;
    for (int r = 0; r < ROWS; r++) {
      const double ref = oracle_entropy(x + r * COLS, COLS, (ks_entropy_kind)k, 100, 2);
      if (near(h[r], ref, (ks_entropy_kind)k, COLS)) continue;
      fprintf(stderr, "%s: %s of 2^%d is %.17g, wants %.17g\n", name, kinds[k], exponents[r], h[r], ref);
      bad++;
    }
    ks_results_add_bytes(out, h, sizeof h);
  }
  ks_guard_free(&g);
  free(x);
  return bad;
}

Test(entropy, rows_of_any_size) {
  static const int largest[] = {0, 639, 642, 1299};
  int64_t bad = 0;
  for (int64_t i = 0; i < 4; i++)
    bad += ks_test_everywhere("entropy sizes", i, &largest[i], run_sizes);
  cr_assert(bad == 0);
}

/* Long rows whose largest value lies far from the others, so that their spread is small beside it. */
static int64_t run_outlier(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { ROWS = 4 };
  const int64_t n_cols = *(const int64_t *)test_case;
  float *x = ks_floats(ROWS * n_cols, KS_FILL_SIGNED, 11);
  double h[ROWS];
  int64_t bad = 0;
  for (int64_t i = 0; i < ROWS * n_cols; i++)
    x[i] = i % n_cols ? 1 + 0x1p-9f * x[i] : 2.5f;
  ks_guard g = ks_guard_make(ctx, x, ROWS * n_cols);
  bad += ks_entropy(ctx, &(ks_entropy_args){g.p, h, ROWS, n_cols, KS_ENTROPY_CLIPPED, 1000, 3}) != KS_OK;
  for (int r = 0; r < ROWS; r++) {
    const double ref = oracle_entropy(x + r * n_cols, n_cols, KS_ENTROPY_CLIPPED, 1000, 3);
    if (near(h[r], ref, KS_ENTROPY_CLIPPED, n_cols)) continue;
    fprintf(stderr, "%s: row %d of %lld is %.17g, wants %.17g\n", name, r, (long long)n_cols, h[r], ref);
    bad++;
  }
  ks_results_add_bytes(out, h, sizeof h);
  ks_guard_free(&g);
  free(x);
  return bad;
}

Test(entropy, one_value_far_from_a_long_row) {
  static const int64_t n_cols[] = {9000, 60001};
  int64_t bad = 0;
  for (int64_t i = 0; i < 2; i++)
    bad += ks_test_everywhere("entropy outlier", i, &n_cols[i], run_outlier);
  cr_assert(bad == 0);
}

/* Values at the edges of bins and beside them, where a division alone would choose the wrong one. */
static int64_t run_edges(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { BINS = 100, COLS = 3 * (BINS + 1), ROWS = 8 };
  float x[ROWS * COLS], ends[2];
  double h[ROWS];
  int64_t bad = 0;
  for (int r = 0; r < ROWS; r++) {
    ks_fill(ends, 2, KS_FILL_SIGNED, *(const uint64_t *)test_case * ROWS + (uint64_t)r);
    const float low = fminf(ends[0], ends[1]), high = fmaxf(ends[0], ends[1]);
    const double width = ((double)high - (double)low) / BINS;
    for (int b = 0; b <= BINS; b++) {
      const float edge = (float)((double)low + b * width);
      for (int side = 0; side < 3; side++) {
        const float v = side == 1 ? edge : nextafterf(edge, side ? INFINITY : -INFINITY);
        x[r * COLS + 3 * b + side] = fminf(fmaxf(v, low), high);
      }
    }
  }
  ks_guard g = ks_guard_make(ctx, x, ROWS * COLS);
  bad += ks_entropy(ctx, &(ks_entropy_args){g.p, h, ROWS, COLS, KS_ENTROPY_HISTOGRAM, BINS, 1}) != KS_OK;
  for (int r = 0; r < ROWS; r++) {
    const double ref = oracle_entropy(x + r * COLS, COLS, KS_ENTROPY_HISTOGRAM, BINS, 1);
    if (near(h[r], ref, KS_ENTROPY_HISTOGRAM, COLS)) continue;
    fprintf(stderr, "%s: row %d is %.17g, wants %.17g\n", name, r, h[r], ref);
    bad++;
  }
  ks_results_add_bytes(out, h, sizeof h);
  ks_guard_free(&g);
  return bad;
}

Test(entropy, values_at_the_edges_of_bins) {
  int64_t bad = 0;
  for (uint64_t seed = 0; seed < 6; seed++)
    bad += ks_test_everywhere("entropy edges", (int64_t)seed, &seed, run_edges);
  cr_assert(bad == 0);
}

/* 27 / 63 * 49 is 21 in double, but lies below the edge 21 * (63 / 49), so that 27 shares bin 20 with 26. */
Test(entropy, values_that_division_puts_too_high) {
  const float x[] = {0, 63, 26, 26, 26, 27};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    cr_assert(near(entropy_of(ctx, x, 6, KS_ENTROPY_HISTOGRAM, 49, 1), log2(6) - 4 * 2 / 6.0,
                   KS_ENTROPY_HISTOGRAM, 6));
    ks_ctx_destroy(ctx);
  }
}

Test(entropy, known_values) {
  ks_ctx *ctx = ks_test_any_ctx();
  float ramp[100], flat[64], one[5] = {0, 0, 7, 0, 0};
  for (int i = 0; i < 100; i++)
    ramp[i] = (float)i;
  for (int i = 0; i < 64; i++)
    flat[i] = 2.5f;
  cr_assert(
      near(entropy_of(ctx, ramp, 100, KS_ENTROPY_HISTOGRAM, 100, 1), log2(100), KS_ENTROPY_HISTOGRAM, 100));
  cr_assert(near(entropy_of(ctx, ramp, 100, KS_ENTROPY_HISTOGRAM, 4, 1), 2, KS_ENTROPY_HISTOGRAM, 100));
  cr_assert(entropy_of(ctx, flat, 64, KS_ENTROPY_HISTOGRAM, 100, 1) == 0);
  cr_assert(near(entropy_of(ctx, flat, 64, KS_ENTROPY_SOFTMAX, 1, 1), 6, KS_ENTROPY_SOFTMAX, 64));
  cr_assert(near(entropy_of(ctx, flat, 64, KS_ENTROPY_ABS, 1, 1), 6, KS_ENTROPY_ABS, 64));
  cr_assert(near(entropy_of(ctx, one, 5, KS_ENTROPY_ABS, 1, 1), 0, KS_ENTROPY_ABS, 5));
  const float far[] = {3e38f, -3e38f, 3e38f}; /* no float32 holds their distance */
  cr_assert(near(entropy_of(ctx, far, 3, KS_ENTROPY_SOFTMAX, 1, 1), 1, KS_ENTROPY_SOFTMAX, 3));
  cr_assert(near(entropy_of(ctx, far, 3, KS_ENTROPY_ABS, 1, 1), log2(3), KS_ENTROPY_ABS, 3));
  cr_assert(
      near(entropy_of(ctx, far, 3, KS_ENTROPY_HISTOGRAM, 2, 1), log2(3) - 2.0 / 3, KS_ENTROPY_HISTOGRAM, 3));
  one[2] = 0;
  cr_assert(entropy_of(ctx, one, 5, KS_ENTROPY_ABS, 1, 1) == 0 &&
            entropy_of(ctx, one, 0, KS_ENTROPY_ABS, 1, 1) == 0);
  ks_ctx_destroy(ctx);
}

Test(entropy, rows_with_nan_or_infinity_are_nan_and_alone) {
  enum { COLS = 19 };
  const float wrong[] = {NAN, INFINITY, -INFINITY};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    for (int w = 0; w < 3; w++)
      for (int at = 0; at < COLS; at += 6)
        for (int k = 0; k < 4; k++) {
          float x[3][COLS] = {{1, 2, 3}, {3, 2, 1}, {4, 1, 2}};
          double h[3];
          x[1][at] = wrong[w];
          ks_guard g = ks_guard_make(ctx, x[0], 3 * COLS);
          cr_assert(ks_entropy(ctx, &(ks_entropy_args){g.p, h, 3, COLS, (ks_entropy_kind)k, 10, 1}) == KS_OK);
          cr_assert(isfinite(h[0]) && isnan(h[1]) &&
                    h[2] == entropy_of(ctx, x[2], COLS, (ks_entropy_kind)k, 10, 1));
          ks_guard_free(&g);
        }
    ks_ctx_destroy(ctx);
  }
}

Test(entropy, rows_of_nothing) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard g = ks_guard_make(ctx, NULL, 0);
  for (int k = 0; k < 4; k++) {
    double h[2] = {NAN, NAN};
    cr_assert(ks_entropy(ctx, &(ks_entropy_args){g.p, h, 2, 0, (ks_entropy_kind)k, 10, 1}) == KS_OK);
    cr_assert(h[0] == 0 && h[1] == 0);
  }
  ks_guard_free(&g);
  ks_ctx_destroy(ctx);
}

Test(entropy, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard g = ks_guard_make(ctx, (float[4]){1, 2, 3, 4}, 4);
  const float *x = g.p;
  double h;
  const ks_entropy_args wrong[] = {
      {x, &h, 1, 4, KS_ENTROPY_HISTOGRAM, 0, 1}, {x, &h, 1, 4, KS_ENTROPY_HISTOGRAM, 4097, 1},
      {x, &h, 1, 4, KS_ENTROPY_CLIPPED, 10, 0},  {x, &h, 1, 4, KS_ENTROPY_CLIPPED, 10, NAN},
      {x, &h, 1, 4, (ks_entropy_kind)4, 10, 1},  {NULL, &h, 1, 4, KS_ENTROPY_ABS, 10, 1},
      {x, NULL, 1, 4, KS_ENTROPY_ABS, 10, 1},    {x, &h, -1, 4, KS_ENTROPY_ABS, 10, 1}};
  for (int i = 0; i < 8; i++)
    cr_assert(ks_entropy(ctx, &wrong[i]) == KS_EINVAL, "%d", i);
  const ks_entropy_args too_long = {x, &h, 1, (1 << 20) + 1, KS_ENTROPY_ABS, 10, 1};
  cr_assert(!ks_test_is_cuda() || ks_entropy(ctx, &too_long) == KS_EUNSUPPORTED);
  ks_guard_free(&g);
  ks_ctx_destroy(ctx);
}
