/* Dropout of LoRA's input (ks_linear_args): the mask is a function of segment key, site, row and column, and
 * made anew wherever it is needed. */
#ifndef KS_CPU_DROPOUT_H
#define KS_CPU_DROPOUT_H

#include "kernels/cpu/cpu.h"
#include <math.h>

enum { DROPOUT_COLS = 64 }; /* columns whose mask comes from 16 Philox blocks */

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

/* ks_philox of a counter in the lower half of each lane; the upper halves of the words are garbage. */
KS_INLINE void dropout_philox(uint64_t key, uint64_t hi, dropout_wide lo, dropout_wide word[4]) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  dropout_wide c0 = lo, c1 = lo >> 32, c2 = hi - (dropout_wide){0}, c3 = (hi >> 32) - (dropout_wide){0};
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    dropout_wide p0 = dropout_mul(c0, 0xD2511F53u), p1 = dropout_mul(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

typedef struct {
  uint64_t key, site;
  uint32_t threshold; /* words below it drop */
  float keep;         /* 1 / (1 - p) */
  int64_t blocks_a_row;
} dropout_mask;

static dropout_mask dropout_of(const ks_linear_args *a, const ks_segment *seg) {
  return (dropout_mask){.key = seg->dropout_key,
                        .site = a->dropout_site,
                        .threshold = (uint32_t)ceil((double)a->dropout * 0x1p32),
                        .keep = (float)(1 / (1 - (double)a->dropout)),
                        .blocks_a_row = (a->w->n_in + DROPOUT_COLS - 1) / DROPOUT_COLS * KS_LANES};
}

/* Factors (0 or 1 / (1 - p)) of columns [col, col + 64) of a row of the segment; col is a multiple of 64. */
KS_INLINE void dropout_factors(const dropout_mask *d, int64_t row, int64_t col, ks_v factor[4]) {
  uint64_t first = (uint64_t)(row * d->blocks_a_row + col / DROPOUT_COLS * KS_LANES);
  ks_ipart threshold =
      (ks_ipart){0} + (int32_t)(d->threshold ^ 0x80000000u); /* signed comparison of unsigned words */
  KS_EACH_PART(i) {
    dropout_wide even, word_even[4], word_odd[4];
    for (int j = 0; j < KS_PART_LANES / 2; j++)
      even[j] = first + (uint64_t)(i * KS_PART_LANES + 2 * j);
    dropout_philox(d->key, d->site, even, word_even);
    dropout_philox(d->key, d->site, even + 1, word_odd);
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
      ks_ipart word = (ks_ipart)((word_even[w] & 0xffffffffu) | word_odd[w] << 32);
      ks_ipart kept = (word ^ INT32_MIN) >= threshold;
      ks_part keep = d->keep - (ks_part){0};
      factor[w].p[i] = (ks_part)(kept & (ks_ipart)keep);
    }
  }
}

/* out[i, j] = x[i, j] * factor(row + i, col + j) (+ out when add) for n_rows x n_cols; col is a multiple
 * of 64. */
static void dropout_apply(const dropout_mask *d, int64_t row, int64_t col, int64_t n_rows, int64_t n_cols,
                          const float *x, int64_t ldx, float *out, int64_t ldo, bool add) {
  for (int64_t i = 0; i < n_rows; i++)
    for (int64_t j = 0; j < n_cols; j += DROPOUT_COLS) {
      ks_v factor[4];
      dropout_factors(d, row + i, col + j, factor);
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) {
        int64_t at = j + w * KS_LANES, left = n_cols - at;
        if (left <= 0) break;
        ks_v r = ks_v_mul(ks_v_load_n(x + i * ldx + at, left), factor[w]);
        float *o = out + i * ldo + at;
        if (add) r = ks_v_add(ks_v_load_n(o, left), r);
        ks_v_store_n(o, r, left);
      }
    }
}

#endif
