/* Meters: the backend's own, or the wall clock. */
#include "kernels/meter.h"
#include "kernels/backend.h"

#include <math.h>
#include <time.h>
#include <unistd.h>

struct ks_meter {
  ks_ctx *ctx;
  const ks_meter_ops *ops; /* NULL: the wall clock */
  void *state;
  double began, ended;
  unsigned char *junk; /* the wall clock's flush */
  size_t junk_bytes;
  unsigned char stamp;
};

static double wall_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t last_cache_bytes(void) {
  static const size_t most = (size_t)64 << 20, assumed = (size_t)32 << 20;
  long found = -1;
#ifdef _SC_LEVEL3_CACHE_SIZE
  found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  if (found <= 0) return assumed;
  return (size_t)found < most ? (size_t)found : most;
}

ks_status ks_meter_create(ks_ctx *ctx, ks_meter **out) {
  if (!ctx || !out) return KS_FAIL(KS_EINVAL, "ks_meter_create: ctx or out is NULL");
  *out = NULL;
  ks_meter *m = NULL;
  KS_TRY(ks_alloc_array(&m, 1, sizeof *m, "meter"));
  m->ctx = ctx;
  m->ops = ctx->backend->meter;
  ks_status status = m->ops ? m->ops->create(ctx, &m->state) : KS_OK;
  if (status != KS_OK) {
    free(m);
    return status;
  }
  *out = m;
  return KS_OK;
}

void ks_meter_destroy(ks_meter *m) {
  if (!m) return;
  if (m->ops) m->ops->destroy(m->ctx, m->state);
  free(m->junk);
  free(m);
}

ks_status ks_meter_begin(ks_meter *m) {
  if (m->ops) return m->ops->begin(m->ctx, m->state);
  m->began = wall_seconds();
  return KS_OK;
}

ks_status ks_meter_end(ks_meter *m) {
  if (m->ops) return m->ops->end(m->ctx, m->state);
  m->ended = wall_seconds();
  return KS_OK;
}

ks_status ks_meter_read(ks_meter *m, double *ms) {
  if (m->ops) return m->ops->read(m->ctx, m->state, ms);
  *ms = 1e3 * (m->ended - m->began);
  return KS_OK;
}

ks_status ks_meter_flush(ks_meter *m) {
  if (m->ops) return m->ops->flush(m->ctx, m->state);
  if (!m->junk) {
    m->junk_bytes = 2 * last_cache_bytes();
    KS_TRY(ks_alloc_array(&m->junk, m->junk_bytes, 1, "flushing the caches"));
  }
  /* Every thread writes its part: each core has caches of its own. */
  unsigned char *junk = m->junk;
  const size_t n = m->junk_bytes;
  const int n_threads = ks_ctx_n_threads(m->ctx), byte = ++m->stamp;
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int t = 0; t < n_threads; t++) {
    const size_t begin = n * (size_t)t / (size_t)n_threads, end = n * (size_t)(t + 1) / (size_t)n_threads;
    memset(junk + begin, byte, end - begin);
  }
  return KS_OK;
}

ks_status ks_meter_delay(ks_meter *m, double microseconds) {
  return m->ops ? m->ops->delay(m->ctx, m->state, microseconds) : KS_OK;
}

ks_status ks_meter_null(ks_meter *m) {
  return m->ops ? m->ops->null(m->ctx, m->state) : KS_OK;
}

ks_status ks_meter_forget(ks_meter *m) {
  if (m->ops) KS_TRY(m->ops->forget(m->ctx, m->state));
  m->ctx->mem_peak = m->ctx->mem_used;
  return KS_OK;
}

void ks_activity_of(const ks_ctx *ctx, ks_activity *out) {
  *out = (ks_activity){0};
  if (ctx->backend->meter) ctx->backend->meter->activity(ctx, out);
}

ks_status ks_meter_copy_rate(ks_meter *m, double *gbytes) {
  *gbytes = 0;
  return m->ops ? m->ops->copy_rate(m->ctx, m->state, gbytes) : KS_OK;
}

ks_status ks_meter_read_rate(ks_meter *m, double *gbytes) {
  *gbytes = 0;
  return m->ops ? m->ops->read_rate(m->ctx, m->state, gbytes) : KS_OK;
}

ks_status ks_meter_matrix_rate(ks_meter *m, ks_dtype dtype, double *gflops) {
  *gflops = 0;
  if (dtype != KS_DTYPE_F32 && dtype != KS_DTYPE_BF16)
    return KS_FAIL(KS_EINVAL, "ks_meter_matrix_rate: f32 or bf16, not '%s'", ks_dtype_name(dtype));
  return m->ops ? m->ops->matrix_rate(m->ctx, m->state, dtype, gflops) : KS_OK;
}

void ks_meter_describe(const ks_meter *m, ks_meter_info *out) {
  *out = (ks_meter_info){0};
  if (m->ops)
    m->ops->describe(m->ctx, m->state, out);
  else
    out->cache_bytes = last_cache_bytes();
}

void ks_meter_read_clocks(ks_meter *m, ks_meter_clocks *out) {
  *out = (ks_meter_clocks){NAN, NAN, NAN, NAN, NAN, NAN, false};
  if (m->ops) m->ops->read_clocks(m->ctx, m->state, out);
}
