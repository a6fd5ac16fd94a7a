#include "tests/oracle/oracle_entropy.h"
#include <math.h>

static double of_masses(const long double *mass, int64_t n, long double total) {
  long double h = 0;
  for (int64_t i = 0; i < n; i++) {
    const long double p = mass[i] / total;
    if (p > 0) h -= p * log2l(p);
  }
  return (double)h;
}

/* The bin whose edges hold v: left <= v < right, the last one closed. */
static double histogram(const double *x, int64_t n, int64_t n_bins) {
  double min = x[0], max = x[0], h = 0;
  long double *mass = calloc((size_t)n_bins, sizeof *mass);
  if (!mass) abort();
  for (int64_t i = 0; i < n; i++)
    min = fmin(min, x[i]), max = fmax(max, x[i]);
  if (max > min) {
    const double width = (max - min) / (double)n_bins;
    for (int64_t i = 0; i < n; i++) {
      int64_t b = 0;
      while (b < n_bins - 1 && x[i] >= (double)(b + 1) * width + min)
        b++;
      mass[b]++;
    }
    h = of_masses(mass, n_bins, (long double)n);
  }
  free(mass);
  return h;
}

double oracle_entropy(const float *x, int64_t n, ks_entropy_kind kind, int64_t n_bins, double clip) {
  double *y = malloc((size_t)(n + 1) * sizeof *y), mean = 0, var = 0, h;
  long double *mass = malloc((size_t)(n + 1) * sizeof *mass), total = 0, max = -INFINITY;
  if (!y || !mass) abort();
  for (int64_t i = 0; i < n; i++) {
    y[i] = (double)x[i];
    mean += y[i];
    max = fmaxl(max, x[i]);
  }
  mean /= (double)n;
  for (int64_t i = 0; i < n; i++)
    var += (y[i] - mean) * (y[i] - mean);
  const double reach = clip * sqrt(var / (double)n);
  for (int64_t i = 0; i < n; i++) {
    if (kind == KS_ENTROPY_CLIPPED) y[i] = fmin(fmax(y[i], mean - reach), mean + reach);
    mass[i] = kind == KS_ENTROPY_SOFTMAX ? expl(y[i] - max) : fabsl(y[i]);
    total += mass[i];
  }
  if (kind == KS_ENTROPY_SOFTMAX || kind == KS_ENTROPY_ABS)
    h = total > 0 ? of_masses(mass, n, total) : 0;
  else
    h = histogram(y, n, n_bins);
  free(y), free(mass);
  return h;
}
