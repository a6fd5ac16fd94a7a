/* Layers upwards, and what is read off the last one. */
#include "core/model/run.h"

/* ---------------------------------------------------------------- one layer */

typedef struct {
  ks_run *run;
  const ks_pass *pass;
  const ks_model_config *m;
  const ks_model_layer *weights;
  ks_layer_acts acts;
  int64_t layer;
  const ks_row_set *rows; /* of the query side and the MLP */
  bool cut;               /* those rows are not all */
  void *h_next;           /* where the layer's result goes */
} layer_state;

static ks_linear_args linear_args(layer_state *s, ks_target t, const ks_row_set *rows, const void *x, void *y,
                                  const void *residual) {
  ks_linear_args a;
  ks_run_linear_args(s->run, s->pass, (ks_site){s->layer, t, rows}, &a);
  a.x = x;
  a.y = y;
  a.residual = residual;
  a.u = s->acts.u[t];
  return a;
}

static ks_status linear(layer_state *s, ks_target t, const ks_row_set *rows, const void *x, void *y,
                        const void *residual) {
  const ks_linear_args a = linear_args(s, t, rows, x, y, residual);
  return ks_linear_forward(s->run->model->ctx, &a);
}

static ks_rmsnorm_args norm_args(const layer_state *s, const void *x, const float *w, float *rstd,
                                 int64_t n_rows) {
  return (ks_rmsnorm_args){.x = x,
                           .w = w,
                           .y = s->run->xn,
                           .rstd = rstd,
                           .n_rows = n_rows,
                           .n_cols = s->m->hidden_size,
                           .eps = s->m->rms_eps};
}

static ks_status gather_out_rows(const layer_state *s, const void *x, void *y) {
  return ks_rows_gather(s->run->model->ctx, &(ks_rows_args){.x = x,
                                                            .y = y,
                                                            .index = s->pass->out_index,
                                                            .n_rows = s->pass->out.n_rows,
                                                            .n_x_rows = s->pass->all.n_rows,
                                                            .n_cols = s->m->hidden_size});
}

/* Rotary, and into the cache where the pass has one. */
typedef struct {
  ks_rope_args rope[2]; /* of queries and keys */
  ks_rows_args store[2];
  ks_rope_store_args both; /* keys alone where queries have other rows */
} rotation;

static void describe_rotation(const ks_run *run, const ks_pass *pass, int64_t layer,
                              const ks_layer_acts *acts, rotation *r) {
  const ks_model_config *m = &run->model->config;
  const ks_kv_cache *cache = pass->cache;
  const ks_row_set *rows = pass->cut && layer == m->n_layers - 1 ? &pass->out : &pass->all;
  const ks_row_set *sides[2] = {rows, &pass->all};
  void *const x[2] = {acts->q, acts->k};
  const int64_t n_heads[2] = {m->n_heads, m->n_kv_heads};
  for (int i = 0; i < 2; i++)
    r->rope[i] = (ks_rope_args){.x = x[i],
                                .positions = sides[i]->positions,
                                .inv_freq = run->model->inv_freq,
                                .n_rows = sides[i]->n_rows,
                                .n_heads = n_heads[i],
                                .head_dim = m->head_dim};
  const bool alike = sides[0] == sides[1];
  r->both = (ks_rope_store_args){.rope = r->rope + !alike, .n_rope = 1 + alike};
  if (!cache) return;
  const int64_t kv = m->n_kv_heads * m->head_dim, begin = layer * cache->n_rows * kv;
  const void *from[2] = {acts->k, acts->v};
  void *const to[2] = {cache->k, cache->v};
  for (int i = 0; i < 2; i++)
    r->store[i] = (ks_rows_args){.x = from[i],
                                 .y = ks_act_at(run->model->ctx, to[i], begin),
                                 .index = pass->cache_rows,
                                 .n_rows = pass->all.n_rows,
                                 .n_x_rows = cache->n_rows,
                                 .n_cols = kv};
  r->both.store = r->store;
  r->both.n_store = 2;
}

ks_status ks_run_qk(ks_run *run, const ks_pass *pass, int64_t layer, const ks_layer_acts *acts) {
  const ks_model_config *m = &run->model->config;
  const ks_model_layer *w = &run->model->layers[layer];
  rotation r;
  describe_rotation(run, pass, layer, acts, &r);
  const struct {
    const void *pre;
    const float *w;
    float *rstd;
  } sides[2] = {{acts->q_pre, w->q_norm, acts->rstd_q}, {acts->k_pre, w->k_norm, acts->rstd_k}};
  for (int i = 0; i < 2 && m->qk_norm; i++)
    KS_TRY(
        ks_rmsnorm_forward(run->model->ctx, &(ks_rmsnorm_args){.x = sides[i].pre,
                                                               .w = sides[i].w,
                                                               .y = r.rope[i].x,
                                                               .rstd = sides[i].rstd,
                                                               .n_rows = r.rope[i].n_rows * r.rope[i].n_heads,
                                                               .n_cols = m->head_dim,
                                                               .eps = m->rms_eps}));
  if (r.both.n_rope == 1) KS_TRY(ks_rope(run->model->ctx, &r.rope[0]));
  return ks_rope_store(run->model->ctx, &r.both);
}

/* Queries, keys and values, rotated and stored. */
static ks_status project_qkv(layer_state *s) {
  ks_run *run = s->run;
  ks_layer_acts *acts = &s->acts;
  const ks_row_set *all = &s->pass->all;
  const ks_rmsnorm_args norm = norm_args(s, acts->h_in, s->weights->attn_norm, acts->rstd_attn, all->n_rows);
  ks_linear_args parts[3];
  int64_t n = 0;
  if (!s->cut) parts[n++] = linear_args(s, KS_TARGET_q, all, run->xn, acts->q_pre, NULL);
  parts[n++] = linear_args(s, KS_TARGET_k, all, run->xn, acts->k_pre, NULL);
  parts[n++] = linear_args(s, KS_TARGET_v, all, run->xn, acts->v, NULL);
  if (s->cut) {
    KS_TRY(ks_rmsnorm_forward(run->model->ctx, &norm));
    KS_TRY(gather_out_rows(s, run->xn, run->xt));
    KS_TRY(linear(s, KS_TARGET_q, s->rows, run->xt, acts->q_pre, NULL));
    KS_TRY(ks_linears_forward(run->model->ctx, &(ks_linears_args){.parts = parts, .n_parts = n}));
    return ks_run_qk(run, s->pass, s->layer, acts);
  }
  ks_linears_args qkv = {.parts = parts, .n_parts = n, .norm = &norm};
  rotation r;
  describe_rotation(run, s->pass, s->layer, acts, &r);
  if (!s->m->qk_norm) qkv.rope = &r.both;
  KS_TRY(ks_linears_forward(run->model->ctx, &qkv));
  return s->m->qk_norm ? ks_run_qk(run, s->pass, s->layer, acts) : KS_OK;
}

static ks_status attention(layer_state *s) {
  ks_run *run = s->run;
  ks_layer_acts *acts = &s->acts;
  KS_TRY(project_qkv(s));
  ks_attention_args a = ks_run_attention_args(run, s->pass, s->layer, acts);
  KS_TRY(ks_attention_forward(run->model->ctx, &a));
  if (s->cut) KS_TRY(gather_out_rows(s, acts->h_in, acts->h_mid));
  const void *residual = s->cut ? acts->h_mid : acts->h_in;
  return linear(s, KS_TARGET_o, s->rows, acts->attn, acts->h_mid, residual);
}

/* gate and up, and their SwiGLU into h; h NULL: those alone. */
static ks_status gate_and_up(layer_state *s, void *h) {
  ks_run *run = s->run;
  ks_layer_acts *acts = &s->acts;
  const ks_rmsnorm_args norm =
      norm_args(s, acts->h_mid, s->weights->mlp_norm, acts->rstd_mlp, s->rows->n_rows);
  const ks_linear_args parts[2] = {linear_args(s, KS_TARGET_gate, s->rows, run->xn, acts->gate, NULL),
                                   linear_args(s, KS_TARGET_up, s->rows, run->xn, acts->up, NULL)};
  const ks_swiglu_args swiglu = {
      .gate = acts->gate, .up = acts->up, .h = h, .n = s->rows->n_rows * s->m->intermediate_size};
  return ks_linears_forward(
      run->model->ctx,
      &(ks_linears_args){.parts = parts, .n_parts = 2, .norm = &norm, .swiglu = h ? &swiglu : NULL});
}

static ks_status mlp(layer_state *s) {
  void *h = s->run->params.backward ? s->run->ff : s->acts.gate;
  KS_TRY(gate_and_up(s, h));
  return linear(s, KS_TARGET_down, s->rows, h, s->h_next, s->acts.h_mid);
}

static layer_state layer_of(ks_run *run, const ks_pass *pass, int64_t layer) {
  const ks_model_config *m = &run->model->config;
  const bool last = layer == m->n_layers - 1, cut = last && pass->cut;
  layer_state s = {.run = run,
                   .pass = pass,
                   .m = m,
                   .weights = &run->model->layers[layer],
                   .acts = ks_run_acts(run, layer),
                   .layer = layer,
                   .rows = cut ? &pass->out : &pass->all,
                   .cut = cut};
  s.h_next = last ? run->h_out : ks_run_acts(run, layer + 1).h_in;
  if (cut && !run->params.backward) s.acts.h_mid = s.h_next = run->xt;
  return s;
}

ks_status ks_pass_recompute(ks_run *run, const ks_pass *pass, int64_t layer) {
  if (layer >= run->params.recompute_layers || layer == run->model->config.n_layers - 1)
    return KS_OK; /* the last layer's are still there */
  layer_state s = layer_of(run, pass, layer);
  KS_TRY(attention(&s));
  return gate_and_up(&s, NULL);
}

ks_status ks_pass_forward(ks_run *run, const ks_pass *pass, void **h) {
  KS_TRY(ks_embed_forward(run->model->ctx, &(ks_embed_args){.w = run->model->embedding,
                                                            .tokens = pass->tokens,
                                                            .drawn = pass->drawn,
                                                            .y = ks_run_acts(run, 0).h_in,
                                                            .n_rows = pass->all.n_rows}));
  *h = run->h_out;
  for (int64_t layer = 0; layer < run->model->config.n_layers; layer++) {
    layer_state s = layer_of(run, pass, layer);
    KS_TRY(attention(&s));
    KS_TRY(mlp(&s));
    *h = s.h_next;
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- reading off */

static ks_status final_norm(ks_run *run, const void *h, void *y, float *rstd, int64_t n_rows) {
  return ks_rmsnorm_forward(run->model->ctx, &(ks_rmsnorm_args){.x = h,
                                                                .w = run->model->final_norm,
                                                                .y = y,
                                                                .rstd = rstd,
                                                                .n_rows = n_rows,
                                                                .n_cols = run->model->config.hidden_size,
                                                                .eps = run->model->config.rms_eps});
}

ks_status ks_forward(ks_run *run, const ks_batch *batch, const void **hidden) {
  return ks_forward_tails(run, batch, NULL, hidden);
}

ks_status ks_forward_tails(ks_run *run, const ks_batch *batch, const int64_t *tails, const void **hidden) {
  ks_pass pass;
  void *h = NULL;
  if (!hidden) return KS_FAIL(KS_EINVAL, "ks_forward: hidden is NULL");
  KS_TRY(ks_run_begin(run, batch, tails, &pass));
  KS_TRY(ks_pass_forward(run, &pass, &h));
  KS_TRY(final_norm(run, h, run->xn, NULL, pass.out.n_rows));
  *hidden = run->xn;
  return KS_OK;
}

/* How many last rows of each sequence the targets need (at least 1), and where target i lies among those
 * rows. */
static ks_status place_targets(ks_run *run, const ks_batch *batch, const ks_loss_spec *spec) {
  int64_t i = 0, begin = 0;
  for (int64_t s = 0; s < batch->n_seqs; s++) {
    int64_t end = batch->seq_offsets[s + 1], first = i;
    while (i < spec->n_targets && spec->rows[i] < end) {
      if (spec->rows[i] < (i > 0 ? spec->rows[i - 1] + 1 : 0))
        return KS_FAIL(KS_EINVAL, "loss: target rows must rise; row %lld comes after row %lld",
                       (long long)spec->rows[i], i > 0 ? (long long)spec->rows[i - 1] : -1);
      i++;
    }
    run->tails[s] = i > first ? end - spec->rows[first] : 1;
    begin += run->tails[s];
    for (int64_t j = first; j < i; j++)
      run->target_index[j] = begin - (end - spec->rows[j]);
  }
  if (i < spec->n_targets)
    return KS_FAIL(KS_EINVAL, "loss: target row %lld of %lld", (long long)spec->rows[i],
                   (long long)batch->n_rows);
  return KS_OK;
}

/* Loss of the target rows and, for a backward pass, the gradient of the out rows' residual stream. */
static ks_status head(ks_run *run, const ks_pass *pass, const void *h, const ks_loss_spec *spec,
                      float *loss) {
  ks_ctx *ctx = run->model->ctx;
  int64_t n = spec->n_targets, n_cols = run->model->config.hidden_size;
  bool all = n == pass->out.n_rows, backward = spec->scale != NULL;
  const void *x = h;
  if (!all) { /* forward only: h may be xt, which dxn's place is not */
    void *picked = backward ? run->xt : run->xn;
    KS_TRY(ks_rows_gather(ctx, &(ks_rows_args){.x = h,
                                               .y = picked,
                                               .index = run->target_index,
                                               .n_rows = n,
                                               .n_x_rows = pass->out.n_rows,
                                               .n_cols = n_cols}));
    x = picked;
  }
  KS_TRY(final_norm(run, x, run->xn, backward ? run->rstd : NULL, n));
  KS_TRY(ks_head_loss(ctx, &(ks_head_loss_args){.w = run->model->head,
                                                .x = run->xn,
                                                .targets = spec->targets,
                                                .row_scale = spec->scale,
                                                .loss = loss,
                                                .dx = backward ? run->dxn : NULL,
                                                .n_rows = n,
                                                .workspace = run->head_workspace}));
  if (!backward) return KS_OK;
  void *dh = pass->cut ? run->dcut : run->dres;
  KS_TRY(ks_rmsnorm_backward(ctx, &(ks_rmsnorm_args){.x = x,
                                                     .w = run->model->final_norm,
                                                     .rstd = run->rstd,
                                                     .dy = run->dxn,
                                                     .dx = all ? dh : run->dxn,
                                                     .n_rows = n,
                                                     .n_cols = n_cols}));
  if (all) return KS_OK;
  KS_TRY(ks_mem_zero(ctx, dh, (size_t)pass->out.n_rows * (size_t)n_cols * ks_ctx_act_size(ctx)));
  return ks_rows_scatter(ctx, &(ks_rows_args){.x = run->dxn,
                                              .y = dh,
                                              .index = run->target_index,
                                              .n_rows = n,
                                              .n_x_rows = pass->out.n_rows,
                                              .n_cols = n_cols});
}

ks_status ks_forward_head(ks_run *run, const ks_batch *batch, const ks_loss_spec *spec, float *loss,
                          ks_pass *pass) {
  void *h = NULL;
  if (!run || !batch) return KS_FAIL(KS_EINVAL, "loss: run or batch is NULL");
  if (run->params.no_loss) return KS_FAIL(KS_EINVAL, "loss: this run was made with no_loss");
  if (spec->n_targets < 0 || (spec->n_targets > 0 && (!spec->rows || !spec->targets || !loss)))
    return KS_FAIL(KS_EINVAL, "loss: %lld targets at a NULL pointer", (long long)spec->n_targets);
  KS_TRY(ks_run_begin(run, batch, NULL, pass));
  KS_TRY(place_targets(run, batch, spec));
  if (spec->n_targets == 0) return KS_OK;
  ks_run_cut(run, run->tails, pass);
  KS_TRY(ks_pass_forward(run, pass, &h));
  return head(run, pass, h, spec, loss);
}

ks_status ks_forward_loss(ks_run *run, const ks_batch *batch, const int64_t *rows, const int32_t *targets,
                          int64_t n_targets, float *loss) {
  ks_pass pass;
  ks_loss_spec spec = {.rows = rows, .targets = targets, .n_targets = n_targets};
  return ks_forward_head(run, batch, &spec, loss, &pass);
}

ks_status ks_forward_logits(ks_run *run, const ks_batch *batch, float *host_logits) {
  enum { BLOCK = 64 };
  const void *hidden = NULL;
  if (!run || !batch || (batch->n_rows > 0 && !host_logits))
    return KS_FAIL(KS_EINVAL, "ks_forward_logits: NULL argument");
  KS_TRY(ks_forward(run, batch, &hidden));
  ks_ctx *ctx = run->model->ctx;
  int64_t n_vocab = run->model->config.vocab_size, n_cols = run->model->config.hidden_size;
  ks_status status = KS_OK;
  void *block = NULL;
  size_t bytes;
  if (!ks_mul_size((size_t)n_vocab, BLOCK * sizeof(float), &bytes))
    return KS_FAIL(KS_EOVERFLOW, "ks_forward_logits: vocabulary of %lld", (long long)n_vocab);
  KS_TRY(ks_mem_alloc(ctx, bytes, &block));
  for (int64_t i = 0; i < batch->n_rows && status == KS_OK; i += BLOCK) {
    int64_t n = ks_min_i64(BLOCK, batch->n_rows - i);
    status = ks_linear_forward(ctx, &(ks_linear_args){.w = run->model->head,
                                                      .x = ks_act_at(ctx, hidden, i * n_cols),
                                                      .y = block,
                                                      .y_is_f32 = true,
                                                      .n_rows = n});
    if (status == KS_OK)
      status = ks_mem_download(ctx, host_logits + i * n_vocab, block, (size_t)(n * n_vocab) * sizeof(float));
  }
  ks_mem_free(ctx, block);
  return status;
}
