/* Forward for at most 16 rows of a sequence and key head: decoding. Four warps share a block of keys: each makes the scores of 16
 * keys, then all together the output, each the columns 16 (warp + 4 i) .. + 15. Weights and maxima go through
 * shared memory. Every sum has the order that attention_forward_mma_kernel gives it. */
#ifndef KS_CUDA_ATTENTION_FEW_CUH
#define KS_CUDA_ATTENTION_FEW_CUH

#include "kernels/cuda/attention_forward_mma.cuh"

static constexpr int ATTENTION_FEW = 16, ATTENTION_FEW_STAGES = 4;

template <int DIM> struct attention_few_size {
  static constexpr int STAGE = ATTENTION_KEYS * attention_tile<DIM>::STRIDE, TILES = DIM / 16,
                       MINE = (TILES + ATTENTION_WARPS_MMA - 1) / ATTENTION_WARPS_MMA;
};

/* What the warps tell each other of a block of keys. */
struct attention_few_room {
  uint4 *weights; /* [4 warps][32 lanes]: left operands */
  float *max;     /* [4 warps][16 rows] */
  float *sum;     /* [4 warps][16 rows][4 threads] */
};

template <int DIM, bool WIDE>
KS_DEVICE void attention_few_bring(const attention_forward_params *p, const attention_work *w, ks_bf16 *k,
                                   ks_bf16 *v, int b) {
  if (b < w->end_block) {
    const int n_keys = attention_block_keys(w, b), at = b % p->n_stages * attention_few_size<DIM>::STAGE;
    attention_load<DIM, ATTENTION_KEYS, WIDE>(k + at, attention_keys<const ks_bf16>(p, w, w->seq.k, b),
                                              n_keys, p->d);
    attention_load<DIM, ATTENTION_KEYS, WIDE>(v + at, attention_keys<const ks_bf16>(p, w, w->seq.v, b),
                                              n_keys, p->d);
  }
  ks_cp_async_commit();
}
/* The oldest of the stages is there; all are done with the one before. */
KS_DEVICE void attention_few_arrive(int n_stages) {
  if (n_stages == 4)
    ks_cp_async_wait<2>();
  else if (n_stages == 3)
    ks_cp_async_wait<1>();
  else
    ks_cp_async_wait<0>();
  __syncthreads();
}

/* This warp's 16 keys: scores to weights, for all. */
KS_DEVICE void attention_few_softmax(const attention_few_room *room, float (*s)[4], float scale,
                                     float base[2], float keep[2]) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float max = attention_most<2>(s, h);
    if (t == 0) room->max[warp * 16 + g + 8 * h] = max;
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float max = room->max[g + 8 * h];
#pragma unroll
    for (int i = 1; i < ATTENTION_WARPS_MMA; i++)
      max = fmaxf(max, room->max[i * 16 + g + 8 * h]);
    keep[h] = attention_raise(&base[h], max * scale);
    const float from = -attention_base(base[h]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float *x = &s[i / 2][2 * h + i % 2];
      *x = ks_exp2(fmaf(*x, scale, from));
    }
    room->sum[(warp * 16 + g + 8 * h) * 4 + t] = attention_quarter(&s[0][2 * h], &s[1][2 * h]);
  }
  uint32_t x[1][4];
  attention_operand<2>(x, s);
  room->weights[warp * KS_WARP + lane] = make_uint4(x[0][0], x[0][1], x[0][2], x[0][3]);
  __syncthreads();
}

template <int DIM, bool WIDE>
__global__ void __launch_bounds__(ATTENTION_THREADS, DIM > 128 ? 2 : 3)
    attention_few_kernel(attention_forward_params p) {
#if KS_ATTENTION_HAS_MMA
  typedef attention_few_size<DIM> size;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4;
  ks_smem smem;
  ks_bf16 *q = ks_smem_take<ks_bf16>(&smem, (size_t)ATTENTION_FEW * attention_tile<DIM>::STRIDE);
  ks_bf16 *keys = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * size::STAGE);
  ks_bf16 *values = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * size::STAGE);
  attention_few_room room;
  room.weights = ks_smem_take<uint4>(&smem, ATTENTION_THREADS);
  room.max = ks_smem_take<float>(&smem, ATTENTION_WARPS_MMA * 16);
  room.sum = ks_smem_take<float>(&smem, ATTENTION_WARPS_MMA * 64);
  attention_work w;
  ks_grid_start_next();
  const bool has_work = attention_work_at(&p, 1, ATTENTION_FEW, &w);
  ks_grid_wait(); /* above this line: staged tables only */
  if (!has_work) return;
  attention_load<DIM, ATTENTION_FEW, WIDE>(q, attention_queries(&p, &w, (const ks_bf16 *)p.q), w.n_rows, p.d);
  const int ahead = p.n_stages - 1;
  for (int i = 0; i < ahead; i++)
    attention_few_bring<DIM, WIDE>(&p, &w, keys, values, w.block + i);
  const int seen[2] = {attention_seen(&p, &w, g), attention_seen(&p, &w, g + 8)};
  float o[size::MINE][2][4] = {}, base[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  for (int b = w.block; b < w.end_block; b++) {
    const int key = b * ATTENTION_KEYS, n_keys = attention_block_keys(&w, b),
              stage = b % p.n_stages * size::STAGE;
    const int here[2] = {seen[0] - key, seen[1] - key};
    ks_bf16 *v = values + stage;
    attention_few_arrive(p.n_stages);
    attention_few_bring<DIM, WIDE>(&p, &w, keys, values, b + ahead);
    if (!ahead) attention_few_arrive(1);
    if (b == w.block && p.is_negative) attention_negate<DIM>(q, ATTENTION_FEW);
    float s[1][2][4] = {}, keep[2];
    attention_scores<DIM, 1, 2, false>(s, lane, nullptr, q, 0,
                                       keys + stage + warp * 16 * attention_tile<DIM>::STRIDE);
    if (key + ATTENTION_KEYS > w.least_seen) attention_mask<2>(s[0], warp * 16, here);
    attention_few_softmax(&room, s[0], p.scale, base, keep);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float *x = room.sum + (g + 8 * h) * 4 + t;
      sum[h] = attention_add_quarters(sum[h], keep[h], x[0], x[64], x[128], x[192]);
    }
#pragma unroll
    for (int i = 0; i < size::MINE * 8; i++)
      o[i / 8][i / 4 % 2][i % 4] *= keep[i % 4 / 2];
    if (key + n_keys > w.least_seen && attention_is_odd<DIM>(v, n_keys)) {
#pragma unroll
      for (int i = 0; i < size::MINE; i++)
        if (warp + ATTENTION_WARPS_MMA * i < size::TILES)
          attention_add_odd<DIM, 2>(v, n_keys, 2 * (warp + ATTENTION_WARPS_MMA * i), o[i], here);
      attention_zero_odd<DIM>(v, n_keys);
    }
#pragma unroll
    for (int k = 0; k < ATTENTION_KEYS / 16; k++) {
      const uint4 packed = room.weights[k * KS_WARP + lane];
      const uint32_t x[1][1][4] = {{{packed.x, packed.y, packed.z, packed.w}}};
#pragma unroll
      for (int i = 0; i < size::MINE; i++)
        if (warp + ATTENTION_WARPS_MMA * i < size::TILES)
          attention_accumulate<DIM, 1, 1, 2>(&o[i], lane, x, v + k * 16 * attention_tile<DIM>::STRIDE,
                                             2 * (warp + ATTENTION_WARPS_MMA * i));
    }
  }

  const float all[2] = {ks_quad_sum(sum[0]), ks_quad_sum(sum[1])};
  ks_cp_async_wait<0>();
  __syncthreads(); /* all are done with q */
#pragma unroll
  for (int i = 0; i < size::MINE; i++)
    if (warp + ATTENTION_WARPS_MMA * i < size::TILES)
      attention_put_at<DIM, 2>(q, 0, 2 * (warp + ATTENTION_WARPS_MMA * i), o[i], 1 / all[0], 1 / all[1]);
  __syncthreads();
  attention_store<DIM, WIDE>(q, attention_queries(&p, &w, (ks_bf16 *)p.o), 4 * warp,
                             attention_min(w.n_rows - 4 * warp, 4), p.d);
  if (!p.lse || warp != 0 || t != 0) return;
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (g + 8 * h < w.n_rows) p.lse[attention_row(&p, &w, g + 8 * h)] = attention_lse(base[h], all[h]);
#endif
}

template <int DIM> static size_t attention_few_smem(int n_stages) {
  return ks_smem_bytes<ks_bf16>((size_t)ATTENTION_FEW * attention_tile<DIM>::STRIDE) +
         2 * ks_smem_bytes<ks_bf16>((size_t)n_stages * attention_few_size<DIM>::STAGE) +
         ks_smem_bytes<uint4>(ATTENTION_THREADS) + ks_smem_bytes<float>(ATTENTION_WARPS_MMA * 16) +
         ks_smem_bytes<float>(ATTENTION_WARPS_MMA * 64);
}

#endif
