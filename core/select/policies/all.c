/* Keeps everything, without a storage budget: the ceiling. Looks at no score: a set with NaN scores is kept
 * too. */
#include "core/select/select.h"

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)state, (void)a, (void)b, (void)rng;
  *out = (ks_decision){.keep = true, .slot = KS_SLOT_FREE};
  return KS_OK;
}

const ks_policy ks_policy_all = {.name = "all",
                                 .what = "keeps every set in unlimited storage: the ceiling",
                                 .trains = true,
                                 .unlimited = true,
                                 .offer = offer};
