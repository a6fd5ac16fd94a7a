/* Rows of a report from cells written here: which questions a row's seeds share decides how its intervals are
 * drawn. Reports of real runs: test_sim.c. */
#include "experiments/report.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <unistd.h>

#define MUST(expr) cr_assert((expr) == KS_OK, "%s", ks_error_message())

enum { N_QUESTIONS = 8 };
static char folder[64];

static void make_folder(void) {
  char cells[80];
  snprintf(folder, sizeof folder, "/tmp/ks_test_report_XXXXXX");
  cr_assert(mkdtemp(folder) != NULL);
  snprintf(cells, sizeof cells, "%s/cells", folder);
  MUST(ks_dir_make(cells));
}

static void remove_folder(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf %s", folder);
  if (system(command) != 0) perror(command);
}

TestSuite(report, .init = make_folder, .fini = remove_folder);

/* A complete cell that answers the questions `first` .. `first` + N_QUESTIONS - 1 at two checkpoints. */
static void write_cell(const char *policy, int seed, int64_t first) {
  char path[256], name[64], seed_text[16];
  snprintf(name, sizeof name, "%s-s%d", policy, seed);
  snprintf(seed_text, sizeof seed_text, "%d", seed);
  snprintf(path, sizeof path, "%s/cells/%s.h5", folder, name);
  const ks_meta meta[] = {{"cell", name}, {"policy", policy}, {"seed", seed_text}};
  MUST(ks_record_begin(path, "policy = \"x\";\n", meta, 3));
  ks_row_answer answers[2 * N_QUESTIONS] = {0};
  ks_row_checkpoint checkpoints[2] = {{.window = 0}, {.window = 1}};
  ks_rng rng = ks_rng_make((uint64_t)seed, KS_RNG_TEST, (uint64_t)policy[0]);
  for (int i = 0; i < 2 * N_QUESTIONS; i++)
    answers[i] = (ks_row_answer){.window = i / N_QUESTIONS,
                                 .set_id = first + i % N_QUESTIONS,
                                 .rouge1_f1 = ks_rng_uniform(&rng),
                                 .loss_sum = 1,
                                 .loss_tokens = 1,
                                 .answer = ""};
  ks_record_rows rows = {0};
  rows.rows[KS_TABLE_answer] = answers;
  rows.n_rows[KS_TABLE_answer] = 2 * N_QUESTIONS;
  rows.rows[KS_TABLE_checkpoint] = checkpoints;
  rows.n_rows[KS_TABLE_checkpoint] = 2;
  MUST(ks_record_append(path, &rows, NULL, KS_RUN_COMPLETE));
}

static ks_report *load(void) {
  ks_report_params params = KS_REPORT_DEFAULT;
  ks_report *r;
  MUST(ks_report_load(folder, &params, &r));
  return r;
}

static const ks_report_row *find(const ks_report *r, const char *policy) {
  for (int64_t i = 0; i < r->n_rows; i++)
    if (strcmp(r->rows[i].policy, policy) == 0) return &r->rows[i];
  cr_assert(false, "no row of %s", policy);
  return NULL;
}

static bool same(ks_interval a, ks_interval b) {
  return a.n == b.n && a.mean == b.mean && a.low == b.low && a.high == b.high;
}

static void expect_note(const ks_report *r, const char *want) {
  ks_text table = {0};
  MUST(ks_report_table(r, &table));
  cr_expect(strstr(table.data, want) != NULL, "\"%s\" is not in\n%s", want, table.data);
  ks_text_free(&table);
}

Test(report, seeds_that_share_the_questions_are_crossed) {
  const ks_report_params p = KS_REPORT_DEFAULT;
  for (int seed = 1; seed <= 3; seed++) {
    write_cell("random", seed, 0);
    write_cell("fifo", seed, 0);
  }
  ks_report *r = load();
  const ks_report_row *fifo = find(r, "fifo"), *random = find(r, "random");
  ks_interval want;
  cr_assert(fifo->crossed && random->crossed && fifo->n_values == 3 * N_QUESTIONS);
  for (int i = 0; i < 3 * N_QUESTIONS; i++)
    cr_expect(fifo->questions[i] == i % N_QUESTIONS);
  MUST(ks_bootstrap_crossed(fifo->rouge1, 3, N_QUESTIONS, p.level, p.n_resamples, p.seed, &want));
  cr_expect(same(fifo->rouge1_ci, want));
  MUST(ks_bootstrap_crossed_paired(fifo->rouge1, random->rouge1, 3, N_QUESTIONS, p.level, p.n_resamples,
                                   p.seed, &want));
  cr_expect(same(fifo->difference, want));
  expect_note(r, "CI: bootstrap over seeds and questions, crossed");
  ks_report_destroy(r);
}

Test(report, seeds_with_questions_of_their_own_are_nested) {
  const ks_report_params p = KS_REPORT_DEFAULT;
  const int64_t sizes[] = {N_QUESTIONS, N_QUESTIONS};
  for (int seed = 1; seed <= 2; seed++) {
    write_cell("random", seed, seed);
    write_cell("fifo", seed, seed);
  }
  ks_report *r = load();
  const ks_report_row *fifo = find(r, "fifo"), *random = find(r, "random");
  ks_interval want;
  cr_assert(!fifo->crossed && !random->crossed);
  MUST(ks_bootstrap(fifo->rouge1, sizes, 2, p.level, p.n_resamples, p.seed, &want));
  cr_expect(same(fifo->rouge1_ci, want));
  MUST(ks_bootstrap_paired(fifo->rouge1, random->rouge1, sizes, 2, p.level, p.n_resamples, p.seed, &want));
  cr_expect(same(fifo->difference, want));
  expect_note(r, "CI: bootstrap over seeds, then each seed's own questions (nested)");
  ks_report_destroy(r);
}

Test(report, rows_of_other_questions_are_not_paired) {
  for (int seed = 1; seed <= 2; seed++) {
    write_cell("random", seed, 0);
    write_cell("fifo", seed, 1);
    write_cell("reservoir", seed, seed);
  }
  ks_report *r = load();
  cr_expect(find(r, "fifo")->crossed && find(r, "fifo")->difference.n == 0);
  cr_expect(!find(r, "reservoir")->crossed && find(r, "reservoir")->difference.n == 0);
  expect_note(r, "crossed where a row's seeds share the questions, else nested");
  ks_report_destroy(r);
}

Test(report, one_seed_speaks_of_questions_alone) {
  write_cell("random", 1, 0);
  write_cell("fifo", 1, 0);
  ks_report *r = load();
  cr_expect(find(r, "fifo")->difference.n == N_QUESTIONS);
  expect_note(r, "CI: bootstrap over questions alone");
  ks_report_destroy(r);
}
