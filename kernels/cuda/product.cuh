/* Tiles of C = A B^T, A [n_a, n_cols] and B [n_b, n_cols] row by row: what the loss of the head and the
 * similarities are made of.
 *
 *   typedef product_mma<2, 4, 4, 4, 2> P;              // 128 x 128, 8 warps, two stages
 *   ks_smem smem;
 *   uint4 *room = ks_smem_take<uint4>(&smem, product_units<P>());
 *   P c;
 *   product_run<P, false, false>(&c, a, a_row, b, b_row, room, &nothing);    // the room is free again
 *   c.each([&](int m, int n, float &v) { ... });       // element (a_row + m, b_row + n)
 *
 * Staging. A stage holds PRODUCT_UNITS 16-byte units of each row of the tile: 64 bf16 for the tensor cores,
 * 32 float32 for plain fma. Unit u of row r lies at u ^ (r % 8), so that eight rows' units of one column
 * never share a bank. Operands that are stored as the product takes them, and aligned, come by cp.async, up
 * to STAGES - 1 stages ahead. All others (`any`: I8, a bf16 that is to meet float32, rows that are not
 * aligned) are loaded into registers before a stage is computed and converted into shared memory behind it;
 * I8 and bf16 are exact in either type.
 *
 * Order of additions, whatever the shape of the tile: mma: steps of 16 columns in rising order, each the
 * tensor core's own sum; fma: one chain over the columns in rising order. Columns beyond n_cols are zeros.
 * So an element's bits depend on its two rows alone, and on which of the two is A. */
#ifndef KS_CUDA_PRODUCT_CUH
#define KS_CUDA_PRODUCT_CUH

#include "kernels/cuda/launch.cuh"

enum { PRODUCT_UNITS = 8, PRODUCT_CHUNK = 8 }; /* units of a row's stage; elements of a chunk */

/* Rows of a matrix. No padding: launches are compared byte by byte. */
struct product_rows {
  const void *p;
  int64_t n_rows, n_cols;
  int32_t dtype;  /* F32, BF16, I8 */
  int32_t vector; /* chunks of 8 elements are aligned to 16 bytes (I8: 8) */
};

static inline product_rows product_rows_of(const void *p, int64_t n_rows, int64_t n_cols, ks_dtype dtype) {
  const uint64_t size = ks_dtype_size(dtype), unit = size == 1 ? 8 : 16;
  product_rows r = {p, n_rows, n_cols, (int32_t)dtype, 0};
  r.vector = (((uint64_t)(uintptr_t)p | ((uint64_t)n_cols * size)) & (unit - 1)) == 0;
  return r;
}

KS_HOST_DEVICE int product_unit(int row, int unit) {
  return row * PRODUCT_UNITS + (unit ^ (row & 7));
}

/* ---------------------------------------------------------------- staging: rows as they are */

template <class E, int ROWS, int THREADS>
KS_DEVICE void product_copy(uint4 *to, const product_rows &r, int64_t row0, int64_t col0) {
  enum { STEP = THREADS / PRODUCT_UNITS, PER_UNIT = 16 / (int)sizeof(E) };
  const int first = (int)threadIdx.x / PRODUCT_UNITS, u = (int)threadIdx.x % PRODUCT_UNITS;
  const int n_rows = (int)(r.n_rows - row0 < ROWS ? r.n_rows - row0 : (int64_t)ROWS);
  const int n_units = (int)(r.n_cols - col0 < PER_UNIT * PRODUCT_UNITS ? r.n_cols - col0
                                                                       : (int64_t)PER_UNIT * PRODUCT_UNITS) /
                      PER_UNIT;
  const E *from = (const E *)r.p + (row0 + first) * r.n_cols + col0 + u * PER_UNIT;
#pragma unroll
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
    const int row = first + i * STEP;
    if (ROWS % STEP != 0 && row >= ROWS) break;
    const bool is_there = row < n_rows && u < n_units;
    ks_cp_async_16(to + product_unit(row, u), is_there ? from + i * STEP * r.n_cols : (const E *)r.p,
                   is_there);
  }
}

/* ---------------------------------------------------------------- staging: any type, any alignment */

/* Chunk of 8 elements at (row, col) as it is stored; zeros beyond the edges. WORDS: of 16 bytes, 2 when it
 * may be float32. */
template <int WORDS> struct product_raw { uint4 v[WORDS]; };

template <int WORDS>
KS_DEVICE product_raw<WORDS> product_load_elements(const product_rows &r, int64_t at, int n) {
  uint32_t word[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < PRODUCT_CHUNK; e++) {
    if (e >= n) continue;
    if (r.dtype == KS_DTYPE_F32)
      word[e] = ks_float_to_bits(((const float *)r.p)[at + e]);
    else if (r.dtype == KS_DTYPE_BF16)
      word[e / 2] |= (uint32_t)((const ks_bf16 *)r.p)[at + e].bits << (e % 2 * 16);
    else
      word[e / 4] |= (uint32_t)((const uint8_t *)r.p)[at + e] << (e % 4 * 8);
  }
  product_raw<WORDS> raw;
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    raw.v[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
  return raw;
}

template <int WORDS>
KS_DEVICE product_raw<WORDS> product_load_chunk(const product_rows &r, int64_t row, int64_t col) {
  product_raw<WORDS> raw;
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    raw.v[i] = make_uint4(0, 0, 0, 0);
  if (row >= r.n_rows || col >= r.n_cols) return raw;
  const int64_t at = row * r.n_cols + col;
  if (!r.vector || col + PRODUCT_CHUNK > r.n_cols)
    return product_load_elements<WORDS>(
        r, at, (int)(r.n_cols - col < PRODUCT_CHUNK ? r.n_cols - col : (int64_t)PRODUCT_CHUNK));
  if (r.dtype == KS_DTYPE_I8) {
    const uint2 x = *(const uint2 *)((const int8_t *)r.p + at);
    raw.v[0].x = x.x, raw.v[0].y = x.y;
  } else if (r.dtype == KS_DTYPE_BF16) {
    raw.v[0] = *(const uint4 *)((const ks_bf16 *)r.p + at);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      raw.v[i] = ((const uint4 *)((const float *)r.p + at))[i];
  }
  return raw;
}

KS_DEVICE void product_unpack_bf16(float x[8], uint4 v) {
  x[0] = ks_bf16_lo(v.x), x[1] = ks_bf16_hi(v.x), x[2] = ks_bf16_lo(v.y), x[3] = ks_bf16_hi(v.y);
  x[4] = ks_bf16_lo(v.z), x[5] = ks_bf16_hi(v.z), x[6] = ks_bf16_lo(v.w), x[7] = ks_bf16_hi(v.w);
}
KS_DEVICE void product_unpack_f32(float x[4], uint4 v) {
  x[0] = ks_bits_to_float(v.x), x[1] = ks_bits_to_float(v.y);
  x[2] = ks_bits_to_float(v.z), x[3] = ks_bits_to_float(v.w);
}
template <int WORDS> KS_DEVICE void product_unpack(float x[8], const product_raw<WORDS> &raw, int dtype) {
  if (dtype == KS_DTYPE_I8) {
#pragma unroll
    for (int e = 0; e < PRODUCT_CHUNK; e++)
      x[e] = (float)(int8_t)((e < 4 ? raw.v[0].x : raw.v[0].y) >> (e % 4 * 8) & 255u);
  } else if (dtype == KS_DTYPE_BF16) {
    product_unpack_bf16(x, raw.v[0]);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      product_unpack_f32(x + 4 * i, raw.v[i]);
  }
}

/* What differs between the two element types of a stage. */
template <class E> struct product_element;
template <> struct product_element<ks_bf16> {
  enum { COLS = 64, CHUNKS = 8, WORDS = 1 };
  static KS_DEVICE void put(uint4 *stage, int row, int chunk, const float x[8]) {
    stage[product_unit(row, chunk)] = make_uint4(ks_pack_bf16(x[0], x[1]), ks_pack_bf16(x[2], x[3]),
                                                 ks_pack_bf16(x[4], x[5]), ks_pack_bf16(x[6], x[7]));
  }
  static KS_DEVICE void get(float x[8], const uint4 *stage, int row, int chunk) {
    product_unpack_bf16(x, stage[product_unit(row, chunk)]);
  }
};
template <> struct product_element<float> {
  enum { COLS = 32, CHUNKS = 4, WORDS = 2 };
  static KS_DEVICE void put(uint4 *stage, int row, int chunk, const float x[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      stage[product_unit(row, 2 * chunk + i)] =
          make_uint4(ks_float_to_bits(x[4 * i]), ks_float_to_bits(x[4 * i + 1]),
                     ks_float_to_bits(x[4 * i + 2]), ks_float_to_bits(x[4 * i + 3]));
  }
  static KS_DEVICE void get(float x[8], const uint4 *stage, int row, int chunk) {
    product_unpack_f32(x, stage[product_unit(row, 2 * chunk)]);
    product_unpack_f32(x + 4, stage[product_unit(row, 2 * chunk + 1)]);
  }
};

/* A thread's share of one operand's next stage. */
template <class E, int ROWS, int THREADS, bool ANY> struct product_fetch {
  KS_DEVICE void load(uint4 *to, const product_rows &r, int64_t row0, int64_t col0) {
    product_copy<E, ROWS, THREADS>(to, r, row0, col0);
  }
  KS_DEVICE void store(uint4 *, const product_rows &) {}
};
template <class E, int ROWS, int THREADS> struct product_fetch<E, ROWS, THREADS, true> {
  typedef product_element<E> element;
  enum { N = (ROWS * element::CHUNKS + THREADS - 1) / THREADS };
  product_raw<element::WORDS> raw[N];

  KS_DEVICE void load(uint4 *, const product_rows &r, int64_t row0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int at = (int)threadIdx.x + i * THREADS, row = at / element::CHUNKS;
      raw[i] = product_load_chunk<element::WORDS>(r, row < ROWS ? row0 + row : r.n_rows,
                                                  col0 + at % element::CHUNKS * PRODUCT_CHUNK);
    }
  }
  KS_DEVICE void store(uint4 *to, const product_rows &r) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int at = (int)threadIdx.x + i * THREADS, row = at / element::CHUNKS;
      float x[PRODUCT_CHUNK];
      if (row >= ROWS) break;
      product_unpack(x, raw[i], r.dtype);
      element::put(to, row, at % element::CHUNKS, x);
    }
  }
};

/* ---------------------------------------------------------------- products of a stage */

/* Tensor cores: WARPS_M x WARPS_N warps, each MT x NT tiles of 16 x 8. */
template <int WARPS_M, int WARPS_N, int MT, int NT, int STAGES_> struct product_mma {
  typedef ks_bf16 element;
  enum {
    BM = 16 * MT * WARPS_M,
    BN = 8 * NT * WARPS_N,
    THREADS = KS_WARP * WARPS_M * WARPS_N,
    STAGES = STAGES_,
    COLS = product_element<element>::COLS
  };
  float acc[MT][NT][4];

  KS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          acc[i][j][e] = 0.0f;
  }
  KS_DEVICE void step(const uint4 *a, const uint4 *b, int) {
    const int lane = (int)threadIdx.x % KS_WARP, warp = (int)threadIdx.x / KS_WARP;
    const int a_row = warp / WARPS_N * (16 * MT) + lane % 16, b_row = warp % WARPS_N * (8 * NT) + lane % 8;
#pragma unroll
    for (int k = 0; k < COLS / 16; k++) {
      uint32_t fa[MT][4], fb[NT + NT % 2][2];
#pragma unroll
      for (int i = 0; i < MT; i++)
        ks_ldmatrix_x4(fa[i], a + product_unit(a_row + 16 * i, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j + 2 <= NT; j += 2) {
        uint32_t r[4];
        ks_ldmatrix_x4(r, b + product_unit(b_row + 8 * j + lane / 16 * 8, 2 * k + lane / 8 % 2));
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
      }
      if constexpr (NT % 2 != 0)
        ks_ldmatrix_x2(fb[NT - 1], b + product_unit(b_row + 8 * (NT - 1), 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
          ks_mma_bf16(acc[i][j], fa[i], fb[j]);
    }
  }
  template <class F> KS_DEVICE void each(F f) {
    const int lane = (int)threadIdx.x % KS_WARP, warp = (int)threadIdx.x / KS_WARP;
    const int m0 = warp / WARPS_N * (16 * MT) + lane / 4, n0 = warp % WARPS_N * (8 * NT) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          f(m0 + 16 * i + e / 2 * 8, n0 + 8 * j + e % 2, acc[i][j][e]);
  }
};

/* Plain fma: WARPS_M x WARPS_N warps of 4 x 8 lanes, each thread TM x TN elements. */
template <int WARPS_M, int WARPS_N, int TM, int TN, int STAGES_> struct product_simt {
  typedef float element;
  enum {
    STEP_M = 4 * WARPS_M,
    STEP_N = 8 * WARPS_N,
    BM = STEP_M * TM,
    BN = STEP_N * TN,
    THREADS = KS_WARP * WARPS_M * WARPS_N,
    STAGES = STAGES_,
    COLS = product_element<element>::COLS
  };
  float acc[TM][TN];

  static KS_DEVICE int first_m() {
    return (int)threadIdx.x / KS_WARP / WARPS_N * 4 + (int)threadIdx.x % KS_WARP / 8;
  }
  static KS_DEVICE int first_n() { return (int)threadIdx.x / KS_WARP % WARPS_N * 8 + (int)threadIdx.x % 8; }
  KS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++)
        acc[i][j] = 0.0f;
  }
  KS_DEVICE void step(const uint4 *a, const uint4 *b, int) {
    const int m0 = first_m(), n0 = first_n();
#pragma unroll 2
    for (int k = 0; k < COLS; k += 2) {
      float2 x[TM], y[TN];
#pragma unroll
      for (int i = 0; i < TM; i++)
        x[i] = ((const float2 *)(a + product_unit(m0 + STEP_M * i, k / 4)))[k % 4 / 2];
#pragma unroll
      for (int j = 0; j < TN; j++)
        y[j] = ((const float2 *)(b + product_unit(n0 + STEP_N * j, k / 4)))[k % 4 / 2];
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++)
          acc[i][j] = fmaf(x[i].y, y[j].y, fmaf(x[i].x, y[j].x, acc[i][j]));
    }
  }
  template <class F> KS_DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++)
        f(first_m() + STEP_M * i, first_n() + STEP_N * j, acc[i][j]);
  }
};

/* Plain fma for up to 8 rows of B: each of the first BM threads has one row of A. Of SPREAD times as many, the others
 * help with copies and hooks only: a row is one chain of sums, so more threads cannot share it. */
template <int WARPS, int STAGES_, int SPREAD = 1> struct product_simt_few {
  typedef float element;
  enum {
    BM = KS_WARP * WARPS,
    BN = 8,
    THREADS = KS_WARP * WARPS * SPREAD,
    STAGES = STAGES_,
    COLS = product_element<element>::COLS
  };
  float acc[BN];

  KS_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < BN; j++)
      acc[j] = 0.0f;
  }
  KS_DEVICE void step_one(const uint4 *a, const uint4 *b) {
#pragma unroll
    for (int u = 0; u < PRODUCT_UNITS; u++) {
      float x[4], y[4];
      product_unpack_f32(x, a[product_unit((int)threadIdx.x, u)]);
      product_unpack_f32(y, b[product_unit(0, u)]);
#pragma unroll
      for (int e = 0; e < 4; e++)
        acc[0] = fmaf(x[e], y[e], acc[0]);
    }
  }
  KS_DEVICE void step(const uint4 *a, const uint4 *b, int n_b) {
    const int row = (int)threadIdx.x;
    if (row >= BM) return;
    if (n_b == 1) {
      step_one(a, b);
      return;
    }
#pragma unroll 4
    for (int u = 0; u < PRODUCT_UNITS; u++) {
      float x[4], y[4];
      product_unpack_f32(x, a[product_unit(row, u)]);
#pragma unroll
      for (int j = 0; j < BN; j++) {
        if (j >= n_b) break;
        product_unpack_f32(y, b[product_unit(j, u)]);
#pragma unroll
        for (int e = 0; e < 4; e++)
          acc[j] = fmaf(x[e], y[e], acc[j]);
      }
    }
  }
  template <class F> KS_DEVICE void each(F f) {
    if ((int)threadIdx.x >= BM) return;
#pragma unroll
    for (int j = 0; j < BN; j++)
      f((int)threadIdx.x, j, acc[j]);
  }
};

/* ---------------------------------------------------------------- the loop */

template <class P> KS_HOST_DEVICE size_t product_units() {
  return (size_t)P::STAGES * (P::BM + P::BN) * PRODUCT_UNITS;
}

/* A hook that wants no stage. */
struct product_no_hook {
  template <class P> KS_DEVICE void stage(const uint4 *, const uint4 *) {}
};

/* *c = rows [a_row, a_row + BM) of a times rows [b_row, b_row + BN) of b; rows that are not there count as
 * zeros. The hook sees each stage, in order. For all threads of a block, which may use the room again behind
 * the call. */
template <class P, bool A_ANY, bool B_ANY, class Hook>
KS_DEVICE void product_run(P *c, const product_rows &a, int64_t a_row, const product_rows &b, int64_t b_row,
                           uint4 *room, Hook *hook) {
  typedef typename P::element E;
  enum { STAGE = (P::BM + P::BN) * PRODUCT_UNITS, AHEAD = P::STAGES - 1 };
  const int n_steps = (int)((a.n_cols + P::COLS - 1) / P::COLS);
  const int n_b = (int)(b.n_rows - b_row < P::BN ? b.n_rows - b_row : (int64_t)P::BN);
  product_fetch<E, P::BM, P::THREADS, A_ANY> fa;
  product_fetch<E, P::BN, P::THREADS, B_ANY> fb;
  c->clear();
  for (int s = 0; s < AHEAD; s++) {
    if (s < n_steps) {
      uint4 *to = room + s * STAGE;
      fa.load(to, a, a_row, (int64_t)s * P::COLS);
      fb.load(to + P::BM * PRODUCT_UNITS, b, b_row, (int64_t)s * P::COLS);
      fa.store(to, a);
      fb.store(to + P::BM * PRODUCT_UNITS, b);
    }
    ks_cp_async_commit();
  }
  for (int s = 0; s < n_steps; s++) {
    ks_cp_async_wait<AHEAD - 1>();
    __syncthreads();
    const int next = s + AHEAD;
    uint4 *to = room + next % P::STAGES * STAGE;
    if (next < n_steps) {
      fa.load(to, a, a_row, (int64_t)next * P::COLS);
      fb.load(to + P::BM * PRODUCT_UNITS, b, b_row, (int64_t)next * P::COLS);
    }
    ks_cp_async_commit();
    const uint4 *stage = room + s % P::STAGES * STAGE;
    c->step(stage, stage + P::BM * PRODUCT_UNITS, n_b);
    hook->template stage<P>(stage, stage + P::BM * PRODUCT_UNITS);
    if (next < n_steps) {
      fa.store(to, a);
      fb.store(to + P::BM * PRODUCT_UNITS, b);
    }
  }
  ks_cp_async_wait<0>();
  __syncthreads();
}

#endif
