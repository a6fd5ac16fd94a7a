/* Every arrival comes in; when no bin is free it replaces the set that arrived first. Looks at no score: a
 * set with NaN scores comes in too. */
#include "core/select/select.h"

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)state, (void)a, (void)rng;
  *out = (ks_decision){.keep = true, .slot = KS_SLOT_FREE};
  if (ks_buffer_has_room(b)) return KS_OK;
  out->slot = 0;
  for (int64_t i = 1; i < b->n_bins; i++)
    if (b->bins[i].arrival < b->bins[out->slot].arrival) out->slot = i;
  return KS_OK;
}

const ks_policy ks_policy_fifo = {
    .name = "fifo", .what = "every arrival replaces the oldest set", .trains = true, .offer = offer};
