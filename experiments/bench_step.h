/* A fine-tuning step on random tokens: forward, loss, backward, clipping and AdamW of every adapter, and one
 * wait.
 *
 *   ks_bench_step s;
 *   KS_TRY(ks_bench_step_create(&(ks_bench_step_params){...}, &s));   // also after a failure: destroy
 *   KS_TRY(ks_bench_step_once(&s));                                   // again and again
 *   ks_bench_step_destroy(&s);
 */
#ifndef KS_BENCH_STEP_H
#define KS_BENCH_STEP_H

#include "experiments/bench.h"

typedef struct {
  ks_model *model;
  int64_t n_seqs, seq_len, n_adapters; /* adapters share the sequences evenly */
  int32_t rank;
  uint32_t targets;
  bool
      is_frozen; /* one adapter, at q of the lowest layer only: gradients pass through everything, adapters cost nothing */
  uint64_t key; /* of ks_step_begin */
  int64_t recompute_layers;
  ks_run *run; /* NULL: its own */
} ks_bench_step_params;

typedef struct {
  ks_bench_step_params p;
  ks_run *own_run;
  ks_batch batch;
  ks_adapter **adapters;
  ks_adapter_view *views;
  ks_lora *lowest; /* of the frozen model's one adapter */
  ks_segment *segments;
  int64_t n_targets;
  int32_t *tokens, *targets;
  int64_t *offsets, *rows;
  float *scale, *loss;
  ks_adamw_job *jobs;
  double *norms;
  int64_t n_steps;
  double first_loss, mean_loss;  /* of the first and the last step */
  double first_norm, least_norm; /* the least gradient norm of any adapter, in the first and the last step */
} ks_bench_step;

ks_status ks_bench_step_create(const ks_bench_step_params *params, ks_bench_step *out);
ks_status ks_bench_step_once(void *step);
void ks_bench_step_destroy(ks_bench_step *s); /* may follow a failed create */
/* A benchmark of training that trains nothing is worth nothing: every gradient's norm is finite and above 0, and
 * the loss fell (of a frozen model: did not rise by a thousandth; its one adapter moves less than the
 * activations' rounding). */
bool ks_bench_step_learns(const ks_bench_step *s);

#endif
