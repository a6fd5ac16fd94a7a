/* Forward for one query a sequence, over many SMs: the same sums in the same order as attention_forward_mma_kernel, by blocks of
 * threads that are few enough to have an SM each.
 *
 * `n_slices` blocks of threads share a (sequence, key head): each makes all scores and the output of `slice_tiles` tiles of 16
 * columns. In a round of `round_blocks` (1, 2 or 4) blocks of keys, 8 warps make scores, 32 keys each, and
 * then weights of them, while 4 warps multiply the weights of the round before with its values:
 *
 *   barrier   score warps: scores, maxima of 32 keys      value warps: blocks 0 and 1
 *   barrier   score warps: bases, weights, their sums     value warps: blocks 2 and 3
 *
 * The warps of a block's scores bring its keys, a value warp its values, `n_stages` rounds of either in shared memory. */
#ifndef KS_CUDA_ATTENTION_DECODE_CUH
#define KS_CUDA_ATTENTION_DECODE_CUH

#include "kernels/cuda/attention_forward_mma.cuh"

enum {
  ATTENTION_DECODE_ROWS = 16,
  ATTENTION_DECODE_BLOCKS = 4,                                    /* of keys in a round, at most */
  ATTENTION_DECODE_SCORE = ATTENTION_DECODE_BLOCKS * 2 * KS_WARP, /* threads */
  ATTENTION_DECODE_VALUE = 4 * KS_WARP,
  ATTENTION_DECODE_THREADS = ATTENTION_DECODE_SCORE + ATTENTION_DECODE_VALUE,
  ATTENTION_DECODE_STAGES = 6,    /* at most */
  ATTENTION_DECODE_MAX_DIM = 128, /* left operands are kept in registers */
  ATTENTION_DECODE_V_TILE = ATTENTION_KEYS * 16,
  ATTENTION_DECODE_TOLD = 2 * ATTENTION_DECODE_BLOCKS /* two rounds */
};

/* A tile of 16 columns of values: rows of 32 bytes, of which four cross the banks. */
template <> struct attention_tile<16> {
  static constexpr bool SWIZZLED = true;
  static constexpr int STRIDE = 16, CHUNKS = 2;
  KS_DEVICE static int at(int row, int chunk) { return row * 16 + ((chunk ^ (row >> 2 & 1)) << 3); }
  KS_DEVICE static int along(int place, int) { return place; }
};

/* What score warps tell each other of a round, and the value warps of this and the next. */
struct attention_decode_told {
  uint4 *weights; /* [2 rounds][4 blocks][4 quarters][32 lanes]: left operands */
  float *halves;  /* [2 rounds][4 blocks][2 halves][16 rows][4 threads]: sums of weights */
  float *keep;    /* [2 rounds][4 blocks][16 rows] */
  float *max;     /* [4 blocks][2 halves][16 rows] */
  float *base;    /* [16 rows] */
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

/* What a thread copies next: its pieces of one block of keys, or of values, of each round. */
struct attention_decode_cursor {
  const ks_bf16 *first; /* its first piece, were the block the first in memory */
  const int32_t *page;
  int number;  /* of the page: asked for a round ahead */
  int in_page; /* rows of the page before the block */
  int block;   /* number of the block */
  int r0, col; /* the first piece: row, column */
};
/* n blocks further. The page's number is there a round later. */
KS_DEVICE void attention_decode_skip(attention_decode_cursor *c, const attention_forward_params *p,
                                     const attention_work *w, int n) {
  c->block += n;
  c->in_page += n * ATTENTION_KEYS;
  if (w->seq.pages < 0) return;
#pragma unroll 1
  for (; c->in_page >= p->page_rows; c->in_page -= p->page_rows)
    c->page++;
  if (c->block < w->end_block) c->number = *c->page;
}
/* At block `block` of the first round; r0 and col are set. */
KS_DEVICE void attention_decode_aim(attention_decode_cursor *c, const attention_forward_params *p,
                                    const attention_work *w, const void *x, int first, int block) {
  c->first = (const ks_bf16 *)x + (int64_t)w->head * p->d + first + c->r0 * p->kv_stride + c->col;
  c->page = p->pages + (w->seq.pages < 0 ? 0 : w->seq.pages);
  c->number = c->in_page = c->block = 0;
  attention_decode_skip(c, p, w, block);
}
KS_DEVICE const ks_bf16 *attention_decode_from(const attention_decode_cursor *c,
                                               const attention_forward_params *p) {
  return c->first + ((int64_t)c->number * p->page_rows + c->in_page) * p->kv_stride;
}

/* Of keys: the two warps that make a block's scores bring it. */
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_aim_keys(attention_decode_cursor *c, const attention_forward_params *p,
                                         const attention_work *w) {
  typedef attention_copy<DIM, WIDE> by;
  const int thread = (int)threadIdx.x % (2 * KS_WARP);
  c->r0 = WIDE ? thread / by::LANES : 0;
  c->col = WIDE ? thread % by::LANES * by::PER : 0;
  attention_decode_aim(c, p, w, w->seq.k, 0, (int)threadIdx.x / (2 * KS_WARP));
}
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_bring_keys(attention_decode_cursor *c, const attention_forward_params *p,
                                           const attention_work *w, ks_bf16 *k) {
  typedef attention_copy<DIM, WIDE> by;
  typedef attention_tile<DIM> at;
  const int block = (int)threadIdx.x / (2 * KS_WARP);
  if (block >= p->round_blocks || c->block >= w->end_block) return;
  const ks_bf16 *from = attention_decode_from(c, p);
  const int n_valid = attention_block_keys(w, c->block);
  k += block * ATTENTION_KEYS * at::STRIDE;
  if constexpr (WIDE) {
    constexpr int STEP = 2 * KS_WARP / by::LANES;
    const bool is_inside = c->col < p->d;
    const int64_t stride = STEP * p->kv_stride;
    if (c->col < DIM)
#pragma unroll(STEP < 4 ? 4 : ATTENTION_KEYS / STEP)
      for (int i = 0; i < ATTENTION_KEYS / STEP; i++, from += stride) {
        const int r = c->r0 + i * STEP;
        by::copy(k + at::at(r, c->col / 8) + c->col % 8, from, is_inside && r < n_valid);
      }
  } else {
#pragma unroll 1
    for (int i = (int)threadIdx.x % (2 * KS_WARP); i < ATTENTION_KEYS * DIM; i += 2 * KS_WARP) {
      const int r = i / DIM, col = i % DIM;
      ks_bf16 x = {0};
      if (r < n_valid && col < p->d) x = from[r * p->kv_stride + col];
      k[at::at(r, col / 8) + col % 8] = x;
    }
  }
  attention_decode_skip(c, p, w, p->round_blocks);
}

/* Of values, columns from `first` on: a warp brings a block. 1 << shift lanes share a row. */
KS_DEVICE int attention_decode_shift(int n_pieces) {
  int shift = 0;
  while (1 << shift < n_pieces)
    shift++;
  return shift;
}
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_aim_values(attention_decode_cursor *c, const attention_forward_params *p,
                                           const attention_work *w, int first) {
  constexpr int PER = attention_copy<DIM, WIDE>::PER;
  const int lane = (int)threadIdx.x % KS_WARP, shift = attention_decode_shift(p->slice_tiles * (16 / PER));
  c->r0 = WIDE ? lane >> shift : 0;
  c->col = WIDE ? (lane & ((1 << shift) - 1)) * PER : 0;
  attention_decode_aim(c, p, w, w->seq.v, first, ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP);
}
template <int DIM, bool WIDE>
KS_DEVICE void attention_decode_bring_values(attention_decode_cursor *c, const attention_forward_params *p,
                                             const attention_work *w, int first, ks_bf16 *v) {
  constexpr int PER = attention_copy<DIM, WIDE>::PER;
  const int block = ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP, n_cols = p->slice_tiles * 16;
  if (block >= p->round_blocks || c->block >= w->end_block) return;
  const ks_bf16 *from = attention_decode_from(c, p);
  const int n_valid = attention_block_keys(w, c->block);
  v += block * p->slice_tiles * ATTENTION_DECODE_V_TILE;
  if constexpr (WIDE) {
    const int step = KS_WARP >> attention_decode_shift(p->slice_tiles * (16 / PER));
    const bool is_inside = first + c->col < p->d;
    const int64_t stride = step * p->kv_stride;
    v += c->col / 16 * ATTENTION_DECODE_V_TILE + c->col % 8;
    if (c->col < n_cols)
#pragma unroll 2
      for (int r = c->r0; r < ATTENTION_KEYS; r += step, from += stride)
        attention_copy<DIM, WIDE>::copy(v + attention_tile<16>::at(r, c->col / 8 % 2), from,
                                        is_inside && r < n_valid);
  } else {
#pragma unroll 1
    for (int i = (int)threadIdx.x % KS_WARP; i < ATTENTION_KEYS * n_cols; i += KS_WARP) {
      const int r = i / 16 % ATTENTION_KEYS, tile = i / ATTENTION_DECODE_V_TILE, col = i % 16;
      ks_bf16 x = {0};
      if (r < n_valid && first + tile * 16 + col < p->d) x = from[r * p->kv_stride + tile * 16 + col];
      v[tile * ATTENTION_DECODE_V_TILE + attention_tile<16>::at(r, col / 8) + col % 8] = x;
    }
  }
  attention_decode_skip(c, p, w, p->round_blocks);
}

/* A score warp's 32 keys to weights, for the value warps. Every score thread follows the bases of its rows; `n` blocks are in the
 * round. */
KS_DEVICE void attention_decode_weigh(const attention_decode_told *told, int round, int n, bool is_tall,
                                      float (*s)[4], float scale, float base[2]) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            block = warp / 2, half = warp % 2, at = (round & 1) * ATTENTION_DECODE_BLOCKS + block;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (h == 1 && !is_tall) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        s[i][2] = s[i][3] = 0;
      break;
    }
    float from = 0, keep_here = 0;
#pragma unroll
    for (int i = 0; i < ATTENTION_DECODE_BLOCKS; i++) {
      if (i >= n) break;
      const float *x = told->max + i * 32 + g + 8 * h;
      const float keep = attention_raise(&base[h], fmaxf(x[0], x[16]) * scale);
      if (i == block) from = -attention_base(base[h]), keep_here = keep;
    }
    if (block >= n) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float *x = &s[i / 2][2 * h + i % 2];
      *x = ks_exp2(fmaf(*x, scale, from));
    }
    told->halves[((at * 2 + half) * 16 + g + 8 * h) * 4 + t] =
        attention_quarter(&s[0][2 * h], &s[1][2 * h]) + attention_quarter(&s[2][2 * h], &s[3][2 * h]);
    if (t == 0 && half == 0) told->keep[at * 16 + g + 8 * h] = keep_here;
    if (t == 0 && warp == 0) told->base[g + 8 * h] = base[h];
  }
  if (block >= n) return;
  uint32_t x[2][4];
  attention_operand<4>(x, s);
#pragma unroll
  for (int k = 0; k < 2; k++)
    told->weights[(at * 4 + half * 2 + k) * KS_WARP + lane] = make_uint4(x[k][0], x[k][1], x[k][2], x[k][3]);
}

/* A value warp's tiles of columns, of which it has one at least: blocks `from` to `to` - 1 of a round. */
template <int MINE>
KS_DEVICE void attention_decode_add(const attention_decode_told *told, int round, int from, int to,
                                    bool is_tall, const ks_bf16 *values, int n_tiles, float o[MINE][2][4],
                                    float sum[2]) {
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            warp = ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP;
#pragma unroll 1
  for (int block = from; block < to; block++) {
    const int at = (round & 1) * ATTENTION_DECODE_BLOCKS + block;
    const ks_bf16 *v = values + (block * n_tiles + warp) * ATTENTION_DECODE_V_TILE;
    uint4 x[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
      x[k] = told->weights[(at * 4 + k) * KS_WARP + lane];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h == 1 && !is_tall) break;
      const float keep = told->keep[at * 16 + g + 8 * h],
                  *half = told->halves + (at * 32 + g + 8 * h) * 4 + t;
      sum[h] = fmaf(sum[h], keep, half[0] + half[64]);
#pragma unroll
      for (int i = 0; i < MINE * 4; i++)
        o[i / 4][i / 2 % 2][2 * h + i % 2] *= keep;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t left[1][1][4] = {{{x[k].x, x[k].y, x[k].z, x[k].w}}};
#pragma unroll
      for (int i = 0; i < MINE; i++)
        if (i == 0 || warp + 4 * i < n_tiles)
          attention_accumulate<16, 1, 1, 2>(&o[i], lane, left,
                                            v + 4 * i * ATTENTION_DECODE_V_TILE + k * 16 * 16, 0);
    }
  }
}

/* A value warp's tiles to device memory, through the room of the queries. */
template <int DIM, bool WIDE, int MINE>
KS_DEVICE void attention_decode_finish(const attention_forward_params *p, const attention_work *w, int slice,
                                       ks_bf16 *room, const float *base, const float o[MINE][2][4],
                                       const float sum[2]) {
  const int lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            warp = ((int)threadIdx.x - ATTENTION_DECODE_SCORE) / KS_WARP;
  const float all[2] = {ks_quad_sum(sum[0]), ks_quad_sum(sum[1])};
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
      p->lse[attention_row(p, w, g + 8 * h)] = attention_lse(base[g + 8 * h], all[h]);
}

template <int DIM, bool WIDE>
__global__ void __launch_bounds__(ATTENTION_DECODE_THREADS, 1)
    attention_decode_kernel(attention_forward_params p) {
#if KS_ATTENTION_HAS_MMA
  constexpr int MINE = (DIM / 16 + 3) / 4, K_BLOCK = ATTENTION_KEYS * attention_tile<DIM>::STRIDE;
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, g = lane / 4, t = lane % 4,
            block = warp / 2, half = warp % 2, k_stage = p.round_blocks * K_BLOCK,
            v_stage = p.round_blocks * p.slice_tiles * ATTENTION_DECODE_V_TILE,
            slice = (int)blockIdx.x % p.n_slices;
  const bool is_score = (int)threadIdx.x < ATTENTION_DECODE_SCORE,
             has_tiles = warp - ATTENTION_DECODE_SCORE / KS_WARP < p.slice_tiles;
  ks_smem smem;
  ks_bf16 *q = ks_smem_take<ks_bf16>(&smem, (size_t)ATTENTION_DECODE_ROWS * attention_tile<DIM>::STRIDE);
  ks_bf16 *keys = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * k_stage);
  ks_bf16 *values = ks_smem_take<ks_bf16>(&smem, (size_t)p.n_stages * v_stage);
  attention_decode_told told;
  told.weights = ks_smem_take<uint4>(&smem, ATTENTION_DECODE_TOLD * 4 * KS_WARP);
  told.halves = ks_smem_take<float>(&smem, ATTENTION_DECODE_TOLD * 2 * 64);
  told.keep = ks_smem_take<float>(&smem, ATTENTION_DECODE_TOLD * 16);
  told.max = ks_smem_take<float>(&smem, ATTENTION_DECODE_BLOCKS * 2 * 16);
  told.base = ks_smem_take<float>(&smem, 16);
  attention_work w;
  attention_decode_cursor cursor;
  ks_grid_start_next();
  const bool has_work = attention_work_at(&p, p.n_slices, ATTENTION_DECODE_ROWS, &w);
  const int col = slice * p.slice_tiles * 16, ahead = p.n_stages - 1;
  if (has_work && is_score)
    attention_decode_aim_keys<DIM, WIDE>(&cursor, &p, &w);
  else if (has_work)
    attention_decode_aim_values<DIM, WIDE>(&cursor, &p, &w, col);
  ks_grid_wait(); /* above this line: staged tables only */
  if (!has_work) return;
  const bool is_tall = w.n_rows > 8;
  const int n_rounds = (w.end_block + p.round_blocks - 1) / p.round_blocks;
  if (threadIdx.x < ATTENTION_THREADS)
    attention_load<DIM, ATTENTION_DECODE_ROWS, WIDE>(q, attention_queries(&p, &w, (const ks_bf16 *)p.q),
                                                     w.n_rows, p.d);
#pragma unroll 1
  for (int i = 0; i < ahead; i++) {
    if (is_score)
      attention_decode_bring_keys<DIM, WIDE>(&cursor, &p, &w, keys + i * k_stage);
    else if (i > 0)
      attention_decode_bring_values<DIM, WIDE>(&cursor, &p, &w, col, values + (i - 1) * v_stage);
    ks_cp_async_commit();
  }
  attention_decode_arrive(p.n_stages);
  uint32_t left[1][DIM / 16][4];
  if (is_score)
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
      attention_left<DIM>(left[0][k], lane, q, 0, k);
#pragma unroll
      for (int i = 0; i < 4; i++)
        left[0][k][i] ^= p.is_negative ? 0x80008000u : 0;
    }
  float o[MINE][2][4] = {}, s[1][4][4], base[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  int now = 0, before = ahead, earlier = ahead - 1; /* stages of rounds r, r - 1, r - 2 */
#pragma unroll 1
  for (int r = 0; r <= n_rounds; r++) { /* values are a round behind */
    const int b = r * p.round_blocks, n = attention_min(w.end_block - b, p.round_blocks),
              n_before = r ? attention_min(w.end_block - b + p.round_blocks, p.round_blocks) : 0;
    attention_decode_arrive(p.n_stages);
    if (is_score) {
      attention_decode_bring_keys<DIM, WIDE>(&cursor, &p, &w, keys + before * k_stage);
      if (block < n) {
        const int seen = w.n_keys - (b + block) * ATTENTION_KEYS - half * 32;
        const int here[2] = {seen, seen};
#pragma unroll
        for (int i = 0; i < 16; i++)
          s[0][i / 4][i % 4] = 0;
        attention_scores<DIM, 1, 4, true>(s, lane, left, nullptr, 0,
                                          keys + now * k_stage + block * K_BLOCK +
                                              half * 32 * attention_tile<DIM>::STRIDE);
        if (seen < 32) attention_mask<4>(s[0], 0, here);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (h == 1 && !is_tall) break;
          const float max = attention_most<4>(s[0], h);
          if (t == 0) told.max[warp * 16 + g + 8 * h] = max;
        }
      }
    } else {
      attention_decode_bring_values<DIM, WIDE>(&cursor, &p, &w, col, values + earlier * v_stage);
      if (has_tiles)
        attention_decode_add<MINE>(&told, r - 1, 0, attention_min(n_before, 2), is_tall,
                                   values + before * v_stage, p.slice_tiles, o, sum);
    }
    ks_cp_async_commit();
    __syncthreads();
    if (is_score) {
      if (n > 0) attention_decode_weigh(&told, r, n, is_tall, s[0], p.scale, base);
    } else if (has_tiles) {
      attention_decode_add<MINE>(&told, r - 1, 2, n_before, is_tall, values + before * v_stage, p.slice_tiles,
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
         ks_smem_bytes<uint4>(ATTENTION_DECODE_TOLD * 4 * KS_WARP) +
         ks_smem_bytes<float>(ATTENTION_DECODE_TOLD * 2 * 64) +
         ks_smem_bytes<float>(ATTENTION_DECODE_TOLD * 16) +
         ks_smem_bytes<float>(ATTENTION_DECODE_BLOCKS * 2 * 16) + ks_smem_bytes<float>(16);
}

#endif
