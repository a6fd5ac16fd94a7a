#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_attention.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#ifdef KS_CUDA_ON_CPU
#include "kernels/cuda/cuda.h"
#include "ks_shim.h"
#endif

enum { MAX_SEQS = 12 };
typedef struct {
  int64_t n_heads, n_kv_heads, head_dim;
  int64_t n_seqs, n_q[MAX_SEQS], n_k[MAX_SEQS];
  ks_fill_kind fill;
  float scale;     /* 0: 1 / sqrt(head_dim) */
  int64_t gap;     /* rows of no sequence between two */
  int64_t padding; /* kv_stride beyond the heads */
} attention_case;

/* Around the ends of blocks of keys (64), of tiles of rows (16 a warp, 32, 64, 96), and of every head size
 * that a kernel is made for; few queries against many keys, whose blocks of keys are dealt out, and many. */
static const attention_case cases[] = {
    {1, 1, 1, 1, {1}, {1}, KS_FILL_SIGNED, 0, 0, 0},
    {2, 2, 3, 2, {0, 2}, {3, 5}, KS_FILL_SIGNED, 0, 1, 2},
    {4, 2, 17, 3, {1, 31, 33}, {1, 31, 33}, KS_FILL_SIGNED, 0, 0, 0},
    {3, 1, 48, 2, {97, 64}, {97, 64}, KS_FILL_SIGNED, 0, 0, 0},
    {8, 2, 64, 3, {49, 1, 20}, {65, 140, 111}, KS_FILL_SIGNED, 0, 3, 16},
    {7, 1, 32, 2, {32, 63}, {33, 63}, KS_FILL_POSITIVE, 0, 0, 0},
    {2, 1, 100, 3, {70, 5, 1}, {130, 129, 65}, KS_FILL_SIGNED, 1.0f, 0, 4},
    {2, 2, 100, 2, {33, 1}, {65, 129}, KS_FILL_SIGNED, 0, 0, 5},
    {1, 1, 128, 2, {129, 2}, {129, 65}, KS_FILL_NEAR_ONE, 0, 0, 0},
    {2, 2, 256, 2, {17, 1}, {81, 66}, KS_FILL_SIGNED, 0, 0, 0},
    {2, 1, 200, 1, {34}, {65}, KS_FILL_SIGNED, 0, 0, 8},
    {1, 1, 16, 1, {3}, {1025}, KS_FILL_SIGNED, 4.0f, 0, 0},
    {2, 2, 10, 2, {20, 9}, {20, 9}, KS_FILL_INTEGER, -0.5f, 0, 0},
    {1, 1, 64, 1, {1}, {1100}, KS_FILL_LARGE, 1e-8f, 0, 0},
    {2, 1, 64, 2, {66, 3}, {66, 190}, KS_FILL_SIGNED, 40.0f, 0, 0}, /* exponents that must not overflow */
    {8, 1, 40, 2, {3, 33}, {97, 33}, KS_FILL_SIGNED, 0, 0, 0},
    {3, 1, 80, 1, {31}, {63}, KS_FILL_SIGNED, 0, 0, 0},
    {1, 1, 96, 2, {63, 64}, {64, 64}, KS_FILL_SIGNED, 0, 2, 0},
    {1, 1, 111, 1, {33}, {97}, KS_FILL_SIGNED, 0, 0, 0},
    {32, 1, 50, 1, {2}, {130}, KS_FILL_SIGNED, 0, 0, 0},
    {1, 1, 128, 1, {140}, {150}, KS_FILL_SIGNED, 0, 0, 0},
    {4, 2, 100, 1, {72}, {135}, KS_FILL_SIGNED, 0, 0, 8},
    {1, 1, 64, 1, {150}, {260}, KS_FILL_SIGNED, 0, 0, 0},
    {2,
     1,
     32,
     12,
     {1, 2, 3, 5, 1, 7, 1, 1, 9, 4, 1, 6},
     {1, 2, 8, 5, 67, 7, 129, 1, 9, 80, 64, 6},
     KS_FILL_SIGNED,
     0,
     0,
     0}};
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* The packed arrays of a case, on the host. */
typedef struct {
  int64_t n_rows, q_cols, kv_stride, n_kv;
  int64_t q_begin[MAX_SEQS], k_begin[MAX_SEQS];
  float scale, *q, *k, *v, *d_o;
} data;

static data make_data(const ks_ctx *ctx, const attention_case *c) {
  data d = {.q_cols = c->n_heads * c->head_dim, .kv_stride = c->n_kv_heads * c->head_dim + c->padding};
  for (int64_t s = 0; s < c->n_seqs; s++) {
    d.q_begin[s] = d.n_rows + c->gap;
    d.n_rows = d.q_begin[s] + c->n_q[s];
    d.k_begin[s] = d.n_kv;
    d.n_kv += c->n_k[s];
  }
  d.n_rows += c->gap;
  d.scale = c->scale != 0 ? c->scale : 1 / sqrtf((float)c->head_dim);
  const int64_t n_q = d.n_rows * d.q_cols, n_kv = d.n_kv * d.kv_stride;
  d.q = ks_floats(n_q, c->fill, 1), d.d_o = ks_floats(n_q, KS_FILL_SIGNED, 4);
  d.k = ks_floats(n_kv, c->fill, 2), d.v = ks_floats(n_kv, c->fill, 3);
  ks_act_round(ctx, d.q, n_q), ks_act_round(ctx, d.d_o, n_q);
  ks_act_round(ctx, d.k, n_kv), ks_act_round(ctx, d.v, n_kv);
  return d;
}

static void free_data(data *d) {
  free(d->q), free(d->k), free(d->v), free(d->d_o);
}

/* Rows of one sequence without the padding, in double. */
static double *unpadded(const float *x, const attention_case *c, const data *d, int64_t s) {
  const int64_t cols = c->n_kv_heads * c->head_dim;
  double *y = ks_doubles(NULL, c->n_k[s] * cols);
  for (int64_t j = 0; j < c->n_k[s]; j++)
    for (int64_t i = 0; i < cols; i++)
      y[j * cols + i] = (double)x[(d->k_begin[s] + j) * d->kv_stride + i];
  return y;
}

typedef struct {
  ks_guard q, k, v, o, lse, d_o, dq, dk, dv;
  ks_attention_seq seqs[MAX_SEQS];
  ks_attention_args a;
} setup;

static void make_setup(ks_ctx *ctx, const attention_case *c, const data *d, setup *s) {
  const int64_t n_q = d->n_rows * d->q_cols, n_kv = d->n_kv * d->kv_stride;
  s->q = ks_guard_make_act(ctx, d->q, n_q), s->d_o = ks_guard_make_act(ctx, d->d_o, n_q);
  s->k = ks_guard_make_act(ctx, d->k, n_kv), s->v = ks_guard_make_act(ctx, d->v, n_kv);
  s->o = ks_guard_make_act(ctx, NULL, n_q), s->dq = ks_guard_make_act(ctx, NULL, n_q);
  s->dk = ks_guard_make_act(ctx, NULL, n_kv), s->dv = ks_guard_make_act(ctx, NULL, n_kv);
  s->lse = ks_guard_make(ctx, NULL, d->n_rows * c->n_heads);
  for (int64_t i = 0; i < c->n_seqs; i++) {
    const int64_t at = d->k_begin[i] * d->kv_stride;
    s->seqs[i] = (ks_attention_seq){.q_begin = d->q_begin[i],
                                    .n_q = c->n_q[i],
                                    .n_k = c->n_k[i],
                                    .k = ks_guard_at(&s->k, at),
                                    .v = ks_guard_at(&s->v, at),
                                    .dk = ks_guard_at(&s->dk, at),
                                    .dv = ks_guard_at(&s->dv, at)};
  }
  s->a = (ks_attention_args){.q = s->q.p,
                             .o = s->o.p,
                             .lse = s->lse.p,
                             .seqs = s->seqs,
                             .n_seqs = c->n_seqs,
                             .n_rows = d->n_rows,
                             .n_heads = c->n_heads,
                             .n_kv_heads = c->n_kv_heads,
                             .head_dim = c->head_dim,
                             .kv_stride = d->kv_stride,
                             .scale = d->scale,
                             .d_o = s->d_o.p,
                             .dq = s->dq.p};
}

static void free_setup(setup *s) {
  ks_guard *all[] = {&s->q, &s->k, &s->v, &s->o, &s->lse, &s->d_o, &s->dq, &s->dk, &s->dv};
  for (int i = 0; i < 9; i++)
    ks_guard_free(all[i]);
}

/* References of all sequences, laid out like the results; NaN where nothing is written. Of each result: what
 * it is, the size of its error, and that of what is rounded once more (see oracle_attention.h). */
enum { O, LSE, DQ, DK, DV, N_RESULTS };
typedef struct {
  double *ref[N_RESULTS], *size[N_RESULTS], *rounded[N_RESULTS];
} refs;

static void put_padded(const double *x, const attention_case *c, const data *d, int64_t s, double *y) {
  const int64_t cols = c->n_kv_heads * c->head_dim;
  for (int64_t j = 0; j < c->n_k[s]; j++)
    memcpy(y + (d->k_begin[s] + j) * d->kv_stride, x + j * cols, (size_t)cols * sizeof *x);
}

static void fill_refs(const attention_case *c, const data *d, refs *r, int64_t s) {
  const int64_t at = d->q_begin[s] * d->q_cols, lse_at = d->q_begin[s] * c->n_heads,
                n_kv = c->n_k[s] * c->n_kv_heads * c->head_dim;
  double *q = ks_doubles(d->q + at, c->n_q[s] * d->q_cols);
  double *d_o = ks_doubles(d->d_o + at, c->n_q[s] * d->q_cols);
  double *k = unpadded(d->k, c, d, s), *v = unpadded(d->v, c, d, s), *grads[6];
  for (int i = 0; i < 6; i++)
    grads[i] = ks_doubles(NULL, n_kv);
  const oracle_attention oa = {c->n_q[s], c->n_k[s], c->n_heads, c->n_kv_heads, c->head_dim, (double)d->scale,
                               q,         k,         v};
  const oracle_attention_outs out = {.o = r->ref[O] + at,
                                     .o_size = r->size[O] + at,
                                     .o_rounded = r->rounded[O] + at,
                                     .lse = r->ref[LSE] + lse_at,
                                     .lse_size = r->size[LSE] + lse_at};
  oracle_attention_forward(&oa, &out);
  const oracle_attention_grads g = {.dq = r->ref[DQ] + at,
                                    .dq_size = r->size[DQ] + at,
                                    .dq_rounded = r->rounded[DQ] + at,
                                    .dk = grads[0],
                                    .dk_size = grads[1],
                                    .dk_rounded = grads[2],
                                    .dv = grads[3],
                                    .dv_size = grads[4],
                                    .dv_rounded = grads[5]};
  oracle_attention_backward(&oa, d_o, &g);
  double *to[] = {r->ref[DK], r->size[DK], r->rounded[DK], r->ref[DV], r->size[DV], r->rounded[DV]};
  for (int i = 0; i < 6; i++) {
    put_padded(grads[i], c, d, s, to[i]);
    free(grads[i]);
  }
  free(q), free(d_o), free(k), free(v);
}

static void make_refs(const attention_case *c, const data *d, refs *r) {
  const int64_t n_q = d->n_rows * d->q_cols, n_kv = d->n_kv * d->kv_stride;
  const int64_t n[N_RESULTS] = {n_q, d->n_rows * c->n_heads, n_q, n_kv, n_kv};
  for (int i = 0; i < N_RESULTS; i++) {
    r->ref[i] = ks_doubles(NULL, n[i]), r->size[i] = ks_doubles(NULL, n[i]);
    r->rounded[i] = ks_doubles(NULL, n[i]);
    for (int64_t j = 0; j < n[i]; j++)
      r->ref[i][j] = NAN;
  }
  for (int64_t s = 0; s < c->n_seqs; s++)
    fill_refs(c, d, r, s);
}

/* ks_guard_check_output, with what is rounded to bf16 in between at its own size. */
static int64_t check(const char *name, const ks_guard *g, const double *ref, const double *size,
                     const double *rounded, double chain) {
  if (ks_ctx_act_dtype(g->ctx) == KS_DTYPE_F32) return ks_guard_check_output(name, g, ref, size, chain);
  double *all = ks_doubles(NULL, g->n);
  for (int64_t i = 0; i < g->n; i++)
    all[i] = rounded[i] + (4 + sqrt(chain)) * 0x1p-24 / 0x1p-8 * size[i];
  int64_t bad = ks_guard_check_rounded(name, g, ref, all, chain, 1);
  free(all);
  return bad;
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  static const char *const what[N_RESULTS] = {"o", "lse", "dq", "dk", "dv"};
  const attention_case *c = test_case;
  data d = make_data(ctx, c);
  setup s;
  refs r;
  make_setup(ctx, c, &d, &s);
  make_refs(c, &d, &r);
  int64_t bad = ks_attention_forward(ctx, &s.a) != KS_OK, longest = 0;
  bad += ks_attention_backward(ctx, &s.a) != KS_OK;
  if (bad) fprintf(stderr, "%s: %s\n", name, ks_error_message());
  for (int64_t i = 0; i < c->n_seqs; i++)
    longest = c->n_k[i] > longest ? c->n_k[i] : longest;
  const double chain = (double)(longest > c->head_dim ? longest : c->head_dim);
  const double back = (double)c->n_heads / (double)c->n_kv_heads * chain;
  ks_guard *in[] = {&s.q, &s.k, &s.v, &s.d_o}, *outs[] = {&s.o, &s.lse, &s.dq, &s.dk, &s.dv};
  for (int i = 0; i < 4; i++)
    bad += ks_guard_check_input(name, in[i]);
  for (int i = 0; i < N_RESULTS; i++) {
    char text[240];
    snprintf(text, sizeof text, "%s, %s", name, what[i]);
    bad += check(text, outs[i], r.ref[i], r.size[i], r.rounded[i], i > DQ ? back : chain);
    ks_results_add_guard(out, outs[i]);
    free(r.ref[i]), free(r.size[i]), free(r.rounded[i]);
  }
  free_setup(&s);
  free_data(&d);
  return bad;
}

Test(attention, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("attention", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* ---------------------------------------------------------------- one chain for every way */

typedef struct {
  int64_t n_heads, n_kv_heads, head_dim, n;
} shape;

/* Forward of the one sequence `seq`, whose rows are all there are. */
static ks_attention_args one_sequence(const ks_guard *q, const ks_guard *o, const ks_guard *lse,
                                      const ks_attention_seq *seq, shape c, float scale) {
  return (ks_attention_args){.q = q->p,
                             .o = o->p,
                             .lse = lse ? lse->p : NULL,
                             .seqs = seq,
                             .n_seqs = 1,
                             .n_rows = c.n,
                             .n_heads = c.n_heads,
                             .n_kv_heads = c.n_kv_heads,
                             .head_dim = c.head_dim,
                             .kv_stride = c.n_kv_heads * c.head_dim,
                             .scale = scale};
}

/* Rows `from` .. of x become the first `rows` rows of y. */
static int64_t copy_rows(const ks_guard *y, int64_t to, const ks_guard *x, int64_t from, int64_t rows,
                         int64_t cols) {
  return ks_mem_copy(y->ctx, ks_guard_at(y, to * cols), ks_guard_at(x, from * cols),
                     (size_t)(rows * cols) * ks_ctx_act_size(y->ctx)) != KS_OK;
}

/* Bits of rows [from, to) of both. */
static int64_t compare_rows(const char *name, const ks_guard *a, const ks_guard *b, int64_t from, int64_t to,
                            int64_t cols) {
  float *x = ks_guard_read(a), *y = ks_guard_read(b);
  int64_t bad = ks_check_same(name, x + from * cols, y + from * cols, (to - from) * cols);
  free(x), free(y);
  return bad;
}

/* Prefill of n tokens, then decoding token by token with whatever lies beyond in the cache being NaN: same
 * bits. Prefill in pieces: same bits. */
static int64_t run_decode(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const shape *c = test_case;
  const int64_t n = c->n, qc = c->n_heads * c->head_dim, kc = c->n_kv_heads * c->head_dim;
  float *q = ks_floats(n * qc, KS_FILL_SIGNED, 1), *k = ks_floats(n * kc, KS_FILL_SIGNED, 2),
        *v = ks_floats(n * kc, KS_FILL_SIGNED, 3);
  ks_guard gq = ks_guard_make_act(ctx, q, n * qc), gk = ks_guard_make_act(ctx, k, n * kc),
           gv = ks_guard_make_act(ctx, v, n * kc), o = ks_guard_make_act(ctx, NULL, n * qc),
           one = ks_guard_make_act(ctx, NULL, n * qc), cache_k = ks_guard_make_act(ctx, NULL, n * kc),
           cache_v = ks_guard_make_act(ctx, NULL, n * kc), lse = ks_guard_make(ctx, NULL, n * c->n_heads),
           lse_one = ks_guard_make(ctx, NULL, n * c->n_heads);
  ks_attention_seq seq = {.n_q = n, .n_k = n, .k = gk.p, .v = gv.p};
  ks_attention_args a = one_sequence(&gq, &o, &lse, &seq, *c, 0.3f);
  int64_t bad = ks_attention_forward(ctx, &a) != KS_OK;
  a.o = one.p, a.lse = lse_one.p;
  seq.k = cache_k.p, seq.v = cache_v.p;
  for (int64_t t = 0; t < n; t++) {
    bad += copy_rows(&cache_k, t, &gk, t, 1, kc) + copy_rows(&cache_v, t, &gv, t, 1, kc);
    if (ks_test_is_shim() && t % 64 > 1 && t % 64 < 63 && t + 1 < n) continue;
    seq.q_begin = t, seq.n_q = 1, seq.n_k = t + 1;
    bad += ks_attention_forward(ctx, &a) != KS_OK;
    bad +=
        compare_rows(name, &one, &o, t, t + 1, qc) + compare_rows(name, &lse_one, &lse, t, t + 1, c->n_heads);
  }
  const int64_t cuts[] = {0, n / 3, n / 3 + 1, n - 5, n};
  for (int i = 0; i < 4; i++) {
    seq.q_begin = cuts[i], seq.n_q = cuts[i + 1] - cuts[i], seq.n_k = cuts[i + 1];
    bad += ks_attention_forward(ctx, &a) != KS_OK;
  }
  bad += compare_rows(name, &one, &o, 0, n, qc);
  ks_results_add_guard(out, &o);
  ks_guard *all[] = {&gq, &gk, &gv, &o, &one, &cache_k, &cache_v, &lse, &lse_one};
  for (int i = 0; i < 9; i++)
    ks_guard_free(all[i]);
  free(q), free(k), free(v);
  return bad;
}

static const shape decode_shapes[] = {{6, 2, 48, 131}, {8, 2, 64, 70},   {7, 1, 100, 97},  {4, 2, 33, 66},
                                      {1, 1, 256, 65}, {12, 1, 64, 131}, {2, 1, 128, 200}, {1, 1, 30, 200}};
static int64_t decode_from(int first) {
  int64_t bad = 0;
  for (int i = first; i < (int)(sizeof decode_shapes / sizeof decode_shapes[0]); i++)
    bad += ks_test_everywhere("attention_forward", i, &decode_shapes[i], run_decode);
  return bad;
}
Test(attention, decode_equals_prefill) {
  cr_assert(decode_from(0) == 0);
}
#ifdef KS_CUDA_ON_CPU
Test(attention, decode_equals_prefill_with_deeper_rings) {
  ks_shim_set_hopper(1);
  static const attention_case often_around = {2, 1, 64, 1, {1}, {1100}, KS_FILL_SIGNED, 1, 0, 0};
  cr_assert(ks_test_everywhere("attention", 0, &often_around, run) + decode_from(5) == 0);
}
#endif

/* A sequence's results and gradients are the same bits alone and in a batch. */
static int64_t run_alone(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const attention_case *c = test_case;
  data d = make_data(ctx, c);
  setup s, alone;
  make_setup(ctx, c, &d, &s), make_setup(ctx, c, &d, &alone);
  int64_t bad = (ks_attention_forward(ctx, &s.a) != KS_OK) + (ks_attention_backward(ctx, &s.a) != KS_OK);
  alone.a.n_seqs = 1;
  for (int64_t i = 0; i < c->n_seqs; i++) {
    alone.a.seqs = &alone.seqs[i];
    bad += (ks_attention_forward(ctx, &alone.a) != KS_OK) + (ks_attention_backward(ctx, &alone.a) != KS_OK);
  }
  const ks_guard *one[] = {&alone.o, &alone.lse, &alone.dq, &alone.dk, &alone.dv},
                 *all[] = {&s.o, &s.lse, &s.dq, &s.dk, &s.dv};
  for (int i = 0; i < 5; i++) {
    bad += compare_rows(name, one[i], all[i], 0, 1, all[i]->n);
    ks_results_add_guard(out, all[i]);
  }
  free_setup(&s), free_setup(&alone);
  free_data(&d);
  return bad;
}

Test(attention, a_sequence_does_not_depend_on_its_batch) {
  /* A decoding pass: prompts, pieces of prompts and single tokens. */
  static const attention_case mixed = {
      4, 2, 40, 6, {1, 31, 33, 1, 2, 70}, {66, 31, 97, 1, 129, 70}, KS_FILL_SIGNED, 0, 0, 0};
  /* Tokens alone go to many SMs, the batch is more than there are: a block of threads for each key head. */
  static const attention_case tokens = {12,
                                        12,
                                        20,
                                        12,
                                        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
                                        {1, 64, 65, 3, 129, 30, 2, 2, 9, 17, 3, 63},
                                        KS_FILL_SIGNED,
                                        0,
                                        0,
                                        0};
  int64_t bad = ks_test_everywhere("attention", 0, &mixed, run_alone) +
                ks_test_everywhere("attention", 1, &tokens, run_alone);
  cr_assert(bad == 0);
}

/* The same keys in pages, in any order, among pages of NaN: same bits. */
typedef struct {
  attention_case c;
  int64_t page_rows;
} paged_case;

/* Puts the keys of `from` into pages of `to`; pages[s] gets the table of sequence s. */
static int64_t make_pages(const paged_case *p, const data *d, const ks_guard *from, const ks_guard *to,
                          int32_t pages[MAX_SEQS][8]) {
  int64_t bad = 0, next = 1; /* page 0 stays NaN */
  for (int64_t s = p->c.n_seqs - 1; s >= 0; s--)
    for (int64_t n = (p->c.n_k[s] - 1) / p->page_rows; n >= 0; n--, next++) {
      const int64_t at = n * p->page_rows, left = p->c.n_k[s] - at;
      pages[s][n] = (int32_t)next;
      bad += copy_rows(to, next * p->page_rows, from, d->k_begin[s] + at,
                       left < p->page_rows ? left : p->page_rows, d->kv_stride);
    }
  return bad;
}

static int64_t run_paged(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N_PAGES = 16 };
  const paged_case *p = test_case;
  const attention_case *c = &p->c;
  int32_t pages[MAX_SEQS][8];
  data d = make_data(ctx, c);
  setup s;
  make_setup(ctx, c, &d, &s);
  const int64_t n_rows = N_PAGES * p->page_rows;
  ks_guard k = ks_guard_make_act(ctx, NULL, n_rows * d.kv_stride),
           v = ks_guard_make_act(ctx, NULL, n_rows * d.kv_stride),
           o = ks_guard_make_act(ctx, NULL, d.n_rows * d.q_cols),
           lse = ks_guard_make(ctx, NULL, d.n_rows * c->n_heads);
  int64_t bad = ks_attention_forward(ctx, &s.a) != KS_OK;
  bad += make_pages(p, &d, &s.k, &k, pages) + make_pages(p, &d, &s.v, &v, pages);
  for (int64_t i = 0; i < c->n_seqs; i++)
    s.seqs[i].k = k.p, s.seqs[i].v = v.p, s.seqs[i].pages = pages[i];
  s.a.page_rows = p->page_rows, s.a.n_page_rows = n_rows;
  s.a.o = o.p, s.a.lse = lse.p;
  bad += ks_attention_forward(ctx, &s.a) != KS_OK;
  bad += compare_rows(name, &o, &s.o, 0, d.n_rows, d.q_cols) +
         compare_rows(name, &lse, &s.lse, 0, d.n_rows, c->n_heads);
  bad += ks_guard_check_walls(name, &o);
  ks_results_add_guard(out, &o);
  ks_guard *all[] = {&k, &v, &o, &lse};
  for (int i = 0; i < 4; i++)
    ks_guard_free(all[i]);
  free_setup(&s);
  free_data(&d);
  return bad;
}

Test(attention, pages_change_no_bit) {
  static const paged_case paged[] = {
      {{4, 2, 32, 4, {1, 3, 70, 1}, {64, 200, 70, 130}, KS_FILL_SIGNED, 0, 0, 0}, 64},
      {{2, 1, 100, 3, {1, 2, 5}, {129, 65, 5}, KS_FILL_SIGNED, 0, 0, 4}, 128},
      {{4, 2, 32, 2, {1, 1}, {330, 129}, KS_FILL_SIGNED, 0, 0, 0}, 64},
      {{2, 1, 100, 3, {1, 1, 1}, {129, 400, 5}, KS_FILL_SIGNED, 0, 0, 4}, 128}};
  int64_t bad = 0;
  for (int i = 0; i < 4; i++)
    bad += ks_test_everywhere("attention_forward", i, &paged[i], run_paged);
  cr_assert(bad == 0);
}

/* ---------------------------------------------------------------- values with exact answers */

/* One sequence of one head with host arrays q, k, v [n, d] and scale 1; o and lse for the caller to free. */
static int64_t forward_of(ks_ctx *ctx, const float *q, const float *k, const float *v, int64_t n, int64_t d,
                          float **o, float **lse) {
  ks_guard gq = ks_guard_make_act(ctx, q, n * d), gk = ks_guard_make_act(ctx, k, n * d),
           gv = ks_guard_make_act(ctx, v, n * d), go = ks_guard_make_act(ctx, NULL, n * d),
           gl = ks_guard_make(ctx, NULL, n);
  ks_attention_seq seq = {.n_q = n, .n_k = n, .k = gk.p, .v = gv.p};
  const ks_attention_args a = one_sequence(&gq, &go, &gl, &seq, (shape){1, 1, d, n}, 1);
  int64_t bad = ks_attention_forward(ctx, &a) != KS_OK;
  *o = ks_guard_read(&go), *lse = ks_guard_read(&gl);
  /* The last queries alone, as decoding takes them: the same, but for the bits of a NaN. */
  for (int64_t tail = n < 5 ? n : 5; tail > 0; tail -= 4) {
    seq.q_begin = n - tail, seq.n_q = tail;
    bad += ks_attention_forward(ctx, &a) != KS_OK;
    float *again = ks_guard_read(&go);
    for (int64_t i = 0; i < n * d; i++)
      bad += isnan((*o)[i]) ? !isnan(again[i]) : (*o)[i] != again[i];
    free(again);
  }
  ks_guard *all[] = {&gq, &gk, &gv, &go, &gl};
  for (int i = 0; i < 5; i++)
    ks_guard_free(all[i]);
  return bad;
}

/* With q = 0 every visible key weighs the same: integers average exactly when their number is a power of two.
 */
static int64_t run_average(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N = 260, D = 5 };
  float *q = ks_floats(N * D, KS_FILL_SIGNED, 1), *v = ks_floats(N * D, KS_FILL_INTEGER, 2), *o, *lse;
  (void)test_case;
  memset(q, 0, N * D * sizeof *q);
  int64_t bad = forward_of(ctx, q, v, v, N, D, &o, &lse);
  for (int64_t n = 1; n <= N; n *= 2)
    for (int c = 0; c < D; c++) {
      float sum = 0;
      for (int64_t j = 0; j < n; j++)
        sum += v[j * D + c];
      sum /= (float)n;
      ks_act_round(ctx, &sum, 1);
      bad += ks_check_same(name, &o[(n - 1) * D + c], &sum, 1);
    }
  ks_results_add(out, o, N * D);
  free(q), free(v), free(o), free(lse);
  return bad;
}

Test(attention, equal_scores_average) {
  cr_assert(ks_test_everywhere("attention_forward", 0, NULL, run_average) == 0);
}

/* A NaN (or, of values, infinite) key or value reaches the queries that see it and no other, wherever it lies
 * in blocks and tiles. */
static int64_t run_nan(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N = 140, D = 20 };
  const int step = ks_test_is_shim() ? 27 : 13, near = ks_test_is_shim() ? 63 : 60,
            far = ks_test_is_shim() ? 65 : 75;
  float *q = ks_floats(N * D, KS_FILL_POSITIVE, 1);
  int64_t bad = 0;
  (void)test_case, (void)out;
  for (int at = 0; at < N;
       at += at < near || at > far ? (at < near && at + step > near ? near - at : step) : 1)
    for (int kind = 0; kind < 3; kind++) {
      float *k = ks_floats(N * D, KS_FILL_POSITIVE, 2), *v = ks_floats(N * D, KS_FILL_POSITIVE, 3), *o, *lse;
      (kind ? v : k)[at * D + 3] = kind == 2 ? INFINITY : NAN;
      bad += forward_of(ctx, q, k, v, N, D, &o, &lse);
      for (int i = 0; i < N; i++) {
        bad += !isnan(lse[i]) != !(kind == 0 && i >= at);
        for (int c = 0; c < D; c++) {
          const bool reached = i >= at && (kind == 0 || c == 3),
                     is_right = reached ? kind == 2 ? o[i * D + c] == INFINITY : isnan(o[i * D + c])
                                        : isfinite(o[i * D + c]);
          if (!is_right)
            fprintf(stderr, "%s: kind %d at %d, row %d column %d is %g\n", name, kind, at, i, c,
                    (double)o[i * D + c]);
          bad += !is_right;
        }
      }
      free(k), free(v), free(o), free(lse);
    }
  free(q);
  return bad;
}

Test(attention, nan_reaches_only_those_who_see_it) {
  cr_assert(ks_test_everywhere("attention_forward", 0, NULL, run_nan) == 0);
}

/* Scores of -inf weigh nothing, but for rows that see nothing else: those are NaN, as in torch. */
static int64_t run_infinite(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  enum { N = 140, D = 20, AT = 70 };
  float *q = ks_floats(N * D, KS_FILL_POSITIVE, 1), *k = ks_floats(N * D, KS_FILL_POSITIVE, 2);
  float *v = ks_floats(N * D, KS_FILL_SIGNED, 3), *o, *lse;
  (void)test_case, (void)out;
  for (int j = 0; j < AT; j++)
    k[j * D] = -INFINITY;
  int64_t bad = forward_of(ctx, q, k, v, N, D, &o, &lse);
  for (int i = 0; i < N; i++)
    bad += !isnan(o[i * D]) != !(i < AT) || !(i < AT ? lse[i] == -INFINITY : isfinite(lse[i]));
  ks_act_round(ctx, v, N * D);
  bad += ks_check_same(name, o + AT * D, v + AT * D, D);
  free(q), free(k), free(o), free(v), free(lse);
  return bad;
}

Test(attention, infinite_scores) {
  cr_assert(ks_test_everywhere("attention_forward", 0, NULL, run_infinite) == 0);
}

Test(attention, oracle_gradient_matches_central_differences) {
  enum { NQ = 3, NK = 5, H = 4, KV = 2, D = 3 };
  float *qf = ks_floats(NQ * H * D, KS_FILL_SIGNED, 1), *kf = ks_floats(NK * KV * D, KS_FILL_SIGNED, 2);
  float *vf = ks_floats(NK * KV * D, KS_FILL_SIGNED, 3), *gf = ks_floats(NQ * H * D, KS_FILL_SIGNED, 4);
  double *q = ks_doubles(qf, NQ * H * D), *k = ks_doubles(kf, NK * KV * D), *v = ks_doubles(vf, NK * KV * D);
  double *d_o = ks_doubles(gf, NQ * H * D), dq[NQ * H * D], dk[NK * KV * D], dv[NK * KV * D], o[NQ * H * D];
  oracle_attention a = {NQ, NK, H, KV, D, 0.7, q, k, v};
  oracle_attention_backward(&a, d_o, &(oracle_attention_grads){.dq = dq, .dk = dk, .dv = dv});
  double *x[] = {q, k, v};
  const double *grad[] = {dq, dk, dv};
  const int n[] = {NQ * H * D, NK * KV * D, NK * KV * D};
  for (int w = 0; w < 3; w++)
    for (int i = 0; i < n[w]; i++) {
      const double h = 1e-5, at = x[w][i];
      double f[2] = {0, 0};
      for (int side = 0; side < 2; side++) {
        x[w][i] = at + (side ? h : -h);
        oracle_attention_forward(&a, &(oracle_attention_outs){.o = o});
        for (int c = 0; c < NQ * H * D; c++)
          f[side] += o[c] * d_o[c];
      }
      x[w][i] = at;
      cr_assert(fabs((f[1] - f[0]) / (2 * h) - grad[w][i]) <= 100 * h * h, "input %d element %d", w, i);
    }
  void *all[] = {qf, kf, vf, gf, q, k, v, d_o};
  for (int i = 0; i < 8; i++)
    free(all[i]);
}

Test(attention, illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard g = ks_guard_make(ctx, NULL, 8 * 16);
  float *at[8];
  for (int i = 0; i < 8; i++)
    at[i] = ks_guard_at(&g, 16 * i);
  float *q = at[0], *k = at[1], *v = at[2], *o = at[3], *lse = at[4], *dk = at[5], *dv = at[6], *dq = at[7];
  const int32_t good_pages[1] = {0}, bad_pages[1] = {1};
  const ks_attention_seq good_seq = {.n_q = 2, .n_k = 2, .k = k, .v = v, .dk = dk, .dv = dv};
  ks_attention_seq seq = good_seq;
  const ks_attention_args good = {.q = q,
                                  .o = o,
                                  .lse = lse,
                                  .seqs = &seq,
                                  .n_seqs = 1,
                                  .n_rows = 2,
                                  .n_heads = 2,
                                  .n_kv_heads = 1,
                                  .head_dim = 4,
                                  .kv_stride = 4,
                                  .scale = 1,
                                  .d_o = q,
                                  .dq = dq};
  ks_attention_args a = good;
  cr_assert(ks_attention_forward(ctx, &a) == KS_OK && ks_attention_backward(ctx, &a) == KS_OK);
  a.n_kv_heads = 0;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.n_heads = 3, a.n_kv_heads = 2, a.kv_stride = 8;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.kv_stride = 3;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.scale = NAN;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.o = q;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.n_rows = 1;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  a = good, a.lse = NULL;
  cr_assert(ks_attention_backward(ctx, &a) == KS_EINVAL);
  a = good, seq.n_k = 1;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  seq = good_seq, seq.k = NULL;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL);
  seq = good_seq, seq.dk = NULL;
  cr_assert(ks_attention_backward(ctx, &a) == KS_EINVAL);
  seq = good_seq, seq.dv = dk;
  cr_assert(ks_attention_backward(ctx, &a) == KS_EINVAL);
  seq = good_seq, seq.dk = k;
  cr_assert(ks_attention_backward(ctx, &a) == KS_EINVAL);
  seq = good_seq, seq.pages = good_pages;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL, "pages of no rows");
  a.page_rows = 32, a.n_page_rows = 64;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL, "pages of 32 rows");
  a.page_rows = 64, seq.pages = bad_pages;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL, "page beyond the cache");
  seq.pages = good_pages, a.n_page_rows = 63;
  cr_assert(ks_attention_forward(ctx, &a) == KS_EINVAL, "page partly beyond the cache");
  a.n_page_rows = 64;
  cr_assert(ks_attention_backward(ctx, &a) == KS_EINVAL, "backward with pages");
  seq = (ks_attention_seq){0};
  a.head_dim = a.kv_stride = 257, a.n_rows = 0;
  cr_assert(ks_attention_forward(ctx, &a) == (ks_test_is_cuda() ? KS_EUNSUPPORTED : KS_OK), "long heads");
  ks_guard_free(&g);
  ks_ctx_destroy(ctx);
}

/* Keys and values interleaved in one buffer, whose end is not the end of a whole stride of values. */
Test(attention, interleaved_keys_and_values) {
  enum { N = 9, D = 6 };
  ks_ctx *ctx = ks_test_any_ctx();
  float *q = ks_floats(N * D, KS_FILL_SIGNED, 1), *k = ks_floats(N * D, KS_FILL_SIGNED, 2),
        *v = ks_floats(N * D, KS_FILL_SIGNED, 3);
  float kv[N * 3 * D] = {0}; /* the result lies right behind the last value */
  for (int j = 0; j < N; j++) {
    memcpy(kv + j * 2 * D, k + j * D, D * sizeof *k);
    memcpy(kv + j * 2 * D + D, v + j * D, D * sizeof *v);
  }
  ks_guard gq = ks_guard_make(ctx, q, N * D), gk = ks_guard_make(ctx, k, N * D),
           gv = ks_guard_make(ctx, v, N * D), go = ks_guard_make(ctx, NULL, N * D),
           arena = ks_guard_make(ctx, kv, N * 3 * D);
  ks_attention_seq seq = {.n_q = N, .n_k = N, .k = gk.p, .v = gv.p};
  ks_attention_args a = one_sequence(&gq, &go, NULL, &seq, (shape){1, 1, D, N}, 1);
  cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
  seq.k = arena.p, seq.v = ks_guard_at(&arena, D);
  a.kv_stride = 2 * D, a.o = ks_guard_at(&arena, N * 2 * D);
  cr_assert(ks_attention_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  float *x = ks_guard_read(&go), *y = ks_guard_read(&arena);
  cr_assert(ks_check_same("interleaved", x, y + N * 2 * D, N * D) == 0);
  ks_guard *all[] = {&gq, &gk, &gv, &go, &arena};
  for (int i = 0; i < 5; i++)
    ks_guard_free(all[i]);
  free(q), free(k), free(v), free(x), free(y);
  ks_ctx_destroy(ctx);
}

#ifdef KS_CUDA_ON_CPU
/* A decoding step whose sequences grow by a token is the same step: but for a few lengths, where a table
 * grows, it is launched as a whole. */
Test(attention, growing_sequences_repeat_their_step) {
  enum { N = 3, D = 32, PAGE = 64, ROWS = 8 * PAGE, STEPS = 24 };
  const int32_t pages[N][3] = {{3, 1, 0}, {2, 5, 0}, {4, 6, 7}};
  ks_ctx *ctx = ks_test_any_ctx();
  ks_guard q = ks_guard_make(ctx, NULL, N * D), kv = ks_guard_make(ctx, NULL, ROWS * D),
           o = ks_guard_make(ctx, NULL, N * D);
  ks_attention_seq seqs[N];
  const ks_attention_args a = {.q = q.p,
                               .o = o.p,
                               .seqs = seqs,
                               .n_seqs = N,
                               .n_rows = N,
                               .n_heads = 1,
                               .n_kv_heads = 1,
                               .head_dim = D,
                               .kv_stride = D,
                               .page_rows = PAGE,
                               .n_page_rows = ROWS,
                               .scale = 1};
  for (int64_t step = 0; step < STEPS; step++) {
    for (int64_t s = 0; s < N; s++)
      seqs[s] = (ks_attention_seq){
          .q_begin = s, .n_q = 1, .n_k = 66 + 20 * s + step, .k = kv.p, .v = kv.p, .pages = pages[s]};
    cr_assert(ks_step_begin(ctx, 1) == KS_OK);
    cr_assert(ks_attention_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
    cr_assert(ks_step_end(ctx) == KS_OK);
  }
  cr_assert(ks_cuda_counts_of(ctx)->steps_replayed >= STEPS - 2, "%d of %d",
            (int)ks_cuda_counts_of(ctx)->steps_replayed, STEPS);
  ks_guard_free(&q), ks_guard_free(&kv), ks_guard_free(&o);
  ks_ctx_destroy(ctx);
}
#endif
