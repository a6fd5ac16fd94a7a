#include "experiments/cli.h"
#include "experiments/config.h"

#include <stdio.h>

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
  if (status == KS_OK) print_matrix(m, &shard, &args);
  ks_matrix_destroy(m);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
