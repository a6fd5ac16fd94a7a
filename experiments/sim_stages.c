#include "experiments/sim.h"

#include <math.h>

static int64_t window_end(const ks_trial *t) {
  return ks_min_i64(t->n_arrivals + t->config->window.size, t->n_stream);
}

ks_status ks_stage_embed(ks_stage *s) {
  int64_t *ids, n = 0, most = 0;
  for (int64_t i = 0; i < s->n_trials; i++)
    most += window_end(s->trials[i]) - s->trials[i]->n_arrivals;
  KS_TRY(ks_alloc_array(&ids, (size_t)most, sizeof *ids, "arrivals"));
  for (int64_t i = 0; i < s->n_trials; i++) {
    const ks_trial *t = s->trials[i];
    for (int64_t a = t->n_arrivals; a < window_end(t); a++)
      ids[n++] = t->order[a];
  }
  double start = ks_clock_seconds();
  ks_status status = ks_world_score_sets(s->world, ids, n, s->progress);
  double share = (ks_clock_seconds() - start) / (double)ks_max_i64(s->n_trials, 1);
  for (int64_t i = 0; i < s->n_trials; i++)
    s->trials[i]->time.embed += share;
  free(ids);
  return status;
}

/* ---------------------------------------------------------------- select */

static ks_status offer_one(const ks_stage *s, ks_trial *t, int64_t index) {
  const ks_world *w = s->world;
  int64_t id = t->order[index], d = w->model->config.hidden_size;
  const ks_set *set = &w->data->sets[id];
  const ks_set_score *score = &w->scores[id];
  ks_arrival arrival = {.arrival = index,
                        .set_id = id,
                        .domain = score->domain,
                        .scores = {score->eoe, score->dss, 0},
                        .embedding = w->embeddings + id * d,
                        .question = set->question,
                        .response = set->response};
  ks_offer_result result;
  KS_TRY_AS(ks_selector_offer(t->selector, &arrival, &result), "cell %s, arrival %lld", t->id,
            (long long)index);
  ks_row_arrival *row;
  KS_TRY(ks_trial_add_row(t, KS_TABLE_arrival, &row));
  *row = (ks_row_arrival){.arrival = index,
                          .set_id = id,
                          .window = s->window,
                          .domain = score->domain,
                          .topic = set->topic,
                          .uninformative = set->uninformative,
                          .eoe = score->eoe,
                          .dss = score->dss,
                          .idd = result.idd,
                          .n_tokens = score->n_tokens,
                          .bytes = (int64_t)ks_buffer_set_bytes(d, set->question, set->response),
                          .outcome = result.outcome,
                          .slot = result.slot,
                          .victim_set_id = result.victim_set_id};
  if (result.outcome != KS_KEPT && result.outcome != KS_REPLACED) return KS_OK;
  double start = ks_clock_seconds();
  ks_status status = ks_annotator_admitted(t->annotator, ks_selector_buffer(t->selector), result.slot);
  t->time.annotate += ks_clock_seconds() - start;
  return status;
}

ks_status ks_stage_select(ks_stage *s) {
  ks_log(KS_LOG_DEBUG, "run", "window %lld: first arrival", (long long)s->window + 1);
  for (int64_t i = 0; i < s->n_trials; i++) {
    ks_trial *t = s->trials[i];
    KS_TRY(ks_progress_report(s->progress, "select", (double)i, (double)s->n_trials));
    double start = ks_clock_seconds(), annotate = t->time.annotate;
    int64_t end = window_end(t);
    for (int64_t a = t->n_arrivals; a < end; a++)
      KS_TRY(offer_one(s, t, a));
    t->n_arrivals = end;
    t->time.select += ks_clock_seconds() - start - (t->time.annotate - annotate);
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- annotate */

static bool wants_own_response(const ks_trial *t, const ks_kept *kept) {
  return kept->used && !kept->annotated && t->policy->trains &&
         t->config->annotate.unanswered == KS_UNANSWERED_OWN_RESPONSE;
}

const char *ks_trial_training_response(const ks_world *w, const ks_trial *t, const ks_kept *kept) {
  if (!kept->used) return NULL;
  const char *response = kept->annotated               ? kept->response
                         : wants_own_response(t, kept) ? w->own_responses[kept->set_id]
                                                       : NULL;
  return response && response[0] ? response : NULL;
}

ks_status ks_stage_annotate(ks_stage *s) {
  double start = ks_clock_seconds();
  int64_t most = 0, n = 0, *ids;
  for (int64_t i = 0; i < s->n_trials; i++) {
    ks_buffer *b = ks_selector_buffer(s->trials[i]->selector);
    KS_TRY(ks_annotator_trigger(s->trials[i]->annotator, b));
    most += b->n_used;
  }
  KS_TRY(ks_alloc_array(&ids, (size_t)most, sizeof *ids, "kept sets"));
  for (int64_t i = 0; i < s->n_trials; i++) {
    const ks_buffer *b = ks_selector_buffer(s->trials[i]->selector);
    for (int64_t j = 0; j < b->n_bins; j++)
      if (wants_own_response(s->trials[i], &b->bins[j])) ids[n++] = b->bins[j].set_id;
  }
  ks_status status = n > 0 ? ks_world_answer_sets(s->world, ids, n, s->progress) : KS_OK;
  free(ids);
  double share = (ks_clock_seconds() - start) / (double)ks_max_i64(s->n_trials, 1);
  for (int64_t i = 0; i < s->n_trials; i++)
    s->trials[i]->time.annotate += share;
  return status;
}

/* ---------------------------------------------------------------- record */

static ks_status buffer_rows(ks_trial *t, int64_t window) {
  const ks_buffer *b = ks_selector_buffer(t->selector);
  for (int64_t i = 0; i < b->n_bins; i++) {
    const ks_kept *kept = &b->bins[i];
    if (!kept->used) continue;
    ks_row_buffer *row;
    KS_TRY(ks_trial_add_row(t, KS_TABLE_buffer, &row));
    *row = (ks_row_buffer){.window = window,
                           .slot = i,
                           .set_id = kept->set_id,
                           .arrival = kept->arrival,
                           .domain = kept->domain,
                           .eoe = kept->scores.eoe,
                           .dss = kept->scores.dss,
                           .idd = kept->scores.idd,
                           .annotated = kept->annotated,
                           .bytes = (int64_t)kept->bytes};
    KS_TRY(ks_strdup(kept->question, &row->question));
    KS_TRY(ks_strdup(kept->response, &row->response));
  }
  return KS_OK;
}

static ks_status checkpoint_row(ks_trial *t, int64_t window) {
  const ks_buffer *b = ks_selector_buffer(t->selector);
  ks_selector_counts selected = ks_selector_get_counts(t->selector);
  ks_annotator_counts asked = ks_annotator_get_counts(t->annotator);
  ks_row_checkpoint *row = &t->checkpoint, *added;
  row->window = window;
  row->arrivals = t->n_arrivals;
  row->sets_kept = b->n_used;
  row->bytes_used = (int64_t)b->used_bytes;
  row->bytes_peak = (int64_t)b->peak_bytes;
  row->admissions = selected.kept;
  row->annotations_asked = asked.asked;
  row->annotations_answered = asked.answered;
  row->annotations_refused = asked.refused;
  row->annotations_over_budget = asked.over_budget;
  KS_TRY(ks_trial_add_row(t, KS_TABLE_checkpoint, &added));
  *added = *row;
  return KS_OK;
}

static ks_status record_one(ks_trial *t, int64_t window) {
  KS_TRY(checkpoint_row(t, window));
  KS_TRY(buffer_rows(t, window));
  if (t->config->buffer.clear_at_trigger && !t->policy->unlimited) ks_selector_clear(t->selector);
  t->n_windows = window + 1;
  ks_row_time *time;
  KS_TRY(ks_trial_add_row(t, KS_TABLE_time, &time));
  t->time.window = window;
  *time = t->time;
  double start = ks_clock_seconds();
  KS_TRY_AS(ks_trial_checkpoint(t, t->n_windows == ks_trial_n_windows(t)), "cell %s", t->id);
  t->time = (ks_row_time){.record = ks_clock_seconds() - start};
  t->checkpoint = (ks_row_checkpoint){0};
  return KS_OK;
}

ks_status ks_stage_record(ks_stage *s) {
  for (int64_t i = 0; i < s->n_trials; i++)
    KS_TRY(record_one(s->trials[i], s->window));
  return KS_OK;
}
