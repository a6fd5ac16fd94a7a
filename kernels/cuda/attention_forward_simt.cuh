/* Forward without tensor cores: the plain check of attention.cu's kernels, and float32.
 *
 * Every block b of 64 keys is summed on its own and the blocks of a row are merged in rising order, by the thread that walks over
 * them or, where few queries meet many keys (attention_is_split), by attention_combine_kernel from what others wrote down: both
 * with one arithmetic (attention_merge), so that prefill and decoding give the same bits.
 *
 *   m_b = max s,  p = 2^(s - m_b),  l_b = sum p,  o_b = p v
 *   m' = max(m, m_b),  l = l 2^(m - m') + l_b 2^(m_b - m'),  o = o 2^(m - m') + o_b 2^(m_b - m')
 */
#ifndef KS_CUDA_ATTENTION_FORWARD_SIMT_CUH
#define KS_CUDA_ATTENTION_FORWARD_SIMT_CUH

#include "kernels/cuda/attention_simt.cuh"
#include "kernels/cuda/attention_work.cuh"

/* Sum of the blocks so far: max and sum of one row; `keep` and `add` are the factors for its o. */
KS_DEVICE void attention_merge(float *max, float *sum, float block_max, float block_sum, float *keep,
                               float *add) {
  const float top = fmaxf(*max, block_max), base = attention_base(top);
  *keep = ks_exp2(*max - base);
  *add = ks_exp2(block_max - base);
  *sum = fmaf(block_sum, *add, *sum * *keep);
  *max = top;
}
KS_DEVICE float attention_merge_o(float o, float block_o, float keep, float add) {
  return fmaf(block_o, add, o * keep);
}
static constexpr int ATTENTION_SIMT_SLOTS = 8, ATTENTION_SIMT_ROWS = ATTENTION_SIMT_SLOTS * ATTENTION_WARPS;

/* Scores of row `slot` of this warp to weights, in shared memory, and to its max and sum. */
KS_DEVICE void attention_simt_softmax(float s[2], float scale, int seen, float *weights, float *max,
                                      float *sum) {
  const int lane = (int)threadIdx.x % KS_WARP;
#pragma unroll
  for (int j = 0; j < 2; j++)
    s[j] = lane + j * KS_WARP < seen ? s[j] * scale : -INFINITY;
  *max = fmaxf(s[0], s[1]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    *max = fmaxf(*max, __shfl_xor_sync(KS_FULL_MASK, *max, d));
  const float base = attention_base(*max), p0 = exp2f(s[0] - base), p1 = exp2f(s[1] - base);
  weights[lane] = p0;
  weights[lane + KS_WARP] = p1;
  *sum = ks_warp_sum(p0 + p1);
}

template <int NJ>
KS_DEVICE void attention_simt_note(const attention_forward_params *p, int64_t slot, const float *o, float max,
                                   float sum) {
  attention_write<float, NJ>(p->partial_o + slot * attention_partial_cols(p->d), o, 1.0f, p->d);
  if (threadIdx.x % KS_WARP == 0) *(float2 *)(p->partial_sums + 2 * slot) = make_float2(max, sum);
}
template <int NJ>
KS_DEVICE void attention_simt_add_block(float *total, float *max, float *sum, const float *o, float block_max,
                                        float block_sum) {
  float keep, add;
  attention_merge(max, sum, block_max, block_sum, &keep, &add);
#pragma unroll
  for (int j = 0; j < NJ; j++)
    total[j] = attention_merge_o(total[j], o[j], keep, add);
}

template <class T, int NJ, bool SPLIT>
__global__ void __launch_bounds__(ATTENTION_THREADS, attention_simt<NJ>::BLOCKS)
    attention_forward_simt_kernel(attention_forward_params p) {
  constexpr int SLOTS = ATTENTION_SIMT_SLOTS, ROWS = ATTENTION_SIMT_ROWS, COLS = attention_simt<NJ>::COLS;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  ks_smem smem;
  float *q = ks_smem_take<float>(&smem, (size_t)ROWS * COLS);
  float *chunk = ks_smem_take<float>(&smem, attention_simt<NJ>::CHUNK);
  float *weights = ks_smem_take<float>(&smem, (size_t)ROWS * ATTENTION_KEYS);
  attention_work w;
  if (!attention_work_at(&p, 1, ROWS, &w)) return;
  const bool aligned = p.width >= 4 * (int)sizeof(T);
  const int n_slots = (w.n_rows + ATTENTION_WARPS - 1) / ATTENTION_WARPS;
  attention_fill<T>(q, COLS, attention_queries(&p, &w, (const T *)p.q), 0, ROWS, w.n_rows, 0, COLS, p.d,
                    aligned);
  float total[SLOTS][NJ] = {}, max[SLOTS], sum[SLOTS] = {};
#pragma unroll
  for (int i = 0; i < SLOTS; i++)
    max[i] = -INFINITY;
  for (int b = w.block; b < w.end_block; b++) {
    const int n_keys = attention_block_keys(&w, b), key = b * ATTENTION_KEYS;
    float s[SLOTS][2] = {}, o[SLOTS][NJ] = {}, block_max[SLOTS], block_sum[SLOTS];
    int seen[SLOTS];
    attention_dots<T, NJ, SLOTS>(s, q, chunk, attention_keys<const T>(&p, &w, w.seq.k, b), n_keys, p.d,
                                 n_slots, aligned);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      seen[i] = attention_seen(&p, &w, i * ATTENTION_WARPS + warp) - key;
      if (i < n_slots)
        attention_simt_softmax(s[i], p.scale, seen[i],
                               weights + (i * ATTENTION_WARPS + warp) * ATTENTION_KEYS, &block_max[i],
                               &block_sum[i]);
    }
    __syncwarp();
    attention_sums<T, NJ, SLOTS>(o, weights, chunk, attention_keys<const T>(&p, &w, w.seq.v, b), n_keys, p.d,
                                 n_slots, key + n_keys > w.least_seen, seen, aligned);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      const int r = i * ATTENTION_WARPS + warp;
      if (r >= w.n_rows) continue;
      if constexpr (SPLIT)
        attention_simt_note<NJ>(&p, attention_slot(&p, &w, b, r), o[i], block_max[i], block_sum[i]);
      else
        attention_simt_add_block<NJ>(total[i], &max[i], &sum[i], o[i], block_max[i], block_sum[i]);
    }
  }
  if constexpr (!SPLIT)
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      const int r = i * ATTENTION_WARPS + warp;
      if (r >= w.n_rows) continue;
      attention_write<T, NJ>(attention_queries(&p, &w, (T *)p.o).at(r), total[i], 1 / sum[i], p.d);
      if (p.lse && lane == 0) p.lse[attention_row(&p, &w, r)] = attention_lse(max[i], sum[i]);
    }
}

template <int NJ> static size_t attention_forward_simt_smem() {
  return ks_smem_bytes<float>((size_t)ATTENTION_SIMT_ROWS * attention_simt<NJ>::COLS) +
         ks_smem_bytes<float>(attention_simt<NJ>::CHUNK) +
         ks_smem_bytes<float>((size_t)ATTENTION_SIMT_ROWS * ATTENTION_KEYS);
}

/* ---------------------------------------------------------------- few queries: the blocks together */

/* A warp for each (query, head); a lane has columns 4 lane .. + 3 of each 128. The loads of several blocks
 * are under way together. */
template <class T>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_combine_kernel(attention_forward_params p, const attention_split_row *rows, int n_rows) {
  const int warp = (int)blockIdx.x * ATTENTION_WARPS + (int)threadIdx.x / KS_WARP;
  const int lane = (int)threadIdx.x % KS_WARP, head = warp % p.n_heads, cols = attention_partial_cols(p.d);
  if (warp / p.n_heads >= n_rows) return;
  const attention_split_row row = rows[warp / p.n_heads];
  const attention_seq seq = p.seqs[row.seq];
  const int seen = seq.n_k - seq.n_q + row.query + 1, n_blocks = (seen + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
  const int64_t first = seq.partial + (int64_t)row.query * p.n_heads + head,
                step = (int64_t)seq.n_q * p.n_heads;
  float4 o[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
  float max = -INFINITY, sum = 0, keep, add;
#pragma unroll 4
  for (int b = 0; b < n_blocks; b++) {
    const int64_t slot = first + b * step;
    const float2 block = *(const float2 *)(p.partial_sums + 2 * slot);
    attention_merge(&max, &sum, block.x, block.y, &keep, &add);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int c = j * 128 + lane * 4;
      if (c >= cols) continue;
      const float4 x = *(const float4 *)(p.partial_o + slot * cols + c);
      o[j].x = attention_merge_o(o[j].x, x.x, keep, add);
      o[j].y = attention_merge_o(o[j].y, x.y, keep, add);
      o[j].z = attention_merge_o(o[j].z, x.z, keep, add);
      o[j].w = attention_merge_o(o[j].w, x.w, keep, add);
    }
  }
  const int64_t at = (seq.q_begin + row.query) * p.n_heads + head;
  T *to = (T *)p.o + at * p.d;
  const float scale = 1 / sum;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float x[4] = {o[j].x, o[j].y, o[j].z, o[j].w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (j * 128 + lane * 4 + i < p.d) to[j * 128 + lane * 4 + i] = ks_from_float<T>(x[i] * scale);
  }
  if (p.lse && lane == 0) p.lse[at] = attention_lse(max, sum);
}

#endif
