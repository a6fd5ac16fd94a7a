/* Frozen weights on the device: host values of F32, BF16 or F16 become rows of F32 or BF16, or blocks
 * (kernels/quant.h).
 *
 * Rows that are stored as they are kept are uploaded as they lie; others are converted (weight_rows.c, all
 * cores) and uploaded a piece of at most PIECE bytes at a time, so that the host never holds a second copy. W
 * is kept as it is read, [n_out, n_in] row-major: forward multiplies by its transpose, the input gradient by
 * itself, and neither needs another layout. Bytes (w->bytes): codes or values, scales and bias, as allocated. */
#include "kernels/cuda/weight.cuh"
#include "kernels/cuda/weight_rows.h"

#include "kernels/base/size.h"
#include <stdlib.h>
#include <string.h>

enum { PIECE = 32 << 20 };

/* ---------------------------------------------------------------- rows */

static ks_status upload_piece(ks_ctx *ctx, const ks_weight_params *p, const ks_cuda_weight *impl, int64_t row,
                              int64_t n, uint8_t *values, uint16_t *scales) {
  KS_TRY(ks_cuda_convert_rows(p, impl, row, n, values, scales));
  KS_TRY(ks_mem_upload(ctx, (uint8_t *)impl->values + row * impl->row_bytes, values,
                       (size_t)(n * impl->row_bytes)));
  if (!scales) return KS_OK;
  return ks_mem_upload(ctx, (uint16_t *)impl->scales + row * impl->scales_per_row, scales,
                       (size_t)(n * impl->scales_per_row) * sizeof *scales);
}

static ks_status upload_rows(ks_ctx *ctx, const ks_weight_params *p, const ks_cuda_weight *impl) {
  if (p->values_dtype == p->dtype)
    return ks_mem_upload(ctx, impl->values, p->values, (size_t)(p->n_out * impl->row_bytes));
  const int64_t row_bytes = impl->row_bytes > 0 ? impl->row_bytes : 1;
  const int64_t fit = PIECE / row_bytes, n_rows = fit < 1 ? 1 : fit < p->n_out ? fit : p->n_out;
  uint8_t *values = NULL;
  uint16_t *scales = NULL;
  ks_status status = ks_alloc_array(&values, (size_t)(n_rows * row_bytes), 1, "weight: piece of rows");
  if (status == KS_OK && impl->scales)
    status =
        ks_alloc_array(&scales, (size_t)(n_rows * impl->scales_per_row), sizeof *scales, "weight: scales");
  for (int64_t row = 0; status == KS_OK && row < p->n_out; row += n_rows) {
    const int64_t n = p->n_out - row < n_rows ? p->n_out - row : n_rows;
    status = upload_piece(ctx, p, impl, row, n, values, scales);
  }
  free(values);
  free(scales);
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
