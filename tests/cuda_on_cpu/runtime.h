/* What the files of the shim's host side share: device.c and runtime.c. */
#ifndef KS_SHIM_RUNTIME_H
#define KS_SHIM_RUNTIME_H

#include "ks_shim.h"
#include <stdbool.h>

typedef struct {
  char *p;
  size_t bytes;
  bool pinned;
  bool changes;  /* device memory: a graph with early launches was seen to write it */
  uint64_t hash; /* before such a graph */
} ks_shim_allocation;
/* The piece of device or pinned memory that holds [p, p + bytes], or NULL; its end may be pointed to. */
ks_shim_allocation *ks_shim_find(const void *p, size_t bytes);
/* Device memory is poisoned but between these two, which nest. */
void ks_shim_open_device(void);
void ks_shim_close_device(void);
/* Before and behind a graph with early launches: finds what it changes. */
void ks_shim_watch_begin(void);
void ks_shim_watch_end(void);
/* Refused, and the end of it, while a stream captures otherwise than relaxed: calls that may have the driver wait. */
cudaError_t ks_shim_unsafe(void);

/* The error that ended the device, or success. */
extern cudaError_t ks_shim_sticky;
/* What a call returns: e, or what ended the device before; cudaGetLastError() gives it once more. */
cudaError_t ks_shim_result(cudaError_t e);
/* Shared memory that a kernel may have. */
size_t ks_shim_smem_limit(const void *func);
/* Runs all that is queued, on every stream. */
cudaError_t ks_shim_run_all(void);
extern ks_shim_counts ks_shim_counted;

#endif
