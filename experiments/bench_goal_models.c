/* Whole models of `keepsake bench goals`: decode, prefill, and a run of all of an experiment's stages. */
#include "experiments/bench_goals.h"

#include <math.h>
#include <stdio.h>

enum { COHORT = 4 };

static uint64_t mix(uint64_t h, const void *bytes, size_t n) {
  const unsigned char *at = bytes;
  for (size_t i = 0; i < n; i++)
    h = (h ^ at[i]) * 0x100000001b3u;
  return h;
}

/* ---------------------------------------------------------------- adapters that answer */

typedef struct {
  ks_adapter **items;
  ks_adapter_view *views;
  int64_t n;
} adapters;

/* B is 0 in a new adapter, which changes nothing: here it is what A is, with a small factor. */
static ks_status fill_adapter(ks_adapter *a) {
  float *weights = NULL, *zeros = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&weights, (size_t)a->n_params, sizeof *weights, "bench"));
  KS_TRY_OUT(ks_alloc_array(&zeros, (size_t)a->n_params, sizeof *zeros, "bench"));
  KS_TRY_OUT(ks_adapter_save(a, weights, zeros, zeros));
  for (int64_t i = 1; i < a->n_params; i++)
    if (weights[i] == 0) weights[i] = 0.03F * weights[i - 1] + 1e-4F;
  status = ks_adapter_load(a, weights, zeros, zeros, a->n_params, 0);
out:
  free(weights);
  free(zeros);
  return status;
}

static ks_status adapters_make(ks_model *model, int64_t n, int32_t rank, uint32_t targets, adapters *out) {
  *out = (adapters){.n = n};
  KS_TRY(ks_alloc_array(&out->items, (size_t)n, sizeof *out->items, "bench"));
  KS_TRY(ks_alloc_array(&out->views, (size_t)n, sizeof *out->views, "bench"));
  for (int64_t i = 0; i < n; i++) {
    const ks_adapter_params params = {.rank = rank, .alpha = 16, .targets = targets};
    KS_TRY(ks_adapter_create(model->ctx, &model->config, &params, (uint64_t)i, &out->items[i]));
    KS_TRY(fill_adapter(out->items[i]));
    out->views[i] = ks_adapter_view_of(out->items[i]);
  }
  return KS_OK;
}

static void adapters_free(adapters *a) {
  for (int64_t i = 0; a->items && i < a->n; i++)
    ks_adapter_destroy(a->items[i]);
  free(a->items);
  free(a->views);
}

/* ---------------------------------------------------------------- decode */

typedef struct {
  ks_model *model;
  adapters adapters;
  ks_request *requests;
  int32_t *prompts; /* [batch, prompt] */
  int64_t n, n_prompt, n_new;
  ks_sampler sampler;
  ks_generate_params params;
  uint64_t first, last; /* hashes of all tokens */
} decode;

static ks_status answer(decode *d, int64_t n_new) {
  for (int64_t i = 0; i < d->n; i++)
    d->requests[i] = (ks_request){.prompt = d->prompts + i * d->n_prompt,
                                  .n_prompt = d->n_prompt,
                                  .adapter = d->adapters.n ? (int32_t)(i * d->adapters.n / d->n) : -1,
                                  .sampler = d->sampler,
                                  .max_new_tokens = n_new};
  ks_status status =
      ks_generate(d->model, d->requests, d->n, d->adapters.views, d->adapters.n, &d->params, NULL, NULL);
  if (n_new > 1) d->last = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < d->n; i++) {
    if (n_new > 1 && status == KS_OK)
      d->last = mix(d->last, d->requests[i].tokens, (size_t)d->requests[i].n_tokens * sizeof(int32_t));
    free(d->requests[i].tokens);
  }
  if (d->first == 0) d->first = d->last;
  return status;
}

/* What comes once an answer (prompt, memory) is in both and drops out. */
static ks_status decode_sample(void *subject, double *ms) {
  decode *d = ((ks_goal_subject *)subject)->state;
  const double start = ks_clock_seconds();
  KS_TRY(answer(d, 1));
  const double between = ks_clock_seconds();
  KS_TRY(answer(d, d->n_new + 1));
  const double end = ks_clock_seconds();
  *ms = 1e3 * ((end - between) - (between - start)) / (double)d->n_new;
  return KS_OK;
}

/* Weights once, the keys and values of a middle position, adapters' weights. */
static void decode_load(const decode *d, ks_goal_subject *s) {
  const ks_model_config *c = &d->model->config;
  const double act = (double)ks_ctx_act_size(d->model->ctx),
               row = 2 * act * (double)(c->n_layers * c->n_kv_heads * c->head_dim),
               length = (double)d->n_prompt + (double)d->n_new / 2;
  s->load.work = (double)d->n;
  s->load.bytes = (double)ks_bench_frozen_bytes(d->model) + (double)d->n * length * row;
  for (int64_t i = 0; i < d->adapters.n; i++)
    s->load.bytes += 4 * (double)d->adapters.items[i]->n_params;
  s->load.flops = ks_bench_forward_flops(c, d->n, (int64_t)length, true);
}

static ks_status decode_make(ks_goal_run *run, ks_goal_subject *s) {
  const ks_goal_parameters *p = &s->p;
  const ks_model_config *c = &run->model->config;
  const int64_t pages = (p->prompt + p->new) / KS_ATTENTION_PAGE_UNIT + 1;
  decode *d = NULL;
  uint32_t targets = 0;
  KS_TRY(ks_alloc_array(&d, 1, sizeof *d, "bench"));
  s->state = d;
  *d = (decode){.model = run->model,
                .n = p->batch,
                .n_prompt = p->prompt,
                .n_new = p->new,
                .sampler = {.top_p = 1},
                .params = {.max_batch = p->batch,
                           .cache_bytes = p->batch * pages * KS_ATTENTION_PAGE_UNIT * 2 * c->n_layers *
                                          c->n_kv_heads * c->head_dim *
                                          (int64_t)ks_ctx_act_size(run->model->ctx)}};
  if (strcmp(p->sampler, "top_p") == 0)
    d->sampler = (ks_sampler){.temperature = 0.8F, .top_p = 0.9F, .key = 1};
  KS_TRY(ks_alloc_array(&d->requests, (size_t)p->batch, sizeof *d->requests, "bench"));
  KS_TRY(ks_alloc_array(&d->prompts, (size_t)(p->batch * p->prompt), sizeof *d->prompts, "bench"));
  for (int64_t i = 0; i < p->batch * p->prompt; i++)
    d->prompts[i] = (int32_t)((i * 7919 + 1) % c->vocab_size);
  if (p->n_adapters > 0) {
    KS_TRY(ks_targets_parse(p->targets, &targets));
    KS_TRY(adapters_make(run->model, p->n_adapters, (int32_t)p->rank, targets, &d->adapters));
  }
  decode_load(d, s);
  snprintf(s->what, sizeof s->what, "%s, %lld sequence(s), %lld adapter(s), %s", p->shape,
           (long long)p->batch, (long long)p->n_adapters, p->sampler);
  return KS_OK;
}

static ks_status decode_finish(ks_goal_run *run, ks_goal_subject *s) {
  const decode *d = s->state;
  (void)run;
  s->launches /= (double)d->n_new; /* prompts among them; fewer graphs than 1 were made anew on the way */
  s->graphs /= (double)d->n_new;
  s->waits /= (double)d->n_new;
  snprintf(s->note, sizeof s->note,
           "one position of all sequences: an answer of %lld tokens less one of 1, by %lld",
           (long long)d->n_new + 1, (long long)d->n_new);
  if (d->first != d->last) ks_goal_wrong(s, "other tokens than the first time");
  return KS_OK;
}

static void decode_drop(ks_goal_subject *s) {
  decode *d = s->state;
  if (!d) return;
  adapters_free(&d->adapters);
  free(d->requests);
  free(d->prompts);
  free(d);
}

/* ---------------------------------------------------------------- prefill */

typedef struct {
  ks_model *model;
  ks_run *run;
  ks_batch batch;
  int32_t *tokens;
  int64_t offsets[2];
  void *logits, *host;
  uint64_t first, last;
} prefill;

static ks_status prefill_once(void *arg) {
  prefill *p = arg;
  const ks_model_config *c = &p->model->config;
  const void *hidden;
  KS_TRY(ks_forward(p->run, &p->batch, &hidden));
  const ks_linear_args head = {.w = p->model->head,
                               .x = ks_act_at(p->model->ctx, hidden, (p->batch.n_rows - 1) * c->hidden_size),
                               .y = p->logits,
                               .y_is_f32 = true,
                               .n_rows = 1};
  return ks_linear_forward(p->model->ctx, &head);
}

static ks_status prefill_hash(prefill *p, uint64_t *out) {
  const size_t bytes = (size_t)p->model->config.vocab_size * sizeof(float);
  KS_TRY(ks_mem_download(p->model->ctx, p->host, p->logits, bytes));
  *out = mix(0xcbf29ce484222325u, p->host, bytes);
  return KS_OK;
}

static ks_status prefill_make(ks_goal_run *run, ks_goal_subject *s) {
  const ks_model_config *c = &run->model->config;
  const int64_t rows = ks_min_i64(s->p.rows, c->max_seq_len);
  const size_t bytes = (size_t)c->vocab_size * sizeof(float);
  prefill *p = NULL;
  KS_TRY(ks_alloc_array(&p, 1, sizeof *p, "bench"));
  s->state = p;
  *p = (prefill){.model = run->model, .offsets = {0, rows}};
  KS_TRY(ks_alloc_array(&p->tokens, (size_t)rows, sizeof *p->tokens, "bench"));
  for (int64_t i = 0; i < rows; i++)
    p->tokens[i] = (int32_t)(i * 7919 % c->vocab_size);
  p->batch = (ks_batch){.tokens = p->tokens, .n_rows = rows, .seq_offsets = p->offsets, .n_seqs = 1};
  KS_TRY(
      ks_run_create(run->model, &(ks_run_params){.max_rows = rows, .max_seqs = 1, .no_loss = true}, &p->run));
  KS_TRY(ks_mem_alloc(run->model->ctx, bytes, &p->logits));
  KS_TRY(ks_alloc_array(&p->host, bytes, 1, "bench"));
  KS_TRY(prefill_once(p));
  KS_TRY(prefill_hash(p, &p->first));
  s->timed.fn = prefill_once;
  s->timed.arg = p;
  s->load.work = (double)rows;
  s->load.flops =
      ks_bench_forward_flops(c, rows, rows, false) + 2.0 * (double)c->vocab_size * (double)c->hidden_size;
  snprintf(s->what, sizeof s->what, "%s, %lld tokens, logits of the last", s->p.shape, (long long)rows);
  return KS_OK;
}

static ks_status prefill_finish(ks_goal_run *run, ks_goal_subject *s) {
  prefill *p = s->state;
  (void)run;
  KS_TRY(prefill_hash(p, &p->last));
  if (p->first != p->last) ks_goal_wrong(s, "other logits than the first time");
  return KS_OK;
}

static void prefill_drop(ks_goal_subject *s) {
  prefill *p = s->state;
  if (!p) return;
  ks_run_destroy(p->run);
  ks_mem_free(p->model->ctx, p->logits);
  free(p->host);
  free(p->tokens);
  free(p);
}

/* ---------------------------------------------------------------- a whole run */

/* A window of an experiment: its arrivals are embedded and scored, every cell of a cohort trains, and texts are
 * generated. */
typedef struct {
  ks_model *model;
  adapters adapters; /* of the cohort */
  ks_tokens *texts;
  ks_example *examples;
  int32_t *tokens;
  int64_t n_texts, n_tokens, n_examples, n_steps, n_requests, n_new;
  float *embeddings, *scores;
  double *entropies;
  int64_t *nearest;
  double busy_seconds, wall_seconds;
  double first_loss, last_loss;
} window;

static ks_status window_score(window *w) {
  ks_ctx *ctx = w->model->ctx;
  const int64_t d = w->model->config.hidden_size;
  const ks_embed_params embed = {.pooling = KS_POOL_MEAN, .max_tokens = w->n_tokens};
  KS_TRY(ks_embed_texts(w->model, w->texts, w->n_texts, &embed, NULL, w->embeddings));
  const ks_entropy_args entropy = {.x = w->embeddings,
                                   .h = w->entropies,
                                   .n_rows = w->n_texts,
                                   .n_cols = d,
                                   .kind = KS_ENTROPY_HISTOGRAM,
                                   .n_bins = 100};
  KS_TRY(ks_entropy(ctx, &entropy));
  const ks_similarity_args near = {
      .q = w->embeddings, .k = w->embeddings, .n_q = w->n_texts, .n_k = w->n_texts, .n_cols = d};
  return ks_similarity_top(ctx, &near, 2, w->scores, w->nearest);
}

static ks_status window_train(window *w) {
  ks_train_job jobs[COHORT] = {0};
  for (int i = 0; i < COHORT; i++)
    jobs[i] = (ks_train_job){.adapter = w->adapters.items[i],
                             .examples = w->examples + i * w->n_examples,
                             .n_examples = w->n_examples,
                             .params = {.learning_rate = 1e-3,
                                        .beta1 = 0.9,
                                        .beta2 = 0.999,
                                        .eps = 1e-8,
                                        .max_grad_norm = 1,
                                        .batch_size = w->n_examples,
                                        .steps = w->n_steps,
                                        .seed = (uint64_t)i + 1}};
  ks_status status = ks_train(w->model, jobs, COHORT, NULL, NULL);
  if (status == KS_OK) {
    if (w->first_loss == 0) w->first_loss = (double)jobs[0].step_loss[0];
    w->last_loss = (double)jobs[0].step_loss[w->n_steps - 1];
  }
  for (int i = 0; i < COHORT; i++) {
    free(jobs[i].step_loss);
    free(jobs[i].step_grad_norm);
  }
  return status;
}

static ks_status window_generate(window *w) {
  ks_request *requests = NULL;
  KS_TRY(ks_alloc_array(&requests, (size_t)w->n_requests, sizeof *requests, "bench"));
  for (int64_t i = 0; i < w->n_requests; i++)
    requests[i] = (ks_request){.prompt = w->tokens + i * w->n_tokens,
                               .n_prompt = w->n_tokens / 2,
                               .adapter = (int32_t)(i * COHORT / w->n_requests),
                               .sampler = {.temperature = 0.8F, .top_p = 0.9F, .key = (uint64_t)i},
                               .max_new_tokens = w->n_new};
  ks_status status = ks_generate(w->model, requests, w->n_requests, w->adapters.views, COHORT,
                                 &KS_GENERATE_DEFAULT, NULL, NULL);
  for (int64_t i = 0; i < w->n_requests; i++)
    free(requests[i].tokens);
  free(requests);
  return status;
}

static ks_status window_sample(void *subject, double *ms) {
  window *w = ((ks_goal_subject *)subject)->state;
  ks_activity before, after;
  ks_activity_of(w->model->ctx, &before);
  const double start = ks_clock_seconds();
  KS_TRY(window_score(w));
  KS_TRY(window_train(w));
  KS_TRY(window_generate(w));
  const double seconds = ks_clock_seconds() - start;
  ks_activity_of(w->model->ctx, &after);
  w->wall_seconds += seconds;
  w->busy_seconds += after.busy_seconds - before.busy_seconds;
  *ms = 1e3 * seconds;
  return KS_OK;
}

static ks_status window_arrays(window *w) {
  const int64_t d = w->model->config.hidden_size, n = w->n_texts;
  void *p;
  KS_TRY(ks_mem_alloc(w->model->ctx, (size_t)(n * d) * sizeof(float), &p));
  w->embeddings = p;
  KS_TRY(ks_alloc_array(&w->scores, (size_t)n * 2, sizeof *w->scores, "bench"));
  KS_TRY(ks_alloc_array(&w->nearest, (size_t)n * 2, sizeof *w->nearest, "bench"));
  KS_TRY(ks_alloc_array(&w->entropies, (size_t)n, sizeof *w->entropies, "bench"));
  KS_TRY(ks_alloc_array(&w->texts, (size_t)n, sizeof *w->texts, "bench"));
  KS_TRY(ks_alloc_array(&w->examples, (size_t)(COHORT * w->n_examples), sizeof *w->examples, "bench"));
  KS_TRY(ks_alloc_array(&w->tokens, (size_t)(n * w->n_tokens), sizeof *w->tokens, "bench"));
  ks_rng rng = ks_rng_make(3, KS_RNG_TEST, 0);
  for (int64_t i = 0; i < n * w->n_tokens; i++)
    w->tokens[i] = (int32_t)ks_rng_below(&rng, (uint64_t)w->model->config.vocab_size);
  for (int64_t i = 0; i < n; i++)
    w->texts[i] = (ks_tokens){w->tokens + i * w->n_tokens, w->n_tokens};
  for (int64_t i = 0; i < COHORT * w->n_examples; i++)
    w->examples[i] = (ks_example){w->tokens + i % n * w->n_tokens, w->n_tokens, w->n_tokens / 2};
  return KS_OK;
}

static ks_status window_make(ks_goal_run *run, ks_goal_subject *s) {
  window *w = NULL;
  if (!run->b->info.has_timer) {
    snprintf(s->skipped, sizeof s->skipped, "no device");
    snprintf(s->note, sizeof s->note, "a CPU computes in the call itself: there is no time outside kernels");
    return KS_OK;
  }
  KS_TRY(ks_alloc_array(&w, 1, sizeof *w, "bench"));
  s->state = w;
  const bool small = run->scale > 1;
  *w = (window){.model = run->model,
                .n_texts = small ? 8 : 64,
                .n_tokens = small ? 12 : 192,
                .n_examples = small ? 2 : 8,
                .n_steps = small ? 3 : 5,
                .n_requests = small ? 4 : 32,
                .n_new = small ? 3 : 64};
  KS_TRY(window_arrays(w));
  KS_TRY(adapters_make(run->model, COHORT, 8,
                       1u << KS_TARGET_q | 1u << KS_TARGET_k | 1u << KS_TARGET_v | 1u << KS_TARGET_o,
                       &w->adapters));
  s->load.work = 1;
  snprintf(s->what, sizeof s->what,
           "%s: %lld texts, %lld cells x %lld steps of %lld x %lld, %lld answers of %lld", s->p.shape,
           (long long)w->n_texts, (long long)COHORT, (long long)w->n_steps, (long long)w->n_examples,
           (long long)w->n_tokens, (long long)w->n_requests, (long long)w->n_new);
  return KS_OK;
}

static ks_status window_finish(ks_goal_run *run, ks_goal_subject *s) {
  const window *w = s->state;
  (void)run;
  s->launches = s->graphs = s->waits = NAN;
  s->idle_share = 1 - w->busy_seconds / w->wall_seconds;
  snprintf(s->note, sizeof s->note,
           "busy: spans with work queued; loss of the first cell %.4f at first, %.4f at last", w->first_loss,
           w->last_loss);
  if (!(w->last_loss < w->first_loss)) ks_goal_wrong(s, "it does not learn");
  return KS_OK;
}

static void window_drop(ks_goal_subject *s) {
  window *w = s->state;
  if (!w) return;
  adapters_free(&w->adapters);
  ks_mem_free(w->model->ctx, w->embeddings);
  void *arrays[] = {w->scores, w->nearest, w->entropies, w->texts, w->examples, w->tokens};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
    free(arrays[i]);
  free(w);
}

const ks_goal_kind ks_goal_model_kinds[] = {
    {"decode", true, decode_make, decode_sample, decode_finish, decode_drop},
    {"prefill", true, prefill_make, ks_goal_sample_hot, prefill_finish, prefill_drop},
    {"whole_run", true, window_make, window_sample, window_finish, window_drop},
    {0}};
