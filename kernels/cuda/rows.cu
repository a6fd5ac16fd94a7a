/* Copies of rows by index.
 *
 *   gather:  y[i, :] = x[index[i], :]        scatter:  y[index[i], :] = x[i, :]
 *
 * Bytes, with e those of an activation: 2 e n_rows n_cols, and 8 n_rows of indices. No flops: bound by
 * memory.
 *
 * Geometry: rows are bytes, copied in the widest units (16, 8, 4 or 2 bytes) that both arrays and the row
 * size allow. A block of 256 threads takes as many rows as lie side by side in it, the threads of a row being
 * the next power of two of its units; each thread has up to 4 loads under way. The index is read once a
 * thread. 32 to 48 registers (sm_90).
 *
 * Determinism: copies.
 *
 * Ladder (H200, bf16, commit f74fb33; an empty kernel measures 3 us)
 *   v1  this; expected: the card's copy bandwidth for rows of 128 bytes and more. Measured, 2048 of rows of 2048: gather 24 us
 *       (16 % of a copy), scatter 17 us (24 %), from a table that is not in cache; hot, in a recorded step, 4.2 us */
#include "kernels/cuda/launch.cuh"

enum { ROWS_THREADS = 256, ROWS_UNROLL = 4 };

/* lanes: threads of a row, a power of two. */
template <class U>
__global__ void rows_copy_kernel(const U *x, U *y, const int64_t *index, int64_t n_rows, int64_t row_units,
                                 int lanes, bool scatter) {
  ks_grid_wait();
  ks_grid_start_next();
  const int64_t row = (int64_t)blockIdx.x * (ROWS_THREADS / lanes) + (int)threadIdx.x / lanes;
  const int lane = (int)threadIdx.x % lanes;
  if (row >= n_rows) return;
  const int64_t other = index[row];
  x += (scatter ? row : other) * row_units;
  y += (scatter ? other : row) * row_units;
  for (int64_t j = lane; j < row_units; j += (int64_t)ROWS_UNROLL * lanes) {
    U held[ROWS_UNROLL];
#pragma unroll
    for (int k = 0; k < ROWS_UNROLL; k++)
      if (j + (int64_t)k * lanes < row_units) held[k] = x[j + (int64_t)k * lanes];
#pragma unroll
    for (int k = 0; k < ROWS_UNROLL; k++)
      if (j + (int64_t)k * lanes < row_units) y[j + (int64_t)k * lanes] = held[k];
  }
}

template <class U>
static ks_status rows_launch(ks_ctx *ctx, const char *op, const ks_rows_args *a, int64_t row_bytes,
                             bool scatter) {
  const int64_t *index, units = row_bytes / (int64_t)sizeof(U);
  int lanes = 1;
  while (lanes < ROWS_THREADS && lanes * ROWS_UNROLL < units)
    lanes *= 2;
  KS_TRY(ks_cuda_stage(ctx, a->index, (size_t)a->n_rows * sizeof *index, (const void **)&index));
  return ks_launch_early(ctx, op, rows_copy_kernel<U>, dim3(ks_blocks_for(a->n_rows, ROWS_THREADS / lanes)),
                         dim3(ROWS_THREADS), 0, (const U *)a->x, (U *)a->y, index, a->n_rows, units, lanes,
                         scatter);
}

static ks_status rows_copy(ks_ctx *ctx, const char *op, const ks_rows_args *a, bool scatter) {
  const int64_t row_bytes = a->n_cols * (int64_t)ks_ctx_act_size(ctx);
  const uintptr_t bits = (uintptr_t)a->x | (uintptr_t)a->y | (uintptr_t)row_bytes;
  if (bits % 16 == 0) return rows_launch<uint4>(ctx, op, a, row_bytes, scatter);
  if (bits % 8 == 0) return rows_launch<uint2>(ctx, op, a, row_bytes, scatter);
  if (bits % 4 == 0) return rows_launch<uint32_t>(ctx, op, a, row_bytes, scatter);
  return rows_launch<uint16_t>(ctx, op, a, row_bytes, scatter);
}

extern "C" ks_status ks_cuda_rows_gather(ks_ctx *ctx, const ks_rows_args *a) {
  return rows_copy(ctx, "rows_gather", a, false);
}
extern "C" ks_status ks_cuda_rows_scatter(ks_ctx *ctx, const ks_rows_args *a) {
  return rows_copy(ctx, "rows_scatter", a, true);
}
