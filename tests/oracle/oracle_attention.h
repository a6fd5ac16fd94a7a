/* Float64 oracle of causal grouped-query attention for one sequence, with the size of every output's rounding
 * error (see ks_tolerance): scores, exponents and probabilities carried through to first order. */
#ifndef KS_ORACLE_ATTENTION_H
#define KS_ORACLE_ATTENTION_H

#include <stdint.h>

typedef struct {
  int64_t n_q, n_k, n_heads, n_kv_heads, head_dim;
  double scale;
  const double *q;     /* [n_q, n_heads * head_dim] */
  const double *k, *v; /* [n_k, n_kv_heads * head_dim] */
} oracle_attention;

/* o: like q; lse: [n_q, n_heads]; sizes may be NULL. */
void oracle_attention_forward(const oracle_attention *a, double *o, double *lse, double *o_size,
                              double *lse_size);
/* dq like q, dk and dv like k; sizes may all be NULL. */
typedef struct {
  double *dq, *dk, *dv, *dq_size, *dk_size, *dv_size;
} oracle_attention_grads;
void oracle_attention_backward(const oracle_attention *a, const double *d_o, const oracle_attention_grads *g);

#endif
