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
 *     mean       four stretches of 64 keys of each query
 *     best       floor of the first tile: of eight groups of 32 scores, the least of their fourth best; about 50 of 256 pass. A
 *                buffer of 16 or more is sorted and joined with its list by the warp
 *
 * A block has one tile of queries and a part of the keys. Parts tell each other, without waiting: each leaves in `floors`, behind
 * every tile and for each query, the place ceil(best_k / parts) of its list; the least of these over all
 * parts is a floor for all, as best_k keys are not below it. Idle warps 1 - 3 gather them, a tile late. What
 * a floor keeps out is not among the best, so that the result does not depend on when it is read. Zeros
 * before the launch: a fill.
 *
 * Bytes and flops of a stage: 48 KB, 4.2 MFLOP. Shared memory: 3 stages for the best (144 KB, and 70 KB of lists and factors),
 * else 4. Resources (nvcc 13.0, sm_90a): 168 registers at launch, 224 of a consumer, 56 of a loader, no spills, 512 bytes of
 * local memory for scores that pass; 1 block an SM. The loop: 136 instructions for 8 m64n256k16.
 *
 * Arithmetic (H200; computed, not measured). 1024 x 100 k x 768, best 32: 157 GFLOP, 198 us at 796 TFLOP/s.
 *   product   238 us at the core's expected 83 %; 251 with 128 of 132 SMs and 25 tiles for 24.4 on average
 *   scores    690 instructions a warp and tile to scale and compare, 2 warps a scheduler: 0.70 us beside 10
 *             of product, 17 in all.
 *             Short rather than overlapped: a warpgroup may be up to 3 stages (1 us) before the other and multiply while that one
 *             looks at its scores, but nothing makes them take turns. Own tiles for each (64 x 256) would:
 *             and load 1.7 times as much
 *   lists     76 candidates a query and part (50, 16 of the second tile, 10 of all others; 152 if parts told each other nothing),
 *             3 or 4 joins of 160 instructions for each of a warp's 16 queries, and 80 rounds of offers:
 *             11000 instructions, 11 us
 *   norms     36 us, a pass over k before; queries, fill, gathering the parts' lists: 10 us
 *   in all    325 us, 61 % of the roofline (tile: 390); the goal is 75 %, 264 us. With d = 3200: 824 us of
 *             product at 796 TFLOP/s, 1045 + 17 + 11 + 150 + 10: 67 %
 *
 * Norms in here, considered and not built, for 1024 x 100 k x 768:
 *   every block, by warps 1 - 3 from the stages: reads 32 KB more of shared memory a stage: products 80 KB,
 *     copies 48, at 83 % of the rate 105 of 128 bytes a cycle, then 131: the product slows by what the pass
 *     costs
 *   every block, by mma.sync: 128 mma a stage are 12 % of its fma, and 20 % of the time at mma.sync's rate: 30 to 50 us
 *   the blocks of one tile of queries, for all: others must wait for these, which needs all on the card at once (a cooperative
 *     launch); that tile in a launch before: 128 queries are 31 us of product beside 34 of reading, but 132
 *     short parts with their lists cost 10 us more and a second set of launches 5: 15 us saved, 5 %
 *   warps 1 - 3 from L2 ahead of the tile, an eighth of the keys a block, told by k_factors, computed anew where the others are
 *     late: saves 30 us; 12 KB that are under way give 1.6 times the bytes needed at 1 us of latency. The next to try, with a GPU
 *
 * Ladder
 *   v1  floor of the first tile by 32 maxima of 8 (90 of 256 pass), parts on their own: 192 candidates; 337 us. Not measured
 *   v2  fourth best of groups of 32, floors of all parts: 325 us. Not measured yet.
 *   next, not built: clusters of two blocks with multicast of keys (product_wgmma.cuh): 20 to 30 us */
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
         ks_smem_bytes<int32_t>(SIM_WIDE_SETS) +
         (is_top ? sim_best_bytes(SIM_WIDE_QUERIES) + ks_smem_bytes<float>(SIM_WIDE_QUERIES) : 0);
}

#ifdef KS_HAS_WGMMA

/* Behind the stages of wg_room. */
template <int MODE> struct sim_wide_shared {
  uint64_t *full, *empty; /* of the sets */
  float *gk, *gq, *floor; /* floor: of all parts; written and read at any time, since it only rises */
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
    floor = MODE == SIM_TOP ? ks_smem_take<float>(smem, SIM_WIDE_QUERIES) : NULL;
  }
  /* Before the block's barrier. */
  KS_DEVICE void init() const {
    if (MODE == SIM_TOP && threadIdx.x < SIM_WIDE_QUERIES) floor[threadIdx.x] = NAN;
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
        const float g = sim_plain_factor(j.k_factors, j.k_scales, k, j.k.n_rows);
        sh.gk[set * SIM_WIDE_KEYS + m] = g;
        if (MODE == SIM_MEAN)
          sh.groups[set * SIM_WIDE_KEYS + m] = j.groups && k < j.k.n_rows ? j.groups[k] : 0;
        if (g == INFINITY) sh.rare[set] = step;
      }
      ks_barrier_arrive(sh.full + set);
      if (MODE == SIM_TOP && step > 0) gather_floors(thread);
    }
  }
  /* Of each query, the least of what all parts have told. */
  KS_DEVICE void gather_floors(int thread) const {
    for (int n = thread; n < SIM_WIDE_QUERIES && q0 + n < j.q.n_rows; n += WG_FILLERS) {
      const uint32_t *of = j.floors + (q0 + n) * j.n_parts;
      uint32_t least = UINT32_MAX;
#pragma unroll 8
      for (int64_t p = 0; p < j.n_parts; p++)
        least = min(least, __ldcg(of + p));
      *(volatile float *)(sh.floor + n) = sim_entry_score((sim_entry)least << 32);
    }
  }
  /* By the owner of the queries: where ceil(best_k / n_parts) keys of this part end. */
  KS_DEVICE void tell_floors() const {
    const int n = first_query() + lane(), place = (int)((j.best_k - 1) / j.n_parts);
    if (lane() >= SIM_WIDE_PER_WARP || q0 + n >= j.q.n_rows) return;
    j.floors[(q0 + n) * j.n_parts + part] = (uint32_t)(sh.best.lists[n * KS_WARP + place] >> 32);
  }

  /* A warp's own queries, with its first tile. */
  KS_DEVICE void begin(float gq[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int n = wg_row(h);
      gq[h] = sim_plain_factor(j.q_factors, j.q_scales, q0 + n, j.q.n_rows);
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
      sim_scale_exactly(j, sim_wide_sums{acc}, q0, t.col);
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

  /* Stretches of 64 keys, one after another, from local memory. */
  KS_DEVICE void take_mean(const wg_tile &t, float (&acc)[SIM_WIDE_KEYS / 2]) const {
    const int64_t n_stretches = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
    const int32_t *groups = sh.groups + t.tag % SIM_WIDE_SETS * SIM_WIDE_KEYS;
    float x[SIM_WIDE_KEYS / 2];
    sim_wide_sums{acc}.each([&](int at, float &v) { x[at] = v; });
#pragma unroll 1
    for (int i = 0; i < 2 * SIM_WIDE_KEYS / SIM_STRETCH; i++) {
      const int h = i % 2, stretch = i / 2;
      const int64_t q = q0 + wg_row(h), at = t.col / SIM_STRETCH + stretch;
      const sim_own own(j, q);
      float v[16];
      int count = 0;
#pragma unroll
      for (int e = 0; e < 16; e++) {
        const int m = wg_col(8 * stretch + e / 2, e % 2);
        const bool counts = own.takes(j, t.col + m, groups[m]);
        v[e] = counts ? x[4 * (8 * stretch + e / 2) + 2 * h + e % 2] : 0.0f;
        count += counts;
      }
#pragma unroll
      for (int d = 2; d > 0; d /= 2)
        count += __shfl_xor_sync(KS_FULL_MASK, count, d);
      const sim_partial p = sim_sum<16, 1, 4>(v, count);
      if (lane() % 4 == 0 && q < j.q.n_rows && at < n_stretches) j.partial[q * n_stretches + at] = p;
    }
  }

  /* ---------------------------------------------------------------- the best */

  /* Of a whole first tile: of eight groups of 32 scores (two a lane), the least of their fourth best. 32 are not below it. */
  KS_DEVICE void first_floor(const float (&acc)[SIM_WIDE_KEYS / 2]) const {
    enum { GROUP = 32, DEEP = 4 };
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float least = INFINITY;
#pragma unroll
      for (int i0 = 0; i0 < SIM_WIDE_KEYS / 4; i0 += GROUP) {
        float most[DEEP] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
        for (int i = i0; i < i0 + GROUP; i++) {
          float v = fmaxf(acc[4 * (i / 2) + 2 * h + i % 2], -INFINITY); /* a number */
#pragma unroll
          for (int e = 0; e < DEEP; e++) {
            const float next = fminf(most[e], v);
            most[e] = fmaxf(most[e], v);
            v = next;
          }
        }
        least = fminf(least, most[DEEP - 1]);
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
    float worst[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
      worst[h] = fmaxf(sh.best.worst[wg_row(h)], *(volatile const float *)(sh.floor + wg_row(h)));
    sim_wide_sums{acc}.each([&](int at, float &v) { p.test(x, at, v, worst[at / 2 % 2]); });
    p.count();
    while (__any_sync(KS_FULL_MASK, p.any != 0)) {
      p.offer(j, sh.best, x, t.col);
      __syncwarp();
      sim_best_join(sh.best, j.best_k, first_query(), SIM_WIDE_PER_WARP, lane());
      __syncwarp();
    }
    tell_floors();
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
