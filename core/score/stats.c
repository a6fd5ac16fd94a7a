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

/* The mean of one resample of a table. */
typedef double (*draw_function)(const void *table, ks_rng rng);

static ks_status check_request(const char *what, double level, int64_t n_resamples, const ks_interval *out) {
  return out && level > 0 && level < 1 && n_resamples >= 1
             ? KS_OK
             : KS_FAIL(
                   KS_EINVAL,
                   "%s: level %g and %lld resamples; give a level between 0 and 1, at least 1 resample and "
                   "a place for the result",
                   what, level, (long long)n_resamples);
}

static ks_status find_bounds(draw_function draw, const void *table, double level, int64_t n_resamples,
                             uint64_t seed, ks_interval *out) {
  double *means;
  KS_TRY(ks_alloc_array(&means, (size_t)n_resamples, sizeof *means, "bootstrap: means"));
  /* one stream a resample: the first resamples stay the same when more are asked for */
  for (int64_t r = 0; r < n_resamples; r++)
    means[r] = draw(table, ks_rng_make(seed, KS_RNG_BOOTSTRAP, (uint64_t)r));
  out->low = ks_quantile(means, n_resamples, (1 - level) / 2);
  out->high = ks_quantile(means, n_resamples, 1 - (1 - level) / 2);
  free(means);
  return KS_OK;
}

static ks_status subtract(const double *a, const double *b, int64_t n, double **out) {
  if (n > 0 && (!a || !b))
    return KS_FAIL(KS_EINVAL, "paired bootstrap: %lld pairs are announced but an array is NULL",
                   (long long)n);
  KS_TRY(ks_alloc_array(out, (size_t)n, sizeof **out, "paired bootstrap: differences"));
  for (int64_t i = 0; i < n; i++)
    (*out)[i] = a[i] - b[i];
  return KS_OK;
}

/* ---------------------------------------------------------------- nested */

/* Groups that have values: first value and count. */
typedef struct {
  int64_t first, n;
} group;

typedef struct {
  const double *values;
  group *groups;
  int64_t n_groups;
} nested_table;

static double draw_nested(const void *table, ks_rng rng) {
  const nested_table *t = table;
  double sum = 0;
  int64_t n = 0;
  for (int64_t g = 0; g < t->n_groups; g++) {
    const group *drawn = &t->groups[ks_rng_below(&rng, (uint64_t)t->n_groups)];
    for (int64_t i = 0; i < drawn->n; i++)
      sum += t->values[drawn->first + (int64_t)ks_rng_below(&rng, (uint64_t)drawn->n)];
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
  int64_t n_values = 0;
  KS_TRY(check_request("bootstrap", level, n_resamples, out));
  KS_TRY(check_groups(group_sizes, n_groups, &n_values));
  if (n_values > 0 && !values)
    return KS_FAIL(KS_EINVAL, "bootstrap: %lld values are announced but the array is NULL",
                   (long long)n_values);
  *out = (ks_interval){NAN, NAN, NAN, n_values};
  double sum = 0;
  for (int64_t i = 0; i < n_values; i++)
    sum += values[i];
  if (n_values == 0 || isnan(sum)) return KS_OK;

  nested_table t = {values, NULL, 0};
  KS_TRY(ks_alloc_array(&t.groups, (size_t)n_groups, sizeof *t.groups, "bootstrap: groups"));
  for (int64_t g = 0, first = 0; g < n_groups; first += group_sizes[g++])
    if (group_sizes[g] > 0) t.groups[t.n_groups++] = (group){first, group_sizes[g]};
  ks_status status = find_bounds(draw_nested, &t, level, n_resamples, seed, out);
  if (status == KS_OK) out->mean = sum / (double)n_values;
  free(t.groups);
  return status;
}

ks_status ks_bootstrap_paired(const double *a, const double *b, const int64_t *group_sizes, int64_t n_groups,
                              double level, int64_t n_resamples, uint64_t seed, ks_interval *out) {
  int64_t n_values = 0;
  double *differences;
  KS_TRY(check_groups(group_sizes, n_groups, &n_values));
  KS_TRY(subtract(a, b, n_values, &differences));
  ks_status status = ks_bootstrap(differences, group_sizes, n_groups, level, n_resamples, seed, out);
  free(differences);
  return status;
}

/* ---------------------------------------------------------------- crossed */

typedef struct {
  double *values; /* [n_rows, n_columns] */
  int64_t n_rows, n_columns;
  int64_t *drawn; /* scratch: [n_rows] */
} crossed_table;

static double draw_crossed(const void *table, ks_rng rng) {
  const crossed_table *t = table;
  double sum = 0;
  for (int64_t i = 0; i < t->n_rows; i++)
    t->drawn[i] = (int64_t)ks_rng_below(&rng, (uint64_t)t->n_rows);
  for (int64_t j = 0; j < t->n_columns; j++) {
    const double *column = t->values + ks_rng_below(&rng, (uint64_t)t->n_columns);
    for (int64_t i = 0; i < t->n_rows; i++)
      sum += column[t->drawn[i] * t->n_columns];
  }
  return sum / (double)(t->n_rows * t->n_columns);
}

/* sqrt(n / (n - 1)) - 1; a single row or column has no deviation to stretch. */
static double stretch(int64_t n) {
  return n > 1 ? sqrt((double)n / (double)(n - 1)) - 1 : 0;
}

/* The deviations of the row means and of the column means from the mean, stretched; what is left of each
 * value stays as it is. */
static void fill_stretched(const double *values, double mean, crossed_table *t) {
  int64_t n_rows = t->n_rows, n_columns = t->n_columns;
  for (int64_t i = 0; i < n_rows; i++) {
    double sum = 0;
    for (int64_t j = 0; j < n_columns; j++)
      sum += values[i * n_columns + j];
    for (int64_t j = 0; j < n_columns; j++)
      t->values[i * n_columns + j] =
          values[i * n_columns + j] + stretch(n_rows) * (sum / (double)n_columns - mean);
  }
  for (int64_t j = 0; j < n_columns; j++) {
    double sum = 0;
    for (int64_t i = 0; i < n_rows; i++)
      sum += values[i * n_columns + j];
    for (int64_t i = 0; i < n_rows; i++)
      t->values[i * n_columns + j] += stretch(n_columns) * (sum / (double)n_rows - mean);
  }
}

static ks_status check_shape(int64_t n_rows, int64_t n_columns, int64_t *n_values) {
  if (n_rows < 0 || n_columns < 0 || __builtin_mul_overflow(n_rows, n_columns, n_values))
    return KS_FAIL(KS_EINVAL, "crossed bootstrap: %lld seeds and %lld questions; give sizes of 0 or more",
                   (long long)n_rows, (long long)n_columns);
  return KS_OK;
}

ks_status ks_bootstrap_crossed(const double *values, int64_t n_seeds, int64_t n_questions, double level,
                               int64_t n_resamples, uint64_t seed, ks_interval *out) {
  int64_t n_values;
  ks_status status;
  KS_TRY(check_request("crossed bootstrap", level, n_resamples, out));
  KS_TRY(check_shape(n_seeds, n_questions, &n_values));
  if (n_values > 0 && !values)
    return KS_FAIL(KS_EINVAL, "crossed bootstrap: %lld values are announced but the array is NULL",
                   (long long)n_values);
  *out = (ks_interval){NAN, NAN, NAN, n_values};
  double sum = 0;
  for (int64_t i = 0; i < n_values; i++)
    sum += values[i];
  if (n_values == 0 || !isfinite(sum)) return KS_OK;

  crossed_table t = {.n_rows = n_seeds, .n_columns = n_questions};
  KS_TRY_OUT(ks_alloc_array(&t.values, (size_t)n_values, sizeof *t.values, "crossed bootstrap: values"));
  KS_TRY_OUT(ks_alloc_array(&t.drawn, (size_t)n_seeds, sizeof *t.drawn, "crossed bootstrap: seeds"));
  fill_stretched(values, sum / (double)n_values, &t);
  KS_TRY_OUT(find_bounds(draw_crossed, &t, level, n_resamples, seed, out));
  out->mean = sum / (double)n_values;
out:
  free(t.values);
  free(t.drawn);
  return status;
}

ks_status ks_bootstrap_crossed_paired(const double *a, const double *b, int64_t n_seeds, int64_t n_questions,
                                      double level, int64_t n_resamples, uint64_t seed, ks_interval *out) {
  int64_t n_values;
  double *differences;
  KS_TRY(check_shape(n_seeds, n_questions, &n_values));
  KS_TRY(subtract(a, b, n_values, &differences));
  ks_status status = ks_bootstrap_crossed(differences, n_seeds, n_questions, level, n_resamples, seed, out);
  free(differences);
  return status;
}

/* ---------------------------------------------------------------- chi-square */

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
