#include "core/score/score.h"

#include <math.h>

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double ks_quantile(double *values, int64_t n, double q) {
  if (n <= 0 || !(q >= 0 && q <= 1)) return NAN;
  for (int64_t i = 0; i < n; i++)
    if (isnan(values[i])) return NAN;
  qsort(values, (size_t)n, sizeof *values, compare_doubles);
  double at = q * (double)(n - 1), t = at - floor(at);
  int64_t i = (int64_t)at, j = ks_min_i64(i + 1, n - 1);
  double a = values[i], b = values[j];
  if (t == 0 || a == b) return a;
  /* from the nearer end, as numpy does */
  return t < 0.5 ? a + (b - a) * t : b - (b - a) * (1 - t);
}

double ks_median(double *values, int64_t n) {
  return ks_quantile(values, n, 0.5);
}

/* Groups that have values: first value and count. */
typedef struct {
  int64_t first, n;
} group;

static double draw_mean(const double *values, const group *groups, int64_t n_groups, ks_rng rng) {
  double sum = 0;
  int64_t n = 0;
  for (int64_t g = 0; g < n_groups; g++) {
    const group *drawn = &groups[ks_rng_below(&rng, (uint64_t)n_groups)];
    for (int64_t i = 0; i < drawn->n; i++)
      sum += values[drawn->first + (int64_t)ks_rng_below(&rng, (uint64_t)drawn->n)];
    n += drawn->n;
  }
  return sum / (double)n;
}

static ks_status check_groups(const int64_t *group_sizes, int64_t n_groups, int64_t *n_values) {
  *n_values = 0;
  if (n_groups < 0 || (n_groups > 0 && !group_sizes))
    return KS_FAIL(KS_EINVAL, "bootstrap: %lld groups without sizes; give the size of each group",
                   (long long)n_groups);
  for (int64_t g = 0; g < n_groups; g++)
    if (group_sizes[g] < 0 || __builtin_add_overflow(*n_values, group_sizes[g], n_values))
      return KS_FAIL(KS_EINVAL, "bootstrap: group %lld has size %lld; give sizes of 0 or more", (long long)g,
                     (long long)group_sizes[g]);
  return KS_OK;
}

ks_status ks_bootstrap(const double *values, const int64_t *group_sizes, int64_t n_groups, double level,
                       int64_t n_resamples, uint64_t seed, ks_interval *out) {
  int64_t n_values = 0, n_filled = 0;
  double *means = NULL;
  group *groups = NULL;
  ks_status status = KS_OK;
  if (!out || !(level > 0 && level < 1) || n_resamples < 1)
    return KS_FAIL(
        KS_EINVAL,
        "bootstrap: level %g and %lld resamples; give a level between 0 and 1 and at least 1 resample", level,
        (long long)n_resamples);
  KS_TRY(check_groups(group_sizes, n_groups, &n_values));
  if (n_values > 0 && !values)
    return KS_FAIL(KS_EINVAL, "bootstrap: %lld values are announced but the array is NULL",
                   (long long)n_values);
  *out = (ks_interval){NAN, NAN, NAN, n_values};
  double sum = 0;
  for (int64_t i = 0; i < n_values; i++)
    sum += values[i];
  if (n_values == 0 || isnan(sum)) return KS_OK;

  KS_TRY_OUT(ks_alloc_array(&groups, (size_t)n_groups, sizeof *groups, "bootstrap: groups"));
  KS_TRY_OUT(ks_alloc_array(&means, (size_t)n_resamples, sizeof *means, "bootstrap: means"));
  for (int64_t g = 0, first = 0; g < n_groups; first += group_sizes[g++])
    if (group_sizes[g] > 0) groups[n_filled++] = (group){first, group_sizes[g]};
  /* one stream a resample: the first resamples stay the same when more are asked for */
  for (int64_t r = 0; r < n_resamples; r++)
    means[r] = draw_mean(values, groups, n_filled, ks_rng_make(seed, KS_RNG_BOOTSTRAP, (uint64_t)r));
  out->mean = sum / (double)n_values;
  out->low = ks_quantile(means, n_resamples, (1 - level) / 2);
  out->high = ks_quantile(means, n_resamples, 1 - (1 - level) / 2);
out:
  free(groups);
  free(means);
  return status;
}

ks_status ks_bootstrap_paired(const double *a, const double *b, const int64_t *group_sizes, int64_t n_groups,
                              double level, int64_t n_resamples, uint64_t seed, ks_interval *out) {
  int64_t n_values = 0;
  double *differences = NULL;
  KS_TRY(check_groups(group_sizes, n_groups, &n_values));
  if (n_values > 0 && (!a || !b))
    return KS_FAIL(KS_EINVAL, "paired bootstrap: %lld pairs are announced but an array is NULL",
                   (long long)n_values);
  KS_TRY(
      ks_alloc_array(&differences, (size_t)n_values, sizeof *differences, "paired bootstrap: differences"));
  for (int64_t i = 0; i < n_values; i++)
    differences[i] = a[i] - b[i];
  ks_status status = ks_bootstrap(differences, group_sizes, n_groups, level, n_resamples, seed, out);
  free(differences);
  return status;
}

/* Regularised incomplete gamma functions: P(a, x) by its series (DLMF 8.7.1), Q(a, x) by its continued
 * fraction (DLMF 8.9.2, evaluated by Lentz's method as modified by Thompson and Barnett 1986). Each is used
 * where it converges in about sqrt(a) steps. */
static const double max_steps = 1e7; /* enough for 10^12 degrees of freedom */

static double gamma_factor(double a, double x) {
  int sign;
  return exp(a * log(x) - x - lgamma_r(a, &sign));
}

static double gamma_p_series(double a, double x) {
  double term = 1 / a, sum = term;
  for (double i = 1; i < max_steps && term > sum * 0x1p-54; i++)
    sum += term *= x / (a + i);
  return sum * gamma_factor(a, x);
}

static double gamma_q_fraction(double a, double x) {
  const double tiny = 1e-300;
  double b = x + 1 - a, c = 1 / tiny, d = 1 / b, h = d;
  for (double i = 1; i < max_steps; i++) {
    double an = i * (a - i);
    b += 2;
    d = an * d + b;
    c = b + an / c;
    d = 1 / (fabs(d) < tiny ? tiny : d);
    c = fabs(c) < tiny ? tiny : c;
    h *= d * c;
    if (fabs(d * c - 1) < 0x1p-51) break;
  }
  return h * gamma_factor(a, x);
}

double ks_chi_square_tail(double x, double k) {
  if (isnan(x) || !(k > 0) || isinf(k)) return NAN;
  if (x <= 0) return 1;
  if (isinf(x)) return 0;
  double a = k / 2, y = x / 2;
  return y < a + 1 ? 1 - gamma_p_series(a, y) : gamma_q_fraction(a, y);
}
