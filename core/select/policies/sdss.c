/* The paper's rule (arXiv 2311.12275; METHOD 1.1): while a bin is free, keep. When none is, the kept sets
 * that lie strictly below the arrival on all three scores, EOE, DSS and IDD, are candidates; one of them,
 * drawn uniformly, gives way. No candidate: the arrival is dropped.
 *
 * A tie on any score is not below. An arrival with a NaN score is dropped even when a bin is free: it
 * compares with nothing, so it could never be replaced. */
#include "core/select/select.h"

static bool is_below(const ks_scores *kept, const ks_scores *a) {
  return kept->eoe < a->eoe && kept->dss < a->dss && kept->idd < a->idd;
}

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)state;
  const ks_scores *s = &a->scores;
  *out = (ks_decision){.keep = false, .slot = KS_SLOT_FREE};
  if (isnan(s->eoe) || isnan(s->dss) || isnan(s->idd)) return KS_OK;
  if (ks_buffer_has_room(b)) {
    out->keep = true;
    return KS_OK;
  }
  uint64_t n_candidates = 0;
  for (int64_t i = 0; i < b->n_bins; i++)
    n_candidates += is_below(&b->bins[i].scores, s);
  if (n_candidates == 0) return KS_OK;
  uint64_t chosen = ks_rng_below(rng, n_candidates), seen = 0;
  for (int64_t i = 0; i < b->n_bins; i++)
    if (is_below(&b->bins[i].scores, s) && seen++ == chosen) out->slot = i;
  out->keep = true;
  return KS_OK;
}

const ks_policy ks_policy_sdss = {.name = "sdss",
                                  .what = "replaces a set that is lower on EOE, DSS and IDD (the paper's)",
                                  .trains = true,
                                  .uses_idd = true,
                                  .offer = offer};
