/* Runs the threads of a block as fibers of the calling thread (threads.c, shared.c); used by runtime.c. */
#ifndef KS_SHIM_THREADS_IMPL_H
#define KS_SHIM_THREADS_IMPL_H

#include "ks_shim.h"
#include <stdbool.h>
#include <string.h>

typedef struct {
  const char *op;
  const void *func;
  void (*invoke)(const void *func, void **args);
  void **args;
  dim3 grid, block;
  size_t smem_bytes;
  bool early; /* above its ks_grid_wait, memory that its graph changes is out of reach */
} ks_shim_kernel;

/* Between threads.c and hopper.c: what one of them needs of the other while a block runs. */
int ks_shim_thread(void); /* number of the running thread in its block */
int ks_shim_order(void);
/* The running thread waits until ks_shim_barrier_is_past(b, parity). */
void ks_shim_wait_barrier(const void *b, unsigned parity);
bool ks_shim_barrier_is_past(const void *b, unsigned parity);
/* Nothing can run: makes one of the copies under way; false when there are none. */
bool ks_shim_hopper_advance(void);
void ks_shim_hopper_begin(int n_threads);
/* What is wrong with how a block ends, or NULL. */
const char *ks_shim_hopper_end(void);

/* shared.c: the shared memory of a block, of at most `limit` bytes. */
void ks_shim_smem_begin(size_t limit);
void ks_shim_smem_end(void);

/* device.c: poisons what the graph of an early kernel changes, or gives it back. */
void ks_shim_hide_changing(bool on);

/* False when the launch failed; ks_shim_report() then says how. */
bool ks_shim_run(const ks_shim_kernel *kernel);
uint64_t ks_shim_switch_count(void);
void ks_shim_set_report(const char *text);

/* Towards zero, as tensor cores round their sums. */
static inline float ks_shim_truncated(double x) {
  float f = (float)x;
  if (__builtin_fabs((double)f) <= __builtin_fabs(x) || x != x || __builtin_isinf(f)) return f;
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  u--;
  memcpy(&f, &u, sizeof f);
  return f;
}

#endif
