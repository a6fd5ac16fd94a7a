#include "core/model/checkpoint.h"

/* llama2.c's checkpoints (karpathy/llama2.c, export.py, run.c). Little-endian int32 fields and float32
 * weights. Legacy: seven fields, the vocabulary's size negative when the head is a matrix of its own; the
 * weights of all layers kind by kind; two tables of the rotary embedding, which are skipped; the head.
 * Version 1: magic, version, the seven fields, a byte that says whether the head is the embedding, zeros up
 * to byte 256; all norms; the matrices. */
enum { N_FIELDS = 7, LEGACY_HEADER = 4 * N_FIELDS, V1_HEADER = 256, MAGIC = 0x616b3432 };

typedef struct {
  const char *path;
  const unsigned char *data;
  size_t n, at;
} cursor;

static int32_t i32_at(const unsigned char *p) {
  int32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* What is not a llama2.c file, by its first bytes. */
static ks_status refuse_others(const char *path, const unsigned char *data, size_t n) {
  uint64_t header = 0;
  if (n < LEGACY_HEADER)
    return KS_FAIL(KS_EDATA, "%s: byte 0: %zu bytes are too few for a model's header; is the file complete?",
                   path, n);
  memcpy(&header, data, sizeof header);
  if (memcmp(data, "GGUF", 4) == 0)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: a GGUF file; name a folder with safetensors, or a llama2.c file",
                   path);
  if (memcmp(data, "PK\3\4", 4) == 0)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: a PyTorch file; convert it to safetensors and name its folder",
                   path);
  if (header < n && data[8] == '{')
    return KS_FAIL(KS_EDATA, "%s: a safetensors file; name the folder that holds it and config.json", path);
  return KS_OK;
}

static ks_status read_fields(const char *path, const unsigned char *fields, size_t offset,
                             ks_model_config *c) {
  static const char *const names[N_FIELDS] = {"dim",        "hidden_dim", "n_layers",   "n_heads",
                                              "n_kv_heads", "vocab_size", "max_seq_len"};
  int32_t v[N_FIELDS];
  for (size_t i = 0; i < N_FIELDS; i++) {
    v[i] = i32_at(fields + 4 * i);
    if (v[i] < 1)
      return KS_FAIL(KS_EDATA, "%s: byte %zu: %s is %d; is this a llama2.c model?", path, offset + 4 * i,
                     names[i], v[i]);
  }
  if (v[0] % v[3] != 0)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: dim %d is no multiple of n_heads %d; is this a llama2.c model?",
                   path, offset, v[0], v[3]);
  *c = (ks_model_config){.n_layers = v[2],
                         .hidden_size = v[0],
                         .intermediate_size = v[1],
                         .vocab_size = v[5],
                         .max_seq_len = v[6],
                         .n_heads = v[3],
                         .n_kv_heads = v[4],
                         .head_dim = v[0] / v[3],
                         .rms_eps = 1e-5f,
                         .rope_theta = 10000.0,
                         .bos_id = 1,
                         .eos_ids = {2, 1}, /* its stories end where the next begins */
                         .n_eos = 2};
  KS_TRY_AS(ks_model_config_check(c), "%s: byte %zu", path, offset);
  return KS_OK;
}

static ks_status take(cursor *in, const char *what, int64_t n_out, int64_t n_in, ks_tensor *t) {
  size_t n, bytes;
  if (!ks_mul_size((size_t)n_out, (size_t)n_in, &n) || !ks_mul_size(n, sizeof(float), &bytes) ||
      bytes > in->n - in->at)
    return KS_FAIL(KS_EDATA,
                   "%s: byte %zu: %s [%lld, %lld] runs past the file's end at %zu; is the file complete?",
                   in->path, in->at, what, (long long)n_out, (long long)n_in, in->n);
  *t = (ks_tensor){in->data + in->at, KS_DTYPE_F32, n_out, n_in};
  in->at += bytes;
  return KS_OK;
}

/* One kind of tensor of all layers; `place` is where it goes, as an offset into ks_checkpoint_layer. */
static ks_status take_layers(cursor *in, ks_checkpoint *c, const char *what, int64_t n_out, int64_t n_in,
                             size_t place) {
  for (int64_t i = 0; i < c->config.n_layers; i++) {
    ks_tensor t;
    KS_TRY(take(in, what, n_out, n_in, &t));
    memcpy((char *)&c->layers[i] + place, &t, sizeof t);
  }
  return KS_OK;
}

static ks_status take_target(cursor *in, ks_checkpoint *c, ks_target target) {
  int64_t n_out, n_in;
  ks_target_shape(&c->config, target, &n_out, &n_in);
  return take_layers(in, c, ks_target_name(target), n_out, n_in,
                     offsetof(ks_checkpoint_layer, linear) + (size_t)target * sizeof(ks_tensor));
}

static ks_status take_targets(cursor *in, ks_checkpoint *c, const ks_target *targets, size_t n) {
  for (size_t i = 0; i < n; i++)
    KS_TRY(take_target(in, c, targets[i]));
  return KS_OK;
}

static const ks_target attention[] = {KS_TARGET_q, KS_TARGET_k, KS_TARGET_v, KS_TARGET_o};
static const ks_target mlp[] = {KS_TARGET_gate, KS_TARGET_down, KS_TARGET_up}; /* w1, w2, w3 */
#define ATTN_NORM offsetof(ks_checkpoint_layer, attn_norm)
#define MLP_NORM  offsetof(ks_checkpoint_layer, mlp_norm)

static ks_status take_legacy(cursor *in, ks_checkpoint *c) {
  const ks_model_config *m = &c->config;
  ks_tensor rotary;
  KS_TRY(take(in, "the embedding", m->vocab_size, m->hidden_size, &c->embedding));
  KS_TRY(take_layers(in, c, "attention norm", m->hidden_size, 1, ATTN_NORM));
  KS_TRY(take_targets(in, c, attention, 4));
  KS_TRY(take_layers(in, c, "MLP norm", m->hidden_size, 1, MLP_NORM));
  KS_TRY(take_targets(in, c, mlp, 3));
  KS_TRY(take(in, "the final norm", m->hidden_size, 1, &c->final_norm));
  KS_TRY(take(in, "the rotary tables", m->max_seq_len, m->head_dim, &rotary));
  return m->tied_head ? KS_OK : take(in, "the head", m->vocab_size, m->hidden_size, &c->head);
}

static ks_status take_v1(cursor *in, ks_checkpoint *c) {
  const ks_model_config *m = &c->config;
  KS_TRY(take_layers(in, c, "attention norm", m->hidden_size, 1, ATTN_NORM));
  KS_TRY(take_layers(in, c, "MLP norm", m->hidden_size, 1, MLP_NORM));
  KS_TRY(take(in, "the final norm", m->hidden_size, 1, &c->final_norm));
  KS_TRY(take(in, "the embedding", m->vocab_size, m->hidden_size, &c->embedding));
  KS_TRY(take_targets(in, c, attention, 4));
  KS_TRY(take_targets(in, c, mlp, 3));
  return m->tied_head ? KS_OK : take(in, "the head", m->vocab_size, m->hidden_size, &c->head);
}

static ks_status read_v1_header(cursor *in, ks_model_config *config) {
  if (in->n < V1_HEADER)
    return KS_FAIL(KS_EDATA, "%s: the header has %d bytes, the file only %zu; is it complete?", in->path,
                   V1_HEADER, in->n);
  int32_t version = i32_at(in->data + 4);
  if (version != 1)
    return KS_FAIL(KS_EUNSUPPORTED,
                   "%s: byte 4: version %d; versions 0 and 1 (float32) are supported, export it again",
                   in->path, version);
  unsigned char shared = in->data[36];
  if (shared > 1)
    return KS_FAIL(KS_EDATA, "%s: byte 36: the flag of a shared head is %d, not 0 or 1", in->path, shared);
  KS_TRY(read_fields(in->path, in->data + 8, 8, config));
  config->tied_head = shared == 1;
  in->at = V1_HEADER;
  return KS_OK;
}

static ks_status read_legacy_header(cursor *in, ks_model_config *config) {
  unsigned char fields[LEGACY_HEADER];
  memcpy(fields, in->data, sizeof fields);
  int32_t vocab_size = i32_at(fields + 20);
  bool tied = vocab_size > 0;
  if (!tied) vocab_size = vocab_size == INT32_MIN ? 0 : -vocab_size;
  memcpy(fields + 20, &vocab_size, sizeof vocab_size);
  KS_TRY(read_fields(in->path, fields, 0, config));
  config->tied_head = tied;
  in->at = LEGACY_HEADER;
  return KS_OK;
}

ks_status ks_checkpoint_open_llama2c(const char *path, ks_checkpoint *c) {
  KS_TRY(ks_alloc_array(&c->maps, 1, sizeof *c->maps, "model: file"));
  KS_TRY(ks_alloc_array(&c->weights, 1, sizeof *c->weights, "model: file"));
  KS_TRY(ks_file_map_open(path, &c->maps[0]));
  c->n_maps = 1;
  cursor in = {path, c->maps[0].data, c->maps[0].n, 0};
  KS_TRY(refuse_others(path, in.data, in.n));
  bool v1 = i32_at(in.data) == MAGIC;
  KS_TRY(v1 ? read_v1_header(&in, &c->config) : read_legacy_header(&in, &c->config));
  c->weights[0] = (ks_bytes){in.data + in.at, in.n - in.at};
  c->interleaved = true;
  strcpy(c->format, v1 ? "llama2.c v1" : "llama2.c");
  /* A layer has at least its two norms and matrices of hidden_size rows: more layers cannot be in the file.
   */
  if (c->config.n_layers > (int64_t)(in.n / (4 * sizeof(float))) / c->config.hidden_size)
    return KS_FAIL(KS_EDATA, "%s: %lld layers do not fit its %zu bytes; is the file complete?", path,
                   (long long)c->config.n_layers, in.n);
  KS_TRY(ks_alloc_array(&c->layers, (size_t)c->config.n_layers, sizeof *c->layers, "model: layers"));
  KS_TRY(v1 ? take_v1(&in, c) : take_legacy(&in, c));
  if (in.at != in.n)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: %zu bytes follow the last weight; is this a llama2.c model?",
                   path, in.at, in.n - in.at);
  return KS_OK;
}
