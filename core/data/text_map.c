#include "core/data/text_map.h"

/* FNV-1a over both texts, with a byte between them that UTF-8 does not use. */
static uint64_t hash_pair(const char *first, const char *second) {
  uint64_t h = 14695981039346656037u;
  for (const char *p = first; *p; p++)
    h = (h ^ (unsigned char)*p) * 1099511628211u;
  if (!second) return h;
  h = (h ^ 0xFFu) * 1099511628211u;
  for (const char *p = second; *p; p++)
    h = (h ^ (unsigned char)*p) * 1099511628211u;
  return h;
}

static bool same(const ks_text_map_entry *e, const char *first, const char *second) {
  if (strcmp(e->first, first) != 0 || !e->second != !second) return false;
  return !second || strcmp(e->second, second) == 0;
}

static ks_text_map_entry *find(const ks_text_map *m, const char *first, const char *second) {
  size_t mask = m->cap - 1, i = (size_t)hash_pair(first, second) & mask;
  while (m->entries[i].first && !same(&m->entries[i], first, second))
    i = (i + 1) & mask;
  return &m->entries[i];
}

static ks_status grow(ks_text_map *m) {
  ks_text_map bigger = {.cap = m->cap ? 2 * m->cap : 64};
  KS_TRY(ks_alloc_array(&bigger.entries, bigger.cap, sizeof *bigger.entries, "text map"));
  for (size_t i = 0; i < m->cap; i++)
    if (m->entries[i].first) *find(&bigger, m->entries[i].first, m->entries[i].second) = m->entries[i];
  bigger.n = m->n;
  free(m->entries);
  *m = bigger;
  return KS_OK;
}

ks_status ks_text_map_put(ks_text_map *m, const char *first, const char *second, int64_t value,
                          int64_t *found) {
  if (2 * (m->n + 1) > m->cap) KS_TRY(grow(m));
  ks_text_map_entry *e = find(m, first, second);
  if (!e->first) {
    *e = (ks_text_map_entry){first, second, value};
    m->n++;
  }
  if (found) *found = e->value;
  return KS_OK;
}

int64_t ks_text_map_get(const ks_text_map *m, const char *first, const char *second) {
  if (m->cap == 0) return -1;
  const ks_text_map_entry *e = find(m, first, second);
  return e->first ? e->value : -1;
}

void ks_text_map_free(ks_text_map *m) {
  free(m->entries);
  *m = (ks_text_map){0};
}
