#include "experiments/cli.h"
#include "experiments/config.h"

#include <stdio.h>
#include <string.h>

static const ks_option options[] = {
    {"set", "KEY=VALUE", "override a key; may be given again"},
    {"print", NULL, "print the resolved configuration: every key, ready to be run again"},
    {"cells", NULL, "print the names of the cells"},
    {"shard", "I/N", "count this shard's cells: i/n, auto (from Slurm or MPI) or all"},
    {NULL, NULL, NULL}};
static const ks_command command = {
    "validate",
    "[CONFIG]",
    "Checks a configuration and that the files it names are there; runs nothing.",
    options,
    0,
    1,
    "Every error is reported in one pass, with file and line."};

/* Adds a line for a path key whose file is not there. */
static ks_status check_file(const char *key, const char *path, bool folder_is_fine, ks_text *missing) {
  bool there = *path == 0 || (folder_is_fine && ks_dir_exists(path)) || ks_file_exists(path);
  if (there) return KS_OK;
  return ks_text_addf(missing, "%s%s: %s %s", missing->len ? "\n" : "", key, path,
                      ks_dir_exists(path) ? "is a folder; name a file" : "is not there; name it with --set");
}

static ks_status check_files(const ks_config *c) {
  ks_text missing = {0};
  ks_status status;
  bool needs_file = strcmp(c->data.source, "persona") != 0;
  KS_TRY_OUT(check_file("model.path", c->model.path, true, &missing));
  KS_TRY_OUT(check_file("model.tokenizer", c->model.tokenizer, true, &missing));
  KS_TRY_OUT(check_file("select.lexicon", c->select.lexicon, false, &missing));
  if (needs_file) KS_TRY_OUT(check_file("data.path", c->data.path, false, &missing));
  if (missing.len) status = KS_FAIL(KS_ECONFIG, "%s", missing.data);
out:
  ks_text_free(&missing);
  return status;
}

static void print_matrix(const ks_matrix *m, const ks_shard *shard, const ks_args *args) {
  if (ks_args_has(args, "print")) {
    fputs(m->text, stdout);
    return;
  }
  int64_t own = 0;
  for (int64_t i = 0; i < m->n_cells; i++) {
    if (!ks_shard_owns(shard, i)) continue;
    own++;
    if (ks_args_has(args, "cells")) printf("%s\n", m->cells[i].name);
  }
  if (ks_args_has(args, "cells")) return;
  printf("%s: %lld cells, results in %s\n", m->name, (long long)m->n_cells, m->output);
  if (shard->n > 1) printf("%s: %lld of them\n", shard->why, (long long)own);
}

int ks_verb_validate(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_matrix *m = NULL;
  ks_shard shard;
  ks_status status = ks_shard_parse(ks_args_value(&args, "shard"), &shard);
  if (status == KS_OK)
    status = ks_config_load(args.n_operands ? args.operands[0] : NULL, args.sets, args.n_sets, &m);
  if (status == KS_OK) status = check_files(&m->cells[0].config);
  if (status == KS_OK) print_matrix(m, &shard, &args);
  ks_matrix_destroy(m);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
