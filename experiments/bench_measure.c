/* Samples: warm-up, hot and cold, and when there are enough of them. */
#include "experiments/bench.h"

#include <math.h>

enum {
  MOST_SAMPLES = 4096,
  FEW_SAMPLES = 5, /* with these, MOST_SECONDS end a case */
  ENOUGH_SAMPLES = 30,
  LOOK_EVERY = 8, /* samples between two looks at the quartiles */
  N_LOOKS = 6,    /* that make a plateau */
  WARM_CALLS = 10,
  BATCH_MOST = 256,
  STEP_CALLS = 32,
  N_BATCHES = 5
};
static const double most_seconds = 15, enough_seconds = 0.5, warm_seconds = 0.1, near_quartiles = 0.01,
                    plateau_spread = 0.05, launch_bound_ms = 0.02, batch_ms = 20, waiting_delay_us = 50;

static int compare_double(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* ---------------------------------------------------------------- when to stop */

typedef struct {
  double started;
  double looks[N_LOOKS]; /* the last relative distances of the quartiles */
  int64_t n_looks;
} stopping;

static double quartile_distance(ks_samples *s) {
  memcpy(s->ms, s->raw, (size_t)s->n * sizeof *s->ms);
  qsort(s->ms, (size_t)s->n, sizeof *s->ms, compare_double);
  return (s->ms[s->n * 3 / 4] - s->ms[s->n / 4]) / s->ms[s->n / 2];
}

/* NULL: go on. */
static const char *why_stop(const ks_bench *b, stopping *stop, ks_samples *s) {
  const double gone = ks_clock_seconds() - stop->started;
  if (s->n >= MOST_SAMPLES) return "count";
  if (s->n >= b->min_samples && gone >= b->seconds) return "time";
  if (s->n >= FEW_SAMPLES && gone >= fmax(b->seconds, most_seconds)) return "time";
  if (s->n < ENOUGH_SAMPLES || s->n < b->min_samples || s->n % LOOK_EVERY) return NULL;
  const double distance = quartile_distance(s);
  stop->looks[stop->n_looks++ % N_LOOKS] = distance;
  if (gone < enough_seconds) return NULL;
  if (distance < near_quartiles) return "iqr";
  if (stop->n_looks < N_LOOKS) return NULL;
  double least = INFINITY, most = 0;
  for (int i = 0; i < N_LOOKS; i++) {
    least = fmin(least, stop->looks[i]);
    most = fmax(most, stop->looks[i]);
  }
  return most - least < plateau_spread * most ? "plateau" : NULL;
}

/* ---------------------------------------------------------------- samples */

typedef ks_bench_subject subject;

static ks_status call_and_wait(const subject *x) {
  KS_TRY(x->fn(x->arg));
  return ks_sync(x->b->ctx);
}

static ks_status warm_up(const subject *x) {
  const double start = ks_clock_seconds();
  const int64_t least = x->b->seconds > 0 && x->b->info.has_timer ? WARM_CALLS : 1;
  for (int64_t i = 0; i < least || (x->b->seconds > 0 && ks_clock_seconds() - start < warm_seconds); i++)
    KS_TRY(call_and_wait(x));
  return KS_OK;
}

ks_status ks_bench_sample_hot_once(const subject *x, double *ms) {
  const double start = ks_clock_seconds();
  KS_TRY(call_and_wait(x));
  *ms = 1e3 * (ks_clock_seconds() - start);
  return KS_OK;
}

/* Nothing touches memory between the flush and the region. */
ks_status ks_bench_sample_device_once(const subject *x, double *ms) {
  ks_meter *meter = x->b->meter;
  if (!x->is_warm) KS_TRY(ks_meter_flush(meter));
  KS_TRY(ks_meter_delay(meter, x->delay_us));
  KS_TRY(ks_meter_begin(meter));
  KS_TRY(x->fn(x->arg));
  KS_TRY(ks_meter_end(meter));
  return ks_meter_read(meter, ms);
}

ks_status ks_samples_create(ks_samples *out) {
  *out = (ks_samples){.hot_ms = NAN, .step_ms = NAN};
  KS_TRY(ks_alloc_array(&out->ms, MOST_SAMPLES, sizeof *out->ms, "samples"));
  return ks_alloc_array(&out->raw, MOST_SAMPLES, sizeof *out->raw, "samples");
}

static ks_status collect(const subject *x, ks_status (*sample)(const subject *, double *), ks_samples *out) {
  ks_bench *b = x->b;
  stopping stop = {.started = ks_clock_seconds()};
  KS_TRY(ks_samples_create(out));
  ks_meter_read_clocks(b->meter, &out->before);
  while (!out->ended) {
    KS_TRY(ks_progress_report(b->progress, "bench", ks_clock_seconds() - stop.started, b->seconds));
    KS_TRY(sample(x, &out->raw[out->n]));
    out->n++;
    out->ended = why_stop(b, &stop, out);
  }
  ks_meter_read_clocks(b->meter, &out->after);
  quartile_distance(out); /* sorts */
  return KS_OK;
}

/* ---------------------------------------------------------------- in turn */

static const char *why_stop_in_turn(const ks_bench *b, const ks_bench_turn *turns, int64_t n,
                                    int64_t n_rounds, double gone) {
  double widest = 0;
  if (n_rounds >= MOST_SAMPLES) return "count";
  if (n_rounds < b->min_samples) return NULL;
  if (gone >= b->seconds * (double)n) return "time";
  if (n_rounds < ENOUGH_SAMPLES || n_rounds % LOOK_EVERY) return NULL;
  for (int64_t i = 0; i < n; i++)
    widest = fmax(widest, quartile_distance(turns[i].samples));
  return widest < near_quartiles ? "iqr" : NULL;
}

ks_status ks_bench_sample_in_turn(ks_bench *b, ks_bench_turn *turns, int64_t n) {
  ks_meter_clocks before, after;
  const char *ended = NULL;
  int64_t n_rounds = 0;
  ks_meter_read_clocks(b->meter, &before);
  const double started = ks_clock_seconds();
  while (!ended) {
    for (int64_t i = 0; i < n; i++) {
      KS_TRY(ks_progress_report(b->progress, "bench", ks_clock_seconds() - started, b->seconds * (double)n));
      KS_TRY(turns[i].sample(turns[i].arg, &turns[i].samples->raw[n_rounds]));
      turns[i].samples->n = n_rounds + 1;
    }
    ended = why_stop_in_turn(b, turns, n, ++n_rounds, ks_clock_seconds() - started);
  }
  ks_meter_read_clocks(b->meter, &after);
  for (int64_t i = 0; i < n; i++) {
    turns[i].samples->ended = ended;
    turns[i].samples->before = before;
    turns[i].samples->after = after;
    quartile_distance(turns[i].samples); /* sorts */
  }
  return KS_OK;
}

ks_status ks_bench_sample(ks_bench *b, ks_status (*fn)(void *), void *arg, ks_samples *out) {
  const subject x = {.b = b, .fn = fn, .arg = arg};
  *out = (ks_samples){0};
  KS_TRY(warm_up(&x));
  return collect(&x, ks_bench_sample_hot_once, out);
}

/* ---------------------------------------------------------------- batches and steps */

static ks_status run_batch(const subject *x, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    KS_TRY(x->fn(x->arg));
  return KS_OK;
}

/* Called twice it is one recording and one graph. */
static ks_status run_step(const subject *x, int64_t n) {
  KS_TRY(ks_step_begin(x->b->ctx, 1));
  ks_status status = run_batch(x, n), ended = ks_step_end(x->b->ctx);
  return status != KS_OK ? status : ended;
}

/* Milliseconds a call, the median of some rounds of n calls. */
static ks_status per_call(const subject *x, ks_status (*run)(const subject *, int64_t), int64_t n,
                          double *out) {
  ks_meter *meter = x->b->meter;
  double ms[N_BATCHES];
  const int rounds = x->b->seconds > 0 ? N_BATCHES : 1;
  double queueing = 0;
  for (int i = -2; i < rounds; i++) { /* two to warm up */
    KS_TRY(ks_meter_delay(meter, 1.5e6 * queueing));
    KS_TRY(ks_meter_begin(meter));
    const double start = ks_clock_seconds();
    KS_TRY(run(x, n));
    queueing = x->waits ? 0 : fmin(ks_clock_seconds() - start, 0.02);
    KS_TRY(ks_meter_end(meter));
    KS_TRY(ks_meter_read(meter, &ms[i < 0 ? 0 : i]));
  }
  qsort(ms, (size_t)rounds, sizeof *ms, compare_double);
  *out = ms[rounds / 2] / (double)n;
  return KS_OK;
}

/* What waits runs while its host waits: there only its beginning must be queued. */
ks_status ks_bench_warm_up(subject *x) {
  KS_TRY(warm_up(x));
  const double start = ks_clock_seconds();
  KS_TRY(x->fn(x->arg));
  x->delay_us = x->waits ? waiting_delay_us : fmin(2e6 * (ks_clock_seconds() - start), 2000);
  return ks_sync(x->b->ctx);
}

ks_status ks_bench_batches(const subject *x, ks_samples *s) {
  const ks_bench *b = x->b;
  const double about = s->ms[s->n / 2];
  const int64_t n = b->seconds > 0 ? (int64_t)fmax(1, fmin(BATCH_MOST, batch_ms / fmax(about, 1e-6))) : 1;
  KS_TRY(per_call(x, run_batch, n, &s->hot_ms));
  if (b->info.has_timer && !x->waits && s->hot_ms < launch_bound_ms)
    KS_TRY(per_call(x, run_step, STEP_CALLS, &s->step_ms));
  return KS_OK;
}

ks_status ks_bench_sample_cold(ks_bench *b, ks_status (*fn)(void *), void *arg, bool waits, ks_samples *out) {
  subject x = {.b = b, .fn = fn, .arg = arg, .waits = waits};
  *out = (ks_samples){0};
  KS_TRY(ks_bench_warm_up(&x));
  KS_TRY(collect(&x, ks_bench_sample_device_once, out));
  out->cold = true;
  return ks_bench_batches(&x, out);
}

void ks_samples_scale(ks_samples *s, double factor) {
  for (int64_t i = 0; i < s->n; i++) {
    s->ms[i] *= factor;
    s->raw[i] *= factor;
  }
}

void ks_samples_free(ks_samples *s) {
  free(s->ms);
  free(s->raw);
  *s = (ks_samples){0};
}
