/* Referees of text: ROUGE as Google's rouge-score 0.1.2 computes it, and the statistics beside every number. */
#ifndef KS_SCORE_H
#define KS_SCORE_H

#include "core/base/base.h"

typedef struct {
  double precision, recall, f1;
} ks_prf;
typedef enum { KS_ROUGE_1 = 0, KS_ROUGE_2, KS_ROUGE_L } ks_rouge_kind;

/* Tokens as rouge-score: lower case, every character outside [a-z0-9] splits (after Python's str.lower, so that e.g. the Kelvin sign becomes k); with stemming,
 * words longer than 3 characters are Porter-stemmed (NLTK's extensions, as rouge-score uses). Empty target or prediction: zeros. */
ks_status ks_rouge(ks_rouge_kind kind, bool stem, const char *target, const char *prediction, ks_prf *out);
/* NLTK PorterStemmer in its default NLTK_EXTENSIONS mode. word: lower-case ASCII; in place, never longer than before + 1. */
void ks_porter_stem(char *word);

typedef struct {
  double mean, low, high; /* percentile interval */
  int64_t n;
} ks_interval;
/* Mean and bootstrap interval (Efron; percentile) over a table of groups (seeds) of values (questions): groups are drawn with replacement, then values within each
 * (two-level); one group: values alone. values: group by group; group_sizes: [n_groups]. level e.g. 0.95. A NaN value makes the mean and bounds NaN. n = 0: all NaN.
 * Groups without values are left out. Resample i draws from its own stream (KS_RNG_BOOTSTRAP, i). Few groups make the interval too narrow, as every bootstrap's:
 * where groups differ as much as values within them, 95 % holds the truth in 92 % of cases with 12 groups and in 85 % with 5 (tests/core/score/test_stats.c).
 * KS_EINVAL: level outside (0, 1), no resamples, a negative size, a missing array. */
ks_status ks_bootstrap(const double *values, const int64_t *group_sizes, int64_t n_groups, double level, int64_t n_resamples, uint64_t seed, ks_interval *out);
/* Interval of mean(a - b) for paired values (same groups, same questions). */
ks_status ks_bootstrap_paired(const double *a, const double *b, const int64_t *group_sizes, int64_t n_groups, double level, int64_t n_resamples, uint64_t seed, ks_interval *out);
double ks_median(double *values, int64_t n); /* reorders values; n = 0: NaN */
double ks_quantile(double *values, int64_t n, double q); /* reorders values; linear interpolation (numpy's default) */
/* Upper tail of the chi-square distribution with k degrees of freedom. */
double ks_chi_square_tail(double x, double k);

#endif
