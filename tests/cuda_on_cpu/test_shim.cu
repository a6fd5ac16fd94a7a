/* The device side of the shim: order of threads, barriers, collectives, fragments, asynchronous copies. */
#include <criterion/criterion.h>

#include "test_launch.h"

static const int orders[] = {0, 1, 2, 3, 4};

/* ---------------------------------------------------------------- barriers, collectives */

static __global__ void reverse_kernel(const int *x, int *y, int n) {
  ks_smem smem;
  int *tile = ks_smem_take<int>(&smem, (size_t)n);
  const int i = (int)threadIdx.x, from = (int)blockIdx.x * n;
  tile[i] = x[from + i];
  __syncthreads();
  y[from + i] = tile[n - 1 - i];
}

Test(shim, barriers_in_every_order) {
  enum { BLOCKS = 3, N = 97 };
  int x[BLOCKS * N], y[BLOCKS * N];
  for (int i = 0; i < BLOCKS * N; i++)
    x[i] = 7 * i;
  for (int order : orders) {
    ks_shim_set_order(order);
    int *dx = device_array(BLOCKS * N, x), *dy = device_array<int>(BLOCKS * N, NULL);
    cr_assert(launch(reverse_kernel, dim3(BLOCKS), dim3(N), ks_smem_bytes<int>(N), NULL, dx, dy, (int)N) ==
              cudaSuccess);
    fetch(y, dy, BLOCKS * N);
    for (int i = 0; i < BLOCKS * N; i++)
      cr_assert(y[i] == x[i / N * N + N - 1 - i % N]);
    cudaFree(dx), cudaFree(dy);
  }
  cr_assert(ks_shim_memory_used() == 0);
}

/* Who runs when: a counter without barriers. */
static __global__ void turns_kernel(int *next, int *turn) {
  turn[(blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = atomicAdd(next, 1);
}

Test(shim, orders) {
  enum { BLOCKS = 5, X = 10, Y = 7, N = BLOCKS * X * Y };
  int turn[3][N], zero = 0;
  for (int order = 0; order < 4; order++) {
    bool seen[N] = {};
    int *next = device_array(1, &zero), *turns = device_array<int>(N, NULL),
        *now = turn[order < 3 ? order : 2];
    ks_shim_set_order(order);
    cr_assert(launch(turns_kernel, dim3(BLOCKS), dim3(X, Y), 0, NULL, next, turns) == cudaSuccess);
    int got[N];
    fetch(got, turns, N);
    for (int i = 0; i < N; i++) {
      cr_assert(got[i] >= 0 && got[i] < N && !seen[got[i]]);
      seen[got[i]] = true;
      if (order == 0) cr_assert(got[i] == i);
    }
    if (order == 3) cr_assert(memcmp(got, now, sizeof got) != 0, "another seed, another order");
    memcpy(now, got, sizeof got);
    if (order == 1) /* whole warps change places, the short one too, and the lanes in each */
      for (int i = 0; i < N; i++) {
        const int block = i / (X * Y), t = i % (X * Y);
        cr_assert(got[i] == (BLOCKS - 1 - block) * X * Y + (X * Y - 1 - t));
      }
    cudaFree(next), cudaFree(turns);
  }
}

static __global__ void index_kernel(unsigned *out) {
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned *p = out + 6 * (b * blockDim.x * blockDim.y * blockDim.z + t);
  __syncthreads();
  p[0] = threadIdx.x, p[1] = threadIdx.y, p[2] = threadIdx.z;
  p[3] = blockIdx.x, p[4] = blockIdx.y, p[5] = blockIdx.z;
}

Test(shim, indices) {
  const dim3 grid(2, 3, 2), block(5, 2, 4);
  enum { N = 12 * 40 };
  unsigned *d = device_array<unsigned>(6 * N, NULL), got[6 * N];
  cr_assert(launch(index_kernel, grid, block, 0, NULL, d) == cudaSuccess);
  fetch(got, d, 6 * N);
  for (unsigned i = 0; i < N; i++) {
    const unsigned t = i % 40, b = i / 40, wants[] = {t % 5, t / 5 % 2, t / 10, b % 2, b / 2 % 3, b / 6};
    cr_assert(memcmp(wants, got + 6 * i, sizeof wants) == 0);
  }
  cudaFree(d);
}

/* ---------------------------------------------------------------- warp collectives */

enum { N_COLLECTIVES = 24 };
template <class T> static __global__ void shuffle_kernel(const T *x, T *y) {
  const int l = (int)threadIdx.x % 32;
  T *out = y + N_COLLECTIVES * threadIdx.x, v = x[threadIdx.x];
  int n = 0;
  for (int width = 32; width >= 8; width /= 2) {
    out[n++] = __shfl_sync(KS_FULL_MASK, v, (3 * l + 5) % 64, width);
    out[n++] = __shfl_xor_sync(KS_FULL_MASK, v, 9, width);
    out[n++] = __shfl_up_sync(KS_FULL_MASK, v, 3, width);
    out[n++] = __shfl_down_sync(KS_FULL_MASK, v, 5, width);
  }
}

static int source(int what, int l, int width) {
  const int begin = l / width * width;
  const int from[] = {begin + (3 * l + 5) % width, l ^ 9, l - 3, l + 5};
  if (what == 1 && from[1] >= begin + width) return l;
  return what && (from[what] < begin || from[what] >= begin + width) && !(what == 1) ? l : from[what];
}

template <class T> static void check_shuffles(int order) {
  enum { N = 64 };
  T x[N], y[N * N_COLLECTIVES];
  for (int i = 0; i < N; i++)
    x[i] = (T)(i * 1234567.25);
  ks_shim_set_order(order);
  T *dx = device_array(N, x), *dy = device_array<T>(N * N_COLLECTIVES, NULL);
  cr_assert(launch(shuffle_kernel<T>, dim3(1), dim3(N), 0, NULL, (const T *)dx, dy) == cudaSuccess);
  fetch(y, dy, N * N_COLLECTIVES);
  for (int t = 0; t < N; t++)
    for (int n = 0; n < 12; n++) {
      const int l = t % 32, from = source(n % 4, l, 32 >> n / 4);
      cr_assert(memcmp(&y[t * N_COLLECTIVES + n], &x[t - l + from], sizeof(T)) == 0,
                "lane %d, %d of width %d", l, n % 4, 32 >> n / 4);
    }
  cudaFree(dx), cudaFree(dy);
}

Test(shim, shuffles) {
  for (int order : orders) {
    check_shuffles<int>(order);
    check_shuffles<unsigned>(order);
    check_shuffles<float>(order);
    check_shuffles<double>(order);
    check_shuffles<long long>(order);
    check_shuffles<uint64_t>(order);
  }
}

static __global__ void votes_kernel(unsigned *y) {
  const int t = (int)threadIdx.x, l = t % 32;
  unsigned *out = y + 8 * t;
  out[0] = __ballot_sync(KS_FULL_MASK, l % 3 == 0);
  out[1] = (unsigned)__any_sync(KS_FULL_MASK, l == 31);
  out[2] = (unsigned)__all_sync(KS_FULL_MASK, l < 31);
  out[3] = (unsigned)__all_sync(KS_FULL_MASK, l < 32);
  out[4] = (unsigned)__syncthreads_count(t % 5 == 0);
  out[5] = (unsigned)__syncthreads_or(t == 40);
  out[6] = (unsigned)__syncthreads_and(t != 40);
  out[7] = __activemask();
}

Test(shim, votes_of_whole_and_short_warps) {
  enum { N = 44 };
  for (int order : orders) {
    unsigned *d = device_array<unsigned>(8 * N, NULL), y[8 * N];
    ks_shim_set_order(order);
    cr_assert(launch(votes_kernel, dim3(1), dim3(N), 0, NULL, d) == cudaSuccess);
    fetch(y, d, 8 * N);
    for (int t = 0; t < N; t++) {
      const bool whole = t < 32;
      const unsigned wants[] = {whole ? 0x49249249u : 0x249u, whole, !whole, 1, 9, 1, 0,
                                whole ? ~0u : 0xfffu};
      for (int i = 0; i < 8; i++)
        cr_assert(y[8 * t + i] == wants[i], "thread %d, %d: %x, wants %x", t, i, y[8 * t + i], wants[i]);
    }
    cudaFree(d);
  }
}

/* Threads that are done no longer count at barriers of the block. */
static __global__ void early_kernel(int *y) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  y[threadIdx.x] = __syncthreads_count(1);
}

Test(shim, threads_that_are_done) {
  int *d = device_array<int>(40, NULL), y[40];
  cr_assert(launch(early_kernel, dim3(2), dim3(100), 0, NULL, d) == cudaSuccess);
  fetch(y, d, 40);
  for (int i = 0; i < 40; i++)
    cr_assert(y[i] == 40);
  cudaFree(d);
}

/* ---------------------------------------------------------------- fragments */

enum { M = 16, COLS = 8, K = 16, PITCH = 24 };
/* a [16, 16], b [8, 16] (its rows are columns of the product), d [16, 8], by ldmatrix of either kind. */
static __global__ void mma_kernel(const uint16_t *a, const uint16_t *b, float *d, int way) {
  ks_smem smem;
  uint16_t *sa = ks_smem_take<uint16_t>(&smem, M * PITCH), *sb = ks_smem_take<uint16_t>(&smem, K * PITCH);
  const int l = (int)threadIdx.x;
  for (int i = l; i < M * K; i += 32)
    sa[(way & 1 ? i % K * PITCH + i / K : i / K * PITCH + i % K)] = a[i];
  for (int i = l; i < COLS * K; i += 32)
    sb[(way & 2 ? i % K * PITCH + i / K : i / K * PITCH + i % K)] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2], fb4[4];
  /* a: matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15) */
  if (way & 1)
    ks_ldmatrix_x4_trans(fa, sa + (l % 8 + 8 * (l / 16)) * PITCH + 8 * (l / 8 % 2));
  else
    ks_ldmatrix_x4(fa, sa + (l % 8 + 8 * (l / 8 % 2)) * PITCH + 8 * (l / 16));
  if (way & 2)
    ks_ldmatrix_x4_trans(fb4, sb + l % 16 * PITCH);
  else
    ks_ldmatrix_x4(fb4, sb + l % 8 * PITCH + 8 * (l / 8 % 2));
  if (way & 6) /* the upper half of a load of four has the lower half's rows here */
    fb[0] = fb4[way / 2 & 2], fb[1] = fb4[(way / 2 & 2) + 1];
  else
    ks_ldmatrix_x2(fb, sb + l % 8 * PITCH + 8 * (l / 8 % 2));
  const int g = l / 4, t = l % 4;
  float sum[4] = {d[g * COLS + 2 * t], d[g * COLS + 2 * t + 1], d[(g + 8) * COLS + 2 * t],
                  d[(g + 8) * COLS + 2 * t + 1]};
  ks_mma_bf16(sum, fa, fb);
  for (int i = 0; i < 4; i++)
    d[(g + 8 * (i / 2)) * COLS + 2 * t + i % 2] = sum[i];
}

static uint16_t bf16_of(double x) {
  return (uint16_t)ks_bf16_bits((float)x);
}
static double of_bf16(uint16_t x) {
  return (double)ks_bits_to_float((uint32_t)x << 16);
}

Test(shim, fragments_and_products) {
  uint16_t a[M * K], b[COLS * K];
  float d[M * COLS], got[M * COLS];
  for (int round = 0; round < 64; round++) {
    const int way = round % 8;
    const bool exact = round < 32;
    for (uint16_t &x : a)
      x = bf16_of(exact ? rand() % 9 - 4 : rand() / (double)RAND_MAX - 0.3);
    for (uint16_t &x : b)
      x = bf16_of(exact ? rand() % 9 - 4 : rand() / (double)RAND_MAX - 0.3);
    for (float &x : d)
      x = (float)(rand() % 100);
    ks_shim_set_order(round % 5);
    uint16_t *da = device_array(M * K, a), *db = device_array(COLS * K, b);
    float *dd = device_array(M * COLS, d);
    cr_assert(launch(mma_kernel, dim3(1), dim3(32),
                     ks_smem_bytes<uint16_t>(M * PITCH) + ks_smem_bytes<uint16_t>(K * PITCH), NULL,
                     (const uint16_t *)da, (const uint16_t *)db, dd, way) == cudaSuccess);
    fetch(got, dd, M * COLS);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < COLS; j++) {
        double ref = (double)d[i * COLS + j], size = fabs(ref);
        for (int k = 0; k < K; k++) {
          const double term = of_bf16(a[i * K + k]) * of_bf16(b[j * K + k]);
          ref += term, size += fabs(term);
        }
        /* two roundings towards zero, each of less than 2^-23 of a partial sum */
        cr_assert(fabs((double)got[i * COLS + j] - ref) <= (exact ? 0 : 0x1p-22 * size),
                  "way %d, (%d, %d): %g, wants %g", way, i, j, (double)got[i * COLS + j], ref);
      }
    cudaFree(da), cudaFree(db), cudaFree(dd);
  }
}

/* Sums are cut off, as tensor cores do it: 2^24 + 1.5 becomes 2^24 and not 2^24 + 2. */
Test(shim, products_round_towards_zero) {
  uint16_t a[M * K] = {}, b[COLS * K] = {};
  float d[M * COLS];
  for (float &x : d)
    x = 0x1p24f;
  for (int i = 0; i < M; i++)
    a[i * K] = bf16_of(1.5);
  for (int j = 0; j < COLS; j++)
    b[j * K] = bf16_of(j % 2 ? 1 : -1);
  uint16_t *da = device_array(M * K, a), *db = device_array(COLS * K, b);
  float *dd = device_array(M * COLS, d);
  cr_assert(launch(mma_kernel, dim3(1), dim3(32), 2 * ks_smem_bytes<uint16_t>(M * PITCH), NULL,
                   (const uint16_t *)da, (const uint16_t *)db, dd, 0) == cudaSuccess);
  fetch(d, dd, M * COLS);
  for (int j = 0; j < COLS; j++)
    cr_assert(d[j] == (j % 2 ? 0x1p24f : 0x1p24f - 2));
  cudaFree(da), cudaFree(db), cudaFree(dd);
}

/* ---------------------------------------------------------------- asynchronous copies */

/* What lies in the destination before the wait, after the wait for all but the last group, after the wait for
 * all. */
static __global__ void copies_kernel(const float *x, float *y) {
  ks_smem smem;
  float *a = ks_smem_take<float>(&smem, 4), *b = ks_smem_take<float>(&smem, 4),
        *c = ks_smem_take<float>(&smem, 4);
  ks_cp_async_16(a, x, true);
  ks_cp_async_commit();
  ks_cp_async_8(b, x + 4, true);
  ks_cp_async_4(b + 2, x + 6, true);
  ks_cp_async_16(c, x + 8, false);
  ks_cp_async_commit();
  y[0] = a[0], y[1] = b[0], y[2] = c[0];
  ks_cp_async_wait<1>();
  y[3] = a[3], y[4] = b[0], y[5] = c[0];
  ks_cp_async_wait<0>();
  y[6] = b[1], y[7] = b[2], y[8] = b[3], y[9] = c[3];
}

Test(shim, copies_come_with_the_wait) {
  const float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float y[10];
  float *dx = device_array(8, x), *dy = device_array<float>(10, NULL);
  cr_assert(launch(copies_kernel, dim3(1), dim3(1), 3 * ks_smem_bytes<float>(4), NULL, (const float *)dx,
                   dy) == cudaSuccess);
  fetch(y, dy, 10);
  cr_assert(isnan(y[0]) && isnan(y[1]) && isnan(y[2]));
  cr_assert(y[3] == 4 && isnan(y[4]) && isnan(y[5]));
  cr_assert(y[6] == 6 && y[7] == 7 && isnan(y[8]) && y[9] == 0);
  cudaFree(dx), cudaFree(dy);
}

/* ---------------------------------------------------------------- ks_exp2 */

static __global__ void exp2_kernel(const float *x, float *y) {
  y[threadIdx.x] = ks_exp2(x[threadIdx.x]);
}

Test(shim, exp2_is_as_bad_as_it_may_be) {
  enum { N = 1000 };
  float x[N], y[N];
  int low = 0, high = 0;
  for (int i = 0; i < N; i++)
    x[i] = (float)(-140 + 280.0 * rand() / RAND_MAX);
  const float special[] = {0, -0.0f, 3, -7, -126, -127, -INFINITY, INFINITY, NAN, 1e-40f, 200};
  memcpy(x, special, sizeof special);
  float *dx = device_array(N, x), *dy = device_array<float>(N, NULL);
  cr_assert(launch(exp2_kernel, dim3(1), dim3(N), 0, NULL, (const float *)dx, dy) == cudaSuccess);
  fetch(y, dy, N);
  const float wants[] = {1, 1, 8, 0x1p-7f, 0x1p-126f, 0, 0, INFINITY, NAN, 1, INFINITY};
  for (int i = 0; i < 11; i++)
    cr_assert(y[i] == wants[i] || (isnan(y[i]) && isnan(wants[i])), "2^%g = %g", (double)x[i], (double)y[i]);
  for (int i = 11; i < N; i++) {
    const double ref = exp2((double)x[i]), off = (double)y[i] / ref - 1;
    if (x[i] < -126 || x[i] >= 128) {
      cr_assert(y[i] == (x[i] < 0 ? 0 : INFINITY));
      continue;
    }
    cr_assert(fabs(off) <= 0x1p-22 + 0x1p-23);
    (off > 0 ? high : low)++;
  }
  cr_assert(low > N / 4 && high > N / 4);
  cudaFree(dx), cudaFree(dy);
}

static __global__ void log2_kernel(const float *x, float *y) {
  y[threadIdx.x] = ks_log2(x[threadIdx.x]);
}

Test(shim, log2_is_as_bad_as_it_may_be) {
  enum { N = 1000 };
  float x[N], y[N];
  int low = 0, high = 0;
  for (int i = 0; i < N; i++)
    x[i] = exp2f((float)(i % 2 ? -126 + 252.0 * rand() / RAND_MAX : -2 + 4.0 * rand() / RAND_MAX));
  x[0] = 0, x[1] = 1e-40f;
  float *dx = device_array(N, x), *dy = device_array<float>(N, NULL);
  cr_assert(launch(log2_kernel, dim3(1), dim3(N), 0, NULL, (const float *)dx, dy) == cudaSuccess);
  fetch(y, dy, N);
  cr_assert(y[0] == -INFINITY && y[1] == -INFINITY);
  for (int i = 2; i < N; i++) {
    const double ref = log2((double)x[i]), off = ((double)y[i] - ref) / fmax(fabs(ref), 1);
    cr_assert(fabs(off) <= 0x1p-22 + 0x1p-23);
    (off > 0 ? high : low)++;
  }
  cr_assert(low > N / 4 && high > N / 4);
  cudaFree(dx), cudaFree(dy);
}
