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
#include "kernels/cuda/attention_back_mma.cuh"
#include <float.h>
#include <stdlib.h>

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

/* Seqs, tiles of keys (first [n_items[0]]) and of rows (then [n_items[1]]), in one copy. */
static ks_status attention_back_stage_tables(ks_ctx *ctx, const ks_attention_args *a, const int tile[2],
                                             int64_t group, int64_t n_items[2], attention_back_params *p) {
  for (int64_t s = 0; s < a->n_seqs; s++) {
    n_items[0] += (a->seqs[s].n_k + tile[0] - 1) / tile[0];
    n_items[1] += (a->seqs[s].n_q * group + tile[1] - 1) / tile[1];
  }
  const size_t n = (size_t)(n_items[0] + n_items[1]), seq_bytes = (size_t)a->n_seqs * sizeof(attention_seq);
  char *memory = (char *)malloc(seq_bytes + n * sizeof(attention_item) + 1);
  if (!memory) return KS_FAIL(KS_ENOMEM, "attention: no memory for tables of %lld tiles", (long long)n);
  attention_seq *seqs = (attention_seq *)memory;
  attention_item *items = (attention_item *)(memory + seq_bytes), *next[2] = {items, items + n_items[0]};
  attention_rounds rounds =
      attention_rounds_of(a, ks_cuda_device_of(ctx)->l2_bytes / 4); /* q and do, k and v */
  for (int64_t s = 0; s < a->n_seqs; s++) {
    const ks_attention_seq *x = &a->seqs[s];
    const int32_t round = attention_round_of(&rounds, x->n_k + x->n_q * group);
    seqs[s] = {x->k, x->v, x->dk, x->dv, x->q_begin, -1, 0, (int32_t)x->n_q, (int32_t)x->n_k};
    for (int64_t j = 0; j < x->n_k; j += tile[0]) /* its length: queries that see key j */
      *next[0]++ = {(int32_t)s, (int32_t)j, round, (int32_t)(x->n_k - j < x->n_q ? x->n_k - j : x->n_q)};
    for (int64_t r = 0; r < x->n_q * group; r += tile[1])
      *next[1]++ = {(int32_t)s, (int32_t)r, round, (int32_t)(x->n_k - x->n_q + r / group)};
  }
  for (int i = 0; i < 2; i++)
    qsort(items + (i ? n_items[0] : 0), (size_t)n_items[i], sizeof *items, attention_by_length);
  const char *staged;
  const ks_status status = ks_cuda_stage(ctx, memory, seq_bytes + n * sizeof *items, (const void **)&staged);
  free(memory);
  if (status != KS_OK) return status;
  p->seqs = (const attention_seq *)(const void *)staged;
  p->items = (const attention_item *)(const void *)(staged + seq_bytes);
  return KS_OK;
}

/* Two stages of what streams, or one where the device has no room for more. */
template <class SIZE> static int attention_back_stages(const ks_ctx *ctx, SIZE bytes_of) {
  return bytes_of(2) <= (size_t)ks_cuda_device_of(ctx)->smem_per_block ? 2 : 1;
}
template <int DIM, bool WIDE>
static ks_status attention_back_launch_dim(ks_ctx *ctx, attention_back_params p, int64_t n_items, bool keys) {
  p.n_stages = keys ? attention_back_stages(ctx, attention_back_keys_smem<DIM>)
                    : attention_back_stages(ctx, attention_back_rows_smem<DIM>);
  const int parts = attention_size<DIM>::PARTS;
  const dim3 grid((unsigned)(n_items * p.n_kv_heads * parts)), block(ATTENTION_THREADS);
  return keys ? ks_launch(ctx, "attention_backward", attention_back_keys_kernel<DIM, WIDE>, grid, block,
                          attention_back_keys_smem<DIM>(p.n_stages), p)
              : ks_launch(ctx, "attention_backward", attention_back_rows_kernel<DIM, WIDE>, grid, block,
                          attention_back_rows_smem<DIM>(p.n_stages), p);
}
template <bool WIDE>
static ks_status attention_back_launch_mma(ks_ctx *ctx, const attention_back_params *p, int64_t n_items,
                                           bool keys) {
#define X(DIM)                                                                                               \
  if (p->d <= DIM) return attention_back_launch_dim<DIM, WIDE>(ctx, *p, n_items, keys);
  KS_ATTENTION_SIZES(X)
#undef X
  return KS_EUNSUPPORTED; /* refused before */
}
static void attention_back_tiles(int64_t d, bool use_mma, int tile[2]) {
  tile[0] = tile[1] = d > 128 ? attention_back_simt<8>::TILE : attention_back_simt<4>::TILE;
  if (!use_mma) return;
#define X(DIM)                                                                                               \
  if (d <= DIM) {                                                                                            \
    tile[0] = attention_back_size<DIM, true>::TILE, tile[1] = attention_back_size<DIM, false>::TILE;         \
    return;                                                                                                  \
  }
  KS_ATTENTION_SIZES(X)
#undef X
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
  int64_t n_items[2] = {0, 0};
  int tile[2];
  void *dot;
  attention_back_params p = {};
  KS_TRY(attention_check_sizes(a));
  attention_back_tiles(a->head_dim, use_mma, tile);
  KS_TRY(attention_back_stage_tables(ctx, a, tile, group, n_items, &p));
  KS_TRY(ks_cuda_workspace(ctx, (size_t)(a->n_rows * a->n_heads) * (use_mma ? 2 : 1) * sizeof(float), &dot));
  p.q = a->q, p.o = a->o, p.d_o = a->d_o, p.dq = a->dq, p.lse = a->lse, p.dot = (float *)dot;
  p.magic = attention_magic(group);
  p.kv_stride = a->kv_stride;
  p.scale = a->scale;
  p.scale2 = a->scale != 0 ? a->scale * ATTENTION_LOG2E : FLT_MIN; /* hidden scores are infinite */
  p.n_heads = (int32_t)a->n_heads, p.n_kv_heads = (int32_t)a->n_kv_heads, p.group = (int32_t)group;
  p.d = (int32_t)a->head_dim;
  p.width = attention_back_width(ctx, a);
  if (n_items[1] && !use_mma)
    KS_TRY(KS_CUDA_BY_ACT(ctx, attention_back_launch_dot, (ctx, a, (float *)dot, p.width)));
  for (int keys = 0; keys < 2; keys++) { /* rows first: they leave D */
    const int64_t n = n_items[keys ? 0 : 1];
    attention_back_params f = p;
    if (!n) continue;
    if (!keys) f.items += n_items[0];
    KS_TRY(use_mma ? (attention_is_wide(f.d, f.width) ? attention_back_launch_mma<true>
                                                      : attention_back_launch_mma<false>)(ctx, &f, n, keys)
                   : KS_CUDA_BY_ACT(ctx, attention_back_launch_simt_of, (ctx, &f, n, keys)));
  }
  return KS_OK;
}
