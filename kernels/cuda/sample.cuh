/* What a block does for one row of logits: the order and the integer weights of tokens (sample.cu has the
 * formulas), histograms of them in shared memory, the cut of a truncation, the draw. Every thread of a block
 * of SAMPLE_THREADS calls these functions. */
#ifndef KS_CUDA_SAMPLE_CUH
#define KS_CUDA_SAMPLE_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"

enum {
  SAMPLE_THREADS = 1024,
  SAMPLE_WARPS = SAMPLE_THREADS / KS_WARP,
  SAMPLE_BIN_BITS = 11,
  SAMPLE_BINS = 1 << SAMPLE_BIN_BITS,
  SAMPLE_UNROLL = 2
};

static_assert(SAMPLE_BINS == 2 * SAMPLE_THREADS, "sample_border: two bins a thread");

/* exp(-21.5) 2^30 + 1/2 < 1: from here on a token weighs nothing. */
#define SAMPLE_REACH 21.5f

/* What a block shares. */
typedef struct {
  uint32_t *count, *low, *high; /* [SAMPLE_BINS]: tokens and the halves of their weight */
  uint64_t *order;              /* [SAMPLE_THREADS]: list of a stretch: key, and id turned round */
  uint32_t *weight;             /* [SAMPLE_THREADS] */
  uint64_t *room;               /* [SAMPLE_WARPS] */
  uint64_t *found;              /* [2] */
  uint32_t *n_listed;           /* [1] */
} sample_shared;

/* n_bins: SAMPLE_BINS, or 0 where a kernel needs only `room` and `found`. */
static size_t sample_smem_bytes(size_t n_bins) {
  const size_t n_listed = n_bins ? SAMPLE_THREADS : 0;
  return ks_smem_bytes<uint64_t>(SAMPLE_WARPS) + ks_smem_bytes<uint64_t>(2) + ks_smem_bytes<uint32_t>(1) +
         3 * ks_smem_bytes<uint32_t>(n_bins) + ks_smem_bytes<uint64_t>(n_listed) +
         ks_smem_bytes<uint32_t>(n_listed);
}

KS_DEVICE sample_shared sample_share(size_t n_bins) {
  const size_t n_listed = n_bins ? SAMPLE_THREADS : 0;
  ks_smem smem;
  sample_shared s;
  s.room = ks_smem_take<uint64_t>(&smem, SAMPLE_WARPS);
  s.found = ks_smem_take<uint64_t>(&smem, 2);
  s.n_listed = ks_smem_take<uint32_t>(&smem, 1);
  s.count = ks_smem_take<uint32_t>(&smem, n_bins);
  s.low = ks_smem_take<uint32_t>(&smem, n_bins);
  s.high = ks_smem_take<uint32_t>(&smem, n_bins);
  s.order = ks_smem_take<uint64_t>(&smem, n_listed);
  s.weight = ks_smem_take<uint32_t>(&smem, n_listed);
  return s;
}

/* A row and how its logits become weights and stretches. */
typedef struct {
  const float *x;
  int64_t n;
  bool aligned;
  float max, rate, per_bin;
} sample_row;

/* Tokens up to here in the order are kept: those of a larger key, and of this key up to this id. */
typedef struct {
  uint32_t key;
  uint32_t id;
} sample_cut;

/* ---------------------------------------------------------------- a token */

/* Floats as unsigned integers in the same order; both zeros are one. */
KS_DEVICE uint32_t sample_key(float x) {
  const uint32_t bits = ks_float_to_bits(__fadd_rn(x, 0.0f));
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* exp(t) for -22 < t <= 0 as the CPU backend has it: t = n ln 2 + r, Taylor to r^7, times 2^n. */
KS_DEVICE float sample_exp(float t) {
  const float round = 0x1.8p23f, shifted = fmaf(t, 0x1.715476p+0f, round), n = __fsub_rn(shifted, round);
  const float r = fmaf(n, -0x1.7f7d1cp-20f, fmaf(n, -0x1.62e4p-1f, t));
  float q = fmaf(1.0f / 5040.0f, r, 1.0f / 720.0f);
  q = fmaf(q, r, 1.0f / 120.0f);
  q = fmaf(q, r, 1.0f / 24.0f);
  q = fmaf(q, r, 1.0f / 6.0f);
  q = fmaf(q, r, 0.5f);
  q = fmaf(q, __fmul_rn(r, r), r);
  return __fmul_rn(__fadd_rn(q, 1.0f),
                   ks_bits_to_float((ks_float_to_bits(shifted) - 0x4b400000u + 127u) << 23));
}

KS_DEVICE uint32_t sample_weight(const sample_row &r, float x) {
  const float t = __fmul_rn(__fsub_rn(x, r.max), r.rate);
  return t > -SAMPLE_REACH ? (uint32_t)fmaf(sample_exp(t), 0x1p30f, 0.5f) : 0u;
}

/* Stretch of a logit that weighs something; rises as the logit falls. */
KS_DEVICE uint32_t sample_bin(const sample_row &r, float x) {
  return (uint32_t)fminf((r.max - x) * r.per_bin, (float)(SAMPLE_BINS - 1));
}

KS_DEVICE bool sample_kept(const sample_cut &cut, uint32_t key, int64_t id) {
  return key > cut.key || (key == cut.key && id <= cut.id);
}

/* ---------------------------------------------------------------- over a row */

/* f(x, id) for ids from `begin` up to `end`, by thread `thread` of `n_threads`; UNROLL loads under way. */
template <int UNROLL, class F>
KS_DEVICE void sample_walk(const float *x, bool aligned, int64_t begin, int64_t end, int thread,
                           int n_threads, F f) {
  enum { N = ks_piece<float>::N };
#pragma unroll 1
  for (int64_t at = begin + thread * N; at < end; at += (int64_t)n_threads * N * UNROLL) {
    ks_piece<float> held[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t id = at + (int64_t)u * n_threads * N;
      held[u] = ks_piece_load(x + id, end - id, aligned);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t id = at + (int64_t)u * n_threads * N;
      float v[N];
      ks_piece_unpack(v, held[u]);
#pragma unroll
      for (int i = 0; i < N; i++)
        if (id + i < end) f(v[i], id + i);
    }
  }
}

template <class F> KS_DEVICE void sample_each(const sample_row &r, F f) {
  sample_walk<1>(r.x, r.aligned, 0, r.n, (int)threadIdx.x, SAMPLE_THREADS, f);
}

/* Over the lanes: the sum of the values of this one and of those before it. */
KS_DEVICE uint64_t sample_running(uint64_t x) {
#pragma unroll
  for (int d = 1; d < KS_WARP; d *= 2) {
    const uint64_t other = __shfl_up_sync(KS_FULL_MASK, x, (unsigned)d);
    x += (int)threadIdx.x % KS_WARP >= d ? other : 0;
  }
  return x;
}

/* The sum over the block, in every thread; `room` may be used again at once. */
KS_DEVICE uint64_t sample_block_sum(uint64_t x, uint64_t *room) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
#pragma unroll
    for (int d = KS_WARP / 2; d > 0; d /= 2)
      x += __shfl_xor_sync(KS_FULL_MASK, x, d);
    if (step == 0) {
      if (threadIdx.x % KS_WARP == 0) room[threadIdx.x / KS_WARP] = x;
      __syncthreads();
      x = room[threadIdx.x % KS_WARP];
    }
  }
  __syncthreads();
  return x;
}

/* The largest over the block; `room` may be used again at once. */
template <class T> KS_DEVICE T sample_block_max(T x, uint64_t *room) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
#pragma unroll
    for (int d = KS_WARP / 2; d > 0; d /= 2) {
      const T other = __shfl_xor_sync(KS_FULL_MASK, x, d);
      x = other > x ? other : x;
    }
    if (step == 0) {
      if (threadIdx.x % KS_WARP == 0) room[threadIdx.x / KS_WARP] = (uint64_t)x;
      __syncthreads();
      x = (T)room[threadIdx.x % KS_WARP];
    }
  }
  __syncthreads();
  return x;
}

/* ---------------------------------------------------------------- where a truncation ends */

/* Tokens that may hold the cut: kept so far, in stretch `bin` (-1: in all), of keys in [low, high]. */
typedef struct {
  sample_cut kept;
  int bin;
  uint32_t low, high;
} sample_members;

/* The weight of a member; 0: it is none. */
KS_DEVICE uint32_t sample_member(const sample_row &r, const sample_members &m, float x, int64_t id) {
  const uint32_t key = sample_key(x);
  if (key < m.low || key > m.high || !sample_kept(m.kept, key, id)) return 0;
  const uint32_t w = sample_weight(r, x);
  return w && (m.bin < 0 || (int)sample_bin(r, x) == m.bin) ? w : 0;
}

KS_DEVICE void sample_clear(const sample_shared &s) {
  for (int b = (int)threadIdx.x; b < SAMPLE_BINS; b += SAMPLE_THREADS)
    s.count[b] = s.low[b] = s.high[b] = 0;
  __syncthreads();
}
KS_DEVICE void sample_add(const sample_shared &s, uint32_t bin, uint32_t w) {
  if (atomicAdd(&s.low[bin], w) + w < w) atomicAdd(&s.high[bin], 1u); /* carry */
}

/* Histogram of the members by bin_of(x). */
template <class F>
KS_DEVICE void sample_histogram(const sample_row &r, const sample_shared &s, const sample_members &m,
                                F bin_of) {
  sample_clear(s);
  sample_each(r, [&](float x, int64_t id) {
    const uint32_t w = sample_member(r, m, x, id);
    if (!w) return;
    const uint32_t b = bin_of(x);
    atomicAdd(&s.count[b], 1u);
    sample_add(s, b, w);
  });
  __syncthreads();
}

/* The bin in which the running amount, in rising order, reaches *need, which becomes what is needed inside
 * it. False: it is not reached. */
KS_DEVICE bool sample_border(const sample_shared &s, bool counts, uint64_t *need, uint32_t *bin) {
  const int lane = (int)threadIdx.x % KS_WARP, warp = (int)threadIdx.x / KS_WARP;
  uint64_t amount[2], sum = 0;
  for (int i = 0; i < 2; i++) {
    const int b = 2 * (int)threadIdx.x + i;
    amount[i] = counts ? s.count[b] : (uint64_t)s.high[b] << 32 | s.low[b];
    sum += amount[i];
  }
  uint64_t before = sample_running(sum);
  if (lane == KS_WARP - 1) s.room[warp] = before;
  if (threadIdx.x == 0) s.found[0] = SAMPLE_BINS;
  __syncthreads();
  const uint64_t of_warp = s.room[lane];
  before += __shfl_sync(KS_FULL_MASK, sample_running(of_warp) - of_warp, warp) - sum;
  for (int i = 0; i < 2; before += amount[i], i++)
    if (before < *need && *need <= before + amount[i]) {
      s.found[0] = 2 * threadIdx.x + (unsigned)i;
      s.found[1] = *need - before;
    }
  __syncthreads();
  const bool is_there = s.found[0] < SAMPLE_BINS;
  *bin = (uint32_t)s.found[0];
  if (is_there) *need = s.found[1];
  __syncthreads();
  return is_there;
}

/* The weight of all bins. */
KS_DEVICE uint64_t sample_histogram_weight(const sample_shared &s) {
  uint64_t sum = 0;
  for (int b = (int)threadIdx.x; b < SAMPLE_BINS; b += SAMPLE_THREADS)
    sum += (uint64_t)s.high[b] << 32 | s.low[b];
  return sample_block_sum(sum, s.room);
}

/* The id of [begin, end) where the running sum of amount(x, id), by rising id, passes `left`; draw: left is a 64-bit random
 * number, and becomes that part of the sum. */
template <class F>
KS_DEVICE int64_t sample_locate(const sample_row &r, const sample_shared &s, int64_t begin, int64_t end,
                                uint64_t left, bool draw, F amount) {
  const int lane = (int)threadIdx.x % KS_WARP, warp = (int)threadIdx.x / KS_WARP;
  while (end - begin > 1) {
    int64_t stretch = (end - begin + SAMPLE_WARPS - 1) / SAMPLE_WARPS;
    if (stretch > 1) stretch = (stretch + 3) & ~(int64_t)3; /* keeps pieces aligned */
    const int64_t from = begin + warp * stretch, to = min(from + stretch, end);
    uint64_t sum = 0;
    sample_walk<1>(r.x, r.aligned && stretch > 1, from, to, lane, KS_WARP,
                   [&](float x, int64_t id) { sum += amount(x, id); });
#pragma unroll
    for (int d = KS_WARP / 2; d > 0; d /= 2)
      sum += __shfl_xor_sync(KS_FULL_MASK, sum, d);
    if (lane == 0) s.room[warp] = sum;
    __syncthreads();
    const uint64_t up_to = sample_running(s.room[lane]);
    if (draw) left = __umul64hi(left, __shfl_sync(KS_FULL_MASK, up_to, KS_WARP - 1));
    draw = false;
    const int w = min(__popc(__ballot_sync(KS_FULL_MASK, left >= up_to)), SAMPLE_WARPS - 1);
    if (w > 0) left -= __shfl_sync(KS_FULL_MASK, up_to, w - 1);
    begin += w * stretch;
    end = min(begin + stretch, end);
    __syncthreads();
  }
  return begin;
}

/* The one of n <= SAMPLE_THREADS listed tokens in which the running weight, in their order, reaches `need`. */
KS_DEVICE sample_cut sample_cut_in_list(const sample_shared &s, uint32_t n, uint64_t need) {
  if (threadIdx.x < n) {
    const uint64_t own = s.order[threadIdx.x];
    uint64_t before = 0;
#pragma unroll 4
    for (uint32_t j = 0; j < n; j++)
      before += s.order[j] > own ? s.weight[j] : 0;
    if (before < need && need <= before + s.weight[threadIdx.x]) s.found[0] = own;
  }
  __syncthreads();
  const sample_cut cut = {(uint32_t)(s.found[0] >> 32), ~(uint32_t)s.found[0]};
  __syncthreads();
  return cut;
}

/* Of at most SAMPLE_THREADS members the one in which `need` is reached. */
KS_DEVICE sample_cut sample_cut_listed(const sample_row &r, const sample_shared &s, const sample_members &m,
                                       bool counts, uint64_t need) {
  if (threadIdx.x == 0) *s.n_listed = 0;
  __syncthreads();
  sample_each(r, [&](float x, int64_t id) {
    const uint32_t w = sample_member(r, m, x, id);
    if (!w) return;
    const uint32_t at = atomicAdd(s.n_listed, 1u);
    s.order[at] = (uint64_t)sample_key(x) << 32 | (uint32_t)~id;
    s.weight[at] = counts ? 1u : w;
  });
  __syncthreads();
  return sample_cut_in_list(s, *s.n_listed, need);
}

/* Among members of one key. */
KS_DEVICE sample_cut sample_cut_equal(const sample_row &r, const sample_shared &s, const sample_members &m,
                                      bool counts, uint64_t need) {
  const uint32_t bits = m.low & 0x80000000u ? m.low ^ 0x80000000u : ~m.low;
  const uint64_t w = sample_weight(r, ks_bits_to_float(bits)), rank = counts ? need : (need + w - 1) / w;
  const int64_t id = sample_locate(r, s, 0, r.n, rank - 1, false, [&](float x, int64_t i) {
    return (uint64_t)(sample_key(x) == m.low && sample_kept(m.kept, m.low, i));
  });
  return {m.low, (uint32_t)id};
}

/* The part that is looked at next: of the whole a stretch of logits, of more than can be listed one of keys.
 */
KS_DEVICE void sample_narrow(sample_members *m, uint32_t bin, uint32_t top, int shift) {
  if (m->bin < 0) {
    m->bin = (int)bin;
    return;
  }
  const uint32_t width = (1u << shift) - 1;
  m->high = top - (bin << shift);
  m->low = m->high - m->low > width ? m->high - width : m->low;
}

/* Smallest and largest key of the members. */
KS_DEVICE void sample_tighten(const sample_row &r, const sample_shared &s, sample_members *m) {
  uint32_t high = 0, low = 0; /* low: turned round */
  sample_each(r, [&](float x, int64_t id) {
    if (!sample_member(r, *m, x, id)) return;
    const uint32_t key = sample_key(x);
    high = key > high ? key : high;
    low = ~key > low ? ~key : low;
  });
  m->high = sample_block_max(high, s.room);
  m->low = ~sample_block_max(low, s.room);
}

/* ceil(p * total) */
KS_DEVICE uint64_t sample_share_of(float p, uint64_t total) {
  const double exact = __dmul_rn((double)p, (double)total);
  const uint64_t need = (uint64_t)exact;
  return need + ((double)need < exact);
}

/* Ends the kept tokens at the k-th of them, or (k = 0) where they reach p of their weight. */
KS_DEVICE sample_cut sample_keep(const sample_row &r, const sample_shared &s, sample_cut kept, int32_t k,
                                 float p) {
  sample_members m = {kept, -1, 0, UINT32_MAX};
  uint64_t need = (uint64_t)k, total = UINT64_MAX;
  uint32_t bin, top = 0;
  int shift = 0;
#pragma unroll 1
  for (;;) {
    sample_histogram(r, s, m,
                     [&](float x) { return m.bin < 0 ? sample_bin(r, x) : (top - sample_key(x)) >> shift; });
    if (k == 0 && total == UINT64_MAX) {
      total = sample_histogram_weight(s);
      need = sample_share_of(p, total);
    }
    if (need >= total || !sample_border(s, k > 0, &need, &bin)) return kept; /* all of them */
    const uint32_t n = s.count[bin];
    sample_narrow(&m, bin, top, shift);
    if (n <= SAMPLE_THREADS) return sample_cut_listed(r, s, m, k > 0, need);
    sample_tighten(r, s, &m);
    if (m.low == m.high) return sample_cut_equal(r, s, m, k > 0, need);
    top = m.high;
    shift = max(0, 32 - __clz((int)(top - m.low)) - SAMPLE_BIN_BITS);
  }
}

#endif
