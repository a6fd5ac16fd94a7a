/* Memory of a pass and the description of its rows. */
#include "core/model/run.h"

enum {
  GPU_ROWS = 8192
}; /* enough to fill the largest GPU; a fixed number, so that no result depends on the card */

/* ---------------------------------------------------------------- layout */

/* Hands out places in the arena, 64-byte aligned; with base NULL it only counts. */
typedef struct {
  unsigned char *base;
  size_t n, top; /* bytes handed out now, and at most */
  size_t act_size;
  bool overflow;
} cursor;

static void *take_bytes(cursor *c, int64_t rows, int64_t cols, size_t size) {
  size_t n, end;
  if (rows <= 0 || cols <= 0) return NULL;
  if (!ks_mul_size((size_t)rows, (size_t)cols, &n) || !ks_mul_size(n, size, &n) || !ks_add_size(n, 63, &n) ||
      !ks_add_size(c->n, n & ~(size_t)63, &end)) {
    c->overflow = true;
    return NULL;
  }
  void *p = c->base ? c->base + c->n : NULL;
  c->n = end;
  if (end > c->top) c->top = end;
  return p;
}
/* Of activations. */
static void *take(cursor *c, int64_t rows, int64_t cols) {
  return take_bytes(c, rows, cols, c->act_size);
}
static float *take_floats(cursor *c, int64_t rows, int64_t cols) {
  return take_bytes(c, rows, cols, sizeof(float));
}

static void take_lora_u(const ks_run *run, cursor *c, ks_layer_acts *a) {
  for (int t = 0; t < KS_N_TARGETS; t++)
    a->u[t] = take(c, run->params.max_rows, run->params.max_rank);
}

static int64_t n_again(const ks_run *run) {
  return ks_min_i64(run->params.recompute_layers, run->model->config.n_layers);
}

/* One layer's activations for a backward pass: what it keeps, and the rest, which may be a place that others share. */
static void place_backward_layer(const ks_run *run, cursor *kept, cursor *rest, ks_layer_acts *a) {
  const ks_model_config *m = &run->model->config;
  int64_t rows = run->params.max_rows, q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
  a->h_in = take(kept, rows, m->hidden_size);
  a->rstd_attn = take_floats(kept, rows, 1);
  a->rstd_mlp = take_floats(kept, rows, 1);
  take_lora_u(run, kept, a);
  a->h_mid = take(rest, rows, m->hidden_size);
  a->q_pre = take(rest, rows, q);
  a->k_pre = take(rest, rows, kv);
  a->v = take(rest, rows, kv);
  a->attn = take(rest, rows, q);
  a->lse = take_floats(rest, rows, m->n_heads);
  a->gate = take(rest, rows, m->intermediate_size);
  a->up = take(rest, rows, m->intermediate_size);
  if (m->qk_norm) {
    a->rstd_q = take_floats(rest, rows, m->n_heads);
    a->rstd_k = take_floats(rest, rows, m->n_kv_heads);
  }
  a->q = m->qk_norm ? run->q : a->q_pre;
  a->k = m->qk_norm ? run->k : a->k_pre;
}

/* One layer's activations when nothing is kept: attention's and the MLP's share their place. */
static void place_shared_layer(const ks_run *run, cursor *c, ks_layer_acts *a) {
  const ks_model_config *m = &run->model->config;
  int64_t rows = run->params.max_rows, q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
  a->h_in = a->h_mid = run->h_out;
  void *u[3]; /* maps of one input have one each */
  for (int i = 0; i < 3; i++)
    u[i] = take(c, rows, run->params.max_rank);
  static const int place[KS_N_TARGETS] = {[KS_TARGET_k] = 1, [KS_TARGET_v] = 2, [KS_TARGET_up] = 1};
  for (int t = 0; t < KS_N_TARGETS; t++)
    a->u[t] = u[place[t]];
  size_t mark = c->n;
  a->q = a->q_pre = take(c, rows, q);
  a->k = a->k_pre = take(c, rows, kv);
  a->v = take(c, rows, kv);
  a->attn = take(c, rows, q);
  c->n = mark;
  a->gate = take(c, rows, m->intermediate_size);
  a->up = take(c, rows, m->intermediate_size);
  c->n = c->top;
}

ks_layer_acts ks_run_acts(const ks_run *run, int64_t layer) {
  ks_layer_acts a = {0};
  const int64_t again = n_again(run), above = ks_max_i64(layer - again, 0);
  cursor kept = {.base = run->arena,
                 .n = run->layer_begin + (size_t)(layer - above) * run->again_bytes +
                      (size_t)above * run->layer_bytes,
                 .act_size = ks_ctx_act_size(run->model->ctx)},
         shared = kept;
  kept.top = kept.n;
  shared.n = run->again_begin;
  if (run->params.backward)
    place_backward_layer(run, &kept, layer < again ? &shared : &kept, &a);
  else
    place_shared_layer(run, &kept, &a);
  return a;
}

static void place_backward_scratch(ks_run *run, cursor *c) {
  const ks_model_config *m = &run->model->config;
  int64_t rows = run->params.max_rows, q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
  run->dxn = take(c, rows, m->hidden_size);
  run->dres = take(c, rows, m->hidden_size);
  run->dcut = take(c, rows, m->hidden_size);
  for (int i = 0; i < KS_LINEARS_MAX; i++)
    run->lora_v[i] = take(c, rows, run->params.max_rank);
  run->rstd = take_floats(c, rows, 1);
  if (m->qk_norm) {
    run->q = take(c, rows, q);
    run->k = take(c, rows, kv);
  }
}

/* What never lives at the same time as one another. */
static void place_phases(ks_run *run, cursor *c) {
  const ks_model_config *m = &run->model->config;
  int64_t rows = run->params.max_rows, q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
  size_t mark = c->n;
  if (!run->params.no_loss) {
    size_t workspace = ks_head_loss_workspace(run->model->ctx, run->model->head, rows);
    run->head_workspace = take_bytes(c, workspace > 0, 1, workspace);
  }
  c->n = mark;
  if (!run->params.backward) return; /* the shared layer takes this place too */
  run->ff = take(c, rows, m->intermediate_size);
  run->dff = take(c, rows, m->intermediate_size);
  c->n = mark;
  run->d_attn = take(c, rows, q);
  run->dq = take(c, rows, q);
  run->dk = take(c, rows, kv);
  run->dv = take(c, rows, kv);
  c->n = c->top;
}

/* The layers' places behind everything else: what those share that are made again, then layer by layer. */
static void place_backward_layers(ks_run *run, cursor *c) {
  ks_layer_acts acts = {0};
  cursor kept = {.act_size = c->act_size}, rest = kept;
  const size_t again = (size_t)n_again(run), above = (size_t)run->model->config.n_layers - again;
  size_t low = 0, high = 0;
  place_backward_layer(run, &kept, &rest, &acts);
  run->again_begin = c->n;
  run->again_bytes = kept.n;
  run->layer_bytes = kept.n + rest.n;
  if (kept.overflow || rest.overflow || !ks_add_size(c->n, again > 0 ? rest.n : 0, &run->layer_begin) ||
      !ks_mul_size(run->again_bytes, again, &low) || !ks_mul_size(run->layer_bytes, above, &high) ||
      !ks_add_size(run->layer_begin, low, &low) || !ks_add_size(low, high, &run->arena_bytes))
    c->overflow = true;
}

/* Sets every pointer into the arena (all NULL before there is one) and counts it. */
static ks_status place_all(ks_run *run) {
  const ks_model_config *m = &run->model->config;
  int64_t rows = run->params.max_rows;
  cursor c = {.base = run->arena, .act_size = ks_ctx_act_size(run->model->ctx)};
  run->h_out = take(&c, rows, m->hidden_size);
  run->xn = take(&c, rows, m->hidden_size);
  run->xt = take(&c, rows, m->hidden_size);
  if (run->params.backward) place_backward_scratch(run, &c);
  place_phases(run, &c);
  run->layer_begin = c.n;
  if (run->params.backward) {
    place_backward_layers(run, &c);
  } else {
    ks_layer_acts acts = {0};
    place_shared_layer(run, &c, &acts);
    run->arena_bytes = c.n;
  }
  if (c.overflow)
    return KS_FAIL(KS_EOVERFLOW,
                   "run: activations of %lld rows do not fit an address space; use fewer rows a pass",
                   (long long)rows);
  return KS_OK;
}

/* ---------------------------------------------------------------- create, destroy */

static ks_status check_params(const ks_model *model, const ks_run_params *p) {
  if (!model || !p) return KS_FAIL(KS_EINVAL, "run: model or params is NULL");
  if (p->max_rows < 1 || p->max_rows > INT32_MAX || p->max_seqs < 1 || p->max_seqs > INT32_MAX)
    return KS_FAIL(KS_EINVAL, "run: max_rows %lld, max_seqs %lld; give 1 to 2^31 - 1", (long long)p->max_rows,
                   (long long)p->max_seqs);
  if (p->max_rank < 0 || p->max_rank > 256)
    return KS_FAIL(KS_EINVAL, "run: max_rank is %d; give 0 to 256", p->max_rank);
  if (p->recompute_layers < 0)
    return KS_FAIL(KS_EINVAL, "run: recompute_layers is %lld; give 0 or more",
                   (long long)p->recompute_layers);
  return KS_OK;
}

/* Host arrays beside the arena, one table: where the pointer lies, elements, element size. */
typedef struct {
  void *pointer;
  size_t n, size;
} host_array;
enum { N_HOST_ARRAYS = 10 };

static void list_host_arrays(ks_run *run, host_array out[N_HOST_ARRAYS]) {
  size_t rows = (size_t)run->params.max_rows, seqs = (size_t)run->params.max_seqs;
  const host_array all[N_HOST_ARRAYS] = {
      {&run->positions, rows, sizeof(int32_t)},     {&run->out_positions, rows, sizeof(int32_t)},
      {&run->out_index, rows, sizeof(int64_t)},     {&run->target_index, rows, sizeof(int64_t)},
      {&run->seqs, seqs, sizeof(ks_attention_seq)}, {&run->out_seqs, seqs, sizeof(ks_attention_seq)},
      {&run->key_begin, seqs, sizeof(int64_t)},     {&run->tails, seqs, sizeof(int64_t)},
      {&run->segments, seqs, sizeof(ks_segment)},   {&run->out_segments, seqs, sizeof(ks_segment)}};
  memcpy(out, all, sizeof all);
}

ks_status ks_run_bytes(const ks_model *model, const ks_run_params *params, size_t *bytes) {
  if (!bytes) return KS_FAIL(KS_EINVAL, "ks_run_bytes: bytes is NULL");
  KS_TRY(check_params(model, params));
  union { /* the run only reads its model here */
    const ks_model *in;
    ks_model *out;
  } m = {.in = model};
  ks_run run = {.model = m.out, .params = *params};
  host_array hosts[N_HOST_ARRAYS];
  KS_TRY(place_all(&run));
  *bytes = run.arena_bytes + sizeof run;
  list_host_arrays(&run, hosts);
  for (int i = 0; i < N_HOST_ARRAYS; i++)
    *bytes += hosts[i].n * hosts[i].size;
  return KS_OK;
}

/* The layouts that input gradients read. Nothing flows below layer 0's norm. */
static ks_status prepare_weights(ks_model *model) {
  KS_TRY(ks_weight_prepare_backward(model->ctx, model->head));
  for (int64_t l = 0; l < model->config.n_layers; l++) {
    for (int t = l == 0 ? KS_TARGET_o : 0; t < KS_N_TARGETS; t++)
      KS_TRY(ks_weight_prepare_backward(model->ctx, model->layers[l].linear[t]));
  }
  return KS_OK;
}

int64_t ks_run_rows_that_fit(const ks_model *model, const ks_run_params *params, size_t bytes) {
  int64_t fit = 0, too_many = params->max_rows + 1;
  while (too_many - fit > 1) {
    ks_run_params smaller = *params;
    size_t needed;
    smaller.max_rows = fit + (too_many - fit) / 2;
    if (ks_run_bytes(model, &smaller, &needed) == KS_OK && needed <= bytes)
      fit = smaller.max_rows;
    else
      too_many = smaller.max_rows;
  }
  return fit;
}

static ks_status explain_no_memory(const ks_run *run) {
  const size_t available = ks_mem_available(run->model->ctx);
  if (available == SIZE_MAX)
    return ks_fail_context(KS_ENOMEM, "activations of %lld rows", (long long)run->params.max_rows);
  const int64_t fit = ks_run_rows_that_fit(run->model, &run->params, available);
  return KS_FAIL(
      KS_ENOMEM,
      "a pass of %lld rows needs %.2f GB for its activations; the device has %.2f GB free: %s %lld rows "
      "fit; use smaller passes, shorter texts, bf16 or quantized weights",
      (long long)run->params.max_rows, (double)run->arena_bytes / 1e9, (double)available / 1e9,
      fit > 0 ? "at most" : "not even one row fits,", (long long)fit);
}

static ks_status allocate(ks_run *run) {
  host_array hosts[N_HOST_ARRAYS];
  void *arena = NULL;
  KS_TRY(place_all(run));
  ks_status status = ks_mem_alloc(run->model->ctx, run->arena_bytes, &arena);
  if (status == KS_ENOMEM) return explain_no_memory(run);
  KS_TRY_AS(status, "activations of %lld rows", (long long)run->params.max_rows);
  run->arena = arena;
  KS_TRY(place_all(run));
  list_host_arrays(run, hosts);
  for (int i = 0; i < N_HOST_ARRAYS; i++)
    KS_TRY(ks_alloc_array(hosts[i].pointer, hosts[i].n, hosts[i].size, "run"));
  return run->params.backward ? prepare_weights(run->model) : KS_OK;
}

ks_status ks_run_create(ks_model *model, const ks_run_params *params, ks_run **out) {
  if (!out) return KS_FAIL(KS_EINVAL, "ks_run_create: out is NULL");
  *out = NULL;
  KS_TRY(check_params(model, params));
  ks_run *run = NULL;
  KS_TRY(ks_alloc_array(&run, 1, sizeof *run, "run"));
  run->model = model;
  run->params = *params;
  ks_status status = allocate(run);
  if (status != KS_OK) {
    ks_run_destroy(run);
    return status;
  }
  *out = run;
  return KS_OK;
}

void ks_run_destroy(ks_run *run) {
  if (!run) return;
  host_array hosts[N_HOST_ARRAYS];
  list_host_arrays(run, hosts);
  for (int i = 0; i < N_HOST_ARRAYS; i++) {
    void *p;
    memcpy(&p, hosts[i].pointer, sizeof p);
    free(p);
  }
  free(run->loras);
  ks_mem_free(run->model->ctx, run->arena);
  free(run);
}

int64_t ks_run_default_rows(const ks_model *model, bool backward) {
  if (strcmp(ks_ctx_backend_name(model->ctx), "cuda") == 0) return GPU_ROWS;
  int64_t a_thread = backward ? 512 : 256, rows = a_thread * ks_ctx_n_threads(model->ctx);
  return ks_max_i64(rows, 2 * a_thread);
}

/* ---------------------------------------------------------------- describing a batch */

static ks_status check_sequences(const ks_run *run, const ks_batch *b) {
  const ks_model_config *m = &run->model->config;
  if (b->n_rows < 0 || b->n_rows > run->params.max_rows || b->n_seqs < 0 || b->n_seqs > run->params.max_seqs)
    return KS_FAIL(KS_EINVAL, "batch: %lld rows in %lld sequences; this run holds %lld in %lld",
                   (long long)b->n_rows, (long long)b->n_seqs, (long long)run->params.max_rows,
                   (long long)run->params.max_seqs);
  if (b->n_rows > 0 && (!b->tokens || !b->seq_offsets))
    return KS_FAIL(KS_EINVAL, "batch: tokens or seq_offsets is NULL");
  int64_t end = 0;
  for (int64_t s = 0; s < b->n_seqs; s++) {
    int64_t n = b->seq_offsets[s + 1] - b->seq_offsets[s];
    if (b->seq_offsets[s] != end || n < 1 || n > b->n_rows - end)
      return KS_FAIL(
          KS_EINVAL, "batch: sequence %lld has rows %lld to %lld of %lld; offsets must rise from 0",
          (long long)s, (long long)b->seq_offsets[s], (long long)b->seq_offsets[s + 1], (long long)b->n_rows);
    if (n > m->max_seq_len)
      return KS_FAIL(KS_EINVAL, "batch: sequence %lld has %lld tokens; the model's context is %lld: cut it",
                     (long long)s, (long long)n, (long long)m->max_seq_len);
    end += n;
  }
  if (end != b->n_rows)
    return KS_FAIL(KS_EINVAL, "batch: sequences hold %lld of %lld rows", (long long)end,
                   (long long)b->n_rows);
  for (int64_t i = 0; i < b->n_rows; i++) {
    if (b->tokens[i] < 0 || b->tokens[i] >= m->vocab_size)
      return KS_FAIL(KS_EINVAL, "batch: token %d at row %lld; the model has %lld tokens", b->tokens[i],
                     (long long)i, (long long)m->vocab_size);
  }
  return KS_OK;
}

static ks_status check_adapter(const ks_run *run, const ks_batch *b, const ks_segment *s) {
  if (s->adapter >= 0 && (s->adapter >= b->n_adapters || !b->adapters[s->adapter].loras))
    return KS_FAIL(KS_EINVAL, "batch: a segment names adapter %d of %lld", s->adapter,
                   (long long)b->n_adapters);
  if (s->adapter >= 0 && b->adapters[s->adapter].max_rank > run->params.max_rank)
    return KS_FAIL(KS_EINVAL, "batch: adapter %d has rank %d; this run holds rank %d", s->adapter,
                   b->adapters[s->adapter].max_rank, run->params.max_rank);
  return KS_OK;
}

static int64_t find_row(const int64_t *offsets, int64_t n_seqs, int64_t row) {
  int64_t low = 0, high = n_seqs;
  while (low < high) {
    int64_t mid = low + (high - low) / 2;
    if (offsets[mid] < row)
      low = mid + 1;
    else
      high = mid;
  }
  return offsets[low] == row ? low : -1;
}

/* Copies the segments that hold rows; they lie on sequence borders, so that there is room. */
static ks_status copy_segments(ks_run *run, const ks_batch *b, int64_t *n_out) {
  int64_t n = 0, end = 0;
  if (b->n_segments < 0 || (b->n_segments > 0 && !b->segments))
    return KS_FAIL(KS_EINVAL, "batch: %lld segments at a NULL pointer", (long long)b->n_segments);
  for (int64_t i = 0; i < b->n_segments; i++) {
    const ks_segment *s = &b->segments[i];
    if (s->n_rows == 0) continue;
    if (s->n_rows < 0 || s->row_begin < end || s->row_begin > b->n_rows - s->n_rows ||
        find_row(b->seq_offsets, b->n_seqs, s->row_begin) < 0 ||
        find_row(b->seq_offsets, b->n_seqs, s->row_begin + s->n_rows) < 0)
      return KS_FAIL(
          KS_EINVAL,
          "batch: segment %lld has rows %lld to %lld; segments must rise, lie on sequence borders and "
          "not overlap",
          (long long)i, (long long)s->row_begin, (long long)(s->row_begin + s->n_rows));
    KS_TRY(check_adapter(run, b, s));
    end = s->row_begin + s->n_rows;
    run->segments[n++] = *s;
  }
  *n_out = n;
  return KS_OK;
}

ks_status ks_run_reserve_loras(ks_run *run, int64_t n) {
  if (n <= run->cap_loras) return KS_OK;
  ks_lora *grown = NULL;
  KS_TRY(ks_alloc_array(&grown, (size_t)n, KS_N_TARGETS * sizeof *grown, "adapters of a pass"));
  free(run->loras);
  run->loras = grown;
  run->cap_loras = n;
  return KS_OK;
}

ks_status ks_run_begin(ks_run *run, const ks_batch *b, const int64_t *tails, ks_pass *pass) {
  if (!run || !b || !pass) return KS_FAIL(KS_EINVAL, "batch: NULL argument");
  int64_t n_segments = 0;
  KS_TRY(check_sequences(run, b));
  KS_TRY(copy_segments(run, b, &n_segments));
  KS_TRY(ks_run_reserve_loras(run, b->n_adapters));
  *pass = (ks_pass){.tokens = b->tokens,
                    .n_seqs = b->n_seqs,
                    .key_begin = run->key_begin,
                    .adapters = b->adapters,
                    .n_adapters = b->n_adapters,
                    .dropout = b->dropout,
                    .dropout_step = b->dropout_step};
  pass->all = (ks_row_set){.n_rows = b->n_rows,
                           .positions = run->positions,
                           .seqs = run->seqs,
                           .segments = run->segments,
                           .n_segments = n_segments};
  for (int64_t s = 0; s < b->n_seqs; s++) {
    int64_t begin = b->seq_offsets[s], n = b->seq_offsets[s + 1] - begin;
    run->seqs[s] = (ks_attention_seq){.q_begin = begin, .n_q = n, .n_k = n};
    run->key_begin[s] = begin;
    for (int64_t i = 0; i < n; i++)
      run->positions[begin + i] = (int32_t)i;
  }
  ks_run_cut(run, tails, pass);
  return KS_OK;
}

/* Number of out rows before row `row` of all, which is a sequence border. */
static int64_t out_rows_before(const ks_pass *pass, int64_t row) {
  int64_t low = 0, high = pass->n_seqs;
  while (low < high) {
    int64_t mid = low + (high - low) / 2;
    if (pass->all.seqs[mid].q_begin < row)
      low = mid + 1;
    else
      high = mid;
  }
  return low < pass->n_seqs ? pass->out.seqs[low].q_begin : pass->out.n_rows;
}

void ks_run_cut(ks_run *run, const int64_t *tails, ks_pass *pass) {
  int64_t n_rows = 0;
  pass->out = pass->all;
  pass->cut = false;
  if (!tails) return;
  for (int64_t s = 0; s < pass->n_seqs; s++)
    n_rows += tails[s];
  if (n_rows == pass->all.n_rows) return;
  pass->cut = true;
  pass->out_index = run->out_index;
  pass->out = (ks_row_set){.n_rows = n_rows,
                           .positions = run->out_positions,
                           .seqs = run->out_seqs,
                           .segments = run->out_segments,
                           .n_segments = pass->all.n_segments};
  int64_t row = 0;
  for (int64_t s = 0; s < pass->n_seqs; s++) {
    const ks_attention_seq *full = &pass->all.seqs[s];
    run->out_seqs[s] = (ks_attention_seq){.q_begin = row, .n_q = tails[s], .n_k = full->n_k};
    for (int64_t i = full->n_q - tails[s]; i < full->n_q; i++, row++) {
      run->out_index[row] = full->q_begin + i;
      run->out_positions[row] = pass->all.positions[full->q_begin + i];
    }
  }
  for (int64_t i = 0; i < pass->all.n_segments; i++) {
    ks_segment s = pass->all.segments[i];
    int64_t begin = out_rows_before(pass, s.row_begin);
    s.n_rows = out_rows_before(pass, s.row_begin + s.n_rows) - begin;
    s.row_begin = begin;
    run->out_segments[i] = s;
  }
}

/* ---------------------------------------------------------------- arguments of operations */

bool ks_run_linear_args(ks_run *run, const ks_pass *pass, ks_site site, ks_linear_args *a) {
  const ks_row_set *rows = site.rows;
  int64_t index = site.layer * KS_N_TARGETS + site.target;
  ks_lora *loras = run->loras + site.target * run->cap_loras;
  bool any = false;
  for (int64_t i = 0; i < rows->n_segments; i++) {
    int32_t adapter = rows->segments[i].adapter;
    if (adapter < 0) continue;
    loras[adapter] = pass->adapters[adapter].loras[index];
    any = any || loras[adapter].rank > 0;
  }
  *a = (ks_linear_args){.w = run->model->layers[site.layer].linear[site.target],
                        .n_rows = rows->n_rows,
                        .generation = pass->cache != NULL};
  if (!any) return false;
  a->segments = rows->segments;
  a->n_segments = rows->n_segments;
  a->loras = loras;
  a->n_loras = pass->n_adapters;
  a->u_stride = run->params.max_rank;
  a->dropout = pass->dropout;
  a->dropout_site =
      (pass->dropout_step * (uint64_t)run->model->config.n_layers) * KS_N_TARGETS + (uint64_t)index;
  return true;
}

ks_attention_args ks_run_attention_args(ks_run *run, const ks_pass *pass, int64_t layer,
                                        const ks_layer_acts *acts) {
  const ks_model_config *m = &run->model->config;
  const ks_row_set *rows = layer == m->n_layers - 1 ? &pass->out : &pass->all;
  const ks_ctx *ctx = run->model->ctx;
  const ks_kv_cache *cache = pass->cache;
  int64_t kv = m->n_kv_heads * m->head_dim;
  for (int64_t s = 0; s < pass->n_seqs; s++) {
    ks_attention_seq *seq = &rows->seqs[s];
    int64_t begin = cache ? layer * cache->n_rows * kv : pass->key_begin[s] * kv;
    seq->k = ks_act_at(ctx, cache ? cache->k : acts->k, begin);
    seq->v = ks_act_at(ctx, cache ? cache->v : acts->v, begin);
    seq->pages = cache ? pass->pages[s] : NULL;
    if (!run->params.backward) continue;
    seq->dk = ks_act_at(ctx, run->dk, begin);
    seq->dv = ks_act_at(ctx, run->dv, begin);
  }
  return (ks_attention_args){.q = acts->q,
                             .o = acts->attn,
                             .lse = acts->lse,
                             .seqs = rows->seqs,
                             .n_seqs = pass->n_seqs,
                             .n_rows = rows->n_rows,
                             .n_heads = m->n_heads,
                             .n_kv_heads = m->n_kv_heads,
                             .head_dim = m->head_dim,
                             .kv_stride = kv,
                             .page_rows = cache ? KS_ATTENTION_PAGE_UNIT : 0,
                             .n_page_rows = cache ? cache->n_rows : 0,
                             .scale = (float)(1.0 / sqrt((double)m->head_dim))};
}
