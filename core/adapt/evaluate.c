/* Losses of many examples under many adapters. */
#include "core/adapt/packing.h"
#include "core/model/run.h"

typedef struct {
  const ks_example *examples;
  const int32_t *adapter_index;
  const ks_adapter_view *adapters;
  int64_t n;
  int64_t *order; /* [n] sorted by adapter, then index */
  ks_run *run;
  ks_packing packing;
  double *loss;
} evaluation;

static int32_t adapter_of(const evaluation *e, int64_t i) {
  return e->adapter_index ? e->adapter_index[i] : -1;
}

/* Counting sort, so that equal adapters keep their order. */
static ks_status sort_by_adapter(evaluation *e, int64_t n_adapters) {
  int64_t *begin = NULL;
  KS_TRY(ks_alloc_array(&begin, (size_t)n_adapters + 2, sizeof *begin, "evaluation"));
  for (int64_t i = 0; i < e->n; i++)
    begin[adapter_of(e, i) + 2]++;
  for (int64_t a = 1; a <= n_adapters + 1; a++)
    begin[a] += begin[a - 1];
  for (int64_t i = 0; i < e->n; i++)
    e->order[begin[adapter_of(e, i) + 1]++] = i;
  free(begin);
  return KS_OK;
}

/* Packs from order[first] on; returns the end. */
static int64_t pack(evaluation *e, int64_t first) {
  ks_packing *p = &e->packing;
  int64_t i = first;
  int32_t current = INT32_MIN;
  ks_packing_clear(p);
  for (; i < e->n; i++) {
    const ks_example *x = &e->examples[e->order[i]];
    int32_t adapter = adapter_of(e, e->order[i]);
    int64_t n_rows = ks_example_n_rows(x);
    if (n_rows > p->max_rows - p->batch.n_rows) break;
    if (n_rows == 0) continue;
    if (adapter != current) ks_packing_begin_segment(p, adapter >= 0 ? &e->adapters[adapter] : NULL, 0);
    current = adapter;
    ks_packing_add(p, x, 1);
  }
  return i;
}

static ks_status evaluate_all(evaluation *e, const ks_progress *progress) {
  for (int64_t first = 0; first < e->n;) {
    ks_packing *p = &e->packing;
    const float *loss = p->loss;
    KS_TRY(ks_progress_report(progress, "evaluate", (double)first, (double)e->n));
    int64_t end = pack(e, first);
    KS_TRY(ks_forward_loss(e->run, &p->batch, p->rows, p->targets, p->n_targets, p->loss));
    KS_TRY(ks_sync(e->run->model->ctx));
    for (; first < end; first++) {
      double sum = 0;
      for (int64_t j = ks_example_n_targets(&e->examples[e->order[first]]); j > 0; j--)
        sum += *loss++;
      e->loss[e->order[first]] = sum;
    }
  }
  return ks_progress_report(progress, "evaluate", (double)e->n, (double)e->n);
}

/* Checks every example, counts targets and finds the room that passes need. */
static ks_status measure(const ks_model *model, const evaluation *e, int64_t n_adapters, int64_t max_rows,
                         int64_t *n_targets, ks_run_params *run) {
  int64_t bound = max_rows > 0 ? max_rows : ks_run_default_rows(model, false), total = 0, longest = 1;
  for (int64_t i = 0; i < e->n; i++) {
    int32_t adapter = adapter_of(e, i);
    KS_TRY(ks_example_check(model, &e->examples[i], i));
    if (adapter < -1 || adapter >= n_adapters)
      return KS_FAIL(KS_EINVAL, "example %lld names adapter %d of %lld", (long long)i, adapter,
                     (long long)n_adapters);
    if (adapter >= 0 && e->adapters[adapter].max_rank > run->max_rank)
      run->max_rank = e->adapters[adapter].max_rank;
    n_targets[i] = ks_example_n_targets(&e->examples[i]);
    longest = ks_max_i64(longest, ks_example_n_rows(&e->examples[i]));
    if (total < bound) total += ks_example_n_rows(&e->examples[i]);
  }
  run->max_rows = ks_max_i64(longest, ks_min_i64(total, bound));
  run->max_seqs = ks_min_i64(e->n, run->max_rows);
  return KS_OK;
}

ks_status ks_evaluate_loss(ks_model *model, const ks_example *examples, const int32_t *adapter_index,
                           int64_t n, const ks_adapter_view *adapters, int64_t n_adapters, int64_t max_rows,
                           const ks_progress *progress, double *loss, int64_t *n_targets) {
  if (!model || n < 0 || n_adapters < 0 || (n > 0 && (!examples || !loss || !n_targets)) ||
      (n_adapters > 0 && !adapters))
    return KS_FAIL(KS_EINVAL, "ks_evaluate_loss: NULL argument");
  evaluation e = {
      .examples = examples, .adapter_index = adapter_index, .adapters = adapters, .n = n, .loss = loss};
  ks_run_params p = {0};
  KS_TRY(measure(model, &e, n_adapters, max_rows, n_targets, &p));
  if (n == 0) return KS_OK;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_alloc_array(&e.order, (size_t)n, sizeof *e.order, "evaluation"));
  KS_TRY_OUT(sort_by_adapter(&e, n_adapters));
  KS_TRY_OUT(ks_run_create(model, &p, &e.run));
  KS_TRY_OUT(ks_packing_create(&e.packing, p.max_rows, p.max_seqs));
  KS_TRY_OUT(evaluate_all(&e, progress));
out:
  ks_packing_destroy(&e.packing);
  ks_run_destroy(e.run);
  free(e.order);
  return status;
}
