/* Frozen weights: packed for y = x W^T (panels of outputs) and for dx = dy W (panels of inputs); rows as
 * embeddings. */
#include "kernels/cpu/weight.h"
#include "kernels/quant.h"

/* ---------------------------------------------------------------- element types */

/* Values [i, i + n) of an array of any type, n <= 16; the other lanes 0. */
static ks_v weight_load(const void *values, ks_dtype dtype, int64_t i, int64_t n) {
  if (n <= 0) return ks_v_zero();
  if (dtype == KS_DTYPE_F32) return ks_v_load_n((const float *)values + i, n);
  float x[KS_LANES] = {0};
  const uint16_t *h = (const uint16_t *)values + i;
  for (int64_t j = 0; j < n; j++) {
    uint32_t bits = (uint32_t)h[j] << 16;
    if (dtype == KS_DTYPE_F16)
      x[j] = ks_f16_to_float(h[j]);
    else
      memcpy(&x[j], &bits, sizeof bits);
  }
  return ks_v_load(x);
}

/* ---------------------------------------------------------------- layouts */

static int64_t layout_n_panels(const gemm_layout *l) {
  return (l->n_cols + GEMM_PANEL - 1) / GEMM_PANEL;
}
static size_t layout_bytes(const gemm_layout *l) {
  return (size_t)(layout_n_panels(l) * l->panel_units) * sizeof(float);
}

/* Blocks are kept as the float32 values that they stand for. */
static gemm_layout layout_of(int64_t n_cols, int64_t k, ks_dtype weight_dtype) {
  const ks_dtype dtype = weight_dtype == KS_DTYPE_BF16 ? KS_DTYPE_BF16 : KS_DTYPE_F32;
  int64_t n_units = dtype == KS_DTYPE_BF16 ? (k + 1) / 2 : k;
  return (gemm_layout){.n_cols = n_cols, .k = k, .panel_units = n_units * GEMM_PANEL, .dtype = dtype};
}

/* The 16 columns from `col` on of unit `unit`. */
static float *layout_at(const gemm_layout *l, int64_t unit, int64_t col) {
  return (float *)l->data + col / GEMM_PANEL * l->panel_units + unit * GEMM_PANEL + col % GEMM_PANEL;
}

/* rows[i] holds row k + i of 16 columns, as floats (bf16: already rounded): writes those that the layout has.
 */
static void layout_store(const gemm_layout *l, int64_t k, int64_t col, const ks_v rows[KS_LANES]) {
  const int64_t n = ks_min_i64(KS_LANES, l->k - k);
  if (l->dtype == KS_DTYPE_F32) {
    for (int64_t i = 0; i < n; i++)
      ks_v_store(layout_at(l, k + i, col), rows[i]);
    return;
  }
  for (int64_t i = 0; i < n; i += 2) {
    ks_v unit;
    KS_EACH_PART(p) {
      ks_ipart even = (ks_ipart)rows[i].p[p] >> 16 & 0xffff, odd = (ks_ipart)rows[i + 1].p[p];
      unit.p[p] = (ks_part)(even | (odd & (int32_t)0xffff0000));
    }
    ks_v_store(layout_at(l, (k + i) / 2, col), unit);
  }
}

/* rows[i] = row k + i of 16 columns, as floats; zeros beyond the layout's k. */
static void layout_load(const gemm_layout *l, int64_t k, int64_t col, ks_v rows[KS_LANES]) {
  for (int64_t i = 0; i < KS_LANES; i++) {
    if (k + i >= l->k) {
      rows[i] = ks_v_zero();
      continue;
    }
    bool bf16 = l->dtype == KS_DTYPE_BF16;
    rows[i] = ks_v_load(layout_at(l, bf16 ? (k + i) / 2 : k + i, col));
    if (!bf16) continue;
    KS_EACH_PART(p) {
      ks_ipart unit = (ks_ipart)rows[i].p[p];
      rows[i].p[p] = (ks_part)((k + i) % 2 ? unit & (int32_t)0xffff0000 : unit << 16);
    }
  }
}

/* Sixteen columns of a forward layout from W [n_out, n_in] as given, of which p->values holds rows from
 * `first` on. */
static void layout_pack(const gemm_layout *l, const ks_weight_params *p, int64_t col, int64_t first) {
  for (int64_t k = 0; k < l->k; k += KS_LANES) {
    ks_v rows[KS_LANES];
    for (int64_t i = 0; i < KS_LANES; i++)
      rows[i] = weight_load(p->values, p->values_dtype, (col - first + i) * l->k + k,
                            col + i < l->n_cols ? ks_min_i64(KS_LANES, l->k - k) : 0);
    gemm_transpose(rows);
    for (int64_t i = 0; l->dtype == KS_DTYPE_BF16 && i < KS_LANES; i++)
      KS_EACH_PART(part) rows[i].p[part] = (ks_part)gemm_round_bf16(rows[i].p[part]);
    layout_store(l, k, col, rows);
  }
}

/* Sixteen columns of the transpose `to` of `from`. */
static void layout_transpose(const gemm_layout *to, const gemm_layout *from, int64_t col) {
  for (int64_t k = 0; k < to->k; k += KS_LANES) {
    ks_v rows[KS_LANES];
    layout_load(from, col, k, rows);
    gemm_transpose(rows);
    layout_store(to, k, col, rows);
  }
}

static void weight_transpose(ks_ctx *ctx, const gemm_layout *to, const gemm_layout *from) {
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, to->k * to->n_cols)) schedule(static)
  for (int64_t col = 0; col < layout_n_panels(to) * GEMM_PANEL; col += KS_LANES)
    layout_transpose(to, from, col);
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

/* Sixteen rows of W from `row` on, rounded to blocks, at `rounded`. */
static ks_status weight_round_rows(const ks_weight_params *p, int64_t row, uint8_t *codes, uint16_t *scales,
                                   float *rounded) {
  for (int64_t i = 0; i < KS_LANES && row + i < p->n_out; i++) {
    float *x = rounded + i * p->n_in;
    for (int64_t k = 0; k < p->n_in; k += KS_LANES) {
      const int64_t n = ks_min_i64(KS_LANES, p->n_in - k);
      ks_v_store_n(x + k, weight_load(p->values, p->values_dtype, (row + i) * p->n_in + k, n), n);
    }
    KS_TRY_AS(ks_quant_row(p->dtype, x, p->n_in, codes, scales), "row %lld of a weight [%lld, %lld]",
              (long long)(row + i), (long long)p->n_out, (long long)p->n_in);
    ks_dequant_row(p->dtype, codes, scales, p->n_in, x);
  }
  return KS_OK;
}

static ks_status weight_pack_blocks(const gemm_layout *l, const ks_weight_params *p) {
  uint8_t *codes = NULL;
  uint16_t *scales = NULL;
  float *rounded = NULL;
  ks_weight_params rows = *p;
  ks_status status =
      ks_alloc_array(&codes, (size_t)ks_quant_row_bytes(p->dtype, p->n_in), 1, "weight: codes");
  if (status != KS_OK) goto out;
  KS_TRY_OUT(ks_alloc_array(&scales, (size_t)ks_quant_row_scales(p->dtype, p->n_in), sizeof *scales,
                            "weight: scales"));
  KS_TRY_OUT(ks_alloc_array(&rounded, (size_t)(KS_LANES * p->n_in), sizeof *rounded, "weight: rows"));
  for (int64_t row = 0; row < p->n_out; row += KS_LANES) {
    KS_TRY_OUT(weight_round_rows(p, row, codes, scales, rounded));
    rows.values = rounded;
    rows.values_dtype = KS_DTYPE_F32;
    layout_pack(l, &rows, row, row);
  }
out:
  free(codes);
  free(scales);
  free(rounded);
  return status;
}

static ks_status weight_create(ks_ctx *ctx, const ks_weight_params *p, ks_weight *w) {
  weight_impl *impl = NULL;
  ks_status status = ks_alloc_array(&impl, 1, sizeof *impl, "weight");
  if (status != KS_OK) return status;
  w->impl = impl;
  impl->forward = layout_of(p->n_out, p->n_in, p->dtype);
  KS_TRY_OUT(ks_cpu_alloc(layout_bytes(&impl->forward), "packed weight", &impl->forward.data));
  const int64_t n_padded = layout_n_panels(&impl->forward) * GEMM_PANEL;
  w->bytes = layout_bytes(&impl->forward);
  if (p->bias) {
    KS_TRY_OUT(ks_alloc_array(&impl->bias, (size_t)n_padded, sizeof(float), "bias"));
    memcpy(impl->bias, p->bias, (size_t)p->n_out * sizeof(float));
    w->bytes += (size_t)n_padded * sizeof(float);
  }
  if (ks_dtype_is_quantized(p->dtype)) {
    KS_TRY_OUT(weight_pack_blocks(&impl->forward, p));
    goto out;
  }
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, p->n_out * p->n_in)) schedule(static)
  for (int64_t col = 0; col < n_padded; col += KS_LANES)
    layout_pack(&impl->forward, p, col, 0);
out:
  if (status != KS_OK) weight_destroy(ctx, w);
  return status;
}

static ks_status weight_prepare_backward(ks_ctx *ctx, ks_weight *w) {
  weight_impl *impl = w->impl;
  if (impl->backward.data) return KS_OK;
  gemm_layout l = layout_of(w->n_in, w->n_out, w->dtype);
  KS_TRY(ks_cpu_alloc(layout_bytes(&l), "packed weight", &l.data));
  weight_transpose(ctx, &l, &impl->forward);
  impl->backward = l;
  w->bytes += layout_bytes(&l);
  return KS_OK;
}

/* The layout that input gradients read: prepared, or made for this call in memory that all weights share. */
static ks_status weight_backward(ks_ctx *ctx, const ks_weight *w, gemm_layout *out) {
  const weight_impl *impl = w->impl;
  *out = impl->backward;
  if (out->data) return KS_OK;
  *out = layout_of(w->n_in, w->n_out, w->dtype);
  KS_TRY(ks_cpu_shared_reserve(ctx, KS_CPU_TRANSPOSED, layout_bytes(out), &out->data));
  weight_transpose(ctx, out, &impl->forward);
  return KS_OK;
}

/* Row `row` of W. The backward layout holds it in runs of a panel's width, the forward layout element by
 * element. */
static void weight_read_row(const ks_weight *w, int64_t row, float *y) {
  const weight_impl *impl = w->impl;
  const bool bf16 = w->dtype == KS_DTYPE_BF16, runs = impl->backward.data != NULL;
  for (int64_t i = 0; i < w->n_in; i++) {
    const gemm_layout *l = runs ? &impl->backward : &impl->forward;
    const int64_t k = runs ? row : i, col = runs ? i : row;
    const float *unit = layout_at(l, bf16 ? k / 2 : k, col);
    uint32_t bits;
    memcpy(&bits, unit, sizeof bits);
    if (bf16) bits = k % 2 ? bits & 0xffff0000u : bits << 16;
    memcpy(&y[i], &bits, sizeof bits);
  }
}

static ks_status embed_forward(ks_ctx *ctx, const ks_embed_args *a) {
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 4 * a->n_rows * a->w->n_in)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    int64_t token = a->drawn ? a->drawn[i] : a->tokens[i];
    if (token < 0 || token >= a->w->n_out) token = 0;
    weight_read_row(a->w, token, ks_out(a->y) + i * a->w->n_in);
  }
  return KS_OK;
}
