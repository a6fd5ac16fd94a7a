/* Float64 oracle of token sampling: exact probabilities after temperature, top-k and top-p, by a full sort.
 */
#ifndef KS_ORACLE_SAMPLE_H
#define KS_ORACLE_SAMPLE_H

#include <stdint.h>

/* p: [n]; 0 for what is cut off. temperature > 0; top_k 0: all; the order is falling logit, rising id. */
void oracle_sample(const float *logits, int64_t n, double temperature, int64_t top_k, double top_p,
                   double *p);
/* Pearson's statistic of counts against probabilities over the tokens with p > 0, and its degrees of freedom;
 * a count where p is 0 makes it infinite. */
double oracle_chi_square(const int64_t *counts, const double *p, int64_t n, int64_t draws, int64_t *freedom);
/* The value that chi-square exceeds with probability 1e-6 (Wilson & Hilferty 1931). */
double oracle_chi_square_limit(int64_t freedom);

#endif
