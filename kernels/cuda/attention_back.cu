/* Causal grouped-query attention, backward.
 *
 * With s = q k^T, p = softmax(s * scale) = exp(s * scale - lse), o = p v and do the loss's gradient at o:
 *
 *   dv_j = sum_i p_ij do_i,  dp_ij = <do_i, v_j>, and with the softmax's Jacobian
 *   d p_ij / d s_il = scale * p_ij (1[j = l] - p_il):
 *   ds_ij = scale * p_ij (dp_ij - sum_l p_il dp_il),  where
 *   sum_l p_il dp_il = <do_i, sum_l p_il v_l> = <do_i, o_i> = D_i.  So
 *   D = rowsum(do * o);  ds = p * (do v^T - D);  dv = p^T do;  dk = scale * ds^T q;  dq = scale * ds k
 *
 * p is computed again from lse. No atomics: three kernels, every output has one owner.
 *
 *   attention_back_dot   D of every (query, head): one warp each.
 *
 *   KEYS = true          dk, dv: a block of threads has a tile of keys and walks over the rows (query, head of the group, see
 *                        attention.cuh) that see its first key, in rising order. Keys that no query sees get zeros.
 *
 *   KEYS = false         dq: a block of threads has a tile of rows and walks over the keys that they see.
 *
 * The last two are one kernel: a tile stays (A1, A2: k, v or q, do), tiles stream (B1, B2: q, do or k, v):
 *
 *   S = A1 B1^T,  dP = A2 B2^T,  acc1 += dS B1 (dk or dq),  KEYS: acc2 += P B2 (dv)
 *
 * As A is the left operand, P and dS leave their products in the registers in which the next ones want them.
 *
 * Bytes: what streams once for each tile of the other side, from L2 but for the first; A and outputs once.
 *
 * Flops: 14 d for each visible (query, key) and head, and two exponentials. (10 d with one kernel, whose dq
 * needs atomics, or a second pass over n_k / 64 partial float32 copies.) On a H200 (bf16, 801 TFLOP/s,
 * 4.25 TB/s), computed, not measured:
 *   Llama-3.2-1B (32 heads, 8 key heads, d = 64), 8 x 512 tokens:  30 GFLOP 37 us, 143 MB 34 us
 *   OpenLLaMA-3B (32 heads, d = 100 in 112), 8 x 512 tokens:       53 GFLOP 66 us, 315 MB 74 us
 *
 * Serial chain: S, dP: L = d; dk, dv: L = group * n_q; dq: L = n_k; D: L = d / 32 and a tree.
 *
 * Geometry of mma: 4 warps of 16 tile rows; streamed tiles of 64 rows (DIM <= 64), 32 (DIM <= 128) or 16, in
 * two stages, by cp.async, one tile ahead. Shared memory, 128 DIM bf16 for A and 2 rows DIM a stage for B:
 * DIM 64: 48 KiB, 100 (in 112): 60 KiB, 128: 64 KiB, 256: 96 KiB, and lse and D of the streamed rows; fewer
 * stages, then fewer warps, where the device has less. Beyond 128 columns two blocks of threads make 128
 * columns each of the same tile. Registers: up to 255, 2 blocks of threads an SM; no spills.
 * Turing has no mma for bf16 and takes simt.
 *
 * Determinism: fixed order by construction; a sequence's gradients depend on nothing but itself. Hidden pairs
 * inside a tile take part with p = ds = 0, so a query or key that is not finite makes the rows of its tile
 * NaN, as on the CPU.
 *
 * Ladder (H200, bf16, commit f74fb33)
 *
 *   simt  float32 fma, tiles of 32 rows (16 beyond d = 128), right operands through one chunk of shared memory. Not measured
 *         yet.
 *
 *   mma   as above. Predicted: bound by reads of shared memory like the forward kernel, 16 rows a warp. Measured: 8 x 256
 *         tokens, 32 heads of 64: 97 us, 56 TFLOP/s.
 *
 *   Next, not built: one kernel with dq in a fixed order through partial sums, for short sequences; clusters that share a
 *   streamed tile by multicast; wgmma with two consumer warp groups as FlashAttention-3. */
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_simt.cuh"
#include <stdlib.h>

struct attention_back_params {
  const void *q, *d_o;
  void *dq;
  const float *lse, *dot; /* [n_rows, n_heads] */
  const attention_seq *seqs;
  const attention_item *items;
  uint64_t magic;
  int64_t kv_stride;
  float scale; /* not in base 2 */
  int32_t n_heads, n_kv_heads, group, d, width, n_stages, zero;
};
static_assert(sizeof(attention_back_params) == 9 * 8 + 8 * 4, "no padding: arguments are compared");

/* ---------------------------------------------------------------- D */

template <class T>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_back_dot_kernel(const T *o, const T *d_o, float *dot, int64_t n, int d, int is_aligned) {
  const int64_t row = ((int64_t)blockIdx.x * ATTENTION_THREADS + threadIdx.x) / KS_WARP;
  const int lane = (int)threadIdx.x % KS_WARP;
  if (row >= n) return;
  float sum = 0;
  for (int c = lane * 4; c < d; c += KS_WARP * 4) {
    const float4 x = attention_load4<T>(o + row * d, c, d, is_aligned),
                 y = attention_load4<T>(d_o + row * d, c, d, is_aligned);
    sum = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  }
  sum = ks_warp_sum(sum);
  if (lane == 0) dot[row] = sum;
}

/* ---------------------------------------------------------------- work of a block of threads */

/* The tile is of keys (KEYS) or of rows; what streams, of the other. */
struct attention_back_work {
  attention_seq seq;
  int head, begin, n; /* key head; tile */
  int from, to;       /* streamed rows, or keys */
  int before;         /* keys before the first query */
};
template <bool KEYS>
KS_DEVICE void attention_back_work_at(const attention_back_params *p, int parts, int tile,
                                      attention_back_work *w) {
  const int index = (int)blockIdx.x / parts;
  const attention_item item = p->items[index / p->n_kv_heads];
  w->seq = p->seqs[item.seq];
  w->head = index % p->n_kv_heads;
  w->begin = item.begin;
  w->before = w->seq.n_k - w->seq.n_q;
  const int n_rows = w->seq.n_q * p->group;
  w->n = attention_min((KEYS ? w->seq.n_k : n_rows) - item.begin, tile);
  w->from = KEYS && item.begin > w->before ? (item.begin - w->before) * p->group : 0;
  w->to = KEYS ? n_rows : w->before + attention_div(w->begin + w->n - 1, p->magic) + 1;
}
/* Whether row r sees key j: r >= group * (j - before). First row that sees key j: */
KS_DEVICE int attention_back_first(const attention_back_params *p, const attention_back_work *w, int j) {
  return j > w->before ? (j - w->before) * p->group : 0;
}
KS_DEVICE int attention_back_seen(const attention_back_params *p, const attention_back_work *w, int r) {
  return w->before + attention_div(r, p->magic) + 1;
}
/* Rows of q, do, dq from row `begin` of the sequence and key head on. */
template <class T>
KS_DEVICE attention_query_rows<T> attention_back_queries(const attention_back_params *p,
                                                         const attention_back_work *w, T *x, int begin) {
  const int64_t stride = (int64_t)p->n_heads * p->d;
  return {x + w->seq.q_begin * stride + (int64_t)w->head * p->group * p->d,
          stride,
          p->magic,
          begin,
          p->group,
          p->d};
}
template <class T>
KS_DEVICE attention_key_rows<T> attention_back_keys(const attention_back_params *p,
                                                    const attention_back_work *w, T *x, int begin) {
  return {x + begin * p->kv_stride + (int64_t)w->head * p->d, p->kv_stride};
}
/* Rows of q (or do, dq) and of k (or v, dk, dv): those of one. */
template <bool QUERIES, class T>
KS_DEVICE auto attention_back_rows(const attention_back_params *p, const attention_back_work *w, T *queries,
                                   T *keys, int begin) {
  if constexpr (QUERIES)
    return attention_back_queries(p, w, queries, begin);
  else
    return attention_back_keys(p, w, keys, begin);
}
/* Where lse and D of a row lie. */
KS_DEVICE int64_t attention_back_place(const attention_back_params *p, const attention_back_work *w, int r) {
  const int query = attention_div(r, p->magic);
  return (w->seq.q_begin + query) * p->n_heads + w->head * p->group + (r - query * p->group);
}

/* ---------------------------------------------------------------- mma */

template <int DIM> struct attention_back_size {
  static constexpr int STREAM = DIM <= 64 ? 64 : DIM <= 128 ? 32 : 16, STRIDE = attention_tile<DIM>::STRIDE;
  static constexpr int BLOCKS = 2;
};

/* What streams: a stage has B1, B2 and, when they are rows, their lse and D. */
template <int DIM> struct attention_back_stage {
  ks_bf16 *b1, *b2;
  float *lse, *dot;
};
template <int DIM>
KS_DEVICE attention_back_stage<DIM> attention_back_stage_at(const attention_back_stage<DIM> *all, int stage) {
  constexpr int N = attention_back_size<DIM>::STREAM, STRIDE = attention_back_size<DIM>::STRIDE;
  return {all->b1 + stage * N * STRIDE, all->b2 + stage * N * STRIDE, all->lse + stage * N,
          all->dot + stage * N};
}

template <int DIM, bool KEYS>
KS_DEVICE void attention_back_load(const attention_back_params *p, const attention_back_work *w, int from,
                                   const attention_back_stage<DIM> *to) {
  constexpr int N = attention_back_size<DIM>::STREAM;
  const int n = w->to - from;
  attention_load<DIM>(to->b1,
                      attention_back_rows<KEYS>(p, w, (const ks_bf16 *)p->q, (const ks_bf16 *)w->seq.k, from),
                      N, n, p->d, p->width);
  attention_load<DIM>(
      to->b2, attention_back_rows<KEYS>(p, w, (const ks_bf16 *)p->d_o, (const ks_bf16 *)w->seq.v, from), N, n,
      p->d, p->width);
  for (int i = (int)threadIdx.x; KEYS && i < N; i += (int)blockDim.x) {
    const int64_t at = attention_back_place(p, w, i < n ? from + i : from);
    ks_cp_async_4(to->lse + i, p->lse + at, i < n);
    ks_cp_async_4(to->dot + i, p->dot + at, i < n);
  }
}

/* s, dp of the warp's 16 tile rows against N streamed ones to p, ds (without scale). */
template <int N, bool KEYS>
KS_DEVICE void attention_back_weights(float (*s)[4], float (*dp)[4], float scale, const int limit[2],
                                      int from, int to, const float lse[2], const float dot[2],
                                      const float *stream_lse, const float *stream_dot) {
  const int t = (int)threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int c = n * 8 + 2 * t + i % 2;
      const float l = KEYS ? stream_lse[c] * ATTENTION_LOG2E : lse[i / 2],
                  d = KEYS ? stream_dot[c] : dot[i / 2];
      const bool visible = KEYS ? from + c >= limit[i / 2] && from + c < to : from + c < limit[i / 2];
      s[n][i] = visible ? ks_exp2(fmaf(s[n][i], scale, -l)) : 0.0f;
      dp[n][i] = visible ? s[n][i] * (dp[n][i] - d) : 0.0f;
    }
}

/* 128 columns of a tile's gradient through A's place, of which a warp has read its own rows only. */
template <int DIM, class ROWS>
KS_DEVICE void attention_back_finish(const attention_back_params *p, const attention_back_work *w,
                                     ks_bf16 *tile, ROWS rows, const float (*acc)[4], float scale, int part) {
  constexpr int OUT = attention_size<DIM>::OUT;
  const int row = (int)threadIdx.x / KS_WARP * 16;
  if (row >= w->n) return;
  __syncwarp();
  attention_put<DIM, OUT / 8>(tile, row, acc, scale, scale);
  __syncwarp();
  rows.first += part * OUT;
  attention_store<DIM>(tile, rows, row, attention_min(w->n - row, 16), attention_min(p->d - part * OUT, OUT),
                       p->width);
}

template <int DIM, bool KEYS>
__global__ void __launch_bounds__(ATTENTION_THREADS, attention_back_size<DIM>::BLOCKS)
    attention_back_mma_kernel(attention_back_params p) {
#if KS_ATTENTION_HAS_MMA
  typedef attention_back_size<DIM> size;
  constexpr int N = size::STREAM, OUT = attention_size<DIM>::OUT, PARTS = attention_size<DIM>::PARTS;
  const int row = (int)threadIdx.x / KS_WARP * 16, lane = (int)threadIdx.x % KS_WARP;
  const int tile = (int)blockDim.x / KS_WARP * 16;
  ks_smem smem;
  ks_bf16 *a1 = ks_smem_take<ks_bf16>(&smem, (size_t)tile * size::STRIDE);
  ks_bf16 *a2 = ks_smem_take<ks_bf16>(&smem, (size_t)tile * size::STRIDE);
  attention_back_stage<DIM> stages;
  stages.b1 = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * N * size::STRIDE);
  stages.b2 = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * N * size::STRIDE);
  stages.lse = ks_smem_take<float>(&smem, (size_t)p.n_stages * N);
  stages.dot = ks_smem_take<float>(&smem, (size_t)p.n_stages * N);
  attention_back_work w;
  attention_back_work_at<KEYS>(&p, PARTS, tile, &w);
  const int part = (int)blockIdx.x % PARTS;
  attention_load<DIM>(
      a1, attention_back_rows<!KEYS>(&p, &w, (const ks_bf16 *)p.q, (const ks_bf16 *)w.seq.k, w.begin), tile,
      w.n, p.d, p.width);
  attention_load<DIM>(
      a2, attention_back_rows<!KEYS>(&p, &w, (const ks_bf16 *)p.d_o, (const ks_bf16 *)w.seq.v, w.begin), tile,
      w.n, p.d, p.width);
  if (w.from < w.to) attention_back_load<DIM, KEYS>(&p, &w, w.from, &stages);
  ks_cp_async_commit();
  int limit[2];
  float lse[2] = {0, 0}, dot[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = w.begin + attention_min(row + lane / 4 + 8 * h, w.n - 1);
    limit[h] = KEYS ? attention_back_first(&p, &w, r) : attention_back_seen(&p, &w, r);
    if (KEYS) continue;
    lse[h] = p.lse[attention_back_place(&p, &w, r)] * ATTENTION_LOG2E;
    dot[h] = p.dot[attention_back_place(&p, &w, r)];
  }
  float acc1[OUT / 8][4] = {}, acc2[KEYS ? OUT / 8 : 1][4] = {};
  int stage = 0;
  for (int from = w.from; from < w.to; from += N) {
    const attention_back_stage<DIM> now = attention_back_stage_at(&stages, stage);
    const bool is_more = from + N < w.to;
    ks_cp_async_wait<0>();
    __syncthreads(); /* this tile is there; with two stages all are done with the one before */
    if (p.n_stages == 2) {
      stage ^= 1;
      const attention_back_stage<DIM> next = attention_back_stage_at(&stages, stage);
      if (is_more) attention_back_load<DIM, KEYS>(&p, &w, from + N, &next);
      ks_cp_async_commit();
    }
    float s[N / 8][4] = {}, dp[N / 8][4] = {};
    uint32_t x[N / 16][4];
    attention_scores<DIM, N / 8>(s, a1, row, now.b1);
    attention_scores<DIM, N / 8>(dp, a2, row, now.b2);
    attention_back_weights<N / 8, KEYS>(s, dp, p.scale * ATTENTION_LOG2E, limit, from, w.to, lse, dot,
                                        now.lse, now.dot);
    if constexpr (KEYS) {
      attention_operand<N / 8>(x, s);
      attention_accumulate<DIM, N / 16, OUT / 8>(acc2, x, now.b2, part * OUT / 8);
    }
    attention_operand<N / 8>(x, dp);
    attention_accumulate<DIM, N / 16, OUT / 8>(acc1, x, now.b1, part * OUT / 8);
    if (p.n_stages == 1) {
      __syncthreads();
      if (is_more) attention_back_load<DIM, KEYS>(&p, &w, from + N, &stages);
      ks_cp_async_commit();
    }
  }
  ks_cp_async_wait<0>(); /* of A, where nothing streamed */
  __syncthreads();
  if constexpr (KEYS) {
    attention_back_finish<DIM>(&p, &w, a1, attention_back_keys(&p, &w, (ks_bf16 *)w.seq.dk, w.begin), acc1,
                               p.scale, part);
    attention_back_finish<DIM>(&p, &w, a2, attention_back_keys(&p, &w, (ks_bf16 *)w.seq.dv, w.begin), acc2,
                               1.0f, part);
  } else {
    attention_back_finish<DIM>(&p, &w, a1, attention_back_queries(&p, &w, (ks_bf16 *)p.dq, w.begin), acc1,
                               p.scale, part);
  }
#endif
}

template <int DIM> static size_t attention_back_smem(int n_warps, int n_stages) {
  typedef attention_back_size<DIM> size;
  return 2 * ks_smem_bytes<ks_bf16>((size_t)n_warps * 16 * size::STRIDE) +
         2 * ks_smem_bytes<ks_bf16>((size_t)n_stages * size::STREAM * size::STRIDE) +
         2 * ks_smem_bytes<float>((size_t)n_stages * size::STREAM);
}

/* ---------------------------------------------------------------- simt */

/* Rows of the tile by head size: two tiles of 16 rows of 256 columns are 32 KiB. */
template <int NJ> struct attention_back_simt {
  static constexpr int SLOTS = NJ == 8 ? 4 : 8, TILE = SLOTS * ATTENTION_WARPS, STREAM = 2 * KS_WARP;
};

/* Weights of the row `slot` of this warp's tile rows: p and ds (without scale), to shared memory. */
template <bool KEYS>
KS_DEVICE void attention_back_simt_weights(const attention_back_params *p, const attention_back_work *w,
                                           int r, int from, const float s[2], const float dp[2],
                                           float *weights, float *ds) {
  const int lane = (int)threadIdx.x % KS_WARP;
  const int key_or_row = w->begin + r,
            limit = KEYS ? attention_back_first(p, w, key_or_row) : attention_back_seen(p, w, key_or_row);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int c = lane + j * KS_WARP;
    const bool visible = from + c < w->to && (KEYS ? from + c >= limit : from + c < limit);
    float x = 0, y = 0;
    if (visible) {
      const int64_t at = attention_back_place(p, w, KEYS ? from + c : key_or_row);
      x = expf(fmaf(s[j], p->scale, -p->lse[at])); /* float32 is for checking: no rounding that need not be */
      y = x * (dp[j] - p->dot[at]);
    }
    weights[c] = x;
    ds[c] = y;
  }
}

template <class T, int NJ, bool KEYS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_back_simt_kernel(attention_back_params p) {
  typedef attention_back_simt<NJ> size;
  constexpr int SLOTS = size::SLOTS, COLS = attention_simt<NJ>::COLS;
  const int warp = (int)threadIdx.x / KS_WARP;
  ks_smem smem;
  float *a1 = ks_smem_take<float>(&smem, (size_t)size::TILE * COLS);
  float *a2 = ks_smem_take<float>(&smem, (size_t)size::TILE * COLS);
  float *chunk = ks_smem_take<float>(&smem, attention_simt<NJ>::CHUNK);
  float *weights = ks_smem_take<float>(&smem, (size_t)size::TILE * size::STREAM);
  float *ds = ks_smem_take<float>(&smem, (size_t)size::TILE * size::STREAM);
  attention_back_work w;
  attention_back_work_at<KEYS>(&p, 1, size::TILE, &w);
  const bool aligned = p.width >= 4 * (int)sizeof(T);
  const int n_slots = (w.n + ATTENTION_WARPS - 1) / ATTENTION_WARPS;
  attention_fill<T>(a1, COLS, attention_back_rows<!KEYS>(&p, &w, (const T *)p.q, (const T *)w.seq.k, w.begin),
                    0, size::TILE, w.n, 0, COLS, p.d, aligned);
  attention_fill<T>(a2, COLS,
                    attention_back_rows<!KEYS>(&p, &w, (const T *)p.d_o, (const T *)w.seq.v, w.begin), 0,
                    size::TILE, w.n, 0, COLS, p.d, aligned);
  float acc1[SLOTS][NJ] = {}, acc2[SLOTS][NJ] = {};
  const int all[SLOTS] = {};
  for (int from = w.from; from < w.to; from += size::STREAM) {
    const int n = attention_min(w.to - from, size::STREAM);
    float s[SLOTS][2] = {}, dp[SLOTS][2] = {};
    const auto b1 = attention_back_rows<KEYS>(&p, &w, (const T *)p.q, (const T *)w.seq.k, from);
    const auto b2 = attention_back_rows<KEYS>(&p, &w, (const T *)p.d_o, (const T *)w.seq.v, from);
    attention_dots<T, NJ, SLOTS>(s, a1, chunk, b1, n, p.d, n_slots, aligned);
    attention_dots<T, NJ, SLOTS>(dp, a2, chunk, b2, n, p.d, n_slots, aligned);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      const int r = i * ATTENTION_WARPS + warp;
      if (i < n_slots)
        attention_back_simt_weights<KEYS>(&p, &w, attention_min(r, w.n - 1), from, s[i], dp[i],
                                          weights + r * size::STREAM, ds + r * size::STREAM);
    }
    __syncwarp();
    if constexpr (KEYS)
      attention_sums<T, NJ, SLOTS>(acc2, weights, chunk, b2, n, p.d, n_slots, false, all, aligned);
    attention_sums<T, NJ, SLOTS>(acc1, ds, chunk, b1, n, p.d, n_slots, false, all, aligned);
  }
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    const int r = i * ATTENTION_WARPS + warp;
    if (r >= w.n) continue;
    if constexpr (KEYS) {
      attention_write<T, NJ>(attention_back_keys(&p, &w, (T *)w.seq.dk, w.begin).at(r), acc1[i], p.scale,
                             p.d);
      attention_write<T, NJ>(attention_back_keys(&p, &w, (T *)w.seq.dv, w.begin).at(r), acc2[i], 1.0f, p.d);
    } else {
      attention_write<T, NJ>(attention_back_queries(&p, &w, (T *)p.dq, w.begin).at(r), acc1[i], p.scale, p.d);
    }
  }
}

template <int NJ> static size_t attention_back_simt_smem() {
  typedef attention_back_simt<NJ> size;
  return 2 * ks_smem_bytes<float>((size_t)size::TILE * attention_simt<NJ>::COLS) +
         ks_smem_bytes<float>(attention_simt<NJ>::CHUNK) +
         2 * ks_smem_bytes<float>((size_t)size::TILE * size::STREAM);
}

/* ---------------------------------------------------------------- host */

/* Warps of a block of threads and stages of what streams, by what shared memory the device has. */
struct attention_back_shape {
  int n_warps, n_stages;
};
template <int DIM> static attention_back_shape attention_back_shape_dim(size_t limit) {
  attention_back_shape s = {ATTENTION_WARPS, 2};
  if (attention_back_smem<DIM>(s.n_warps, 2) > limit) s.n_stages = 1;
  while (s.n_warps > 1 && attention_back_smem<DIM>(s.n_warps, s.n_stages) > limit)
    s.n_warps--;
  return s;
}
static attention_back_shape attention_back_shape_of(const ks_ctx *ctx, int64_t d) {
  const size_t limit = (size_t)ks_cuda_device_of(ctx)->smem_per_block;
#define X(DIM)                                                                                               \
  if (d <= DIM) return attention_back_shape_dim<DIM>(limit);
  KS_ATTENTION_SIZES(X)
#undef X
  return {0, 0}; /* refused before */
}

/* Tiles of keys (first [n_items[0]]) and of rows (then [n_items[1]]); seqs. One host allocation, staged. */
static ks_status attention_back_stage_tables(ks_ctx *ctx, const ks_attention_args *a, int tile, int64_t group,
                                             int64_t n_items[2], attention_back_params *p) {
  for (int64_t s = 0; s < a->n_seqs; s++) {
    n_items[0] += (a->seqs[s].n_k + tile - 1) / tile;
    n_items[1] += (a->seqs[s].n_q * group + tile - 1) / tile;
  }
  const size_t n = (size_t)(n_items[0] + n_items[1]), seq_bytes = (size_t)a->n_seqs * sizeof(attention_seq);
  char *memory = (char *)malloc(seq_bytes + n * sizeof(attention_item) + 1);
  if (!memory) return KS_FAIL(KS_ENOMEM, "attention: no memory for tables of %lld tiles", (long long)n);
  attention_seq *seqs = (attention_seq *)memory;
  attention_item *items = (attention_item *)(memory + seq_bytes), *next[2] = {items, items + n_items[0]};
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *x = &a->seqs[s];
    seqs[s] = {x->k, x->v, x->dk, x->dv, x->q_begin, -1, 0, (int32_t)x->n_q, (int32_t)x->n_k};
    for (int64_t j = 0; j < x->n_k; j += tile) /* its length: queries that see key j */
      *next[0]++ = {(int32_t)s, (int32_t)j, 0, (int32_t)(x->n_k - j < x->n_q ? x->n_k - j : x->n_q)};
    for (int64_t r = 0; r < x->n_q * group; r += tile)
      *next[1]++ = {(int32_t)s, (int32_t)r, 0, (int32_t)(x->n_k - x->n_q + r / group)};
  }
  for (int i = 0; i < 2; i++)
    qsort(items + (i ? n_items[0] : 0), (size_t)n_items[i], sizeof *items, attention_by_length);
  ks_status status = ks_cuda_stage(ctx, seqs, seq_bytes, (const void **)&p->seqs);
  if (status == KS_OK) status = ks_cuda_stage(ctx, items, n * sizeof *items, (const void **)&p->items);
  free(memory);
  return status;
}

template <bool KEYS>
static ks_status attention_back_launch_mma(ks_ctx *ctx, const attention_back_params *p, int64_t n_items,
                                           int n_warps) {
#define X(DIM)                                                                                               \
  if (p->d <= DIM)                                                                                           \
    return ks_launch(ctx, "attention_backward", attention_back_mma_kernel<DIM, KEYS>,                        \
                     dim3((unsigned)(n_items * p->n_kv_heads * attention_size<DIM>::PARTS)),                 \
                     dim3((unsigned)n_warps * KS_WARP), attention_back_smem<DIM>(n_warps, p->n_stages), *p);
  KS_ATTENTION_SIZES(X)
#undef X
  return KS_EUNSUPPORTED; /* refused before */
}

template <class T, int NJ, bool KEYS>
static ks_status attention_back_launch_simt(ks_ctx *ctx, const attention_back_params *p, int64_t n_items) {
  return ks_launch(ctx, "attention_backward", attention_back_simt_kernel<T, NJ, KEYS>,
                   dim3((unsigned)(n_items * p->n_kv_heads)), dim3(ATTENTION_THREADS),
                   attention_back_simt_smem<NJ>(), *p);
}
template <class T>
static ks_status attention_back_launch_simt_of(ks_ctx *ctx, const attention_back_params *p, int64_t n_items,
                                               bool keys) {
  typedef ks_status (*launch)(ks_ctx *, const attention_back_params *, int64_t);
  static const launch by_size[3][2] = {
      {attention_back_launch_simt<T, 2, false>, attention_back_launch_simt<T, 2, true>},
      {attention_back_launch_simt<T, 4, false>, attention_back_launch_simt<T, 4, true>},
      {attention_back_launch_simt<T, 8, false>, attention_back_launch_simt<T, 8, true>}};
  return by_size[p->d <= 64 ? 0 : p->d <= 128 ? 1 : 2][keys](ctx, p, n_items);
}

template <class T>
static ks_status attention_back_launch_dot(ks_ctx *ctx, const ks_attention_args *a, float *dot, int width) {
  const int64_t n = a->n_rows * a->n_heads;
  return ks_launch(ctx, "attention_back_dot", attention_back_dot_kernel<T>,
                   dim3(ks_blocks_for(n, ATTENTION_WARPS)), dim3(ATTENTION_THREADS), 0, (const T *)a->o,
                   (const T *)a->d_o, dot, n, (int)a->head_dim, (int)(width >= 4 * (int)sizeof(T)));
}

static int attention_back_width(const ks_ctx *ctx, const ks_attention_args *a) {
  attention_alignment x = attention_alignment_of(ctx, a);
  attention_align(&x, a->d_o), attention_align(&x, a->dq);
  for (int64_t s = 0; s < a->n_seqs; s++)
    attention_align(&x, a->seqs[s].dk), attention_align(&x, a->seqs[s].dv);
  return attention_width(&x);
}

extern "C" ks_status ks_cuda_attention_backward(ks_ctx *ctx, const ks_attention_args *a) {
  const bool use_mma = ks_cuda_variant_of(ctx, "attention_backward") == KS_CUDA_attention_backward_mma &&
                       ks_cuda_device_of(ctx)->major >= 8;
  const int64_t group = a->n_heads / a->n_kv_heads;
  const attention_back_shape shape = attention_back_shape_of(ctx, a->head_dim);
  const int simt_tile = a->head_dim > 128 ? attention_back_simt<8>::TILE : attention_back_simt<4>::TILE;
  int64_t n_items[2] = {0, 0};
  void *dot;
  attention_back_params p = {};
  KS_TRY(attention_check_sizes(a));
  KS_TRY(attention_back_stage_tables(ctx, a, use_mma ? 16 * shape.n_warps : simt_tile, group, n_items, &p));
  KS_TRY(ks_cuda_workspace(ctx, (size_t)(a->n_rows * a->n_heads) * sizeof(float), &dot));
  p.q = a->q, p.d_o = a->d_o, p.dq = a->dq, p.lse = a->lse, p.dot = (const float *)dot;
  p.magic = attention_magic(group);
  p.kv_stride = a->kv_stride;
  p.scale = a->scale;
  p.n_heads = (int32_t)a->n_heads, p.n_kv_heads = (int32_t)a->n_kv_heads, p.group = (int32_t)group;
  p.d = (int32_t)a->head_dim, p.n_stages = shape.n_stages;
  p.width = attention_back_width(ctx, a);
  if (n_items[1]) KS_TRY(KS_CUDA_BY_ACT(ctx, attention_back_launch_dot, (ctx, a, (float *)dot, p.width)));
  for (int keys = 1; keys >= 0; keys--) {
    const int64_t n = n_items[keys ? 0 : 1];
    if (!n) continue;
    if (!use_mma)
      KS_TRY(KS_CUDA_BY_ACT(ctx, attention_back_launch_simt_of, (ctx, &p, n, keys)));
    else
      KS_TRY((keys ? attention_back_launch_mma<true> : attention_back_launch_mma<false>)(ctx, &p, n,
                                                                                         shape.n_warps));
    p.items += n;
  }
  return KS_OK;
}
