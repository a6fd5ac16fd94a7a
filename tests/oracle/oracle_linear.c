#include "tests/oracle/oracle_linear.h"
#include "kernels/base/rng.h"
#include <math.h>

double oracle_bf16(double x) {
  float f = (float)x;
  uint32_t bits;
  if (f != f) return x;
  memcpy(&bits, &f, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&f, &bits, sizeof f);
  return (double)f;
}

double oracle_dropout_factor(uint64_t key, uint64_t site, double p, int64_t n_in, int64_t row, int64_t col) {
  uint64_t stride = (uint64_t)((n_in + 127) / 128 * 128), e = (uint64_t)row * stride + (uint64_t)col;
  ks_philox_block b = ks_philox(key, site, e / 128 * 16 + e % 16);
  uint32_t word = b.v[e / 16 % 8 / 2], half = e / 16 % 2 ? word >> 16 : word & 0xffff;
  double t = floor(p * 65536 + 0.5);
  return half >= t ? 65536 / (65536 - t) : 0;
}

static double *zeros(int64_t n) {
  double *x = calloc((size_t)n + 1, sizeof *x);
  KS_ASSERT(x != NULL);
  return x;
}

/* The segment that holds a row, or NULL. */
static const ks_segment *segment_of(const oracle_linear *l, int64_t row) {
  for (int64_t s = 0; s < l->n_segments; s++)
    if (row >= l->segments[s].row_begin && row < l->segments[s].row_begin + l->segments[s].n_rows)
      return &l->segments[s];
  return NULL;
}

static double factor_of(const oracle_linear *l, const ks_segment *seg, int64_t row, int64_t col) {
  if (!(l->dropout > 0)) return 1;
  return oracle_dropout_factor(seg->dropout_key, l->dropout_site, l->dropout, l->n_in, row - seg->row_begin,
                               col);
}

/* u[r] = sum drop(x) A and its size, for one row. */
static void project_x(const oracle_linear *l, const ks_segment *seg, int64_t row, double *u, double *u_size) {
  const oracle_lora *lora = &l->loras[seg->adapter];
  for (int64_t r = 0; r < lora->rank; r++) {
    u[r] = u_size[r] = 0;
    for (int64_t j = 0; j < l->n_in; j++) {
      double t = l->x[row * l->n_in + j] * factor_of(l, seg, row, j) * lora->a[r * l->n_in + j];
      u[r] += t;
      u_size[r] += fabs(t);
    }
  }
}

void oracle_linear_forward(const oracle_linear *l, bool accumulate, double *y, double *y_size) {
  const double *x = l->x_frozen ? l->x_frozen : l->x;
  double u[256], u_size[256];
  for (int64_t i = 0; i < l->n_rows; i++) {
    const ks_segment *seg = segment_of(l, i);
    const oracle_lora *lora = seg && seg->adapter >= 0 ? &l->loras[seg->adapter] : NULL;
    if (lora) project_x(l, seg, i, u, u_size);
    for (int64_t o = 0; o < l->n_out; o++) {
      double sum = accumulate ? y[i * l->n_out + o] : 0, size = fabs(sum);
      if (l->bias) {
        sum += l->bias[o];
        size += fabs(l->bias[o]);
      }
      for (int64_t j = 0; j < l->n_in; j++) {
        double t = x[i * l->n_in + j] * l->w[o * l->n_in + j];
        sum += t;
        size += fabs(t);
      }
      for (int64_t r = 0; lora && r < lora->rank; r++) {
        sum += lora->scale * u[r] * lora->b_t[r * l->n_out + o];
        size += fabs(lora->scale * u_size[r] * lora->b_t[r * l->n_out + o]);
      }
      y[i * l->n_out + o] = sum;
      if (y_size) y_size[i * l->n_out + o] = size;
    }
  }
}

/* The gradients of one row's adapter, and v with its size. */
static void backward_lora(const oracle_linear *l, const ks_segment *seg, int64_t i, const double *dy,
                          double *v, double *v_size) {
  const oracle_lora *lora = &l->loras[seg->adapter];
  double u[256], u_size[256];
  project_x(l, seg, i, u, u_size);
  for (int64_t r = 0; r < lora->rank; r++) {
    v[r] = v_size[r] = 0;
    for (int64_t o = 0; o < l->n_out; o++) {
      double d = dy[i * l->n_out + o], t = lora->scale * d * lora->b_t[r * l->n_out + o];
      v[r] += t;
      v_size[r] += fabs(t);
      lora->grad_b_t[r * l->n_out + o] += lora->scale * u[r] * d;
      if (lora->grad_b_t_size) lora->grad_b_t_size[r * l->n_out + o] += fabs(lora->scale * u_size[r] * d);
    }
    for (int64_t j = 0; j < l->n_in; j++) {
      double x = l->x[i * l->n_in + j] * factor_of(l, seg, i, j);
      lora->grad_a[r * l->n_in + j] += v[r] * x;
      if (lora->grad_a_size) lora->grad_a_size[r * l->n_in + j] += fabs(v_size[r] * x);
    }
  }
}

void oracle_linear_backward(const oracle_linear *l, const double *dy, bool accumulate_dx, double *dx,
                            double *dx_size) {
  const double *frozen = l->dy_frozen ? l->dy_frozen : dy;
  double v[256], v_size[256];
  for (int64_t i = 0; i < l->n_rows; i++) {
    const ks_segment *seg = segment_of(l, i);
    const oracle_lora *lora = seg && seg->adapter >= 0 ? &l->loras[seg->adapter] : NULL;
    if (lora) backward_lora(l, seg, i, dy, v, v_size);
    for (int64_t j = 0; dx && j < l->n_in; j++) {
      double sum = accumulate_dx ? dx[i * l->n_in + j] : 0, size = fabs(sum);
      for (int64_t o = 0; o < l->n_out; o++) {
        double t = frozen[i * l->n_out + o] * l->w[o * l->n_in + j];
        sum += t;
        size += fabs(t);
      }
      for (int64_t r = 0; lora && r < lora->rank; r++) {
        double f = factor_of(l, seg, i, j);
        sum += f * v[r] * lora->a[r * l->n_in + j];
        size += fabs(f * v_size[r] * lora->a[r * l->n_in + j]);
      }
      dx[i * l->n_in + j] = sum;
      if (dx_size) dx_size[i * l->n_in + j] = size;
    }
  }
}

/* Logits of one row, their sizes, and log sum exp. */
static double head_logits(const oracle_head *h, int64_t i, double *z, double *z_size) {
  double max = -INFINITY, sum = 0;
  for (int64_t o = 0; o < h->n_vocab; o++) {
    z[o] = h->bias ? h->bias[o] : 0;
    z_size[o] = fabs(z[o]);
    for (int64_t j = 0; j < h->n_in; j++) {
      double t = h->x[i * h->n_in + j] * h->w[o * h->n_in + j];
      z[o] += t;
      z_size[o] += fabs(t);
    }
    if (z[o] > max) max = z[o];
  }
  for (int64_t o = 0; o < h->n_vocab; o++)
    sum += exp(z[o] - max);
  return max + log(sum);
}

/* Errors of logits reach the loss and the probabilities with weight 1 and p; each exponential and the
 * division add a rounding of their own. */
void oracle_head_loss(const oracle_head *h, double *loss, double *loss_size, double *dx, double *dx_size) {
  double *z = zeros(h->n_vocab), *z_size = zeros(h->n_vocab);
  for (int64_t i = 0; i < h->n_rows; i++) {
    double lse = head_logits(h, i, z, z_size), mean_size = 0, max_size = 0;
    for (int64_t o = 0; o < h->n_vocab; o++) {
      mean_size += exp(z[o] - lse) * z_size[o];
      if (z_size[o] > max_size) max_size = z_size[o];
    }
    loss[i] = lse - z[h->targets[i]];
    if (loss_size) loss_size[i] = mean_size + z_size[h->targets[i]] + max_size + 1;
    double scale = h->row_scale ? h->row_scale[i] : 1;
    for (int64_t j = 0; dx && j < h->n_in; j++) {
      double sum = 0, size = 0;
      for (int64_t o = 0; o < h->n_vocab; o++) {
        double p = exp(z[o] - lse), d = p - (o == h->targets[i]), w = h->w[o * h->n_in + j];
        sum += scale * d * w;
        size += fabs(scale * w) * (fabs(d) + p * (1 + z_size[o] + max_size + mean_size));
      }
      dx[i * h->n_in + j] = sum;
      if (dx_size) dx_size[i * h->n_in + j] = size;
    }
  }
  free(z);
  free(z_size);
}
