/* M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with the deviations that NLTK
 * documents for its NLTK_EXTENSIONS mode: a pool of irregular forms, -ies and -ied of four letters, y -> i
 * only after a consonant, *o for stems of two letters, and -alli, -bli, -fulli, -logi in step 2. Characters
 * other than letters count as consonants. */
#include "core/score/score.h"

#include <string.h>

typedef struct {
  char *at;
  size_t n;
} word;

/* What the conditions of the rules ask about a stem. Bit i of `tail`: the i-th letter from the end is a
 * consonant. */
typedef struct {
  size_t measure;
  bool has_vowel;
  unsigned tail;
} shape;

static shape shape_of(const char *at, size_t n) {
  shape s = {0, false, 0};
  bool before = false;
  for (size_t i = 0; i < n; i++) {
    bool consonant = at[i] == 'y' ? !before : !strchr("aeiou", at[i]);
    s.measure += i > 0 && consonant && !before;
    s.has_vowel |= !consonant;
    s.tail = s.tail << 1 | consonant;
    before = consonant;
  }
  return s;
}

static bool ends_with(const word *w, const char *suffix) {
  size_t n = strlen(suffix);
  return w->n >= n && memcmp(w->at + w->n - n, suffix, n) == 0;
}

static void replace_end(word *w, size_t n_cut, const char *put) {
  size_t n = strlen(put);
  memcpy(w->at + w->n - n_cut, put, n);
  w->n += n - n_cut;
}

static bool ends_double_consonant(const word *w, shape s) {
  return w->n >= 2 && w->at[w->n - 1] == w->at[w->n - 2] && (s.tail & 1);
}

/* The paper's *o, and NLTK's vowel + consonant as a whole word. */
static bool ends_short(const char *at, size_t n, shape s) {
  if (n == 2) return (s.tail & 3) == 1;
  return n >= 3 && (s.tail & 7) == 5 && !strchr("wxy", at[n - 1]);
}

/* The first rule whose suffix fits decides, whether its condition holds or not. */
typedef struct {
  const char *suffix, *put;
  size_t n_kept;     /* letters of the suffix that the measure counts as stem */
  const char *after; /* the stem must end in one of these; NULL: anything */
} rule;

static void apply_rules(word *w, const rule *rules, size_t n_rules, size_t min_measure) {
  for (size_t i = 0; i < n_rules; i++) {
    const rule *r = &rules[i];
    if (!ends_with(w, r->suffix)) continue;
    size_t n_suffix = strlen(r->suffix), n_stem = w->n - n_suffix;
    if (shape_of(w->at, n_stem + r->n_kept).measure < min_measure) return;
    if (r->after && (n_stem == 0 || !strchr(r->after, w->at[n_stem - 1]))) return;
    replace_end(w, n_suffix, r->put);
    return;
  }
}
#define APPLY(w, rules, min_measure)                                                                         \
  apply_rules((w), (rules), sizeof(rules) / sizeof(rules)[0], (min_measure))

static const rule plural_rules[] = {{.suffix = "sses", .put = "ss"},
                                    {.suffix = "ies", .put = "i"},
                                    {.suffix = "ss", .put = "ss"},
                                    {.suffix = "s", .put = ""}};
static const rule step2_rules[] = {
    {.suffix = "ational", .put = "ate"}, {.suffix = "tional", .put = "tion"},
    {.suffix = "enci", .put = "ence"},   {.suffix = "anci", .put = "ance"},
    {.suffix = "izer", .put = "ize"},    {.suffix = "bli", .put = "ble"},
    {.suffix = "alli", .put = "al"},     {.suffix = "entli", .put = "ent"},
    {.suffix = "eli", .put = "e"},       {.suffix = "ousli", .put = "ous"},
    {.suffix = "ization", .put = "ize"}, {.suffix = "ation", .put = "ate"},
    {.suffix = "ator", .put = "ate"},    {.suffix = "alism", .put = "al"},
    {.suffix = "iveness", .put = "ive"}, {.suffix = "fulness", .put = "ful"},
    {.suffix = "ousness", .put = "ous"}, {.suffix = "aliti", .put = "al"},
    {.suffix = "iviti", .put = "ive"},   {.suffix = "biliti", .put = "ble"},
    {.suffix = "fulli", .put = "ful"},   {.suffix = "logi", .put = "log", .n_kept = 1},
};
static const rule step3_rules[] = {
    {.suffix = "icate", .put = "ic"}, {.suffix = "ative", .put = ""},  {.suffix = "alize", .put = "al"},
    {.suffix = "iciti", .put = "ic"}, {.suffix = "ical", .put = "ic"}, {.suffix = "ful", .put = ""},
    {.suffix = "ness", .put = ""},
};
static const rule step4_rules[] = {
    {.suffix = "al", .put = ""},   {.suffix = "ance", .put = ""}, {.suffix = "ence", .put = ""},
    {.suffix = "er", .put = ""},   {.suffix = "ic", .put = ""},   {.suffix = "able", .put = ""},
    {.suffix = "ible", .put = ""}, {.suffix = "ant", .put = ""},  {.suffix = "ement", .put = ""},
    {.suffix = "ment", .put = ""}, {.suffix = "ent", .put = ""},  {.suffix = "ion", .put = "", .after = "st"},
    {.suffix = "ou", .put = ""},   {.suffix = "ism", .put = ""},  {.suffix = "ate", .put = ""},
    {.suffix = "iti", .put = ""},  {.suffix = "ous", .put = ""},  {.suffix = "ive", .put = ""},
    {.suffix = "ize", .put = ""},
};
static const rule double_l_rules[] = {{.suffix = "ll", .put = "l", .n_kept = 1}};

static const struct {
  const char *form, *stem;
} irregular[] = {
    {"sky", "sky"},        {"skies", "sky"},       {"dying", "die"},        {"lying", "lie"},
    {"tying", "tie"},      {"news", "news"},       {"innings", "inning"},   {"inning", "inning"},
    {"outings", "outing"}, {"outing", "outing"},   {"cannings", "canning"}, {"canning", "canning"},
    {"howe", "howe"},      {"proceed", "proceed"}, {"exceed", "exceed"},    {"succeed", "succeed"},
};

static void step_1a(word *w) {
  if (w->n == 4 && ends_with(w, "ies"))
    replace_end(w, 3, "ie");
  else
    APPLY(w, plural_rules, 0);
}

static void tidy_after_ed_or_ing(word *w) {
  static const char *const wants_e[] = {"at", "bl", "iz"};
  for (size_t i = 0; i < sizeof wants_e / sizeof wants_e[0]; i++) {
    if (!ends_with(w, wants_e[i])) continue;
    w->at[w->n++] = 'e';
    return;
  }
  shape s = shape_of(w->at, w->n);
  if (ends_double_consonant(w, s)) {
    if (!strchr("lsz", w->at[w->n - 1])) w->n--;
  } else if (s.measure == 1 && ends_short(w->at, w->n, s)) {
    w->at[w->n++] = 'e';
  }
}

static void step_1b(word *w) {
  if (ends_with(w, "ied")) {
    replace_end(w, 3, w->n == 4 ? "ie" : "i");
    return;
  }
  if (ends_with(w, "eed")) {
    if (shape_of(w->at, w->n - 3).measure > 0) w->n--;
    return;
  }
  size_t n_cut = ends_with(w, "ed") ? 2 : ends_with(w, "ing") ? 3 : 0;
  if (n_cut == 0 || !shape_of(w->at, w->n - n_cut).has_vowel) return;
  w->n -= n_cut;
  tidy_after_ed_or_ing(w);
}

static void step_1c(word *w) {
  if (w->n > 2 && w->at[w->n - 1] == 'y' && (shape_of(w->at, w->n - 1).tail & 1)) w->at[w->n - 1] = 'i';
}

static void step_2(word *w) {
  while (ends_with(w, "alli") && shape_of(w->at, w->n - 4).measure > 0)
    w->n -= 2;
  APPLY(w, step2_rules, 1);
}

static void step_5a(word *w) {
  if (!ends_with(w, "e")) return;
  shape s = shape_of(w->at, w->n - 1);
  if (s.measure > 1 || (s.measure == 1 && !ends_short(w->at, w->n - 1, s))) w->n--;
}

void ks_porter_stem(char *text) {
  for (size_t i = 0; i < sizeof irregular / sizeof irregular[0]; i++) {
    if (strcmp(text, irregular[i].form) != 0) continue;
    strcpy(text, irregular[i].stem);
    return;
  }
  word w = {text, strlen(text)};
  if (w.n <= 2) return;
  step_1a(&w);
  step_1b(&w);
  step_1c(&w);
  step_2(&w);
  APPLY(&w, step3_rules, 1);
  APPLY(&w, step4_rules, 2);
  step_5a(&w);
  APPLY(&w, double_l_rules, 2);
  w.at[w.n] = '\0';
}
