/* Cosine or dot similarity of every query with every key: the whole matrix, or reduced as it is made.
 *   s[i, j] = <q_i, k_j>,  cosine: / (|q_i| |k_j|), 0 when a norm is 0
 * Bytes: k once for each block of SIM_ROWS queries, q from cache; the fused forms write no n_q x n_k array.
 * Flops: 2 n_q n_k n_cols.
 * Determinism: a product is an fma chain over the columns (L = n_cols); norms in double, 16 lanes (products
 * of floats are exact there) and a fixed tree; means in double, 16 lanes (key mod 16) over stretches of
 * SIM_STRETCH keys, added in rising order. The best k and the farthest are defined by a total order, so that
 * no way of splitting matters. */
#include "kernels/cpu/tile.h"
#include <math.h>

enum { SIM_ROWS = 120, SIM_KEYS = 64, SIM_COLS = 256, SIM_STRETCH = 1024 };

/* A thread's memory. */
typedef struct {
  double *inv_q, *inv_k; /* [SIM_ROWS], [SIM_KEYS]: 1 / norm */
  float *keys;           /* [SIM_COLS, SIM_KEYS]: transposed */
  float *s;              /* [SIM_ROWS, SIM_KEYS] */
} sim_work;

static const size_t sim_work_bytes =
    (SIM_ROWS + SIM_KEYS) * sizeof(double) + (SIM_COLS + SIM_ROWS) * SIM_KEYS * sizeof(float);

KS_INLINE sim_work sim_work_at(const ks_ctx *ctx) {
  sim_work w;
  w.inv_q = ks_cpu_scratch(ctx, omp_get_thread_num());
  w.inv_k = w.inv_q + SIM_ROWS;
  w.keys = (float *)(w.inv_k + SIM_KEYS);
  w.s = w.keys + SIM_COLS * SIM_KEYS;
  return w;
}

/* 1 / |x|; 0 for a zero vector; NaN when a component is not finite. */
static double sim_inverse_norm(const float *x, int64_t n) {
  double acc[KS_LANES] = {0};
  int64_t i = 0;
  for (; i + KS_LANES <= n; i += KS_LANES)
    for (int l = 0; l < KS_LANES; l++)
      acc[l] += (double)x[i + l] * (double)x[i + l];
  for (int l = 0; i < n; i++, l++)
    acc[l] += (double)x[i] * (double)x[i];
  for (int h = KS_LANES / 2; h > 0; h /= 2)
    for (int l = 0; l < h; l++)
      acc[l] += acc[l + h];
  if (acc[0] == 0) return 0;
  return acc[0] < INFINITY ? 1 / sqrt(acc[0]) : NAN;
}

static void sim_inverse_norms(const float *x, int64_t n_rows, int64_t n_cols, double *out) {
  for (int64_t i = 0; i < n_rows; i++)
    out[i] = sim_inverse_norm(x + i * n_cols, n_cols);
}

/* s[i, j] of n_q queries and n_k <= SIM_KEYS keys; norms are read when the metric is cosine. */
static void sim_block(const ks_similarity_args *a, const sim_work *w, const float *q, int64_t n_q,
                      const double *inv_q, const float *k, int64_t n_k, const double *inv_k, float *s,
                      int64_t s_row) {
  const int64_t d = a->n_cols;
  int64_t c = 0;
  do {
    int64_t cols = ks_min_i64(d - c, SIM_COLS);
    tile_transpose(k + c, d, n_k, cols, w->keys, SIM_KEYS);
    tile_product((tile_args){.a = q + c,
                             .a_row = d,
                             .a_col = 1,
                             .b = w->keys,
                             .b_row = SIM_KEYS,
                             .c = s,
                             .c_row = s_row,
                             .m = n_q,
                             .n = n_k,
                             .depth = cols,
                             .accumulate = c > 0});
    c += cols;
  } while (c < d);
  if (a->metric != KS_METRIC_COSINE) return;
  for (int64_t i = 0; i < n_q; i++) {
    float *row = s + i * s_row;
    for (int64_t j = 0; j < n_k; j++) {
      double scale = inv_q[i] * inv_k[j];
      row[j] = scale == 0 ? 0.0f : (float)((double)row[j] * scale);
    }
  }
}

/* The block of queries from q0 against the block of keys from k0, into w->s; w->inv_q is there already. */
KS_INLINE void sim_fused_block(const ks_similarity_args *a, const sim_work *w, int64_t q0, int64_t n_q,
                               int64_t k0, int64_t n_k) {
  const float *k = a->k + k0 * a->n_cols;
  if (a->metric == KS_METRIC_COSINE) sim_inverse_norms(k, n_k, a->n_cols, w->inv_k);
  sim_block(a, w, a->q + q0 * a->n_cols, n_q, w->inv_q, k, n_k, w->inv_k, w->s, SIM_KEYS);
}

KS_INLINE void sim_query_norms(const ks_similarity_args *a, const sim_work *w, int64_t q0, int64_t n_q) {
  if (a->metric == KS_METRIC_COSINE) sim_inverse_norms(a->q + q0 * a->n_cols, n_q, a->n_cols, w->inv_q);
}

static int sim_threads(const ks_ctx *ctx, const ks_similarity_args *a) {
  double work = ((double)a->n_q + 4) * (double)a->n_k * (double)(a->n_cols + 8);
  return ks_cpu_threads(ctx, work < 1e15 ? (int64_t)work : (int64_t)1e15);
}

static ks_status similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s) {
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes));
#pragma omp parallel for collapse(2) num_threads(sim_threads(ctx, a)) schedule(static)
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS)
    for (int64_t stretch = 0; stretch < a->n_k; stretch += SIM_STRETCH) {
      const sim_work w = sim_work_at(ctx);
      const int64_t n_q = ks_min_i64(a->n_q - q0, SIM_ROWS), end = ks_min_i64(a->n_k, stretch + SIM_STRETCH);
      sim_query_norms(a, &w, q0, n_q);
      for (int64_t k0 = stretch; k0 < end; k0 += SIM_KEYS) {
        const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
        const float *k = a->k + k0 * a->n_cols;
        if (a->metric == KS_METRIC_COSINE) sim_inverse_norms(k, n_k, a->n_cols, w.inv_k);
        sim_block(a, &w, a->q + q0 * a->n_cols, n_q, w.inv_q, k, n_k, w.inv_k, s + q0 * a->n_k + k0, a->n_k);
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

/* One row of scores of keys k0 .. k0 + n_k - 1 after n_seen others. */
KS_INLINE void sim_top_row(const float *s, int64_t n_k, int64_t k0, int64_t n_seen, int64_t best_k,
                           float *scores, int64_t *index) {
  if (n_seen >= best_k) {
    int any = 0;
    for (int64_t j = 0; j < n_k; j++)
      any |= !(s[j] <= scores[best_k - 1]);
    if (!any) return;
  }
  for (int64_t j = 0; j < n_k; j++)
    sim_insert(scores, index, ks_min_i64(n_seen + j, best_k), best_k, s[j], k0 + j);
}

/* Lists of every query over the keys [begin, end). */
static void sim_top_stretch(ks_ctx *ctx, const ks_similarity_args *a, int64_t q0, int64_t n_q, int64_t begin,
                            int64_t end, int64_t best_k, float *scores, int64_t *index) {
  const sim_work w = sim_work_at(ctx);
  for (int64_t i = 0; i < n_q * best_k; i++) {
    scores[i] = -INFINITY;
    index[i] = -1;
  }
  sim_query_norms(a, &w, q0, n_q);
  for (int64_t k0 = begin; k0 < end; k0 += SIM_KEYS) {
    const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
    sim_fused_block(a, &w, q0, n_q, k0, n_k);
    for (int64_t i = 0; i < n_q; i++)
      sim_top_row(w.s + i * SIM_KEYS, n_k, k0, k0 - begin, best_k, scores + i * best_k, index + i * best_k);
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
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes));
  if (n_parts > 1) {
    KS_TRY_OUT(ks_alloc_array(&part_scores, (size_t)((n_parts - 1) * n_list), sizeof *part_scores,
                              "similarity_top"));
    KS_TRY_OUT(
        ks_alloc_array(&part_index, (size_t)((n_parts - 1) * n_list), sizeof *part_index, "similarity_top"));
  }
#pragma omp parallel for collapse(2) num_threads(n_threads) schedule(static)
  for (int64_t b = 0; b < n_blocks; b++)
    for (int64_t p = 0; p < n_parts; p++) {
      const int64_t q0 = b * SIM_ROWS, n_q = ks_min_i64(a->n_q - q0, SIM_ROWS), at = q0 * best_k;
      sim_top_stretch(ctx, a, q0, n_q, ks_min_i64(p * part, a->n_k), ks_min_i64((p + 1) * part, a->n_k),
                      best_k, p ? part_scores + (p - 1) * n_list + at : scores + at,
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

typedef struct {
  const ks_similarity_args *a;
  const int32_t *groups, *query_groups; /* NULL: every key counts */
} sim_mean;

/* Sums of every query over the keys [begin, end); acc: [n_q, KS_LANES] scratch. */
static void sim_mean_stretch(ks_ctx *ctx, const sim_mean *m, int64_t q0, int64_t n_q, int64_t begin,
                             int64_t end, double *sum, int64_t *count) {
  const ks_similarity_args *a = m->a;
  const sim_work w = sim_work_at(ctx);
  double acc[SIM_ROWS][KS_LANES];
  memset(acc, 0, sizeof acc);
  sim_query_norms(a, &w, q0, n_q);
  for (int64_t k0 = begin; k0 < end; k0 += SIM_KEYS) {
    const int64_t n_k = ks_min_i64(end - k0, SIM_KEYS);
    sim_fused_block(a, &w, q0, n_q, k0, n_k);
    for (int64_t i = 0; i < n_q; i++) {
      const float *s = w.s + i * SIM_KEYS;
      if (!m->groups) {
        for (int64_t j = 0; j < n_k; j++)
          acc[i][j % KS_LANES] += (double)s[j];
        continue;
      }
      const int32_t group = m->query_groups[q0 + i];
      for (int64_t j = 0; j < n_k; j++)
        acc[i][j % KS_LANES] += m->groups[k0 + j] == group ? (double)s[j] : 0.0;
    }
  }
  for (int64_t i = 0; i < n_q; i++) {
    for (int h = KS_LANES / 2; h > 0; h /= 2)
      for (int l = 0; l < h; l++)
        acc[i][l] += acc[i][l + h];
    sum[i] = acc[i][0];
    count[i] = m->groups ? 0 : end - begin;
    for (int64_t j = begin; m->groups && j < end; j++)
      count[i] += m->groups[j] == m->query_groups[q0 + i];
  }
}

static ks_status similarity_mean(ks_ctx *ctx, const ks_similarity_args *a, const int32_t *groups,
                                 const int32_t *query_groups, double *mean, int64_t *count) {
  const sim_mean m = {a, groups, query_groups};
  const int64_t n_stretches = ks_max_i64((a->n_k + SIM_STRETCH - 1) / SIM_STRETCH, 1);
  double *part_sum = NULL;
  int64_t *part_count = NULL;
  ks_status status = KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes));
  if (n_stretches > 1) {
    size_t n = (size_t)((n_stretches - 1) * a->n_q);
    KS_TRY_OUT(ks_alloc_array(&part_sum, n, sizeof *part_sum, "similarity_mean"));
    KS_TRY_OUT(ks_alloc_array(&part_count, n, sizeof *part_count, "similarity_mean"));
  }
#pragma omp parallel for collapse(2) num_threads(sim_threads(ctx, a)) schedule(static)
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS)
    for (int64_t p = 0; p < n_stretches; p++) {
      double *sum = p ? part_sum + (p - 1) * a->n_q : mean;
      int64_t *n = p ? part_count + (p - 1) * a->n_q : count;
      sim_mean_stretch(ctx, &m, q0, ks_min_i64(a->n_q - q0, SIM_ROWS), p * SIM_STRETCH,
                       ks_min_i64((p + 1) * SIM_STRETCH, a->n_k), sum + q0, n + q0);
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

/* nearest[j]: the largest similarity of key j to the chosen so far; NaN counts as nearest of all. */
KS_INLINE void sim_nearer(float *nearest, const float *s, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    float v = s[j] == s[j] ? s[j] : INFINITY;
    nearest[j] = v > nearest[j] ? v : nearest[j];
  }
}

/* Takes the n_q rows of q as chosen. */
static void sim_choose(ks_ctx *ctx, const ks_similarity_args *a, const float *q, int64_t n_q,
                       const double *inv_q, const double *inv_k, float *nearest) {
  const ks_similarity_args step = {.n_q = n_q, .n_k = a->n_k, .n_cols = a->n_cols};
#pragma omp parallel for num_threads(sim_threads(ctx, &step)) schedule(static)
  for (int64_t k0 = 0; k0 < a->n_k; k0 += SIM_KEYS) {
    const sim_work w = sim_work_at(ctx);
    const int64_t n_k = ks_min_i64(a->n_k - k0, SIM_KEYS);
    sim_block(a, &w, q, n_q, inv_q, a->k + k0 * a->n_cols, n_k, inv_k ? inv_k + k0 : NULL, w.s, SIM_KEYS);
    for (int64_t i = 0; i < n_q; i++)
      sim_nearer(nearest + k0, w.s + i * SIM_KEYS, n_k);
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
  const bool cosine = a->metric == KS_METRIC_COSINE;
  const int64_t d = a->n_cols;
  float *nearest = NULL;
  double *inv_k = NULL, inv_q[SIM_ROWS];
  unsigned char *taken = NULL;
  ks_status status = KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, sim_work_bytes));
  KS_TRY_OUT(ks_alloc_array(&nearest, (size_t)a->n_k, sizeof *nearest, "similarity_farthest_first"));
  KS_TRY_OUT(ks_alloc_array(&taken, (size_t)a->n_k, sizeof *taken, "similarity_farthest_first"));
  if (cosine) {
    KS_TRY_OUT(ks_alloc_array(&inv_k, (size_t)a->n_k, sizeof *inv_k, "similarity_farthest_first"));
    sim_inverse_norms(a->k, a->n_k, d, inv_k);
  }
  for (int64_t j = 0; j < a->n_k; j++)
    nearest[j] = -INFINITY;
  for (int64_t q0 = 0; q0 < a->n_q; q0 += SIM_ROWS) {
    int64_t n_q = ks_min_i64(a->n_q - q0, SIM_ROWS);
    if (cosine) sim_inverse_norms(a->q + q0 * d, n_q, d, inv_q);
    sim_choose(ctx, a, a->q + q0 * d, n_q, inv_q, inv_k, nearest);
  }
  for (int64_t p = 0; p < n_pick; p++) {
    int64_t pick = p == 0 && a->n_q == 0 ? first : sim_farthest(nearest, taken, a->n_k);
    picked[p] = pick;
    taken[pick] = 1;
    if (p + 1 < n_pick) sim_choose(ctx, a, a->k + pick * d, 1, inv_k ? inv_k + pick : NULL, inv_k, nearest);
  }
out:
  free(nearest);
  free(inv_k);
  free(taken);
  return status;
}
