/* Float64 oracle of causal grouped-query attention for one sequence, with the size of every output's rounding
 * error (see ks_tolerance): scores, exponents and probabilities carried through to first order. "Rounded"
 * sizes are those of what is stored in between as activations and so rounded once more: probabilities, their
 * gradients, and o on its way to the backward pass. */
#ifndef KS_ORACLE_ATTENTION_H
#define KS_ORACLE_ATTENTION_H

#include <stdint.h>

typedef struct {
  int64_t n_q, n_k, n_heads, n_kv_heads, head_dim;
  double scale;
  const double *q;     /* [n_q, n_heads * head_dim] */
  const double *k, *v; /* [n_k, n_kv_heads * head_dim] */
} oracle_attention;

/* o like q; lse [n_q, n_heads]. All but o may be NULL. */
typedef struct {
  double *o, *o_size, *o_rounded, *lse, *lse_size;
} oracle_attention_outs;
void oracle_attention_forward(const oracle_attention *a, const oracle_attention_outs *out);
/* dq like q, dk and dv like k; sizes may all be NULL. */
typedef struct {
  double *dq, *dk, *dv, *dq_size, *dk_size, *dv_size, *dq_rounded, *dk_rounded, *dv_rounded;
} oracle_attention_grads;
void oracle_attention_backward(const oracle_attention *a, const double *d_o, const oracle_attention_grads *g);

#endif
