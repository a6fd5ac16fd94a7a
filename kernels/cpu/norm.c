/* Root mean square norm.
 *
 *   y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)
 *   dx = (dx) + rstd * (dy * w - x * rstd^2 * mean(dy * w * x))
 *
 * Bytes: forward 8 n (x in, y out; w stays in cache), backward 12 n (16 n accumulating), n = rows * cols.
 * Flops: forward 4 n, backward 8 n.
 *
 * Determinism: the sum over a row runs in 64 lanes (lane = column mod 64), each an fma chain in rising order
 * (L = cols / 64), folded as a fixed tree; mean and root in double. A row depends on nothing else. */
#include "kernels/cpu/cpu.h"

enum { NORM_CHAINS = 4 };

/* sum of x * x, or of x * y * w. */
KS_INLINE float norm_sum(const float *x, const float *y, const float *w, int64_t n) {
  ks_v acc[NORM_CHAINS] = {ks_v_zero(), ks_v_zero(), ks_v_zero(), ks_v_zero()};
  int64_t j = 0;
  for (; j + NORM_CHAINS * KS_LANES <= n; j += NORM_CHAINS * KS_LANES)
#pragma GCC unroll 4
    for (int c = 0; c < NORM_CHAINS; c++) {
      int64_t at = j + c * KS_LANES;
      ks_v a = ks_v_load(x + at), b = y ? ks_v_mul(ks_v_load(y + at), ks_v_load(w + at)) : a;
      acc[c] = ks_v_fma(a, b, acc[c]);
    }
  for (int c = 0; j < n; c++, j += KS_LANES) {
    ks_v a = ks_v_load_n(x + j, n - j);
    ks_v b = y ? ks_v_mul(ks_v_load_n(y + j, n - j), ks_v_load_n(w + j, n - j)) : a;
    acc[c] = ks_v_fma(a, b, acc[c]);
  }
  return ks_v_sum(ks_v_add(ks_v_add(acc[0], acc[1]), ks_v_add(acc[2], acc[3])));
}

static ks_status rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const int64_t n = a->n_cols;
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, a->n_rows *n)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    const float *x = ks_in(a->x) + i * n;
    float *y = ks_out(a->y) + i * n;
    double mean = n ? (double)norm_sum(x, NULL, NULL, n) / (double)n : 0.0;
    float rstd = (float)(1.0 / __builtin_sqrt(mean + (double)a->eps));
    if (a->rstd) a->rstd[i] = rstd;
    ks_v r = ks_v_set(rstd);
    for (int64_t j = 0; j < n; j += KS_LANES)
      ks_v_store_n(y + j, ks_v_mul(ks_v_mul(ks_v_load_n(x + j, n - j), r), ks_v_load_n(a->w + j, n - j)),
                   n - j);
  }
  return KS_OK;
}

static ks_status rmsnorm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const int64_t n = a->n_cols;
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 2 * a->n_rows * n)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    const float *x = ks_in(a->x) + i * n, *dy = ks_in(a->dy) + i * n;
    float *dx = ks_out(a->dx) + i * n;
    double r = (double)a->rstd[i];
    double mean = n ? (double)norm_sum(x, dy, a->w, n) / (double)n : 0.0;
    ks_v rstd = ks_v_set(a->rstd[i]), back = ks_v_set((float)(-r * r * r * mean));
    for (int64_t j = 0; j < n; j += KS_LANES) {
      ks_v g = ks_v_mul(ks_v_mul(ks_v_load_n(dy + j, n - j), ks_v_load_n(a->w + j, n - j)), rstd);
      g = ks_v_fma(ks_v_load_n(x + j, n - j), back, g);
      if (a->accumulate_dx) g = ks_v_add(ks_v_load_n(dx + j, n - j), g);
      ks_v_store_n(dx + j, g, n - j);
    }
  }
  return KS_OK;
}
