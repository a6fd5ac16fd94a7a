/* Against numpy and mpmath (tests/fixtures/make_stats.py), and against what an interval promises. */
#include "core/score/score.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>

static char *read_fixture(const char *name) {
  char *text;
  size_t n;
  ks_status s = ks_file_read(name, 1 << 24, &text, &n);
  cr_assert(s == KS_OK, "%s", ks_error_message());
  return text;
}

Test(stats, chi_square_tail_equals_mpmath) {
  char *text = read_fixture(KS_SOURCE_DIR "/tests/fixtures/stats/chi_square.tsv"), *at = text;
  int n_wrong = 0, n_cases = 0;
  while (*at) {
    double x = strtod(at, &at), k = strtod(at, &at), want = strtod(at, &at), got = ks_chi_square_tail(x, k);
    at++;
    /* The rule of computed tolerances: terms of the exponent are rounded, and magnified by their sizes; L:
     * steps of series or fraction. */
    double a = k / 2, y = x / 2, u = 0x1p-53, steps = 60 + 8 * sqrt(a);
    double size = 1 + a * fabs(log(y)) + y + fabs(lgamma(a)), scale = y < a + 1 ? 1 - want : want;
    double tol = u * want + (4 + sqrt(steps)) * u * size * scale;
    n_cases++;
    if (!(fabs(got - want) <= tol) && n_wrong++ < 20)
      cr_log_error("x %g k %g: got %.17g, want %.17g, off by %g, allowed %g", x, k, got, want, got - want,
                   tol);
  }
  free(text);
  cr_assert(eq(int, n_wrong, 0));
  cr_assert(n_cases > 150);
}

Test(stats, chi_square_tail_at_the_ends) {
  cr_assert(eq(dbl, ks_chi_square_tail(0, 3), 1.0));
  cr_assert(eq(dbl, ks_chi_square_tail(-1, 3), 1.0));
  cr_assert(eq(dbl, ks_chi_square_tail(INFINITY, 3), 0.0));
  cr_assert(eq(dbl, ks_chi_square_tail(1e6, 3), 0.0));
  cr_assert(isnan(ks_chi_square_tail(NAN, 3)) && isnan(ks_chi_square_tail(1, NAN)) &&
            isnan(ks_chi_square_tail(1, 0)) && isnan(ks_chi_square_tail(1, -2)) &&
            isnan(ks_chi_square_tail(1, INFINITY)));
  /* two degrees of freedom: exp(-x/2) */
  for (double x = 0.25; x < 60; x *= 1.5)
    cr_assert(fabs(ks_chi_square_tail(x, 2) / exp(-x / 2) - 1) <= (4 + sqrt(60)) * 0x1p-53 * (2 + x));
}

Test(stats, quantile_equals_numpy) {
  char *text = read_fixture(KS_SOURCE_DIR "/tests/fixtures/stats/quantiles.tsv"), *at = text;
  int n_cases = 0;
  while (*at) {
    double q = strtod(at, &at), want = strtod(at, &at), values[64];
    int64_t n = 0;
    while (*at == '\t')
      values[n++] = strtod(at, &at);
    at++;
    double got = ks_quantile(values, n, q), largest = fmax(fabs(values[0]), fabs(values[n - 1]));
    cr_assert(fabs(got - want) <= 4 * 0x1p-53 * largest, "q %g of %lld: got %.17g, want %.17g", q,
              (long long)n, got, want);
    n_cases++;
  }
  free(text);
  cr_assert(eq(int, n_cases, 70));
}

Test(stats, quantile_of_odd_input) {
  double one[] = {3}, with_nan[] = {1, NAN, 2}, with_inf[] = {INFINITY, 1, -INFINITY}, even[] = {4, 1, 3, 2};
  cr_assert(isnan(ks_median(one, 0)) && isnan(ks_median(with_nan, 3)) && isnan(ks_quantile(one, 1, 1.5)) &&
            isnan(ks_quantile(one, 1, NAN)));
  cr_assert(eq(dbl, ks_median(one, 1), 3.0));
  cr_assert(eq(dbl, ks_median(even, 4), 2.5));
  cr_assert(eq(dbl, ks_median(with_inf, 3), 1.0));
  cr_assert(eq(dbl, ks_quantile(with_inf, 3, 1), INFINITY));
}

static ks_interval bootstrap(const double *values, const int64_t *sizes, int64_t n_groups, uint64_t seed) {
  ks_interval out;
  ks_status s = ks_bootstrap(values, sizes, n_groups, 0.95, 1000, seed, &out);
  cr_assert(s == KS_OK, "%s", ks_error_message());
  return out;
}

Test(stats, bootstrap_of_degenerate_tables) {
  const double values[] = {2, 2, 2, 5, 7};
  const int64_t none[] = {0, 0}, one[] = {1}, same[] = {3}, holes[] = {0, 3, 0}, single[] = {1, 1, 1};
  ks_interval i = bootstrap(NULL, NULL, 0, 1);
  cr_assert(i.n == 0 && isnan(i.mean) && isnan(i.low) && isnan(i.high));
  i = bootstrap(NULL, none, 2, 1);
  cr_assert(i.n == 0 && isnan(i.mean) && isnan(i.low) && isnan(i.high));
  i = bootstrap(values + 3, one, 1, 1);
  cr_assert(i.n == 1 && i.mean == 5 && i.low == 5 && i.high == 5);
  i = bootstrap(values, same, 1, 1);
  cr_assert(i.n == 3 && i.mean == 2 && i.low == 2 && i.high == 2);
  i = bootstrap(values, holes, 3, 1);
  cr_assert(i.n == 3 && i.mean == 2 && i.low == 2 && i.high == 2);
  i = bootstrap(values + 2, single, 3, 1); /* groups of one: the groups alone vary */
  cr_assert(i.n == 3 && i.mean == 14.0 / 3 && i.low == 2 && i.high == 7);
  const double with_nan[] = {1, NAN, 3}, with_inf[] = {INFINITY, -INFINITY, 3};
  i = bootstrap(with_nan, same, 1, 1);
  cr_assert(i.n == 3 && isnan(i.mean) && isnan(i.low) && isnan(i.high));
  i = bootstrap(with_inf, same, 1, 1);
  cr_assert(i.n == 3 && isnan(i.mean) && isnan(i.low) && isnan(i.high));
}

Test(stats, bootstrap_repeats_and_changes_with_the_seed) {
  double values[60];
  const int64_t sizes[] = {10, 20, 30};
  ks_rng rng = ks_rng_make(3, KS_RNG_TEST, 0);
  for (int i = 0; i < 60; i++)
    values[i] = ks_rng_normal(&rng);
  ks_interval a = bootstrap(values, sizes, 3, 8), b = bootstrap(values, sizes, 3, 8),
              c = bootstrap(values, sizes, 3, 9);
  cr_assert(a.mean == b.mean && a.low == b.low && a.high == b.high);
  cr_assert(a.mean == c.mean && (a.low != c.low || a.high != c.high));
  cr_assert(a.low < a.mean && a.mean < a.high);
  ks_interval wide, narrow;
  cr_assert(eq(int, ks_bootstrap(values, sizes, 3, 0.99, 1000, 8, &wide), KS_OK));
  cr_assert(eq(int, ks_bootstrap(values, sizes, 3, 0.5, 1000, 8, &narrow), KS_OK));
  cr_assert(wide.low <= a.low && a.low < narrow.low && narrow.high < a.high && a.high <= wide.high);
}

Test(stats, paired_is_the_bootstrap_of_differences) {
  double a[40], b[40], d[40];
  const int64_t sizes[] = {15, 25};
  ks_rng rng = ks_rng_make(4, KS_RNG_TEST, 0);
  for (int i = 0; i < 40; i++) {
    double shared = 10 * ks_rng_normal(&rng);
    a[i] = shared + 0.5 + 0.1 * ks_rng_normal(&rng);
    b[i] = shared + 0.1 * ks_rng_normal(&rng);
    d[i] = a[i] - b[i];
  }
  ks_interval paired, want = bootstrap(d, sizes, 2, 5), alone = bootstrap(a, sizes, 2, 5);
  cr_assert(eq(int, ks_bootstrap_paired(a, b, sizes, 2, 0.95, 1000, 5, &paired), KS_OK));
  cr_assert(paired.mean == want.mean && paired.low == want.low && paired.high == want.high && paired.n == 40);
  cr_assert(paired.low > 0 && paired.high < 1, "the shared part must cancel");
  cr_assert(alone.high - alone.low > 10 * (paired.high - paired.low));
}

/* How often the 95 % interval holds the truth, 0, in 500 simulated experiments; with few groups the
 * percentile bootstrap promises less than 95 %. */
static double coverage(int64_t n_groups, int64_t n_each, double group_sd, uint64_t id) {
  enum { N_EXPERIMENTS = 500, MAX_VALUES = 400 };
  double values[MAX_VALUES];
  int64_t sizes[32];
  int hits = 0;
  ks_rng rng = ks_rng_make(11, KS_RNG_TEST, id);
  for (int e = 0; e < N_EXPERIMENTS; e++) {
    for (int64_t g = 0; g < n_groups; g++) {
      double shift = group_sd * ks_rng_normal(&rng);
      sizes[g] = n_each;
      for (int64_t i = 0; i < n_each; i++)
        values[g * n_each + i] = shift + ks_rng_normal(&rng);
    }
    ks_interval out;
    cr_assert(eq(int, ks_bootstrap(values, sizes, n_groups, 0.95, 300, (uint64_t)e, &out), KS_OK));
    hits += out.low <= 0 && 0 <= out.high;
  }
  return (double)hits / N_EXPERIMENTS;
}

Test(stats, interval_covers) {
  static const struct {
    int64_t n_groups, n_each;
    double group_sd, least, most;
  } cases[] = {{1, 50, 0, 0.91, 0.98}, {12, 8, 1, 0.88, 0.98}, {20, 5, 0, 0.91, 1}, {5, 20, 1, 0.78, 0.97}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    double c = coverage(cases[i].n_groups, cases[i].n_each, cases[i].group_sd, i);
    cr_log_info("coverage of %lld x %lld, group sd %g: %.3f", (long long)cases[i].n_groups,
                (long long)cases[i].n_each, cases[i].group_sd, c);
    cr_assert(c >= cases[i].least && c <= cases[i].most, "case %zu covers %.3f", i, c);
  }
}

/* One group of n values: the interval is about 2 * 1.96 standard errors wide. */
Test(stats, width_is_that_of_theory) {
  enum { N = 2000 };
  double values[N], sum = 0, squares = 0;
  const int64_t sizes[] = {N};
  ks_rng rng = ks_rng_make(12, KS_RNG_TEST, 0);
  for (int i = 0; i < N; i++) {
    values[i] = ks_rng_uniform(&rng);
    sum += values[i];
    squares += values[i] * values[i];
  }
  double mean = sum / N, se = sqrt((squares / N - mean * mean) / N);
  ks_interval out;
  cr_assert(eq(int, ks_bootstrap(values, sizes, 1, 0.95, 4000, 1, &out), KS_OK));
  /* a 2.5 % quantile of 4000 draws has a standard error of sqrt(0.025*0.975/4000)/density(1.96) = 0.042 se:
   * four of them */
  cr_assert(fabs(out.low - (mean - 1.96 * se)) < 4 * 0.042 * se &&
            fabs(out.high - (mean + 1.96 * se)) < 4 * 0.042 * se);
}

Test(stats, refuses_bad_arguments) {
  const double v[] = {1, 2};
  const int64_t ok[] = {2}, negative[] = {3, -1}, huge[] = {INT64_MAX, 2};
  ks_interval out;
  cr_assert(eq(int, ks_bootstrap(v, ok, 1, 0, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, ok, 1, 1, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, ok, 1, NAN, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, ok, 1, 0.9, 0, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, negative, 2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, huge, 2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(NULL, ok, 1, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, NULL, 1, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, ok, -1, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap(v, ok, 1, 0.9, 10, 1, NULL), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_paired(v, NULL, ok, 1, 0.9, 10, 1, &out), KS_EINVAL));
}
