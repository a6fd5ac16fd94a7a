#include "experiments/config.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

enum { MAX_SETS = 6 };

static ks_matrix *load(const char *const sets[MAX_SETS]) {
  int64_t n = 0;
  ks_matrix *m;
  while (n < MAX_SETS && sets[n])
    n++;
  ks_status s = ks_config_load(NULL, sets, n, &m);
  cr_assert_eq(s, KS_OK, "%s", ks_error_message());
  return m;
}

static ks_text names_of(const ks_matrix *m) {
  ks_text t = {0};
  for (int64_t i = 0; i < m->n_cells; i++) {
    cr_expect_eq(m->cells[i].index, i);
    cr_assert_eq(ks_text_addf(&t, "%s%s", i ? " " : "", m->cells[i].name), KS_OK);
  }
  return t;
}

/* Cells by name, in order. */
Test(matrix, cells_are_the_crossed_axes) {
  static const struct {
    const char *sets[MAX_SETS], *names;
  } cases[] = {
      {{"experiment.floor_and_ceiling=false"}, "sdss-s1"},
      {{NULL}, "none-s1 sdss-s1 all-s1"},
      {{"policy=sdss,fifo", "seed=1,2", "experiment.floor_and_ceiling=false"},
       "sdss-s1 sdss-s2 fifo-s1 fifo-s2"},
      {{"policy=all,sdss,none", "seed=4"}, "all-s4 sdss-s4 none-s4"},
      /* none has no buffer, all no bound on it */
      {{"policy=sdss", "buffer.bins=32,128"}, "none-s1 sdss-s1-b32 sdss-s1-b128 all-s1"},
      /* without a writer the number of variants says nothing */
      {{"policy=fifo", "synth.writer=none,rules", "synth.count=1,3", "experiment.floor_and_ceiling=false"},
       "fifo-s1-none fifo-s1-rules-k1 fifo-s1-rules-k3"},
      {{"policy=none", "train.learning_rate=1e-3,1", "lora.rank=4,8", "experiment.floor_and_ceiling=false"},
       "none-s1"},
      {{"policy=none", "train.learning_rate=0.001,1"}, "none-s1 all-s1-lr0.001 all-s1-lr1"},
      {{"policy=fifo", "annotate.budget=-1,0,10", "buffer.clear_at_trigger=true,false",
        "experiment.floor_and_ceiling=false"},
       "fifo-s1-clear-ab-1 fifo-s1-clear-ab0 fifo-s1-clear-ab10 fifo-s1-noclear-ab-1 fifo-s1-noclear-ab0 "
       "fifo-s1-noclear-ab10"},
      /* the data differ for none too */
      {{"policy=fifo", "persona.user=0,1"},
       "none-s1-u0 none-s1-u1 fifo-s1-u0 fifo-s1-u1 all-s1-u0 all-s1-u1"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_matrix *m = load(cases[i].sets);
    ks_text names = names_of(m);
    cr_expect_str_eq(names.data, cases[i].names);
    ks_text_free(&names);
    ks_matrix_destroy(m);
  }
}

Test(matrix, cells_hold_their_values) {
  ks_matrix *m =
      load((const char *[MAX_SETS]){"policy=fifo", "seed=5,6", "buffer.bins=32,64", "synth.writer=rules"});
  const ks_cell *c = &m->cells[5];
  cr_expect_str_eq(c->name, "fifo-s6-b64");
  cr_expect_str_eq(c->config.policy, "fifo");
  cr_expect_eq(c->config.seed, 6);
  cr_expect_eq(c->config.buffer.bins, 64);
  cr_expect_eq(c->config.synth.writer, 2);
  ks_matrix_destroy(m);
}

Test(matrix, names_are_unique_at_scale) {
  ks_matrix *m = load((const char *[MAX_SETS]){
      "policy=none,random,reservoir,fifo,k_center,sdss,all", "seed=1,2,3,4,5,6,7,8,9,10,11,12",
      "buffer.bins=1,2,3,4,11,12", "synth.writer=none,model,rules", "synth.count=1,11", "lora.rank=1,11"});
  /* none: 1; all: writers 1 + 2 * 2, ranks 2; five others: times 6 sizes */
  cr_expect_eq(m->n_cells, 12 * (1 + 5 * 2 + 5 * 6 * 5 * 2));
  int twice = 0;
  for (int64_t i = 0; i < m->n_cells; i++)
    for (int64_t j = 0; j < i; j++)
      twice += strcmp(m->cells[i].name, m->cells[j].name) == 0;
  cr_expect_eq(twice, 0);
  ks_matrix_destroy(m);
}

Test(matrix, cohorts_share_model_data_and_embeddings) {
  static const struct {
    const char *set;
    bool same;
  } cases[] = {{"seed=9", true},          {"buffer.bins=3", true},     {"lora.rank=2", true},
               {"synth.count=1", true},   {"train.epochs=3", true},    {"stream.order=file", true},
               {"persona.user=3", false}, {"data.eval_size=9", false}, {"select.pooling=mean", false},
               {"window.size=9", false},  {"model.dtype=bf16", false}};
  ks_matrix *m = load((const char *[MAX_SETS]){NULL});
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_matrix *other = load((const char *[MAX_SETS]){cases[i].set});
    cr_expect_eq(ks_config_same_cohort(&m->cells[1].config, &other->cells[1].config), cases[i].same, "%s",
                 cases[i].set);
    ks_matrix_destroy(other);
  }
  ks_matrix_destroy(m);
}

/* ---------------------------------------------------------------- shards */

static const char *const variables[] = {"SLURM_ARRAY_TASK_ID",
                                        "SLURM_ARRAY_TASK_COUNT",
                                        "SLURM_ARRAY_TASK_MIN",
                                        "SLURM_ARRAY_TASK_STEP",
                                        "SLURM_PROCID",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_NTASKS",
                                        "OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE",
                                        "PMI_RANK",
                                        "PMI_SIZE"};

static void clear_variables(void) {
  for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
    unsetenv(variables[i]);
}

Test(shard, from_text) {
  static const struct {
    const char *text;
    ks_status status;
    int64_t i, n;
  } cases[] = {
      {"0/3", KS_OK, 0, 3},       {"2/3", KS_OK, 2, 3},       {"0/1", KS_OK, 0, 1},
      {"all", KS_OK, 0, 1},       {NULL, KS_OK, 0, 1},        {"3/3", KS_ECONFIG, 0, 1},
      {"-1/3", KS_ECONFIG, 0, 1}, {"0/0", KS_ECONFIG, 0, 1},  {"1", KS_ECONFIG, 0, 1},
      {"1/", KS_ECONFIG, 0, 1},   {"/3", KS_ECONFIG, 0, 1},   {"1/3x", KS_ECONFIG, 0, 1},
      {"", KS_ECONFIG, 0, 1},     {"auto", KS_ECONFIG, 0, 1}, {"1/99999999999999999999", KS_ECONFIG, 0, 1}};
  clear_variables();
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    ks_shard s;
    cr_expect_eq(ks_shard_parse(cases[c].text, &s), cases[c].status, "%s",
                 cases[c].text ? cases[c].text : "NULL");
    if (cases[c].status == KS_OK)
      cr_expect(s.i == cases[c].i && s.n == cases[c].n, "%s", cases[c].text ? cases[c].text : "NULL");
  }
}

Test(shard, from_the_environment) {
  static const struct {
    const char *set[10]; /* name, value, ... */
    int64_t i, n;
    const char *why;
  } cases[] = {
      {{"SLURM_ARRAY_TASK_ID", "2", "SLURM_ARRAY_TASK_COUNT", "5"}, 2, 5, "SLURM_ARRAY_TASK_ID"},
      {{"SLURM_ARRAY_TASK_ID", "7", "SLURM_ARRAY_TASK_COUNT", "3", "SLURM_ARRAY_TASK_MIN", "1",
        "SLURM_ARRAY_TASK_STEP", "3"},
       2,
       3,
       "SLURM_ARRAY_TASK_ID"},
      {{"SLURM_PROCID", "1", "SLURM_STEP_NUM_TASKS", "4"}, 1, 4, "SLURM_PROCID"},
      /* a batch script without srun: one process, not one of four */
      {{"SLURM_PROCID", "0", "SLURM_NTASKS", "4"}, 0, 1, ""},
      {{"SLURM_ARRAY_TASK_ID", "1", "SLURM_ARRAY_TASK_COUNT", "3", "SLURM_PROCID", "1",
        "SLURM_STEP_NUM_TASKS", "2"},
       3,
       6,
       "array task"},
      {{"OMPI_COMM_WORLD_RANK", "3", "OMPI_COMM_WORLD_SIZE", "4"}, 3, 4, "OMPI_COMM_WORLD_RANK"},
      {{"PMI_RANK", "0", "PMI_SIZE", "2"}, 0, 2, "PMI_RANK"},
      {{"PMI_RANK", "2", "PMI_SIZE", "2"}, 0, 1, ""},
      {{"PMI_RANK", "x", "PMI_SIZE", "2"}, 0, 1, ""},
  };
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    clear_variables();
    for (int v = 0; v < 10 && cases[c].set[v]; v += 2)
      setenv(cases[c].set[v], cases[c].set[v + 1], 1);
    ks_shard s, all, automatic;
    cr_expect_eq(ks_shard_parse(NULL, &s), KS_OK);
    cr_expect(s.i == cases[c].i && s.n == cases[c].n, "case %zu: %lld of %lld", c, (long long)s.i,
              (long long)s.n);
    cr_expect(strstr(s.why, cases[c].why) && (*cases[c].why || !*s.why), "case %zu: %s", c, s.why);
    cr_expect_eq(ks_shard_parse("auto", &automatic), *cases[c].why ? KS_OK : KS_ECONFIG);
    cr_expect_eq(ks_shard_parse("all", &all), KS_OK);
    cr_expect_eq(all.n, 1);
  }
}

Test(shard, every_cell_has_one_owner) {
  for (int64_t n = 1; n < 6; n++)
    for (int64_t cell = 0; cell < 20; cell++) {
      int owners = 0;
      for (int64_t i = 0; i < n; i++)
        owners += ks_shard_owns(&(ks_shard){.i = i, .n = n}, cell);
      cr_expect_eq(owners, 1);
    }
}
