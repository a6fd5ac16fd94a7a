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
 * Variants; d columns, cost of a pair (row, vocabulary entry) at 796 TFLOP/s bf16, 4.25 TB/s (H200, measured):
 *
 *   by_card  the default: chunked with gradient on cards of compute capability 9 to 11 with cuBLASLt, else fused (see below).
 *   fused    bf16, d a multiple of 8, sm_80 and later.
 *            1 a 128 x 128 tile of logits on tensor cores, reduced in registers to (m_T, S_T) and the
 *              target's logit; with gradient e is written too, in bf16 (2 B)
 *            2 the tiles of a row are added up
 *            3 gradient: e becomes g = s (p - onehot) in place (4 B)
 *            4 dx = g W by the linear layer's input gradient (2 B)
 *            Loss alone: 2 d flops, 8/128 B; no logit reaches device memory: bound by the product.
 *            With gradient: 4 d flops + 8 B: 5.03e-3 d + 1.9 ps where mma.sync has the rate of cuBLASLt.
 *   wgmma    the same with step 1 by Hopper's own products in tiles of 128 x 256 (head_loss_wgmma.cu); bf16, d a multiple
 *            of 8, sm_90 only. Not measured yet, so no default.
 *   chunked  any type and d, block weights; also what the others take where they cannot work. Logits of a block of rows in
 *            float32 by the linear layer (4 B), one kernel for maximum, sum, loss and g (4 B, or 8 B when rows leave the
 *            cache, and 2 B), dx = g W (2 B): 4 d flops + 12 to 16 B: 5.03e-3 d + 2.8 to 3.8 ps.
 *
 *   A third way, logits computed again once the row's sum is known, needs no e: 4 B or 0.9 ps less, one
 *   product or 2.50e-3 d ps more. It would pay below d = 380 only, and is not kept.
 *
 *   The rule of by_card. The loss alone is fused: no logit may reach device memory. With gradient g is there in any case, as
 *   large as the logits, and what is left is arithmetic: fused costs less for every d when both products run at the same
 *   rate (up to Ada, and on 12.x, whose own products are mma.sync). On 9.x to 11.x mma.sync reaches about 60 % of what cuBLASLt
 *   has there, or less: 4.2e-3 d instead of 2.51e-3 d ps. Chunked costs less from d = 1130 on; d = 2048: 14.1 ps instead of
 *   15.6; d = 3200: 19.9 instead of 23.4. Below 1130 it loses at most 1.9 ps. Computed; to be measured. Losses with and without
 *   gradient may differ in their last bits there.
 *
 * Blocks of rows: the chain dx = g W [rows, d] is not split, so its tiles must fill the card: HEAD_ROWS_PER_SM rows for each
 * multiprocessor, that is a tile of 128 x 256 for each at d = 2048 (H200: 2048 rows, 128 tiles); 256 to 2048, and no more than
 * 1 / HEAD_MEMORY_SHARE of the card's memory holds. The workspace holds one block (V = 32000, 2048 rows: 131 MB fused, 393 MB
 * chunked; V = 128256: 525 MB and 1.6 GB).
 *
 * Geometry of fused: 8 warps of 64 x 32, stages of 64 columns by cp.async (product.cuh): three where a multiprocessor has room
 * for two such blocks (Hopper and later), or has none for two blocks of two stages either (Ada), else two. The row tiles of a
 * block of rows follow one another for each 128 vocabulary entries: W is read from memory once a block of rows, x stays in L2.
 * Resources (sm_90): 128 registers, 256 threads, two blocks an SM, no spills; the pass over logits 40, the others 32.
 *
 * Determinism: fixed order everywhere; a row's bits depend on d, V and the kernel alone, not on block or
 * batch. L: d / 16 + 8 + 7 within a tile, V / 4096 + 5 between tiles. Roundings to bf16: e, g, dx.
 *
 * Ladder (H200, bf16, commit f74fb33)
 *   v1  chunked: the simplest, and the check of the other. Not measured yet.
 *   v2  fused; expected: the rate of mma.sync, so about 60 % of 796 TFLOP/s for the loss alone on
 *       Hopper. Measured with gradient: 2048 x 128256 x 2048 8.19 ms, 263 TFLOP/s or 31 ps a pair, twice the
 *       15.6 ps that this makes with dx = g W. Blocks had 512 rows then (128 MB of g): 32 tiles of 128 x 256 for 132
 *       multiprocessors, so dx alone at a quarter of its rate, 5.6 ms; with 2.25 ms for the logits and 0.4 for the passes over
 *       e and g that makes 8.2 ms.
 *   v3  wgmma; expected: 620 TFLOP/s for the loss alone at d = 2048 (head_loss_wgmma.cu). Not measured yet.
 *   v4  by_card, blocks by the number of multiprocessors; expected at 2048 x 128256 x 2048 with gradient: 3.7 ms (fused: 4.1),
 *       at 2048 x 32000 x 3200 1.3 ms (fused: 1.5). Not measured yet.
 *   next, not built: tcgen05 on sm_100; exp(m_T - M) / S applied inside the product with W instead of by
 *       a pass (4 B less) */
#include "kernels/cuda/head_loss.cuh"
#include "kernels/cuda/product.cuh"
#include "kernels/cuda/tensor_map.h"

enum { HEAD_TILE = 128, HEAD_THREADS = 256, HEAD_SOFTMAX_THREADS = 512 };
enum { HEAD_AT_ONCE = 4 }; /* vectors that a thread of the softmax has under way */
static const int64_t HEAD_ROWS_PER_SM = 16, HEAD_MEMORY_SHARE = 64, HEAD_MIN_ROWS = 256, HEAD_MAX_ROWS = 2048;

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
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 /* else chunked: head_tile_of */
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
template <int TILE>
__global__ void head_rescale_kernel(ks_bf16 *e, const float2 *partial, const float2 *state,
                                    const int32_t *targets, const float *row_scale, int64_t n_vocab,
                                    int64_t n_tiles) {
  const int64_t row = blockIdx.x, target = targets[row];
  const float2 *own = partial + row * n_tiles;
  const float max = state[row].x, factor = state[row].y, scale = row_scale ? row_scale[row] : 1.0f;
  ks_bf16 *g = e + row * n_vocab;
  if (n_vocab % 8 != 0) {
    for (int64_t j = threadIdx.x; j < n_vocab; j += HEAD_THREADS) {
      const float p = ks_to_float(g[j]) * (head_exp(own[j / TILE].x, max) * factor);
      g[j] = ks_from_float<ks_bf16>(j == target ? p - scale : p);
    }
    return;
  }
#pragma unroll 2
  for (int64_t j = (int64_t)threadIdx.x * 8; j < n_vocab; j += HEAD_THREADS * 8) {
    ks_vec<ks_bf16> v;
    ks_load_vec(&v, g + j);
    const float f = head_exp(own[j / TILE].x, max) * factor;
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

KS_DEVICE void head_put_4(float *to, float4 v) {
  *(float4 *)to = v;
}
KS_DEVICE void head_put_4(ks_bf16 *to, float4 v) {
  *(uint2 *)to = make_uint2(ks_pack_bf16(v.x, v.y), ks_pack_bf16(v.z, v.w));
}

/* A row of g, from its end to its beginning: what was read last is still in the cache. A stretch is read before it is written:
 * g may be z itself. */
template <class T>
KS_DEVICE void head_gradient_row(const float *z, T *g, int64_t n_vocab, int64_t target, float scale,
                                 float max, float factor) {
  enum { STEP = 4 * HEAD_SOFTMAX_THREADS, STRETCH = STEP * HEAD_AT_ONCE };
  for (int64_t at = (n_vocab - 1) / STRETCH * STRETCH + 4 * (int)threadIdx.x; at >= 0; at -= STRETCH) {
    float4 v[HEAD_AT_ONCE];
#pragma unroll
    for (int k = 0; k < HEAD_AT_ONCE; k++)
      if (at + k * STEP < n_vocab) v[k] = *(const float4 *)(z + at + k * STEP);
#pragma unroll
    for (int k = 0; k < HEAD_AT_ONCE; k++) {
      const int64_t j = at + k * STEP, left = target - j;
      if (j >= n_vocab) break;
      const float p[4] = {head_exp_exact(v[k].x, max) * factor, head_exp_exact(v[k].y, max) * factor,
                          head_exp_exact(v[k].z, max) * factor, head_exp_exact(v[k].w, max) * factor};
      head_put_4(g + j, make_float4(left == 0 ? p[0] - scale : p[0], left == 1 ? p[1] - scale : p[1],
                                    left == 2 ? p[2] - scale : p[2], left == 3 ? p[3] - scale : p[3]));
    }
  }
}

/* A block a row of logits: loss, and g (which may be z itself) when it is wanted. */
template <class T>
__global__ void __launch_bounds__(HEAD_SOFTMAX_THREADS)
    head_softmax_kernel(const float *z, T *g, const int32_t *targets, const float *row_scale, float *loss,
                        int64_t n_vocab) {
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
  if (vectors) {
    head_gradient_row(own, to, n_vocab, target, scale, max, factor);
    return;
  }
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

/* Vocabulary entries of a tile; 0: chunked. By the variant, the device, the shape of the weight and what is wanted alone. */
static int head_tile_of(const ks_ctx *ctx, const ks_weight *w, bool gradient) {
  const ks_cuda_variant v = ks_cuda_variant_of(ctx, "head_loss");
  const int major = ks_cuda_device_of(ctx)->major;
  if (w->dtype != KS_DTYPE_BF16 || w->n_in % 8 != 0 || major < 8 || v == KS_CUDA_head_loss_chunked) return 0;
  if (v == KS_CUDA_head_loss_wgmma)
    return ks_tensor_map_takes(((const ks_cuda_weight *)w->impl)->values, w->n_out, w->n_in) ? HEAD_WIDE_TILE
                                                                                             : 0;
  const bool beyond_mma = major >= 9 && major <= 11 && ks_cuda_has_blas(ctx);
  return v == KS_CUDA_head_loss_by_card && gradient && beyond_mma ? 0 : HEAD_TILE;
}

static int64_t head_tiles(const ks_weight *w, int tile) {
  return (w->n_out + tile - 1) / tile;
}

static size_t head_take(head_room *r, size_t bytes) {
  const size_t at = r->bytes;
  r->bytes += (bytes + 255) & ~(size_t)255;
  return at;
}

static int64_t head_block_rows(const ks_ctx *ctx, int64_t row_bytes) {
  const ks_cuda_device *d = ks_cuda_device_of(ctx);
  const int64_t wanted = HEAD_ROWS_PER_SM * d->n_sm,
                most = (int64_t)d->total_bytes / HEAD_MEMORY_SHARE / row_bytes;
  const int64_t rows = (wanted < most ? wanted : most) / HEAD_TILE * HEAD_TILE;
  return rows < HEAD_MIN_ROWS ? HEAD_MIN_ROWS : rows > HEAD_MAX_ROWS ? HEAD_MAX_ROWS : rows;
}

static head_room head_room_of(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows, int tile) {
  const bool fused = tile > 0, is_f32 = ks_ctx_act_dtype(ctx) == KS_DTYPE_F32;
  const size_t z_size = fused ? 0 : sizeof(float), g_size = is_f32 ? 0 : sizeof(ks_bf16);
  const int64_t rows = head_block_rows(ctx, (w->n_out > 0 ? w->n_out : 1) * (int64_t)(z_size + g_size));
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
  const ks_cuda_device *d = ks_cuda_device_of(ctx);
  const size_t per_sm = (size_t)d->smem_per_sm, own = 1 << 10; /* beside what a block asks for */
  const bool is_large =
      (size_t)d->smem_per_block >= three && (2 * (three + own) <= per_sm || 2 * (two + own) > per_sm);
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
  const auto rescale =
      tile == HEAD_WIDE_TILE ? head_rescale_kernel<HEAD_WIDE_TILE> : head_rescale_kernel<HEAD_TILE>;
  KS_TRY(ks_launch(ctx, "head_loss", rescale, dim3((unsigned)b->n_rows), dim3(HEAD_THREADS), 0, p.e,
                   p.partial, state, b->targets, b->row_scale, p.n_vocab, p.n_tiles));
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
  const size_t alone = head_room_of(ctx, w, n_rows, head_tile_of(ctx, w, false)).bytes,
               with_gradient = head_room_of(ctx, w, n_rows, head_tile_of(ctx, w, true)).bytes;
  return alone > with_gradient ? alone : with_gradient;
}

extern "C" ks_status ks_cuda_head_loss(ks_ctx *ctx, const ks_head_loss_args *a) {
  const int tile = head_tile_of(ctx, a->w, a->dx != NULL);
  const head_room room = head_room_of(ctx, a->w, a->n_rows, tile);
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
