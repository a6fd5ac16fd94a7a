/* One small kernel that uses what all kernels use, and mistakes in it that tests must see. */
#include "planted.h"

#include "kernels/cuda/launch.cuh"

static __noinline__ float planted_recursion(volatile float *x, int depth) {
  volatile float room[256];
  room[depth % 256] = *x;
  return depth < 0 ? 0 : planted_recursion(room, depth + 1) + room[1];
}

template <int BUG> static __global__ void planted_kernel(const float *x, float *y, float **kept, float *sum) {
  enum { N = PLANTED_BLOCK };
  const int t = (int)threadIdx.x, lane = t % KS_WARP;
  const int64_t from = (int64_t)blockIdx.x * N;
  ks_smem smem;
  float *tile = ks_smem_take<float>(&smem, BUG == PLANTED_SHARED_OF_UNEQUAL_SIZE ? N + t / 63 : N);
  float *room = ks_smem_take<float>(&smem, N);
  if (BUG == PLANTED_MORE_SHARED_THAN_LAUNCHED) ks_smem_take<float>(&smem, 1);

  if (t < N / 4) {
    const float *at = x + from + 4 * t;
    if (BUG == PLANTED_COPY_PAST_GLOBAL && blockIdx.x + 1 == gridDim.x && t == N / 4 - 1) at += 4;
    if (BUG == PLANTED_MISALIGNED_COPY) at++;
    if (BUG != PLANTED_UNWRITTEN_SHARED || t != 5) ks_cp_async_16(tile + 4 * t, at, true);
  }
  if (BUG != PLANTED_NO_COPY_COMMIT) ks_cp_async_commit();
  if (BUG != PLANTED_NO_COPY_WAIT) ks_cp_async_wait<0>();
  if (BUG == PLANTED_BARRIER_IN_A_BRANCH) {
    if (t % 2 == 0) __syncthreads();
  } else if (BUG == PLANTED_OTHER_BARRIER_IN_A_BRANCH) {
    if (t < KS_WARP)
      __syncthreads();
    else
      __syncthreads_or(1);
  } else if (BUG != PLANTED_NO_BLOCK_BARRIER) {
    __syncthreads();
  }

  float v = tile[BUG == PLANTED_WRONG_INDEX ? (N - t) % N : N - 1 - t];
  if (BUG == PLANTED_READ_PAST_SHARED && t == 0) v += tile[N];
  if (BUG == PLANTED_MISALIGNED_VECTOR) v += ((const float4 *)(x + 1))->x;
  if (BUG == PLANTED_READ_PAST_GLOBAL && t == N - 1) v += x[from + N] > 0 ? 0.5f : 0.25f;
  if (BUG == PLANTED_READ_BEFORE_GLOBAL && t == 0) v += x[from - 1] > 0 ? 0.5f : 0.25f;
  if (BUG == PLANTED_ENDLESS_RECURSION) v += planted_recursion(&v, 0);
  if (BUG == PLANTED_RETURN_BEFORE_COLLECTIVE && t == 40) return;

  room[BUG == PLANTED_WRITE_PAST_SHARED ? t + 1 : t] = v;
  if (BUG == PLANTED_COLLECTIVE_IN_A_BRANCH) {
    if (lane < 16) __syncwarp();
  } else if (BUG == PLANTED_OTHER_COLLECTIVE_IN_A_BRANCH) {
    if (lane < 16)
      __syncwarp();
    else
      (void)__any_sync(KS_FULL_MASK, 1);
  } else if (BUG == PLANTED_PARTIAL_MASK) {
    __syncwarp(0xffffu);
  } else if (BUG != PLANTED_NO_WARP_BARRIER) {
    __syncwarp();
  }
  v -= 2 * room[t ^ 1];

  if (BUG == PLANTED_SHARED_OF_ANOTHER_BLOCK) {
    if (*kept) v += **kept;
    *kept = room;
  }
  if (BUG == PLANTED_WARPS_ADD_IN_TURN) {
    if (lane == 0) *sum = *sum / 3 + v; /* whoever comes first */
    __syncthreads();
    v += *sum;
  }
  y[(BUG == PLANTED_BLOCKS_WRITE_THE_SAME ? 0 : from) + t +
    (BUG == PLANTED_WRITE_PAST_GLOBAL && t == N - 1)] = v;
}

extern "C" ks_status planted_run(ks_ctx *ctx, planted_bug bug, const float *x, float *y, int64_t n) {
  static void (*const kernels[])(const float *, float *, float **, float *) = {
#define X(name) planted_kernel<PLANTED_##name>,
      PLANTED_MAP(X)
#undef X
  };
  const float host[PLANTED_BLOCK] = {0};
  void *workspace;
  KS_TRY(ks_cuda_workspace(ctx, 64, &workspace));
  KS_TRY(ks_cuda_fill(ctx, workspace, 0, 64));
  return ks_launch(ctx, "planted", kernels[bug], dim3((unsigned)(n / PLANTED_BLOCK)), dim3(PLANTED_BLOCK),
                   2 * ks_smem_bytes<float>(PLANTED_BLOCK), bug == PLANTED_HOST_POINTER ? host : x, y,
                   (float **)workspace, (float *)workspace + 8);
}
