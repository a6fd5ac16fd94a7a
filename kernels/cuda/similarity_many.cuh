/* What the kernels of many bf16 queries and keys share (similarity_tile.cu, similarity_wgmma.cu): factors, and the best of
 * each query while tiles of scores come by; similarity.cu has the story.
 *
 * A thread holds L::N_SUMS sums of a tile. A layout L says where each lies: key(at), query(at), at = 0 .. N_SUMS - 1, and each(f)
 * calls f(at, sum) for all in unrolled order.
 *
 *   sim_best b = ...;                                       // shared memory of all queries that a block has
 *   b.clear(n, exists);                                     // each by one thread
 *   sim_passing<L> p;
 *   p.test(x, at, score, floor) of all sums; p.count();     // those that are not below their query's floor, to local memory
 *   while (p.any over the threads that share queries) {
 *     p.offer(j, b, x, k0);                                 // into buffers of SIM_BUFFER; what finds no place stays
 *     <barrier>
 *     sim_best_join(b, j.best_k, n0, n, lane);              // buffers of SIM_JOIN_FROM or more go into
 *                                                           // the lists: a warp, n queries
 *     <barrier>
 *   }
 *   sim_best_publish(...);                                  // lists and what is left in buffers, out
 *
 * Places in buffers are raced for; what is found in the end is not. */
#ifndef KS_CUDA_SIMILARITY_MANY_CUH
#define KS_CUDA_SIMILARITY_MANY_CUH

#include "kernels/cuda/similarity.cuh"
#include "kernels/cuda/similarity_list.cuh"

enum { SIM_BUFFER = 32, SIM_JOIN_FROM = 16 };

/* ---------------------------------------------------------------- factors */

/* A factor as one float; infinity: it has an exponent, and only sim_scale_exactly will do. */
KS_DEVICE float sim_plain_factor(const sim_factor *factors, const float *scales, int64_t row,
                                 int64_t n_rows) {
  const sim_factor f = sim_known_factor(factors, scales, row, n_rows);
  return f.e == 0 ? f.m : INFINITY;
}

/* Sums become scores where some factor is no float: one after another, from local memory, as registers have room for the sums
 * only. */
template <class L> KS_DEVICE void sim_scale_exactly(const sim_job &j, const L &l, int64_t q0, int64_t k0) {
  float x[L::N_SUMS];
  l.each([&](int at, float &v) { x[at] = v; });
#pragma unroll 1
  for (int at = 0; at < L::N_SUMS; at++) {
    x[at] = sim_score(x[at], sim_known_factor(j.q_factors, j.q_scales, q0 + l.query(at), j.q.n_rows),
                      sim_known_factor(j.k_factors, j.k_scales, k0 + l.key(at), j.k.n_rows));
  }
  l.each([&](int at, float &v) { v = x[at]; });
}

/* ---------------------------------------------------------------- the best */

struct sim_best {
  sim_entry *lists, *buffers; /* [queries, 32], [queries, SIM_BUFFER] */
  int *used;                  /* of the buffers; more than SIM_BUFFER: some found no place */
  float *worst;               /* floors: NaN, everything passes; infinity, nothing */

  KS_DEVICE void take(ks_smem *smem, int n) {
    lists = ks_smem_take<sim_entry>(smem, (size_t)n * KS_WARP);
    buffers = ks_smem_take<sim_entry>(smem, (size_t)n * SIM_BUFFER);
    used = ks_smem_take<int>(smem, (size_t)n);
    worst = ks_smem_take<float>(smem, (size_t)n);
  }
  KS_DEVICE void clear(int n, bool exists) const {
    used[n] = 0;
    worst[n] = exists ? NAN : INFINITY;
  }
  /* A score to its query's buffer; false: no place. */
  KS_DEVICE bool push(const sim_job &j, float score, int64_t key, int n) const {
    const sim_entry x = sim_entry_of(score, (uint32_t)key);
    if (key >= j.k.n_rows || x < lists[n * KS_WARP + j.best_k - 1]) return true;
    const int at = atomicAdd(used + n, 1);
    if (at < SIM_BUFFER) buffers[n * SIM_BUFFER + at] = x;
    return at < SIM_BUFFER;
  }
};

/* Buffers of SIM_JOIN_FROM or more go into their lists: those of queries [q0, q0 + n), n <= 32, by one warp. */
KS_DEVICE void sim_best_join(const sim_best &b, int best_k, int q0, int n_queries, int lane) {
  int used = lane < n_queries ? b.used[q0 + lane] : 0;
  used = used < SIM_BUFFER ? used : SIM_BUFFER;
  unsigned mask = __ballot_sync(KS_FULL_MASK, used >= SIM_JOIN_FROM);
  while (mask) {
    sim_entry best[2], x[2];
    int n[2], has[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      has[i] = mask != 0;
      const int at = has[i] ? __ffs((int)mask) - 1 : 0;
      mask &= mask - 1;
      n[i] = q0 + at;
      x[i] = lane < __shfl_sync(KS_FULL_MASK, used, at) && has[i] ? b.buffers[n[i] * SIM_BUFFER + lane] : 0;
      best[i] = b.lists[n[i] * KS_WARP + lane];
    }
    sim_sort<2>(x, lane);
    sim_join<2>(best, x, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!has[i]) continue;
      b.lists[n[i] * KS_WARP + lane] = best[i];
      if (lane == best_k - 1 && best[i] != 0 && b.worst[n[i]] != INFINITY)
        b.worst[n[i]] = sim_entry_score(best[i]);
      if (lane == 0) b.used[n[i]] = 0;
    }
  }
}

/* Queries n and n + 1 of those that begin at q0: what is left in buffers goes into the lists, and these out. One warp. */
KS_DEVICE void sim_best_publish(const sim_job &j, const sim_best &b, int64_t q0, int n, int64_t part,
                                int lane) {
  sim_entry best[2], x[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    x[i] = lane < b.used[n + i] ? b.buffers[(n + i) * SIM_BUFFER + lane] : 0;
    best[i] = b.lists[(n + i) * KS_WARP + lane];
  }
  sim_sort<2>(x, lane);
  sim_join<2>(best, x, lane);
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (q0 + n + i < j.q.n_rows && lane < j.best_k)
      j.entries[((q0 + n + i) * j.n_parts + part) * j.best_k + lane] = best[i];
}

/* Scores of a thread that pass: bits. The scores themselves go to x in local memory, as nearly none pass; an array of its own,
 * so that the bits stay in registers. */
template <class L> struct sim_passing {
  enum { WORDS = L::N_SUMS / 32 };
  uint32_t bits[WORDS], any;

  KS_DEVICE sim_passing() : any(0) {
#pragma unroll
    for (int w = 0; w < WORDS; w++)
      bits[w] = 0;
  }
  KS_DEVICE void test(float (&x)[L::N_SUMS], int at, float score, float floor) {
    if (!(score < floor)) bits[at / 32] |= 1u << at % 32, x[at] = score;
  }
  KS_DEVICE void count() {
#pragma unroll
    for (int w = 0; w < WORDS; w++)
      any |= bits[w];
  }
  KS_DEVICE void offer(const sim_job &j, const sim_best &b, const float (&x)[L::N_SUMS], int64_t k0) {
    any = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      uint32_t left = bits[w];
      while (left) {
        const int at = w * 32 + __ffs((int)left) - 1;
        if (b.push(j, x[at], k0 + L::key(at), L::query(at))) bits[w] &= ~(1u << at % 32);
        left &= left - 1;
      }
      any |= bits[w];
    }
  }
};

#endif
