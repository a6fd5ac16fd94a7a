/* Logits of the head in tiles by Hopper's own products (product_wgmma.cuh), reduced where they are: sm_90, bf16.
 *
 *   z = x W^T + bias over a tile of 128 rows x 256 vocabulary entries:  m = max z,  S = sum exp(z - m);  z of the target;
 *   with gradient also e = exp(z - m) in bf16. What follows is head_loss.cu's.
 *
 * FLOPs 2 rows n_vocab d; bytes: W once a block of rows, x from L2, 8 B a row and tile, with gradient 2 B a pair.
 *
 * A tile's row is in four lanes of one warp: maximum and sum are 63 steps in registers and two shuffles each,
 * no shared memory and no barrier between warps, so that the two consumer warpgroups never wait for each
 * other.
 *   Beside the products a tile costs 32768 exponentials at 16 a cycle and SM, 2048 cycles or 1.2 us, in which the tensor cores
 *   wait; the other instructions of it (5 an element, 1300 cycles over four schedulers) overlap with them. With d = 2048 the
 *   products are 22 us at 796 TFLOP/s. Expected (computed): 0.83 (product_wgmma.cuh) x 0.94 x 796 = 620
 *   TFLOP/s for the loss alone, 78 % of the matrix rate; d = 3200: 640. The goal is 60 %, 478 TFLOP/s.
 *   With gradient e leaves by 16-byte stores: 64 KB a tile, 8.4 MB over all SMs in 26 us, 0.3 TB/s; 64 shuffles a thread more.
 *
 * Determinism: fixed order; a row's bits depend on d and n_vocab alone. L: d / 16 products + 63 + 2 within a tile.
 *
 * Resources (nvcc 13.0, sm_90a): as product_wgmma.cuh; at most 222 of the consumers' 224 registers, no spills.
 *
 * Ladder
 *   v1  this. Not measured yet.
 *   next, not built: a share of the exponentials as polynomials on the fma pipes, which halves the 1.2 us */
#include "kernels/cuda/head_loss.cuh"
#include "kernels/cuda/product_wgmma.cuh"
#include "kernels/cuda/tile.cuh"

#ifdef KS_HAS_WGMMA

/* One instruction since sm_80. */
KS_DEVICE float head_max(float a, float b) {
#ifdef __CUDA_ARCH__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return ks_max_nan(a, b);
#endif
}

struct head_work {
  const head_wide_args &p;
  uint32_t n_row_tiles, n_tiles;

  KS_DEVICE explicit head_work(const head_wide_args &args) : p(args) {
    n_row_tiles = (uint32_t)((p.n_rows + WG_BM - 1) / WG_BM);
    n_tiles = n_row_tiles * (uint32_t)p.n_tiles;
  }
  KS_DEVICE wg_tile tile(uint32_t i) const {
    uint32_t m, n;
    wg_order(i, n_row_tiles, (uint32_t)p.n_tiles, &m, &n);
    const int64_t row = (int64_t)m * WG_BM, left = p.n_rows - row;
    const wg_tile t = {row, (int64_t)n * HEAD_WIDE_TILE, left < WG_BM ? (int)left : (int)WG_BM, 0, (int)n};
    return t;
  }
  KS_DEVICE int extra_steps(const wg_tile &, int) const { return 0; }
  template <class S> KS_DEVICE void fill(const wg_tile &, int, ks_bf16 *, ks_bf16 *, int) const {}

  template <class S> KS_DEVICE void add_bias(const wg_tile &t, float (&z)[S::SUMS]) const {
    const int left = p.n_vocab - t.col < S::BN ? (int)(p.n_vocab - t.col) : (int)S::BN;
#pragma unroll
    for (int i = 0; i < S::SUMS; i++)
      z[i] += wg_col(i / 4, i % 2) < left ? p.bias[t.col + wg_col(i / 4, i % 2)] : 0.0f;
  }
  /* -inf where there is no column. */
  template <class S> KS_DEVICE void drop_beyond(const wg_tile &t, float (&z)[S::SUMS]) const {
    const int left = (int)(p.n_vocab - t.col);
#pragma unroll
    for (int i = 0; i < S::SUMS; i++)
      z[i] = wg_col(i / 4, i % 2) < left ? z[i] : -INFINITY;
  }

  template <class S>
  KS_DEVICE void put_target(const wg_tile &t, const float (&z)[S::SUMS], int h, int64_t row) const {
    const int64_t target = p.targets[row] - t.col;
    if (target < 0 || target >= S::BN) return;
#pragma unroll
    for (int i = 0; i < S::SUMS; i++)
      if (i / 2 % 2 == h && wg_col(i / 4, i % 2) == (int)target) p.z_target[row] = z[i];
  }

  template <class S>
  KS_DEVICE void put_exponentials(const wg_tile &t, const float (&e)[S::SUMS], int h) const {
    const int lane = (int)threadIdx.x % 4;
    const int64_t at = (t.row + wg_row(h)) * p.n_vocab;
    const bool is_row = wg_row(h) < t.n_rows, vectors = p.n_vocab % 8 == 0;
#pragma unroll
    for (int q = 0; q < S::BN / 32; q++) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[i] = ks_pack_bf16(e[4 * (4 * q + i) + 2 * h], e[4 * (4 * q + i) + 2 * h + 1]);
      tile_quad_transpose(w, lane);
      const int64_t col = t.col + 32 * q + 8 * lane;
      if (!is_row || col >= p.n_vocab) continue;
      ks_bf16 *to = p.e + at + col;
      if (vectors) {
        *(uint4 *)(void *)to = make_uint4(w[0], w[1], w[2], w[3]);
        continue;
      }
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (col + c < p.n_vocab) to[c].bits = (uint16_t)(w[c / 2] >> (c % 2 * 16));
    }
  }

  template <class S> KS_DEVICE void finish(const wg_tile &t, float (&z)[S::SUMS]) const {
    if (p.bias) add_bias<S>(t, z);
    if (t.col + S::BN > p.n_vocab) drop_beyond<S>(t, z);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = t.row + wg_row(h);
      const bool is_row = wg_row(h) < t.n_rows;
      if (is_row) put_target<S>(t, z, h, row);
      float max = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int j = 0; j < S::BN / 8; j++)
        max = head_max(max, head_max(z[4 * j + 2 * h], z[4 * j + 2 * h + 1]));
      max = head_quad_max(max);
#pragma unroll
      for (int j = 0; j < S::BN / 8; j++) {
        float *pair = &z[4 * j + 2 * h];
        pair[0] = head_exp(pair[0], max);
        pair[1] = head_exp(pair[1], max);
        sum += pair[0] + pair[1];
      }
      sum = ks_quad_sum(sum);
      if (is_row && threadIdx.x % 4 == 0) p.partial[row * p.n_tiles + t.tag] = make_float2(max, sum);
      if (p.e) put_exponentials<S>(t, z, h);
    }
  }
};
#endif

static __global__ void __launch_bounds__(WG_THREADS, 1)
    head_wgmma_kernel(const __grid_constant__ wg_maps maps, const __grid_constant__ head_wide_args p) {
#ifdef KS_HAS_WGMMA
  wg_run<wg_shape<HEAD_WIDE_TILE, false>, head_work>(maps, (int)p.n_in, p);
#endif
}

ks_status ks_wgmma_head(ks_ctx *ctx, const void *x, const void *w, const head_wide_args *p) {
  typedef wg_shape<HEAD_WIDE_TILE, false> S;
  const int64_t tiles = (p->n_rows + WG_BM - 1) / WG_BM * p->n_tiles, n_sm = ks_cuda_device_of(ctx)->n_sm;
  wg_maps maps;
  KS_TRY(ks_cuda_tensor_map(ctx, "head_loss", x, p->n_rows, p->n_in, WG_BM, &maps.a));
  KS_TRY(ks_cuda_tensor_map(ctx, "head_loss", w, p->n_vocab, p->n_in, S::B_BOX, &maps.b));
  return ks_launch(ctx, "head_loss", head_wgmma_kernel, dim3((unsigned)(tiles < n_sm ? tiles : n_sm)),
                   dim3(WG_THREADS), S::bytes(), maps, *p);
}
