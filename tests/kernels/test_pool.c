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
                                  {{0, 700}, 1, 525, KS_POOL_MEAN, KS_FILL_SIGNED},
                                  {{0, 7, 8, 40}, 3, 256, KS_POOL_MEAN, KS_FILL_POSITIVE},
                                  {{0, 5, 12}, 2, 264, KS_POOL_LAST, KS_FILL_LARGE}};

static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const pool_case *c = test_case;
  const int64_t n_rows = c->n_seqs ? c->offsets[c->n_seqs] + 2 : 0, n = n_rows * c->n_cols,
                n_out = c->n_seqs * c->n_cols;
  float *x = ks_floats(n, c->fill, 1);
  ks_act_round(ctx, x, n);
  double *x64 = ks_doubles(x, n), *ref = ks_doubles(NULL, n_out);
  oracle_pool(x64, c->offsets, c->n_seqs, c->n_cols, c->pooling == KS_POOL_MEAN, ref);
  ks_guard gx = ks_guard_make_act(ctx, x, n), gy = ks_guard_make(ctx, NULL, n_out);
  ks_pool_args a = {gx.p, c->offsets, gy.p, c->n_seqs, n_rows, c->n_cols, c->pooling};
  int64_t bad = ks_pool(ctx, &a) != KS_OK;
  bad += ks_guard_check_input(name, &gx) + ks_guard_check_output(name, &gy, ref, NULL, 0);
  ks_results_add_guard(out, &gy);
  /* Each sequence alone, from an address of its own: the same bits. */
  float *wants = ks_guard_read(&gy);
  for (int64_t s = 0; s < c->n_seqs; s++) {
    const int64_t alone[] = {0, c->offsets[s + 1] - c->offsets[s]};
    a = (ks_pool_args){
        ks_guard_at(&gx, c->offsets[s] * c->n_cols), alone, gy.p, 1, alone[1], c->n_cols, c->pooling};
    bad += ks_pool(ctx, &a) != KS_OK;
    float *got = ks_guard_read(&gy);
    bad += ks_check_same(name, got, wants + s * c->n_cols, c->n_cols);
    free(got);
  }
  ks_guard_free(&gx), ks_guard_free(&gy);
  free(x), free(x64), free(ref), free(wants);
  return bad;
}

Test(pool, oracle_everywhere) {
  int64_t bad = 0;
  for (int64_t i = 0; i < (int64_t)(sizeof cases / sizeof cases[0]); i++)
    bad += ks_test_everywhere("pool", i, &cases[i], run);
  cr_assert(bad == 0);
}

/* Means of what a float32 sum could not hold, or would lose. */
Test(pool, sums_beyond_float32) {
  enum { ROWS = 9, COLS = 3 };
  const int64_t offsets[] = {0, ROWS};
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    float x[ROWS * COLS];
    for (int i = 0; i < ROWS; i++) {
      x[i * COLS] = 0x1.8p127f; /* the sum overflows, the mean does not */
      x[i * COLS + 1] = i == 0 ? 0x1p30f : i == ROWS - 1 ? -0x1p30f : 1; /* nothing is lost beside 2^30 */
      x[i * COLS + 2] = i < 2 ? INFINITY : 1;
    }
    ks_guard gx = ks_guard_make_act(ctx, x, ROWS * COLS), gy = ks_guard_make(ctx, NULL, COLS);
    cr_assert(ks_pool(ctx, &(ks_pool_args){gx.p, offsets, gy.p, 1, ROWS, COLS, KS_POOL_MEAN}) == KS_OK);
    float *y = ks_guard_read(&gy);
    cr_assert(y[0] == 0x1.8p127f && y[1] == 7.0f / 9.0f && y[2] == INFINITY, "%s: %a %a %a", *place,
              (double)y[0], (double)y[1], (double)y[2]);
    free(y);
    ks_guard_free(&gx), ks_guard_free(&gy);
    ks_ctx_destroy(ctx);
  }
}

Test(pool, nan_stays_in_its_sequence_and_illegal_arguments) {
  ks_ctx *ctx = ks_test_any_ctx();
  const float x[8] = {1, 2, NAN, 4, 5, 6, 7, 8};
  ks_guard gx = ks_guard_make_act(ctx, x, 8), gy = ks_guard_make(ctx, NULL, 4);
  int64_t offsets[] = {0, 2, 4}, empty[] = {0, 2, 2}, falling[] = {2, 1, 4}, beyond[] = {0, 2, 5},
          negative[] = {-1, 2, 4};
  const ks_pool_args good = {gx.p, offsets, gy.p, 2, 4, 2, KS_POOL_MEAN};
  ks_pool_args a = good;
  cr_assert(ks_pool(ctx, &a) == KS_OK);
  float *y = ks_guard_read(&gy);
  cr_assert(isnan(y[0]) && y[1] == 3 && y[2] == 6 && y[3] == 7);
  free(y);
  const int64_t *wrong[] = {empty, falling, beyond, negative, NULL};
  for (int i = 0; i < 5; i++) {
    a = good, a.seq_offsets = wrong[i];
    cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  }
  a = good, a.pooling = (ks_pooling)7;
  cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  a = good, a.y = gx.p;
  cr_assert(ks_pool(ctx, &a) == KS_EINVAL);
  ks_guard_free(&gx), ks_guard_free(&gy);
  ks_ctx_destroy(ctx);
}
