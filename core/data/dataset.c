#include "core/data/data.h"
#include "core/data/text_map.h"

/* Strings lie in chunks that never move; the map of topics borrows their names from there. */
typedef struct chunk {
  struct chunk *next;
  size_t used, cap;
  char bytes[];
} chunk;

typedef struct {
  chunk *chunks;
  ks_text_map topics;
  size_t sets_cap, topics_cap;
} arena;

enum { CHUNK_BYTES = 1 << 16 };

static ks_status arena_copy(arena *a, const char *text, const char **out) {
  size_t n = strlen(text) + 1;
  if (!a->chunks || a->chunks->cap - a->chunks->used < n) {
    size_t cap = n > CHUNK_BYTES ? n : CHUNK_BYTES;
    chunk *c = malloc(sizeof *c + cap);
    if (!c) return KS_FAIL(KS_ENOMEM, "dataset: no memory for %zu bytes of text", cap);
    *c = (chunk){.next = a->chunks, .cap = cap};
    a->chunks = c;
  }
  char *p = a->chunks->bytes + a->chunks->used;
  memcpy(p, text, n);
  a->chunks->used += n;
  *out = p;
  return KS_OK;
}

/* Room for one more element of `size` bytes in *array. */
static ks_status reserve(void *array, size_t n, size_t *cap, size_t size) {
  if (n < *cap) return KS_OK;
  size_t bigger = *cap ? 2 * *cap : 64, bytes;
  void *p;
  memcpy(&p, array, sizeof p);
  if (!ks_mul_size(bigger, size, &bytes))
    return KS_FAIL(KS_EOVERFLOW, "dataset: %zu elements are too many", bigger);
  p = realloc(p, bytes);
  if (!p) return KS_FAIL(KS_ENOMEM, "dataset: no memory for %zu bytes", bytes);
  memcpy(array, &p, sizeof p);
  *cap = bigger;
  return KS_OK;
}

ks_status ks_dataset_create(const char *name, ks_dataset **out) {
  ks_dataset *d = calloc(1, sizeof *d);
  arena *a = calloc(1, sizeof *a);
  if (!d || !a) {
    free(d);
    free(a);
    return KS_FAIL(KS_ENOMEM, "dataset: no memory");
  }
  d->arena = a;
  for (size_t i = 0; i + 1 < sizeof d->name && name[i]; i++)
    d->name[i] = name[i];
  *out = d;
  return KS_OK;
}

void ks_dataset_destroy(ks_dataset *d) {
  if (!d) return;
  arena *a = d->arena;
  for (chunk *c = a->chunks, *next; c; c = next) {
    next = c->next;
    free(c);
  }
  ks_text_map_free(&a->topics);
  free(a);
  free(d->sets);
  free(d->topics);
  free(d->stream);
  free(d->eval);
  free(d);
}

static ks_status find_topic(ks_dataset *d, const char *topic, int32_t *out) {
  arena *a = d->arena;
  int64_t found = ks_text_map_get(&a->topics, topic, NULL);
  if (found < 0) {
    if (d->n_topics == INT32_MAX) return KS_FAIL(KS_EOVERFLOW, "dataset: more than %d topics", INT32_MAX);
    const char *copy;
    KS_TRY(arena_copy(a, topic, &copy));
    KS_TRY(reserve(&d->topics, (size_t)d->n_topics, &a->topics_cap, sizeof *d->topics));
    KS_TRY(ks_text_map_put(&a->topics, copy, NULL, d->n_topics, &found));
    d->topics[d->n_topics++] = (char *)copy;
  }
  *out = (int32_t)found;
  return KS_OK;
}

static ks_status check_text(const char *what, const char *text, bool may_be_empty) {
  if (!text || (!*text && !may_be_empty))
    return KS_FAIL(KS_EDATA, "the %s is empty; give every row one", what);
  size_t n = strlen(text), bad = ks_utf8_check(text, n);
  if (bad < n)
    return KS_FAIL(KS_EDATA, "the %s is not UTF-8 at its byte %zu; convert the file to UTF-8", what, bad);
  return KS_OK;
}

ks_status ks_dataset_add(ks_dataset *d, const char *question, const char *response, const char *preferred,
                         const char *topic, bool uninformative) {
  arena *a = d->arena;
  KS_TRY(check_text("question", question, false));
  KS_TRY(check_text("response", response, true));
  KS_TRY(check_text("preferred response", preferred, false));
  if (topic) KS_TRY(check_text("topic", topic, false));
  ks_set s = {.topic = -1, .fact = -1, .uninformative = uninformative};
  if (topic) KS_TRY(find_topic(d, topic, &s.topic));
  KS_TRY(arena_copy(a, question, &s.question));
  KS_TRY(arena_copy(a, response, &s.response));
  if (strcmp(response, preferred) == 0)
    s.preferred = s.response;
  else
    KS_TRY(arena_copy(a, preferred, &s.preferred));
  KS_TRY(reserve(&d->sets, (size_t)d->n_sets, &a->sets_cap, sizeof *d->sets));
  d->sets[d->n_sets++] = s;
  return KS_OK;
}
