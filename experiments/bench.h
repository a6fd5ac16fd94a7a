/* `keepsake bench`: how fast this machine runs what experiments are made of, as shares of what it could.
 *
 * A case warms up, is checked, is timed sample by sample, is checked again, and only then gives a row. Beside
 * each row stands the machine's ceiling, measured right before and right after (fma loops in registers for
 * compute, a read of the same working set for memory): on shared machines both drift.
 */
#ifndef KS_BENCH_H
#define KS_BENCH_H

#include "core/adapt/adapt.h"
#include "core/model/generate.h"

/* ---- a result row; X(type, name, unit, what) */
#define KS_BENCH_COLUMNS(X)                                                                                  \
  X(str, name, "", "case")                                                                                   \
  X(str, shape, "", "model or matrix shape, and what runs on it")                                            \
  X(str, dtype, "", "of the frozen weights")                                                                 \
  X(i64, threads, "", "")                                                                                    \
  X(i64, n, "", "samples")                                                                                   \
  X(f64, min_ms, "ms", "")                                                                                   \
  X(f64, p20_ms, "ms", "")                                                                                   \
  X(f64, median_ms, "ms", "of a sample: one step, prompt, token or call")                                    \
  X(f64, p80_ms, "ms", "")                                                                                   \
  X(f64, p99_ms, "ms", "")                                                                                   \
  X(f64, rate, "1/s", "tokens (embeddings, offers) per second at the median")                                \
  X(f64, gflops, "GFLOP/s", "necessary operations (bench.h) at the median")                                  \
  X(f64, peak_share, "", "of the measured fma peak of this type")                                            \
  X(f64, gbytes, "GB/s", "bytes that must move, at the median")                                              \
  X(f64, read_share, "", "of the measured read bandwidth over the same working set")                         \
  X(f64, memory_mb, "MB", "backend memory at its peak")                                                      \
  X(f64, ratio, "", "to the case named in the note")                                                         \
  X(str, verdict, "", "ok, noisy (p80 > 1.25 p20), suspect (over a ceiling), incorrect")                     \
  X(str, note, "", "")

typedef struct {
  char name[40], shape[96], dtype[8], verdict[24], note[160];
  int64_t threads, n;
  double min_ms, p20_ms, median_ms, p80_ms, p99_ms, rate, gflops, peak_share, gbytes, read_share, memory_mb,
      ratio;
} ks_bench_row;

typedef struct {
  ks_ctx *ctx;
  ks_dtype dtype;
  double seconds; /* time for the samples of a case */
  int64_t min_samples;
  const char *only; /* measure this row alone; NULL: all */
  const ks_progress *progress;
  ks_bench_row *rows;
  int64_t n_rows, cap;
} ks_bench;

/* Model shapes by name: "15m", "110m", "135m", "1b", "3b", "260k". */
typedef struct {
  const char *name;
  ks_model_config config;
} ks_bench_shape;
extern const ks_bench_shape ks_bench_shapes[]; /* ends with name NULL */

/* False when --only names another row. */
bool ks_bench_wants(const ks_bench *b, const char *row_name);

/* ---- ceilings */

/* GFLOP/s of independent fused multiply-adds in registers on all of ctx's threads: float32, or bf16 pairs
 * into float32. 0 when the machine has no such instruction. */
double ks_bench_peak(const ks_ctx *ctx, ks_dtype dtype);
/* GB/s of reading `bytes` bytes again and again on all threads. */
double ks_bench_read(const ks_ctx *ctx, size_t bytes);

/* ---- measuring */

typedef struct {
  double *ms; /* sorted */
  int64_t n;
} ks_samples;
/* Calls fn(arg) until b->seconds are over and b->min_samples are taken, after a warm-up of at least one call
 * and 100 ms. */
ks_status ks_bench_sample(ks_bench *b, ks_status (*fn)(void *), void *arg, ks_samples *out);
void ks_samples_free(ks_samples *s);
/* A row with the times of s filled in; work: tokens of a sample; flops, bytes: of a sample (0: not given);
 * working set for read_share. Ceilings are measured now and averaged with those in `before`. */
typedef struct {
  double peak, read;
} ks_ceilings;
ks_status ks_bench_ceilings(ks_bench *b, bool compute, size_t working_set, ks_ceilings *out);
ks_status ks_bench_add(ks_bench *b, const char *name, const char *shape, const ks_samples *s, double work,
                       double flops, double bytes, size_t working_set, const ks_ceilings *before,
                       ks_bench_row **row);

/* Necessary floating-point operations (multiply and add count as two):
 *   forward of a token  2 (P_layers + P_lora) + attention 2 L d_attn T      (causal mean; + 2 V d where the
 * head runs) training            4 (P_layers + V d) + 6 P_lora + 6 L d_attn T      forward, input gradients,
 * LoRA gradients; no frozen weight's gradient, no recomputation */
double ks_bench_forward_flops(const ks_model_config *c, int64_t n_tokens, int64_t seq_len, bool head);
double ks_bench_train_flops(const ks_model_config *c, int32_t rank, uint32_t targets, int64_t n_tokens,
                            int64_t seq_len);

/* ---- cases; X(name, what) each implemented as ks_status ks_bench_<name>(ks_bench *, const ks_bench_shape *)
 */
#define KS_BENCH_MAP(X)                                                                                      \
  X(lora_step,                                                                                               \
    "one fine-tuning step, 8 x 256 tokens, rank 8 on all linear layers: one cell, and a cohort of eight")    \
  X(prefill, "prompts of 128 and 512 tokens, logits of the last")                                            \
  X(decode, "128 tokens after a short prompt, greedy and top-p; sampling's share; a cohort of eight")        \
  X(embed, "embeddings of 64 texts of 128 tokens")                                                           \
  X(linear, "frozen products alone at the shape's sizes, many rows and one")                                 \
  X(similarity, "queries against stored embeddings")                                                         \
  X(select, "one arrival offered to each policy, buffer full")

#define X(name, what) ks_status ks_bench_##name(ks_bench *b, const ks_bench_shape *shape);
KS_BENCH_MAP(X)
#undef X

#endif
