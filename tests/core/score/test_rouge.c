/* Against Google's rouge-score and NLTK's stemmer: tests/fixtures/make_rouge.py. The same operations in the
 * same order: equal to the last bit. */
#include "core/score/score.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>

static char *read_fixture(const char *name) {
  char *text;
  size_t n;
  ks_status s = ks_file_read(name, 1 << 24, &text, &n);
  cr_assert(s == KS_OK, "%s", ks_error_message());
  return text;
}

/* Cuts *at at the first `end`, in place; returns what came before and moves on. */
static char *next_field(char **at, char end) {
  char *start = *at, *stop = strchr(start, end);
  cr_assert(stop != NULL);
  *stop = '\0';
  *at = stop + 1;
  return start;
}

static void unescape(char *s) {
  char *put = s;
  for (; *s; s++) {
    if (*s != '\\') {
      *put++ = *s;
      continue;
    }
    s++;
    *put++ = *s == 't' ? '\t' : *s == 'n' ? '\n' : *s == 'r' ? '\r' : *s;
  }
  *put = '\0';
}

Test(rouge, equals_rouge_score) {
  char *text = read_fixture(KS_SOURCE_DIR "/tests/fixtures/rouge/pairs.tsv"), *at = text;
  int n_pairs = 0, n_wrong = 0, n_partial = 0;
  while (*at) {
    char *line = next_field(&at, '\n'), *target = next_field(&line, '\t'),
         *prediction = next_field(&line, '\t');
    unescape(target);
    unescape(prediction);
    for (int stem = 0; stem < 2; stem++)
      for (int kind = 0; kind < 3; kind++) {
        double want[3];
        for (int i = 0; i < 3; i++)
          want[i] = strtod(line, &line);
        ks_prf got = {NAN, NAN, NAN};
        cr_assert(eq(int, ks_rouge((ks_rouge_kind)kind, stem, target, prediction, &got), KS_OK));
        n_partial += want[2] > 0 && want[2] < 1;
        if (got.precision == want[0] && got.recall == want[1] && got.f1 == want[2]) continue;
        if (n_wrong++ < 10)
          cr_log_error("pair %d kind %d stem %d: got %g %g %g, want %g %g %g: \"%s\" / \"%s\"", n_pairs + 1,
                       kind, stem, got.precision, got.recall, got.f1, want[0], want[1], want[2], target,
                       prediction);
      }
    n_pairs++;
  }
  free(text);
  cr_assert(eq(int, n_wrong, 0));
  cr_assert(n_pairs >= 300, "only %d pairs", n_pairs);
  cr_assert(n_partial >= 1000, "only %d scores between 0 and 1", n_partial);
}

Test(rouge, porter_equals_nltk) {
  char *text = read_fixture(KS_SOURCE_DIR "/tests/fixtures/rouge/porter.tsv"), *at = text;
  int n_words = 0, n_wrong = 0;
  while (*at) {
    char *word = next_field(&at, '\t'), *want = next_field(&at, '\n'), got[64];
    cr_assert(strlen(word) + 2 <= sizeof got);
    strcpy(got, word);
    ks_porter_stem(got);
    n_words++;
    if (strcmp(got, want) != 0 && n_wrong++ < 10) cr_log_error("%s: got %s, want %s", word, got, want);
  }
  free(text);
  cr_assert(eq(int, n_wrong, 0));
  cr_assert(n_words >= 5000, "only %d words", n_words);
}

/* The table that everyone draws first: quadratic, and slow. */
static int64_t lcs_by_table(const char *a, const char *b) {
  int64_t n = (int64_t)strlen(a), m = (int64_t)strlen(b), *t = calloc((size_t)((n + 1) * (m + 1)), sizeof *t);
  for (int64_t i = 1; i <= n; i++)
    for (int64_t j = 1; j <= m; j++)
      t[i * (m + 1) + j] = a[i - 1] == b[j - 1]
                               ? t[(i - 1) * (m + 1) + j - 1] + 1
                               : ks_max_i64(t[(i - 1) * (m + 1) + j], t[i * (m + 1) + j - 1]);
  int64_t length = t[n * (m + 1) + m];
  free(t);
  return length;
}

Test(rouge, lcs_across_blocks) {
  ks_rng rng = ks_rng_make(1, KS_RNG_TEST, 0);
  for (int round = 0; round < 200; round++) {
    /* every other round has letters that a whole block lacks, so that carries pass through it */
    bool rare = round % 2;
    uint64_t n = rare ? 200 + ks_rng_below(&rng, 60) : 1 + ks_rng_below(&rng, 260);
    uint64_t m = 1 + ks_rng_below(&rng, 260), n_letters = rare ? 26 : 1 + ks_rng_below(&rng, 6);
    char a[300], b[300], spaced_a[600], spaced_b[600];
    for (uint64_t i = 0; i < n; i++) {
      a[i] = (char)('a' + ks_rng_below(&rng, n_letters));
      spaced_a[2 * i] = a[i];
      spaced_a[2 * i + 1] = ' ';
    }
    for (uint64_t i = 0; i < m; i++) {
      b[i] = (char)('a' + ks_rng_below(&rng, n_letters));
      spaced_b[2 * i] = b[i];
      spaced_b[2 * i + 1] = ' ';
    }
    a[n] = b[m] = spaced_a[2 * n] = spaced_b[2 * m] = '\0';
    ks_prf got;
    cr_assert(eq(int, ks_rouge(KS_ROUGE_L, false, spaced_a, spaced_b, &got), KS_OK));
    double want = (double)lcs_by_table(a, b);
    cr_assert(got.precision == want / (double)m && got.recall == want / (double)n, "round %d: %s / %s", round,
              a, b);
  }
}

Test(rouge, text_that_is_not_utf8) {
  static const struct {
    const char *target, *prediction;
  } same[] = {{"a\xff\xfe"
               "b",
               "a b"},
              {"ab\xe2\x84", "ab"},
              {"\xc4", ""},
              {"\xe2\x84\xaa\xe2\x84", "k"},
              {"\x80\x81 word", "word"}};
  for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
    ks_prf got = {NAN, NAN, NAN};
    cr_assert(eq(int, ks_rouge(KS_ROUGE_1, true, same[i].target, same[i].prediction, &got), KS_OK));
    cr_assert(eq(dbl, got.f1, *same[i].prediction ? 1.0 : 0.0), "case %zu", i);
  }
}

Test(rouge, symmetric_and_bounded) {
  ks_prf a, b;
  for (int kind = 0; kind < 3; kind++) {
    cr_assert(
        eq(int, ks_rouge((ks_rouge_kind)kind, false, "one two three two", "two three four", &a), KS_OK));
    cr_assert(
        eq(int, ks_rouge((ks_rouge_kind)kind, false, "two three four", "one two three two", &b), KS_OK));
    cr_assert(a.precision == b.recall && a.recall == b.precision && a.f1 == b.f1);
    cr_assert(a.f1 > 0 && a.f1 < 1);
  }
}

Test(rouge, long_texts_in_linear_memory) {
  size_t n = 200000; /* words; a full table would take 40 GB */
  char *text = malloc(2 * n + 1);
  for (size_t i = 0; i < n; i++) {
    text[2 * i] = (char)('a' + i % 26);
    text[2 * i + 1] = ' ';
  }
  text[2 * n] = '\0';
  ks_prf got;
  cr_assert(eq(int, ks_rouge(KS_ROUGE_1, true, text, text, &got), KS_OK));
  cr_assert(eq(dbl, got.f1, 1.0));
  text[40000] = '\0';
  cr_assert(eq(int, ks_rouge(KS_ROUGE_L, true, text, text + 26, &got), KS_OK));
  cr_assert(eq(dbl, got.precision, 1.0));
  free(text);
}

Test(rouge, refuses_bad_arguments) {
  ks_prf got;
  cr_assert(eq(int, ks_rouge(KS_ROUGE_1, false, NULL, "a", &got), KS_EINVAL));
  cr_assert(eq(int, ks_rouge(KS_ROUGE_1, false, "a", NULL, &got), KS_EINVAL));
  cr_assert(eq(int, ks_rouge((ks_rouge_kind)7, false, "a", "a", &got), KS_EINVAL));
}
