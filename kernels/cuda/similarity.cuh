/* What the files of the similarity operations share (similarity.cu has the story): the job, the order of
 * scores, lists of the best, norms, and the one kernel that all four operations run in. */
#ifndef KS_CUDA_SIMILARITY_CUH
#define KS_CUDA_SIMILARITY_CUH

#include "kernels/cuda/product.cuh"
#include "kernels/cuda/similarity_list.cuh"

enum { SIM_STRETCH = 64, SIM_SLOTS = 4 }; /* keys of a partial mean; interleaved sums of a norm */

typedef enum { SIM_MATRIX, SIM_TOP, SIM_MEAN, SIM_NEAREST } sim_mode;
typedef enum { SIM_FEW, SIM_MID, SIM_BIG, SIM_STREAM, SIM_TILE, SIM_WIDE, SIM_N_SHAPES } sim_shape;
enum { SIM_SHORT = 32 }; /* longest list of sim_entry */
enum { SIM_TILE_KEYS = 256, SIM_TILE_QUERIES = 128, SIM_TILE_STAGES = 3 };
enum { SIM_STREAM_KEYS = 16, SIM_STREAM_QUERIES = 8, SIM_STREAM_WARPS = 8, SIM_STREAM_STAGES = 5 };
/* Keys and queries of a tile (SIM_STREAM: of a warp), stages of its product. */
KS_HOST_DEVICE constexpr int sim_bm(int shape) {
  return shape == SIM_FEW                         ? 64
         : shape == SIM_STREAM                    ? (int)SIM_STREAM_KEYS
         : shape == SIM_TILE || shape == SIM_WIDE ? (int)SIM_TILE_KEYS
                                                  : 128;
}
KS_HOST_DEVICE constexpr int sim_bn(int shape) {
  return shape == SIM_FEW || shape == SIM_STREAM ? 8 : shape == SIM_MID ? 32 : 128;
}
KS_HOST_DEVICE constexpr int sim_stages(int shape) {
  return shape == SIM_FEW ? 6 : shape == SIM_MID ? 3 : 2;
}
/* Queries of SIM_NEAREST: those of the job, row `first` of k, or the farthest that the launch before found.
 */
typedef enum { SIM_PICK_NONE, SIM_PICK_FIRST, SIM_PICK_FARTHEST } sim_pick;

struct sim_partial {
  double sum;
  int64_t count;
};
/* A key and its largest similarity to the chosen; index -1: no key. */
struct sim_far {
  int64_t index;
  double value;
};

struct sim_job {
  product_rows q, k;
  const float *q_scales, *k_scales;    /* of I8 rows, or NULL */
  const double *q_factors, *k_factors; /* made by sim_prepare_kernel, or NULL: made here */
  float *s;                            /* MATRIX: [n_q, n_k] */
  float *list_scores;                  /* TOP: [n_q, n_parts, best_k] */
  uint32_t *list_index;                /* the same, counted from the part's first key */
  sim_entry *entries;                  /* TOP, short lists: [n_q, n_parts, best_k] */
  uint32_t *floors; /* SIM_WIDE: [n_q, n_parts], what parts tell each other; zeros before */
  float *scores;    /* TOP: [n_q, best_k] */
  int64_t *index;
  const int32_t *groups, *query_groups; /* MEAN: or both NULL */
  sim_partial *partial;                 /* [n_q, n_stretches] */
  double *mean;
  int64_t *count;
  float *nearest;        /* NEAREST: [n_k]; NaN: taken */
  const sim_far *far_in; /* [n_far] of the launch before */
  sim_far *far_out;      /* [n_parts] */
  int64_t *picked;       /* [pick_number] is written */
  unsigned *arrivals;    /* [n_q_tiles] zeros, left so */
  int64_t n_parts, tiles_per_part, n_q_tiles;
  int64_t k_rows; /* keys to look at: all, or none (the last pick) */
  int64_t k_size; /* bytes of an element of k */
  int64_t first, pick_number, n_far;
  int32_t mode, pick, is_cosine, is_fresh; /* fresh: nearest holds nothing yet */
  int32_t best_k, lists_in_smem;
  int32_t is_finished_here, none; /* by the last block of a tile of queries; else by a kernel of its own */
};

/* The argument of a kernel as it lies, without a copy in local memory when a function that is not inlined looks at it. */
#ifdef KS_CUDA_ON_CPU
#define SIM_JOB const sim_job
#else
#define SIM_JOB const __grid_constant__ sim_job
#endif

/* ---------------------------------------------------------------- scores */

/* Numbers fall, NaN comes last: whether score b of a later key goes before score a of an earlier one. */
KS_DEVICE bool sim_beats(float b, float a) {
  return b > a || (a != a && b == b);
}

/* Factors of rows: 1 / norm, signed by the row's scale, or the scale. As float where the product of two
 * cannot leave the range; else infinity, which sends sim_score to the exact ones. */
KS_DEVICE float sim_float_factor(double f) {
  const double size = fabs(f);
  return size == 0.0 || (size >= 0x1p-60 && size <= 0x1p60) ? (float)f : INFINITY;
}
/* Never -0, so that equal scores have equal bits. */
KS_DEVICE float sim_score(float dot, float gq, float gk, double fq, double fk) {
  const float g = gq * gk;
  return fabsf(g) < INFINITY ? fmaf(dot, g, 0.0f) : (float)((double)dot * (fq * fk)) + 0.0f;
}

/* ---------------------------------------------------------------- norms */

/* hi + lo += p without loss. */
KS_DEVICE void sim_add(float *hi, float *lo, float p) {
  const float t = __fadd_rn(*hi, p), b = __fsub_rn(t, *hi);
  *lo = __fadd_rn(*lo, __fadd_rn(__fsub_rn(*hi, __fsub_rn(t, b)), __fsub_rn(p, b)));
  *hi = t;
}
/* Adds the squares of a chunk of float32, with their errors. */
KS_DEVICE void sim_add_squares(float *hi, float *lo, const float x[PRODUCT_CHUNK]) {
#pragma unroll
  for (int e = 0; e < PRODUCT_CHUNK; e++) {
    const float p = __fmul_rn(x[e], x[e]);
    *lo = __fadd_rn(*lo, fmaf(x[e], x[e], -p));
    sim_add(hi, lo, p);
  }
}

/* Squares of 16 rows of bf16 by tensor cores: the diagonal of the rows' product with themselves, whose operands
 * are both the fragments of the rows. Four lanes share a row; one of them holds the diagonal. */
struct sim_squares {
  float hi[2], lo[2]; /* rows lane / 4 and lane / 4 + 8 */

  KS_DEVICE void clear() { hi[0] = hi[1] = lo[0] = lo[1] = 0.0f; }
  /* The squares of 16 columns, to those of the lanes that hold a diagonal. */
  static KS_DEVICE void square(const uint32_t a[4], float s[2]) {
    const bool odd = (int)threadIdx.x / 4 % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const uint32_t b[2] = {a[half], a[2 + half]};
      ks_mma_bf16(d, a, b);
      s[half] = odd ? d[2 * half + 1] : d[2 * half];
    }
  }
  /* 64 columns: four products of 16, added as a tree. */
  KS_DEVICE void add_sums(const float s[4][2]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      sim_add(&hi[half], &lo[half],
              __fadd_rn(__fadd_rn(s[0][half], s[1][half]), __fadd_rn(s[2][half], s[3][half])));
  }
  KS_DEVICE void add(const uint32_t a[4][4]) {
    float s[4][2];
#pragma unroll
    for (int k = 0; k < 4; k++)
      square(a[k], s[k]);
    add_sums(s);
  }
  /* The same of a stage's rows; n_rows: of those from here on, at least 1. */
  KS_DEVICE void add_stage(const uint4 *rows, int n_rows) {
    const int lane = (int)threadIdx.x % KS_WARP, row = lane % 16 < n_rows ? lane % 16 : lane % 8;
    float s[4][2];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      asm volatile("" ::: "memory"); /* fragments of one product at a time */
      uint32_t a[4];
      ks_ldmatrix_x4(a, rows + product_unit(row, 2 * k + lane / 16));
      square(a, s[k]);
    }
    add_sums(s);
  }
  /* To all lanes of a row. */
  KS_DEVICE void spread() {
    const int lane = (int)threadIdx.x % KS_WARP, from = lane / 4 * 4 + lane / 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      hi[half] = __shfl_sync(KS_FULL_MASK, hi[half], from);
      lo[half] = __shfl_sync(KS_FULL_MASK, lo[half], from);
    }
  }
};

/* The squares of chunks slot, slot + 4, ... of a row in double, where float32 squares leave their range or
 * are all 0. */
static __device__ __noinline__ double sim_squares_in_double(const void *p, int dtype, int64_t row,
                                                            int64_t n_cols, int slot) {
  double sum = 0.0;
  for (int64_t col = slot * PRODUCT_CHUNK; col < n_cols; col += SIM_SLOTS * PRODUCT_CHUNK)
    for (int64_t i = row * n_cols + col; i < row * n_cols + n_cols && i < row * n_cols + col + PRODUCT_CHUNK;
         i++) {
      const double x = dtype == KS_DTYPE_F32    ? (double)((const float *)p)[i]
                       : dtype == KS_DTYPE_BF16 ? (double)ks_to_float(((const ks_bf16 *)p)[i])
                                                : (double)((const int8_t *)p)[i];
      sum = fma(x, x, sum);
    }
  return sum;
}

/* The factor of a row from its sum, which the four neighbouring lanes of a row all hold, or (is_split) each a part of.
 * All lanes call. */
KS_DEVICE double sim_factor(const product_rows &r, int64_t row, float hi, float lo, bool is_split,
                            const float *scales) {
  const bool is_row = row < r.n_rows, is_far = is_row && !(hi > 0x1p-90f && hi < 0x1p126f);
  const int slot = (int)threadIdx.x % SIM_SLOTS;
  double whole = (double)hi + (double)lo, sum = whole;
  if (is_far) sum = sim_squares_in_double(r.p, r.dtype, row, r.n_cols, slot);
  sum += __shfl_xor_sync(KS_FULL_MASK, sum, 1);
  sum += __shfl_xor_sync(KS_FULL_MASK, sum, 2);
  if (!is_split && !is_far) sum = whole;
  const float scale = is_row && scales ? scales[row] : 1.0f;
  if (!(sum < (double)INFINITY) || !(fabsf(scale) < INFINITY)) return (double)NAN;
  if (sum == 0.0 || scale == 0.0f) return 0.0;
  const double inverse = 1.0 / sqrt(sum);
  return scale < 0.0f ? -inverse : inverse;
}

/* Sums of squares of the rows of one operand, taken from the stages of a product: N of them a thread, of rows
 * row(i), which the four neighbouring lanes share. */
template <class P, int ROWS, class E = typename P::element> struct sim_norms;
template <class P, int ROWS> struct sim_norms<P, ROWS, float> {
  enum { N = (ROWS * SIM_SLOTS + P::THREADS - 1) / P::THREADS };
  float hi[N], lo[N];

  static KS_DEVICE int row(int i) { return (int)threadIdx.x / SIM_SLOTS + i * (P::THREADS / SIM_SLOTS); }
  KS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < N; i++)
      hi[i] = lo[i] = 0.0f;
  }
  KS_DEVICE void add(const uint4 *stage) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      float x[PRODUCT_CHUNK];
      if (row(i) >= ROWS) break;
      product_element<float>::get(x, stage, row(i), (int)threadIdx.x % SIM_SLOTS);
      sim_add_squares(&hi[i], &lo[i], x);
    }
  }
  KS_DEVICE void end() {}
  KS_DEVICE double factor(int i, const product_rows &r, int64_t at, const float *scales) const {
    return sim_factor(r, at, hi[i], lo[i], true, scales);
  }
};
template <class P, int ROWS> struct sim_norms<P, ROWS, ks_bf16> {
  enum {
    WARPS = P::THREADS / KS_WARP,
    GROUPS = (ROWS + 16 * WARPS - 1) / (16 * WARPS), /* of 16 rows a warp */
    N = 2 * GROUPS
  };
  sim_squares of[GROUPS];

  static KS_DEVICE int first(int group) { return ((int)threadIdx.x / KS_WARP + group * WARPS) * 16; }
  static KS_DEVICE int row(int i) {
    const int row = first(i / 2) + (int)threadIdx.x % KS_WARP / SIM_SLOTS + i % 2 * 8;
    return row < ROWS ? row : ROWS;
  }
  KS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      of[i].clear();
  }
  KS_DEVICE void add(const uint4 *stage) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      if (first(i) < ROWS) of[i].add_stage(stage + first(i) * PRODUCT_UNITS, ROWS - first(i));
  }
  KS_DEVICE void end() {
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      of[i].spread();
  }
  KS_DEVICE double factor(int i, const product_rows &r, int64_t at, const float *scales) const {
    return sim_factor(r, at, of[i / 2].hi[i % 2], of[i / 2].lo[i % 2], false, scales);
  }
};
/* Of both operands, as the hook of a product. */
template <class P> struct sim_both_norms {
  sim_norms<P, P::BM> a;
  sim_norms<P, P::BN> b;
  bool of_a, of_b;

  KS_DEVICE sim_both_norms(bool wants_a, bool wants_b) : of_a(wants_a), of_b(wants_b) {
    a.clear();
    b.clear();
  }
  template <class> KS_DEVICE void stage(const uint4 *of_keys, const uint4 *of_queries) {
    if (of_a) a.add(of_keys);
    if (of_b) b.add(of_queries);
  }
  KS_DEVICE void end() {
    a.end();
    b.end();
  }
};

/* ---------------------------------------------------------------- lists of the best */

/* Puts (score, index) into the falling list of n entries, one more than before or best_k; it beats the last
 * of a full list, and its index is above those of equal scores. For one warp. */
template <class I>
KS_DEVICE void sim_insert(float *scores, I *index, int n, int best_k, float score, I at, int lane) {
  int place = 0;
  for (int base = 0; base < n; base += KS_WARP) {
    const int i = base + lane;
    const unsigned before = __ballot_sync(KS_FULL_MASK, i < n && !sim_beats(score, scores[i < n ? i : 0]));
    place += __popc(before);
    if (before != KS_FULL_MASK) break;
  }
  const int last = n < best_k ? n : best_k - 1;
  for (int base = (last - 1) / KS_WARP * KS_WARP; last > 0 && base >= 0 && base + KS_WARP > place;
       base -= KS_WARP) {
    const int i = base + lane;
    const bool moves = i >= place && i < last;
    const float s = moves ? scores[i] : 0.0f;
    const I j = moves ? index[i] : 0;
    __syncwarp();
    if (moves) scores[i + 1] = s, index[i + 1] = j;
    __syncwarp();
  }
  if (lane == 0) scores[place] = score, index[place] = at;
  __syncwarp();
}

/* Offers 32 scores, lane by lane, to a list of *n entries; returns whether any went in. */
template <class I>
KS_DEVICE bool sim_offer(float *scores, I *index, int *n, int best_k, bool is_there, float score, I at,
                         int lane) {
  float worst = *n == best_k ? scores[best_k - 1] : 0.0f;
  unsigned mask = __ballot_sync(KS_FULL_MASK, is_there && (*n < best_k || sim_beats(score, worst)));
  const bool any = mask != 0;
  while (mask) {
    const int from = __ffs((int)mask) - 1;
    const float s = __shfl_sync(KS_FULL_MASK, score, from);
    const I i = __shfl_sync(KS_FULL_MASK, at, from);
    mask &= mask - 1;
    if (*n == best_k && !sim_beats(s, worst)) continue;
    sim_insert(scores, index, *n, best_k, s, i, lane);
    *n += *n < best_k;
    worst = scores[best_k - 1 < *n ? best_k - 1 : *n - 1];
  }
  return any;
}

/* Entry i of query q's best, of all lists of one warp. */
KS_DEVICE void sim_put_best(const sim_job &j, int64_t q, sim_entry best, int lane) {
  if (lane >= j.best_k) return;
  j.scores[q * j.best_k + lane] = best ? sim_entry_score(best) : -INFINITY;
  j.index[q * j.best_k + lane] = best ? sim_entry_index(best) : -1;
}

/* Keys of a part. */
KS_DEVICE int64_t sim_part_begin(const sim_job &j, int64_t part, int bm) {
  const int64_t at = part * j.tiles_per_part * bm;
  return at < j.k_rows ? at : j.k_rows;
}

/* Place `place` of part p's list of query q; 0: none. */
KS_DEVICE sim_entry sim_list_entry(const sim_job &j, int64_t q, int64_t p, int bm, int place) {
  const int64_t begin = sim_part_begin(j, p, bm), left = sim_part_begin(j, p + 1, bm) - begin,
                from = (q * j.n_parts + p) * j.best_k + place;
  if (p >= j.n_parts || place >= j.best_k || place >= left) return 0;
  return sim_entry_of(__ldcg(j.list_scores + from), (uint32_t)begin + __ldcg(j.list_index + from));
}
/* The lists of query q's parts, out; best_k <= 32. Four go side by side, 16 are read at once. */
[[maybe_unused]] static __device__ __noinline__ void sim_merge_short(const sim_job &j, int64_t q, int bm,
                                                                     int lane) {
  enum { SIDE = 4, AHEAD = 4 };
  sim_entry best[SIDE] = {0, 0, 0, 0};
  for (int64_t p0 = 0; p0 < j.n_parts; p0 += SIDE * AHEAD) {
    sim_entry x[AHEAD][SIDE];
#pragma unroll
    for (int i = 0; i < SIDE * AHEAD; i++)
      x[i / SIDE][i % SIDE] = sim_list_entry(j, q, p0 + i, bm, KS_WARP - 1 - lane);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      sim_join<SIDE>(best, x[i], lane);
  }
  sim_entry rest[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    rest[i] = __shfl_sync(KS_FULL_MASK, best[2 + i], KS_WARP - 1 - lane);
  sim_join<2>(best, rest, lane);
  rest[0] = __shfl_sync(KS_FULL_MASK, best[1], KS_WARP - 1 - lane);
  sim_join<1>(best, rest, lane);
  sim_put_best(j, q, best[0], lane);
}

/* The lists of query q's parts, in their order, into scores and index (room for best_k; index counts all
 * keys), then out. */
KS_DEVICE void sim_merge(const sim_job &j, int64_t q, int bm, float *scores, int64_t *index, int lane) {
  enum { AHEAD = 4 };
  int n = 0;
  if (j.best_k <= SIM_SHORT && j.k.n_rows < UINT32_MAX) {
    sim_merge_short(j, q, bm, lane);
    return;
  }
  for (int64_t p0 = 0; p0 < j.n_parts; p0 += AHEAD) {
    float s[AHEAD];
    uint32_t at[AHEAD];
    int64_t begin[AHEAD], has[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      begin[i] = sim_part_begin(j, p0 + i, bm);
      has[i] = p0 + i < j.n_parts ? sim_part_begin(j, p0 + i + 1, bm) - begin[i] : 0;
      has[i] = has[i] < j.best_k ? has[i] : j.best_k;
      const int64_t from = (q * j.n_parts + p0 + i) * j.best_k + lane;
      s[i] = lane < has[i] ? __ldcg(j.list_scores + from) : 0.0f;
      at[i] = lane < has[i] ? __ldcg(j.list_index + from) : 0u;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int64_t from = (q * j.n_parts + p0 + i) * j.best_k;
      bool more =
          sim_offer(scores, index, &n, j.best_k, lane < has[i], s[i], begin[i] + (int64_t)at[i], lane);
      for (int64_t base = KS_WARP; more && base < has[i]; base += KS_WARP) {
        const bool is_there = base + lane < has[i];
        const float score = is_there ? __ldcg(j.list_scores + from + base + lane) : 0.0f;
        const int64_t index_of =
            begin[i] + (is_there ? (int64_t)__ldcg(j.list_index + from + base + lane) : 0);
        more = sim_offer(scores, index, &n, j.best_k, is_there, score, index_of, lane);
      }
    }
  }
  for (int i = lane; i < j.best_k; i += KS_WARP) {
    j.scores[q * j.best_k + i] = i < n ? scores[i] : -INFINITY;
    j.index[q * j.best_k + i] = i < n ? index[i] : -1;
  }
  __syncwarp();
}

/* The stretches of query q: 32 chains in rising order, then a tree. */
KS_DEVICE void sim_mean(const sim_job &j, int64_t q, int lane) {
  const int64_t n = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
  double sum = 0.0, count = 0.0; /* counts are exact */
#pragma unroll 4
  for (int64_t i = lane; i < n; i += KS_WARP) {
    sum += __ldcg(&j.partial[q * n + i].sum);
    count += (double)__ldcg((const long long *)&j.partial[q * n + i].count);
  }
  sum = ks_warp_sum(sum);
  count = ks_warp_sum(count);
  if (lane != 0) return;
  j.mean[q] = count > 0.0 ? sum / count : (double)NAN;
  j.count[q] = (int64_t)count;
}

/* ---------------------------------------------------------------- farthest first */

KS_DEVICE void sim_nearer(sim_far *best, sim_far x) {
  if (x.index >= 0 &&
      (best->index < 0 || x.value < best->value || (x.value == best->value && x.index < best->index)))
    *best = x;
}
/* Over all threads of a block; every thread gets the result. room: [32]. */
KS_DEVICE sim_far sim_block_farthest(sim_far x, sim_far *room) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP,
            n = (int)blockDim.x / KS_WARP;
  for (int round = 0; round < 2; round++) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      sim_far y;
      y.index = __shfl_xor_sync(KS_FULL_MASK, x.index, d);
      y.value = __shfl_xor_sync(KS_FULL_MASK, x.value, d);
      sim_nearer(&x, y);
    }
    if (round == 1) break;
    if (lane == 0) room[warp] = x;
    __syncthreads();
    x.index = -1;
    if (lane < n) x = room[lane];
  }
  __syncthreads();
  return x;
}

/* ---------------------------------------------------------------- launches */

/* Bytes of a block's shared memory (sim_shared) with n_list entries of lists. */
static inline size_t sim_smem_bytes(sim_shape shape, int64_t n_list) {
  const size_t bm = (size_t)sim_bm(shape), bn = (size_t)sim_bn(shape), n = (size_t)n_list;
  return ks_smem_bytes<uint4>((size_t)sim_stages(shape) * (bm + bn) * PRODUCT_UNITS) +
         ks_smem_bytes<double>(bm) + ks_smem_bytes<double>(bn) + 2 * ks_smem_bytes<float>(bm) +
         2 * ks_smem_bytes<float>(bn) + ks_smem_bytes<int32_t>(bm) + ks_smem_bytes<sim_far>(KS_WARP) +
         ks_smem_bytes<float>(n) + ks_smem_bytes<uint32_t>(n);
}

/* Of sim_best (similarity_many.cuh). */
static inline size_t sim_best_bytes(size_t n_queries) {
  return 2 * ks_smem_bytes<sim_entry>(n_queries * SIM_SHORT) + ks_smem_bytes<int>(n_queries) +
         ks_smem_bytes<float>(n_queries);
}
static inline size_t sim_tile_smem_bytes(bool is_top) {
  const size_t bm = SIM_TILE_KEYS, bn = SIM_TILE_QUERIES;
  return ks_smem_bytes<uint4>((size_t)SIM_TILE_STAGES * (bm + bn) * PRODUCT_UNITS) +
         2 * ks_smem_bytes<float>(bm) + 2 * ks_smem_bytes<float>(bn) + ks_smem_bytes<int32_t>(2) +
         (is_top ? sim_best_bytes(bn) : 0);
}

static inline size_t sim_stream_smem_bytes(bool is_top, int64_t n_queries, int64_t n_cols) {
  const size_t warps = SIM_STREAM_WARPS, n = (size_t)n_queries,
               units = ((size_t)n_cols + 63) / 64 * PRODUCT_UNITS;
  return ks_smem_bytes<uint4>(warps * SIM_STREAM_STAGES * SIM_STREAM_KEYS * PRODUCT_UNITS) +
         ks_smem_bytes<uint4>(n * units) + ks_smem_bytes<double>(SIM_STREAM_QUERIES) +
         ks_smem_bytes<float>(SIM_STREAM_QUERIES) + ks_smem_bytes<float>(warps * SIM_STREAM_QUERIES) +
         (is_top
              ? ks_smem_bytes<sim_entry>(warps * n * KS_WARP) + ks_smem_bytes<sim_entry>(warps * 2 * KS_WARP)
              : 0);
}

/* Up to 8 bf16 queries and bf16 rows, as they lie: the whole operation in n_parts blocks. Matrix, or short lists. */
ks_status sim_launch_stream(ks_ctx *ctx, const char *op, const sim_job *j);
/* Many bf16 rows, factors prepared, short lists. */
ks_status sim_launch_tile(ks_ctx *ctx, const char *op, const sim_job *j);
/* The same by wgmma, on a device that has it. */
ks_status sim_launch_wide(ks_ctx *ctx, const char *op, const sim_job *j);
size_t sim_wide_smem_bytes(bool is_top);
/* On tensor cores (bf16 and I8 rows) or in plain fma (any), of n_parts * n_q_tiles blocks. is_any: rows may
 * have to be converted on the way; with SIM_BIG those of k only. */
ks_status sim_launch_mma(ks_ctx *ctx, const char *op, sim_shape shape, bool is_any, const sim_job *j);
ks_status sim_launch_simt(ks_ctx *ctx, const char *op, sim_shape shape, bool is_any, const sim_job *j);

#endif
