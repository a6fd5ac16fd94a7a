/* The shim's device: controls, errors, properties, memory. */
#include "runtime.h"
#include "threads.h"
#include <sanitizer/asan_interface.h>
#include <stdlib.h>
#include <string.h>

static struct {
  size_t total, used, pinned, smem_optin;
  int major, minor, n_sm;
} device = {.total = (size_t)1 << 30, .smem_optin = 99 << 10, .major = 8, .minor = 9, .n_sm = 4};
static int is_hopper;
enum { SMEM_DEFAULT = 48 << 10 };

static ks_shim_allocation *allocations;
static size_t n_allocations, cap_allocations;
static int depth; /* of ks_shim_open_device */
static cudaError_t last;
cudaError_t ks_shim_sticky;
ks_shim_counts ks_shim_counted;

/* Before any context: a program over the shim may be told by its environment which device it has. */
__attribute__((constructor)) static void choose_device(void) {
  const char *turing = getenv("KS_SHIM_TURING"), *hopper = getenv("KS_SHIM_HOPPER");
  is_hopper = hopper && strcmp(hopper, "1") == 0;
  if (!turing || strcmp(turing, "1") != 0) return;
  device.smem_optin = 64 << 10;
  device.major = 7, device.minor = 5;
}

void ks_shim_set_memory(size_t bytes) {
  device.total = bytes;
}
void ks_shim_set_capability(int major, int minor) {
  device.major = major;
  device.minor = minor;
}
void ks_shim_set_smem(size_t bytes_per_block) {
  device.smem_optin = bytes_per_block;
}
void ks_shim_set_multiprocessors(int n) {
  device.n_sm = n;
}
void ks_shim_set_hopper(int on) {
  is_hopper = on;
}
static size_t smem_optin(void) {
  return is_hopper ? (size_t)227 << 10 : device.smem_optin;
}
static int major(void) {
  return is_hopper ? 9 : device.major;
}
static int minor(void) {
  return is_hopper ? 0 : device.minor;
}
size_t ks_shim_memory_used(void) {
  return device.used;
}
size_t ks_shim_pinned_used(void) {
  return device.pinned;
}
ks_shim_counts ks_shim_count(void) {
  ks_shim_counted.switches = ks_shim_switch_count();
  return ks_shim_counted;
}
void ks_shim_clear(void) {
  ks_shim_sticky = last = cudaSuccess;
  ks_shim_set_report("");
}

const char *__asan_default_options(void);
/* Nothing of a kernel's stack outlives it; freed memory is watched for a while, and not for gigabytes. */
const char *__asan_default_options(void) {
  return "detect_stack_use_after_return=0:quarantine_size_mb=32";
}

/* ---------------------------------------------------------------- errors */

cudaError_t ks_shim_result(cudaError_t e) {
  if (ks_shim_sticky) e = ks_shim_sticky;
  if (e) last = e;
  return e;
}

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, code, text)                                                                                  \
  case name:                                                                                                 \
    return #name;
    KS_SHIM_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure && ks_shim_report()[0]) return ks_shim_report();
  switch (error) {
#define X(name, code, text)                                                                                  \
  case name:                                                                                                 \
    return text;
    KS_SHIM_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError(void) {
  return ks_shim_sticky ? ks_shim_sticky : last;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t e = cudaPeekAtLastError();
  last = cudaSuccess;
  return e;
}

/* ---------------------------------------------------------------- device */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return ks_shim_result(cudaSuccess);
}
cudaError_t cudaGetDevice(int *out) {
  *out = 0;
  return ks_shim_result(cudaSuccess);
}
cudaError_t cudaSetDevice(int index) {
  return ks_shim_result(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return ks_shim_result(cudaSuccess);
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int index) {
  if (index != 0) return ks_shim_result(cudaErrorInvalidDevice);
  *prop = (struct cudaDeviceProp){.name = "CUDA on CPU",
                                  .totalGlobalMem = device.total,
                                  .sharedMemPerBlock = SMEM_DEFAULT,
                                  .sharedMemPerBlockOptin = smem_optin(),
                                  .sharedMemPerMultiprocessor = smem_optin() + 1024,
                                  .reservedSharedMemPerBlock = 1024,
                                  .regsPerBlock = 65536,
                                  .regsPerMultiprocessor = 65536,
                                  .warpSize = 32,
                                  .maxThreadsPerBlock = 1024,
                                  .maxThreadsPerMultiProcessor = 1024,
                                  .maxThreadsDim = {1024, 1024, 64},
                                  .maxGridSize = {0x7fffffff, 65535, 65535},
                                  .major = major(),
                                  .minor = minor(),
                                  .multiProcessorCount = device.n_sm,
                                  .l2CacheSize = 4 << 20,
                                  .unifiedAddressing = 1,
                                  .concurrentKernels = 1,
                                  .memoryBusWidth = 256,
                                  .asyncEngineCount = 1};
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int index) {
  struct cudaDeviceProp p;
  cudaError_t e = cudaGetDeviceProperties(&p, index);
  if (e) return e;
  const struct {
    enum cudaDeviceAttr attr;
    int value;
  } known[] = {{cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
               {cudaDevAttrMaxSharedMemoryPerBlock, (int)p.sharedMemPerBlock},
               {cudaDevAttrWarpSize, p.warpSize},
               {cudaDevAttrClockRate, 1000000},
               {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
               {cudaDevAttrIntegrated, p.integrated},
               {cudaDevAttrMemoryClockRate, 1000000},
               {cudaDevAttrGlobalMemoryBusWidth, p.memoryBusWidth},
               {cudaDevAttrL2CacheSize, p.l2CacheSize},
               {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
               {cudaDevAttrComputeCapabilityMajor, p.major},
               {cudaDevAttrComputeCapabilityMinor, p.minor},
               {cudaDevAttrMaxSharedMemoryPerMultiprocessor, (int)p.sharedMemPerMultiprocessor},
               {cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)p.sharedMemPerBlockOptin},
               {cudaDevAttrReservedSharedMemoryPerBlock, (int)p.reservedSharedMemPerBlock}};
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (known[i].attr == attr) {
      *value = known[i].value;
      return ks_shim_result(cudaSuccess);
    }
  return ks_shim_result(cudaErrorInvalidValue);
}

/* ---------------------------------------------------------------- memory */

/* [p, p + bytes] in one ks_shim_allocation; the byte behind the end may be pointed to. */
ks_shim_allocation *ks_shim_find(const void *p, size_t bytes) {
  const char *at = p;
  for (size_t i = 0; i < n_allocations; i++) {
    ks_shim_allocation *a = &allocations[i];
    if (at >= a->p && at <= a->p + a->bytes && bytes <= a->bytes - (size_t)(at - a->p)) return a;
  }
  return NULL;
}

int ks_shim_is_device(const void *p, size_t bytes) {
  const ks_shim_allocation *a = ks_shim_find(p, bytes);
  return a && !a->pinned;
}

/* Of large pieces the ends alone: whoever strays there comes by way of an end, and poisoning costs time. */
static void poison(const ks_shim_allocation *a, bool on) {
  enum { SPAN = 256 << 10 };
  void (*set)(void const volatile *, size_t) =
      on ? __asan_poison_memory_region : __asan_unpoison_memory_region;
  if (a->pinned) return;
  if (a->bytes <= 2 * SPAN) {
    set(a->p, a->bytes);
    return;
  }
  set(a->p, SPAN);
  set(a->p + a->bytes - SPAN, SPAN);
}

static void poison_all(bool on) {
  for (size_t i = 0; i < n_allocations; i++)
    poison(&allocations[i], on);
}

/* Memory that an early kernel may not touch yet; threads.c. */
void ks_shim_hide_changing(bool on) {
  for (size_t i = 0; i < n_allocations; i++)
    if (allocations[i].changes) poison(&allocations[i], on);
}

static uint64_t hash_of(const ks_shim_allocation *a) {
  uint64_t h = a->bytes, word = 0;
  for (size_t at = 0; at < a->bytes; at += sizeof word) {
    memcpy(&word, a->p + at, a->bytes - at < sizeof word ? a->bytes - at : sizeof word);
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  return h;
}

void ks_shim_watch_begin(void) {
  for (size_t i = 0; i < n_allocations; i++)
    if (!allocations[i].pinned && !allocations[i].changes) allocations[i].hash = hash_of(&allocations[i]);
}

void ks_shim_watch_end(void) {
  for (size_t i = 0; i < n_allocations; i++)
    if (!allocations[i].pinned && !allocations[i].changes)
      allocations[i].changes = allocations[i].hash != hash_of(&allocations[i]);
}

void ks_shim_open_device(void) {
  if (depth++ == 0) poison_all(false);
}

void ks_shim_close_device(void) {
  if (--depth == 0) poison_all(true);
}

/* Contents of new memory are nothing to rely on: NaN. Of very large pieces the ends alone. */
static void fill(char *p, size_t bytes) {
  const size_t span = (size_t)2 << 20;
  memset(p, 0xff, bytes < span ? bytes : span);
  if (bytes > span) memset(p + bytes - span, 0xff, span);
}

static cudaError_t allocate(void **out, size_t bytes, bool pinned) {
  *out = NULL;
  const cudaError_t e = ks_shim_unsafe();
  if (ks_shim_sticky || bytes == 0 || e) return ks_shim_result(e);
  if (!pinned && bytes > device.total - (device.used < device.total ? device.used : device.total))
    return ks_shim_result(cudaErrorMemoryAllocation);
  if (n_allocations == cap_allocations) {
    size_t cap = cap_allocations ? 2 * cap_allocations : 64;
    ks_shim_allocation *grown = realloc(allocations, cap * sizeof *grown);
    if (!grown) return ks_shim_result(cudaErrorMemoryAllocation);
    allocations = grown;
    cap_allocations = cap;
  }
  void *p;
  if (posix_memalign(&p, 256, bytes) != 0) return ks_shim_result(cudaErrorMemoryAllocation);
  fill(p, bytes);
  allocations[n_allocations] = (ks_shim_allocation){.p = p, .bytes = bytes, .pinned = pinned};
  poison(&allocations[n_allocations++], true);
  *(pinned ? &device.pinned : &device.used) += bytes;
  *out = p;
  return cudaSuccess;
}

static cudaError_t release(void *p, bool pinned) {
  if (!p) return ks_shim_result(cudaSuccess);
  cudaError_t e = ks_shim_unsafe();
  if (e) return ks_shim_result(e);
  e = ks_shim_run_all();
  for (size_t i = 0; i < n_allocations; i++)
    if (allocations[i].p == p && allocations[i].pinned == pinned) {
      *(pinned ? &device.pinned : &device.used) -= allocations[i].bytes;
      poison(&allocations[i], false);
      allocations[i] = allocations[--n_allocations];
      free(p);
      return ks_shim_result(e);
    }
  return ks_shim_result(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
  return allocate(p, bytes, false);
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
  return allocate(p, bytes, true);
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  return flags == cudaHostAllocDefault ? allocate(p, bytes, true) : ks_shim_result(cudaErrorNotSupported);
}
cudaError_t cudaFree(void *p) {
  return release(p, false);
}
cudaError_t cudaFreeHost(void *p) {
  return release(p, true);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = device.total;
  *free_bytes = device.used < device.total ? device.total - device.used : 0;
  return ks_shim_result(cudaSuccess);
}

/* ---------------------------------------------------------------- limits of kernels */

static struct {
  const void *func;
  size_t smem_bytes;
} * raised;
static size_t n_raised;

size_t ks_shim_smem_limit(const void *func) {
  for (size_t i = 0; i < n_raised; i++)
    if (raised[i].func == func) return raised[i].smem_bytes;
  return SMEM_DEFAULT;
}

cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, int value) {
  if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return ks_shim_result(cudaSuccess);
  if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > smem_optin())
    return ks_shim_result(cudaErrorInvalidValue);
  size_t i = 0;
  while (i < n_raised && raised[i].func != func)
    i++;
  if (i == n_raised) {
    void *grown = realloc(raised, (n_raised + 1) * sizeof *raised);
    if (!grown) return ks_shim_result(cudaErrorMemoryAllocation);
    raised = grown;
    n_raised++;
  }
  raised[i].func = func;
  raised[i].smem_bytes = (size_t)value;
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attr, const void *func) {
  *attr = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024,
                                      .binaryVersion = 10 * major() + minor(),
                                      .ptxVersion = 10 * major() + minor(),
                                      .maxDynamicSharedSizeBytes = (int)ks_shim_smem_limit(func)};
  return ks_shim_result(cudaSuccess);
}
