/* Linear layers on tensor cores, product and adapters in one kernel; bf16 activations, bf16 or block weights.
 *
 *   forward   y[i, o]  = sum_j x[i, j] W[o, j]  + sum_r u[i, r] (scale B[o, r])       + bias[o] (+ residual[i, o])
 *   backward  dx[i, j] = sum_o dy[i, o] W[o, j] + keep[i, j] sum_r v[i, r] (f A[r, j])  (+ dx[i, j]),   f = 1 / (1 - p)
 *
 * The adapters' sum is a few more k-steps on the tile that is already in registers: u (or v) and the segment's rows of B^T
 * (or A) come into the buffers that x and W had, sums go to four registers at a time and from there, if the row belongs to
 * the segment (and the mask keeps the element), to the tile's. No other pass over y.
 *
 * FLOPs: 2 rows n_in n_out + 2 rows rank n_out. Bytes from memory: W once a column of tiles that run together, x once a row
 * of them, y once. Compute-bound above some 200 rows, by mma.sync m16n8k16: on Hopper expected at about 60 % of what wgmma
 * reaches (801 TFLOP/s measured with cuBLASLt on an H200), on Orin and Ampere the hardware's full rate (Orin Nano Super
 * 16.7 TFLOP/s).
 *
 * Geometry: 8 warps (2 x 4), tile 128 (64) rows x 128 columns; k in steps of 32 through three buffers (48 KB; two blocks an
 * SM where it has 96 KB for them and more: sm_80 and later), one barrier a step, two steps on their way by cp.async. W is
 * read as it lies, [n_out, n_in]: forward by ldmatrix, backward by ldmatrix.trans. Blocks of weights: a thread loads the
 * sixteen codes and the scale of the step after next into registers, unpacks those of the next step into its buffer, then
 * multiplies this one's. Shared memory: pieces of 16 bytes, permuted: no bank conflicts in any ldmatrix (tile.cuh). Tile
 * height: 128 rows where that fills the device, else 64; both make the same sums.
 *
 * Resources (sm_90): 126 to 128 registers (64 rows: 94 to 123), 256 threads, 48 to 50 KB (36 to 37), two blocks an SM, no spills.
 *
 * Serial chain L = n_in / 16 mma (then rank / 16), k rising; generation: eight runs of k, added in rising order.
 * Determinism: a row's result depends on nothing but its own inputs and the shape of W. NaN in one segment's adapter stays
 * in its rows. Alignment: n_in and n_out multiples of 8, pointers of 16 bytes; other shapes are loaded element by element
 * into the same buffers.
 *
 * Ladder
 *   128 x 128 x 32, three buffers, warps of 64 x 32. Not measured yet.
 *   Next, not built: warps of 64 x 64 (four of them): 8 ldmatrix for 32 mma instead of 6 for 16, at 128 sums a thread.
 *   On sm_90: linear_wgmma.cu. */
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  MMA_WARPS_M = 2,
  MMA_WARPS_N = 4,
  MMA_THREADS = MMA_WARPS_M * MMA_WARPS_N * KS_WARP,
  MMA_N = 128,
  MMA_K = 32,
  MMA_STAGES = 3,
  MMA_W = MMA_N * MMA_K /* elements of W in a stage */
};

/* Blocks an SM; Turing has room for one. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define MMA_BLOCKS 1
#else
#define MMA_BLOCKS 2
#endif

template <int BM_, bool BACKWARD_, bool BLOCKS_, bool GENERATION_> struct mma_shape {
  static constexpr int BM = BM_, MI = BM / MMA_WARPS_M / 16;
  static constexpr bool BACKWARD = BACKWARD_, BLOCKS = BLOCKS_, GENERATION = GENERATION_;
  static constexpr int W_PIECES = BACKWARD ? MMA_N / 8 : MMA_K / 8;
  /* Length of the sums; columns of y. */
  static KS_DEVICE int n_k(const linear_product &p) { return (int)(BACKWARD ? p.w.n_out : p.w.n_in); }
  static KS_DEVICE int n_cols(const linear_product &p) { return (int)(BACKWARD ? p.w.n_in : p.w.n_out); }
  static size_t bytes() {
    return ks_smem_bytes<ks_bf16>(MMA_STAGES * BM * MMA_K) + ks_smem_bytes<ks_bf16>(MMA_STAGES * MMA_W) +
           ks_smem_bytes<float>(16) + (BACKWARD ? ks_smem_bytes<uint8_t>(BM * 16) : 0);
  }
};

/* What a thread knows of its block. */
struct mma_place {
  int m0, n0, n_rows; /* first row and column */
  int warp_m, warp_n, g, t;
  bool x_aligned, w_aligned;
};

template <class S> KS_DEVICE mma_place mma_place_of(const linear_product &p) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  mma_place at;
  at.m0 = (int)blockIdx.x * S::BM;
  at.n0 = (int)blockIdx.y * MMA_N;
  at.n_rows = (int)p.n_rows;
  at.warp_m = warp / MMA_WARPS_N * 16 * S::MI;
  at.warp_n = warp % MMA_WARPS_N * 32;
  at.g = lane / 4;
  at.t = lane % 4;
  at.x_aligned = ks_is_vector_aligned((const ks_bf16 *)p.x, S::n_k(p));
  at.w_aligned = ks_is_vector_aligned((const ks_bf16 *)(const void *)p.w.values, p.w.n_in);
  return at;
}

/* ---------------------------------------------------------------- loading a step */

template <class S>
KS_DEVICE void load_x(ks_bf16 *stage, const linear_product &p, const mma_place &at, int k0) {
#pragma unroll(S::BLOCKS ? 1 : 2) /* codes need the registers */
  for (int i = 0; i < S::BM * 4 / MMA_THREADS; i++) {
    const int index = i * MMA_THREADS + (int)threadIdx.x, row = index / 4, piece = index % 4;
    tile_load_8(tile_at<4>(stage, row, piece), (const ks_bf16 *)p.x + (int64_t)(at.m0 + row) * S::n_k(p),
                k0 + 8 * piece, S::n_k(p), at.m0 + row < at.n_rows, at.x_aligned);
  }
}

template <class S>
KS_DEVICE void load_w(ks_bf16 *stage, const linear_product &p, const mma_place &at, int k0) {
  const ks_bf16 *w = (const ks_bf16 *)(const void *)p.w.values;
#pragma unroll
  for (int i = 0; i < MMA_W / 8 / MMA_THREADS; i++) {
    const int index = i * MMA_THREADS + (int)threadIdx.x, line = index / S::W_PIECES,
              piece = index % S::W_PIECES;
    const int row = (S::BACKWARD ? k0 : at.n0) + line, col = (S::BACKWARD ? at.n0 : k0) + 8 * piece;
    tile_load_8(tile_at<S::W_PIECES>(stage, line, piece), w + (int64_t)row * p.w.n_in, col, p.w.n_in,
                row < p.w.n_out, at.w_aligned);
  }
}

/* Sixteen codes of a step, on their way to shared memory. */
struct mma_codes {
  uint4 codes;
  float scale; /* 0 where there are none */
};

template <class S>
KS_DEVICE void codes_place(const mma_place &at, int k0, int *line, int *piece, int *row, int *col) {
  const int pairs = S::W_PIECES / 2;
  *line = (int)threadIdx.x / pairs;
  *piece = (int)threadIdx.x % pairs * 2;
  *row = (S::BACKWARD ? k0 : at.n0) + *line;
  *col = (S::BACKWARD ? at.n0 : k0) + 8 * *piece;
}

template <class S>
KS_DEVICE void load_codes(mma_codes *c, const linear_product &p, const mma_place &at, int k0) {
  int line, piece;
  int row, col;
  codes_place<S>(at, k0, &line, &piece, &row, &col);
  c->codes = make_uint4(0, 0, 0, 0);
  c->scale = 0;
  if (row >= (int)p.w.n_out || col >= (int)(p.w.scales_per_row << p.w.log_block)) return;
  c->codes = ks_load_codes_16(p.w, row, col);
  c->scale = ks_scale_value(p.w.scales[row * p.w.scales_per_row + (col >> p.w.log_block)]);
}

template <class S>
KS_DEVICE void store_codes(ks_bf16 *stage, const mma_codes &c, const linear_product &p, const mma_place &at,
                           const float *lut) {
  const bool bytes = p.w.dtype == KS_DTYPE_Q8_0;
  int line, piece, row, col;
  uint32_t w[4];
  codes_place<S>(at, 0, &line, &piece, &row, &col);
  ks_unpack_8(p.w.dtype, lut, make_uint2(c.codes.x, c.codes.y), c.scale, w);
  *(uint4 *)(void *)tile_at<S::W_PIECES>(stage, line, piece) = make_uint4(w[0], w[1], w[2], w[3]);
  ks_unpack_8(p.w.dtype, lut, bytes ? make_uint2(c.codes.z, c.codes.w) : make_uint2(c.codes.y, 0), c.scale,
              w);
  *(uint4 *)(void *)tile_at<S::W_PIECES>(stage, line, piece + 1) = make_uint4(w[0], w[1], w[2], w[3]);
}

/* ---------------------------------------------------------------- the product */

template <class S>
KS_DEVICE void multiply_step(float (&acc)[S::MI][4][4], ks_bf16 *x, ks_bf16 *w, const mma_place &at) {
#pragma unroll
  for (int k = 0; k < MMA_K; k += 16) {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (S::BACKWARD)
        tile_frag_b_trans<S::W_PIECES>(b[n], w, at.warp_n + 16 * n, k);
      else
        tile_frag_b<S::W_PIECES>(b[n], w, at.warp_n + 16 * n, k);
    }
#pragma unroll
    for (int m = 0; m < S::MI; m++) {
      uint32_t a[4];
      tile_frag_a<4>(a, x, at.warp_m + 16 * m, k);
#pragma unroll
      for (int n = 0; n < 4; n++)
        ks_mma_bf16(acc[m][n], a, b[n / 2] + n % 2 * 2);
    }
  }
}

/* Generation: the end of a run of k. */
template <class S> KS_DEVICE void close_run(float (&total)[S::MI][4][4], float (&acc)[S::MI][4][4]) {
#pragma unroll
  for (int m = 0; m < S::MI; m++)
#pragma unroll
    for (int i = 0; i < 16; i++) {
      total[m][i / 4][i % 4] += acc[m][i / 4][i % 4];
      acc[m][i / 4][i % 4] = 0;
    }
}

template <class S>
KS_DEVICE void multiply(float (&acc)[S::MI][4][4], ks_bf16 *xs, ks_bf16 *ws, const linear_product &p,
                        const mma_place &at, const float *lut) {
  const int n_steps = (S::n_k(p) + MMA_K - 1) / MMA_K, run = (n_steps + LINEAR_RUNS - 1) / LINEAR_RUNS;
  float total[S::GENERATION ? S::MI : 1][4][4] = {};
  mma_codes codes;
#pragma unroll
  for (int s = 0; s < MMA_STAGES - 1; s++) {
    if (s < n_steps) {
      load_x<S>(xs + s * S::BM * MMA_K, p, at, s * MMA_K);
      if (!S::BLOCKS) load_w<S>(ws + s * MMA_W, p, at, s * MMA_K);
    }
    ks_cp_async_commit();
  }
  if (S::BLOCKS) {
    load_codes<S>(&codes, p, at, 0);
    store_codes<S>(ws, codes, p, at, lut);
    load_codes<S>(&codes, p, at, MMA_K);
  }
  for (int s = 0; s < n_steps; s++) {
    ks_cp_async_wait<MMA_STAGES - 2>();
    __syncthreads();
    if (S::BLOCKS && s + 1 < n_steps) {
      store_codes<S>(ws + (s + 1) % MMA_STAGES * MMA_W, codes, p, at, lut);
      load_codes<S>(&codes, p, at, (s + 2) * MMA_K);
    }
    const int ahead = s + MMA_STAGES - 1, stage = s % MMA_STAGES;
    if (ahead < n_steps) {
      load_x<S>(xs + ahead % MMA_STAGES * S::BM * MMA_K, p, at, ahead * MMA_K);
      if (!S::BLOCKS) load_w<S>(ws + ahead % MMA_STAGES * MMA_W, p, at, ahead * MMA_K);
    }
    ks_cp_async_commit();
    multiply_step<S>(acc, xs + stage * S::BM * MMA_K, ws + stage * MMA_W, at);
    if constexpr (S::GENERATION)
      if ((s + 1) % run == 0 || s + 1 == n_steps) close_run<S>(total, acc);
  }
  if constexpr (S::GENERATION) {
#pragma unroll
    for (int m = 0; m < S::MI; m++)
#pragma unroll
      for (int i = 0; i < 16; i++)
        acc[m][i / 4][i % 4] = total[m][i / 4][i % 4];
  }
}

/* ---------------------------------------------------------------- adapters */

/* Rows of the tile that are a segment's. */
struct mma_rows {
  int begin, end;
};
template <class S> KS_DEVICE mma_rows rows_of(const lora_seg &seg, const mma_place &at) {
  const int64_t begin = seg.row_begin - at.m0, end = begin + seg.n_rows;
  return {begin > 0 ? (int)begin : 0, end < S::BM ? (int)end : S::BM};
}

/* u [BM][width] and R [width][128], ranks r0 .. of a segment, into the buffers. */
template <class S>
KS_DEVICE void load_adapter(ks_bf16 *us, ks_bf16 *rs, const linear_product &p, const lora_batch &batch,
                            const ks_bf16 *u, const lora_seg &seg, mma_rows rows, int r0, int width,
                            float factor, const mma_place &at) {
  const float *r = lora_writes(seg, S::BACKWARD);
  const int rank = seg.rank;
  const bool u_aligned = ks_is_vector_aligned(u, batch.u_stride) && rank % 8 == 0,
             r_aligned = ((uintptr_t)r & 15) == 0 && S::n_cols(p) % 8 == 0;
  for (int i = (int)threadIdx.x; i < S::BM * (width / 8); i += MMA_THREADS) {
    const int row = i / (width / 8), piece = i % (width / 8);
    tile_load_8(tile_at<LORA_GROUP / 8>(us, row, piece), u + (int64_t)(at.m0 + row) * batch.u_stride,
                r0 + 8 * piece, rank, row >= rows.begin && row < rows.end, u_aligned);
  }
  for (int i = (int)threadIdx.x; i < width * (MMA_N / 8); i += MMA_THREADS) {
    const int k = i / (MMA_N / 8), piece = i % (MMA_N / 8);
    *(uint4 *)(void *)tile_at<MMA_N / 8>(rs, k, piece) =
        r0 + k < rank ? tile_read_8_rounded(r + (int64_t)(r0 + k) * S::n_cols(p), at.n0 + 8 * piece,
                                            S::n_cols(p), r_aligned, factor)
                      : make_uint4(0, 0, 0, 0);
  }
}

/* Adds two tiles of 16 x 8 where their rows are the segment's and the mask, [BM][16 bytes] of the tile's
 * columns, keeps them. */
KS_DEVICE void add_adapter(float (&acc)[4][4], const float (&term)[2][4], mma_rows rows, const uint8_t *mask,
                           int row0, int col0, int n0) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + 8 * h;
    if (row < rows.begin || row >= rows.end) continue;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int col = col0 + 8 * (n0 + n);
      const uint32_t keep =
          mask ? (uint32_t) * (const uint16_t *)(const void *)(mask + row * 16 + col % 16) >> (col / 16)
               : 0x0101u;
      if (keep & 1u) acc[n0 + n][2 * h] += term[n][2 * h];
      if (keep >> 8 & 1u) acc[n0 + n][2 * h + 1] += term[n][2 * h + 1];
    }
  }
}

template <class S>
KS_DEVICE void multiply_adapter(float (&acc)[S::MI][4][4], ks_bf16 *us, ks_bf16 *rs, const uint8_t *mask,
                                mma_rows rows, int width, const mma_place &at) {
#pragma unroll
  for (int m = 0; m < S::MI; m++)
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      float term[2][4] = {};
#pragma unroll 1
      for (int k = 0; k < width; k += 16) {
        uint32_t a[4], b[4];
        tile_frag_a<LORA_GROUP / 8>(a, us, at.warp_m + 16 * m, k);
        tile_frag_b_trans<MMA_N / 8>(b, rs, at.warp_n + 8 * n, k);
        ks_mma_bf16(term[0], a, b);
        ks_mma_bf16(term[1], a, b + 2);
      }
      add_adapter(acc[m], term, rows, mask, at.warp_m + 16 * m + at.g, at.warp_n + 2 * at.t, n);
    }
}

/* The mask of the tile: its columns are one run of 128. */
template <class S>
KS_DEVICE void load_mask(uint8_t *mask, const lora_batch &batch, mma_rows rows, const mma_place &at) {
  const int row = (int)threadIdx.x;
  if (row >= S::BM) return;
  const bool there = row >= rows.begin && row < rows.end;
  ks_cp_async_16(mask + row * 16,
                 batch.mask + (there ? (int64_t)(at.m0 + row) * batch.mask_stride + at.n0 / 8 : 0), there);
}

template <class S>
KS_DEVICE void add_adapters(float (&acc)[S::MI][4][4], ks_bf16 *us, ks_bf16 *rs, uint8_t *mask,
                            const linear_product &p, const lora_batch &batch, const ks_bf16 *u,
                            const mma_place &at) {
  const bool masked = S::BACKWARD && batch.mask;
  for (int64_t s = batch.first_seg[at.m0 / LORA_SPAN_ROWS]; s < batch.n_segs; s++) {
    const lora_seg &seg = batch.segs[s];
    if (seg.row_begin >= at.m0 + S::BM) break;
    const float factor = !S::BACKWARD ? seg.scale : masked ? batch.keep : 1.0f;
    const mma_rows rows = rows_of<S>(seg, at);
    for (int r0 = 0; r0 < seg.rank; r0 += LORA_GROUP) {
      const int left = (seg.rank - r0 + 15) / 16 * 16, width = left < LORA_GROUP ? left : LORA_GROUP;
      __syncthreads();
      load_adapter<S>(us, rs, p, batch, u, seg, rows, r0, width, factor, at);
      if (masked) load_mask<S>(mask, batch, rows, at);
      ks_cp_async_commit();
      ks_cp_async_wait<0>();
      __syncthreads();
      multiply_adapter<S>(acc, us, rs, masked ? mask : NULL, rows, width, at);
    }
  }
}

/* ---------------------------------------------------------------- writing the tile */

/* Row by row in vectors of eight bf16: the lanes of four exchange what they hold of 32 columns. */
template <class S>
KS_DEVICE void store_vectors(const float (&acc)[S::MI][4][4], const linear_product &p, const mma_place &at) {
  const int col = at.n0 + at.warp_n + 8 * at.t;
#pragma unroll
  for (int i = 0; i < 2 * S::MI; i++) {
    const int row = at.m0 + at.warp_m + 8 * i + at.g;
    const bool there = row < at.n_rows && col < S::n_cols(p);
    uint4 *y = (uint4 *)(void *)((ks_bf16 *)p.y + (int64_t)row * S::n_cols(p) + col);
    uint32_t w[4] = {0, 0, 0, 0};
    if (p.residual) {
      const uint4 *from =
          (const uint4 *)(const void *)((const ks_bf16 *)p.residual + (int64_t)row * S::n_cols(p) + col);
      const uint4 old = there ? *from : make_uint4(0, 0, 0, 0);
      w[0] = old.x, w[1] = old.y, w[2] = old.z, w[3] = old.w;
      tile_quad_transpose(w, at.t);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int c = at.n0 + at.warp_n + 8 * n + 2 * at.t;
      float lo = acc[i / 2][n][i % 2 * 2], hi = acc[i / 2][n][i % 2 * 2 + 1];
      if (p.bias && c < S::n_cols(p)) lo += p.bias[c], hi += p.bias[c + 1];
      if (p.residual) lo += ks_bf16_lo(w[n]), hi += ks_bf16_hi(w[n]);
      w[n] = ks_pack_bf16(lo, hi);
    }
    tile_quad_transpose(w, at.t);
    if (there) *y = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

template <class S, class Y>
KS_DEVICE void store_elements(const float (&acc)[S::MI][4][4], const linear_product &p, const mma_place &at) {
#pragma unroll
  for (int i = 0; i < 16 * S::MI; i++) {
    const int m = i / 16, n = i / 4 % 4, j = i % 4;
    const int row = at.m0 + at.warp_m + 16 * m + at.g + j / 2 * 8,
              col = at.n0 + at.warp_n + 8 * n + 2 * at.t + j % 2;
    if (row >= at.n_rows || col >= S::n_cols(p)) continue;
    Y *y = (Y *)p.y + (int64_t)row * S::n_cols(p) + col;
    float value = acc[m][n][j];
    if (p.bias) value += p.bias[col];
    if (p.residual) value += ks_to_float(((const Y *)p.residual)[(int64_t)row * S::n_cols(p) + col]);
    *y = ks_from_float<Y>(value);
  }
}

template <class S>
__global__ void __launch_bounds__(MMA_THREADS, MMA_BLOCKS)
    linear_mma_kernel(const __grid_constant__ linear_product p, const __grid_constant__ lora_batch batch,
                      const ks_bf16 *u) {
  ks_smem smem;
  ks_bf16 *xs = ks_smem_take<ks_bf16>(&smem, MMA_STAGES * S::BM * MMA_K),
          *ws = ks_smem_take<ks_bf16>(&smem, MMA_STAGES * MMA_W);
  float *lut = ks_smem_take<float>(&smem, 16);
  uint8_t *mask = S::BACKWARD ? ks_smem_take<uint8_t>(&smem, S::BM * 16) : NULL;
  const mma_place at = mma_place_of<S>(p);
  if (S::BLOCKS) {
    if (threadIdx.x < 16) lut[threadIdx.x] = p.w.lut[threadIdx.x];
    __syncthreads();
  }
  float acc[S::MI][4][4] = {};
  multiply<S>(acc, xs, ws, p, at, lut);
  if (batch.max_rank > 0) add_adapters<S>(acc, xs, ws, mask, p, batch, u, at);
  if (p.y_is_f32)
    store_elements<S, float>(acc, p, at);
  else if (ks_is_vector_aligned((const ks_bf16 *)p.y, S::n_cols(p)) && ((uintptr_t)p.residual & 15) == 0)
    store_vectors<S>(acc, p, at);
  else
    store_elements<S, ks_bf16>(acc, p, at);
}

/* ---------------------------------------------------------------- launches */

template <class S>
static ks_status launch(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                        const void *u) {
  const dim3 grid(ks_blocks_for(p->n_rows, S::BM),
                  ks_blocks_for(p->backward ? p->w.n_in : p->w.n_out, MMA_N));
  return ks_launch(ctx, op, linear_mma_kernel<S>, grid, dim3(MMA_THREADS), S::bytes(), *p, *batch,
                   (const ks_bf16 *)u);
}

/* Tiles of 128 rows when there are two for every SM. */
template <bool BACKWARD, bool BLOCKS>
static ks_status launch_tall(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                             const void *u) {
  const int64_t tiles =
      (p->n_rows + 127) / 128 * (((p->backward ? p->w.n_in : p->w.n_out) + MMA_N - 1) / MMA_N);
  if (p->n_rows > 64 && tiles >= 2 * ks_cuda_device_of(ctx)->n_sm)
    return launch<mma_shape<128, BACKWARD, BLOCKS, false>>(ctx, op, p, batch, u);
  return launch<mma_shape<64, BACKWARD, BLOCKS, false>>(ctx, op, p, batch, u);
}

template <bool BLOCKS>
static ks_status launch_any(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                            const void *u) {
  if (p->backward) return launch_tall<true, BLOCKS>(ctx, op, p, batch, u);
  if (p->generation) return launch<mma_shape<64, false, BLOCKS, true>>(ctx, op, p, batch, u);
  return launch_tall<false, BLOCKS>(ctx, op, p, batch, u);
}

ks_status ks_mma_linear(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                        const void *u) {
  if (p->n_rows > INT32_MAX - 128)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: %lld rows; a product takes 2^31 - 129 at most", op,
                   (long long)p->n_rows);
  return p->w.scales ? launch_any<true>(ctx, op, p, batch, u) : launch_any<false>(ctx, op, p, batch, u);
}
