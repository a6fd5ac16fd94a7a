/* The referee: IDD against a plain double reference, budgets that no policy can break, conservation,
 * snapshots. */
#include "select_support.h"

/* ---------------------------------------------------------------- IDD */

enum { DIM = 37, IDD_BINS = 12 };

typedef struct {
  double value, tol;
} bounded;

/* 1 - cosine in double, and what a float32 fma chain over the columns may be off (the rule of computed
 * tolerances: L = n, S = sum |a b| / |a||b|). */
static bounded reference_distance(const float *a, const float *b, int64_t n) {
  double dot = 0, size = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; i++) {
    dot += (double)a[i] * (double)b[i];
    size += fabs((double)a[i] * (double)b[i]);
    aa += (double)a[i] * (double)a[i];
    bb += (double)b[i] * (double)b[i];
  }
  double norms = sqrt(aa) * sqrt(bb);
  if (norms == 0) return (bounded){1, 0};
  return (bounded){1 - dot / norms,
                   0x1p-24 * fabs(dot / norms) + (4 + sqrt((double)n)) * 0x1p-24 * size / norms};
}

typedef struct {
  float e[200][DIM];
  int32_t domain[200];
} cohort;

static void make_cohort(cohort *c, uint64_t seed) {
  for (uint64_t i = 0; i < 200; i++) {
    ks_rng r = ks_rng_make(seed, KS_RNG_TEST, i);
    bool zero = ks_rng_below(&r, 10) == 0;
    for (int j = 0; j < DIM; j++)
      c->e[i][j] = zero ? 0 : (float)ks_rng_normal(&r);
    c->domain[i] = (int32_t)ks_rng_below(&r, 4) - 1;
  }
}

/* Mean distance from an arrival to the kept sets of its domain but itself. */
static bounded reference_idd(const cohort *c, const ks_buffer *b, int64_t arrival) {
  bounded sum = {0, 0};
  int n = 0;
  for (int64_t i = 0; i < b->n_bins; i++) {
    const ks_kept *k = &b->bins[i];
    if (!k->used || k->domain != c->domain[arrival] || k->arrival == arrival) continue;
    bounded d = reference_distance(c->e[arrival], c->e[k->arrival], DIM);
    sum.value += d.value;
    sum.tol += d.tol;
    n++;
  }
  if (n == 0) return (bounded){1, 0};
  return (bounded){sum.value / n, sum.tol / n + 4 * 0x1p-53};
}

static void run_idd(const char *policy, bool refresh) {
  static cohort c;
  make_cohort(&c, 11);
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof c.e[0], (void **)&staged));
  const ks_selector_params params = {.policy = ks_policy_find(policy),
                                     .n_bins = IDD_BINS,
                                     .bin_bytes = 1000,
                                     .n_dim = DIM,
                                     .idd_refresh = refresh,
                                     .seed = 2};
  ks_selector *s;
  MUST(ks_selector_create(ctx, &params, &s));
  const ks_buffer *b = ks_selector_buffer(s);
  int n_replaced = 0;
  for (int64_t i = 0; i < 200; i++) {
    bounded want = reference_idd(&c, b, i);
    ks_arrival a = make_arrival(ctx, i, c.e[i], DIM, staged, (double)i, (double)i, c.domain[i]);
    a.scores.idd = 1e9; /* whatever the caller left there */
    ks_offer_result r;
    MUST(ks_selector_offer(s, &a, &r));
    n_replaced += r.outcome == KS_REPLACED;
    cr_assert(fabs(r.idd - want.value) <= want.tol, "%s, arrival %lld: idd %.9g, want %.9g +- %g", policy,
              (long long)i, r.idd, want.value, want.tol);
    if (r.slot >= 0 && !refresh) cr_assert(b->bins[r.slot].scores.idd == r.idd);
    for (int64_t j = 0; refresh && j < b->n_bins; j++) {
      if (!b->bins[j].used) continue;
      want = reference_idd(&c, b, b->bins[j].arrival);
      cr_assert(fabs(b->bins[j].scores.idd - want.value) <= want.tol,
                "refreshed bin %lld after arrival %lld: %.9g, want %.9g", (long long)j, (long long)i,
                b->bins[j].scores.idd, want.value);
    }
  }
  cr_assert(n_replaced > 5, "%s replaced %d", policy, n_replaced);
  ks_mem_free(ctx, staged);
  ks_selector_destroy(s);
  ks_ctx_destroy(ctx);
}

Test(selector, idd_is_the_mean_over_the_domain) {
  run_idd("random", false);
  run_idd("sdss", false);
}
Test(selector, idd_refresh) {
  run_idd("sdss", true);
}

Test(selector, idd_of_an_empty_domain) {
  static const double want[] = {1, 0, INFINITY};
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, 2 * sizeof(float), (void **)&staged));
  for (int k = 0; k < 3; k++) {
    const ks_selector_params params = {.policy = ks_policy_find("sdss"),
                                       .n_bins = 2,
                                       .bin_bytes = 100,
                                       .n_dim = 2,
                                       .idd_empty = (ks_idd_empty)k};
    ks_selector *s;
    MUST(ks_selector_create(ctx, &params, &s));
    static const int32_t domains[] = {0, 1, 0, -1};
    for (int64_t i = 0; i < 4; i++) { /* domain 0, then 1: empty; 0 again: not; -1 is a domain of its own */
      const float e[2] = {1, 0};
      ks_arrival a = make_arrival(ctx, i, e, 2, staged, 1, 1, domains[i]);
      ks_offer_result r;
      MUST(ks_selector_offer(s, &a, &r));
      cr_expect(r.idd == (i == 2 ? 0 : want[k]), "choice %d, arrival %lld: %g", k, (long long)i, r.idd);
    }
    ks_selector_destroy(s);
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- budgets */

static int64_t bad_slot;
static bool keeps_always(void) {
  return true;
}
static ks_status offer_bad_slot(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng,
                                ks_decision *out) {
  (void)state, (void)a, (void)b, (void)rng;
  *out = (ks_decision){.keep = keeps_always(), .slot = bad_slot};
  return KS_OK;
}
static int tamper_with;
static ks_status offer_tampering(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng,
                                 ks_decision *out) {
  (void)state, (void)rng;
  ks_buffer *mine = (ks_buffer *)(uintptr_t)b;
  if (a->arrival > 1 && tamper_with == 0) mine->used_bytes -= 10;
  if (a->arrival > 1 && tamper_with == 1) mine->n_used--;
  if (a->arrival > 1 && tamper_with == 2) mine->bins[0].bytes = mine->bin_bytes + 1;
  if (a->arrival > 1 && tamper_with == 3) mine->bins[0].used = false;
  *out = (ks_decision){.keep = a->arrival < 2, .slot = KS_SLOT_FREE};
  return KS_OK;
}
static ks_status offer_failing(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng,
                               ks_decision *out) {
  (void)state, (void)a, (void)b, (void)rng, (void)out;
  return KS_FAIL(KS_ENUMERIC, "a failure of its own");
}

Test(selector, bad_policies_cannot_overspend) {
  const ks_policy chooses = {.name = "chooses", .what = "", .offer = offer_bad_slot};
  const ks_policy tampers = {.name = "tampers", .what = "", .offer = offer_tampering};
  const ks_policy fails = {.name = "fails", .what = "", .offer = offer_failing};
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof(float), (void **)&staged));
  const float e = 1;
  ks_offer_result r;
  ks_selector *s = make_selector(ctx, &chooses, 2, 100, 1, 0);
  bad_slot = KS_SLOT_FREE;
  for (int64_t i = 0; i < 2; i++) {
    ks_arrival a = make_arrival(ctx, i, &e, 1, staged, 0, 0, 0);
    MUST(ks_selector_offer(s, &a, &r));
  }
  static const int64_t bad[] = {KS_SLOT_FREE, 2, -2, INT64_MAX, INT64_MIN};
  for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
    bad_slot = bad[k];
    ks_arrival a = make_arrival(ctx, 2, &e, 1, staged, 0, 0, 0);
    FAILS(KS_EBUDGET, ks_selector_offer(s, &a, &r));
    cr_expect(strstr(ks_error_message(), "chooses") != NULL);
    ks_selector_counts c = ks_selector_get_counts(s);
    cr_expect(c.offered == 2 && c.kept == 2 && c.dropped == 0 && ks_selector_buffer(s)->n_used == 2);
  }
  /* A set larger than a bin does not even reach the policy. */
  char long_text[200];
  memset(long_text, 'x', sizeof long_text);
  long_text[199] = 0;
  bad_slot = 0;
  ks_arrival a = make_arrival(ctx, 3, &e, 1, staged, 0, 0, 0);
  a.response = long_text;
  MUST(ks_selector_offer(s, &a, &r));
  cr_expect(r.outcome == KS_OVERSIZE && r.slot == -1 && r.victim_set_id == -1);
  ks_selector_counts c = ks_selector_get_counts(s);
  cr_expect(c.offered == 3 && c.dropped == 1 && c.oversize == 1);
  ks_selector_destroy(s);
  for (tamper_with = 0; tamper_with < 4; tamper_with++) {
    s = make_selector(ctx, &tampers, 4, 100, 1, 0);
    for (int64_t i = 0; i < 3; i++) {
      a = make_arrival(ctx, i, &e, 1, staged, 0, 0, 0);
      if (i < 2)
        MUST(ks_selector_offer(s, &a, &r));
      else
        FAILS(KS_EBUDGET, ks_selector_offer(s, &a, &r));
    }
    cr_expect(strstr(ks_error_message(), "wrote into the buffer") != NULL);
    ks_selector_destroy(s);
  }
  s = make_selector(ctx, &fails, 2, 100, 1, 0);
  a = make_arrival(ctx, 0, &e, 1, staged, 0, 0, 0);
  FAILS(KS_ENUMERIC, ks_selector_offer(s, &a, &r));
  cr_expect(ks_selector_get_counts(s).offered == 0);
  ks_selector_destroy(s);
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

Test(selector, arguments) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof(float), (void **)&staged));
  ks_selector *s;
  ks_selector_params params = {.policy = ks_policy_find("fifo"), .n_bins = 2, .bin_bytes = 9, .n_dim = 1};
  FAILS(KS_ECONFIG, ks_selector_create(ctx, &params, &s)); /* 2 + 4 + 4 bytes at least */
  params.bin_bytes = 10;
  MUST(ks_selector_create(ctx, &params, &s));
  ks_selector_destroy(s);
  params.n_bins = 0;
  FAILS(KS_EINVAL, ks_selector_create(ctx, &params, &s));
  params.n_bins = 2;
  params.policy = NULL;
  FAILS(KS_EINVAL, ks_selector_create(ctx, &params, &s));
  s = make_selector(ctx, ks_policy_find("fifo"), 2, 100, 1, 0);
  const float e = 1;
  ks_offer_result r;
  ks_arrival good = make_arrival(ctx, 0, &e, 1, staged, 0, 0, 0), bad[6];
  for (int i = 0; i < 6; i++)
    bad[i] = good;
  bad[0].embedding = NULL;
  bad[1].question = NULL;
  bad[2].response = NULL;
  bad[3].domain = -2;
  bad[4].arrival = -1;
  bad[5].arrival = (int64_t)1 << 56;
  for (int i = 0; i < 6; i++)
    FAILS(KS_EINVAL, ks_selector_offer(s, &bad[i], &r));
  cr_expect(ks_selector_get_counts(s).offered == 0);
  ks_selector_destroy(s);
  ks_selector_destroy(NULL);
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- conservation, snapshots */

/* Recounted from the texts themselves. */
static void check_books(const ks_selector *s, const ks_buffer *b, const char *policy, int64_t i) {
  ks_selector_counts c = ks_selector_get_counts(s);
  cr_assert(c.offered == i + 1 && c.offered == c.kept + c.dropped, "%s, arrival %lld", policy, (long long)i);
  cr_assert(c.oversize <= c.dropped && c.kept - c.replaced == b->n_used);
  size_t bytes = 0;
  for (int64_t k = 0; k < b->n_bins; k++)
    if (b->bins[k].used) bytes += ks_buffer_set_bytes(b->n_dim, b->bins[k].question, b->bins[k].response);
  cr_assert(bytes == b->used_bytes && b->peak_bytes >= bytes);
  cr_assert(b->unlimited || (bytes <= (size_t)b->n_bins * b->bin_bytes && b->n_used <= STREAM_BINS));
}

Test(selector, conservation_over_random_streams) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, STREAM_DIM * sizeof(float), (void **)&staged));
  char texts[2][128];
  for (int64_t p = 0; ks_policies[p]; p++) {
    for (uint64_t seed = 0; seed < 6; seed++) {
      ks_selector *s = make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, seed);
      int64_t n_oversize = 0;
      for (int64_t i = 0; i < 250; i++) {
        ks_arrival a = stream_arrival(ctx, seed, i, staged, texts);
        ks_offer_result r;
        MUST(ks_selector_offer(s, &a, &r));
        check_books(s, ks_selector_buffer(s), ks_policies[p]->name, i);
        bool kept = r.outcome == KS_KEPT || r.outcome == KS_REPLACED, replaced = r.outcome == KS_REPLACED;
        cr_assert(kept == (r.slot >= 0) && replaced == (r.victim_set_id >= 0));
        bool large = ks_buffer_set_bytes(STREAM_DIM, a.question, a.response) > STREAM_BIN_BYTES;
        bool oversize = r.outcome == KS_OVERSIZE;
        cr_assert(oversize == (large && !ks_policies[p]->unlimited));
        n_oversize += r.outcome == KS_OVERSIZE;
      }
      cr_assert(ks_policies[p]->unlimited ? n_oversize == 0 : n_oversize > 3);
      ks_selector_destroy(s);
    }
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

static ks_text snapshot_of(const ks_selector *s) {
  ks_text t = {0};
  MUST(ks_selector_snapshot(s, &t));
  return t;
}

static bool equal_texts(const ks_text *a, const ks_text *b) {
  return a->len == b->len && memcmp(a->data, b->data, a->len) == 0;
}

/* A selector restored at arrival 90 and the one that went on decide the same for 160 more, and end with the
 * same bytes. */
Test(selector, restore_gives_the_same_future) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, STREAM_DIM * sizeof(float), (void **)&staged));
  char texts[2][128];
  for (int64_t p = 0; ks_policies[p]; p++) {
    for (uint64_t seed = 0; seed < 4; seed++) {
      ks_selector *a = make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, seed),
                  *b = NULL;
      for (int64_t i = 0; i < 250; i++) {
        if (i == 90) {
          b = make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, seed);
          bool cut;
          if (ks_selector_buffer(a)->n_used) {
            MUST(ks_buffer_set_response(ks_selector_buffer(a), 0, "answered", &cut));
            ks_selector_buffer(a)->bins[0].annotated = ks_selector_buffer(a)->bins[0].asked = true;
          }
          ks_text t = snapshot_of(a);
          MUST(ks_selector_restore(b, t.data, t.len));
          ks_text again = snapshot_of(b);
          cr_assert(equal_texts(&t, &again), "%s: snapshot of the restored differs", ks_policies[p]->name);
          ks_text_free(&t);
          ks_text_free(&again);
        }
        ks_arrival arrival = stream_arrival(ctx, seed, i, staged, texts);
        ks_offer_result ra, rb;
        MUST(ks_selector_offer(a, &arrival, &ra));
        if (!b) continue;
        MUST(ks_selector_offer(b, &arrival, &rb));
        cr_assert(ra.outcome == rb.outcome && ra.slot == rb.slot && ra.victim_set_id == rb.victim_set_id &&
                      memcmp(&ra.idd, &rb.idd, sizeof ra.idd) == 0,
                  "%s, arrival %lld", ks_policies[p]->name, (long long)i);
      }
      ks_text ta = snapshot_of(a), tb = snapshot_of(b);
      cr_assert(equal_texts(&ta, &tb));
      ks_text_free(&ta);
      ks_text_free(&tb);
      ks_selector_destroy(a);
      ks_selector_destroy(b);
    }
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* Every shorter snapshot, and snapshots with bytes changed at random: refused as data and nothing changed, or
 * taken and the selector goes on within its budget. */
Test(selector, hostile_snapshots) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, STREAM_DIM * sizeof(float), (void **)&staged));
  char texts[2][128];
  int64_t n_refused = 0, n_taken = 0;
  for (int64_t p = 0; ks_policies[p]; p++) {
    ks_selector *s = make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, 1);
    for (int64_t i = 0; i < 40; i++) {
      ks_arrival a = stream_arrival(ctx, 1, i, staged, texts);
      ks_offer_result r;
      MUST(ks_selector_offer(s, &a, &r));
    }
    ks_text good = snapshot_of(s);
    for (size_t n = 0; n < good.len; n += n < 300 ? 1 : 7) {
      unsigned char *exact = malloc(n ? n : 1); /* so that reading past the end is seen */
      memcpy(exact, good.data, n);
      FAILS(KS_EDATA, ks_selector_restore(s, exact, n));
      free(exact);
    }
    MUST(ks_text_add(&good, "x", 1));
    FAILS(KS_EDATA, ks_selector_restore(s, good.data, good.len));
    good.len--;
    for (uint64_t k = 0; k < 1500; k++) {
      ks_rng rng = ks_rng_make(9, KS_RNG_TEST, k);
      unsigned char *bytes = malloc(good.len);
      memcpy(bytes, good.data, good.len);
      for (uint64_t flips = 1 + ks_rng_below(&rng, 3); flips > 0; flips--) {
        uint64_t at = ks_rng_below(&rng, ks_rng_below(&rng, 2) ? good.len : 200);
        if (at < good.len) bytes[at] = ks_rng_below(&rng, 2) ? (unsigned char)ks_rng_below(&rng, 256) : 0xFF;
      }
      MUST(ks_selector_restore(s, good.data, good.len));
      ks_status status = ks_selector_restore(s, bytes, good.len);
      cr_assert(status == KS_OK || status == KS_EDATA, "%s: %s", ks_policies[p]->name, ks_error_message());
      if (status == KS_OK) {
        n_taken++;
        ks_text now = snapshot_of(s);
        bool same = now.len == good.len && memcmp(now.data, bytes, now.len) == 0;
        cr_assert(same, "%s: taken, but not as it was written", ks_policies[p]->name);
        ks_text_free(&now);
        for (int64_t i = 40; i < 50; i++) {
          ks_arrival a = stream_arrival(ctx, 1, i, staged, texts);
          ks_offer_result r;
          MUST(ks_selector_offer(s, &a, &r));
          cr_assert(ks_buffer_is_sound(ks_selector_buffer(s)));
        }
      } else {
        n_refused++;
        ks_text now = snapshot_of(s);
        cr_assert(equal_texts(&now, &good), "%s: a refused snapshot changed the selector",
                  ks_policies[p]->name);
        ks_text_free(&now);
      }
      free(bytes);
    }
    /* of another policy, number of bins, seed */
    const ks_policy *other = ks_policies[p + 1] ? ks_policies[p + 1] : ks_policies[0];
    ks_selector *others[] = {
        make_selector(ctx, other, STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, 1),
        make_selector(ctx, ks_policies[p], STREAM_BINS + 1, STREAM_BIN_BYTES, STREAM_DIM, 1),
        make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES + 1, STREAM_DIM, 1),
        make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM - 1, 1),
        make_selector(ctx, ks_policies[p], STREAM_BINS, STREAM_BIN_BYTES, STREAM_DIM, 2)};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
      FAILS(KS_EDATA, ks_selector_restore(others[i], good.data, good.len));
      ks_selector_destroy(others[i]);
    }
    ks_text_free(&good);
    ks_selector_destroy(s);
  }
  cr_assert(n_refused > 1000 && n_taken > 1000, "%lld refused, %lld taken", (long long)n_refused,
            (long long)n_taken);
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* A policy may draw as often as it likes: the draws of an arrival depend on seed and index alone. */
static uint64_t first_draw[20];
static int64_t n_extra;
static ks_status offer_drawing(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng,
                               ks_decision *out) {
  (void)state, (void)b;
  first_draw[a->arrival] = ks_rng_u64(rng);
  for (int64_t i = 0; i < n_extra; i++)
    ks_rng_u64(rng);
  *out = (ks_decision){.keep = false, .slot = KS_SLOT_FREE};
  return KS_OK;
}
Test(selector, draws_depend_on_the_arrival_alone) {
  const ks_policy draws = {.name = "draws", .what = "", .offer = offer_drawing};
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof(float), (void **)&staged));
  const float e = 1;
  uint64_t before[20];
  for (n_extra = 0; n_extra < 3; n_extra++) {
    ks_selector *s = make_selector(ctx, &draws, 2, 100, 1, 4);
    for (int64_t i = 0; i < 20; i++) {
      ks_arrival a = make_arrival(ctx, i, &e, 1, staged, 0, 0, 0);
      ks_offer_result r;
      MUST(ks_selector_offer(s, &a, &r));
    }
    if (n_extra > 0) cr_assert(memcmp(before, first_draw, sizeof before) == 0);
    memcpy(before, first_draw, sizeof before);
    ks_selector_destroy(s);
  }
  for (int i = 1; i < 20; i++)
    cr_assert(before[i] != before[i - 1]);
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}
