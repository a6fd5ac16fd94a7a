#include "core/model/tok_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* White_Space, as members of a class. PCRE2's own \s has U+180E too. */
#define SPACES                                                                                               \
  "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
enum { MAX_SOURCE = 1 << 16, MATCH_LIMIT = 20000000, STACK_START = 32 << 10, STACK_MOST = 16 << 20 };

struct ks_pattern {
  pcre2_code *code;
};

bool ks_is_white_space(uint32_t cp) {
  return (cp >= 0x09 && cp <= 0x0D) || cp == 0x20 || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
         (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F || cp == 0x205F ||
         cp == 0x3000;
}

/* ---------------------------------------------------------------- from Oniguruma to PCRE2 */

typedef struct {
  const char *s;
  size_t n, at;
  bool in_class;
  ks_text out;
} translation;

static ks_status refuse(const translation *t, const char *what) {
  return KS_FAIL(KS_EUNSUPPORTED, "pattern \"%.*s\": %s at byte %zu is not supported",
                 (int)(t->n < 200 ? t->n : 200), t->s, what, t->at);
}

static bool starts(const translation *t, const char *prefix) {
  size_t n = strlen(prefix);
  return t->n - t->at >= n && memcmp(t->s + t->at, prefix, n) == 0;
}

static ks_status copy(translation *t, size_t n) {
  KS_TRY(ks_text_add(&t->out, t->s + t->at, n));
  t->at += n;
  return KS_OK;
}

/* Escapes that stand for a set of characters; NULL: not supported there. */
static const struct {
  char letter;
  const char *outside, *inside; /* of a class */
} sets[] = {{'s', "[" SPACES "]", SPACES}, {'S', "[^" SPACES "]", NULL},
            {'d', "\\p{Nd}", "\\p{Nd}"},   {'D', "\\P{Nd}", "\\P{Nd}"},
            {'n', "\\n", "\\n"},           {'r', "\\r", "\\r"},
            {'t', "\\t", "\\t"},           {'f', "\\f", "\\f"},
            {'v', "\\x0b", "\\x0b"},       {'a', "\\a", "\\a"}};

static bool is_hex(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

/* \x41, \x{1F600}, \u0041 */
static ks_status translate_code(translation *t) {
  bool u = t->s[t->at + 1] == 'u';
  size_t at = t->at + 2, n = 0;
  bool braces = !u && at < t->n && t->s[at] == '{';
  at += braces;
  while (at + n < t->n && n < (u ? 4u : braces ? 6u : 2u) && is_hex(t->s[at + n]))
    n++;
  bool ends = braces ? n > 0 && at + n < t->n && t->s[at + n] == '}' : n == (u ? 4u : 2u);
  if (!ends) return refuse(t, "this code");
  if (!u && !braces && t->s[at] >= '8') return refuse(t, "a byte of a character");
  KS_TRY(ks_text_addf(&t->out, "\\x{%.*s}", (int)n, t->s + at));
  t->at = at + n + braces;
  return KS_OK;
}

static ks_status translate_escape(translation *t) {
  if (t->at + 1 >= t->n) return refuse(t, "a lone backslash");
  char c = t->s[t->at + 1];
  for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
    if (sets[i].letter != c) continue;
    const char *set = t->in_class ? sets[i].inside : sets[i].outside;
    if (!set) return refuse(t, "this escape in a class");
    t->at += 2;
    return ks_text_add_str(&t->out, set);
  }
  if (c == 'x' || c == 'u') return translate_code(t);
  if (c == 'p' || c == 'P') {
    const char *end = starts(t, c == 'p' ? "\\p{" : "\\P{") ? memchr(t->s + t->at, '}', t->n - t->at) : NULL;
    return end ? copy(t, (size_t)(end - t->s) + 1 - t->at) : refuse(t, "this property");
  }
  bool letter = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  if (letter || (unsigned char)c >= 0x80) return refuse(t, "this escape");
  return copy(t, 2);
}

static ks_status translate_class(translation *t) {
  KS_TRY(copy(t, 1));
  if (t->at < t->n && t->s[t->at] == '^') KS_TRY(copy(t, 1));
  if (t->at < t->n && t->s[t->at] == ']') return refuse(t, "an empty class");
  t->in_class = true;
  while (t->at < t->n && t->s[t->at] != ']') {
    if (t->s[t->at] == '[') return refuse(t, "a class in a class");
    if (starts(t, "&&")) return refuse(t, "an intersection of classes");
    KS_TRY(t->s[t->at] == '\\' ? translate_escape(t) : copy(t, 1));
  }
  t->in_class = false;
  return t->at < t->n ? copy(t, 1) : refuse(t, "a class without end");
}

static ks_status translate_group(translation *t) {
  static const char *const known[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
  if (!starts(t, "(?") && !starts(t, "(*")) return copy(t, 1);
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (starts(t, known[i])) return copy(t, strlen(known[i]));
  if (t->at == 0 && starts(t, "(?i)")) return copy(t, 4);
  return refuse(t, "this group");
}

/* {n}, {n,}, {n,m} */
static ks_status translate_count(translation *t) {
  size_t at = t->at + 1, digits = 0;
  while (at < t->n && t->s[at] >= '0' && t->s[at] <= '9') {
    at++;
    digits++;
  }
  if (at < t->n && t->s[at] == ',') at++;
  while (at < t->n && t->s[at] >= '0' && t->s[at] <= '9')
    at++;
  if (digits == 0 || at >= t->n || t->s[at] != '}') return refuse(t, "this brace");
  at++;
  if (at < t->n && (t->s[at] == '+' || t->s[at] == '?'))
    return refuse(t, "a counted repetition that is possessive or lazy");
  return copy(t, at - t->at);
}

static ks_status translate(translation *t) {
  while (t->at < t->n) {
    switch (t->s[t->at]) {
    case '\\':
      KS_TRY(translate_escape(t));
      break;
    case '[':
      KS_TRY(translate_class(t));
      break;
    case '(':
      KS_TRY(translate_group(t));
      break;
    case '{':
      KS_TRY(translate_count(t));
      break;
    case '^':
    case '$':
      return refuse(t, "an anchor");
    default:
      KS_TRY(copy(t, 1));
      break;
    }
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- compiling, matching */

static ks_status compile(const char *source, size_t n, bool literal, pcre2_code **code) {
  int error;
  PCRE2_SIZE offset;
  uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
  pcre2_compile_context *context = pcre2_compile_context_create(NULL);
  if (!context) return KS_FAIL(KS_ENOMEM, "pattern: no memory");
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  *code = pcre2_compile((PCRE2_SPTR)source, n, options, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (!*code) {
    unsigned char text[256] = "";
    pcre2_get_error_message(error, text, sizeof text);
    return KS_FAIL(KS_EDATA, "pattern \"%.*s\": %s", (int)(n < 200 ? n : 200), source, (const char *)text);
  }
  (void)pcre2_jit_compile(*code, PCRE2_JIT_COMPLETE); /* where there is none, matching is slower */
  return KS_OK;
}

ks_status ks_pattern_create(const char *source, size_t n, bool literal, ks_pattern **out) {
  translation t = {.s = source, .n = n};
  ks_pattern *p = NULL;
  ks_status status;
  if (n == 0 || n > MAX_SOURCE) return KS_FAIL(KS_EUNSUPPORTED, "a pattern of %zu bytes is not supported", n);
  KS_TRY_OUT(ks_alloc_array(&p, 1, sizeof *p, "pattern"));
  KS_TRY_OUT(literal ? ks_text_add(&t.out, source, n) : translate(&t));
  KS_TRY_OUT(compile(t.out.data, t.out.len, literal, &p->code));
  *out = p;
  p = NULL;
out:
  ks_pattern_destroy(p);
  ks_text_free(&t.out);
  return status;
}

void ks_pattern_destroy(ks_pattern *p) {
  if (!p) return;
  pcre2_code_free(p->code);
  free(p);
}

ks_status ks_matches_init(ks_matches *m, const ks_pattern *p) {
  *m = (ks_matches){.pattern = p};
  m->match_data = pcre2_match_data_create(1, NULL);
  m->context = pcre2_match_context_create(NULL);
  if (!m->match_data || !m->context) {
    ks_matches_free(m);
    return KS_FAIL(KS_ENOMEM, "pattern: no memory");
  }
  pcre2_set_match_limit(m->context, MATCH_LIMIT);
  return KS_OK;
}

void ks_matches_free(ks_matches *m) {
  pcre2_match_data_free(m->match_data);
  pcre2_match_context_free(m->context);
  pcre2_jit_stack_free(m->stack);
  *m = (ks_matches){0};
}

void ks_matches_start(ks_matches *m, const char *text, size_t n) {
  m->text = text;
  m->n = n;
  m->at = 0;
  m->last_end = SIZE_MAX;
}

static int match_here(ks_matches *m) {
  return pcre2_match(m->pattern->code, (PCRE2_SPTR)m->text, m->n, m->at, PCRE2_NO_UTF_CHECK, m->match_data,
                     m->context);
}

ks_status ks_matches_next(ks_matches *m, bool *found, size_t *begin, size_t *end) {
  *found = false;
  while (m->at <= m->n) {
    int r = match_here(m);
    if (r == PCRE2_ERROR_JIT_STACKLIMIT &&
        !m->stack) { /* the machine stack's share was too small: take memory */
      m->stack = pcre2_jit_stack_create(STACK_START, STACK_MOST, NULL);
      if (!m->stack) return KS_FAIL(KS_ENOMEM, "pattern: no memory");
      pcre2_jit_stack_assign(m->context, NULL, m->stack);
      r = match_here(m);
    }
    if (r == PCRE2_ERROR_NOMATCH) return KS_OK;
    if (r < 0)
      return KS_FAIL(
          KS_EDATA,
          "tokenizer: its pattern is too costly at byte %zu of the text (PCRE2 error %d); cut the text",
          m->at, r);
    const PCRE2_SIZE *place = pcre2_get_ovector_pointer(m->match_data);
    *begin = place[0];
    *end = place[1];
    if (*begin < *end || *begin != m->last_end) {
      m->at = m->last_end = *end;
      *found = true;
      return KS_OK;
    }
    uint32_t cp;
    m->at += m->at < m->n ? (size_t)ks_utf8_decode(m->text + m->at, m->n - m->at, &cp) : 1;
  }
  return KS_OK;
}
