#include "core/synthesize/rules_words.h"
#include "core/synthesize/synthesize.h"

/* The first sentence, without its end; the end itself ("?", ".", "!!", or nothing); what follows. */
typedef struct {
  ks_text body;
  const char *end, *rest;
  size_t n_end;
  char new_end; /* 0: as it was */
} sentence;

static bool is_upper(char c) {
  return c >= 'A' && c <= 'Z';
}
static char lower(char c) {
  return is_upper(c) ? (char)(c + ('a' - 'A')) : c;
}
static char upper(char c) {
  return c >= 'a' && c <= 'z' ? (char)(c - ('a' - 'A')) : c;
}
/* Bytes of other scripts count as letters: no rule cuts into a word of theirs. */
static bool is_word(char c) {
  return (lower(c) >= 'a' && lower(c) <= 'z') || (c >= '0' && c <= '9') || c == '\'' || c == '-' ||
         (unsigned char)c >= 0x80;
}
static bool is_vowel(char c) {
  return strchr("aeiou", lower(c)) != NULL && c;
}

static size_t word_length(const char *s) {
  size_t n = 0;
  while (is_word(s[n]))
    n++;
  return n;
}

/* Whether s begins with the lower-case phrase, whatever s's case. */
static bool has_prefix(const char *s, const char *phrase) {
  for (; *phrase; s++, phrase++)
    if (lower(*s) != *phrase) return false;
  return true;
}

static bool is_in(const char *const *list, const char *word, size_t n) {
  for (; *list; list++)
    if (strlen(*list) == n && has_prefix(word, *list)) return true;
  return false;
}

static bool flip(ks_rng *rng) {
  return ks_rng_below(rng, 2) == 1;
}
static bool chance(ks_rng *rng, uint64_t one_in) {
  return ks_rng_below(rng, one_in) == 0;
}

static const char *pick(const char *const *list, ks_rng *rng) {
  uint64_t n = 0;
  while (list[n])
    n++;
  return list[ks_rng_below(rng, n)];
}

/* A sentence's first word may be written small unless it could be a name. */
static bool may_lower(const char *s) {
  size_t n = word_length(s);
  return is_in(ks_rules_starters, s, n) || is_in(ks_rules_imperatives, s, n);
}

static void lower_first(char *s) {
  if (!is_upper(s[0]) || !is_upper(s[1])) s[0] = lower(s[0]);
}

/* ---------------------------------------------------------------- sentences */

static bool ends_sentence(const char *text, size_t at) {
  char next = text[at + 1];
  if (text[at] == '?' || text[at] == '!' || (text[at] == '.' && !next)) return true;
  if (text[at] != '.' || (next != ' ' && next != '\n' && next != '\r')) return false;
  size_t begin = at;
  while (begin > 0 && (is_word(text[begin - 1]) || text[begin - 1] == '.'))
    begin--;
  if (at - begin == 1 && is_upper(text[begin])) return false; /* an initial */
  return !is_in(ks_rules_abbreviations, text + begin, at - begin);
}

static ks_status split(const char *text, sentence *s) {
  size_t n = 0;
  while (text[n] && text[n] != '\n' && text[n] != '\r' && !ends_sentence(text, n))
    n++;
  s->end = text + n;
  while (s->end[s->n_end] && strchr("?!.", s->end[s->n_end]))
    s->n_end++;
  s->rest = s->end + s->n_end;
  return ks_text_add(&s->body, text, n);
}

static ks_status join(const sentence *s, ks_text *out) {
  KS_TRY(ks_text_add(out, s->body.data, s->body.len));
  bool dotted = s->new_end == '.' && s->body.len && s->body.data[s->body.len - 1] == '.'; /* "9 a.m." */
  if (s->new_end && s->n_end)
    KS_TRY(ks_text_add(out, &s->new_end, !dotted));
  else
    KS_TRY(ks_text_add(out, s->end, s->n_end));
  return ks_text_add_str(out, s->rest);
}

/* body = a + b, where a's first letter becomes a capital. a and b must not point into body. */
static ks_status set_body(ks_text *body, const char *a, const char *b) {
  ks_text_clear(body);
  KS_TRY(ks_text_add_str(body, a));
  KS_TRY(ks_text_add_str(body, b));
  if (body->len) body->data[0] = upper(body->data[0]);
  return KS_OK;
}

/* ---------------------------------------------------------------- openings */

/* An opening as it is written: "I" is a capital. */
static void spell_opening(const char *text, char out[KS_RULES_OPENING_SIZE]) {
  size_t n = 0;
  for (; text[n] && n + 1 < KS_RULES_OPENING_SIZE; n++)
    out[n] = text[n] == 'i' && (n == 0 || text[n - 1] == ' ') && text[n + 1] == ' ' ? 'I' : text[n];
  out[n] = 0;
}

/* Puts another opening of the class before the rest of the sentence, which begins at `rest` (with its
 * capital, unless it now stands inside). */
static ks_status reopen(sentence *s, const ks_rules_opening *class, const char *old, size_t rest, bool inside,
                        ks_rng *rng) {
  uint64_t n = 0;
  while (class[n].text)
    n++;
  uint64_t chosen = ks_rng_below(rng, n);
  if (class[chosen].text == old) chosen = (chosen + 1) % n;
  char *tail = NULL;
  KS_TRY(ks_strdup(s->body.data + rest, &tail));
  if (inside) lower_first(tail);
  char opening[KS_RULES_OPENING_SIZE];
  spell_opening(class[chosen].text, opening);
  ks_status status = set_body(&s->body, opening, tail);
  free(tail);
  s->new_end = class[chosen].end;
  return status;
}

/* The longest opening in the tables that the sentence has. */
static const ks_rules_opening *find_opening(const char *body, const ks_rules_opening **class) {
  const ks_rules_opening *best = NULL;
  for (size_t c = 0; ks_rules_openings[c][0].text; c++) {
    for (const ks_rules_opening *o = ks_rules_openings[c]; o->text; o++) {
      if (!has_prefix(body, o->text) || (best && strlen(best->text) >= strlen(o->text))) continue;
      best = o;
      *class = ks_rules_openings[c];
    }
  }
  return best;
}

/* "what is X" and "what's X" in other words; "tell me what X is" where X is short enough to turn round. */
static ks_status reopen_what_is(sentence *s, ks_rng *rng, bool *done) {
  static const struct {
    const char *before, *after;
    char end;
  } forms[] = {{"what is ", "", '?'},
               {"what's ", "", '?'},
               {"tell me what ", " is", '.'},
               {"could you tell me what ", " is", '?'},
               {"do you know what ", " is", '?'},
               {"i would like to know what ", " is", '.'},
               {"can you explain what ", " is", '?'}};
  const uint64_t n_forms = sizeof forms / sizeof *forms, n_direct = 2;
  const char *body = s->body.data;
  uint64_t old = n_forms;
  for (uint64_t i = 0; i < n_forms && old == n_forms; i++) {
    size_t before = strlen(forms[i].before), after = strlen(forms[i].after);
    if (has_prefix(body, forms[i].before) && s->body.len > before + after &&
        has_prefix(body + s->body.len - after, forms[i].after))
      old = i;
  }
  if (old == n_forms) return KS_OK;
  size_t begin = strlen(forms[old].before), end = s->body.len - strlen(forms[old].after);
  char *subject = NULL;
  KS_TRY(ks_strndup(body + begin, end - begin, &subject));
  size_t n_blanks = 0;
  for (const char *p = subject; *p; p++)
    n_blanks += *p == ' ';
  bool turns = n_blanks < 8 && !strpbrk(subject, ",;:()\"") &&
               !is_in(ks_rules_not_subjects, subject, word_length(subject));
  uint64_t chosen = ks_rng_below(rng, turns ? n_forms : n_direct);
  if (chosen == old) chosen = turns ? (chosen + 1) % n_forms : (chosen + 1) % n_direct;
  char opening[KS_RULES_OPENING_SIZE];
  spell_opening(forms[chosen].before, opening);
  ks_status status = set_body(&s->body, opening, subject);
  if (status == KS_OK) status = ks_text_add_str(&s->body, forms[chosen].after);
  s->new_end = forms[chosen].end;
  free(subject);
  *done = true;
  return status;
}

static ks_status change_opening(sentence *s, ks_rng *rng) {
  bool done = false;
  KS_TRY(reopen_what_is(s, rng, &done));
  if (done) return KS_OK;
  const ks_rules_opening *class = NULL, *old = find_opening(s->body.data, &class);
  if (old) return reopen(s, class, old->text, strlen(old->text), false, rng);
  size_t n = word_length(s->body.data);
  if (is_in(ks_rules_imperatives, s->body.data, n) && s->body.data[n] == ' ')
    return reopen(s, ks_rules_requests, NULL, 0, true, rng);
  return KS_OK;
}

/* ---------------------------------------------------------------- clauses */

/* "If A, B" -> "B if A". */
static ks_status move_clause_back(sentence *s, const char *comma) {
  char *clause = NULL, *main_part = NULL;
  ks_status status = ks_strndup(s->body.data, (size_t)(comma - s->body.data), &clause);
  if (status == KS_OK) status = ks_strdup(comma + 2, &main_part);
  if (status == KS_OK) {
    lower_first(clause);
    status = set_body(&s->body, main_part, " ");
  }
  if (status == KS_OK) status = ks_text_add_str(&s->body, clause);
  free(clause);
  free(main_part);
  return status;
}

/* "B if A" -> "If A, B". `at`: the conjunction. */
static ks_status move_clause_forward(sentence *s, size_t at) {
  char *clause = NULL, *main_part = NULL;
  ks_status status = ks_strdup(s->body.data + at, &clause);
  if (status == KS_OK) status = ks_strndup(s->body.data, at - 1, &main_part);
  if (status == KS_OK) {
    lower_first(main_part);
    status = set_body(&s->body, clause, ", ");
  }
  if (status == KS_OK) status = ks_text_add_str(&s->body, main_part);
  free(clause);
  free(main_part);
  return status;
}

/* The place of a conjunction inside the sentence whose clause may be moved, or 0. */
static size_t find_clause(const char *body) {
  for (size_t i = 1; body[i]; i++) {
    if (body[i - 1] != ' ' || !is_in(ks_rules_clauses, body + i, word_length(body + i))) continue;
    size_t before = i - 1;
    while (before > 0 && is_word(body[before - 1]))
      before--;
    bool two_words_each = before > 0 && strchr(body + i + word_length(body + i), ' ');
    bool whether = is_in(ks_rules_whether_after, body + before, i - 1 - before);
    return two_words_each && !whether ? i : 0;
  }
  return 0;
}

static ks_status move_clause(sentence *s) {
  const char *body = s->body.data, *comma = strchr(body, ',');
  if (comma) {
    bool one = !strchr(comma + 1, ',') && comma[1] == ' ' && comma[2] && !strpbrk(body, ";:\"");
    if (one && is_in(ks_rules_clauses, body, word_length(body))) return move_clause_back(s, comma);
    return KS_OK;
  }
  size_t at = find_clause(body);
  if (at && (may_lower(body) || has_prefix(body, "i "))) {
    bool is_i = has_prefix(body, "i ");
    KS_TRY(move_clause_forward(s, at));
    if (is_i) { /* "I" stays a capital wherever it stands */
      char *main_part = strstr(s->body.data, ", i ");
      if (main_part) main_part[2] = 'I';
    }
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- synonyms */

/* "a" or "an" at the end of out, before a word that now begins otherwise. */
static ks_status fix_article(ks_text *out, const char *old, const char *word) {
  if (is_vowel(*old) == is_vowel(*word)) return KS_OK;
  size_t n = out->len;
  bool an = n >= 3 && has_prefix(out->data + n - 3, "an ") && (n == 3 || !is_word(out->data[n - 4]));
  bool a = n >= 2 && has_prefix(out->data + n - 2, "a ") && (n == 2 || !is_word(out->data[n - 3]));
  if (!a && !an) return KS_OK;
  out->len -= an ? 2 : 1;
  return ks_text_add_str(out, is_vowel(*word) ? "n " : " ");
}

/* The longest phrase of the table at s, up to a word's end. */
static const char *find_phrase(const char *s, const char *const **group) {
  const char *best = NULL;
  for (size_t g = 0; ks_rules_synonyms[g][0]; g++) {
    for (size_t i = 0; i < KS_RULES_GROUP_SIZE && ks_rules_synonyms[g][i]; i++) {
      const char *phrase = ks_rules_synonyms[g][i];
      size_t n = strlen(phrase);
      if (!has_prefix(s, phrase) || is_word(s[n]) || (best && strlen(best) >= n)) continue;
      best = phrase;
      *group = ks_rules_synonyms[g];
    }
  }
  return best;
}

static ks_status put_synonym(const char *s, const char *phrase, const char *const *group, ks_rng *rng,
                             ks_text *out) {
  uint64_t n = 0, old = 0;
  while (n < KS_RULES_GROUP_SIZE && group[n]) {
    if (group[n] == phrase) old = n;
    n++;
  }
  const char *word = group[(old + 1 + ks_rng_below(rng, n - 1)) % n];
  KS_TRY(fix_article(out, phrase, word));
  bool is_i = lower(word[0]) == 'i' && !(lower(word[1]) >= 'a' && lower(word[1]) <= 'z');
  char first = is_upper(s[0]) || is_i ? upper(word[0]) : word[0];
  KS_TRY(ks_text_add(out, &first, 1));
  return ks_text_add_str(out, word + 1);
}

static ks_status swap_synonyms(const char *text, ks_rng *rng, ks_text *out) {
  for (const char *p = text; *p;) {
    if (!is_word(*p)) {
      KS_TRY(ks_text_add(out, p++, 1));
      continue;
    }
    const char *const *group = NULL;
    const char *phrase = find_phrase(p, &group);
    bool shouted = phrase && is_upper(p[0]) && is_upper(p[1]);
    if (phrase && !shouted && flip(rng)) {
      KS_TRY(put_synonym(p, phrase, group, rng, out));
      p += strlen(phrase);
    } else {
      size_t n = word_length(p);
      KS_TRY(ks_text_add(out, p, n));
      p += n;
    }
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- the whole */

static ks_status rewrite_sentence(const char *text, ks_rng *rng, ks_text *out) {
  sentence s = {0};
  ks_status status = split(text, &s);
  if (status == KS_OK && s.body.len && flip(rng)) status = move_clause(&s);
  if (status == KS_OK && s.body.len && !chance(rng, 4)) status = change_opening(&s, rng);
  if (status == KS_OK) status = join(&s, out);
  ks_text_free(&s.body);
  return status;
}

static ks_status add_greeting(const char *text, bool question, ks_rng *rng, ks_text *out) {
  bool intro = question && flip(rng);
  KS_TRY(ks_text_add_str(out, pick(intro ? ks_rules_intros : ks_rules_greetings, rng)));
  size_t begin = out->len;
  KS_TRY(ks_text_add_str(out, text));
  if (may_lower(text)) lower_first(out->data + begin);
  return KS_OK;
}

static ks_status add_closing(const char *text, bool question, ks_rng *rng, ks_text *out) {
  bool asks = question && flip(rng);
  KS_TRY(ks_text_add_str(out, text));
  return ks_text_add_str(out, pick(asks ? ks_rules_appeals : ks_rules_closings, rng));
}

/* Everything after the sentence's own changes: synonyms, then politeness, surely so when nothing has changed.
 */
static ks_status finish(const char *original, const char *text, ks_rng *rng, ks_text *out) {
  ks_text swapped = {0};
  ks_status status = swap_synonyms(text, rng, &swapped);
  if (status == KS_OK) status = ks_text_add(&swapped, "", 0);
  if (status == KS_OK) {
    const char *s = swapped.data;
    bool same = strcmp(s, original) == 0, question = strchr(s, '?') != NULL;
    bool closable = swapped.len && strchr("?!.", s[swapped.len - 1]);
    bool polite = same || chance(rng, 3), closes = flip(rng) && closable;
    status = !polite  ? ks_text_add(out, s, swapped.len)
             : closes ? add_closing(s, question, rng, out)
                      : add_greeting(s, question, rng, out);
  }
  ks_text_free(&swapped);
  return status;
}

ks_status ks_rewrite_rules(const char *text, ks_rng *rng, ks_text *out) {
  size_t n = strlen(text), bad = ks_utf8_check(text, n);
  if (bad < n) return KS_FAIL(KS_EDATA, "text is not UTF-8 at byte %zu; convert it to UTF-8", bad);
  size_t begin = strspn(text, " \t\r\n\f\v");
  while (n > begin && strchr(" \t\r\n\f\v", text[n - 1]))
    n--;
  char *trimmed = NULL;
  ks_text rewritten = {0};
  ks_status status = ks_strndup(text + begin, n - begin, &trimmed);
  if (status == KS_OK) status = rewrite_sentence(trimmed, rng, &rewritten);
  if (status == KS_OK) status = finish(trimmed, rewritten.data, rng, out);
  free(trimmed);
  ks_text_free(&rewritten);
  return status;
}
