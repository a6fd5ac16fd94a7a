#include "experiments/bench.h"
#include "experiments/bench_op.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define MUST(call) cr_assert((call) == KS_OK, "%s", ks_error_message())

/* Small sizes that suit every operation. */
static const ks_bench_dims small = {.rows = 12,
                                    .cols = 40,
                                    .n_out = 33,
                                    .n_keys = 6,
                                    .n_queries = 6,
                                    .n_heads = 4,
                                    .n_kv_heads = 2,
                                    .head_dim = 10,
                                    .n_adapters = 2,
                                    .rank = 3,
                                    .best_k = 4};

static ks_ctx *cpu(int n_threads) {
  ks_ctx *ctx = NULL;
  MUST(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = n_threads}));
  return ctx;
}

static bool near(double a, double b) {
  return fabs(a - b) <= 1e-12 * fabs(b);
}

/* ---------------------------------------------------------------- operations */

Test(bench, every_operation_is_made_checked_and_the_same_again) {
  static const ks_dtype types[] = {KS_DTYPE_F32, KS_DTYPE_BF16, KS_DTYPE_Q8_0, KS_DTYPE_NF4};
  ks_ctx *one = cpu(1), *two = cpu(2);
  int n_ops = 0;
  for (const ks_bench_op_kind *k = ks_bench_op_kinds; k->name; k++, n_ops++)
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
      ks_bench_op a, b;
      void *before[KS_BENCH_MOST_ARRAYS];
      bool same = false;
      char why[200] = "";
      MUST(ks_bench_op_make(one, k, &small, types[t], &a));
      MUST(ks_bench_op_make(two, k, &small, types[t], &b));
      MUST(ks_bench_op_run(&a));
      MUST(ks_bench_op_run(&b));
      MUST(ks_bench_op_compare(&a, &b, &same, why, sizeof why));
      cr_expect(same, "%s, %s: %s", k->name, ks_dtype_name(types[t]), why);
      MUST(ks_bench_op_results(&a, before));
      MUST(ks_bench_op_run(&a)); /* state moves on */
      MUST(ks_bench_op_reset(&a));
      MUST(ks_bench_op_run(&a));
      MUST(ks_bench_op_unchanged(&a, before, &same, why, sizeof why));
      cr_expect(same, "%s, %s, again: %s", k->name, ks_dtype_name(types[t]), why);
      const ks_bench_cost cost = ks_bench_op_cost(&a);
      cr_expect(cost.bytes > 0 && cost.flops >= 0, "%s", k->name);
      for (int i = 0; i < KS_BENCH_MOST_ARRAYS; i++)
        free(before[i]);
      ks_bench_op_free(&a);
      ks_bench_op_free(&b);
    }
  int n_known = 0;
#define X(name, what) n_known++;
  KS_OPS_MAP(X)
#undef X
  cr_expect_eq(n_ops, n_known);
  ks_ctx_destroy(one);
  ks_ctx_destroy(two);
}

/* One element of one result is off by a little: a hundredth of the largest, or one. */
Test(bench, a_wrong_element_is_seen) {
  ks_ctx *ctx = cpu(1);
  for (const ks_bench_op_kind *k = ks_bench_op_kinds; k->name; k++) {
    ks_bench_op a, b;
    int n_planted = 0;
    MUST(ks_bench_op_make(ctx, k, &small, KS_DTYPE_F32, &a));
    MUST(ks_bench_op_make(ctx, k, &small, KS_DTYPE_F32, &b));
    MUST(ks_bench_op_run(&a));
    MUST(ks_bench_op_run(&b));
    for (int i = 0; i < a.n_arrays; i++) {
      const ks_bench_array *array = &a.arrays[i];
      bool same = true;
      char why[200] = "";
      if (array->role != KS_ARRAY_OUTPUT && array->role != KS_ARRAY_STATE) continue;
      union { /* CPU memory */
        void *p;
        float *f32;
        double *f64;
        int32_t *i32;
        int64_t *i64;
      } at = {array->p};
      const int64_t n = array->n / 2;
      if (array->type == KS_ARRAY_F32) at.f32[n] += 0.01F * (1 + fabsf(at.f32[n]));
      if (array->type == KS_ARRAY_F64) at.f64[n] += 0.01 * (1 + fabs(at.f64[n]));
      if (array->type == KS_ARRAY_I32) at.i32[n]++;
      if (array->type == KS_ARRAY_I64) at.i64[n]++;
      MUST(ks_bench_op_compare(&a, &b, &same, why, sizeof why));
      cr_expect(!same, "%s, array %d: not seen", k->name, i);
      MUST(ks_bench_op_reset(&a));
      MUST(ks_bench_op_run(&a));
      n_planted++;
    }
    cr_expect(n_planted > 0, "%s has no result", k->name);
    ks_bench_op_free(&a);
    ks_bench_op_free(&b);
  }
  ks_ctx_destroy(ctx);
}

Test(bench, necessary_bytes_and_operations) {
  ks_ctx *ctx = cpu(1);
  const double m = 12, k = 40, n = 33, r = 3;
  const struct {
    const char *op;
    double bytes, flops;
  } cases[] = {
      {"linear_forward", 4 * (m * k + m * n + n * k + 2 * r * (k + n)), 2 * m * k * n + 2 * m * r * (k + n)},
      {"linear_backward", 4 * (2 * m * k + m * n + n * k + 6 * r * (k + n)),
       2 * m * k * n + 4 * m * r * (k + n)},
      {"rmsnorm_forward", 4 * (2 * m * k + m + k), 0},
      {"swiglu_backward", 4 * 5 * m * k, 0},
      {"attention_forward", 4 * (2 * m * 40 + 2 * m * 20 + m * 4), 4 * 10 * (2 * 4 * 21)},
      {"attention_backward", 4 * (4 * m * 40 + 4 * m * 20 + m * 4), 10 * 10 * (2 * 4 * 21)},
      {"head_loss", 4 * (2 * m * k + n * k + m), 4 * m * k * n},
      {"adamw", 32 * 2 * k, 0},
      {"similarity", 4 * ((m + 6) * k + m * 6), 2 * m * 6 * k},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const ks_bench_op_kind *kind = ks_bench_op_kinds;
    while (strcmp(kind->name, cases[i].op) != 0)
      kind++;
    ks_bench_op o;
    MUST(ks_bench_op_make(ctx, kind, &small, KS_DTYPE_F32, &o));
    const ks_bench_cost cost = ks_bench_op_cost(&o);
    cr_expect(near(cost.bytes, cases[i].bytes), "%s: %.17g bytes, wants %.17g", kind->name, cost.bytes,
              cases[i].bytes);
    cr_expect(near(cost.flops, cases[i].flops), "%s: %.17g operations, wants %.17g", kind->name, cost.flops,
              cases[i].flops);
    ks_bench_op_free(&o);
  }
  cr_expect(near(ks_bench_weight_bytes(KS_DTYPE_Q8_0, 3, 64), 3 * (64 + 4)));
  cr_expect(near(ks_bench_weight_bytes(KS_DTYPE_Q4_0, 3, 64), 3 * (32 + 4)));
  cr_expect(near(ks_bench_weight_bytes(KS_DTYPE_NF4, 3, 64), 3 * (32 + 2)));
  cr_expect(near(ks_bench_weight_bytes(KS_DTYPE_BF16, 3, 64), 3 * 64 * 2));
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- rows, files */

static ks_status nothing(void *arg) {
  ++*(int *)arg;
  return KS_OK;
}

Test(bench, samples_end_for_a_reason) {
  ks_bench b = {.device = "cpu", .n_threads = 1, .min_samples = 7, .seconds = 0};
  ks_samples s;
  int n_calls = 0;
  MUST(ks_bench_open(&b, NULL));
  MUST(ks_bench_sample(&b, nothing, &n_calls, &s));
  cr_expect_str_eq(s.ended, "time");
  cr_expect_eq(s.n, 7);
  cr_expect_eq(n_calls, 8); /* one to warm up */
  for (int64_t i = 1; i < s.n; i++)
    cr_expect(s.ms[i - 1] <= s.ms[i]);
  ks_samples_free(&s);
  MUST(ks_bench_sample_cold(&b, nothing, &n_calls, false, &s));
  cr_expect(s.cold && s.n == 7 && isfinite(s.hot_ms) && isnan(s.step_ms));
  ks_samples_free(&s);
  ks_bench_close(&b);
}

Test(bench, files_hold_every_row) {
  char csv[] = "/tmp/ks_bench_XXXXXX", jsonl[] = "/tmp/ks_bench_XXXXXX", line[1 << 14];
  close(mkstemp(csv));
  close(mkstemp(jsonl));
  unlink(csv);
  ks_bench b = {.device = "cpu", .n_threads = 1, .min_samples = 3};
  ks_bench_meta meta;
  ks_bench_row *row;
  ks_samples s;
  int n_calls = 0;
  MUST(ks_bench_open(&b, NULL));
  ks_bench_describe(&b, 1, (char *[]){"bench"}, &meta);
  MUST(ks_bench_sample(&b, nothing, &n_calls, &s));
  MUST(ks_bench_add(&b, "a", "with \"quotes\", and a comma", &s, &(ks_bench_load){.work = 1},
                    &(ks_ceilings){0}, &row));
  ks_samples_free(&s);
  MUST(ks_bench_add_verdict(&b, "b", "", "skipped(memory)", "no room"));
  for (int i = 0; i < 2; i++) { /* appended */
    MUST(ks_bench_write_csv(csv, &b, &meta));
    MUST(ks_bench_write_jsonl(jsonl, &b, &meta));
  }
  int n_lines = 0;
  FILE *f = fopen(csv, "r");
  for (; fgets(line, sizeof line, f); n_lines++)
    cr_expect(n_lines != 1 || strstr(line, "\"with \"\"quotes\"\", and a comma\""), "%s", line);
  fclose(f);
  cr_expect_eq(n_lines, 5);
  n_lines = 0;
  f = fopen(jsonl, "r");
  for (; fgets(line, sizeof line, f); n_lines++) {
    json_t *j = json_loads(line, 0, NULL);
    cr_assert_not_null(j, "%s", line);
    if (n_lines % 3 == 0)
      cr_expect_str_eq(json_string_value(json_object_get(json_object_get(j, "run"), "backend")), "cpu");
    if (n_lines % 3 == 1) cr_expect_eq(json_array_size(json_object_get(j, "samples_ms")), 3);
    if (n_lines % 3 == 2) {
      cr_expect_str_eq(json_string_value(json_object_get(j, "verdict")), "skipped(memory)");
      cr_expect(json_is_null(json_object_get(j, "median_ms")));
    }
    json_decref(j);
  }
  fclose(f);
  cr_expect_eq(n_lines, 6);
  f = fopen(csv, "w");
  fputs("time,device,name,other\n", f);
  fclose(f);
  cr_expect_eq(ks_bench_write_csv(csv, &b, &meta), KS_ECONFIG); /* other columns: nothing is appended */
  unlink(csv);
  unlink(jsonl);
  ks_bench_close(&b);
  ks_bench_free(&b);
}
