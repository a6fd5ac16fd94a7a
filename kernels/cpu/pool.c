/* Pooling of a sequence's rows: the last one, or the mean.
 *
 * Bytes: last 8 n_seqs n_cols; mean 4 n_rows n_cols. Flops: mean n_rows n_cols.
 *
 * Determinism: a mean is a sum in double over the rows in rising order, divided and rounded once. */
#include "kernels/cpu/cpu.h"

enum { POOL_COLS = 64 };

static void pool_mean(const float *x, int64_t n_rows, int64_t n_cols, int64_t row, float *y) {
  double sum[POOL_COLS] = {0};
  for (int64_t i = 0; i < n_rows; i++)
    for (int64_t j = 0; j < n_cols; j++)
      sum[j] += (double)x[i * row + j];
  for (int64_t j = 0; j < n_cols; j++)
    y[j] = (float)(sum[j] / (double)n_rows);
}

static ks_status pool(ks_ctx *ctx, const ks_pool_args *a) {
  const int64_t cols = a->n_cols, work = a->pooling == KS_POOL_MEAN ? a->n_rows * cols : a->n_seqs * cols;
#pragma omp parallel for collapse(2) num_threads(ks_cpu_threads(ctx, work / 2)) schedule(static)
  for (int64_t s = 0; s < a->n_seqs; s++)
    for (int64_t j = 0; j < cols; j += POOL_COLS) {
      const int64_t begin = a->seq_offsets[s], end = a->seq_offsets[s + 1],
                    n = ks_min_i64(cols - j, POOL_COLS);
      float *y = a->y + s * cols + j;
      if (a->pooling == KS_POOL_LAST)
        memcpy(y, ks_in(a->x) + (end - 1) * cols + j, (size_t)n * sizeof *y);
      else
        pool_mean(ks_in(a->x) + begin * cols + j, end - begin, n, cols, y);
    }
  return KS_OK;
}
