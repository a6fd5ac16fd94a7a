#include "core/model/tok.h"

static uint32_t hash_bytes(const char *bytes, size_t n) {
  uint64_t h = 0x9E3779B97F4A7C15u ^ n;
  while (n >= 8) {
    uint64_t w;
    memcpy(&w, bytes, 8);
    h = (h ^ w) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    bytes += 8;
    n -= 8;
  }
  uint64_t w = 0;
  memcpy(&w, bytes, n);
  h = (h ^ w) * 0xD6E8FEB86659FD93u;
  h ^= h >> 32;
  return (uint32_t)(h * 0xD6E8FEB86659FD93u >> 32);
}

/* Smallest power of two that keeps n entries under half of the table. */
static uint32_t table_size(size_t n) {
  uint32_t size = 16;
  while (size / 2 < n && size < (1u << 31))
    size *= 2;
  return size;
}

ks_status ks_vocab_init(ks_vocab *v, int32_t n_pieces) {
  uint32_t size = table_size((size_t)n_pieces);
  *v = (ks_vocab){.n_pieces = n_pieces, .mask = size - 1};
  KS_TRY(ks_alloc_array(&v->pieces, (size_t)n_pieces, sizeof *v->pieces, "tokenizer: pieces"));
  return ks_alloc_array(&v->slots, size, sizeof *v->slots, "tokenizer: vocabulary index");
}

void ks_vocab_free(ks_vocab *v) {
  free(v->pieces);
  free(v->slots);
  *v = (ks_vocab){0};
}

static uint32_t vocab_slot(const ks_vocab *v, const char *bytes, size_t n) {
  uint32_t at = hash_bytes(bytes, n) & v->mask;
  while (v->slots[at]) {
    const ks_piece *p = &v->pieces[v->slots[at] - 1];
    if (p->n == n && memcmp(p->bytes, bytes, n) == 0) break;
    at = (at + 1) & v->mask;
  }
  return at;
}

bool ks_vocab_index(ks_vocab *v, int32_t id) {
  const ks_piece *p = &v->pieces[id];
  uint32_t at = vocab_slot(v, p->bytes, p->n);
  if (v->slots[at]) return false;
  v->slots[at] = (uint32_t)id + 1;
  if (p->n > v->max_n) v->max_n = p->n;
  return true;
}

int32_t ks_vocab_find(const ks_vocab *v, const char *bytes, size_t n) {
  if (n > v->max_n) return -1;
  return (int32_t)v->slots[vocab_slot(v, bytes, n)] - 1;
}

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

int ks_piece_byte(const char *bytes, size_t n) {
  if (n != 6 || memcmp(bytes, "<0x", 3) != 0 || bytes[5] != '>') return -1;
  int hi = hex_digit(bytes[3]), lo = hex_digit(bytes[4]);
  return hi < 0 || lo < 0 ? -1 : hi * 16 + lo;
}

size_t ks_tok_word(const char *text, size_t n, const char *marker) {
  size_t len = strlen(marker), i = 0;
  while (n - i >= len && memcmp(text + i, marker, len) == 0)
    i += len;
  while (i < n && (n - i < len || memcmp(text + i, marker, len) != 0))
    i++;
  return i;
}

bool ks_vocab_has_words(const ks_vocab *v, const char *marker) {
  for (uint32_t at = 0; at <= v->mask; at++) {
    if (!v->slots[at]) continue;
    const ks_piece *p = &v->pieces[v->slots[at] - 1];
    if (ks_tok_word(p->bytes, p->n, marker) < p->n) return false;
  }
  return true;
}

ks_status ks_trie_init(ks_trie *t, size_t n_bytes) {
  *t = (ks_trie){0};
  if (n_bytes >= 1u << 30) return KS_FAIL(KS_EOVERFLOW, "tokenizer: pieces of %zu bytes in total", n_bytes);
  uint32_t size = table_size(n_bytes);
  t->mask = size - 1;
  t->n_nodes = 1;
  KS_TRY(ks_alloc_array(&t->keys, size, sizeof *t->keys, "tokenizer: trie"));
  KS_TRY(ks_alloc_array(&t->next, size, sizeof *t->next, "tokenizer: trie"));
  KS_TRY(ks_alloc_array(&t->values, n_bytes + 1, sizeof *t->values, "tokenizer: trie"));
  for (size_t i = 0; i <= n_bytes; i++)
    t->values[i] = -1;
  return KS_OK;
}

void ks_trie_free(ks_trie *t) {
  free(t->keys);
  free(t->next);
  free(t->values);
  *t = (ks_trie){0};
}

static uint32_t trie_slot(const ks_trie *t, uint64_t key) {
  uint32_t at = (uint32_t)(key * 0x9E3779B97F4A7C15u >> 32) & t->mask;
  while (t->keys[at] && t->keys[at] != key)
    at = (at + 1) & t->mask;
  return at;
}

uint32_t ks_trie_step(const ks_trie *t, uint32_t node, unsigned char byte) {
  return t->next[trie_slot(t, ((uint64_t)node << 8 | byte) + 1)];
}

void ks_trie_add(ks_trie *t, const char *bytes, size_t n, int32_t value) {
  uint32_t node = 0;
  for (size_t i = 0; i < n; i++) {
    uint64_t key = ((uint64_t)node << 8 | (unsigned char)bytes[i]) + 1;
    uint32_t at = trie_slot(t, key);
    if (!t->keys[at]) {
      t->keys[at] = key;
      t->next[at] = t->n_nodes++;
    }
    node = t->next[at];
  }
  t->values[node] = value;
}

size_t ks_trie_longest(const ks_trie *t, const char *s, size_t n, int32_t *value) {
  size_t longest = 0;
  uint32_t node = 0;
  for (size_t i = 0; i < n; i++) {
    node = ks_trie_step(t, node, (unsigned char)s[i]);
    if (node == 0) break;
    if (t->values[node] < 0) continue;
    longest = i + 1;
    *value = t->values[node];
  }
  return longest;
}
