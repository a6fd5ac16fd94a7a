#include "experiments/bench_step.h"

#include <math.h>

static ks_adamw_job job_of(const ks_bench_step *s, int64_t i) {
  const ks_adapter *a = s->adapters[i];
  int64_t n = a->n_params;
  if (s->p.is_frozen) n /= a->n_layers; /* the lowest layer's */
  return (ks_adamw_job){.p = a->weights,
                        .m = a->m,
                        .v = a->v,
                        .grad = a->grads,
                        .n = n,
                        .lr = 1e-3,
                        .beta1 = 0.9,
                        .beta2 = 0.999,
                        .eps = 1e-8,
                        .weight_decay = 0.01,
                        .max_grad_norm = 1,
                        .step = s->n_steps};
}

static ks_status queue(ks_bench_step *s) {
  ks_run *run = s->p.run ? s->p.run : s->own_run;
  KS_TRY(ks_forward_backward(run, &s->batch, s->rows, s->targets, s->scale, s->n_targets, s->loss));
  s->n_steps++;
  for (int64_t i = 0; i < s->p.n_adapters; i++)
    s->jobs[i] = job_of(s, i);
  return ks_adamw(s->p.model->ctx,
                  &(ks_adamw_args){.jobs = s->jobs, .n_jobs = s->p.n_adapters, .norm = s->norms});
}

ks_status ks_bench_step_once(void *step) {
  ks_bench_step *s = step;
  ks_ctx *ctx = s->p.model->ctx;
  KS_TRY(ks_step_begin(ctx, s->p.key));
  ks_status status = queue(s), ended = ks_step_end(ctx);
  KS_TRY(status != KS_OK ? status : ended);
  KS_TRY(ks_sync(ctx));
  s->mean_loss = 0;
  for (int64_t i = 0; i < s->n_targets; i++)
    s->mean_loss += (double)s->loss[i] / (double)s->n_targets;
  s->least_norm = INFINITY;
  for (int64_t i = 0; i < s->p.n_adapters; i++)
    s->least_norm = fmin(s->least_norm, s->norms[i]);
  if (s->n_steps == 1) {
    s->first_loss = s->mean_loss;
    s->first_norm = s->least_norm;
  }
  return KS_OK;
}

bool ks_bench_step_learns(const ks_bench_step *s) {
  const double limit = s->p.is_frozen ? 1.001 * s->first_loss : s->first_loss;
  return s->first_norm > 0 && s->least_norm > 0 && isfinite(s->least_norm) && s->mean_loss < limit;
}

/* ---------------------------------------------------------------- making */

static ks_status allocate(ks_bench_step *s) {
  const size_t n_rows = (size_t)(s->p.n_seqs * s->p.seq_len), n = (size_t)s->p.n_adapters;
  const size_t n_loras = (size_t)s->p.model->config.n_layers * KS_N_TARGETS;
  KS_TRY(ks_alloc_array(&s->tokens, n_rows, sizeof *s->tokens, "bench"));
  KS_TRY(ks_alloc_array(&s->targets, n_rows, sizeof *s->targets, "bench"));
  KS_TRY(ks_alloc_array(&s->rows, n_rows, sizeof *s->rows, "bench"));
  KS_TRY(ks_alloc_array(&s->scale, n_rows, sizeof *s->scale, "bench"));
  KS_TRY(ks_alloc_array(&s->loss, n_rows, sizeof *s->loss, "bench"));
  KS_TRY(ks_alloc_array(&s->offsets, (size_t)s->p.n_seqs + 1, sizeof *s->offsets, "bench"));
  KS_TRY(ks_alloc_array(&s->adapters, n, sizeof(ks_adapter *), "bench"));
  KS_TRY(ks_alloc_array(&s->views, n, sizeof *s->views, "bench"));
  KS_TRY(ks_alloc_array(&s->segments, n, sizeof *s->segments, "bench"));
  KS_TRY(ks_alloc_array(&s->jobs, n, sizeof *s->jobs, "bench"));
  KS_TRY(ks_alloc_array(&s->norms, n, sizeof *s->norms, "bench"));
  return ks_alloc_array(&s->lowest, n_loras, sizeof *s->lowest, "bench");
}

static void draw_texts(ks_bench_step *s) {
  const int64_t n_rows = s->p.n_seqs * s->p.seq_len, seq_len = s->p.seq_len;
  ks_rng rng = ks_rng_make(1, KS_RNG_TEST, 0);
  for (int64_t i = 0; i < n_rows; i++)
    s->tokens[i] = (int32_t)ks_rng_below(&rng, (uint64_t)s->p.model->config.vocab_size);
  for (int64_t i = 0; i <= s->p.n_seqs; i++)
    s->offsets[i] = i * seq_len;
  for (int64_t i = 0; i < n_rows; i++) {
    if ((i + 1) % seq_len == 0) continue; /* nothing follows the last token */
    s->rows[s->n_targets] = i;
    s->targets[s->n_targets] = s->tokens[i + 1];
    s->scale[s->n_targets++] = 1.0F / (float)((seq_len - 1) * (s->p.n_seqs / s->p.n_adapters));
  }
}

static ks_status make_adapters(ks_bench_step *s) {
  const ks_bench_step_params *p = &s->p;
  const int64_t rows_each = p->n_seqs / p->n_adapters * p->seq_len;
  const ks_adapter_params params = {
      .rank = p->rank, .alpha = 16, .targets = p->is_frozen ? 1u << KS_TARGET_q : p->targets};
  for (int64_t i = 0; i < p->n_adapters; i++) {
    KS_TRY(ks_adapter_create(p->model->ctx, &p->model->config, &params, (uint64_t)i, &s->adapters[i]));
    s->views[i] = ks_adapter_view_of(s->adapters[i]);
    s->segments[i] = (ks_segment){.row_begin = i * rows_each, .n_rows = rows_each, .adapter = (int32_t)i};
  }
  if (!p->is_frozen) return KS_OK;
  s->lowest[KS_TARGET_q] = s->views[0].loras[KS_TARGET_q];
  s->views[0].loras = s->lowest;
  return KS_OK;
}

ks_status ks_bench_step_create(const ks_bench_step_params *params, ks_bench_step *s) {
  *s = (ks_bench_step){.p = *params};
  if (s->p.is_frozen) s->p.n_adapters = 1;
  if (s->p.n_seqs % s->p.n_adapters != 0)
    return KS_FAIL(KS_EINTERNAL, "bench: %lld adapters do not share %lld sequences evenly",
                   (long long)s->p.n_adapters, (long long)s->p.n_seqs);
  KS_TRY(allocate(s));
  draw_texts(s);
  KS_TRY(make_adapters(s));
  const int64_t n_rows = s->p.n_seqs * s->p.seq_len;
  s->batch = (ks_batch){.tokens = s->tokens,
                        .n_rows = n_rows,
                        .seq_offsets = s->offsets,
                        .n_seqs = s->p.n_seqs,
                        .segments = s->segments,
                        .n_segments = s->p.n_adapters,
                        .adapters = s->views,
                        .n_adapters = s->p.n_adapters};
  if (s->p.run) return KS_OK;
  const ks_run_params run = {.max_rows = n_rows,
                             .max_seqs = s->p.n_seqs,
                             .max_rank = s->p.rank,
                             .backward = true,
                             .recompute_layers = s->p.recompute_layers};
  return ks_run_create(s->p.model, &run, &s->own_run);
}

void ks_bench_step_destroy(ks_bench_step *s) {
  ks_run_destroy(s->own_run);
  for (int64_t i = 0; s->adapters && i < s->p.n_adapters; i++)
    ks_adapter_destroy(s->adapters[i]);
  void *arrays[] = {s->tokens,   s->targets, s->rows,     s->scale, s->loss,  s->offsets,
                    s->adapters, s->views,   s->segments, s->jobs,  s->norms, s->lowest};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
    free(arrays[i]);
}
