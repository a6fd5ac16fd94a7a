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

static ks_interval crossed(const double *values, int64_t n_seeds, int64_t n_questions, uint64_t seed) {
  ks_interval out;
  ks_status s = ks_bootstrap_crossed(values, n_seeds, n_questions, 0.95, 1000, seed, &out);
  cr_assert(s == KS_OK, "%s", ks_error_message());
  return out;
}

Test(stats, crossed_of_degenerate_tables) {
  const double values[] = {2, 2, 2, 2, 2, 2, 1, 3}, with_nan[] = {1, NAN, 3, 4},
               with_inf[] = {1, INFINITY, 3, 4};
  const struct {
    const double *values;
    int64_t n_seeds, n_questions;
    double mean, low, high;
  } cases[] = {
      {NULL, 0, 5, NAN, NAN, NAN},
      {NULL, 5, 0, NAN, NAN, NAN},
      {values, 1, 1, 2, 2, 2},
      {values, 2, 3, 2, 2, 2},
      {with_nan, 2, 2, NAN, NAN, NAN},
      {with_inf, 2, 2, NAN, NAN, NAN},
      /* deviations of 1 are stretched by sqrt(2), whichever way the two lie */
      {values + 6, 2, 1, 2, 2 - sqrt(2), 2 + sqrt(2)},
      {values + 6, 1, 2, 2, 2 - sqrt(2), 2 + sqrt(2)},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_interval out = crossed(cases[i].values, cases[i].n_seeds, cases[i].n_questions, 1);
    const double want[] = {cases[i].mean, cases[i].low, cases[i].high}, got[] = {out.mean, out.low, out.high};
    cr_expect(out.n == cases[i].n_seeds * cases[i].n_questions);
    for (int j = 0; j < 3; j++) /* one stretch and two sums of at most six values */
      cr_expect(isnan(want[j]) ? isnan(got[j]) : fabs(got[j] - want[j]) <= (4 + sqrt(6)) * 0x1p-53 * 4,
                "case %zu: %g, want %g", i, got[j], want[j]);
  }
}

/* One seed, or the same answers from every seed: what is drawn are questions, as in the nested bootstrap of
 * one group; the interval is that one's, stretched. */
Test(stats, crossed_draws_questions_once_for_all_seeds) {
  enum { N_SEEDS = 4, N_QUESTIONS = 40, N_RESAMPLES = 4000 };
  double values[N_SEEDS * N_QUESTIONS], squares = 0, sum = 0;
  ks_rng rng = ks_rng_make(5, KS_RNG_TEST, 0);
  for (int i = 0; i < N_SEEDS * N_QUESTIONS; i++)
    values[i] = i < N_QUESTIONS ? ks_rng_normal(&rng) : values[i - N_QUESTIONS];
  for (int i = 0; i < N_QUESTIONS; i++)
    sum += values[i];
  for (int i = 0; i < N_QUESTIONS; i++)
    squares += (values[i] - sum / N_QUESTIONS) * (values[i] - sum / N_QUESTIONS);
  double se = sqrt(squares / (N_QUESTIONS - 1) / N_QUESTIONS);
  for (int64_t n_seeds = 1; n_seeds <= N_SEEDS; n_seeds += N_SEEDS - 1) {
    ks_interval out;
    cr_assert(ks_bootstrap_crossed(values, n_seeds, N_QUESTIONS, 0.95, N_RESAMPLES, 1, &out) == KS_OK);
    /* widths of 2 * 1.96 standard errors; Monte Carlo: see width_is_that_of_theory */
    cr_expect(fabs((out.high - out.low) - 2 * 1.96 * se) <= 2 * 4 * 0.042 * se, "%lld seeds: width %g, se %g",
              (long long)n_seeds, out.high - out.low, se);
  }
  ks_interval a = crossed(values, N_SEEDS, N_QUESTIONS, 3), b = crossed(values, N_SEEDS, N_QUESTIONS, 3),
              c = crossed(values, N_SEEDS, N_QUESTIONS, 4);
  cr_expect(a.low == b.low && a.high == b.high && a.low != c.low);
}

Test(stats, crossed_paired_is_the_bootstrap_of_differences) {
  enum { N_SEEDS = 3, N_QUESTIONS = 16, N = N_SEEDS * N_QUESTIONS };
  double a[N], b[N], d[N];
  ks_rng rng = ks_rng_make(6, KS_RNG_TEST, 0);
  for (int i = 0; i < N; i++) {
    a[i] = ks_rng_normal(&rng);
    b[i] = ks_rng_normal(&rng);
    d[i] = a[i] - b[i];
  }
  ks_interval paired, want = crossed(d, N_SEEDS, N_QUESTIONS, 5);
  cr_assert(ks_bootstrap_crossed_paired(a, b, N_SEEDS, N_QUESTIONS, 0.95, 1000, 5, &paired) == KS_OK);
  cr_assert(paired.mean == want.mean && paired.low == want.low && paired.high == want.high && paired.n == N);
}

/* value = seed + question + noise, all normal; the truth is 0. The same cases with more experiments make the
 * table in core/score/score.h. */
static void crossed_coverage(int64_t n_seeds, const double sd[3], uint64_t id, double *crossed_part,
                             double *nested_part) {
  enum { N_EXPERIMENTS = 300, N_RESAMPLES = 200, N_QUESTIONS = 48, MAX_SEEDS = 12 };
  double values[MAX_SEEDS * N_QUESTIONS], question[N_QUESTIONS];
  int64_t sizes[MAX_SEEDS];
  int n_crossed = 0, n_nested = 0;
  ks_rng rng = ks_rng_make(13, KS_RNG_TEST, id);
  for (int e = 0; e < N_EXPERIMENTS; e++) {
    for (int j = 0; j < N_QUESTIONS; j++)
      question[j] = sd[1] * ks_rng_normal(&rng);
    for (int64_t i = 0; i < n_seeds; i++) {
      double shift = sd[0] * ks_rng_normal(&rng);
      sizes[i] = N_QUESTIONS;
      for (int j = 0; j < N_QUESTIONS; j++)
        values[i * N_QUESTIONS + j] = shift + question[j] + sd[2] * ks_rng_normal(&rng);
    }
    ks_interval c, n;
    cr_assert(ks_bootstrap_crossed(values, n_seeds, N_QUESTIONS, 0.95, N_RESAMPLES, (uint64_t)e, &c) ==
              KS_OK);
    cr_assert(ks_bootstrap(values, sizes, n_seeds, 0.95, N_RESAMPLES, (uint64_t)e, &n) == KS_OK);
    n_crossed += c.low <= 0 && 0 <= c.high;
    n_nested += n.low <= 0 && 0 <= n.high;
  }
  *crossed_part = (double)n_crossed / N_EXPERIMENTS;
  *nested_part = (double)n_nested / N_EXPERIMENTS;
}

Test(stats, crossed_interval_covers) {
  static const struct {
    int64_t n_seeds;
    double sd[3], least;
  } cases[] = {{3, {0.15, 1, 0.5}, 0.89}, {12, {0.15, 1, 0.5}, 0.89}, {3, {0.3, 0.3, 1}, 0.86},
               {12, {0.3, 0.3, 1}, 0.91}, {3, {1, 1, 1}, 0.74},       {12, {1, 1, 1}, 0.88}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    double here, nested;
    crossed_coverage(cases[i].n_seeds, cases[i].sd, i, &here, &nested);
    cr_log_info("%lld seeds, sd %g %g %g: crossed %.3f, nested %.3f", (long long)cases[i].n_seeds,
                cases[i].sd[0], cases[i].sd[1], cases[i].sd[2], here, nested);
    cr_expect(here >= cases[i].least, "case %zu covers %.3f", i, here);
    cr_expect(here > nested, "case %zu: %.3f, nested %.3f", i, here, nested);
  }
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
  cr_assert(eq(int, ks_bootstrap_crossed(v, 1, 2, 1, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(v, 1, 2, 0.9, 0, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(v, -1, 2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(v, 1, -2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(v, INT64_MAX, 2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(NULL, 1, 2, 0.9, 10, 1, &out), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed(v, 1, 2, 0.9, 10, 1, NULL), KS_EINVAL));
  cr_assert(eq(int, ks_bootstrap_crossed_paired(v, NULL, 1, 2, 0.9, 10, 1, &out), KS_EINVAL));
}
