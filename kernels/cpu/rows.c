/* Copies of rows by index. */
#include "kernels/cpu/cpu.h"

static ks_status rows_gather(ks_ctx *ctx, const ks_rows_args *a) {
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, a->n_rows * a->n_cols)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++)
    memcpy(ks_out(a->y) + i * a->n_cols, ks_in(a->x) + a->index[i] * a->n_cols, (size_t)a->n_cols * sizeof(float));
  return KS_OK;
}

static ks_status rows_scatter(ks_ctx *ctx, const ks_rows_args *a) {
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, a->n_rows * a->n_cols)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++)
    memcpy(ks_out(a->y) + a->index[i] * a->n_cols, ks_in(a->x) + i * a->n_cols, (size_t)a->n_cols * sizeof(float));
  return KS_OK;
}
