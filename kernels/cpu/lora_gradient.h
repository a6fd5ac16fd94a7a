/* Gradients of LoRA's matrices, G += (scale * u)^T y with u [rows, rank], y [rows, n]: ranks by columns in
 * registers, the rows in rising order. */
#ifndef KS_CPU_LORA_GRADIENT_H
#define KS_CPU_LORA_GRADIENT_H

#include "kernels/cpu/dropout.h"
#include "kernels/cpu/lora_project.h"

enum {
  LORA_ROWS = 256,     /* rows of u packed at a time */
  LORA_DROP_ROWS = 48, /* with dropout */
#if KS_PART_LANES == 16
  LORA_RANKS = 8,
  LORA_VECTORS = 3,
#elif KS_PART_LANES == 8 || defined(__aarch64__)
  LORA_RANKS = 4,
  LORA_VECTORS = 1,
#else
  LORA_RANKS = 2,
  LORA_VECTORS = 1,
#endif
};

/* `u` packed [rows][LORA_GROUP]; y and g at the tile's first column; `left` columns of the last vector. */
KS_INLINE void lora_gradient_tile(const int ranks, const int vectors, float *g, int64_t ldg, const float *u,
                                  const float *y, int64_t ldy, int64_t n_rows, int64_t left) {
  ks_part acc[LORA_RANKS][LORA_VECTORS * KS_PARTS];
#pragma GCC unroll 8
  for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      ks_v start = ks_v_load_n(g + r * ldg + v * KS_LANES, left - v * KS_LANES);
      KS_EACH_PART(i) acc[r][v * KS_PARTS + i] = start.p[i];
    }
  for (int64_t row = 0; row < n_rows; row++, u += LORA_GROUP, y += ldy) {
    ks_part in[LORA_VECTORS * KS_PARTS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      __builtin_prefetch(y + 8 * ldy + v * KS_LANES);
      ks_v x = ks_v_load_n(y + v * KS_LANES, left - v * KS_LANES);
      KS_EACH_PART(i) in[v * KS_PARTS + i] = x.p[i];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ranks; r++) {
      ks_part factor = u[r] - (ks_part){0};
#pragma GCC unroll 16
      for (int i = 0; i < vectors * KS_PARTS; i++)
        acc[r][i] = ks_part_fma(factor, in[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      ks_v out;
      KS_EACH_PART(i) out.p[i] = acc[r][v * KS_PARTS + i];
      ks_v_store_n(g + r * ldg + v * KS_LANES, out, left - v * KS_LANES);
    }
}

static void lora_gradient_columns(float *g, int64_t ldg, int64_t ranks, const float *u, const float *y,
                                  int64_t ldy, int64_t n_rows, int64_t n_cols) {
  const int64_t whole = LORA_VECTORS * KS_LANES;
  for (int64_t r = 0; r < ranks; r += LORA_RANKS) {
    const int64_t here = ks_min_i64(LORA_RANKS, ranks - r);
    for (int64_t j = 0; j < n_cols;) {
      float *out = g + r * ldg + j;
      const int64_t left = n_cols - j;
      if (here == LORA_RANKS && left >= whole) {
        lora_gradient_tile(LORA_RANKS, LORA_VECTORS, out, ldg, u + r, y + j, ldy, n_rows, whole);
        j += whole;
      } else if (here == LORA_RANKS) {
        lora_gradient_tile(LORA_RANKS, 1, out, ldg, u + r, y + j, ldy, n_rows, ks_min_i64(left, KS_LANES));
        j += KS_LANES;
      } else {
        for (int64_t i = 0; i < here; i++)
          lora_gradient_tile(1, 1, out + i * ldg, ldg, u + r + i, y + j, ldy, n_rows,
                             ks_min_i64(left, KS_LANES));
        j += KS_LANES;
      }
    }
  }
}

/* Columns [begin, end) of G [rank, n] += (scale * u)^T y over n_rows rows of u [., ldu] and y [., n]; with
 * dropout y is dropped first (begin is then a multiple of 64). */
typedef struct {
  float *g;
  const float *u, *y;
  int64_t ldu, n, n_rows, rank, begin, end;
  float scale;
  const dropout_mask *dropout;
} lora_gradient_args;

static void lora_gradient_rows(const lora_gradient_args *l, int64_t row, int64_t n_rows, int64_t begin,
                               int64_t end, float *u, float *dropped) {
  const float *y = l->y + row * l->n + begin;
  int64_t ldy = l->n;
  if (l->dropout) {
    dropout_apply(l->dropout, row, begin, n_rows, end - begin, y, ldy, dropped, GEMM_KC, false);
    y = dropped;
    ldy = GEMM_KC;
  }
  for (int64_t r = 0; r < l->rank; r += LORA_GROUP) {
    int64_t ranks = ks_min_i64(LORA_GROUP, l->rank - r);
    for (int64_t i = 0; i < n_rows; i++) {
      ks_v factors = ks_v_load_n(l->u + (row + i) * l->ldu + r, ranks);
      ks_v_store_n(u + i * LORA_GROUP, ks_v_mul(factors, ks_v_set(l->scale)), LORA_GROUP);
    }
    lora_gradient_columns(l->g + r * l->n + begin, l->n, ranks, u, y, ldy, n_rows, end - begin);
  }
}

/* u: LORA_ROWS * LORA_GROUP floats; dropped: LORA_DROP_ROWS * GEMM_KC. */
static void lora_gradient(const lora_gradient_args *l, float *u, float *dropped) {
  const int64_t row_step = l->dropout ? LORA_DROP_ROWS : LORA_ROWS, col_step = l->dropout ? GEMM_KC : l->n;
  for (int64_t row = 0; row < l->n_rows; row += row_step)
    for (int64_t col = l->begin; col < l->end; col += col_step)
      lora_gradient_rows(l, row, ks_min_i64(row_step, l->n_rows - row), col,
                         ks_min_i64(col + col_step, l->end), u, dropped);
}

#endif
