#include "core/model/tok.h"

void ks_merger_free(ks_merger *m) {
  free(m->symbols);
  free(m->heap);
  *m = (ks_merger){0};
}

ks_status ks_merger_add(ks_merger *m, uint32_t begin, uint32_t n, int32_t id, bool frozen) {
  if (m->n_symbols == m->cap_symbols) {
    int32_t cap = m->cap_symbols ? 2 * m->cap_symbols : 256;
    ks_symbol *symbols = realloc(m->symbols, (size_t)cap * sizeof *symbols);
    if (!symbols) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for %d symbols", cap);
    m->symbols = symbols;
    m->cap_symbols = cap;
  }
  int32_t i = m->n_symbols++;
  m->symbols[i] = (ks_symbol){begin, n, id, i - 1, -1, frozen};
  if (i > 0) m->symbols[i - 1].next = i;
  return KS_OK;
}

uint32_t ks_merge_rank_of_score(float score) {
  uint32_t bits;
  score += 0.0f; /* -0 becomes 0 */
  memcpy(&bits, &score, 4);
  uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u; /* IEEE 754 order as unsigned order */
  return ~rising;
}

static void heap_rise(ks_merge *heap, size_t i) {
  ks_merge item = heap[i];
  while (i > 0 && heap[(i - 1) / 2].key > item.key) {
    heap[i] = heap[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  heap[i] = item;
}

static ks_merge heap_pop(ks_merger *m) {
  ks_merge top = m->heap[0], item = m->heap[--m->n_heap];
  size_t i = 0, n = m->n_heap;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= n) break;
    if (child + 1 < n && m->heap[child + 1].key < m->heap[child].key) child++;
    if (m->heap[child].key >= item.key) break;
    m->heap[i] = m->heap[child];
    i = child;
  }
  m->heap[i] = item;
  return top;
}

static ks_status offer(ks_merger *m, const char *text, ks_merge_rule rule, const void *self, int32_t left) {
  if (left < 0 || m->symbols[left].next < 0) return KS_OK;
  const ks_symbol *a = &m->symbols[left], *b = &m->symbols[a->next];
  uint32_t rank;
  int32_t id;
  if (a->frozen || b->frozen || !rule(self, text, a, b, &rank, &id)) return KS_OK;
  if (m->n_heap == m->cap_heap) {
    size_t cap = m->cap_heap ? 2 * m->cap_heap : 256;
    ks_merge *heap = realloc(m->heap, cap * sizeof *heap);
    if (!heap) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for %zu merges", cap);
    m->heap = heap;
    m->cap_heap = cap;
  }
  m->heap[m->n_heap] = (ks_merge){(uint64_t)rank << 32 | (uint32_t)left, id, a->n + b->n};
  heap_rise(m->heap, m->n_heap++);
  return KS_OK;
}

ks_status ks_merger_run(ks_merger *m, const char *text, ks_merge_rule rule, const void *self) {
  m->n_heap = 0;
  for (int32_t i = 0; i + 1 < m->n_symbols; i++)
    KS_TRY(offer(m, text, rule, self, i));
  while (m->n_heap > 0) {
    ks_merge top = heap_pop(m);
    int32_t i = (int32_t)(uint32_t)top.key;
    ks_symbol *a = &m->symbols[i];
    if (a->n == 0 || a->next < 0) continue;
    ks_symbol *b = &m->symbols[a->next];
    if (m->compare_ids) {
      uint32_t rank;
      int32_t id;
      if (!rule(self, text, a, b, &rank, &id) || id != top.id) continue;
    } else if (a->n + b->n != top.n) {
      continue;
    }
    a->n += b->n;
    a->id = top.id;
    a->next = b->next;
    b->n = 0;
    if (a->next >= 0) m->symbols[a->next].prev = i;
    KS_TRY(offer(m, text, rule, self, a->prev));
    KS_TRY(offer(m, text, rule, self, i));
  }
  return KS_OK;
}
