/* Linear layers by Hopper's own products (product_wgmma.cuh), adapters inside the sums; bf16 activations and weights, sm_90 only.
 *
 *   forward   y[i, o]  = sum_j x[i, j] W[o, j]  + sum_r u[i, r] (scale B[o, r]) + bias[o] (+ residual[i, o])
 *   backward  dx[i, j] = sum_o dy[i, o] W[o, j] + sum_r v[i, r] A[r, j]                   (+ dx[i, j])
 *
 * Adapters. u and the segment's rows of B^T (v and A) are further stages of k, 16 at a time: rank 8 costs 16 / n_in of the
 * product, 0.8 % for 2048, and no pass over y. They are rounded and padded by warps that load nothing else, into the stage whose
 * turn it is. Row tiles begin with each segment: none has rows of two, so that one adapter's NaN stays in its rows and every tile
 * has one B. Rows of a segment's last tile that are not its own are computed and not stored: at most 127 a segment.
 * Backward with dropout: the mask is between the adapters' sum and dx, so expand adds it afterwards (lora_term.cu).
 *
 * W is read as it lies, [n_out, n_in]: forward its lines are k, backward they are columns (MN-major, transposed by the product).
 *
 * FLOPs 2 rows n_k n_cols + 2 rows 16 ceil(rank / 16) n_cols. Bytes from memory: x, W and y about once each (order of tiles:
 * product_wgmma.cuh). Bound by the tensor cores and, without clusters, by L2: 80 to 85 % of cuBLASLt's 796
 * TFLOP/s expected, less by the last round of tiles and by what a tile costs beside its sums: 64 shuffles and
 * 16 stores of 16 bytes a thread, some 0.6 us beside 22 us for n_k 2048.
 *   2048 x 8192 x 2048 (rows x n_out x n_in): 512 tiles, 3.9 rounds of 132: 0.97 x 0.83 x 796 = 640 TFLOP/s,
 *   107 us computed (98 us measured for cuBLASLt alone, 184 us with adapter); with adapter 108 us.
 *
 * Tiles: 128 x 256, or 128 x 128 where whole rounds of those take less.
 * Serial chain L = n_k / 16 products, then rank / 16. Determinism: a row's sums depend on nothing but its own
 * inputs and the shape of W.
 * Takes: n_in and n_out multiples of 8, arrays on 16 bytes, no generation; linear_mma.cu does the rest.
 *
 * Resources (nvcc 13.0, sm_90a): see product_wgmma.cuh; no spills.
 *
 * Ladder
 *   v1  this. Not measured yet. */
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/product_wgmma.cuh"
#include "kernels/cuda/tile.cuh"

/* No padding: launches are compared byte by byte. */
struct wg_linear_args {
  const lora_item *tiles; /* [0].row: how many follow; NULL: 128 rows each */
  const lora_seg *segs;
  const ks_bf16 *u;
  void *y;
  const void *residual;
  const float *bias;
  int64_t n_rows, n_k, n_cols, u_stride;
  int32_t backward, y_is_f32;
};

#ifdef KS_HAS_WGMMA

template <int BN> struct wg_linear_work {
  const wg_linear_args &p;
  uint32_t n_row_tiles, n_col_tiles, n_tiles;

  KS_DEVICE explicit wg_linear_work(const wg_linear_args &args) : p(args) {
    n_row_tiles = (uint32_t)(p.tiles ? p.tiles[0].row : (p.n_rows + WG_BM - 1) / WG_BM);
    n_col_tiles = (uint32_t)((p.n_cols + BN - 1) / BN);
    n_tiles = n_row_tiles * n_col_tiles;
  }
  KS_DEVICE wg_tile tile(uint32_t i) const {
    uint32_t m, n;
    wg_order(i, n_row_tiles, n_col_tiles, &m, &n);
    wg_tile t = {(int64_t)m * WG_BM, (int64_t)n * BN, WG_BM, 0, -1};
    if (p.tiles) {
      const lora_item item = p.tiles[1 + m];
      t.row = item.row;
      t.n_rows = item.n_rows;
      t.tag = item.seg;
      if (item.seg >= 0) t.n_extra = (p.segs[item.seg].rank + WG_BK - 1) / WG_BK;
    } else if (p.n_rows - t.row < WG_BM) {
      t.n_rows = (int)(p.n_rows - t.row);
    }
    return t;
  }
  KS_DEVICE int extra_steps(const wg_tile &t, int e) const {
    const int left = (p.segs[t.tag].rank - e * WG_BK + 15) / 16;
    return left < WG_BK / 16 ? left : WG_BK / 16;
  }

  template <class S> KS_DEVICE void fill(const wg_tile &t, int e, ks_bf16 *a, ks_bf16 *b, int thread) const {
    const lora_seg &seg = p.segs[t.tag];
    const float *r = lora_writes(seg, p.backward), factor = p.backward ? 1.0f : seg.scale;
    const int rank = seg.rank, r0 = e * WG_BK, pieces = extra_steps(t, e) * 2;
    const bool u_aligned = ks_is_vector_aligned(p.u, p.u_stride) && rank % 8 == 0,
               r_aligned = ((uintptr_t)r & 15) == 0 && p.n_cols % 8 == 0;
#pragma unroll 1
    for (int i = thread; i < 8 * pieces * (BN / 8); i += WG_FILLERS) {
      const int k = i / (BN / 8), piece = i % (BN / 8);
      wg_put_b(b, k, piece,
               r0 + k < rank ? tile_read_8_rounded(r + (int64_t)(r0 + k) * p.n_cols, t.col + 8 * piece,
                                                   p.n_cols, r_aligned, factor)
                             : make_uint4(0, 0, 0, 0));
    }
#pragma unroll 1
    for (int i = thread; i < WG_BM * pieces; i += WG_FILLERS) {
      const int row = i / pieces, piece = i % pieces;
      wg_put_a(a, row, piece,
               row < t.n_rows ? tile_read_8(p.u + (t.row + row) * p.u_stride, r0 + 8 * piece, rank, u_aligned)
                              : make_uint4(0, 0, 0, 0));
    }
  }

  /* Rows in vectors of eight bf16: the lanes of four exchange what they hold of 32 columns. */
  template <class S> KS_DEVICE void store_vectors(const wg_tile &t, float (&acc)[S::SUMS]) const {
    const int lane = (int)threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < BN / 32; q++) {
      const int64_t col = t.col + 32 * q + 8 * lane;
      float2 bias[4] = {};
      if (p.bias)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int64_t c = t.col + wg_col(4 * q + i, 0);
          if (c < p.n_cols) bias[i] = *(const float2 *)(const void *)(p.bias + c);
        }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool there = wg_row(h) < t.n_rows && col < p.n_cols;
        const int64_t row = (t.row + wg_row(h)) * p.n_cols;
        uint32_t w[4] = {0, 0, 0, 0};
        if (p.residual) {
          const uint4 old = there ? *(const uint4 *)(const void *)((const ks_bf16 *)p.residual + row + col)
                                  : make_uint4(0, 0, 0, 0);
          w[0] = old.x, w[1] = old.y, w[2] = old.z, w[3] = old.w;
          tile_quad_transpose(w, lane);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int j = 4 * q + i;
          const float lo = acc[4 * j + 2 * h] + bias[i].x, hi = acc[4 * j + 2 * h + 1] + bias[i].y;
          w[i] = ks_pack_bf16(lo + ks_bf16_lo(w[i]), hi + ks_bf16_hi(w[i]));
        }
        tile_quad_transpose(w, lane);
        if (there) *tile_vector((ks_bf16 *)p.y + row, col) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  template <class S, class Y> KS_DEVICE void store_elements(const wg_tile &t, float (&acc)[S::SUMS]) const {
#pragma unroll
    for (int i = 0; i < S::SUMS; i++) {
      const int row = wg_row(i / 2 % 2);
      const int64_t col = t.col + wg_col(i / 4, i % 2), at = (t.row + row) * p.n_cols + col;
      if (row >= t.n_rows || col >= p.n_cols) continue;
      float value = acc[i];
      if (p.bias) value += p.bias[col];
      if (p.residual) value += ks_to_float(((const Y *)p.residual)[at]);
      ((Y *)p.y)[at] = ks_from_float<Y>(value);
    }
  }

  template <class S> KS_DEVICE void finish(const wg_tile &t, float (&acc)[S::SUMS]) const {
    if (p.y_is_f32)
      store_elements<S, float>(t, acc);
    else if (ks_is_vector_aligned((const ks_bf16 *)p.y, p.n_cols) && ((uintptr_t)p.residual & 15) == 0 &&
             ((uintptr_t)p.bias & 7) == 0)
      store_vectors<S>(t, acc);
    else
      store_elements<S, ks_bf16>(t, acc);
  }
};
#endif

template <int BN, bool BACKWARD>
__global__ void __launch_bounds__(WG_THREADS, 1)
    linear_wgmma_kernel(const __grid_constant__ wg_maps maps, const __grid_constant__ wg_linear_args p) {
#ifdef KS_HAS_WGMMA
  wg_run<wg_shape<BN, BACKWARD>, wg_linear_work<BN>>(maps, (int)p.n_k, p);
#endif
}

/* ---------------------------------------------------------------- host side */

static_assert((int)WG_BM == (int)LORA_TILE_ROWS, "a tile of adapters is a tile of rows");

bool ks_wgmma_takes(const ks_ctx *ctx, const linear_product *p) {
  const int64_t n_k = p->backward ? p->w.n_out : p->w.n_in;
  return ks_cuda_has_wgmma(ctx, NULL) && !p->generation && p->w.dtype == KS_DTYPE_BF16 &&
         p->n_rows <= INT32_MAX - WG_BM && ks_tensor_map_takes(p->x, p->n_rows, n_k) &&
         ks_tensor_map_takes(p->w.values, p->w.n_out, p->w.n_in);
}

template <int BN, bool BACKWARD>
static ks_status wg_launch(ks_ctx *ctx, const char *op, const linear_product *p, const wg_linear_args *args,
                           int64_t n_row_tiles) {
  typedef wg_shape<BN, BACKWARD> S;
  const int64_t tiles = n_row_tiles * ((args->n_cols + BN - 1) / BN), n_sm = ks_cuda_device_of(ctx)->n_sm;
  wg_maps maps;
  if (tiles > INT32_MAX)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: %lld tiles; use a smaller batch", op, (long long)tiles);
  KS_TRY(ks_cuda_tensor_map(ctx, op, p->x, p->n_rows, args->n_k, WG_BM, &maps.a));
  KS_TRY(ks_cuda_tensor_map(ctx, op, p->w.values, p->w.n_out, p->w.n_in, S::B_BOX, &maps.b));
  return ks_launch(ctx, op, linear_wgmma_kernel<BN, BACKWARD>, dim3((unsigned)(tiles < n_sm ? tiles : n_sm)),
                   dim3(WG_THREADS), S::bytes(), maps, *args);
}

ks_status ks_wgmma_linear(ks_ctx *ctx, const char *op, const linear_product *p, const lora_batch *batch,
                          const void *u) {
  const bool after = p->backward && batch->mask, inside = batch->max_rank > 0 && !after;
  wg_linear_args args = {};
  args.y = p->y;
  args.residual = p->residual;
  args.bias = p->bias;
  args.n_rows = p->n_rows;
  args.n_k = p->backward ? p->w.n_out : p->w.n_in;
  args.n_cols = p->backward ? p->w.n_in : p->w.n_out;
  args.backward = p->backward;
  args.y_is_f32 = p->y_is_f32;
  int64_t n_row_tiles = (p->n_rows + WG_BM - 1) / WG_BM;
  if (inside) {
    args.segs = batch->segs;
    args.u = (const ks_bf16 *)u;
    args.u_stride = batch->u_stride;
    args.tiles = batch->tiles - 1;
    n_row_tiles = batch->n_tiles;
  }
  const bool wide = wg_wants_256(n_row_tiles, args.n_cols, ks_cuda_device_of(ctx)->n_sm);
  if (p->backward)
    KS_TRY((wide ? wg_launch<256, true> : wg_launch<128, true>)(ctx, op, p, &args, n_row_tiles));
  else
    KS_TRY((wide ? wg_launch<256, false> : wg_launch<128, false>)(ctx, op, p, &args, n_row_tiles));
  if (!after) return KS_OK;
  const lora_expand_args e = {*batch, u, p->y, args.n_cols, true};
  return ks_mma_expand(ctx, op, &e);
}
