/* Every arrival comes in; when no bin is free it replaces a set drawn uniformly. Looks at no score: a set
 * with NaN scores comes in too. */
#include "core/select/select.h"

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)state, (void)a;
  *out = (ks_decision){.keep = true, .slot = KS_SLOT_FREE};
  if (!ks_buffer_has_room(b)) out->slot = (int64_t)ks_rng_below(rng, (uint64_t)b->n_bins);
  return KS_OK;
}

const ks_policy ks_policy_random = {
    .name = "random", .what = "every arrival replaces a set drawn uniformly", .trains = true, .offer = offer};
