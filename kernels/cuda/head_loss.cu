/* Cross-entropy of the language-model head without keeping the logits, and its input gradient.
 *
 *   z = x W^T + bias,   loss_i = log sum_j exp(z_ij) - z_it,   p_ij = exp(z_ij) / sum_j exp(z_ij)
 *   dx_i = s_i (p_i - onehot(t)) W
 *
 * Over tiles T of HEAD_TILE vocabulary entries, m_T = max_T z, S_T = sum_T exp(z - m_T), M = max_T m_T:
 *
 *   S = sum_T S_T exp(m_T - M),   loss = log S + (M - z_t)
 *   p_ij = e_ij exp(m_T - M) / S,   e_ij = exp(z_ij - m_T)
 *
 * so that a tile's exponentials may leave the chip before the row's maximum is known. A tile whose
 * maximum is -inf counts from 0: its exponentials are 0. A NaN anywhere in a row makes its loss and
 * gradient NaN.
 *
 * Variants; d columns, cost of a pair (row, vocabulary entry) at 801 TFLOP/s bf16, 4.25 TB/s (H200, measured):
 *
 *   fused    bf16, d a multiple of 8, sm_80 and later.
 *            1 a 128 x 128 tile of logits on tensor cores, reduced in registers to (m_T, S_T) and the
 *              target's logit; with gradient e is written too, in bf16 (2 B)
 *            2 the tiles of a row are added up
 *            3 gradient: e becomes g = s (p - onehot) in place (4 B)
 *            4 dx = g W by the linear layer's input gradient (2 B)
 *            Loss alone: 2 d flops, 8/128 B; no logit reaches device memory: bound by the product.
 *            With gradient: 4 d flops + 8 B: 4.99e-3 d + 1.9 ps.
 *   wgmma    the same with step 1 by Hopper's own products in tiles of 128 x 256 (head_loss_wgmma.cu); bf16, d a multiple
 *            of 8, sm_90 only. Not measured yet, so no default.
 *   chunked  any type and d, block weights. Logits of a block of rows in float32 by the linear layer
 *            (4 B), one kernel for maximum, sum, loss and g (4 B, or 8 B when rows leave the cache, and
 *            2 B), dx = g W (2 B): 4 d flops + 12 to 16 B: 4.99e-3 d + 2.8 to 3.8 ps.
 *
 *   A third way, logits computed again once the row's sum is known, needs no e: 4 B or 0.9 ps less, one
 *   product or 2.50e-3 d ps more. It would pay below d = 380 only, and is not kept.
 *
 *   fused costs less for every d when both products run at the same rate, and is the default. Its
 *   logits come by mma.sync, which on Hopper is expected at about 60 % of the rate of wgmma: 4.2e-3 d instead
 *   of 2.50e-3 d ps. There chunked should win with gradient from d = 560 (rows in cache) or 1130 on.
 *   Both to be measured before the default depends on the card.
 *
 * Blocks of rows: as many as HEAD_BLOCK_BYTES of logits and g allow, 256 to 2048, so that dx = g W
 * [rows, d] has tiles enough to fill the card (2048 x 2048: 256 of 128 x 128). The workspace holds one.
 *
 * Geometry of fused: 8 warps of 64 x 32, stages of 64 columns by cp.async, three where shared memory
 * has room, else two (product.cuh). The row tiles of a block follow one another for each 128 vocabulary
 * entries: W is read from memory once a block, x stays in L2.
 *
 * Determinism: fixed order everywhere; a row's bits depend on d, V and the kernel alone, not on block or
 * batch. L: d / 16 + 8 + 7 within a tile, V / 4096 + 5 between tiles. Roundings to bf16: e, g, dx.
 *
 * Ladder (H200, bf16, commit f74fb33)
 *   v1  chunked: the simplest, and the check of the other. Not measured yet.
 *   v2  fused; expected: the rate of mma.sync, so about 60 % of 801 TFLOP/s for the loss alone on
 *       Hopper. Measured with gradient: 2048 x 128256 x 2048 8.19 ms, 263 TFLOP/s or 31 ps a pair, twice the
 *       15.6 ps that this makes with dx = g W; which of the four steps is slow is not known yet.
 *   v3  wgmma; expected: 620 TFLOP/s for the loss alone at d = 2048 (head_loss_wgmma.cu). Not measured yet.
 *   next, not built: tcgen05 on sm_100; exp(m_T - M) / S applied inside the product with W instead of by
 *       a pass (4 B less) */
#include "kernels/cuda/head_loss.cuh"
#include "kernels/cuda/product.cuh"
#include "kernels/cuda/tensor_map.h"

enum { HEAD_TILE = 128, HEAD_THREADS = 256, HEAD_SOFTMAX_THREADS = 512 };
static const int64_t HEAD_BLOCK_BYTES = 128 << 20, HEAD_MIN_ROWS = 256, HEAD_MAX_ROWS = 2048;

/* head_exp with the C library's accuracy: float32 is for checking, and these kernels wait for memory anyway. */
KS_DEVICE float head_exp_exact(float x, float max) {
  return expf(x - (max == -INFINITY ? 0.0f : max));
}

/* ---------------------------------------------------------------- fused */

struct head_tile_args {
  product_rows x, w;
  const float *bias; /* [n_vocab] or NULL */
  const int32_t *targets;
  float2 *partial; /* [n_rows, n_tiles]: maximum, sum */
  float *z_target; /* [n_rows] */
  ks_bf16 *e;      /* [n_rows, n_vocab] or NULL */
  int64_t n_row_tiles, n_tiles;
};

template <int STAGES> struct head_product : product_mma<2, 4, 4, 4, STAGES> {
  enum { WARPS_N = 4, MT = 4, NT = 4, PITCH = HEAD_TILE + 8 };

  static KS_DEVICE int warp_n() { return (int)threadIdx.x / KS_WARP % WARPS_N; }
  /* Row of the tile that half `h` of sub-tile i holds in this thread; column of element c of sub-tile j. */
  static KS_DEVICE int row_of(int i, int h) {
    return (int)threadIdx.x / KS_WARP / WARPS_N * (16 * MT) + 16 * i + 8 * h + (int)threadIdx.x % KS_WARP / 4;
  }
  static KS_DEVICE int col_of(int j, int c) {
    return warp_n() * (8 * NT) + 8 * j + (int)threadIdx.x % 4 * 2 + c;
  }

  /* Bias; -inf where there is no column; the target's logit goes out. */
  KS_DEVICE void finish_logits(const head_tile_args &p, int64_t row0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t row = row0 + row_of(i, h);
        const int64_t target = row < p.x.n_rows ? p.targets[row] : -1;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int64_t col = col0 + col_of(j, c);
            float *z = &this->acc[i][j][2 * h + c];
            if (col >= p.w.n_rows)
              *z = -INFINITY;
            else if (p.bias)
              *z += p.bias[col];
            if (col == target) p.z_target[row] = *z;
          }
      }
  }

  /* Maxima of the tile's rows over all four warps of a row; room: [WARPS_N, HEAD_TILE]. */
  KS_DEVICE void row_max(float *room, float out[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float m = -INFINITY;
#pragma unroll
        for (int j = 0; j < NT; j++)
          m = ks_max_nan(m, ks_max_nan(this->acc[i][j][2 * h], this->acc[i][j][2 * h + 1]));
        m = head_quad_max(m);
        if (threadIdx.x % 4 == 0) room[warp_n() * HEAD_TILE + row_of(i, h)] = m;
      }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float *m = room + row_of(i, h);
        out[i][h] =
            ks_max_nan(ks_max_nan(m[0], m[HEAD_TILE]), ks_max_nan(m[2 * HEAD_TILE], m[3 * HEAD_TILE]));
      }
  }

  /* Logits become exponentials; their sums over this warp's columns go to room [WARPS_N, HEAD_TILE]. */
  KS_DEVICE void exponentials(float *room, const float max[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < NT; j++) {
          float *z = &this->acc[i][j][2 * h];
          z[0] = head_exp(z[0], max[i][h]);
          z[1] = head_exp(z[1], max[i][h]);
          sum += z[0] + z[1];
        }
        sum = ks_quad_sum(sum);
        if (threadIdx.x % 4 == 0) room[warp_n() * HEAD_TILE + row_of(i, h)] = sum;
      }
  }

  KS_DEVICE void spill(ks_bf16 *tile) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < NT; j++)
          *(uint32_t *)(tile + row_of(i, h) * PITCH + col_of(j, 0)) =
              ks_pack_bf16(this->acc[i][j][2 * h], this->acc[i][j][2 * h + 1]);
  }
};

/* The tile in shared memory to rows row0 .. of e. */
template <int PITCH>
KS_DEVICE void head_store_tile(const head_tile_args &p, const ks_bf16 *tile, int64_t row0, int64_t col0) {
  const int64_t n_rows = p.x.n_rows - row0, n_cols = p.w.n_rows - col0;
  const bool vectors = p.w.n_rows % 8 == 0;
  for (int at = (int)threadIdx.x; at < HEAD_TILE * (HEAD_TILE / 8); at += HEAD_THREADS) {
    const int row = at / (HEAD_TILE / 8), col = at % (HEAD_TILE / 8) * 8;
    if (row >= n_rows || col >= n_cols) continue;
    ks_bf16 *to = p.e + (row0 + row) * p.w.n_rows + col0 + col;
    if (vectors)
      *(uint4 *)to = *(const uint4 *)(tile + row * PITCH + col);
    else
      for (int c = 0; c < 8 && col + c < n_cols; c++)
        to[c] = tile[row * PITCH + col + c];
  }
}

template <int STAGES> __global__ __launch_bounds__(HEAD_THREADS, 2) void head_tile_kernel(head_tile_args p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 /* else chunked: head_is_fused */
  typedef head_product<STAGES> P;
  ks_smem smem;
  uint4 *room = ks_smem_take<uint4>(&smem, product_units<P>());
  const int64_t row0 = (int64_t)blockIdx.x % p.n_row_tiles * HEAD_TILE;
  const int64_t tile = (int64_t)blockIdx.x / p.n_row_tiles, col0 = tile * HEAD_TILE;
  P c;
  product_no_hook nothing;
  float max[P::MT][2];
  product_run<P, false, false>(&c, p.x, row0, p.w, col0, room, &nothing);

  float *maxima = (float *)room, *sums = maxima + P::WARPS_N * HEAD_TILE;
  ks_bf16 *e = (ks_bf16 *)(sums + P::WARPS_N * HEAD_TILE);
  c.finish_logits(p, row0, col0);
  c.row_max(maxima, max);
  c.exponentials(sums, max);
  if (p.e) c.spill(e);
  __syncthreads();
  const int row = (int)threadIdx.x;
  if (row < HEAD_TILE && row0 + row < p.x.n_rows) {
    float m = maxima[row], sum = sums[row];
#pragma unroll
    for (int w = 1; w < P::WARPS_N; w++) {
      m = ks_max_nan(m, maxima[w * HEAD_TILE + row]);
      sum += sums[w * HEAD_TILE + row];
    }
    p.partial[(row0 + row) * p.n_tiles + tile] = make_float2(m, sum);
  }
  if (p.e) head_store_tile<P::PITCH>(p, e, row0, col0);
#endif
}

/* A warp a row: loss, and (M, scale / S) for the gradient. */
__global__ void head_combine_kernel(const float2 *partial, const float *z_target, const float *row_scale,
                                    float2 *state, float *loss, int64_t n_rows, int64_t n_tiles) {
  const int lane = (int)threadIdx.x % KS_WARP;
  const int64_t row = (int64_t)blockIdx.x * (HEAD_THREADS / KS_WARP) + (int)threadIdx.x / KS_WARP;
  const float2 *own = partial + (row < n_rows ? row : 0) * n_tiles;
  float max = -INFINITY, sum = 0.0f;
  for (int64_t t = lane; t < n_tiles; t += KS_WARP)
    max = ks_max_nan(max, own[t].x);
  max = ks_warp_max(max);
  for (int64_t t = lane; t < n_tiles; t += KS_WARP)
    sum += own[t].y * head_exp(own[t].x, max);
  sum = ks_warp_sum(sum);
  if (lane != 0 || row >= n_rows) return;
  loss[row] = (float)(log((double)sum) + ((double)max - (double)z_target[row]));
  state[row] = make_float2(max, (row_scale ? row_scale[row] : 1.0f) / sum);
}

/* e becomes g = scale (p - onehot) in place: a block a row. */
__global__ void head_rescale_kernel(ks_bf16 *e, const float2 *partial, const float2 *state,
                                    const int32_t *targets, const float *row_scale, int64_t n_vocab,
                                    int64_t n_tiles, int tile) {
  const int64_t row = blockIdx.x, target = targets[row];
  const float2 *own = partial + row * n_tiles;
  const float max = state[row].x, factor = state[row].y, scale = row_scale ? row_scale[row] : 1.0f;
  ks_bf16 *g = e + row * n_vocab;
  if (n_vocab % 8 != 0) {
    for (int64_t j = threadIdx.x; j < n_vocab; j += HEAD_THREADS) {
      const float p = ks_to_float(g[j]) * (head_exp(own[j / tile].x, max) * factor);
      g[j] = ks_from_float<ks_bf16>(j == target ? p - scale : p);
    }
    return;
  }
#pragma unroll 2
  for (int64_t j = (int64_t)threadIdx.x * 8; j < n_vocab; j += HEAD_THREADS * 8) {
    ks_vec<ks_bf16> v;
    ks_load_vec(&v, g + j);
    const float f = head_exp(own[j / tile].x, max) * factor;
#pragma unroll
    for (int c = 0; c < 8; c++)
      v.x[c] = v.x[c] * f - (j + c == target ? scale : 0.0f);
    ks_store_vec(g + j, &v);
  }
}

/* ---------------------------------------------------------------- chunked */

/* Maximum and sum of exponentials counted from it, as elements come. */
struct head_running {
  float max, sum;
};
KS_DEVICE void head_add(head_running *r, float x) {
  const float max = ks_max_nan(r->max, x);
  r->sum = max == r->max ? r->sum : r->sum * head_exp_exact(r->max, max);
  r->sum += head_exp_exact(x, max);
  r->max = max;
}
KS_DEVICE void head_add_4(head_running *r, float4 x) {
  const float four = ks_max_nan(ks_max_nan(x.x, x.y), ks_max_nan(x.z, x.w)), max = ks_max_nan(r->max, four);
  r->sum = max == r->max ? r->sum : r->sum * head_exp_exact(r->max, max);
  r->sum += (head_exp_exact(x.x, max) + head_exp_exact(x.y, max)) +
            (head_exp_exact(x.z, max) + head_exp_exact(x.w, max));
  r->max = max;
}

/* A block a row of logits: loss, and g (which may be z itself) when it is wanted. */
template <class T>
__global__ void head_softmax_kernel(const float *z, T *g, const int32_t *targets, const float *row_scale,
                                    float *loss, int64_t n_vocab) {
  ks_smem smem;
  float *room = ks_smem_take<float>(&smem, KS_WARP);
  const int64_t row = blockIdx.x, target = targets[row];
  const float *own = z + row * n_vocab;
  const bool vectors = n_vocab % 4 == 0;
  head_running r = {-INFINITY, 0.0f};
  if (vectors)
#pragma unroll 4
    for (int64_t j = (int64_t)threadIdx.x * 4; j < n_vocab; j += HEAD_SOFTMAX_THREADS * 4)
      head_add_4(&r, *(const float4 *)(own + j));
  else
    for (int64_t j = threadIdx.x; j < n_vocab; j += HEAD_SOFTMAX_THREADS)
      head_add(&r, own[j]);
  const float z_target = own[target];
  const float max = ks_block_max(r.max, room);
  const float sum = ks_block_sum(r.sum * head_exp_exact(r.max, max), room);
  if (threadIdx.x == 0) loss[row] = (float)(log((double)sum) + ((double)max - (double)z_target));
  if (!g) return;
  const float scale = row_scale ? row_scale[row] : 1.0f, factor = scale / sum;
  T *to = g + row * n_vocab;
  for (int64_t j = threadIdx.x; j < n_vocab; j += HEAD_SOFTMAX_THREADS) {
    const float p = head_exp_exact(own[j], max) * factor;
    to[j] = ks_from_float<T>(j == target ? p - scale : p);
  }
}

/* ---------------------------------------------------------------- host side */

/* Pieces of the workspace, each on 256 bytes. */
struct head_room {
  int64_t block; /* rows */
  size_t z, g, partial, state, z_target, loss, bytes;
};

/* Vocabulary entries of a tile; 0: chunked. By the variant, the device and the shape of the weight alone. */
static int head_tile_of(const ks_ctx *ctx, const ks_weight *w) {
  const ks_cuda_variant v = ks_cuda_variant_of(ctx, "head_loss");
  if (w->dtype != KS_DTYPE_BF16 || w->n_in % 8 != 0 || ks_cuda_device_of(ctx)->major < 8) return 0;
  if (v == KS_CUDA_head_loss_wgmma)
    return ks_tensor_map_takes(((const ks_cuda_weight *)w->impl)->values, w->n_out, w->n_in) ? HEAD_WIDE_TILE
                                                                                             : 0;
  return v == KS_CUDA_head_loss_fused ? HEAD_TILE : 0;
}

static int64_t head_tiles(const ks_weight *w, int tile) {
  return (w->n_out + tile - 1) / tile;
}

static size_t head_take(head_room *r, size_t bytes) {
  const size_t at = r->bytes;
  r->bytes += (bytes + 255) & ~(size_t)255;
  return at;
}

static head_room head_room_of(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows) {
  const int tile = head_tile_of(ctx, w);
  const bool fused = tile > 0, is_f32 = ks_ctx_act_dtype(ctx) == KS_DTYPE_F32;
  const size_t z_size = fused ? 0 : sizeof(float), g_size = is_f32 ? 0 : sizeof(ks_bf16);
  const int64_t row_bytes = (w->n_out > 0 ? w->n_out : 1) * (int64_t)(z_size + g_size);
  int64_t rows = HEAD_BLOCK_BYTES / row_bytes / HEAD_TILE * HEAD_TILE;
  rows = rows < HEAD_MIN_ROWS ? HEAD_MIN_ROWS : rows > HEAD_MAX_ROWS ? HEAD_MAX_ROWS : rows;
  head_room r = {};
  r.block = rows < n_rows ? rows : n_rows;
  const size_t n = (size_t)r.block, pairs = n * (size_t)w->n_out;
  r.z = head_take(&r, pairs * z_size);
  r.g = g_size ? head_take(&r, pairs * g_size) : r.z;
  if (fused) {
    r.partial = head_take(&r, n * (size_t)head_tiles(w, tile) * sizeof(float2));
    r.state = head_take(&r, n * sizeof(float2));
    r.z_target = head_take(&r, n * sizeof(float));
  }
  r.loss = head_take(&r, (size_t)n_rows * sizeof(float));
  return r;
}

/* What one block of rows is computed from. */
struct head_block {
  const ks_weight *w;
  const void *x;
  const int32_t *targets;
  const float *row_scale;
  float *loss;
  void *dx; /* or NULL */
  int64_t n_rows;
  const head_room *room;
  char *base;
};

static ks_status head_gradient(ks_ctx *ctx, const head_block *b) {
  ks_linear_args a = {};
  a.w = b->w;
  a.dy = b->base + b->room->g;
  a.dx = b->dx;
  a.n_rows = b->n_rows;
  return b->w->n_in ? ks_cuda_linear_backward(ctx, &a) : KS_OK;
}

/* Step 1: tiles of 128 x 128. */
static ks_status head_narrow(ks_ctx *ctx, const head_block *b, const head_wide_args *wide) {
  head_tile_args p = {};
  p.x = product_rows_of(b->x, b->n_rows, b->w->n_in, KS_DTYPE_BF16);
  p.w = product_rows_of(((const ks_cuda_weight *)b->w->impl)->values, b->w->n_out, b->w->n_in, KS_DTYPE_BF16);
  p.bias = wide->bias;
  p.targets = wide->targets;
  p.partial = wide->partial;
  p.z_target = wide->z_target;
  p.e = wide->e;
  p.n_row_tiles = (b->n_rows + HEAD_TILE - 1) / HEAD_TILE;
  p.n_tiles = wide->n_tiles;
  const size_t three = product_units<head_product<3>>() * sizeof(uint4),
               two = product_units<head_product<2>>() * sizeof(uint4);
  const bool is_large = (size_t)ks_cuda_device_of(ctx)->smem_per_block >= three;
  return ks_launch(ctx, "head_loss", is_large ? head_tile_kernel<3> : head_tile_kernel<2>,
                   dim3(ks_blocks_for(p.n_row_tiles * p.n_tiles, 1)), dim3(HEAD_THREADS),
                   is_large ? three : two, p);
}

static ks_status head_fused(ks_ctx *ctx, const head_block *b, int tile) {
  const ks_cuda_weight *impl = (const ks_cuda_weight *)b->w->impl;
  float2 *state = (float2 *)(b->base + b->room->state);
  head_wide_args p = {};
  p.bias = impl->bias;
  p.targets = b->targets;
  p.partial = (float2 *)(b->base + b->room->partial);
  p.z_target = (float *)(b->base + b->room->z_target);
  p.e = b->dx ? (ks_bf16 *)(b->base + b->room->g) : NULL;
  p.n_rows = b->n_rows;
  p.n_in = b->w->n_in;
  p.n_vocab = b->w->n_out;
  p.n_tiles = head_tiles(b->w, tile);
  KS_TRY(tile == HEAD_WIDE_TILE ? ks_wgmma_head(ctx, b->x, impl->values, &p) : head_narrow(ctx, b, &p));
  KS_TRY(ks_launch(ctx, "head_loss", head_combine_kernel,
                   dim3(ks_blocks_for(b->n_rows, HEAD_THREADS / KS_WARP)), dim3(HEAD_THREADS), 0, p.partial,
                   p.z_target, b->row_scale, state, b->loss, b->n_rows, p.n_tiles));
  if (!b->dx) return KS_OK;
  KS_TRY(ks_launch(ctx, "head_loss", head_rescale_kernel, dim3((unsigned)b->n_rows), dim3(HEAD_THREADS), 0,
                   p.e, p.partial, state, b->targets, b->row_scale, p.n_vocab, p.n_tiles, tile));
  return head_gradient(ctx, b);
}

template <class T> static ks_status head_softmax(ks_ctx *ctx, const head_block *b) {
  const float *z = (const float *)(b->base + b->room->z);
  T *g = b->dx ? (T *)(b->base + b->room->g) : NULL;
  return ks_launch(ctx, "head_loss", head_softmax_kernel<T>, dim3((unsigned)b->n_rows),
                   dim3(HEAD_SOFTMAX_THREADS), ks_smem_bytes<float>(KS_WARP), z, g, b->targets, b->row_scale,
                   b->loss, b->w->n_out);
}

static ks_status head_chunked(ks_ctx *ctx, const head_block *b) {
  ks_linear_args a = {};
  a.w = b->w;
  a.x = b->x;
  a.y = b->base + b->room->z;
  a.y_is_f32 = true;
  a.n_rows = b->n_rows;
  KS_TRY(ks_cuda_linear_forward(ctx, &a));
  KS_TRY(KS_CUDA_BY_ACT(ctx, head_softmax, (ctx, b)));
  return b->dx ? head_gradient(ctx, b) : KS_OK;
}

extern "C" size_t ks_cuda_head_loss_workspace(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows) {
  return head_room_of(ctx, w, n_rows).bytes;
}

extern "C" ks_status ks_cuda_head_loss(ks_ctx *ctx, const ks_head_loss_args *a) {
  const head_room room = head_room_of(ctx, a->w, a->n_rows);
  const int tile = head_tile_of(ctx, a->w);
  const void *targets, *row_scale = NULL;
  float *loss = (float *)((char *)a->workspace + room.loss);
  if ((uintptr_t)a->workspace % 16 != 0 || (tile > 0 && (uintptr_t)a->x % 16 != 0))
    return KS_FAIL(KS_EINVAL,
                   "head_loss: x and workspace must be aligned to 16 bytes, as what ks_mem_alloc gives is");
  KS_TRY(ks_cuda_stage(ctx, a->targets, (size_t)a->n_rows * sizeof(int32_t), &targets));
  if (a->row_scale) KS_TRY(ks_cuda_stage(ctx, a->row_scale, (size_t)a->n_rows * sizeof(float), &row_scale));
  for (int64_t row = 0; row < a->n_rows; row += room.block) {
    head_block b = {};
    b.w = a->w;
    b.x = ks_act_at(ctx, a->x, row * a->w->n_in);
    b.targets = (const int32_t *)targets + row;
    b.row_scale = row_scale ? (const float *)row_scale + row : NULL;
    b.loss = loss + row;
    b.dx = ks_act_at(ctx, a->dx, row * a->w->n_in);
    b.n_rows = a->n_rows - row < room.block ? a->n_rows - row : room.block;
    b.room = &room;
    b.base = (char *)a->workspace;
    KS_TRY(tile > 0 ? head_fused(ctx, &b, tile) : head_chunked(ctx, &b));
  }
  return ks_cuda_deliver(ctx, a->loss, loss, (size_t)a->n_rows * sizeof(float));
}
