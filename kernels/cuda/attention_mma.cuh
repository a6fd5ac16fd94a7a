/* Tiles of bf16 rows in shared memory and the products of attention on them (mma.m16n8k16).
 *
 * A tile has COLS columns, a multiple of 16 that holds a head of d <= COLS columns; the rest is zero. It
 * exists in shared memory only: rows in device memory are d long and come by copies of 16 bytes where all of
 * them are aligned to 16, of 8 bytes (head size 100: rows of 200 bytes), or by plain loads (odd sizes). Rows
 * of 128 columns and 256 are swizzled (chunk c of 16 bytes lies at c ^ (row % 8)), others
 * are padded to an odd number of chunks: in both eight rows of one column of chunks, which is what ldmatrix
 * reads, lie in different banks. An address is one register a lane and a constant: added where padded, by
 * exclusive or where swizzled. */
#ifndef KS_CUDA_ATTENTION_MMA_CUH
#define KS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention.cuh"

/* Head sizes that the kernels are made for: a head takes the smallest that holds it. 100 takes 112. */
#define KS_ATTENTION_SIZES(X) X(32) X(64) X(96) X(112) X(128) X(256)
static inline bool attention_is_wide(int64_t d, int width) {
  return width == 16 || (width == 8 && d > 96 && d <= 112);
}

/* Beyond 128 columns a block of threads makes 128 columns of its outputs: the accumulators of more do not fit registers. */
template <int DIM> struct attention_size {
  static constexpr int OUT = DIM > 128 ? 128 : DIM, PARTS = DIM / OUT;
};

/* The part of its tile that this warp has. Warps of one number run on the same quarter of every SM, and in a causal tile the last
 * rows (first keys) have the most to do: the two blocks of threads of an SM, which are n_sm apart while all have one, deal theirs
 * out in opposite order. */
KS_DEVICE int attention_warp(int n_sm) {
  const int warp = (int)threadIdx.x / KS_WARP;
  return (int)blockIdx.x / n_sm % 2 ? ATTENTION_WARPS_MMA - 1 - warp : warp;
}

template <int COLS> struct attention_tile {
  static constexpr bool SWIZZLED = COLS % 128 == 0;
  static constexpr int STRIDE = SWIZZLED ? COLS : COLS + 8, CHUNKS = COLS / 8;
  KS_DEVICE static int at(int row, int chunk) {
    return SWIZZLED ? row * STRIDE + ((chunk ^ (row & 7)) << 3) : row * STRIDE + (chunk << 3);
  }
  /* n chunks further along the row than at(row, chunk). Swizzled: n is even, chunk % 8 at most 1. */
  KS_DEVICE static int along(int place, int n) {
    return SWIZZLED ? (place ^ (n % 8 << 3)) + (n / 8 << 6) : place + (n << 3);
  }
};

/* Bytes of a copy: 16; 8 for the size made for heads of 100 columns; single elements where rows are aligned to less (!WIDE). */
template <int DIM, bool WIDE> struct attention_copy {
  static constexpr int WIDTH = !WIDE ? 2 : DIM == 112 ? 8 : 16, PER = WIDTH / 2, CHUNKS = DIM / PER;
  /* A thread has one chunk of every STEP-th row. */
  static constexpr int LANES = CHUNKS > 16  ? 32
                               : CHUNKS > 8 ? 16
                               : CHUNKS > 4 ? 8
                                            : 4,
                       STEP = ATTENTION_THREADS / LANES;
  KS_DEVICE static void copy(ks_bf16 *to, const ks_bf16 *from, bool valid) {
    if constexpr (WIDTH == 16)
      ks_cp_async_16(to, from, valid);
    else
      ks_cp_async_8(to, from, valid);
  }
};

/* What no vector can load, element by element. */
template <int COLS, int ROWS, class FROM>
KS_DEVICE void attention_load_elements(ks_bf16 *tile, const FROM &rows, int n_valid, int n_cols) {
  typedef attention_tile<COLS> at;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < ROWS * COLS; i += ATTENTION_THREADS) {
    const int r = i / COLS, c = i % COLS;
    ks_bf16 x = {0};
    if (r < n_valid && c < n_cols) x = rows.at(r)[c];
    tile[at::at(r, c / 8) + c % 8] = x;
  }
}

/* ROWS rows of a tile, columns 0 .. n_cols - 1 of the source; rows from n_valid on and the other columns become zeros. All
 * ATTENTION_THREADS threads; the copies belong to the caller's group. Queries: */
template <int COLS, int ROWS, bool WIDE>
KS_DEVICE void attention_load(ks_bf16 *tile, const attention_query_rows<const ks_bf16> &rows, int n_valid,
                              int n_cols) {
  typedef attention_tile<COLS> at;
  if constexpr (WIDE) {
    typedef attention_copy<COLS, WIDE> by;
    const int i0 = attention_thread(), c = i0 % by::LANES * by::PER, r0 = i0 / by::LANES;
    if (c >= COLS) return;
    const bool is_here = c < n_cols;
#pragma unroll 2
    for (int i = 0; i < ROWS; i += by::STEP) {
      const int r = r0 + i;
      if (ROWS % by::STEP != 0 && r >= ROWS) break;
      by::copy(tile + at::at(r, c / 8) + c % 8, rows.at(r) + c, is_here && r < n_valid);
    }
  } else {
    attention_load_elements<COLS, ROWS>(tile, rows, n_valid, n_cols);
  }
}
/* The same rows of two arrays into two tiles. */
template <int COLS, int ROWS, bool WIDE>
KS_DEVICE void attention_load_both(ks_bf16 *tile, const attention_query_rows<const ks_bf16> &rows,
                                   ks_bf16 *other, const ks_bf16 *other_first, int n_valid, int n_cols) {
  typedef attention_tile<COLS> at;
  if constexpr (WIDE) {
    typedef attention_copy<COLS, WIDE> by;
    const int i0 = attention_thread(), c = i0 % by::LANES * by::PER, r0 = i0 / by::LANES;
    if (c >= COLS) return;
    const bool is_here = c < n_cols;
#pragma unroll 2
    for (int i = 0; i < ROWS; i += by::STEP) {
      const int r = r0 + i, to = at::at(r, c / 8) + c % 8;
      const int64_t from = rows.from(r) + c;
      const bool valid = is_here && r < n_valid;
      if (ROWS % by::STEP != 0 && r >= ROWS) break;
      by::copy(tile + to, rows.first + from, valid);
      by::copy(other + to, other_first + from, valid);
    }
  } else {
    attention_query_rows<const ks_bf16> others = rows;
    others.first = other_first;
    attention_load<COLS, ROWS, WIDE>(tile, rows, n_valid, n_cols);
    attention_load<COLS, ROWS, WIDE>(other, others, n_valid, n_cols);
  }
}
/* Keys: they lie a constant apart, in both memories. */
template <int COLS, int ROWS, bool WIDE>
KS_DEVICE void attention_load(ks_bf16 *tile, const attention_key_rows<const ks_bf16> &rows, int n_valid,
                              int n_cols) {
  typedef attention_tile<COLS> at;
  if constexpr (WIDE) {
    typedef attention_copy<COLS, WIDE> by;
    const int i0 = attention_thread(), c = i0 % by::LANES * by::PER, r0 = i0 / by::LANES;
    const bool is_here = c < n_cols;
    const ks_bf16 *from = rows.first + r0 * rows.stride + c;
    if (by::LANES != by::CHUNKS && c >= COLS) return;
#pragma unroll
    for (int i = 0; i < ROWS; i += by::STEP, from += by::STEP * rows.stride) {
      const int r = r0 + i;
      if (ROWS % by::STEP != 0 && r >= ROWS) break;
      by::copy(tile + at::at(r, c / 8) + c % 8, from, is_here && r < n_valid);
    }
  } else {
    attention_load_elements<COLS, ROWS>(tile, rows, n_valid, n_cols);
  }
}

/* Rows begin .. begin + n_valid - 1 of a tile, n_cols columns from 8 `chunk` on, to device memory, by one warp. */
template <int COLS, bool WIDE, class ROWS>
KS_DEVICE void attention_store_at(const ks_bf16 *tile, ROWS rows, int begin, int n_valid, int chunk,
                                  int n_cols) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP;
  constexpr int width = attention_copy<COLS, WIDE>::WIDTH, per = width / 2;
  const int per_row = n_cols / per;
#pragma unroll 1
  for (int i = lane; i < n_valid * per_row; i += KS_WARP) {
    const int r = begin + i / per_row, c = i % per_row * per;
    const ks_bf16 *from = tile + at::at(r, chunk + c / 8) + c % 8;
    ks_bf16 *to = rows.at(r) + c;
    if constexpr (width == 16)
      *(uint4 *)to = *(const uint4 *)from;
    else if constexpr (width == 8)
      *(uint2 *)to = *(const uint2 *)from;
    else
      *to = *from;
  }
}
template <int COLS, bool WIDE, class ROWS>
KS_DEVICE void attention_store(const ks_bf16 *tile, ROWS rows, int begin, int n_valid, int n_cols) {
  attention_store_at<COLS, WIDE>(tile, rows, begin, n_valid, 0, n_cols);
}

/* Accumulators of the warp's 16 rows (from `row`) as bf16 into a tile: out[n] is columns 8 (chunk + n) .. + 7. */
template <int COLS, int N>
KS_DEVICE void attention_put_at(ks_bf16 *tile, int row, int chunk, const float (*out)[4], float scale0,
                                float scale1) {
  typedef attention_tile<COLS> at;
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++) {
    *(uint32_t *)(tile + at::at(row + g, chunk + n) + 2 * t) =
        ks_pack_bf16(out[n][0] * scale0, out[n][1] * scale0);
    *(uint32_t *)(tile + at::at(row + g + 8, chunk + n) + 2 * t) =
        ks_pack_bf16(out[n][2] * scale1, out[n][3] * scale1);
  }
}
template <int COLS, int N>
KS_DEVICE void attention_put(ks_bf16 *tile, int row, const float (*out)[4], float scale0, float scale1) {
  attention_put_at<COLS, N>(tile, row, 0, out, scale0, scale1);
}

/* In what follows `lane` is this thread's, or attention_lane() where registers are scarce. */

/* A 16 x 16 of a tile as left operand. */
template <int COLS> KS_DEVICE void attention_left(uint32_t x[4], int lane, const ks_bf16 *a, int row, int k) {
  typedef attention_tile<COLS> at;
  ks_ldmatrix_x4(x, a + at::along(at::at(row + lane % 16, lane / 16), 2 * k));
}

/* s[m][n] += rows row + 16 m .. + 15 of a times rows 8 n .. + 7 of b, over COLS columns in rising order. One
 * read of b serves M row tiles. KEPT: a's operands are in registers. */
template <int COLS, int M, int N, bool KEPT>
KS_DEVICE void attention_scores(float (*s)[N][4], int lane, const uint32_t (*kept)[KEPT ? COLS / 16 : 1][4],
                                const ks_bf16 *a, int row, const ks_bf16 *b) {
  typedef attention_tile<COLS> at;
  const int place = at::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < COLS / 16; k++) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) {
      if constexpr (!KEPT) attention_left<COLS>(x[m], lane, a + 16 * m * at::STRIDE, row, k);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ks_ldmatrix_x4(y, b + n * 8 * at::STRIDE + at::along(place, 2 * k));
#pragma unroll
      for (int m = 0; m < M; m++) {
        const uint32_t *left = KEPT ? kept[m][KEPT ? k : 0] : x[m];
        ks_mma_bf16(s[m][n], left, y);
        ks_mma_bf16(s[m][n + 1], left, y + 2);
      }
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

/* out[m][n] += x[m] (16 x 16 K) times rows 0 .. 16 K - 1 of b, columns 8 (chunk + n) .. + 7, over rows in rising order.
 * An odd N takes an even K. */
template <int COLS, int M, int K, int N>
KS_DEVICE void attention_accumulate(float (*out)[N][4], int lane, const uint32_t (*x)[K][4], const ks_bf16 *b,
                                    int chunk) {
  typedef attention_tile<COLS> at;
  const int place = at::at(lane % 16, chunk + lane / 16);
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t y[4];
      ks_ldmatrix_x4_trans(y, b + k * 16 * at::STRIDE + at::along(place, n));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ks_mma_bf16(out[m][n], x[m][k], y);
        ks_mma_bf16(out[m][n + 1], x[m][k], y + 2);
      }
    }
#pragma unroll
  for (int k = 0; N % 2 != 0 && k < K; k += 2) { /* the last 8 columns, of 32 rows at once */
    uint32_t y[4];
    ks_ldmatrix_x4_trans(y, b + at::at(k * 16 + lane, chunk + N - 1));
#pragma unroll
    for (int m = 0; m < M; m++) {
      ks_mma_bf16(out[m][N - 1], x[m][k], y);
      ks_mma_bf16(out[m][N - 1], x[m][k + 1], y + 2);
    }
  }
}

#endif
