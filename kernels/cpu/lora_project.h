/* LoRA's narrow products u = x A^T and v = scale * dy B, from packed rows of x or dy. General products waste
 * most of the machine on eight columns; here the lanes hold eight ranks of two rows, which may belong to
 * different adapters, so that a batch of single rows, each with its own adapter, runs as well as one long
 * segment. */
#ifndef KS_CPU_LORA_PROJECT_H
#define KS_CPU_LORA_PROJECT_H

#include "kernels/cpu/gemm_pack.h"

enum {
  LORA_GROUP = 8, /* ranks in the lanes */
  LORA_MIXED = 4, /* pairs of rows with adapters of their own taken at a time */
#if KS_PART_LANES == 16
  LORA_PAIRS = 12, /* pairs of rows in a tile */
#elif KS_PART_LANES == 8 || defined(__aarch64__)
  LORA_PAIRS = 5,
#else
  LORA_PAIRS = 2,
#endif
};

/* The adapter of a segment, or NULL. */
KS_INLINE const ks_lora *lora_of(const ks_linear_args *a, const ks_segment *seg) {
  if (seg->adapter < 0 || seg->n_rows == 0) return NULL;
  const ks_lora *l = &a->loras[seg->adapter];
  return l->rank > 0 ? l : NULL;
}

/* ---------------------------------------------------------------- tiles */

/* (x0, x1, x0, x1, ...) */
KS_INLINE ks_v lora_load_pair(const float *x) {
  ks_v r;
#if KS_PART_LANES == 4
  KS_EACH_PART(i) r.p[i] = (ks_part){x[0], x[1], x[0], x[1]};
#else
  double pair;
  memcpy(&pair, x, sizeof pair);
  KS_EACH_PART(i)
#if KS_PART_LANES == 16
  r.p[i] = (ks_part)_mm512_set1_pd(pair);
#else
  r.p[i] = (ks_part)_mm256_set1_pd(pair);
#endif
#endif
  return r;
}

typedef struct {
  const float *x; /* packed pairs of rows */
  const float *a; /* packed ranks: [k][rank of the first row, of the second, next rank ...] */
  int64_t a_pair; /* floats from the ranks of one pair to those of the next; 0: all the same */
  int64_t k;
  float *u; /* first row and rank */
  int64_t ldu;
  bool load;
  int64_t n_ranks[2 * LORA_PAIRS]; /* of each row: 0 .. LORA_GROUP */
  float scale[2 * LORA_PAIRS];
} lora_tile;

KS_INLINE void lora_tile_run(const int pairs, const bool mixed, const lora_tile *t) {
  ks_part acc[LORA_PAIRS][KS_PARTS];
#pragma GCC unroll 16
  for (int p = 0; p < pairs; p++) {
    ks_v start = ks_v_zero(), high;
    const float *u = t->u + 2 * p * t->ldu;
    if (t->load)
      gemm_interleave(ks_v_load_n(u, t->n_ranks[2 * p]), ks_v_load_n(u + t->ldu, t->n_ranks[2 * p + 1]),
                      &start, &high);
    KS_EACH_PART(i) acc[p][i] = start.p[i];
  }
  const float *x = t->x, *a = t->a;
  const int64_t a_pair = mixed ? t->a_pair : 0;
  for (int64_t k = t->k; k > 0; k--, x += 2, a += KS_LANES) {
    ks_v ranks = ks_v_load(a);
#pragma GCC unroll 16
    for (int p = 0; p < pairs; p++) {
      ks_v pair = lora_load_pair(x + p * GEMM_PAIR);
      if (mixed && p > 0) ranks = ks_v_load(a + p * a_pair);
      KS_EACH_PART(i) acc[p][i] = ks_part_fma(pair.p[i], ranks.p[i], acc[p][i]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < pairs; p++) {
    float lanes[KS_LANES];
    ks_v out;
    KS_EACH_PART(i) out.p[i] = acc[p][i];
    ks_v_store(lanes, out);
    for (int h = 0; h < 2; h++)
      for (int64_t r = 0; r < t->n_ranks[2 * p + h]; r++)
        t->u[(2 * p + h) * t->ldu + r] = lanes[2 * r + h] * t->scale[2 * p + h];
  }
}

#define LORA_FUNCTION(n)                                                                                     \
  static void lora_tile_##n(const lora_tile *t) {                                                            \
    lora_tile_run(n, false, t);                                                                              \
  }
#define LORA_MIXED_FUNCTION(n)                                                                               \
  static void lora_tile_mixed_##n(const lora_tile *t) {                                                      \
    lora_tile_run(n, true, t);                                                                               \
  }
typedef void (*lora_kernel)(const lora_tile *t);
#define LORA_ENTRY(n)       [n] = lora_tile_##n,
#define LORA_MIXED_ENTRY(n) [n] = lora_tile_mixed_##n,
#if KS_PART_LANES == 16
#define LORA_FOR_PAIRS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define LORA_FOR_MIXED(X) X(1) X(2) X(3) X(4)
#elif KS_PART_LANES == 8 || defined(__aarch64__)
#define LORA_FOR_PAIRS(X) X(1) X(2) X(3) X(4) X(5)
#define LORA_FOR_MIXED(X) X(1) X(2) X(3) X(4)
#else
#define LORA_FOR_PAIRS(X) X(1) X(2)
#define LORA_FOR_MIXED(X) X(1) X(2)
#endif
LORA_FOR_PAIRS(LORA_FUNCTION)
LORA_FOR_MIXED(LORA_MIXED_FUNCTION)
static const lora_kernel lora_kernels[LORA_PAIRS + 1] = {LORA_FOR_PAIRS(LORA_ENTRY)};
static const lora_kernel lora_mixed_kernels[LORA_MIXED + 1] = {LORA_FOR_MIXED(LORA_MIXED_ENTRY)};
#undef LORA_FUNCTION
#undef LORA_MIXED_FUNCTION
#undef LORA_ENTRY
#undef LORA_MIXED_ENTRY
#undef LORA_FOR_PAIRS
#undef LORA_FOR_MIXED

/* ---------------------------------------------------------------- blocks of rows */

typedef struct {
  const ks_linear_args *l;
  bool backward;       /* v = scale * dy B_l instead of u = x A^T */
  const float *packed; /* rows [row, row + n_rows), columns [col, col + k) of x or dy */
  int64_t row, n_rows, col, k, n;
  float *ranks;                     /* LORA_MIXED * GEMM_KC * KS_LANES floats */
  const ks_lora *lora[GEMM_MC + 1]; /* of each row; NULL: none */
} lora_block;

static int64_t lora_ranks_left(const ks_lora *l, int64_t first) {
  return l ? ks_min_i64(ks_max_i64(l->rank - first, 0), LORA_GROUP) : 0;
}

/* Ranks [first, first + 8) of two rows' adapters, side by side for each k. */
static void lora_pack_ranks(const lora_block *b, const ks_lora *const of[2], int64_t first, float *out) {
  for (int64_t j = 0; j < b->k; j += KS_LANES, out += KS_LANES * KS_LANES) {
    ks_v rows[KS_LANES];
    for (int h = 0; h < 2; h++) {
      const float *a = !of[h] ? NULL : b->backward ? of[h]->b_t : of[h]->a;
      int64_t n = lora_ranks_left(of[h], first);
      for (int64_t r = 0; r < LORA_GROUP; r++)
        rows[2 * r + h] = r < n ? ks_v_load_n(a + (first + r) * b->n + b->col + j, b->k - j) : ks_v_zero();
    }
    gemm_transpose(rows);
    for (int i = 0; i < KS_LANES; i++)
      ks_v_store(out + i * KS_LANES, rows[i]);
  }
}

/* `pairs` pairs of rows from the block's pair `pair` on, with ranks already packed. */
static void lora_run_tile(const lora_block *b, int64_t pair, int64_t pairs, int64_t first, bool mixed) {
  const ks_linear_args *l = b->l;
  const bool last = b->col + b->k == b->n;
  float *out = b->backward ? l->v : l->u;
  lora_tile t = {.x = b->packed + pair * GEMM_PAIR,
                 .a = b->ranks,
                 .a_pair = GEMM_KC * KS_LANES,
                 .k = b->k,
                 .u = out + (b->row + 2 * pair) * l->u_stride + first,
                 .ldu = l->u_stride,
                 .load = b->col > 0};
  for (int64_t i = 0; i < 2 * pairs; i++) {
    const ks_lora *of = b->lora[2 * pair + i];
    t.n_ranks[i] = lora_ranks_left(of, first);
    t.scale[i] = of && b->backward && last ? of->scale : 1;
  }
  (mixed ? lora_mixed_kernels : lora_kernels)[pairs](&t);
}

static void lora_project_group(const lora_block *b, int64_t first) {
  const int64_t n_pairs = (b->n_rows + 1) / 2;
  for (int64_t i = 0, end; i < n_pairs; i = end) {
    const ks_lora *const *of = &b->lora[2 * i];
    end = i + 1;
    if (of[0] && of[0] == of[1]) { /* a run of pairs with one adapter */
      while (end < n_pairs && b->lora[2 * end] == of[0] && b->lora[2 * end + 1] == of[0])
        end++;
      if (!lora_ranks_left(of[0], first)) continue;
      lora_pack_ranks(b, of, first, b->ranks);
      for (int64_t p = i; p < end; p += LORA_PAIRS)
        lora_run_tile(b, p, ks_min_i64(LORA_PAIRS, end - p), first, false);
      continue;
    }
    while (end < n_pairs && end - i < LORA_MIXED && end - i < LORA_PAIRS &&
           b->lora[2 * end] != b->lora[2 * end + 1])
      end++;
    int64_t ranks = 0;
    for (int64_t p = i; p < end; p++) {
      ranks += lora_ranks_left(b->lora[2 * p], first) + lora_ranks_left(b->lora[2 * p + 1], first);
      lora_pack_ranks(b, &b->lora[2 * p], first, b->ranks + (p - i) * GEMM_KC * KS_LANES);
    }
    if (ranks) lora_run_tile(b, i, end - i, first, true);
  }
}

/* u or v of a block of at most GEMM_MC rows; columns come in rising blocks. */
static void lora_project_block(lora_block *b) {
  int64_t max_rank = 0;
  for (int64_t i = 0; i <= b->n_rows; i++)
    b->lora[i] = NULL;
  for (int64_t s = 0; s < b->l->n_segments; s++) {
    const ks_segment *seg = &b->l->segments[s];
    const ks_lora *l = lora_of(b->l, seg);
    if (!l) continue;
    int64_t begin = ks_max_i64(seg->row_begin - b->row, 0);
    int64_t end = ks_min_i64(seg->row_begin + seg->n_rows - b->row, b->n_rows);
    for (int64_t i = begin; i < end; i++)
      b->lora[i] = l;
    if (begin < end) max_rank = ks_max_i64(max_rank, l->rank);
  }
  for (int64_t first = 0; first < max_rank; first += LORA_GROUP)
    lora_project_group(b, first);
}

#endif
