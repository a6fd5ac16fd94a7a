#include "core/model/safetensors.h"

#include <jansson.h>
#include <stdio.h>

enum { MAX_INDEX = 64 << 20, MAX_SHARDS = 4096, NAME = 96 };

/* The files of a folder while their tensors are looked up. */
typedef struct {
  const char *folder;
  ks_safetensors *shards; /* by rising file name */
  size_t n_shards;
  json_t *index; /* NULL: one file */
  bool **used;   /* [n_shards][n_tensors] */
  char **names;  /* [n_shards] */
} folder_files;

static void files_close(folder_files *f) {
  for (size_t i = 0; i < f->n_shards; i++) {
    if (f->shards) ks_safetensors_close(&f->shards[i]);
    if (f->used) free(f->used[i]);
    if (f->names) free(f->names[i]);
  }
  free(f->shards);
  free(f->used);
  free(f->names);
  json_decref(f->index);
}

static ks_status read_index(folder_files *f, const char *path) {
  char *text = NULL;
  size_t n;
  json_error_t error;
  KS_TRY(ks_file_read(path, MAX_INDEX, &text, &n));
  f->index = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
  free(text);
  if (!f->index) return KS_FAIL(KS_EDATA, "%s:%d:%d: %s", path, error.line, error.column, error.text);
  const json_t *map = json_object_get(f->index, "weight_map");
  if (!json_is_object(map) || json_object_size(map) == 0)
    return KS_FAIL(KS_EDATA, "%s: has no weight_map from tensors to files", path);
  return KS_OK;
}

static int compare_names(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The distinct file names of weight_map, rising. They must lie in the folder itself. */
static ks_status list_shards(folder_files *f, const char *path) {
  json_t *map = json_object_get(f->index, "weight_map"), *value;
  const char *tensor;
  const char **all = NULL;
  size_t n = 0;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&all, json_object_size(map), sizeof *all, "model: files"));
  json_object_foreach(map, tensor, value) {
    const char *name = json_string_value(value);
    if (!name || !*name || strchr(name, '/') || name[0] == '.') {
      status =
          KS_FAIL(KS_EDATA, "%s: the file of tensor %.200s is no file name of this folder", path, tensor);
      goto out;
    }
    all[n++] = name;
  }
  qsort(all, n, sizeof *all, compare_names);
  size_t distinct = 0;
  for (size_t i = 0; i < n; i++)
    if (i == 0 || strcmp(all[i], all[i - 1]) != 0) all[distinct++] = all[i];
  if (distinct > MAX_SHARDS) {
    status = KS_FAIL(KS_EDATA, "%s: names %zu files, more than %d", path, distinct, MAX_SHARDS);
    goto out;
  }
  KS_TRY_OUT(ks_alloc_array(&f->names, distinct, sizeof *f->names, "model: files"));
  for (; f->n_shards < distinct; f->n_shards++)
    KS_TRY_OUT(ks_strdup(all[f->n_shards], &f->names[f->n_shards]));
out:
  free(all);
  return status;
}

static ks_status find_shards(folder_files *f) {
  char *single = NULL, *index = NULL;
  ks_status status;
  KS_TRY_OUT(ks_path_join(f->folder, "model.safetensors", &single));
  KS_TRY_OUT(ks_path_join(f->folder, "model.safetensors.index.json", &index));
  if (ks_file_exists(single)) {
    KS_TRY_OUT(ks_alloc_array(&f->names, 1, sizeof *f->names, "model: files"));
    KS_TRY_OUT(ks_strdup("model.safetensors", &f->names[0]));
    f->n_shards = 1;
  } else if (ks_file_exists(index)) {
    KS_TRY_OUT(read_index(f, index));
    KS_TRY_OUT(list_shards(f, index));
  } else {
    status =
        KS_FAIL(KS_EDATA, "%s: holds neither model.safetensors nor model.safetensors.index.json", f->folder);
  }
out:
  free(single);
  free(index);
  return status;
}

static ks_status files_open(folder_files *f) {
  KS_TRY(find_shards(f));
  KS_TRY(ks_alloc_array(&f->shards, f->n_shards, sizeof *f->shards, "model: files"));
  KS_TRY(ks_alloc_array(&f->used, f->n_shards, sizeof *f->used, "model: files"));
  for (size_t i = 0; i < f->n_shards; i++) {
    char *path = NULL;
    KS_TRY(ks_path_join(f->folder, f->names[i], &path));
    ks_status status = ks_safetensors_open(path, &f->shards[i]);
    free(path);
    KS_TRY(status);
    KS_TRY(ks_alloc_array(&f->used[i], f->shards[i].n_tensors, sizeof **f->used, "model: tensors"));
  }
  return KS_OK;
}

/* *t is NULL when there is no such tensor. */
static ks_status find_tensor(folder_files *f, const char *name, size_t *shard, const ks_st_tensor **t) {
  *shard = 0;
  *t = NULL;
  if (f->index) {
    const char *file = json_string_value(json_object_get(json_object_get(f->index, "weight_map"), name));
    if (!file) return KS_OK;
    while (strcmp(f->names[*shard], file) != 0)
      ++*shard;
  }
  *t = ks_safetensors_find(&f->shards[*shard], name);
  if (f->index && !*t)
    return KS_FAIL(KS_EDATA, "%s: has no tensor %s, though the index says so; is it complete?",
                   f->shards[*shard].path, name);
  return KS_OK;
}

/* n_in 0: a vector. */
static ks_status take(folder_files *f, const char *name, int64_t n_out, int64_t n_in, ks_tensor *out) {
  size_t shard;
  const ks_st_tensor *t;
  KS_TRY(find_tensor(f, name, &shard, &t));
  if (!t) return KS_FAIL(KS_EDATA, "%s: there is no tensor %s, which config.json asks for", f->folder, name);
  f->used[shard][t - f->shards[shard].tensors] = true;
  return ks_safetensors_view(&f->shards[shard], t, n_out, n_in, out);
}

static const char *const target_names[KS_N_TARGETS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

static ks_status take_layer(folder_files *f, const ks_hf_config *hf, int64_t i, ks_checkpoint_layer *layer) {
  const ks_model_config *c = &hf->config;
  char name[NAME];
  for (int t = 0; t < KS_N_TARGETS; t++) {
    int64_t n_out, n_in;
    ks_target_shape(c, (ks_target)t, &n_out, &n_in);
    snprintf(name, sizeof name, "model.layers.%lld.%s.weight", (long long)i, target_names[t]);
    KS_TRY(take(f, name, n_out, n_in, &layer->linear[t]));
    bool biased = t < KS_TARGET_o ? c->qkv_bias : t == KS_TARGET_o ? hf->o_bias : hf->mlp_bias;
    snprintf(name, sizeof name, "model.layers.%lld.%s.bias", (long long)i, target_names[t]);
    if (biased) KS_TRY(take(f, name, n_out, 0, &layer->bias[t]));
  }
  const struct {
    const char *name;
    int64_t n;
    ks_tensor *out;
  } norms[] = {{"input_layernorm", c->hidden_size, &layer->attn_norm},
               {"post_attention_layernorm", c->hidden_size, &layer->mlp_norm},
               {"self_attn.q_norm", c->head_dim, &layer->q_norm},
               {"self_attn.k_norm", c->head_dim, &layer->k_norm}};
  for (int n = 0; n < (c->qk_norm ? 4 : 2); n++) {
    snprintf(name, sizeof name, "model.layers.%lld.%s.weight", (long long)i, norms[n].name);
    KS_TRY(take(f, name, norms[n].n, 0, norms[n].out));
  }
  return KS_OK;
}

/* A tied checkpoint may hold the head once more; then both must be the same. */
static ks_status take_head(folder_files *f, const ks_hf_config *hf, ks_checkpoint *c) {
  size_t shard;
  const ks_st_tensor *t;
  KS_TRY(find_tensor(f, "lm_head.weight", &shard, &t));
  if (hf->tie_unknown) c->config.tied_head = t == NULL;
  if (c->config.tied_head && !t) return KS_OK;
  KS_TRY(take(f, "lm_head.weight", c->config.vocab_size, c->config.hidden_size, &c->head));
  if (!c->config.tied_head) return KS_OK;
  if (c->head.dtype != c->embedding.dtype ||
      memcmp(c->head.data, c->embedding.data, ks_tensor_bytes(&c->embedding)) != 0)
    return KS_FAIL(
        KS_EDATA,
        "%s: tie_word_embeddings is true, but lm_head.weight is not the embedding; correct config.json",
        f->folder);
  c->head = (ks_tensor){0};
  return KS_OK;
}

/* A tensor that nothing reads would silently be missing from the computation. Old files hold the rotary
 * table. */
static ks_status check_all_used(const folder_files *f, const char *architecture) {
  static const char rotary[] = ".rotary_emb.inv_freq";
  for (size_t i = 0; i < f->n_shards; i++)
    for (size_t j = 0; j < f->shards[i].n_tensors; j++) {
      const char *name = f->shards[i].tensors[j].name;
      size_t n = strlen(name), tail = sizeof rotary - 1;
      if (f->used[i][j] || (n > tail && strcmp(name + n - tail, rotary) == 0)) continue;
      return KS_FAIL(KS_EUNSUPPORTED, "%s: tensor %.200s is no part of a %s as config.json describes it",
                     f->shards[i].path, name, architecture);
    }
  return KS_OK;
}

static ks_status take_all(folder_files *f, const ks_hf_config *hf, ks_checkpoint *c) {
  const ks_model_config *m = &hf->config;
  size_t n_tensors = 0;
  for (size_t i = 0; i < f->n_shards; i++)
    n_tensors += f->shards[i].n_tensors;
  if ((size_t)m->n_layers > n_tensors)
    return KS_FAIL(KS_EDATA, "%s: %lld layers in config.json, but only %zu tensors", f->folder,
                   (long long)m->n_layers, n_tensors);
  KS_TRY(ks_alloc_array(&c->layers, (size_t)m->n_layers, sizeof *c->layers, "model: layers"));
  KS_TRY(take(f, "model.embed_tokens.weight", m->vocab_size, m->hidden_size, &c->embedding));
  KS_TRY(take(f, "model.norm.weight", m->hidden_size, 0, &c->final_norm));
  KS_TRY(take_head(f, hf, c));
  for (int64_t i = 0; i < m->n_layers; i++)
    KS_TRY(take_layer(f, hf, i, &c->layers[i]));
  return check_all_used(f, hf->architecture);
}

/* The maps outlive the parsed headers. */
static ks_status keep_maps(folder_files *f, ks_checkpoint *c) {
  KS_TRY(ks_alloc_array(&c->maps, f->n_shards, sizeof *c->maps, "model: files"));
  KS_TRY(ks_alloc_array(&c->weights, f->n_shards, sizeof *c->weights, "model: files"));
  for (; c->n_maps < f->n_shards; c->n_maps++) {
    ks_safetensors *st = &f->shards[c->n_maps];
    c->maps[c->n_maps] = st->map;
    c->weights[c->n_maps] = st->data;
    st->map = (ks_file_map){0};
  }
  return KS_OK;
}

ks_status ks_checkpoint_open_hf(const char *folder, ks_checkpoint *c) {
  ks_hf_config hf;
  folder_files f = {.folder = folder};
  ks_status status;
  KS_TRY_OUT(ks_hf_config_read(folder, &hf));
  c->config = hf.config;
  strcpy(c->format, "safetensors");
  KS_TRY_OUT(files_open(&f));
  KS_TRY_OUT(take_all(&f, &hf, c));
  KS_TRY_OUT(keep_maps(&f, c));
out:
  files_close(&f);
  return status;
}
