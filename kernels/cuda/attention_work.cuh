/* Forward: what a launch is told, and what a block of threads finds out about its work. */
#ifndef KS_CUDA_ATTENTION_WORK_CUH
#define KS_CUDA_ATTENTION_WORK_CUH

#include "kernels/cuda/attention.cuh"

struct attention_forward_params {
  const void *q;
  void *o;
  float *lse;
  const attention_seq *seqs;
  const attention_item *items;
  const int32_t *pages;
  float *partial_o, *partial_sums; /* [slots, attention_partial_cols(d)], [slots, 2] */
  uint64_t magic;                  /* of group */
  int64_t kv_stride;
  float scale; /* times log2 e */
  int32_t n_heads, n_kv_heads, group, d, page_rows, width;
  int32_t n_stages;                            /* mma: blocks of keys in shared memory */
  int32_t is_negative;                         /* mma: scale is that of -q */
  int32_t n_slices, slice_tiles, round_blocks; /* attention_decode.cuh */
  int32_t n_sm;
  int32_t zero; /* in place of padding: arguments are compared */
};
static_assert(sizeof(attention_forward_params) == 10 * 8 + 14 * 4, "no padding");

/* The work of a block of threads. */
struct attention_work {
  attention_seq seq;
  int head, begin, n_rows;        /* key head; rows begin .. begin + n_rows - 1 of its rows */
  int block, end_block;           /* blocks of keys */
  int before, n_keys, least_seen; /* keys before the first query; seen by the last row; by the first */
};
/* False: nothing to do. `parts` blocks of threads share an item and key head. */
KS_DEVICE bool attention_work_at(const attention_forward_params *p, int parts, int tile_rows,
                                 attention_work *w) {
  const int index = attention_anew(blockIdx.x) / parts;
  const attention_item item = p->items[index / p->n_kv_heads];
  if (item.seq < 0) return false;
  w->seq = p->seqs[item.seq];
  w->head = index % p->n_kv_heads;
  w->begin = item.begin;
  w->n_rows = attention_min(w->seq.n_q * p->group - item.begin, tile_rows);
  w->before = w->seq.n_k - w->seq.n_q;
  w->n_keys = w->before + attention_div(w->begin + w->n_rows - 1, p->magic) + 1;
  w->least_seen = w->before + attention_div(w->begin, p->magic) + 1;
  w->block = item.block;
  w->end_block = attention_min(item.block + item.n_blocks, (w->n_keys + ATTENTION_KEYS - 1) / ATTENTION_KEYS);
  return w->block < w->end_block;
}
KS_DEVICE int attention_seen(const attention_forward_params *p, const attention_work *w, int r) {
  return w->before + attention_div(w->begin + attention_min(r, w->n_rows - 1), p->magic) + 1;
}
/* Keys from `key` on that the two rows of this thread see, of the 16 from `row` on. */
KS_DEVICE void attention_seen_here(const attention_forward_params *p, const attention_work *w, int row,
                                   int key, int seen[2]) {
  const int r = w->begin + row + attention_lane() / 4; /* beyond the last row: of no matter */
  seen[0] = w->before + attention_div(r, p->magic) + 1 - key;
  seen[1] = w->before + attention_div(r + 8, p->magic) + 1 - key;
}
/* Row r of the tile among all (query, head). */
KS_DEVICE int64_t attention_row(const attention_forward_params *p, const attention_work *w, int r) {
  return attention_first(p, &w->seq, w->head) +
         attention_place(w->begin + r, p->magic, p->n_heads - p->group);
}
KS_DEVICE int64_t attention_slot(const attention_forward_params *p, const attention_work *w, int block,
                                 int r) {
  return w->seq.partial + ((int64_t)block * w->seq.n_q - w->seq.q_begin) * p->n_heads +
         attention_row(p, w, r);
}
template <class T>
KS_DEVICE attention_query_rows<T> attention_queries(const attention_forward_params *p,
                                                    const attention_work *w, T *x) {
  return attention_queries_of(p, &w->seq, w->head, x, w->begin);
}
template <class T>
KS_DEVICE attention_key_rows<T> attention_keys(const attention_forward_params *p, const attention_work *w,
                                               const void *x, int block) {
  const int64_t row = attention_key_row(&w->seq, p->pages, p->page_rows, block * ATTENTION_KEYS);
  return {(T *)x + row * p->kv_stride + (int64_t)w->head * p->d, p->kv_stride};
}
KS_DEVICE int attention_block_keys(const attention_work *w, int block) {
  return attention_min(w->n_keys - block * ATTENTION_KEYS, ATTENTION_KEYS);
}
/* Stride of partial_o: whole 16 bytes. */
KS_HOST_DEVICE int attention_partial_cols(int d) {
  return (d + 3) / 4 * 4;
}

#endif
