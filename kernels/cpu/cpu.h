/* What the CPU backend's operations share. Each operation is one file kernels/cpu/<op>.c of static functions,
 * included by isa_unit.c, which is compiled once for each instruction set. Vectors: vec.h. */
#ifndef KS_CPU_H
#define KS_CPU_H

#include "kernels/backend.h"
#include "kernels/cpu/vec.h"
#include <omp.h>

/* Below this many vectorised operations a region stays on one thread. */
#define KS_CPU_PARALLEL_FLOPS 400000

/* Workspaces of a context that all threads share. */
typedef enum {
  KS_CPU_TRANSPOSED, /* a weight that was not prepared for backward */
  KS_CPU_DROPOUT,    /* a layer's dropout mask */
  KS_CPU_N_SHARED
} ks_cpu_shared;

/* The backend's own state: ctx->impl. */
typedef struct {
  void *scratch; /* n_threads slices of scratch_bytes each */
  size_t scratch_bytes;
  void *shared[KS_CPU_N_SHARED]; /* of all threads */
  size_t shared_bytes[KS_CPU_N_SHARED];
} ks_cpu;

/* Activations are float32 here. */
KS_INLINE const float *ks_in(const void *p) {
  return p;
}
KS_INLINE float *ks_out(void *p) {
  return p;
}

/* Functions of all instruction sets (cpu.c). */
ks_status ks_cpu_probe(void);
ks_status ks_cpu_ctx_init(ks_ctx *ctx, const ks_ctx_params *params);
void ks_cpu_ctx_exit(ks_ctx *ctx);
ks_status ks_cpu_mem_alloc(ks_ctx *ctx, size_t bytes, void **out);
void ks_cpu_mem_free(ks_ctx *ctx, void *p);
ks_status ks_cpu_mem_copy_in(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
ks_status ks_cpu_mem_zero(ks_ctx *ctx, void *p, size_t bytes);

/* Zeroed, 64-byte aligned, in huge pages when large; free() it. KS_ENOMEM. */
ks_status ks_cpu_alloc(size_t bytes, const char *what, void **out);

/* Memory for each thread of the next parallel region, kept and reused; call it before the region. Contents
 * are undefined. Slices are 64-byte aligned. KS_ENOMEM. */
ks_status ks_cpu_scratch_reserve(ks_ctx *ctx, size_t bytes_per_thread);
/* The same for an array of all threads. */
ks_status ks_cpu_shared_reserve(ks_ctx *ctx, ks_cpu_shared which, size_t bytes, void **out);
KS_INLINE void *ks_cpu_scratch(const ks_ctx *ctx, int thread) {
  const ks_cpu *cpu = ctx->impl;
  return (unsigned char *)cpu->scratch + (size_t)thread * cpu->scratch_bytes;
}

/* How many threads to use for work of about `flops` simple operations in all: one when waking the others
 * would cost more than it brings (some 20 microseconds of work).
 *
 *   #pragma omp parallel for num_threads(ks_cpu_threads(ctx, 10 * n)) schedule(static)
 *
 * A team may turn out smaller than asked for: nothing may depend on its size. */
KS_INLINE int ks_cpu_threads(const ks_ctx *ctx, int64_t flops) {
  return flops < KS_CPU_PARALLEL_FLOPS ? 1 : ctx->n_threads;
}

#endif
