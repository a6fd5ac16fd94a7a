/* The persona generator's text: topics, pools of values, ways of speaking, small talk. Internal to core/data.
 *
 * Templates hold {e} (entity) and {a}, {b}, {c} (values from the intent's three pools). All text is lower case and original.
 */
#ifndef KS_PERSONA_TABLES_H
#define KS_PERSONA_TABLES_H

#include <stdint.h>

enum {
  KS_PERSONA_TOPICS = 12,
  KS_PERSONA_ENTITIES = 24, /* in the tables; a population has KS_PERSONA_POPULATION_ENTITIES of them */
  KS_PERSONA_INTENTS = 4,
  KS_PERSONA_ASKS = 5,
  KS_PERSONA_SAYS = 2,
  KS_PERSONA_SLOTS = 3,
  KS_PERSONA_SMALL_ASKS = 4,
  KS_PERSONA_SMALL_SAYS = 2
};

typedef enum {
  KS_POOL_MINUTES,
  KS_POOL_DAYS,
  KS_POOL_TIMES,
  KS_POOL_MONEY,
  KS_POOL_HEAT,
  KS_POOL_SPICE,
  KS_POOL_KIN,
  KS_POOL_PLACE,
  KS_POOL_WEEKDAY,
  KS_POOL_WHEN,
  KS_POOL_BOX,
  KS_POOL_COLOUR,
  KS_POOL_PET_NAME,
  KS_POOL_TOWN,
  KS_POOL_CALM,
  KS_POOL_TOOL,
  KS_POOL_RIDE,
  KS_POOL_SOIL,
  KS_N_POOLS
} ks_persona_pool_id;

/* Words, or numbers with a unit (units[0] != NULL): a number is written in digits or letters, the unit in one of two ways. */
typedef struct {
  int32_t n;
  const char *words[16];
  int16_t numbers[12];
  const char *units[2];
} ks_persona_pool;
extern const ks_persona_pool ks_persona_pools[KS_N_POOLS];

typedef struct {
  ks_persona_pool_id pools[KS_PERSONA_SLOTS];
  const char *asks[KS_PERSONA_ASKS]; /* the same question in several ways */
  const char *says[KS_PERSONA_SAYS]; /* generic answers */
  const char *own;                   /* an answer that rests on somebody's own three values */
} ks_persona_intent;

typedef struct {
  const char *name;
  const char *keywords; /* for the lexicon, besides the entities: w1, w2, ... */
  const char *entities[KS_PERSONA_ENTITIES];
  ks_persona_intent intents[KS_PERSONA_INTENTS];
} ks_persona_topic;
extern const ks_persona_topic ks_persona_topics[KS_PERSONA_TOPICS];

typedef struct {
  const char *asks[KS_PERSONA_SMALL_ASKS];
  const char *says[KS_PERSONA_SMALL_SAYS];
} ks_persona_small_talk;

/* Lists that end with NULL. An opener is "{interjection}, {address}, ", a sign-off " {wish} {ending}." */
extern const char *const ks_persona_interjections[];
extern const char *const ks_persona_addresses[];
extern const char *const ks_persona_wishes[];
extern const char *const ks_persona_endings[];
extern const char *const ks_persona_ask_prefixes[]; /* the first is empty */
extern const char *const ks_persona_ask_suffixes[]; /* the first is empty */
extern const ks_persona_small_talk ks_persona_small_talks[];
extern const int32_t ks_persona_n_small_talks;

#endif
