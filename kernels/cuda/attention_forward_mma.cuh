/* Forward on tensor cores: a block of threads for a tile of 64 M rows, and one for few rows (attention.cu says how they work). */
#ifndef KS_CUDA_ATTENTION_FORWARD_MMA_CUH
#define KS_CUDA_ATTENTION_FORWARD_MMA_CUH

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_work.cuh"

/* Row tiles of a warp, and whether the left operands of the scores stay in registers. */
template <int DIM> struct attention_forward_size {
  static constexpr int M = DIM > 128 ? 1 : 2, ROWS = 64 * M;
  static constexpr bool KEPT = DIM <= 64;
  static constexpr int OUT = attention_size<DIM>::OUT;
  static constexpr int K_SIZE = ATTENTION_KEYS * attention_tile<DIM>::STRIDE,
                       V_SIZE = ATTENTION_KEYS * attention_tile<OUT>::STRIDE;
};

/* ---------------------------------------------------------------- arithmetic */

/* The new base of a row whose block has the largest score `max`, and what the sums so far are to be multiplied by. */
KS_DEVICE float attention_raise(float *base, float max) {
  const float old = *base;
  if (max > old + ATTENTION_SLACK) *base = max;
  return ks_exp2(old - attention_base(*base));
}
/* A quarter of a block's weights in one thread. */
KS_DEVICE float attention_quarter(const float *a, const float *b) {
  return (a[0] + a[1]) + (b[0] + b[1]);
}
KS_DEVICE float attention_add_quarters(float sum, float keep, float q0, float q1, float q2, float q3) {
  return fmaf(sum, keep, (q0 + q1) + (q2 + q3));
}
/* Over the four threads that share a row. */
KS_DEVICE float attention_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(KS_FULL_MASK, x, 1));
  return fmaxf(x, __shfl_xor_sync(KS_FULL_MASK, x, 2));
}
/* Scores from column `first` on that a row does not see weigh nothing. seen: of this block. */
template <int N> KS_DEVICE void attention_mask(float (*s)[4], int first, const int seen[2]) {
  const int t = (int)threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (first + n * 8 + 2 * t + i % 2 >= seen[i / 2]) s[n][i] = -INFINITY;
}
template <int N> KS_DEVICE float attention_most(const float (*s)[4], int h) {
  float max = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
  for (int n = 1; n < N; n++)
    max = fmaxf(max, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
  return attention_quad_max(max);
}

/* A block's scores of 16 rows to weights, in place; base and sum (this thread's part) of its two rows go on. */
KS_DEVICE void attention_softmax(float (*s)[4], float scale, float base[2], float sum[2], float keep[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    keep[h] = attention_raise(&base[h], attention_most<8>(s, h) * scale);
    const float from = -attention_base(base[h]);
    float quarter[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float *x = &s[2 * q + i / 2][2 * h + i % 2];
        *x = ks_exp2(fmaf(*x, scale, from));
      }
      quarter[q] = attention_quarter(&s[2 * q][2 * h], &s[2 * q + 1][2 * h]);
    }
    sum[h] = attention_add_quarters(sum[h], keep[h], quarter[0], quarter[1], quarter[2], quarter[3]);
  }
}

/* ---------------------------------------------------------------- values that are not finite */

/* Both halves of a register: a bit is left where the exponent is all ones. */
KS_DEVICE uint32_t attention_odd_bits(uint32_t x) {
  return ((x & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
}
KS_DEVICE bool attention_is_finite(uint32_t bits) {
  return (bits & 0x7f80u) != 0x7f80u;
}
/* Whether a block of values holds any. All threads; a barrier. */
template <int COLS> KS_DEVICE bool attention_is_odd(const ks_bf16 *v, int n_keys) {
  typedef attention_tile<COLS> at;
  uint32_t found = 0;
#pragma unroll 2
  for (int i = (int)threadIdx.x; i < n_keys * at::CHUNKS; i += ATTENTION_THREADS) {
    const uint4 x = *(const uint4 *)(v + at::at(i / at::CHUNKS, i % at::CHUNKS));
    found |=
        attention_odd_bits(x.x) | attention_odd_bits(x.y) | attention_odd_bits(x.z) | attention_odd_bits(x.w);
  }
  return __syncthreads_or(found != 0);
}
/* They are added to o (columns from 8 `chunk` on) of the rows that see them ... */
template <int COLS, int N>
KS_DEVICE void attention_add_odd(const ks_bf16 *v, int n_keys, int chunk, float (*o)[4], const int seen[2]) {
  typedef attention_tile<COLS> at;
  const int t = (int)threadIdx.x % 4;
#pragma unroll 1
  for (int r = 0; r < n_keys; r++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const ks_bf16 x = v[at::at(r, chunk + n) + 2 * t + i % 2];
        if (r < seen[i / 2] && !attention_is_finite(x.bits)) o[n][i] += ks_to_float(x);
      }
}
/* ... and become zeros. All threads; barriers before and after. */
template <int COLS> KS_DEVICE void attention_zero_odd(ks_bf16 *v, int n_keys) {
  typedef attention_tile<COLS> at;
  __syncthreads();
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < n_keys * COLS; i += ATTENTION_THREADS) {
    ks_bf16 *x = v + at::at(i / COLS, i % COLS / 8) + i % 8;
    if (!attention_is_finite(x->bits)) x->bits = 0;
  }
  __syncthreads();
}

/* ---------------------------------------------------------------- many rows */

/* Blocks of keys and values on their way; beyond the last block nothing is copied, but groups are counted. */
template <int DIM> struct attention_ring {
  ks_bf16 *k, *v;
  int last_stage; /* stages - 1: 0 or 1 */
};
template <int DIM, bool WIDE>
KS_DEVICE void attention_bring_keys(const attention_ring<DIM> *ring, const attention_forward_params *p,
                                    const attention_work *w, int b) {
  typedef attention_forward_size<DIM> size;
  if (b < w->end_block)
    attention_load<DIM, ATTENTION_KEYS, WIDE>(ring->k + (b & ring->last_stage) * size::K_SIZE,
                                              attention_keys<const ks_bf16>(p, w, w->seq.k, b),
                                              attention_block_keys(w, b), p->d);
  ks_cp_async_commit();
}
template <int DIM, bool WIDE>
KS_DEVICE void attention_bring_values(const attention_ring<DIM> *ring, const attention_forward_params *p,
                                      const attention_work *w, int b, int part) {
  typedef attention_forward_size<DIM> size;
  if (b < w->end_block) {
    attention_key_rows<const ks_bf16> rows = attention_keys<const ks_bf16>(p, w, w->seq.v, b);
    rows.first += part * size::OUT;
    attention_load<size::OUT, ATTENTION_KEYS, WIDE>(ring->v + (b & ring->last_stage) * size::V_SIZE, rows,
                                                    attention_block_keys(w, b),
                                                    attention_min(p->d - part * size::OUT, size::OUT));
  }
  ks_cp_async_commit();
}
/* The oldest group is there, for all; all are done with what they read before. */
template <int DIM> KS_DEVICE void attention_arrive(const attention_ring<DIM> *ring) {
  if (ring->last_stage)
    ks_cp_async_wait<2>();
  else
    ks_cp_async_wait<0>();
  __syncthreads();
}

/* Results of the warp's 16 rows from `row` on, through their place in the tile of queries. */
template <int DIM, bool WIDE>
KS_DEVICE void attention_finish(const attention_forward_params *p, const attention_work *w, int part,
                                ks_bf16 *q, int row, const float (*o)[4], const float base[2],
                                const float sum[2]) {
  constexpr int OUT = attention_size<DIM>::OUT;
  const int lane = (int)threadIdx.x % KS_WARP;
  const float all[2] = {ks_quad_sum(sum[0]), ks_quad_sum(sum[1])};
  if (row >= w->n_rows) return;
  __syncwarp();
  attention_put<DIM, OUT / 8>(q, row, o, 1 / all[0], 1 / all[1]);
  __syncwarp();
  attention_query_rows<ks_bf16> out = attention_queries(p, w, (ks_bf16 *)p->o);
  out.first += part * OUT;
  attention_store<DIM, WIDE>(q, out, row, attention_min(w->n_rows - row, 16),
                             attention_min(p->d - part * OUT, OUT));
  if (!p->lse || part != 0 || lane % 4 != 0) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + lane / 4 + 8 * h;
    if (r < w->n_rows) p->lse[attention_row(p, w, r)] = attention_lse(base[h], all[h]);
  }
}

/* The sign of the scale goes into the queries: the softmax's scale is not negative. */
template <int COLS> KS_DEVICE void attention_negate(ks_bf16 *q, int n_rows) {
  typedef attention_tile<COLS> at;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < n_rows * COLS; i += ATTENTION_THREADS)
    q[at::at(i / COLS, i % COLS / 8) + i % 8].bits ^= 0x8000u;
  __syncthreads();
}

/* Weights of a warp's rows for the keys from `key` on, as operands; base, sum and o go on. */
template <int DIM, int M, int N, int OUT>
KS_DEVICE void attention_weigh(uint32_t (*weights)[N / 2][4], float (*o)[OUT / 8][4], float (*base)[2],
                               float (*sum)[2],
                               const uint32_t (*left)[attention_forward_size<DIM>::KEPT ? DIM / 16 : 1][4],
                               const ks_bf16 *q, const ks_bf16 *k, const attention_forward_params *p,
                               const attention_work *w, int row, int key, int first_seen) {
  float s[M][N][4] = {}, keep[M][2];
  bool rose = false;
  attention_scores<DIM, M, N, attention_forward_size<DIM>::KEPT>(s, attention_lane(), left, q, row, k);
#pragma unroll
  for (int m = 0; m < M; m++) {
    if (key + ATTENTION_KEYS > first_seen) {
      int here[2];
      attention_seen_here(p, w, row + 16 * m, key, here);
      attention_mask<N>(s[m], 0, here);
    }
    attention_softmax(s[m], p->scale, base[m], sum[m], keep[m]);
    attention_operand<N>(weights[m], s[m]);
    rose |= keep[m][0] != 1.0f || keep[m][1] != 1.0f;
  }
  if (!__any_sync(KS_FULL_MASK, rose)) return;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        o[m][n][i] *= keep[m][i / 2];
}

template <int DIM, bool WIDE>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_forward_mma_kernel(attention_forward_params p) {
#if KS_ATTENTION_HAS_MMA
  typedef attention_forward_size<DIM> size;
  constexpr int OUT = size::OUT, PARTS = attention_size<DIM>::PARTS, N = ATTENTION_KEYS / 8, M = size::M;
  ks_smem smem;
  ks_bf16 *q = ks_smem_take<ks_bf16>(&smem, (size_t)size::ROWS * attention_tile<DIM>::STRIDE);
  attention_ring<DIM> ring;
  ring.last_stage = p.n_stages - 1;
  ring.k = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * size::K_SIZE);
  ring.v = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * size::V_SIZE);
  attention_work w;
  if (!attention_work_at(&p, PARTS, size::ROWS, &w)) return;
  const int part = (int)blockIdx.x % PARTS, row = attention_warp(p.n_sm) * 16 * M, ahead = ring.last_stage;

  attention_load<DIM, size::ROWS, WIDE>(q, attention_queries(&p, &w, (const ks_bf16 *)p.q), w.n_rows, p.d);
  attention_bring_keys<DIM, WIDE>(&ring, &p, &w, w.block);
  if (ahead) {
    attention_bring_values<DIM, WIDE>(&ring, &p, &w, w.block, part);
    attention_bring_keys<DIM, WIDE>(&ring, &p, &w, w.block + 1);
  }
  const int first_seen = attention_seen(&p, &w, row),
            last_seen = row < w.n_rows ? attention_seen(&p, &w, row + 16 * M - 1) : 0;
  uint32_t left[M][size::KEPT ? DIM / 16 : 1][4];
  if (size::KEPT || p.is_negative) {
    attention_arrive(&ring);
    if (p.is_negative) attention_negate<DIM>(q, size::ROWS);
#pragma unroll
    for (int m = 0; size::KEPT && m < M; m++)
#pragma unroll
      for (int k = 0; k < DIM / 16; k++)
        attention_left<DIM>(left[m][size::KEPT ? k : 0], attention_lane(), q, row + 16 * m, k);
  }
  float o[M][OUT / 8][4] = {}, base[M][2], sum[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; m++)
    base[m][0] = base[m][1] = -INFINITY;

  for (int b = w.block; b < w.end_block; b++) {
    const int key = b * ATTENTION_KEYS, n_keys = attention_block_keys(&w, b);
    const bool is_here = key < last_seen;
    const ks_bf16 *k = ring.k + (b & ahead) * size::K_SIZE;
    ks_bf16 *v = ring.v + (b & ahead) * size::V_SIZE;
    uint32_t weights[M][N / 2][4];
    attention_arrive(&ring);
    attention_bring_values<DIM, WIDE>(&ring, &p, &w, b + ahead, part);
    if (is_here)
      attention_weigh<DIM, M, N, OUT>(weights, o, base, sum, left, q, k, &p, &w, row, key, first_seen);
    attention_arrive(&ring);
    attention_bring_keys<DIM, WIDE>(&ring, &p, &w, b + ahead + 1);
    if (key + n_keys > w.least_seen && attention_is_odd<OUT>(v, n_keys)) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        int here[2];
        attention_seen_here(&p, &w, row + 16 * m, key, here);
        attention_add_odd<OUT, OUT / 8>(v, n_keys, 0, o[m], here);
      }
      attention_zero_odd<OUT>(v, n_keys);
    }
    if (is_here) attention_accumulate<OUT, M, N / 2, OUT / 8>(o, attention_lane(), weights, v, 0);
  }
  if (!attention_work_at(&p, PARTS, size::ROWS, &w)) return; /* again: what only the end needs was not kept */
#pragma unroll
  for (int m = 0; m < M; m++)
    attention_finish<DIM, WIDE>(&p, &w, part, q, row + 16 * m, o[m], base[m], sum[m]);
#endif
}

template <int DIM> static size_t attention_forward_smem(int n_stages) {
  typedef attention_forward_size<DIM> size;
  return ks_smem_bytes<ks_bf16>((size_t)size::ROWS * attention_tile<DIM>::STRIDE) +
         ks_smem_bytes<ks_bf16>((size_t)n_stages * size::K_SIZE) +
         ks_smem_bytes<ks_bf16>((size_t)n_stages * size::V_SIZE);
}

#endif
