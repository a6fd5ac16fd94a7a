/* Tables from results folders: a row for each group of cells that differ in the seed alone. */
#ifndef KS_REPORT_H
#define KS_REPORT_H

#include "core/record/record.h"
#include "core/score/score.h"

typedef struct {
  const char *baseline;     /* policy that paired differences are taken against; NULL: "random" */
  bool baseline_required;   /* KS_ECONFIG when no row has that policy */
  const char *const *cells; /* names of the cells to read; NULL: every cell in the folder */
  int64_t n_cells;
  double level; /* of intervals */
  int64_t n_resamples;
  uint64_t seed;
} ks_report_params;
#define KS_REPORT_DEFAULT                                                                                    \
  ((ks_report_params){.baseline = NULL,                                                                      \
                      .baseline_required = false,                                                            \
                      .cells = NULL,                                                                         \
                      .n_cells = 0,                                                                          \
                      .level = 0.95,                                                                         \
                      .n_resamples = 2000,                                                                   \
                      .seed = 1})

enum { KS_N_STAGES = 7 }; /* embed, select, annotate, synthesize, train, evaluate, record */

typedef struct {
  char *label; /* the cells' name without the seed */
  char *policy;
  char *settings; /* configuration text without the seed: what makes the group */
  int64_t n_cells, n_complete;
  double *rouge1; /* ROUGE-1 F1 of every answer at the last checkpoint, cell by cell in the order of seeds */
  int64_t *group_sizes; /* [n_cells] answers of each cell */
  int64_t *seeds;       /* [n_cells] */
  int64_t *questions;   /* [n_values] the sets that were answered */
  int64_t n_values;
  bool crossed;           /* all cells answer the same questions in the same order */
  ks_interval rouge1_ci;  /* over seeds and questions */
  ks_interval difference; /* paired with the baseline of the same settings, seeds, questions; n = 0: none */
  double gap;  /* (ROUGE-1 - floor) / (ceiling - floor), of the same settings; NaN without both, or when the
                  ceiling is not surely above the floor */
  double loss; /* per token of the preferred responses */
  double sets_kept, bytes_used, annotations,
      acceptance;              /* means over cells; acceptance: admissions / arrivals */
  double seconds[KS_N_STAGES]; /* sum over checkpoints, mean over cells */
  char digest[65];             /* of the cells' digests */
  struct {
    int64_t arrivals;
    double mean, low, high; /* ROUGE-1 over the cells: mean, least, most; NaN where not evaluated */
  } * curve;                /* [n_curve] checkpoints that all cells have */
  int64_t n_curve;
} ks_report_row;

typedef struct {
  ks_report_params params;
  ks_report_row *rows; /* [n_rows]: floor first, ceiling last */
  int64_t n_rows;
  int64_t n_arrivals, n_windows, n_questions; /* of the first cell */
  int64_t n_missing;                          /* cells asked for that have no file yet */
  bool complete;                              /* every cell, none missing */
} ks_report;

/* folder: a results folder (its cells/ are read), or one cell's file. KS_EDATA when there is nothing in it.
 */
ks_status ks_report_load(const char *folder, const ks_report_params *params, ks_report **out);
void ks_report_destroy(ks_report *r);

/* The table that `run` and `show` print, with a line on floor and ceiling. */
ks_status ks_report_table(const ks_report *r, ks_text *out);
/* One line a row: machine-readable, columns as in results/README.md; everything but seconds is reproducible.
 */
ks_status ks_report_csv(const ks_report *r, ks_text *out);
/* The learning curves: a line each row and checkpoint: label,arrivals,rouge1,least,most. results/curve.gp
 * draws them. */
ks_status ks_report_curve(const ks_report *r, ks_text *out);
/* Compares with a reference in that form. Equal digests: the same bits. Else counts must be equal, the loss
 * within `tolerance` (relative) and the mean ROUGE-1 within the reference's interval widened by `tolerance`.
 * What differs goes to out, a line each; KS_EMISMATCH then. A row that is missing on either side differs. */
ks_status ks_report_check(const ks_report *r, const char *csv_path, double tolerance, ks_text *out);

#endif
