#include "core/select/bytes.h"
#include "core/select/select.h"

#define SNAPSHOT_MAGIC 0x314c45534b53ull /* "SKSEL1" */
#define SNAPSHOT_WHAT  "selector snapshot"
#define GROUP_FREE     INT32_MIN /* no domain: free bins */
#define MAX_ARRIVAL    ((int64_t)1 << 56)

struct ks_selector {
  ks_ctx *ctx;
  ks_selector_params params;
  ks_buffer *buffer;
  void *state; /* the policy's */
  /* scratch for as many bins as there are (cap) */
  int32_t *groups, *domains;  /* of the bins, of what is asked about */
  int64_t *except, *n_others; /* by what is asked about */
  double *means;
  int64_t cap;
  float *asked; /* backend memory [cap_asked, n_dim], for refreshing alone */
  int64_t cap_asked;
  ks_selector_counts counts;
};

static void free_scratch(ks_selector *s) {
  void *arrays[] = {s->groups, s->domains, s->except, s->n_others, s->means};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
    free(arrays[i]);
  s->groups = s->domains = NULL;
  s->except = s->n_others = NULL;
  s->means = NULL;
  s->cap = 0;
}

static ks_status reserve_scratch(ks_selector *s) {
  const size_t n = (size_t)s->buffer->n_bins;
  if (s->cap >= s->buffer->n_bins) return KS_OK;
  free_scratch(s);
  KS_TRY(ks_alloc_array(&s->groups, n, sizeof *s->groups, "selector: domains"));
  KS_TRY(ks_alloc_array(&s->domains, n, sizeof *s->domains, "selector: domains"));
  KS_TRY(ks_alloc_array(&s->except, n, sizeof *s->except, "selector: bins"));
  KS_TRY(ks_alloc_array(&s->n_others, n, sizeof *s->n_others, "selector: bins"));
  KS_TRY(ks_alloc_array(&s->means, n, sizeof *s->means, "selector: distances"));
  s->cap = s->buffer->n_bins;
  return KS_OK;
}

static ks_status reserve_asked(ks_selector *s) {
  const ks_buffer *b = s->buffer;
  void *asked;
  size_t bytes;
  if (s->cap_asked >= b->n_bins) return KS_OK;
  ks_mem_free(s->ctx, s->asked);
  s->asked = NULL;
  s->cap_asked = 0;
  if (!ks_mul_size((size_t)b->n_bins, (size_t)b->n_dim * sizeof *s->asked, &bytes))
    return KS_FAIL(KS_EOVERFLOW, "selector: %lld bins of %lld numbers", (long long)b->n_bins,
                   (long long)b->n_dim);
  KS_TRY(ks_mem_alloc(s->ctx, bytes, &asked));
  s->asked = asked;
  s->cap_asked = b->n_bins;
  return KS_OK;
}

static ks_status create_state(const ks_selector *s, void **state) {
  *state = NULL;
  const ks_policy_params params = {.n_bins = s->params.n_bins, .n_dim = s->params.n_dim, .ctx = s->ctx};
  return s->params.policy->create ? s->params.policy->create(&params, state) : KS_OK;
}

static void destroy_state(const ks_selector *s, void *state) {
  if (state && s->params.policy->destroy) s->params.policy->destroy(state);
}

static ks_status create_buffer(const ks_selector *s, ks_buffer **out) {
  const ks_selector_params *p = &s->params;
  return ks_buffer_create(s->ctx, p->n_bins, p->bin_bytes, p->n_dim, p->policy->unlimited, out);
}

ks_status ks_selector_create(ks_ctx *ctx, const ks_selector_params *params, ks_selector **out) {
  *out = NULL;
  if (!params->policy || !params->policy->offer) return KS_FAIL(KS_EINVAL, "selector: no policy");
  if (params->idd_empty < KS_IDD_EMPTY_ONE || params->idd_empty > KS_IDD_EMPTY_INF)
    return KS_FAIL(KS_EINVAL, "selector: idd_empty is %d", (int)params->idd_empty);
  size_t least = ks_buffer_set_bytes(params->n_dim, "", "");
  if (params->n_dim >= 1 && params->bin_bytes < least && !params->policy->unlimited)
    return KS_FAIL(KS_ECONFIG,
                   "selector: a bin of %zu bytes cannot hold the embedding, which takes %zu; use larger bins",
                   params->bin_bytes, least);
  ks_selector *s = NULL;
  KS_TRY(ks_alloc_array(&s, 1, sizeof *s, "selector"));
  s->ctx = ctx;
  s->params = *params;
  ks_status status = create_buffer(s, &s->buffer);
  if (status == KS_OK) status = create_state(s, &s->state);
  if (status != KS_OK) {
    ks_selector_destroy(s);
    return status;
  }
  *out = s;
  return KS_OK;
}

void ks_selector_destroy(ks_selector *s) {
  if (!s) return;
  destroy_state(s, s->state);
  ks_buffer_destroy(s->buffer);
  free_scratch(s);
  ks_mem_free(s->ctx, s->asked);
  free(s);
}

ks_buffer *ks_selector_buffer(ks_selector *s) {
  return s->buffer;
}
ks_selector_counts ks_selector_get_counts(const ks_selector *s) {
  return s->counts;
}

void ks_selector_clear(ks_selector *s) {
  ks_buffer_clear(s->buffer);
  if (s->params.policy->cleared) s->params.policy->cleared(s->state);
}

/* Mean of 1 - cosine between each of n embeddings and the kept sets of its domain, bin except[i] (-1: none) left out: means[i]. */
static ks_status mean_distances(ks_selector *s, const float *embeddings, int64_t n) {
  static const double of_empty[] = {
      [KS_IDD_EMPTY_ONE] = 1.0, [KS_IDD_EMPTY_ZERO] = 0.0, [KS_IDD_EMPTY_INF] = INFINITY};
  const ks_buffer *b = s->buffer;
  int64_t n_rows = 0;
  for (int64_t i = 0; i < b->n_bins; i++) {
    s->groups[i] = b->bins[i].used ? b->bins[i].domain : GROUP_FREE;
    if (b->bins[i].used) n_rows = i + 1;
  }
  const ks_similarity_args args = {.q = embeddings,
                                   .k = b->embeddings,
                                   .n_q = n,
                                   .n_k = n_rows,
                                   .n_cols = b->n_dim,
                                   .metric = KS_METRIC_COSINE};
  const ks_similarity_groups groups = {.keys = s->groups, .queries = s->domains, .except = s->except};
  KS_TRY(ks_similarity_mean(s->ctx, &args, &groups, s->means, s->n_others));
  for (int64_t i = 0; i < n; i++)
    s->means[i] = s->n_others[i] > 0 ? 1.0 - s->means[i] : of_empty[s->params.idd_empty];
  return KS_OK;
}

/* Of an arrival, to all kept sets of its domain. */
static ks_status mean_distance(ks_selector *s, const float *embedding, int32_t domain, double *out) {
  KS_TRY(reserve_scratch(s));
  s->domains[0] = domain;
  s->except[0] = -1;
  KS_TRY(mean_distances(s, embedding, 1));
  *out = s->means[0];
  return KS_OK;
}

/* Of the kept sets of two domains, each to the others of its own: all in one call. */
static ks_status refresh(ks_selector *s, int32_t domain, int32_t other_domain) {
  ks_buffer *b = s->buffer;
  int64_t n = 0;
  KS_TRY(reserve_scratch(s));
  KS_TRY(reserve_asked(s));
  for (int64_t i = 0; i < b->n_bins; i++) {
    const ks_kept *k = &b->bins[i];
    if (!k->used || (k->domain != domain && k->domain != other_domain)) continue;
    KS_TRY(ks_mem_copy(s->ctx, s->asked + n * b->n_dim, b->embeddings + i * b->n_dim,
                       (size_t)b->n_dim * sizeof(float)));
    s->domains[n] = k->domain;
    s->except[n++] = i;
  }
  KS_TRY(mean_distances(s, s->asked, n));
  for (int64_t i = 0; i < n; i++)
    b->bins[s->except[i]].scores.idd = s->means[i];
  return KS_OK;
}

static ks_status check_arrival(const ks_arrival *a) {
  if (!a->embedding || !a->question || !a->response)
    return KS_FAIL(KS_EINVAL, "selector: arrival %lld lacks text or embedding", (long long)a->arrival);
  if (a->arrival < 0 || a->arrival >= MAX_ARRIVAL)
    return KS_FAIL(KS_EINVAL, "selector: arrival index %lld is out of range", (long long)a->arrival);
  if (a->domain < -1)
    return KS_FAIL(KS_EINVAL, "selector: arrival %lld has domain %d; -1 means none", (long long)a->arrival,
                   (int)a->domain);
  return KS_OK;
}

/* What the policy says, brought to a bin that exists. */
static ks_status decide(ks_selector *s, const ks_arrival *a, ks_decision *d) {
  const ks_policy *policy = s->params.policy;
  ks_rng rng = ks_rng_make(s->params.seed, KS_RNG_POLICY, (uint64_t)a->arrival);
  *d = (ks_decision){.keep = false, .slot = KS_SLOT_FREE};
  KS_TRY_AS(policy->offer(s->state, a, s->buffer, &rng, d), "policy %s", policy->name);
  if (!ks_buffer_is_sound(s->buffer))
    return KS_FAIL(KS_EBUDGET, "policy %s wrote into the buffer; only its decision may change it",
                   policy->name);
  if (!d->keep) return KS_OK;
  if (d->slot == KS_SLOT_FREE) {
    KS_TRY(ks_buffer_free_slot(s->buffer, &d->slot));
    if (d->slot < 0)
      return KS_FAIL(KS_EBUDGET, "policy %s keeps arrival %lld, but all %lld bins are taken", policy->name,
                     (long long)a->arrival, (long long)s->buffer->n_bins);
  }
  if (d->slot < 0 || d->slot >= s->buffer->n_bins)
    return KS_FAIL(KS_EBUDGET, "policy %s puts arrival %lld into bin %lld; there are %lld", policy->name,
                   (long long)a->arrival, (long long)d->slot, (long long)s->buffer->n_bins);
  return KS_OK;
}

static ks_status offer(ks_selector *s, const ks_arrival *given, ks_offer_result *out) {
  ks_buffer *b = s->buffer;
  const ks_policy *policy = s->params.policy;
  ks_arrival a = *given;
  KS_TRY(check_arrival(&a));
  a.scores.idd = NAN;
  if (policy->uses_idd || !s->params.idd_only_if_used)
    KS_TRY(mean_distance(s, a.embedding, a.domain, &a.scores.idd));
  *out = (ks_offer_result){.outcome = KS_DROPPED, .slot = -1, .victim_set_id = -1, .idd = a.scores.idd};
  if (!b->unlimited && ks_buffer_set_bytes(b->n_dim, a.question, a.response) > b->bin_bytes) {
    out->outcome = KS_OVERSIZE;
    return KS_OK;
  }
  ks_decision d;
  KS_TRY(decide(s, &a, &d));
  if (!d.keep) return KS_OK;
  int32_t victim_domain = a.domain;
  out->outcome = KS_KEPT;
  out->slot = d.slot;
  if (b->bins[d.slot].used) {
    out->outcome = KS_REPLACED;
    out->victim_set_id = b->bins[d.slot].set_id;
    victim_domain = b->bins[d.slot].domain;
  }
  KS_TRY(ks_buffer_put(b, d.slot, a.arrival, a.set_id, a.domain, &a.scores, a.question, a.response,
                       a.embedding));
  if (s->params.idd_refresh && policy->uses_idd) KS_TRY(refresh(s, a.domain, victim_domain));
  return KS_OK;
}

ks_status ks_selector_offer(ks_selector *s, const ks_arrival *a, ks_offer_result *out) {
  double begin = ks_clock_seconds();
  KS_TRY(offer(s, a, out));
  ks_selector_counts *c = &s->counts;
  c->offered++;
  c->dropped += out->outcome == KS_DROPPED || out->outcome == KS_OVERSIZE;
  c->oversize += out->outcome == KS_OVERSIZE;
  c->kept += out->outcome == KS_KEPT || out->outcome == KS_REPLACED;
  c->replaced += out->outcome == KS_REPLACED;
  KS_ASSERT_EQ(c->offered, c->kept + c->dropped);
  KS_ASSERT(ks_buffer_is_sound(s->buffer));
  c->seconds += ks_clock_seconds() - begin;
  return KS_OK;
}

/* ---------------------------------------------------------------- snapshot */

static ks_status put_kept(const ks_selector *s, int64_t slot, float *row, ks_text *out) {
  const ks_buffer *b = s->buffer;
  const ks_kept *k = &b->bins[slot];
  KS_TRY(ks_bytes_put_i64(out, slot));
  KS_TRY(ks_bytes_put_i64(out, k->arrival));
  KS_TRY(ks_bytes_put_i64(out, k->set_id));
  KS_TRY(ks_bytes_put_i64(out, k->domain));
  KS_TRY(ks_bytes_put_f64(out, k->scores.eoe));
  KS_TRY(ks_bytes_put_f64(out, k->scores.dss));
  KS_TRY(ks_bytes_put_f64(out, k->scores.idd));
  KS_TRY(ks_bytes_put_u64(out, (uint64_t)k->annotated | (uint64_t)k->asked << 1));
  KS_TRY(ks_bytes_put_blob(out, k->question, strlen(k->question)));
  KS_TRY(ks_bytes_put_blob(out, k->response, strlen(k->response)));
  KS_TRY(ks_mem_download(s->ctx, row, b->embeddings + slot * b->n_dim, (size_t)b->n_dim * sizeof *row));
  return ks_bytes_put_f32s(out, row, b->n_dim);
}

static ks_status put_state(const ks_selector *s, ks_text *out) {
  ks_text state = {0};
  ks_status status = s->params.policy->snapshot ? s->params.policy->snapshot(s->state, &state) : KS_OK;
  if (status == KS_OK) status = ks_bytes_put_blob(out, state.data, state.len);
  ks_text_free(&state);
  return status;
}

ks_status ks_selector_snapshot(const ks_selector *s, ks_text *out) {
  const ks_buffer *b = s->buffer;
  const ks_selector_counts *c = &s->counts;
  const char *name = s->params.policy->name;
  KS_TRY(ks_bytes_put_u64(out, SNAPSHOT_MAGIC));
  KS_TRY(ks_bytes_put_blob(out, name, strlen(name)));
  const int64_t fixed[] = {s->params.n_bins, s->params.n_dim, (int64_t)s->params.bin_bytes,
                           (int64_t)s->params.seed};
  for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
    KS_TRY(ks_bytes_put_i64(out, fixed[i]));
  const int64_t counts[] = {c->offered, c->dropped, c->kept, c->replaced, c->oversize};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    KS_TRY(ks_bytes_put_i64(out, counts[i]));
  KS_TRY(ks_bytes_put_u64(out, b->peak_bytes));
  KS_TRY(put_state(s, out));
  KS_TRY(ks_bytes_put_i64(out, b->n_used));
  float *row = NULL;
  KS_TRY(ks_alloc_array(&row, (size_t)b->n_dim, sizeof *row, "selector snapshot: embedding"));
  ks_status status = KS_OK;
  for (int64_t i = 0; i < b->n_bins && status == KS_OK; i++)
    if (b->bins[i].used) status = put_kept(s, i, row, out);
  free(row);
  return status;
}

/* Reads one kept set into the next bins of b; slots must rise. `staged`: backend memory [n_dim]. */
static ks_status get_kept(ks_bytes_reader *r, ks_buffer *b, int64_t *last_slot, float *row, float *staged) {
  int64_t slot, arrival, set_id, domain;
  uint64_t flags;
  ks_scores scores;
  KS_TRY(ks_bytes_get_i64(r, &slot));
  KS_TRY(ks_bytes_get_i64(r, &arrival));
  KS_TRY(ks_bytes_get_i64(r, &set_id));
  KS_TRY(ks_bytes_get_i64(r, &domain));
  KS_TRY(ks_bytes_get_f64(r, &scores.eoe));
  KS_TRY(ks_bytes_get_f64(r, &scores.dss));
  KS_TRY(ks_bytes_get_f64(r, &scores.idd));
  KS_TRY(ks_bytes_get_u64(r, &flags));
  bool in_order = b->unlimited ? slot == *last_slot + 1 : slot > *last_slot && slot < b->n_bins;
  if (!in_order || arrival < 0 || arrival >= MAX_ARRIVAL || domain < -1 || domain > INT32_MAX || flags > 3)
    return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": a kept set before byte %zu makes no sense; it is damaged",
                   r->pos);
  *last_slot = slot;
  char *question = NULL, *response = NULL;
  ks_status status = ks_bytes_get_text(r, &question);
  if (status == KS_OK) status = ks_bytes_get_text(r, &response);
  if (status == KS_OK) status = ks_bytes_get_f32s(r, row, b->n_dim);
  if (status == KS_OK) status = ks_mem_upload(b->ctx, staged, row, (size_t)b->n_dim * sizeof *row);
  int64_t free_slot;
  if (status == KS_OK && b->unlimited) status = ks_buffer_free_slot(b, &free_slot); /* grows it */
  if (status == KS_OK) {
    status = ks_buffer_put(b, slot, arrival, set_id, (int32_t)domain, &scores, question, response, staged);
    if (status == KS_EBUDGET)
      status = KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": set %lld is larger than a bin; it is damaged",
                       (long long)set_id);
  }
  free(question);
  free(response);
  KS_TRY(status);
  b->bins[slot].annotated = flags & 1;
  b->bins[slot].asked = flags >> 1 & 1;
  return KS_OK;
}

static ks_status get_buffer(ks_bytes_reader *r, uint64_t peak_bytes, ks_buffer *b) {
  int64_t n_used, last_slot = -1;
  KS_TRY(ks_bytes_get_i64(r, &n_used));
  if (n_used < 0 || (!b->unlimited && n_used > b->n_bins))
    return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": %lld kept sets in %lld bins; it is damaged", (long long)n_used,
                   (long long)b->n_bins);
  size_t row_bytes = (size_t)b->n_dim * sizeof(float);
  float *row = NULL;
  void *staged = NULL;
  ks_status status = ks_alloc_array(&row, (size_t)b->n_dim, sizeof *row, "selector snapshot: embedding");
  if (status == KS_OK) status = ks_mem_alloc(b->ctx, row_bytes, &staged);
  for (int64_t i = 0; i < n_used && status == KS_OK; i++)
    status = get_kept(r, b, &last_slot, row, staged);
  ks_mem_free(b->ctx, staged);
  free(row);
  KS_TRY(status);
  if (peak_bytes < b->used_bytes || (!b->unlimited && peak_bytes / b->bin_bytes > (uint64_t)b->n_bins))
    return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": impossible peak of %llu bytes; it is damaged",
                   (unsigned long long)peak_bytes);
  b->peak_bytes = (size_t)peak_bytes;
  return KS_OK;
}

static ks_status get_counts(ks_bytes_reader *r, ks_selector_counts *c) {
  int64_t *const fields[] = {&c->offered, &c->dropped, &c->kept, &c->replaced, &c->oversize};
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
    KS_TRY(ks_bytes_get_i64(r, fields[i]));
    if (*fields[i] < 0 || *fields[i] >= MAX_ARRIVAL)
      return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": a count of %lld; it is damaged", (long long)*fields[i]);
  }
  if (c->offered == c->kept + c->dropped && c->replaced <= c->kept && c->oversize <= c->dropped) return KS_OK;
  return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": counts do not add up; it is damaged");
}

static ks_status get_header(ks_bytes_reader *r, const ks_selector *s) {
  const ks_selector_params *p = &s->params;
  KS_TRY(ks_bytes_expect_u64(r, SNAPSHOT_MAGIC, "its first word"));
  const void *name;
  size_t n;
  KS_TRY(ks_bytes_get_blob(r, &name, &n));
  if (n != strlen(p->policy->name) || memcmp(name, p->policy->name, n) != 0)
    return KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": it is not of policy %s", p->policy->name);
  KS_TRY(ks_bytes_expect_u64(r, (uint64_t)p->n_bins, "number of bins"));
  KS_TRY(ks_bytes_expect_u64(r, (uint64_t)p->n_dim, "size of an embedding"));
  KS_TRY(ks_bytes_expect_u64(r, p->bin_bytes, "size of a bin"));
  return ks_bytes_expect_u64(r, p->seed, "seed");
}

ks_status ks_selector_restore(ks_selector *s, const void *bytes, size_t n) {
  ks_bytes_reader r = {.p = bytes, .n = n, .what = SNAPSHOT_WHAT};
  const ks_policy *policy = s->params.policy;
  ks_selector_counts counts = {.seconds = s->counts.seconds};
  ks_buffer *buffer = NULL;
  void *state = NULL;
  const void *state_bytes;
  size_t n_state_bytes;
  uint64_t peak_bytes;
  ks_status status = KS_OK;
  KS_TRY_OUT(get_header(&r, s));
  KS_TRY_OUT(get_counts(&r, &counts));
  KS_TRY_OUT(ks_bytes_get_u64(&r, &peak_bytes));
  KS_TRY_OUT(ks_bytes_get_blob(&r, &state_bytes, &n_state_bytes));
  KS_TRY_OUT(create_state(s, &state));
  if (policy->restore) {
    KS_TRY_OUT(policy->restore(state, state_bytes, n_state_bytes));
  } else if (n_state_bytes > 0) {
    KS_TRY_OUT(KS_FAIL(KS_EDATA,
                       SNAPSHOT_WHAT ": policy %s keeps no state, here are %zu bytes of it; it is damaged",
                       policy->name, n_state_bytes));
  }
  KS_TRY_OUT(create_buffer(s, &buffer));
  KS_TRY_OUT(get_buffer(&r, peak_bytes, buffer));
  KS_TRY_OUT(ks_bytes_end(&r));
  if (buffer->n_used > counts.kept - counts.replaced)
    KS_TRY_OUT(KS_FAIL(KS_EDATA, SNAPSHOT_WHAT ": more sets kept than were admitted; it is damaged"));
  destroy_state(s, s->state);
  ks_buffer_destroy(s->buffer);
  s->state = state;
  s->buffer = buffer;
  s->counts = counts;
  return KS_OK;
out:
  destroy_state(s, state);
  ks_buffer_destroy(buffer);
  return status;
}
