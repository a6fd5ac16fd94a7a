/* Products C = X B with B packed into panels, each element of C one fma chain over the reduction index in
 * rising order.
 *
 * Packed B (gemm_layout): panel p holds columns 32p .. 32p + 31 of B; inside, row k is 32 consecutive values
 * ("vector columns" 2p and 2p + 1). With bf16 two rows are interleaved: unit (k / 2, j) holds rows k and k +
 * 1 of column j. Packed X (a tile): pairs of rows interleaved, [pair][unit of k][2], GEMM_PAIR floats a pair,
 * so that a micro-kernel addresses all its rows from one pointer with constant offsets, and rank-r products
 * read two rows at a time.
 *
 * A micro-kernel keeps rows x (16 * vectors) elements of C in registers; the reduction is cut into blocks of
 * at most GEMM_KC units, between which C goes through memory: the same chain. */
#ifndef KS_CPU_GEMM_TILE_H
#define KS_CPU_GEMM_TILE_H

#include "kernels/cpu/cpu.h"

enum {
  GEMM_PANEL = 32, /* columns of a panel */
  GEMM_KC = 320,   /* units of k a block */
  GEMM_PAIR =
      2 * GEMM_KC + KS_LANES, /* floats between pairs of rows; the odd line spreads them over cache sets */
  GEMM_MC = 112,              /* rows a block */
#if KS_PART_LANES == 16
  GEMM_MR = 14, /* 28 accumulators of 32 registers */
  GEMM_NV = 2,
#elif KS_PART_LANES == 8
  GEMM_MR = 6, /* 12 accumulators of 16 registers */
  GEMM_NV = 1,
#elif defined(__aarch64__)
  GEMM_MR = 6, /* 24 accumulators of 32 registers */
  GEMM_NV = 1,
#else
  GEMM_MR = 2,
  GEMM_NV = 1,
#endif
};

typedef struct {
  void *data;                     /* NULL: not made */
  int64_t n_cols, k, panel_units; /* 32-bit units a panel: 32 k, or 32 ceil(k / 2) with bf16 */
  ks_dtype dtype;
} gemm_layout;

/* ---------------------------------------------------------------- micro-kernels */

typedef struct {
  const float *a;  /* packed tile */
  const float *b;  /* first vector column, first unit of k */
  int64_t b_step;  /* GEMM_PLAIN: floats between rows of B */
  int64_t b_panel; /* floats between panels */
  int64_t n_units; /* of k */
  float *c;
  int64_t ldc;
  int64_t n_cols;    /* columns of C from c on */
  const float *bias; /* or NULL */
  bool load_c;
} gemm_tile;

/* B in panels of floats, in panels of bf16 pairs, or as a plain matrix. */
typedef enum { GEMM_PACKED, GEMM_PACKED_BF16, GEMM_PLAIN } gemm_kind;

/* a and b hold one unit of k in each lane: two bf16. */
KS_INLINE ks_part gemm_step_bf16(ks_part a, ks_part b, ks_part c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  const int32_t high = (int32_t)0xffff0000;
  c = ks_part_fma((ks_part)((ks_ipart)a << 16), (ks_part)((ks_ipart)b << 16), c); /* even k in the low half */
  return ks_part_fma((ks_part)((ks_ipart)a & high), (ks_part)((ks_ipart)b & high), c);
#endif
}

/* Arrays of native registers, indexed by constants only after unrolling, so that they stay registers. */
KS_INLINE void gemm_tile_run(const int mr, const int nv, const gemm_kind kind, const bool full,
                             const gemm_tile *t) {
  const int64_t b_step = kind == GEMM_PLAIN ? t->b_step : GEMM_PANEL;
  ks_part acc[GEMM_MR][8 * KS_PARTS];
#pragma GCC unroll 16
  for (int m = 0; m < mr; m++) {
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
      const float *c = t->c + m * t->ldc + v * KS_LANES;
      int64_t left = full ? KS_LANES : ks_max_i64(t->n_cols - v * KS_LANES, 0);
      ks_v init = t->load_c ? ks_v_load_n(c, left) : ks_v_zero();
      if (t->bias) init = ks_v_add(init, ks_v_load(t->bias + v * KS_LANES));
      KS_EACH_PART(i) acc[m][v * KS_PARTS + i] = init.p[i];
    }
  }
  const float *a = t->a;
  const int64_t b_panel = kind == GEMM_PLAIN ? GEMM_PANEL : t->b_panel;
  const float *b[4] = {t->b, t->b + b_panel, t->b + 2 * b_panel, t->b + 3 * b_panel};
  for (int64_t k = t->n_units; k > 0; k--) {
    ks_part row[8 * KS_PARTS];
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
      int64_t left = kind != GEMM_PLAIN || full ? KS_LANES : ks_max_i64(t->n_cols - v * KS_LANES, 0);
      ks_v x = ks_v_load_n(b[v / 2] + v % 2 * KS_LANES, left);
      KS_EACH_PART(i) row[v * KS_PARTS + i] = x.p[i];
    }
#pragma GCC unroll 16
    for (int m = 0; m < mr; m++) {
      ks_part x = a[m / 2 * GEMM_PAIR + m % 2] - (ks_part){0};
#pragma GCC unroll 32
      for (int i = 0; i < nv * KS_PARTS; i++)
        acc[m][i] = kind == GEMM_PACKED_BF16 ? gemm_step_bf16(x, row[i], acc[m][i])
                                             : ks_part_fma(x, row[i], acc[m][i]);
    }
    a += 2;
#pragma GCC unroll 4
    for (int i = 0; i < (nv + 1) / 2; i++)
      b[i] += b_step;
  }
#pragma GCC unroll 16
  for (int m = 0; m < mr; m++) {
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
      ks_v out;
      KS_EACH_PART(i) out.p[i] = acc[m][v * KS_PARTS + i];
      int64_t left = full ? KS_LANES : ks_max_i64(t->n_cols - v * KS_LANES, 0);
      ks_v_store_n(t->c + m * t->ldc + v * KS_LANES, out, left);
    }
  }
}

/* All n_cols columns of C, which start at a panel. */
KS_INLINE void gemm_tile_sweep(const int mr, const int nv, const gemm_kind kind, gemm_tile t) {
  const float *b = t.b;
  for (int64_t v = 0; t.n_cols > 0;) {
    t.b = kind == GEMM_PLAIN ? b + v * KS_LANES : b + v / 2 * t.b_panel + v % 2 * KS_LANES;
    const int n = t.n_cols >= nv * KS_LANES ? nv : 1;
    if (t.n_cols < KS_LANES)
      gemm_tile_run(mr, 1, kind, false, &t);
    else if (n == nv)
      gemm_tile_run(mr, nv, kind, true, &t);
    else
      gemm_tile_run(mr, 1, kind, true, &t);
    v += n;
    t.c += n * KS_LANES;
    t.n_cols -= n * KS_LANES;
    if (t.bias) t.bias += n * KS_LANES;
  }
}

/* X(rows, vectors): few rows take several panels at once, so that enough chains are under way. */
#if KS_PART_LANES == 16
#define GEMM_FOR_ROWS(X)                                                                                     \
  X(1, 8)                                                                                                    \
  X(2, 8) X(3, 4) X(4, 4) X(5, 2) X(6, 2) X(7, 2) X(8, 2) X(9, 2) X(10, 2) X(11, 2) X(12, 2) X(13, 2)        \
      X(14, 2)
#elif KS_PART_LANES == 8 || defined(__aarch64__)
#define GEMM_FOR_ROWS(X) X(1, 4) X(2, 2) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
#else
#define GEMM_FOR_ROWS(X) X(1, 2) X(2, 1)
#endif
#define GEMM_FUNCTIONS(mr, nv)                                                                               \
  static void gemm_kernel_f32_##mr(const gemm_tile *t) {                                                     \
    gemm_tile_sweep(mr, nv, GEMM_PACKED, *t);                                                                \
  }                                                                                                          \
  static void gemm_kernel_bf16_##mr(const gemm_tile *t) {                                                    \
    gemm_tile_sweep(mr, nv, GEMM_PACKED_BF16, *t);                                                           \
  }                                                                                                          \
  static void gemm_kernel_plain_##mr(const gemm_tile *t) {                                                   \
    gemm_tile_sweep(mr, nv, GEMM_PLAIN, *t);                                                                 \
  }
GEMM_FOR_ROWS(GEMM_FUNCTIONS)

typedef void (*gemm_kernel)(const gemm_tile *t);
#define GEMM_ENTRY(mr, nv)                                                                                   \
  [mr] = {[GEMM_PACKED] = gemm_kernel_f32_##mr,                                                              \
          [GEMM_PACKED_BF16] = gemm_kernel_bf16_##mr,                                                        \
          [GEMM_PLAIN] = gemm_kernel_plain_##mr},
/* [rows][kind] */
static const gemm_kernel gemm_kernels[GEMM_MR + 1][3] = {GEMM_FOR_ROWS(GEMM_ENTRY)};
#undef GEMM_ENTRY
#undef GEMM_FUNCTIONS
#undef GEMM_FOR_ROWS

#endif
