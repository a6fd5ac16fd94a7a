#include "tests/oracle/model_twin.h"
#include "kernels/base/rng.h"
#include "tests/oracle/guard.h"
#include <stdio.h>

#define SHAPE(layers, hidden, ff, vocab, heads, kv, dim)                                                     \
  .n_layers = layers, .hidden_size = hidden, .intermediate_size = ff, .vocab_size = vocab, .n_heads = heads, \
  .n_kv_heads = kv, .head_dim = dim, .max_seq_len = 64, .rms_eps = 1e-5f, .rope_theta = 10000.0
const ks_twin_case ks_twin_cases[KS_N_TWIN_CASES] = {
    {"grouped, tied", {SHAPE(2, 24, 40, 61, 4, 2, 6), .tied_head = true}},
    {"head of 100", {SHAPE(2, 16, 24, 33, 2, 1, 100)}},
    {"biases, norms of q and k", {SHAPE(2, 16, 24, 33, 4, 2, 8), .qkv_bias = true, .qk_norm = true}},
    {"odd sizes, one layer", {SHAPE(1, 23, 37, 53, 3, 3, 10)}}};

void ks_must(ks_status s) {
  if (s == KS_OK) return;
  fprintf(stderr, "%s: %s (%s)\n", ks_status_name(s), ks_error_message(), ks_error_origin());
  abort();
}

ks_ctx *ks_twin_ctx_as(int n_threads, ks_dtype activations) {
  ks_ctx *ctx = NULL;
  ks_must(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = ks_test_is_cuda() ? "cuda" : "cpu",
                                               .n_threads = n_threads,
                                               .activations = activations}));
  return ctx;
}

ks_ctx *ks_twin_ctx(int n_threads) {
  return ks_twin_ctx_as(n_threads, KS_DTYPE_F32);
}

static uint64_t next_stream; /* one stream of draws an array, in the order of making */

/* Normal values as the library gets them, and the same in float64. */
static double *draw(int64_t n, double mean, double deviation, uint64_t seed, float **floats) {
  ks_rng rng = ks_rng_make(seed, KS_RNG_TEST, next_stream++);
  double *d = malloc((size_t)n * sizeof *d);
  float *f = malloc((size_t)n * sizeof *f);
  KS_ASSERT(d && f);
  for (int64_t i = 0; i < n; i++) {
    f[i] = (float)(mean + deviation * ks_rng_normal(&rng));
    d[i] = (double)f[i];
  }
  *floats = f;
  return d;
}

static float *make_norm(ks_ctx *ctx, int64_t n, uint64_t seed, double **oracle) {
  float *host;
  void *p = NULL;
  *oracle = draw(n, 1, 0.2, seed, &host);
  ks_must(ks_mem_alloc(ctx, (size_t)n * sizeof *host, &p));
  ks_must(ks_mem_upload(ctx, p, host, (size_t)n * sizeof *host));
  free(host);
  return p;
}

static ks_weight *make_weight(ks_ctx *ctx, int64_t n_out, int64_t n_in, ks_dtype dtype, bool biased,
                              uint64_t seed, double **oracle, double **oracle_bias) {
  float *values, *bias = NULL;
  ks_weight *w = NULL;
  *oracle = draw(n_out * n_in, 0, 1 / sqrt((double)n_in), seed, &values);
  if (biased) *oracle_bias = draw(n_out, 0, 0.2, seed, &bias);
  ks_must(ks_weight_create(
      ctx, &(ks_weight_params){.n_out = n_out, .n_in = n_in, .dtype = dtype, .values = values, .bias = bias},
      &w));
  free(values);
  free(bias);
  return w;
}

static void make_layer(ks_twin *t, int64_t l, ks_dtype dtype, uint64_t seed) {
  const ks_model_config *c = &t->model.config;
  ks_model_layer *layer = &t->model.layers[l];
  ks_oracle_layer *o = &t->oracle.layers[l];
  for (int i = 0; i < KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    ks_oracle_llama_shape(c, i, &n_out, &n_in);
    layer->linear[i] = make_weight(t->model.ctx, n_out, n_in, dtype, c->qkv_bias && i <= KS_TARGET_v, seed,
                                   &o->linear[i], &o->bias[i]);
  }
  layer->attn_norm = make_norm(t->model.ctx, c->hidden_size, seed, &o->attn_norm);
  layer->mlp_norm = make_norm(t->model.ctx, c->hidden_size, seed, &o->mlp_norm);
  if (!c->qk_norm) return;
  layer->q_norm = make_norm(t->model.ctx, c->head_dim, seed, &o->q_norm);
  layer->k_norm = make_norm(t->model.ctx, c->head_dim, seed, &o->k_norm);
}

void ks_twin_make(ks_twin *t, ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype, uint64_t seed) {
  memset(t, 0, sizeof *t);
  next_stream = 0;
  const ks_model_config *c = &t->model.config;
  t->model.config = t->oracle.config = *config;
  t->model.ctx = ctx;
  t->model.layers = calloc((size_t)c->n_layers, sizeof *t->model.layers);
  t->oracle.layers = calloc((size_t)c->n_layers, sizeof *t->oracle.layers);
  t->model.inv_freq = t->oracle.inv_freq = calloc((size_t)c->head_dim / 2, sizeof(double));
  for (int64_t j = 0; j < c->head_dim / 2; j++)
    t->model.inv_freq[j] = pow(c->rope_theta, -2.0 * (double)j / (double)c->head_dim);
  for (int64_t l = 0; l < c->n_layers; l++)
    make_layer(t, l, dtype, seed);
  t->model.final_norm = make_norm(ctx, c->hidden_size, seed, &t->oracle.final_norm);
  t->model.embedding =
      make_weight(ctx, c->vocab_size, c->hidden_size, dtype, false, seed, &t->oracle.embedding, NULL);
  t->model.head = t->model.embedding;
  t->oracle.head = t->oracle.embedding;
  if (!c->tied_head)
    t->model.head =
        make_weight(ctx, c->vocab_size, c->hidden_size, dtype, false, seed, &t->oracle.head, NULL);
}

void ks_twin_free(ks_twin *t) {
  ks_ctx *ctx = t->model.ctx;
  for (int64_t l = 0; l < t->model.config.n_layers; l++) {
    ks_model_layer *layer = &t->model.layers[l];
    ks_oracle_layer *o = &t->oracle.layers[l];
    for (int i = 0; i < KS_N_TARGETS; i++) {
      ks_weight_destroy(ctx, layer->linear[i]);
      free(o->linear[i]);
      free(o->bias[i]);
    }
    float *norms[] = {layer->attn_norm, layer->mlp_norm, layer->q_norm, layer->k_norm};
    double *oracle_norms[] = {o->attn_norm, o->mlp_norm, o->q_norm, o->k_norm};
    for (int i = 0; i < 4; i++) {
      ks_mem_free(ctx, norms[i]);
      free(oracle_norms[i]);
    }
  }
  if (t->model.head != t->model.embedding) ks_weight_destroy(ctx, t->model.head);
  if (t->oracle.head != t->oracle.embedding) free(t->oracle.head);
  ks_weight_destroy(ctx, t->model.embedding);
  free(t->oracle.embedding);
  ks_mem_free(ctx, t->model.final_norm);
  free(t->oracle.final_norm);
  free(t->model.inv_freq);
  free(t->model.layers);
  free(t->oracle.layers);
}

static float *upload(ks_ctx *ctx, const float *host, int64_t n) {
  void *p = NULL;
  ks_must(ks_mem_alloc(ctx, (size_t)n * sizeof *host, &p));
  if (host) ks_must(ks_mem_upload(ctx, p, host, (size_t)n * sizeof *host));
  return p;
}

void ks_twin_adapter_make(ks_twin_adapter *a, ks_ctx *ctx, const ks_model_config *c, int32_t rank,
                          uint32_t targets, uint64_t seed) {
  int64_t at = 0;
  float *host;
  *a = (ks_twin_adapter){.ctx = ctx, .loras = calloc((size_t)(c->n_layers * KS_N_TARGETS), sizeof *a->loras)};
  for (int64_t i = 0; i < c->n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    ks_oracle_llama_shape(c, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    if (targets >> (i % KS_N_TARGETS) & 1) a->n += rank * (n_out + n_in);
  }
  next_stream = 1000;
  a->oracle_weights = draw(a->n, 0, 0.3, seed, &host);
  a->weights = upload(ctx, host, a->n);
  a->grads = upload(ctx, NULL, a->n);
  free(host);
  float scale = 1.5f / (float)rank;
  for (int64_t i = 0; i < c->n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    ks_oracle_llama_shape(c, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    if (!(targets >> (i % KS_N_TARGETS) & 1)) continue;
    int64_t b = at + rank * n_in;
    a->loras[i] = (ks_lora){rank, scale, a->weights + at, a->weights + b, a->grads + at, a->grads + b};
    at = b + rank * n_out;
  }
  a->view = (ks_adapter_view){.loras = a->loras, .max_rank = rank};
  a->oracle = (ks_oracle_lora){
      .rank = rank, .scale = (double)scale, .targets = targets, .weights = a->oracle_weights};
}

void ks_twin_adapter_free(ks_twin_adapter *a) {
  ks_mem_free(a->ctx, a->weights);
  ks_mem_free(a->ctx, a->grads);
  free(a->oracle_weights);
  free(a->loras);
}

float *ks_twin_download(ks_ctx *ctx, const float *x, int64_t n) {
  float *host = malloc((size_t)n * sizeof *host + 1);
  KS_ASSERT(host != NULL);
  ks_must(ks_mem_download(ctx, host, x, (size_t)n * sizeof *host));
  return host;
}

int32_t *ks_twin_tokens(int64_t n, int64_t n_vocab, uint64_t seed) {
  ks_rng rng = ks_rng_make(seed, KS_RNG_TEST, 1u << 20);
  int32_t *tokens = malloc((size_t)n * sizeof *tokens + 1);
  KS_ASSERT(tokens != NULL);
  for (int64_t i = 0; i < n; i++)
    tokens[i] = (int32_t)ks_rng_below(&rng, (uint64_t)n_vocab);
  return tokens;
}
