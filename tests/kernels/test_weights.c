#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>

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

/* All 65536 values of a 16-bit type as a weight [256, 256], read back by embedding. */
static void check_all_values(ks_ctx *ctx, ks_dtype type, bool prepare) {
  static uint16_t values[65536];
  static int32_t tokens[256];
  static float y[65536];
  for (int i = 0; i < 65536; i++)
    values[i] = (uint16_t)i;
  for (int i = 0; i < 256; i++)
    tokens[i] = i;
  ks_weight *w = NULL;
  ks_weight_params p = {.n_out = 256, .n_in = 256, .values_dtype = type, .values = values};
  cr_assert(ks_weight_create(ctx, &p, &w) == KS_OK);
  if (prepare) cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK);
  cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y, 256}) == KS_OK);
  for (int i = 0; i < 65536; i++) {
    uint32_t bits = (uint32_t)i << 16;
    float b;
    memcpy(&b, &bits, sizeof b);
    double want = type == KS_DTYPE_F16 ? half_value((uint16_t)i) : (double)b;
    cr_assert(same_value((double)y[i], want), "%04x of %s", (unsigned)i, ks_dtype_name(type));
  }
  ks_weight_destroy(ctx, w);
}

Test(weights, sixteen_bit_values_are_read_exactly) {
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    check_all_values(ctx, KS_DTYPE_F16, false);
    check_all_values(ctx, KS_DTYPE_BF16, true);
    ks_ctx_destroy(ctx);
  }
}

Test(weights, bf16_rounds_to_nearest_even) {
  const float values[] = {1,
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
                          3.14159265f,
                          1e-40f};
  const float wanted[] = {1,        1,         1 + 0x1p-6f, 1 + 0x1p-7f, -1,    INFINITY,  0,
                          INFINITY, -INFINITY, NAN,         0x1p-130f,   -0.0f, 3.140625f, 0};
  enum { N = sizeof values / sizeof values[0] };
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    ks_weight *w = NULL;
    ks_weight_params p = {.n_out = 1, .n_in = N, .dtype = KS_DTYPE_BF16, .values = values};
    float y[N];
    int32_t token = 0;
    cr_assert(ks_weight_create(ctx, &p, &w) == KS_OK);
    cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, &token, y, 1}) == KS_OK);
    for (int i = 0; i < N - 1; i++) {
      cr_assert(same_value((double)y[i], (double)wanted[i]), "%d: %a, wants %a", i, (double)y[i],
                (double)wanted[i]);
      cr_assert(isnan(values[i]) || same_value((double)y[i], oracle_bf16((double)values[i])));
    }
    ks_weight_destroy(ctx, w);
    ks_ctx_destroy(ctx);
  }
}

/* ---------------------------------------------------------------- embedding, rows */

Test(weights, embedding_reads_rows) {
  const int64_t shapes[][2] = {{1, 1}, {33, 31}, {97, 203}, {260, 64}};
  for (int s = 0; ks_test_isas[s]; s++)
    for (int k = 0; k < 8; k++) {
      ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 3);
      if (!ctx) continue;
      const int64_t n_out = shapes[k / 2][0], n_in = shapes[k / 2][1], n = 50;
      float *values = ks_floats(n_out * n_in, KS_FILL_SIGNED, 5);
      int32_t tokens[50];
      ks_weight *w = NULL;
      ks_guard y = ks_guard_make(ctx, NULL, n * n_in);
      cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = n_out, .n_in = n_in, .values = values},
                                 &w) == KS_OK);
      if (k % 2) cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK);
      for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)(i * 31 % n_out);
      cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, n}) == KS_OK);
      for (int64_t i = 0; i < n; i++)
        cr_assert(memcmp(y.p + i * n_in, values + tokens[i] * n_in, (size_t)n_in * sizeof(float)) == 0);
      cr_assert(ks_guard_check_walls("y", &y) == 0);
      tokens[49] = (int32_t)n_out;
      cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, n}) == KS_EINVAL);
      tokens[49] = -1;
      cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, tokens, y.p, n}) == KS_EINVAL);
      cr_assert(ks_embed_forward(ctx, &(ks_embed_args){w, NULL, NULL, 0}) == KS_OK);
      ks_guard_free(&y);
      ks_weight_destroy(ctx, w);
      free(values);
      ks_ctx_destroy(ctx);
    }
}

Test(weights, rows_gather_and_scatter) {
  enum { X_ROWS = 40, COLS = 33, N = 12 };
  const int64_t index[N] = {39, 0, 3, 5, 4, 21, 20, 8, 9, 30, 31, 1},
                twice[N] = {7, 7, 7, 1, 2, 3, 1, 0, 39, 12, 7, 5};
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    float *values = ks_floats(X_ROWS * COLS, KS_FILL_SIGNED, 1);
    ks_guard x = ks_guard_make(ctx, values, X_ROWS * COLS), y = ks_guard_make(ctx, NULL, N * COLS),
             back = ks_guard_make(ctx, NULL, X_ROWS * COLS);
    ks_rows_args a = {.x = x.p, .y = y.p, .index = twice, .n_rows = N, .n_x_rows = X_ROWS, .n_cols = COLS};
    cr_assert(ks_rows_gather(ctx, &a) == KS_OK);
    for (int i = 0; i < N; i++)
      cr_assert(memcmp(y.p + i * COLS, values + twice[i] * COLS, sizeof(float) * COLS) == 0);
    a.index = index;
    cr_assert(ks_rows_gather(ctx, &a) == KS_OK);
    ks_rows_args b = {.x = y.p, .y = back.p, .index = index, .n_rows = N, .n_x_rows = X_ROWS, .n_cols = COLS};
    cr_assert(ks_rows_scatter(ctx, &b) == KS_OK);
    bool written[X_ROWS] = {false};
    for (int i = 0; i < N; i++)
      written[index[i]] = true;
    for (int r = 0; r < X_ROWS; r++)
      for (int j = 0; j < COLS; j++)
        cr_assert(written[r] ? back.p[r * COLS + j] == values[r * COLS + j] : isnan(back.p[r * COLS + j]));
    b.index = twice;
    cr_assert(ks_rows_scatter(ctx, &b) == KS_EINVAL, "an index must not repeat");
    int64_t bad_index[N] = {40};
    a.index = b.index = bad_index;
    cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL && ks_rows_scatter(ctx, &b) == KS_EINVAL);
    a.index = index, a.y = x.p + 5;
    cr_assert(ks_rows_gather(ctx, &a) == KS_EINVAL);
    cr_assert(ks_guard_check_walls("y", &y) + ks_guard_check_walls("back", &back) +
                  ks_guard_check_input("x", &x) ==
              0);
    ks_guard_free(&x), ks_guard_free(&y), ks_guard_free(&back);
    free(values);
    ks_ctx_destroy(ctx);
  }
}

/* ---------------------------------------------------------------- memory, illegal arguments */

Test(weights, memory_is_counted) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float *values = ks_floats(100 * 70, KS_FILL_SIGNED, 1);
  ks_weight *w = NULL, *half = NULL;
  const size_t before = ks_mem_used(ctx);
  cr_assert(ks_weight_create(ctx, &(ks_weight_params){.n_out = 100, .n_in = 70, .values = values}, &w) ==
            KS_OK);
  cr_assert(ks_weight_n_out(w) == 100 && ks_weight_n_in(w) == 70 && ks_weight_dtype(w) == KS_DTYPE_F32);
  const size_t one = ks_weight_bytes(w);
  cr_assert(one >= 28000 && one <= 2 * 28000 && ks_mem_used(ctx) == before + one);
  cr_assert(ks_weight_prepare_backward(ctx, w) == KS_OK && ks_weight_prepare_backward(ctx, w) == KS_OK);
  cr_assert(ks_weight_bytes(w) >= 2 * 28000 && ks_mem_used(ctx) == before + ks_weight_bytes(w));
  ks_weight_params p = {.n_out = 100, .n_in = 70, .dtype = KS_DTYPE_BF16, .values = values};
  cr_assert(ks_weight_create(ctx, &p, &half) == KS_OK && 2 * ks_weight_bytes(half) == one);
  ks_weight_destroy(ctx, w);
  ks_weight_destroy(ctx, half);
  ks_weight_destroy(ctx, NULL);
  cr_assert(ks_mem_used(ctx) == before && ks_mem_peak(ctx) > before + one);
  free(values);
  ks_ctx_destroy(ctx);
}

Test(weights, illegal_arguments) {
  ks_ctx *ctx = NULL;
  ks_weight *w = NULL;
  float v[4] = {0};
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
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
