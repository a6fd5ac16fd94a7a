/* The rule-based rewriter: rewrites that must come up, tables without contradictions, any text at all. */
#include "core/synthesize/rules_words.h"
#include "core/synthesize/synthesize.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <stdio.h>

static char *rewrite(const char *text, uint64_t seed) {
  ks_rng rng = ks_rng_make(seed, KS_RNG_SYNTHESIS, 0);
  ks_text out = {0};
  ks_status s = ks_rewrite_rules(text, &rng, &out);
  cr_assert(s == KS_OK, "\"%s\": %s", text, ks_error_message());
  cr_assert(ks_utf8_check(out.data, out.len) == out.len && strlen(out.data) == out.len, "\"%s\" gives \"%s\"",
            text, out.data);
  cr_assert(strcmp(out.data, text) != 0, "\"%s\" comes back unchanged", text);
  return out.data;
}

enum { SEEDS = 3000 };

/* Each of these comes up for one of SEEDS seeds. */
Test(rules, rewrites_that_must_come_up) {
  static const struct {
    const char *text;
    const char *want[6];
  } cases[] = {
      {"What is the capital of France?",
       {"What's the capital of France?", "Tell me what the capital of France is.",
        "Could you tell me what the capital of France is?", "Hi, what is the capital of France?",
        "I would like to know what the capital of France is."}},
      {"Tell me what my name is.", {"What is my name?", "What's my name?", "Do you know what my name is?"}},
      {"What is it like to live there?", {"What's it like to live there?"}},
      {"How do I boil eggs?",
       {"How can I boil eggs?", "What is the best way to boil eggs?", "Please tell me how to boil eggs."}},
      {"how do i boil eggs?", {"How can I boil eggs?"}},
      {"Explain the doctor's advice.",
       {"Could you explain the doctor's guidance?", "Please explain the doctor's advice.",
        "Explain the doctor's advice. Thanks."}},
      {"If I have a fever, what should I do?",
       {"What should I do if I have a fever?", "If I have a fever, what should I do? Any ideas?"}},
      {"What should I do if I have a fever?",
       {"If I have a fever, what should I do?", "What would you do if I have a fever?"}},
      {"I feel sick after I eat bread",
       {"After I eat bread, I feel sick", "I feel ill after I eat bread",
        "Hello, I feel unwell after I eat bread"}},
      {"Give me an answer.",
       {"Provide me with a reply.", "Give me a reply.",
        "Can you give me an answer?"}}, /* an follows its word */
      {"It is a difficult, easy method.", {"It is a hard, simple approach."}},
      {"I am happy.", {"I'm glad.", "I'm happy.", "I am glad."}},
      {"Choose an important book.", {"Pick a crucial book.", "Select an essential book."}},
      {"Can you help me at 9 a.m.?", {"Please help me at 9 a.m.", "Could you assist me at 9 a.m.?"}},
      {"How do I reach Dr. Smith? He is out.", {"Please tell me how to reach Dr. Smith. He is out."}},
      {"HELP ME", {"Please HELP ME", "Could you HELP ME"}},
      {"\xC2\xBFQu\xC3\xA9 hora es?",
       {"Hi, \xC2\xBFQu\xC3\xA9 hora es?", "\xC2\xBFQu\xC3\xA9 hora es? Thank you."}},
      {"", {"Hi, "}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    bool seen[6] = {false};
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
      char *out = rewrite(cases[i].text, seed);
      for (int k = 0; k < 6 && cases[i].want[k]; k++)
        seen[k] = seen[k] || strcmp(out, cases[i].want[k]) == 0;
      free(out);
    }
    for (int k = 0; k < 6 && cases[i].want[k]; k++)
      cr_expect(seen[k] == true, "\"%s\" never becomes \"%s\"", cases[i].text, cases[i].want[k]);
  }
}

/* Fragments that no rewrite may hold. */
Test(rules, rewrites_that_must_not_come_up) {
  static const struct {
    const char *text, *never;
  } cases[] = {
      {"What is it like to live there?", "like to live there is"},
      {"What is wrong with my car?", "car is"},
      {"Do you know if it rains?", "If it rains,"}, /* "if" means whether */
      {"I have no painter's doctorate.", "ache"},   /* whole words only */
      {"A well-known, sick-looking film", "ill-"},
      {"WHAT IS PAIN", "ache"}, /* shouted words stay */
      {"The car and the movie.", "a "},
      {"How do I reach Dr. Smith?", "Dr?"},
      {"I am ill.", " i "},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
      char *out = rewrite(cases[i].text, seed);
      cr_assert(strstr(out, cases[i].never) == NULL, "\"%s\" becomes \"%s\"", cases[i].text, out);
      free(out);
    }
  }
}

static int compare_strings(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Real variety: different texts out of 200 draws, where several rules apply. */
Test(rules, variety) {
  static const char *const texts[] = {"What is the best method to fix a car?",
                                      "Can you give me advice because I am often tired?",
                                      "If my kids are ill, what should I do?"};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    char *out[200];
    int n_different = 1;
    for (uint64_t seed = 0; seed < 200; seed++)
      out[seed] = rewrite(texts[i], seed);
    qsort(out, 200, sizeof *out, compare_strings);
    for (int k = 1; k < 200; k++)
      n_different += strcmp(out[k], out[k - 1]) != 0;
    cr_expect(n_different >= 40, "\"%s\": %d different", texts[i], n_different);
    for (int k = 0; k < 200; k++)
      free(out[k]);
  }
}

Test(rules, the_same_draws_give_the_same_text) {
  for (uint64_t seed = 0; seed < 50; seed++) {
    char *a = rewrite("How do I improve my essay quickly?", seed),
         *b = rewrite("How do I improve my essay quickly?", seed);
    cr_assert(eq(str, a, b));
    free(a);
    free(b);
  }
}

Test(rules, tables) {
  const char *all[512];
  size_t n = 0;
  for (size_t g = 0; ks_rules_synonyms[g][0]; g++) {
    cr_expect(ks_rules_synonyms[g][1] != NULL, "group of \"%s\" has one phrase", ks_rules_synonyms[g][0]);
    for (int i = 0; i < KS_RULES_GROUP_SIZE && ks_rules_synonyms[g][i]; i++)
      all[n++] = ks_rules_synonyms[g][i];
  }
  for (size_t i = 0; i < n; i++) {
    for (const char *p = all[i]; *p; p++)
      cr_expect(strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZ", *p) == NULL, "\"%s\"", all[i]);
    for (size_t j = 0; j < i; j++)
      cr_expect(strcmp(all[i], all[j]) != 0, "\"%s\" is in two groups", all[i]);
  }
  cr_assert(n > 100);
  for (size_t c = 0; ks_rules_openings[c][0].text; c++) {
    cr_expect(ks_rules_openings[c][1].text != NULL);
    for (const ks_rules_opening *o = ks_rules_openings[c]; o->text; o++) {
      size_t length = strlen(o->text);
      cr_expect(length + 1 <= KS_RULES_OPENING_SIZE && o->text[length - 1] == ' ' &&
                    (o->end == '?' || o->end == '.'),
                "\"%s\"", o->text);
    }
  }
}

/* Any text at all, in pieces that the rules look for. */
Test(rules, fuzz) {
  static const char *const pieces[] = {
      "what is ", "If",       " if ",         ", ",        "?",     ".",    "\n",
      "I",        " i ",      "a ",           "an ",       "error", "HELP", "tell me what ",
      " is",      "\xC3\xA9", "\xE4\xBD\xA0", "'",         "-",     "e.g.", "Dr. ",
      "because ", "please ",  "\"",           "how do i ", "\t",    "!!",   "cannot"};
  for (uint64_t k = 0; k < 20000; k++) {
    ks_rng r = ks_rng_make(4, KS_RNG_TEST, k);
    ks_text t = {0};
    for (uint64_t n = ks_rng_below(&r, 10); n > 0; n--)
      cr_assert(ks_text_add_str(&t, pieces[ks_rng_below(&r, sizeof pieces / sizeof *pieces)]) == KS_OK);
    cr_assert(ks_text_add(&t, "", 0) == KS_OK);
    free(rewrite(t.data, k));
    ks_text_free(&t);
  }
}

Test(rules, text_that_is_not_utf8) {
  ks_rng rng = ks_rng_make(0, KS_RNG_SYNTHESIS, 0);
  ks_text out = {0};
  cr_assert(ks_rewrite_rules("ab\xC3", &rng, &out) == KS_EDATA);
  cr_assert(strstr(ks_error_message(), "byte 2") != NULL);
  ks_text_free(&out);
}
