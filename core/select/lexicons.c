#include "core/select/select.h"
#include "core/select/tokens.h"

#define MAX_FILE_BYTES ((size_t)16 << 20)
#define MAX_LEXICONS   4096 /* also bounds the search for a name that comes again */

typedef struct {
  size_t offset; /* into the arena */
  const char *word;
  uint32_t length, lexicon;
} posting;

struct ks_lexicons {
  ks_text arena;     /* all words, one after another */
  posting *postings; /* sorted by word, then lexicon; no repeats */
  size_t n_postings, cap_postings;
  uint32_t *slots; /* open addressing: 1 + index of a word's first posting; 0: free */
  size_t n_slots;  /* power of two */
  char **names;
  int64_t n, cap_names;
  char sha256[65];
};

typedef struct {
  const char *path;
  int64_t line;
  int64_t n_unmatchable, first_unmatchable; /* entries that are not one token, and the line of the first */
  ks_word_tokens tokens;
} load_state;

static uint64_t hash_bytes(const char *s, size_t n) {
  uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
  for (size_t i = 0; i < n; i++)
    h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
  return h ^ (h >> 32);
}

static int compare_words(const posting *a, const posting *b) {
  size_t n = a->length < b->length ? a->length : b->length;
  int order = memcmp(a->word, b->word, n);
  return order ? order : (a->length > b->length) - (a->length < b->length);
}

static int compare_postings(const void *a, const void *b) {
  const posting *x = a, *y = b;
  int order = compare_words(x, y);
  return order ? order : (x->lexicon > y->lexicon) - (x->lexicon < y->lexicon);
}

static ks_status add_posting(ks_lexicons *l, const ks_text *word, int64_t lexicon) {
  if (l->n_postings == l->cap_postings) {
    size_t cap = l->cap_postings ? 2 * l->cap_postings : 1024;
    posting *grown = realloc(l->postings, cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "lexicons: no memory for %zu words", cap);
    l->postings = grown;
    l->cap_postings = cap;
  }
  l->postings[l->n_postings++] =
      (posting){.offset = l->arena.len, .length = (uint32_t)word->len, .lexicon = (uint32_t)lexicon};
  return ks_text_add(&l->arena, word->data, word->len);
}

/* One entry of a line; *taken is set when it is a word that can match. */
static ks_status add_entry(ks_lexicons *l, load_state *st, const char *s, size_t n, int64_t lexicon,
                           bool *taken) {
  bool more = false, second = false;
  ks_word_tokens *t = &st->tokens;
  KS_TRY(ks_tokens_open(t, s, n));
  KS_TRY(ks_tokens_next(t, &more));
  if (!more) return KS_OK;
  size_t end = t->pos;
  KS_TRY(ks_tokens_next(t, &second));
  if (second) {
    if (st->n_unmatchable++ == 0) st->first_unmatchable = st->line;
    return KS_OK;
  }
  t->pos = 0;
  KS_TRY(ks_tokens_next(t, &more));
  KS_ASSERT(t->pos == end);
  *taken = true;
  return add_posting(l, &t->word, lexicon);
}

static bool is_blank(char c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}

static void trim(const char **s, size_t *n) {
  while (*n && is_blank((*s)[0])) {
    (*s)++;
    (*n)--;
  }
  while (*n && is_blank((*s)[*n - 1]))
    (*n)--;
}

static ks_status find_or_add_name(ks_lexicons *l, const load_state *st, const char *s, size_t n,
                                  int64_t *index) {
  for (int64_t i = l->n - 1; i >= 0; i--) { /* the last name is the likeliest to come again */
    if (strlen(l->names[i]) == n && memcmp(l->names[i], s, n) == 0) {
      *index = i;
      return KS_OK;
    }
  }
  if (l->n == MAX_LEXICONS)
    return KS_FAIL(KS_EDATA, "%s:%lld: more than %d lexicons; join some under one name", st->path,
                   (long long)st->line, MAX_LEXICONS);
  if (l->n == l->cap_names) {
    int64_t cap = l->cap_names ? 2 * l->cap_names : 16;
    char **grown = realloc(l->names, (size_t)cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "lexicons: no memory for %lld names", (long long)cap);
    l->names = grown;
    l->cap_names = cap;
  }
  KS_TRY(ks_strndup(s, n, &l->names[l->n]));
  *index = l->n++;
  return KS_OK;
}

static ks_status add_line(ks_lexicons *l, load_state *st, const char *s, size_t n) {
  const char *tab = memchr(s, '\t', n);
  const char *first = s;
  size_t n_first = n;
  trim(&first, &n_first);
  if (n_first == 0 || first[0] == '#') return KS_OK;
  if (!tab)
    return KS_FAIL(KS_EDATA, "%s:%lld: no TAB; write name<TAB>word, word, ...", st->path,
                   (long long)st->line);
  const char *name = s;
  size_t n_name = (size_t)(tab - s);
  trim(&name, &n_name);
  if (n_name == 0)
    return KS_FAIL(KS_EDATA, "%s:%lld: no name before the TAB; write name<TAB>word, word, ...", st->path,
                   (long long)st->line);
  int64_t lexicon = -1, before = st->n_unmatchable;
  KS_TRY(find_or_add_name(l, st, name, n_name, &lexicon));
  bool taken = false;
  for (const char *p = tab + 1, *end = s + n; p < end;) {
    const char *q = p;
    while (q < end && *q != ',' && *q != '\t')
      q++;
    ks_status status = add_entry(l, st, p, (size_t)(q - p), lexicon, &taken);
    ks_tokens_close(&st->tokens);
    KS_TRY_AS(status, "%s:%lld", st->path, (long long)st->line);
    p = q + 1;
  }
  if (!taken && st->n_unmatchable == before)
    return KS_FAIL(KS_EDATA, "%s:%lld: no word after the TAB; give words or take the line out", st->path,
                   (long long)st->line);
  return KS_OK;
}

static ks_status check_text(const char *path, const char *s, size_t n) {
  size_t bad = ks_utf8_check(s, n);
  const char *nul = memchr(s, 0, n);
  if (nul && (size_t)(nul - s) < bad) bad = (size_t)(nul - s);
  if (bad == n) return KS_OK;
  int64_t line = 1;
  for (size_t i = 0; i < bad; i++)
    line += s[i] == '\n';
  return KS_FAIL(KS_EDATA, "%s:%lld: byte %zu is not UTF-8 text; convert the file to UTF-8", path,
                 (long long)line, bad);
}

/* Sorts the postings and makes the table of words. */
static ks_status make_index(ks_lexicons *l) {
  for (size_t i = 0; i < l->n_postings; i++)
    l->postings[i].word = l->arena.data + l->postings[i].offset;
  qsort(l->postings, l->n_postings, sizeof *l->postings, compare_postings);
  size_t kept = 0;
  for (size_t i = 0; i < l->n_postings; i++)
    if (i == 0 || compare_postings(&l->postings[i], &l->postings[kept - 1]) != 0)
      l->postings[kept++] = l->postings[i];
  l->n_postings = kept;
  l->n_slots = 16;
  while (l->n_slots < 2 * kept)
    l->n_slots *= 2;
  KS_TRY(ks_alloc_array(&l->slots, l->n_slots, sizeof *l->slots, "lexicons: word table"));
  for (size_t i = 0; i < kept; i++) {
    if (i > 0 && compare_words(&l->postings[i], &l->postings[i - 1]) == 0) continue;
    size_t slot = hash_bytes(l->postings[i].word, l->postings[i].length) & (l->n_slots - 1);
    while (l->slots[slot])
      slot = (slot + 1) & (l->n_slots - 1);
    l->slots[slot] = (uint32_t)i + 1;
  }
  return KS_OK;
}

static ks_status load_text(ks_lexicons *l, const char *path, const char *s, size_t n) {
  load_state st = {.path = path};
  if (n >= 3 && memcmp(s, "\xEF\xBB\xBF", 3) == 0) {
    s += 3;
    n -= 3;
  }
  for (size_t begin = 0; begin < n;) {
    const char *newline = memchr(s + begin, '\n', n - begin);
    size_t end = newline ? (size_t)(newline - s) : n;
    st.line++;
    KS_TRY(add_line(l, &st, s + begin, end - begin));
    begin = end + 1;
  }
  if (l->n == 0) return KS_FAIL(KS_EDATA, "%s: no lexicon in it; write lines name<TAB>word, word, ...", path);
  if (st.n_unmatchable)
    ks_log(KS_LOG_WARN, "lexicons",
           "%s: %lld entries are not one token each and can never match (the first in line %lld): left out",
           path, (long long)st.n_unmatchable, (long long)st.first_unmatchable);
  if (l->n_postings == 0)
    return KS_FAIL(KS_EDATA, "%s: not one of its words can match; give single words", path);
  return make_index(l);
}

ks_status ks_lexicons_load(const char *path, ks_lexicons **out) {
  *out = NULL;
  ks_lexicons *l = NULL;
  char *bytes = NULL, *owned = NULL;
  const char *text;
  size_t n, n_text;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_alloc_array(&l, 1, sizeof *l, "lexicons"));
  KS_TRY_OUT(ks_file_read(path, MAX_FILE_BYTES, &bytes, &n));
  ks_sha256 hash;
  ks_sha256_init(&hash);
  ks_sha256_add(&hash, bytes, n);
  ks_sha256_finish(&hash, l->sha256);
  KS_TRY_OUT(check_text(path, bytes, n));
  KS_TRY_OUT(ks_tokens_compose(bytes, n, &text, &n_text, &owned));
  KS_TRY_OUT(load_text(l, path, text, n_text));
  *out = l;
  l = NULL;
out:
  free(bytes);
  free(owned);
  ks_lexicons_destroy(l);
  return status;
}

void ks_lexicons_destroy(ks_lexicons *l) {
  if (!l) return;
  for (int64_t i = 0; i < l->n; i++)
    free(l->names[i]);
  free(l->names);
  free(l->postings);
  free(l->slots);
  ks_text_free(&l->arena);
  free(l);
}

int64_t ks_lexicons_n(const ks_lexicons *l) {
  return l->n;
}
const char *ks_lexicons_name(const ks_lexicons *l, int64_t i) {
  return i >= 0 && i < l->n ? l->names[i] : NULL;
}
const char *ks_lexicons_sha256(const ks_lexicons *l) {
  return l->sha256;
}

/* Adds 1 to the count of every lexicon that holds the word. */
static void count_word(const ks_lexicons *l, const ks_text *word, int64_t *counts) {
  posting key = {.word = word->data, .length = (uint32_t)word->len};
  size_t slot = hash_bytes(word->data, word->len) & (l->n_slots - 1);
  for (; l->slots[slot]; slot = (slot + 1) & (l->n_slots - 1)) {
    size_t i = l->slots[slot] - 1;
    if (compare_words(&l->postings[i], &key) != 0) continue;
    for (; i < l->n_postings && compare_words(&l->postings[i], &key) == 0; i++)
      counts[l->postings[i].lexicon]++;
    return;
  }
}

ks_status ks_lexicons_score(const ks_lexicons *l, const char *text, double *dss, int32_t *domain) {
  *dss = 0;
  *domain = -1;
  size_t n_bytes = strlen(text), bad = ks_utf8_check(text, n_bytes);
  if (bad < n_bytes) return KS_FAIL(KS_EDATA, "text is not UTF-8 at byte %zu; convert it to UTF-8", bad);
  if (!l) return KS_OK;
  int64_t *counts = NULL, n_tokens = 0;
  ks_word_tokens t = {0};
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_alloc_array(&counts, (size_t)l->n, sizeof *counts, "lexicons: counts"));
  KS_TRY_OUT(ks_tokens_open(&t, text, n_bytes));
  for (bool more = true;; n_tokens++) {
    KS_TRY_OUT(ks_tokens_next(&t, &more));
    if (!more) break;
    count_word(l, &t.word, counts);
  }
  int64_t matches = 0, best = 0;
  for (int64_t i = 0; i < l->n; i++) {
    matches += counts[i];
    if (counts[i] > best) {
      best = counts[i];
      *domain = (int32_t)i;
    }
  }
  if (n_tokens > 0) *dss = (double)matches / (double)n_tokens / (double)l->n;
out:
  ks_tokens_close(&t);
  free(counts);
  return status;
}
