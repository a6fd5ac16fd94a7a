/* One operation of kernels/ops.h with its arrays, for `keepsake bench ops`: made alike on the measured device
 * and on the CPU, so that their results can be compared.
 *
 *   ks_bench_op op;
 *   KS_TRY(ks_bench_op_make(ctx, "rope", &dims, KS_DTYPE_BF16, &op));
 *   KS_TRY(ks_bench_op_run(&op));                       // again and again
 *   KS_TRY(ks_bench_op_reset(&op));                     // arrays as they were made
 *   ks_bench_op_free(&op);
 */
#ifndef KS_BENCH_OP_H
#define KS_BENCH_OP_H

#include "core/base/base.h"
#include "kernels/ops.h"

/* What the operations use of it is in bench_op_make.c; 0 elsewhere. */
typedef struct {
  int64_t rows, cols; /* activations; similarity: queries and their length */
  int64_t n_out;      /* linear, head: cols is n_in */
  int64_t n_keys;     /* similarity, farthest first; attention: of each sequence */
  int64_t n_queries;  /* attention: of each sequence */
  int64_t n_heads, n_kv_heads, head_dim;
  int64_t n_adapters; /* linear, adamw */
  int32_t rank;
  int64_t best_k;
  int kind; /* pooling, entropy, metric; sample: 0 greedy, 1 top-p; head_loss: 0 and its gradient, 1 losses alone */
  ks_dtype stored; /* similarity: type of the embeddings */
} ks_bench_dims;

typedef enum {
  KS_ARRAY_F32,
  KS_ARRAY_BF16,
  KS_ARRAY_I8,
  KS_ARRAY_F64,
  KS_ARRAY_I32,
  KS_ARRAY_I64
} ks_array_type;
typedef enum {
  KS_ARRAY_INPUT,
  KS_ARRAY_OUTPUT,   /* compared; all NaN before */
  KS_ARRAY_STATE,    /* read and written, compared */
  KS_ARRAY_CONSUMED, /* read, and worth nothing after */
  KS_ARRAY_SCRATCH,  /* written, its content is nobody's business */
  KS_ARRAY_ORDER     /* output that equal results may give in another order: compared only with itself */
} ks_array_role;

typedef struct {
  void *p; /* backend memory, or host memory */
  int64_t n;
  ks_array_type type;
  ks_array_role role;
  bool is_host;
  double low, high; /* filled uniformly between these; whole: whole numbers of [low, high] */
  bool whole;
  uint64_t seed;
} ks_bench_array;

enum { KS_BENCH_MOST_ARRAYS = 24, KS_BENCH_MOST_BLOCKS = 16 };

/* Necessary bytes and floating-point operations of a call (bench_cost.c). */
typedef struct {
  double flops, bytes;
} ks_bench_cost;

typedef struct ks_bench_op ks_bench_op;
typedef struct {
  const char *name;
  ks_status (*make)(ks_bench_op *o);
  ks_status (*run)(ks_bench_op *o);
  ks_bench_cost (*cost)(const ks_bench_op *o);
} ks_bench_op_kind;
extern const ks_bench_op_kind ks_bench_op_kinds[]; /* every operation of KS_OPS_MAP; ends with name NULL */

struct ks_bench_op {
  ks_ctx *ctx;
  const ks_bench_op_kind *kind;
  ks_bench_dims d;
  ks_dtype weight_dtype;
  bool bf16;          /* activations hold bf16 values, whatever their type here */
  double chain;       /* of the longest sum */
  int n_roundings;    /* results in between that are stored as activations */
  bool waits;         /* host outputs are there when the call returns */
  int64_t may_differ; /* of whole-number outputs */
  ks_bench_array arrays[KS_BENCH_MOST_ARRAYS];
  int n_arrays;
  void *blocks[KS_BENCH_MOST_BLOCKS]; /* host memory that arguments point into */
  int n_blocks;
  ks_weight *w;
  union {
    ks_embed_args embed;
    ks_linear_args linear;
    ks_rmsnorm_args norm;
    ks_rope_args rope;
    ks_swiglu_args swiglu;
    ks_rows_args rows;
    ks_attention_args attention;
    ks_head_loss_args head;
    ks_sample_args sample;
    ks_adamw_args adamw;
    ks_pool_args pool;
    ks_entropy_args entropy;
    ks_similarity_args similarity;
  } a;
  void *out[2]; /* what similarity writes to */
  const int32_t *groups[2];
};

/* weight_dtype: of frozen weights; activations are rounded to bf16 values unless it is F32. */
ks_status ks_bench_op_make(ks_ctx *ctx, const ks_bench_op_kind *kind, const ks_bench_dims *dims,
                           ks_dtype weight_dtype, ks_bench_op *out);
ks_status ks_bench_op_run(ks_bench_op *o);
ks_status ks_bench_op_reset(ks_bench_op *o);
void ks_bench_op_free(ks_bench_op *o); /* NULL-safe; may follow a failed make */

/* Results of the last run, copied: free() each of the n_arrays pointers (NULL: no result). */
ks_status ks_bench_op_results(const ks_bench_op *o, void *results[KS_BENCH_MOST_ARRAYS]);

/* Whether o's results are those of the CPU, `ref`, within the tolerance of bench_check.c; *why: first
 * difference. ref may have fewer rows (sequences, adapters, queries): they are the first of o's. */
ks_status ks_bench_op_compare(const ks_bench_op *o, const ks_bench_op *ref, bool *same, char *why,
                              size_t size);
/* Whether they are the same bits as `before` (of ks_bench_op_results). */
ks_status ks_bench_op_unchanged(const ks_bench_op *o, void *const before[KS_BENCH_MOST_ARRAYS], bool *same,
                                char *why, size_t size);

/* Whether no element of these results (of ks_bench_op_results) is NaN, as all were before the first run. */
bool ks_bench_op_is_filled(const ks_bench_op *o, void *const results[KS_BENCH_MOST_ARRAYS], char *why,
                           size_t size);

ks_bench_cost ks_bench_op_cost(const ks_bench_op *o);
/* Bytes of a frozen matrix as stored. */
double ks_bench_weight_bytes(ks_dtype t, int64_t n_out, int64_t n_in);

/* For bench_op_make.c. */
#define X(name, what)                                                                                        \
  ks_status ks_bench_make_##name(ks_bench_op *o);                                                            \
  ks_status ks_bench_run_##name(ks_bench_op *o);                                                             \
  ks_bench_cost ks_bench_cost_##name(const ks_bench_op *o);
KS_OPS_MAP(X)
#undef X
/* Arrays, filled; *p (a pointer of any type) is set. `act`: an activation. */
ks_status ks_bench_array_act(ks_bench_op *o, ks_array_role role, int64_t n, double low, double high, void *p);
ks_status ks_bench_array_of(ks_bench_op *o, ks_bench_array like, void *p);
/* Host memory for arguments, zeroed. */
ks_status ks_bench_block(ks_bench_op *o, size_t n, size_t size, void *p);
/* A weight [n_out, n_in] of uniform values with standard deviation 1 / sqrt(n_in); prepared for backward. */
ks_status ks_bench_weight(ks_bench_op *o, int64_t n_out, int64_t n_in);

#endif
