/* Internal to core/model and core/adapt: the memory of a pass and the description of its rows.
 *
 * A pass runs all layers over `all` rows. What is read off it afterwards is often a tail of each sequence
 * only (the targets of a loss, the last row of a prompt): then the last layer's query side and MLP run over
 * those rows, `out`.
 */
#ifndef KS_RUN_H
#define KS_RUN_H

#include "core/model/forward.h"

/* Rows that an operation runs over, sequence by sequence. All arrays host. */
typedef struct {
  int64_t n_rows;
  int32_t *positions;     /* [n_rows] */
  ks_attention_seq *seqs; /* [n_seqs]; k, v, dk, dv are set layer by layer */
  const ks_segment *segments;
  int64_t n_segments;
} ks_row_set;

/* Keys and values of the sequences that are being generated: [n_layers][n_rows, n_kv_heads * head_dim] each, in pages of
 * KS_ATTENTION_PAGE_UNIT rows that belong to one sequence at a time. */
typedef struct {
  void *k, *v;    /* backend memory, activations */
  int64_t n_rows; /* of all pages */
} ks_kv_cache;

typedef struct {
  const int32_t *tokens; /* host [all.n_rows] */
  const int32_t *drawn;  /* NULL, or in place of tokens: backend memory, drawn by the pass before */
  int64_t n_seqs;
  ks_row_set all, out;
  int64_t *out_index;          /* host [out.n_rows]: rows of `all`, rising */
  bool cut;                    /* out is not all */
  int64_t *key_begin;          /* host [n_seqs]: first row of each sequence's keys in the pass */
  const int32_t *const *pages; /* with a cache: host [n_seqs], each sequence's pages */
  const ks_adapter_view *adapters;
  int64_t n_adapters;
  float dropout;
  uint64_t dropout_step;
  const ks_kv_cache *cache;  /* NULL: a sequence's keys are its own rows of the pass */
  const int64_t *cache_rows; /* host [all.n_rows]: where each row's key goes */
} ks_pass;

/* What one layer leaves behind; backend memory. Without backward all layers share it, with backward what is recomputed.
 * `void *`: activations (ops.h). */
typedef struct {
  void *h_in, *h_mid;          /* [rows, hidden] residual stream before attention, before the MLP */
  void *q, *k, *v;             /* [rows, heads * head_dim] after rotary */
  void *q_pre, *k_pre;         /* before the norm of q and k; == q, k when the model has none */
  void *attn;                  /* [rows, n_heads * head_dim] */
  float *lse;                  /* [rows, n_heads] */
  void *gate, *up;             /* [rows, intermediate] */
  float *rstd_attn, *rstd_mlp; /* [rows] */
  float *rstd_q, *rstd_k;      /* [rows * heads] */
  void *u[KS_N_TARGETS];       /* [rows, max_rank] */
} ks_layer_acts;

struct ks_run {
  ks_model *model;
  ks_run_params params;
  unsigned char *arena; /* backend memory: everything below */
  size_t arena_bytes;
  size_t layer_begin, layer_bytes; /* place of layer 0's activations; stride (0: shared) */
  size_t again_begin, again_bytes; /* of layers that are made again: place of what they share; stride of what they keep */
  void *h_out;                     /* [rows, hidden] after the last layer */
  void *xn, *xt, *dxn;             /* [rows, hidden] scratch: norm output, its cut rows, its gradient */
  void *dres, *dcut;               /* [rows, hidden] gradient of the residual stream, of its cut rows */
  void *q, *k;                     /* with q/k norm: q and k after rotary, recomputed in the backward pass */
  float *rstd;                     /* [rows] of the final norm */
  void *ff, *dff; /* [rows, intermediate]; share their place with the four below and the head's */
  void *d_attn, *dq, *dk, *dv;
  void *lora_v[KS_LINEARS_MAX]; /* [rows, max_rank], one a part of a call */
  void *head_workspace;
  /* host */
  int32_t *positions, *out_positions;  /* [max_rows] */
  int64_t *out_index, *target_index;   /* [max_rows] */
  ks_attention_seq *seqs, *out_seqs;   /* [max_seqs] */
  int64_t *key_begin, *tails;          /* [max_seqs] */
  ks_segment *segments, *out_segments; /* [max_seqs] */
  ks_lora *loras;                      /* [KS_N_TARGETS][cap_loras] of one layer, by adapter */
  int64_t cap_loras;
};

/* Activations of `layer`. */
ks_layer_acts ks_run_acts(const ks_run *run, int64_t layer);

/* Checks the batch and describes it. tails: host [n_seqs], how many last rows of each sequence (1..length)
 * are read off; NULL: all. The description points into run and batch. */
ks_status ks_run_begin(ks_run *run, const ks_batch *batch, const int64_t *tails, ks_pass *pass);
/* Fills pass->out from pass->all, given tails as above, and sets cut. */
void ks_run_cut(ks_run *run, const int64_t *tails, ks_pass *pass);

/* Room for the pointers of n adapters; grows on the first pass of more adapters only. */
ks_status ks_run_reserve_loras(ks_run *run, int64_t n);

/* Makes again what the run does not keep of `layer` and its backward pass reads. Call it from the last layer downwards. */
ks_status ks_pass_recompute(ks_run *run, const ks_pass *pass, int64_t layer);
/* Runs all layers. *h: residual stream of the out rows [out.n_rows, hidden], before the final norm. */
ks_status ks_pass_forward(ks_run *run, const ks_pass *pass, void **h);
/* Gradient of the out rows' residual stream (run->dcut when cut, else run->dres) down into the adapters. */
ks_status ks_pass_backward(ks_run *run, const ks_pass *pass);

/* What a loss is taken of; see ks_forward_loss. scale NULL: no backward pass. */
typedef struct {
  const int64_t *rows;
  const int32_t *targets;
  const float *scale;
  int64_t n_targets;
} ks_loss_spec;
/* Forward and head: loss, and with scale the gradient that ks_pass_backward starts from. */
ks_status ks_forward_head(ks_run *run, const ks_batch *batch, const ks_loss_spec *spec, float *loss,
                          ks_pass *pass);
/* ks_forward with the tails of ks_run_begin: *hidden holds the out rows only. */
ks_status ks_forward_tails(ks_run *run, const ks_batch *batch, const int64_t *tails, const void **hidden);

/* What forward and backward share. */
typedef struct {
  int64_t layer;
  ks_target target;
  const ks_row_set *rows;
} ks_site;
/* Fills the weight, segments and adapters of a linear layer; true when some row has an adapter there. */
bool ks_run_linear_args(ks_run *run, const ks_pass *pass, ks_site site, ks_linear_args *a);
/* Norm of q and k (where the model has one) and rotary, from q_pre and k_pre to q and k; with a cache, k and v into it. */
ks_status ks_run_qk(ks_run *run, const ks_pass *pass, int64_t layer, const ks_layer_acts *acts);
/* Attention arguments over the query rows; sets each sequence's keys. */
ks_attention_args ks_run_attention_args(ks_run *run, const ks_pass *pass, int64_t layer,
                                        const ks_layer_acts *acts);

#endif
