/* The cases on single operations: frozen products, similarity, selection. */
#include "core/select/select.h"
#include "experiments/bench.h"

#include <math.h>
#include <stdio.h>

/* n uniform numbers in [-1, 1), as float32 or bf16 values. */
static ks_status random_array(ks_ctx *ctx, ks_dtype dtype, int64_t n, uint64_t seed, void **out) {
  float *host = NULL;
  uint16_t *halves = NULL;
  const size_t bytes = (size_t)n * ks_dtype_size(dtype);
  ks_rng rng = ks_rng_make(seed, KS_RNG_TEST, 1);
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&host, (size_t)n, sizeof *host, "bench"));
  KS_TRY_OUT(ks_alloc_array(&halves, (size_t)n, sizeof *halves, "bench"));
  for (int64_t i = 0; i < n; i++) {
    host[i] = (float)(2 * ks_rng_uniform(&rng) - 1);
    uint32_t bits;
    memcpy(&bits, &host[i], sizeof bits);
    halves[i] = (uint16_t)(bits >> 16);
  }
  KS_TRY_OUT(ks_mem_alloc(ctx, bytes, out));
  KS_TRY_OUT(ks_mem_upload(ctx, *out, dtype == KS_DTYPE_BF16 ? (void *)halves : (void *)host, bytes));
  status = ks_sync(ctx);
out:
  free(halves);
  free(host);
  return status;
}

static ks_status random_acts(ks_ctx *ctx, int64_t n, uint64_t seed, void **out) {
  return random_array(ctx, ks_ctx_act_dtype(ctx), n, seed, out);
}

static ks_status random_floats(ks_ctx *ctx, int64_t n, uint64_t seed, float **out) {
  void *p = NULL;
  ks_status status = random_array(ctx, KS_DTYPE_F32, n, seed, &p);
  *out = p;
  return status;
}

/* Queued operations are timed by the device where it can. */
static ks_status sample(ks_bench *b, ks_status (*fn)(void *), void *arg, bool waits, ks_samples *out) {
  return b->info.has_timer ? ks_bench_sample_cold(b, fn, arg, waits, out) : ks_bench_sample(b, fn, arg, out);
}

/* ---------------------------------------------------------------- frozen products */

typedef struct {
  ks_ctx *ctx;
  ks_linear_args args;
  bool backward;
} product;

static ks_status product_once(void *arg) {
  product *p = arg;
  return p->backward ? ks_linear_backward(p->ctx, &p->args) : ks_linear_forward(p->ctx, &p->args);
}

static ks_status bench_product(ks_bench *b, int64_t n_rows, int64_t n_out, int64_t n_in, bool backward) {
  if (!ks_bench_wants(b, backward ? "linear_backward" : "linear")) return KS_OK;
  ks_weight *w = NULL;
  float *values = NULL;
  void *x = NULL, *y = NULL, *dx = NULL;
  ks_samples samples = {0};
  ks_ceilings before;
  ks_bench_row *row;
  char shape[96];
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&values, (size_t)(n_out * n_in), sizeof *values, "bench"));
  for (int64_t i = 0; i < n_out * n_in; i++)
    values[i] = (float)(i % 17 - 8) / 8;
  KS_TRY_OUT(ks_weight_create(
      b->ctx, &(ks_weight_params){.n_out = n_out, .n_in = n_in, .dtype = b->dtype, .values = values}, &w));
  if (backward) KS_TRY_OUT(ks_weight_prepare_backward(b->ctx, w));
  KS_TRY_OUT(random_acts(b->ctx, n_rows * n_in, 1, &x));
  KS_TRY_OUT(random_acts(b->ctx, n_rows * n_out, 2, &y));
  product p = {b->ctx, {.w = w, .x = x, .y = y, .dy = y, .dx = x, .n_rows = n_rows}, backward};
  if (backward) {
    KS_TRY_OUT(random_acts(b->ctx, n_rows * n_in, 3, &dx));
    p.args.dx = dx;
  }
  /* A CPU keeps two layouts of what goes backward. */
  const size_t bytes = ks_weight_bytes(w) / (backward && !b->info.has_timer ? 2 : 1);
  const bool memory_bound = n_rows < 8;
  const ks_bench_load load = {.work = (double)n_rows,
                              .flops = 2.0 * (double)n_rows * (double)n_out * (double)n_in,
                              .bytes = memory_bound ? (double)bytes : 0,
                              .working_set = memory_bound ? bytes : 0};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  KS_TRY_OUT(sample(b, product_once, &p, false, &samples));
  snprintf(shape, sizeof shape, "%lld x %lld x %lld", (long long)n_rows, (long long)n_out, (long long)n_in);
  KS_TRY_OUT(ks_bench_add(b, backward ? "linear_backward" : "linear", shape, &samples, &load, &before, &row));
out:
  ks_mem_free(b->ctx, dx);
  ks_samples_free(&samples);
  ks_weight_destroy(b->ctx, w);
  ks_mem_free(b->ctx, x);
  ks_mem_free(b->ctx, y);
  free(values);
  return status;
}

ks_status ks_bench_linear(ks_bench *b, const ks_bench_shape *shape) {
  const ks_model_config *c = &shape->config;
  const int64_t sizes[][2] = {{c->hidden_size, c->hidden_size},
                              {c->intermediate_size, c->hidden_size},
                              {c->hidden_size, c->intermediate_size},
                              {c->vocab_size, c->hidden_size}};
  static const int64_t rows[] = {512, 8, 1};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    for (size_t j = 0; j < sizeof rows / sizeof *rows; j++)
      KS_TRY(bench_product(b, rows[j], sizes[i][0], sizes[i][1], false));
    KS_TRY(bench_product(b, 512, sizes[i][0], sizes[i][1], true));
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- similarity */

enum { BEST_K = 10 };

typedef struct {
  ks_ctx *ctx;
  ks_similarity_args args;
  float *scores;
  int64_t *index;
} search;

static ks_status search_once(void *arg) {
  search *s = arg;
  return ks_similarity_top(s->ctx, &s->args, BEST_K, s->scores, s->index);
}

static ks_status bench_search(ks_bench *b, int64_t n_q, int64_t n_k, int64_t n_cols) {
  if (!ks_bench_wants(b, "similarity_top")) return KS_OK;
  float *q = NULL, *k = NULL, *scores = NULL;
  int64_t *index = NULL;
  ks_samples samples = {0};
  ks_ceilings before;
  ks_bench_row *row;
  char shape[96];
  ks_status status;
  const ks_dtype dtype = b->dtype;
  b->dtype = KS_DTYPE_F32; /* embeddings are float32 whatever the weights are */
  KS_TRY_OUT(random_floats(b->ctx, n_q * n_cols, 1, &q));
  KS_TRY_OUT(random_floats(b->ctx, n_k * n_cols, 2, &k));
  KS_TRY_OUT(ks_alloc_array(&scores, (size_t)(n_q * BEST_K), sizeof *scores, "bench"));
  KS_TRY_OUT(ks_alloc_array(&index, (size_t)(n_q * BEST_K), sizeof *index, "bench"));
  search s = {b->ctx,
              {.q = q, .k = k, .n_q = n_q, .n_k = n_k, .n_cols = n_cols, .metric = KS_METRIC_DOT},
              scores,
              index};
  const size_t bytes = (size_t)(n_k * n_cols) * sizeof(float);
  const ks_bench_load load = {.work = (double)n_q,
                              .flops = 2.0 * (double)n_q * (double)n_k * (double)n_cols,
                              .bytes = n_q < 8 ? (double)bytes : 0,
                              .working_set = n_q < 8 ? bytes : 0,
                              .products = KS_PRODUCTS_F32};
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &before));
  KS_TRY_OUT(sample(b, search_once, &s, true, &samples));
  snprintf(shape, sizeof shape, "%lld queries, %lld keys of %lld, top %d", (long long)n_q, (long long)n_k,
           (long long)n_cols, BEST_K);
  KS_TRY_OUT(ks_bench_add(b, "similarity_top", shape, &samples, &load, &before, &row));
out:
  b->dtype = dtype;
  ks_samples_free(&samples);
  ks_mem_free(b->ctx, q);
  ks_mem_free(b->ctx, k);
  free(scores);
  free(index);
  return status;
}

ks_status ks_bench_similarity(ks_bench *b, const ks_bench_shape *shape) {
  int64_t d = shape->config.hidden_size;
  static const int64_t sizes[][2] = {{1, 128}, {1, 10000}, {16, 1024}, {256, 1024}, {1024, 10000}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    KS_TRY(bench_search(b, sizes[i][0], sizes[i][1], d));
  return KS_OK;
}

/* ---------------------------------------------------------------- selection */

enum { BINS = 128, OFFERS = 256 };

typedef struct {
  ks_selector *selector;
  const float *embeddings; /* [OFFERS, n_dim] */
  int64_t n_dim, next;
} offers;

static ks_status offer_once(void *arg) {
  offers *o = arg;
  ks_offer_result result;
  for (int i = 0; i < OFFERS; i++, o->next++) {
    ks_rng rng = ks_rng_make(3, KS_RNG_TEST, (uint64_t)o->next);
    ks_arrival a = {.arrival = o->next,
                    .set_id = o->next,
                    .domain = (int32_t)ks_rng_below(&rng, 8),
                    .scores = {ks_rng_uniform(&rng), ks_rng_uniform(&rng), 0},
                    .embedding = o->embeddings + (int64_t)i * o->n_dim,
                    .question = "how long should this cook",
                    .response = "about ten minutes on a low heat"};
    KS_TRY(ks_selector_offer(o->selector, &a, &result));
  }
  return KS_OK;
}

static ks_status bench_policy(ks_bench *b, const ks_policy *policy, int64_t n_dim) {
  offers o = {.n_dim = n_dim};
  float *embeddings = NULL;
  ks_samples samples = {0};
  ks_ceilings none = {0};
  ks_bench_row *row;
  char name[40], shape[96];
  snprintf(name, sizeof name, "select.%s", policy->name);
  if (!ks_bench_wants(b, name)) return KS_OK;
  ks_status status;
  KS_TRY_OUT(random_floats(b->ctx, OFFERS * n_dim, 1, &embeddings));
  o.embeddings = embeddings;
  KS_TRY_OUT(ks_selector_create(
      b->ctx,
      &(ks_selector_params){.policy = policy, .n_bins = BINS, .bin_bytes = 22528, .n_dim = n_dim, .seed = 1},
      &o.selector));
  KS_TRY_OUT(ks_bench_sample(b, offer_once, &o, &samples));
  ks_samples_scale(&samples, 1.0 / OFFERS);
  snprintf(shape, sizeof shape, "an offer, %d bins full, embeddings of %lld", BINS, (long long)n_dim);
  KS_TRY_OUT(ks_bench_add(b, name, shape, &samples, &(ks_bench_load){.work = 1}, &none, &row));
out:
  ks_samples_free(&samples);
  ks_selector_destroy(o.selector);
  ks_mem_free(b->ctx, embeddings);
  return status;
}

ks_status ks_bench_select(ks_bench *b, const ks_bench_shape *shape) {
  for (int i = 0; ks_policies[i]; i++)
    if (!ks_policies[i]->unlimited) KS_TRY(bench_policy(b, ks_policies[i], shape->config.hidden_size));
  return KS_OK;
}
