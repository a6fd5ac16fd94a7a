/* The persona generator: a population, and users who want their own answers. Original text, made from tables
 * in datasets/persona/; no licence forbids anything. See datasets/README.md for how it is made and why it
 * favours no policy.
 *
 * Population: many topics with entities, question forms, generic answers; chit-chat; paraphrase pairs. The
 * tiny base model is trained on it. A user: preferred answers that differ systematically from the generic
 * ones (facts of their own, units, tone, sign-offs, by topic).
 */
#ifndef KS_PERSONA_H
#define KS_PERSONA_H

#include "core/data/data.h"

/* Facts of a user's own in each topic. A set's `fact` is topic * KS_PERSONA_FACTS_PER_TOPIC + number. */
enum { KS_PERSONA_FACTS_PER_TOPIC = 8 };

typedef struct {
  uint64_t population_seed; /* of topics' tables: which entities and forms exist */
  uint64_t user;            /* which user */
  int64_t stream_size, eval_size;
  int64_t n_topics;     /* of the user; 0: all there are */
  double uninformative; /* share of the stream that is chit-chat, [0, 1) */
  double repeats;       /* share of the stream that repeats or nearly repeats an earlier set, [0, 1) */
  double difficulty; /* [0, 1]: share of preferred answers that rest on a fact of the user's own (not only on
                        style) */
  double noise;      /* share of stream sets whose response has typing errors, [0, 1) */
} ks_persona_params;
#define KS_PERSONA_DEFAULT                                                                                   \
  ((ks_persona_params){.population_seed = 1,                                                                 \
                       .user = 0,                                                                            \
                       .stream_size = 480,                                                                   \
                       .eval_size = 64,                                                                      \
                       .n_topics = 0,                                                                        \
                       .uninformative = 0.25,                                                                \
                       .repeats = 0.2,                                                                       \
                       .difficulty = 0.5,                                                                    \
                       .noise = 0.05})

/* A dataset whose stream and eval are set; held-out questions cover all of the user's topics and none of them
 * is in the stream word for word. */
ks_status ks_persona_create(const ks_persona_params *params, ks_dataset **out);
/* The population corpus as JSON lines {"prompt", "completion"}, for training the base model: n_lines drawn
 * with seed. No user's data is in it. */
ks_status ks_persona_write_population(const char *path, uint64_t population_seed, uint64_t seed,
                                      int64_t n_lines);
/* Lexicons of the population's topics, one line a topic: name TAB w1, w2, ... */
ks_status ks_persona_write_lexicons(const char *path, uint64_t population_seed);

#endif
