/* Entropy of the components of a vector in bits, straight from the definitions in kernels/ops.h, in long
 * double but for the histogram's bins, whose rule is one of float64. */
#ifndef KS_ORACLE_ENTROPY_H
#define KS_ORACLE_ENTROPY_H

#include "kernels/ops.h"

double oracle_entropy(const float *x, int64_t n, ks_entropy_kind kind, int64_t n_bins, double clip);

#endif
