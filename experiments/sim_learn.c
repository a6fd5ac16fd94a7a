/* Synthesis and fine-tuning at a trigger. */
#include "experiments/sim.h"

#include <math.h>

/* One trial's texts of this trigger. */
typedef struct ks_lesson {
  ks_trial *trial;
  ks_synth_source *sources; /* [n_sources] kept sets that train; strings borrowed from buffer and world */
  int64_t *set_ids;
  int64_t n_sources;
  ks_example *examples; /* tokens owned */
  int64_t n_examples, cap;
} ks_lesson;

static void lesson_free(ks_lesson *l) {
  for (int64_t i = 0; i < l->n_examples; i++)
    free((void *)(uintptr_t)l->examples[i].tokens);
  free(l->examples);
  free(l->sources);
  free(l->set_ids);
}

static ks_status add_example(const ks_world *w, ks_lesson *l, const char *question, const char *response) {
  const ks_config *c = l->trial->config;
  if (l->n_examples == l->cap) {
    int64_t cap = l->cap ? 2 * l->cap : 64;
    ks_example *grown = realloc(l->examples, (size_t)cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "training texts: no memory for %lld", (long long)cap);
    l->examples = grown;
    l->cap = cap;
  }
  int32_t *tokens;
  int64_t n, begin, most = ks_min_i64(c->train.max_tokens, w->model->config.max_seq_len);
  KS_TRY(ks_world_encode_example(w, question, response, most, &tokens, &n, &begin));
  int64_t loss_begin = c->train.loss_on == KS_LOSS_ON_ALL ? 1 : ks_max_i64(begin, 1);
  if (loss_begin >= n) { /* nothing to learn: the response gave no tokens */
    free(tokens);
    return KS_OK;
  }
  l->examples[l->n_examples++] = (ks_example){tokens, n, loss_begin};
  return KS_OK;
}

static ks_status gather_sources(const ks_stage *s, ks_lesson *l, int32_t adapter) {
  const ks_buffer *b = ks_selector_buffer(l->trial->selector);
  KS_TRY(ks_alloc_array(&l->sources, (size_t)b->n_used, sizeof *l->sources, "kept sets"));
  KS_TRY(ks_alloc_array(&l->set_ids, (size_t)b->n_used, sizeof *l->set_ids, "kept sets"));
  for (int64_t i = 0; i < b->n_bins; i++) {
    const ks_kept *kept = &b->bins[i];
    const char *response = ks_trial_training_response(s->world, l->trial, kept);
    if (!response) continue;
    l->set_ids[l->n_sources] = kept->set_id;
    l->sources[l->n_sources++] = (ks_synth_source){.question = kept->question,
                                                   .response = response,
                                                   .id = (uint64_t)kept->arrival,
                                                   .round = (uint64_t)s->window,
                                                   .seed = (uint64_t)l->trial->config->seed,
                                                   .adapter = adapter};
    KS_TRY(add_example(s->world, l, kept->question, response));
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- synthesis */

static ks_synthesize_params synthesis_params(const ks_world *w, const ks_config *c) {
  return (ks_synthesize_params){.kind = c->synth.writer,
                                .count = c->synth.count,
                                .retries = c->synth.retries,
                                .min_rouge1 = c->synth.min_rouge1,
                                .max_rouge1 = c->synth.max_rouge1,
                                .prompt = c->synth.prompt,
                                .begin_mark = c->synth.begin_mark,
                                .end_mark = c->synth.end_mark,
                                .temperature = (float)c->synth.temperature,
                                .top_p = (float)c->synth.top_p,
                                .max_new_tokens = c->synth.max_new_tokens,
                                .generate = ks_world_generate_params(w)};
}

/* Axes that let cells of a cohort differ in how they synthesize. */
static bool same_synthesis(const ks_config *a, const ks_config *b) {
  return a->synth.writer == b->synth.writer && a->synth.count == b->synth.count &&
         a->synth.min_rouge1 == b->synth.min_rouge1 && a->synth.max_rouge1 == b->synth.max_rouge1;
}

static ks_status keep_variants(const ks_stage *s, ks_lesson *l, const ks_variant *variants, int64_t n,
                               int64_t first_source) {
  ks_row_checkpoint *counts = &l->trial->checkpoint;
  for (int64_t i = 0; i < n; i++) {
    int64_t source = variants[i].source - first_source;
    if (source < 0 || source >= l->n_sources) continue;
    ks_row_synthesis *row;
    KS_TRY(ks_trial_add_row(l->trial, KS_TABLE_synthesis, &row));
    *row = (ks_row_synthesis){.window = s->window,
                              .set_id = l->set_ids[source],
                              .verdict = variants[i].verdict,
                              .rouge1 = variants[i].rouge1,
                              .n_tokens = variants[i].n_tokens};
    KS_TRY(ks_strdup(variants[i].question ? variants[i].question : "", &row->question));
    counts->synth_tried += variants[i].verdict != KS_VARIANT_NO_ROOM;
    counts->synth_tokens += variants[i].n_tokens;
    if (variants[i].verdict != KS_VARIANT_ACCEPTED) continue;
    counts->synth_accepted++;
    KS_TRY(add_example(s->world, l, variants[i].question, l->sources[source].response));
  }
  return KS_OK;
}

/* Synthesizes for lessons[first] and all later ones of the same settings; marks them done. */
static ks_status synthesize_group(const ks_stage *s, ks_lesson *lessons, const ks_adapter_view *views,
                                  int64_t first, bool *done) {
  const ks_config *c = lessons[first].trial->config;
  ks_synth_source *sources = NULL;
  ks_variant *variants = NULL;
  int64_t n_sources = 0, n_variants = 0, at = 0;
  ks_status status;
  for (int64_t i = first; i < s->n_trials; i++)
    if (!done[i] && same_synthesis(c, lessons[i].trial->config)) n_sources += lessons[i].n_sources;
  KS_TRY(ks_alloc_array(&sources, (size_t)n_sources, sizeof *sources, "sets to rewrite"));
  for (int64_t i = first; i < s->n_trials; i++) {
    if (done[i] || !same_synthesis(c, lessons[i].trial->config)) continue;
    if (lessons[i].n_sources)
      memcpy(sources + at, lessons[i].sources, (size_t)lessons[i].n_sources * sizeof *sources);
    at += lessons[i].n_sources;
  }
  ks_synthesize_params params = synthesis_params(s->world, c);
  KS_TRY_OUT(ks_synthesize(s->world->model, s->world->tokenizer, &params, sources, n_sources, views,
                           s->n_trials, s->progress, &variants, &n_variants));
  at = 0;
  for (int64_t i = first; i < s->n_trials; i++) {
    if (done[i] || !same_synthesis(c, lessons[i].trial->config)) continue;
    KS_TRY_OUT(keep_variants(s, &lessons[i], variants, n_variants, at));
    at += lessons[i].n_sources;
    done[i] = true;
  }
out:
  ks_variants_free(variants, n_variants);
  free(sources);
  return status;
}

static ks_status synthesize_all(const ks_stage *s, ks_lesson *lessons) {
  double start = ks_clock_seconds();
  ks_adapter_view *views = NULL;
  bool *done = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&views, (size_t)s->n_trials, sizeof *views, "adapters"));
  KS_TRY_OUT(ks_alloc_array(&done, (size_t)s->n_trials, sizeof *done, "adapters"));
  for (int64_t i = 0; i < s->n_trials; i++)
    if (lessons[i].trial->adapter) views[i] = ks_adapter_view_of(lessons[i].trial->adapter);
  for (int64_t i = 0; i < s->n_trials; i++) {
    if (done[i] || lessons[i].n_sources == 0 || lessons[i].trial->config->synth.writer == KS_SYNTH_NONE)
      continue;
    KS_TRY_OUT(synthesize_group(s, lessons, views, i, done));
  }
out:
  free(views);
  free(done);
  double tries = 0, seconds = ks_clock_seconds() - start;
  for (int64_t i = 0; i < s->n_trials; i++)
    tries += (double)s->trials[i]->checkpoint.synth_tried;
  for (int64_t i = 0; i < s->n_trials && tries > 0; i++)
    s->trials[i]->time.synthesize += seconds * (double)s->trials[i]->checkpoint.synth_tried / tries;
  return status;
}

/* ---------------------------------------------------------------- fine-tuning */

static ks_train_params train_params(const ks_config *c, int64_t window) {
  return (ks_train_params){.learning_rate = c->train.learning_rate,
                           .weight_decay = c->train.weight_decay,
                           .beta1 = c->train.beta1,
                           .beta2 = c->train.beta2,
                           .eps = c->train.eps,
                           .max_grad_norm = c->train.max_grad_norm,
                           .warmup = c->train.warmup,
                           .schedule = c->train.schedule,
                           .dropout = (float)c->lora.dropout,
                           .batch_size = c->train.batch_size,
                           .micro_batch = c->train.micro_batch,
                           .epochs = c->train.epochs,
                           .steps = c->train.steps,
                           .seed = (uint64_t)c->seed,
                           .round = (uint64_t)window};
}

static ks_status note_training(const ks_stage *s, ks_lesson *l, const ks_train_job *job) {
  ks_row_checkpoint *counts = &l->trial->checkpoint;
  counts->train_examples = l->n_examples;
  counts->train_steps = job->n_steps;
  counts->train_tokens = job->n_tokens;
  for (int64_t i = 0; i < job->n_steps; i++) {
    ks_row_step *row;
    KS_TRY(ks_trial_add_row(l->trial, KS_TABLE_step, &row));
    *row = (ks_row_step){
        .window = s->window, .step = i, .loss = job->step_loss[i], .grad_norm = job->step_grad_norm[i]};
  }
  counts->train_loss_first = job->n_steps > 0 ? job->step_loss[0] : NAN;
  counts->train_loss_last = job->n_steps > 0 ? job->step_loss[job->n_steps - 1] : NAN;
  if (job->n_steps > 0) l->trial->trained = true;
  return KS_OK;
}

static ks_status train_all(const ks_stage *s, ks_lesson *lessons) {
  double start = ks_clock_seconds();
  ks_train_job *jobs;
  int64_t n_jobs = 0;
  KS_TRY(ks_alloc_array(&jobs, (size_t)s->n_trials, sizeof *jobs, "training jobs"));
  ks_status status = KS_OK;
  int64_t *owner = NULL;
  KS_TRY_OUT(ks_alloc_array(&owner, (size_t)s->n_trials, sizeof *owner, "training jobs"));
  for (int64_t i = 0; i < s->n_trials; i++) {
    ks_trial *t = s->trials[i];
    t->checkpoint.train_loss_first = t->checkpoint.train_loss_last = NAN;
    if (!t->adapter) continue;
    if (t->config->lora.reset_at_trigger) {
      KS_TRY_OUT(ks_adapter_reset(t->adapter, (uint64_t)t->config->seed));
      t->trained = false;
    }
    if (lessons[i].n_examples == 0) {
      ks_log(KS_LOG_WARN, "run", "cell %s, window %lld: nothing to train on (%lld sets kept)", t->id,
             (long long)s->window + 1, (long long)ks_selector_buffer(t->selector)->n_used);
      continue;
    }
    owner[n_jobs] = i;
    jobs[n_jobs++] = (ks_train_job){.adapter = t->adapter,
                                    .examples = lessons[i].examples,
                                    .n_examples = lessons[i].n_examples,
                                    .params = train_params(t->config, s->window)};
  }
  const ks_config *c = s->world->config;
  const ks_train_limits limits = {.max_rows = c->run.max_rows, .recompute_layers = c->run.recompute_layers};
  KS_TRY_OUT(ks_train(s->world->model, jobs, n_jobs, &limits, s->progress));
  for (int64_t j = 0; j < n_jobs; j++)
    KS_TRY_OUT(note_training(s, &lessons[owner[j]], &jobs[j]));
out:
  double tokens = 0, seconds = ks_clock_seconds() - start;
  for (int64_t j = 0; j < n_jobs; j++) {
    free(jobs[j].step_loss);
    free(jobs[j].step_grad_norm);
    tokens += (double)jobs[j].n_tokens;
  }
  for (int64_t j = 0; j < n_jobs && tokens > 0; j++)
    s->trials[owner[j]]->time.train += seconds * (double)jobs[j].n_tokens / tokens;
  free(owner);
  free(jobs);
  return status;
}

ks_status ks_stage_synthesize(ks_stage *s) {
  KS_TRY(ks_alloc_array(&s->lessons, (size_t)s->n_trials, sizeof *s->lessons, "lessons"));
  for (int64_t i = 0; i < s->n_trials; i++) {
    s->lessons[i].trial = s->trials[i];
    if (!s->trials[i]->policy->trains) continue;
    KS_TRY(gather_sources(s, &s->lessons[i], s->trials[i]->config->synth.adapted ? (int32_t)i : -1));
  }
  return synthesize_all(s, s->lessons);
}

ks_status ks_stage_train(ks_stage *s) {
  return train_all(s, s->lessons);
}

void ks_stage_end(ks_stage *s) {
  for (int64_t i = 0; s->lessons && i < s->n_trials; i++)
    lesson_free(&s->lessons[i]);
  free(s->lessons);
  s->lessons = NULL;
}
