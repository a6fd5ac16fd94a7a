/* Continuous batching: each pass takes the next token of every running sequence and, in the rows that are
 * left, pieces of the prompts of those that are starting.
 *
 * Flights: when every sequence has drawn a token, the next passes need nothing from the host but the tokens, and these are in
 * backend memory: several passes are queued before the host looks. What a sequence drew after its last token is dropped. Rows
 * do not see each other, so the tokens are the same for any length of flight. */
#include "core/model/generate.h"
#include "core/model/run.h"

enum { DEVICE_AHEAD = 4, MAX_AHEAD = 64 };
#define REPORT_SECONDS 0.1

typedef struct {
  ks_request *request;
  int64_t limit;  /* tokens that it may bring */
  int32_t *pages; /* its pages of the cache */
  int64_t n_pages;
  int64_t n_cached; /* rows of which filled */
  int64_t n_rows;   /* in this pass */
} sequence;

typedef struct {
  ks_model *model;
  ks_request *requests;
  int64_t n_requests, next; /* next to be admitted */
  const ks_adapter_view *adapters;
  int64_t n_adapters;
  const ks_progress *progress;
  ks_generate_stats stats;
  ks_run *run;
  ks_kv_cache cache;
  int32_t *free_pages; /* [n_free] */
  int64_t n_free;
  const int32_t **pass_pages; /* [max_batch] of the sequences of a pass */
  sequence *active;           /* [max_batch], sorted by adapter */
  int64_t n_active, max_batch, n_finished;
  int32_t *tokens;      /* [max_rows] of a pass */
  int64_t *cache_rows;  /* [max_rows] */
  int64_t *ends;        /* [max_batch] out rows whose logits are wanted */
  sequence **ending;    /* [max_batch] their sequences */
  ks_sampler *samplers; /* [max_batch] */
  int32_t *sampled;     /* [ahead, max_batch] */
  int32_t *drawn;       /* backend memory [max_batch]: of the last pass */
  int64_t ahead;        /* longest flight */
  int64_t flying;       /* passes of this flight so far: tokens of each sequence that the host has not seen */
  float *logits;        /* backend memory [max_batch, vocab] */
  double reported;      /* when */
} generator;

static int64_t new_token_limit(const ks_model *model, const ks_request *r) {
  return ks_min_i64(r->max_new_tokens, model->config.max_seq_len - r->n_prompt);
}
/* Pages that a request fills at most. The last new token is never fed back. */
static int64_t pages_of(const ks_model *model, const ks_request *r) {
  int64_t rows = r->n_prompt + ks_max_i64(new_token_limit(model, r) - 1, 0);
  return (rows - 1) / KS_ATTENTION_PAGE_UNIT + 1;
}

/* ---------------------------------------------------------------- checks, sizes */

static ks_status check_request(const generator *g, int64_t i) {
  const ks_request *r = &g->requests[i];
  const ks_model_config *m = &g->model->config;
  if (r->n_prompt < 1 || !r->prompt)
    return KS_FAIL(KS_EINVAL, "generate: request %lld has no prompt; give at least one token", (long long)i);
  if (r->n_prompt >= m->max_seq_len)
    return KS_FAIL(KS_EINVAL,
                   "generate: request %lld has a prompt of %lld tokens; the model's context is %lld: cut it",
                   (long long)i, (long long)r->n_prompt, (long long)m->max_seq_len);
  for (int64_t j = 0; j < r->n_prompt; j++) {
    if (r->prompt[j] < 0 || r->prompt[j] >= m->vocab_size)
      return KS_FAIL(KS_EINVAL, "generate: request %lld has token %d at %lld; the model has %lld tokens",
                     (long long)i, r->prompt[j], (long long)j, (long long)m->vocab_size);
  }
  if (r->adapter < -1 || r->adapter >= g->n_adapters)
    return KS_FAIL(KS_EINVAL, "generate: request %lld names adapter %d of %lld", (long long)i, r->adapter,
                   (long long)g->n_adapters);
  if (r->max_new_tokens < 0 || r->n_stop < 0 || (r->n_stop > 0 && !r->stop_ids))
    return KS_FAIL(KS_EINVAL, "generate: request %lld asks for %lld tokens with %lld stop ids", (long long)i,
                   (long long)r->max_new_tokens, (long long)r->n_stop);
  return KS_OK;
}

static int compare_falling(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

/* Pages that the cache gets: what the largest max_batch requests need, within the bound. */
static ks_status size_cache(generator *g, int64_t cache_bytes) {
  const ks_model_config *m = &g->model->config;
  int64_t *needs = NULL, page_bytes, sum = 0;
  int64_t kv = m->n_kv_heads * m->head_dim;
  if (!ks_mul_i64(m->n_layers * 2 * KS_ATTENTION_PAGE_UNIT * (int64_t)ks_ctx_act_size(g->model->ctx), kv,
                  &page_bytes))
    return KS_FAIL(KS_EOVERFLOW, "generate: a page of the cache does not fit an address space");
  KS_TRY(ks_alloc_array(&needs, (size_t)g->n_requests, sizeof *needs, "generation"));
  for (int64_t i = 0; i < g->n_requests; i++)
    needs[i] = pages_of(g->model, &g->requests[i]);
  qsort(needs, (size_t)g->n_requests, sizeof *needs, compare_falling);
  for (int64_t i = 0; i < g->max_batch; i++)
    sum += needs[i];
  int64_t largest = needs[0];
  int64_t bound = (cache_bytes > 0 ? cache_bytes : (int64_t)KS_GENERATE_CACHE_MB << 20) / page_bytes;
  free(needs);
  if (cache_bytes > 0 && largest > bound)
    return KS_FAIL(KS_EBUDGET,
                   "generate: a request needs %lld pages of KV cache (%d tokens, %lld bytes each); "
                   "cache_bytes %lld holds %lld",
                   (long long)largest, KS_ATTENTION_PAGE_UNIT, (long long)page_bytes, (long long)cache_bytes,
                   (long long)bound);
  g->n_free = ks_max_i64(largest, ks_min_i64(sum, bound));
  if (g->n_free > INT32_MAX / KS_ATTENTION_PAGE_UNIT)
    return KS_FAIL(KS_EOVERFLOW, "generate: a KV cache of %lld pages; give a smaller cache_bytes",
                   (long long)g->n_free);
  g->cache.n_rows = g->n_free * KS_ATTENTION_PAGE_UNIT;
  KS_TRY(ks_alloc_array(&g->free_pages, (size_t)g->n_free, sizeof *g->free_pages, "generation"));
  for (int64_t i = 0; i < g->n_free; i++)
    g->free_pages[i] = (int32_t)(g->n_free - 1 - i);
  return KS_OK;
}

static ks_status create_run(generator *g) {
  ks_run_params p = {.max_seqs = g->max_batch, .no_loss = true};
  int64_t prompt_rows = 0;
  for (int64_t i = 0; i < g->n_requests; i++) {
    int32_t adapter = g->requests[i].adapter;
    if (prompt_rows < KS_GENERATE_PROMPT_ROWS)
      prompt_rows = ks_min_i64(prompt_rows + g->requests[i].n_prompt, KS_GENERATE_PROMPT_ROWS);
    if (adapter >= 0 && g->adapters[adapter].max_rank > p.max_rank)
      p.max_rank = g->adapters[adapter].max_rank;
  }
  p.max_rows = prompt_rows + g->max_batch;
  return ks_run_create(g->model, &p, &g->run);
}

static ks_status allocate(generator *g, int64_t cache_bytes) {
  const ks_model_config *m = &g->model->config;
  size_t batch = (size_t)g->max_batch, bytes;
  void *p = NULL;
  KS_TRY(size_cache(g, cache_bytes));
  KS_TRY(create_run(g));
  size_t rows = (size_t)g->run->params.max_rows;
  if (!ks_mul_size((size_t)(m->n_layers * m->n_kv_heads * m->head_dim) * ks_ctx_act_size(g->model->ctx),
                   (size_t)g->cache.n_rows, &bytes))
    return KS_FAIL(KS_EOVERFLOW, "generate: KV cache of %lld rows does not fit an address space",
                   (long long)g->cache.n_rows);
  KS_TRY_AS(ks_mem_alloc(g->model->ctx, bytes, &p), "KV cache");
  g->cache.k = p;
  KS_TRY_AS(ks_mem_alloc(g->model->ctx, bytes, &p), "KV cache");
  g->cache.v = p;
  KS_TRY_AS(ks_mem_alloc(g->model->ctx, batch * (size_t)m->vocab_size * sizeof(float), &p), "logits");
  g->logits = p;
  KS_TRY(ks_alloc_array(&g->active, batch, sizeof *g->active, "generation"));
  KS_TRY(ks_alloc_array(&g->tokens, rows, sizeof *g->tokens, "generation"));
  KS_TRY(ks_alloc_array(&g->cache_rows, rows, sizeof *g->cache_rows, "generation"));
  KS_TRY(ks_alloc_array(&g->ends, batch, sizeof *g->ends, "generation"));
  KS_TRY(ks_alloc_array(&g->ending, batch, sizeof(sequence *), "generation"));
  KS_TRY(ks_alloc_array(&g->pass_pages, batch, sizeof *g->pass_pages, "generation"));
  KS_TRY(ks_alloc_array(&g->samplers, batch, sizeof *g->samplers, "generation"));
  KS_TRY(ks_alloc_array(&g->sampled, batch * (size_t)g->ahead, sizeof *g->sampled, "generation"));
  KS_TRY_AS(ks_mem_alloc(g->model->ctx, batch * sizeof *g->drawn, &p), "drawn tokens");
  g->drawn = p;
  return ks_run_reserve_loras(g->run, g->n_adapters);
}

static void release(generator *g) {
  for (int64_t i = 0; i < g->n_active; i++)
    free(g->active[i].pages);
  free(g->pass_pages);
  free(g->free_pages);
  free(g->sampled);
  free(g->samplers);
  free(g->ending);
  free(g->ends);
  free(g->cache_rows);
  free(g->tokens);
  free(g->active);
  ks_mem_free(g->model->ctx, g->drawn);
  ks_mem_free(g->model->ctx, g->logits);
  ks_mem_free(g->model->ctx, g->cache.v);
  ks_mem_free(g->model->ctx, g->cache.k);
  ks_run_destroy(g->run);
}

/* ---------------------------------------------------------------- admitting */

static void insert_active(generator *g, sequence s) {
  int64_t i = g->n_active++;
  for (; i > 0 && g->active[i - 1].request->adapter > s.request->adapter; i--)
    g->active[i] = g->active[i - 1];
  g->active[i] = s;
}

/* Requests in their order, as long as there are places and cache. */
static ks_status admit(generator *g) {
  while (g->next < g->n_requests && g->n_active < g->max_batch) {
    ks_request *r = &g->requests[g->next];
    sequence s = {.request = r, .limit = new_token_limit(g->model, r), .n_pages = pages_of(g->model, r)};
    if (s.limit > 0 && s.n_pages > g->n_free) return KS_OK;
    KS_TRY(ks_alloc_array(&r->tokens, (size_t)s.limit, sizeof *r->tokens, "generated tokens"));
    g->next++;
    if (s.limit == 0) {
      g->n_finished++;
      continue;
    }
    KS_TRY(ks_alloc_array(&s.pages, (size_t)s.n_pages, sizeof *s.pages, "pages of the cache"));
    for (int64_t i = 0; i < s.n_pages; i++)
      s.pages[i] = g->free_pages[--g->n_free];
    insert_active(g, s);
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- one pass */

static int64_t n_pending(const generator *g, const sequence *s) {
  return s->request->n_prompt + s->request->n_tokens + g->flying - s->n_cached;
}

static bool decodes(const generator *g, const sequence *s) {
  return s->request->n_tokens + g->flying > 0;
}

/* Gives each sequence its rows of this pass; those that decode come first. Returns the prompts' rows. */
static int64_t share_rows(generator *g) {
  int64_t room = g->run->params.max_rows, n_prompt_rows = 0;
  for (int64_t i = 0; i < g->n_active; i++) {
    sequence *s = &g->active[i];
    s->n_rows = decodes(g, s) ? 1 : 0;
    room -= s->n_rows;
  }
  for (int64_t i = 0; i < g->n_active; i++) {
    sequence *s = &g->active[i];
    if (decodes(g, s)) continue;
    s->n_rows = ks_min_i64(n_pending(g, s), room);
    room -= s->n_rows;
    n_prompt_rows += s->n_rows;
  }
  return n_prompt_rows;
}

static void add_to_segment(ks_run *run, ks_pass *pass, const sequence *s, int64_t row) {
  if (s->request->adapter < 0) return;
  ks_segment *last = pass->all.n_segments > 0 ? &run->segments[pass->all.n_segments - 1] : NULL;
  if (last && last->adapter == s->request->adapter)
    last->n_rows += s->n_rows;
  else
    run->segments[pass->all.n_segments++] =
        (ks_segment){.row_begin = row, .n_rows = s->n_rows, .adapter = s->request->adapter};
}

static void describe_pass(generator *g, ks_pass *pass, int64_t *n_ends) {
  ks_run *run = g->run;
  int64_t row = 0, n_seqs = 0;
  *pass = (ks_pass){.tokens = g->tokens,
                    .drawn = g->flying > 0 ? g->drawn : NULL,
                    .pages = g->pass_pages,
                    .adapters = g->adapters,
                    .n_adapters = g->n_adapters,
                    .cache = &g->cache,
                    .cache_rows = g->cache_rows};
  pass->all = (ks_row_set){.positions = run->positions, .seqs = run->seqs, .segments = run->segments};
  *n_ends = 0;
  for (int64_t i = 0; i < g->n_active; i++) {
    sequence *s = &g->active[i];
    const ks_request *r = s->request;
    if (s->n_rows == 0) continue;
    add_to_segment(run, pass, s, row);
    if (s->n_rows == n_pending(g, s)) {
      g->ends[*n_ends] = n_seqs;
      g->ending[(*n_ends)++] = s;
    }
    run->seqs[n_seqs] = (ks_attention_seq){.q_begin = row, .n_q = s->n_rows, .n_k = s->n_cached + s->n_rows};
    g->pass_pages[n_seqs] = s->pages;
    run->tails[n_seqs++] = 1;
    for (int64_t p = s->n_cached; p < s->n_cached + s->n_rows; p++, row++) {
      if (!pass->drawn) g->tokens[row] = p < r->n_prompt ? r->prompt[p] : r->tokens[p - r->n_prompt];
      run->positions[row] = (int32_t)p;
      g->cache_rows[row] =
          s->pages[p / KS_ATTENTION_PAGE_UNIT] * KS_ATTENTION_PAGE_UNIT + p % KS_ATTENTION_PAGE_UNIT;
    }
    s->n_cached += s->n_rows;
  }
  pass->n_seqs = n_seqs;
  pass->all.n_rows = row;
  ks_run_cut(run, run->tails, pass);
}

/* Logits of the sequences whose next token is due: the last rows, which are the out rows' norms. */
static ks_status compute_logits(generator *g, const ks_pass *pass, void *h, int64_t n_ends) {
  ks_run *run = g->run;
  const ks_model *m = g->model;
  void *x = run->xn;
  if (n_ends < pass->out.n_rows) {
    x = h == run->h_out ? run->xt : run->h_out;
    KS_TRY(ks_rows_gather(m->ctx, &(ks_rows_args){.x = h,
                                                  .y = x,
                                                  .index = g->ends,
                                                  .n_rows = n_ends,
                                                  .n_x_rows = pass->out.n_rows,
                                                  .n_cols = m->config.hidden_size}));
    h = x;
  }
  const ks_rmsnorm_args norm = {.x = h,
                                .w = m->final_norm,
                                .y = x,
                                .n_rows = n_ends,
                                .n_cols = m->config.hidden_size,
                                .eps = m->config.rms_eps};
  const ks_linear_args head = {
      .w = m->head, .x = x, .y = g->logits, .y_is_f32 = true, .generation = true, .n_rows = n_ends};
  return ks_linears_forward(m->ctx, &(ks_linears_args){.parts = &head, .n_parts = 1, .norm = &norm});
}

static ks_status sample(generator *g, int64_t n_ends) {
  for (int64_t i = 0; i < n_ends; i++) {
    const ks_request *r = g->ending[i]->request;
    g->samplers[i] = r->sampler;
    g->samplers[i].counter += (uint64_t)(r->n_tokens + g->flying);
  }
  KS_TRY(ks_sample(g->model->ctx, &(ks_sample_args){.logits = g->logits,
                                                    .n_rows = n_ends,
                                                    .n_vocab = g->model->config.vocab_size,
                                                    .samplers = g->samplers,
                                                    .tokens = g->sampled + g->flying * g->max_batch,
                                                    .drawn = g->drawn}));
  return KS_OK;
}

static bool is_stop(const ks_request *r, int32_t token) {
  for (int64_t i = 0; i < r->n_stop; i++) {
    if (r->stop_ids[i] == token) return true;
  }
  return false;
}

static void give_back_pages(generator *g, sequence *s) {
  for (int64_t i = s->n_pages; i > 0; i--)
    g->free_pages[g->n_free++] = s->pages[i - 1];
  free(s->pages);
}

static ks_status bad_logits(const generator *g, const ks_request *r) {
  return KS_FAIL(
      KS_ENUMERIC,
      "generate: the logits of request %lld at new token %lld hold a NaN or have no finite maximum; the "
      "model's weights or its adapter are damaged or training diverged",
      (long long)(r - g->requests), (long long)r->n_tokens);
}

/* The tokens of `n_passes` passes, of which the i-th ended sequence i of `ending`: until it stops. */
static ks_status take_tokens(generator *g, int64_t n_passes, int64_t n_ends) {
  for (int64_t i = 0; i < n_ends; i++) {
    sequence *s = g->ending[i];
    ks_request *r = s->request;
    for (int64_t j = 0; j < n_passes && s->request; j++) {
      const int32_t token = g->sampled[j * g->max_batch + i];
      if (token < 0) return bad_logits(g, r);
      g->stats.new_tokens++;
      r->stopped = is_stop(r, token);
      if (!r->stopped) r->tokens[r->n_tokens++] = token;
      if (r->stopped || r->n_tokens == s->limit) s->request = NULL;
    }
  }
  return KS_OK;
}

/* Drops the sequences that ended. */
static void drop_ended(generator *g) {
  int64_t kept = 0;
  for (int64_t i = 0; i < g->n_active; i++) {
    if (g->active[i].request)
      g->active[kept++] = g->active[i];
    else
      give_back_pages(g, &g->active[i]);
  }
  g->n_finished += g->n_active - kept;
  g->n_active = kept;
}

/* One pass from tokens to tokens, queued. *sampling: when the layers had been queued (CPU: done). */
static ks_status queue_pass(generator *g, const ks_pass *pass, int64_t n_ends, double *sampling) {
  void *h = NULL;
  KS_TRY(ks_pass_forward(g->run, pass, &h));
  if (n_ends > 0) KS_TRY(compute_logits(g, pass, h, n_ends));
  *sampling = ks_clock_seconds();
  return n_ends > 0 ? sample(g, n_ends) : KS_OK;
}

/* Passes of the same key queue the same work: as many rows of the same adapters, and of prompts the same stretches. Keys of a
 * sequence that decodes are longer each time, which attention notices seldom (it counts them in blocks). */
static uint64_t pass_key(const generator *g, const ks_pass *pass, int64_t n_ends) {
  uint64_t key = 0x67656e6572617465; /* "generate" */
  key = ks_hash_mix(key, (uint64_t)pass->all.n_rows);
  key = ks_hash_mix(key, (uint64_t)n_ends);
  key = ks_hash_mix(key, g->flying > 0);
  for (int64_t i = 0; i < g->n_active; i++) {
    const sequence *s = &g->active[i];
    key = ks_hash_mix(key, (uint64_t)s->request->adapter);
    if (decodes(g, s)) continue;
    key = ks_hash_mix(key, (uint64_t)s->n_rows);
    key = ks_hash_mix(key, (uint64_t)s->n_cached);
  }
  return key;
}

/* How many passes may fly: one, unless every sequence draws a token in the first. None passes its limit. */
static int64_t flight_of(const generator *g, int64_t n_ends) {
  int64_t n = n_ends == g->n_active ? g->ahead : 1;
  for (int64_t i = 0; i < g->n_active && n > 1; i++)
    n = ks_min_i64(n, g->active[i].limit - g->active[i].request->n_tokens);
  return n;
}

static ks_status run_pass(generator *g, const ks_pass *pass, int64_t n_ends, double *sampling_seconds) {
  ks_ctx *ctx = g->model->ctx;
  double sampling = 0;
  KS_TRY(ks_step_begin(ctx, pass_key(g, pass, n_ends)));
  ks_status status = queue_pass(g, pass, n_ends, &sampling);
  *sampling_seconds += ks_clock_seconds() - sampling;
  ks_status ended = ks_step_end(ctx);
  return status != KS_OK ? status : ended;
}

static ks_status fly(generator *g) {
  ks_pass pass;
  int64_t n_ends = 0, n_prompt_rows = 0, n_rows = 0, n_passes = 1;
  double start = ks_clock_seconds(), sampling = 0;
  for (g->flying = 0; g->flying < n_passes; g->flying++) {
    n_prompt_rows += share_rows(g);
    describe_pass(g, &pass, &n_ends);
    if (g->flying == 0) n_passes = flight_of(g, n_ends);
    KS_TRY(run_pass(g, &pass, n_ends, &sampling));
    n_rows += pass.all.n_rows;
  }
  g->flying = 0;
  KS_TRY(ks_sync(g->model->ctx));
  double layers = ks_clock_seconds() - start - sampling, share = (double)n_prompt_rows / (double)n_rows;
  g->stats.prompt_tokens += n_prompt_rows;
  g->stats.prefill_seconds += layers * share;
  g->stats.decode_seconds += layers * (1 - share);
  g->stats.sample_seconds += sampling;
  KS_TRY(take_tokens(g, n_passes, n_ends));
  drop_ended(g);
  return KS_OK;
}

static ks_status report(generator *g, bool always) {
  double now = ks_clock_seconds();
  if (!always && now - g->reported < REPORT_SECONDS) return KS_OK;
  g->reported = now;
  return ks_progress_report(g->progress, "generate", (double)g->n_finished, (double)g->n_requests);
}

static ks_status run_all(generator *g) {
  KS_TRY(report(g, true));
  for (;;) {
    KS_TRY(admit(g));
    if (g->n_active == 0) break;
    KS_TRY(fly(g));
    KS_TRY(report(g, false));
  }
  return report(g, true);
}

static void add_stats(ks_generate_stats *to, const ks_generate_stats *s) {
  to->prompt_tokens += s->prompt_tokens;
  to->new_tokens += s->new_tokens;
  to->prefill_seconds += s->prefill_seconds;
  to->decode_seconds += s->decode_seconds;
  to->sample_seconds += s->sample_seconds;
}

/* The CPU computes while it queues: nothing is gained there, and passes in vain cost. */
static int64_t default_ahead(const ks_ctx *ctx) {
  return strcmp(ks_ctx_backend_name(ctx), "cpu") == 0 ? 1 : DEVICE_AHEAD;
}

ks_status ks_generate(ks_model *model, ks_request *requests, int64_t n_requests,
                      const ks_adapter_view *adapters, int64_t n_adapters, const ks_generate_params *params,
                      const ks_progress *progress, ks_generate_stats *stats) {
  ks_generate_params p = params ? *params : KS_GENERATE_DEFAULT;
  if (!model || n_requests < 0 || (n_requests > 0 && !requests) || n_adapters < 0 ||
      (n_adapters > 0 && !adapters))
    return KS_FAIL(KS_EINVAL, "ks_generate: NULL argument");
  if (p.max_batch < 0 || p.cache_bytes < 0 || p.ahead < 0 || p.ahead > MAX_AHEAD)
    return KS_FAIL(
        KS_EINVAL,
        "ks_generate: max_batch %lld, cache_bytes %lld, ahead %lld; give 0 or more, ahead up to %d",
        (long long)p.max_batch, (long long)p.cache_bytes, (long long)p.ahead, MAX_AHEAD);
  generator g = {.model = model,
                 .requests = requests,
                 .n_requests = n_requests,
                 .adapters = adapters,
                 .n_adapters = n_adapters,
                 .progress = progress,
                 .max_batch = ks_min_i64(p.max_batch > 0 ? p.max_batch : KS_GENERATE_BATCH, n_requests),
                 .ahead = p.ahead > 0 ? p.ahead : default_ahead(model->ctx)};
  for (int64_t i = 0; i < n_requests; i++) {
    requests[i].tokens = NULL;
    requests[i].n_tokens = 0;
    requests[i].stopped = false;
  }
  for (int64_t i = 0; i < n_requests; i++)
    KS_TRY(check_request(&g, i));
  if (n_requests == 0) return KS_OK;
  ks_status status = allocate(&g, p.cache_bytes);
  if (status == KS_OK) status = run_all(&g);
  if (status != KS_OK)
    (void)ks_sync(model->ctx); /* tokens still on their way need their places until they are there */
  release(&g);
  if (stats) add_stats(stats, &g.stats);
  for (int64_t i = 0; status != KS_OK && i < n_requests; i++) {
    free(requests[i].tokens);
    requests[i].tokens = NULL;
    requests[i].n_tokens = 0;
    requests[i].stopped = false;
  }
  return status;
}
