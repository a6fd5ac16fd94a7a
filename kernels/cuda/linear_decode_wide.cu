/* Linear layers of up to 64 rows that read one x (generation passes that linear_decode_few.cu does not take), bf16 activations,
 * bf16 or block weights, in one launch: products of all parts, adapters, bias and residual, SwiGLU behind them.
 *
 *   y[i, o] = sum_j x[i, j] W[o, j] + scale sum_r u[i, r] B[o, r] + bias[o] + residual[i, o]
 *   with SwiGLU h[i, o] = silu(y_gate[i, o]) y_up[i, o] is stored instead
 *
 * Bytes: W once (2, 1.06, 0.56 or 0.53 bytes an element) and B from memory; x once a tile from the L2, 2 rows n_in. FLOPs:
 * 2 rows a weight. Bound by memory up to some 24 rows; from there on by what the L2 hands to the multiprocessors, W and x:
 * with N outputs a tile 1 + rows / N times the bytes of W.
 *
 * Geometry: a tile is all rows (16, 32 or 64) by 64 outputs, or by 32 where 64 would leave half the multiprocessors without
 * a tile; with SwiGLU half of them gate's, half the same of up. Two or four warps share it (of 64 rows two by two), no k is
 * split, so nothing is summed across warps. Stages of 64 k of x and W come by cp.async through one ring, 48 to 96 KB of it,
 * two blocks an SM: 128 to 192 KB under way, where 4.5 TB/s and 800 ns want 27 KB of W and as much of x. One barrier a
 * stage. Codes come through registers, four stages ahead, and are unpacked into two stages of W in turn. While the ring
 * fills, a warp makes its rows' adapters' terms: of sixteen rows at a time, the operands of two or four segments on their
 * way at once.
 *
 * A stage in the disassembly (sm_90), 64 rows by 64 outputs: 32 mma, 16 ldmatrix, 8 copies of 512 bytes and 210 others a
 * warp, 267 clocks for four warps; products 213 clocks at 60 % of wgmma's rate; shared memory 48 KB, 375 clocks; its bytes
 * at 17 + 17 bytes a clock and SM, 480. Resources: 168 to 255 registers (codes 139 to 254), 128 threads
 * (16 rows by 32 outputs 64), no spills.
 *
 * Order of sums: linear_decode.cuh. A row has the same bits as in linear_decode_few.cu and linear_mma.cu, whatever the
 * tile. Serial chain L = n_in / 128 mma + 8. Rows are the mma's own rows: none sees another. Alignment: rows of x and bf16
 * W at multiples of 16 bytes by cp.async, others element by element into the same ring.
 *
 * Time, computed, H200: the largest of W at 4.5 TB/s, W and x through the L2 at 7 TB/s (supposed), a multiprocessor's tiles
 * at 86 GB/s (shared memory; 16 rows 100); us without the launch's 2.5, and the share of the first in their sum.
 *     Llama-3.2-1B   W     16    32    64 rows    OpenLLaMA-3B   W     16    32    64 rows
 *     q, k, v        2.8   2.8   3.6   5.4        q, k, v        13.7  13.7  14.3  19.1
 *     o              1.9   2.0   3.0   4.6        o              4.6   4.6   5.9   8.8
 *     gate, up       14.9  14.9  14.9  19.2       gate, up       24.6  24.6  24.6  31.6
 *     down           7.5   7.9   12.2  18.3       down           12.3  12.3  15.8  23.7
 *     layer                98 %  80 %  57 %       layer                100 % 91 %  66 %
 * Codes, 16 rows or fewer: some 290 instructions a warp and stage of 64 x 64 codes: Q8_0 3.9 TB/s, 4 bits 2.1 TB/s at most.
 *
 * 64 sequences, adapters of rank 8 on q, k, v and o, a layer: 8 launches with none, 10 with one adapter or with 16. 3B:
 * products 83 us, norms, rotary and attention over 32 keys some 9, shrink 2 x 3.5, launches 25: 124 us. Sixteen adapters
 * instead of one read A and B of fifteen more, 12.3 MB: 2.7 us at most, 0.4 us an SM and launch for the segments'
 * instructions: 4.3 us, 97 % of the rate with one. 1B: 47 + 6 + 7 + 25 = 85 us; 6.4 MB, 1.4 + 1.6 us: 97 %. Rates with one
 * adapter: 3B 19k tokens/s, 1B 41k.
 *
 * Ladder (H200, bf16)
 *   v1  16 outputs a block, 8 warps each a run of k, operands through registers, a launch a part. Commit f74fb33, one row,
 *       weights not in cache, the measurement itself about 3 us: 2048 x 2048 11 us (computed 2), 8192 x 2048 25 us, 2048 x
 *       8192 36 us (computed 8): 31 and 22 % of the rate of a copy. From the disassembly, not measured: 93, 78 and 62
 *       instructions an mma at 16, 32 and 64 rows, gate and up of 3B in 39, 65 and 102 us of instructions alone: 64, 38 and
 *       24 % of the read rate at most; and x as often as there are 16 outputs, at 64 rows 79 us through the L2. Q8_0 at one
 *       row: 54 us, 24 %.
 *   v2  this. Not measured yet.
 *   Next, not built: x of a cluster's blocks by multicast (sm_90), for 64 rows; codes of few rows as linear_decode_few.cu
 *       has bf16. */
#include "kernels/cuda/linear_decode.cuh"
#include "kernels/cuda/swiglu.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  WIDE_K = 64, /* of a stage */
  WIDE_PIECES = WIDE_K / 8,
  WIDE_RING = 96 << 10, /* bytes */
  WIDE_CODES = 4,       /* stages of codes on their way */
  WIDE_RANKS = 16       /* of a step of theirs */
};

constexpr int wide_min(int a, int b) {
  return a < b ? a : b;
}

/* Tiles of MT sixteens of rows by NT sixteens of outputs. */
template <int MT, int NT, bool BLOCKS_> struct wide_shape {
  static constexpr bool BLOCKS = BLOCKS_;
  static constexpr int ROWS = 16 * MT, N = 16 * NT;
  static constexpr int WARPS_M = MT == 4 || (MT == 2 && NT == 2) ? 2 : 1, WARPS_N = NT == 4 && MT < 4 ? 4 : 2;
  static constexpr int MI = MT / WARPS_M,
                       NI = 2 * NT / WARPS_N; /* of a warp: sixteens of rows, eights of outputs */
  static constexpr int THREADS = WARPS_M * WARPS_N * KS_WARP;
  static constexpr int X = ROWS * WIDE_K, W = N * WIDE_K; /* elements of a stage */
  static constexpr int STAGES = BLOCKS ? 6 : wide_min(12, WIDE_RING / (2 * (X + W))),
                       W_STAGES = BLOCKS ? 2 : STAGES;
  static constexpr int LINES = THREADS / WIDE_PIECES, X_TURNS = ROWS / LINES,
                       W_TURNS = N / LINES;                                   /* of copies */
  static constexpr int CODE_LINES = THREADS / 4, CODE_TURNS = N / CODE_LINES; /* sixteen codes a thread */
  static constexpr int BLOCKS_SM = BLOCKS && MT == 1 ? 3 : 2;
  /* segments whose adapters are on their way at once */
  static constexpr int TERMS = BLOCKS ? 1 : MT * NT == 16 ? 2 : 4;
  static size_t bytes() {
    return ks_smem_bytes<ks_bf16>(STAGES * X) + ks_smem_bytes<ks_bf16>(W_STAGES * W) +
           ks_smem_bytes<float>(16);
  }
};

/* What a lane knows of its warp's share. */
struct wide_place {
  decode_halves of;
  int row0, line0, g, t; /* first row and line of W in the tile */
  bool swiglu;
  int out0, n_out; /* output of the first line; outputs of the parts */
};

/* Lines of a tile are outputs; with SwiGLU the first half of each warp's is gate's, the second the same of up. */
struct wide_line {
  int part;
  int64_t out;
};
template <class S> KS_DEVICE wide_line wide_line_of(const wide_place &at, int line) {
  enum { OF_WARP = 8 * S::NI, HALF = OF_WARP / 2 };
  if (!at.swiglu) return {at.of.part[0], at.of.n0[0] + line};
  const bool up = line % OF_WARP >= HALF;
  return {up ? at.of.part[1] : at.of.part[0], at.of.n0[0] + line / OF_WARP * HALF + line % HALF};
}

/* Part and first output of the n-th eight of a warp's lines. */
template <class S> KS_DEVICE wide_line wide_eight_of(const wide_place &at, int n) {
  const bool up = at.swiglu && n >= S::NI / 2;
  return {up ? at.of.part[1] : at.of.part[0], at.out0 + (at.swiglu ? 8 * n % (4 * S::NI) : 8 * n)};
}

/* ---------------------------------------------------------------- x and W on their way */

/* What a thread copies next: turn i row i * LINES + its own of x, and line w[i % 2] + i / 2 * w_step of W. */
struct wide_cursor {
  const ks_bf16 *x, *w[2];
  int64_t x_step, w_step;
  uint32_t lines; /* bit i: that of turn i is there */
  int k0;         /* of the stage */
};

template <class S> KS_DEVICE wide_cursor wide_cursor_of(const decode_args &p, const wide_place &at) {
  const int line = (int)threadIdx.x / WIDE_PIECES, col = (int)threadIdx.x % WIDE_PIECES * 8;
  wide_cursor c;
  c.k0 = 0;
  c.x = p.x + line * p.n_in + col;
  c.x_step = S::LINES * p.n_in;
  c.w_step = (at.swiglu ? 1 : 2) * c.x_step;
  c.lines = 0;
#pragma unroll
  for (int i = 0; i < (S::BLOCKS ? 0 : S::W_TURNS); i++) {
    const wide_line of = wide_line_of<S>(at, i * S::LINES + line);
    const ks_weight_view &w = p.parts[of.part].w;
    if (i < 2) c.w[i] = (const ks_bf16 *)(const void *)w.values + of.out * p.n_in + col;
    c.lines |= (of.out < w.n_out ? 1u : 0u) << i;
  }
  return c;
}

/* A stage's copies element by element, for rows that no vector reads. */
template <class S>
KS_DEVICE void wide_copy_odd(const wide_cursor &c, ks_bf16 *xs, ks_bf16 *ws, const decode_args &p,
                             const wide_place &at) {
  const int line = (int)threadIdx.x / WIDE_PIECES, piece = (int)threadIdx.x % WIDE_PIECES,
            col = c.k0 + 8 * piece;
#pragma unroll 1
  for (int i = 0; i < S::X_TURNS; i++) {
    const int row = i * S::LINES + line;
    tile_load_8(tile_at<WIDE_PIECES>(xs, row, piece), p.x + row * p.n_in, col, p.n_in, row < (int)p.n_rows,
                false);
  }
#pragma unroll 1
  for (int i = 0; i < (S::BLOCKS ? 0 : S::W_TURNS); i++) {
    const wide_line of = wide_line_of<S>(at, i * S::LINES + line);
    const ks_weight_view &w = p.parts[of.part].w;
    tile_load_8(tile_at<WIDE_PIECES>(ws, i * S::LINES + line, piece),
                (const ks_bf16 *)(const void *)w.values + of.out * p.n_in, col, p.n_in, of.out < w.n_out,
                false);
  }
}

template <class S>
KS_DEVICE void wide_copy(const wide_cursor &c, ks_bf16 *xs, ks_bf16 *ws, const decode_args &p) {
  const int line = (int)threadIdx.x / WIDE_PIECES, piece = (int)threadIdx.x % WIDE_PIECES;
  const bool there = c.k0 + 8 * piece < (int)p.n_in;
#pragma unroll
  for (int i = 0; i < S::X_TURNS; i++)
    if (i * S::LINES + line < (int)p.n_rows)
      ks_cp_async_16(tile_at<WIDE_PIECES>(xs, i * S::LINES + line, piece), there ? c.x + i * c.x_step : p.x,
                     there);
#pragma unroll
  for (int i = 0; i < (S::BLOCKS ? 0 : S::W_TURNS); i++) {
    const bool ok = there && (c.lines >> i & 1);
    ks_cp_async_16(tile_at<WIDE_PIECES>(ws, i * S::LINES + line, piece),
                   ok ? c.w[i % 2] + i / 2 * c.w_step : p.x, ok);
  }
}

/* Queues the next stage of x (and of W), and counts it even where there is none: one group of copies a turn. Rows of x that are not
 * there keep what lies in shared memory: nobody reads what comes of it. */
template <class S>
KS_DEVICE void wide_issue(wide_cursor &c, ks_bf16 *xs, ks_bf16 *ws, const decode_args &p,
                          const wide_place &at) {
  if (c.k0 < (int)p.n_in) {
    if (p.aligned)
      wide_copy<S>(c, xs, ws, p);
    else
      wide_copy_odd<S>(c, xs, ws, p, at);
  }
  ks_cp_async_commit();
  c.x += WIDE_K, c.k0 += WIDE_K;
  if constexpr (!S::BLOCKS) c.w[0] += WIDE_K, c.w[1] += WIDE_K;
}

/* A thread's codes of a stage and their scales' bits; 0 where there are none. */
template <class S> struct wide_codes {
  uint4 codes[S::CODE_TURNS];
  uint16_t scale[S::CODE_TURNS];
};
template <class S>
KS_DEVICE void wide_load_codes(wide_codes<S> *c, const decode_args &p, const wide_place &at, int k0) {
  const int col = k0 + (int)threadIdx.x % 4 * 16;
#pragma unroll
  for (int i = 0; i < S::CODE_TURNS; i++) {
    const wide_line of = wide_line_of<S>(at, i * S::CODE_LINES + (int)threadIdx.x / 4);
    const ks_weight_view &w = p.parts[of.part].w;
    c->codes[i] = make_uint4(0, 0, 0, 0);
    c->scale[i] = 0;
    if (of.out >= w.n_out || col >= (int)(w.scales_per_row << w.log_block)) continue;
    c->codes[i] = ks_load_codes_16(w, of.out, col);
    c->scale[i] = w.scales[of.out * w.scales_per_row + (col >> w.log_block)];
  }
}
template <class S>
KS_DEVICE void wide_store_codes(ks_bf16 *ws, const wide_codes<S> &c, int dtype, const float *lut) {
  const int piece = (int)threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < S::CODE_TURNS; i++) {
    const int line = i * S::CODE_LINES + (int)threadIdx.x / 4;
    const uint2 low = make_uint2(c.codes[i].x, c.codes[i].y),
                high = dtype == KS_DTYPE_Q8_0 ? make_uint2(c.codes[i].z, c.codes[i].w)
                                              : make_uint2(c.codes[i].y, 0);
    const float scale = ks_scale_value(c.scale[i]);
    uint32_t w[4];
    ks_unpack_8(dtype, lut, low, scale, w);
    *(uint4 *)(void *)tile_at<WIDE_PIECES>(ws, line, piece) = make_uint4(w[0], w[1], w[2], w[3]);
    ks_unpack_8(dtype, lut, high, scale, w);
    *(uint4 *)(void *)tile_at<WIDE_PIECES>(ws, line, piece + 1) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

/* ---------------------------------------------------------------- the product */

template <class S> struct wide_sums { float of[S::MI][S::NI][4]; };

/* 32 k of a stage. */
template <class S>
KS_DEVICE void wide_multiply(wide_sums<S> &acc, ks_bf16 *xs, ks_bf16 *ws, int k0, const wide_place &at) {
#pragma unroll
  for (int k = k0; k < k0 + 32; k += 16) {
    uint32_t a[S::MI][4];
#pragma unroll
    for (int m = 0; m < S::MI; m++)
      tile_frag_a<WIDE_PIECES>(a[m], xs, at.row0 + 16 * m, k);
#pragma unroll
    for (int n = 0; n < S::NI; n += 2) {
      uint32_t b[4];
      tile_frag_b<WIDE_PIECES>(b, ws, at.line0 + 8 * n, k);
#pragma unroll
      for (int m = 0; m < S::MI; m++) {
        ks_mma_bf16(acc.of[m][n], a[m], b);
        ks_mma_bf16(acc.of[m][n + 1], a[m], b + 2);
      }
    }
  }
}

/* to += from, which is 0 then. */
template <class S> KS_DEVICE void wide_add(wide_sums<S> &to, wide_sums<S> &from) {
#pragma unroll
  for (int i = 0; i < S::MI * S::NI * 4; i++) {
    to.of[i / 4 / S::NI][i / 4 % S::NI][i % 4] += from.of[i / 4 / S::NI][i / 4 % S::NI][i % 4];
    from.of[i / 4 / S::NI][i / 4 % S::NI][i % 4] = 0;
  }
}

/* How far the runs of k are, in steps of 32. */
struct wide_runs {
  int left, of_run; /* in all, in this one */
};
template <class S>
KS_DEVICE void wide_stage(wide_sums<S> &total, wide_sums<S> &acc, wide_runs &runs, ks_bf16 *xs, ks_bf16 *ws,
                          const decode_args &p, const wide_place &at) {
#pragma unroll
  for (int k = 0; k < WIDE_K; k += 32) {
    if (runs.left == 0) break;
    wide_multiply<S>(acc, xs, ws, k, at);
    runs.left--;
    if (--runs.of_run == 0 || runs.left == 0) {
      wide_add<S>(total, acc);
      runs.of_run = p.run / 32;
    }
  }
}

/* ---------------------------------------------------------------- adapters */

/* A segment among sixteen rows: [begin, end) of them, and its adapter at a part. */
struct wide_segment {
  int begin, end, rank;
  float scale;
  const float *b_t;
};
/* A lane's operands of 16 ranks of a segment: u of the rows, B of the warp's lines. */
template <class S> struct wide_ranks {
  uint32_t u[4];
  float b[S::NI][4];
};

/* Whether the n-th eight of a warp's lines is of a tile's half. */
template <class S> KS_DEVICE bool wide_is_of(const wide_place &at, int n, int half) {
  return !at.swiglu || (n >= S::NI / 2) == (half == 1);
}

template <class S>
KS_DEVICE void wide_load_ranks(wide_ranks<S> *r, const decode_args &p, const wide_place &at,
                               const wide_segment &seg, int row0, int half, int k) {
  const decode_part &part = p.parts[half ? at.of.part[1] : at.of.part[0]];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = at.g + i % 2 * 8;
    r->u[i] = row >= seg.begin && row < seg.end
                  ? tile_read_pair(part.u + (row0 + row) * part.u_stride, k + 2 * at.t + i / 2 * 8, seg.rank)
                  : 0u;
  }
#pragma unroll
  for (int n = 0; n < S::NI; n++) {
    const int out = (int)wide_eight_of<S>(at, n).out + at.g;
    const bool there = wide_is_of<S>(at, n, half) && out < at.n_out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int rank = k + 2 * at.t + i / 2 * 8 + i % 2;
      r->b[n][i] = there && rank < seg.rank ? seg.b_t[(int64_t)rank * at.n_out + out] * seg.scale : 0.0f;
    }
  }
}

/* The terms of a segment's rows, ranks r0 .. r0 + LORA_GROUP - 1; r: the first 16 of them, loaded before. */
template <class S>
KS_DEVICE void wide_add_segment(wide_sums<S> &term, const decode_args &p, const wide_place &at,
                                const wide_segment &seg, int m, int half, int r0, wide_ranks<S> &r) {
  float sum[S::NI][4] = {};
#pragma unroll 1
  for (int k = r0;;) {
#pragma unroll
    for (int n = 0; n < S::NI; n++) {
      const uint32_t b[2] = {ks_pack_bf16(r.b[n][0], r.b[n][1]), ks_pack_bf16(r.b[n][2], r.b[n][3])};
      ks_mma_bf16(sum[n], r.u, b);
    }
    k += WIDE_RANKS;
    if (k >= min(seg.rank, r0 + LORA_GROUP)) break;
    wide_load_ranks<S>(&r, p, at, seg, at.row0 + 16 * m, half, k);
  }
#pragma unroll
  for (int i = 0; i < S::MI * S::NI * 4; i++) {
    const int n = i / 4 % S::NI, row = at.g + i % 4 / 2 * 8;
    if (i / 4 / S::NI == m && row >= seg.begin && row < seg.end && wide_is_of<S>(at, n, half))
      term.of[i / 4 / S::NI][n][i % 4] = sum[n][i % 4];
  }
}

/* The terms of the m-th sixteen of the warp's rows. Lanes look for its segments, 32 at a time; the operands of several are on their
 * way at once. */
template <class S, int SEGMENTS>
KS_DEVICE void wide_terms(wide_sums<S> &term, const decode_args &p, const wide_place &at, int m, int half,
                          int r0) {
  const int lane = (int)threadIdx.x % KS_WARP, row0 = at.row0 + 16 * m;
  const int64_t n_segs = p.adapters.n_segs;
  for (int64_t base = 0; base < n_segs; base += KS_WARP) {
    const int64_t s = min(base + lane, n_segs - 1);
    const decode_rows rows = p.adapters.segs[s];
    const decode_adapter one = p.adapters.of[(half ? at.of.part[1] : at.of.part[0]) * n_segs + s];
    const int begin = rows.begin - row0, end = begin + rows.n_rows;
    uint32_t which = __ballot_sync(KS_FULL_MASK, base + lane < n_segs && rows.n_rows > 0 && one.rank > r0 &&
                                                     begin < 16 && end > 0);
    while (which) {
      wide_segment seg[SEGMENTS];
      wide_ranks<S> ranks[SEGMENTS];
      const int n = min(__popc(which), (int)SEGMENTS);
#pragma unroll
      for (int i = 0; i < SEGMENTS; i++) {
        const int from = max(__ffs((int)which) - 1, 0);
        const uint64_t b_t = __shfl_sync(KS_FULL_MASK, (uint64_t)(uintptr_t)one.b_t, from);
        seg[i] = {__shfl_sync(KS_FULL_MASK, begin, from), __shfl_sync(KS_FULL_MASK, end, from),
                  __shfl_sync(KS_FULL_MASK, one.rank, from), __shfl_sync(KS_FULL_MASK, one.scale, from),
                  (const float *)(uintptr_t)b_t};
        if (i < n) wide_load_ranks<S>(&ranks[i], p, at, seg[i], row0, half, r0);
        which &= which - 1;
      }
#pragma unroll
      for (int i = 0; i < SEGMENTS; i++)
        if (i < n) wide_add_segment<S>(term, p, at, seg[i], m, half, r0, ranks[i]);
    }
  }
}
template <class S, int SEGMENTS>
KS_DEVICE void wide_all_terms(wide_sums<S> &term, const decode_args &p, const wide_place &at, int r0) {
#pragma unroll 1 /* short code, as above */
  for (int i = 0; i < S::MI * (1 + at.swiglu); i++)
    wide_terms<S, SEGMENTS>(term, p, at, i % S::MI, i / S::MI, r0);
}

/* ---------------------------------------------------------------- results */

/* A lane's i-th two sums: outputs 2 t and 2 t + 1 of the n-th eight of its warp's, of row g + 8 h of the m-th sixteen. */
struct wide_two {
  int m, n, h, part;
  int out;            /* in a row of y */
  int64_t at;         /* in y */
  bool first, second; /* are there */
};
template <class S> KS_DEVICE wide_two wide_two_of(const decode_args &p, const wide_place &at, int i) {
  const int m = i / 2 / S::NI, n = i / 2 % S::NI, h = i % 2, row = at.row0 + 16 * m + at.g + 8 * h;
  const wide_line line = wide_eight_of<S>(at, n);
  const int out = (int)line.out + 2 * at.t;
  const bool is_there = row < (int)p.n_rows && out < at.n_out;
  return {m, n, h, line.part, out, (int64_t)row * at.n_out + out, is_there, is_there && out + 1 < at.n_out};
}
/* Whether two outputs may be one access. */
template <class Y> KS_DEVICE bool wide_pairs(const wide_place &at, const Y *y) {
  return at.n_out % 2 == 0 && ((uintptr_t)y & (2 * sizeof(Y) - 1)) == 0;
}

/* Adds bias and residual (float32 results have none), all of them asked for before the first is used. */
template <class S>
KS_DEVICE void wide_add_last(wide_sums<S> &total, const decode_args &p, const wide_place &at) {
  uint32_t residual[2 * S::MI * S::NI];
#pragma unroll
  for (int i = 0; i < 2 * S::MI * S::NI; i++) {
    const wide_two of = wide_two_of<S>(p, at, i);
    const ks_bf16 *all = (const ks_bf16 *)p.parts[of.part].residual, *from = all + of.at;
    residual[i] = 0;
    if (!all || !of.first) continue;
    if (wide_pairs(at, all))
      residual[i] = *(const uint32_t *)(const void *)from;
    else
      residual[i] = from[0].bits | (of.second ? (uint32_t)from[1].bits << 16 : 0u);
  }
#pragma unroll
  for (int i = 0; i < 2 * S::MI * S::NI; i++) {
    const wide_two of = wide_two_of<S>(p, at, i);
    const decode_part &part = p.parts[of.part];
    float *sum = total.of[of.m][of.n] + 2 * of.h;
    if (part.bias) {
      sum[0] += of.first ? part.bias[of.out] : 0.0f;
      sum[1] += of.second ? part.bias[of.out + 1] : 0.0f;
    }
    if (part.residual) sum[0] += ks_bf16_lo(residual[i]), sum[1] += ks_bf16_hi(residual[i]);
  }
}

KS_DEVICE void wide_store_two(float *y, float lo, float hi) {
  *(float2 *)(void *)y = make_float2(lo, hi);
}
KS_DEVICE void wide_store_two(ks_bf16 *y, float lo, float hi) {
  *(uint32_t *)(void *)y = ks_pack_bf16(lo, hi);
}
template <class Y> KS_DEVICE void wide_store(Y *y, float lo, float hi, const wide_two &of, bool pairs) {
  if (pairs) {
    if (of.first) wide_store_two(y + of.at, lo, hi);
    return;
  }
  if (of.first) y[of.at] = ks_from_float<Y>(lo);
  if (of.second) y[of.at + 1] = ks_from_float<Y>(hi);
}

template <class S, class Y>
KS_DEVICE void wide_finish(const wide_sums<S> &total, const decode_args &p, const wide_place &at) {
  Y *y = (Y *)p.parts[at.of.part[0]].y;
  const bool pairs = wide_pairs(at, y);
#pragma unroll
  for (int i = 0; i < 2 * S::MI * S::NI; i++) {
    const wide_two of = wide_two_of<S>(p, at, i);
    wide_store(y, total.of[of.m][of.n][2 * of.h], total.of[of.m][of.n][2 * of.h + 1], of, pairs);
  }
}

/* silu(gate) up, both rounded as they would be in memory. */
KS_DEVICE float wide_swiglu_of(float gate, float up) {
  const float z = ks_to_float(ks_from_float<ks_bf16>(gate));
  return z * swiglu_sigmoid_of<ks_bf16>(z).s * ks_to_float(ks_from_float<ks_bf16>(up));
}
template <class S>
KS_DEVICE void wide_finish_swiglu(const wide_sums<S> &total, const decode_args &p, const wide_place &at) {
  const bool pairs = wide_pairs(at, p.h);
#pragma unroll
  for (int i = 0; i < 2 * S::MI * S::NI; i++) {
    const wide_two of = wide_two_of<S>(p, at, i);
    if (of.n >= S::NI / 2) continue; /* up's */
    const float *gate = total.of[of.m][of.n] + 2 * of.h, *up = total.of[of.m][of.n + S::NI / 2] + 2 * of.h;
    wide_store(p.h, wide_swiglu_of(gate[0], up[0]), wide_swiglu_of(gate[1], up[1]), of, pairs);
  }
}

/* ---------------------------------------------------------------- the kernel */

template <class S> KS_DEVICE wide_place wide_place_of(const decode_args &p) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP;
  wide_place at;
  at.swiglu = p.h != NULL;
  at.of = decode_halves_of(p, blockIdx.x, S::N, at.swiglu);
  at.row0 = warp / S::WARPS_N * 16 * S::MI;
  at.line0 = warp % S::WARPS_N * 8 * S::NI;
  at.g = lane / 4;
  at.t = lane % 4;
  at.out0 = (int)at.of.n0[0] + (at.swiglu ? at.line0 / 2 : at.line0);
  at.n_out = (int)p.parts[at.of.part[0]].w.n_out;
  return at;
}

/* The stages, after those that fill the rings. Stage s of x (and W) lies in ring place s % STAGES. */
template <class S>
KS_DEVICE void wide_run(wide_sums<S> &total, wide_cursor &next, ks_bf16 *xs, ks_bf16 *ws,
                        const decode_args &p, const wide_place &at) {
  const int n_stages = (int)((p.n_in + WIDE_K - 1) / WIDE_K);
  wide_runs runs = {(int)((p.n_in + 31) / 32), p.run / 32};
  wide_sums<S> acc = {};
  int now = 0, last = S::STAGES - 1;
  for (int s = 0; s < n_stages; s++) {
    ks_cp_async_wait<S::STAGES - 2>();
    __syncthreads();
    wide_issue<S>(next, xs + last * S::X, ws + last * S::W, p, at);
    wide_stage<S>(total, acc, runs, xs + now * S::X, ws + now * S::W, p, at);
    last = now;
    now = now + 1 < S::STAGES ? now + 1 : 0;
  }
}

/* The same with codes: those of the next stages in registers, W of this stage and of the next in shared memory. */
template <class S>
KS_DEVICE void wide_run_codes(wide_sums<S> &total, wide_cursor &next, wide_codes<S> (&codes)[WIDE_CODES],
                              ks_bf16 *xs, ks_bf16 *ws, const float *lut, const decode_args &p,
                              const wide_place &at) {
  const int n_stages = (int)((p.n_in + WIDE_K - 1) / WIDE_K), dtype = p.parts[0].w.dtype;
  wide_runs runs = {(int)((p.n_in + 31) / 32), p.run / 32};
  wide_sums<S> acc = {};
  int now = 0, last = S::STAGES - 1;
  __syncthreads(); /* lut */
  wide_store_codes<S>(ws, codes[0], dtype, lut);
  wide_load_codes<S>(&codes[0], p, at, WIDE_CODES * WIDE_K);
  for (int s0 = 0; s0 < n_stages; s0 += WIDE_CODES)
#pragma unroll
    for (int d = 0; d < WIDE_CODES; d++) {
      const int s = s0 + d;
      if (s >= n_stages) break;
      ks_cp_async_wait<S::STAGES - 2>();
      __syncthreads();
      wide_issue<S>(next, xs + last * S::X, ws, p, at);
      wide_store_codes<S>(ws + (d + 1) % 2 * S::W, codes[(d + 1) % WIDE_CODES], dtype, lut);
      wide_load_codes<S>(&codes[(d + 1) % WIDE_CODES], p, at, (s + 1 + WIDE_CODES) * WIDE_K);
      wide_stage<S>(total, acc, runs, xs + now * S::X, ws + d % 2 * S::W, p, at);
      last = now;
      now = now + 1 < S::STAGES ? now + 1 : 0;
    }
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS_SM)
    linear_wide_kernel(const __grid_constant__ decode_args p) {
  ks_smem smem;
  ks_bf16 *xs = ks_smem_take<ks_bf16>(&smem, S::STAGES * S::X),
          *ws = ks_smem_take<ks_bf16>(&smem, S::W_STAGES * S::W);
  float *lut = ks_smem_take<float>(&smem, 16);
  const wide_place at = wide_place_of<S>(p);
  wide_cursor next = wide_cursor_of<S>(p, at);
  wide_codes<S> codes[WIDE_CODES];
  if constexpr (S::BLOCKS) {
    if (threadIdx.x < 16) lut[threadIdx.x] = p.parts[0].w.lut[threadIdx.x];
#pragma unroll
    for (int d = 0; d < WIDE_CODES; d++)
      wide_load_codes<S>(&codes[d], p, at, d * WIDE_K);
  }
#pragma unroll 1
  for (int s = 0; s < S::STAGES - 1; s++)
    wide_issue<S>(next, xs + s * S::X, ws + (S::BLOCKS ? 0 : s * S::W), p, at);
  wide_sums<S> term = {}, total = {};
  if (p.adapters.max_rank > 0) wide_all_terms<S, S::TERMS>(term, p, at, 0);
  if constexpr (S::BLOCKS)
    wide_run_codes<S>(total, next, codes, xs, ws, lut, p, at);
  else
    wide_run<S>(total, next, xs, ws, p, at);
  wide_add<S>(total, term);
#pragma unroll 1
  for (int r0 = LORA_GROUP; r0 < p.adapters.max_rank; r0 += LORA_GROUP) {
    wide_all_terms<S, 1>(term, p, at, r0);
    wide_add<S>(total, term);
  }
  wide_add_last<S>(total, p, at);
  if (at.swiglu)
    wide_finish_swiglu<S>(total, p, at);
  else if (p.y_is_f32)
    wide_finish<S, float>(total, p, at);
  else
    wide_finish<S, ks_bf16>(total, p, at);
}

/* ---------------------------------------------------------------- launches */

template <class S> static ks_status launch(ks_ctx *ctx, const decode_args *p) {
  return ks_launch(ctx, "linear: up to 64 rows", linear_wide_kernel<S>, dim3((unsigned)p->n_tiles),
                   dim3(S::THREADS), S::bytes(), *p);
}
template <int NT, bool BLOCKS> static ks_status launch_rows(ks_ctx *ctx, const decode_args *p) {
  if (p->n_rows <= 16) return launch<wide_shape<1, NT, BLOCKS>>(ctx, p);
  return p->n_rows <= 32 ? launch<wide_shape<2, NT, BLOCKS>>(ctx, p)
                         : launch<wide_shape<4, NT, BLOCKS>>(ctx, p);
}
template <bool BLOCKS> static ks_status launch_tile(ks_ctx *ctx, const decode_args *p, int tile) {
  return tile == 64 ? launch_rows<4, BLOCKS>(ctx, p) : launch_rows<2, BLOCKS>(ctx, p);
}

int ks_decode_wide_tile(ks_ctx *ctx, int64_t n_out) {
  return (n_out + 63) / 64 * 2 >= ks_cuda_device_of(ctx)->n_sm ? 64 : 32;
}

ks_status ks_decode_wide(ks_ctx *ctx, const decode_args *p, int tile) {
  return p->parts[0].w.scales ? launch_tile<true>(ctx, p, tile) : launch_tile<false>(ctx, p, tile);
}
