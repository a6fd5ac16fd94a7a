/* Float64 oracles of the elementwise and row operations of a transformer block: norm, rotary, SwiGLU,
 * pooling, AdamW. Plain loops over the formulas of kernels/ops.h. Where a `_size` array is given it receives,
 * for each output, the sum of the absolute values of what was added up (see ks_tolerance); it may be NULL. */
#ifndef KS_ORACLE_BLOCK_H
#define KS_ORACLE_BLOCK_H

#include <stdbool.h>
#include <stdint.h>

void oracle_rmsnorm_forward(const double *x, const double *w, int64_t n_rows, int64_t n_cols, double eps,
                            double *y, double *rstd);
/* dx = dx_before + ... ; dx_before may be NULL. */
void oracle_rmsnorm_backward(const double *x, const double *w, const double *dy, const double *dx_before,
                             int64_t n_rows, int64_t n_cols, double eps, double *dx, double *dx_size);
/* x: [n_rows, n_heads * head_dim] in place. */
void oracle_rope(double *x, double *x_size, const int32_t *positions, const double *inv_freq, int64_t n_rows,
                 int64_t n_heads, int64_t head_dim, bool inverse);
void oracle_swiglu_forward(const double *gate, const double *up, int64_t n, double *h, double *h_size);
void oracle_swiglu_backward(const double *gate, const double *up, const double *dh, int64_t n, double *dgate,
                            double *dup, double *dgate_size, double *dup_size);
void oracle_pool(const double *x, const int64_t *offsets, int64_t n_seqs, int64_t n_cols, bool mean,
                 double *y);
typedef struct {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
} oracle_adamw_params;
void oracle_adamw(double *p, double *m, double *v, const double *grad, int64_t n, int64_t step,
                  const oracle_adamw_params *h);

#endif
