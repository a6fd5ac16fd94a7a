/* Backward: what a launch is told, and what a block of threads finds out about its work. */
#ifndef KS_CUDA_ATTENTION_BACK_WORK_CUH
#define KS_CUDA_ATTENTION_BACK_WORK_CUH

#include "kernels/cuda/attention.cuh"

struct attention_back_params {
  const void *q, *o, *d_o;
  void *dq;
  const float *lse; /* [n_rows, n_heads] */
  float *dot;       /* D: [n_rows, n_heads]; mma: [n_rows, n_heads, 2], lse log2 e and D */
  const attention_seq *seqs;
  const attention_item *items;
  uint64_t magic;
  int64_t kv_stride;
  float scale;  /* not in base 2 */
  float scale2; /* mma: times log2 e, not 0 */
  int32_t n_heads, n_kv_heads, group, d, width, n_sm;
};
static_assert(sizeof(attention_back_params) == 10 * 8 + 8 * 4, "no padding: arguments are compared");

/* The tile is of keys (KEYS) or of rows; what streams, of the other. */
struct attention_back_work {
  attention_seq seq;
  int head, begin, n; /* key head; tile */
  int from, to;       /* streamed rows, or keys */
  int before;         /* keys before the first query */
};
template <bool KEYS>
KS_DEVICE void attention_back_work_at(const attention_back_params *p, int parts, int tile,
                                      attention_back_work *w) {
  const int index = attention_anew(blockIdx.x) / parts;
  const attention_item item = p->items[index / p->n_kv_heads];
  w->seq = p->seqs[item.seq];
  w->head = index % p->n_kv_heads;
  w->begin = item.begin;
  w->before = w->seq.n_k - w->seq.n_q;
  const int n_rows = w->seq.n_q * p->group;
  w->n = attention_min((KEYS ? w->seq.n_k : n_rows) - item.begin, tile);
  w->from = KEYS && item.begin > w->before ? (item.begin - w->before) * p->group : 0;
  w->to = KEYS ? n_rows : w->before + attention_div(w->begin + w->n - 1, p->magic) + 1;
}
/* Whether row r sees key j: r >= group * (j - before). First row that sees key j: */
KS_DEVICE int attention_back_first(const attention_back_params *p, const attention_back_work *w, int j) {
  return j > w->before ? (j - w->before) * p->group : 0;
}
KS_DEVICE int attention_back_seen(const attention_back_params *p, const attention_back_work *w, int r) {
  return w->before + attention_div(r, p->magic) + 1;
}
/* Rows of q, do, dq from row `begin` of the sequence and key head on. */
template <class T>
KS_DEVICE attention_query_rows<T> attention_back_queries(const attention_back_params *p,
                                                         const attention_back_work *w, T *x, int begin) {
  return attention_queries_of(p, &w->seq, w->head, x, begin);
}
template <class T>
KS_DEVICE attention_key_rows<T> attention_back_keys(const attention_back_params *p,
                                                    const attention_back_work *w, T *x, int begin) {
  return {x + begin * p->kv_stride + (int64_t)w->head * p->d, p->kv_stride};
}
/* Rows of q (or do, dq) and of k (or v, dk, dv): those of one. */
template <bool QUERIES, class T>
KS_DEVICE auto attention_back_rows(const attention_back_params *p, const attention_back_work *w, T *queries,
                                   T *keys, int begin) {
  if constexpr (QUERIES)
    return attention_back_queries(p, w, queries, begin);
  else
    return attention_back_keys(p, w, keys, begin);
}
/* Where lse and D of a row lie. */
KS_DEVICE int64_t attention_back_place(const attention_back_params *p, const attention_back_work *w, int r) {
  return attention_first(p, &w->seq, w->head) + attention_place(r, p->magic, p->n_heads - p->group);
}

#endif
