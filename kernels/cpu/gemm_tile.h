/* Products C = X B with B packed into panels, each element of C one fma chain over the reduction index in
 * rising order.
 *
 * Packed B (gemm_layout): panel p holds columns 32p .. 32p + 31 of B; inside, row k is 32 consecutive values
 * ("vector columns" 2p and 2p + 1). With bf16 two rows are interleaved: unit (k / 2, j) holds rows k and k +
 * 1 of column j. Packed X: pairs of rows interleaved, [pair][unit of k][2], GEMM_PAIR floats a pair, so that
 * a micro-kernel addresses all its rows from one pointer with constant offsets, and rank-r products read two
 * rows at a time.
 *
 * A micro-kernel keeps rows x (16 * vectors) elements of C in registers. The reduction is cut into blocks of
 * at most GEMM_KC units, between which C goes through memory; rank-r terms of LoRA continue the same chain.
 */
#ifndef KS_CPU_GEMM_TILE_H
#define KS_CPU_GEMM_TILE_H

#include "kernels/cpu/cpu.h"

/* Strides between pairs of rows have an odd number of cache lines, which spreads the rows over cache sets. */
enum {
  GEMM_PANEL = 32,                    /* columns of a panel */
  GEMM_MC = 112,                      /* rows a block */
  GEMM_KC = 1024,                     /* units of k a block */
  GEMM_PAIR = 2 * GEMM_KC + KS_LANES, /* floats between packed pairs of rows of X */
  GEMM_MAX_RANK = 256,
  GEMM_U_PAIR = 2 * GEMM_MAX_RANK + KS_LANES, /* the same for the left factor of a rank-r term */
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

/* C (+)= A B (+ bias), then += U R. */
typedef struct {
  const float *a;  /* packed rows of X */
  const float *b;  /* first panel, first unit of k */
  int64_t b_panel; /* floats between panels */
  int64_t n_units; /* of k */
  float *c;
  int64_t ldc;
  int64_t n_cols;    /* columns of C from c on */
  const float *bias; /* or NULL */
  bool load_c;
  int64_t next; /* this tile's share of what is read after this panel: floats from its first unit of k on, */
  int64_t next_step;  /* and floats for a unit of k, to be brought nearer meanwhile */
  const float *u, *r; /* packed rows of U; R [rank, ldr], at c's column */
  int64_t rank, ldr;
} gemm_tile;

/* B in panels of floats, in panels of bf16 pairs, or absent: only the rank-r term. */
typedef enum { GEMM_F32, GEMM_BF16, GEMM_TERM } gemm_kind;

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

/* Accumulators are an array of native registers, indexed by constants only once unrolled, so that they stay
 * registers. */
KS_INLINE void gemm_tile_run(const int mr, const int nv, const gemm_kind kind, const bool full,
                             const gemm_tile *t) {
  ks_part acc[GEMM_MR][8 * KS_PARTS];
#define GEMM_LEFT(v) (full ? KS_LANES : ks_max_i64(t->n_cols - (v)*KS_LANES, 0))
#pragma GCC unroll 16
  for (int m = 0; m < mr; m++)
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
      ks_v init = t->load_c ? ks_v_load_n(t->c + m * t->ldc + v * KS_LANES, GEMM_LEFT(v)) : ks_v_zero();
      if (t->bias) init = ks_v_add(init, ks_v_load(t->bias + v * KS_LANES));
      KS_EACH_PART(i) acc[m][v * KS_PARTS + i] = init.p[i];
    }
#define GEMM_ROW(load)                                                                                       \
  ks_part row[8 * KS_PARTS];                                                                                 \
  _Pragma("GCC unroll 8") for (int v = 0; v < nv; v++) {                                                     \
    ks_v w = load;                                                                                           \
    KS_EACH_PART(i) row[v * KS_PARTS + i] = w.p[i];                                                          \
  }
#define GEMM_STEP(a, stride, step)                                                                           \
  _Pragma("GCC unroll 16") for (int m = 0; m < mr; m++) {                                                    \
    ks_part x = (a)[m / 2 * stride + m % 2] - (ks_part){0};                                                  \
    _Pragma("GCC unroll 32") for (int i = 0; i < nv * KS_PARTS; i++) acc[m][i] = step(x, row[i], acc[m][i]); \
  }
  if (kind != GEMM_TERM) {
    const float *a = t->a, *next = t->b + t->next;
    const float *b[4] = {t->b, t->b + t->b_panel, t->b + 2 * t->b_panel, t->b + 3 * t->b_panel};
    for (int64_t k = t->n_units; k > 0; k--, a += 2) {
      GEMM_ROW(ks_v_load(b[v / 2] + v % 2 * KS_LANES))
      if (nv <= GEMM_NV) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + KS_LANES, 0, 2);
        next += t->next_step;
      }
      if (kind == GEMM_F32) {
        GEMM_STEP(a, GEMM_PAIR, ks_part_fma)
      } else {
        GEMM_STEP(a, GEMM_PAIR, gemm_step_bf16)
      }
#pragma GCC unroll 4
      for (int i = 0; i < (nv + 1) / 2; i++)
        b[i] += GEMM_PANEL;
    }
  }
  const float *u = t->u, *r = t->r;
  for (int64_t k = t->rank; k > 0; k--, u += 2, r += t->ldr) {
    GEMM_ROW(ks_v_load_n(r + v * KS_LANES, GEMM_LEFT(v)))
    GEMM_STEP(u, GEMM_U_PAIR, ks_part_fma)
  }
#pragma GCC unroll 16
  for (int m = 0; m < mr; m++)
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
      ks_v out;
      KS_EACH_PART(i) out.p[i] = acc[m][v * KS_PARTS + i];
      ks_v_store_n(t->c + m * t->ldc + v * KS_LANES, out, GEMM_LEFT(v));
    }
#undef GEMM_STEP
#undef GEMM_ROW
#undef GEMM_LEFT
}

/* All n_cols columns of C, which start at a panel. */
KS_INLINE void gemm_tile_sweep(const int mr, const int nv, const gemm_kind kind, gemm_tile t) {
  const float *b = t.b;
  for (int64_t v = 0; t.n_cols > 0;) {
    const int n = t.n_cols >= nv * KS_LANES ? nv : 1;
    if (kind != GEMM_TERM) t.b = b + v / 2 * t.b_panel + v % 2 * KS_LANES;
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
    if (t.rank) t.r += n * KS_LANES;
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
    gemm_tile_sweep(mr, nv, GEMM_F32, *t);                                                                   \
  }                                                                                                          \
  static void gemm_kernel_bf16_##mr(const gemm_tile *t) {                                                    \
    gemm_tile_sweep(mr, nv, GEMM_BF16, *t);                                                                  \
  }                                                                                                          \
  static void gemm_kernel_term_##mr(const gemm_tile *t) {                                                    \
    gemm_tile_sweep(mr, nv, GEMM_TERM, *t);                                                                  \
  }
GEMM_FOR_ROWS(GEMM_FUNCTIONS)

typedef void (*gemm_kernel)(const gemm_tile *t);
#define GEMM_ENTRY(mr, nv)                                                                                   \
  [mr] = {[GEMM_F32] = gemm_kernel_f32_##mr,                                                                 \
          [GEMM_BF16] = gemm_kernel_bf16_##mr,                                                               \
          [GEMM_TERM] = gemm_kernel_term_##mr},
/* [rows][kind] */
static const gemm_kernel gemm_kernels[GEMM_MR + 1][3] = {GEMM_FOR_ROWS(GEMM_ENTRY)};
#undef GEMM_ENTRY
#undef GEMM_FUNCTIONS
#undef GEMM_FOR_ROWS

#endif
