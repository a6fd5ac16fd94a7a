/* Up to 8 bf16 queries with many bf16 rows, one launch, bound by memory; similarity.cu has the story.
 *
 * A warp streams 16 keys at a time through stages of its own, 64 columns (2 KiB) each, 4 of them under way: no barrier
 * of the block stands between a copy and its use. Groups of 16 keys go round over all blocks first and warps second,
 * so that 2048 keys keep 128 SMs busy. The queries lie in shared memory whole. Norms are made from the fragments of the
 * products, those of the queries by the last warp beside its first keys.
 *
 * A stage costs a warp about 185 instructions (sm_90): 6 ldmatrix, 4 mma of the product, 8 of the squares, 4 copies.
 * At 4.5 TB/s an SM of 132 gets 2 KiB in 118 cycles, in which it could issue 470.
 * Under way an SM: 2 blocks x 8 warps x 4 stages = 128 KiB; 4.5 TB/s x 0.7 us wants 24.
 * Predicted (H200, computed in similarity.cu, not measured yet): 1 x 1 M x 3200 1.42 ms, all of the read rate (goal
 * 1.67); 1 x 2048 x 768 8 us, 1 x 2048 x 3200 about 11 us; the ladder is there, too.
 *
 * The best: a warp keeps a list a query in shared memory. Scores of 16 keys that are not below its last go in: one
 * by one, or sorted when many do (as at first). The block joins its warps' lists; the last block of all (an integer
 * counter, left zero) gathers what all blocks have left. */
#include "kernels/cuda/similarity.cuh"

#ifdef KS_CUDA_ON_CPU
#define SIM_STREAM_JOB const sim_job
#else
#define SIM_STREAM_JOB const __grid_constant__ sim_job
#endif

enum {
  STREAM_STAGE = SIM_STREAM_KEYS * PRODUCT_UNITS, /* units of 16 bytes */
  STREAM_COLS = 64,
  STREAM_AHEAD = SIM_STREAM_STAGES - 1,
  STREAM_FEW = 3 /* so many go in one by one */
};

struct sim_stream_shared {
  uint4 *stages, *queries; /* [warps, stages], [n_q, units] */
  sim_factor *fq;          /* [8] */
  float *worst;            /* [warps, 8] */
  sim_entry *lists;        /* [warps, n_q, 32] */
  int32_t *room;           /* [warps, 64] */
  int units;

  KS_DEVICE sim_stream_shared(int mode, int n_queries, int64_t n_cols) {
    ks_smem smem;
    units = (int)((n_cols + STREAM_COLS - 1) / STREAM_COLS) * PRODUCT_UNITS;
    stages = ks_smem_take<uint4>(&smem, SIM_STREAM_WARPS * SIM_STREAM_STAGES * STREAM_STAGE);
    queries = ks_smem_take<uint4>(&smem, (size_t)n_queries * (size_t)units);
    fq = ks_smem_take<sim_factor>(&smem, SIM_STREAM_QUERIES);
    worst = ks_smem_take<float>(&smem, SIM_STREAM_WARPS * SIM_STREAM_QUERIES);
    const size_t n = mode == SIM_TOP ? SIM_STREAM_WARPS : 0;
    lists = n ? ks_smem_take<sim_entry>(&smem, n * (size_t)n_queries * KS_WARP) : NULL;
    room = n ? ks_smem_take<int32_t>(&smem, n * 2 * KS_WARP) : NULL;
  }
  KS_DEVICE uint4 *query(int n, int unit) const { return queries + n * units + (unit ^ (n & 7)); }
};

KS_DEVICE int sim_stream_lane() {
  return (int)threadIdx.x % KS_WARP;
}
KS_DEVICE int sim_stream_warp() {
  return (int)threadIdx.x / KS_WARP;
}

/* ---------------------------------------------------------------- a warp's stages */

struct sim_stream_fetch {
  uint4 *stages;
  const char *from; /* the lane's unit of its first row of the next stage */
  int64_t group, n_groups, per_round;
  int step, n_steps, slot, n_rows;

  KS_DEVICE sim_stream_fetch(const sim_job &j, uint4 *own) {
    stages = own + sim_stream_warp() * SIM_STREAM_STAGES * STREAM_STAGE;
    group = (int64_t)sim_stream_warp() * gridDim.x + blockIdx.x;
    per_round = (int64_t)gridDim.x * SIM_STREAM_WARPS;
    n_groups = (j.k.n_rows + SIM_STREAM_KEYS - 1) / SIM_STREAM_KEYS;
    n_steps = (int)((j.k.n_cols + STREAM_COLS - 1) / STREAM_COLS);
    step = slot = 0;
    begin(j);
  }
  KS_DEVICE void begin(const sim_job &j) {
    const int64_t row = group * SIM_STREAM_KEYS + sim_stream_lane() / PRODUCT_UNITS;
    n_rows = (int)min((int64_t)SIM_STREAM_KEYS, j.k.n_rows - row);
    from = (const char *)j.k.p + (row * j.k.n_cols + sim_stream_lane() % PRODUCT_UNITS * PRODUCT_CHUNK) * 2;
  }
  KS_DEVICE void next(const sim_job &j) {
    enum { STEP = KS_WARP / PRODUCT_UNITS };
    const int unit = sim_stream_lane() % PRODUCT_UNITS, row = sim_stream_lane() / PRODUCT_UNITS;
    if (group < n_groups) {
      const bool is_col = step * STREAM_COLS + unit * PRODUCT_CHUNK < j.k.n_cols;
#pragma unroll
      for (int i = 0; i < SIM_STREAM_KEYS / STEP; i++) {
        const bool is_there = is_col && i * STEP < n_rows;
        ks_cp_async_16(stages + slot * STREAM_STAGE + product_unit(row + i * STEP, unit),
                       is_there ? from + i * STEP * 2 * j.k.n_cols : (const char *)j.k.p, is_there);
      }
      slot = slot + 1 == SIM_STREAM_STAGES ? 0 : slot + 1;
      from += STREAM_COLS * 2;
      if (++step == n_steps) {
        step = 0;
        group += per_round;
        begin(j);
      }
    }
    ks_cp_async_commit();
  }
};

/* ---------------------------------------------------------------- scores of 16 keys */

/* 64 columns of 16 keys and the queries. */
KS_DEVICE void sim_stream_product(const sim_stream_shared &sh, const uint4 *stage, int n_queries, int step,
                                  float sum[4], sim_squares *squares, bool wants_squares) {
  const int lane = sim_stream_lane(), n = min(lane % 8, n_queries - 1);
  uint32_t a[4][4], b[2][4];
#pragma unroll
  for (int half = 0; half < 2; half++)
    ks_ldmatrix_x4(b[half], sh.query(n, step * PRODUCT_UNITS + half * 4 + lane / 8));
#pragma unroll
  for (int k = 0; k < STREAM_COLS / 16; k++)
    ks_ldmatrix_x4(a[k], stage + product_unit(lane % 16, 2 * k + lane / 16));
#pragma unroll
  for (int k = 0; k < STREAM_COLS / 16; k++)
    ks_mma_bf16(sum, a[k], b[k / 2] + k % 2 * 2);
  if (wants_squares) squares->add(a);
}
/* Squares of the queries, by one warp: rows 8 to 15 are rows 0 to 7 again. */
KS_DEVICE void sim_stream_square_queries(const sim_stream_shared &sh, int n_queries, int step,
                                         sim_squares *squares) {
  const int lane = sim_stream_lane(), n = min(lane % 8, n_queries - 1);
  uint32_t a[4][4];
#pragma unroll
  for (int k = 0; k < STREAM_COLS / 16; k++)
    ks_ldmatrix_x4(a[k], sh.query(n, step * PRODUCT_UNITS + 2 * k + lane / 16));
  squares->add(a);
}

/* sum: keys lane / 4 (+ 8: [2], [3]), queries lane % 4 * 2 (+ 1). */
KS_DEVICE void sim_stream_scale(const sim_job &j, const sim_stream_shared &sh, sim_squares *squares,
                                int64_t k0, float sum[4]) {
  const int lane = sim_stream_lane(), n = lane % 4 * 2;
  squares->spread();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sim_factor f = {1.0f, 0};
    if (j.is_cosine)
      f = sim_norm_factor(j.k, k0 + lane / 4 + 8 * i, squares->hi[i], squares->lo[i], false, NULL);
#pragma unroll
    for (int e = 0; e < 2; e++)
      sum[2 * i + e] = sim_score(sum[2 * i + e], sh.fq[n + e], f);
  }
}

/* ---------------------------------------------------------------- the best */

/* Scores of queries n0 .. n0 + N - 1 into the warp's lists. */
template <int N>
KS_DEVICE void sim_stream_offer(const sim_job &j, const sim_stream_shared &sh, int64_t k0, int n0,
                                int n_queries, const float score[4]) {
  const int lane = sim_stream_lane(), key = lane % 16;
  sim_entry *lists = sh.lists + sim_stream_warp() * n_queries * KS_WARP;
  sim_entry x[N], best[N];
  unsigned mask[N];
  int most = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int n = min(n0 + i, n_queries - 1), from = key % 8 * 4 + n / 2;
    const float low = __shfl_sync(KS_FULL_MASK, n % 2 ? score[1] : score[0], from),
                high = __shfl_sync(KS_FULL_MASK, n % 2 ? score[3] : score[2], from);
    best[i] = lists[n * KS_WARP + lane];
    x[i] = sim_entry_of(key < 8 ? low : high, (uint32_t)(k0 + key));
    const sim_entry last = __shfl_sync(KS_FULL_MASK, best[i], j.best_k - 1);
    if (lane >= 16 || k0 + key >= j.k.n_rows || x[i] < last || n0 + i >= n_queries) x[i] = 0;
    mask[i] = __ballot_sync(KS_FULL_MASK, x[i] != 0);
    most = max(most, __popc(mask[i]));
  }
  if (most == 0) return;
  if (most > STREAM_FEW) {
    sim_sort<N>(x, lane);
    sim_join<N>(best, x, lane);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      for (unsigned left = mask[i]; left; left &= left - 1)
        best[i] = sim_push(best[i], __shfl_sync(KS_FULL_MASK, x[i], __ffs((int)left) - 1), lane);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (!mask[i]) continue;
    lists[(n0 + i) * KS_WARP + lane] = best[i];
    if (lane == j.best_k - 1)
      sh.worst[sim_stream_warp() * SIM_STREAM_QUERIES + n0 + i] = best[i] ? sim_entry_score(best[i]) : NAN;
  }
}

KS_DEVICE void sim_stream_take_top(const sim_job &j, const sim_stream_shared &sh, int64_t k0, int n_queries,
                                   const float score[4]) {
  const int lane = sim_stream_lane();
  bool passes = false;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int n = lane % 4 * 2 + e % 2;
    passes |= n < n_queries && !(score[e] < sh.worst[sim_stream_warp() * SIM_STREAM_QUERIES + n]);
  }
  if (!__any_sync(KS_FULL_MASK, passes)) return;
  if (n_queries == 1)
    sim_stream_offer<1>(j, sh, k0, 0, 1, score);
  else
    for (int n = 0; n < n_queries; n += 4)
      sim_stream_offer<4>(j, sh, k0, n, n_queries, score);
  __syncwarp();
}

/* The warps' lists into the block's, and those of all blocks by the last of them. */
KS_DEVICE void sim_stream_finish(const sim_job &j, const sim_stream_shared &sh, int n_queries) {
  const int lane = sim_stream_lane(), n = sim_stream_warp();
  __syncthreads();
  sim_entry best = 0;
  if (n < n_queries) {
    best = sh.lists[n * KS_WARP + lane];
    for (int w = 1; w < SIM_STREAM_WARPS; w++) {
      const sim_entry *list = sh.lists + (w * n_queries + n) * KS_WARP;
      const sim_entry x = list[KS_WARP - 1 - lane];
      if (list[0] != 0) sim_join<1>(&best, &x, lane);
    }
    if (lane < j.best_k) j.entries[((int64_t)n * gridDim.x + blockIdx.x) * j.best_k + lane] = best;
  }
  if (!ks_is_last_block(j.arrivals, gridDim.x) || n >= n_queries) return;
  best = sim_gather(j.entries + (int64_t)n * gridDim.x * j.best_k, gridDim.x, j.best_k,
                    sh.room + n * 2 * KS_WARP, lane);
  sim_put_best(j, n, best, lane);
}

/* ---------------------------------------------------------------- the kernel */

KS_DEVICE void sim_stream_load_queries(const sim_job &j, const sim_stream_shared &sh, int n_queries) {
  for (int i = (int)threadIdx.x; i < n_queries * sh.units; i += SIM_STREAM_WARPS * KS_WARP) {
    const int n = i / sh.units, unit = i % sh.units;
    const bool is_there = unit * PRODUCT_CHUNK < j.q.n_cols;
    const char *from = (const char *)j.q.p + (n * j.q.n_cols + unit * PRODUCT_CHUNK) * 2;
    ks_cp_async_16(sh.query(n, unit), is_there ? from : (const char *)j.q.p, is_there);
  }
  ks_cp_async_commit();
}

template <int MODE>
__global__ __launch_bounds__(SIM_STREAM_WARPS *KS_WARP, 2) void similarity_stream_kernel(SIM_STREAM_JOB j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const int n_queries = (int)j.q.n_rows, lane = sim_stream_lane(), warp = sim_stream_warp();
  const sim_stream_shared sh(MODE, n_queries, j.k.n_cols);
  sim_stream_load_queries(j, sh, n_queries);
  sim_stream_fetch fetch(j, sh.stages);
  const uint4 *stages = fetch.stages;
  const int n_steps = fetch.n_steps;
  int slot = 0;
  int64_t group = fetch.group;
  for (int s = 0; s < STREAM_AHEAD; s++)
    fetch.next(j);
  if (lane < SIM_STREAM_QUERIES) sh.worst[warp * SIM_STREAM_QUERIES + lane] = NAN;
  if constexpr (MODE == SIM_TOP)
    for (int i = lane; i < n_queries * KS_WARP; i += KS_WARP)
      sh.lists[warp * n_queries * KS_WARP + i] = 0;
  ks_cp_async_wait<STREAM_AHEAD>();
  __syncthreads();
  for (bool is_first = true; is_first || group < fetch.n_groups; is_first = false, group += fetch.per_round) {
    const bool has_keys = group < fetch.n_groups,
               has_queries = is_first && j.is_cosine && warp == SIM_STREAM_WARPS - 1;
    sim_squares squares, of_queries;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    squares.clear();
    of_queries.clear();
    for (int step = 0; step < n_steps; step++) {
      ks_cp_async_wait<STREAM_AHEAD - 1>();
      __syncwarp();
      fetch.next(j);
      if (has_keys)
        sim_stream_product(sh, stages + slot * STREAM_STAGE, n_queries, step, sum, &squares, j.is_cosine);
      if (has_queries) sim_stream_square_queries(sh, n_queries, step, &of_queries);
      slot = slot + 1 == SIM_STREAM_STAGES ? 0 : slot + 1;
    }
    if (is_first) {
      of_queries.spread();
      sim_factor f = {1.0f, 0};
      if (has_queries) /* other warps would take theirs for too small and count again */
        f = sim_norm_factor(j.q, min(lane / 4, n_queries - 1), of_queries.hi[0], of_queries.lo[0], false,
                            NULL);
      if (warp == SIM_STREAM_WARPS - 1 && lane % 4 == 0) sh.fq[lane / 4] = f;
      __syncthreads();
    }
    if (!has_keys) continue;
    const int64_t k0 = group * SIM_STREAM_KEYS;
    sim_stream_scale(j, sh, &squares, k0, sum);
    if constexpr (MODE == SIM_TOP) {
      sim_stream_take_top(j, sh, k0, n_queries, sum);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int n = lane % 4 * 2 + e % 2;
        const int64_t k = k0 + lane / 4 + e / 2 * 8;
        if (n < n_queries && k < j.k.n_rows) j.s[n * j.k.n_rows + k] = sum[e];
      }
    }
  }
  ks_cp_async_wait<0>();
  if constexpr (MODE == SIM_TOP) sim_stream_finish(j, sh, n_queries);
#endif
}
static_assert((int)SIM_STREAM_WARPS >= (int)SIM_STREAM_QUERIES, "a warp a query");

ks_status sim_launch_stream(ks_ctx *ctx, const char *op, const sim_job *j) {
  const dim3 grid((unsigned)j->n_parts), block(SIM_STREAM_WARPS * KS_WARP);
  const size_t bytes = sim_stream_smem_bytes(j->mode == SIM_TOP, j->q.n_rows, j->k.n_cols);
  return j->mode == SIM_TOP
             ? ks_launch(ctx, op, similarity_stream_kernel<SIM_TOP>, grid, block, bytes, *j)
             : ks_launch(ctx, op, similarity_stream_kernel<SIM_MATRIX>, grid, block, bytes, *j);
}
