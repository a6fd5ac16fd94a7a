/* Whole models against PyTorch, transformers and PEFT: tests/fixtures/make_llama_fixtures.py. An error may be
 * at most twice the one that PyTorch itself makes in the same type (float32, bf16), and one unit in the last
 * place of that type at the array's scale. */
#include "core/model/forward.h"
#include "tests/oracle/llama_fixture.h"
#include "tests/oracle/model_twin.h"
#include <criterion/criterion.h>
#include <stdio.h>

enum { N_EXAMPLES = 4, MAX_ROWS = 64 };

typedef struct {
  ks_fixture f;
  ks_dtype dtype;
  ks_ctx *ctx;
  ks_model *model;
  ks_run *run;
  int32_t *tokens, *lengths, *begins;
  int64_t offsets[N_EXAMPLES + 1];
  ks_twin_adapter adapter; /* weights of the fixture */
  ks_batch batch;
  ks_segment segment;
} loaded;

static void load(loaded *x, const char *name, ks_dtype dtype) {
  memset(x, 0, sizeof *x);
  ks_fixture_load(&x->f, KS_SOURCE_DIR, name);
  x->dtype = dtype;
  x->ctx = ks_twin_ctx_as(2, dtype);
  ks_must(ks_model_load(x->ctx, x->f.folder, &(ks_model_load_params){.dtype = dtype}, &x->model));
  x->tokens = ks_fixture_ints(&x->f, "tokens");
  x->lengths = ks_fixture_ints(&x->f, "lengths");
  x->begins = ks_fixture_ints(&x->f, "loss_begin");
  int32_t rank = (int32_t)ks_fixture_get(&x->f, "rank")->values[0];
  ks_twin_adapter_make(&x->adapter, x->ctx, &x->model->config, rank, (1u << KS_N_TARGETS) - 1, 0);
  float *weights = ks_fixture_floats(&x->f, "weights0");
  cr_assert_eq(ks_fixture_get(&x->f, "weights0")->n, x->adapter.n);
  ks_must(ks_mem_upload(x->ctx, x->adapter.weights, weights, (size_t)x->adapter.n * sizeof *weights));
  free(weights);
  for (int64_t i = 0; i < x->model->config.n_layers * KS_N_TARGETS; i++)
    x->adapter.loras[i].scale = (float)(ks_fixture_get(&x->f, "alpha")->values[0] / rank);
  for (int i = 0; i < N_EXAMPLES; i++)
    x->offsets[i + 1] = x->offsets[i] + x->lengths[i];
  x->segment = (ks_segment){0, x->offsets[N_EXAMPLES], 0, 0};
  x->batch = (ks_batch){.tokens = x->tokens,
                        .n_rows = x->offsets[N_EXAMPLES],
                        .seq_offsets = x->offsets,
                        .n_seqs = N_EXAMPLES,
                        .segments = &x->segment,
                        .n_segments = 1,
                        .adapters = &x->adapter.view,
                        .n_adapters = 1};
  ks_run_params p = {.max_rows = MAX_ROWS, .max_seqs = N_EXAMPLES, .max_rank = rank, .backward = true};
  ks_must(ks_run_create(x->model, &p, &x->run));
}

static void unload(loaded *x) {
  ks_run_destroy(x->run);
  ks_twin_adapter_free(&x->adapter);
  ks_model_destroy(x->model);
  ks_ctx_destroy(x->ctx);
  ks_fixture_free(&x->f);
  free(x->tokens);
  free(x->lengths);
  free(x->begins);
}

/* Largest error and largest value of values[0..n) against reference[0..n), or their Euclidean norms. NaN: a value is none. */
typedef struct {
  double error, scale;
} distance;
static distance distance_of(const float *values, const double *reference, int64_t n, bool euclidean) {
  distance d = {0, 0};
  for (int64_t i = 0; i < n; i++) {
    double off = fabs((double)values[i] - reference[i]), size = fabs(reference[i]);
    d.error = euclidean ? hypot(d.error, off) : fmax(d.error, off);
    d.scale = euclidean ? hypot(d.scale, size) : fmax(d.scale, size);
    if (!isfinite(values[i])) d.error = NAN;
    if (!isfinite(d.error)) break;
  }
  return d;
}

static void check(const loaded *x, const char *what, distance d, double torch) {
  cr_expect(d.error <= 2 * torch + ks_fixture_ulp(x->dtype) * d.scale,
            "%s: %s in %s is off by %g; PyTorch by %g, scale %g", strrchr(x->f.folder, '/') + 1, what,
            ks_dtype_name(x->dtype), d.error, torch, d.scale);
}

/* PyTorch's own errors in the type at hand. */
static const ks_fixture_array *torch_errors(const loaded *x, const char *array) {
  char name[64];
  snprintf(name, sizeof name, "%s%s_error", array, x->dtype == KS_DTYPE_BF16 ? "_bf16" : "");
  return ks_fixture_get(&x->f, name);
}

static void check_array(const loaded *x, const char *array, const float *values, int64_t n) {
  const ks_fixture_array *reference = ks_fixture_get(&x->f, array);
  cr_assert_eq(reference->n, n, "%s has %ld values, not %ld", array, (long)reference->n, (long)n);
  check(x, array, distance_of(values, reference->values, n, false), torch_errors(x, array)->values[0]);
}

Test(llama_fixtures, logits_equal_transformers) {
  for (int c = 0; ks_llama_cases[c / 2]; c++) {
    loaded x;
    load(&x, ks_llama_cases[c / 2], (ks_dtype)(c % 2));
    float *logits = malloc((size_t)(x.batch.n_rows * x.model->config.vocab_size) * sizeof *logits);
    ks_must(ks_forward_logits(x.run, &x.batch, logits));
    check_array(&x, "logits", logits, x.batch.n_rows * x.model->config.vocab_size);
    free(logits);
    unload(&x);
  }
}

/* The relative error of one tensor scatters: PyTorch's own is four times as large in one as in the next. So
 * each tensor may be off by twice PyTorch's error there or, where that was lucky, twice its root mean square
 * over all tensors; and the root mean square over all tensors may be half as much again as PyTorch's, not
 * more. */
static void check_gradients(const loaded *x, const float *grads, const double *reference, const double *torch,
                            int64_t n_tensors) {
  double ours = 0, theirs = 0, usual = 0;
  for (int pass = 0; pass < 2; pass++) {
    int64_t begin = 0;
    for (int64_t i = 0; i < n_tensors; i++) {
      const float *next = i + 1 == n_tensors ? x->adapter.grads + x->adapter.n
                          : i & 1            ? x->adapter.loras[(i + 1) / 2].grad_a
                                             : x->adapter.loras[i / 2].grad_b_t;
      int64_t size = next - x->adapter.grads - begin;
      const distance d = distance_of(grads + begin, reference + begin, size, true);
      char what[64];
      snprintf(what, sizeof what, "gradient of layer %ld, target %ld, %s", (long)(i / 2 / KS_N_TARGETS),
               (long)(i / 2 % KS_N_TARGETS), i & 1 ? "B" : "A");
      if (pass > 0) check(x, what, d, fmax(torch[i], usual * d.scale));
      if (pass == 0 && d.scale > 0)
        ours = hypot(ours, d.error / d.scale), theirs = hypot(theirs, torch[i] / d.scale);
      begin += size;
    }
    usual = theirs / sqrt((double)n_tensors);
  }
  cr_expect(ours <= 1.5 * theirs, "%s in %s: gradients are off by %g of their size, PyTorch's by %g",
            strrchr(x->f.folder, '/') + 1, ks_dtype_name(x->dtype), ours / sqrt((double)n_tensors), usual);
}

Test(llama_fixtures, losses_and_every_adapter_gradient_equal_peft) {
  for (int c = 0; ks_llama_cases[c / 2]; c++) {
    loaded x;
    load(&x, ks_llama_cases[c / 2], (ks_dtype)(c % 2));
    int64_t rows[MAX_ROWS], n = 0;
    int32_t targets[MAX_ROWS];
    float scale[MAX_ROWS], loss[MAX_ROWS];
    for (int e = 0; e < N_EXAMPLES; e++) {
      for (int64_t i = x.begins[e]; i < x.lengths[e]; i++) {
        rows[n] = x.offsets[e] + i - 1;
        targets[n++] = x.tokens[x.offsets[e] + i];
      }
    }
    for (int64_t i = 0; i < n; i++)
      scale[i] = (float)(1.0 / (double)n);
    ks_must(ks_forward_backward(x.run, &x.batch, rows, targets, scale, n, loss));
    ks_must(ks_sync(x.ctx));
    check_array(&x, "token_loss", loss, n);
    float *grads = ks_twin_download(x.ctx, x.adapter.grads, x.adapter.n);
    const ks_fixture_array *reference = ks_fixture_get(&x.f, "grads"), *torch = torch_errors(&x, "grads");
    int64_t n_tensors = x.model->config.n_layers * KS_N_TARGETS * 2;
    cr_assert_eq(torch->n, n_tensors);
    check_gradients(&x, grads, reference->values, torch->values, n_tensors);
    free(grads);
    unload(&x);
  }
}
