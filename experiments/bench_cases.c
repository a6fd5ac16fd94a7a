/* The cases on whole models: LoRA step, prefill, decode, embeddings. */
#include "experiments/bench_step.h"

#include <math.h>
#include <stdio.h>

enum { ALL_TARGETS = (1 << KS_N_TARGETS) - 1, RANK = 8 };

/* ---------------------------------------------------------------- LoRA step */

static ks_status bench_step(ks_bench *b, ks_model *model, const char *name, int64_t n_seqs, int64_t seq_len,
                            int64_t n_adapters, ks_bench_row **row) {
  *row = NULL;
  if (!ks_bench_wants(b, name)) return KS_OK;
  ks_bench_step s = {0};
  ks_samples samples = {0};
  ks_ceilings before;
  char shape[96];
  ks_status status;
  const ks_bench_step_params params = {.model = model,
                                       .n_seqs = n_seqs,
                                       .seq_len = seq_len,
                                       .n_adapters = n_adapters,
                                       .rank = RANK,
                                       .targets = ALL_TARGETS,
                                       .key = 1,
                                       .recompute_layers = b->recompute_layers};
  KS_TRY_OUT(ks_bench_step_create(&params, &s));
  KS_TRY_OUT(ks_weight_prepare_backward(b->ctx, model->head));
  KS_TRY_OUT(ks_bench_step_once(&s));
  const int64_t n_tokens = n_seqs * seq_len;
  const ks_bench_load load = {.work = (double)n_tokens,
                              .flops =
                                  ks_bench_train_flops(&model->config, RANK, ALL_TARGETS, n_tokens, seq_len)};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  KS_TRY_OUT(ks_bench_sample(b, ks_bench_step_once, &s, &samples));
  char what[40] = "all linear";
  if (b->recompute_layers > 0)
    snprintf(what, sizeof what, "%lld layers again", (long long)b->recompute_layers);
  snprintf(shape, sizeof shape, "%lld x %lld tokens, %lld adapter(s), rank %d, %s", (long long)n_seqs,
           (long long)seq_len, (long long)n_adapters, RANK, what);
  KS_TRY_OUT(ks_bench_add(b, name, shape, &samples, &load, &before, row));
  if (!ks_bench_step_learns(&s)) snprintf((*row)->verdict, sizeof(*row)->verdict, "incorrect");
  snprintf((*row)->note, sizeof(*row)->note,
           "gradient norm %.3g to %.3g, loss %.4f to %.4f in %lld timed and warm-up steps", s.first_norm,
           s.least_norm, s.first_loss, s.mean_loss, (long long)s.n_steps);
out:
  ks_samples_free(&samples);
  ks_bench_step_destroy(&s);
  return status;
}

static ks_status model_for(ks_bench *b, const ks_bench_shape *shape, ks_model **out) {
  return ks_model_create_random_quickly(b->ctx, &shape->config, b->dtype, 1, out);
}

ks_status ks_bench_lora_step(ks_bench *b, const ks_bench_shape *shape) {
  static const struct {
    const char *name;
    int64_t n_seqs, seq_len, n_adapters;
    bool gpu_only; /* minutes a step on a CPU */
  } steps[] = {{"lora_step", 8, 256, 1, false},        {"lora_step_cohort8", 8, 256, 8, false},
               {"lora_step_small", 1, 128, 1, false},  {"lora_step_8x128", 8, 128, 1, true},
               {"lora_step_16x256", 16, 256, 1, true}, {"lora_step_32x128", 32, 128, 1, true},
               {"lora_step_32x256", 32, 256, 1, true}, {"lora_step_32x256_cohort8", 32, 256, 8, true},
               {"lora_step_64x256", 64, 256, 1, true}, {"lora_step_64x256_cohort8", 64, 256, 8, true}};
  ks_model *model;
  KS_TRY(model_for(b, shape, &model));
  ks_status status = KS_OK;
  double first_rate = 0;
  for (size_t i = 0; i < sizeof steps / sizeof *steps && status == KS_OK; i++) {
    char name[40];
    ks_bench_row *row;
    if (steps[i].gpu_only && !b->info.has_timer) continue;
    snprintf(name, sizeof name, "%s.%s", steps[i].name, shape->name);
    status = bench_step(b, model, name, steps[i].n_seqs, steps[i].seq_len, steps[i].n_adapters, &row);
    if (status == KS_ENOMEM && b->info.has_timer) {
      status = ks_bench_add_verdict(b, name, "", "skipped(memory)", ks_error_message());
      ks_error_clear();
      continue;
    }
    if (status != KS_OK || !row) continue;
    if (i == 0) first_rate = row->rate;
    if (i == 0 || first_rate == 0) continue;
    row->ratio = row->rate / first_rate;
    size_t used = strlen(row->note);
    snprintf(row->note + used, sizeof row->note - used, "; ratio: to the rate of lora_step");
  }
  ks_model_destroy(model);
  return status;
}

/* ---------------------------------------------------------------- prefill */

typedef struct {
  ks_bench *b;
  ks_model *model;
  ks_run *run;
  ks_batch batch;
  float *logits; /* backend memory [vocab] */
} prefill;

static ks_status prefill_once(void *arg) {
  prefill *p = arg;
  const void *hidden;
  KS_TRY(ks_forward(p->run, &p->batch, &hidden));
  const void *last = ks_act_at(p->b->ctx, hidden, (p->batch.n_rows - 1) * p->model->config.hidden_size);
  KS_TRY(ks_linear_forward(
      p->b->ctx,
      &(ks_linear_args){.w = p->model->head, .x = last, .y = p->logits, .y_is_f32 = true, .n_rows = 1}));
  return ks_sync(p->b->ctx);
}

static ks_status prefill_check(prefill *p, double *sum) {
  int64_t n = p->model->config.vocab_size;
  float *host = NULL;
  KS_TRY(prefill_once(p));
  KS_TRY(ks_alloc_array(&host, (size_t)n, sizeof *host, "bench"));
  ks_status status = ks_mem_download(p->b->ctx, host, p->logits, (size_t)n * sizeof *host);
  *sum = 0;
  for (int64_t i = 0; i < n && status == KS_OK; i++)
    *sum += (double)host[i] * (double)(i % 7 + 1);
  free(host);
  return status;
}

static ks_status bench_prefill(ks_bench *b, ks_model *model, const char *name, int64_t n_tokens) {
  if (!ks_bench_wants(b, name)) return KS_OK;
  prefill p = {.b = b, .model = model};
  int32_t *tokens = NULL;
  int64_t offsets[2] = {0, n_tokens};
  double first, last;
  ks_samples samples = {0};
  ks_ceilings before;
  ks_bench_row *row;
  char shape[96];
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&tokens, (size_t)n_tokens, sizeof *tokens, "bench"));
  for (int64_t i = 0; i < n_tokens; i++)
    tokens[i] = (int32_t)(i * 7919 % model->config.vocab_size);
  p.batch = (ks_batch){.tokens = tokens, .n_rows = n_tokens, .seq_offsets = offsets, .n_seqs = 1};
  KS_TRY_OUT(ks_run_create(model, &(ks_run_params){.max_rows = n_tokens, .max_seqs = 1}, &p.run));
  KS_TRY_OUT(ks_mem_alloc(b->ctx, (size_t)model->config.vocab_size * sizeof(float), (void **)&p.logits));
  KS_TRY_OUT(prefill_check(&p, &first));
  const ks_bench_load load = {.work = (double)n_tokens,
                              .flops =
                                  ks_bench_forward_flops(&model->config, n_tokens, n_tokens, false) +
                                  2.0 * (double)model->config.vocab_size * (double)model->config.hidden_size};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  KS_TRY_OUT(ks_bench_sample(b, prefill_once, &p, &samples));
  KS_TRY_OUT(prefill_check(&p, &last));
  snprintf(shape, sizeof shape, "%lld tokens, logits of the last", (long long)n_tokens);
  KS_TRY_OUT(ks_bench_add(b, name, shape, &samples, &load, &before, &row));
  if (!(first == last)) snprintf(row->verdict, sizeof row->verdict, "incorrect");
out:
  ks_samples_free(&samples);
  ks_run_destroy(p.run);
  ks_mem_free(b->ctx, p.logits);
  free(tokens);
  return status;
}

ks_status ks_bench_prefill(ks_bench *b, const ks_bench_shape *shape) {
  static const int64_t lengths[] = {128, 512};
  ks_model *model;
  KS_TRY(model_for(b, shape, &model));
  ks_status status = KS_OK;
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths && status == KS_OK; i++) {
    char name[40];
    snprintf(name, sizeof name, "prefill%lld.%s", (long long)lengths[i], shape->name);
    status = bench_prefill(b, model, name, lengths[i]);
  }
  ks_model_destroy(model);
  return status;
}

/* ---------------------------------------------------------------- decode */

enum { DECODE_PROMPT = 8, DECODE_NEW = 128, COHORT = 8 };

typedef struct {
  ks_model *model;
  ks_adapter_view *views;
  int64_t n_requests, n_views;
  ks_sampler sampler;
  ks_generate_stats stats; /* summed over the samples */
  int32_t last[COHORT];    /* last token of each request */
} decode;

static ks_status decode_once(void *arg) {
  decode *d = arg;
  int32_t prompt[DECODE_PROMPT];
  ks_request requests[COHORT];
  for (int i = 0; i < DECODE_PROMPT; i++)
    prompt[i] = (int32_t)((i * 31 + 1) % d->model->config.vocab_size);
  for (int64_t i = 0; i < d->n_requests; i++)
    requests[i] = (ks_request){.prompt = prompt,
                               .n_prompt = DECODE_PROMPT,
                               .adapter = d->n_views ? (int32_t)i : -1,
                               .sampler = d->sampler,
                               .max_new_tokens = DECODE_NEW};
  ks_status status = ks_generate(d->model, requests, d->n_requests, d->views, d->n_views,
                                 &KS_GENERATE_DEFAULT, NULL, &d->stats);
  for (int64_t i = 0; i < d->n_requests; i++) {
    if (status == KS_OK && requests[i].n_tokens > 0)
      d->last[i] = requests[i].tokens[requests[i].n_tokens - 1];
    free(requests[i].tokens);
  }
  return status;
}

size_t ks_bench_frozen_bytes(const ks_model *m) {
  size_t bytes = ks_weight_bytes(m->head);
  for (int64_t l = 0; l < m->config.n_layers; l++)
    for (int t = 0; t < KS_N_TARGETS; t++)
      bytes += ks_weight_bytes(m->layers[l].linear[t]);
  return bytes;
}

/* A sample is a whole answer; the row gives milliseconds of one position of all requests together. */
static ks_status bench_decode(ks_bench *b, const char *name, const char *what, decode *d,
                              ks_bench_row **row) {
  ks_samples samples = {0};
  ks_ceilings before;
  const size_t weights = ks_bench_frozen_bytes(d->model);
  ks_status status;
  KS_TRY_OUT(decode_once(d));
  int32_t first = d->last[0];
  const ks_bench_load load = {
      .work = (double)d->n_requests, .bytes = (double)weights, .working_set = weights};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  d->stats = (ks_generate_stats){0};
  KS_TRY_OUT(ks_bench_sample(b, decode_once, d, &samples));
  ks_samples_scale(&samples, 1.0 / DECODE_NEW);
  KS_TRY_OUT(ks_bench_add(b, name, what, &samples, &load, &before, row));
  if (d->last[0] != first) snprintf((*row)->verdict, sizeof(*row)->verdict, "incorrect");
  double share = d->stats.sample_seconds / (d->stats.sample_seconds + d->stats.decode_seconds);
  snprintf((*row)->note, sizeof(*row)->note, "sampling %.1f%% of decoding; the short prompt is in the time",
           100 * share);
out:
  ks_samples_free(&samples);
  return status;
}

ks_status ks_bench_decode(ks_bench *b, const ks_bench_shape *shape) {
  ks_model *model;
  ks_adapter *adapters[COHORT] = {0};
  ks_adapter_view views[COHORT];
  ks_bench_row *row;
  char name[40];
  KS_TRY(model_for(b, shape, &model));
  ks_status status;
  decode d = {.model = model, .n_requests = 1, .sampler = {.top_p = 1}};
  snprintf(name, sizeof name, "decode.%s", shape->name);
  KS_TRY_OUT(bench_decode(b, name, "1 sequence, greedy", &d, &row));
  d.sampler = (ks_sampler){.temperature = 0.8F, .top_p = 0.9F, .key = 1};
  snprintf(name, sizeof name, "decode_top_p.%s", shape->name);
  KS_TRY_OUT(bench_decode(b, name, "1 sequence, temperature 0.8, top-p 0.9", &d, &row));
  for (int i = 0; i < COHORT; i++) {
    KS_TRY_OUT(ks_adapter_create(b->ctx, &model->config,
                                 &(ks_adapter_params){.rank = RANK, .alpha = 16, .targets = ALL_TARGETS},
                                 (uint64_t)i, &adapters[i]));
    views[i] = ks_adapter_view_of(adapters[i]);
  }
  d.sampler = (ks_sampler){.top_p = 1};
  d.views = views;
  d.n_views = 1;
  snprintf(name, sizeof name, "decode_adapter.%s", shape->name);
  KS_TRY_OUT(bench_decode(b, name, "1 sequence with an adapter, greedy", &d, &row));
  double one_ms = row ? row->median_ms : NAN;
  d.n_requests = d.n_views = COHORT;
  snprintf(name, sizeof name, "decode_cohort8.%s", shape->name);
  KS_TRY_OUT(bench_decode(b, name, "8 sequences, an adapter each, greedy", &d, &row));
  if (row) {
    row->ratio = row->median_ms / one_ms;
    snprintf(row->note, sizeof row->note,
             "ratio: time of eight cells' questions to one's (with its adapter)");
  }
out:
  for (int i = 0; i < COHORT; i++)
    ks_adapter_destroy(adapters[i]);
  ks_model_destroy(model);
  return status;
}

/* ---------------------------------------------------------------- embeddings */

enum { EMBED_TEXTS = 64, EMBED_TOKENS = 128 };

typedef struct {
  ks_model *model;
  ks_tokens *texts;
  float *out;
} embed;

static ks_status embed_once(void *arg) {
  embed *e = arg;
  return ks_embed_texts(e->model, e->texts, EMBED_TEXTS,
                        &(ks_embed_params){.pooling = KS_POOL_LAST, .max_tokens = EMBED_TOKENS}, NULL,
                        e->out);
}

ks_status ks_bench_embed(ks_bench *b, const ks_bench_shape *shape) {
  embed e = {0};
  int32_t *tokens = NULL;
  ks_tokens texts[EMBED_TEXTS];
  ks_samples samples = {0};
  ks_ceilings before;
  ks_bench_row *row;
  char name[40];
  snprintf(name, sizeof name, "embed.%s", shape->name);
  if (!ks_bench_wants(b, name)) return KS_OK;
  KS_TRY(model_for(b, shape, &e.model));
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&tokens, EMBED_TEXTS * EMBED_TOKENS, sizeof *tokens, "bench"));
  KS_TRY_OUT(ks_mem_alloc(b->ctx, (size_t)(EMBED_TEXTS * shape->config.hidden_size) * sizeof(float),
                          (void **)&e.out));
  for (int i = 0; i < EMBED_TEXTS * EMBED_TOKENS; i++)
    tokens[i] = (int32_t)((int64_t)i * 7919 % shape->config.vocab_size);
  for (int i = 0; i < EMBED_TEXTS; i++)
    texts[i] = (ks_tokens){tokens + i * EMBED_TOKENS, EMBED_TOKENS};
  e.texts = texts;
  const ks_bench_load load = {
      .work = EMBED_TEXTS,
      .flops = ks_bench_forward_flops(&shape->config, EMBED_TEXTS * EMBED_TOKENS, EMBED_TOKENS, false)};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  KS_TRY_OUT(ks_bench_sample(b, embed_once, &e, &samples));
  snprintf(name, sizeof name, "embed.%s", shape->name);
  KS_TRY_OUT(ks_bench_add(b, name, "64 texts of 128 tokens, last token", &samples, &load, &before, &row));
  snprintf(row->note, sizeof row->note, "a cohort embeds a set once, however many cells it has");
out:
  ks_samples_free(&samples);
  ks_mem_free(b->ctx, e.out);
  free(tokens);
  ks_model_destroy(e.model);
  return status;
}
