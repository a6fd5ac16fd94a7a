#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_attention.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t n_heads, n_kv_heads, head_dim;
  int64_t n_seqs, n_q[4], n_k[4];
  ks_fill_kind fill;
  float scale;     /* 0: 1 / sqrt(head_dim) */
  int64_t gap;     /* rows of no sequence between two */
  int64_t padding; /* kv_stride beyond the heads */
} attention_case;

static const attention_case cases[] = {{1, 1, 1, 1, {1}, {1}, KS_FILL_SIGNED, 0, 0, 0},
                                       {2, 2, 3, 2, {0, 2}, {3, 5}, KS_FILL_SIGNED, 0, 1, 2},
                                       {4, 2, 17, 3, {1, 31, 33}, {1, 31, 33}, KS_FILL_SIGNED, 0, 0, 0},
                                       {6, 6, 48, 2, {97, 64}, {97, 64}, KS_FILL_SIGNED, 0, 0, 0},
                                       {8, 2, 64, 3, {65, 1, 40}, {65, 200, 111}, KS_FILL_SIGNED, 0, 3, 16},
                                       {7, 1, 32, 2, {32, 63}, {33, 63}, KS_FILL_POSITIVE, 0, 0, 0},
                                       {2, 1, 100, 2, {70, 5}, {130, 5}, KS_FILL_SIGNED, 1.0f, 0, 5},
                                       {1, 1, 128, 1, {203}, {203}, KS_FILL_NEAR_ONE, 0, 0, 0},
                                       {4, 4, 256, 1, {35}, {129}, KS_FILL_SIGNED, 0, 0, 0},
                                       {1, 1, 16, 1, {3}, {1025}, KS_FILL_SIGNED, 4.0f, 0, 0},
                                       {2, 2, 10, 2, {20, 9}, {20, 9}, KS_FILL_INTEGER, -0.5f, 0, 0},
                                       {1, 1, 64, 1, {1}, {2500}, KS_FILL_LARGE, 1e-8f, 0, 0}};
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* The packed arrays of a case, on the host. */
typedef struct {
  int64_t n_rows, q_cols, kv_stride, n_kv;
  int64_t q_begin[4], k_begin[4];
  float scale, *q, *k, *v, *d_o;
} data;

static data make_data(const attention_case *c) {
  data d = {.q_cols = c->n_heads * c->head_dim, .kv_stride = c->n_kv_heads * c->head_dim + c->padding};
  for (int64_t s = 0; s < c->n_seqs; s++) {
    d.q_begin[s] = d.n_rows + c->gap;
    d.n_rows = d.q_begin[s] + c->n_q[s];
    d.k_begin[s] = d.n_kv;
    d.n_kv += c->n_k[s];
  }
  d.n_rows += c->gap;
  d.scale = c->scale != 0 ? c->scale : 1 / sqrtf((float)c->head_dim);
  d.q = ks_floats(d.n_rows * d.q_cols, c->fill, 1);
  d.k = ks_floats(d.n_kv * d.kv_stride, c->fill, 2);
  d.v = ks_floats(d.n_kv * d.kv_stride, c->fill, 3);
  d.d_o = ks_floats(d.n_rows * d.q_cols, KS_FILL_SIGNED, 4);
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
  ks_attention_seq seqs[4];
  ks_attention_args a;
} setup;

static void make_setup(ks_ctx *ctx, const attention_case *c, const data *d, setup *s) {
  const int64_t n_q = d->n_rows * d->q_cols, n_kv = d->n_kv * d->kv_stride;
  s->q = ks_guard_make(ctx, d->q, n_q), s->d_o = ks_guard_make(ctx, d->d_o, n_q);
  s->k = ks_guard_make(ctx, d->k, n_kv), s->v = ks_guard_make(ctx, d->v, n_kv);
  s->o = ks_guard_make(ctx, NULL, n_q), s->dq = ks_guard_make(ctx, NULL, n_q);
  s->dk = ks_guard_make(ctx, NULL, n_kv), s->dv = ks_guard_make(ctx, NULL, n_kv);
  s->lse = ks_guard_make(ctx, NULL, d->n_rows * c->n_heads);
  for (int64_t i = 0; i < c->n_seqs; i++) {
    const int64_t at = d->k_begin[i] * d->kv_stride;
    s->seqs[i] = (ks_attention_seq){d->q_begin[i], c->n_q[i],    c->n_k[i],   s->k.p + at,
                                    s->v.p + at,   s->dk.p + at, s->dv.p + at};
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

/* References of all sequences, laid out like the results; NaN where nothing is written. */
typedef struct {
  double *o, *o_size, *lse, *lse_size, *dq, *dq_size, *dk, *dk_size, *dv, *dv_size;
} refs;

static double *nans(int64_t n) {
  double *x = ks_doubles(NULL, n);
  for (int64_t i = 0; i < n; i++)
    x[i] = NAN;
  return x;
}

static void put_padded(const double *x, const attention_case *c, const data *d, int64_t s, double *y) {
  const int64_t cols = c->n_kv_heads * c->head_dim;
  for (int64_t j = 0; j < c->n_k[s]; j++)
    memcpy(y + (d->k_begin[s] + j) * d->kv_stride, x + j * cols, (size_t)cols * sizeof *x);
}

static void make_refs(const attention_case *c, const data *d, refs *r) {
  const int64_t n_q = d->n_rows * d->q_cols, n_kv = d->n_kv * d->kv_stride, n_lse = d->n_rows * c->n_heads;
  *r = (refs){nans(n_q), nans(n_q),  nans(n_lse), nans(n_lse), nans(n_q),
              nans(n_q), nans(n_kv), nans(n_kv),  nans(n_kv),  nans(n_kv)};
  for (int64_t s = 0; s < c->n_seqs; s++) {
    const int64_t at = d->q_begin[s] * d->q_cols, kv = c->n_k[s] * c->n_kv_heads * c->head_dim;
    double *q = ks_doubles(d->q + at, c->n_q[s] * d->q_cols),
           *d_o = ks_doubles(d->d_o + at, c->n_q[s] * d->q_cols);
    double *k = unpadded(d->k, c, d, s), *v = unpadded(d->v, c, d, s), *grads[4];
    for (int i = 0; i < 4; i++)
      grads[i] = ks_doubles(NULL, kv);
    oracle_attention oa = {c->n_q[s], c->n_k[s], c->n_heads, c->n_kv_heads, c->head_dim, (double)d->scale,
                           q,         k,         v};
    const int64_t lse_at = d->q_begin[s] * c->n_heads;
    oracle_attention_forward(&oa, r->o + at, r->lse + lse_at, r->o_size + at, r->lse_size + lse_at);
    oracle_attention_grads g = {r->dq + at, grads[0], grads[1], r->dq_size + at, grads[2], grads[3]};
    oracle_attention_backward(&oa, d_o, &g);
    double *to[] = {r->dk, r->dv, r->dk_size, r->dv_size};
    for (int i = 0; i < 4; i++) {
      put_padded(grads[i], c, d, s, to[i]);
      free(grads[i]);
    }
    free(q), free(d_o), free(k), free(v);
  }
}

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const attention_case *c = test_case;
  data d = make_data(c);
  setup s;
  refs r;
  make_setup(ctx, c, &d, &s);
  make_refs(c, &d, &r);
  int64_t bad = ks_attention_forward(ctx, &s.a) != KS_OK, longest = 0;
  bad += ks_attention_backward(ctx, &s.a) != KS_OK;
  for (int64_t i = 0; i < c->n_seqs; i++)
    longest = c->n_k[i] > longest ? c->n_k[i] : longest;
  const double chain = (double)(longest > c->head_dim ? longest : c->head_dim);
  const double back = (double)c->n_heads / (double)c->n_kv_heads * chain;
  ks_guard *in[] = {&s.q, &s.k, &s.v, &s.d_o}, *outs[] = {&s.o, &s.lse, &s.dq, &s.dk, &s.dv};
  const double *ref[] = {r.o, r.lse, r.dq, r.dk, r.dv},
               *size[] = {r.o_size, r.lse_size, r.dq_size, r.dk_size, r.dv_size};
  for (int i = 0; i < 4; i++)
    bad += ks_guard_check_input(name, in[i]);
  for (int i = 0; i < 5; i++) {
    bad += ks_guard_check_output(name, outs[i], ref[i], size[i], i > 2 ? back : chain);
    ks_results_add_guard(out, outs[i]);
  }
  double *all[] = {r.o, r.o_size, r.lse, r.lse_size, r.dq, r.dq_size, r.dk, r.dk_size, r.dv, r.dv_size};
  for (int i = 0; i < 10; i++)
    free(all[i]);
  free_setup(&s);
  free_data(&d);
  return bad;
}

Test(attention, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < N_CASES; i++)
    bad += ks_test_everywhere("attention", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Prefill of n tokens, then decoding token by token with whatever lies beyond in the cache being NaN: same
 * bits. Prefill in pieces: same bits. */
Test(attention, decode_equals_prefill) {
  static const struct {
    int64_t n_heads, n_kv_heads, head_dim, n;
  } shapes[] = {{6, 6, 48, 131}, {8, 2, 64, 70}, {7, 1, 100, 97}, {4, 2, 33, 66}, {1, 1, 256, 65}};
  for (int i = 0; i < 5; i++) {
    const int64_t n = shapes[i].n, d = shapes[i].head_dim, qc = shapes[i].n_heads * d,
                  kc = shapes[i].n_kv_heads * d;
    float *q = ks_floats(n * qc, KS_FILL_SIGNED, 1), *o = ks_floats(n * qc, KS_FILL_SIGNED, 0),
          *one = ks_floats(n * qc, KS_FILL_SIGNED, 0);
    float *k = ks_floats(n * kc, KS_FILL_SIGNED, 2), *v = ks_floats(n * kc, KS_FILL_SIGNED, 3);
    float *cache_k = ks_floats(n * kc, KS_FILL_SIGNED, 2), *cache_v = ks_floats(n * kc, KS_FILL_SIGNED, 3);
    for (int s = 0; ks_test_isas[s]; s++) {
      ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
      if (!ctx) continue;
      ks_attention_seq seq = {0, n, n, k, v, NULL, NULL};
      ks_attention_args a = {.q = q,
                             .o = o,
                             .seqs = &seq,
                             .n_seqs = 1,
                             .n_rows = n,
                             .n_heads = shapes[i].n_heads,
                             .n_kv_heads = shapes[i].n_kv_heads,
                             .head_dim = d,
                             .kv_stride = kc,
                             .scale = 0.3f};
      cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
      for (int64_t j = 0; j < n * kc; j++)
        cache_k[j] = cache_v[j] = NAN;
      a.o = one;
      a.seqs = &seq;
      seq.k = cache_k, seq.v = cache_v;
      for (int64_t t = 0; t < n; t++) {
        memcpy(cache_k + t * kc, k + t * kc, (size_t)kc * sizeof *k);
        memcpy(cache_v + t * kc, v + t * kc, (size_t)kc * sizeof *v);
        seq.q_begin = t, seq.n_q = 1, seq.n_k = t + 1;
        cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
      }
      cr_assert(ks_check_same("decode and prefill", one, o, n * qc) == 0, "shape %d %s", i, ks_test_isas[s]);
      const int64_t cuts[] = {0, n / 3, n / 3 + 1, n};
      for (int p = 0; p < 3; p++) {
        seq.q_begin = cuts[p], seq.n_q = cuts[p + 1] - cuts[p], seq.n_k = cuts[p + 1];
        cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
      }
      cr_assert(ks_check_same("prefill in pieces", one, o, n * qc) == 0, "shape %d %s", i, ks_test_isas[s]);
      ks_ctx_destroy(ctx);
    }
    void *all[] = {q, o, one, k, v, cache_k, cache_v};
    for (int j = 0; j < 7; j++)
      free(all[j]);
  }
}

/* A sequence's results and gradients are the same bits alone and in a batch. */
Test(attention, a_sequence_does_not_depend_on_its_batch) {
  const attention_case *c = &cases[2];
  data d = make_data(c);
  ks_ctx *ctx = NULL;
  setup s;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}) == KS_OK);
  make_setup(ctx, c, &d, &s);
  cr_assert(ks_attention_forward(ctx, &s.a) == KS_OK && ks_attention_backward(ctx, &s.a) == KS_OK);
  float *o = ks_guard_read(&s.o), *dq = ks_guard_read(&s.dq), *dk = ks_guard_read(&s.dk),
        *dv = ks_guard_read(&s.dv);
  for (int64_t i = 0; i < c->n_seqs; i++) {
    setup alone;
    make_setup(ctx, c, &d, &alone);
    alone.seqs[0] = alone.seqs[i];
    alone.a.n_seqs = 1;
    cr_assert(ks_attention_forward(ctx, &alone.a) == KS_OK && ks_attention_backward(ctx, &alone.a) == KS_OK);
    const int64_t at = d.q_begin[i] * d.q_cols, n = c->n_q[i] * d.q_cols, kat = d.k_begin[i] * d.kv_stride;
    cr_assert(ks_check_same("o", alone.o.p + at, o + at, n) == 0);
    cr_assert(ks_check_same("dq", alone.dq.p + at, dq + at, n) == 0);
    cr_assert(ks_check_same("dk", alone.dk.p + kat, dk + kat, c->n_k[i] * d.kv_stride) == 0);
    cr_assert(ks_check_same("dv", alone.dv.p + kat, dv + kat, c->n_k[i] * d.kv_stride) == 0);
    free_setup(&alone);
  }
  free(o), free(dq), free(dk), free(dv);
  free_setup(&s);
  free_data(&d);
  ks_ctx_destroy(ctx);
}

/* With q = 0 every visible key weighs the same: integers average exactly when their number is a power of two.
 */
Test(attention, equal_scores_average) {
  enum { N = 300, D = 5 };
  float *q = ks_floats(N * D, KS_FILL_SIGNED, 1), *v = ks_floats(N * D, KS_FILL_INTEGER, 2),
        *o = ks_floats(N * D, KS_FILL_SIGNED, 0);
  memset(q, 0, N * D * sizeof *q);
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    ks_attention_seq seq = {0, N, N, v, v, NULL, NULL};
    ks_attention_args a = {.q = q,
                           .o = o,
                           .seqs = &seq,
                           .n_seqs = 1,
                           .n_rows = N,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .head_dim = D,
                           .kv_stride = D,
                           .scale = 1};
    cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
    for (int64_t n = 1; n <= N; n *= 2)
      for (int c = 0; c < D; c++) {
        float sum = 0;
        for (int64_t j = 0; j < n; j++)
          sum += v[j * D + c];
        cr_assert(o[(n - 1) * D + c] == sum / (float)n);
      }
    ks_ctx_destroy(ctx);
  }
  free(q), free(v), free(o);
}

/* A NaN key or value reaches the queries that see it and no other, wherever it lies in blocks and tiles. */
Test(attention, nan_reaches_only_those_who_see_it) {
  enum { N = 140, D = 20 };
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    float *q = ks_floats(N * D, KS_FILL_POSITIVE, 1), *o = ks_floats(N * D, KS_FILL_SIGNED, 0), lse[N];
    for (int at = 0; at < N; at += at < 60 || at > 75 ? 13 : 1)
      for (int of_values = 0; of_values < 2; of_values++) {
        float *k = ks_floats(N * D, KS_FILL_POSITIVE, 2), *v = ks_floats(N * D, KS_FILL_POSITIVE, 3);
        (of_values ? v : k)[at * D + 3] = NAN;
        ks_attention_seq seq = {0, N, N, k, v, NULL, NULL};
        ks_attention_args a = {.q = q,
                               .o = o,
                               .lse = lse,
                               .seqs = &seq,
                               .n_seqs = 1,
                               .n_rows = N,
                               .n_heads = 1,
                               .n_kv_heads = 1,
                               .head_dim = D,
                               .kv_stride = D,
                               .scale = 1};
        cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
        for (int i = 0; i < N; i++) {
          cr_assert(isnan(lse[i]) == (!of_values && i >= at));
          for (int c = 0; c < D; c++)
            cr_assert(isnan(o[i * D + c]) == (i >= at && (!of_values || c == 3)), "row %d of %s, NaN in %d",
                      i, ks_test_isas[s], at);
        }
        free(k), free(v);
      }
    free(q), free(o);
    ks_ctx_destroy(ctx);
  }
}

/* Scores of -inf weigh nothing, but for rows that see nothing else: those are NaN, as in torch. */
Test(attention, infinite_scores) {
  enum { N = 140, D = 20, AT = 70 };
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 2);
    if (!ctx) continue;
    float *q = ks_floats(N * D, KS_FILL_POSITIVE, 1), *k = ks_floats(N * D, KS_FILL_POSITIVE, 2);
    float *v = ks_floats(N * D, KS_FILL_SIGNED, 3), *o = ks_floats(N * D, KS_FILL_SIGNED, 0), lse[N];
    ks_attention_seq seq = {0, N, N, k, v, NULL, NULL};
    ks_attention_args a = {.q = q,
                           .o = o,
                           .lse = lse,
                           .seqs = &seq,
                           .n_seqs = 1,
                           .n_rows = N,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .head_dim = D,
                           .kv_stride = D,
                           .scale = 1};
    for (int j = 0; j < AT; j++)
      k[j * D] = -INFINITY;
    cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
    for (int i = 0; i < N; i++)
      cr_assert(isnan(o[i * D]) == (i < AT) && (i < AT ? lse[i] == -INFINITY : isfinite(lse[i])));
    cr_assert(ks_check_same("one key", o + AT * D, v + AT * D, D) == 0);
    free(q), free(k), free(o), free(v);
    ks_ctx_destroy(ctx);
  }
}

Test(attention, oracle_gradient_matches_central_differences) {
  enum { NQ = 3, NK = 5, H = 4, KV = 2, D = 3 };
  float *qf = ks_floats(NQ * H * D, KS_FILL_SIGNED, 1), *kf = ks_floats(NK * KV * D, KS_FILL_SIGNED, 2);
  float *vf = ks_floats(NK * KV * D, KS_FILL_SIGNED, 3), *gf = ks_floats(NQ * H * D, KS_FILL_SIGNED, 4);
  double *q = ks_doubles(qf, NQ * H * D), *k = ks_doubles(kf, NK * KV * D), *v = ks_doubles(vf, NK * KV * D);
  double *d_o = ks_doubles(gf, NQ * H * D), dq[NQ * H * D], dk[NK * KV * D], dv[NK * KV * D], o[NQ * H * D];
  oracle_attention a = {NQ, NK, H, KV, D, 0.7, q, k, v};
  oracle_attention_backward(&a, d_o, &(oracle_attention_grads){dq, dk, dv, NULL, NULL, NULL});
  double *x[] = {q, k, v};
  const double *grad[] = {dq, dk, dv};
  const int n[] = {NQ * H * D, NK * KV * D, NK * KV * D};
  for (int w = 0; w < 3; w++)
    for (int i = 0; i < n[w]; i++) {
      const double h = 1e-5, at = x[w][i];
      double f[2] = {0, 0};
      for (int side = 0; side < 2; side++) {
        x[w][i] = at + (side ? h : -h);
        oracle_attention_forward(&a, o, NULL, NULL, NULL);
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
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float q[16] = {1}, k[16] = {1}, v[16] = {1}, o[16], lse[4], dk[16], dv[16], dq[16];
  const ks_attention_seq good_seq = {0, 2, 2, k, v, dk, dv};
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
  ks_ctx_destroy(ctx);
}

/* Keys and values interleaved in one buffer, whose end is not the end of a whole stride of values. */
Test(attention, interleaved_keys_and_values) {
  enum { N = 9, D = 6 };
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float *q = ks_floats(N * D, KS_FILL_SIGNED, 1), *k = ks_floats(N * D, KS_FILL_SIGNED, 2),
        *v = ks_floats(N * D, KS_FILL_SIGNED, 3);
  float o[N * D], arena[N * 2 * D + N * D];
  float *kv = arena, *o2 = arena + N * 2 * D; /* the result lies right behind the last value */
  for (int j = 0; j < N; j++) {
    memcpy(kv + j * 2 * D, k + j * D, D * sizeof *k);
    memcpy(kv + j * 2 * D + D, v + j * D, D * sizeof *v);
  }
  ks_attention_seq seq = {0, N, N, k, v, NULL, NULL};
  ks_attention_args a = {.q = q,
                         .o = o,
                         .seqs = &seq,
                         .n_seqs = 1,
                         .n_rows = N,
                         .n_heads = 1,
                         .n_kv_heads = 1,
                         .head_dim = D,
                         .kv_stride = D,
                         .scale = 1};
  cr_assert(ks_attention_forward(ctx, &a) == KS_OK);
  seq.k = kv, seq.v = kv + D;
  a.kv_stride = 2 * D, a.o = o2;
  cr_assert(ks_attention_forward(ctx, &a) == KS_OK, "%s", ks_error_message());
  cr_assert(ks_check_same("interleaved", o, o2, N * D) == 0);
  free(q), free(k), free(v);
  ks_ctx_destroy(ctx);
}
