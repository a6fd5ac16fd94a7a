#include "experiments/bench_goals.h"
#include "experiments/bench_op.h"
#include "experiments/bench_step.h"

#include <criterion/criterion.h>
#include <math.h>
#include <regex.h>
#include <stdio.h>

#define MUST(call) cr_assert((call) == KS_OK, "%s", ks_error_message())

static const ks_goal_case *find_case(const char *name) {
  for (const ks_goal_case *c = ks_goal_cases; c->name; c++)
    if (strcmp(c->name, name) == 0) return c;
  return NULL;
}

/* ---------------------------------------------------------------- the list */

Test(bench_goals, every_line_of_the_list_can_be_read) {
  static const char *const patterns[] = {
      "^KS_CASE\\(([a-zA-Z0-9_]+), ([a-zA-Z0-9_.]+), ([a-zA-Z0-9_]+), \"([^\"]*)\"\\)$",
      "^KS_GOAL\\(([a-zA-Z0-9_.]+), ([a-zA-Z0-9_]+), (at_least|at_most|exactly), ([0-9.]+), "
      "([a-zA-Z0-9_.]+)\\)$"};
  static const char *const begins[] = {"KS_CASE(", "KS_GOAL("};
  char line[512];
  int n[2] = {0};
  for (int i = 0; i < 2; i++) {
    regex_t expression;
    cr_assert(regcomp(&expression, patterns[i], REG_EXTENDED) == 0);
    FILE *f = fopen(KS_SOURCE_DIR "/experiments/bench_goals.def", "r");
    cr_assert_not_null(f);
    while (fgets(line, sizeof line, f)) {
      line[strcspn(line, "\n")] = 0;
      if (strncmp(line, begins[i], strlen(begins[i])) != 0) continue;
      cr_expect(regexec(&expression, line, 0, NULL, 0) == 0, "%s", line);
      n[i]++;
    }
    fclose(f);
    regfree(&expression);
  }
  int n_cases = 0, n_goals = 0;
  while (ks_goal_cases[n_cases].name)
    n_cases++;
  while (ks_goals[n_goals].name)
    n_goals++;
  cr_expect(n[0] == n_cases && n[1] == n_goals, "%d lines of %d cases, %d of %d goals", n[0], n_cases, n[1],
            n_goals);
}

Test(bench_goals, names_are_unique_and_groups_together) {
  for (const ks_goal_case *c = ks_goal_cases; c->name; c++) {
    bool left = false; /* the group's cases are behind c */
    for (const ks_goal_case *d = c + 1; d->name; d++) {
      cr_expect_str_neq(c->name, d->name);
      left = left || strcmp(c->group, d->group) != 0;
      cr_expect(!left || strcmp(c->group, d->group) != 0, "%s is apart from its group", d->name);
    }
    cr_expect(strlen(c->name) < sizeof((ks_bench_row *)0)->name &&
              strlen(c->group) < sizeof((ks_bench_row *)0)->group);
  }
}

Test(bench_goals, goals_name_cases_and_measures) {
  static const char *const measures[] = {
      "matrix_share", "read_share", "copy_share", "roofline_share", "device_us",  "launches",   "graphs",
      "waits",        "idle_share", "time_ratio", "rate_ratio",     "peer_speed", "peer_memory"};
  for (const ks_goal *g = ks_goals; g->name; g++) {
    bool known = false;
    for (size_t i = 0; i < sizeof measures / sizeof *measures; i++)
      known = known || strcmp(measures[i], g->measure) == 0;
    cr_expect(known, "%s", g->measure);
    cr_expect_not_null(find_case(g->name), "%s", g->name);
    const ks_goal_case *against = find_case(g->against);
    cr_expect((strstr(g->measure, "_ratio") != NULL) == (against != NULL), "%s, %s", g->name, g->against);
    if (against) cr_expect_str_eq(against->group, find_case(g->name)->group); /* timed in turn */
    cr_expect(g->threshold > 0);
  }
}

Test(bench_goals, parameters_are_known_and_scale) {
  for (const ks_goal_case *c = ks_goal_cases; c->name; c++) {
    ks_goal_parameters p;
    for (int64_t scale = 1; scale <= 4096; scale *= 64) {
      MUST(ks_goal_parameters_read(c, scale, &p));
      if (scale == 1) cr_expect_str_eq(p.text, c->parameters);
      cr_expect(p.n_adapters == 0 || p.n_seqs == 0 || p.n_seqs % p.n_adapters == 0, "%s", c->name);
      cr_expect(p.seq_len == 0 || p.rows % p.seq_len == 0, "%s", c->name);
      cr_expect(p.n_kv_heads == 0 || p.n_heads % p.n_kv_heads == 0, "%s", c->name);
    }
  }
  ks_goal_parameters p;
  MUST(ks_goal_parameters_read(find_case("attn_f.h128g.512"), 64, &p));
  cr_expect(p.rows == 32 && p.seq_len == 16 && p.n_heads == 4 && p.n_kv_heads == 2 && p.head_dim == 128);
  cr_expect_str_eq(p.text, "rows=32 seq_len=16 n_heads=4 n_kv_heads=2 head_dim=128");
  MUST(ks_goal_parameters_read(find_case("lora16.3b"), 64, &p));
  cr_expect(p.n_seqs == 2 && p.n_adapters == 2 && p.rank == 8);
  cr_expect_str_eq(p.targets, "q,k,v,o");
  const ks_goal_case unknown = {"g", "n", "rope", "rows=8 n_feet=4"};
  cr_expect_eq(ks_goal_parameters_read(&unknown, 1, &p), KS_EINTERNAL);
  cr_expect_not_null(strstr(ks_error_message(), "n_feet"), "%s", ks_error_message());
}

Test(bench_goals, adamw_has_the_size_of_an_adapter) {
  static const char *const names[] = {"1b", "3b"};
  for (int i = 0; i < 2; i++) {
    const ks_bench_shape *s = ks_bench_shapes;
    char name[32];
    int64_t n = 0;
    ks_goal_parameters p;
    while (strcmp(s->name, names[i]) != 0)
      s++;
    for (int t = KS_TARGET_q; t <= KS_TARGET_o; t++) {
      int64_t n_out, n_in;
      ks_target_shape(&s->config, (ks_target)t, &n_out, &n_in);
      n += s->config.n_layers * 8 * (n_out + n_in);
    }
    snprintf(name, sizeof name, "adamw.%s", names[i]);
    MUST(ks_goal_parameters_read(find_case(name), 1, &p));
    cr_expect_eq(p.n_cols, n);
  }
}

/* ---------------------------------------------------------------- how it is measured */

typedef struct {
  int n_calls, *order, number;
} caller;

static ks_status called(void *arg, double *ms) {
  caller *c = arg;
  *ms = ++c->n_calls;
  *c->order = 10 * *c->order + c->number;
  return KS_OK;
}

Test(bench_goals, samples_come_in_turn) {
  ks_bench b = {.device = "cpu", .n_threads = 1, .min_samples = 3};
  ks_samples samples[2];
  int order = 0;
  caller callers[2] = {{0, &order, 1}, {0, &order, 2}};
  ks_bench_turn turns[2];
  MUST(ks_bench_open(&b, NULL));
  for (int i = 0; i < 2; i++) {
    MUST(ks_samples_create(&samples[i]));
    turns[i] = (ks_bench_turn){called, &callers[i], &samples[i]};
  }
  MUST(ks_bench_sample_in_turn(&b, turns, 2));
  cr_expect_eq(order, 121212);
  for (int i = 0; i < 2; i++) {
    cr_expect(samples[i].n == 3 && samples[i].raw[2] == 3 && samples[i].ms[0] == 1);
    cr_expect_str_eq(samples[i].ended, "time");
    ks_samples_free(&samples[i]);
  }
  ks_bench_close(&b);
}

/* A few rows' results are the first of many's; one that is off there is seen, and one that was not written. */
Test(bench_goals, first_rows_are_compared) {
  static const char *const ops[] = {
      "rmsnorm_forward", "attention_backward", "head_loss", "similarity_top", "adamw", "rope"};
  const ks_bench_dims many = {.rows = 24,
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
  ks_bench_dims few = many;
  ks_ctx *ctx = NULL;
  few.rows = 6;
  few.n_adapters = 1;
  MUST(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}));
  for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
    const ks_bench_op_kind *kind = ks_bench_op_kinds;
    ks_bench_op a, b;
    void *results[KS_BENCH_MOST_ARRAYS];
    bool same = false;
    char why[200] = "";
    while (strcmp(kind->name, ops[i]) != 0)
      kind++;
    MUST(ks_bench_op_make(ctx, kind, &many, KS_DTYPE_BF16, &a));
    MUST(ks_bench_op_make(ctx, kind, &few, KS_DTYPE_BF16, &b));
    MUST(ks_bench_op_results(&a, results));
    const bool starts_empty =
        strcmp(ops[i], "adamw") != 0 && strcmp(ops[i], "rope") != 0; /* these work in place */
    if (starts_empty) cr_expect(!ks_bench_op_is_filled(&a, results, why, sizeof why), "%s", ops[i]);
    for (int k = 0; k < KS_BENCH_MOST_ARRAYS; k++)
      free(results[k]);
    MUST(ks_bench_op_run(&a));
    MUST(ks_bench_op_run(&b));
    MUST(ks_bench_op_results(&a, results));
    cr_expect(ks_bench_op_is_filled(&a, results, why, sizeof why), "%s: %s", ops[i], why);
    for (int k = 0; k < KS_BENCH_MOST_ARRAYS; k++)
      free(results[k]);
    MUST(ks_bench_op_compare(&a, &b, &same, why, sizeof why));
    cr_expect(same, "%s: %s", ops[i], why);
    for (int k = 0; k < a.n_arrays; k++)
      if ((a.arrays[k].role == KS_ARRAY_OUTPUT || a.arrays[k].role == KS_ARRAY_STATE) &&
          a.arrays[k].type == KS_ARRAY_F32)
        ((float *)a.arrays[k].p)[1] += 1;
    MUST(ks_bench_op_compare(&a, &b, &same, why, sizeof why));
    cr_expect(!same, "%s: not seen", ops[i]);
    ks_bench_op_free(&a);
    ks_bench_op_free(&b);
  }
  ks_ctx_destroy(ctx);
}

Test(bench_goals, losses_alone_cost_half) {
  const ks_bench_dims both = {.rows = 12, .cols = 40, .n_out = 33};
  ks_bench_dims alone = both;
  const ks_bench_op_kind *kind = ks_bench_op_kinds;
  ks_ctx *ctx = NULL;
  ks_bench_op a, b;
  alone.kind = 1;
  while (strcmp(kind->name, "head_loss") != 0)
    kind++;
  MUST(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}));
  MUST(ks_bench_op_make(ctx, kind, &both, KS_DTYPE_F32, &a));
  MUST(ks_bench_op_make(ctx, kind, &alone, KS_DTYPE_F32, &b));
  MUST(ks_bench_op_run(&a));
  MUST(ks_bench_op_run(&b));
  cr_expect(a.a.head.dx != NULL && b.a.head.dx == NULL);
  for (int i = 0; i < 12; i++)
    cr_expect_eq(a.a.head.loss[i], b.a.head.loss[i]);
  cr_expect_eq(ks_bench_op_cost(&a).flops, 2 * ks_bench_op_cost(&b).flops);
  cr_expect_eq(ks_bench_op_cost(&a).bytes - ks_bench_op_cost(&b).bytes, 4.0 * 12 * 40);
  ks_bench_op_free(&a);
  ks_bench_op_free(&b);
  ks_ctx_destroy(ctx);
}

/* Without adapters gradients still go all the way down: the step of the one adapter learns, and less is counted. */
Test(bench_goals, a_frozen_step_reaches_the_lowest_layer) {
  const ks_model_config config = ks_goal_scaled_config(&ks_bench_shapes[0].config, 64);
  const uint32_t all = (1u << KS_N_TARGETS) - 1;
  ks_ctx *ctx = NULL;
  ks_model *model = NULL;
  ks_bench_step frozen, lora;
  MUST(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}));
  MUST(ks_model_create_random_quickly(ctx, &config, KS_DTYPE_F32, 1, &model));
  ks_bench_step_params p = {
      .model = model, .n_seqs = 4, .seq_len = 8, .n_adapters = 2, .rank = 4, .targets = all, .key = 1};
  MUST(ks_bench_step_create(&p, &lora));
  p.is_frozen = true;
  MUST(ks_bench_step_create(&p, &frozen));
  for (int i = 0; i < 3; i++) {
    MUST(ks_bench_step_once(&lora));
    MUST(ks_bench_step_once(&frozen));
  }
  cr_expect(ks_bench_step_learns(&lora) && ks_bench_step_learns(&frozen));
  cr_expect(frozen.first_norm > 0 && frozen.p.n_adapters == 1);
  for (int64_t i = 1; i < config.n_layers * KS_N_TARGETS; i++)
    cr_expect_eq(frozen.views[0].loras[i].rank, 0);
  cr_expect(ks_bench_train_flops(&config, 4, 0, 32, 8) < ks_bench_train_flops(&config, 4, all, 32, 8));
  lora.mean_loss = lora.first_loss;
  cr_expect(!ks_bench_step_learns(&lora));
  frozen.least_norm = 0;
  cr_expect(!ks_bench_step_learns(&frozen));
  ks_bench_step_destroy(&frozen);
  ks_bench_step_destroy(&lora);
  p.n_seqs = 3;
  p.is_frozen = false;
  cr_expect_eq(ks_bench_step_create(&p, &lora), KS_EINTERNAL);
  ks_bench_step_destroy(&lora);
  ks_model_destroy(model);
  ks_ctx_destroy(ctx);
}
