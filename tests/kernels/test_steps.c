/* Steps of ops.h: operations between ks_step_begin and ks_step_end give the same bits as without, whatever
 * changes from step to step. The first time a step is recorded, then it is replayed as a whole where the
 * backend can. */
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>

enum { ROWS = 7, VOCAB = 33, COLS = 40, HEADS = 2, HALF = COLS / HEADS / 2, MAX_STEPS = 9, N_ARRAYS = 6 };

typedef struct {
  ks_ctx *ctx;
  ks_weight *w;
  ks_guard x, y, logits, norm_w, state[4];
  int32_t tokens[MAX_STEPS][ROWS];
  double norms[MAX_STEPS];
} machine;

/* What one step is told. */
typedef struct {
  int64_t n_rows;
  int32_t tokens[ROWS], positions[ROWS];
  ks_sampler samplers[ROWS];
  double lr;
} orders;

static orders orders_of(int step) {
  orders o = {.n_rows = step == 5 ? ROWS - 2 : ROWS, .lr = 1e-2 / (step + 1)};
  for (int i = 0; i < ROWS; i++) {
    o.tokens[i] = (i * 5 + step * 3) % VOCAB;
    o.positions[i] = i + (step == 4 ? 0 : step);
    o.samplers[i] = (ks_sampler){.temperature = i % 2 ? 0.8f : 0,
                                 .top_k = i,
                                 .top_p = 1,
                                 .key = 3,
                                 .counter = (uint64_t)(step * ROWS + i)};
  }
  return o;
}

static void start(machine *m, const char *place) {
  memset(m, 0, sizeof *m);
  m->ctx = ks_test_ctx(place, 2);
  if (!m->ctx) return;
  float *w = ks_floats(VOCAB * COLS, KS_FILL_SIGNED, 1), *norm_w = ks_floats(COLS, KS_FILL_POSITIVE, 2);
  const ks_weight_params params = {
      .n_out = VOCAB, .n_in = COLS, .dtype = ks_ctx_act_dtype(m->ctx), .values = w};
  cr_assert(ks_weight_create(m->ctx, &params, &m->w) == KS_OK, "%s", ks_error_message());
  m->x = ks_guard_make_act(m->ctx, NULL, ROWS * COLS);
  m->y = ks_guard_make_act(m->ctx, NULL, ROWS * COLS);
  m->logits = ks_guard_make(m->ctx, NULL, ROWS * VOCAB);
  m->norm_w = ks_guard_make(m->ctx, norm_w, COLS);
  for (int i = 0; i < 4; i++) {
    float *values = ks_floats(COLS, KS_FILL_POSITIVE, (uint64_t)i);
    m->state[i] = ks_guard_make(m->ctx, values, COLS);
    free(values);
  }
  free(w);
  free(norm_w);
}

static void stop(machine *m) {
  ks_guard *all[] = {&m->x,        &m->y,        &m->logits,   &m->norm_w,
                     &m->state[0], &m->state[1], &m->state[2], &m->state[3]};
  for (int i = 0; i < 8; i++)
    ks_guard_free(all[i]);
  ks_weight_destroy(m->ctx, m->w);
  ks_ctx_destroy(m->ctx);
}

static ks_status run(machine *m, int step) {
  const orders o = orders_of(step);
  double inv_freq[HALF];
  for (int i = 0; i < HALF; i++)
    inv_freq[i] = 1.0 / (i + 1);
  KS_TRY(ks_embed_forward(m->ctx,
                          &(ks_embed_args){.w = m->w, .tokens = o.tokens, .y = m->x.p, .n_rows = o.n_rows}));
  KS_TRY(ks_rmsnorm_forward(
      m->ctx,
      &(ks_rmsnorm_args){
          .x = m->x.p, .w = m->norm_w.p, .y = m->y.p, .n_rows = o.n_rows, .n_cols = COLS, .eps = 1e-5f}));
  KS_TRY(ks_rope(m->ctx, &(ks_rope_args){.x = m->y.p,
                                         .positions = o.positions,
                                         .inv_freq = inv_freq,
                                         .n_rows = o.n_rows,
                                         .n_heads = HEADS,
                                         .head_dim = 2 * HALF}));
  KS_TRY(ks_swiglu_forward(
      m->ctx, &(ks_swiglu_args){.gate = m->x.p, .up = m->y.p, .h = m->y.p, .n = o.n_rows * COLS}));
  KS_TRY(ks_linear_forward(
      m->ctx,
      &(ks_linear_args){.w = m->w, .x = m->y.p, .y = m->logits.p, .y_is_f32 = true, .n_rows = o.n_rows}));
  KS_TRY(ks_sample(m->ctx, &(ks_sample_args){.logits = m->logits.p,
                                             .n_rows = o.n_rows,
                                             .n_vocab = VOCAB,
                                             .samplers = o.samplers,
                                             .tokens = m->tokens[step]}));
  float gradient[COLS];
  for (int i = 0; i < COLS; i++)
    gradient[i] = (float)(i - step) / 8;
  KS_TRY(ks_mem_upload(m->ctx, m->state[3].p, gradient, sizeof gradient));
  const ks_adamw_job job = {.p = m->state[0].p,
                            .m = m->state[1].p,
                            .v = m->state[2].p,
                            .grad = m->state[3].p,
                            .n = COLS,
                            .lr = o.lr,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = 1e-8,
                            .weight_decay = 0.1,
                            .max_grad_norm = 1,
                            .step = step + 1};
  return ks_adamw(m->ctx, &(ks_adamw_args){.jobs = &job, .n_jobs = 1, .norm = &m->norms[step]});
}

Test(steps, give_the_bits_of_one_by_one) {
  static machine in_steps, plain;
  int64_t bad = 0;
  for (const char *const *place = ks_test_places(); *place; place++) {
    start(&in_steps, *place);
    start(&plain, *place);
    if (!in_steps.ctx) continue;
    for (int s = 0; s < MAX_STEPS; s++) {
      cr_assert(ks_step_begin(in_steps.ctx, 42) == KS_OK);
      cr_assert(run(&in_steps, s) == KS_OK, "%s", ks_error_message());
      cr_assert(ks_step_end(in_steps.ctx) == KS_OK, "%s", ks_error_message());
      cr_assert(run(&plain, s) == KS_OK, "%s", ks_error_message());
      if (s % 4 != 3) continue; /* late outputs of several steps come together */
      cr_assert(ks_sync(in_steps.ctx) == KS_OK && ks_sync(plain.ctx) == KS_OK);
    }
    cr_assert(ks_sync(in_steps.ctx) == KS_OK && ks_sync(plain.ctx) == KS_OK);
    bad += memcmp(in_steps.tokens, plain.tokens, sizeof plain.tokens) != 0;
    bad += memcmp(in_steps.norms, plain.norms, sizeof plain.norms) != 0 || plain.norms[MAX_STEPS - 1] <= 0;
    const ks_guard *a[N_ARRAYS] = {&in_steps.x,        &in_steps.y,        &in_steps.logits,
                                   &in_steps.state[0], &in_steps.state[1], &in_steps.state[3]};
    const ks_guard *b[N_ARRAYS] = {&plain.x,        &plain.y,        &plain.logits,
                                   &plain.state[0], &plain.state[1], &plain.state[3]};
    for (int i = 0; i < N_ARRAYS; i++) {
      float *got = ks_guard_read(a[i]), *want = ks_guard_read(b[i]);
      bad += ks_check_same(*place, got, want, a[i]->n) + ks_guard_check_walls(*place, a[i]);
      free(got);
      free(want);
    }
    stop(&in_steps);
    stop(&plain);
  }
  cr_assert(bad == 0);
}
