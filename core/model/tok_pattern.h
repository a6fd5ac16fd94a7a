/* Internal: the regular expressions of tokenizer.json. They are written for Oniguruma (Ruby's syntax,
 * Unicode), and are matched by PCRE2. What the two read alike passes, what they read differently is rewritten
 * (\s, \d, \v, \u) or refused
 * (^, $, \w, \h, \b, (?m), nested classes, &&, {n,m}+), so that a pattern never matches other text than it
 * should. */
#ifndef KS_TOK_PATTERN_H
#define KS_TOK_PATTERN_H

#include "core/model/tok.h"

typedef struct ks_pattern ks_pattern;
/* literal: the text itself. KS_EUNSUPPORTED names what is not supported, KS_EDATA a pattern that is none. */
ks_status ks_pattern_create(const char *source, size_t n, bool literal, ks_pattern **out);
void ks_pattern_destroy(ks_pattern *p); /* NULL-safe */

/* A walk over the matches in a text: leftmost, not overlapping; an empty match right behind another is
 * skipped. */
typedef struct {
  const ks_pattern *pattern;
  void *match_data, *context, *stack; /* PCRE2's */
  const char *text;
  size_t n, at, last_end; /* last_end: SIZE_MAX before the first match */
} ks_matches;
ks_status ks_matches_init(ks_matches *m, const ks_pattern *p);
void ks_matches_free(ks_matches *m);
void ks_matches_start(ks_matches *m, const char *text, size_t n);
/* *found false: there are no more. KS_EDATA: the pattern is too costly on this text. */
ks_status ks_matches_next(ks_matches *m, bool *found, size_t *begin, size_t *end);

/* Unicode's White_Space. */
bool ks_is_white_space(uint32_t cp);

#endif
