/* What the files of generation passes share (bf16 activations): linear layers side by side on one x.
 *
 *   linear_decode.cu         ks_decode_linears: which kernels a call is made of; adapters as its kernels see them
 *   linear_decode_few.cu     up to 8 rows: norm, products of all parts, adapters, bias, residual, SwiGLU or rope in one launch
 *   linear_decode_wide.cu    up to 64 rows, and block weights: the same but norm and rope
 *   linear_decode_shrink.cu  u = x A^T of all parts in one launch
 *   linear_mma.cu            more rows
 *
 * The order of every sum, the same in all of them, so that a row has the same bits in any company (mma: ks_mma_bf16, whose
 * 16 products are those of neighbouring k, in whichever operand they come):
 *   product   k is cut into LINEAR_RUNS runs of whole steps of 32, ceil(steps / LINEAR_RUNS) each; a run is one chain of mma
 *             in rising k; total = ((0 + run 0) + run 1) + ...
 *   u         decode_shrink_kernel, whatever the number of rows
 *   adapters  for each 64 ranks: one chain of mma over 16 ranks at a time (B rounded after the scale), added to the total
 *   last      + bias, + residual, each in float32; then rounded once. SwiGLU reads its gate and up rounded.
 *   norm      norm.cu's (norm.cuh)
 */
#ifndef KS_CUDA_LINEAR_DECODE_CUH
#define KS_CUDA_LINEAR_DECODE_CUH

#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/norm.cuh"

enum {
  DECODE_FEW_ROWS = 8,   /* of linear_decode_few.cu */
  DECODE_TILE = 16,      /* outputs of a tile there; with SwiGLU 8 of gate and 8 of up */
  DECODE_ITEM_ROWS = 32, /* of a piece of a segment that shrink works on */
  DECODE_SHRINK_RANKS = 16
};

/* One adapter at one part. */
struct decode_adapter {
  const float *a, *b_t;
  float scale;
  int32_t rank; /* 0: none */
};
/* Rows of a segment, or of a piece of one; n_rows 0: none. */
struct decode_rows {
  int32_t begin, n_rows, seg, unused;
};

/* Arrays in device memory. Counts depend on the numbers of rows and segments only, so that steps repeat. */
struct decode_adapters {
  const decode_rows *segs, *items; /* sorted */
  const decode_adapter *of;        /* [n_parts][n_segs] */
  int64_t n_segs, n_items;
  int32_t max_rank, unused; /* max_rank 0: no adapter anywhere, no arrays */
};

struct decode_part {
  ks_weight_view w;
  void *y;
  const void *residual;
  const float *bias;
  ks_bf16 *u;
  void *to; /* NULL, or in place of y: row i goes to row index[i] here */
  int64_t u_stride, first_tile;
  int64_t turns; /* 1: heads are rotated; a tile is 8 columns of a head, and those half a head behind */
};

/* What the kernels are told. */
struct decode_args {
  decode_part parts[KS_LINEARS_MAX];
  decode_adapters adapters;
  const ks_bf16 *x;
  const float *norm_w;      /* NULL: x is what the parts read */
  ks_bf16 *h;               /* of SwiGLU, or NULL */
  const int32_t *positions; /* [n_rows] */
  const double *inv_freq;   /* [head_dim / 2] */
  const int64_t *index;     /* [n_rows] */
  int64_t n_in, n_rows, head_dim;
  int32_t n_parts, n_tiles;
  int32_t rows_at_once; /* of a block with x in shared memory; 0: none takes it there */
  int32_t run;          /* length of one, in k */
  int32_t norm_threads; /* that share a row's sum of squares: see decode_load_x */
  int32_t y_is_f32;
  int32_t aligned; /* rows of x, and of weights that are not in blocks: to 16 bytes */
  int32_t has_rope;
  float eps, inverse; /* 1 / n_in */
};

/* ---------------------------------------------------------------- x in shared memory */

/* Rows of x, each padded to whole pieces of 64 columns with zeros; 16-byte pieces permuted so that the same columns of eight
 * rows lie in different banks. */
KS_HOST_DEVICE int decode_x_pieces(int64_t n_in) {
  return (int)((n_in + 63) / 64 * 8);
}
KS_DEVICE ks_bf16 *decode_x_at(ks_bf16 *xs, int pieces, int row, int piece) {
  return xs + ((int64_t)row * pieces + (piece ^ (row & 7))) * 8;
}

/* Rows [row0, row0 + n_rows) of x, with the norm where there is one, for the whole block of THREADS. room:
 * shared, 16 floats a row. Its sum of squares is norm.cu's: norm_threads threads, each a chain over every
 * norm_threads-th piece, a tree over the lanes of a warp, a tree over the warps. */
template <int THREADS>
KS_DEVICE void decode_load_x(ks_bf16 *xs, float *room, const decode_args &p, int64_t row0, int n_rows) {
  enum { WARPS = THREADS / KS_WARP };
  const int pieces = decode_x_pieces(p.n_in), whole = (int)(p.n_in / 8), warp = (int)threadIdx.x / KS_WARP,
            lane = (int)threadIdx.x % KS_WARP;
  for (int i = (int)threadIdx.x; i < n_rows * pieces; i += THREADS) {
    const int row = i / pieces, piece = i % pieces;
    *(uint4 *)(void *)decode_x_at(xs, pieces, row, piece) =
        piece < whole ? *(const uint4 *)(const void *)(p.x + (row0 + row) * p.n_in + 8 * piece)
                      : make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  if (!p.norm_w) return;
  const int row_warps = (p.norm_threads + KS_WARP - 1) / KS_WARP;
  for (int v = warp; v < n_rows * row_warps; v += WARPS) {
    const int row = v / row_warps, first = v % row_warps * KS_WARP + lane;
    float sum = 0;
    for (int piece = first; piece < whole && first < p.norm_threads; piece += p.norm_threads) {
      ks_vec<ks_bf16> x;
      ks_load_vec(&x, decode_x_at(xs, pieces, row, piece));
#pragma unroll
      for (int i = 0; i < 8; i++)
        sum = fmaf(x.x[i], x.x[i], sum);
    }
    sum = ks_warp_sum(sum);
    if (lane == 0) room[row * 16 + v % row_warps] = sum;
  }
  __syncthreads();
  for (int row = 0; row < n_rows; row++) {
    float sum = room[row * 16];
    if (row_warps > 1) sum = ks_warp_sum(lane < row_warps ? room[row * 16 + lane] : 0.0f);
    const float rstd = rsqrtf(fmaf(sum, p.inverse, p.eps));
    for (int piece = (int)threadIdx.x; piece < whole; piece += THREADS) {
      ks_bf16 *at = decode_x_at(xs, pieces, row, piece);
      const float4 *w = (const float4 *)(const void *)(p.norm_w + 8 * piece);
      const float4 lo = w[0], hi = w[1];
      const float weight[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      ks_vec<ks_bf16> x;
      ks_load_vec(&x, at);
#pragma unroll
      for (int i = 0; i < 8; i++)
        x.x[i] = x.x[i] * rstd * weight[i];
      ks_store_vec(at, &x);
    }
  }
  __syncthreads();
}

/* A tile's halves, outputs [n0, end) of a part: of one part, or with SwiGLU of gate and up. */
struct decode_halves {
  int part[2];
  int64_t n0[2], end[2];
};
KS_HOST_DEVICE int64_t decode_tiles_of_head(int64_t head_dim, int64_t outputs) {
  return (head_dim + outputs - 1) / outputs;
}
KS_DEVICE decode_halves decode_halves_of(const decode_args &p, int64_t tile, int outputs, bool swiglu) {
  int part = 0;
  while (!swiglu && part + 1 < p.n_parts && tile >= p.parts[part + 1].first_tile)
    part++;
  const int64_t number = tile - p.parts[part].first_tile, n_out = p.parts[part].w.n_out;
  if (p.parts[part].turns) {
    const int64_t of_head = decode_tiles_of_head(p.head_dim, outputs), half = p.head_dim / 2,
                  head = number / of_head * p.head_dim, n0 = head + number % of_head * (outputs / 2);
    return {{part, part}, {n0, n0 + half}, {head + half, head + p.head_dim}};
  }
  const int64_t n0 = number * (swiglu ? outputs / 2 : outputs);
  return {{part, swiglu ? 1 : part}, {n0, swiglu ? n0 : n0 + outputs / 2}, {n_out, n_out}};
}

/* ---------------------------------------------------------------- parts of a call */

/* Room for rows_at_once rows of x in a block's shared memory. */
static inline size_t decode_x_bytes(int64_t n_in, int64_t n_rows) {
  return ks_smem_bytes<ks_bf16>((size_t)(n_rows * decode_x_pieces(n_in) * 8));
}

/* Sets p->rows_at_once; false: shapes, types or alignment that it does not take. */
bool ks_decode_few_takes(ks_ctx *ctx, const ks_linears_args *a, decode_args *p);
ks_status ks_decode_few(ks_ctx *ctx, const decode_args *p);
/* tile: outputs of one; ks_decode_wide_tile says how many where there are n_out in all. */
int ks_decode_wide_tile(ks_ctx *ctx, int64_t n_out);
ks_status ks_decode_wide(ks_ctx *ctx, const decode_args *p, int tile);
/* u of all parts. rows_at_once: rows of an item at most, whose x (with its norm, where there is p->norm_w) lies in
 * shared memory; 0: items of DECODE_ITEM_ROWS, without norm. */
ks_status ks_decode_shrink(ks_ctx *ctx, const decode_args *p);
/* For more rows than linear_decode_few.cu takes: sets p->rows_at_once; rows of an item. */
int64_t ks_decode_item_rows(ks_ctx *ctx, decode_args *p);

#endif
