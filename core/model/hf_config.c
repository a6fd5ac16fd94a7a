#include "core/model/checkpoint.h"

#include <jansson.h>
#include <math.h>

/* Hugging Face's config.json. Names and defaults from transformers' configuration classes and
 * modeling_rope_utils. */

enum { MAX_JSON = 16 << 20 };

typedef struct {
  const char *name, *model_type;
  bool is_mistral, is_qwen2, is_qwen3;
} architecture;
static const architecture architectures[] = {
    {"LlamaForCausalLM", "llama", false, false, false},
    {"MistralForCausalLM", "mistral", true, false, false},
    {"Qwen2ForCausalLM", "qwen2", false, true, false},
    {"Qwen3ForCausalLM", "qwen3", false, false, true},
};

typedef struct {
  const char *path;
  const json_t *json; /* object */
} source;

static const json_t *get(const source *s, const char *key) {
  const json_t *v = json_object_get(s->json, key);
  return json_is_null(v) ? NULL : v;
}

static ks_status get_int(const source *s, const char *key, int64_t fallback, int64_t *out) {
  const json_t *v = get(s, key);
  *out = fallback;
  if (!v && fallback >= 0) return KS_OK;
  if (!v) return KS_FAIL(KS_EDATA, "%s: %s is missing", s->path, key);
  if (!json_is_integer(v)) return KS_FAIL(KS_EDATA, "%s: %s is no whole number", s->path, key);
  *out = (int64_t)json_integer_value(v);
  return KS_OK;
}

static ks_status get_double(const source *s, const char *key, double fallback, double *out) {
  const json_t *v = get(s, key);
  *out = fallback;
  if (!v && !isnan(fallback)) return KS_OK;
  if (!v) return KS_FAIL(KS_EDATA, "%s: %s is missing", s->path, key);
  if (!json_is_number(v)) return KS_FAIL(KS_EDATA, "%s: %s is no number", s->path, key);
  *out = json_number_value(v);
  return KS_OK;
}

static ks_status get_bool(const source *s, const char *key, bool *out) {
  const json_t *v = get(s, key);
  *out = json_is_true(v);
  if (v && !json_is_boolean(v)) return KS_FAIL(KS_EDATA, "%s: %s is neither true nor false", s->path, key);
  return KS_OK;
}

static ks_status load_object(const char *path, json_t **out) {
  char *text = NULL;
  size_t n;
  json_error_t error;
  *out = NULL;
  KS_TRY(ks_file_read(path, MAX_JSON, &text, &n));
  json_t *json = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
  free(text);
  if (!json) return KS_FAIL(KS_EDATA, "%s:%d:%d: %s", path, error.line, error.column, error.text);
  if (!json_is_object(json)) {
    json_decref(json);
    return KS_FAIL(KS_EDATA, "%s:1: no JSON object", path);
  }
  *out = json;
  return KS_OK;
}

static ks_status find_architecture(const source *s, const architecture **out) {
  const char *name = json_string_value(json_array_get(get(s, "architectures"), 0));
  const char *type = json_string_value(get(s, "model_type"));
  for (size_t i = 0; i < sizeof architectures / sizeof architectures[0]; i++) {
    const architecture *a = &architectures[i];
    *out = a;
    if (name ? strcmp(name, a->name) == 0 : type && strcmp(type, a->model_type) == 0) return KS_OK;
  }
  return KS_FAIL(
      KS_EUNSUPPORTED,
      "%s: architecture \"%.100s\"; supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
      "Qwen3ForCausalLM",
      s->path,
      name   ? name
      : type ? type
             : "");
}

/* What would change the computation in a way that the forward pass does not know. */
static ks_status refuse_unknown(const source *s) {
  const char *act = json_string_value(get(s, "hidden_act"));
  double partial;
  if (act && strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: hidden_act \"%.100s\"; silu is supported", s->path, act);
  if (get(s, "quantization_config"))
    return KS_FAIL(
        KS_EUNSUPPORTED,
        "%s: quantization_config: the weights are quantized; name a checkpoint in F32, F16 or BF16", s->path);
  KS_TRY(get_double(s, "partial_rotary_factor", 1.0, &partial));
  if (partial != 1.0)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: partial_rotary_factor %g; 1 is supported", s->path, partial);
  return KS_OK;
}

/* transformers 5 writes rope_parameters (with rope_theta inside), 4 rope_scaling (null: none) beside
 * rope_theta. */
static ks_status read_rope(const source *s, ks_model_config *c) {
  const json_t *parameters = get(s, "rope_parameters");
  const char *key = parameters ? "rope_parameters" : "rope_scaling";
  source rope = {s->path, get(s, key)};
  KS_TRY(get_double(s, "rope_theta", 10000.0, &c->rope_theta));
  if (!rope.json) return KS_OK;
  if (!json_is_object(rope.json)) return KS_FAIL(KS_EDATA, "%s: %s is no object", s->path, key);
  const char *member;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)rope.json, member, value) {
    if (json_is_object(value))
      return KS_FAIL(KS_EUNSUPPORTED, "%s: %s of each kind of layer (\"%.100s\"); one for all is supported",
                     s->path, key, member);
  }
  const json_t *type_value = get(&rope, "rope_type") ? get(&rope, "rope_type") : get(&rope, "type");
  const char *type = type_value ? json_string_value(type_value) : "default";
  KS_TRY_AS(get_double(&rope, "rope_theta", c->rope_theta, &c->rope_theta), "%s", key);
  KS_TRY_AS(refuse_unknown(&rope), "%s", key);
  if (type && strcmp(type, "default") == 0) return KS_OK;
  bool linear = type && strcmp(type, "linear") == 0;
  if (!linear && (!type || strcmp(type, "llama3") != 0))
    return KS_FAIL(KS_EUNSUPPORTED, "%s: %s of type \"%.100s\"; default, linear and llama3 are supported",
                   s->path, key, type ? type : "?");
  c->rope_scaling = linear ? KS_ROPE_LINEAR : KS_ROPE_LLAMA3;
  KS_TRY_AS(get_double(&rope, "factor", NAN, &c->rope_factor), "%s", key);
  if (linear) return KS_OK;
  KS_TRY_AS(get_double(&rope, "low_freq_factor", NAN, &c->rope_low_freq_factor), "%s", key);
  KS_TRY_AS(get_double(&rope, "high_freq_factor", NAN, &c->rope_high_freq_factor), "%s", key);
  KS_TRY_AS(get_double(&rope, "original_max_position_embeddings", NAN, &c->rope_original_max), "%s", key);
  return KS_OK;
}

/* A window of W lets a token see the W tokens up to itself: sequences of at most W tokens never notice it. So
 * a model with a window is loaded with W as its longest sequence, and computes exactly what it should. */
static ks_status apply_window(const source *s, const architecture *a, ks_model_config *c) {
  bool used = a->is_mistral;
  const json_t *types = get(s, "layer_types"), *type;
  size_t i;
  int64_t window;
  if (a->is_qwen2 || a->is_qwen3) KS_TRY(get_bool(s, "use_sliding_window", &used));
  json_array_foreach(types, i, type) {
    const char *name = json_string_value(type);
    bool sliding = name && strcmp(name, "sliding_attention") == 0;
    if (!sliding && (!name || strcmp(name, "full_attention") != 0))
      return KS_FAIL(KS_EUNSUPPORTED, "%s: layer_types[%zu] \"%.100s\"; full_attention is supported", s->path,
                     i, name ? name : "?");
    used |= sliding;
  }
  KS_TRY(get_int(s, "sliding_window", INT64_MAX, &window));
  if (!used || window >= c->max_seq_len) return KS_OK;
  if (window < 1) return KS_FAIL(KS_EDATA, "%s: sliding_window is %lld", s->path, (long long)window);
  ks_log(KS_LOG_WARN, "model",
         "%s: attends within a window of %lld tokens; sequences are limited to it (of %lld)", s->path,
         (long long)window, (long long)c->max_seq_len);
  c->max_seq_len = window;
  return KS_OK;
}

static ks_status read_sizes(const source *s, const architecture *a, ks_model_config *c) {
  double eps;
  KS_TRY(get_int(s, "num_hidden_layers", -1, &c->n_layers));
  KS_TRY(get_int(s, "hidden_size", -1, &c->hidden_size));
  KS_TRY(get_int(s, "intermediate_size", -1, &c->intermediate_size));
  KS_TRY(get_int(s, "vocab_size", -1, &c->vocab_size));
  KS_TRY(get_int(s, "max_position_embeddings", -1, &c->max_seq_len));
  KS_TRY(get_int(s, "num_attention_heads", -1, &c->n_heads));
  if (c->n_heads < 1)
    return KS_FAIL(KS_EDATA, "%s: num_attention_heads is %lld", s->path, (long long)c->n_heads);
  KS_TRY(get_int(s, "num_key_value_heads", c->n_heads, &c->n_kv_heads));
  KS_TRY(get_int(s, "head_dim", a->is_qwen3 ? 128 : c->hidden_size / c->n_heads, &c->head_dim));
  KS_TRY(get_double(s, "rms_norm_eps", 1e-6, &eps));
  c->rms_eps = (float)eps;
  return KS_OK;
}

static ks_status add_eos(const source *s, const json_t *v, ks_model_config *c) {
  const int64_t id = json_is_integer(v) ? (int64_t)json_integer_value(v) : -1;
  if (id < 0 || id >= c->vocab_size)
    return KS_FAIL(KS_EDATA, "%s: eos_token_id is no id below vocab_size %lld", s->path,
                   (long long)c->vocab_size);
  if (c->n_eos == (int)(sizeof c->eos_ids / sizeof c->eos_ids[0]))
    return KS_FAIL(KS_EUNSUPPORTED, "%s: more than %d end tokens", s->path, c->n_eos);
  c->eos_ids[c->n_eos++] = (int32_t)id;
  return KS_OK;
}

/* One id or several; replaces what was there. */
static ks_status read_eos(const source *s, ks_model_config *c) {
  const json_t *v = get(s, "eos_token_id"), *one;
  size_t i;
  if (!v) return KS_OK;
  c->n_eos = 0;
  if (!json_is_array(v)) return add_eos(s, v, c);
  json_array_foreach(v, i, one) KS_TRY(add_eos(s, one, c));
  return KS_OK;
}

static ks_status read_ids(const source *s, ks_model_config *c) {
  int64_t bos;
  KS_TRY(get_int(s, "bos_token_id", INT64_MAX, &bos));
  c->bos_id = bos == INT64_MAX ? -1 : (int32_t)bos;
  if (bos != INT64_MAX && (bos < 0 || bos >= c->vocab_size))
    return KS_FAIL(KS_EDATA, "%s: bos_token_id is no id below vocab_size %lld", s->path,
                   (long long)c->vocab_size);
  return read_eos(s, c);
}

static ks_status read_config(const source *s, ks_hf_config *out) {
  ks_model_config *c = &out->config;
  const architecture *a = NULL;
  bool attention_bias;
  KS_TRY(find_architecture(s, &a));
  strcpy(out->architecture, a->name);
  KS_TRY(refuse_unknown(s));
  KS_TRY(read_sizes(s, a, c));
  KS_TRY(read_rope(s, c));
  KS_TRY(get_bool(s, "tie_word_embeddings", &c->tied_head));
  out->tie_unknown = !get(s, "tie_word_embeddings");
  KS_TRY(get_bool(s, "attention_bias", &attention_bias));
  KS_TRY(get_bool(s, "mlp_bias", &out->mlp_bias));
  c->qkv_bias = a->is_qwen2 || attention_bias;
  out->o_bias = attention_bias && !a->is_qwen2;
  c->qk_norm = a->is_qwen3;
  KS_TRY_AS(ks_model_config_check(c), "%s", s->path);
  KS_TRY(apply_window(s, a, c));
  return read_ids(s, c);
}

/* Chat models name more end tokens here, and generation in transformers obeys this file. */
static ks_status read_generation_config(const char *folder, ks_model_config *c) {
  char *path = NULL;
  json_t *json = NULL;
  ks_status status;
  KS_TRY_OUT(ks_path_join(folder, "generation_config.json", &path));
  if (ks_file_exists(path)) {
    KS_TRY_OUT(load_object(path, &json));
    KS_TRY_OUT(read_eos(&(source){path, json}, c));
  }
out:
  json_decref(json);
  free(path);
  return status;
}

ks_status ks_hf_config_read(const char *folder, ks_hf_config *out) {
  char *path = NULL;
  json_t *json = NULL;
  ks_status status;
  *out = (ks_hf_config){0};
  KS_TRY_OUT(ks_path_join(folder, "config.json", &path));
  if (!ks_file_exists(path)) {
    status =
        KS_FAIL(KS_EDATA, "%s: is missing; name a model's folder with config.json and safetensors", path);
    goto out;
  }
  KS_TRY_OUT(load_object(path, &json));
  KS_TRY_OUT(read_config(&(source){path, json}, out));
  KS_TRY_OUT(read_generation_config(folder, &out->config));
out:
  json_decref(json);
  free(path);
  return status;
}
