/* The meter of the CUDA backend (kernels/meter.h): regions between events of the context's stream, and
 * ceilings. */
#include "kernels/cuda/cuda_impl.h"
#include "kernels/cuda/meter.cuh"

#include <math.h>
#include <stdio.h>

enum { ROUNDS = 20, MATRIX_ROUNDS = 5 };
#ifdef KS_CUDA_ON_CPU
static const bool is_shim = true;
static const size_t largest_array = (size_t)1 << 16;
static const int64_t matrix_sizes[] = {32};
#else
static const bool is_shim = false;
static const size_t largest_array = (size_t)1 << 30;
static const int64_t matrix_sizes[] = {2048, 4096, 8192};
#endif

typedef struct {
  cudaEvent_t from, to;
  int64_t n_spans; /* of the context that ended before the region began */
  bool was_waited; /* the region's work was: it ended with that */
  void *junk;      /* twice the L2 */
  size_t junk_bytes;
  double cycles_per_us;
  unsigned char stamp;
  ks_cuda_nvml *nvml;
} meter;

static void meter_destroy(ks_ctx *ctx, void *state) {
  (void)ctx;
  meter *m = state;
  if (!m) return;
  if (m->from) cudaEventDestroy(m->from);
  if (m->to) cudaEventDestroy(m->to);
  if (m->junk) cudaFree(m->junk);
  ks_cuda_nvml_close(m->nvml);
  cudaGetLastError();
  free(m);
}

static ks_status meter_fill_in(ks_ctx *ctx, meter *m) {
  int khz = 0;
  KS_CUDA_TRY(ctx, "meter", cudaEventCreate(&m->from));
  KS_CUDA_TRY(ctx, "meter", cudaEventCreate(&m->to));
  if (cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0) != cudaSuccess) cudaGetLastError();
  m->cycles_per_us = khz > 0 ? (double)khz / 1e3 : 1e3;
  m->nvml = ks_cuda_nvml_open();
  m->junk_bytes = 2 * (size_t)ks_cuda_device_of(ctx)->l2_bytes;
  if (m->junk_bytes < largest_array / 16) m->junk_bytes = largest_array / 16;
  if (is_shim) m->junk_bytes = largest_array;
  return ks_cuda_alloc(ctx, "meter", m->junk_bytes, &m->junk);
}

static ks_status meter_create(ks_ctx *ctx, void **state) {
  meter *m = NULL;
  KS_TRY(ks_alloc_array(&m, 1, sizeof *m, "meter"));
  ks_status status = meter_fill_in(ctx, m);
  if (status != KS_OK) {
    meter_destroy(ctx, m);
    return status;
  }
  *state = m;
  return KS_OK;
}

/* ---------------------------------------------------------------- regions */

static ks_status outside_steps(const ks_ctx *ctx) {
  return ks_cuda_in_step(ctx) ? KS_FAIL(KS_EINVAL, "meter: not inside a step; end it before (ks_step_end)")
                              : KS_OK;
}

static ks_status meter_begin(ks_ctx *ctx, void *state) {
  const ks_cuda *cuda = ks_cuda_of(ctx);
  meter *m = state;
  KS_TRY(outside_steps(ctx));
  m->n_spans = cuda->n_spans + (cuda->span == KS_CUDA_SPAN_ENDED);
  KS_CUDA_TRY(ctx, "meter", cudaEventRecord(m->from, cuda->stream));
  return KS_OK;
}

static ks_status meter_end(ks_ctx *ctx, void *state) {
  const ks_cuda *cuda = ks_cuda_of(ctx);
  meter *m = state;
  KS_TRY(outside_steps(ctx));
  m->was_waited = cuda->span == KS_CUDA_SPAN_NONE && cuda->n_spans > m->n_spans;
  if (!m->was_waited) KS_CUDA_TRY(ctx, "meter", cudaEventRecord(m->to, cuda->stream));
  return KS_OK;
}

static ks_status meter_read(ks_ctx *ctx, void *state, double *ms) {
  meter *m = state;
  cudaEvent_t to = m->was_waited ? ks_cuda_of(ctx)->span_to : m->to;
  float elapsed = 0;
  KS_CUDA_TRY(ctx, "meter", cudaEventSynchronize(to));
  KS_CUDA_TRY(ctx, "meter", cudaEventElapsedTime(&elapsed, m->from, to));
  *ms = (double)elapsed;
  return ks_cuda_finish(ctx);
}

static ks_status meter_flush(ks_ctx *ctx, void *state) {
  meter *m = state;
  KS_TRY(outside_steps(ctx));
  return ks_cuda_fill(ctx, m->junk, ++m->stamp, m->junk_bytes);
}

static ks_status meter_delay(ks_ctx *ctx, void *state, double microseconds) {
  return ks_cuda_meter_delay(ctx, (int64_t)(microseconds * ((meter *)state)->cycles_per_us));
}

/* The lists of steps name the workspace: they go too. */
static ks_status meter_forget(ks_ctx *ctx, void *state) {
  (void)state;
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(outside_steps(ctx));
  KS_TRY(ks_cuda_finish(ctx));
  ks_cuda_steps_exit(ctx);
  KS_CUDA_TRY(ctx, "meter", cudaFree(cuda->workspace));
  ks_mem_account(ctx, 0, cuda->workspace_bytes);
  cuda->workspace = NULL;
  cuda->workspace_bytes = 0;
  return KS_OK;
}

static ks_status meter_null(ks_ctx *ctx, void *state) {
  (void)state;
  return ks_cuda_meter_null(ctx);
}

/* ---------------------------------------------------------------- ceilings */

typedef struct {
  void *x, *y, *z;
  size_t bytes;
  int64_t n;
  ks_dtype dtype;
} load;

static ks_status copy_once(ks_ctx *ctx, const load *l) {
  return ks_cuda_copy(ctx, l->y, l->x, l->bytes);
}

static ks_status read_once(ks_ctx *ctx, const load *l) {
  return ks_cuda_meter_touch(ctx, l->x, l->bytes, l->y);
}

static ks_status multiply_once(ks_ctx *ctx, const load *l) {
  const ks_cuda_matmul_params p = {.x = l->x,
                                   .w = l->y,
                                   .y = l->z,
                                   .n_rows = l->n,
                                   .n_out = l->n,
                                   .n_in = l->n,
                                   .w_transposed = true,
                                   .x_dtype = l->dtype,
                                   .w_dtype = l->dtype,
                                   .y_dtype = l->dtype};
  return ks_cuda_matmul(ctx, &p);
}

/* Milliseconds of the fastest round, after one to warm up. */
static ks_status fastest(ks_ctx *ctx, meter *m, ks_status (*run)(ks_ctx *, const load *), const load *l,
                         int rounds, double *best) {
  *best = INFINITY;
  KS_TRY(run(ctx, l));
  for (int i = 0; i < rounds; i++) {
    double ms = 0;
    KS_TRY(meter_begin(ctx, m));
    KS_TRY(run(ctx, l));
    KS_TRY(meter_end(ctx, m));
    KS_TRY(meter_read(ctx, m, &ms));
    if (ms < *best) *best = ms;
  }
  return KS_OK;
}

static double per_second(double amount, double ms) {
  return ms > 0 && isfinite(ms) ? amount / ms / 1e6 : 0; /* in 1e9 */
}

/* Two arrays of 1 GiB, or an eighth of what is free. */
static ks_status memory_rate(ks_ctx *ctx, meter *m, bool copies, double *gbytes) {
  size_t n_free = 0, total = 0;
  load l = {.bytes = largest_array};
  double ms = 0;
  KS_TRY(outside_steps(ctx));
  KS_CUDA_TRY(ctx, "meter", cudaMemGetInfo(&n_free, &total));
  if (l.bytes > n_free / 8) l.bytes = n_free / 8 / 256 * 256;
  KS_TRY(ks_cuda_alloc(ctx, "meter", l.bytes, &l.x));
  ks_status status = ks_cuda_alloc(ctx, "meter", copies ? l.bytes : 256, &l.y);
  if (status == KS_OK) status = ks_cuda_fill(ctx, l.x, 1, l.bytes);
  if (status == KS_OK) status = fastest(ctx, m, copies ? copy_once : read_once, &l, ROUNDS, &ms);
  *gbytes = status == KS_OK ? per_second((copies ? 2.0 : 1.0) * (double)l.bytes, ms) : 0;
  cudaFree(l.x);
  cudaFree(l.y);
  return status;
}

static ks_status copy_rate(ks_ctx *ctx, void *state, double *gbytes) {
  return memory_rate(ctx, state, true, gbytes);
}

static ks_status read_rate(ks_ctx *ctx, void *state, double *gbytes) {
  return memory_rate(ctx, state, false, gbytes);
}

static ks_status multiply_rate(ks_ctx *ctx, meter *m, ks_dtype dtype, int64_t n, double *gflops) {
  const size_t bytes = (size_t)(n * n) * ks_dtype_size(dtype);
  load l = {.n = n, .dtype = dtype};
  void **arrays[] = {&l.x, &l.y, &l.z};
  ks_status status = KS_OK;
  double ms = 0;
  for (int i = 0; i < 3 && status == KS_OK; i++)
    status = ks_cuda_alloc(ctx, "meter", bytes, arrays[i]);
  if (status == KS_OK) status = ks_cuda_meter_random(ctx, dtype, l.x, n * n, 1);
  if (status == KS_OK) status = ks_cuda_meter_random(ctx, dtype, l.y, n * n, 2);
  if (status == KS_OK) status = fastest(ctx, m, multiply_once, &l, MATRIX_ROUNDS, &ms);
  if (status == KS_OK) *gflops = per_second(2.0 * (double)n * (double)n * (double)n, ms);
  for (int i = 0; i < 3; i++)
    if (*arrays[i]) cudaFree(*arrays[i]);
  return status;
}

/* The best of some sizes; a type that the library cannot multiply here has no ceiling. */
static ks_status matrix_rate(ks_ctx *ctx, void *state, ks_dtype dtype, double *gflops) {
  KS_TRY(outside_steps(ctx));
  if (!ks_cuda_has_blas(ctx)) return KS_OK;
  for (size_t i = 0; i < sizeof matrix_sizes / sizeof *matrix_sizes; i++) {
    size_t n_free = 0, total = 0;
    double rate = 0;
    const int64_t n = matrix_sizes[i];
    KS_CUDA_TRY(ctx, "meter", cudaMemGetInfo(&n_free, &total));
    if (6 * (size_t)(n * n) * ks_dtype_size(dtype) > n_free) break;
    ks_status status = multiply_rate(ctx, state, dtype, n, &rate);
    if (status == KS_EUNSUPPORTED || status == KS_EENV) {
      ks_error_clear();
      return KS_OK;
    }
    KS_TRY(status);
    if (rate > *gflops) *gflops = rate;
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- description */

static void describe(const ks_ctx *ctx, const void *state, ks_meter_info *out) {
  const meter *m = state;
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  out->has_timer = true;
  out->is_shim = is_shim;
  out->has_graphs = !ks_cuda_of(ctx)->no_graphs;
  out->cache_bytes = (size_t)ks_cuda_device_of(ctx)->l2_bytes;
  snprintf(out->runtime, sizeof out->runtime, "%d.%d", runtime / 1000, runtime % 1000 / 10);
  if (m->nvml) ks_cuda_nvml_driver(m->nvml, out->driver, sizeof out->driver);
  if (!out->driver[0])
    snprintf(out->driver, sizeof out->driver, "CUDA %d.%d", driver / 1000, driver % 1000 / 10);
}

static void read_clocks(ks_ctx *ctx, void *state, ks_meter_clocks *out) {
  (void)ctx;
  meter *m = state;
  if (m->nvml) ks_cuda_nvml_read(m->nvml, out);
}

const ks_meter_ops ks_cuda_meter = {.create = meter_create,
                                    .destroy = meter_destroy,
                                    .begin = meter_begin,
                                    .end = meter_end,
                                    .read = meter_read,
                                    .flush = meter_flush,
                                    .delay = meter_delay,
                                    .null = meter_null,
                                    .forget = meter_forget,
                                    .activity = ks_cuda_activity_of,
                                    .copy_rate = copy_rate,
                                    .read_rate = read_rate,
                                    .matrix_rate = matrix_rate,
                                    .describe = describe,
                                    .read_clocks = read_clocks};
