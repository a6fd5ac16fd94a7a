/* Whole experiments on the embedded data: what must hold of every run, read back from the results files. */
#include "experiments/report.h"
#include "experiments/sim.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define MUST(expr) cr_assert((expr) == KS_OK, "%s", ks_error_message())

static char folder[256];

/* Runs tests/system/tiny.cfg with the given changes into a folder of its own. */
static ks_matrix *run_tiny(const char *const *sets, int64_t n_sets) {
  static int runs;
  const char *all[16];
  char output[320];
  if (!folder[0]) {
    snprintf(folder, sizeof folder, "/tmp/ks_test_sim_XXXXXX");
    cr_assert(mkdtemp(folder) != NULL);
  }
  snprintf(output, sizeof output, "experiment.output=%s/run%d", folder, runs++);
  all[0] = output;
  for (int64_t i = 0; i < n_sets; i++)
    all[i + 1] = sets[i];
  ks_matrix *m;
  MUST(ks_config_load(KS_SOURCE_DIR "/tests/system/tiny.cfg", all, n_sets + 1, &m));
  ks_experiment_options options = {.shard = {0, 1, ""}};
  MUST(ks_experiment_run(m, &options));
  return m;
}

static void remove_folder(void) {
  char command[300];
  snprintf(command, sizeof command, "rm -rf %s", folder);
  if (folder[0] && system(command) != 0) perror(command);
}

static char *cell_path(const ks_matrix *m, const char *name) {
  static char path[512];
  snprintf(path, sizeof path, "%s/cells/%s.h5", m->output, name);
  return path;
}

static int64_t read_table(const ks_matrix *m, const char *cell, ks_table t, void *rows) {
  int64_t n;
  void *read;
  MUST(ks_record_read_rows(cell_path(m, cell), t, &read, &n));
  memcpy(rows, &read, sizeof read);
  return n;
}

TestSuite(sim, .fini = remove_folder, .timeout = 300);

Test(sim, budgets_hold_and_everything_is_accounted_for) {
  ks_matrix *m = run_tiny(NULL, 0);
  cr_assert(m->n_cells == 8);
  for (int64_t i = 0; i < m->n_cells; i++) {
    const ks_config *c = &m->cells[i].config;
    const ks_policy *policy = ks_policy_find(c->policy);
    ks_row_arrival *arrivals;
    ks_row_checkpoint *checkpoints;
    ks_row_buffer *kept;
    int64_t n = read_table(m, m->cells[i].name, KS_TABLE_arrival, &arrivals);
    int64_t n_checkpoints = read_table(m, m->cells[i].name, KS_TABLE_checkpoint, &checkpoints);
    int64_t n_kept = read_table(m, m->cells[i].name, KS_TABLE_buffer, &kept);
    cr_expect(n == 42 && n_checkpoints == 3, "%s: %lld arrivals, %lld checkpoints", m->cells[i].name,
              (long long)n, (long long)n_checkpoints);
    int64_t admitted = 0, in_buffer = 0, at = 0;
    for (int64_t j = 0; j < n; j++) {
      cr_expect(arrivals[j].arrival == j);
      bool keeps = arrivals[j].outcome == KS_KEPT || arrivals[j].outcome == KS_REPLACED;
      admitted += keeps;
      in_buffer += arrivals[j].outcome == KS_KEPT;
      cr_expect((arrivals[j].victim_set_id >= 0) == (arrivals[j].outcome == KS_REPLACED));
      if (at < n_checkpoints && j + 1 == checkpoints[at].arrivals) {
        cr_expect(checkpoints[at].admissions == admitted, "%s window %lld", m->cells[i].name, (long long)at);
        cr_expect(checkpoints[at].sets_kept == in_buffer, "%s window %lld", m->cells[i].name, (long long)at);
        at++;
      }
    }
    cr_expect(at == n_checkpoints);
    for (int64_t w = 0; w < n_checkpoints; w++) {
      int64_t bytes = 0, rows = 0;
      for (int64_t j = 0; j < n_kept; j++)
        if (kept[j].window == w) {
          bytes += kept[j].bytes;
          rows++;
          if (!policy->unlimited) cr_expect(kept[j].bytes <= c->buffer.bin_bytes);
        }
      cr_expect(rows == checkpoints[w].sets_kept && bytes == checkpoints[w].bytes_used);
      cr_expect(checkpoints[w].annotations_asked ==
                checkpoints[w].annotations_answered + checkpoints[w].annotations_refused);
      if (policy->unlimited) continue;
      cr_expect(checkpoints[w].sets_kept <= c->buffer.bins);
      cr_expect(checkpoints[w].annotations_asked <= c->annotate.budget);
    }
    if (policy->trains) cr_expect(checkpoints[n_checkpoints - 1].train_steps > 0);
    if (!policy->trains) cr_expect(checkpoints[n_checkpoints - 1].train_steps == 0 && n_kept == 0);
    if (policy->unlimited) cr_expect(checkpoints[n_checkpoints - 1].sets_kept == 42);
    ks_rows_free(KS_TABLE_arrival, arrivals, n);
    ks_rows_free(KS_TABLE_checkpoint, checkpoints, n_checkpoints);
    ks_rows_free(KS_TABLE_buffer, kept, n_kept);
  }
  ks_matrix_destroy(m);
}

static const ks_row_synthesis *find_variant(const ks_row_synthesis *rows, int64_t n,
                                            const ks_row_synthesis *like, int64_t nth) {
  for (int64_t i = 0; i < n; i++)
    if (rows[i].window == like->window && rows[i].set_id == like->set_id && nth-- == 0) return &rows[i];
  return NULL;
}

Test(sim, another_policy_changes_no_other_draw) {
  const char *sets[] = {"policy=sdss,reservoir,fifo", "seed=1", "annotate.budget=-1"};
  ks_matrix *m = run_tiny(sets, 3);
  const char *const names[] = {"reservoir-s1", "fifo-s1", "all-s1", "none-s1"};
  ks_row_arrival *ours, *theirs;
  ks_row_synthesis *variants, *others;
  int64_t n = read_table(m, "sdss-s1", KS_TABLE_arrival, &ours);
  int64_t n_variants = read_table(m, "sdss-s1", KS_TABLE_synthesis, &variants), compared = 0;
  for (size_t p = 0; p < sizeof names / sizeof *names; p++) {
    cr_assert(read_table(m, names[p], KS_TABLE_arrival, &theirs) == n);
    for (int64_t i = 0; i < n; i++)
      cr_expect(ours[i].set_id == theirs[i].set_id && ours[i].eoe == theirs[i].eoe &&
                    ours[i].dss == theirs[i].dss,
                "%s: arrival %lld", names[p], (long long)i);
    ks_rows_free(KS_TABLE_arrival, theirs, n);
    /* A set that both policies keep is rewritten to the same texts. */
    int64_t n_others = read_table(m, names[p], KS_TABLE_synthesis, &others);
    for (int64_t i = 0; i < n_variants; i++) {
      int64_t nth = 0;
      for (int64_t j = 0; j < i; j++)
        nth += variants[j].window == variants[i].window && variants[j].set_id == variants[i].set_id;
      const ks_row_synthesis *same = find_variant(others, n_others, &variants[i], nth);
      if (!same) continue;
      compared++;
      cr_expect(strcmp(same->question, variants[i].question) == 0, "%s: \"%s\" and \"%s\"", names[p],
                variants[i].question, same->question);
    }
    ks_rows_free(KS_TABLE_synthesis, others, n_others);
  }
  cr_expect(compared > 0, "no set was kept by two policies: the test says nothing");
  ks_rows_free(KS_TABLE_arrival, ours, n);
  ks_rows_free(KS_TABLE_synthesis, variants, n_variants);
  ks_matrix_destroy(m);
}

Test(sim, evaluation_draws_are_paired) {
  /* Policies that train on the same texts give the same answers: with a buffer for all, fifo and random keep
   * all in the same bins. */
  const char *sets[] = {"policy=fifo,reservoir", "seed=1", "buffer.bins=64", "annotate.budget=-1"};
  ks_matrix *m = run_tiny(sets, 4);
  ks_row_answer *a, *b;
  int64_t n = read_table(m, "fifo-s1", KS_TABLE_answer, &a);
  cr_assert(read_table(m, "reservoir-s1", KS_TABLE_answer, &b) == n && n == 36);
  for (int64_t i = 0; i < n; i++)
    cr_expect(strcmp(a[i].answer, b[i].answer) == 0 && a[i].loss_sum == b[i].loss_sum, "answer %lld",
              (long long)i);
  ks_rows_free(KS_TABLE_answer, a, n);
  ks_rows_free(KS_TABLE_answer, b, n);
  ks_matrix_destroy(m);
}

Test(sim, a_folder_of_another_configuration_is_left_alone) {
  const char *sets[] = {"policy=fifo", "seed=1", "experiment.floor_and_ceiling=false"};
  ks_matrix *m = run_tiny(sets, 3), *other;
  char digest[65], after[65], output[600];
  MUST(ks_record_digest(cell_path(m, "fifo-s1"), digest));
  snprintf(output, sizeof output, "experiment.output=%s", m->output);
  const char *changed[] = {"policy=fifo", "seed=1", "experiment.floor_and_ceiling=false", "train.epochs=3",
                           output};
  MUST(ks_config_load(KS_SOURCE_DIR "/tests/system/tiny.cfg", changed, 5, &other));
  ks_experiment_options options = {.shard = {0, 1, ""}};
  cr_expect(ks_experiment_run(other, &options) == KS_ECONFIG);
  cr_expect(strstr(ks_error_message(), "another configuration") && strstr(ks_error_message(), "--fresh"),
            "%s", ks_error_message());
  MUST(ks_record_digest(cell_path(m, "fifo-s1"), after));
  cr_expect_str_eq(after, digest);
  options.fresh = true;
  MUST(ks_experiment_run(other, &options));
  MUST(ks_record_digest(cell_path(m, "fifo-s1"), after));
  cr_expect_str_neq(after, digest);
  ks_matrix_destroy(m);
  ks_matrix_destroy(other);
}

Test(sim, reports_group_seeds_and_check_themselves) {
  ks_matrix *m = run_tiny(NULL, 0);
  ks_report *r;
  ks_report_params params = KS_REPORT_DEFAULT;
  params.baseline = "reservoir";
  MUST(ks_report_load(m->output, &params, &r));
  cr_assert(r->n_rows == 4 && r->complete);
  cr_expect_str_eq(r->rows[0].policy, "none");
  cr_expect_str_eq(r->rows[3].policy, "all");
  for (int64_t i = 0; i < r->n_rows; i++) {
    const ks_report_row *row = &r->rows[i];
    cr_expect(row->n_cells == 2 && row->n_values == 24);
    double mean = 0;
    for (int64_t j = 0; j < row->n_values; j++)
      mean += row->rouge1[j] / 24;
    cr_expect(fabs(mean - row->rouge1_ci.mean) < 1e-12);
    cr_expect(row->rouge1_ci.low <= mean && mean <= row->rouge1_ci.high);
    cr_expect((row->difference.n > 0) == (strcmp(row->policy, "reservoir") != 0), "%s", row->label);
    cr_expect_str_eq(row->label, row->policy);
  }
  ks_text csv = {0}, out = {0};
  char path[512];
  MUST(ks_report_csv(r, &csv));
  snprintf(path, sizeof path, "%s/ref.csv", folder);
  MUST(ks_file_write_atomic(path, csv.data, csv.len));
  MUST(ks_report_check(r, path, 0.02, &out));
  cr_expect(strstr(out.data, "same bits  none") != NULL, "%s", out.data);
  /* A changed number with a changed digest is found; so is a missing row. */
  char *digest = strstr(csv.data, r->rows[1].digest);
  cr_assert(digest != NULL);
  digest[0] = digest[0] == '0' ? '1' : '0';
  char *acceptance = digest - 2;
  while (acceptance[-1] != ',')
    acceptance--;
  acceptance[0] = acceptance[0] == '9' ? '1' : '9'; /* its first digit: the last may be within rounding */
  MUST(ks_file_write_atomic(path, csv.data, csv.len));
  cr_expect(ks_report_check(r, path, 0.02, &out) == KS_EMISMATCH);
  cr_expect(strstr(out.data, "DIFFERS") != NULL, "%s", out.data);
  MUST(ks_file_write_atomic(path, csv.data, (size_t)(strstr(csv.data, "\nall,") + 1 - csv.data)));
  ks_text_clear(&out);
  cr_expect(ks_report_check(r, path, 0.02, &out) == KS_EMISMATCH && strstr(out.data, "MISSING    all"), "%s",
            out.data);
  cr_expect(ks_report_check(r, "/nonexistent.csv", 0.02, &out) == KS_EDATA);
  MUST(ks_file_write_atomic(path, "nonsense", 8));
  cr_expect(ks_report_check(r, path, 0.02, &out) == KS_EDATA);
  ks_text_free(&csv);
  ks_text_free(&out);
  ks_report_destroy(r);
  ks_matrix_destroy(m);
}

static bool stop_soon(void *user, const char *stage, double done, double total) {
  (void)stage, (void)done, (void)total;
  return --*(int *)user > 0;
}

Test(sim, stages_stop_when_asked) {
  const char *sets[] = {"policy=fifo", "seed=1", "experiment.floor_and_ceiling=false"};
  ks_matrix *m = run_tiny(sets, 3);
  ks_ctx *ctx;
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  ks_world *w;
  ks_trial *t;
  MUST(ks_ctx_create(&ctx, &params));
  MUST(ks_world_open(ctx, &m->cells[0].config, &w));
  MUST(ks_trial_open(w, &m->cells[0].config, "stopped", m->output, false, &t));
  int left = 1;
  ks_progress stop = {stop_soon, &left};
  ks_stage stage = {.world = w, .trials = &t, .n_trials = 1, .window = 0, .progress = &stop};
  cr_expect(ks_stage_embed(&stage) == KS_EINTERRUPTED);
  left = 1 << 30;
  MUST(ks_stage_embed(&stage));
  MUST(ks_stage_select(&stage));
  MUST(ks_stage_annotate(&stage));
  left = 2;
  ks_status stopped = ks_stage_synthesize(&stage);
  cr_expect((stopped == KS_OK ? ks_stage_train(&stage) : stopped) == KS_EINTERRUPTED);
  ks_stage_end(&stage);
  ks_trial_close(t);
  ks_world_close(w);
  ks_ctx_destroy(ctx);
  ks_matrix_destroy(m);
}

Test(sim, a_cohort_embeds_a_set_once) {
  const char *sets[] = {"policy=fifo,reservoir", "seed=1,2,3"};
  ks_matrix *m = run_tiny(sets, 2);
  ks_ctx *ctx;
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  ks_world *w;
  ks_trial *trials[8];
  cr_assert(m->n_cells >= 8);
  MUST(ks_ctx_create(&ctx, &params));
  MUST(ks_world_open(ctx, &m->cells[0].config, &w));
  for (int i = 0; i < 8; i++) {
    char name[16];
    snprintf(name, sizeof name, "again%d", i);
    MUST(ks_trial_open(w, &m->cells[i].config, name, m->output, false, &trials[i]));
  }
  ks_stage stage = {.world = w, .trials = trials, .n_trials = 8};
  MUST(ks_stage_embed(&stage));
  int64_t met = 0;
  for (int64_t id = 0; id < w->data->n_sets; id++) {
    bool arrives = false;
    for (int i = 0; i < 8; i++)
      for (int64_t a = 0; a < m->cells[i].config.window.size; a++)
        arrives = arrives || trials[i]->order[a] == id;
    met += arrives;
  }
  cr_expect(w->n_embedded == met && met > 14, "%lld embedded, %lld met", (long long)w->n_embedded,
            (long long)met);
  for (int i = 0; i < 8; i++)
    ks_trial_close(trials[i]);
  ks_world_close(w);
  ks_ctx_destroy(ctx);
  ks_matrix_destroy(m);
}

Test(sim, long_texts_are_cut_and_never_lost) {
  const char *sets[] = {"policy=fifo", "seed=1", "experiment.floor_and_ceiling=false"};
  ks_matrix *m = run_tiny(sets, 3);
  ks_ctx *ctx;
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  ks_world *w;
  MUST(ks_ctx_create(&ctx, &params));
  MUST(ks_world_open(ctx, &m->cells[0].config, &w));
  char text[4001];
  for (int i = 0; i < 4000; i++)
    text[i] = i % 5 == 4 ? ' ' : (char)('a' + i % 7);
  text[4000] = 0;
  static const struct {
    const char *question, *response;
    int64_t max;
  } cases[] = {{"short", "short", 100}, {NULL, "short", 40}, {"short", NULL, 40},
               {NULL, NULL, 40},        {NULL, NULL, 3},     {NULL, NULL, 2}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    int32_t *ids;
    int64_t n, begin;
    MUST(ks_world_encode_example(w, cases[i].question ? cases[i].question : text,
                                 cases[i].response ? cases[i].response : text, cases[i].max, &ids, &n,
                                 &begin));
    cr_expect(n <= cases[i].max && begin >= 1 && begin < n, "case %zu: %lld of %lld, begin %lld", i,
              (long long)n, (long long)cases[i].max, (long long)begin);
    cr_expect(ids[0] == ks_tokenizer_bos(w->tokenizer));
    bool ends = ids[n - 1] == ks_tokenizer_eos(w->tokenizer);
    cr_expect(ends == (cases[i].response != NULL), "case %zu: a cut response has no end token", i);
    free(ids);
  }
  ks_world_close(w);
  ks_ctx_destroy(ctx);
  ks_matrix_destroy(m);
}
