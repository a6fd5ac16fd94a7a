/* Products: blocking and threads. Layouts and the order of operations: gemm_tile.h. */
#ifndef KS_CPU_GEMM_H
#define KS_CPU_GEMM_H

#include "kernels/cpu/lora_project.h"

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
  const ks_linear_args *lora; /* whose terms to add, or NULL */
  /* Whose u or v to make before that from the rows of X, when each thread has all columns of its rows; or
   * NULL. */
  const ks_linear_args *project;
  const dropout_mask *mask; /* of u, or NULL */
  bool backward;
} gemm_args;

typedef struct {
  float a[GEMM_MC / 2 * GEMM_PAIR]; /* a block of X */
  float u[GEMM_MC * GEMM_U_PAIR];   /* left factors of rank-r terms: at most a pair for each row */
  float ranks[LORA_MIXED * GEMM_KC * KS_LANES]; /* lora_block */
} gemm_scratch;

/* ---------------------------------------------------------------- blocks */

/* Rows of a tile when `n_rows` are cut into tiles of nearly equal size; even, so that tiles start at a pair.
 */
static int64_t gemm_tile_rows(int64_t n_rows) {
  int64_t n_tiles = (n_rows + GEMM_MR - 1) / GEMM_MR;
  int64_t rows = (n_rows + n_tiles - 1) / n_tiles;
  return rows + rows % 2;
}

/* The part of a rank-r term that falls into one tile of the product. */
typedef struct {
  const float *u, *r;
  int64_t tile, row, n_rows, rank; /* rows counted from the block's first */
} gemm_piece;

/* Rows [row, row + n_rows) of C in tiles of tile_rows: packs the left factors of all rank-r terms that meet
 * them. */
static int gemm_pack_terms(const gemm_args *g, int64_t row, int64_t n_rows, int64_t tile_rows, float *packed,
                           gemm_piece *pieces) {
  const ks_linear_args *l = g->lora;
  int n = 0;
  for (int64_t s = 0; l && s < l->n_segments; s++) {
    const ks_segment *seg = &l->segments[s];
    const ks_lora *lora = lora_of(l, seg);
    if (!lora) continue;
    const int64_t end = ks_min_i64(seg->row_begin + seg->n_rows - row, n_rows);
    for (int64_t i = ks_max_i64(seg->row_begin - row, 0), next; i < end; i = next) {
      next = ks_min_i64((i / tile_rows + 1) * tile_rows, end);
      const float *u = ks_in(g->backward ? l->v : l->u) + (row + i) * l->u_stride;
      gemm_pack_rows(packed, GEMM_U_PAIR,
                     &(gemm_rows){.x = u,
                                  .ldx = l->u_stride,
                                  .n_rows = next - i,
                                  .n = lora->rank,
                                  .scale = g->backward ? 1 : lora->scale});
      pieces[n++] =
          (gemm_piece){packed, g->backward ? lora->a : lora->b_t, i / tile_rows, i, next - i, lora->rank};
      packed += (next - i + 1) / 2 * GEMM_U_PAIR;
    }
  }
  return n;
}

/* One block of rows and one of k. */
typedef struct {
  const gemm_args *g;
  int64_t row, n_rows, tile_rows;
  int64_t unit, n_units;
  int64_t first_col, n_cols;
  gemm_scratch *scratch;
  gemm_piece pieces[GEMM_MC];
  int n_pieces; /* 0 but in the last block of k */
} gemm_block;

/* Columns [col, col + n_cols) of a block, which start at a panel. */
static void gemm_run_columns(const gemm_block *k, int64_t col, int64_t n_cols) {
  const gemm_args *g = k->g;
  const gemm_layout *b = g->b;
  const gemm_kind kind = b->dtype == KS_DTYPE_BF16 ? GEMM_BF16 : GEMM_F32;
  const gemm_piece *piece = k->pieces, *pieces_end = piece + k->n_pieces;
  gemm_tile t = {.b = (const float *)b->data + col / GEMM_PANEL * b->panel_units + k->unit * GEMM_PANEL,
                 .b_panel = b->panel_units,
                 .n_units = k->n_units,
                 .ldc = g->ldc,
                 .n_cols = n_cols,
                 .bias = k->unit == 0 && g->bias ? g->bias + col : NULL,
                 .load_c = k->unit > 0 || g->accumulate,
                 .next = b->panel_units,
                 .next_step = GEMM_PANEL * k->tile_rows / k->n_rows,
                 .ldr = b->n_cols};
  for (int64_t i = 0; i < k->n_rows; i += k->tile_rows) {
    const int64_t rows = ks_min_i64(k->tile_rows, k->n_rows - i), tile = i / k->tile_rows;
    float *c = g->c + (k->row + i) * g->ldc + col;
    t.a = k->scratch->a + i / 2 * GEMM_PAIR;
    t.c = c;
    /* A term that covers the tile goes on in its registers; smaller ones follow. */
    bool whole = piece < pieces_end && piece->tile == tile && piece->n_rows == rows;
    t.rank = whole ? piece->rank : 0;
    t.u = whole ? piece->u : NULL;
    t.r = whole ? piece->r + col : NULL;
    gemm_kernels[rows][kind](&t);
    piece += whole;
    for (; piece < pieces_end && piece->tile == tile; piece++) {
      gemm_tile term = {.c = c + (piece->row - i) * g->ldc,
                        .ldc = g->ldc,
                        .n_cols = n_cols,
                        .load_c = true,
                        .u = piece->u,
                        .r = piece->r + col,
                        .rank = piece->rank,
                        .ldr = b->n_cols};
      gemm_kernels[piece->n_rows][GEMM_TERM](&term);
    }
    t.next += t.n_units * t.next_step;
  }
}

/* u or v of the block's rows, from columns [col, col + n) of X. */
static void gemm_project(const gemm_block *k, int64_t col, int64_t n) {
  const gemm_args *g = k->g;
  for (int64_t c = col; c == col || c < col + n; c += GEMM_KC) {
    lora_block b = {.l = g->project,
                    .backward = g->backward,
                    .packed = k->scratch->a,
                    .row = k->row,
                    .n_rows = k->n_rows,
                    .col = c,
                    .k = ks_min_i64(GEMM_KC, col + n - c),
                    .n = g->b->k,
                    .ranks = k->scratch->ranks};
    const gemm_rows rows = {.x = g->x + k->row * g->ldx + c,
                            .ldx = g->ldx,
                            .n_rows = k->n_rows,
                            .n = b.k,
                            .scale = g->mask ? g->mask->keep : 1,
                            .mask = g->mask,
                            .mask_row = k->row,
                            .mask_col = c};
    gemm_pack_rows(k->scratch->a, GEMM_PAIR, &rows);
    lora_project_block(&b);
  }
}

static void gemm_run_block(gemm_block *k, bool last) {
  const gemm_args *g = k->g;
  const bool bf16 = g->b->dtype == KS_DTYPE_BF16;
  const int64_t col = k->unit * (bf16 ? 2 : 1), n = ks_min_i64(k->n_units * (bf16 ? 2 : 1), g->b->k - col);
  if (g->project) gemm_project(k, col, n);
  if (!g->project || g->mask || bf16) { /* else the rows are packed already */
    const gemm_rows rows = {.x = g->x + k->row * g->ldx + col,
                            .ldx = g->ldx,
                            .n_rows = k->n_rows,
                            .n = n,
                            .bf16 = bf16,
                            .scale = 1,
                            .row_scale = g->x_scale ? g->x_scale + k->row : NULL};
    gemm_pack_rows(k->scratch->a, GEMM_PAIR, &rows);
  }
  k->n_pieces = last ? gemm_pack_terms(g, k->row, k->n_rows, k->tile_rows, k->scratch->u, k->pieces) : 0;
  /* One tile sweeps all columns; several share each panel while it is near. */
  const int64_t step = k->tile_rows >= k->n_rows ? k->n_cols : GEMM_PANEL;
  for (int64_t c = 0; c < k->n_cols; c += step)
    gemm_run_columns(k, k->first_col + c, ks_min_i64(step, k->n_cols - c));
}

/* Rows [r0, r1) of the panels [p0, p1), in one thread. */
static void gemm_range(const gemm_args *g, int64_t r0, int64_t r1, int64_t p0, int64_t p1,
                       gemm_scratch *scratch) {
  const int64_t n_units = g->b->panel_units / GEMM_PANEL;
  const int64_t n_blocks = ks_max_i64((n_units + GEMM_KC - 1) / GEMM_KC, 1);
  const int64_t units = (n_units + n_blocks - 1) / n_blocks;
  gemm_block k = {.g = g, .first_col = p0 * GEMM_PANEL, .scratch = scratch};
  k.n_cols = ks_min_i64(p1 * GEMM_PANEL, g->b->n_cols) - k.first_col;
  const int64_t n_row_blocks = (r1 - r0 + GEMM_MC - 1) / GEMM_MC;
  int64_t rows = (r1 - r0 + n_row_blocks - 1) / n_row_blocks;
  rows += rows % 2;
  for (k.row = r0; k.row < r1; k.row += rows) {
    k.n_rows = ks_min_i64(rows, r1 - k.row);
    k.tile_rows = gemm_tile_rows(k.n_rows);
    for (int64_t i = 0; i < n_blocks; i++) {
      k.unit = i * units;
      k.n_units = ks_min_i64(units, n_units - k.unit);
      gemm_run_block(&k, i == n_blocks - 1);
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

/* How many parts the rows are cut into; the columns into n_threads / parts. Rows come first, as then the
 * factors of LoRA's terms are made and used in one thread; but every part of rows reads all of B, so parts
 * keep two tiles of rows, and whole blocks of rows where B is too large for the near caches. */
static int gemm_row_parts(const gemm_args *g, int n_threads) {
  const bool large = g->b && g->b->n_cols * g->b->k > 4 << 20 && g->b->n_cols >= 16 * GEMM_PANEL * n_threads;
  const int64_t rows = large ? GEMM_MC : 2 * GEMM_MR;
  int parts = n_threads;
  while (parts > 1 && (n_threads % parts != 0 || g->n_rows < rows * parts))
    parts--;
  return parts;
}

/* Rows of thread `thread`: those of its part of the product, shared out among the threads that split its
 * columns. */
static void gemm_row_share(const gemm_args *g, int thread, int n_threads, int64_t *begin, int64_t *end) {
  int row_parts = gemm_row_parts(g, n_threads), col_parts = n_threads / row_parts;
  int64_t first, last;
  gemm_split(g->n_rows, 2, thread / col_parts, row_parts, &first, &last);
  gemm_split(last - first, 1, thread % col_parts, col_parts, begin, end);
  *begin += first;
  *end += first;
}

/* The part of the product that falls to thread `thread` of `n_threads`. */
static void gemm_run(const gemm_args *g, int thread, int n_threads, gemm_scratch *scratch) {
  int row_parts = gemm_row_parts(g, n_threads), col_parts = n_threads / row_parts;
  int64_t r0, r1, p0, p1, n_panels = (g->b->n_cols + GEMM_PANEL - 1) / GEMM_PANEL;
  gemm_split(g->n_rows, 2, thread / col_parts, row_parts, &r0, &r1);
  gemm_split(n_panels, 1, thread % col_parts, col_parts, &p0, &p1);
  if (r0 < r1 && p0 < p1) gemm_range(g, r0, r1, p0, p1, scratch);
}

#endif
