/* Damaged tokenizers: every kind, cut and mutated, encoding and decoding with whatever still loads. */
#include "core/model/tokenizer.h"
#include "tests/core/model/hostile.h"

#define FOLDER KS_SOURCE_DIR "/tests/fixtures/tokenizers"

static const char probe[] = "The harbour's 12 boats <s> \n\n  é日本 <|endoftext|> mask</s>\t1,000 ab->the";

static ks_status load(const char *path) {
  ks_tokenizer *t = NULL;
  KS_TRY(ks_tokenizer_load(path, 0, &t));
  int32_t *ids = NULL;
  size_t n = 0, cap = 0;
  ks_text text = {0};
  /* A damaged one may have no id for a byte, or a pattern that is too costly. */
  ks_status s = ks_tokenizer_encode(t, probe, sizeof probe - 1, true, &ids, &n, &cap);
  cr_assert(s == KS_OK || s == KS_EDATA, "%s: %s", ks_status_name(s), ks_error_message());
  for (size_t i = 0; i < n; i++)
    cr_assert(ids[i] >= 0 && ids[i] < ks_tokenizer_vocab_size(t), "id %d of %lld", ids[i],
              (long long)ks_tokenizer_vocab_size(t));
  s = ks_tokenizer_decode(t, ids, n, &text);
  cr_assert(s == KS_OK || s == KS_EDATA, "%s: %s", ks_status_name(s), ks_error_message());
  cr_assert_eq(ks_utf8_check(text.data ? text.data : "", text.len), text.len, "decoded text is not UTF-8");
  ks_text_free(&text);
  free(ids);
  ks_tokenizer_destroy(t);
  return KS_OK;
}

static void attack(const char *name, size_t n_dense, size_t n_more, size_t n_copies) {
  char source[1024], path[64] = "/tmp/ks_hostile_XXXXXX", *bytes;
  size_t n, before = ks_process_peak_bytes();
  snprintf(source, sizeof source, "%s/%s", FOLDER, name);
  cr_assert_eq(ks_file_read(source, 1 << 20, &bytes, &n), KS_OK);
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  hostile h = {.path = path, .load_path = path, .load = load};
  hostile_try(&h, bytes, n, "whole", n);
  cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
  hostile_truncate(&h, bytes, n, n_dense, n_more);
  cr_expect_eq(h.n_loaded, 1, "%s: %lld cut files were taken for whole ones", name,
               (long long)h.n_loaded - 1);
  hostile_mutate(&h, bytes, n, n, n_copies);
  cr_expect_gt(h.n_refused, (int64_t)(n_copies / 20), "%s: too few refused: the damage does not bite", name);
  hostile_limit_memory(before, 64);
  unlink(path);
  free(bytes);
}

Test(tokenizer_hostile, json) {
  attack("added.json", 300, 100, 1200);
  attack("llama2.json", 100, 100, 800);
  attack("digits.json", 100, 100, 800);
}

/* A SentencePiece file has no length of its own: cut between two fields it is a shorter message. */
static void attack_sentencepiece(const char *name) {
  char source[1024], path[64] = "/tmp/ks_hostile_XXXXXX", *bytes;
  size_t n, before = ks_process_peak_bytes();
  snprintf(source, sizeof source, "%s/%s", FOLDER, name);
  cr_assert_eq(ks_file_read(source, 1 << 20, &bytes, &n), KS_OK);
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  hostile h = {.path = path, .load_path = path, .load = load};
  hostile_try(&h, bytes, n, "whole", n);
  cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
  hostile_truncate(&h, bytes, n, 300, 300);
  hostile_mutate(&h, bytes, n, n, 1500);
  hostile_mutate(&h, bytes + n - 300, 300, 300, 200); /* the options alone */
  cr_expect_gt(h.n_refused, 500, "%s: too few refused: the damage does not bite", name);
  hostile_limit_memory(before, 64);
  unlink(path);
  free(bytes);
}

Test(tokenizer_hostile, sentencepiece) {
  attack_sentencepiece("sp_bpe_user.model");
  attack_sentencepiece("sp_bpe_rules.model");
  attack_sentencepiece("sp_bpe_unused.model");
  attack_sentencepiece("sp_unigram_rules.model");
}

Test(tokenizer_hostile, llama2c) {
  char path[64] = "/tmp/ks_hostile_XXXXXX", *bytes;
  size_t n, before = ks_process_peak_bytes();
  cr_assert_eq(ks_file_read(FOLDER "/llama2c.bin", 1 << 20, &bytes, &n), KS_OK);
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  hostile h = {.path = path, .load_path = path, .load = load};
  hostile_try(&h, bytes, n, "whole", n);
  cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
  hostile_truncate(&h, bytes, n, 400, 300);
  hostile_mutate(&h, bytes, n, 4096, 3000);
  cr_expect_gt(h.n_refused, 1000);
  hostile_limit_memory(before, 64);
  unlink(path);
  free(bytes);
}

static ks_status load_bytes(const char *bytes, size_t n) {
  char path[64] = "/tmp/ks_hostile_XXXXXX";
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  hostile_write(path, bytes, n);
  ks_status s = load(path);
  unlink(path);
  return s;
}

/* JSON that is deep, and a pattern that would run for ages. */
Test(tokenizer_hostile, deep_json_and_costly_pattern) {
  enum { DEEP = 200000 };
  ks_text t = {0};
  for (int i = 0; i < DEEP; i++)
    cr_assert_eq(ks_text_add_str(&t, "{\"a\":["), KS_OK);
  cr_expect_eq(load_bytes(t.data, t.len), KS_EDATA);
  ks_text_clear(&t);
  cr_assert_eq(ks_text_add_str(&t, "{\"normalizer\":"), KS_OK);
  for (int i = 0; i < 1000; i++)
    cr_assert_eq(ks_text_add_str(&t, "{\"type\":\"Sequence\",\"normalizers\":["), KS_OK);
  for (int i = 0; i < 1000; i++)
    cr_assert_eq(ks_text_add_str(&t, "]}"), KS_OK);
  cr_assert_eq(ks_text_add_str(&t, ",\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}"), KS_OK);
  cr_expect_eq(load_bytes(t.data, t.len), KS_OK, "%s", ks_error_message());
  ks_text_clear(&t);
  static const char costly[] = "{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?:a|aa)+[bc]"
                               "\"},\"behavior\":\"Isolated\"},"
                               "\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}";
  cr_assert_eq(ks_text_add_str(&t, costly), KS_OK);
  char path[64] = "/tmp/ks_hostile_XXXXXX";
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  hostile_write(path, t.data, t.len);
  ks_tokenizer *tok;
  cr_assert_eq(ks_tokenizer_load(path, 0, &tok), KS_OK, "%s", ks_error_message());
  char text[2000];
  memset(text, 'a', sizeof text);
  int32_t *ids = NULL;
  size_t n = 0, cap = 0;
  cr_expect_eq(ks_tokenizer_encode(tok, text, sizeof text, false, &ids, &n, &cap), KS_EDATA);
  cr_expect(strstr(ks_error_message(), "costly"), "%s", ks_error_message());
  cr_expect_eq(n, 0);
  free(ids);
  ks_tokenizer_destroy(tok);
  unlink(path);
  ks_text_free(&t);
}

/* Encoding grows with the text, not with its square: a megabyte without a blank. */
Test(tokenizer_hostile, a_long_word_is_not_quadratic) {
  enum { N = 1 << 20 };
  static const char *const names[] = {"sp_bpe_llama.model", "sp_unigram_llama.model", "llama2c.bin",
                                      "gpt2.json", "llama2.json"};
  char *text = malloc(N);
  for (size_t i = 0; i < N; i++)
    text[i] = "walked and the"[i % 14] == ' ' ? 'x' : "walked and the"[i % 14];
  for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
    char path[1024];
    ks_tokenizer *t;
    snprintf(path, sizeof path, "%s/%s", FOLDER, names[k]);
    cr_assert_eq(ks_tokenizer_load(path, 0, &t), KS_OK);
    double seconds[2];
    for (int round = 0; round < 2; round++) { /* a sixteenth, then all */
      size_t n = round ? N : N / 16, n_ids = 0, cap = 0;
      int32_t *ids = NULL;
      double begin = ks_clock_seconds();
      cr_assert_eq(ks_tokenizer_encode(t, text, n, false, &ids, &n_ids, &cap), KS_OK);
      seconds[round] = ks_clock_seconds() - begin;
      cr_expect_gt(n_ids, n / 20);
      free(ids);
    }
    /* Quadratic: 256 times as long. */
    cr_expect_lt(seconds[1], 100 * seconds[0] + 0.5, "%s: %g s for a sixteenth, %g s for all", names[k],
                 seconds[0], seconds[1]);
    ks_tokenizer_destroy(t);
  }
  free(text);
}
