#include "kernels/cuda/weight_rows.h"

#include "kernels/quant.h"
#include <stdlib.h>
#include <string.h>

static float value_at(const void *values, ks_dtype dtype, int64_t i) {
  if (dtype == KS_DTYPE_F32) return ((const float *)values)[i];
  const uint16_t h = ((const uint16_t *)values)[i];
  if (dtype == KS_DTYPE_F16) return ks_f16_to_float(h);
  const uint32_t bits = (uint32_t)h << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* x: [n_in] of the caller's, used where out does not hold floats. */
static ks_status convert_row(const ks_weight_params *p, int64_t row, uint8_t *out, uint16_t *scales,
                             float *x) {
  if (p->dtype == KS_DTYPE_F32) x = (float *)(void *)out;
  for (int64_t i = 0; i < p->n_in; i++)
    x[i] = value_at(p->values, p->values_dtype, row * p->n_in + i);
  if (ks_dtype_is_quantized(p->dtype)) return ks_quant_row(p->dtype, x, p->n_in, out, scales);
  for (int64_t i = 0; p->dtype == KS_DTYPE_BF16 && i < p->n_in; i++)
    ((uint16_t *)(void *)out)[i] = ks_bf16_from_float(x[i]);
  return KS_OK;
}

ks_status ks_cuda_convert_rows(const ks_weight_params *p, const ks_cuda_weight *impl, int64_t row,
                               int64_t n_rows, uint8_t *values, uint16_t *scales) {
  int64_t first_bad = n_rows;
  bool no_memory = false;
#pragma omp parallel
  {
    float *x = malloc((size_t)(p->n_in > 0 ? p->n_in : 1) * sizeof *x);
#pragma omp for
    for (int64_t i = 0; i < n_rows; i++) {
      if (x && convert_row(p, row + i, values + i * impl->row_bytes,
                           scales ? scales + i * impl->scales_per_row : NULL, x) == KS_OK)
        continue;
#pragma omp critical
      {
        no_memory = no_memory || !x;
        if (i < first_bad) first_bad = i;
      }
    }
    free(x);
  }
  if (no_memory) return KS_FAIL(KS_ENOMEM, "weight: no memory for a row of %lld values", (long long)p->n_in);
  if (first_bad == n_rows) return KS_OK;
  float *x = NULL; /* once more on this thread, for the message */
  KS_TRY(ks_alloc_array(&x, (size_t)p->n_in, sizeof *x, "weight: row"));
  const ks_status status = convert_row(p, row + first_bad, values, scales, x);
  free(x);
  KS_TRY_AS(status, "row %lld of a weight [%lld, %lld]", (long long)(row + first_bad), (long long)p->n_out,
            (long long)p->n_in);
  return KS_OK;
}
