/* Gradients of LoRA's matrices, G += (scale * u)^T y with u [rows, rank], y [rows, n]: ranks by columns in
 * registers, the rows in rising order. */
#ifndef KS_CPU_LORA_GRADIENT_H
#define KS_CPU_LORA_GRADIENT_H

#include "kernels/cpu/lora_project.h"

enum {
  LORA_ROWS = 256, /* rows of u packed at a time */
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

/* Columns [begin, end) of G [rank, n] += (scale * u)^T y over n_rows rows of u [., ldu] and y [., n], which
 * is dropped first when there is a mask (begin is then a multiple of 16). */
typedef struct {
  float *g;
  const float *u, *y;
  int64_t ldu, n, n_rows, rank, begin, end;
  float scale;
  const dropout_mask *mask;
  int64_t mask_row; /* of y's first row */
} lora_gradient_args;

/* Rows [row, row + n_rows) of a tile; g at its first rank and column, u packed [rows][LORA_GROUP]; `left`
 * columns are there from `col` on. */
KS_INLINE void lora_gradient_tile(const int ranks, const int vectors, const bool masked,
                                  const lora_gradient_args *l, float *g, const float *u, int64_t row,
                                  int64_t n_rows, int64_t col, int64_t left) {
  const int64_t ldg = l->n, ldy = l->n;
  const float *y = l->y + row * ldy + col;
  ks_part acc[LORA_RANKS][LORA_VECTORS * KS_PARTS];
#pragma GCC unroll 8
  for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      ks_v start = ks_v_load_n(g + r * ldg + v * KS_LANES, left - v * KS_LANES);
      KS_EACH_PART(i) acc[r][v * KS_PARTS + i] = start.p[i];
    }
  for (int64_t i = 0; i < n_rows; i++, u += LORA_GROUP, y += ldy) {
    ks_part in[LORA_VECTORS * KS_PARTS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      __builtin_prefetch(y + 8 * ldy + v * KS_LANES);
      ks_v x = ks_v_load_n(y + v * KS_LANES, left - v * KS_LANES);
      if (masked) x = dropout_keep(l->mask, l->mask_row + row + i, col + v * KS_LANES, x);
      KS_EACH_PART(p) in[v * KS_PARTS + p] = x.p[p];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ranks; r++) {
      ks_part factor = u[r] - (ks_part){0};
#pragma GCC unroll 16
      for (int p = 0; p < vectors * KS_PARTS; p++)
        acc[r][p] = ks_part_fma(factor, in[p], acc[r][p]);
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

/* All columns, for up to LORA_GROUP ranks from `rank` on. */
KS_INLINE void lora_gradient_columns(const bool masked, const lora_gradient_args *l, int64_t rank,
                                     const float *u, int64_t row, int64_t n_rows) {
  const int64_t whole = LORA_VECTORS * KS_LANES, ranks = ks_min_i64(LORA_GROUP, l->rank - rank);
  for (int64_t r = 0; r < ranks; r += LORA_RANKS) {
    const int64_t here = ks_min_i64(LORA_RANKS, ranks - r);
    for (int64_t col = l->begin; col < l->end;) {
      float *g = l->g + (rank + r) * l->n + col;
      const int64_t left = ks_min_i64(l->end - col, whole);
      const bool wide = here == LORA_RANKS && left == whole;
      if (wide)
        lora_gradient_tile(LORA_RANKS, LORA_VECTORS, masked, l, g, u + r, row, n_rows, col, whole);
      else if (here == LORA_RANKS)
        lora_gradient_tile(LORA_RANKS, 1, masked, l, g, u + r, row, n_rows, col, ks_min_i64(left, KS_LANES));
      else
        for (int64_t i = 0; i < here; i++)
          lora_gradient_tile(1, 1, masked, l, g + i * l->n, u + r + i, row, n_rows, col,
                             ks_min_i64(left, KS_LANES));
      col += wide ? whole : KS_LANES;
    }
  }
}

/* u: LORA_ROWS * LORA_GROUP floats of scratch. */
static void lora_gradient(const lora_gradient_args *l, float *u) {
  const ks_v scale = ks_v_set(l->mask ? l->scale * l->mask->keep : l->scale);
  for (int64_t row = 0; row < l->n_rows; row += LORA_ROWS) {
    const int64_t n_rows = ks_min_i64(LORA_ROWS, l->n_rows - row);
    for (int64_t r = 0; r < l->rank; r += LORA_GROUP) {
      for (int64_t i = 0; i < n_rows; i++) {
        ks_v factors = ks_v_load_n(l->u + (row + i) * l->ldu + r, ks_min_i64(LORA_GROUP, l->rank - r));
        ks_v_store_n(u + i * LORA_GROUP, ks_v_mul(factors, scale), LORA_GROUP);
      }
      if (l->mask)
        lora_gradient_columns(true, l, r, u, row, n_rows);
      else
        lora_gradient_columns(false, l, r, u, row, n_rows);
    }
  }
}

#endif
