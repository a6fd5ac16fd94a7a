#include "experiments/cli.h"
#include "experiments/estimate.h"
#include "experiments/report.h"
#include "experiments/sim.h"

#include <stdio.h>

static const ks_option options[] = {
    {"device", "NAME", "cpu, cuda, or auto (a GPU when there is one): --set run.backend=NAME"},
    {"set", "KEY=VALUE", "override a configuration key (again for more)"},
    {"shard", "I/N",
     "run every N-th cell from I; auto: from Slurm's or MPI's variables; all: all whatever is set"},
    {"fresh", NULL, "start over: replace results that are there"},
    {"dry-run", NULL, "print the cells and an estimate of time, memory and tokens; run nothing"},
    {0}};
static const ks_command command = {
    "run",
    "CONFIG",
    "run an experiment and print its table",
    options,
    1,
    1,
    "The results go to results/<name>/: cells/*.h5, index.h5, table.csv, table.txt. Ctrl-C ends cleanly; the "
    "same command goes\n"
    "on at the last checkpoint, and cells that are complete are not run again."};

static ks_status write_text(const char *folder, const char *name, const ks_text *text) {
  char *path;
  KS_TRY(ks_path_join(folder, name, &path));
  ks_status status = ks_file_write_atomic(path, text->data, text->len);
  free(path);
  return status;
}

static ks_status print_report(const ks_matrix *m) {
  const ks_config *c = &m->cells[0].config;
  ks_report_params params = KS_REPORT_DEFAULT;
  params.level = c->stats.level;
  params.n_resamples = c->stats.resamples;
  params.seed = (uint64_t)c->stats.seed;
  ks_report *report = NULL;
  ks_text table = {0}, csv = {0};
  const char **names = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&names, (size_t)m->n_cells, sizeof *names, "report"));
  for (int64_t i = 0; i < m->n_cells; i++)
    names[i] = m->cells[i].name;
  params.cells = names;
  params.n_cells = m->n_cells;
  KS_TRY_OUT(ks_report_load(m->output, &params, &report));
  KS_TRY_OUT(ks_report_table(report, &table));
  KS_TRY_OUT(ks_report_csv(report, &csv));
  KS_TRY_OUT(write_text(m->output, "table.txt", &table));
  KS_TRY_OUT(write_text(m->output, "table.csv", &csv));
  fputs(table.data, stdout);
  printf("results: %s\n", m->output);
out:
  free(names);
  ks_text_free(&table);
  ks_text_free(&csv);
  ks_report_destroy(report);
  return status;
}

static ks_status run_matrix(const ks_matrix *m, const ks_args *args) {
  ks_experiment_options run = {.fresh = ks_args_has(args, "fresh")};
  KS_TRY(ks_shard_parse(ks_args_value(args, "shard"), &run.shard));
  if (run.shard.why[0])
    ks_log(KS_LOG_INFO, "run", "shard %lld of %lld (%s)", (long long)run.shard.i, (long long)run.shard.n,
           run.shard.why);
  if (ks_args_has(args, "dry-run")) {
    ks_text text = {0};
    ks_status status = ks_estimate_text(m, &run.shard, &text);
    if (status == KS_OK) fputs(text.data, stdout);
    ks_text_free(&text);
    return status;
  }
  int64_t mine = 0;
  for (int64_t i = 0; i < m->n_cells; i++)
    mine += ks_shard_owns(&run.shard, i);
  if (mine == 0) {
    printf("no cell of the %lld is this shard's\n", (long long)m->n_cells);
    return KS_OK;
  }
  ks_interrupt_catch();
  KS_TRY(ks_bar_create(&run.bar));
  ks_status status = ks_experiment_run(m, &run);
  ks_bar_destroy(run.bar);
  return status == KS_OK ? print_report(m) : status;
}

/* --device is the last of the --set. */
static ks_status load(const ks_args *args, ks_matrix **out) {
  const char *device = ks_args_value(args, "device"), **sets = NULL;
  ks_text set = {0};
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&sets, (size_t)args->n_sets + 1, sizeof *sets, "settings"));
  for (int64_t i = 0; i < args->n_sets; i++)
    sets[i] = args->sets[i];
  if (device) KS_TRY_OUT(ks_text_addf(&set, "run.backend=%s", device));
  sets[args->n_sets] = set.data;
  KS_TRY_OUT(ks_config_load(args->operands[0], sets, args->n_sets + (device != NULL), out));
out:
  ks_text_free(&set);
  free(sets);
  return status;
}

int ks_verb_run(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_matrix *m = NULL;
  ks_status status = load(&args, &m);
  if (status == KS_OK) status = run_matrix(m, &args);
  ks_matrix_destroy(m);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
