/* Linear layers of up to 8 rows that read one x, bf16, in one launch: the norm before them, their products, adapters, bias and
 * residual, and behind them SwiGLU, or queries and keys rotated, keys and values stored in a cache.
 *
 *   y[i, o] = sum_j x[i, j] W[o, j] + scale sum_r u[i, r] B[o, r] + bias[o] + residual[i, o]
 *   with a norm x is norm(x'), x' in memory;   with SwiGLU h[i, o] = silu(y_gate[i, o]) y_up[i, o] is stored instead;
 *   rotated: the formulas of rope.cu
 *
 * Bytes: W once (2 an element). x, u and B come from the L2. FLOPs: 2 rows a weight, on tensor cores: 8 columns of an mma whether
 * there are 8 rows or one. Bound by memory as long as it is busy from the first instruction to the last: 4.5
 * TB/s (read, measured) times some 800 ns of latency are 3.6 MB under way, 27 KB an SM of an H200.
 *
 * Geometry: a tile is 16 outputs (SwiGLU: 8 of gate and the same 8 of up; rotated: 8 columns of a head and those half a head
 * behind them, 7 tiles for a head of 100; so that a lane pair holds both), its 8 warps one run of k each. A warp streams its 16
 * rows of W, 64 k (2 KB) a stage, through a ring of its own in shared memory by cp.async: no barrier but its own, STAGES * 16 KB
 * a block under way without a register. Blocks stay (two an SM where shared memory allows, as many as have equally many tiles),
 * and the ring runs on into the next tile, so memory sees no end of a tile. x, with its norm applied, lies in shared memory,
 * made once a block while the first stages are under way. Sums of the runs meet in shared memory, two tiles in turn: one barrier
 * a tile. Bias, residual, a rotation's angle and the first 16 ranks of B are made before a tile's products and used behind them.
 * A warp makes the adapters' terms of one segment (there are at most 8).
 *   H200, one row of 2048 or 3200: 6 stages, 108 to 113 KB, two blocks an SM: 192 KB under way an SM. One row
 *   of 8192 or 8640, or 8 rows of 2048: two blocks of 4 stages (down of 1B, 128 tiles, one of 6). 8 rows of
 *   8640: one block of 4 stages, 212 KB.
 *
 * Resources (sm_90): 109 registers (SwiGLU 118, rotation 112), 256 threads, no spills. A stage in the disassembly: 107
 * instructions for 4 mma, 6 ldmatrix and 4 copies of 512 bytes; at 17 bytes a clock and SM (4.5 TB/s) a stage
 * is due every 120 clocks, which issue 480. A turn of the first loads is 70, with the next tile's addresses
 * 130: in a loop, not unrolled, since an H200 would have fetched the 900 instructions of six of them, cold,
 * for about a microsecond.
 *
 * Order of sums: linear_decode.cuh. Serial chain L = n_in / 128 mma + 8. Rows are columns of the mma: none sees another.
 *
 * Launched early (launch.cuh): the ring is filled before the kernels that make x have ended.
 *
 * Alignment: rows of x, W and the norm's weights at multiples of 16 bytes; other shapes go to linear_decode_wide.cu. Where x and
 * two stages do not fit, rows are dealt to more blocks, each of which reads W.
 *
 * Time, computed, H200 at 4.5 TB/s, with 2.5 us a launch that PDL does not hide (ramp, one latency, tail):
 *     Llama-3.2-1B          MB      us          OpenLLaMA-3B          MB      us
 *     q, k, v  3072x2048    12.6    2.8 + 2.5   9600x3200             61.4    13.7 + 2.5
 *     o        2048x2048     8.4    1.9 + 2.5   3200x3200             20.5     4.6 + 2.5
 *     gate, up 16384x2048   67.1   14.9 + 2.5   17280x3200           110.6    24.6 + 2.5
 *     down     2048x8192    33.6    7.5 + 2.5   3200x8640             55.3    12.3 + 2.5
 *     head     128256x2048 525.3  116.7 + 2.5   32000x3200           204.8    45.5 + 2.5
 * Launches of a token: 5 a layer (these four and attention), embedding, head, and one to four of sampling: 83 at 1B. What is left
 * cannot go without blocks that wait for each other: each reads all of what the one before wrote.
 * A token of 1B: 16 (27.1 + 10 + 4.5 for attention) + 119 + 10 = 795 us, 1258 tokens/s, 69 % of the read rate;
 * with PDL (1 us a product, 3 for attention) 16 * 34.1 + 127 = 673 us, 1487 tokens/s, 82 %. 3B: 26 (55.2 + 10 +
 * 4.5) + 58 = 1870 us, 535 tokens/s, 79 %; with PDL 26 * 62.2 + 55 = 1672 us, 598 tokens/s, 89 %. With rotation and
 * cache in a launch of their own (2.5 us, with PDL 1.5, a layer) 1200, 1435, 517 and 584.
 *
 * Ladder (H200, bf16; f74fb33)
 *   v1  operands through registers, 32 KB a block under way, k in 8 runs, a launch for each part, norms and SwiGLU by themselves
 *       (linear_decode_wide.cu): 2048 x 2048 in 11 us of which about 3 are the measurement, 2048 x 8192 in 36; 441 tokens/s at
 *       1B, 273 with an adapter of rank 8.
 *   v2  all in one launch but the rotation. Not measured.
 *   v3  this. Not measured yet. */
#include "kernels/cuda/linear_decode.cuh"
#include "kernels/cuda/rope.cuh"
#include "kernels/cuda/swiglu.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  FEW_N = DECODE_TILE,
  FEW_K = 64, /* of a stage */
  FEW_PIECES = FEW_K / 8,
  FEW_THREADS = LINEAR_RUNS * KS_WARP,
  FEW_TILE = DECODE_FEW_ROWS * FEW_N,
  FEW_MAX_RANK = 256,
  FEW_RANKS = 16 /* of an adapter's first step */
};

/* What comes behind the products. */
typedef enum { FEW_PLAIN, FEW_SWIGLU, FEW_ROPE } few_tail;

/* What a warp loads next. */
struct few_cursor {
  int tile, n_stages;  /* stages of the run that are left */
  int left;            /* k of the run from this lane's on */
  int rows;            /* bit i: row 4i + lane / 8 of the tile is there */
  const ks_bf16 *w[2]; /* this lane's 8 k of the first row of its in either half */
};

/* What a lane knows of its warp's share. */
struct few_place {
  int begin, end, n_stages; /* its run of k */
  int n_rows, g, t;
  int64_t row0;
};

/* ---------------------------------------------------------------- W on its way */

template <bool SWIGLU> KS_DEVICE void few_aim(few_cursor &c, const decode_args &p, const few_place &at) {
  if (c.tile >= p.n_tiles) return;
  const decode_halves of = decode_halves_of(p, c.tile, FEW_N, SWIGLU);
  const int lane = (int)threadIdx.x % KS_WARP, col = at.begin + lane % FEW_PIECES * 8;
  c.n_stages = at.n_stages;
  c.left = at.end - col;
  c.rows = 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const decode_part &part = p.parts[of.part[h]];
    const int row = (int)of.n0[h] + lane / FEW_PIECES, end = (int)of.end[h];
    c.rows |= (row < end ? 1 << 2 * h : 0) | (row + 4 < end ? 2 << 2 * h : 0);
    c.w[h] = (const ks_bf16 *)(const void *)part.w.values + row * p.n_in + col;
  }
}

/* Queues the next stage, 16 rows of 64 k, and counts it even where there is none: one group of copies a turn.
 * Row r of a stage lies as tile_at has it: its piece q at q ^ (r & 7). */
template <bool SWIGLU>
KS_DEVICE void few_issue(few_cursor &c, ks_bf16 *stage, const decode_args &p, const few_place &at) {
  if (c.tile < p.n_tiles && at.n_stages > 0) {
    const int lane = (int)threadIdx.x % KS_WARP, line = lane / FEW_PIECES, piece = lane % FEW_PIECES;
    const int rows = c.left > 0 ? c.rows : 0;
#pragma unroll
    for (int i = 0; i < FEW_N / 4; i++)
      ks_cp_async_16(tile_at<FEW_PIECES>(stage, 4 * i + line, piece), c.w[i / 2] + i % 2 * 4 * p.n_in,
                     rows >> i & 1);
    c.w[0] += FEW_K;
    c.w[1] += FEW_K;
    c.left -= FEW_K;
    if (--c.n_stages == 0) {
      c.tile += (int)gridDim.x;
      few_aim<SWIGLU>(c, p, at);
    }
  }
  ks_cp_async_commit();
}

/* acc += W x^T over the stage that begins at k: outputs g, g + 8 of rows 2t, 2t + 1. */
KS_DEVICE void few_multiply(float acc[4], ks_bf16 *stage, ks_bf16 *xs, int pieces, int k,
                            const few_place &at) {
  const int lane = (int)threadIdx.x % KS_WARP, row = min(lane % 8, at.n_rows - 1);
#pragma unroll
  for (int half = 0; half < FEW_K; half += 32) {
    if (k + half >= at.end) break;
    uint32_t x[4];
    ks_ldmatrix_x4(x, decode_x_at(xs, pieces, row, (k + half) / 8 + lane / 8));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t w[4];
      tile_frag_a<FEW_PIECES>(w, stage, 0, half + 16 * i);
      ks_mma_bf16(acc, w, x + 2 * i);
    }
  }
}

/* ---------------------------------------------------------------- adapters */

/* A lane's operands of 16 ranks of a segment, from rank k on: B of outputs g (and g + 8), u of row g. With SwiGLU the halves have
 * adapters, and so u, of their own. */
template <int HALVES> struct few_ranks {
  float b[2][4];
  uint32_t u[HALVES][2];
};

/* Its segment, if this warp has one among the block's rows. */
struct few_segment {
  int seg;        /* -1: none */
  int begin, end; /* rows of the block */
};
KS_DEVICE few_segment few_segment_of(const decode_args &p, const few_place &at) {
  int nth = (int)threadIdx.x / KS_WARP;
  for (int s = 0; p.adapters.max_rank > 0 && s < (int)p.adapters.n_segs; s++) {
    const decode_rows rows = p.adapters.segs[s];
    const int64_t begin = rows.begin - at.row0, end = begin + rows.n_rows;
    if (rows.n_rows == 0 || end <= 0) continue;
    if (begin >= at.n_rows) break;
    if (nth-- == 0) return {s, (int)max(begin, (int64_t)0), (int)min(end, (int64_t)at.n_rows)};
  }
  return {-1, 0, 0};
}

template <bool SWIGLU>
KS_DEVICE void few_load_ranks(few_ranks<1 + SWIGLU> *r, const decode_args &p, const few_segment &seg,
                              const decode_halves &of, const few_place &at, int k) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const decode_part &part = p.parts[of.part[h]];
    const decode_adapter one = p.adapters.of[of.part[h] * p.adapters.n_segs + seg.seg];
    const int64_t out = of.n0[h] + at.g;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int rank = k + 2 * at.t + i / 2 * 8 + i % 2;
      r->b[h][i] = rank < one.rank && out < of.end[h] ? one.b_t[rank * part.w.n_out + out] * one.scale : 0.0f;
    }
    if (h == 1 && !SWIGLU) continue;
    const ks_bf16 *u = part.u + (at.row0 + at.g) * part.u_stride;
#pragma unroll
    for (int i = 0; i < 2; i++)
      r->u[h][i] =
          at.g >= seg.begin && at.g < seg.end ? tile_read_pair(u, k + 2 * at.t + 8 * i, one.rank) : 0u;
  }
}

template <bool SWIGLU> KS_DEVICE void few_multiply_ranks(float sum[4], const few_ranks<1 + SWIGLU> &r) {
  const uint32_t a[4] = {ks_pack_bf16(r.b[0][0], r.b[0][1]), ks_pack_bf16(r.b[1][0], r.b[1][1]),
                         ks_pack_bf16(r.b[0][2], r.b[0][3]), ks_pack_bf16(r.b[1][2], r.b[1][3])};
  if constexpr (!SWIGLU) {
    ks_mma_bf16(sum, a, r.u[0]);
  } else {
    const uint32_t gate[4] = {a[0], 0, a[2], 0}, up[4] = {0, a[1], 0, a[3]};
    ks_mma_bf16(sum, gate, r.u[0]);
    ks_mma_bf16(sum, up, r.u[1]);
  }
}

/* The terms of a segment's rows, for each group of ranks: term [groups][rows][16]. first: ranks 0 to 15, loaded before. */
template <bool SWIGLU>
KS_DEVICE void few_terms(float *term, const decode_args &p, const few_segment &seg, const decode_halves &of,
                         const few_place &at, few_ranks<1 + SWIGLU> first) {
  const int rank = p.adapters.max_rank;
  for (int r0 = 0; r0 < rank; r0 += LORA_GROUP, term += FEW_TILE) {
    float sum[4] = {};
    for (int k = r0; k < min(rank, r0 + LORA_GROUP); k += FEW_RANKS) {
      if (k > 0) few_load_ranks<SWIGLU>(&first, p, seg, of, at, k);
      few_multiply_ranks<SWIGLU>(sum, first);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 2 * at.t + i % 2;
      if (row >= seg.begin && row < seg.end) term[row * FEW_N + at.g + i / 2 * 8] = sum[i];
    }
  }
}

/* ---------------------------------------------------------------- results */

/* An element of a tile, its thread's, and what is added to it; of threads beyond the rows or outputs: part -1. */
struct few_element {
  int part, rank; /* rank of its adapter */
  int64_t at, to; /* in y, and where it goes */
  float bias, residual;
  float cos_of, sin_of;
};

template <few_tail TAIL>
KS_DEVICE few_element few_element_of(const decode_args &p, const decode_halves &of, const few_place &at,
                                     const int *ranks) {
  const int row = (int)threadIdx.x / FEW_N, half = (int)threadIdx.x % FEW_N / (FEW_N / 2);
  few_element e = {-1, 0, 0, 0, 0, 0, 1, 0};
  if (row >= at.n_rows) return e;
  const int number = half ? of.part[1] : of.part[0];
  const decode_part &part = p.parts[number];
  const int64_t out = (half ? of.n0[1] : of.n0[0]) + (int)threadIdx.x % (FEW_N / 2), place = at.row0 + row;
  if (out >= (half ? of.end[1] : of.end[0])) return e;
  e.part = number;
  e.rank = ranks[e.part * DECODE_FEW_ROWS + row];
  e.at = e.to = place * part.w.n_out + out;
  if (part.bias) e.bias = part.bias[out];
  if (part.residual) e.residual = ks_to_float(((const ks_bf16 *)part.residual)[e.at]);
  if constexpr (TAIL == FEW_ROPE) {
    if (part.to) e.to = p.index[place] * part.w.n_out + out;
    if (part.turns)
      rope_cos_sin((double)p.positions[place] *
                       p.inv_freq[(int)out % (int)p.head_dim % (int)(p.head_dim / 2)],
                   &e.cos_of, &e.sin_of);
  }
  return e;
}

/* Adds the runs and what belongs to them, and stores; for whole warps, as many as have elements. The other half of a pair lies half
 * a tile away. */
template <few_tail TAIL>
KS_DEVICE void few_finish(const few_element &e, const decode_args &p, const float *sums, const float *terms) {
  const int i = (int)threadIdx.x;
  float total = 0;
  if (e.part >= 0) {
    for (int r = 0; r < LINEAR_RUNS && r * p.run < (int)p.n_in; r++)
      total += sums[r * FEW_TILE + i];
    for (int group = 0; group * LORA_GROUP < e.rank; group++)
      total += terms[group * FEW_TILE + i];
    if (p.parts[e.part].bias) total += e.bias;
    if (p.parts[e.part].residual) total += e.residual;
  }
  if constexpr (TAIL == FEW_PLAIN) {
    if (e.part < 0) return;
    if (p.y_is_f32)
      ((float *)p.parts[e.part].y)[e.at] = total;
    else
      ((ks_bf16 *)p.parts[e.part].y)[e.at] = ks_from_float<ks_bf16>(total);
    return;
  }
  const float mine = ks_to_float(ks_from_float<ks_bf16>(total)),
              other = __shfl_xor_sync(KS_FULL_MASK, mine, FEW_N / 2);
  if constexpr (TAIL == FEW_SWIGLU)
    if (e.part == 0) p.h[e.at] = ks_from_float<ks_bf16>(mine * swiglu_sigmoid_of<ks_bf16>(mine).s * other);
  if constexpr (TAIL == FEW_ROPE) {
    if (e.part < 0) return;
    const decode_part &part = p.parts[e.part];
    const float product = other * e.sin_of,
                turned = fmaf(mine, e.cos_of, i % FEW_N < FEW_N / 2 ? -product : product);
    ((ks_bf16 *)(part.to ? part.to : part.y))[e.to] = ks_from_float<ks_bf16>(part.turns ? turned : mine);
  }
}

/* ---------------------------------------------------------------- the kernel */

/* Groups of ranks that terms have room for. */
KS_HOST_DEVICE int few_groups(const decode_args &p) {
  return (p.adapters.max_rank + LORA_GROUP - 1) / LORA_GROUP;
}

/* Shared memory of a block. */
struct few_room {
  ks_bf16 *ring, *xs;
  float *sums, *terms, *norm; /* sums, terms: two tiles in turn */
  int *ranks;                 /* [part][row]: of its adapter */
};
template <int STAGES> static size_t few_bytes(const decode_args *p) {
  return ks_smem_bytes<ks_bf16>(LINEAR_RUNS * STAGES * FEW_N * FEW_K) +
         decode_x_bytes(p->n_in, p->rows_at_once) + ks_smem_bytes<float>(2 * LINEAR_RUNS * FEW_TILE) +
         ks_smem_bytes<float>((size_t)(2 * few_groups(*p) * FEW_TILE)) +
         ks_smem_bytes<float>(DECODE_FEW_ROWS * 16) + ks_smem_bytes<int>(KS_LINEARS_MAX * DECODE_FEW_ROWS);
}

/* Ranks of the adapters of the block's rows. */
KS_DEVICE void few_ranks_of(int *ranks, const decode_args &p, const few_place &at) {
  const int i = (int)threadIdx.x;
  if (i >= KS_LINEARS_MAX * DECODE_FEW_ROWS) return;
  ranks[i] = 0;
  if (p.adapters.max_rank == 0 || i / DECODE_FEW_ROWS >= p.n_parts) return;
  const int64_t row = at.row0 + i % DECODE_FEW_ROWS;
  for (int64_t s = 0; s < p.adapters.n_segs; s++)
    if (row >= p.adapters.segs[s].begin && row < p.adapters.segs[s].begin + p.adapters.segs[s].n_rows)
      ranks[i] = p.adapters.of[i / DECODE_FEW_ROWS * p.adapters.n_segs + s].rank;
}

template <few_tail TAIL, int STAGES>
__global__ void __launch_bounds__(FEW_THREADS, 2) linear_few_kernel(const __grid_constant__ decode_args p) {
  enum { STAGE = FEW_N * FEW_K };
  constexpr bool SWIGLU = TAIL == FEW_SWIGLU;
  ks_smem smem;
  few_room room;
  room.ring = ks_smem_take<ks_bf16>(&smem, LINEAR_RUNS * STAGES * STAGE);
  room.xs = ks_smem_take<ks_bf16>(&smem, (size_t)p.rows_at_once * decode_x_pieces(p.n_in) * 8);
  room.sums = ks_smem_take<float>(&smem, 2 * LINEAR_RUNS * FEW_TILE);
  room.terms = ks_smem_take<float>(&smem, (size_t)(2 * few_groups(p) * FEW_TILE));
  room.norm = ks_smem_take<float>(&smem, DECODE_FEW_ROWS * 16);
  room.ranks = ks_smem_take<int>(&smem, KS_LINEARS_MAX * DECODE_FEW_ROWS);
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP,
            pieces = decode_x_pieces(p.n_in);
  few_place at;
  at.begin = warp * p.run;
  at.end = min(at.begin + p.run, (int)p.n_in);
  at.n_stages = at.begin < at.end ? (at.end - at.begin + FEW_K - 1) / FEW_K : 0;
  at.row0 = (int64_t)blockIdx.y * p.rows_at_once;
  at.n_rows = (int)min(p.n_rows - at.row0, (int64_t)p.rows_at_once);
  at.g = lane / 4;
  at.t = lane % 4;
  ks_bf16 *ring = room.ring + warp * STAGES * STAGE;
  few_cursor next;
  next.tile = (int)blockIdx.x;
  next.n_stages = next.left = next.rows = 0;
  few_aim<SWIGLU>(next, p, at);
#pragma unroll 1 /* short code: it is not in the caches yet */
  for (int s = 0; s < STAGES; s++)
    few_issue<SWIGLU>(next, ring + s * STAGE, p, at);
  ks_grid_start_next();
  ks_grid_wait(); /* above this line: weights only */
  few_ranks_of(room.ranks, p, at);
  decode_load_x<FEW_THREADS>(room.xs, room.norm, p, at.row0, at.n_rows);
  const few_segment seg = few_segment_of(p, at);
  int slot = 0, turn = 0;
  for (int tile = (int)blockIdx.x; tile < p.n_tiles; tile += (int)gridDim.x, turn ^= 1) {
    const decode_halves of = decode_halves_of(p, tile, FEW_N, SWIGLU);
    float *sums = room.sums + turn * LINEAR_RUNS * FEW_TILE,
          *terms = room.terms + turn * few_groups(p) * FEW_TILE;
    few_ranks<1 + SWIGLU> ranks;
    if (seg.seg >= 0) few_load_ranks<SWIGLU>(&ranks, p, seg, of, at, 0);
    const few_element e = few_element_of<TAIL>(p, of, at, room.ranks);
    float acc[4] = {};
    for (int k = at.begin; k < at.end; k += FEW_K) {
      ks_cp_async_wait<STAGES - 1>();
      __syncwarp();
      few_multiply(acc, ring + slot * STAGE, room.xs, pieces, k, at);
      __syncwarp();
      few_issue<SWIGLU>(next, ring + slot * STAGE, p, at);
      slot = slot + 1 < STAGES ? slot + 1 : 0;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * at.t + i % 2 < at.n_rows)
        sums[warp * FEW_TILE + (2 * at.t + i % 2) * FEW_N + at.g + i / 2 * 8] = acc[i];
    if (seg.seg >= 0) few_terms<SWIGLU>(terms, p, seg, of, at, ranks);
    __syncthreads();
    if (warp < (at.n_rows * FEW_N + KS_WARP - 1) / KS_WARP) few_finish<TAIL>(e, p, sums, terms);
  }
}

/* ---------------------------------------------------------------- launches */

/* Stages of a ring, the deepest first, that leave room for two blocks an SM, or for one. */
enum { FEW_DEEP = 6, FEW_MIDDLE = 4, FEW_SHALLOW = 2 };

template <few_tail TAIL, int STAGES> static ks_status launch(ks_ctx *ctx, const decode_args *p) {
  const ks_cuda_device *d = ks_cuda_device_of(ctx);
  const size_t bytes = few_bytes<STAGES>(p);
  const int64_t at_once = d->n_sm * (2 * (bytes + 1024) <= (size_t)d->smem_per_sm ? 2 : 1),
                turns = (p->n_tiles + at_once - 1) / at_once;
  const dim3 grid(ks_blocks_for(p->n_tiles, turns), ks_blocks_for(p->n_rows, p->rows_at_once));
  return ks_launch_early(ctx, "linear: few rows", linear_few_kernel<TAIL, STAGES>, grid, dim3(FEW_THREADS),
                         bytes, *p);
}

template <few_tail TAIL> static ks_status launch_any(ks_ctx *ctx, const decode_args *p) {
  const ks_cuda_device *d = ks_cuda_device_of(ctx);
  const size_t deep = few_bytes<FEW_DEEP>(p), middle = few_bytes<FEW_MIDDLE>(p),
               block = (size_t)d->smem_per_block, half = (size_t)d->smem_per_sm / 2 - 1024;
  if (deep <= block && (deep <= half || p->n_tiles <= d->n_sm)) return launch<TAIL, FEW_DEEP>(ctx, p);
  if (middle <= half && middle <= block) return launch<TAIL, FEW_MIDDLE>(ctx, p);
  if (deep <= block) return launch<TAIL, FEW_DEEP>(ctx, p);
  if (middle <= block) return launch<TAIL, FEW_MIDDLE>(ctx, p);
  return launch<TAIL, FEW_SHALLOW>(ctx, p);
}

bool ks_decode_few_takes(ks_ctx *ctx, const ks_linears_args *a, decode_args *p) {
  const uintptr_t bits = a->norm ? (uintptr_t)a->norm->x | (uintptr_t)a->norm->w : 0;
  if (p->n_rows > DECODE_FEW_ROWS || a->parts[0].w->dtype != KS_DTYPE_BF16 || !p->aligned || bits % 16 != 0)
    return false;
  p->adapters.max_rank = FEW_MAX_RANK; /* at most */
  p->rows_at_once = (int32_t)p->n_rows;
  while (p->rows_at_once > 0 && few_bytes<FEW_SHALLOW>(p) > (size_t)ks_cuda_device_of(ctx)->smem_per_block)
    p->rows_at_once /= 2;
  return p->rows_at_once > 0;
}

ks_status ks_decode_few(ks_ctx *ctx, const decode_args *p) {
  if (p->h) return launch_any<FEW_SWIGLU>(ctx, p);
  return p->has_rope ? launch_any<FEW_ROPE>(ctx, p) : launch_any<FEW_PLAIN>(ctx, p);
}
