/* Keeps nothing and trains nothing: the floor. Looks at nothing, so NaN scores change nothing. */
#include "core/select/select.h"

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)state, (void)a, (void)b, (void)rng;
  *out = (ks_decision){.keep = false, .slot = KS_SLOT_FREE};
  return KS_OK;
}

const ks_policy ks_policy_none = {
    .name = "none", .what = "keeps nothing, no fine-tuning: the floor", .trains = false, .offer = offer};
