#include "experiments/sim.h"
#include "kernels/backend.h"

#include <stdio.h>

typedef struct {
  const ks_matrix *matrix;
  const ks_experiment_options *options;
  ks_world *world;
  ks_trial **trials; /* [n_trials] of this cohort and shard */
  int64_t n_trials;
  ks_trial **now;    /* [n_trials] those at the window in work */
  double begin, end; /* this cohort's share of the whole run */
} cohort;

/* ---------------------------------------------------------------- windows */

/* Rough shares of a window's time, for the progress bar alone. */
static const struct {
  const char *label;
  ks_status (*run)(ks_stage *);
  double weight;
} stages[] = {{"embed", ks_stage_embed, 0.05},       {"select", ks_stage_select, 0.02},
              {"annotate", ks_stage_annotate, 0.02}, {"synthesize", ks_stage_synthesize, 0.10},
              {"train", ks_stage_train, 0.45},       {"evaluate", ks_stage_evaluate, 0.34},
              {"record", ks_stage_record, 0.02}};

static ks_status run_stages(cohort *c, ks_stage *stage) {
  double done = 0;
  for (size_t i = 0; i < sizeof stages / sizeof *stages; i++) {
    if (c->options->bar) ks_bar_stage(c->options->bar, done, done + stages[i].weight);
    KS_TRY(ks_progress_report(stage->progress, stages[i].label, 0, 1));
    KS_TRY(stages[i].run(stage));
    done += stages[i].weight;
  }
  return KS_OK;
}

static ks_status run_window(cohort *c, int64_t window, int64_t n_windows) {
  ks_stage stage = {
      .world = c->world, .trials = c->now, .window = window, .progress = ks_bar_progress(c->options->bar)};
  for (int64_t i = 0; i < c->n_trials; i++)
    if (!c->trials[i]->complete && c->trials[i]->n_windows == window) c->now[stage.n_trials++] = c->trials[i];
  if (stage.n_trials == 0) return KS_OK;
  char label[64];
  snprintf(label, sizeof label, "window %lld/%lld", (long long)window + 1, (long long)n_windows);
  double width = (c->end - c->begin) / (double)n_windows, at = c->begin + width * (double)window;
  if (c->options->bar) ks_bar_share(c->options->bar, at, at + width, label);
  ks_status status = run_stages(c, &stage);
  ks_stage_end(&stage);
  return status;
}

static ks_status open_trials(cohort *c, int64_t first, const bool *done) {
  const ks_matrix *m = c->matrix;
  for (int64_t i = first; i < m->n_cells; i++) {
    if (done[i] || !ks_shard_owns(&c->options->shard, i) ||
        !ks_config_same_cohort(&m->cells[first].config, &m->cells[i].config))
      continue;
    KS_TRY(ks_trial_open(c->world, &m->cells[i].config, m->cells[i].name, m->output, c->options->fresh,
                         &c->trials[c->n_trials]));
    c->n_trials++;
  }
  return KS_OK;
}

static void mark_stopped(cohort *c, ks_status why) {
  for (int64_t i = 0; i < c->n_trials; i++)
    if (!c->trials[i]
             ->complete) /* the error to report is the one that stopped the run, not a failure to note it */
      (void)ks_record_set_status(c->trials[i]->path,
                                 why == KS_EINTERRUPTED ? KS_RUN_INTERRUPTED : KS_RUN_FAILED);
}

static ks_status run_cohort(cohort *c, ks_ctx *ctx, int64_t first, const bool *done) {
  ks_status status;
  int64_t n_windows = 0;
  size_t n = (size_t)c->matrix->n_cells;
  KS_TRY_OUT(ks_alloc_array(&c->trials, n, sizeof *c->trials, "cells"));
  KS_TRY_OUT(ks_alloc_array(&c->now, n, sizeof *c->now, "cells"));
  KS_TRY_OUT(ks_world_open(ctx, &c->matrix->cells[first].config, &c->world));
  KS_TRY_OUT(open_trials(c, first, done));
  KS_TRY_OUT(ks_world_check_memory(c->world, c->n_trials));
  for (int64_t i = 0; i < c->n_trials; i++)
    n_windows = ks_max_i64(n_windows, ks_trial_n_windows(c->trials[i]));
  for (int64_t window = 0; window < n_windows; window++)
    KS_TRY_OUT(run_window(c, window, n_windows));
out:
  if (status != KS_OK) {
    char message[2048];
    snprintf(message, sizeof message, "%s", ks_error_message());
    mark_stopped(c, status);
    status = KS_FAIL(status, "%s", message);
  }
  for (int64_t i = 0; i < c->n_trials; i++)
    ks_trial_close(c->trials[i]);
  ks_world_close(c->world);
  free(c->trials);
  free(c->now);
  return status;
}

/* ---------------------------------------------------------------- the whole */

static ks_status write_index(const ks_matrix *m) {
  const char **names = NULL;
  char **files = NULL, *path = NULL;
  size_t n = (size_t)m->n_cells;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&names, n, sizeof *names, "index"));
  KS_TRY_OUT(ks_alloc_array(&files, n, sizeof *files, "index"));
  for (int64_t i = 0; i < m->n_cells; i++) {
    ks_text file = {0};
    names[i] = m->cells[i].name;
    status = ks_text_addf(&file, "%s/cells/%s.h5", m->output, names[i]);
    files[i] = file.data;
    if (status != KS_OK) goto out;
  }
  KS_TRY_OUT(ks_path_join(m->output, "index.h5", &path));
  KS_TRY_OUT(ks_record_write_index(path, m->text, names, (const char *const *)files, m->n_cells));
out:
  for (int64_t i = 0; files && i < m->n_cells; i++)
    free(files[i]);
  free(files);
  free(names);
  free(path);
  return status;
}

static ks_status run_cohorts(const ks_matrix *m, const ks_experiment_options *options, ks_ctx *ctx) {
  bool *done;
  int64_t n_mine = 0, n_done = 0;
  ks_status status = KS_OK;
  KS_TRY(ks_alloc_array(&done, (size_t)m->n_cells, sizeof *done, "cells"));
  for (int64_t i = 0; i < m->n_cells; i++)
    n_mine += ks_shard_owns(&options->shard, i);
  for (int64_t i = 0; i < m->n_cells && status == KS_OK; i++) {
    if (done[i] || !ks_shard_owns(&options->shard, i)) continue;
    int64_t size = 0;
    for (int64_t j = i; j < m->n_cells; j++)
      size += !done[j] && ks_shard_owns(&options->shard, j) &&
              ks_config_same_cohort(&m->cells[i].config, &m->cells[j].config);
    cohort c = {.matrix = m,
                .options = options,
                .begin = (double)n_done / (double)n_mine,
                .end = (double)(n_done + size) / (double)n_mine};
    status = run_cohort(&c, ctx, i, done);
    for (int64_t j = i; j < m->n_cells; j++)
      if (ks_config_same_cohort(&m->cells[i].config, &m->cells[j].config)) done[j] = true;
    n_done += size;
  }
  free(done);
  return status;
}

/* What computes; with "auto" on the CPU also why no other backend of this build does. */
static void say_device(const ks_config *c, const ks_ctx *ctx) {
  for (int i = 0; strcmp(c->run.backend, "auto") == 0 && ks_backends[i]; i++) {
    if (strcmp(ks_backends[i]->name, ks_ctx_backend_name(ctx)) == 0) break;
    if (ks_backends[i]->probe() != KS_OK)
      ks_log(KS_LOG_INFO, "run", "not on %s: %s", ks_backends[i]->name, ks_error_message());
    ks_error_clear();
  }
  ks_log(KS_LOG_INFO, "run", "on %s: %s", ks_ctx_backend_name(ctx), ks_ctx_device_name(ctx));
}

/* How much of the time the device had something to do; what is missing is the host's. */
static void say_busy(const ks_ctx *ctx, double seconds) {
  ks_activity a;
  ks_activity_of(ctx, &a);
  if (!a.is_known || seconds <= 0) return;
  ks_log(KS_LOG_INFO, "run",
         "device_busy_share %.3f of %.1f s: %lld single launches, %lld graphs, %lld waits of the host",
         a.busy_seconds / seconds, seconds, (long long)a.launches, (long long)a.graphs, (long long)a.waits);
}

ks_status ks_experiment_run(const ks_matrix *m, const ks_experiment_options *options) {
  const ks_config *config = &m->cells[0].config;
  ks_ctx *ctx = NULL;
  char *cells = NULL;
  ks_status status;
  KS_TRY_OUT(ks_path_join(m->output, "cells", &cells));
  KS_TRY_OUT(ks_dir_make(cells));
  ks_ctx_params params = ks_config_ctx_params(config);
  KS_TRY_OUT(ks_ctx_create(&ctx, &params));
  say_device(config, ctx);
  KS_TRY_OUT(write_index(m)); /* every shard writes the same one */
  const double start = ks_clock_seconds();
  status = run_cohorts(m, options, ctx);
  if (status == KS_OK) say_busy(ctx, ks_clock_seconds() - start);
out:
  ks_ctx_destroy(ctx);
  free(cells);
  return status;
}
