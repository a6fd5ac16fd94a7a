/* The operations of a model for `keepsake bench ops`: their arrays and calls. Those on embeddings:
 * bench_op_embed.c. */
#include "experiments/bench_op.h"

#include <math.h>

static ks_status act_in(ks_bench_op *o, int64_t n, void *p) {
  return ks_bench_array_act(o, KS_ARRAY_INPUT, n, -1, 1, p);
}
static ks_status act_out(ks_bench_op *o, int64_t n, void *p) {
  return ks_bench_array_act(o, KS_ARRAY_OUTPUT, n, 0, 0, p);
}
static ks_status f32(ks_bench_op *o, ks_array_role role, int64_t n, double low, double high, void *p) {
  return ks_bench_array_of(
      o, (ks_bench_array){.n = n, .type = KS_ARRAY_F32, .role = role, .low = low, .high = high}, p);
}
static ks_status host_out(ks_bench_op *o, ks_array_type type, int64_t n, void *p) {
  return ks_bench_array_of(
      o, (ks_bench_array){.n = n, .type = type, .role = KS_ARRAY_OUTPUT, .is_host = true}, p);
}

/* ---------------------------------------------------------------- embedding: rows, n_out (vocabulary), cols
 */

static ks_status make_tokens(ks_bench_op *o, int64_t n, int64_t n_vocab, const int32_t **out) {
  int32_t *tokens;
  KS_TRY(ks_bench_block(o, (size_t)n, sizeof *tokens, &tokens));
  for (int64_t i = 0; i < n; i++)
    tokens[i] = (int32_t)(i * 7919 % n_vocab);
  *out = tokens;
  return KS_OK;
}

ks_status ks_bench_make_embed_forward(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  KS_TRY(ks_bench_weight(o, d->n_out, d->cols));
  o->a.embed = (ks_embed_args){.w = o->w, .n_rows = d->rows};
  KS_TRY(make_tokens(o, d->rows, d->n_out, &o->a.embed.tokens));
  return act_out(o, d->rows * d->cols, &o->a.embed.y);
}

ks_status ks_bench_run_embed_forward(ks_bench_op *o) {
  return ks_embed_forward(o->ctx, &o->a.embed);
}

/* ---------------------------------------------------------------- linear: rows, n_out, cols, n_adapters,
 * rank */

/* Adapters split the rows evenly. */
static ks_status make_adapters(ks_bench_op *o, bool backward) {
  const ks_bench_dims *d = &o->d;
  ks_linear_args *a = &o->a.linear;
  ks_segment *segments;
  ks_lora *loras;
  const int64_t rank = d->rank, spread = d->n_adapters;
  KS_TRY(ks_bench_block(o, (size_t)d->n_adapters, sizeof *segments, &segments));
  KS_TRY(ks_bench_block(o, (size_t)d->n_adapters, sizeof *loras, &loras));
  float *as, *bs, *grad_as = NULL, *grad_bs = NULL;
  const double span = sqrt(3.0 / (double)d->cols);
  KS_TRY(f32(o, KS_ARRAY_INPUT, spread * rank * d->cols, -span, span, &as));
  KS_TRY(f32(o, KS_ARRAY_INPUT, spread * rank * d->n_out, -span, span, &bs));
  KS_TRY(ks_bench_array_act(o, KS_ARRAY_SCRATCH, d->rows * rank, 0, 0, &a->u));
  if (backward) {
    KS_TRY(f32(o, KS_ARRAY_STATE, spread * rank * d->cols, 0, 0, &grad_as));
    KS_TRY(f32(o, KS_ARRAY_STATE, spread * rank * d->n_out, 0, 0, &grad_bs));
    KS_TRY(ks_bench_array_act(o, KS_ARRAY_SCRATCH, d->rows * rank, 0, 0, &a->v));
  }
  for (int64_t i = 0; i < d->n_adapters; i++) {
    const int64_t begin = i * d->rows / d->n_adapters, end = (i + 1) * d->rows / d->n_adapters;
    segments[i] = (ks_segment){begin, end - begin, (int32_t)i, 77u + (uint64_t)i};
    loras[i] = (ks_lora){.rank = d->rank,
                         .scale = 2,
                         .a = as + i * rank * d->cols,
                         .b_t = bs + i * rank * d->n_out,
                         .grad_a = backward ? grad_as + i * rank * d->cols : NULL,
                         .grad_b_t = backward ? grad_bs + i * rank * d->n_out : NULL};
  }
  a->segments = segments;
  a->n_segments = a->n_loras = d->n_adapters;
  a->loras = loras;
  a->u_stride = rank;
  a->dropout = 0.05F;
  a->dropout_site = 3;
  o->n_roundings++; /* u */
  return KS_OK;
}

static ks_status make_linear(ks_bench_op *o, bool backward) {
  const ks_bench_dims *d = &o->d;
  ks_linear_args *a = &o->a.linear;
  KS_TRY(ks_bench_weight(o, d->n_out, d->cols));
  *a = (ks_linear_args){.w = o->w, .n_rows = d->rows, .generation = d->rows < 16 && !backward};
  o->n_roundings = ks_dtype_is_quantized(o->weight_dtype); /* unpacked into activations */
  KS_TRY(act_in(o, d->rows * d->cols, &a->x));
  if (d->n_adapters > 0) KS_TRY(make_adapters(o, backward));
  o->chain = (double)(ks_max_i64(d->cols, d->n_out) + d->rank);
  if (!backward) return act_out(o, d->rows * d->n_out, &a->y);
  o->n_roundings += d->n_adapters > 0; /* v */
  o->chain = (double)ks_max_i64(d->n_out + d->rank, d->rows);
  KS_TRY(act_in(o, d->rows * d->n_out, &a->dy));
  KS_TRY(act_out(o, d->rows * d->cols, &a->dx));
  if (d->n_adapters == 0) return KS_OK;
  /* u is what the forward pass left; its output is nobody's business here. */
  void *y;
  KS_TRY(ks_bench_array_act(o, KS_ARRAY_SCRATCH, d->rows * d->n_out, 0, 0, &y));
  ks_linear_args forward = *a;
  forward.y = y;
  return ks_linear_forward(o->ctx, &forward);
}

ks_status ks_bench_make_linear_forward(ks_bench_op *o) {
  return make_linear(o, false);
}
ks_status ks_bench_make_linear_backward(ks_bench_op *o) {
  return make_linear(o, true);
}
ks_status ks_bench_run_linear_forward(ks_bench_op *o) {
  return ks_linear_forward(o->ctx, &o->a.linear);
}
ks_status ks_bench_run_linear_backward(ks_bench_op *o) {
  return ks_linear_backward(o->ctx, &o->a.linear);
}

/* ---------------------------------------------------------------- norm: rows, cols */

ks_status ks_bench_make_rmsnorm_forward(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  float *w;
  o->a.norm = (ks_rmsnorm_args){.n_rows = d->rows, .n_cols = d->cols, .eps = 1e-5F};
  o->chain = (double)d->cols;
  KS_TRY(act_in(o, d->rows * d->cols, &o->a.norm.x));
  KS_TRY(f32(o, KS_ARRAY_INPUT, d->cols, 0.5, 1.5, &w));
  o->a.norm.w = w;
  KS_TRY(f32(o, KS_ARRAY_OUTPUT, d->rows, 0, 0, &o->a.norm.rstd));
  return act_out(o, d->rows * d->cols, &o->a.norm.y);
}

ks_status ks_bench_make_rmsnorm_backward(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  KS_TRY(ks_bench_make_rmsnorm_forward(o));
  KS_TRY(act_in(o, d->rows * d->cols, &o->a.norm.dy));
  KS_TRY(act_out(o, d->rows * d->cols, &o->a.norm.dx));
  KS_TRY(ks_rmsnorm_forward(o->ctx, &o->a.norm));
  o->arrays[2].role = KS_ARRAY_INPUT; /* rstd, y: of the forward pass */
  o->arrays[3].role = KS_ARRAY_INPUT;
  return KS_OK;
}

ks_status ks_bench_run_rmsnorm_forward(ks_bench_op *o) {
  return ks_rmsnorm_forward(o->ctx, &o->a.norm);
}
ks_status ks_bench_run_rmsnorm_backward(ks_bench_op *o) {
  return ks_rmsnorm_backward(o->ctx, &o->a.norm);
}

/* ---------------------------------------------------------------- rotary: rows, n_heads, head_dim */

ks_status ks_bench_make_rope(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  int32_t *positions;
  double *inv_freq;
  KS_TRY(ks_bench_block(o, (size_t)d->rows, sizeof *positions, &positions));
  KS_TRY(ks_bench_block(o, (size_t)d->head_dim / 2, sizeof *inv_freq, &inv_freq));
  for (int64_t i = 0; i < d->rows; i++)
    positions[i] = (int32_t)(i % 1024);
  for (int64_t j = 0; j < d->head_dim / 2; j++)
    inv_freq[j] = pow(1e4, -2.0 * (double)j / (double)d->head_dim);
  o->a.rope = (ks_rope_args){.positions = positions,
                             .inv_freq = inv_freq,
                             .n_rows = d->rows,
                             .n_heads = d->n_heads,
                             .head_dim = d->head_dim};
  return ks_bench_array_act(o, KS_ARRAY_STATE, d->rows * d->n_heads * d->head_dim, -1, 1, &o->a.rope.x);
}

ks_status ks_bench_run_rope(ks_bench_op *o) {
  return ks_rope(o->ctx, &o->a.rope);
}

/* ---------------------------------------------------------------- SwiGLU: rows, cols */

ks_status ks_bench_make_swiglu_forward(ks_bench_op *o) {
  const int64_t n = o->d.rows * o->d.cols;
  o->a.swiglu.n = n;
  KS_TRY(act_in(o, n, &o->a.swiglu.gate));
  KS_TRY(act_in(o, n, &o->a.swiglu.up));
  return act_out(o, n, &o->a.swiglu.h);
}

ks_status ks_bench_make_swiglu_backward(ks_bench_op *o) {
  const int64_t n = o->d.rows * o->d.cols;
  o->a.swiglu.n = n;
  KS_TRY(act_in(o, n, &o->a.swiglu.gate));
  KS_TRY(act_in(o, n, &o->a.swiglu.up));
  KS_TRY(act_in(o, n, &o->a.swiglu.dh));
  KS_TRY(act_out(o, n, &o->a.swiglu.dgate));
  return act_out(o, n, &o->a.swiglu.dup);
}

ks_status ks_bench_run_swiglu_forward(ks_bench_op *o) {
  return ks_swiglu_forward(o->ctx, &o->a.swiglu);
}
ks_status ks_bench_run_swiglu_backward(ks_bench_op *o) {
  return ks_swiglu_backward(o->ctx, &o->a.swiglu);
}

/* ---------------------------------------------------------------- rows: rows, cols; a permutation of the
 * rows */

static ks_status make_rows(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  int64_t *index;
  KS_TRY(ks_bench_block(o, (size_t)d->rows, sizeof *index, &index));
  for (int64_t i = 0; i < d->rows; i++)
    index[i] = d->rows - 1 - i;
  o->a.rows = (ks_rows_args){.index = index, .n_rows = d->rows, .n_x_rows = d->rows, .n_cols = d->cols};
  KS_TRY(act_in(o, d->rows * d->cols, &o->a.rows.x));
  return act_out(o, d->rows * d->cols, &o->a.rows.y);
}

ks_status ks_bench_make_rows_gather(ks_bench_op *o) {
  return make_rows(o);
}
ks_status ks_bench_make_rows_scatter(ks_bench_op *o) {
  return make_rows(o);
}
ks_status ks_bench_run_rows_gather(ks_bench_op *o) {
  return ks_rows_gather(o->ctx, &o->a.rows);
}
ks_status ks_bench_run_rows_scatter(ks_bench_op *o) {
  return ks_rows_scatter(o->ctx, &o->a.rows);
}

/* ---------------------------------------------------------------- attention: rows / n_queries sequences,
 * n_keys each */

static ks_status make_attention(ks_bench_op *o, bool backward) {
  const ks_bench_dims *d = &o->d;
  const int64_t n_seqs = d->rows / d->n_queries, width = d->n_heads * d->head_dim,
                kv_width = d->n_kv_heads * d->head_dim;
  ks_attention_seq *seqs;
  void *k, *v, *dk = NULL, *dv = NULL;
  KS_TRY(ks_bench_block(o, (size_t)n_seqs, sizeof *seqs, &seqs));
  o->a.attention = (ks_attention_args){.seqs = seqs,
                                       .n_seqs = n_seqs,
                                       .n_rows = d->rows,
                                       .n_heads = d->n_heads,
                                       .n_kv_heads = d->n_kv_heads,
                                       .head_dim = d->head_dim,
                                       .kv_stride = kv_width,
                                       .scale = (float)(1 / sqrt((double)d->head_dim))};
  o->chain = (double)ks_max_i64(d->n_keys, d->head_dim);
  o->n_roundings = 1; /* the probabilities */
  KS_TRY(act_in(o, d->rows * width, &o->a.attention.q));
  KS_TRY(act_in(o, n_seqs * d->n_keys * kv_width, &k));
  KS_TRY(act_in(o, n_seqs * d->n_keys * kv_width, &v));
  KS_TRY(act_out(o, d->rows * width, &o->a.attention.o));
  KS_TRY(f32(o, KS_ARRAY_OUTPUT, d->rows * d->n_heads, 0, 0, &o->a.attention.lse));
  if (backward) {
    KS_TRY(act_in(o, d->rows * width, &o->a.attention.d_o));
    KS_TRY(act_out(o, d->rows * width, &o->a.attention.dq));
    KS_TRY(act_out(o, n_seqs * d->n_keys * kv_width, &dk));
    KS_TRY(act_out(o, n_seqs * d->n_keys * kv_width, &dv));
  }
  for (int64_t i = 0; i < n_seqs; i++) {
    const int64_t at = i * d->n_keys * kv_width;
    seqs[i] = (ks_attention_seq){.q_begin = i * d->n_queries,
                                 .n_q = d->n_queries,
                                 .n_k = d->n_keys,
                                 .k = ks_act_at(o->ctx, k, at),
                                 .v = ks_act_at(o->ctx, v, at),
                                 .dk = ks_act_at(o->ctx, dk, at),
                                 .dv = ks_act_at(o->ctx, dv, at)};
  }
  return KS_OK;
}

ks_status ks_bench_make_attention_forward(ks_bench_op *o) {
  return make_attention(o, false);
}

ks_status ks_bench_make_attention_backward(ks_bench_op *o) {
  KS_TRY(make_attention(o, true));
  o->n_roundings = 4; /* the output, which enters D; the probabilities; their gradients; twice in dk's sum */
  KS_TRY(ks_attention_forward(o->ctx, &o->a.attention));
  o->arrays[3].role = KS_ARRAY_INPUT; /* o, lse: of the forward pass */
  o->arrays[4].role = KS_ARRAY_INPUT;
  return KS_OK;
}

ks_status ks_bench_run_attention_forward(ks_bench_op *o) {
  return ks_attention_forward(o->ctx, &o->a.attention);
}
ks_status ks_bench_run_attention_backward(ks_bench_op *o) {
  return ks_attention_backward(o->ctx, &o->a.attention);
}

/* ---------------------------------------------------------------- head: rows, n_out (vocabulary), cols */

ks_status ks_bench_make_head_loss(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  KS_TRY(ks_bench_weight(o, d->n_out, d->cols));
  o->a.head = (ks_head_loss_args){.w = o->w, .n_rows = d->rows};
  o->chain = (double)ks_max_i64(d->n_out, d->cols);
  o->n_roundings =
      1 + 2 * ks_dtype_is_quantized(o->weight_dtype); /* softmax - onehot; the unpacked weight, twice */
  KS_TRY(act_in(o, d->rows * d->cols, &o->a.head.x));
  KS_TRY(make_tokens(o, d->rows, d->n_out, &o->a.head.targets));
  KS_TRY(host_out(o, KS_ARRAY_F32, d->rows, &o->a.head.loss));
  if (d->kind == 0) KS_TRY(act_out(o, d->rows * d->cols, &o->a.head.dx));
  const size_t bytes = ks_head_loss_workspace(o->ctx, o->w, d->rows);
  return f32(o, KS_ARRAY_SCRATCH, (int64_t)(bytes + 3) / 4, 0, 0, &o->a.head.workspace);
}

ks_status ks_bench_run_head_loss(ks_bench_op *o) {
  return ks_head_loss(o->ctx, &o->a.head);
}

/* ---------------------------------------------------------------- sampling: rows, n_out (vocabulary), kind
 */

ks_status ks_bench_make_sample(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  ks_sampler *samplers;
  float *logits;
  KS_TRY(ks_bench_block(o, (size_t)d->rows, sizeof *samplers, &samplers));
  for (int64_t i = 0; i < d->rows; i++)
    samplers[i] = d->kind == 0
                      ? (ks_sampler){.top_p = 1}
                      : (ks_sampler){.temperature = 0.8F, .top_p = 0.9F, .key = 5, .counter = (uint64_t)i};
  KS_TRY(f32(o, KS_ARRAY_INPUT, d->rows * d->n_out, -8, 8, &logits));
  o->a.sample =
      (ks_sample_args){.logits = logits, .n_rows = d->rows, .n_vocab = d->n_out, .samplers = samplers};
  o->may_differ = d->kind != 0; /* a draw may fall where two exponentials round differently */
  return host_out(o, KS_ARRAY_I32, d->rows, &o->a.sample.tokens);
}

ks_status ks_bench_run_sample(ks_bench_op *o) {
  return ks_sample(o->ctx, &o->a.sample);
}

/* ---------------------------------------------------------------- AdamW: cols parameters of each of
 * n_adapters */

/* Rates so near 1 that moments without new gradients (the gradient is 0 after the first step) stay what they
 * are. */
ks_status ks_bench_make_adamw(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  ks_adamw_job *jobs;
  KS_TRY(ks_bench_block(o, (size_t)d->n_adapters, sizeof *jobs, &jobs));
  o->a.adamw = (ks_adamw_args){.jobs = jobs, .n_jobs = d->n_adapters};
  o->chain = 16;
  const int64_t n = d->cols, all = n * d->n_adapters;
  float *p, *m, *v, *grad;
  KS_TRY(f32(o, KS_ARRAY_STATE, all, -1, 1, &p));
  KS_TRY(f32(o, KS_ARRAY_STATE, all, 0, 0, &m));
  KS_TRY(f32(o, KS_ARRAY_STATE, all, 0, 0, &v));
  KS_TRY(f32(o, KS_ARRAY_CONSUMED, all, 0.5, 1, &grad));
  for (int64_t i = 0; i < d->n_adapters; i++)
    jobs[i] = (ks_adamw_job){.p = p + i * n,
                             .m = m + i * n,
                             .v = v + i * n,
                             .grad = grad + i * n,
                             .n = n,
                             .lr = 1e-5,
                             .beta1 = 1 - 0x1p-20,
                             .beta2 = 1 - 0x1p-20,
                             .eps = 1e-8,
                             .weight_decay = 0.01,
                             .max_grad_norm = 1,
                             .step = 1};
  return host_out(o, KS_ARRAY_F64, d->n_adapters, &o->a.adamw.norm);
}

ks_status ks_bench_run_adamw(ks_bench_op *o) {
  return ks_adamw(o->ctx, &o->a.adamw);
}
