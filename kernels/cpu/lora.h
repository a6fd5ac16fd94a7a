/* The rank-r products of LoRA, whose shapes general products are bad at:
 *   lora_project   u = scale * x A^T   [rows, n] -> [rows, rank]: two rows by eight ranks in the lanes
 *   lora_gradient  G += (scale * u)^T y   [rows, rank], [rows, n] -> [rank, n]: ranks by columns in registers
 * and dropout, whose mask is made anew wherever it is needed. */
#ifndef KS_CPU_LORA_H
#define KS_CPU_LORA_H

#include "kernels/cpu/gemm.h"
#include <math.h>

enum {
  LORA_GROUP = 8,    /* ranks in the lanes */
  LORA_GROUPS = 8,   /* groups packed at a time */
  LORA_KC = GEMM_KC, /* a multiple of LORA_DROP */
  LORA_DROP = 64,    /* columns whose mask comes from 16 Philox blocks */
  LORA_ROWS = 256,   /* rows of u packed at a time for gradients */
#if KS_PART_LANES == 16
  LORA_PAIRS = 12, /* pairs of rows in a tile of lora_project */
  LORA_RANKS = 8,
  LORA_VECTORS = 3, /* tile of lora_gradient */
#elif defined(__aarch64__)
  LORA_PAIRS = 5,
  LORA_RANKS = 4,
  LORA_VECTORS = 1,
#elif KS_PART_LANES == 8
  LORA_PAIRS = 5,
  LORA_RANKS = 4,
  LORA_VECTORS = 1,
#else
  LORA_PAIRS = 2,
  LORA_RANKS = 2,
  LORA_VECTORS = 1,
#endif
};
_Static_assert(LORA_KC % LORA_DROP == 0, "blocks of columns hold whole groups of the mask");

typedef struct {
  gemm_scratch gemm;
  float a[LORA_GROUPS * LORA_KC * KS_LANES]; /* packed ranks */
  float x[GEMM_MC * LORA_KC];                /* rows after dropout; products before it */
  float u[LORA_ROWS * LORA_GROUP];
} lora_scratch;

/* ---------------------------------------------------------------- dropout */

typedef uint64_t lora_wide __attribute__((vector_size(KS_PART_LANES * 4)));

/* The lower halves of a's lanes times m. */
KS_INLINE lora_wide lora_mul(lora_wide a, uint32_t m) {
#if KS_PART_LANES == 16
  return (lora_wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif KS_PART_LANES == 8
  return (lora_wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  return (lora_wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

/* ks_philox of a counter in the lower half of each lane; the upper halves of the words are garbage. */
KS_INLINE void lora_philox(uint64_t key, uint64_t hi, lora_wide lo, lora_wide word[4]) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  lora_wide c0 = lo, c1 = lo >> 32, c2 = hi - (lora_wide){0}, c3 = (hi >> 32) - (lora_wide){0};
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    lora_wide p0 = lora_mul(c0, 0xD2511F53u), p1 = lora_mul(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

typedef struct {
  uint64_t key, site;
  uint32_t threshold; /* words below it drop */
  float keep;         /* 1 / (1 - p) */
  int64_t blocks_a_row;
} lora_dropout;

static lora_dropout lora_dropout_of(const ks_linear_args *a, const ks_segment *seg) {
  return (lora_dropout){.key = seg->dropout_key,
                        .site = a->dropout_site,
                        .threshold = (uint32_t)ceil((double)a->dropout * 0x1p32),
                        .keep = (float)(1 / (1 - (double)a->dropout)),
                        .blocks_a_row = (a->w->n_in + LORA_DROP - 1) / LORA_DROP * KS_LANES};
}

/* Factors (0 or 1 / (1 - p)) of columns [col, col + 64) of a row of the segment; col is a multiple of 64. */
KS_INLINE void lora_mask(const lora_dropout *d, int64_t row, int64_t col, ks_v factor[4]) {
  uint64_t first = (uint64_t)(row * d->blocks_a_row + col / LORA_DROP * KS_LANES);
  ks_ipart threshold =
      (ks_ipart){0} + (int32_t)(d->threshold ^ 0x80000000u); /* signed comparison of unsigned words */
  KS_EACH_PART(i) {
    lora_wide even, word_even[4], word_odd[4];
    for (int j = 0; j < KS_PART_LANES / 2; j++)
      even[j] = first + (uint64_t)(i * KS_PART_LANES + 2 * j);
    lora_philox(d->key, d->site, even, word_even);
    lora_philox(d->key, d->site, even + 1, word_odd);
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
      ks_ipart word = (ks_ipart)((word_even[w] & 0xffffffffu) | word_odd[w] << 32);
      ks_ipart kept = (word ^ INT32_MIN) >= threshold;
      ks_part keep = d->keep - (ks_part){0};
      factor[w].p[i] = (ks_part)(kept & (ks_ipart)keep);
    }
  }
}

/* out[i, j] = x[i, j] * factor(row + i, col + j) (+ out when add) for n_rows x n_cols; col is a multiple
 * of 64. */
static void lora_drop(const lora_dropout *d, int64_t row, int64_t col, int64_t n_rows, int64_t n_cols,
                      const float *x, int64_t ldx, float *out, int64_t ldo, bool add) {
  for (int64_t i = 0; i < n_rows; i++)
    for (int64_t j = 0; j < n_cols; j += LORA_DROP) {
      ks_v factor[4];
      lora_mask(d, row + i, col + j, factor);
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) {
        int64_t at = j + w * KS_LANES, left = n_cols - at;
        if (left <= 0) break;
        ks_v r = ks_v_mul(ks_v_load_n(x + i * ldx + at, left), factor[w]);
        float *o = out + i * ldo + at;
        if (add) r = ks_v_add(ks_v_load_n(o, left), r);
        ks_v_store_n(o, r, left);
      }
    }
}

/* ---------------------------------------------------------------- u = scale * x A^T */

/* (x0, x1, x0, x1, ...) */
KS_INLINE ks_v lora_load_pair(const float *x) {
  double pair;
  memcpy(&pair, x, sizeof pair);
  ks_v r;
  KS_EACH_PART(i)
#if KS_PART_LANES == 16
  r.p[i] = (ks_part)_mm512_set1_pd(pair);
#elif KS_PART_LANES == 8
  r.p[i] = (ks_part)_mm256_set1_pd(pair);
#else
  r.p[i] = (ks_part){x[0], x[1], x[0], x[1]};
#endif
  return r;
}

typedef struct {
  float *u; /* first row and rank of the tile */
  int64_t ldu, n_ranks;
  bool load, second; /* the last pair has a second row */
  float scale;
} lora_tile_out;

/* Lanes 2j and 2j + 1 hold rank j of the pair's two rows. */
KS_INLINE void lora_project_tile(const int pairs, const float *x, const float *a, int64_t k,
                                 const lora_tile_out *o) {
  ks_part acc[LORA_PAIRS][KS_PARTS];
#pragma GCC unroll 16
  for (int p = 0; p < pairs; p++) {
    ks_v start = ks_v_zero();
    if (o->load) {
      const float *u = o->u + 2 * p * o->ldu;
      ks_v high, first = ks_v_load_n(u, o->n_ranks);
      ks_v next = p < pairs - 1 || o->second ? ks_v_load_n(u + o->ldu, o->n_ranks) : ks_v_zero();
      gemm_interleave(first, next, &start, &high);
    }
    KS_EACH_PART(i) acc[p][i] = start.p[i];
  }
  for (; k > 0; k--, x += 2, a += KS_LANES) {
    ks_v row = ks_v_load(a);
#pragma GCC unroll 16
    for (int p = 0; p < pairs; p++) {
      ks_v pair = lora_load_pair(x + p * GEMM_PAIR);
      KS_EACH_PART(i) acc[p][i] = ks_part_fma(pair.p[i], row.p[i], acc[p][i]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < pairs; p++) {
    float lanes[KS_LANES], *u = o->u + 2 * p * o->ldu;
    ks_v out;
    KS_EACH_PART(i) out.p[i] = acc[p][i];
    ks_v_store(lanes, ks_v_mul(out, ks_v_set(o->scale)));
    bool second = p < pairs - 1 || o->second;
    for (int64_t r = 0; r < o->n_ranks; r++) {
      u[r] = lanes[2 * r];
      if (second) u[o->ldu + r] = lanes[2 * r + 1];
    }
  }
}

static void lora_project_pairs(int64_t pairs, const float *x, const float *a, int64_t k,
                               const lora_tile_out *o) {
  switch (pairs) {
#define LORA_CASE(n)                                                                                         \
  case n:                                                                                                    \
    lora_project_tile(n <= LORA_PAIRS ? n : LORA_PAIRS, x, a, k, o);                                         \
    break;
    LORA_CASE(1)
    LORA_CASE(2)
    LORA_CASE(3)
    LORA_CASE(4)
    LORA_CASE(5)
    LORA_CASE(6)
    LORA_CASE(7)
    LORA_CASE(8)
    LORA_CASE(9)
    LORA_CASE(10)
    LORA_CASE(11)
    LORA_CASE(12)
#undef LORA_CASE
  default:
    KS_ASSERT_EQ(pairs, LORA_PAIRS);
  }
}

/* Ranks [first, rank) of columns [col, col + k) of a [rank, n] into groups: [group][k][8 ranks, each twice].
 */
static void lora_pack_ranks(float *packed, const float *a, int64_t n, int64_t first, int64_t rank,
                            int64_t col, int64_t k) {
  for (int64_t r = 0; r < (rank - first + LORA_GROUP - 1) / LORA_GROUP * LORA_GROUP; r++) {
    float *out = packed + r / LORA_GROUP * LORA_KC * KS_LANES + r % LORA_GROUP * 2;
    const float *row = first + r < rank ? a + (first + r) * n + col : NULL;
    for (int64_t j = 0; j < k; j++)
      out[j * KS_LANES] = out[j * KS_LANES + 1] = row ? row[j] : 0;
  }
}

/* Rows [begin, end) of a product of n columns; `a` [rank, n], both counted from row 0 of x and u. */
typedef struct {
  const float *x, *a;
  float *u;
  int64_t n, ldu, begin, end, rank;
  float scale;
  const lora_dropout *dropout; /* or NULL */
  int64_t segment_begin;
} lora_projection;

static void lora_project_block(const lora_projection *l, int64_t rank0, int64_t col, int64_t row,
                               lora_scratch *s) {
  const int64_t k = ks_min_i64(LORA_KC, l->n - col), rows = ks_min_i64(GEMM_MC, l->end - row);
  const float *x = l->x + row * l->n + col;
  int64_t ldx = l->n;
  if (l->dropout) {
    lora_drop(l->dropout, row - l->segment_begin, col, rows, k, x, ldx, s->x, LORA_KC, false);
    x = s->x;
    ldx = LORA_KC;
  }
  gemm_pack_rows(s->gemm.a, x, ldx, rows, k, false, 1, NULL);
  for (int64_t r = rank0; r < ks_min_i64(l->rank, rank0 + LORA_GROUP * LORA_GROUPS); r += LORA_GROUP) {
    const float *a = s->a + (r - rank0) / LORA_GROUP * LORA_KC * KS_LANES;
    for (int64_t i = 0; i < rows; i += 2 * LORA_PAIRS) {
      int64_t left = ks_min_i64(2 * LORA_PAIRS, rows - i);
      lora_tile_out out = {.u = l->u + (row + i) * l->ldu + r,
                           .ldu = l->ldu,
                           .n_ranks = ks_min_i64(LORA_GROUP, l->rank - r),
                           .load = col > 0,
                           .second = left % 2 == 0,
                           .scale = col + k == l->n ? l->scale : 1};
      lora_project_pairs((left + 1) / 2, s->gemm.a + i / 2 * GEMM_PAIR, a, k, &out);
    }
  }
}

static void lora_project(const lora_projection *l, lora_scratch *s) {
  if (l->begin >= l->end) return;
  for (int64_t rank0 = 0; rank0 < l->rank; rank0 += LORA_GROUP * LORA_GROUPS)
    for (int64_t col = 0; col == 0 || col < l->n; col += LORA_KC) {
      int64_t ranks = ks_min_i64(l->rank, rank0 + LORA_GROUP * LORA_GROUPS);
      lora_pack_ranks(s->a, l->a, l->n, rank0, ranks, col, ks_min_i64(LORA_KC, l->n - col));
      for (int64_t row = l->begin; row < l->end; row += GEMM_MC)
        lora_project_block(l, rank0, col, row, s);
    }
}

/* ---------------------------------------------------------------- G += (scale * u)^T y */

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
  const lora_dropout *dropout;
} lora_gradient_args;

static void lora_gradient_rows(const lora_gradient_args *l, int64_t row, int64_t n_rows, int64_t begin,
                               int64_t end, lora_scratch *s) {
  const float *y = l->y + row * l->n + begin;
  int64_t ldy = l->n;
  if (l->dropout) {
    lora_drop(l->dropout, row, begin, n_rows, end - begin, y, ldy, s->x, LORA_KC, false);
    y = s->x;
    ldy = LORA_KC;
  }
  for (int64_t r = 0; r < l->rank; r += LORA_GROUP) {
    int64_t ranks = ks_min_i64(LORA_GROUP, l->rank - r);
    for (int64_t i = 0; i < n_rows; i++)
      for (int64_t j = 0; j < ranks; j++)
        s->u[i * LORA_GROUP + j] = l->scale * l->u[(row + i) * l->ldu + r + j];
    lora_gradient_columns(l->g + r * l->n + begin, l->n, ranks, s->u, y, ldy, n_rows, end - begin);
  }
}

static void lora_gradient(const lora_gradient_args *l, lora_scratch *s) {
  const int64_t row_step = l->dropout ? GEMM_MC : LORA_ROWS, col_step = l->dropout ? LORA_KC : l->n;
  for (int64_t row = 0; row < l->n_rows; row += row_step)
    for (int64_t col = l->begin; col < l->end; col += col_step)
      lora_gradient_rows(l, row, ks_min_i64(row_step, l->n_rows - row), col,
                         ks_min_i64(col + col_step, l->end), s);
}

#endif
