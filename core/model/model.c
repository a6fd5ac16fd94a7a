#include "core/model/checkpoint.h"
#include "kernels/quant.h"

/* ---------------------------------------------------------------- packing */

typedef struct {
  ks_model *model;
  ks_dtype dtype;
  bool mapped; /* the values lie in a mapped file, whose pages may go once they are packed */
} packer;

static ks_status pack_vector(packer *p, const ks_tensor *t, float **out) {
  size_t bytes = (size_t)t->n_out * sizeof(float);
  float *host = NULL;
  void *device = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&host, (size_t)t->n_out, sizeof *host, "model: vector"));
  ks_tensor_read_f32(t, host);
  KS_TRY_OUT(ks_mem_alloc(p->model->ctx, bytes, &device));
  *out = device;
  KS_TRY_OUT(ks_mem_upload(p->model->ctx, device, host, bytes));
  p->model->n_params += t->n_out;
out:
  free(host);
  return status;
}

/* head_dim > 0: rows are rotary pairs, to be brought to halves. */
static ks_status pack_matrix(packer *p, const ks_tensor *t, const ks_tensor *bias, int64_t head_dim,
                             ks_weight **out) {
  void *copy = NULL;
  float *host_bias = NULL;
  ks_status status;
  size_t size = ks_dtype_size(t->dtype);
  if (head_dim > 0 || (uintptr_t)t->data % size != 0) {
    KS_TRY_OUT(ks_alloc_array(&copy, ks_tensor_bytes(t), 1, "model: weight"));
    if (head_dim > 0)
      ks_tensor_read_halves(t, head_dim, copy);
    else
      memcpy(copy, t->data, ks_tensor_bytes(t));
  }
  if (bias->data) {
    KS_TRY_OUT(ks_alloc_array(&host_bias, (size_t)bias->n_out, sizeof *host_bias, "model: bias"));
    ks_tensor_read_f32(bias, host_bias);
    p->model->n_params += bias->n_out;
  }
  KS_TRY_OUT(ks_weight_create(p->model->ctx,
                              &(ks_weight_params){.n_out = t->n_out,
                                                  .n_in = t->n_in,
                                                  .dtype = p->dtype,
                                                  .values_dtype = t->dtype,
                                                  .values = copy ? copy : t->data,
                                                  .bias = host_bias},
                              out));
  p->model->n_params += t->n_out * t->n_in;
  if (p->mapped) ks_bytes_release(t->data, ks_tensor_bytes(t));
out:
  free(copy);
  free(host_bias);
  return status;
}

static ks_status pack_layer(packer *p, const ks_checkpoint *c, int64_t i) {
  const ks_checkpoint_layer *from = &c->layers[i];
  ks_model_layer *to = &p->model->layers[i];
  for (int t = 0; t < KS_N_TARGETS; t++) {
    bool pairs = c->interleaved && (t == KS_TARGET_q || t == KS_TARGET_k);
    KS_TRY(pack_matrix(p, &from->linear[t], &from->bias[t], pairs ? c->config.head_dim : 0, &to->linear[t]));
  }
  KS_TRY(pack_vector(p, &from->attn_norm, &to->attn_norm));
  KS_TRY(pack_vector(p, &from->mlp_norm, &to->mlp_norm));
  if (!c->config.qk_norm) return KS_OK;
  KS_TRY(pack_vector(p, &from->q_norm, &to->q_norm));
  return pack_vector(p, &from->k_norm, &to->k_norm);
}

static ks_status model_create(ks_ctx *ctx, const ks_model_config *config, ks_model **out) {
  ks_model *m = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&m, 1, sizeof *m, "model"));
  m->ctx = ctx;
  m->config = *config;
  KS_TRY_OUT(ks_alloc_array(&m->layers, (size_t)config->n_layers, sizeof *m->layers, "model: layers"));
  KS_TRY_OUT(
      ks_alloc_array(&m->inv_freq, (size_t)config->head_dim / 2, sizeof *m->inv_freq, "model: frequencies"));
  ks_model_inv_freq(config, m->inv_freq);
  *out = m;
  return KS_OK;
out:
  ks_model_destroy(m);
  return status;
}

static ks_status pack_all(packer *p, const ks_checkpoint *c) {
  const ks_tensor no_bias = {0};
  KS_TRY(pack_matrix(p, &c->embedding, &no_bias, 0, &p->model->embedding));
  p->model->head = p->model->embedding;
  if (c->head.data) {
    p->model->head = NULL;
    KS_TRY(pack_matrix(p, &c->head, &no_bias, 0, &p->model->head));
  }
  KS_TRY(pack_vector(p, &c->final_norm, &p->model->final_norm));
  for (int64_t i = 0; i < c->config.n_layers; i++)
    KS_TRY(pack_layer(p, c, i));
  return KS_OK;
}

ks_status ks_model_load(ks_ctx *ctx, const char *path, const ks_model_load_params *params, ks_model **out) {
  ks_checkpoint c;
  ks_model *m = NULL;
  ks_status status;
  *out = NULL;
  KS_TRY_OUT(ks_checkpoint_open(path, &c));
  KS_TRY_OUT(model_create(ctx, &c.config, &m));
  packer p = {m, params->dtype, true};
  status = ks_fail_context(pack_all(&p, &c), "%s", path);
  if (status != KS_OK) goto out;
  ks_checkpoint_hash(&c, m->sha256);
  memcpy(m->format, c.format, sizeof m->format);
  *out = m;
  m = NULL;
out:
  ks_model_destroy(m);
  ks_checkpoint_close(&c);
  return status;
}

void ks_model_destroy(ks_model *m) {
  if (!m) return;
  for (int64_t i = 0; m->layers && i < m->config.n_layers; i++) {
    ks_model_layer *l = &m->layers[i];
    for (int t = 0; t < KS_N_TARGETS; t++)
      ks_weight_destroy(m->ctx, l->linear[t]);
    ks_mem_free(m->ctx, l->attn_norm);
    ks_mem_free(m->ctx, l->mlp_norm);
    ks_mem_free(m->ctx, l->q_norm);
    ks_mem_free(m->ctx, l->k_norm);
  }
  if (m->head != m->embedding) ks_weight_destroy(m->ctx, m->head);
  ks_weight_destroy(m->ctx, m->embedding);
  ks_mem_free(m->ctx, m->final_norm);
  free(m->layers);
  free(m->inv_freq);
  free(m);
}

/* ---------------------------------------------------------------- random */

enum { POOL_SPARE = 1 << 16, PLACES_APART = 4099 };

/* Elements are drawn by their place in the model, whatever the number of threads. */
typedef struct {
  packer pack;
  uint64_t seed, tensor;
  float *values; /* room for the largest matrix and `spare` more */
  int64_t spare; /* > 0: drawn once; each matrix begins elsewhere within so many */
  uint16_t *halves; /* the same as bf16, for weights that are */
} random_source;

static void random_fill(random_source *r, int64_t n) {
  const ks_rng stream = ks_rng_make(r->seed, KS_RNG_TEST, r->tensor++);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    ks_rng rng = stream;
    rng.next = (uint64_t)i;
    r->values[i] = (float)(0.02 * ks_rng_normal(&rng));
  }
}

/* The next matrix's values: anew, or again from another place on. */
static ks_tensor random_values(random_source *r, int64_t n_out, int64_t n_in) {
  if (r->spare == 0) {
    random_fill(r, n_out * n_in);
    return (ks_tensor){(const unsigned char *)r->values, KS_DTYPE_F32, n_out, n_in};
  }
  const int64_t at = (int64_t)(r->tensor++ * PLACES_APART) % r->spare;
  if (r->halves) return (ks_tensor){(const unsigned char *)(r->halves + at), KS_DTYPE_BF16, n_out, n_in};
  return (ks_tensor){(const unsigned char *)(r->values + at), KS_DTYPE_F32, n_out, n_in};
}

static ks_status random_matrix(random_source *r, int64_t n_out, int64_t n_in, bool biased, ks_weight **out) {
  ks_tensor t, bias = {0};
  float *bias_values = NULL;
  ks_status status;
  if (biased) {
    KS_TRY_OUT(ks_alloc_array(&bias_values, (size_t)n_out, sizeof *bias_values, "model: bias"));
    if (r->spare == 0) random_fill(r, n_out);
    memcpy(bias_values, r->values, (size_t)n_out * sizeof *bias_values);
    bias = (ks_tensor){(const unsigned char *)bias_values, KS_DTYPE_F32, n_out, 1};
  }
  t = random_values(r, n_out, n_in);
  KS_TRY_OUT(pack_matrix(&r->pack, &t, &bias, 0, out));
out:
  free(bias_values);
  return status;
}

static ks_status random_norm(random_source *r, int64_t n, float **out) {
  float *ones = NULL;
  KS_TRY(ks_alloc_array(&ones, (size_t)n, sizeof *ones, "model: norm"));
  for (int64_t i = 0; i < n; i++)
    ones[i] = 1.0f;
  ks_status status =
      pack_vector(&r->pack, &(ks_tensor){(const unsigned char *)ones, KS_DTYPE_F32, n, 1}, out);
  free(ones);
  return status;
}

static ks_status random_all(random_source *r) {
  ks_model *m = r->pack.model;
  const ks_model_config *c = &m->config;
  KS_TRY(random_matrix(r, c->vocab_size, c->hidden_size, false, &m->embedding));
  m->head = m->embedding;
  if (!c->tied_head) {
    m->head = NULL;
    KS_TRY(random_matrix(r, c->vocab_size, c->hidden_size, false, &m->head));
  }
  KS_TRY(random_norm(r, c->hidden_size, &m->final_norm));
  for (int64_t i = 0; i < c->n_layers; i++) {
    ks_model_layer *l = &m->layers[i];
    for (int t = 0; t < KS_N_TARGETS; t++) {
      int64_t n_out, n_in;
      ks_target_shape(c, (ks_target)t, &n_out, &n_in);
      KS_TRY(random_matrix(r, n_out, n_in, c->qkv_bias && t < KS_TARGET_o, &l->linear[t]));
    }
    KS_TRY(random_norm(r, c->hidden_size, &l->attn_norm));
    KS_TRY(random_norm(r, c->hidden_size, &l->mlp_norm));
    if (!c->qk_norm) continue;
    KS_TRY(random_norm(r, c->head_dim, &l->q_norm));
    KS_TRY(random_norm(r, c->head_dim, &l->k_norm));
  }
  return KS_OK;
}

/* Such weights lie in no file: the hash is of what determines them. */
static void hash_recipe(ks_model *m, ks_dtype dtype, uint64_t seed) {
  const ks_model_config *c = &m->config;
  const int64_t recipe[] = {(int64_t)seed,        (int64_t)dtype, c->n_layers, c->hidden_size,
                            c->intermediate_size, c->vocab_size,  c->n_heads,  c->n_kv_heads,
                            c->head_dim,          c->tied_head,   c->qkv_bias, c->qk_norm};
  ks_sha256 h;
  ks_sha256_init(&h);
  ks_sha256_add(&h, recipe, sizeof recipe);
  ks_sha256_finish(&h, m->sha256);
}

/* All draws at once. */
static ks_status fill_pool(random_source *r, int64_t n) {
  random_fill(r, n);
  if (r->pack.dtype != KS_DTYPE_BF16) return KS_OK;
  KS_TRY(ks_alloc_array(&r->halves, (size_t)n, sizeof *r->halves, "model: random weights"));
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    r->halves[i] = ks_bf16_from_float(r->values[i]);
  return KS_OK;
}

static ks_status create_random(ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype, uint64_t seed,
                               int64_t spare, ks_model **out) {
  random_source r = {.pack = {.dtype = dtype}, .seed = seed, .spare = spare};
  ks_status status;
  *out = NULL;
  KS_TRY_OUT(ks_model_config_check(config));
  KS_TRY_OUT(model_create(ctx, config, &r.pack.model));
  int64_t widest = ks_max_i64(config->n_heads * config->head_dim,
                              ks_max_i64(config->vocab_size, config->intermediate_size));
  const int64_t n = widest * config->hidden_size + spare;
  KS_TRY_OUT(ks_alloc_array(&r.values, (size_t)n, sizeof *r.values, "model: random weights"));
  if (spare > 0) KS_TRY_OUT(fill_pool(&r, n));
  KS_TRY_OUT(random_all(&r));
  hash_recipe(r.pack.model, dtype, seed ^ (uint64_t)spare << 40);
  strcpy(r.pack.model->format, "random");
  *out = r.pack.model;
  r.pack.model = NULL;
out:
  ks_model_destroy(r.pack.model);
  free(r.values);
  free(r.halves);
  return status;
}

ks_status ks_model_create_random(ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype, uint64_t seed,
                                 ks_model **out) {
  return create_random(ctx, config, dtype, seed, 0, out);
}

ks_status ks_model_create_random_quickly(ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype,
                                         uint64_t seed, ks_model **out) {
  return create_random(ctx, config, dtype, seed, POOL_SPARE, out);
}
