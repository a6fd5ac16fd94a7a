/* One token a row from logits: greedy, temperature, top-k, top-p.
 *
 * The arithmetic of the CPU backend, operation for operation, so that both draw the same token from the same
 * logits: every token has the integer weight W = trunc(2^30 exp((z - max z) / temperature) + 1/2); sums of
 * weights are exact in 64 bits, whatever their order. In the order of falling logit and rising id
 *   - top-k keeps the first k;
 *   - top-p keeps the fewest first tokens whose weights sum to at least p times the sum of what top-k left;
 *   - the draw r = floor(random64 * total / 2^64) takes the token in whose stretch of the running sum (by id)
 *     it falls.
 * W never rises as the logit falls (the exponential below was compared for all float32 from -22.5 to 0), so
 * the tokens that weigh something come before all others, and only they are ever looked at.
 *
 * Where a truncation ends is one cut (key, id), key being the logit as an integer of the same order. Many blocks share a row; the
 * last of them to be done goes on alone, with what all found out. Launches:
 *   1. the largest and the smallest logit; greedy ends here;
 *   2. with a truncation: a histogram of counts and weights over 2048 equal stretches of logits, in shared memory, then added up
 *      in L2; the last block finds the stretch of the cut;
 *   3. each block adds up the weights before that stretch and puts the stretch's own tokens in a list (at
 *      most 1024); the last block finds the cut in the list, then the block's slice into which the draw
 *      falls, then the token in it;
 *   4. where top-p cuts what top-k left in an earlier stretch: 3 once more.
 * A stretch of more than 1024 tokens (ties, hostile logits) is left to one block, which splits it by keys
 * into 2048 parts as often as need be (at most three times); of equal logits the id is found as a draw is.
 *
 * Bytes: 4 n a launch over the row, n the vocabulary, all but the first from L2; 24 KB of histogram. Flops: 25 n for weights in
 * launches 2 and 3. Bound by latency: a launch, one load from memory or L2, reductions, a counter in L2, what
 * the last block does.
 *
 * Geometry: blocks of 1024 threads, 4096 ids each (more where there are many rows: 2 blocks a multiprocessor in all), 16 bytes a
 * thread; 37 KiB of shared memory. 128k tokens of one row: 32 blocks. Registers: 32, 32, 58.
 *
 * Determinism: integers; the order of atomic additions cannot matter, nor the number of blocks, nor which is
 * last. A row depends on nothing else. The counters of blocks that are done are staged with the samplers, as
 * zeros, and left as zeros.
 *
 * Ladder (H200, commit 2cc54c8; an empty kernel measures 3 us)
 *   considered  a sort of the row by blocks: some 20 passes
 *   v1  a block a row. 1 x 128256: greedy 34 us, top-p 0.9 159 us; 8 rows the same
 *   v2  this. Computed: launch 1 about 5 us, 2 and 3 about 5 us each (1.5 us to the data and the counter, 0.3
 *       us for 4096 weights a block, 1 us of shared atomics, 1.5 to 2 us for the last block): greedy 5,
 *       temperature 10, top-p 15, top-k and top-p 15 to 20 us for one row as for eight. Not measured yet */
#include "kernels/base/rng.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample.cuh"

enum { SAMPLE_STRETCH = 4 * SAMPLE_THREADS, SAMPLE_LISTED = SAMPLE_THREADS };

/* A row's sampler, and how many of its blocks are done: the last of them goes on alone, and leaves 0. */
typedef struct {
  ks_sampler how;
  uint32_t n_done, unused;
} sample_job;

/* What a row's blocks find out, from launch to launch. */
typedef enum {
  SAMPLE_DONE = 0, /* the token is there */
  SAMPLE_LIST,     /* tokens of stretches before `bin` are kept, those of `bin` are looked at one by one */
  SAMPLE_ALONE     /* too many of them: one block does all */
} sample_stage;
typedef struct {
  float max, least;
  int32_t stage;
  uint32_t bin; /* SAMPLE_BINS: everything is kept */
  uint64_t need,
      before; /* inside `bin`: tokens (counts) or weight up to the cut; weight of the stretches before it */
  uint32_t counts, n_listed;
} sample_state;

typedef struct {
  const float *logits;
  sample_job *jobs;
  sample_state *states;
  uint64_t *partial;      /* [n_rows, n_slices, 2] */
  uint32_t *counts;       /* [n_rows, SAMPLE_BINS] */
  uint64_t *weights;      /* [n_rows, SAMPLE_BINS] */
  uint64_t *order;        /* [n_rows, SAMPLE_LISTED] */
  uint32_t *listed;       /* [n_rows, SAMPLE_LISTED]: weights */
  int32_t *tokens;        /* [n_rows] */
  int64_t n_vocab, slice; /* ids of a block */
  int64_t aligned;
} sample_rows;

/* A block's place. */
typedef struct {
  int64_t row, begin, end;
  int slice, n_slices;
} sample_place;
KS_DEVICE sample_place sample_place_of(const sample_rows &a) {
  sample_place p;
  p.n_slices = (int)((a.n_vocab + a.slice - 1) / a.slice);
  p.row = blockIdx.x / (unsigned)p.n_slices;
  p.slice = (int)(blockIdx.x % (unsigned)p.n_slices);
  p.begin = p.slice * a.slice;
  p.end = min(p.begin + a.slice, a.n_vocab);
  return p;
}

KS_DEVICE bool sample_truncates_count(const sample_rows &a, const ks_sampler &how) {
  return how.top_k > 0 && how.top_k < a.n_vocab;
}

/* In the block of a row that is the last to come here. */
KS_DEVICE bool sample_is_last(const sample_rows &a, const sample_place &p) {
  return ks_is_last_block(&a.jobs[p.row].n_done, (uint32_t)p.n_slices);
}

KS_DEVICE sample_row sample_row_of(const sample_rows &a, int64_t row, const sample_state &state,
                                   const ks_sampler &how) {
  sample_row r = {a.logits + row * a.n_vocab, a.n_vocab, a.aligned != 0, state.max, 0, 0};
  const float range = fminf(r.max - state.least, SAMPLE_REACH * how.temperature);
  r.rate = fminf(1.0f / how.temperature, 3e38f);
  r.per_bin = range > 0 ? fminf((SAMPLE_BINS - 1) / range, 3e38f) : 0.0f;
  return r;
}

template <class F> KS_DEVICE void sample_slice(const sample_row &r, const sample_place &p, F f) {
  sample_walk<SAMPLE_UNROLL>(r.x, r.aligned, p.begin, p.end, (int)threadIdx.x, SAMPLE_THREADS, f);
}

/* ---------------------------------------------------------------- 1: the largest */

/* The first id of the largest logit in the upper and lower half; all ones: a NaN. The smallest key, turned round. */
KS_DEVICE void sample_ends(const sample_rows &a, int64_t row, uint64_t best, uint32_t smallest) {
  const ks_sampler &how = a.jobs[row].how;
  const uint32_t key = (uint32_t)(best >> 32), low = ~smallest;
  sample_state state = {0, 0, SAMPLE_DONE, SAMPLE_BINS, 0, 0, 0, 0};
  state.max = ks_bits_to_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
  state.least = ks_bits_to_float(low & 0x80000000u ? low ^ 0x80000000u : ~low);
  const bool is_number = best != ~(uint64_t)0 && fabsf(state.max) < INFINITY;
  if (is_number && how.temperature > 0) state.stage = SAMPLE_LIST;
  a.tokens[row] = is_number ? (int32_t) ~(uint32_t)best : -1;
  a.states[row] = state;
}

__global__ void __launch_bounds__(SAMPLE_THREADS)
    sample_largest_kernel(const __grid_constant__ sample_rows a) {
  ks_grid_wait();
  ks_grid_start_next();
  const sample_shared s = sample_share(0);
  const sample_place p = sample_place_of(a);
  const float *x = a.logits + p.row * a.n_vocab;
  uint64_t best = 0, *partial = a.partial + 2 * (p.row * p.n_slices);
  uint32_t smallest = 0;
  for (int b = p.slice * SAMPLE_THREADS + (int)threadIdx.x; b < SAMPLE_BINS; b += p.n_slices * SAMPLE_THREADS)
    a.counts[p.row * SAMPLE_BINS + b] = 0, a.weights[p.row * SAMPLE_BINS + b] = 0;
  sample_walk<SAMPLE_UNROLL>(
      x, a.aligned, p.begin, p.end, (int)threadIdx.x, SAMPLE_THREADS, [&](float v, int64_t i) {
        const uint32_t key = sample_key(v);
        const uint64_t order = v != v ? ~(uint64_t)0 : (uint64_t)key << 32 | (uint32_t)~i;
        best = order > best ? order : best;
        smallest = ~key > smallest ? ~key : smallest;
      });
  best = sample_block_max(best, s.room);
  smallest = sample_block_max(smallest, s.room);
  if (threadIdx.x == 0) partial[2 * p.slice] = best, partial[2 * p.slice + 1] = smallest;
  if (!sample_is_last(a, p)) return;
  for (int i = (int)threadIdx.x; i < p.n_slices; i += SAMPLE_THREADS) {
    const uint64_t one = __ldcg(&partial[2 * i]);
    const uint32_t least = (uint32_t)__ldcg(&partial[2 * i + 1]);
    best = one > best ? one : best;
    smallest = least > smallest ? least : smallest;
  }
  best = sample_block_max(best, s.room);
  smallest = sample_block_max(smallest, s.room);
  if (threadIdx.x == 0) sample_ends(a, p.row, best, smallest);
}

/* ---------------------------------------------------------------- 2: the stretch of the cut */

/* The row's histogram, from all blocks. */
KS_DEVICE void sample_gather(const sample_rows &a, int64_t row, const sample_shared &s) {
  for (int b = (int)threadIdx.x; b < SAMPLE_BINS; b += SAMPLE_THREADS) {
    const uint64_t w = __ldcg(&a.weights[row * SAMPLE_BINS + b]);
    s.count[b] = __ldcg(&a.counts[row * SAMPLE_BINS + b]);
    s.low[b] = (uint32_t)w, s.high[b] = (uint32_t)(w >> 32);
  }
  __syncthreads();
}

/* The row's next stage: its cut lies in stretch `bin`. */
KS_DEVICE void sample_aim(sample_state *state, const sample_shared &s, uint32_t bin, uint64_t need,
                          bool counts) {
  uint64_t before = 0;
  for (uint32_t b = threadIdx.x; b < bin && b < SAMPLE_BINS; b += SAMPLE_THREADS)
    before += (uint64_t)s.high[b] << 32 | s.low[b];
  before = sample_block_sum(before, s.room);
  if (threadIdx.x > 0) return;
  state->stage = bin < SAMPLE_BINS && s.count[bin] > SAMPLE_LISTED ? SAMPLE_ALONE : SAMPLE_LIST;
  state->bin = bin;
  state->need = need;
  state->before = before;
  state->counts = counts;
  state->n_listed = 0;
}

/* Where p of `total` is reached; SAMPLE_BINS: nowhere, all of it is needed. */
KS_DEVICE uint32_t sample_share_bin(const sample_shared &s, float p, uint64_t total, uint64_t *need) {
  uint32_t bin = SAMPLE_BINS;
  *need = sample_share_of(p, total);
  if (*need < total) sample_border(s, false, need, &bin);
  return bin;
}

__global__ void __launch_bounds__(SAMPLE_THREADS)
    sample_histogram_kernel(const __grid_constant__ sample_rows a) {
  ks_grid_wait();
  ks_grid_start_next();
  const sample_shared s = sample_share(SAMPLE_BINS);
  const sample_place p = sample_place_of(a);
  const ks_sampler how = a.jobs[p.row].how;
  sample_state *state = &a.states[p.row];
  const bool by_count = sample_truncates_count(a, how);
  if (state->stage == SAMPLE_DONE || (!by_count && how.top_p >= 1)) return;
  const sample_row r = sample_row_of(a, p.row, *state, how);
  sample_clear(s);
  sample_slice(r, p, [&](float x, int64_t) {
    const uint32_t w = sample_weight(r, x);
    if (!w) return;
    const uint32_t b = sample_bin(r, x);
    atomicAdd(&s.count[b], 1u);
    sample_add(s, b, w);
  });
  __syncthreads();
  for (int b = (int)threadIdx.x; b < SAMPLE_BINS; b += SAMPLE_THREADS) {
    if (s.count[b] == 0) continue;
    atomicAdd(&a.counts[p.row * SAMPLE_BINS + b], s.count[b]);
    atomicAdd((unsigned long long *)&a.weights[p.row * SAMPLE_BINS + b],
              (unsigned long long)s.high[b] << 32 | s.low[b]);
  }
  if (!sample_is_last(a, p)) return;
  sample_gather(a, p.row, s);
  uint64_t need = (uint64_t)how.top_k;
  uint32_t bin = SAMPLE_BINS;
  const bool counts = by_count && sample_border(s, true, &need, &bin);
  if (!counts && how.top_p < 1) bin = sample_share_bin(s, how.top_p, sample_histogram_weight(s), &need);
  sample_aim(state, s, bin, need, counts);
}

/* ---------------------------------------------------------------- 3: the cut and the draw */

KS_DEVICE uint64_t sample_random(const ks_sampler &how) {
  const ks_philox_block b = ks_philox(how.key, 0, how.counter);
  return (uint64_t)b.v[1] << 32 | b.v[0];
}

/* By one block, from the beginning. */
KS_DEVICE int64_t sample_draw_alone(const sample_row &r, const sample_shared &s, const ks_sampler &how) {
  sample_cut cut = {0, UINT32_MAX};
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) { /* top-k, then top-p of what that leaves */
    const int32_t k = pass == 0 && how.top_k < r.n ? how.top_k : 0;
    if (pass == 0 ? k > 0 : how.top_p < 1) cut = sample_keep(r, s, cut, k, how.top_p);
  }
  return sample_locate(r, s, 0, r.n, sample_random(how), true, [&](float x, int64_t id) {
    return sample_kept(cut, sample_key(x), id) ? sample_weight(r, x) : 0u;
  });
}

/* The draw, in a row whose cut is known: `listed` of its tokens are in the list, the weights of those before are in `partial`. */
KS_DEVICE int64_t sample_draw(const sample_rows &a, const sample_place &p, const sample_row &r,
                              const sample_shared &s, const sample_cut &cut, uint32_t listed,
                              const ks_sampler &how) {
  const uint64_t *partial = a.partial + 2 * (p.row * p.n_slices);
  sample_clear(s);
  for (int i = (int)threadIdx.x; i < p.n_slices; i += SAMPLE_THREADS) {
    const uint64_t w = __ldcg(&partial[2 * i]);
    s.low[i] = (uint32_t)w, s.high[i] = (uint32_t)(w >> 32);
  }
  __syncthreads();
  if (threadIdx.x < listed) {
    const uint64_t own = s.order[threadIdx.x];
    const uint32_t id = ~(uint32_t)own;
    if (sample_kept(cut, (uint32_t)(own >> 32), id))
      sample_add(s, (uint32_t)(id / a.slice), __ldcg(&a.listed[p.row * SAMPLE_LISTED + threadIdx.x]));
  }
  __syncthreads();
  uint64_t left = __umul64hi(sample_random(how), sample_histogram_weight(s)) + 1;
  uint32_t slice = 0;
  sample_border(s, false, &left, &slice);
  const int64_t begin = slice * a.slice;
  return sample_locate(r, s, begin, min(begin + a.slice, r.n), left - 1, false, [&](float x, int64_t id) {
    return sample_kept(cut, sample_key(x), id) ? sample_weight(r, x) : 0u;
  });
}

/* The last block of a row: the cut among the listed tokens; then the token, or, where top-p cuts what top-k left in an earlier
 * stretch, one pass more. */
KS_DEVICE void sample_finish(const sample_rows &a, const sample_place &p, const sample_row &r,
                             const sample_shared &s, const ks_sampler &how) {
  sample_state *state = &a.states[p.row];
  const uint32_t listed = state->bin < SAMPLE_BINS ? __ldcg(&state->n_listed) : 0;
  uint32_t w = 0;
  if (threadIdx.x < listed) {
    s.order[threadIdx.x] = __ldcg(&a.order[p.row * SAMPLE_LISTED + threadIdx.x]);
    w = __ldcg(&a.listed[p.row * SAMPLE_LISTED + threadIdx.x]);
    s.weight[threadIdx.x] = state->counts ? 1u : w;
  }
  __syncthreads();
  sample_cut cut = {0, UINT32_MAX};
  if (state->bin < SAMPLE_BINS) cut = sample_cut_in_list(s, listed, state->need);
  if (state->counts && how.top_p < 1) {
    const uint64_t own = threadIdx.x < listed ? s.order[threadIdx.x] : 0;
    const bool kept = threadIdx.x < listed && sample_kept(cut, (uint32_t)(own >> 32), ~(uint32_t)own);
    const uint64_t total = state->before + sample_block_sum(kept ? w : 0, s.room),
                   need = sample_share_of(how.top_p, total);
    if (need <= state->before) {
      uint64_t inside = need;
      uint32_t bin = 0;
      sample_gather(a, p.row, s);
      sample_border(s, false, &inside, &bin);
      sample_aim(state, s, bin, inside, false);
      return;
    }
    if (threadIdx.x < listed) s.weight[threadIdx.x] = w;
    __syncthreads();
    if (need < total) cut = sample_cut_in_list(s, listed, need - state->before);
  }
  const int64_t token = sample_draw(a, p, r, s, cut, listed, how);
  if (threadIdx.x == 0) a.tokens[p.row] = (int32_t)token, state->stage = SAMPLE_DONE;
}

__global__ void __launch_bounds__(SAMPLE_THREADS) sample_draw_kernel(const __grid_constant__ sample_rows a) {
  ks_grid_wait();
  ks_grid_start_next();
  const sample_shared s = sample_share(SAMPLE_BINS);
  const sample_place p = sample_place_of(a);
  const ks_sampler how = a.jobs[p.row].how;
  sample_state *state = &a.states[p.row];
  const int32_t stage = state->stage;
  if (stage == SAMPLE_DONE || (stage == SAMPLE_ALONE && p.slice > 0)) return;
  const sample_row r = sample_row_of(a, p.row, *state, how);
  if (stage == SAMPLE_ALONE) {
    const int64_t token = sample_draw_alone(r, s, how);
    if (threadIdx.x == 0) a.tokens[p.row] = (int32_t)token, state->stage = SAMPLE_DONE;
    return;
  }
  const uint32_t bin = state->bin;
  uint64_t sum = 0;
  sample_slice(r, p, [&](float x, int64_t id) {
    const uint32_t w = sample_weight(r, x);
    if (!w) return;
    const uint32_t b = sample_bin(r, x);
    sum += b < bin ? w : 0;
    if (b != bin) return;
    const int64_t at = p.row * SAMPLE_LISTED + atomicAdd(&state->n_listed, 1u);
    a.order[at] = (uint64_t)sample_key(x) << 32 | (uint32_t)~id;
    a.listed[at] = w;
  });
  sum = sample_block_sum(sum, s.room);
  if (threadIdx.x == 0) a.partial[2 * (p.row * p.n_slices + p.slice)] = sum;
  if (sample_is_last(a, p)) sample_finish(a, p, r, s, how);
}

/* ---------------------------------------------------------------- on the host */

/* How far the rows of a call go. */
typedef struct {
  bool draws, truncates, twice;
} sample_wants;

static ks_status sample_stage_jobs(ks_ctx *ctx, const ks_sample_args *a, sample_job **jobs,
                                   sample_wants *wants) {
  sample_job *host;
  const void *device;
  *wants = {false, false, false};
  KS_TRY(ks_alloc_array(&host, (size_t)a->n_rows, sizeof *host, "sample: samplers"));
  for (int64_t i = 0; i < a->n_rows; i++) {
    const ks_sampler *how = &a->samplers[i];
    const bool draws = how->temperature > 0, by_count = how->top_k > 0 && how->top_k < a->n_vocab;
    host[i].how = *how;
    wants->draws |= draws;
    wants->truncates |= draws && (by_count || how->top_p < 1);
    wants->twice |= draws && by_count && how->top_p < 1;
  }
  const ks_status status = ks_cuda_stage(ctx, host, (size_t)a->n_rows * sizeof *host, &device);
  free(host);
  *jobs = (sample_job *)(uintptr_t)device;
  return status;
}

/* Workspace of n elements, or (room NULL) its size. */
template <class T> static void sample_carve(char *room, size_t *used, T **array, size_t n) {
  *array = room ? (T *)(room + *used) : nullptr;
  *used += (n * sizeof(T) + 255) & ~(size_t)255;
}
static size_t sample_arrays(sample_rows *r, size_t n_rows, size_t n_slices, char *room) {
  size_t used = 0;
  sample_carve(room, &used, &r->tokens, n_rows);
  sample_carve(room, &used, &r->states, n_rows);
  sample_carve(room, &used, &r->partial, n_rows * n_slices * 2);
  sample_carve(room, &used, &r->weights, n_rows * SAMPLE_BINS);
  sample_carve(room, &used, &r->counts, n_rows * SAMPLE_BINS);
  sample_carve(room, &used, &r->order, n_rows * SAMPLE_LISTED);
  sample_carve(room, &used, &r->listed, n_rows * SAMPLE_LISTED);
  return used;
}

/* Ids of a block: rows spread over twice the multiprocessors, at most SAMPLE_BINS blocks a row. */
static int64_t sample_slice_of(ks_ctx *ctx, int64_t n_rows, int64_t n_vocab) {
  const int64_t stretches = (n_vocab + SAMPLE_STRETCH - 1) / SAMPLE_STRETCH,
                wanted = 2 * ks_cuda_device_of(ctx)->n_sm / n_rows,
                slices = wanted < 1 ? 1 : ks_min_i64(ks_min_i64(wanted, SAMPLE_BINS), stretches);
  return (stretches + slices - 1) / slices * SAMPLE_STRETCH;
}

extern "C" ks_status ks_cuda_sample(ks_ctx *ctx, const ks_sample_args *a) {
  sample_rows r;
  sample_wants wants;
  void *room;
  memset((void *)&r, 0, sizeof r);
  r.logits = a->logits;
  r.n_vocab = a->n_vocab;
  r.slice = sample_slice_of(ctx, a->n_rows, a->n_vocab);
  r.aligned = ks_is_vector_aligned(a->logits, a->n_vocab);
  const int64_t n_slices = (a->n_vocab + r.slice - 1) / r.slice;
  KS_TRY(ks_cuda_workspace(ctx, sample_arrays(&r, (size_t)a->n_rows, (size_t)n_slices, NULL), &room));
  sample_arrays(&r, (size_t)a->n_rows, (size_t)n_slices, (char *)room);
  if (a->drawn) r.tokens = a->drawn;
  KS_TRY(sample_stage_jobs(ctx, a, &r.jobs, &wants));
  const dim3 grid(ks_blocks_for(a->n_rows * n_slices, 1)), block(SAMPLE_THREADS);
  KS_TRY(ks_launch_early(ctx, "sample", sample_largest_kernel, grid, block, sample_smem_bytes(0), r));
  if (wants.truncates)
    KS_TRY(ks_launch_early(ctx, "sample_histogram", sample_histogram_kernel, grid, block,
                           sample_smem_bytes(SAMPLE_BINS), r));
  for (int pass = 0; pass < wants.draws + wants.twice; pass++)
    KS_TRY(ks_launch_early(ctx, "sample_draw", sample_draw_kernel, grid, block,
                           sample_smem_bytes(SAMPLE_BINS), r));
  return ks_cuda_deliver(ctx, a->tokens, r.tokens, (size_t)a->n_rows * sizeof *r.tokens);
}
