#include "experiments/config_internal.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define BAD  KS_SOURCE_DIR "/tests/fixtures/config/bad"
#define GOOD KS_SOURCE_DIR "/tests/fixtures/config/good"

/* A file with "{root}" replaced by the project's root, without the last newline; free() it. */
static char *read_expected(const char *path) {
  char *bytes;
  size_t n;
  if (ks_file_read(path, 1 << 20, &bytes, &n) != KS_OK) return NULL;
  ks_text out = {0};
  for (char *p = bytes, *mark; p; p = mark ? mark + strlen("{root}") : NULL) {
    mark = strstr(p, "{root}");
    cr_assert_eq(ks_text_add(&out, p, mark ? (size_t)(mark - p) : strlen(p)), KS_OK);
    if (mark) cr_assert_eq(ks_text_add_str(&out, KS_SOURCE_DIR), KS_OK);
  }
  while (out.len && out.data[out.len - 1] == '\n')
    out.data[--out.len] = 0;
  free(bytes);
  return out.data;
}

/* Every bad/x.cfg is refused with exactly the text of bad/x.txt: all its errors, one a line. */
/* The expected messages name files of this tree, wherever the caller's root points. */
static void use_this_tree(void) {
  unsetenv("KS_ROOT");
}

TestSuite(config, .init = use_this_tree);

Test(config, bad_files_give_their_messages) {
  cr_assert_eq(chdir(KS_SOURCE_DIR), 0);
  DIR *folder = opendir(BAD);
  cr_assert(folder);
  int n = 0, wrong = 0;
  for (struct dirent *e; (e = readdir(folder));) {
    size_t len = strlen(e->d_name);
    if (len < 4 || strcmp(e->d_name + len - 4, ".cfg") != 0) continue;
    char path[PATH_MAX], expected_path[PATH_MAX];
    snprintf(path, sizeof path, "tests/fixtures/config/bad/%s", e->d_name);
    snprintf(expected_path, sizeof expected_path, BAD "/%.*s.txt", (int)len - 4, e->d_name);
    char *expected = read_expected(expected_path);
    cr_assert(expected, "%s", expected_path);
    ks_matrix *m = NULL;
    ks_status s = ks_config_load(path, NULL, 0, &m);
    if (s != KS_ECONFIG || m || strcmp(ks_error_message(), expected) != 0) {
      cr_log_error("%s: %s\n%s\ninstead of\n%s", path, ks_status_name(s), ks_error_message(), expected);
      wrong++;
    }
    ks_matrix_destroy(m);
    free(expected);
    n++;
  }
  closedir(folder);
  cr_expect(n >= 35, "%d files", n);
  cr_expect_eq(wrong, 0);
}

Test(config, files_that_are_none) {
  static const struct {
    const char *path, *message;
  } cases[] = {
      {BAD, BAD ": is a folder; give a configuration file"},
      {BAD "/nothing.cfg", BAD "/nothing.cfg: cannot open: No such file or directory; check the path"},
      {"", NULL}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_matrix *m;
    cr_expect_eq(ks_config_load(cases[i].path, NULL, 0, &m), KS_ECONFIG, "%s", cases[i].path);
    cr_expect_null(m);
    if (cases[i].message) cr_expect_str_eq(ks_error_message(), cases[i].message);
  }
}

/* A parser's stack is no place for a hostile file to grow in. */
Test(config, deep_nesting_is_refused) {
  char path[] = "/tmp/ks_config_XXXXXX";
  int fd = mkstemp(path);
  cr_assert(fd >= 0);
  static const char *const parts[] = {"(", "{ a = ", "[[", "@include \"x\"(", "\"", "/*"};
  for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
    ks_text text = {0};
    cr_assert_eq(ks_text_add_str(&text, "seed = "), KS_OK);
    for (int i = 0; i < 30000; i++)
      cr_assert_eq(ks_text_add_str(&text, parts[p]), KS_OK);
    cr_assert_eq(ks_file_write_atomic(path, text.data, text.len), KS_OK);
    ks_text_free(&text);
    ks_matrix *m;
    cr_expect_eq(ks_config_load(path, NULL, 0, &m), KS_ECONFIG, "%s", parts[p]);
    ks_matrix_destroy(m);
  }
  close(fd);
  unlink(path);
}

Test(config, set_errors) {
  static const struct {
    const char *set, *message;
  } cases[] = {
      {"train.epochs=ten", "--set train.epochs=ten: wants an integer, got \"ten\""},
      {"train.epochs=3.5", "--set train.epochs=3.5: wants an integer, got \"3.5\""},
      {"train.epochs=", "--set train.epochs=: wants an integer, got \"\""},
      {"train.epochs=99999999999999999999",
       "--set train.epochs=99999999999999999999: 99999999999999999999 does not fit 64 bits"},
      {"train.epochs", "--set train.epochs: wants key=value"},
      {"train.learning_rate=nan", "--set train.learning_rate=nan: wants a number, got \"nan\""},
      {"train.learning_rate=0x10", "--set train.learning_rate=0x10: wants a number, got \"0x10\""},
      {"train.learning_rate=1e999", "--set train.learning_rate=1e999: inf is outside (0, 100]"},
      {"train.learning_rte=1",
       "--set train.learning_rte=1: train.learning_rte: no such key; did you mean train.learning_rate?"},
      {"train={}", "--set train={}: train: no such key (keepsake explain lists them)"},
      {"seed=1,x", "--set seed=1,x: wants an integer, got \"x\""},
      {"seed=1,,2", "--set seed=1,,2: wants an integer, got \"\""},
      {"seed=[]", "--set seed=[]: wants an integer, got \"\""},
      {"seed=1,2,1", "--set seed=1,2,1: seed: the same value stands in the list twice"},
      {"buffer.clear_at_trigger=yes", "--set buffer.clear_at_trigger=yes: wants true or false, got \"yes\""},
      {"stream.order=burst",
       "--set stream.order=burst: \"burst\" is none of file, shuffled, bursts; did you mean \"bursts\"?"},
      {"policy=", "--set policy=: policy: there is no \"\" (keepsake ls policies)"},
      {"window.size=9999", "--set window.size=9999: window.size: 9999 is more than data.stream_size (4600): "
                           "there would be no trigger in the stream"},
      {"prompt.answer=\xff{question}",
       "--set prompt.answer=\xff{question}: not UTF-8 at byte 0 of its value"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_matrix *m;
    cr_expect_eq(ks_config_load(NULL, &cases[i].set, 1, &m), KS_ECONFIG, "%s", cases[i].set);
    cr_expect_str_eq(ks_error_message(), cases[i].message);
    ks_matrix_destroy(m);
  }
}

Test(config, all_errors_in_one_pass) {
  const char *sets[] = {"seed=x", "lora.rank=0", "policy=sdsss"};
  ks_matrix *m;
  cr_expect_eq(ks_config_load(BAD "/wrong_group.cfg", sets, 3, &m), KS_ECONFIG);
  const char *text = ks_error_message();
  int lines = 1;
  for (const char *p = text; (p = strchr(p, '\n')); p++)
    lines++;
  cr_expect_eq(lines, 5 + 3, "%s", text);
}

static ks_config first_cell(const char *path, const char *const *sets, int64_t n_sets, ks_matrix **m) {
  ks_status s = ks_config_load(path, sets, n_sets, m);
  cr_assert_eq(s, KS_OK, "%s", ks_error_message());
  return (*m)->cells[0].config;
}

/* The settings that METHOD's paper gives. */
Test(config, defaults_are_the_papers) {
  ks_matrix *m;
  const char *set = "experiment.floor_and_ceiling=false";
  ks_config c = first_cell(NULL, &set, 1, &m);
  cr_expect_eq(m->n_cells, 1);
  cr_expect_str_eq(m->name, "default");
  cr_expect_str_eq(m->output, "results/default");
  cr_expect_str_eq(c.policy, "sdss");
  cr_expect_eq(c.window.size, 800);
  cr_expect_eq(c.buffer.bins, 128);
  cr_expect_eq(c.buffer.bin_bytes, 22 * 1024);
  cr_expect_eq(c.buffer.bins * c.buffer.bin_bytes, 2816 * 1024);
  cr_expect_not(c.buffer.clear_at_trigger);
  cr_expect_eq(c.data.stream_size, 4600);
  cr_expect_eq(c.lora.rank, 8);
  cr_expect_eq(c.lora.alpha, 16.0);
  cr_expect_eq(c.lora.dropout, 0.05);
  cr_expect_str_eq(c.lora.targets, "q,k,v,o");
  cr_expect_eq(c.train.learning_rate, 3e-4);
  cr_expect_eq(c.train.batch_size, 128);
  cr_expect_eq(c.train.epochs, 100);
  cr_expect_eq(c.train.max_tokens, 512);
  cr_expect_eq(c.eval.temperature, 0.5);
  cr_expect_eq(c.synth.count, 3);
  cr_expect_eq(c.select.entropy_bins, 100);
  cr_expect_eq(c.annotate.budget, -1);
  ks_matrix_destroy(m);
}

Test(config, every_form_is_read) {
  ks_matrix *m;
  ks_config c = first_cell(GOOD "/all_forms.cfg", NULL, 0, &m);
  cr_expect_str_eq(m->name, "all-forms");
  cr_expect_eq(m->n_cells, 2 * 3 * 2);
  cr_expect_eq(m->cells[2].config.seed, 3000000000);
  cr_expect_eq(m->cells[4].config.seed, 16);
  cr_expect_eq(c.train.learning_rate, 1e-3);
  cr_expect_eq(m->cells[1].config.train.learning_rate, 1.0, "an integer for a float");
  cr_expect_eq(c.train.schedule, 2);
  cr_expect_eq(c.window.size, 400);
  cr_expect_eq(c.lora.alpha, 4.0);
  cr_expect_eq(c.lora.dropout, 0.5);
  cr_expect(c.buffer.clear_at_trigger);
  cr_expect_str_eq(c.prompt.answer, "Q: \"{question}\" # 99999999999\nA:\t\\ A");
  cr_expect_str_eq(c.select.lexicon, GOOD "/words.tsv");
  cr_expect_str_eq(c.model.path, GOOD "/parts");
  ks_matrix_destroy(m);
}

Test(config, sets_override_and_the_last_wins) {
  const char *sets[] = {"lora.alpha=3",
                        "lora.alpha=5",
                        "policy=fifo",
                        "seed=[7, 8]",
                        "prompt.response_prefix=, = \"x\" ",
                        "data.question_field=",
                        "experiment.floor_and_ceiling=false",
                        "lora.targets=q,v",
                        "train.learning_rate=1,0.5"};
  ks_matrix *m;
  ks_config c = first_cell(GOOD "/all_forms.cfg", sets, sizeof sets / sizeof *sets, &m);
  cr_expect_eq(c.lora.alpha, 5.0);
  cr_expect_str_eq(c.policy, "fifo");
  cr_expect_eq(m->n_cells, 4);
  cr_expect_eq(m->cells[2].config.seed, 8);
  cr_expect_eq(m->cells[1].config.train.learning_rate, 0.5);
  cr_expect_str_eq(c.prompt.response_prefix, ", = \"x\" ");
  cr_expect_str_eq(c.lora.targets, "q,v");
  ks_matrix_destroy(m);
}

/* The resolved text is a configuration that gives the same matrix and the same text. */
Test(config, resolved_text_round_trips) {
  static const char *const files[] = {NULL, GOOD "/all_forms.cfg", KS_SOURCE_DIR "/configs/quickstart.cfg"};
  const char *sets[] = {"seed=1,9000000000000000", "train.learning_rate=0.1,3e-4,1e-7",
                        "prompt.answer=\t\"{question}\"\\\n\x01\xc3\xa9", "eval.top_p=0.1"};
  for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
    ks_matrix *m, *again;
    first_cell(files[f], sets, 4, &m);
    char path[] = "/tmp/ks_config_XXXXXX";
    int fd = mkstemp(path);
    cr_assert(fd >= 0);
    cr_assert_eq(ks_file_write_atomic(path, m->text, strlen(m->text)), KS_OK);
    first_cell(path, NULL, 0, &again);
    cr_expect_str_eq(again->text, m->text);
    cr_assert_eq(again->n_cells, m->n_cells);
    for (int64_t i = 0; i < m->n_cells; i++) {
      ks_text a = {0}, b = {0};
      cr_expect_str_eq(again->cells[i].name, m->cells[i].name);
      cr_expect_eq(ks_config_text(&m->cells[i].config, false, &a), KS_OK);
      cr_expect_eq(ks_config_text(&again->cells[i].config, false, &b), KS_OK);
      cr_expect_str_eq(a.data, b.data);
      ks_text_free(&a);
      ks_text_free(&b);
    }
    ks_matrix_destroy(m);
    ks_matrix_destroy(again);
    close(fd);
    unlink(path);
  }
}

/* What a cell records does not say where it ran, nor how it is reported. */
Test(config, recorded_text_leaves_the_host_out) {
  const char *here[] = {"run.threads=1", "experiment.output=a", "stats.seed=5", "experiment.name=x"};
  const char *there[] = {"run.threads=7", "experiment.output=b", "run.max_rows=9"};
  const char *other[] = {"train.epochs=7"};
  ks_matrix *a, *b, *c;
  ks_text ta = {0}, tb = {0}, tc = {0};
  first_cell(NULL, here, 4, &a);
  first_cell(NULL, there, 3, &b);
  first_cell(NULL, other, 1, &c);
  cr_assert_eq(ks_config_text(&a->cells[1].config, true, &ta), KS_OK);
  cr_assert_eq(ks_config_text(&b->cells[1].config, true, &tb), KS_OK);
  cr_assert_eq(ks_config_text(&c->cells[1].config, true, &tc), KS_OK);
  cr_expect_str_eq(ta.data, tb.data);
  cr_expect_str_neq(ta.data, tc.data);
  cr_expect(strstr(ta.data, "path = \"datasets/base\""), "shipped data is named from the root: %s", ta.data);
  ks_text_free(&ta);
  ks_text_free(&tb);
  ks_text_free(&tc);
  ks_matrix_destroy(a);
  ks_matrix_destroy(b);
  ks_matrix_destroy(c);
}

Test(config, paths_are_resolved_by_where_they_stand) {
  cr_assert_eq(chdir(KS_SOURCE_DIR "/tests"), 0);
  cr_assert_eq(setenv("HOME", GOOD, 1), 0);
  static const struct {
    const char *set, *path;
  } cases[] = {{"select.lexicon=fixtures/config/good/words.tsv", GOOD "/words.tsv"},
               {"select.lexicon=./fixtures//config/../config/good/./words.tsv", GOOD "/words.tsv"},
               {"select.lexicon=../configs/README.md", KS_SOURCE_DIR "/configs/README.md"},
               {"select.lexicon=~/words.tsv", GOOD "/words.tsv"},
               {"select.lexicon=" GOOD "/words.tsv", GOOD "/words.tsv"},
               {"select.lexicon=", ""}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_matrix *m;
    ks_config c = first_cell(NULL, &cases[i].set, 1, &m);
    cr_expect_str_eq(c.select.lexicon, cases[i].path);
    cr_expect_str_eq(c.model.path, KS_SOURCE_DIR "/datasets/base",
                     "shipped data lies at the root, whatever the current directory");
    ks_matrix_destroy(m);
  }
}

/* Each key takes its own default after --set, and explain shows it. */
Test(config, every_key_is_settable_and_explained) {
  ks_text all = {0};
  cr_assert_eq(ks_config_explain(NULL, &all), KS_OK);
  for (int i = 0; i < ks_n_keys; i++) {
    const ks_key *k = &ks_keys[i];
    ks_value v, stored;
    char why[KS_WHY_BYTES];
    ks_config c = {0};
    cr_assert(ks_value_parse(k, k->def, &v, why), "%s: %s", k->path, why);
    ks_value_store(k, v, &c);
    stored = ks_value_of(k, &c);
    cr_expect(ks_value_equal(k, v, stored), "%s", k->path);
    cr_expect_eq(ks_key_find(k->path), i, "%s stands twice", k->path);
    cr_expect(strstr(all.data, k->help), "%s", k->path);
    cr_expect(*k->help && strlen(k->name) < 19, "%s", k->path);
    ks_text one = {0};
    cr_expect_eq(ks_config_explain(k->path, &one), KS_OK);
    cr_expect(strstr(one.data, k->path) && strstr(one.data, "default"), "%s", one.data);
    ks_text_free(&one);
  }
  ks_text_free(&all);
}

Test(config, explain_names_the_nearest) {
  static const struct {
    const char *what, *message;
  } cases[] = {
      {"train.learning_rat", "train.learning_rat: no such key or group; did you mean train.learning_rate?"},
      {"learning_rate", "learning_rate: no such key or group; did you mean train.learning_rate?"},
      {"trian", "trian: no such key or group; did you mean train?"},
      {"zzzzzzzzzzzz", "zzzzzzzzzzzz: no such key or group; keepsake explain lists all"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_text text = {0};
    cr_expect_eq(ks_config_explain(cases[i].what, &text), KS_ECONFIG);
    cr_expect_str_eq(ks_error_message(), cases[i].message);
    ks_text_free(&text);
  }
}

Test(config, floats_are_written_shortest) {
  static const struct {
    double value;
    const char *text;
  } cases[] = {{0.1, "0.1"}, {3e-4, "0.0003"}, {1e-8, "1e-08"},
               {16, "16.0"}, {1e6, "1e+06"},   {1.0 / 3, "0.3333333333333333"},
               {0, "0.0"}};
  const ks_key *k = &ks_keys[ks_key_find("train.learning_rate")];
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_text text = {0};
    cr_assert_eq(ks_value_write(k, (ks_value){.f = cases[i].value}, &text), KS_OK);
    cr_expect_str_eq(text.data, cases[i].text);
    double back = strtod(text.data, NULL);
    cr_expect_eq(memcmp(&back, &cases[i].value, sizeof back), 0);
    ks_text_free(&text);
  }
}

/* A model in one file gets the tokenizer beside it, and the resolved text says which. */
Test(config, the_tokenizer_beside_the_model_is_found) {
  static const struct {
    const char *files[4], *found; /* found NULL: an error */
  } cases[] = {{{"model.bin", "tok512.bin", "tok512.model"}, "tok512.bin"},
               {{"model.bin", "tok512.bin", "tokenizer.model"}, "tokenizer.model"},
               {{"model.bin", "tok1.bin", "tok2.bin", "tok.model"}, "tok.model"},
               {{"model.bin", "tok1.bin", "tok2.bin"}, NULL},
               {{"model.bin"}, NULL}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char folder[] = "/tmp/ks_model_XXXXXX", set[PATH_MAX], path[PATH_MAX];
    cr_assert(mkdtemp(folder));
    for (int f = 0; f < 4 && cases[i].files[f]; f++) {
      snprintf(path, sizeof path, "%s/%s", folder, cases[i].files[f]);
      cr_assert_eq(ks_file_write_atomic(path, "x", 1), KS_OK);
    }
    snprintf(set, sizeof set, "model.path=%s/model.bin", folder);
    const char *sets[] = {set};
    ks_matrix *m;
    ks_status s = ks_config_load(NULL, sets, 1, &m);
    snprintf(path, sizeof path, "%s/%s", folder, cases[i].found ? cases[i].found : "");
    if (cases[i].found)
      cr_expect(s == KS_OK && strcmp(m->cells[0].config.model.tokenizer, path) == 0 && strstr(m->text, path),
                "case %zu", i);
    else
      cr_expect(s == KS_ECONFIG && strstr(ks_error_message(), "model.tokenizer: none beside"), "case %zu: %s",
                i, ks_error_message());
    ks_matrix_destroy(m);
    for (int f = 0; f < 4 && cases[i].files[f]; f++) {
      snprintf(path, sizeof path, "%s/%s", folder, cases[i].files[f]);
      unlink(path);
    }
    rmdir(folder);
  }
}
