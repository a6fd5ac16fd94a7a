/* The persona generator: the same bytes for the same seeds, shares as asked, honest held-out questions,
 * nothing of a user in the population. */
#include "core/data/persona.h"
#include "core/data/persona_speech.h"
#include "core/data/text_map.h"

#include <criterion/criterion.h>
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

static ks_dataset *create(const ks_persona_params *p) {
  ks_dataset *d = NULL;
  cr_assert_eq(ks_persona_create(p, &d), KS_OK, "%s", ks_error_message());
  cr_assert_eq(d->n_stream, p->stream_size);
  cr_assert_eq(d->n_eval, p->eval_size);
  return d;
}

static ks_persona_params with_user(uint64_t user) {
  ks_persona_params p = KS_PERSONA_DEFAULT;
  p.user = user;
  return p;
}

static int words_in(const char *text) {
  int n = 0;
  for (const char *p = text; *p; p++)
    n += *p != ' ' && (p == text || p[-1] == ' ');
  return n;
}

static bool is_small_talk(const ks_set *s) {
  for (int32_t k = 0; k < ks_persona_n_small_talks; k++)
    for (int a = 0; a < KS_PERSONA_SMALL_ASKS; a++)
      if (strcmp(s->question, ks_persona_small_talks[k].asks[a]) == 0) return true;
  return false;
}

/* |count - n p| within five standard deviations of a binomial. */
static void check_share(const char *what, double count, double n, double p) {
  double bound = 5 * sqrt(n * p * (1 - p));
  cr_expect(fabs(count - n * p) <= bound, "%s: %g of %g, asked %g, bound %g", what, count, n, p, bound);
}

/* A whole file that `write` made, NUL-terminated; free(). */
static char *written(ks_status (*write)(const char *path, const void *arg), const void *arg, char hash[65]) {
  char path[] = "/tmp/ks-test-persona-XXXXXX", *text;
  size_t n;
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  cr_assert_eq(write(path, arg), KS_OK, "%s", ks_error_message());
  cr_assert_eq(ks_file_read(path, 1u << 30, &text, &n), KS_OK);
  if (hash) cr_assert_eq(ks_sha256_file(path, hash), KS_OK);
  unlink(path);
  return text;
}

typedef struct {
  uint64_t population_seed, seed;
  int64_t n_lines;
} corpus;

static ks_status write_corpus(const char *path, const void *arg) {
  const corpus *c = arg;
  return ks_persona_write_population(path, c->population_seed, c->seed, c->n_lines);
}

static ks_status write_lexicons(const char *path, const void *arg) {
  const uint64_t *seed = arg;
  return ks_persona_write_lexicons(path, *seed);
}

/* ---------------------------------------------------------------- determinism */

/* Changing these hashes changes every recorded result that was made with the dataset: a new population must
 * be trained. */
Test(persona, bytes_are_pinned) {
  static const struct {
    uint64_t population_seed, user;
    int64_t stream_size, eval_size;
    const char *sha256;
  } cases[] = {
      {1, 0, 480, 64, "efab765f7b02854c0f98bfd8f86ab6f5fb05070e7572be9cd132e559b450176d"},
      {1, 1, 480, 64, "1672470dd09a3c7e77d8a4959b57e3bc4ccbcf55bc0f6987b538d8572c90df4b"},
      {1, 0, 2000, 64, "65fad89ea1e43cfb0de29c621b797ae460e8bdb53fed34541a97bef4af1cf6cc"},
      {2, 0, 480, 64, "cd6fd747f2ebbb869caac73c6c78ba62972b9b05502bec47af45c5324c64a35c"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_persona_params p = KS_PERSONA_DEFAULT;
    p.population_seed = cases[i].population_seed;
    p.user = cases[i].user;
    p.stream_size = cases[i].stream_size;
    p.eval_size = cases[i].eval_size;
    ks_dataset *d = create(&p);
    cr_expect_str_eq(d->sha256, cases[i].sha256, "case %zu: %s", i, d->sha256);
    ks_dataset_destroy(d);
  }
  char hash[65];
  free(written(write_corpus, &(corpus){1, 1, 2000}, hash));
  cr_expect_str_eq(hash, "39c762c532730047344699597f4223414ca3488d47c19c7f65cf82ede5e3ee3b", "population: %s",
                   hash);
  free(written(write_lexicons, &(uint64_t){1}, hash));
  cr_expect_str_eq(hash, "2e63681d345d9912f3a7090888231bb6cebef99d729ac6264ad3877edc0489b3", "lexicons: %s",
                   hash);
}

Test(persona, committed_lexicons_are_the_populations) {
  char hash[65];
  free(written(write_lexicons, &(uint64_t){1}, hash));
  char committed[65];
  cr_assert_eq(ks_sha256_file(KS_SOURCE_DIR "/datasets/lexicons/persona.tsv", committed), KS_OK);
  cr_expect_str_eq(hash, committed);
}

Test(persona, longer_streams_begin_the_same) {
  ks_persona_params p = KS_PERSONA_DEFAULT;
  ks_dataset *a = create(&p);
  p.stream_size = 100;
  ks_dataset *b = create(&p);
  for (int64_t i = 0; i < 100; i++) {
    cr_expect_str_eq(a->sets[i].question, b->sets[i].question);
    cr_expect_str_eq(a->sets[i].preferred, b->sets[i].preferred);
    cr_expect_eq(a->sets[i].fact, b->sets[i].fact);
  }
  ks_dataset_destroy(a);
  ks_dataset_destroy(b);
}

/* ---------------------------------------------------------------- shares */

Test(persona, shares_are_as_asked) {
  static const struct {
    double uninformative, repeats, difficulty, noise;
  } cases[] = {
      {0.25, 0.2, 0.5, 0.05}, {0, 0, 0, 0}, {0.5, 0.4, 1, 0.5}, {0.1, 0.6, 0.2, 0.9}, {0.9, 0.05, 0.7, 0.3}};
  enum { N = 6000 };
  for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
    ks_persona_params p = KS_PERSONA_DEFAULT;
    p.stream_size = N;
    p.uninformative = cases[k].uninformative;
    p.repeats = cases[k].repeats;
    p.difficulty = cases[k].difficulty;
    p.noise = cases[k].noise;
    ks_dataset *d = create(&p);
    p.noise = 0;
    ks_dataset *clean = create(&p);
    int64_t small = 0, repeats = 0, fresh = 0, facts = 0, noisy = 0;
    for (int64_t i = 0; i < N; i++) {
      const ks_set *s = &d->sets[i], *c = &clean->sets[i];
      small += is_small_talk(s);
      repeats += s->uninformative && !is_small_talk(s);
      fresh += !s->uninformative;
      facts += !s->uninformative && s->fact >= 0;
      noisy += strcmp(s->response, c->response) != 0;
      cr_assert_str_eq(s->question, c->question, "noise changes the response alone");
      cr_assert_str_eq(s->preferred, c->preferred, "noise changes the response alone");
    }
    check_share("small talk", (double)small, N, p.uninformative);
    check_share("repeats", (double)repeats, N, p.repeats);
    check_share("facts", (double)facts, (double)fresh, p.difficulty);
    check_share("noise", (double)noisy, N, cases[k].noise);
    ks_dataset_destroy(d);
    ks_dataset_destroy(clean);
  }
}

Test(persona, topics_are_equally_frequent) {
  enum { N = 6000 };
  for (int64_t n_topics = 1; n_topics <= KS_PERSONA_TOPICS; n_topics += 11) {
    ks_persona_params p = KS_PERSONA_DEFAULT;
    p.stream_size = N;
    p.uninformative = p.repeats = 0;
    p.n_topics = n_topics;
    ks_dataset *d = create(&p);
    cr_expect_eq(d->n_topics, n_topics);
    int64_t counts[KS_PERSONA_TOPICS] = {0};
    for (int64_t i = 0; i < N; i++)
      counts[d->sets[i].topic]++;
    for (int64_t t = 0; t < n_topics; t++)
      check_share(d->topics[t], (double)counts[t], N, 1.0 / (double)n_topics);
    ks_dataset_destroy(d);
  }
}

/* Small talk falls into conversations of all topics alike, has nothing of the user's and is marked. */
Test(persona, small_talk_is_generic) {
  enum { N = 6000 };
  ks_persona_params p = KS_PERSONA_DEFAULT;
  p.stream_size = N;
  p.noise = 0;
  ks_dataset *d = create(&p);
  int64_t counts[KS_PERSONA_TOPICS] = {0}, n = 0;
  cr_assert_eq(d->n_topics, KS_PERSONA_TOPICS);
  for (int64_t i = 0; i < N; i++) {
    const ks_set *s = &d->sets[i];
    if (!is_small_talk(s)) continue;
    cr_expect(s->uninformative && s->fact == -1);
    cr_expect_str_eq(s->response, s->preferred);
    counts[s->topic]++;
    n++;
  }
  for (int64_t t = 0; t < d->n_topics; t++)
    check_share(d->topics[t], (double)counts[t], (double)n, 1.0 / KS_PERSONA_TOPICS);
  ks_dataset_destroy(d);
}

/* A repeat has the preferred answer of an earlier set, and about half of them its question, too. */
Test(persona, repeats_repeat) {
  ks_persona_params p = KS_PERSONA_DEFAULT;
  p.stream_size = 3000;
  ks_dataset *d = create(&p);
  ks_text_map answers = {0}, pairs = {0};
  int64_t n = 0, exact = 0, before;
  for (int64_t i = 0; i < d->n_stream; i++) {
    const ks_set *s = &d->sets[i];
    if (is_small_talk(s)) continue;
    if (s->uninformative) {
      n++;
      cr_assert_geq(ks_text_map_get(&answers, s->preferred, NULL), 0);
      exact += ks_text_map_get(&pairs, s->question, s->preferred) >= 0;
    }
    cr_assert_eq(ks_text_map_put(&answers, s->preferred, NULL, i, &before), KS_OK);
    cr_assert_eq(ks_text_map_put(&pairs, s->question, s->preferred, i, &before), KS_OK);
  }
  cr_expect_gt(n, 500);
  /* A new wording is the old one by chance now and then, so at least half. */
  cr_expect((double)exact >= (double)n / 2 - 5 * sqrt((double)n) / 2, "%d exact copies of %d", (int)exact,
            (int)n);
  cr_expect((double)exact <= (double)n * 0.75, "%d exact copies of %d", (int)exact, (int)n);
  ks_text_map_free(&answers);
  ks_text_map_free(&pairs);
  ks_dataset_destroy(d);
}

/* ---------------------------------------------------------------- held-out questions */

static void check_held_out(const ks_persona_params *p) {
  ks_dataset *d = create(p);
  ks_text_map questions = {0};
  bool *stated = calloc(KS_PERSONA_TOPICS * KS_PERSONA_FACTS_PER_TOPIC, sizeof *stated);
  for (int64_t i = 0; i < d->n_stream; i++) {
    const ks_set *s = &d->sets[d->stream[i]];
    cr_assert_eq(ks_text_map_put(&questions, s->question, NULL, i, NULL), KS_OK);
    if (s->fact >= 0) stated[s->fact] = true;
  }
  int64_t counts[KS_PERSONA_TOPICS + 1] = {0}, facts = 0, n_topics = 0;
  for (int64_t i = 0; i < d->n_eval; i++) {
    const ks_set *s = &d->sets[d->eval[i]];
    int64_t found;
    cr_assert_eq(ks_text_map_put(&questions, s->question, NULL, -5, &found), KS_OK);
    cr_expect_eq(found, -5, "user %d: '%s' is asked elsewhere", (int)p->user, s->question);
    if (s->fact >= 0)
      cr_expect(stated[s->fact], "user %d: a fact that was never stated is asked", (int)p->user);
    cr_expect_not(is_small_talk(s));
    cr_expect_not(s->uninformative);
    cr_expect_str_neq(s->preferred, s->response, "nothing of the user's own in the answer");
    counts[s->topic]++;
    facts += s->fact >= 0;
  }
  for (int64_t t = 0; t <= KS_PERSONA_TOPICS; t++)
    n_topics += counts[t] > 0;
  cr_expect_eq(n_topics, p->n_topics ? p->n_topics : KS_PERSONA_TOPICS, "user %d: not all topics",
               (int)p->user);
  for (int64_t t = 0; t < d->n_topics; t++)
    cr_expect(counts[t] == 0 || llabs(counts[t] - p->eval_size / n_topics) <= 1);
  if (p->stream_size >= 480)
    check_share("held-out facts", (double)facts, (double)p->eval_size, p->difficulty);
  free(stated);
  ks_text_map_free(&questions);
  ks_dataset_destroy(d);
}

Test(persona, held_out_questions_are_new_and_answerable) {
  for (uint64_t user = 0; user < 20; user++) {
    ks_persona_params p = with_user(user);
    check_held_out(&p);
    p.difficulty = 1;
    p.eval_size = 200;
    check_held_out(&p);
    p.difficulty = 0;
    p.n_topics = 1 + (int64_t)user % 12;
    check_held_out(&p);
    p.difficulty = 0.5;
    p.stream_size = 10;
    check_held_out(&p);
  }
}

/* With a stream that is not too long, a stated fact is asked about in a form in which it was not stated. */
Test(persona, held_out_facts_are_asked_in_another_form) {
  ks_persona_params p = KS_PERSONA_DEFAULT;
  ks_dataset *d = create(&p);
  for (int64_t i = 0; i < d->n_eval; i++) {
    const ks_set *s = &d->sets[d->eval[i]];
    if (s->fact < 0) continue;
    uint32_t forms = 0, asked = 0;
    const ks_persona_topic *topic = &ks_persona_topics[s->fact / KS_PERSONA_FACTS_PER_TOPIC];
    for (int64_t j = 0; j <= d->n_stream; j++) {
      const ks_set *o = j < d->n_stream ? &d->sets[d->stream[j]] : s;
      if (o->fact != s->fact) continue;
      for (int in = 0; in < KS_PERSONA_INTENTS; in++)
        for (int a = 0; a < KS_PERSONA_ASKS; a++) {
          const char *form = topic->intents[in].asks[a], *hole = strstr(form, "{e}");
          char before[64], after[64];
          snprintf(before, sizeof before, "%.*s", (int)(hole - form), form);
          snprintf(after, sizeof after, "%s", hole + 3);
          if (!strstr(o->question, before) || !strstr(o->question, after)) continue;
          if (j < d->n_stream)
            forms |= 1u << (in * KS_PERSONA_ASKS + a);
          else
            asked |= 1u << (in * KS_PERSONA_ASKS + a);
        }
    }
    if (__builtin_popcount(forms) < KS_PERSONA_ASKS)
      cr_expect(asked & ~forms, "'%s' was asked so before", s->question);
  }
  ks_dataset_destroy(d);
}

/* ---------------------------------------------------------------- users and population */

Test(persona, users_differ_and_agree_with_themselves) {
  ks_persona_params p = with_user(0);
  p.stream_size = 3000;
  ks_dataset *a = create(&p);
  p.user = 1;
  ks_dataset *b = create(&p);
  const char *facts[KS_PERSONA_TOPICS * KS_PERSONA_FACTS_PER_TOPIC] = {0};
  ks_text_map others = {0};
  for (int64_t i = 0; i < b->n_sets; i++)
    if (!is_small_talk(&b->sets[i]))
      cr_assert_eq(ks_text_map_put(&others, b->sets[i].preferred, NULL, i, NULL), KS_OK);
  int64_t shared = 0, n = 0;
  for (int64_t i = 0; i < a->n_sets; i++) {
    const ks_set *s = &a->sets[i];
    if (is_small_talk(s)) continue;
    n++;
    shared += ks_text_map_get(&others, s->preferred, NULL) >= 0;
    if (s->fact < 0) continue;
    if (facts[s->fact]) cr_expect_str_eq(s->preferred, facts[s->fact], "a fact has two answers");
    facts[s->fact] = s->preferred;
  }
  /* Two users have the same opener and sign-off in a topic once in 48 x 48 times. */
  cr_expect_eq(shared, 0, "%d of %d answers are another user's, too", (int)shared, (int)n);
  ks_text_map_free(&others);
  ks_dataset_destroy(a);
  ks_dataset_destroy(b);
}

/* What is drawn for users and what is drawn for the population have nothing in common. */
Test(persona, users_speak_apart) {
  for (int user = 0; user < 2; user++)
    for (uint64_t i = 0; i < 2000; i++) {
      ks_rng rng = ks_rng_make(i, KS_RNG_TEST, 0);
      ks_persona_cell c = {(int32_t)(i % KS_PERSONA_TOPICS),
                           (int32_t)(i / KS_PERSONA_TOPICS % KS_PERSONA_INTENTS), 0};
      int32_t v[KS_PERSONA_SLOTS];
      ks_persona_draw_values(c, user, &rng, v);
      cr_assert_eq((v[0] + v[1] + v[2]) % 3 == 0, user);
      ks_persona_style style;
      ks_persona_draw_style(user, &rng, &style);
      cr_assert_eq((style.interjection + style.address) % 3 == 0, user);
      cr_assert_eq((style.wish + style.ending) % 3 == 0, user);
    }
}

/* Neither an answer that a user prefers nor the opener or sign-off of one is in the population's corpus. */
Test(persona, nothing_of_users_in_the_population) {
  char *text = written(write_corpus, &(corpus){1, 1, 20000}, NULL);
  for (uint64_t user = 0; user < 3; user++) {
    ks_persona_params p = with_user(user);
    ks_dataset *d = create(&p);
    for (int64_t i = 0; i < d->n_eval; i++) {
      const char *preferred = d->sets[d->eval[i]].preferred;
      const char *comma = strchr(strchr(preferred, ',') + 1, ',');
      char opener[64], *end;
      snprintf(opener, sizeof opener, "%.*s", (int)(comma + 2 - preferred), preferred);
      cr_expect_null(strstr(text, opener), "'%s' is in the population", opener);
      ks_text core = {0};
      cr_assert_eq(ks_text_add_str(&core, preferred), KS_OK);
      core.data[core.len - 1] = '\0';
      end = strrchr(core.data, '.');
      cr_expect_null(strstr(text, end + 1), "'%s' is in the population", end + 1);
      if (d->sets[d->eval[i]].fact >= 0) {
        end[1] = '\0';
        const char *fact = core.data + (comma + 2 - preferred);
        cr_expect_null(strstr(text, fact), "'%s' is in the population", fact);
      }
      ks_text_free(&core);
    }
    ks_dataset_destroy(d);
  }
  free(text);
}

Test(persona, the_population_has_its_three_kinds_of_lines) {
  enum { N = 10000 };
  char *text = written(write_corpus, &(corpus){1, 5, N}, NULL);
  int64_t lines = 0, rewrites = 0;
  for (char *p = text, *end; *p; p = end + 1) {
    end = strchr(p, '\n');
    *end = '\0';
    lines++;
    bool rewrite = strncmp(p, "{\"prompt\":\"Rewrite: ", 20) == 0;
    rewrites += rewrite;
    cr_assert(rewrite || strncmp(p, "{\"prompt\":\"Q: ", 14) == 0, "%s", p);
    cr_assert_not_null(strstr(p, rewrite ? "\\nR:\",\"completion\":\" [" : "\\nA:\",\"completion\":\" "),
                       "%s", p);
    if (rewrite) cr_assert_str_eq(end - 3, "]\"}", "%s", p);
  }
  cr_expect_eq(lines, N);
  check_share("rewriting", (double)rewrites, N, 0.30 + 0.08 * 0.25);
  free(text);
  char *empty = written(write_corpus, &(corpus){1, 5, 0}, NULL);
  cr_expect_str_empty(empty);
  free(empty);
}

/* ---------------------------------------------------------------- texts */

Test(persona, tables_are_whole) {
  for (int t = 0; t < KS_PERSONA_TOPICS; t++) {
    const ks_persona_topic *topic = &ks_persona_topics[t];
    cr_assert_not_null(topic->name);
    cr_assert_not_null(topic->keywords);
    for (int e = 0; e < KS_PERSONA_ENTITIES; e++) {
      cr_assert_not_null(topic->entities[e], "%s: entity %d", topic->name, e);
      for (int o = 0; o < e; o++)
        cr_expect_str_neq(topic->entities[e], topic->entities[o]);
    }
    for (int i = 0; i < KS_PERSONA_INTENTS; i++) {
      const ks_persona_intent *in = &topic->intents[i];
      for (int a = 0; a < KS_PERSONA_ASKS; a++) {
        cr_assert_not_null(in->asks[a], "%s %d ask %d", topic->name, i, a);
        cr_expect_not_null(strstr(in->asks[a], "{e}"), "%s", in->asks[a]);
        for (int o = 0; o < a; o++)
          cr_expect_str_neq(in->asks[a], in->asks[o]);
      }
      for (int s = 0; s < KS_PERSONA_SAYS; s++) {
        cr_assert_not_null(in->says[s], "%s %d say %d", topic->name, i, s);
        cr_expect_not_null(strstr(in->says[s], "{e}"), "%s", in->says[s]);
      }
      cr_assert_not_null(in->own, "%s %d own", topic->name, i);
      static const char *const holes[] = {"{e}", "{a}", "{b}", "{c}"};
      for (int h = 0; h < 4; h++)
        cr_expect_not_null(strstr(in->own, holes[h]), "%s lacks %s", in->own, holes[h]);
    }
  }
  for (int k = 0; k < KS_N_POOLS; k++) {
    const ks_persona_pool *pool = &ks_persona_pools[k];
    cr_expect_geq(pool->n, 3);
    for (int v = 0; v < pool->n; v++)
      cr_expect(pool->units[0] ? pool->numbers[v] > 0 && pool->units[1] : pool->words[v] != NULL,
                "pool %d value %d", k, v);
  }
}

Test(persona, texts_are_short_plain_and_complete) {
  for (uint64_t user = 0; user < 5; user++) {
    ks_persona_params p = with_user(user);
    p.noise = 0;
    p.eval_size = 200;
    ks_dataset *d = create(&p);
    for (int64_t i = 0; i < d->n_sets; i++) {
      const ks_set *s = &d->sets[i];
      const char *texts[] = {s->question, s->response, s->preferred};
      for (int k = 0; k < 3; k++)
        for (const char *c = texts[k]; *c; c++)
          cr_assert(islower((unsigned char)*c) || isdigit((unsigned char)*c) || strchr(" ,.?!", *c), "'%s'",
                    texts[k]);
      if (is_small_talk(s)) continue;
      cr_expect(words_in(s->question) >= 4 && words_in(s->question) <= 20, "%s", s->question);
      cr_expect(words_in(s->response) >= 5 && words_in(s->response) <= 20, "%s", s->response);
      cr_expect(words_in(s->preferred) >= 8 && words_in(s->preferred) <= 32, "%s", s->preferred);
    }
    ks_dataset_destroy(d);
  }
}

Test(persona, lexicons_have_a_line_a_topic) {
  char *text = written(write_lexicons, &(uint64_t){3}, NULL);
  int lines = 0;
  for (char *p = text, *end; *p; p = end + 1, lines++) {
    end = strchr(p, '\n');
    *end = '\0';
    char *tab = strchr(p, '\t');
    cr_assert_not_null(tab);
    *tab = '\0';
    cr_expect_str_eq(p, ks_persona_topics[lines].name);
    cr_expect_not_null(strstr(tab + 1, ", "));
  }
  cr_expect_eq(lines, KS_PERSONA_TOPICS);
  free(text);
}

/* ---------------------------------------------------------------- limits */

Test(persona, parameters_at_their_limits) {
  static const ks_persona_params good[] = {
      {.population_seed = 0, .user = 0, .stream_size = 1, .eval_size = 12},
      {.population_seed = UINT64_MAX,
       .user = UINT64_MAX,
       .stream_size = 50,
       .eval_size = 12,
       .difficulty = 1},
      {.stream_size = 50, .eval_size = 1, .n_topics = 1, .uninformative = 0.99, .noise = 0.99},
      {.stream_size = 50, .eval_size = 12, .n_topics = 12, .repeats = 0.99, .difficulty = 1},
      {.stream_size = 300, .eval_size = 500, .n_topics = 1, .difficulty = 1},
  };
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
    ks_dataset_destroy(create(&good[i]));

  static const struct {
    ks_persona_params params;
    const char *says;
  } bad[] = {
      {{.stream_size = 0, .eval_size = 64}, "persona: stream_size is 0; give 1 to 268435456"},
      {{.stream_size = -1, .eval_size = 64}, "persona: stream_size is -1; give 1 to 268435456"},
      {{.stream_size = INT64_MAX, .eval_size = 64},
       "persona: stream_size is 9223372036854775807; give 1 to 268435456"},
      {{.stream_size = 9, .eval_size = 11},
       "persona: eval_size is 11; give at least one held-out question for each of the 12 topics, at most "
       "268435456"},
      {{.stream_size = 9, .eval_size = 2, .n_topics = 3},
       "persona: eval_size is 2; give at least one held-out question for each of the 3 topics, at most "
       "268435456"},
      {{.stream_size = 9, .eval_size = 64, .n_topics = 13},
       "persona: n_topics is 13; give 1 to 12, or 0 for all"},
      {{.stream_size = 9, .eval_size = 64, .n_topics = -1},
       "persona: n_topics is -1; give 1 to 12, or 0 for all"},
      {{.stream_size = 9, .eval_size = 64, .uninformative = 1},
       "persona: uninformative is 1; give a share from 0 to below 1"},
      {{.stream_size = 9, .eval_size = 64, .uninformative = -0.1},
       "persona: uninformative is -0.1; give a share from 0 to below 1"},
      {{.stream_size = 9, .eval_size = 64, .repeats = NAN},
       "persona: repeats is nan; give a share from 0 to below 1"},
      {{.stream_size = 9, .eval_size = 64, .difficulty = 1.01},
       "persona: difficulty is 1.01; give a share from 0 to 1"},
      {{.stream_size = 9, .eval_size = 64, .noise = INFINITY},
       "persona: noise is inf; give a share from 0 to below 1"},
      {{.stream_size = 9, .eval_size = 64, .uninformative = 0.5, .repeats = 0.5},
       "persona: uninformative 0.5 and repeats 0.5 leave no room for anything else; their sum must be below "
       "1"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    ks_dataset *d = NULL;
    cr_expect_eq(ks_persona_create(&bad[i].params, &d), KS_ECONFIG, "case %zu", i);
    cr_expect_str_eq(ks_error_message(), bad[i].says, "case %zu: %s", i, ks_error_message());
    cr_expect_null(d);
  }
  cr_expect_eq(ks_persona_write_population("/tmp/never", 1, 1, -1), KS_EINVAL);
}

Test(persona, too_many_held_out_questions_are_refused) {
  ks_persona_params p = {.stream_size = 50, .eval_size = 40000, .n_topics = 1, .difficulty = 1};
  ks_dataset *d = NULL;
  cr_expect_eq(ks_persona_create(&p, &d), KS_ECONFIG);
  cr_expect_not_null(strstr(ks_error_message(), "use fewer than 40000 held-out questions"), "%s",
                     ks_error_message());
  cr_expect_null(d);
}
