/* Single operations of `keepsake bench goals`. Inputs are drawn by their place in an array, so the first rows
 * of a large call are those of a small one: they are compared with the CPU, the rest must hold numbers, and all
 * of it must be the same bits after the samples. */
#include "experiments/bench_goals.h"
#include "experiments/bench_op.h"

#include <math.h>
#include <stdio.h>

typedef struct {
  ks_bench_op op;
  void *before[KS_BENCH_MOST_ARRAYS];
} op_state;

static ks_status call(void *arg) {
  return ks_bench_op_run(arg);
}

static ks_status op_sample(void *subject, double *ms) {
  ks_goal_subject *s = subject;
  return ks_bench_sample_device_once(&s->timed, ms);
}

/* ---------------------------------------------------------------- sizes */

static ks_status read_kind(const ks_goal_subject *s, int *out) {
  static const struct {
    const char *op, *name;
    int kind;
  } kinds[] = {{"entropy", "histogram", KS_ENTROPY_HISTOGRAM},
               {"entropy", "clipped", KS_ENTROPY_CLIPPED},
               {"entropy", "softmax", KS_ENTROPY_SOFTMAX},
               {"entropy", "abs", KS_ENTROPY_ABS},
               {"pool", "mean", KS_POOL_MEAN},
               {"pool", "last", KS_POOL_LAST}};
  *out = strncmp(s->c->op, "similarity", 10) == 0 ? KS_METRIC_DOT
         : strcmp(s->c->op, "head_loss") == 0     ? s->p.gradient == 0
                                                  : 0;
  if (!s->p.kind[0]) return KS_OK;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (strcmp(kinds[i].op, s->c->op) == 0 && strcmp(kinds[i].name, s->p.kind) == 0) {
      *out = kinds[i].kind;
      return KS_OK;
    }
  return KS_FAIL(KS_EINTERNAL, "bench_goals.def: %s: there is no kind \"%s\"", s->c->name, s->p.kind);
}

static ks_status read_dims(const ks_goal_subject *s, ks_bench_dims *d) {
  const ks_goal_parameters *p = &s->p;
  *d = (ks_bench_dims){.rows = p->rows,
                       .cols = p->n_cols,
                       .n_out = p->n_out,
                       .n_keys = p->n_keys,
                       .n_heads = p->n_heads,
                       .n_kv_heads = p->n_kv_heads,
                       .head_dim = p->head_dim,
                       .n_adapters = p->n_adapters,
                       .best_k = p->best_k,
                       .stored = KS_DTYPE_BF16};
  d->n_queries = p->seq_len;
  if (p->seq_len && !p->n_keys) d->n_keys = p->seq_len;
  return read_kind(s, &d->kind);
}

/* What the CPU computes in a moment: a sequence, an adapter, a few rows or queries. */
static ks_bench_dims first_rows(const ks_goal_subject *s, ks_bench_dims d) {
  enum { FEW_ROWS = 16, FEW_QUERIES = 2 };
  if (strncmp(s->c->op, "attention", 9) == 0 || strcmp(s->c->op, "pool") == 0)
    d.rows = s->p.seq_len;
  else if (strncmp(s->c->op, "similarity", 10) == 0)
    d.rows = ks_min_i64(d.rows, FEW_QUERIES);
  else
    d.rows = ks_min_i64(d.rows, FEW_ROWS);
  d.n_adapters = ks_min_i64(d.n_adapters, 1);
  return d;
}

/* ---------------------------------------------------------------- checks */

static ks_status compare_first_rows(ks_goal_run *run, ks_goal_subject *s, const ks_bench_dims *all) {
  op_state *state = s->state;
  ks_ctx *cpu = NULL;
  ks_bench_op ref = {0};
  const ks_bench_dims few = first_rows(s, *all);
  bool same = false;
  char why[200] = "";
  ks_status status;
  KS_TRY_OUT(ks_ctx_create(&cpu, &(ks_ctx_params){.backend = "cpu", .n_threads = run->b->n_threads}));
  KS_TRY_OUT(ks_bench_op_make(cpu, state->op.kind, &few, run->b->dtype, &ref));
  KS_TRY_OUT(ks_bench_op_run(&ref));
  KS_TRY_OUT(ks_bench_op_compare(&state->op, &ref, &same, why, sizeof why));
  if (!same) ks_goal_wrong(s, "%s", why);
out:
  ks_bench_op_free(&ref);
  ks_ctx_destroy(cpu);
  return status;
}

static ks_status check_again(ks_goal_subject *s) {
  op_state *state = s->state;
  bool same = true;
  char why[200] = "";
  KS_TRY(ks_bench_op_reset(&state->op));
  KS_TRY(ks_bench_op_run(&state->op));
  KS_TRY(ks_bench_op_unchanged(&state->op, state->before, &same, why, sizeof why));
  if (!same) ks_goal_wrong(s, "%s", why);
  return KS_OK;
}

/* ---------------------------------------------------------------- a case */

static void describe(ks_goal_subject *s) {
  const ks_goal_parameters *p = &s->p;
  int n = snprintf(s->what, sizeof s->what, "%lld rows", (long long)p->rows);
  const struct {
    int64_t value;
    const char *format;
  } parts[] = {{p->seq_len, ", %lld tokens each"}, {p->n_heads, ", %lld heads"}, {p->head_dim, " of %lld"},
               {p->n_keys, ", %lld keys"},         {p->n_out, " x %lld"},        {p->n_cols, " x %lld"},
               {p->best_k, ", best %lld"}};
  if (p->rows == 0) n = snprintf(s->what, sizeof s->what, "%lld adapter(s)", (long long)p->n_adapters);
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    if (parts[i].value == 0 || n >= (int)sizeof s->what) continue;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    n += snprintf(s->what + n, sizeof s->what - (size_t)n, parts[i].format, (long long)parts[i].value);
#pragma GCC diagnostic pop
  }
}

static ks_status op_make(ks_goal_run *run, ks_goal_subject *s) {
  const ks_bench_op_kind *kind = ks_bench_op_kinds;
  op_state *state = NULL;
  ks_bench_dims dims;
  char why[200] = "";
  while (kind->name && strcmp(kind->name, s->c->op) != 0)
    kind++;
  KS_ASSERT(kind->name != NULL);
  KS_TRY(read_dims(s, &dims));
  KS_TRY(ks_alloc_array(&state, 1, sizeof *state, "bench"));
  s->state = state;
  describe(s);
  KS_TRY(ks_bench_op_make(run->b->ctx, kind, &dims, run->b->dtype, &state->op));
  KS_TRY(ks_bench_op_run(&state->op));
  KS_TRY(ks_bench_op_results(&state->op, state->before));
  if (!ks_bench_op_is_filled(&state->op, state->before, why, sizeof why)) ks_goal_wrong(s, "%s", why);
  KS_TRY(compare_first_rows(run, s, &dims));
  const ks_bench_cost cost = ks_bench_op_cost(&state->op);
  s->timed.is_warm = strcmp(s->p.cache, "warm") == 0;
  s->load = (ks_bench_load){.work = 1, .flops = cost.flops, .products = KS_PRODUCTS_BF16};
  s->load.bytes =
      s->timed.is_warm ? 0 : cost.bytes; /* what lies in a cache has no share of the memory's rate */
  s->timed.fn = call;
  s->timed.arg = &state->op;
  s->timed.waits = state->op.waits;
  s->is_device_time = true;
  return KS_OK;
}

static ks_status op_finish(ks_goal_run *run, ks_goal_subject *s) {
  (void)run;
  if (s->timed.waits) {
    const size_t used = strlen(s->note);
    snprintf(s->note + used, sizeof s->note - used, "%suntil its last kernel; the host waits longer",
             used ? "; " : "");
  }
  return s->is_wrong ? KS_OK : check_again(s);
}

static void op_drop(ks_goal_subject *s) {
  op_state *state = s->state;
  if (!state) return;
  for (int i = 0; i < KS_BENCH_MOST_ARRAYS; i++)
    free(state->before[i]);
  ks_bench_op_free(&state->op);
  free(state);
}

const ks_goal_kind ks_goal_op_kinds[] = {
#define X(name, what) {#name, false, op_make, op_sample, op_finish, op_drop},
    KS_OPS_MAP(X)
#undef X
        {0}};
