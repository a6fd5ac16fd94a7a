#include "core/model/tok_sentencepiece.h"

ks_status ks_sp_normalizer_set_charsmap(ks_sp_normalizer *z, ks_span blob) {
  if (blob.n == 0) return KS_OK;
  uint32_t trie_bytes = 0;
  if (blob.n > sizeof trie_bytes) memcpy(&trie_bytes, blob.bytes, sizeof trie_bytes);
  if (trie_bytes < 4 || trie_bytes % 4 != 0 || trie_bytes >= blob.n - 4 || blob.bytes[blob.n - 1] != 0)
    return KS_FAIL(KS_EDATA, "its normalization map (%zu bytes, a table of %u) is damaged", blob.n,
                   trie_bytes);
  z->charsmap_trie = (ks_span){blob.bytes + 4, trie_bytes};
  z->charsmap_strings = (ks_span){blob.bytes + 4 + trie_bytes, blob.n - 4 - trie_bytes};
  return KS_OK;
}

/* The double array of Darts-clone: in a unit, bits 0..7 and 31 are the label, bit 8 says that a string ends
 * below, bits 10..30 are the offset to the children, in steps of 256 when bit 9 is set; a leaf has the value
 * in bits 0..30. */
typedef struct {
  const char *units;
  size_t n;
} double_array;

static bool unit_at(const double_array *d, size_t i, uint32_t *unit) {
  if (i >= d->n) return false;
  memcpy(unit, d->units + 4 * i, 4);
  return true;
}

static size_t unit_children(uint32_t unit) {
  return (size_t)(unit >> 10) << ((unit & 0x200) >> 6);
}

/* Length of the longest rule that text begins with, 0: none. */
static size_t charsmap_longest(const ks_sp_normalizer *z, const char *text, size_t n, uint32_t *value) {
  double_array d = {z->charsmap_trie.bytes, z->charsmap_trie.n / 4};
  size_t longest = 0, node = 0;
  uint32_t unit;
  if (!unit_at(&d, 0, &unit)) return 0;
  node = unit_children(unit);
  for (size_t i = 0; i < n; i++) {
    unsigned char byte = (unsigned char)text[i];
    node ^= byte;
    if (!unit_at(&d, node, &unit) || (unit & 0x800000FFu) != byte) break;
    node ^= unit_children(unit);
    if (!(unit & 0x100)) continue;
    if (!unit_at(&d, node, &unit)) break;
    *value = unit & 0x7FFFFFFFu;
    longest = i + 1;
  }
  return longest;
}

/* The next stretch of the text and what stands for it. *used: bytes of the text. */
static ks_status next_stretch(const ks_sp_normalizer *z, const char *text, size_t n, ks_span *out,
                              size_t *used) {
  int32_t id;
  uint32_t value = 0, cp;
  *used = z->user ? ks_trie_longest(z->user, text, n, &id) : 0;
  *out = (ks_span){text, *used};
  if (*used > 0) return KS_OK;
  *used = z->charsmap_trie.n ? charsmap_longest(z, text, n, &value) : 0;
  if (*used == 0) {
    *used = (size_t)ks_utf8_decode(text, n, &cp);
    *out = (ks_span){text, *used};
    return KS_OK;
  }
  if (value >= z->charsmap_strings.n)
    return KS_FAIL(KS_EDATA,
                   "tokenizer: its normalization map points to byte %u of %zu; the tokenizer file is damaged",
                   value, z->charsmap_strings.n);
  const char *s = z->charsmap_strings.bytes + value;
  *out = (ks_span){s, strlen(s)};
  return KS_OK;
}

static ks_status add_stretch(const ks_sp_normalizer *z, ks_span s, ks_text *out) {
  if (!z->escape_whitespaces) return ks_text_add(out, s.bytes, s.n);
  size_t i = 0;
  while (i < s.n) {
    const char *blank = memchr(s.bytes + i, ' ', s.n - i);
    size_t end = blank ? (size_t)(blank - s.bytes) : s.n;
    KS_TRY(ks_text_add(out, s.bytes + i, end - i));
    if (blank) KS_TRY(ks_text_add_str(out, KS_SPACE_SYMBOL));
    i = end + (blank != NULL);
  }
  return KS_OK;
}

static bool is_blank(ks_span s) {
  return s.n == 1 && s.bytes[0] == ' ';
}

static ks_status add_all(const ks_sp_normalizer *z, const char *text, size_t n, ks_text *out) {
  bool after_blank = z->remove_extra_whitespaces;
  for (size_t i = 0, used; i < n; i += used) {
    ks_span s;
    KS_TRY(next_stretch(z, text + i, n - i, &s, &used));
    while (after_blank && s.n > 0 && s.bytes[0] == ' ')
      s = (ks_span){s.bytes + 1, s.n - 1};
    if (s.n == 0) continue;
    KS_TRY(add_stretch(z, s, out));
    after_blank = z->remove_extra_whitespaces && s.bytes[s.n - 1] == ' ';
  }
  return KS_OK;
}

ks_status ks_sp_normalize(const ks_sp_normalizer *z, const char *text, size_t n, ks_text *out) {
  const char *blank = z->escape_whitespaces ? KS_SPACE_SYMBOL : " ";
  size_t blank_n = strlen(blank), i = 0, used;
  while (z->remove_extra_whitespaces && i < n) {
    ks_span s;
    KS_TRY(next_stretch(z, text + i, n - i, &s, &used));
    if (!is_blank(s)) break;
    i += used;
  }
  if (i == n) return KS_OK;
  if (z->add_dummy_prefix && !z->whitespace_as_suffix) KS_TRY(ks_text_add(out, blank, blank_n));
  KS_TRY(add_all(z, text + i, n - i, out));
  while (z->remove_extra_whitespaces && out->len >= blank_n &&
         memcmp(out->data + out->len - blank_n, blank, blank_n) == 0)
    out->len -= blank_n;
  if (z->add_dummy_prefix && z->whitespace_as_suffix) KS_TRY(ks_text_add(out, blank, blank_n));
  return KS_OK;
}
