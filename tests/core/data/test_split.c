/* The held-out split: sizes as asked, the same for a seed, no copy on both sides, every set equally likely.
 */
#include "core/data/data.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/* n sets; set i has question and preferred of number i % n_unique. */
static ks_dataset *make(int64_t n, int64_t n_unique) {
  ks_dataset *d;
  cr_assert_eq(ks_dataset_create("test", &d), KS_OK);
  for (int64_t i = 0; i < n; i++) {
    char question[32], preferred[32], response[32];
    snprintf(question, sizeof question, "question %d", (int)(i % n_unique / 2));
    snprintf(preferred, sizeof preferred, "answer %d", (int)(i % n_unique));
    snprintf(response, sizeof response, "said %d", (int)i);
    cr_assert_eq(ks_dataset_add(d, question, response, preferred, NULL, false), KS_OK);
  }
  return d;
}

static ks_status split(ks_dataset *d, int64_t stream_size, int64_t eval_size, uint64_t seed) {
  return ks_dataset_split(
      d, &(ks_split_params){.stream_size = stream_size, .eval_size = eval_size, .seed = seed});
}

/* Ids within range, in source order, on one side only. */
static void check_sides(const ks_dataset *d) {
  int *side = calloc((size_t)d->n_sets, sizeof *side);
  for (int s = 0; s < 2; s++) {
    const int64_t *ids = s ? d->eval : d->stream;
    int64_t n = s ? d->n_eval : d->n_stream;
    for (int64_t i = 0; i < n; i++) {
      cr_assert(ids[i] >= 0 && ids[i] < d->n_sets);
      cr_assert(i == 0 || ids[i] > ids[i - 1]);
      cr_assert_eq(side[ids[i]]++, 0);
    }
  }
  free(side);
}

Test(split, sizes_as_asked) {
  static const struct {
    int64_t n, stream, eval, n_stream;
  } cases[] = {{100, 60, 20, 60}, {100, 0, 20, 80}, {100, 80, 20, 80}, {100, 1, 99, 1},
               {2, 1, 1, 1},      {100, 0, 0, 100}, {1, 0, 0, 1},      {1000, 999, 1, 999}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_dataset *d = make(cases[i].n, cases[i].n);
    cr_assert_eq(split(d, cases[i].stream, cases[i].eval, 7), KS_OK, "case %zu: %s", i, ks_error_message());
    cr_expect_eq(d->n_stream, cases[i].n_stream, "case %zu", i);
    cr_expect_eq(d->n_eval, cases[i].eval, "case %zu", i);
    check_sides(d);
    ks_dataset_destroy(d);
  }
}

Test(split, depends_on_the_seed_alone) {
  ks_dataset *a = make(500, 500), *b = make(500, 500);
  cr_assert_eq(split(a, 300, 100, 1), KS_OK);
  cr_assert_eq(split(b, 0, 7, 2), KS_OK); /* an earlier split leaves no trace */
  cr_assert_eq(split(b, 300, 100, 1), KS_OK);
  cr_expect_arr_eq(a->eval, b->eval, 100 * sizeof *a->eval);
  cr_expect_arr_eq(a->stream, b->stream, 300 * sizeof *a->stream);
  cr_assert_eq(split(b, 200, 100, 1), KS_OK); /* the stream's size does not change what is held out */
  cr_expect_arr_eq(a->eval, b->eval, 100 * sizeof *a->eval);
  cr_assert_eq(split(b, 300, 100, 2), KS_OK);
  cr_expect_neq(memcmp(a->eval, b->eval, 100 * sizeof *a->eval), 0);
  ks_dataset_destroy(a);
  ks_dataset_destroy(b);
}

Test(split, copies_never_lie_on_both_sides) {
  enum { N = 600, UNIQUE = 200 };
  for (uint64_t seed = 0; seed < 50; seed++) {
    ks_dataset *d = make(N, UNIQUE);
    cr_assert_eq(split(d, 0, 50, seed), KS_OK);
    check_sides(d);
    bool held[UNIQUE] = {false};
    for (int64_t i = 0; i < d->n_eval; i++) {
      cr_expect_not(held[d->eval[i] % UNIQUE], "a copy among the held-out sets");
      held[d->eval[i] % UNIQUE] = true;
    }
    for (int64_t i = 0; i < d->n_stream; i++)
      cr_expect_not(held[d->stream[i] % UNIQUE], "a copy of a held-out set in the stream");
    cr_expect_eq(d->n_stream,
                 (UNIQUE - 50) * 3); /* and nothing else was left out: same question, other answer stays */
    ks_dataset_destroy(d);
  }
}

Test(split, too_much_is_refused_with_the_numbers) {
  ks_dataset *d = make(30, 10);
  cr_assert_eq(split(d, 20, 2, 1), KS_OK);
  static const struct {
    int64_t stream, eval;
    const char *says;
  } cases[] = {
      {25, 2,
       "split: of 30 sets, 2 are held out and 4 are copies of those: 24 are left for the stream; eval_size 2 "
       "and "
       "stream_size 25 ask for more, use smaller ones"},
      {1, 11,
       "split: of 30 sets, 10 are held out and 20 are copies of those: 0 are left for the stream; eval_size "
       "11 and "
       "stream_size 1 ask for more, use smaller ones"},
      {0, 10,
       "split: of 30 sets, 10 are held out and 20 are copies of those: 0 are left for the stream; eval_size "
       "10 and "
       "stream_size 0 ask for more, use smaller ones"},
      {-1, 2, "split: stream_size -1, eval_size 2; neither may be negative"},
      {1, -2, "split: stream_size 1, eval_size -2; neither may be negative"},
      {INT64_MAX, 2,
       "split: of 30 sets, 2 are held out and 4 are copies of those: 24 are left for the stream; eval_size 2 "
       "and "
       "stream_size 9223372036854775807 ask for more, use smaller ones"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    cr_expect_eq(split(d, cases[i].stream, cases[i].eval, 1), KS_ECONFIG, "case %zu", i);
    cr_expect_str_eq(ks_error_message(), cases[i].says, "case %zu: %s", i, ks_error_message());
    cr_expect_eq(d->n_stream, 20, "the earlier split is gone");
    cr_expect_eq(d->n_eval, 2);
  }
  ks_dataset_destroy(d);
}

/* Over many seeds each set is held out as often as the others: within five standard deviations of a binomial.
 */
Test(split, every_set_is_equally_likely) {
  enum { N = 20, EVAL = 5, SEEDS = 4000 };
  ks_dataset *d = make(N, N);
  int counts[N] = {0};
  for (uint64_t seed = 0; seed < SEEDS; seed++) {
    cr_assert_eq(split(d, 1, EVAL, seed), KS_OK);
    for (int64_t i = 0; i < EVAL; i++)
      counts[d->eval[i]]++;
  }
  double p = (double)EVAL / N, sd = sqrt(SEEDS * p * (1 - p));
  for (int i = 0; i < N; i++)
    cr_expect(fabs(counts[i] - SEEDS * p) <= 5 * sd, "set %d was held out %d times of %d", i, counts[i],
              SEEDS);
  ks_dataset_destroy(d);
}
