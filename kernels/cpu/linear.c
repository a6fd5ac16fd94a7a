/* Linear layers with segmented LoRA: the frozen product runs once over all rows, each segment adds its rank-r
 * terms. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lora_gradient.h"
#include "kernels/cpu/weight.h"

typedef struct {
  gemm_scratch gemm;
  float x[LORA_DROP_ROWS * GEMM_KC]; /* rows after dropout; products before it */
  float u[LORA_ROWS * LORA_GROUP];   /* lora_gradient */
} linear_scratch;

static bool linear_has_lora(const ks_linear_args *a) {
  bool any = false;
  for (int64_t s = 0; s < a->n_segments && !any; s++)
    any = lora_of(a, &a->segments[s]) != NULL;
  return any;
}

/* Work for the choice of threads. Few rows are bound by reading the weights, which takes as long as five rows
 * do. */
static int64_t linear_work(const ks_linear_args *a) {
  return ks_max_i64(a->n_rows, 5) * (a->w->n_out * a->w->n_in / 6);
}

/* Columns [col, col + k) of rows [row, row + n_rows) after dropout, into scratch. */
static void linear_drop_rows(const ks_linear_args *a, int64_t row, int64_t n_rows, int64_t col, int64_t k,
                             float *out) {
  const int64_t n = a->w->n_in;
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const dropout_mask mask = dropout_of(a, seg);
    const int64_t begin = ks_max_i64(row, seg->row_begin),
                  end = ks_min_i64(row + n_rows, seg->row_begin + seg->n_rows);
    if (lora_of(a, seg) && begin < end)
      dropout_apply(&mask, begin - seg->row_begin, col, end - begin, k, a->x + begin * n + col, n,
                    out + (begin - row) * GEMM_KC, GEMM_KC, false);
  }
}

/* Rows [r0, r1) of u = drop(x) A^T, or of v = scale * dy B, where the product does not make them on its way.
 */
static void linear_project(const ks_linear_args *a, bool backward, int64_t r0, int64_t r1,
                           linear_scratch *scratch) {
  const int64_t n = backward ? a->w->n_out : a->w->n_in;
  const bool drop = !backward && a->dropout > 0;
  for (int64_t row = r0; row < r1; row += LORA_DROP_ROWS) {
    lora_block b = {.l = a,
                    .backward = backward,
                    .packed = scratch->gemm.a,
                    .row = row,
                    .n_rows = ks_min_i64(LORA_DROP_ROWS, r1 - row),
                    .n = n,
                    .ranks = scratch->gemm.ranks};
    for (b.col = 0; b.col == 0 || b.col < n; b.col += GEMM_KC) {
      b.k = ks_min_i64(GEMM_KC, n - b.col);
      const float *x = (backward ? a->dy : a->x) + row * n + b.col;
      if (drop) linear_drop_rows(a, row, b.n_rows, b.col, b.k, scratch->x);
      gemm_pack_rows(scratch->gemm.a, GEMM_PAIR, drop ? scratch->x : x, drop ? GEMM_KC : n, b.n_rows, b.k,
                     false, 1, NULL);
      lora_project_block(&b);
    }
  }
}

/* dx += drop'(v A) for rows [r0, r1); without dropout the product adds this term itself. */
static void linear_drop_dx(const ks_linear_args *a, int64_t r0, int64_t r1, linear_scratch *scratch) {
  const int64_t n = a->w->n_in;
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = lora_of(a, seg);
    if (!lora) continue;
    const dropout_mask dropout = dropout_of(a, seg);
    const int64_t end = ks_min_i64(r1, seg->row_begin + seg->n_rows);
    for (int64_t row = ks_max_i64(r0, seg->row_begin); row < end; row += GEMM_MR) {
      const int64_t rows = ks_min_i64(GEMM_MR, end - row);
      gemm_pack_rows(scratch->gemm.u, GEMM_U_PAIR, a->v + row * a->u_stride, a->u_stride, rows, lora->rank,
                     false, 1, NULL);
      for (int64_t col = 0; col < n; col += GEMM_KC) {
        const int64_t cols = ks_min_i64(GEMM_KC, n - col);
        const gemm_tile t = {.c = scratch->x,
                             .ldc = GEMM_KC,
                             .n_cols = cols,
                             .u = scratch->gemm.u,
                             .r = lora->a + col,
                             .rank = lora->rank,
                             .ldr = n};
        gemm_kernels[rows][GEMM_TERM](&t);
        dropout_apply(&dropout, row - seg->row_begin, col, rows, cols, scratch->x, GEMM_KC,
                      a->dx + row * n + col, n, true);
      }
    }
  }
}

/* The part of all adapters' gradients that falls to a thread: columns, so that rows add up in one order. */
static void linear_gradients(const ks_linear_args *a, int thread, int n_threads, linear_scratch *scratch) {
  const int64_t n_in = a->w->n_in, n_out = a->w->n_out;
  int64_t in0, in1, out0, out1;
  gemm_split(n_in, DROPOUT_COLS, thread, n_threads, &in0, &in1);
  gemm_split(n_out, DROPOUT_COLS, thread, n_threads, &out0, &out1);
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = lora_of(a, seg);
    if (!lora) continue;
    const dropout_mask dropout = dropout_of(a, seg);
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
    lora_gradient(&b, scratch->u, scratch->x);
    lora_gradient(&g, scratch->u, scratch->x);
  }
}

/* Whether the product can make u or v from the rows it packs: they are float32 as given, and all of a
 * thread's. */
static bool linear_fuses(const gemm_args *g, int n_threads) {
  return g->c && g->b->dtype == KS_DTYPE_F32 && gemm_row_parts(g, n_threads) == n_threads;
}

static void linear_forward_part(const ks_linear_args *a, gemm_args g, linear_scratch *scratch) {
  const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  if (g.lora && linear_fuses(&g, n_threads) && !(a->dropout > 0)) {
    g.project = a;
  } else if (g.lora) {
    int64_t r0, r1;
    gemm_row_share(&g, thread, n_threads, &r0, &r1);
    linear_project(a, false, r0, r1, scratch);
    if (gemm_row_parts(&g, n_threads) < n_threads) {
#pragma omp barrier
    }
  }
  gemm_run(&g, thread, n_threads, &scratch->gemm);
}

static ks_status linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const weight_impl *impl = a->w->impl;
  const gemm_args g = {.x = a->x,
                       .ldx = a->w->n_in,
                       .b = &impl->forward,
                       .bias = impl->bias,
                       .c = a->y,
                       .ldc = a->w->n_out,
                       .accumulate = a->accumulate,
                       .n_rows = a->n_rows,
                       .lora = linear_has_lora(a) ? a : NULL};
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(linear_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, linear_work(a)))
  linear_forward_part(a, g, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}

static void linear_backward_part(const ks_linear_args *a, gemm_args g, bool has_lora,
                                 linear_scratch *scratch) {
  const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  int64_t r0, r1;
  gemm_row_share(&g, thread, n_threads, &r0, &r1);
  if (has_lora && linear_fuses(&g, n_threads)) {
    g.project = a;
  } else if (has_lora) {
    linear_project(a, true, r0, r1, scratch);
    if (gemm_row_parts(&g, n_threads) < n_threads) {
#pragma omp barrier
    }
  }
  if (a->dx) gemm_run(&g, thread, n_threads, &scratch->gemm);
  if (!has_lora) return;
#pragma omp barrier
  linear_gradients(a, thread, n_threads, scratch);
  if (a->dx && a->dropout > 0) linear_drop_dx(a, r0, r1, scratch);
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
  gemm_layout w;
  if (a->dx) {
    KS_TRY(weight_backward(ctx, a->w, &w));
    g.b = &w;
  }
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(linear_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, linear_work(a)))
  linear_backward_part(a, g, has_lora, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}
