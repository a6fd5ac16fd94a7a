#include "core/select/select.h"

#define FIRST_UNLIMITED_BINS 64

/* ks_kept.bytes of texts of these lengths; SIZE_MAX when it does not fit a size. */
static size_t set_bytes(int64_t n_dim, size_t n_question, size_t n_response) {
  size_t sum, embedding;
  if (!ks_mul_size((size_t)n_dim, sizeof(float), &embedding) || !ks_add_size(n_question, n_response, &sum) ||
      !ks_add_size(sum, embedding, &sum) || !ks_add_size(sum, 2 + sizeof(int32_t), &sum))
    return SIZE_MAX;
  return sum;
}

size_t ks_buffer_set_bytes(int64_t n_dim, const char *question, const char *response) {
  return set_bytes(n_dim, strlen(question), strlen(response));
}

static float *row(const ks_buffer *b, int64_t slot) {
  return b->embeddings + slot * b->n_dim;
}
static size_t row_bytes(const ks_buffer *b) {
  return (size_t)b->n_dim * sizeof(float);
}

static ks_status resize(ks_buffer *b, int64_t n_bins) {
  int64_t n_floats;
  size_t n_bytes;
  ks_kept *bins = NULL;
  void *embeddings = NULL;
  if (!ks_mul_i64(n_bins, b->n_dim, &n_floats) || !ks_mul_size((size_t)n_floats, sizeof(float), &n_bytes))
    return KS_FAIL(KS_EOVERFLOW, "buffer: %lld bins of %lld floats do not fit memory; use fewer bins",
                   (long long)n_bins, (long long)b->n_dim);
  KS_TRY(ks_alloc_array(&bins, (size_t)n_bins, sizeof *bins, "buffer: bins"));
  ks_status status = ks_mem_alloc(b->ctx, n_bytes, &embeddings);
  if (status == KS_OK && b->n_bins > 0)
    status = ks_mem_copy(b->ctx, embeddings, b->embeddings, (size_t)b->n_bins * row_bytes(b));
  if (status != KS_OK) {
    ks_mem_free(b->ctx, embeddings);
    free(bins);
    return status;
  }
  if (b->n_bins > 0) memcpy(bins, b->bins, (size_t)b->n_bins * sizeof *bins);
  free(b->bins);
  ks_mem_free(b->ctx, b->embeddings);
  b->bins = bins;
  b->embeddings = embeddings;
  b->n_bins = n_bins;
  return KS_OK;
}

ks_status ks_buffer_create(ks_ctx *ctx, int64_t n_bins, size_t bin_bytes, int64_t n_dim, bool unlimited,
                           ks_buffer **out) {
  *out = NULL;
  if (n_dim < 1) return KS_FAIL(KS_EINVAL, "buffer: n_dim is %lld; give at least 1", (long long)n_dim);
  if (n_bins < 0 || (n_bins == 0 && !unlimited))
    return KS_FAIL(KS_EINVAL, "buffer: n_bins is %lld; give at least 1", (long long)n_bins);
  ks_buffer *b = NULL;
  KS_TRY(ks_alloc_array(&b, 1, sizeof *b, "buffer"));
  b->ctx = ctx;
  b->unlimited = unlimited;
  b->bin_bytes = bin_bytes;
  b->n_dim = n_dim;
  ks_status status = resize(b, n_bins > 0 ? n_bins : FIRST_UNLIMITED_BINS);
  if (status != KS_OK) {
    ks_buffer_destroy(b);
    return status;
  }
  *out = b;
  return KS_OK;
}

void ks_buffer_destroy(ks_buffer *b) {
  if (!b) return;
  for (int64_t i = 0; i < b->n_bins; i++) {
    free(b->bins[i].question);
    free(b->bins[i].response);
  }
  free(b->bins);
  ks_mem_free(b->ctx, b->embeddings);
  free(b);
}

/* The bin is empty afterwards; its embedding is left to the caller. */
static void drop_texts(ks_buffer *b, int64_t slot) {
  ks_kept *k = &b->bins[slot];
  if (!k->used) return;
  b->used_bytes -= k->bytes;
  b->n_used--;
  free(k->question);
  free(k->response);
  *k = (ks_kept){0};
}

ks_status ks_buffer_put(ks_buffer *b, int64_t slot, int64_t arrival, int64_t set_id, int32_t domain,
                        const ks_scores *scores, const char *question, const char *response,
                        const float *embedding) {
  if (slot < 0 || slot >= b->n_bins)
    return KS_FAIL(KS_EBUDGET, "buffer: bin %lld does not exist; there are %lld", (long long)slot,
                   (long long)b->n_bins);
  size_t bytes = ks_buffer_set_bytes(b->n_dim, question, response), sum;
  if (!b->unlimited && bytes > b->bin_bytes)
    return KS_FAIL(KS_EBUDGET, "buffer: a set of %zu bytes does not fit a bin of %zu", bytes, b->bin_bytes);
  if (!ks_add_size(b->used_bytes, bytes, &sum)) return KS_FAIL(KS_EOVERFLOW, "buffer: too many bytes");
  char *q = NULL, *r = NULL;
  ks_status status = ks_strdup(question, &q);
  if (status == KS_OK) status = ks_strdup(response, &r);
  if (status == KS_OK) status = ks_mem_copy(b->ctx, row(b, slot), embedding, row_bytes(b));
  if (status != KS_OK) {
    free(q);
    free(r);
    return status;
  }
  drop_texts(b, slot);
  b->bins[slot] = (ks_kept){.used = true,
                            .arrival = arrival,
                            .set_id = set_id,
                            .domain = domain,
                            .scores = *scores,
                            .question = q,
                            .response = r,
                            .bytes = bytes};
  b->n_used++;
  b->used_bytes += bytes;
  if (b->used_bytes > b->peak_bytes) b->peak_bytes = b->used_bytes;
  return KS_OK;
}

/* The longest prefix of at most `room` bytes that ends between characters. */
static size_t utf8_prefix(const char *s, size_t n, size_t room) {
  if (n <= room) return n;
  while (room > 0 && ((unsigned char)s[room] & 0xC0) == 0x80)
    room--;
  return room;
}

ks_status ks_buffer_set_response(ks_buffer *b, int64_t slot, const char *response, bool *cut) {
  *cut = false;
  if (slot < 0 || slot >= b->n_bins || !b->bins[slot].used)
    return KS_FAIL(KS_EINVAL, "buffer: bin %lld holds no set", (long long)slot);
  ks_kept *k = &b->bins[slot];
  size_t n = strlen(response), n_kept = n;
  if (!b->unlimited)
    n_kept = utf8_prefix(response, n, b->bin_bytes - set_bytes(b->n_dim, strlen(k->question), 0));
  char *copy = NULL;
  KS_TRY(ks_strndup(response, n_kept, &copy));
  free(k->response);
  k->response = copy;
  b->used_bytes -= k->bytes;
  k->bytes = ks_buffer_set_bytes(b->n_dim, k->question, copy);
  b->used_bytes += k->bytes;
  if (b->used_bytes > b->peak_bytes) b->peak_bytes = b->used_bytes;
  *cut = n_kept < n;
  return KS_OK;
}

void ks_buffer_clear(ks_buffer *b) {
  for (int64_t i = 0; i < b->n_bins; i++)
    drop_texts(b, i);
  KS_ASSERT_EQ(b->n_used, 0);
  KS_ASSERT_EQ(b->used_bytes, 0);
  ks_mem_zero(b->ctx, b->embeddings, (size_t)b->n_bins * row_bytes(b));
}

ks_status ks_buffer_free_slot(ks_buffer *b, int64_t *slot) {
  *slot = -1;
  for (int64_t i = 0; i < b->n_bins && *slot < 0; i++)
    if (!b->bins[i].used) *slot = i;
  if (*slot >= 0 || !b->unlimited) return KS_OK;
  int64_t n_bins = b->n_bins, grown;
  if (!ks_mul_i64(n_bins, 2, &grown)) return KS_FAIL(KS_EOVERFLOW, "buffer: too many bins");
  KS_TRY(resize(b, grown));
  *slot = n_bins;
  return KS_OK;
}

bool ks_buffer_is_sound(const ks_buffer *b) {
  int64_t n_used = 0;
  size_t bytes = 0;
  bool fits = true;
  for (int64_t i = 0; i < b->n_bins; i++) {
    if (!b->bins[i].used) continue;
    n_used++;
    bytes += b->bins[i].bytes;
    fits = fits && (b->unlimited || b->bins[i].bytes <= b->bin_bytes);
  }
  return fits && n_used == b->n_used && bytes == b->used_bytes;
}
