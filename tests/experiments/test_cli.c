/* The program as a user meets it: exit codes, stdout and stderr. */
#include "core/base/base.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct {
  int exit_code; /* 128 + signal when killed */
  char *out, *err;
} outcome;

static char *read_all(FILE *f) {
  ks_text t = {0};
  char buffer[4096];
  rewind(f);
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;)
    cr_assert_eq(ks_text_add(&t, buffer, n), KS_OK);
  fclose(f);
  if (!t.data) cr_assert_eq(ks_text_add_str(&t, ""), KS_OK);
  return t.data;
}

/* Runs the program; out_path: where stdout goes instead of the outcome. */
static outcome run_to(const char *out_path, const char *const *args) {
  const char *argv[16] = {KS_PROGRAM};
  for (int i = 0; i < 14 && args[i]; i++)
    argv[i + 1] = args[i];
  FILE *out = out_path ? fopen(out_path, "w") : tmpfile(), *err = tmpfile();
  cr_assert(out && err);
  pid_t pid = fork();
  cr_assert(pid >= 0);
  if (pid == 0) {
    dup2(fileno(out), 1);
    dup2(fileno(err), 2);
    execv(KS_PROGRAM, (char *const *)argv);
    _exit(127);
  }
  int status;
  cr_assert_eq(waitpid(pid, &status, 0), pid);
  outcome o = {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), NULL, NULL};
  if (out_path)
    fclose(out);
  else
    o.out = read_all(out);
  o.err = read_all(err);
  return o;
}

static outcome run(const char *const *args) {
  return run_to(NULL, args);
}

static void done(outcome *o) {
  free(o->out);
  free(o->err);
}

/* A word of the expected message tells which of the errors it is. */
Test(cli, usage_errors) {
  static const struct {
    const char *args[8], *err;
  } cases[] = {
      {{NULL}, "usage: keepsake VERB"},
      {{"explian"}, "there is no verb explian; did you mean explain?"},
      {{"frobnicate"}, "there is no verb frobnicate; keepsake --help lists them"},
      {{"explain", "--colour"}, "there is no option --colour"},
      {{"validate", "--shards", "0/2"}, "there is no option --shards; did you mean --shard?"},
      {{"validate", "--shard"}, "--shard wants a value: I/N"},
      {{"validate", "--print=yes"}, "--print takes no value"},
      {{"validate", "a.cfg", "b.cfg"}, "one operand too many: b.cfg"},
      {{"validate", "-x"}, "there is no option -x"},
      {{"run"}, "run wants CONFIG"},
      {{"validate", "--shard", "2/2"}, "--shard 2/2: wants i/n"},
      {{"validate", "no/such.cfg"}, "no/such.cfg: cannot open: No such file or directory"},
      {{"validate", "--set", "train.epochs=x"}, "--set train.epochs=x: wants an integer, got \"x\""},
      {{"validate", "tests/fixtures/config/bad/unknown_key.cfg"},
       "tests/fixtures/config/bad/unknown_key.cfg:2: train.learning_rte: no such key; did you mean "
       "train.learning_rate?"},
      {{"run", "tests/fixtures/config/bad/wrapped_integer.cfg"},
       "wrapped_integer.cfg:2: the integer 3000000000 does not fit 32 bits"},
      {{"explain", "train.learning_rat"}, "did you mean train.learning_rate?"},
      {{"ls", "polices"}, "did you mean policies?"},
      {{"generate", "--temperature", "hot"}, "--temperature hot: wants a number from 0 to 100"},
      {{"generate", "--top-p=0"}, "--top-p 0: nothing is left"},
      {{"generate", "--dtype=f64"}, "--dtype f64"},
      {{"generate", "--max-new-tokens=-1"}, "--max-new-tokens -1: wants an integer from 0"},
      {{"generate", "--prompt=\xff"}, "--prompt: not UTF-8 at byte 0"},
      {{"generate", "--model=tests/fixtures/config/good/words.tsv"}, "tests/fixtures/config/good/words.tsv"},
      {{"show", "no/such/folder"}, "no/such/folder"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    outcome o = run(cases[i].args);
    cr_expect_eq(o.exit_code, 2, "case %zu: exit code %d: %s", i, o.exit_code, o.err);
    cr_expect(strstr(o.err, cases[i].err), "case %zu: %s", i, o.err);
    cr_expect_str_eq(o.out, "", "case %zu: results only on stdout", i);
    done(&o);
  }
}

Test(cli, answers_on_stdout) {
  static const struct {
    const char *args[8], *out;
  } cases[] = {
      {{"--help"}, "validate"},
      {{"--version"}, "keepsake 0."},
      {{"validate", "--help"}, "--shard I/N"},
      {{"explain"}, "learning_rate"},
      {{"explain", "train.learning_rate"}, "default 0.0003"},
      {{"explain", "buffer", "seed"}, "or a list"},
      {{"ls"}, "sdss"},
      {{"ls", "backends"}, "ready on"},
      {{"ls", "operations", "importers"}, "attention_forward"},
      {{"validate"}, "default: 3 cells, results in results/default"},
      {{"validate", "--shard=1/2"}, "--shard 1/2: 1 of them"},
      {{"validate", "--cells", "--set", "seed=3", "--set=policy=fifo"}, "fifo-s3\n"},
      {{"validate", "configs/quickstart.cfg", "--print"}, "stream_size = 480;"},
      {{"validate", "--", "configs/quickstart.cfg"}, "quickstart: 18 cells"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    outcome o = run(cases[i].args);
    cr_expect_eq(o.exit_code, 0, "case %zu: exit code %d: %s", i, o.exit_code, o.err);
    cr_expect(strstr(o.out, cases[i].out), "case %zu: %s", i, o.out);
    cr_expect_str_eq(o.err, "", "case %zu", i);
    done(&o);
  }
}

/* Each error of a file on its own line, and no other text. */
Test(cli, all_errors_one_a_line) {
  outcome o = run((const char *[]){"validate", "tests/fixtures/config/bad/out_of_range.cfg", NULL});
  int lines = 0;
  for (char *p = o.err, *end; (end = strchr(p, '\n')); p = end + 1, lines++)
    cr_expect(strncmp(p, "keepsake: tests/fixtures/config/bad/out_of_range.cfg:", 53) == 0, "%s", p);
  cr_expect_eq(lines, 11);
  cr_expect_eq(o.exit_code, 2);
  done(&o);
}

Test(cli, a_full_disk_is_an_environment_error) {
  if (access("/dev/full", W_OK) != 0) cr_skip_test("no /dev/full here");
  outcome o = run_to("/dev/full", (const char *[]){"explain", NULL});
  cr_expect_eq(o.exit_code, 3);
  cr_expect(strstr(o.err, "standard output: No space left on device"), "%s", o.err);
  done(&o);
}

Test(cli, works_from_any_folder) {
  cr_assert_eq(chdir("/"), 0);
  outcome o = run((const char *[]){"validate", KS_SOURCE_DIR "/configs/quickstart.cfg", NULL});
  cr_expect_eq(o.exit_code, 0, "%s", o.err);
  done(&o);
}

/* The same text for any number of threads, after the prompt as it was given. */
Test(cli, generate_continues_the_prompt) {
  outcome one = run((const char *[]){"generate", "--prompt", "Q: What is", "--temperature", "0.8", "--seed=3",
                                     "--max-new-tokens", "24", "--threads", "1", NULL});
  outcome two = run((const char *[]){"generate", "--prompt", "Q: What is", "--temperature", "0.8", "--seed=3",
                                     "--max-new-tokens", "24", "--threads", "2", NULL});
  cr_expect_eq(one.exit_code, 0, "%s", one.err);
  cr_expect(strncmp(one.out, "Q: What is", 10) == 0 && strlen(one.out) > 12, "%s", one.out);
  cr_expect_str_eq(one.out, two.out);
  cr_expect_str_eq(one.err, "");
  done(&one);
  done(&two);
}

/* The text that llama2.c's own test expects of stories260K (its test_all.py). */
Test(cli, generate_gives_the_golden_text) {
  static const char golden[] =
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
      "she saw a "
      "big, red ball. She wanted to play with it, but it was too high.\n"
      "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, "
      "\"I want to "
      "play with your ball, but I can't find it.\"\n"
      "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
      "Lily didn't want to help her mom, so she\n";
  const char *folder = getenv("KS_STORIES260K");
  if (!folder) cr_skip_test("set KS_STORIES260K to the folder of stories260K.bin and tok512.bin");
  char model[4096];
  snprintf(model, sizeof model, "%s/stories260K.bin", folder);
  outcome o = run((const char *[]){"generate", "--model", model, "--prompt", "", "--temperature", "0",
                                   "--max-new-tokens", "200", NULL});
  cr_expect_eq(o.exit_code, 0, "%s", o.err);
  cr_expect_str_eq(o.out, golden);
  done(&o);
}
