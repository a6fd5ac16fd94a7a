#include "core/select/select.h"

double ks_eoe_normalise(double entropy_bits, int64_t n_tokens, ks_eoe_norm norm) {
  if (n_tokens < (norm == KS_EOE_LOG_N1 ? 1 : 2)) return isnan(entropy_bits) ? entropy_bits : 0;
  return entropy_bits / log2((double)n_tokens + (norm == KS_EOE_LOG_N1 ? 1.0 : 0.0));
}
