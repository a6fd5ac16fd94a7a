/* Causal grouped-query attention over packed sequences of different length, forward.
 *
 *   o = softmax(q k^T * scale, causal) v per head,  lse = log sum exp(q k^T * scale)
 *
 * One pass over blocks b of 64 keys, counted from key 0, in rising order (Milakov & Gimelshein 2018; Dao 2023). With
 * s = q k^T * (scale * log2 e) and a base m that begins at -inf:
 *
 *   m' = max s of the block if that is above m + 8, else m;  p = 2^(s - m')
 *   l = l 2^(m - m') + sum p,  o = o 2^(m - m') + p v;  at the end o / l  and  lse = (m + log2 l) ln 2
 *
 * A base that is left behind by less than 8 does no harm (weights up to 2^8 round as those up to 1), and the
 * product with 2^(m - m') = 1 is left out for a whole warp: after the first block it is seldom needed.
 *
 * Every row follows this one chain, in every kernel: sum p is ((q0 + q1) + (q2 + q3)) of quarters of 16 keys in each of the four
 * threads that share a row, and those are added at the end. So prefill at once, in pieces and token by token
 * agree bit for bit, paged or not, and so does a sequence alone and in any batch. (On the GPU this asks of
 * mma that a row's result depend on nothing but its own row and that zeros add nothing.)
 *
 *   attention_forward_mma_kernel  a tile of 128 rows (64 beyond 128 columns), see attention.cuh: 4 warps of
 *                                 32. Keys beyond a warp's last row are skipped, only blocks on the diagonal
 *                                 are masked.
 *   attention_few_kernel          sequences of up to 16 rows of a key head, which is decoding: 4 warps share a block of keys.
 *   attention_decode_kernel       one query of each of few sequences, heads up to 128 columns: an SM and more for each key head.
 *   attention_forward_simt_kernel float32, Turing, and the plain check (attention_forward_simt.cuh).
 *
 * Bytes: q and o once; k and v once for each tile of rows, from L2 but for the first: tiles are launched in rounds whose keys fit
 * half of it, in a round the longest first.
 *
 * Flops: 4 d for each visible (query, key) and head, and one exponential. Done are more, by 32 rows and 64
 * keys: 1.25 times at 256 tokens, 1.12 at 512, 1.03 at 2048.
 *
 * A block of keys in a warp of mma, sm_90, from the disassembly (without the branches for masks and values that are not finite):
 *
 *     d    HMMA  LDSM  exp2  all  registers  shared memory, two stages  blocks an SM
 *     64    128    32    64  683        220      54 KiB                      2
 *    100    224    70    64  974        254      90 KiB (112 columns)        2
 *    128    256    80    64  950        255      96 KiB                      2
 *
 * mma.sync is expected at about 0.6 of the measured 796 TFLOP/s, 9 clocks an HMMA and quarter of an SM at
 * 1.98 GHz: 1140, 2000, 2280 clocks a block of keys and warp. Beside that 512 clocks of exponentials,
 * 680 to 980 of issue, and of shared memory (4 clocks a LDSM, four quarters share it) 510, 1120, 1280: the
 * tensor cores bound it. Two warps a quarter overlap one's softmax with the other's products. They are the
 * warps of one number of two blocks of threads, one of which has its rows in falling order: the last rows of a
 * tile see most, and all of them on one quarter would leave the others idle (at 256 tokens it would have 6
 * blocks of keys of each pair of tiles, where 5 are its share; at 512 20 of 18, at 2048 272 of 264).
 * Computed, not measured, at three quarters of that rate: 350 TFLOP/s of what is done (0.44 of 796); of what
 * counts, 16 k tokens, 32 heads:
 *     256 tokens  280 TFLOP/s     512 tokens  310     2048 tokens  340     (d = 100: times 100 / 112)
 * but no more than bytes allow: 8 x 256 tokens, 32 heads of 64, are 34 MB, 8 us, and 2.2 GFLOP, 8 us; predicted 12 us with launch
 * and the wave that is not full (512 tiles, 264 places), 0.23 of 796 where bytes allow 0.34.
 *
 * Decoding many sequences (attention_few_kernel): a block of threads for each (sequence, key head), 4 stages of 64 keys under way
 * (d = 128: 3; two blocks an SM), about 0.35 us a block of keys. 96 KiB and more are under way an SM, where
 * 4.25 TB/s at 600 ns ask for 20: bytes bound it.
 *
 * Decoding few (attention_decode_kernel, when (sequence, key head) are no more than the SMs): the chain of a
 * row is kept, but only what is a chain goes block after block: bases, and products with values. Scores and
 * weights of four blocks of keys are made at once, by warps of their own, a round ahead. Where there are SMs,
 * up to 4 blocks of threads make all scores of a key head, and columns of its output each. Instructions of a
 * round of 4 blocks, d = 64, group up to 8, from the disassembly (sm_90): a score warp 350 (16 HMMA), a value
 * warp with 16 columns 380 (32 HMMA), so 1070 in the busiest quarter of an SM, 270 clocks a block of keys if
 * one is issued every clock; bytes ask for 11 KB at some 50 a clock, 220; the chain of HMMA for 4 x 33.
 * Computed 0.16 us a block of keys, d = 100 (copies of 8 bytes) 0.3. Not measured yet:
 *
 *     d    registers  shared memory, stages (227 KiB)        64 keys   512   2048   4096, without launch, us
 *     64       121    200 KiB, 4; one slice 160 KiB, 2         0.5     1.9    5.7    11      few 0.4  2.8   11   22
 *     100      138    205 KiB, 2 (two slices)                  0.7     3.0     10    20      few 0.5  3.6   14   28
 *     128      144    180 KiB, 2 (four slices)                 0.6     2.4    7.5    15      few 0.5  3.6   14   28
 *
 * 1B (16 layers, 8 key heads of 64, 2048 keys): 85 us less of some 700 a token. 3B (32 heads of 100) reads 26
 * MB a layer: 6.2 us at least. Batch 8 of 8 heads: 64 SMs, one slice; batch 64: attention_few_kernel. Scores
 * in a launch of their own and values in a second would be 2.2 us (the HMMA alone) and 2.5 more for the
 * launch: less from about 2048 keys on, more below.
 *
 * A key or value that is not finite reaches those who see it and nobody else: a hidden score is replaced, and where a block holds
 * values that one row sees and another does not, those not finite go into the sums of the former by hand, and
 * zero into the product. (An infinite value of weight 0 counts as infinite there, not as NaN.)
 *
 * Ladder (H200, bf16)
 *
 *   simt   float32 fma, tiles of 32 rows, 4 warps, right operand through one chunk of shared memory, loads not overlapped. Not
 *          measured yet.
 *
 *   mma 1  16 rows a warp, one stage, every block of 64 keys summed on its own and merged (two sets of
 *          accumulators), decoding dealt out over blocks of keys with a second kernel that merges. Predicted:
 *          at most half of the tensor cores' rate, by reads of shared memory. Measured (f74fb33): 8 x 256
 *          tokens, 32 heads of 64: 42 us, 51 TFLOP/s; decoding one sequence of 2048 keys 24 us, eight 48 us;
 *          each with three copies of tables.
 *
 *   mma 2  as above: 32 rows a warp (half of the reads of shared memory a product), one chain, two stages, copies of one width a
 *          kernel, rows padded instead of swizzled up to 112 columns, one copy of tables. Predicted: above. Not measured
 *          yet. Since then the products' loops are unrolled whole, over addresses that are a register and a constant: of
 *          1167 instructions a block of keys at d = 128, in four turns, 950 are left. And every other block of threads has
 *          its rows in falling order over its warps (above).
 *
 *   decode 1  attention_decode_kernel as above. A first draft, two blocks of keys a round and every thread copying of each block,
 *             took as many instructions for two blocks as this for four. Not measured yet.
 *
 *   Both kernels for decoding begin early (launch.cuh): tables are read and places computed while rotary ends, and the output
 *   projection fills its rings on the SMs that are free.
 *
 *   Next, not built: scores and values of long sequences in two launches (above); wgmma with TMA and specialised warps as
 *   FlashAttention-3. */
#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/attention_few.cuh"
#include "kernels/cuda/attention_forward_simt.cuh"
#include "kernels/cuda/attention_plan.cuh"
#include <float.h>

/* Stages of keys in shared memory, at most `most`: as many as leave room for two blocks of threads an SM, but
 * `least`; where there is none for two, as many as fit. */
template <class SIZE> static int attention_stages_of(const ks_ctx *ctx, SIZE bytes_of, int least, int most) {
  const ks_cuda_device *device = ks_cuda_device_of(ctx);
  const size_t block = (size_t)device->smem_per_block, half = (size_t)device->smem_per_sm / 2 - 1024;
  int n = most;
  while (n > least && bytes_of(n) > half)
    n--;
  if (bytes_of(n) > half) n = most;
  while (n > 1 && bytes_of(n) > block)
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

/* How attention_decode_kernel does it; false: more blocks of threads than SMs, or no room. Keys are read once for each slice of
 * columns: no more than 4, and than half of the SMs. */
template <int DIM>
static bool attention_plan_decode(const ks_ctx *ctx, int64_t n_blocks, attention_forward_params *f) {
  const ks_cuda_device *device = ks_cuda_device_of(ctx);
  const int n_tiles = (f->d + 15) / 16;
  int n_slices = 1;
  while (n_slices < 4 && 2 * n_slices <= n_tiles && 4 * n_slices * n_blocks <= device->n_sm)
    n_slices *= 2;
  f->slice_tiles = (n_tiles + n_slices - 1) / n_slices;
  f->n_slices = (n_tiles + f->slice_tiles - 1) / f->slice_tiles;
  if (n_blocks > device->n_sm) return false;
  for (f->round_blocks = ATTENTION_DECODE_BLOCKS; f->round_blocks > 0; f->round_blocks /= 2)
    for (f->n_stages = ATTENTION_DECODE_STAGES; f->n_stages > 1; f->n_stages--)
      if (attention_decode_smem<DIM>(f->round_blocks, f->slice_tiles, f->n_stages) <=
          (size_t)device->smem_per_block)
        return true;
  return false;
}

template <int DIM, bool WIDE>
static ks_status attention_launch_few(ks_ctx *ctx, attention_forward_params f, int64_t n_items,
                                      bool is_decode) {
  const int64_t n_blocks = n_items * f.n_kv_heads;
  if constexpr (DIM <= ATTENTION_DECODE_MAX_DIM)
    if (is_decode && attention_plan_decode<DIM>(ctx, n_blocks, &f))
      return ks_launch_early(ctx, "attention_forward", attention_decode_kernel<DIM, WIDE>,
                             dim3(ks_blocks_for(n_blocks * f.n_slices, 1)), dim3(ATTENTION_DECODE_THREADS),
                             attention_decode_smem<DIM>(f.round_blocks, f.slice_tiles, f.n_stages), f);
  f.n_stages = attention_stages_of(ctx, attention_few_smem<DIM>, 2, ATTENTION_FEW_STAGES);
  return ks_launch_early(ctx, "attention_forward", attention_few_kernel<DIM, WIDE>,
                         dim3(ks_blocks_for(n_blocks, 1)), dim3(ATTENTION_THREADS),
                         attention_few_smem<DIM>(f.n_stages), f);
}
template <int DIM, bool WIDE>
static ks_status attention_launch_tiles(ks_ctx *ctx, attention_forward_params f, int64_t n_items) {
  f.n_stages = attention_stages_of(ctx, attention_forward_smem<DIM>, 1, 2);
  return ks_launch(ctx, "attention_forward", attention_forward_mma_kernel<DIM, WIDE>,
                   dim3(ks_blocks_for(n_items * f.n_kv_heads * attention_size<DIM>::PARTS, 1)),
                   dim3(ATTENTION_THREADS), attention_forward_smem<DIM>(f.n_stages), f);
}
/* few_queries: most of a sequence with few rows; 0: tiles of many. */
template <bool WIDE>
static ks_status attention_launch_mma(ks_ctx *ctx, const attention_forward_params *f, int64_t n_items,
                                      int64_t few_queries) {
#define X(DIM)                                                                                               \
  if (f->d <= DIM)                                                                                           \
    return few_queries ? attention_launch_few<DIM, WIDE>(ctx, *f, n_items, few_queries == 1)                 \
                       : attention_launch_tiles<DIM, WIDE>(ctx, *f, n_items);
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
                   dim3(ks_blocks_for(n_items * f->n_kv_heads, 1)), dim3(ATTENTION_THREADS),
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
  f.width = attention_width(&alignment), f.n_sm = ks_cuda_device_of(ctx)->n_sm;
  KS_TRY(attention_stage(ctx, a, &plan, &tables));
  f.seqs = tables.seqs, f.items = tables.items, f.pages = tables.pages;
  KS_TRY(attention_partials(ctx, &plan, &f));
  for (int second = 0; second < 2; second++) {
    if (!plan.cap_items[second]) continue;
    if (use_mma)
      KS_TRY((attention_is_wide(f.d, f.width) ? attention_launch_mma<true>
                                              : attention_launch_mma<false>)(ctx, &f, plan.cap_items[second],
                                                                             second ? plan.few_queries : 0));
    else
      KS_TRY(KS_CUDA_BY_ACT(ctx, attention_launch_simt_of, (ctx, &f, plan.cap_items[second], second)));
    f.items += plan.cap_items[second];
  }
  return plan.n_split_rows
             ? KS_CUDA_BY_ACT(ctx, attention_launch_combine, (ctx, &f, tables.rows, plan.n_split_rows))
             : KS_OK;
}
