#include "experiments/report.h"

#include "core/select/select.h"
#include "experiments/config_internal.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>

/* ---------------------------------------------------------------- one cell's file */

typedef struct {
  char *path, *name, *policy, *settings;
  int64_t seed;
  bool complete;
  ks_row_checkpoint last; /* zero when there is none yet */
  double *rouge1;
  int64_t *questions; /* [n_values] */
  int64_t n_values;
  double loss_sum;
  int64_t loss_tokens;
  double seconds[KS_N_STAGES];
  char digest[65];
  ks_row_checkpoint *checkpoints; /* [n_checkpoints] */
  int64_t n_checkpoints;
} cell_result;

static void cell_result_free(cell_result *c) {
  free(c->path);
  free(c->name);
  free(c->policy);
  free(c->settings);
  free(c->rouge1);
  ks_rows_free(KS_TABLE_checkpoint, c->checkpoints, c->n_checkpoints);
  free(c->questions);
}

/* The configuration without its line "seed = N;". */
static ks_status without_seed(const char *config, char **out) {
  ks_text t = {0};
  ks_status status = KS_OK;
  for (const char *line = config; *line && status == KS_OK;) {
    size_t n = strcspn(line, "\n");
    if (strncmp(line, "seed ", 5) != 0 && strncmp(line, "seed=", 5) != 0)
      status = ks_text_add(&t, line, n + (line[n] != 0));
    line += n + (line[n] != 0);
  }
  if (status == KS_OK) status = ks_text_add(&t, "", 0);
  if (status != KS_OK) ks_text_free(&t);
  *out = t.data;
  return status;
}

static ks_status read_facts(cell_result *c) {
  ks_record_info info = {0};
  KS_TRY(ks_record_read_info(c->path, &info));
  const char *name = ks_record_info_meta(&info, "cell"), *policy = ks_record_info_meta(&info, "policy"),
             *seed = ks_record_info_meta(&info, "seed");
  ks_status status;
  if (!name || !policy || !seed) {
    status = KS_FAIL(KS_EDATA, "%s: lacks the cell's name, policy or seed; run the cell again", c->path);
    goto out;
  }
  c->seed = strtoll(seed, NULL, 10);
  c->complete = info.status == KS_RUN_COMPLETE;
  KS_TRY_OUT(ks_strdup(name, &c->name));
  KS_TRY_OUT(ks_strdup(policy, &c->policy));
  KS_TRY_OUT(without_seed(info.config_text, &c->settings));
out:
  ks_record_info_free(&info);
  return status;
}

static ks_status read_answers(cell_result *c) {
  ks_row_answer *rows;
  int64_t n, last = -1;
  KS_TRY(ks_record_read_rows(c->path, KS_TABLE_answer, (void **)&rows, &n));
  for (int64_t i = 0; i < n; i++)
    last = ks_max_i64(last, rows[i].window);
  ks_status status = ks_alloc_array(&c->rouge1, (size_t)n, sizeof *c->rouge1, "answers");
  if (status == KS_OK) status = ks_alloc_array(&c->questions, (size_t)n, sizeof *c->questions, "answers");
  for (int64_t i = 0; i < n && status == KS_OK; i++) {
    if (rows[i].window != last) continue;
    c->questions[c->n_values] = rows[i].set_id;
    c->rouge1[c->n_values++] = rows[i].rouge1_f1;
    c->loss_sum += rows[i].loss_sum;
    c->loss_tokens += rows[i].loss_tokens;
  }
  ks_rows_free(KS_TABLE_answer, rows, n);
  return status;
}

static ks_status read_counts(cell_result *c) {
  ks_row_time *times;
  int64_t n;
  KS_TRY(ks_record_read_rows(c->path, KS_TABLE_checkpoint, (void **)&c->checkpoints, &c->n_checkpoints));
  if (c->n_checkpoints > 0) c->last = c->checkpoints[c->n_checkpoints - 1];
  KS_TRY(ks_record_read_rows(c->path, KS_TABLE_time, (void **)&times, &n));
  for (int64_t i = 0; i < n; i++) {
    const double stage[KS_N_STAGES] = {times[i].embed,      times[i].select, times[i].annotate,
                                       times[i].synthesize, times[i].train,  times[i].evaluate,
                                       times[i].record};
    for (int j = 0; j < KS_N_STAGES; j++)
      c->seconds[j] += stage[j];
  }
  ks_rows_free(KS_TABLE_time, times, n);
  return KS_OK;
}

static ks_status read_cell(cell_result *c) {
  KS_TRY(read_facts(c));
  KS_TRY(read_answers(c));
  KS_TRY(read_counts(c));
  return ks_record_digest(c->path, c->digest);
}

/* ---------------------------------------------------------------- all cells of a folder */

typedef struct {
  cell_result *cells;
  int64_t n, cap;
} cell_list;

static ks_status add_cell(cell_list *l, char *path) {
  if (l->n == l->cap) {
    int64_t cap = l->cap ? 2 * l->cap : 32;
    cell_result *grown = realloc(l->cells, (size_t)cap * sizeof *grown);
    if (!grown) {
      free(path);
      return KS_FAIL(KS_ENOMEM, "report: no memory for %lld cells", (long long)cap);
    }
    l->cells = grown;
    l->cap = cap;
  }
  cell_result *c = &l->cells[l->n++];
  memset(c, 0, sizeof *c);
  c->path = path;
  return read_cell(c);
}

/* Whether the file name (ending in .h5) is that of a cell to read. */
static bool wanted(const ks_report_params *p, const char *file, size_t n) {
  if (n < 3 || strcmp(file + n - 3, ".h5") != 0) return false;
  for (int64_t i = 0; p->cells && i < p->n_cells; i++)
    if (strlen(p->cells[i]) == n - 3 && strncmp(p->cells[i], file, n - 3) == 0) return true;
  return p->cells == NULL;
}

static ks_status list_cells(const char *folder, const ks_report_params *p, cell_list *l) {
  if (ks_file_exists(folder)) {
    char *path;
    KS_TRY(ks_strdup(folder, &path));
    return add_cell(l, path);
  }
  char *cells = NULL;
  KS_TRY(ks_path_join(folder, "cells", &cells));
  DIR *dir = opendir(cells);
  ks_status status = KS_OK;
  for (struct dirent *e; dir && status == KS_OK && (e = readdir(dir)) != NULL;) {
    char *path;
    if (!wanted(p, e->d_name, strlen(e->d_name))) continue;
    status = ks_path_join(cells, e->d_name, &path);
    if (status == KS_OK) status = add_cell(l, path);
  }
  if (dir) closedir(dir);
  free(cells);
  if (status == KS_OK && l->n == 0)
    status = KS_FAIL(KS_EDATA, "%s: holds no results (cells/*.h5); name the folder that keepsake run wrote",
                     folder);
  return status;
}

/* Floor first, ceiling last, the policies in the order of their table between, then by name and seed. */
static int policy_rank(const char *policy) {
  if (strcmp(policy, "none") == 0) return -1;
  if (strcmp(policy, "all") == 0) return 1000;
  int i = 0;
  while (ks_policies[i] && strcmp(ks_policies[i]->name, policy) != 0)
    i++;
  return i;
}

static int compare_cells(const void *a, const void *b) {
  const cell_result *x = a, *y = b;
  int rank = policy_rank(x->policy) - policy_rank(y->policy);
  if (rank == 0) rank = strcmp(x->policy, y->policy);
  if (rank == 0) rank = strcmp(x->settings, y->settings);
  if (rank == 0) rank = (x->seed > y->seed) - (x->seed < y->seed);
  return rank ? rank : strcmp(x->name, y->name);
}

/* ---------------------------------------------------------------- groups */

/* "sdss-s1-b64" without "-s1" for seed 1. */
static ks_status label_of(const cell_result *c, char **out) {
  char mark[32];
  snprintf(mark, sizeof mark, "-s%lld", (long long)c->seed);
  size_t n = strlen(mark);
  ks_text t = {0};
  const char *at = strstr(c->name, mark);
  while (at && at[n] != 0 && at[n] != '-')
    at = strstr(at + 1, mark);
  ks_status status =
      at ? ks_text_addf(&t, "%.*s%s", (int)(at - c->name), c->name, at + n) : ks_text_add_str(&t, c->name);
  if (status != KS_OK) ks_text_free(&t);
  *out = t.data;
  return status;
}

static bool same_questions(const int64_t *a, const int64_t *b, int64_t n) {
  return n == 0 || memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

static ks_status make_curve(const cell_result *cells, int64_t n, ks_report_row *r) {
  r->n_curve = cells[0].n_checkpoints;
  for (int64_t i = 1; i < n; i++)
    r->n_curve = ks_min_i64(r->n_curve, cells[i].n_checkpoints);
  KS_TRY(ks_alloc_array(&r->curve, (size_t)r->n_curve, sizeof *r->curve, "report"));
  for (int64_t w = 0; w < r->n_curve; w++) {
    r->curve[w].arrivals = cells[0].checkpoints[w].arrivals;
    r->curve[w].low = INFINITY;
    r->curve[w].high = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
      double rouge1 = cells[i].checkpoints[w].eval_rouge1_f1;
      r->curve[w].mean += rouge1 / (double)n;
      r->curve[w].low = fmin(r->curve[w].low, rouge1);
      r->curve[w].high = fmax(r->curve[w].high, rouge1);
    }
  }
  return KS_OK;
}

static ks_status make_row(const cell_result *cells, int64_t n, ks_report_row *r) {
  KS_TRY(label_of(&cells[0], &r->label));
  KS_TRY(ks_strdup(cells[0].policy, &r->policy));
  KS_TRY(ks_strdup(cells[0].settings, &r->settings));
  r->n_cells = n;
  for (int64_t i = 0; i < n; i++)
    r->n_values += cells[i].n_values;
  KS_TRY(ks_alloc_array(&r->rouge1, (size_t)r->n_values, sizeof *r->rouge1, "report"));
  KS_TRY(ks_alloc_array(&r->questions, (size_t)r->n_values, sizeof *r->questions, "report"));
  KS_TRY(ks_alloc_array(&r->group_sizes, (size_t)n, sizeof *r->group_sizes, "report"));
  KS_TRY(ks_alloc_array(&r->seeds, (size_t)n, sizeof *r->seeds, "report"));
  double loss = 0;
  int64_t at = 0, tokens = 0;
  ks_sha256 h;
  ks_sha256_init(&h);
  r->crossed = true;
  for (int64_t i = 0; i < n; i++) {
    const cell_result *c = &cells[i];
    if (c->n_values) {
      memcpy(r->rouge1 + at, c->rouge1, (size_t)c->n_values * sizeof *r->rouge1);
      memcpy(r->questions + at, c->questions, (size_t)c->n_values * sizeof *r->questions);
    }
    r->crossed = r->crossed && c->n_values == cells[0].n_values &&
                 same_questions(c->questions, cells[0].questions, c->n_values);
    at += c->n_values;
    r->group_sizes[i] = c->n_values;
    r->seeds[i] = c->seed;
    r->n_complete += c->complete;
    loss += c->loss_sum;
    tokens += c->loss_tokens;
    r->sets_kept += (double)c->last.sets_kept / (double)n;
    r->bytes_used += (double)c->last.bytes_used / (double)n;
    r->annotations += (double)c->last.annotations_asked / (double)n;
    r->acceptance += (double)c->last.admissions / (double)ks_max_i64(c->last.arrivals, 1) / (double)n;
    for (int j = 0; j < KS_N_STAGES; j++)
      r->seconds[j] += c->seconds[j] / (double)n;
    ks_sha256_add(&h, c->digest, 64);
  }
  ks_sha256_finish(&h, r->digest);
  r->loss = tokens > 0 ? loss / (double)tokens : NAN;
  r->gap = NAN;
  return make_curve(cells, n, r);
}

/* Keys that say nothing to a policy: rows may differ there and still be comparable. */
static unsigned silent_flags(const char *policy) {
  const ks_policy *p = ks_policy_find(policy);
  return (p && !p->trains ? KS_TRAINING | KS_STORAGE | KS_WRITING : 0) | (p && p->unlimited ? KS_STORAGE : 0);
}

/* Next line of a configuration's text (ks_config_text) that counts; group follows the lines. NULL at the end.
 */
static const char *next_setting(const char *at, char group[64], unsigned silent) {
  for (; *at; at += strcspn(at, "\n"), at += *at == '\n') {
    char name[64], path[160];
    int end = 0;
    if (sscanf(at, "%63[a-z_]: {%n", name, &end) == 1 && end > 0) {
      memcpy(group, name, sizeof name);
      continue;
    }
    if (at[0] == '}') group[0] = 0;
    if (sscanf(at, "%*[ ]%63[a-z0-9_] =", name) != 1 && sscanf(at, "%63[a-z0-9_] =", name) != 1) continue;
    snprintf(path, sizeof path, "%s%s%s", group, group[0] ? "." : "", name);
    int key = ks_key_find(path);
    if (strcmp(path, "policy") != 0 && !(key >= 0 && ks_keys[key].flags & silent)) return at;
  }
  return NULL;
}

/* Whether two rows' settings are equal but for the policy and what is silent. */
static bool same_settings(const char *a, const char *b, unsigned silent) {
  char group_a[64] = "", group_b[64] = "";
  for (;;) {
    a = next_setting(a, group_a, silent);
    b = next_setting(b, group_b, silent);
    if (!a || !b) return a == b;
    size_t n = strcspn(a, "\n");
    if (strcspn(b, "\n") != n || strncmp(a, b, n) != 0 || strcmp(group_a, group_b) != 0) return false;
    a += n + (a[n] == '\n');
    b += n + (b[n] == '\n');
  }
}

/* The one row of `policy` that differs from `row` in the policy alone; NULL when there is none, or more than
 * one. */
static const ks_report_row *find_partner(const ks_report *r, const ks_report_row *row, const char *policy) {
  const ks_report_row *found = NULL;
  unsigned silent = silent_flags(policy) | silent_flags(row->policy);
  for (int64_t i = 0; i < r->n_rows; i++) {
    if (strcmp(r->rows[i].policy, policy) != 0 || !same_settings(row->settings, r->rows[i].settings, silent))
      continue;
    if (found) return NULL;
    found = &r->rows[i];
  }
  return found;
}

static bool pairs_with(const ks_report_row *a, const ks_report_row *b) {
  if (a == b || a->n_cells != b->n_cells) return false;
  for (int64_t i = 0; i < a->n_cells; i++)
    if (a->seeds[i] != b->seeds[i] || a->group_sizes[i] != b->group_sizes[i]) return false;
  return same_questions(a->questions, b->questions, a->n_values);
}

static ks_status add_interval(const ks_report_params *p, ks_report_row *row) {
  return row->crossed ? ks_bootstrap_crossed(row->rouge1, row->n_cells, row->group_sizes[0], p->level,
                                             p->n_resamples, p->seed, &row->rouge1_ci)
                      : ks_bootstrap(row->rouge1, row->group_sizes, row->n_cells, p->level, p->n_resamples,
                                     p->seed, &row->rouge1_ci);
}

static ks_status paired_interval(const ks_report_params *p, const ks_report_row *a, const ks_report_row *b,
                                 ks_interval *out) {
  return a->crossed && b->crossed
             ? ks_bootstrap_crossed_paired(a->rouge1, b->rouge1, a->n_cells, a->group_sizes[0], p->level,
                                           p->n_resamples, p->seed, out)
             : ks_bootstrap_paired(a->rouge1, b->rouge1, a->group_sizes, a->n_cells, p->level, p->n_resamples,
                                   p->seed, out);
}

static ks_status add_gap(const ks_report *r, ks_report_row *row) {
  const ks_report_row *floor = find_partner(r, row, "none"), *ceiling = find_partner(r, row, "all");
  ks_interval room;
  if (!floor || !ceiling || !pairs_with(ceiling, floor)) return KS_OK;
  KS_TRY(paired_interval(&r->params, ceiling, floor, &room));
  if (room.low > 0)
    row->gap =
        (row->rouge1_ci.mean - floor->rouge1_ci.mean) / (ceiling->rouge1_ci.mean - floor->rouge1_ci.mean);
  return KS_OK;
}

static ks_status add_statistics(ks_report *r) {
  const ks_report_params *p = &r->params;
  bool known = false;
  for (int64_t i = 0; i < r->n_rows; i++)
    KS_TRY(add_interval(p, &r->rows[i]));
  for (int64_t i = 0; i < r->n_rows; i++) {
    ks_report_row *row = &r->rows[i];
    known = known || strcmp(row->policy, p->baseline) == 0;
    /* A share of tokens lies in [0, 1]; the interval's stretching (score.h) does not know that. */
    row->rouge1_ci.low = fmax(row->rouge1_ci.low, 0);
    row->rouge1_ci.high = fmin(row->rouge1_ci.high, 1);
    KS_TRY(add_gap(r, row));
    const ks_report_row *base = find_partner(r, row, p->baseline);
    if (base && pairs_with(row, base)) KS_TRY(paired_interval(p, row, base, &row->difference));
  }
  return known || !p->baseline_required
             ? KS_OK
             : KS_FAIL(KS_ECONFIG, "--baseline %s: the results hold no such policy", p->baseline);
}

ks_status ks_report_load(const char *folder, const ks_report_params *params, ks_report **out) {
  ks_report *r = NULL;
  cell_list list = {0};
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&r, 1, sizeof *r, "report"));
  r->params = *params;
  if (!r->params.baseline) r->params.baseline = "random";
  KS_TRY_OUT(list_cells(folder, params, &list));
  qsort(list.cells, (size_t)list.n, sizeof *list.cells, compare_cells);
  KS_TRY_OUT(ks_alloc_array(&r->rows, (size_t)list.n, sizeof *r->rows, "report"));
  r->complete = true;
  for (int64_t i = 0; i < list.n;) {
    int64_t n = 1;
    while (i + n < list.n && strcmp(list.cells[i].policy, list.cells[i + n].policy) == 0 &&
           strcmp(list.cells[i].settings, list.cells[i + n].settings) == 0)
      n++;
    KS_TRY_OUT(make_row(&list.cells[i], n, &r->rows[r->n_rows++]));
    r->complete = r->complete && r->rows[r->n_rows - 1].n_complete == n;
    i += n;
  }
  if (params->cells) r->n_missing = params->n_cells - list.n;
  r->complete = r->complete && r->n_missing == 0;
  r->n_arrivals = list.cells[0].last.arrivals;
  r->n_windows = list.cells[0].last.window + 1;
  r->n_questions = list.cells[0].n_values;
  KS_TRY_OUT(add_statistics(r));
  *out = r;
  r = NULL;
out:
  for (int64_t i = 0; i < list.n; i++)
    cell_result_free(&list.cells[i]);
  free(list.cells);
  ks_report_destroy(r);
  return status;
}

void ks_report_destroy(ks_report *r) {
  if (!r) return;
  for (int64_t i = 0; i < r->n_rows; i++) {
    free(r->rows[i].label);
    free(r->rows[i].policy);
    free(r->rows[i].settings);
    free(r->rows[i].curve);
    free(r->rows[i].rouge1);
    free(r->rows[i].questions);
    free(r->rows[i].group_sizes);
    free(r->rows[i].seeds);
  }
  free(r->rows);
  free(r);
}
