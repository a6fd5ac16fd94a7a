/* Similarities of many bf16 rows on tensor cores: 256 keys x 128 queries a block; similarity.cu has the story.
 *
 * A block has one tile of queries and a part of the keys. The stages of its products follow one another without a
 * gap: while the scores of one tile of keys are looked at, the first stages of the next are under way. Factors are
 * prepared (sim_prepare_kernel), and nothing but scores leaves the registers:
 *
 *   matrix  straight to where they belong, 8 keys in a row (a sector) an instruction and query
 *   mean    a warp has 64 keys of each of its queries, a stretch
 *   best    a score that is not below its query's k-th best becomes an entry of the query's buffer (32 entries,
 *           shared memory, places by an integer counter). A buffer of 16 or more is sorted and joined with the
 *           query's list by a warp, two queries at a time. What finds no place tries again after that. Of the
 *           first tile each query takes as floor the least of 32 maxima of 8 scores: about 90 of 256 scores pass
 *           then, later about 32 ln(n / 256) of a part of n keys
 *
 * Bytes and flops of a tile and 64 columns: 48 KiB by cp.async from L2, 4.2 MFLOP. sm_90: 1 block an SM, 8 warps of 64 x
 * 64: for 16 columns a warp has 8 ldmatrix (4 KiB) and 32 mma: shared memory is read in 256 of the 512 cycles that the
 * mma take at 1024 fma a cycle. A stage and warp: 395 instructions. The scores of a tile: some 700 a warp when none
 * passes, 2 to 8 % of a tile's time for d = 3200 to 384.
 * Predicted (H200, best k, computed in similarity.cu, not measured yet): 2048 x 8192 x 2048 180 us (86 by the product
 * alone at 796 TFLOP/s), 1024 x 100 k x 768 390 us (196): 50 %, where the goal is 75 %; the ladder is there, too. */
#include "kernels/cuda/similarity_many.cuh"

struct sim_tile : product_mma<4, 2, 4, 8, SIM_TILE_STAGES> {
  enum {
    WARPS_N = 2,
    WARPS_M = 4,
    WARPS = 8,
    M_TILES = 4, /* of 16 keys */
    N_TILES = 8, /* of 8 queries */
    STAGE = (BM + BN) * PRODUCT_UNITS,
    N_SUMS = M_TILES * N_TILES * 4
  };
  static KS_DEVICE int lane() { return (int)threadIdx.x % KS_WARP; }
  static KS_DEVICE int warp() { return (int)threadIdx.x / KS_WARP; }
  /* Key 16 i + 8 half of a thread, query 8 j + odd. */
  static KS_DEVICE int first_m() { return warp() / WARPS_N * 64 + lane() / 4; }
  static KS_DEVICE int first_n() { return warp() % WARPS_N * 64 + lane() % 4 * 2; }
  /* Columns [16 k, 16 k + 16) of a stage. */
  KS_DEVICE void sixteen(const uint4 *a, const uint4 *b, int k) {
    const int a_row = warp() / WARPS_N * 64 + lane() % 16,
              b_row = warp() % WARPS_N * 64 + lane() / 16 * 8 + lane() % 8;
    uint32_t fa[M_TILES][4], fb[N_TILES / 2][4];
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
      ks_ldmatrix_x4(fa[i], a + product_unit(a_row + 16 * i, 2 * k + lane() / 16));
#pragma unroll
    for (int i = 0; i < N_TILES / 2; i++)
      ks_ldmatrix_x4(fb[i], b + product_unit(b_row + 16 * i, 2 * k + lane() / 8 % 2));
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
      for (int jj = 0; jj < N_TILES; jj++)
        ks_mma_bf16(acc[i][jj], fa[i], fb[jj / 2] + jj % 2 * 2);
  }
};
static_assert((int)sim_tile::BM == (int)SIM_TILE_KEYS && (int)sim_tile::BN == (int)SIM_TILE_QUERIES,
              "what launches are told");
enum { SIM_TILE_PER_WARP = sim_tile::BN / sim_tile::WARPS };
static_assert(SIM_STRETCH == 64, "a warp's keys are one stretch");

struct sim_tile_shared {
  uint4 *stages;
  float *gk, *gq;
  int32_t *groups, *rare; /* rare[0]: some query's factor is no float; [1]: a key's, in tile - 1 */
  sim_best best;          /* of SIM_TOP */

  KS_DEVICE explicit sim_tile_shared(int mode) {
    ks_smem smem;
    stages = ks_smem_take<uint4>(&smem, (size_t)sim_tile::STAGES * sim_tile::STAGE);
    gk = ks_smem_take<float>(&smem, sim_tile::BM);
    gq = ks_smem_take<float>(&smem, sim_tile::BN);
    groups = ks_smem_take<int32_t>(&smem, sim_tile::BM);
    rare = ks_smem_take<int32_t>(&smem, 2);
    if (mode == SIM_TOP) best.take(&smem, sim_tile::BN);
  }
};

/* Where the next stage comes from. A thread has a unit (8 columns) of every 32nd row; the rows of a stage come in four
 * pieces, one behind the products of each 16 columns, so that the tensor cores do not wait for addresses. */
struct sim_tile_fetch {
  enum { STEP = sim_tile::THREADS / PRODUCT_UNITS, PIECES = 4 };
  const char *key, *query; /* of the thread's first row */
  int n_keys, n_queries;   /* from that row on */
  int tile, end, step, n_steps, stage;

  static KS_DEVICE int row() { return (int)threadIdx.x / PRODUCT_UNITS; }
  static KS_DEVICE int unit() { return (int)threadIdx.x % PRODUCT_UNITS; }
  static KS_DEVICE const char *at(const product_rows &r, int64_t row0) {
    return (const char *)r.p +
           ((row0 + row()) * r.n_cols + unit() * PRODUCT_CHUNK) * (int64_t)sizeof(ks_bf16);
  }
  static KS_DEVICE int left(const product_rows &r, int64_t row0, int n) {
    return (int)min((int64_t)n, r.n_rows - row0) - row();
  }

  KS_DEVICE void begin(const sim_job &j, int64_t q0, int first, int last) {
    tile = first, end = last, step = stage = 0;
    n_steps = (int)((j.k.n_cols + sim_tile::COLS - 1) / sim_tile::COLS);
    n_queries = left(j.q, q0, sim_tile::BN);
    query = at(j.q, q0);
    begin_tile(j);
  }
  KS_DEVICE void begin_tile(const sim_job &j) {
    n_keys = left(j.k, (int64_t)tile * sim_tile::BM, sim_tile::BM);
    key = at(j.k, (int64_t)tile * sim_tile::BM);
  }
  template <int ROWS>
  KS_DEVICE void copy(const product_rows &r, const char *from, uint4 *to, int n, int p) const {
    const int64_t stride = r.n_cols * STEP * (int64_t)sizeof(ks_bf16);
    const bool is_col = step * sim_tile::COLS + unit() * PRODUCT_CHUNK < r.n_cols;
#pragma unroll
    for (int i = 0; i < ROWS / STEP / PIECES; i++) {
      const int at = p * (ROWS / STEP / PIECES) + i;
      const bool is_there = is_col && at * STEP < n;
      ks_cp_async_16(to + at * STEP * PRODUCT_UNITS, is_there ? from + at * stride : (const char *)r.p,
                     is_there);
    }
  }
  KS_DEVICE void piece(const sim_job &j, uint4 *stages, int p) const {
    if (tile >= end) return;
    uint4 *to = stages + stage * sim_tile::STAGE + product_unit(row(), unit());
    copy<sim_tile::BM>(j.k, key, to, n_keys, p);
    copy<sim_tile::BN>(j.q, query, to + sim_tile::BM * PRODUCT_UNITS, n_queries, p);
  }
  /* To the stage after this one. */
  KS_DEVICE void next(const sim_job &j) {
    ks_cp_async_commit();
    stage = stage + 1 == sim_tile::STAGES ? 0 : stage + 1;
    key += sim_tile::COLS * sizeof(ks_bf16);
    query += sim_tile::COLS * sizeof(ks_bf16);
    if (++step < n_steps) return;
    step = 0;
    query -= n_steps * (int64_t)(sim_tile::COLS * sizeof(ks_bf16));
    tile++;
    begin_tile(j);
  }
};

/* ---------------------------------------------------------------- scores */

/* Where sum `at` of a thread lies: at = (16-key tile * N_TILES + 8-query tile) * 4 + place in the product. */
struct sim_tile_sums {
  enum { N_SUMS = sim_tile::N_SUMS };
  sim_tile &c;
  static KS_DEVICE int key(int at) {
    return sim_tile::first_m() + at / (4 * sim_tile::N_TILES) * 16 + at % 4 / 2 * 8;
  }
  static KS_DEVICE int query(int at) { return sim_tile::first_n() + at / 4 % sim_tile::N_TILES * 8 + at % 2; }
  template <class F> KS_DEVICE void each(F f) const {
#pragma unroll
    for (int at = 0; at < N_SUMS; at++)
      f(at, c.acc[at / (4 * sim_tile::N_TILES)][at / 4 % sim_tile::N_TILES][at % 4]);
  }
};

/* Sums become scores. */
KS_DEVICE void sim_tile_scale(const sim_job &j, const sim_tile_shared &sh, sim_tile *c, int64_t q0,
                              int64_t k0) {
  float gk[sim_tile::M_TILES][2];
#pragma unroll
  for (int i = 0; i < sim_tile::M_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      gk[i][h] = sh.gk[c->first_m() + 16 * i + 8 * h];
  if (sh.rare[0] || sh.rare[1] == (int32_t)(k0 / sim_tile::BM) + 1) {
    sim_scale_exactly(j, sim_tile_sums{*c}, q0, k0);
    return;
  }
#pragma unroll
  for (int jj = 0; jj < sim_tile::N_TILES; jj++) {
    const float2 gq = *(const float2 *)(const void *)(sh.gq + c->first_n() + 8 * jj);
#pragma unroll
    for (int i = 0; i < sim_tile::M_TILES; i++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        c->acc[i][jj][e] = fmaf(c->acc[i][jj][e], (e % 2 ? gq.y : gq.x) * gk[i][e / 2], 0.0f);
  }
}

KS_DEVICE void sim_tile_take_matrix(const sim_job &j, sim_tile *c, int64_t q0, int64_t k0) {
  c->each([&](int m, int n, float &v) {
    if (q0 + n < j.q.n_rows && k0 + m < j.k.n_rows) j.s[(q0 + n) * j.k.n_rows + k0 + m] = v;
  });
}

/* One query after another, from local memory. */
KS_DEVICE void sim_tile_take_mean(const sim_job &j, const sim_tile_shared &sh, sim_tile *c, int64_t q0,
                                  int64_t k0) {
  const int64_t n_stretches = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
  float x[sim_tile::N_SUMS];
  sim_tile_sums{*c}.each([&](int at, float &v) { x[at] = v; });
#pragma unroll 1
  for (int column = 0; column < 2 * sim_tile::N_TILES; column++) {
    const int first = column / 2 * 4 + column % 2, n = sim_tile_sums::query(first);
    const sim_own own(j, q0 + n);
    float v[2 * sim_tile::M_TILES];
    int count = 0;
#pragma unroll
    for (int i = 0; i < 2 * sim_tile::M_TILES; i++) {
      const int m = c->first_m() + 8 * i;
      const bool counts = own.takes(j, k0 + m, sh.groups[m]);
      v[i] = counts ? x[first + 4 * sim_tile::N_TILES * (i / 2) + 2 * (i % 2)] : 0.0f;
      count += counts;
    }
#pragma unroll
    for (int d = 16; d >= 4; d /= 2)
      count += __shfl_xor_sync(KS_FULL_MASK, count, d);
    const sim_partial p = sim_sum<2 * sim_tile::M_TILES, 4, KS_WARP>(v, count);
    const int64_t stretch = k0 / SIM_STRETCH + c->warp() / sim_tile::WARPS_N;
    if (c->lane() < 4 && q0 + n < j.q.n_rows && stretch < n_stretches)
      j.partial[(q0 + n) * n_stretches + stretch] = p;
  }
}

/* ---------------------------------------------------------------- the best */

/* Of a whole first tile: each query's least of 32 maxima of 8 scores. At least 32 are not below it. */
KS_DEVICE void sim_tile_first_floor(const sim_tile_shared &sh, sim_tile *c) {
  float *least = (float *)sh.best.buffers; /* [WARPS_M, BN] */
#pragma unroll
  for (int jj = 0; jj < sim_tile::N_TILES; jj++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < sim_tile::M_TILES; i++)
        most = fmaxf(most, fmaxf(c->acc[i][jj][odd], c->acc[i][jj][2 + odd]));
#pragma unroll
      for (int d = 16; d >= 4; d /= 2)
        most = fminf(most, __shfl_xor_sync(KS_FULL_MASK, most, d));
      if (c->lane() < 4)
        least[c->warp() / sim_tile::WARPS_N * sim_tile::BN + c->first_n() + 8 * jj + odd] = most;
    }
  __syncthreads();
  for (int n = (int)threadIdx.x; n < sim_tile::BN; n += sim_tile::THREADS) {
    float most = least[n];
#pragma unroll
    for (int w = 1; w < sim_tile::WARPS_M; w++)
      most = fminf(most, least[w * sim_tile::BN + n]);
    if (sh.best.worst[n] != INFINITY) sh.best.worst[n] = most;
  }
  __syncthreads();
}

KS_DEVICE void sim_tile_take_top(const sim_job &j, const sim_tile_shared &sh, sim_tile *c, int64_t k0,
                                 bool is_first) {
  float x[sim_tile::N_SUMS];
  sim_passing<sim_tile_sums> p;
  if (is_first && k0 + sim_tile::BM <= j.k.n_rows) sim_tile_first_floor(sh, c);
#pragma unroll
  for (int jj = 0; jj < sim_tile::N_TILES; jj++) {
    const float2 worst = *(const float2 *)(const void *)(sh.best.worst + c->first_n() + 8 * jj);
#pragma unroll
    for (int i = 0; i < sim_tile::M_TILES; i++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        p.test(x, (i * sim_tile::N_TILES + jj) * 4 + e, c->acc[i][jj][e], e % 2 ? worst.y : worst.x);
  }
  p.count();
  while (__syncthreads_or(p.any != 0)) {
    p.offer(j, sh.best, x, k0);
    __syncthreads();
    sim_best_join(sh.best, j.best_k, sim_tile::warp() * SIM_TILE_PER_WARP, SIM_TILE_PER_WARP,
                  sim_tile::lane());
  }
}

/* ---------------------------------------------------------------- the kernel */

template <int MODE> KS_DEVICE void sim_tile_begin(const sim_job &j, const sim_tile_shared &sh, int64_t q0) {
  if (threadIdx.x == 0) sh.rare[0] = sh.rare[1] = 0;
  __syncthreads();
  for (int n = (int)threadIdx.x; n < sim_tile::BN; n += sim_tile::THREADS) {
    const float g = sim_plain_factor(j.q_factors, j.q_scales, q0 + n, j.q.n_rows);
    sh.gq[n] = g;
    if (g == INFINITY) sh.rare[0] = 1;
    if (MODE == SIM_TOP) sh.best.clear(n, q0 + n < j.q.n_rows);
  }
  if (MODE == SIM_TOP)
    for (int i = (int)threadIdx.x; i < sim_tile::BN * KS_WARP; i += sim_tile::THREADS)
      sh.best.lists[i] = 0;
}

/* What a thread knows of its key of a tile: read with the first stage, written with the second, when nobody looks
 * at the last tile's any more. */
struct sim_tile_key {
  float g;
  int32_t group;

  KS_DEVICE void read(const sim_job &j, int64_t k) {
    g = sim_plain_factor(j.k_factors, j.k_scales, k, j.k.n_rows);
    group = j.groups && k < j.k.n_rows ? j.groups[k] : 0;
  }
  KS_DEVICE void write(const sim_tile_shared &sh, int64_t k0) const {
    sh.gk[threadIdx.x] = g;
    sh.groups[threadIdx.x] = group;
    if (g == INFINITY) sh.rare[1] = (int32_t)(k0 / sim_tile::BM) + 1;
  }
};
static_assert(sim_tile::THREADS == sim_tile::BM, "a thread has a key");

template <int MODE>
__global__ __launch_bounds__(sim_tile::THREADS, 1) void similarity_tile_kernel(SIM_JOB j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  typedef sim_tile P;
  const sim_tile_shared sh(MODE);
  const unsigned part = blockIdx.x % (unsigned)j.n_parts;
  const int64_t q0 = (int64_t)(blockIdx.x / (unsigned)j.n_parts) * P::BN;
  const int n_tiles = (int)((j.k.n_rows + P::BM - 1) / P::BM), begin = (int)(part * j.tiles_per_part),
            end = begin + (int)j.tiles_per_part < n_tiles ? begin + (int)j.tiles_per_part : n_tiles;
  sim_tile_fetch fetch;
  int stage = 0;
  fetch.begin(j, q0, begin, end);
  const int n_steps = fetch.n_steps;
  for (int s = 0; s < P::STAGES - 1; s++) {
    for (int p = 0; p < sim_tile_fetch::PIECES; p++)
      fetch.piece(j, sh.stages, p);
    fetch.next(j);
  }
  sim_tile_begin<MODE>(j, sh, q0);
  for (int tile = begin; tile < end; tile++) {
    const int64_t k0 = (int64_t)tile * P::BM;
    P c;
    sim_tile_key key;
    c.clear();
    for (int step = 0; step < n_steps; step++) {
      ks_cp_async_wait<P::STAGES - 2>();
      __syncthreads();
      if (step == 0) key.read(j, k0 + (int)threadIdx.x);
      if (step == (n_steps > 1)) key.write(sh, k0);
      const uint4 *a = sh.stages + stage * P::STAGE, *b = a + P::BM * PRODUCT_UNITS;
#pragma unroll
      for (int k = 0; k < P::COLS / 16; k++) {
        c.sixteen(a, b, k);
        fetch.piece(j, sh.stages, k);
      }
      fetch.next(j);
      stage = stage + 1 == P::STAGES ? 0 : stage + 1;
    }
    if (n_steps < 3) __syncthreads();
    sim_tile_scale(j, sh, &c, q0, k0);
    if constexpr (MODE == SIM_TOP)
      sim_tile_take_top(j, sh, &c, k0, tile == begin);
    else if constexpr (MODE == SIM_MEAN)
      sim_tile_take_mean(j, sh, &c, q0, k0);
    else
      sim_tile_take_matrix(j, &c, q0, k0);
  }
  if constexpr (MODE == SIM_TOP) {
    __syncthreads();
    for (int n = P::warp() * 2; n < P::BN && q0 + n < j.q.n_rows; n += 2 * P::WARPS)
      sim_best_publish(j, sh.best, q0, n, part, P::lane());
  }
#endif
}

template <int MODE> static ks_status sim_launch_tile_as(ks_ctx *ctx, const char *op, const sim_job *j) {
  return ks_launch(ctx, op, similarity_tile_kernel<MODE>, dim3(ks_blocks_for(j->n_parts * j->n_q_tiles, 1)),
                   dim3(sim_tile::THREADS), sim_tile_smem_bytes(MODE == SIM_TOP), *j);
}
ks_status sim_launch_tile(ks_ctx *ctx, const char *op, const sim_job *j) {
  return j->mode == SIM_TOP    ? sim_launch_tile_as<SIM_TOP>(ctx, op, j)
         : j->mode == SIM_MEAN ? sim_launch_tile_as<SIM_MEAN>(ctx, op, j)
                               : sim_launch_tile_as<SIM_MATRIX>(ctx, op, j);
}
