/* The products of attention without tensor cores, float32 in shared memory: for float32 activations, and the
 * plain check of attention_mma.cuh.
 *
 * A block of threads has 4 warps and a tile of 4 * SLOTS rows (the left operand): row 4 * slot + warp is the
 * warp's row `slot`, so that a tile of few rows keeps all warps busy. The right operand comes as 64 rows,
 * through a chunk of shared memory: 32 columns at a time where it is reduced over columns (lanes are its
 * rows), 16 rows at a time where it is reduced over rows (lanes are its columns). A lane reads 16 bytes at a
 * time; chunk rows of 36 floats keep 8 lanes in different banks; left operands are broadcast. Per 4 columns
 * of a product of scores: 2 reads of 4 wavefronts and SLOTS of one, for 8 SLOTS fma a lane. */
#ifndef KS_CUDA_ATTENTION_SIMT_CUH
#define KS_CUDA_ATTENTION_SIMT_CUH

#include "kernels/cuda/attention.cuh"

static constexpr int ATTENTION_WARPS = ATTENTION_THREADS / KS_WARP;
static constexpr int ATTENTION_CHUNK_COLS = 32, ATTENTION_CHUNK_STRIDE = ATTENTION_CHUNK_COLS + 4,
                     ATTENTION_CHUNK_ROWS = 16;

/* Heads of up to 32 NJ columns. */
template <int NJ> struct attention_simt {
  static constexpr int COLS = NJ * KS_WARP, BLOCKS = NJ <= 4 ? 3 : 2;
  static constexpr int BY_COLS = ATTENTION_KEYS * ATTENTION_CHUNK_STRIDE,
                       BY_ROWS = ATTENTION_CHUNK_ROWS * COLS;
  static constexpr int CHUNK = BY_COLS > BY_ROWS ? BY_COLS : BY_ROWS;
};

/* Columns c .. c + 3 of a row of d columns, zeros beyond it. */
template <class T> KS_DEVICE float4 attention_load4(const T *row, int c, int d, bool aligned);
template <> KS_DEVICE float4 attention_load4<float>(const float *row, int c, int d, bool aligned) {
  if (aligned) return c < d ? *(const float4 *)(row + c) : make_float4(0, 0, 0, 0);
  return make_float4(c < d ? row[c] : 0.0f, c + 1 < d ? row[c + 1] : 0.0f, c + 2 < d ? row[c + 2] : 0.0f,
                     c + 3 < d ? row[c + 3] : 0.0f);
}
template <> KS_DEVICE float4 attention_load4<ks_bf16>(const ks_bf16 *row, int c, int d, bool aligned) {
  if (aligned) {
    if (c >= d) return make_float4(0, 0, 0, 0);
    const uint2 x = *(const uint2 *)(row + c);
    return make_float4(ks_bf16_lo(x.x), ks_bf16_hi(x.x), ks_bf16_lo(x.y), ks_bf16_hi(x.y));
  }
  return make_float4(c < d ? ks_to_float(row[c]) : 0.0f, c + 1 < d ? ks_to_float(row[c + 1]) : 0.0f,
                     c + 2 < d ? ks_to_float(row[c + 2]) : 0.0f, c + 3 < d ? ks_to_float(row[c + 3]) : 0.0f);
}

/* Rows of a source into shared memory, n_cols columns from c0 on (a multiple of 4); rows from n_valid on
 * become zeros. */
template <class T, class ROWS>
KS_DEVICE void attention_fill(float *to, int stride, ROWS rows, int r0, int n_rows, int n_valid, int c0,
                              int n_cols, int d, bool aligned) {
  const int per_row = n_cols / 4;
  for (int i = (int)threadIdx.x; i < n_rows * per_row; i += ATTENTION_THREADS) {
    const int r = i / per_row, c = i % per_row * 4;
    const float4 x =
        r0 + r < n_valid ? attention_load4<T>(rows.at(r0 + r), c0 + c, d, aligned) : make_float4(0, 0, 0, 0);
    *(float4 *)(to + r * stride + c) = x;
  }
}

/* s[slot][j] += row of the left tile times row lane + 32 j of the right operand, a chain of fma over columns
 * in rising order. Begins and ends with other threads possibly still at the chunk. */
template <class T, int NJ, int SLOTS, class ROWS>
KS_DEVICE void attention_dots(float (*s)[2], const float *left, float *chunk, ROWS rows, int n_valid, int d,
                              int n_slots, bool aligned) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  for (int c0 = 0; c0 < d; c0 += ATTENTION_CHUNK_COLS) {
    __syncthreads();
    attention_fill<T>(chunk, ATTENTION_CHUNK_STRIDE, rows, 0, ATTENTION_KEYS, n_valid, c0,
                      ATTENTION_CHUNK_COLS, d, aligned);
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < ATTENTION_CHUNK_COLS; c += 4) {
      const float4 y0 = *(const float4 *)(chunk + lane * ATTENTION_CHUNK_STRIDE + c);
      const float4 y1 = *(const float4 *)(chunk + (lane + KS_WARP) * ATTENTION_CHUNK_STRIDE + c);
#pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        if (i >= n_slots) continue;
        const float4 x =
            *(const float4 *)(left + (i * ATTENTION_WARPS + warp) * attention_simt<NJ>::COLS + c0 + c);
        s[i][0] = fmaf(x.w, y0.w, fmaf(x.z, y0.z, fmaf(x.y, y0.y, fmaf(x.x, y0.x, s[i][0]))));
        s[i][1] = fmaf(x.w, y1.w, fmaf(x.z, y1.z, fmaf(x.y, y1.y, fmaf(x.x, y1.x, s[i][1]))));
      }
    }
  }
}

/* out[slot][j] += sum over the first seen[slot] rows of the right operand: weight [row of the tile][64] times
 * its column lane + 32 j, a chain of fma over rows in rising order. Not masked: all n_valid rows. */
template <class T, int NJ, int SLOTS, class ROWS>
KS_DEVICE void attention_sums(float (*out)[NJ], const float *weight, float *chunk, ROWS rows, int n_valid,
                              int d, int n_slots, bool masked, const int (&seen)[SLOTS], bool aligned) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  typedef attention_simt<NJ> sizes;
  for (int r0 = 0; r0 < n_valid; r0 += ATTENTION_CHUNK_ROWS) {
    __syncthreads();
    attention_fill<T>(chunk, sizes::COLS, rows, r0, ATTENTION_CHUNK_ROWS, n_valid, 0, sizes::COLS, d,
                      aligned);
    __syncthreads();
    const int n = attention_min(n_valid - r0, ATTENTION_CHUNK_ROWS);
#pragma unroll 2
    for (int r = 0; r < n; r++) {
      float y[NJ];
#pragma unroll
      for (int j = 0; j < NJ; j++)
        y[j] = chunk[r * sizes::COLS + j * KS_WARP + lane];
#pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        if (i >= n_slots || (masked && r0 + r >= seen[i])) continue;
        const float w = weight[(i * ATTENTION_WARPS + warp) * ATTENTION_KEYS + r0 + r];
#pragma unroll
        for (int j = 0; j < NJ; j++)
          out[i][j] = fmaf(w, y[j], out[i][j]);
      }
    }
  }
}

/* The warp's rows of a tile to device memory. */
template <class T, int NJ> KS_DEVICE void attention_write(T *to, const float *out, float scale, int d) {
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll
  for (int j = 0; j < NJ; j++)
    if (lane + j * KS_WARP < d) to[lane + j * KS_WARP] = ks_from_float<T>(out[j] * scale);
}

#endif
