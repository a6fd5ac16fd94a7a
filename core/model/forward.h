/* Forward and backward passes of packed batches, and what is read off them: embeddings, losses.
 *
 * A batch packs sequences one after another, without padding. Segments give rows to adapters; a cell of an experiment is
 * one segment, a cohort is many. The frozen products run once over all rows. A row's result does not depend on the batch.
 */
#ifndef KS_FORWARD_H
#define KS_FORWARD_H

#include "core/model/model.h"

/* One adapter as the model sees it: [n_layers * KS_N_TARGETS] entries, index layer * KS_N_TARGETS + target; rank 0: untouched. */
typedef struct {
  const ks_lora *loras;
  int32_t max_rank;
} ks_adapter_view;

/* All arrays host. */
typedef struct {
  const int32_t *tokens; /* [n_rows] */
  int64_t n_rows;
  const int64_t *seq_offsets; /* [n_seqs + 1], offsets[0] = 0, offsets[n_seqs] = n_rows, no empty sequence */
  int64_t n_seqs;
  const ks_segment *segments; /* of rows, on sequence borders */
  int64_t n_segments;
  const ks_adapter_view *adapters; /* [n_adapters], indexed by segment.adapter */
  int64_t n_adapters;
  float dropout;         /* of LoRA, training only */
  uint64_t dropout_step; /* forms the dropout site with layer and target: (dropout_step * n_layers + layer) * 7 + target */
} ks_batch;

/* Reusable memory for passes of up to max_rows rows: one arena, sized before the run, nothing is allocated inside a pass.
 *
 * With `backward` each layer keeps, per row, 2 hidden (residual stream before attention and MLP) + 2 query + 2 key width (q, k, v,
 * attention output; key width for each of k and v) + 2 intermediate (gate, up) + 2 (norms' factors) + heads (log-sum-exp)
 * + 7 max_rank (LoRA's x A^T) numbers: activations, but for the norms' factors and the log-sum-exp, which are float32.
 * Recomputed in the backward pass because they are cheap: the outputs of the norms and of SwiGLU, attention's probabilities, and
 * with q/k norm also q and k after rotary. Gradients of gate and up take the place of gate and up. Without `backward` one layer's
 * memory serves all. */
typedef struct ks_run ks_run;

typedef struct {
  int64_t max_rows, max_seqs;
  int32_t max_rank;
  bool backward; /* keep what the backward pass reads */
  bool no_loss;  /* no ks_forward_loss on this run: saves the head's workspace */
  /* The lowest layers, of which the backward pass makes everything again but 1 hidden (residual stream) + 2 (norms' factors)
   * + 7 max_rank numbers a row: memory against time, the same bits. More than there are: all. The time is that of the forward
   * products of these layers without down's, a step being two products a weight; the last layer's are not made again. */
  int64_t recompute_layers;
} ks_run_params;
/* Rows a pass when the caller does not say. CPU: few enough that activations stay in the caches, and work for every thread; no
 * result depends on it there. GPU: a fixed number that fills a large one. */
int64_t ks_run_default_rows(const ks_model *model, bool backward);
/* Bytes that such a run will hold, before it is made. */
ks_status ks_run_bytes(const ks_model *model, const ks_run_params *params, size_t *bytes);
/* The most rows, up to params->max_rows, of a run that holds no more than `bytes`; 0: not even one. */
int64_t ks_run_rows_that_fit(const ks_model *model, const ks_run_params *params, size_t bytes);
ks_status ks_run_create(ks_model *model, const ks_run_params *params, ks_run **out);
void ks_run_destroy(ks_run *run); /* NULL-safe */

/* Runs all layers and the final norm. *hidden: [n_rows, hidden_size], activations (ops.h), backend memory, valid until
 * the next call. */
ks_status ks_forward(ks_run *run, const ks_batch *batch, const void **hidden);

/* Forward, then cross-entropy at rows[i] (strictly rising) against targets[i] (predicting the token after rows[i]); loss host
 * [n_targets], late (ks_sync). */
ks_status ks_forward_loss(ks_run *run, const ks_batch *batch, const int64_t *rows, const int32_t *targets, int64_t n_targets,
                          float *loss);
/* The same, then the backward pass of sum_i scale[i] * loss[i] into the adapters' grad_a and grad_b_t (added). Nothing that only a
 * frozen weight's gradient or the embedding's would need is computed; the pass stops at the lowest layer with an adapter. */
ks_status ks_forward_backward(ks_run *run, const ks_batch *batch, const int64_t *rows, const int32_t *targets, const float *scale,
                              int64_t n_targets, float *loss);
/* Logits of all rows: host [n_rows, vocab]. For tests and small models. */
ks_status ks_forward_logits(ks_run *run, const ks_batch *batch, float *host_logits);

/* One text's tokens. */
typedef struct {
  const int32_t *tokens;
  int64_t n_tokens;
} ks_tokens;
/* Embeds each text with the frozen model (no adapter): final hidden state, after the last norm, pooled. Packed into batches
 * inside, in order. Texts longer than max_tokens are cut. out: backend memory [n, hidden_size]. */
typedef struct {
  ks_pooling pooling;
  int64_t max_tokens;
  int64_t batch_rows; /* rows a pass; 0: what suits the machine */
} ks_embed_params;
ks_status ks_embed_texts(ks_model *model, const ks_tokens *texts, int64_t n, const ks_embed_params *params, const ks_progress *progress,
                         float *out);

#endif
