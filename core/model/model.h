/* A frozen Llama-type decoder: configuration and weights.
 *
 *   ks_model *model;
 *   KS_TRY(ks_model_load(ctx, "stories260K.bin", &KS_MODEL_LOAD_DEFAULT, &model));
 *   ... core/model/forward.h, generate.h ...
 *   ks_model_destroy(model);
 */
#ifndef KS_MODEL_H
#define KS_MODEL_H

#include "core/base/base.h"
#include "kernels/ops.h"

typedef enum { KS_ROPE_PLAIN = 0, KS_ROPE_LINEAR, KS_ROPE_LLAMA3 } ks_rope_scaling;

typedef struct {
  int64_t n_layers, hidden_size, intermediate_size, vocab_size, max_seq_len;
  int64_t n_heads, n_kv_heads, head_dim;
  float rms_eps;
  double rope_theta;
  ks_rope_scaling rope_scaling; /* LLAMA3 as in Hugging Face's rope_scaling of type "llama3" */
  double rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_max;
  bool tied_head; /* the head is the embedding matrix */
  bool qkv_bias;  /* Qwen2 */
  bool qk_norm;   /* Qwen3: RMSNorm over each head of q and k, before rotary */
  int32_t bos_id; /* -1: unknown */
  int32_t eos_ids[8];
  int n_eos;
} ks_model_config;

/* Linear layers that LoRA can target, in this order wherever an index 0..6 is used. */
#define KS_TARGET_MAP(X) X(q) X(k) X(v) X(o) X(gate) X(up) X(down)
typedef enum {
#define X(name) KS_TARGET_##name,
  KS_TARGET_MAP(X)
#undef X
      KS_N_TARGETS
} ks_target;
const char *ks_target_name(ks_target t); /* "q" */
/* n_out and n_in of a target under config. */
void ks_target_shape(const ks_model_config *c, ks_target t, int64_t *n_out, int64_t *n_in);

typedef struct {
  /* q: [n_heads*head_dim, hidden], k, v: [n_kv_heads*head_dim, hidden], o: [hidden, n_heads*head_dim],
   * gate, up: [intermediate, hidden], down: [hidden, intermediate] */
  ks_weight *linear[KS_N_TARGETS];
  float *attn_norm, *mlp_norm; /* [hidden], backend memory */
  float *q_norm, *k_norm;      /* [head_dim] or NULL */
} ks_model_layer;

typedef struct {
  ks_ctx *ctx;
  ks_model_config config;
  ks_weight *embedding;  /* [vocab, hidden] */
  ks_weight *head;       /* [vocab, hidden]; == embedding when tied */
  float *final_norm;     /* [hidden] */
  ks_model_layer *layers; /* [n_layers] */
  double *inv_freq;      /* host [head_dim / 2], rope scaling applied */
  int64_t n_params;
  char sha256[65];       /* of the weight bytes as stored in the file(s), in file order */
  char format[32];       /* "llama2.c", "llama2.c v1", "safetensors", "random" */
} ks_model;

typedef struct {
  ks_dtype dtype; /* of the packed weights */
} ks_model_load_params;
#define KS_MODEL_LOAD_DEFAULT ((ks_model_load_params){.dtype = KS_DTYPE_F32})

/* Loads a llama2.c file (legacy or version 1), or a Hugging Face folder of a LlamaForCausalLM, MistralForCausalLM,
 * Qwen2ForCausalLM or Qwen3ForCausalLM (config.json + safetensors in one file or several through
 * model.safetensors.index.json; F32, F16, BF16). The kind is found from the content. llama2.c's rotary pairs (2j, 2j+1)
 * are brought to the half-split order by permuting the rows of q and k at load.
 * - End tokens: generation_config.json's where it names some, else config.json's; llama2.c: 2 and 1 (its stories end where
 *   the next begins).
 * - A model that attends within a sliding window gets the window as max_seq_len, with a warning in the log: up to there it
 *   computes the same.
 * - sha256 is of all bytes behind the header, of several files one after the other by name.
 * - The file is mapped, packed tensor by tensor and let go: memory peaks at the packed model and one tensor.
 * Every size in a header is checked against the file before use. Errors: KS_EDATA with path, byte offset or tensor name;
 * KS_EUNSUPPORTED names what is not supported (other architectures, rotary scalings, quantized weights, a tensor that the
 * model would not use). */
ks_status ks_model_load(ks_ctx *ctx, const char *path, const ks_model_load_params *params, ks_model **out);
/* Normal(0, 0.02) weights, norms 1: for benchmarks and tests. */
ks_status ks_model_create_random(ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype, uint64_t seed, ks_model **out);
/* The same distribution in a tenth of the time: drawn once for the largest matrix, read from another place on for each. For
 * benchmarks of large models. */
ks_status ks_model_create_random_quickly(ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype,
                                         uint64_t seed, ks_model **out);
void ks_model_destroy(ks_model *m); /* NULL-safe */
/* KS_EDATA with the offending field when a configuration makes no sense (zero sizes, n_heads % n_kv_heads, odd head_dim,
 * sizes whose products overflow). */
ks_status ks_model_config_check(const ks_model_config *c);
/* inv_freq[j] = rope_theta^(-2j / head_dim), then scaling. out: [head_dim / 2]. */
void ks_model_inv_freq(const ks_model_config *c, double *out);

#endif
