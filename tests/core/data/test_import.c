/* Files of dialogue sets: what is read from good ones, what is said about bad ones. */
#include "core/data/data.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define FIXTURES KS_SOURCE_DIR "/tests/fixtures/data/"

static ks_dataset *import(const ks_import_params *p) {
  ks_dataset *d = NULL;
  cr_assert_eq(ks_dataset_import(p, &d), KS_OK, "%s", ks_error_message());
  return d;
}

static void check_set(const ks_dataset *d, int64_t i, const char *question, const char *response,
                      const char *preferred, const char *topic) {
  cr_assert_lt(i, d->n_sets);
  const ks_set *s = &d->sets[i];
  cr_expect_str_eq(s->question, question, "set %d: question '%s', not '%s'", (int)i, s->question, question);
  cr_expect_str_eq(s->response, response, "set %d: response '%s', not '%s'", (int)i, s->response, response);
  cr_expect_str_eq(s->preferred, preferred, "set %d: preferred '%s', not '%s'", (int)i, s->preferred,
                   preferred);
  cr_expect_eq(s->fact, -1);
  cr_expect_not(s->uninformative);
  if (topic)
    cr_expect_str_eq(s->topic < 0 ? "(none)" : d->topics[s->topic], topic, "set %d", (int)i);
  else
    cr_expect_eq(s->topic, -1, "set %d", (int)i);
}

Test(import, alpaca) {
  ks_dataset *d = import(&(ks_import_params){
      .importer = "alpaca", .path = FIXTURES "good/alpaca.json", .topic_field = "category"});
  cr_assert_eq(d->n_sets, 3);
  cr_expect_eq(d->n_topics, 2);
  cr_expect_eq(d->n_skipped, 0);
  cr_expect_str_eq(d->name, "alpaca.json");
  check_set(d, 0,
            "Translate.\nGr\xc3\xbc\xc3\x9f"
            "e",
            "greetings", "greetings", NULL);
  check_set(d, 1, "Say \"[x]\", {y}\xc3\xa9\xf0\x9f\x98\x80\\", "z \"], \" }", "z \"], \" }", "talk");
  check_set(d, 2, "n", "o", "o", "12");
  char hash[65];
  cr_assert_eq(ks_sha256_file(FIXTURES "good/alpaca.json", hash), KS_OK);
  cr_expect_str_eq(d->sha256, hash);
  ks_dataset_destroy(d);
}

Test(import, alpaca_with_another_question) {
  ks_import_params p = {
      .importer = "alpaca", .path = FIXTURES "good/alpaca.json", .question_field = "output"};
  ks_dataset *d = import(&p);
  check_set(d, 0, "greetings", "greetings", "greetings", NULL);
  ks_dataset_destroy(d);
  p.input_field = "instruction";
  d = import(&p);
  check_set(d, 0, "greetings\nTranslate.", "greetings", "greetings", NULL);
  ks_dataset_destroy(d);
}

Test(import, nested_fields) {
  ks_import_params p = {.importer = "jsonl",
                        .path = FIXTURES "good/nested.jsonl",
                        .question_field = "turns[-1].text",
                        .response_field = "x.y",
                        .preferred_field = "good[0]",
                        .topic_field = "meta.topic"};
  ks_dataset *d = import(&p);
  cr_assert_eq(d->n_sets, 2);
  check_set(d, 0, "first", "dotted", "yes", "a.b");
  check_set(d, 1, "second", "d2", "yes", NULL);
  ks_dataset_destroy(d);

  p.question_field = "turns[1].text";
  p.skip_invalid = true;
  d = import(&p);
  cr_assert_eq(d->n_sets, 1);
  cr_expect_eq(d->n_skipped, 1);
  check_set(d, 0, "first", "dotted", "yes", "a.b");
  ks_dataset_destroy(d);
}

Test(import, tables) {
  ks_dataset *d = import(
      &(ks_import_params){.importer = "csv", .path = FIXTURES "good/table.csv", .topic_field = "label"});
  cr_assert_eq(d->n_sets, 3);
  check_set(d, 0, "say \"hi\", please", "hello", "hello", "greet");
  check_set(d, 1, "two\nlines", "a,b", "a,b", NULL);
  check_set(d, 2, "5\" disk", "yes", "yes", NULL);
  ks_dataset_destroy(d);
  d = import(&(ks_import_params){.importer = "tsv", .path = FIXTURES "good/table.tsv"});
  cr_assert_eq(d->n_sets, 1);
  check_set(d, 0, "a, b", "c \"d\"", "c \"d\"", NULL);
  ks_dataset_destroy(d);
}

Test(import, max_rows_takes_the_first) {
  for (int64_t max = 1; max <= 4; max++) {
    ks_dataset *d = import(
        &(ks_import_params){.importer = "alpaca", .path = FIXTURES "good/alpaca.json", .max_rows = max});
    cr_expect_eq(d->n_sets, max < 3 ? max : 3);
    ks_dataset_destroy(d);
  }
}

/* ---------------------------------------------------------------- bad files */

typedef struct {
  const char *file,
      *says; /* says: the message behind the path; after "JSON: " at its end the parser speaks */
} bad_case;

static const bad_case bad_cases[] = {
    {"empty.json", ":1: the file is empty; give one with at least one row"},
    {"blank.json", ":1: the file is empty; give one with at least one row"},
    {"only_bom.json",
     ":1:1: the file is not a JSON array of rows (no '['); a file with one object a line is read by "
     "the importer jsonl"},
    {"object.json",
     ":1:1: the file is not a JSON array of rows (no '['); a file with one object a line is read by "
     "the importer jsonl"},
    {"array.jsonl",
     ":1:1: the file is one JSON array ('['), not one object a line; it is read by the importer json "
     "or alpaca"},
    {"cut_in_name.json", ":3:29: the file ends inside the array of rows; it is cut off, get it again whole"},
    {"cut_after_comma.json",
     ":2:39: the file ends inside the array of rows; it is cut off, get it again whole"},
    {"trailing_comma.json", ":3:1: a row is missing (an empty place between commas or at the end)"},
    {"double_comma.json", ":3:1: a row is missing (an empty place between commas or at the end)"},
    {"after_array.json", ":1:39: something follows the array of rows; remove it"},
    {"no_rows.json", ": no usable row among 0; check the file and the names of the fields"},
    {"missing_output.json",
     ":3: row 2 has no response (field 'output'; the row has instruction, input); correct it, "
     "or allow invalid rows to be skipped"},
    {"blank_question.json",
     ":4: row 2 has an empty question (field 'instruction'); correct it, or allow invalid "
     "rows to be skipped"},
    {"row_number.json",
     ":3: row 2 is a number, not an object; correct it, or allow invalid rows to be skipped"},
    {"object_question.json",
     ":1: row 1 has an object in field 'instruction', where a text belongs; correct it, or "
     "allow invalid rows to be skipped"},
    {"nul_escape.json", ":2:27: row 2 is not valid JSON: a text holds \\u0000; correct the file"},
    {"nul_byte.json", ":2: a NUL byte at offset 57; this is not a text file, or a damaged one"},
    {"latin1.json", ":2: not UTF-8 at byte offset 59 (0xe9); convert the file to UTF-8"},
    {"overlong.json", ":1: not UTF-8 at byte offset 18 (0xc0); convert the file to UTF-8"},
    {"surrogate_bytes.json", ":1: not UTF-8 at byte offset 18 (0xed); convert the file to UTF-8"},
    {"surrogate_escape.json", ":1:25: row 1 is not valid JSON: "},
    {"name_twice.json", ":1:45: row 1 is not valid JSON: "},
    {"bad_escape.json", ":2:21: row 2 is not valid JSON: "},
    {"no_comma.json", ":1:29: row 1 is not valid JSON: "},
    {"wrong_bracket.json", ":1:36: row 1 is not valid JSON: "},
    {"raw_newline.json", ":1:19: row 1 is not valid JSON: "},
    {"broken_line.jsonl", ":3:30: row 2 is not valid JSON: "},
    {"missing_response.jsonl",
     ":2: row 2 has no response (field 'response'; the row has question); correct it, or "
     "allow invalid rows to be skipped"},
    {"text_line.jsonl",
     ":2: row 2 is a text, not an object; correct it, or allow invalid rows to be skipped"},
    {"other_names.jsonl",
     ":1: row 1 has no question (field 'question'; the row has q, response); correct it, or "
     "allow invalid rows to be skipped"},
    {"null_response.jsonl",
     ":1: row 1 has no response (field 'response'; the row has question, response); correct "
     "it, or allow invalid rows to be skipped"},
    {"no_column.csv", ":1: the header has no column 'response'; its columns are: question, answer"},
    {"open_quote.csv", ":3: a quote opens here and never closes; close it"},
    {"after_quote.csv", ":2: text follows a closing quote; double the quotes inside a quoted field"},
    {"long_row.csv", ":5: row 3 has 3 fields, the header 2; correct it, or allow invalid rows to be skipped"},
    {"short_row.csv",
     ":4: row 2 has no response (field 'response'; the row has 1 of 2 fields); correct it, or allow "
     "invalid rows to be skipped"},
    {"header_only.csv", ": no usable row among 0; check the file and the names of the fields"},
};

static const char *importer_of(const char *file) {
  const char *dot = strrchr(file, '.') + 1;
  return strcmp(dot, "json") == 0 ? "alpaca" : dot;
}

Test(import, bad_files_get_their_message) {
  for (size_t i = 0; i < sizeof bad_cases / sizeof bad_cases[0]; i++) {
    const bad_case *c = &bad_cases[i];
    char path[512], expected[1024];
    snprintf(path, sizeof path, FIXTURES "bad/%s", c->file);
    snprintf(expected, sizeof expected, "%s%s", path, c->says);
    ks_dataset *d = NULL;
    ks_status status =
        ks_dataset_import(&(ks_import_params){.importer = importer_of(c->file), .path = path}, &d);
    cr_expect_eq(status, KS_EDATA, "%s: status %s", c->file, ks_status_name(status));
    cr_expect_null(d, "%s", c->file);
    size_t n = strlen(expected);
    bool open = strcmp(expected + n - 6, "JSON: ") == 0;
    bool same =
        open ? strncmp(ks_error_message(), expected, n) == 0 : strcmp(ks_error_message(), expected) == 0;
    cr_expect(same, "%s\n  says   %s\n  wanted %s", c->file, ks_error_message(), expected);
  }
}

Test(import, invalid_rows_can_be_skipped) {
  static const struct {
    const char *file;
    int64_t n_sets, n_skipped;
  } cases[] = {{"missing_output.json", 1, 1}, {"blank_question.json", 1, 1},    {"row_number.json", 1, 1},
               {"text_line.jsonl", 1, 1},     {"missing_response.jsonl", 1, 1}, {"long_row.csv", 2, 1},
               {"short_row.csv", 1, 1}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char path[512];
    snprintf(path, sizeof path, FIXTURES "bad/%s", cases[i].file);
    ks_dataset *d = import(
        &(ks_import_params){.importer = importer_of(cases[i].file), .path = path, .skip_invalid = true});
    cr_expect_eq(d->n_sets, cases[i].n_sets, "%s", cases[i].file);
    cr_expect_eq(d->n_skipped, cases[i].n_skipped, "%s", cases[i].file);
    ks_dataset_destroy(d);
  }
}

Test(import, skipping_every_row_is_an_error_and_bad_syntax_is_never_skipped) {
  ks_dataset *d = NULL;
  ks_import_params p = {.importer = "jsonl", .path = FIXTURES "bad/other_names.jsonl", .skip_invalid = true};
  cr_expect_eq(ks_dataset_import(&p, &d), KS_EDATA);
  cr_expect_str_eq(ks_error_message(),
                   FIXTURES "bad/other_names.jsonl: no usable row among 1; check the file and the "
                            "names of the fields");
  p.path = FIXTURES "bad/broken_line.jsonl";
  cr_expect_eq(ks_dataset_import(&p, &d), KS_EDATA);
  cr_expect_null(d);
}

Test(import, bad_parameters) {
  static const struct {
    ks_import_params params;
    ks_status status;
    const char *says;
  } cases[] = {
      {{.importer = "alpacca", .path = "x"},
       KS_ECONFIG,
       "no importer is called 'alpacca'; there are: alpaca, json, jsonl, csv, tsv"},
      {{.importer = "alpaca"}, KS_ECONFIG, "a dataset file needs an importer and a path"},
      {{.importer = "alpaca", .path = "x", .max_rows = -1},
       KS_ECONFIG,
       "max_rows is -1; give 0 for all rows, or more"},
      {{.importer = "alpaca", .path = FIXTURES "nowhere.json"},
       KS_EDATA,
       FIXTURES "nowhere.json: cannot open: No such file or directory; check the path"},
      {{.importer = "alpaca", .path = FIXTURES}, KS_EDATA, FIXTURES ": is not a regular file; name a file"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_dataset *d = NULL;
    cr_expect_eq(ks_dataset_import(&cases[i].params, &d), cases[i].status, "case %zu", i);
    cr_expect_str_eq(ks_error_message(), cases[i].says, "case %zu says %s", i, ks_error_message());
    cr_expect_null(d);
  }
  static const char *const paths[] = {
      "a..b", ".a", "a.", "a[", "a[]", "a[x]", "a[1", "a[1x]", "a[1]b", "a[99999999999]", "a.[0]", "a[--1]"};
  for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
    ks_dataset *d = NULL;
    ks_import_params p = {.importer = "jsonl", .path = FIXTURES "good/nested.jsonl", .topic_field = paths[i]};
    cr_expect_eq(ks_dataset_import(&p, &d), KS_ECONFIG, "%s", paths[i]);
    cr_expect_not_null(strstr(ks_error_message(), paths[i]), "%s", ks_error_message());
  }
}

/* ---------------------------------------------------------------- made files */

static void write_file(char path[64], const char *text, size_t n) {
  strcpy(path, "/tmp/ks-test-import-XXXXXX");
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  FILE *f = fdopen(fd, "wb");
  cr_assert_eq(fwrite(text, 1, n, f), n);
  fclose(f);
}

Test(import, deep_nesting_is_refused) {
  static const int depths[] = {3000, 1000000};
  for (size_t k = 0; k < 2; k++) {
    ks_text t = {0};
    char path[64];
    cr_assert_eq(ks_text_add_str(&t, "[{\"instruction\": "), KS_OK);
    for (int i = 0; i < depths[k]; i++)
      cr_assert_eq(ks_text_add_str(&t, "["), KS_OK);
    for (int i = 0; i < depths[k]; i++)
      cr_assert_eq(ks_text_add_str(&t, "]"), KS_OK);
    cr_assert_eq(ks_text_add_str(&t, "}]"), KS_OK);
    write_file(path, t.data, t.len);
    ks_dataset *d = NULL;
    cr_expect_eq(ks_dataset_import(&(ks_import_params){.importer = "alpaca", .path = path}, &d), KS_EDATA);
    cr_expect_not_null(strstr(ks_error_message(), "maximum parsing depth reached"), "%s", ks_error_message());
    unlink(path);
    ks_text_free(&t);
  }
}

/* Every prefix of a good file, and every single damaged byte, is read or refused, never worse. */
Test(import, cut_and_damaged_files) {
  static const char *const files[][2] = {{"alpaca", FIXTURES "good/alpaca.json"},
                                         {"jsonl", FIXTURES "good/nested.jsonl"},
                                         {"csv", FIXTURES "good/table.csv"}};
  for (size_t k = 0; k < 3; k++) {
    char *bytes, path[64];
    size_t n;
    cr_assert_eq(ks_file_read(files[k][1], 1 << 20, &bytes, &n), KS_OK);
    for (size_t i = 0; i < 2 * n; i++) {
      bool cut = i < n;
      char kept = bytes[i % n];
      if (!cut) bytes[i - n] = (char)(kept ^ 0x11);
      write_file(path, bytes, cut ? i : n);
      ks_dataset *d = NULL;
      ks_status status = ks_dataset_import(&(ks_import_params){.importer = files[k][0], .path = path}, &d);
      cr_expect(status == KS_OK || (status == KS_EDATA && !d), "%s, %zu: %s", files[k][1], i,
                ks_error_message());
      if (status == KS_EDATA)
        cr_expect_eq(strncmp(ks_error_message(), path, strlen(path)), 0, "%s", ks_error_message());
      ks_dataset_destroy(d);
      unlink(path);
      bytes[i % n] = kept;
    }
    free(bytes);
  }
}

Test(import, nine_thousand_rows_in_well_under_a_second) {
  ks_text t = {0};
  char path[64];
  cr_assert_eq(ks_text_add_str(&t, "[\n"), KS_OK);
  for (int i = 0; i < 9000; i++) {
    cr_assert_eq(ks_text_addf(&t, "%s{\"instruction\": \"question %d\", \"input\": \"\", \"output\": \"",
                              i ? ",\n" : "", i),
                 KS_OK);
    for (int k = 0; k < 40; k++)
      cr_assert_eq(ks_text_addf(&t, "word%d ", k), KS_OK);
    cr_assert_eq(ks_text_addf(&t, "\", \"topic\": \"t%d\"}", i % 4000), KS_OK);
  }
  cr_assert_eq(ks_text_add_str(&t, "]"), KS_OK);
  write_file(path, t.data, t.len);
  ks_text_free(&t);
  clock_t begin = clock();
  ks_dataset *d = import(&(ks_import_params){.importer = "alpaca", .path = path, .topic_field = "topic"});
  double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
  cr_expect_eq(d->n_sets, 9000);
  cr_expect_eq(d->n_topics, 4000);
  cr_expect_lt(seconds, 1.0, "%.2f s of processor time", seconds);
  cr_log_info("9000 rows in %.3f s", seconds);
  ks_dataset_destroy(d);
  unlink(path);
}

/* A real file of Alpaca's layout, where one is at hand: KS_TEST_ALPACA names it. */
Test(import, real_alpaca) {
  const char *path = getenv("KS_TEST_ALPACA");
  if (!path) cr_skip_test("KS_TEST_ALPACA does not name a file");
  ks_dataset *d = import(&(ks_import_params){.importer = "alpaca", .path = path, .skip_invalid = true});
  cr_expect_geq(d->n_sets, 4600);
  cr_assert_eq(ks_dataset_split(d, &(ks_split_params){.eval_size = 200, .stream_size = 4400, .seed = 1}),
               KS_OK);
  ks_dataset_destroy(d);
}

/* ---------------------------------------------------------------- adding by hand */

Test(dataset, refuses_bad_texts) {
  ks_dataset *d;
  cr_assert_eq(
      ks_dataset_create("a name that is much longer than the room of sixty-four bytes that it has", &d),
      KS_OK);
  cr_expect_eq(strlen(d->name), 63);
  cr_expect_eq(ks_dataset_add(d, "", "r", "p", NULL, false), KS_EDATA);
  cr_expect_eq(ks_dataset_add(d, NULL, "r", "p", NULL, false), KS_EDATA);
  cr_expect_eq(ks_dataset_add(d, "q", "r", "", NULL, false), KS_EDATA);
  cr_expect_eq(ks_dataset_add(d, "q", "r", "p", "", false), KS_EDATA);
  cr_expect_eq(ks_dataset_add(d, "q\xff", "r", "p", NULL, false), KS_EDATA);
  cr_expect_eq(d->n_sets, 0);
  cr_expect_eq(ks_dataset_add(d, "q", "", "p", "t", true), KS_OK);
  cr_expect_eq(d->n_sets, 1);
  cr_expect_eq(d->sets[0].topic, 0);
  cr_expect(d->sets[0].uninformative);
  ks_dataset_destroy(d);
  ks_dataset_destroy(NULL);
}

Test(dataset, holds_long_texts_and_many_sets) {
  ks_dataset *d;
  cr_assert_eq(ks_dataset_create("x", &d), KS_OK);
  char *text = malloc(200001);
  memset(text, 'a', 200000);
  text[200000] = '\0';
  for (int i = 0; i < 50; i++)
    cr_assert_eq(ks_dataset_add(d, text + i * 1000, "short", text + 199999 - i, "t", false), KS_OK);
  for (int i = 0; i < 50; i++) {
    cr_expect_eq(strlen(d->sets[i].question), (size_t)(200000 - i * 1000));
    cr_expect_eq(strlen(d->sets[i].preferred), (size_t)(i + 1));
  }
  free(text);
  ks_dataset_destroy(d);
}
