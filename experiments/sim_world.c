#include "experiments/sim.h"

#include "core/data/persona.h"

#include <math.h>

/* ---------------------------------------------------------------- opening */

static ks_status open_data(const ks_config *c, ks_dataset **out) {
  if (strcmp(c->data.source, "persona") == 0) {
    ks_persona_params p = {.population_seed = (uint64_t)c->persona.population_seed,
                           .user = (uint64_t)c->persona.user,
                           .stream_size = c->data.stream_size,
                           .eval_size = c->data.eval_size,
                           .n_topics = c->persona.topics,
                           .uninformative = c->persona.uninformative,
                           .repeats = c->persona.repeats,
                           .difficulty = c->persona.difficulty,
                           .noise = c->persona.noise};
    return ks_persona_create(&p, out);
  }
  ks_import_params p = {.importer = c->data.source,
                        .path = c->data.path,
                        .question_field = c->data.question_field,
                        .input_field = c->data.input_field,
                        .response_field = c->data.response_field,
                        .preferred_field = c->data.preferred_field,
                        .topic_field = c->data.topic_field,
                        .skip_invalid = c->data.skip_invalid,
                        .max_rows = c->data.max_rows};
  ks_dataset *data = NULL;
  KS_TRY(ks_dataset_import(&p, &data));
  ks_status status = ks_dataset_split(data, &(ks_split_params){.stream_size = c->data.stream_size,
                                                               .eval_size = c->data.eval_size,
                                                               .seed = (uint64_t)c->data.split_seed});
  if (status != KS_OK) {
    ks_dataset_destroy(data);
    return status;
  }
  *out = data;
  return KS_OK;
}

ks_status ks_world_open(ks_ctx *ctx, const ks_config *config, ks_world **out) {
  ks_world *w;
  KS_TRY(ks_alloc_array(&w, 1, sizeof *w, "world"));
  w->config = config;
  w->ctx = ctx;
  ks_status status;
  KS_TRY_OUT(ks_model_load(ctx, config->model.path, &(ks_model_load_params){.dtype = config->model.dtype},
                           &w->model));
  KS_TRY_OUT(ks_tokenizer_load(config->model.tokenizer[0] ? config->model.tokenizer : config->model.path,
                               w->model->config.vocab_size, &w->tokenizer));
  if (ks_tokenizer_vocab_size(w->tokenizer) > w->model->config.vocab_size) {
    status =
        KS_FAIL(KS_EDATA,
                "the tokenizer has %lld tokens, the model %lld; name the tokenizer that belongs to the model",
                (long long)ks_tokenizer_vocab_size(w->tokenizer), (long long)w->model->config.vocab_size);
    goto out;
  }
  if (config->select.lexicon[0]) KS_TRY_OUT(ks_lexicons_load(config->select.lexicon, &w->lexicons));
  KS_TRY_OUT(open_data(config, &w->data));
  size_t n = (size_t)w->data->n_sets, bytes;
  if (!ks_mul_size(n, (size_t)w->model->config.hidden_size * sizeof(float), &bytes)) {
    status = KS_FAIL(KS_EOVERFLOW, "embeddings of %zu sets do not fit an address space", n);
    goto out;
  }
  KS_TRY_OUT(ks_mem_alloc(ctx, bytes, (void **)&w->embeddings));
  KS_TRY_OUT(ks_alloc_array(&w->scores, n, sizeof *w->scores, "scores"));
  KS_TRY_OUT(ks_alloc_array(&w->own_responses, n, sizeof *w->own_responses, "own responses"));
  if (config->eval.max_new_tokens > w->model->config.max_seq_len / 2)
    ks_log(KS_LOG_WARN, "run",
           "eval.max_new_tokens is %lld; answers end at %lld, half of the model's context",
           (long long)config->eval.max_new_tokens, (long long)(w->model->config.max_seq_len / 2));
  *out = w;
  return KS_OK;
out:
  ks_world_close(w);
  return status;
}

void ks_world_close(ks_world *w) {
  if (!w) return;
  if (w->own_responses && w->data)
    for (int64_t i = 0; i < w->data->n_sets; i++)
      free(w->own_responses[i]);
  free(w->own_responses);
  free(w->scores);
  ks_mem_free(w->ctx, w->embeddings);
  ks_dataset_destroy(w->data);
  ks_lexicons_destroy(w->lexicons);
  ks_tokenizer_destroy(w->tokenizer);
  ks_model_destroy(w->model);
  free(w);
}

/* ---------------------------------------------------------------- tokens */

ks_status ks_world_encode(const ks_world *w, const char *text, bool add_bos, int32_t **ids, int64_t *n) {
  size_t n_ids = 0, cap = 0;
  *ids = NULL;
  ks_status status = ks_tokenizer_encode(w->tokenizer, text, strlen(text),
                                         add_bos && ks_tokenizer_bos(w->tokenizer) >= 0, ids, &n_ids, &cap);
  if (status != KS_OK) {
    free(*ids);
    *ids = NULL;
  }
  *n = (int64_t)n_ids;
  return status;
}

/* template with {question} replaced. */
static ks_status render(const char *template, const char *question, ks_text *out) {
  const char *slot = strstr(template, "{question}");
  if (!slot) return KS_FAIL(KS_ECONFIG, "prompt.answer has no {question}; write it where the question goes");
  KS_TRY(ks_text_add(out, template, (size_t)(slot - template)));
  KS_TRY(ks_text_add_str(out, question));
  return ks_text_add_str(out, slot + strlen("{question}"));
}

ks_status ks_world_encode_prompt(const ks_world *w, const char *question, int64_t max_tokens, int32_t **ids,
                                 int64_t *n) {
  ks_text text = {0};
  ks_status status = render(w->config->prompt.answer, question, &text);
  if (status == KS_OK) status = ks_world_encode(w, text.data, true, ids, n);
  ks_text_free(&text);
  if (status != KS_OK || *n <= max_tokens) return status;
  /* The end of the prompt asks for the answer and the first token begins the text: what goes is the
   * question's beginning. */
  int64_t keep = max_tokens > 1 ? max_tokens - 1 : 0;
  memmove(*ids + 1, *ids + (*n - keep), (size_t)keep * sizeof **ids);
  *n = keep + 1;
  return KS_OK;
}

/* The response's tokens as they follow the prompt: those of both encoded together, less the prompt's. Where
 * the two texts merge at the seam (so that the prompt's tokens are not the beginning of the whole's), the
 * response is encoded by itself. */
static ks_status encode_response(const ks_world *w, const char *question, const char *response, int32_t **ids,
                                 int64_t *n) {
  ks_text text = {0};
  int32_t *prompt = NULL;
  int64_t n_prompt;
  *ids = NULL;
  ks_status status;
  KS_TRY_OUT(render(w->config->prompt.answer, question, &text));
  KS_TRY_OUT(ks_world_encode(w, text.data, true, &prompt, &n_prompt));
  size_t seam = text.len;
  KS_TRY_OUT(ks_text_addf(&text, "%s%s", w->config->prompt.response_prefix, response));
  KS_TRY_OUT(ks_world_encode(w, text.data, true, ids, n));
  if (*n >= n_prompt && memcmp(*ids, prompt, (size_t)n_prompt * sizeof *prompt) == 0) {
    *n -= n_prompt;
    memmove(*ids, *ids + n_prompt, (size_t)*n * sizeof **ids);
    goto out;
  }
  free(*ids);
  *ids = NULL;
  KS_TRY_OUT(ks_world_encode(w, text.data + seam, false, ids, n));
out:
  free(prompt);
  ks_text_free(&text);
  return status;
}

ks_status ks_world_encode_example(const ks_world *w, const char *question, const char *response,
                                  int64_t max_tokens, int32_t **ids, int64_t *n, int64_t *begin) {
  int32_t *answer = NULL;
  int64_t n_answer;
  *ids = NULL;
  ks_status status;
  KS_TRY_OUT(encode_response(w, question, response, &answer, &n_answer));
  int32_t eos = ks_tokenizer_eos(w->tokenizer);
  int64_t n_end = eos >= 0 ? 1 : 0;
  int64_t room = ks_max_i64(max_tokens - n_answer - n_end, max_tokens / 2);
  KS_TRY_OUT(ks_world_encode_prompt(w, question, room, ids, begin));
  int64_t take = ks_min_i64(n_answer, max_tokens - *begin);
  if (take < n_answer) n_end = 0; /* a cut response does not end here */
  n_end = ks_min_i64(n_end, max_tokens - *begin - take);
  int32_t *all = realloc(*ids, (size_t)(*begin + take + n_end + 1) * sizeof *all);
  if (!all) {
    status = KS_FAIL(KS_ENOMEM, "example: no memory for its tokens");
    goto out;
  }
  *ids = all;
  if (take) memcpy(all + *begin, answer, (size_t)take * sizeof *all);
  if (n_end) all[*begin + take] = eos;
  *n = *begin + take + n_end;
out:
  if (status != KS_OK) {
    free(*ids);
    *ids = NULL;
  }
  free(answer);
  return status;
}

ks_generate_params ks_world_generate_params(const ks_world *w) {
  return (ks_generate_params){.max_batch = w->config->run.generate_batch,
                              .cache_bytes = w->config->run.cache_mb * (1 << 20)};
}

void ks_world_stop_ids(const ks_world *w, int32_t ids[9], int64_t *n) {
  *n = 0;
  for (int i = 0; i < w->model->config.n_eos && i < 8; i++)
    ids[(*n)++] = w->model->config.eos_ids[i];
  int32_t eos = ks_tokenizer_eos(w->tokenizer);
  for (int64_t i = 0; i < *n; i++)
    if (ids[i] == eos) return;
  if (eos >= 0) ids[(*n)++] = eos;
}

/* ---------------------------------------------------------------- scores */

static ks_status scored_text(const ks_config *c, const ks_set *set, ks_text *out) {
  ks_text_clear(out);
  KS_TRY(ks_text_add_str(out, set->question));
  if (c->select.text == KS_TEXT_QUESTION) return KS_OK;
  return ks_text_addf(out, " %s", set->response);
}

typedef struct {
  int64_t *ids;      /* [n] the sets to do, each once */
  ks_tokens *tokens; /* [n] */
  float *pooled;     /* backend memory [n, hidden_size] */
  double *entropy;   /* [n] */
  int64_t n;
} score_batch;

static void score_batch_free(ks_world *w, score_batch *b) {
  if (b->tokens)
    for (int64_t i = 0; i < b->n; i++)
      free((void *)(uintptr_t)b->tokens[i].tokens);
  free(b->ids);
  free(b->tokens);
  free(b->entropy);
  ks_mem_free(w->ctx, b->pooled);
}

static ks_status score_texts(ks_world *w, score_batch *b) {
  ks_text text = {0};
  ks_status status = KS_OK;
  for (int64_t i = 0; i < b->n; i++) {
    ks_set_score *score = &w->scores[b->ids[i]];
    KS_TRY_OUT(scored_text(w->config, &w->data->sets[b->ids[i]], &text));
    int32_t *ids;
    int64_t n;
    bool has_bos = ks_tokenizer_bos(w->tokenizer) >= 0;
    KS_TRY_OUT(ks_world_encode(w, text.data, true, &ids, &n));
    b->tokens[i] = (ks_tokens){ids, n};
    score->n_tokens = n - (has_bos ? 1 : 0);
    if (n == 0) {
      status = KS_FAIL(KS_EDATA, "set %lld: its text gives no tokens; remove it", (long long)b->ids[i]);
      goto out;
    }
    score->domain = -1;
    if (w->lexicons) KS_TRY_OUT(ks_lexicons_score(w->lexicons, text.data, &score->dss, &score->domain));
  }
out:
  ks_text_free(&text);
  return status;
}

static ks_status embed_texts(ks_world *w, score_batch *b, const ks_progress *progress) {
  const ks_config *c = w->config;
  int64_t d = w->model->config.hidden_size;
  KS_TRY(ks_mem_alloc(w->ctx, (size_t)(b->n * d) * sizeof(float), (void **)&b->pooled));
  ks_embed_params params = {.pooling = c->select.pooling,
                            .max_tokens = ks_min_i64(c->select.max_tokens, w->model->config.max_seq_len),
                            .batch_rows = c->run.embed_rows};
  KS_TRY(ks_embed_texts(w->model, b->tokens, b->n, &params, progress, b->pooled));
  KS_TRY(ks_entropy(w->ctx, &(ks_entropy_args){.x = b->pooled,
                                               .h = b->entropy,
                                               .n_rows = b->n,
                                               .n_cols = d,
                                               .kind = c->select.entropy,
                                               .n_bins = c->select.entropy_bins,
                                               .clip = c->select.entropy_clip}));
  for (int64_t i = 0; i < b->n; i++) {
    ks_set_score *score = &w->scores[b->ids[i]];
    score->eoe = ks_eoe_normalise(b->entropy[i], score->n_tokens, c->select.eoe_norm);
    KS_TRY(ks_mem_copy(w->ctx, w->embeddings + b->ids[i] * d, b->pooled + i * d, (size_t)d * sizeof(float)));
    score->known = true;
    w->n_embedded++;
  }
  return KS_OK;
}

ks_status ks_world_score_sets(ks_world *w, const int64_t *set_ids, int64_t n, const ks_progress *progress) {
  double start = ks_clock_seconds();
  score_batch b = {0};
  ks_status status;
  bool *listed = NULL;
  KS_TRY_OUT(ks_alloc_array(&listed, (size_t)w->data->n_sets, sizeof *listed, "sets to embed"));
  KS_TRY_OUT(ks_alloc_array(&b.ids, (size_t)n, sizeof *b.ids, "sets to embed"));
  for (int64_t i = 0; i < n; i++) {
    if (w->scores[set_ids[i]].known || listed[set_ids[i]]) continue;
    listed[set_ids[i]] = true;
    b.ids[b.n++] = set_ids[i];
  }
  if (b.n == 0) goto out;
  KS_TRY_OUT(ks_alloc_array(&b.tokens, (size_t)b.n, sizeof *b.tokens, "sets to embed"));
  KS_TRY_OUT(ks_alloc_array(&b.entropy, (size_t)b.n, sizeof *b.entropy, "sets to embed"));
  KS_TRY_OUT(score_texts(w, &b));
  KS_TRY_OUT(embed_texts(w, &b, progress));
out:
  score_batch_free(w, &b);
  free(listed);
  w->embed_seconds += ks_clock_seconds() - start;
  return status;
}

/* ---------------------------------------------------------------- the model's own answers */

ks_status ks_world_answer_sets(ks_world *w, const int64_t *set_ids, int64_t n, const ks_progress *progress) {
  const ks_config *c = w->config;
  ks_request *requests = NULL;
  int64_t *ids = NULL, n_requests = 0, n_stop;
  int32_t stop[9];
  ks_status status;
  const ks_generate_params generate = ks_world_generate_params(w);
  ks_world_stop_ids(w, stop, &n_stop);
  int64_t context = w->model->config.max_seq_len, n_new = ks_min_i64(c->eval.max_new_tokens, context / 2);
  KS_TRY_OUT(ks_alloc_array(&requests, (size_t)n, sizeof *requests, "answers"));
  KS_TRY_OUT(ks_alloc_array(&ids, (size_t)n, sizeof *ids, "answers"));
  for (int64_t i = 0; i < n; i++) {
    bool listed = w->own_responses[set_ids[i]] != NULL;
    for (int64_t j = 0; j < n_requests && !listed; j++)
      listed = ids[j] == set_ids[i];
    if (listed) continue;
    ks_request *r = &requests[n_requests];
    int32_t *prompt;
    KS_TRY_OUT(ks_world_encode_prompt(w, w->data->sets[set_ids[i]].question, context - n_new, &prompt,
                                      &r->n_prompt));
    ids[n_requests++] = set_ids[i];
    r->prompt = prompt;
    r->adapter = -1;
    r->sampler = (ks_sampler){.temperature = 0, .top_k = 0, .top_p = 1};
    r->max_new_tokens = n_new;
    r->stop_ids = stop;
    r->n_stop = n_stop;
  }
  KS_TRY_OUT(ks_generate(w->model, requests, n_requests, NULL, 0, &generate, progress, NULL));
  for (int64_t i = 0; i < n_requests; i++) {
    ks_text text = {0};
    status = ks_tokenizer_decode(w->tokenizer, requests[i].tokens, (size_t)requests[i].n_tokens, &text);
    if (status == KS_OK && !text.data) status = ks_text_add(&text, "", 0);
    if (status != KS_OK) {
      ks_text_free(&text);
      goto out;
    }
    w->own_responses[ids[i]] = text.data;
  }
out:
  for (int64_t i = 0; i < n_requests; i++) {
    free((void *)(uintptr_t)requests[i].prompt);
    free(requests[i].tokens);
  }
  free(requests);
  free(ids);
  return status;
}
