#include "core/model/tok_json.h"

#include <stdio.h>

/* Ids may have gaps, but not so many that a damaged file asks for much memory. */
static int64_t most_ids(size_t n_tokens) {
  return 8 * (int64_t)n_tokens + 1024;
}

static void destroy(ks_tokenizer *base) {
  ks_json_tokenizer *t = (ks_json_tokenizer *)base;
  ks_json_free_parts(t);
  for (size_t i = 0; i < t->n_added; i++) {
    free(t->added[i].content.bytes);
    free(t->added[i].normalized_content.bytes);
  }
  free(t->added);
  ks_trie_free(&t->raw);
  ks_trie_free(&t->normalized);
  ks_vocab_free(&t->vocab);
  ks_vocab_free(&t->keys);
  free(t->pairs);
  free(t->arena);
  free(t);
}

static const ks_tok_kind kind = {ks_json_encode, ks_json_decode, destroy};

/* ---------------------------------------------------------------- added tokens */

static ks_status read_added(ks_added_token *a, const json_t *entry, size_t i) {
  const json_t *id = json_object_get(entry, "id");
  KS_TRY_AS(ks_json_string(json_object_get(entry, "content"), "content", &a->content), "added_tokens[%zu]",
            i);
  if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX)
    return KS_FAIL(KS_EDATA, "added_tokens[%zu]: its id is no id", i);
  a->id = (int32_t)json_integer_value(id);
  if (a->content.n == 0) return KS_FAIL(KS_EDATA, "added_tokens[%zu]: it is empty", i);
  const struct {
    const char *key;
    bool *out;
  } flags[] = {{"single_word", &a->single_word},
               {"lstrip", &a->lstrip},
               {"rstrip", &a->rstrip},
               {"normalized", &a->normalized},
               {"special", &a->special}};
  for (size_t f = 0; f < sizeof flags / sizeof flags[0]; f++)
    KS_TRY_AS(ks_json_bool(entry, flags[f].key, false, flags[f].out), "added_tokens[%zu]", i);
  return KS_OK;
}

static ks_status read_all_added(ks_json_tokenizer *t, const json_t *list) {
  const json_t *entry;
  size_t i;
  if (!list || json_is_null(list)) return KS_OK;
  if (!json_is_array(list)) return KS_FAIL(KS_EDATA, "added_tokens is no array");
  KS_TRY(ks_alloc_array(&t->added, json_array_size(list), sizeof *t->added, "tokenizer: added tokens"));
  json_array_foreach(list, i, entry) {
    t->n_added++;
    KS_TRY(read_added(&t->added[i], entry, i));
  }
  return KS_OK;
}

/* What is looked for in normalized text is the token's own normal form, and that is what it decodes to. */
static ks_status index_added(ks_json_tokenizer *t) {
  size_t n_raw = 0, n_normalized = 0;
  for (size_t i = 0; i < t->n_added; i++) {
    ks_added_token *a = &t->added[i];
    if (!a->normalized) {
      n_raw += a->content.n;
      continue;
    }
    ks_text text = {0};
    ks_status status = ks_text_add(&text, a->content.bytes, a->content.n);
    if (status == KS_OK) status = ks_json_normalize(t, &text);
    a->normalized_content = (ks_string){text.data, text.len};
    KS_TRY(status);
    n_normalized += text.len;
    t->vocab.pieces[a->id].bytes = text.data;
    t->vocab.pieces[a->id].n = (uint32_t)text.len;
  }
  KS_TRY(ks_trie_init(&t->raw, n_raw));
  KS_TRY(ks_trie_init(&t->normalized, n_normalized));
  for (size_t i = t->n_added; i-- > 0;) { /* of equal ones the first counts */
    const ks_added_token *a = &t->added[i];
    const ks_string *s = a->normalized ? &a->normalized_content : &a->content;
    if (s->n > 0) ks_trie_add(a->normalized ? &t->normalized : &t->raw, s->bytes, s->n, (int32_t)i);
  }
  t->has_raw = n_raw > 0;
  t->has_normalized = n_normalized > 0;
  return KS_OK;
}

/* ---------------------------------------------------------------- vocabulary */

static ks_status scan_vocab(const json_t *vocab, size_t n_added, int64_t *max_id, size_t *n_bytes) {
  const char *token;
  json_t *id;
  *max_id = -1;
  *n_bytes = 0;
  int64_t most = most_ids(json_object_size(vocab) + n_added);
  json_object_foreach((json_t *)(uintptr_t)vocab, token, id) {
    int64_t value = json_is_integer(id) ? (int64_t)json_integer_value(id) : -1;
    if (value < 0 || value >= most)
      return KS_FAIL(KS_EDATA, "model.vocab: the id of \"%.100s\" is no id below %lld", token,
                     (long long)most);
    *max_id = ks_max_i64(*max_id, value);
    *n_bytes += strlen(token);
  }
  return KS_OK;
}

/* The bytes that a byte-level token stands for; false when a character of it stands for none. */
static bool byte_level_key(const char *token, size_t n, char *out, uint32_t *n_out) {
  *n_out = 0;
  for (size_t i = 0, len; i < n; i += len) {
    uint32_t cp = 0;
    len = (size_t)ks_utf8_decode(token + i, n - i, &cp);
    int byte = len ? ks_byte_level_byte(cp) : -1;
    if (byte < 0) return false;
    out[(*n_out)++] = (char)byte;
  }
  return true;
}

static ks_status fill_vocab(ks_json_tokenizer *t, const json_t *vocab, size_t n_bytes) {
  const char *token;
  json_t *value;
  KS_TRY(ks_alloc_array(&t->arena, 2 * n_bytes + 1, 1, "tokenizer: tokens"));
  char *at = t->arena;
  json_object_foreach((json_t *)(uintptr_t)vocab, token, value) {
    int32_t id = (int32_t)json_integer_value(value);
    size_t n = strlen(token);
    ks_piece *p = &t->vocab.pieces[id], *key = &t->keys.pieces[id];
    if (p->bytes)
      return KS_FAIL(KS_EDATA, "model.vocab: \"%.100s\" and \"%.*s\" both have id %d", token,
                     (int)(p->n < 100 ? p->n : 100), p->bytes, id);
    memcpy(at, token, n);
    *p = *key = (ks_piece){.bytes = at, .n = (uint32_t)n, .kind = KS_PIECE_NORMAL};
    at += n;
    if (t->byte_level) {
      key->bytes = at;
      if (!byte_level_key(token, n, at, &key->n)) continue; /* no text leads to it */
      at += key->n;
    }
    if (key->n > 0) (void)ks_vocab_index(&t->keys, id);
  }
  return KS_OK;
}

/* Added tokens get their ids' places, too; special ones are not decoded. */
static ks_status place_added(ks_json_tokenizer *t) {
  for (size_t i = 0; i < t->n_added; i++) {
    const ks_added_token *a = &t->added[i];
    ks_piece *p = &t->vocab.pieces[a->id];
    if (p->bytes && (p->n != a->content.n || memcmp(p->bytes, a->content.bytes, p->n) != 0))
      return KS_FAIL(KS_EDATA, "added_tokens[%zu]: \"%.100s\" has id %d, which is another token's", i,
                     a->content.bytes, a->id);
    p->bytes = a->content.bytes;
    p->n = (uint32_t)a->content.n;
    p->kind = a->special ? KS_PIECE_CONTROL : KS_PIECE_NORMAL;
  }
  return KS_OK;
}

static ks_status read_vocab(ks_json_tokenizer *t, const json_t *vocab, const char *path, int64_t vocab_size) {
  int64_t max_id;
  size_t n_bytes;
  if (!json_is_object(vocab) || json_object_size(vocab) == 0)
    return KS_FAIL(KS_EDATA, "model.vocab is no object with tokens");
  KS_TRY(scan_vocab(vocab, t->n_added, &max_id, &n_bytes));
  KS_TRY(ks_tok_check_size(path, max_id + 1, vocab_size));
  for (size_t i = 0; i < t->n_added; i++) {
    if (t->added[i].id >= most_ids(json_object_size(vocab) + t->n_added))
      return KS_FAIL(KS_EDATA, "added_tokens[%zu]: id %d is far beyond the vocabulary", i, t->added[i].id);
    max_id = ks_max_i64(max_id, t->added[i].id);
  }
  KS_TRY(ks_vocab_init(&t->vocab, (int32_t)(max_id + 1)));
  KS_TRY(ks_vocab_init(&t->keys, (int32_t)(max_id + 1)));
  KS_TRY(fill_vocab(t, vocab, n_bytes));
  t->base.vocab_size = max_id + 1;
  t->model_vocab_size = vocab_size;
  return KS_OK;
}

/* The id of a token as it stands in the file, or -1. */
static int32_t find_token(const ks_json_tokenizer *t, const json_t *vocab, const char *token) {
  const json_t *id = json_object_get(vocab, token);
  for (size_t i = 0; i < t->n_added && !id; i++)
    if (strcmp(t->added[i].content.bytes, token) == 0) return t->added[i].id;
  return id ? (int32_t)json_integer_value(id) : -1;
}

/* ---------------------------------------------------------------- merges */

static uint32_t pair_slot(const ks_json_tokenizer *t, uint64_t key) {
  uint32_t at = (uint32_t)(key * 0x9E3779B97F4A7C15u >> 32) & t->pairs_mask;
  while (t->pairs[at].key && t->pairs[at].key != key)
    at = (at + 1) & t->pairs_mask;
  return at;
}

static uint64_t pair_key(int32_t left, int32_t right) {
  return ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) + 1;
}

const ks_pair *ks_json_find_pair(const ks_json_tokenizer *t, int32_t left, int32_t right) {
  const ks_pair *p = &t->pairs[pair_slot(t, pair_key(left, right))];
  return p->key ? p : NULL;
}

/* "a b" or ["a", "b"], in `joined` one after the other. */
static ks_status read_merge(const json_t *entry, ks_text *joined, size_t *n_left) {
  const json_t *left = json_array_get(entry, 0), *right = json_array_get(entry, 1);
  ks_text_clear(joined);
  if (json_is_string(entry)) {
    const char *text = json_string_value(entry), *blank = strchr(text, ' ');
    if (!blank || strchr(blank + 1, ' ')) return KS_FAIL(KS_EDATA, "\"%.100s\" is not two tokens", text);
    *n_left = (size_t)(blank - text);
    KS_TRY(ks_text_add(joined, text, *n_left));
    return ks_text_add_str(joined, blank + 1);
  }
  if (json_array_size(entry) != 2 || !json_is_string(left) || !json_is_string(right))
    return KS_FAIL(KS_EDATA, "it is not two tokens");
  *n_left = json_string_length(left);
  KS_TRY(ks_text_add(joined, json_string_value(left), *n_left));
  return ks_text_add(joined, json_string_value(right), json_string_length(right));
}

static ks_status merge_token(const json_t *vocab, const char *bytes, size_t n, int32_t *id) {
  char *key; /* jansson 2.13, Ubuntu 22.04's, cannot look up a span */
  KS_TRY(ks_strndup(bytes, n, &key));
  const json_t *v = strlen(key) == n ? json_object_get(vocab, key) : NULL;
  free(key);
  if (!v) return KS_FAIL(KS_EDATA, "\"%.*s\" is not in the vocabulary", (int)(n < 100 ? n : 100), bytes);
  *id = (int32_t)json_integer_value(v);
  return KS_OK;
}

static ks_status add_merge(ks_json_tokenizer *t, const json_t *vocab, const json_t *entry, uint32_t rank,
                           ks_text *joined) {
  size_t n_left;
  int32_t left, right, id;
  KS_TRY(read_merge(entry, joined, &n_left));
  KS_TRY(merge_token(vocab, joined->data, n_left, &left));
  KS_TRY(merge_token(vocab, joined->data + n_left, joined->len - n_left, &right));
  KS_TRY(merge_token(vocab, joined->data, joined->len, &id));
  uint64_t key = pair_key(left, right);
  t->pairs[pair_slot(t, key)] = (ks_pair){key, rank, id}; /* of two merges of one pair the later counts */
  return KS_OK;
}

static ks_status read_merges(ks_json_tokenizer *t, const json_t *vocab, const json_t *merges) {
  const json_t *entry;
  size_t i, size = 16;
  if (!json_is_array(merges)) return KS_FAIL(KS_EDATA, "model.merges is no array");
  if (json_array_size(merges) > INT32_MAX / 4)
    return KS_FAIL(KS_EDATA, "model.merges has %zu merges", json_array_size(merges));
  while (size / 2 < json_array_size(merges))
    size *= 2;
  t->pairs_mask = (uint32_t)size - 1;
  KS_TRY(ks_alloc_array(&t->pairs, size, sizeof *t->pairs, "tokenizer: merges"));
  ks_text joined = {0};
  ks_status status = KS_OK;
  json_array_foreach(merges, i, entry) {
    status = ks_fail_context(add_merge(t, vocab, entry, (uint32_t)i, &joined), "model.merges[%zu]", i);
    if (status != KS_OK) break;
  }
  ks_text_free(&joined);
  return status;
}

/* ---------------------------------------------------------------- model */

static ks_status refuse_options(const json_t *model) {
  static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  const char *type = json_string_value(json_object_get(model, "type"));
  const json_t *dropout = json_object_get(model, "dropout");
  if (!json_is_object(model)) return KS_FAIL(KS_EDATA, "model is missing");
  if (type && strcmp(type, "BPE") != 0)
    return KS_FAIL(KS_EUNSUPPORTED,
                   "model \"%.100s\" is not supported (BPE is); where there is a tokenizer.model, name that",
                   type);
  if (json_is_number(dropout) && json_number_value(dropout) != 0)
    return KS_FAIL(KS_EUNSUPPORTED, "model.dropout is not supported");
  for (size_t i = 0; i < sizeof affixes / sizeof affixes[0]; i++) {
    const json_t *v = json_object_get(model, affixes[i]);
    if (json_is_string(v) && json_string_length(v) > 0)
      return KS_FAIL(KS_EUNSUPPORTED, "model.%s is not supported", affixes[i]);
  }
  return KS_OK;
}

static ks_status read_model(ks_json_tokenizer *t, const json_t *model, const char *path, int64_t vocab_size) {
  KS_TRY(refuse_options(model));
  const json_t *vocab = json_object_get(model, "vocab"), *unk = json_object_get(model, "unk_token");
  KS_TRY(ks_json_bool(model, "fuse_unk", false, &t->fuse_unk));
  KS_TRY(ks_json_bool(model, "byte_fallback", false, &t->byte_fallback));
  KS_TRY(ks_json_bool(model, "ignore_merges", false, &t->ignore_merges));
  if (t->byte_level && t->byte_fallback)
    return KS_FAIL(KS_EUNSUPPORTED, "model.byte_fallback together with ByteLevel is not supported");
  KS_TRY(read_vocab(t, vocab, path, vocab_size));
  KS_TRY(read_merges(t, vocab, json_object_get(model, "merges")));
  for (int i = 0; i < 256; i++) {
    char name[8];
    snprintf(name, sizeof name, "<0x%02X>", (unsigned)i);
    const json_t *id = json_object_get(vocab, name);
    t->byte_ids[i] = id ? (int32_t)json_integer_value(id) : -1;
  }
  t->unk = -1;
  if (!json_is_string(unk)) return KS_OK;
  const json_t *id = json_object_get(vocab, json_string_value(unk));
  if (!id)
    return KS_FAIL(KS_EDATA, "model.unk_token \"%.100s\" is not in the vocabulary", json_string_value(unk));
  t->unk = (int32_t)json_integer_value(id);
  return KS_OK;
}

/* ---------------------------------------------------------------- begin and end of text */

/* bos_token, eos_token of tokenizer_config.json: a string, or an object with content, or null. */
static const char *config_token(const json_t *config, const char *key) {
  const json_t *v = json_object_get(config, key);
  return json_string_value(json_is_object(v) ? json_object_get(v, "content") : v);
}

/* The special token that a TemplateProcessing puts before (or behind) a text. */
static const char *template_token(const json_t *post, bool before) {
  const char *type = json_string_value(json_object_get(post, "type"));
  if (type && strcmp(type, "Sequence") == 0) {
    const json_t *list = json_object_get(post, "processors"), *one;
    size_t i;
    json_array_foreach(list, i, one) {
      const char *kind_of_one = json_string_value(json_object_get(one, "type"));
      if (kind_of_one && strcmp(kind_of_one, "TemplateProcessing") == 0) return template_token(one, before);
    }
    return NULL;
  }
  const json_t *single = json_object_get(post, "single");
  size_t n = json_array_size(single);
  const json_t *edge = n > 0 ? json_array_get(single, before ? 0 : n - 1) : NULL;
  return json_string_value(json_object_get(json_object_get(edge, "SpecialToken"), "id"));
}

static ks_status find_ends(ks_json_tokenizer *t, const json_t *root, const char *path) {
  static const char *const bos_names[] = {"<s>", "<|begin_of_text|>", "<bos>", NULL};
  static const char *const eos_names[] = {"</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", NULL};
  const json_t *vocab = json_object_get(json_object_get(root, "model"), "vocab");
  const json_t *post = json_object_get(root, "post_processor");
  const char *slash = strrchr(path, '/');
  ks_text config_path = {0};
  json_t *config = NULL;
  ks_status status;
  KS_TRY_OUT(ks_text_add(&config_path, path, slash ? (size_t)(slash + 1 - path) : 0));
  KS_TRY_OUT(ks_text_add_str(&config_path, "tokenizer_config.json"));
  if (ks_file_exists(config_path.data)) {
    json_error_t error;
    config = json_load_file(config_path.data, 0, &error);
    if (!config) {
      status = KS_FAIL(KS_EDATA, "%s:%d: %s", config_path.data, error.line, error.text);
      goto out;
    }
  }
  for (int end = 0; end < 2; end++) {
    const char *token =
        config ? config_token(config, end ? "eos_token" : "bos_token") : template_token(post, !end);
    int32_t id = token ? find_token(t, vocab, token) : -1;
    const char *const *names = end ? eos_names : bos_names;
    for (; !config && id < 0 && *names; names++)
      id = find_token(t, vocab, *names);
    *(end ? &t->base.eos : &t->base.bos) = id;
  }
out:
  json_decref(config);
  ks_text_free(&config_path);
  return status;
}

/* ---------------------------------------------------------------- load */

static ks_status read_root(ks_json_tokenizer *t, const json_t *root, const char *path, int64_t vocab_size) {
  if (!json_is_object(root)) return KS_FAIL(KS_EDATA, "no JSON object");
  KS_TRY(ks_json_read_normalizer(t, json_object_get(root, "normalizer")));
  KS_TRY(ks_json_read_pre_tokenizer(t, json_object_get(root, "pre_tokenizer")));
  KS_TRY(ks_json_read_decoder(t, json_object_get(root, "decoder")));
  KS_TRY(read_all_added(t, json_object_get(root, "added_tokens")));
  KS_TRY(read_model(t, json_object_get(root, "model"), path, vocab_size));
  KS_TRY(place_added(t));
  KS_TRY(index_added(t));
  return find_ends(t, root, path);
}

ks_status ks_tok_load_json(const char *path, char *file, size_t n, int64_t vocab_size, ks_tokenizer **out) {
  ks_json_tokenizer *t = NULL;
  json_t *root = NULL;
  json_error_t error;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&t, 1, sizeof *t, "tokenizer"));
  t->base.kind = &kind;
  root = json_loadb(file, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
  if (!root) {
    status = KS_FAIL(KS_EDATA, "%s:%d:%d: %s", path, error.line, error.column, error.text);
    goto out;
  }
  status = ks_fail_context(read_root(t, root, path, vocab_size), "%s", path);
  if (status != KS_OK) goto out;
  free(file); /* taken over; nothing points into it */
  *out = &t->base;
  t = NULL;
out:
  json_decref(root);
  if (t) destroy(&t->base);
  return status;
}
