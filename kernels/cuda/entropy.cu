/* Entropy of the components of each row in bits, H = -sum p log2 p.
 *
 *   HISTOGRAM, CLIPPED   p: mass of n_bins equal bins over [min, max], as numpy.histogram of the float64 row;
 *                        with counts c of n: H = log2 n - sum c log2 c / n
 *   SOFTMAX              e = exp(x - max), S = sum e:  H = (log S - sum e (x - max) / S) / log 2
 *   ABS                  p = |row| / sum |row|
 *
 * Bytes: 4 n, read once: the row stays in shared memory where it fits (9216 columns), else it comes from L2
 * again. Histograms: 24 instructions a component (sm_90), 7 of them for the ends; of 37 that its bytes leave
 * time for: bound by memory and nearly by issue. CLIPPED takes 6 double operations more, SOFTMAX and ABS 50
 * in all: bound by double.
 *
 * Bins are found in float32 with its errors counted: where the place lies too near to an edge for them (2 n_bins 2^-20 of all
 * components: 2 in 10^4 for 100 bins), float64 decides as numpy does.
 *
 * Geometry: a block a row. Histograms: a warp for each 512 columns, at most 8; the row comes by asynchronous
 * copies, each thread reads its own pieces again; up to 32 counters a bin, one a lane, so that no two lanes
 * meet in a bank. 48 registers, 26 KB of shared memory for 3200 columns: 5 blocks, up to 64 KB under way a
 * multiprocessor. The others, and histograms of longer rows: 256 threads, a copy of the counters a warp.
 *
 * Determinism: double throughout, as ops.h defines it, but for the sure bins. Sums run a block's threads apart in rising order,
 * then through a tree; counts are integers. A row depends on nothing else.
 *
 * Ladder (H200; 2048 x 2048 with the wait for the results; a copy moves 4.25 TB/s)
 *   v1  a division in float64 for each component. Histogram 57 us, clipped 66, softmax 39, abs 48: 0.3 to 0.45 TB/s
 *   v2  this, for histograms. Computed: 1 M rows of 3200, histogram: 3.5 ms, 80 to 90 % of a copy (a row's
 *       chain, some 3700 clocks of 5 blocks at a time, is as long as its bytes take); clipped 75 %. 2048 x
 *       2048: 20 us, most of it the wait. Not measured yet
 *   next  softmax and abs in pairs of float32 */
#include "kernels/cuda/launch.cuh"

enum {
  ENTROPY_THREADS = 256,
  ENTROPY_WARPS = ENTROPY_THREADS / KS_WARP,
  ENTROPY_COUNTERS = 4096,
  ENTROPY_HELD = 9216,
  ENTROPY_PIECES = 4 /* of 16 bytes, a thread */
};

typedef struct {
  const float *x; /* shared or not */
  int64_t n;
  double *room;    /* [KS_WARP] */
  int32_t *counts; /* [copies, n_bins] */
  int n_bins, copies;
} entropy_row;

/* The sum of f(column) over a row, or of f(bin) over n bins, in every thread. */
template <class F> KS_DEVICE double entropy_sum(int64_t n, double *room, F f) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += ENTROPY_THREADS)
    sum += f(i);
  return ks_block_sum(sum, room);
}

/* The largest f(column). */
template <class F> KS_DEVICE double entropy_max(int64_t n, double *room, F f) {
  double most = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += ENTROPY_THREADS)
    most = fmax(most, f(i));
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2)
    most = fmax(most, __shfl_xor_sync(KS_FULL_MASK, most, d));
  if (threadIdx.x % KS_WARP == 0) room[threadIdx.x / KS_WARP] = most;
  __syncthreads();
  for (int w = 0; w < ENTROPY_WARPS; w++)
    most = fmax(most, room[w]);
  __syncthreads();
  return most;
}

/* Bin of v as numpy assigns it: by division, then moved by one where the edges min + i * width say so. */
KS_DEVICE int entropy_bin(double v, double low, double high, double width, int n_bins) {
  int b = (int)__dmul_rn((v - low) / (high - low), (double)n_bins);
  if (b > n_bins - 1) b = n_bins - 1;
  const double left = __dadd_rn(__dmul_rn((double)b, width), low),
               right = b == n_bins - 1 ? high : __dadd_rn(__dmul_rn((double)(b + 1), width), low);
  if (v < left) return b > 0 ? b - 1 : 0;
  return v >= right && b != n_bins - 1 ? b + 1 : b;
}

/* Histogram of the row with its values held in [least, most]. */
KS_DEVICE double entropy_histogram(const entropy_row &r, double least, double most) {
  const auto value = [&](int64_t j) { return fmin(fmax((double)r.x[j], least), most); };
  const double high = entropy_max(r.n, r.room, value),
               low = -entropy_max(r.n, r.room, [&](int64_t j) { return -value(j); });
  if (!(high > low)) return 0;
  const double width = (high - low) / (double)r.n_bins;
  for (int b = (int)threadIdx.x; b < r.copies * r.n_bins; b += ENTROPY_THREADS)
    r.counts[b] = 0;
  __syncthreads();
  int32_t *mine = r.counts + (int)threadIdx.x / KS_WARP % r.copies * r.n_bins;
  for (int64_t j = threadIdx.x; j < r.n; j += ENTROPY_THREADS)
    atomicAdd(&mine[entropy_bin(value(j), low, high, width, r.n_bins)], 1);
  __syncthreads();
  int all = 0;
  const double sum = entropy_sum(r.n_bins, r.room, [&](int64_t b) {
    int64_t count = 0;
    for (int c = 0; c < r.copies; c++)
      count += r.counts[c * r.n_bins + b];
    all |= count == r.n;
    return count > 1 ? (double)count * log2((double)count) : 0.0;
  });
  if (__syncthreads_or(all)) return 0;
  return log2((double)r.n) - sum / (double)r.n;
}

KS_DEVICE double entropy_clipped(const entropy_row &r, double clip) {
  const double mean = entropy_sum(r.n, r.room, [&](int64_t j) { return (double)r.x[j]; }) / (double)r.n;
  const double squares = entropy_sum(r.n, r.room, [&](int64_t j) {
    const double off = (double)r.x[j] - mean;
    return __dmul_rn(off, off);
  });
  const double reach = __dmul_rn(clip, sqrt(squares / (double)r.n));
  return entropy_histogram(r, mean - reach, mean + reach);
}

KS_DEVICE double entropy_softmax(const entropy_row &r) {
  const double max = entropy_max(r.n, r.room, [&](int64_t j) { return (double)r.x[j]; });
  double sum = 0, weighted = 0;
  for (int64_t j = threadIdx.x; j < r.n; j += ENTROPY_THREADS) {
    const double t = (double)r.x[j] - max, e = exp(t);
    sum += e;
    weighted += e * t;
  }
  sum = ks_block_sum(sum, r.room);
  weighted = ks_block_sum(weighted, r.room);
  return (log(sum) - weighted / sum) * 1.4426950408889634074;
}

KS_DEVICE double entropy_abs(const entropy_row &r) {
  const double sum = entropy_sum(r.n, r.room, [&](int64_t j) { return fabs((double)r.x[j]); });
  if (sum == 0) return 0;
  return -entropy_sum(r.n, r.room, [&](int64_t j) {
    const double p = fabs((double)r.x[j]) / sum;
    return p > 0 ? p * log2(p) : 0.0;
  });
}

typedef struct {
  int64_t n_cols;
  double clip;
  int32_t kind, n_bins, copies, held; /* held: the row's copy in shared memory */
} entropy_shape;

KS_DEVICE double entropy_of(const entropy_row &r, const entropy_shape &a) {
  switch (a.kind) {
  case KS_ENTROPY_HISTOGRAM:
    return entropy_histogram(r, -INFINITY, INFINITY);
  case KS_ENTROPY_CLIPPED:
    return entropy_clipped(r, a.clip);
  case KS_ENTROPY_SOFTMAX:
    return entropy_softmax(r);
  default:
    return entropy_abs(r);
  }
}

__global__ void entropy_kernel(const float *x, double *h, entropy_shape a) {
  ks_smem smem;
  double *room = ks_smem_take<double>(&smem, KS_WARP);
  int32_t *counts = ks_smem_take<int32_t>(&smem, (size_t)(a.copies * a.n_bins));
  float *row = ks_smem_take<float>(&smem, a.held ? (size_t)a.n_cols : 0);
  x += (int64_t)blockIdx.x * a.n_cols;
  int wrong = 0;
  for (int64_t j = threadIdx.x; j < a.n_cols; j += ENTROPY_THREADS) {
    const float v = x[j];
    wrong |= !(fabsf(v) < INFINITY);
    if (a.held) row[j] = v;
  }
  wrong = __syncthreads_or(wrong);
  const entropy_row r = {a.held ? row : x, a.n_cols, room, counts, a.n_bins, a.copies};
  double result = 0;
  if (wrong)
    result = NAN;
  else if (a.n_cols > 0)
    result = entropy_of(r, a);
  if (threadIdx.x == 0) h[blockIdx.x] = result;
}

/* ---------------------------------------------------------------- histograms of rows in shared memory */

/* Bins as float32 finds them: rint(place) of place = (v - low) * n_bins / (high - low) - 1/2. Where that is nearer to the middle
 * between two whole numbers than `sure` allows, and where float32 cannot hold the range (sure < 0), float64 decides. Errors, as
 * parts of n_bins: 2^-24 each of v - low (two floats), of the factor, of the product, of the offset: sure =
 * 1/2 - n_bins 2^-20. */
typedef struct {
  float low, factor, offset, most, sure;
} entropy_quick;

typedef struct {
  double low, high, width;
  int n_bins;
} entropy_range;

KS_DEVICE entropy_quick entropy_quick_of(const entropy_range &r) {
  const double range = r.high - r.low, factor = (double)r.n_bins / range;
  entropy_quick q;
  q.low = (float)r.low;
  q.factor = (float)factor;
  q.offset = (float)((q.low - r.low) * factor - 0.5);
  q.most = (float)r.n_bins - 0.75f;
  q.sure = range > 0x1p-100 && range < 0x1p100 ? 0.5f - (float)r.n_bins * 0x1p-20f : -1.0f;
  return q;
}

/* Rare, so not inlined; `r` is shared. */
static __device__ __noinline__ int entropy_exact_bin(const entropy_range *r, float x) {
  return entropy_bin(fmin(fmax((double)x, r->low), r->high), r->low, r->high, r->width, r->n_bins);
}

/* A row in shared memory; every thread has its own 16-byte pieces of it. */
typedef struct {
  float *x;
  int64_t n;
} entropy_copied;
/* f of each value of this thread; WHOLE: n is a multiple of 4. */
template <bool WHOLE, class F> KS_DEVICE void entropy_each(const entropy_copied &row, F f) {
#pragma unroll 1
  for (int j = (int)threadIdx.x * 4; j < row.n; j += (int)blockDim.x * 4) {
    const float4 v = *(const float4 *)(row.x + j);
    const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (WHOLE || j + i < row.n) f(x[i]);
  }
}
template <bool WHOLE> KS_DEVICE void entropy_copy(const entropy_copied &row, const float *x) {
  for (int j = (int)threadIdx.x * 4; j < row.n; j += (int)blockDim.x * 4)
    if (WHOLE)
      ks_cp_async_16(row.x + j, x + j, true);
    else
      for (int i = j; i < j + 4 && i < row.n; i++)
        ks_cp_async_4(row.x + i, x + i, true);
  ks_cp_async_commit();
}

/* Ends of the row; false: it holds a NaN or infinity. `room`: 2 floats a warp. */
template <bool WHOLE>
KS_DEVICE bool entropy_ends(const entropy_copied &row, float *room, float *least, float *most) {
  const int warp = (int)threadIdx.x / KS_WARP, n_warps = (int)blockDim.x / KS_WARP;
  float low = INFINITY, high = -INFINITY, wrong = 0; /* x * 0 is 0 or NaN */
  entropy_each<WHOLE>(
      row, [&](float x) { low = fminf(low, x), high = fmaxf(high, x), wrong = fmaf(x, 0.0f, wrong); });
#pragma unroll
  for (int d = KS_WARP / 2; d > 0; d /= 2) {
    low = fminf(low, __shfl_xor_sync(KS_FULL_MASK, low, d));
    high = fmaxf(high, __shfl_xor_sync(KS_FULL_MASK, high, d));
  }
  if (threadIdx.x % KS_WARP == 0) room[2 * warp] = low, room[2 * warp + 1] = high;
  if (__syncthreads_or(!(wrong == 0.0f))) return false;
  for (int w = 0; w < n_warps; w++)
    low = fminf(low, room[2 * w]), high = fmaxf(high, room[2 * w + 1]);
  *least = low, *most = high;
  return true;
}

/* The row's range after clipping to mean +- clip standard deviations. */
template <bool WHOLE>
KS_DEVICE void entropy_clip(const entropy_copied &row, double clip, double *room, entropy_range *r) {
  double sum = 0, squares = 0;
  entropy_each<WHOLE>(row, [&](float x) { sum += (double)x; });
  const double mean = ks_block_sum(sum, room) / (double)row.n;
  entropy_each<WHOLE>(row, [&](float x) {
    const double off = (double)x - mean;
    squares += __dmul_rn(off, off);
  });
  const double reach = __dmul_rn(clip, sqrt(ks_block_sum(squares, room) / (double)row.n));
  r->low = fmin(fmax(r->low, mean - reach), mean + reach);
  r->high = fmin(fmax(r->high, mean - reach), mean + reach);
}

/* Counts this thread's values in its copy of the histogram, counts[bin, copy]; those beyond the ends go to the first and the last
 * bin. */
template <bool WHOLE>
KS_DEVICE void entropy_count(const entropy_copied &row, int32_t *counts, int copies, const entropy_quick &q,
                             const entropy_range *r) {
  const float round = 0x1.8p23f; /* adding it leaves the whole number in the low bits of the mantissa */
  const uint32_t copy = threadIdx.x & (unsigned)(copies - 1),
                 first = copy - ks_float_to_bits(round) * (uint32_t)copies;
#pragma unroll 1
  for (int j = (int)threadIdx.x * 4; j < row.n; j += (int)blockDim.x * 4) {
    const float4 v = *(const float4 *)(row.x + j);
    const float x[4] = {v.x, v.y, v.z, v.w};
    uint32_t at[4];
    float off = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float place = fminf(fmaxf(fmaf(x[i] - q.low, q.factor, q.offset), -0.25f), q.most),
                  shifted = place + round;
      off = fmaxf(off, fabsf(place - (shifted - round)));
      at[i] = ks_float_to_bits(shifted) * (uint32_t)copies + first;
    }
    if (!(off < q.sure)) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (WHOLE || j + i < row.n) at[i] = (uint32_t)(entropy_exact_bin(r, x[i]) * copies) + copy;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (WHOLE || j + i < row.n) atomicAdd(&counts[at[i]], 1);
  }
}

/* Bits of n values counted in `copies` histograms, side by side: counts[bin, copy]. */
KS_DEVICE double entropy_of_counts(const int32_t *counts, int n_bins, int copies, int64_t n, double *room) {
  double sum = 0;
  int all = 0;
  for (int b = (int)threadIdx.x; b < n_bins; b += (int)blockDim.x) {
    int count = 0;
    for (int c = 0; c < copies; c++) /* each lane begins in a bank of its own */
      count += counts[b * copies + ((b + c) & (copies - 1))];
    all |= count == n;
    if (count > 1) sum += (double)count * log2((double)count);
  }
  all = __syncthreads_or(all);
  sum = ks_block_sum(sum, room);
  return all ? 0.0 : log2((double)n) - sum / (double)n;
}

/* Blocks that a multiprocessor holds: Turing's has 1024 threads at most, newer ones' code more registers. */
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
#define ENTROPY_BLOCKS 4
#else
#define ENTROPY_BLOCKS 5
#endif

/* copies: a power of two. */
template <bool WHOLE>
__global__ void __launch_bounds__(ENTROPY_THREADS, ENTROPY_BLOCKS)
    entropy_rows_kernel(const float *x, double *h, entropy_shape a) {
  ks_smem smem;
  double *room = ks_smem_take<double>(&smem, KS_WARP);
  float *ends = ks_smem_take<float>(&smem, 2 * KS_WARP);
  entropy_range *range = ks_smem_take<entropy_range>(&smem, 1);
  int32_t *counts = ks_smem_take<int32_t>(&smem, (size_t)(a.copies * a.n_bins));
  const entropy_copied row = {ks_smem_take<float>(&smem, (size_t)(a.n_cols + 3) / 4 * 4), a.n_cols};
  entropy_copy<WHOLE>(row, x + blockIdx.x * a.n_cols);
  for (int b = (int)threadIdx.x; b < a.copies * a.n_bins; b += (int)blockDim.x)
    counts[b] = 0;
  ks_cp_async_wait<0>();
  float least, most;
  double result = NAN;
  if (entropy_ends<WHOLE>(row, ends, &least, &most)) {
    entropy_range r = {(double)least, (double)most, 0, a.n_bins};
    if (a.kind == KS_ENTROPY_CLIPPED) entropy_clip<WHOLE>(row, a.clip, room, &r);
    result = 0;
    if (r.high > r.low) {
      const entropy_quick q = entropy_quick_of(r);
      r.width = (r.high - r.low) / (double)r.n_bins;
      if (threadIdx.x == 0) *range = r;
      __syncthreads();
      entropy_count<WHOLE>(row, counts, a.copies, q, range);
      __syncthreads();
      result = entropy_of_counts(counts, a.n_bins, a.copies, a.n_cols, room);
    }
  }
  if (threadIdx.x == 0) h[blockIdx.x] = result;
}

/* Blocks of as many warps as a row needs, and up to 32 histograms side by side. */
static ks_status entropy_launch_rows(ks_ctx *ctx, const ks_entropy_args *a, double *h, entropy_shape shape) {
  const int64_t per_warp = KS_WARP * ENTROPY_PIECES * 4,
                threads = ks_min_i64((a->n_cols + per_warp - 1) / per_warp * KS_WARP, ENTROPY_THREADS);
  const bool whole = ks_is_vector_aligned(a->x, a->n_cols);
  shape.copies = KS_WARP;
  while (shape.copies * shape.n_bins > ENTROPY_COUNTERS)
    shape.copies /= 2;
  return ks_launch(ctx, "entropy", whole ? entropy_rows_kernel<true> : entropy_rows_kernel<false>,
                   dim3(ks_blocks_for(a->n_rows, 1)), dim3((unsigned)threads),
                   ks_smem_bytes<double>(KS_WARP) + ks_smem_bytes<float>(2 * KS_WARP) +
                       ks_smem_bytes<entropy_range>(1) +
                       ks_smem_bytes<int32_t>((size_t)(shape.copies * shape.n_bins)) +
                       ks_smem_bytes<float>((size_t)(a->n_cols + 3) / 4 * 4),
                   a->x, h, shape);
}

extern "C" ks_status ks_cuda_entropy(ks_ctx *ctx, const ks_entropy_args *a) {
  const bool bins = a->kind == KS_ENTROPY_HISTOGRAM || a->kind == KS_ENTROPY_CLIPPED;
  const size_t bytes = (size_t)a->n_rows * sizeof(double);
  const int32_t n_bins = bins ? (int32_t)a->n_bins : 0;
  const int32_t copies = bins ? (int32_t)ks_min_i64(ENTROPY_WARPS, ENTROPY_COUNTERS / n_bins) : 0;
  const entropy_shape shape = {a->n_cols, a->clip, (int32_t)a->kind,
                               n_bins,    copies,  a->n_cols <= ENTROPY_HELD};
  double *h;
  KS_TRY(ks_cuda_workspace(ctx, bytes, (void **)&h));
  if (bins && a->n_cols > 0 && a->n_cols <= ENTROPY_HELD)
    KS_TRY(entropy_launch_rows(ctx, a, h, shape));
  else
    KS_TRY(ks_launch(ctx, "entropy", entropy_kernel, dim3(ks_blocks_for(a->n_rows, 1)), dim3(ENTROPY_THREADS),
                     ks_smem_bytes<double>(KS_WARP) +
                         ks_smem_bytes<int32_t>((size_t)copies * (size_t)n_bins) +
                         ks_smem_bytes<float>(shape.held ? (size_t)a->n_cols : 0),
                     a->x, h, shape));
  KS_TRY(ks_cuda_deliver(ctx, a->h, h, bytes));
  return ks_cuda_finish(ctx);
}
