/* Each policy on a stream short enough to follow by hand, and what each promises over many arrivals. */
#include "core/score/score.h"
#include "select_support.h"

enum { D = KS_DROPPED, K = KS_KEPT, R = KS_REPLACED };

typedef struct {
  float e[2];
  double eoe, dss;
  int outcome;
  int64_t slot, victim; /* victim: index of the arrival that gives way; -1: none */
} step;

static void follow(const char *policy, int64_t n_bins, const step *steps, size_t n) {
  ks_ctx *ctx = make_ctx();
  ks_selector *s = make_selector(ctx, ks_policy_find(policy), n_bins, 100, 2, 5);
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof steps->e, (void **)&staged));
  for (size_t i = 0; i < n; i++) {
    ks_arrival a = make_arrival(ctx, (int64_t)i, steps[i].e, 2, staged, steps[i].eoe, steps[i].dss, 0);
    ks_offer_result r;
    MUST(ks_selector_offer(s, &a, &r));
    int64_t victim = r.victim_set_id < 0 ? -1 : r.victim_set_id - 100;
    cr_expect(r.outcome == (ks_outcome)steps[i].outcome && r.slot == steps[i].slot &&
                  victim == steps[i].victim,
              "%s, arrival %zu: outcome %d, bin %lld, victim %lld; want %d, %lld, %lld", policy, i,
              (int)r.outcome, (long long)r.slot, (long long)victim, steps[i].outcome,
              (long long)steps[i].slot, (long long)steps[i].victim);
  }
  ks_mem_free(ctx, staged);
  ks_selector_destroy(s);
  ks_ctx_destroy(ctx);
}
#define FOLLOW(policy, n_bins, steps) follow(policy, n_bins, steps, sizeof steps / sizeof *steps)

/* IDD is the mean of 1 - cosine to what is kept; 1 when nothing is. */
Test(policies, sdss_by_hand) {
  static const step steps[] = {
      {{1, 0}, .5, .20, K, 0, -1},  /* free bin;  idd 1 (nothing kept) */
      {{0, 1}, .4, .10, K, 1, -1},  /* free bin;  idd 1 - 0 = 1 */
      {{-1, 0}, .45, .3, R, 1, 1},  /* idd (2 + 1) / 2 = 1.5: above bin 1 on all three; bin 0 has the higher
                                       eoe */
      {{1, 0}, .9, .90, D, -1, -1}, /* idd (0 + 2) / 2 = 1: a tie with bin 0, below bin 1 */
      {{0, 1}, .5, .90, D, -1, -1}, /* idd 1: ties on eoe and idd with bin 0; idd below bin 1 */
      {{0, 1}, NAN, .9, D, -1, -1}, /* NaN */
      {{-1, 0}, .9, .9, D, -1, -1}, /* idd (2 + 0) / 2 = 1: tie with bin 0 */
  };
  FOLLOW("sdss", 2, steps);
}

/* Strictly below on all three: one bin holds (0.5, 0.5, idd 1). */
Test(policies, sdss_needs_all_three) {
  static const struct {
    double eoe, dss;
    float e[2];
    int outcome;
  } cases[] = {{.6, .6, {-1, 0}, R}, {.5, .6, {-1, 0}, D}, {.4, .6, {-1, 0}, D}, {.6, .5, {-1, 0}, D},
               {.6, .4, {-1, 0}, D}, {.6, .6, {0, 1}, D},  {.6, .6, {1, 0}, D}}; /* idd 2; ...; 1; 0 */
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    bool in = cases[i].outcome == R;
    const step steps[] = {
        {{1, 0}, .5, .5, K, 0, -1},
        {{cases[i].e[0], cases[i].e[1]}, cases[i].eoe, cases[i].dss, cases[i].outcome, in - 1, in - 1}};
    FOLLOW("sdss", 1, steps);
  }
}

/* While a bin is free, scores do not matter; only NaN is kept out. */
Test(policies, sdss_free_bins) {
  static const step rows[] = {{{1, 0}, 0, 0, K, 0, -1},    {{0, 1}, NAN, 0, D, -1, -1},
                              {{1, 0}, 0, NAN, D, -1, -1}, {{INFINITY, 1}, 1, 1, D, -1, -1}, /* idd NaN */
                              {{NAN, 1}, 1, 1, D, -1, -1}, {{1, 0}, 0, 0, K, 1, -1}};
  FOLLOW("sdss", 2, rows);
}

Test(policies, fifo_by_hand) {
  static const step steps[] = {{{1, 0}, 0, 0, K, 0, -1},  {{1, 0}, NAN, 0, K, 1, -1},
                               {{NAN, 0}, 0, 0, R, 0, 0}, {{1, 0}, 0, 0, R, 1, 1},
                               {{1, 0}, 0, 0, R, 0, 2},   {{1, 0}, 0, 0, R, 1, 3}};
  FOLLOW("fifo", 2, steps);
}

Test(policies, none_and_all_by_hand) {
  static const step none[] = {
      {{1, 0}, 1, 1, D, -1, -1}, {{0, 1}, NAN, 1, D, -1, -1}, {{0, 0}, 1, 1, D, -1, -1}};
  FOLLOW("none", 2, none);
  static const step all[] = {{{1, 0}, 0, 0, K, 0, -1},
                             {{NAN, 0}, NAN, 0, K, 1, -1},
                             {{1, 0}, 0, 0, K, 2, -1},
                             {{0, 0}, 0, 0, K, 3, -1}};
  FOLLOW("all", 2, all);
}

/* Directions (1,0), (4,3), (0,1), ...: cosines 0.8, 0.6, 0, -1; distance 1 - cosine. */
Test(policies, k_center_by_hand) {
  static const step steps[] = {
      {{1, 0}, 0, 0, K, 0, -1},
      {{2, 0}, 0, 0, D, -1, -1}, /* the same direction: distance 0 */
      {{4, 3}, 0, 0, K, 1, -1},  /* 0.2 > r = 0 */
      {{NAN, 1}, 0, 0, D, -1, -1},
      {{-1, 0}, 0, 0, R, 1, 2}, /* 2 and 1.8; full: r = 2 * 0.2; (4,3) is merged into (1,0) and gives its bin
                                 */
      {{4, -3}, 0, 0, D, -1, -1}, /* 0.2 <= 0.4 */
      {{0, 1}, 0, 0, D, -1, -1},  /* 1 and 1; r = 0.8 merges nothing (centres 2 apart), r = 1.6 >= 1 */
      {{0, -3}, 0, 0, D, -1, -1}, /* 1 <= 1.6 */
      {{0, 0}, 0, 0, D, -1, -1},  /* a zero vector lies at distance 1 */
  };
  FOLLOW("k_center", 2, steps);
}

/* A merged centre stays until its bin is needed, and no longer counts as a centre. */
Test(policies, k_center_spares) {
  static const step steps[] = {
      {{1, 0}, 0, 0, K, 0, -1},   {{24, 7}, 0, 0, K, 1, -1}, /* cosine 0.96: 0.04 */
      {{24, -7}, 0, 0, K, 2, -1},                            /* 0.04 and 1 - 0.8432 */
      {{0, 1}, 0, 0, R, 1, 1},   /* 1, 0.72, 1.28; r = 0.08: both are merged into (1,0); the lower bin goes */
      {{15, 8}, 0, 0, R, 2, 2},  /* 1 - 15/17 = 0.118 > 0.08, 0.53: takes the other spare */
      {{7, -24}, 0, 0, R, 2, 4}, /* 0.72, 1.96, 1.2; r = 0.16 merges (15,8) into (1,0) */
      {{7, 24}, 0, 0, D, -1, -1}, /* 0.04 from (0,1) */
  };
  FOLLOW("k_center", 3, steps);
}

/* Two zero vectors are at distance 1 from each other; one bin only. */
Test(policies, k_center_zero_vectors_and_one_bin) {
  /* third: all three are 1 apart, r = 2: bin 1 is merged into bin 0, and the arrival lies within 2 of bin 0
   */
  static const step zeros[] = {{{0, 0}, 0, 0, K, 0, -1}, {{0, 0}, 0, 0, K, 1, -1}, {{1, 0}, 0, 0, D, -1, -1}};
  FOLLOW("k_center", 2, zeros);
  static const step one[] = {{{1, 0}, 0, 0, K, 0, -1}, {{-1, 0}, 0, 0, D, -1, -1}, {{0, 1}, 0, 0, D, -1, -1}};
  FOLLOW("k_center", 1, one);
}

/* The first B come in; arrival n + 1 = 3 with 2 bins takes bin j = below(3) of its own stream when j < 2. */
Test(policies, random_and_reservoir_by_hand) {
  step random_steps[6] = {{{1, 0}, 0, 0, K, 0, -1}, {{1, 0}, 0, 0, K, 1, -1}}, reservoir_steps[6];
  memcpy(reservoir_steps, random_steps, sizeof random_steps);
  int64_t kept[2][2] = {{0, 1}, {0, 1}};
  for (int64_t i = 2; i < 6; i++) {
    ks_rng r = ks_rng_make(5, KS_RNG_POLICY, (uint64_t)i), again = r;
    int64_t slot = (int64_t)ks_rng_below(&r, 2), j = (int64_t)ks_rng_below(&again, (uint64_t)i + 1);
    random_steps[i] = (step){{1, 0}, NAN, 0, R, slot, kept[0][slot]};
    kept[0][slot] = i;
    reservoir_steps[i] = j < 2 ? (step){{1, 0}, NAN, 0, R, j, kept[1][j]} : (step){{1, 0}, NAN, 0, D, -1, -1};
    if (j < 2) kept[1][j] = i;
  }
  FOLLOW("random", 2, random_steps);
  FOLLOW("reservoir", 2, reservoir_steps);
}

/* ---------------------------------------------------------------- many arrivals */

/* p-value of equal frequencies. */
static double uniformity(const int64_t *counts, int64_t n) {
  double total = 0, x = 0;
  for (int64_t i = 0; i < n; i++)
    total += (double)counts[i];
  double expected = total / (double)n;
  for (int64_t i = 0; i < n; i++)
    x += ((double)counts[i] - expected) * ((double)counts[i] - expected) / expected;
  return ks_chi_square_tail(x, (double)(n - 1));
}

enum { POSITIONS = 20, BINS = 5, REPETITIONS = 4000 };

/* Offers POSITIONS arrivals under each of REPETITIONS seeds; counts by position what is kept at the end, what
 * enters at all, and which bin gives way. */
static void tally(const char *policy, int64_t *kept, int64_t *entered, int64_t *victims) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, sizeof(float), (void **)&staged));
  const float e = 1;
  for (uint64_t seed = 0; seed < REPETITIONS; seed++) {
    const ks_selector_params params = {.policy = ks_policy_find(policy),
                                       .n_bins = BINS,
                                       .bin_bytes = 100,
                                       .n_dim = 1,
                                       .seed = seed,
                                       .idd_only_if_used = true};
    ks_selector *s;
    MUST(ks_selector_create(ctx, &params, &s));
    for (int64_t i = 0; i < POSITIONS; i++) {
      ks_arrival a = make_arrival(ctx, i, &e, 1, staged, 0, 0, 0);
      ks_offer_result r;
      MUST(ks_selector_offer(s, &a, &r));
      cr_assert(isnan(r.idd));
      entered[i] += r.outcome != KS_DROPPED;
      if (r.outcome == KS_REPLACED) victims[r.slot]++;
    }
    const ks_buffer *b = ks_selector_buffer(s);
    for (int64_t i = 0; i < BINS; i++)
      kept[b->bins[i].arrival]++;
    ks_selector_destroy(s);
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* Vitter: every position is as likely as any other to be kept, and arrival n + 1 enters with probability
 * exactly B / (n + 1). The seeds are fixed; a sampler that draws below n instead of n + 1 fails both. */
Test(policies, reservoir_is_uniform) {
  int64_t kept[POSITIONS] = {0}, entered[POSITIONS] = {0}, victims[BINS] = {0};
  tally("reservoir", kept, entered, victims);
  double p = uniformity(kept, POSITIONS), x = 0;
  cr_expect(p > 0.01, "inclusion by position: p = %g", p);
  p = uniformity(victims, BINS);
  cr_expect(p > 0.01, "victims: p = %g", p);
  for (int64_t i = 0; i < BINS; i++)
    cr_expect(eq(i64, entered[i], REPETITIONS));
  for (int64_t i = BINS; i < POSITIONS; i++) {
    double q = (double)BINS / (double)(i + 1), mean = REPETITIONS * q, off = (double)entered[i] - mean;
    x += off * off / (mean * (1 - q));
  }
  p = ks_chi_square_tail(x, POSITIONS - BINS);
  cr_expect(p > 0.01, "acceptance B / (n + 1): p = %g", p);
}

/* Always in; a set survives k later arrivals with probability (1 - 1/B)^k. */
Test(policies, random_always_inserts_and_forgets_evenly) {
  int64_t kept[POSITIONS] = {0}, entered[POSITIONS] = {0}, victims[BINS] = {0};
  tally("random", kept, entered, victims);
  double x = 0;
  for (int64_t i = 0; i < POSITIONS; i++) {
    cr_expect(eq(i64, entered[i], REPETITIONS));
    int64_t later = i < BINS ? POSITIONS - BINS : POSITIONS - 1 - i;
    double q = pow(1 - 1.0 / BINS, (double)later), mean = REPETITIONS * q;
    if (later == 0) {
      cr_expect(eq(i64, kept[i], REPETITIONS));
      continue;
    }
    x += ((double)kept[i] - mean) * ((double)kept[i] - mean) / mean / (1 - q);
  }
  double p = ks_chi_square_tail(x, POSITIONS - 1);
  cr_expect(p > 0.01, "survival: p = %g", p);
  p = uniformity(victims, BINS);
  cr_expect(p > 0.01, "victims: p = %g", p);
}

/* Of the candidates, and of no other bin, one uniformly. Bins 1 and 3 of 5 have a high eoe. */
Test(policies, sdss_draws_evenly_among_candidates) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, 2 * sizeof(float), (void **)&staged));
  int64_t victims[5] = {0};
  for (uint64_t seed = 0; seed < 3000; seed++) {
    ks_selector *s = make_selector(ctx, ks_policy_find("sdss"), 5, 100, 2, seed);
    for (int64_t i = 0; i < 6; i++) {
      const float e[2] = {i < 5 ? 1.0f : -1.0f, 0};
      ks_arrival a = make_arrival(ctx, i, e, 2, staged, i == 1 || i == 3 ? 9 : i == 5 ? 5 : 1, i == 5, 0);
      ks_offer_result r;
      MUST(ks_selector_offer(s, &a, &r));
      if (i == 5) {
        cr_assert(r.outcome == KS_REPLACED && r.idd == 2);
        victims[r.slot]++;
      }
    }
    ks_selector_destroy(s);
  }
  cr_assert(victims[1] == 0 && victims[3] == 0);
  const int64_t candidates[] = {victims[0], victims[2], victims[4]};
  double p = uniformity(candidates, 3);
  cr_expect(p > 0.01, "p = %g", p);
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* After the buffer is cleared, reservoir and k_center begin anew. */
Test(policies, clear_starts_anew) {
  ks_ctx *ctx = make_ctx();
  float *staged;
  MUST(ks_mem_alloc(ctx, STREAM_DIM * sizeof(float), (void **)&staged));
  char texts[2][128];
  for (int64_t p = 0; ks_policies[p]; p++) {
    ks_selector *used = make_selector(ctx, ks_policies[p], 4, STREAM_BIN_BYTES, STREAM_DIM, 1);
    ks_selector *fresh = make_selector(ctx, ks_policies[p], 4, STREAM_BIN_BYTES, STREAM_DIM, 1);
    ks_offer_result a, b;
    for (int64_t i = 0; i < 60; i++) {
      ks_arrival arrival = stream_arrival(ctx, 1, i, staged, texts);
      MUST(ks_selector_offer(used, &arrival, &a));
    }
    ks_selector_clear(used);
    cr_assert(ks_selector_buffer(used)->n_used == 0);
    for (int64_t i = 60; i < 120; i++) {
      ks_arrival arrival = stream_arrival(ctx, 1, i, staged, texts);
      MUST(ks_selector_offer(used, &arrival, &a));
      MUST(ks_selector_offer(fresh, &arrival, &b));
      cr_assert(a.outcome == b.outcome && a.slot == b.slot && a.victim_set_id == b.victim_set_id,
                "%s, arrival %lld", ks_policies[p]->name, (long long)i);
    }
    ks_selector_destroy(used);
    ks_selector_destroy(fresh);
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

/* What k_center promises: every arrival seen lies within 3.42 chords sqrt(2 r) of a centre, r at most doubled
 * from what the data forced; here in a form that needs no inside knowledge: the kept sets cover the stream
 * within 9.7 times the best chord that any choice of as many of its points reaches (greedy farthest-first,
 * itself within 2 of the best). */
Test(policies, k_center_covers_the_stream) {
  enum { N = 300, DIM = 3, K_BINS = 8 };
  ks_ctx *ctx = make_ctx();
  float *staged, e[N][DIM];
  MUST(ks_mem_alloc(ctx, sizeof e[0], (void **)&staged));
  for (uint64_t seed = 0; seed < 20; seed++) {
    ks_selector *s = make_selector(ctx, ks_policy_find("k_center"), K_BINS, 100, DIM, seed);
    for (int64_t i = 0; i < N; i++) {
      ks_rng r = ks_rng_make(seed, KS_RNG_TEST, (uint64_t)i);
      double norm = 0;
      for (int c = 0; c < DIM; c++) {
        e[i][c] = (float)(ks_rng_normal(&r) + (double)(c == (int)(i % DIM)) * 4);
        norm += (double)e[i][c] * (double)e[i][c];
      }
      for (int c = 0; c < DIM; c++)
        e[i][c] = (float)((double)e[i][c] / sqrt(norm));
      ks_arrival a = make_arrival(ctx, i, e[i], DIM, staged, 0, 0, 0);
      ks_offer_result result;
      MUST(ks_selector_offer(s, &a, &result));
    }
    double nearest[N], greedy[N], covered = 0, best = 0;
    int64_t centre = 0;
    for (int64_t i = 0; i < N; i++)
      nearest[i] = greedy[i] = INFINITY;
    for (int64_t k = 0; k < K_BINS; k++) {
      int64_t kept = ks_selector_buffer(s)->bins[k].arrival;
      for (int64_t i = 0; i < N; i++) {
        double to_kept = 0, to_centre = 0;
        for (int c = 0; c < DIM; c++) {
          to_kept += pow((double)e[i][c] - (double)e[kept][c], 2);
          to_centre += pow((double)e[i][c] - (double)e[centre][c], 2);
        }
        nearest[i] = fmin(nearest[i], sqrt(to_kept));
        greedy[i] = fmin(greedy[i], sqrt(to_centre));
      }
      for (int64_t i = 0; i < N; i++)
        if (greedy[i] > greedy[centre]) centre = i;
    }
    for (int64_t i = 0; i < N; i++) {
      covered = fmax(covered, nearest[i]);
      best = fmax(best, greedy[i]);
    }
    cr_expect(covered <= 9.7 * best, "seed %llu: covered within %g, greedy %g", (unsigned long long)seed,
              covered, best);
    ks_selector_destroy(s);
  }
  ks_mem_free(ctx, staged);
  ks_ctx_destroy(ctx);
}

Test(policies, table) {
  cr_assert(ks_policy_find("unknown") == NULL);
  int n = 0;
  for (; ks_policies[n]; n++) {
    const ks_policy *p = ks_policies[n];
    cr_expect(ks_policy_find(p->name) == p);
    cr_expect(p->offer && p->what && strlen(p->what) > 5);
    cr_expect(p->trains == (strcmp(p->name, "none") != 0));
    cr_expect(p->unlimited == (strcmp(p->name, "all") == 0));
    bool paired =
        (p->create != NULL) == (p->destroy != NULL) && (p->snapshot != NULL) == (p->restore != NULL);
    cr_expect(paired);
  }
  cr_assert(eq(int, n, 7));
}
