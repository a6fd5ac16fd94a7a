#include "core/adapt/packing.h"

ks_status ks_packing_create(ks_packing *p, int64_t max_rows, int64_t max_seqs) {
  size_t rows = (size_t)max_rows, seqs = (size_t)max_seqs;
  *p = (ks_packing){.max_rows = max_rows, .max_seqs = max_seqs};
  KS_TRY(ks_alloc_array(&p->tokens, rows, sizeof *p->tokens, "batch"));
  KS_TRY(ks_alloc_array(&p->offsets, seqs + 1, sizeof *p->offsets, "batch"));
  KS_TRY(ks_alloc_array(&p->segments, seqs, sizeof *p->segments, "batch"));
  KS_TRY(ks_alloc_array(&p->views, seqs, sizeof *p->views, "batch"));
  KS_TRY(ks_alloc_array(&p->rows, rows, sizeof *p->rows, "batch"));
  KS_TRY(ks_alloc_array(&p->targets, rows, sizeof *p->targets, "batch"));
  KS_TRY(ks_alloc_array(&p->scale, rows, sizeof *p->scale, "batch"));
  KS_TRY(ks_alloc_array(&p->loss, rows, sizeof *p->loss, "batch"));
  ks_packing_clear(p);
  return KS_OK;
}

void ks_packing_destroy(ks_packing *p) {
  free(p->loss);
  free(p->scale);
  free(p->targets);
  free(p->rows);
  free(p->views);
  free(p->segments);
  free(p->offsets);
  free(p->tokens);
}

void ks_packing_clear(ks_packing *p) {
  p->batch = (ks_batch){
      .tokens = p->tokens, .seq_offsets = p->offsets, .segments = p->segments, .adapters = p->views};
  p->n_targets = 0;
}

void ks_packing_begin_segment(ks_packing *p, const ks_adapter_view *view, uint64_t dropout_key) {
  ks_batch *b = &p->batch;
  int32_t adapter = -1;
  if (view) {
    adapter = (int32_t)b->n_adapters;
    p->views[b->n_adapters++] = *view;
  }
  p->segments[b->n_segments++] =
      (ks_segment){.row_begin = b->n_rows, .adapter = adapter, .dropout_key = dropout_key};
}

void ks_packing_add(ks_packing *p, const ks_example *e, float scale) {
  ks_batch *b = &p->batch;
  int64_t n = ks_example_n_rows(e);
  if (n == 0) return;
  memcpy(p->tokens + b->n_rows, e->tokens, (size_t)n * sizeof *p->tokens);
  for (int64_t i = e->loss_begin; i < e->n_tokens; i++) {
    p->rows[p->n_targets] = b->n_rows + i - 1;
    p->targets[p->n_targets] = e->tokens[i];
    p->scale[p->n_targets++] = scale;
  }
  b->n_rows += n;
  p->offsets[++b->n_seqs] = b->n_rows;
  p->segments[b->n_segments - 1].n_rows += n;
}

ks_status ks_example_check(const ks_model *model, const ks_example *e, int64_t index) {
  const ks_model_config *m = &model->config;
  if (e->n_tokens < 1 || !e->tokens || e->loss_begin < 1)
    return KS_FAIL(KS_EINVAL, "example %lld has %lld tokens and loss_begin %lld; give at least 1 of each",
                   (long long)index, (long long)e->n_tokens, (long long)e->loss_begin);
  if (ks_example_n_rows(e) > m->max_seq_len)
    return KS_FAIL(KS_EINVAL, "example %lld has %lld tokens; the model's context is %lld: cut it",
                   (long long)index, (long long)e->n_tokens, (long long)m->max_seq_len);
  for (int64_t i = 0; i < e->n_tokens; i++) {
    if (e->tokens[i] < 0 || e->tokens[i] >= m->vocab_size)
      return KS_FAIL(KS_EINVAL, "example %lld has token %d at %lld; the model has %lld tokens",
                     (long long)index, e->tokens[i], (long long)i, (long long)m->vocab_size);
  }
  return KS_OK;
}
