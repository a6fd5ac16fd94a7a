/* Ids and texts against sentencepiece, tokenizers and llama2.c: tests/fixtures/make_tokenizers.py. */
#include "core/model/tokenizer.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <unistd.h>

#define FOLDER KS_SOURCE_DIR "/tests/fixtures/tokenizers"

static ks_tokenizer *load(const char *folder, const char *name, int64_t vocab_size) {
  char path[1024];
  ks_tokenizer *t = NULL;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  cr_assert_eq(ks_tokenizer_load(path, vocab_size, &t), KS_OK, "%s: %s", name, ks_error_message());
  return t;
}

typedef struct {
  int32_t *ids;
  size_t n, cap;
} id_list;

static id_list encode(const ks_tokenizer *t, const char *text, size_t n) {
  id_list l = {0};
  cr_assert_eq(ks_tokenizer_encode(t, text, n, false, &l.ids, &l.n, &l.cap), KS_OK, "%s", ks_error_message());
  return l;
}

static bool same_ids(const id_list *l, const json_t *expected) {
  bool same = l->n == json_array_size(expected);
  for (size_t i = 0; same && i < l->n; i++)
    same = l->ids[i] == json_integer_value(json_array_get(expected, i));
  return same;
}

static bool decodes_to(const ks_tokenizer *t, const json_t *ids, const char *text, size_t n) {
  ks_text out = {0};
  size_t n_ids = json_array_size(ids);
  int32_t *list = malloc((n_ids + 1) * sizeof *list);
  for (size_t i = 0; i < n_ids; i++)
    list[i] = (int32_t)json_integer_value(json_array_get(ids, i));
  cr_assert_eq(ks_tokenizer_decode(t, list, n_ids, &out), KS_OK, "%s", ks_error_message());
  bool same = out.len == n && (n == 0 || memcmp(out.data, text, n) == 0);
  if (!same) cr_log_warn("decoded \"%s\", expected \"%s\"", out.data ? out.data : "", text);
  ks_text_free(&out);
  free(list);
  return same;
}

static void check_texts(const char *name, const ks_tokenizer *t, const json_t *texts, const json_t *c) {
  const json_t *all_ids = json_object_get(c, "ids"), *decoded = json_object_get(c, "decoded");
  cr_assert_eq(json_array_size(all_ids), json_array_size(texts));
  size_t different = 0;
  for (size_t i = 0; i < json_array_size(texts); i++) {
    const json_t *text = json_array_get(texts, i), *ids = json_array_get(all_ids, i),
                 *back = json_array_get(decoded, i);
    if (!json_is_string(back)) back = text;
    id_list l = encode(t, json_string_value(text), json_string_length(text));
    bool same = same_ids(&l, ids) && decodes_to(t, ids, json_string_value(back), json_string_length(back));
    different += !same;
    if (!same) cr_log_warn("%s: text %zu: \"%s\"", name, i, json_string_value(text));
    free(l.ids);
  }
  cr_expect_eq(different, 0, "%s: %zu of %zu texts differ", name, different, json_array_size(texts));
}

static void check_random_ids(const char *name, const ks_tokenizer *t, const json_t *c) {
  const json_t *all_ids = json_object_get(c, "random_ids"), *texts = json_object_get(c, "random_text");
  for (size_t i = 0; i < json_array_size(all_ids); i++) {
    const json_t *text = json_array_get(texts, i);
    cr_expect(decodes_to(t, json_array_get(all_ids, i), json_string_value(text), json_string_length(text)),
              "%s: ids %zu", name, i);
  }
}

static void check_long(const char *name, const ks_tokenizer *t, const json_t *text, const json_t *expected) {
  id_list l = encode(t, json_string_value(text), json_string_length(text));
  int64_t sum = 0;
  for (size_t i = 0; i < l.n; i++)
    sum = (int64_t)(((__int128)sum * 31 + l.ids[i] + 1) % ((int64_t)1 << 53));
  cr_expect_eq((int64_t)l.n, json_integer_value(json_array_get(expected, 0)), "%s: %zu ids of the long text",
               name, l.n);
  cr_expect_eq(sum, json_integer_value(json_array_get(expected, 1)), "%s: ids of the long text", name);
  free(l.ids);
}

static void check_folder(const char *folder) {
  char path[1024];
  json_error_t error;
  snprintf(path, sizeof path, "%s/cases.json", folder);
  json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error), *c;
  cr_assert(root, "%s: %s", path, error.text);
  const json_t *list = json_object_get(root, "tokenizers"), *texts = json_object_get(root, "texts");
  size_t i;
  cr_assert_gt(json_array_size(list), 0);
  json_array_foreach(list, i, c) {
    const char *name = json_string_value(json_object_get(c, "file"));
    ks_tokenizer *t = load(folder, name, 0);
    cr_expect_eq(ks_tokenizer_vocab_size(t), json_integer_value(json_object_get(c, "vocab_size")), "%s",
                 name);
    cr_expect_eq(ks_tokenizer_bos(t), json_integer_value(json_object_get(c, "bos")), "%s: bos", name);
    cr_expect_eq(ks_tokenizer_eos(t), json_integer_value(json_object_get(c, "eos")), "%s: eos", name);
    check_texts(name, t, texts, c);
    check_random_ids(name, t, c);
    check_long(name, t, json_object_get(root, "long"), json_object_get(c, "long"));
    ks_tokenizer_destroy(t);
  }
  json_decref(root);
}

Test(tokenizer, equal_to_the_original_libraries) {
  check_folder(FOLDER);
}

/* The same on tokenizers that are not part of the project, made by make_tokenizers.py FOLDER TEXTS. */
Test(tokenizer, equal_on_other_tokenizers) {
  const char *folder = getenv("KS_TOKENIZER_CASES");
  if (!folder) cr_skip_test("KS_TOKENIZER_CASES names no folder");
  check_folder(folder);
}

Test(tokenizer, appends_and_restores) {
  ks_tokenizer *t = load(FOLDER, "sp_bpe_llama.model", 0);
  id_list l = {0};
  ks_status first = ks_tokenizer_encode(t, "the", 3, true, &l.ids, &l.n, &l.cap);
  cr_assert_eq(first, KS_OK);
  cr_expect_eq(l.ids[0], ks_tokenizer_bos(t));
  size_t n = l.n;
  cr_expect_eq(ks_tokenizer_encode(t, "", 0, false, &l.ids, &l.n, &l.cap), KS_OK);
  cr_expect_eq(l.n, n);
  cr_expect_eq(ks_tokenizer_encode(t, NULL, 0, true, &l.ids, &l.n, &l.cap), KS_OK);
  cr_expect_eq(l.n, n + 1);
  cr_expect_eq(ks_tokenizer_encode(t, "ab\xff", 3, true, &l.ids, &l.n, &l.cap), KS_EDATA);
  cr_expect_eq(l.n, n + 1);
  cr_expect(strstr(ks_error_message(), "byte 2"), "%s", ks_error_message());
  cr_expect_eq(ks_tokenizer_encode(t, "\xed\xa0\x80", 3, false, &l.ids, &l.n, &l.cap), KS_EDATA,
               "a surrogate");
  cr_expect_eq(strlen(ks_tokenizer_sha256(t)), 64);
  free(l.ids);
  ks_tokenizer_destroy(t);
  ks_tokenizer_destroy(NULL);
}

Test(tokenizer, ids_out_of_range) {
  static const char *const names[] = {"sp_bpe_llama.model", "sp_unigram_user.model", "llama2c.bin",
                                      "gpt2.json", "llama2.json"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    ks_tokenizer *t = load(FOLDER, names[i], 0);
    ks_text out = {0};
    cr_expect_eq(ks_tokenizer_decode(t, (const int32_t[]){-1}, 1, &out), KS_EINVAL, "%s", names[i]);
    cr_expect_eq(
        ks_tokenizer_decode(t, (const int32_t[]){INT32_MAX, (int32_t)ks_tokenizer_vocab_size(t)}, 2, &out),
        KS_OK);
    cr_expect_eq(out.len, 0, "%s", names[i]);
    ks_text_free(&out);
    ks_tokenizer_destroy(t);
  }
}

Test(tokenizer, size_of_the_model) {
  static const struct {
    const char *name;
    int delta; /* of the model's vocabulary to the tokenizer's */
    ks_status status;
  } cases[] = {{"llama2c.bin", 0, KS_OK},
               {"llama2c.bin", -1, KS_EDATA},
               {"llama2c.bin", 1, KS_EDATA},
               {"sp_bpe_llama.model", 0, KS_OK},
               {"sp_bpe_llama.model", -1, KS_EDATA},
               {"sp_bpe_llama.model", 64, KS_OK},
               {"llama2.json", -1, KS_EDATA},
               {"llama2.json", 64, KS_OK}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_tokenizer *t = load(FOLDER, cases[i].name, 0), *sized = NULL;
    int64_t n = ks_tokenizer_vocab_size(t) + cases[i].delta;
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", FOLDER, cases[i].name);
    cr_expect_eq(ks_tokenizer_load(path, n, &sized), cases[i].status, "%s for a model of %lld", cases[i].name,
                 (long long)n);
    ks_tokenizer_destroy(sized);
    ks_tokenizer_destroy(t);
  }
}

/* An added token beyond the model's vocabulary is an error where a text holds it, and only there. */
Test(tokenizer, added_token_beyond_the_model) {
  ks_tokenizer *t = load(FOLDER, "qwen2.json", 0);
  int64_t n = ks_tokenizer_vocab_size(t);
  ks_tokenizer_destroy(t);
  t = load(FOLDER, "qwen2.json", n - 1);
  id_list l = {0};
  cr_expect_eq(ks_tokenizer_encode(t, "a<|im_start|>b", 14, false, &l.ids, &l.n, &l.cap), KS_OK, "%s",
               ks_error_message());
  cr_expect_eq(ks_tokenizer_encode(t, "a<|im_end|>b", 12, false, &l.ids, &l.n, &l.cap), KS_EDATA);
  free(l.ids);
  ks_tokenizer_destroy(t);
}

/* ---------------------------------------------------------------- folders and files made here */

static char *make_folder(void) {
  char *folder = strdup("/tmp/ks_tokenizer_XXXXXX");
  cr_assert(mkdtemp(folder));
  return folder;
}

static void put(const char *folder, const char *name, const char *bytes, size_t n) {
  char *path;
  cr_assert_eq(ks_path_join(folder, name, &path), KS_OK);
  cr_assert_eq(ks_file_write_atomic(path, bytes, n), KS_OK, "%s", ks_error_message());
  free(path);
}

static void put_copy(const char *folder, const char *name, const char *from) {
  char path[1024], *bytes;
  size_t n;
  snprintf(path, sizeof path, "%s/%s", FOLDER, from);
  cr_assert_eq(ks_file_read(path, 1 << 20, &bytes, &n), KS_OK);
  put(folder, name, bytes, n);
  free(bytes);
}

static void remove_folder(char *folder) {
  static const char *const names[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "t.json"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    char *path;
    cr_assert_eq(ks_path_join(folder, names[i], &path), KS_OK);
    unlink(path);
    free(path);
  }
  rmdir(folder);
  free(folder);
}

Test(tokenizer, folder) {
  char *folder = make_folder();
  ks_tokenizer *t = NULL, *json = load(FOLDER, "llama3.json", 0);
  cr_expect_eq(ks_tokenizer_load(folder, 0, &t), KS_EDATA);
  cr_expect(strstr(ks_error_message(), "tokenizer.json"));
  put_copy(folder, "tokenizer.model", "sp_bpe_llama.model");
  t = load(folder, "", 0);
  cr_expect_neq(ks_tokenizer_vocab_size(t), ks_tokenizer_vocab_size(json));
  ks_tokenizer_destroy(t);
  put_copy(folder, "tokenizer.json", "llama3.json");
  static const char config[] = "{\"bos_token\": null, \"eos_token\": {\"content\": \"<|begin_of_text|>\"}}";
  put(folder, "tokenizer_config.json", config, sizeof config - 1);
  t = load(folder, "", 0);
  cr_expect_eq(ks_tokenizer_vocab_size(t), ks_tokenizer_vocab_size(json), "tokenizer.json goes first");
  cr_expect_eq(ks_tokenizer_bos(t), -1);
  cr_expect_eq(ks_tokenizer_eos(t), (int32_t)ks_tokenizer_vocab_size(t) - 3,
               "the first of three added tokens");
  id_list l = {0};
  cr_expect_eq(ks_tokenizer_encode(t, "a", 1, true, &l.ids, &l.n, &l.cap), KS_OK);
  cr_expect_eq(l.n, 1, "no bos, nothing added");
  free(l.ids);
  ks_tokenizer_destroy(t);
  ks_tokenizer_destroy(json);
  remove_folder(folder);
}

#define MODEL(options)                                                                                       \
  "\"model\":{\"type\":\"BPE\"," options "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}"

/* What is not supported is named; what makes no sense says where. */
Test(tokenizer, json_refused) {
  static const struct {
    const char *json, *says;
    ks_status status;
  } cases[] = {
      {"{" MODEL("") "}", NULL, KS_OK},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "Unigram", KS_EUNSUPPORTED},
      {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", "WordPiece", KS_EUNSUPPORTED},
      {"{\"normalizer\":{\"type\":\"BertNormalizer\"}," MODEL("") "}", "BertNormalizer", KS_EUNSUPPORTED},
      {"{\"pre_tokenizer\":{\"type\":\"Whitespace\"}," MODEL("") "}", "Whitespace", KS_EUNSUPPORTED},
      {"{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":"
       "\"Digits\"}]}," MODEL("") "}",
       "after ByteLevel", KS_EUNSUPPORTED},
      {"{\"decoder\":{\"type\":\"WordPiece\"}," MODEL("") "}", "WordPiece", KS_EUNSUPPORTED},
      {"{" MODEL("\"dropout\":0.1,") "}", "dropout", KS_EUNSUPPORTED},
      {"{" MODEL("\"end_of_word_suffix\":\"</w>\",") "}", "end_of_word_suffix", KS_EUNSUPPORTED},
      {"{" MODEL("\"unk_token\":\"<unk>\",") "}", "<unk>", KS_EDATA},
      {"{" MODEL("\"fuse_unk\":1,") "}", "fuse_unk", KS_EDATA},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a$\"},\"behavior\":\"Isolated\"}"
       "," MODEL("") "}",
       "anchor", KS_EUNSUPPORTED},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\w+\"},\"behavior\":\"Isolated\"}"
       "," MODEL("") "}",
       "escape", KS_EUNSUPPORTED},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a\"},\"behavior\":\"Isolated\"}"
       "," MODEL("") "}",
       "(a", KS_EDATA},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Odd\"}," MODEL(
           "") "}",
       "Odd", KS_EUNSUPPORTED},
      {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", "merges[0]", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\",\"b\"]]}}", "\"ab\"", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", "id 0", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", "\"a\"", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":2000000000},\"merges\":[]}}", "\"a\"", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":1.5},\"merges\":[]}}", "\"a\"", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", ":1:", KS_EDATA},
      {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":{}}}", "merges", KS_EDATA},
      {"{\"model\":{\"vocab\":{},\"merges\":[]}}", "vocab", KS_EDATA},
      {"{\"model\":[]}", "model", KS_EDATA},
      {"{}", "model", KS_EDATA},
      {"{", ":1:", KS_EDATA},
      {"{\"added_tokens\":[{\"id\":0,\"content\":\"b\"}]," MODEL("") "}", "added_tokens[0]", KS_EDATA},
      {"{\"added_tokens\":[{\"id\":3,\"content\":\"\"}]," MODEL("") "}", "added_tokens[0]", KS_EDATA},
      {"{\"added_tokens\":[{\"id\":-3,\"content\":\"x\"}]," MODEL("") "}", "added_tokens[0]", KS_EDATA},
      {"{\"added_tokens\":[{\"id\":1000000,\"content\":\"x\"}]," MODEL("") "}", "added_tokens[0]", KS_EDATA},
      {"{\"added_tokens\":[{\"id\":3,\"content\":7}]," MODEL("") "}", "added_tokens[0]", KS_EDATA},
  };
  char *folder = make_folder();
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_tokenizer *t = NULL;
    char path[1024];
    put(folder, "t.json", cases[i].json, strlen(cases[i].json));
    snprintf(path, sizeof path, "%s/t.json", folder);
    ks_error_clear();
    ks_status status = ks_tokenizer_load(path, 0, &t);
    cr_expect_eq(status, cases[i].status, "%s: %s: %s", cases[i].json, ks_status_name(status),
                 ks_error_message());
    if (cases[i].says)
      cr_expect(strstr(ks_error_message(), cases[i].says) && strstr(ks_error_message(), path), "%s: %s",
                cases[i].json, ks_error_message());
    ks_tokenizer_destroy(t);
  }
  remove_folder(folder);
}

/* A whole word that no merges lead to. */
Test(tokenizer, json_ignores_merges) {
  static const char *const options[] = {"", "\"ignore_merges\":true,"};
  char *folder = make_folder();
  for (size_t i = 0; i < 2; i++) {
    ks_text json = {0};
    cr_assert_eq(
        ks_text_addf(&json,
                     "{\"model\":{%s\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"abb\":3},\"merges\":[\"a b\"]}}",
                     options[i]),
        KS_OK);
    put(folder, "t.json", json.data, json.len);
    ks_tokenizer *t = load(folder, "t.json", 0);
    id_list l = encode(t, "abb", 3);
    cr_expect_eq(l.n, i == 0 ? 2 : 1);
    cr_expect_eq(l.ids[0], i == 0 ? 2 : 3);
    free(l.ids);
    ks_tokenizer_destroy(t);
    ks_text_free(&json);
  }
  remove_folder(folder);
}

/* ---------------------------------------------------------------- merging against its definition */

enum { N_PIECES = 60 };
typedef struct {
  char bytes[N_PIECES][8];
  float scores[N_PIECES];
} small_vocab;

static int find_piece(const small_vocab *v, const char *bytes, size_t n) {
  for (int i = 3; i < N_PIECES; i++)
    if (strlen(v->bytes[i]) == n && memcmp(v->bytes[i], bytes, n) == 0) return i;
  return -1;
}

/* llama2.c's file with single characters and random longer pieces; scores with many ties. */
static void draw_vocab(ks_rng *rng, small_vocab *v, ks_text *file) {
  const int32_t longest = 7;
  memset(v, 0, sizeof *v);
  cr_assert_eq(ks_text_add(file, (const char *)&longest, 4), KS_OK);
  for (int i = 0; i < N_PIECES; i++) {
    char *piece = v->bytes[i];
    if (i < 3) {
      memcpy(piece, "<0>", 4);
      piece[1] = (char)('0' + i);
    } else if (i < 6) {
      piece[0] = " ab"[i - 3];
    } else {
      do {
        size_t n = 2 + (size_t)ks_rng_below(rng, 6);
        memset(piece, 0, 8);
        for (size_t j = 0; j < n; j++)
          piece[j] = " ab"[ks_rng_below(rng, 3)];
      } while (find_piece(v, piece, strlen(piece)) != i);
    }
    v->scores[i] = -(float)ks_rng_below(rng, 6);
    int32_t n = (int32_t)strlen(piece);
    cr_assert_eq(ks_text_add(file, (const char *)&v->scores[i], 4), KS_OK);
    cr_assert_eq(ks_text_add(file, (const char *)&n, 4), KS_OK);
    cr_assert_eq(ks_text_add(file, piece, (size_t)n), KS_OK);
  }
}

/* Again and again the pair of the highest score, of these the leftmost. */
static size_t merge_plainly(const small_vocab *v, const char *text, size_t n, int *ids) {
  size_t n_ids = 0;
  ids[n_ids++] = find_piece(v, " ", 1);
  for (size_t i = 0; i < n; i++)
    ids[n_ids++] = find_piece(v, text + i, 1);
  for (;;) {
    size_t best = n_ids;
    int best_id = -1;
    for (size_t i = 0; i + 1 < n_ids; i++) {
      char both[16];
      snprintf(both, sizeof both, "%s%s", v->bytes[ids[i]], v->bytes[ids[i + 1]]);
      int id = find_piece(v, both, strlen(both));
      if (id < 0 || (best_id >= 0 && v->scores[id] <= v->scores[best_id])) continue;
      best = i;
      best_id = id;
    }
    if (best_id < 0) return n_ids;
    ids[best] = best_id;
    memmove(ids + best + 1, ids + best + 2, (n_ids - best - 2) * sizeof *ids);
    n_ids--;
  }
}

Test(tokenizer, merging_as_defined) {
  char *folder = make_folder();
  for (uint64_t round = 0; round < 40; round++) {
    ks_rng rng = ks_rng_make(3, KS_RNG_TEST, round);
    small_vocab v;
    ks_text file = {0};
    draw_vocab(&rng, &v, &file);
    put(folder, "t.json", file.data, file.len);
    ks_tokenizer *t = load(folder, "t.json", N_PIECES);
    for (int k = 0; k < 60; k++) {
      char text[64];
      int expected[64];
      size_t n = 1 + (size_t)ks_rng_below(&rng, 60);
      for (size_t i = 0; i < n; i++)
        text[i] = " ab"[ks_rng_below(&rng, 3)];
      id_list l = encode(t, text, n);
      size_t n_expected = merge_plainly(&v, text, n, expected);
      bool same = l.n == n_expected;
      for (size_t i = 0; same && i < l.n; i++)
        same = l.ids[i] == expected[i];
      cr_assert(same, "round %d, text \"%.*s\"", (int)round, (int)n, text);
      free(l.ids);
    }
    ks_tokenizer_destroy(t);
    ks_text_free(&file);
  }
  remove_folder(folder);
}

Test(tokenizer, no_file) {
  ks_tokenizer *t = (ks_tokenizer *)&t;
  cr_expect_eq(ks_tokenizer_load("/nonexistent/tokenizer.model", 0, &t), KS_EDATA);
  cr_expect_null(t);
  cr_expect(strstr(ks_error_message(), "/nonexistent/tokenizer.model"));
  cr_expect_eq(ks_tokenizer_load(FOLDER "/llama2c.bin", -1, &t), KS_EINVAL);
}
