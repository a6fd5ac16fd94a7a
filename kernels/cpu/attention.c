/* Causal grouped-query attention over packed sequences, forward.
 *   o = softmax(q k^T * scale, causal) v per head,  lse = log sum exp(q k^T * scale)
 * Online softmax over blocks of ATTENTION_KEYS keys counted from key 0 (Milakov & Gimelshein 2018; Dao 2023):
 *   m' = max(m, max s), c = exp(m - m'), p = exp(s - m'), l = l c + sum p, o = o c + p v;   at the end o / l.
 * A task is (sequence, key head, block of query rows); a row is one (query, query head of the group), so that
 * the heads that share a key head read its keys once.
 * Bytes: q and o once, k and v once for each block of rows (streamed from cache). Flops: 4 d for each visible
 * (query, key) and head, and some 20 for its exponential.
 * Determinism: a score is an fma chain over d (L = d); l has 16 lanes (key mod 16); o is an fma chain over
 * the keys in rising order (L = n_k). No bit depends on the other rows of a task, so prefill and decode
 * agree. */
#include "kernels/cpu/tile.h"
#include <math.h>

enum { ATTENTION_KEYS = 64, ATTENTION_ROWS = 96 };

/* One task's memory; rows are those of its block. */
typedef struct {
  float *q;      /* [ATTENTION_ROWS, d] */
  float *o;      /* [ATTENTION_ROWS, d] */
  float *max;    /* [ATTENTION_ROWS] */
  float *sum;    /* [ATTENTION_ROWS, KS_LANES] */
  float *scores; /* [TILE_ROWS, ATTENTION_KEYS] */
  float *keys;   /* [d, ATTENTION_KEYS]: transposed */
} attention_work;

static size_t attention_work_floats(int64_t d) {
  return (size_t)(2 * ATTENTION_ROWS * d + ATTENTION_ROWS * (1 + KS_LANES) + TILE_ROWS * ATTENTION_KEYS +
                  d * ATTENTION_KEYS);
}

static attention_work attention_work_at(float *p, int64_t d) {
  attention_work w;
  w.keys = p, p += d * ATTENTION_KEYS;
  w.scores = p, p += TILE_ROWS * ATTENTION_KEYS;
  w.sum = p, p += ATTENTION_ROWS * KS_LANES;
  w.max = p, p += ATTENTION_ROWS;
  w.q = p, p += ATTENTION_ROWS * d;
  w.o = p;
  return w;
}

/* Rows of one key head: row r is query r / group, query head head * group + r % group. */
typedef struct {
  const ks_attention_args *a;
  const ks_attention_seq *seq;
  int64_t head, group, row_begin, n_rows;
} attention_task;

KS_INLINE int64_t attention_offset(const attention_task *t, int64_t r) {
  int64_t i = t->row_begin + r;
  return ((t->seq->q_begin + i / t->group) * t->a->n_heads + t->head * t->group + i % t->group);
}
/* How many keys row r sees. */
KS_INLINE int64_t attention_visible(const attention_task *t, int64_t r) {
  return t->seq->n_k - t->seq->n_q + (t->row_begin + r) / t->group + 1;
}

/* Lanes from n on become -inf. */
KS_INLINE ks_v attention_mask(ks_v x, int64_t n) {
  static const float lane[KS_LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ks_v_select(ks_v_lt(ks_v_load(lane), ks_v_set((float)n)), x, ks_v_set(-INFINITY));
}

/* Scores of one row against a block in place to exp(score - new maximum), the first n of them; the others to
 * 0. Returns the factor for what was summed before. */
KS_INLINE float attention_softmax_row(float *s, int64_t n, float scale, float *max, float *sum) {
  enum { VECS = ATTENTION_KEYS / KS_LANES };
  ks_v x[VECS];
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++)
    x[v] = ks_v_mul(ks_v_load(s + v * KS_LANES), ks_v_set(scale));
  if (n < ATTENTION_KEYS)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++)
      x[v] = attention_mask(x[v], n - v * KS_LANES);
  ks_v top = ks_v_max(ks_v_max(x[0], x[1]), ks_v_max(x[2], x[3]));
  float old = *max, row_top = ks_v_max_lane(top), now = row_top > old ? row_top : old, keep = 1.0f;
  /* nothing but -inf so far: exp(-inf - 0) = 0 */
  ks_v base = ks_v_set(now == -INFINITY ? 0.0f : now), partial = ks_v_load(sum);
  if (old != now) {
    ks_v c = ks_v_exp(ks_v_sub(ks_v_set(old), base));
    keep = c.p[0][0];
    partial = ks_v_mul(partial, c);
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    x[v] = ks_v_exp(ks_v_sub(x[v], base));
    ks_v_store(s + v * KS_LANES, x[v]);
    partial = ks_v_add(partial, x[v]);
  }
  ks_v_store(sum, partial);
  *max = now;
  return keep;
}

KS_INLINE void attention_scale(float *x, int64_t n, float factor) {
  for (int64_t j = 0; j < n; j += KS_LANES)
    ks_v_store_n(x + j, ks_v_mul(ks_v_load_n(x + j, n - j), ks_v_set(factor)), n - j);
}

/* Rows r0 .. r0 + rows - 1 against the block of keys that starts at key k0; each sees at least one of them.
 */
static void attention_tile(const attention_task *t, const attention_work *w, int64_t r0, int64_t rows,
                           int64_t k0) {
  const ks_attention_args *a = t->a;
  const int64_t d = a->head_dim, kv = a->kv_stride;
  const float *values = t->seq->v + k0 * kv + t->head * d;
  int64_t seen[TILE_ROWS], most = 0;
  for (int64_t r = 0; r < rows; r++) {
    seen[r] = ks_min_i64(attention_visible(t, r0 + r) - k0, ATTENTION_KEYS);
    most = seen[r]; /* never falls */
  }
  tile_product((tile_args){.a = w->q + r0 * d,
                           .a_row = d,
                           .a_col = 1,
                           .b = w->keys,
                           .b_row = ATTENTION_KEYS,
                           .c = w->scores,
                           .c_row = ATTENTION_KEYS,
                           .m = rows,
                           .n = (most + KS_LANES - 1) / KS_LANES * KS_LANES,
                           .depth = d});
  for (int64_t r = 0; r < rows; r++) {
    float keep = attention_softmax_row(w->scores + r * ATTENTION_KEYS, seen[r], a->scale, w->max + r0 + r,
                                       w->sum + (r0 + r) * KS_LANES);
    if (keep != 1.0f) attention_scale(w->o + (r0 + r) * d, d, keep);
  }
  /* On the diagonal later rows see more; a row reads no value that it does not see. */
  tile_product((tile_args){.a = w->scores,
                           .a_row = ATTENTION_KEYS,
                           .a_col = 1,
                           .b = values,
                           .b_row = kv,
                           .c = w->o + r0 * d,
                           .c_row = d,
                           .m = rows,
                           .n = d,
                           .depth = seen[0],
                           .accumulate = true,
                           .row_depth = most > seen[0] ? seen : NULL});
}

static void attention_finish_row(const attention_task *t, const attention_work *w, int64_t r) {
  const int64_t d = t->a->head_dim, at = attention_offset(t, r);
  float l = ks_v_sum(ks_v_load(w->sum + r * KS_LANES));
  ks_v inverse = ks_v_set(1.0f / l);
  const float *o = w->o + r * d;
  for (int64_t j = 0; j < d; j += KS_LANES)
    ks_v_store_n(t->a->o + at * d + j, ks_v_mul(ks_v_load_n(o + j, d - j), inverse), d - j);
  if (t->a->lse) t->a->lse[at] = (float)((double)w->max[r] + log((double)l));
}

static void attention_task_run(const attention_task *t, const attention_work *w) {
  const int64_t d = t->a->head_dim, kv = t->a->kv_stride;
  for (int64_t r = 0; r < t->n_rows; r++) {
    memcpy(w->q + r * d, t->a->q + attention_offset(t, r) * d, (size_t)d * sizeof(float));
    w->max[r] = -INFINITY;
  }
  memset(w->o, 0, (size_t)(t->n_rows * d) * sizeof(float));
  memset(w->sum, 0, (size_t)(t->n_rows * KS_LANES) * sizeof(float));
  const int64_t n_keys = attention_visible(t, t->n_rows - 1);
  for (int64_t k0 = 0, first = 0; k0 < n_keys; k0 += ATTENTION_KEYS) {
    tile_transpose(t->seq->k + k0 * kv + t->head * d, kv, ks_min_i64(n_keys - k0, ATTENTION_KEYS), d, w->keys,
                   ATTENTION_KEYS);
    while (attention_visible(t, first) <= k0)
      first++;
    for (int64_t r = first; r < t->n_rows; r += TILE_ROWS)
      attention_tile(t, w, r, ks_min_i64(t->n_rows - r, TILE_ROWS), k0);
  }
  for (int64_t r = 0; r < t->n_rows; r++)
    attention_finish_row(t, w, r);
}

/* The work in simple operations, and the most row blocks of a sequence. */
static int64_t attention_work_estimate(const ks_attention_args *a, int64_t per_pair, int64_t *max_rows) {
  double work = 0;
  *max_rows = 0;
  for (int64_t s = 0; s < a->n_seqs; s++) {
    work += (double)a->seqs[s].n_q * (double)a->seqs[s].n_k;
    *max_rows = ks_max_i64(*max_rows, a->seqs[s].n_q * (a->n_heads / a->n_kv_heads));
  }
  work *= (double)(a->n_heads * (a->head_dim + 8) * per_pair) / 2;
  return work < 1e15 ? (int64_t)work : (int64_t)1e15;
}

static ks_status attention_forward(ks_ctx *ctx, const ks_attention_args *a) {
  int64_t max_rows;
  const int64_t group = a->n_heads / a->n_kv_heads, work = attention_work_estimate(a, 2, &max_rows);
  const int64_t n_blocks = (max_rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
  if (max_rows == 0) return KS_OK;
  KS_TRY(ks_cpu_scratch_reserve(ctx, attention_work_floats(a->head_dim) * sizeof(float)));
#pragma omp parallel for collapse(3) num_threads(ks_cpu_threads(ctx, work)) schedule(dynamic)
  for (int64_t b = 0; b < n_blocks; b++)
    for (int64_t s = 0; s < a->n_seqs; s++)
      for (int64_t h = 0; h < a->n_kv_heads; h++) {
        const ks_attention_seq *seq = &a->seqs[s];
        int64_t row_begin = (n_blocks - 1 - b) * ATTENTION_ROWS; /* the longest first */
        int64_t n_rows = ks_min_i64(seq->n_q * group - row_begin, ATTENTION_ROWS);
        if (n_rows <= 0) continue;
        attention_task task = {a, seq, h, group, row_begin, n_rows};
        attention_work w = attention_work_at(ks_cpu_scratch(ctx, omp_get_thread_num()), a->head_dim);
        attention_task_run(&task, &w);
      }
  return KS_OK;
}
