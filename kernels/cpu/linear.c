/* Linear layers with segmented LoRA: the frozen product runs once over all rows, each segment adds its rank-r
 * terms. */
#include "kernels/cpu/lora.h"
#include "kernels/cpu/weight.h"

/* The adapter of a segment, or NULL. */
KS_INLINE const ks_lora *linear_lora(const ks_linear_args *a, const ks_segment *seg) {
  if (seg->adapter < 0 || seg->n_rows == 0) return NULL;
  const ks_lora *l = &a->loras[seg->adapter];
  return l->rank > 0 ? l : NULL;
}

static bool linear_has_lora(const ks_linear_args *a) {
  bool any = false;
  for (int64_t s = 0; s < a->n_segments && !any; s++)
    any = linear_lora(a, &a->segments[s]) != NULL;
  return any;
}

/* Vectorised operations of the frozen product, for the choice of threads. */
static int64_t linear_work(const ks_linear_args *a) {
  return a->n_rows * (a->w->n_out * a->w->n_in / 4);
}

/* Rows [r0, r1) of u = drop(x) A^T, or of v = scale * dy B. */
static void linear_project(const ks_linear_args *a, bool backward, int64_t r0, int64_t r1,
                           lora_scratch *scratch) {
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = linear_lora(a, seg);
    if (!lora) continue;
    lora_projection p = {.begin = ks_max_i64(r0, seg->row_begin),
                         .end = ks_min_i64(r1, seg->row_begin + seg->n_rows),
                         .rank = lora->rank,
                         .ldu = a->u_stride,
                         .segment_begin = seg->row_begin};
    lora_dropout dropout = lora_dropout_of(a, seg);
    if (backward) {
      p.x = a->dy;
      p.a = lora->b_t;
      p.n = a->w->n_out;
      p.u = a->v;
      p.scale = lora->scale;
    } else {
      p.x = a->x;
      p.a = lora->a;
      p.n = a->w->n_in;
      p.u = a->u;
      p.scale = 1;
      p.dropout = a->dropout > 0 ? &dropout : NULL;
    }
    lora_project(&p, scratch);
  }
}

/* dx += drop'(v A) for rows [r0, r1); without dropout the product adds this term itself. */
static void linear_drop_dx(const ks_linear_args *a, int64_t r0, int64_t r1, lora_scratch *scratch) {
  const int64_t n = a->w->n_in;
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = linear_lora(a, seg);
    if (!lora) continue;
    const lora_dropout dropout = lora_dropout_of(a, seg);
    const int64_t end = ks_min_i64(r1, seg->row_begin + seg->n_rows);
    for (int64_t row = ks_max_i64(r0, seg->row_begin); row < end; row += GEMM_MR) {
      const int64_t rows = ks_min_i64(GEMM_MR, end - row);
      gemm_pack_rows(scratch->gemm.u, a->v + row * a->u_stride, a->u_stride, rows, lora->rank, false, 1,
                     NULL);
      for (int64_t col = 0; col < n; col += LORA_KC) {
        const int64_t cols = ks_min_i64(LORA_KC, n - col);
        const gemm_tile t = {.a = scratch->gemm.u,
                             .b = lora->a + col,
                             .b_step = n,
                             .n_units = lora->rank,
                             .c = scratch->x,
                             .ldc = LORA_KC,
                             .n_cols = cols};
        gemm_kernels[rows][GEMM_PLAIN](&t);
        lora_drop(&dropout, row - seg->row_begin, col, rows, cols, scratch->x, LORA_KC, a->dx + row * n + col,
                  n, true);
      }
    }
  }
}

/* The part of all adapters' gradients that falls to a thread: columns, so that rows add up in one order. */
static void linear_gradients(const ks_linear_args *a, int thread, int n_threads, lora_scratch *scratch) {
  const int64_t n_in = a->w->n_in, n_out = a->w->n_out;
  int64_t in0, in1, out0, out1;
  gemm_split(n_in, LORA_DROP, thread, n_threads, &in0, &in1);
  gemm_split(n_out, LORA_DROP, thread, n_threads, &out0, &out1);
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = linear_lora(a, seg);
    if (!lora) continue;
    const lora_dropout dropout = lora_dropout_of(a, seg);
    const int64_t row = seg->row_begin;
    const lora_gradient_args b = {.g = lora->grad_b_t,
                                  .u = a->u + row * a->u_stride,
                                  .y = a->dy + row * n_out,
                                  .ldu = a->u_stride,
                                  .n = n_out,
                                  .n_rows = seg->n_rows,
                                  .rank = lora->rank,
                                  .begin = out0,
                                  .end = out1,
                                  .scale = lora->scale};
    const lora_gradient_args g = {.g = lora->grad_a,
                                  .u = a->v + row * a->u_stride,
                                  .y = a->x + row * n_in,
                                  .ldu = a->u_stride,
                                  .n = n_in,
                                  .n_rows = seg->n_rows,
                                  .rank = lora->rank,
                                  .begin = in0,
                                  .end = in1,
                                  .scale = 1,
                                  .dropout = a->dropout > 0 ? &dropout : NULL};
    lora_gradient(&b, scratch);
    lora_gradient(&g, scratch);
  }
}

static void linear_forward_part(const ks_linear_args *a, const gemm_args *g, bool has_lora,
                                lora_scratch *scratch) {
  const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  if (has_lora) {
    int64_t r0, r1;
    gemm_row_share(a->n_rows, thread, n_threads, &r0, &r1);
    linear_project(a, false, r0, r1, scratch);
    if (gemm_row_parts(a->n_rows, n_threads) < n_threads) {
#pragma omp barrier
    }
  }
  gemm_run(g, thread, n_threads, &scratch->gemm);
}

static ks_status linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const weight_impl *impl = a->w->impl;
  const bool has_lora = linear_has_lora(a);
  const gemm_args g = {.x = a->x,
                       .ldx = a->w->n_in,
                       .b = &impl->forward,
                       .bias = impl->bias,
                       .c = a->y,
                       .ldc = a->w->n_out,
                       .accumulate = a->accumulate,
                       .n_rows = a->n_rows,
                       .lora = has_lora ? a : NULL};
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(lora_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, linear_work(a)))
  linear_forward_part(a, &g, has_lora, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}

static void linear_backward_part(const ks_linear_args *a, const gemm_args *g, bool has_lora,
                                 lora_scratch *scratch) {
  const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  int64_t r0, r1;
  gemm_row_share(a->n_rows, thread, n_threads, &r0, &r1);
  if (has_lora) linear_project(a, true, r0, r1, scratch);
  if (has_lora && n_threads > 1) {
#pragma omp barrier
  }
  if (a->dx) gemm_run(g, thread, n_threads, &scratch->gemm);
  if (!has_lora) return;
  linear_gradients(a, thread, n_threads, scratch);
  if (!a->dx || !(a->dropout > 0)) return;
  if (gemm_row_parts(a->n_rows, n_threads) < n_threads) {
#pragma omp barrier
  }
  linear_drop_dx(a, r0, r1, scratch);
}

static ks_status linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  const bool has_lora = linear_has_lora(a);
  gemm_args g = {.x = a->dy,
                 .ldx = a->w->n_out,
                 .c = a->dx,
                 .ldc = a->w->n_in,
                 .accumulate = a->accumulate_dx,
                 .n_rows = a->n_rows,
                 .lora = has_lora && !(a->dropout > 0) ? a : NULL,
                 .backward = true};
  if (!a->dx && !has_lora) return KS_OK;
  if (a->dx) KS_TRY(weight_backward(ctx, a->w, &g.b));
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(lora_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, linear_work(a)))
  linear_backward_part(a, &g, has_lora, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}
