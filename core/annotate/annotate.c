#include "core/annotate/annotate.h"
#include "core/select/bytes.h"

#define SNAPSHOT_MAGIC 0x31544f4e4e4153ull /* "SANNOT1" */

struct ks_annotator {
  ks_annotator_params params;
  const ks_dataset *data;
  ks_annotator_counts counts;
};

static bool is_probability(double p) {
  return p >= 0 && p <= 1;
}

ks_status ks_annotator_create(const ks_annotator_params *params, const ks_dataset *data, ks_annotator **out) {
  *out = NULL;
  if (params->ask != KS_ASK_ADMISSION && params->ask != KS_ASK_TRIGGER)
    return KS_FAIL(KS_EINVAL, "annotator: ask is %d", (int)params->ask);
  if (params->budget < -1)
    return KS_FAIL(KS_EINVAL, "annotator: budget is %lld; give 0 or more, or -1 for no bound",
                   (long long)params->budget);
  if (!is_probability(params->refusal) || !is_probability(params->noise))
    return KS_FAIL(KS_EINVAL, "annotator: refusal %g and noise %g must lie between 0 and 1", params->refusal,
                   params->noise);
  ks_annotator *a = NULL;
  KS_TRY(ks_alloc_array(&a, 1, sizeof *a, "annotator"));
  a->params = *params;
  a->data = data;
  *out = a;
  return KS_OK;
}

void ks_annotator_destroy(ks_annotator *a) {
  free(a);
}

ks_annotator_counts ks_annotator_get_counts(const ks_annotator *a) {
  return a->counts;
}

/* Another set that may arrive, uniformly; set_id itself when there is no other. */
static int64_t draw_other(const ks_dataset *d, int64_t set_id, ks_rng *rng) {
  int64_t n = d->stream ? d->n_stream : d->n_sets;
  if (n < 1) return set_id;
  int64_t i = (int64_t)ks_rng_below(rng, (uint64_t)n);
  if ((d->stream ? d->stream[i] : i) == set_id && n > 1)
    i = (i + 1 + (int64_t)ks_rng_below(rng, (uint64_t)(n - 1))) % n;
  return d->stream ? d->stream[i] : i;
}

/* Puts the question of a kept set to the user, if the budget allows. */
static ks_status ask(ks_annotator *a, ks_buffer *b, int64_t slot) {
  ks_kept *k = &b->bins[slot];
  ks_annotator_counts *c = &a->counts;
  if (k->set_id < 0 || k->set_id >= a->data->n_sets)
    return KS_FAIL(KS_EINVAL, "annotator: kept set %lld is not in the dataset, which has %lld",
                   (long long)k->set_id, (long long)a->data->n_sets);
  k->asked = true;
  if (a->params.budget >= 0 && c->asked >= a->params.budget) {
    c->over_budget++;
    return KS_OK;
  }
  ks_rng rng = ks_rng_make(a->params.seed, KS_RNG_ANNOTATOR, (uint64_t)k->arrival);
  bool refuses = ks_rng_uniform(&rng) < a->params.refusal;
  bool errs = ks_rng_uniform(&rng) < a->params.noise;
  c->asked++;
  if (refuses) {
    c->refused++;
  } else {
    int64_t source = errs ? draw_other(a->data, k->set_id, &rng) : k->set_id;
    bool cut;
    ks_status status = ks_buffer_set_response(b, slot, a->data->sets[source].preferred, &cut);
    if (status != KS_OK) {
      c->asked--;
      k->asked = false;
      return status;
    }
    k->annotated = true;
    c->answered++;
    c->noisy += source != k->set_id;
    c->cut += cut;
  }
  KS_ASSERT_EQ(c->asked, c->answered + c->refused);
  KS_ASSERT(a->params.budget < 0 || c->asked <= a->params.budget);
  return KS_OK;
}

ks_status ks_annotator_admitted(ks_annotator *a, ks_buffer *b, int64_t slot) {
  if (slot < 0 || slot >= b->n_bins || !b->bins[slot].used)
    return KS_FAIL(KS_EINVAL, "annotator: bin %lld holds no set", (long long)slot);
  if (a->params.ask != KS_ASK_ADMISSION || b->bins[slot].asked) return KS_OK;
  return ask(a, b, slot);
}

ks_status ks_annotator_trigger(ks_annotator *a, ks_buffer *b) {
  for (int64_t i = 0; i < b->n_bins; i++)
    if (b->bins[i].used && !b->bins[i].asked) KS_TRY(ask(a, b, i));
  return KS_OK;
}

ks_status ks_annotator_snapshot(const ks_annotator *a, ks_text *out) {
  const ks_annotator_counts *c = &a->counts;
  const int64_t counts[] = {c->asked, c->answered, c->refused, c->over_budget, c->noisy, c->cut};
  KS_TRY(ks_bytes_put_u64(out, SNAPSHOT_MAGIC));
  KS_TRY(ks_bytes_put_i64(out, a->params.budget));
  KS_TRY(ks_bytes_put_u64(out, a->params.seed));
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    KS_TRY(ks_bytes_put_i64(out, counts[i]));
  return KS_OK;
}

ks_status ks_annotator_restore(ks_annotator *a, const void *bytes, size_t n) {
  ks_bytes_reader r = {.p = bytes, .n = n, .what = "annotator snapshot"};
  ks_annotator_counts c;
  int64_t *const fields[] = {&c.asked, &c.answered, &c.refused, &c.over_budget, &c.noisy, &c.cut};
  KS_TRY(ks_bytes_expect_u64(&r, SNAPSHOT_MAGIC, "its first word"));
  KS_TRY(ks_bytes_expect_u64(&r, (uint64_t)a->params.budget, "budget"));
  KS_TRY(ks_bytes_expect_u64(&r, a->params.seed, "seed"));
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
    KS_TRY(ks_bytes_get_i64(&r, fields[i]));
    if (*fields[i] < 0) return KS_FAIL(KS_EDATA, "%s: a count below 0; it is damaged", r.what);
  }
  KS_TRY(ks_bytes_end(&r));
  if (c.refused > c.asked || c.answered != c.asked - c.refused || c.noisy > c.answered ||
      c.cut > c.answered || (a->params.budget >= 0 && c.asked > a->params.budget))
    return KS_FAIL(KS_EDATA, "%s: counts do not add up; it is damaged", r.what);
  a->counts = c;
  return KS_OK;
}
