/* Internal to core/adapt: examples packed into one batch, with their targets. */
#ifndef KS_PACKING_H
#define KS_PACKING_H

#include "core/adapt/adapt.h"

/* All arrays host. An example of n tokens gives n - 1 rows: the last token is only a target. */
typedef struct {
  ks_batch batch;         /* points into the arrays below */
  int32_t *tokens;        /* [max_rows] */
  int64_t *offsets;       /* [max_seqs + 1] */
  ks_segment *segments;   /* [max_seqs] */
  ks_adapter_view *views; /* [max_seqs], by segment */
  int64_t *rows;          /* [max_rows] of the targets */
  int32_t *targets;       /* [max_rows] */
  float *scale, *loss;    /* [max_rows] by target */
  int64_t n_targets;
  int64_t max_rows, max_seqs;
} ks_packing;

ks_status ks_packing_create(ks_packing *p, int64_t max_rows, int64_t max_seqs);
void ks_packing_destroy(ks_packing *p);
void ks_packing_clear(ks_packing *p);
/* Following examples belong to this adapter (NULL: none). One call an adapter and batch. */
void ks_packing_begin_segment(ks_packing *p, const ks_adapter_view *view, uint64_t dropout_key);
/* The caller has seen to the room. */
void ks_packing_add(ks_packing *p, const ks_example *e, float scale);

static inline int64_t ks_example_n_targets(const ks_example *e) {
  return ks_max_i64(e->n_tokens - e->loss_begin, 0);
}
/* Rows in the model: none when there is nothing to learn. */
static inline int64_t ks_example_n_rows(const ks_example *e) {
  return ks_example_n_targets(e) > 0 ? e->n_tokens - 1 : 0;
}
/* KS_EINVAL with the example's number. */
ks_status ks_example_check(const ks_model *model, const ks_example *e, int64_t index);

#endif
