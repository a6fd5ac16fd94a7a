/* The kernel of the similarity operations, for similarity_mma.cu and similarity_simt.cu; similarity.cu has
 * the story.
 *
 * A block has one tile of queries (SIM_NEAREST: all, one after another) and a part of the keys, tile by tile.
 * Keys are A and queries B of each product, whatever the shape of the tile, so that a score's bits depend on
 * its two rows alone. Best k: scores stay in registers, unless one of a tile passes; then the tile's
 * go through shared memory to warps that have queries of their own. */
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
  sim_factor *fk, *fq;
  float *nearest, *worst;
  int32_t *groups;
  sim_far *far;
  sim_entry *lists; /* [BN, best_k], when they are here */

  KS_DEVICE explicit sim_shared(const sim_job &j) {
    static_assert(P::BM == sim_bm(P::SHAPE) && P::BN == sim_bn(P::SHAPE) && P::STAGES == sim_stages(P::SHAPE),
                  "what launches are told");
    static_assert(P::BM * P::BN * 4 <= P::STAGES * (P::BM + P::BN) * PRODUCT_UNITS * 16,
                  "scores fit the stages");
    ks_smem smem;
    room = ks_smem_take<uint4>(&smem, product_units<P>());
    fk = ks_smem_take<sim_factor>(&smem, P::BM);
    fq = ks_smem_take<sim_factor>(&smem, P::BN);
    nearest = ks_smem_take<float>(&smem, P::BM);
    worst = ks_smem_take<float>(&smem, P::BN);
    groups = ks_smem_take<int32_t>(&smem, P::BM);
    far = ks_smem_take<sim_far>(&smem, KS_WARP);
    const size_t n_list = j.lists_in_smem ? (size_t)P::BN * (size_t)j.best_k : 0;
    lists = n_list ? ks_smem_take<sim_entry>(&smem, n_list) : NULL;
  }
  /* The list of query n of tile q_tile, in this part. */
  KS_DEVICE sim_entry *list(const sim_job &j, int64_t q_tile, int64_t part, int n) const {
    return j.lists_in_smem ? lists + n * j.best_k
                           : j.entries + ((q_tile * P::BN + n) * j.n_parts + part) * j.best_k;
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
 * cosine: the scale. Returns whether this thread saw one with an exponent. */
template <class P, int ROWS>
KS_DEVICE bool sim_put_factors(const sim_job &j, const product_rows &r, int64_t row0,
                               const sim_factor *prepared, const float *scales,
                               const sim_norms<P, ROWS> *norms, sim_factor *f) {
  bool is_rare = false;
  if (norms && j.is_cosine && !prepared) {
#pragma unroll
    for (int i = 0; i < sim_norms<P, ROWS>::N; i++) {
      const int row = norms->row(i);
      const sim_factor x = norms->factor(i, r, row < ROWS ? row0 + row : r.n_rows, scales);
      is_rare |= x.e != 0;
      if (row < ROWS && (int)threadIdx.x % SIM_SLOTS == 0) f[row] = x;
    }
    return is_rare;
  }
  for (int row = (int)threadIdx.x; row < ROWS; row += P::THREADS) {
    f[row] = sim_known_factor(prepared, scales, row0 + row, r.n_rows);
    is_rare |= f[row].e != 0;
  }
  return is_rare;
}

/* ---------------------------------------------------------------- what becomes of a tile's scores */

/* Keys of the part before the one that begins at k0, or as many as a list holds. */
template <class P> KS_DEVICE int sim_n_listed(const sim_job &j, int64_t k0) {
  const int64_t n_seen = k0 - sim_part(j) * j.tiles_per_part * P::BM;
  return n_seen < j.best_k ? (int)n_seen : j.best_k;
}
KS_DEVICE sim_entry sim_candidate(const sim_job &j, float score, int64_t key) {
  return key < j.k.n_rows ? sim_entry_of(score, (uint32_t)key) : 0;
}

/* To short lists: a warp several queries at once, a lane four keys of each. */
SIM_APART sim_take_short(const sim_job &j, int64_t k0, int n_queries) {
  enum { WARPS = sim_shared<P>::WARPS, N = P::BN < 2 * WARPS ? 1 : 2 };
  static_assert(P::BM <= SIM_NEXT * KS_WARP && P::BN % WARPS == 0, "keys of a lane, queries of a warp");
  const sim_shared<P> sh(j);
  const int64_t part = sim_part(j), q_tile = sim_q_tile(j);
  const int lane = sim_lane(), has = sim_n_listed<P>(j, k0), m = SIM_NEXT * lane;
  for (int n0 = sim_warp(); n0 < n_queries; n0 += N * WARPS) {
    sim_cursor found[N];
    sim_entry best[N], x[N], *list[N];
    bool any = false;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int n = n0 + i * WARPS < n_queries ? n0 + i * WARPS : n0; /* a list of this warp in any case */
      list[i] = sh.list(j, q_tile, part, n);
      const sim_entry last = has == j.best_k ? list[i][has - 1] : 0;
      const float4 s = m < P::BM ? *(const float4 *)(const void *)sh.score(n, m) : make_float4(0, 0, 0, 0);
      const float score[SIM_NEXT] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int e = 0; e < SIM_NEXT; e++) {
        const sim_entry c = m < P::BM ? sim_candidate(j, score[e], k0 + m + e) : 0;
        found[i].next[e] = c > last ? c : 0;
      }
      found[i].sort();
      any |= found[i].next[0] != 0;
    }
    if (!__any_sync(KS_FULL_MASK, any)) continue;
    sim_pick_best<N>(x, found, j.best_k, lane);
#pragma unroll
    for (int i = 0; i < N; i++)
      best[i] = lane < has ? list[i][lane] : 0;
    sim_join_falling<N>(best, x, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (n0 + i * WARPS >= n_queries || lane >= j.best_k) continue;
      list[i][lane] = best[i];
      if (lane == j.best_k - 1 && best[i] != 0) sh.worst[n0 + i * WARPS] = sim_entry_score(best[i]);
    }
  }
}

/* To long lists, 32 keys at a time. */
SIM_APART sim_take_long(const sim_job &j, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  const int lane = sim_lane();
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS) {
    sim_entry *list = sh.list(j, sim_q_tile(j), sim_part(j), n);
    int has = sim_n_listed<P>(j, k0);
    for (int base = 0; base < P::BM; base += KS_WARP)
      sim_offer(list, &has, j.best_k, sim_candidate(j, *sh.score(n, base + lane), k0 + base + lane), lane);
    if (lane == 0 && has == j.best_k) sh.worst[n] = sim_entry_score(list[has - 1]);
  }
}

SIM_APART sim_take_mean(const sim_job &j, int64_t q0, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  const int lane = sim_lane();
  const int64_t n_stretches = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
  for (int n = sim_warp(); n < n_queries; n += sim_shared<P>::WARPS) {
    const sim_own own(j, q0 + n);
    for (int at = 0; at < P::BM && k0 + at < j.k.n_rows; at += SIM_STRETCH) {
      float v[SIM_STRETCH / KS_WARP];
      int count = 0;
#pragma unroll
      for (int i = 0; i < SIM_STRETCH / KS_WARP; i++) {
        const int m = at + i * KS_WARP + lane;
        const bool counts = own.takes(j, k0 + m, sh.groups[m]);
        v[i] = counts ? *sh.score(n, m) : 0.0f;
        count += __popc(__ballot_sync(KS_FULL_MASK, counts));
      }
      const sim_partial p = sim_sum<SIM_STRETCH / KS_WARP, 1, KS_WARP>(v, count);
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

/* Scores of one tile, from sums to where the mode wants them. is_rare, of the block: some factor has an
 * exponent. */
template <class P, bool NEAREST>
KS_DEVICE void sim_consume(const sim_job &j, P *c, bool is_rare, int64_t q0, int64_t k0, int n_queries) {
  const sim_shared<P> sh(j);
  bool any = is_rare || j.mode != SIM_TOP;
  if (!is_rare)
    c->each([&](int m, int n, float &v) {
      v = fmaf(v, sh.fq[n].m * sh.fk[m].m, 0.0f);
      any |= !(v <= sh.worst[n]);
    });
  if (!__syncthreads_or(any)) return;
  c->each([&](int m, int n, float &v) { *sh.score(n, m) = v; });
  __syncthreads();
  if (is_rare) {
    for (int i = (int)threadIdx.x; i < P::BN * P::BM; i += P::THREADS) {
      const int n = i / P::BM, m = i % P::BM;
      *sh.score(n, m) = sim_score(*sh.score(n, m), sh.fq[n], sh.fk[m]);
    }
    __syncthreads();
  }
  if constexpr (NEAREST)
    sim_take_nearest<P>(j, n_queries);
  else if (j.mode == SIM_MATRIX)
    sim_take_matrix<P>(j, q0, k0, n_queries);
  else if (j.mode == SIM_MEAN)
    sim_take_mean<P>(j, q0, k0, n_queries);
  else if (j.best_k <= SIM_SHORT)
    sim_take_short<P>(j, k0, n_queries);
  else
    sim_take_long<P>(j, k0, n_queries);
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

/* Lists leave shared memory, and end in zeros. */
template <class P> KS_DEVICE void sim_leave_lists(const sim_job &j) {
  const sim_shared<P> sh(j);
  const int64_t part = sim_part(j), q_tile = sim_q_tile(j);
  const int n_queries = sim_n_queries<P>(j.q, q_tile * P::BN),
            has = sim_n_listed<P>(j, sim_part_begin(j, part + 1, P::BM));
  for (int i = (int)threadIdx.x; i < n_queries * j.best_k; i += P::THREADS) {
    const int place = i % j.best_k;
    sim_entry *to = j.entries + ((q_tile * P::BN + i / j.best_k) * j.n_parts + part) * j.best_k + place;
    if (j.lists_in_smem || place >= has) *to = place < has ? sh.lists[i] : 0;
  }
}

/* Of a tile of queries, by the last of its blocks: lists become one, or partial means are added. */
SIM_APART sim_finish(const sim_job &j) {
  enum { WARPS = sim_shared<P>::WARPS };
  const int64_t q0 = (int64_t)sim_q_tile(j) * P::BN;
  const int n_queries = sim_n_queries<P>(j.q, q0), warp = sim_warp(), lane = sim_lane();
  void *room = sim_shared<P>(j).room;
  if (j.mode == SIM_TOP && j.best_k <= SIM_SHORT)
    sim_gather_tile < WARPS, P::BN<4 * WARPS ? P::BN / WARPS : 4>(
                                 j, q0, n_queries, (int32_t *)room + warp * 2 * KS_WARP, warp, lane);
  else
    for (int n = warp; n < n_queries; n += WARPS)
      if (j.mode == SIM_TOP)
        sim_merge(j, q0 + n, (sim_entry *)room + (int64_t)warp * j.best_k, lane);
      else
        sim_mean(j, q0 + n, lane);
}

/* ---------------------------------------------------------------- the kernel */

/* One tile of keys against one of queries; factors of both to shared memory. Returns whether any has an
 * exponent, to all threads. NORMS: those that were not prepared are computed on the way. */
template <class P, bool Q_ANY, bool K_ANY, bool NORMS>
KS_DEVICE bool sim_tile(const sim_job &j, P *c, const product_rows &q, int64_t q0,
                        const sim_factor *q_factors, int64_t k0) {
  const sim_shared<P> sh(j);
  bool is_rare;
  if constexpr (NORMS) {
    sim_both_norms<P> norms(j.is_cosine && !j.k_factors, j.is_cosine && !q_factors);
    product_run<P, K_ANY, Q_ANY>(c, j.k, k0, q, q0, sh.room, &norms);
    norms.end();
    is_rare = sim_put_factors<P, P::BM>(j, j.k, k0, j.k_factors, j.k_scales, &norms.a, sh.fk);
    is_rare |= sim_put_factors<P, P::BN>(j, q, q0, q_factors, j.q_scales, &norms.b, sh.fq);
  } else {
    product_no_hook nothing;
    is_rare = sim_put_factors<P, P::BM>(j, j.k, k0, j.k_factors, j.k_scales, NULL, sh.fk);
    is_rare |= sim_put_factors<P, P::BN>(j, q, q0, q_factors, j.q_scales, NULL, sh.fq);
    product_run<P, K_ANY, Q_ANY>(c, j.k, k0, q, q0, sh.room, &nothing);
  }
  return __syncthreads_or(is_rare);
}

/* SIM_MATRIX, SIM_TOP, SIM_MEAN. */
template <class P, bool Q_ANY, bool K_ANY>
__global__ __launch_bounds__(P::THREADS,
                             K_ANY ? P::BLOCKS_ANY : P::BLOCKS) void similarity_kernel(SIM_JOB j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 || defined(KS_SIMILARITY_ON_ALL)
  for (int n = (int)threadIdx.x; n < P::BN;
       n += P::THREADS) /* everything goes in, of a query that is there */
    sim_shared<P>(j).worst[n] = n < sim_n_queries<P>(j.q, (int64_t)sim_q_tile(j) * P::BN) ? NAN : INFINITY;
  for (int64_t k0 = sim_part_begin(j, sim_part(j), P::BM); k0 < sim_part_begin(j, sim_part(j) + 1, P::BM);
       k0 += P::BM) {
    for (int m = (int)threadIdx.x; m < P::BM; m += P::THREADS)
      sim_shared<P>(j).groups[m] = j.groups && k0 + m < j.k.n_rows ? j.groups[k0 + m] : 0;
    P c;
    const int64_t q0 = (int64_t)sim_q_tile(j) * P::BN;
    const bool is_rare = sim_tile<P, Q_ANY, K_ANY, P::NORMS>(j, &c, j.q, q0, j.q_factors, k0);
    sim_consume<P, false>(j, &c, is_rare, q0, k0, sim_n_queries<P>(j.q, q0));
  }
  if (j.mode == SIM_TOP) sim_leave_lists<P>(j);
  if constexpr (sim_may_finish(P::SHAPE))
    if (j.is_finished_here && ks_is_last_block(j.arrivals + sim_q_tile(j), (uint32_t)j.n_parts))
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
  const sim_factor *q_factors = j.q_factors;
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
      sim_consume<P, true>(j, &c, is_rare, q0, k0, sim_n_queries<P>(q, q0));
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
  const int64_t n_list = sim_n_list(ks_cuda_device_of(ctx), shape, j.best_k); /* 0 but for the best */
  j.lists_in_smem = n_list > 0;
  return ks_launch(ctx, op, similarity_kernel<P, Q_ANY, K_ANY>,
                   dim3(ks_blocks_for(j.n_parts * j.n_q_tiles, 1)), dim3(P::THREADS),
                   sim_smem_bytes(shape, n_list), j);
}

#endif
