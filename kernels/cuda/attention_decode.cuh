/* Forward for one query a sequence, over many SMs: the same sums in the same order as attention_forward_mma_kernel, by blocks of
 * threads that are few enough to have an SM each.
 *
 * `n_slices` blocks of threads share a (sequence, key head): each makes all scores and the output of `slice_tiles` tiles of 16
 * columns. In a round of `round_blocks` (1 or 2) blocks of keys, 8 warps make scores, 16 keys each, and then weights of them, while 4
 * warps multiply the weights of the round before with its values:
 *
 *   barrier   score warps: scores, maxima of 16 keys      value warps: first block of values
 *   barrier   score warps: bases, weights, their sums     value warps: second block
 *
 * Score warps bring keys, value warps values, `n_stages` rounds of either in shared memory. */
#ifndef KS_CUDA_ATTENTION_DECODE_CUH
#define KS_CUDA_ATTENTION_DECODE_CUH

#include "kernels/cuda/attention_forward_mma.cuh"

enum {
  ATTENTION_DECODE_ROWS = 16,
  ATTENTION_DECODE_BLOCKS = 2, /* of keys in a round, at most */
  ATTENTION_DECODE_QUARTERS = ATTENTION_KEYS / 16,
  ATTENTION_DECODE_SCORE = ATTENTION_DECODE_BLOCKS * ATTENTION_DECODE_QUARTERS * KS_WARP, /* threads */
  ATTENTION_DECODE_VALUE = 4 * KS_WARP,
  ATTENTION_DECODE_THREADS = ATTENTION_DECODE_SCORE + ATTENTION_DECODE_VALUE,
  ATTENTION_DECODE_STAGES = 6,    /* at most */
  ATTENTION_DECODE_MAX_DIM = 128, /* left operands are kept in registers */
  ATTENTION_DECODE_V_TILE = ATTENTION_KEYS * 16
};

/* A tile of 16 columns of values: rows of 32 bytes, of which four cross the banks. */
template <> struct attention_tile<16> {
  static constexpr bool SWIZZLED = true;
  static constexpr int STRIDE = 16, CHUNKS = 2, AT_ONCE = 1;
  KS_DEVICE static int at(int row, int chunk) { return row * 16 + ((chunk ^ (row >> 2 & 1)) << 3); }
};

/* What score warps tell each other of a round, and the value warps of this and the next. */
struct attention_decode_told {
  uint4 *weights;  /* [2 rounds][2 blocks][4 quarters][32 lanes]: left operands */
  float *quarters; /* [2 rounds][2 blocks][4 quarters][16 rows][4 threads]: sums of weights */
  float *keep;     /* [2 rounds][2 blocks][16 rows] */
  float *max;      /* [2 blocks][4 quarters][16 rows] */
  float *base;     /* [16 rows] */
};

/* Of a round, for all: this thread's copies are there, and everybody is done with the round before. */
KS_DEVICE void attention_decode_arrive(int n_stages) {
  if (n_stages == 2)
    ks_cp_async_wait<0>();
  else if (n_stages == 3)
    ks_cp_async_wait<1>();
  else if (n_stages == 4)
    ks_cp_async_wait<2>();
  else if (n_stages == 5)
    ks_cp_async_wait<3>();
  else
    ks_cp_async_wait<4>();
  __syncthreads();
}

template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_bring_keys(const attention_forward_params *p, const attention_work *w,
                                           ks_bf16 *k, int b) {
#pragma unroll 1
  for (int i = 0; i < p->round_blocks && b + i < w->end_block; i++)
    attention_load<DIM, ATTENTION_KEYS, WIDE, ATTENTION_DECODE_SCORE>(
        k + i * ATTENTION_KEYS * attention_tile<DIM>::STRIDE,
        attention_keys<const ks_bf16>(p, w, w->seq.k, b + i), attention_block_keys(w, b + i), p->d);
}

/* Columns from `col` on of 64 values, by the value warps. */
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_load_values(ks_bf16 *v, const attention_key_rows<const ks_bf16> &rows,
                                            int n_valid, int n_tiles, int n_cols) {
  const int thread = (int)threadIdx.x - ATTENTION_DECODE_SCORE;
  if constexpr (WIDE) {
    typedef attention_copy<DIM, WIDE> by;
    const int pieces = n_tiles * (16 / by::PER);
    int shift = 0;
    while (1 << shift < pieces)
      shift++;
    const int c = (thread & ((1 << shift) - 1)) * by::PER, step = ATTENTION_DECODE_VALUE >> shift;
    if (c >= n_tiles * 16) return;
    v += c / 16 * ATTENTION_DECODE_V_TILE + c % 8;
#pragma unroll 4
    for (int r = thread >> shift; r < ATTENTION_KEYS; r += step)
      by::copy(v + attention_tile<16>::at(r, c % 16 / 8), rows.at(r) + c, c < n_cols && r < n_valid);
  } else {
#pragma unroll 1
    for (int i = thread; i < n_tiles * ATTENTION_DECODE_V_TILE; i += ATTENTION_DECODE_VALUE) {
      const int r = i / 16 % ATTENTION_KEYS, c = i / ATTENTION_DECODE_V_TILE * 16 + i % 16;
      ks_bf16 x = {0};
      if (r < n_valid && c < n_cols) x = rows.at(r)[c];
      v[i / ATTENTION_DECODE_V_TILE * ATTENTION_DECODE_V_TILE + attention_tile<16>::at(r, c % 16 / 8) +
        c % 8] = x;
    }
  }
}
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_bring_values(const attention_forward_params *p, const attention_work *w,
                                             int col, ks_bf16 *v, int b) {
#pragma unroll 1
  for (int i = 0; i < p->round_blocks && b + i < w->end_block; i++) {
    attention_key_rows<const ks_bf16> rows = attention_keys<const ks_bf16>(p, w, w->seq.v, b + i);
    rows.first += col;
    attention_decode_load_values<DIM, WIDE>(v + i * p->slice_tiles * ATTENTION_DECODE_V_TILE, rows,
                                            attention_block_keys(w, b + i), p->slice_tiles, p->d - col);
  }
}

/* A score warp's 16 keys to weights, for the value warps. Every score thread follows the bases of its rows; `n` blocks are in the
 * round. */
KS_DEVICE void attention_decode_weigh(const attention_decode_told *told, int round, int n, bool is_tall,
                                      float (*s)[4], float scale, float base[2]) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            block = warp / ATTENTION_DECODE_QUARTERS, quarter = warp % ATTENTION_DECODE_QUARTERS,
            at = (round & 1) * ATTENTION_DECODE_BLOCKS + block;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (h == 1 && !is_tall) {
      s[0][2] = s[0][3] = s[1][2] = s[1][3] = 0;
      break;
    }
    const float *max = told->max + g + 8 * h;
    float from = 0, keep_here = 0;
#pragma unroll
    for (int i = 0; i < ATTENTION_DECODE_BLOCKS; i++) {
      if (i >= n) break;
      const float *x = max + i * ATTENTION_DECODE_QUARTERS * 16;
      const float keep = attention_raise(&base[h], fmaxf(fmaxf(x[0], x[16]), fmaxf(x[32], x[48])) * scale);
      if (i == block) from = -attention_base(base[h]), keep_here = keep;
    }
    if (block >= n) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float *x = &s[i / 2][2 * h + i % 2];
      *x = ks_exp2(fmaf(*x, scale, from));
    }
    told->quarters[((at * ATTENTION_DECODE_QUARTERS + quarter) * 16 + g + 8 * h) * 4 + t] =
        attention_quarter(&s[0][2 * h], &s[1][2 * h]);
    if (t == 0 && quarter == 0) told->keep[at * 16 + g + 8 * h] = keep_here;
    if (t == 0 && warp == 0) told->base[g + 8 * h] = base[h];
  }
  if (block >= n) return;
  uint32_t x[1][4];
  attention_operand<2>(x, s);
  told->weights[(at * ATTENTION_DECODE_QUARTERS + quarter) * KS_WARP + lane] =
      make_uint4(x[0][0], x[0][1], x[0][2], x[0][3]);
}

/* A value warp's tiles of columns: the weights of block `block` of a round with its values v. */
template <int MINE>
KS_DEVICE void attention_decode_add(const attention_decode_told *told, int round, int block, bool is_tall,
                                    const ks_bf16 *v, int n_tiles, float o[MINE][2][4], float sum[2]) {
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            warp = ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP,
            at = (round & 1) * ATTENTION_DECODE_BLOCKS + block;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (h == 1 && !is_tall) break;
    const float keep = told->keep[at * 16 + g + 8 * h],
                *x = told->quarters + (at * ATTENTION_DECODE_QUARTERS * 16 + g + 8 * h) * 4 + t;
    sum[h] = attention_add_quarters(sum[h], keep, x[0], x[64], x[128], x[192]);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      o[i][0][2 * h] *= keep, o[i][0][2 * h + 1] *= keep;
      o[i][1][2 * h] *= keep, o[i][1][2 * h + 1] *= keep;
    }
  }
#pragma unroll
  for (int k = 0; k < ATTENTION_DECODE_QUARTERS; k++) {
    const uint4 packed = told->weights[(at * ATTENTION_DECODE_QUARTERS + k) * KS_WARP + lane];
    const uint32_t x[1][1][4] = {{{packed.x, packed.y, packed.z, packed.w}}};
#pragma unroll
    for (int i = 0; i < MINE; i++)
      if (warp + 4 * i < n_tiles)
        attention_accumulate<16, 1, 1, 2>(&o[i], x,
                                          v + (warp + 4 * i) * ATTENTION_DECODE_V_TILE + k * 16 * 16, 0);
  }
}

/* A value warp's tiles to device memory, through the room of the queries. */
template <int DIM, bool WIDE, int MINE>
KS_DEVICE void attention_decode_finish(const attention_forward_params *p, const attention_work *w, int slice,
                                       ks_bf16 *room, const float *base, const float o[MINE][2][4],
                                       const float sum[2]) {
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            warp = ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP;
  const float all[2] = {attention_quad_sum(sum[0]), attention_quad_sum(sum[1])};
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int tile = slice * p->slice_tiles + warp + 4 * i;
    if (warp + 4 * i >= p->slice_tiles || tile * 16 >= p->d) continue;
    attention_query_rows<ks_bf16> to = attention_queries(p, w, (ks_bf16 *)p->o);
    to.first += tile * 16;
    attention_put_at<DIM, 2>(room, 0, 2 * tile, o[i], 1 / all[0], 1 / all[1]);
    __syncwarp();
    attention_store_at<DIM, WIDE>(room, to, 0, w->n_rows, 2 * tile, attention_min(p->d - tile * 16, 16));
  }
  if (!p->lse || slice != 0 || warp != 0 || t != 0) return;
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (g + 8 * h < w->n_rows)
      p->lse[w->seq.q_begin * p->n_heads + attention_place(p, w, g + 8 * h)] =
          attention_lse(base[g + 8 * h], all[h]);
}

template <int DIM, bool WIDE>
__global__ void __launch_bounds__(ATTENTION_DECODE_THREADS, 1)
    attention_decode_kernel(attention_forward_params p) {
#if KS_ATTENTION_HAS_MMA
  constexpr int MINE = (DIM / 16 + 3) / 4, K_BLOCK = ATTENTION_KEYS * attention_tile<DIM>::STRIDE;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            block = warp / ATTENTION_DECODE_QUARTERS, quarter = warp % ATTENTION_DECODE_QUARTERS,
            k_stage = p.round_blocks * K_BLOCK, v_block = p.slice_tiles * ATTENTION_DECODE_V_TILE,
            v_stage = p.round_blocks * v_block, slice = (int)blockIdx.x % p.n_slices;
  const bool is_score = (int)threadIdx.x < ATTENTION_DECODE_SCORE;
  ks_smem smem;
  ks_bf16 *q = ks_smem_take<ks_bf16>(&smem, (size_t)ATTENTION_DECODE_ROWS * attention_tile<DIM>::STRIDE);
  ks_bf16 *keys = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * k_stage);
  ks_bf16 *values = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * v_stage);
  attention_decode_told told;
  told.weights = ks_smem_take<uint4>(&smem, 16 * KS_WARP);
  told.quarters = ks_smem_take<float>(&smem, 16 * 64);
  told.keep = ks_smem_take<float>(&smem, 4 * 16);
  told.max = ks_smem_take<float>(&smem, 8 * 16);
  told.base = ks_smem_take<float>(&smem, 16);
  attention_work w;
  ks_grid_start_next();
  const bool has_work = attention_work_at(&p, p.n_slices, ATTENTION_DECODE_ROWS, &w);
  ks_grid_wait(); /* above this line: staged tables only */
  if (!has_work) return;
  const bool is_tall = w.n_rows > 8;
  const int col = slice * p.slice_tiles * 16, n_rounds = (w.end_block + p.round_blocks - 1) / p.round_blocks,
            ahead = p.n_stages - 1;
  if (threadIdx.x < ATTENTION_THREADS)
    attention_load<DIM, ATTENTION_DECODE_ROWS, WIDE>(q, attention_queries(&p, &w, (const ks_bf16 *)p.q),
                                                     w.n_rows, p.d);
#pragma unroll 1
  for (int i = 0; i < ahead; i++) {
    if (is_score)
      attention_decode_bring_keys<DIM, WIDE>(&p, &w, keys + i * k_stage, i * p.round_blocks);
    else if (i > 0)
      attention_decode_bring_values<DIM, WIDE>(&p, &w, col, values + (i - 1) * v_stage,
                                               (i - 1) * p.round_blocks);
    ks_cp_async_commit();
  }
  attention_decode_arrive(p.n_stages);
  uint32_t left[1][DIM / 16][4];
  if (is_score)
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
      attention_left<DIM>(left[0][k], q, 0, k);
#pragma unroll
      for (int i = 0; i < 4; i++)
        left[0][k][i] ^= p.is_negative ? 0x80008000u : 0;
    }
  float o[MINE][2][4] = {}, s[1][2][4], base[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  int now = 0, before = ahead, earlier = ahead - 1; /* stages of rounds r, r - 1, r - 2 */
#pragma unroll 1
  for (int r = 0; r <= n_rounds; r++) { /* values are a round behind */
    const int b = r * p.round_blocks, n = attention_min(w.end_block - b, p.round_blocks);
    attention_decode_arrive(p.n_stages);
    if (is_score) {
      attention_decode_bring_keys<DIM, WIDE>(&p, &w, keys + before * k_stage, b + ahead * p.round_blocks);
      if (block < n) {
        const int key = (b + block) * ATTENTION_KEYS + quarter * 16, seen = w.n_keys - key;
        const int here[2] = {seen, seen};
#pragma unroll
        for (int i = 0; i < 8; i++)
          s[0][i / 4][i % 4] = 0;
        attention_scores<DIM, 1, 2, true>(s, left, nullptr, 0,
                                          keys + now * k_stage + block * K_BLOCK +
                                              quarter * 16 * attention_tile<DIM>::STRIDE);
        if (seen < 16) attention_mask<2>(s[0], 0, here);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float max = attention_most<2>(s[0], h);
          if (t == 0) told.max[warp * 16 + g + 8 * h] = max;
        }
      }
    } else {
      attention_decode_bring_values<DIM, WIDE>(&p, &w, col, values + earlier * v_stage,
                                               b + (ahead - 1) * p.round_blocks);
      if (r > 0)
        attention_decode_add<MINE>(&told, r - 1, 0, is_tall, values + before * v_stage, p.slice_tiles, o,
                                   sum);
    }
    ks_cp_async_commit();
    __syncthreads();
    if (is_score) {
      if (n > 0) attention_decode_weigh(&told, r, n, is_tall, s[0], p.scale, base);
    } else if (r > 0 && b - p.round_blocks + 1 < w.end_block && p.round_blocks > 1) {
      attention_decode_add<MINE>(&told, r - 1, 1, is_tall, values + before * v_stage + v_block, p.slice_tiles,
                                 o, sum);
    }
    earlier = before, before = now;
    now = now == ahead ? 0 : now + 1;
  }
  if (!is_score) attention_decode_finish<DIM, WIDE, MINE>(&p, &w, slice, q, told.base, o, sum);
#endif
}

template <int DIM> static size_t attention_decode_smem(int round_blocks, int slice_tiles, int n_stages) {
  const size_t blocks = (size_t)(n_stages * round_blocks);
  return ks_smem_bytes<ks_bf16>((size_t)ATTENTION_DECODE_ROWS * attention_tile<DIM>::STRIDE) +
         ks_smem_bytes<ks_bf16>(blocks * ATTENTION_KEYS * attention_tile<DIM>::STRIDE) +
         ks_smem_bytes<ks_bf16>(blocks * (size_t)(slice_tiles * ATTENTION_DECODE_V_TILE)) +
         ks_smem_bytes<uint4>(16 * KS_WARP) + ks_smem_bytes<float>(16 * 64) + ks_smem_bytes<float>(4 * 16) +
         ks_smem_bytes<float>(8 * 16) + ks_smem_bytes<float>(16);
}

#endif
