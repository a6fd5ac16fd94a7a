#include "core/model/tok.h"

enum { MAX_FILE = 256 << 20 };

ks_status ks_ids_add(ks_ids *out, int32_t id) {
  if (*out->n == *out->cap) {
    size_t cap = *out->cap ? 2 * *out->cap : 64;
    int32_t *ids = cap > SIZE_MAX / sizeof *ids ? NULL : realloc(*out->ids, cap * sizeof *ids);
    if (!ids) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for %zu ids", cap);
    *out->ids = ids;
    *out->cap = cap;
  }
  (*out->ids)[(*out->n)++] = id;
  return KS_OK;
}

ks_status ks_tok_check_size(const char *path, int64_t n_ids, int64_t vocab_size) {
  if (vocab_size == 0 || n_ids <= vocab_size) return KS_OK;
  return KS_FAIL(KS_EDATA, "%s: has %lld tokens, but the model only %lld; name the model's own tokenizer",
                 path, (long long)n_ids, (long long)vocab_size);
}

/* A Hugging Face folder usually holds both files; its library reads tokenizer.json. */
static ks_status find_file(const char *path, char **out) {
  if (!ks_dir_exists(path)) return ks_strdup(path, out);
  static const char *const names[] = {"tokenizer.json", "tokenizer.model"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    KS_TRY(ks_path_join(path, names[i], out));
    if (ks_file_exists(*out)) return KS_OK;
    free(*out);
    *out = NULL;
  }
  return KS_FAIL(KS_EDATA, "%s: holds neither tokenizer.json nor tokenizer.model; name the tokenizer's file",
                 path);
}

typedef ks_status (*loader)(const char *, char *, size_t, int64_t, ks_tokenizer **);

/* JSON starts with a brace; a SentencePiece file with field 1 of its message (a piece, never of length 0);
 * what is left starts with llama2.c's 32-bit longest length. */
static loader find_loader(const char *file, size_t n) {
  size_t i = 0;
  while (i < n && strchr(" \t\r\n", file[i]) && file[i])
    i++;
  if (i < n && file[i] == '{') return ks_tok_load_json;
  if (n >= 2 && file[0] == 0x0A && file[1] != 0) return ks_tok_load_sentencepiece;
  return ks_tok_load_llama2c;
}

ks_status ks_tokenizer_load(const char *path, int64_t vocab_size, ks_tokenizer **out) {
  char *name = NULL, *file = NULL;
  size_t n = 0;
  ks_tokenizer *t = NULL;
  ks_status status;
  *out = NULL;
  if (vocab_size < 0 || vocab_size > INT32_MAX)
    return KS_FAIL(KS_EINVAL, "tokenizer: vocab_size is %lld; give 0 or the model's", (long long)vocab_size);
  KS_TRY_OUT(find_file(path, &name));
  KS_TRY_OUT(ks_file_read(name, MAX_FILE, &file, &n));
  char sha256[65];
  ks_sha256 h;
  ks_sha256_init(&h);
  ks_sha256_add(&h, file, n);
  ks_sha256_finish(&h, sha256);
  KS_TRY_OUT(find_loader(file, n)(name, file, n, vocab_size, &t));
  file = NULL;
  memcpy(t->sha256, sha256, sizeof sha256);
  *out = t;
out:
  free(file);
  free(name);
  return status;
}

void ks_tokenizer_destroy(ks_tokenizer *t) {
  if (t) t->kind->destroy(t);
}

int64_t ks_tokenizer_vocab_size(const ks_tokenizer *t) {
  return t->vocab_size;
}

int32_t ks_tokenizer_bos(const ks_tokenizer *t) {
  return t->bos;
}

int32_t ks_tokenizer_eos(const ks_tokenizer *t) {
  return t->eos;
}

const char *ks_tokenizer_sha256(const ks_tokenizer *t) {
  return t->sha256;
}

ks_status ks_tokenizer_encode(const ks_tokenizer *t, const char *text, size_t n, bool add_bos, int32_t **ids,
                              size_t *n_ids, size_t *cap) {
  if (n >= INT32_MAX) return KS_FAIL(KS_EOVERFLOW, "tokenizer: a text of %zu bytes; cut it", n);
  size_t bad = ks_utf8_check(text, n);
  if (bad < n)
    return KS_FAIL(KS_EDATA, "tokenizer: byte %zu of the text (0x%02x) is not UTF-8; convert the text", bad,
                   (unsigned char)text[bad]);
  ks_ids out = {ids, n_ids, cap};
  size_t n_before = *n_ids;
  ks_status status = KS_OK;
  if (add_bos && t->bos >= 0) status = ks_ids_add(&out, t->bos);
  if (status == KS_OK && n > 0) status = t->kind->encode(t, text, n, &out);
  if (status != KS_OK) *n_ids = n_before;
  return status;
}

ks_status ks_tokenizer_decode(const ks_tokenizer *t, const int32_t *ids, size_t n_ids, ks_text *out) {
  for (size_t i = 0; i < n_ids; i++)
    if (ids[i] < 0) return KS_FAIL(KS_EINVAL, "tokenizer: id %zu is %d; ids are 0 or more", i, ids[i]);
  return t->kind->decode(t, ids, n_ids, out);
}

ks_status ks_tok_add_bytes(ks_text *out, const char *bytes, size_t n) {
  size_t i = 0;
  while (i < n) {
    size_t good = ks_utf8_check(bytes + i, n - i);
    KS_TRY(ks_text_add(out, bytes + i, good));
    i += good;
    if (i == n) break;
    KS_TRY(ks_text_add_str(out, KS_REPLACEMENT));
    i++;
  }
  return KS_OK;
}
