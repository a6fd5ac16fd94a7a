#include "core/model/tok_json.h"

#include <utf8proc.h>

enum { MAX_PARTS = 64 };

/* GPT-2's words, which the ByteLevel pre-tokenizer cuts by itself. */
static const char gpt2_words[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

ks_status ks_json_string(const json_t *v, const char *what, ks_string *out) {
  if (!json_is_string(v)) return KS_FAIL(KS_EDATA, "%s is no string", what);
  out->n = json_string_length(v);
  return ks_strndup(json_string_value(v), out->n, &out->bytes);
}

ks_status ks_json_bool(const json_t *object, const char *key, bool fallback, bool *out) {
  const json_t *v = json_object_get(object, key);
  *out = v && !json_is_null(v) ? json_is_true(v) : fallback;
  if (v && !json_is_null(v) && !json_is_boolean(v))
    return KS_FAIL(KS_EDATA, "%s is neither true nor false", key);
  return KS_OK;
}

ks_status ks_json_type(const json_t *part, const char *what, const char **type) {
  *type = json_string_value(json_object_get(part, "type"));
  return *type ? KS_OK : KS_FAIL(KS_EDATA, "%s has no type", what);
}

static ks_status unsupported(const char *what, const char *type) {
  return KS_FAIL(KS_EUNSUPPORTED,
                 "%s \"%.100s\" is not supported; where there is a tokenizer.model, name that", what, type);
}

/* {"String": s} or {"Regex": r} */
static ks_status read_pattern(const json_t *part, ks_pattern **out) {
  const json_t *pattern = json_object_get(part, "pattern");
  const json_t *literal = json_object_get(pattern, "String"), *regex = json_object_get(pattern, "Regex");
  const json_t *source = literal ? literal : regex;
  if (!json_is_string(source)) return KS_FAIL(KS_EDATA, "pattern has neither String nor Regex");
  return ks_pattern_create(json_string_value(source), json_string_length(source), literal != NULL, out);
}

/* One character. */
static ks_status read_char(const json_t *v, const char *what, ks_string *out) {
  uint32_t cp;
  KS_TRY(ks_json_string(v, what, out));
  if (out->n == 0 || (size_t)ks_utf8_decode(out->bytes, out->n, &cp) != out->n)
    return KS_FAIL(KS_EDATA, "%s is not one character", what);
  return KS_OK;
}

/* A new zeroed element at the end of an array of parts. */
static ks_status grow(void *array, size_t *n, size_t size) {
  char *old, *new;
  memcpy(&old, array, sizeof old);
  if (*n == MAX_PARTS) return KS_FAIL(KS_EUNSUPPORTED, "more than %d parts in a sequence", MAX_PARTS);
  new = realloc(old, (*n + 1) * size);
  if (!new) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for its parts");
  memset(new + *n *size, 0, size);
  memcpy(array, &new, sizeof new);
  (*n)++;
  return KS_OK;
}

/* Metaspace's older files say add_prefix_space, newer ones prepend_scheme. */
static ks_status read_scheme(const json_t *part, ks_prepend_scheme *out) {
  static const char *const names[] = {"always", "first", "never"};
  const char *name = json_string_value(json_object_get(part, "prepend_scheme"));
  bool prefix;
  KS_TRY(ks_json_bool(part, "add_prefix_space", true, &prefix));
  *out = prefix ? KS_PREPEND_ALWAYS : KS_PREPEND_NEVER;
  if (!name) return KS_OK;
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    if (strcmp(name, names[i]) != 0) continue;
    *out = (ks_prepend_scheme)i;
    return KS_OK;
  }
  return unsupported("prepend_scheme", name);
}

typedef ks_status (*part_reader)(ks_json_tokenizer *t, const json_t *part);

static ks_status read_sequence(ks_json_tokenizer *t, const json_t *part, const char *key, part_reader read) {
  const json_t *list = json_object_get(part, key), *one;
  size_t i;
  if (!json_is_array(list)) return KS_FAIL(KS_EDATA, "a sequence has no %s", key);
  json_array_foreach(list, i, one) KS_TRY(read(t, one));
  return KS_OK;
}

/* ---------------------------------------------------------------- normalizers */

static ks_status read_unicode(ks_norm_step *s, const char *type, bool *known) {
  static const struct {
    const char *name;
    int options;
  } forms[] = {{"NFC", UTF8PROC_COMPOSE},
               {"NFD", UTF8PROC_DECOMPOSE},
               {"NFKC", UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
               {"NFKD", UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT}};
  *known = false;
  for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
    if (strcmp(type, forms[i].name) != 0) continue;
    s->kind = KS_NORM_UNICODE;
    s->options = forms[i].options | UTF8PROC_STABLE;
    *known = true;
  }
  return KS_OK;
}

ks_status ks_json_read_normalizer(ks_json_tokenizer *t, const json_t *part) {
  const char *type;
  bool known;
  if (!part || json_is_null(part)) return KS_OK;
  KS_TRY(ks_json_type(part, "normalizer", &type));
  if (strcmp(type, "Sequence") == 0) return read_sequence(t, part, "normalizers", ks_json_read_normalizer);
  KS_TRY(grow(&t->norms, &t->n_norms, sizeof *t->norms));
  ks_norm_step *s = &t->norms[t->n_norms - 1];
  KS_TRY(read_unicode(s, type, &known));
  if (known) return KS_OK;
  if (strcmp(type, "Prepend") == 0) {
    s->kind = KS_NORM_PREPEND;
    return ks_json_string(json_object_get(part, "prepend"), "Prepend's prepend", &s->text);
  }
  if (strcmp(type, "Replace") == 0) {
    s->kind = KS_NORM_REPLACE;
    KS_TRY(ks_json_string(json_object_get(part, "content"), "Replace's content", &s->text));
    return read_pattern(part, &s->pattern);
  }
  if (strcmp(type, "Strip") == 0) {
    s->kind = KS_NORM_STRIP;
    KS_TRY(ks_json_bool(part, "strip_left", true, &s->left));
    return ks_json_bool(part, "strip_right", true, &s->right);
  }
  return unsupported("normalizer", type);
}

/* ---------------------------------------------------------------- pre-tokenizers */

static ks_status add_split(ks_json_tokenizer *t, const char *pattern, ks_split_behavior behavior) {
  KS_TRY(grow(&t->pres, &t->n_pres, sizeof *t->pres));
  ks_pre_step *s = &t->pres[t->n_pres - 1];
  s->behavior = behavior;
  return ks_pattern_create(pattern, strlen(pattern), false, &s->pattern);
}

static ks_status read_byte_level(ks_json_tokenizer *t, const json_t *part) {
  bool prefix, words;
  KS_TRY(ks_json_bool(part, "add_prefix_space", true, &prefix));
  KS_TRY(ks_json_bool(part, "use_regex", true, &words));
  t->byte_level = true;
  if (prefix) {
    KS_TRY(grow(&t->pres, &t->n_pres, sizeof *t->pres));
    t->pres[t->n_pres - 1].kind = KS_PRE_BLANK;
  }
  return words ? add_split(t, gpt2_words, KS_SPLIT_ISOLATED) : KS_OK;
}

static ks_status read_split(ks_json_tokenizer *t, const json_t *part) {
  static const char *const names[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                      "MergedWithNext"};
  const char *name = json_string_value(json_object_get(part, "behavior"));
  KS_TRY(grow(&t->pres, &t->n_pres, sizeof *t->pres));
  ks_pre_step *s = &t->pres[t->n_pres - 1];
  KS_TRY(ks_json_bool(part, "invert", false, &s->invert));
  KS_TRY(read_pattern(part, &s->pattern));
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    if (!name || strcmp(name, names[i]) != 0) continue;
    s->behavior = (ks_split_behavior)i;
    return KS_OK;
  }
  return unsupported("behavior", name ? name : "?");
}

static ks_status read_metaspace(ks_json_tokenizer *t, const json_t *part) {
  bool split;
  KS_TRY(grow(&t->pres, &t->n_pres, sizeof *t->pres));
  ks_pre_step *s = &t->pres[t->n_pres - 1];
  s->kind = KS_PRE_METASPACE;
  KS_TRY(read_char(json_object_get(part, "replacement"), "Metaspace's replacement", &s->marker));
  KS_TRY(read_scheme(part, &s->scheme));
  KS_TRY(ks_json_bool(part, "split", true, &split));
  if (!split) return KS_OK;
  ks_string marker = s->marker;
  KS_TRY(grow(&t->pres, &t->n_pres, sizeof *t->pres));
  s = &t->pres[t->n_pres - 1];
  s->behavior = KS_SPLIT_WITH_NEXT;
  return ks_pattern_create(marker.bytes, marker.n, true, &s->pattern);
}

static ks_status read_digits(ks_json_tokenizer *t, const json_t *part) {
  bool individual;
  KS_TRY(ks_json_bool(part, "individual_digits", false, &individual));
  return add_split(t, "\\p{N}", individual ? KS_SPLIT_ISOLATED : KS_SPLIT_CONTIGUOUS);
}

ks_status ks_json_read_pre_tokenizer(ks_json_tokenizer *t, const json_t *part) {
  static const struct {
    const char *type;
    part_reader read;
  } kinds[] = {{"ByteLevel", read_byte_level},
               {"Split", read_split},
               {"Metaspace", read_metaspace},
               {"Digits", read_digits}};
  const char *type;
  if (!part || json_is_null(part)) return KS_OK;
  KS_TRY(ks_json_type(part, "pre_tokenizer", &type));
  if (strcmp(type, "Sequence") == 0)
    return read_sequence(t, part, "pretokenizers", ks_json_read_pre_tokenizer);
  if (t->byte_level) return unsupported("after ByteLevel, the pre_tokenizer", type);
  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
    if (strcmp(type, kinds[i].type) == 0) return kinds[i].read(t, part);
  return unsupported("pre_tokenizer", type);
}

/* ---------------------------------------------------------------- decoders */

static ks_status read_strip(ks_decode_step *s, const json_t *part) {
  const json_t *start = json_object_get(part, "start"), *stop = json_object_get(part, "stop");
  KS_TRY(read_char(json_object_get(part, "content"), "Strip's content", &s->text));
  if (!json_is_integer(start) || !json_is_integer(stop) || json_integer_value(start) < 0 ||
      json_integer_value(stop) < 0)
    return KS_FAIL(KS_EDATA, "Strip's start and stop are not counts");
  s->start = (size_t)json_integer_value(start);
  s->stop = (size_t)json_integer_value(stop);
  return KS_OK;
}

ks_status ks_json_read_decoder(ks_json_tokenizer *t, const json_t *part) {
  static const char *const names[] = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"};
  const char *type;
  size_t kind = 0;
  if (!part || json_is_null(part)) return KS_OK;
  t->has_decoder = true;
  KS_TRY(ks_json_type(part, "decoder", &type));
  if (strcmp(type, "Sequence") == 0) return read_sequence(t, part, "decoders", ks_json_read_decoder);
  while (kind < sizeof names / sizeof names[0] && strcmp(type, names[kind]) != 0)
    kind++;
  if (kind == sizeof names / sizeof names[0]) return unsupported("decoder", type);
  KS_TRY(grow(&t->decodes, &t->n_decodes, sizeof *t->decodes));
  ks_decode_step *s = &t->decodes[t->n_decodes - 1];
  s->kind = (ks_decode_kind)kind;
  if (s->kind == KS_DECODE_REPLACE) {
    KS_TRY(ks_json_string(json_object_get(part, "content"), "Replace's content", &s->text));
    return read_pattern(part, &s->pattern);
  }
  if (s->kind == KS_DECODE_STRIP) return read_strip(s, part);
  if (s->kind != KS_DECODE_METASPACE) return KS_OK;
  KS_TRY(read_char(json_object_get(part, "replacement"), "Metaspace's replacement", &s->text));
  return read_scheme(part, &s->scheme);
}

void ks_json_free_parts(ks_json_tokenizer *t) {
  for (size_t i = 0; i < t->n_norms; i++) {
    ks_pattern_destroy(t->norms[i].pattern);
    free(t->norms[i].text.bytes);
  }
  for (size_t i = 0; i < t->n_pres; i++) {
    ks_pattern_destroy(t->pres[i].pattern);
    free(t->pres[i].marker.bytes);
  }
  for (size_t i = 0; i < t->n_decodes; i++) {
    ks_pattern_destroy(t->decodes[i].pattern);
    free(t->decodes[i].text.bytes);
  }
  free(t->norms);
  free(t->pres);
  free(t->decodes);
}
