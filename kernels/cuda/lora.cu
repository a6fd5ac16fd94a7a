/* Adapters of a batch: description, dropout masks, and the last sum of gradients.
 *
 * The host cuts every segment, from its first row on, into tiles and chunks of fixed size and stages the
 * lists: kernels take a piece a block, whichever segment it is of, so one launch serves all adapters, and
 * what a segment's result is made of does not depend on the batch around it.
 *
 * Mask (ks_linear_args in ops.h). One Philox block gives eight elements, a byte of the mask: with i the row
 * in its segment and S the bytes of a row, byte b of the row comes from counter i * S + b. A pass makes the
 * mask once, every kernel of it reads bits: 1/8 byte an element beside the 2 of x.
 *   Operations: about 70 integer instructions a byte; bytes: n_rows * S written.
 *   H200, computed: a byte costs about 70 / (132 SM * 128 lanes * 1.98 GHz) = 2.1 ps; 4096 rows of 2048 columns: 2.2 us beside
 *   43 us of the product.
 *
 * Sum of gradients: grad[r, c] += ((p_0 + p_1) + p_2) + ..., p_k the partial sum over chunk k. Segments of one chunk were
 * added by the gradient kernel itself. Bytes: 4 rank n_cols (n_chunks + 2).
 *
 * Determinism: fixed order; integers otherwise.
 *
 * Ladder
 *   mask in a launch of its own, four bytes a thread. Not measured yet on its own.
 *   Next, not built: drawn inside shrink (forward), exchanging bytes between lanes: saves a launch and 1/8 byte an element. */
#include "kernels/cuda/linear.cuh"

#include "kernels/base/rng.h"
#include "kernels/base/size.h"
#include <stdlib.h>

enum { MASK_THREADS = 128, COMBINE_THREADS = 128 };

/* ---------------------------------------------------------------- description */

static bool has_adapter(const ks_linear_args *a, const ks_segment *seg) {
  return seg->adapter >= 0 && a->loras[seg->adapter].rank > 0 && seg->n_rows > 0;
}

/* Cuts a segment into pieces of `size` rows; returns how many. */
static int32_t cut(lora_item *items, const ks_segment *seg, int32_t number, int64_t size) {
  int32_t n = 0;
  for (int64_t row = 0; row < seg->n_rows; row += size, n++) {
    const int64_t rest = seg->n_rows - row;
    items[n].row = seg->row_begin + row;
    items[n].n_rows = (int32_t)(rest < size ? rest : size);
    items[n].seg = number;
  }
  return n;
}

/* Room for the arrays of a batch, one after another. */
typedef struct {
  lora_seg *segs;
  lora_item *tiles, *chunks;
  int32_t *first_seg;
  size_t bytes;
} host_batch;

static ks_status reserve(const ks_linear_args *a, const lora_batch *b, host_batch *h) {
  const size_t n_segs = (size_t)b->n_segs, n_items = (size_t)(b->n_tiles + b->n_chunks),
               n_spans = (size_t)((a->n_rows + LORA_SPAN_ROWS - 1) / LORA_SPAN_ROWS);
  uint8_t *room = NULL;
  h->bytes = n_segs * sizeof(lora_seg) + n_items * sizeof(lora_item) + n_spans * sizeof(int32_t);
  KS_TRY(ks_alloc_array(&room, h->bytes, 1, "linear: description of adapters"));
  h->segs = (lora_seg *)(void *)room;
  h->tiles = (lora_item *)(void *)(h->segs + n_segs);
  h->chunks = h->tiles + b->n_tiles;
  h->first_seg = (int32_t *)(void *)(h->chunks + b->n_chunks);
  return KS_OK;
}

static void describe(const ks_linear_args *a, const lora_batch *b, const host_batch *h) {
  int32_t n = 0, n_tiles = 0, n_chunks = 0;
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *from = &a->segments[s];
    if (!has_adapter(a, from)) continue;
    const ks_lora *l = &a->loras[from->adapter];
    lora_seg *to = &h->segs[n];
    *to = {from->row_begin, from->n_rows, from->dropout_key, a->dropout_site, l->a,     l->b_t,
           l->grad_a,       l->grad_b_t,  l->rank,           l->scale,        n_chunks, 0};
    n_tiles += cut(h->tiles + n_tiles, from, n, LORA_TILE_ROWS);
    to->n_chunks = cut(h->chunks + n_chunks, from, n, LORA_CHUNK_ROWS);
    n_chunks += to->n_chunks;
    n++;
  }
  for (int64_t s = n; s < b->n_segs; s++)
    h->segs[s].row_begin = a->n_rows;
  int32_t first = 0;
  for (int64_t row = 0, span = 0; row < a->n_rows; row += LORA_SPAN_ROWS, span++) {
    while (first < n && h->segs[first].row_begin + h->segs[first].n_rows <= row)
      first++;
    h->first_seg[span] = first;
  }
}

ks_status ks_lora_describe(ks_ctx *ctx, const ks_linear_args *a, lora_batch *out) {
  *out = {};
  for (int64_t s = 0; s < a->n_segments; s++)
    if (has_adapter(a, &a->segments[s]) && a->loras[a->segments[s].adapter].rank > out->max_rank)
      out->max_rank = a->loras[a->segments[s].adapter].rank;
  if (out->max_rank == 0) return KS_OK;
  out->n_rows = a->n_rows;
  out->n_segs = a->n_segments;
  out->n_tiles = a->n_rows / LORA_TILE_ROWS + a->n_segments;
  out->n_chunks = a->n_rows / LORA_CHUNK_ROWS + a->n_segments;
  out->u_stride = a->u_stride;
  const double t = (double)a->dropout * 65536 + 0.5;
  out->threshold = t < 65535 ? (uint32_t)t : 65535u;
  out->keep = (float)(65536.0 / (65536 - (double)out->threshold));
  out->has_dropout = a->dropout > 0;
  out->mask_stride = (a->w->n_in + 127) / 128 * 16;
  host_batch h;
  KS_TRY(reserve(a, out, &h));
  describe(a, out, &h);
  const void *device = NULL;
  const ks_status status = ks_cuda_stage(ctx, h.segs, h.bytes, &device);
  free(h.segs);
  KS_TRY(status);
  out->segs = (const lora_seg *)device;
  out->tiles = (const lora_item *)(const void *)(out->segs + out->n_segs);
  out->chunks = out->tiles + out->n_tiles;
  out->first_seg = (const int32_t *)(const void *)(out->chunks + out->n_chunks);
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

static __global__ void __launch_bounds__(MASK_THREADS) lora_mask_kernel(lora_batch b, uint32_t *mask) {
  const lora_item tile = b.tiles[blockIdx.x];
  if (tile.n_rows == 0) return;
  const lora_seg &seg = b.segs[tile.seg];
  const uint64_t key = seg.key, site = seg.site;
  const int64_t first = tile.row - seg.row_begin;
  const uint32_t words = (uint32_t)(b.mask_stride / 4), n = (uint32_t)tile.n_rows * words;
  const uint32_t threshold = b.threshold;
  for (uint32_t i = threadIdx.x; i < n; i += MASK_THREADS) {
    const uint32_t row = i / words, word = i % words;
    const uint64_t counter = (uint64_t)((first + row) * b.mask_stride) + 4 * word;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
      bits |= mask_byte(ks_philox(key, site, counter + (uint64_t)j), threshold) << (8 * j);
    mask[(tile.row + row) * words + word] = bits;
  }
}

size_t ks_lora_mask_bytes(const lora_batch *b) {
  return b->max_rank > 0 && b->has_dropout ? ((size_t)(b->n_rows * b->mask_stride) + 255) / 256 * 256 : 0;
}

ks_status ks_lora_make_mask(ks_ctx *ctx, lora_batch *b, uint8_t *mask) {
  if (b->max_rank == 0 || !b->has_dropout) return KS_OK;
  b->mask = mask;
  return ks_launch(ctx, "linear: dropout mask", lora_mask_kernel, dim3((unsigned)b->n_tiles),
                   dim3(MASK_THREADS), 0, *b, (uint32_t *)(void *)mask);
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
