#include "kernels/base/rng.h"
#include "kernels/quant.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

enum { MAX_SEGMENTS = 8, MAX_LORAS = 4 };

typedef struct {
  int64_t n_rows, n_in, n_out;
  ks_fill_kind fill;
  ks_dtype dtype; /* F32: that of the activations where these are bf16 */
  bool bias, accumulate, no_dx, generation;
  float dropout;
  int32_t ranks[MAX_LORAS]; /* of the adapters */
  int n_segments;
  struct {
    int64_t begin, n_rows;
    int32_t adapter;
  } segments[MAX_SEGMENTS];
  bool prepare; /* the backward layout beforehand */
} linear_case;

/* clang-format off */
static const linear_case cases[] = {
    {.n_rows = 1, .n_in = 1, .n_out = 1, .ranks = {1}, .n_segments = 1, .segments = {{0, 1, 0}}},
    {.n_rows = 0, .n_in = 7, .n_out = 5, .ranks = {2}, .n_segments = 1, .segments = {{0, 0, 0}}},
    {.n_rows = 3, .n_in = 0, .n_out = 5, .bias = true},
    {.n_rows = 3, .n_in = 5, .n_out = 0},
    {.n_rows = 1, .n_in = 32, .n_out = 33, .bias = true},
    {.n_rows = 2, .n_in = 33, .n_out = 31, .accumulate = true, .ranks = {1, 3}, .n_segments = 2,
     .segments = {{0, 1, 1}, {1, 1, 0}}},
    {.n_rows = 5, .n_in = 31, .n_out = 32, .fill = KS_FILL_POSITIVE, .ranks = {8}, .n_segments = 1,
     .segments = {{1, 3, 0}}},
    {.n_rows = 15, .n_in = 100, .n_out = 300, .bias = true, .accumulate = true, .prepare = true,
     .ranks = {8, 4}, .n_segments = 3, .segments = {{0, 2, 0}, {4, 0, -1}, {7, 8, 1}}},
    {.n_rows = 29, .n_in = 97, .n_out = 111, .fill = KS_FILL_NEAR_ONE, .ranks = {1, 0, 16, 3},
     .n_segments = 5, .segments = {{0, 3, 2}, {3, 3, -1}, {6, 9, 1}, {15, 1, 0}, {20, 9, 3}}},
    {.n_rows = 8, .n_in = 203, .n_out = 65, .ranks = {8, 8, 8, 8}, .n_segments = 4,
     .segments = {{0, 1, 3}, {1, 1, 2}, {2, 1, 1}, {3, 5, 0}}},
    {.n_rows = 131, .n_in = 64, .n_out = 97, .dropout = 0.3f, .accumulate = true, .ranks = {8, 5},
     .n_segments = 2, .segments = {{2, 60, 1}, {62, 69, 0}}},
    {.n_rows = 17, .n_in = 337, .n_out = 33, .dropout = 0.05f, .bias = true, .ranks = {3}, .n_segments = 1,
     .segments = {{0, 17, 0}}},
    {.n_rows = 40, .n_in = 1023, .n_out = 48, .ranks = {64}, .n_segments = 1, .segments = {{0, 40, 0}}},
    {.n_rows = 300, .n_in = 48, .n_out = 352, .ranks = {8}, .no_dx = true, .n_segments = 1,
     .segments = {{0, 300, 0}}},
    {.n_rows = 30, .n_in = 20, .n_out = 70, .fill = KS_FILL_LARGE, .ranks = {200}, .n_segments = 1,
     .segments = {{0, 30, 0}}},
    {.n_rows = 37, .n_in = 51, .n_out = 97, .fill = KS_FILL_INTEGER, .bias = true, .accumulate = true,
     .ranks = {8, 3}, .n_segments = 2, .segments = {{0, 20, 0}, {20, 17, 1}}},
    {.n_rows = 1, .n_in = 700, .n_out = 97, .dtype = KS_DTYPE_BF16, .bias = true},
    {.n_rows = 33, .n_in = 97, .n_out = 203, .dtype = KS_DTYPE_BF16, .accumulate = true, .ranks = {8, 3},
     .n_segments = 2, .segments = {{0, 20, 0}, {20, 13, 1}}},
    {.n_rows = 9, .n_in = 1023, .n_out = 33, .dtype = KS_DTYPE_BF16, .fill = KS_FILL_POSITIVE,
     .prepare = true},
    {.n_rows = 16, .n_in = 51, .n_out = 64, .dtype = KS_DTYPE_BF16, .fill = KS_FILL_INTEGER},
    /* ranks at and around the tiles of adapters; a segment of none between */
    {.n_rows = 70, .n_in = 72, .n_out = 136, .ranks = {33, 64, 16, 65}, .n_segments = 5,
     .segments = {{0, 17, 1}, {17, 20, 0}, {37, 3, -1}, {40, 0, 2}, {41, 29, 3}}},
    /* segments across tiles of 64 and 128 rows, more than one chunk of rows, dropout over two runs of 128
       columns */
    {.n_rows = 290, .n_in = 136, .n_out = 8, .dropout = 0.5f, .accumulate = true, .ranks = {8, 16},
     .n_segments = 2, .segments = {{3, 120, 0}, {123, 160, 1}}},
    {.n_rows = 530, .n_in = 16, .n_out = 8, .dropout = 0.1f, .ranks = {5}, .n_segments = 1,
     .segments = {{1, 529, 0}}},
    /* blocks */
    {.n_rows = 5, .n_in = 64, .n_out = 33, .dtype = KS_DTYPE_Q8_0, .bias = true},
    {.n_rows = 33, .n_in = 136, .n_out = 72, .dtype = KS_DTYPE_Q8_0, .accumulate = true, .ranks = {8, 3},
     .n_segments = 2, .segments = {{0, 20, 0}, {20, 13, 1}}},
    {.n_rows = 19, .n_in = 97, .n_out = 131, .dtype = KS_DTYPE_Q4_0, .dropout = 0.2f, .ranks = {16},
     .n_segments = 1, .segments = {{2, 17, 0}}},
    {.n_rows = 70, .n_in = 160, .n_out = 40, .dtype = KS_DTYPE_Q4_0, .fill = KS_FILL_POSITIVE,
     .prepare = true},
    {.n_rows = 17, .n_in = 200, .n_out = 48, .dtype = KS_DTYPE_NF4, .bias = true, .accumulate = true},
    {.n_rows = 9, .n_in = 31, .n_out = 130, .dtype = KS_DTYPE_NF4, .ranks = {4}, .n_segments = 1,
     .segments = {{0, 9, 0}}},
    /* generation: few rows, more, many; each row with an adapter of its own or none */
    {.n_rows = 1, .n_in = 264, .n_out = 40, .generation = true, .bias = true},
    {.n_rows = 4, .n_in = 100, .n_out = 33, .generation = true, .accumulate = true, .ranks = {8, 70, 1, 16},
     .n_segments = 4, .segments = {{0, 1, 2}, {1, 1, 0}, {2, 1, 1}, {3, 1, 3}}},
    {.n_rows = 40, .n_in = 300, .n_out = 24, .generation = true, .ranks = {8, 64}, .n_segments = 2,
     .segments = {{3, 20, 0}, {30, 9, 1}}},
    {.n_rows = 70, .n_in = 40, .n_out = 140, .generation = true, .ranks = {8, 16}, .n_segments = 2,
     .segments = {{0, 66, 0}, {66, 4, 1}}},
    {.n_rows = 18, .n_in = 96, .n_out = 20, .generation = true, .dtype = KS_DTYPE_Q4_0},
    {.n_rows = 3, .n_in = 72, .n_out = 50, .generation = true, .dtype = KS_DTYPE_Q8_0, .bias = true},
    {.n_rows = 66, .n_in = 130, .n_out = 20, .generation = true, .dtype = KS_DTYPE_NF4},
    /* tiles of 128 rows also where the device is small */
    {.n_rows = 130, .n_in = 16, .n_out = 392, .bias = true, .ranks = {8, 16}, .n_segments = 2,
     .segments = {{0, 70, 0}, {70, 60, 1}}},
    {.n_rows = 130, .n_in = 392, .n_out = 16, .dropout = 0.25f, .accumulate = true, .ranks = {8, 20}, .n_segments = 2,
     .segments = {{0, 70, 0}, {71, 59, 1}}},
    {.n_rows = 130, .n_in = 32, .n_out = 392, .dtype = KS_DTYPE_Q4_0},
    {.n_rows = 130, .n_in = 392, .n_out = 20, .dtype = KS_DTYPE_NF4, .ranks = {8}, .n_segments = 1,
     .segments = {{0, 130, 0}}},
};
/* clang-format on */
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* ---------------------------------------------------------------- one case on one context */

/* Host inputs of a case, as ctx will see them. */
typedef struct {
  const linear_case *c;
  ks_dtype dtype; /* of the weight */
  int64_t n_x, n_y, n_w, max_rank;
  bool has_lora;
  float *w, *bias, *x, *y0, *dy, *dx0;
  float *a[MAX_LORAS], *b_t[MAX_LORAS], *ga0[MAX_LORAS], *gb0[MAX_LORAS];
  ks_segment segments[MAX_SEGMENTS];
} inputs;

/* What a backend has for a case: on a GPU the weight follows the activations. */
static ks_dtype dtype_of(const ks_ctx *ctx, const linear_case *c) {
  return ks_test_is_cuda() && !ks_dtype_is_quantized(c->dtype) ? ks_ctx_act_dtype(ctx) : c->dtype;
}

static inputs make_inputs(const ks_ctx *ctx, const linear_case *c) {
  inputs in = {.c = c,
               .dtype = dtype_of(ctx, c),
               .n_x = c->n_rows * c->n_in,
               .n_y = c->n_rows * c->n_out,
               .n_w = c->n_out * c->n_in};
  struct {
    float **at;
    int64_t n;
  } arrays[] = {{&in.w, in.n_w},  {&in.bias, c->n_out}, {&in.x, in.n_x},
                {&in.y0, in.n_y}, {&in.dy, in.n_y},     {&in.dx0, in.n_x}};
  for (uint64_t i = 0; i < 6; i++) {
    *arrays[i].at = ks_floats(arrays[i].n, c->fill, i + 1);
    if (i > 0) ks_act_round(ctx, *arrays[i].at, arrays[i].n);
  }
  for (int i = 0; i < MAX_LORAS; i++) {
    in.a[i] = ks_floats(c->ranks[i] * c->n_in, c->fill, 10 + (uint64_t)i);
    in.b_t[i] = ks_floats(c->ranks[i] * c->n_out, c->fill, 20 + (uint64_t)i);
    in.ga0[i] = ks_floats(c->ranks[i] * c->n_in, c->fill, 30 + (uint64_t)i);
    in.gb0[i] = ks_floats(c->ranks[i] * c->n_out, c->fill, 40 + (uint64_t)i);
    if (c->ranks[i] > in.max_rank) in.max_rank = c->ranks[i];
  }
  for (int s = 0; s < c->n_segments; s++) {
    in.segments[s] = (ks_segment){c->segments[s].begin, c->segments[s].n_rows, c->segments[s].adapter,
                                  900 + (uint64_t)c->segments[s].adapter};
    in.has_lora |= c->segments[s].adapter >= 0 && c->ranks[c->segments[s].adapter] > 0;
  }
  return in;
}

static void free_inputs(inputs *in) {
  void *all[] = {in->w, in->bias, in->x, in->y0, in->dy, in->dx0};
  for (int i = 0; i < 6; i++)
    free(all[i]);
  for (int i = 0; i < MAX_LORAS; i++)
    free(in->a[i]), free(in->b_t[i]), free(in->ga0[i]), free(in->gb0[i]);
}

static float scale_of(int adapter) {
  return 0.5f * (float)(adapter + 1);
}

/* Everything the device sees. */
typedef struct {
  ks_weight *w;
  ks_guard x, y, u, v, dy, dx, a[MAX_LORAS], b_t[MAX_LORAS], ga[MAX_LORAS], gb[MAX_LORAS];
  ks_lora loras[MAX_LORAS];
  ks_linear_args args;
} device;

static void make_device(ks_ctx *ctx, const inputs *in, device *d) {
  const linear_case *c = in->c;
  const int64_t n_u = c->n_rows * (in->max_rank + 1);
  *d = (device){0};
  ks_weight_params wp = {c->n_out, c->n_in, in->dtype, KS_DTYPE_F32, in->w, c->bias ? in->bias : NULL};
  cr_assert(ks_weight_create(ctx, &wp, &d->w) == KS_OK, "%s", ks_error_message());
  if (c->prepare) cr_assert(ks_weight_prepare_backward(ctx, d->w) == KS_OK);
  d->x = ks_guard_make_act(ctx, in->x, in->n_x);
  d->y = ks_guard_make_act(ctx, c->accumulate ? in->y0 : NULL, in->n_y);
  d->u = ks_guard_make_act(ctx, NULL, n_u);
  d->v = ks_guard_make_act(ctx, NULL, n_u);
  d->dy = ks_guard_make_act(ctx, in->dy, in->n_y);
  d->dx = ks_guard_make_act(ctx, c->accumulate ? in->dx0 : NULL, in->n_x);
  for (int i = 0; i < MAX_LORAS; i++) {
    d->a[i] = ks_guard_make(ctx, in->a[i], c->ranks[i] * c->n_in);
    d->b_t[i] = ks_guard_make(ctx, in->b_t[i], c->ranks[i] * c->n_out);
    d->ga[i] = ks_guard_make(ctx, in->ga0[i], c->ranks[i] * c->n_in);
    d->gb[i] = ks_guard_make(ctx, in->gb0[i], c->ranks[i] * c->n_out);
    d->loras[i] = (ks_lora){c->ranks[i], scale_of(i), d->a[i].p, d->b_t[i].p, d->ga[i].p, d->gb[i].p};
  }
  d->args = (ks_linear_args){.w = d->w,
                             .x = d->x.p,
                             .y = d->y.p,
                             .generation = c->generation,
                             .n_rows = c->n_rows,
                             .residual = c->accumulate ? d->y.p : NULL,
                             .segments = in->segments,
                             .n_segments = c->n_segments,
                             .loras = d->loras,
                             .n_loras = MAX_LORAS,
                             .u = d->u.p,
                             .u_stride = in->max_rank + 1,
                             .dropout = c->dropout,
                             .dropout_site = 77,
                             .dy = d->dy.p,
                             .dx = c->no_dx ? NULL : d->dx.p,
                             .accumulate_dx = c->accumulate,
                             .v = d->v.p};
}

static void free_device(ks_ctx *ctx, device *d) {
  ks_guard *all[] = {&d->x, &d->y, &d->u, &d->v, &d->dy, &d->dx};
  for (int i = 0; i < 6; i++)
    ks_guard_free(all[i]);
  for (int i = 0; i < MAX_LORAS; i++) {
    ks_guard_free(&d->a[i]), ks_guard_free(&d->b_t[i]), ks_guard_free(&d->ga[i]), ks_guard_free(&d->gb[i]);
  }
  ks_weight_destroy(ctx, d->w);
}

/* Doubles of x, rounded to bf16 when the frozen product does so. */
static double *frozen(const float *x, int64_t n, bool bf16) {
  double *y = ks_doubles(x, n);
  for (int64_t i = 0; bf16 && i < n; i++)
    y[i] = oracle_bf16(y[i]);
  return y;
}

/* The weight that the product sees. */
static double *frozen_weight(const ks_ctx *ctx, const inputs *in) {
  const linear_case *c = in->c;
  const bool bf16 = in->dtype == KS_DTYPE_BF16 || ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16;
  if (!ks_dtype_is_quantized(in->dtype)) return frozen(in->w, in->n_w, bf16);
  float *w = ks_floats(in->n_w, c->fill, 1);
  uint8_t codes[2048];
  uint16_t scales[64];
  for (int64_t o = 0; o < c->n_out; o++) {
    cr_assert(ks_quant_row(in->dtype, in->w + o * c->n_in, c->n_in, codes, scales) == KS_OK);
    ks_dequant_row(in->dtype, codes, scales, c->n_in, w + o * c->n_in);
  }
  double *rounded = frozen(w, in->n_w, bf16);
  free(w);
  return rounded;
}

/* Outputs that are stored as activations: with adapters, A, u and B (or B, v and A) are rounded on the way,
 * and y itself once more where the adapters' part is added to it in a second pass. Gradients: two of those.
 */
enum { ROUNDINGS = 4, GRADIENT_ROUNDINGS = 2 };

static int64_t check_case(const ks_ctx *ctx, const inputs *in, const device *d, const char *name) {
  const linear_case *c = in->c;
  const bool bf16 = in->dtype == KS_DTYPE_BF16;
  double *w = frozen_weight(ctx, in), *bias = ks_doubles(in->bias, c->n_out), *x = ks_doubles(in->x, in->n_x),
         *xf = frozen(in->x, in->n_x, bf16), *dy = ks_doubles(in->dy, in->n_y),
         *dyf = frozen(in->dy, in->n_y, bf16), *y = ks_doubles(in->y0, in->n_y),
         *dx = ks_doubles(in->dx0, in->n_x), *y_size = ks_doubles(NULL, in->n_y),
         *dx_size = ks_doubles(NULL, in->n_x);
  double *lora[MAX_LORAS][6];
  oracle_lora loras[MAX_LORAS];
  for (int i = 0; i < MAX_LORAS; i++) {
    const int64_t na = c->ranks[i] * c->n_in, nb = c->ranks[i] * c->n_out;
    const float *from[6] = {in->a[i], in->b_t[i], in->ga0[i], in->gb0[i], in->ga0[i], in->gb0[i]};
    for (int k = 0; k < 6; k++)
      lora[i][k] = ks_doubles(from[k], k % 2 ? nb : na);
    for (int64_t k = 0; k < na; k++)
      lora[i][4][k] = fabs(lora[i][4][k]);
    for (int64_t k = 0; k < nb; k++)
      lora[i][5][k] = fabs(lora[i][5][k]);
    loras[i] = (oracle_lora){c->ranks[i], (double)scale_of(i), lora[i][0], lora[i][1],
                             lora[i][2],  lora[i][3],          lora[i][4], lora[i][5]};
  }
  oracle_linear l = {
      c->n_rows,         c->n_in,      c->n_out,      w,     c->bias ? bias : NULL, x, bf16 ? xf : NULL,
      bf16 ? dyf : NULL, in->segments, c->n_segments, loras, (double)c->dropout,    77};
  oracle_linear_forward(&l, c->accumulate, y, y_size);
  oracle_linear_backward(&l, dy, c->accumulate, c->no_dx ? NULL : dx, dx_size);
  char what[200];
  int64_t bad = 0;
#define CHECK(label, guard, ref, size, chain, n_roundings)                                                   \
  snprintf(what, sizeof what, "%s: %s", name, label);                                                        \
  bad += ks_guard_check_rounded(what, guard, ref, size, (double)(chain), n_roundings)
  CHECK("y", &d->y, y, y_size, c->n_in + in->max_rank, in->has_lora ? ROUNDINGS : 0);
  if (!c->no_dx) {
    CHECK("dx", &d->dx, dx, dx_size, c->n_out + in->max_rank, in->has_lora ? ROUNDINGS : 0);
  }
  for (int i = 0; i < MAX_LORAS; i++) {
    CHECK("grad_a", &d->ga[i], lora[i][2], lora[i][4], c->n_rows + c->n_out, GRADIENT_ROUNDINGS);
    CHECK("grad_b_t", &d->gb[i], lora[i][3], lora[i][5], c->n_rows + c->n_in, GRADIENT_ROUNDINGS);
    bad += ks_guard_check_input(name, &d->a[i]) + ks_guard_check_input(name, &d->b_t[i]);
    for (int k = 0; k < 6; k++)
      free(lora[i][k]);
  }
#undef CHECK
  bad += ks_guard_check_input(name, &d->x) + ks_guard_check_input(name, &d->dy);
  bad += ks_guard_check_walls(name, &d->u) + ks_guard_check_walls(name, &d->v);
  double *all[] = {w, bias, x, xf, dy, dyf, y, dx, y_size, dx_size};
  for (int i = 0; i < 10; i++)
    free(all[i]);
  return bad;
}

/* bf16 products differ between processors that have the instruction and those that do not. */
static bool is_comparable(const ks_ctx *ctx, const inputs *in) {
  return in->dtype != KS_DTYPE_BF16 || strcmp(ks_ctx_isa_name(ctx), "avx512bf16") != 0;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  inputs in = make_inputs(ctx, test_case);
  device d;
  make_device(ctx, &in, &d);
  int64_t bad = 0;
  if (ks_linear_forward(ctx, &d.args) != KS_OK || ks_linear_backward(ctx, &d.args) != KS_OK) {
    fprintf(stderr, "%s: %s\n", name, ks_error_message());
    bad++;
  } else {
    bad += check_case(ctx, &in, &d, name);
  }
  if (is_comparable(ctx, &in)) {
    ks_results_add_guard(out, &d.y);
    if (!in.c->no_dx) ks_results_add_guard(out, &d.dx);
    for (int i = 0; i < MAX_LORAS; i++)
      ks_results_add_guard(out, &d.ga[i]), ks_results_add_guard(out, &d.gb[i]);
  }
  free_device(ctx, &d);
  free_inputs(&in);
  return bad;
}

/* Too many elements for the shim. */
static bool is_large(const linear_case *c) {
  return c->n_rows * c->n_in * c->n_out > 1050000;
}

Test(linear, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    if (!ks_test_is_shim() || !is_large(&cases[i])) bad += ks_test_everywhere("linear", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* ---------------------------------------------------------------- independence of the batch */

/* The same bits in elements [first, first + n) of a and in all of b. */
static int64_t check_part(const char *what, const ks_guard *a, int64_t first, const ks_guard *b, int64_t n) {
  float *x = ks_guard_read(a), *y = ks_guard_read(b);
  const int64_t bad = ks_check_same(what, x + first, y, n);
  free(x), free(y);
  return bad;
}

/* Each row of a device's batch by itself, as in decoding: the same y. */
static int64_t check_rows_alone(ks_ctx *ctx, const device *d, const linear_case *c, int32_t adapter) {
  int64_t bad = 0;
  for (int64_t i = 0; i < c->n_rows; i += ks_test_is_shim() ? 11 : 1) {
    ks_guard y = ks_guard_make_act(ctx, NULL, c->n_out), u = ks_guard_make_act(ctx, NULL, d->args.u_stride);
    ks_segment seg = {0, 1, adapter, 0};
    ks_linear_args one = d->args;
    one.x = ks_guard_at(&d->x, i * c->n_in), one.y = y.p, one.u = u.p, one.n_rows = 1, one.segments = &seg;
    one.n_segments = 1;
    cr_assert(ks_linear_forward(ctx, &one) == KS_OK, "%s", ks_error_message());
    bad += check_part("row alone", &d->y, i * c->n_out, &y, c->n_out);
    ks_guard_free(&y), ks_guard_free(&u);
  }
  return bad;
}

/* Rows, alone or with others, with the same segment: same bits of y, dx and gradients. */
static int64_t run_company(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { FIRST = 19, RANK = 8 };
  const linear_case *mine = test_case;
  const int64_t n_in = mine->n_in, n_out = mine->n_out, n = mine->n_rows;
  linear_case all = *mine;
  all.n_rows = FIRST + n + 15;
  all.n_segments = 3;
  all.segments[0].n_rows = FIRST, all.segments[0].adapter = 1;
  all.segments[1].begin = FIRST, all.segments[1].n_rows = n, all.segments[1].adapter = 0;
  all.segments[2].begin = FIRST + n, all.segments[2].n_rows = 15, all.segments[2].adapter = 2;
  inputs in_all = make_inputs(ctx, &all), in_alone = make_inputs(ctx, mine);
  memcpy(in_alone.x, in_all.x + FIRST * n_in, sizeof(float) * (size_t)(n * n_in));
  memcpy(in_alone.dy, in_all.dy + FIRST * n_out, sizeof(float) * (size_t)(n * n_out));
  /* What is wrong with others must not reach these rows. */
  in_all.a[1][3] = in_all.b_t[1][5] = NAN;
  in_all.a[2][0] = in_all.b_t[2][1] = INFINITY;
  in_all.x[2] = in_all.dy[7] = NAN;
  device d_all, d_alone;
  make_device(ctx, &in_all, &d_all);
  make_device(ctx, &in_alone, &d_alone);
  device *both[] = {&d_all, &d_alone};
  for (int i = 0; i < 2; i++) {
    cr_assert(ks_linear_forward(ctx, &both[i]->args) == KS_OK, "%s: %s", name, ks_error_message());
    cr_assert(ks_linear_backward(ctx, &both[i]->args) == KS_OK, "%s: %s", name, ks_error_message());
  }
  int64_t bad = check_part("y in company", &d_all.y, FIRST * n_out, &d_alone.y, n * n_out);
  bad += check_part("dx in company", &d_all.dx, FIRST * n_in, &d_alone.dx, n * n_in);
  bad += check_part("grad_a in company", &d_all.ga[0], 0, &d_alone.ga[0], RANK * n_in);
  bad += check_part("grad_b in company", &d_all.gb[0], 0, &d_alone.gb[0], RANK * n_out);
  if (mine->dropout == 0) bad += check_rows_alone(ctx, &d_alone, mine, 0);
  if (is_comparable(ctx, &in_alone)) ks_results_add_guard(out, &d_alone.y);
  free_device(ctx, &d_all);
  free_device(ctx, &d_alone);
  free_inputs(&in_all);
  free_inputs(&in_alone);
  if (bad) fprintf(stderr, "%s: rows depend on their company\n", name);
  return bad;
}

Test(linear, company_does_not_change_bits) {
#define MINE(rows, in, out)                                                                                  \
  .n_rows = rows, .n_in = in, .n_out = out, .bias = true, .ranks = {8, 16, 5}, .n_segments = 1,              \
  .segments = {                                                                                              \
    {0, rows, 0}                                                                                             \
  }
  const linear_case mine[] = {
      {MINE(13, 333, 45)},
      {MINE(13, 333, 45), .dtype = KS_DTYPE_BF16},
      {MINE(13, 232, 145), .dropout = 0.25f},
      {MINE(13, 328, 45), .dtype = KS_DTYPE_Q8_0},
      {MINE(5, 328, 40), .generation = true},
      {MINE(31, 97, 33), .generation = true},
      {MINE(60, 328, 40), .generation = true},
      {MINE(50, 200, 20), .generation = true, .dtype = KS_DTYPE_NF4},
      {MINE(20, 200, 20), .generation = true, .dtype = KS_DTYPE_Q4_0},
  };
#undef MINE
  int64_t bad = 0;
  for (size_t i = 0; i < sizeof mine / sizeof mine[0]; i++)
    bad += ks_test_everywhere("linear", (int64_t)i, &mine[i], run_company);
  cr_assert(bad == 0);
}

/* ---------------------------------------------------------------- exact integers, special values */

static int64_t run_integers(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const linear_case *c = test_case;
  int64_t bad = 0;
  if (ks_ctx_act_dtype(ctx) != KS_DTYPE_F32) return 0; /* sums beyond 256 are not exact in bf16 */
  inputs in = make_inputs(ctx, c);
  device d;
  make_device(ctx, &in, &d);
  cr_assert(ks_linear_forward(ctx, &d.args) == KS_OK);
  float *y = ks_guard_read(&d.y);
  for (int64_t i = 0; i < c->n_rows; i++)
    for (int64_t o = 0; o < c->n_out; o++) {
      int adapter = i < 20 ? 0 : 1;
      double sum = (double)in.y0[i * c->n_out + o] + (double)in.bias[o];
      for (int64_t j = 0; j < c->n_in; j++)
        sum += (double)in.x[i * c->n_in + j] * (double)in.w[o * c->n_in + j];
      for (int64_t r = 0; r < c->ranks[adapter]; r++) {
        double u = 0;
        for (int64_t j = 0; j < c->n_in; j++)
          u += (double)in.x[i * c->n_in + j] * (double)in.a[adapter][r * c->n_in + j];
        sum += (double)scale_of(adapter) * u * (double)in.b_t[adapter][r * c->n_out + o];
      }
      bad += (double)y[i * c->n_out + o] != sum;
    }
  if (bad) fprintf(stderr, "%s: %lld sums of integers are not exact\n", name, (long long)bad);
  ks_results_add_guard(out, &d.y);
  free(y);
  free_device(ctx, &d);
  free_inputs(&in);
  return bad;
}

Test(linear, integers_are_exact) {
  const linear_case *c = &cases[15];
  cr_assert(c->fill == KS_FILL_INTEGER);
  cr_assert(ks_test_everywhere("linear", 0, c, run_integers) == 0);
}

/* Rows of x that hold something bad, and of dy. */
static int64_t run_special(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const linear_case *c = test_case;
  inputs in = make_inputs(ctx, c);
  in.x[3 * c->n_in + 7] = NAN;
  in.x[11 * c->n_in + 39] = INFINITY;
  in.dy[5 * c->n_out + 49] = NAN;
  device d;
  make_device(ctx, &in, &d);
  cr_assert(ks_linear_forward(ctx, &d.args) == KS_OK && ks_linear_backward(ctx, &d.args) == KS_OK);
  float *y = ks_guard_read(&d.y), *dx = ks_guard_read(&d.dx);
  int64_t bad = 0;
  for (int64_t i = 0; i < c->n_rows; i++) {
    for (int64_t o = 0; o < c->n_out; o++)
      bad += (isfinite(y[i * c->n_out + o]) != 0) != (i != 3 && i != 11);
    for (int64_t j = 0; j < c->n_in; j++)
      bad += (isfinite(dx[i * c->n_in + j]) != 0) != (i != 5);
  }
  if (bad) fprintf(stderr, "%s: %lld elements are finite or not against expectation\n", name, (long long)bad);
  if (is_comparable(ctx, &in)) ks_results_add_guard(out, &d.y);
  free(y), free(dx);
  free_device(ctx, &d);
  free_inputs(&in);
  return bad;
}

Test(linear, nan_and_infinity_stay_in_their_rows) {
#define SPECIAL                                                                                              \
  .n_rows = 30, .n_in = 40, .n_out = 50, .ranks = {8}, .n_segments = 1, .segments = { {0, 30, 0} }
  const linear_case special[] = {{SPECIAL},
                                 {SPECIAL, .dtype = KS_DTYPE_BF16},
                                 {SPECIAL, .dtype = KS_DTYPE_Q4_0},
                                 {SPECIAL, .generation = true}};
#undef SPECIAL
  int64_t bad = 0;
  for (int i = 0; i < 4; i++)
    bad += ks_test_everywhere("linear", i, &special[i], run_special);
  cr_assert(bad == 0);
}

/* The first rows of logits by themselves: the same bits, which in float32 shows every order of additions. */
static int64_t check_fewer_logits(ks_ctx *ctx, const linear_case *c, const device *d, const ks_guard *all) {
  const int64_t n = c->n_rows < 20 ? 1 : 20;
  ks_guard y = ks_guard_make(ctx, NULL, n * c->n_out);
  ks_linear_args few = d->args;
  few.y = y.p, few.n_rows = n;
  cr_assert(ks_linear_forward(ctx, &few) == KS_OK);
  const int64_t bad = check_part("fewer rows", all, 0, &y, n * c->n_out);
  ks_guard_free(&y);
  return bad;
}

/* Logits: float32 whatever the activations. */
static int64_t run_logits(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const linear_case *c = test_case;
  inputs in = make_inputs(ctx, c);
  device d;
  make_device(ctx, &in, &d);
  ks_guard y = ks_guard_make(ctx, NULL, in.n_y);
  d.args.y = y.p, d.args.y_is_f32 = true;
  double *w = frozen_weight(ctx, &in), *x = frozen(in.x, in.n_x, in.dtype == KS_DTYPE_BF16),
         *bias = ks_doubles(in.bias, c->n_out), *ref = ks_doubles(NULL, in.n_y),
         *size = ks_doubles(NULL, in.n_y);
  oracle_linear l = {.n_rows = c->n_rows, .n_in = c->n_in, .n_out = c->n_out, .w = w, .bias = bias, .x = x};
  oracle_linear_forward(&l, false, ref, size);
  cr_assert(ks_linear_forward(ctx, &d.args) == KS_OK, "%s: %s", name, ks_error_message());
  const int64_t bad =
      ks_guard_check_output(name, &y, ref, size, (double)c->n_in) + check_fewer_logits(ctx, c, &d, &y);
  if (is_comparable(ctx, &in)) ks_results_add_guard(out, &y);
  ks_guard_free(&y);
  free(w), free(x), free(bias), free(ref), free(size);
  free_device(ctx, &d);
  free_inputs(&in);
  return bad;
}

Test(linear, logits_are_float32) {
  const linear_case logits[] = {{.n_rows = 5, .n_in = 72, .n_out = 201, .bias = true, .generation = true},
                                {.n_rows = 67, .n_in = 328, .n_out = 104, .bias = true, .generation = true},
                                {.n_rows = 70, .n_in = 33, .n_out = 100, .bias = true},
                                {.n_rows = 23, .n_in = 40, .n_out = 100, .bias = true},
                                {.n_rows = 3, .n_in = 64, .n_out = 40, .bias = true, .dtype = KS_DTYPE_Q8_0}};
  int64_t bad = 0;
  for (int i = 0; i < 5; i++)
    bad += ks_test_everywhere("linear_forward", i, &logits[i], run_logits);
  cr_assert(bad == 0);
}

/* ---------------------------------------------------------------- dropout */

/* With A and B the identity and W zero, y shows drop(x); with x = 1 the mask itself. */
static int64_t run_mask(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N = 200, ROWS = 20 };
  const float p = *(const float *)test_case;
  const bool bf16 = ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16;
  float *zero = calloc(N * N, sizeof *zero), *eye = calloc(N * N, sizeof *eye),
        *ones = malloc(sizeof(float) * ROWS * N);
  for (int i = 0; i < N; i++)
    eye[i * N + i] = 1;
  for (int i = 0; i < ROWS * N; i++)
    ones[i] = 1;
  ks_weight *w = NULL;
  ks_weight_params wp = {.n_out = N, .n_in = N, .dtype = ks_ctx_act_dtype(ctx), .values = zero};
  cr_assert(ks_weight_create(ctx, &wp, &w) == KS_OK);
  ks_guard x = ks_guard_make_act(ctx, ones, ROWS * N), y = ks_guard_make_act(ctx, NULL, ROWS * N),
           dx = ks_guard_make_act(ctx, NULL, ROWS * N), u = ks_guard_make_act(ctx, NULL, ROWS * N),
           v = ks_guard_make_act(ctx, NULL, ROWS * N), i_n = ks_guard_make(ctx, eye, N * N),
           ga = ks_guard_make(ctx, zero, N * N), gb = ks_guard_make(ctx, zero, N * N);
  ks_lora lora = {N, 1, i_n.p, i_n.p, ga.p, gb.p};
  ks_segment seg = {0, ROWS, 0, 1234};
  ks_linear_args a = {.w = w,
                      .x = x.p,
                      .y = y.p,
                      .n_rows = ROWS,
                      .segments = &seg,
                      .n_segments = 1,
                      .loras = &lora,
                      .n_loras = 1,
                      .u = u.p,
                      .u_stride = N,
                      .dropout = p,
                      .dropout_site = 5,
                      .dy = x.p,
                      .dx = dx.p,
                      .v = v.p};
  cr_assert(ks_linear_forward(ctx, &a) == KS_OK && ks_linear_backward(ctx, &a) == KS_OK);
  float *got_y = ks_guard_read(&y), *got_dx = ks_guard_read(&dx), *got_ga = ks_guard_read(&ga);
  int64_t kept = 0, bad = 0;
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < N; j++) {
      double want = oracle_dropout_factor(1234, 5, (double)p, N, i, j);
      kept += want > 0;
      if (bf16) want = oracle_bf16(want);
      bad += !(fabs((double)got_y[i * N + j] - want) <= 0x1p-23 * want) +
             !(fabs((double)got_dx[i * N + j] - want) <= 0x1p-23 * want);
    }
  double sigma = sqrt(ROWS * N * (double)p * (1 - (double)p));
  cr_assert(fabs((double)kept - (1 - (double)p) * ROWS * N) <= 4 * sigma);
  /* grad_a[r, j] = sum over rows of v[i, r] mask(i, j) = the kept rows of column j. */
  for (int j = 0; j < N; j++) {
    double sum = 0;
    for (int i = 0; i < ROWS; i++)
      sum += oracle_dropout_factor(1234, 5, (double)p, N, i, j);
    bad += !ks_close((double)got_ga[3 * N + j], sum, sum, ROWS);
  }
  a.dropout_site = 6;
  cr_assert(ks_linear_forward(ctx, &a) == KS_OK);
  float *other = ks_guard_read(&y);
  bad += memcmp(other, got_y, sizeof(float) * ROWS * N) == 0; /* another site, another mask */
  if (bad) fprintf(stderr, "%s: %lld elements of the mask are wrong\n", name, (long long)bad);
  ks_results_add(out, got_y, ROWS * N);
  free(got_y), free(got_dx), free(got_ga), free(other), free(zero), free(eye), free(ones);
  ks_guard *all[] = {&x, &y, &dx, &u, &v, &i_n, &ga, &gb};
  for (int i = 0; i < 8; i++)
    ks_guard_free(all[i]);
  ks_weight_destroy(ctx, w);
  return bad;
}

Test(linear, dropout_mask_is_the_documented_one) {
  const float p = 0.2f;
  cr_assert(ks_test_everywhere("linear", 0, &p, run_mask) == 0);
}

/* ---------------------------------------------------------------- the oracle's own gradients */

static double oracle_objective(const oracle_linear *l, const double *dy) {
  double *y = ks_doubles(NULL, l->n_rows * l->n_out), sum = 0;
  oracle_linear_forward(l, false, y, NULL);
  for (int64_t i = 0; i < l->n_rows * l->n_out; i++)
    sum += y[i] * dy[i];
  free(y);
  return sum;
}

/* The objective is bilinear, so central differences are exact but for rounding. */
static void check_differences(const oracle_linear *l, const double *dy, double *p, const double *grad,
                              int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const double h = 1e-3, saved = p[i];
    p[i] = saved + h;
    double up = oracle_objective(l, dy);
    p[i] = saved - h;
    double down = oracle_objective(l, dy);
    p[i] = saved;
    cr_assert(fabs((up - down) / (2 * h) - grad[i]) <= 1e-9 * (1 + fabs(grad[i])));
  }
}

Test(linear, oracle_gradients_match_central_differences) {
  enum { ROWS = 5, IN = 6, OUT = 7, RANK = 3 };
  float *f[5] = {ks_floats(OUT * IN, KS_FILL_SIGNED, 1), ks_floats(ROWS * IN, KS_FILL_SIGNED, 2),
                 ks_floats(RANK * IN, KS_FILL_SIGNED, 3), ks_floats(RANK * OUT, KS_FILL_SIGNED, 4),
                 ks_floats(ROWS * OUT, KS_FILL_SIGNED, 5)};
  const int64_t n[5] = {OUT * IN, ROWS * IN, RANK * IN, RANK * OUT, ROWS * OUT};
  double *d[5], ga[RANK * IN] = {0}, gb[RANK * OUT] = {0}, dx[ROWS * IN];
  for (int i = 0; i < 5; i++)
    d[i] = ks_doubles(f[i], n[i]);
  oracle_lora lora = {RANK, 0.7, d[2], d[3], ga, gb, NULL, NULL};
  ks_segment seg = {1, 3, 0, 9};
  oracle_linear l = {.n_rows = ROWS,
                     .n_in = IN,
                     .n_out = OUT,
                     .w = d[0],
                     .x = d[1],
                     .segments = &seg,
                     .n_segments = 1,
                     .loras = &lora,
                     .dropout = 0.4,
                     .dropout_site = 3};
  oracle_linear_backward(&l, d[4], false, dx, NULL);
  check_differences(&l, d[4], d[1], dx, ROWS * IN);
  check_differences(&l, d[4], d[2], ga, RANK * IN);
  check_differences(&l, d[4], d[3], gb, RANK * OUT);
  for (int i = 0; i < 5; i++)
    free(f[i]), free(d[i]);
}
