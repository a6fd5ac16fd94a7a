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

void oracle_attention_forward(const oracle_attention *a, double *o, double *lse, double *o_size,
                              double *lse_size) {
  row r = new_row(a->n_k);
  for (int64_t i = 0; i < a->n_q; i++)
    for (int64_t h = 0; h < a->n_heads; h++) {
      int64_t at = i * a->n_heads + h;
      fill_row(a, i, h, &r);
      if (lse) lse[at] = r.lse;
      if (lse_size) lse_size[at] = r.lse_size;
      for (int64_t c = 0; c < a->head_dim; c++) {
        double sum = 0, size = 0;
        for (int64_t j = 0; j < r.n; j++)
          sum += r.p[j] * key(a, a->v, j, h)[c];
        for (int64_t j = 0; j < r.n; j++) {
          double v = key(a, a->v, j, h)[c];
          size += r.p[j] * (fabs(v) + fabs(v - sum) * r.error[j]);
        }
        o[at * a->head_dim + c] = sum;
        if (o_size) o_size[at * a->head_dim + c] = size;
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

void oracle_attention_backward(const oracle_attention *a, const double *d_o,
                               const oracle_attention_grads *g) {
  const int64_t d = a->head_dim, nq = a->n_q * a->n_heads * d, nk = a->n_k * a->n_kv_heads * d;
  double *const outs[] = {g->dq, g->dq_size, g->dk, g->dk_size, g->dv, g->dv_size};
  row r = new_row(a->n_k);
  double *o = calloc((size_t)nq + 1, sizeof *o);
  if (!o) abort();
  oracle_attention_forward(a, o, NULL, NULL, NULL);
  for (int x = 0; x < 6; x++)
    if (outs[x]) memset(outs[x], 0, (size_t)(x < 2 ? nq : nk) * sizeof(double));
  for (int64_t i = 0; i < a->n_q; i++)
    for (int64_t h = 0; h < a->n_heads; h++) {
      const int64_t at = (i * a->n_heads + h) * d;
      const double *q = a->q + at, *grad = d_o + at;
      double dot = 0, dot_size = 0;
      fill_row(a, i, h, &r);
      for (int64_t c = 0; c < d; c++) {
        dot += grad[c] * o[at + c];
        dot_size += fabs(grad[c] * o[at + c]);
      }
      for (int64_t j = 0; j < r.n; j++) {
        const double *k = key(a, a->k, j, h), *v = key(a, a->v, j, h);
        const int64_t to = k - a->k;
        double dp = 0, dp_size = 0;
        for (int64_t c = 0; c < d; c++) {
          dp += grad[c] * v[c];
          dp_size += fabs(grad[c] * v[c]);
        }
        double ds = a->scale * r.p[j] * (dp - dot), error = r.error[j] + fabs(r.lse);
        double ds_size = fabs(a->scale) * r.p[j] * (fabs(dp - dot) * error + dp_size + dot_size);
        add_scaled(g->dq + at, k, ds, d);
        add_scaled(g->dk + to, q, ds, d);
        add_scaled(g->dv + to, grad, r.p[j], d);
        if (!g->dq_size) continue;
        add_abs_scaled(g->dq_size + at, k, ds_size, d);
        add_abs_scaled(g->dk_size + to, q, ds_size, d);
        add_abs_scaled(g->dv_size + to, grad, r.p[j] * error, d);
      }
    }
  free(o);
  free(r.s);
}
