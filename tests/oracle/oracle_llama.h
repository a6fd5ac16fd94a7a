/* A whole Llama-type decoder with LoRA in float64, as plainly as it can be written: one sequence at a time,
 * no cache. */
#ifndef KS_ORACLE_LLAMA_H
#define KS_ORACLE_LLAMA_H

#include "core/model/model.h"

typedef struct {
  double *linear[KS_N_TARGETS]; /* [n_out, n_in] */
  double *bias[KS_N_TARGETS];   /* [n_out] or NULL */
  double *attn_norm, *mlp_norm; /* [hidden] */
  double *q_norm, *k_norm;      /* [head_dim] or NULL */
} ks_oracle_layer;

typedef struct {
  ks_model_config config;
  double *embedding, *head; /* [vocab, hidden] */
  double *final_norm;       /* [hidden] */
  ks_oracle_layer *layers;
  double *inv_freq; /* [head_dim / 2] */
} ks_oracle_llama;

/* Adapter in the layout of ks_adapter: layer by layer, target by target, A [rank, n_in], then B transposed
 * [rank, n_out]. */
typedef struct {
  int64_t rank;
  double scale;
  uint32_t targets; /* bit (1 << target) */
  const double *weights;
} ks_oracle_lora;

void ks_oracle_llama_shape(const ks_model_config *c, int target, int64_t *n_out, int64_t *n_in);
/* Logits [n_tokens, vocab] of one sequence; lora may be NULL. */
void ks_oracle_llama_logits(const ks_oracle_llama *m, const ks_oracle_lora *lora, const int32_t *tokens,
                            int64_t n_tokens, double *logits);
/* losses[i - loss_begin] = -log p(tokens[i] | tokens before) for i >= loss_begin. */
void ks_oracle_llama_losses(const ks_oracle_llama *m, const ks_oracle_lora *lora, const int32_t *tokens,
                            int64_t n_tokens, int64_t loss_begin, double *losses);

#endif
