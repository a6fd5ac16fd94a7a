/* The host side of the shim: memory, queues that run late, graphs, events, limits, errors. */
#include <criterion/criterion.h>

#include "kernels/cuda/launch.cuh"
#include "test_launch.h"

static cudaStream_t new_stream(void) {
  cudaStream_t s;
  cr_assert(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) == cudaSuccess);
  return s;
}
static float *pinned_floats(int64_t n) {
  void *p;
  cr_assert(cudaMallocHost(&p, (size_t)n * sizeof(float)) == cudaSuccess);
  return static_cast<float *>(p);
}

/* ---------------------------------------------------------------- memory */

Test(runtime, memory_is_limited_and_new_memory_is_nan) {
  void *p[3];
  size_t n_free, total;
  ks_shim_set_memory(1 << 20);
  cr_assert(cudaMalloc(&p[0], 600 << 10) == cudaSuccess);
  cr_assert(cudaMalloc(&p[1], 600 << 10) == cudaErrorMemoryAllocation && p[1] == NULL);
  cr_assert(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess);
  cr_assert(cudaMalloc(&p[1], 400 << 10) == cudaSuccess);
  cr_assert(cudaMemGetInfo(&n_free, &total) == cudaSuccess && total == 1 << 20 && n_free == 24 << 10);
  cr_assert((uintptr_t)p[0] % 256 == 0 && (uintptr_t)p[1] % 256 == 0);
  cr_assert(cudaMalloc(&p[2], 0) == cudaSuccess && p[2] == NULL);
  float x;
  fetch(&x, static_cast<float *>(p[1]) + 1000, 1);
  cr_assert(isnan(x));
  cr_assert(cudaFree(p[0]) == cudaSuccess && cudaFree(p[1]) == cudaSuccess && cudaFree(NULL) == cudaSuccess);
  cr_assert(cudaFree(&x) == cudaErrorInvalidValue);
  cr_assert(ks_shim_memory_used() == 0);
}

Test(runtime, copies_are_checked) {
  float host[8] = {}, *a = device_array<float>(8, NULL), *b = device_array<float>(8, NULL),
        *pinned = pinned_floats(8);
  const struct {
    void *dst;
    const void *src;
    size_t bytes;
    enum cudaMemcpyKind kind;
    cudaError_t wants;
  } cases[] = {{a, host, 32, cudaMemcpyHostToDevice, cudaSuccess},
               {a, pinned, 32, cudaMemcpyHostToDevice, cudaSuccess},
               {host, a, 32, cudaMemcpyDeviceToHost, cudaSuccess},
               {b, a, 32, cudaMemcpyDeviceToDevice, cudaSuccess},
               {a, host, 32, cudaMemcpyDefault, cudaSuccess},
               {a, host, 33, cudaMemcpyHostToDevice, cudaErrorInvalidValue},
               {a + 1, host, 32, cudaMemcpyHostToDevice, cudaErrorInvalidValue},
               {host, a + 7, 8, cudaMemcpyDeviceToHost, cudaErrorInvalidValue},
               {host, a, 4, cudaMemcpyHostToDevice, cudaErrorInvalidValue},
               {a, host, 4, cudaMemcpyDeviceToHost, cudaErrorInvalidValue},
               {host, a, 4, cudaMemcpyDeviceToDevice, cudaErrorInvalidValue},
               {host, host + 4, 4, cudaMemcpyHostToDevice, cudaErrorInvalidValue}};
  for (const auto &c : cases)
    cr_expect(cudaMemcpy(c.dst, c.src, c.bytes, c.kind) == c.wants, "case %d", (int)(&c - cases));
  cr_assert(cudaMemset(a, 0, 33) == cudaErrorInvalidValue && cudaMemset(host, 0, 4) == cudaErrorInvalidValue);
  cudaFree(a), cudaFree(b), cudaFreeHost(pinned);
}

/* ---------------------------------------------------------------- queues */

static __global__ void add_kernel(float *x, float v, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += v;
}

/* Nothing happens before somebody waits; host memory that copies read or write is the device's until then. */
Test(runtime, queues_run_late) {
  float *pinned = pinned_floats(4), *back = pinned_floats(4), pageable[4] = {1, 2, 3, 4}, got[4];
  float *x = device_array<float>(4, NULL), *y = device_array<float>(4, NULL);
  cudaStream_t s = new_stream();
  for (int i = 0; i < 4; i++)
    pinned[i] = 10, back[i] = 20;
  cr_assert(cudaMemcpyAsync(x, pinned, 16, cudaMemcpyHostToDevice, s) == cudaSuccess);
  cr_assert(cudaMemcpyAsync(y, pageable, 16, cudaMemcpyHostToDevice, s) == cudaSuccess);
  cr_assert(launch(add_kernel, dim3(1), dim3(32), 0, s, x, 1.0f, 4) == cudaSuccess);
  cr_assert(cudaMemcpyAsync(back, x, 16, cudaMemcpyDeviceToHost, s) == cudaSuccess);
  cr_assert(cudaMemcpyAsync(got, y, 16, cudaMemcpyDeviceToHost, s) == cudaSuccess);
  pinned[1] = 50; /* too early: the device sees it */
  pageable[0] = 99;
  cr_assert(isnan(back[0]) && isnan(got[0]), "what a copy will fill holds nothing before");
  cr_assert(cudaStreamSynchronize(s) == cudaSuccess);
  cr_assert(back[0] == 11 && back[1] == 51 && back[3] == 11);
  cr_assert(got[0] == 99 && got[3] == 4);
  cr_assert(cudaStreamDestroy(s) == cudaSuccess &&
            cudaStreamSynchronize(s) == cudaErrorInvalidResourceHandle);
  cudaGetLastError();
  cudaFree(x), cudaFree(y), cudaFreeHost(pinned), cudaFreeHost(back);
  cr_assert(ks_shim_memory_used() == 0 && ks_shim_pinned_used() == 0);
}

Test(runtime, events_order_streams) {
  float zero[1] = {0}, got, ms, *x = device_array(1, zero);
  cudaStream_t s[2] = {new_stream(), new_stream()};
  cudaEvent_t e, begin, timeless;
  cr_assert(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&e) == cudaSuccess &&
            cudaEventCreateWithFlags(&timeless, cudaEventDisableTiming) == cudaSuccess);
  cr_assert(cudaEventQuery(e) == cudaSuccess, "never recorded");
  cudaEventRecord(begin, s[0]);
  launch(add_kernel, dim3(1), dim3(1), 0, s[0], x, 1.0f, 1);
  cudaEventRecord(e, s[0]);
  cr_assert(cudaStreamWaitEvent(s[1], e) == cudaSuccess);
  cudaMemsetAsync(x, 0, 4, s[1]); /* behind the addition */
  cr_assert(cudaEventElapsedTime(&ms, begin, e) == cudaErrorNotReady);
  cr_assert(cudaStreamSynchronize(s[1]) == cudaSuccess && cudaEventQuery(e) == cudaSuccess);
  cr_assert(cudaEventElapsedTime(&ms, begin, e) == cudaSuccess && ms >= 0);
  cr_assert(cudaEventRecord(timeless, s[0]) == cudaSuccess && cudaEventSynchronize(timeless) == cudaSuccess);
  cr_assert(cudaEventElapsedTime(&ms, begin, timeless) == cudaErrorInvalidResourceHandle);
  fetch(&got, x, 1);
  cr_assert(got == 0);
  /* asking makes progress, one piece a time */
  for (int i = 0; i < 3; i++)
    launch(add_kernel, dim3(1), dim3(1), 0, s[0], x, 1.0f, 1);
  cudaEventRecord(e, s[0]);
  int asked = 0;
  while (cudaEventQuery(e) == cudaErrorNotReady)
    asked++;
  cr_assert(asked == 3 && cudaStreamQuery(s[0]) == cudaSuccess);
  cudaEventDestroy(e), cudaEventDestroy(begin), cudaEventDestroy(timeless);
  cudaStreamDestroy(s[0]), cudaStreamDestroy(s[1]), cudaFree(x);
}

/* ---------------------------------------------------------------- graphs */

Test(runtime, graphs_replay_what_was_captured) {
  float zero[4] = {0}, got[4], *x = device_array(4, zero), *y = device_array(4, zero);
  cudaStream_t s = new_stream();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  float v = 1;
  cr_assert(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed) == cudaSuccess);
  launch(add_kernel, dim3(1), dim3(4), 0, s, x, v, 4);
  v = 100; /* the graph has its own copy */
  cudaMemcpyAsync(y, x, 16, cudaMemcpyDeviceToDevice, s);
  launch(add_kernel, dim3(1), dim3(2), 0, s, y, 0.5f, 2);
  cr_assert(cudaStreamEndCapture(s, &graph) == cudaSuccess);
  cr_assert(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
  fetch(got, x, 4);
  cr_assert(got[0] == 0, "a capture runs nothing");
  for (int i = 1; i <= 3; i++) {
    cr_assert(cudaGraphLaunch(exec, s) == cudaSuccess && cudaStreamSynchronize(s) == cudaSuccess);
    fetch(got, y, 4);
    cr_assert(got[0] == (float)i + 0.5f && got[3] == (float)i);
  }
  cr_assert(ks_shim_count().graph_launches == 3 && ks_shim_count().launches == 6);
  cr_assert(cudaGraphExecDestroy(exec) == cudaSuccess);
  cudaStreamDestroy(s), cudaFree(x), cudaFree(y);
}

Test(runtime, what_a_capture_does_not_take) {
  float host[4] = {0}, *x = device_array(4, host);
  cudaStream_t s = new_stream();
  cudaGraph_t graph = NULL;
  cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed);
  cr_assert(cudaMemcpyAsync(x, host, 16, cudaMemcpyHostToDevice, s) == cudaErrorStreamCaptureUnsupported);
  cr_assert(cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported);
  cr_assert(launch(add_kernel, dim3(1), dim3(4), 0, s, x, 1.0f, 4) == cudaErrorStreamCaptureInvalidated);
  cr_assert(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated && graph == NULL);
  cr_assert(cudaStreamEndCapture(s, &graph) == cudaErrorIllegalState);
  cr_assert(launch(add_kernel, dim3(1), dim3(4), 0, s, x, 1.0f, 4) == cudaSuccess);
  cr_assert(cudaStreamSynchronize(s) == cudaSuccess);
  cudaStreamDestroy(s), cudaFree(x);
}

/* A capture, and what spoils it. */
static void capture(cudaStreamCaptureMode mode, cudaError_t (*what)(cudaStream_t s), cudaError_t wants,
                    bool survives) {
  cudaStream_t s = new_stream();
  cudaGraph_t graph = NULL;
  float *x = device_array<float>(4, NULL);
  cr_assert(cudaStreamBeginCapture(s, mode) == cudaSuccess);
  cr_expect(what(s) == wants);
  const bool works = launch(add_kernel, dim3(1), dim3(4), 0, s, x, 1.0f, 4) == cudaSuccess;
  cr_expect(works == survives && (cudaStreamEndCapture(s, &graph) == cudaSuccess) == survives);
  if (graph) cudaGraphDestroy(graph);
  cudaGetLastError();
  cudaStreamDestroy(s), cudaFree(x);
}

Test(runtime, what_spoils_a_capture) {
  const auto wait_for_all = [](cudaStream_t) { return cudaDeviceSynchronize(); };
  const auto ask = [](cudaStream_t s) { return cudaStreamQuery(s); };
  const auto allocate = [](cudaStream_t) {
    void *p = NULL;
    const cudaError_t e = cudaMalloc(&p, 16);
    return e ? e : cudaFree(p);
  };
  const auto wait_for_captured = [](cudaStream_t s) {
    static cudaEvent_t event; /* the graph has it: it stays */
    cudaEventCreate(&event);
    cudaEventRecord(event, s);
    const cudaError_t asked = cudaEventQuery(event), waited = cudaEventSynchronize(event);
    return asked == waited ? asked : cudaErrorUnknown;
  };
  const auto fill_by_legacy = [](cudaStream_t) {
    void *p = NULL;
    cudaMalloc(&p, 16);
    const cudaError_t e = cudaMemset(p, 0, 16);
    cudaFree(p);
    return e;
  };
  const cudaStreamCaptureMode relaxed = cudaStreamCaptureModeRelaxed, global = cudaStreamCaptureModeGlobal;
  capture(relaxed, wait_for_all, cudaErrorStreamCaptureUnsupported, false);
  capture(relaxed, ask, cudaErrorStreamCaptureUnsupported, false);
  capture(relaxed, allocate, cudaSuccess, true);
  capture(global, allocate, cudaErrorStreamCaptureUnsupported, false);
  capture(relaxed, wait_for_captured, cudaErrorCapturedEvent, true);
  capture(relaxed, fill_by_legacy, cudaSuccess, true);
  cudaStream_t blocking;
  cudaGraph_t graph;
  float *x = device_array<float>(4, NULL);
  cr_assert(cudaStreamCreate(&blocking) == cudaSuccess);
  cr_assert(cudaStreamBeginCapture(blocking, relaxed) == cudaSuccess);
  cr_assert(cudaMemsetAsync(x, 0, 16, NULL) == cudaErrorStreamCaptureImplicit);
  cr_assert(cudaStreamSynchronize(NULL) == cudaErrorStreamCaptureImplicit);
  cr_assert(cudaStreamEndCapture(blocking, &graph) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
  cudaStreamDestroy(blocking), cudaFree(x);
}

/* A graph of one launch of add_kernel on x and one copy from x to y. */
static cudaGraphExec_t small_graph(cudaStream_t s, float *x, float *y) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cr_assert(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed) == cudaSuccess);
  launch(add_kernel, dim3(1), dim3(4), 0, s, x, 1.0f, 4);
  cudaMemcpyAsync(y, x, 16, cudaMemcpyDeviceToDevice, s);
  cr_assert(cudaStreamEndCapture(s, &graph) == cudaSuccess);
  cr_assert(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
  return exec;
}

Test(runtime, a_graph_holds_addresses_not_memory) {
  for (int freed = 0; freed < 2; freed++) {
    float *x = device_array<float>(4, NULL), *y = device_array<float>(4, NULL);
    cudaStream_t s = new_stream();
    cudaGraphExec_t exec = small_graph(s, x, y);
    cr_assert(cudaGraphLaunch(exec, s) == cudaSuccess && cudaStreamSynchronize(s) == cudaSuccess);
    cudaFree(freed ? y : x);
    cr_assert(cudaGraphLaunch(exec, s) == cudaErrorLaunchFailure);
    cr_assert(strstr(ks_shim_report(), "freed") != NULL);
    ks_shim_clear();
    cudaGraphExecDestroy(exec), cudaStreamDestroy(s), cudaFree(freed ? x : y);
  }
}

/* ---------------------------------------------------------------- launches that begin early */

/* y = x + 1; where: 0 all behind the wait, 1 a constant is read above it, 2 what changes is read above it, 3 nothing. */
static __global__ void early_kernel(float *y, const float *x, const float *constant, int where) {
  const int i = (int)threadIdx.x;
  float v = where == 1 ? constant[i] : where == 2 ? x[i] : 0;
  if (where == 3) return;
  ks_grid_wait();
  if (where != 2) v = x[i];
  y[i] = v + 1;
}

static cudaError_t run_early(int where, int early, float *x, float *y, float *constant) {
  cudaStream_t s = new_stream();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaError_t e = cudaSuccess;
  cr_assert(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed) == cudaSuccess);
  launch(add_kernel, dim3(1), dim3(4), 0, s, x, 1.0f, 4);
  const void *args[] = {&y, &x, &constant, &where};
  const size_t sizes[] = {sizeof y, sizeof x, sizeof constant, sizeof where};
  cr_assert(ks_shim_launch(reinterpret_cast<const void *>(early_kernel),
                           invoke<float *, const float *, const float *, int>, dim3(1), dim3(40),
                           const_cast<void **>(args), sizes, 4, 0, s, early, "test") == cudaSuccess);
  cr_assert(cudaStreamEndCapture(s, &graph) == cudaSuccess);
  cr_assert(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  for (int i = 0; i < 3 && !e; i++) {
    cudaGraphLaunch(exec, s);
    e = cudaStreamSynchronize(s);
  }
  cudaGraphDestroy(graph), cudaGraphExecDestroy(exec), cudaStreamDestroy(s);
  return e;
}

Test(runtime, early_launches_wait) {
  float zero[40] = {0}, got[40], *x = device_array(40, zero), *y = device_array(40, zero),
        *c = device_array(40, zero);
  cr_assert(run_early(0, 1, x, y, c) == cudaSuccess && run_early(1, 1, x, y, c) == cudaSuccess);
  fetch(got, y, 40);
  cr_assert(got[0] == 7 && got[39] == 1);
  cr_assert(run_early(3, 1, x, y, c) == cudaErrorLaunchFailure && strstr(ks_shim_report(), "ks_grid_wait"));
  ks_shim_clear();
  cr_assert(run_early(3, 0, x, y, c) == cudaSuccess && run_early(2, 0, x, y, c) == cudaSuccess);
  cudaFree(x), cudaFree(y), cudaFree(c);
}

Test(runtime, above_its_wait_an_early_launch_reads_what_stays, .exit_code = 1) {
  float zero[40] = {0}, *x = device_array(40, zero), *y = device_array(40, zero), *c = device_array(40, zero);
  (void)run_early(2, 1, x, y, c); /* AddressSanitizer ends the program */
}

/* ---------------------------------------------------------------- limits, errors */

static __global__ void shared_kernel(float *y, int n) {
  ks_smem smem;
  float *a = ks_smem_take<float>(&smem, (size_t)n);
  a[threadIdx.x] = 1;
  if (threadIdx.x == 0) y[0] = a[0];
}

Test(runtime, shared_memory_is_asked_for) {
  float *y = device_array<float>(1, NULL);
  const void *func = reinterpret_cast<const void *>(shared_kernel);
  const size_t bytes = 60 << 10;
  struct cudaFuncAttributes attributes;
  cr_assert(launch(shared_kernel, dim3(1), dim3(1), 48 << 10, NULL, y, 48 << 8) == cudaSuccess);
  cr_assert(launch(shared_kernel, dim3(1), dim3(1), bytes, NULL, y, (int)bytes / 4) == cudaErrorInvalidValue);
  const enum cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  cr_assert(cudaFuncSetAttribute(func, most, (99 << 10) + 1) == cudaErrorInvalidValue);
  cr_assert(cudaFuncSetAttribute(func, most, (int)bytes) == cudaSuccess);
  cr_assert(cudaFuncGetAttributes(&attributes, func) == cudaSuccess &&
            attributes.maxDynamicSharedSizeBytes == (int)bytes);
  cr_assert(launch(shared_kernel, dim3(1), dim3(1), bytes, NULL, y, (int)bytes / 4) == cudaSuccess);
  cr_assert(cudaDeviceSynchronize() == cudaSuccess);
  ks_shim_set_smem(100 << 10);
  cr_assert(cudaFuncSetAttribute(func, most, 100 << 10) == cudaSuccess);
  cudaFree(y);
}

Test(runtime, impossible_launches) {
  float *x = device_array<float>(1, NULL);
  const struct {
    dim3 grid, block;
    bool works;
  } cases[] = {{dim3(1), dim3(1024), true},        {dim3(1), dim3(1025), false},
               {dim3(1), dim3(32, 33), false},     {dim3(1), dim3(1, 1, 64), true},
               {dim3(1), dim3(1, 1, 65), false},   {dim3(0), dim3(1), false},
               {dim3(1), dim3(0), false},          {dim3(1, 65535), dim3(1), true},
               {dim3(1, 65536), dim3(1), false},   {dim3(1, 1, 65536), dim3(1), false},
               {dim3(0x80000000u), dim3(1), false}};
  for (const auto &c : cases) {
    const cudaError_t wants = c.works ? cudaSuccess : cudaErrorInvalidConfiguration;
    cr_expect(launch(add_kernel, c.grid, c.block, 0, NULL, x, 0.0f, 1) == wants, "case %d",
              (int)(&c - cases));
    cr_expect(cudaGetLastError() == wants);
  }
  cr_assert(cudaDeviceSynchronize() == cudaSuccess);
  cudaFree(x);
}

static __global__ void trap_kernel(int who) {
  if ((int)threadIdx.x == who) __trap();
}

Test(runtime, a_failed_launch_is_the_end_of_the_device) {
  float *x = device_array<float>(1, NULL), host = 0;
  cr_assert(launch(trap_kernel, dim3(2), dim3(70), 0, NULL, 67) == cudaSuccess);
  cr_assert(cudaMemsetAsync(x, 0, 4, NULL) == cudaSuccess, "nobody knows yet");
  cr_assert(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  cr_assert(strstr(ks_shim_report(), "trap_kernel") &&
            strstr(ks_shim_report(), "thread (67, 0, 0): __trap()"));
  cr_assert(cudaGetErrorString(cudaErrorLaunchFailure) == ks_shim_report());
  cr_assert(cudaMemcpy(&host, x, 4, cudaMemcpyDeviceToHost) == cudaErrorLaunchFailure);
  cr_assert(cudaGetLastError() == cudaErrorLaunchFailure && cudaPeekAtLastError() == cudaErrorLaunchFailure);
  ks_shim_clear();
  fetch(&host, x, 1);
  cr_assert(isnan(host), "what was queued behind the failure did not run");
  cr_assert(cudaFree(x) == cudaSuccess);
}

Test(runtime, names_and_device) {
  int count, version, value;
  struct cudaDeviceProp p;
  cr_assert(strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation") == 0);
  cr_assert(strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0);
  cr_assert(cudaGetDeviceCount(&count) == cudaSuccess && count == 1 &&
            cudaSetDevice(1) == cudaErrorInvalidDevice);
  cr_assert(cudaRuntimeGetVersion(&version) == cudaSuccess && version == CUDART_VERSION);
  ks_shim_set_capability(7, 5);
  cr_assert(cudaGetDeviceProperties(&p, 0) == cudaSuccess && p.major == 7 && p.minor == 5 &&
            p.warpSize == 32);
  cr_assert(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess &&
            value == 99 << 10);
  cr_assert(cudaDeviceGetAttribute(&value, (enum cudaDeviceAttr)9999, 0) == cudaErrorInvalidValue);
}
