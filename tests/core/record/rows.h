/* Rows of any table, made from a counter: row i of table t is always the same. */
#ifndef KS_TEST_RECORD_ROWS_H
#define KS_TEST_RECORD_ROWS_H

#include "core/record/h5.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

static const char *const odd_texts[] = {"",
                                        "plain",
                                        "two\nlines\tand a tab",
                                        "\xc3\xa9t\xc3\xa9 \xe2\x84\xaa \xc4\xb0",
                                        "\xe6\xbc\xa2\xe5\xad\x97",
                                        "\xf0\x9f\x90\xb6\xe2\x80\x8d",
                                        "quote \" backslash \\ slash /",
                                        " leading and trailing ",
                                        "a longer text that does not fit into one small heap block, and goes "
                                        "on, and on, and on, and on, until it ends"};
enum { N_ODD_TEXTS = sizeof odd_texts / sizeof odd_texts[0] };

static inline double odd_number(ks_rng *r) {
  static const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, 5e-324, 1.7976931348623157e308};
  uint64_t i = ks_rng_below(r, 40);
  return i < 6 ? odd[i] : i == 6 ? (double)NAN : ks_rng_normal(r);
}

static inline void fill_row(const ks_table_schema *s, ks_table t, int64_t i, char *row) {
  ks_rng r = ks_rng_make(17, KS_RNG_TEST, ((uint64_t)t << 40) + (uint64_t)i);
  for (int c = 0; c < s->n_columns; c++) {
    void *at = row + s->columns[c].offset;
    switch (s->columns[c].type) {
    case KS_COL_i64:
      *(int64_t *)at = (int64_t)ks_rng_u64(&r);
      break;
    case KS_COL_i32:
      *(int32_t *)at = (int32_t)ks_rng_u64(&r);
      break;
    case KS_COL_f64:
      *(double *)at = odd_number(&r);
      break;
    case KS_COL_str:
      cr_assert(ks_strdup(odd_texts[ks_rng_below(&r, N_ODD_TEXTS)], (char **)at) == KS_OK);
      break;
    }
  }
}

/* Rows first .. first + n - 1; free with ks_rows_free. */
static inline void *make_rows(ks_table t, int64_t first, int64_t n) {
  const ks_table_schema *s = ks_table_schema_of(t);
  char *rows = NULL;
  cr_assert(ks_alloc_array(&rows, (size_t)n, s->row_bytes, "rows") == KS_OK);
  for (int64_t i = 0; i < n; i++)
    fill_row(s, t, first + i, rows + (size_t)i * s->row_bytes);
  return rows;
}

/* Number of cells that differ in bits, and says which came first. */
static inline int64_t count_differences(ks_table t, const void *a, const void *b, int64_t n) {
  const ks_table_schema *s = ks_table_schema_of(t);
  int64_t n_wrong = 0;
  for (int64_t r = 0; r < n; r++)
    for (int c = 0; c < s->n_columns; c++) {
      const ks_column *col = &s->columns[c];
      const char *x = (const char *)a + (size_t)r * s->row_bytes + col->offset,
                 *y = (const char *)b + (size_t)r * s->row_bytes + col->offset;
      bool same = col->type == KS_COL_str
                      ? strcmp(*(char *const *)(const void *)x, *(char *const *)(const void *)y) == 0
                      : memcmp(x, y, col->type == KS_COL_i32 ? 4 : 8) == 0;
      if (!same && n_wrong++ == 0)
        cr_log_error("%s row %lld column %s differs", s->path, (long long)r, col->name);
    }
  return n_wrong;
}

#define MUST(expr)                                                                                           \
  do {                                                                                                       \
    ks_status must_ = (expr);                                                                                \
    cr_assert(must_ == KS_OK, #expr ": %s: %s", ks_status_name(must_),                                       \
              must_ == KS_OK ? "" : ks_error_message());                                                     \
  } while (0)

/* A folder of this test's own. */
static inline const char *test_folder(void) {
  static char folder[] = "/tmp/keepsake-record-XXXXXX";
  static bool made;
  if (!made) cr_assert(mkdtemp(folder) != NULL);
  made = true;
  return folder;
}

static inline void remove_test_folder(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf '%s'", test_folder());
  cr_assert(system(command) == 0);
}

/* Path of a file in the folder; valid until the fourth call after it. */
static inline const char *test_file(const char *name) {
  static char paths[4][256];
  static int next;
  char *path = paths[next++ % 4];
  snprintf(path, sizeof paths[0], "%s/%s", test_folder(), name);
  return path;
}

static const ks_meta some_meta[] = {{"seed", "7"},
                                    {"model.sha256", "abcdef"},
                                    {"empty", ""},
                                    {"machine.cpu", "some processor"},
                                    {"time.begin", "2026-01-31T12:00:00Z"}};
enum { N_SOME_META = sizeof some_meta / sizeof some_meta[0] };

/* Appends rows first .. first + n[t] - 1 of each table. */
static inline ks_status append_rows(const char *path, const int64_t first[KS_N_TABLES],
                                    const int64_t n[KS_N_TABLES], const ks_record_state *state,
                                    ks_run_status run) {
  ks_record_rows rows = {0};
  for (int t = 0; t < KS_N_TABLES; t++) {
    rows.rows[t] = make_rows((ks_table)t, first[t], n[t]);
    rows.n_rows[t] = n[t];
  }
  ks_status status = ks_record_append(path, &rows, state, run);
  for (int t = 0; t < KS_N_TABLES; t++)
    ks_rows_free((ks_table)t, (void *)(uintptr_t)rows.rows[t], n[t]);
  return status;
}

#endif
