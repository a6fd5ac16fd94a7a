/* Frozen weights as kernels read them: F32 and BF16 row by row, blocks (kernels/quant.h) unpacked on the way.
 *
 *   ks_weight_view w = ks_weight_view_of(a->w);            // host; goes to a kernel by value
 *   float x = ks_weight_at<T>(w, row, col);                // one element, rounded to activations of type T
 *   ks_unpack_8(w.dtype, lut, codes, scale, out);          // eight consecutive ones of a block, as bf16
 */
#ifndef KS_CUDA_WEIGHT_CUH
#define KS_CUDA_WEIGHT_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/quant.h"

/* No padding: launches are compared byte by byte. */
struct ks_weight_view {
  const uint8_t *values;  /* [n_out, row_bytes] */
  const uint16_t *scales; /* [n_out, scales_per_row] float16 */
  int64_t row_bytes, scales_per_row;
  int64_t n_out, n_in;
  int32_t dtype;
  int32_t log_block; /* of blocks */
  float lut[16];     /* values of 4-bit codes under scale 1 */
};

static inline ks_weight_view ks_weight_view_of(const ks_weight *w) {
  const ks_cuda_weight *impl = (const ks_cuda_weight *)w->impl;
  ks_weight_view v = {};
  v.values = (const uint8_t *)impl->values;
  v.scales = (const uint16_t *)impl->scales;
  v.row_bytes = impl->row_bytes;
  v.scales_per_row = impl->scales_per_row;
  v.n_out = w->n_out;
  v.n_in = w->n_in;
  v.dtype = (int32_t)w->dtype;
  v.log_block = ks_quant_block(w->dtype) == 64 ? 6 : 5;
  for (int i = 0; i < 16; i++)
    v.lut[i] = w->dtype == KS_DTYPE_NF4 ? ks_nf4_values[i] : (float)(i - 8);
  return v;
}

/* A float16 scale; scales are finite. Times 2^112 moves the exponent's bias, denormals included. */
KS_DEVICE float ks_scale_value(uint16_t h) {
  const float x = ks_bits_to_float((uint32_t)(h & 0x7fffu) << 13) * 0x1p112f;
  return h & 0x8000u ? -x : x;
}

template <class T> KS_DEVICE float ks_weight_at(const ks_weight_view &w, int64_t row, int64_t col) {
  const uint8_t *p = w.values + row * w.row_bytes;
  if (w.dtype == KS_DTYPE_F32) return ((const float *)p)[col];
  if (w.dtype == KS_DTYPE_BF16) return ks_to_float(((const ks_bf16 *)p)[col]);
  const float d = ks_scale_value(w.scales[row * w.scales_per_row + (col >> w.log_block)]);
  float x;
  if (w.dtype == KS_DTYPE_Q8_0)
    x = (float)(int8_t)p[col];
  else
    x = w.lut[p[col / 2] >> (col % 2 * 4) & 15];
  return ks_to_float(ks_from_float<T>(x * d));
}

/* Sixteen codes: q8_0 in all of c, four bits a code in c.x and c.y. */
KS_DEVICE uint4 ks_load_codes_16(const ks_weight_view &w, int64_t row, int64_t col) {
  const uint8_t *p = w.values + row * w.row_bytes;
  if (w.dtype == KS_DTYPE_Q8_0) return *(const uint4 *)(p + col);
  const uint2 half = *(const uint2 *)(p + col / 2);
  return make_uint4(half.x, half.y, 0, 0);
}

/* Values of eight codes under scale d as four registers of two bf16: q8_0 in both words of c, four bits a
 * code in c.x. lut: shared, of w.lut. */
KS_DEVICE void ks_unpack_8(int dtype, const float *lut, uint2 c, float d, uint32_t out[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float lo, hi;
    if (dtype == KS_DTYPE_Q8_0) {
      const uint32_t pair = (i < 2 ? c.x : c.y) >> (i % 2 * 16);
      lo = (float)(int8_t)(pair & 255u), hi = (float)(int8_t)(pair >> 8 & 255u);
    } else if (dtype == KS_DTYPE_NF4) {
      lo = lut[c.x >> (8 * i) & 15u], hi = lut[c.x >> (8 * i + 4) & 15u];
    } else { /* 2^23 + code as float32, less 2^23 + 8 */
      lo = ks_bits_to_float(0x4b000000u | (c.x >> (8 * i) & 15u)) - 8388616.0f;
      hi = ks_bits_to_float(0x4b000000u | (c.x >> (8 * i + 4) & 15u)) - 8388616.0f;
    }
    out[i] = ks_pack_bf16(lo * d, hi * d);
  }
}
#endif
