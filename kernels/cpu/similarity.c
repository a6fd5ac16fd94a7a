/* Cosine or dot similarity of every query with every key: the whole matrix, or reduced as it is made.
 *
 *   s[i, j] = <q_i, k_j>,  cosine: / (|q_i| |k_j|), 0 when a norm is 0;  factors of I8 rows come last, of
 *   which a cosine keeps the signs
 *
 * A block is SIM_ROWS queries against SIM_KEYS keys. Keys are read where they lie; vectors run over the
 * queries, which are transposed once for all keys. With up to SIM_FEW queries vectors run over sixteen keys
 * instead. Rows of bf16 and I8 are made float32 a block at a time.
 *
 * Bytes: k once for each block of queries; the fused forms write no n_q x n_k array. Flops: 2 n_q n_k n_cols.
 *
 * Determinism: a product is an fma chain over the columns (L = n_cols); norms in double, 32 lanes (products
 * of floats are exact there) and a fixed tree; means in double over stretches of SIM_STRETCH keys, each a
 * chain in rising order, added in rising order. The best k and the farthest are defined by a total order, so
 * that no splitting matters. */
#include "kernels/cpu/tile.h"
#include <math.h>

enum { SIM_ROWS = 128, SIM_KEYS = 64, SIM_COLS = 128, SIM_STRETCH = 512, SIM_FEW = 3 };

/* Stored rows, of queries or of keys. */
typedef struct {
  const void *p; /* [.., n_cols] */
  ks_dtype dtype;
  const float *scales; /* or NULL */
  int64_t n_cols;
} sim_rows;

static sim_rows sim_rows_at(sim_rows r, int64_t row) {
  const size_t bytes = (size_t)(row * r.n_cols) * ks_dtype_size(r.dtype);
  return (sim_rows){(const char *)r.p + bytes, r.dtype, r.scales ? r.scales + row : NULL, r.n_cols};
}
static sim_rows sim_queries(const ks_similarity_args *a) {
  return (sim_rows){a->q, a->q_dtype, a->q_scales, a->n_cols};
}
static sim_rows sim_keys(const ks_similarity_args *a) {
  return (sim_rows){a->k, a->k_dtype, a->k_scales, a->n_cols};
}

/* The first n rows as float32: where they lie, or in `room`. */
static const float *sim_floats(const sim_rows *r, int64_t n, float *room) {
  if (r->dtype == KS_DTYPE_F32) return r->p;
  if (r->dtype == KS_DTYPE_BF16)
    for (int64_t i = 0; i < n * r->n_cols; i++) {
      const uint32_t bits = (uint32_t)((const uint16_t *)r->p)[i] << 16;
      memcpy(&room[i], &bits, sizeof bits);
    }
  else
    for (int64_t i = 0; i < n * r->n_cols; i++)
      room[i] = (float)((const int8_t *)r->p)[i];
  return room;
}

/* A thread's memory, for one block of queries at a time. */
typedef struct {
  const ks_similarity_args *a;
  const float *q;         /* [n_q, n_cols] */
  int64_t n_q, row;       /* row: distance of two keys' scores in s */
  bool scaled;            /* by factors of the rows */
  double *inv_q, *inv_k;  /* [SIM_ROWS], [SIM_KEYS]: these factors */
  float *s;               /* [SIM_KEYS, row] */
  float *turned;          /* [SIM_ROWS, SIM_KEYS] */
  float *columns;         /* [n_cols, row]: queries transposed; with more than SIM_FEW */
  float *q_room, *k_room; /* [SIM_ROWS, n_cols], [SIM_KEYS, n_cols]: for rows that are not float32 */
} sim_work;

static int64_t sim_room(ks_dtype dtype, int64_t n_rows, int64_t n_cols) {
  return dtype == KS_DTYPE_F32 ? 0 : n_rows * n_cols;
}

static size_t sim_work_bytes(const ks_similarity_args *a) {
  /* Queries may also be keys (farthest first). */
  const ks_dtype q_dtype = a->q_dtype == KS_DTYPE_F32 ? a->k_dtype : a->q_dtype;
  return (SIM_ROWS + SIM_KEYS) * sizeof(double) +
         (size_t)((2 * SIM_KEYS + (a->n_q > SIM_FEW ? a->n_cols : 0)) * SIM_ROWS +
                  sim_room(q_dtype, SIM_ROWS, a->n_cols) + sim_room(a->k_dtype, SIM_KEYS, a->n_cols)) *
             sizeof(float);
}

/* Sum of squares: 32 lanes in double, folded as a fixed tree. */
#if defined(__AVX512F__)
KS_INLINE void sim_squares_at(const float *x, int64_t n, __m512d acc[2]) {
  const __mmask16 mask = ks_tail_mask(n);
  const __m512d lo = _mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)mask, x));
  const __m512d hi = _mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)(mask >> 8), x + 8));
  acc[0] = _mm512_fmadd_pd(lo, lo, acc[0]);
  acc[1] = _mm512_fmadd_pd(hi, hi, acc[1]);
}
KS_INLINE double sim_squares(const float *x, int64_t n) {
  __m512d even[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, odd[2] = {even[0], even[0]};
  int64_t i = 0;
  for (; i + 2 * KS_LANES <= n; i += 2 * KS_LANES) {
    sim_squares_at(x + i, KS_LANES, even);
    sim_squares_at(x + i + KS_LANES, KS_LANES, odd);
  }
  if (i < n) sim_squares_at(x + i, n - i, even);
  if (i + KS_LANES < n) sim_squares_at(x + i + KS_LANES, n - i - KS_LANES, odd);
  const __m512d a = _mm512_add_pd(_mm512_add_pd(even[0], odd[0]), _mm512_add_pd(even[1], odd[1]));
  const __m256d c = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
  const __m128d e = _mm_add_pd(_mm256_castpd256_pd128(c), _mm256_extractf128_pd(c, 1));
  return _mm_cvtsd_f64(_mm_add_sd(e, _mm_unpackhi_pd(e, e)));
}
#else
KS_INLINE double sim_squares(const float *x, int64_t n) {
  enum { LANES = 2 * KS_LANES };
  double acc[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; l++)
      acc[l] += (double)x[i + l] * (double)x[i + l];
  for (int l = 0; i < n; i++, l++)
    acc[l] += (double)x[i] * (double)x[i];
  for (int h = LANES / 2; h > 0; h /= 2)
    for (int l = 0; l < h; l++)
      acc[l] += acc[l + h];
  return acc[0];
}
#endif

/* What the products of rows x are multiplied by, scales NULL: all 1. Of a dot product the scale; of a cosine
 * 1 / |x|, 0 for a zero vector, NaN when a component is not finite, with the sign of the scale. */
static void sim_factors(const float *x, const float *scales, bool cosine, int64_t n_rows, int64_t n_cols,
                        double *out) {
  for (int64_t i = 0; cosine && i < n_rows; i++)
    out[i] = sim_squares(x + i * n_cols, n_cols);
  for (int64_t i = 0; cosine && i < n_rows; i++) {
    const double inverse = out[i] < (double)INFINITY ? 1 / sqrt(out[i]) : (double)NAN;
    out[i] = out[i] == 0 ? 0 : inverse;
  }
  if (!scales && cosine) return;
  for (int64_t i = 0; i < n_rows; i++) {
    const double scale = scales ? (double)scales[i] : 1;
    const double sign = isfinite(scale) ? (scale > 0) - (scale < 0) : (double)NAN;
    out[i] = cosine ? out[i] * sign : scale;
  }
}

/* This thread's memory, made ready for the first n_q rows. */
static sim_work sim_start(const ks_ctx *ctx, const ks_similarity_args *a, sim_rows rows, int64_t n_q) {
  sim_work w = {.a = a, .n_q = n_q};
  const bool cosine = a->metric == KS_METRIC_COSINE;
  w.scaled = cosine || a->q_scales || a->k_scales;
  w.row = n_q > SIM_FEW ? (n_q + KS_LANES - 1) / KS_LANES * KS_LANES : n_q;
  w.inv_q = ks_cpu_scratch(ctx, omp_get_thread_num());
  w.inv_k = w.inv_q + SIM_ROWS;
  w.s = (float *)(w.inv_k + SIM_KEYS);
  w.turned = w.s + SIM_KEYS * SIM_ROWS;
  w.columns = w.turned + SIM_ROWS * SIM_KEYS;
  w.k_room = w.columns + (n_q > SIM_FEW ? a->n_cols : 0) * SIM_ROWS;
  w.q_room = w.k_room + sim_room(a->k_dtype, SIM_KEYS, a->n_cols);
  w.q = sim_floats(&rows, n_q, w.q_room);
  if (w.scaled) sim_factors(w.q, rows.scales, cosine, n_q, a->n_cols, w.inv_q);
  if (n_q > SIM_FEW) tile_transpose(w.q, a->n_cols, n_q, a->n_cols, w.columns, w.row);
  return w;
}

static void sim_scale(const sim_work *w, int64_t n_k, const double *inv_k) {
  if (w->n_q == 1) {
    for (int64_t j = 0; j < n_k; j++)
      w->s[j] = (float)((double)w->s[j] * (w->inv_q[0] * inv_k[j]));
    return;
  }
  for (int64_t j = 0; j < n_k; j++)
    for (int64_t i = 0; i < w->n_q; i++)
      w->s[j * w->row + i] = (float)((double)w->s[j * w->row + i] * (w->inv_q[i] * inv_k[j]));
}

/* factors: of the keys as well, while they are in cache. */
static void sim_dots_few(const sim_work *w, const float *k, const float *scales, int64_t n_k, bool factors) {
  float out[TILE_DOTS];
  const int64_t d = w->a->n_cols;
  const bool cosine = w->a->metric == KS_METRIC_COSINE;
  for (int64_t j = 0; j < n_k; j += TILE_DOTS) {
    const int64_t n = ks_min_i64(n_k - j, TILE_DOTS);
    if (factors) sim_factors(k + j * d, scales ? scales + j : NULL, cosine, n, d, w->inv_k + j);
    for (int64_t i = 0; i < w->n_q; i++) {
      tile_dots(k + j * d, d, n, d, w->q + i * d, out);
      for (int64_t c = 0; c < n; c++)
        w->s[(j + c) * w->row + i] = out[c];
    }
  }
}

/* w->s[j, i]: similarity of query i with key j of n_k <= SIM_KEYS keys from number k0 on. inv_k: their
 * factors, or NULL: computed here. */
static void sim_block(const sim_work *w, int64_t k0, int64_t n_k, const double *inv_k) {
  const int64_t d = w->a->n_cols;
  const sim_rows rows = sim_rows_at(sim_keys(w->a), k0);
  const float *k = sim_floats(&rows, n_k, w->k_room);
  const bool factors = w->scaled && !inv_k;
  if (factors && w->n_q > SIM_FEW)
    sim_factors(k, rows.scales, w->a->metric == KS_METRIC_COSINE, n_k, d, w->inv_k);
  if (w->n_q <= SIM_FEW)
    sim_dots_few(w, k, rows.scales, n_k, factors);
  else
    for (int64_t c = 0; c == 0 || c < d; c += SIM_COLS)
      tile_product((tile_args){.a = k + c,
                               .a_row = d,
                               .a_col = 1,
                               .b = w->columns + c * w->row,
                               .b_row = w->row,
                               .c = w->s,
                               .c_row = w->row,
                               .m = n_k,
                               .n = w->row,
                               .depth = ks_min_i64(d - c, SIM_COLS),
                               .accumulate = c > 0});
  if (w->scaled) sim_scale(w, n_k, inv_k ? inv_k : w->inv_k);
}

static int sim_threads(const ks_ctx *ctx, const ks_similarity_args *a) {
  double work = ((double)a->n_q + 1) * (double)a->n_k * (double)(a->n_cols + 8);
  return ks_cpu_threads(ctx, work < 1e15 ? (int64_t)work : (int64_t)1e15);
}

static ks_status similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s) {
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes(a)));
#pragma omp parallel for collapse(2) num_threads(sim_threads(ctx, a)) schedule(static)
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS)
    for (int64_t stretch = 0; stretch < a->n_k; stretch += SIM_STRETCH) {
      const int64_t end = ks_min_i64(a->n_k, stretch + SIM_STRETCH);
      const sim_work w =
          sim_start(ctx, a, sim_rows_at(sim_queries(a), q0), ks_min_i64(a->n_q - q0, SIM_ROWS));
      for (int64_t k0 = stretch; k0 < end; k0 += SIM_KEYS) {
        const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
        sim_block(&w, k0, n_k, NULL);
        tile_transpose(w.s, w.row, n_k, w.n_q, w.turned, SIM_KEYS);
        for (int64_t i = 0; i < w.n_q; i++)
          memcpy(s + (q0 + i) * a->n_k + k0, w.turned + i * SIM_KEYS, (size_t)n_k * sizeof *s);
      }
    }
  return KS_OK;
}

/* ---------------------------------------------------------------- best k */

/* Whether score a of a lower index goes after score b of a higher one: numbers fall, NaN comes last. */
KS_INLINE bool sim_beats(float b, float a) {
  return b > a || (a != a && b == b);
}

/* Puts (score, at) into the falling list of n_list <= best_k entries; `at` is larger than every index in it.
 */
static void sim_insert(float *scores, int64_t *index, int64_t n_list, int64_t best_k, float score,
                       int64_t at) {
  int64_t i = n_list;
  if (n_list == best_k) {
    if (!sim_beats(score, scores[best_k - 1])) return;
    i--;
  }
  for (; i > 0 && sim_beats(score, scores[i - 1]); i--) {
    scores[i] = scores[i - 1];
    index[i] = index[i - 1];
  }
  scores[i] = score;
  index[i] = at;
}

/* Whether any of n scores is not below or equal to its bound. */
KS_INLINE bool sim_any_above(const float *s, const float *bound, int64_t n) {
  ks_vi any = {{{0}}};
  int64_t i = 0;
  for (; i + KS_LANES <= n; i += KS_LANES) {
    const ks_v x = ks_v_load(s + i), y = ks_v_load(bound + i);
    KS_EACH_PART(p) any.p[p] |= ~(ks_ipart)(x.p[p] <= y.p[p]);
  }
  int32_t lanes[KS_LANES], all = 0;
  memcpy(lanes, &any, sizeof lanes);
  for (int l = 0; l < KS_LANES; l++)
    all |= lanes[l];
  for (; i < n; i++)
    all |= !(s[i] <= bound[i]);
  return all != 0;
}

/* The scores of keys k0 .. k0 + n_k - 1 after n_seen others. worst[i]: the last of query i's full list. */
static void sim_top_block(const sim_work *w, int64_t n_k, int64_t k0, int64_t n_seen, int64_t best_k,
                          float *worst, float *scores, int64_t *index) {
  for (int64_t j = 0; j < n_k; j++) {
    while (w->n_q == 1 && n_seen + j >= best_k && j < n_k && w->s[j] <= worst[0])
      j++;
    if (j == n_k) return;
    const float *s = w->s + j * w->row;
    const int64_t n_list = ks_min_i64(n_seen + j, best_k);
    if (n_list == best_k && !sim_any_above(s, worst, w->n_q)) continue;
    for (int64_t i = 0; i < w->n_q; i++) {
      if (n_list == best_k && s[i] <= worst[i]) continue;
      sim_insert(scores + i * best_k, index + i * best_k, n_list, best_k, s[i], k0 + j);
      worst[i] = scores[i * best_k + best_k - 1];
    }
  }
}

/* Lists of every query over the keys [begin, end). */
static void sim_top_stretch(const sim_work *w, int64_t begin, int64_t end, int64_t best_k, float *scores,
                            int64_t *index) {
  float worst[SIM_ROWS];
  for (int64_t i = 0; i < w->n_q * best_k; i++) {
    scores[i] = -INFINITY;
    index[i] = -1;
  }
  for (int64_t k0 = begin; k0 < end; k0 += SIM_KEYS) {
    const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
    sim_block(w, k0, n_k, NULL);
    sim_top_block(w, n_k, k0, k0 - begin, best_k, worst, scores, index);
  }
}

/* Lists of part p (of later keys than those before it) into the first. */
static void sim_top_merge(float *scores, int64_t *index, int64_t n_lists, int64_t best_k,
                          const float *more_scores, const int64_t *more_index) {
  for (int64_t i = 0; i < n_lists; i++) {
    int64_t n = 0;
    while (n < best_k && index[i * best_k + n] >= 0)
      n++;
    for (int64_t j = 0; j < best_k && more_index[i * best_k + j] >= 0; j++) {
      sim_insert(scores + i * best_k, index + i * best_k, n, best_k, more_scores[i * best_k + j],
                 more_index[i * best_k + j]);
      n = ks_min_i64(n + 1, best_k);
    }
  }
}

static ks_status similarity_top(ks_ctx *ctx, const ks_similarity_args *a, int64_t best_k, float *scores,
                                int64_t *index) {
  enum { MAX_PARTS = 16 };
  const int n_threads = sim_threads(ctx, a);
  const int64_t n_blocks = (a->n_q + SIM_ROWS - 1) / SIM_ROWS, n_list = a->n_q * best_k;
  /* Few queries: the keys are shared out as well. */
  int64_t n_parts =
      ks_min_i64((n_threads + n_blocks - 1) / n_blocks, ks_min_i64(a->n_k / SIM_STRETCH, MAX_PARTS));
  n_parts = ks_max_i64(n_parts, 1);
  const int64_t part = ((a->n_k + n_parts - 1) / n_parts + SIM_KEYS - 1) / SIM_KEYS * SIM_KEYS;
  float *part_scores = NULL;
  int64_t *part_index = NULL;
  ks_status status = KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes(a)));
  if (n_parts > 1) {
    KS_TRY_OUT(ks_alloc_array(&part_scores, (size_t)((n_parts - 1) * n_list), sizeof *part_scores,
                              "similarity_top"));
    KS_TRY_OUT(
        ks_alloc_array(&part_index, (size_t)((n_parts - 1) * n_list), sizeof *part_index, "similarity_top"));
  }
#pragma omp parallel for collapse(2) num_threads(n_threads) schedule(static)
  for (int64_t b = 0; b < n_blocks; b++)
    for (int64_t p = 0; p < n_parts; p++) {
      const int64_t q0 = b * SIM_ROWS, at = q0 * best_k;
      const sim_work w =
          sim_start(ctx, a, sim_rows_at(sim_queries(a), q0), ks_min_i64(a->n_q - q0, SIM_ROWS));
      sim_top_stretch(&w, ks_min_i64(p * part, a->n_k), ks_min_i64((p + 1) * part, a->n_k), best_k,
                      p ? part_scores + (p - 1) * n_list + at : scores + at,
                      p ? part_index + (p - 1) * n_list + at : index + at);
    }
  for (int64_t p = 1; p < n_parts; p++)
    sim_top_merge(scores, index, a->n_q, best_k, part_scores + (p - 1) * n_list,
                  part_index + (p - 1) * n_list);
out:
  free(part_scores);
  free(part_index);
  return status;
}

/* ---------------------------------------------------------------- mean */

/* Adds the scores of the keys k0 + j that belong to a query, and their number. */
static void sim_mean_block(const sim_work *w, int64_t k0, int64_t n_k, int64_t q0,
                           const ks_similarity_groups *g, double *sum, int64_t *count) {
  for (int64_t j = 0; j < n_k; j++) {
    const float *s = w->s + j * w->row;
    if (!g->keys && !g->except)
      for (int64_t i = 0; i < w->n_q; i++) {
        sum[i] += (double)s[i];
        count[i]++;
      }
    else
      for (int64_t i = 0; i < w->n_q; i++) {
        const bool counts = (!g->keys || g->queries[q0 + i] == g->keys[k0 + j]) &&
                            (!g->except || g->except[q0 + i] != k0 + j);
        sum[i] = counts ? sum[i] + (double)s[i] : sum[i];
        count[i] += counts;
      }
  }
}

static ks_status similarity_mean(ks_ctx *ctx, const ks_similarity_args *a, const ks_similarity_groups *g,
                                 double *mean, int64_t *count) {
  const int64_t n_stretches = ks_max_i64((a->n_k + SIM_STRETCH - 1) / SIM_STRETCH, 1);
  double *part_sum = NULL;
  int64_t *part_count = NULL;
  ks_status status = KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes(a)));
  if (n_stretches > 1) {
    size_t n = (size_t)((n_stretches - 1) * a->n_q);
    KS_TRY_OUT(ks_alloc_array(&part_sum, n, sizeof *part_sum, "similarity_mean"));
    KS_TRY_OUT(ks_alloc_array(&part_count, n, sizeof *part_count, "similarity_mean"));
  }
#pragma omp parallel for collapse(2) num_threads(sim_threads(ctx, a)) schedule(static)
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS)
    for (int64_t p = 0; p < n_stretches; p++) {
      const sim_work w =
          sim_start(ctx, a, sim_rows_at(sim_queries(a), q0), ks_min_i64(a->n_q - q0, SIM_ROWS));
      const int64_t end = ks_min_i64((p + 1) * SIM_STRETCH, a->n_k);
      double *sum = (p ? part_sum + (p - 1) * a->n_q : mean) + q0;
      int64_t *n = (p ? part_count + (p - 1) * a->n_q : count) + q0;
      memset(sum, 0, (size_t)w.n_q * sizeof *sum);
      memset(n, 0, (size_t)w.n_q * sizeof *n);
      for (int64_t k0 = p * SIM_STRETCH; k0 < end; k0 += SIM_KEYS) {
        const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
        sim_block(&w, k0, n_k, NULL);
        sim_mean_block(&w, k0, n_k, q0, g, sum, n);
      }
    }
  for (int64_t i = 0; i < a->n_q; i++) {
    for (int64_t p = 1; p < n_stretches; p++) {
      mean[i] += part_sum[(p - 1) * a->n_q + i];
      count[i] += part_count[(p - 1) * a->n_q + i];
    }
    mean[i] = count[i] ? mean[i] / (double)count[i] : NAN;
  }
out:
  free(part_sum);
  free(part_count);
  return status;
}

/* ---------------------------------------------------------------- farthest first */

/* nearest[j]: the largest similarity of key j to the chosen so far; NaN counts as nearest of all. Takes the
 * n_q <= SIM_ROWS rows of q as chosen. */
static void sim_choose(ks_ctx *ctx, const ks_similarity_args *a, sim_rows q, int64_t n_q, const double *inv_k,
                       float *nearest) {
  const ks_similarity_args step = {.n_q = n_q, .n_k = a->n_k, .n_cols = a->n_cols};
#pragma omp parallel for num_threads(sim_threads(ctx, &step)) schedule(static)
  for (int64_t stretch = 0; stretch < a->n_k; stretch += SIM_STRETCH) {
    const int64_t end = ks_min_i64(stretch + SIM_STRETCH, a->n_k);
    const sim_work w = sim_start(ctx, a, q, n_q);
    for (int64_t k0 = stretch; k0 < end; k0 += SIM_KEYS) {
      const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
      sim_block(&w, k0, n_k, inv_k ? inv_k + k0 : NULL);
      for (int64_t j = 0; j < n_k; j++)
        for (int64_t i = 0; i < n_q; i++) {
          float s = w.s[j * w.row + i], v = s == s ? s : INFINITY;
          nearest[k0 + j] = v > nearest[k0 + j] ? v : nearest[k0 + j];
        }
    }
  }
}

/* Factors of all keys, through the scratch memory of this thread. */
static void sim_all_factors(const ks_ctx *ctx, const ks_similarity_args *a, double *out) {
  const sim_rows none = {.p = NULL, .dtype = KS_DTYPE_F32, .n_cols = a->n_cols};
  const sim_work w = sim_start(ctx, a, none, 0);
  for (int64_t k0 = 0; k0 < a->n_k; k0 += SIM_KEYS) {
    const int64_t n_k = ks_min_i64(a->n_k - k0, SIM_KEYS);
    const sim_rows rows = sim_rows_at(sim_keys(a), k0);
    sim_factors(sim_floats(&rows, n_k, w.k_room), rows.scales, a->metric == KS_METRIC_COSINE, n_k, a->n_cols,
                out + k0);
  }
}

static int64_t sim_farthest(const float *nearest, const unsigned char *taken, int64_t n) {
  int64_t best = -1;
  for (int64_t j = 0; j < n; j++)
    if (!taken[j] && (best < 0 || nearest[j] < nearest[best])) best = j;
  return best;
}

static ks_status similarity_farthest_first(ks_ctx *ctx, const ks_similarity_args *a, int64_t n_pick,
                                           int64_t first, int64_t *picked) {
  const bool cosine = a->metric == KS_METRIC_COSINE, scaled = cosine || a->q_scales || a->k_scales;
  float *nearest = NULL;
  double *inv_k = NULL;
  unsigned char *taken = NULL;
  ks_status status = KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes(a)));
  KS_TRY_OUT(ks_alloc_array(&nearest, (size_t)a->n_k, sizeof *nearest, "similarity_farthest_first"));
  KS_TRY_OUT(ks_alloc_array(&taken, (size_t)a->n_k, sizeof *taken, "similarity_farthest_first"));
  if (scaled) {
    KS_TRY_OUT(ks_alloc_array(&inv_k, (size_t)a->n_k, sizeof *inv_k, "similarity_farthest_first"));
    sim_all_factors(ctx, a, inv_k);
  }
  for (int64_t j = 0; j < a->n_k; j++)
    nearest[j] = -INFINITY;
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS)
    sim_choose(ctx, a, sim_rows_at(sim_queries(a), q0), ks_min_i64(a->n_q - q0, SIM_ROWS), inv_k, nearest);
  for (int64_t p = 0; p < n_pick; p++) {
    int64_t pick = p == 0 && a->n_q == 0 ? first : sim_farthest(nearest, taken, a->n_k);
    picked[p] = pick;
    taken[pick] = 1;
    if (p + 1 < n_pick) sim_choose(ctx, a, sim_rows_at(sim_keys(a), pick), 1, inv_k, nearest);
  }
out:
  free(nearest);
  free(inv_k);
  free(taken);
  return status;
}
