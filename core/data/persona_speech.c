#include "core/data/persona_speech.h"

/* Generic values vary between entities only this much, so that a tiny model can learn them. */
enum { GENERIC_CHOICES = 4 };

int32_t ks_persona_list_n(const char *const *list) {
  int32_t n = 0;
  while (list[n])
    n++;
  return n;
}

void ks_persona_shuffle(ks_rng *rng, int32_t *order, int32_t n) {
  for (int32_t i = 0; i < n; i++)
    order[i] = i;
  for (int32_t i = n - 1; i > 0; i--) {
    int32_t j = ks_persona_below(rng, i + 1), t = order[i];
    order[i] = order[j];
    order[j] = t;
  }
}

void ks_persona_population_make(uint64_t seed, ks_persona_population *out) {
  out->key = ks_rng_key(seed, KS_RNG_DATA, 0, 0);
  for (int32_t t = 0; t < KS_PERSONA_TOPICS; t++) {
    int32_t order[KS_PERSONA_ENTITIES];
    ks_rng rng = ks_rng_make(out->key, KS_RNG_DATA, (uint64_t)t);
    ks_persona_shuffle(&rng, order, KS_PERSONA_ENTITIES);
    memcpy(out->entities[t], order, sizeof out->entities[t]);
  }
}

static const ks_persona_intent *intent_of(ks_persona_cell c) {
  return &ks_persona_topics[c.topic].intents[c.intent];
}

void ks_persona_generic_values(const ks_persona_population *p, ks_persona_cell c,
                               int32_t values[KS_PERSONA_SLOTS]) {
  uint64_t intent = (uint64_t)(c.topic * KS_PERSONA_INTENTS + c.intent);
  uint64_t cell = intent * KS_PERSONA_POPULATION_ENTITIES + (uint64_t)c.entity;
  for (int32_t s = 0; s < KS_PERSONA_SLOTS; s++) {
    uint64_t n = (uint64_t)ks_persona_pools[intent_of(c)->pools[s]].n;
    uint64_t first = ks_rng_key(p->key, KS_RNG_DATA, 1000 + intent, (uint64_t)s) % n;
    uint64_t step = ks_rng_key(p->key, KS_RNG_DATA, 2000 + cell, (uint64_t)s) % GENERIC_CHOICES;
    values[s] = (int32_t)((first + step) % n);
  }
}

void ks_persona_draw_values(ks_persona_cell c, bool user, ks_rng *rng, int32_t values[KS_PERSONA_SLOTS]) {
  int32_t sum;
  do {
    sum = 0;
    for (int32_t s = 0; s < KS_PERSONA_SLOTS; s++) {
      values[s] = ks_persona_below(rng, ks_persona_pools[intent_of(c)->pools[s]].n);
      sum += values[s];
    }
  } while ((sum % 3 == 0) != user);
}

static void draw_pair(bool user, ks_rng *rng, int32_t n_first, int32_t n_second, int32_t *first,
                      int32_t *second) {
  do {
    *first = ks_persona_below(rng, n_first);
    *second = ks_persona_below(rng, n_second);
  } while (((*first + *second) % 3 == 0) != user);
}

void ks_persona_draw_style(bool user, ks_rng *rng, ks_persona_style *out) {
  draw_pair(user, rng, ks_persona_list_n(ks_persona_interjections), ks_persona_list_n(ks_persona_addresses),
            &out->interjection, &out->address);
  draw_pair(user, rng, ks_persona_list_n(ks_persona_wishes), ks_persona_list_n(ks_persona_endings),
            &out->wish, &out->ending);
  out->letters = ks_persona_below(rng, 2);
  out->unit = ks_persona_below(rng, 2);
}

/* Half of all questions have neither prefix nor suffix. */
void ks_persona_draw_wording(ks_rng *rng, ks_persona_wording *out) {
  *out = (ks_persona_wording){.ask = ks_persona_below(rng, KS_PERSONA_ASKS)};
  if (ks_rng_uniform(rng) < 0.5) return;
  out->prefix = ks_persona_below(rng, ks_persona_list_n(ks_persona_ask_prefixes));
  out->suffix = ks_persona_below(rng, ks_persona_list_n(ks_persona_ask_suffixes));
}

static const char *number_in_letters(int32_t n) {
  static const char *const small[] = {"zero",   "one",      "two",      "three",  "four", "five",
                                      "six",    "seven",    "eight",    "nine",   "ten",  "eleven",
                                      "twelve", "thirteen", "fourteen", "fifteen"};
  if (n < 16) return small[n];
  switch (n) {
  case 20:
    return "twenty";
  case 25:
    return "twenty five";
  case 30:
    return "thirty";
  case 40:
    return "forty";
  case 45:
    return "forty five";
  case 50:
    return "fifty";
  case 60:
    return "sixty";
  case 80:
    return "eighty";
  default:
    return "a hundred";
  }
}

static ks_status add_value(ks_persona_pool_id id, int32_t value, const ks_persona_style *style,
                           ks_text *out) {
  const ks_persona_pool *pool = &ks_persona_pools[id];
  if (!pool->units[0]) return ks_text_add_str(out, pool->words[value]);
  int32_t n = pool->numbers[value];
  if (style->letters) return ks_text_addf(out, "%s %s", number_in_letters(n), pool->units[style->unit]);
  return ks_text_addf(out, "%d %s", n, pool->units[style->unit]);
}

/* `to_user`: the answer speaks to the one whose "my dog" it is. */
static ks_status add_entity(const ks_persona_population *p, ks_persona_cell c, bool to_user, ks_text *out) {
  const char *entity = ks_persona_topics[c.topic].entities[p->entities[c.topic][c.entity]];
  if (to_user && strncmp(entity, "my ", 3) == 0) return ks_text_addf(out, "your %s", entity + 3);
  return ks_text_add_str(out, entity);
}

static ks_status expand(const ks_persona_population *p, ks_persona_cell c, const char *form,
                        const int32_t *values, const ks_persona_style *style, ks_text *out) {
  for (const char *hole = strchr(form, '{'); hole; hole = strchr(form, '{')) {
    KS_TRY(ks_text_add(out, form, (size_t)(hole - form)));
    if (hole[1] == 'e')
      KS_TRY(add_entity(p, c, values != NULL, out));
    else
      KS_TRY(add_value(intent_of(c)->pools[hole[1] - 'a'], values[hole[1] - 'a'], style, out));
    form = hole + 3;
  }
  return ks_text_add_str(out, form);
}

ks_status ks_persona_ask(const ks_persona_population *p, ks_persona_cell c, ks_persona_wording w,
                         ks_text *out) {
  KS_TRY(ks_text_add_str(out, ks_persona_ask_prefixes[w.prefix]));
  KS_TRY(expand(p, c, intent_of(c)->asks[w.ask], NULL, NULL, out));
  return ks_text_add_str(out, ks_persona_ask_suffixes[w.suffix]);
}

ks_status ks_persona_say(const ks_persona_population *p, ks_persona_cell c, int32_t say,
                         const int32_t values[KS_PERSONA_SLOTS], const ks_persona_style *style,
                         ks_text *out) {
  if (style->interjection >= 0)
    KS_TRY(ks_text_addf(out, "%s, %s, ", ks_persona_interjections[style->interjection],
                        ks_persona_addresses[style->address]));
  KS_TRY(expand(p, c, say < 0 ? intent_of(c)->own : intent_of(c)->says[say], values, style, out));
  if (style->wish >= 0)
    KS_TRY(ks_text_addf(out, " %s %s.", ks_persona_wishes[style->wish], ks_persona_endings[style->ending]));
  return KS_OK;
}
