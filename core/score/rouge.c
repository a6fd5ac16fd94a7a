#include "core/score/score.h"

#include <string.h>

/* Words of both texts as numbers: equal words, equal numbers. */
typedef struct {
  char *letters;    /* NUL-terminated words, one after the other */
  uint32_t *ids[2]; /* of target and prediction */
  size_t n_words[2];
  uint32_t *slots; /* open addressing: 1 + id */
  size_t *first;   /* [id] where the word stands in letters */
  size_t n_letters, n_slots;
  uint32_t n_ids;
} vocabulary;

static void vocabulary_free(vocabulary *v) {
  free(v->letters);
  free(v->ids[0]);
  free(v->ids[1]);
  free(v->slots);
  free(v->first);
}

/* Room for every word that texts of these lengths can have. */
static ks_status vocabulary_make(vocabulary *v, size_t n_target, size_t n_prediction) {
  size_t n_bytes;
  if (!ks_add_size(n_target, n_prediction, &n_bytes) || n_bytes > (size_t)1 << 30)
    return KS_FAIL(KS_EOVERFLOW, "rouge: the texts have more than %d bytes together; score shorter texts",
                   1 << 30);
  size_t max_words = n_bytes / 2 + 2;
  v->n_slots = 16;
  while (v->n_slots < 2 * max_words)
    v->n_slots *= 2;
  KS_TRY(ks_alloc_array(&v->letters, n_bytes + max_words, 1, "rouge: letters"));
  KS_TRY(ks_alloc_array(&v->ids[0], n_target / 2 + 1, sizeof *v->ids[0], "rouge: words of the target"));
  KS_TRY(
      ks_alloc_array(&v->ids[1], n_prediction / 2 + 1, sizeof *v->ids[1], "rouge: words of the prediction"));
  KS_TRY(ks_alloc_array(&v->slots, v->n_slots, sizeof *v->slots, "rouge: vocabulary"));
  return ks_alloc_array(&v->first, max_words, sizeof *v->first, "rouge: vocabulary");
}

/* The number of the word that begins at `start` of letters; a word seen before gives its letters back. */
static uint32_t intern_word(vocabulary *v, size_t start) {
  const char *w = v->letters + start;
  uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
  for (const char *c = w; *c; c++)
    hash = (hash ^ (unsigned char)*c) * 0x100000001b3u;
  size_t slot = (hash ^ hash >> 32) & (v->n_slots - 1);
  for (; v->slots[slot] != 0; slot = (slot + 1) & (v->n_slots - 1)) {
    uint32_t id = v->slots[slot] - 1;
    if (strcmp(v->letters + v->first[id], w) != 0) continue;
    v->n_letters = start;
    return id;
  }
  v->first[v->n_ids] = start;
  v->slots[slot] = v->n_ids + 1;
  v->n_letters = start + strlen(w) + 1;
  return v->n_ids++;
}

static void end_word(vocabulary *v, int side, size_t start, bool stem) {
  if (v->n_letters == start) return;
  size_t n = v->n_letters - start;
  v->letters[v->n_letters] = '\0';
  if (stem && n > 3) ks_porter_stem(v->letters + start);
  v->ids[side][v->n_words[side]++] = intern_word(v, start);
}

/* The only characters outside ASCII whose lower case has a letter a-z are U+212A (k) and U+0130 (i and a
 * combining dot, which splits); tests/fixtures/make_rouge.py checks that over all of Unicode. */
static void add_words(vocabulary *v, int side, const char *text, bool stem) {
  size_t start = v->n_letters;
  for (const char *c = text; *c;) {
    bool splits_after = false;
    char letter = 0;
    if ((*c >= 'a' && *c <= 'z') || (*c >= '0' && *c <= '9')) {
      letter = *c++;
    } else if (*c >= 'A' && *c <= 'Z') {
      letter = (char)(*c++ - 'A' + 'a');
    } else if (strncmp(c, "\xe2\x84\xaa", 3) == 0) {
      letter = 'k';
      c += 3;
    } else if (strncmp(c, "\xc4\xb0", 2) == 0) {
      letter = 'i';
      splits_after = true;
      c += 2;
    } else {
      c++;
    }
    if (letter) v->letters[v->n_letters++] = letter;
    if (letter && !splits_after) continue;
    end_word(v, side, start, stem);
    start = v->n_letters;
  }
  end_word(v, side, start, stem);
}

static int compare_keys(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return (x > y) - (x < y);
}

/* n-grams, n = 1 or 2, as sorted keys. */
static size_t make_keys(const vocabulary *v, int side, int n, uint64_t *keys) {
  size_t n_words = v->n_words[side], n_keys = n_words >= (size_t)n ? n_words - (size_t)n + 1 : 0;
  for (size_t i = 0; i < n_keys; i++) {
    keys[i] = v->ids[side][i];
    if (n == 2) keys[i] = keys[i] << 32 | v->ids[side][i + 1];
  }
  qsort(keys, n_keys, sizeof *keys, compare_keys);
  return n_keys;
}

static ks_status count_common_ngrams(const vocabulary *v, int n, size_t n_grams[2], size_t *common) {
  uint64_t *keys[2] = {NULL, NULL};
  ks_status status = KS_OK;
  for (int side = 0; side < 2; side++) {
    KS_TRY_OUT(ks_alloc_array(&keys[side], v->n_words[side], sizeof *keys[side], "rouge: n-grams"));
    n_grams[side] = make_keys(v, side, n, keys[side]);
  }
  *common = 0;
  for (size_t i = 0, j = 0; i < n_grams[0] && j < n_grams[1];) {
    uint64_t a = keys[0][i], b = keys[1][j];
    *common += a == b;
    i += a <= b;
    j += b <= a;
  }
out:
  free(keys[0]);
  free(keys[1]);
  return status;
}

/* Length of the longest common subsequence, 64 words of the target at a time: bit i of `open` is set while
 * the row's value does not rise at word i (H. Hyyro, "Bit-parallel LCS-length computation revisited", AWOCA
 * 2004); carries go from one block to the next. Memory is linear in the texts. */
static ks_status count_lcs(const vocabulary *v, size_t *length) {
  uint64_t *match = NULL;
  unsigned char *carry = NULL;
  ks_status status = KS_OK;
  const uint32_t *target = v->ids[0], *prediction = v->ids[1];
  *length = 0;
  KS_TRY_OUT(ks_alloc_array(&match, v->n_ids, sizeof *match, "rouge: positions"));
  KS_TRY_OUT(ks_alloc_array(&carry, v->n_words[1], 1, "rouge: carries"));
  for (size_t block = 0; block < v->n_words[0]; block += 64) {
    size_t n = v->n_words[0] - block < 64 ? v->n_words[0] - block : 64;
    uint64_t open = ~(uint64_t)0;
    for (size_t i = 0; i < n; i++)
      match[target[block + i]] |= (uint64_t)1 << i;
    for (size_t j = 0; j < v->n_words[1]; j++) {
      uint64_t m = match[prediction[j]], sum;
      unsigned c1 = __builtin_add_overflow(open, open & m, &sum);
      unsigned c2 = __builtin_add_overflow(sum, (uint64_t)carry[j], &sum);
      carry[j] = (unsigned char)(c1 | c2);
      open = sum | (open & ~m);
    }
    for (size_t i = 0; i < n; i++)
      match[target[block + i]] = 0;
    *length += (size_t)__builtin_popcountll(~open);
  }
out:
  free(match);
  free(carry);
  return status;
}

static double share(size_t part, size_t whole) {
  return whole ? (double)part / (double)whole : 0.0;
}

ks_status ks_rouge(ks_rouge_kind kind, bool stem, const char *target, const char *prediction, ks_prf *out) {
  if (!target || !prediction || !out || kind < KS_ROUGE_1 || kind > KS_ROUGE_L)
    return KS_FAIL(KS_EINVAL,
                   "rouge: a text is NULL or the kind %d is unknown; give two texts and KS_ROUGE_1, _2 or _L",
                   (int)kind);
  vocabulary v = {0};
  size_t n[2], common = 0;
  ks_status status = KS_OK;
  KS_TRY_OUT(vocabulary_make(&v, strlen(target), strlen(prediction)));
  add_words(&v, 0, target, stem);
  add_words(&v, 1, prediction, stem);
  if (kind == KS_ROUGE_L) {
    n[0] = v.n_words[0];
    n[1] = v.n_words[1];
    KS_TRY_OUT(count_lcs(&v, &common));
  } else {
    KS_TRY_OUT(count_common_ngrams(&v, kind == KS_ROUGE_1 ? 1 : 2, n, &common));
  }
  out->precision = share(common, n[1]);
  out->recall = share(common, n[0]);
  double sum = out->precision + out->recall;
  out->f1 = sum > 0 ? 2 * out->precision * out->recall / sum : 0.0;
out:
  vocabulary_free(&v);
  return status;
}
