/* Frozen weights on the device: host values of F32, BF16 or F16 become rows of F32 or BF16, or blocks
 * (kernels/quant.h).
 *
 * Rows are converted and uploaded a piece of at most PIECE bytes at a time, so that the host never holds a
 * second copy. W is kept as it is read, [n_out, n_in] row-major: forward multiplies by its transpose, the
 * input gradient by itself, and neither needs another layout. Bytes (w->bytes): codes or values, scales and
 * bias, as allocated. */
#include "kernels/cuda/weight.cuh"

#include "kernels/base/size.h"
#include <stdlib.h>
#include <string.h>

enum { PIECE = 4 << 20 };

/* ---------------------------------------------------------------- rows on the host */

static float value_at(const void *values, ks_dtype dtype, int64_t i) {
  if (dtype == KS_DTYPE_F32) return ((const float *)values)[i];
  const uint16_t h = ((const uint16_t *)values)[i];
  return dtype == KS_DTYPE_F16 ? ks_f16_to_float(h) : ks_bits_to_float((uint32_t)h << 16);
}

/* Room for a piece: rows of codes or values, their scales, and one row of floats. */
typedef struct {
  uint8_t *values;
  uint16_t *scales;
  float *row;
} piece;

static ks_status convert_row(const ks_weight_params *p, const ks_cuda_weight *impl, int64_t row, int64_t at,
                             piece *to) {
  uint8_t *out = to->values + at * impl->row_bytes;
  float *x = p->dtype == KS_DTYPE_F32 ? (float *)(void *)out : to->row;
  for (int64_t i = 0; i < p->n_in; i++)
    x[i] = value_at(p->values, p->values_dtype, row * p->n_in + i);
  for (int64_t i = 0; p->dtype == KS_DTYPE_BF16 && i < p->n_in; i++)
    ((uint16_t *)(void *)out)[i] = (uint16_t)ks_bf16_bits(x[i]);
  if (!ks_dtype_is_quantized(p->dtype)) return KS_OK;
  KS_TRY_AS(ks_quant_row(p->dtype, x, p->n_in, out, to->scales + at * impl->scales_per_row),
            "row %lld of a weight [%lld, %lld]", (long long)row, (long long)p->n_out, (long long)p->n_in);
  return KS_OK;
}

static ks_status upload_rows(ks_ctx *ctx, const ks_weight_params *p, const ks_cuda_weight *impl) {
  const int64_t row_bytes = impl->row_bytes > 0 ? impl->row_bytes : 1;
  const int64_t fit = PIECE / row_bytes, n_rows = fit < 1 ? 1 : fit < p->n_out ? fit : p->n_out;
  piece room = {};
  ks_status status = ks_alloc_array(&room.values, (size_t)(n_rows * row_bytes), 1, "weight: piece of rows");
  if (status == KS_OK && impl->scales)
    status = ks_alloc_array(&room.scales, (size_t)(n_rows * impl->scales_per_row), sizeof *room.scales,
                            "weight: scales");
  if (status == KS_OK)
    status = ks_alloc_array(&room.row, (size_t)p->n_in + 1, sizeof *room.row, "weight: row");
  for (int64_t row = 0; status == KS_OK && row < p->n_out; row += n_rows) {
    const int64_t n = p->n_out - row < n_rows ? p->n_out - row : n_rows;
    for (int64_t i = 0; status == KS_OK && i < n; i++)
      status = convert_row(p, impl, row + i, i, &room);
    if (status == KS_OK)
      status = ks_mem_upload(ctx, (uint8_t *)impl->values + row * impl->row_bytes, room.values,
                             (size_t)(n * impl->row_bytes));
    if (status == KS_OK && impl->scales)
      status = ks_mem_upload(ctx, (uint16_t *)impl->scales + row * impl->scales_per_row, room.scales,
                             (size_t)(n * impl->scales_per_row) * sizeof(uint16_t));
  }
  free(room.values);
  free(room.scales);
  free(room.row);
  return status;
}

static ks_status upload_bias(ks_ctx *ctx, const ks_weight_params *p, ks_cuda_weight *impl) {
  KS_TRY(ks_mem_upload(ctx, impl->bias, p->bias, (size_t)p->n_out * sizeof(float)));
  if (impl->bias_act == impl->bias) return KS_OK;
  uint16_t *rounded = NULL;
  KS_TRY(ks_alloc_array(&rounded, (size_t)p->n_out, sizeof *rounded, "weight: bias"));
  for (int64_t i = 0; i < p->n_out; i++)
    rounded[i] = (uint16_t)ks_bf16_bits(p->bias[i]);
  ks_status status = ks_mem_upload(ctx, impl->bias_act, rounded, (size_t)p->n_out * sizeof *rounded);
  free(rounded);
  return status;
}

/* ---------------------------------------------------------------- creation */

static ks_status check_types(const ks_ctx *ctx, const ks_weight_params *p) {
  const ks_dtype act = ks_ctx_act_dtype(ctx);
  if (ks_dtype_is_quantized(p->dtype) || p->dtype == act) return KS_OK;
  return KS_FAIL(KS_EUNSUPPORTED,
                 "ks_weight_create: a %s weight does not go with %s activations on a GPU; give a weight of "
                 "%s, q8_0, q4_0 or nf4",
                 ks_dtype_name(p->dtype), ks_dtype_name(act), ks_dtype_name(act));
}

static ks_status reserve(ks_ctx *ctx, ks_weight *w, int64_t bytes, void **out) {
  if (bytes == 0) return KS_OK;
  KS_TRY_AS(ctx->backend->mem_alloc(ctx, (size_t)bytes, out), "weight [%lld, %lld] of %s",
            (long long)w->n_out, (long long)w->n_in, ks_dtype_name(w->dtype));
  w->bytes += (size_t)bytes;
  return KS_OK;
}

static ks_status fill(ks_ctx *ctx, const ks_weight_params *p, ks_weight *w, ks_cuda_weight *impl) {
  const bool blocks = ks_dtype_is_quantized(p->dtype);
  impl->row_bytes =
      blocks ? ks_quant_row_bytes(p->dtype, p->n_in) : p->n_in * (int64_t)ks_dtype_size(p->dtype);
  impl->scales_per_row = ks_quant_row_scales(p->dtype, p->n_in);
  KS_TRY(reserve(ctx, w, p->n_out * impl->row_bytes, &impl->values));
  KS_TRY(reserve(ctx, w, p->n_out * impl->scales_per_row * (int64_t)sizeof(uint16_t), &impl->scales));
  if (p->n_in > 0 && p->n_out > 0) KS_TRY(upload_rows(ctx, p, impl));
  if (!p->bias || p->n_out == 0) return KS_OK;
  void *bias = NULL;
  KS_TRY(reserve(ctx, w, p->n_out * (int64_t)sizeof(float), &bias));
  impl->bias = (float *)bias;
  impl->bias_act = bias;
  if (ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16) {
    impl->bias_act = NULL;
    KS_TRY(reserve(ctx, w, p->n_out * (int64_t)sizeof(uint16_t), &impl->bias_act));
  }
  return upload_bias(ctx, p, impl);
}

extern "C" ks_status ks_cuda_weight_create(ks_ctx *ctx, const ks_weight_params *p, ks_weight *w) {
  ks_cuda_weight *impl = NULL;
  KS_TRY(check_types(ctx, p));
  KS_TRY(ks_alloc_array(&impl, 1, sizeof *impl, "weight"));
  w->impl = impl;
  const ks_status status = fill(ctx, p, w, impl);
  if (status != KS_OK) ks_cuda_weight_destroy(ctx, w);
  return status;
}

extern "C" void ks_cuda_weight_destroy(ks_ctx *ctx, ks_weight *w) {
  ks_cuda_weight *impl = (ks_cuda_weight *)w->impl;
  if (!impl) return;
  void *held[] = {impl->values, impl->scales, impl->bias,
                  impl->bias_act == impl->bias ? NULL : impl->bias_act};
  for (void *p : held)
    if (p) ctx->backend->mem_free(ctx, p);
  free(impl);
  w->impl = NULL;
}
