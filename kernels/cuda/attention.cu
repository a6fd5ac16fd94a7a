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
#include "kernels/cuda/attention_few.cuh"
#include "kernels/cuda/attention_forward_simt.cuh"
#include "kernels/cuda/attention_plan.cuh"
#include <float.h>

/* Stages of keys in shared memory: two of a kind an SM where they fit, else what a block of threads may have. */
template <class SIZE> static int attention_stages_of(const ks_ctx *ctx, SIZE bytes_of, int most) {
  const ks_cuda_device *device = ks_cuda_device_of(ctx);
  const size_t block = (size_t)device->smem_per_block, half = (size_t)device->smem_per_sm / 2 - 1024;
  int n = most;
  while (n > 1 && (bytes_of(n) > block || (n > 2 && bytes_of(n) > half)))
    n--;
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

template <int DIM, bool WIDE, bool FEW>
static ks_status attention_launch_mma_dim(ks_ctx *ctx, attention_forward_params f, int64_t n_items) {
  if constexpr (FEW) {
    f.n_stages = attention_stages_of(ctx, attention_few_smem<DIM>, ATTENTION_FEW_STAGES);
    return ks_launch(ctx, "attention_forward", attention_few_kernel<DIM, WIDE>,
                     dim3((unsigned)(n_items * f.n_kv_heads)), dim3(ATTENTION_THREADS),
                     attention_few_smem<DIM>(f.n_stages), f);
  } else {
    f.n_stages = attention_stages_of(ctx, attention_forward_smem<DIM>, 2);
    return ks_launch(ctx, "attention_forward", attention_forward_mma_kernel<DIM, WIDE>,
                     dim3((unsigned)(n_items * f.n_kv_heads * attention_size<DIM>::PARTS)),
                     dim3(ATTENTION_THREADS), attention_forward_smem<DIM>(f.n_stages), f);
  }
}
template <bool WIDE>
static ks_status attention_launch_mma(ks_ctx *ctx, const attention_forward_params *f, int64_t n_items,
                                      bool few) {
#define X(DIM)                                                                                               \
  if (f->d <= DIM)                                                                                           \
    return (few ? attention_launch_mma_dim<DIM, WIDE, true>                                                  \
                : attention_launch_mma_dim<DIM, WIDE, false>)(ctx, *f, n_items);
  KS_ATTENTION_SIZES(X)
#undef X
  return KS_EUNSUPPORTED; /* refused before */
}
static int attention_tile_rows(int64_t d) {
#define X(DIM)                                                                                               \
  if (d <= DIM) return attention_forward_size<DIM>::ROWS;
  KS_ATTENTION_SIZES(X)
#undef X
  return 0; /* refused before */
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
  KS_TRY(attention_check_sizes(a));
  plan.group = a->n_heads / a->n_kv_heads;
  plan.few_rows = use_mma ? ATTENTION_FEW : 0;
  plan.tile_rows[0] = use_mma ? attention_tile_rows(a->head_dim) : ATTENTION_SIMT_ROWS;
  plan.tile_rows[1] = use_mma ? ATTENTION_FEW : ATTENTION_SIMT_ROWS;
  attention_measure(a, ks_cuda_device_of(ctx)->n_sm, &plan);
  if (plan.n_items[0] + plan.n_items[1] == 0) return KS_OK;
  f.q = a->q, f.o = a->o, f.lse = a->lse;
  f.magic = attention_magic(plan.group);
  f.kv_stride = a->kv_stride;
  f.is_negative = use_mma && a->scale < 0;
  f.scale = (f.is_negative ? -a->scale : a->scale) * ATTENTION_LOG2E;
  if (use_mma && f.scale == 0) f.scale = FLT_MIN; /* hidden scores are -inf times it */
  f.n_heads = (int32_t)a->n_heads, f.n_kv_heads = (int32_t)a->n_kv_heads, f.group = (int32_t)plan.group;
  f.d = (int32_t)a->head_dim, f.page_rows = (int32_t)a->page_rows;
  f.width = attention_width(&alignment);
  KS_TRY(attention_stage(ctx, a, &plan, &tables));
  f.seqs = tables.seqs, f.items = tables.items, f.pages = tables.pages;
  KS_TRY(attention_partials(ctx, &plan, &f));
  for (int second = 0; second < 2; second++) {
    if (!plan.cap_items[second]) continue;
    if (use_mma)
      KS_TRY((attention_is_wide(f.d, f.width)
                  ? attention_launch_mma<true>
                  : attention_launch_mma<false>)(ctx, &f, plan.cap_items[second], second));
    else
      KS_TRY(KS_CUDA_BY_ACT(ctx, attention_launch_simt_of, (ctx, &f, plan.cap_items[second], second)));
    f.items += plan.cap_items[second];
  }
  return plan.n_split_rows
             ? KS_CUDA_BY_ACT(ctx, attention_launch_combine, (ctx, &f, tables.rows, plan.n_split_rows))
             : KS_OK;
}
