#include "experiments/estimate.h"

#include <math.h>

typedef struct {
  double scored_tokens, example_tokens, prompt_tokens; /* means of a sample */
  double embed_rate;                                   /* tokens/s */
} sample;

enum { SAMPLE_SETS = 32 };

static ks_status take_sample(ks_world *w, sample *s) {
  const ks_dataset *d = w->data;
  int64_t n = ks_min_i64(SAMPLE_SETS, d->n_stream), ids[SAMPLE_SETS];
  if (n == 0) return KS_FAIL(KS_ECONFIG, "data.stream_size: there is no arrival to replay; make it larger");
  double tokens = 0;
  for (int64_t i = 0; i < n; i++) {
    const ks_set *set = &d->sets[ids[i] = d->stream[i * d->n_stream / n]];
    int32_t *example;
    int64_t n_example, begin;
    KS_TRY(ks_world_encode_example(w, set->question, set->preferred, w->config->train.max_tokens, &example,
                                   &n_example, &begin));
    free(example);
    s->example_tokens += (double)n_example / (double)n;
    s->prompt_tokens += (double)begin / (double)n;
  }
  /* The first pass warms up; of the others the fastest counts: the machine may be busy elsewhere. */
  for (int round = 0; round < 4; round++) {
    double start = ks_clock_seconds(), round_tokens = 0;
    for (int64_t i = 0; i < n; i++)
      w->scores[ids[i]].known = false;
    KS_TRY(ks_world_score_sets(w, ids, n, NULL));
    for (int64_t i = 0; i < n; i++)
      round_tokens += (double)w->scores[ids[i]].n_tokens;
    tokens = round_tokens;
    if (round > 0) s->embed_rate = fmax(s->embed_rate, tokens / fmax(ks_clock_seconds() - start, 1e-6));
  }
  s->scored_tokens = tokens / (double)n;
  return KS_OK;
}

static int64_t lora_parameters(const ks_world *w, const ks_config *c) {
  uint32_t bits;
  int64_t n = 0;
  if (ks_targets_parse(c->lora.targets, &bits) != KS_OK) return 0;
  for (int t = 0; t < KS_N_TARGETS; t++) {
    int64_t n_out, n_in;
    ks_target_shape(&w->model->config, (ks_target)t, &n_out, &n_in);
    if (bits >> t & 1) n += c->lora.rank * (n_out + n_in);
  }
  return n * w->model->config.n_layers;
}

static void add_cell(const ks_world *w, const ks_config *c, const sample *s, ks_estimate *e) {
  const ks_policy *policy = ks_policy_find(c->policy);
  const ks_dataset *d = w->data;
  int64_t n_windows = (d->n_stream + c->window.size - 1) / c->window.size;
  double variants = c->synth.writer == KS_SYNTH_NONE ? 0 : (double)c->synth.count,
         per_answer = (double)c->eval.max_new_tokens;
  e->n_cells++;
  double exams = policy && !policy->trains ? 1 : c->eval.every_trigger ? (double)n_windows : 1;
  e->eval_tokens += exams * (double)d->n_eval * (s->prompt_tokens + per_answer);
  e->bytes += policy && policy->trains ? 16.0 * (double)lora_parameters(w, c) : 0;
  if (!policy || !policy->trains) return;
  for (int64_t i = 0; i < n_windows; i++) {
    double arrived = (double)ks_min_i64((i + 1) * c->window.size, d->n_stream);
    double kept = policy->unlimited ? arrived : fmin(arrived, (double)c->buffer.bins),
           examples = kept * (1 + variants);
    double batches = c->train.steps > 0
                         ? (double)c->train.steps
                         : (double)c->train.epochs * ceil(examples / (double)c->train.batch_size);
    double per_step = c->train.steps > 0 ? fmin(examples, (double)c->train.batch_size)
                                         : examples / ceil(examples / (double)c->train.batch_size);
    e->train_tokens += batches * per_step * s->example_tokens;
    if (c->synth.writer == KS_SYNTH_MODEL)
      e->synth_tokens += kept * variants * (double)(1 + c->synth.retries) *
                         (s->prompt_tokens + (double)c->synth.max_new_tokens);
  }
  e->bytes += policy->unlimited ? 0 : (double)c->buffer.bins * (double)c->buffer.bin_bytes;
}

ks_status ks_estimate_cohort(ks_ctx *ctx, const ks_matrix *m, int64_t first, const ks_shard *shard,
                             ks_estimate *e) {
  ks_world *w = NULL;
  sample s = {0};
  ks_estimate own = {0};
  size_t run_bytes = 0;
  double train_passes = 3; /* forward passes that a training step is worth */
  KS_TRY(ks_world_open(ctx, &m->cells[first].config, &w));
  ks_status status = take_sample(w, &s);
  if (status == KS_OK) {
    const ks_config *c = w->config;
    own.embed_tokens = (double)w->data->n_stream * s.scored_tokens;
    ks_run_params run = {.max_rows = c->run.max_rows ? c->run.max_rows : ks_run_default_rows(w->model, true),
                         .max_seqs = 4096,
                         .max_rank = (int32_t)c->lora.rank,
                         .backward = true,
                         .recompute_layers = c->run.recompute_layers};
    status = ks_run_bytes(w->model, &run, &run_bytes);
    train_passes += 0.8 * (double)ks_min_i64(c->run.recompute_layers, w->model->config.n_layers) /
                    (double)w->model->config.n_layers;
    own.bytes = (double)ks_mem_used(ctx) + (double)run_bytes;
  }
  for (int64_t i = first; i < m->n_cells && status == KS_OK; i++)
    if (ks_shard_owns(shard, i) && ks_config_same_cohort(&m->cells[first].config, &m->cells[i].config))
      add_cell(w, &m->cells[i].config, &s, &own);
  ks_world_close(w);
  KS_TRY(status);
  own.seconds =
      (own.embed_tokens + train_passes * own.train_tokens + 4 * (own.synth_tokens + own.eval_tokens)) /
      s.embed_rate;
  e->n_cells += own.n_cells;
  e->embed_tokens += own.embed_tokens;
  e->train_tokens += own.train_tokens;
  e->synth_tokens += own.synth_tokens;
  e->eval_tokens += own.eval_tokens;
  e->seconds += own.seconds;
  e->bytes = fmax(e->bytes, own.bytes);
  return KS_OK;
}

static ks_status estimate_cohorts(const ks_matrix *m, const ks_shard *shard, ks_estimate *e) {
  ks_ctx_params params = ks_config_ctx_params(&m->cells[0].config);
  ks_ctx *ctx;
  bool *done;
  KS_TRY(ks_alloc_array(&done, (size_t)m->n_cells, sizeof *done, "cells"));
  ks_status status = ks_ctx_create(&ctx, &params);
  if (status != KS_OK) {
    free(done);
    return status;
  }
  for (int64_t i = 0; i < m->n_cells && status == KS_OK; i++) {
    if (done[i] || !ks_shard_owns(shard, i)) continue;
    status = ks_estimate_cohort(ctx, m, i, shard, e);
    for (int64_t j = i; j < m->n_cells; j++)
      if (ks_config_same_cohort(&m->cells[i].config, &m->cells[j].config)) done[j] = true;
  }
  ks_ctx_destroy(ctx);
  free(done);
  return status;
}

ks_status ks_estimate_text(const ks_matrix *m, const ks_shard *shard, ks_text *out) {
  ks_estimate e = {0};
  for (int64_t i = 0; i < m->n_cells; i++)
    if (ks_shard_owns(shard, i)) KS_TRY(ks_text_addf(out, "%s\n", m->cells[i].name));
  KS_TRY(estimate_cohorts(m, shard, &e));
  return ks_text_addf(out,
                      "\n%lld cells into %s\n"
                      "tokens, at most: %.3g embedded, %.3g trained, %.3g synthesized, %.3g for answers\n"
                      "about %.0f s and %.0f MB on this machine (from a short timed embedding; within a "
                      "factor of about three)\n",
                      (long long)e.n_cells, m->output, e.embed_tokens, e.train_tokens, e.synth_tokens,
                      e.eval_tokens, e.seconds, e.bytes / 1e6);
}
