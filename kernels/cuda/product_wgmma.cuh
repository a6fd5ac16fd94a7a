/* Tiles of C = A B^T or A B in bf16 by Hopper's asynchronous products: what linear_wgmma.cu and head_loss_wgmma.cu are made of.
 *
 *   typedef wg_shape<256, false> S;                       // tiles of 128 x 256; B row by row of its columns (K-major)
 *   __global__ __launch_bounds__(WG_THREADS, 1) void kernel(const __grid_constant__ wg_maps maps, ...) {
 *     wg_run<S, my_work>(maps, n_k, args);                // my_work: which tiles there are, what is added to them, where they go
 *   }
 *
 * work has
 *   work(const Args &)                       made by each role for itself
 *   uint32_t n_tiles                         of this launch, dealt out to the blocks in turn; below 2^31
 *   wg_tile tile(uint32_t i)                 the i-th: first row and column; n_extra: further stages of k, up to 64 each
 *   int extra_steps(tile, e)                 sixteens of k in extra stage e
 *   void fill<S>(tile, e, a, b, thread)         96 threads write it (wg_put_a, wg_put_b)
 *   void finish<S>(tile, acc)                called by each of the 256 consumer threads; wg_row, wg_col say what its sums are
 *
 * A block is one warpgroup that loads and two that multiply, each 64 x BN of the tile:
 *   warp 0, lane 0    TMA: the boxes of a stage, 128 x 64 of A and BN x 64 (or 64 x BN) of B, with the bytes it waits for
 *   warps 1 to 3      extra stages: what must be rounded, masked or padded on its way comes by ordinary stores
 *   warps 4 to 11     four m64nBNk16 a stage; a stage is given back when the products of the next are queued behind it
 * Barriers of a stage: full (bytes have come), go (an extra stage may be filled), filled (96 arrivals), empty (8 warps are done).
 * Each has a phase of its own that turns with every use.
 *
 * Blocks are as many as SMs and walk through the tiles i, i + blocks, ...; the loader is up to STAGES stages
 * ahead and so loads the next tile's first stages while this one is written. Tiles go in bands of WG_BAND row
 * tiles, column by column within: the 132 tiles of an H200 that run together are then 2048 rows x 2112
 * columns, the least bytes for their number, and come once from memory.
 *
 * Arithmetic (H200; computed): a stage is 128 BN 64 2 flops, 4.19 M for BN 256; at 796 TFLOP/s / 132 a block
 * does it in 0.70 us and loads 48 KB for it: 9.3 TB/s from L2 over all SMs, about what L2 gives; four stages
 * hide 2.1 us. Products read shared memory at 80 of 128 bytes a cycle (A 2 KB, B 8 KB, 128 cycles). Expected:
 * 80 to 85 % of cuBLASLt's rate, limited by L2; clusters of two blocks with multicast would halve the bytes
 * of B (next, not built; the shim runs one block at a time).
 *
 * Registers: 168 at launch; the loaders give back to 56, the consumers take 224 (128 of them sums). Shared
 * memory: 4 x 48 KB (BN 256) or 6 x 32 KB (BN 128) and barriers, so one block an SM: 12 warps. From the
 * disassembly (nvcc 13.0): no spills, no serialized products; the loop is unrolled twice, 132 instructions
 * for 8 m64n256k16 or 16.5 each, beside 128 cycles that each takes.
 *
 * Order of a sum: k in rising sixteens, each the tensor core's own; then the extra stages. It depends on nothing else. */
#ifndef KS_CUDA_PRODUCT_WGMMA_CUH
#define KS_CUDA_PRODUCT_WGMMA_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/wgmma.cuh"

enum {
  WG_BM = 128,
  WG_BK = 64,
  WG_THREADS = 3 * KS_WARPGROUP,
  WG_FILLERS = 96,
  WG_CONSUMER_WARPS = 8,
  WG_BAND = 16,
  WG_GROUP_BYTES = WG_BK * 128 /* 64 columns of an MN-major stage */
};

/* B_MN: B [k, columns], else [columns, k]. */
template <int BN_, bool B_MN_> struct wg_shape {
  static constexpr int BN = BN_, STAGES = BN == 256 ? 4 : 6, SUMS = BN / 2;
  static constexpr bool B_MN = B_MN_;
  static constexpr int A_SIZE = WG_BM * WG_BK, B_SIZE = BN * WG_BK; /* elements of a stage */
  static constexpr uint32_t STAGE_BYTES = (A_SIZE + B_SIZE) * sizeof(ks_bf16);
  static constexpr int B_BOX = B_MN ? WG_BK : BN; /* rows of a box */
  static KS_HOST_DEVICE size_t bytes() {
    return ks_smem_bytes<ks_bf16>(STAGES * A_SIZE) + ks_smem_bytes<ks_bf16>(STAGES * B_SIZE) +
           ks_smem_bytes<uint64_t>(4 * STAGES);
  }
};

/* What the copy engine reads. */
struct wg_maps {
  ks_tensor_map a, b;
};
struct wg_tile {
  int64_t row, col;
  int n_rows, n_extra; /* of n_rows rows the sums are wanted; 0: nothing to do */
  int tag;             /* the work's own */
};

/* Row and column tile of the i-th of n_m x n_n tiles. */
KS_HOST_DEVICE void wg_order(uint32_t i, uint32_t n_m, uint32_t n_n, uint32_t *m, uint32_t *n) {
  const uint32_t first = i / (WG_BAND * n_n) * WG_BAND, band = WG_BAND,
                 high = n_m - first < band ? n_m - first : band, in_band = i - first * n_n;
  *m = first + in_band % high;
  *n = in_band / high;
}

#ifdef KS_HAS_WGMMA

/* ---------------------------------------------------------------- stages and their barriers */

template <class S> struct wg_room {
  ks_bf16 *a, *b;
  uint64_t *full, *go, *filled, *empty;
  KS_DEVICE wg_room(ks_smem *smem) {
    a = ks_smem_take<ks_bf16>(smem, S::STAGES * S::A_SIZE);
    b = ks_smem_take<ks_bf16>(smem, S::STAGES * S::B_SIZE);
    full = ks_smem_take<uint64_t>(smem, 4 * S::STAGES);
    go = full + S::STAGES;
    filled = go + S::STAGES;
    empty = filled + S::STAGES;
  }
  KS_DEVICE void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < S::STAGES; s++) {
        ks_barrier_init(full + s, 1);
        ks_barrier_init(go + s, 1);
        ks_barrier_init(filled + s, WG_FILLERS);
        ks_barrier_init(empty + s, WG_CONSUMER_WARPS);
      }
      ks_barrier_init_done();
    }
    __syncthreads();
  }
};

/* The stage whose turn it is. Bit s of uses and extras: the phase of stage s's full or empty, go or filled. */
template <class S> struct wg_turn {
  int stage = 0;
  uint32_t uses = 0, extras = 0;
  KS_DEVICE uint32_t use() {
    const uint32_t phase = uses >> stage & 1u;
    uses ^= 1u << stage;
    return phase;
  }
  KS_DEVICE uint32_t extra() {
    const uint32_t phase = extras >> stage & 1u;
    extras ^= 1u << stage;
    return phase;
  }
  KS_DEVICE void next() { stage = stage + 1 == S::STAGES ? 0 : stage + 1; }
};

/* ---------------------------------------------------------------- the loading warpgroup */

template <class S>
KS_DEVICE void wg_load_stage(const wg_room<S> &room, const wg_maps &maps, int stage, const wg_tile &tile,
                             int k) {
  uint64_t *full = room.full + stage;
  ks_bf16 *b = room.b + stage * S::B_SIZE;
  ks_barrier_expect(full, S::STAGE_BYTES);
  ks_tma_load(room.a + stage * S::A_SIZE, &maps.a, k, (int)tile.row, full);
  if constexpr (S::B_MN) {
#pragma unroll
    for (int j = 0; j < S::BN / 64; j++)
      ks_tma_load(b + j * (WG_GROUP_BYTES / 2), &maps.b, (int)tile.col + 64 * j, k, full);
  } else {
    ks_tma_load(b, &maps.b, k, (int)tile.col, full);
  }
}

/* One thread. */
template <class S, class Work>
KS_DEVICE void wg_load(const wg_room<S> &room, const wg_maps &maps, int n_k, const Work work) {
  wg_turn<S> turn;
  ks_tma_prefetch(&maps.a);
  ks_tma_prefetch(&maps.b);
  for (uint32_t i = blockIdx.x; i < work.n_tiles; i += gridDim.x) {
    const wg_tile tile = work.tile(i);
    if (tile.n_rows == 0) continue;
    for (int k = 0; k < n_k; k += WG_BK, turn.next()) {
      ks_barrier_wait(room.empty + turn.stage, turn.use() ^ 1u);
      wg_load_stage<S>(room, maps, turn.stage, tile, k);
    }
    for (int e = 0; e < tile.n_extra; e++, turn.next()) {
      ks_barrier_wait(room.empty + turn.stage, turn.use() ^ 1u);
      ks_barrier_arrive(room.go + turn.stage);
    }
  }
}

/* Threads 0 to 95 of warps 1 to 3. */
template <class S, class Work>
KS_DEVICE void wg_fill(const wg_room<S> &room, int n_k, const Work work, int thread) {
  wg_turn<S> turn;
  for (uint32_t i = blockIdx.x; i < work.n_tiles; i += gridDim.x) {
    const wg_tile tile = work.tile(i);
    if (tile.n_rows == 0) continue;
    turn.stage = (turn.stage + (n_k + WG_BK - 1) / WG_BK) % S::STAGES;
    for (int e = 0; e < tile.n_extra; e++, turn.next()) {
      ks_barrier_wait(room.go + turn.stage, turn.extra());
      work.template fill<S>(tile, e, room.a + turn.stage * S::A_SIZE, room.b + turn.stage * S::B_SIZE,
                            thread);
      ks_async_fence();
      ks_barrier_arrive(room.filled + turn.stage);
    }
  }
}

/* Piece `piece` (8 of k) of row `row` of an extra stage of A; piece `piece` (8 columns) of k `k` of one of B. */
KS_DEVICE void wg_put_a(ks_bf16 *a, int row, int piece, uint4 values) {
  *(uint4 *)(void *)((char *)a + ks_swizzle_128(row, piece)) = values;
}
KS_DEVICE void wg_put_b(ks_bf16 *b, int k, int piece, uint4 values) {
  *(uint4 *)(void *)((char *)b + piece / 8 * WG_GROUP_BYTES + ks_swizzle_128(k, piece % 8)) = values;
}

/* ---------------------------------------------------------------- the multiplying warpgroups */

/* Rows and columns of a tile that a consumer thread's sums acc[4 j + 2 h + c] belong to. */
KS_DEVICE int wg_row(int h) {
  return (int)threadIdx.x / KS_WARP * 16 - KS_WARPGROUP / KS_WARP * 16 + 8 * h +
         (int)threadIdx.x % KS_WARP / 4;
}
KS_DEVICE int wg_col(int j, int c) {
  return 8 * j + (int)threadIdx.x % 4 * 2 + c;
}

/* Descriptors of this warpgroup's 64 rows of A, and of B. */
KS_DEVICE uint64_t wg_desc_a(const ks_bf16 *a) {
  return ks_wgmma_desc_k(a + ((int)threadIdx.x / KS_WARPGROUP - 1) * (64 * WG_BK));
}
template <bool B_MN> KS_DEVICE uint64_t wg_desc_b(const ks_bf16 *b) {
  return B_MN ? ks_wgmma_desc_mn(b, WG_GROUP_BYTES) : ks_wgmma_desc_k(b);
}
enum { WG_STEP_K = 32, WG_STEP_MN = 2048 }; /* bytes from sixteen to sixteen */

template <class S>
KS_DEVICE void wg_multiply(float (&acc)[S::SUMS], const ks_bf16 *a, const ks_bf16 *b, int keep) {
  const uint64_t da = wg_desc_a(a), db = wg_desc_b<S::B_MN>(b);
  ks_wgmma_fence(acc);
#pragma unroll
  for (int s = 0; s < WG_BK / 16; s++)
    ks_wgmma<S::B_MN>(acc, ks_wgmma_advance(da, WG_STEP_K * s),
                      ks_wgmma_advance(db, (S::B_MN ? WG_STEP_MN : WG_STEP_K) * s), s > 0 || keep);
  ks_wgmma_commit();
}

/* An extra stage, whose B is MN-major. */
template <class S>
KS_DEVICE void wg_multiply_extra(float (&acc)[S::SUMS], const ks_bf16 *a, const ks_bf16 *b, int n_steps) {
  uint64_t da = wg_desc_a(a), db = wg_desc_b<true>(b);
#pragma unroll 1
  for (int s = 0; s < n_steps; s++) {
    ks_wgmma_fence(acc);
    ks_wgmma<true>(acc, da, db, 1);
    ks_wgmma_commit();
    da = ks_wgmma_advance(da, WG_STEP_K), db = ks_wgmma_advance(db, WG_STEP_MN);
  }
}

template <class S, class Work> KS_DEVICE void wg_consume(const wg_room<S> &room, int n_k, const Work work) {
  const bool signals = threadIdx.x % KS_WARP == 0;
  wg_turn<S> turn;
  for (uint32_t i = blockIdx.x; i < work.n_tiles; i += gridDim.x) {
    const wg_tile tile = work.tile(i);
    if (tile.n_rows == 0) continue;
    float acc[S::SUMS];
    int before = -1; /* stage whose products are under way */
    for (int k = 0; k < n_k; k += WG_BK, turn.next()) {
      ks_barrier_wait(room.full + turn.stage, turn.use());
      wg_multiply<S>(acc, room.a + turn.stage * S::A_SIZE, room.b + turn.stage * S::B_SIZE, k > 0);
      ks_wgmma_wait<1>(acc);
      if (before >= 0 && signals) ks_barrier_arrive(room.empty + before);
      before = turn.stage;
    }
    for (int e = 0; e < tile.n_extra; e++, turn.next()) {
      ks_barrier_wait(room.filled + turn.stage, turn.extra());
      wg_multiply_extra<S>(acc, room.a + turn.stage * S::A_SIZE, room.b + turn.stage * S::B_SIZE,
                           work.extra_steps(tile, e));
      ks_wgmma_wait<0>(acc);
      if (signals) ks_barrier_arrive(room.empty + before);
      before = turn.stage;
    }
    ks_wgmma_wait<0>(acc);
    if (signals) ks_barrier_arrive(room.empty + before);
    work.template finish<S>(tile, acc);
  }
}

/* n_k >= 1. */
template <class S, class Work, class Args>
KS_DEVICE void wg_run(const wg_maps &maps, int n_k, const Args &args) {
  ks_smem smem;
  const wg_room<S> room(&smem);
  const int warp = (int)threadIdx.x / KS_WARP;
  room.init();
  if (warp < KS_WARPGROUP / KS_WARP) {
    ks_registers_fewer<56>();
    if (threadIdx.x == 0)
      wg_load<S>(room, maps, n_k, Work(args));
    else if (warp > 0)
      wg_fill<S>(room, n_k, Work(args), (int)threadIdx.x - KS_WARP);
  } else {
    ks_registers_more<224>();
    wg_consume<S>(room, n_k, Work(args));
  }
}

#endif

/* ---------------------------------------------------------------- host side */

/* Whether tiles of 256 columns take less time than those of 128, which load a third more from L2: whole rounds of all SMs. */
static inline bool wg_wants_256(int64_t n_rows_tiles, int64_t n_cols, int n_sm) {
  const int64_t wide = (n_rows_tiles * ((n_cols + 255) / 256) + n_sm - 1) / n_sm,
                slim = (n_rows_tiles * ((n_cols + 127) / 128) + n_sm - 1) / n_sm;
  return 3 * wide <= 2 * slim;
}
#endif
