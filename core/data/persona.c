#include "core/data/persona.h"
#include "core/data/persona_speech.h"
#include "core/data/text_map.h"

enum { FACTS = KS_PERSONA_FACTS_PER_TOPIC, MAX_TRIES = 400 };

/* Families of draws under a user's key. */
enum { DRAW_TOPICS = 1, DRAW_STYLE, DRAW_FACTS, DRAW_STREAM, DRAW_EVAL, DRAW_TYPING };

typedef struct {
  ks_persona_population population;
  uint64_t key;
  int32_t topics[KS_PERSONA_TOPICS], n_topics;
  ks_persona_style styles[KS_PERSONA_TOPICS];
  int32_t says[KS_PERSONA_TOPICS]
              [KS_PERSONA_INTENTS]; /* which of the generic answers is preferred, where no fact is */
  ks_persona_cell fact_cells[KS_PERSONA_TOPICS][FACTS];
  int32_t fact_values[KS_PERSONA_TOPICS][FACTS][KS_PERSONA_SLOTS];
  bool is_fact[KS_PERSONA_TOPICS][KS_PERSONA_CELLS];
} user;

/* One dialogue set before it is put into words. */
typedef struct {
  bool small_talk, repeat;
  int32_t small; /* which small talk */
  ks_persona_cell cell;
  int32_t fact; /* within the topic; -1: style alone */
  ks_persona_wording wording;
  int32_t say; /* of the response */
} item;

/* What the stream holds, for the held-out questions. */
typedef struct {
  ks_text_map questions;
  bool cells[KS_PERSONA_TOPICS][KS_PERSONA_CELLS];
  uint32_t fact_asks[KS_PERSONA_TOPICS][FACTS]; /* bit ask: the fact was stated as an answer to that form */
  int32_t stated[KS_PERSONA_TOPICS][FACTS],
      n_stated[KS_PERSONA_TOPICS]; /* facts in the order in which eval asks */
} seen;

static int32_t cell_index(ks_persona_cell c) {
  return c.intent * KS_PERSONA_POPULATION_ENTITIES + c.entity;
}

static ks_rng draw(const user *u, uint64_t family, uint64_t index) {
  return ks_rng_make(ks_rng_key(u->key, KS_RNG_DATA, family, 0), KS_RNG_DATA, index);
}

static void make_facts(user *u, int32_t t) {
  int32_t order[KS_PERSONA_CELLS];
  ks_rng rng = draw(u, DRAW_FACTS, (uint64_t)t);
  ks_persona_shuffle(&rng, order, KS_PERSONA_CELLS);
  for (int32_t f = 0; f < FACTS; f++) {
    ks_persona_cell c = {t, order[f] / KS_PERSONA_POPULATION_ENTITIES,
                         order[f] % KS_PERSONA_POPULATION_ENTITIES};
    u->fact_cells[t][f] = c;
    u->is_fact[t][order[f]] = true;
    ks_persona_draw_values(c, true, &rng, u->fact_values[t][f]);
  }
}

static void make_user(const ks_persona_params *p, user *u) {
  *u = (user){0};
  ks_persona_population_make(p->population_seed, &u->population);
  u->key = ks_rng_key(p->population_seed, KS_RNG_DATA, 1, p->user);
  ks_rng rng = draw(u, DRAW_TOPICS, 0);
  ks_persona_shuffle(&rng, u->topics, KS_PERSONA_TOPICS);
  u->n_topics = p->n_topics ? (int32_t)p->n_topics : KS_PERSONA_TOPICS;
  for (int32_t t = 0; t < KS_PERSONA_TOPICS; t++) {
    rng = draw(u, DRAW_STYLE, (uint64_t)t);
    ks_persona_draw_style(true, &rng, &u->styles[t]);
    for (int32_t i = 0; i < KS_PERSONA_INTENTS; i++)
      u->says[t][i] = ks_persona_below(&rng, KS_PERSONA_SAYS);
    make_facts(u, t);
  }
}

static ks_persona_cell draw_plain_cell(const user *u, int32_t topic, ks_rng *rng) {
  ks_persona_cell c = {.topic = topic};
  do {
    c.intent = ks_persona_below(rng, KS_PERSONA_INTENTS);
    c.entity = ks_persona_below(rng, KS_PERSONA_POPULATION_ENTITIES);
  } while (u->is_fact[topic][cell_index(c)]);
  return c;
}

/* The item of stream index i; roots: earlier informative items that repeat none. */
static item draw_item(const user *u, const ks_persona_params *p, const item *items, const int64_t *roots,
                      int64_t n_roots, int64_t i) {
  ks_rng rng = draw(u, DRAW_STREAM, (uint64_t)i);
  item it = {.fact = -1};
  double kind = ks_rng_uniform(&rng);
  if (kind < p->uninformative) {
    it.small_talk = true;
    it.small = ks_persona_below(&rng, ks_persona_n_small_talks);
    it.wording.ask = ks_persona_below(&rng, KS_PERSONA_SMALL_ASKS);
    it.say = ks_persona_below(&rng, KS_PERSONA_SMALL_SAYS);
    it.cell.topic = u->topics[ks_persona_below(&rng, u->n_topics)]; /* the conversation in which it falls */
    return it;
  }
  if (kind < p->uninformative + p->repeats && n_roots > 0) {
    it = items[roots[ks_rng_below(&rng, (uint64_t)n_roots)]];
    it.repeat = true;
    if (ks_rng_uniform(&rng) < 0.5) ks_persona_draw_wording(&rng, &it.wording);
    return it;
  }
  int32_t topic = u->topics[ks_persona_below(&rng, u->n_topics)];
  if (ks_rng_uniform(&rng) < p->difficulty) {
    it.fact = ks_persona_below(&rng, FACTS);
    it.cell = u->fact_cells[topic][it.fact];
  } else {
    it.cell = draw_plain_cell(u, topic, &rng);
  }
  ks_persona_draw_wording(&rng, &it.wording);
  it.say = ks_persona_below(&rng, KS_PERSONA_SAYS);
  return it;
}

/* A typing error for every twelve characters or so: two letters change places, or one is lost. */
static void mistype(ks_rng *rng, ks_text *text) {
  size_t n_errors = 1 + text->len / 12;
  for (size_t k = 0; k < n_errors && text->len > 2; k++) {
    size_t at = 1 + (size_t)ks_rng_below(rng, text->len - 2);
    char *p = text->data + at;
    if (ks_rng_uniform(rng) < 0.5) {
      char t = p[0];
      p[0] = p[1];
      p[1] = t;
    } else {
      memmove(p, p + 1, text->len - at); /* the NUL too */
      text->len--;
    }
  }
}

typedef struct {
  ks_text question, response, preferred;
} texts;

static ks_status speak(const user *u, const item *it, texts *out) {
  if (it->small_talk) {
    const ks_persona_small_talk *s = &ks_persona_small_talks[it->small];
    KS_TRY(ks_text_add_str(&out->question, s->asks[it->wording.ask]));
    KS_TRY(ks_text_add_str(&out->response, s->says[it->say]));
    return ks_text_add_str(&out->preferred, s->says[it->say]);
  }
  const ks_persona_population *p = &u->population;
  int32_t t = it->cell.topic, generic[KS_PERSONA_SLOTS];
  ks_persona_generic_values(p, it->cell, generic);
  KS_TRY(ks_persona_ask(p, it->cell, it->wording, &out->question));
  KS_TRY(ks_persona_say(p, it->cell, it->say, generic, &KS_PERSONA_PLAIN, &out->response));
  if (it->fact >= 0)
    return ks_persona_say(p, it->cell, -1, u->fact_values[t][it->fact], &u->styles[t], &out->preferred);
  return ks_persona_say(p, it->cell, u->says[t][it->cell.intent], generic, &u->styles[t], &out->preferred);
}

/* Puts the item into words and adds it; typing: NULL, or the noise. */
static ks_status add_item(const user *u, const item *it, ks_rng *typing, ks_dataset *d) {
  texts w = {0};
  ks_status status = speak(u, it, &w);
  if (status == KS_OK && typing) mistype(typing, &w.response);
  if (status == KS_OK)
    status = ks_dataset_add(d, w.question.data, w.response.data, w.preferred.data,
                            ks_persona_topics[it->cell.topic].name, it->small_talk || it->repeat);
  if (status == KS_OK && it->fact >= 0) d->sets[d->n_sets - 1].fact = it->cell.topic * FACTS + it->fact;
  ks_text_free(&w.question);
  ks_text_free(&w.response);
  ks_text_free(&w.preferred);
  return status;
}

static ks_status make_stream(const user *u, const ks_persona_params *p, seen *s, ks_dataset *d) {
  item *items = NULL;
  int64_t *roots = NULL, n_roots = 0;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&items, (size_t)p->stream_size, sizeof *items, "persona stream"));
  KS_TRY_OUT(ks_alloc_array(&roots, (size_t)p->stream_size, sizeof *roots, "persona stream"));
  for (int64_t i = 0; i < p->stream_size; i++) {
    items[i] = draw_item(u, p, items, roots, n_roots, i);
    const item *it = &items[i];
    ks_rng typing = draw(u, DRAW_TYPING, (uint64_t)i);
    bool noisy = ks_rng_uniform(&typing) < p->noise;
    KS_TRY_OUT(add_item(u, it, noisy ? &typing : NULL, d));
    KS_TRY_OUT(ks_text_map_put(&s->questions, d->sets[i].question, NULL, i, NULL));
    if (it->small_talk) continue;
    s->cells[it->cell.topic][cell_index(it->cell)] = true;
    if (it->fact >= 0) s->fact_asks[it->cell.topic][it->fact] |= 1u << it->wording.ask;
    if (!it->repeat) roots[n_roots++] = i;
  }
out:
  free(items);
  free(roots);
  return status;
}

/* A held-out item of one topic; `loose` drops the wishes that cannot always be met. */
static item draw_eval_item(const user *u, const seen *s, int32_t topic, int32_t fact, bool loose,
                           ks_rng *rng) {
  item it = {.fact = fact};
  if (fact >= 0) {
    it.cell = u->fact_cells[topic][fact];
    uint32_t used = s->fact_asks[topic][fact];
    bool all_used = used == (1u << KS_PERSONA_ASKS) - 1;
    do {
      ks_persona_draw_wording(rng, &it.wording);
    } while (!loose && !all_used && (used >> it.wording.ask & 1));
  } else {
    for (int k = 0; k < 32; k++) {
      it.cell = draw_plain_cell(u, topic, rng);
      if (loose || !s->cells[topic][cell_index(it.cell)]) break;
    }
    ks_persona_draw_wording(rng, &it.wording);
  }
  it.say = ks_persona_below(rng, KS_PERSONA_SAYS);
  return it;
}

/* Adds held-out set i, whose question is new word for word. */
static ks_status add_eval(const user *u, seen *s, int32_t topic, int32_t fact, ks_rng *rng, int64_t eval_size,
                          ks_dataset *d) {
  for (int k = 0; k < MAX_TRIES; k++) {
    item it = draw_eval_item(u, s, topic, fact, k >= MAX_TRIES / 2, rng);
    ks_text question = {0};
    ks_status status = ks_persona_ask(&u->population, it.cell, it.wording, &question);
    bool is_new = status == KS_OK && ks_text_map_get(&s->questions, question.data, NULL) < 0;
    ks_text_free(&question);
    KS_TRY(status);
    if (!is_new) continue;
    KS_TRY(add_item(u, &it, NULL, d));
    return ks_text_map_put(&s->questions, d->sets[d->n_sets - 1].question, NULL, d->n_sets - 1, NULL);
  }
  return KS_FAIL(KS_ECONFIG,
                 "persona: topic '%s' has no %d-th new question; use fewer than %lld held-out questions",
                 ks_persona_topics[topic].name, (int)d->n_sets, (long long)eval_size);
}

static ks_status make_eval(const user *u, const ks_persona_params *p, seen *s, ks_dataset *d) {
  for (int32_t t = 0; t < KS_PERSONA_TOPICS; t++) {
    int32_t order[FACTS];
    ks_rng rng = draw(u, DRAW_EVAL, (1u << 30) + (uint64_t)t);
    ks_persona_shuffle(&rng, order, FACTS);
    for (int32_t f = 0; f < FACTS; f++)
      if (s->fact_asks[t][order[f]]) s->stated[t][s->n_stated[t]++] = order[f];
  }
  int64_t n_asked[KS_PERSONA_TOPICS] = {0};
  for (int64_t i = 0; i < p->eval_size; i++) {
    int32_t topic = u->topics[i % u->n_topics], fact = -1;
    ks_rng rng = draw(u, DRAW_EVAL, (1ull << 31) + (uint64_t)i);
    if (ks_rng_uniform(&rng) < p->difficulty && s->n_stated[topic] > 0)
      fact = s->stated[topic][n_asked[topic]++ % s->n_stated[topic]];
    KS_TRY(add_eval(u, s, topic, fact, &rng, p->eval_size, d));
  }
  return KS_OK;
}

static ks_status number_parts(const ks_persona_params *p, ks_dataset *d) {
  KS_TRY(ks_alloc_array(&d->stream, (size_t)p->stream_size, sizeof *d->stream, "persona stream"));
  KS_TRY(ks_alloc_array(&d->eval, (size_t)p->eval_size, sizeof *d->eval, "persona eval"));
  for (int64_t i = 0; i < p->stream_size; i++)
    d->stream[d->n_stream++] = i;
  for (int64_t i = 0; i < p->eval_size; i++)
    d->eval[d->n_eval++] = p->stream_size + i;
  return KS_OK;
}

static void hash_sets(ks_dataset *d) {
  ks_sha256 h;
  ks_sha256_init(&h);
  for (int64_t i = 0; i < d->n_sets; i++) {
    const ks_set *s = &d->sets[i];
    const char *parts[] = {s->question, s->response, s->preferred, d->topics[s->topic]};
    for (size_t k = 0; k < sizeof parts / sizeof parts[0]; k++)
      ks_sha256_add(&h, parts[k], strlen(parts[k]) + 1);
  }
  ks_sha256_finish(&h, d->sha256);
}

static ks_status check_share(const char *name, double v, bool one_allowed) {
  if (v >= 0 && (v < 1 || (one_allowed && v == 1))) return KS_OK;
  return KS_FAIL(KS_ECONFIG, "persona: %s is %g; give a share from 0 to %s1", name, v,
                 one_allowed ? "" : "below ");
}

static ks_status check_params(const ks_persona_params *p) {
  if (p->n_topics < 0 || p->n_topics > KS_PERSONA_TOPICS)
    return KS_FAIL(KS_ECONFIG, "persona: n_topics is %lld; give 1 to %d, or 0 for all",
                   (long long)p->n_topics, KS_PERSONA_TOPICS);
  if (p->stream_size < 1 || p->stream_size > (1 << 28))
    return KS_FAIL(KS_ECONFIG, "persona: stream_size is %lld; give 1 to %d", (long long)p->stream_size,
                   1 << 28);
  int64_t n_topics = p->n_topics ? p->n_topics : KS_PERSONA_TOPICS;
  if (p->eval_size < n_topics || p->eval_size > (1 << 28))
    return KS_FAIL(KS_ECONFIG,
                   "persona: eval_size is %lld; give at least one held-out question for each of the %lld "
                   "topics, at most %d",
                   (long long)p->eval_size, (long long)n_topics, 1 << 28);
  KS_TRY(check_share("uninformative", p->uninformative, false));
  KS_TRY(check_share("repeats", p->repeats, false));
  KS_TRY(check_share("difficulty", p->difficulty, true));
  KS_TRY(check_share("noise", p->noise, false));
  if (p->uninformative + p->repeats >= 1)
    return KS_FAIL(
        KS_ECONFIG,
        "persona: uninformative %g and repeats %g leave no room for anything else; their sum must be below 1",
        p->uninformative, p->repeats);
  return KS_OK;
}

ks_status ks_persona_create(const ks_persona_params *params, ks_dataset **out) {
  KS_TRY(check_params(params));
  ks_dataset *d = NULL;
  user *u = NULL;
  seen *s = NULL;
  ks_status status;
  KS_TRY_OUT(ks_alloc_array(&u, 1, sizeof *u, "persona user"));
  KS_TRY_OUT(ks_alloc_array(&s, 1, sizeof *s, "persona user"));
  KS_TRY_OUT(ks_dataset_create("persona", &d));
  make_user(params, u);
  KS_TRY_OUT(make_stream(u, params, s, d));
  KS_TRY_OUT(make_eval(u, params, s, d));
  KS_TRY_OUT(number_parts(params, d));
  hash_sets(d);
  *out = d;
  d = NULL;
out:
  if (s) ks_text_map_free(&s->questions);
  free(s);
  free(u);
  ks_dataset_destroy(d);
  return status;
}
