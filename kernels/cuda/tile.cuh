/* Tiles of bf16 in shared memory, as the linear layer's tensor-core kernels keep them: rows of 16-byte
 * pieces, permuted so that the eight rows that a ldmatrix reads lie in different banks.
 *
 *   ks_bf16 *tile = ks_smem_take<ks_bf16>(&smem, ROWS * 8 * PIECES);
 *   tile_load_8(tile_at<PIECES>(tile, row, piece), x + row * n, col, n, row < n_rows, aligned);    // cp.async where it can
 *   tile_frag_a<PIECES>(a, tile, m, k);                                                            // 16 x 16 of [m][k]
 */
#ifndef KS_CUDA_TILE_CUH
#define KS_CUDA_TILE_CUH

#include "kernels/cuda/device.cuh"

/* Where piece `piece` of a row of PIECES (2, 4 or a multiple of 8) lies. */
template <int PIECES> KS_DEVICE ks_bf16 *tile_at(ks_bf16 *tile, int row, int piece) {
  const int turn = PIECES >= 8 ? row & 7 : PIECES == 4 ? row >> 1 & 3 : row >> 2 & 1;
  return tile + (row * PIECES + (piece ^ turn)) * 8;
}

/* Elements [col, col + 8) of a row of n: zeros beyond it, or where !ok. aligned: rows start on 16 bytes and n
 * is a multiple of 8. */
KS_DEVICE void tile_load_8(ks_bf16 *to, const ks_bf16 *row, int64_t col, int64_t n, bool ok, bool aligned) {
  if (aligned) {
    const bool there = ok && col < n;
    ks_cp_async_16(to, there ? row + col : row, there);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t lo = ok && col + 2 * i < n ? row[col + 2 * i].bits : 0u,
                   hi = ok && col + 2 * i + 1 < n ? row[col + 2 * i + 1].bits : 0u;
    words[i] = lo | hi << 16;
  }
  *(uint4 *)(void *)to = make_uint4(words[0], words[1], words[2], words[3]);
}

/* Piece `piece` of rows first, first + STEP, ... (N of them) of a tile: elements [col, col + 8) of those rows of x, zeros beyond
 * n_rows. One thread's share of a tile, with what its pieces have in common made once. */
template <int PIECES, int STEP, int N>
KS_DEVICE void tile_load_rows(ks_bf16 *tile, int first, int piece, const ks_bf16 *x, int64_t col, int64_t n,
                              int n_rows, bool aligned) {
  static_assert(STEP % 8 == 0, "rows whose pieces are turned alike");
  ks_bf16 *to = tile_at<PIECES>(tile, first, piece);
  if (aligned) {
    const ks_bf16 *from = x + first * n + col;
#pragma unroll
    for (int i = 0; i < N; i++, from += STEP * n)
      ks_cp_async_16(to + i * STEP * PIECES * 8, from, col < n && first + i * STEP < n_rows);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < N; i++)
    tile_load_8(to + i * STEP * PIECES * 8, x + (first + i * STEP) * n, col, n, first + i * STEP < n_rows,
                false);
}

/* The 16 x 16 of rows m.. and columns k.. of a tile [m][k], as ks_mma_bf16's a. m and k are multiples of 16.
 */
template <int PIECES> KS_DEVICE void tile_frag_a(uint32_t a[4], ks_bf16 *tile, int m, int k) {
  const int lane = (int)threadIdx.x % KS_WARP;
  ks_ldmatrix_x4(a, tile_at<PIECES>(tile, m + lane % 16, k / 8 + lane / 16));
}
/* The same from a tile [k][m]. */
template <int PIECES> KS_DEVICE void tile_frag_a_trans(uint32_t a[4], ks_bf16 *tile, int m, int k) {
  const int lane = (int)threadIdx.x % KS_WARP;
  ks_ldmatrix_x4_trans(a, tile_at<PIECES>(tile, k + lane / 16 * 8 + lane % 8, m / 8 + lane / 8 % 2));
}
/* b of the two 16 x 8 of columns n.. and n + 8.. of a tile [n][k]: b[0], b[1] and b[2], b[3]. */
template <int PIECES> KS_DEVICE void tile_frag_b(uint32_t b[4], ks_bf16 *tile, int n, int k) {
  const int lane = (int)threadIdx.x % KS_WARP;
  ks_ldmatrix_x4(b, tile_at<PIECES>(tile, n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
}
/* The same from a tile [k][n]. */
template <int PIECES> KS_DEVICE void tile_frag_b_trans(uint32_t b[4], ks_bf16 *tile, int n, int k) {
  const int lane = (int)threadIdx.x % KS_WARP;
  ks_ldmatrix_x4_trans(b, tile_at<PIECES>(tile, k + lane % 16, n / 8 + lane / 16));
}

/* All ones in the half of a register of two bf16 whose condition holds. */
KS_DEVICE uint32_t tile_select(uint32_t lo, uint32_t hi) {
  return (lo & 1u) * 0x0000ffffu | (hi & 1u) * 0xffff0000u;
}

/* Elements [col, col + 8) of an aligned row, to be written as one vector. Counted in vectors: of row + col the compiler made four
 * stores where it knew bits of col. */
KS_DEVICE uint4 *tile_vector(ks_bf16 *row, int64_t col) {
  return (uint4 *)(void *)row + col / 8;
}

/* ---------------------------------------------------------------- straight into registers */

/* Elements [col, col + 8) of a row of n; zeros beyond it. */
KS_DEVICE uint4 tile_read_8(const ks_bf16 *row, int64_t col, int64_t n, bool aligned) {
  if (aligned) return col < n ? *(const uint4 *)(const void *)(row + col) : make_uint4(0, 0, 0, 0);
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t lo = col + 2 * i < n ? row[col + 2 * i].bits : 0u,
                   hi = col + 2 * i + 1 < n ? row[col + 2 * i + 1].bits : 0u;
    w[i] = lo | hi << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

/* The same of float32. aligned: to 16 bytes. */
KS_DEVICE void tile_fetch_8(float4 x[2], const float *row, int64_t col, int64_t n, bool aligned) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      x[i] = col < n ? *(const float4 *)(const void *)(row + col + 4 * i) : make_float4(0, 0, 0, 0);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float part[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      part[j] = col + 4 * i + j < n ? row[col + 4 * i + j] : 0.0f;
    x[i] = make_float4(part[0], part[1], part[2], part[3]);
  }
}
/* Eight float32, times factor, as bf16. */
KS_DEVICE uint4 tile_round_8(const float4 x[2], float factor) {
  return make_uint4(
      ks_pack_bf16(x[0].x * factor, x[0].y * factor), ks_pack_bf16(x[0].z * factor, x[0].w * factor),
      ks_pack_bf16(x[1].x * factor, x[1].y * factor), ks_pack_bf16(x[1].z * factor, x[1].w * factor));
}
KS_DEVICE uint4 tile_read_8_rounded(const float *row, int64_t col, int64_t n, bool aligned, float factor) {
  float4 x[2];
  tile_fetch_8(x, row, col, n, aligned);
  return tile_round_8(x, factor);
}

/* Elements i and i + 1 of a row of n. */
KS_DEVICE uint32_t tile_read_pair(const ks_bf16 *row, int i, int n) {
  return (i < n ? row[i].bits : 0u) | (i + 1 < n ? (uint32_t)row[i + 1].bits << 16 : 0u);
}
/* Elements i and i + 1 of a column of r [n, n_cols], times factor, rounded. */
KS_DEVICE uint32_t tile_read_column(const float *r, int64_t n_cols, int i, int n, int64_t col, float factor) {
  const float lo = i < n && col < n_cols ? r[i * n_cols + col] : 0.0f,
              hi = i + 1 < n && col < n_cols ? r[(i + 1) * n_cols + col] : 0.0f;
  return ks_pack_bf16(lo * factor, hi * factor);
}

/* Lane t of each four gives word i to lane i and gets its word t as word i. */
KS_DEVICE void tile_quad_transpose(uint32_t w[4], int t) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(KS_FULL_MASK, t & bit ? w[i] : w[i | bit], bit);
      w[i] = t & bit ? got : w[i];
      w[i | bit] = t & bit ? w[i | bit] : got;
    }
}

#endif
