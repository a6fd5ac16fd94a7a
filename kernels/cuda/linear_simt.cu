/* The linear layer in plain fma: products, shrink, expand and gradients are one tiled kernel over different
 * matrices. Float32 activations run on it (the product itself where there is no cuBLASLt, or W is in blocks);
 * for bf16 it is the plain check.
 *
 *   C[m, n] = sum_k A[m, k] B[n, k]
 *     product    A = x [rows, n_in], B = W            input gradient   A = dy, B = W^T
 *     shrink     A = z [rows of a tile, n], B = R     expand           A = u [rows of a tile, rank], B = R^T
 *     gradient   A = u^T [rank, rows of a chunk], B = z^T, with the mask
 *
 * FLOPs: 2 M N K. Bytes from memory: A times N / BN plus B times M / BM (the L2 serves most of it) plus C. Bound by the fma
 * units (67 TFLOP/s on an H200 by its data sheet; cuBLASLt reaches 51) once K is some hundreds: 128 x 64 tiles do 32 fma on 3
 * vector loads from shared memory a thread and k.
 *
 * Geometry: 256 threads; tile BM x BN; k in steps of 8 (products of 128 rows) or 16 through two buffers in shared memory, the
 * next step's elements on their way in registers while this one's are multiplied: one barrier a step. Loads run along the
 * direction in which the matrix is contiguous. Every size works: what lies outside is zero.
 *
 * Resources (sm_90): products 80 to 127 registers, two or three blocks an SM (float32 backward, 128 rows: 129, one);
 * gradient 80, expand 64, shrink 32; no spills.
 *
 * Serial chain L = K, one fma a k in rising order from 0; then bias, then the old value. An element's result therefore depends
 * on neither the tile nor the rows around it. No atomics.
 *
 * Ladder (times: not measured yet)
 *   128 x 64 x 8, 8 x 4 a thread (products; 64 rows where 128 would leave SMs idle); 32 x 16, 32 x 64 and 16 x 64 (adapters).
 *   Next, not built: vectors of 16 bytes where rows are aligned. TF32 is no alternative, as this is the path that others are
 *       checked by. */
#include "kernels/cuda/linear.cuh"

enum { SIMT_THREADS = 256, SIMT_PIECES = LORA_TILE_ROWS / 32 /* of a tile of adapters */ };

/* ---------------------------------------------------------------- the tiled kernel */

/* Floats between two k of a tile in shared memory, and of both buffers. */
template <class P> struct simt_room {
  enum { LDA = P::BM + 4, LDB = P::BN + 4, A = 2 * P::BK * LDA, B = 2 * P::BK * LDB };
};

/* Element of a tile that thread `thread` moves in its i-th turn. */
template <int N, int BK, bool K_FAST> KS_DEVICE void simt_place(int i, int *at, int *k) {
  const int index = i * SIMT_THREADS + (int)threadIdx.x;
  *at = K_FAST ? index / BK : index % N;
  *k = K_FAST ? index % BK : index / N;
}

/* The j-th of T positions of a thread: groups of up to four neighbours, N / (T / 4) apart, which reads
 * without bank conflicts. */
template <int N, int T> KS_DEVICE int simt_position(int thread, int j) {
  constexpr int G = T < 4 ? T : 4;
  return j / G * (N / (T / G)) + thread * G + j % G;
}

template <class P>
__global__ void __launch_bounds__(SIMT_THREADS) simt_kernel(const __grid_constant__ typename P::args args) {
  constexpr int BM = P::BM, BN = P::BN, BK = P::BK, TM = P::TM, TN = P::TN, LDA = simt_room<P>::LDA,
                LDB = simt_room<P>::LDB;
  constexpr int NA = BM * BK / SIMT_THREADS, NB = BN * BK / SIMT_THREADS;
  static_assert(BM / TM * (BN / TN) == SIMT_THREADS && NA > 0 && NB > 0, "a tile for 256 threads");
  ks_smem smem;
  float *as = ks_smem_take<float>(&smem, simt_room<P>::A), *bs = ks_smem_take<float>(&smem, simt_room<P>::B);
  const P p(args);
  if (p.m_end <= p.m0 || p.n_end <= p.n0) return;
  const int tx = (int)threadIdx.x % (BN / TN), ty = (int)threadIdx.x / (BN / TN);
  float acc[TM][TN] = {}, ra[NA], rb[NB];

  auto load = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < NA; i++) {
      int m, k;
      simt_place<BM, BK, P::A_K_FAST>(i, &m, &k);
      ra[i] = p.m0 + m < p.m_end && k0 + k < p.k_end ? p.a(p.m0 + m, k0 + k) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      int n, k;
      simt_place<BN, BK, P::B_K_FAST>(i, &n, &k);
      rb[i] = p.n0 + n < p.n_end && k0 + k < p.k_end ? p.b(p.n0 + n, k0 + k) : 0.0f;
    }
  };
  load(0);
  for (int64_t k0 = 0; k0 < p.k_end; k0 += BK) {
    const int buffer = (int)(k0 / BK % 2);
    float *a = as + buffer * BK * LDA, *b = bs + buffer * BK * LDB;
#pragma unroll
    for (int i = 0; i < NA; i++) {
      int m, k;
      simt_place<BM, BK, P::A_K_FAST>(i, &m, &k);
      a[k * LDA + m] = ra[i];
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      int n, k;
      simt_place<BN, BK, P::B_K_FAST>(i, &n, &k);
      b[k * LDB + n] = rb[i];
    }
    __syncthreads();
    load(k0 + BK);
#pragma unroll
    for (int k = 0; k < BK; k++) {
      float fa[TM], fb[TN];
#pragma unroll
      for (int i = 0; i < TM; i++)
        fa[i] = a[k * LDA + simt_position<BM, TM>(ty, i)];
#pragma unroll
      for (int j = 0; j < TN; j++)
        fb[j] = b[k * LDB + simt_position<BN, TN>(tx, j)];
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++)
          acc[i][j] = fmaf(fa[i], fb[j], acc[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) {
      const int64_t m = p.m0 + simt_position<BM, TM>(ty, i), n = p.n0 + simt_position<BN, TN>(tx, j);
      if (m < p.m_end && n < p.n_end) p.store(m, n, acc[i][j]);
    }
}

template <class P>
static ks_status simt_launch(ks_ctx *ctx, const char *op, dim3 grid, const typename P::args &args) {
  const size_t bytes = ks_smem_bytes<float>(simt_room<P>::A) + ks_smem_bytes<float>(simt_room<P>::B);
  return ks_launch(ctx, op, simt_kernel<P>, grid, dim3(SIMT_THREADS), bytes, args);
}

/* ---------------------------------------------------------------- products */

template <class T, class Y, bool BACKWARD, int ROWS> struct simt_product {
  typedef linear_product args;
  enum { BM = ROWS, BN = 64, BK = ROWS == 128 ? 8 : 16, TM = ROWS / 16, TN = 4 };
  static constexpr bool A_K_FAST = true, B_K_FAST = !BACKWARD;
  const args &p;
  int64_t m0, n0, m_end, n_end, k_end;

  KS_DEVICE simt_product(const args &from) : p(from) {
    m0 = (int64_t)blockIdx.x * BM;
    n0 = (int64_t)blockIdx.y * BN;
    m_end = p.n_rows;
    n_end = BACKWARD ? p.w.n_in : p.w.n_out;
    k_end = BACKWARD ? p.w.n_out : p.w.n_in;
  }
  KS_DEVICE float a(int64_t m, int64_t k) const { return ks_to_float(((const T *)p.x)[m * k_end + k]); }
  KS_DEVICE float b(int64_t n, int64_t k) const {
    return BACKWARD ? ks_weight_at<T>(p.w, k, n) : ks_weight_at<T>(p.w, n, k);
  }
  KS_DEVICE void store(int64_t m, int64_t n, float value) const {
    Y *y = (Y *)p.y + m * n_end + n;
    if (p.bias) value += p.bias[n];
    if (p.residual) value += ks_to_float(((const Y *)p.residual)[m * n_end + n]);
    *y = ks_from_float<Y>(value);
  }
};

template <class P>
static ks_status launch_tiles(ks_ctx *ctx, const char *op, const linear_product *p, int64_t n_cols) {
  const dim3 grid(ks_blocks_for(p->n_rows, P::BM), ks_blocks_for(n_cols, P::BN));
  return simt_launch<P>(ctx, op, grid, *p);
}

/* Large tiles where they fill the device. */
template <class T, class Y, bool BACKWARD>
static ks_status launch_product(ks_ctx *ctx, const char *op, const linear_product *p) {
  const int64_t n_cols = BACKWARD ? p->w.n_in : p->w.n_out,
                tiles = (p->n_rows + 127) / 128 * ((n_cols + 63) / 64);
  if (tiles >= ks_cuda_device_of(ctx)->n_sm)
    return launch_tiles<simt_product<T, Y, BACKWARD, 128>>(ctx, op, p, n_cols);
  return launch_tiles<simt_product<T, Y, BACKWARD, 64>>(ctx, op, p, n_cols);
}

template <class T> static ks_status launch_products(ks_ctx *ctx, const char *op, const linear_product *p) {
  if (p->backward) return launch_product<T, T, true>(ctx, op, p);
  if (p->y_is_f32) return launch_product<T, float, false>(ctx, op, p);
  return launch_product<T, T, false>(ctx, op, p);
}

ks_status ks_simt_product(ks_ctx *ctx, const char *op, const linear_product *p) {
  return KS_CUDA_BY_ACT(ctx, launch_products, (ctx, op, p));
}

/* ---------------------------------------------------------------- shrink: u = drop(x) A^T, v = scale dy B */

template <class T> struct simt_shrink {
  typedef lora_shrink_args args;
  enum { BM = 32, BN = 16, BK = 16, TM = 2, TN = 1 };
  static constexpr bool A_K_FAST = true, B_K_FAST = true;
  const args &p;
  int64_t m0, n0, m_end, n_end, k_end;
  const float *r;
  const uint8_t *mask;
  float factor;

  KS_DEVICE simt_shrink(const args &from) : p(from) {
    const lora_item tile = p.batch.tiles[blockIdx.x / SIMT_PIECES];
    const lora_seg &seg = p.batch.segs[tile.seg < 0 ? 0 : tile.seg];
    m0 = tile.row + blockIdx.x % SIMT_PIECES * BM;
    m_end = tile.seg < 0 ? 0 : tile.row + tile.n_rows;
    n0 = (int64_t)blockIdx.y * BN;
    n_end = seg.rank;
    k_end = p.n_cols;
    r = lora_reads(seg, p.backward);
    mask = p.backward ? NULL : p.batch.mask;
    factor = p.backward ? seg.scale : mask ? p.batch.keep : 1.0f;
  }
  KS_DEVICE float a(int64_t m, int64_t k) const {
    if (mask && !lora_keeps(mask + m * p.batch.mask_stride, k)) return 0.0f;
    return ks_to_float(((const T *)p.z)[m * p.n_cols + k]);
  }
  KS_DEVICE float b(int64_t n, int64_t k) const { return r[n * p.n_cols + k]; }
  KS_DEVICE void store(int64_t m, int64_t n, float value) const {
    ((T *)p.out)[m * p.batch.u_stride + n] = ks_from_float<T>(value * factor);
  }
};

template <class T> static ks_status launch_shrink(ks_ctx *ctx, const char *op, const lora_shrink_args *p) {
  typedef simt_shrink<T> P;
  const dim3 grid((unsigned)p->batch.n_tiles * SIMT_PIECES, ks_blocks_for(p->batch.max_rank, P::BN));
  return simt_launch<P>(ctx, op, grid, *p);
}

ks_status ks_simt_shrink(ks_ctx *ctx, const char *op, const lora_shrink_args *p) {
  return KS_CUDA_BY_ACT(ctx, launch_shrink, (ctx, op, p));
}

/* ---------------------------------------------------------------- expand: y += scale u B^T, dx += drop'(v A)
 */

template <class T> struct simt_expand {
  typedef lora_expand_args args;
  enum { BM = 32, BN = 64, BK = 16, TM = 2, TN = 4 };
  static constexpr bool A_K_FAST = true, B_K_FAST = false;
  const args &p;
  int64_t m0, n0, m_end, n_end, k_end;
  const float *r;
  const uint8_t *mask;
  float factor;

  KS_DEVICE simt_expand(const args &from) : p(from) {
    const lora_item tile = p.batch.tiles[blockIdx.x / SIMT_PIECES];
    const lora_seg &seg = p.batch.segs[tile.seg < 0 ? 0 : tile.seg];
    m0 = tile.row + blockIdx.x % SIMT_PIECES * BM;
    m_end = tile.seg < 0 ? 0 : tile.row + tile.n_rows;
    n0 = (int64_t)blockIdx.y * BN;
    n_end = seg.rank > 0 ? p.n_cols : 0;
    k_end = seg.rank;
    r = lora_writes(seg, p.backward);
    mask = p.backward ? p.batch.mask : NULL;
    factor = !p.backward ? seg.scale : mask ? p.batch.keep : 1.0f;
  }
  KS_DEVICE float a(int64_t m, int64_t k) const {
    return ks_to_float(((const T *)p.u)[m * p.batch.u_stride + k]);
  }
  KS_DEVICE float b(int64_t n, int64_t k) const { return r[k * p.n_cols + n]; }
  KS_DEVICE void store(int64_t m, int64_t n, float value) const {
    if (mask && !lora_keeps(mask + m * p.batch.mask_stride, n)) return;
    T *y = (T *)p.y + m * p.n_cols + n;
    *y = ks_from_float<T>(ks_to_float(*y) + value * factor);
  }
};

template <class T> static ks_status launch_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p) {
  typedef simt_expand<T> P;
  const dim3 grid((unsigned)p->batch.n_tiles * SIMT_PIECES, ks_blocks_for(p->n_cols, P::BN));
  return simt_launch<P>(ctx, op, grid, *p);
}

ks_status ks_simt_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p) {
  return KS_CUDA_BY_ACT(ctx, launch_expand, (ctx, op, p));
}

/* ---------------------------------------------------------------- gradients of A and B */

template <class T> struct simt_gradient {
  typedef lora_gradient_args args;
  enum { BM = 16, BN = 64, BK = 16, TM = 1, TN = 4 };
  static constexpr bool A_K_FAST = false, B_K_FAST = false;
  const args &p;
  int64_t m0, n0, m_end, n_end, k_end, row;
  float *out;
  const uint8_t *mask;
  float factor;
  bool add;

  KS_DEVICE simt_gradient(const args &from) : p(from) {
    const lora_item chunk = p.batch.chunks[blockIdx.x];
    const lora_seg &seg = p.batch.segs[chunk.seg];
    row = chunk.row;
    m0 = (int64_t)blockIdx.y * BM;
    m_end = chunk.n_rows > 0 ? seg.rank : 0;
    n0 = (int64_t)blockIdx.z * BN;
    n_end = p.n_cols;
    k_end = chunk.n_rows;
    mask = p.of_a ? p.batch.mask : NULL;
    factor = !p.of_a ? seg.scale : mask ? p.batch.keep : 1.0f;
    add = seg.n_chunks == 1;
    out = add ? (p.of_a ? seg.grad_a : seg.grad_b_t)
              : p.partial + (int64_t)blockIdx.x * p.batch.max_rank * p.n_cols;
  }
  KS_DEVICE float a(int64_t m, int64_t k) const {
    return ks_to_float(((const T *)p.u)[(row + k) * p.batch.u_stride + m]);
  }
  KS_DEVICE float b(int64_t n, int64_t k) const {
    if (mask && !lora_keeps(mask + (row + k) * p.batch.mask_stride, n)) return 0.0f;
    return ks_to_float(((const T *)p.z)[(row + k) * p.n_cols + n]);
  }
  KS_DEVICE void store(int64_t m, int64_t n, float value) const {
    float *g = out + m * p.n_cols + n;
    *g = add ? *g + value * factor : value * factor;
  }
};

template <class T>
static ks_status launch_gradient(ks_ctx *ctx, const char *op, const lora_gradient_args *p) {
  typedef simt_gradient<T> P;
  const dim3 grid((unsigned)p->batch.n_chunks, ks_blocks_for(p->batch.max_rank, P::BM),
                  ks_blocks_for(p->n_cols, P::BN));
  return simt_launch<P>(ctx, op, grid, *p);
}

ks_status ks_simt_gradient(ks_ctx *ctx, const char *op, const lora_gradient_args *p) {
  KS_TRY(KS_CUDA_BY_ACT(ctx, launch_gradient, (ctx, op, p)));
  return ks_lora_combine(ctx, op, p);
}
