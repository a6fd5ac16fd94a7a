/* Similarities of many bf16 rows by Hopper's own products (product_wgmma.cuh): 128 queries x 256 keys a block, sm_90;
 * similarity.cu has the story, similarity_many.cuh what is shared with similarity_tile.cu.
 *
 * Queries are the rows of a tile and keys its columns: a query's 256 scores lie in four lanes of one warp. So a warp owns 16
 * queries with their lists, buffers and floors, and nothing behind the product waits for another warp; the two consumer
 * warpgroups share nothing but the stages.
 *
 *   warp 0       TMA, up to STAGES stages ahead, across tiles
 *   warps 1 - 3  factors and groups of the tile's 256 keys, one tile ahead, in two sets with barriers of their own
 *   warps 4 - 11 64 queries x 256 keys a warpgroup; scores; then, as in similarity_tile.cu:
 *     matrix     two keys of a query an instruction (8 bytes; a sector a quad)
 *     mean       four stretches of 64 keys of each query, the tree of sim_take_mean
 *     best       floor of the first tile: the least of 32 maxima of 8 scores. Whatever passes is offered, and joined by the warp
 *
 * A block has one tile of queries and a part of the keys. Nothing waits for another part.
 *
 * Bytes and flops of a stage: 48 KB, 4.2 MFLOP. Shared memory: 3 stages for the best (144 KB, and 66 KB of lists), else 4.
 * Resources (nvcc 13.0, sm_90a): 168 registers at launch, 224 of a consumer, no spills, 512 bytes of local memory for scores
 * that pass; 1 block an SM. The loop: 135 instructions for 8 m64n256k16.
 *
 * Arithmetic (H200; computed, not measured). 1024 x 100 k x 768, best 32: 157 GFLOP, 198 us at 796 TFLOP/s; at the core's expected
 * 83 % 238 us, with 128 of 132 SMs and 25 tiles for 24.4 251 us. Behind each tile: 690 instructions a warp to scale and compare,
 * 2 warps a scheduler, 0.70 us beside 8.3 (d = 768) of product: 17 us in all. A warpgroup may be up to 3 stages before the other
 * and multiply meanwhile, which hides up to 1 us a tile: short rather than overlapped, and nothing makes them take turns.
 * Lists: 192 candidates of a query and part of 25 tiles (90 of the first, 32 ln 25), 25000 instructions a warp: 25 us. Norms
 * 36 us. In all 337 us, 59 % of the roofline; mma.sync is expected at 390.
 *
 * Ladder
 *   v1  this. Not measured yet. */
#include "kernels/cuda/product_wgmma.cuh"
#include "kernels/cuda/similarity_many.cuh"

enum {
  SIM_WIDE_QUERIES = WG_BM,
  SIM_WIDE_KEYS = 256,
  SIM_WIDE_PER_WARP = 16,
  SIM_WIDE_SETS = 2 /* of keys' factors */
};
static_assert((int)SIM_WIDE_QUERIES == sim_bn(SIM_WIDE) && (int)SIM_WIDE_KEYS == sim_bm(SIM_WIDE),
              "what launches are told");

template <int MODE> struct sim_wide_shape {
  static constexpr int BN = SIM_WIDE_KEYS, STAGES = MODE == SIM_TOP ? 3 : 4, SUMS = BN / 2;
  static constexpr bool B_MN = false;
  static constexpr int A_SIZE = WG_BM * WG_BK, B_SIZE = BN * WG_BK, B_BOX = BN;
  static constexpr uint32_t STAGE_BYTES = (A_SIZE + B_SIZE) * sizeof(ks_bf16);
};

size_t sim_wide_smem_bytes(bool is_top) {
  const size_t stages = is_top ? sim_wide_shape<SIM_TOP>::STAGES : sim_wide_shape<SIM_MATRIX>::STAGES;
  return ks_smem_bytes<ks_bf16>(stages * WG_BM * WG_BK) +
         ks_smem_bytes<ks_bf16>(stages * SIM_WIDE_KEYS * WG_BK) + ks_smem_bytes<uint64_t>(4 * stages) +
         ks_smem_bytes<uint64_t>(2 * SIM_WIDE_SETS) + ks_smem_bytes<float>(SIM_WIDE_SETS * SIM_WIDE_KEYS) +
         ks_smem_bytes<int32_t>(SIM_WIDE_SETS * SIM_WIDE_KEYS) + ks_smem_bytes<float>(SIM_WIDE_QUERIES) +
         ks_smem_bytes<int32_t>(SIM_WIDE_SETS) + (is_top ? sim_best_bytes(SIM_WIDE_QUERIES) : 0);
}

#ifdef KS_HAS_WGMMA

/* Behind the stages of wg_room. */
template <int MODE> struct sim_wide_shared {
  uint64_t *full, *empty; /* of the sets */
  float *gk, *gq;
  int32_t *groups, *rare; /* rare: of a set: some key's factor is no float */
  sim_best best;

  KS_DEVICE explicit sim_wide_shared(ks_smem *smem) {
    full = ks_smem_take<uint64_t>(smem, 2 * SIM_WIDE_SETS);
    empty = full + SIM_WIDE_SETS;
    gk = ks_smem_take<float>(smem, SIM_WIDE_SETS * SIM_WIDE_KEYS);
    groups = ks_smem_take<int32_t>(smem, SIM_WIDE_SETS * SIM_WIDE_KEYS);
    gq = ks_smem_take<float>(smem, SIM_WIDE_QUERIES);
    rare = ks_smem_take<int32_t>(smem, SIM_WIDE_SETS);
    if (MODE == SIM_TOP) best.take(smem, SIM_WIDE_QUERIES);
  }
  /* Before the block's barrier. */
  KS_DEVICE void init() const {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < SIM_WIDE_SETS; i++) {
      ks_barrier_init(full + i, WG_FILLERS);
      ks_barrier_init(empty + i, WG_CONSUMER_WARPS);
      rare[i] = -1;
    }
  }
};

/* Where sum `at` = 4 j + 2 h + c of a consumer thread lies. */
struct sim_wide_sums {
  enum { N_SUMS = SIM_WIDE_KEYS / 2 };
  float (&acc)[N_SUMS];
  static KS_DEVICE int key(int at) { return wg_col(at / 4, at % 2); }
  static KS_DEVICE int query(int at) { return wg_row(at / 2 % 2); }
  template <class F> KS_DEVICE void each(F f) const {
#pragma unroll
    for (int at = 0; at < N_SUMS; at++)
      f(at, acc[at]);
  }
};

/* Step s of a block is the s-th tile of keys of its part; tags of tiles are steps. */
template <int MODE> struct sim_wide_work {
  const sim_job &j;
  const sim_wide_shared<MODE> &sh;
  uint32_t n_tiles;
  int64_t q0, part, first, end; /* tiles of keys */

  KS_DEVICE sim_wide_work(const sim_job &job, const sim_wide_shared<MODE> &shared) : j(job), sh(shared) {
    const int64_t n_key_tiles = (j.k.n_rows + SIM_WIDE_KEYS - 1) / SIM_WIDE_KEYS;
    part = (int64_t)(blockIdx.x % (uint32_t)j.n_parts);
    q0 = (int64_t)(blockIdx.x / (uint32_t)j.n_parts) * SIM_WIDE_QUERIES;
    first = part * j.tiles_per_part;
    end = first + j.tiles_per_part < n_key_tiles ? first + j.tiles_per_part : n_key_tiles;
    n_tiles = gridDim.x * (uint32_t)j.tiles_per_part;
  }
  KS_DEVICE wg_tile tile(uint32_t i) const {
    const int step = (int)(i / gridDim.x);
    const int64_t left = j.q.n_rows - q0;
    const wg_tile t = {q0, (first + step) * SIM_WIDE_KEYS,
                       first + step >= end       ? 0
                       : left < SIM_WIDE_QUERIES ? (int)left
                                                 : (int)SIM_WIDE_QUERIES,
                       0, step};
    return t;
  }
  KS_DEVICE int extra_steps(const wg_tile &, int) const { return 0; }

  static KS_DEVICE int lane() { return (int)threadIdx.x % KS_WARP; }
  static KS_DEVICE int first_query() { return wg_row(0) - lane() / 4; }

  /* Factors and groups of the keys of all tiles, by threads 0 to 95 of warps 1 to 3. */
  KS_DEVICE void fill_keys(int thread) const {
    for (int64_t t = first; t < end; t++) {
      const int step = (int)(t - first), set = step % SIM_WIDE_SETS;
      ks_barrier_wait(sh.empty + set, (uint32_t)(step / SIM_WIDE_SETS % 2) ^ 1u);
      for (int m = thread; m < SIM_WIDE_KEYS; m += WG_FILLERS) {
        const int64_t k = t * SIM_WIDE_KEYS + m;
        const float g = sim_factor_of(j.k_factors, j.k_scales, k, j.k.n_rows);
        sh.gk[set * SIM_WIDE_KEYS + m] = g;
        if (MODE == SIM_MEAN)
          sh.groups[set * SIM_WIDE_KEYS + m] = j.groups && k < j.k.n_rows ? j.groups[k] : 0;
        if (g == INFINITY) sh.rare[set] = step;
      }
      ks_barrier_arrive(sh.full + set);
    }
  }

  /* A warp's own queries, with its first tile. */
  KS_DEVICE void begin(float gq[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int n = wg_row(h);
      gq[h] = sim_factor_of(j.q_factors, j.q_scales, q0 + n, j.q.n_rows);
      if (lane() % 4 == 0) sh.gq[n] = gq[h];
      if (MODE == SIM_TOP && lane() % 4 == 0) sh.best.clear(n, q0 + n < j.q.n_rows);
    }
    if (MODE == SIM_TOP)
      for (int i = 0; i < SIM_WIDE_PER_WARP; i++)
        sh.best.lists[(first_query() + i) * KS_WARP + lane()] = 0;
    __syncwarp();
  }

  /* Sums become scores; the set of factors is free then. */
  KS_DEVICE void scale(const wg_tile &t, float (&acc)[SIM_WIDE_KEYS / 2]) const {
    const int set = t.tag % SIM_WIDE_SETS;
    const float *gk = sh.gk + set * SIM_WIDE_KEYS;
    float gq[2];
    if (t.tag == 0)
      begin(gq);
    else
      gq[0] = sh.gq[wg_row(0)], gq[1] = sh.gq[wg_row(1)];
    ks_barrier_wait(sh.full + set, (uint32_t)(t.tag / SIM_WIDE_SETS % 2));
    if (__any_sync(KS_FULL_MASK, gq[0] == INFINITY || gq[1] == INFINITY || sh.rare[set] == t.tag)) {
      sim_scale_exactly(j, sim_wide_sums{acc}, sh.gq, gk, q0, t.col);
      return;
    }
#pragma unroll
    for (int i = 0; i < SIM_WIDE_KEYS / 8; i++) {
      const float2 g = *(const float2 *)(const void *)(gk + wg_col(i, 0));
#pragma unroll
      for (int e = 0; e < 4; e++)
        acc[4 * i + e] = fmaf(acc[4 * i + e], gq[e / 2] * (e % 2 ? g.y : g.x), 0.0f);
    }
  }
  KS_DEVICE void release(const wg_tile &t) const {
    __syncwarp();
    if (lane() == 0) ks_barrier_arrive(sh.empty + t.tag % SIM_WIDE_SETS);
  }

  /* ---------------------------------------------------------------- matrix, mean */

  KS_DEVICE void take_matrix(const wg_tile &t, const float (&acc)[SIM_WIDE_KEYS / 2]) const {
    const bool pairs = j.k.n_rows % 2 == 0 && (uintptr_t)j.s % 8 == 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (wg_row(h) >= t.n_rows) continue;
      float *row = j.s + (q0 + wg_row(h)) * j.k.n_rows;
#pragma unroll
      for (int i = 0; i < SIM_WIDE_KEYS / 8; i++) {
        const int64_t k = t.col + wg_col(i, 0);
        const float x = acc[4 * i + 2 * h], y = acc[4 * i + 2 * h + 1];
        if (pairs) {
          if (k < j.k.n_rows) *(float2 *)(void *)(row + k) = make_float2(x, y);
        } else {
          if (k < j.k.n_rows) row[k] = x;
          if (k + 1 < j.k.n_rows) row[k + 1] = y;
        }
      }
    }
  }

  /* Stretches of 64 keys: keys 32 apart, 16, 8, then over lanes 4, 2, then 1. One after another, from local memory. */
  KS_DEVICE void take_mean(const wg_tile &t, float (&acc)[SIM_WIDE_KEYS / 2]) const {
    const int64_t n_stretches = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
    const int32_t *groups = sh.groups + t.tag % SIM_WIDE_SETS * SIM_WIDE_KEYS;
    float x[SIM_WIDE_KEYS / 2];
    sim_wide_sums{acc}.each([&](int at, float &v) { x[at] = v; });
#pragma unroll 1
    for (int i = 0; i < 2 * SIM_WIDE_KEYS / SIM_STRETCH; i++) {
      const int h = i % 2, stretch = i / 2;
      const int64_t q = q0 + wg_row(h), at = t.col / SIM_STRETCH + stretch;
      const int32_t group = j.groups && q < j.q.n_rows ? j.query_groups[q] : 0;
      double sum[2];
      int count = 0;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        double v[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const int m = wg_col(8 * stretch + e, c);
          const bool counts = t.col + m < j.k.n_rows && groups[m] == group;
          v[e] = counts ? (double)x[4 * (8 * stretch + e) + 2 * h + c] : 0.0;
          count += counts;
        }
        sum[c] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#pragma unroll
        for (int d = 2; d > 0; d /= 2)
          sum[c] += __shfl_xor_sync(KS_FULL_MASK, sum[c], d);
      }
#pragma unroll
      for (int d = 2; d > 0; d /= 2)
        count += __shfl_xor_sync(KS_FULL_MASK, count, d);
      const sim_partial p = {sum[0] + sum[1], count};
      if (lane() % 4 == 0 && q < j.q.n_rows && at < n_stretches) j.partial[q * n_stretches + at] = p;
    }
  }

  /* ---------------------------------------------------------------- the best */

  KS_DEVICE void first_floor(const float (&acc)[SIM_WIDE_KEYS / 2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float least = INFINITY;
#pragma unroll
      for (int i = 0; i < SIM_WIDE_KEYS / 8; i += 4) {
        float most = -INFINITY;
#pragma unroll
        for (int e = 0; e < 8; e++)
          most = fmaxf(most, acc[4 * (i + e / 2) + 2 * h + e % 2]);
        least = fminf(least, most);
      }
      least = fminf(least, __shfl_xor_sync(KS_FULL_MASK, least, 1));
      least = fminf(least, __shfl_xor_sync(KS_FULL_MASK, least, 2));
      if (lane() % 4 == 0 && sh.best.worst[wg_row(h)] != INFINITY) sh.best.worst[wg_row(h)] = least;
    }
    __syncwarp();
  }

  KS_DEVICE void take_top(const wg_tile &t, float (&acc)[SIM_WIDE_KEYS / 2]) const {
    float x[SIM_WIDE_KEYS / 2];
    sim_passing<sim_wide_sums> p;
    if (t.tag == 0 && t.col + SIM_WIDE_KEYS <= j.k.n_rows) first_floor(acc);
    const float worst[2] = {sh.best.worst[wg_row(0)], sh.best.worst[wg_row(1)]};
    sim_wide_sums{acc}.each([&](int at, float &v) { p.test(x, at, v, worst[at / 2 % 2]); });
    p.count();
    while (__any_sync(KS_FULL_MASK, p.any != 0)) {
      p.offer(j, sh.best, x, t.col);
      __syncwarp();
      sim_best_join(sh.best, j.best_k, first_query(), SIM_WIDE_PER_WARP, lane());
      __syncwarp();
    }
    if (t.tag == (int)(end - first) - 1)
#pragma unroll 1
      for (int n = first_query(); n < first_query() + SIM_WIDE_PER_WARP; n += 2)
        sim_best_publish(j, sh.best, q0, n, part, lane());
  }

  template <class S> KS_DEVICE void finish(const wg_tile &t, float (&acc)[S::SUMS]) const {
    scale(t, acc);
    if constexpr (MODE == SIM_MEAN) take_mean(t, acc);
    release(t);
    if constexpr (MODE == SIM_TOP) take_top(t, acc);
    if constexpr (MODE == SIM_MATRIX) take_matrix(t, acc);
  }
};
#endif

template <int MODE>
static __global__ void __launch_bounds__(WG_THREADS, 1)
    similarity_wgmma_kernel(const __grid_constant__ wg_maps maps, const __grid_constant__ sim_job j) {
#ifdef KS_HAS_WGMMA
  typedef sim_wide_shape<MODE> S;
  ks_smem smem;
  const wg_room<S> room(&smem);
  const sim_wide_shared<MODE> sh(&smem);
  const sim_wide_work<MODE> work(j, sh);
  const int warp = (int)threadIdx.x / KS_WARP;
  sh.init();
  room.init();
  if (warp < KS_WARPGROUP / KS_WARP) {
    ks_registers_fewer<56>();
    if (threadIdx.x == 0)
      wg_load<S>(room, maps, (int)j.k.n_cols, work);
    else if (warp > 0)
      work.fill_keys((int)threadIdx.x - KS_WARP);
  } else {
    ks_registers_more<224>();
    wg_consume<S>(room, (int)j.k.n_cols, work);
  }
#endif
}

template <int MODE> static ks_status sim_launch_wide_as(ks_ctx *ctx, const char *op, const sim_job *j) {
  wg_maps maps;
  KS_TRY(ks_cuda_tensor_map(ctx, op, j->q.p, j->q.n_rows, j->q.n_cols, WG_BM, &maps.a));
  KS_TRY(ks_cuda_tensor_map(ctx, op, j->k.p, j->k.n_rows, j->k.n_cols, SIM_WIDE_KEYS, &maps.b));
  return ks_launch(ctx, op, similarity_wgmma_kernel<MODE>, dim3(ks_blocks_for(j->n_parts * j->n_q_tiles, 1)),
                   dim3(WG_THREADS), sim_wide_smem_bytes(MODE == SIM_TOP), maps, *j);
}
ks_status sim_launch_wide(ks_ctx *ctx, const char *op, const sim_job *j) {
  return j->mode == SIM_TOP    ? sim_launch_wide_as<SIM_TOP>(ctx, op, j)
         : j->mode == SIM_MEAN ? sim_launch_wide_as<SIM_MEAN>(ctx, op, j)
                               : sim_launch_wide_as<SIM_MATRIX>(ctx, op, j);
}
