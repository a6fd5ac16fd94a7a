/* The CUDA runtime's host interface over host memory. What is queued on a stream runs when something waits
 * for it (or, one piece a time, when the stream is asked whether it is done): as late as a device may be, so
 * that host memory reused too early shows. Device memory is poisoned for AddressSanitizer except while queued
 * work runs. */
#include "runtime.h"
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
  void *owned; /* arguments; freed with the op */
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
  bool is_blocking; /* waits for the legacy stream, and that for it */
  enum cudaStreamCaptureStatus capture;
  enum cudaStreamCaptureMode mode;
  struct CUstream_st *next;
};
struct CUevent_st {
  cudaStream_t stream;
  uint64_t recorded, done; /* stamps */
  bool has_time, is_captured;
  struct timespec at;
};
/* A graph and what is made of it share the work; the last frees it. */
typedef struct {
  op_list ops;
  int n_owners, n_runs;
} graph_work;
struct CUgraph_st {
  graph_work *work;
};
struct CUgraphExec_st {
  graph_work *work;
};

static struct CUstream_st default_stream;
static cudaStream_t streams = &default_stream;
static uint64_t n_records;
enum { MAX_ARG_BYTES = 4096, ARG_ALIGN = 128 /* of a tensor map */, N_WATCHED = 2 /* runs of a graph */ };

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

/* The legacy stream would wait for a blocking stream whose work is only being captured. */
static bool is_implicit(cudaStream_t stream) {
  for (cudaStream_t s = streams; s; s = s->next)
    if (stream == &default_stream && s->is_blocking && s->capture) return true;
  return false;
}

/* Ends captures by what none, or only a relaxed one, allows. */
static cudaError_t spoil_captures(bool relaxed_too) {
  cudaError_t e = cudaSuccess;
  for (cudaStream_t s = streams; s; s = s->next)
    if (s->capture && (relaxed_too || s->mode != cudaStreamCaptureModeRelaxed)) {
      s->capture = cudaStreamCaptureStatusInvalidated;
      e = cudaErrorStreamCaptureUnsupported;
    }
  return e;
}

cudaError_t ks_shim_unsafe(void) {
  return spoil_captures(false);
}

/* Takes over o->owned, also when it fails. */
static cudaError_t enqueue(cudaStream_t stream, const op *o) {
  stream = stream_of(stream);
  cudaError_t e = cudaSuccess;
  if (ks_shim_sticky)
    e = ks_shim_sticky;
  else if (!is_stream(stream))
    e = cudaErrorInvalidResourceHandle;
  else if (is_implicit(stream))
    e = cudaErrorStreamCaptureImplicit;
  else if (stream->capture == cudaStreamCaptureStatusInvalidated)
    e = cudaErrorStreamCaptureInvalidated;
  else if (!append(stream->capture ? &stream->captured : &stream->queue, o))
    e = cudaErrorMemoryAllocation;
  if (e) free(o->owned);
  return ks_shim_result(e);
}

static cudaError_t run_until(cudaStream_t stream, const struct CUevent_st *event, uint64_t stamp);
static void run_op(const op *o);

static void run_graph(graph_work *work) {
  const op_list *ops = &work->ops;
  bool watches = false;
  for (size_t i = 0; i < ops->n && work->n_runs < N_WATCHED; i++)
    watches |= ops->items[i].kind == OP_LAUNCH && ops->items[i].kernel.early;
  work->n_runs++;
  if (watches) ks_shim_watch_begin();
  for (size_t i = 0; i < ops->n && !ks_shim_sticky; i++)
    run_op(&ops->items[i]);
  if (watches) ks_shim_watch_end();
}

static void run_op(const op *o) {
  switch (o->kind) {
  case OP_LAUNCH:
    ks_shim_counted.launches++;
    if (!ks_shim_run(&o->kernel)) ks_shim_sticky = cudaErrorLaunchFailure;
    break;
  case OP_COPY:
    if (o->bytes) memcpy(o->dst, o->src, o->bytes);
    break;
  case OP_FILL:
    if (o->bytes) memset(o->dst, o->byte, o->bytes);
    break;
  case OP_CALL:
    ks_shim_counted.products++;
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
    ks_shim_counted.graph_launches++;
    run_graph(o->exec->work);
  }
}

static void run_first(op_list *queue) {
  op o = queue->items[queue->begin++];
  if (!ks_shim_sticky) run_op(&o);
  free(o.owned);
  if (queue->begin == queue->n) drop(queue);
}

/* All of a stream, or until the event has seen the stamp. */
static cudaError_t run_until(cudaStream_t stream, const struct CUevent_st *event, uint64_t stamp) {
  ks_shim_open_device();
  while (stream->queue.begin < stream->queue.n && !(event && event->done >= stamp))
    run_first(&stream->queue);
  ks_shim_close_device();
  return ks_shim_sticky;
}

cudaError_t ks_shim_run_all(void) {
  for (cudaStream_t s = streams; s; s = s->next)
    (void)run_until(s, NULL, 0);
  return ks_shim_sticky;
}

/* ---------------------------------------------------------------- copies and fills */

cudaError_t cudaMemsetAsync(void *p, int byte, size_t bytes, cudaStream_t stream) {
  if (bytes && !ks_shim_is_device(p, bytes)) return ks_shim_result(cudaErrorInvalidValue);
  return enqueue(stream, &(op){.kind = OP_FILL, .dst = p, .byte = byte & 255, .bytes = bytes});
}

cudaError_t cudaMemset(void *p, int byte, size_t bytes) {
  cudaError_t e = cudaMemsetAsync(p, byte, bytes, NULL);
  return e ? e : cudaStreamSynchronize(NULL);
}

/* Pageable host memory is read and written when the queue runs, as a driver that reaches it may. */
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return ks_shim_result(cudaSuccess);
  const ks_shim_allocation *to = ks_shim_find(dst, bytes), *from = ks_shim_find(src, bytes);
  const bool to_device = to && !to->pinned, from_device = from && !from->pinned;
  if (kind == cudaMemcpyDefault)
    kind = from_device ? (to_device ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost)
                       : (to_device ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost);
  const bool wants_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool wants_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (wants_to != to_device || wants_from != from_device) return ks_shim_result(cudaErrorInvalidValue);
  op o = {.kind = OP_COPY, .dst = dst, .src = src, .bytes = bytes};
  const bool pageable = (kind == cudaMemcpyHostToDevice && !from) || (kind == cudaMemcpyDeviceToHost && !to);
  if (pageable && stream_of(stream)->capture) return ks_shim_result(cudaErrorStreamCaptureUnsupported);
  if (kind == cudaMemcpyDeviceToHost) memset(dst, 0xff, bytes); /* nothing to read before the copy is done */
  return enqueue(stream, &o);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind) {
  cudaError_t e = cudaMemcpyAsync(dst, src, bytes, kind, NULL);
  return e ? e : cudaStreamSynchronize(NULL);
}

/* ---------------------------------------------------------------- launches */

/* Words of an argument that point into host memory which no device could read. */
static bool points_to_host(const void *arg, size_t size) {
  for (size_t at = 0; at + sizeof(void *) <= size; at += sizeof(void *)) {
    uintptr_t word;
    char name[8];
    void *region;
    size_t region_bytes;
    memcpy(&word, (const char *)arg + at, sizeof word);
    if (word >> 32 == 0 || word >> 48 || ks_shim_find((const void *)word, 0)) continue;
    const char *where = __asan_locate_address((void *)word, name, sizeof name, &region, &region_bytes);
    if (strcmp(where, "heap") == 0 || strcmp(where, "stack") == 0 || strcmp(where, "global") == 0)
      return true;
  }
  return false;
}

static cudaError_t lost_memory(const char *what) {
  ks_shim_set_report(what);
  fprintf(stderr, "CUDA on CPU: %s\n", what);
  ks_shim_sticky = cudaErrorLaunchFailure;
  return ks_shim_result(ks_shim_sticky);
}

static bool fits(dim3 grid, dim3 block) {
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
         grid.z <= 65535 && threads >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         threads <= 1024;
}

static size_t round_up(size_t bytes) {
  return (bytes + ARG_ALIGN - 1) & ~(size_t)(ARG_ALIGN - 1);
}

cudaError_t ks_shim_launch(const void *func, void (*invoke)(const void *func, void **args), dim3 grid,
                           dim3 block, void **args, const size_t *arg_sizes, int n_args, size_t smem_bytes,
                           cudaStream_t stream, int early, const char *name) {
  const size_t bytes = (size_t)n_args * sizeof(void *);
  if (!func || !invoke) return ks_shim_result(cudaErrorInvalidDeviceFunction);
  if (!fits(grid, block)) return ks_shim_result(cudaErrorInvalidConfiguration);
  if (smem_bytes > ks_shim_smem_limit(func)) return ks_shim_result(cudaErrorInvalidValue);
  size_t arg_bytes = 0, room = round_up(bytes) + ARG_ALIGN;
  for (int i = 0; i < n_args; i++) {
    arg_bytes += (arg_sizes[i] + 15) & ~(size_t)15;
    room += round_up(arg_sizes[i]);
  }
  if (arg_bytes > MAX_ARG_BYTES) return ks_shim_result(cudaErrorInvalidValue);
  for (int i = 0; i < n_args; i++)
    if (points_to_host(args[i], arg_sizes[i])) {
      char text[256];
      snprintf(text, sizeof text,
               "%s: argument %d of the kernel points to host memory, or to memory that was freed", name, i);
      return lost_memory(text);
    }
  void **copy = NULL;
  if (posix_memalign((void **)&copy, ARG_ALIGN, room) != 0) return ks_shim_result(cudaErrorMemoryAllocation);
  memset(copy, 0, room); /* between arguments too: they are looked through for addresses */
  char *at = (char *)copy + round_up(bytes);
  for (int i = 0; i < n_args; i++) {
    copy[i] = at;
    memcpy(at, args[i], arg_sizes[i]);
    at += round_up(arg_sizes[i]);
  }
  const ks_shim_kernel kernel = {.op = name ? name : "kernel",
                                 .func = func,
                                 .invoke = invoke,
                                 .args = copy,
                                 .grid = grid,
                                 .block = block,
                                 .smem_bytes = smem_bytes,
                                 .early = early != 0};
  return enqueue(stream, &(op){.kind = OP_LAUNCH,
                               .kernel = kernel,
                               .src = (char *)copy + round_up(bytes),
                               .bytes = room - round_up(bytes),
                               .owned = copy});
}

cudaError_t ks_shim_call(cudaStream_t stream, void (*run)(const void *copy), const void *copy, size_t bytes) {
  void *owned = malloc(bytes ? bytes : 1);
  if (!owned) return ks_shim_result(cudaErrorMemoryAllocation);
  memcpy(owned, copy, bytes);
  return enqueue(stream, &(op){.kind = OP_CALL, .run = run, .src = owned, .owned = owned});
}

/* ---------------------------------------------------------------- streams */

cudaError_t cudaDeviceSynchronize(void) {
  const cudaError_t e = spoil_captures(true);
  return ks_shim_result(e ? e : ks_shim_run_all());
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  if (flags & ~(unsigned)cudaStreamNonBlocking) return ks_shim_result(cudaErrorInvalidValue);
  if (!(*stream = calloc(1, sizeof **stream))) return ks_shim_result(cudaErrorMemoryAllocation);
  (*stream)->is_blocking = !(flags & cudaStreamNonBlocking);
  (*stream)->next = default_stream.next;
  default_stream.next = *stream;
  return ks_shim_result(cudaSuccess);
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
      return ks_shim_result(e);
    }
  return ks_shim_result(cudaErrorInvalidResourceHandle);
}

static cudaError_t usable(cudaStream_t stream) {
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (is_implicit(stream)) return cudaErrorStreamCaptureImplicit;
  if (!stream->capture) return cudaSuccess;
  stream->capture = cudaStreamCaptureStatusInvalidated;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream = stream_of(stream);
  cudaError_t e = usable(stream);
  return ks_shim_result(e ? e : run_until(stream, NULL, 0));
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  stream = stream_of(stream);
  cudaError_t e = usable(stream);
  if (e || stream->queue.begin == stream->queue.n) return ks_shim_result(e);
  ks_shim_open_device();
  run_first(&stream->queue);
  ks_shim_close_device();
  return ks_shim_sticky ? ks_shim_result(ks_shim_sticky) : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (flags) return ks_shim_result(cudaErrorInvalidValue);
  return enqueue(stream, &(op){.kind = OP_WAIT, .event = event, .stamp = event->recorded});
}

/* ---------------------------------------------------------------- events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  if (!(*event = calloc(1, sizeof **event))) return ks_shim_result(cudaErrorMemoryAllocation);
  (*event)->has_time = !(flags & cudaEventDisableTiming);
  return ks_shim_result(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  cudaError_t e = ks_shim_run_all();
  free(event);
  return ks_shim_result(e);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream_of(stream);
  event->recorded = ++n_records;
  event->is_captured = event->stream->capture != cudaStreamCaptureStatusNone;
  return enqueue(stream, &(op){.kind = OP_RECORD, .event = event, .stamp = event->recorded});
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->is_captured) return ks_shim_result(cudaErrorCapturedEvent);
  if (event->done >= event->recorded) return ks_shim_result(cudaSuccess);
  return ks_shim_result(run_until(event->stream, event, event->recorded));
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event->is_captured) return ks_shim_result(cudaErrorCapturedEvent);
  const cudaError_t unsafe = ks_shim_unsafe();
  if (unsafe) return ks_shim_result(unsafe);
  if (event->done >= event->recorded) return ks_shim_result(cudaSuccess);
  cudaError_t e = cudaStreamQuery(event->stream);
  if (e && e != cudaErrorNotReady) return e;
  return event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  if (from->is_captured || to->is_captured) return ks_shim_result(cudaErrorCapturedEvent);
  if (!from->recorded || !to->recorded || !from->has_time || !to->has_time)
    return ks_shim_result(cudaErrorInvalidResourceHandle);
  if (from->done < from->recorded || to->done < to->recorded) return ks_shim_result(cudaErrorNotReady);
  *ms = (float)((double)(to->at.tv_sec - from->at.tv_sec) * 1e3 +
                (double)(to->at.tv_nsec - from->at.tv_nsec) * 1e-6);
  return ks_shim_result(cudaSuccess);
}

/* ---------------------------------------------------------------- graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (!is_stream(stream) || stream == &default_stream)
    return ks_shim_result(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return ks_shim_result(cudaErrorIllegalState);
  stream->capture = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = stream_of(stream)->capture;
  return ks_shim_result(cudaSuccess);
}

static void leave_work(graph_work *work) {
  if (--work->n_owners > 0) return;
  drop(&work->ops);
  free(work);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = NULL;
  if (!is_stream(stream) || !stream->capture) return ks_shim_result(cudaErrorIllegalState);
  const bool valid = stream->capture == cudaStreamCaptureStatusActive;
  stream->capture = cudaStreamCaptureStatusNone;
  cudaGraph_t made = valid ? malloc(sizeof *made) : NULL;
  graph_work *work = made ? malloc(sizeof *work) : NULL;
  if (!work) {
    drop(&stream->captured);
    free(made);
    return ks_shim_result(valid ? cudaErrorMemoryAllocation : cudaErrorStreamCaptureInvalidated);
  }
  *work = (graph_work){.ops = stream->captured, .n_owners = 1};
  stream->captured = (op_list){0};
  made->work = work;
  *graph = made;
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  *exec = NULL;
  if (!graph || flags) return ks_shim_result(cudaErrorInvalidValue);
  if (!(*exec = malloc(sizeof **exec))) return ks_shim_result(cudaErrorMemoryAllocation);
  (*exec)->work = graph->work;
  graph->work->n_owners++;
  return ks_shim_result(cudaSuccess);
}

static bool has_no_room;
void ks_shim_set_graphs(int on) {
  has_no_room = !on;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return ks_shim_result(cudaErrorInvalidValue);
  if (!is_stream(stream_of(stream))) return ks_shim_result(cudaErrorInvalidResourceHandle);
  return ks_shim_result(has_no_room ? cudaErrorMemoryAllocation : cudaSuccess);
}

/* Every array of a graph is still there. */
static bool is_whole(const op_list *ops) {
  for (size_t i = 0; i < ops->n; i++) {
    const op *o = &ops->items[i];
    if (o->kind == OP_LAUNCH && points_to_host(o->src, o->bytes)) return false;
    if (o->kind == OP_FILL && o->bytes && !ks_shim_is_device(o->dst, o->bytes)) return false;
    if (o->kind == OP_COPY && (!ks_shim_find(o->dst, o->bytes) || !ks_shim_find(o->src, o->bytes)))
      return false;
  }
  return true;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return ks_shim_result(cudaErrorInvalidValue);
  if (has_no_room) return ks_shim_result(cudaErrorMemoryAllocation);
  if (!is_whole(&exec->work->ops)) return lost_memory("a graph names memory that was freed");
  return enqueue(stream, &(op){.kind = OP_GRAPH, .exec = exec});
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graph) return ks_shim_result(cudaErrorInvalidValue);
  leave_work(graph->work);
  free(graph);
  return ks_shim_result(cudaSuccess);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!exec) return ks_shim_result(cudaErrorInvalidValue);
  cudaError_t e = ks_shim_run_all();
  leave_work(exec->work);
  free(exec);
  return ks_shim_result(e);
}
