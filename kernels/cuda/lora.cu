/* Adapters of a batch: description, dropout masks, and the last sum of gradients.
 *
 * The host cuts every segment, from its first row on, into tiles and chunks of fixed size and stages the lists, once for all maps
 * of one input: kernels take a piece a block, whichever segment it is of, so one launch serves all adapters, and what a
 * segment's result is made of does not depend on the batch around it.
 *
 * Mask (ks_linear_args in ops.h). One Philox block gives eight elements, a byte of the mask: with i the row
 * in its segment and S the bytes of a row, byte b of the row comes from counter i * S + b. A pass makes the
 * masks of all maps in one launch, every kernel of it reads bits: 1/8 byte an element beside the 2 of x.
 *   Instructions a byte (disassembly, sm_90): 65, of them 41 for the units of logic and compares, 64 a clock and SM, and 18 wide
 *   products for those of fma. Bytes: n_rows * S written.
 *   H200, computed: a byte costs 41 / (132 SM * 64 * 1.98 GHz) = 2.5 ps, a map of 3200 columns 16 us at 16384 rows, 2 at 2048;
 *   predicted 20 and 3.
 *
 * Sum of gradients (of linear_simt.cu): grad[r, c] += ((p_0 + p_1) + p_2) + ..., p_k the partial sum over
 * chunk k. Segments of one chunk were added by the gradient kernel itself. Bytes: 4 rank n_cols (n_chunks +
 * 2).
 *
 * Both: 32 registers, 128 threads, 16 blocks an SM (sm_90), no shared memory.
 *
 * Determinism: fixed order; integers otherwise.
 *
 * Ladder
 *   v1  masks in a launch of their own, four bytes a thread: 83 instructions a byte, 59 of them for logic and compares.
 *   v2  32-bit products said as such (ks_rng_product). Neither measured yet on its own.
 *   Next, not built: drawn inside shrink (forward): saves a launch and 1/8 byte an element. */
#include "kernels/cuda/lora.cuh"

#include "kernels/base/rng.h"
#include "kernels/base/size.h"
#include <stdlib.h>

enum { MASK_THREADS = 128, MASK_ROWS = 8, COMBINE_THREADS = 128 };

/* ---------------------------------------------------------------- description */

static int32_t rank_of(const ks_linear_args *a, int64_t segment) {
  const int32_t adapter = a->n_segments > 0 ? a->segments[segment].adapter : -1;
  return adapter >= 0 && a->segments[segment].n_rows > 0 ? a->loras[adapter].rank : 0;
}

static bool has_adapter(const ks_linear_args *parts, int64_t n, int64_t segment) {
  for (int64_t i = 0; i < n; i++)
    if (rank_of(&parts[i], segment) > 0) return true;
  return false;
}

/* Cuts rows [row, end) into pieces of `size`; returns how many. */
static int32_t cut(lora_item *items, int64_t row, int64_t end, int32_t number, int64_t size) {
  int32_t n = 0;
  for (; row < end; row += size, n++) {
    items[n].row = row;
    items[n].n_rows = (int32_t)(end - row < size ? end - row : size);
    items[n].seg = number;
  }
  return n;
}

/* The arrays of a group, one after another. */
typedef struct {
  lora_seg *segs; /* [maps, n_segs] */
  lora_item *tiles, *chunks;
  int32_t *first_seg;
  size_t n_spans, n_counters, bytes;
} host_group;

/* Of the kernel that needs the most: shrink counts slices of k, the gradient chunks. */
static size_t count_counters(const ks_linear_args *parts, const lora_group *g) {
  int64_t eights = 0, cols = parts->w->n_in;
  for (int64_t i = 0; i < g->n; i++) {
    eights += lora_units(g->of[i].max_rank, 8);
    cols = ks_max_i64(cols, parts[i].w->n_out);
  }
  const int64_t shrink = g->n * LORA_TILE_HALVES * g->of[0].n_tiles,
                gradient = (g->n + 1) * g->of[0].n_segs * ((cols + LORA_SLICE - 1) / LORA_SLICE);
  return (size_t)(ks_max_i64(shrink, gradient) * lora_blocks_of((int32_t)eights));
}

static ks_status reserve(const ks_linear_args *parts, const lora_group *g, host_group *h) {
  const lora_batch *b = &g->of[0];
  const size_t n_segs = (size_t)(b->n_segs * g->n), n_items = (size_t)(1 + b->n_tiles + b->n_chunks);
  uint8_t *room = NULL;
  h->n_spans = (size_t)((b->n_rows + LORA_SPAN_ROWS - 1) / LORA_SPAN_ROWS);
  h->n_counters = count_counters(parts, g);
  h->bytes = n_segs * sizeof(lora_seg) + n_items * sizeof(lora_item) + h->n_spans * sizeof(int32_t) +
             h->n_counters * sizeof(uint32_t);
  KS_TRY(ks_alloc_array(&room, h->bytes, 1, "linear: description of adapters"));
  h->segs = (lora_seg *)(void *)room;
  h->tiles = (lora_item *)(void *)(h->segs + n_segs) + 1;
  h->chunks = h->tiles + b->n_tiles;
  h->first_seg = (int32_t *)(void *)(h->chunks + b->n_chunks);
  return KS_OK;
}

static void describe_map(const ks_linear_args *a, int64_t segment, lora_seg *to) {
  const int32_t rank = rank_of(a, segment);
  to->site = a->dropout_site;
  if (rank == 0) return;
  const ks_lora *l = &a->loras[a->segments[segment].adapter];
  to->a = l->a, to->b_t = l->b_t, to->grad_a = l->grad_a, to->grad_b_t = l->grad_b_t;
  to->rank = rank, to->scale = l->scale;
}

static void describe_spans(const lora_batch *b, const host_group *h, int32_t n) {
  int32_t first = 0;
  for (size_t span = 0; span < h->n_spans; span++) {
    const int64_t row = (int64_t)span * LORA_SPAN_ROWS;
    while (first < n && h->segs[first].row_begin + h->segs[first].n_rows <= row)
      first++;
    h->first_seg[span] = first;
  }
  for (int64_t s = n; s < b->n_segs; s++)
    h->segs[s].row_begin = b->n_rows;
}

static void describe(const ks_linear_args *parts, const ks_linear_args *with, const lora_group *g,
                     const host_group *h) {
  const lora_batch *b = &g->of[0];
  int32_t n = 0, n_tiles = 0, n_chunks = 0;
  int64_t end = 0;
  for (int64_t s = 0; s < with->n_segments; s++) {
    const ks_segment *from = &with->segments[s];
    if (!has_adapter(parts, g->n, s)) continue;
    lora_seg common = {};
    common.row_begin = from->row_begin, common.n_rows = from->n_rows, common.key = from->dropout_key;
    common.first_chunk = n_chunks;
    n_tiles += cut(h->tiles + n_tiles, end, from->row_begin, -1, LORA_TILE_ROWS);
    end = from->row_begin + from->n_rows;
    n_tiles += cut(h->tiles + n_tiles, from->row_begin, end, n, LORA_TILE_ROWS);
    common.n_chunks = cut(h->chunks + n_chunks, from->row_begin, end, n, LORA_CHUNK_ROWS);
    n_chunks += common.n_chunks;
    for (int64_t i = 0; i < g->n; i++) {
      lora_seg *to = &h->segs[i * b->n_segs + n];
      *to = common;
      describe_map(&parts[i], s, to);
    }
    n++;
  }
  n_tiles += cut(h->tiles + n_tiles, end, b->n_rows, -1, LORA_TILE_ROWS);
  h->tiles[-1].row = n_tiles;
  describe_spans(b, h, n);
  for (int64_t i = 1; i < g->n; i++)
    for (int64_t s = n; s < b->n_segs; s++)
      h->segs[i * b->n_segs + s].row_begin = b->n_rows;
}

static void count(const ks_linear_args *with, lora_batch *b) {
  b->n_rows = with->n_rows;
  b->n_segs = with->n_segments;
  b->n_tiles = with->n_rows / LORA_TILE_ROWS + 2 * with->n_segments + 1;
  b->n_chunks = with->n_rows / LORA_CHUNK_ROWS + with->n_segments;
  const double t = (double)with->dropout * 65536 + 0.5;
  b->threshold = t < 65535 ? (uint32_t)t : 65535u;
  b->keep = (float)(65536.0 / (65536 - (double)b->threshold));
  b->has_dropout = with->dropout > 0;
  b->mask_stride = (with->w->n_in + 127) / 128 * 16;
}

ks_status ks_lora_describe_group(ks_ctx *ctx, const ks_linear_args *parts, int64_t n, lora_group *g) {
  const ks_linear_args *with = parts;
  *g = {};
  g->n = n;
  for (int64_t i = 0; i < n; i++) {
    for (int64_t s = 0; s < parts[i].n_segments; s++)
      if (rank_of(&parts[i], s) > g->of[i].max_rank) g->of[i].max_rank = rank_of(&parts[i], s);
    if (g->of[i].max_rank > 0) with = &parts[i], g->any = true;
  }
  if (!g->any) return KS_OK;
  for (int64_t i = 0; i < n; i++) {
    count(with, &g->of[i]);
    g->of[i].u_stride = parts[i].u_stride;
  }
  host_group h;
  KS_TRY(reserve(parts, g, &h));
  describe(parts, with, g, &h);
  const void *device = NULL;
  const ks_status status = ks_cuda_stage(ctx, h.segs, h.bytes, &device);
  free(h.segs);
  KS_TRY(status);
  for (int64_t i = 0; i < n; i++) {
    lora_batch *b = &g->of[i];
    b->segs = (const lora_seg *)device + i * b->n_segs;
    b->tiles = (const lora_item *)(const void *)((const lora_seg *)device + n * b->n_segs) + 1;
    b->chunks = b->tiles + b->n_tiles;
    b->first_seg = (const int32_t *)(const void *)(b->chunks + b->n_chunks);
    b->counters = (uint32_t *)(uintptr_t)(b->first_seg + h.n_spans);
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- masks */

/* Bit q: whether half q % 2 of word q / 2 reaches the threshold. */
KS_DEVICE uint32_t mask_byte(const ks_philox_block &p, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int q = 0; q < 8; q++)
    bits |= (uint32_t)((p.v[q / 2] >> (q % 2 * 16) & 0xffffu) >= threshold) << q;
  return bits;
}

struct lora_masks {
  const lora_seg *segs[KS_LINEARS_MAX];
  uint32_t *mask[KS_LINEARS_MAX];
  const lora_item *tiles;
  int64_t words; /* of a row */
  uint64_t threshold;
};

static __global__ void __launch_bounds__(MASK_THREADS)
    lora_mask_kernel(const __grid_constant__ lora_masks p) {
  const lora_item tile = p.tiles[blockIdx.x];
  const int first_row = (int)blockIdx.y * MASK_ROWS, map = (int)blockIdx.z;
  if (tile.seg < 0 || tile.n_rows <= first_row || !p.mask[map]) return;
  const lora_seg &seg = p.segs[map][tile.seg];
  if (seg.rank == 0) return;
  const uint64_t key = seg.key, site = seg.site;
  const int64_t row0 = tile.row + first_row, first = row0 - seg.row_begin;
  const int n_rows = tile.n_rows - first_row < MASK_ROWS ? tile.n_rows - first_row : MASK_ROWS;
  const uint32_t words = (uint32_t)p.words, n = (uint32_t)n_rows * words, threshold = (uint32_t)p.threshold;
  for (uint32_t i = threadIdx.x; i < n; i += MASK_THREADS) {
    const uint64_t counter = 4 * ((uint64_t)first * words + i);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
      bits |= mask_byte(ks_philox(key, site, counter + (uint64_t)j), threshold) << (8 * j);
    p.mask[map][row0 * words + i] = bits;
  }
}

static size_t mask_bytes_of(const lora_batch *b) {
  return b->max_rank > 0 && b->has_dropout ? ((size_t)(b->n_rows * b->mask_stride) + 255) / 256 * 256 : 0;
}

size_t ks_lora_mask_bytes(const lora_group *g) {
  size_t bytes = 0;
  for (int64_t i = 0; i < g->n; i++)
    bytes += mask_bytes_of(&g->of[i]);
  return bytes;
}

ks_status ks_lora_make_masks(ks_ctx *ctx, lora_group *g, uint8_t *mask) {
  if (ks_lora_mask_bytes(g) == 0) return KS_OK;
  lora_masks p = {};
  for (int64_t i = 0; i < g->n; i++) {
    if (g->of[i].max_rank == 0) continue;
    g->of[i].mask = mask;
    p.segs[i] = g->of[i].segs;
    p.mask[i] = (uint32_t *)(void *)mask;
    mask += mask_bytes_of(&g->of[i]);
  }
  p.tiles = g->of[0].tiles;
  p.words = g->of[0].mask_stride / 4;
  p.threshold = g->of[0].threshold;
  const dim3 grid((unsigned)g->of[0].n_tiles, LORA_TILE_ROWS / MASK_ROWS, (unsigned)g->n);
  return ks_launch(ctx, "linear: dropout masks", lora_mask_kernel, grid, dim3(MASK_THREADS), 0, p);
}

/* ---------------------------------------------------------------- sum of partial gradients */

static __global__ void __launch_bounds__(COMBINE_THREADS)
    lora_combine_kernel(const __grid_constant__ lora_gradient_args p) {
  const lora_seg &seg = p.batch.segs[blockIdx.x];
  const int64_t col = (int64_t)blockIdx.z * COMBINE_THREADS + threadIdx.x, r = blockIdx.y;
  if (seg.n_chunks < 2 || r >= seg.rank || col >= p.n_cols) return;
  const float *partial = p.partial + ((int64_t)seg.first_chunk * p.batch.max_rank + r) * p.n_cols + col;
  const int64_t step = (int64_t)p.batch.max_rank * p.n_cols;
  float sum = partial[0];
  for (int k = 1; k < seg.n_chunks; k++)
    sum += partial[k * step];
  (p.of_a ? seg.grad_a : seg.grad_b_t)[r * p.n_cols + col] += sum;
}

size_t ks_lora_partial_bytes(const lora_batch *b, int64_t n_cols) {
  return ((size_t)b->n_chunks * (size_t)b->max_rank * (size_t)n_cols * sizeof(float) + 255) / 256 * 256;
}

ks_status ks_lora_combine(ks_ctx *ctx, const char *op, const lora_gradient_args *p) {
  const dim3 grid((unsigned)p->batch.n_segs, (unsigned)p->batch.max_rank,
                  ks_blocks_for(p->n_cols, COMBINE_THREADS));
  if (p->batch.n_rows <= LORA_CHUNK_ROWS) return KS_OK; /* every segment is of one chunk */
  return ks_launch(ctx, op, lora_combine_kernel, grid, dim3(COMBINE_THREADS), 0, *p);
}
