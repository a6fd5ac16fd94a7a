/* Hugging Face folders: against what transformers wrote (tests/fixtures/make_models.py), edited, and damaged.
 */
#include "core/model/safetensors.h"
#include "tests/core/model/hostile.h"

#include <jansson.h>
#include <math.h>

#define FOLDER KS_SOURCE_DIR "/tests/fixtures/models"

static json_t *read_json(const char *folder, const char *name) {
  char path[1024];
  json_error_t error;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  json_t *j = json_load_file(path, 0, &error);
  cr_assert(j, "%s: %s", path, error.text);
  return j;
}

static int64_t number(const json_t *c, const char *key) {
  return json_integer_value(json_object_get(c, key));
}

/* ---------------------------------------------------------------- what transformers wrote */

static const ks_tensor *by_role(const ks_checkpoint *c, const char *role) {
  if (strcmp(role, "embedding") == 0) return &c->embedding;
  if (strcmp(role, "head") == 0) return &c->head;
  if (strcmp(role, "final_norm") == 0) return &c->final_norm;
  const ks_checkpoint_layer *l = &c->layers[atoi(role)];
  const char *name = strchr(role, '.') + 1, *dot = strchr(name, '.');
  const struct {
    const char *name;
    const ks_tensor *t;
  } norms[] = {{"attn_norm", &l->attn_norm},
               {"mlp_norm", &l->mlp_norm},
               {"q_norm", &l->q_norm},
               {"k_norm", &l->k_norm}};
  for (size_t i = 0; i < 4; i++)
    if (strcmp(name, norms[i].name) == 0) return norms[i].t;
  for (int t = 0; t < KS_N_TARGETS; t++) {
    const char *target = ks_target_name((ks_target)t);
    if (strncmp(name, target, strlen(target)) == 0 &&
        strlen(target) == (dot ? (size_t)(dot - name) : strlen(name)))
      return dot ? &l->bias[t] : &l->linear[t];
  }
  return NULL;
}

static double weighted_sum(const ks_tensor *t) {
  size_t n = (size_t)(t->n_out * t->n_in);
  float *values = malloc(n * sizeof *values);
  double s = 0;
  ks_tensor_read_f32(t, values);
  for (size_t i = 0; i < n; i++)
    s += (double)values[i] * (double)(i % 17 + 1);
  free(values);
  return s;
}

static size_t tensors_of(const ks_checkpoint *c) {
  size_t n = 2 + (c->head.data != NULL);
  for (int64_t i = 0; i < c->config.n_layers; i++) {
    for (int t = 0; t < KS_N_TARGETS; t++)
      n += (c->layers[i].linear[t].data != NULL) + (c->layers[i].bias[t].data != NULL);
    n += 2 + (c->layers[i].q_norm.data != NULL) + (c->layers[i].k_norm.data != NULL);
  }
  return n;
}

static void check_tensors(const char *folder, const ks_checkpoint *c, const json_t *tensors) {
  const json_t *one;
  size_t i;
  cr_expect_eq(tensors_of(c), json_array_size(tensors), "%s: %zu tensors", folder, tensors_of(c));
  json_array_foreach(tensors, i, one) {
    const char *role = json_string_value(json_array_get(one, 0));
    const json_t *shape = json_array_get(one, 1);
    const ks_tensor *t = by_role(c, role);
    cr_assert(t && t->data, "%s: no %s", folder, role);
    cr_expect_eq(t->n_out, json_integer_value(json_array_get(shape, 0)), "%s: rows of %s", folder, role);
    cr_expect_eq(t->n_in, json_integer_value(json_array_get(shape, 1)), "%s: columns of %s", folder, role);
    cr_expect_eq(weighted_sum(t), json_number_value(json_array_get(one, 2)), "%s: values of %s", folder,
                 role);
  }
}

/* The reference was computed in float32: its exponent has one rounding (which the base multiplies by its
 * logarithm), the power, the reciprocal and the six operations of scaling one each. */
static void check_frequencies(const char *folder, const ks_model_config *c, const json_t *expected) {
  double *freq = malloc((size_t)c->head_dim * sizeof *freq);
  const double u = 0x1p-24;
  cr_assert_eq((int64_t)json_array_size(expected), c->head_dim / 2);
  ks_model_inv_freq(c, freq);
  for (size_t j = 0; j < json_array_size(expected); j++) {
    double ref = json_number_value(json_array_get(expected, j)), tol = (log(c->rope_theta) + 9) * u * ref;
    cr_expect(fabs(freq[j] - ref) <= tol, "%s: frequency %zu: %.9g, expected %.9g", folder, j, freq[j], ref);
  }
  free(freq);
}

static void check_config(const char *folder, const ks_model_config *c, const json_t *e) {
  const struct {
    const char *name;
    int64_t value;
  } sizes[] = {{"n_layers", c->n_layers},
               {"hidden_size", c->hidden_size},
               {"intermediate_size", c->intermediate_size},
               {"vocab_size", c->vocab_size},
               {"max_seq_len", c->max_seq_len},
               {"n_heads", c->n_heads},
               {"n_kv_heads", c->n_kv_heads},
               {"head_dim", c->head_dim},
               {"bos", c->bos_id},
               {"eos", -1}};
  for (size_t i = 0; i + 1 < sizeof sizes / sizeof sizes[0]; i++)
    cr_expect_eq(sizes[i].value, number(e, sizes[i].name), "%s: %s is %lld", folder, sizes[i].name,
                 (long long)sizes[i].value);
  cr_expect_eq(c->rms_eps, (float)json_real_value(json_object_get(e, "rms_eps")), "%s", folder);
  cr_expect_eq(c->rope_theta, json_number_value(json_object_get(e, "rope_theta")), "%s", folder);
  cr_expect_eq(c->tied_head, json_is_true(json_object_get(e, "tied")), "%s", folder);
  cr_expect_eq(c->qkv_bias, json_is_true(json_object_get(e, "qkv_bias")), "%s", folder);
  cr_expect_eq(c->qk_norm, json_is_true(json_object_get(e, "qk_norm")), "%s", folder);
  const json_t *eos = json_object_get(e, "eos");
  cr_expect_eq((size_t)c->n_eos, json_array_size(eos), "%s: %d end tokens", folder, c->n_eos);
  for (int i = 0; i < c->n_eos; i++)
    cr_expect_eq(c->eos_ids[i], json_integer_value(json_array_get(eos, (size_t)i)), "%s: end token %d",
                 folder, i);
  check_frequencies(folder, c, json_object_get(e, "inv_freq"));
}

/* Row by row out of the packed embedding, and what else the model says of itself. */
static void check_packed(const char *folder, const ks_checkpoint *c, ks_model *m, const json_t *e) {
  size_t n = (size_t)(c->embedding.n_out * c->embedding.n_in);
  int32_t *tokens = malloc((size_t)c->embedding.n_out * sizeof *tokens);
  float *expected = malloc(n * sizeof *expected), *host = malloc(n * sizeof *host);
  void *y;
  for (int32_t i = 0; i < c->embedding.n_out; i++)
    tokens[i] = i;
  ks_tensor_read_f32(&c->embedding, expected);
  cr_assert_eq(ks_mem_alloc(m->ctx, n * sizeof(float), &y), KS_OK);
  cr_assert_eq(ks_embed_forward(m->ctx, &(ks_embed_args){m->embedding, tokens, y, c->embedding.n_out, NULL}),
               KS_OK, "%s", ks_error_message());
  cr_assert_eq(ks_mem_download(m->ctx, host, y, n * sizeof(float)), KS_OK);
  cr_expect(memcmp(host, expected, n * sizeof(float)) == 0, "%s: embedding", folder);
  ks_mem_free(m->ctx, y);
  cr_expect_eq(m->n_params, number(e, "n_params"), "%s: %lld parameters", folder, (long long)m->n_params);
  cr_expect_eq(m->head == m->embedding, m->config.tied_head, "%s", folder);
  cr_expect_str_eq(m->format, "safetensors");
  char hex[65];
  ks_checkpoint_hash(c, hex);
  cr_expect_str_eq(m->sha256, hex);
  free(tokens);
  free(expected);
  free(host);
}

Test(load_hf, equal_to_transformers) {
  json_t *all = read_json(FOLDER, "expected.json"), *e;
  const char *name;
  ks_ctx *ctx;
  cr_assert_eq(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}), KS_OK);
  json_object_foreach(all, name, e) {
    char folder[1024];
    ks_checkpoint c;
    ks_model *m;
    snprintf(folder, sizeof folder, "%s/%s", FOLDER, name);
    cr_assert_eq(ks_checkpoint_open(folder, &c), KS_OK, "%s", ks_error_message());
    check_config(name, &c.config, json_object_get(e, "config"));
    check_tensors(name, &c, json_object_get(e, "tensors"));
    cr_expect_not(c.interleaved);
    cr_assert_eq(ks_model_load(ctx, folder, &KS_MODEL_LOAD_DEFAULT, &m), KS_OK, "%s", ks_error_message());
    check_packed(name, &c, m, json_object_get(e, "config"));
    ks_model_destroy(m);
    ks_checkpoint_close(&c);
  }
  ks_ctx_destroy(ctx);
  json_decref(all);
}

/* ---------------------------------------------------------------- a folder of our own */

typedef struct {
  char path[64];
} scratch;

static scratch scratch_make(void) {
  scratch s = {"/tmp/ks_load_hf_XXXXXX"};
  cr_assert(mkdtemp(s.path));
  return s;
}

static void scratch_put(const scratch *s, const char *name, const char *bytes, size_t n) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", s->path, name);
  hostile_write(path, bytes, n);
}

static void scratch_copy(const scratch *s, const char *from, const char *name) {
  char path[1024], *bytes;
  size_t n;
  snprintf(path, sizeof path, "%s/%s/%s", FOLDER, from, name);
  cr_assert_eq(ks_file_read(path, 1 << 20, &bytes, &n), KS_OK, "%s", ks_error_message());
  scratch_put(s, name, bytes, n);
  free(bytes);
}

static void scratch_remove(const scratch *s) {
  static const char *const names[] = {"config.json",
                                      "generation_config.json",
                                      "model.safetensors",
                                      "model.safetensors.index.json",
                                      "model-00001-of-00004.safetensors",
                                      "model-00002-of-00004.safetensors",
                                      "model-00003-of-00004.safetensors",
                                      "model-00004-of-00004.safetensors"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", s->path, names[i]);
    unlink(path);
  }
  rmdir(s->path);
}

static ks_status open_folder(const char *path) {
  ks_checkpoint c;
  ks_status s = ks_checkpoint_open(path, &c);
  if (s == KS_OK) { /* every byte must be there to be read */
    char hex[65];
    ks_checkpoint_hash(&c, hex);
    for (int64_t i = 0; i < c.config.n_layers; i++)
      for (int t = 0; t < KS_N_TARGETS; t++)
        (void)weighted_sum(&c.layers[i].linear[t]);
  }
  ks_checkpoint_close(&c);
  return s;
}

/* One key of llama_f32's config.json at a time. */
static const struct {
  const char *key, *value; /* value NULL: the key is taken out */
  ks_status status;
  const char *says;
} config_cases[] = {
    {"architectures", "[\"GPT2LMHeadModel\"]", KS_EUNSUPPORTED, "GPT2LMHeadModel"},
    {"architectures", NULL, KS_OK, NULL}, /* model_type says it */
    {"architectures", "[\"MistralForCausalLM\"]", KS_OK, NULL},
    {"architectures", "[\"Qwen2ForCausalLM\"]", KS_EDATA, "self_attn.q_proj.bias"},
    {"architectures", "[\"Qwen3ForCausalLM\"]", KS_EDATA, "q_norm"},
    {"hidden_act", "\"gelu\"", KS_EUNSUPPORTED, "gelu"},
    {"quantization_config", "{\"bits\":4}", KS_EUNSUPPORTED, "quantized"},
    {"partial_rotary_factor", "0.5", KS_EUNSUPPORTED, "partial_rotary_factor"},
    {"num_hidden_layers", "3", KS_EDATA, "model.layers.2"},
    {"num_hidden_layers", "1", KS_EUNSUPPORTED, "model.layers.1"},
    {"num_hidden_layers", "0", KS_EDATA, "n_layers"},
    {"num_hidden_layers", "2000000000", KS_EDATA, "tensors"},
    {"num_hidden_layers", "1000000", KS_EDATA, "tensors"},
    {"num_hidden_layers", "9000000000000000000", KS_EDATA, "n_layers"},
    {"num_hidden_layers", "\"2\"", KS_EDATA, "num_hidden_layers"},
    {"num_hidden_layers", "2.0", KS_EDATA, "num_hidden_layers"},
    {"num_hidden_layers", NULL, KS_EDATA, "num_hidden_layers"},
    {"hidden_size", "8", KS_EDATA, "[32, 16]"},
    {"hidden_size", "-16", KS_EDATA, "hidden_size"},
    {"hidden_size", "2147483647", KS_EDATA, "config.json"},
    {"vocab_size", "33", KS_EDATA, "embed_tokens"},
    {"vocab_size", "2", KS_EDATA, "eos_token_id"},
    {"intermediate_size", NULL, KS_EDATA, "intermediate_size"},
    {"num_attention_heads", "3", KS_EDATA, "n_heads"},
    {"num_attention_heads", "0", KS_EDATA, "num_attention_heads"},
    {"num_attention_heads", "-4", KS_EDATA, "num_attention_heads"},
    {"num_key_value_heads", NULL, KS_EDATA, "k_proj"}, /* all heads */
    {"num_key_value_heads", "0", KS_EDATA, "n_kv_heads"},
    {"head_dim", NULL, KS_OK, NULL},
    {"head_dim", "null", KS_OK, NULL},
    {"head_dim", "5", KS_EDATA, "odd"},
    {"head_dim", "8", KS_EDATA, "q_proj"},
    {"max_position_embeddings", "0", KS_EDATA, "max_seq_len"},
    {"rms_norm_eps", "-1", KS_EDATA, "rms_eps"},
    {"rms_norm_eps", "\"x\"", KS_EDATA, "rms_norm_eps"},
    {"rms_norm_eps", NULL, KS_OK, NULL},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":2}", KS_EUNSUPPORTED, "yarn"},
    {"rope_parameters", "{\"rope_type\":\"dynamic\",\"factor\":2}", KS_EUNSUPPORTED, "dynamic"},
    {"rope_parameters", "{\"rope_type\":\"linear\"}", KS_EDATA, "factor"},
    {"rope_parameters", "{\"rope_type\":\"linear\",\"factor\":0}", KS_EDATA, "rope_factor"},
    {"rope_parameters",
     "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":1,"
     "\"original_max_position_embeddings\":32}",
     KS_EDATA, "rope_low_freq_factor"},
    {"rope_parameters", "{\"rope_type\":\"default\",\"rope_theta\":0}", KS_EDATA, "rope_theta"},
    {"rope_parameters", "{\"rope_type\":\"default\",\"partial_rotary_factor\":0.25}", KS_EUNSUPPORTED,
     "partial_rotary_factor"},
    {"rope_parameters", "[1]", KS_EDATA, "rope_parameters"},
    {"rope_parameters", "{\"full_attention\":{\"rope_type\":\"default\"}}", KS_EUNSUPPORTED,
     "full_attention"},
    {"layer_types", "[\"full_attention\",\"linear_attention\"]", KS_EUNSUPPORTED, "linear_attention"},
    {"tie_word_embeddings", "true", KS_EDATA, "lm_head.weight"},
    {"tie_word_embeddings", NULL, KS_OK, NULL},
    {"tie_word_embeddings", "1", KS_EDATA, "tie_word_embeddings"},
    {"attention_bias", "true", KS_EDATA, "self_attn.q_proj.bias"},
    {"bos_token_id", "32", KS_EDATA, "bos_token_id"},
    {"bos_token_id", "null", KS_OK, NULL},
    {"eos_token_id", "[1,2,3,4,5,6,7,8,9]", KS_EUNSUPPORTED, "end tokens"},
    {"eos_token_id", "[\"x\"]", KS_EDATA, "eos_token_id"},
};

Test(load_hf, config_edits) {
  scratch s = scratch_make();
  scratch_copy(&s, "llama_f32", "model.safetensors");
  for (size_t i = 0; i < sizeof config_cases / sizeof config_cases[0]; i++) {
    json_t *config = read_json(FOLDER "/llama_f32", "config.json");
    if (config_cases[i].value)
      json_object_set_new(config, config_cases[i].key,
                          json_loads(config_cases[i].value, JSON_DECODE_ANY, NULL));
    else
      json_object_del(config, config_cases[i].key);
    char *text = json_dumps(config, 0);
    scratch_put(&s, "config.json", text, strlen(text));
    ks_error_clear();
    ks_status status = open_folder(s.path);
    const char *value = config_cases[i].value ? config_cases[i].value : "(none)";
    cr_expect_eq(status, config_cases[i].status, "%s = %s: %s: %s", config_cases[i].key, value,
                 ks_status_name(status), ks_error_message());
    if (config_cases[i].says)
      cr_expect(strstr(ks_error_message(), config_cases[i].says) && strstr(ks_error_message(), s.path),
                "%s = %s: %s", config_cases[i].key, value, ks_error_message());
    free(text);
    json_decref(config);
  }
  scratch_remove(&s);
}

/* transformers 4 wrote rope_theta and rope_scaling beside each other; generation_config.json has the last
 * word on end tokens. */
Test(load_hf, older_layout) {
  scratch s = scratch_make();
  scratch_copy(&s, "llama_f32", "model.safetensors");
  json_t *config = read_json(FOLDER "/llama_f32", "config.json");
  json_object_del(config, "rope_parameters");
  json_object_set_new(config, "rope_theta", json_real(5e5));
  json_object_set_new(config, "rope_scaling", json_pack("{s:s,s:f}", "type", "linear", "factor", 2.0));
  char *text = json_dumps(config, 0);
  scratch_put(&s, "config.json", text, strlen(text));
  static const char generation[] = "{\"eos_token_id\":[3,4]}";
  scratch_put(&s, "generation_config.json", generation, sizeof generation - 1);
  ks_checkpoint c;
  cr_assert_eq(ks_checkpoint_open(s.path, &c), KS_OK, "%s", ks_error_message());
  cr_expect_eq(c.config.rope_theta, 5e5);
  cr_expect_eq(c.config.rope_scaling, KS_ROPE_LINEAR);
  cr_expect_eq(c.config.rope_factor, 2.0);
  cr_expect_eq(c.config.n_eos, 2);
  cr_expect_eq(c.config.eos_ids[0], 3);
  ks_checkpoint_close(&c);
  free(text);
  json_decref(config);
  scratch_remove(&s);
}

/* ---------------------------------------------------------------- several files */

static void edit_index(const scratch *s, const char *tensor, const char *file) {
  json_t *index = read_json(FOLDER "/llama_bf16_shards", "model.safetensors.index.json");
  json_object_set_new(json_object_get(index, "weight_map"), tensor, json_string(file));
  char *text = json_dumps(index, 0);
  scratch_put(s, "model.safetensors.index.json", text, strlen(text));
  free(text);
  json_decref(index);
}

Test(load_hf, shards) {
  scratch s = scratch_make();
  char name[64];
  scratch_copy(&s, "llama_bf16_shards", "config.json");
  cr_expect_eq(open_folder(s.path), KS_EDATA);
  cr_expect(strstr(ks_error_message(), "model.safetensors.index.json"), "%s", ks_error_message());
  scratch_copy(&s, "llama_bf16_shards", "model.safetensors.index.json");
  cr_expect_eq(open_folder(s.path), KS_EDATA, "no shard is there");
  for (int i = 1; i <= 4; i++) {
    snprintf(name, sizeof name, "model-0000%d-of-00004.safetensors", i);
    scratch_copy(&s, "llama_bf16_shards", name);
  }
  cr_expect_eq(open_folder(s.path), KS_OK, "%s", ks_error_message());
  static const struct {
    const char *tensor, *file, *says;
  } edits[] = {{"model.norm.weight", "../model-00001-of-00004.safetensors", "file name"},
               {"model.norm.weight", "/etc/passwd", "file name"},
               {"model.norm.weight", "", "file name"},
               {"model.norm.weight", "model-00009-of-00004.safetensors", "model-00009"},
               {"model.embed_tokens.weight", "model-00002-of-00004.safetensors", "model.embed_tokens.weight"},
               {"lm_head.weight", "model-00001-of-00004.safetensors", "lm_head.weight"}};
  for (size_t i = 0; i < sizeof edits / sizeof edits[0]; i++) {
    edit_index(&s, edits[i].tensor, edits[i].file);
    cr_expect_eq(open_folder(s.path), KS_EDATA, "%s in %s", edits[i].tensor, edits[i].file);
    cr_expect(strstr(ks_error_message(), edits[i].says), "%s", ks_error_message());
  }
  static const char *const indices[] = {
      "{}", "[]", "{\"weight_map\":{}}", "{\"weight_map\":{\"a\":1}}", "{\"weight_map\":[]}", ""};
  for (size_t i = 0; i < sizeof indices / sizeof indices[0]; i++) {
    scratch_put(&s, "model.safetensors.index.json", indices[i], strlen(indices[i]));
    cr_expect_eq(open_folder(s.path), KS_EDATA, "%s", indices[i]);
  }
  scratch_remove(&s);
}

/* ---------------------------------------------------------------- damage */

static void attack(const char *from, const char *name, size_t n_head, size_t n_copies) {
  scratch s = scratch_make();
  char path[256], *bytes;
  size_t n, before = ks_process_peak_bytes();
  scratch_copy(&s, from, "config.json");
  scratch_copy(&s, from, "generation_config.json");
  scratch_copy(&s, from, "model.safetensors");
  snprintf(path, sizeof path, "%s/%s", s.path, name);
  cr_assert_eq(ks_file_read(path, 1 << 20, &bytes, &n), KS_OK);
  hostile h = {.path = path, .load_path = s.path, .load = open_folder};
  hostile_try(&h, bytes, n, "whole", n);
  cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
  hostile_truncate(&h, bytes, n, n_head < 600 ? n_head : 600, 100);
  cr_expect_leq(h.n_loaded, 1, "%s: a cut file was taken for a whole one",
                name); /* but for blanks at its end */
  hostile_mutate(&h, bytes, n, n_head, n_copies);
  cr_expect_gt(h.n_refused, (int64_t)n_copies / 4, "%s: too few refused: the damage does not bite", name);
  hostile_limit_memory(before, 64);
  free(bytes);
  scratch_remove(&s);
}

Test(load_hf, damaged_config) {
  attack("llama_f32", "config.json", SIZE_MAX, 1200);
}

Test(load_hf, damaged_safetensors) {
  attack("llama_f32", "model.safetensors", 2200, 1500);
}
