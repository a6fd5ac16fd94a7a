#include "tests/oracle/oracle_block.h"
#include <math.h>

void oracle_rmsnorm_forward(const double *x, const double *w, int64_t n_rows, int64_t n_cols, double eps,
                            double *y, double *rstd) {
  for (int64_t i = 0; i < n_rows; i++) {
    double sum = 0;
    for (int64_t j = 0; j < n_cols; j++)
      sum += x[i * n_cols + j] * x[i * n_cols + j];
    double r = 1 / sqrt(sum / (double)n_cols + eps);
    if (rstd) rstd[i] = r;
    for (int64_t j = 0; j < n_cols; j++)
      y[i * n_cols + j] = x[i * n_cols + j] * r * w[j];
  }
}

void oracle_rmsnorm_backward(const double *x, const double *w, const double *dy, const double *dx_before,
                             int64_t n_rows, int64_t n_cols, double eps, double *dx, double *dx_size) {
  for (int64_t i = 0; i < n_rows; i++) {
    const double *xi = x + i * n_cols, *di = dy + i * n_cols;
    double sum = 0, dot = 0, dot_size = 0;
    for (int64_t j = 0; j < n_cols; j++) {
      sum += xi[j] * xi[j];
      dot += di[j] * w[j] * xi[j];
      dot_size += fabs(di[j] * w[j] * xi[j]);
    }
    double n = (double)n_cols, r = 1 / sqrt(sum / n + eps);
    for (int64_t j = 0; j < n_cols; j++) {
      int64_t at = i * n_cols + j;
      double before = dx_before ? dx_before[at] : 0;
      dx[at] = before + r * (di[j] * w[j] - xi[j] * r * r * dot / n);
      if (dx_size) dx_size[at] = fabs(before) + r * (fabs(di[j] * w[j]) + fabs(xi[j]) * r * r * dot_size / n);
    }
  }
}

void oracle_rope(double *x, double *x_size, const int32_t *positions, const double *inv_freq, int64_t n_rows,
                 int64_t n_heads, int64_t head_dim, bool inverse) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < n_rows; i++)
    for (int64_t h = 0; h < n_heads; h++)
      for (int64_t j = 0; j < half; j++) {
        int64_t at = (i * n_heads + h) * head_dim + j;
        double angle = (double)positions[i] * inv_freq[j], c = cos(angle),
               s = inverse ? -sin(angle) : sin(angle);
        double a = x[at], b = x[at + half];
        x[at] = a * c - b * s;
        x[at + half] = b * c + a * s;
        if (!x_size) continue;
        x_size[at] = fabs(a * c) + fabs(b * s);
        x_size[at + half] = fabs(b * c) + fabs(a * s);
      }
}

void oracle_swiglu_forward(const double *gate, const double *up, int64_t n, double *h, double *h_size) {
  for (int64_t i = 0; i < n; i++) {
    h[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    /* A rounded argument of the exponential moves it by |gate| u. */
    if (h_size) h_size[i] = fabs(h[i]) * (1 + fabs(gate[i]));
  }
}

void oracle_swiglu_backward(const double *gate, const double *up, const double *dh, int64_t n, double *dgate,
                            double *dup, double *dgate_size, double *dup_size) {
  for (int64_t i = 0; i < n; i++) {
    double z = gate[i], s = 1 / (1 + exp(-z)), rest = 1 / (1 + exp(z));
    dgate[i] = dh[i] * up[i] * s * (1 + z * rest);
    dup[i] = dh[i] * z * s;
    if (dgate_size) dgate_size[i] = fabs(dh[i] * up[i]) * s * (1 + fabs(z) * (1 + fabs(z)));
    if (dup_size) dup_size[i] = fabs(dup[i]) * (1 + fabs(z));
  }
}

void oracle_pool(const double *x, const int64_t *offsets, int64_t n_seqs, int64_t n_cols, bool mean,
                 double *y) {
  for (int64_t s = 0; s < n_seqs; s++)
    for (int64_t j = 0; j < n_cols; j++) {
      double sum = 0;
      for (int64_t i = offsets[s]; i < offsets[s + 1]; i++)
        sum += x[i * n_cols + j];
      y[s * n_cols + j] =
          mean ? sum / (double)(offsets[s + 1] - offsets[s]) : x[(offsets[s + 1] - 1) * n_cols + j];
    }
}

void oracle_adamw(double *p, double *m, double *v, const double *grad, int64_t n, int64_t step,
                  const oracle_adamw_params *h) {
  double c1 = 1 - pow(h->beta1, (double)step), c2 = 1 - pow(h->beta2, (double)step);
  for (int64_t i = 0; i < n; i++) {
    double g = grad[i] * h->grad_scale;
    p[i] -= h->lr * h->weight_decay * p[i];
    m[i] = h->beta1 * m[i] + (1 - h->beta1) * g;
    v[i] = h->beta2 * v[i] + (1 - h->beta2) * g * g;
    p[i] -= h->lr * (m[i] / c1) / (sqrt(v[i] / c2) + h->eps);
  }
}
