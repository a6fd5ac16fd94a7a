/* Backward on tensor cores (attention_back.cu says how it works). */
#ifndef KS_CUDA_ATTENTION_BACK_MMA_CUH
#define KS_CUDA_ATTENTION_BACK_MMA_CUH

#include "kernels/cuda/attention_back_work.cuh"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_simt.cuh"

/* M: row tiles of a warp. KEPT: those of the scores stay in registers. PAIRED: two warps have the same keys;
 * each makes the weights of half of the rows that stream, and half of the columns of the gradients. OUT:
 * columns that a warp accumulates. */
template <int DIM, bool KEYS> struct attention_back_size {
  static constexpr int STRIDE = attention_tile<DIM>::STRIDE, M = DIM > 128 ? 1 : 2;
  static constexpr bool PAIRED = KEYS && DIM > 64 && DIM <= 128, KEPT = !KEYS && DIM <= 64;
  static constexpr int TILE = PAIRED ? 64 : 64 * M;
  static constexpr int STREAM = DIM > 128 ? 16 : PAIRED ? 64 : 32;
  static constexpr int SHARE = PAIRED ? STREAM / 2 : STREAM,
                       OUT = PAIRED ? DIM / 2 : attention_size<DIM>::OUT;
  static constexpr int EXCHANGE = PAIRED ? ATTENTION_THREADS * 2 * M * SHARE / 16 : 0; /* of 16 bytes */
};

/* What streams: a stage has B1, B2 and, when they are rows, their lse and D. */
template <int DIM, bool KEYS> struct attention_back_ring {
  ks_bf16 *b1, *b2;
  float2 *sums;
};

template <int DIM, bool KEYS, bool WIDE>
KS_DEVICE void attention_back_bring(const attention_back_ring<DIM, KEYS> *ring, int stage,
                                    const attention_back_params *p, const attention_back_work *w, int from) {
  typedef attention_back_size<DIM, KEYS> size;
  constexpr int N = size::STREAM;
  const int n = w->to - from;
  ks_bf16 *b1 = ring->b1 + stage * N * size::STRIDE, *b2 = ring->b2 + stage * N * size::STRIDE;
  if (n > 0) {
    if constexpr (KEYS) {
      attention_load_both<DIM, N, WIDE>(b1, attention_back_queries(p, w, (const ks_bf16 *)p->q, from), b2,
                                        attention_back_queries(p, w, (const ks_bf16 *)p->d_o, from).first, n,
                                        p->d);
      const int i = attention_thread();
      if (i < N)
        ks_cp_async_8(ring->sums + stage * N + i, p->dot + 2 * attention_back_place(p, w, from + i), i < n);
    } else {
      attention_load<DIM, N, WIDE>(b1, attention_back_keys(p, w, (const ks_bf16 *)w->seq.k, from), n, p->d);
      attention_load<DIM, N, WIDE>(b2, attention_back_keys(p, w, (const ks_bf16 *)w->seq.v, from), n, p->d);
    }
  }
  ks_cp_async_commit();
}

/* 16 of the tile's rows of a gradient, columns `first` on, through A's place, which no warp reads any more. */
template <int DIM, int OUT, bool WIDE, class ROWS>
KS_DEVICE void attention_back_finish(const attention_back_params *p, int n, ks_bf16 *tile, ROWS rows, int row,
                                     const float (*acc)[4], float scale, int first, int chunk) {
  if (row >= n) return;
  __syncwarp();
  attention_put_at<DIM, OUT / 8>(tile, row, chunk, acc, scale, scale);
  __syncwarp();
  rows.first += first + 8 * chunk;
  attention_store_at<DIM, WIDE>(tile, rows, row, attention_min(n - row, 16), chunk,
                                attention_min(p->d - first - 8 * chunk, OUT));
}

/* ---------------------------------------------------------------- dq */

/* lse in base 2 and D = <do, o> of the tile's rows, eight threads a row: for this block and for attention_back_keys_kernel.
 * Beyond the last row those of the last. A thread has ROWS rows before it writes: their loads are under way together. */
template <int DIM, bool WIDE>
KS_DEVICE void attention_back_sums(const attention_back_params *p, const attention_back_work *w,
                                   float2 *sums) {
  constexpr int ROWS = WIDE ? 4 : 1, STEP = ATTENTION_THREADS / 8;
  const int lane = (int)threadIdx.x % 8, d = p->d - 4 * lane;
  const attention_query_rows<const ks_bf16> o = attention_back_queries(p, w, (const ks_bf16 *)p->o, w->begin),
                                            d_o = attention_back_queries(p, w, (const ks_bf16 *)p->d_o,
                                                                         w->begin);
#pragma unroll 1
  for (int r = (int)threadIdx.x / 8; r < attention_back_size<DIM, false>::TILE; r += ROWS * STEP) {
    float2 x[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int row = attention_min(r + i * STEP, w->n - 1);
      x[i] = make_float2(p->lse[attention_back_place(p, w, w->begin + row)] * ATTENTION_LOG2E, 0);
#pragma unroll(WIDE ? DIM / 16 : 1)
      for (int c = 0; c < DIM; c += 32) {
        const float4 a = attention_load4<ks_bf16>(o.at(row) + 4 * lane, c, d, WIDE),
                     b = attention_load4<ks_bf16>(d_o.at(row) + 4 * lane, c, d, WIDE);
        x[i].y = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, x[i].y))));
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int j = 1; j < 8; j *= 2)
        x[i].y += __shfl_xor_sync(KS_FULL_MASK, x[i].y, j);
      if (lane != 0) continue;
      sums[r + i * STEP] = x[i];
      if (r + i * STEP < w->n)
        *(float2 *)(p->dot + 2 * attention_back_place(p, w, w->begin + r + i * STEP)) = x[i];
    }
  }
}

/* A hidden pair weighs nothing, whatever its row and key are. */
KS_DEVICE void attention_back_hide(float *s, float *dp, float scale) {
  *s = scale < 0 ? INFINITY : -INFINITY;
  *dp = 0;
}
/* s, dp of a warp's 16 rows from `row` of the tile on against 8 N keys from `from` on to ds (without scale), in dp. */
template <int N>
KS_DEVICE void attention_back_row_weights(const attention_back_params *p, const attention_back_work *w,
                                          float (*s)[4], float (*dp)[4], const float2 *row_sums, int row,
                                          int from, bool masked) {
  const int lane = attention_lane(), t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + 8 * h + lane / 4;
    if (masked) {
      const int seen = attention_back_seen(p, w, w->begin + r) - from;
#pragma unroll
      for (int i = 0; i < 2 * N; i++)
        if (i / 2 * 8 + 2 * t + i % 2 >= seen)
          attention_back_hide(&s[i / 2][2 * h + i % 2], &dp[i / 2][2 * h + i % 2], p->scale2);
    }
    const float2 sums = row_sums[r];
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
      float *x = &dp[i / 2][2 * h + i % 2];
      *x = ks_exp2(fmaf(s[i / 2][2 * h + i % 2], p->scale2, -sums.x)) * (*x - sums.y);
    }
  }
}

template <int DIM, bool WIDE>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_back_rows_kernel(attention_back_params p) {
#if KS_ATTENTION_HAS_MMA
  typedef attention_back_size<DIM, false> size;
  constexpr int N = size::STREAM, M = size::M, OUT = size::OUT, PARTS = attention_size<DIM>::PARTS;
  const int row = attention_warp(p.n_sm) * 16 * M;
  ks_smem smem;
  ks_bf16 *a1 = ks_smem_take<ks_bf16>(&smem, (size_t)size::TILE * size::STRIDE);
  ks_bf16 *a2 = ks_smem_take<ks_bf16>(&smem, (size_t)size::TILE * size::STRIDE);
  attention_back_ring<DIM, false> ring;
  ring.b1 = ks_smem_take<ks_bf16>(&smem, (size_t)2 * N * size::STRIDE);
  ring.b2 = ks_smem_take<ks_bf16>(&smem, (size_t)2 * N * size::STRIDE);
  float2 *row_sums = ks_smem_take<float2>(&smem, size::TILE);
  attention_back_work w;
  attention_back_work_at<false>(&p, PARTS, size::TILE, &w);
  const int part = (int)blockIdx.x % PARTS;
  attention_load_both<DIM, size::TILE, WIDE>(
      a1, attention_back_queries(&p, &w, (const ks_bf16 *)p.q, w.begin), a2,
      attention_back_queries(&p, &w, (const ks_bf16 *)p.d_o, w.begin).first, w.n, p.d);
  attention_back_bring<DIM, false, WIDE>(&ring, 0, &p, &w, w.from);
  attention_back_sums<DIM, WIDE>(&p, &w, row_sums);
  const int first_seen = attention_back_seen(&p, &w, w.begin + attention_min(row, w.n - 1)),
            last_seen =
                row < w.n ? attention_back_seen(&p, &w, w.begin + attention_min(row + 16 * M, w.n) - 1) : 0;
  uint32_t left[M][size::KEPT ? DIM / 16 : 1][4];
  if constexpr (size::KEPT) {
    ks_cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < M * DIM / 16; i++)
      attention_left<DIM>(left[i % M][i / M], attention_lane(), a1, row + 16 * (i % M), i / M);
  }
  float acc[M][OUT / 8][4] = {};
  int stage = 0;
  for (int from = w.from; from < w.to; from += N) {
    const ks_bf16 *b1 = ring.b1 + stage * N * size::STRIDE, *b2 = ring.b2 + stage * N * size::STRIDE;
    ks_cp_async_wait<0>();
    __syncthreads(); /* this tile is there; all are done with the one before */
    attention_back_bring<DIM, false, WIDE>(&ring, stage ^= 1, &p, &w, from + N);
    if (from < last_seen) {
      float s[M][N / 8][4] = {}, dp[M][N / 8][4] = {};
      uint32_t x[M][N / 16][4];
      attention_scores<DIM, M, N / 8, size::KEPT>(s, attention_lane(), left, a1, row, b1);
      attention_scores<DIM, M, N / 8, false>(dp, attention_lane(), nullptr, a2, row, b2);
#pragma unroll
      for (int m = 0; m < M; m++) {
        attention_back_row_weights<N / 8>(&p, &w, s[m], dp[m], row_sums, row + 16 * m, from,
                                          from + N > first_seen);
        attention_operand<N / 8>(x[m], dp[m]);
      }
      attention_accumulate<DIM, M, N / 16, OUT / 8>(acc, attention_lane(), x, b1, part * OUT / 8);
    }
  }
  attention_back_work_at<false>(&p, PARTS, size::TILE, &w); /* again: what only the end needs was not kept */
#pragma unroll
  for (int m = 0; m < M; m++)
    attention_back_finish<DIM, OUT, WIDE>(&p, w.n, a1,
                                          attention_back_queries(&p, &w, (ks_bf16 *)p.dq, w.begin),
                                          row + 16 * m, acc[m], p.scale, part * OUT, 0);
#endif
}

template <int DIM> static size_t attention_back_rows_smem() {
  typedef attention_back_size<DIM, false> size;
  return 2 * ks_smem_bytes<ks_bf16>((size_t)size::TILE * size::STRIDE) +
         2 * ks_smem_bytes<ks_bf16>((size_t)2 * size::STREAM * size::STRIDE) +
         ks_smem_bytes<float2>(size::TILE);
}

/* ---------------------------------------------------------------- dk, dv */

/* s, dp of a warp's 16 keys from `row` of the tile on against 8 N rows from `from` on to p and ds (without scale). */
template <int N>
KS_DEVICE void attention_back_key_weights(const attention_back_params *p, const attention_back_work *w,
                                          float (*s)[4], float (*dp)[4], const float2 *sums, int row,
                                          int from, bool masked) {
  const int lane = attention_lane(), t = lane % 4;
  if (masked) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int limit = attention_back_first(p, w, w->begin + row + 8 * h + lane / 4) - from,
                end = w->to - from;
#pragma unroll
      for (int i = 0; i < 2 * N; i++) {
        const int r = i / 2 * 8 + 2 * t + i % 2;
        if (r < limit || r >= end)
          attention_back_hide(&s[i / 2][2 * h + i % 2], &dp[i / 2][2 * h + i % 2], p->scale2);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float4 two = *(const float4 *)(sums + n * 8 + 2 * t); /* of two rows */
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[n][i] = ks_exp2(fmaf(s[n][i], p->scale2, -(i % 2 ? two.z : two.x)));
      dp[n][i] = s[n][i] * (dp[n][i] - (i % 2 ? two.w : two.y));
    }
  }
}

/* Left operands of this thread for the partner, and those of the partner. */
template <int M, int K>
KS_DEVICE void attention_back_give(uint4 *exchange, int warp, const uint32_t (*p)[K][4],
                                   const uint32_t (*ds)[K][4]) {
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll
  for (int i = 0; i < M * K; i++) {
    const uint32_t *x = p[i / K][i % K], *y = ds[i / K][i % K];
    exchange[(warp * 2 * M * K + 2 * i) * KS_WARP + lane] = make_uint4(x[0], x[1], x[2], x[3]);
    exchange[(warp * 2 * M * K + 2 * i + 1) * KS_WARP + lane] = make_uint4(y[0], y[1], y[2], y[3]);
  }
}
template <int M, int K>
KS_DEVICE void attention_back_get(const uint4 *exchange, int warp, uint32_t (*p)[K][4],
                                  uint32_t (*ds)[K][4]) {
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll
  for (int i = 0; i < M * K; i++) {
    const uint4 a = exchange[(warp * 2 * M * K + 2 * i) * KS_WARP + lane],
                b = exchange[(warp * 2 * M * K + 2 * i + 1) * KS_WARP + lane];
    uint32_t *x = p[i / K][i % K], *y = ds[i / K][i % K];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    y[0] = b.x, y[1] = b.y, y[2] = b.z, y[3] = b.w;
  }
}

template <int DIM, bool WIDE, int STAGES>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_back_keys_kernel(attention_back_params p) {
#if KS_ATTENTION_HAS_MMA
  typedef attention_back_size<DIM, true> size;
  constexpr int N = size::STREAM, M = size::M, OUT = size::OUT,
                PARTS = size::PAIRED ? 1 : attention_size<DIM>::PARTS, OWN = size::SHARE, K = OWN / 16;
  const int warp = attention_warp(p.n_sm);
  ks_smem smem;
  ks_bf16 *a1 = ks_smem_take<ks_bf16>(&smem, (size_t)size::TILE * size::STRIDE);
  ks_bf16 *a2 = ks_smem_take<ks_bf16>(&smem, (size_t)size::TILE * size::STRIDE);
  attention_back_ring<DIM, true> ring;
  ring.b1 = ks_smem_take<ks_bf16>(&smem, (size_t)STAGES * N * size::STRIDE);
  ring.b2 = ks_smem_take<ks_bf16>(&smem, (size_t)STAGES * N * size::STRIDE);
  ring.sums = ks_smem_take<float2>(&smem, (size_t)STAGES * N);
  uint4 *exchange = ks_smem_take<uint4>(&smem, size::EXCHANGE);
  attention_back_work w;
  attention_back_work_at<true>(&p, PARTS, size::TILE, &w);
  const int part = (int)blockIdx.x % PARTS, row = (size::PAIRED ? warp / 2 : warp) * 16 * M,
            half = size::PAIRED ? warp % 2 : 0;
  attention_load<DIM, size::TILE, WIDE>(a1, attention_back_keys(&p, &w, (const ks_bf16 *)w.seq.k, w.begin),
                                        w.n, p.d);
  attention_load<DIM, size::TILE, WIDE>(a2, attention_back_keys(&p, &w, (const ks_bf16 *)w.seq.v, w.begin),
                                        w.n, p.d);
  attention_back_bring<DIM, true, WIDE>(&ring, 0, &p, &w, w.from);
  const int first_limit = row < w.n ? attention_back_first(&p, &w, w.begin + row) : w.to,
            last_limit = attention_back_first(&p, &w, w.begin + attention_min(row + 16 * M, w.n) - 1);
  const int chunk = size::PAIRED ? half * OUT / 8 : part * OUT / 8;
  float acc1[M][OUT / 8][4] = {}, acc2[M][OUT / 8][4] = {};
  int stage = 0;
  for (int from = w.from; from < w.to; from += N) {
    const ks_bf16 *b1 = ring.b1 + stage * N * size::STRIDE, *b2 = ring.b2 + stage * N * size::STRIDE;
    const float2 *sums = ring.sums + stage * N;
    const bool is_here = from + N > first_limit;
    uint32_t weights[M][K][4], ds[M][K][4];
    ks_cp_async_wait<0>();
    __syncthreads(); /* this tile is there; with two stages all are done with the one before */
    if constexpr (STAGES == 2) attention_back_bring<DIM, true, WIDE>(&ring, stage ^= 1, &p, &w, from + N);
    if (is_here) {
      const int own = half * OWN, at = own * size::STRIDE;
      float s[M][OWN / 8][4] = {}, dp[M][OWN / 8][4] = {};
      attention_scores<DIM, M, OWN / 8, false>(s, attention_lane(), nullptr, a1, row, b1 + at);
      attention_scores<DIM, M, OWN / 8, false>(dp, attention_lane(), nullptr, a2, row, b2 + at);
#pragma unroll
      for (int m = 0; m < M; m++) {
        attention_back_key_weights<OWN / 8>(&p, &w, s[m], dp[m], sums + own, row + 16 * m, from + own,
                                            from < last_limit || from + N > w.to);
        attention_operand<OWN / 8>(weights[m], s[m]);
        attention_operand<OWN / 8>(ds[m], dp[m]);
      }
      if constexpr (size::PAIRED) attention_back_give<M, K>(exchange, warp, weights, ds);
      attention_accumulate<DIM, M, K, OUT / 8>(acc2, attention_lane(), weights, b2 + at, chunk);
      attention_accumulate<DIM, M, K, OUT / 8>(acc1, attention_lane(), ds, b1 + at, chunk);
    }
    if constexpr (size::PAIRED) {
      __syncthreads();
      if (is_here) {
        const int at = (half ^ 1) * OWN * size::STRIDE;
        attention_back_get<M, K>(exchange, warp ^ 1, weights, ds);
        attention_accumulate<DIM, M, K, OUT / 8>(acc2, attention_lane(), weights, b2 + at, chunk);
        attention_accumulate<DIM, M, K, OUT / 8>(acc1, attention_lane(), ds, b1 + at, chunk);
      }
    }
    if constexpr (STAGES == 1) {
      __syncthreads();
      attention_back_bring<DIM, true, WIDE>(&ring, 0, &p, &w, from + N);
    }
  }
  ks_cp_async_wait<0>(); /* of A, where nothing streamed */
  __syncthreads();
  attention_back_work_at<true>(&p, PARTS, size::TILE, &w);
#pragma unroll
  for (int m = 0; m < M; m++) {
    attention_back_finish<DIM, OUT, WIDE>(
        &p, w.n, a1, attention_back_keys(&p, &w, (ks_bf16 *)w.seq.dk, w.begin), row + 16 * m, acc1[m],
        p.scale, size::PAIRED ? 0 : part * OUT, size::PAIRED ? chunk : 0);
    attention_back_finish<DIM, OUT, WIDE>(
        &p, w.n, a2, attention_back_keys(&p, &w, (ks_bf16 *)w.seq.dv, w.begin), row + 16 * m, acc2[m], 1.0f,
        size::PAIRED ? 0 : part * OUT, size::PAIRED ? chunk : 0);
  }
#endif
}

template <int DIM> static size_t attention_back_keys_smem(int n_stages) {
  typedef attention_back_size<DIM, true> size;
  return 2 * ks_smem_bytes<ks_bf16>((size_t)size::TILE * size::STRIDE) +
         2 * ks_smem_bytes<ks_bf16>((size_t)n_stages * size::STREAM * size::STRIDE) +
         ks_smem_bytes<float2>((size_t)n_stages * size::STREAM) + ks_smem_bytes<uint4>(size::EXCHANGE);
}

#endif
