/* Embeddings of texts by the frozen model. */
#include "core/model/run.h"

/* Texts [first, first + n_seqs) packed one after another. */
typedef struct {
  int32_t *tokens;  /* [capacity rows] */
  int64_t *offsets; /* [n texts + 1] */
  int64_t *tails;   /* [n texts] */
} packer;

static int64_t cut_length(const ks_tokens *text, const ks_embed_params *p) {
  return ks_min_i64(text->n_tokens, p->max_tokens);
}

/* Packs as many texts from `first` on as fit; at least one. */
static ks_batch pack(packer *k, const ks_tokens *texts, int64_t first, int64_t n, const ks_embed_params *p,
                     int64_t max_rows) {
  ks_batch b = {.tokens = k->tokens, .seq_offsets = k->offsets};
  for (int64_t i = first; i < n; i++) {
    int64_t length = cut_length(&texts[i], p);
    if (length > max_rows - b.n_rows) break;
    memcpy(k->tokens + b.n_rows, texts[i].tokens, (size_t)length * sizeof *k->tokens);
    k->tails[b.n_seqs] = p->pooling == KS_POOL_LAST ? 1 : length;
    b.n_rows += length;
    k->offsets[++b.n_seqs] = b.n_rows;
  }
  return b;
}

static ks_status check_texts(const ks_model *model, const ks_tokens *texts, int64_t n,
                             const ks_embed_params *p) {
  if (p->max_tokens < 1 || p->batch_rows < 0)
    return KS_FAIL(KS_EINVAL, "ks_embed_texts: max_tokens %lld, batch_rows %lld; give at least 1 and 0",
                   (long long)p->max_tokens, (long long)p->batch_rows);
  if (p->max_tokens > model->config.max_seq_len)
    return KS_FAIL(KS_EINVAL, "ks_embed_texts: max_tokens is %lld; the model's context is %lld",
                   (long long)p->max_tokens, (long long)model->config.max_seq_len);
  for (int64_t i = 0; i < n; i++) {
    if (texts[i].n_tokens < 1 || !texts[i].tokens)
      return KS_FAIL(KS_EINVAL, "ks_embed_texts: text %lld has no tokens", (long long)i);
  }
  return KS_OK;
}

/* The rows and sequences that the largest batch needs. */
static void measure(const ks_model *model, const ks_tokens *texts, int64_t n, const ks_embed_params *p,
                    ks_run_params *run) {
  int64_t bound = p->batch_rows > 0 ? p->batch_rows : ks_run_default_rows(model, false), total = 0,
          longest = 1;
  for (int64_t i = 0; i < n; i++) {
    int64_t length = cut_length(&texts[i], p);
    longest = ks_max_i64(longest, length);
    if (total < bound) total += length;
  }
  run->max_rows = ks_max_i64(longest, ks_min_i64(total, bound));
  run->max_seqs = ks_min_i64(n, run->max_rows);
}

static ks_status embed_all(ks_run *run, packer *k, const ks_tokens *texts, int64_t n,
                           const ks_embed_params *p, const ks_progress *progress, float *out) {
  int64_t n_cols = run->model->config.hidden_size;
  for (int64_t first = 0; first < n;) {
    const void *hidden = NULL;
    KS_TRY(ks_progress_report(progress, "embed", (double)first, (double)n));
    ks_batch b = pack(k, texts, first, n, p, run->params.max_rows);
    KS_TRY_AS(ks_forward_tails(run, &b, k->tails, &hidden), "texts %lld to %lld", (long long)first,
              (long long)(first + b.n_seqs - 1));
    for (int64_t s = 0; s < b.n_seqs; s++)
      k->offsets[s + 1] = k->offsets[s] + k->tails[s];
    KS_TRY(ks_pool(run->model->ctx, &(ks_pool_args){.x = hidden,
                                                    .seq_offsets = k->offsets,
                                                    .y = out + first * n_cols,
                                                    .n_seqs = b.n_seqs,
                                                    .n_rows = k->offsets[b.n_seqs],
                                                    .n_cols = n_cols,
                                                    .pooling = p->pooling}));
    first += b.n_seqs;
  }
  return ks_progress_report(progress, "embed", (double)n, (double)n);
}

ks_status ks_embed_texts(ks_model *model, const ks_tokens *texts, int64_t n, const ks_embed_params *params,
                         const ks_progress *progress, float *out) {
  if (!model || !params || n < 0 || (n > 0 && (!texts || !out)))
    return KS_FAIL(KS_EINVAL, "ks_embed_texts: NULL argument or n = %lld", (long long)n);
  KS_TRY(check_texts(model, texts, n, params));
  if (n == 0) return KS_OK;
  ks_status status = KS_OK;
  ks_run *run = NULL;
  packer k = {0};
  ks_run_params p = {.no_loss = true};
  measure(model, texts, n, params, &p);
  KS_TRY_OUT(ks_run_create(model, &p, &run));
  KS_TRY_OUT(ks_alloc_array(&k.tokens, (size_t)p.max_rows, sizeof *k.tokens, "tokens of a batch"));
  KS_TRY_OUT(ks_alloc_array(&k.offsets, (size_t)p.max_seqs + 1, sizeof *k.offsets, "sequences of a batch"));
  KS_TRY_OUT(ks_alloc_array(&k.tails, (size_t)p.max_seqs, sizeof *k.tails, "sequences of a batch"));
  KS_TRY_OUT(embed_all(run, &k, texts, n, params, progress, out));
out:
  free(k.tails);
  free(k.offsets);
  free(k.tokens);
  ks_run_destroy(run);
  return status;
}
