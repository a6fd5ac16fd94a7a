/* What a backend provides; one constant table each. Arguments reach these functions checked (kernels/ops.c). */
#ifndef KS_BACKEND_H
#define KS_BACKEND_H

#include "kernels/meter.h"
#include "kernels/ops.h"

/* One allocation of ks_mem_alloc, for the accounting. */
typedef struct {
  void *p;
  size_t bytes;
} ks_mem_block;

struct ks_ctx {
  const ks_backend *backend; /* ctx_init may put a more special table here */
  void *impl; /* the backend's own state */
  int n_threads;
  const char *isa_name;
  ks_dtype act_dtype;
  char device_name[256];
  size_t mem_used, mem_peak;
  ks_mem_block *blocks;
  size_t n_blocks, cap_blocks;
};
/* Adds to (or takes from) the bytes this context holds. */
void ks_mem_account(ks_ctx *ctx, size_t add, size_t remove);

struct ks_weight {
  const ks_backend *backend; /* whose layout this is */
  int64_t n_out, n_in;
  ks_dtype dtype;
  size_t bytes;
  void *impl; /* the backend's packed layouts */
};

struct ks_backend {
  const char *name;
  const char *what;
  /* KS_OK when it can run here, else KS_EENV with the reason. */
  ks_status (*probe)(void);
  ks_status (*ctx_init)(ks_ctx *ctx, const ks_ctx_params *params);
  void (*ctx_exit)(ks_ctx *ctx); /* also after a failed ctx_init */
  ks_status (*mem_alloc)(ks_ctx *ctx, size_t bytes, void **out); /* accounting is the caller's */
  void (*mem_free)(ks_ctx *ctx, void *p);
  ks_status (*mem_upload)(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
  ks_status (*mem_download)(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
  ks_status (*mem_zero)(ks_ctx *ctx, void *p, size_t bytes);
  ks_status (*mem_copy)(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
  /* Fills w->impl and w->bytes; accounting of w->bytes is the caller's. */
  ks_status (*weight_create)(ks_ctx *ctx, const ks_weight_params *params, ks_weight *w);
  void (*weight_destroy)(ks_ctx *ctx, ks_weight *w);
  ks_status (*weight_prepare_backward)(ks_ctx *ctx, ks_weight *w);
  size_t (*head_loss_workspace)(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows);
  /* The next four may be NULL: nothing to wait for, steps mean nothing, memory of unknown size, one kernel an operation. */
  ks_status (*sync)(ks_ctx *ctx);
  ks_status (*step_begin)(ks_ctx *ctx, uint64_t key);
  ks_status (*step_end)(ks_ctx *ctx);
  size_t (*mem_available)(ks_ctx *ctx);
  const ks_op_variant *variants; /* [n_variants] */
  int64_t n_variants;
  const ks_meter_ops *meter; /* may be NULL: kernels/meter.h */

  ks_status (*embed_forward)(ks_ctx *, const ks_embed_args *);
  ks_status (*linear_forward)(ks_ctx *, const ks_linear_args *);
  ks_status (*linear_backward)(ks_ctx *, const ks_linear_args *);
  ks_status (*rmsnorm_forward)(ks_ctx *, const ks_rmsnorm_args *);
  ks_status (*rmsnorm_backward)(ks_ctx *, const ks_rmsnorm_args *);
  ks_status (*rope)(ks_ctx *, const ks_rope_args *);
  /* The next three may be NULL: then their parts run one after another. They get what their parts allow, no part empty. */
  ks_status (*linears_forward)(ks_ctx *, const ks_linears_args *);
  ks_status (*linears_backward)(ks_ctx *, const ks_linears_args *);
  ks_status (*rope_store)(ks_ctx *, const ks_rope_store_args *);
  ks_status (*swiglu_forward)(ks_ctx *, const ks_swiglu_args *);
  ks_status (*swiglu_backward)(ks_ctx *, const ks_swiglu_args *);
  ks_status (*rows_gather)(ks_ctx *, const ks_rows_args *);
  ks_status (*rows_scatter)(ks_ctx *, const ks_rows_args *);
  ks_status (*attention_forward)(ks_ctx *, const ks_attention_args *);
  ks_status (*attention_backward)(ks_ctx *, const ks_attention_args *);
  ks_status (*head_loss)(ks_ctx *, const ks_head_loss_args *);
  ks_status (*sample)(ks_ctx *, const ks_sample_args *);
  ks_status (*adamw)(ks_ctx *, const ks_adamw_args *);
  ks_status (*pool)(ks_ctx *, const ks_pool_args *);
  ks_status (*entropy)(ks_ctx *, const ks_entropy_args *);
  ks_status (*similarity)(ks_ctx *, const ks_similarity_args *, float *s);
  ks_status (*similarity_top)(ks_ctx *, const ks_similarity_args *, int64_t best_k, float *scores, int64_t *index);
  ks_status (*similarity_mean)(ks_ctx *, const ks_similarity_args *, const ks_similarity_groups *, double *mean,
                               int64_t *count);
  ks_status (*similarity_farthest_first)(ks_ctx *, const ks_similarity_args *, int64_t n_pick, int64_t first,
                                         int64_t *picked);
};

extern const ks_backend ks_backend_cpu, ks_backend_cuda;
/* NULL-terminated, in the order of preference of "auto". */
extern const ks_backend *const ks_backends[];

#endif
