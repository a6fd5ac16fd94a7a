#include "core/synthesize/writer.h"

ks_status ks_writer_prompt(const char *prompt, const ks_synth_source *source, ks_text *out) {
  const struct {
    const char *mark, *value;
  } fields[] = {{"{question}", source->question}, {"{response}", source->response ? source->response : ""}};
  for (const char *p = prompt; *p;) {
    size_t n = strcspn(p, "{");
    KS_TRY(ks_text_add(out, p, n));
    p += n;
    if (!*p) break;
    bool known = false;
    for (size_t i = 0; i < sizeof fields / sizeof *fields && !known; i++) {
      size_t length = strlen(fields[i].mark);
      known = strncmp(p, fields[i].mark, length) == 0;
      if (!known) continue;
      KS_TRY(ks_text_add_str(out, fields[i].value));
      p += length;
    }
    if (!known) KS_TRY(ks_text_add(out, p++, 1));
  }
  return KS_OK;
}

static ks_status add_stop(ks_writer *w, int32_t id, size_t *cap) {
  if (id < 0) return KS_OK;
  for (int64_t i = 0; i < w->n_stops; i++)
    if (w->stops[i] == id) return KS_OK;
  if ((size_t)w->n_stops == *cap) {
    size_t grown = *cap ? 2 * *cap : 16;
    int32_t *stops = realloc(w->stops, grown * sizeof *stops);
    if (!stops) return KS_FAIL(KS_ENOMEM, "synthesis: no memory for %zu stop tokens", grown);
    w->stops = stops;
    *cap = grown;
  }
  w->stops[w->n_stops++] = id;
  return KS_OK;
}

/* Writing on after the end mark would only cost time. Where that mark may come before the variant does, it
 * ends nothing. */
static ks_status find_stops(ks_writer *w) {
  const char *begin = w->params->begin_mark, *end = w->params->end_mark, *mark = *end ? end : "\n";
  bool mark_ends = *end ? !strstr(begin, end) : !*begin;
  size_t cap = 0;
  ks_text piece = {0};
  ks_status status = add_stop(w, ks_tokenizer_eos(w->tokenizer), &cap);
  for (int i = 0; i < w->model->config.n_eos && status == KS_OK; i++)
    status = add_stop(w, w->model->config.eos_ids[i], &cap);
  int64_t n_vocab = ks_min_i64(ks_tokenizer_vocab_size(w->tokenizer), w->model->config.vocab_size);
  for (int32_t id = 0; mark_ends && id < n_vocab && status == KS_OK; id++) {
    ks_text_clear(&piece);
    status = ks_tokenizer_decode(w->tokenizer, &id, 1, &piece);
    if (status != KS_OK || !piece.data) continue;
    const char *text = piece.data + strspn(piece.data, " ");
    if (strncmp(text, mark, strlen(mark)) == 0) status = add_stop(w, id, &cap);
  }
  ks_text_free(&piece);
  return status;
}

static ks_status encode_prompt(ks_writer *w, const ks_synth_source *source, int32_t **ids, size_t *n_ids) {
  ks_text text = {0};
  size_t cap = 0;
  ks_status status = ks_writer_prompt(w->params->prompt, source, &text);
  if (status == KS_OK)
    status = ks_tokenizer_encode(w->tokenizer, text.data, text.len, true, ids, n_ids, &cap);
  ks_text_free(&text);
  KS_TRY_AS(status, "prompt for set %llu", (unsigned long long)source->id);
  if (*n_ids == 0)
    return KS_FAIL(KS_ECONFIG, "synthesis: the prompt gives no token; write one with {question}");
  if (*n_ids + (size_t)w->params->max_new_tokens > (size_t)w->model->config.max_seq_len) {
    free(*ids);
    *ids = NULL;
    *n_ids = 0;
  }
  return KS_OK;
}

ks_status ks_writer_open(ks_writer *w, const ks_synth_source *sources, int64_t n_sources) {
  const ks_synthesize_params *p = w->params;
  int64_t context = w->model->config.max_seq_len;
  if (!p->prompt || !strstr(p->prompt, "{question}"))
    return KS_FAIL(KS_ECONFIG, "synthesis: the prompt does not contain {question}");
  if (!p->begin_mark || !p->end_mark) return KS_FAIL(KS_EINVAL, "synthesis: marks are NULL; give strings");
  if (p->max_new_tokens < 1 || p->max_new_tokens >= context)
    return KS_FAIL(KS_ECONFIG,
                   "synthesis: max_new_tokens is %lld; the model's context of %lld must hold the prompt too",
                   (long long)p->max_new_tokens, (long long)context);
  if (!(p->temperature >= 0) || !(p->top_p > 0 && p->top_p <= 1))
    return KS_FAIL(KS_ECONFIG, "synthesis: temperature %g must be 0 or more, top_p %g above 0 and at most 1",
                   (double)p->temperature, (double)p->top_p);
  KS_TRY(ks_alloc_array(&w->prompts, (size_t)n_sources, sizeof *w->prompts, "synthesis: prompts"));
  w->n_sources = n_sources;
  KS_TRY(ks_alloc_array(&w->n_prompts, (size_t)n_sources, sizeof *w->n_prompts, "synthesis: prompts"));
  for (int64_t i = 0; i < n_sources; i++) {
    if (sources[i].adapter < -1 || sources[i].adapter >= w->n_adapters)
      return KS_FAIL(KS_EINVAL, "synthesis: adapter %d; there are %lld", (int)sources[i].adapter,
                     (long long)w->n_adapters);
    KS_TRY(encode_prompt(w, &sources[i], &w->prompts[i], &w->n_prompts[i]));
  }
  return find_stops(w);
}

void ks_writer_close(ks_writer *w) {
  for (int64_t i = 0; i < w->n_sources; i++)
    free(w->prompts[i]);
  free(w->prompts);
  free(w->n_prompts);
  free(w->stops);
}

bool ks_writer_has_room(const ks_writer *w, int64_t source) {
  return w->prompts[source] != NULL;
}

ks_status ks_writer_write(ks_writer *w, const ks_synth_source *sources, ks_attempt *attempts, int64_t n) {
  const ks_synthesize_params *p = w->params;
  ks_request *requests = NULL;
  KS_TRY(ks_alloc_array(&requests, (size_t)n, sizeof *requests, "synthesis: requests"));
  for (int64_t i = 0; i < n; i++) {
    int64_t source = attempts[i].source;
    requests[i] = (ks_request){
        .prompt = w->prompts[source],
        .n_prompt = (int64_t)w->n_prompts[source],
        .adapter = sources[source].adapter,
        .sampler = {.temperature = p->temperature, .top_p = p->top_p, .key = attempts[i].key},
        .max_new_tokens = p->max_new_tokens,
        .stop_ids = w->stops,
        .n_stop = w->n_stops,
    };
  }
  ks_status status =
      ks_generate(w->model, requests, n, w->adapters, w->n_adapters, &p->generate, w->progress, NULL);
  for (int64_t i = 0; i < n && status == KS_OK; i++) {
    ks_text text = {0};
    status = ks_tokenizer_decode(w->tokenizer, requests[i].tokens, (size_t)requests[i].n_tokens, &text);
    if (status == KS_OK) status = ks_text_add(&text, "", 0);
    attempts[i].text = text.data;
    attempts[i].ended = requests[i].stopped;
    attempts[i].n_tokens = requests[i].n_tokens + requests[i].stopped;
  }
  for (int64_t i = 0; i < n; i++)
    free(requests[i].tokens);
  free(requests);
  return status;
}

ks_status ks_writer_extract(const ks_synthesize_params *params, const char *text, bool ended, bool *found,
                            char **out) {
  const char *begin = *params->begin_mark ? strstr(text, params->begin_mark) : text;
  *found = begin != NULL;
  if (!begin) return ks_strdup(text, out);
  begin += strlen(params->begin_mark);
  const char *end = *params->end_mark ? strstr(begin, params->end_mark) : strchr(begin, '\n');
  if (!end && *params->end_mark && !ended) {
    *found = false;
    return ks_strdup(text, out);
  }
  if (!end) end = begin + strlen(begin);
  begin += strspn(begin, " \t\r\n\f\v");
  while (end > begin && strchr(" \t\r\n\f\v", end[-1]))
    end--;
  return ks_strndup(begin, end > begin ? (size_t)(end - begin) : 0, out);
}
