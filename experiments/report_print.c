#include "experiments/report.h"

#include <math.h>
#include <stdio.h>

static const char *const stage_names[KS_N_STAGES] = {"embed", "select", "annot", "synth",
                                                     "train", "eval",   "record"};

/* ---------------------------------------------------------------- table */

enum { N_RESULTS = 9, MOST_COLUMNS = 9, CELL_BYTES = 64 };
typedef char table_cell[CELL_BYTES];

static void results_head(const ks_report *r, table_cell *cells) {
  static const char *const names[N_RESULTS] = {"policy", "",      "",      "gap",   "loss",
                                               "kept",   "bytes", "asked", "accept"};
  for (int i = 0; i < N_RESULTS; i++)
    snprintf(cells[i], CELL_BYTES, "%s", names[i]);
  snprintf(cells[1], CELL_BYTES, "ROUGE-1 [%g%% CI]", 100 * r->params.level);
  snprintf(cells[2], CELL_BYTES, "vs %.40s", r->params.baseline);
}

static void results_row(const ks_report_row *r, table_cell *cells) {
  snprintf(cells[0], CELL_BYTES, "%s", r->label);
  snprintf(cells[1], CELL_BYTES, "%.4f [%.4f, %.4f]", r->rouge1_ci.mean, r->rouge1_ci.low, r->rouge1_ci.high);
  snprintf(cells[2], CELL_BYTES, "-");
  if (r->difference.n > 0)
    snprintf(cells[2], CELL_BYTES, "%+.4f [%+.4f, %+.4f]", r->difference.mean, r->difference.low,
             r->difference.high);
  snprintf(cells[3], CELL_BYTES, "-");
  if (isfinite(r->gap)) snprintf(cells[3], CELL_BYTES, "%.0f%%", 100 * r->gap + 0.0);
  snprintf(cells[4], CELL_BYTES, "%.4f", r->loss);
  snprintf(cells[5], CELL_BYTES, "%.0f", r->sets_kept);
  snprintf(cells[6], CELL_BYTES, "%.0f", r->bytes_used);
  snprintf(cells[7], CELL_BYTES, "%.0f", r->annotations);
  snprintf(cells[8], CELL_BYTES, "%.1f%%", 100 * r->acceptance);
}

static void seconds_head(const ks_report *r, table_cell *cells) {
  (void)r;
  snprintf(cells[0], CELL_BYTES, "seconds");
  for (int i = 0; i < KS_N_STAGES; i++)
    snprintf(cells[1 + i], CELL_BYTES, "%s", stage_names[i]);
}

static void seconds_row(const ks_report_row *r, table_cell *cells) {
  snprintf(cells[0], CELL_BYTES, "%s", r->label);
  for (int i = 0; i < KS_N_STAGES; i++)
    snprintf(cells[1 + i], CELL_BYTES, r->seconds[i] < 0.0995 ? "%.3f" : "%.1f", r->seconds[i]);
}

/* Columns as wide as their widest cell. */
static ks_status add_table(const ks_report *r, int n_columns, void (*head)(const ks_report *, table_cell *),
                           void (*row)(const ks_report_row *, table_cell *), ks_text *out) {
  table_cell *cells;
  int widths[MOST_COLUMNS] = {0};
  int64_t n_lines = r->n_rows + 1;
  KS_TRY(ks_alloc_array(&cells, (size_t)(n_lines * n_columns), sizeof *cells, "table"));
  head(r, cells);
  for (int64_t i = 0; i < r->n_rows; i++)
    row(&r->rows[i], cells + (i + 1) * n_columns);
  for (int64_t i = 0; i < n_lines * n_columns; i++) {
    int n = (int)strlen(cells[i]);
    if (n > widths[i % n_columns]) widths[i % n_columns] = n;
  }
  ks_status status = KS_OK;
  for (int64_t i = 0; i < n_lines * n_columns && status == KS_OK; i++) {
    int64_t column = i % n_columns;
    status = ks_text_addf(out, column == 0 ? "%-*s" : "  %*s", widths[column], cells[i]);
    if (status == KS_OK && column == n_columns - 1) status = ks_text_add_str(out, "\n");
  }
  free(cells);
  return status;
}

/* What the intervals are of. */
static const char *interval_note(const ks_report *r) {
  int64_t n_seeds = 1, n_crossed = 0;
  for (int64_t i = 0; i < r->n_rows; i++) {
    n_seeds = ks_max_i64(n_seeds, r->rows[i].n_cells);
    n_crossed += r->rows[i].crossed;
  }
  if (n_seeds == 1) return "questions alone: one seed says nothing about others";
  if (n_crossed == r->n_rows) return "seeds and questions, crossed; narrow when few seeds (3) differ much";
  if (n_crossed == 0)
    return "seeds, then each seed's own questions (nested); narrow when few seeds (3) differ much";
  return "seeds and questions: crossed where a row's seeds share the questions, else nested; narrow when few "
         "seeds (3) differ much";
}

ks_status ks_report_table(const ks_report *r, ks_text *out) {
  int64_t n_cells = r->n_missing, n_complete = 0;
  for (int64_t i = 0; i < r->n_rows; i++) {
    n_cells += r->rows[i].n_cells;
    n_complete += r->rows[i].n_complete;
  }
  KS_TRY(add_table(r, N_RESULTS, results_head, results_row, out));
  KS_TRY(ks_text_add_str(out, "\n"));
  KS_TRY(add_table(r, 1 + KS_N_STAGES, seconds_head, seconds_row, out));
  KS_TRY(ks_text_addf(out,
                      "\n%lld of %lld cells complete; %lld arrivals in %lld windows, %lld held-out "
                      "questions, %lld seed(s) a row\n",
                      (long long)n_complete, (long long)n_cells, (long long)r->n_arrivals,
                      (long long)r->n_windows, (long long)r->n_questions, (long long)r->rows[0].n_cells));
  return ks_text_addf(
      out,
      "floor: none (never fine-tuned)   ceiling: all (keeps everything, annotated on everything: no budget "
      "holds)\n"
      "gap: share of the way from floor to ceiling (- where that is not surely open)   vs %s: paired "
      "difference, same seeds and questions\n"
      "CI: bootstrap over %s\n"
      "loss: nats per token of the preferred responses   seconds: mean of a cell, its share of the cohort's "
      "passes\n",
      r->params.baseline, interval_note(r));
}

/* ---------------------------------------------------------------- csv */

/* X(column, value): the reproducible ones; compared exactly (counts), by tolerance (loss), by interval
 * (rouge1). */
#define CSV_NUMBERS(X)                                                                                       \
  X("cells", (double)r->n_cells)                                                                             \
  X("rouge1", r->rouge1_ci.mean)                                                                             \
  X("rouge1_low", r->rouge1_ci.low)                                                                          \
  X("rouge1_high", r->rouge1_ci.high)                                                                        \
  X("loss", r->loss)                                                                                         \
  X("sets_kept", r->sets_kept)                                                                               \
  X("bytes_used", r->bytes_used)                                                                             \
  X("annotations", r->annotations)                                                                           \
  X("acceptance", r->acceptance)

enum {
  CSV_CELLS = 0,
  CSV_ROUGE1,
  CSV_LOW,
  CSV_HIGH,
  CSV_LOSS,
  CSV_KEPT,
  CSV_BYTES,
  CSV_ASKED,
  CSV_ACCEPTANCE,
  N_NUMBERS
};
static const char *const number_names[N_NUMBERS] = {
#define X(column, value) column,
    CSV_NUMBERS(X)
#undef X
};

static void row_numbers(const ks_report_row *r, double *out) {
  int i = 0;
#define X(column, value) out[i++] = value;
  CSV_NUMBERS(X)
#undef X
}

/* An empty field: not known. */
static ks_status add_number(ks_text *out, double value) {
  return isfinite(value) ? ks_text_addf(out, ",%.9g", value) : ks_text_add_str(out, ",");
}

ks_status ks_report_csv(const ks_report *report, ks_text *out) {
  KS_TRY(ks_text_add_str(out, "label"));
  for (int i = 0; i < N_NUMBERS; i++)
    KS_TRY(ks_text_addf(out, ",%s", number_names[i]));
  KS_TRY(ks_text_add_str(out, ",digest"));
  for (int i = 0; i < KS_N_STAGES; i++)
    KS_TRY(ks_text_addf(out, ",%s_seconds", stage_names[i]));
  KS_TRY(ks_text_add_str(out, "\n"));
  for (int64_t i = 0; i < report->n_rows; i++) {
    const ks_report_row *r = &report->rows[i];
    double numbers[N_NUMBERS];
    row_numbers(r, numbers);
    KS_TRY(ks_text_add_str(out, r->label));
    for (int j = 0; j < N_NUMBERS; j++)
      KS_TRY(add_number(out, numbers[j]));
    KS_TRY(ks_text_addf(out, ",%s", r->digest));
    for (int j = 0; j < KS_N_STAGES; j++)
      KS_TRY(ks_text_addf(out, ",%.4f", r->seconds[j]));
    KS_TRY(ks_text_add_str(out, "\n"));
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- curves */

ks_status ks_report_curve(const ks_report *r, ks_text *out) {
  KS_TRY(ks_text_add_str(out, "label,arrivals,rouge1,least,most\n"));
  for (int64_t i = 0; i < r->n_rows; i++)
    for (int64_t w = 0; w < r->rows[i].n_curve; w++) {
      if (isnan(r->rows[i].curve[w].mean)) continue;
      KS_TRY(ks_text_addf(out, "%s,%lld", r->rows[i].label, (long long)r->rows[i].curve[w].arrivals));
      KS_TRY(add_number(out, r->rows[i].curve[w].mean));
      KS_TRY(add_number(out, r->rows[i].curve[w].low));
      KS_TRY(add_number(out, r->rows[i].curve[w].high));
      KS_TRY(ks_text_add_str(out, "\n"));
    }
  return KS_OK;
}

/* ---------------------------------------------------------------- check */

typedef struct {
  char label[256], digest[65];
  double numbers[N_NUMBERS];
} reference_row;

/* Columns are taken in the order that ks_report_csv writes them; seconds are not read. */
static ks_status parse_line(const char *path, int64_t line, const char *text, size_t n, reference_row *out) {
  const char *end = text + n;
  for (int field = 0; field < 2 + N_NUMBERS; field++) {
    const char *comma = memchr(text, ',', (size_t)(end - text));
    size_t width = comma ? (size_t)(comma - text) : (size_t)(end - text);
    char value[256];
    if (width >= sizeof value || (!comma && field < 1 + N_NUMBERS))
      return KS_FAIL(
          KS_EDATA, "%s:%lld: field %d is cut or too long; write the reference anew with keepsake show --csv",
          path, (long long)line, field + 1);
    memcpy(value, text, width);
    value[width] = 0;
    if (field == 0) {
      snprintf(out->label, sizeof out->label, "%s", value);
    } else if (field <= N_NUMBERS) {
      char *rest;
      out->numbers[field - 1] = value[0] ? strtod(value, &rest) : NAN;
      if (value[0] && *rest)
        return KS_FAIL(KS_EDATA,
                       "%s:%lld: \"%s\" is not a number; write the reference anew with keepsake show --csv",
                       path, (long long)line, value);
    } else {
      snprintf(out->digest, sizeof out->digest, "%.64s", value);
    }
    text += width + (comma != NULL);
  }
  return KS_OK;
}

static bool near_enough(int field, double now, const double *then, double tolerance) {
  if (isnan(now) && isnan(then[field])) return true;
  if (field == CSV_LOW || field == CSV_HIGH) return true; /* judged with the mean */
  if (field == CSV_ROUGE1) return now >= then[CSV_LOW] - tolerance && now <= then[CSV_HIGH] + tolerance;
  if (field == CSV_LOSS) return fabs(now - then[field]) <= tolerance * fabs(then[field]);
  return fabs(now - then[field]) <= 1e-6 * fabs(then[field]); /* counts, as printed */
}

static ks_status check_row(const ks_report_row *r, const reference_row *ref, double tolerance, ks_text *out,
                           bool *differs) {
  double now[N_NUMBERS];
  row_numbers(r, now);
  if (strcmp(r->digest, ref->digest) == 0) return ks_text_addf(out, "same bits  %s\n", r->label);
  bool row_differs = false;
  for (int i = 0; i < N_NUMBERS; i++) {
    if (near_enough(i, now[i], ref->numbers, tolerance)) continue;
    row_differs = true;
    KS_TRY(ks_text_addf(out, "DIFFERS    %s: %s is %.9g, reference %.9g", r->label, number_names[i], now[i],
                        ref->numbers[i]));
    if (i == CSV_ROUGE1)
      KS_TRY(ks_text_addf(out, " [%.9g, %.9g]", ref->numbers[CSV_LOW], ref->numbers[CSV_HIGH]));
    KS_TRY(ks_text_add_str(out, "\n"));
  }
  *differs = *differs || row_differs;
  return row_differs ? KS_OK
                     : ks_text_addf(out, "as close   %s: ROUGE-1 %.4f, reference %.4f; other bits\n",
                                    r->label, now[CSV_ROUGE1], ref->numbers[CSV_ROUGE1]);
}

static ks_status check_text(const ks_report *r, const char *path, const char *text, double tolerance,
                            ks_text *out, bool *differs) {
  bool *seen;
  KS_TRY(ks_alloc_array(&seen, (size_t)r->n_rows, sizeof *seen, "check"));
  ks_status status = KS_OK;
  int64_t line = 0;
  for (const char *at = text; *at && status == KS_OK;) {
    size_t n = strcspn(at, "\n");
    reference_row ref;
    if (++line > 1 && n > 0) {
      KS_TRY_OUT(parse_line(path, line, at, n, &ref));
      int64_t i = 0;
      while (i < r->n_rows && strcmp(r->rows[i].label, ref.label) != 0)
        i++;
      if (i < r->n_rows) {
        seen[i] = true;
        KS_TRY_OUT(check_row(&r->rows[i], &ref, tolerance, out, differs));
      } else {
        *differs = true;
        KS_TRY_OUT(ks_text_addf(out, "MISSING    %s: in the reference, not in the results\n", ref.label));
      }
    }
    at += n + (at[n] != 0);
  }
  if (line < 2)
    status = KS_FAIL(KS_EDATA, "%s: holds no rows; write the reference anew with keepsake show --csv", path);
  for (int64_t i = 0; i < r->n_rows && status == KS_OK; i++) {
    if (seen[i]) continue;
    *differs = true;
    status = ks_text_addf(out, "MISSING    %s: in the results, not in the reference\n", r->rows[i].label);
  }
out:
  free(seen);
  return status;
}

ks_status ks_report_check(const ks_report *r, const char *csv_path, double tolerance, ks_text *out) {
  char *text;
  size_t n;
  bool differs = false;
  KS_TRY(ks_file_read(csv_path, 1 << 24, &text, &n));
  ks_status status = check_text(r, csv_path, text, tolerance, out, &differs);
  free(text);
  if (status == KS_OK && !r->complete)
    status = KS_FAIL(KS_EMISMATCH, "not every cell is complete; run the experiment to its end first");
  if (status == KS_OK && differs) status = KS_FAIL(KS_EMISMATCH, "the results differ from %s", csv_path);
  return status;
}
