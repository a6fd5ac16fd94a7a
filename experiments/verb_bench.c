#include "experiments/bench.h"
#include "experiments/cli.h"
#include "experiments/progress.h"

#include <math.h>
#include <stdio.h>

static const ks_option options[] = {
    {"shape", "NAME,...", "model shapes: 260k, 15m, 110m, 135m, 1b, 3b (15m)"},
    {"dtype", "TYPE,...", "frozen weights: f32, bf16 (f32)"},
    {"threads", "N", "CPU threads (all)"},
    {"isa", "NAME", "instruction set (auto)"},
    {"seconds", "S", "time for the samples of a case (2)"},
    {"samples", "N", "at least so many (5)"},
    {"only", "NAME", "measure only the row of this name (lora_step.15m)"},
    {"csv", "FILE", "also append the rows to FILE as comma-separated values"},
    {"list", NULL, "list the cases"},
    {0}};
static const ks_command command = {"bench",
                                   "[CASE ...]",
                                   "measure speed as shares of this machine's ceilings",
                                   options,
                                   0,
                                   -1,
                                   "Every row is checked before and after it is timed. GFLOP/s count "
                                   "necessary operations only (forward, input and adapter\n"
                                   "gradients). peak: fma loops in registers; read: reading the same working "
                                   "set; both measured beside the row."};

static const struct {
  const char *name, *what;
  ks_status (*run)(ks_bench *, const ks_bench_shape *);
} cases[] = {
#define X(name, what) {#name, what, ks_bench_##name},
    KS_BENCH_MAP(X)
#undef X
};
enum { N_CASES = sizeof cases / sizeof *cases };

/* ---------------------------------------------------------------- printing */

static void print_number(double value, int width, const char *format) {
  char text[32] = "-";
  if (isfinite(value) && value != 0) snprintf(text, sizeof text, format, value);
  printf("  %*s", width, text);
}

static void print_row(const ks_bench_row *r) {
  printf("%-26s  %-46s  %-4s  %2lld  %4lld", r->name, r->shape, r->dtype, (long long)r->threads,
         (long long)r->n);
  print_number(r->median_ms, 9, "%.4g");
  print_number(r->p20_ms, 8, "%.4g");
  print_number(r->p80_ms, 8, "%.4g");
  print_number(r->rate, 9, "%.4g");
  print_number(r->gflops, 8, "%.4g");
  print_number(100 * r->peak_share, 6, "%.1f%%");
  print_number(r->gbytes, 7, "%.3g");
  print_number(100 * r->read_share, 6, "%.1f%%");
  print_number(r->memory_mb, 7, "%.4g");
  print_number(r->ratio, 6, "%.3f");
  printf("  %-9s  %s\n", r->verdict, r->note);
  fflush(stdout);
}

static void print_head(void) {
  printf("%-26s  %-46s  %-4s  %2s  %4s  %9s  %8s  %8s  %9s  %8s  %6s  %7s  %6s  %7s  %6s  %-9s  %s\n", "case",
         "what", "type", "th", "n", "median ms", "p20", "p80", "per s", "GFLOP/s", "peak", "GB/s", "read",
         "MB", "ratio", "verdict", "note");
}

static ks_status add_csv(const char *path, const ks_bench *b, const char *device) {
  bool fresh = !ks_file_exists(path);
  FILE *f = fopen(path, "a");
  if (!f) return KS_FAIL(KS_EIO, "%s: cannot append; check the path", path);
  char when[32];
  ks_clock_utc(when);
  if (fresh) {
    fprintf(f, "time,device");
#define X(type, name, unit, what) fprintf(f, ",%s", #name);
    KS_BENCH_COLUMNS(X)
#undef X
    fprintf(f, "\n");
  }
#define WRITE_str(v) fprintf(f, ",\"%s\"", v)
#define WRITE_i64(v) fprintf(f, ",%lld", (long long)(v))
#define WRITE_f64(v) isfinite(v) ? fprintf(f, ",%.6g", v) : fprintf(f, ",")
  for (int64_t i = 0; i < b->n_rows; i++) {
    const ks_bench_row *r = &b->rows[i];
    fprintf(f, "%s,\"%s\"", when, device);
#define X(type, name, unit, what) WRITE_##type(r->name);
    KS_BENCH_COLUMNS(X)
#undef X
    fprintf(f, "\n");
  }
  bool bad = ferror(f) != 0;
  if (fclose(f) != 0 || bad) return KS_FAIL(KS_EIO, "%s: cannot write; is the disk full?", path);
  return KS_OK;
}

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

static bool chosen(const ks_args *args, const char *name) {
  for (int64_t i = 0; i < args->n_operands; i++)
    if (strcmp(args->operands[i], name) == 0) return true;
  return args->n_operands == 0;
}

static ks_status check_choice(const ks_args *args, const char *shapes, const char *dtypes) {
  const char *case_names[N_CASES], *shape_names[16], *dtype_names[] = {"f32", "bf16"};
  int64_t n_shapes = 0;
  for (int i = 0; i < N_CASES; i++)
    case_names[i] = cases[i].name;
  while (ks_bench_shapes[n_shapes].name && n_shapes < 16) {
    shape_names[n_shapes] = ks_bench_shapes[n_shapes].name;
    n_shapes++;
  }
  KS_TRY(check_list("shape", shapes, shape_names, n_shapes));
  KS_TRY(check_list("dtype", dtypes, dtype_names, 2));
  for (int64_t i = 0; i < args->n_operands; i++) {
    bool known = false;
    for (int j = 0; j < N_CASES && !known; j++)
      known = strcmp(args->operands[i], case_names[j]) == 0;
    const char *near = known ? NULL : ks_cli_nearest(args->operands[i], case_names, N_CASES);
    if (!known)
      return KS_FAIL(KS_ECONFIG, "there is no case \"%s\"%s%s; see keepsake bench --list", args->operands[i],
                     near ? "; did you mean " : "", near ? near : "");
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- running */

static ks_status run_case(ks_bench *b, int which, const ks_bench_shape *shape) {
  int64_t before = b->n_rows;
  KS_TRY_AS(cases[which].run(b, shape), "case %s, shape %s", cases[which].name, shape->name);
  for (int64_t i = before; i < b->n_rows; i++)
    print_row(&b->rows[i]);
  return KS_OK;
}

static ks_status run_cases(const ks_args *args, ks_bench *b, const char *shapes, const char *dtypes) {
  static const ks_dtype types[] = {KS_DTYPE_F32, KS_DTYPE_BF16};
  printf("%s; %s; fma peak f32 %.0f GFLOP/s, bf16 %.0f; read 256 MB %.0f GB/s\n", ks_ctx_device_name(b->ctx),
         ks_ctx_backend_name(b->ctx), ks_bench_peak(b->ctx, KS_DTYPE_F32),
         ks_bench_peak(b->ctx, KS_DTYPE_BF16), ks_bench_read(b->ctx, 256 << 20));
  print_head();
  for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
    if (!listed(dtypes, ks_dtype_name(types[t]))) continue;
    b->dtype = types[t];
    for (int i = 0; i < N_CASES; i++)
      for (const ks_bench_shape *s = ks_bench_shapes; s->name; s++)
        if (chosen(args, cases[i].name) && listed(shapes, s->name)) KS_TRY(run_case(b, i, s));
  }
  if (b->n_rows == 0)
    return KS_FAIL(KS_ECONFIG, "nothing to measure: no chosen case has the row %s", b->only ? b->only : "");
  for (int64_t i = 0; i < b->n_rows; i++)
    if (strcmp(b->rows[i].verdict, "incorrect") == 0)
      return KS_FAIL(KS_EMISMATCH, "%s: its result was wrong, its time says nothing", b->rows[i].name);
  return KS_OK;
}

static ks_status bench(const ks_args *args) {
  const char *shapes = ks_args_value(args, "shape"), *dtypes = ks_args_value(args, "dtype"),
             *csv = ks_args_value(args, "csv");
  ks_bench b = {.seconds = 2, .min_samples = 5};
  int64_t threads = 0;
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  params.isa = ks_args_value(args, "isa");
  b.only = ks_args_value(args, "only");
  shapes = shapes ? shapes : "15m";
  dtypes = dtypes ? dtypes : "f32";
  KS_TRY(check_choice(args, shapes, dtypes));
  KS_TRY(ks_args_int(args, "threads", 1, 4096, &threads));
  KS_TRY(ks_args_float(args, "seconds", 0, 1e6, &b.seconds));
  KS_TRY(ks_args_int(args, "samples", 1, 4096, &b.min_samples));
  params.n_threads = (int)threads;
  KS_TRY(ks_ctx_create(&b.ctx, &params));
  ks_interrupt_catch();
  b.progress = ks_bar_progress(NULL);
  ks_status status = run_cases(args, &b, shapes, dtypes);
  if (csv && b.n_rows > 0 && (status == KS_OK || status == KS_EMISMATCH)) {
    ks_status written = add_csv(csv, &b, ks_ctx_device_name(b.ctx));
    if (status == KS_OK) status = written;
  }
  free(b.rows);
  ks_ctx_destroy(b.ctx);
  return status;
}

int ks_verb_bench(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_status status = KS_OK;
  if (ks_args_has(&args, "list"))
    for (int i = 0; i < N_CASES; i++)
      printf("%-12s  %s\n", cases[i].name, cases[i].what);
  else
    status = bench(&args);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
