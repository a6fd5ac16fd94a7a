/* Products: packing of X, blocking, threads. Layouts and the order of operations: gemm_tile.h. */
#ifndef KS_CPU_GEMM_H
#define KS_CPU_GEMM_H

#include "kernels/cpu/gemm_tile.h"

/* C = X B (+ C) (+ bias) (+ the rank-r terms of LoRA: scale * u B_l^T forward, v A_l backward). */
typedef struct {
  const float *x; /* [n_rows, ldx] */
  int64_t ldx;
  const float *x_scale; /* a factor for each row of X, or NULL */
  const gemm_layout *b;
  const float *bias; /* padded to whole panels, or NULL */
  float *c;          /* [n_rows, ldc] */
  int64_t ldc;
  bool accumulate;
  int64_t n_rows;
  const ks_linear_args *lora; /* or NULL */
  bool backward;
} gemm_args;

/* ---------------------------------------------------------------- packing X */

/* (a0, b0, a1, b1, ...) */
KS_INLINE void gemm_interleave(ks_v a, ks_v b, ks_v *low, ks_v *high) {
  ks_ipart l, h;
  for (int j = 0; j < KS_PART_LANES; j++) {
    l[j] = j / 2 + j % 2 * KS_PART_LANES;
    h[j] = l[j] + KS_PART_LANES / 2;
  }
  ks_part out[2 * KS_PARTS];
  KS_EACH_PART(i) {
    out[2 * i] = __builtin_shuffle(a.p[i], b.p[i], l);
    out[2 * i + 1] = __builtin_shuffle(a.p[i], b.p[i], h);
  }
  KS_EACH_PART(i) {
    low->p[i] = out[i];
    high->p[i] = out[KS_PARTS + i];
  }
}

/* Round to nearest even to the upper half of each lane; NaN keeps its sign and becomes quiet. */
KS_INLINE ks_ipart gemm_round_bf16(ks_part x) {
  ks_ipart bits = (ks_ipart)x;
  ks_ipart rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
  ks_ipart nan = x != x;
  return (nan & (bits | 0x400000) & (int32_t)0xffff0000) | (~nan & rounded);
}

/* Up to 16 units of a row from x on, times s: 16 floats, or 32 as pairs of bf16. n: floats that are left. */
KS_INLINE ks_v gemm_load_units(const float *x, int64_t n, bool bf16, ks_v s) {
  ks_v a = ks_v_mul(ks_v_load_n(x, n), s);
  if (!bf16) return a;
  ks_v b = ks_v_mul(ks_v_load_n(x + KS_LANES, ks_max_i64(n - KS_LANES, 0)), s);
#if defined(__AVX512BF16__)
  return (ks_v){{(ks_part)_mm512_cvtne2ps_pbh(b.p[0], a.p[0])}};
#else
  ks_ipart even, odd;
  for (int j = 0; j < KS_PART_LANES; j++) {
    even[j] = 2 * j;
    odd[j] = 2 * j + 1;
  }
  ks_part all[2 * KS_PARTS];
  KS_EACH_PART(i) {
    all[i] = (ks_part)gemm_round_bf16(a.p[i]);
    all[KS_PARTS + i] = (ks_part)gemm_round_bf16(b.p[i]);
  }
  ks_v r;
  KS_EACH_PART(i) {
    ks_ipart e = (ks_ipart)__builtin_shuffle(all[2 * i], all[2 * i + 1], even);
    ks_ipart o = (ks_ipart)__builtin_shuffle(all[2 * i], all[2 * i + 1], odd);
    r.p[i] = (ks_part)(((e >> 16) & 0xffff) | o);
  }
  return r;
#endif
}

/* Rows 2i and 2i + 1 of x [n_rows, ldx], columns [0, n), times scale (times row_scale[row]) into pair i of
 * `a`. */
static void gemm_pack_rows(float *a, const float *x, int64_t ldx, int64_t n_rows, int64_t n, bool bf16,
                           float scale, const float *row_scale) {
  const int64_t step = bf16 ? 2 * KS_LANES : KS_LANES;
  for (int64_t i = 0; i < n_rows; i += 2, a += GEMM_PAIR) {
    bool two = i + 1 < n_rows;
    const float *x0 = x + i * ldx, *x1 = two ? x0 + ldx : x0;
    ks_v s0 = ks_v_set(row_scale ? scale * row_scale[i] : scale);
    ks_v s1 = ks_v_set(row_scale && two ? scale * row_scale[i + 1] : scale);
    float *out = a;
    for (int64_t j = 0; j < n; j += step, out += 2 * KS_LANES) {
      ks_v r0 = gemm_load_units(x0 + j, n - j, bf16, s0);
      ks_v r1 = two ? gemm_load_units(x1 + j, n - j, bf16, s1) : ks_v_zero();
      ks_v low, high;
      gemm_interleave(r0, r1, &low, &high);
      ks_v_store(out, low);
      ks_v_store(out + KS_LANES, high);
    }
  }
}

/* ---------------------------------------------------------------- blocks */

/* Rows of a tile when `n_rows` are cut into tiles of nearly equal size; even, so that tiles start at a pair.
 */
static int64_t gemm_tile_rows(int64_t n_rows) {
  int64_t n_tiles = (n_rows + GEMM_MR - 1) / GEMM_MR;
  int64_t rows = (n_rows + n_tiles - 1) / n_tiles;
  return rows + rows % 2;
}

typedef struct {
  float a[GEMM_MC / 2 * GEMM_PAIR]; /* a block of X */
  float u[GEMM_MC * GEMM_PAIR];     /* its rank-r factors, a pair at least for each term */
} gemm_scratch;

/* A tile of a rank-r term: C[row, row + n_rows) += u r. */
typedef struct {
  const float *u, *r;
  int64_t row, n_rows, rank;
} gemm_piece;

/* Cuts the terms that meet rows [row, row + n_rows) into tiles with packed, scaled u. */
static int gemm_pack_terms(const gemm_args *g, int64_t row, int64_t n_rows, float *packed,
                           gemm_piece *pieces) {
  const ks_linear_args *l = g->lora;
  int n = 0;
  for (int64_t s = 0; l && s < l->n_segments; s++) {
    const ks_segment *seg = &l->segments[s];
    int64_t begin = ks_max_i64(seg->row_begin, row),
            end = ks_min_i64(seg->row_begin + seg->n_rows, row + n_rows);
    if (seg->adapter < 0 || begin >= end) continue;
    const ks_lora *lora = &l->loras[seg->adapter];
    if (lora->rank == 0) continue;
    const float *u = g->backward ? l->v : l->u, *r = g->backward ? lora->a : lora->b_t;
    int64_t step = gemm_tile_rows(end - begin);
    for (int64_t first = begin; first < end; first += step) {
      int64_t rows = ks_min_i64(step, end - first);
      gemm_pack_rows(packed, u + first * l->u_stride, l->u_stride, rows, lora->rank, false,
                     g->backward ? 1 : lora->scale, NULL);
      pieces[n++] = (gemm_piece){packed, r, first, rows, lora->rank};
      packed += (rows + 1) / 2 * GEMM_PAIR;
    }
  }
  return n;
}

/* Rows [r0, r1) of the panels [p0, p1), in one thread. */
static void gemm_range(const gemm_args *g, int64_t r0, int64_t r1, int64_t p0, int64_t p1,
                       gemm_scratch *scratch) {
  const gemm_layout *b = g->b;
  const bool bf16 = b->dtype == KS_DTYPE_BF16;
  const int64_t unit_k = bf16 ? 2 : 1;
  const int64_t n_units = b->panel_units / GEMM_PANEL;
  const int64_t n_blocks = ks_max_i64((n_units + GEMM_KC - 1) / GEMM_KC, 1);
  const int64_t block_units = (n_units + n_blocks - 1) / n_blocks;
  const int64_t first_col = p0 * GEMM_PANEL, n_cols = ks_min_i64(p1 * GEMM_PANEL, b->n_cols) - first_col;
  gemm_piece pieces[GEMM_MC];
  for (int64_t row = r0; row < r1; row += GEMM_MC) {
    const int64_t rows = ks_min_i64(GEMM_MC, r1 - row);
    const int64_t tile_rows = gemm_tile_rows(rows);
    /* One tile sweeps all columns; several share each panel while it is in the first cache. */
    const int64_t step = tile_rows >= rows ? n_cols : GEMM_PANEL;
    int n_pieces = 0;
    for (int64_t block = 0; block < n_blocks; block++) {
      const int64_t unit = block * block_units, units = ks_min_i64(block_units, n_units - unit);
      const int64_t k = unit * unit_k;
      gemm_pack_rows(scratch->a, g->x + row * g->ldx + k, g->ldx, rows, ks_min_i64(units * unit_k, b->k - k),
                     bf16, 1, g->x_scale ? g->x_scale + row : NULL);
      const bool last = block == n_blocks - 1;
      if (last) n_pieces = gemm_pack_terms(g, row, rows, scratch->u, pieces);
      for (int64_t col = 0; col < n_cols; col += step) {
        const int64_t cols = ks_min_i64(step, n_cols - col);
        gemm_tile t = {.b = (const float *)b->data + (p0 + col / GEMM_PANEL) * b->panel_units +
                            unit * GEMM_PANEL,
                       .b_panel = b->panel_units,
                       .n_units = units,
                       .ldc = g->ldc,
                       .n_cols = cols,
                       .bias = block == 0 && g->bias ? g->bias + first_col + col : NULL,
                       .load_c = block > 0 || g->accumulate};
        float *c = g->c + first_col + col;
        for (int64_t i = 0; i < rows; i += tile_rows) {
          t.a = scratch->a + i / 2 * GEMM_PAIR;
          t.c = c + (row + i) * g->ldc;
          gemm_kernels[ks_min_i64(tile_rows, rows - i)][bf16 ? GEMM_PACKED_BF16 : GEMM_PACKED](&t);
        }
        for (int i = 0; last && i < n_pieces; i++) {
          const gemm_piece *p = &pieces[i];
          t.a = p->u;
          t.b = p->r + first_col + col;
          t.b_step = b->n_cols;
          t.n_units = p->rank;
          t.c = c + p->row * g->ldc;
          t.bias = NULL;
          t.load_c = true;
          gemm_kernels[p->n_rows][GEMM_PLAIN](&t);
        }
      }
    }
  }
}

/* ---------------------------------------------------------------- threads */

/* The part [*begin, *end) of n items, in multiples of `grain`, that falls to `part` of n_parts. */
KS_INLINE void gemm_split(int64_t n, int64_t grain, int part, int n_parts, int64_t *begin, int64_t *end) {
  int64_t n_grains = (n + grain - 1) / grain;
  *begin = ks_min_i64(n_grains * part / n_parts * grain, n);
  *end = ks_min_i64(n_grains * (part + 1) / n_parts * grain, n);
}

/* Teams split rows first, as every part of rows reads all of B, but keep two tiles of rows for a thread. */
static int gemm_row_parts(int64_t n_rows, int n_threads) {
  int parts = n_threads;
  while (parts > 1 && (n_threads % parts != 0 || n_rows < 2 * GEMM_MR * parts))
    parts--;
  return parts;
}

/* Rows of thread `thread`: those of its part of the product, shared out among the threads that split its
 * columns. */
static void gemm_row_share(int64_t n_rows, int thread, int n_threads, int64_t *begin, int64_t *end) {
  int row_parts = gemm_row_parts(n_rows, n_threads), col_parts = n_threads / row_parts;
  int64_t first, last;
  gemm_split(n_rows, 2, thread / col_parts, row_parts, &first, &last);
  gemm_split(last - first, 1, thread % col_parts, col_parts, begin, end);
  *begin += first;
  *end += first;
}

/* The part of the product that falls to thread `thread` of `n_threads`. */
static void gemm_run(const gemm_args *g, int thread, int n_threads, gemm_scratch *scratch) {
  int row_parts = gemm_row_parts(g->n_rows, n_threads), col_parts = n_threads / row_parts;
  int64_t r0, r1, p0, p1, n_panels = (g->b->n_cols + GEMM_PANEL - 1) / GEMM_PANEL;
  gemm_split(g->n_rows, 2, thread / col_parts, row_parts, &r0, &r1);
  gemm_split(n_panels, 1, thread % col_parts, col_parts, &p0, &p1);
  if (r0 < r1 && p0 < p1) gemm_range(g, r0, r1, p0, p1, scratch);
}

#endif
