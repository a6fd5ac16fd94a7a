/* Dropout of LoRA's input (ks_linear_args): the mask, a bit an element, is made anew in forward and in
 * backward. */
#ifndef KS_CPU_DROPOUT_H
#define KS_CPU_DROPOUT_H

#include "kernels/cpu/cpu.h"

enum {
  DROPOUT_COLS = 128, /* columns whose mask comes from sixteen Philox blocks, */
  DROPOUT_WORDS = DROPOUT_COLS / KS_LANES,
  DROPOUT_LANES = KS_PART_LANES / 2,        /* blocks in a vector, */
  DROPOUT_PARTS = KS_LANES / DROPOUT_LANES, /* vectors to sixteen of them, */
#if KS_PART_LANES == 16
  DROPOUT_CHAINS = 6, /* vectors at a time */
#else
  DROPOUT_CHAINS = 2,
#endif
};

typedef uint64_t dropout_wide __attribute__((vector_size(KS_PART_LANES * 4)));

/* The lower halves of a's lanes times m. */
KS_INLINE dropout_wide dropout_mul(dropout_wide a, uint32_t m) {
#if KS_PART_LANES == 16
  return (dropout_wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif KS_PART_LANES == 8
  return (dropout_wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  return (dropout_wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

/* The round keys of ks_philox, in memory: instructions read them from there, broadcast, at no cost. */
typedef struct {
  uint64_t k0[10], k1[10], hi;
} dropout_keys;

static dropout_keys dropout_expand(uint64_t key, uint64_t hi) {
  dropout_keys k = {.hi = hi};
  for (uint32_t i = 0; i < 10; i++) {
    k.k0[i] = (uint32_t)((uint32_t)key + i * 0x9E3779B9u);
    k.k1[i] = (uint32_t)((uint32_t)(key >> 32) + i * 0xBB67AE85u);
  }
  return k;
}

/* ks_philox of the counters in the lower halves of n vectors' lanes; the upper halves of the words are
 * garbage. Several vectors at a time, as each alone is a long chain. */
KS_INLINE void dropout_philox(const int n, const dropout_keys *k, const dropout_wide lo[],
                              dropout_wide word[][4]) {
#pragma GCC unroll 8
  for (int v = 0; v < n; v++) {
    word[v][0] = lo[v];
    word[v][1] = lo[v] >> 32;
    word[v][2] = k->hi - (dropout_wide){0};
    word[v][3] = (k->hi >> 32) - (dropout_wide){0};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++)
#pragma GCC unroll 8
    for (int v = 0; v < n; v++) {
      dropout_wide p0 = dropout_mul(word[v][0], 0xD2511F53u), p1 = dropout_mul(word[v][2], 0xCD9E8D57u);
      word[v][0] = (p1 >> 32) ^ word[v][1] ^ k->k0[round];
      word[v][2] = (p0 >> 32) ^ word[v][3] ^ k->k1[round];
      word[v][1] = p1;
      word[v][3] = p0;
    }
}

/* Bit i of low and high: whether the lower and upper half of the word in lane i reach the threshold. */
KS_INLINE void dropout_compare(dropout_wide word, uint32_t threshold, uint32_t *low, uint32_t *high) {
#if defined(__AVX512BW__)
  uint32_t halves = _mm512_cmpge_epu16_mask((__m512i)word, _mm512_set1_epi16((short)threshold));
  *low = _pext_u32(halves, 0x11111111);
  *high = _pext_u32(halves, 0x22222222);
#else
  typedef int64_t wide_mask __attribute__((vector_size(KS_PART_LANES * 4)));
  wide_mask l = (wide_mask)(word & 0xffff) >= (int64_t)threshold;
  wide_mask h = (wide_mask)(word >> 16 & 0xffff) >= (int64_t)threshold;
#if defined(__AVX2__)
  *low = (uint32_t)_mm256_movemask_pd((__m256d)l);
  *high = (uint32_t)_mm256_movemask_pd((__m256d)h);
#else
  *low = (uint32_t)(l[0] & 1) | (uint32_t)(l[1] & 2);
  *high = (uint32_t)(h[0] & 1) | (uint32_t)(h[1] & 2);
#endif
#endif
}

/* Bit j of word w of a row: column 16 w + j is kept. */
typedef struct {
  uint16_t *bits; /* [n_rows, words]; rows of segments without an adapter are undefined */
  int64_t words;
  float keep;         /* 1 / (1 - p) */
  uint32_t threshold; /* draws below it drop */
} dropout_mask;

/* A mask for the rows of x, not yet made. */
static ks_status dropout_reserve(ks_ctx *ctx, const ks_linear_args *a, dropout_mask *m) {
  void *bits = NULL;
  m->words = (a->w->n_in + DROPOUT_COLS - 1) / DROPOUT_COLS * DROPOUT_WORDS;
  KS_TRY(ks_cpu_shared_reserve(ctx, KS_CPU_DROPOUT, (size_t)(a->n_rows * m->words) * sizeof *m->bits, &bits));
  m->bits = bits;
  m->threshold = (uint32_t)ks_min_i64((int64_t)((double)a->dropout * 65536 + 0.5), 65535);
  m->keep = (float)(65536.0 / (65536 - m->threshold));
  return KS_OK;
}

/* `words` words of a row whose first block is `first`: half q % 2 of word q / 2 of sixteen blocks makes word
 * q. */
static void dropout_draw_row(const dropout_keys *keys, uint64_t first, uint32_t threshold, uint16_t *bits,
                             int64_t words) {
  const int64_t n = words / DROPOUT_WORDS * DROPOUT_PARTS;
  dropout_wide lane = {0};
  for (int j = 0; j < DROPOUT_LANES; j++)
    lane[j] = (uint64_t)j;
  memset(bits, 0, (size_t)words * sizeof *bits);
  for (int64_t v = 0; v < n; v += DROPOUT_CHAINS) {
    dropout_wide lo[DROPOUT_CHAINS], word[DROPOUT_CHAINS][4];
#pragma GCC unroll 8
    for (int c = 0; c < DROPOUT_CHAINS; c++)
      lo[c] = lane + (first + (uint64_t)((v + c) * DROPOUT_LANES));
    dropout_philox(DROPOUT_CHAINS, keys, lo, word);
    for (int c = 0; c < DROPOUT_CHAINS && v + c < n; c++) {
      uint16_t *out = bits + (v + c) / DROPOUT_PARTS * DROPOUT_WORDS;
      const int shift = (int)((v + c) % DROPOUT_PARTS) * DROPOUT_LANES;
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) {
        uint32_t low, high;
        dropout_compare(word[c][w], threshold, &low, &high);
        out[2 * w] = (uint16_t)(out[2 * w] | low << shift);
        out[2 * w + 1] = (uint16_t)(out[2 * w + 1] | high << shift);
      }
    }
  }
}

/* Makes rows [r0, r1) of the mask. */
static void dropout_make(const ks_linear_args *a, const dropout_mask *m, int64_t r0, int64_t r1) {
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *seg = &a->segments[s];
    if (seg->adapter < 0 || a->loras[seg->adapter].rank == 0) continue;
    const dropout_keys keys = dropout_expand(seg->dropout_key, a->dropout_site);
    const int64_t end = ks_min_i64(r1, seg->row_begin + seg->n_rows);
    for (int64_t row = ks_max_i64(r0, seg->row_begin); row < end; row++)
      dropout_draw_row(&keys, (uint64_t)((row - seg->row_begin) * m->words / DROPOUT_WORDS * KS_LANES),
                       m->threshold, m->bits + row * m->words, m->words);
  }
}

/* Sixteen elements of a row from column `col` (a multiple of 16) on; not yet divided by 1 - p. */
KS_INLINE ks_v dropout_keep(const dropout_mask *m, int64_t row, int64_t col, ks_v x) {
  return ks_v_keep(x, m->bits[row * m->words + col / KS_LANES]);
}

#endif
