/* Linear maps of one input in one call: as if one after another. */
#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_linear.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

enum { MAX_SEGMENTS = 4, MAX_LORAS = 3, SITE = 70 };
typedef enum { NO_RESIDUAL, RESIDUAL_IS_Y, OTHER_RESIDUAL } residual_kind;
typedef enum { SHARED_DX, OWN_DX, NO_DX } dx_kind;

typedef struct {
  int64_t n_out;
  int32_t ranks[MAX_LORAS]; /* of the adapters */
  bool bias, no_segments;
  residual_kind residual;
  dx_kind dx;
  int64_t u_more; /* columns of u and v beyond the largest rank */
} part_case;

typedef struct {
  int64_t n_rows, n_in, n_parts;
  part_case parts[KS_LINEARS_MAX];
  float dropout;
  bool accumulate; /* to what dx holds before */
  int n_segments;
  struct {
    int64_t begin, n_rows;
    int32_t adapter;
  } segments[MAX_SEGMENTS];
} group_case;

/* clang-format off */
static const group_case cases[] = {
    {.n_rows = 1, .n_in = 8, .n_parts = 1, .parts = {{.n_out = 8, .ranks = {1}}}, .n_segments = 1, .segments = {{0, 1, 0}}},
    /* queries, keys and values; rows without an adapter before, between and behind */
    {.n_rows = 75, .n_in = 72, .n_parts = 3, .parts = {{.n_out = 40, .ranks = {8, 8}, .bias = true},
     {.n_out = 24, .ranks = {8, 8}}, {.n_out = 24, .ranks = {8, 8}}}, .n_segments = 2, .segments = {{3, 20, 1}, {30, 41, 0}}},
    /* unlike ranks, a map with none at one adapter, one with none at all; several slices of columns, dropout */
    {.n_rows = 37, .n_in = 264, .n_parts = 4, .accumulate = true, .dropout = 0.3f,
     .parts = {{.n_out = 16, .ranks = {8, 0}}, {.n_out = 33, .ranks = {3, 16}, .u_more = 3}, {.n_out = 24, .no_segments = true},
               {.n_out = 8, .ranks = {0, 9}, .bias = true}},
     .n_segments = 2, .segments = {{0, 17, 0}, {17, 20, 1}}},
    /* ranks beyond what a block holds, in shrink, gradients and term */
    {.n_rows = 20, .n_in = 136, .n_parts = 3, .parts = {{.n_out = 72, .ranks = {33}}, {.n_out = 40, .ranks = {20}},
     {.n_out = 136, .ranks = {72}, .u_more = 1}}, .dropout = 0.1f, .n_segments = 1, .segments = {{1, 19, 0}}},
    /* several tiles and chunks: the last block adds up */
    {.n_rows = 660, .n_in = 136, .n_parts = 2, .parts = {{.n_out = 24, .ranks = {8, 4}}, {.n_out = 8, .ranks = {8, 2}}},
     .n_segments = 2, .segments = {{0, 540, 0}, {541, 119, 1}}},
    {.n_rows = 290, .n_in = 520, .n_parts = 2, .parts = {{.n_out = 8, .ranks = {5}}, {.n_out = 8, .ranks = {8}}},
     .dropout = 0.5f, .n_segments = 1, .segments = {{2, 280, 0}}},
    /* odd sizes; residuals; gradients of x of their own, shared and none */
    {.n_rows = 19, .n_in = 51, .n_parts = 3, .accumulate = true,
     .parts = {{.n_out = 33, .ranks = {5}, .residual = RESIDUAL_IS_Y, .u_more = 2},
               {.n_out = 17, .ranks = {2}, .residual = OTHER_RESIDUAL, .dx = OWN_DX, .bias = true},
               {.n_out = 9, .ranks = {3}, .dx = NO_DX}},
     .n_segments = 1, .segments = {{2, 15, 0}}},
    {.n_rows = 24, .n_in = 64, .n_parts = 4, .dropout = 0.2f,
     .parts = {{.n_out = 64, .ranks = {8}, .residual = OTHER_RESIDUAL, .dx = OWN_DX},
               {.n_out = 32, .ranks = {16}, .residual = RESIDUAL_IS_Y}, {.n_out = 16, .ranks = {4}},
               {.n_out = 8, .no_segments = true, .dx = OWN_DX}},
     .n_segments = 1, .segments = {{0, 24, 0}}},
    /* none on the maps that make dx first */
    {.n_rows = 24, .n_in = 64, .n_parts = 2, .parts = {{.n_out = 64, .ranks = {0}}, {.n_out = 32, .ranks = {8}}},
     .n_segments = 1, .segments = {{0, 24, 0}}},
    {.n_rows = 24, .n_in = 64, .n_parts = 3, .dropout = 0.1f, .parts = {{.n_out = 64, .no_segments = true},
     {.n_out = 32, .ranks = {0}}, {.n_out = 32, .ranks = {8}}}, .n_segments = 1, .segments = {{3, 20, 0}}},
    /* no adapter anywhere */
    {.n_rows = 9, .n_in = 40, .n_parts = 2, .parts = {{.n_out = 24, .residual = OTHER_RESIDUAL}, {.n_out = 16}},
     .n_segments = 1, .segments = {{0, 9, -1}}},
};
/* clang-format on */
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* ---------------------------------------------------------------- a case on a context */

typedef struct {
  int64_t n_y, max_rank;
  float *w, *bias, *y0, *dy, *dx0;
  float *lora[MAX_LORAS][4]; /* A, B^T and their gradients before */
  ks_weight *weight;
  ks_guard y, residual, dy_at, dx, u, v, on[MAX_LORAS][4];
  ks_lora loras[MAX_LORAS];
} part;

typedef struct {
  const group_case *c;
  float *x;
  ks_guard x_at;
  ks_segment segments[MAX_SEGMENTS];
  part parts[KS_LINEARS_MAX];
  ks_linear_args args[KS_LINEARS_MAX];
} group;

static float scale_of(int adapter) {
  return 0.5f * (float)(adapter + 1);
}
static int64_t n_of(const group *g, int64_t i, int adapter, int which) {
  const part_case *c = &g->c->parts[i];
  return c->ranks[adapter] * (which % 2 ? c->n_out : g->c->n_in);
}
/* The first part with the same dx. */
static int64_t owner_of(const group_case *c, int64_t i) {
  for (int64_t k = 0; k < i && c->parts[i].dx == SHARED_DX; k++)
    if (c->parts[k].dx == SHARED_DX) return k;
  return i;
}

static float *act_floats(const ks_ctx *ctx, int64_t n, uint64_t seed) {
  float *x = ks_floats(n, KS_FILL_SIGNED, seed);
  ks_act_round(ctx, x, n);
  return x;
}

static void make_part_inputs(const ks_ctx *ctx, group *g, int64_t i) {
  const group_case *c = g->c;
  const part_case *pc = &c->parts[i];
  const uint64_t seed = 100 * ((uint64_t)i + 1);
  part *p = &g->parts[i];
  p->n_y = c->n_rows * pc->n_out;
  p->w = act_floats(ctx, pc->n_out * c->n_in, seed);
  p->bias = act_floats(ctx, pc->n_out, seed + 1);
  p->y0 = act_floats(ctx, p->n_y, seed + 2);
  p->dy = act_floats(ctx, p->n_y, seed + 3);
  p->dx0 = act_floats(ctx, c->n_rows * c->n_in, seed + 4);
  for (int a = 0; a < MAX_LORAS; a++) {
    if (pc->ranks[a] > p->max_rank) p->max_rank = pc->ranks[a];
    for (int k = 0; k < 4; k++)
      p->lora[a][k] =
          ks_floats(n_of(g, i, a, k), KS_FILL_SIGNED, seed + 10 * (uint64_t)(a + 1) + (uint64_t)k);
  }
}

/* c must live as long as the group. */
static void make_inputs(const ks_ctx *ctx, const group_case *c, group *g) {
  *g = (group){.c = c};
  g->x = act_floats(ctx, c->n_rows * c->n_in, 5);
  for (int s = 0; s < c->n_segments; s++)
    g->segments[s] = (ks_segment){c->segments[s].begin, c->segments[s].n_rows, c->segments[s].adapter,
                                  900 + (uint64_t)c->segments[s].adapter};
  for (int64_t i = 0; i < c->n_parts; i++)
    make_part_inputs(ctx, g, i);
}

static void make_part(ks_ctx *ctx, group *g, int64_t i) {
  const group_case *c = g->c;
  const part_case *pc = &c->parts[i];
  part *p = &g->parts[i];
  const int64_t owner = owner_of(c, i), stride = p->max_rank + pc->u_more;
  const ks_weight_params wp = {pc->n_out,    c->n_in, ks_ctx_act_dtype(ctx),
                               KS_DTYPE_F32, p->w,    pc->bias ? p->bias : NULL};
  cr_assert(ks_weight_create(ctx, &wp, &p->weight) == KS_OK, "%s", ks_error_message());
  p->y = ks_guard_make_act(ctx, pc->residual == RESIDUAL_IS_Y ? p->y0 : NULL, p->n_y);
  p->residual = ks_guard_make_act(ctx, p->y0, p->n_y);
  p->dy_at = ks_guard_make_act(ctx, p->dy, p->n_y);
  p->dx = ks_guard_make_act(ctx, c->accumulate ? p->dx0 : NULL, c->n_rows * c->n_in);
  p->u = ks_guard_make_act(ctx, NULL, c->n_rows * stride);
  p->v = ks_guard_make_act(ctx, NULL, c->n_rows * stride);
  for (int a = 0; a < MAX_LORAS; a++) {
    for (int k = 0; k < 4; k++)
      p->on[a][k] = ks_guard_make(ctx, p->lora[a][k], n_of(g, i, a, k));
    p->loras[a] =
        (ks_lora){pc->ranks[a], scale_of(a), p->on[a][0].p, p->on[a][1].p, p->on[a][2].p, p->on[a][3].p};
  }
  void *const residuals[] = {NULL, p->y.p, p->residual.p};
  g->args[i] = (ks_linear_args){.w = p->weight,
                                .x = g->x_at.p,
                                .y = p->y.p,
                                .n_rows = c->n_rows,
                                .residual = residuals[pc->residual],
                                .segments = pc->no_segments ? NULL : g->segments,
                                .n_segments = pc->no_segments ? 0 : c->n_segments,
                                .loras = p->loras,
                                .n_loras = MAX_LORAS,
                                .u = p->u.p,
                                .u_stride = stride,
                                .dropout = pc->no_segments ? 0 : c->dropout,
                                .dropout_site = SITE + (uint64_t)i,
                                .dy = p->dy_at.p,
                                .dx = pc->dx == NO_DX ? NULL : g->parts[owner].dx.p,
                                .accumulate_dx = c->accumulate || owner < i,
                                .v = p->v.p};
}

static void put_on(ks_ctx *ctx, group *g) {
  g->x_at = ks_guard_make_act(ctx, g->x, g->c->n_rows * g->c->n_in);
  for (int64_t i = 0; i < g->c->n_parts; i++)
    make_part(ctx, g, i);
}

static void run_both_ways(ks_ctx *ctx, const group *g, const char *name) {
  const ks_linears_args a = {.parts = g->args, .n_parts = g->c->n_parts};
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s: %s", name, ks_error_message());
  cr_assert(ks_linears_backward(ctx, &a) == KS_OK, "%s: %s", name, ks_error_message());
}

static void free_group(ks_ctx *ctx, group *g) {
  free(g->x);
  ks_guard_free(&g->x_at);
  for (int64_t i = 0; i < g->c->n_parts; i++) {
    part *p = &g->parts[i];
    float *floats[] = {p->w, p->bias, p->y0, p->dy, p->dx0};
    ks_guard *guards[] = {&p->y, &p->residual, &p->dy_at, &p->dx, &p->u, &p->v};
    for (int k = 0; k < 5; k++)
      free(floats[k]);
    for (int k = 0; k < 6; k++)
      ks_guard_free(guards[k]);
    for (int k = 0; k < 4 * MAX_LORAS; k++)
      free(p->lora[k / 4][k % 4]), ks_guard_free(&p->on[k / 4][k % 4]);
    ks_weight_destroy(ctx, p->weight);
  }
}

/* ---------------------------------------------------------------- against the oracle */

/* Roundings to bf16 of what is added up to y or dx: of A, u and B, of each map's sum but the last, and of the
 * adapters' term of each. Gradients: of u or v, and of B. */
static int roundings(int64_t n_maps) {
  return 2 + 2 * (int)n_maps;
}
enum { GRADIENT_ROUNDINGS = 2 };

/* What the oracle needs of a part. */
typedef struct {
  double *w, *bias, *x, *dy, *at[MAX_LORAS][6];
  oracle_lora loras[MAX_LORAS];
  oracle_linear l;
} part_oracle;

static void make_oracle(const group *g, int64_t i, part_oracle *o) {
  const group_case *c = g->c;
  const part_case *pc = &c->parts[i];
  const part *p = &g->parts[i];
  o->w = ks_doubles(p->w, pc->n_out * c->n_in);
  o->bias = ks_doubles(p->bias, pc->n_out);
  o->x = ks_doubles(g->x, c->n_rows * c->n_in);
  o->dy = ks_doubles(p->dy, p->n_y);
  for (int a = 0; a < MAX_LORAS; a++) {
    for (int k = 0; k < 6; k++) {
      o->at[a][k] = ks_doubles(p->lora[a][k < 4 ? k : k - 2], n_of(g, i, a, k));
      for (int64_t e = 0; k >= 4 && e < n_of(g, i, a, k); e++)
        o->at[a][k][e] = fabs(o->at[a][k][e]);
    }
    o->loras[a] = (oracle_lora){pc->ranks[a], (double)scale_of(a), o->at[a][0], o->at[a][1],
                                o->at[a][2],  o->at[a][3],         o->at[a][4], o->at[a][5]};
  }
  o->l = (oracle_linear){.n_rows = c->n_rows,
                         .n_in = c->n_in,
                         .n_out = pc->n_out,
                         .w = o->w,
                         .bias = pc->bias ? o->bias : NULL,
                         .x = o->x,
                         .segments = g->segments,
                         .n_segments = pc->no_segments ? 0 : c->n_segments,
                         .loras = o->loras,
                         .dropout = (double)c->dropout,
                         .dropout_site = SITE + (uint64_t)i};
}

static void free_oracle(part_oracle *o) {
  free(o->w), free(o->bias), free(o->x), free(o->dy);
  for (int k = 0; k < 6 * MAX_LORAS; k++)
    free(o->at[k / 6][k % 6]);
}

/* Adds the part's gradient of x to dx, and its size. */
static void add_dx(const group *g, int64_t i, const part_oracle *o, double *dx, double *size) {
  const int64_t n = g->c->n_rows * g->c->n_in;
  double *mine = ks_doubles(NULL, n), *mine_size = ks_doubles(NULL, n);
  oracle_linear_backward(&o->l, o->dy, false, g->c->parts[i].dx == NO_DX ? NULL : mine, mine_size);
  for (int64_t e = 0; e < n; e++)
    dx[e] += mine[e], size[e] += mine_size[e];
  free(mine), free(mine_size);
}

static int64_t check_part(const group *g, int64_t i, const part_oracle *o, const char *name) {
  const part_case *pc = &g->c->parts[i];
  const part *p = &g->parts[i];
  double *y = ks_doubles(p->y0, p->n_y), *size = ks_doubles(NULL, p->n_y);
  char what[200];
  oracle_linear_forward(&o->l, pc->residual != NO_RESIDUAL, y, size);
  snprintf(what, sizeof what, "%s: y of part %lld", name, (long long)i);
  int64_t bad =
      ks_guard_check_rounded(what, &p->y, y, size, (double)(g->c->n_in + p->max_rank), roundings(1));
  for (int a = 0; a < MAX_LORAS; a++)
    for (int k = 0; k < 4; k++) {
      snprintf(what, sizeof what, "%s: part %lld, adapter %d, array %d", name, (long long)i, a, k);
      bad +=
          k < 2 ? ks_guard_check_input(what, &p->on[a][k])
                : ks_guard_check_rounded(what, &p->on[a][k], o->at[a][k], o->at[a][k + 2],
                                         (double)(g->c->n_rows + g->c->n_in + pc->n_out), GRADIENT_ROUNDINGS);
    }
  bad += ks_guard_check_input(name, &p->residual) + ks_guard_check_input(name, &p->dy_at) +
         ks_guard_check_walls(name, &p->u) + ks_guard_check_walls(name, &p->v);
  free(y), free(size);
  return bad;
}

static int64_t check_dx(const group *g, int64_t owner, const double *dx, const double *size,
                        const char *name) {
  int64_t n_maps = 0, chain = 0;
  char what[200];
  for (int64_t i = 0; i < g->c->n_parts; i++)
    if (owner_of(g->c, i) == owner && g->c->parts[i].dx != NO_DX)
      n_maps++, chain += g->c->parts[i].n_out + g->parts[i].max_rank;
  snprintf(what, sizeof what, "%s: dx of part %lld", name, (long long)owner);
  return ks_guard_check_rounded(what, &g->parts[owner].dx, dx, size, (double)chain, roundings(n_maps));
}

static int64_t check_group(const group *g, const char *name) {
  const int64_t n = g->c->n_rows * g->c->n_in;
  double *dx[KS_LINEARS_MAX], *size[KS_LINEARS_MAX];
  int64_t bad = ks_guard_check_input(name, &g->x_at);
  for (int64_t i = 0; i < g->c->n_parts; i++) {
    dx[i] = ks_doubles(g->c->accumulate ? g->parts[i].dx0 : NULL, n), size[i] = ks_doubles(NULL, n);
    for (int64_t e = 0; e < n; e++)
      size[i][e] = fabs(dx[i][e]);
  }
  for (int64_t i = 0; i < g->c->n_parts; i++) {
    part_oracle o;
    make_oracle(g, i, &o);
    add_dx(g, i, &o, dx[owner_of(g->c, i)], size[owner_of(g->c, i)]);
    bad += check_part(g, i, &o, name);
    free_oracle(&o);
  }
  for (int64_t i = 0; i < g->c->n_parts; i++) {
    if (g->c->parts[i].dx != NO_DX && owner_of(g->c, i) == i) bad += check_dx(g, i, dx[i], size[i], name);
    free(dx[i]), free(size[i]);
  }
  return bad;
}

static void add_results(const group *g, ks_results *out) {
  for (int64_t i = 0; i < g->c->n_parts; i++) {
    const part *p = &g->parts[i];
    ks_results_add_guard(out, &p->y);
    if (g->c->parts[i].dx != NO_DX && owner_of(g->c, i) == i) ks_results_add_guard(out, &p->dx);
    for (int k = 0; k < 2 * MAX_LORAS; k++)
      ks_results_add_guard(out, &p->on[k / 2][2 + k % 2]);
  }
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  group g;
  make_inputs(ctx, test_case, &g);
  put_on(ctx, &g);
  run_both_ways(ctx, &g, name);
  const int64_t bad = check_group(&g, name);
  add_results(&g, out);
  free_group(ctx, &g);
  return bad;
}

/* The shim's device: large enough for tiles of 128 rows in shared memory. */
__attribute__((weak)) void ks_shim_set_smem(size_t bytes);

Test(linears, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("linear", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(linears, large_tiles) {
  static const group_case c = {
      .n_rows = 530,
      .n_in = 264,
      .n_parts = 3,
      .parts = {{.n_out = 8, .ranks = {8, 5}}, {.n_out = 16, .ranks = {4, 8}}, {.n_out = 8, .ranks = {8, 0}}},
      .dropout = 0.25f,
      .n_segments = 2,
      .segments = {{0, 257, 0}, {260, 270, 1}}};
  if (ks_shim_set_smem) ks_shim_set_smem(163 << 10);
  cr_assert(ks_test_everywhere("linear_forward=none", 0, &c, run) == 0);
}

/* ---------------------------------------------------------------- independence of the batch */

static int64_t check_rows(const char *what, const ks_guard *all, int64_t first, const ks_guard *alone) {
  float *x = ks_guard_read(all), *y = ks_guard_read(alone);
  const int64_t bad = ks_check_same(what, x + first, y, alone->n);
  free(x), free(y);
  return bad;
}

/* Makes the sums of u large and then small again, so that another order of additions gives other bits. */
static void cancel(group *g, int64_t first, int64_t n) {
  const int64_t n_in = g->c->n_in, later = n_in * 3 / 8; /* in another slice of the columns */
  for (int64_t row = first; row < first + n; row++)
    g->x[row * n_in] = g->x[row * n_in + later] = 65536;
  for (int64_t i = 0; i < g->c->n_parts; i++)
    for (int64_t r = 0; r < g->c->parts[i].ranks[0]; r++)
      g->parts[i].lora[0][0][r * n_in + later] = -g->parts[i].lora[0][0][r * n_in];
}

/* One adapter's rows, alone or in a cohort of others, whose numbers must not reach them: the same bits of u, y, dx and
 * gradients. The cohort is large enough for tiles that are summed otherwise. */
static int64_t run_cohort(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const group_case *mine = test_case;
  const int64_t first = 350, n = mine->n_rows;
  group_case all = *mine;
  all.n_rows = first + n + 160;
  all.n_segments = 3;
  all.segments[0].begin = 1, all.segments[0].n_rows = first - 1, all.segments[0].adapter = 1;
  all.segments[1].begin = first, all.segments[1].n_rows = n, all.segments[1].adapter = 0;
  all.segments[2].begin = first + n, all.segments[2].n_rows = 155, all.segments[2].adapter = 2;
  group a, b;
  make_inputs(ctx, &all, &a);
  make_inputs(ctx, mine, &b);
  cancel(&a, first, n), cancel(&b, 0, n);
  memcpy(b.x, a.x + first * mine->n_in, sizeof(float) * (size_t)(n * mine->n_in));
  a.x[2 * mine->n_in] = NAN;
  for (int64_t i = 0; i < mine->n_parts; i++) {
    const int64_t n_out = mine->parts[i].n_out;
    memcpy(b.parts[i].dy, a.parts[i].dy + first * n_out, sizeof(float) * (size_t)(n * n_out));
    memcpy(b.parts[i].dx0, a.parts[i].dx0 + first * mine->n_in, sizeof(float) * (size_t)(n * mine->n_in));
    a.parts[i].lora[1][0][3] = a.parts[i].lora[2][1][1] = NAN;
    a.parts[i].lora[1][1][5] = a.parts[i].lora[2][0][0] = INFINITY;
  }
  put_on(ctx, &a), put_on(ctx, &b);
  run_both_ways(ctx, &a, name), run_both_ways(ctx, &b, name);
  int64_t bad = 0;
  for (int64_t i = 0; i < mine->n_parts; i++) {
    const part *x = &a.parts[i], *y = &b.parts[i];
    bad += check_rows("u in a cohort", &x->u, first * a.args[i].u_stride, &y->u);
    bad += check_rows("y in a cohort", &x->y, first * mine->parts[i].n_out, &y->y);
    if (owner_of(mine, i) == i) bad += check_rows("dx in a cohort", &x->dx, first * mine->n_in, &y->dx);
    bad += check_rows("grad_a in a cohort", &x->on[0][2], 0, &y->on[0][2]);
    bad += check_rows("grad_b_t in a cohort", &x->on[0][3], 0, &y->on[0][3]);
  }
  if (bad) fprintf(stderr, "%s: rows depend on their company\n", name);
  add_results(&b, out);
  free_group(ctx, &a), free_group(ctx, &b);
  return bad;
}

Test(linears, an_adapter_alone_or_in_a_cohort) {
#define PART(out)                                                                                            \
  {                                                                                                          \
    .n_out = out, .ranks = { 8, 16, 5 }                                                                      \
  }
  const group_case mine[] = {{.n_rows = 140,
                              .n_in = 136,
                              .n_parts = 3,
                              .parts = {PART(16), PART(8), PART(8)},
                              .n_segments = 1,
                              .segments = {{0, 140, 0}}},
                             {.n_rows = 30,
                              .n_in = 520,
                              .n_parts = 2,
                              .parts = {PART(8), PART(16)},
                              .dropout = 0.25f,
                              .accumulate = true,
                              .n_segments = 1,
                              .segments = {{0, 30, 0}}}};
#undef PART
  int64_t bad = 0;
  if (ks_shim_set_smem) ks_shim_set_smem(163 << 10);
  for (int i = 0; i < 2; i++)
    bad += ks_test_everywhere("linear", i, &mine[i], run_cohort);
  cr_assert(bad == 0);
}

/* Rows of no adapter: the same y whether others of the batch have one or none has. */
static int64_t run_bystanders(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const group_case *with = test_case;
  group_case without = *with;
  without.n_segments = 0;
  group a, b;
  make_inputs(ctx, with, &a);
  make_inputs(ctx, &without, &b);
  put_on(ctx, &a), put_on(ctx, &b);
  run_both_ways(ctx, &a, name), run_both_ways(ctx, &b, name);
  const int64_t n = with->segments[0].begin * with->parts[0].n_out;
  float *x = ks_guard_read(&a.parts[0].y), *y = ks_guard_read(&b.parts[0].y);
  const int64_t bad = ks_check_same(name, x, y, n);
  ks_results_add(out, x, n);
  free(x), free(y);
  free_group(ctx, &a), free_group(ctx, &b);
  return bad;
}

Test(linears, rows_without_an_adapter_keep_their_bits) {
  const group_case c = {.n_rows = 40,
                        .n_in = 96,
                        .n_parts = 1,
                        .parts = {{.n_out = 48, .ranks = {8}, .bias = true}},
                        .n_segments = 1,
                        .segments = {{21, 19, 0}}};
  cr_assert(ks_test_everywhere("linear", 0, &c, run_bystanders) == 0);
}

/* ---------------------------------------------------------------- with norm and SwiGLU */

static int64_t run_mlp(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const group_case *c = test_case;
  const int64_t n_x = c->n_rows * c->n_in, n_h = c->n_rows * c->parts[0].n_out;
  group g;
  make_inputs(ctx, c, &g);
  put_on(ctx, &g);
  float *w = ks_floats(c->n_in, KS_FILL_POSITIVE, 3);
  ks_guard from = ks_guard_make_act(ctx, g.x, n_x), weight = ks_guard_make(ctx, w, c->n_in),
           rstd = ks_guard_make(ctx, NULL, c->n_rows), x = ks_guard_make_act(ctx, NULL, n_x),
           h = ks_guard_make_act(ctx, NULL, n_h), again = ks_guard_make_act(ctx, NULL, n_h);
  ks_rmsnorm_args norm = {.x = from.p,
                          .w = weight.p,
                          .y = g.x_at.p,
                          .rstd = rstd.p,
                          .n_rows = c->n_rows,
                          .n_cols = c->n_in,
                          .eps = 1e-5f};
  ks_swiglu_args swiglu = {.gate = g.args[0].y, .up = g.args[1].y, .h = h.p, .n = n_h};
  const ks_linears_args a = {.parts = g.args, .n_parts = 2, .norm = &norm, .swiglu = &swiglu};
  cr_assert(ks_linears_forward(ctx, &a) == KS_OK, "%s: %s", name, ks_error_message());
  norm.y = x.p;
  swiglu.h = again.p;
  cr_assert(ks_rmsnorm_forward(ctx, &norm) == KS_OK && ks_swiglu_forward(ctx, &swiglu) == KS_OK);
  int64_t bad = check_rows(name, &g.x_at, 0, &x) + check_rows(name, &h, 0, &again);
  free(g.x);
  g.x = ks_guard_read(&x);
  for (int64_t i = 0; i < 2; i++) {
    part_oracle o;
    make_oracle(&g, i, &o);
    double *y = ks_doubles(NULL, n_h), *size = ks_doubles(NULL, n_h);
    oracle_linear_forward(&o.l, false, y, size);
    bad += ks_guard_check_rounded(name, &g.parts[i].y, y, size, (double)(c->n_in + 8), roundings(1));
    free(y), free(size);
    free_oracle(&o);
  }
  ks_results_add_guard(out, &h);
  ks_guard *all[] = {&from, &weight, &rstd, &x, &h, &again};
  for (int i = 0; i < 6; i++)
    ks_guard_free(all[i]);
  free(w);
  free_group(ctx, &g);
  return bad;
}

Test(linears, norm_before_and_swiglu_after) {
  const group_case c = {.n_rows = 11,
                        .n_in = 64,
                        .n_parts = 2,
                        .parts = {{.n_out = 40, .ranks = {8}}, {.n_out = 40, .ranks = {4}}},
                        .n_segments = 1,
                        .segments = {{0, 8, 0}}};
  cr_assert(ks_test_everywhere("linear_forward", 0, &c, run_mlp) == 0);
}
