/* Short lists of the best (best_k <= 32), one entry a lane of a warp; similarity.cu has the story.
 *
 * A score and its key's index are one number, so that the order is total (falling scores, NaN last, ties to the
 * lower index) and which of two goes first takes one comparison. What ends in a list is then the same whatever
 * the order in which candidates come: threads may race for places in a buffer, and nothing depends on it.
 *
 *   sim_entry x[2] = {...};                  // candidates of two lists, 0: none
 *   sim_sort<2>(x, lane);                    // rising over the lanes
 *   sim_join<2>(best, x, lane);              // best: falling over the lanes
 *
 * Sorting is 15 exchanges of about 8 instructions, joining 5; the lists of an array go side by side, since an
 * exchange waits some 40 cycles for its shuffles. */
#ifndef KS_CUDA_SIMILARITY_LIST_CUH
#define KS_CUDA_SIMILARITY_LIST_CUH

#include "kernels/cuda/device.cuh"

typedef unsigned long long sim_entry;

KS_DEVICE sim_entry sim_entry_of(float score, uint32_t index) {
  const uint32_t bits = ks_float_to_bits(score);
  const uint32_t order = score != score ? 1u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (sim_entry)order << 32 | (uint32_t)~index;
}
KS_DEVICE float sim_entry_score(sim_entry x) {
  const uint32_t order = (uint32_t)(x >> 32);
  if (order <= 1u) return NAN;
  return ks_bits_to_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
KS_DEVICE int64_t sim_entry_index(sim_entry x) {
  return (int64_t)(uint32_t) ~(uint32_t)x;
}

template <int N> KS_DEVICE void sim_exchange(sim_entry x[N], int distance, bool wants_less) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const sim_entry y = __shfl_xor_sync(KS_FULL_MASK, x[i], distance);
    x[i] = (y < x[i]) == wants_less ? y : x[i];
  }
}
template <int N> KS_DEVICE void sim_sort(sim_entry x[N], int lane) {
#pragma unroll
  for (int size = 2; size <= KS_WARP; size *= 2)
#pragma unroll
    for (int d = size / 2; d > 0; d /= 2)
      sim_exchange<N>(x, d, ((lane & d) == 0) == ((lane & size) == 0));
}
/* best: the 32 best of itself and x, which rises. */
template <int N> KS_DEVICE void sim_join(sim_entry best[N], const sim_entry x[N], int lane) {
#pragma unroll
  for (int i = 0; i < N; i++)
    best[i] = x[i] > best[i] ? x[i] : best[i];
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2)
    sim_exchange<N>(best, d, (lane & d) != 0);
}
/* One more entry into a falling list. */
KS_DEVICE sim_entry sim_push(sim_entry best, sim_entry x, int lane) {
  const int place = __popc(__ballot_sync(KS_FULL_MASK, best > x));
  const sim_entry left = __shfl_up_sync(KS_FULL_MASK, best, 1);
  return lane < place ? best : lane == place ? x : left;
}

/* Entries that wait for their place: room for 64, joined by 32. */
struct sim_waiting {
  sim_entry *room, best, floor;
  int n;
};
/* Not inlined, here and below: what runs once at the end of a launch would else be thousands of instructions that no
 * cache holds. */
[[maybe_unused]] static __device__ __noinline__ void sim_waiting_join(sim_waiting *w, int best_k, int lane) {
  sim_entry x = lane < w->n ? w->room[lane] : 0;
  const sim_entry rest = KS_WARP + lane < w->n ? w->room[KS_WARP + lane] : 0;
  __syncwarp();
  w->room[lane] = rest;
  w->n = w->n > KS_WARP ? w->n - KS_WARP : 0;
  sim_sort<1>(&x, lane);
  sim_join<1>(&w->best, &x, lane);
  const sim_entry last = __shfl_sync(KS_FULL_MASK, w->best, best_k - 1);
  w->floor = last > w->floor ? last : w->floor;
  __syncwarp();
}
KS_DEVICE void sim_waiting_add(sim_waiting *w, sim_entry x, int best_k, int lane) {
  const bool passes = x != 0 && x >= w->floor;
  const unsigned mask = __ballot_sync(KS_FULL_MASK, passes);
  if (passes) w->room[w->n + __popc(mask & ((1u << lane) - 1u))] = x;
  w->n += __popc(mask);
  __syncwarp();
  if (w->n >= KS_WARP) sim_waiting_join(w, best_k, lane);
}

/* The best of n_lists falling lists of best_k entries, one behind the other at `from`, for one warp: lane i gets
 * the i-th. Every list's head is looked at first: the best_k-th of 32 lanes' best heads is a floor, which all but
 * a few lists lie below. room: [64], shared. */
[[maybe_unused]] static __device__ __noinline__ sim_entry sim_gather(const sim_entry *from, int64_t n_lists,
                                                                     int best_k, sim_entry *room, int lane) {
  enum { AHEAD = 8, TOGETHER = 4 };
  sim_entry top = 0;
#pragma unroll 8
  for (int64_t l = lane; l < n_lists; l += KS_WARP) {
    const sim_entry x = __ldcg(from + l * best_k);
    top = x > top ? x : top;
  }
  sim_sort<1>(&top, lane);
  sim_waiting w = {room, 0, __shfl_sync(KS_FULL_MASK, top, KS_WARP - best_k), 0};
  for (int64_t l0 = 0; l0 < n_lists; l0 += KS_WARP * AHEAD) {
    unsigned passing = 0; /* lane i: which of lists l0 + 32 i .. may hold something */
    sim_entry head[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int64_t l = l0 + i * KS_WARP + lane;
      head[i] = l < n_lists ? __ldcg(from + l * best_k) : 0;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const unsigned mask = __ballot_sync(KS_FULL_MASK, head[i] != 0 && head[i] >= w.floor);
      passing = lane == i ? mask : passing;
    }
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) {
      unsigned mask = __shfl_sync(KS_FULL_MASK, passing, i);
      while (mask) {
        sim_entry x[TOGETHER];
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
          const int64_t l = l0 + i * KS_WARP + (mask ? __ffs((int)mask) - 1 : 0);
          x[n] = mask && lane < best_k ? __ldcg(from + l * best_k + lane) : 0;
          mask &= mask - 1;
        }
#pragma unroll
        for (int n = 0; n < TOGETHER; n++)
          sim_waiting_add(&w, x[n], best_k, lane);
      }
    }
  }
  while (w.n > 0)
    sim_waiting_join(&w, best_k, lane);
  return w.best;
}

#endif
