/* What the device was given: launches, graphs, waits, spans of work; and what a meter forgets. */
#include "host_kernels.h"
#include "kernels/meter.h"
#include <criterion/criterion.h>
#include <math.h>

#define MUST(call) cr_assert((call) == KS_OK, "%s", ks_error_message())

enum { N = 64 };

typedef struct {
  ks_ctx *ctx;
  ks_meter *meter;
  float *x, *y;
} machine;

static machine start(void) {
  machine m = {0};
  void *p;
  MUST(ks_ctx_create(&m.ctx, &(ks_ctx_params){.backend = "cuda"}));
  MUST(ks_meter_create(m.ctx, &m.meter));
  MUST(ks_mem_alloc(m.ctx, N * sizeof *m.x, &p));
  m.x = p;
  MUST(ks_mem_alloc(m.ctx, N * sizeof *m.y, &p));
  m.y = p;
  MUST(ks_sync(m.ctx));
  return m;
}

static void stop(machine *m) {
  ks_meter_destroy(m->meter);
  host_destroy(m->ctx);
}

static ks_activity since(const machine *m, const ks_activity *before) {
  ks_activity now;
  ks_activity_of(m->ctx, &now);
  cr_assert(now.is_known);
  return (ks_activity){.launches = now.launches - before->launches,
                       .graphs = now.graphs - before->graphs,
                       .waits = now.waits - before->waits,
                       .busy_seconds = now.busy_seconds - before->busy_seconds};
}

static void one_step(const machine *m, int n_launches) {
  MUST(ks_step_begin(m->ctx, 7));
  for (int i = 0; i < n_launches; i++)
    MUST(host_affine(m->ctx, m->y, m->x, (float[]){2, 3}, N));
  MUST(ks_step_end(m->ctx));
}

Test(activity, launches_graphs_and_waits_are_counted) {
  machine m = start();
  ks_activity before, got;
  ks_activity_of(m.ctx, &before);
  for (int i = 0; i < 3; i++)
    MUST(host_affine(m.ctx, m.y, m.x, (float[]){2, 3}, N));
  got = since(&m, &before);
  cr_expect(got.launches == 3 && got.graphs == 0 && got.waits == 0 && got.busy_seconds == 0);
  MUST(ks_sync(m.ctx));
  got = since(&m, &before);
  cr_expect(got.waits == 1 && got.busy_seconds > 0);
  const double busy = got.busy_seconds;
  MUST(ks_sync(m.ctx)); /* nothing was queued: no span */
  got = since(&m, &before);
  cr_expect(got.waits == 2 && got.busy_seconds == busy);
  for (int i = 0; i < 3; i++) {
    ks_activity_of(m.ctx, &before);
    one_step(&m, 4);
    MUST(ks_sync(m.ctx));
    got = since(&m, &before);
    cr_expect(got.waits == 1 && got.busy_seconds > 0);
    cr_expect(i == 0 ? got.launches == 4 && got.graphs == 0 : got.launches == 0 && got.graphs == 1,
              "step %d: %lld launches, %lld graphs", i, (long long)got.launches, (long long)got.graphs);
  }
  stop(&m);
}

/* A region whose work was waited for in it is as long as its span, not as the wait. */
Test(activity, regions_end_with_the_work) {
  machine m = start();
  double ms = NAN;
  MUST(ks_meter_begin(m.meter));
  MUST(host_affine(m.ctx, m.y, m.x, (float[]){2, 3}, N));
  MUST(ks_sync(m.ctx));
  MUST(ks_meter_end(m.meter));
  MUST(ks_meter_read(m.meter, &ms));
  cr_expect(isfinite(ms) && ms >= 0);
  MUST(ks_meter_begin(m.meter)); /* one that waits for nothing: the span before it is over */
  MUST(ks_sync(m.ctx));
  MUST(ks_meter_end(m.meter));
  MUST(ks_meter_read(m.meter, &ms));
  cr_expect(isfinite(ms) && ms >= 0, "%g ms", ms);
  float late;
  MUST(host_affine(m.ctx, m.y, m.x, (float[]){2, 3}, N));
  MUST(ks_cuda_deliver(m.ctx, &late, m.y, sizeof late));
  MUST(ks_meter_begin(m.meter)); /* one that waits for older work alone */
  MUST(ks_sync(m.ctx));
  MUST(ks_meter_end(m.meter));
  MUST(ks_meter_read(m.meter, &ms));
  cr_expect(isfinite(ms) && ms >= 0, "%g ms", ms);
  MUST(ks_meter_begin(m.meter)); /* one without work */
  MUST(ks_meter_end(m.meter));
  MUST(ks_meter_read(m.meter, &ms));
  cr_expect(isfinite(ms) && ms >= 0);
  stop(&m);
}

Test(activity, forgetting_gives_memory_back) {
  machine m = start();
  const size_t before = ks_mem_used(m.ctx);
  float got[N];
  for (int i = 0; i < 2; i++)
    one_step(&m, 2);
  MUST(host_affine_twice(m.ctx, m.y, m.x, (float[]){2, 3}, N)); /* by way of the workspace */
  MUST(ks_sync(m.ctx));
  cr_assert(ks_mem_used(m.ctx) > before);
  const size_t peak = ks_mem_peak(m.ctx);
  MUST(ks_meter_forget(m.meter));
  cr_expect(ks_mem_used(m.ctx) < peak && ks_mem_peak(m.ctx) == ks_mem_used(m.ctx));
  MUST(ks_step_begin(m.ctx, 9));
  cr_expect_eq(ks_meter_forget(m.meter), KS_EINVAL);
  MUST(ks_step_end(m.ctx));
  /* All goes on as before. */
  for (int i = 0; i < 2; i++)
    one_step(&m, 2);
  MUST(host_affine_twice(m.ctx, m.y, m.x, (float[]){2, 3}, N));
  MUST(ks_mem_download(m.ctx, got, m.y, sizeof got));
  cr_expect_eq(got[5], 9); /* of x = 0: 3, 9 */
  cr_expect(ks_mem_peak(m.ctx) <= peak);
  stop(&m);
}

Test(activity, the_cpu_knows_nothing_and_forgets_the_peak) {
  ks_ctx *ctx = NULL;
  ks_meter *meter;
  ks_activity a;
  void *p;
  MUST(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}));
  MUST(ks_meter_create(ctx, &meter));
  ks_activity_of(ctx, &a);
  cr_expect(!a.is_known && a.launches == 0);
  MUST(ks_mem_alloc(ctx, 4096, &p));
  ks_mem_free(ctx, p);
  cr_assert(ks_mem_peak(ctx) == 4096);
  MUST(ks_meter_forget(meter));
  cr_expect(ks_mem_peak(ctx) == 0);
  ks_meter_destroy(meter);
  ks_ctx_destroy(ctx);
}
