/* What the files of the CUDA backend's host side share; operations need kernels/cuda/cuda.h only.
 *
 *   cuda.c    device, context, memory, the backend's table      launch.c  launches, errors, variants
 *   stage.c   pinned rings, late outputs, workspace             step.c    recorded steps and their graphs
 *   blas.c    cuBLASLt                            activity.c  spans of work
 *
 * The way of an operation: ks_cuda_launch, ks_cuda_matmul, ks_cuda_fill and ks_cuda_copy check and describe
 * what is wanted as a ks_cuda_op and give it to ks_cuda_queue (step.c), which executes it (ks_cuda_execute),
 * writes it into the step's list, or only compares it with what the list holds.
 */
#ifndef KS_CUDA_IMPL_H
#define KS_CUDA_IMPL_H

#include "kernels/cuda/cuda.h"

/* ---------------------------------------------------------------- queued work */

typedef enum { KS_CUDA_OP_LAUNCH = 0, KS_CUDA_OP_MATMUL, KS_CUDA_OP_FILL, KS_CUDA_OP_COPY } ks_cuda_op_kind;
typedef struct {
  ks_cuda_op_kind kind;
  union {
    ks_cuda_launch_params launch;
    ks_cuda_matmul_params matmul;
    struct {
      void *dst;
      size_t bytes;
      int byte;
    } fill;
    struct {
      void *dst;
      const void *src;
      size_t bytes;
    } copy;
  } u;
} ks_cuda_op;
/* Puts it on the stream now. */
ks_status ks_cuda_execute(ks_ctx *ctx, const ks_cuda_op *op);
/* On the stream, or into the step's list. */
ks_status ks_cuda_queue(ks_ctx *ctx, const ks_cuda_op *op);
ks_status ks_cuda_launch_now(ks_ctx *ctx, const ks_cuda_launch_params *p); /* launch.c */
ks_status ks_cuda_matmul_now(ks_ctx *ctx, const ks_cuda_matmul_params *p); /* blas.c */

/* ---------------------------------------------------------------- pinned rings (stage.c) */

/* Pinned host memory that the device copies from, with device memory beside it where `with_device`. What was
 * written stays until its copies are done and life_bytes more were asked for. Grows by segments. */
typedef struct {
  unsigned char *host, *device;
  size_t size, used;
  cudaEvent_t left; /* recorded when the ring goes on to the next segment */
  uint64_t stamp;   /* ring.total then */
} ks_cuda_segment;
typedef struct {
  ks_cuda_segment *segments; /* oldest first; the last is the one being filled */
  int n_segments, cap_segments;
  uint64_t total; /* bytes asked for so far */
  size_t life_bytes;
  bool with_device;
} ks_cuda_ring;
/* Room for `bytes`, aligned to 64; device NULL when the ring has none. */
ks_status ks_cuda_ring_take(ks_ctx *ctx, ks_cuda_ring *ring, size_t bytes, void **host, void **device);
void ks_cuda_ring_free(ks_ctx *ctx, ks_cuda_ring *ring);
/* Queues host -> device by way of the upload ring; the host array may be changed at once. */
ks_status ks_cuda_send(ks_ctx *ctx, const char *op, void *device, const void *host, size_t bytes);

/* Late outputs: pinned memory until the next ks_sync. */
typedef struct {
  void *host;
  const void *pinned;
  size_t bytes;
} ks_cuda_late_entry;
typedef struct {
  unsigned char *host;
  size_t size, used;
} ks_cuda_late_block;
typedef struct {
  ks_cuda_late_entry *entries;
  size_t n_entries, cap_entries;
  ks_cuda_late_block *blocks;
  int n_blocks, cap_blocks;
  size_t pending_bytes;
} ks_cuda_late;
/* Queues device -> pinned memory, and notes that [at, at + bytes) of it goes to `host`. */
ks_status ks_cuda_late_fetch(ks_ctx *ctx, const void *device, size_t bytes, void **pinned);
ks_status ks_cuda_late_note(ks_ctx *ctx, void *host, const void *pinned, size_t bytes);
void ks_cuda_late_drop(ks_ctx *ctx);
void ks_cuda_stage_exit(ks_ctx *ctx);

/* ---------------------------------------------------------------- steps (step.c) */

typedef struct ks_cuda_steps ks_cuda_steps;
/* True between ks_step_begin and ks_step_end when lists are kept. */
bool ks_cuda_in_step(const ks_ctx *ctx);
ks_status ks_cuda_step_stage(ks_ctx *ctx, const void *host, size_t bytes, const void **device);
ks_status ks_cuda_step_deliver(ks_ctx *ctx, void *host, const void *device, size_t bytes);
/* Queues what a step holds back, so that memory it uses may be freed. */
ks_status ks_cuda_step_flush(ks_ctx *ctx);
ks_status ks_cuda_step_begin(ks_ctx *ctx, uint64_t key);
ks_status ks_cuda_step_end(ks_ctx *ctx);
void ks_cuda_steps_exit(ks_ctx *ctx);

/* Whether programs built for archs, "75-real 80-real 110" (each as in CMAKE_CUDA_ARCHITECTURES; "": whatever there is), run
 * on a device. Machine code runs on its own major version from its own minor version on, that of a Tegra chip on
 * this alone, PTX on everything newer. */
bool ks_cuda_archs_serve(const char *archs, int capability); /* cuda.c */

/* ---------------------------------------------------------------- activity (activity.c) */

typedef enum { KS_CUDA_SPAN_NONE = 0, KS_CUDA_SPAN_OPEN, KS_CUDA_SPAN_ENDED } ks_cuda_span;
/* Before work is put on the stream. */
ks_status ks_cuda_activity_begin(ks_ctx *ctx);
/* Before its results are fetched or waited for; work that follows goes on with the span. */
ks_status ks_cuda_activity_end(ks_ctx *ctx);
/* After a wait for the whole stream. */
void ks_cuda_activity_waited(ks_ctx *ctx);
void ks_cuda_activity_exit(ks_ctx *ctx);
void ks_cuda_activity_of(const ks_ctx *ctx, ks_activity *out);

/* ---------------------------------------------------------------- products (blas.c) */

typedef struct ks_cuda_blas ks_cuda_blas;
/* Loads the library; when there is none, ks_cuda_has_blas is false and nothing fails. */
ks_status ks_cuda_blas_init(ks_ctx *ctx);
void ks_cuda_blas_exit(ks_ctx *ctx);
/* Device memory that the first product will still ask for. */
size_t ks_cuda_blas_pending_bytes(const ks_ctx *ctx);
const char *ks_cuda_blas_missing(const ks_ctx *ctx); /* why there is none */
/* "cuBLASLt 13.1.0" (in text), "no cuBLASLt". */
const char *ks_cuda_blas_name(const ks_ctx *ctx, char text[32]);

/* ---------------------------------------------------------------- context */

enum { KS_CUDA_SHARED_DEFAULT = 48 << 10, KS_CUDA_MAX_ARGS = 128 };

/* Kernels whose limit of shared memory was raised; open addressing. */
typedef struct {
  const void *func;
} ks_cuda_limit;

typedef struct {
  cudaStream_t stream;
  ks_cuda_device device;
  char isa_name[16];
  bool sync_launches;                         /* KS_CUDA_SYNC=1 */
  bool no_graphs;                             /* KS_CUDA_NO_GRAPHS=1 */
  bool early_launches;                        /* KS_CUDA_PDL=1, on sm_90 and later, CUDA 12.3 */
  bool capturing;                             /* the stream can then not be asked how it is */
  ks_cuda_variant chosen[KS_CUDA_N_VARIANTS]; /* at the place of an operation's first variant */
  ks_cuda_limit *limits;
  size_t n_limits, cap_limits;
  ks_cuda_ring uploads, staging;
  ks_cuda_late late;
  void *workspace;
  size_t workspace_bytes;
  unsigned *counters;
  ks_cuda_blas *blas;
  int integrated; /* the device has the system's memory */
  ks_cuda_steps *steps;
  ks_cuda_counts counts;
  ks_activity activity; /* launches are in counts */
  ks_cuda_span span;
  int64_t n_spans; /* that were read */
  cudaEvent_t span_from, span_to;
  char broken[512]; /* why no call can succeed any more */
} ks_cuda;

static inline ks_cuda *ks_cuda_of(const ks_ctx *ctx) {
  return ctx->impl;
}
/* KS_EDEVICE with the first failure's message once the device is lost. */
ks_status ks_cuda_alive(const ks_ctx *ctx, const char *op);
/* A runtime call that failed, as a status with a hint. */
ks_status ks_cuda_failed(ks_ctx *ctx, const char *op, const char *call, cudaError_t e);
#define KS_CUDA_TRY(ctx, op, expr)                                                                           \
  do {                                                                                                       \
    cudaError_t ks_cuda_try_ = (expr);                                                                       \
    if (ks_cuda_try_ != cudaSuccess) return ks_cuda_failed(ctx, op, #expr, ks_cuda_try_);                    \
  } while (0)
/* Device memory, accounted; the message says how much there is. */
ks_status ks_cuda_alloc(ks_ctx *ctx, const char *what, size_t bytes, void **out);
/* "1.5 GiB" */
const char *ks_cuda_human(char text[32], size_t bytes);
ks_status ks_cuda_choose_variants(ks_ctx *ctx, const char *wanted); /* launch.c */
/* *p = array with room for n more than `used` elements of `size` bytes. */
ks_status ks_cuda_grow(void *p, size_t *cap, size_t wanted, size_t size, const char *what);

#endif
