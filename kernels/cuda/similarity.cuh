/* What the files of the similarity operations share (similarity.cu has the story): the job, the order of
 * scores, lists of the best, norms, and the one kernel that all four operations run in. */
#ifndef KS_CUDA_SIMILARITY_CUH
#define KS_CUDA_SIMILARITY_CUH

#include "kernels/cuda/product.cuh"
#include "kernels/cuda/similarity_list.cuh"

enum { SIM_STRETCH = 64, SIM_SLOTS = 4 }; /* keys of a partial mean; interleaved sums of a norm */

typedef enum { SIM_MATRIX, SIM_TOP, SIM_MEAN, SIM_NEAREST } sim_mode;
typedef enum { SIM_FEW, SIM_MID, SIM_BIG, SIM_STREAM, SIM_TILE, SIM_WIDE, SIM_N_SHAPES } sim_shape;
enum { SIM_SHORT = 32 }; /* longest list that a warp holds */
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
/* Whether the kernel can turn what its blocks leave into results. */
KS_HOST_DEVICE constexpr bool sim_may_finish(int shape) {
  return shape == SIM_FEW || shape == SIM_MID || shape == SIM_STREAM;
}
/* Queries of SIM_NEAREST: those of the job, row `first` of k, or the farthest that the launch before found.
 */
typedef enum { SIM_PICK_NONE, SIM_PICK_FIRST, SIM_PICK_FARTHEST } sim_pick;

/* Of a stretch: sum 2^(e - 183), e the largest exponent field of a score. 255: the bits of a float32 that is no number. */
struct sim_partial {
  int64_t sum;
  int32_t e, count;
};
/* A key and its largest similarity to the chosen; index -1: no key. */
struct sim_far {
  int64_t index;
  double value;
};

struct sim_job {
  product_rows q, k;
  const float *q_scales, *k_scales;               /* of I8 rows, or NULL */
  const struct sim_factor *q_factors, *k_factors; /* made by sim_prepare_kernel, or NULL: made here */
  float *s;                                       /* MATRIX: [n_q, n_k] */
  sim_entry *entries; /* TOP: lists of parts [n_q, n_parts, best_k], ended by zeros */
  uint32_t *floors;   /* SIM_WIDE: [n_q, n_parts], what parts tell each other; zeros before */
  float *scores;      /* TOP: [n_q, best_k] */
  int64_t *index;
  const int32_t *groups, *query_groups; /* MEAN: or both NULL */
  const int64_t *except;                /* MEAN: or NULL */
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

/* MEAN: the group of a query, and the key that it leaves out; of rows that are no queries too. */
struct sim_own {
  int64_t except;
  int32_t group;

  KS_DEVICE sim_own(const sim_job &j, int64_t q) {
    const bool is_query = q < j.q.n_rows;
    group = j.groups && is_query ? j.query_groups[q] : 0;
    except = j.except && is_query ? j.except[q] : -1;
  }
  KS_DEVICE bool takes(const sim_job &j, int64_t k, int32_t group_of_key) const {
    return k < j.k.n_rows && group_of_key == group && k != except;
  }
};

/* The argument of a kernel as it lies, without a copy in local memory when a function that is not inlined looks at it. */
#ifdef KS_CUDA_ON_CPU
#define SIM_JOB const sim_job
#else
#define SIM_JOB const __grid_constant__ sim_job
#endif

/* ---------------------------------------------------------------- scores */

/* m 2^e of a row: 1 / norm, signed by its scale, or the scale. e is 0 unless m would leave 2^-60 .. 2^60, within which
 * products of two stay in float32's range. */
struct sim_factor {
  float m;
  int32_t e;
};
KS_DEVICE sim_factor sim_factor_of_scale(float scale) {
  const float size = fabsf(scale);
  sim_factor f = {scale, 0};
  if ((size > 0.0f && size < 0x1p-60f) || (size > 0x1p60f && size < INFINITY)) f.m = frexpf(scale, &f.e);
  return f;
}
/* Of a row whose factor was prepared (NULL: was not), or is its scale. */
KS_DEVICE sim_factor sim_known_factor(const sim_factor *prepared, const float *scales, int64_t row,
                                      int64_t n_rows) {
  const sim_factor none = {0.0f, 0};
  if (row >= n_rows) return none;
  return prepared ? prepared[row] : sim_factor_of_scale(scales ? scales[row] : 1.0f);
}

[[maybe_unused]] static __device__ __noinline__ float sim_far_score(float dot, float mq, float mk, int e) {
  return (float)ldexp((double)dot * ((double)mq * (double)mk), e) + 0.0f;
}
/* A zero is never -0, so that equal scores have equal bits. */
KS_DEVICE float sim_score(float dot, sim_factor q, sim_factor k) {
  return (q.e | k.e) == 0 ? fmaf(dot, q.m * k.m, 0.0f) : sim_far_score(dot, q.m, k.m, q.e + k.e);
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

/* 1 / sqrt(hi + lo) to 1 u, without float64, which many GPUs have at a 64th of the rate: one step of Newton on the
 * machine's approximation, the remainder in two floats. hi within 2^-90 .. 2^100. */
KS_DEVICE float sim_inverse_root(float hi, float lo) {
  const float y = rsqrtf(hi), p = __fmul_rn(y, y), rest = fmaf(y, y, -p);
  const float e = fmaf(-lo, p, fmaf(-hi, rest, fmaf(-hi, p, 1.0f)));
  return fmaf(0.5f * y, e, y);
}
/* Beyond that, or of a row of zeros: the squares again in double. For a warp, with lanes that ask for nothing. */
[[maybe_unused]] static __device__ __noinline__ sim_factor sim_far_factor(const void *p, int dtype,
                                                                          int64_t row, int64_t n_cols,
                                                                          bool asks) {
  double sum = 0.0;
  for (int64_t col = (int)threadIdx.x % SIM_SLOTS; asks && col < n_cols; col += SIM_SLOTS) {
    const int64_t i = row * n_cols + col;
    const double x = dtype == KS_DTYPE_F32    ? (double)((const float *)p)[i]
                     : dtype == KS_DTYPE_BF16 ? (double)ks_to_float(((const ks_bf16 *)p)[i])
                                              : (double)((const int8_t *)p)[i];
    sum = fma(x, x, sum);
  }
  sum += __shfl_xor_sync(KS_FULL_MASK, sum, 1);
  sum += __shfl_xor_sync(KS_FULL_MASK, sum, 2);
  sim_factor f = {sum == 0.0 ? 0.0f : NAN, 0};
  if (sum > 0.0 && sum < (double)INFINITY) {
    const double inverse = 1.0 / sqrt(sum), m = frexp(inverse, &f.e);
    f.m = (float)m;
    if (f.e > -60 && f.e <= 60) f.m = (float)inverse, f.e = 0;
  }
  return f;
}

/* The factor of a row from its sum, which the four neighbouring lanes of a row all hold, or (is_split) each a part of.
 * All lanes of a warp call. */
KS_DEVICE sim_factor sim_norm_factor(const product_rows &r, int64_t row, float hi, float lo, bool is_split,
                                     const float *scales) {
  const bool is_row = row < r.n_rows;
  if (is_split)
#pragma unroll
    for (int d = 1; d < SIM_SLOTS; d *= 2) {
      const float more = __shfl_xor_sync(KS_FULL_MASK, hi, d);
      lo = __fadd_rn(lo, __shfl_xor_sync(KS_FULL_MASK, lo, d));
      sim_add(&hi, &lo, more);
    }
  const bool is_far = is_row && !(hi > 0x1p-90f && hi < 0x1p100f);
  sim_factor f = {is_row ? sim_inverse_root(hi, lo) : 0.0f, 0};
  if (__any_sync(KS_FULL_MASK, is_far)) {
    const sim_factor far = sim_far_factor(r.p, r.dtype, row, r.n_cols, is_far);
    if (is_far) f = far;
  }
  const float scale = is_row && scales ? scales[row] : 1.0f;
  if (!(fabsf(scale) < INFINITY)) f.m = NAN, f.e = 0;
  if (scale == 0.0f && f.m == f.m) f.m = 0.0f, f.e = 0;
  if (scale < 0.0f) f.m = -f.m;
  return f;
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
  KS_DEVICE sim_factor factor(int i, const product_rows &r, int64_t at, const float *scales) const {
    return sim_norm_factor(r, at, hi[i], lo[i], true, scales);
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
  KS_DEVICE sim_factor factor(int i, const product_rows &r, int64_t at, const float *scales) const {
    return sim_norm_factor(r, at, of[i / 2].hi[i % 2], of[i / 2].lo[i % 2], false, scales);
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

/* Lists longer than a warp. Puts x into the falling list of n entries, one more than before or best_k; it goes before the
 * last of a full list. For one warp. */
KS_DEVICE void sim_insert(sim_entry *list, int n, int best_k, sim_entry x, int lane) {
  int place = 0;
  for (int base = 0; base < n; base += KS_WARP) {
    const int i = base + lane;
    const unsigned before = __ballot_sync(KS_FULL_MASK, i < n && list[i < n ? i : 0] > x);
    place += __popc(before);
    if (before != KS_FULL_MASK) break;
  }
  const int last = n < best_k ? n : best_k - 1;
  for (int base = (last - 1) / KS_WARP * KS_WARP; last > 0 && base >= 0 && base + KS_WARP > place;
       base -= KS_WARP) {
    const int i = base + lane;
    const bool moves = i >= place && i < last;
    const sim_entry moved = moves ? list[i] : 0;
    __syncwarp();
    if (moves) list[i + 1] = moved;
    __syncwarp();
  }
  if (lane == 0) list[place] = x;
  __syncwarp();
}

/* Offers 32 entries (0: none), lane by lane, to a list of *n; returns whether any went in. */
KS_DEVICE bool sim_offer(sim_entry *list, int *n, int best_k, sim_entry x, int lane) {
  sim_entry worst = *n == best_k ? list[best_k - 1] : 0;
  unsigned mask = __ballot_sync(KS_FULL_MASK, x > worst);
  const bool any = mask != 0;
  for (; mask; mask &= mask - 1) {
    const sim_entry next = __shfl_sync(KS_FULL_MASK, x, __ffs((int)mask) - 1);
    if (next < worst) continue;
    sim_insert(list, *n, best_k, next, lane);
    *n += *n < best_k;
    worst = *n == best_k ? list[best_k - 1] : 0;
  }
  return any;
}

/* Entry i of query q's best, of all lists of one warp. */
KS_DEVICE void sim_put_best(const sim_job &j, int64_t q, sim_entry best, int lane) {
  if (lane >= j.best_k) return;
  j.scores[q * j.best_k + lane] = best ? sim_entry_score(best) : -INFINITY;
  j.index[q * j.best_k + lane] = best ? sim_entry_index(best) : -1;
}

/* The short lists of queries [q0, q0 + n), n of them of WARPS warps, N a warp at once, out. room: [64], of the warp. */
template <int WARPS, int N>
KS_DEVICE void sim_gather_tile(const sim_job &j, int64_t q0, int n_queries, int32_t *room, int warp,
                               int lane) {
  const int64_t size = j.n_parts * j.best_k; /* of a query's lists */
  if (j.n_parts > KS_WARP) {
    for (int n = warp; n < n_queries; n += WARPS)
      sim_put_best(j, q0 + n, sim_gather(j.entries + (q0 + n) * size, j.n_parts, j.best_k, room, lane), lane);
    return;
  }
  for (int n0 = warp; n0 < n_queries; n0 += N * WARPS) {
    const sim_entry *from[N];
    sim_entry best[N];
#pragma unroll
    for (int i = 0; i < N; i++)
      from[i] = j.entries + (q0 + min(n0 + i * WARPS, n_queries - 1)) * size;
    sim_gather_few<N>(best, from, j.n_parts, j.best_k, lane);
#pragma unroll
    for (int i = 0; i < N; i++)
      if (n0 + i * WARPS < n_queries) sim_put_best(j, q0 + n0 + i * WARPS, best[i], lane);
  }
}

/* Keys of a part. */
KS_DEVICE int64_t sim_part_begin(const sim_job &j, int64_t part, int bm) {
  const int64_t at = part * j.tiles_per_part * bm;
  return at < j.k_rows ? at : j.k_rows;
}

/* The long lists of query q's parts into `list` (room for best_k), then out. */
KS_DEVICE void sim_merge(const sim_job &j, int64_t q, sim_entry *list, int lane) {
  enum { AHEAD = 4 };
  int n = 0;
  for (int64_t p0 = 0; p0 < j.n_parts; p0 += AHEAD) {
    const sim_entry *from = j.entries + (q * j.n_parts + p0) * j.best_k;
    sim_entry x[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      x[i] = p0 + i < j.n_parts ? __ldcg(from + i * j.best_k + lane) : 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      bool more = sim_offer(list, &n, j.best_k, x[i], lane);
      for (int base = KS_WARP; more && base < j.best_k; base += KS_WARP)
        more = sim_offer(list, &n, j.best_k,
                         base + lane < j.best_k ? __ldcg(from + i * j.best_k + base + lane) : 0, lane);
    }
  }
  for (int i = lane; i < j.best_k; i += KS_WARP) {
    j.scores[q * j.best_k + i] = i < n ? sim_entry_score(list[i]) : -INFINITY;
    j.index[q * j.best_k + i] = i < n ? sim_entry_index(list[i]) : -1;
  }
  __syncwarp();
}

/* ---------------------------------------------------------------- means */

/* Sum of `count` scores, the others 0: N of a lane, and those of the lanes whose numbers differ in LOW, 2 LOW .. HIGH / 2. In
 * whole numbers, so of the same bits in any order; only what lies 2^33 below the largest loses bits, less than 2^-50 of it
 * in all. For all lanes of a warp. */
template <int N, int LOW, int HIGH> KS_DEVICE sim_partial sim_sum(const float v[N], int count) {
  sim_partial p = {0, 1, count};
#pragma unroll
  for (int i = 0; i < N; i++)
    p.e = max(p.e, (int)(ks_float_to_bits(v[i]) >> 23 & 255u));
#pragma unroll
  for (int d = LOW; d < HIGH; d *= 2)
    p.e = max(p.e, __shfl_xor_sync(KS_FULL_MASK, p.e, d));
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint32_t bits = ks_float_to_bits(v[i]), field = bits >> 23 & 255u;
    const uint64_t m = (bits & 0x7fffffu) | (field ? 0x800000u : 0u);
    const int64_t x = (int64_t)(m << 33 >> min(p.e - (field ? (int)field : 1), 63));
    p.sum += bits >> 31 ? -x : x;
  }
#pragma unroll
  for (int d = LOW; d < HIGH; d *= 2)
    p.sum += __shfl_xor_sync(KS_FULL_MASK, p.sum, d);
  if (__any_sync(KS_FULL_MASK, p.e == 255)) {
    float far = 0.0f; /* of infinities and NaN alone, so of any order */
#pragma unroll
    for (int i = 0; i < N; i++)
      far += fabsf(v[i]) < INFINITY ? 0.0f : v[i];
#pragma unroll
    for (int d = LOW; d < HIGH; d *= 2)
      far += __shfl_xor_sync(KS_FULL_MASK, far, d);
    if (p.e == 255) p.sum = ks_float_to_bits(far);
  }
  return p;
}

/* The stretches of query q: 32 chains in rising order, then a tree. */
KS_DEVICE void sim_mean(const sim_job &j, int64_t q, int lane) {
  const int64_t n = (j.k.n_rows + SIM_STRETCH - 1) / SIM_STRETCH;
  double sum = 0.0;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = lane; i < n; i += KS_WARP) {
    const sim_partial *p = j.partial + q * n + i;
    const int64_t part = __ldcg((const long long *)&p->sum);
    const uint32_t e = (uint32_t)__ldcg(&p->e);
    sum += e == 255u ? (double)ks_bits_to_float((uint32_t)part)
                     : (double)part * ((double)ks_bits_to_float(e << 23) * 0x1p-56);
    count += __ldcg(&p->count);
  }
  sum = ks_warp_sum(sum);
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2)
    count += __shfl_xor_sync(KS_FULL_MASK, count, d);
  if (lane != 0) return;
  j.mean[q] = count > 0 ? sum / (double)count : (double)NAN;
  j.count[q] = count;
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
         ks_smem_bytes<sim_factor>(bm) + ks_smem_bytes<sim_factor>(bn) + ks_smem_bytes<float>(bm) +
         ks_smem_bytes<float>(bn) + ks_smem_bytes<int32_t>(bm) + ks_smem_bytes<sim_far>(KS_WARP) +
         ks_smem_bytes<sim_entry>(n);
}

/* Entries of a block's lists in its shared memory; 0: they do not fit and lie in device memory. */
static inline int64_t sim_n_list(const ks_cuda_device *d, sim_shape shape, int64_t best_k) {
  const int64_t n = sim_bn(shape) * best_k;
  return sim_smem_bytes(shape, n) <= (size_t)d->smem_per_block ? n : 0;
}

/* Of sim_best (similarity_many.cuh). */
static inline size_t sim_best_bytes(size_t n_queries) {
  return 2 * ks_smem_bytes<sim_entry>(n_queries * SIM_SHORT) + ks_smem_bytes<int>(n_queries) +
         ks_smem_bytes<float>(n_queries);
}
static inline size_t sim_tile_smem_bytes(bool is_top) {
  const size_t bm = SIM_TILE_KEYS, bn = SIM_TILE_QUERIES;
  return ks_smem_bytes<uint4>((size_t)SIM_TILE_STAGES * (bm + bn) * PRODUCT_UNITS) +
         2 * ks_smem_bytes<float>(bm) + ks_smem_bytes<float>(bn) + ks_smem_bytes<int32_t>(2) +
         (is_top ? sim_best_bytes(bn) : 0);
}

static inline size_t sim_stream_smem_bytes(bool is_top, int64_t n_queries, int64_t n_cols) {
  const size_t warps = SIM_STREAM_WARPS, n = (size_t)n_queries,
               units = ((size_t)n_cols + 63) / 64 * PRODUCT_UNITS;
  return ks_smem_bytes<uint4>(warps * SIM_STREAM_STAGES * SIM_STREAM_KEYS * PRODUCT_UNITS) +
         ks_smem_bytes<uint4>(n * units) + ks_smem_bytes<sim_factor>(SIM_STREAM_QUERIES) +
         ks_smem_bytes<float>(warps * SIM_STREAM_QUERIES) +
         (is_top ? ks_smem_bytes<sim_entry>(warps * n * KS_WARP) + ks_smem_bytes<int32_t>(warps * 2 * KS_WARP)
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
