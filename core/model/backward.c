/* Layers downwards: gradients of the adapters, nothing else. */
#include "core/model/run.h"

/* A layer's linear maps in the order in which gradients reach them, last first. */
static const int stage_of[KS_N_TARGETS] = {
    [KS_TARGET_q] = 0,    [KS_TARGET_k] = 0,  [KS_TARGET_v] = 0,   [KS_TARGET_o] = 1,
    [KS_TARGET_gate] = 2, [KS_TARGET_up] = 2, [KS_TARGET_down] = 3};
enum { N_STAGES = 4 };

typedef struct {
  ks_run *run;
  const ks_pass *pass;
  const ks_model_config *m;
  const ks_model_layer *weights;
  ks_layer_acts acts;
  int64_t layer;
  int64_t lowest; /* layer * N_STAGES + stage of the lowest adapter: no gradient is needed below */
  const ks_row_set *rows;
  bool cut;
  void *dh; /* gradient of the residual stream at `rows` */
} layer_state;

/* -1 when no row of the pass has an adapter. */
static int64_t find_lowest(const ks_pass *pass, int64_t n_layers) {
  for (int64_t depth = 0; depth < n_layers * N_STAGES; depth++) {
    for (int64_t i = 0; i < pass->all.n_segments; i++) {
      int32_t adapter = pass->all.segments[i].adapter;
      if (adapter < 0) continue;
      const ks_lora *loras = pass->adapters[adapter].loras + depth / N_STAGES * KS_N_TARGETS;
      for (int t = 0; t < KS_N_TARGETS; t++) {
        if (stage_of[t] == depth % N_STAGES && loras[t].rank > 0) return depth;
      }
    }
  }
  return -1;
}

static bool reaches(const layer_state *s, int stage) {
  return s->layer * N_STAGES + stage >= s->lowest;
}
static bool passes(const layer_state *s, int stage) {
  return s->layer * N_STAGES + stage > s->lowest;
}
static bool has_adapter(const layer_state *s, ks_target t) {
  ks_linear_args a;
  return ks_run_linear_args(s->run, s->pass, (ks_site){s->layer, t, s->rows}, &a);
}

/* Linear maps of one input, whose gradients add up in dx. */
typedef struct {
  ks_linear_args parts[KS_LINEARS_MAX];
  int64_t n;
} linear_group;

/* Leaves out a map that has no adapter where no gradient is needed below. */
static void add_linear(layer_state *s, linear_group *group, ks_target t, const ks_row_set *rows,
                       const void *x, const void *dy, void *dx, bool accumulate) {
  ks_linear_args *a = &group->parts[group->n];
  bool any = ks_run_linear_args(s->run, s->pass, (ks_site){s->layer, t, rows}, a);
  if (!passes(s, stage_of[t])) dx = NULL;
  if (!any && !dx) return;
  a->x = x;
  a->dy = dy;
  a->dx = dx;
  a->accumulate_dx = accumulate;
  a->u = s->acts.u[t];
  a->v = s->run->lora_v[group->n++];
}

static ks_status run_group(const layer_state *s, const linear_group *group) {
  if (group->n == 0) return KS_OK;
  return ks_linears_backward(s->run->model->ctx,
                             &(ks_linears_args){.parts = group->parts, .n_parts = group->n});
}

static ks_status linear_backward(layer_state *s, ks_target t, const ks_row_set *rows, const void *x,
                                 const void *dy, void *dx, bool accumulate) {
  linear_group group = {.n = 0};
  add_linear(s, &group, t, rows, x, dy, dx, accumulate);
  return run_group(s, &group);
}

static ks_status recompute_norm(const layer_state *s, const void *x, const float *w, float *rstd,
                                int64_t n_rows) {
  return ks_rmsnorm_forward(s->run->model->ctx, &(ks_rmsnorm_args){.x = x,
                                                                   .w = w,
                                                                   .y = s->run->xn,
                                                                   .rstd = rstd,
                                                                   .n_rows = n_rows,
                                                                   .n_cols = s->m->hidden_size,
                                                                   .eps = s->m->rms_eps});
}

/* dres += gradient of the norm's input, given that of its output in dxn. */
static ks_status norm_backward(const layer_state *s, const void *x, const float *w, float *rstd, void *dres,
                               int64_t n_rows) {
  return ks_rmsnorm_backward(s->run->model->ctx, &(ks_rmsnorm_args){.x = x,
                                                                    .w = w,
                                                                    .rstd = rstd,
                                                                    .dy = s->run->dxn,
                                                                    .dx = dres,
                                                                    .accumulate_dx = true,
                                                                    .n_rows = n_rows,
                                                                    .n_cols = s->m->hidden_size});
}

static ks_status mlp_backward(layer_state *s) {
  ks_run *run = s->run;
  ks_ctx *ctx = run->model->ctx;
  const ks_layer_acts *acts = &s->acts;
  int64_t n = s->rows->n_rows * s->m->intermediate_size;
  if (has_adapter(s, KS_TARGET_down))
    KS_TRY(
        ks_swiglu_forward(ctx, &(ks_swiglu_args){.gate = acts->gate, .up = acts->up, .h = run->ff, .n = n}));
  KS_TRY(linear_backward(s, KS_TARGET_down, s->rows, run->ff, s->dh, run->dff, false));
  if (!reaches(s, 2)) return KS_OK;
  KS_TRY(ks_swiglu_backward(
      ctx,
      &(ks_swiglu_args){
          .gate = acts->gate, .up = acts->up, .dh = run->dff, .dgate = acts->gate, .dup = acts->up, .n = n}));
  if (has_adapter(s, KS_TARGET_gate) || has_adapter(s, KS_TARGET_up))
    KS_TRY(recompute_norm(s, acts->h_mid, s->weights->mlp_norm, acts->rstd_mlp, s->rows->n_rows));
  linear_group group = {.n = 0};
  add_linear(s, &group, KS_TARGET_gate, s->rows, run->xn, acts->gate, run->dxn, false);
  add_linear(s, &group, KS_TARGET_up, s->rows, run->xn, acts->up, run->dxn, true);
  KS_TRY(run_group(s, &group));
  if (!reaches(s, 1)) return KS_OK;
  return norm_backward(s, acts->h_mid, s->weights->mlp_norm, acts->rstd_mlp, s->dh, s->rows->n_rows);
}

/* dst = 0 but for the out rows, which are src's. */
static ks_status spread_out_rows(const layer_state *s, const void *src, void *dst) {
  ks_ctx *ctx = s->run->model->ctx;
  int64_t n_rows = s->pass->all.n_rows, n_cols = s->m->hidden_size;
  KS_TRY(ks_mem_zero(ctx, dst, (size_t)n_rows * (size_t)n_cols * ks_ctx_act_size(ctx)));
  return ks_rows_scatter(ctx, &(ks_rows_args){.x = src,
                                              .y = dst,
                                              .index = s->pass->out_index,
                                              .n_rows = s->pass->out.n_rows,
                                              .n_x_rows = n_rows,
                                              .n_cols = n_cols});
}

/* From the gradients of q and k after rotary to those before it and before their norm, in place. */
static ks_status qk_backward(const layer_state *s) {
  ks_run *run = s->run;
  ks_ctx *ctx = run->model->ctx;
  const struct {
    const ks_row_set *rows;
    const void *pre;
    const float *w;
    void *dx;
    float *rstd;
    int64_t n_heads;
  } sides[2] = {
      {s->rows, s->acts.q_pre, s->weights->q_norm, run->dq, s->acts.rstd_q, s->m->n_heads},
      {&s->pass->all, s->acts.k_pre, s->weights->k_norm, run->dk, s->acts.rstd_k, s->m->n_kv_heads}};
  for (int i = 0; i < 2; i++) {
    KS_TRY(ks_rope(ctx, &(ks_rope_args){.x = sides[i].dx,
                                        .positions = sides[i].rows->positions,
                                        .inv_freq = run->model->inv_freq,
                                        .n_rows = sides[i].rows->n_rows,
                                        .n_heads = sides[i].n_heads,
                                        .head_dim = s->m->head_dim,
                                        .inverse = true}));
    if (!s->m->qk_norm) continue;
    KS_TRY(ks_rmsnorm_backward(ctx, &(ks_rmsnorm_args){.x = sides[i].pre,
                                                       .w = sides[i].w,
                                                       .rstd = sides[i].rstd,
                                                       .dy = sides[i].dx,
                                                       .dx = sides[i].dx,
                                                       .n_rows = sides[i].rows->n_rows * sides[i].n_heads,
                                                       .n_cols = s->m->head_dim,
                                                       .eps = s->m->rms_eps}));
  }
  return KS_OK;
}

/* dq, dk, dv into the adapters of q, k, v and the residual stream of all rows. */
static ks_status qkv_backward(layer_state *s) {
  ks_run *run = s->run;
  const ks_layer_acts *acts = &s->acts;
  const ks_row_set *all = &s->pass->all;
  const void *xq = run->xn;
  void *dxq = s->cut ? run->dcut : run->dxn; /* dcut is free once its rows lie in dres */
  bool below = passes(s, 0);
  if (has_adapter(s, KS_TARGET_q) || has_adapter(s, KS_TARGET_k) || has_adapter(s, KS_TARGET_v))
    KS_TRY(recompute_norm(s, acts->h_in, s->weights->attn_norm, acts->rstd_attn, all->n_rows));
  if (s->cut) {
    KS_TRY(ks_rows_gather(run->model->ctx, &(ks_rows_args){.x = run->xn,
                                                           .y = run->xt,
                                                           .index = s->pass->out_index,
                                                           .n_rows = s->pass->out.n_rows,
                                                           .n_x_rows = all->n_rows,
                                                           .n_cols = s->m->hidden_size}));
    xq = run->xt;
    if (below) KS_TRY(spread_out_rows(s, run->dcut, run->dres));
  }
  linear_group group = {.n = 0};
  add_linear(s, &group, KS_TARGET_q, s->rows, xq, run->dq, dxq, false);
  if (s->cut) {
    KS_TRY(run_group(s, &group));
    group.n = 0;
    if (below) KS_TRY(spread_out_rows(s, run->dcut, run->dxn));
  }
  add_linear(s, &group, KS_TARGET_k, all, run->xn, run->dk, run->dxn, true);
  add_linear(s, &group, KS_TARGET_v, all, run->xn, run->dv, run->dxn, true);
  KS_TRY(run_group(s, &group));
  if (!below) return KS_OK;
  return norm_backward(s, acts->h_in, s->weights->attn_norm, acts->rstd_attn, run->dres, all->n_rows);
}

static ks_status attention_backward(layer_state *s) {
  ks_run *run = s->run;
  KS_TRY(linear_backward(s, KS_TARGET_o, s->rows, s->acts.attn, s->dh, run->d_attn, false));
  if (!reaches(s, 0)) return KS_OK;
  if (s->m->qk_norm) KS_TRY(ks_run_qk(run, s->pass, s->layer, &s->acts));
  ks_attention_args a = ks_run_attention_args(run, s->pass, s->layer, &s->acts);
  a.d_o = run->d_attn;
  a.dq = run->dq;
  KS_TRY(ks_attention_backward(run->model->ctx, &a));
  KS_TRY(qk_backward(s));
  return qkv_backward(s);
}

ks_status ks_pass_backward(ks_run *run, const ks_pass *pass) {
  const ks_model_config *m = &run->model->config;
  layer_state s = {.run = run, .pass = pass, .m = m, .lowest = find_lowest(pass, m->n_layers)};
  if (s.lowest < 0) return KS_OK;
  for (s.layer = m->n_layers - 1; s.layer >= s.lowest / N_STAGES; s.layer--) {
    s.cut = pass->cut && s.layer == m->n_layers - 1;
    s.rows = s.cut ? &pass->out : &pass->all;
    s.dh = s.cut ? run->dcut : run->dres;
    s.weights = &run->model->layers[s.layer];
    s.acts = ks_run_acts(run, s.layer);
    KS_TRY(ks_pass_recompute(run, pass, s.layer));
    KS_TRY(mlp_backward(&s));
    if (reaches(&s, 1)) KS_TRY(attention_backward(&s));
  }
  return KS_OK;
}

ks_status ks_forward_backward(ks_run *run, const ks_batch *batch, const int64_t *rows, const int32_t *targets,
                              const float *scale, int64_t n_targets, float *loss) {
  ks_pass pass;
  ks_loss_spec spec = {.rows = rows, .targets = targets, .scale = scale, .n_targets = n_targets};
  if (!run || !run->params.backward)
    return KS_FAIL(KS_EINVAL, "ks_forward_backward: the run was made without backward");
  if (n_targets > 0 && !scale) return KS_FAIL(KS_EINVAL, "ks_forward_backward: scale is NULL");
  KS_TRY(ks_forward_head(run, batch, &spec, loss, &pass));
  return n_targets > 0 ? ks_pass_backward(run, &pass) : KS_OK;
}
