/* The tables of a forward launch: which block of threads does what (attention.cu). Made on the host at every
 * call and staged, because a decoding step changes lengths and pages, but should change nothing that a
 * recorded step holds: tables are made a little too long. */
#ifndef KS_CUDA_ATTENTION_PLAN_CUH
#define KS_CUDA_ATTENTION_PLAN_CUH

#include "kernels/cuda/attention.cuh"
#include <stdlib.h>

/* Of the simt kernels: few queries against their keys, a matter of the sequence alone, and of speed alone. */
static inline bool attention_is_split(const ks_attention_seq *s) {
  return s->n_q <= 16 && 8 * s->n_q <= s->n_k && s->n_k > ATTENTION_KEYS;
}

/* What the launches need. Of a pair, [1] is of the sequences with few rows (mma), or of the split ones (simt). */
struct attention_plan {
  int64_t group, n_pages;
  int tile_rows[2];    /* of a block of threads */
  int few_rows;        /* mma: sequences of so many rows are few; 0: simt */
  int64_t few_queries; /* most of one of these */
  int per_item;        /* blocks of keys of an item of a split sequence */
  int64_t n_items[2], cap_items[2], n_split_rows;
  int64_t n_slots; /* partial results: (block, query, head) of split sequences */
  attention_seq *seqs;
  attention_item *items; /* those of [0], from [cap_items[0]] on those of [1] */
  attention_split_row *rows;
  int32_t *pages;
};
/* Its tables on the device. */
struct attention_tables {
  const attention_seq *seqs;
  const attention_item *items;
  const attention_split_row *rows;
  const int32_t *pages;
};

static inline int64_t attention_blocks(int64_t n_keys) {
  return (n_keys + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
}

static inline bool attention_is_second(const attention_plan *p, const ks_attention_seq *s) {
  return p->few_rows ? s->n_q * p->group <= p->few_rows : attention_is_split(s);
}

/* Sizes of everything; group, tile_rows and few_rows are set. */
static inline void attention_measure(const ks_attention_args *a, int n_sm, attention_plan *p) {
  int64_t split_blocks = 0;
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *seq = &a->seqs[s];
    if (seq->pages && seq->n_q) p->n_pages += (seq->n_k + a->page_rows - 1) / a->page_rows;
    if (p->few_rows || !attention_is_split(seq)) continue;
    split_blocks += attention_blocks(seq->n_k);
    p->n_split_rows += seq->n_q;
    p->n_slots += attention_blocks(seq->n_k) * seq->n_q * a->n_heads;
  }
  p->per_item = 1; /* a block of threads a block of keys, until there are enough to fill the device */
  while (p->per_item < 8 && split_blocks * a->n_kv_heads > 16ll * n_sm * p->per_item)
    p->per_item *= 2;
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *seq = &a->seqs[s];
    const bool second = attention_is_second(p, seq);
    if (!seq->n_q) continue;
    if (second && seq->n_q > p->few_queries) p->few_queries = seq->n_q;
    const int64_t tiles = (seq->n_q * p->group + p->tile_rows[second] - 1) / p->tile_rows[second];
    p->n_items[second] +=
        tiles * (second && !p->few_rows ? (attention_blocks(seq->n_k) + p->per_item - 1) / p->per_item : 1);
  }
  for (int i = 0; i < 2; i++)
    p->cap_items[i] = !p->n_items[i]          ? 0
                      : i == 1 && p->few_rows ? p->n_items[i] /* one a sequence: their number does not grow */
                                              : attention_coarse(p->n_items[i]);
}

static inline void attention_fill_items(const ks_attention_args *a, int64_t cache_bytes, attention_plan *p) {
  attention_item *next[2] = {p->items, p->items + p->cap_items[0]};
  attention_rounds rounds = attention_rounds_of(a, cache_bytes);
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *seq = &a->seqs[s];
    const bool second = attention_is_second(p, seq), split = second && !p->few_rows;
    const int64_t rows = seq->n_q * p->group;
    const int32_t round = attention_round_of(&rounds, seq->n_k);
    for (int64_t r = 0; r < rows; r += p->tile_rows[second]) {
      const int64_t last = r + p->tile_rows[second] < rows ? r + p->tile_rows[second] - 1 : rows - 1;
      const int64_t n = attention_blocks(seq->n_k - seq->n_q + last / p->group + 1);
      const int64_t all = split ? attention_blocks(seq->n_k) : n, per = split ? p->per_item : n;
      for (int64_t b = 0; b < all; b += per)
        *next[second]++ = {(int32_t)s, (int32_t)r, (int32_t)(split ? b : round), (int32_t)per};
    }
  }
  for (int i = 0; i < 2; i++) {
    attention_item *first = p->items + (i ? p->cap_items[0] : 0);
    if (i && !p->few_rows) break;
    qsort(first, (size_t)p->n_items[i], sizeof *first, attention_by_length);
    for (int64_t n = 0; n < p->n_items[i]; n++)
      first[n].block = 0;
  }
  for (int i = 0; i < 2; i++)
    for (int64_t n = p->n_items[i]; n < p->cap_items[i]; n++)
      *next[i]++ = {-1, 0, 0, 0};
}

static inline void attention_fill_seqs(const ks_attention_args *a, attention_plan *p) {
  int64_t partial = 0, n_pages = 0, n_rows = 0;
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *seq = &a->seqs[s];
    p->seqs[s] = {seq->k,           seq->v, NULL, NULL, seq->q_begin, -1, partial, (int32_t)seq->n_q,
                  (int32_t)seq->n_k};
    if (seq->pages && seq->n_q) {
      p->seqs[s].pages = n_pages;
      for (int64_t i = 0; i * a->page_rows < seq->n_k; i++)
        p->pages[n_pages++] = seq->pages[i];
    }
    if (p->few_rows || !attention_is_split(seq)) continue;
    partial += attention_blocks(seq->n_k) * seq->n_q * a->n_heads;
    for (int64_t i = 0; i < seq->n_q; i++)
      p->rows[n_rows++] = {(int32_t)s, (int32_t)i};
  }
  for (; p->n_pages && n_pages < attention_coarse(p->n_pages); n_pages++)
    p->pages[n_pages] = 0;
}

/* Fills the tables and the places of their copies on the device. Pages are the same in all layers of a model, the rest is not and
 * comes in one copy. */
static inline ks_status attention_stage(ks_ctx *ctx, const ks_attention_args *a, attention_plan *p,
                                        attention_tables *t) {
  const int64_t n_items = p->cap_items[0] + p->cap_items[1],
                n_pages = p->n_pages ? attention_coarse(p->n_pages) : 0;
  const size_t seq_bytes = (size_t)a->n_seqs * sizeof *p->seqs,
               item_bytes = (size_t)n_items * sizeof *p->items,
               bytes = seq_bytes + item_bytes + (size_t)p->n_split_rows * sizeof *p->rows,
               page_bytes = (size_t)n_pages * sizeof *p->pages;
  char *memory = (char *)malloc(bytes + page_bytes + 1);
  const char *tables, *pages;
  if (!memory) return KS_FAIL(KS_ENOMEM, "attention: no memory for tables of %lld bytes", (long long)bytes);
  p->seqs = (attention_seq *)memory;
  p->items = (attention_item *)(memory + seq_bytes);
  p->rows = (attention_split_row *)(memory + seq_bytes + item_bytes);
  p->pages = (int32_t *)(memory + bytes);
  attention_fill_items(a, ks_cuda_device_of(ctx)->l2_bytes / 2, p);
  attention_fill_seqs(a, p);
  ks_status status = ks_cuda_stage(ctx, memory, bytes, (const void **)&tables);
  if (status == KS_OK) status = ks_cuda_stage(ctx, p->pages, page_bytes, (const void **)&pages);
  free(memory);
  if (status != KS_OK) return status;
  t->seqs = (const attention_seq *)(const void *)tables;
  t->items = (const attention_item *)(const void *)(tables + seq_bytes);
  t->rows = (const attention_split_row *)(const void *)(tables + seq_bytes + item_bytes);
  t->pages = (const int32_t *)(const void *)pages;
  return KS_OK;
}

#endif
