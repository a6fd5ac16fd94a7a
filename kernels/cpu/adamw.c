/* Norms, clipping and AdamW of each adapter.
 *
 *   norm = sqrt(sum grad^2);  c = min(1, max_grad_norm / (norm + 1e-6));  g = grad * c
 *   m += (1-b1) (g - m);  v = b2 v + (1-b2) g^2
 *   p = p * (1 - lr wd) - lr / (1 - b1^step) * (m / (sqrt(v) / sqrt(1 - b2^step) + eps));  grad = 0
 *
 * in the order of operations of torch.optim.AdamW. The factors 1 - lr wd, 1-b1, b2, 1-b2, lr / (1 - b1^step),
 * sqrt(1 - b2^step), eps and c are computed in double and rounded to float32 once; all else is
 * float32.
 *
 * Bytes: 36 n. Flops: 16 n.
 *
 * Determinism: the step is elementwise. The squared norm is summed in double over stretches whose length
 * depends on n alone, 16 lanes each, stretches in rising order. */
#include "kernels/cpu/cpu.h"
#include <math.h>

typedef struct {
  ks_v clip, decay, one_minus_b1, b2, one_minus_b2, step_size, root, eps;
} adamw_factors;

KS_INLINE void adamw_at(const ks_adamw_job *a, const adamw_factors *f, int64_t i, int64_t n) {
  ks_v g = ks_v_mul(ks_v_load_n(a->grad + i, n), f->clip);
  ks_v m = ks_v_load_n(a->m + i, n), v = ks_v_load_n(a->v + i, n);
  m = ks_v_fma(ks_v_sub(g, m), f->one_minus_b1, m);
  v = ks_v_fma(ks_v_mul(g, f->one_minus_b2), g, ks_v_mul(v, f->b2));
  ks_v step = ks_v_div(m, ks_v_add(ks_v_div(ks_v_sqrt(v), f->root), f->eps));
  ks_v p = ks_v_mul(ks_v_load_n(a->p + i, n), f->decay);
  ks_v_store_n(a->p + i, ks_v_sub(p, ks_v_mul(step, f->step_size)), n);
  ks_v_store_n(a->m + i, m, n);
  ks_v_store_n(a->v + i, v, n);
}

static void adamw_step(const ks_ctx *ctx, const ks_adamw_job *a, double clip) {
  const double correct1 = 1 - pow(a->beta1, (double)a->step), correct2 = 1 - pow(a->beta2, (double)a->step);
  const adamw_factors f = {.clip = ks_v_set((float)clip),
                           .decay = ks_v_set((float)(1 - a->lr * a->weight_decay)),
                           .one_minus_b1 = ks_v_set((float)(1 - a->beta1)),
                           .b2 = ks_v_set((float)a->beta2),
                           .one_minus_b2 = ks_v_set((float)(1 - a->beta2)),
                           .step_size = ks_v_set((float)(a->lr / correct1)),
                           .root = ks_v_set((float)sqrt(correct2)),
                           .eps = ks_v_set((float)a->eps)};
  const int64_t whole = a->n / KS_LANES * KS_LANES;
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 4 * a->n)) schedule(static)
  for (int64_t i = 0; i < whole; i += KS_LANES)
    adamw_at(a, &f, i, KS_LANES);
  if (whole < a->n) adamw_at(a, &f, whole, a->n - whole);
}

/* Products of floats are exact in double, so that fma or not makes no difference. */
static double sum_squares_lanes(const float *x, int64_t n) {
  double acc[KS_LANES] = {0};
  int64_t i = 0;
  for (; i + KS_LANES <= n; i += KS_LANES)
    for (int l = 0; l < KS_LANES; l++)
      acc[l] += (double)x[i + l] * (double)x[i + l];
  for (int l = 0; i < n; i++, l++)
    acc[l] += (double)x[i] * (double)x[i];
  for (int h = KS_LANES / 2; h > 0; h /= 2)
    for (int l = 0; l < h; l++)
      acc[l] += acc[l + h];
  return acc[0];
}

static double sum_squares(const ks_ctx *ctx, const float *x, int64_t n) {
  enum { STRETCHES = 64 };
  double part[STRETCHES], sum = 0;
  const int64_t length = ks_max_i64((n / STRETCHES / KS_LANES + 1) * KS_LANES, 4096),
                count = (n + length - 1) / length;
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, n / 2)) schedule(static)
  for (int64_t s = 0; s < count; s++)
    part[s] = sum_squares_lanes(x + s * length, ks_min_i64(length, n - s * length));
  for (int64_t s = 0; s < count; s++)
    sum += part[s];
  return sum;
}

static ks_status adamw(ks_ctx *ctx, const ks_adamw_args *a) {
  for (int64_t i = 0; i < a->n_jobs; i++) {
    const ks_adamw_job *job = &a->jobs[i];
    const double norm = sqrt(sum_squares(ctx, job->grad, job->n));
    a->norm[i] = norm;
    if (!isfinite(norm)) continue;
    adamw_step(ctx, job, job->max_grad_norm > 0 ? fmin(1, job->max_grad_norm / (norm + 1e-6)) : 1);
    memset(job->grad, 0, (size_t)job->n * sizeof *job->grad);
  }
  return KS_OK;
}
