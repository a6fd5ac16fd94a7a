/* What the files of the linear layer share: the frozen product y = x W^T or dx = dy W, and the adapters of a
 * batch as kernels see them.
 *
 *   linear.cu          entries; which kernels an operation is made of
 *   lora.cu            the description of a batch's adapters, dropout masks, sums of partial gradients
 *   lora_shrink.cu     u and v of all maps of one input on tensor cores (bf16)
 *   lora_gradient.cu   their gradients of A and B
 *   lora_term.cu       what they add to y and dx
 *   lora.cuh           what these three share
 *   linear_simt.cu     every part of the layer in plain fma, any type
 *   linear_mma.cu      product and adapters in one kernel on tensor cores (bf16 activations; bf16 or block weights)
 *   linear_wgmma.cu    the same by Hopper's own products
 *   linear_decode*.cu  generation passes: linear_decode.cuh
 */
#ifndef KS_CUDA_LINEAR_CUH
#define KS_CUDA_LINEAR_CUH

#include "kernels/cuda/weight.cuh"

/* ---------------------------------------------------------------- adapters of a batch */

enum {
  LORA_TILE_ROWS = 128,  /* of a piece of a segment that shrink and the adapters' term work on */
  LORA_CHUNK_ROWS = 256, /* of a piece that a partial gradient sums over */
  LORA_SPAN_ROWS = 16,   /* of lora_batch.first_seg */
  LORA_GROUP = 64        /* ranks that a kernel holds at a time */
};

/* A segment in which a map of the group has an adapter; rank 0: this map has none there. Those beyond the last have no rows and
 * begin behind all rows. */
struct lora_seg {
  int64_t row_begin, n_rows;
  uint64_t key, site; /* of dropout */
  const float *a, *b_t;
  float *grad_a, *grad_b_t;
  int32_t rank;
  float scale;
  int32_t first_chunk, n_chunks; /* in lora_batch.chunks */
};

/* Consecutive rows of one segment, counted in pieces of fixed size from its first; n_rows 0: none. Tiles hold
 * the rows between the segments too: seg -1. */
struct lora_item {
  int64_t row;
  int32_t n_rows, seg;
};

/* The adapters of one map. Arrays are in device memory. Counts depend on the numbers of rows and segments only, so that steps
 * repeat. Maps of a group have all in common but segs, mask, u_stride and max_rank. */
struct lora_batch {
  const lora_seg *segs;
  const lora_item *tiles,
      *chunks; /* tiles: in rising order of rows; tiles[-1].row: how many hold rows, which come first */
  const int32_t *first_seg; /* for each LORA_SPAN_ROWS rows: the first segment that ends behind their first */
  uint32_t *counters;       /* zeros, for kernels that leave them so */
  const uint8_t *mask; /* [n_rows, mask_stride] or NULL: bit q of byte e is whether column e / 16 * 128 + q *
                          16 + e % 16 of x is kept */
  int64_t mask_stride;
  int64_t n_rows, n_segs, n_tiles, n_chunks, u_stride;
  int32_t max_rank;   /* 0: no adapter anywhere */
  uint32_t threshold; /* of dropout: draws below it drop */
  float keep;         /* 1 / (1 - p) */
  int32_t has_dropout;
};

/* Maps of one input. */
struct lora_group {
  lora_batch of[KS_LINEARS_MAX];
  int64_t n;
  bool any; /* one has an adapter */
};

/* One side of the adapters: forward reads x through A and writes through B, backward reads dy through B and
 * writes through A. */
KS_HOST_DEVICE const float *lora_reads(const lora_seg &s, bool backward) {
  return backward ? s.b_t : s.a;
}
KS_HOST_DEVICE const float *lora_writes(const lora_seg &s, bool backward) {
  return backward ? s.a : s.b_t;
}

/* Whether column `col` of a row is kept; row: batch.mask + row * mask_stride. */
KS_DEVICE bool lora_keeps(const uint8_t *row, int64_t col) {
  return row[col / 128 * 16 + col % 16] >> (col / 16 % 8) & 1;
}

/* Stages the description of the adapters of n maps of one input (masks stay NULL). */
ks_status ks_lora_describe_group(ks_ctx *ctx, const ks_linear_args *parts, int64_t n, lora_group *out);
/* Bytes of workspace for the masks of all maps, and for partial gradients of one. */
size_t ks_lora_mask_bytes(const lora_group *g);
size_t ks_lora_partial_bytes(const lora_batch *b, int64_t n_cols);
/* Fills `mask` and points the maps there. */
ks_status ks_lora_make_masks(ks_ctx *ctx, lora_group *g, uint8_t *mask);

/* ---------------------------------------------------------------- parts of the layer */

/* out[i, r] = factor * sum_c z[i, c] R[r, c]: u from x and A (masked), or v from dy and B. */
struct lora_shrink_args {
  lora_batch batch;
  const void *z; /* [n_rows, n_cols] */
  void *out;     /* [n_rows, u_stride] */
  int64_t n_cols;
  int64_t backward;
};
/* y[i, c] += factor * sum_r u[i, r] R[r, c]: u through B, or v through A (masked). */
struct lora_expand_args {
  lora_batch batch;
  const void *u; /* [n_rows, u_stride] */
  void *y;       /* [n_rows, n_cols] */
  int64_t n_cols;
  int64_t backward;
};
/* grad[r, c] += factor * sum_i u[i, r] z[i, c]: of B^T from u and dy, or of A from v and x (masked). */
struct lora_gradient_args {
  lora_batch batch;
  const void *u;  /* [n_rows, u_stride] */
  const void *z;  /* [n_rows, n_cols] */
  float *partial; /* [n_chunks, max_rank, n_cols]: of segments of several chunks */
  int64_t n_cols;
  int64_t of_a;
};
/* y (+)= x W^T + bias, or y (+)= x W with W as it is (backward). */
struct linear_product {
  ks_weight_view w;
  const void *x;
  void *y;
  const void *residual; /* or NULL: added; may be y */
  const float *bias;    /* or NULL */
  int64_t n_rows;
  int32_t y_is_f32, backward, generation;
  int32_t no_padding; /* 0: launches are compared byte by byte */
};

/* A generation pass: sums over k are made in runs of whole steps of 32, LINEAR_RUNS of them or fewer, the
 * same for few rows and for many. */
enum { LINEAR_RUNS = 8, LINEAR_FEW_ROWS = 64 };

ks_status ks_simt_product(ks_ctx *ctx, const char *op, const linear_product *p);
ks_status ks_simt_shrink(ks_ctx *ctx, const char *op, const lora_shrink_args *p);
ks_status ks_simt_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p);
ks_status ks_simt_gradient(ks_ctx *ctx, const char *op, const lora_gradient_args *p);
/* Second half of both gradients: grad += the partial sums of segments of several chunks, in their order. */
ks_status ks_lora_combine(ks_ctx *ctx, const char *op, const lora_gradient_args *p);

/* The adapters of maps of one input on tensor cores, bf16 activations: one launch each, for all maps and segments.
 * shrink: u of all, or v (backward). term: starts y (or dx) of the maps whose bit is set in `which` with what the
 * adapters, the residual and what was there before give; the products are then added to it. room: workspace. */
size_t ks_mma_shrink_bytes(const ks_ctx *ctx, const ks_linear_args *parts, const lora_group *g, bool backward);
ks_status ks_mma_shrink(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                        bool backward, void *room);
size_t ks_mma_gradient_bytes(const ks_linear_args *parts, const lora_group *g);
ks_status ks_mma_gradient(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                          void *room);
ks_status ks_mma_term(ks_ctx *ctx, const char *op, const ks_linear_args *parts, const lora_group *g,
                      bool backward, uint32_t which);
/* y += the term, after a product. */
ks_status ks_mma_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p);
/* With adapters when batch.max_rank > 0: u (or v) was computed before. */
ks_status ks_mma_linear(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                        const void *u);
/* By Hopper's own products (linear_wgmma.cu), where ks_wgmma_takes says so. */
bool ks_wgmma_takes(const ks_ctx *ctx, const linear_product *p);
ks_status ks_wgmma_linear(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                          const void *u);
/* ks_linears_forward of generation passes, one part or several; *taken false: nothing was done, it does not take these. */
ks_status ks_decode_linears(ks_ctx *ctx, const ks_linears_args *a, bool *taken);

#endif
