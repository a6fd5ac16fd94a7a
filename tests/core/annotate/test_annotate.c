/* The simulated user: budgets, refusal, noise, and that its draws are its own. */
#include "../select/select_support.h"
#include "core/annotate/annotate.h"

enum { MAX_SETS = 40 };

static ks_set sets[MAX_SETS];
static char preferred[MAX_SETS][32];

/* Set i prefers "answer i". */
static ks_dataset make_data(int64_t n, int64_t *stream, int64_t n_stream) {
  for (int64_t i = 0; i < n; i++) {
    snprintf(preferred[i], sizeof preferred[i], "answer %d", (int)i);
    sets[i] = (ks_set){.question = "q", .response = "r", .preferred = preferred[i], .topic = -1};
  }
  return (ks_dataset){.sets = sets, .n_sets = n, .stream = stream, .n_stream = n_stream};
}

static ks_annotator *make_annotator(const ks_dataset *d, ks_ask ask, int64_t budget, double refusal,
                                    double noise, uint64_t seed) {
  const ks_annotator_params params = {
      .ask = ask, .budget = budget, .refusal = refusal, .noise = noise, .seed = seed};
  ks_annotator *a;
  MUST(ks_annotator_create(&params, d, &a));
  return a;
}

typedef struct {
  ks_ctx *ctx;
  ks_buffer *b;
  float *staged;
} bench;

static bench make_bench(int64_t n_bins, size_t bin_bytes) {
  bench t = {.ctx = make_ctx()};
  MUST(ks_buffer_create(t.ctx, n_bins, bin_bytes, 1, false, &t.b));
  MUST(ks_mem_alloc(t.ctx, sizeof(float), (void **)&t.staged));
  return t;
}
static void close_bench(bench *t) {
  ks_mem_free(t->ctx, t->staged);
  ks_buffer_destroy(t->b);
  ks_ctx_destroy(t->ctx);
}
/* Keeps a set in a bin, as the selector would. */
static void keep(bench *t, int64_t slot, int64_t arrival, int64_t set_id) {
  static const ks_scores scores = {0, 0, 0};
  MUST(ks_buffer_put(t->b, slot, arrival, set_id, 0, &scores, "q", "original", t->staged));
}
static bool says(const bench *t, int64_t slot, const char *response) {
  return strcmp(t->b->bins[slot].response, response) == 0;
}

Test(annotate, on_admission) {
  ks_dataset d = make_data(5, NULL, 0);
  bench t = make_bench(3, 100);
  ks_annotator *a = make_annotator(&d, KS_ASK_ADMISSION, -1, 0, 0, 1);
  keep(&t, 1, 0, 4);
  MUST(ks_annotator_admitted(a, t.b, 1));
  cr_assert(says(&t, 1, "answer 4") && t.b->bins[1].annotated && t.b->bins[1].asked);
  MUST(ks_annotator_admitted(a, t.b, 1)); /* once is enough */
  MUST(ks_annotator_trigger(a, t.b));
  ks_annotator_counts c = ks_annotator_get_counts(a);
  cr_assert(c.asked == 1 && c.answered == 1 && c.refused == 0 && c.over_budget == 0 && c.noisy == 0 &&
            c.cut == 0);
  FAILS(KS_EINVAL, ks_annotator_admitted(a, t.b, 0));
  FAILS(KS_EINVAL, ks_annotator_admitted(a, t.b, 3));
  FAILS(KS_EINVAL, ks_annotator_admitted(a, t.b, -1));
  keep(&t, 0, 1, 5); /* not in the dataset */
  FAILS(KS_EINVAL, ks_annotator_admitted(a, t.b, 0));
  cr_assert(ks_annotator_get_counts(a).asked == 1);
  ks_annotator_destroy(a);
  close_bench(&t);
}

Test(annotate, at_the_trigger_only_what_survived) {
  ks_dataset d = make_data(6, NULL, 0);
  bench t = make_bench(3, 100);
  ks_annotator *a = make_annotator(&d, KS_ASK_TRIGGER, 3, 0, 0, 1);
  for (int64_t i = 0; i < 4; i++) { /* set 3 replaces set 0 */
    keep(&t, i % 3, i, i);
    MUST(ks_annotator_admitted(a, t.b, i % 3));
  }
  cr_assert(ks_annotator_get_counts(a).asked == 0 && says(&t, 0, "original"));
  MUST(ks_annotator_trigger(a, t.b));
  cr_assert(says(&t, 0, "answer 3") && says(&t, 1, "answer 1") && says(&t, 2, "answer 2"));
  MUST(ks_annotator_trigger(a, t.b));
  ks_annotator_counts c = ks_annotator_get_counts(a);
  cr_assert(c.asked == 3 && c.over_budget == 0);
  keep(&t, 1, 4, 4); /* the budget is spent */
  MUST(ks_annotator_trigger(a, t.b));
  MUST(ks_annotator_trigger(a, t.b));
  c = ks_annotator_get_counts(a);
  cr_assert(c.asked == 3 && c.over_budget == 1 && says(&t, 1, "original"));
  cr_assert(t.b->bins[1].asked && t.b->bins[1].annotated == false);
  ks_annotator_destroy(a);
  close_bench(&t);
}

/* In bin order: with one question left, the lowest bin gets it. */
Test(annotate, budget_goes_in_bin_order) {
  ks_dataset d = make_data(3, NULL, 0);
  bench t = make_bench(3, 100);
  ks_annotator *a = make_annotator(&d, KS_ASK_TRIGGER, 1, 0, 0, 1);
  for (int64_t i = 0; i < 3; i++)
    keep(&t, 2 - i, i, i);
  MUST(ks_annotator_trigger(a, t.b));
  cr_assert(says(&t, 0, "answer 2") && says(&t, 1, "original") && says(&t, 2, "original"));
  ks_annotator_destroy(a);
  close_bench(&t);
}

/* budget, refusal, noise; then asked, answered, refused, over budget, noisy after 30 admissions. */
Test(annotate, extremes) {
  static const struct {
    int64_t n_sets, budget;
    double refusal, noise;
    ks_annotator_counts want;
  } cases[] = {
      {30, 0, 0, 0, {0, 0, 0, 30, 0, 0}},
      {30, 0, 1, 1, {0, 0, 0, 30, 0, 0}},
      {30, 7, 0, 0, {7, 7, 0, 23, 0, 0}},
      {30, 7, 1, 0, {7, 0, 7, 23, 0, 0}},
      {30, -1, 1, 0, {30, 0, 30, 0, 0, 0}},
      {30, 30, 0, 0, {30, 30, 0, 0, 0, 0}},
      {30, -1, 0, 1, {30, 30, 0, 0, 30, 0}},
      {1, -1, 0, 1, {30, 30, 0, 0, 0, 0}}, /* no other set to err with */
  };
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    ks_dataset d = make_data(cases[k].n_sets, NULL, 0);
    bench t = make_bench(4, 100);
    ks_annotator *a =
        make_annotator(&d, KS_ASK_ADMISSION, cases[k].budget, cases[k].refusal, cases[k].noise, 3);
    for (int64_t i = 0; i < 30; i++) {
      int64_t id = i % cases[k].n_sets;
      keep(&t, i % 4, i, id);
      MUST(ks_annotator_admitted(a, t.b, i % 4));
      const ks_kept *kept = &t.b->bins[i % 4];
      bool own = strcmp(kept->response, preferred[id]) == 0,
           untouched = strcmp(kept->response, "original") == 0;
      cr_assert(kept->annotated != untouched);
      if (cases[k].noise == 1 && cases[k].n_sets > 1) cr_assert(own == false);
      if (cases[k].noise == 0) cr_assert(own == kept->annotated);
    }
    ks_annotator_counts c = ks_annotator_get_counts(a), w = cases[k].want;
    cr_expect(c.asked == w.asked && c.answered == w.answered && c.refused == w.refused &&
                  c.over_budget == w.over_budget && c.noisy == w.noisy && c.cut == w.cut,
              "case %zu: %lld %lld %lld %lld %lld %lld", k, (long long)c.asked, (long long)c.answered,
              (long long)c.refused, (long long)c.over_budget, (long long)c.noisy, (long long)c.cut);
    ks_annotator_destroy(a);
    close_bench(&t);
  }
}

/* Wrong answers come from the other sets of the stream, evenly; never from a held-out set. */
Test(annotate, noise_never_shows_a_held_out_answer) {
  int64_t stream[] = {1, 3, 5, 7, 9};
  ks_dataset d = make_data(10, stream, 5);
  bench t = make_bench(1, 100);
  ks_annotator *a = make_annotator(&d, KS_ASK_ADMISSION, -1, 0, 1, 3);
  int64_t counts[10] = {0};
  for (int64_t i = 0; i < 2000; i++) {
    keep(&t, 0, i, 5);
    MUST(ks_annotator_admitted(a, t.b, 0));
    counts[atoi(t.b->bins[0].response + 7)]++;
  }
  for (int i = 0; i < 10; i++) {
    double want = i % 2 && i != 5 ? 500 : 0; /* binomial; 5 standard deviations */
    cr_expect(fabs((double)counts[i] - want) <= 5 * sqrt(want * 0.75), "set %d: %lld times", i,
              (long long)counts[i]);
  }
  ks_annotator_destroy(a);
  close_bench(&t);
}

/* Bin 22: question 1 + 6 + 4 of embedding leave 11 bytes. */
Test(annotate, answers_that_do_not_fit_are_cut) {
  ks_dataset d = make_data(1, NULL, 0);
  sets[0].preferred = "0123456789\xC3\xA9!";
  bench t = make_bench(1, 22);
  ks_annotator *a = make_annotator(&d, KS_ASK_ADMISSION, -1, 0, 0, 3);
  keep(&t, 0, 0, 0);
  MUST(ks_annotator_admitted(a, t.b, 0));
  cr_assert(says(&t, 0, "0123456789") && ks_annotator_get_counts(a).cut == 1 && ks_buffer_is_sound(t.b));
  ks_annotator_destroy(a);
  close_bench(&t);
}

/* What each arrival was told, under a policy. */
static void run(const char *policy, char told[][32], ks_annotator_counts *counts) {
  enum { N = 120 };
  ks_dataset d = make_data(MAX_SETS, NULL, 0);
  ks_ctx *ctx = make_ctx();
  ks_selector *s = make_selector(ctx, ks_policy_find(policy), 4, 100, 1, 8);
  ks_annotator *a = make_annotator(&d, KS_ASK_ADMISSION, -1, 0.3, 0.4, 8);
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof(float), (void **)&staged));
  for (int64_t i = 0; i < N; i++) {
    const float e = 1;
    ks_arrival arrival = make_arrival(ctx, i, &e, 1, staged, (double)(i % 7), (double)(i % 5), 0);
    arrival.set_id = i * 7 % MAX_SETS;
    ks_offer_result r;
    MUST(ks_selector_offer(s, &arrival, &r));
    told[i][0] = 0;
    if (r.slot < 0) continue;
    MUST(ks_annotator_admitted(a, ks_selector_buffer(s), r.slot));
    snprintf(told[i], 32, "%s", ks_selector_buffer(s)->bins[r.slot].response);
  }
  *counts = ks_annotator_get_counts(a);
  ks_mem_free(ctx, staged);
  ks_annotator_destroy(a);
  ks_selector_destroy(s);
  ks_ctx_destroy(ctx);
}

Test(annotate, another_policy_changes_no_draw) {
  static char first[120][32], second[120][32];
  ks_annotator_counts c;
  run("fifo", first, &c);
  cr_assert(c.refused > 20 && c.noisy > 10 && c.answered - c.noisy > 20 && c.asked == c.answered + c.refused);
  static const char *const policies[] = {"random", "reservoir", "all"};
  for (size_t p = 0; p < 3; p++) {
    run(policies[p], second, &c);
    int n_both = 0;
    for (int i = 0; i < 120; i++) {
      if (!first[i][0] || !second[i][0]) continue;
      n_both++;
      cr_expect(strcmp(first[i], second[i]) == 0, "%s, arrival %d: told \"%s\" and \"%s\"", policies[p], i,
                first[i], second[i]);
    }
    cr_assert(n_both > 8, "%s has %d arrivals in common with fifo", policies[p], n_both);
  }
}

Test(annotate, snapshots) {
  ks_dataset d = make_data(10, NULL, 0);
  bench t = make_bench(2, 100);
  ks_annotator *a = make_annotator(&d, KS_ASK_ADMISSION, 9, 0.3, 0.3, 3),
               *b = make_annotator(&d, KS_ASK_ADMISSION, 9, 0.3, 0.3, 3);
  for (int64_t i = 0; i < 6; i++) {
    keep(&t, 0, i, i);
    MUST(ks_annotator_admitted(a, t.b, 0));
  }
  ks_text bytes = {0}, again = {0};
  MUST(ks_annotator_snapshot(a, &bytes));
  MUST(ks_annotator_restore(b, bytes.data, bytes.len));
  for (int64_t i = 6; i < 20; i++) {
    keep(&t, 0, i, i % 10);
    keep(&t, 1, i, i % 10);
    MUST(ks_annotator_admitted(a, t.b, 0));
    MUST(ks_annotator_admitted(b, t.b, 1));
    cr_assert(says(&t, 0, t.b->bins[1].response));
  }
  ks_annotator_counts ca = ks_annotator_get_counts(a), cb = ks_annotator_get_counts(b);
  cr_assert(memcmp(&ca, &cb, sizeof ca) == 0 && ca.asked == 9 && ca.over_budget == 11);
  MUST(ks_annotator_snapshot(a, &again));
  for (size_t n = 0; n < bytes.len; n++)
    FAILS(KS_EDATA, ks_annotator_restore(a, bytes.data, n));
  int n_refused = 0;
  for (uint64_t k = 0; k < 4000; k++) {
    ks_rng r = ks_rng_make(1, KS_RNG_TEST, k);
    char damaged[128];
    cr_assert(bytes.len <= sizeof damaged);
    memcpy(damaged, bytes.data, bytes.len);
    damaged[ks_rng_below(&r, bytes.len)] = (char)ks_rng_below(&r, 256);
    MUST(ks_annotator_restore(a, again.data, again.len));
    ks_status s = ks_annotator_restore(a, damaged, bytes.len);
    cr_assert(s == KS_OK || s == KS_EDATA);
    n_refused += s != KS_OK;
    ks_annotator_counts c = ks_annotator_get_counts(a);
    cr_assert(c.asked == c.answered + c.refused && c.asked <= 9 && c.asked >= 0);
    if (s != KS_OK) cr_assert(memcmp(&c, &ca, sizeof c) == 0);
  }
  cr_assert(n_refused > 1000);
  ks_annotator *other = make_annotator(&d, KS_ASK_ADMISSION, 8, 0.3, 0.3, 3);
  FAILS(KS_EDATA, ks_annotator_restore(other, bytes.data, bytes.len));
  ks_annotator_destroy(other);
  ks_text_free(&bytes);
  ks_text_free(&again);
  ks_annotator_destroy(a);
  ks_annotator_destroy(b);
  close_bench(&t);
}

Test(annotate, parameters) {
  ks_dataset d = make_data(1, NULL, 0);
  const ks_annotator_params bad[] = {{.budget = -2}, {.refusal = -0.1}, {.refusal = 1.1},  {.refusal = NAN},
                                     {.noise = 2},   {.noise = NAN},    {.ask = (ks_ask)2}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    ks_annotator *a;
    FAILS(KS_EINVAL, ks_annotator_create(&bad[i], &d, &a));
    cr_assert(a == NULL);
  }
  ks_annotator_destroy(NULL);
}
