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
 * accumulates), 4 a row for rstd; w stays in cache. Flops: forward 4 n, backward 9 n, 1 to 2 a byte: bound by
 * memory.
 *
 * Geometry: a row belongs to 8, 16 or 32 lanes of a warp, or to a block of 128 to 512 threads, by its length
 * alone (norm_shapes). Its 16-byte pieces lie round robin over these threads, up to 4 in each thread's
 * registers as they are in memory, all loads under way together; x (backward: x and dy) is read once. Only
 * rows of more than 2048 pieces (8192 float32, 16384 bf16) read their end twice. Rows of a q/k norm (64 to
 * 128 columns) take 8 to 32 lanes, so that a warp's access covers up to 4 whole rows. Unaligned rows and odd
 * column counts go element by element through the same pieces.
 *
 * Determinism: the sum of a row is one fma chain a thread over its pieces in rising order, then a tree over
 * the threads; both are fixed by n_cols, neither n_rows nor alignment changes them. Longest chain L: 16
 * (float32) or 32 (bf16) elements, a piece more for each 512 of a longer row, and the tree's 3 to 9 levels.
 *
 * Ladder (H200, bf16, commit f74fb33; an empty kernel measures 3 us)
 *   considered  floats in registers, w kept there over several rows: twice the registers, half the warps
 *   v1          this: packed pieces, threads by length, w from L1, which has twice the bandwidth that this takes;
 *               expected: the card's copy bandwidth from a few MB on, launch time below. Measured, 2048 x 2048:
 *               forward 10.1 us (1.66 TB/s, 39 % of a copy), backward 14.5 us; hot, in a recorded step, 5.3 and 8.8 us */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"

enum { NORM_BLOCK = 128 };

/* Over GROUP threads that share a row: parts of a warp, or the whole block. */
template <int GROUP> KS_DEVICE float norm_group_sum(float x, float *room) {
  if constexpr (GROUP > KS_WARP) {
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

/* Where a thread's pieces lie. A group beyond the last row has none, and takes part in the collectives. */
template <class T, int GROUP> struct norm_place {
  int64_t row, n_cols; /* n_cols 0: nothing to do */
  int lane;
  bool is_row;

  KS_DEVICE norm_place(int64_t n_rows, int64_t cols) {
    row = (int64_t)blockIdx.x * (int)(blockDim.x / GROUP) + (int)(threadIdx.x / GROUP);
    lane = (int)(threadIdx.x % GROUP);
    is_row = row < n_rows;
    n_cols = is_row ? cols : 0;
  }
  KS_DEVICE int64_t column(int64_t k) const { /* of this thread's piece k */
    return (k * GROUP + lane) * ks_piece<T>::N;
  }
};

/* This thread's first HELD pieces, all on their way at once; in aligned rows every piece is whole. */
template <class T, int GROUP, int HELD>
KS_DEVICE void norm_load(ks_piece<T> held[HELD], const T *row, const norm_place<T, GROUP> &at, bool aligned) {
  if (aligned) {
#pragma unroll
    for (int k = 0; k < HELD; k++)
      held[k] = ks_piece_load_whole(row + at.column(k), at.column(k) < at.n_cols);
  } else {
#pragma unroll
    for (int k = 0; k < HELD; k++)
      held[k] = ks_piece_load_part(row + at.column(k), at.n_cols - at.column(k));
  }
}

template <class T>
KS_DEVICE void norm_write(T *y, const ks_piece<T> &piece, const float *w, float rstd, int64_t n_left,
                          bool aligned) {
  enum { N = ks_piece<T>::N };
  float x[N], weight[N];
  ks_piece_unpack(x, piece);
  ks_floats_load<N>(weight, w, n_left, aligned);
#pragma unroll
  for (int i = 0; i < N; i++)
    x[i] = x[i] * rstd * weight[i];
  ks_piece_store(y, ks_piece_pack<T>(x), n_left, aligned);
}

template <class T, int GROUP, int HELD>
__global__ void rmsnorm_forward_kernel(const T *x, const float *__restrict__ w, T *y, float *rstd_out,
                                       int64_t n_rows, int64_t n_cols, float eps, bool aligned) {
  ks_smem smem;
  float *room = GROUP > KS_WARP ? ks_smem_take<float>(&smem, KS_WARP) : nullptr;
  const norm_place<T, GROUP> at(n_rows, n_cols);
  x += at.row * n_cols;
  y += at.row * n_cols;
  ks_piece<T> held[HELD];
  norm_load<T, GROUP, HELD>(held, x, at, aligned);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++)
    sum = norm_squares(sum, held[k]);
  for (int64_t k = HELD; at.column(k) < at.n_cols; k++)
    sum = norm_squares(sum, ks_piece_load(x + at.column(k), at.n_cols - at.column(k), aligned));
  sum = norm_group_sum<GROUP>(sum, room);
  const float rstd = 1.0f / sqrtf((n_cols ? sum / (float)n_cols : 0.0f) + eps);
  if (rstd_out && at.is_row && at.lane == 0) rstd_out[at.row] = rstd;
#pragma unroll
  for (int k = 0; k < HELD; k++)
    if (at.column(k) < at.n_cols)
      norm_write(y + at.column(k), held[k], w + at.column(k), rstd, at.n_cols - at.column(k), aligned);
  for (int64_t k = HELD; at.column(k) < at.n_cols; k++)
    norm_write(y + at.column(k), ks_piece_load(x + at.column(k), at.n_cols - at.column(k), aligned),
               w + at.column(k), rstd, at.n_cols - at.column(k), aligned);
}

/* What the second pass of the gradient needs beside x and dy. */
struct norm_back {
  float rstd, t;
  bool accumulate, aligned;
};

template <class T>
KS_DEVICE void norm_write_back(T *dx, const ks_piece<T> &x_piece, const ks_piece<T> &dy_piece, const float *w,
                               int64_t n_left, const norm_back &b) {
  enum { N = ks_piece<T>::N };
  float x[N], g[N], weight[N], before[N];
  if (b.accumulate) ks_piece_unpack(before, ks_piece_load((const T *)dx, n_left, b.aligned));
  ks_piece_unpack(x, x_piece);
  ks_piece_unpack(g, dy_piece);
  ks_floats_load<N>(weight, w, n_left, b.aligned);
#pragma unroll
  for (int i = 0; i < N; i++) {
    g[i] = b.rstd * fmaf(-(x[i] * b.rstd), b.t, g[i] * weight[i]);
    if (b.accumulate) g[i] = before[i] + g[i];
  }
  ks_piece_store(dx, ks_piece_pack<T>(g), n_left, b.aligned);
}

/* A row's sum of dy * w * x over the pieces of one thread. */
template <class T>
KS_DEVICE float norm_dot(float acc, const ks_piece<T> &x, const ks_piece<T> &dy, const float *w,
                         int64_t n_left, bool aligned) {
  float weight[ks_piece<T>::N];
  ks_floats_load<ks_piece<T>::N>(weight, w, n_left, aligned);
  return norm_products(acc, x, dy, weight);
}

template <class T, int GROUP, int HELD>
__global__ void rmsnorm_backward_kernel(const T *x, const float *__restrict__ w, const float *rstd_in,
                                        const T *dy, T *dx, int64_t n_rows, int64_t n_cols, bool accumulate,
                                        bool aligned) {
  ks_smem smem;
  float *room = GROUP > KS_WARP ? ks_smem_take<float>(&smem, KS_WARP) : nullptr;
  const norm_place<T, GROUP> at(n_rows, n_cols);
  x += at.row * n_cols;
  dy += at.row * n_cols;
  dx += at.row * n_cols;
  ks_piece<T> held_x[HELD], held_dy[HELD];
  norm_load<T, GROUP, HELD>(held_x, x, at, aligned);
  norm_load<T, GROUP, HELD>(held_dy, dy, at, aligned);
  const float rstd = at.is_row ? rstd_in[at.row] : 0.0f;
  float dot = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++)
    if (at.column(k) < at.n_cols)
      dot = norm_dot(dot, held_x[k], held_dy[k], w + at.column(k), at.n_cols - at.column(k), aligned);
  for (int64_t k = HELD; at.column(k) < at.n_cols; k++) {
    const int64_t j = at.column(k), n_left = at.n_cols - j;
    dot = norm_dot(dot, ks_piece_load(x + j, n_left, aligned), ks_piece_load(dy + j, n_left, aligned), w + j,
                   n_left, aligned);
  }
  dot = norm_group_sum<GROUP>(dot, room);
  const norm_back b = {rstd, n_cols ? rstd * (dot / (float)n_cols) : 0.0f, accumulate, aligned};
#pragma unroll
  for (int k = 0; k < HELD; k++)
    if (at.column(k) < at.n_cols)
      norm_write_back(dx + at.column(k), held_x[k], held_dy[k], w + at.column(k), at.n_cols - at.column(k),
                      b);
  for (int64_t k = HELD; at.column(k) < at.n_cols; k++) {
    const int64_t j = at.column(k), n_left = at.n_cols - j;
    norm_write_back(dx + j, ks_piece_load(x + j, n_left, aligned), ks_piece_load(dy + j, n_left, aligned),
                    w + j, n_left, b);
  }
}

/* Kernels by the number of pieces of a row. */
template <class T> struct norm_shape {
  int64_t most_pieces;
  int group;
  void (*forward)(const T *, const float *, T *, float *, int64_t, int64_t, float, bool);
  void (*backward)(const T *, const float *, const float *, const T *, T *, int64_t, int64_t, bool, bool);
};
template <class T> static const norm_shape<T> *norm_shape_for(int64_t n_cols) {
#define NORM_SHAPE(most, group, held)                                                                        \
  { most, group, rmsnorm_forward_kernel<T, group, held>, rmsnorm_backward_kernel<T, group, held> }
  static const norm_shape<T> norm_shapes[] = {
      NORM_SHAPE(8, 8, 1),     NORM_SHAPE(16, 16, 1),    NORM_SHAPE(32, 32, 1),        NORM_SHAPE(128, 32, 4),
      NORM_SHAPE(512, 128, 4), NORM_SHAPE(1024, 256, 4), NORM_SHAPE(INT64_MAX, 512, 4)};
#undef NORM_SHAPE
  const norm_shape<T> *s = norm_shapes;
  while (ks_pieces_of<T>(n_cols) > s->most_pieces)
    s++;
  return s;
}

/* Threads of a block, blocks and shared bytes. */
typedef struct {
  dim3 grid, block;
  size_t smem_bytes;
} norm_geometry;
static norm_geometry norm_geometry_of(int group, int64_t n_rows) {
  const int threads = group > NORM_BLOCK ? group : NORM_BLOCK;
  return {dim3(ks_blocks_for(n_rows, threads / group)), dim3((unsigned)threads),
          group > KS_WARP ? ks_smem_bytes<float>(KS_WARP) : 0};
}

template <class T> static ks_status norm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const norm_shape<T> *s = norm_shape_for<T>(a->n_cols);
  const norm_geometry g = norm_geometry_of(s->group, a->n_rows);
  const T *x = (const T *)a->x;
  const bool aligned = ks_is_vector_aligned(x, a->n_cols) && ks_is_aligned_16(a->y) && ks_is_aligned_16(a->w);
  return ks_launch(ctx, "rmsnorm_forward", s->forward, g.grid, g.block, g.smem_bytes, x, a->w, (T *)a->y,
                   a->rstd, a->n_rows, a->n_cols, a->eps, aligned);
}

template <class T> static ks_status norm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  const norm_shape<T> *s = norm_shape_for<T>(a->n_cols);
  const norm_geometry g = norm_geometry_of(s->group, a->n_rows);
  const T *x = (const T *)a->x;
  const bool aligned = ks_is_vector_aligned(x, a->n_cols) && ks_is_aligned_16(a->dy) &&
                       ks_is_aligned_16(a->dx) && ks_is_aligned_16(a->w);
  return ks_launch(ctx, "rmsnorm_backward", s->backward, g.grid, g.block, g.smem_bytes, x, a->w, a->rstd,
                   (const T *)a->dy, (T *)a->dx, a->n_rows, a->n_cols, a->accumulate_dx, aligned);
}

extern "C" ks_status ks_cuda_rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  return KS_CUDA_BY_ACT(ctx, norm_forward, (ctx, a));
}
extern "C" ks_status ks_cuda_rmsnorm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  return KS_CUDA_BY_ACT(ctx, norm_backward, (ctx, a));
}
