#include "core/model/forward.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/model_twin.h"
#include <criterion/criterion.h>
#include <stdio.h>

#define ALL_TARGETS ((1u << KS_N_TARGETS) - 1)
#define U           0x1p-24 /* half a unit in the last place of float32 */

/* ---------------------------------------------------------------- batches of random sequences */

enum { MAX_SEQS = 8 };
typedef struct {
  int32_t *tokens;
  int64_t offsets[MAX_SEQS + 1], rows[512];
  int32_t targets[512];
  float scale[512], loss[512];
  ks_segment segments[MAX_SEQS];
  ks_adapter_view views[MAX_SEQS];
  int64_t n_targets;
  ks_batch batch;
  ks_ctx *ctx;
} problem;

/* Sequence s has lengths[s] tokens + one more that is only predicted; targets from begins[s] on. */
static void add_sequence(problem *p, const int32_t *tokens, int64_t length, int64_t begin) {
  ks_batch *b = &p->batch;
  for (int64_t i = 0; i < length; i++) {
    p->tokens[b->n_rows + i] = tokens[i];
    if (i + 1 < begin) continue;
    p->rows[p->n_targets] = b->n_rows + i;
    p->targets[p->n_targets] = tokens[i + 1];
    p->scale[p->n_targets++] = 0.125f;
  }
  b->n_rows += length;
  p->offsets[++b->n_seqs] = b->n_rows;
}

static void begin_problem(problem *p, ks_ctx *ctx) {
  memset(p, 0, sizeof *p);
  p->ctx = ctx;
  p->tokens = calloc(512, sizeof *p->tokens);
  p->batch = (ks_batch){
      .tokens = p->tokens, .seq_offsets = p->offsets, .segments = p->segments, .adapters = p->views};
}

static void add_segment(problem *p, int64_t row_begin, int64_t n_rows, const ks_twin_adapter *a,
                        uint64_t key) {
  ks_batch *b = &p->batch;
  int32_t index = -1;
  if (a) {
    index = (int32_t)b->n_adapters;
    p->views[b->n_adapters++] = a->view;
  }
  p->segments[b->n_segments++] = (ks_segment){row_begin, n_rows, index, key};
}

static ks_run *make_run_as(ks_model *m, bool backward, int64_t recompute_layers) {
  ks_run *run = NULL;
  ks_must(ks_run_create(m,
                        &(ks_run_params){.max_rows = 200,
                                         .max_seqs = MAX_SEQS,
                                         .max_rank = 8,
                                         .backward = backward,
                                         .recompute_layers = recompute_layers},
                        &run));
  return run;
}
static ks_run *make_run(ks_model *m, bool backward) {
  return make_run_as(m, backward, 0);
}

static void run_backward(ks_run *run, problem *p) {
  for (int64_t i = 0; i < p->n_targets; i++)
    p->loss[i] = NAN;
  ks_must(ks_forward_backward(run, &p->batch, p->rows, p->targets, p->scale, p->n_targets, p->loss));
  ks_must(ks_sync(p->ctx));
}

/* ---------------------------------------------------------------- against the float64 oracle */

static const struct { int64_t length, begin; } sequences[] = {{7, 1}, {1, 1}, {12, 9}, {5, 4}};
enum { N_SEQUENCES = 4 };

enum { N_TARGETS = 7 + 1 + 4 + 2 };

/* The losses of all targets, sequence by sequence, times the objective's factor. */
static void oracle_losses(const ks_twin *t, const ks_twin_adapter *a, int32_t *const *tokens,
                          double *losses) {
  int64_t n = 0;
  for (int s = 0; s < N_SEQUENCES; s++) {
    ks_oracle_llama_losses(&t->oracle, &a->oracle, tokens[s], sequences[s].length + 1, sequences[s].begin,
                           losses + n);
    n += sequences[s].length + 1 - sequences[s].begin;
  }
  cr_assert_eq(n, N_TARGETS);
  for (int64_t i = 0; i < n; i++)
    losses[i] *= 0.125;
}

/* Derivative of every target's loss: central differences of fourth order, so that their own error (step^4 /
 * 30 of the fifth derivative) lies far below float32's. */
static void oracle_derivatives(const ks_twin *t, const ks_twin_adapter *a, int64_t index,
                               int32_t *const *tokens, double *derivatives) {
  const double step = 1e-3, weights[4] = {1 / 12.0, -8 / 12.0, 8 / 12.0, -1 / 12.0};
  double kept = a->oracle_weights[index], losses[N_TARGETS];
  memset(derivatives, 0, N_TARGETS * sizeof *derivatives);
  for (int k = 0; k < 4; k++) {
    a->oracle_weights[index] = kept + step * (k < 2 ? k - 2 : k - 1);
    oracle_losses(t, a, tokens, losses);
    for (int i = 0; i < N_TARGETS; i++)
      derivatives[i] += weights[k] / step * losses[i];
  }
  a->oracle_weights[index] = kept;
}

/* Longest chain of additions between a weight and the loss or back: the sum of all reductions' lengths on the
 * way. */
static double chain_length(const ks_model_config *c) {
  int64_t q = c->n_heads * c->head_dim;
  int64_t layer = 3 * c->hidden_size + q + 2 * c->head_dim + 2 * c->intermediate_size + 16;
  return (double)(2 * c->n_layers * layer + c->vocab_size + c->hidden_size);
}

/* Gradients of one adapter tensor against differences. S of an element is the sum of the targets'
 * contributions without their signs; the error that comes down with the gradient is of the scale of the whole
 * tensor: its largest S. */
static void check_tensor(const ks_twin *t, ks_twin_adapter *a, int32_t *const *tokens, const float *grads,
                         int64_t begin, int64_t n, const char *name) {
  double reference[512] = {0}, scale = 0;
  cr_assert_leq(n, 512);
  for (int64_t i = 0; i < n; i++) {
    double derivatives[N_TARGETS], sum = 0;
    oracle_derivatives(t, a, begin + i, tokens, derivatives);
    for (int j = 0; j < N_TARGETS; j++) {
      reference[i] += derivatives[j];
      sum += fabs(derivatives[j]);
    }
    scale = fmax(scale, sum);
  }
  cr_assert_gt(scale, 0, "%s: no gradient", name);
  for (int64_t i = 0; i < n; i++) {
    double tol = U * fabs(reference[i]) + (4 + sqrt(chain_length(&t->model.config))) * U * scale;
    double err = fabs((double)grads[begin + i] - reference[i]);
    if (!(err <= tol))
      cr_assert(false, "%s: gradient %ld is %g, differences give %g, off by %g > %g", name, (long)i,
                (double)grads[begin + i], reference[i], err, tol);
  }
}

static void check_gradients(ks_ctx *ctx, const ks_twin_case *c, uint32_t mask, int64_t max_checks) {
  ks_twin t;
  ks_twin_adapter a;
  problem p;
  int32_t *tokens[N_SEQUENCES];
  ks_twin_make(&t, ctx, &c->config, KS_DTYPE_F32, 7);
  ks_twin_adapter_make(&a, ctx, &c->config, 3, mask, 8);
  begin_problem(&p, ctx);
  for (int s = 0; s < N_SEQUENCES; s++) {
    tokens[s] = ks_twin_tokens(sequences[s].length + 1, c->config.vocab_size, (uint64_t)s);
    add_sequence(&p, tokens[s], sequences[s].length, sequences[s].begin);
  }
  add_segment(&p, 0, p.batch.n_rows, &a, 0);
  ks_run *run = make_run(&t.model, true);
  run_backward(run, &p);
  float *grads = ks_twin_download(ctx, a.grads, a.n);
  double sum = 0, expected = 0, losses[N_TARGETS];
  oracle_losses(&t, &a, tokens, losses);
  for (int i = 0; i < N_TARGETS; i++)
    expected += losses[i];
  for (int64_t i = 0; i < p.n_targets; i++)
    sum += 0.125 * (double)p.loss[i];
  double tol = (4 + sqrt(chain_length(&c->config))) * U * expected;
  cr_expect(fabs(sum - expected) <= tol, "%s: loss %.9g, oracle %.9g", c->name, sum, expected);
  for (int64_t i = 0; i < c->config.n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    char name[128];
    ks_oracle_llama_shape(&c->config, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    if (a.loras[i].rank == 0) continue;
    snprintf(name, sizeof name, "%s, targets 0x%x, layer %ld, target %ld", c->name, mask,
             (long)(i / KS_N_TARGETS), (long)(i % KS_N_TARGETS));
    check_tensor(&t, &a, tokens, grads, a.loras[i].grad_a - a.grads, ks_min_i64(3 * n_in, max_checks), name);
    check_tensor(&t, &a, tokens, grads, a.loras[i].grad_b_t - a.grads, ks_min_i64(3 * n_out, max_checks),
                 name);
  }
  for (int s = 0; s < N_SEQUENCES; s++)
    free(tokens[s]);
  free(p.tokens);
  free(grads);
  ks_run_destroy(run);
  ks_twin_adapter_free(&a);
  ks_twin_free(&t);
}

Test(forward, gradients_equal_central_differences) {
  ks_ctx *ctx = ks_twin_ctx(1);
  for (int i = 0; i < KS_N_TWIN_CASES; i++)
    check_gradients(ctx, &ks_twin_cases[i], ALL_TARGETS, 10);
  ks_ctx_destroy(ctx);
}

Test(forward, gradients_of_some_targets) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const uint32_t masks[] = {1, 2, 4, 8, 16, 32, 64, 1 | 4, 8 | 64, 2 | 32};
  for (size_t i = 0; i < sizeof masks / sizeof masks[0]; i++)
    check_gradients(ctx, &ks_twin_cases[i % 3], masks[i], 8);
  ks_ctx_destroy(ctx);
}

Test(forward, the_pass_stops_at_the_lowest_adapter) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_model_config *c = &ks_twin_cases[0].config;
  ks_twin t;
  ks_twin_make(&t, ctx, c, KS_DTYPE_F32, 3);
  ks_run *run = make_run(&t.model, true);
  for (int lowest = 0; lowest < KS_N_TARGETS; lowest++) {
    ks_twin_adapter a;
    problem p;
    float *grads[2];
    for (int zeroed = 0; zeroed < 2; zeroed++) { /* layer 0 without adapters; then with B = 0 there */
      ks_twin_adapter_make(&a, ctx, c, 2, ALL_TARGETS, 4);
      for (int i = 0; i < KS_N_TARGETS + lowest; i++) {
        int64_t n_out, n_in;
        ks_oracle_llama_shape(c, i % KS_N_TARGETS, &n_out, &n_in);
        ks_must(
            ks_mem_zero(ctx, a.weights + (a.loras[i].b_t - a.weights), (size_t)(2 * n_out) * sizeof(float)));
        if (!zeroed) a.loras[i].rank = 0;
      }
      begin_problem(&p, ctx);
      int32_t *tokens = ks_twin_tokens(20, c->vocab_size, 1);
      add_sequence(&p, tokens, 19, 5);
      add_segment(&p, 0, 19, &a, 0);
      run_backward(run, &p);
      grads[zeroed] = ks_twin_download(ctx, a.grads, a.n);
      if (zeroed == 0) {
        int64_t first = a.loras[KS_N_TARGETS + lowest].grad_a - a.grads;
        for (int64_t i = 0; i < first; i++)
          cr_assert_eq(grads[0][i], 0, "a gradient below the lowest adapter");
      } else {
        int64_t first = a.loras[KS_N_TARGETS + lowest].grad_a - a.grads;
        cr_expect_arr_eq(grads[0] + first, grads[1] + first, (size_t)(a.n - first) * sizeof(float),
                         "lowest target %d: gradients above differ", lowest);
      }
      free(tokens);
      free(p.tokens);
      ks_twin_adapter_free(&a);
    }
    free(grads[0]);
    free(grads[1]);
  }
  ks_run_destroy(run);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}

Test(forward, logits_equal_the_oracle) {
  ks_ctx *ctx = ks_twin_ctx(1);
  for (int i = 0; i < KS_N_TWIN_CASES; i++) {
    const ks_model_config *c = &ks_twin_cases[i].config;
    ks_twin t;
    ks_twin_make(&t, ctx, c, KS_DTYPE_F32, 11);
    ks_run *run = make_run(&t.model, false);
    problem p;
    begin_problem(&p, ctx);
    int32_t *tokens = ks_twin_tokens(30, c->vocab_size, 2);
    add_sequence(&p, tokens, 9, 1);
    add_sequence(&p, tokens + 9, 20, 1);
    float *logits = malloc(29 * (size_t)c->vocab_size * sizeof *logits);
    double *expected = malloc(29 * (size_t)c->vocab_size * sizeof *expected), scale = 0;
    ks_must(ks_forward_logits(run, &p.batch, logits));
    ks_oracle_llama_logits(&t.oracle, NULL, tokens, 9, expected);
    ks_oracle_llama_logits(&t.oracle, NULL, tokens + 9, 20, expected + 9 * c->vocab_size);
    for (int64_t j = 0; j < 29 * c->vocab_size; j++)
      scale = fmax(scale, fabs(expected[j]));
    for (int64_t j = 0; j < 29 * c->vocab_size; j++) {
      double tol = U * fabs(expected[j]) + (4 + sqrt(chain_length(c))) * U * scale;
      if (!(fabs((double)logits[j] - expected[j]) <= tol))
        cr_assert(false, "%s: logit %ld is %.9g, oracle %.9g", ks_twin_cases[i].name, (long)j,
                  (double)logits[j], expected[j]);
    }
    free(tokens);
    free(logits);
    free(expected);
    free(p.tokens);
    ks_run_destroy(run);
    ks_twin_free(&t);
  }
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- a result is its own */

typedef struct {
  float losses[200], *grads[3], hidden[200 * 32];
  int64_t n_targets, n_hidden;
} outcome;

enum { N_JOBS = 3 };
static const int64_t job_lengths[N_JOBS][2] = {{9, 30}, {33, 4}, {1, 17}};
static const int64_t job_begins[N_JOBS][2] = {{1, 12}, {33, 4}, {1, 2}};

typedef struct {
  float dropout;
  bool company; /* rows that have no adapter */
  int64_t recompute_layers;
} how;

/* Jobs first..last in one batch. */
static void run_jobs(ks_twin *t, ks_twin_adapter *adapters, int first, int last, how h, outcome *out) {
  ks_ctx *ctx = t->model.ctx;
  const ks_model_config *c = &t->model.config;
  problem p;
  begin_problem(&p, ctx);
  for (int j = first; j <= last; j++) {
    int64_t begin = p.batch.n_rows;
    for (int s = 0; s < 2; s++) {
      int32_t *tokens = ks_twin_tokens(job_lengths[j][s] + 1, c->vocab_size, (uint64_t)(10 * j + s));
      add_sequence(&p, tokens, job_lengths[j][s], job_begins[j][s]);
      free(tokens);
    }
    add_segment(&p, begin, p.batch.n_rows - begin, &adapters[j], (uint64_t)j + 77);
    ks_must(ks_mem_zero(ctx, adapters[j].grads, (size_t)adapters[j].n * sizeof(float)));
  }
  int64_t n_targets = p.n_targets, n_rows = p.batch.n_rows;
  if (h.company) {
    int32_t *tokens = ks_twin_tokens(14, c->vocab_size, 5);
    add_sequence(&p, tokens, 13, 3);
    free(tokens);
  }
  p.batch.dropout = h.dropout;
  ks_run *run = make_run_as(&t->model, true, h.recompute_layers);
  run_backward(run, &p);
  for (int64_t i = 0; i < n_targets; i++)
    out->losses[out->n_targets++] = p.loss[i];
  for (int j = first; j <= last; j++)
    out->grads[j] = ks_twin_download(ctx, adapters[j].grads, adapters[j].n);
  const void *hidden = NULL;
  ks_must(ks_forward(run, &p.batch, &hidden));
  const size_t size = ks_ctx_act_size(ctx); /* bits, whatever their type */
  ks_must(ks_mem_download(ctx, (unsigned char *)out->hidden + (size_t)out->n_hidden * size, hidden,
                          (size_t)(n_rows * c->hidden_size) * size));
  out->n_hidden += n_rows * c->hidden_size;
  free(p.tokens);
  ks_run_destroy(run);
}

static void expect_same(const outcome *a, const outcome *b, const ks_twin_adapter *adapters,
                        const char *what) {
  cr_assert_eq(a->n_targets, b->n_targets);
  cr_assert_eq(a->n_hidden, b->n_hidden);
  cr_expect_arr_eq(a->losses, b->losses, (size_t)a->n_targets * sizeof(float), "%s: losses", what);
  cr_expect_arr_eq(a->hidden, b->hidden, (size_t)a->n_hidden * sizeof(float), "%s: hidden", what);
  for (int j = 0; j < N_JOBS; j++)
    cr_expect_arr_eq(a->grads[j], b->grads[j], (size_t)adapters[j].n * sizeof(float), "%s: gradients %d",
                     what, j);
}

static void free_outcome(outcome *o) {
  for (int j = 0; j < N_JOBS; j++)
    free(o->grads[j]);
}

/* All results of a case: together, with company, alone. */
static void run_case(ks_ctx *ctx, const ks_model_config *c, ks_dtype dtype, float dropout,
                     outcome *together) {
  ks_twin t;
  ks_twin_adapter adapters[N_JOBS];
  outcome alone = {.n_targets = 0}, company = {.n_targets = 0};
  const how h = {.dropout = dropout}, with_company = {.dropout = dropout, .company = true};
  ks_twin_make(&t, ctx, c, dtype, 21);
  for (int j = 0; j < N_JOBS; j++)
    ks_twin_adapter_make(&adapters[j], ctx, c, 2 + j, j == 1 ? 1 | 4 | 64 : ALL_TARGETS, (uint64_t)j);
  run_jobs(&t, adapters, 0, N_JOBS - 1, h, together);
  run_jobs(&t, adapters, 0, N_JOBS - 1, with_company, &company);
  for (int j = 0; j < N_JOBS; j++)
    run_jobs(&t, adapters, j, j, h, &alone);
  expect_same(together, &alone, adapters, "together and alone");
  expect_same(together, &company, adapters, "with company");
  free_outcome(&alone);
  free_outcome(&company);
  for (int j = 0; j < N_JOBS; j++)
    ks_twin_adapter_free(&adapters[j]);
  ks_twin_free(&t);
}

Test(forward, a_result_does_not_depend_on_batch_or_threads) {
  const struct {
    ks_dtype dtype;
    float dropout;
  } kinds[] = {{KS_DTYPE_F32, 0}, {KS_DTYPE_F32, 0.3f}, {KS_DTYPE_BF16, 0}};
  for (int i = 0; i < (ks_test_is_shim() ? 2 : KS_N_TWIN_CASES); i++) {
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
      outcome results[2] = {{.n_targets = 0}, {.n_targets = 0}};
      for (int threads = 1; threads <= 2; threads++) {
        ks_ctx *ctx = ks_twin_ctx_as(threads, kinds[k].dtype);
        run_case(ctx, &ks_twin_cases[i].config, kinds[k].dtype, kinds[k].dropout, &results[threads - 1]);
        ks_ctx_destroy(ctx);
      }
      cr_expect_arr_eq(results[0].losses, results[1].losses, sizeof results[0].losses,
                       "1 and 2 threads: losses");
      cr_expect_arr_eq(results[0].hidden, results[1].hidden, sizeof results[0].hidden,
                       "1 and 2 threads: hidden");
      free_outcome(&results[0]);
      free_outcome(&results[1]);
    }
  }
}

/* Adapters everywhere, and such that the backward pass ends inside a layer: at down of the lowest, at o of one. */
Test(forward, what_is_made_again_has_the_same_bits) {
  const struct {
    ks_dtype dtype;
    float dropout;
    uint32_t targets;
  } kinds[] = {{KS_DTYPE_F32, 0.3f, ALL_TARGETS},
               {KS_DTYPE_F32, 0, 64},
               {KS_DTYPE_BF16, 0, 8},
               {KS_DTYPE_BF16, 0, 1 | 16}};
  for (int i = 0; i < (ks_test_is_shim() ? 2 : KS_N_TWIN_CASES); i++) {
    const ks_model_config *c = &ks_twin_cases[i].config;
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
      ks_ctx *ctx = ks_twin_ctx_as(2, kinds[k].dtype);
      ks_twin t;
      ks_twin_adapter adapters[N_JOBS];
      outcome kept;
      ks_twin_make(&t, ctx, c, kinds[k].dtype, 21);
      for (int j = 0; j < N_JOBS; j++)
        ks_twin_adapter_make(&adapters[j], ctx, c, 2 + j, kinds[k].targets, (uint64_t)j);
      for (int64_t n = 0; n <= c->n_layers + 1; n++) {
        outcome again = {.n_targets = 0};
        run_jobs(&t, adapters, 0, N_JOBS - 1, (how){.dropout = kinds[k].dropout, .recompute_layers = n},
                 &again);
        if (n == 0) {
          kept = again;
          continue;
        }
        char what[80];
        snprintf(what, sizeof what, "%s, kind %zu, %ld layers", ks_twin_cases[i].name, k, (long)n);
        expect_same(&kept, &again, adapters, what);
        free_outcome(&again);
      }
      free_outcome(&kept);
      for (int j = 0; j < N_JOBS; j++)
        ks_twin_adapter_free(&adapters[j]);
      ks_twin_free(&t);
      ks_ctx_destroy(ctx);
    }
  }
}

Test(forward, dropout_changes_results_and_depends_on_key_and_step) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_model_config *c = &ks_twin_cases[0].config;
  ks_twin t;
  ks_twin_adapter a;
  ks_twin_make(&t, ctx, c, KS_DTYPE_F32, 5);
  ks_twin_adapter_make(&a, ctx, c, 4, ALL_TARGETS, 6);
  ks_run *run = make_run(&t.model, true);
  float losses[4];
  for (int k = 0; k < 4; k++) {
    problem p;
    begin_problem(&p, ctx);
    int32_t *tokens = ks_twin_tokens(11, c->vocab_size, 1);
    add_sequence(&p, tokens, 10, 10);
    add_segment(&p, 0, 10, &a, k == 2 ? 9 : 8);
    p.batch.dropout = k == 0 ? 0 : 0.5f;
    p.batch.dropout_step = k == 3 ? 1 : 0;
    run_backward(run, &p);
    losses[k] = p.loss[0];
    for (int j = 0; j < k; j++)
      cr_expect_neq(losses[k], losses[j], "losses %d and %d are equal", j, k);
    free(tokens);
    free(p.tokens);
  }
  ks_run_destroy(run);
  ks_twin_adapter_free(&a);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- memory, embeddings, errors */

Test(forward, a_run_holds_what_was_promised) {
  ks_ctx *ctx = ks_twin_ctx(1);
  for (int i = 0; i < 24; i++) {
    ks_twin t;
    ks_run *run = NULL;
    ks_run_params p = {.max_rows = 64,
                       .max_seqs = 3,
                       .max_rank = i & 1 ? 8 : 0,
                       .backward = i & 2,
                       .no_loss = i & 4,
                       .recompute_layers = i / 8};
    size_t promised = 0;
    ks_twin_make(&t, ctx, &ks_twin_cases[i % KS_N_TWIN_CASES].config, KS_DTYPE_F32, 5);
    ks_must(ks_run_bytes(&t.model, &p, &promised));
    for (int64_t l = 0; p.backward && l < t.model.config.n_layers; l++) {
      for (int j = 0; j < KS_N_TARGETS; j++)
        ks_must(ks_weight_prepare_backward(ctx, t.model.layers[l].linear[j]));
    }
    if (p.backward) ks_must(ks_weight_prepare_backward(ctx, t.model.head));
    size_t weights = ks_mem_used(ctx);
    ks_must(ks_run_create(&t.model, &p, &run));
    size_t used = ks_mem_used(ctx) - weights;
    cr_expect_leq(used, promised);
    cr_expect_leq(promised - used, 64 * 64 + 2048, "%zu promised, %zu in the arena", promised, used);
    ks_run_destroy(run);
    cr_expect_eq(ks_mem_used(ctx), weights);
    ks_twin_free(&t);
    cr_expect_eq(ks_mem_used(ctx), 0);
  }
  ks_ctx_destroy(ctx);
}

Test(forward, embeddings_are_pooled_hidden_states) {
  ks_ctx *ctx = ks_twin_ctx(2);
  const ks_model_config *c = &ks_twin_cases[2].config;
  ks_twin t;
  ks_twin_make(&t, ctx, c, KS_DTYPE_F32, 5);
  enum { N = 6, COLS = 16 };
  const int64_t lengths[N] = {5, 1, 40, 12, 60, 3};
  int32_t *tokens[N];
  ks_tokens texts[N];
  for (int i = 0; i < N; i++) {
    tokens[i] = ks_twin_tokens(lengths[i], c->vocab_size, (uint64_t)i);
    texts[i] = (ks_tokens){tokens[i], lengths[i]};
  }
  void *out = NULL;
  ks_must(ks_mem_alloc(ctx, N * COLS * sizeof(float), &out));
  ks_run *run = make_run(&t.model, false);
  for (int pooling = KS_POOL_LAST; pooling <= KS_POOL_MEAN; pooling++) {
    float first[N * COLS], again[N * COLS], hidden[64 * COLS];
    const int64_t batches[] = {0, 1, 50, 70};
    for (int k = 0; k < 4; k++) {
      ks_embed_params p = {.pooling = (ks_pooling)pooling, .max_tokens = 32, .batch_rows = batches[k]};
      ks_must(ks_embed_texts(&t.model, texts, N, &p, NULL, out));
      ks_must(ks_mem_download(ctx, k ? again : first, out, sizeof first));
      if (k) cr_expect_arr_eq(first, again, sizeof first, "batches of %ld rows", (long)batches[k]);
    }
    for (int i = 0; i < N; i++) {
      int64_t n = ks_min_i64(lengths[i], 32), offsets[2] = {0, n};
      const void *h = NULL;
      ks_must(ks_forward(
          run, &(ks_batch){.tokens = tokens[i], .n_rows = n, .seq_offsets = offsets, .n_seqs = 1}, &h));
      ks_must(ks_mem_download(ctx, hidden, h, (size_t)(n * COLS) * sizeof(float)));
      for (int j = 0; j < COLS; j++) {
        double mean = 0, size = 0;
        for (int64_t r = 0; r < n; r++) {
          mean += (double)hidden[r * COLS + j] / (double)n;
          size += fabs((double)hidden[r * COLS + j]) / (double)n;
        }
        if (pooling == KS_POOL_LAST)
          cr_expect_eq(first[i * COLS + j], hidden[(n - 1) * COLS + j]);
        else
          cr_expect(fabs((double)first[i * COLS + j] - mean) <=
                    U * fabs(mean) + (4 + sqrt((double)n)) * U * size);
      }
    }
  }
  ks_run_destroy(run);
  ks_mem_free(ctx, out);
  for (int i = 0; i < N; i++)
    free(tokens[i]);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}

Test(forward, illegal_sequences_are_refused) {
  ks_ctx *ctx = ks_twin_ctx(1);
  ks_twin t;
  ks_twin_make(&t, ctx, &ks_twin_cases[0].config, KS_DTYPE_F32, 5);
  ks_run *run = make_run(&t.model, true);
  int32_t tokens[300] = {0}, alien[4] = {0, 1, 61, 2};
  const struct {
    const int32_t *tokens;
    int64_t n_rows, n_seqs, offsets[4];
  } bad[] = {{tokens, 201, 1, {0, 201}}, {tokens, 4, 3, {0, 3, 3, 4}}, {tokens, 4, 1, {1, 4}},
             {tokens, 4, 1, {0, 3}},     {tokens, 65, 1, {0, 65}},     {alien, 4, 1, {0, 4}},
             {tokens, 4, 9, {0, 4}},     {NULL, 4, 1, {0, 4}},         {tokens, 4, 1, {0, 5}}};
  const void *hidden = NULL;
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    ks_batch b = {.tokens = bad[i].tokens,
                  .n_rows = bad[i].n_rows,
                  .seq_offsets = bad[i].offsets,
                  .n_seqs = bad[i].n_seqs};
    cr_expect_eq(ks_forward(run, &b, &hidden), KS_EINVAL, "batch %zu", i);
  }
  ks_must(ks_forward(run, &(ks_batch){.n_rows = 0}, &hidden));
  size_t bytes;
  cr_expect_eq(ks_run_bytes(&t.model, &(ks_run_params){.max_rows = 0, .max_seqs = 1}, &bytes), KS_EINVAL);
  cr_expect_eq(
      ks_run_bytes(&t.model, &(ks_run_params){.max_rows = 1, .max_seqs = 1, .max_rank = 257}, &bytes),
      KS_EINVAL);
  ks_run_destroy(run);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}

Test(forward, illegal_segments_are_refused) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_model_config *c = &ks_twin_cases[0].config;
  ks_twin t;
  ks_twin_adapter a, wide;
  ks_twin_make(&t, ctx, c, KS_DTYPE_F32, 5);
  ks_twin_adapter_make(&a, ctx, c, 2, 1, 6);
  ks_twin_adapter_make(&wide, ctx, c, 9, 1, 6);
  ks_run *run = make_run(&t.model, true);
  const int32_t tokens[4] = {0};
  const int64_t offsets[] = {0, 2, 4};
  const struct {
    ks_segment segments[2];
    int64_t n;
    const ks_adapter_view *view;
  } bad[] = {{{{1, 2, 0, 0}}, 1, &a.view},  {{{0, 5, 0, 0}}, 1, &a.view},
             {{{0, 4, 1, 0}}, 1, &a.view},  {{{2, 2, 0, 0}, {0, 2, 0, 0}}, 2, &a.view},
             {{{0, -2, 0, 0}}, 1, &a.view}, {{{0, 4, 0, 0}}, 1, &wide.view},
             {{{-2, 4, 0, 0}}, 1, &a.view}};
  const void *hidden = NULL;
  ks_batch b = {.tokens = tokens, .n_rows = 4, .seq_offsets = offsets, .n_seqs = 2, .n_adapters = 1};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    b.segments = bad[i].segments;
    b.n_segments = bad[i].n;
    b.adapters = bad[i].view;
    cr_expect_eq(ks_forward(run, &b, &hidden), KS_EINVAL, "segments %zu", i);
  }
  b.segments = NULL;
  cr_expect_eq(ks_forward(run, &b, &hidden), KS_EINVAL);
  ks_run_destroy(run);
  ks_twin_adapter_free(&a);
  ks_twin_adapter_free(&wide);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}

Test(forward, illegal_targets_and_runs_are_refused) {
  ks_ctx *ctx = ks_twin_ctx(1);
  ks_twin t;
  ks_twin_make(&t, ctx, &ks_twin_cases[0].config, KS_DTYPE_F32, 5);
  ks_run *run = make_run(&t.model, true), *mute = NULL;
  ks_must(ks_run_create(&t.model, &(ks_run_params){.max_rows = 8, .max_seqs = 2, .no_loss = true}, &mute));
  const int32_t tokens[4] = {0}, targets[2] = {1, 2};
  const int64_t offsets[] = {0, 4}, rows[] = {1, 3};
  const int64_t bad_rows[][2] = {{3, 1}, {1, 4}, {-1, 3}, {2, 2}};
  float loss[2], scale[2] = {1, 1};
  ks_batch b = {.tokens = tokens, .n_rows = 4, .seq_offsets = offsets, .n_seqs = 1};
  ks_must(ks_forward_loss(run, &b, rows, targets, 2, loss));
  ks_must(ks_forward_loss(run, &b, NULL, NULL, 0, NULL));
  for (size_t i = 0; i < sizeof bad_rows / sizeof bad_rows[0]; i++)
    cr_expect_eq(ks_forward_loss(run, &b, bad_rows[i], targets, 2, loss), KS_EINVAL, "rows %zu", i);
  cr_expect_eq(ks_forward_loss(run, &b, rows, (const int32_t[]){1, 61}, 2, loss), KS_EINVAL,
               "an alien target");
  cr_expect_eq(ks_forward_loss(mute, &b, rows, targets, 2, loss), KS_EINVAL);
  cr_expect_eq(ks_forward_backward(mute, &b, rows, targets, scale, 2, loss), KS_EINVAL);
  cr_expect_eq(ks_forward_backward(run, &b, rows, targets, NULL, 2, loss), KS_EINVAL);
  ks_run_destroy(mute);
  ks_run_destroy(run);
  ks_twin_free(&t);
  ks_ctx_destroy(ctx);
}
