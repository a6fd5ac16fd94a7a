/* The kernel of the similarity operations, for similarity_mma.cu and similarity_simt.cu; similarity.cu has
 * the story.
 *
 * A block has one tile of queries (SIM_NEAREST: all, one after another) and a part of the keys, tile by tile.
 * Keys are A and queries B of each product, whatever the shape of the tile, so that a score's bits depend on
 * its two rows alone. Best k: scores stay in registers, unless one of a tile passes; then the tile's
 * go through shared memory to warps that have a query each. */
#ifndef KS_CUDA_SIMILARITY_KERNEL_CUH
#define KS_CUDA_SIMILARITY_KERNEL_CUH

#include "kernels/cuda/similarity.cuh"

#ifdef KS_CUDA_ON_CPU
#define SIM_APART template <class P> static void
#else
#define SIM_APART template <class P> static __device__ __noinline__ void
#endif

/* A block's shared memory. Functions make it anew rather than hand it on: its pointers are constants. */
template <class P> struct sim_shared {
  enum { WARPS = P::THREADS / KS_WARP };
  uint4 *room; /* stages; then scores [BN, BM]; then lists that are merged */
  double *fk, *fq;
  float *gk, *gq, *nearest, *worst;
  int32_t *groups;
  sim_far *far;
  float *list_scores; /* [BN, best_k], when they are here */
  uint32_t *list_index;

  KS_DEVICE explicit sim_shared(const sim_job &j) {
    static_assert(P::BM == sim_bm(P::SHAPE) && P::BN == sim_bn(P::SHAPE) && P::STAGES == sim_stages(P::SHAPE),
                  "what launches are told");
    static_assert(P::BM * P::BN * 4 <= P::STAGES * (P::BM + P::BN) * PRODUCT_UNITS * 16,
                  "scores fit the stages");
    ks_smem smem;
    room = ks_smem_take<uint4>(&smem, product_units<P>());
    fk = ks_smem_take<double>(&smem, P::BM);
    fq = ks_smem_take<double>(&smem, P::BN);
    gk = ks_smem_take<float>(&smem, P::BM);
    gq = ks_smem_take<float>(&smem, P::BN);
    nearest = ks_smem_take<float>(&smem, P::BM);
    worst = ks_smem_take<float>(&smem, P::BN);
    groups = ks_smem_take<int32_t>(&smem, P::BM);
    far = ks_smem_take<sim_far>(&smem, KS_WARP);
    const size_t n_list = j.lists_in_smem ? (size_t)P::BN * (size_t)j.best_k : 0;
    list_scores = n_list ? ks_smem_take<float>(&smem, n_list) : NULL;
    list_index = n_list ? ks_smem_take<uint32_t>(&smem, n_list) : NULL;
  }
  /* Score of query n with key m. The turn lets both a product's fragments and whole rows meet every bank
   * once. */
  KS_DEVICE float *score(int n, int m) const { return (float *)room + n * P::BM + (m ^ ((n & 7) << 2)); }
};

template <class P> KS_DEVICE int sim_n_queries(const product_rows &q, int64_t q0) {
  return (int)(q.n_rows - q0 < P::BN ? q.n_rows - q0 : (int64_t)P::BN);
}
/* Read anew each time, so that what follows from it is not kept in registers while a product runs. */
KS_DEVICE unsigned sim_block() {
#ifdef __CUDA_ARCH__
  unsigned b;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(b));
  return b;
#else
  return blockIdx.x;
#endif
}
KS_DEVICE unsigned sim_part(const sim_job &j) {
  return sim_block() % (unsigned)j.n_parts;
}
KS_DEVICE unsigned sim_q_tile(const sim_job &j) {
  return sim_block() / (unsigned)j.n_parts;
}
KS_DEVICE int sim_warp() {
  return (int)threadIdx.x / KS_WARP;
}
KS_DEVICE int sim_lane() {
  return (int)threadIdx.x % KS_WARP;
}

/* Factors of the rows of one side, which the caller's barrier makes visible. prepared NULL: from norms; of no
 * cosine: the scale. Returns whether this thread saw one that only sim_score's exact way can take. */
template <class P, int ROWS>
KS_DEVICE bool sim_put_factors(const sim_job &j, const product_rows &r, int64_t row0, const double *prepared,
                               const float *scales, const sim_norms<P, ROWS> *norms, double *f, float *g) {
  bool is_rare = false;
  if (norms && j.is_cosine && !prepared) {
#pragma unroll
    for (int i = 0; i < sim_norms<P, ROWS>::N; i++) {
      const int row = norms->row(i);
      const double x = norms->factor(i, r, row < ROWS ? row0 + row : r.n_rows, scales);
      if (row >= ROWS) continue;
      is_rare |= sim_float_factor(x) == INFINITY;
      if ((int)threadIdx.x % SIM_SLOTS == 0) f[row] = x, g[row] = sim_float_factor(x);
    }
    return is_rare;
  }
  for (int row = (int)threadIdx.x; row < ROWS; row += P::THREADS) {
    const bool is_row = row0 + row < r.n_rows;
    const double x = !is_row    ? 0.0
                     : prepared ? prepared[row0 + row]
                     : scales   ? (double)scales[row0 + row]
                                : 1.0;
    f[row] = x, g[row] = sim_float_factor(x);
    is_rare |= g[row] == INFINITY;
  }
  return is_rare;
}

/* ---------------------------------------------------------------- what becomes of a tile's scores */

/* To the lists of the queries, 32 keys at a time. */
SIM_APART sim_take_top(const sim_job &j, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  const int64_t part = sim_part(j), q_tile = sim_q_tile(j);
  const int64_t n_seen = k0 - part * j.tiles_per_part * P::BM; /* keys of the part before this tile */
  const int lane = sim_lane();
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS) {
    const int64_t in_memory = ((q_tile * P::BN + n) * j.n_parts + part) * j.best_k;
    float *scores = j.lists_in_smem ? sh.list_scores + n * j.best_k : j.list_scores + in_memory;
    uint32_t *index = j.lists_in_smem ? sh.list_index + n * j.best_k : j.list_index + in_memory;
    int has = n_seen < j.best_k ? (int)n_seen : j.best_k;
    for (int base = 0; base < P::BM; base += KS_WARP)
      sim_offer(scores, index, &has, j.best_k, k0 + base + lane < j.k.n_rows, *sh.score(n, base + lane),
                (uint32_t)(n_seen + base + lane), lane);
    if (lane == 0 && has == j.best_k) sh.worst[n] = scores[j.best_k - 1];
  }
}

SIM_APART sim_take_mean(const sim_job &j, int64_t q0, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  const int lane = sim_lane();
  const int64_t n_stretches = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS) {
    const int32_t group = j.groups ? j.query_groups[q0 + n] : 0;
    for (int at = 0; at < P::BM && k0 + at < j.k.n_rows; at += SIM_STRETCH) {
      double sum = 0.0;
      int count = 0;
#pragma unroll
      for (int m = at; m < at + SIM_STRETCH; m += KS_WARP) {
        const bool counts = k0 + m + lane < j.k.n_rows && sh.groups[m + lane] == group;
        sum += counts ? (double)*sh.score(n, m + lane) : 0.0;
        count += __popc(__ballot_sync(KS_FULL_MASK, counts));
      }
      sum = ks_warp_sum(sum);
      const sim_partial p = {sum, count};
      if (lane == 0) j.partial[(q0 + n) * n_stretches + (k0 + at) / SIM_STRETCH] = p;
    }
  }
}

SIM_APART sim_take_matrix(const sim_job &j, int64_t q0, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS)
    for (int m = sim_lane(); m < P::BM && k0 + m < j.k.n_rows; m += KS_WARP)
      j.s[(q0 + n) * j.k.n_rows + k0 + m] = *sh.score(n, m);
}

/* A thread has a key. */
SIM_APART sim_take_nearest(const sim_job &j, int n_queries) {
  const sim_shared<P> sh(j);
  for (int m = (int)threadIdx.x; m < P::BM; m += P::THREADS) {
    float most = sh.nearest[m];
    for (int n = 0; n < n_queries; n++) {
      const float s = *sh.score(n, m), v = s != s ? INFINITY : s;
      most = v > most ? v : most;
    }
    sh.nearest[m] = most;
  }
}

/* Scores of one tile, from sums to where the mode wants them. is_rare, of the block: some factor has no
 * float. */
template <class P>
KS_DEVICE void sim_consume(const sim_job &j, P *c, bool is_rare, int64_t q0, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  bool any = is_rare || j.mode != SIM_TOP;
  if (!is_rare)
    c->each([&](int m, int n, float &v) {
      v = fmaf(v, sh.gq[n] * sh.gk[m], 0.0f);
      any |= !(v <= sh.worst[n]);
    });
  if (!__syncthreads_or(any)) return;
  c->each([&](int m, int n, float &v) { *sh.score(n, m) = v; });
  __syncthreads();
  if (is_rare) {
    for (int i = (int)threadIdx.x; i < P::BN * P::BM; i += P::THREADS) {
      const int n = i / P::BM, m = i % P::BM;
      *sh.score(n, m) = sim_score(*sh.score(n, m), sh.gq[n], sh.gk[m], sh.fq[n], sh.fk[m]);
    }
    __syncthreads();
  }
  if (j.mode == SIM_TOP)
    sim_take_top<P>(j, k0, n_queries);
  else if (j.mode == SIM_MEAN)
    sim_take_mean<P>(j, q0, k0, n_queries);
  else if (j.mode == SIM_MATRIX)
    sim_take_matrix<P>(j, q0, k0, n_queries);
  else
    sim_take_nearest<P>(j, n_queries);
  __syncthreads();
}

/* ---------------------------------------------------------------- beginning and end of a block */

/* The row of k that SIM_NEAREST compares with, when it is not the job's queries. */
template <class P> KS_DEVICE int64_t sim_take_pick(const sim_job &j) {
  const sim_shared<P> sh(j);
  int64_t pick = j.first;
  if (j.pick == SIM_PICK_FARTHEST) {
    sim_far best = {-1, 0.0};
    for (int64_t i = threadIdx.x; i < j.n_far; i += P::THREADS)
      sim_nearer(&best, j.far_in[i]);
    pick = sim_block_farthest(best, sh.far).index;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) j.picked[j.pick_number] = pick;
  return pick;
}

/* A tile's keys have met all queries. */
template <class P> KS_DEVICE void sim_end_nearest(const sim_job &j, int64_t k0, int64_t pick, sim_far *best) {
  const sim_shared<P> sh(j);
  for (int m = (int)threadIdx.x; m < P::BM && k0 + m < j.k.n_rows; m += P::THREADS) {
    const float old = j.is_fresh ? -INFINITY : j.nearest[k0 + m];
    float v = sh.nearest[m] > old ? sh.nearest[m] : old; /* stays NaN */
    if (k0 + m == pick) v = NAN;
    j.nearest[k0 + m] = v;
    const sim_far x = {v == v ? k0 + m : -1, (double)v};
    sim_nearer(best, x);
  }
}

/* Lists leave shared memory; the block that is the last of a tile of queries merges them, or adds the partial
 * means. */
SIM_APART sim_finish(const sim_job &j) {
  const sim_shared<P> sh(j);
  const int64_t part = sim_part(j), q_tile = sim_q_tile(j);
  const int n_queries = sim_n_queries<P>(j.q, q_tile * P::BN);
  if (j.lists_in_smem)
    for (int i = (int)threadIdx.x; i < n_queries * j.best_k; i += P::THREADS) {
      const int64_t to = ((q_tile * P::BN + i / j.best_k) * j.n_parts + part) * j.best_k + i % j.best_k;
      j.list_scores[to] = sh.list_scores[i];
      j.list_index[to] = sh.list_index[i];
    }
  if (!j.is_finished_here) return;
  if (!ks_is_last_block(j.arrivals + q_tile, (uint32_t)j.n_parts)) return;
  int64_t *index = (int64_t *)sh.room + (int64_t)sim_warp() * j.best_k;
  float *scores = (float *)((int64_t *)sh.room + (int64_t)sim_shared<P>::WARPS * j.best_k) +
                  (int64_t)sim_warp() * j.best_k;
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS)
    if (j.mode == SIM_MEAN)
      sim_mean(j, q_tile * P::BN + n, sim_lane());
    else
      sim_merge(j, q_tile * P::BN + n, P::BM, scores, index, sim_lane());
}

/* ---------------------------------------------------------------- the kernel */

/* One tile of keys against one of queries; factors of both to shared memory. Returns whether any has no
 * float, to all threads. NORMS: those that were not prepared are computed on the way. */
template <class P, bool Q_ANY, bool K_ANY, bool NORMS>
KS_DEVICE bool sim_tile(const sim_job &j, P *c, const product_rows &q, int64_t q0, const double *q_factors,
                        int64_t k0) {
  const sim_shared<P> sh(j);
  bool is_rare;
  if constexpr (NORMS) {
    sim_both_norms<P> norms(j.is_cosine && !j.k_factors, j.is_cosine && !q_factors);
    product_run<P, K_ANY, Q_ANY>(c, j.k, k0, q, q0, sh.room, &norms);
    norms.end();
    is_rare = sim_put_factors<P, P::BM>(j, j.k, k0, j.k_factors, j.k_scales, &norms.a, sh.fk, sh.gk);
    is_rare |= sim_put_factors<P, P::BN>(j, q, q0, q_factors, j.q_scales, &norms.b, sh.fq, sh.gq);
  } else {
    product_no_hook nothing;
    is_rare = sim_put_factors<P, P::BM>(j, j.k, k0, j.k_factors, j.k_scales, NULL, sh.fk, sh.gk);
    is_rare |= sim_put_factors<P, P::BN>(j, q, q0, q_factors, j.q_scales, NULL, sh.fq, sh.gq);
    product_run<P, K_ANY, Q_ANY>(c, j.k, k0, q, q0, sh.room, &nothing);
  }
  return __syncthreads_or(is_rare);
}

/* SIM_MATRIX, SIM_TOP, SIM_MEAN. */
template <class P, bool Q_ANY, bool K_ANY>
__global__ __launch_bounds__(P::THREADS,
                             K_ANY ? P::BLOCKS_ANY : P::BLOCKS) void similarity_kernel(SIM_JOB j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 || defined(KS_SIMILARITY_ON_ALL)
  for (int n = (int)threadIdx.x; n < P::BN; n += P::THREADS)
    sim_shared<P>(j).worst[n] = NAN; /* everything goes in */
  for (int64_t k0 = sim_part_begin(j, sim_part(j), P::BM); k0 < sim_part_begin(j, sim_part(j) + 1, P::BM);
       k0 += P::BM) {
    for (int m = (int)threadIdx.x; m < P::BM; m += P::THREADS)
      sim_shared<P>(j).groups[m] = j.groups && k0 + m < j.k.n_rows ? j.groups[k0 + m] : 0;
    P c;
    const int64_t q0 = (int64_t)sim_q_tile(j) * P::BN;
    const bool is_rare = sim_tile<P, Q_ANY, K_ANY, P::NORMS>(j, &c, j.q, q0, j.q_factors, k0);
    sim_consume(j, &c, is_rare, q0, k0, sim_n_queries<P>(j.q, q0));
    __syncthreads();
  }
  sim_finish<P>(j);
#endif
}

/* SIM_NEAREST: the largest similarity of each key to all queries, or to a picked key; then the farthest of
 * the part. */
template <class P, bool Q_ANY, bool K_ANY>
__global__ __launch_bounds__(P::THREADS,
                             K_ANY ? P::BLOCKS_ANY : P::BLOCKS) void similarity_nearest_kernel(SIM_JOB j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 || defined(KS_SIMILARITY_ON_ALL)
  product_rows q = j.q;
  const double *q_factors = j.q_factors;
  int64_t pick = -1;
  sim_far best = {-1, 0.0};
  if (j.pick != SIM_PICK_NONE) {
    pick = sim_take_pick<P>(j);
    q.p = (const char *)j.k.p + pick * j.k.n_cols * j.k_size;
    q_factors = j.k_factors ? j.k_factors + pick : NULL;
  }
  const int64_t k_end = sim_part_begin(j, blockIdx.x + 1, P::BM);
  for (int64_t k0 = sim_part_begin(j, blockIdx.x, P::BM); k0 < k_end; k0 += P::BM) {
    for (int m = (int)threadIdx.x; m < P::BM; m += P::THREADS)
      sim_shared<P>(j).nearest[m] = -INFINITY;
    for (int64_t q0 = 0; q0 < q.n_rows; q0 += P::BN) {
      P c;
      const bool is_rare = sim_tile<P, Q_ANY, K_ANY, false>(j, &c, q, q0, q_factors, k0);
      sim_consume(j, &c, is_rare, q0, k0, sim_n_queries<P>(q, q0));
    }
    sim_end_nearest<P>(j, k0, pick, &best);
    __syncthreads();
  }
  best = sim_block_farthest(best, sim_shared<P>(j).far);
  if (threadIdx.x == 0) j.far_out[blockIdx.x] = best;
#endif
}

/* ---------------------------------------------------------------- launch */

template <class P, bool Q_ANY, bool K_ANY>
static ks_status sim_launch_as(ks_ctx *ctx, const char *op, const sim_job *given) {
  sim_job j = *given;
  const sim_shape shape = (sim_shape)P::SHAPE;
  if constexpr (P::NORMS)
    if (j.mode == SIM_NEAREST)
      return ks_launch(ctx, op, similarity_nearest_kernel<P, Q_ANY, K_ANY>, dim3((unsigned)j.n_parts),
                       dim3(P::THREADS), sim_smem_bytes(shape, 0), j);
  const int64_t n_list = j.mode == SIM_TOP ? (int64_t)P::BN * j.best_k : 0;
  j.lists_in_smem =
      n_list > 0 && sim_smem_bytes(shape, n_list) <= (size_t)ks_cuda_device_of(ctx)->smem_per_block;
  return ks_launch(ctx, op, similarity_kernel<P, Q_ANY, K_ANY>,
                   dim3(ks_blocks_for(j.n_parts * j.n_q_tiles, 1)), dim3(P::THREADS),
                   sim_smem_bytes(shape, j.lists_in_smem ? n_list : 0), j);
}

#endif
