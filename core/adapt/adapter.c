/* One user's LoRA weights. */
#include "core/adapt/adapt.h"

static int64_t pair_size(const ks_adapter *a, ks_target t) {
  int64_t n_out, n_in;
  ks_target_shape(&a->config, t, &n_out, &n_in);
  return a->params.rank * (n_out + n_in);
}

static bool is_target(const ks_adapter *a, int t) {
  return a->params.targets >> t & 1;
}

static ks_status count_params(ks_adapter *a) {
  int64_t layer = 0;
  for (int t = 0; t < KS_N_TARGETS; t++)
    layer += is_target(a, t) ? pair_size(a, (ks_target)t) : 0;
  if (!ks_mul_i64(layer, a->n_layers, &a->n_params) || a->n_params > INT64_MAX / (int64_t)(4 * sizeof(float)))
    return KS_FAIL(KS_EOVERFLOW, "adapter: rank %d for %lld layers does not fit an address space",
                   a->params.rank, (long long)a->n_layers);
  return KS_OK;
}

static void point_loras(ks_adapter *a) {
  int64_t at = 0;
  for (int64_t l = 0; l < a->n_layers; l++) {
    for (int t = 0; t < KS_N_TARGETS; t++) {
      int64_t n_out, n_in, b;
      ks_target_shape(&a->config, (ks_target)t, &n_out, &n_in);
      if (!is_target(a, t)) continue;
      b = at + a->params.rank * n_in;
      a->loras[l * KS_N_TARGETS + t] = (ks_lora){.rank = a->params.rank,
                                                 .scale = a->params.alpha / (float)a->params.rank,
                                                 .a = a->weights + at,
                                                 .b_t = a->weights + b,
                                                 .grad_a = a->grads + at,
                                                 .grad_b_t = a->grads + b};
      at = b + a->params.rank * n_out;
    }
  }
}

static ks_status check_params(const ks_model_config *config, const ks_adapter_params *p) {
  KS_TRY(ks_model_config_check(config));
  if (p->rank < 1 || p->rank > 256) return KS_FAIL(KS_EINVAL, "adapter: rank is %d; give 1 to 256", p->rank);
  if (!isfinite(p->alpha)) return KS_FAIL(KS_EINVAL, "adapter: alpha is not finite");
  if (p->targets == 0 || p->targets >> KS_N_TARGETS)
    return KS_FAIL(KS_EINVAL, "adapter: targets are 0x%x; set some of the lowest %d bits", p->targets,
                   KS_N_TARGETS);
  return KS_OK;
}

static ks_status allocate(ks_adapter *a) {
  float **arrays[] = {&a->weights, &a->grads, &a->m, &a->v};
  KS_TRY(count_params(a));
  for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
    void *p = NULL;
    KS_TRY_AS(ks_mem_alloc(a->ctx, (size_t)a->n_params * sizeof(float), &p), "adapter");
    *arrays[i] = p;
  }
  KS_TRY(ks_alloc_array(&a->loras, (size_t)(a->n_layers * KS_N_TARGETS), sizeof *a->loras, "adapter"));
  point_loras(a);
  return KS_OK;
}

ks_status ks_adapter_create(ks_ctx *ctx, const ks_model_config *config, const ks_adapter_params *params,
                            uint64_t seed, ks_adapter **out) {
  if (!ctx || !config || !params || !out) return KS_FAIL(KS_EINVAL, "ks_adapter_create: NULL argument");
  *out = NULL;
  KS_TRY(check_params(config, params));
  ks_adapter *a = NULL;
  KS_TRY(ks_alloc_array(&a, 1, sizeof *a, "adapter"));
  a->ctx = ctx;
  a->params = *params;
  a->config = *config;
  a->n_layers = config->n_layers;
  ks_status status = allocate(a);
  if (status == KS_OK) status = ks_adapter_reset(a, seed);
  if (status != KS_OK) {
    ks_adapter_destroy(a);
    return status;
  }
  *out = a;
  return KS_OK;
}

void ks_adapter_destroy(ks_adapter *a) {
  if (!a) return;
  free(a->loras);
  ks_mem_free(a->ctx, a->v);
  ks_mem_free(a->ctx, a->m);
  ks_mem_free(a->ctx, a->grads);
  ks_mem_free(a->ctx, a->weights);
  free(a);
}

/* A's draws are keyed by layer and target, so that they do not depend on which other targets there are. */
static void draw_weights(const ks_adapter *a, uint64_t seed, float *out) {
  int64_t at = 0;
  for (int64_t i = 0; i < a->n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    ks_target t = (ks_target)(i % KS_N_TARGETS);
    ks_target_shape(&a->config, t, &n_out, &n_in);
    if (!is_target(a, t)) continue;
    ks_rng rng = ks_rng_make(seed, KS_RNG_ADAPTER_INIT, (uint64_t)i);
    double bound = 1.0 / sqrt((double)n_in);
    for (int64_t j = 0; j < a->params.rank * n_in; j++)
      out[at + j] = (float)((2.0 * ks_rng_uniform(&rng) - 1.0) * bound);
    at += pair_size(a, t);
  }
}

ks_status ks_adapter_reset(ks_adapter *a, uint64_t seed) {
  if (!a) return KS_FAIL(KS_EINVAL, "ks_adapter_reset: adapter is NULL");
  float *host = NULL;
  size_t bytes = (size_t)a->n_params * sizeof *host;
  KS_TRY(ks_alloc_array(&host, (size_t)a->n_params, sizeof *host, "adapter"));
  draw_weights(a, seed, host);
  ks_status status = ks_mem_upload(a->ctx, a->weights, host, bytes);
  free(host);
  KS_TRY(status);
  KS_TRY(ks_mem_zero(a->ctx, a->grads, bytes));
  KS_TRY(ks_mem_zero(a->ctx, a->m, bytes));
  KS_TRY(ks_mem_zero(a->ctx, a->v, bytes));
  a->step = 0;
  return KS_OK;
}

ks_adapter_view ks_adapter_view_of(const ks_adapter *a) {
  return (ks_adapter_view){.loras = a->loras, .max_rank = a->params.rank};
}

ks_status ks_adapter_save(const ks_adapter *a, float *weights, float *m, float *v) {
  if (!a || !weights || !m || !v) return KS_FAIL(KS_EINVAL, "ks_adapter_save: NULL argument");
  size_t bytes = (size_t)a->n_params * sizeof *weights;
  KS_TRY(ks_mem_download(a->ctx, weights, a->weights, bytes));
  KS_TRY(ks_mem_download(a->ctx, m, a->m, bytes));
  return ks_mem_download(a->ctx, v, a->v, bytes);
}

ks_status ks_adapter_load(ks_adapter *a, const float *weights, const float *m, const float *v,
                          int64_t n_params, int64_t step) {
  if (!a || !weights || !m || !v) return KS_FAIL(KS_EINVAL, "ks_adapter_load: NULL argument");
  if (n_params != a->n_params)
    return KS_FAIL(KS_EDATA,
                   "adapter: %lld stored parameters; this adapter has %lld (another model, rank or targets?)",
                   (long long)n_params, (long long)a->n_params);
  if (step < 0) return KS_FAIL(KS_EDATA, "adapter: stored step is %lld", (long long)step);
  size_t bytes = (size_t)n_params * sizeof *weights;
  KS_TRY(ks_mem_upload(a->ctx, a->weights, weights, bytes));
  KS_TRY(ks_mem_upload(a->ctx, a->m, m, bytes));
  KS_TRY(ks_mem_upload(a->ctx, a->v, v, bytes));
  KS_TRY(ks_mem_zero(a->ctx, a->grads, bytes));
  a->step = step;
  return KS_OK;
}

ks_status ks_targets_parse(const char *list, uint32_t *bits) {
  if (!list || !bits) return KS_FAIL(KS_EINVAL, "ks_targets_parse: NULL argument");
  uint32_t found = 0;
  for (const char *s = list; *s;) {
    s += strspn(s, ", \t");
    size_t n = strcspn(s, ", \t");
    int t = 0;
    if (n == 0) break;
    while (t < KS_N_TARGETS &&
           (strlen(ks_target_name((ks_target)t)) != n || memcmp(s, ks_target_name((ks_target)t), n)))
      t++;
    if (t == KS_N_TARGETS)
      return KS_FAIL(KS_ECONFIG, "'%.*s' is no LoRA target; use some of q,k,v,o,gate,up,down",
                     (int)ks_min_i64((int64_t)n, 64), s);
    found |= 1u << t;
    s += n;
  }
  if (!found) return KS_FAIL(KS_ECONFIG, "no LoRA target given; use some of q,k,v,o,gate,up,down");
  *bits = found;
  return KS_OK;
}
