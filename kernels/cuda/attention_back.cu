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
 * p is computed again from lse. No atomics: every output has one owner. Two kernels (three with simt):
 *
 *   attention_back_rows_kernel   dq: a block of threads has a tile of 128 rows (query, head of the group, see
 *                                attention.cuh) and walks over the keys that they see, 32 at a time. It makes
 *                                D of its rows first and leaves it, and lse in base 2, to
 *   attention_back_keys_kernel   dk, dv: a tile of keys, over the rows that see its first key, in rising
 *                                order. Keys that no query sees get zeros.
 *
 * The tile is the left operand of S = A1 B1^T and dP = A2 B2^T, so that P and dS leave these products in the registers in which
 * acc1 += dS B1 (dq or dk) and acc2 += P B2 (dv) want them. A warp has 32 of its rows: what it reads of B
 * serves two products. dk and dv of 32 keys by more than 64 columns do not fit its registers: there two warps
 * have the same 32 keys, each makes the weights of half of the 64 rows that stream and half of the columns;
 * they exchange weights through shared memory.
 *
 * Bytes: what streams once for each tile of the other side, from L2 but for the first; A and outputs once; o once.
 *
 * Flops: 14 d for each visible (query, key) and head, and two exponentials. (10 d count: one kernel for all three would do these,
 * but dq then needs atomics, a chain of blocks that wait for each other, or n_k / 128 partial float32 copies.)
 *
 * A step of a warp, sm_90, from the disassembly (without masks):
 *
 *            d    rows x keys   HMMA  LDSM  LDS, STS  exp2   all  registers  shared memory   blocks an SM
 *     rows   64     32 x 32       96    32               32   385        226     55 KiB            2
 *           100     32 x 32      168    70               32   574        250     91 KiB            2
 *           128     32 x 32      192    80               32   575        252     97 KiB            2
 *     keys   64     32 x 32      128    48               32   466        250     55 KiB            2
 *           100     64 x 32      224    84        16     32  1040        246    106 KiB            2
 *           128     64 x 32      256    96        16     32   893        253    113 KiB            2
 *
 * At 9 clocks an HMMA and quarter of an SM (attention.cu) rows take 850, 1500, 1700 clocks and keys 1140,
 * 2000, 2280; shared memory, 16 clocks an LDSM, 510, 1120, 1280 and 770, 1600, 1790: the tensor cores bound
 * it, at d = 100 and 128 with little to spare. Every other block of threads has its rows, or keys, in falling
 * order over its warps (attention.cu): at 256 tokens and d = 64 a quarter of an SM then has 9 steps of each pair
 * of tiles, not 12 where the last rows, or first keys, are. D of 128 rows takes two rounds of loads.
 * Computed, not measured, at three quarters of 480 TFLOP/s done,
 * so 10 / 14 of that by what counts: 16 k tokens, 32 heads:
 *     256 tokens  200 TFLOP/s     512 tokens  225     2048 tokens  250     (d = 100: times 100 / 112)
 * 8 x 256 tokens, 32 heads of 64: 9.5 GFLOP done 26 us, 100 MB 24 us (of them half from L2); predicted 32 us.
 *
 * Serial chain: S, dP: L = d; dk, dv: L = group * n_q; dq: L = n_k; D: L = d / 8 and a tree.
 *
 * Turing has no mma for bf16 and takes simt. 8.6, 8.9 and 12.0 (99 KiB) have one stage for dk, dv beyond 96 columns.
 *
 * Determinism: fixed order by construction; a sequence's gradients depend on nothing but itself. Hidden pairs
 * inside a tile take part with p = ds = 0, so a query or key that is not finite makes the rows of its tile
 * NaN, as on the CPU.
 *
 * Ladder (H200, bf16)
 *
 *   simt   float32 fma, tiles of 32 rows (16 beyond d = 128), right operands through one chunk of shared
 *          memory. Not measured yet.
 *
 *   mma 1  16 rows a warp, dq and dk, dv in one kernel's two shapes, D by a kernel of its own. Predicted:
 *          bound by reads of shared memory. Measured (f74fb33): 8 x 256 tokens, 32 heads of 64: 97 us, 56
 *          TFLOP/s.
 *
 *   mma 2  as above. Predicted: above. Not measured yet. Since then a fifth fewer instructions a step, from 420, 580, 802
 *          and 600, 1367, 1300: products unrolled whole over addresses that are a register and a constant, places of
 *          rows by one multiplication of 32 bits, copies whose turns the compiler knows. D in two rounds of loads
 *          instead of eight, tiles in both orders over the warps.
 *
 *   Next, not built: 10 d with dq added in the order of falling keys by blocks that wait for each other;
 *   wgmma with two consumer warp groups as FlashAttention-3. */
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

template <int DIM, bool WIDE>
static ks_status attention_back_launch_dim(ks_ctx *ctx, const attention_back_params *p, int64_t n_items,
                                           bool keys) {
  const dim3 grid(ks_blocks_for(n_items * p->n_kv_heads * attention_size<DIM>::PARTS, 1)),
      block(ATTENTION_THREADS);
  const size_t two = attention_back_keys_smem<DIM>(2), one = attention_back_keys_smem<DIM>(1);
  if (!keys)
    return ks_launch(ctx, "attention_backward", attention_back_rows_kernel<DIM, WIDE>, grid, block,
                     attention_back_rows_smem<DIM>(), *p);
  if constexpr (attention_back_size<DIM, true>::PAIRED) /* 8.6, 8.9 and 12.0 have no room for two stages */
    if (two > (size_t)ks_cuda_device_of(ctx)->smem_per_block)
      return ks_launch(ctx, "attention_backward", attention_back_keys_kernel<DIM, WIDE, 1>, grid, block, one,
                       *p);
  return ks_launch(ctx, "attention_backward", attention_back_keys_kernel<DIM, WIDE, 2>, grid, block, two, *p);
}
template <bool WIDE>
static ks_status attention_back_launch_mma(ks_ctx *ctx, const attention_back_params *p, int64_t n_items,
                                           bool keys) {
#define X(DIM)                                                                                               \
  if (p->d <= DIM) return attention_back_launch_dim<DIM, WIDE>(ctx, p, n_items, keys);
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
                   dim3(ks_blocks_for(n_items * p->n_kv_heads, 1)), dim3(ATTENTION_THREADS),
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
  p.width = attention_back_width(ctx, a), p.n_sm = ks_cuda_device_of(ctx)->n_sm;
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
