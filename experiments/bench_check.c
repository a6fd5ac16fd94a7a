/* Whether an operation computed what it should, before and after it is timed.
 *
 * Against the CPU. Let a be the largest |value| of an array of the CPU's result, L the longest sum, u =
 * 2^-24, u_out the roundoff of the array's type (bf16: 2^-8) and n results in between that are stored as
 * bf16. A sum of L terms of random sign whose value is about a has terms whose magnitudes add up to about
 * sqrt(L) a: this stands here for the exact sums that the tests have (STYLE: the tolerance rule). So each
 * element must be within u_out |ref| + (4 + sqrt(L)) u sqrt(L) a + n 2^-8 a and, which is what catches a
 * wrong part, the whole array within that relative error in the Euclidean norm: |got - ref| <= (u_out + (4 +
 * sqrt(L)) u sqrt(L) + n 2^-8) |ref|,     |ref| > 0. Both sides are float32: the CPU's own error counts once
 * more, so the terms in L are doubled. Whole numbers are equal but for `may_differ`.
 *
 * Against itself, after the timed loop: the same bits as before. */
#include "experiments/bench_op.h"

#include <math.h>
#include <stdio.h>

static const size_t type_sizes[] = {[KS_ARRAY_F32] = 4, [KS_ARRAY_BF16] = 2, [KS_ARRAY_I8] = 1,
                                    [KS_ARRAY_F64] = 8, [KS_ARRAY_I32] = 4,  [KS_ARRAY_I64] = 8};

static bool is_result(const ks_bench_array *a) {
  return a->role == KS_ARRAY_OUTPUT || a->role == KS_ARRAY_STATE || a->role == KS_ARRAY_ORDER;
}

ks_status ks_bench_op_results(const ks_bench_op *o, void *results[KS_BENCH_MOST_ARRAYS]) {
  for (int i = 0; i < KS_BENCH_MOST_ARRAYS; i++)
    results[i] = NULL;
  KS_TRY(ks_sync(o->ctx));
  for (int i = 0; i < o->n_arrays; i++) {
    const ks_bench_array *a = &o->arrays[i];
    const size_t bytes = (size_t)a->n * type_sizes[a->type];
    if (!is_result(a)) continue;
    KS_TRY(ks_alloc_array(&results[i], (size_t)a->n, type_sizes[a->type], "bench"));
    if (a->is_host)
      memcpy(results[i], a->p, bytes);
    else
      KS_TRY(ks_mem_download(o->ctx, results[i], a->p, bytes));
  }
  return KS_OK;
}

static void free_results(void *results[KS_BENCH_MOST_ARRAYS]) {
  for (int i = 0; i < KS_BENCH_MOST_ARRAYS; i++)
    free(results[i]);
}

static double value_at(const ks_bench_array *a, const void *values, int64_t i) {
  union {
    uint32_t u;
    float f;
  } wide;
  switch (a->type) {
  case KS_ARRAY_F32:
    return (double)((const float *)values)[i];
  case KS_ARRAY_BF16:
    wide.u = (uint32_t)((const uint16_t *)values)[i] << 16;
    return (double)wide.f;
  case KS_ARRAY_I8:
    return (double)((const int8_t *)values)[i];
  case KS_ARRAY_F64:
    return ((const double *)values)[i];
  case KS_ARRAY_I32:
    return (double)((const int32_t *)values)[i];
  case KS_ARRAY_I64:
    return (double)((const int64_t *)values)[i];
  }
  return NAN;
}

typedef struct {
  const ks_bench_op *o;
  const ks_bench_array *got_array, *ref_array;
  const void *got, *ref;
  int number;
} comparison;

static bool same_whole_numbers(const comparison *c, char *why, size_t size) {
  int64_t n_wrong = 0, first = -1;
  for (int64_t i = 0; i < c->ref_array->n; i++) {
    if (value_at(c->got_array, c->got, i) == value_at(c->ref_array, c->ref, i)) continue;
    if (n_wrong++ == 0) first = i;
  }
  if (n_wrong <= c->o->may_differ) return true;
  snprintf(why, size, "array %d: %lld of %lld differ from the CPU's, the first at %lld", c->number,
           (long long)n_wrong, (long long)c->ref_array->n, (long long)first);
  return false;
}

static bool near_numbers(const comparison *c, char *why, size_t size) {
  const double root = sqrt(c->o->chain), u_out = c->got_array->type == KS_ARRAY_BF16 ? 0x1p-8 : 0x1p-24,
               sums = 2 * (4 + root) * 0x1p-24 * root, between = c->o->bf16 ? c->o->n_roundings * 0x1p-8 : 0;
  double largest = 0, ref_square = 0, error_square = 0;
  for (int64_t i = 0; i < c->ref_array->n; i++) {
    const double ref = value_at(c->ref_array, c->ref, i);
    if (!isfinite(ref)) continue;
    largest = fmax(largest, fabs(ref));
    ref_square += ref * ref;
  }
  for (int64_t i = 0; i < c->ref_array->n; i++) {
    const double ref = value_at(c->ref_array, c->ref, i), got = value_at(c->got_array, c->got, i);
    if (!isfinite(ref)) {
      if ((isnan(ref) && isnan(got)) || ref == got) continue;
    } else if (fabs(got - ref) <= u_out * fabs(ref) + (sums + between) * largest) {
      error_square += (got - ref) * (got - ref);
      continue;
    }
    snprintf(why, size, "array %d: [%lld] is %.7g, the CPU says %.7g", c->number, (long long)i, got, ref);
    return false;
  }
  if (ref_square > 0 && sqrt(error_square) <= (u_out + sums + between) * sqrt(ref_square)) return true;
  snprintf(why, size, "array %d: relative error %.3g in the norm, wants at most %.3g", c->number,
           sqrt(error_square / ref_square), u_out + sums + between);
  return false;
}

static bool is_whole(const ks_bench_array *a) {
  return a->type == KS_ARRAY_I8 || a->type == KS_ARRAY_I32 || a->type == KS_ARRAY_I64;
}

ks_status ks_bench_op_compare(const ks_bench_op *o, const ks_bench_op *ref, bool *same, char *why,
                              size_t size) {
  void *got[KS_BENCH_MOST_ARRAYS], *wanted[KS_BENCH_MOST_ARRAYS] = {0};
  *same = true;
  KS_ASSERT_EQ(o->n_arrays, ref->n_arrays);
  ks_status status = ks_bench_op_results(o, got);
  if (status == KS_OK) status = ks_bench_op_results(ref, wanted);
  for (int i = 0; i < o->n_arrays && status == KS_OK && *same; i++) {
    const comparison c = {o, &o->arrays[i], &ref->arrays[i], got[i], wanted[i], i};
    if (!got[i] || o->arrays[i].role == KS_ARRAY_ORDER) continue;
    KS_ASSERT(o->arrays[i].n >= ref->arrays[i].n);
    *same = is_whole(&o->arrays[i]) ? same_whole_numbers(&c, why, size) : near_numbers(&c, why, size);
  }
  free_results(got);
  free_results(wanted);
  return status;
}

bool ks_bench_op_is_filled(const ks_bench_op *o, void *const results[KS_BENCH_MOST_ARRAYS], char *why,
                           size_t size) {
  for (int i = 0; i < o->n_arrays; i++) {
    const ks_bench_array *a = &o->arrays[i];
    int64_t n_left = 0;
    if (!results[i] || is_whole(a)) continue;
#pragma omp parallel for schedule(static) reduction(+ : n_left)
    for (int64_t j = 0; j < a->n; j++)
      n_left += isnan(value_at(a, results[i], j));
    if (n_left == 0) continue;
    snprintf(why, size, "array %d: %lld of %lld elements are not numbers", i, (long long)n_left,
             (long long)a->n);
    return false;
  }
  return true;
}

ks_status ks_bench_op_unchanged(const ks_bench_op *o, void *const before[KS_BENCH_MOST_ARRAYS], bool *same,
                                char *why, size_t size) {
  void *now[KS_BENCH_MOST_ARRAYS];
  *same = true;
  ks_status status = ks_bench_op_results(o, now);
  for (int i = 0; i < o->n_arrays && status == KS_OK && *same; i++) {
    const ks_bench_array *a = &o->arrays[i];
    if (!now[i]) continue;
    *same = memcmp(now[i], before[i], (size_t)a->n * type_sizes[a->type]) == 0;
    if (!*same) snprintf(why, size, "array %d: not the bits that it had before the timed loop", i);
  }
  free_results(now);
  return status;
}
