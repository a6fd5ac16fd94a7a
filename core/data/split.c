#include "core/data/data.h"
#include "core/data/text_map.h"

#include <inttypes.h>

static void shuffle(int64_t *ids, int64_t n, ks_rng *rng) {
  for (int64_t i = n - 1; i > 0; i--) {
    int64_t j = (int64_t)ks_rng_below(rng, (uint64_t)i + 1), t = ids[i];
    ids[i] = ids[j];
    ids[j] = t;
  }
}

static int compare_ids(const void *a, const void *b) {
  int64_t x, y;
  memcpy(&x, a, sizeof x);
  memcpy(&y, b, sizeof y);
  return (x > y) - (x < y);
}

/* Takes held-out ids from the front of the drawn order; ids that are left, copies of held-out sets not among
 * them, go to rest. */
static ks_status hold_out(const ks_dataset *d, const int64_t *drawn, int64_t eval_size, int64_t *eval,
                          int64_t *n_eval, int64_t *rest, int64_t *n_rest, int64_t *n_copies) {
  ks_text_map held = {0};
  ks_status status = KS_OK;
  int64_t i = 0, n = 0;
  for (; i < d->n_sets && *n_eval < eval_size; i++) {
    const ks_set *s = &d->sets[drawn[i]];
    int64_t found;
    KS_TRY_OUT(ks_text_map_put(&held, s->question, s->preferred, drawn[i], &found));
    if (found == drawn[i])
      eval[(*n_eval)++] = drawn[i];
    else
      n++;
  }
  for (; i < d->n_sets; i++) {
    const ks_set *s = &d->sets[drawn[i]];
    if (ks_text_map_get(&held, s->question, s->preferred) < 0)
      rest[(*n_rest)++] = drawn[i];
    else
      n++;
  }
  *n_copies = n;
out:
  ks_text_map_free(&held);
  return status;
}

ks_status ks_dataset_split(ks_dataset *d, const ks_split_params *p) {
  if (p->eval_size < 0 || p->stream_size < 0)
    return KS_FAIL(KS_ECONFIG,
                   "split: stream_size %" PRId64 ", eval_size %" PRId64 "; neither may be negative",
                   p->stream_size, p->eval_size);
  int64_t *drawn = NULL, *eval = NULL, *rest = NULL, n_eval = 0, n_rest = 0, n_copies = 0;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&drawn, (size_t)d->n_sets, sizeof *drawn, "split"));
  KS_TRY_OUT(ks_alloc_array(&eval, (size_t)d->n_sets, sizeof *eval, "split"));
  KS_TRY_OUT(ks_alloc_array(&rest, (size_t)d->n_sets, sizeof *rest, "split"));
  for (int64_t i = 0; i < d->n_sets; i++)
    drawn[i] = i;
  ks_rng rng = ks_rng_make(p->seed, KS_RNG_SPLIT, 0);
  shuffle(drawn, d->n_sets, &rng);
  KS_TRY_OUT(hold_out(d, drawn, p->eval_size, eval, &n_eval, rest, &n_rest, &n_copies));
  if (n_eval < p->eval_size || n_rest < p->stream_size || n_rest == 0) {
    status = KS_FAIL(KS_ECONFIG,
                     "split: of %" PRId64 " sets, %" PRId64 " are held out and %" PRId64
                     " are copies of those: %" PRId64 " are left for the stream; eval_size %" PRId64
                     " and stream_size %" PRId64 " ask for more, use smaller ones",
                     d->n_sets, n_eval, n_copies, n_rest, p->eval_size, p->stream_size);
    goto out;
  }
  int64_t n_stream = p->stream_size ? p->stream_size : n_rest;
  qsort(eval, (size_t)n_eval, sizeof *eval, compare_ids);
  qsort(rest, (size_t)n_stream, sizeof *rest, compare_ids);
  free(d->stream);
  free(d->eval);
  d->stream = rest;
  d->n_stream = n_stream;
  d->eval = eval;
  d->n_eval = n_eval;
  rest = eval = NULL;
out:
  free(drawn);
  free(eval);
  free(rest);
  return status;
}
