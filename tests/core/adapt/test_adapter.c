#include "core/adapt/adapt.h"
#include "tests/oracle/model_twin.h"
#include <criterion/criterion.h>

#define ALL_TARGETS ((1u << KS_N_TARGETS) - 1)

static ks_adapter *make(ks_ctx *ctx, const ks_model_config *c, uint32_t targets, uint64_t seed) {
  ks_adapter *a = NULL;
  ks_must(
      ks_adapter_create(ctx, c, &(ks_adapter_params){.rank = 4, .alpha = 6, .targets = targets}, seed, &a));
  return a;
}

Test(adapter, layout_is_as_documented) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const uint32_t masks[] = {ALL_TARGETS, 1 | 4, 64};
  for (size_t k = 0; k < sizeof masks / sizeof masks[0]; k++) {
    const ks_model_config *c = &ks_twin_cases[k].config;
    ks_adapter *a = make(ctx, c, masks[k], 1);
    int64_t at = 0;
    for (int64_t i = 0; i < c->n_layers * KS_N_TARGETS; i++) {
      int64_t n_out, n_in;
      const ks_lora *l = &a->loras[i];
      ks_oracle_llama_shape(c, (int)(i % KS_N_TARGETS), &n_out, &n_in);
      if (!(masks[k] >> (i % KS_N_TARGETS) & 1)) {
        cr_expect_eq(l->rank, 0);
        continue;
      }
      cr_expect_eq(l->rank, 4);
      cr_expect_eq(l->scale, 1.5f);
      cr_expect_eq(l->a, a->weights + at);
      cr_expect_eq(l->grad_a, a->grads + at);
      at += 4 * n_in;
      cr_expect_eq(l->b_t, a->weights + at);
      cr_expect_eq(l->grad_b_t, a->grads + at);
      at += 4 * n_out;
    }
    cr_expect_eq(a->n_params, at);
    ks_adapter_destroy(a);
  }
  cr_expect_eq(ks_mem_used(ctx), 0);
  ks_adapter_destroy(NULL);
  ks_ctx_destroy(ctx);
}

/* A is uniform in +-1/sqrt(n_in): the standard error of the mean of n values is bound / sqrt(3 n), that of
 * the mean square bound^2 sqrt(4/45 / n); six of them are allowed. */
Test(adapter, initial_weights_are_pefts) {
  ks_ctx *ctx = ks_twin_ctx(1);
  ks_model_config c = ks_twin_cases[0].config;
  c.hidden_size = 400;
  ks_adapter *a = NULL;
  ks_must(ks_adapter_create(ctx, &c, &(ks_adapter_params){.rank = 16, .alpha = 6, .targets = ALL_TARGETS}, 9,
                            &a));
  float *weights = ks_twin_download(ctx, a->weights, a->n_params);
  for (int64_t i = 0; i < c.n_layers * KS_N_TARGETS; i++) {
    int64_t n_out, n_in;
    const float *host_a = weights + (a->loras[i].a - a->weights),
                *host_b_t = weights + (a->loras[i].b_t - a->weights);
    ks_oracle_llama_shape(&c, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    double bound = 1 / sqrt((double)n_in), mean = 0, square = 0, n = 16 * (double)n_in;
    for (int64_t j = 0; j < 16 * n_in; j++) {
      double v = (double)host_a[j];
      cr_assert_leq(fabs(v), bound * (1 + 0x1p-23));
      mean += v / n;
      square += v * v / n;
    }
    cr_expect_leq(fabs(mean), 6 * bound / sqrt(3 * n));
    cr_expect_leq(fabs(square - bound * bound / 3), 6 * bound * bound * sqrt(4.0 / 45 / n));
    for (int64_t j = 0; j < 16 * n_out; j++)
      cr_assert_eq(host_b_t[j], 0);
  }
  free(weights);
  ks_adapter_destroy(a);
  ks_ctx_destroy(ctx);
}

/* A of layer l and a target, rank 4: host copy, free() it. */
static float *matrix_a(const ks_adapter *a, int64_t l, ks_target t) {
  return ks_twin_download(a->ctx, a->loras[l * KS_N_TARGETS + t].a, 4 * a->config.hidden_size);
}

static void expect_draws(const ks_adapter *x, int64_t lx, ks_target tx, const ks_adapter *y, int64_t ly,
                         ks_target ty, bool equal) {
  float *p = matrix_a(x, lx, tx), *q = matrix_a(y, ly, ty);
  bool same = memcmp(p, q, 4 * (size_t)x->config.hidden_size * sizeof(float)) == 0;
  cr_expect_eq(same, equal, "layer %ld, target %d and layer %ld, target %d", (long)lx, (int)tx, (long)ly,
               (int)ty);
  free(p);
  free(q);
}

Test(adapter, draws_depend_on_seed_layer_and_target_alone) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_model_config *c = &ks_twin_cases[0].config;
  ks_adapter *all = make(ctx, c, ALL_TARGETS, 5), *some = make(ctx, c, 2 | 32, 5),
             *other = make(ctx, c, 2, 6);
  for (int64_t l = 0; l < c->n_layers; l++) {
    expect_draws(all, l, KS_TARGET_k, some, l, KS_TARGET_k, true);
    expect_draws(all, l, KS_TARGET_up, some, l, KS_TARGET_up, true);
    expect_draws(all, l, KS_TARGET_k, all, l, KS_TARGET_v, false);
    expect_draws(all, l, KS_TARGET_k, other, l, KS_TARGET_k, false);
  }
  expect_draws(all, 0, KS_TARGET_q, all, 1, KS_TARGET_q, false);
  ks_adapter_destroy(all);
  ks_adapter_destroy(some);
  ks_adapter_destroy(other);
  ks_ctx_destroy(ctx);
}

Test(adapter, save_load_reset) {
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_model_config *c = &ks_twin_cases[1].config;
  ks_adapter *a = make(ctx, c, ALL_TARGETS, 5), *b = make(ctx, c, ALL_TARGETS, 6),
             *smaller = make(ctx, c, 1, 6);
  size_t n = (size_t)a->n_params;
  float *w = malloc(n * sizeof *w), *m = malloc(n * sizeof *m), *v = malloc(n * sizeof *v),
        *w0 = malloc(n * sizeof *w0);
  ks_must(ks_adapter_save(a, w0, m, v));
  for (size_t i = 0; i < n; i++) {
    w[i] = (float)i;
    m[i] = -(float)i;
    v[i] = 2 * (float)i;
  }
  ks_must(ks_adapter_load(b, w, m, v, a->n_params, 17));
  cr_expect_eq(b->step, 17);
  float *w2 = malloc(n * sizeof *w2), *m2 = malloc(n * sizeof *m2), *v2 = malloc(n * sizeof *v2);
  ks_must(ks_adapter_save(b, w2, m2, v2));
  cr_expect_arr_eq(w, w2, n * sizeof *w);
  cr_expect_arr_eq(m, m2, n * sizeof *m);
  cr_expect_arr_eq(v, v2, n * sizeof *v);
  ks_must(ks_adapter_reset(b, 5));
  ks_must(ks_adapter_save(b, w2, m2, v2));
  cr_expect_eq(b->step, 0);
  cr_expect_arr_eq(w0, w2, n * sizeof *w);
  for (size_t i = 0; i < n; i++)
    cr_assert(m2[i] == 0 && v2[i] == 0);
  cr_expect_eq(ks_adapter_load(smaller, w, m, v, a->n_params, 1), KS_EDATA);
  cr_expect_eq(ks_adapter_load(b, w, m, v, a->n_params, -1), KS_EDATA);
  free(w);
  free(m);
  free(v);
  free(w0);
  free(w2);
  free(m2);
  free(v2);
  ks_adapter_destroy(a);
  ks_adapter_destroy(b);
  ks_adapter_destroy(smaller);
  ks_ctx_destroy(ctx);
}

Test(adapter, targets_and_parameters) {
  uint32_t bits = 0;
  const struct {
    const char *list;
    uint32_t bits;
  } good[] = {{"q", 1},        {"q,k,v,o", 15}, {"down, q", 65}, {"q,k,v,o,gate,up,down", 127},
              {"gate up", 48}, {"q,q", 1}};
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
    ks_must(ks_targets_parse(good[i].list, &bits));
    cr_expect_eq(bits, good[i].bits, "%s", good[i].list);
  }
  const char *bad[] = {"", ",", "qq", "q,z", "Q", "gat", "down,upp"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
    cr_expect_eq(ks_targets_parse(bad[i], &bits), KS_ECONFIG, "%s", bad[i]);
  ks_ctx *ctx = ks_twin_ctx(1);
  const ks_adapter_params wrong[] = {{0, 1, 1}, {257, 1, 1}, {4, NAN, 1}, {4, 1, 0}, {4, 1, 128}};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    ks_adapter *a = NULL;
    cr_expect_eq(ks_adapter_create(ctx, &ks_twin_cases[0].config, &wrong[i], 1, &a), KS_EINVAL);
    cr_expect_eq(a, NULL);
  }
  ks_ctx_destroy(ctx);
}
