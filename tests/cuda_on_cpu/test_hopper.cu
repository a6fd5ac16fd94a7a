/* Hopper's barriers, bulk copies and warpgroup products on the shim (hopper.c): what they compute, and
 * mistakes with them. Then the loop of kernels/cuda/product_wgmma.cuh over many tiles and stages. */
#include <criterion/criterion.h>

#include "kernels/cuda/product_wgmma.cuh"
#include "test_launch.h"

#include <cuda.h>
#include <math.h>

/* Small whole numbers: every sum is exact. */
static ks_bf16 value_of(int64_t i, uint32_t seed) {
  const uint32_t h = ((uint32_t)i + seed * 7919u) * 2654435761u;
  return ks_from_float<ks_bf16>((float)(int)(h >> 28) - 8);
}
static ks_bf16 *matrix(ks_bf16 *host, int64_t n, uint32_t seed) {
  for (int64_t i = 0; i < n; i++)
    host[i] = value_of(i, seed);
  return device_array(n, host);
}

static ks_tensor_map map_of(ks_bf16 *p, int64_t n_rows, int64_t n_cols, int box_rows) {
  CUresult (*encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                     const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void *found;
  cudaDriverEntryPointQueryResult result;
  cr_assert(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                             &result) == cudaSuccess &&
            result == cudaDriverEntryPointSuccess);
  memcpy(&encode, &found, sizeof encode);
  const cuuint64_t size[2] = {(cuuint64_t)n_cols, (cuuint64_t)n_rows}, stride[1] = {(cuuint64_t)n_cols * 2};
  const cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, step[2] = {1, 1};
  CUtensorMap map;
  ks_tensor_map out;
  cr_assert(encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p, size, stride, box, step,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
  memcpy(&out, &map, sizeof out);
  return out;
}

/* ---------------------------------------------------------------- one product, one mistake */

#define MISTAKES(X)                                                                                          \
  X(NOTHING, NULL)                                                                                           \
  /* seen in the results of some order */                                                                    \
  X(NO_WAIT_FOR_THE_COPY, "")                                                                                \
  X(COPY_OVER_A_STAGE_IN_USE, "")                                                                            \
  X(OFFSETS_EXCHANGED, "")                                                                                   \
  X(STEP_OF_K_FORGOTTEN, "")                                                                                 \
  X(SUMS_READ_BEFORE_THE_WAIT, "")                                                                           \
  X(NO_FENCE_OF_STORES, "")                                                                                  \
  /* the launch fails */                                                                                     \
  X(NO_FENCE, "wgmma.fence")                                                                                 \
  X(SUMS_WRITTEN_BEHIND_THE_FENCE, "between wgmma.fence")                                                    \
  X(NO_COMMIT, "products under way")                                                                         \
  X(SUMS_WRITTEN_BEFORE_THE_WAIT, "sums were written")                                                       \
  X(TOO_MANY_BYTES, "nothing completes")                                                                     \
  X(WRONG_PHASE, "nothing completes")                                                                        \
  X(ONE_ARRIVAL_MORE, "got one more")                                                                        \
  X(NO_INIT, "not initialised")                                                                              \
  X(MISALIGNED_TILE, "no multiple of 1024")                                                                  \
  X(MISALIGNED_DESCRIPTOR, "not in the first line")                                                          \
  X(BEYOND_THE_ARRAY, "lie in no array")                                                                     \
  X(ONE_WARP_DIFFERS, "different products")                                                                  \
  X(NOBODY_WAITS_FOR_THE_COPY, "copies under way")
typedef enum {
#define X(name, text) name,
  MISTAKES(X)
#undef X
      N_MISTAKES
} mistake;

/* y [64, 256] = A [64, 64] B, B [64, 256], after the first element of each row of A was doubled where it lies. */
static __global__ void one_kernel(ks_tensor_map a_map, ks_tensor_map b_map, float *y, int bug) {
  ks_smem smem;
  ks_bf16 *a = ks_smem_take<ks_bf16>(&smem, 64 * 64), *b = ks_smem_take<ks_bf16>(&smem, 64 * 256);
  uint64_t *full = ks_smem_take<uint64_t>(&smem, 2);
  if (threadIdx.x == 0) {
    if (bug != NO_INIT) ks_barrier_init(full, 1);
    ks_barrier_init(full + 1, 1);
    ks_barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ks_barrier_expect(full, 40960 + (bug == TOO_MANY_BYTES));
    ks_tma_load(bug == MISALIGNED_TILE ? a + 64 : a, &a_map, 0, 0, full);
    for (int j = 0; j < 4; j++)
      ks_tma_load(b + j * 4096, &b_map, 64 * j, 0, full);
    if (bug == ONE_ARRIVAL_MORE)
      ks_barrier_arrive(full), ks_barrier_arrive(full + 1), ks_barrier_arrive(full);
  }
  if (bug != NO_WAIT_FOR_THE_COPY && bug != NOBODY_WAITS_FOR_THE_COPY)
    ks_barrier_wait(full, bug == WRONG_PHASE ? 1 : 0);
  if (bug == WRONG_PHASE) ks_barrier_wait(full, 0), ks_barrier_wait(full, 1);
  if (threadIdx.x < 64) {
    ks_bf16 *first = a + ks_swizzle_128((int)threadIdx.x, 0) / 2;
    *first = ks_from_float<ks_bf16>(2 * ks_to_float(*first));
    if (bug != NO_FENCE_OF_STORES) ks_async_fence();
  }
  __syncthreads();
  float acc[128];
  uint64_t da = ks_wgmma_desc_k(a), db = bug == OFFSETS_EXCHANGED
                                             ? ks_wgmma_desc(ks_smem_address(b), 1024, 8192)
                                             : ks_wgmma_desc_mn(b, 8192);
  if (bug == MISALIGNED_DESCRIPTOR) da = ks_wgmma_advance(da, 128);
  if (bug == BEYOND_THE_ARRAY) db = ks_wgmma_advance(db, 8192);
  if (bug != NO_FENCE) ks_wgmma_fence(acc);
  if (bug == SUMS_WRITTEN_BEHIND_THE_FENCE) acc[5] = 1;
  for (int s = 0; s < 4; s++)
    ks_wgmma<1>(
        acc,
        ks_wgmma_advance(
            da, bug == STEP_OF_K_FORGOTTEN || (bug == ONE_WARP_DIFFERS && threadIdx.x >= 96) ? 0 : 32 * s),
        ks_wgmma_advance(db, 2048 * s), s > 0);
  if (bug != NO_COMMIT) ks_wgmma_commit();
  if (bug == COPY_OVER_A_STAGE_IN_USE) {
    if (threadIdx.x == 0) {
      ks_barrier_expect(full + 1, 8192);
      ks_tma_load(a, &a_map, 64, 64, full + 1);
    }
    ks_barrier_wait(full + 1, 0);
  }
  if (bug == SUMS_WRITTEN_BEFORE_THE_WAIT) acc[5] = 0;
  const float early = acc[0];
  ks_wgmma_wait<0>(acc);
  if (bug == SUMS_READ_BEFORE_THE_WAIT) acc[0] = early;
  const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
  for (int i = 0; i < 128; i++)
    y[(16 * warp + 8 * (i / 2 % 2) + g) * 256 + 8 * (i / 4) + 2 * t + i % 2] = acc[i];
  if (bug == NO_WAIT_FOR_THE_COPY) ks_barrier_wait(full, 0);
}

Test(hopper, mistakes_are_seen) {
  static const struct {
    const char *name, *said; /* "": wrong results; NULL: none */
  } mistakes[] = {
#define X(name, text) {#name, text},
      MISTAKES(X)
#undef X
  };
  static ks_bf16 a[64 * 64], b[64 * 256];
  static float y[64 * 256];
  ks_shim_set_hopper(1);
  cudaFuncSetAttribute((const void *)one_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
  for (int bug = 0; bug < N_MISTAKES; bug++) {
    int64_t wrong = 0;
    bool failed = false, said = false;
    ks_bf16 *da = matrix(a, 64 * 64, 1), *db = matrix(b, 64 * 256, 2);
    float *dy = device_array<float>(64 * 256, NULL);
    const ks_tensor_map ma = map_of(da, 64, 64, 64), mb = map_of(db, 64, 256, 64);
    for (int order = 0; order < 3 && !failed; order++) {
      ks_shim_set_order(order);
      failed =
          launch(one_kernel, dim3(1), dim3(128), (size_t)64 << 10, NULL, ma, mb, dy, bug) != cudaSuccess ||
          cudaStreamSynchronize(NULL) != cudaSuccess;
      if (failed) {
        said = mistakes[bug].said && mistakes[bug].said[0] && strstr(ks_shim_report(), mistakes[bug].said);
        if (!said) fprintf(stderr, "%s: %s\n", mistakes[bug].name, ks_shim_report());
        ks_shim_clear();
        break;
      }
      fetch(y, dy, 64 * 256);
      for (int i = 0; i < 64; i++)
        for (int j = 0; j < 256; j++) {
          float sum = 0;
          for (int k = 0; k < 64; k++)
            sum += (k == 0 ? 2.0f : 1.0f) * ks_to_float(a[i * 64 + k]) * ks_to_float(b[k * 256 + j]);
          wrong += !(y[i * 256 + j] == sum);
        }
    }
    cudaFree(da), cudaFree(db), cudaFree(dy);
    if (!mistakes[bug].said)
      cr_assert(!failed && !wrong, "%s", mistakes[bug].name);
    else if (mistakes[bug].said[0])
      cr_assert(said, "%s is not seen", mistakes[bug].name);
    else
      cr_assert(!failed && wrong, "%s is not seen", mistakes[bug].name);
  }
  ks_shim_set_hopper(0);
}

/* ---------------------------------------------------------------- the loop */

/* y [n_m, n_n] = A B^T or A B, and 16 more of k that fill makes: 1 times the row times the column. */
struct loop_args {
  float *y;
  int64_t n_m, n_n;
  int32_t bn, n_extra;
};
struct loop_work {
  const loop_args &p;
  uint32_t m_tiles, n_tiles;
  explicit loop_work(const loop_args &args) : p(args) {
    m_tiles = (uint32_t)((p.n_m + WG_BM - 1) / WG_BM);
    n_tiles = m_tiles * (uint32_t)((p.n_n + p.bn - 1) / p.bn);
  }
  wg_tile tile(uint32_t i) const {
    uint32_t m, n;
    wg_order(i, m_tiles, n_tiles / m_tiles, &m, &n);
    const int64_t left = p.n_m - (int64_t)m * WG_BM;
    return {(int64_t)m * WG_BM, (int64_t)n * p.bn, left < WG_BM ? (int)left : (int)WG_BM, p.n_extra, 0};
  }
  int extra_steps(const wg_tile &, int e) const { return e + 1; }
  template <class S> void fill(const wg_tile &t, int e, ks_bf16 *a, ks_bf16 *b, int thread) const {
    const int n_k = 16 * extra_steps(t, e);
    for (int i = thread; i < WG_BM * n_k / 8; i += WG_FILLERS) {
      const uint32_t row = ks_bf16_bits((float)((t.row + i % WG_BM) % 7));
      wg_put_a(a, i % WG_BM, i / WG_BM, make_uint4(row, 0, 0, 0)); /* one of eight counts */
    }
    for (int i = thread; i < n_k * (S::BN / 8); i += WG_FILLERS) {
      uint32_t w[4];
      for (int c = 0; c < 4; c++)
        w[c] = ks_bf16_bits((float)((t.col + i / n_k * 8 + 2 * c) % 5)) |
               ks_bf16_bits((float)((t.col + i / n_k * 8 + 2 * c + 1) % 5)) << 16;
      wg_put_b(b, i % n_k, i / n_k, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
  template <class S> void finish(const wg_tile &t, float (&acc)[S::SUMS]) const {
    for (int i = 0; i < S::SUMS; i++) {
      const int64_t row = wg_row(i / 2 % 2), col = t.col + wg_col(i / 4, i % 2);
      if (row < t.n_rows && col < p.n_n) p.y[(t.row + row) * p.n_n + col] = acc[i];
    }
  }
};
template <int BN, bool B_MN> static __global__ void loop_kernel(wg_maps maps, loop_args p, int n_k) {
  wg_run<wg_shape<BN, B_MN>, loop_work>(maps, n_k, p);
}

template <int BN, bool B_MN>
static void check_loop(int64_t n_m, int64_t n_n, int64_t n_k, int blocks, int n_extra) {
  typedef wg_shape<BN, B_MN> S;
  ks_bf16 *a = (ks_bf16 *)malloc((size_t)(n_m * n_k) * 2), *b = (ks_bf16 *)malloc((size_t)(n_n * n_k) * 2);
  float *y = (float *)malloc((size_t)(n_m * n_n) * sizeof(float));
  ks_bf16 *da = matrix(a, n_m * n_k, 3), *db = matrix(b, n_n * n_k, 4);
  float *dy = device_array<float>(n_m * n_n, NULL);
  const wg_maps maps = {map_of(da, n_m, n_k, WG_BM),
                        B_MN ? map_of(db, n_k, n_n, S::B_BOX) : map_of(db, n_n, n_k, S::B_BOX)};
  const loop_args p = {dy, n_m, n_n, BN, n_extra};
  cudaFuncSetAttribute((const void *)loop_kernel<BN, B_MN>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       227 << 10);
  for (int order = 0; order < 4; order++) {
    ks_shim_set_order(order);
    cr_assert(launch(loop_kernel<BN, B_MN>, dim3((unsigned)blocks), dim3(WG_THREADS), S::bytes(), NULL, maps,
                     p, (int)n_k) == cudaSuccess &&
                  cudaStreamSynchronize(NULL) == cudaSuccess,
              "%s", ks_shim_report());
    fetch(y, dy, n_m * n_n);
    for (int64_t i = 0; i < n_m; i++)
      for (int64_t j = 0; j < n_n; j++) {
        float sum = 0;
        for (int64_t k = 0; k < n_k; k++)
          sum += ks_to_float(a[i * n_k + k]) * ks_to_float(B_MN ? b[k * n_n + j] : b[j * n_k + k]);
        for (int e = 0; e < n_extra; e++)
          sum += (float)(2 * (e + 1) * (i % 7) * (j % 5));
        cr_assert(y[i * n_n + j] == sum, "order %d, row %d, column %d: %g, wants %g", order, (int)i, (int)j,
                  (double)y[i * n_n + j], (double)sum);
      }
  }
  cudaFree(da), cudaFree(db), cudaFree(dy);
  free(a), free(b), free(y);
}

Test(hopper, loop_over_tiles_and_stages) {
  ks_shim_set_hopper(1);
  check_loop<256, false>(200, 264, 328, 1, 0); /* more stages of k than there are, several tiles a block */
  check_loop<256, true>(200, 264, 328, 3, 1);
  check_loop<128, false>(130, 392, 72, 2, 3);
  check_loop<128, true>(130, 136, 520, 1, 2);
  ks_shim_set_hopper(0);
}

/* Every tile once, whatever the numbers. */
Test(hopper, order_of_tiles) {
  for (uint32_t n_m = 1; n_m < 40; n_m += 3)
    for (uint32_t n_n = 1; n_n < 9; n_n++) {
      bool seen[40][9] = {};
      for (uint32_t i = 0; i < n_m * n_n; i++) {
        uint32_t m, n;
        wg_order(i, n_m, n_n, &m, &n);
        cr_assert(m < n_m && n < n_n && !seen[m][n]);
        seen[m][n] = true;
      }
    }
}
