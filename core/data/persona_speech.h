/* How the people of the persona generator speak: the population's entities and habits, styles, questions,
 * answers. Internal to core/data.
 *
 * What users alone say is kept apart by residues, for every seed: an opener (interjection i, address j) and a
 * sign-off (wish i, ending j) belong to users when (i + j) % 3 == 0; three own values (u, v, w) belong to
 * users when (u + v + w) % 3 == 0. The population uses the others, so nothing that a user says can be in its
 * corpus.
 */
#ifndef KS_PERSONA_SPEECH_H
#define KS_PERSONA_SPEECH_H

#include "core/base/base.h"
#include "core/data/persona_tables.h"

enum {
  KS_PERSONA_POPULATION_ENTITIES = 20,
  KS_PERSONA_CELLS = KS_PERSONA_INTENTS * KS_PERSONA_POPULATION_ENTITIES
};

typedef struct {
  uint64_t key;
  int32_t entities[KS_PERSONA_TOPICS][KS_PERSONA_POPULATION_ENTITIES]; /* indices into the topic's table */
} ks_persona_population;

/* What can be asked: one intent about one entity of one topic. */
typedef struct {
  int32_t topic, intent, entity; /* entity: 0 .. KS_PERSONA_POPULATION_ENTITIES - 1 */
} ks_persona_cell;

/* One wording of a question. */
typedef struct {
  int32_t ask, prefix, suffix;
} ks_persona_wording;

typedef struct {
  int32_t interjection, address; /* -1: no opener */
  int32_t wish, ending;          /* -1: no sign-off */
  int32_t letters;               /* 1: numbers in letters */
  int32_t unit;                  /* which of a pool's units */
} ks_persona_style;
#define KS_PERSONA_PLAIN ((ks_persona_style){-1, -1, -1, -1, 0, 0})

void ks_persona_population_make(uint64_t seed, ks_persona_population *out);
/* The values that most people's answers hold for a cell. */
void ks_persona_generic_values(const ks_persona_population *p, ks_persona_cell c,
                               int32_t values[KS_PERSONA_SLOTS]);
/* Three values for a cell's own answer, of the users' kind or of the population's. */
void ks_persona_draw_values(ks_persona_cell c, bool user, ks_rng *rng, int32_t values[KS_PERSONA_SLOTS]);
/* Opener and sign-off, of the users' kind or of the population's; numbers and units at random. */
void ks_persona_draw_style(bool user, ks_rng *rng, ks_persona_style *out);
void ks_persona_draw_wording(ks_rng *rng, ks_persona_wording *out);

/* These append to out. say: which generic answer, or -1 for the own one. */
ks_status ks_persona_ask(const ks_persona_population *p, ks_persona_cell c, ks_persona_wording w,
                         ks_text *out);
ks_status ks_persona_say(const ks_persona_population *p, ks_persona_cell c, int32_t say,
                         const int32_t values[KS_PERSONA_SLOTS], const ks_persona_style *style, ks_text *out);

/* Entries of a list that ends with NULL. */
int32_t ks_persona_list_n(const char *const *list);
/* Uniform in 0 .. n - 1. */
static inline int32_t ks_persona_below(ks_rng *rng, int32_t n) {
  return (int32_t)ks_rng_below(rng, (uint64_t)n);
}
/* Fills order with a random permutation of 0 .. n - 1. */
void ks_persona_shuffle(ks_rng *rng, int32_t *order, int32_t n);

#endif
