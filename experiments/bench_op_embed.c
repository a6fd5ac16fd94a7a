/* The operations on embeddings for `keepsake bench ops`: pooling, entropy, similarity. */
#include "experiments/bench_op.h"

#include <math.h>

/* ---------------------------------------------------------------- pooling: rows in sequences of n_queries,
 * cols, kind */

ks_status ks_bench_make_pool(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  const int64_t n_seqs = d->rows / d->n_queries;
  int64_t *offsets;
  KS_TRY(ks_bench_block(o, (size_t)n_seqs + 1, sizeof *offsets, &offsets));
  for (int64_t i = 0; i <= n_seqs; i++)
    offsets[i] = i * d->n_queries;
  o->a.pool = (ks_pool_args){.seq_offsets = offsets,
                             .n_seqs = n_seqs,
                             .n_rows = d->rows,
                             .n_cols = d->cols,
                             .pooling = (ks_pooling)d->kind};
  o->chain = (double)d->n_queries;
  KS_TRY(ks_bench_array_act(o, KS_ARRAY_INPUT, d->rows * d->cols, -1, 1, &o->a.pool.x));
  return ks_bench_array_of(
      o, (ks_bench_array){.n = n_seqs * d->cols, .type = KS_ARRAY_F32, .role = KS_ARRAY_OUTPUT},
      &o->a.pool.y);
}

ks_status ks_bench_run_pool(ks_bench_op *o) {
  return ks_pool(o->ctx, &o->a.pool);
}

/* ---------------------------------------------------------------- entropy: rows, cols, kind */

ks_status ks_bench_make_entropy(ks_bench_op *o) {
  const ks_bench_dims *d = &o->d;
  o->a.entropy = (ks_entropy_args){
      .n_rows = d->rows, .n_cols = d->cols, .kind = (ks_entropy_kind)d->kind, .n_bins = 100, .clip = 3};
  o->chain = (double)d->cols;
  o->waits = true;
  KS_TRY(ks_bench_array_of(
      o, (ks_bench_array){.n = d->rows * d->cols, .type = KS_ARRAY_F32, .low = -1, .high = 1},
      &o->a.entropy.x));
  return ks_bench_array_of(
      o, (ks_bench_array){.n = d->rows, .type = KS_ARRAY_F64, .role = KS_ARRAY_OUTPUT, .is_host = true},
      &o->a.entropy.h);
}

ks_status ks_bench_run_entropy(ks_bench_op *o) {
  return ks_entropy(o->ctx, &o->a.entropy);
}

/* ---------------------------------------------------------------- similarity: rows (queries), n_keys, cols,
 * kind (metric), stored */

static ks_status make_embeddings(ks_bench_op *o, int64_t n, bool whole, const void **values,
                                 const float **scales) {
  const ks_dtype t = o->d.stored;
  ks_bench_array like = {.n = n * o->d.cols, .low = -1, .high = 1};
  like.type = t == KS_DTYPE_I8 ? KS_ARRAY_I8 : t == KS_DTYPE_BF16 ? KS_ARRAY_BF16 : KS_ARRAY_F32;
  if (whole || t == KS_DTYPE_I8) {
    like.whole = true;
    like.high = whole ? 2 : 127;
    like.low = -like.high;
  }
  KS_TRY(ks_bench_array_of(o, like, values));
  if (t != KS_DTYPE_I8) return KS_OK;
  return ks_bench_array_of(o, (ks_bench_array){.n = n, .type = KS_ARRAY_F32, .low = 0.5, .high = 1}, scales);
}

static ks_status make_similarity(ks_bench_op *o, bool whole) {
  const ks_bench_dims *d = &o->d;
  ks_similarity_args *a = &o->a.similarity;
  *a = (ks_similarity_args){.n_q = d->rows,
                            .n_k = d->n_keys,
                            .n_cols = d->cols,
                            .metric = (ks_metric)d->kind,
                            .q_dtype = d->stored,
                            .k_dtype = d->stored};
  o->chain = (double)d->cols;
  KS_TRY(make_embeddings(o, d->rows, whole, &a->q, &a->q_scales));
  return make_embeddings(o, d->n_keys, whole, &a->k, &a->k_scales);
}

static ks_status host_array(ks_bench_op *o, ks_array_type type, ks_array_role role, int64_t n, void *p) {
  return ks_bench_array_of(o, (ks_bench_array){.n = n, .type = type, .role = role, .is_host = true}, p);
}

ks_status ks_bench_make_similarity(ks_bench_op *o) {
  KS_TRY(make_similarity(o, false));
  return ks_bench_array_of(
      o, (ks_bench_array){.n = o->d.rows * o->d.n_keys, .type = KS_ARRAY_F32, .role = KS_ARRAY_OUTPUT},
      &o->out[0]);
}

ks_status ks_bench_run_similarity(ks_bench_op *o) {
  return ks_similarity(o->ctx, &o->a.similarity, o->out[0]);
}

ks_status ks_bench_make_similarity_top(ks_bench_op *o) {
  KS_TRY(make_similarity(o, false));
  o->waits = true;
  KS_TRY(host_array(o, KS_ARRAY_F32, KS_ARRAY_OUTPUT, o->d.rows * o->d.best_k, &o->out[0]));
  return host_array(o, KS_ARRAY_I64, KS_ARRAY_ORDER, o->d.rows * o->d.best_k, &o->out[1]);
}

ks_status ks_bench_run_similarity_top(ks_bench_op *o) {
  return ks_similarity_top(o->ctx, &o->a.similarity, o->d.best_k, o->out[0], o->out[1]);
}

/* Eight domains. */
ks_status ks_bench_make_similarity_mean(ks_bench_op *o) {
  int32_t *of_keys, *of_queries;
  KS_TRY(make_similarity(o, false));
  o->waits = true;
  o->chain += (double)o->d.n_keys;
  KS_TRY(ks_bench_block(o, (size_t)o->d.n_keys, sizeof *of_keys, &of_keys));
  KS_TRY(ks_bench_block(o, (size_t)o->d.rows, sizeof *of_queries, &of_queries));
  for (int64_t i = 0; i < o->d.n_keys; i++)
    of_keys[i] = (int32_t)(i * 7 % 8);
  for (int64_t i = 0; i < o->d.rows; i++)
    of_queries[i] = (int32_t)(i % 8);
  o->groups[0] = of_keys;
  o->groups[1] = of_queries;
  KS_TRY(host_array(o, KS_ARRAY_F64, KS_ARRAY_OUTPUT, o->d.rows, &o->out[0]));
  return host_array(o, KS_ARRAY_I64, KS_ARRAY_OUTPUT, o->d.rows, &o->out[1]);
}

ks_status ks_bench_run_similarity_mean(ks_bench_op *o) {
  const ks_similarity_groups groups = {.keys = o->groups[0], .queries = o->groups[1]};
  return ks_similarity_mean(o->ctx, &o->a.similarity, &groups, o->out[0], o->out[1]);
}

/* Small whole numbers: products are exact everywhere, and so is the choice. best_k: how many are picked. */
ks_status ks_bench_make_similarity_farthest_first(ks_bench_op *o) {
  KS_TRY(make_similarity(o, true));
  o->waits = true;
  return host_array(o, KS_ARRAY_I64, KS_ARRAY_OUTPUT, o->d.best_k, &o->out[0]);
}

ks_status ks_bench_run_similarity_farthest_first(ks_bench_op *o) {
  return ks_similarity_farthest_first(o->ctx, &o->a.similarity, o->d.best_k, 0, o->out[0]);
}
