/* Whether the passes of a run fit the device's memory: asked before the first one. */
#include "experiments/sim.h"

/* Rows of the largest training pass that these cells can ask for. */
static int64_t train_rows(const ks_world *w, int64_t n_trials) {
  const ks_config *c = w->config;
  int64_t bound = c->run.max_rows > 0 ? c->run.max_rows : ks_run_default_rows(w->model, true), all;
  if (!ks_mul_i64(n_trials * c->train.batch_size, c->train.max_tokens, &all)) all = bound;
  return ks_max_i64(c->train.max_tokens, ks_min_i64(bound, all));
}

static ks_run_params train_run(const ks_world *w, int64_t n_rows) {
  return (ks_run_params){
      .max_rows = n_rows, .max_seqs = n_rows, .max_rank = (int32_t)w->config->lora.rank, .backward = true};
}

/* The most rows of a training pass that fit, from 0 on. */
static int64_t rows_that_fit(const ks_world *w, int64_t n_rows, size_t available) {
  int64_t fit = 0, too_many = n_rows;
  while (too_many - fit > 1) {
    int64_t middle = fit + (too_many - fit) / 2;
    ks_run_params p = train_run(w, middle);
    size_t bytes;
    if (ks_run_bytes(w->model, &p, &bytes) == KS_OK && bytes <= available)
      fit = middle;
    else
      too_many = middle;
  }
  return fit;
}

ks_status ks_world_check_memory(const ks_world *w, int64_t n_trials) {
  const size_t available = ks_mem_available(w->ctx);
  if (available == SIZE_MAX || n_trials == 0) return KS_OK;
  const int64_t n_rows = train_rows(w, n_trials);
  const ks_run_params p = train_run(w, n_rows);
  size_t train, cache = (size_t)ks_world_generate_params(w).cache_bytes;
  KS_TRY(ks_run_bytes(w->model, &p, &train));
  if (train > available)
    return KS_FAIL(
        KS_ENOMEM,
        "a training pass of %lld tokens needs %.2f GB; the device has %.2f GB left beside model, embeddings "
        "and "
        "the adapters of %lld cells (%.2f GB): at most %lld tokens fit; set run.max_rows to that or less%s",
        (long long)n_rows, (double)train / 1e9, (double)available / 1e9, (long long)n_trials,
        (double)ks_mem_used(w->ctx) / 1e9, (long long)rows_that_fit(w, n_rows, available),
        w->config->model.dtype <= KS_DTYPE_BF16 ? ", or model.dtype to q8_0, q4_0 or nf4" : "");
  if (cache > available)
    return KS_FAIL(KS_ENOMEM,
                   "a key-value cache of %.2f GB does not fit the %.2f GB that the device has left; set "
                   "run.cache_mb lower",
                   (double)cache / 1e9, (double)available / 1e9);
  return KS_OK;
}
