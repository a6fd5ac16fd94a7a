/* What the attention kernels share: the work of a launch as the host describes it, and the arithmetic of
 * softmax over blocks of keys. See attention.cu (forward) and attention_back.cu.
 *
 * Rows. For a key head, row r of a sequence is query r / group and query head `head * group + r % group` of
 * the group that reads the key head: the heads of a group share what is read of its keys, and a decoding step
 * of one query is a tile of `group` rows. Row r sees `seen = n_k - n_q + r / group + 1` keys.
 */
#ifndef KS_CUDA_ATTENTION_CUH
#define KS_CUDA_ATTENTION_CUH

#include "kernels/cuda/launch.cuh"

/* Turing has no mma of bf16 (device.cuh imitates it, slowly): its kernels are empty and never launched. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define KS_ATTENTION_HAS_MMA 1
#else
#define KS_ATTENTION_HAS_MMA 0
#endif

/* Keys of a block; blocks are counted from key 0. A block lies in one page. */
static constexpr int ATTENTION_KEYS = 64;
static_assert(ATTENTION_KEYS == KS_ATTENTION_PAGE_UNIT, "a block of keys is contiguous in memory");
/* Threads of a block of threads at most; columns of a head at most. */
static constexpr int ATTENTION_THREADS = 128, ATTENTION_MAX_DIM = 256;
static constexpr int ATTENTION_WARPS_MMA = ATTENTION_THREADS / KS_WARP;
/* What a score may exceed the exponent that its row is taken against (base 2): weights up to 2^8 are as exact
 * as those up to 1, and a base that seldom moves seldom makes the sums so far be multiplied. */
static constexpr float ATTENTION_SLACK = 8;
static constexpr float ATTENTION_LOG2E = 1.4426950408889634f, ATTENTION_LN2 = 0.6931471805599453f;

/* ---------------------------------------------------------------- what the host tells (staged) */

struct attention_seq {
  const void *k, *v;
  void *dk, *dv;
  int64_t q_begin;
  int64_t pages;   /* where its page table begins, or -1 */
  int64_t partial; /* where its partial results begin, in (block, query, head) */
  int32_t n_q, n_k;
};
/* One block of threads for each key head. */
struct attention_item {
  int32_t seq;   /* -1: nothing to do (tables are made a little too long, so that growing sequences do not
                    change a launch) */
  int32_t begin; /* first row of the tile; in dk, dv: first key */
  int32_t block, n_blocks; /* blocks of keys */
};
struct attention_split_row {
  int32_t seq, query;
};

/* i, as something that the compiler does not know: what is made of it is made again every time and takes no registers from the
 * products in between. */
KS_DEVICE int attention_anew(unsigned i) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(i));
#endif
  return (int)(i % 0x80000000u);
}
KS_DEVICE int attention_thread() {
  return attention_anew(threadIdx.x) % 1024;
}
KS_DEVICE int attention_lane() {
  return attention_thread() % KS_WARP;
}

/* r / group for 0 <= r, r * group < 2^32: magic is 2^32 / group + 1, rounded down. */
KS_HOST_DEVICE int attention_div(int r, uint64_t magic) {
  return (int)((uint64_t)(uint32_t)r * magic >> 32);
}

/* Row r of a sequence and key head among its (query, head), counted from the key head's first; skip: heads of others. */
KS_DEVICE int attention_place(int r, uint64_t magic, int skip) {
  return r + attention_div(r, magic) * skip;
}

/* Row of k and v where the block that begins at `key` lies. */
KS_DEVICE int64_t attention_key_row(const attention_seq *seq, const int32_t *pages, int page_rows, int key) {
  if (seq->pages < 0) return key;
  return (int64_t)pages[seq->pages + key / page_rows] * page_rows + key % page_rows;
}

/* Rows of a tile in device memory: keys ... */
template <class T> struct attention_key_rows {
  T *first;
  int64_t stride;
  KS_DEVICE T *at(int r) const { return first + r * stride; }
};
/* ... and (query, head) rows, from row `begin` of the sequence and key head that `first` belongs to. */
template <class T> struct attention_query_rows {
  T *first;
  uint64_t magic;
  int begin, skip, d;
  KS_DEVICE int64_t from(int r) const { return (int64_t)attention_place(begin + r, magic, skip) * d; }
  KS_DEVICE T *at(int r) const { return first + from(r); }
};
/* The first row of a sequence and key head among all (query, head). */
template <class PARAMS>
KS_DEVICE int64_t attention_first(const PARAMS *p, const attention_seq *seq, int head) {
  return seq->q_begin * p->n_heads + head * p->group;
}
/* Rows of x (q, o or their gradients) from row `begin` of the sequence and key head on. */
template <class PARAMS, class T>
KS_DEVICE attention_query_rows<T> attention_queries_of(const PARAMS *p, const attention_seq *seq, int head,
                                                       T *x, int begin) {
  return {x + attention_first(p, seq, head) * p->d, p->magic, begin, p->n_heads - p->group, p->d};
}

/* ---------------------------------------------------------------- softmax over blocks */

/* The exponent that a block with the largest score m is taken against: nothing but -inf weighs nothing. */
KS_DEVICE float attention_base(float m) {
  return m == -INFINITY ? 0.0f : m;
}

KS_DEVICE float attention_lse(float max, float sum) {
  return (max + log2f(sum)) * ATTENTION_LN2;
}

/* ---------------------------------------------------------------- host */

/* Lengths of tables in coarse steps, by at most a quarter too long. */
static inline int64_t attention_coarse(int64_t n) {
  int64_t step = 8;
  while (step * 8 <= n)
    step *= 2;
  return (n + step - 1) / step * step;
}

KS_HOST_DEVICE int attention_min(int64_t a, int64_t b) {
  return (int)(a < b ? a : b);
}

/* See attention_div. */
static inline uint64_t attention_magic(int64_t group) {
  return ((uint64_t)1 << 32) / (uint64_t)group + 1;
}

/* What the kernels' 32-bit numbers of rows and keys hold. */
static inline ks_status attention_check_sizes(const ks_attention_args *a) {
  const int64_t group = a->n_heads / a->n_kv_heads, most = (int64_t)1 << 30;
  if (a->head_dim > ATTENTION_MAX_DIM)
    return KS_FAIL(KS_EUNSUPPORTED, "attention: head_dim is %lld; the CUDA backend takes up to %d",
                   (long long)a->head_dim, ATTENTION_MAX_DIM);
  if (a->page_rows > most || group > 1 << 15)
    return KS_FAIL(KS_EUNSUPPORTED, "attention: pages of %lld rows, %lld heads a key head: too many",
                   (long long)a->page_rows, (long long)group);
  for (int64_t s = 0; s < a->n_seqs; s++)
    if (a->seqs[s].n_k > most || a->seqs[s].n_q > most / group / group || a->seqs[s].n_q > most / a->n_heads)
      return KS_FAIL(KS_EUNSUPPORTED, "attention: sequence %lld of %lld queries and %lld keys is too long",
                     (long long)s, (long long)a->seqs[s].n_q, (long long)a->seqs[s].n_k);
  return KS_OK;
}

/* Blocks of threads of one round read keys that fit the cache; of a round, the longest first, so that none of them is the last to
 * run. A round is the number of a sequence's keys before it over `bytes`. */
struct attention_rounds {
  int64_t row_bytes, bytes, before;
};
static inline attention_rounds attention_rounds_of(const ks_attention_args *a, int64_t bytes) {
  return {4 * a->n_kv_heads * a->head_dim, bytes > 0 ? bytes : 1, 0};
}
static inline int32_t attention_round_of(attention_rounds *r, int64_t n_keys) {
  const int64_t round = r->before / r->bytes;
  r->before += n_keys * r->row_bytes;
  return (int32_t)(round < INT32_MAX ? round : INT32_MAX);
}
/* `block` is the round. */
static inline int attention_by_length(const void *x, const void *y) {
  const attention_item *a = (const attention_item *)x, *b = (const attention_item *)y;
  if (a->block != b->block) return a->block < b->block ? -1 : 1;
  if (a->n_blocks != b->n_blocks) return a->n_blocks > b->n_blocks ? -1 : 1;
  if (a->seq != b->seq) return a->seq < b->seq ? -1 : 1;
  return a->begin < b->begin ? -1 : a->begin > b->begin;
}

/* Bits of all addresses and strides: what every row of every array is aligned to. */
struct attention_alignment {
  uintptr_t bits;
};
static inline void attention_align(attention_alignment *a, const void *p) {
  a->bits |= (uintptr_t)p;
}
static inline attention_alignment attention_alignment_of(const ks_ctx *ctx, const ks_attention_args *a) {
  const size_t size = ks_ctx_act_size(ctx);
  attention_alignment x = {(uintptr_t)((size_t)a->head_dim * size) |
                           (uintptr_t)((size_t)a->kv_stride * size)};
  attention_align(&x, a->q), attention_align(&x, a->o);
  for (int64_t s = 0; s < a->n_seqs; s++)
    attention_align(&x, a->seqs[s].k), attention_align(&x, a->seqs[s].v);
  return x;
}
/* Bytes of a copy: 16, 8, or single elements (2). */
static inline int attention_width(const attention_alignment *a) {
  return a->bits % 16 == 0 ? 16 : a->bits % 8 == 0 ? 8 : 2;
}

#endif
