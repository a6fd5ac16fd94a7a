/* Linear layers of up to 64 rows (generation passes that linear_decode_few.cu does not take), bf16
 * activations, bf16 or block weights, adapters included:
 *
 *   y[i, o] = sum_j x[i, j] W[o, j] + scale sum_r u[i, r] B[o, r] + bias[o] (+ residual[i, o])
 *
 * Bytes: W once (2, 1.06, 0.56 or 0.53 bytes an element), x from the L2, y. FLOPs: 2 rows a weight. Memory-bound: 2048 x 2048
 * bf16 is 8.4 MB, 2.0 us at 4.25 TB/s (H200), 82 us at 102 GB/s (Orin Nano Super).
 *
 * Geometry: a block does 16 outputs, its 8 warps one run of k each; four steps of 32 k of W are on their way in registers
 * (32 KB a block), two of x. A lane reads 16 bytes of a row of W (8 codes of a block); lanes of four then exchange words, so
 * that the operands of the mma hold k in its natural order. Sums of the runs meet in shared memory. A warp makes the
 * adapters' term of every eighth segment of the rows, while the first steps of W are under way.
 *
 * Determinism: the same bits as linear_mma.cu in its generation form: the same mma in the same order of k within a run, runs
 * added in rising order, the adapters' ranks in the same groups, the same last additions. Rows are the mma's own rows: none
 * sees another. Serial chain L = n_in / 128 mma + 8. Alignment: n_in a multiple of 8 and pointers of 16 bytes for vector
 * reads, else element by element.
 *
 * Ladder (H200, bf16, commit f74fb33, one row, weights not in cache; the measurement itself costs about 3 us)
 *   16 outputs a block, 8 runs, operands through registers: n_out x n_in 2048 x 2048 11 us (computed 2), 8192 x 2048 25 us,
 *       2048 x 8192 36 us (computed 8): 31 and 22 % of the rate of a copy. 128 blocks for 2048 outputs leave each SM 32 KB
 *       under way: suspected to be too little.
 *   Next, not built: 16 bytes of codes a lane for 4-bit blocks (now 4 bytes: 128 bytes a request); several layers in one
 *       launch. */
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  DECODE_N = 16, /* outputs of a block */
  DECODE_K = 32, /* of a step */
  DECODE_THREADS = LINEAR_RUNS * KS_WARP,
  DECODE_AHEAD = 4,  /* steps of W in registers, */
  DECODE_X_AHEAD = 2 /* and of x */
};

/* What a lane knows of its warp's share. */
struct decode_place {
  int64_t row0, n0; /* first row and output */
  int64_t end, run; /* k of this warp end there; length of a run */
  int n_rows, g, t;
  bool x_aligned, w_aligned;
};

/* ---------------------------------------------------------------- operands */

/* Rows g and g + 8 of each 16 rows of x, eight k from col on. */
template <int MT>
KS_DEVICE void read_x(uint4 (&x)[2 * MT], const linear_product &p, const decode_place &at, int64_t k0) {
  const int64_t col = k0 + 8 * at.t;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int row = 8 * i + at.g;
    x[i] = make_uint4(0, 0, 0, 0);
    if (row < at.n_rows && k0 < at.end)
      x[i] = tile_read_8((const ks_bf16 *)p.x + (at.row0 + row) * p.w.n_in, col, p.w.n_in, at.x_aligned);
  }
}

/* Eight values of W as they are stored: bf16, or codes and the scale's bits in w. */
template <bool BLOCKS>
KS_DEVICE uint4 read_w(const linear_product &p, const decode_place &at, int64_t row, int64_t k0) {
  const int64_t col = k0 + 8 * at.t;
  const uint8_t *values = p.w.values + row * p.w.row_bytes;
  if (row >= p.w.n_out || k0 >= at.end) return make_uint4(0, 0, 0, 0);
  if (!BLOCKS) return tile_read_8((const ks_bf16 *)(const void *)values, col, p.w.n_in, at.w_aligned);
  const uint32_t scale = p.w.scales[row * p.w.scales_per_row + (col >> p.w.log_block)];
  if (p.w.dtype != KS_DTYPE_Q8_0)
    return make_uint4(*(const uint32_t *)(const void *)(values + col / 2), 0, 0, scale);
  const uint2 codes = *(const uint2 *)(const void *)(values + col);
  return make_uint4(codes.x, codes.y, 0, scale);
}

template <bool BLOCKS> KS_DEVICE void unpack_w(uint32_t (&w)[4], uint4 stored, int dtype, const float *lut) {
  if (BLOCKS) {
    ks_unpack_8(dtype, lut, make_uint2(stored.x, stored.y), ks_scale_value((uint16_t)stored.w), w);
    return;
  }
  w[0] = stored.x, w[1] = stored.y, w[2] = stored.z, w[3] = stored.w;
}

/* One step: two mma of k = 16 for each 16 rows and 8 outputs. */
template <int MT, bool BLOCKS>
KS_DEVICE void decode_step(float (&acc)[MT][2][4], const uint4 (&x)[2 * MT], const uint4 (&stored)[2],
                           int dtype, const float *lut, int t) {
  uint32_t w[2][4], a[2 * MT][4];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    unpack_w<BLOCKS>(w[n], stored[n], dtype, lut);
    tile_quad_transpose(w[n], t);
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    a[i][0] = x[i].x, a[i][1] = x[i].y, a[i][2] = x[i].z, a[i][3] = x[i].w;
    tile_quad_transpose(a[i], t);
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2)
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const uint32_t rows[4] = {a[2 * m][k], a[2 * m + 1][k], a[2 * m][k + 1], a[2 * m + 1][k + 1]};
#pragma unroll
      for (int n = 0; n < 2; n++)
        ks_mma_bf16(acc[m][n], rows, w[n] + k);
    }
}

/* ---------------------------------------------------------------- adapters */

/* Ranks r0 .. of the adapters: term [16 MT][16], zeros where a row has none. */
template <int MT>
KS_DEVICE void decode_adapters(float *term, const lora_batch &batch, const ks_bf16 *u, int r0,
                               const decode_place &at, int64_t n_out) {
  for (int i = (int)threadIdx.x; i < 16 * MT * DECODE_N; i += DECODE_THREADS)
    term[i] = 0;
  __syncthreads();
  int64_t s = batch.first_seg[at.row0 / LORA_SPAN_ROWS] + (int)threadIdx.x / KS_WARP;
  for (; s < batch.n_segs; s += LINEAR_RUNS) {
    const lora_seg &seg = batch.segs[s];
    if (seg.row_begin >= at.row0 + at.n_rows) break;
    const int64_t begin = seg.row_begin - at.row0, end = begin + seg.n_rows;
    const int rank = seg.rank, limit = rank < r0 + LORA_GROUP ? rank : r0 + LORA_GROUP;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      if (begin >= 16 * (m + 1) || end <= 16 * m || r0 >= rank) continue;
      float sum[2][4] = {};
      for (int k = r0; k < limit; k += 16) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = 16 * m + at.g + i % 2 * 8;
          a[i] = row >= begin && row < end
                     ? tile_read_pair(u + (at.row0 + row) * batch.u_stride, k + 2 * at.t + i / 2 * 8, rank)
                     : 0u;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const int64_t col = at.n0 + 8 * n + at.g;
          const uint32_t b[2] = {tile_read_column(seg.b_t, n_out, k + 2 * at.t, rank, col, seg.scale),
                                 tile_read_column(seg.b_t, n_out, k + 2 * at.t + 8, rank, col, seg.scale)};
          ks_mma_bf16(sum[n], a, b);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = 16 * m + at.g + i % 4 / 2 * 8;
        if (row >= begin && row < end)
          term[row * DECODE_N + i / 4 * 8 + 2 * at.t + i % 2] = sum[i / 4][i % 4];
      }
    }
  }
}

/* ---------------------------------------------------------------- the kernel */

template <int MT, bool BLOCKS>
KS_DEVICE void decode_run(float (&acc)[MT][2][4], uint4 (&w)[DECODE_AHEAD][2], const linear_product &p,
                          const decode_place &at, int64_t begin, const float *lut) {
  uint4 x[DECODE_X_AHEAD][2 * MT];
#pragma unroll
  for (int d = 0; d < DECODE_X_AHEAD; d++)
    read_x<MT>(x[d], p, at, begin + d * DECODE_K);
  for (int64_t k0 = begin; k0 < at.end; k0 += DECODE_AHEAD * DECODE_K)
#pragma unroll
    for (int d = 0; d < DECODE_AHEAD; d++) {
      const int64_t k = k0 + d * DECODE_K;
      if (k >= at.end) continue;
      decode_step<MT, BLOCKS>(acc, x[d % DECODE_X_AHEAD], w[d], p.w.dtype, lut, at.t);
#pragma unroll
      for (int n = 0; n < 2; n++)
        w[d][n] = read_w<BLOCKS>(p, at, at.n0 + 8 * n + at.g, k + DECODE_AHEAD * DECODE_K);
      read_x<MT>(x[d % DECODE_X_AHEAD], p, at, k + DECODE_X_AHEAD * DECODE_K);
    }
}

template <int MT>
KS_DEVICE void decode_keep(float *sums, const float (&acc)[MT][2][4], const decode_place &at) {
  float *mine = sums + (int)threadIdx.x / KS_WARP * 16 * MT * DECODE_N;
#pragma unroll
  for (int i = 0; i < 8 * MT; i++) {
    const int row = i / 8 * 16 + at.g + i % 4 / 2 * 8, col = i / 4 % 2 * 8 + 2 * at.t + i % 2;
    mine[row * DECODE_N + col] = acc[i / 8][i / 4 % 2][i % 4];
  }
}

template <class Y>
KS_DEVICE void decode_store(const linear_product &p, int64_t row, int64_t col, float value) {
  Y *y = (Y *)p.y + row * p.w.n_out + col;
  if (p.bias) value += p.bias[col];
  if (p.residual) value += ks_to_float(((const Y *)p.residual)[row * p.w.n_out + col]);
  *y = ks_from_float<Y>(value);
}

template <int MT, bool BLOCKS>
__global__ void __launch_bounds__(DECODE_THREADS, MT == 1 ? 2 : 1)
    linear_decode_kernel(const __grid_constant__ linear_product p, const __grid_constant__ lora_batch batch,
                         const ks_bf16 *u) {
  enum {
    TILE = 16 * MT * DECODE_N,
    OWN = TILE / DECODE_THREADS
  }; /* elements of the block, and of a thread at the end */
  ks_smem smem;
  float *sums = ks_smem_take<float>(&smem, LINEAR_RUNS * TILE), *term = ks_smem_take<float>(&smem, TILE),
        *lut = ks_smem_take<float>(&smem, 16);
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  decode_place at;
  at.row0 = (int64_t)blockIdx.y * 16 * MT;
  at.n0 = (int64_t)blockIdx.x * DECODE_N;
  at.n_rows = (int)(p.n_rows - at.row0 < 16 * MT ? p.n_rows - at.row0 : 16 * MT);
  at.g = lane / 4;
  at.t = lane % 4;
  const int64_t n_steps = (p.w.n_in + DECODE_K - 1) / DECODE_K;
  at.run = (n_steps + LINEAR_RUNS - 1) / LINEAR_RUNS * DECODE_K;
  const int64_t begin = warp * at.run;
  at.end = begin + at.run < p.w.n_in ? begin + at.run : p.w.n_in;
  at.x_aligned = ks_is_vector_aligned((const ks_bf16 *)p.x, p.w.n_in);
  at.w_aligned = ks_is_vector_aligned((const ks_bf16 *)(const void *)p.w.values, p.w.n_in);

  uint4 w[DECODE_AHEAD][2];
#pragma unroll
  for (int i = 0; i < 2 * DECODE_AHEAD; i++)
    w[i / 2][i % 2] = read_w<BLOCKS>(p, at, at.n0 + 8 * (i % 2) + at.g, begin + i / 2 * DECODE_K);
  if (BLOCKS && threadIdx.x < 16) lut[threadIdx.x] = p.w.lut[threadIdx.x];
  if (batch.max_rank > 0) decode_adapters<MT>(term, batch, u, 0, at, p.w.n_out);
  if (BLOCKS) __syncthreads();
  float acc[MT][2][4] = {};
  decode_run<MT, BLOCKS>(acc, w, p, at, begin, lut);
  decode_keep<MT>(sums, acc, at);
  __syncthreads();
  float total[OWN] = {};
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int e = i * DECODE_THREADS + (int)threadIdx.x;
    for (int r = 0; r < LINEAR_RUNS && r * at.run < p.w.n_in; r++)
      total[i] += sums[r * TILE + e];
    if (batch.max_rank > 0) total[i] += term[e];
  }
  for (int r0 = LORA_GROUP; r0 < batch.max_rank; r0 += LORA_GROUP) {
    __syncthreads();
    decode_adapters<MT>(term, batch, u, r0, at, p.w.n_out);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; i++)
      total[i] += term[i * DECODE_THREADS + (int)threadIdx.x];
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int e = i * DECODE_THREADS + (int)threadIdx.x;
    const int64_t row = at.row0 + e / DECODE_N, col = at.n0 + e % DECODE_N;
    if (e / DECODE_N >= at.n_rows || col >= p.w.n_out) continue;
    if (p.y_is_f32)
      decode_store<float>(p, row, col, total[i]);
    else
      decode_store<ks_bf16>(p, row, col, total[i]);
  }
}

/* ---------------------------------------------------------------- launches */

template <int MT, bool BLOCKS>
static ks_status launch(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                        const void *u) {
  const dim3 grid(ks_blocks_for(p->w.n_out, DECODE_N), ks_blocks_for(p->n_rows, 16 * MT));
  const size_t bytes = ks_smem_bytes<float>(LINEAR_RUNS * 16 * MT * DECODE_N) +
                       ks_smem_bytes<float>(16 * MT * DECODE_N) + ks_smem_bytes<float>(16);
  return ks_launch(ctx, op, linear_decode_kernel<MT, BLOCKS>, grid, dim3(DECODE_THREADS), bytes, *p, *batch,
                   (const ks_bf16 *)u);
}

template <bool BLOCKS>
static ks_status launch_any(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                            const void *u) {
  if (p->n_rows <= 16) return launch<1, BLOCKS>(ctx, op, p, batch, u);
  return p->n_rows <= 32 ? launch<2, BLOCKS>(ctx, op, p, batch, u) : launch<4, BLOCKS>(ctx, op, p, batch, u);
}

ks_status ks_decode_linear(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                           const void *u) {
  return p->w.scales ? launch_any<true>(ctx, op, p, batch, u) : launch_any<false>(ctx, op, p, batch, u);
}
