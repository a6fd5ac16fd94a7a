/* Sums as pairs of floats, hi + lo: as good as double for the sums of a row, without double's rate of 1 : 64 on small cards.
 *
 *   ks_pair sum = {0.0f, 0.0f};
 *   ks_pair_add(&sum, x);            // hi + x = s + e exactly (Knuth's two-sum); hi becomes s, lo gathers e
 *   ks_pair_merge(&sum, another);
 *
 * x is not a product, unless an exact one: the compiler would make it one fma with the sum and round it elsewhere.
 */
#ifndef KS_CUDA_PAIR_CUH
#define KS_CUDA_PAIR_CUH

#include "kernels/cuda/device.cuh"

typedef struct {
  float hi, lo;
} ks_pair;

/* The compiler must not reorder these: float32 is not associative, and nothing here asks for fast arithmetic. */
KS_DEVICE void ks_pair_add(ks_pair *sum, float x) {
  const float s = sum->hi + x, x_part = s - sum->hi;
  sum->lo += (sum->hi - (s - x_part)) + (x - x_part);
  sum->hi = s;
}
KS_DEVICE void ks_pair_merge(ks_pair *sum, ks_pair other) {
  ks_pair_add(sum, other.hi);
  sum->lo += other.lo;
}

#endif
