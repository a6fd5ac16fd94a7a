/* What the tests of core/select share: a context, arrivals out of plain numbers, a random stream of arrivals.
 */
#ifndef KS_TEST_SELECT_SUPPORT_H
#define KS_TEST_SELECT_SUPPORT_H

#include "core/select/select.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>
#include <stdio.h>

#define MUST(expr)                                                                                           \
  do {                                                                                                       \
    ks_status must_ = (expr);                                                                                \
    cr_assert(must_ == KS_OK, "%s: %s", #expr, ks_error_message());                                          \
  } while (0)
/* The call fails with this status and says something. */
#define FAILS(status_, expr)                                                                                 \
  do {                                                                                                       \
    ks_error_clear();                                                                                        \
    ks_status fails_ = (expr);                                                                               \
    cr_assert(fails_ == (status_), "%s gives %s, want %s (%s)", #expr, ks_status_name(fails_),               \
              ks_status_name(status_), ks_error_message());                                                  \
    cr_assert(strlen(ks_error_message()) > 10, "%s fails without a word", #expr);                            \
  } while (0)

static inline ks_ctx *make_ctx(void) {
  ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
  params.backend = "cpu";
  params.n_threads = 1;
  ks_ctx *ctx;
  MUST(ks_ctx_create(&ctx, &params));
  return ctx;
}

/* An arrival whose embedding was put into backend memory at `staged`. */
static inline ks_arrival make_arrival(ks_ctx *ctx, int64_t index, const float *embedding, int64_t n_dim,
                                      float *staged, double eoe, double dss, int32_t domain) {
  MUST(ks_mem_upload(ctx, staged, embedding, (size_t)n_dim * sizeof(float)));
  return (ks_arrival){.arrival = index,
                      .set_id = 100 + index,
                      .domain = domain,
                      .scores = {.eoe = eoe, .dss = dss, .idd = NAN},
                      .embedding = staged,
                      .question = "a question",
                      .response = "a response"};
}

enum { STREAM_DIM = 6, STREAM_BINS = 8, STREAM_BIN_BYTES = 80 };

/* Arrival `index` of an endless stream with everything in it: repeats, zero, NaN and huge embeddings, sets
 * too large for a bin, text in several bytes a character. `texts` holds its strings. */
static inline ks_arrival stream_arrival(ks_ctx *ctx, uint64_t seed, int64_t index, float *staged,
                                        char texts[2][128]) {
  ks_rng r = ks_rng_make(seed, KS_RNG_TEST, (uint64_t)index);
  float e[STREAM_DIM];
  uint64_t kind = ks_rng_below(&r, 12);
  for (int i = 0; i < STREAM_DIM; i++)
    e[i] = kind == 0   ? 0.0f
           : kind == 1 ? (float)(i == 2)
           : kind == 2 ? 1e30f * (float)(i + 1)
                       : (float)ks_rng_normal(&r);
  if (kind == 3) e[ks_rng_below(&r, STREAM_DIM)] = NAN;
  if (kind == 4) e[1] = INFINITY;
  uint64_t n = ks_rng_below(&r, kind == 5 ? 100 : 24);
  memset(texts[0], 'q', 128);
  memset(texts[1], 'r', 128);
  snprintf(texts[0] + 5, 100, "\xC3\xA9");
  texts[1][n] = 0;
  int32_t domain = (int32_t)ks_rng_below(&r, 4) - 1;
  ks_arrival a =
      make_arrival(ctx, index, e, STREAM_DIM, staged, ks_rng_uniform(&r), ks_rng_uniform(&r), domain);
  a.question = texts[0];
  a.response = texts[1];
  if (kind == 6) a.scores.eoe = NAN;
  if (kind == 7) a.scores.dss = 0.5; /* ties */
  return a;
}

static inline ks_selector *make_selector(ks_ctx *ctx, const ks_policy *policy, int64_t n_bins,
                                         size_t bin_bytes, int64_t n_dim, uint64_t seed) {
  const ks_selector_params params = {
      .policy = policy, .n_bins = n_bins, .bin_bytes = bin_bytes, .n_dim = n_dim, .seed = seed};
  ks_selector *s;
  MUST(ks_selector_create(ctx, &params, &s));
  return s;
}

#endif
