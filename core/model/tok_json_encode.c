#include "core/model/tok_json.h"

#include <utf8proc.h>

/* ---------------------------------------------------------------- normalizing */

static ks_status normalize_unicode(const ks_norm_step *s, ks_text *text) {
  size_t ascii = 0;
  while (ascii < text->len && (unsigned char)text->data[ascii] < 0x80)
    ascii++;
  if (ascii == text->len) return KS_OK; /* in every normal form */
  utf8proc_uint8_t *form = NULL;
  utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text->data, (utf8proc_ssize_t)text->len, &form,
                                    (utf8proc_option_t)s->options);
  if (n < 0)
    return KS_FAIL(n == UTF8PROC_ERROR_NOMEM ? KS_ENOMEM : KS_EDATA, "tokenizer: normal form: %s",
                   utf8proc_errmsg(n));
  ks_text_clear(text);
  ks_status status = ks_text_add(text, (const char *)form, (size_t)n);
  free(form);
  return status;
}

/* Every match gives way to content. */
static ks_status replace_all(const ks_pattern *pattern, const ks_string *content, const char *text, size_t n,
                             ks_text *out) {
  ks_matches m;
  ks_status status;
  KS_TRY(ks_matches_init(&m, pattern));
  ks_matches_start(&m, text, n);
  size_t at = 0, begin, end;
  bool found;
  for (;;) {
    KS_TRY_OUT(ks_matches_next(&m, &found, &begin, &end));
    if (!found) break;
    KS_TRY_OUT(ks_text_add(out, text + at, begin - at));
    KS_TRY_OUT(ks_text_add(out, content->bytes, content->n));
    at = end;
  }
  KS_TRY_OUT(ks_text_add(out, text + at, n - at));
out:
  ks_matches_free(&m);
  return status;
}

/* Bytes of white space at the end of text. */
static size_t space_at_end(const char *text, size_t n) {
  size_t at = n;
  while (at > 0) {
    size_t begin = at - 1;
    uint32_t cp = 0;
    while (begin > 0 && ((unsigned char)text[begin] & 0xC0) == 0x80)
      begin--;
    if (ks_utf8_decode(text + begin, at - begin, &cp) == 0 || !ks_is_white_space(cp)) break;
    at = begin;
  }
  return n - at;
}

static size_t space_at_start(const char *text, size_t n) {
  size_t at = 0;
  uint32_t cp;
  while (at < n) {
    int len = ks_utf8_decode(text + at, n - at, &cp);
    if (len == 0 || !ks_is_white_space(cp)) break;
    at += (size_t)len;
  }
  return at;
}

/* *text becomes what a step makes of it. */
static ks_status normalize_step(const ks_norm_step *s, ks_text *text) {
  if (s->kind == KS_NORM_UNICODE) return normalize_unicode(s, text);
  ks_text made = {0};
  ks_status status;
  if (s->kind == KS_NORM_STRIP) {
    size_t begin = s->left ? space_at_start(text->data, text->len) : 0;
    size_t tail = s->right ? space_at_end(text->data + begin, text->len - begin) : 0;
    KS_TRY_OUT(ks_text_add(&made, text->data + begin, text->len - begin - tail));
  } else if (s->kind == KS_NORM_PREPEND) {
    KS_TRY_OUT(ks_text_add(&made, s->text.bytes, s->text.n));
    KS_TRY_OUT(ks_text_add(&made, text->data, text->len));
  } else {
    KS_TRY_OUT(replace_all(s->pattern, &s->text, text->data, text->len, &made));
  }
  ks_text old = *text;
  *text = made;
  made = old;
out:
  ks_text_free(&made);
  return status;
}

ks_status ks_json_normalize(const ks_json_tokenizer *t, ks_text *text) {
  for (size_t i = 0; i < t->n_norms && text->len > 0; i++)
    KS_TRY(normalize_step(&t->norms[i], text));
  return KS_OK;
}

/* ---------------------------------------------------------------- pieces of a text */

typedef struct {
  size_t begin, n;
  bool first; /* where the user's text begins */
} piece;

typedef struct {
  piece *at;
  size_t n, cap;
} pieces;

static ks_status pieces_add(pieces *p, piece one) {
  if (p->n == p->cap) {
    size_t cap = p->cap ? 2 * p->cap : 64;
    piece *at = realloc(p->at, cap * sizeof *at);
    if (!at) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for %zu words", cap);
    p->at = at;
    p->cap = cap;
  }
  p->at[p->n++] = one;
  return KS_OK;
}

/* One segment between added tokens, on its way. */
typedef struct {
  const ks_json_tokenizer *t;
  ks_text text;
  pieces words, next;
  ks_merger merger;
  ks_matches *matches; /* [n_pres] of the split steps */
} work;

/* ---------------------------------------------------------------- pre-tokenizers */

typedef struct {
  pieces *out;
  piece whole;
  ks_split_behavior behavior;
  bool after_match, any;
  piece held; /* grows while neighbours join it */
  bool held_match;
} splitter;

static ks_status splitter_flush(splitter *s) {
  if (!s->any || s->held.n == 0) return KS_OK;
  return pieces_add(s->out, s->held);
}

/* The next stretch, a match or what lies between two; empty stretches count for joining, too. */
static ks_status splitter_add(splitter *s, size_t begin, size_t n, bool match) {
  bool joins = s->any && (s->behavior == KS_SPLIT_CONTIGUOUS      ? match == s->after_match
                          : s->behavior == KS_SPLIT_WITH_PREVIOUS ? match && !s->after_match
                          : s->behavior == KS_SPLIT_WITH_NEXT     ? !match && s->held_match
                                                                  : false);
  s->after_match = match;
  if (joins) {
    s->held.n += n;
    s->held_match = false;
    return KS_OK;
  }
  KS_TRY(splitter_flush(s));
  s->any = !(s->behavior == KS_SPLIT_REMOVED && match);
  s->held = (piece){begin, n, s->whole.first && begin == s->whole.begin};
  s->held_match = match;
  return KS_OK;
}

static ks_status split_one(work *w, const ks_pre_step *step, ks_matches *m, piece whole) {
  splitter s = {.out = &w->next, .whole = whole, .behavior = step->behavior};
  size_t at = 0, begin, end;
  bool found;
  ks_matches_start(m, w->text.data + whole.begin, whole.n);
  for (;;) {
    KS_TRY(ks_matches_next(m, &found, &begin, &end));
    if (!found) break;
    if (begin > at) KS_TRY(splitter_add(&s, whole.begin + at, begin - at, step->invert));
    KS_TRY(splitter_add(&s, whole.begin + begin, end - begin, !step->invert));
    at = end;
  }
  if (at < whole.n) KS_TRY(splitter_add(&s, whole.begin + at, whole.n - at, step->invert));
  return splitter_flush(&s);
}

static bool begins_with(const char *text, size_t n, const char *what, size_t n_what) {
  return n >= n_what && memcmp(text, what, n_what) == 0;
}

/* Writes the words anew: ByteLevel puts a blank before a word without one; Metaspace marks blanks, and the
 * beginning. */
static ks_status rewrite(work *w, const ks_pre_step *step) {
  ks_text made = {0};
  ks_status status = KS_OK;
  const bool meta = step->kind == KS_PRE_METASPACE;
  const char *marker = meta ? step->marker.bytes : " ";
  const size_t marker_n = meta ? step->marker.n : 1;
  for (size_t i = 0; i < w->words.n; i++) {
    piece word = w->words.at[i], out = {made.len, 0, word.first};
    const char *text = w->text.data + word.begin;
    bool marked = text[0] == ' ' || begins_with(text, word.n, marker, marker_n);
    bool wanted =
        !meta || step->scheme == KS_PREPEND_ALWAYS || (step->scheme == KS_PREPEND_FIRST && word.first);
    if (wanted && !marked) KS_TRY_OUT(ks_text_add(&made, marker, marker_n));
    for (size_t at = 0; at < word.n;) {
      const char *blank = meta ? memchr(text + at, ' ', word.n - at) : NULL;
      size_t end = blank ? (size_t)(blank - text) : word.n;
      KS_TRY_OUT(ks_text_add(&made, text + at, end - at));
      if (blank) KS_TRY_OUT(ks_text_add(&made, marker, marker_n));
      at = end + (blank != NULL);
    }
    out.n = made.len - out.begin;
    KS_TRY_OUT(pieces_add(&w->next, out));
  }
  ks_text old = w->text;
  w->text = made;
  made = old;
out:
  ks_text_free(&made);
  return status;
}

static ks_status pre_tokenize(work *w) {
  for (size_t i = 0; i < w->t->n_pres; i++) {
    const ks_pre_step *step = &w->t->pres[i];
    w->next.n = 0;
    if (step->kind != KS_PRE_SPLIT) KS_TRY(rewrite(w, step));
    for (size_t j = 0; step->kind == KS_PRE_SPLIT && j < w->words.n; j++)
      KS_TRY(split_one(w, step, &w->matches[i], w->words.at[j]));
    pieces old = w->words;
    w->words = w->next;
    w->next = old;
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- merging */

static bool merge_rule(const void *self, const char *text, const ks_symbol *left, const ks_symbol *right,
                       uint32_t *rank, int32_t *id) {
  (void)text;
  const ks_pair *p = ks_json_find_pair(self, left->id, right->id);
  if (!p) return false;
  *rank = p->rank;
  *id = p->id;
  return true;
}

/* Fallback to the ids of a character's bytes; false when one has none. */
static bool byte_ids(const ks_json_tokenizer *t, const char *bytes, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!t->byte_fallback || t->byte_ids[(unsigned char)bytes[i]] < 0) return false;
  return true;
}

/* The symbols that a word's characters are. An unknown one waits until the next known one comes, as in the
 * original. */
static ks_status add_symbols(work *w, const char *word, size_t n) {
  const ks_json_tokenizer *t = w->t;
  ks_merger *m = &w->merger;
  uint32_t cp, unknown = 0;
  m->n_symbols = 0;
  for (size_t i = 0, len; i < n; i += len) {
    len = t->byte_level ? 1 : (size_t)ks_utf8_decode(word + i, n - i, &cp);
    int32_t id = ks_vocab_find(&t->keys, word + i, len);
    if (id >= 0) {
      if (unknown > 0) KS_TRY(ks_merger_add(m, 0, unknown, t->unk, false));
      unknown = 0;
      KS_TRY(ks_merger_add(m, 0, (uint32_t)len, id, false));
    } else if (byte_ids(t, word + i, len)) {
      for (size_t j = 0; j < len; j++)
        KS_TRY(ks_merger_add(m, 0, 1, t->byte_ids[(unsigned char)word[i + j]], false));
    } else if (t->unk >= 0) {
      if (unknown > 0 && !t->fuse_unk) KS_TRY(ks_merger_add(m, 0, unknown, t->unk, false));
      unknown = (t->fuse_unk ? unknown : 0) + (uint32_t)len;
    }
  }
  return unknown > 0 ? ks_merger_add(m, 0, unknown, t->unk, false) : KS_OK;
}

static ks_status encode_word(work *w, const char *word, size_t n, ks_ids *out) {
  int32_t id = w->t->ignore_merges ? ks_vocab_find(&w->t->keys, word, n) : -1;
  if (id >= 0) return ks_ids_add(out, id);
  KS_TRY(add_symbols(w, word, n));
  ks_merger *m = &w->merger;
  KS_TRY(ks_merger_run(m, word, merge_rule, w->t));
  for (int32_t i = 0; i >= 0 && i < m->n_symbols; i = m->symbols[i].next)
    KS_TRY(ks_ids_add(out, m->symbols[i].id));
  return KS_OK;
}

/* w->text: one normalized segment. */
static ks_status encode_segment(work *w, bool first, ks_ids *out) {
  if (w->text.len == 0) return KS_OK;
  w->words.n = 0;
  KS_TRY(pieces_add(&w->words, (piece){0, w->text.len, first}));
  KS_TRY(pre_tokenize(w));
  for (size_t i = 0; i < w->words.n; i++)
    KS_TRY(encode_word(w, w->text.data + w->words.at[i].begin, w->words.at[i].n, out));
  return KS_OK;
}

/* ---------------------------------------------------------------- added tokens */

static bool is_word_char(uint32_t cp) {
  static const utf8proc_category_t kinds[] = {
      UTF8PROC_CATEGORY_LU, UTF8PROC_CATEGORY_LL, UTF8PROC_CATEGORY_LT, UTF8PROC_CATEGORY_LM,
      UTF8PROC_CATEGORY_LO, UTF8PROC_CATEGORY_MN, UTF8PROC_CATEGORY_MC, UTF8PROC_CATEGORY_ME,
      UTF8PROC_CATEGORY_ND, UTF8PROC_CATEGORY_NL, UTF8PROC_CATEGORY_PC};
  utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
    if (c == kinds[i]) return true;
  return cp == 0x200C || cp == 0x200D; /* joiners */
}

static bool stands_alone(const char *text, size_t n, size_t begin, size_t end) {
  uint32_t cp;
  size_t before = begin;
  while (before > 0 && ((unsigned char)text[--before] & 0xC0) == 0x80) {
  }
  if (begin > 0 && ks_utf8_decode(text + before, begin - before, &cp) > 0 && is_word_char(cp)) return false;
  return end == n || ks_utf8_decode(text + end, n - end, &cp) == 0 || !is_word_char(cp);
}

/* The next added token at or after *at, with the white space it takes. begin == n: there is none. */
typedef struct {
  size_t begin, end;
  const ks_added_token *token;
} hit;

static hit next_added(const ks_json_tokenizer *t, const ks_trie *trie, const char *text, size_t n,
                      size_t from) {
  for (size_t at = from; at < n;) {
    int32_t index = -1;
    size_t len = ks_trie_longest(trie, text + at, n - at, &index);
    if (len == 0) {
      at++;
      continue;
    }
    const ks_added_token *a = &t->added[index];
    hit h = {at, at + len, a};
    at += len;
    if (a->single_word && !stands_alone(text, n, h.begin, h.end)) continue;
    if (a->lstrip) h.begin -= space_at_end(text + from, h.begin - from);
    if (a->rstrip) h.end += space_at_start(text + h.end, n - h.end);
    return h;
  }
  return (hit){n, n, NULL};
}

static ks_status add_token(const ks_json_tokenizer *t, const ks_added_token *a, ks_ids *out) {
  if (t->model_vocab_size > 0 && a->id >= t->model_vocab_size)
    return KS_FAIL(KS_EDATA,
                   "tokenizer: the text holds \"%.100s\", token %d, but the model has only %lld tokens",
                   a->content.bytes, a->id, (long long)t->model_vocab_size);
  return ks_ids_add(out, a->id);
}

/* A stretch without raw added tokens. */
static ks_status encode_stretch(work *w, const char *text, size_t n, bool first, ks_ids *out) {
  const ks_json_tokenizer *t = w->t;
  ks_text whole = {0};
  ks_status status;
  KS_TRY_OUT(ks_text_add(&whole, text, n));
  KS_TRY_OUT(ks_json_normalize(t, &whole));
  for (size_t at = 0; at < whole.len;) {
    hit h = t->has_normalized ? next_added(t, &t->normalized, whole.data, whole.len, at)
                              : (hit){whole.len, whole.len, NULL};
    ks_text_clear(&w->text);
    KS_TRY_OUT(ks_text_add(&w->text, whole.data + at, h.begin - at));
    KS_TRY_OUT(encode_segment(w, first && at == 0, out));
    if (h.token) KS_TRY_OUT(add_token(t, h.token, out));
    at = h.end;
  }
out:
  ks_text_free(&whole);
  return status;
}

static ks_status work_init(work *w, const ks_json_tokenizer *t) {
  *w = (work){.t = t, .merger = {.compare_ids = true}};
  KS_TRY(ks_alloc_array(&w->matches, t->n_pres, sizeof *w->matches, "tokenizer: matches"));
  for (size_t i = 0; i < t->n_pres; i++)
    if (t->pres[i].pattern) KS_TRY(ks_matches_init(&w->matches[i], t->pres[i].pattern));
  return KS_OK;
}

static void work_free(work *w) {
  for (size_t i = 0; w->matches && i < w->t->n_pres; i++)
    ks_matches_free(&w->matches[i]);
  free(w->matches);
  free(w->words.at);
  free(w->next.at);
  ks_text_free(&w->text);
  ks_merger_free(&w->merger);
}

ks_status ks_json_encode(const ks_tokenizer *base, const char *text, size_t n, ks_ids *out) {
  const ks_json_tokenizer *t = (const ks_json_tokenizer *)base;
  work w;
  ks_status status;
  KS_TRY_OUT(work_init(&w, t));
  for (size_t at = 0; at < n;) {
    hit h = t->has_raw ? next_added(t, &t->raw, text, n, at) : (hit){n, n, NULL};
    if (h.begin > at) KS_TRY_OUT(encode_stretch(&w, text + at, h.begin - at, at == 0, out));
    if (h.token) KS_TRY_OUT(add_token(t, h.token, out));
    at = h.end;
  }
out:
  work_free(&w);
  return status;
}
