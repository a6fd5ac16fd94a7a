/* The CUDA runtime's host interface over host memory. What is queued on a stream runs when something waits
 * for it (or, one piece a time, when the stream is asked whether it is done): as late as a device may be, so
 * that host memory reused too early shows. Device memory is poisoned for AddressSanitizer except while queued
 * work runs. */
#include "ks_shim.h"
#include "threads.h"
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---------------------------------------------------------------- state */

typedef enum { OP_LAUNCH, OP_COPY, OP_FILL, OP_CALL, OP_RECORD, OP_WAIT, OP_GRAPH } op_kind;
typedef struct {
  op_kind kind;
  void *owned; /* arguments, or the copy of pageable host memory; freed with the op */
  ks_shim_kernel kernel;
  void *dst;
  const void *src;
  size_t bytes;
  int byte;
  void (*run)(const void *copy);
  cudaEvent_t event;
  uint64_t stamp; /* of the record that is waited for */
  cudaGraphExec_t exec;
} op;
typedef struct {
  op *items;
  size_t begin, n, cap;
} op_list;

struct CUstream_st {
  op_list queue, captured;
  enum cudaStreamCaptureStatus capture;
  struct CUstream_st *next;
};
struct CUevent_st {
  cudaStream_t stream;
  uint64_t recorded, done; /* stamps */
  struct timespec at;
};
/* A graph and what is made of it share the work; the last frees it. */
typedef struct {
  op_list ops;
  int n_owners;
} graph_work;
struct CUgraph_st {
  graph_work *work;
};
struct CUgraphExec_st {
  graph_work *work;
};

typedef struct {
  char *p;
  size_t bytes;
  bool pinned;
} allocation;
static allocation *allocations;
static size_t n_allocations, cap_allocations;

static struct CUstream_st default_stream;
static cudaStream_t streams = &default_stream;
static cudaError_t sticky, last;
static uint64_t n_records;
static ks_shim_counts counts;
static int depth; /* of work that runs: device memory is open */

static struct {
  size_t total, used, pinned, smem_optin;
  int major, minor;
} device = {.total = (size_t)1 << 30, .smem_optin = 64 << 10, .major = 8, .minor = 0};
enum { SMEM_DEFAULT = 48 << 10, MAX_ARG_BYTES = 4096 };

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
size_t ks_shim_memory_used(void) {
  return device.used;
}
size_t ks_shim_pinned_used(void) {
  return device.pinned;
}
ks_shim_counts ks_shim_count(void) {
  counts.switches = ks_shim_switch_count();
  return counts;
}
void ks_shim_clear(void) {
  sticky = last = cudaSuccess;
  ks_shim_set_report("");
}

const char *__asan_default_options(void);
/* Nothing of a kernel's stack outlives it; freed memory is watched for a while, and not for gigabytes. */
const char *__asan_default_options(void) {
  return "detect_stack_use_after_return=0:quarantine_size_mb=32";
}

/* ---------------------------------------------------------------- errors */

static cudaError_t result(cudaError_t e) {
  if (sticky) e = sticky;
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
  return last;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t e = last;
  last = sticky;
  return e;
}

/* ---------------------------------------------------------------- memory */

/* [p, p + bytes] in one allocation; the byte behind the end may be pointed to. */
static allocation *find(const void *p, size_t bytes) {
  const char *at = p;
  for (size_t i = 0; i < n_allocations; i++) {
    allocation *a = &allocations[i];
    if (at >= a->p && at <= a->p + a->bytes && bytes <= a->bytes - (size_t)(at - a->p)) return a;
  }
  return NULL;
}

int ks_shim_is_device(const void *p, size_t bytes) {
  const allocation *a = find(p, bytes);
  return a && !a->pinned;
}

static void open_device(void) {
  if (depth++ == 0)
    for (size_t i = 0; i < n_allocations; i++)
      if (!allocations[i].pinned) __asan_unpoison_memory_region(allocations[i].p, allocations[i].bytes);
}

static void close_device(void) {
  if (--depth == 0)
    for (size_t i = 0; i < n_allocations; i++)
      if (!allocations[i].pinned) __asan_poison_memory_region(allocations[i].p, allocations[i].bytes);
}

/* Contents of new memory are nothing to rely on: NaN. */
static cudaError_t allocate(void **out, size_t bytes, bool pinned) {
  *out = NULL;
  if (sticky || bytes == 0) return result(cudaSuccess);
  if (!pinned && bytes > device.total - (device.used < device.total ? device.used : device.total))
    return result(cudaErrorMemoryAllocation);
  if (n_allocations == cap_allocations) {
    size_t cap = cap_allocations ? 2 * cap_allocations : 64;
    allocation *grown = realloc(allocations, cap * sizeof *grown);
    if (!grown) return result(cudaErrorMemoryAllocation);
    allocations = grown;
    cap_allocations = cap;
  }
  void *p;
  if (posix_memalign(&p, 256, bytes) != 0) return result(cudaErrorMemoryAllocation);
  memset(p, 0xff, bytes);
  if (!pinned) __asan_poison_memory_region(p, bytes);
  allocations[n_allocations++] = (allocation){p, bytes, pinned};
  *(pinned ? &device.pinned : &device.used) += bytes;
  *out = p;
  return cudaSuccess;
}

static cudaError_t run_all(void);

static cudaError_t release(void *p, bool pinned) {
  if (!p) return result(cudaSuccess);
  cudaError_t e = run_all();
  for (size_t i = 0; i < n_allocations; i++)
    if (allocations[i].p == p && allocations[i].pinned == pinned) {
      *(pinned ? &device.pinned : &device.used) -= allocations[i].bytes;
      __asan_unpoison_memory_region(p, allocations[i].bytes);
      allocations[i] = allocations[--n_allocations];
      free(p);
      return result(e);
    }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
  return allocate(p, bytes, false);
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
  return allocate(p, bytes, true);
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  return flags == cudaHostAllocDefault ? allocate(p, bytes, true) : result(cudaErrorNotSupported);
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
  return result(cudaSuccess);
}

/* ---------------------------------------------------------------- lists of work */

static bool append(op_list *list, const op *o) {
  if (list->n == list->cap) {
    size_t cap = list->cap ? 2 * list->cap : 64;
    op *grown = realloc(list->items, cap * sizeof *grown);
    if (!grown) return false;
    list->items = grown;
    list->cap = cap;
  }
  list->items[list->n++] = *o;
  return true;
}

static void drop(op_list *list) {
  for (size_t i = list->begin; i < list->n; i++)
    free(list->items[i].owned);
  free(list->items);
  *list = (op_list){0};
}

static bool is_stream(cudaStream_t stream) {
  for (cudaStream_t s = streams; s; s = s->next)
    if (s == stream) return true;
  return false;
}

static cudaStream_t stream_of(cudaStream_t stream) {
  return !stream || stream == cudaStreamLegacy ? &default_stream : stream;
}

/* Takes over o->owned, also when it fails. */
static cudaError_t enqueue(cudaStream_t stream, const op *o) {
  stream = stream_of(stream);
  cudaError_t e = cudaSuccess;
  if (sticky)
    e = sticky;
  else if (!is_stream(stream))
    e = cudaErrorInvalidResourceHandle;
  else if (stream->capture == cudaStreamCaptureStatusInvalidated)
    e = cudaErrorStreamCaptureInvalidated;
  else if (!append(stream->capture ? &stream->captured : &stream->queue, o))
    e = cudaErrorMemoryAllocation;
  if (e) free(o->owned);
  return result(e);
}

static cudaError_t run_until(cudaStream_t stream, const struct CUevent_st *event, uint64_t stamp);

static void run_op(const op *o) {
  switch (o->kind) {
  case OP_LAUNCH:
    counts.launches++;
    if (!ks_shim_run(&o->kernel)) sticky = last = cudaErrorLaunchFailure;
    break;
  case OP_COPY:
    if (o->bytes) memcpy(o->dst, o->src, o->bytes);
    break;
  case OP_FILL:
    if (o->bytes) memset(o->dst, o->byte, o->bytes);
    break;
  case OP_CALL:
    counts.products++;
    o->run(o->src);
    break;
  case OP_RECORD:
    o->event->done = o->stamp;
    clock_gettime(CLOCK_MONOTONIC, &o->event->at);
    break;
  case OP_WAIT:
    if (o->event->done < o->stamp) (void)run_until(o->event->stream, o->event, o->stamp);
    break;
  case OP_GRAPH:
    counts.graph_launches++;
    for (size_t i = 0; i < o->exec->work->ops.n && !sticky; i++)
      run_op(&o->exec->work->ops.items[i]);
  }
}

static void run_first(op_list *queue) {
  op o = queue->items[queue->begin++];
  if (!sticky) run_op(&o);
  free(o.owned);
  if (queue->begin == queue->n) drop(queue);
}

/* All of a stream, or until the event has seen the stamp. */
static cudaError_t run_until(cudaStream_t stream, const struct CUevent_st *event, uint64_t stamp) {
  open_device();
  while (stream->queue.begin < stream->queue.n && !(event && event->done >= stamp))
    run_first(&stream->queue);
  close_device();
  return sticky;
}

static cudaError_t run_all(void) {
  for (cudaStream_t s = streams; s; s = s->next)
    (void)run_until(s, NULL, 0);
  return sticky;
}

/* ---------------------------------------------------------------- copies and fills */

cudaError_t cudaMemsetAsync(void *p, int byte, size_t bytes, cudaStream_t stream) {
  if (bytes && !ks_shim_is_device(p, bytes)) return result(cudaErrorInvalidValue);
  return enqueue(stream, &(op){.kind = OP_FILL, .dst = p, .byte = byte & 255, .bytes = bytes});
}

cudaError_t cudaMemset(void *p, int byte, size_t bytes) {
  cudaError_t e = cudaMemsetAsync(p, byte, bytes, NULL);
  return e ? e : cudaStreamSynchronize(NULL);
}

/* Pageable host memory is read before the call returns, and written before it returns, as on a device. */
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return result(cudaSuccess);
  const allocation *to = find(dst, bytes), *from = find(src, bytes);
  const bool to_device = to && !to->pinned, from_device = from && !from->pinned;
  if (kind == cudaMemcpyDefault)
    kind = from_device ? (to_device ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost)
                       : (to_device ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost);
  const bool wants_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool wants_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (wants_to != to_device || wants_from != from_device) return result(cudaErrorInvalidValue);
  op o = {.kind = OP_COPY, .dst = dst, .src = src, .bytes = bytes};
  const bool pageable = (kind == cudaMemcpyHostToDevice && !from) || (kind == cudaMemcpyDeviceToHost && !to);
  if (pageable && stream_of(stream)->capture) return result(cudaErrorStreamCaptureUnsupported);
  if (kind == cudaMemcpyHostToDevice && !from) {
    if (!(o.owned = malloc(bytes))) return result(cudaErrorMemoryAllocation);
    memcpy(o.owned, src, bytes);
    o.src = o.owned;
  }
  if (kind == cudaMemcpyDeviceToHost && to)
    memset(dst, 0xff, bytes); /* nothing to read before the copy is done */
  cudaError_t e = enqueue(stream, &o);
  if (e || kind != cudaMemcpyDeviceToHost || to) return e;
  return cudaStreamSynchronize(stream);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind) {
  cudaError_t e = cudaMemcpyAsync(dst, src, bytes, kind, NULL);
  return e ? e : cudaStreamSynchronize(NULL);
}

/* ---------------------------------------------------------------- launches */

static struct {
  const void *func;
  size_t smem_bytes;
} * raised;
static size_t n_raised;

static size_t smem_limit(const void *func) {
  for (size_t i = 0; i < n_raised; i++)
    if (raised[i].func == func) return raised[i].smem_bytes;
  return SMEM_DEFAULT;
}

cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, int value) {
  if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return result(cudaSuccess);
  if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > device.smem_optin)
    return result(cudaErrorInvalidValue);
  size_t i = 0;
  while (i < n_raised && raised[i].func != func)
    i++;
  if (i == n_raised) {
    void *grown = realloc(raised, (n_raised + 1) * sizeof *raised);
    if (!grown) return result(cudaErrorMemoryAllocation);
    raised = grown;
    n_raised++;
  }
  raised[i].func = func;
  raised[i].smem_bytes = (size_t)value;
  return result(cudaSuccess);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attr, const void *func) {
  *attr = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024,
                                      .binaryVersion = 10 * device.major + device.minor,
                                      .ptxVersion = 10 * device.major + device.minor,
                                      .maxDynamicSharedSizeBytes = (int)smem_limit(func)};
  return result(cudaSuccess);
}

/* Words of an argument that point into host memory which no device could read. */
static bool points_to_host(const void *arg, size_t size) {
  for (size_t at = 0; at + sizeof(void *) <= size; at += sizeof(void *)) {
    uintptr_t word;
    char name[8];
    void *region;
    size_t region_bytes;
    memcpy(&word, (const char *)arg + at, sizeof word);
    if (word < 1 << 16 || word >> 47 || find((const void *)word, 0)) continue;
    const char *where = __asan_locate_address((void *)word, name, sizeof name, &region, &region_bytes);
    if (strcmp(where, "heap") == 0 || strcmp(where, "stack") == 0 || strcmp(where, "global") == 0)
      return true;
  }
  return false;
}

static bool fits(dim3 grid, dim3 block) {
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
         grid.z <= 65535 && threads >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         threads <= 1024;
}

cudaError_t ks_shim_launch(const void *func, void (*invoke)(const void *func, void **args), dim3 grid,
                           dim3 block, void **args, const size_t *arg_sizes, int n_args, size_t smem_bytes,
                           cudaStream_t stream, const char *name) {
  size_t bytes = (size_t)n_args * sizeof(void *);
  if (!func || !invoke) return result(cudaErrorInvalidDeviceFunction);
  if (!fits(grid, block)) return result(cudaErrorInvalidConfiguration);
  if (smem_bytes > smem_limit(func)) return result(cudaErrorInvalidValue);
  for (int i = 0; i < n_args; i++)
    bytes += (arg_sizes[i] + 15) & ~(size_t)15;
  if (bytes > MAX_ARG_BYTES + (size_t)n_args * sizeof(void *)) return result(cudaErrorInvalidValue);
  for (int i = 0; i < n_args; i++)
    if (points_to_host(args[i], arg_sizes[i])) {
      char text[256];
      snprintf(text, sizeof text,
               "%s: argument %d of the kernel points to host memory, or to memory that was freed", name, i);
      ks_shim_set_report(text);
      fprintf(stderr, "CUDA on CPU: %s\n", text);
      sticky = cudaErrorLaunchFailure;
      return result(sticky);
    }
  void **copy = NULL;
  const size_t room = (bytes + 31) & ~(size_t)15;
  if (posix_memalign((void **)&copy, 16, room) != 0) return result(cudaErrorMemoryAllocation);
  char *at = (char *)copy + (((size_t)n_args * sizeof(void *) + 15) & ~(size_t)15);
  for (int i = 0; i < n_args; i++) {
    copy[i] = at;
    memcpy(at, args[i], arg_sizes[i]);
    at += (arg_sizes[i] + 15) & ~(size_t)15;
  }
  const ks_shim_kernel kernel = {.op = name ? name : "kernel",
                                 .func = func,
                                 .invoke = invoke,
                                 .args = copy,
                                 .grid = grid,
                                 .block = block,
                                 .smem_bytes = smem_bytes};
  return enqueue(stream, &(op){.kind = OP_LAUNCH, .kernel = kernel, .owned = copy});
}

cudaError_t ks_shim_call(cudaStream_t stream, void (*run)(const void *copy), const void *copy, size_t bytes) {
  void *owned = malloc(bytes ? bytes : 1);
  if (!owned) return result(cudaErrorMemoryAllocation);
  memcpy(owned, copy, bytes);
  return enqueue(stream, &(op){.kind = OP_CALL, .run = run, .src = owned, .owned = owned});
}

/* ---------------------------------------------------------------- device */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return result(cudaSuccess);
}
cudaError_t cudaGetDevice(int *out) {
  *out = 0;
  return result(cudaSuccess);
}
cudaError_t cudaSetDevice(int index) {
  return result(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return result(cudaSuccess);
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return result(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize(void) {
  return result(run_all());
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int index) {
  if (index != 0) return result(cudaErrorInvalidDevice);
  *prop = (struct cudaDeviceProp){.name = "CUDA on CPU",
                                  .totalGlobalMem = device.total,
                                  .sharedMemPerBlock = SMEM_DEFAULT,
                                  .sharedMemPerBlockOptin = device.smem_optin,
                                  .sharedMemPerMultiprocessor = device.smem_optin + 1024,
                                  .reservedSharedMemPerBlock = 1024,
                                  .regsPerBlock = 65536,
                                  .regsPerMultiprocessor = 65536,
                                  .warpSize = 32,
                                  .maxThreadsPerBlock = 1024,
                                  .maxThreadsPerMultiProcessor = 1024,
                                  .maxThreadsDim = {1024, 1024, 64},
                                  .maxGridSize = {0x7fffffff, 65535, 65535},
                                  .major = device.major,
                                  .minor = device.minor,
                                  .multiProcessorCount = 4,
                                  .l2CacheSize = 4 << 20,
                                  .unifiedAddressing = 1,
                                  .concurrentKernels = 1,
                                  .memoryBusWidth = 256,
                                  .asyncEngineCount = 1};
  return result(cudaSuccess);
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
      return result(cudaSuccess);
    }
  return result(cudaErrorInvalidValue);
}

/* ---------------------------------------------------------------- streams */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  if (flags & ~(unsigned)cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  if (!(*stream = calloc(1, sizeof **stream))) return result(cudaErrorMemoryAllocation);
  (*stream)->next = default_stream.next;
  default_stream.next = *stream;
  return result(cudaSuccess);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  for (cudaStream_t s = &default_stream; s->next; s = s->next)
    if (s->next == stream) {
      cudaError_t e = run_until(stream, NULL, 0);
      s->next = stream->next;
      drop(&stream->captured);
      free(stream);
      return result(e);
    }
  return result(cudaErrorInvalidResourceHandle);
}

static cudaError_t usable(cudaStream_t stream) {
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (!stream->capture) return cudaSuccess;
  stream->capture = cudaStreamCaptureStatusInvalidated;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream = stream_of(stream);
  cudaError_t e = usable(stream);
  return result(e ? e : run_until(stream, NULL, 0));
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  stream = stream_of(stream);
  cudaError_t e = usable(stream);
  if (e || stream->queue.begin == stream->queue.n) return result(e);
  open_device();
  run_first(&stream->queue);
  close_device();
  return sticky ? result(sticky) : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (flags) return result(cudaErrorInvalidValue);
  return enqueue(stream, &(op){.kind = OP_WAIT, .event = event, .stamp = event->recorded});
}

/* ---------------------------------------------------------------- events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  (void)flags;
  *event = calloc(1, sizeof **event);
  return result(*event ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  cudaError_t e = run_all();
  free(event);
  return result(e);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream_of(stream);
  event->recorded = ++n_records;
  return enqueue(stream, &(op){.kind = OP_RECORD, .event = event, .stamp = event->recorded});
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->done >= event->recorded) return result(cudaSuccess);
  return result(run_until(event->stream, event, event->recorded));
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event->done >= event->recorded) return result(cudaSuccess);
  cudaError_t e = cudaStreamQuery(event->stream);
  if (e && e != cudaErrorNotReady) return e;
  return event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  if (!from->recorded || !to->recorded) return result(cudaErrorInvalidResourceHandle);
  if (from->done < from->recorded || to->done < to->recorded) return result(cudaErrorNotReady);
  *ms = (float)((double)(to->at.tv_sec - from->at.tv_sec) * 1e3 +
                (double)(to->at.tv_nsec - from->at.tv_nsec) * 1e-6);
  return result(cudaSuccess);
}

/* ---------------------------------------------------------------- graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  (void)mode;
  if (!is_stream(stream) || stream == &default_stream) return result(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return result(cudaErrorIllegalState);
  stream->capture = cudaStreamCaptureStatusActive;
  return result(cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = stream_of(stream)->capture;
  return result(cudaSuccess);
}

static void leave_work(graph_work *work) {
  if (--work->n_owners > 0) return;
  drop(&work->ops);
  free(work);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = NULL;
  if (!is_stream(stream) || !stream->capture) return result(cudaErrorIllegalState);
  const bool valid = stream->capture == cudaStreamCaptureStatusActive;
  stream->capture = cudaStreamCaptureStatusNone;
  cudaGraph_t made = valid ? malloc(sizeof *made) : NULL;
  graph_work *work = made ? malloc(sizeof *work) : NULL;
  if (!work) {
    drop(&stream->captured);
    free(made);
    return result(valid ? cudaErrorMemoryAllocation : cudaErrorStreamCaptureInvalidated);
  }
  *work = (graph_work){stream->captured, 1};
  stream->captured = (op_list){0};
  made->work = work;
  *graph = made;
  return result(cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  *exec = NULL;
  if (!graph || flags) return result(cudaErrorInvalidValue);
  if (!(*exec = malloc(sizeof **exec))) return result(cudaErrorMemoryAllocation);
  (*exec)->work = graph->work;
  graph->work->n_owners++;
  return result(cudaSuccess);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  (void)stream;
  return result(exec ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return result(cudaErrorInvalidValue);
  return enqueue(stream, &(op){.kind = OP_GRAPH, .exec = exec});
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graph) return result(cudaErrorInvalidValue);
  leave_work(graph->work);
  free(graph);
  return result(cudaSuccess);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!exec) return result(cudaErrorInvalidValue);
  cudaError_t e = run_all();
  leave_work(exec->work);
  free(exec);
  return result(e);
}
