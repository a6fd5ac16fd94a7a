/* Cross-entropy of the language-model head in blocks of rows: logits, their softmax in place, their product
 * with W. The logits of a block stay in the last cache; each row's exponentials are summed in one fixed
 * order. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/weight.h"
#include <math.h>

/* Rows that the product takes at a time anyway; half of them when their logits would not fit any cache. */
enum { HEAD_ROWS = GEMM_MC, HEAD_BLOCK_FLOATS = 8 << 20 };

/* Floats from one row of logits to the next. */
static int64_t head_stride(const ks_weight *w) {
  return (w->n_out + KS_LANES - 1) / KS_LANES * KS_LANES;
}

static int64_t head_block_rows(const ks_weight *w, int64_t n_rows) {
  int64_t rows = head_stride(w) * HEAD_ROWS > HEAD_BLOCK_FLOATS ? HEAD_ROWS / 2 : HEAD_ROWS;
  return ks_min_i64(rows, n_rows);
}

static size_t head_loss_workspace(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows) {
  (void)ctx;
  /* A block of logits and a factor for each of its rows. */
  return (size_t)(head_block_rows(w, n_rows) * (head_stride(w) + 1)) * sizeof(float);
}

static float head_max(const float *z, int64_t n) {
  ks_v m[4], low = ks_v_set(-__builtin_inff());
  for (int c = 0; c < 4; c++)
    m[c] = low;
  int64_t j = 0;
  for (; j + 4 * KS_LANES <= n; j += 4 * KS_LANES)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++)
      m[c] = ks_v_max(ks_v_load(z + j + c * KS_LANES), m[c]);
  float max = ks_v_max_lane(ks_v_max(ks_v_max(m[0], m[1]), ks_v_max(m[2], m[3])));
  for (; j < n; j++)
    if (z[j] > max) max = z[j];
  return max;
}

/* z = exp(z - max) in place; returns the sum, in 64 chains. */
static float head_exp(float *z, int64_t n, float max) {
  const ks_v m = ks_v_set(max);
  ks_v sum[4] = {ks_v_zero(), ks_v_zero(), ks_v_zero(), ks_v_zero()};
  int64_t j = 0;
  for (; j + 4 * KS_LANES <= n; j += 4 * KS_LANES)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      ks_v e = ks_v_exp(ks_v_sub(ks_v_load(z + j + c * KS_LANES), m));
      ks_v_store(z + j + c * KS_LANES, e);
      sum[c] = ks_v_add(sum[c], e);
    }
  for (int c = 0; j < n; c++, j += KS_LANES) {
    float tail[KS_LANES] = {0};
    ks_v_store_n(tail, ks_v_exp(ks_v_sub(ks_v_load_n(z + j, n - j), m)), n - j);
    ks_v_store_n(z + j, ks_v_load(tail), n - j);
    sum[c] = ks_v_add(sum[c], ks_v_load(tail));
  }
  return ks_v_sum(ks_v_add(ks_v_add(sum[0], sum[1]), ks_v_add(sum[2], sum[3])));
}

/* Loss of a row; z becomes the unscaled gradient e - sum * onehot, *factor what it is to be multiplied by. */
static float head_softmax(float *z, int64_t n, int32_t target, float row_scale, float *factor) {
  float max = head_max(z, n), z_target = z[target];
  float sum = head_exp(z, n, max);
  z[target] -= sum;
  *factor = row_scale / sum;
  return (float)(log((double)sum) + ((double)max - (double)z_target));
}

typedef struct {
  const ks_head_loss_args *a;
  const gemm_layout *forward, *backward; /* backward NULL: loss only */
  float *logits, *factors;
  int64_t stride, block;
} head_job;

static void head_run(const head_job *job, int thread, int n_threads, gemm_scratch *scratch) {
  const ks_head_loss_args *a = job->a;
  const int64_t n_in = a->w->n_in, n_out = a->w->n_out;
  for (int64_t row = 0; row < a->n_rows; row += job->block) {
    const int64_t rows = ks_min_i64(job->block, a->n_rows - row);
    const gemm_args z = {.x = ks_in(a->x) + row * n_in,
                         .ldx = n_in,
                         .b = job->forward,
                         .c = job->logits,
                         .ldc = job->stride,
                         .n_rows = rows,
                         .bias = ((weight_impl *)a->w->impl)->bias};
    gemm_run(&z, thread, n_threads, scratch);
#pragma omp barrier
    int64_t begin, end;
    gemm_split(rows, 1, thread, n_threads, &begin, &end);
    for (int64_t i = begin; i < end; i++)
      a->loss[row + i] = head_softmax(job->logits + i * job->stride, n_out, a->targets[row + i],
                                      a->row_scale ? a->row_scale[row + i] : 1, &job->factors[i]);
#pragma omp barrier
    if (!job->backward) continue;
    const gemm_args dx = {.x = job->logits,
                          .ldx = job->stride,
                          .x_scale = job->factors,
                          .b = job->backward,
                          .c = ks_out(a->dx) + row * n_in,
                          .ldc = n_in,
                          .n_rows = rows};
    gemm_run(&dx, thread, n_threads, scratch);
#pragma omp barrier
  }
}

static ks_status head_loss(ks_ctx *ctx, const ks_head_loss_args *a) {
  const weight_impl *impl = a->w->impl;
  head_job job = {.a = a,
                  .forward = &impl->forward,
                  .logits = a->workspace,
                  .stride = head_stride(a->w),
                  .block = head_block_rows(a->w, a->n_rows)};
  job.factors = job.logits + job.block * job.stride;
  gemm_layout backward;
  if (a->dx) {
    KS_TRY(weight_backward(ctx, a->w, &backward));
    job.backward = &backward;
  }
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(gemm_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, a->n_rows * a->w->n_out * (a->w->n_in / 4 + 8)))
  {
    int thread = omp_get_thread_num();
    head_run(&job, thread, omp_get_num_threads(), ks_cpu_scratch(ctx, thread));
  }
  return KS_OK;
}
