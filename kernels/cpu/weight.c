/* Frozen weights: packed layouts for y = x W^T (panels of outputs) and dx = dy W (panels of inputs); rows as
 * embeddings. */
#include "kernels/cpu/weight.h"

/* ---------------------------------------------------------------- element types */

static float weight_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, bits;
  if (exponent == 0) { /* zero and denormals: fraction * 2^-24 */
    float x = (float)fraction * 0x1p-24f;
    return sign ? -x : x;
  }
  if (exponent == 31)
    bits = sign | 0x7f800000 | fraction << 13;
  else
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static float weight_from_bf16(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* Round to nearest even. */
static uint16_t weight_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float weight_value(const void *values, ks_dtype dtype, int64_t i) {
  if (dtype == KS_DTYPE_F32) return ((const float *)values)[i];
  uint16_t h = ((const uint16_t *)values)[i];
  return dtype == KS_DTYPE_BF16 ? weight_from_bf16(h) : weight_from_f16(h);
}

/* ---------------------------------------------------------------- layouts */

/* Element (k, column) of a packed matrix. */
KS_INLINE float *gemm_at_f32(const gemm_layout *l, int64_t k, int64_t col) {
  return (float *)l->data + col / GEMM_PANEL * l->panel_units + k * GEMM_PANEL + col % GEMM_PANEL;
}
KS_INLINE uint16_t *gemm_at_bf16(const gemm_layout *l, int64_t k, int64_t col) {
  return (uint16_t *)l->data +
         2 * (col / GEMM_PANEL * l->panel_units + k / 2 * GEMM_PANEL + col % GEMM_PANEL) + k % 2;
}

static int64_t gemm_n_panels(const gemm_layout *l) {
  return (l->n_cols + GEMM_PANEL - 1) / GEMM_PANEL;
}
static size_t gemm_layout_bytes(const gemm_layout *l) {
  return (size_t)(gemm_n_panels(l) * l->panel_units) * sizeof(float);
}

static ks_status gemm_layout_make(gemm_layout *l, int64_t n_cols, int64_t k, ks_dtype dtype) {
  int64_t n_units = dtype == KS_DTYPE_BF16 ? (k + 1) / 2 : k;
  *l = (gemm_layout){.n_cols = n_cols, .k = k, .panel_units = n_units * GEMM_PANEL, .dtype = dtype};
  return ks_cpu_alloc(gemm_layout_bytes(l), "packed weight", &l->data);
}

static void weight_pack_forward(const gemm_layout *l, const ks_weight_params *p, int64_t panel) {
  int64_t first = panel * GEMM_PANEL, end = ks_min_i64(first + GEMM_PANEL, l->n_cols);
  /* A few inputs at a time, so that the lines written stay in the cache. */
  for (int64_t k0 = 0; k0 < l->k; k0 += 64)
    for (int64_t o = first; o < end; o++)
      for (int64_t k = k0; k < ks_min_i64(k0 + 64, l->k); k++) {
        float x = weight_value(p->values, p->values_dtype, o * l->k + k);
        if (l->dtype == KS_DTYPE_F32)
          *gemm_at_f32(l, k, o) = x;
        else
          *gemm_at_bf16(l, k, o) = weight_to_bf16(x);
      }
}

static void weight_pack_backward(const gemm_layout *b, const gemm_layout *f, int64_t panel) {
  int64_t first = panel * GEMM_PANEL, end = ks_min_i64(first + GEMM_PANEL, b->n_cols);
  for (int64_t k0 = 0; k0 < b->k; k0 += GEMM_PANEL)
    for (int64_t i = first; i < end; i++)
      for (int64_t k = k0; k < ks_min_i64(k0 + GEMM_PANEL, b->k); k++) {
        if (b->dtype == KS_DTYPE_F32)
          *gemm_at_f32(b, k, i) = *gemm_at_f32(f, i, k);
        else
          *gemm_at_bf16(b, k, i) = *gemm_at_bf16(f, i, k);
      }
}

/* ---------------------------------------------------------------- operations */

static void weight_destroy(ks_ctx *ctx, ks_weight *w) {
  (void)ctx;
  weight_impl *impl = w->impl;
  if (!impl) return;
  free(impl->forward.data);
  free(impl->backward.data);
  free(impl->bias);
  free(impl);
  w->impl = NULL;
}

static ks_status weight_create(ks_ctx *ctx, const ks_weight_params *p, ks_weight *w) {
  weight_impl *impl = NULL;
  ks_status status = ks_alloc_array(&impl, 1, sizeof *impl, "weight");
  if (status != KS_OK) return status;
  w->impl = impl;
  KS_TRY_OUT(gemm_layout_make(&impl->forward, p->n_out, p->n_in, p->dtype));
  int64_t n_panels = gemm_n_panels(&impl->forward);
  w->bytes = gemm_layout_bytes(&impl->forward);
  if (p->bias) {
    KS_TRY_OUT(ks_alloc_array(&impl->bias, (size_t)(n_panels * GEMM_PANEL), sizeof(float), "bias"));
    memcpy(impl->bias, p->bias, (size_t)p->n_out * sizeof(float));
    w->bytes += (size_t)(n_panels * GEMM_PANEL) * sizeof(float);
  }
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, p->n_out * p->n_in)) schedule(static)
  for (int64_t i = 0; i < n_panels; i++)
    weight_pack_forward(&impl->forward, p, i);
out:
  if (status != KS_OK) weight_destroy(ctx, w);
  return status;
}

static ks_status weight_prepare_backward(ks_ctx *ctx, ks_weight *w) {
  weight_impl *impl = w->impl;
  if (impl->backward.data) return KS_OK;
  KS_TRY(gemm_layout_make(&impl->backward, w->n_in, w->n_out, w->dtype));
  w->bytes += gemm_layout_bytes(&impl->backward);
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, w->n_out * w->n_in)) schedule(static)
  for (int64_t i = 0; i < gemm_n_panels(&impl->backward); i++)
    weight_pack_backward(&impl->backward, &impl->forward, i);
  return KS_OK;
}

/* Row `row` of W. The backward layout holds it in runs of a panel's width, the forward layout element by
 * element. */
static void weight_read_row(const ks_weight *w, int64_t row, float *y) {
  const weight_impl *impl = w->impl;
  const bool runs = impl->backward.data != NULL;
  const gemm_layout *l = runs ? &impl->backward : &impl->forward;
  for (int64_t i = 0; i < w->n_in; i++) {
    int64_t k = runs ? row : i, col = runs ? i : row;
    y[i] = w->dtype == KS_DTYPE_F32 ? *gemm_at_f32(l, k, col) : weight_from_bf16(*gemm_at_bf16(l, k, col));
  }
}

static ks_status embed_forward(ks_ctx *ctx, const ks_embed_args *a) {
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, a->n_rows * a->w->n_in)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++)
    weight_read_row(a->w, a->tokens[i], a->y + i * a->w->n_in);
  return KS_OK;
}
