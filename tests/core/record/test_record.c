#include "tests/core/record/rows.h"

#include <hdf5.h>

TestSuite(record, .fini = remove_test_folder);

Test(record, every_table_comes_back_from_several_checkpoints) {
  const char *path = test_file("a.h5");
  static const int64_t counts[][KS_N_TABLES] = {{0, 0, 0, 0, 0, 0, 0},
                                                {1, 1, 1, 1, 1, 1, 1},
                                                {1000, 1, 60, 300, 128, 1500, 1},
                                                {0, 0, 3, 0, 0, 0, 0},
                                                {1100, 2, 1024, 1023, 1025, 1, 2}};
  int64_t total[KS_N_TABLES] = {0};
  MUST(ks_record_begin(path, "seed = 7;\n", some_meta, N_SOME_META));
  for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
    MUST(append_rows(path, total, counts[k], NULL, KS_RUN_RUNNING));
    for (int t = 0; t < KS_N_TABLES; t++) {
      void *got, *want;
      int64_t n;
      total[t] += counts[k][t];
      MUST(ks_record_read_rows(path, (ks_table)t, &got, &n));
      cr_assert(eq(i64, n, total[t]));
      want = make_rows((ks_table)t, 0, n);
      cr_assert(eq(i64, count_differences((ks_table)t, got, want, n), 0));
      ks_rows_free((ks_table)t, got, n);
      ks_rows_free((ks_table)t, want, n);
    }
  }
}

Test(record, configuration_and_named_strings_come_back) {
  const char *path = test_file("a.h5");
  const char *config = "# \xc3\xa9t\xc3\xa9\nseed = 7;\n";
  ks_record_info info;
  MUST(ks_record_begin(path, config, some_meta, N_SOME_META));
  for (int round = 0; round < 2; round++) {
    MUST(ks_record_read_info(path, &info));
    cr_assert(eq(str, info.config_text, (char *)config));
    cr_assert(eq(i64, info.schema_version, KS_RECORD_SCHEMA_VERSION));
    cr_assert(eq(int, info.status, KS_RUN_RUNNING));
    cr_assert(eq(i64, info.n_meta, N_SOME_META));
    for (int i = 0; i < N_SOME_META; i++)
      cr_assert(eq(str, (char *)ks_record_info_meta(&info, some_meta[i].name), (char *)some_meta[i].value));
    cr_assert(ks_record_info_meta(&info, "absent") == NULL);
    ks_record_info_free(&info);
    MUST(ks_record_append(path, NULL, NULL, KS_RUN_RUNNING));
  }
  MUST(ks_record_begin(path, "", NULL, 0)); /* replaces */
  MUST(ks_record_read_info(path, &info));
  cr_assert(eq(str, info.config_text, (char *)""));
  cr_assert(eq(i64, info.n_meta, 0));
  ks_record_info_free(&info);
}

Test(record, wrong_text_is_stored_as_text) {
  const char *path = test_file("a.h5");
  static const struct {
    const char *given, *stored;
  } cases[] = {{NULL, ""},
               {"a\xff\xfe"
                "b",
                "a\xef\xbf\xbd\xef\xbf\xbd"
                "b"},
               {"cut \xe2\x84", "cut \xef\xbf\xbd\xef\xbf\xbd"},
               {"good \xe2\x84\xaa", "good \xe2\x84\xaa"},
               {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}};
  enum { N = sizeof cases / sizeof cases[0] };
  ks_row_answer answers[N] = {{0}}, *got;
  ks_record_rows rows = {.rows[KS_TABLE_answer] = answers, .n_rows[KS_TABLE_answer] = N};
  ks_meta meta = {"odd", "\xc3("};
  ks_record_info info;
  int64_t n;
  for (int i = 0; i < N; i++)
    answers[i] = (ks_row_answer){.set_id = i, .answer = (char *)(uintptr_t)cases[i].given};
  MUST(ks_record_begin(path, "x\x80", &meta, 1));
  MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
  MUST(ks_record_read_rows(path, KS_TABLE_answer, (void **)&got, &n));
  cr_assert(eq(i64, n, N));
  for (int i = 0; i < N; i++) {
    cr_assert(eq(str, got[i].answer, (char *)cases[i].stored));
    cr_assert(eq(i64, got[i].set_id, i));
    cr_assert(answers[i].answer == cases[i].given);
  }
  ks_rows_free(KS_TABLE_answer, got, n);
  MUST(ks_record_read_info(path, &info));
  cr_assert(eq(str, info.config_text, (char *)"x\xef\xbf\xbd"));
  cr_assert(eq(str, (char *)ks_record_info_meta(&info, "odd"), (char *)"\xef\xbf\xbd("));
  ks_record_info_free(&info);
}

Test(record, long_text) {
  const char *path = test_file("a.h5");
  size_t n_long = 300000;
  char *text = malloc(n_long + 1);
  memset(text, 'x', n_long);
  text[n_long] = '\0';
  ks_row_answer answer = {.answer = text}, *got;
  ks_record_rows rows = {.rows[KS_TABLE_answer] = &answer, .n_rows[KS_TABLE_answer] = 1};
  ks_meta meta = {"long", text};
  int64_t n;
  ks_record_info info;
  MUST(ks_record_begin(path, text, &meta, 1));
  MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
  MUST(ks_record_read_rows(path, KS_TABLE_answer, (void **)&got, &n));
  cr_assert(n == 1 && strcmp(got->answer, text) == 0);
  ks_rows_free(KS_TABLE_answer, got, n);
  MUST(ks_record_read_info(path, &info));
  cr_assert(strcmp(info.config_text, text) == 0 && strcmp(ks_record_info_meta(&info, "long"), text) == 0);
  ks_record_info_free(&info);
  free(text);
}

static ks_run_status status_of(const char *path) {
  ks_record_info info;
  MUST(ks_record_read_info(path, &info));
  ks_run_status s = info.status;
  ks_record_info_free(&info);
  return s;
}

Test(record, state_comes_back_and_follows_the_status) {
  const char *path = test_file("a.h5");
  unsigned char selector[3000], adapter[70000];
  for (size_t i = 0; i < sizeof adapter; i++)
    adapter[i] = (unsigned char)(i * 31);
  memcpy(selector, adapter, sizeof selector);
  ks_record_state state = {.n_arrivals = 800,
                           .n_windows = 1,
                           .n_blobs = 3,
                           .blobs = {{"selector", selector, sizeof selector},
                                     {"adapter", adapter, sizeof adapter},
                                     {"nothing", NULL, 0}}},
                  got;
  MUST(ks_record_begin(path, "", NULL, 0));
  cr_assert(eq(int, ks_record_read_state(path, &got), KS_EDATA));
  MUST(ks_record_append(path, NULL, &state, KS_RUN_RUNNING));
  MUST(ks_record_set_status(path, KS_RUN_INTERRUPTED));
  cr_assert(eq(int, status_of(path), KS_RUN_INTERRUPTED));
  MUST(ks_record_set_status(path, KS_RUN_FAILED));
  cr_assert(eq(int, status_of(path), KS_RUN_FAILED));
  MUST(ks_record_read_state(path, &got));
  cr_assert(got.n_arrivals == 800 && got.n_windows == 1 && got.n_blobs == 3);
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      if (strcmp(got.blobs[i].name, state.blobs[j].name) != 0) continue;
      cr_assert(eq(sz, got.blobs[i].n, state.blobs[j].n));
      cr_assert(got.blobs[i].n == 0 || memcmp(got.blobs[i].bytes, state.blobs[j].bytes, got.blobs[i].n) == 0);
      state.blobs[j].n++; /* met once */
    }
  cr_assert(state.blobs[0].n == sizeof selector + 1 && state.blobs[1].n == sizeof adapter + 1 &&
            state.blobs[2].n == 1);
  ks_record_state_free(&got);

  state = (ks_record_state){
      .n_arrivals = 1600, .n_windows = 2, .n_blobs = 1, .blobs = {{"selector", adapter, 10}}};
  MUST(ks_record_append(path, NULL, &state, KS_RUN_RUNNING));
  MUST(ks_record_read_state(path, &got));
  cr_assert(got.n_arrivals == 1600 && got.n_windows == 2 && got.n_blobs == 1 && got.blobs[0].n == 10);
  ks_record_state_free(&got);
  MUST(ks_record_append(path, NULL, &state, KS_RUN_COMPLETE));
  cr_assert(eq(int, status_of(path), KS_RUN_COMPLETE));
  cr_assert(eq(int, ks_record_read_state(path, &got), KS_EDATA));
  cr_assert(strstr(ks_error_message(), path) != NULL);
}

Test(record, set_status_complete_drops_the_state_and_its_bytes) {
  const char *path = test_file("a.h5");
  size_t n_empty, n_full, n_after;
  char *big = calloc(1, 1 << 20), *bytes;
  ks_record_state state = {.n_blobs = 1, .blobs = {{"big", big, 1 << 20}}}, got;
  MUST(ks_record_begin(path, "", NULL, 0));
  MUST(ks_file_read(path, 1 << 24, &bytes, &n_empty));
  free(bytes);
  for (int i = 0; i < 5; i++)
    MUST(ks_record_append(path, NULL, &state, KS_RUN_RUNNING));
  MUST(ks_file_read(path, 1 << 24, &bytes, &n_full));
  free(bytes);
  cr_assert(n_full > 1 << 20 && n_full < (1 << 20) + 2 * n_empty,
            "replaced state must leave no holes: %zu bytes", n_full);
  MUST(ks_record_set_status(path, KS_RUN_COMPLETE));
  MUST(ks_file_read(path, 1 << 24, &bytes, &n_after));
  free(bytes);
  free(big);
  cr_assert(n_after < n_empty + 4096, "%zu bytes after, %zu when empty", n_after, n_empty);
  cr_assert(eq(int, ks_record_read_state(path, &got), KS_EDATA));
}

/* ---------------------------------------------------------------- digest */

static void digest_of(const char *path, char hex[65]) {
  MUST(ks_record_digest(path, hex));
}

Test(record, digest_is_of_the_content) {
  const char *a = test_file("a.h5"), *b = test_file("b.h5");
  const int64_t none[KS_N_TABLES] = {0}, all[KS_N_TABLES] = {50, 2, 30, 20, 10, 40, 2},
                half[KS_N_TABLES] = {20, 1, 1, 10, 9, 0, 1};
  const ks_meta other[] = {{"empty", ""},
                           {"time.begin", "later"},
                           {"machine.name", "another"},
                           {"model.sha256", "abcdef"},
                           {"seed", "7"}};
  ks_record_state state = {.n_arrivals = 3};
  int64_t rest[KS_N_TABLES];
  char x[65], y[65];
  MUST(ks_record_begin(a, "c", some_meta, N_SOME_META));
  MUST(append_rows(a, none, all, NULL, KS_RUN_COMPLETE));
  MUST(ks_record_begin(b, "c", other, 5));
  MUST(append_rows(b, none, half, &state, KS_RUN_RUNNING));
  for (int t = 0; t < KS_N_TABLES; t++)
    rest[t] = all[t] - half[t];
  rest[KS_TABLE_time] = 0; /* what took how long is nobody's result */
  MUST(append_rows(b, half, rest, &state, KS_RUN_RUNNING));
  digest_of(a, x);
  digest_of(b, y);
  cr_assert(eq(str, x, y));
  cr_assert(eq(sz, strlen(x), 64));
  MUST(ks_record_set_status(b, KS_RUN_COMPLETE));
  digest_of(b, y);
  cr_assert(eq(str, x, y));
}

static bool same(const char *a, const char *b) {
  return strcmp(a, b) == 0;
}

static void change_cell(const ks_column *c, char *row) {
  void *at = row + c->offset;
  switch (c->type) {
  case KS_COL_i64:
    *(int64_t *)at ^= 1;
    break;
  case KS_COL_i32:
    *(int32_t *)at ^= 1 << 30;
    break;
  case KS_COL_f64:
    *(double *)at = *(double *)at == 0.5 ? 0.25 : 0.5;
    break;
  case KS_COL_str:
    free(*(char **)at);
    MUST(ks_strdup("changed", (char **)at));
    break;
  }
}

Test(record, digest_changes_with_any_value) {
  const char *path = test_file("a.h5");
  char first[65], hex[65];
  ks_record_rows rows = {0};
  for (int t = 0; t < KS_N_TABLES; t++) {
    rows.rows[t] = make_rows((ks_table)t, 0, 3);
    rows.n_rows[t] = 3;
  }
  MUST(ks_record_begin(path, "c", some_meta, N_SOME_META));
  MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
  digest_of(path, first);
  for (int t = 0; t < KS_N_TABLES; t++) {
    const ks_table_schema *s = ks_table_schema_of((ks_table)t);
    for (int c = 0; c < s->n_columns; c++) {
      ks_record_rows changed = rows;
      char *mine = make_rows((ks_table)t, 0, 3);
      change_cell(&s->columns[c], mine + (size_t)(c % 3) * s->row_bytes);
      changed.rows[t] = mine;
      MUST(ks_record_begin(path, "c", some_meta, N_SOME_META));
      MUST(ks_record_append(path, &changed, NULL, KS_RUN_RUNNING));
      digest_of(path, hex);
      cr_assert(same(first, hex) == (t == KS_TABLE_time), "%s column %s", s->path, s->columns[c].name);
      ks_rows_free((ks_table)t, mine, 3);
    }
    ks_record_rows fewer = rows;
    fewer.n_rows[t] = 2;
    MUST(ks_record_begin(path, "c", some_meta, N_SOME_META));
    MUST(ks_record_append(path, &fewer, NULL, KS_RUN_RUNNING));
    digest_of(path, hex);
    cr_assert(same(first, hex) == (t == KS_TABLE_time), "%s with a row less", s->path);
  }
  MUST(ks_record_begin(path, "d", some_meta, N_SOME_META));
  MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
  digest_of(path, hex);
  cr_assert(ne(str, first, hex));
  ks_meta meta[N_SOME_META];
  for (int i = 0; i < N_SOME_META; i++) {
    memcpy(meta, some_meta, sizeof meta);
    meta[i].value = "other";
    MUST(ks_record_begin(path, "c", meta, N_SOME_META));
    MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
    digest_of(path, hex);
    cr_assert(same(first, hex) == (i >= 3), "named string %s", meta[i].name);
  }
  for (int t = 0; t < KS_N_TABLES; t++)
    ks_rows_free((ks_table)t, (void *)(uintptr_t)rows.rows[t], 3);
}

Test(record, every_nan_is_the_same_nan) {
  const char *path = test_file("a.h5");
  const uint64_t bits[] = {0x7ff8000000000000u, 0xfff8000000000000u, 0x7ff8000000000123u};
  char hex[3][65];
  for (int i = 0; i < 3; i++) {
    ks_row_step step = {0};
    ks_record_rows rows = {.rows[KS_TABLE_step] = &step, .n_rows[KS_TABLE_step] = 1};
    memcpy(&step.loss, &bits[i], sizeof step.loss);
    MUST(ks_record_begin(path, "", NULL, 0));
    MUST(ks_record_append(path, &rows, NULL, KS_RUN_RUNNING));
    digest_of(path, hex[i]);
    cr_assert(eq(str, hex[0], hex[i]));
  }
}

/* However many checkpoints it was written in. */
Test(record, same_content_same_bytes) {
  const char *paths[] = {test_file("a.h5"), test_file("b.h5")};
  const int64_t none[KS_N_TABLES] = {0}, all[KS_N_TABLES] = {50, 2, 30, 20, 10, 40, 2},
                half[KS_N_TABLES] = {20, 1, 1, 10, 9, 0, 1};
  int64_t rest[KS_N_TABLES];
  char hex[2][65];
  for (int t = 0; t < KS_N_TABLES; t++)
    rest[t] = all[t] - half[t];
  MUST(ks_record_begin(paths[0], "c", some_meta, N_SOME_META));
  MUST(append_rows(paths[0], none, all, NULL, KS_RUN_RUNNING));
  sleep(1); /* no clock may get in */
  MUST(ks_record_begin(paths[1], "c", some_meta, N_SOME_META));
  MUST(append_rows(paths[1], none, half, NULL, KS_RUN_RUNNING));
  MUST(append_rows(paths[1], half, rest, NULL, KS_RUN_RUNNING));
  for (int i = 0; i < 2; i++) {
    MUST(ks_record_set_status(paths[i], KS_RUN_COMPLETE));
    MUST(ks_sha256_file(paths[i], hex[i]));
  }
  cr_assert(eq(str, hex[0], hex[1]));
}

/* ---------------------------------------------------------------- others' tools, index */

Test(record, h5dump_reads_it) {
  const char *path = test_file("a.h5");
  const int64_t none[KS_N_TABLES] = {0}, all[KS_N_TABLES] = {5, 1, 3, 2, 10, 4, 1};
  char command[600], out[4096];
  if (system("command -v h5dump >/dev/null 2>&1") != 0) cr_skip_test("h5dump is not installed");
  MUST(ks_record_begin(path, "seed = 7;", some_meta, N_SOME_META));
  MUST(append_rows(path, none, all, NULL, KS_RUN_RUNNING));
  snprintf(command, sizeof command, "h5dump '%s' 2>&1 >/dev/null", path);
  cr_assert(system(command) == 0);
  snprintf(command, sizeof command, "h5dump -d /config '%s' 2>&1", path);
  FILE *pipe = popen(command, "r");
  size_t n = fread(out, 1, sizeof out - 1, pipe);
  out[n] = '\0';
  cr_assert(eq(int, pclose(pipe), 0));
  cr_assert(strstr(out, "seed = 7;") != NULL, "%s", out);
}

static int64_t rows_through(const char *index, const char *table) {
  hid_t file = H5Fopen(index, H5F_ACC_RDONLY, H5P_DEFAULT),
        dataset = file < 0 ? -1 : H5Dopen2(file, table, H5P_DEFAULT);
  if (dataset < 0) return -1;
  hid_t space = H5Dget_space(dataset);
  int64_t n = H5Sget_simple_extent_npoints(space);
  H5Sclose(space);
  H5Dclose(dataset);
  H5Fclose(file);
  return n;
}

Test(record, index_links_cells_and_can_be_moved) {
  char index[256], cell[256], far[256], command[600];
  const int64_t none[KS_N_TABLES] = {0}, all[KS_N_TABLES] = {5, 1, 3, 2, 10, 4, 1};
  snprintf(index, sizeof index, "%s/run/index.h5", test_folder());
  snprintf(cell, sizeof cell, "%s/run/cells/one.h5", test_folder());
  snprintf(far, sizeof far, "%s/run/../elsewhere/two.h5", test_folder());
  snprintf(command, sizeof command, "mkdir -p '%s/run/cells' '%s/elsewhere'", test_folder(), test_folder());
  cr_assert(system(command) == 0);
  const char *names[] = {"policy=sdss,seed=1", "policy=none,seed=1", "not there yet"},
             *files[] = {cell, far, "run-later.h5"};
  for (int i = 0; i < 2; i++) {
    MUST(ks_record_begin(files[i], "", NULL, 0));
    MUST(append_rows(files[i], none, all, NULL, KS_RUN_COMPLETE));
  }
  for (int round = 0; round < 2; round++)
    MUST(ks_record_write_index(index, "all of it", names, files, 3));
  cr_assert(eq(i64, rows_through(index, "/cells/policy=sdss,seed=1/arrivals"), 5));
  cr_assert(eq(i64, rows_through(index, "/cells/policy=none,seed=1/synthesis"), 4));
  snprintf(command, sizeof command, "mkdir '%s/moved' && mv '%s/run' '%s/elsewhere' '%s/moved'",
           test_folder(), test_folder(), test_folder(), test_folder());
  cr_assert(system(command) == 0);
  snprintf(index, sizeof index, "%s/moved/run/index.h5", test_folder());
  cr_assert(eq(i64, rows_through(index, "/cells/policy=sdss,seed=1/arrivals"), 5));
  cr_assert(eq(i64, rows_through(index, "/cells/policy=none,seed=1/synthesis"), 4));
}

Test(record, index_refuses) {
  const char *index = test_file("index.h5"), *file = test_file("a.h5");
  const char *twice[] = {"a", "a"}, *slash[] = {"a/b"}, *empty[] = {""}, *files[] = {file, file},
             *lost[] = {"/nowhere at all/x.h5"}, *good[] = {"a"};
  cr_assert(eq(int, ks_record_write_index(index, "", twice, files, 2), KS_EINVAL));
  cr_assert(eq(int, ks_record_write_index(index, "", slash, files, 1), KS_EINVAL));
  cr_assert(eq(int, ks_record_write_index(index, "", empty, files, 1), KS_EINVAL));
  cr_assert(eq(int, ks_record_write_index(index, "", good, lost, 1), KS_EIO));
  cr_assert(eq(int, ks_record_write_index(lost[0], "", good, files, 1), KS_EIO));
  cr_assert(ks_file_exists(index) == false);
  MUST(ks_record_write_index(index, "", NULL, NULL, 0));
  cr_assert(ks_file_exists(index));
}

/* ---------------------------------------------------------------- arguments, cost */

Test(record, refuses_bad_arguments) {
  const char *path = test_file("a.h5");
  const ks_meta twice[] = {{"a", "1"}, {"a", "2"}}, slash = {"a/b", "1"}, empty = {"", "1"},
                no_value = {"a", NULL};
  ks_row_step step = {0};
  ks_record_rows rows = {.rows[KS_TABLE_step] = &step, .n_rows[KS_TABLE_step] = -1},
                 missing = {.n_rows[KS_TABLE_step] = 1};
  ks_record_state many = {.n_blobs = 9}, same = {.n_blobs = 2, .blobs = {{"a", NULL, 0}, {"a", NULL, 0}}},
                  nameless = {.n_blobs = 1}, bare = {.n_blobs = 1, .blobs = {{"a", NULL, 3}}};
  char before[65], after[65];
  void *got;
  int64_t n;
  cr_assert(eq(int, ks_record_begin(path, "", twice, 2), KS_EINVAL));
  cr_assert(eq(int, ks_record_begin(path, "", &slash, 1), KS_EINVAL));
  cr_assert(eq(int, ks_record_begin(path, "", &empty, 1), KS_EINVAL));
  cr_assert(eq(int, ks_record_begin(path, "", &no_value, 1), KS_EINVAL));
  cr_assert(eq(int, ks_record_begin(path, NULL, NULL, 0), KS_EINVAL));
  cr_assert(ks_file_exists(path) == false);
  MUST(ks_record_begin(path, "", NULL, 0));
  MUST(ks_sha256_file(path, before));
  cr_assert(eq(int, ks_record_append(path, &rows, NULL, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, &missing, NULL, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, NULL, &many, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, NULL, &same, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, NULL, &nameless, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, NULL, &bare, KS_RUN_RUNNING), KS_EINVAL));
  cr_assert(eq(int, ks_record_append(path, NULL, NULL, (ks_run_status)9), KS_EINVAL));
  cr_assert(eq(int, ks_record_read_rows(path, KS_N_TABLES, &got, &n), KS_EINVAL));
  MUST(ks_sha256_file(path, after));
  cr_assert(eq(str, before, after));
  cr_assert(ks_table_path(KS_N_TABLES) == NULL &&
            strcmp(ks_run_status_name((ks_run_status)9), "unknown") == 0);
}

Test(record, hdf5_keeps_its_own_error_printing) {
  const char *path = test_file("a.h5");
  H5E_auto2_t before, after;
  void *data;
  ks_record_info info;
  H5Eget_auto2(H5E_DEFAULT, &before, &data);
  MUST(ks_record_begin(path, "", NULL, 0));
  cr_assert(eq(int, ks_record_read_info("/nowhere/x.h5", &info), KS_EDATA));
  H5Eget_auto2(H5E_DEFAULT, &after, &data);
  cr_assert(before == after && before != NULL);
}

/* A checkpoint of 1000 arrivals and 100 answers after five such; the time is shown, not judged, as the
 * machine may be busy. */
Test(record, cost_of_a_checkpoint) {
  const char *path = test_file("a.h5");
  const int64_t none[KS_N_TABLES] = {0}, some[KS_N_TABLES] = {1000, 1, 100, 100, 128, 0, 1};
  double seconds[8];
  MUST(ks_record_begin(path, "", some_meta, N_SOME_META));
  for (int i = 0; i < 8; i++) {
    double start = ks_clock_seconds();
    MUST(append_rows(path, none, some, NULL, KS_RUN_RUNNING));
    seconds[i] = ks_clock_seconds() - start;
  }
  cr_log_info("first checkpoint %.1f ms, eighth %.1f ms", 1e3 * seconds[0], 1e3 * seconds[7]);
  cr_assert(seconds[0] < 30, "a checkpoint took %.1f s", seconds[0]);
}
