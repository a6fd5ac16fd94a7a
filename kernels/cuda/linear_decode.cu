/* Generation passes: which kernels a call of linear layers is made of, and their adapters (see linear_decode.cuh).
 *
 *   up to 8 rows, bf16 weights,  [u of all parts] -> norm, products, adapters, bias, residual, SwiGLU or rope
 *   rows of 16 bytes
 *   up to 64 rows                 [norm] -> [u of all parts] -> products, adapters, bias, residual, SwiGLU -> [rope]
 *   else                          [norm] -> [u of all parts] -> each part's product and adapters -> [SwiGLU or rope]
 *
 * Each arrow is a launch; brackets: where there is one. Adapters are staged once a call; for more than 64 rows a
 * second time, as linear_mma.cu sees them. No kernel is here: bytes, FLOPs, predicted times and ladders are those
 * of linear_decode_few.cu, linear_decode_wide.cu and linear_decode_shrink.cu (more rows: linear_mma.cu), the
 * sums' order that of linear_decode.cuh. */
#include "kernels/cuda/linear_decode.cuh"
#include "kernels/cuda/rope.cuh"

#include "kernels/base/size.h"
#include <stdlib.h>

/* ---------------------------------------------------------------- adapters */

static const ks_lora *lora_of(const ks_linear_args *part, int64_t s) {
  static const ks_lora none = {};
  if (s >= part->n_segments || part->segments[s].adapter < 0) return &none;
  return &part->loras[part->segments[s].adapter];
}

/* Segments are the same in all parts that have any. */
static const ks_linear_args *with_segments(const ks_linears_args *a) {
  for (int64_t i = 0; i < a->n_parts; i++)
    if (a->parts[i].n_segments > 0) return &a->parts[i];
  return &a->parts[0];
}

static void describe_segments(const ks_linear_args *with, int64_t item_rows, decode_rows *segs,
                              decode_rows *items) {
  for (int64_t s = 0; s < with->n_segments; s++) {
    const ks_segment *seg = &with->segments[s];
    segs[s] = {(int32_t)seg->row_begin, (int32_t)seg->n_rows, (int32_t)s, 0};
    for (int64_t row = 0; seg->adapter >= 0 && row < seg->n_rows; row += item_rows)
      *items++ = {(int32_t)(seg->row_begin + row), (int32_t)ks_min_i64(item_rows, seg->n_rows - row),
                  (int32_t)s, 0};
  }
}

static ks_status describe_adapters(ks_ctx *ctx, const ks_linears_args *a, int64_t item_rows,
                                   decode_adapters *out) {
  const ks_linear_args *with = with_segments(a);
  const int64_t n_segs = with->n_segments, n_items = with->n_rows / item_rows + n_segs;
  *out = {};
  for (int64_t i = 0; i < a->n_parts; i++)
    for (int64_t s = 0; s < n_segs; s++)
      if (with->segments[s].n_rows > 0) out->max_rank = max(out->max_rank, lora_of(&a->parts[i], s)->rank);
  if (out->max_rank == 0) return KS_OK;
  out->n_segs = n_segs;
  out->n_items = n_items;
  const size_t n_of = (size_t)(a->n_parts * n_segs), n_rows = (size_t)(n_segs + n_items),
               bytes = n_of * sizeof(decode_adapter) + n_rows * sizeof(decode_rows);
  decode_adapter *of = NULL;
  KS_TRY(ks_alloc_array((uint8_t **)&of, bytes, 1, "linear: adapters"));
  for (int64_t i = 0; i < a->n_parts; i++)
    for (int64_t s = 0; s < n_segs; s++) {
      const ks_lora *l = lora_of(&a->parts[i], s);
      of[i * n_segs + s] = {l->a, l->b_t, l->scale, l->rank};
    }
  decode_rows *segs = (decode_rows *)(void *)(of + n_of);
  describe_segments(with, item_rows, segs, segs + n_segs);
  const void *device = NULL;
  const ks_status status = ks_cuda_stage(ctx, of, bytes, &device);
  free(of);
  KS_TRY(status);
  out->of = (const decode_adapter *)device;
  out->segs = (const decode_rows *)(const void *)(out->of + n_of);
  out->items = out->segs + n_segs;
  return KS_OK;
}

/* ---------------------------------------------------------------- the call */

/* tile: outputs of one. */
static void describe_parts(const ks_linears_args *a, int tile, decode_args *p) {
  p->n_tiles = 0;
  for (int64_t i = 0; i < a->n_parts; i++) {
    const ks_linear_args *from = &a->parts[i];
    p->parts[i] = {ks_weight_view_of(from->w),
                   from->y,
                   from->residual,
                   ((const ks_cuda_weight *)from->w->impl)->bias,
                   (ks_bf16 *)from->u,
                   NULL,
                   from->u_stride,
                   p->n_tiles,
                   0};
    const int64_t outputs = a->swiglu ? tile / 2 : tile;
    if (i == 0 || !a->swiglu) p->n_tiles += (int32_t)((from->w->n_out + outputs - 1) / outputs);
  }
}

/* Whether the kernel for few rows may rotate and store what it makes. */
static bool rope_fits(const ks_linears_args *a) {
  const ks_rope_store_args *rope = a->rope;
  if (!rope || rope->n_rope == 0 || rope->rope[0].inverse) return false;
  for (int64_t i = 0; i < rope->n_rope + rope->n_store; i++) {
    const bool first = i < rope->n_rope;
    const void *x = first ? rope->rope[i].x : rope->store[i - rope->n_rope].x;
    for (int64_t j = first ? 0 : rope->n_rope; j < i; j++)
      if (x == (first ? rope->rope[j].x : rope->store[j - rope->n_rope].x)) return false;
  }
  return true;
}

static ks_status describe_rope(ks_ctx *ctx, const ks_linears_args *a, decode_args *p) {
  const ks_rope_store_args *rope = a->rope;
  const ks_rope_args *turn = &rope->rope[0];
  p->has_rope = 1;
  p->head_dim = turn->head_dim;
  p->n_tiles = 0;
  for (int64_t i = 0; i < a->n_parts; i++) {
    decode_part *part = &p->parts[i];
    for (int64_t j = 0; j < rope->n_rope; j++)
      if (rope->rope[j].x == part->y) part->turns = 1;
    for (int64_t j = 0; j < rope->n_store; j++)
      if (rope->store[j].x == part->y) part->to = rope->store[j].y;
    part->first_tile = p->n_tiles;
    p->n_tiles +=
        (int32_t)(part->turns ? part->w.n_out / p->head_dim * decode_tiles_of_head(p->head_dim, DECODE_TILE)
                              : (part->w.n_out + DECODE_TILE - 1) / DECODE_TILE);
  }
  KS_TRY(ks_rope_stage(ctx, turn->inv_freq, turn->head_dim, turn->positions, p->n_rows, &p->inv_freq,
                       &p->positions));
  const size_t bytes = rope->n_store ? (size_t)p->n_rows * sizeof *p->index : 0;
  return ks_cuda_stage(ctx, bytes ? rope->store[0].index : NULL, bytes, (const void **)&p->index);
}

static void describe_call(const ks_linears_args *a, decode_args *p) {
  const ks_linear_args *first = &a->parts[0];
  uintptr_t bits = (uintptr_t)first->x | (uintptr_t)(first->w->n_in * (int64_t)sizeof(ks_bf16));
  p->n_parts = (int32_t)a->n_parts;
  p->y_is_f32 = first->y_is_f32;
  p->n_in = first->w->n_in;
  p->n_rows = first->n_rows;
  p->x = (const ks_bf16 *)first->x;
  if (a->swiglu) p->h = (ks_bf16 *)a->swiglu->h;
  const int64_t steps = (p->n_in + 31) / 32;
  p->run = (int32_t)((steps + LINEAR_RUNS - 1) / LINEAR_RUNS * 32);
  for (int64_t i = 0; i < a->n_parts; i++)
    if (!ks_dtype_is_quantized(a->parts[i].w->dtype))
      bits |= (uintptr_t)((const ks_cuda_weight *)a->parts[i].w->impl)->values;
  p->aligned = bits % 16 == 0;
}

static void describe_norm(const ks_rmsnorm_args *norm, decode_args *p) {
  p->x = (const ks_bf16 *)norm->x;
  p->norm_w = norm->w;
  p->norm_threads = ks_norm_threads(p->n_in);
  p->eps = norm->eps;
  p->inverse = 1.0f / (float)p->n_in;
}

/* Whether one launch may make all parts. */
static bool alike(const ks_linears_args *a) {
  const ks_linear_args *first = &a->parts[0];
  for (int64_t i = 0; i < a->n_parts; i++)
    if (a->parts[i].w->dtype != first->w->dtype || a->parts[i].y_is_f32 != first->y_is_f32 ||
        a->parts[i].w->n_out > INT32_MAX / 16 || first->w->n_in > INT32_MAX / 16)
      return false;
  return !a->swiglu || !first->y_is_f32;
}

static ks_status run_few(ks_ctx *ctx, const ks_linears_args *a, decode_args *p) {
  describe_parts(a, DECODE_TILE, p);
  KS_TRY(describe_adapters(ctx, a, p->rows_at_once, &p->adapters));
  if (a->norm) describe_norm(a->norm, p);
  if (p->adapters.max_rank > 0) KS_TRY(ks_decode_shrink(ctx, p));
  const bool turns = rope_fits(a);
  if (turns) KS_TRY(describe_rope(ctx, a, p));
  KS_TRY(ks_decode_few(ctx, p));
  return a->rope && !turns ? ks_cuda_rope_store(ctx, a->rope) : KS_OK;
}

static ks_status run_wide(ks_ctx *ctx, const ks_linears_args *a, decode_args *p) {
  int64_t n_out = 0;
  for (int64_t i = 0; i < a->n_parts; i++)
    n_out += a->parts[i].w->n_out;
  const int tile = ks_decode_wide_tile(ctx, n_out);
  describe_parts(a, tile, p);
  KS_TRY(describe_adapters(ctx, a, ks_decode_item_rows(ctx, p), &p->adapters));
  if (p->adapters.max_rank > 0) KS_TRY(ks_decode_shrink(ctx, p));
  return ks_decode_wide(ctx, p, tile);
}

/* Each part's product and adapters by linear_mma.cu. */
static ks_status run_many(ks_ctx *ctx, const ks_linears_args *a, decode_args *p) {
  lora_group group;
  describe_parts(a, DECODE_TILE, p);
  KS_TRY(describe_adapters(ctx, a, DECODE_ITEM_ROWS, &p->adapters));
  if (p->adapters.max_rank > 0) KS_TRY(ks_decode_shrink(ctx, p));
  KS_TRY(ks_lora_describe_group(ctx, a->parts, a->n_parts, &group));
  for (int64_t i = 0; i < a->n_parts; i++) {
    const ks_linear_args *part = &a->parts[i];
    linear_product product = {};
    product.w = p->parts[i].w;
    product.x = part->x;
    product.y = part->y;
    product.residual = part->residual;
    product.bias = p->parts[i].bias;
    product.n_rows = part->n_rows;
    product.y_is_f32 = part->y_is_f32;
    product.generation = 1;
    KS_TRY(ks_mma_linear(ctx, "linear_forward", &product, &group.of[i], part->u));
  }
  return KS_OK;
}

static bool applies(const ks_ctx *ctx, const ks_linears_args *a) {
  if (ks_ctx_act_dtype(ctx) != KS_DTYPE_BF16 || ks_cuda_device_of(ctx)->major < 8 ||
      ks_cuda_variant_of(ctx, "linear_forward") == KS_CUDA_linear_forward_simt)
    return false;
  for (int64_t i = 0; i < a->n_parts; i++) {
    const ks_linear_args *p = &a->parts[i];
    if (!p->generation || p->dropout > 0 || p->w->n_in == 0 || p->w->n_out == 0 || p->n_rows > INT32_MAX / 2)
      return false;
  }
  return true;
}

/* What linear_decode_few.cu does not take: norm, products and SwiGLU. */
static ks_status run_rest(ks_ctx *ctx, const ks_linears_args *a, bool together, decode_args *p) {
  const ks_linears_args products = {a->parts, a->n_parts, NULL, NULL, NULL};
  if (a->norm) KS_TRY(ks_cuda_rmsnorm_forward(ctx, a->norm));
  if (p->n_rows <= LINEAR_FEW_ROWS && together) return run_wide(ctx, a, p);
  KS_TRY(run_many(ctx, &products, p));
  return a->swiglu ? ks_cuda_swiglu_forward(ctx, a->swiglu) : KS_OK;
}

ks_status ks_decode_linears(ks_ctx *ctx, const ks_linears_args *a, bool *taken) {
  decode_args p = {};
  *taken = applies(ctx, a);
  if (!*taken) return KS_OK;
  const bool together = alike(a);
  describe_call(a, &p);
  if (together && ks_decode_few_takes(ctx, a, &p)) return run_few(ctx, a, &p);
  KS_TRY(run_rest(ctx, a, together, &p));
  return a->rope ? ks_cuda_rope_store(ctx, a->rope) : KS_OK;
}
