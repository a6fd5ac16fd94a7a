/* Root mean square norm, forward and input gradient.
 *
 *   y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)              (Zhang & Sennrich 2019)
 *
 *   With xhat = x * rstd and y = xhat * w:  dL/dxhat = dy * w  and  d rstd / dx = -rstd^3 x / n, so
 *   dx = (dx) + rstd * (dy * w - xhat * t),  t = mean(dy * w * xhat) = rstd * mean(dy * w * x)
 *
 * xhat is of the size of 1 and t of that of dy * w: nothing overflows that need not, whatever the size of x.
 *
 * Bytes, with e those of an activation and n = rows * cols: forward 2 e n, backward 3 e n (4 e n when it
 * accumulates), 4 a row for rstd, w once a block. Flops: forward 4 n, backward 9 n, 1 to 2 a byte: bound by
 * memory. Instructions of bf16 (sm_90): 16 an element forward, 32 backward, half of what the bytes leave time for.
 *
 * Geometry: a row belongs to 8, 16 or 32 lanes of a warp, or to a block: threads for two 16-byte pieces each
 * (backward one), at most 512, by its length alone. Pieces lie round robin over the threads, in registers as
 * they are in memory; x (backward: x and dy) is read once, but for what is beyond 1024 (512) pieces of a row.
 * There are no more blocks than the device holds at once, and as many rows for each: a thread keeps the
 * weights under its pieces, loads its next row before it adds up this one, and asks for the old dx with it.
 * In flight, bf16: 32 KiB a multiprocessor forward (1024 threads of 64 registers), 40 KiB backward. Rows of a
 * q/k norm (64 to 128 columns) take 8 to 32 lanes, so that a warp's access covers up to 4 whole rows.
 * Unaligned rows and odd column counts have kernels of their own, element by element through the same pieces.
 * Weights are loaded before the wait for earlier kernels.
 *
 * Determinism: the sum of a row is one fma chain a thread over its pieces in rising order, then a tree over
 * the threads; both are fixed by n_cols, neither n_rows nor alignment changes them. Longest chain L: 8 (float32) or
 * 16 (bf16) elements, a piece more for each 512 beyond, and the tree's 3 to 10 levels.
 *
 * Ladder (H200, bf16; an empty kernel measures 3 us; shares of a copy's 4.25 TB/s)
 *   considered  floats in registers: twice the registers, half the warps
 *   v1          a row a group or block, 4 pieces a thread, w from L1 after the sum. 2048 x 2048: forward 10.1
 *               us (39 %), backward 14.5 us; hot, in a recorded step, 5.3 and 8.8 us; 1 x 2048: 5.1 us, 2.2
 *               in a step. What it waited for: x, then w (from L2 or memory in a cold step), one after the
 *               other; w is twice the bytes of a bf16 x, again for each row
 *   v2          this. Computed: 2048 x 2048 forward 8 us (50 %; 3 of them the launch), 4.5 in a step; 16384 x
 *               3200 forward 56 us (88 %), backward, accumulating, 110 us (90 %); 1 x 2048 1.8 us in a step.
 *               Not measured yet */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/row.cuh"

/* Largest blocks that a multiprocessor holds at least: 64 registers a thread; some compilers' code needs more. */
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
#define NORM_BLOCKS 1
#else
#define NORM_BLOCKS 2
#endif

enum {
  NORM_BLOCK = 128,     /* of rows that share warps */
  NORM_ROW_BLOCK = 512, /* at most, where a row has a block; both kernels take 64 registers a thread */
  NORM_THREADS_PER_SM = 1024,
  NORM_FORWARD_HELD = 2, /* pieces of each array in a thread's registers then */
  NORM_BACKWARD_HELD = 1,
  NORM_MAX_COLS = 1 << 30
};

/* Over the GROUP threads that share a row: parts of a warp, or (0) the whole block. */
template <int GROUP> KS_DEVICE float norm_group_sum(float x, float *room) {
  if constexpr (GROUP == 0) {
    return ks_block_sum(x, room);
  } else {
#pragma unroll
    for (int d = GROUP / 2; d > 0; d /= 2)
      x += __shfl_xor_sync(KS_FULL_MASK, x, d);
    return x;
  }
}

/* acc += x * x over a piece. */
template <class T> KS_DEVICE float norm_squares(float acc, const ks_piece<T> &piece) {
  float x[ks_piece<T>::N];
  ks_piece_unpack(x, piece);
#pragma unroll
  for (int i = 0; i < ks_piece<T>::N; i++)
    acc = fmaf(x[i], x[i], acc);
  return acc;
}

/* acc += dy * w * x over a piece. */
template <class T>
KS_DEVICE float norm_products(float acc, const ks_piece<T> &x_piece, const ks_piece<T> &dy_piece,
                              const float *w) {
  float x[ks_piece<T>::N], dy[ks_piece<T>::N];
  ks_piece_unpack(x, x_piece);
  ks_piece_unpack(dy, dy_piece);
#pragma unroll
  for (int i = 0; i < ks_piece<T>::N; i++)
    acc = fmaf(dy[i] * w[i], x[i], acc);
  return acc;
}

template <bool WHOLE, class T> KS_DEVICE ks_piece<T> norm_piece(const T *p, int n_left) {
  ks_piece<T> one[1];
  ks_pieces_load<1, WHOLE>(one, p, 0, 0, n_left);
  return one[0];
}

/* x * rstd * w */
template <class T> KS_DEVICE ks_piece<T> norm_scaled(const ks_piece<T> &piece, const float *w, float rstd) {
  float x[ks_piece<T>::N];
  ks_piece_unpack(x, piece);
#pragma unroll
  for (int i = 0; i < ks_piece<T>::N; i++)
    x[i] = x[i] * rstd * w[i];
  return ks_piece_pack<T>(x);
}

/* (before +) rstd (dy w - x rstd t) */
template <class T>
KS_DEVICE ks_piece<T> norm_gradient(const ks_piece<T> &x_piece, const ks_piece<T> &dy_piece,
                                    const ks_piece<T> &before_piece, bool add, const float *w, float rstd,
                                    float t) {
  enum { N = ks_piece<T>::N };
  float x[N], g[N], before[N];
  ks_piece_unpack(x, x_piece);
  ks_piece_unpack(g, dy_piece);
  ks_piece_unpack(before, before_piece);
#pragma unroll
  for (int i = 0; i < N; i++) {
    g[i] = rstd * fmaf(-(x[i] * rstd), t, g[i] * w[i]);
    if (add) g[i] = before[i] + g[i];
  }
  return ks_piece_pack<T>(g);
}

/* A thread's rows and its pieces of each. */
template <class T, int GROUP> struct norm_place {
  int64_t n_rows;
  int in_block, block_rows; /* number of this thread's row among those of a block */
  int n_cols, first, step;  /* of this thread's pieces, in elements */

  KS_DEVICE norm_place(int64_t rows, int64_t cols) {
    const int group = GROUP ? GROUP : (int)blockDim.x, lane = (int)threadIdx.x;
    n_rows = rows;
    in_block = GROUP ? lane / group : 0;
    block_rows = GROUP ? (int)blockDim.x / group : 1;
    n_cols = (int)cols;
    first = (GROUP ? lane % group : lane) * ks_piece<T>::N;
    step = group * ks_piece<T>::N;
  }
  /* Columns of a row; none behind the last: its threads go on with zeros, for the collectives. */
  KS_DEVICE int cols(int64_t row) const { return row < n_rows ? n_cols : 0; }
};

/* Weights under this thread's pieces, for all its rows. */
template <int N, int HELD, bool WHOLE>
KS_DEVICE void norm_weights(float w[HELD][N], const float *from, int first, int step, int n_cols) {
#pragma unroll
  for (int k = 0; k < HELD; k++)
    ks_floats_load<N, WHOLE>(w[k], from + first + k * step, n_cols - (first + k * step));
}

template <class T, int GROUP, int HELD, bool WHOLE>
__global__ void __launch_bounds__(NORM_ROW_BLOCK, WHOLE ? NORM_BLOCKS : 1)
    rmsnorm_forward_kernel(const T *x, const float *__restrict__ w, T *y, float *rstd_out, int64_t n_rows,
                           int64_t n_cols, float inverse, float eps) {
  enum { N = ks_piece<T>::N };
  ks_smem smem;
  float *room = GROUP ? nullptr : ks_smem_take<float>(&smem, KS_WARP);
  const norm_place<T, GROUP> at(n_rows, n_cols);
  const int64_t stride = (int64_t)gridDim.x * at.block_rows;
  const int rest = at.first + HELD * at.step;
  int64_t base = (int64_t)blockIdx.x * at.block_rows, row = base + at.in_block;
  ks_piece<T> held[HELD], next[HELD];
  float weight[HELD][N];
  norm_weights<N, HELD, WHOLE>(weight, w, at.first, at.step, at.n_cols);
  ks_grid_wait();
  ks_grid_start_next();
  ks_pieces_load<HELD, WHOLE>(held, x + row * n_cols, at.first, at.step, at.cols(row));
  for (; base < n_rows; base += stride, row += stride) {
    const int cols = at.cols(row);
    const T *from = x + row * n_cols;
    T *to = y + row * n_cols;
    ks_pieces_load<HELD, WHOLE>(next, from + stride * n_cols, at.first, at.step, at.cols(row + stride));
    float sum = 0;
#pragma unroll
    for (int k = 0; k < HELD; k++)
      sum = norm_squares(sum, held[k]);
    if (GROUP == 0)
      for (int j = rest; j < cols; j += at.step)
        sum = norm_squares(sum, norm_piece<WHOLE>(from + j, cols - j));
    sum = norm_group_sum<GROUP>(sum, room);
    const float rstd = rsqrtf(fmaf(sum, inverse, eps));
    if (rstd_out && row < n_rows && at.first == 0) rstd_out[row] = rstd;
#pragma unroll
    for (int k = 0; k < HELD; k++)
      ks_piece_put<WHOLE>(to, norm_scaled(held[k], weight[k], rstd), at.first + k * at.step, cols);
    if (GROUP == 0)
      for (int j = rest; j < cols; j += at.step) {
        float far[N];
        ks_floats_load<N, WHOLE>(far, w + j, cols - j);
        ks_piece_put<WHOLE>(to, norm_scaled(norm_piece<WHOLE>(from + j, cols - j), far, rstd), j, cols);
      }
#pragma unroll
    for (int k = 0; k < HELD; k++)
      held[k] = next[k];
  }
}

template <class T, int GROUP, int HELD, bool WHOLE>
__global__ void __launch_bounds__(NORM_ROW_BLOCK, WHOLE ? NORM_BLOCKS : 1)
    rmsnorm_backward_kernel(const T *x, const float *__restrict__ w, const float *rstd_in, const T *dy, T *dx,
                            int64_t n_rows, int64_t n_cols, float inverse, bool accumulate) {
  enum { N = ks_piece<T>::N };
  ks_smem smem;
  float *room = GROUP ? nullptr : ks_smem_take<float>(&smem, KS_WARP);
  const norm_place<T, GROUP> at(n_rows, n_cols);
  const int64_t stride = (int64_t)gridDim.x * at.block_rows;
  const int rest = at.first + HELD * at.step;
  int64_t base = (int64_t)blockIdx.x * at.block_rows, row = base + at.in_block;
  ks_piece<T> xs[HELD], dys[HELD], next_xs[HELD], next_dys[HELD], before[HELD];
  float weight[HELD][N];
  norm_weights<N, HELD, WHOLE>(weight, w, at.first, at.step, at.n_cols);
  ks_grid_wait();
  ks_grid_start_next();
  ks_pieces_load<HELD, WHOLE>(xs, x + row * n_cols, at.first, at.step, at.cols(row));
  ks_pieces_load<HELD, WHOLE>(dys, dy + row * n_cols, at.first, at.step, at.cols(row));
  float rstd = row < n_rows ? rstd_in[row] : 0.0f;
  for (; base < n_rows; base += stride, row += stride) {
    const int cols = at.cols(row), next_cols = at.cols(row + stride);
    const int64_t offset = row * n_cols, next = offset + stride * n_cols;
    ks_pieces_load<HELD, WHOLE>(before, dx + offset, at.first, at.step, accumulate ? cols : 0);
    ks_pieces_load<HELD, WHOLE>(next_xs, x + next, at.first, at.step, next_cols);
    ks_pieces_load<HELD, WHOLE>(next_dys, dy + next, at.first, at.step, next_cols);
    const float next_rstd = row + stride < n_rows ? rstd_in[row + stride] : 0.0f;
    float dot = 0;
#pragma unroll
    for (int k = 0; k < HELD; k++)
      dot = norm_products(dot, xs[k], dys[k], weight[k]);
    if (GROUP == 0)
      for (int j = rest; j < cols; j += at.step) {
        float far[N];
        ks_floats_load<N, WHOLE>(far, w + j, cols - j);
        dot = norm_products(dot, norm_piece<WHOLE>(x + offset + j, cols - j),
                            norm_piece<WHOLE>(dy + offset + j, cols - j), far);
      }
    dot = norm_group_sum<GROUP>(dot, room);
    const float t = rstd * (dot * inverse);
#pragma unroll
    for (int k = 0; k < HELD; k++)
      ks_piece_put<WHOLE>(dx + offset,
                          norm_gradient(xs[k], dys[k], before[k], accumulate, weight[k], rstd, t),
                          at.first + k * at.step, cols);
    if (GROUP == 0)
      for (int j = rest; j < cols; j += at.step) {
        float far[N];
        ks_floats_load<N, WHOLE>(far, w + j, cols - j);
        const ks_piece<T> x_piece = norm_piece<WHOLE>(x + offset + j, cols - j),
                          dy_piece = norm_piece<WHOLE>(dy + offset + j, cols - j),
                          old = norm_piece<WHOLE, T>(dx + offset + j, cols - j);
        ks_piece_put<WHOLE>(dx + offset, norm_gradient(x_piece, dy_piece, old, accumulate, far, rstd, t), j,
                            cols);
      }
#pragma unroll
    for (int k = 0; k < HELD; k++)
      xs[k] = next_xs[k], dys[k] = next_dys[k];
    rstd = next_rstd;
  }
}

/* Kernels by the number of pieces of a row: of rows at odd addresses, and of rows of whole pieces. */
template <class T> struct norm_shape {
  int64_t most_pieces;
  int group;
  void (*forward[2])(const T *, const float *, T *, float *, int64_t, int64_t, float, float);
  void (*backward[2])(const T *, const float *, const float *, const T *, T *, int64_t, int64_t, float, bool);
};
template <class T> static const norm_shape<T> *norm_shape_for(int64_t n_cols) {
#define NORM_SHAPE(most, group, f, b)                                                                        \
  {                                                                                                          \
    most, group, {rmsnorm_forward_kernel<T, group, f, false>, rmsnorm_forward_kernel<T, group, f, true>}, {  \
      rmsnorm_backward_kernel<T, group, b, false>, rmsnorm_backward_kernel<T, group, b, true>                \
    }                                                                                                        \
  }
  static const norm_shape<T> norm_shapes[] = {
      NORM_SHAPE(8, 8, 1, 1), NORM_SHAPE(16, 16, 1, 1), NORM_SHAPE(32, 32, 1, 1),
      NORM_SHAPE(INT64_MAX, 0, NORM_FORWARD_HELD, NORM_BACKWARD_HELD)};
#undef NORM_SHAPE
  const norm_shape<T> *s = norm_shapes;
  while (ks_pieces_of<T>(n_cols) > s->most_pieces)
    s++;
  return s;
}

/* Threads of a row, by its length alone: its group, or a block with `held` pieces a thread. */
template <class T> static int64_t norm_threads(int64_t n_cols, int64_t held) {
  const int group = norm_shape_for<T>(n_cols)->group;
  const int64_t warps = (ks_pieces_of<T>(n_cols) + held * KS_WARP - 1) / (held * KS_WARP);
  return group ? group : ks_min_i64(warps * KS_WARP, NORM_ROW_BLOCK);
}

int32_t ks_norm_threads(int64_t n_cols) {
  return (int32_t)norm_threads<ks_bf16>(n_cols, NORM_FORWARD_HELD);
}

/* No more blocks than are on the device at once, and as many rows for each. `threads`: a row's. */
typedef struct {
  dim3 grid, block;
  size_t smem_bytes;
} norm_geometry;
static norm_geometry norm_geometry_of(ks_ctx *ctx, bool shares_warps, int64_t threads, int64_t n_rows) {
  const int64_t block = shares_warps ? (int64_t)NORM_BLOCK : threads,
                blocks = ks_blocks_for(n_rows, block / threads),
                at_once = ks_cuda_device_of(ctx)->n_sm * (NORM_THREADS_PER_SM / block),
                turns = (blocks + at_once - 1) / at_once;
  return {dim3(ks_blocks_for(blocks, turns)), dim3((unsigned)block),
          shares_warps ? 0 : ks_smem_bytes<float>(KS_WARP)};
}

template <class T> static ks_status norm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const norm_shape<T> *s = norm_shape_for<T>(a->n_cols);
  const norm_geometry g =
      norm_geometry_of(ctx, s->group > 0, norm_threads<T>(a->n_cols, NORM_FORWARD_HELD), a->n_rows);
  const T *x = (const T *)a->x;
  const bool whole = ks_is_vector_aligned(x, a->n_cols) && ks_is_aligned_16(a->y) && ks_is_aligned_16(a->w);
  return ks_launch_early(ctx, "rmsnorm_forward", s->forward[whole], g.grid, g.block, g.smem_bytes, x, a->w,
                         (T *)a->y, a->rstd, a->n_rows, a->n_cols, 1.0f / (float)a->n_cols, a->eps);
}

template <class T> static ks_status norm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const norm_shape<T> *s = norm_shape_for<T>(a->n_cols);
  const norm_geometry g =
      norm_geometry_of(ctx, s->group > 0, norm_threads<T>(a->n_cols, NORM_BACKWARD_HELD), a->n_rows);
  const T *x = (const T *)a->x;
  const bool whole = ks_is_vector_aligned(x, a->n_cols) && ks_is_aligned_16(a->dy) &&
                     ks_is_aligned_16(a->dx) && ks_is_aligned_16(a->w);
  return ks_launch_early(ctx, "rmsnorm_backward", s->backward[whole], g.grid, g.block, g.smem_bytes, x, a->w,
                         a->rstd, (const T *)a->dy, (T *)a->dx, a->n_rows, a->n_cols, 1.0f / (float)a->n_cols,
                         a->accumulate_dx);
}

static ks_status norm_check(const char *op, const ks_rmsnorm_args *a) {
  return a->n_cols <= NORM_MAX_COLS ? KS_OK
                                    : KS_FAIL(KS_EUNSUPPORTED, "%s: rows of %lld; at most %d", op,
                                              (long long)a->n_cols, (int)NORM_MAX_COLS);
}

extern "C" ks_status ks_cuda_rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  KS_TRY(norm_check("rmsnorm_forward", a));
  return KS_CUDA_BY_ACT(ctx, norm_forward, (ctx, a));
}
extern "C" ks_status ks_cuda_rmsnorm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  KS_TRY(norm_check("rmsnorm_backward", a));
  return KS_CUDA_BY_ACT(ctx, norm_backward, (ctx, a));
}
