/* A map from text to a number, for finding duplicates. Keys are borrowed and must outlive the map. Internal
 * to core/data. */
#ifndef KS_TEXT_MAP_H
#define KS_TEXT_MAP_H

#include "core/base/base.h"

typedef struct {
  const char *first, *second; /* the key is a pair of texts; second may be NULL */
  int64_t value;
} ks_text_map_entry;

/* Zero-initialise; ks_text_map_free. */
typedef struct {
  ks_text_map_entry *entries; /* [cap], first NULL: free */
  size_t n, cap;
} ks_text_map;

/* Puts (first, second) -> value, unless the key is there; *found (may be NULL) gets the value that the key
 * then has. */
ks_status ks_text_map_put(ks_text_map *m, const char *first, const char *second, int64_t value,
                          int64_t *found);
/* The key's value, or -1. */
int64_t ks_text_map_get(const ks_text_map *m, const char *first, const char *second);
void ks_text_map_free(ks_text_map *m);

#endif
