/* Words and marks of a text, as DSS counts them (internal to core/select). */
#ifndef KS_SELECT_TOKENS_H
#define KS_SELECT_TOKENS_H

#include "core/base/base.h"

/* Zero-initialise; ks_tokens_open, then ks_tokens_next until *more is false, then ks_tokens_close (always).
 */
typedef struct {
  const char *s; /* in composed form */
  size_t n, pos;
  char *owned;  /* s, where composing made a copy */
  ks_text word; /* the token, lower-cased */
} ks_word_tokens;

/* text: n bytes of valid UTF-8, which must outlive t. */
ks_status ks_tokens_open(ks_word_tokens *t, const char *text, size_t n);
ks_status ks_tokens_next(ks_word_tokens *t, bool *more);
void ks_tokens_close(ks_word_tokens *t);
/* s in composed form (NFC): s itself when it is ASCII, else a copy in *owned; free() that. */
ks_status ks_tokens_compose(const char *s, size_t n, const char **composed, size_t *n_composed, char **owned);

#endif
