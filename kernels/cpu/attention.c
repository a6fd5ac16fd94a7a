/* Causal grouped-query attention over packed sequences, forward.
 *
 *   o = softmax(q k^T * scale, causal) v per head,  lse = log sum exp(q k^T * scale)
 *
 * Online softmax over blocks of ATTENTION_KEYS keys counted from key 0 (Milakov & Gimelshein 2018; Dao 2023):
 *
 *   m' = max(m, max s), c = exp(m - m'), p = exp(s - m'), l = l c + sum p, o = o c + p v;   at the end o / l.
 *
 * A task is (sequence, key head, block of query rows); a row is one (query, query head of the group), so that
 * the heads that share a key head read its keys once. A block of keys lies in one page: paged or not makes no
 * difference but for where it is.
 *
 * Bytes: q and o once, k and v once for each block of rows (streamed from cache).
 * Flops: 4 d for each visible (query, key) and head, and some 20 for its exponential.
 *
 * Determinism: a score is an fma chain over d (L = d); l has 16 lanes (key mod 16); o is an fma chain over
 * the keys in rising order (L = n_k); lse takes one logarithm of the C library. No bit depends on the other
 * rows of a task, so prefill and decode agree. */
#include "kernels/cpu/tile.h"
#include <math.h>

enum { ATTENTION_KEYS = KS_ATTENTION_PAGE_UNIT, ATTENTION_ROWS = 96 };
_Static_assert(ATTENTION_KEYS == 64, "attention_scale_row unrolls four vectors of 16");

/* One task's memory; rows are those of its block. */
typedef struct {
  int64_t *at;   /* [ATTENTION_ROWS]: which (row, head) of q and o it is */
  int64_t *seen; /* [ATTENTION_ROWS]: how many keys it sees; never falls */
  float *q;      /* [ATTENTION_ROWS, d] */
  float *o;      /* [ATTENTION_ROWS, d] */
  float *max;    /* [ATTENTION_ROWS] */
  float *sum;    /* [ATTENTION_ROWS, KS_LANES] */
  float *scores; /* [TILE_ROWS, ATTENTION_KEYS] */
  float *keys;   /* [d, ATTENTION_KEYS]: transposed */
} attention_work;

static size_t attention_work_bytes(int64_t d) {
  return 2 * ATTENTION_ROWS * sizeof(int64_t) +
         (size_t)(2 * ATTENTION_ROWS * d + ATTENTION_ROWS * (1 + KS_LANES) + TILE_ROWS * ATTENTION_KEYS +
                  d * ATTENTION_KEYS) *
             sizeof(float);
}

static attention_work attention_work_at(void *memory, int64_t d) {
  attention_work w;
  float *p = memory;
  w.keys = p, p += d * ATTENTION_KEYS;
  w.scores = p, p += TILE_ROWS * ATTENTION_KEYS;
  w.sum = p, p += ATTENTION_ROWS * KS_LANES;
  w.max = p, p += ATTENTION_ROWS;
  w.q = p, p += ATTENTION_ROWS * d;
  w.o = p, p += ATTENTION_ROWS * d;
  w.at = (int64_t *)(void *)p;
  w.seen = w.at + ATTENTION_ROWS;
  return w;
}

/* Rows of one key head: row r is query r / group, query head head * group + r % group. */
typedef struct {
  const ks_attention_args *a;
  const ks_attention_seq *seq;
  int64_t head, group, row_begin, n_rows;
} attention_task;

/* Lanes from n on become -inf. */
KS_INLINE ks_v attention_mask(ks_v x, int64_t n) {
  static const float lane[KS_LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ks_v_select(ks_v_lt(ks_v_load(lane), ks_v_set((float)n)), x, ks_v_set(-INFINITY));
}

enum { ATTENTION_VECS = ATTENTION_KEYS / KS_LANES };

/* Scales one row of scores in place, those from n on become -inf; returns the largest. */
KS_INLINE float attention_scale_row(float *s, int64_t n, float scale) {
  ks_v x[ATTENTION_VECS];
#pragma GCC unroll 4
  for (int v = 0; v < ATTENTION_VECS; v++) {
    x[v] = ks_v_mul(ks_v_load(s + v * KS_LANES), ks_v_set(scale));
    if (n < ATTENTION_KEYS) x[v] = attention_mask(x[v], n - v * KS_LANES);
    ks_v_store(s + v * KS_LANES, x[v]);
  }
  return ks_v_max_lane(ks_v_max(ks_v_max(x[0], x[1]), ks_v_max(x[2], x[3])));
}

/* Scores of `rows` rows against a block to exp(score - new maximum), 0 from seen[r] on. keep[r]: the factor
 * for what was summed before. */
static void attention_softmax(float *scores, int64_t rows, const int64_t *seen, float scale, float *max,
                              float *sum, float *keep) {
  float now[KS_LANES] = {0}, base[KS_LANES];
  for (int64_t r = 0; r < rows; r++)
    now[r] = attention_scale_row(scores + r * ATTENTION_KEYS, seen[r], scale);
  const ks_v old = ks_v_load_n(max, rows), top = ks_v_max(ks_v_load(now), old), none = ks_v_set(-INFINITY);
  /* nothing but -inf so far: exp(-inf - 0) = 0 */
  const ks_v from = ks_v_select(ks_v_eq(top, none), ks_v_zero(), top);
  ks_v_store(base, from);
  ks_v_store_n(keep, ks_v_exp(ks_v_sub(old, from)), rows);
  ks_v_store_n(max, top, rows);
  for (int64_t r = 0; r < rows; r++) {
    const ks_v b = ks_v_set(base[r]);
    ks_v partial = ks_v_mul(ks_v_load(sum + r * KS_LANES), ks_v_set(keep[r]));
#pragma GCC unroll 4
    for (int v = 0; v < ATTENTION_VECS; v++) {
      float *s = scores + r * ATTENTION_KEYS + v * KS_LANES;
      ks_v p = ks_v_exp(ks_v_sub(ks_v_load(s), b));
      ks_v_store(s, p);
      partial = ks_v_add(partial, p);
    }
    ks_v_store(sum + r * KS_LANES, partial);
  }
}

/* Where the block of keys that starts at key k0 begins in k and v. */
static int64_t attention_block_at(const attention_task *t, int64_t k0) {
  const int64_t page_rows = t->a->page_rows;
  const int64_t row = t->seq->pages ? t->seq->pages[k0 / page_rows] * page_rows + k0 % page_rows : k0;
  return row * t->a->kv_stride + t->head * t->a->head_dim;
}

/* Rows r0 .. r0 + rows - 1 against the block of keys that starts at key k0; each sees at least one of them.
 */
static void attention_tile(const attention_task *t, const attention_work *w, int64_t r0, int64_t rows,
                           int64_t k0) {
  const ks_attention_args *a = t->a;
  const int64_t d = a->head_dim, kv = a->kv_stride;
  int64_t seen[TILE_ROWS];
  float keep[TILE_ROWS];
  for (int64_t r = 0; r < rows; r++)
    seen[r] = ks_min_i64(w->seen[r0 + r] - k0, ATTENTION_KEYS);
  const int64_t most = seen[rows - 1];
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
  attention_softmax(w->scores, rows, seen, a->scale, w->max + r0, w->sum + r0 * KS_LANES, keep);
  /* On the diagonal later rows see more; a row reads no value that it does not see. */
  tile_product((tile_args){.a = w->scores,
                           .a_row = ATTENTION_KEYS,
                           .a_col = 1,
                           .b = ks_in(t->seq->v) + attention_block_at(t, k0),
                           .b_row = kv,
                           .c = w->o + r0 * d,
                           .c_row = d,
                           .m = rows,
                           .n = d,
                           .depth = seen[0],
                           .accumulate = true,
                           .row_scale = keep,
                           .row_depth = most > seen[0] ? seen : NULL});
}

static void attention_finish_row(const ks_attention_args *a, const attention_work *w, int64_t r) {
  const int64_t d = a->head_dim;
  float l = ks_v_sum(ks_v_load(w->sum + r * KS_LANES)), *to = ks_out(a->o) + w->at[r] * d;
  const ks_v inverse = ks_v_set(1.0f / l);
  for (int64_t j = 0; j < d; j += KS_LANES)
    ks_v_store_n(to + j, ks_v_mul(ks_v_load_n(w->o + r * d + j, d - j), inverse), d - j);
  if (a->lse) a->lse[w->at[r]] = (float)((double)w->max[r] + log((double)l));
}

static void attention_task_run(const attention_task *t, const attention_work *w) {
  const int64_t d = t->a->head_dim, kv = t->a->kv_stride;
  for (int64_t r = 0; r < t->n_rows; r++) {
    const int64_t i = (t->row_begin + r) / t->group, g = (t->row_begin + r) % t->group;
    w->at[r] = (t->seq->q_begin + i) * t->a->n_heads + t->head * t->group + g;
    w->seen[r] = t->seq->n_k - t->seq->n_q + i + 1;
    w->max[r] = -INFINITY;
    memcpy(w->q + r * d, ks_in(t->a->q) + w->at[r] * d, (size_t)d * sizeof(float));
  }
  memset(w->o, 0, (size_t)(t->n_rows * d) * sizeof(float));
  memset(w->sum, 0, (size_t)(t->n_rows * KS_LANES) * sizeof(float));
  const int64_t n_keys = w->seen[t->n_rows - 1];
  for (int64_t k0 = 0, first = 0; k0 < n_keys; k0 += ATTENTION_KEYS) {
    tile_transpose(ks_in(t->seq->k) + attention_block_at(t, k0), kv, ks_min_i64(n_keys - k0, ATTENTION_KEYS),
                   d, w->keys, ATTENTION_KEYS);
    while (w->seen[first] <= k0)
      first++;
    for (int64_t r = first; r < t->n_rows; r += TILE_ROWS)
      attention_tile(t, w, r, ks_min_i64(t->n_rows - r, TILE_ROWS), k0);
  }
  for (int64_t r = 0; r < t->n_rows; r++)
    attention_finish_row(t->a, w, r);
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
  KS_TRY(ks_cpu_scratch_reserve(ctx, attention_work_bytes(a->head_dim)));
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
