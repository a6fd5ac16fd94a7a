/* The shared memory of the block that runs, and what asynchronous copies and wgmma see of it. Compiled as threads.c is: a failure
 * leaves a thread's stack. */
#include "ks_shim_threads.h"
#include "threads.h"
#include <stdlib.h>

enum { MAX_ARRAYS = 64, SMEM_FIRST = 1024 };

static struct {
  void *array[MAX_ARRAYS];
  void *fenced[MAX_ARRAYS]; /* as ks_shim_smem_async sees it; NULL: nothing yet */
  size_t bytes[MAX_ARRAYS], at[MAX_ARRAYS], used, limit;
  int n;
} smem;

void ks_shim_smem_begin(size_t limit) {
  smem.limit = limit;
  smem.used = 0;
  smem.n = 0;
}

void ks_shim_smem_end(void) {
  for (int k = 0; k < smem.n; k++)
    free(smem.array[k]), free(smem.fenced[k]);
  smem.n = 0;
}

void *ks_shim_smem(int k, size_t bytes) {
  if (k < smem.n) {
    if (smem.bytes[k] != bytes)
      ks_shim_fail("array %d of shared memory has %zu bytes for this thread and %zu for another", k, bytes,
                   smem.bytes[k]);
    return smem.array[k];
  }
  const size_t limit = smem.limit, at = smem.used;
  smem.used += (bytes + 15) & ~(size_t)15;
  if (smem.used > limit || k >= MAX_ARRAYS)
    ks_shim_fail("the first %d arrays of shared memory take %zu bytes, the launch gives %zu", k + 1,
                 smem.used, limit);
  void *p = malloc(bytes);
  if (!p) ks_shim_fail("no memory for %zu bytes of shared memory", bytes);
  memset(p, 0xff, bytes);
  smem.array[k] = p;
  smem.fenced[k] = NULL;
  smem.at[k] = at;
  smem.bytes[k] = bytes;
  smem.n = k + 1;
  return p;
}

uint32_t ks_shim_smem_address(const void *p) {
  for (int k = 0; k < smem.n; k++) {
    const size_t at = (size_t)((const char *)p - (const char *)smem.array[k]);
    if ((const char *)p >= (const char *)smem.array[k] && at < smem.bytes[k])
      return (uint32_t)(SMEM_FIRST + smem.at[k] + at);
  }
  ks_shim_fail("%p lies in no array of shared memory", p);
}

/* The array that holds these bytes, and where in it. */
static int find_array(uint32_t address, size_t bytes, size_t *at) {
  for (int k = 0; k < smem.n; k++) {
    *at = (size_t)address - SMEM_FIRST - smem.at[k];
    if (address >= SMEM_FIRST + smem.at[k] && *at < smem.bytes[k] && bytes <= smem.bytes[k] - *at) return k;
  }
  ks_shim_fail("%zu bytes at address %u of shared memory lie in no array", bytes, address);
}

static char *fenced_of(int k) {
  if (!smem.fenced[k]) {
    smem.fenced[k] = malloc(smem.bytes[k]);
    if (!smem.fenced[k]) ks_shim_fail("no memory for %zu bytes of shared memory", smem.bytes[k]);
    memset(smem.fenced[k], 0xff, smem.bytes[k]);
  }
  return smem.fenced[k];
}

void *ks_shim_smem_pointer(uint32_t address, size_t bytes) {
  size_t at;
  const int k = find_array(address, bytes, &at);
  return (char *)smem.array[k] + at;
}

void *ks_shim_smem_async(uint32_t address, size_t bytes) {
  size_t at;
  const int k = find_array(address, bytes, &at);
  return fenced_of(k) + at;
}

void ks_shim_async_fence(void) {
  for (int k = 0; k < smem.n; k++)
    memcpy(fenced_of(k), smem.array[k], smem.bytes[k]);
}
