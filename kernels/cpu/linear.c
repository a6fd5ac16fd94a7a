/* Linear layers with segmented LoRA: the frozen product runs once over all rows, each segment adds its rank-r
 * terms. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lora_gradient.h"
#include "kernels/cpu/weight.h"

typedef struct {
  gemm_scratch gemm;
  float x[GEMM_MR * GEMM_KC];      /* linear_drop_dx */
  float u[LORA_ROWS * LORA_GROUP]; /* lora_gradient */
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

/* Rows [r0, r1) of u = drop(x) A^T, or of v = scale * dy B, where the product does not make them on its way.
 */
static void linear_project(const ks_linear_args *a, bool backward, const dropout_mask *mask, int64_t r0,
                           int64_t r1, linear_scratch *scratch) {
  const int64_t n = backward ? a->w->n_out : a->w->n_in;
  for (int64_t row = r0; row < r1; row += GEMM_MC) {
    lora_block b = {.l = a,
                    .backward = backward,
                    .packed = scratch->gemm.a,
                    .row = row,
                    .n_rows = ks_min_i64(GEMM_MC, r1 - row),
                    .n = n,
                    .ranks = scratch->gemm.ranks};
    for (b.col = 0; b.col == 0 || b.col < n; b.col += GEMM_KC) {
      b.k = ks_min_i64(GEMM_KC, n - b.col);
      const gemm_rows rows = {.x = ks_in(backward ? a->dy : a->x) + row * n + b.col,
                              .ldx = n,
                              .n_rows = b.n_rows,
                              .n = b.k,
                              .scale = mask ? mask->keep : 1,
                              .mask = mask,
                              .mask_row = row,
                              .mask_col = b.col};
      gemm_pack_rows(scratch->gemm.a, GEMM_PAIR, &rows);
      lora_project_block(&b);
    }
  }
}

/* dx += drop'(v A) for rows [r0, r1); without dropout the product adds this term itself. */
static void linear_drop_dx(const ks_linear_args *a, const dropout_mask *mask, int64_t r0, int64_t r1,
                           linear_scratch *scratch) {
  const int64_t n = a->w->n_in;
  const ks_v keep = ks_v_set(mask->keep);
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = lora_of(a, seg);
    if (!lora) continue;
    const int64_t end = ks_min_i64(r1, seg->row_begin + seg->n_rows);
    for (int64_t row = ks_max_i64(r0, seg->row_begin), rows; row < end; row += rows) {
      rows = ks_min_i64(GEMM_MR, end - row);
      const gemm_rows v = {
          .x = ks_in(a->v) + row * a->u_stride, .ldx = a->u_stride, .n_rows = rows, .n = lora->rank, .scale = 1};
      gemm_pack_rows(scratch->gemm.u, GEMM_U_PAIR, &v);
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
        for (int64_t i = 0; i < rows; i++)
          for (int64_t j = 0; j < cols; j += KS_LANES) {
            float *dx = ks_out(a->dx) + (row + i) * n + col + j;
            ks_v term = ks_v_mul(ks_v_load(scratch->x + i * GEMM_KC + j), keep);
            term = dropout_keep(mask, row + i, col + j, term);
            ks_v_store_n(dx, ks_v_add(ks_v_load_n(dx, cols - j), term), cols - j);
          }
      }
    }
  }
}

/* The part of all adapters' gradients that falls to a thread: columns, so that rows add up in one order. */
static void linear_gradients(const ks_linear_args *a, const dropout_mask *mask, int thread, int n_threads,
                             linear_scratch *scratch) {
  const int64_t n_in = a->w->n_in, n_out = a->w->n_out;
  int64_t in0, in1, out0, out1;
  gemm_split(n_in, LORA_VECTORS * KS_LANES, thread, n_threads, &in0, &in1);
  gemm_split(n_out, LORA_VECTORS * KS_LANES, thread, n_threads, &out0, &out1);
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    const ks_lora *lora = lora_of(a, seg);
    if (!lora) continue;
    const int64_t row = seg->row_begin;
    const lora_gradient_args b = {.g = lora->grad_b_t,
                                  .u = ks_in(a->u) + row * a->u_stride,
                                  .y = ks_in(a->dy) + row * n_out,
                                  .ldu = a->u_stride,
                                  .n = n_out,
                                  .n_rows = seg->n_rows,
                                  .rank = lora->rank,
                                  .begin = out0,
                                  .end = out1,
                                  .scale = lora->scale};
    const lora_gradient_args g = {.g = lora->grad_a,
                                  .u = ks_in(a->v) + row * a->u_stride,
                                  .y = ks_in(a->x) + row * n_in,
                                  .ldu = a->u_stride,
                                  .n = n_in,
                                  .n_rows = seg->n_rows,
                                  .rank = lora->rank,
                                  .begin = in0,
                                  .end = in1,
                                  .scale = 1,
                                  .mask = mask,
                                  .mask_row = row};
    lora_gradient(&b, scratch->u);
    lora_gradient(&g, scratch->u);
  }
}

/* u or v of the rows of this thread: left to the product when it has all columns of the same rows. */
static void linear_prepare(const ks_linear_args *a, gemm_args *g, const dropout_mask *mask, int thread,
                           int n_threads, linear_scratch *scratch) {
  const bool whole_rows = gemm_row_parts(g, n_threads) == n_threads;
  const dropout_mask *u_mask = g->backward ? NULL : mask;
  int64_t r0, r1;
  gemm_row_share(g, thread, n_threads, &r0, &r1);
  if (mask) dropout_make(a, mask, r0, r1);
  if (whole_rows && g->c) {
    g->project = a;
    g->mask = u_mask;
  } else {
    linear_project(a, g->backward, u_mask, r0, r1, scratch);
  }
  if (!whole_rows) {
#pragma omp barrier
  }
}

/* One thread's part of either pass. mask NULL: no dropout. */
static void linear_run(const ks_linear_args *a, gemm_args g, bool has_lora, const dropout_mask *mask,
                       linear_scratch *scratch) {
  const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  if (has_lora) linear_prepare(a, &g, mask, thread, n_threads, scratch);
  if (g.c) gemm_run(&g, thread, n_threads, &scratch->gemm);
  if (!has_lora || !g.backward) return;
#pragma omp barrier
  linear_gradients(a, mask, thread, n_threads, scratch);
  int64_t r0, r1;
  gemm_row_share(&g, thread, n_threads, &r0, &r1);
  if (g.c && mask) linear_drop_dx(a, mask, r0, r1, scratch);
}

static ks_status linear_pass(ks_ctx *ctx, const ks_linear_args *a, gemm_args g) {
  const bool has_lora = linear_has_lora(a), drop = has_lora && a->dropout > 0;
  dropout_mask mask = {0};
  /* Backward, a term under dropout is not part of the chain. */
  if (has_lora && !(g.backward && drop)) g.lora = a;
  if (drop) KS_TRY(dropout_reserve(ctx, a, &mask));
  KS_TRY(ks_cpu_scratch_reserve(ctx, sizeof(linear_scratch)));
#pragma omp parallel num_threads(ks_cpu_threads(ctx, linear_work(a)))
  linear_run(a, g, has_lora, drop ? &mask : NULL, ks_cpu_scratch(ctx, omp_get_thread_num()));
  return KS_OK;
}

static ks_status linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const weight_impl *impl = a->w->impl;
  if (a->residual && a->residual != a->y)
    memcpy(a->y, a->residual, (size_t)a->n_rows * (size_t)a->w->n_out * sizeof(float));
  const gemm_args g = {.x = a->x,
                       .ldx = a->w->n_in,
                       .b = &impl->forward,
                       .bias = impl->bias,
                       .c = a->y,
                       .ldc = a->w->n_out,
                       .accumulate = a->residual != NULL,
                       .n_rows = a->n_rows};
  return linear_pass(ctx, a, g);
}

static ks_status linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  gemm_args g = {.x = a->dy,
                 .ldx = a->w->n_out,
                 .c = a->dx,
                 .ldc = a->w->n_in,
                 .accumulate = a->accumulate_dx,
                 .n_rows = a->n_rows,
                 .backward = true};
  gemm_layout w;
  if (a->dx) {
    KS_TRY(weight_backward(ctx, a->w, &w));
    g.b = &w;
  }
  return a->dx || linear_has_lora(a) ? linear_pass(ctx, a, g) : KS_OK;
}
