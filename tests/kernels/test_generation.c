/* Linear maps of a generation pass: what one call gives is what its parts give one after another, and a row has the same bits
 * whatever rows are computed with it. What the parts give is test_linear.c's. */
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 80, MAX_LORAS = 12 };

typedef struct {
  int64_t n_rows, n_in, n_parts, n_out[KS_LINEARS_MAX];
  bool norm, swiglu, bias, residual, y_is_f32;
  ks_dtype dtype; /* of the weights; F32: that of the activations */
  int n_loras;    /* adapters: of rows 0 and 1, of row 2, none of row 3, and so on in turn */
  int32_t ranks[KS_LINEARS_MAX][MAX_LORAS]; /* of a part's */
  int64_t skip;                             /* elements between an aligned address and x */
  int64_t
      head_dim; /* not 0: parts are queries, keys and values; the first two are rotated, the last two stored */
} generation_case;

/* clang-format off */
static const generation_case cases[] = {
    {.n_rows = 1, .n_in = 8, .n_parts = 1, .n_out = {1}},
    {.n_rows = 8, .n_in = 136, .n_parts = 3, .n_out = {40, 17, 16}, .norm = true, .bias = true},
    {.n_rows = 8, .n_in = 40, .n_parts = 2, .n_out = {75, 75}, .norm = true, .swiglu = true},
    {.n_rows = 10, .n_in = 576, .n_parts = 1, .n_out = {150}, .residual = true, .bias = true},
    {.n_rows = 9, .n_in = 264, .n_parts = 1, .n_out = {161}, .norm = true, .y_is_f32 = true},
    {.n_rows = 12, .n_in = 1096, .n_parts = 2, .n_out = {24, 24}, .norm = true, .swiglu = true, .n_loras = 3,
     .ranks = {{8, 3, 0}, {1, 0, 70}}},
    {.n_rows = 10, .n_in = 320, .n_parts = 3, .n_out = {33, 16, 16}, .norm = true, .n_loras = 5,
     .ranks = {{8, 130, 16, 17, 3}, {8, 8, 0, 2, 64}, {0}}},
    {.n_rows = 9, .n_in = 2056, .n_parts = 1, .n_out = {20}, .residual = true, .n_loras = 2, .ranks = {{8, 16}}},
    {.n_rows = 40, .n_in = 72, .n_parts = 2, .n_out = {50, 24}, .norm = true, .n_loras = 12,
     .ranks = {{8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8}, {4, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}}},
    {.n_rows = 70, .n_in = 96, .n_parts = 2, .n_out = {20, 20}, .norm = true, .swiglu = true, .n_loras = 4,
     .ranks = {{8, 8, 8, 8}, {16, 2, 3, 4}}},
    {.n_rows = 6, .n_in = 37, .n_parts = 2, .n_out = {30, 9}, .norm = true, .n_loras = 1, .ranks = {{5}, {6}}},
    {.n_rows = 3, .n_in = 48, .n_parts = 2, .n_out = {20, 9}, .n_loras = 1, .ranks = {{5}, {6}}, .skip = 3},
    {.n_rows = 10, .n_in = 96, .n_parts = 2, .n_out = {40, 40}, .norm = true, .swiglu = true, .dtype = KS_DTYPE_Q4_0,
     .n_loras = 2, .ranks = {{8, 4}, {3, 9}}},
    /* rotated and stored */
    {.n_rows = 8, .n_in = 136, .n_parts = 3, .n_out = {128, 64, 64}, .norm = true, .head_dim = 64},
    {.n_rows = 7, .n_in = 72, .n_parts = 3, .n_out = {200, 100, 100}, .norm = true, .bias = true, .head_dim = 100, .n_loras = 2,
     .ranks = {{8, 3}, {8, 70}, {8, 0}}},
    {.n_rows = 3, .n_in = 40, .n_parts = 3, .n_out = {18, 6, 6}, .head_dim = 6},
    {.n_rows = 12, .n_in = 64, .n_parts = 3, .n_out = {40, 20, 20}, .norm = true, .head_dim = 20},
    /* tiles of 64 and of 32 outputs for 32 and 64 rows, longer than the rings */
    {.n_rows = 64, .n_in = 840, .n_parts = 2, .n_out = {70, 70}, .norm = true, .swiglu = true, .n_loras = 12,
     .ranks = {{8, 8, 3, 8, 8, 16, 8, 8, 0, 8, 8, 8}, {4, 0, 4, 4, 66, 4, 4, 4, 4, 4, 4, 4}}},
    {.n_rows = 61, .n_in = 680, .n_parts = 2, .n_out = {31, 18}, .bias = true, .n_loras = 3, .ranks = {{8, 8, 2}, {0, 5, 8}}},
    {.n_rows = 30, .n_in = 1320, .n_parts = 1, .n_out = {30}, .residual = true, .n_loras = 8,
     .ranks = {{8, 8, 8, 8, 80, 8, 8, 8}}},
    {.n_rows = 25, .n_in = 904, .n_parts = 2, .n_out = {130, 7}, .norm = true, .n_loras = 2, .ranks = {{130, 9}, {8, 8}}},
    /* elements that no vector reads */
    {.n_rows = 35, .n_in = 107, .n_parts = 2, .n_out = {41, 41}, .norm = true, .swiglu = true, .n_loras = 1, .ranks = {{5}, {6}}},
    {.n_rows = 18, .n_in = 75, .n_parts = 1, .n_out = {90}, .residual = true},
    /* codes */
    {.n_rows = 64, .n_in = 416, .n_parts = 2, .n_out = {100, 33}, .norm = true, .bias = true, .dtype = KS_DTYPE_Q8_0,
     .n_loras = 5, .ranks = {{8, 8, 8, 70, 8}, {8, 0, 8, 8, 8}}},
    {.n_rows = 20, .n_in = 300, .n_parts = 1, .n_out = {40}, .residual = true, .dtype = KS_DTYPE_NF4, .n_loras = 2, .ranks = {{8, 16}}},
    {.n_rows = 33, .n_in = 672, .n_parts = 2, .n_out = {20, 20}, .norm = true, .swiglu = true, .dtype = KS_DTYPE_Q4_0},
    {.n_rows = 3, .n_in = 96, .n_parts = 3, .n_out = {70, 20, 20}, .norm = true, .dtype = KS_DTYPE_Q8_0, .n_loras = 1,
     .ranks = {{8}, {8}, {8}}},
};
/* clang-format on */
enum { N_CASES = sizeof cases / sizeof cases[0] };

typedef struct {
  const generation_case *c;
  ks_ctx *ctx;
  ks_weight *w[KS_LINEARS_MAX];
  ks_guard x, norm_w, residual, a[KS_LINEARS_MAX][MAX_LORAS], b_t[KS_LINEARS_MAX][MAX_LORAS];
  ks_lora loras[KS_LINEARS_MAX][MAX_LORAS];
  int64_t u_stride;
} device;

static ks_guard made(ks_ctx *ctx, bool act, int64_t n, uint64_t seed) {
  float *x = ks_floats(n, KS_FILL_SIGNED, seed);
  ks_guard g = act ? ks_guard_make_act(ctx, x, n) : ks_guard_make(ctx, x, n);
  free(x);
  return g;
}

static void make_device(ks_ctx *ctx, const generation_case *c, device *d) {
  *d = (device){.c = c, .ctx = ctx, .u_stride = 131};
  d->x = made(ctx, true, c->skip + c->n_rows * c->n_in, 1);
  d->norm_w = made(ctx, false, c->n_in, 2);
  d->residual = made(ctx, true, c->n_rows * c->n_out[0], 3);
  for (int p = 0; p < c->n_parts; p++) {
    float *w = ks_floats(c->n_out[p] * c->n_in, KS_FILL_SIGNED, 10 + (uint64_t)p),
          *bias = ks_floats(c->n_out[p], KS_FILL_SIGNED, 20 + (uint64_t)p);
    const ks_dtype dtype = ks_dtype_is_quantized(c->dtype) ? c->dtype : ks_ctx_act_dtype(ctx);
    ks_weight_params params = {c->n_out[p], c->n_in, dtype, KS_DTYPE_F32, w, c->bias ? bias : NULL};
    cr_assert(ks_weight_create(ctx, &params, &d->w[p]) == KS_OK, "%s", ks_error_message());
    free(w), free(bias);
    for (int l = 0; l < c->n_loras; l++) {
      const int32_t rank = c->ranks[p][l];
      d->a[p][l] = made(ctx, false, rank * c->n_in, 100 + (uint64_t)(p * MAX_LORAS + l));
      d->b_t[p][l] = made(ctx, false, rank * c->n_out[p], 200 + (uint64_t)(p * MAX_LORAS + l));
      d->loras[p][l] = (ks_lora){.rank = rank, .scale = 0.25f, .a = d->a[p][l].p, .b_t = d->b_t[p][l].p};
    }
  }
}

static void free_device(device *d) {
  ks_guard_free(&d->x), ks_guard_free(&d->norm_w), ks_guard_free(&d->residual);
  for (int p = 0; p < d->c->n_parts; p++) {
    ks_weight_destroy(d->ctx, d->w[p]);
    for (int l = 0; l < d->c->n_loras; l++)
      ks_guard_free(&d->a[p][l]), ks_guard_free(&d->b_t[p][l]);
  }
}

/* Of three rows in turn two have one adapter and one has another; of every fourth none. */
static int64_t segments_of(const generation_case *c, int64_t first, int64_t n, ks_segment *out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = first + i, turn = row / 4 * 2 + (row % 4 == 2);
    if (row % 4 == 3 || turn >= c->n_loras) continue;
    if (count > 0 && out[count - 1].adapter == turn)
      out[count - 1].n_rows++;
    else
      out[count++] = (ks_segment){.row_begin = i, .n_rows = 1, .adapter = (int32_t)turn};
  }
  return count;
}

/* Outputs of a call: those of the parts, or SwiGLU's at [0]. */
typedef struct {
  ks_guard y[KS_LINEARS_MAX], u[KS_LINEARS_MAX], xn, h, cache[2];
} outputs;

enum { MAX_HEAD = 100 };
typedef struct {
  double inv_freq[MAX_HEAD / 2];
  int32_t positions[MAX_ROWS];
  int64_t index[MAX_ROWS];
  ks_rope_args rope[2];
  ks_rows_args store[2];
  ks_rope_store_args all;
} rotation;

/* Row i of a call goes to row n - i of caches of n + 2 rows. */
static void rotate(const generation_case *c, const ks_linear_args *parts, int64_t first, int64_t n,
                   outputs *out, rotation *r) {
  for (int64_t j = 0; j < c->head_dim / 2; j++)
    r->inv_freq[j] = 1.0 / (double)(1 + j * j);
  for (int64_t i = 0; i < n; i++) {
    r->positions[i] = (int32_t)((first + i) * 37 % 101);
    r->index[i] = n - i;
  }
  for (int i = 0; i < 2; i++) {
    r->rope[i] = (ks_rope_args){.x = parts[i].y,
                                .positions = r->positions,
                                .inv_freq = r->inv_freq,
                                .n_rows = n,
                                .n_heads = c->n_out[i] / c->head_dim,
                                .head_dim = c->head_dim};
    r->store[i] = (ks_rows_args){.x = parts[1 + i].y,
                                 .y = out->cache[i].p,
                                 .index = r->index,
                                 .n_rows = n,
                                 .n_x_rows = n + 2,
                                 .n_cols = c->n_out[1 + i]};
  }
  r->all = (ks_rope_store_args){r->rope, 2, r->store, 2};
}

static void call(const device *d, int64_t first, int64_t n, bool at_once, outputs *out) {
  const generation_case *c = d->c;
  ks_ctx *ctx = d->ctx;
  ks_segment segments[MAX_ROWS];
  const int64_t n_segments = segments_of(c, first, n, segments);
  ks_linear_args parts[KS_LINEARS_MAX];
  *out = (outputs){.xn = ks_guard_make_act(ctx, NULL, n * c->n_in),
                   .h = ks_guard_make_act(ctx, NULL, n * c->n_out[0])};
  for (int i = 0; i < 2; i++)
    out->cache[i] = ks_guard_make_act(ctx, NULL, c->head_dim ? (n + 2) * c->n_out[1 + i] : 0);
  void *x = ks_guard_at(&d->x, c->skip + first * c->n_in);
  for (int p = 0; p < c->n_parts; p++) {
    out->y[p] =
        ks_guard_make_as(ctx, c->y_is_f32 ? KS_DTYPE_F32 : ks_ctx_act_dtype(ctx), NULL, n * c->n_out[p]);
    out->u[p] = ks_guard_make_act(ctx, NULL, n * d->u_stride);
    parts[p] =
        (ks_linear_args){.w = d->w[p],
                         .x = c->norm ? out->xn.p : x,
                         .y = out->y[p].p,
                         .y_is_f32 = c->y_is_f32,
                         .generation = true,
                         .n_rows = n,
                         .residual = c->residual ? ks_guard_at(&d->residual, first * c->n_out[0]) : NULL,
                         .segments = segments,
                         .n_segments = c->n_loras ? n_segments : 0,
                         .loras = d->loras[p],
                         .n_loras = c->n_loras,
                         .u = out->u[p].p,
                         .u_stride = d->u_stride};
  }
  const ks_rmsnorm_args norm = {
      .x = x, .w = d->norm_w.p, .y = out->xn.p, .n_rows = n, .n_cols = c->n_in, .eps = 1e-5f};
  const ks_swiglu_args swiglu = {.gate = out->y[0].p, .up = out->y[1].p, .h = out->h.p, .n = n * c->n_out[0]};
  ks_linears_args a = {.parts = parts, .n_parts = c->n_parts};
  if (c->norm) a.norm = &norm;
  if (c->swiglu) a.swiglu = &swiglu;
  rotation r;
  if (c->head_dim) {
    rotate(c, parts, first, n, out, &r);
    a.rope = &r.all;
  }
  if (at_once) {
    cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
    return;
  }
  if (c->norm) cr_assert(ks_rmsnorm_forward(ctx, &norm) == KS_OK, "%s", ks_error_message());
  for (int p = 0; p < c->n_parts; p++)
    cr_assert(ks_linear_forward(ctx, &parts[p]) == KS_OK, "%s", ks_error_message());
  if (c->swiglu) cr_assert(ks_swiglu_forward(ctx, &swiglu) == KS_OK, "%s", ks_error_message());
  if (c->head_dim) cr_assert(ks_rope_store(ctx, &r.all) == KS_OK, "%s", ks_error_message());
}

static void free_outputs(const generation_case *c, outputs *o) {
  ks_guard_free(&o->xn), ks_guard_free(&o->h), ks_guard_free(&o->cache[0]), ks_guard_free(&o->cache[1]);
  for (int p = 0; p < c->n_parts; p++)
    ks_guard_free(&o->y[p]), ks_guard_free(&o->u[p]);
}

/* The same bits in all of `part`'s rows and in those of `all` from `first` on. */
static int64_t check_same(const generation_case *c, const char *name, const outputs *all, int64_t first,
                          const outputs *part) {
  int64_t bad = 0;
  for (int i = 0; i < 2 && c->head_dim; i++) {
    const int64_t n_cols = c->n_out[1 + i], n = part->cache[i].n / n_cols - 2,
                  n_all = all->cache[i].n / n_cols - 2;
    float *x = ks_guard_read(&all->cache[i]), *y = ks_guard_read(&part->cache[i]);
    for (int64_t row = 0; row < n; row++)
      bad += ks_check_same(name, y + (n - row) * n_cols, x + (n_all - first - row) * n_cols, n_cols);
    free(x), free(y);
    bad += ks_guard_check_walls(name, &part->cache[i]);
  }
  for (int p = 0; p < (c->swiglu || c->head_dim ? 1 : c->n_parts); p++) {
    const ks_guard *a = c->swiglu ? &all->h : &all->y[p], *b = c->swiglu ? &part->h : &part->y[p];
    float *x = ks_guard_read(a), *y = ks_guard_read(b);
    bad += ks_check_same(name, y, x + first * c->n_out[p], b->n);
    free(x), free(y);
  }
  for (int p = 0; p < c->n_parts; p++)
    bad += ks_guard_check_walls(name, &part->y[p]) + ks_guard_check_walls(name, &part->u[p]);
  return bad + ks_guard_check_walls(name, &part->xn) + ks_guard_check_walls(name, &part->h);
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const generation_case *c = test_case;
  device d;
  outputs all, part;
  char what[200];
  make_device(ctx, c, &d);
  call(&d, 0, c->n_rows, true, &all);
  call(&d, 0, c->n_rows, false, &part);
  snprintf(what, sizeof what, "%s: one after another", name);
  int64_t bad = check_same(c, what, &all, 0, &part);
  free_outputs(c, &part);
  const int64_t sizes[] = {1, 7, 2, 8, 5};
  for (int64_t first = 0, i = 0; first < c->n_rows && first < 24; first += sizes[i % 5], i++) {
    const int64_t n = sizes[i % 5] < c->n_rows - first ? sizes[i % 5] : c->n_rows - first;
    call(&d, first, n, true, &part);
    snprintf(what, sizeof what, "%s: %d rows from %d on", name, (int)n, (int)first);
    bad += check_same(c, what, &all, first, &part);
    free_outputs(c, &part);
  }
  for (int p = 0; p < (c->swiglu || c->head_dim ? 1 : c->n_parts); p++)
    ks_results_add_guard(out, c->swiglu ? &all.h : &all.y[p]);
  bad += ks_guard_check_input(name, &d.x) + ks_guard_check_input(name, &d.residual);
  free_outputs(c, &all);
  free_device(&d);
  return bad;
}

Test(generation, at_once_or_one_after_another_in_any_company) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("generation", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(generation, rope_is_of_the_parts) {
  const generation_case c = {.n_rows = 2, .n_in = 8, .n_parts = 3, .n_out = {8, 4, 4}, .head_dim = 4};
  ks_ctx *ctx = ks_test_any_ctx();
  device d;
  outputs out;
  rotation r;
  make_device(ctx, &c, &d);
  call(&d, 0, c.n_rows, true, &out);
  ks_linear_args parts[3];
  for (int p = 0; p < 3; p++)
    parts[p] =
        (ks_linear_args){.w = d.w[p], .x = d.x.p, .y = out.y[p].p, .generation = true, .n_rows = c.n_rows};
  rotate(&c, parts, 0, c.n_rows, &out, &r);
  const ks_linears_args a = {.parts = parts, .n_parts = 3, .rope = &r.all};
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  r.rope[0].x = out.h.p;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  r.rope[0].x = parts[0].y;
  r.rope[0].n_heads = 1;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  r.rope[0].n_heads = 2;
  r.store[1].x = out.h.p;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  r.store[1].x = parts[2].y;
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  r.store[1].y = d.x.p; /* too small for it, but refused for what it overlaps */
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  cr_assert(strstr(ks_error_message(), "overlaps x"), "%s", ks_error_message());
  free_outputs(&c, &out);
  free_device(&d);
  ks_ctx_destroy(ctx);
}

/* What one launch may write while it is read. */
Test(generation, results_leave_alone_what_is_read) {
  const generation_case c = {.n_rows = 2, .n_in = 8, .n_parts = 2, .n_out = {8, 8}};
  ks_ctx *ctx = ks_test_any_ctx();
  device d;
  outputs out;
  make_device(ctx, &c, &d);
  call(&d, 0, c.n_rows, true, &out);
  ks_linear_args parts[2];
  for (int p = 0; p < 2; p++)
    parts[p] =
        (ks_linear_args){.w = d.w[p], .x = out.xn.p, .y = out.y[p].p, .generation = true, .n_rows = c.n_rows};
  const ks_rmsnorm_args norm = {
      .x = d.x.p, .w = d.norm_w.p, .y = out.xn.p, .n_rows = c.n_rows, .n_cols = c.n_in, .eps = 1e-5f};
  ks_swiglu_args swiglu = {.gate = out.y[0].p, .up = out.y[1].p, .h = out.y[0].p, .n = c.n_rows * c.n_out[0]};
  const ks_linears_args a = {.parts = parts, .n_parts = 2, .norm = &norm, .swiglu = &swiglu};
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  swiglu.h = out.xn.p;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  swiglu.h = d.x.p;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  swiglu.h = out.h.p;
  parts[1].residual = parts[0].y;
  cr_assert(ks_linears_forward(ctx, &a) == KS_EINVAL);
  parts[1].residual = parts[1].y;
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  free_outputs(&c, &out);
  free_device(&d);
  ks_ctx_destroy(ctx);
}
