/* The buffer of bins: bytes, bounds, growth, cutting. */
#include "select_support.h"

static const ks_scores no_scores = {0, 0, 0};

static ks_status put(ks_buffer *b, int64_t slot, int64_t id, const char *question, const char *response) {
  float *staged = NULL;
  MUST(ks_mem_alloc(b->ctx, (size_t)b->n_dim * sizeof(float), (void **)&staged));
  float e[64];
  for (int i = 0; i < b->n_dim; i++)
    e[i] = (float)(id * 10 + i);
  MUST(ks_mem_upload(b->ctx, staged, e, (size_t)b->n_dim * sizeof(float)));
  ks_status s = ks_buffer_put(b, slot, id, id, 0, &no_scores, question, response, staged);
  ks_mem_free(b->ctx, staged);
  return s;
}

static float first_component(const ks_buffer *b, int64_t slot) {
  float v;
  MUST(ks_mem_download(b->ctx, &v, b->embeddings + slot * b->n_dim, sizeof v));
  return v;
}

/* Question 3 + response 4 + 2 NULs + 4 for the domain + 4 * 3 for the embedding = 25. */
Test(buffer, bytes_by_hand) {
  ks_ctx *ctx = make_ctx();
  cr_assert(eq(sz, ks_buffer_set_bytes(3, "abc", "defg"), 25));
  cr_assert(eq(sz, ks_buffer_set_bytes(3, "", ""), 18));
  cr_assert(eq(sz, ks_buffer_set_bytes(1, "\xC3\xA9", ""), 12));
  ks_buffer *b;
  MUST(ks_buffer_create(ctx, 2, 25, 3, false, &b));
  MUST(put(b, 1, 1, "abc", "defg")); /* exactly the bin */
  cr_assert(eq(sz, b->used_bytes, 25));
  FAILS(KS_EBUDGET, put(b, 0, 2, "abc", "defgh")); /* a byte more */
  FAILS(KS_EBUDGET, put(b, 1, 2, "abcd", "defg"));
  cr_assert(eq(sz, b->used_bytes, 25));
  cr_assert(eq(str, b->bins[1].question, "abc"));
  cr_assert(eq(i64, b->bins[1].set_id, 1));
  MUST(put(b, 0, 3, "", ""));
  cr_assert(eq(sz, b->used_bytes, 43));
  MUST(put(b, 1, 4, "x", "y")); /* replaces 25 by 20 */
  cr_assert(eq(sz, b->used_bytes, 38));
  cr_assert(eq(sz, b->peak_bytes, 43));
  cr_assert(eq(i64, b->n_used, 2));
  cr_assert(first_component(b, 1) == 40.0f && first_component(b, 0) == 30.0f);
  cr_assert(ks_buffer_is_sound(b));
  ks_buffer_destroy(b);
  ks_ctx_destroy(ctx);
}

Test(buffer, slots) {
  ks_ctx *ctx = make_ctx();
  ks_buffer *b;
  MUST(ks_buffer_create(ctx, 2, 100, 3, false, &b));
  FAILS(KS_EBUDGET, put(b, 2, 1, "a", "b"));
  FAILS(KS_EBUDGET, put(b, -1, 1, "a", "b"));
  int64_t slot;
  MUST(ks_buffer_free_slot(b, &slot));
  cr_assert(eq(i64, slot, 0));
  cr_assert(ks_buffer_has_room(b));
  MUST(put(b, 0, 1, "a", "b"));
  MUST(ks_buffer_free_slot(b, &slot));
  cr_assert(eq(i64, slot, 1));
  MUST(put(b, 1, 2, "a", "b"));
  MUST(ks_buffer_free_slot(b, &slot));
  cr_assert(eq(i64, slot, -1));
  cr_assert(not(ks_buffer_has_room(b)));
  ks_buffer_clear(b);
  cr_assert(b->n_used == 0 && b->used_bytes == 0 && b->peak_bytes == 40 && first_component(b, 1) == 0.0f);
  cr_assert(ks_buffer_is_sound(b));
  MUST(ks_buffer_free_slot(b, &slot));
  cr_assert(eq(i64, slot, 0));
  ks_buffer_destroy(b);
  ks_ctx_destroy(ctx);
}

Test(buffer, unlimited_grows) {
  ks_ctx *ctx = make_ctx();
  ks_buffer *b;
  MUST(ks_buffer_create(ctx, 3, 1, 5, true, &b)); /* bins of one byte: they do not bind */
  size_t bytes = 0;
  for (int64_t i = 0; i < 1000; i++) {
    int64_t slot;
    MUST(ks_buffer_free_slot(b, &slot));
    cr_assert(eq(i64, slot, i));
    MUST(put(b, slot, i, "question", "response"));
    bytes += ks_buffer_set_bytes(5, "question", "response");
    cr_assert(ks_buffer_has_room(b) && ks_buffer_is_sound(b));
  }
  cr_assert(eq(sz, b->used_bytes, bytes));
  cr_assert(eq(i64, b->n_used, 1000));
  cr_assert(first_component(b, 0) == 0.0f && first_component(b, 999) == 9990.0f);
  bool cut;
  MUST(ks_buffer_set_response(b, 7, "a much longer response than the one before", &cut));
  cr_assert(cut == false && ks_buffer_is_sound(b));
  ks_buffer_destroy(b);
  MUST(ks_buffer_create(ctx, 0, 1, 5, true, &b));
  ks_buffer_destroy(b);
  ks_ctx_destroy(ctx);
}

/* Bin 40, question "abc", 2 + 4 + 12 fixed: room for 19 bytes of response. */
Test(buffer, responses_are_cut_between_characters) {
  ks_ctx *ctx = make_ctx();
  ks_buffer *b;
  MUST(ks_buffer_create(ctx, 1, 40, 3, false, &b));
  static const struct {
    const char *response, *kept;
    bool cut;
  } cases[] = {
      {"0123456789012345678", "0123456789012345678", false},
      {"01234567890123456789", "0123456789012345678", true},
      {"012345678901234567\xC3\xA9", "012345678901234567", true}, /* 2 bytes at 18: the second lies outside */
      {"01234567890123456\xC3\xA9z", "01234567890123456\xC3\xA9", true}, /* ends exactly at 19 */
      {"0123456789012345\xF0\x9F\x98\x80", "0123456789012345", true},    /* 4 bytes at 16 */
      {"0123456789012345\xE2\x82\xAC!", "0123456789012345\xE2\x82\xAC", true},
      {"", "", false},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    MUST(put(b, 0, 1, "abc", "r"));
    bool cut = !cases[i].cut;
    MUST(ks_buffer_set_response(b, 0, cases[i].response, &cut));
    cr_expect(cut == cases[i].cut, "case %zu", i);
    cr_expect(strcmp(b->bins[0].response, cases[i].kept) == 0, "case %zu: \"%s\"", i, b->bins[0].response);
    cr_expect(b->used_bytes == ks_buffer_set_bytes(3, "abc", cases[i].kept) && ks_buffer_is_sound(b));
  }
  bool cut;
  MUST(put(b, 0, 1, "0123456789012345678901", "")); /* the question fills the bin */
  MUST(ks_buffer_set_response(b, 0, "\xC3\xA9", &cut));
  cr_assert(cut && b->bins[0].response[0] == 0);
  FAILS(KS_EINVAL, ks_buffer_set_response(b, 1, "x", &cut));
  ks_buffer_clear(b);
  FAILS(KS_EINVAL, ks_buffer_set_response(b, 0, "x", &cut));
  ks_buffer_destroy(b);
  ks_ctx_destroy(ctx);
}

Test(buffer, sizes_that_make_no_sense) {
  ks_ctx *ctx = make_ctx();
  ks_buffer *b;
  FAILS(KS_EINVAL, ks_buffer_create(ctx, 0, 100, 3, false, &b));
  FAILS(KS_EINVAL, ks_buffer_create(ctx, -1, 100, 3, true, &b));
  FAILS(KS_EINVAL, ks_buffer_create(ctx, 1, 100, 0, false, &b));
  FAILS(KS_EOVERFLOW, ks_buffer_create(ctx, INT64_MAX / 2, 100, 3, false, &b));
  cr_assert(eq(sz, ks_mem_used(ctx), 0));
  ks_ctx_destroy(ctx);
}
