/* Causal grouped-query attention, backward.
 *
 *   D = rowsum(do * o);  p = exp(s - lse);  ds = scale * p * (do v^T - D)
 *   dv = p^T do;  dq = ds k;  dk = ds^T q
 *
 * A task is (sequence, key head): blocks of keys in rising order outside, inside the query heads of the group
 * and blocks of queries in rising order; probabilities are computed again from lse.
 *
 * Bytes: q, do, dq once for each block of keys (from cache), k, v, dk, dv once.
 * Flops: 10 d for each visible (query, key) and head, and some 20 for its exponential.
 *
 * Determinism: s and do v^T are fma chains over d; dq of a row is an fma chain over keys in rising order
 * (L = n_k); dk and dv of a key over (query head, query) in rising order (L = group * n_q); D has 16 lanes.
 * Invisible pairs inside a block take part with p = ds = 0. No bit depends on other sequences or threads. */
#include "kernels/cpu/tile.h"

enum { ATTENTION_BACK_ROWS = 48 };

typedef struct {
  float *keys, *values; /* [d, ATTENTION_KEYS]: transposed */
  float *dk, *dv;       /* [ATTENTION_KEYS, d] */
  float *p, *ds;        /* [ATTENTION_BACK_ROWS, ATTENTION_KEYS] */
  float *dot;           /* [n_q * group]: D */
} attention_back_work;

static size_t attention_back_floats(int64_t d, int64_t max_rows) {
  return (size_t)(4 * d * ATTENTION_KEYS + 2 * ATTENTION_BACK_ROWS * ATTENTION_KEYS + max_rows);
}

static attention_back_work attention_back_work_at(float *x, int64_t d) {
  attention_back_work w;
  w.keys = x, x += d * ATTENTION_KEYS;
  w.values = x, x += d * ATTENTION_KEYS;
  w.dk = x, x += d * ATTENTION_KEYS;
  w.dv = x, x += d * ATTENTION_KEYS;
  w.p = x, x += ATTENTION_BACK_ROWS * ATTENTION_KEYS;
  w.ds = x, x += ATTENTION_BACK_ROWS * ATTENTION_KEYS;
  w.dot = x;
  return w;
}

/* p and ds of one row from its scores (in p) and its do v^T (in ds). */
KS_INLINE void attention_back_row(float *p, float *ds, int64_t seen, int64_t width, float scale, float lse,
                                  float dot) {
  static const float lane[KS_LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const ks_v factor = ks_v_set(scale), minus_lse = ks_v_set(-lse), minus_dot = ks_v_set(-dot);
  for (int64_t j = 0; j < width; j += KS_LANES) {
    ks_v prob = ks_v_exp(ks_v_fma(ks_v_load(p + j), factor, minus_lse));
    ks_v grad = ks_v_mul(ks_v_mul(prob, ks_v_add(ks_v_load(ds + j), minus_dot)), factor);
    if (seen - j < KS_LANES) {
      ks_vi visible = ks_v_lt(ks_v_load(lane), ks_v_set((float)(seen - j)));
      prob = ks_v_select(visible, prob, ks_v_zero());
      grad = ks_v_select(visible, grad, ks_v_zero());
    }
    ks_v_store(p + j, prob);
    ks_v_store(ds + j, grad);
  }
}

/* Queries i0 .. i0 + n - 1 of query head `head` against n_keys keys from k0. */
static void attention_back_block(const ks_attention_args *a, const ks_attention_seq *seq,
                                 const attention_back_work *w, int64_t head, int64_t i0, int64_t n,
                                 int64_t k0, int64_t n_keys) {
  const int64_t d = a->head_dim, row = a->n_heads * d, kv_head = head / (a->n_heads / a->n_kv_heads);
  const int64_t at = (seq->q_begin + i0) * row + head * d, before = seq->n_k - seq->n_q - k0;
  const int64_t width = (n_keys + KS_LANES - 1) / KS_LANES * KS_LANES;
  tile_args t = {.a = ks_in(a->q) + at,
                 .a_row = row,
                 .a_col = 1,
                 .b = w->keys,
                 .b_row = ATTENTION_KEYS,
                 .c = w->p,
                 .c_row = ATTENTION_KEYS,
                 .m = n,
                 .n = width,
                 .depth = d};
  tile_product(t);
  t.a = ks_in(a->d_o) + at;
  t.b = w->values;
  t.c = w->ds;
  tile_product(t);
  for (int64_t i = 0; i < n; i++)
    attention_back_row(w->p + i * ATTENTION_KEYS, w->ds + i * ATTENTION_KEYS, before + i0 + i + 1, width,
                       a->scale, a->lse[(seq->q_begin + i0 + i) * a->n_heads + head], w->dot[i0 + i]);
  tile_product((tile_args){.a = w->ds,
                           .a_row = ATTENTION_KEYS,
                           .a_col = 1,
                           .b = ks_in(seq->k) + k0 * a->kv_stride + kv_head * d,
                           .b_row = a->kv_stride,
                           .c = ks_out(a->dq) + at,
                           .c_row = row,
                           .m = n,
                           .n = d,
                           .depth = n_keys,
                           .accumulate = true});
  t = (tile_args){.a = w->p,
                  .a_row = 1,
                  .a_col = ATTENTION_KEYS,
                  .b = ks_in(a->d_o) + at,
                  .b_row = row,
                  .c = w->dv,
                  .c_row = d,
                  .m = n_keys,
                  .n = d,
                  .depth = n,
                  .accumulate = true};
  tile_product(t);
  t.a = w->ds;
  t.b = ks_in(a->q) + at;
  t.c = w->dk;
  tile_product(t);
}

/* D of every query of one head; dq starts at zero. */
static void attention_back_start(const ks_attention_args *a, const ks_attention_seq *seq, int64_t head,
                                 float *dot) {
  const int64_t d = a->head_dim;
  for (int64_t i = 0; i < seq->n_q; i++) {
    int64_t at = ((seq->q_begin + i) * a->n_heads + head) * d;
    ks_v sum = ks_v_zero();
    for (int64_t j = 0; j < d; j += KS_LANES)
      sum = ks_v_fma(ks_v_load_n(ks_in(a->d_o) + at + j, d - j), ks_v_load_n(ks_in(a->o) + at + j, d - j), sum);
    dot[i] = ks_v_sum(sum);
    memset(ks_out(a->dq) + at, 0, (size_t)d * sizeof(float));
  }
}

static void attention_back_task(const ks_attention_args *a, const ks_attention_seq *seq, int64_t kv_head,
                                const attention_back_work *w) {
  const int64_t d = a->head_dim, kv = a->kv_stride, group = a->n_heads / a->n_kv_heads;
  for (int64_t g = 0; g < group; g++)
    attention_back_start(a, seq, kv_head * group + g, w->dot + g * seq->n_q);
  for (int64_t k0 = 0; k0 < seq->n_k; k0 += ATTENTION_KEYS) {
    const int64_t n_keys = ks_min_i64(seq->n_k - k0, ATTENTION_KEYS), at = k0 * kv + kv_head * d;
    const int64_t first = ks_max_i64(k0 - (seq->n_k - seq->n_q), 0); /* the first query that sees key k0 */
    tile_transpose(ks_in(seq->k) + at, kv, n_keys, d, w->keys, ATTENTION_KEYS);
    tile_transpose(ks_in(seq->v) + at, kv, n_keys, d, w->values, ATTENTION_KEYS);
    memset(w->dk, 0, (size_t)(n_keys * d) * sizeof(float));
    memset(w->dv, 0, (size_t)(n_keys * d) * sizeof(float));
    for (int64_t g = 0; g < group; g++) {
      attention_back_work head_work = *w;
      head_work.dot = w->dot + g * seq->n_q;
      for (int64_t i = first; i < seq->n_q; i += ATTENTION_BACK_ROWS)
        attention_back_block(a, seq, &head_work, kv_head * group + g, i,
                             ks_min_i64(seq->n_q - i, ATTENTION_BACK_ROWS), k0, n_keys);
    }
    for (int64_t j = 0; j < n_keys; j++) {
      memcpy(ks_out(seq->dk) + at + j * kv, w->dk + j * d, (size_t)d * sizeof(float));
      memcpy(ks_out(seq->dv) + at + j * kv, w->dv + j * d, (size_t)d * sizeof(float));
    }
  }
}

static ks_status attention_backward(ks_ctx *ctx, const ks_attention_args *a) {
  int64_t max_rows;
  const int64_t work = attention_work_estimate(a, 5, &max_rows);
  KS_TRY(ks_cpu_scratch_reserve(ctx, attention_back_floats(a->head_dim, max_rows) * sizeof(float)));
#pragma omp parallel for collapse(2) num_threads(ks_cpu_threads(ctx, work)) schedule(dynamic)
  for (int64_t s = 0; s < a->n_seqs; s++)
    for (int64_t h = 0; h < a->n_kv_heads; h++) {
      attention_back_work w = attention_back_work_at(ks_cpu_scratch(ctx, omp_get_thread_num()), a->head_dim);
      attention_back_task(a, &a->seqs[s], h, &w);
    }
  return KS_OK;
}
