#include "experiments/cli.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "experiments/progress.h"

static const ks_option common_options[] = {{"quiet", NULL, "no log but errors, no progress"},
                                           {"verbose", NULL, "log details too"},
                                           {"help", NULL, "this text"},
                                           {NULL, NULL, NULL}};

/* ---------------------------------------------------------------- log */

static ks_log_level lowest_level = KS_LOG_INFO;
static double start_seconds;

static void print_log(void *user, ks_log_level level, const char *module, const char *text) {
  static const char *const names[] = {"debug", "info", "warn", "error"};
  (void)user;
  if (level < lowest_level) return;
  ks_bar_clear_all();
  fprintf(stderr, "%.1fs %s %s: %s\n", ks_clock_seconds() - start_seconds, names[level], module, text);
}

void ks_cli_log_start(void) {
  start_seconds = ks_clock_seconds();
  ks_log_set_sink(print_log, NULL);
}

void ks_cli_log_level(ks_log_level lowest) {
  lowest_level = lowest;
}

/* ---------------------------------------------------------------- messages */

const char *ks_cli_nearest(const char *word, const char *const *names, int64_t n_names) {
  const char *nearest = NULL;
  size_t best = 1 + (strlen(word) < 6 ? 2 : strlen(word) / 3);
  for (int64_t i = 0; i < n_names; i++) {
    size_t d = ks_edit_distance(word, names[i]);
    if (d < best) best = d, nearest = names[i];
  }
  return nearest;
}

static void print_error(const char *text) {
  ks_bar_clear_all();
  while (*text) {
    size_t n = strcspn(text, "\n");
    fprintf(stderr, "keepsake: %.*s\n", (int)n, text);
    text += n + (text[n] == '\n');
  }
}

int ks_cli_finish(ks_status s) {
  if (s != KS_OK) {
    print_error(ks_error_message());
    if (lowest_level == KS_LOG_DEBUG)
      fprintf(stderr, "keepsake: (%s at %s)\n", ks_status_name(s), ks_error_origin());
  }
  if (fflush(stdout) != 0 || ferror(stdout)) {
    fprintf(stderr, "keepsake: standard output: %s\n", errno ? strerror(errno) : "cannot be written");
    clearerr(stdout);
    if (s == KS_OK) s = KS_EIO;
  }
  return ks_status_exit_code(s);
}

static void print_options(FILE *f, const ks_option *options) {
  for (; options && options->name; options++) {
    char left[64];
    snprintf(left, sizeof left, "--%s%s%s", options->name, options->arg ? " " : "",
             options->arg ? options->arg : "");
    fprintf(f, "  %-26s %s\n", left, options->help);
  }
}

static void print_help(const ks_command *c) {
  printf("usage: keepsake %s%s%s [options]\n\n%s\n\noptions:\n", c->verb, *c->operands ? " " : "",
         c->operands, c->what);
  print_options(stdout, c->options);
  print_options(stdout, common_options);
  if (c->more) printf("\n%s\n", c->more);
}

/* ---------------------------------------------------------------- parsing */

static bool usage_error(const ks_command *c, ks_args *out, const char *fmt, const char *a, const char *b) {
  char text[1024];
  snprintf(text, sizeof text, fmt, a, b);
  print_error(text);
  fprintf(stderr, "keepsake: usage: keepsake %s%s%s [options]; keepsake %s --help says more\n", c->verb,
          *c->operands ? " " : "", c->operands, c->verb);
  ks_args_free(out);
  out->exit_code = ks_status_exit_code(KS_ECONFIG);
  return false;
}

static const ks_option *find_option(const ks_command *c, const char *name, size_t n) {
  for (int table = 0; table < 2; table++)
    for (const ks_option *o = table ? common_options : c->options; o && o->name; o++)
      if (strlen(o->name) == n && strncmp(o->name, name, n) == 0) return o;
  return NULL;
}

static const char *nearest_option(const ks_command *c, const char *name) {
  const char *names[64];
  int64_t n = 0;
  for (int table = 0; table < 2; table++)
    for (const ks_option *o = table ? common_options : c->options; o && o->name && n < 64; o++)
      names[n++] = o->name;
  return ks_cli_nearest(name, names, n);
}

/* One option at argv[*i]; moves *i past its value. */
static bool parse_option(const ks_command *c, int argc, char **argv, int *i, ks_args *out) {
  const char *name = argv[*i] + 2, *equals = strchr(name, '=');
  size_t n = equals ? (size_t)(equals - name) : strlen(name);
  const ks_option *o = find_option(c, name, n);
  char shown[128];
  snprintf(shown, sizeof shown, "%.*s", (int)(n < 100 ? n : 100), name);
  if (!o) {
    const char *nearest = nearest_option(c, shown);
    return usage_error(c, out,
                       nearest ? "there is no option --%s; did you mean --%s?" : "there is no option --%s",
                       shown, nearest);
  }
  const char *value = equals ? equals + 1 : NULL;
  if (!o->arg && value) return usage_error(c, out, "--%s takes no value", shown, NULL);
  if (o->arg && !value && *i + 1 >= argc) return usage_error(c, out, "--%s wants a value: %s", shown, o->arg);
  if (o->arg && !value) value = argv[++*i];
  out->given[out->n_given].option = o;
  out->given[out->n_given++].value = value;
  if (strcmp(o->name, "set") == 0) out->sets[out->n_sets++] = value;
  return true;
}

bool ks_args_parse(const ks_command *c, int argc, char **argv, ks_args *out) {
  *out = (ks_args){0};
  size_t n = (size_t)argc + 1;
  out->operands = calloc(n, sizeof *out->operands);
  out->sets = calloc(n, sizeof *out->sets);
  out->given = calloc(n, sizeof *out->given);
  if (!out->operands || !out->sets || !out->given)
    return usage_error(c, out, "no memory for the command line", NULL, NULL);
  bool options_end = false;
  for (int i = 1; i < argc; i++) {
    if (!options_end && strcmp(argv[i], "--") == 0)
      options_end = true;
    else if (!options_end && strcmp(argv[i], "-h") == 0)
      out->given[out->n_given++].option = find_option(c, "help", 4);
    else if (!options_end && strncmp(argv[i], "--", 2) == 0) {
      if (!parse_option(c, argc, argv, &i, out)) return false;
    } else if (!options_end && argv[i][0] == '-' && argv[i][1] && !strchr("0123456789.", argv[i][1]))
      return usage_error(c, out, "there is no option %s; options are long ones", argv[i], NULL);
    else
      out->operands[out->n_operands++] = argv[i];
  }
  if (ks_args_has(out, "help")) {
    print_help(c);
    ks_args_free(out);
    out->exit_code = ks_cli_finish(KS_OK);
    return false;
  }
  if (out->n_operands < c->min_operands) return usage_error(c, out, "%s wants %s", c->verb, c->operands);
  if (c->max_operands >= 0 && out->n_operands > c->max_operands)
    return usage_error(c, out, "one operand too many: %s", out->operands[c->max_operands], NULL);
  out->quiet = ks_args_has(out, "quiet");
  out->verbose = ks_args_has(out, "verbose");
  if (out->quiet) ks_bar_forbid();
  ks_cli_log_level(out->verbose ? KS_LOG_DEBUG : out->quiet ? KS_LOG_ERROR : KS_LOG_INFO);
  return true;
}

void ks_args_free(ks_args *a) {
  int exit_code = a->exit_code;
  free(a->operands);
  free(a->sets);
  free(a->given);
  *a = (ks_args){.exit_code = exit_code};
}

static int64_t find_given(const ks_args *a, const char *option) {
  int64_t i = a->n_given - 1;
  while (i >= 0 && strcmp(a->given[i].option->name, option) != 0)
    i--;
  return i;
}

const char *ks_args_value(const ks_args *a, const char *option) {
  int64_t i = find_given(a, option);
  return i < 0 ? NULL : a->given[i].value;
}

bool ks_args_has(const ks_args *a, const char *option) {
  return find_given(a, option) >= 0;
}

ks_status ks_args_int(const ks_args *a, const char *option, int64_t low, int64_t high, int64_t *out) {
  const char *text = ks_args_value(a, option);
  if (!text) return KS_OK;
  char *end;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  if (end == text || *end || errno || v < low || v > high)
    return KS_FAIL(KS_ECONFIG, "--%s %s: wants an integer from %lld to %lld", option, text, (long long)low,
                   (long long)high);
  *out = v;
  return KS_OK;
}

ks_status ks_args_float(const ks_args *a, const char *option, double low, double high, double *out) {
  const char *text = ks_args_value(a, option);
  if (!text) return KS_OK;
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v >= low && v <= high))
    return KS_FAIL(KS_ECONFIG, "--%s %s: wants a number from %g to %g", option, text, low, high);
  *out = v;
  return KS_OK;
}
