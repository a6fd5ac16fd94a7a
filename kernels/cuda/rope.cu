/* Rotary embedding, half-split form, in place; with it, rows on their way into a cache.
 *
 *   (x1, x2) = (x[h, j], x[h, j + d/2]);  x1' = x1 cos - x2 sin;  x2' = x2 cos + x1 sin
 *   angle = position * inv_freq[j];  inverse: the angle's sign turned
 *
 * Bytes, with e those of an activation and n = rows * heads * head_dim: 2 e n; 3 e n where a copy goes to the
 * cache. Flops: 3 n, and for each row and j < d/2 six double operations (the product, the reduction to
 * [-pi/4, pi/4], a conversion) and 20 in float32: bound by memory. Double's rate of 1 : 64 on small cards
 * would not hide a whole sine in double behind a row of few heads; the reduction, which alone needs it, is
 * hidden from 2 heads on (GeForce), or 7 (Orin). Instructions of bf16 heads of 64 (sm_90): 17 an element, half
 * of what the bytes leave time for.
 *
 * Accuracy: the reduced angle carries the rounding of the product in double and, rounded to float32, 2^-25 of
 * itself; sine and cosine are then within 1.5 units in the last place of float32, for angles up to 2^40.
 * Beyond that the CUDA library's double functions take over.
 *
 * Geometry: one launch for queries, keys and values (ks_rope_store; z is the array). A block of 256 threads
 * takes as many rows of an array as give each thread 64 bytes, one where rows are few, and at most 512 of the
 * d/2 columns. It asks for its pairs first, makes the rows' cosines and sines once, in shared memory, while
 * they come, and turns all heads with them. Pairs go in the widest units (16, 8, 4 or 2 bytes) that head_dim
 * and x allow: 16 bytes for head sizes 64 and 128, 4 for bf16 heads of 100. 56 to 64 registers: 4 blocks, 64
 * KiB under way a multiprocessor. Positions and frequencies are staged as one array.
 *
 * Determinism: elementwise.
 *
 * Ladder (H200, bf16; an empty kernel measures 3 us; shares of a copy's 4.25 TB/s)
 *   considered  a table of cosines made on the host for every step: 4 MB to make and to copy for 8192 positions of 128
 *   considered  a table of a step's rows, made once on the device: 8 bytes to read for each angle, as many as
 *               a bf16 row has in 4 heads, in place of arithmetic that the loads hide
 *   v1          table first, then one pair of units at a time. 2048 rows of 32 heads of 64: 19 to 27 us, two
 *               staged copies in it, 21 %; hot, in a recorded step, 4.7 us; one row 9.2 us, 1.9 in a step
 *   v2          this. Computed, 2048 rows: 10 us with its staged copy, 4.3 in a step; 16384 rows of 32 heads
 *               of 100: 58 us (85 %); q, k and the cache of a decoding step in one launch of 2.2 us for four
 *               of 1.6 to 1.9. Not measured yet */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rope.cuh"

enum { ROPE_THREADS = 256, ROPE_MAX_COLUMNS = 512, ROPE_TENSORS = 4, ROPE_TABLE = 2048 };

/* Rows of heads: turned in place, or only read (turn 0); to: NULL, or where row i goes as well, as row index[i]. A block takes
 * `rows` of them. Launch arguments: no padding, they are compared as bytes. */
typedef struct {
  void *x, *to;
  int64_t n_heads;
  int rows, turn;
} rope_tensor;
typedef struct {
  rope_tensor tensors[ROPE_TENSORS];
  int64_t n_rows, half;
  int columns, is_inverse; /* of a block */
} rope_shape;

/* Units that a thread has under way: 64 bytes. */
template <class T, int E> KS_HOST_DEVICE constexpr int rope_held() {
  return E * (int)sizeof(T) >= 4 ? 32 / (E * (int)sizeof(T)) : 8;
}

/* Cosines and sines of a block's rows and columns. */
KS_DEVICE void rope_table(float *cos_of, float *sin_of, const double *inv_freq, const int32_t *positions,
                          int rows, int columns, bool is_inverse) {
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < rows * columns; i += ROPE_THREADS) {
    const double angle = (double)positions[i / columns] * inv_freq[i % columns];
    rope_cos_sin(is_inverse ? -angle : angle, &cos_of[i], &sin_of[i]);
  }
}

/* A block: rows of one tensor (z), and of their heads' columns those of one stretch (y). Offsets within its rows fit 32 bits. */
template <class T, int E>
__global__ void __launch_bounds__(ROPE_THREADS)
    rope_kernel(const __grid_constant__ rope_shape a, const double *inv_freq, const int32_t *positions,
                const int64_t *index) {
  enum { HELD = rope_held<T, E>() };
  typedef typename rope_word<E *(int)sizeof(T)>::type word;
  ks_grid_wait();
  ks_grid_start_next();
  ks_smem smem;
  const rope_tensor &t = a.tensors[blockIdx.z];
  float *cos_of = ks_smem_take<float>(&smem, (size_t)(t.rows * a.columns)),
        *sin_of = ks_smem_take<float>(&smem, (size_t)(t.rows * a.columns));
  const int64_t row0 = (int64_t)blockIdx.x * t.rows, column0 = (int64_t)blockIdx.y * a.columns,
                stride = t.n_heads * 2 * a.half;
  if (row0 >= a.n_rows) return;
  const int rows = (int)min((int64_t)t.rows, a.n_rows - row0),
            columns = (int)min((int64_t)a.columns, a.half - column0);
  const uint32_t units = (uint32_t)(columns / E), heads = (uint32_t)t.n_heads,
                 n = (uint32_t)rows * heads * units, half = (uint32_t)a.half;
  T *x = (T *)t.x + row0 * stride + column0, *to = (T *)t.to + column0;
  rope_unit<T, E> first[HELD], second[HELD];
  uint32_t at[HELD];
#pragma unroll 1
  for (uint32_t begin = 0; begin < n; begin += ROPE_THREADS * HELD) {
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const uint32_t i = begin + k * ROPE_THREADS + threadIdx.x, head = i / units;
      at[k] = 2 * half * head + (i - head * units) * E;
      if (i >= n) continue;
      first[k].word = *(const word *)(x + at[k]);
      second[k].word = *(const word *)(x + at[k] + half);
    }
    if (begin == 0 && t.turn) { /* while the first units come */
      rope_table(cos_of, sin_of, inv_freq + column0, positions + row0, rows, columns, a.is_inverse);
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const uint32_t i = begin + k * ROPE_THREADS + threadIdx.x, head = i / units, row = head / heads;
      if (i >= n) continue;
      if (t.turn) {
        const uint32_t in_table = row * (uint32_t)columns + (i - head * units) * E;
        rope_turn<T, E>(&first[k], &second[k], cos_of + in_table, sin_of + in_table);
        rope_store_unit(x + at[k], first[k]);
        rope_store_unit(x + at[k] + half, second[k]);
      }
      if (t.to) {
        T *p = to + (index[row0 + row] - row) * stride + at[k];
        rope_store_unit(p, first[k]);
        rope_store_unit(p + half, second[k]);
      }
    }
  }
}

/* What does not depend on the tensors. */
typedef struct {
  const int32_t *positions;
  const double *inv_freq;
  const int64_t *index; /* host, or NULL */
  int64_t n_rows, head_dim;
  bool inverse;
} rope_rows;

ks_status ks_rope_stage(ks_ctx *ctx, const double *host_inv_freq, int64_t head_dim,
                        const int32_t *host_positions, int64_t n_rows, const double **inv_freq,
                        const int32_t **positions) {
  const size_t front = (size_t)(head_dim / 2) * sizeof(double), back = (size_t)n_rows * sizeof(int32_t);
  char *both;
  const void *device;
  KS_TRY(ks_alloc_array(&both, front + back, 1, "rope: positions"));
  memcpy(both, host_inv_freq, front);
  memcpy(both + front, host_positions, back);
  const ks_status status = ks_cuda_stage(ctx, both, front + back, &device);
  free(both);
  *inv_freq = (const double *)device;
  *positions = (const int32_t *)((const char *)device + front);
  return status;
}

template <class T, int E>
static ks_status rope_launch(ks_ctx *ctx, const char *op, const rope_rows *r, rope_shape shape, int64_t n) {
  const int64_t half = r->head_dim / 2, columns = ks_min_i64(half, ROPE_MAX_COLUMNS),
                spread = r->n_rows / (2 * ks_cuda_device_of(ctx)->n_sm);
  int64_t most = 1, blocks = 0;
  for (int64_t i = 0; i < n; i++) {
    rope_tensor *t = &shape.tensors[i];
    const int64_t units = t->n_heads * (columns / E),
                  side_by_side = ks_min_i64(ROPE_THREADS * rope_held<T, E>() / units, ROPE_TABLE / columns),
                  rows = ks_min_i64(side_by_side, spread);
    t->rows = rows > 1 ? (int)rows : 1;
    if (t->n_heads > UINT32_MAX / (t->rows * r->head_dim))
      return KS_FAIL(KS_EUNSUPPORTED, "%s: %lld heads of %lld in one row", op, (long long)t->n_heads,
                     (long long)r->head_dim);
    most = t->rows > most ? t->rows : most;
    const int64_t its_blocks = ks_blocks_for(r->n_rows, t->rows);
    blocks = its_blocks > blocks ? its_blocks : blocks;
  }
  const int32_t *positions;
  const double *inv_freq;
  const int64_t *index;
  KS_TRY(ks_rope_stage(ctx, r->inv_freq, r->head_dim, r->positions, r->n_rows, &inv_freq, &positions));
  KS_TRY(
      ks_cuda_stage(ctx, r->index, r->index ? (size_t)r->n_rows * sizeof *index : 0, (const void **)&index));
  shape.n_rows = r->n_rows;
  shape.half = half;
  shape.columns = (int)columns;
  shape.is_inverse = r->inverse;
  return ks_launch_early(ctx, op, rope_kernel<T, E>,
                         dim3((unsigned)blocks, ks_blocks_for(half, columns), (unsigned)n),
                         dim3(ROPE_THREADS), 2 * ks_smem_bytes<float>((size_t)(most * columns)), shape,
                         inv_freq, positions, index);
}

/* By the widest unit that divides half a head and the alignment of all arrays. */
template <class T>
static ks_status rope_tensors(ks_ctx *ctx, const char *op, const rope_rows *r, const rope_tensor *tensors,
                              int64_t n) {
  rope_shape shape;
  uintptr_t bits = (uintptr_t)(r->head_dim / 2 * (int64_t)sizeof(T));
  memset(&shape, 0, sizeof shape);
  for (int64_t i = 0; i < n; i++) {
    shape.tensors[i] = tensors[i];
    bits |= (uintptr_t)tensors[i].x | (uintptr_t)tensors[i].to;
  }
  if (bits % 16 == 0) return rope_launch<T, 16 / sizeof(T)>(ctx, op, r, shape, n);
  if (bits % 8 == 0) return rope_launch<T, 8 / sizeof(T)>(ctx, op, r, shape, n);
  if constexpr (sizeof(T) == 2) {
    if (bits % 4 == 0) return rope_launch<T, 2>(ctx, op, r, shape, n);
  }
  return rope_launch<T, 1>(ctx, op, r, shape, n);
}

extern "C" ks_status ks_cuda_rope(ks_ctx *ctx, const ks_rope_args *a) {
  const rope_rows rows = {a->positions, a->inv_freq, NULL, a->n_rows, a->head_dim, a->inverse};
  const rope_tensor tensor = {a->x, NULL, a->n_heads, 0, 1};
  return KS_CUDA_BY_ACT(ctx, rope_tensors, (ctx, "rope", &rows, &tensor, 1));
}

/* The tensor of an array to store: one that is turned on its way (and has no place to go yet), or a new one. NULL: none fits. */
static rope_tensor *rope_stored(rope_tensor *tensors, int64_t *n, const ks_rows_args *store,
                                int64_t head_dim) {
  for (int64_t i = 0; i < *n; i++)
    if (tensors[i].x == store->x)
      return tensors[i].to || tensors[i].n_heads * head_dim != store->n_cols ? NULL : &tensors[i];
  if (store->n_cols % head_dim != 0) return NULL;
  tensors[*n] = {(void *)(uintptr_t)store->x, NULL, store->n_cols / head_dim, 0, 0};
  return &tensors[(*n)++];
}

extern "C" ks_status ks_cuda_rope_store(ks_ctx *ctx, const ks_rope_store_args *a) {
  rope_tensor tensors[ROPE_TENSORS];
  int64_t n = 0;
  bool fits = a->n_rope > 0;
  for (; n < a->n_rope; n++)
    tensors[n] = {a->rope[n].x, NULL, a->rope[n].n_heads, 0, 1};
  for (int64_t i = 0; i < a->n_store && fits; i++) {
    rope_tensor *t = a->store[i].n_rows == a->rope[0].n_rows
                         ? rope_stored(tensors, &n, &a->store[i], a->rope[0].head_dim)
                         : NULL;
    fits = t != NULL;
    if (t) t->to = a->store[i].y;
  }
  if (fits) {
    const rope_rows rows = {a->rope[0].positions, a->rope[0].inv_freq, a->n_store ? a->store[0].index : NULL,
                            a->rope[0].n_rows,    a->rope[0].head_dim, a->rope[0].inverse};
    return KS_CUDA_BY_ACT(ctx, rope_tensors, (ctx, "rope_store", &rows, tensors, n));
  }
  for (int64_t i = 0; i < a->n_rope; i++)
    KS_TRY(ks_cuda_rope(ctx, &a->rope[i]));
  for (int64_t i = 0; i < a->n_store; i++)
    KS_TRY(ks_cuda_rows_scatter(ctx, &a->store[i]));
  return KS_OK;
}
