/* Internal: a checkpoint as it lies in its files, before its weights are packed. Opening one reads headers
 * only. */
#ifndef KS_CHECKPOINT_H
#define KS_CHECKPOINT_H

#include "core/model/model.h"

typedef struct {
  const unsigned char *data; /* in a mapped file, aligned to nothing; NULL: not there */
  ks_dtype dtype;
  int64_t n_out, n_in; /* row-major; a vector has n_in = 1 */
} ks_tensor;

typedef struct {
  ks_tensor linear[KS_N_TARGETS], bias[KS_N_TARGETS];
  ks_tensor attn_norm, mlp_norm, q_norm, k_norm;
} ks_checkpoint_layer;

typedef struct {
  const unsigned char *data;
  size_t n;
} ks_bytes;

typedef struct {
  ks_model_config config;
  ks_tensor embedding, head, final_norm; /* head: data NULL when tied */
  ks_checkpoint_layer *layers;           /* [config.n_layers] */
  bool interleaved;  /* rows of q and k are rotary pairs (2j, 2j + 1), not halves (j, j + head_dim / 2) */
  ks_file_map *maps; /* [n_maps] */
  ks_bytes *weights; /* [n_maps]: each map's part that is weights */
  size_t n_maps;
  char format[32];
} ks_checkpoint;

/* The kind is found from the content. ks_checkpoint_close also after a failure. */
ks_status ks_checkpoint_open(const char *path, ks_checkpoint *c);
void ks_checkpoint_close(ks_checkpoint *c);
/* Of the weights' bytes, file after file. */
void ks_checkpoint_hash(const ks_checkpoint *c, char hex[65]);

/* The two formats. */
ks_status ks_checkpoint_open_llama2c(const char *path, ks_checkpoint *c);
ks_status ks_checkpoint_open_hf(const char *folder, ks_checkpoint *c);
/* config.json, and generation_config.json for the end tokens where there is one. What config cannot say:
 * *tie_unknown (the key is not there) and which biases there are. */
typedef struct {
  ks_model_config config;
  char architecture[32];
  bool tie_unknown, o_bias, mlp_bias;
} ks_hf_config;
ks_status ks_hf_config_read(const char *folder, ks_hf_config *out);

/* Host values as float32. out: [n_out * n_in]. */
void ks_tensor_read_f32(const ks_tensor *t, float *out);
/* Rows of a q or k matrix from interleaved pairs to halves. out: as many bytes as t has. */
void ks_tensor_read_halves(const ks_tensor *t, int64_t head_dim, void *out);
size_t ks_tensor_bytes(const ks_tensor *t);
/* The mapped pages may leave memory: they were packed, or hashed. */
void ks_bytes_release(const unsigned char *data, size_t n);

#endif
