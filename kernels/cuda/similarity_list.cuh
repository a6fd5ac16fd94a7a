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
 *   sim_cursor lists[2]; ...                 // falling lists, one a lane
 *   sim_pick_best<2>(best, lists, best_k, lane);  // their best: falling over the lanes
 *
 * Sorting is 15 exchanges of about 8 instructions, joining 5; the lists of an array go side by side, since an
 * exchange waits some 40 cycles for its shuffles. Picking is a step of some 20 instructions and 80 cycles for each of
 * the best, however many there are to pick from: two reductions of a warp (before sm_80 ten shuffles). */
#ifndef KS_CUDA_SIMILARITY_LIST_CUH
#define KS_CUDA_SIMILARITY_LIST_CUH

#include "kernels/cuda/device.cuh"

typedef unsigned long long sim_entry;

/* A negative score below float32's range is -0: no worse than 0. */
KS_DEVICE sim_entry sim_entry_of(float score, uint32_t index) {
  const uint32_t bits = ks_float_to_bits(score + 0.0f);
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

/* ---------------------------------------------------------------- the best of many falling lists */

/* A falling list: its next entries (0: none), and those behind them in memory. A lane of a warp has one. */
enum { SIM_NEXT = 4 };
struct sim_cursor {
  sim_entry next[SIM_NEXT];
  const sim_entry *rest;
  int n_rest;

  KS_DEVICE void load() {
#pragma unroll
    for (int e = 0; e < SIM_NEXT; e++)
      next[e] = e < n_rest ? __ldcg(rest + e) : 0;
    rest += SIM_NEXT, n_rest -= SIM_NEXT;
  }
  KS_DEVICE void pop(bool is_taken) {
#pragma unroll
    for (int e = 0; e < SIM_NEXT; e++)
      next[e] = !is_taken ? next[e] : e + 1 < SIM_NEXT ? next[e + 1] : 0;
    if (next[0] == 0 && n_rest > 0) load();
  }
  KS_DEVICE void put_pair(int a, int b) {
    const sim_entry x = next[a], y = next[b];
    next[a] = x > y ? x : y, next[b] = x > y ? y : x;
  }
  /* Entries in any order, of a list of no more than these. */
  KS_DEVICE void sort() {
    put_pair(0, 1), put_pair(2, 3), put_pair(0, 2), put_pair(1, 3), put_pair(1, 2);
    rest = NULL, n_rest = 0;
  }
};

KS_DEVICE sim_entry sim_warp_max(sim_entry x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t high = __reduce_max_sync(KS_FULL_MASK, (uint32_t)(x >> 32)),
                 low = __reduce_max_sync(KS_FULL_MASK, (uint32_t)(x >> 32) == high ? (uint32_t)x : 0u);
  return (sim_entry)high << 32 | low;
#else
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2) {
    const sim_entry y = __shfl_xor_sync(KS_FULL_MASK, x, d);
    x = y > x ? y : x;
  }
  return x;
#endif
}

/* best: the n best of a warp's lists, falling over the lanes; N such at once, as a step waits for two reductions. */
template <int N> KS_DEVICE void sim_pick_best(sim_entry best[N], sim_cursor lists[N], int n, int lane) {
#pragma unroll
  for (int i = 0; i < N; i++)
    best[i] = 0;
#pragma unroll 1
  for (int place = 0; place < n; place++) {
    sim_entry x[N], any = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
      x[i] = sim_warp_max(lists[i].next[0]), any |= x[i];
    if (any == 0) break;
#pragma unroll
    for (int i = 0; i < N; i++) {
      best[i] = lane == place ? x[i] : best[i];
      lists[i].pop(lists[i].next[0] == x[i]);
    }
  }
}
/* best: itself and x, both falling. */
template <int N> KS_DEVICE void sim_join_falling(sim_entry best[N], const sim_entry x[N], int lane) {
  sim_entry rising[N];
#pragma unroll
  for (int i = 0; i < N; i++)
    rising[i] = __shfl_sync(KS_FULL_MASK, x[i], KS_WARP - 1 - lane);
  sim_join<N>(best, rising, lane);
}

/* best[i]: of up to 32 lists of best_k entries, ended by zeros, that lie one behind the other at from[i]. */
template <int N>
KS_DEVICE void sim_gather_few(sim_entry best[N], const sim_entry *const from[N], int64_t n_lists, int best_k,
                              int lane) {
  sim_cursor lists[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    lists[i].rest = from[i] + lane * best_k;
    lists[i].n_rest = lane < n_lists ? best_k : 0;
    lists[i].load();
  }
  sim_pick_best<N>(best, lists, best_k, lane);
}

/* Not inlined, here and below: what runs once at the end of a launch would else be thousands of instructions that no
 * cache holds. */
[[maybe_unused]] static __device__ __noinline__ sim_entry sim_gather_named(const sim_entry *from, int list,
                                                                           int best_k, sim_entry best,
                                                                           int lane) {
  sim_cursor cursor;
  sim_entry x;
  cursor.rest = from + (int64_t)list * best_k;
  cursor.n_rest = list >= 0 ? best_k : 0;
  cursor.load();
  sim_pick_best<1>(&x, &cursor, best_k, lane);
  sim_join_falling<1>(&best, &x, lane);
  return best;
}

/* Of any number of lists, for one warp. Every list's head is looked at first: the best_k-th of 32 lanes' best heads is a
 * floor, which all but a few lists lie below. room: [64], shared. */
[[maybe_unused]] static __device__ __noinline__ sim_entry sim_gather(const sim_entry *from, int64_t n_lists,
                                                                     int best_k, int32_t *room, int lane) {
  enum { AHEAD = 8 };
  sim_entry head[AHEAD], top = 0, best = 0;
  int n = 0; /* lists in the room */
  if (n_lists <= KS_WARP) return sim_gather_named(from, lane < n_lists ? lane : -1, best_k, best, lane);
  const auto read = [&](int64_t l0) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int64_t l = l0 + i * KS_WARP + lane;
      head[i] = l < n_lists ? __ldcg(from + l * best_k) : 0;
    }
  };
  for (int64_t l0 = (n_lists - 1) / (KS_WARP * AHEAD) * (KS_WARP * AHEAD); l0 >= 0; l0 -= KS_WARP * AHEAD) {
    read(l0); /* the first ones last, as they come next */
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      top = head[i] > top ? head[i] : top;
  }
  sim_sort<1>(&top, lane);
  const sim_entry floor = __shfl_sync(KS_FULL_MASK, top, KS_WARP - best_k);
  for (int64_t l0 = 0; l0 < n_lists; l0 += KS_WARP * AHEAD) {
    unsigned passing = 0; /* lane i: which of lists l0 + 32 i .. may hold something */
    if (l0 > 0) read(l0);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const unsigned mask = __ballot_sync(KS_FULL_MASK, head[i] != 0 && head[i] >= floor);
      passing = lane == i ? mask : passing;
    }
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) {
      const unsigned mask = __shfl_sync(KS_FULL_MASK, passing, i);
      if (mask >> lane & 1u)
        room[n + __popc(mask & ((1u << lane) - 1u))] = (int32_t)(l0 + i * KS_WARP + lane);
      n += __popc(mask);
      __syncwarp();
      if (n < KS_WARP) continue;
      best = sim_gather_named(from, room[lane], best_k, best, lane);
      n -= KS_WARP;
      const int32_t rest = lane < n ? room[KS_WARP + lane] : 0;
      __syncwarp();
      room[lane] = rest;
      __syncwarp();
    }
  }
  return n > 0 ? sim_gather_named(from, lane < n ? room[lane] : -1, best_k, best, lane) : best;
}

#endif
