/* How long queued work takes on its device, and what that device can do at most. For benchmarks.
 *
 *   ks_meter *meter;
 *   KS_TRY(ks_meter_create(ctx, &meter));
 *   KS_TRY(ks_meter_flush(meter));            // no cache holds what comes
 *   KS_TRY(ks_meter_delay(meter, 50));        // the device waits while the host queues
 *   KS_TRY(ks_meter_begin(meter));
 *   KS_TRY(ks_rope(ctx, &args));
 *   KS_TRY(ks_meter_end(meter));
 *   KS_TRY(ks_meter_read(meter, &ms));        // waits for the device
 *
 * On a GPU a region is the time between two events of the context's stream; when what was queued in it was waited for before its
 * end (operations whose host outputs are not late), it ends with the last kernel before the copy of the results. On the CPU it is
 * wall-clock time. None of these may be called between ks_step_begin and ks_step_end. A meter is used by one thread, and
 * destroyed before its context.
 */
#ifndef KS_METER_H
#define KS_METER_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ks_meter ks_meter;
ks_status ks_meter_create(ks_ctx *ctx, ks_meter **out);
void ks_meter_destroy(ks_meter *m); /* NULL-safe */

ks_status ks_meter_begin(ks_meter *m);
ks_status ks_meter_end(ks_meter *m);
/* Milliseconds of the last region; waits for its end. */
ks_status ks_meter_read(ks_meter *m, double *ms);

/* Writes twice the bytes of the last cache (the CPU: at most 128 MiB), so that nothing else is left in it. */
ks_status ks_meter_flush(ks_meter *m);
/* The device does nothing for so long, touching no memory; the CPU: nothing happens. */
ks_status ks_meter_delay(ks_meter *m, double microseconds);
/* A kernel that does nothing: what a launch alone costs. */
ks_status ks_meter_null(ks_meter *m);
/* The backend gives back what it keeps for later (workspaces, recorded steps), and ks_mem_peak counts from here on. */
ks_status ks_meter_forget(ks_meter *m);

/* What a context's device was given so far, and what it made of it. A span of work begins with the first that is put on an idle
 * device and ends before the next wait of the host (or before the copy of results that comes before it); gaps
 * inside it, where the host is too slow with single launches, count as busy. So wall time - busy_seconds is
 * time that the device waited for the host with nothing queued, copies of inputs and results included. */
typedef struct {
  bool is_known;        /* false: a backend that computes in the call itself (CPU); the rest is 0 */
  int64_t launches;     /* kernels and products put on the stream one by one */
  int64_t graphs;       /* steps launched as a whole */
  int64_t waits;        /* of the host for the device */
  double busy_seconds;  /* of the spans that were waited for */
} ks_activity;
void ks_activity_of(const ks_ctx *ctx, ks_activity *out);

/* Ceilings, measured now, the best of several rounds; 0: this device has no such measurement.
 *   copy    GB/s, read and written bytes counted, of a large copy inside device memory
 *   read    GB/s of reading a large array and adding it up
 *   matrix  GFLOP/s of a large product of random matrices of this type, float32 accumulation, by the vendor's library */
ks_status ks_meter_copy_rate(ks_meter *m, double *gbytes);
ks_status ks_meter_read_rate(ks_meter *m, double *gbytes);
ks_status ks_meter_matrix_rate(ks_meter *m, ks_dtype dtype, double *gflops);

typedef struct {
  bool has_timer;   /* regions are timed by the device: work is queued, and the host's clock says nothing about it */
  bool is_shim;     /* kernels run as host code: times mean nothing */
  bool has_graphs;  /* steps that come again are queued as a whole */
  size_t cache_bytes;
  char driver[32], runtime[32]; /* "13.0"; "" on the CPU */
} ks_meter_info;
void ks_meter_describe(const ks_meter *m, ks_meter_info *out);

/* Now; NAN where nobody knows. */
typedef struct {
  double sm_mhz, sm_max_mhz, memory_mhz, watts, watts_limit, celsius;
  bool throttled; /* slowed down for heat or by the board, now */
} ks_meter_clocks;
void ks_meter_read_clocks(ks_meter *m, ks_meter_clocks *out);

/* What a backend provides in ks_backend.meter (NULL: wall-clock time and nothing else). `state` is its own. */
typedef struct ks_meter_ops {
  ks_status (*create)(ks_ctx *ctx, void **state);
  void (*destroy)(ks_ctx *ctx, void *state);
  ks_status (*begin)(ks_ctx *ctx, void *state);
  ks_status (*end)(ks_ctx *ctx, void *state);
  ks_status (*read)(ks_ctx *ctx, void *state, double *ms);
  ks_status (*flush)(ks_ctx *ctx, void *state);
  ks_status (*delay)(ks_ctx *ctx, void *state, double microseconds);
  ks_status (*null)(ks_ctx *ctx, void *state);
  ks_status (*forget)(ks_ctx *ctx, void *state);
  void (*activity)(const ks_ctx *ctx, ks_activity *out);
  ks_status (*copy_rate)(ks_ctx *ctx, void *state, double *gbytes);
  ks_status (*read_rate)(ks_ctx *ctx, void *state, double *gbytes);
  ks_status (*matrix_rate)(ks_ctx *ctx, void *state, ks_dtype dtype, double *gflops);
  void (*describe)(const ks_ctx *ctx, const void *state, ks_meter_info *out);
  void (*read_clocks)(ks_ctx *ctx, void *state, ks_meter_clocks *out);
} ks_meter_ops;

#ifdef __cplusplus
}
#endif
#endif
