/* Variants: prompt and marks, verdicts, rounds; that a source's variants depend on it alone. */
#include "core/score/score.h"
#include "core/synthesize/synthesize.h"
#include "core/synthesize/writer.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define MUST(expr)                                                                                           \
  do {                                                                                                       \
    ks_status must_ = (expr);                                                                                \
    cr_assert(must_ == KS_OK, "%s: %s", #expr, ks_error_message());                                          \
  } while (0)

/* ---------------------------------------------------------------- prompt, marks */

Test(synthesize, prompt) {
  static const struct {
    const char *prompt, *want;
  } cases[] = {
      {"Q: {question} A: {response}!",
       "Q: who {response}? A: {question} me!"}, /* what is put in is not looked at again */
      {"{question}{question}", "who {response}?who {response}?"},
      {"{ {quest} {question", "{ {quest} {question"},
      {"", ""},
      {"{{question}}", "{who {response}?}"},
  };
  const ks_synth_source source = {.question = "who {response}?", .response = "{question} me"};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_text out = {0};
    MUST(ks_writer_prompt(cases[i].prompt, &source, &out));
    MUST(ks_text_add(&out, "", 0));
    cr_expect(strcmp(out.data, cases[i].want) == 0, "\"%s\" gives \"%s\"", cases[i].prompt, out.data);
    ks_text_free(&out);
  }
  const ks_synth_source no_response = {.question = "q"};
  ks_text out = {0};
  MUST(ks_writer_prompt("{response}|{question}", &no_response, &out));
  cr_assert(eq(str, out.data, "|q"));
  ks_text_free(&out);
}

Test(synthesize, marks) {
  static const struct {
    const char *begin, *end, *text;
    bool ended, found;
    const char *want;
  } cases[] = {
      {"[", "]", "Sure: [ a new one ] and [more]", false, true, "a new one"},
      {"[", "]", "no marks", true, false, "no marks"},
      {"[", "]", "[never closed", false, false, "[never closed"},
      {"[", "]", "[ended by the model \n", true, true, "ended by the model"},
      {"[", "]", "] [late]", false, true, "late"},
      {"[", "]", "[]", false, true, ""},
      {"[", "]", "[ \n ]", false, true, ""},
      {"[", "]", "", true, false, ""},
      {"", "", " the first line \nthe second", false, true, "the first line"},
      {"", "", "cut for length", false, true, "cut for length"},
      {"", "", "\nnext", false, true, ""},
      {"Q: ", "", "\nQ: late line\nmore", false, true, "late line"},
      {"", "]", "up to ] here", false, true, "up to"},
      {"\"", "\"", "He said \"this one\".", false, true, "this one"},
      {"<q>", "</q>", "<q>\xC3\xA9t\xC3\xA9</q>", false, true, "\xC3\xA9t\xC3\xA9"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const ks_synthesize_params params = {.begin_mark = cases[i].begin, .end_mark = cases[i].end};
    bool found;
    char *out;
    MUST(ks_writer_extract(&params, cases[i].text, cases[i].ended, &found, &out));
    cr_expect(found == cases[i].found && strcmp(out, cases[i].want) == 0, "case %zu: %d \"%s\"", i,
              (int)found, out);
    free(out);
  }
}

Test(synthesize, verdict_names) {
  for (int i = 0; i <= KS_VARIANT_NO_ROOM; i++)
    for (int j = 0; j < i; j++)
      cr_assert(strcmp(ks_variant_verdict_name((ks_variant_verdict)i),
                       ks_variant_verdict_name((ks_variant_verdict)j)) != 0);
  cr_assert(eq(str, (char *)ks_variant_verdict_name((ks_variant_verdict)99), "unknown"));
}

/* ---------------------------------------------------------------- by rules */

enum { N_SOURCES = 7 };
static const char *const questions[N_SOURCES] = {"What is the capital of France?",
                                                 "How do I fix my car quickly?",
                                                 "hello",
                                                 "I am often tired because my kids are ill.",
                                                 "\xE4\xBD\xA0\xE5\xA5\xBD\xE5\x90\x97",
                                                 "  Give me three tips.  ",
                                                 "Why?"};

static void make_sources(ks_synth_source *sources) {
  for (int64_t i = 0; i < N_SOURCES; i++)
    sources[i] = (ks_synth_source){.question = questions[i],
                                   .response = "yes",
                                   .id = (uint64_t)(3 * i),
                                   .round = 2,
                                   .seed = (uint64_t)(i % 2),
                                   .adapter = -1};
}

static const ks_synthesize_params by_rules = {
    .kind = KS_SYNTH_RULES, .count = 3, .retries = 4, .min_rouge1 = 0.5, .max_rouge1 = 1};

/* What holds of all variants, whoever wrote them. */
static void check_variants(const ks_synthesize_params *p, const ks_synth_source *sources, int64_t n_sources,
                           const ks_variant *v, int64_t n) {
  for (int64_t s = 0; s < n_sources; s++) {
    int64_t n_tries = 0, n_accepted = 0;
    for (int64_t i = 0; i < n; i++) {
      cr_assert(i == 0 || v[i].source >= v[i - 1].source);
      if (v[i].source != s) continue;
      n_tries++;
      n_accepted += v[i].verdict == KS_VARIANT_ACCEPTED;
      cr_assert(v[i].question &&
                ks_utf8_check(v[i].question, strlen(v[i].question)) == strlen(v[i].question));
      if (v[i].verdict == KS_VARIANT_NO_MARK || v[i].verdict == KS_VARIANT_NO_ROOM) continue;
      ks_prf rouge;
      MUST(ks_rouge(KS_ROUGE_1, false, sources[s].question, v[i].question, &rouge));
      cr_assert(rouge.f1 == v[i].rouge1);
      if (v[i].verdict == KS_VARIANT_TOO_FAR) cr_assert(rouge.f1 < p->min_rouge1);
      if (v[i].verdict == KS_VARIANT_TOO_NEAR) cr_assert(rouge.f1 > p->max_rouge1);
      if (v[i].verdict != KS_VARIANT_ACCEPTED) continue;
      cr_assert(rouge.f1 >= p->min_rouge1 && rouge.f1 <= p->max_rouge1);
      cr_assert(strcmp(v[i].question, sources[s].question) != 0);
      for (int64_t j = 0; j < i; j++)
        if (v[j].source == s && v[j].verdict == KS_VARIANT_ACCEPTED)
          cr_assert(strcmp(v[i].question, v[j].question) != 0);
    }
    cr_assert(n_accepted <= p->count && n_tries <= p->count * (1 + p->retries));
    cr_assert(n_tries >= p->count || (n_tries == 1));
    cr_assert(n_accepted == p->count || n_tries >= p->count + p->retries || n_tries == 1);
  }
}

static bool equal_variants(const ks_variant *a, const ks_variant *b) {
  return strcmp(a->question, b->question) == 0 && a->verdict == b->verdict && a->rouge1 == b->rouge1 &&
         a->n_tokens == b->n_tokens;
}

Test(synthesize, none_and_nothing) {
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_synthesize_params p = by_rules;
  ks_variant *v = (ks_variant *)&p;
  int64_t n = 7;
  p.kind = KS_SYNTH_NONE;
  MUST(ks_synthesize(NULL, NULL, &p, sources, N_SOURCES, NULL, 0, NULL, &v, &n));
  cr_assert(v == NULL && n == 0);
  p.kind = KS_SYNTH_RULES;
  MUST(ks_synthesize(NULL, NULL, &p, sources, 0, NULL, 0, NULL, &v, &n));
  cr_assert(v == NULL && n == 0);
  p.count = 0;
  MUST(ks_synthesize(NULL, NULL, &p, sources, N_SOURCES, NULL, 0, NULL, &v, &n));
  cr_assert(v == NULL && n == 0);
  ks_variants_free(NULL, 0);
}

Test(synthesize, rules_and_independence) {
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_variant *all, *one;
  int64_t n_all, n_one, at = 0, n_accepted = 0;
  MUST(ks_synthesize(NULL, NULL, &by_rules, sources, N_SOURCES, NULL, 0, NULL, &all, &n_all));
  check_variants(&by_rules, sources, N_SOURCES, all, n_all);
  for (int64_t s = 0; s < N_SOURCES; s++) {
    MUST(ks_synthesize(NULL, NULL, &by_rules, &sources[s], 1, NULL, 0, NULL, &one, &n_one));
    for (int64_t i = 0; i < n_one; i++, at++) {
      cr_assert(at < n_all && all[at].source == s && equal_variants(&all[at], &one[i]));
      n_accepted += one[i].verdict == KS_VARIANT_ACCEPTED;
      cr_assert(one[i].n_tokens == 0);
    }
    ks_variants_free(one, n_one);
  }
  cr_assert(at == n_all && n_accepted >= 12, "%lld accepted", (long long)n_accepted);
  for (int64_t i = 0; i < n_all; i++) /* no token in common: ROUGE-1 is 0 */
    if (all[i].source == 4)
      cr_assert(all[i].verdict == KS_VARIANT_TOO_FAR || all[i].verdict == KS_VARIANT_REPEATED);
  /* another round, seed or arrival: other draws */
  ks_synth_source other[3] = {sources[1], sources[1], sources[1]};
  other[0].round++;
  other[1].seed++;
  other[2].id++;
  for (int k = 0; k < 3; k++) {
    MUST(ks_synthesize(NULL, NULL, &by_rules, &other[k], 1, NULL, 0, NULL, &one, &n_one));
    int64_t first = 0, n_equal = 0;
    while (all[first].source != 1)
      first++;
    for (int64_t i = 0; i < 3; i++)
      n_equal += strcmp(one[i].question, all[first + i].question) == 0;
    cr_assert(n_equal < 3);
    ks_variants_free(one, n_one);
  }
  ks_variants_free(all, n_all);
}

/* More retries or variants than needed change nothing that came before. */
Test(synthesize, tries_do_not_depend_on_how_many_are_wanted) {
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_synthesize_params more = by_rules;
  more.retries = 9;
  ks_variant *a, *b;
  int64_t n_a, n_b;
  MUST(ks_synthesize(NULL, NULL, &by_rules, sources, N_SOURCES, NULL, 0, NULL, &a, &n_a));
  MUST(ks_synthesize(NULL, NULL, &more, sources, N_SOURCES, NULL, 0, NULL, &b, &n_b));
  for (int64_t i = 0, j = 0; i < n_a; i++, j++) {
    while (b[j].source < a[i].source)
      j++;
    cr_assert(j < n_b && equal_variants(&a[i], &b[j]));
  }
  ks_variants_free(a, n_a);
  ks_variants_free(b, n_b);
}

Test(synthesize, bounds_of_rouge) {
  static const struct {
    double min, max;
    ks_variant_verdict allowed[3];
  } cases[] = {{2, 3, {KS_VARIANT_TOO_FAR, KS_VARIANT_TOO_FAR, KS_VARIANT_TOO_FAR}},
               {-2, -1, {KS_VARIANT_TOO_NEAR, KS_VARIANT_TOO_NEAR, KS_VARIANT_TOO_NEAR}},
               {0, 1, {KS_VARIANT_ACCEPTED, KS_VARIANT_REPEATED, KS_VARIANT_REPEATED}}};
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    ks_synthesize_params p = by_rules;
    p.min_rouge1 = cases[k].min;
    p.max_rouge1 = cases[k].max;
    ks_variant *v;
    int64_t n;
    MUST(ks_synthesize(NULL, NULL, &p, sources, N_SOURCES, NULL, 0, NULL, &v, &n));
    check_variants(&p, sources, N_SOURCES, v, n);
    for (int64_t i = 0; i < n; i++)
      cr_assert(v[i].verdict == cases[k].allowed[0] || v[i].verdict == cases[k].allowed[1]);
    if (k < 2) cr_assert(eq(i64, n, N_SOURCES * 3 * 5));
    ks_variants_free(v, n);
  }
}

/* ---------------------------------------------------------------- by a model */

enum { VOCAB = 300, CONTEXT = 64 };

typedef struct {
  ks_ctx *ctx;
  ks_model *model;
  ks_tokenizer *tokenizer;
  char path[40];
} world;

/* A llama2.c tokenizer: unk, bos, eos, 256 bytes, then single characters. */
static void write_tokenizer(const char *path) {
  FILE *f = fopen(path, "wb");
  cr_assert(f != NULL);
  const int32_t longest = 8;
  fwrite(&longest, 4, 1, f);
  for (int i = 0; i < VOCAB; i++) {
    char piece[16];
    if (i < 3)
      snprintf(piece, sizeof piece, "%s", i == 0 ? "<unk>" : i == 1 ? "\n<s>\n" : "\n</s>\n");
    else if (i < 259)
      snprintf(piece, sizeof piece, "<0x%02X>", i - 3);
    else
      snprintf(piece, sizeof piece, "%c", " []?.,!abcdefghijklmnopqrstuvwxyzABCDEFGH"[i - 259]);
    const float score = 0;
    const int32_t n = (int32_t)strlen(piece);
    fwrite(&score, 4, 1, f);
    fwrite(&n, 4, 1, f);
    fwrite(piece, 1, (size_t)n, f);
  }
  cr_assert(fclose(f) == 0);
}

static world make_world(void) {
  world w = {.path = "/tmp/ks_tokenizer_XXXXXX"};
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  params.backend = "cpu";
  params.n_threads = 1;
  MUST(ks_ctx_create(&w.ctx, &params));
  const ks_model_config config = {.n_layers = 1,
                                  .hidden_size = 16,
                                  .intermediate_size = 24,
                                  .vocab_size = VOCAB,
                                  .max_seq_len = CONTEXT,
                                  .n_heads = 2,
                                  .n_kv_heads = 1,
                                  .head_dim = 8,
                                  .rms_eps = 1e-5f,
                                  .rope_theta = 10000,
                                  .tied_head = true,
                                  .bos_id = 1,
                                  .eos_ids = {2},
                                  .n_eos = 1};
  MUST(ks_model_create_random(w.ctx, &config, KS_DTYPE_F32, 5, &w.model));
  cr_assert(close(mkstemp(w.path)) == 0);
  write_tokenizer(w.path);
  MUST(ks_tokenizer_load(w.path, VOCAB, &w.tokenizer));
  return w;
}
static void close_world(world *w) {
  unlink(w->path);
  ks_tokenizer_destroy(w->tokenizer);
  ks_model_destroy(w->model);
  ks_ctx_destroy(w->ctx);
}

static const ks_synthesize_params by_model = {.kind = KS_SYNTH_MODEL,
                                              .count = 2,
                                              .retries = 2,
                                              .min_rouge1 = 0,
                                              .max_rouge1 = 1,
                                              .prompt = "{question} > ",
                                              .begin_mark = "",
                                              .end_mark = "",
                                              .temperature = 1,
                                              .top_p = 1,
                                              .max_new_tokens = 12};

static ks_status synthesize(world *w, const ks_synthesize_params *p, const ks_synth_source *s, int64_t n_s,
                            ks_variant **v, int64_t *n) {
  return ks_synthesize(w->model, w->tokenizer, p, s, n_s, NULL, 0, NULL, v, n);
}

Test(synthesize, model_and_independence) {
  world w = make_world();
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_variant *all, *one;
  int64_t n_all, n_one, at = 0, n_accepted = 0, n_tokens = 0;
  MUST(synthesize(&w, &by_model, sources, N_SOURCES, &all, &n_all));
  check_variants(&by_model, sources, N_SOURCES, all, n_all);
  for (int64_t s = 0; s < N_SOURCES; s++) {
    MUST(synthesize(&w, &by_model, &sources[s], 1, &one, &n_one));
    for (int64_t i = 0; i < n_one; i++, at++) {
      cr_assert(at < n_all && all[at].source == s && equal_variants(&all[at], &one[i]),
                "source %lld, try %lld", (long long)s, (long long)i);
      n_accepted += one[i].verdict == KS_VARIANT_ACCEPTED;
      n_tokens += one[i].n_tokens;
      cr_assert(one[i].n_tokens >= 1 && one[i].n_tokens <= by_model.max_new_tokens);
    }
    ks_variants_free(one, n_one);
  }
  cr_assert(at == n_all && n_accepted > N_SOURCES && n_tokens > n_all);
  ks_variants_free(all, n_all);
  close_world(&w);
}

/* A prompt that leaves no room for max_new_tokens: one verdict, the others are written as if it were not
 * there. */
Test(synthesize, no_room) {
  world w = make_world();
  char long_question[80];
  memset(long_question, 'a', sizeof long_question);
  ks_synth_source sources[3] = {{.question = "abc?", .adapter = -1},
                                {.question = long_question, .id = 1, .adapter = -1},
                                {.question = "cab", .id = 2, .adapter = -1}};
  /* bos + question + " > " (and a leading blank) + 12 <= 64 */
  for (size_t length = 40; length < 60; length++) {
    long_question[length] = 0;
    int32_t *ids = NULL;
    size_t n_ids = 0, cap = 0;
    ks_text prompt = {0};
    MUST(ks_writer_prompt(by_model.prompt, &sources[1], &prompt));
    MUST(ks_tokenizer_encode(w.tokenizer, prompt.data, prompt.len, true, &ids, &n_ids, &cap));
    bool room = n_ids + 12 <= CONTEXT;
    ks_variant *v;
    int64_t n, n_without = 0, n_first = 0;
    MUST(synthesize(&w, &by_model, sources, 3, &v, &n));
    for (int64_t i = 0; i < n; i++) {
      n_without += v[i].verdict == KS_VARIANT_NO_ROOM;
      n_first += v[i].source == 0;
      if (v[i].verdict == KS_VARIANT_NO_ROOM)
        cr_assert(v[i].source == 1 && v[i].question[0] == 0 && v[i].n_tokens == 0);
    }
    cr_assert(n_without == !room && n_first >= 2, "%zu ids", n_ids);
    ks_variants_free(v, n);
    ks_text_free(&prompt);
    free(ids);
    long_question[length] = 'a';
  }
  close_world(&w);
}

Test(synthesize, temperature_zero_tries_once) {
  world w = make_world();
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_synthesize_params p = by_model;
  p.temperature = 0;
  ks_variant *v;
  int64_t n;
  MUST(synthesize(&w, &p, sources, N_SOURCES, &v, &n));
  cr_assert(eq(i64, n, N_SOURCES));
  ks_variants_free(v, n);
  close_world(&w);
}

/* A model that has learnt nothing writes no brackets in 12 tokens, or hardly. */
Test(synthesize, missing_marks) {
  world w = make_world();
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_synthesize_params p = by_model;
  p.begin_mark = "[[";
  p.end_mark = "]]";
  ks_variant *v;
  int64_t n;
  MUST(synthesize(&w, &p, sources, N_SOURCES, &v, &n));
  cr_assert(eq(i64, n, N_SOURCES * 2 * 3));
  for (int64_t i = 0; i < n; i++)
    cr_assert(v[i].verdict == KS_VARIANT_NO_MARK && v[i].rouge1 == 0 && v[i].n_tokens > 0);
  ks_variants_free(v, n);
  close_world(&w);
}

/* An adapter that touches nothing writes what the frozen model writes. */
Test(synthesize, adapters) {
  world w = make_world();
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  ks_lora loras[2][KS_N_TARGETS] = {{{0}}};
  const ks_adapter_view views[2] = {{.loras = loras[0]}, {.loras = loras[1]}};
  ks_variant *plain, *adapted;
  int64_t n_plain, n_adapted;
  MUST(synthesize(&w, &by_model, sources, N_SOURCES, &plain, &n_plain));
  for (int64_t i = 0; i < N_SOURCES; i++)
    sources[i].adapter = (int32_t)(i % 3) - 1;
  MUST(ks_synthesize(w.model, w.tokenizer, &by_model, sources, N_SOURCES, views, 2, NULL, &adapted,
                     &n_adapted));
  cr_assert(eq(i64, n_plain, n_adapted));
  for (int64_t i = 0; i < n_plain; i++)
    cr_assert(equal_variants(&plain[i], &adapted[i]));
  ks_variants_free(plain, n_plain);
  ks_variants_free(adapted, n_adapted);
  close_world(&w);
}

static bool stop_at_once(void *user, const char *stage, double done, double total) {
  (void)user, (void)stage, (void)done, (void)total;
  return false;
}

Test(synthesize, interrupted) {
  world w = make_world();
  ks_synth_source sources[N_SOURCES];
  make_sources(sources);
  const ks_progress progress = {.report = stop_at_once};
  ks_variant *v;
  int64_t n;
  ks_status s =
      ks_synthesize(w.model, w.tokenizer, &by_model, sources, N_SOURCES, NULL, 0, &progress, &v, &n);
  cr_assert(s == KS_EINTERRUPTED && v == NULL && n == 0);
  close_world(&w);
}

Test(synthesize, parameters) {
  world w = make_world();
  ks_synth_source good = {.question = "abc", .adapter = -1}, source[3];
  source[0] = source[1] = source[2] = good;
  source[0].question = NULL;
  source[1].id = (uint64_t)1 << 56;
  source[2].adapter = 0;
  ks_variant *v;
  int64_t n;
  for (int i = 0; i < 3; i++)
    cr_expect(synthesize(&w, &by_model, &source[i], 1, &v, &n) == KS_EINVAL && v == NULL, "source %d", i);
  ks_synthesize_params p[11];
  for (int i = 0; i < 11; i++)
    p[i] = by_model;
  p[0].prompt = "no place for it";
  p[1].prompt = NULL;
  p[2].begin_mark = NULL;
  p[3].max_new_tokens = 0;
  p[4].max_new_tokens = CONTEXT;
  p[5].temperature = -1;
  p[6].top_p = 0;
  p[7].temperature = NAN;
  p[8].count = -1;
  p[9].retries = -1;
  p[10].min_rouge1 = 2;
  for (int i = 0; i < 11; i++) {
    ks_status s = synthesize(&w, &p[i], &good, 1, &v, &n);
    bool refused = s == KS_ECONFIG || s == KS_EINVAL;
    cr_expect(refused && v == NULL && n == 0, "case %d: %s", i, ks_status_name(s));
  }
  source[0] = good;
  source[0].question = "not \xFF text";
  cr_expect(synthesize(&w, &by_model, source, 1, &v, &n) == KS_EDATA);
  cr_expect(ks_synthesize(NULL, NULL, &by_rules, source, 1, NULL, 0, NULL, &v, &n) == KS_EDATA);
  close_world(&w);
}
