/* DSS, dominant domain and EOE against values worked out by hand; lexicon files that are not what they should
 * be. */
#include "select_support.h"

#include <unistd.h>

static char folder[] = "/tmp/ks_lexicons_XXXXXX";
static char path[64];

static void open_folder(void) {
  cr_assert(mkdtemp(folder) != NULL);
  snprintf(path, sizeof path, "%s/lexicons.txt", folder);
}
static void close_folder(void) {
  unlink(path);
  rmdir(folder);
}
TestSuite(lexicons, .init = open_folder, .fini = close_folder);

static ks_status load(const char *bytes, size_t n, ks_lexicons **out) {
  FILE *f = fopen(path, "wb");
  cr_assert(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
  return ks_lexicons_load(path, out);
}
static ks_lexicons *load_text(const char *text) {
  ks_lexicons *l;
  MUST(load(text, strlen(text), &l));
  return l;
}

/* METHOD 1.1: DSS = (1/m) sum_i |T n l_i| / n with T's words counted as often as they come. */
Test(lexicons, scores_by_hand) {
  ks_lexicons *l = load_text("# domains\n"
                             "medical\tdoctor, pill, \xC3\x89pid\xC3\xA9mie\n"
                             "\n"
                             "fun\tgame\tpill,  movie-night\r\n"
                             "medical\tx-ray, pill, don't\n");
  cr_assert(eq(i64, ks_lexicons_n(l), 2));
  cr_assert(eq(str, (char *)ks_lexicons_name(l, 0), "medical"));
  cr_assert(eq(str, (char *)ks_lexicons_name(l, 1), "fun"));
  cr_assert(ks_lexicons_name(l, 2) == NULL);
  cr_assert(ks_lexicons_name(l, -1) == NULL);
  static const struct {
    const char *text;
    int n_tokens, n_matches; /* matches of both lexicons together */
    int domain;
  } cases[] = {
      /* the doctor gave a pill , a pill ! : medical 3, fun 2 */
      {"The doctor gave a Pill, a PILL!", 9, 5, 0},
      {"pill", 1, 2, 0},                           /* a tie: the earlier lexicon */
      {"game pill", 2, 3, 1},                      /* fun 2, medical 1 */
      {"nothing here", 2, 0, -1},                  /* no match */
      {"", 0, 0, -1},                              /* no token */
      {" \t\n\xE2\x80\x8B\xC2\xA0", 0, 0, -1},     /* blanks of every kind */
      {"X-Ray x-ray- -x-ray x--ray", 9, 3, 0},     /* x-ray  x-ray -  - x-ray  x - - ray */
      {"Don't don\xE2\x80\x99t 'don't'", 5, 3, 0}, /* a curly apostrophe; quotes around a word are marks */
      {"\xC3\xA9pid\xC3\xA9mie", 1, 1, 0},         /* lower-cased beyond ASCII */
      {"E\xCC\x81PIDE\xCC\x81MIE", 1, 1, 0},       /* with combining accents */
      {"\xF0\x9F\x98\x80\xEF\xB8\x8F pill \xE4\xBD\xA0\xE5\xA5\xBD", 3, 2,
       0},                          /* emoji with selector; a word of another script */
      {"doctors pills.", 3, 0, -1}, /* whole words only */
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    double dss = NAN;
    int32_t domain = 77;
    MUST(ks_lexicons_score(l, cases[i].text, &dss, &domain));
    double want = cases[i].n_tokens ? cases[i].n_matches / (2.0 * cases[i].n_tokens) : 0;
    double tol = 4 * 0x1p-53 * want; /* two divisions on each side */
    cr_expect(fabs(dss - want) <= tol, "\"%s\": DSS %g, want %g", cases[i].text, dss, want);
    cr_expect(domain == cases[i].domain, "\"%s\": domain %d, want %d", cases[i].text, (int)domain,
              cases[i].domain);
  }
  ks_lexicons_destroy(l);
}

Test(lexicons, no_lexicons) {
  double dss = NAN;
  int32_t domain = 7;
  MUST(ks_lexicons_score(NULL, "any text", &dss, &domain));
  cr_assert(dss == 0 && domain == -1);
}

Test(lexicons, text_that_is_not_utf8) {
  ks_lexicons *l = load_text("a\tb\n");
  double dss;
  int32_t domain;
  FAILS(KS_EDATA, ks_lexicons_score(l, "ab\xFF", &dss, &domain));
  cr_assert(strstr(ks_error_message(), "byte 2") != NULL);
  FAILS(KS_EDATA, ks_lexicons_score(NULL, "\xC0\x80", &dss, &domain));
  ks_lexicons_destroy(l);
}

Test(lexicons, hash_is_the_files) {
  ks_lexicons *l = load_text("a\tb\n");
  char want[65];
  MUST(ks_sha256_file(path, want));
  cr_assert(eq(str, (char *)ks_lexicons_sha256(l), want));
  ks_lexicons_destroy(l);
}

/* Entries that are two tokens can match no token: left out, counted in one warning. */
Test(lexicons, entries_that_cannot_match) {
  int64_t before = ks_log_count(KS_LOG_WARN);
  ks_lexicons *l = load_text("t\t9/11, a.m., noon\nu\tfirst thing\n");
  cr_assert(eq(i64, ks_log_count(KS_LOG_WARN), before + 1));
  double dss;
  int32_t domain;
  MUST(ks_lexicons_score(l, "noon", &dss, &domain));
  cr_assert(dss == 0.5 && domain == 0);
  MUST(ks_lexicons_score(l, "9 11 first thing", &dss, &domain));
  cr_assert(dss == 0 && domain == -1);
  ks_lexicons_destroy(l);
}

Test(lexicons, byte_order_mark) {
  ks_lexicons *l = load_text("\xEF\xBB\xBFname\tw");
  cr_assert(eq(str, (char *)ks_lexicons_name(l, 0), "name"));
  ks_lexicons_destroy(l);
}

Test(lexicons, hostile_files) {
  static const struct {
    const char *bytes;
    size_t n; /* 0: strlen */
    const char *says;
  } cases[] = {
      {"", 0, "no lexicon"},
      {"# only a comment\n\n", 0, "no lexicon"},
      {"good\tword\nno tab, here\n", 0, "lexicons.txt:2: no TAB"},
      {"\tword\n", 0, "lexicons.txt:1: no name"},
      {"  \t word\n", 0, "lexicons.txt:1: no name"},
      {"good\tword\n\nname\t , ,\t\n", 0, "lexicons.txt:3: no word"},
      {"a\tb\nc\t\xFF\xFE\n", 0, "lexicons.txt:2: byte 6"},
      {"a\t\xED\xA0\x80\n", 0, "lexicons.txt:1"}, /* a surrogate */
      {"a\tone two\n", 0, "not one of its words"},
      {"a\tb\0c\n", 6, "lexicons.txt:1: byte 3"},
      {"\xEF\xBB\xBF", 0, "no lexicon"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_lexicons *l = (ks_lexicons *)path;
    FAILS(KS_EDATA, load(cases[i].bytes, cases[i].n ? cases[i].n : strlen(cases[i].bytes), &l));
    cr_expect(l == NULL);
    cr_expect(strstr(ks_error_message(), cases[i].says) != NULL, "case %zu says \"%s\", not \"%s\"", i,
              ks_error_message(), cases[i].says);
  }
  ks_lexicons *l;
  FAILS(KS_EDATA, ks_lexicons_load("/nonexistent/lexicons", &l));
}

Test(lexicons, too_many_names) {
  ks_text t = {0};
  for (int i = 0; i <= 4096; i++)
    MUST(ks_text_addf(&t, "name%d\tw\n", i));
  ks_lexicons *l;
  FAILS(KS_EDATA, load(t.data, t.len, &l));
  cr_assert(strstr(ks_error_message(), "lexicons.txt:4097") != NULL);
  ks_text_free(&t);
}

/* One line of a million words, one word of a million letters, a word many times over. */
Test(lexicons, huge_lines) {
  ks_text t = {0};
  MUST(ks_text_add_str(&t, "big\t"));
  for (int i = 0; i < 300000; i++)
    MUST(ks_text_addf(&t, "w%d, w7,", i));
  MUST(ks_text_add_str(&t, "\nlong\t"));
  size_t begin = t.len;
  for (int i = 0; i < 1000000; i++)
    MUST(ks_text_add(&t, "x", 1));
  ks_lexicons *l;
  MUST(load(t.data, t.len, &l));
  double dss;
  int32_t domain;
  MUST(ks_lexicons_score(l, t.data + begin, &dss, &domain));
  cr_assert(dss == 0.5 && domain == 1);
  MUST(ks_lexicons_score(l, "w7 w299999 w300000 W12", &dss, &domain));
  cr_assert(dss == 3.0 / 8 && domain == 0);
  ks_lexicons_destroy(l);
  ks_text_free(&t);
}

/* Any bytes at all: loaded, or refused as data. */
Test(lexicons, fuzz) {
  static const char alphabet[] = "ab,\t\n# '-\r\xC3\xA9\xFF\x00.";
  for (uint64_t k = 0; k < 500; k++) {
    ks_rng r = ks_rng_make(3, KS_RNG_TEST, k);
    char bytes[256];
    size_t n = ks_rng_below(&r, sizeof bytes);
    for (size_t i = 0; i < n; i++)
      bytes[i] = alphabet[ks_rng_below(&r, sizeof alphabet - 1)];
    ks_lexicons *l;
    ks_status s = load(bytes, n, &l);
    cr_assert(s == KS_OK || s == KS_EDATA, "%s", ks_error_message());
    if (s == KS_OK) {
      double dss;
      int32_t domain;
      MUST(ks_lexicons_score(l, "a b ab 'a-b a\xC3\xA9.", &dss, &domain));
      cr_assert(dss >= 0 && domain >= -1 && domain < ks_lexicons_n(l));
    }
    ks_lexicons_destroy(l);
  }
}

/* METHOD 1.1: H / log(n); 1.2: H / log2(n + 1). */
Test(scores, eoe) {
  static const struct {
    double h;
    int64_t n;
    ks_eoe_norm norm;
    double want;
  } cases[] = {{2, 4, KS_EOE_LOG_N, 1},  {3, 64, KS_EOE_LOG_N, 0.5}, {6, 8, KS_EOE_LOG_N, 2},
               {0, 9, KS_EOE_LOG_N, 0},  {5, 1, KS_EOE_LOG_N, 0},    {5, 0, KS_EOE_LOG_N, 0},
               {5, -3, KS_EOE_LOG_N, 0}, {2, 3, KS_EOE_LOG_N1, 1},   {4.5, 1, KS_EOE_LOG_N1, 4.5},
               {5, 0, KS_EOE_LOG_N1, 0}, {1, 2, KS_EOE_LOG_N, 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    cr_expect(ks_eoe_normalise(cases[i].h, cases[i].n, cases[i].norm) == cases[i].want, "case %zu", i);
  cr_expect(isnan(ks_eoe_normalise(NAN, 10, KS_EOE_LOG_N)));
  cr_expect(isnan(ks_eoe_normalise(NAN, 1, KS_EOE_LOG_N)));
}
