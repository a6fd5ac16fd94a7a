#include "tests/oracle/oracle_attention.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One query of one head: probabilities p of the keys it sees, and how large their relative error may be. */
typedef struct {
  int64_t n;
  double *s, *p, *error;
  double lse, lse_size;
} row;

/* What a probability weighs as an error: one below float32's normal range may come out as 0, so off by
 * 2^-126. */
static double weight(double p) {
  return p + 0x1p-102;
}

static const double *key(const oracle_attention *a, const double *x, int64_t j, int64_t h) {
  return x + (j * a->n_kv_heads + h / (a->n_heads / a->n_kv_heads)) * a->head_dim;
}

static void fill_row(const oracle_attention *a, int64_t i, int64_t h, row *r) {
  const double *q = a->q + (i * a->n_heads + h) * a->head_dim;
  double max = -INFINITY, sum = 0;
  r->n = a->n_k - a->n_q + i + 1;
  for (int64_t j = 0; j < r->n; j++) {
    const double *k = key(a, a->k, j, h);
    double dot = 0, size = 0;
    for (int64_t c = 0; c < a->head_dim; c++) {
      dot += q[c] * k[c];
      size += fabs(q[c] * k[c]);
    }
    r->s[j] = dot * a->scale;
    r->error[j] = size * fabs(a->scale);
    max = r->s[j] > max ? r->s[j] : max;
  }
  for (int64_t j = 0; j < r->n; j++)
    sum += exp(r->s[j] - max);
  r->lse = max + log(sum);
  r->lse_size = fabs(max) + fabs(log(sum)) + 1;
  for (int64_t j = 0; j < r->n; j++) {
    r->p[j] = exp(r->s[j] - r->lse);
    r->lse_size += r->p[j] * r->error[j];
    r->error[j] += fabs(r->s[j]) + fabs(max) + 2;
  }
}

static row new_row(int64_t n) {
  double *x = calloc((size_t)(3 * n + 1), sizeof *x);
  if (!x) abort();
  return (row){.s = x, .p = x + n, .error = x + 2 * n};
}

void oracle_attention_forward(const oracle_attention *a, const oracle_attention_outs *out) {
  row r = new_row(a->n_k);
  for (int64_t i = 0; i < a->n_q; i++)
    for (int64_t h = 0; h < a->n_heads; h++) {
      int64_t at = i * a->n_heads + h;
      fill_row(a, i, h, &r);
      if (out->lse) out->lse[at] = r.lse;
      if (out->lse_size) out->lse_size[at] = r.lse_size;
      for (int64_t c = 0; c < a->head_dim; c++) {
        double sum = 0, size = 0, rounded = 0;
        for (int64_t j = 0; j < r.n; j++)
          sum += r.p[j] * key(a, a->v, j, h)[c];
        for (int64_t j = 0; j < r.n; j++) {
          double v = key(a, a->v, j, h)[c];
          size += weight(r.p[j]) * (fabs(v) + fabs(v - sum) * r.error[j]);
          rounded += r.p[j] * fabs(v);
        }
        out->o[at * a->head_dim + c] = sum;
        if (out->o_size) out->o_size[at * a->head_dim + c] = size;
        if (out->o_rounded) out->o_rounded[at * a->head_dim + c] = rounded;
      }
    }
  free(r.s);
}

static void add_scaled(double *to, const double *x, double factor, int64_t n) {
  for (int64_t c = 0; to && c < n; c++)
    to[c] += x[c] * factor;
}
static void add_abs_scaled(double *to, const double *x, double factor, int64_t n) {
  for (int64_t c = 0; to && c < n; c++)
    to[c] += fabs(x[c]) * factor;
}

/* D = <do, o> and its sizes. */
typedef struct {
  double dot, size, rounded;
} row_dot;
static row_dot dot_of(const double *grad, const oracle_attention_outs *out, int64_t at, int64_t n) {
  row_dot r = {0, 0, 0};
  for (int64_t c = 0; c < n; c++) {
    r.dot += grad[c] * out->o[at + c];
    r.size += fabs(grad[c]) * (out->o_size[at + c] + fabs(out->o[at + c]));
    r.rounded += fabs(grad[c]) * (out->o_rounded[at + c] + fabs(out->o[at + c]));
  }
  return r;
}

static void add_key(const oracle_attention *a, const oracle_attention_grads *g, const double *grad,
                    const row *r, row_dot dot, int64_t at, int64_t h, int64_t j) {
  const int64_t d = a->head_dim;
  const double *q = a->q + at, *k = key(a, a->k, j, h), *v = key(a, a->v, j, h);
  const int64_t to = k - a->k;
  double dp = 0, dp_size = 0;
  for (int64_t c = 0; c < d; c++) {
    dp += grad[c] * v[c];
    dp_size += fabs(grad[c] * v[c]);
  }
  const double ds = a->scale * r->p[j] * (dp - dot.dot), error = r->error[j] + r->lse_size;
  const double ds_size = fabs(a->scale) * weight(r->p[j]) * (fabs(dp - dot.dot) * error + dp_size + dot.size);
  const double ds_rounded = fabs(a->scale) * r->p[j] * (fabs(dp - dot.dot) + dot.rounded);
  add_scaled(g->dq + at, k, ds, d);
  add_scaled(g->dk + to, q, ds, d);
  add_scaled(g->dv + to, grad, r->p[j], d);
  if (!g->dq_size) return;
  add_abs_scaled(g->dq_size + at, k, ds_size, d);
  add_abs_scaled(g->dk_size + to, q, ds_size, d);
  add_abs_scaled(g->dv_size + to, grad, weight(r->p[j]) * error, d);
  add_abs_scaled(g->dq_rounded + at, k, ds_rounded, d);
  add_abs_scaled(g->dk_rounded + to, q, ds_rounded, d);
  add_abs_scaled(g->dv_rounded + to, grad, r->p[j], d);
}

void oracle_attention_backward(const oracle_attention *a, const double *d_o,
                               const oracle_attention_grads *g) {
  const int64_t d = a->head_dim, nq = a->n_q * a->n_heads * d, nk = a->n_k * a->n_kv_heads * d;
  double *const outs[] = {g->dq,         g->dq_size, g->dq_rounded, g->dk,        g->dk_size,
                          g->dk_rounded, g->dv,      g->dv_size,    g->dv_rounded};
  row r = new_row(a->n_k);
  double *o = calloc((size_t)(3 * nq) + 1, sizeof *o);
  if (!o) abort();
  const oracle_attention_outs out = {.o = o, .o_size = o + nq, .o_rounded = o + 2 * nq};
  oracle_attention_forward(a, &out);
  for (int x = 0; x < 9; x++)
    if (outs[x]) memset(outs[x], 0, (size_t)(x < 3 ? nq : nk) * sizeof(double));
  for (int64_t i = 0; i < a->n_q; i++)
    for (int64_t h = 0; h < a->n_heads; h++) {
      const int64_t at = (i * a->n_heads + h) * d;
      const row_dot dot = dot_of(d_o + at, &out, at, d);
      fill_row(a, i, h, &r);
      for (int64_t j = 0; j < r.n; j++)
        add_key(a, g, d_o + at, &r, dot, at, h, j);
    }
  free(o);
  free(r.s);
}
