/* The CUDA backend's host side: what the operations (kernels/cuda/<op>.cu) stand on. C and C++.
 *
 *   extern "C" ks_status ks_cuda_rope(ks_ctx *ctx, const ks_rope_args *a) {
 *     const int32_t *positions;
 *     KS_TRY(ks_cuda_stage(ctx, a->positions, n_bytes, (const void **)&positions));     // host array -> device
 *     return ks_launch(ctx, "rope", rope_kernel<float>, grid, block, 0, ...);           // launch.cuh
 *   }
 *
 * Everything is queued on one stream in the order of the calls; nothing here waits for the device except ks_cuda_finish,
 * ks_sync and ks_mem_download.
 *
 * Steps. Between ks_step_begin(ctx, key) and ks_step_end the backend keeps a list of everything that was queued (launches with
 * the bytes of their arguments, products, fills, copies). When the same key comes again, operations are compared with the list
 * instead of being queued, and the end of the step launches the list as one CUDA graph. A difference (another shape, another
 * pointer) queues what was held back, from the list, and goes on eagerly; the step is then recorded anew. Arrays that the host
 * describes (positions, segments, ...) may differ in content: they are staged again and uploaded in one copy. Launch
 * arguments must therefore hold everything that a kernel is told, and no kernel argument may carry host data that changes from
 * step to step (dropout keys, counters, learning rates: stage them). Structs among them must not have
 * padding: it is compared too.
 *
 * Environment
 *   KS_CUDA_SYNC=1       every launch is waited for; steps are not recorded
 *   KS_CUDA_NO_GRAPHS=1  steps are not recorded
 *   KS_CUDA_PDL=1        kernels of a recorded step that can (`early` below) begin while those before them end: their blocks
 *                        take up the room that is left and read weights. sm_90 and later, CUDA 12.3; not measured yet, so not
 *                        the default
 *   KS_CUDA_NO_BLAS=1    as if cuBLASLt were not there;  KS_CUBLASLT=<file>: the library to load
 */
#ifndef KS_CUDA_H
#define KS_CUDA_H

#include "kernels/backend.h"
#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- arrays that the host describes */

/* Puts a copy of `bytes` at `host` into device memory, at *device, aligned to 16 bytes; the host array may be changed or freed
 * at once. Within a step the same bytes staged again (each layer stages the same positions) share one copy. The copy lives
 * until the end of the step, outside a step until 64 MiB were staged after it. bytes 0: *device is NULL. */
ks_status ks_cuda_stage(ks_ctx *ctx, const void *host, size_t bytes, const void **device);

/* Device memory for the operation that asks, until the next operation of this context begins (ks_cuda_workspace is called at
 * most once by an operation; carve it). Aligned to 256 bytes, contents undefined. Growing it waits for the device, so that it
 * happens in the first step only. */
ks_status ks_cuda_workspace(ks_ctx *ctx, size_t bytes, void **device);

/* KS_CUDA_N_COUNTERS integers in device memory, all 0: for blocks that count who is the last of them. A kernel leaves those it
 * used at 0, so that no launch needs a fill before it. */
enum { KS_CUDA_N_COUNTERS = 1 << 14 };
ks_status ks_cuda_counters(ks_ctx *ctx, unsigned **device);

/* Queues the delivery of `bytes` at `device` to `host`, which receives them at the next ks_sync (a "late" output of ops.h). */
ks_status ks_cuda_deliver(ks_ctx *ctx, void *host, const void *device, size_t bytes);
/* Queued fill and copy inside device memory. */
ks_status ks_cuda_fill(ks_ctx *ctx, void *device, int byte, size_t bytes);
ks_status ks_cuda_copy(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
/* Waits for all that was queued and brings the late outputs. Not inside a step (KS_EINTERNAL). For operations whose host
 * outputs are not late (entropy, similarity). */
ks_status ks_cuda_finish(ks_ctx *ctx);

/* ---------------------------------------------------------------- launches (through launch.cuh) */

/* Calls kernel `func` with the arguments that `args` points to: only the shim needs it. */
typedef void (*ks_cuda_invoke)(const void *func, void **args);
typedef struct {
  const char *op;  /* for messages and profiles: "rope" */
  const void *func;
  ks_cuda_invoke invoke;
  dim3 grid, block;
  size_t smem_bytes; /* above 48 KiB the limit is raised, once a kernel */
  void **args;       /* [n_args] */
  const size_t *arg_sizes;
  int n_args;
  bool early; /* may begin before earlier kernels have ended; it waits for them itself: launch.cuh */
} ks_cuda_launch_params;
/* An empty grid launches nothing. A grid or shared memory that the device cannot take: KS_EUNSUPPORTED with op and sizes.
 * A failed launch: KS_EDEVICE with op, grid, block, shared memory and a hint. With KS_CUDA_SYNC=1 in the environment every
 * launch is waited for, so that the message names the kernel that failed. */
ks_status ks_cuda_launch(ks_ctx *ctx, const ks_cuda_launch_params *p);

/* ---------------------------------------------------------------- dense products by cuBLASLt */

/* y[i, :] = sum_j x[i, j] W[:, j]  (forward, w_transposed: W [n_out, n_in], y [n_rows, n_out]), or
 * y[i, :] = sum_j x[i, j] W[j, :]  (input gradient: x [n_rows, n_out], y [n_rows, n_in]), float32 accumulation.
 * The algorithm is fixed by shape of W, direction and types, never by n_rows, and splits no reduction: a row's result does not
 * depend on its batch. Workspace is the context's own. KS_EENV when cuBLASLt could not be loaded (ks_cuda_has_blas). */
typedef struct {
  const void *x, *w;
  void *y;
  const void *bias;  /* forward only: [n_out], of y's type, or NULL */
  int64_t n_rows, n_out, n_in;
  bool w_transposed; /* forward */
  const void *c;     /* NULL, or like y, added: may be y itself */
  ks_dtype x_dtype, w_dtype, y_dtype; /* F32 or BF16; x and w alike */
} ks_cuda_matmul_params;
ks_status ks_cuda_matmul(ks_ctx *ctx, const ks_cuda_matmul_params *p);
/* False: no libcublasLt on this machine (or KS_CUDA_NO_BLAS=1); operations then use the kernels of this project. */
bool ks_cuda_has_blas(const ks_ctx *ctx);
/* Whether cuBLASLt has an algorithm for this product: a library may refuse rows that are aligned to 2 bytes only, say. Asked once
 * for each shape and row count. Linear layers take their own kernels for what it refuses; ks_cuda_matmul itself fails then. */
ks_status ks_cuda_blas_takes(ks_ctx *ctx, const ks_cuda_matmul_params *p, bool *out);

/* ---------------------------------------------------------------- device, variants */

typedef struct {
  char name[128];
  int major, minor; /* compute capability */
  int n_sm, smem_per_block, smem_per_sm, l2_bytes;
  size_t total_bytes;
} ks_cuda_device;
const ks_cuda_device *ks_cuda_device_of(const ks_ctx *ctx);

/* What the host side did so far, for tests and profiles. */
typedef struct {
  int64_t launches, matmuls;                /* put on the stream one by one */
  int64_t stages, stages_shared;            /* calls of ks_cuda_stage; those that found their bytes there */
  int64_t steps_recorded, steps_replayed;   /* steps that went one by one; as a whole */
  int64_t steps_differing;                  /* of the recorded ones: had a list that did not fit */
  int64_t graphs;                           /* CUDA graphs made */
  int64_t graphs_failed;                    /* steps that could not become one: they go one by one for good */
  int64_t blas_exceptions; /* products that could not use their weight's algorithm: the row count, or arrays at odd addresses */
} ks_cuda_counts;
const ks_cuda_counts *ks_cuda_counts_of(const ks_ctx *ctx);

/* X(operation, variant, on float32, on bf16): the first variant of an operation that suits the type of
 * activations is its default. Selected by ks_ctx_params.variants,
 * "attention_forward=simt,linear_forward=mma". */
#define KS_CUDA_VARIANT_MAP(X) KS_CUDA_VARIANTS(X)
#include "kernels/cuda/variants.def"
typedef enum {
#define X(op, name, f32, bf16) KS_CUDA_##op##_##name,
  KS_CUDA_VARIANT_MAP(X)
#undef X
      KS_CUDA_N_VARIANTS
} ks_cuda_variant;
/* The chosen variant of an operation: ks_cuda_variant_of(ctx, "linear_forward"). */
ks_cuda_variant ks_cuda_variant_of(const ks_ctx *ctx, const char *op);

/* ---------------------------------------------------------------- weights (weight.cu) */

/* w->impl of this backend. F32, BF16: `values` [n_out, n_in] row-major, and no second layout. Blocks (kernels/quant.h): codes
 * [n_out, n_in rounded up to whole blocks], scales one a block. */
typedef struct {
  void *values;
  void *scales; /* NULL: not in blocks */
  float *bias;  /* [n_out] float32, or NULL */
  void *bias_act; /* the same in the type of activations */
  int64_t row_bytes;      /* of values */
  int64_t scales_per_row;
} ks_cuda_weight;

/* ---------------------------------------------------------------- operations */

#define KS_CUDA_OP_MAP(X)                                                                                    \
  X(embed_forward, ks_embed_args)                                                                            \
  X(linear_forward, ks_linear_args)                                                                          \
  X(linear_backward, ks_linear_args)                                                                         \
  X(linears_forward, ks_linears_args)                                                                        \
  X(linears_backward, ks_linears_args)                                                                       \
  X(rmsnorm_forward, ks_rmsnorm_args)                                                                        \
  X(rmsnorm_backward, ks_rmsnorm_args)                                                                       \
  X(rope, ks_rope_args)                                                                                      \
  X(rope_store, ks_rope_store_args)                                                                          \
  X(swiglu_forward, ks_swiglu_args)                                                                          \
  X(swiglu_backward, ks_swiglu_args)                                                                         \
  X(rows_gather, ks_rows_args)                                                                               \
  X(rows_scatter, ks_rows_args)                                                                              \
  X(attention_forward, ks_attention_args)                                                                    \
  X(attention_backward, ks_attention_args)                                                                   \
  X(head_loss, ks_head_loss_args)                                                                            \
  X(sample, ks_sample_args)                                                                                  \
  X(adamw, ks_adamw_args)                                                                                    \
  X(pool, ks_pool_args)                                                                                      \
  X(entropy, ks_entropy_args)
#define X(op, args) ks_status ks_cuda_##op(ks_ctx *ctx, const args *a);
KS_CUDA_OP_MAP(X)
#undef X
ks_status ks_cuda_weight_create(ks_ctx *ctx, const ks_weight_params *params, ks_weight *w);
void ks_cuda_weight_destroy(ks_ctx *ctx, ks_weight *w);
size_t ks_cuda_head_loss_workspace(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows);
ks_status ks_cuda_similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s);
ks_status ks_cuda_similarity_top(ks_ctx *ctx, const ks_similarity_args *a, int64_t best_k, float *scores, int64_t *index);
ks_status ks_cuda_similarity_mean(ks_ctx *ctx, const ks_similarity_args *a, const ks_similarity_groups *groups, double *mean,
                                  int64_t *count);
ks_status ks_cuda_similarity_farthest_first(ks_ctx *ctx, const ks_similarity_args *a, int64_t n_pick, int64_t first,
                                            int64_t *picked);

#ifdef __cplusplus
}
#endif
#endif
