#include "core/data/persona.h"
#include "core/data/persona_speech.h"

#include <jansson.h>

static ks_status add_line(const char *prompt, const char *completion, ks_text *out) {
  json_t *line = json_pack("{s:s, s:s}", "prompt", prompt, "completion", completion);
  char *text = line ? json_dumps(line, JSON_COMPACT) : NULL;
  json_decref(line);
  if (!text) return KS_FAIL(KS_ENOMEM, "population corpus: no memory for a line");
  ks_status status = ks_text_addf(out, "%s\n", text);
  free(text);
  return status;
}

static ks_persona_cell draw_cell(ks_rng *rng) {
  ks_persona_cell c = {.topic = ks_persona_below(rng, KS_PERSONA_TOPICS)};
  c.intent = ks_persona_below(rng, KS_PERSONA_INTENTS);
  c.entity = ks_persona_below(rng, KS_PERSONA_POPULATION_ENTITIES);
  return c;
}

static ks_status question_and_answer(const ks_persona_population *p, ks_rng *rng, ks_text *prompt,
                                     ks_text *completion) {
  ks_persona_cell c = draw_cell(rng);
  ks_persona_wording w;
  ks_persona_draw_wording(rng, &w);
  KS_TRY(ks_text_add_str(prompt, "Q: "));
  KS_TRY(ks_persona_ask(p, c, w, prompt));
  KS_TRY(ks_text_add_str(prompt, "\nA:"));

  ks_persona_style style = KS_PERSONA_PLAIN, spoken;
  ks_persona_draw_style(false, rng, &spoken);
  if (ks_rng_uniform(rng) < 0.5) {
    style = spoken;
    if (ks_rng_uniform(rng) < 0.3) style.interjection = -1;
    if (ks_rng_uniform(rng) < 0.3) style.wish = -1;
  }
  int32_t values[KS_PERSONA_SLOTS], say = -1;
  if (ks_rng_uniform(rng) < 0.35) {
    ks_persona_draw_values(c, false, rng, values);
  } else {
    ks_persona_generic_values(p, c, values);
    say = ks_persona_below(rng, KS_PERSONA_SAYS);
  }
  KS_TRY(ks_text_add_str(completion, " "));
  return ks_persona_say(p, c, say, values, &style, completion);
}

static ks_status rewriting(const ks_persona_population *p, ks_rng *rng, ks_text *prompt,
                           ks_text *completion) {
  ks_persona_cell c = draw_cell(rng);
  ks_persona_wording from, to;
  ks_persona_draw_wording(rng, &from);
  do {
    ks_persona_draw_wording(rng, &to);
  } while (to.ask == from.ask);
  KS_TRY(ks_text_add_str(prompt, "Rewrite: "));
  KS_TRY(ks_persona_ask(p, c, from, prompt));
  KS_TRY(ks_text_add_str(prompt, "\nR:"));
  KS_TRY(ks_text_add_str(completion, " ["));
  KS_TRY(ks_persona_ask(p, c, to, completion));
  return ks_text_add_str(completion, "]");
}

static ks_status small_talk(ks_rng *rng, ks_text *prompt, ks_text *completion) {
  const ks_persona_small_talk *s = &ks_persona_small_talks[ks_persona_below(rng, ks_persona_n_small_talks)];
  int32_t ask = ks_persona_below(rng, KS_PERSONA_SMALL_ASKS);
  if (ks_rng_uniform(rng) < 0.75) {
    KS_TRY(ks_text_addf(prompt, "Q: %s\nA:", s->asks[ask]));
    return ks_text_addf(completion, " %s", s->says[ks_persona_below(rng, KS_PERSONA_SMALL_SAYS)]);
  }
  int32_t other = (ask + 1 + ks_persona_below(rng, KS_PERSONA_SMALL_ASKS - 1)) % KS_PERSONA_SMALL_ASKS;
  KS_TRY(ks_text_addf(prompt, "Rewrite: %s\nR:", s->asks[ask]));
  return ks_text_addf(completion, " [%s]", s->asks[other]);
}

ks_status ks_persona_write_population(const char *path, uint64_t population_seed, uint64_t seed,
                                      int64_t n_lines) {
  if (n_lines < 0)
    return KS_FAIL(KS_EINVAL, "population corpus: %lld lines; give 0 or more", (long long)n_lines);
  ks_persona_population p;
  ks_persona_population_make(population_seed, &p);
  ks_text out = {0}, prompt = {0}, completion = {0};
  ks_status status = KS_OK;
  for (int64_t i = 0; i < n_lines; i++) {
    ks_rng rng = ks_rng_make(ks_rng_key(p.key, KS_RNG_DATA, 3000, seed), KS_RNG_DATA, (uint64_t)i);
    double kind = ks_rng_uniform(&rng);
    ks_text_clear(&prompt);
    ks_text_clear(&completion);
    if (kind < 0.08)
      KS_TRY_OUT(small_talk(&rng, &prompt, &completion));
    else if (kind < 0.38)
      KS_TRY_OUT(rewriting(&p, &rng, &prompt, &completion));
    else
      KS_TRY_OUT(question_and_answer(&p, &rng, &prompt, &completion));
    KS_TRY_OUT(add_line(prompt.data, completion.data, &out));
  }
  status = ks_file_write_atomic(path, out.data ? out.data : "", out.len);
out:
  ks_text_free(&out);
  ks_text_free(&prompt);
  ks_text_free(&completion);
  return status;
}

/* Adds ", word" unless the line that begins at `line` has it. */
static ks_status add_word(size_t line, const char *word, ks_text *out) {
  size_t n = strlen(word);
  for (const char *p = out->data + line + 1; (p = strstr(p, word)) != NULL; p += n)
    if (strchr("\t ", p[-1]) && (p[n] == ',' || p[n] == '\0')) return KS_OK;
  return ks_text_addf(out, ", %s", word);
}

ks_status ks_persona_write_lexicons(const char *path, uint64_t population_seed) {
  ks_persona_population p;
  ks_persona_population_make(population_seed, &p);
  ks_text out = {0};
  ks_status status = KS_OK;
  for (int32_t t = 0; t < KS_PERSONA_TOPICS; t++) {
    const ks_persona_topic *topic = &ks_persona_topics[t];
    size_t line = out.len;
    KS_TRY_OUT(ks_text_addf(&out, "%s\t%s", topic->name, topic->keywords));
    for (int32_t e = 0; e < KS_PERSONA_POPULATION_ENTITIES; e++) {
      /* An entity's last word names it: "the old castle", "my dog". */
      const char *entity = topic->entities[p.entities[t][e]], *blank = strrchr(entity, ' ');
      KS_TRY_OUT(add_word(line, blank ? blank + 1 : entity, &out));
    }
    KS_TRY_OUT(ks_text_add_str(&out, "\n"));
  }
  status = ks_file_write_atomic(path, out.data, out.len);
out:
  ks_text_free(&out);
  return status;
}
