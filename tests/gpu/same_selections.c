/* Whether two runs of an experiment kept the same things: `same_selections RUN_A RUN_B`, folders as `keepsake
 * run` writes them.
 *
 * Selections are decided by embeddings of the frozen model, before rounding differences of training can
 * matter, so they must be equal to the last arrival. Losses differ by rounding: the greatest relative
 * difference of the evaluated losses is printed, and judged by `keepsake check`. Exit code 0: the same; 1:
 * not; 2: cannot be read. */
#include "core/record/record.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>

static bool same_arrival(const ks_row_arrival *a, const ks_row_arrival *b) {
  return a->arrival == b->arrival && a->set_id == b->set_id && a->outcome == b->outcome &&
         a->slot == b->slot && a->victim_set_id == b->victim_set_id && a->domain == b->domain;
}

/* Number of arrivals whose outcome differs; -1: not as many of them. */
static ks_status compare_arrivals(const char *path_a, const char *path_b, int64_t *n, int64_t *n_differ) {
  void *a = NULL, *b = NULL;
  int64_t n_a = 0, n_b = 0;
  KS_TRY(ks_record_read_rows(path_a, KS_TABLE_arrival, &a, &n_a));
  ks_status status = ks_record_read_rows(path_b, KS_TABLE_arrival, &b, &n_b);
  *n = n_a;
  *n_differ = n_a == n_b ? 0 : -1;
  const ks_row_arrival *rows_a = a, *rows_b = b;
  for (int64_t i = 0; status == KS_OK && *n_differ >= 0 && i < n_a; i++)
    *n_differ += !same_arrival(&rows_a[i], &rows_b[i]);
  ks_rows_free(KS_TABLE_arrival, a, n_a);
  ks_rows_free(KS_TABLE_arrival, b, n_b);
  return status;
}

static ks_status compare_losses(const char *path_a, const char *path_b, double *worst) {
  void *a = NULL, *b = NULL;
  int64_t n_a = 0, n_b = 0;
  KS_TRY(ks_record_read_rows(path_a, KS_TABLE_checkpoint, &a, &n_a));
  ks_status status = ks_record_read_rows(path_b, KS_TABLE_checkpoint, &b, &n_b);
  const ks_row_checkpoint *rows_a = a, *rows_b = b;
  for (int64_t i = 0; status == KS_OK && i < n_a && i < n_b; i++) {
    const double relative = fabs(rows_a[i].eval_loss - rows_b[i].eval_loss) / fabs(rows_a[i].eval_loss);
    if (relative > *worst) *worst = relative;
  }
  ks_rows_free(KS_TABLE_checkpoint, a, n_a);
  ks_rows_free(KS_TABLE_checkpoint, b, n_b);
  return status;
}

static bool is_cell(const char *name) {
  const size_t n = strlen(name);
  return n > 3 && strcmp(name + n - 3, ".h5") == 0 && name[0] != '.';
}

static ks_status compare_runs(const char *run_a, const char *run_b, int64_t *n_cells, int64_t *n_bad,
                              double *worst) {
  char folder[4096], path_a[8192], path_b[8192];
  snprintf(folder, sizeof folder, "%s/cells", run_a);
  DIR *dir = opendir(folder);
  if (!dir) return KS_FAIL(KS_EIO, "%s: cannot read; is %s a folder that keepsake run wrote?", folder, run_a);
  ks_status status = KS_OK;
  for (const struct dirent *e; status == KS_OK && (e = readdir(dir));) {
    int64_t n = 0, n_differ = 0;
    if (!is_cell(e->d_name)) continue;
    snprintf(path_a, sizeof path_a, "%s/cells/%s", run_a, e->d_name);
    snprintf(path_b, sizeof path_b, "%s/cells/%s", run_b, e->d_name);
    status = compare_arrivals(path_a, path_b, &n, &n_differ);
    if (status == KS_OK) status = compare_losses(path_a, path_b, worst);
    if (status != KS_OK) break;
    ++*n_cells;
    *n_bad += n_differ != 0;
    if (n_differ != 0)
      printf("%s: %lld of %lld arrivals went another way\n", e->d_name, (long long)n_differ, (long long)n);
  }
  closedir(dir);
  return status;
}

int main(int argc, char **argv) {
  int64_t n_cells = 0, n_bad = 0;
  double worst = 0;
  if (argc != 3) {
    fprintf(stderr, "usage: same_selections RUN_A RUN_B\n");
    return 2;
  }
  if (compare_runs(argv[1], argv[2], &n_cells, &n_bad, &worst) != KS_OK) {
    fprintf(stderr, "same_selections: %s\n", ks_error_message());
    return 2;
  }
  printf("%lld cells, %lld with other selections; losses differ by at most %.3g\n", (long long)n_cells,
         (long long)n_bad, worst);
  return n_cells > 0 && n_bad == 0 ? 0 : 1;
}
