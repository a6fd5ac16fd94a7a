#include "core/adapt/adapt.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/llama_fixture.h"
#include "tests/oracle/model_twin.h"
#include <criterion/criterion.h>
#include <stdio.h>

#define ALL_TARGETS ((1u << KS_N_TARGETS) - 1)
#define U           0x1p-24
enum { N_JOBS = 8, N_EXAMPLES = 7 };

/* ---------------------------------------------------------------- against PyTorch */

typedef struct {
  float *weights, *m, *v;
  int64_t n;
} state;

static state save(const ks_adapter *a) {
  size_t n = (size_t)a->n_params;
  state s = {malloc(n * sizeof(float)), malloc(n * sizeof(float)), malloc(n * sizeof(float)), a->n_params};
  ks_must(ks_adapter_save(a, s.weights, s.m, s.v));
  return s;
}
static void free_state(state *s) {
  free(s->weights);
  free(s->m);
  free(s->v);
}
static void expect_same_state(const state *a, const state *b, const char *what) {
  cr_assert_eq(a->n, b->n);
  cr_expect_arr_eq(a->weights, b->weights, (size_t)a->n * sizeof(float), "%s: weights", what);
  cr_expect_arr_eq(a->m, b->m, (size_t)a->n * sizeof(float), "%s: first moments", what);
  cr_expect_arr_eq(a->v, b->v, (size_t)a->n * sizeof(float), "%s: second moments", what);
}

/* PyTorch's own errors in float32 or bf16. */
static const ks_fixture_array *torch_errors(const ks_fixture *f, const char *array, ks_dtype dtype) {
  char name[64];
  snprintf(name, sizeof name, "%s%s_error", array, dtype == KS_DTYPE_BF16 ? "_bf16" : "");
  return ks_fixture_get(f, name);
}

/* An error may be twice PyTorch's own in the same type, and one unit in the last place. A mean's error can
 * cancel in one run and not in another: what single tokens are off by bounds it. */
static void check_steps(const ks_fixture *f, ks_dtype dtype, const char *name, const float *values,
                        int64_t n) {
  const ks_fixture_array *reference = ks_fixture_get(f, name), *torch = torch_errors(f, name, dtype);
  double worst = strcmp(name, "step_loss") == 0 ? torch_errors(f, "token_loss", dtype)->values[0] : 0;
  cr_assert_eq(reference->n, n);
  for (int64_t i = 0; i < n; i++) {
    worst = fmax(worst, torch->values[i]); /* errors of the steps before come along */
    double err = fabs((double)values[i] - reference->values[i]),
           tol = 2 * worst + ks_fixture_ulp(dtype) * fabs(reference->values[i]);
    cr_expect(err <= tol, "%s: %s of step %ld is %.9g, not %.9g; PyTorch is off by %g", f->folder, name,
              (long)i, (double)values[i], reference->values[i], worst);
  }
}

Test(train, twenty_steps_equal_pytorch) {
  for (int c = 0; ks_llama_cases[c / 2]; c++) {
    const ks_dtype dtype = (ks_dtype)(c % 2);
    ks_fixture f;
    ks_model *model = NULL;
    ks_adapter *a = NULL;
    ks_ctx *ctx = ks_twin_ctx_as(2, dtype);
    ks_fixture_load(&f, KS_SOURCE_DIR, ks_llama_cases[c / 2]);
    ks_must(ks_model_load(ctx, f.folder, &(ks_model_load_params){.dtype = dtype}, &model));
    int32_t *tokens = ks_fixture_ints(&f, "tokens"), *lengths = ks_fixture_ints(&f, "lengths");
    int32_t *begins = ks_fixture_ints(&f, "loss_begin");
    float *weights = ks_fixture_floats(&f, "weights0");
    ks_adapter_params p = {.rank = (int32_t)ks_fixture_get(&f, "rank")->values[0],
                           .alpha = (float)ks_fixture_get(&f, "alpha")->values[0],
                           .targets = ALL_TARGETS};
    ks_must(ks_adapter_create(ctx, &model->config, &p, 0, &a));
    float *zeros = calloc((size_t)a->n_params, sizeof *zeros);
    ks_must(ks_adapter_load(a, weights, zeros, zeros, ks_fixture_get(&f, "weights0")->n, 0));
    ks_example examples[4];
    for (int64_t i = 0, at = 0; i < 4; at += lengths[i++])
      examples[i] = (ks_example){tokens + at, lengths[i], begins[i]};
    const double *t = ks_fixture_get(&f, "train")->values;
    ks_train_job job = {.adapter = a, .examples = examples, .n_examples = 4};
    job.params = (ks_train_params){.learning_rate = t[0],
                                   .beta1 = t[1],
                                   .beta2 = t[2],
                                   .eps = t[3],
                                   .weight_decay = t[4],
                                   .max_grad_norm = t[5],
                                   .warmup = t[6],
                                   .steps = (int64_t)t[7],
                                   .schedule = KS_SCHEDULE_COSINE,
                                   .batch_size = 4};
    ks_must(ks_train(model, &job, 1, NULL, NULL));
    check_steps(&f, dtype, "step_loss", job.step_loss, job.n_steps);
    check_steps(&f, dtype, "step_norm", job.step_grad_norm, job.n_steps);
    state s = save(a);
    const ks_fixture_array *reference = ks_fixture_get(&f, "weights");
    double torch = torch_errors(&f, "weights", dtype)->values[0], error = 0, scale = 0;
    for (int64_t i = 0; i < s.n; i++) {
      error = hypot(error, (double)s.weights[i] - reference->values[i]);
      scale = hypot(scale, reference->values[i]);
    }
    cr_expect(error <= 2 * torch + ks_fixture_ulp(dtype) * scale,
              "%s in %s: weights are off by %g; PyTorch by %g", ks_llama_cases[c / 2], ks_dtype_name(dtype),
              error, torch);
    cr_expect_eq(a->step, 20);
    free_state(&s);
    free(zeros);
    free(weights);
    free(tokens);
    free(lengths);
    free(begins);
    free(job.step_loss);
    free(job.step_grad_norm);
    ks_adapter_destroy(a);
    ks_model_destroy(model);
    ks_fixture_free(&f);
    ks_ctx_destroy(ctx);
  }
}

/* ---------------------------------------------------------------- jobs */

typedef struct {
  ks_ctx *ctx;
  size_t own_bytes; /* of the context itself */
  ks_twin twin;
  ks_adapter *adapters[N_JOBS];
  int32_t *tokens[N_EXAMPLES];
  ks_example examples[N_EXAMPLES];
} world;

static void make_world(world *w, int n_threads, int which) {
  const ks_model_config *c = &ks_twin_cases[which].config;
  const int64_t lengths[N_EXAMPLES] = {12, 30, 2, 7, 19, 5, 25}, begins[N_EXAMPLES] = {4, 1, 1, 6, 18, 1, 9};
  w->ctx = ks_twin_ctx(n_threads);
  w->own_bytes = ks_mem_used(w->ctx);
  ks_twin_make(&w->twin, w->ctx, c, KS_DTYPE_F32, 41);
  for (int i = 0; i < N_EXAMPLES; i++) {
    w->tokens[i] = ks_twin_tokens(lengths[i], c->vocab_size, (uint64_t)i);
    w->examples[i] = (ks_example){w->tokens[i], lengths[i], begins[i]};
  }
  for (int i = 0; i < N_JOBS; i++) {
    ks_adapter_params p = {.rank = 1 + i % 4, .alpha = 8, .targets = i % 3 ? ALL_TARGETS : 1 | 4 | 8};
    ks_must(ks_adapter_create(w->ctx, c, &p, (uint64_t)i, &w->adapters[i]));
  }
}

static void free_world(world *w) {
  for (int i = 0; i < N_JOBS; i++)
    ks_adapter_destroy(w->adapters[i]);
  for (int i = 0; i < N_EXAMPLES; i++)
    free(w->tokens[i]);
  ks_twin_free(&w->twin);
  if (!ks_test_is_cuda()) /* there a context keeps recorded steps and their blocks */
    cr_expect_leq(ks_mem_used(w->ctx), w->own_bytes + (1 << 22), "only the context's own scratch is left");
  ks_ctx_destroy(w->ctx);
}

static const ks_train_params usual = {.learning_rate = 2e-2,
                                      .beta1 = 0.9,
                                      .beta2 = 0.99,
                                      .eps = 1e-8,
                                      .weight_decay = 0.01,
                                      .max_grad_norm = 1,
                                      .warmup = 0.1,
                                      .schedule = KS_SCHEDULE_LINEAR,
                                      .batch_size = 3,
                                      .epochs = 3,
                                      .seed = 12,
                                      .round = 2};

/* Jobs that differ in examples, batches, epochs, dropout, seeds. */
static ks_train_job job_of(const world *w, int i) {
  ks_train_job job = {.adapter = w->adapters[i],
                      .examples = w->examples + i % 3,
                      .n_examples = N_EXAMPLES - i % 3,
                      .params = usual};
  job.params.batch_size = 1 + i % 5;
  job.params.micro_batch = i % 4;
  job.params.epochs = 1 + i % 3;
  job.params.steps = i == 6 ? 4 : 0;
  job.params.dropout = i % 4 == 3 ? 0.25f : 0;
  job.params.seed = (uint64_t)(i / 2);
  job.params.schedule = (ks_schedule)(i % 3);
  return job;
}

static void free_job(ks_train_job *job) {
  free(job->step_loss);
  free(job->step_grad_norm);
}

/* On a GPU the sum of a gradient depends on where a batch is cut into passes, so there only the same cuts are
 * compared. */
Test(train, a_cohort_of_eight_equals_each_alone_on_one_thread_or_two) {
  for (int which = 0; which < (ks_test_is_shim() ? 1 : 3); which++) {
    ks_train_job reference[N_JOBS];
    state states[N_JOBS];
    for (int threads = 1; threads <= (ks_test_is_shim() ? 1 : 2); threads++) {
      const ks_train_limits limits[] = {{0}, {60, 1}, {1, 2}}; /* 1: every job in a pass of its own */
      for (int k = 0; k < 4; k++) {                            /* the last: each by itself */
        if (ks_test_is_cuda() && (k == 1 || k == 2)) continue;
        world w;
        ks_train_job jobs[N_JOBS];
        make_world(&w, threads, which);
        for (int i = 0; i < N_JOBS; i++)
          jobs[i] = job_of(&w, i);
        if (k < 3) ks_must(ks_train(&w.twin.model, jobs, N_JOBS, &limits[k], NULL));
        for (int i = 0; k == 3 && i < N_JOBS; i++)
          ks_must(ks_train(&w.twin.model, &jobs[i], 1, NULL, NULL));
        for (int i = 0; i < N_JOBS; i++) {
          state s = save(w.adapters[i]);
          if (threads == 1 && k == 0) {
            reference[i] = jobs[i];
            states[i] = s;
            continue;
          }
          char what[80];
          snprintf(what, sizeof what, "%s, job %d, way %d, %d threads", ks_twin_cases[which].name, i, k,
                   threads);
          cr_assert_eq(jobs[i].n_steps, reference[i].n_steps);
          cr_expect_arr_eq(jobs[i].step_loss, reference[i].step_loss, (size_t)jobs[i].n_steps * sizeof(float),
                           "%s: losses", what);
          cr_expect_arr_eq(jobs[i].step_grad_norm, reference[i].step_grad_norm,
                           (size_t)jobs[i].n_steps * sizeof(float), "%s: norms", what);
          cr_expect_eq(jobs[i].n_tokens, reference[i].n_tokens);
          expect_same_state(&s, &states[i], what);
          free_state(&s);
          free_job(&jobs[i]);
        }
        free_world(&w);
      }
    }
    for (int i = 0; i < N_JOBS; i++) {
      free_state(&states[i]);
      free_job(&reference[i]);
    }
  }
}

Test(train, loss_falls_everything_trainable_moves_nothing_frozen_does) {
  world w;
  make_world(&w, 2, 0);
  const ks_model_config *c = &w.twin.model.config;
  ks_run *run = NULL;
  float before[12 * 61], after[12 * 61];
  int64_t offsets[2] = {0, 12};
  ks_batch b = {.tokens = w.tokens[0], .n_rows = 12, .seq_offsets = offsets, .n_seqs = 1};
  ks_must(ks_run_create(&w.twin.model, &(ks_run_params){.max_rows = 12, .max_seqs = 1}, &run));
  ks_must(ks_forward_logits(run, &b, before));
  state start = save(w.adapters[1]);
  ks_train_job job = {
      .adapter = w.adapters[1], .examples = w.examples, .n_examples = N_EXAMPLES, .params = usual};
  job.params.epochs = 20;
  job.params.weight_decay = 0;
  job.params.warmup = 0;
  ks_must(ks_train(&w.twin.model, &job, 1, NULL, NULL));
  state end = save(w.adapters[1]);
  cr_expect_eq(job.n_steps, 60);
  cr_expect_eq(job.n_steps, ks_train_n_steps(&job.params, N_EXAMPLES));
  cr_expect_eq(w.adapters[1]->step, 60);
  double first = 0, last = 0;
  for (int i = 0; i < 3; i++) {
    first += (double)job.step_loss[i];
    last += (double)job.step_loss[57 + i];
  }
  cr_expect_lt(last, 0.7 * first, "loss %g, then %g", first / 3, last / 3);
  for (int64_t i = 0; i < job.n_steps; i++)
    cr_expect_gt(job.step_grad_norm[i], 0);
  for (int64_t i = 0; i < c->n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in, moved = 0;
    ks_oracle_llama_shape(c, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    int64_t begin = w.adapters[1]->loras[i].a - w.adapters[1]->weights, n = 2 * (n_in + n_out);
    for (int64_t j = begin; j < begin + n; j++)
      moved += start.weights[j] != end.weights[j] && end.m[j] != 0;
    cr_expect_eq(moved, n, "layer %ld, target %ld: %ld of %ld weights moved", (long)(i / KS_N_TARGETS),
                 (long)(i % KS_N_TARGETS), (long)moved, (long)n);
  }
  ks_must(ks_forward_logits(run, &b, after));
  cr_expect_arr_eq(before, after, sizeof before, "the frozen model changed");
  free_state(&start);
  free_state(&end);
  free_job(&job);
  ks_run_destroy(run);
  free_world(&w);
}

/* A gradient is one chain of additions over the batch's rows, however they are cut into passes. */
Test(train, micro_batches_accumulate_to_the_batch) {
  if (ks_test_is_cuda()) cr_skip_test("on a GPU bits depend on where a batch is cut into passes");
  state reference;
  for (int k = 0; k < 6; k++) {
    world w;
    make_world(&w, 1 + k % 2, k / 3);
    ks_train_job job = {
        .adapter = w.adapters[1], .examples = w.examples, .n_examples = N_EXAMPLES, .params = usual};
    job.params.batch_size = N_EXAMPLES;
    job.params.micro_batch = k % 3 == 1 ? 2 : 0;
    job.params.steps = 3;
    ks_must(ks_train(&w.twin.model, &job, 1, &(ks_train_limits){.max_rows = k % 3 == 2 ? 20 : 0}, NULL));
    state s = save(w.adapters[1]);
    if (k % 3 == 0)
      reference = s;
    else {
      expect_same_state(&reference, &s, k % 3 == 1 ? "micro-batches of 2" : "passes of 20 rows");
      free_state(&s);
    }
    if (k % 3 == 2) free_state(&reference);
    free_job(&job);
    free_world(&w);
  }
}

Test(train, rounds_epochs_and_seeds_give_other_orders) {
  float losses[4][21];
  for (int k = 0; k < 4; k++) {
    world w;
    make_world(&w, 1, 3);
    ks_train_job job = {
        .adapter = w.adapters[1], .examples = w.examples, .n_examples = N_EXAMPLES, .params = usual};
    job.params.batch_size = 1;
    job.params.learning_rate = 0; /* so that a loss names its example */
    job.params.round = k == 1;
    job.params.seed = k == 2;
    ks_must(ks_train(&w.twin.model, &job, 1, NULL, NULL));
    cr_assert_eq(job.n_steps, 21);
    memcpy(losses[k], job.step_loss, sizeof losses[k]);
    free_job(&job);
    free_world(&w);
  }
  cr_expect_arr_eq(losses[0], losses[3], sizeof losses[0]);
  cr_expect_arr_neq(losses[0], losses[1], 7 * sizeof(float), "rounds");
  cr_expect_arr_neq(losses[0], losses[2], 7 * sizeof(float), "seeds");
  cr_expect_arr_neq(losses[0], losses[0] + 7, 7 * sizeof(float), "epochs");
  for (int e = 0; e < 3; e++) { /* each epoch has each example once */
    for (int i = 0; i < 7; i++) {
      int found = 0;
      for (int j = 0; j < 7; j++)
        found += losses[1][7 * e + j] == losses[0][i];
      cr_expect_eq(found, 1);
    }
  }
}

Test(train, evaluation_is_the_loss_before_training) {
  world w;
  make_world(&w, 2, 1);
  ks_adapter_view views[N_JOBS];
  ks_example examples[N_EXAMPLES + 1];
  memcpy(examples, w.examples, sizeof w.examples);
  examples[N_EXAMPLES] = (ks_example){w.tokens[0], 5, 9}; /* nothing to learn */
  for (int i = 0; i < N_JOBS; i++) {
    ks_train_job job = {
        .adapter = w.adapters[i], .examples = w.examples, .n_examples = N_EXAMPLES, .params = usual};
    ks_must(ks_train(&w.twin.model, &job, 1, NULL, NULL));
    free_job(&job);
    views[i] = ks_adapter_view_of(w.adapters[i]);
  }
  const int32_t index[N_EXAMPLES + 1] = {5, -1, 2, 5, 0, 7, 2, 0};
  double losses[3][N_EXAMPLES + 1];
  int64_t n_targets[N_EXAMPLES + 1];
  const int64_t bounds[] = {0, 1, 40};
  for (int k = 0; k < 3; k++) {
    ks_must(ks_evaluate_loss(&w.twin.model, examples, index, N_EXAMPLES + 1, views, N_JOBS, bounds[k], NULL,
                             losses[k], n_targets));
    cr_expect_arr_eq(losses[k], losses[0], sizeof losses[0], "%ld rows a pass", (long)bounds[k]);
  }
  for (int i = 0; i < N_EXAMPLES; i++) {
    cr_expect_eq(n_targets[i], examples[i].n_tokens - examples[i].loss_begin);
    if (index[i] < 0) continue;
    ks_train_job job = {
        .adapter = w.adapters[index[i]], .examples = &examples[i], .n_examples = 1, .params = usual};
    job.params.steps = 1;
    job.params.learning_rate = 0;
    ks_must(ks_train(&w.twin.model, &job, 1, NULL, NULL));
    cr_expect_eq(job.step_loss[0], (float)(losses[0][i] / (double)n_targets[i]));
    free_job(&job);
  }
  cr_expect_eq(n_targets[N_EXAMPLES], 0);
  cr_expect_eq(losses[0][N_EXAMPLES], 0);
  double plain;
  ks_must(ks_evaluate_loss(&w.twin.model, &examples[1], NULL, 1, NULL, 0, 0, NULL, &plain, n_targets));
  cr_expect_eq(plain, losses[0][1], "no index is the frozen model");
  ks_must(ks_evaluate_loss(&w.twin.model, NULL, NULL, 0, NULL, 0, 0, NULL, NULL, NULL));
  free_world(&w);
}

/* ---------------------------------------------------------------- edges */

static bool stop_after(void *user, const char *stage, double done, double total) {
  int *calls = user;
  cr_expect_str_eq(stage, "train");
  cr_expect_leq(done, total);
  return --*calls > 0;
}

Test(train, nothing_to_do_interruption_and_refusals) {
  world w;
  make_world(&w, 1, 0);
  ks_model *m = &w.twin.model;
  state start = save(w.adapters[1]);
  ks_train_job none = {.adapter = w.adapters[1], .params = usual};
  ks_must(ks_train(m, &none, 1, NULL, NULL));
  cr_expect_eq(none.n_steps, 0);
  free_job(&none);
  ks_must(ks_train(m, NULL, 0, NULL, NULL));
  ks_example mute = {w.tokens[0], 5, 5};
  ks_train_job silent = {.adapter = w.adapters[1], .examples = &mute, .n_examples = 1, .params = usual};
  ks_must(ks_train(m, &silent, 1, NULL, NULL));
  cr_expect_eq(silent.n_steps, 3);
  cr_expect_eq(silent.n_tokens, 0);
  cr_expect_eq(silent.step_loss[0], 0);
  free_job(&silent);
  state end = save(w.adapters[1]);
  expect_same_state(&start, &end, "a step without targets");
  cr_expect_eq(w.adapters[1]->step, 0);
  free_state(&end);

  size_t before = ks_mem_used(w.ctx);
  int left = 1;
  ks_train_job job = job_of(&w, 1);
  cr_expect_eq(ks_train(m, &job, 1, NULL, &(ks_progress){stop_after, &left}), KS_EINTERRUPTED);
  cr_expect_eq(job.step_loss, NULL);
  cr_expect_eq(ks_mem_used(w.ctx), before);

  ks_train_job pair[2] = {job_of(&w, 1), job_of(&w, 1)};
  cr_expect_eq(ks_train(m, pair, 2, NULL, NULL), KS_EINVAL, "two jobs share an adapter");
  ks_example longer = {w.tokens[0], 66, 1}, empty = {w.tokens[0], 0, 1}, unmasked = {w.tokens[0], 5, 0};
  int32_t alien[2] = {0, 61};
  ks_example foreign = {alien, 2, 1};
  const ks_example *bad[] = {&longer, &empty, &unmasked, &foreign};
  for (int i = 0; i < 4; i++) {
    ks_train_job x = {.adapter = w.adapters[1], .examples = bad[i], .n_examples = 1, .params = usual};
    cr_expect_eq(ks_train(m, &x, 1, NULL, NULL), KS_EINVAL, "example %d", i);
    double loss;
    int64_t n;
    cr_expect_eq(ks_evaluate_loss(m, bad[i], NULL, 1, NULL, 0, 0, NULL, &loss, &n), KS_EINVAL, "example %d",
                 i);
  }
  for (int i = 0; i < 8; i++) {
    ks_train_job x = job_of(&w, 1);
    ks_train_params *p = &x.params;
    double *rates[] = {&p->learning_rate, &p->weight_decay, &p->beta1,        &p->beta2,
                       &p->eps,           &p->warmup,       &p->max_grad_norm};
    if (i < 7)
      *rates[i] = -1;
    else
      p->batch_size = 0;
    cr_expect_eq(ks_train(m, &x, 1, NULL, NULL), KS_EINVAL, "parameter %d", i);
  }
  cr_expect_eq(ks_mem_used(w.ctx), before);
  free_state(&start);
  free_world(&w);
}

Test(train, a_gradient_that_is_not_finite_is_named) {
  world w;
  make_world(&w, 1, 0);
  float *poison = calloc((size_t)w.adapters[2]->n_params, sizeof *poison);
  float *zeros = calloc((size_t)w.adapters[2]->n_params, sizeof *zeros);
  poison[0] = NAN;
  for (int64_t i = 0; i < w.adapters[2]->n_params; i++)
    poison[i] = i ? 1.0f : NAN;
  ks_must(ks_adapter_load(w.adapters[2], poison, zeros, zeros, w.adapters[2]->n_params, 0));
  ks_train_job jobs[2] = {job_of(&w, 1), job_of(&w, 2)};
  cr_expect_eq(ks_train(&w.twin.model, jobs, 2, NULL, NULL), KS_ENUMERIC);
  cr_expect_neq(strstr(ks_error_message(), "job 1, step 1"), NULL, "%s", ks_error_message());
  cr_expect_eq(jobs[0].step_loss, NULL);
  free(poison);
  free(zeros);
  free_world(&w);
}
