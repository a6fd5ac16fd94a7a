/* A uniform sample of what came so far (Vitter 1985, algorithm R): the arrival that finds n before it comes
 * into a free bin, else with probability exactly B / (n + 1), replacing a set drawn uniformly: one draw j
 * from {0 .. n}; j < B is the bin.
 *
 * n counts the arrivals that fit a bin, since the start or since the buffer was last cleared. Looks at no
 * score: NaN changes nothing. */
#include "core/select/bytes.h"
#include "core/select/select.h"

typedef struct {
  uint64_t n_seen;
} reservoir;

static ks_status create(const ks_policy_params *params, void **state) {
  (void)params;
  return ks_alloc_array(state, 1, sizeof(reservoir), "policy reservoir");
}

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)a;
  reservoir *r = state;
  *out = (ks_decision){.keep = true, .slot = KS_SLOT_FREE};
  r->n_seen++;
  if (ks_buffer_has_room(b)) return KS_OK;
  uint64_t j = ks_rng_below(rng, r->n_seen);
  out->keep = j < (uint64_t)b->n_bins;
  if (out->keep) out->slot = (int64_t)j;
  return KS_OK;
}

static void cleared(void *state) {
  ((reservoir *)state)->n_seen = 0;
}

static ks_status snapshot(const void *state, ks_text *out) {
  return ks_bytes_put_u64(out, ((const reservoir *)state)->n_seen);
}

static ks_status restore(void *state, const void *bytes, size_t n) {
  ks_bytes_reader r = {.p = bytes, .n = n, .what = "snapshot of policy reservoir"};
  KS_TRY(ks_bytes_get_u64(&r, &((reservoir *)state)->n_seen));
  if (((reservoir *)state)->n_seen >> 56)
    return KS_FAIL(KS_EDATA, "%s: impossible count of arrivals; it is damaged", r.what);
  return ks_bytes_end(&r);
}

const ks_policy ks_policy_reservoir = {.name = "reservoir",
                                       .what = "a uniform sample of all arrivals so far",
                                       .trains = true,
                                       .create = create,
                                       .offer = offer,
                                       .cleared = cleared,
                                       .snapshot = snapshot,
                                       .restore = restore,
                                       .destroy = free};
