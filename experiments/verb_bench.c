#include "experiments/bench.h"
#include "experiments/cli.h"
#include "experiments/progress.h"

#include <stdio.h>

static const ks_option options[] = {
    {"shape", "NAME,...", "model shapes: 260k, 15m, 110m, 135m, 1b, 3b (15m)"},
    {"device", "NAME", "cpu, cuda, or auto: a GPU when there is one (auto)"},
    {"dtype", "TYPE,...",
     "frozen weights: f32, bf16, q8_0, q4_0, nf4 (f32); on a GPU activations are f32 or else bf16"},
    {"variants", "OP=NAME,...", "kernels other than the default; all: operations once for each of theirs"},
    {"threads", "N", "CPU threads (all)"},
    {"isa", "NAME", "instruction set (auto)"},
    {"seconds", "S", "time for the samples of a case (2); 0: one call to warm up, no batches, no ceilings"},
    {"samples", "N", "at least so many (5; on a GPU 30)"},
    {"rows", "N", "rows of the operations' cases (sizes of real use)"},
    {"recompute-layers", "N", "lora_step: as run.recompute_layers (0)"},
    {"only", "NAME",
     "measure only the row of this name (lora_step.15m); goals: groups too, beginnings with *, several with "
     "commas"},
    {"scale", "N", "goals: divide all sizes by N, to try them anywhere (1)"},
    {"csv", "FILE", "also append the rows to FILE as comma-separated values"},
    {"jsonl", "FILE", "also append the run and its rows, with every sample, as lines of JSON"},
    {"list", NULL, "list the cases"},
    {0}};
static const ks_command command = {
    "bench",
    "[CASE ...]",
    "measure speed as shares of this machine's ceilings",
    options,
    0,
    -1,
    "Every row is checked before and after it is timed; operations against the CPU. GFLOP/s count necessary\n"
    "operations only (forward, input and adapter gradients), GB/s the bytes that must move.\n"
    "CPU: peak: fma loops in registers; read: reading the same working set; both measured beside the row.\n"
    "GPU: peak: a large product on random data; read, copy: of a large array; all measured in the run.\n"
    "Operations: median of cold samples (caches flushed); hot: of a batch; step: within a CUDA graph.\n"
    "goals alone (not among the cases without a name): what is measured against a goal, at sizes of its own, "
    "bf16."};

static const struct {
  const char *name, *what;
  ks_status (*run)(ks_bench *, const ks_bench_shape *);
} cases[] = {
#define X(name, what) {#name, what, ks_bench_##name},
    KS_BENCH_MAP(X)
#undef X
};
enum { N_CASES = sizeof cases / sizeof *cases, LEAST_ROUNDS = 5 };
static const char goals[] = "goals";

/* ---------------------------------------------------------------- choosing */

/* Whether `name` is one of the comma-separated words of list. */
static bool listed(const char *list, const char *name) {
  size_t n = strlen(name);
  for (const char *at = list; *at;) {
    size_t width = strcspn(at, ",");
    if (width == n && strncmp(at, name, n) == 0) return true;
    at += width + (at[width] == ',');
  }
  return false;
}

/* Every word of list must be one of names. */
static ks_status check_list(const char *option, const char *list, const char *const *names, int64_t n_names) {
  for (const char *at = list; *at;) {
    size_t width = strcspn(at, ",");
    bool known = false;
    for (int64_t i = 0; i < n_names && !known; i++)
      known = strlen(names[i]) == width && strncmp(names[i], at, width) == 0;
    if (!known)
      return KS_FAIL(KS_ECONFIG, "--%s %s: there is no \"%.*s\"; see keepsake bench --help", option, list,
                     (int)width, at);
    at += width + (at[width] == ',');
  }
  return *list ? KS_OK : KS_FAIL(KS_ECONFIG, "--%s: name at least one", option);
}

static bool named(const ks_args *args, const char *name) {
  for (int64_t i = 0; i < args->n_operands; i++)
    if (strcmp(args->operands[i], name) == 0) return true;
  return false;
}

static bool chosen(const ks_args *args, const char *name) {
  return args->n_operands == 0 || named(args, name);
}

static ks_status check_choice(const ks_args *args, const char *shapes, const char *dtypes) {
  const char *case_names[N_CASES + 1], *shape_names[16],
      *dtype_names[] = {"f32", "bf16", "q8_0", "q4_0", "nf4"};
  int64_t n_shapes = 0;
  for (int i = 0; i < N_CASES; i++)
    case_names[i] = cases[i].name;
  case_names[N_CASES] = goals;
  while (ks_bench_shapes[n_shapes].name && n_shapes < 16) {
    shape_names[n_shapes] = ks_bench_shapes[n_shapes].name;
    n_shapes++;
  }
  KS_TRY(check_list("shape", shapes, shape_names, n_shapes));
  KS_TRY(check_list("dtype", dtypes, dtype_names, 5));
  for (int64_t i = 0; i < args->n_operands; i++) {
    bool known = false;
    for (int j = 0; j <= N_CASES && !known; j++)
      known = strcmp(args->operands[i], case_names[j]) == 0;
    const char *near = known ? NULL : ks_cli_nearest(args->operands[i], case_names, N_CASES + 1);
    if (!known)
      return KS_FAIL(KS_ECONFIG, "there is no case \"%s\"%s%s; see keepsake bench --list", args->operands[i],
                     near ? "; did you mean " : "", near ? near : "");
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- running */

/* In a context of its own. */
static ks_status run_case(ks_bench *b, int which, const ks_bench_shape *shape) {
  const bool each = b->variants && strcmp(b->variants, "all") == 0;
  KS_TRY(ks_bench_open(b, each ? NULL : b->variants));
  ks_status status = cases[which].run(b, shape);
  ks_bench_close(b);
  KS_TRY_AS(status, "case %s, shape %s", cases[which].name, shape->name);
  ks_bench_print_rows(b);
  return KS_OK;
}

static ks_status run_cases(const ks_args *args, ks_bench *b, const char *shapes, const char *dtypes) {
  int64_t scale = 1;
  KS_TRY(ks_args_int(args, "scale", 1, 1 << 20, &scale));
  static const ks_dtype types[] = {KS_DTYPE_F32, KS_DTYPE_BF16, KS_DTYPE_Q8_0, KS_DTYPE_Q4_0, KS_DTYPE_NF4};
  b->is_first_dtype = true;
  for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
    if (!listed(dtypes, ks_dtype_name(types[t]))) continue;
    b->dtype = types[t];
    for (int i = 0; i < N_CASES; i++)
      for (const ks_bench_shape *s = ks_bench_shapes; s->name; s++)
        if (chosen(args, cases[i].name) && listed(shapes, s->name)) KS_TRY(run_case(b, i, s));
    b->is_first_dtype = false;
  }
  if (named(args, goals)) {
    if (!ks_args_has(args, "samples")) b->min_samples = b->seconds > 0 ? LEAST_ROUNDS : 1;
    KS_TRY(ks_bench_goals(b, scale));
  }
  if (b->n_rows == 0)
    return KS_FAIL(KS_ECONFIG, "nothing to measure: no chosen case has the row %s", b->only ? b->only : "");
  for (int64_t i = 0; i < b->n_rows; i++)
    if (strcmp(b->rows[i].verdict, "incorrect") == 0)
      return KS_FAIL(KS_EMISMATCH, "%s, %s: its result was wrong, its time says nothing", b->rows[i].name,
                     b->rows[i].shape);
  return KS_OK;
}

static ks_status read_settings(const ks_args *args, ks_bench *b) {
  int64_t threads = 0;
  const char *device = ks_args_value(args, "device");
  b->device = device ? device : "auto";
  b->isa = ks_args_value(args, "isa");
  b->only = ks_args_value(args, "only");
  b->variants = ks_args_value(args, "variants");
  KS_TRY(ks_args_int(args, "threads", 1, 4096, &threads));
  KS_TRY(ks_args_float(args, "seconds", 0, 1e6, &b->seconds));
  KS_TRY(ks_args_int(args, "rows", 1, 1 << 20, &b->n_rows_of_ops));
  KS_TRY(ks_args_int(args, "recompute-layers", 0, 1000000, &b->recompute_layers));
  KS_TRY(ks_args_int(args, "samples", 1, 4096, &b->min_samples));
  b->n_threads = (int)threads;
  return KS_OK;
}

/* What there is to say about the device before it is measured. */
static ks_status describe(ks_bench *b, int argc, char **argv, ks_bench_meta *meta) {
  b->dtype = KS_DTYPE_F32;
  KS_TRY(ks_bench_open(b, NULL));
  ks_status status = ks_bench_measure_rates(b);
  if (status == KS_OK) {
    if (b->min_samples == 0) b->min_samples = b->info.has_timer ? 30 : 5;
    ks_bench_describe(b, argc, argv, meta);
    ks_bench_print_head(b, meta);
  }
  ks_bench_close(b);
  return status;
}

static ks_status write_files(const ks_args *args, const ks_bench *b, const ks_bench_meta *meta) {
  const char *csv = ks_args_value(args, "csv"), *jsonl = ks_args_value(args, "jsonl");
  ks_status status = csv ? ks_bench_write_csv(csv, b, meta) : KS_OK;
  ks_status other = jsonl ? ks_bench_write_jsonl(jsonl, b, meta) : KS_OK;
  return status != KS_OK ? status : other;
}

static ks_status bench(const ks_args *args, int argc, char **argv) {
  const char *shapes = ks_args_value(args, "shape"), *dtypes = ks_args_value(args, "dtype"),
             *csv = ks_args_value(args, "csv");
  ks_bench b = {.seconds = 2};
  ks_bench_meta meta;
  shapes = shapes ? shapes : "15m";
  dtypes = dtypes ? dtypes : "f32";
  KS_TRY(check_choice(args, shapes, dtypes));
  KS_TRY(read_settings(args, &b));
  if (csv) KS_TRY(ks_bench_check_csv(csv));
  ks_interrupt_catch();
  b.progress = ks_bar_progress(NULL);
  KS_TRY(describe(&b, argc, argv, &meta));
  ks_status status = run_cases(args, &b, shapes, dtypes);
  ks_bench_print_rows(&b);
  if (b.n_rows > 0) { /* after a failure or Ctrl-C too: what was measured was measured */
    ks_status written = write_files(args, &b, &meta);
    if (status == KS_OK) status = written;
  }
  ks_bench_free(&b);
  return status;
}

int ks_verb_bench(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_status status = KS_OK;
  if (ks_args_has(&args, "list")) {
    for (int i = 0; i < N_CASES; i++)
      printf("%-12s  %s\n", cases[i].name, cases[i].what);
    ks_bench_list_goals();
  } else {
    status = bench(&args, argc, argv);
  }
  ks_args_free(&args);
  return ks_cli_finish(status);
}
