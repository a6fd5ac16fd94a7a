/* Entropy of the components of each row in bits, H = -sum p log2 p.
 *
 *   HISTOGRAM, CLIPPED   p: mass of n_bins equal bins over [min, max], as numpy.histogram of the float64 row
 *   SOFTMAX              p = softmax(row)
 *   ABS                  p = |row| / sum |row|
 *
 * Bytes: 4 n. Work: a division a value for histograms, an exponential or a logarithm for the others.
 *
 * Determinism: double, one chain in the order of columns or bins, exponentials and logarithms of the C
 * library; a row depends on nothing else. */
#include "kernels/cpu/cpu.h"
#include <math.h>

/* Bin of v as numpy assigns it: by division, then moved by one where the bin's edges min + i * width say so.
 */
KS_INLINE int64_t entropy_bin(double v, double min, double max, double width, int64_t n_bins) {
  int64_t b = (int64_t)((v - min) / (max - min) * (double)n_bins);
  if (b > n_bins - 1) b = n_bins - 1;
  double left = (double)b * width + min, right = b == n_bins - 1 ? max : (double)(b + 1) * width + min;
  if (v < left) return b > 0 ? b - 1 : 0;
  return v >= right && b != n_bins - 1 ? b + 1 : b;
}

/* H = log2 n - sum c log2 c / n: most counts are small, and those of 0 and 1 add no rounding. */
static double entropy_of_counts(const int32_t *count, int64_t n_bins, int64_t n) {
  double sum = 0;
  for (int64_t b = 0; b < n_bins; b++) {
    if (count[b] == n) return 0;
    if (count[b] > 1) sum += (double)count[b] * log2((double)count[b]);
  }
  return log2((double)n) - sum / (double)n;
}

/* Histogram of the row with its values held in [low, high]. */
static double entropy_histogram(const float *x, int64_t n, int64_t n_bins, double low, double high,
                                int32_t *count) {
  double min = INFINITY, max = -INFINITY;
  for (int64_t j = 0; j < n; j++) {
    double v = fmin(fmax((double)x[j], low), high);
    min = v < min ? v : min;
    max = v > max ? v : max;
  }
  if (!(max > min)) return 0;
  memset(count, 0, (size_t)n_bins * sizeof *count);
  const double width = (max - min) / (double)n_bins;
  for (int64_t j = 0; j < n; j++)
    count[entropy_bin(fmin(fmax((double)x[j], low), high), min, max, width, n_bins)]++;
  return entropy_of_counts(count, n_bins, n);
}

static double entropy_clipped(const float *x, int64_t n, int64_t n_bins, double clip, int32_t *count) {
  double mean = 0, var = 0;
  for (int64_t j = 0; j < n; j++)
    mean += (double)x[j];
  mean /= (double)n;
  for (int64_t j = 0; j < n; j++)
    var += ((double)x[j] - mean) * ((double)x[j] - mean);
  double reach = clip * sqrt(var / (double)n);
  return entropy_histogram(x, n, n_bins, mean - reach, mean + reach, count);
}

/* With e = exp(x - max), S = sum e:  H = (log S - sum e (x - max) / S) / log 2. */
static double entropy_softmax(const float *x, int64_t n) {
  double max = -INFINITY, sum = 0, weighted = 0;
  for (int64_t j = 0; j < n; j++)
    max = (double)x[j] > max ? (double)x[j] : max;
  for (int64_t j = 0; j < n; j++) {
    double t = (double)x[j] - max, e = exp(t);
    sum += e;
    weighted += e * t;
  }
  return (log(sum) - weighted / sum) * 1.4426950408889634074;
}

static double entropy_abs(const float *x, int64_t n) {
  double sum = 0, h = 0;
  for (int64_t j = 0; j < n; j++)
    sum += fabs((double)x[j]);
  if (sum == 0) return 0;
  for (int64_t j = 0; j < n; j++) {
    double p = fabs((double)x[j]) / sum;
    if (p > 0) h -= p * log2(p);
  }
  return h;
}

static double entropy_row(const ks_entropy_args *a, const float *x, int32_t *count) {
  int bad = 0;
  for (int64_t j = 0; j < a->n_cols; j++)
    bad |= !(__builtin_fabsf(x[j]) < INFINITY);
  if (bad) return NAN;
  if (a->n_cols == 0) return 0;
  switch (a->kind) {
  case KS_ENTROPY_HISTOGRAM:
    return entropy_histogram(x, a->n_cols, a->n_bins, -INFINITY, INFINITY, count);
  case KS_ENTROPY_CLIPPED:
    return entropy_clipped(x, a->n_cols, a->n_bins, a->clip, count);
  case KS_ENTROPY_SOFTMAX:
    return entropy_softmax(x, a->n_cols);
  case KS_ENTROPY_ABS:
    return entropy_abs(x, a->n_cols);
  }
  return NAN;
}

static ks_status entropy(ks_ctx *ctx, const ks_entropy_args *a) {
  const bool bins = a->kind == KS_ENTROPY_HISTOGRAM || a->kind == KS_ENTROPY_CLIPPED;
  KS_TRY(ks_cpu_scratch_reserve(ctx, bins ? (size_t)a->n_bins * sizeof(int32_t) : 0));
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 20 * a->n_rows * a->n_cols)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++)
    a->h[i] = entropy_row(a, a->x + i * a->n_cols, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}
