#include "experiments/cli.h"
#include "experiments/report.h"

#include <stdio.h>

/* ---------------------------------------------------------------- show */

static const ks_option show_options[] = {
    {"csv", NULL, "comma-separated, as a reference for keepsake check"},
    {"baseline", "POLICY", "paired differences against this policy (random)"},
    {"level", "P", "confidence level (0.95)"},
    {"curve", NULL, "ROUGE-1 at every checkpoint, comma-separated; results/curve.gp draws it"},
    {"digest", NULL, "a digest of each cell's results, without times: equal for equal results"},
    {0}};
static const ks_command show_command = {
    "show", "RESULT", "print the table of a results folder, or of one cell's file", show_options, 1, 1, NULL};

static ks_status show(const ks_args *args) {
  ks_report_params params = KS_REPORT_DEFAULT;
  params.baseline = ks_args_value(args, "baseline");
  params.baseline_required = params.baseline != NULL;
  if (ks_args_has(args, "csv") + ks_args_has(args, "curve") + ks_args_has(args, "digest") > 1)
    return KS_FAIL(KS_ECONFIG, "--csv, --curve and --digest exclude each other; give one");
  KS_TRY(ks_args_float(args, "level", 0.01, 0.9999, &params.level));
  ks_report *report;
  ks_text text = {0};
  KS_TRY(ks_report_load(args->operands[0], &params, &report));
  ks_status status = KS_OK;
  if (ks_args_has(args, "digest"))
    for (int64_t i = 0; i < report->n_rows && status == KS_OK; i++)
      status = ks_text_addf(&text, "%s  %s\n", report->rows[i].digest, report->rows[i].label);
  else if (ks_args_has(args, "curve"))
    status = ks_report_curve(report, &text);
  else
    status = ks_args_has(args, "csv") ? ks_report_csv(report, &text) : ks_report_table(report, &text);
  if (status == KS_OK) fputs(text.data, stdout);
  ks_text_free(&text);
  ks_report_destroy(report);
  return status;
}

int ks_verb_show(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&show_command, argc, argv, &args)) return args.exit_code;
  ks_status status = show(&args);
  ks_args_free(&args);
  return ks_cli_finish(status);
}

/* ---------------------------------------------------------------- check */

static const ks_option check_options[] = {
    {"tolerance", "T", "loss: relative; ROUGE-1: beyond the reference's interval (0.02)"}, {0}};
static const ks_command check_command = {
    "check",
    "RESULT REFERENCE.csv",
    "compare results with a reference: exit code 0 as good, 1 different",
    check_options,
    2,
    2,
    "Equal digests: the same bits. On another type of machine bits may differ: then counts must be equal, "
    "the loss within T of\n"
    "the reference, and ROUGE-1 inside its confidence interval widened by T."};

static ks_status check(const ks_args *args) {
  ks_report_params params = KS_REPORT_DEFAULT;
  double tolerance = 0.02;
  ks_report *report;
  ks_text text = {0};
  KS_TRY(ks_args_float(args, "tolerance", 0, 1, &tolerance));
  KS_TRY(ks_report_load(args->operands[0], &params, &report));
  ks_status status = ks_report_check(report, args->operands[1], tolerance, &text);
  if (text.data) fputs(text.data, stdout);
  ks_text_free(&text);
  ks_report_destroy(report);
  return status;
}

int ks_verb_check(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&check_command, argc, argv, &args)) return args.exit_code;
  ks_status status = check(&args);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
