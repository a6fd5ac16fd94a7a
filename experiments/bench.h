/* `keepsake bench`: how fast this machine runs what experiments are made of, as shares of what it could.
 *
 * A case is checked, warms up, is timed sample by sample, is checked again, and only then gives a row. Beside
 * each row stands a ceiling measured in the same run. CPU: fma loops in registers for compute and a read of
 * the same working set for memory, right before and right after the row (on shared machines both drift). GPU:
 * a large copy, a large read and a large product on random data, once a run (kernels/meter.h).
 *
 * Two kinds of samples. hot: whole models; wall-clock time from the call until the device is done, one sample
 * after another, as they run in an experiment. cold: single operations; timed by the device's events (CPU:
 * the wall clock), caches flushed before each sample and outside of it. hot_ms is then the time of one in a
 * batch without flushes, and step_ms of one within a step (a CUDA graph), where launches would hide the rest.
 */
#ifndef KS_BENCH_H
#define KS_BENCH_H

#include "core/adapt/adapt.h"
#include "core/model/generate.h"
#include "kernels/meter.h"

/* ---- a result row; X(type, name, unit, what); pct: a share, 1 = 100 % */
#define KS_BENCH_COLUMNS(X)                                                                                  \
  X(str, name, "", "case")                                                                                   \
  X(str, shape, "", "model or matrix shape, and what runs on it")                                            \
  X(str, dtype, "", "of the frozen weights")                                                                 \
  X(str, acts, "", "type of the activations")                                                                \
  X(str, variant, "", "kernels other than the default")                                                      \
  X(i64, threads, "", "of the host")                                                                         \
  X(str, mode, "", "of the samples: cold or hot")                                                            \
  X(i64, n, "", "samples")                                                                                   \
  X(f64, min_ms, "ms", "")                                                                                   \
  X(f64, p20_ms, "ms", "")                                                                                   \
  X(f64, p25_ms, "ms", "")                                                                                   \
  X(f64, median_ms, "ms", "of a sample: one step, prompt, token or call")                                    \
  X(f64, p75_ms, "ms", "")                                                                                   \
  X(f64, p80_ms, "ms", "")                                                                                   \
  X(f64, p99_ms, "ms", "")                                                                                   \
  X(pct, iqr, "", "distance of the quartiles, of the median")                                                \
  X(str, ended, "", "what ended the sampling: iqr (< 1 %), plateau (of the iqr), time, count")               \
  X(f64, hot_ms, "ms", "one of a batch, nothing flushed")                                                    \
  X(f64, step_ms, "ms", "one of many in a step that the device was given as a whole")                        \
  X(f64, rate, "1/s", "tokens (embeddings, offers, calls) per second at the median")                         \
  X(f64, gflops, "GFLOP/s", "necessary operations (bench.h, bench_cost.c) at the median")                    \
  X(pct, peak_share, "", "of the measured fma peak (GPU: large product) of this type")                       \
  X(f64, gbytes, "GB/s", "bytes that must move, at the median")                                              \
  X(pct, read_share, "", "of the measured read bandwidth; CPU: over the same working set")                   \
  X(pct, copy_share, "", "of the measured bandwidth of a device copy")                                       \
  X(pct, roofline_share, "", "the longer of operations and bytes at their ceilings, of the time")            \
  X(f64, memory_mb, "MB",                                                                                    \
    "backend memory at its peak; goals: of this case alone, everything that the context holds")              \
  X(f64, launches, "", "kernels and products that a call puts on the stream one by one (goals)")             \
  X(f64, graphs, "", "CUDA graphs that a call launches (goals)")                                             \
  X(f64, waits, "", "a call's waits for the device (goals)")                                                 \
  X(pct, idle_share, "", "of the wall time with nothing queued on the device (goals, whole runs)")           \
  X(f64, sm_mhz_before, "MHz", "SM clock before the samples")                                                \
  X(f64, sm_mhz_after, "MHz", "and after")                                                                   \
  X(f64, ratio, "", "to the case named in the note")                                                         \
  X(str, group, "", "of bench_goals.def: timed in turn")                                                     \
  X(str, parameters, "",                                                                                     \
    "of bench_goals.def, as measured; lines of JSON have them as \"case\": {op, key: value}")                \
  X(str, verdict, "",                                                                                        \
    "ok, noisy (p80 > 1.25 p20), throttled, suspect (over a ceiling), incorrect, unsupported, "              \
    "skipped(reason)")                                                                                       \
  X(str, note, "", "")

typedef struct {
  char name[40], shape[96], dtype[8], acts[8], variant[64], mode[8], ended[12], group[24], parameters[160],
      verdict[24], note[320];
  int64_t threads, n;
  double min_ms, p20_ms, p25_ms, median_ms, p75_ms, p80_ms, p99_ms, iqr, hot_ms, step_ms, rate, gflops,
      peak_share, gbytes, read_share, copy_share, roofline_share, memory_mb, launches, graphs, waits,
      idle_share, sm_mhz_before, sm_mhz_after, ratio;
  const char *op;  /* of bench_goals.def, or NULL */
  double *samples; /* [n] milliseconds in the order they were taken, or NULL */
} ks_bench_row;

/* Measured ceilings of a device with a timer; 0: unknown. */
typedef struct {
  double copy, read, matrix_f32, matrix_bf16; /* GB/s, GFLOP/s */
} ks_bench_rates;

typedef struct {
  /* how: set by the caller */
  const char *device; /* "cpu", "cuda", "auto" */
  int n_threads;
  const char *isa;
  const char *variants; /* NULL, "op=name,...", or "all": operations once for each of their variants */
  ks_dtype dtype;       /* of the frozen weights */
  double seconds;       /* time for the samples of a case; 0: nothing is repeated or
                                              measured beside it without need */
  int64_t min_samples;
  int64_t n_rows_of_ops; /* rows of the operations' cases; 0: sizes of real use */
  int64_t recompute_layers; /* of training steps, as run.recompute_layers */
  bool is_first_dtype;   /* of those asked for: what has nothing to do with it is measured now */
  const char *only;      /* measure this row alone; NULL: all */
  const ks_progress *progress;
  /* where: between ks_bench_open and ks_bench_close */
  ks_ctx *ctx;
  ks_meter *meter;
  ks_meter_info info;
  const char *chosen; /* variants of ctx, NULL: the defaults */
  ks_bench_rates rates;
  bool has_rates;
  /* what came out */
  ks_bench_row *rows;
  int64_t n_rows, cap, n_printed;
} ks_bench;

/* Model shapes by name: "15m", "110m", "135m", "1b", "3b", "260k". */
typedef struct {
  const char *name;
  ks_model_config config;
} ks_bench_shape;
extern const ks_bench_shape ks_bench_shapes[]; /* ends with name NULL */

/* False when --only names another row. */
bool ks_bench_wants(const ks_bench *b, const char *row_name);
/* A context of its own, so that memory peaks are the case's: float32 activations for float32 weights, else
 * bf16 (a CPU has float32 only). variants: as ks_ctx_params. */
ks_status ks_bench_open(ks_bench *b, const char *variants);
void ks_bench_close(ks_bench *b);
void ks_bench_free(ks_bench *b);
/* Measures the device's ceilings unless that was done; nothing on a CPU. */
ks_status ks_bench_measure_rates(ks_bench *b);

/* ---- ceilings of a CPU */

/* GFLOP/s of independent fused multiply-adds in registers on all of ctx's threads: float32, or bf16 pairs
 * into float32. 0 when the machine has no such instruction. */
double ks_bench_peak(const ks_ctx *ctx, ks_dtype dtype);
/* GB/s of reading `bytes` bytes again and again on all threads. */
double ks_bench_read(const ks_ctx *ctx, size_t bytes);

/* ---- measuring (bench_measure.c) */

typedef struct {
  double *ms;  /* sorted */
  double *raw; /* as they came */
  int64_t n;
  const char *ended;
  bool cold;
  double hot_ms, step_ms; /* NAN: not measured */
  ks_meter_clocks before, after;
} ks_samples;
/* Hot samples of fn(arg) and a wait for the device, after a warm-up of at least one call and 100 ms (GPU: ten
 * calls). Ends when the quartiles are less than 1 % apart or come no nearer, at 30 samples and 0.5 s at
 * least; or after b->seconds with b->min_samples taken; in 15 s at the latest once five were taken. */
ks_status ks_bench_sample(ks_bench *b, ks_status (*fn)(void *), void *arg, ks_samples *out);
/* Cold samples of fn(arg), which waits for nothing unless `waits`; then hot_ms, and below 20 us step_ms (not
 * of those that wait). */
ks_status ks_bench_sample_cold(ks_bench *b, ks_status (*fn)(void *), void *arg, bool waits, ks_samples *out);
/* One piece of work and how it is timed. */
typedef struct {
  ks_bench *b;
  ks_status (*fn)(void *);
  void *arg;
  bool waits;      /* fn waits for the device itself */
  bool is_warm;    /* caches are not flushed before a sample */
  double delay_us; /* device time in which the host can queue fn: ks_bench_warm_up sets it */
} ks_bench_subject;
ks_status ks_bench_warm_up(ks_bench_subject *x);
/* A sample: wall-clock time until the device is done; the device's time. */
ks_status ks_bench_sample_hot_once(const ks_bench_subject *x, double *ms);
/* Bytes of the frozen weights that a token reads: head and linear maps. */
size_t ks_bench_frozen_bytes(const ks_model *m);
ks_status ks_bench_sample_device_once(const ks_bench_subject *x, double *ms);
/* hot_ms, and for what is short step_ms. */
ks_status ks_bench_batches(const ks_bench_subject *x, ks_samples *s);

/* Several, a sample of each in turn, so that clocks and heat are shared: until all quartiles are less than 1 %
 * apart (30 rounds at least), or n times b->seconds have gone and b->min_samples rounds. */
typedef struct {
  ks_status (*sample)(void *arg, double *ms);
  void *arg;
  ks_samples *samples; /* made */
} ks_bench_turn;
ks_status ks_bench_sample_in_turn(ks_bench *b, ks_bench_turn *turns, int64_t n);
ks_status ks_samples_create(ks_samples *out);
void ks_samples_scale(ks_samples *s, double factor);
void ks_samples_free(ks_samples *s);

/* What a sample does: `work` tokens (calls, ...) for the rate; flops and bytes that are necessary (0: not
 * given); working set for a CPU's read ceiling. */
typedef struct {
  double work, flops, bytes;
  size_t working_set;
  enum { KS_PRODUCTS_OF_ACTS, KS_PRODUCTS_F32, KS_PRODUCTS_BF16 } products; /* whose ceiling flops have */
} ks_bench_load;
/* A CPU's ceilings for such a load, measured now; nothing on a GPU. */
typedef struct {
  double peak, read;
} ks_ceilings;
ks_status ks_bench_ceilings(ks_bench *b, const ks_bench_load *load, ks_ceilings *out);
/* A row with the times of s, shares (a CPU's ceilings are measured again and averaged with `before`) and a
 * verdict. Takes s->raw. */
ks_status ks_bench_add(ks_bench *b, const char *name, const char *shape, ks_samples *s,
                       const ks_bench_load *load, const ks_ceilings *before, ks_bench_row **row);
/* A row without times. */
ks_status ks_bench_add_verdict(ks_bench *b, const char *name, const char *shape, const char *verdict,
                               const char *note);

/* Necessary floating-point operations (multiply and add count as two):
 *   forward of a token  2 (P_layers + P_lora) + attention 2 L d_attn T      (causal mean; + 2 V d where the
 * head runs) training            4 (P_layers + V d) + 6 P_lora + 6 L d_attn T      forward, input gradients,
 * LoRA gradients; no frozen weight's gradient, no recomputation */
double ks_bench_forward_flops(const ks_model_config *c, int64_t n_tokens, int64_t seq_len, bool head);
double ks_bench_train_flops(const ks_model_config *c, int32_t rank, uint32_t targets, int64_t n_tokens,
                            int64_t seq_len);

/* ---- printing (bench_print.c) */

typedef struct {
  char time[32], host[128], device[256], backend[16], commit[64], build[96], version[32], arguments[512];
  ks_meter_info info;
  ks_meter_clocks clocks;
} ks_bench_meta;
void ks_bench_describe(const ks_bench *b, int argc, char **argv, ks_bench_meta *out);
void ks_bench_print_head(const ks_bench *b, const ks_bench_meta *meta);
void ks_bench_print_rates(const ks_bench *b);
/* The rows that were not printed yet. */
void ks_bench_print_rows(ks_bench *b);
/* Append. A CSV file with other columns is refused: KS_ECONFIG. */
ks_status ks_bench_write_csv(const char *path, const ks_bench *b, const ks_bench_meta *meta);
/* A line for the run ({"run": ...}), then one a row with its samples. */
ks_status ks_bench_write_jsonl(const char *path, const ks_bench *b, const ks_bench_meta *meta);
/* Before anything is measured: whether the file can be appended to. */
ks_status ks_bench_check_csv(const char *path);

/* ---- what is measured against a goal: experiments/bench_goals.def */

/* Every case of the list (b->only: rows, groups, or beginnings with *, with commas), bf16; prints what was reached. scale > 1
 * divides all sizes, to try it without a GPU's speed. */
ks_status ks_bench_goals(ks_bench *b, int64_t scale);
void ks_bench_list_goals(void);

/* ---- cases; X(name, what) each implemented as ks_status ks_bench_<name>(ks_bench *, const ks_bench_shape *)
 */
#define KS_BENCH_MAP(X)                                                                                      \
  X(lora_step,                                                                                               \
    "one fine-tuning step, 8 x 256 tokens, rank 8 on all linear layers: one cell, and a cohort of eight; "   \
    "GPU: 1 to 16 thousand tokens")                                                                          \
  X(prefill, "prompts of 128 and 512 tokens, logits of the last")                                            \
  X(decode, "128 tokens after a short prompt, greedy and top-p; sampling's share; a cohort of eight")        \
  X(embed, "embeddings of 64 texts of 128 tokens")                                                           \
  X(linear, "frozen products alone at the shape's sizes, many rows and one")                                 \
  X(similarity, "queries against stored embeddings")                                                         \
  X(ops, "every operation alone, checked against the CPU, cold and hot; and the harness itself")             \
  X(select, "one arrival offered to each policy, buffer full")

#define X(name, what) ks_status ks_bench_##name(ks_bench *b, const ks_bench_shape *shape);
KS_BENCH_MAP(X)
#undef X

#endif
