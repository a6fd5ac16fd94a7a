#include "kernels/quant.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/* ---------------------------------------------------------------- element types */

/* The value of a half-precision number, by its definition. */
static double half_value(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, -24);
  return sign * ldexp(1024 + fraction, exponent - 25);
}

static bool same_value(double a, double b) {
  return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b));
}

/* A weight in the type that goes with the context's activations. */
static ks_weight *weight_of(ks_ctx *ctx, ks_weight_params p) {
  ks_weight *w = NULL;
  if (ks_test_is_cuda() && !ks_dtype_is_quantized(p.dtype)) p.dtype = ks_ctx_act_dtype(ctx);
  cr_assert(ks_weight_create(ctx, &p, &w) == KS_OK, "%s", ks_error_message());
  return w;
}

/* All 65536 values of a 16-bit type as a weight [256, 256], read back by embedding. */
static int64_t run_all_values(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const ks_dtype type = *(const ks_dtype *)test_case;
  static uint16_t values[65536];
  static int32_t tokens[256];
  for (int i = 0; i < 65536; i++)
    values[i] = (uint16_t)i;
  for (int i = 0; i < 256; i++)
    tokens[i] = i;
  ks_weight *w =
      weight_of(ctx, (ks_weight_params){.n_out = 256, .n_in = 256, .values_dtype = type, .values = values});
  if (type == KS_DTYPE_BF16) cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK);
  ks_guard y = ks_guard_make_act(ctx, NULL, 65536);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, 256, NULL}) == KS_OK);
  float *got = ks_guard_read(&y);
  int64_t bad = ks_guard_check_walls(name, &y);
  for (int i = 0; i < 65536; i++) {
    uint32_t bits = (uint32_t)i << 16;
    float b;
    memcpy(&b, &bits, sizeof b);
    double want = type == KS_DTYPE_F16 ? half_value((uint16_t)i) : (double)b;
    if (ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16) want = oracle_bf16(want);
    if (same_value((double)got[i], want)) continue;
    fprintf(stderr, "%s: %04x of %s\n", name, (unsigned)i, ks_dtype_name(type));
    bad++;
  }
  ks_results_add(out, got, 65536);
  free(got);
  ks_guard_free(&y);
  ks_weight_destroy(ctx, w);
  return bad;
}

Test(weights, sixteen_bit_values_are_read_exactly) {
  const ks_dtype types[] = {KS_DTYPE_F16, KS_DTYPE_BF16};
  cr_assert(ks_test_everywhere("embed", 0, &types[0], run_all_values) +
                ks_test_everywhere("embed", 1, &types[1], run_all_values) ==
            0);
}

/* Values, and what becomes of them in bf16. */
static const float unrounded[] = {1,
                                  1 + 0x1p-8f,
                                  1 + 0x3p-8f,
                                  1 + 0x1p-8f + 0x1p-20f,
                                  -1 - 0x1p-8f,
                                  0x1.fffp127f,
                                  0,
                                  INFINITY,
                                  -INFINITY,
                                  NAN,
                                  0x1p-130f,
                                  -0.0f,
                                  3.14159265f},
                   rounded[] = {1,        1,         1 + 0x1p-6f, 1 + 0x1p-7f, -1,    INFINITY, 0,
                                INFINITY, -INFINITY, NAN,         0x1p-130f,   -0.0f, 3.140625f};
enum { N_ROUNDED = sizeof unrounded / sizeof unrounded[0] };

static int64_t run_bf16(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  (void)test_case, (void)out;
  const bool f32 = ks_test_is_cuda() && ks_ctx_act_dtype(ctx) == KS_DTYPE_F32;
  if (f32) return 0;
  ks_weight *w = weight_of(
      ctx, (ks_weight_params){.n_out = 1, .n_in = N_ROUNDED, .dtype = KS_DTYPE_BF16, .values = unrounded});
  ks_guard y = ks_guard_make_act(ctx, NULL, N_ROUNDED);
  int32_t token = 0;
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, &token, y.p, 1, NULL}) == KS_OK);
  float *got = ks_guard_read(&y);
  int64_t bad = 0;
  for (int i = 0; i < N_ROUNDED; i++) {
    if (same_value((double)got[i], (double)rounded[i])) continue;
    fprintf(stderr, "%s: %a is %a, wants %a\n", name, (double)unrounded[i], (double)got[i],
            (double)rounded[i]);
    bad++;
  }
  free(got);
  ks_guard_free(&y);
  ks_weight_destroy(ctx, w);
  return bad;
}

Test(weights, bf16_rounds_to_nearest_even) {
  cr_assert(ks_test_everywhere("embed", 0, NULL, run_bf16) == 0);
}

/* ---------------------------------------------------------------- blocks */

static const ks_dtype block_types[] = {KS_DTYPE_Q8_0, KS_DTYPE_Q4_0, KS_DTYPE_NF4};
enum { N_BLOCK_TYPES = 3, MOST = 256 };

typedef struct {
  uint8_t codes[MOST];
  uint16_t scales[MOST / 32];
  float x[MOST];
} blocks;

static blocks round_trip(ks_dtype t, const float *x, int64_t n) {
  blocks b;
  memset(&b, 0xee, sizeof b);
  cr_assert(n <= MOST && ks_quant_row(t, x, n, b.codes, b.scales) == KS_OK, "%s", ks_error_message());
  ks_dequant_row(t, b.codes, b.scales, n, b.x);
  return b;
}

/* Largest distance of two neighbouring values under scale 1, halved; 4-bit blocks of ggml reach only 7 on the
 * side away from the extreme value, where they may be off by one. */
static double largest_error(ks_dtype t) {
  double gap = 0;
  for (int i = 1; i < 16; i++)
    gap = fmax(gap, (double)ks_nf4_values[i] - (double)ks_nf4_values[i - 1]);
  return t == KS_DTYPE_NF4 ? gap / 2 : t == KS_DTYPE_Q4_0 ? 1 : 0.5;
}

Test(quant, error_is_at_most_half_a_step) {
  const int64_t lengths[] = {1, 31, 32, 33, 63, 64, 65, 97, 256};
  for (int k = 0; k < KS_FILL_KINDS * 9; k++)
    for (int i = 0; i < N_BLOCK_TYPES; i++) {
      const ks_dtype t = block_types[i];
      const int64_t n = lengths[k / KS_FILL_KINDS], block = ks_quant_block(t);
      float *x = ks_floats(n, (ks_fill_kind)(k % KS_FILL_KINDS), (uint64_t)k);
      blocks b = round_trip(t, x, n);
      for (int64_t j = 0; j < n; j++) {
        const double d = fabs((double)ks_f16_to_float(b.scales[j / block]));
        /* the scale itself is off by 2^-11 (float16): of up to 127 steps, 8 or 1 */
        const double reach = t == KS_DTYPE_Q8_0 ? 127 : t == KS_DTYPE_Q4_0 ? 8 : 1;
        cr_assert(fabs((double)b.x[j] - (double)x[j]) <= d * (largest_error(t) + reach * 0x1p-10),
                  "%s [%d] %g becomes %g", ks_dtype_name(t), (int)j, (double)x[j], (double)b.x[j]);
      }
      free(x);
    }
}

Test(quant, formats_are_the_documented_ones) {
  float x[64] = {0};
  x[0] = -4, x[1] = 3.5f, x[2] = 0.25f, x[3] = -0.25f, x[40] = 127;
  blocks b = round_trip(KS_DTYPE_Q4_0, x, 64); /* d = -4 / -8 */
  cr_assert(b.scales[0] == ks_f16_from_float(0.5f) && b.codes[0] == (0 | 15 << 4));
  cr_assert(b.codes[1] == (9 | 8 << 4), "ties go up: 0.5 to 1, -0.5 to 0");
  cr_assert(b.x[0] == -4 && b.x[1] == 3.5f && b.x[2] == 0.5f && b.x[3] == 0);
  b = round_trip(KS_DTYPE_Q8_0, x, 64);
  cr_assert(b.scales[1] == ks_f16_from_float(1) && b.codes[40] == 127 && b.x[40] == 127);
  for (int i = 0; i < 16; i++)
    x[i] = 2 * ks_nf4_values[i];
  x[40] = 0;
  b = round_trip(KS_DTYPE_NF4, x, 64);
  cr_assert(b.scales[0] == ks_f16_from_float(2));
  for (int i = 0; i < 16; i++)
    cr_assert((b.codes[i / 2] >> (i % 2 * 4) & 15) == i && b.x[i] == x[i]);
  cr_assert(ks_nf4_values[0] == -1 && ks_nf4_values[7] == 0 && ks_nf4_values[15] == 1);
  cr_assert(ks_quant_row_bytes(KS_DTYPE_Q8_0, 33) == 64 && ks_quant_row_scales(KS_DTYPE_Q8_0, 33) == 2);
  cr_assert(ks_quant_row_bytes(KS_DTYPE_Q4_0, 33) == 32 && ks_quant_row_bytes(KS_DTYPE_NF4, 65) == 64);
  cr_assert(ks_quant_row_scales(KS_DTYPE_NF4, 64) == 1 && ks_quant_block(KS_DTYPE_BF16) == 0);
}

Test(quant, zeros_tiny_values_and_padding) {
  for (int i = 0; i < N_BLOCK_TYPES; i++) {
    const ks_dtype t = block_types[i];
    float x[33] = {0};
    blocks b = round_trip(t, x, 33);
    for (int j = 0; j < 33; j++)
      cr_assert(b.x[j] == 0);
    x[5] = 1e-12f; /* its scale is zero in float16 */
    b = round_trip(t, x, 33);
    cr_assert(b.x[5] == 0 && b.x[32] == 0);
    x[5] = 3;
    b = round_trip(t, x, 33);
    float all[MOST];
    const int64_t padded = ks_quant_row_scales(t, 33) * ks_quant_block(t);
    ks_dequant_row(t, b.codes, b.scales, padded, all);
    for (int64_t j = 33; j < padded; j++)
      cr_assert(all[j] == 0, "padding is zero");
  }
}

Test(quant, values_that_no_block_holds) {
  const float bad[] = {NAN, INFINITY, -INFINITY, 1e38f};
  uint8_t codes[64];
  uint16_t scales[2];
  for (int i = 0; i < N_BLOCK_TYPES; i++)
    for (int k = 0; k < 4; k++) {
      float x[40] = {0};
      x[39] = bad[k];
      cr_assert(ks_quant_row(block_types[i], x, 40, codes, scales) == KS_EDATA);
      ks_ctx *ctx = ks_test_any_ctx();
      ks_weight *w = NULL;
      const ks_weight_params p = {.n_out = 1, .n_in = 40, .dtype = block_types[i], .values = x};
      const size_t before = ks_mem_used(ctx);
      cr_assert(ks_weight_create(ctx, &p, &w) == KS_EDATA && w == NULL && ks_mem_used(ctx) == before);
      ks_ctx_destroy(ctx);
    }
  float x = 1;
  cr_assert(ks_quant_row(KS_DTYPE_BF16, &x, 1, codes, scales) == KS_EINVAL);
}

Test(quant, float16_rounds_to_nearest_even) {
  for (int i = 0; i < 65536; i++) {
    const uint16_t h = (uint16_t)i;
    const float x = ks_f16_to_float(h);
    cr_assert(same_value((double)x, half_value(h)));
    cr_assert(isnan(x) ? isnan(ks_f16_to_float(ks_f16_from_float(x))) : ks_f16_from_float(x) == h, "%04x",
              (unsigned)i);
    if ((h & 0x7fff) >= 0x7bff) continue;
    const double next = half_value((uint16_t)(h + 1)), middle = ((double)x + next) / 2; /* exact in float32 */
    cr_assert(ks_f16_from_float((float)middle) == (h % 2 ? h + 1 : h), "between %04x and the next",
              (unsigned)i);
    cr_assert(ks_f16_from_float(nextafterf((float)middle, x)) == h);
    cr_assert(ks_f16_from_float(nextafterf((float)middle, (float)next)) == h + 1);
  }
  cr_assert(ks_f16_from_float(65519) == 0x7bff && ks_f16_from_float(65520) == 0x7c00 &&
            ks_f16_from_float(-1e9f) == 0xfc00);
}

/* ---------------------------------------------------------------- embedding, rows */

typedef struct {
  int64_t n_out, n_in;
  ks_dtype dtype;
  bool prepare;
} embed_case;

/* What row `row` of a weight must read as. */
static void row_values(const ks_ctx *ctx, const embed_case *c, const float *values, float *out) {
  blocks b;
  memcpy(out, values, (size_t)c->n_in * sizeof *out);
  if (ks_dtype_is_quantized(c->dtype)) {
    b = round_trip(c->dtype, values, c->n_in);
    memcpy(out, b.x, (size_t)c->n_in * sizeof *out);
  }
  ks_act_round(ctx, out, c->n_in);
}

static int64_t run_embed(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N = 50 };
  const embed_case *c = test_case;
  float *values = ks_floats(c->n_out * c->n_in, KS_FILL_SIGNED, 5),
        *want = ks_floats(c->n_in, KS_FILL_SIGNED, 6);
  int32_t tokens[N];
  ks_weight *w = weight_of(
      ctx, (ks_weight_params){.n_out = c->n_out, .n_in = c->n_in, .dtype = c->dtype, .values = values});
  ks_guard y = ks_guard_make_act(ctx, NULL, N * c->n_in);
  if (c->prepare) cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK);
  for (int i = 0; i < N; i++)
    tokens[i] = (int32_t)(i * 31 % c->n_out);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, N, NULL}) == KS_OK);
  float *got = ks_guard_read(&y);
  int64_t bad = ks_guard_check_walls(name, &y);
  for (int64_t i = 0; i < N; i++) {
    row_values(ctx, c, values + tokens[i] * c->n_in, want);
    bad += ks_check_same(name, got + i * c->n_in, want, c->n_in);
  }
  tokens[48] = -1, tokens[49] = (int32_t)c->n_out; /* as drawn by a pass before: what is no row reads row 0 */
  void *drawn = NULL;
  cr_assert(ks_mem_alloc(ctx, sizeof tokens, &drawn) == KS_OK &&
            ks_mem_upload(ctx, drawn, tokens, sizeof tokens) == KS_OK);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){.w = w, .y = y.p, .n_rows = N, .drawn = drawn}) == KS_OK);
  float *again = ks_guard_read(&y);
  for (int64_t i = 0; i < N; i++) {
    row_values(ctx, c, values + (i < 48 ? tokens[i] : 0) * c->n_in, want);
    bad += ks_check_same(name, again + i * c->n_in, want, c->n_in);
  }
  ks_mem_free(ctx, drawn);
  free(again);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, N, NULL}) == KS_EINVAL);
  tokens[48] = 0, tokens[49] = -1;
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, N, NULL}) == KS_EINVAL);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, NULL, NULL, 0, NULL}) == KS_OK);
  ks_results_add(out, got, N * c->n_in);
  free(got), free(values), free(want);
  ks_guard_free(&y);
  ks_weight_destroy(ctx, w);
  return bad;
}

Test(weights, embedding_reads_rows) {
  const embed_case embed[] = {{1, 1, KS_DTYPE_F32, false},    {33, 31, KS_DTYPE_F32, true},
                              {97, 203, KS_DTYPE_F32, false}, {260, 64, KS_DTYPE_F32, true},
                              {5, 33, KS_DTYPE_Q8_0, false},  {7, 64, KS_DTYPE_Q8_0, true},
                              {33, 97, KS_DTYPE_Q4_0, false}, {9, 160, KS_DTYPE_Q4_0, true},
                              {20, 1, KS_DTYPE_NF4, false},   {17, 203, KS_DTYPE_NF4, false}};
  int64_t bad = 0;
  for (int i = 0; i < 10; i++)
    bad += ks_test_everywhere("embed", i, &embed[i], run_embed);
  cr_assert(bad == 0);
}

static int64_t run_gather(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { X_ROWS = 40, COLS = 33, N = 12 };
  const int64_t index[N] = {39, 0, 3, 5, 4, 21, 20, 8, 9, 30, 31, 1},
                twice[N] = {7, 7, 7, 1, 2, 3, 1, 0, 39, 12, 7, 5};
  (void)test_case;
  float *values = ks_floats(X_ROWS * COLS, KS_FILL_SIGNED, 1);
  ks_act_round(ctx, values, X_ROWS * COLS);
  ks_guard x = ks_guard_make_act(ctx, values, X_ROWS * COLS), y = ks_guard_make_act(ctx, NULL, N * COLS),
           back = ks_guard_make_act(ctx, NULL, X_ROWS * COLS);
  ks_rows_args a = {.x = x.p, .y = y.p, .index = twice, .n_rows = N, .n_x_rows = X_ROWS, .n_cols = COLS};
  int64_t bad = 0;
  for (int turn = 0; turn < 2; turn++) {
    a.index = turn ? index : twice;
    cr_assert(ks_rows_gather(ctx, &a) == KS_OK);
    float *got = ks_guard_read(&y);
    for (int i = 0; i < N; i++)
      bad += ks_check_same(name, got + i * COLS, values + a.index[i] * COLS, COLS);
    free(got);
  }
  ks_rows_args b = {.x = y.p, .y = back.p, .index = index, .n_rows = N, .n_x_rows = X_ROWS, .n_cols = COLS};
  cr_assert(ks_rows_scatter(ctx, &b) == KS_OK);
  bool written[X_ROWS] = {false};
  for (int i = 0; i < N; i++)
    written[index[i]] = true;
  float *got = ks_guard_read(&back);
  for (int r = 0; r < X_ROWS * COLS; r++)
    bad += !(written[r / COLS] ? got[r] == values[r] : isnan(got[r]));
  b.index = twice;
  cr_assert(ks_rows_scatter(ctx, &b) == KS_EINVAL, "an index must not repeat");
  int64_t bad_index[N] = {40};
  a.index = b.index = bad_index;
  cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL && ks_rows_scatter(ctx, &b) == KS_EINVAL);
  a.index = index, a.y = ks_guard_at(&x, 5);
  cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
  bad += ks_guard_check_walls("y", &y) + ks_guard_check_walls("back", &back) + ks_guard_check_input("x", &x);
  ks_results_add(out, got, X_ROWS * COLS);
  ks_guard_free(&x), ks_guard_free(&y), ks_guard_free(&back);
  free(got), free(values);
  return bad;
}

Test(weights, rows_gather_and_scatter) {
  cr_assert(ks_test_everywhere("rows", 0, NULL, run_gather) == 0);
}

/* ---------------------------------------------------------------- memory, illegal arguments */

Test(weights, memory_is_counted) {
  ks_ctx *ctx = ks_test_any_ctx();
  float *values = ks_floats(100 * 70, KS_FILL_SIGNED, 1);
  ks_weight *w = NULL, *half = NULL;
  const size_t before = ks_mem_used(ctx),
               added = ks_test_is_cuda() ? 0 : 28000; /* by the layout of input gradients */
  cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = 100, .n_in = 70, .values = values}, &w) ==
            KS_OK);
  cr_assert(ks_weight_n_out(w) == 100 && ks_weight_n_in(w) == 70 && ks_weight_dtype(w) == KS_DTYPE_F32);
  const size_t one = ks_weight_bytes(w);
  cr_assert(one >= 28000 && one <= 2 * 28000 && ks_mem_used(ctx) == before + one);
  cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK && ks_weight_prepare_backward(ctx, w) == KS_OK);
  cr_assert(ks_weight_bytes(w) >= 28000 + added && ks_mem_used(ctx) == before + ks_weight_bytes(w));
  ks_weight_params p = {.n_out = 100, .n_in = 70, .dtype = KS_DTYPE_BF16, .values = values};
  if (ks_test_is_cuda())
    cr_assert(ks_weight_create(ctx, &p, &half) == KS_EUNSUPPORTED &&
              strstr(ks_error_message(), "f32 activations"));
  else
    cr_assert(ks_weight_create(ctx, &p, &half) == KS_OK && 2 * ks_weight_bytes(half) == one);
  ks_weight_destroy(ctx, w);
  ks_weight_destroy(ctx, half);
  ks_weight_destroy(ctx, NULL);
  cr_assert(ks_mem_used(ctx) == before && ks_mem_peak(ctx) >= before + one);
  free(values);
  ks_ctx_destroy(ctx);
}

/* On a device blocks are what they are said to be: 8.5, 4.5 and 4.25 bits a value. */
Test(weights, blocks_stay_blocks_on_a_device) {
  const size_t bytes[N_BLOCK_TYPES] = {64 * (128 + 4 * 2), 64 * (64 + 4 * 2), 64 * (64 + 2 * 2)};
  if (!ks_test_is_cuda()) return;
  float *values = ks_floats(64 * 128, KS_FILL_SIGNED, 1);
  ks_ctx *ctx = ks_test_any_ctx();
  for (int i = 0; i < N_BLOCK_TYPES; i++) {
    ks_weight *w = weight_of(
        ctx, (ks_weight_params){.n_out = 64, .n_in = 128, .dtype = block_types[i], .values = values});
    cr_assert(ks_weight_bytes(w) == bytes[i], "%s", ks_dtype_name(block_types[i]));
    ks_weight_destroy(ctx, w);
    w = weight_of(ctx,
                  (ks_weight_params){
                      .n_out = 64, .n_in = 128, .dtype = block_types[i], .values = values, .bias = values});
    cr_assert(ks_weight_bytes(w) == bytes[i] + 64 * sizeof(float));
    ks_weight_destroy(ctx, w);
  }
  ks_ctx_destroy(ctx);
  free(values);
}

Test(weights, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_weight *w = NULL;
  float v[4] = {0};
  const ks_weight_params bad[] = {
      {.n_out = -1, .n_in = 2, .values = v},
      {.n_out = 2, .n_in = -1, .values = v},
      {.n_out = INT64_MAX, .n_in = 2, .values = v},
      {.n_out = 2, .n_in = 2, .values = NULL},
      {.n_out = 2, .n_in = 2, .dtype = KS_DTYPE_F16, .values = v},
      {.n_out = 2, .n_in = 2, .dtype = (ks_dtype)9, .values = v},
      {.n_out = 2, .n_in = 2, .values_dtype = (ks_dtype)-1, .values = v},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
    cr_assert(ks_weight_create(ctx, &bad[i], &w) == KS_EINVAL && w == NULL, "case %d", (int)i);
  ks_weight_params huge = {.n_out = INT32_MAX, .n_in = INT32_MAX, .values = v};
  ks_status status = ks_weight_create(ctx, &huge, &w);
  cr_assert((status == KS_ENOMEM || status == KS_EOVERFLOW) && w == NULL);
  cr_assert(ks_weight_create(NULL, &bad[0], &w) == KS_EINVAL &&
            ks_weight_create(ctx, NULL, &w) == KS_EINVAL &&
            ks_weight_create(ctx, &bad[0], NULL) == KS_EINVAL);
  cr_assert(ks_weight_prepare_backward(ctx, NULL) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}
