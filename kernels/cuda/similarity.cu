/* Cosine or dot similarity of queries with stored rows, reduced as it is made: the whole matrix, the best
 * k of each query, means by group, farthest-first order.
 *
 *   s_ij = <q_i, k_j> f_i f_j,   f = 1 / |row| with the sign of its scale (cosine), or its scale (dot)
 *
 *   similarity.cu          entries, plans, small kernels
 *   similarity.cuh         the job, factors, norms, long lists, farthest first
 *   similarity_list.cuh    scores with their keys; lists of up to 32 best
 *   similarity_stream.cu   up to 8 bf16 queries, bound by memory, one launch
 *   similarity_tile.cu     many bf16 queries and keys, bound by tensor cores
 *   similarity_wgmma.cu    the same by Hopper's own products
 *   similarity_many.cuh    what these two share
 *   similarity_kernel.cuh  all else, on product.cuh: float32, I8 as it lies, odd rows, long lists, few of both
 *   similarity_mma.cu      it on tensor cores
 *   similarity_simt.cu     it in plain fma
 *
 * Products: bf16 and I8 rows on tensor cores (I8 is exact in bf16), whatever meets float32 in plain fma,
 * since the definition is a float32 product. Before sm_80 everything is plain fma.
 *
 * Shapes of a block's tile, keys x queries; variants of "similarity". Same bits: see Determinism.
 *   stream  8 x 16 x 8  up to 8 queries, bf16: 8 warps with 16 keys each. 94 registers, 2 blocks an SM
 *   few     64 x 8      up to 8 queries, any type: norms in the same pass
 *   mid     128 x 32    more queries; norms in the same pass; one launch for a whole buffer
 *   big     128 x 128   when its tiles fill the card, where tile does not fit; norms by a pass before
 *   tile    256 x 128   when its tiles fill the card and 217 KB of shared memory are there (best k; else 152): sm_90,
 *                       sm_100; norms by a pass before, which reads k once more. I8 is copied as bf16 by that
 *                       pass. 238 to 251 registers, 1 block of 8 warps an SM
 *   wgmma 256 x 128     a choice, not the default: wherever tile is possible, however few the queries, on sm_90 only; 8 warps
 *                       multiply, 4 load, 1 block an SM. Else by shape. The same bits as the others if wgmma
 *                       adds as mma.sync does on that hardware, which the test shapes_agree tells; not run
 *                       yet
 *
 * Resources of few, mid and big (sm_90): 118, 128 and 128 registers (big spills 14 words outside its loop), 128, 256 and
 * 256 threads; with I8 or rows off their 16 bytes 148, 164 and 206; float32 86, 96 and 128, 256 threads. tile and wgmma
 * keep scores that pass in 512 bytes of local memory.
 *
 * Launches: stream, few and mid 1 (sim_finishes says when another); big and tile 4: factors of keys, of
 * queries, the kernel, the lists; wgmma the same and, of the best, a fill. No other fills: ks_cuda_counters.
 *
 * Bytes: n_k d e (e: bytes of an element), once for every 8, 32 or 128 queries and then from L2 where it
 * fits; flops: 2 n_q n_k d. H200 (796 TFLOP/s, read 4.5 TB/s, measured; mma.sync expected at 60 % of that), all
 * times computed, none measured yet:
 *   1 x 1 M x 3200 bf16      6.4 GB: 1.42 ms at 4.5 TB/s; goal, 85 %: 1.67 ms. A warp needs 185 instructions for
 *                            2 KiB (12 mma), an SM gets 2 KiB in 118 cycles: 1.6 of 4 a cycle
 *   1 x 2048 x 768 bf16      128 warps on 128 SMs, 12 stages: 2.5 us launch, 2 us stream, 1 us to be the last,
 *                            2.5 us 128 lists (heads and entries, 0.6 each, a sort 0.3, 10 picks 0.5); goal 10 us
 *   1 x 2048 x 3200 bf16     a chain of 200 mma, 3.3 us at 33 cycles, 5 with waits; in all about 11 us
 *   256 x 2048 x 768 bf16    128 blocks of mid, each 160 rows of 1.5 KB: 31 MB from L2, 6 us where L2 gives
 *                            5.5 TB/s (assumed): 950 cycles a stage, under which a warp's 24 to 32 mma (8 or 16 of
 *                            them norms) lie; 2.5 us launch. Matrix and mean: 9 to 10 us, the goal. Best 16: a block's
 *                            lists 2 us (32 queries of 500 instructions), the word that a block is the last 1.2, 16
 *                            lists of 32 queries 2.6 (0.8 of them waiting): 14, missed
 *   256 x 2048 x 3200 bf16   131 MB from L2: 24 us; goal 10 us wants multicast in clusters, and wgmma: 3.4 GFLOP are 7 us
 *                            by mma.sync. 64 x 64 would also be 128 blocks, with 128 rows for 160: 20 % less, but twice
 *                            the lists, which are merged for 64 queries on 4 SMs: best 16 then takes 15 us at d = 768.
 *                            128 x 64: 64 SMs multiply 8 us. Parts of d are no way: a score's bits would depend on the
 *                            shape
 *   2048 x 8192 x 2048 bf16  69 GFLOP: 86 us; by mma.sync 144, and with 97 % of the SMs, norms (10 us) and lists 180
 *   1024 x 100 k x 768 bf16  157 GFLOP: 196 us; by mma.sync 330, norms 36, lists 20: 390 us, 50 %. The goal is 75 %;
 *                            wgmma: 325 us, 61 %
 *
 * Best k <= 32: stream, tile: see there. Nothing leaves the registers when no score passes; what passes waits in
 * buffers, and 32 are sorted and joined at a time. The other shapes: a tile's scores are compared in registers with
 * each query's worst; when any passes, all go to shared memory (turned so that no bank is met twice), where a warp
 * picks the best of two queries at once, a lane offering four keys in order: 22 instructions for each of k, whatever n
 * is. Longer lists: a warp a query inserts what beats the worst: k (1 + ln(n / k)) insertions for n keys of a part, one
 * after another, some 170 cycles each. The lists of parts are merged by the block that is the last of a tile of queries
 * (up to 64 parts; an integer counter says which, and what is merged does not depend on it), else by a kernel with a
 * warp a query: up to 32 short lists are picked from as a tile's scores are, a lane having one and reading four of its
 * entries ahead; of more, first the heads say which can matter.
 *
 * Means: 64 keys in whole numbers (sim_sum), such stretches in double by 32 chains and a tree.
 *
 * Farthest first: a launch a pick. Each block finds the pick among the blocks' farthest of the launch
 * before, compares its keys with that row, and leaves its own farthest: no barrier over the grid, which
 * would need all blocks on the card at once and costs about as much as a launch, and no word from the host.
 *
 * Float64 is left where it is rare, norms beyond float32 and sums of stretches: Orin and GeForce have 2 of its operations
 * a cycle and SM, 16 cycles a warp's. A tree in double over the 64 scores of a mean took 9 of them, 144 cycles, where the
 * products of these scores (d = 768) take 50 to 100; 1 / norm took 35, twice for 16 keys of stream.
 *
 * Norms, each kept in two floats (Knuth's exact sum). bf16 and I8: squares of 16 columns by tensor cores, from zero, four
 * of these as a tree, then joined: sums in order of the columns, whatever the kernel. Relative error of |row|^2: at
 * most 6 u (the products are exact, a tensor core cuts off twice in 16, the tree rounds twice; I8: none), u = 2^-24.
 * float32: four interleaved sums of a row, squares bring their errors along: about u^2. 1 / norm by one step of
 * Newton in float32, to 1 u; sums outside 2^-90 .. 2^100 are taken again in double, so norms have double's range. With
 * f rounded to float32 a score is off by at most 10 u beside its product's error; factors outside 2^-60 .. 2^60 carry
 * an exponent, and their scores go through double.
 *
 * Determinism: keys are A and queries B of every product, and a product's bits depend on its two rows alone
 * (product.cuh). Orders of scores are total, sums have fixed orders counted from key 0. So results depend
 * on no shape, part or batch: places in buffers are raced for, what is found in the end is not. L: d / 16 (tensor
 * cores) or d.
 *
 * Ladder (H200; computed where not said to be measured)
 *   considered  scores through shared memory for every tile
 *   v1          64 x 8, 128 x 32, 128 x 128 with two stages, lists by insertion. Measured, k = 10, d = 2048,
 *               bf16: 1 x 8192 matrix 0.024 ms, best 0.093, mean 0.057; 2048 x 8192 matrix 0.324 (27 % of the product
 *               rate), best 0.727 (12 %). The best of one query: a fill, 128 parts' lists by one warp of a second launch, two
 *               copies, a wait. Of many: 120 insertions a query and part, each a chain of some 100 cycles
 *   v2          stream; tile with three stages that go on across tiles, 64 x 64 a warp (395 instructions for 128
 *               mma, 32 ldmatrix, 12 copies), buffered lists; no fills. Expected: 1 x 8192 best 0.02 ms and
 *               the copies and the wait (0.03); 2048 x 8192 best 0.18
 *   v2 f32      with one query two warps an SM did copies, norms and sums of 64 keys: measured 0.067 ms, 1300 cycles a
 *               stage; four times as many threads, sums of one query unrolled: 0.02 expected
 *   v3          wgmma, a choice; short lists of parts merged by joins, four side by side, 16 read at once: 16 parts of a
 *               query 1.7 us rather than 5 (k = 10) to 9 (k = 32). Computed, not measured yet
 *   v4          short lists of few, mid and big picked, not inserted: 256 x 2048, best 16, had 49 insertions a query
 *               and part, 4 queries a warp: 33 us, which v3 left out of its 16; now 14. The shortcut for tiles where
 *               nothing passes never held where queries were fewer than a tile's. Lists of all lengths are entries;
 *               merging picks: 2.6 us for 7. Factors and means without float64: on Orin they took 44 % of the time of
 *               1 x n x 768, and twice that of the products. The pass for norms loads ahead. Not measured yet
 *   considered  norms inside tile: 4 of 36 mma more for each block, 12 % of 330 us, where the pass is 36 us; see also
 *               similarity_wgmma.cu
 *   next, not built: clusters with multicast for one buffer's size; the merge of a tile of queries by several blocks; int8
 *       tensor cores where both sides are I8 */
#include "kernels/cuda/similarity.cuh"
#include "kernels/cuda/tensor_map.h"

enum {
  SIM_THREADS = 256,     /* of the small kernels of this file */
  SIM_MERGE_WARPS = 4,   /* queries of a block of sim_merge_kernel */
  SIM_SLAB = 16384,      /* queries of a launch */
  SIM_FINISH_PARTS = 64, /* up to so many parts the last block finishes */
  SIM_FINISH_BEST = 512  /* and lists of so many fit its shared memory */
};
static const int64_t SIM_PARTIAL_BYTES = 256 << 20, SIM_COPY_BYTES = 1 << 30;

/* Factors of rows, and their copy as E where one is wanted: four lanes a row, each its slot's chunks in rising order. */
__global__ void sim_prepare_kernel(product_rows r, const float *scales, int32_t is_cosine,
                                   sim_factor *factors, float *copy) {
  enum { PER_BLOCK = SIM_THREADS / SIM_SLOTS };
  const int64_t row = (int64_t)blockIdx.x * PER_BLOCK + (int)threadIdx.x / SIM_SLOTS;
  const int slot = (int)threadIdx.x % SIM_SLOTS;
  float hi = 0.0f, lo = 0.0f;
  if (row < r.n_rows && (is_cosine || copy))
#pragma unroll 4
    for (int64_t col = slot * PRODUCT_CHUNK; col < r.n_cols; col += SIM_SLOTS * PRODUCT_CHUNK) {
      float x[PRODUCT_CHUNK];
      product_unpack(x, product_load_chunk<product_element<float>::WORDS>(r, row, col), r.dtype);
      sim_add_squares(&hi, &lo, x);
      if (copy)
        for (int e = 0; e < PRODUCT_CHUNK && col + e < r.n_cols; e++)
          copy[row * r.n_cols + col + e] = x[e];
    }
  const sim_factor f = is_cosine ? sim_norm_factor(r, row, hi, lo, true, scales)
                                 : sim_known_factor(NULL, scales, row, r.n_rows);
  if (slot == 0 && row < r.n_rows) factors[row] = f;
}

/* The same of what tensor cores multiply: a warp 16 rows, 64 columns at a time. Rows that are copied are of whole chunks. */
__global__ __launch_bounds__(SIM_THREADS, 2) void sim_prepare_mma_kernel(product_rows r, const float *scales,
                                                                         int32_t is_cosine,
                                                                         sim_factor *factors, ks_bf16 *copy) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  typedef product_element<ks_bf16> element;
  ks_smem smem;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, row = lane % 16;
  uint4 *stage =
      ks_smem_take<uint4>(&smem, SIM_THREADS / KS_WARP * 16 * PRODUCT_UNITS) + warp * 16 * PRODUCT_UNITS;
  const int64_t row0 = ((int64_t)blockIdx.x * (SIM_THREADS / KS_WARP) + warp) * 16;
  sim_squares squares;
  squares.clear();
  product_raw<element::WORDS> raw[4];
  const bool is_read = (is_cosine || copy) && row0 < r.n_rows;
  const auto load = [&](int64_t col0) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      raw[i] = product_load_chunk<element::WORDS>(r, row0 + row, col0 + (lane / 16 + 2 * i) * PRODUCT_CHUNK);
  };
  if (is_read) load(0);
  for (int64_t col0 = 0; is_read && col0 < r.n_cols; col0 += element::COLS) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int chunk = lane / 16 + 2 * i;
      const int64_t col = col0 + chunk * PRODUCT_CHUNK;
      if (r.dtype == KS_DTYPE_BF16) {
        stage[product_unit(row, chunk)] = raw[i].v[0];
      } else {
        float x[PRODUCT_CHUNK];
        product_unpack(x, raw[i], r.dtype);
        element::put(stage, row, chunk, x);
      }
      if (copy && row0 + row < r.n_rows && col < r.n_cols)
        *(uint4 *)(void *)(copy + (row0 + row) * r.n_cols + col) = stage[product_unit(row, chunk)];
    }
    load(col0 + element::COLS); /* under way while the squares are made */
    __syncwarp();
    squares.add_stage(stage, 16);
    __syncwarp();
  }
  squares.spread();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = row0 + lane / 4 + 8 * half;
    const sim_factor f = is_cosine ? sim_norm_factor(r, at, squares.hi[half], squares.lo[half], false, scales)
                                   : sim_known_factor(NULL, scales, at, r.n_rows);
    if (lane % 4 == 0 && at < r.n_rows) factors[at] = f;
  }
#endif
}

/* Long lists; a warp a query. */
__global__ void sim_merge_kernel(SIM_JOB j) {
  ks_smem smem;
  sim_entry *lists = ks_smem_take<sim_entry>(&smem, (size_t)SIM_MERGE_WARPS * (size_t)j.best_k);
  const int warp = (int)threadIdx.x / KS_WARP;
  const int64_t q = (int64_t)blockIdx.x * SIM_MERGE_WARPS + warp;
  if (q < j.q.n_rows) sim_merge(j, q, lists + warp * j.best_k, (int)threadIdx.x % KS_WARP);
}

/* Short lists. */
__global__ void sim_gather_kernel(sim_job j) {
  ks_smem smem;
  int32_t *room = ks_smem_take<int32_t>(&smem, (size_t)SIM_MERGE_WARPS * 2 * KS_WARP);
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  const int64_t q = (int64_t)blockIdx.x * SIM_MERGE_WARPS + warp;
  if (q < j.q.n_rows)
    sim_put_best(j, q,
                 sim_gather(j.entries + q * j.n_parts * j.best_k, j.n_parts, j.best_k,
                            room + warp * 2 * KS_WARP, lane),
                 lane);
}

__global__ void sim_mean_kernel(sim_job j) {
  const int64_t q = (int64_t)blockIdx.x * (SIM_THREADS / KS_WARP) + (int)threadIdx.x / KS_WARP;
  if (q < j.q.n_rows) sim_mean(j, q, (int)threadIdx.x % KS_WARP);
}

/* ---------------------------------------------------------------- plan */

/* How one operation runs: which kernel, in which pieces, with which memory. */
struct sim_run {
  ks_ctx *ctx;
  const char *op;
  const ks_similarity_args *a;
  sim_mode mode;
  int64_t best_k, n_slab;
  sim_shape shape;
  bool on_tensor_cores, is_any, copies_q, copies_k, has_q_factors, has_k_factors;
  char *room; /* workspace; offsets in it: */
  size_t bytes, q_copy, k_copy, q_factors, k_factors, entries, floors, scores, index, partial, mean, count,
      nearest, far[2], picked;
  const int32_t *groups, *query_groups;
  const int64_t *except;
};

static int64_t sim_ceil(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}

static size_t sim_take(sim_run *r, size_t n, size_t size) {
  const size_t at = r->bytes;
  r->bytes += (n * size + 255) & ~(size_t)255;
  return at;
}

static bool sim_on_tensor_cores(const ks_ctx *ctx, ks_dtype q, ks_dtype k) {
  return q != KS_DTYPE_F32 && k != KS_DTYPE_F32 && ks_cuda_device_of(ctx)->major >= 8;
}

/* Whether a row is staged as it lies. */
static bool sim_is_pure(const sim_run *r, const void *p, ks_dtype dtype) {
  return dtype == (r->on_tensor_cores ? KS_DTYPE_BF16 : KS_DTYPE_F32) &&
         product_rows_of(p, 1, r->a->n_cols, dtype).vector;
}

/* Its lists are worth it in shared memory only. */
static bool sim_may_be_big(const sim_run *r) {
  const size_t size = r->on_tensor_cores ? sizeof(ks_bf16) : sizeof(float);
  return r->mode != SIM_NEAREST && (size_t)r->a->n_cols * size % 16 == 0 && r->best_k <= SIM_SHORT &&
         sim_smem_bytes(SIM_BIG, sim_bn(SIM_BIG) * r->best_k) <=
             (size_t)ks_cuda_device_of(r->ctx)->smem_per_block;
}

/* Whether what has no copy yet may be copied as bf16: bytes within bounds, and an index of 32 bits. */
static bool sim_may_be_tile(const sim_run *r) {
  const ks_similarity_args *a = r->a;
  return r->on_tensor_cores && r->mode != SIM_NEAREST && a->n_cols > 0 && a->n_cols % 8 == 0 &&
         r->best_k <= SIM_SHORT && a->n_k < UINT32_MAX &&
         (sim_is_pure(r, a->k, a->k_dtype) ||
          a->n_k <= SIM_COPY_BYTES / a->n_cols / (int64_t)sizeof(ks_bf16)) &&
         sim_tile_smem_bytes(r->mode == SIM_TOP) <= (size_t)ks_cuda_device_of(r->ctx)->smem_per_block;
}

/* Rows within the reach of a tensor map. */
static bool sim_may_be_wide(const sim_run *r) {
  const ks_similarity_args *a = r->a;
  return sim_may_be_tile(r) && ks_cuda_has_wgmma(r->ctx, NULL) && a->n_k <= INT32_MAX - SIM_TILE_KEYS &&
         a->n_cols <= INT32_MAX &&
         sim_wide_smem_bytes(r->mode == SIM_TOP) <= (size_t)ks_cuda_device_of(r->ctx)->smem_per_block;
}

static bool sim_may_stream(const sim_run *r) {
  const ks_similarity_args *a = r->a;
  return r->on_tensor_cores && (r->mode == SIM_MATRIX || r->mode == SIM_TOP) && a->n_cols > 0 &&
         a->n_q <= SIM_STREAM_QUERIES && r->best_k <= SIM_SHORT && a->n_k < UINT32_MAX &&
         sim_is_pure(r, a->q, a->q_dtype) && sim_is_pure(r, a->k, a->k_dtype) &&
         sim_stream_smem_bytes(r->mode == SIM_TOP, a->n_q, a->n_cols) <=
             (size_t)ks_cuda_device_of(r->ctx)->smem_per_block;
}

static int64_t sim_n_tiles(const sim_run *r, sim_shape shape) {
  return sim_ceil(r->a->n_q, sim_bn(shape)) * sim_ceil(r->a->n_k, sim_bm(shape));
}

static sim_shape sim_choose_shape(const sim_run *r) {
  const int n_sm = ks_cuda_device_of(r->ctx)->n_sm;
  const sim_shape big = sim_may_be_tile(r) ? SIM_TILE : sim_may_be_big(r) ? SIM_BIG : SIM_MID;
  switch (ks_cuda_variant_of(r->ctx, "similarity")) {
  case KS_CUDA_similarity_few:
    return SIM_FEW;
  case KS_CUDA_similarity_mid:
    return SIM_MID;
  case KS_CUDA_similarity_big:
    return big;
  case KS_CUDA_similarity_wgmma:
    if (sim_may_be_wide(r)) return SIM_WIDE;
    break;
  default:
    break;
  }
  if (r->a->n_q <= sim_bn(SIM_FEW)) return sim_may_stream(r) ? SIM_STREAM : SIM_FEW;
  if (sim_n_tiles(r, big) >= n_sm) return big;
  return sim_may_be_big(r) && sim_n_tiles(r, SIM_BIG) >= n_sm ? SIM_BIG : SIM_MID;
}

/* Blocks that an SM holds at once: by registers, then by shared memory. */
static int64_t sim_blocks_per_sm(const sim_run *r, sim_shape shape, const sim_job *j) {
  static const int by_registers[SIM_N_SHAPES] = {4, 2, 2, 2, 1, 1};
  const ks_cuda_device *d = ks_cuda_device_of(r->ctx);
  if (by_registers[shape] == 1) return 1;
  const size_t bytes = shape == SIM_STREAM
                           ? sim_stream_smem_bytes(r->mode == SIM_TOP, j->q.n_rows, j->k.n_cols)
                           : sim_smem_bytes(shape, sim_n_list(d, shape, r->best_k));
  const int64_t fit = d->smem_per_sm / (int64_t)(bytes + 1024);
  return fit < 1 ? 1 : fit < by_registers[shape] ? fit : by_registers[shape];
}

/* Parts of the keys: as many as make the longest way of any SM shortest. */
static void sim_divide(const sim_run *r, sim_shape shape, sim_job *j) {
  const int64_t n_blocks = ks_cuda_device_of(r->ctx)->n_sm * sim_blocks_per_sm(r, shape, j);
  const int64_t n_tiles = sim_ceil(j->k_rows, sim_bm(shape));
  if (shape == SIM_STREAM) {
    j->n_parts = n_tiles < n_blocks ? n_tiles : n_blocks;
    return;
  }
  const int64_t tiles_of_q = r->mode == SIM_NEAREST || j->n_q_tiles < 1 ? 1 : j->n_q_tiles;
  const int64_t start = shape == SIM_TILE || shape == SIM_WIDE; /* new lists cost about a tile */
  int64_t best = INT64_MAX;
  j->n_parts = j->tiles_per_part = 1;
  for (int64_t parts = 1; parts <= n_blocks && parts <= n_tiles; parts++) {
    const int64_t per_part = sim_ceil(n_tiles, parts),
                  way = sim_ceil(tiles_of_q * parts, n_blocks) * (per_part + start);
    if (way >= best) continue;
    best = way;
    j->tiles_per_part = per_part;
    j->n_parts = sim_ceil(n_tiles, per_part);
  }
}

static ks_status sim_launch(const sim_run *r, sim_shape shape, bool is_any, const sim_job *j) {
  if (shape == SIM_TILE) return sim_launch_tile(r->ctx, r->op, j);
  if (shape == SIM_WIDE) return sim_launch_wide(r->ctx, r->op, j);
  if (shape == SIM_STREAM) return sim_launch_stream(r->ctx, r->op, j);
  return r->on_tensor_cores ? sim_launch_mma(r->ctx, r->op, shape, is_any, j)
                            : sim_launch_simt(r->ctx, r->op, shape, is_any, j);
}

/* Factors of rows into `factors`, in the arithmetic of the products that follow; copy NULL: none. */
static ks_status sim_prepare(const sim_run *r, product_rows rows, const float *scales, sim_factor *factors,
                             void *copy) {
  const int32_t is_cosine = r->a->metric == KS_METRIC_COSINE;
  if (r->on_tensor_cores)
    return ks_launch(r->ctx, r->op, sim_prepare_mma_kernel, dim3(ks_blocks_for(rows.n_rows, SIM_THREADS / 2)),
                     dim3(SIM_THREADS), ks_smem_bytes<uint4>(SIM_THREADS / 2 * PRODUCT_UNITS), rows, scales,
                     is_cosine, factors, (ks_bf16 *)copy);
  return ks_launch(r->ctx, r->op, sim_prepare_kernel,
                   dim3(ks_blocks_for(rows.n_rows, SIM_THREADS / SIM_SLOTS)), dim3(SIM_THREADS), 0, rows,
                   scales, is_cosine, factors, (float *)copy);
}

/* What every launch of the run shares: queries [q0, q0 + n). */
static sim_job sim_job_of(const sim_run *r, int64_t q0, int64_t n) {
  const ks_similarity_args *a = r->a;
  sim_job j = {};
  j.q = product_rows_of((const char *)a->q + q0 * a->n_cols * (int64_t)ks_dtype_size(a->q_dtype), n,
                        a->n_cols, a->q_dtype);
  j.k = product_rows_of(a->k, a->n_k, a->n_cols, a->k_dtype);
  j.q_scales = a->q_scales ? a->q_scales + q0 : NULL;
  j.k_scales = a->k_scales;
  j.k_rows = a->n_k;
  j.k_size = (int64_t)ks_dtype_size(a->k_dtype);
  j.mode = r->mode;
  j.is_cosine = a->metric == KS_METRIC_COSINE;
  j.best_k = (int32_t)r->best_k;
  return j;
}

static sim_run sim_run_of(ks_ctx *ctx, const char *op, const ks_similarity_args *a, sim_mode mode,
                          int64_t best_k) {
  sim_run r = {};
  r.ctx = ctx;
  r.op = op;
  r.a = a;
  r.mode = mode;
  r.best_k = best_k;
  r.on_tensor_cores = sim_on_tensor_cores(ctx, a->q_dtype, a->k_dtype);
  r.shape = sim_choose_shape(&r);
  r.n_slab = a->n_q < SIM_SLAB ? a->n_q : (int64_t)SIM_SLAB;
  const bool is_q_pure = sim_is_pure(&r, a->q, a->q_dtype), is_k_pure = sim_is_pure(&r, a->k, a->k_dtype);
  const bool is_tile = r.shape == SIM_TILE || r.shape == SIM_WIDE, is_big = r.shape == SIM_BIG || is_tile;
  r.copies_q = is_big && !is_q_pure;
  r.copies_k = is_tile && !is_k_pure;
  r.is_any = !is_k_pure || (!is_q_pure && !r.copies_q);
  const bool prepares = a->metric == KS_METRIC_COSINE && (is_big || mode == SIM_NEAREST);
  r.has_q_factors = prepares || r.copies_q || (mode == SIM_NEAREST && a->q_scales);
  r.has_k_factors = prepares || r.copies_k || (mode == SIM_NEAREST && a->k_scales);
  return r;
}

/* ---------------------------------------------------------------- matrix, best k, mean */

/* Lists of parts that a launch of n queries leaves. */
static size_t sim_n_lists(const sim_run *r, size_t n) {
  sim_job j = sim_job_of(r, 0, (int64_t)n);
  j.n_q_tiles = sim_ceil((int64_t)n, sim_bn(r->shape));
  sim_divide(r, r->shape, &j);
  return n * (size_t)j.n_parts;
}

/* Lays out the workspace of the run, whose launches have n_slab queries or fewer. */
static ks_status sim_reserve(sim_run *r) {
  const ks_similarity_args *a = r->a;
  const int64_t n_stretches = sim_ceil(a->n_k, SIM_STRETCH), bn = sim_bn(r->shape);
  if (r->mode == SIM_MEAN) {
    const int64_t fit = SIM_PARTIAL_BYTES / (n_stretches * (int64_t)sizeof(sim_partial)) / bn * bn;
    r->n_slab = fit < bn ? bn : fit;
    r->n_slab = a->n_q < r->n_slab ? a->n_q : r->n_slab < SIM_SLAB ? r->n_slab : (int64_t)SIM_SLAB;
  }
  const size_t n = (size_t)r->n_slab, cols = (size_t)a->n_cols;
  if (r->copies_q) r->q_copy = sim_take(r, n * cols, r->on_tensor_cores ? sizeof(ks_bf16) : sizeof(float));
  if (r->copies_k) r->k_copy = sim_take(r, (size_t)a->n_k * cols, sizeof(ks_bf16));
  if (r->has_q_factors) r->q_factors = sim_take(r, n, sizeof(sim_factor));
  if (r->has_k_factors) r->k_factors = sim_take(r, (size_t)a->n_k, sizeof(sim_factor));
  if (r->mode == SIM_TOP) {
    const size_t last = (size_t)((a->n_q - 1) % r->n_slab + 1), whole = sim_n_lists(r, n),
                 n_lists = last < n && sim_n_lists(r, last) > whole ? sim_n_lists(r, last) : whole;
    r->entries = sim_take(r, n_lists * (size_t)r->best_k, sizeof(sim_entry));
    r->floors = sim_take(r, r->shape == SIM_WIDE ? n_lists : 0, sizeof(uint32_t));
    r->scores = sim_take(r, n * (size_t)r->best_k, sizeof(float));
    r->index = sim_take(r, n * (size_t)r->best_k, sizeof(int64_t));
  }
  if (r->mode == SIM_MEAN) {
    r->partial = sim_take(r, n * (size_t)n_stretches, sizeof(sim_partial));
    r->mean = sim_take(r, n, sizeof(double));
    r->count = sim_take(r, n, sizeof(int64_t));
  }
  void *room;
  KS_TRY(ks_cuda_workspace(r->ctx, r->bytes, &room));
  r->room = (char *)room;
  if (!r->has_k_factors) return KS_OK;
  return sim_prepare(r, product_rows_of(a->k, a->n_k, a->n_cols, a->k_dtype), a->k_scales,
                     (sim_factor *)(r->room + r->k_factors), r->copies_k ? r->room + r->k_copy : NULL);
}

/* Results that a launch leaves unfinished. */
static ks_status sim_finish_apart(const sim_run *r, const sim_job *j) {
  if (j->is_finished_here || r->mode == SIM_MATRIX) return KS_OK;
  if (r->mode == SIM_MEAN)
    return ks_launch(r->ctx, r->op, sim_mean_kernel, dim3(ks_blocks_for(j->q.n_rows, SIM_THREADS / KS_WARP)),
                     dim3(SIM_THREADS), 0, *j);
  const bool is_short = r->best_k <= SIM_SHORT;
  const size_t n = SIM_MERGE_WARPS, bytes = is_short ? ks_smem_bytes<int32_t>(n * 2 * KS_WARP)
                                                     : ks_smem_bytes<sim_entry>(n * (size_t)r->best_k);
  return ks_launch(r->ctx, r->op, is_short ? sim_gather_kernel : sim_merge_kernel,
                   dim3(ks_blocks_for(j->q.n_rows, SIM_MERGE_WARPS)), dim3(SIM_MERGE_WARPS * KS_WARP), bytes,
                   *j);
}

/* Whether the last block of a tile of queries makes its results: not where a warp would merge several queries' lists one
 * after another, which costs more than a launch of as many warps as queries. */
static bool sim_finishes(const sim_run *r, int64_t n_parts) {
  if (r->shape == SIM_STREAM) return true;
  if (!sim_may_finish(r->shape) || n_parts > SIM_FINISH_PARTS || r->best_k > SIM_FINISH_BEST) return false;
  return r->mode != SIM_TOP || r->shape == SIM_FEW || (r->best_k <= SIM_SHORT && n_parts <= KS_WARP);
}

static ks_status sim_run_slab(const sim_run *r, int64_t q0, int64_t n, float *s) {
  sim_job j = sim_job_of(r, q0, n);
  j.n_q_tiles = sim_ceil(n, sim_bn(r->shape));
  sim_divide(r, r->shape, &j);
  if (r->has_q_factors) {
    void *copy = r->copies_q ? r->room + r->q_copy : NULL;
    j.q_factors = (const sim_factor *)(r->room + r->q_factors);
    KS_TRY(sim_prepare(r, j.q, j.q_scales, (sim_factor *)(r->room + r->q_factors), copy));
    if (copy) j.q = product_rows_of(copy, n, r->a->n_cols, r->on_tensor_cores ? KS_DTYPE_BF16 : KS_DTYPE_F32);
  }
  if (r->has_k_factors) j.k_factors = (const sim_factor *)(r->room + r->k_factors);
  if (r->copies_k) j.k = product_rows_of(r->room + r->k_copy, r->a->n_k, r->a->n_cols, KS_DTYPE_BF16);
  j.entries = (sim_entry *)(r->room + r->entries);
  j.floors = (uint32_t *)(r->room + r->floors);
  j.s = s ? s + q0 * r->a->n_k : NULL;
  j.scores = (float *)(r->room + r->scores);
  j.index = (int64_t *)(r->room + r->index);
  j.partial = (sim_partial *)(r->room + r->partial);
  j.mean = (double *)(r->room + r->mean);
  j.count = (int64_t *)(r->room + r->count);
  j.groups = r->groups;
  j.query_groups = r->query_groups ? r->query_groups + q0 : NULL;
  j.except = r->except ? r->except + q0 : NULL;
  if (r->mode != SIM_MATRIX) {
    j.is_finished_here = sim_finishes(r, j.n_parts);
    KS_TRY(ks_cuda_counters(r->ctx, &j.arrivals));
  }
  if (r->shape == SIM_WIDE && r->mode == SIM_TOP)
    KS_TRY(ks_cuda_fill(r->ctx, j.floors, 0, (size_t)(n * j.n_parts) * sizeof *j.floors));
  KS_TRY(sim_launch(r, r->shape, r->is_any, &j));
  return sim_finish_apart(r, &j);
}

extern "C" ks_status ks_cuda_similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s) {
  sim_run r = sim_run_of(ctx, "similarity", a, SIM_MATRIX, 0);
  KS_TRY(sim_reserve(&r));
  for (int64_t q0 = 0; q0 < a->n_q; q0 += r.n_slab)
    KS_TRY(sim_run_slab(&r, q0, a->n_q - q0 < r.n_slab ? a->n_q - q0 : r.n_slab, s));
  return KS_OK;
}

extern "C" ks_status ks_cuda_similarity_top(ks_ctx *ctx, const ks_similarity_args *a, int64_t best_k,
                                            float *scores, int64_t *index) {
  if (a->n_k == 0) {
    for (int64_t i = 0; i < a->n_q * best_k; i++)
      scores[i] = -INFINITY, index[i] = -1;
    return KS_OK;
  }
  if (a->n_k >= UINT32_MAX)
    return KS_FAIL(KS_EUNSUPPORTED, "cuda: similarity_top: %lld keys; at most %lld, go through them in parts",
                   (long long)a->n_k, (long long)UINT32_MAX - 1);
  sim_run r = sim_run_of(ctx, "similarity_top", a, SIM_TOP, best_k);
  KS_TRY(sim_reserve(&r));
  for (int64_t q0 = 0; q0 < a->n_q; q0 += r.n_slab) {
    const int64_t n = a->n_q - q0 < r.n_slab ? a->n_q - q0 : r.n_slab;
    const size_t n_best = (size_t)n * (size_t)best_k;
    KS_TRY(sim_run_slab(&r, q0, n, NULL));
    KS_TRY(ks_cuda_deliver(ctx, scores + q0 * best_k, r.room + r.scores, n_best * sizeof *scores));
    KS_TRY(ks_cuda_deliver(ctx, index + q0 * best_k, r.room + r.index, n_best * sizeof *index));
  }
  return ks_cuda_finish(ctx);
}

extern "C" ks_status ks_cuda_similarity_mean(ks_ctx *ctx, const ks_similarity_args *a,
                                             const ks_similarity_groups *g, double *mean, int64_t *count) {
  const void *staged = NULL, *staged_queries = NULL, *staged_except = NULL;
  if (a->n_k == 0) {
    for (int64_t i = 0; i < a->n_q; i++)
      mean[i] = (double)NAN, count[i] = 0;
    return KS_OK;
  }
  sim_run r = sim_run_of(ctx, "similarity_mean", a, SIM_MEAN, 0);
  KS_TRY(sim_reserve(&r));
  if (g->keys) {
    KS_TRY(ks_cuda_stage(ctx, g->keys, (size_t)a->n_k * sizeof *g->keys, &staged));
    KS_TRY(ks_cuda_stage(ctx, g->queries, (size_t)a->n_q * sizeof *g->queries, &staged_queries));
  }
  if (g->except) KS_TRY(ks_cuda_stage(ctx, g->except, (size_t)a->n_q * sizeof *g->except, &staged_except));
  r.groups = (const int32_t *)staged;
  r.query_groups = (const int32_t *)staged_queries;
  r.except = (const int64_t *)staged_except;
  for (int64_t q0 = 0; q0 < a->n_q; q0 += r.n_slab) {
    const int64_t n = a->n_q - q0 < r.n_slab ? a->n_q - q0 : r.n_slab;
    KS_TRY(sim_run_slab(&r, q0, n, NULL));
    KS_TRY(ks_cuda_deliver(ctx, mean + q0, r.room + r.mean, (size_t)n * sizeof *mean));
    KS_TRY(ks_cuda_deliver(ctx, count + q0, r.room + r.count, (size_t)n * sizeof *count));
  }
  return ks_cuda_finish(ctx);
}

/* ---------------------------------------------------------------- farthest first */

/* nearest = largest similarity to the centres q; *n_far places of far[0] say where the farthest may be. */
static ks_status sim_take_centres(const sim_run *r, int64_t *n_far) {
  const ks_similarity_args *a = r->a;
  sim_job j = sim_job_of(r, 0, a->n_q);
  j.n_q_tiles = sim_ceil(a->n_q, sim_bn(r->shape));
  sim_divide(r, r->shape, &j);
  if (r->has_k_factors) {
    j.k_factors = (const sim_factor *)(r->room + r->k_factors);
    KS_TRY(sim_prepare(r, j.k, j.k_scales, (sim_factor *)(r->room + r->k_factors), NULL));
  }
  if (r->has_q_factors) {
    j.q_factors = (const sim_factor *)(r->room + r->q_factors);
    KS_TRY(sim_prepare(r, j.q, j.q_scales, (sim_factor *)(r->room + r->q_factors), NULL));
  }
  j.is_fresh = 1;
  j.nearest = (float *)(r->room + r->nearest);
  j.far_out = (sim_far *)(r->room + r->far[0]);
  *n_far = j.n_parts;
  return sim_launch(r, r->shape, r->is_any, &j);
}

/* Each launch finds the farthest key among what the one before left, and compares all keys with it. */
static ks_status sim_take_picks(const sim_run *r, int64_t n_pick, int64_t first, int64_t n_far) {
  const bool has_centres = r->a->n_q > 0;
  for (int64_t p = 0; p < n_pick; p++) {
    sim_job j = sim_job_of(r, 0, 1);
    j.q = j.k;
    j.q.n_rows = 1;
    j.q_scales = NULL;
    j.n_q_tiles = 1;
    j.k_factors = r->has_k_factors ? (const sim_factor *)(r->room + r->k_factors) : NULL;
    if (p + 1 == n_pick) j.k_rows = 0; /* only the pick itself */
    sim_divide(r, SIM_FEW, &j);
    j.pick = p == 0 && !has_centres ? SIM_PICK_FIRST : SIM_PICK_FARTHEST;
    j.is_fresh = p == 0 && !has_centres;
    j.first = first;
    j.pick_number = p;
    j.picked = (int64_t *)(r->room + r->picked);
    j.nearest = (float *)(r->room + r->nearest);
    j.n_far = n_far;
    j.far_in = (const sim_far *)(r->room + r->far[p % 2]);
    j.far_out = (sim_far *)(r->room + r->far[1 - p % 2]);
    n_far = j.n_parts;
    KS_TRY(sim_launch(r, SIM_FEW, r->is_any, &j));
  }
  return KS_OK;
}

extern "C" ks_status ks_cuda_similarity_farthest_first(ks_ctx *ctx, const ks_similarity_args *a,
                                                       int64_t n_pick, int64_t first, int64_t *picked) {
  const char *op = "similarity_farthest_first";
  ks_similarity_args self = *a; /* keys against keys */
  int64_t n_far = 0;
  self.q = a->k;
  self.q_dtype = a->k_dtype;
  self.q_scales = a->k_scales;
  sim_run centres = sim_run_of(ctx, op, a, SIM_NEAREST, 0),
          picks = sim_run_of(ctx, op, &self, SIM_NEAREST, 0);
  const size_t n_parts = (size_t)ks_cuda_device_of(ctx)->n_sm * 4;
  if (picks.has_k_factors) picks.k_factors = sim_take(&picks, (size_t)a->n_k, sizeof(sim_factor));
  if (centres.has_q_factors) picks.q_factors = sim_take(&picks, (size_t)a->n_q, sizeof(sim_factor));
  picks.nearest = sim_take(&picks, (size_t)a->n_k, sizeof(float));
  picks.far[0] = sim_take(&picks, n_parts, sizeof(sim_far));
  picks.far[1] = sim_take(&picks, n_parts, sizeof(sim_far));
  picks.picked = sim_take(&picks, (size_t)n_pick, sizeof(int64_t));
  void *room;
  KS_TRY(ks_cuda_workspace(ctx, picks.bytes, &room));
  picks.room = centres.room = (char *)room;
  centres.k_factors = picks.k_factors;
  centres.q_factors = picks.q_factors;
  centres.nearest = picks.nearest;
  centres.far[0] = picks.far[0];
  if (a->n_q > 0) KS_TRY(sim_take_centres(&centres, &n_far));
  if (picks.has_k_factors)
    KS_TRY(sim_prepare(&picks, product_rows_of(a->k, a->n_k, a->n_cols, a->k_dtype), a->k_scales,
                       (sim_factor *)(picks.room + picks.k_factors), NULL));
  KS_TRY(sim_take_picks(&picks, n_pick, first, n_far));
  KS_TRY(ks_cuda_deliver(ctx, picked, picks.room + picks.picked, (size_t)n_pick * sizeof *picked));
  return ks_cuda_finish(ctx);
}
