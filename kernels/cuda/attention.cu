/* Causal grouped-query attention over packed sequences of different length, forward.
 *
 *   o = softmax(q k^T * scale, causal) v per head,  lse = log sum exp(q k^T * scale)
 *
 * Every block b of 64 keys, counted from key 0, is summed on its own, and the blocks of a row are merged in
 * rising order (Milakov & Gimelshein 2018; Dao 2023). With s = q k^T * (scale * log2 e):
 *
 *   m_b = max s,  p = 2^(s - m_b),  l_b = sum p,  o_b = p v
 *   m' = max(m, m_b),  l = l 2^(m - m') + l_b 2^(m_b - m'),  o = o 2^(m - m') + o_b 2^(m_b - m')
 *   at the end o / l  and  lse = (m + log2 l) ln 2
 *
 * so that who sums which blocks is free. Sequences of many queries: a block of threads has a tile of rows
 * (see attention.cuh), walks over the blocks of keys that its last row sees, and merges in registers.
 * Sequences of few queries (n_q <= 16 and 8 n_q <= n_k, more than one block): the blocks are dealt out, their
 * m_b, l_b, o_b written down, and attention_combine_kernel merges them. Both in one order with one
 * arithmetic: prefill at once, in pieces and token by token agree bit for bit, paged or not, and so does a
 * sequence alone and in any batch. (On the GPU this asks of mma that a row's result depend on nothing but its
 * own row and that zeros add nothing.)
 *
 * Bytes: q and o once; k and v once for each tile of rows, from L2 but for the first. Few queries: k and v
 * once, and 4 (d + 2) for each (query, head, block) written and read: group / 32 of what the keys take in
 * bf16, within L2.
 *
 * Flops: 4 d for each visible (query, key) and head, and one exponential. On a H200 (bf16, 801 TFLOP/s,
 * 4.25 TB/s), computed, not measured:
 *   Llama-3.2-1B (32 heads, 8 key heads, d = 64), 8 x 512 tokens:  8.6 GFLOP 11 us,  42 MB 10 us
 *   OpenLLaMA-3B (32 heads, d = 100 in 112), 8 x 512 tokens:      15.0 GFLOP 19 us, 105 MB 25 us
 *   Llama-3.2-1B, decoding 32 sequences at 1024 tokens:            0.3 GFLOP,        67 MB 16 us
 * Beyond 470 and 680 tokens the tensor cores bound the first two.
 *
 * Serial chain: a score L = d; l in trees over 64 keys; o within a block L = 64; blocks L = n_k / 64.
 *
 * Geometry of mma: 1 to 4 warps of 16 rows; tiles of q, k, v in shared memory, (16 warps + 64) DIM + 64 OUT
 * bf16: DIM 64: 24 KiB, 100 (in 112): 45 KiB, 128: 48 KiB, 256 (two blocks of threads of 128 output columns
 * each): 80 KiB, or 64 KiB with the two warps that fit a device of no more. k and v arrive by cp.async in
 * turns: v while scores are made, the next k while p v is. Registers hold the sums so far, those of the block
 * and the scores: up to 168 for DIM <= 64 (3 blocks of threads an SM), 255 beyond (2); no spills.
 * Few queries: one warp for up to 16 rows: 36 KiB at d = 128, 6 blocks of threads an SM on sm_90, each with
 * 16 KiB under way: 12.6 MB over 132 SM, where 4.25 TB/s at 600 ns ask for 2.6 MB.
 * Turing has no mma for bf16 and takes simt.
 *
 * A key or value that is not finite reaches those who see it and nobody else: a hidden score is replaced, and
 * where a block holds values that one row sees and another does not, those not finite go into the sums of the
 * former by hand, and zero into the product. (An infinite value of weight 0 counts as infinite there, not as
 * NaN.)
 *
 * Ladder (H200, bf16, commit f74fb33)
 *
 *   simt  float32 fma, tiles of 32 rows, 4 warps, right operand through one chunk of shared memory, loads not
 *         overlapped. Not measured yet.
 *
 *   mma   as above. Predicted: 16 rows a warp read 32 KiB of shared memory a block of keys for 0.5 MFLOP, so
 *         at most 2048 FLOP a clock and SM, half of a H200's tensor cores. Measured: 8 x 256
 *         tokens, 32 heads of 64: 42 us, 51 TFLOP/s.
 *
 *   Next, not built: two m16 tiles of rows a warp for DIM <= 64, which halves the reads of shared memory;
 *   wgmma with TMA and specialised warps as FlashAttention-3; few queries: four warps that share a block of
 *   keys by columns, for the latency of single sequences. */
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/attention_simt.cuh"

struct attention_forward_params {
  const void *q;
  void *o;
  float *lse;
  const attention_seq *seqs;
  const attention_item *items;
  const int32_t *pages;
  float *partial_o, *partial_sums; /* [slots, attention_partial_cols(d)], [slots, 2] */
  uint64_t magic;                  /* of group */
  int64_t kv_stride;
  float scale; /* times log2 e */
  int32_t n_heads, n_kv_heads, group, d, page_rows, width;
  int32_t zero; /* in place of padding: arguments are compared */
};
static_assert(sizeof(attention_forward_params) == 10 * 8 + 8 * 4, "no padding");

/* The work of a block of threads. */
struct attention_work {
  attention_seq seq;
  int head, begin, n_rows;        /* key head; rows begin .. begin + n_rows - 1 of its rows */
  int block, end_block;           /* blocks of keys */
  int before, n_keys, least_seen; /* keys before the first query; seen by the last row; by the first */
};
/* False: nothing to do. `parts` blocks of threads share an item and key head. */
KS_DEVICE bool attention_work_at(const attention_forward_params *p, int parts, int tile_rows,
                                 attention_work *w) {
  const int index = (int)blockIdx.x / parts;
  const attention_item item = p->items[index / p->n_kv_heads];
  if (item.seq < 0) return false;
  w->seq = p->seqs[item.seq];
  w->head = index % p->n_kv_heads;
  w->begin = item.begin;
  w->n_rows = attention_min(w->seq.n_q * p->group - item.begin, tile_rows);
  w->before = w->seq.n_k - w->seq.n_q;
  w->n_keys = w->before + attention_div(w->begin + w->n_rows - 1, p->magic) + 1;
  w->least_seen = w->before + attention_div(w->begin, p->magic) + 1;
  w->block = item.block;
  w->end_block = attention_min(item.block + item.n_blocks, (w->n_keys + ATTENTION_KEYS - 1) / ATTENTION_KEYS);
  return w->block < w->end_block;
}
KS_DEVICE int attention_seen(const attention_forward_params *p, const attention_work *w, int r) {
  return w->before + attention_div(w->begin + attention_min(r, w->n_rows - 1), p->magic) + 1;
}
/* Row r of the tile among all (query, head) of the sequence. */
KS_DEVICE int64_t attention_place(const attention_forward_params *p, const attention_work *w, int r) {
  const int query = attention_div(w->begin + r, p->magic);
  return (int64_t)query * p->n_heads + w->head * p->group + (w->begin + r - query * p->group);
}
KS_DEVICE int64_t attention_slot(const attention_forward_params *p, const attention_work *w, int block,
                                 int r) {
  return w->seq.partial + (int64_t)block * w->seq.n_q * p->n_heads + attention_place(p, w, r);
}
template <class T>
KS_DEVICE attention_query_rows<T> attention_queries(const attention_forward_params *p,
                                                    const attention_work *w, T *x) {
  const int64_t stride = (int64_t)p->n_heads * p->d;
  return {x + w->seq.q_begin * stride + (int64_t)w->head * p->group * p->d,
          stride,
          p->magic,
          w->begin,
          p->group,
          p->d};
}
template <class T>
KS_DEVICE attention_key_rows<T> attention_keys(const attention_forward_params *p, const attention_work *w,
                                               const void *x, int block) {
  const int64_t row = attention_key_row(&w->seq, p->pages, p->page_rows, block * ATTENTION_KEYS);
  return {(T *)x + row * p->kv_stride + (int64_t)w->head * p->d, p->kv_stride};
}
KS_DEVICE int attention_block_keys(const attention_work *w, int block) {
  return attention_min(w->n_keys - block * ATTENTION_KEYS, ATTENTION_KEYS);
}
/* Stride of partial_o: whole 16 bytes. */
KS_HOST_DEVICE int attention_partial_cols(int d) {
  return (d + 3) / 4 * 4;
}

/* ---------------------------------------------------------------- mma */

/* Scores of the warp's 16 rows to weights and to max and sum of the two rows of this thread. seen: keys of
 * this block that a row sees. */
template <int N>
KS_DEVICE void attention_softmax(float (*s)[4], float scale, bool masked, const int seen[2], float max[2],
                                 float sum[2]) {
  const int t = (int)threadIdx.x % 4;
  max[0] = max[1] = -INFINITY;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[n][i] *= scale;
      if (masked && n * 8 + 2 * t + i % 2 >= seen[i / 2]) s[n][i] = -INFINITY;
      max[i / 2] = fmaxf(max[i / 2], s[n][i]);
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    max[h] = fmaxf(max[h], __shfl_xor_sync(KS_FULL_MASK, max[h], 1));
    max[h] = fmaxf(max[h], __shfl_xor_sync(KS_FULL_MASK, max[h], 2));
    const float base = attention_base(max[h]);
    sum[h] = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; i++) {
        s[n][i] = ks_exp2(s[n][i] - base);
        sum[h] += s[n][i];
      }
    sum[h] += __shfl_xor_sync(KS_FULL_MASK, sum[h], 1);
    sum[h] += __shfl_xor_sync(KS_FULL_MASK, sum[h], 2);
  }
}

KS_DEVICE bool attention_is_finite(uint32_t bits) {
  return (bits & 0x7f80u) != 0x7f80u;
}

/* A block that not all rows see alike: values that are not finite are added to o of the rows that see them
 * and zeroed in the tile. All threads of the block; ends with a barrier where it changed anything. */
template <int OUT>
KS_DEVICE void attention_set_apart(ks_bf16 *v, int n_keys, float (*o)[4], const int seen[2]) {
  typedef attention_tile<OUT> at;
  const int t = (int)threadIdx.x % 4;
  bool found = false;
  for (int i = (int)threadIdx.x; i < n_keys * at::CHUNKS; i += (int)blockDim.x) {
    const uint4 x = *(const uint4 *)(v + at::at(i / at::CHUNKS, i % at::CHUNKS));
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++)
      found |= !attention_is_finite(words[j]) || !attention_is_finite(words[j] >> 16);
  }
  if (!__syncthreads_or(found)) return;
  for (int r = 0; r < n_keys; r++)
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const ks_bf16 x = v[at::at(r, n) + 2 * t + i % 2];
        if (r < seen[i / 2] && !attention_is_finite(x.bits)) o[n][i] += ks_to_float(x);
      }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < n_keys * OUT; i += (int)blockDim.x) {
    ks_bf16 *x = v + at::at(i / OUT, i % OUT / 8) + i % 8;
    if (!attention_is_finite(x->bits)) x->bits = 0;
  }
  __syncthreads();
}

/* One block's sums of the rows of this thread, for attention_combine_kernel. */
template <int OUT>
KS_DEVICE void attention_note(const attention_forward_params *p, const attention_work *w, int block, int part,
                              const float (*o)[4], const float max[2], const float sum[2]) {
  const int lane = (int)threadIdx.x % KS_WARP, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = (int)threadIdx.x / KS_WARP * 16 + lane / 4 + 8 * h;
    if (r >= w->n_rows) continue;
    const int64_t slot = attention_slot(p, w, block, r);
    float *to = p->partial_o + slot * attention_partial_cols(p->d);
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
      if (part * OUT + n * 8 + 2 * t < p->d)
        *(float2 *)(to + part * OUT + n * 8 + 2 * t) = make_float2(o[n][2 * h], o[n][2 * h + 1]);
    if (part == 0 && t == 0) *(float2 *)(p->partial_sums + 2 * slot) = make_float2(max[h], sum[h]);
  }
}

/* Merges a block into the sums of the two rows of this thread. */
template <int N>
KS_DEVICE void attention_add_block(float (*total)[4], float max[2], float sum[2], const float (*o)[4],
                                   const float block_max[2], const float block_sum[2]) {
  float keep[2], add[2];
#pragma unroll
  for (int h = 0; h < 2; h++)
    attention_merge(&max[h], &sum[h], block_max[h], block_sum[h], &keep[h], &add[h]);
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      total[n][i] = attention_merge_o(total[n][i], o[n][i], keep[i / 2], add[i / 2]);
}

/* Result of the warp's rows. The tile of queries, of which a warp reads its own rows only, takes it on the
 * way. */
template <int DIM>
KS_DEVICE void attention_finish(const attention_forward_params *p, const attention_work *w, int part,
                                ks_bf16 *q, const float (*total)[4], const float max[2], const float sum[2]) {
  constexpr int OUT = attention_size<DIM>::OUT;
  const int row = (int)threadIdx.x / KS_WARP * 16, lane = (int)threadIdx.x % KS_WARP;
  __syncwarp();
  attention_put<DIM, OUT / 8>(q, row, total, 1 / sum[0], 1 / sum[1]);
  __syncwarp();
  attention_query_rows<ks_bf16> out = attention_queries(p, w, (ks_bf16 *)p->o);
  out.first += part * OUT;
  attention_store<DIM>(q, out, row, attention_min(w->n_rows - row, 16), attention_min(p->d - part * OUT, OUT),
                       p->width);
  if (!p->lse || part != 0 || lane % 4 != 0) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + lane / 4 + 8 * h;
    if (r < w->n_rows)
      p->lse[w->seq.q_begin * p->n_heads + attention_place(p, w, r)] = attention_lse(max[h], sum[h]);
  }
}

template <int DIM, bool SPLIT>
__global__ void __launch_bounds__(ATTENTION_THREADS, attention_size<DIM>::BLOCKS)
    attention_forward_mma_kernel(attention_forward_params p) {
#if KS_ATTENTION_HAS_MMA
  constexpr int OUT = attention_size<DIM>::OUT, PARTS = attention_size<DIM>::PARTS, N = ATTENTION_KEYS / 8;
  const int n_warps = (int)blockDim.x / KS_WARP, warp = (int)threadIdx.x / KS_WARP,
            lane = (int)threadIdx.x % KS_WARP;
  ks_smem smem;
  ks_bf16 *q = ks_smem_take<ks_bf16>(&smem, (size_t)n_warps * 16 * attention_tile<DIM>::STRIDE);
  ks_bf16 *k = ks_smem_take<ks_bf16>(&smem, (size_t)ATTENTION_KEYS * attention_tile<DIM>::STRIDE);
  ks_bf16 *v = ks_smem_take<ks_bf16>(&smem, (size_t)ATTENTION_KEYS * attention_tile<OUT>::STRIDE);
  attention_work w;
  if (!attention_work_at(&p, PARTS, n_warps * 16, &w)) return;
  const int part = (int)blockIdx.x % PARTS, n_cols = attention_min(p.d - part * OUT, OUT), row = warp * 16;
  const int seen[2] = {attention_seen(&p, &w, row + lane / 4), attention_seen(&p, &w, row + lane / 4 + 8)};
  const int warp_seen = row < w.n_rows ? attention_seen(&p, &w, row + 15) : 0;

  attention_load<DIM>(q, attention_queries(&p, &w, (const ks_bf16 *)p.q), n_warps * 16, w.n_rows, p.d,
                      p.width);
  attention_load<DIM>(k, attention_keys<const ks_bf16>(&p, &w, w.seq.k, w.block), ATTENTION_KEYS,
                      attention_block_keys(&w, w.block), p.d, p.width);
  ks_cp_async_commit();
  float total[OUT / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int b = w.block; b < w.end_block; b++) {
    const int n_keys = attention_block_keys(&w, b), key = b * ATTENTION_KEYS;
    const bool masked = key + ATTENTION_KEYS > w.least_seen, is_here = key < warp_seen;
    const int here[2] = {seen[0] - key, seen[1] - key};
    ks_cp_async_wait<0>();
    __syncthreads(); /* k is there; all are done with v */
    attention_key_rows<const ks_bf16> values = attention_keys<const ks_bf16>(&p, &w, w.seq.v, b);
    values.first += part * OUT;
    attention_load<OUT>(v, values, ATTENTION_KEYS, n_keys, n_cols, p.width);
    ks_cp_async_commit();
    float s[N][4] = {}, o[OUT / 8][4] = {}, block_max[2], block_sum[2];
    uint32_t weights[N / 2][4];
    if (is_here) {
      attention_scores<DIM, N>(s, q, row, k);
      attention_softmax<N>(s, p.scale, masked, here, block_max, block_sum);
      attention_operand<N>(weights, s);
    }
    ks_cp_async_wait<0>();
    __syncthreads(); /* v is there; all are done with k */
    if (b + 1 < w.end_block)
      attention_load<DIM>(k, attention_keys<const ks_bf16>(&p, &w, w.seq.k, b + 1), ATTENTION_KEYS,
                          attention_block_keys(&w, b + 1), p.d, p.width);
    ks_cp_async_commit();
    if (key + n_keys > w.least_seen) attention_set_apart<OUT>(v, n_keys, o, here);
    if (!is_here) continue;
    attention_accumulate<OUT, N / 2, OUT / 8>(o, weights, v, 0);
    if constexpr (SPLIT)
      attention_note<OUT>(&p, &w, b, part, o, block_max, block_sum);
    else
      attention_add_block<OUT / 8>(total, max, sum, o, block_max, block_sum);
  }
  if constexpr (!SPLIT)
    if (row < w.n_rows) attention_finish<DIM>(&p, &w, part, q, total, max, sum);
#endif
}

template <int DIM> static size_t attention_forward_smem(int n_warps) {
  return ks_smem_bytes<ks_bf16>((size_t)n_warps * 16 * attention_tile<DIM>::STRIDE) +
         ks_smem_bytes<ks_bf16>((size_t)ATTENTION_KEYS * attention_tile<DIM>::STRIDE) +
         ks_smem_bytes<ks_bf16>((size_t)ATTENTION_KEYS * attention_tile<attention_size<DIM>::OUT>::STRIDE);
}

/* ---------------------------------------------------------------- simt */

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
      if (p.lse && lane == 0)
        p.lse[w.seq.q_begin * p.n_heads + attention_place(&p, &w, r)] = attention_lse(max[i], sum[i]);
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
  const int warp = ((int)blockIdx.x * ATTENTION_THREADS + (int)threadIdx.x) / KS_WARP;
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

/* ---------------------------------------------------------------- launches */

/* Warps whose tiles fit the shared memory of the device: 4, or 2 for 256 columns in 64 KiB. */
static int attention_most_warps(const ks_ctx *ctx, int64_t d) {
  const size_t limit = (size_t)ks_cuda_device_of(ctx)->smem_per_block;
  int n = ATTENTION_WARPS;
#define X(DIM)                                                                                               \
  if (d <= DIM) {                                                                                            \
    while (n > 1 && attention_forward_smem<DIM>(n) > limit)                                                  \
      n--;                                                                                                   \
    return n;                                                                                                \
  }
  KS_ATTENTION_SIZES(X)
#undef X
  return n;
}

/* Room for the sums of blocks. */
static ks_status attention_partials(ks_ctx *ctx, const attention_plan *p, attention_forward_params *f) {
  if (!p->n_slots) return KS_OK;
  const size_t n = (size_t)attention_coarse(p->n_slots), per = (size_t)attention_partial_cols(f->d) + 2;
  void *memory;
  KS_TRY(ks_cuda_workspace(ctx, n * per * sizeof(float), &memory));
  f->partial_o = (float *)memory;
  f->partial_sums = f->partial_o + n * (size_t)attention_partial_cols(f->d);
  return KS_OK;
}

template <bool SPLIT>
static ks_status attention_launch_mma(ks_ctx *ctx, const attention_forward_params *f, int64_t n_items,
                                      int n_warps) {
#define X(DIM)                                                                                               \
  if (f->d <= DIM)                                                                                           \
    return ks_launch(ctx, "attention_forward", attention_forward_mma_kernel<DIM, SPLIT>,                     \
                     dim3((unsigned)(n_items * f->n_kv_heads * attention_size<DIM>::PARTS)),                 \
                     dim3((unsigned)n_warps * KS_WARP), attention_forward_smem<DIM>(n_warps), *f);
  KS_ATTENTION_SIZES(X)
#undef X
  return KS_EUNSUPPORTED; /* refused before */
}

template <class T, int NJ, bool SPLIT>
static ks_status attention_launch_simt(ks_ctx *ctx, const attention_forward_params *f, int64_t n_items) {
  return ks_launch(ctx, "attention_forward", attention_forward_simt_kernel<T, NJ, SPLIT>,
                   dim3((unsigned)(n_items * f->n_kv_heads)), dim3(ATTENTION_THREADS),
                   attention_forward_simt_smem<NJ>(), *f);
}
template <class T>
static ks_status attention_launch_simt_of(ks_ctx *ctx, const attention_forward_params *f, int64_t n_items,
                                          bool split) {
  typedef ks_status (*launch)(ks_ctx *, const attention_forward_params *, int64_t);
  static const launch by_size[3][2] = {
      {attention_launch_simt<T, 2, false>, attention_launch_simt<T, 2, true>},
      {attention_launch_simt<T, 4, false>, attention_launch_simt<T, 4, true>},
      {attention_launch_simt<T, 8, false>, attention_launch_simt<T, 8, true>}};
  return by_size[f->d <= 64 ? 0 : f->d <= 128 ? 1 : 2][split](ctx, f, n_items);
}

template <class T>
static ks_status attention_launch_combine(ks_ctx *ctx, const attention_forward_params *f,
                                          const attention_split_row *rows, int64_t n_rows) {
  return ks_launch(ctx, "attention_combine", attention_combine_kernel<T>,
                   dim3(ks_blocks_for(n_rows * f->n_heads, ATTENTION_WARPS)), dim3(ATTENTION_THREADS), 0, *f,
                   rows, (int)n_rows);
}

extern "C" ks_status ks_cuda_attention_forward(ks_ctx *ctx, const ks_attention_args *a) {
  const bool use_mma = ks_cuda_variant_of(ctx, "attention_forward") == KS_CUDA_attention_forward_mma &&
                       ks_cuda_device_of(ctx)->major >= 8;
  attention_plan plan = {};
  attention_forward_params f = {};
  const attention_alignment alignment = attention_alignment_of(ctx, a);
  attention_tables tables = {};
  plan.group = a->n_heads / a->n_kv_heads;
  KS_TRY(attention_check_sizes(a));
  attention_measure(a, ks_cuda_device_of(ctx)->n_sm, attention_most_warps(ctx, a->head_dim),
                    use_mma ? 0 : ATTENTION_SIMT_ROWS, &plan);
  if (plan.n_items[0] + plan.n_items[1] == 0) return KS_OK;
  f.q = a->q, f.o = a->o, f.lse = a->lse;
  f.magic = attention_magic(plan.group);
  f.kv_stride = a->kv_stride;
  f.scale = a->scale * ATTENTION_LOG2E;
  f.n_heads = (int32_t)a->n_heads, f.n_kv_heads = (int32_t)a->n_kv_heads, f.group = (int32_t)plan.group;
  f.d = (int32_t)a->head_dim, f.page_rows = (int32_t)a->page_rows;
  f.width = attention_width(&alignment);
  KS_TRY(attention_stage(ctx, a, &plan, &tables));
  f.seqs = tables.seqs, f.items = tables.items, f.pages = tables.pages;
  KS_TRY(attention_partials(ctx, &plan, &f));
  for (int split = 0; split < 2; split++) {
    if (!plan.cap_items[split]) continue;
    if (!use_mma)
      KS_TRY(KS_CUDA_BY_ACT(ctx, attention_launch_simt_of, (ctx, &f, plan.cap_items[split], split)));
    else
      KS_TRY((split ? attention_launch_mma<true>
                    : attention_launch_mma<false>)(ctx, &f, plan.cap_items[split], plan.n_warps[split]));
    f.items += plan.cap_items[split];
  }
  return plan.n_split_rows
             ? KS_CUDA_BY_ACT(ctx, attention_launch_combine, (ctx, &f, tables.rows, plan.n_split_rows))
             : KS_OK;
}
