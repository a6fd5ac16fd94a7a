#include "tests/oracle/guard.h"
#include "tests/oracle/oracle_block.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct {
  int64_t offsets[6], n_seqs, n_cols;
  ks_pooling pooling;
  ks_fill_kind fill;
} pool_case;

static const pool_case cases[] = {{{0}, 0, 8, KS_POOL_MEAN, KS_FILL_SIGNED},
                                  {{0, 1}, 1, 1, KS_POOL_MEAN, KS_FILL_SIGNED},
                                  {{0, 1, 4, 37}, 3, 31, KS_POOL_MEAN, KS_FILL_INTEGER},
                                  {{0, 1, 4, 37}, 3, 32, KS_POOL_LAST, KS_FILL_SIGNED},
                                  {{2, 35, 36, 120}, 3, 97, KS_POOL_MEAN, KS_FILL_NEAR_ONE},
                                  {{0, 300, 301}, 2, 288, KS_POOL_MEAN, KS_FILL_LARGE},
                                  {{5, 6, 7, 8, 9, 10}, 5, 203, KS_POOL_LAST, KS_FILL_SIGNED},
                                  {{0, 2000}, 1, 1025, KS_POOL_MEAN, KS_FILL_SIGNED}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const pool_case *c = test_case;
  const int64_t n_rows = c->n_seqs ? c->offsets[c->n_seqs] + 2 : 0, n = n_rows * c->n_cols,
                n_out = c->n_seqs * c->n_cols;
  float *x = ks_floats(n, c->fill, 1);
  double *x64 = ks_doubles(x, n), *ref = ks_doubles(NULL, n_out);
  oracle_pool(x64, c->offsets, c->n_seqs, c->n_cols, c->pooling == KS_POOL_MEAN, ref);
  ks_guard gx = ks_guard_make(ctx, x, n), gy = ks_guard_make(ctx, NULL, n_out);
  ks_pool_args a = {gx.p, c->offsets, gy.p, c->n_seqs, n_rows, c->n_cols, c->pooling};
  int64_t bad = ks_pool(ctx, &a) != KS_OK;
  bad += ks_guard_check_input(name, &gx) + ks_guard_check_output(name, &gy, ref, NULL, 0);
  ks_results_add_guard(out, &gy);
  ks_guard_free(&gx), ks_guard_free(&gy);
  free(x), free(x64), free(ref);
  return bad;
}

Test(pool, oracle_isas_threads) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("pool", i, &cases[i], run);
  cr_assert(bad == 0);
}

Test(pool, nan_stays_in_its_sequence_and_illegal_arguments) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  float x[8] = {1, 2, NAN, 4, 5, 6, 7, 8}, y[4];
  int64_t offsets[] = {0, 2, 4}, empty[] = {0, 2, 2}, falling[] = {2, 1, 4}, beyond[] = {0, 2, 5},
          negative[] = {-1, 2, 4};
  const ks_pool_args good = {x, offsets, y, 2, 4, 2, KS_POOL_MEAN};
  ks_pool_args a = good;
  cr_assert(ks_pool(ctx, &a) == KS_OK);
  cr_assert(isnan(y[0]) && y[1] == 3 && y[2] == 6 && y[3] == 7);
  const int64_t *wrong[] = {empty, falling, beyond, negative, NULL};
  for (int i = 0; i < 5; i++) {
    a = good, a.seq_offsets = wrong[i];
    cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  }
  a = good, a.pooling = (ks_pooling)7;
  cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  a = good, a.y = x;
  cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}
