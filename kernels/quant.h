/* Blocks of quantised frozen weights: runs of consecutive values of a row that share one scale.
 *
 *   type   values a block  bits a weight  value of code q under scale d
 *   q8_0   32              8.5            d q,         q = -128 .. 127;  d = max |x| / 127
 *   q4_0   32              4.5            d (q - 8),   q = 0 .. 15;      d = -(the x of largest |x|) / 8
 *   nf4    64              4.25           d nf4[q],    q = 0 .. 15;      d = max |x|
 *
 * q8_0 and q4_0 are the formulas of ggml's types of that name; nf4 has the sixteen quantiles of the normal
 * distribution of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E). d is kept as float16, and each
 * code is the nearest for the d that is kept, ties to the greater code (nf4: to the lesser).
 *
 * A row is kept as two arrays, so that a GPU reads whole vectors of each: codes, padded with zero values to
 * whole blocks (q8_0: a byte each; q4_0, nf4: two a byte, the even one in the lower half), and scales, one a
 * block. A row of codes is a multiple of 16 bytes.
 *
 *   uint8_t *codes = malloc(ks_quant_row_bytes(t, n));
 *   uint16_t *scales = malloc(2 * ks_quant_row_scales(t, n));
 *   KS_TRY(ks_quant_row(t, x, n, codes, scales));
 *   ks_dequant_row(t, codes, scales, n, x);             // what every product sees
 */
#ifndef KS_QUANT_H
#define KS_QUANT_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Values of a block; 0: t is not in blocks. */
int64_t ks_quant_block(ks_dtype t);
/* Bytes of codes and number of scales of a row of n values. */
int64_t ks_quant_row_bytes(ks_dtype t, int64_t n);
int64_t ks_quant_row_scales(ks_dtype t, int64_t n);

/* KS_EDATA: a value is not finite, or so large that its scale is none of float16 (names the position). */
ks_status ks_quant_row(ks_dtype t, const float *x, int64_t n, uint8_t *codes, uint16_t *scales);
void ks_dequant_row(ks_dtype t, const uint8_t *codes, const uint16_t *scales, int64_t n, float *x);

/* The sixteen values of nf4, rising. */
extern const float ks_nf4_values[16];

/* float16, ties to even; too large gives infinity. */
uint16_t ks_f16_from_float(float x);
float ks_f16_to_float(uint16_t h);
/* bf16, ties to even; a NaN stays a (quiet) NaN: as kernels round. */
uint16_t ks_bf16_from_float(float x);

#ifdef __cplusplus
}
#endif

#endif
