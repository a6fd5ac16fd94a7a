/* LoRA adapters and their training.
 *
 * One job is one cell's fine-tuning at one trigger. A cohort's jobs train together: in each pass every active job contributes its own
 * rows as one segment; what a job computes is the same alone or in company, bit for bit.
 */
#ifndef KS_ADAPT_H
#define KS_ADAPT_H

#include "core/model/forward.h"

typedef struct {
  int32_t rank;
  float alpha;
  uint32_t targets; /* bit (1 << ks_target) */
} ks_adapter_params;

/* One user's LoRA weights with gradients and AdamW moments. The four arrays have the same layout: for each layer, for each target,
 * A [rank, n_in], then B transposed [rank, n_out]. */
typedef struct {
  ks_ctx *ctx;
  ks_adapter_params params;
  int64_t n_params;
  float *weights, *grads, *m, *v; /* backend memory [n_params] */
  int64_t step; /* optimizer steps done */
  ks_lora *loras; /* host [n_layers * KS_N_TARGETS], pointing into the arrays */
  int64_t n_layers;
  ks_model_config config;
} ks_adapter;

/* A ~ Kaiming uniform(-1/sqrt(n_in), 1/sqrt(n_in)) (PEFT's default: kaiming_uniform_ with a = sqrt 5), B = 0; drawn from (seed, KS_RNG_ADAPTER_INIT). */
ks_status ks_adapter_create(ks_ctx *ctx, const ks_model_config *config, const ks_adapter_params *params, uint64_t seed, ks_adapter **out);
void ks_adapter_destroy(ks_adapter *a); /* NULL-safe */
/* Back to the state after create with `seed`: weights, moments, step. */
ks_status ks_adapter_reset(ks_adapter *a, uint64_t seed);
ks_adapter_view ks_adapter_view_of(const ks_adapter *a);
/* Parameters as host arrays, for records: [n_params] each. load checks n. */
ks_status ks_adapter_save(const ks_adapter *a, float *weights, float *m, float *v);
ks_status ks_adapter_load(ks_adapter *a, const float *weights, const float *m, const float *v, int64_t n_params, int64_t step);
/* "q,k,v,o" -> bits; KS_ECONFIG names an unknown target. */
ks_status ks_targets_parse(const char *list, uint32_t *bits);

typedef enum { KS_SCHEDULE_CONSTANT = 0, KS_SCHEDULE_LINEAR, KS_SCHEDULE_COSINE } ks_schedule;
typedef struct {
  double learning_rate, weight_decay, beta1, beta2, eps;
  double max_grad_norm;  /* 0: no clipping; else the gradient is scaled by min(1, max_grad_norm / (norm + 1e-6)), as torch's clip_grad_norm_ */
  double warmup;         /* share of the steps with linearly rising rate, [0, 1); ceil(warmup * steps) steps, the first at rate 0 */
  ks_schedule schedule;  /* after warm-up: constant, or falling to 0; with warm-up as transformers' get_*_schedule_with_warmup */
  float dropout;
  int64_t batch_size;    /* examples per optimizer step */
  int64_t micro_batch;   /* examples per pass at most; gradients accumulate, with the same bits unless there is dropout; 0: batch_size */
  int64_t epochs;        /* passes over the examples; ignored when steps > 0 */
  int64_t steps;         /* optimizer steps; 0: by epochs */
  uint64_t seed;         /* order of examples and dropout */
  uint64_t round;        /* the trigger's number: a different order each time */
} ks_train_params;

/* One training text, of at most max_seq_len + 1 tokens (the last is only predicted): loss on tokens[i] for i >= loss_begin (predicted from i - 1); loss_begin >= 1. */
typedef struct {
  const int32_t *tokens;
  int64_t n_tokens, loss_begin;
} ks_example;

typedef struct {
  ks_adapter *adapter;
  const ks_example *examples;
  int64_t n_examples;
  ks_train_params params;
  /* results */
  int64_t n_steps;
  float *step_loss;      /* allocated [n_steps]: mean loss per target token; free() */
  float *step_grad_norm; /* allocated [n_steps]: before clipping; free() */
  int64_t n_tokens;      /* rows that went through the model */
} ks_train_job;

/* What a training pass may take. Neither changes a bit on the CPU; on a GPU max_rows does within rounding. */
typedef struct {
  int64_t max_rows; /* of a pass; 0: what suits the machine */
  int64_t recompute_layers; /* as in ks_run_params */
} ks_train_limits;

/* The loss of a step is the mean over its target tokens (Hugging Face's default). Jobs may differ in everything. limits: NULL for
 * zeros. Batches larger than max_rows come in several passes; only an example of more rows gets a pass of its own (with dropout,
 * pieces of a batch are cut at 1024 rows whatever max_rows is, so that masks do not depend on it). A step without any target token
 * changes nothing and reports loss 0. A loss or gradient that is not finite: KS_ENUMERIC naming job and step. A job without
 * examples does nothing. Two jobs may not share an adapter. On failure (KS_EINTERRUPTED too) results are freed, adapters are left
 * as they are after the last whole step of each, gradients undefined; the next ks_train clears them. */
ks_status ks_train(ks_model *model, ks_train_job *jobs, int64_t n_jobs, const ks_train_limits *limits, const ks_progress *progress);
/* Optimizer steps that a job will take. */
int64_t ks_train_n_steps(const ks_train_params *p, int64_t n_examples);

/* Summed loss and number of target tokens of each example under its adapter (-1 or adapter_index NULL: none): host out [n]. */
ks_status ks_evaluate_loss(ks_model *model, const ks_example *examples, const int32_t *adapter_index, int64_t n, const ks_adapter_view *adapters,
                           int64_t n_adapters, int64_t max_rows, const ks_progress *progress, double *loss, int64_t *n_targets);

#endif
