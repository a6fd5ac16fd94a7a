/* Tiles of bf16 rows in shared memory and the products of attention on them (mma.m16n8k16).
 *
 * A tile has COLS columns, a multiple of 16 that holds a head of d <= COLS columns; the rest is zero. It
 * exists in shared memory only: rows in device memory are d long and come by copies of 16 bytes where all of
 * them are aligned to 16, of 8 bytes (head size 100: rows of 200 bytes), or by plain loads (odd sizes). Rows
 * whose length is a multiple of 128 bytes are swizzled (chunk c of 16 bytes lies at c ^ (row % 8)), others
 * are padded to an odd number of chunks: in both eight rows of one column of chunks, which is what ldmatrix
 * reads, lie in different banks. */
#ifndef KS_CUDA_ATTENTION_MMA_CUH
#define KS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention.cuh"

/* Head sizes that the kernels are made for: a head takes the smallest that holds it. 100 takes 112. */
#define KS_ATTENTION_SIZES(X) X(32) X(64) X(96) X(112) X(128) X(256)

/* Beyond 128 columns a block of threads makes 128 columns of its outputs: the accumulators of more do not fit
 * registers. BLOCKS of threads fit an SM by registers. */
template <int DIM> struct attention_size {
  static constexpr int OUT = DIM > 128 ? 128 : DIM, PARTS = DIM / OUT;
  static constexpr int BLOCKS = DIM > 64 ? 2 : DIM > 32 ? 3 : 4;
};

template <int COLS> struct attention_tile {
  static constexpr int STRIDE = COLS % 64 == 0 ? COLS : COLS + 8, CHUNKS = COLS / 8;
  /* Steps of 16 columns that are unrolled: their addresses take registers. */
  static constexpr int AT_ONCE = COLS >= 128 ? 4 : COLS / 16;
  KS_DEVICE static int at(int row, int chunk) {
    return COLS % 64 == 0 ? row * STRIDE + ((chunk ^ (row & 7)) << 3) : row * STRIDE + (chunk << 3);
  }
};

/* Rows 0 .. n_rows - 1 of a tile, columns 0 .. n_cols - 1 of the source; rows from n_valid on and the other
 * columns become zeros. All threads of the block together; the copies belong to the caller's group. */
template <int COLS, class ROWS>
KS_DEVICE void attention_load(ks_bf16 *tile, ROWS rows, int n_rows, int n_valid, int n_cols, int width) {
  typedef attention_tile<COLS> at;
  const int n_threads = (int)blockDim.x;
  if (width == 16) {
#pragma unroll 2
    for (int i = (int)threadIdx.x; i < n_rows * at::CHUNKS; i += n_threads) {
      const int r = i / at::CHUNKS, c = i % at::CHUNKS;
      const bool valid = r < n_valid && c * 8 < n_cols;
      ks_cp_async_16(tile + at::at(r, c), rows.at(valid ? r : 0) + (valid ? c * 8 : 0), valid);
    }
  } else if (width == 8) {
#pragma unroll 2
    for (int i = (int)threadIdx.x; i < n_rows * at::CHUNKS * 2; i += n_threads) {
      const int r = i / (at::CHUNKS * 2), c = i % (at::CHUNKS * 2);
      const bool valid = r < n_valid && c * 4 < n_cols;
      ks_cp_async_8(tile + at::at(r, c / 2) + c % 2 * 4, rows.at(valid ? r : 0) + (valid ? c * 4 : 0), valid);
    }
  } else {
    for (int i = (int)threadIdx.x; i < n_rows * COLS; i += n_threads) {
      const int r = i / COLS, c = i % COLS;
      ks_bf16 x = {0};
      if (r < n_valid && c < n_cols) x = rows.at(r)[c];
      tile[at::at(r, c / 8) + c % 8] = x;
    }
  }
}

/* Rows begin .. begin + n_valid - 1 of a tile to device memory, by one warp. */
template <int COLS, class ROWS>
KS_DEVICE void attention_store(const ks_bf16 *tile, ROWS rows, int begin, int n_valid, int n_cols,
                               int width) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP;
  const int per = width / 2, per_row = n_cols / per;
  for (int i = lane; i < n_valid * per_row; i += KS_WARP) {
    const int r = begin + i / per_row, c = i % per_row * per;
    const ks_bf16 *from = tile + at::at(r, c / 8) + c % 8;
    ks_bf16 *to = rows.at(r) + c;
    if (width == 16)
      *(uint4 *)to = *(const uint4 *)from;
    else if (width == 8)
      *(uint2 *)to = *(const uint2 *)from;
    else
      *to = *from;
  }
}

/* A accumulators' 16 rows (those of this warp, from `row`) as bf16 into a tile: out[n] is columns 8 n .. 8 n
 * + 7. */
template <int COLS, int N>
KS_DEVICE void attention_put(ks_bf16 *tile, int row, const float (*out)[4], float scale0, float scale1) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++) {
    *(uint32_t *)(tile + at::at(row + g, n) + 2 * t) = ks_pack_bf16(out[n][0] * scale0, out[n][1] * scale0);
    *(uint32_t *)(tile + at::at(row + g + 8, n) + 2 * t) =
        ks_pack_bf16(out[n][2] * scale1, out[n][3] * scale1);
  }
}

/* s[n] += rows `row` .. + 15 of a times rows 8 n .. 8 n + 7 of b, over COLS columns in rising order. */
template <int COLS, int N>
KS_DEVICE void attention_scores(float (*s)[4], const ks_bf16 *a, int row, const ks_bf16 *b) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll at::AT_ONCE
  for (int k = 0; k < COLS / 16; k++) {
    uint32_t x[4];
    ks_ldmatrix_x4(x, a + at::at(row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ks_ldmatrix_x4(y, b + at::at(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      ks_mma_bf16(s[n], x, y);
      ks_mma_bf16(s[n + 1], x, y + 2);
    }
  }
}

/* Accumulators of a product as the left operand of the next: 16 rows, 8 N columns, rounded to bf16. */
template <int N> KS_DEVICE void attention_operand(uint32_t (*x)[4], const float (*s)[4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    x[k][0] = ks_pack_bf16(s[2 * k][0], s[2 * k][1]);
    x[k][1] = ks_pack_bf16(s[2 * k][2], s[2 * k][3]);
    x[k][2] = ks_pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]);
    x[k][3] = ks_pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}

/* out[n] += x (16 x 16 K) times rows 0 .. 16 K - 1 of b, columns 8 (chunk + n) .. + 7, over rows in rising
 * order. */
template <int COLS, int K, int N>
KS_DEVICE void attention_accumulate(float (*out)[4], const uint32_t (*x)[4], const ks_bf16 *b, int chunk) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ks_ldmatrix_x4_trans(y, b + at::at(k * 16 + lane % 16, chunk + n + lane / 16));
      ks_mma_bf16(out[n], x[k], y);
      ks_mma_bf16(out[n + 1], x[k], y + 2);
    }
}

#endif
