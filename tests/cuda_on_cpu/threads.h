/* Runs the threads of a block as fibers of the calling thread (threads.c); used by runtime.c. */
#ifndef KS_SHIM_THREADS_IMPL_H
#define KS_SHIM_THREADS_IMPL_H

#include "ks_shim.h"
#include <stdbool.h>

typedef struct {
  const char *op;
  const void *func;
  void (*invoke)(const void *func, void **args);
  void **args;
  dim3 grid, block;
  size_t smem_bytes;
} ks_shim_kernel;

/* False when the launch failed; ks_shim_report() then says how. */
bool ks_shim_run(const ks_shim_kernel *kernel);
uint64_t ks_shim_switch_count(void);
void ks_shim_set_report(const char *text);

#endif
