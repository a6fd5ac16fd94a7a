/* Operations with their arrays: making, filling, running, freeing. */
#include "experiments/bench_op.h"
#include "kernels/quant.h"

#include <math.h>

const ks_bench_op_kind ks_bench_op_kinds[] = {
#define X(name, what) {#name, ks_bench_make_##name, ks_bench_run_##name, ks_bench_cost_##name},
    KS_OPS_MAP(X)
#undef X
        {0}};

/* ---------------------------------------------------------------- numbers */

static const size_t type_sizes[] = {[KS_ARRAY_F32] = 4, [KS_ARRAY_BF16] = 2, [KS_ARRAY_I8] = 1,
                                    [KS_ARRAY_F64] = 8, [KS_ARRAY_I32] = 4,  [KS_ARRAY_I64] = 8};

/* splitmix64, the i-th number after the seed: the same for any number of threads, and for an array's beginning. */
static double uniform(uint64_t seed, int64_t i) {
  uint64_t z = seed + (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

static float float_of(uint16_t bits) {
  union {
    uint32_t u;
    float f;
  } v = {(uint32_t)bits << 16};
  return v.f;
}

typedef union {
  void *p;
  float *f32;
  uint16_t *bf16;
  int8_t *i8;
} typed;

/* What the array was made with; of activations of a bf16 run, bf16 values in any type. */
static void fill_host(const ks_bench_op *o, const ks_bench_array *a, void *host) {
  typed to = {host};
  if (a->role == KS_ARRAY_OUTPUT || a->role == KS_ARRAY_ORDER) {
    memset(host, 0xff, (size_t)a->n * type_sizes[a->type]); /* NaN */
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < a->n; i++) {
    const double u = uniform(a->seed, i);
    float v =
        (float)(a->whole ? floor(a->low + u * (a->high - a->low + 1)) : a->low + u * (a->high - a->low));
    if (o->bf16) v = float_of(ks_bf16_from_float(v));
    if (a->type == KS_ARRAY_F32) to.f32[i] = v;
    if (a->type == KS_ARRAY_BF16) to.bf16[i] = ks_bf16_from_float(v);
    if (a->type == KS_ARRAY_I8) to.i8[i] = (int8_t)v;
  }
}

static ks_status fill(const ks_bench_op *o, const ks_bench_array *a) {
  const size_t bytes = (size_t)a->n * type_sizes[a->type];
  void *host = a->p;
  if (a->role == KS_ARRAY_SCRATCH) return KS_OK;
  if (!a->is_host) KS_TRY(ks_alloc_array(&host, (size_t)a->n, type_sizes[a->type], "bench"));
  fill_host(o, a, host);
  if (a->is_host) return KS_OK;
  ks_status status = ks_mem_upload(o->ctx, a->p, host, bytes);
  if (status == KS_OK) status = ks_sync(o->ctx);
  free(host);
  return status;
}

/* ---------------------------------------------------------------- arrays */

ks_status ks_bench_array_of(ks_bench_op *o, ks_bench_array like, void *p) {
  KS_ASSERT(o->n_arrays < KS_BENCH_MOST_ARRAYS);
  ks_bench_array *a = &o->arrays[o->n_arrays];
  *a = like;
  a->seed = 0x5eed0000u + (uint64_t)o->n_arrays;
  const size_t size = type_sizes[a->type];
  if (a->is_host)
    KS_TRY(ks_alloc_array(&a->p, (size_t)a->n, size, "bench"));
  else
    KS_TRY(ks_mem_alloc(o->ctx, (size_t)a->n * size, &a->p));
  o->n_arrays++;
  memcpy(p, &a->p, sizeof a->p);
  return fill(o, a);
}

ks_status ks_bench_array_act(ks_bench_op *o, ks_array_role role, int64_t n, double low, double high,
                             void *p) {
  const ks_array_type type = ks_ctx_act_dtype(o->ctx) == KS_DTYPE_BF16 ? KS_ARRAY_BF16 : KS_ARRAY_F32;
  return ks_bench_array_of(o, (ks_bench_array){.n = n, .type = type, .role = role, .low = low, .high = high},
                           p);
}

ks_status ks_bench_block(ks_bench_op *o, size_t n, size_t size, void *p) {
  KS_ASSERT(o->n_blocks < KS_BENCH_MOST_BLOCKS);
  KS_TRY(ks_alloc_array(&o->blocks[o->n_blocks], n, size, "bench"));
  memcpy(p, &o->blocks[o->n_blocks], sizeof(void *));
  o->n_blocks++;
  return KS_OK;
}

ks_status ks_bench_weight(ks_bench_op *o, int64_t n_out, int64_t n_in) {
  float *values = NULL;
  KS_TRY(ks_alloc_array(&values, (size_t)(n_out * n_in), sizeof *values, "bench"));
  const double span = sqrt(3.0 / (double)n_in);
  fill_host(o, &(ks_bench_array){.n = n_out * n_in, .low = -span, .high = span, .seed = 0x3e1947u}, values);
  /* A CPU without bf16 activations has the same values in float32: those of a bf16 run are bf16 values. */
  ks_status status = ks_weight_create(
      o->ctx, &(ks_weight_params){.n_out = n_out, .n_in = n_in, .dtype = o->weight_dtype, .values = values},
      &o->w);
  free(values);
  return status == KS_OK ? ks_weight_prepare_backward(o->ctx, o->w) : status;
}

/* ---------------------------------------------------------------- operations */

ks_status ks_bench_op_make(ks_ctx *ctx, const ks_bench_op_kind *kind, const ks_bench_dims *dims,
                           ks_dtype weight_dtype, ks_bench_op *out) {
  *out = (ks_bench_op){.ctx = ctx,
                       .kind = kind,
                       .d = *dims,
                       .weight_dtype = weight_dtype,
                       .bf16 = weight_dtype != KS_DTYPE_F32,
                       .chain = 1};
  return kind->make(out);
}

ks_status ks_bench_op_run(ks_bench_op *o) {
  return o->kind->run(o);
}

ks_status ks_bench_op_reset(ks_bench_op *o) {
  KS_TRY(ks_sync(o->ctx));
  for (int i = 0; i < o->n_arrays; i++)
    if (o->arrays[i].role != KS_ARRAY_INPUT) KS_TRY(fill(o, &o->arrays[i]));
  return KS_OK;
}

void ks_bench_op_free(ks_bench_op *o) {
  if (!o || !o->ctx) return;
  ks_weight_destroy(o->ctx, o->w);
  for (int i = 0; i < o->n_arrays; i++) {
    if (o->arrays[i].is_host)
      free(o->arrays[i].p);
    else
      ks_mem_free(o->ctx, o->arrays[i].p);
  }
  for (int i = 0; i < o->n_blocks; i++)
    free(o->blocks[i]);
  *o = (ks_bench_op){0};
}

ks_bench_cost ks_bench_op_cost(const ks_bench_op *o) {
  return o->kind->cost(o);
}
