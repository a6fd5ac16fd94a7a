/* Orders of the stream: permutations, the same for a seed, bursts as long as their correlation says. */
#include "core/data/data.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/* Sets of the given topics (-1: none), all of them in the stream. */
static ks_dataset *make(const int *topics, int64_t n) {
  ks_dataset *d;
  cr_assert_eq(ks_dataset_create("test", &d), KS_OK);
  for (int64_t i = 0; i < n; i++) {
    char question[32], topic[32];
    snprintf(question, sizeof question, "q%d", (int)i);
    snprintf(topic, sizeof topic, "t%d", topics[i]);
    cr_assert_eq(ks_dataset_add(d, question, "r", "r", topics[i] < 0 ? NULL : topic, false), KS_OK);
  }
  cr_assert_eq(ks_dataset_split(d, &(ks_split_params){.seed = 1}), KS_OK);
  return d;
}

/* n sets whose topics have unequal shares. */
static ks_dataset *make_many(int64_t n, int n_topics) {
  int *topics = malloc((size_t)n * sizeof *topics);
  for (int64_t i = 0; i < n; i++)
    topics[i] = (int)((i * i + i / 3) % n_topics);
  ks_dataset *d = make(topics, n);
  free(topics);
  return d;
}

static int64_t *order_of(const ks_dataset *d, ks_order order, double correlation, uint64_t seed) {
  int64_t *out = NULL, n = 0;
  ks_stream_params p = {.order = order, .correlation = correlation, .seed = seed};
  cr_assert_eq(ks_stream_order(d, &p, &out, &n), KS_OK, "%s", ks_error_message());
  cr_assert_eq(n, d->n_stream);
  return out;
}

static void check_permutation(const ks_dataset *d, const int64_t *order) {
  bool *seen = calloc((size_t)d->n_sets, sizeof *seen);
  for (int64_t i = 0; i < d->n_stream; i++) {
    cr_assert(order[i] >= 0 && order[i] < d->n_sets);
    cr_assert_not(seen[order[i]]);
    seen[order[i]] = true;
  }
  for (int64_t i = 0; i < d->n_stream; i++)
    cr_assert(seen[d->stream[i]]);
  free(seen);
}

Test(stream, every_order_is_a_permutation_that_the_seed_fixes) {
  static const struct {
    ks_order order;
    double correlation;
  } cases[] = {{KS_ORDER_FILE, 0},     {KS_ORDER_SHUFFLED, 0},  {KS_ORDER_BURSTS, 0},
               {KS_ORDER_BURSTS, 0.5}, {KS_ORDER_BURSTS, 0.99}, {KS_ORDER_BURSTS, 1}};
  ks_dataset *d = make_many(500, 7);
  cr_assert_eq(ks_dataset_split(d, &(ks_split_params){.stream_size = 300, .eval_size = 100, .seed = 3}),
               KS_OK);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    int64_t *a = order_of(d, cases[i].order, cases[i].correlation, 5);
    int64_t *b = order_of(d, cases[i].order, cases[i].correlation, 5);
    int64_t *c = order_of(d, cases[i].order, cases[i].correlation, 6);
    check_permutation(d, a);
    check_permutation(d, c);
    size_t bytes = (size_t)d->n_stream * sizeof *a;
    cr_expect_arr_eq(a, b, bytes, "case %zu", i);
    cr_expect_eq(memcmp(a, c, bytes) == 0, cases[i].order == KS_ORDER_FILE, "case %zu", i);
    cr_expect_eq(memcmp(a, d->stream, bytes) == 0, cases[i].order == KS_ORDER_FILE, "case %zu", i);
    free(a);
    free(b);
    free(c);
  }
  ks_dataset_destroy(d);
}

/* Arrival i + 1 has the topic of arrival i with probability P = c + (1 - c) * share, share being that topic's
 * part of what is left, unless none of it is left. So sum(same - P) is a martingale whose variance is sum P
 * (1 - P), and c' = sum(same - share) / sum(1 - share) estimates c. Both are held to five standard
 * deviations. */
Test(stream, measured_correlation_is_the_parameter) {
  static const double correlations[] = {0, 0.1, 0.5, 0.8, 0.95, 1};
  enum { N = 20000, TOPICS = 13 };
  ks_dataset *d = make_many(N, TOPICS);
  for (size_t k = 0; k < sizeof correlations / sizeof correlations[0]; k++) {
    double c = correlations[k];
    int64_t *order = order_of(d, KS_ORDER_BURSTS, c, 11), left[TOPICS] = {0};
    for (int64_t i = 0; i < N; i++)
      left[d->sets[i].topic]++;
    double excess = 0, variance = 0, same_over_share = 0, room = 0;
    for (int64_t i = 0; i + 1 < N; i++) {
      int32_t topic = d->sets[order[i]].topic;
      left[topic]--;
      if (left[topic] == 0) continue;
      double share = (double)left[topic] / (double)(N - 1 - i), p = c + (1 - c) * share;
      double same = d->sets[order[i + 1]].topic == topic;
      excess += same - p;
      variance += p * (1 - p);
      same_over_share += same - share;
      room += 1 - share;
    }
    double measured = same_over_share / room, bound = 5 * sqrt(variance) / room;
    cr_log_info("correlation %g, measured %.4f", c, measured);
    cr_expect(fabs(excess) <= 5 * sqrt(variance), "correlation %g: excess %g, standard deviation %g", c,
              excess, sqrt(variance));
    cr_expect(fabs(measured - c) <= bound + 1e-12, "correlation %g, measured %g, bound %g", c, measured,
              bound);
    free(order);
  }
  ks_dataset_destroy(d);
}

Test(stream, full_correlation_goes_topic_after_topic) {
  ks_dataset *d = make_many(1000, 9);
  int64_t *order = order_of(d, KS_ORDER_BURSTS, 1, 3);
  int64_t changes = 0;
  for (int64_t i = 0; i + 1 < 1000; i++)
    changes += d->sets[order[i]].topic != d->sets[order[i + 1]].topic;
  cr_expect_eq(changes, d->n_topics - 1);
  free(order);
  ks_dataset_destroy(d);
}

/* Worked by hand: sets 0 and 1 of topic A, 2 of topic B, c = 1/2. The first is any of the three. After 0, A
 * goes on with 1/2 + 1/2 * 1/2 = 3/4; after 2, B is used up and either of A comes. */
Test(stream, bursts_worked_by_hand) {
  static const struct {
    int64_t order[3];
    double p;
  } cases[] = {{{0, 1, 2}, 1.0 / 4},  {{0, 2, 1}, 1.0 / 12}, {{1, 0, 2}, 1.0 / 4},
               {{1, 2, 0}, 1.0 / 12}, {{2, 0, 1}, 1.0 / 6},  {{2, 1, 0}, 1.0 / 6}};
  enum { SEEDS = 12000 };
  ks_dataset *d = make((const int[]){0, 0, 1}, 3);
  int counts[6] = {0};
  for (uint64_t seed = 0; seed < SEEDS; seed++) {
    int64_t *order = order_of(d, KS_ORDER_BURSTS, 0.5, seed);
    for (int k = 0; k < 6; k++)
      counts[k] += memcmp(order, cases[k].order, sizeof cases[k].order) == 0;
    free(order);
  }
  for (int k = 0; k < 6; k++) {
    double p = cases[k].p;
    cr_expect(fabs(counts[k] - SEEDS * p) <= 5 * sqrt(SEEDS * p * (1 - p)),
              "order %d came %d times, not about %g", k, counts[k], SEEDS * p);
  }
  ks_dataset_destroy(d);
}

Test(stream, sets_without_topic_are_one_topic) {
  ks_dataset *d = make((const int[]){-1, 0, -1, 0, -1, 1}, 6);
  int64_t *order = order_of(d, KS_ORDER_BURSTS, 1, 1);
  check_permutation(d, order);
  int changes = 0;
  for (int i = 0; i < 5; i++)
    changes += d->sets[order[i]].topic != d->sets[order[i + 1]].topic;
  cr_expect_eq(changes, 2);
  free(order);
  ks_dataset_destroy(d);
}

Test(stream, many_topics_are_quick) {
  ks_dataset *d = make_many(50000, 20011);
  int64_t *order = order_of(d, KS_ORDER_BURSTS, 0.7, 1);
  check_permutation(d, order);
  free(order);
  ks_dataset_destroy(d);
}

Test(stream, bad_parameters) {
  ks_dataset *plain = make((const int[]){-1, -1, -1}, 3), *topics = make((const int[]){0, 1, 1}, 3), *unsplit;
  cr_assert_eq(ks_dataset_create("unsplit", &unsplit), KS_OK);
  const struct {
    const ks_dataset *d;
    ks_stream_params params;
    ks_status status;
    const char *says;
  } cases[] = {
      {plain,
       {.order = KS_ORDER_BURSTS, .correlation = 0.5},
       KS_ECONFIG,
       "stream: bursts need topics and 'test' has none; name the field that holds them, or use the order "
       "shuffled or "
       "file"},
      {topics,
       {.order = KS_ORDER_BURSTS, .correlation = -0.1},
       KS_ECONFIG,
       "stream: the correlation is -0.1; give a probability from 0 to 1"},
      {topics,
       {.order = KS_ORDER_BURSTS, .correlation = 1.5},
       KS_ECONFIG,
       "stream: the correlation is 1.5; give a probability from 0 to 1"},
      {topics,
       {.order = KS_ORDER_BURSTS, .correlation = NAN},
       KS_ECONFIG,
       "stream: the correlation is nan; give a probability from 0 to 1"},
      {topics, {.order = (ks_order)9}, KS_EINVAL, "stream: no order has number 9"},
      {unsplit, {.order = KS_ORDER_FILE}, KS_EINVAL, "stream: the dataset has no stream; split it first"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    int64_t *order = NULL, n;
    cr_expect_eq(ks_stream_order(cases[i].d, &cases[i].params, &order, &n), cases[i].status, "case %zu", i);
    cr_expect_str_eq(ks_error_message(), cases[i].says, "case %zu: %s", i, ks_error_message());
    cr_expect_null(order);
  }
  ks_dataset_destroy(plain);
  ks_dataset_destroy(topics);
  ks_dataset_destroy(unsplit);
}
