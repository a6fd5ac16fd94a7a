#include "core/select/tokens.h"

#include <utf8proc.h>

typedef enum { CLASS_SPACE, CLASS_WORD, CLASS_COMBINING, CLASS_JOINER, CLASS_MARK, CLASS_IGNORED } char_class;

#define ZERO_WIDTH_SPACE 0x200Bu

/* *folded: the character as it is compared. */
static char_class classify(uint32_t cp, uint32_t *folded) {
  *folded = cp;
  if (cp == '\'' || cp == '-') return CLASS_JOINER;
  if (cp < 0x80) {
    if (cp >= 'A' && cp <= 'Z') *folded = cp + ('a' - 'A');
    bool word = (*folded >= 'a' && *folded <= 'z') || (cp >= '0' && cp <= '9');
    return word ? CLASS_WORD : cp <= ' ' || cp == 0x7F ? CLASS_SPACE : CLASS_MARK;
  }
  if (cp == 0x2019 || cp == 0x02BC) {
    *folded = '\'';
    return CLASS_JOINER;
  }
  if (cp == 0x2010 || cp == 0x2011) {
    *folded = '-';
    return CLASS_JOINER;
  }
  switch (utf8proc_category((utf8proc_int32_t)cp)) {
  case UTF8PROC_CATEGORY_LU:
  case UTF8PROC_CATEGORY_LT:
    *folded = (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp);
    return CLASS_WORD;
  case UTF8PROC_CATEGORY_LL:
  case UTF8PROC_CATEGORY_LM:
  case UTF8PROC_CATEGORY_LO:
  case UTF8PROC_CATEGORY_ND:
  case UTF8PROC_CATEGORY_NL:
  case UTF8PROC_CATEGORY_NO:
    return CLASS_WORD;
  case UTF8PROC_CATEGORY_MN:
  case UTF8PROC_CATEGORY_MC:
  case UTF8PROC_CATEGORY_ME:
    return CLASS_COMBINING;
  case UTF8PROC_CATEGORY_ZS:
  case UTF8PROC_CATEGORY_ZL:
  case UTF8PROC_CATEGORY_ZP:
  case UTF8PROC_CATEGORY_CC:
    return CLASS_SPACE;
  case UTF8PROC_CATEGORY_CF:
    return cp == ZERO_WIDTH_SPACE ? CLASS_SPACE : CLASS_IGNORED;
  default:
    return CLASS_MARK;
  }
}

ks_status ks_tokens_compose(const char *s, size_t n, const char **composed, size_t *n_composed,
                            char **owned) {
  *composed = s;
  *n_composed = n;
  *owned = NULL;
  size_t i = 0;
  while (i < n && (unsigned char)s[i] < 0x80)
    i++;
  if (i == n) return KS_OK;
  utf8proc_uint8_t *copy = NULL;
  utf8proc_ssize_t length = utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &copy,
                                         (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (length < 0)
    return KS_FAIL(length == UTF8PROC_ERROR_NOMEM ? KS_ENOMEM : KS_EDATA,
                   "cannot compose %zu bytes of text: %s", n, utf8proc_errmsg(length));
  *owned = (char *)copy;
  *composed = *owned;
  *n_composed = (size_t)length;
  return KS_OK;
}

ks_status ks_tokens_open(ks_word_tokens *t, const char *text, size_t n) {
  t->pos = 0;
  return ks_tokens_compose(text, n, &t->s, &t->n, &t->owned);
}

void ks_tokens_close(ks_word_tokens *t) {
  free(t->owned);
  ks_text_free(&t->word);
  *t = (ks_word_tokens){0};
}

/* Class of the character at pos, with its length; the end of the text counts as space. */
static ks_status peek(const ks_word_tokens *t, size_t pos, char_class *class, uint32_t *folded,
                      size_t *length) {
  *class = CLASS_SPACE;
  *length = 0;
  if (pos >= t->n) return KS_OK;
  uint32_t cp;
  int bytes = ks_utf8_decode(t->s + pos, t->n - pos, &cp);
  if (bytes <= 0) return KS_FAIL(KS_EDATA, "text is not UTF-8 at byte %zu; convert it to UTF-8", pos);
  *class = classify(cp, folded);
  *length = (size_t)bytes;
  return KS_OK;
}

static ks_status add_folded(ks_text *word, uint32_t cp) {
  char bytes[4];
  int n = ks_utf8_encode(cp, bytes);
  return ks_text_add(word, bytes, (size_t)n);
}

/* The rest of a word whose first character was taken. */
static ks_status take_word(ks_word_tokens *t) {
  for (;;) {
    char_class class, after;
    uint32_t folded, ignored;
    size_t length, after_length;
    KS_TRY(peek(t, t->pos, &class, &folded, &length));
    if (class == CLASS_JOINER) {
      KS_TRY(peek(t, t->pos + length, &after, &ignored, &after_length));
      if (after != CLASS_WORD) return KS_OK;
    } else if (class != CLASS_WORD && class != CLASS_COMBINING && class != CLASS_IGNORED) {
      return KS_OK;
    }
    if (class != CLASS_IGNORED) KS_TRY(add_folded(&t->word, folded));
    t->pos += length;
  }
}

ks_status ks_tokens_next(ks_word_tokens *t, bool *more) {
  ks_text_clear(&t->word);
  *more = false;
  while (t->pos < t->n) {
    char_class class;
    uint32_t folded;
    size_t length;
    KS_TRY(peek(t, t->pos, &class, &folded, &length));
    t->pos += length;
    if (class == CLASS_SPACE || class == CLASS_IGNORED || class == CLASS_COMBINING) continue;
    *more = true;
    KS_TRY(add_folded(&t->word, folded));
    return class == CLASS_WORD ? take_word(t) : KS_OK;
  }
  return KS_OK;
}
