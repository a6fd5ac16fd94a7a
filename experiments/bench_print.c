/* Rows as a table, as comma-separated values and as lines of JSON. */
#include "experiments/bench.h"
#include "experiments/version.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <sys/utsname.h>

/* ---------------------------------------------------------------- what ran where */

void ks_bench_describe(const ks_bench *b, int argc, char **argv, ks_bench_meta *out) {
  struct utsname host;
  size_t used = 0;
  *out = (ks_bench_meta){.info = b->info};
  ks_clock_utc(out->time);
  if (uname(&host) == 0)
    snprintf(out->host, sizeof out->host, "%.30s %.60s %.20s", host.sysname, host.release, host.machine);
  snprintf(out->device, sizeof out->device, "%s", ks_ctx_device_name(b->ctx));
  snprintf(out->backend, sizeof out->backend, "%s", b->info.is_shim ? "shim" : ks_ctx_backend_name(b->ctx));
  snprintf(out->commit, sizeof out->commit, "%s", KS_COMMIT);
  snprintf(out->build, sizeof out->build, "%s", KS_BUILD);
  snprintf(out->version, sizeof out->version, "%s", KS_VERSION);
  for (int i = 0; i < argc && used < sizeof out->arguments - 1; i++)
    used +=
        (size_t)snprintf(out->arguments + used, sizeof out->arguments - used, "%s%s", i ? " " : "", argv[i]);
  ks_meter_read_clocks(b->meter, &out->clocks);
}

static void print_known(const char *what, double value, const char *unit) {
  if (isfinite(value) && value > 0) printf(", %s %.0f%s", what, value, unit);
}

void ks_bench_print_rates(const ks_bench *b) {
  if (!b->has_rates) return;
  const ks_bench_rates *r = &b->rates;
  printf("# measured ceilings: copy %.0f GB/s, read %.0f GB/s", r->copy, r->read);
  print_known("product f32", r->matrix_f32, " GFLOP/s");
  print_known("bf16", r->matrix_bf16, " GFLOP/s");
  printf("\n");
}

/* X(head, width, how it is printed, column); negative width: to the left */
#define TABLE(X)                                                                                             \
  X("case", -27, str, name)                                                                                  \
  X("what", -46, str, shape)                                                                                 \
  X("type", -4, str, dtype)                                                                                  \
  X("acts", -4, str, acts)                                                                                   \
  X("th", 2, i64, threads)                                                                                   \
  X("n", 4, i64, n)                                                                                          \
  X("median ms", 9, f64, median_ms)                                                                          \
  X("p25", 8, f64, p25_ms)                                                                                   \
  X("p75", 8, f64, p75_ms)                                                                                   \
  X("hot ms", 8, f64, hot_ms)                                                                                \
  X("step ms", 8, f64, step_ms)                                                                              \
  X("per s", 9, f64, rate)                                                                                   \
  X("GFLOP/s", 9, f64, gflops)                                                                               \
  X("peak", 6, pct, peak_share)                                                                              \
  X("GB/s", 7, f64, gbytes)                                                                                  \
  X("read", 6, pct, read_share)                                                                              \
  X("copy", 6, pct, copy_share)                                                                              \
  X("MB", 7, f64, memory_mb)                                                                                 \
  X("idle", 5, pct, idle_share)                                                                              \
  X("ratio", 6, f64, ratio)                                                                                  \
  X("ended", -7, str, ended)                                                                                 \
  X("verdict", -11, str, verdict)

static void print_str(const char *head, int width, const char *value) {
  (void)head;
  printf("%*s  ", width, value);
}
static void print_i64(const char *head, int width, int64_t value) {
  (void)head;
  printf("%*lld  ", width, (long long)value);
}
static void print_number(int width, double value, const char *format) {
  char text[32] = "-";
  if (isfinite(value) && value != 0) snprintf(text, sizeof text, format, value);
  printf("%*s  ", width, text);
}
static void print_f64(const char *head, int width, double value) {
  (void)head;
  print_number(width, value, "%.4g");
}
static void print_pct(const char *head, int width, double value) {
  (void)head;
  print_number(width, 100 * value, "%.1f%%");
}

void ks_bench_print_head(const ks_bench *b, const ks_bench_meta *meta) {
  const ks_meter_clocks *c = &meta->clocks;
  printf("# %s; keepsake %s (%s, %s); %s\n", meta->time, meta->version, meta->commit, meta->build,
         meta->arguments);
  if (b->info.has_timer) {
    printf("# %s, %s; driver %s, runtime %s", meta->device, meta->backend, meta->info.driver,
           meta->info.runtime);
    print_known("SM clock", c->sm_mhz, " MHz");
    print_known("of", c->sm_max_mhz, " MHz");
    print_known("memory", c->memory_mhz, " MHz");
    print_known("power limit", c->watts_limit, " W");
    printf("\n");
    if (b->info.is_shim) printf("# kernels run as host code here: times mean nothing, shares are left out\n");
    ks_bench_print_rates(b);
  } else {
    printf("%s; %s; fma peak f32 %.0f GFLOP/s, bf16 %.0f; read 256 MB %.0f GB/s\n", meta->device,
           meta->backend, ks_bench_peak(b->ctx, KS_DTYPE_F32), ks_bench_peak(b->ctx, KS_DTYPE_BF16),
           ks_bench_read(b->ctx, 256 << 20));
  }
#define X(head, width, type, field) printf("%*s  ", width, head);
  TABLE(X)
#undef X
  printf("note\n");
}

static void print_row(const ks_bench_row *r) {
#define X(head, width, type, field) print_##type(head, width, r->field);
  TABLE(X)
#undef X
  printf("%s%s%s\n", r->variant, r->variant[0] && r->note[0] ? "; " : "", r->note);
  fflush(stdout);
}

void ks_bench_print_rows(ks_bench *b) {
  for (; b->n_printed < b->n_rows; b->n_printed++)
    print_row(&b->rows[b->n_printed]);
}

/* ---------------------------------------------------------------- comma-separated values */

static const char csv_head[] = "time,device"
#define X(type, name, unit, what) "," #name
    KS_BENCH_COLUMNS(X)
#undef X
    ;

ks_status ks_bench_check_csv(const char *path) {
  char head[sizeof csv_head + 1] = "";
  if (!ks_file_exists(path)) return KS_OK;
  FILE *f = fopen(path, "r");
  if (!f) return KS_FAIL(KS_EIO, "%s: cannot read; check the path", path);
  const bool any = fgets(head, (int)sizeof head, f) != NULL;
  fclose(f);
  head[strcspn(head, "\n")] = 0;
  if (any && strcmp(head, csv_head) != 0)
    return KS_FAIL(KS_ECONFIG, "%s: its columns are not those of this version; name a new file", path);
  return KS_OK;
}

static void write_str(FILE *f, const char *v) {
  fputs(",\"", f);
  for (; *v; v++)
    fprintf(f, *v == '"' ? "\"\"" : "%c", *v);
  fputc('"', f);
}
static void write_i64(FILE *f, int64_t v) {
  fprintf(f, ",%lld", (long long)v);
}
static void write_f64(FILE *f, double v) {
  if (isfinite(v))
    fprintf(f, ",%.6g", v);
  else
    fputc(',', f);
}
static void write_pct(FILE *f, double v) {
  write_f64(f, v);
}

ks_status ks_bench_write_csv(const char *path, const ks_bench *b, const ks_bench_meta *meta) {
  KS_TRY(ks_bench_check_csv(path));
  bool fresh = !ks_file_exists(path);
  FILE *f = fopen(path, "a");
  if (!f) return KS_FAIL(KS_EIO, "%s: cannot append; check the path", path);
  if (fresh) fprintf(f, "%s\n", csv_head);
  for (int64_t i = 0; i < b->n_rows; i++) {
    const ks_bench_row *r = &b->rows[i];
    fputs(meta->time, f);
    write_str(f, meta->device);
#define X(type, name, unit, what) write_##type(f, r->name);
    KS_BENCH_COLUMNS(X)
#undef X
    fputc('\n', f);
  }
  bool bad = ferror(f) != 0;
  if (fclose(f) != 0 || bad) return KS_FAIL(KS_EIO, "%s: cannot write; is the disk full?", path);
  return KS_OK;
}

/* ---------------------------------------------------------------- lines of JSON */

static json_t *number_or_null(double v) {
  return isfinite(v) ? json_real(v) : json_null();
}
#define JSON_str(v) json_string(v)
#define JSON_i64(v) json_integer(v)
#define JSON_f64(v) number_or_null(v)
#define JSON_pct(v) number_or_null(v)

static json_t *run_line(const ks_bench *b, const ks_bench_meta *m) {
  const ks_meter_clocks *c = &m->clocks;
  return json_pack(
      "{s:{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}}", "run",
      "time", m->time, "device", m->device, "backend", m->backend, "driver", m->info.driver, "runtime",
      m->info.runtime, "host", m->host, "version", m->version, "commit", m->commit, "build", m->build,
      "arguments", m->arguments, "sm_mhz", number_or_null(c->sm_mhz), "sm_max_mhz",
      number_or_null(c->sm_max_mhz), "memory_mhz", number_or_null(c->memory_mhz), "watts_limit",
      number_or_null(c->watts_limit), "copy_gbytes", number_or_null(b->rates.copy), "read_gbytes",
      number_or_null(b->rates.read), "matrix_f32_gflops", number_or_null(b->rates.matrix_f32),
      "matrix_bf16_gflops", number_or_null(b->rates.matrix_bf16));
}

/* {"op": ..., key: number or word} of "key=value key=value". */
static json_t *case_object(const ks_bench_row *r) {
  json_t *o = json_object();
  json_object_set_new(o, "op", json_string(r->op));
  for (const char *at = r->parameters; *at;) {
    const size_t n = strcspn(at, " "), n_key = strcspn(at, "=");
    char key[32], value[64], *end = value;
    snprintf(key, sizeof key, "%.*s", (int)n_key, at);
    snprintf(value, sizeof value, "%.*s", (int)(n - n_key - 1), at + n_key + 1);
    const long long number = strtoll(value, &end, 10);
    json_object_set_new(o, key, *end || end == value ? json_string(value) : json_integer(number));
    at += n + (at[n] == ' ');
  }
  return o;
}

static json_t *row_line(const ks_bench_row *r, const ks_bench_meta *meta) {
  json_t *line = json_object(), *samples = json_array();
  json_object_set_new(line, "time", json_string(meta->time));
#define X(type, name, unit, what) json_object_set_new(line, #name, JSON_##type(r->name));
  KS_BENCH_COLUMNS(X)
#undef X
  if (r->op) json_object_set_new(line, "case", case_object(r));
  for (int64_t i = 0; r->samples && i < r->n; i++)
    json_array_append_new(samples, json_real(r->samples[i]));
  json_object_set_new(line, "samples_ms", samples);
  return line;
}

static ks_status write_line(FILE *f, const char *path, json_t *line) {
  const bool bad =
      !line || json_dumpf(line, f, JSON_COMPACT | JSON_REAL_PRECISION(8)) != 0 || fputc('\n', f) == EOF;
  json_decref(line);
  return bad ? KS_FAIL(KS_EIO, "%s: cannot write; is the disk full?", path) : KS_OK;
}

ks_status ks_bench_write_jsonl(const char *path, const ks_bench *b, const ks_bench_meta *meta) {
  FILE *f = fopen(path, "a");
  if (!f) return KS_FAIL(KS_EIO, "%s: cannot append; check the path", path);
  ks_status status = write_line(f, path, run_line(b, meta));
  for (int64_t i = 0; i < b->n_rows && status == KS_OK; i++)
    status = write_line(f, path, row_line(&b->rows[i], meta));
  if (fclose(f) != 0 && status == KS_OK)
    status = KS_FAIL(KS_EIO, "%s: cannot write; is the disk full?", path);
  return status;
}
