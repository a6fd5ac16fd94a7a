/* The adapters' products on tensor cores, bf16 activations: each launch serves all segments of a batch, a piece of one a
 * block (lora_batch). A and B are float32 and rounded to bf16 on the way; sums are float32; u and v are stored as bf16.
 *
 * shrink     u = drop(x) A^T, v = scale dy B:  out[i, r] = factor sum_c z[i, c] R[r, c]
 *   Reads z once: 2 n_cols bytes a row, and R 4 rank n_cols bytes a tile of 32 rows from the L2. FLOPs: 2 rank n_cols a row.
 *   Memory-bound for rank <= 64 (FLOPs a byte of z = rank): computed for 4096 x 2048: 16.8 MB / 4.25 TB/s = 3.9 us on an H200.
 *   Geometry: 8 warps a tile; warp w takes columns 32 (w + 8 j): operands go from global memory straight to registers, 16
 *   bytes a load, since the order of k within a 32-wide step is free as long as both operands have the same. Two to four
 *   steps are under way, 16 KB a step and block. The warps' sums are added in a tree.   L = n_cols / 256 * 2 mma + 3.
 *
 * expand     y += scale u B^T, dx += drop'(v A):  y[i, c] += factor sum_r u[i, r] R[r, c]
 *   Reads and writes y: 4 bytes an element; R from the L2: 4 rank / 32 bytes an element. Columns are dealt out so that a lane
 *   holds eight neighbours: 16-byte accesses, all of a lane under way before the product.   L = rank / 16 mma.
 *
 * gradient   grad[r, c] += factor sum_i u[i, r] z[i, c] over a chunk of 256 rows
 *   Reads z once. 128 columns a block through three buffers of 32 rows (cp.async); a warp does 32 columns. L = 16 mma a
 *   chunk, then the chunks in their order (lora.cu).
 *
 * Determinism: every sum's order is fixed by the shape of the segment; a row's u does not depend on its tile.
 * Alignment: rows of z and y that are not multiples of 16 bytes are read element by element.
 *
 * Ladder (H200, commit f74fb33, rank 8, dropout 0.05; what an adapter adds to the product: all three kernels and the mask)
 *   v1  masks applied as they came, R read in its own step, y read row after row: each waits for memory by itself.
 *       2048 x 8192 x 2048 (rows x n_out x n_in): forward 86 us, backward 106; 2048 x 2048 x 8192: 157 and 149 us; some ten
 *       times what the bytes take.
 *   v2  this: the same sums; all of a step's loads are issued before any is used, up to four steps ahead. Not measured yet.
 *   Next, not built: tiles of 16 rows, or a cluster a tile, for shrink: 2048 rows are 64 blocks, half of an H200's SMs.
 *   Next, not built: two tiles a block in shrink where rows are many, which halves the reads of R. */
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  SHRINK_WARPS = 8,
  SHRINK_K = 32,
  EXPAND_WARPS = 4,
  EXPAND_COLS = 32, /* of a warp */
  GRAD_WARPS = 4,
  GRAD_COLS = 128,
  GRAD_ROWS = 32, /* of a step */
  GRAD_STAGES = 3
};

/* ---------------------------------------------------------------- masks of eight columns */

/* The mask of columns [col, col + 8) (col a multiple of 8): bytes of eight columns each, and bit 0 of each made theirs. */
KS_DEVICE uint2 mask_bytes(const uint8_t *row, int64_t col) {
  return *(const uint2 *)(const void *)(row + col / 128 * 16 + col % 16);
}
KS_DEVICE uint2 mask_of(uint2 bytes, int64_t col) {
  const int q = (int)(col / 16 % 8);
  return make_uint2(bytes.x >> q & 0x01010101u, bytes.y >> q & 0x01010101u);
}
KS_DEVICE uint4 drop_8(uint4 x, uint2 m) {
  return make_uint4(x.x & tile_select(m.x, m.x >> 8), x.y & tile_select(m.x >> 16, m.x >> 24),
                    x.z & tile_select(m.y, m.y >> 8), x.w & tile_select(m.y >> 16, m.y >> 24));
}

/* ---------------------------------------------------------------- shrink */

/* Adds the warps' sums: the upper half of them hands over to the lower, until warp 0 has all. */
template <int N> KS_DEVICE void shrink_reduce(float (&acc)[N], float *room, int warp, int lane) {
#pragma unroll
  for (int half = SHRINK_WARPS / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int i = 0; i < N; i++)
        room[((warp - half) * N + i) * KS_WARP + lane] = acc[i];
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int i = 0; i < N; i++)
        acc[i] += room[(warp * N + i) * KS_WARP + lane];
    __syncthreads();
  }
}

/* What a lane reads for one step: rows g, g + 8, g + 16, g + 24 of z (beyond the tile: its last row, whose result nobody
 * stores), their masks, and ranks g, g + 8, ... of R. Nothing is computed with it before the step's turn comes, so
 * that all of it is under way at once. */
template <int NT> struct shrink_step {
  uint4 z[4];
  uint2 keep[4];
  float4 r[NT][2];
};
struct shrink_place {
  const ks_bf16 *z[4];
  const uint8_t *mask[4]; /* [0] NULL: none */
  const float *r;         /* row g of the ranks */
  int64_t n_cols;
  int n_ranks; /* from rank g on */
  bool z_aligned, r_aligned;
};

template <int NT> KS_DEVICE void shrink_load(shrink_step<NT> *s, const shrink_place &at, int64_t col) {
  const bool there = col < at.n_cols;
#pragma unroll
  for (int i = 0; i < 4; i++)
    s->z[i] = tile_read_8(at.z[i], col, at.n_cols, at.z_aligned);
  if (at.mask[0])
#pragma unroll
    for (int i = 0; i < 4; i++)
      s->keep[i] = there ? mask_bytes(at.mask[i], col) : make_uint2(0, 0);
#pragma unroll
  for (int n = 0; n < NT; n++)
    tile_fetch_8(s->r[n], at.r + 8 * n * at.n_cols, col, 8 * n < at.n_ranks ? at.n_cols : 0, at.r_aligned);
}

template <int NT>
KS_DEVICE void shrink_multiply(float *acc, const shrink_step<NT> &s, bool masked, int64_t col) {
  uint4 z[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    z[i] = masked ? drop_8(s.z[i], mask_of(s.keep[i], col)) : s.z[i];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 b = tile_round_8(s.r[n], 1.0f);
    const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const uint32_t a0[4] = {z[2 * m].x, z[2 * m + 1].x, z[2 * m].y, z[2 * m + 1].y},
                     a1[4] = {z[2 * m].z, z[2 * m + 1].z, z[2 * m].w, z[2 * m + 1].w};
      ks_mma_bf16(acc + (m * NT + n) * 4, a0, b0);
      ks_mma_bf16(acc + (m * NT + n) * 4, a1, b1);
    }
  }
}

/* NT: eights of ranks; AHEAD: steps under way. */
template <int NT, int AHEAD>
__global__ void __launch_bounds__(SHRINK_WARPS *KS_WARP)
    lora_shrink_mma_kernel(const __grid_constant__ lora_shrink_args p) {
  ks_smem smem;
  float *room = ks_smem_take<float>(&smem, SHRINK_WARPS / 2 * 8 * NT * KS_WARP);
  const lora_item tile = p.batch.tiles[blockIdx.x];
  const lora_seg &seg = p.batch.segs[tile.seg];
  const int rank0 = (int)blockIdx.y * 8 * NT, rank = seg.rank;
  if (tile.n_rows == 0 || rank0 >= rank) return;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  const float *r = lora_reads(seg, p.backward);
  const bool masked = !p.backward && p.batch.mask;
  shrink_place at;
  at.n_cols = p.n_cols;
  at.r = r + (rank0 + g) * p.n_cols;
  at.n_ranks = rank - rank0 - g;
  at.z_aligned = ks_is_vector_aligned((const ks_bf16 *)p.z, p.n_cols);
  at.r_aligned = at.z_aligned && ((uintptr_t)r & 15) == 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t row = tile.row + (g + 8 * i < tile.n_rows ? g + 8 * i : tile.n_rows - 1);
    at.z[i] = (const ks_bf16 *)p.z + row * p.n_cols;
    at.mask[i] = masked ? p.batch.mask + row * p.batch.mask_stride : NULL;
  }
  float acc[8 * NT] = {};
  const int64_t step = SHRINK_WARPS * SHRINK_K, first = warp * SHRINK_K + 8 * t;
  shrink_step<NT> steps[AHEAD];
#pragma unroll
  for (int s = 0; s < AHEAD; s++)
    shrink_load(&steps[s], at, first + s * step);
  for (int64_t col0 = 0; col0 + warp * SHRINK_K < p.n_cols; col0 += AHEAD * step) {
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
      const int64_t col = first + col0 + s * step;
      shrink_multiply(acc, steps[s], masked, col);
      shrink_load(&steps[s], at, col + AHEAD * step);
    }
  }
  shrink_reduce(acc, room, warp, lane);
  if (warp > 0) return;
  const float factor = p.backward ? seg.scale : masked ? p.batch.keep : 1.0f;
#pragma unroll
  for (int i = 0; i < 8 * NT; i++) {
    const int m = i / (4 * NT), n = i / 4 % NT, row = m * 16 + g + i % 4 / 2 * 8,
              ri = rank0 + n * 8 + 2 * t + i % 2;
    if (row < tile.n_rows && ri < rank)
      ((ks_bf16 *)p.out)[(tile.row + row) * p.batch.u_stride + ri] = ks_from_float<ks_bf16>(acc[i] * factor);
  }
}

template <int NT, int AHEAD>
static ks_status launch_shrink(ks_ctx *ctx, const char *op, const lora_shrink_args *p) {
  const dim3 grid((unsigned)p->batch.n_tiles, ks_blocks_for(p->batch.max_rank, 8 * NT));
  return ks_launch(ctx, op, lora_shrink_mma_kernel<NT, AHEAD>, grid, dim3(SHRINK_WARPS * KS_WARP),
                   ks_smem_bytes<float>(SHRINK_WARPS / 2 * 8 * NT * KS_WARP), *p);
}

ks_status ks_mma_shrink(ks_ctx *ctx, const char *op, const lora_shrink_args *p) {
  if (p->batch.max_rank <= 8) return launch_shrink<1, 4>(ctx, op, p);
  return p->batch.max_rank <= 16 ? launch_shrink<2, 3>(ctx, op, p) : launch_shrink<4, 2>(ctx, op, p);
}

/* ---------------------------------------------------------------- expand */

/* y += x; old: what y holds. */
KS_DEVICE void add_8(ks_bf16 *y, uint4 old, int64_t n_left, bool aligned, const float x[8]) {
  const uint32_t words[4] = {old.x, old.y, old.z, old.w};
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    sum[i] = ks_bits_to_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16) + x[i];
  if (aligned) {
    *(uint4 *)(void *)y = make_uint4(ks_pack_bf16(sum[0], sum[1]), ks_pack_bf16(sum[2], sum[3]),
                                     ks_pack_bf16(sum[4], sum[5]), ks_pack_bf16(sum[6], sum[7]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < n_left) y[i] = ks_from_float<ks_bf16>(sum[i]);
}

static __global__ void __launch_bounds__(EXPAND_WARPS *KS_WARP, 4)
    lora_expand_mma_kernel(const __grid_constant__ lora_expand_args p) {
  const lora_item tile = p.batch.tiles[blockIdx.x];
  const lora_seg &seg = p.batch.segs[tile.seg];
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            rank = seg.rank;
  const int64_t col0 = ((int64_t)blockIdx.y * EXPAND_WARPS + warp) * EXPAND_COLS;
  if (tile.n_rows == 0 || col0 >= p.n_cols) return; /* whole warps; no barrier below */
  const float *r = lora_writes(seg, p.backward);
  const ks_bf16 *u = (const ks_bf16 *)p.u + tile.row * p.batch.u_stride;
  const uint8_t *mask = p.backward ? p.batch.mask : NULL;
  const bool aligned = ks_is_vector_aligned((const ks_bf16 *)p.y, p.n_cols);
  const int64_t col = col0 + 8 * t;
  uint4 old[4]; /* and keep: rows g, g + 8, g + 16, g + 24, on their way during the product */
  uint2 keep[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t row = tile.row + (g + 8 * i < tile.n_rows ? g + 8 * i : tile.n_rows - 1);
    old[i] = tile_read_8((const ks_bf16 *)p.y + row * p.n_cols, col, p.n_cols, aligned);
    keep[i] =
        mask && col < p.n_cols ? mask_bytes(mask + row * p.batch.mask_stride, col) : make_uint2(~0u, ~0u);
  }
  float acc[2][4][4] = {};
  for (int k = 0; k < rank; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = i / 4 * 16 + g + i % 2 * 8;
      a[i / 4][i % 4] = row < tile.n_rows
                            ? tile_read_pair(u + row * p.batch.u_stride, k + 2 * t + i % 4 / 2 * 8, rank)
                            : 0u;
    }
#pragma unroll
    for (int n = 0; n < 4; n++) { /* column 2t + i of tile n is column 8t + 2n + i of the warp */
      const int64_t c = col0 + g / 2 * 8 + 2 * n + g % 2;
      const uint32_t b[2] = {tile_read_column(r, p.n_cols, k + 2 * t, rank, c, 1.0f),
                             tile_read_column(r, p.n_cols, k + 2 * t + 8, rank, c, 1.0f)};
#pragma unroll
      for (int m = 0; m < 2; m++)
        ks_mma_bf16(acc[m][n], a[m], b);
    }
  }
  const float factor = !p.backward ? seg.scale : mask ? p.batch.keep : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * i;
    if (row >= tile.n_rows || col >= p.n_cols) continue;
    const uint2 bits = mask_of(keep[i], col);
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
      x[j] = (j < 4 ? bits.x >> 8 * j : bits.y >> 8 * (j - 4)) & 1u
                 ? acc[i / 2][j / 2][i % 2 * 2 + j % 2] * factor
                 : 0.0f;
    add_8((ks_bf16 *)p.y + (tile.row + row) * p.n_cols + col, old[i], p.n_cols - col, aligned, x);
  }
}

ks_status ks_mma_expand(ks_ctx *ctx, const char *op, const lora_expand_args *p) {
  const dim3 grid((unsigned)p->batch.n_tiles, ks_blocks_for(p->n_cols, EXPAND_WARPS * EXPAND_COLS));
  return ks_launch(ctx, op, lora_expand_mma_kernel, grid, dim3(EXPAND_WARPS * KS_WARP), 0, *p);
}

/* ---------------------------------------------------------------- gradients */

/* Buffers of one step: z [32][128], u [32][16 MT], mask [32][16 bytes]. */
template <int MT> struct grad_room {
  enum {
    Z_PIECES = GRAD_COLS / 8,
    U_PIECES = 2 * MT,
    Z = GRAD_ROWS * GRAD_COLS,
    U = GRAD_ROWS * 16 * MT,
    MASK = GRAD_ROWS * 16,
    THREADS = GRAD_WARPS * KS_WARP
  };
  ks_bf16 *z, *u;
  uint8_t *mask;
  KS_DEVICE grad_room(ks_smem *smem) {
    z = ks_smem_take<ks_bf16>(smem, GRAD_STAGES * Z);
    u = ks_smem_take<ks_bf16>(smem, GRAD_STAGES * U);
    mask = ks_smem_take<uint8_t>(smem, GRAD_STAGES * MASK);
  }
  static size_t bytes() {
    return ks_smem_bytes<ks_bf16>(GRAD_STAGES * Z) + ks_smem_bytes<ks_bf16>(GRAD_STAGES * U) +
           ks_smem_bytes<uint8_t>(GRAD_STAGES * MASK);
  }
};

/* Queues rows [row, row + 32) of a chunk into a stage. Columns of u beyond a segment's rank hold anything:
 * they make rows of the product that nobody stores. */
template <int MT>
KS_DEVICE void grad_load(const grad_room<MT> &room, const lora_gradient_args &p, const lora_item &chunk,
                         int row, int stage, int64_t col0, int rank0, bool masked, bool z_aligned,
                         bool u_aligned) {
  typedef grad_room<MT> R;
#pragma unroll
  for (int i = (int)threadIdx.x; i < GRAD_ROWS * R::Z_PIECES; i += R::THREADS) {
    const int k = i / R::Z_PIECES, piece = i % R::Z_PIECES;
    tile_load_8(tile_at<R::Z_PIECES>(room.z + stage * R::Z, k, piece),
                (const ks_bf16 *)p.z + (chunk.row + row + k) * p.n_cols, col0 + 8 * piece, p.n_cols,
                row + k < chunk.n_rows, z_aligned);
  }
  for (int i = (int)threadIdx.x; i < GRAD_ROWS * R::U_PIECES; i += R::THREADS) {
    const int k = i / R::U_PIECES, piece = i % R::U_PIECES;
    tile_load_8(tile_at<R::U_PIECES>(room.u + stage * R::U, k, piece),
                (const ks_bf16 *)p.u + (chunk.row + row + k) * p.batch.u_stride, rank0 + 8 * piece,
                p.batch.u_stride, row + k < chunk.n_rows, u_aligned);
  }
  const int k = (int)threadIdx.x;
  if (masked && k < GRAD_ROWS)
    ks_cp_async_16(room.mask + stage * R::MASK + k * 16,
                   p.batch.mask +
                       (row + k < chunk.n_rows ? (chunk.row + row + k) * p.batch.mask_stride + col0 / 8 : 0),
                   row + k < chunk.n_rows);
}

/* Drops elements of b, of columns 8n + g (n = n0, n0 + 1) of the warp's 32 and rows k + 2t, + 1, + 8, + 9 of
 * the stage. */
KS_DEVICE void grad_drop(uint32_t b[4], const uint8_t *mask, int k, int n0, int warp, int g, int t) {
#pragma unroll
  for (int i = 0; i < 4; i++) { /* b[i]: column tile n0 + i / 2, rows + 8 (i % 2) */
    const uint8_t *at = mask + (k + 2 * t + i % 2 * 8) * 16 + i / 2 * 8 + g;
    const int q = 2 * warp + n0 / 2;
    b[i] &= tile_select(at[0] >> q, at[16] >> q);
  }
}

template <int MT>
__global__ void __launch_bounds__(GRAD_WARPS *KS_WARP)
    lora_gradient_mma_kernel(const __grid_constant__ lora_gradient_args p) {
  typedef grad_room<MT> R;
  ks_smem smem;
  const R room(&smem);
  const lora_item chunk = p.batch.chunks[blockIdx.x];
  const lora_seg &seg = p.batch.segs[chunk.seg];
  const int rank0 = (int)blockIdx.y * 16 * MT, rank = seg.rank;
  if (chunk.n_rows == 0 || rank0 >= rank) return;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  const int64_t col0 = (int64_t)blockIdx.z * GRAD_COLS;
  const bool masked = p.of_a && p.batch.mask,
             z_aligned = ks_is_vector_aligned((const ks_bf16 *)p.z, p.n_cols),
             u_aligned = ks_is_vector_aligned((const ks_bf16 *)p.u, p.batch.u_stride);
  const int n_steps = (chunk.n_rows + GRAD_ROWS - 1) / GRAD_ROWS;
  float acc[MT][4][4] = {};
#pragma unroll
  for (int s = 0; s < GRAD_STAGES - 1; s++) {
    if (s < n_steps)
      grad_load<MT>(room, p, chunk, s * GRAD_ROWS, s, col0, rank0, masked, z_aligned, u_aligned);
    ks_cp_async_commit();
  }
  for (int s = 0; s < n_steps; s++) {
    ks_cp_async_wait<GRAD_STAGES - 2>();
    __syncthreads();
    const int ahead = s + GRAD_STAGES - 1, stage = s % GRAD_STAGES;
    if (ahead < n_steps)
      grad_load<MT>(room, p, chunk, ahead * GRAD_ROWS, ahead % GRAD_STAGES, col0, rank0, masked, z_aligned,
                    u_aligned);
    ks_cp_async_commit();
#pragma unroll
    for (int k = 0; k < GRAD_ROWS; k += 16) {
      uint32_t b[2][4], a[4];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        tile_frag_b_trans<R::Z_PIECES>(b[n], room.z + stage * R::Z, warp * 32 + 16 * n, k);
        if (masked) grad_drop(b[n], room.mask + stage * R::MASK, k, 2 * n, warp, g, t);
      }
#pragma unroll
      for (int m = 0; m < MT; m++) {
        tile_frag_a_trans<R::U_PIECES>(a, room.u + stage * R::U, 16 * m, k);
#pragma unroll
        for (int n = 0; n < 4; n++)
          ks_mma_bf16(acc[m][n], a, b[n / 2] + n % 2 * 2);
      }
    }
  }
  const float factor = !p.of_a ? seg.scale : masked ? p.batch.keep : 1.0f;
  const bool add = seg.n_chunks == 1;
  float *out = add ? (p.of_a ? seg.grad_a : seg.grad_b_t)
                   : p.partial + (int64_t)blockIdx.x * p.batch.max_rank * p.n_cols;
#pragma unroll
  for (int i = 0; i < MT * 16; i++) {
    const int m = i / 16, n = i / 4 % 4, r = rank0 + m * 16 + g + i % 4 / 2 * 8;
    const int64_t col = col0 + warp * 32 + n * 8 + 2 * t + i % 2;
    if (r >= rank || col >= p.n_cols) continue;
    float *at = out + r * p.n_cols + col;
    *at = add ? *at + acc[m][n][i % 4] * factor : acc[m][n][i % 4] * factor;
  }
}

template <int MT> static ks_status launch_gradient(ks_ctx *ctx, const char *op, const lora_gradient_args *p) {
  const dim3 grid((unsigned)p->batch.n_chunks, ks_blocks_for(p->batch.max_rank, 16 * MT),
                  ks_blocks_for(p->n_cols, GRAD_COLS));
  return ks_launch(ctx, op, lora_gradient_mma_kernel<MT>, grid, dim3(GRAD_WARPS * KS_WARP),
                   grad_room<MT>::bytes(), *p);
}

ks_status ks_mma_gradient(ks_ctx *ctx, const char *op, const lora_gradient_args *p) {
  const int rank = p->batch.max_rank;
  KS_TRY(rank <= 16   ? launch_gradient<1>(ctx, op, p)
         : rank <= 32 ? launch_gradient<2>(ctx, op, p)
                      : launch_gradient<4>(ctx, op, p));
  return ks_lora_combine(ctx, op, p);
}
