#include "core/data/data.h"

/* The sets that have not arrived yet, so that a random one, or a random one of a topic, is drawn in constant
 * time. Sets without a topic count as one topic. */
typedef struct {
  const ks_dataset *d;
  int64_t n_topics;                /* with the one of the sets that have none */
  int64_t *all, n_all, *all_at;    /* [n_all] places in d->stream, and where each place lies in all */
  int64_t *by_topic, *by_topic_at; /* the same, grouped by topic */
  int64_t *begin, *count;          /* [n_topics] each group in by_topic */
} waiting;

static int64_t topic_of(const waiting *w, int64_t place) {
  int32_t topic = w->d->sets[w->d->stream[place]].topic;
  return topic < 0 ? w->n_topics - 1 : topic;
}

static void waiting_free(waiting *w) {
  free(w->all);
  free(w->all_at);
  free(w->by_topic);
  free(w->by_topic_at);
  free(w->begin);
  free(w->count);
}

static ks_status waiting_make(const ks_dataset *d, waiting *w) {
  size_t n = (size_t)d->n_stream;
  *w = (waiting){.d = d, .n_topics = d->n_topics + 1};
  KS_TRY(ks_alloc_array(&w->all, n, sizeof *w->all, "stream"));
  KS_TRY(ks_alloc_array(&w->all_at, n, sizeof *w->all_at, "stream"));
  KS_TRY(ks_alloc_array(&w->by_topic, n, sizeof *w->by_topic, "stream"));
  KS_TRY(ks_alloc_array(&w->by_topic_at, n, sizeof *w->by_topic_at, "stream"));
  KS_TRY(ks_alloc_array(&w->begin, (size_t)w->n_topics + 1, sizeof *w->begin, "stream"));
  KS_TRY(ks_alloc_array(&w->count, (size_t)w->n_topics, sizeof *w->count, "stream"));
  for (int64_t i = 0; i < d->n_stream; i++)
    w->begin[topic_of(w, i) + 1]++;
  for (int64_t t = 0; t < w->n_topics; t++)
    w->begin[t + 1] += w->begin[t];
  for (int64_t i = 0; i < d->n_stream; i++) {
    int64_t t = topic_of(w, i), at = w->begin[t] + w->count[t]++;
    w->all[i] = w->all_at[i] = i;
    w->by_topic[at] = i;
    w->by_topic_at[i] = at;
  }
  w->n_all = d->n_stream;
  return KS_OK;
}

/* Fills the hole that `place` leaves with the list's last one. */
static void take(int64_t *list, int64_t *at, int64_t last, int64_t place) {
  int64_t moved = list[last];
  list[at[place]] = moved;
  at[moved] = at[place];
}

static void waiting_remove(waiting *w, int64_t place) {
  int64_t t = topic_of(w, place);
  take(w->all, w->all_at, --w->n_all, place);
  take(w->by_topic, w->by_topic_at, w->begin[t] + --w->count[t], place);
}

static ks_status order_bursts(const ks_dataset *d, const ks_stream_params *p, int64_t *order) {
  waiting w;
  ks_status status = waiting_make(d, &w);
  int64_t topic = -1;
  for (int64_t i = 0; status == KS_OK && i < d->n_stream; i++) {
    ks_rng rng = ks_rng_make(p->seed, KS_RNG_SHUFFLE, (uint64_t)i);
    bool stay = ks_rng_uniform(&rng) < p->correlation && topic >= 0 && w.count[topic] > 0;
    int64_t place = stay ? w.by_topic[w.begin[topic] + (int64_t)ks_rng_below(&rng, (uint64_t)w.count[topic])]
                         : w.all[ks_rng_below(&rng, (uint64_t)w.n_all)];
    topic = topic_of(&w, place);
    waiting_remove(&w, place);
    order[i] = d->stream[place];
  }
  waiting_free(&w);
  return status;
}

static void order_shuffled(const ks_dataset *d, const ks_stream_params *p, int64_t *order) {
  ks_rng rng = ks_rng_make(p->seed, KS_RNG_SHUFFLE, 0);
  for (int64_t i = 0; i < d->n_stream; i++)
    order[i] = d->stream[i];
  for (int64_t i = d->n_stream - 1; i > 0; i--) {
    int64_t j = (int64_t)ks_rng_below(&rng, (uint64_t)i + 1), t = order[i];
    order[i] = order[j];
    order[j] = t;
  }
}

static ks_status check_params(const ks_dataset *d, const ks_stream_params *p) {
  if (!d->stream || d->n_stream == 0)
    return KS_FAIL(KS_EINVAL, "stream: the dataset has no stream; split it first");
  if (p->order == KS_ORDER_FILE || p->order == KS_ORDER_SHUFFLED) return KS_OK;
  if (p->order != KS_ORDER_BURSTS) return KS_FAIL(KS_EINVAL, "stream: no order has number %d", (int)p->order);
  if (!(p->correlation >= 0 && p->correlation <= 1))
    return KS_FAIL(KS_ECONFIG, "stream: the correlation is %g; give a probability from 0 to 1",
                   p->correlation);
  if (d->n_topics == 0)
    return KS_FAIL(KS_ECONFIG,
                   "stream: bursts need topics and '%s' has none; name the field that holds them, or use "
                   "the order shuffled or file",
                   d->name);
  return KS_OK;
}

ks_status ks_stream_order(const ks_dataset *d, const ks_stream_params *params, int64_t **order, int64_t *n) {
  KS_TRY(check_params(d, params));
  int64_t *out = NULL;
  KS_TRY(ks_alloc_array(&out, (size_t)d->n_stream, sizeof *out, "stream"));
  ks_status status = KS_OK;
  if (params->order == KS_ORDER_BURSTS)
    status = order_bursts(d, params, out);
  else if (params->order == KS_ORDER_SHUFFLED)
    order_shuffled(d, params, out);
  else
    memcpy(out, d->stream, (size_t)d->n_stream * sizeof *out);
  if (status != KS_OK) {
    free(out);
    return status;
  }
  *order = out;
  *n = d->n_stream;
  return KS_OK;
}
