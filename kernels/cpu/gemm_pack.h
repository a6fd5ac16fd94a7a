/* Packing of the left factor of a product: gemm_tile.h says into what. */
#ifndef KS_CPU_GEMM_PACK_H
#define KS_CPU_GEMM_PACK_H

#include "kernels/cpu/dropout.h"
#include "kernels/cpu/gemm_tile.h"

/* Lane j is lane index[j] of a and b side by side; the indices are constants. */
KS_INLINE ks_part gemm_shuffle(ks_part a, ks_part b, ks_ipart index) {
#if defined(__clang__)
  ks_part r;
  for (int j = 0; j < KS_PART_LANES; j++)
    r[j] = index[j] < KS_PART_LANES ? a[index[j]] : b[index[j] - KS_PART_LANES];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

/* (a0, b0, a1, b1, ...) */
KS_INLINE void gemm_interleave(ks_v a, ks_v b, ks_v *low, ks_v *high) {
  ks_ipart l, h;
  for (int j = 0; j < KS_PART_LANES; j++) {
    l[j] = j / 2 + j % 2 * KS_PART_LANES;
    h[j] = l[j] + KS_PART_LANES / 2;
  }
  ks_part out[2 * KS_PARTS];
  KS_EACH_PART(i) {
    out[2 * i] = gemm_shuffle(a.p[i], b.p[i], l);
    out[2 * i + 1] = gemm_shuffle(a.p[i], b.p[i], h);
  }
  KS_EACH_PART(i) {
    low->p[i] = out[i];
    high->p[i] = out[KS_PARTS + i];
  }
}

/* Round to nearest even to the upper half of each lane; NaN keeps its sign and becomes quiet. */
KS_INLINE ks_ipart gemm_round_bf16(ks_part x) {
  ks_ipart bits = (ks_ipart)x;
  ks_ipart rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
  ks_ipart nan = x != x;
  return (nan & (bits | 0x400000) & (int32_t)0xffff0000) | (~nan & rounded);
}

/* 16 pairs of floats as units of bf16. */
KS_INLINE ks_v gemm_pair_bf16(ks_v a, ks_v b) {
#if defined(__AVX512BF16__)
  return (ks_v){{(ks_part)_mm512_cvtne2ps_pbh(b.p[0], a.p[0])}};
#else
  ks_ipart even, odd;
  for (int j = 0; j < KS_PART_LANES; j++) {
    even[j] = 2 * j;
    odd[j] = 2 * j + 1;
  }
  ks_part all[2 * KS_PARTS];
  KS_EACH_PART(i) {
    all[i] = (ks_part)gemm_round_bf16(a.p[i]);
    all[KS_PARTS + i] = (ks_part)gemm_round_bf16(b.p[i]);
  }
  ks_v r;
  KS_EACH_PART(i) {
    ks_ipart e = (ks_ipart)gemm_shuffle(all[2 * i], all[2 * i + 1], even);
    ks_ipart o = (ks_ipart)gemm_shuffle(all[2 * i], all[2 * i + 1], odd);
    r.p[i] = (ks_part)(((e >> 16) & 0xffff) | o);
  }
  return r;
#endif
}

/* Rows of X to be packed: x [n_rows, n] times scale (times row_scale[row]), after dropout. */
typedef struct {
  const float *x;
  int64_t ldx, n_rows, n;
  bool bf16;
  float scale;
  const float *row_scale;     /* or NULL */
  const dropout_mask *mask;   /* or NULL; not with bf16 */
  int64_t mask_row, mask_col; /* of x's first element */
} gemm_rows;

/* Up to 16 units of row i from column j on. */
KS_INLINE ks_v gemm_load_units(const gemm_rows *r, int64_t i, int64_t j, ks_v scale) {
  const float *x = r->x + i * r->ldx + j;
  ks_v a = ks_v_mul(ks_v_load_n(x, r->n - j), scale);
  if (r->mask) a = dropout_keep(r->mask, r->mask_row + i, r->mask_col + j, a);
  if (!r->bf16) return a;
  return gemm_pair_bf16(a, ks_v_mul(ks_v_load_n(x + KS_LANES, ks_max_i64(r->n - j - KS_LANES, 0)), scale));
}

/* Rows 2i and 2i + 1 into pair i of `a`; a missing last row is zero. */
static void gemm_pack_rows(float *a, int64_t pair, const gemm_rows *r) {
  const int64_t step = r->bf16 ? 2 * KS_LANES : KS_LANES;
  for (int64_t i = 0; i < r->n_rows; i += 2, a += pair) {
    const bool two = i + 1 < r->n_rows;
    const ks_v s0 = ks_v_set(r->row_scale ? r->scale * r->row_scale[i] : r->scale);
    const ks_v s1 = ks_v_set(r->row_scale && two ? r->scale * r->row_scale[i + 1] : r->scale);
    float *out = a;
    for (int64_t j = 0; j < r->n; j += step, out += 2 * KS_LANES) {
      ks_v low, high, x0 = gemm_load_units(r, i, j, s0);
      ks_v x1 = two ? gemm_load_units(r, i + 1, j, s1) : ks_v_zero();
      gemm_interleave(x0, x1, &low, &high);
      ks_v_store(out, low);
      ks_v_store(out + KS_LANES, high);
    }
  }
}

/* 16 rows of 16 lanes become 16 columns. */
KS_INLINE void gemm_transpose(ks_v row[KS_LANES]) {
  for (int round = 0; round < 4; round++) {
    ks_v next[KS_LANES];
#pragma GCC unroll 8
    for (int i = 0; i < KS_LANES / 2; i++)
      gemm_interleave(row[i], row[i + KS_LANES / 2], &next[2 * i], &next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < KS_LANES; i++)
      row[i] = next[i];
  }
}

#endif
