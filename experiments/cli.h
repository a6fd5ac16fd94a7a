/* The command line: verbs, their options, messages and exit codes.
 *
 *   static const ks_option options[] = {{"set", "KEY=VALUE", "override a key (again for more)"},
 *                                       {"dry-run", NULL, "only say what"},
 *                                       {0}};
 *   static const ks_command command = {"run", "CONFIG", "run an experiment", options, 1, 1,
 *                                      "Ctrl-C ends cleanly; the same command goes on."};
 *   int ks_verb_run(int argc, char **argv) {
 *     ks_args args;
 *     if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;   // --help, or a usage error that was printed
 *     const char *shard = ks_args_value(&args, "shard");                        // NULL: not given
 *     ks_status s = run(args.operands[0], args.sets, args.n_sets);
 *     ks_args_free(&args);
 *     return ks_cli_finish(s);                                                  // prints the error, gives the exit code
 *   }
 *
 * stdout carries results alone; the log, errors and progress go to stderr. Exit codes: 0 ok, 1 incorrect
 * result, 2 usage, configuration or data, 3 environment, 4 internal error, 130 interrupted
 * (ks_status_exit_code).
 */
#ifndef KS_CLI_H
#define KS_CLI_H

#include "core/base/base.h"

typedef struct {
  const char *name; /* without "--"; NULL ends the table */
  const char *arg;  /* name of its value in the help, e.g. "N"; NULL: a flag */
  const char *help;
} ks_option;

typedef struct {
  const char *verb, *operands, *what; /* "run", "CONFIG", "run an experiment" */
  const ks_option *options;           /* or NULL; --help, --quiet, --verbose are added to every verb */
  int min_operands, max_operands;     /* max -1: any number */
  const char *more;                   /* printed after the options; NULL: nothing */
} ks_command;

typedef struct {
  const char **operands; /* [n_operands] into argv */
  int64_t n_operands;
  const char **sets; /* values of every --set, in order */
  int64_t n_sets;
  bool quiet, verbose;
  int exit_code; /* when parse gave false */
  struct {
    const ks_option *option;
    const char *value;
  } * given;
  int64_t n_given;
} ks_args;

/* argv[0] is the verb. --opt VALUE and --opt=VALUE; "--" ends the options. False: there is nothing more to
 * do, leave with exit_code (help was printed, or a usage error); nothing to free then. --quiet and --verbose
 * set the log level. */
bool ks_args_parse(const ks_command *command, int argc, char **argv, ks_args *out);
void ks_args_free(ks_args *a);
const char *ks_args_value(const ks_args *a, const char *option); /* the last value given, or NULL */
bool ks_args_has(const ks_args *a, const char *option);
/* *out keeps its value when the option is absent. KS_ECONFIG: not a number, or outside [low, high]. */
ks_status ks_args_int(const ks_args *a, const char *option, int64_t low, int64_t high, int64_t *out);
ks_status ks_args_float(const ks_args *a, const char *option, double low, double high, double *out);

/* Prints this thread's error, when s is one, to stderr (each line after "keepsake: "), flushes stdout, and
 * gives the exit code; a full or closed stdout becomes 3. */
int ks_cli_finish(ks_status s);
/* The nearest of names to word, or NULL when none is near. */
const char *ks_cli_nearest(const char *word, const char *const *names, int64_t n_names);

/* Log lines on stderr: "12.3s warn module: text", from this level up. */
void ks_cli_log_start(void);
void ks_cli_log_level(ks_log_level lowest);

/* Verbs: X(name, what it does), each implemented as int ks_verb_<name>(int argc, char **argv). */
#define KS_VERB_MAP(X)                                                                                       \
  X(run, "run an experiment and print its table")                                                            \
  X(show, "print the table of results")                                                                      \
  X(check, "compare results with a reference")                                                               \
  X(generate, "continue a prompt with a model")                                                              \
  X(explain, "configuration keys: type, unit, range, default")                                               \
  X(validate, "check a configuration and the files it names")                                                \
  X(ls, "policies, importers, operations, backends, synthesizers")                                           \
  X(bench, "measure speed as shares of this machine's ceilings")

#define X(name, what) int ks_verb_##name(int argc, char **argv);
KS_VERB_MAP(X)
#undef X

#endif
