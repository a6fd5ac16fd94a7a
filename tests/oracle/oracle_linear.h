/* Float64 oracles of embedding, linear layers with segmented LoRA, and the head with its loss: plain loops
 * over the formulas of kernels/ops.h. Each `_size` array receives, for each output, the sum of the absolute
 * values of what was added up, products of sums included (see ks_tolerance); it may be NULL. */
#ifndef KS_ORACLE_LINEAR_H
#define KS_ORACLE_LINEAR_H

#include "kernels/ops.h"

/* The nearest bf16, ties to even. */
double oracle_bf16(double x);
/* Factor 0 or 1 / (1 - p) of element (row, col) under the dropout of ks_linear_args. */
double oracle_dropout_factor(uint64_t key, uint64_t site, double p, int64_t n_in, int64_t row, int64_t col);

typedef struct {
  int64_t rank;
  double scale;
  const double *a, *b_t;     /* [rank, n_in], [rank, n_out] */
  double *grad_a, *grad_b_t; /* added to */
  double *grad_a_size, *grad_b_t_size;
} oracle_lora;

typedef struct {
  int64_t n_rows, n_in, n_out;
  const double *w, *bias; /* [n_out, n_in]; [n_out] or NULL */
  const double *x;        /* [n_rows, n_in] */
  const double *x_frozen; /* what the frozen product sees of x and dy (bf16), or NULL: the same */
  const double *dy_frozen;
  const ks_segment *segments;
  int64_t n_segments;
  const oracle_lora *loras;
  double dropout;
  uint64_t dropout_site;
} oracle_linear;

/* y += when accumulate. */
void oracle_linear_forward(const oracle_linear *l, bool accumulate, double *y, double *y_size);
void oracle_linear_backward(const oracle_linear *l, const double *dy, bool accumulate_dx, double *dx,
                            double *dx_size);

/* Loss and input gradient of the head. */
typedef struct {
  int64_t n_rows, n_in, n_vocab;
  const double *w, *bias, *x; /* bias or NULL */
  const int32_t *targets;
  const double *row_scale; /* or NULL */
} oracle_head;
void oracle_head_loss(const oracle_head *h, double *loss, double *loss_size, double *dx, double *dx_size);

#endif
