/* Whether the passes of a run fit the device's memory: asked before the first one. */
#include "experiments/sim.h"

#include <math.h>

/* What a backend takes beside arenas and caches: workspaces of products, attention and adapters, staged
 * arrays, recorded steps. An allowance: they grow with the rows of a pass, and are at most a few percent of
 * its arena. */
static size_t allowance(size_t arena) {
  return ((size_t)256 << 20) + arena / 16;
}

/* Rows of the largest training pass that these cells can ask for. */
static int64_t train_rows(const ks_world *w, int64_t n_trials) {
  const ks_config *c = w->config;
  int64_t bound = c->run.max_rows > 0 ? c->run.max_rows : ks_run_default_rows(w->model, true), all;
  if (!ks_mul_i64(n_trials * c->train.batch_size, c->train.max_tokens, &all)) all = bound;
  return ks_max_i64(c->train.max_tokens, ks_min_i64(bound, all));
}

/* What is left for an arena when its allowance is taken off too. */
static size_t arena_within(size_t available) {
  const size_t fixed = allowance(0);
  return available > fixed ? (available - fixed) / 17 * 16 : 0;
}

/* Bytes of the largest generation: its cache (what is needed, within its bound), logits and activations. */
static size_t generate_bytes(const ks_world *w, int64_t n_trials) {
  const ks_model_config *m = &w->model->config;
  const ks_generate_params p = ks_world_generate_params(w);
  const int64_t at_a_time =
      ks_min_i64(p.max_batch > 0 ? p.max_batch : KS_GENERATE_BATCH, n_trials * w->data->n_eval);
  const double page = 2.0 * (double)ks_ctx_act_size(w->ctx) * (double)m->n_layers *
                      (double)(m->n_kv_heads * m->head_dim) * KS_ATTENTION_PAGE_UNIT;
  const double pages = (double)at_a_time * (double)(m->max_seq_len / KS_ATTENTION_PAGE_UNIT + 1);
  const double bound = p.cache_bytes > 0 ? (double)p.cache_bytes : (double)KS_GENERATE_CACHE_MB * (1 << 20);
  const double largest = (double)(m->max_seq_len / KS_ATTENTION_PAGE_UNIT + 1); /* one request always fits */
  const double cache = page * fmax(largest, fmin(pages, floor(bound / page)));
  const ks_run_params run = {.max_rows = KS_GENERATE_PROMPT_ROWS + at_a_time,
                             .max_seqs = at_a_time + 1,
                             .max_rank = (int32_t)w->config->lora.rank,
                             .no_loss = true};
  size_t arena;
  if (ks_run_bytes(w->model, &run, &arena) != KS_OK) return SIZE_MAX;
  return (size_t)cache + (size_t)(at_a_time * m->vocab_size) * sizeof(float) + arena + allowance(arena);
}

ks_status ks_world_check_memory(const ks_world *w, int64_t n_trials) {
  const size_t available = ks_mem_available(w->ctx);
  if (available == SIZE_MAX || n_trials == 0) return KS_OK;
  const int64_t n_rows = train_rows(w, n_trials);
  const ks_run_params run = {.max_rows = n_rows,
                             .max_seqs = n_rows,
                             .max_rank = (int32_t)w->config->lora.rank,
                             .backward = true,
                             .recompute_layers = w->config->run.recompute_layers};
  size_t train;
  KS_TRY(ks_run_bytes(w->model, &run, &train));
  const size_t generate = generate_bytes(w, n_trials);
  const char *smaller =
      w->config->model.dtype <= KS_DTYPE_BF16 ? ", or model.dtype to q8_0, q4_0 or nf4" : "";
  if (train > arena_within(available))
    return KS_FAIL(
        KS_ENOMEM,
        "a training pass of %lld tokens needs %.2f GB; the device has %.2f GB left beside model, embeddings "
        "and the "
        "adapters of %lld cells (%.2f GB): at most %lld tokens fit; set run.max_rows to that or less%s%s",
        (long long)n_rows, ((double)train + (double)allowance(train)) / 1e9, (double)available / 1e9,
        (long long)n_trials, (double)ks_mem_used(w->ctx) / 1e9,
        (long long)ks_run_rows_that_fit(w->model, &run, arena_within(available)),
        run.recompute_layers < w->model->config.n_layers ? ", or run.recompute_layers higher" : "", smaller);
  if (generate > available)
    return KS_FAIL(
        KS_ENOMEM,
        "generating answers needs %.2f GB; the device has %.2f GB left beside model, embeddings and adapters "
        "(%.2f GB); set run.cache_mb or run.generate_batch lower%s",
        (double)generate / 1e9, (double)available / 1e9, (double)ks_mem_used(w->ctx) / 1e9, smaller);
  return KS_OK;
}
