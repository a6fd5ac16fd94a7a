/* Small dense products for attention and similarity, on matrices that lie where they lie.
 *
 *   c[i, j] = (0, c[i, j] or c[i, j] * row_scale[i]) + sum over k of a(i, k) * b[k, j]
 *   a(i, k) = a[i * a_row + k * a_col]
 *
 * Every element of c is one fma chain over k in rising order, whatever the shape: splitting m, n or (with
 * accumulate) the depth changes no bit. Vectors run over j, so b has unit stride there; where it has not,
 * tile_transpose makes it so. */
#ifndef KS_CPU_TILE_H
#define KS_CPU_TILE_H

#include "kernels/cpu/cpu.h"

/* The accumulators of a block are up to TILE_ROWS * TILE_VECS vectors, of a narrow one (fewer vectors) up to
 * TILE_MAX_ROWS rows; they and one row of b fit the registers. */
#if defined(__AVX512F__)
enum { TILE_ROWS = 6, TILE_VECS = 4, TILE_MAX_ROWS = 12 };
#elif defined(__AVX2__) || defined(__aarch64__)
enum { TILE_ROWS = 6, TILE_VECS = 1, TILE_MAX_ROWS = 6 };
#else
enum { TILE_ROWS = 2, TILE_VECS = 1, TILE_MAX_ROWS = 2 };
#endif

typedef struct {
  const float *a;
  int64_t a_row, a_col;
  const float *b;
  int64_t b_row;
  float *c;
  int64_t c_row;
  int64_t m, n, depth;
  bool accumulate;
  const float *row_scale; /* NULL, or [m] with accumulate */
  /* NULL, or [m] never falling from depth on: row i goes on to its own depth. */
  const int64_t *row_depth;
} tile_args;

/* One block of `rows` rows and `vecs` vectors at t->a, t->b, t->c; the last vector holds `last` columns. */
KS_INLINE void tile_block(const tile_args *t, int rows, int vecs, int64_t last) {
  const float *a = t->a, *b = t->b;
  const int64_t a_row = t->a_row, a_col = t->a_col, b_row = t->b_row, c_row = t->c_row;
  ks_v acc[TILE_MAX_ROWS][TILE_VECS];
#if defined(__AVX512F__)
  const __mmask16 mask = ks_tail_mask(last);
#define TILE_LOAD_LAST(x) ((ks_v){{_mm512_maskz_loadu_ps(mask, x)}})
#else
#define TILE_LOAD_LAST(x) ks_v_load_n(x, last)
#endif
#define TILE_LOAD(v, x) ((v) == vecs - 1 ? TILE_LOAD_LAST(x) : ks_v_load(x))
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++)
      acc[r][v] = t->accumulate ? TILE_LOAD(v, t->c + r * c_row + v * KS_LANES) : ks_v_zero();
  if (t->row_scale)
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vecs; v++)
        acc[r][v] = ks_v_mul(acc[r][v], ks_v_set(t->row_scale[r]));
  for (int64_t k = 0; k < t->depth; k++) {
    ks_v row[TILE_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++)
      row[v] = TILE_LOAD(v, b + v * KS_LANES);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      ks_v x = ks_v_set(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; v++)
        acc[r][v] = ks_v_fma(x, row[v], acc[r][v]);
    }
    a += a_col;
    b += b_row;
  }
  if (t->row_depth)
    for (int64_t k = t->depth; k < t->row_depth[rows - 1]; k++) {
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        if (k >= t->row_depth[r]) continue;
        ks_v x = ks_v_set(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
          acc[r][v] = ks_v_fma(x, TILE_LOAD(v, b + v * KS_LANES), acc[r][v]);
      }
      a += a_col;
      b += b_row;
    }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++)
      ks_v_store_n(t->c + r * c_row + v * KS_LANES, acc[r][v], v == vecs - 1 ? last : KS_LANES);
#undef TILE_LOAD
#undef TILE_LOAD_LAST
}

typedef void (*tile_block_fn)(const tile_args *t, int64_t last);
#define TILE_BLOCK(rows, vecs)                                                                               \
  static void tile_block_##rows##_##vecs(const tile_args *t, int64_t last) {                                 \
    tile_block(t, rows, vecs, last);                                                                         \
  }
#if defined(__AVX512F__)
#define TILE_BLOCKS(rows) TILE_BLOCK(rows, 1) TILE_BLOCK(rows, 2) TILE_BLOCK(rows, 3) TILE_BLOCK(rows, 4)
#define TILE_TABLE(rows)                                                                                     \
  { tile_block_##rows##_1, tile_block_##rows##_2, tile_block_##rows##_3, tile_block_##rows##_4 }
TILE_BLOCK(12, 1)
TILE_BLOCK(12, 2)
TILE_BLOCK(8, 3)
static const int64_t tile_most_rows[TILE_VECS] = {12, 12, 8, 6};
static const tile_block_fn tile_most[TILE_VECS] = {tile_block_12_1, tile_block_12_2, tile_block_8_3, NULL};
#else
/* With tails copied byte by byte it pays to have the full vector apart. */
#define TILE_BLOCKS(rows)                                                                                    \
  static void tile_block_##rows##_1(const tile_args *t, int64_t last) {                                      \
    if (last == KS_LANES)                                                                                    \
      tile_block(t, rows, 1, KS_LANES);                                                                      \
    else                                                                                                     \
      tile_block(t, rows, 1, last);                                                                          \
  }
#define TILE_TABLE(rows)                                                                                     \
  { tile_block_##rows##_1 }
static const int64_t tile_most_rows[TILE_VECS] = {TILE_ROWS};
static const tile_block_fn tile_most[TILE_VECS] = {NULL};
#endif
TILE_BLOCKS(1)
TILE_BLOCKS(2)
#if defined(__AVX2__) || defined(__aarch64__)
TILE_BLOCKS(3)
TILE_BLOCKS(4)
TILE_BLOCKS(5)
TILE_BLOCKS(6)
#endif
static const tile_block_fn tile_blocks[TILE_ROWS][TILE_VECS] = {TILE_TABLE(1), TILE_TABLE(2),
#if defined(__AVX2__) || defined(__aarch64__)
                                                                TILE_TABLE(3), TILE_TABLE(4), TILE_TABLE(5),
                                                                TILE_TABLE(6)
#endif
};

static void tile_product(tile_args t) {
  const tile_args whole = t;
  for (int64_t j = 0; j < whole.n; j += TILE_VECS * KS_LANES) {
    int64_t cols = ks_min_i64(whole.n - j, TILE_VECS * KS_LANES);
    int64_t vecs = (cols + KS_LANES - 1) / KS_LANES, last = cols - (vecs - 1) * KS_LANES;
    t.b = whole.b + j;
    for (int64_t i = 0; i < whole.m;) {
      const bool most = tile_most[vecs - 1] && whole.m - i >= tile_most_rows[vecs - 1];
      int64_t rows = most ? tile_most_rows[vecs - 1] : ks_min_i64(whole.m - i, TILE_ROWS);
      t.a = whole.a + i * whole.a_row;
      t.c = whole.c + i * whole.c_row + j;
      t.row_scale = whole.row_scale ? whole.row_scale + i : NULL;
      t.row_depth = whole.row_depth ? whole.row_depth + i : NULL;
      (most ? tile_most[vecs - 1] : tile_blocks[rows - 1][vecs - 1])(&t, last);
      i += rows;
    }
  }
}

/* ---------------------------------------------------------------- transposition */

#if defined(__AVX512F__)
/* b[c][r] = x[r, c] for a 16 x 16 block of which only `rows` and `cols` are read; the rest is 0. */
KS_INLINE void tile_transpose_registers(const float *x, int64_t x_row, int64_t rows, int64_t cols,
                                        __m512 b[16]) {
  __m512 a[16];
  const __mmask16 mask = ks_tail_mask(cols);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    a[r] = r < rows ? _mm512_maskz_loadu_ps(mask, x + r * x_row) : _mm512_setzero_ps();
#pragma GCC unroll 12
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512d lo = _mm512_castps_pd(b[r + h]), hi = _mm512_castps_pd(b[r + 2 + h]);
      a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  /* a[4 g + c] now holds, in its quarter q, column 4 q + c of rows 4 g .. 4 g + 3. */
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    __m512 s0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), s1 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    __m512 t0 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    __m512 t1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    b[c] = _mm512_shuffle_f32x4(s0, t0, 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(s0, t0, 0xdd);
    b[4 + c] = _mm512_shuffle_f32x4(s1, t1, 0x88);
    b[12 + c] = _mm512_shuffle_f32x4(s1, t1, 0xdd);
  }
}
KS_INLINE void tile_transpose_block(const float *x, int64_t x_row, int64_t rows, int64_t cols, float *out,
                                    int64_t out_row) {
  __m512 b[16];
  tile_transpose_registers(x, x_row, rows, cols, b);
#pragma GCC unroll 16
  for (int c = 0; c < 16; c++)
    if (c < cols) _mm512_storeu_ps(out + c * out_row, b[c]);
}
#elif defined(__AVX2__)
KS_INLINE void tile_transpose_8(const float *x, int64_t x_row, float *out, int64_t out_row) {
  __m256 a[8], b[8];
#pragma GCC unroll 12
  for (int r = 0; r < 8; r++)
    a[r] = _mm256_loadu_ps(x + r * x_row);
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(out + c * out_row, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * out_row, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
KS_INLINE void tile_transpose_block(const float *x, int64_t x_row, int64_t rows, int64_t cols, float *out,
                                    int64_t out_row) {
  if (rows >= 16 && cols >= 16) {
    for (int r = 0; r < 16; r += 8)
      for (int c = 0; c < 16; c += 8)
        tile_transpose_8(x + r * x_row + c, x_row, out + c * out_row + r, out_row);
    return;
  }
  for (int64_t c = 0; c < cols; c++)
    for (int64_t r = 0; r < 16; r++)
      out[c * out_row + r] = r < rows ? x[r * x_row + c] : 0.0f;
}
#else
KS_INLINE void tile_transpose_block(const float *x, int64_t x_row, int64_t rows, int64_t cols, float *out,
                                    int64_t out_row) {
  for (int64_t c = 0; c < cols; c++)
    for (int64_t r = 0; r < 16; r++)
      out[c * out_row + r] = r < rows ? x[r * x_row + c] : 0.0f;
}
#endif

/* out[c, r] = x[r, c] for r < rows, c < cols; rows up to the next multiple of 16 are filled with zeros. */
static void tile_transpose(const float *x, int64_t x_row, int64_t rows, int64_t cols, float *out,
                           int64_t out_row) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < cols; c += 16) {
      int64_t n_rows = ks_min_i64(rows - r, 16), n_cols = ks_min_i64(cols - c, 16);
      const float *from = x + r * x_row + c;
      float *to = out + c * out_row + r;
      if (n_rows == 16 && n_cols == 16)
        tile_transpose_block(from, x_row, 16, 16, to, out_row);
      else
        tile_transpose_block(from, x_row, n_rows, n_cols, to, out_row);
    }
}

enum { TILE_DOTS = 32, TILE_DOTS_COLS = 128 };

/* out[r] = sum over c of x[r, c] * q[c] for up to TILE_DOTS rows, an fma chain over c in rising order. Rows
 * go through a buffer, for in x rows at a distance of a power of two would drive each other out of the cache.
 */
#if defined(__AVX512F__)
static void tile_dots(const float *x, int64_t x_row, int64_t rows, int64_t cols, const float *q, float *out) {
  enum { ROW = TILE_DOTS_COLS + KS_LANES };
  float buffer[TILE_DOTS * ROW] __attribute__((aligned(64)));
  __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}; /* two chains hide the latency of one */
  for (int64_t c0 = 0; c0 < cols; c0 += TILE_DOTS_COLS) {
    const int64_t n = ks_min_i64(cols - c0, TILE_DOTS_COLS);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < n; c += KS_LANES)
        ks_v_store(buffer + r * ROW + c, ks_v_load_n(x + r * x_row + c0 + c, n - c));
    for (int64_t c = 0; c < n; c += KS_LANES)
      for (int h = 0; h < 2; h++) {
        __m512 b[16];
        for (int r = 0; r < 16; r++) /* spread out, so that memory works while we do */
          __builtin_prefetch(x + (TILE_DOTS + 16 * h + r) * x_row + c0 + c);
        tile_transpose_registers(buffer + 16 * h * ROW + c, ROW, 16, 16, b);
        const int64_t whole = ks_min_i64(n - c, 16);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          if (i < whole) acc[h] = _mm512_fmadd_ps(b[i], _mm512_set1_ps(q[c0 + c + i]), acc[h]);
      }
  }
  for (int h = 0; h < 2 && 16 * h < rows; h++)
    ks_v_store_n(out + 16 * h, (ks_v){{acc[h]}}, rows - 16 * h);
}
#else
static void tile_dots(const float *x, int64_t x_row, int64_t rows, int64_t cols, const float *q, float *out) {
  float columns[TILE_DOTS_COLS * TILE_DOTS], sum[TILE_DOTS] = {0};
  for (int64_t c = 0; c < cols; c += TILE_DOTS_COLS) {
    const int64_t n = ks_min_i64(cols - c, TILE_DOTS_COLS);
    tile_transpose(x + c, x_row, rows, n, columns, TILE_DOTS);
    tile_product((tile_args){.a = q + c,
                             .a_col = 1,
                             .b = columns,
                             .b_row = TILE_DOTS,
                             .c = sum,
                             .m = 1,
                             .n = rows,
                             .depth = n,
                             .accumulate = true});
  }
  memcpy(out, sum, (size_t)rows * sizeof *out);
}
#endif

#endif
