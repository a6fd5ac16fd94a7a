/* Entropy of the components of each row in bits, H = -sum p log2 p.
 *
 *   HISTOGRAM, CLIPPED   p: mass of n_bins equal bins over [min, max], as numpy.histogram of the float64 row;
 *                        with counts c of n: H = log2 n - sum c log2 c / n
 *   SOFTMAX, ABS         masses e = 2^v, v = (x - max) log2 e, or e = |x|, v = log2 e; with S = sum e:
 *                        H = log2 S - sum e v / S
 *
 * Bytes: 4 n, read once: the row stays in shared memory where it fits (9216 columns), else it comes from L2
 * again. Instructions a component (sm_90; the loops from the machine code, 100 bins and 3200 columns): copy 3,
 * ends 3; SOFTMAX and ABS 9 and 8 for the masses and 6 for what a row takes once (sums over the block, the
 * logarithm): 20. HISTOGRAM 15 to count, and once a row 16: counters cleared and added up, 7 for the bins'
 * logarithms in double, a rare bin decided in double: 37. CLIPPED 11 more for the moments and 3 once a row: 51.
 * 85 % of a copy's 4.25 TB/s leaves time for 37: SOFTMAX and ABS are bound by memory, the others by issue.
 *
 * Double, slow on small cards (1 : 64), is left where a row needs it once, by one warp, and in the logarithms
 * of the bins: these alone are 4 warps of 45 for 100 bins, 3000 clocks a row on such a card.
 *
 * Accuracy: SOFTMAX and ABS have float32 masses and logarithms to 2^-22 by one instruction each, sums of 20 in
 * float32 and pairs of floats behind that: every part of an error is some 2^-22 (1 + H), and ops.h says what
 * they may come to. The moments of CLIPPED are whole numbers on a grid of 2^-21 of the row's reach, summed
 * exactly, and what is left of each. Bins are found in float32 with its errors counted: where the place lies too
 * near to an edge for them (n_bins 2^-20 of all components: 1 in 10^4 for 100 bins), float64 decides as numpy
 * does.
 *
 * Geometry: a block a row, a warp for each 640 columns (5 pieces of 16 bytes a thread), at most 6. The row comes
 * by asynchronous copies, each thread reads its own pieces again; up to 32 counters a bin, one a lane, so that
 * no two lanes meet in a bank. 3200 columns: masses 36 registers, 15 KB of shared memory, 10 blocks a
 * multiprocessor with 128 KB under way; histograms 60 registers, 28 KB, 6 blocks, 77 KB.
 *
 * Determinism: a thread's sum over its pieces of 640 columns in rising order, then over the warps, then a tree
 * over the lanes, by n alone; counts and the moments' whole parts are integers. A row depends on nothing else.
 *
 * Ladder (H200; 2048 x 2048 with the wait for the results; a copy moves 4.25 TB/s)
 *   v1  a division in float64 for each component. Histogram 57 us, clipped 66, softmax 39, abs 48: 0.3 to 0.45 TB/s
 *   v2  histograms in float32 from shared memory. Predicted 80 to 90 % of a copy for 3200 columns, by the loops'
 *       24 instructions; what a row takes once was left out and as much again. Not measured
 *   v3  this: masses in float32, moments in whole numbers, once-a-row work by one warp. Computed, at 80 % of all
 *       issue slots: 1 M rows of 3200 softmax and abs 3.3 ms (90 % of a copy), histogram 4.4 ms (69 %), clipped
 *       6.1 ms (49 %). 2048 x 2048: 15 to 20 us, most of it the wait. Not measured yet
 *   considered  exponentials and logarithms by polynomials, 2^-26, the same bits on every card: 12 instructions more;
 *       what they gain is lost in the rounding of v
 *   considered  logarithms of counts from a table: 3 instructions less, and a table to make and to send */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pair.cuh"

enum {
  ENTROPY_WARPS = 6, /* at most */
  ENTROPY_BLOCKS =
      5, /* that a multiprocessor holds then, of 64 registers a thread: Turing's has 1024 threads */
  ENTROPY_PIECES = 5,                             /* of 16 bytes, a thread's in a stretch */
  ENTROPY_STRETCH = ENTROPY_PIECES * KS_WARP * 4, /* columns of a warp */
  ENTROPY_COUNTERS = 4096,
  ENTROPY_HELD = 9216, /* columns */
  ENTROPY_MAX_COLS = 1 << 20
};

/* Where a row is read: in shared memory, copied by 16 bytes or by columns, or where it was, for want of room. */
enum { ENTROPY_WHOLE, ENTROPY_PARTS, ENTROPY_FAR, ENTROPY_PLACES };

typedef struct {
  const float *x;
  int n;
} entropy_row;

typedef struct {
  int64_t n_cols;
  double clip, log2_n;
  int32_t n_bins, copies; /* copies: of the counters, a power of two */
} entropy_shape;

/* ---------------------------------------------------------------- rows */

KS_DEVICE int entropy_warp() {
  return (int)threadIdx.x / KS_WARP;
}
KS_DEVICE int entropy_lane() {
  return (int)threadIdx.x % KS_WARP;
}

/* f(j, n) for each 16 bytes of this thread, of columns j to j + n - 1; end() behind those of a stretch. */
template <int PLACE, class F, class E> KS_DEVICE void entropy_walk(int n_cols, F f, E end) {
  const int step = (int)blockDim.x / KS_WARP * ENTROPY_STRETCH;
#pragma unroll 1
  for (int at = entropy_warp() * ENTROPY_STRETCH + entropy_lane() * 4; at < n_cols; at += step) {
#pragma unroll
    for (int k = 0; k < ENTROPY_PIECES; k++) {
      const int j = at + k * KS_WARP * 4;
      if (j >= n_cols) break;
      f(j, PLACE == ENTROPY_WHOLE ? 4 : min(4, n_cols - j));
    }
    end();
  }
}

/* f(x, n): their values, of which the first n count. */
template <int PLACE, class F, class E> KS_DEVICE void entropy_each(const entropy_row &row, F f, E end) {
  entropy_walk<PLACE>(
      row.n,
      [&](int j, int n) {
        float x[4];
        if (PLACE == ENTROPY_FAR) {
#pragma unroll
          for (int i = 0; i < 4; i++)
            x[i] = i < n ? row.x[j + i] : 0.0f;
        } else {
          const float4 v = *(const float4 *)(row.x + j);
          x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        }
        f(x, n);
      },
      end);
}
template <int PLACE, class F> KS_DEVICE void entropy_each(const entropy_row &row, F f) {
  entropy_each<PLACE>(row, f, [] {});
}

/* Asks for the row. Once ks_cp_async_wait<0> is behind it, each thread may read what it asked for. */
template <int PLACE> KS_DEVICE entropy_row entropy_take(ks_smem *smem, const float *x, int n_cols) {
  if (PLACE == ENTROPY_FAR) return {x, n_cols};
  float *to = ks_smem_take<float>(smem, (size_t)(n_cols + 3) / 4 * 4);
  entropy_walk<PLACE>(
      n_cols,
      [&](int j, int n) {
        if (PLACE == ENTROPY_WHOLE)
          ks_cp_async_16(to + j, x + j, true);
        else
          for (int i = 0; i < n; i++)
            ks_cp_async_4(to + j + i, x + j + i, true);
      },
      [] {});
  ks_cp_async_commit();
  return {to, n_cols};
}
static size_t entropy_row_bytes(int place, int64_t n_cols) {
  return place == ENTROPY_FAR ? 0 : ks_smem_bytes<float>((size_t)(n_cols + 3) / 4 * 4);
}

/* The block's largest of each of N, NaN if any is. `room`: N floats a warp. */
template <int N> KS_DEVICE void entropy_block_max(float (&x)[N], float *room) {
  const int lane = entropy_lane(), n_warps = (int)blockDim.x / KS_WARP;
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int d = KS_WARP / 2; d > 0; d /= 2)
      x[i] = ks_max_nan(x[i], __shfl_xor_sync(KS_FULL_MASK, x[i], d));
    if (lane == 0) room[entropy_warp() * N + i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = room[(lane % 8 < n_warps ? lane % 8 : 0) * N + i];
#pragma unroll
    for (int d = 4; d > 0; d /= 2)
      x[i] = ks_max_nan(x[i], __shfl_xor_sync(KS_FULL_MASK, x[i], d));
  }
}
static_assert((int)ENTROPY_WARPS <= 8, "three steps over the warps");

/* Ends of the row; false: it holds a NaN or infinity. `room`: 2 floats a warp. */
template <int PLACE>
KS_DEVICE bool entropy_ends(const entropy_row &row, float *room, float *least, float *most) {
  float ends[2] = {-INFINITY, -INFINITY}; /* the largest of -x and x */
  entropy_each<PLACE>(row, [&](const float x[4], int n) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < n) ends[0] = ks_max_nan(ends[0], -x[i]), ends[1] = ks_max_nan(ends[1], x[i]);
  });
  entropy_block_max(ends, room);
  *least = -ends[0], *most = ends[1];
  return ends[0] < INFINITY && ends[1] < INFINITY;
}

template <class T> KS_DEVICE T entropy_of_lane(T x, int mask) {
  union {
    T value;
    uint32_t words[sizeof(T) / 4];
  } u = {x};
#pragma unroll
  for (int i = 0; i < (int)(sizeof(T) / 4); i++)
    u.words[i] = __shfl_xor_sync(KS_FULL_MASK, u.words[i], mask);
  return u.value;
}
/* The sum over the block, in all lanes of its first warp, by one warp: double is dear on small cards. `room`: [threads]. */
template <class T> KS_DEVICE T entropy_gather(T x, T *room) {
  room[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= KS_WARP) return x;
  for (int t = (int)threadIdx.x + KS_WARP; t < (int)blockDim.x; t += KS_WARP)
    x.add(room[t]);
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2)
    x.add(entropy_of_lane(x, d));
  return x;
}

/* ---------------------------------------------------------------- masses: softmax and abs */

/* A component's mass and its logarithm. */
typedef struct {
  float e, v;
} entropy_term;

/* |x| times a power of two that brings the largest to [1, 2), which is exact. */
struct entropy_abs {
  float scale;

  KS_DEVICE entropy_abs(float least, float most) {
    const uint32_t exponent = ks_float_to_bits(fmaxf(-least, most)) & 0x7f800000u, one = 1u << 23;
    scale = ks_bits_to_float(max(254 * one - exponent, one));
  }
  KS_DEVICE entropy_term term(float x) const {
    const float e = fabsf(x) * scale;
    return {e, ks_log2(fmaxf(e, 0x1p-126f))};
  }
};

/* 2^v, v = (x - max) log2 e. What rounding does to v it does to both, so that only its own size counts. */
struct entropy_softmax {
  float most;

  KS_DEVICE entropy_softmax(float, float largest) : most(largest) {}
  KS_DEVICE entropy_term term(float x) const {
    const float v = fmaxf((x - most) * 0x1.715476p+0f, -126.0f);
    return {ks_exp2(v), v};
  }
};

struct entropy_masses {
  ks_pair mass, bits; /* sum e, sum e v */

  KS_DEVICE void add(const entropy_masses &other) {
    ks_pair_merge(&mass, other.mass);
    ks_pair_merge(&bits, other.bits);
  }
};
template <int PLACE, class A> KS_DEVICE entropy_masses entropy_sum(const entropy_row &row, const A &a) {
  entropy_masses s = {{0, 0}, {0, 0}};
  float mass = 0, bits = 0; /* of a stretch */
  entropy_each<PLACE>(
      row,
      [&](const float x[4], int n) {
        float e[4], v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const entropy_term t = a.term(x[i]);
          e[i] = i < n ? t.e : 0.0f;
          v[i] = i < n ? t.v : 0.0f;
        }
        mass += (e[0] + e[1]) + (e[2] + e[3]);
        bits += fmaf(e[0], v[0], e[1] * v[1]) + fmaf(e[2], v[2], e[3] * v[3]);
      },
      [&] {
        ks_pair_add(&s.mass, mass);
        ks_pair_add(&s.bits, bits);
        mass = bits = 0;
      });
  return s;
}
KS_DEVICE double entropy_of_masses(const entropy_masses &s) {
  const double mass = (double)s.mass.hi + (double)s.mass.lo, bits = (double)s.bits.hi + (double)s.bits.lo;
  if (!(mass > 0)) return 0;
  int exponent;
  const float part = frexpf((float)mass, &exponent);
  return fmax((double)exponent + (double)log2f(part) - bits / mass, 0.0);
}

template <int PLACE, class A>
__global__ void __launch_bounds__(ENTROPY_WARPS *KS_WARP, ENTROPY_BLOCKS)
    entropy_mass_kernel(const float *rows, double *h, entropy_shape a) {
  ks_smem smem;
  float *room = ks_smem_take<float>(&smem, 2 * ENTROPY_WARPS);
  entropy_masses *parts = ks_smem_take<entropy_masses>(&smem, blockDim.x);
  const entropy_row row = entropy_take<PLACE>(&smem, rows + blockIdx.x * a.n_cols, (int)a.n_cols);
  ks_cp_async_wait<0>();
  float least, most;
  double result = NAN;
  if (entropy_ends<PLACE>(row, room, &least, &most)) {
    const entropy_masses s = entropy_gather(entropy_sum<PLACE>(row, A(least, most)), parts);
    if (threadIdx.x == 0) result = entropy_of_masses(s);
  }
  if (threadIdx.x == 0) h[blockIdx.x] = result;
}

/* ---------------------------------------------------------------- histograms */

typedef struct {
  double low, high, width;
  int n_bins;
} entropy_range;

/* Bins as float32 finds them: rint(place) of place = (v - low) * n_bins / (high - low) - 1/2. Where that is nearer to the middle
 * between two whole numbers than `sure` allows, and where float32 cannot hold the range (sure < 0), float64 decides. Errors, as
 * parts of n_bins: 2^-24 each of v - low, of the factor, of the offset, of the sum; twice that: sure = 1/2 - n_bins 2^-21. */
typedef struct {
  float low, factor, offset, most, sure;
} entropy_quick;

/* A row's bins, for all threads of its block. */
typedef struct {
  entropy_range range;
  entropy_quick quick;
} entropy_bins;

/* By one thread; apart, so that its registers are not the kernel's. `bins` is shared. */
static __device__ __noinline__ void entropy_put_bins(entropy_bins *bins, double low, double high,
                                                     int n_bins) {
  const double range = high - low, factor = (double)n_bins / range;
  const float from = (float)low;
  bins->range = {low, high, range / (double)n_bins, n_bins};
  bins->quick = {from, (float)factor, (float)((from - low) * factor - 0.5), (float)n_bins - 0.75f,
                 range > 0x1p-100 && range < 0x1p100 ? 0.5f - (float)n_bins * 0x1p-21f : -1.0f};
}

/* Bin of a value as numpy assigns it: by division, then moved by one where the edges low + i * width say so. */
KS_DEVICE int entropy_exact_bin(const entropy_range &r, double v) {
  int b = (int)__dmul_rn((v - r.low) / (r.high - r.low), (double)r.n_bins);
  if (b > r.n_bins - 1) b = r.n_bins - 1;
  const double left = __dadd_rn(__dmul_rn((double)b, r.width), r.low),
               right = b == r.n_bins - 1 ? r.high : __dadd_rn(__dmul_rn((double)(b + 1), r.width), r.low);
  if (v < left) return b > 0 ? b - 1 : 0;
  return v >= right && b != r.n_bins - 1 ? b + 1 : b;
}
/* Counts the first n of four. Rare, so not inlined; counts: this lane's, of its first bin. */
static __device__ __noinline__ void entropy_count_exactly(const entropy_range *r, float4 four, int n,
                                                          int32_t *counts, int copies) {
  const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < n)
      atomicAdd(&counts[entropy_exact_bin(*r, fmin(fmax((double)x[i], r->low), r->high)) * copies], 1);
}

/* Sums of d = (x - from) * scale and of its squares: d = q + r, q the nearest whole number, |q| <= 2^21, so that sums of q and of
 * q^2 are exact; those of r and of d^2 - q^2 = r (2 q + r) are 2^-22 of them and float32's rounding 2^-46. */
struct entropy_moments {
  int64_t sum, squares;
  float rest, rest_squares;

  KS_DEVICE void add(const entropy_moments &other) {
    sum += other.sum, squares += other.squares;
    rest += other.rest, rest_squares += other.rest_squares;
  }
};

/* from: 0, or, where all values lie within a factor of two, one among them: no difference is rounded, and the mean is no larger
 * than the ends' distance. scale: a power of two. */
typedef struct {
  float from, scale;
} entropy_grid;
KS_DEVICE entropy_grid entropy_grid_of(float least, float most) {
  const bool near = least > 0 ? most <= 2 * least : most < 0 && least >= 2 * most;
  const float from = near ? least + (most - least) / 2 : 0.0f,
              reach = fmaxf(fabsf(least - from), fabsf(most - from));
  const int exponent = (int)(ks_float_to_bits(reach) >> 23); /* above 127 */
  return {from, ks_bits_to_float((uint32_t)min(274 - exponent, 254) << 23)};
}

template <int PLACE>
KS_DEVICE entropy_moments entropy_moments_of(const entropy_row &row, const entropy_grid &g) {
  entropy_moments m = {0, 0, 0, 0};
  entropy_each<PLACE>(row, [&](const float x[4], int n) {
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i >= n) continue;
      const float d = x[i] - g.from, shifted = fmaf(d, g.scale, 0x1.8p23f), q = shifted - 0x1.8p23f,
                  r = fmaf(d, g.scale, -q);
      const int32_t whole = (int32_t)(ks_float_to_bits(shifted) - ks_float_to_bits(0x1.8p23f));
      sum += whole;
      m.squares += (int64_t)whole * whole;
      m.rest += r;
      m.rest_squares = fmaf(r, fmaf(2.0f, q, r), m.rest_squares);
    }
    m.sum += sum;
  });
  return m;
}

/* Bins between the ends of a row that is clipped to mean +- clip standard deviations. */
KS_DEVICE void entropy_put_clipped(entropy_bins *bins, const entropy_moments &m, const entropy_grid &g,
                                   float least, float most, const entropy_shape &a) {
  const double n = (double)a.n_cols, unit = 1.0 / (double)g.scale, sum = (double)m.sum + (double)m.rest,
               mean = sum / n, squares = fma(-sum, mean, (double)m.squares + (double)m.rest_squares),
               middle = fma(mean, unit, (double)g.from),
               reach = __dmul_rn(a.clip, sqrt(fmax(squares, 0.0) / n) * unit), low = middle - reach,
               high = middle + reach;
  entropy_put_bins(bins, fmin(fmax((double)least, low), high), fmin(fmax((double)most, low), high), a.n_bins);
}

/* Counts this thread's values in its copy of the histogram, counts[bin, copy]; those beyond the ends go to the first and the last
 * bin. */
template <int PLACE>
KS_DEVICE void entropy_count(const entropy_row &row, int32_t *counts, int copies, const entropy_bins *bins) {
  const float round = 0x1.8p23f; /* adding it leaves the whole number in the low bits of the mantissa */
  const entropy_quick q = bins->quick;
  int32_t *first = counts + ((int)threadIdx.x & (copies - 1));
  entropy_each<PLACE>(row, [&](const float x[4], int n) {
    float shifted[4], off = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float place = fminf(fmaxf(fmaf(x[i] - q.low, q.factor, q.offset), -0.25f), q.most);
      shifted[i] = place + round;
      off = fmaxf(off, fabsf(place - (shifted[i] - round)));
    }
    if (off < q.sure) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < n) {
          const int bin = (int)(ks_float_to_bits(shifted[i]) - ks_float_to_bits(round));
          atomicAdd(&first[bin * copies], 1);
        }
    } else {
      entropy_count_exactly(&bins->range, make_float4(x[0], x[1], x[2], x[3]), n, first, copies);
    }
  });
}

/* Of a histogram: sum of count log2 count, and whether a bin has all. */
struct entropy_logs {
  double sum;
  int32_t all, none;

  KS_DEVICE void add(const entropy_logs &other) {
    sum += other.sum;
    all |= other.all;
  }
};

/* This thread's bins, each from `copies` histograms, side by side: counts[bin, copy]. */
KS_DEVICE entropy_logs entropy_logs_of(const int32_t *counts, int n_bins, int copies, int n) {
  entropy_logs logs = {0, 0, 0};
  for (int b = (int)threadIdx.x; b < n_bins; b += (int)blockDim.x) {
    int count = 0;
    if (copies < 4)
      for (int c = 0; c < copies; c++)
        count += counts[b * copies + c];
    else
      for (int c = 0; c < copies; c += 4) { /* each lane begins in banks of its own */
        const int4 four = *(const int4 *)(counts + b * copies + ((4 * b + c) & (copies - 1)));
        count += four.x + four.y + (four.z + four.w);
      }
    logs.all |= count == n;
    if (count > 1) logs.sum += (double)count * log2((double)count);
  }
  return logs;
}

/* Counters, in whole pieces of 16 bytes. */
KS_HOST_DEVICE size_t entropy_counters(const entropy_shape &a) {
  return (size_t)(a.copies * a.n_bins + 3) / 4 * 4;
}

template <int PLACE, bool CLIPS>
__global__ void __launch_bounds__(ENTROPY_WARPS *KS_WARP, ENTROPY_BLOCKS)
    entropy_histogram_kernel(const float *rows, double *h, entropy_shape a) {
  ks_smem smem;
  float *room = ks_smem_take<float>(&smem, 2 * ENTROPY_WARPS);
  entropy_bins *bins = ks_smem_take<entropy_bins>(&smem, 1);
  entropy_moments *parts = ks_smem_take<entropy_moments>(&smem, CLIPS ? blockDim.x : 0);
  entropy_logs *logs = ks_smem_take<entropy_logs>(&smem, blockDim.x);
  int32_t *counts = ks_smem_take<int32_t>(&smem, entropy_counters(a));
  const entropy_row row = entropy_take<PLACE>(&smem, rows + blockIdx.x * a.n_cols, (int)a.n_cols);
  for (int c = (int)threadIdx.x * 4; c < a.copies * a.n_bins; c += (int)blockDim.x * 4)
    *(int4 *)(counts + c) = make_int4(0, 0, 0, 0);
  ks_cp_async_wait<0>();
  float least, most;
  double result = NAN;
  if (entropy_ends<PLACE>(row, room, &least, &most)) {
    if constexpr (CLIPS) {
      const entropy_grid g = entropy_grid_of(least, most);
      const entropy_moments m = entropy_gather(entropy_moments_of<PLACE>(row, g), parts);
      if (threadIdx.x == 0) entropy_put_clipped(bins, m, g, least, most, a);
    } else if (threadIdx.x == 0) {
      entropy_put_bins(bins, (double)least, (double)most, a.n_bins);
    }
    __syncthreads();
    result = 0;
    if (bins->range.high > bins->range.low) {
      entropy_count<PLACE>(row, counts, a.copies, bins);
      __syncthreads();
      const entropy_logs l = entropy_gather(entropy_logs_of(counts, a.n_bins, a.copies, row.n), logs);
      if (threadIdx.x == 0) result = l.all ? 0.0 : a.log2_n - l.sum / (double)a.n_cols;
    }
  }
  if (threadIdx.x == 0) h[blockIdx.x] = result;
}

/* ---------------------------------------------------------------- launch */

/* By kind, then place. */
#define ENTROPY_KERNELS(name, of)                                                                            \
  { name<ENTROPY_WHOLE, of>, name<ENTROPY_PARTS, of>, name<ENTROPY_FAR, of> }
static void (*const entropy_kernels[KS_ENTROPY_ABS + 1][ENTROPY_PLACES])(const float *, double *,
                                                                         entropy_shape) = {
    ENTROPY_KERNELS(entropy_histogram_kernel, false), ENTROPY_KERNELS(entropy_histogram_kernel, true),
    ENTROPY_KERNELS(entropy_mass_kernel, entropy_softmax), ENTROPY_KERNELS(entropy_mass_kernel, entropy_abs)};
#undef ENTROPY_KERNELS

static size_t entropy_other_bytes(ks_entropy_kind kind, const entropy_shape *a, size_t threads) {
  if (kind == KS_ENTROPY_SOFTMAX || kind == KS_ENTROPY_ABS)
    return ks_smem_bytes<float>(2 * ENTROPY_WARPS) + ks_smem_bytes<entropy_masses>(threads);
  return ks_smem_bytes<float>(2 * ENTROPY_WARPS) + ks_smem_bytes<entropy_logs>(threads) +
         ks_smem_bytes<entropy_bins>(1) +
         ks_smem_bytes<entropy_moments>(kind == KS_ENTROPY_CLIPPED ? threads : 0) +
         ks_smem_bytes<int32_t>(entropy_counters(*a));
}

extern "C" ks_status ks_cuda_entropy(ks_ctx *ctx, const ks_entropy_args *a) {
  if (a->n_cols > ENTROPY_MAX_COLS)
    return KS_FAIL(KS_EUNSUPPORTED, "entropy: rows of %lld; at most %d", (long long)a->n_cols,
                   (int)ENTROPY_MAX_COLS);
  const int place = a->n_cols > ENTROPY_HELD                ? ENTROPY_FAR
                    : ks_is_vector_aligned(a->x, a->n_cols) ? ENTROPY_WHOLE
                                                            : ENTROPY_PARTS;
  const int64_t stretches = (a->n_cols + ENTROPY_STRETCH - 1) / ENTROPY_STRETCH,
                threads = KS_WARP * ks_min_i64(stretches > 1 ? stretches : 1, ENTROPY_WARPS);
  const size_t bytes = (size_t)a->n_rows * sizeof(double);
  const bool counts = a->kind == KS_ENTROPY_HISTOGRAM || a->kind == KS_ENTROPY_CLIPPED;
  entropy_shape shape = {a->n_cols, a->clip, log2((double)a->n_cols), counts ? (int32_t)a->n_bins : 0,
                         KS_WARP};
  while (shape.copies * shape.n_bins > ENTROPY_COUNTERS)
    shape.copies /= 2;
  double *h;
  KS_TRY(ks_cuda_workspace(ctx, bytes, (void **)&h));
  KS_TRY(
      ks_launch(ctx, "entropy", entropy_kernels[a->kind][place], dim3(ks_blocks_for(a->n_rows, 1)),
                dim3((unsigned)threads),
                entropy_other_bytes(a->kind, &shape, (size_t)threads) + entropy_row_bytes(place, a->n_cols),
                a->x, h, shape));
  KS_TRY(ks_cuda_deliver(ctx, a->h, h, bytes));
  return ks_cuda_finish(ctx);
}
