/* The tables of the rule-based rewriter (internal to core/synthesize). Everything is lower case; matching
 * ignores case. Lists end with NULL. */
#ifndef KS_SYNTHESIZE_RULES_WORDS_H
#define KS_SYNTHESIZE_RULES_WORDS_H

#include <stddef.h>

/* Phrases that may stand for each other. No phrase is in two groups. */
#define KS_RULES_GROUP_SIZE 4
extern const char *const ks_rules_synonyms[][KS_RULES_GROUP_SIZE]; /* ends with a group whose first is NULL */

/* A beginning of a sentence and how the sentence then ends. */
typedef struct {
  const char *text;
  char end; /* '?' or '.' */
} ks_rules_opening;
#define KS_RULES_OPENINGS     9
#define KS_RULES_OPENING_SIZE 64 /* bytes of the longest, NUL included */
extern const ks_rules_opening
    ks_rules_openings[][KS_RULES_OPENINGS]; /* classes of equal meaning; ends with an empty class */
extern const ks_rules_opening
    ks_rules_requests[KS_RULES_OPENINGS]; /* what may come before an imperative; also a class above */

extern const char *const ks_rules_imperatives[]; /* verbs that begin a request */
extern const char *const ks_rules_starters[];    /* other words that are written small inside a sentence */
extern const char *const ks_rules_clauses[];     /* conjunctions whose clause may come first or last */
extern const char
    *const ks_rules_whether_after[]; /* words after which "if" means "whether": such a clause stays */
extern const char
    *const ks_rules_not_subjects[]; /* after "what is": no noun phrase follows that could be turned round */
extern const char *const ks_rules_abbreviations[]; /* a full stop after these ends no sentence */
extern const char *const ks_rules_greetings[];     /* before any text */
extern const char *const ks_rules_intros[];        /* before a question */
extern const char *const ks_rules_closings[];      /* after any text */
extern const char *const ks_rules_appeals[];       /* after a question */

#endif
