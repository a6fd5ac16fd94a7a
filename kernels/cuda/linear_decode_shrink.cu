/* u = x A^T of all parts and adapters of a generation pass, in one launch.
 *
 *   u[i, r] = sum_j x[i, j] A[r, j], for each part p and row i of a segment whose adapter has rank > 0 there
 *
 * Bytes: A once a piece of a segment (4 n_in rank), x from the L2. FLOPs: 2 n_in rank a row. For few rows bound by latency: a
 * block that waits for x, then for A, then for its warps' sums.
 *
 * Geometry: a block of 16 warps takes a piece of a segment (8 rows, or as many as have room; where rows are not
 * aligned, and of more than 64 rows, 32) at one part, for as many ranks (16, 8, 4, 2) as make 64 KB of A, so that no
 * SM draws more than it can in half a microsecond and most of them draw. Warp w does columns 32 (w + 16 j): A is
 * loaded as it lies, 32 bytes a lane and row, four steps under way before x is waited for, and rounded to bf16 on the
 * way to the mma, whose 16 rows are ranks and whose columns are rows of x. The order of k within a step is the
 * registers': both operands have it. Eight rows: x in shared memory, and before linear_decode_few.cu with its norm: norm->y is
 * then never written.   H200, rank 8 at q, k, v of 1B: 3 blocks of 64 KB; at down (8192): 4 blocks of 2 ranks.
 *
 * Resources (sm_90): 127 registers for few rows, 104 for many, 512 threads, one block an SM, no spills.
 *
 * Order of sums: a warp's steps in rising order, two mma each, then ((0 + warp 0) + warp 1) + ..., whatever the number of rows.
 * L = n_in / 256 mma + 16.
 *
 * Time, computed, H200: 0.5 us to 64 KB through one SM + 1 latency + the norm's 0.5 + 0.3 for sums: 2 us, and 2.5 around it; four
 * launches a layer: 1B with one adapter 795 + 16 * 4 * 4 = 1051 us, 951 tokens/s (with PDL, which lets the product's ring fill
 * meanwhile, 673 + 16 * 4 * 2 = 801 us, 1249 tokens/s).   64 rows, q, k and v of 3B, rank 8: one adapter 48 blocks of 51 KB of A
 * and 51 of x, sixteen 96 blocks of 51 and 26: 1.2 us through an SM, two latencies and the sums, 3.5 us for either (A of sixteen is
 * 4.9 MB, 1.1 us of the memory's time).
 *
 * Ladder
 *   v1  lora_shrink_mma_kernel a part: 8 warps, tiles of 32 rows, seven launches a layer: 441 -> 273 tokens/s (H200, f74fb33)
 *   v2  this. Not measured yet. */
#include "kernels/cuda/linear_decode.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  SHRINK_WARPS = 16,
  SHRINK_THREADS = SHRINK_WARPS * KS_WARP,
  SHRINK_K = 32,                /* of a step */
  SHRINK_BLOCK_BYTES = 64 << 10 /* of A that a block reads, or fewer */
};

/* What a lane reads of A for a step: columns 8t .. 8t + 7 of ranks g and g + 8. */
struct shrink_ranks {
  float4 a[2][2];
};

struct shrink_place {
  const float *a; /* rank g of the block's */
  int n_ranks;    /* from rank g on, of the block's */
  int warp, g, t;
  bool aligned;
};

KS_DEVICE void shrink_load(shrink_ranks *r, const shrink_place &at, int64_t n_in, int64_t col) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    tile_fetch_8(r->a[i], at.a + 8 * i * n_in, col, 8 * i < at.n_ranks ? n_in : 0, at.aligned);
}

/* sum += A x^T over a step: ranks g, g + 8 of rows 8n + 2t, 8n + 2t + 1. x: columns 8t .. 8t + 7 of rows 8n + g. The order of k
 * within the step is that of the registers. */
template <int NT>
KS_DEVICE void shrink_multiply(float (&sum)[NT][4], const shrink_ranks &r, const uint4 (&x)[NT]) {
  const uint4 lo = tile_round_8(r.a[0], 1.0f), hi = tile_round_8(r.a[1], 1.0f);
  const uint32_t a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint32_t b0[2] = {x[n].x, x[n].y}, b1[2] = {x[n].z, x[n].w};
    ks_mma_bf16(sum[n], a0, b0);
    ks_mma_bf16(sum[n], a1, b1);
  }
}

/* Rows of x from shared memory (few, with the norm), or from device memory. */
template <int NT>
KS_DEVICE void shrink_read_x(uint4 (&x)[NT], const decode_args &p, const decode_rows &item, ks_bf16 *xs,
                             const shrink_place &at, int64_t col) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int row = min(8 * n + at.g, item.n_rows - 1); /* beyond the last: a result that nobody stores */
    if (NT == 1)
      x[n] = col < p.n_in
                 ? *(const uint4 *)(void *)decode_x_at(xs, decode_x_pieces(p.n_in), row, (int)(col / 8))
                 : make_uint4(0, 0, 0, 0);
    else
      x[n] = tile_read_8(p.x + (int64_t)(item.begin + row) * p.n_in, col, p.n_in, at.aligned);
  }
}

/* Grid: items, blocks of ranks, parts. NT: eights of rows; 1: few rows. AHEAD: steps under way. */
template <int NT, int AHEAD>
__global__ void __launch_bounds__(SHRINK_THREADS, 1)
    decode_shrink_kernel(const __grid_constant__ decode_args p, int block_ranks) {
  enum { TILE = DECODE_SHRINK_RANKS * 8 * NT };
  ks_smem smem;
  float *sums = ks_smem_take<float>(&smem, SHRINK_WARPS * TILE),
        *room = ks_smem_take<float>(&smem, DECODE_FEW_ROWS * 16);
  ks_bf16 *xs =
      NT == 1 ? ks_smem_take<ks_bf16>(&smem, (size_t)p.rows_at_once * decode_x_pieces(p.n_in) * 8) : NULL;
  ks_grid_start_next();
  ks_grid_wait();
  const decode_rows item = p.adapters.items[blockIdx.x];
  if (item.n_rows == 0) return;
  const decode_adapter one = p.adapters.of[blockIdx.z * p.adapters.n_segs + item.seg];
  const int rank0 = (int)blockIdx.y * block_ranks, n_ranks = min(one.rank - rank0, block_ranks);
  if (n_ranks <= 0) return;
  const decode_part &part = p.parts[blockIdx.z];
  const int lane = (int)threadIdx.x % KS_WARP;
  shrink_place at;
  at.warp = (int)threadIdx.x / KS_WARP;
  at.g = lane / 4;
  at.t = lane % 4;
  at.a = one.a + (rank0 + at.g) * p.n_in;
  at.n_ranks = n_ranks - at.g;
  at.aligned = ks_is_vector_aligned(p.x, p.n_in) && ((uintptr_t)one.a & 15) == 0;
  const int64_t step = SHRINK_WARPS * SHRINK_K, first = at.warp * SHRINK_K + 8 * at.t;
  shrink_ranks ranks[AHEAD];
#pragma unroll
  for (int s = 0; s < AHEAD; s++)
    shrink_load(&ranks[s], at, p.n_in, first + s * step);
  if (NT == 1) decode_load_x<SHRINK_THREADS>(xs, room, p, item.begin, item.n_rows);
  float sum[NT][4] = {};
  for (int64_t col0 = at.warp * SHRINK_K; col0 < p.n_in; col0 += AHEAD * step)
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
      const int64_t col = col0 + s * step + 8 * at.t;
      uint4 x[NT];
      shrink_read_x<NT>(x, p, item, xs, at, col);
      shrink_multiply<NT>(sum, ranks[s], x);
      shrink_load(&ranks[s], at, p.n_in, col + AHEAD * step);
    }
#pragma unroll
  for (int i = 0; i < 4 * NT; i++)
    sums[at.warp * TILE + (i / 4 * 8 + 2 * at.t + i % 2) * DECODE_SHRINK_RANKS + at.g + i % 4 / 2 * 8] =
        sum[i / 4][i % 4];
  __syncthreads();
  for (int i = (int)threadIdx.x; i < TILE; i += SHRINK_THREADS) {
    const int row = i / DECODE_SHRINK_RANKS, rank = i % DECODE_SHRINK_RANKS;
    if (row >= item.n_rows || rank >= n_ranks) continue;
    float total = 0;
    for (int w = 0; w < SHRINK_WARPS; w++)
      total += sums[w * TILE + i];
    part.u[(item.begin + row) * part.u_stride + rank0 + rank] = ks_from_float<ks_bf16>(total);
  }
}

/* Shared memory of a block of NT eights of rows; rows: of x that lie there. */
static size_t shrink_bytes(int nt, int64_t n_in, int64_t rows) {
  return ks_smem_bytes<float>((size_t)(SHRINK_WARPS * DECODE_SHRINK_RANKS * 8 * nt)) +
         ks_smem_bytes<float>(DECODE_FEW_ROWS * 16) + decode_x_bytes(n_in, rows);
}

template <int NT, int AHEAD> static ks_status launch(ks_ctx *ctx, const decode_args *p) {
  int block_ranks = DECODE_SHRINK_RANKS;
  while (NT == 1 && block_ranks > 2 && block_ranks * p->n_in * (int64_t)sizeof(float) > SHRINK_BLOCK_BYTES)
    block_ranks /= 2;
  const dim3 grid((unsigned)p->adapters.n_items, ks_blocks_for(p->adapters.max_rank, block_ranks),
                  (unsigned)p->n_parts);
  return ks_launch_early(ctx, "linear: x A^T", decode_shrink_kernel<NT, AHEAD>, grid, dim3(SHRINK_THREADS),
                         shrink_bytes(NT, p->n_in, NT == 1 ? p->rows_at_once : 0), *p, block_ranks);
}

int64_t ks_decode_item_rows(ks_ctx *ctx, decode_args *p) {
  const size_t room = (size_t)ks_cuda_device_of(ctx)->smem_per_block;
  p->rows_at_once = p->aligned ? (int32_t)ks_min_i64(p->n_rows, DECODE_FEW_ROWS) : 0;
  while (p->rows_at_once > 0 && shrink_bytes(1, p->n_in, p->rows_at_once) > room)
    p->rows_at_once /= 2;
  return p->rows_at_once > 0 ? p->rows_at_once : DECODE_ITEM_ROWS;
}

ks_status ks_decode_shrink(ks_ctx *ctx, const decode_args *p) {
  return p->rows_at_once > 0 ? launch<1, 4>(ctx, p) : launch<DECODE_ITEM_ROWS / 8, 2>(ctx, p);
}
