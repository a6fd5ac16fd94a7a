/* `keepsake bench ops`: every operation alone, at the sizes of a model shape. */
#include "experiments/bench.h"
#include "experiments/bench_op.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

enum {
  RANK = 8,
  COHORT = 8,
  SEQ = 256,
  PICKS = 64,
  BEST_K = 10,
  MOST_CASES = 128,
  LARGE_ROWS = 16384,
  COLD_BYTES = 128 << 20 /* from memory: more than the last cache has for one of many */
};

typedef struct {
  const char *op;
  char shape[96];
  ks_bench_dims d;
} op_case;

typedef struct {
  op_case items[MOST_CASES];
  int n;
} op_cases;

__attribute__((format(printf, 4, 5))) static void add(op_cases *c, const char *op, ks_bench_dims d,
                                                      const char *format, ...) {
  KS_ASSERT(c->n < MOST_CASES);
  op_case *k = &c->items[c->n++];
  va_list args;
  k->op = op;
  k->d = d;
  va_start(args, format);
  vsnprintf(k->shape, sizeof k->shape, format, args);
  va_end(args);
}

#define LL(x) ((long long)(x))

/* ---------------------------------------------------------------- which */

/* Operations on the activations of `rows` tokens. */
static void add_activations(op_cases *c, const ks_model_config *m, int64_t rows) {
  const struct {
    const char *op;
    int64_t cols;
  } ops[] = {{"rmsnorm_forward", m->hidden_size},      {"rmsnorm_backward", m->hidden_size},
             {"swiglu_forward", m->intermediate_size}, {"swiglu_backward", m->intermediate_size},
             {"rows_gather", m->hidden_size},          {"rows_scatter", m->hidden_size}};
  for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
    add(c, ops[i].op, (ks_bench_dims){.rows = rows, .cols = ops[i].cols}, "%lld x %lld", LL(rows),
        LL(ops[i].cols));
  add(c, "rope", (ks_bench_dims){.rows = rows, .n_heads = m->n_heads, .head_dim = m->head_dim},
      "%lld x %lld heads of %lld", LL(rows), LL(m->n_heads), LL(m->head_dim));
}

static ks_bench_dims attention_dims(const ks_model_config *m, int64_t rows, int64_t n_queries,
                                    int64_t n_keys) {
  return (ks_bench_dims){.rows = rows,
                         .n_queries = n_queries,
                         .n_keys = n_keys,
                         .n_heads = m->n_heads,
                         .n_kv_heads = m->n_kv_heads,
                         .head_dim = m->head_dim};
}

static void add_attention(op_cases *c, const ks_model_config *m, int64_t rows, int64_t seq) {
  seq = ks_min_i64(ks_min_i64(seq, m->max_seq_len), rows);
  const ks_bench_dims d = attention_dims(m, rows / seq * seq, seq, seq);
  static const char *const ops[] = {"attention_forward", "attention_backward"};
  for (int i = 0; i < 2; i++)
    add(c, ops[i], d, "%lld x %lld tokens, %lld heads of %lld", LL(rows / seq), LL(seq), LL(m->n_heads),
        LL(m->head_dim));
}

static void add_decode_attention(op_cases *c, const ks_model_config *m, int64_t n_seqs, int64_t n_keys) {
  n_keys = ks_min_i64(n_keys, m->max_seq_len);
  add(c, "attention_forward", attention_dims(m, n_seqs, 1, n_keys),
      "decode %lld, %lld keys, %lld heads of %lld", LL(n_seqs), LL(n_keys), LL(m->n_heads), LL(m->head_dim));
}

/* Operations with frozen weights. */
static void add_products(op_cases *c, const ks_model_config *m, int64_t rows, bool backward) {
  const int64_t sizes[][2] = {{m->n_heads * m->head_dim, m->hidden_size},
                              {m->intermediate_size, m->hidden_size},
                              {m->hidden_size, m->intermediate_size}};
  static const int64_t adapters[] = {0, 1, COHORT};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (size_t j = 0; j < sizeof adapters / sizeof *adapters; j++) {
      const ks_bench_dims d = {.rows = rows,
                               .n_out = sizes[i][0],
                               .cols = sizes[i][1],
                               .n_adapters = ks_min_i64(adapters[j], rows),
                               .rank = adapters[j] ? RANK : 0};
      if (adapters[j] && (i == 0 || d.n_adapters < adapters[j])) continue;
      for (int k = 0; k <= backward; k++)
        add(c, k ? "linear_backward" : "linear_forward", d, "%lld x %lld x %lld, %lld adapter(s)", LL(rows),
            LL(d.n_out), LL(d.cols), LL(d.n_adapters));
    }
}

static void add_head(op_cases *c, const ks_model_config *m, int64_t rows) {
  const ks_bench_dims d = {.rows = rows, .n_out = m->vocab_size, .cols = m->hidden_size};
  add(c, "embed_forward", d, "%lld of %lld x %lld", LL(rows), LL(d.n_out), LL(d.cols));
  add(c, "head_loss", d, "%lld x %lld x %lld", LL(rows), LL(d.n_out), LL(d.cols));
}

static int64_t adapter_size(const ks_model_config *m) {
  int64_t n = 0;
  for (int t = 0; t < KS_N_TARGETS; t++) {
    int64_t n_out, n_in;
    ks_target_shape(m, (ks_target)t, &n_out, &n_in);
    n += m->n_layers * RANK * (n_out + n_in);
  }
  return n;
}

/* Operations that know neither weights nor activations. */
static void add_adapters_and_sampling(op_cases *c, const ks_model_config *m) {
  static const int64_t batches[] = {1, COHORT};
  const int64_t n = adapter_size(m);
  for (int i = 0; i < 2; i++)
    add(c, "adamw", (ks_bench_dims){.cols = n, .n_adapters = batches[i]}, "%lld adapter(s) of %lld",
        LL(batches[i]), LL(n));
  for (int i = 0; i < 4; i++)
    add(c, "sample", (ks_bench_dims){.rows = batches[i % 2], .n_out = m->vocab_size, .kind = i / 2},
        "%lld x %lld, %s", LL(batches[i % 2]), LL(m->vocab_size),
        i / 2 ? "temperature 0.8, top-p 0.9" : "greedy");
}

static void add_entropies(op_cases *c, int64_t rows, int64_t cols) {
  static const char *const names[] = {"histogram", "clipped", "softmax", "abs"};
  for (int i = 0; i < 4; i++)
    add(c, "entropy", (ks_bench_dims){.rows = rows, .cols = cols, .kind = i}, "%lld x %lld, %s", LL(rows),
        LL(cols), names[i]);
}

static void add_similarities(op_cases *c, int64_t n_q, int64_t n_k, int64_t cols, bool matrix) {
  static const ks_dtype types[] = {KS_DTYPE_F32, KS_DTYPE_BF16, KS_DTYPE_I8};
  static const char *const ops[] = {"similarity", "similarity_top", "similarity_mean"};
  for (int t = 0; t < 3; t++)
    for (int i = matrix ? 0 : 1; i < 3; i++)
      add(c, ops[i],
          (ks_bench_dims){.rows = n_q, .n_keys = n_k, .cols = cols, .best_k = BEST_K, .stored = types[t]},
          "%lld queries, %lld keys of %lld, %s", LL(n_q), LL(n_k), LL(cols), ks_dtype_name(types[t]));
}

static void add_farthest(op_cases *c, int64_t n_k, int64_t cols, int64_t n_pick) {
  const ks_bench_dims d = {.rows = 1,
                           .n_keys = n_k,
                           .cols = cols,
                           .best_k = n_pick,
                           .kind = KS_METRIC_DOT,
                           .stored = KS_DTYPE_F32};
  add(c, "similarity_farthest_first", d, "%lld of %lld keys of %lld", LL(n_pick), LL(n_k), LL(cols));
}

/* Sizes of real use, or all of them near `rows` of --rows. */
static void list_cases(const ks_bench *b, const ks_model_config *m, bool weights_only, bool all,
                       op_cases *c) {
  const int64_t few = b->n_rows_of_ops, typical = few ? few : 8 * SEQ, d = m->hidden_size;
  const bool large = b->info.has_timer && !few;
  const int64_t rows[] = {1, ks_min_i64(8, typical), typical, LARGE_ROWS};
  for (int i = 0; i < (large ? 4 : 3); i++) {
    if (i == 1 && rows[1] == typical) continue;
    add_products(c, m, rows[i], rows[i] >= typical);
    if (rows[i] >= typical) add_head(c, m, rows[i]);
    if (!weights_only && i != 1) add_activations(c, m, rows[i]);
    if (!weights_only && rows[i] >= typical) add_attention(c, m, rows[i], rows[i] == LARGE_ROWS ? 1024 : SEQ);
  }
  if (weights_only) return;
  add_decode_attention(c, m, 1, few ? few : 512);
  add_decode_attention(c, m, 8, few ? few : 512);
  for (int i = 0; i < 2; i++)
    add(c, "pool",
        (ks_bench_dims){.rows = typical, .cols = d, .n_queries = ks_min_i64(128, typical), .kind = i},
        "%lld x %lld tokens of %lld, %s", LL(typical / ks_min_i64(128, typical)),
        LL(ks_min_i64(128, typical)), LL(d), i == KS_POOL_MEAN ? "mean" : "last");
  if (!all) return;
  add_adapters_and_sampling(c, m);
  add_entropies(c, few ? few : 256, d);
  add_similarities(c, 1, few ? 4 * few : 2048, d, true);
  add_similarities(c, few ? few : 256, few ? 4 * few : 2048, d, true);
  if (!few) add_similarities(c, 1, 100000, d, false);
  if (large) add_similarities(c, 1024, 100000, d, false);
  add_farthest(c, few ? 4 * few : 2048, d, few ? ks_min_i64(few, PICKS) : PICKS);
}

/* ---------------------------------------------------------------- one case */

static ks_status run_op(void *arg) {
  return ks_bench_op_run(arg);
}

/* Made, run and compared with the CPU; `before` holds its results. */
static ks_status validate(ks_bench *b, const op_case *k, ks_bench_op *o, void *before[KS_BENCH_MOST_ARRAYS],
                          bool *same, char *why, size_t size) {
  ks_ctx *cpu = NULL;
  ks_bench_op ref = {0};
  ks_status status;
  KS_TRY_OUT(ks_bench_op_run(o));
  KS_TRY_OUT(ks_bench_op_results(o, before));
  KS_TRY_OUT(ks_ctx_create(&cpu, &(ks_ctx_params){.backend = "cpu", .n_threads = b->n_threads}));
  KS_TRY_OUT(ks_bench_op_make(cpu, o->kind, &k->d, b->dtype, &ref));
  KS_TRY_OUT(ks_bench_op_run(&ref));
  KS_TRY_OUT(ks_bench_op_compare(o, &ref, same, why, size));
out:
  ks_bench_op_free(&ref);
  ks_ctx_destroy(cpu);
  return status;
}

static ks_status measure(ks_bench *b, const op_case *k, ks_bench_op *o, void *before[KS_BENCH_MOST_ARRAYS]) {
  ks_samples samples = {0};
  ks_ceilings ceilings;
  ks_bench_row *row = NULL;
  char why[200] = "";
  bool same = true;
  const ks_bench_cost cost = ks_bench_op_cost(o);
  ks_bench_load load = {.work = 1,
                        .flops =
                            k->d.stored == KS_DTYPE_I8 ? 0 : cost.flops, /* no ceiling of whole numbers */
                        .bytes = cost.bytes,
                        .working_set = (size_t)fmax(cost.bytes, COLD_BYTES)};
  if (strncmp(k->op, "similarity", 10) == 0)
    load.products = k->d.stored == KS_DTYPE_F32 ? KS_PRODUCTS_F32 : KS_PRODUCTS_BF16;
  ks_status status;
  KS_TRY_OUT(ks_bench_ceilings(b, &load, &ceilings));
  KS_TRY_OUT(ks_bench_sample_cold(b, run_op, o, o->waits, &samples));
  KS_TRY_OUT(ks_bench_op_reset(o));
  KS_TRY_OUT(ks_bench_op_run(o));
  KS_TRY_OUT(ks_bench_op_unchanged(o, before, &same, why, sizeof why));
  if (!same) {
    status = ks_bench_add_verdict(b, k->op, k->shape, "incorrect", why);
    goto out;
  }
  KS_TRY_OUT(ks_bench_add(b, k->op, k->shape, &samples, &load, &ceilings, &row));
  if (o->waits) snprintf(row->note, sizeof row->note, "waits for its results");
out:
  ks_samples_free(&samples);
  return status;
}

static ks_status check_and_measure(ks_bench *b, const op_case *k, const ks_bench_op_kind *kind) {
  ks_bench_op o = {0};
  void *before[KS_BENCH_MOST_ARRAYS] = {0};
  char why[200] = "";
  bool same = false;
  ks_status status;
  KS_TRY_OUT(ks_bench_op_make(b->ctx, kind, &k->d, b->dtype, &o));
  KS_TRY_OUT(validate(b, k, &o, before, &same, why, sizeof why));
  if (same)
    status = measure(b, k, &o, before);
  else
    status = ks_bench_add_verdict(b, k->op, k->shape, "incorrect", why);
out:
  for (int i = 0; i < KS_BENCH_MOST_ARRAYS; i++)
    free(before[i]);
  ks_bench_op_free(&o);
  return status;
}

static ks_status run_with(ks_bench *b, const op_case *k, const ks_bench_op_kind *kind, const char *variants) {
  const char *outer = b->chosen;
  ks_bench_close(b);
  KS_TRY(ks_bench_open(b, variants));
  ks_status status = check_and_measure(b, k, kind);
  if (status == KS_ENOMEM || status == KS_EUNSUPPORTED) {
    status = ks_bench_add_verdict(b, k->op, k->shape, status == KS_ENOMEM ? "skipped(memory)" : "unsupported",
                                  ks_error_message());
    ks_error_clear();
  }
  b->chosen = outer;
  return status;
}

/* With --variants all: once for each variant that works on these activations. */
static ks_status run_case(ks_bench *b, const op_case *k) {
  const ks_bench_op_kind *kind = ks_bench_op_kinds;
  while (kind->name && strcmp(kind->name, k->op) != 0)
    kind++;
  KS_ASSERT(kind->name != NULL);
  if (!b->variants || strcmp(b->variants, "all") != 0) return run_with(b, k, kind, b->variants);
  ks_op_variant variants[64];
  const bool bf16 = ks_ctx_act_dtype(b->ctx) == KS_DTYPE_BF16;
  const int64_t n = ks_min_i64(64, ks_backend_variants(ks_ctx_backend_name(b->ctx), variants, 64));
  int n_run = 0;
  for (int64_t i = 0; i < n; i++) {
    char text[80];
    if (strcmp(variants[i].op, k->op) != 0 || !(bf16 ? variants[i].bf16 : variants[i].f32)) continue;
    snprintf(text, sizeof text, "%s=%s", variants[i].op, variants[i].name);
    ks_status status = run_with(b, k, kind, text);
    if (status == KS_EENV && !b->ctx) { /* a library that this machine lacks */
      KS_TRY(ks_bench_open(b, NULL));
      status = ks_bench_add_verdict(b, k->op, k->shape, "skipped(library)", text);
      ks_error_clear();
    }
    KS_TRY(status);
    n_run++;
  }
  return n_run ? KS_OK : run_with(b, k, kind, NULL);
}

/* ---------------------------------------------------------------- the harness itself */

static ks_status nothing(void *arg) {
  return ks_meter_null(((ks_bench *)arg)->meter);
}

/* What a measurement costs when there is nothing to measure: no row can be below it. */
static ks_status bench_harness(ks_bench *b) {
  ks_samples samples = {0};
  const ks_bench_load load = {.work = 1};
  const ks_ceilings none = {0};
  ks_bench_row *row;
  if (!ks_bench_wants(b, "harness")) return KS_OK;
  ks_status status = ks_bench_sample_cold(b, nothing, b, false, &samples);
  if (status == KS_OK)
    status = ks_bench_add(b, "harness", b->info.has_timer ? "an empty kernel" : "nothing", &samples, &load,
                          &none, &row);
  if (status == KS_OK) snprintf(row->note, sizeof row->note, "the measurement's own cost");
  ks_samples_free(&samples);
  return status;
}

ks_status ks_bench_ops(ks_bench *b, const ks_bench_shape *shape) {
  op_cases *cases;
  const bool weights_only = ks_dtype_is_quantized(b->dtype);
  KS_TRY(ks_alloc_array(&cases, 1, sizeof *cases, "bench"));
  list_cases(b, &shape->config, weights_only, b->is_first_dtype, cases);
  ks_status status = b->is_first_dtype ? bench_harness(b) : KS_OK;
  for (int i = 0; i < cases->n && status == KS_OK; i++)
    if (ks_bench_wants(b, cases->items[i].op)) {
      status = run_case(b, &cases->items[i]);
      ks_bench_print_rows(b);
      if (status != KS_OK) ks_fail_context(status, "%s, %s", cases->items[i].op, cases->items[i].shape);
    }
  free(cases);
  return status;
}
