#include "experiments/bench.h"

#include <math.h>
#include <stdio.h>

const ks_bench_shape ks_bench_shapes[] = {{"260k",
                                           {.n_layers = 5,
                                            .hidden_size = 64,
                                            .intermediate_size = 172,
                                            .vocab_size = 512,
                                            .max_seq_len = 512,
                                            .n_heads = 8,
                                            .n_kv_heads = 4,
                                            .head_dim = 8,
                                            .rms_eps = 1e-5F,
                                            .rope_theta = 1e4,
                                            .tied_head = true,
                                            .bos_id = 1}},
                                          {"15m",
                                           {.n_layers = 6,
                                            .hidden_size = 288,
                                            .intermediate_size = 768,
                                            .vocab_size = 32000,
                                            .max_seq_len = 1024,
                                            .n_heads = 6,
                                            .n_kv_heads = 6,
                                            .head_dim = 48,
                                            .rms_eps = 1e-5F,
                                            .rope_theta = 1e4,
                                            .tied_head = true,
                                            .bos_id = 1}},
                                          {"110m",
                                           {.n_layers = 12,
                                            .hidden_size = 768,
                                            .intermediate_size = 2048,
                                            .vocab_size = 32000,
                                            .max_seq_len = 1024,
                                            .n_heads = 12,
                                            .n_kv_heads = 12,
                                            .head_dim = 64,
                                            .rms_eps = 1e-5F,
                                            .rope_theta = 1e4,
                                            .tied_head = true,
                                            .bos_id = 1}},
                                          {"135m",
                                           {.n_layers = 30,
                                            .hidden_size = 576,
                                            .intermediate_size = 1536,
                                            .vocab_size = 49152,
                                            .max_seq_len = 2048,
                                            .n_heads = 9,
                                            .n_kv_heads = 3,
                                            .head_dim = 64,
                                            .rms_eps = 1e-5F,
                                            .rope_theta = 1e4,
                                            .tied_head = true,
                                            .bos_id = 1}},
                                          {"1b",
                                           {.n_layers = 16,
                                            .hidden_size = 2048,
                                            .intermediate_size = 8192,
                                            .vocab_size = 128256,
                                            .max_seq_len = 2048,
                                            .n_heads = 32,
                                            .n_kv_heads = 8,
                                            .head_dim = 64,
                                            .rms_eps = 1e-5F,
                                            .rope_theta = 5e5,
                                            .tied_head = true,
                                            .bos_id = 1}},
                                          {"3b",
                                           {.n_layers = 26,
                                            .hidden_size = 3200,
                                            .intermediate_size = 8640,
                                            .vocab_size = 32000,
                                            .max_seq_len = 2048,
                                            .n_heads = 32,
                                            .n_kv_heads = 32,
                                            .head_dim = 100,
                                            .rms_eps = 1e-6F,
                                            .rope_theta = 1e4,
                                            .tied_head = false,
                                            .bos_id = 1}},
                                          {0}};

bool ks_bench_wants(const ks_bench *b, const char *row_name) {
  return !b->only || strcmp(b->only, row_name) == 0;
}

/* ---------------------------------------------------------------- samples */

static int compare_double(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

ks_status ks_bench_sample(ks_bench *b, ks_status (*fn)(void *), void *arg, ks_samples *out) {
  enum { MOST = 4096 };
  double start = ks_clock_seconds();
  do
    KS_TRY(fn(arg));
  while (ks_clock_seconds() - start < 0.1);
  KS_TRY(ks_alloc_array(&out->ms, MOST, sizeof *out->ms, "samples"));
  out->n = 0;
  start = ks_clock_seconds();
  while (out->n < MOST && (out->n < b->min_samples || ks_clock_seconds() - start < b->seconds)) {
    KS_TRY(ks_progress_report(b->progress, "bench", ks_clock_seconds() - start, b->seconds));
    double t = ks_clock_seconds();
    KS_TRY(fn(arg));
    out->ms[out->n++] = 1e3 * (ks_clock_seconds() - t);
  }
  qsort(out->ms, (size_t)out->n, sizeof *out->ms, compare_double);
  return KS_OK;
}

void ks_samples_free(ks_samples *s) {
  free(s->ms);
  *s = (ks_samples){0};
}

static double quantile(const ks_samples *s, double q) {
  double at = q * (double)(s->n - 1);
  int64_t i = (int64_t)at;
  return i + 1 < s->n ? s->ms[i] + (at - (double)i) * (s->ms[i + 1] - s->ms[i]) : s->ms[s->n - 1];
}

/* ---------------------------------------------------------------- rows */

ks_status ks_bench_ceilings(ks_bench *b, bool compute, size_t working_set, ks_ceilings *out) {
  out->peak = compute ? ks_bench_peak(b->ctx, b->dtype) : 0;
  if (compute && out->peak == 0)
    out->peak = ks_bench_peak(b->ctx, KS_DTYPE_F32); /* bf16 without its instruction: expanded to float32 */
  out->read = working_set ? ks_bench_read(b->ctx, working_set) : 0;
  return ks_progress_report(b->progress, "bench", 0, 0);
}

static const char *verdict(const ks_bench_row *r) {
  if (r->peak_share > 1.02 || r->read_share > 1.15) return "suspect";
  return r->p80_ms > 1.25 * r->p20_ms ? "noisy" : "ok";
}

ks_status ks_bench_add(ks_bench *b, const char *name, const char *shape, const ks_samples *s, double work,
                       double flops, double bytes, size_t working_set, const ks_ceilings *before,
                       ks_bench_row **out) {
  if (b->n_rows == b->cap) {
    int64_t cap = b->cap ? 2 * b->cap : 32;
    ks_bench_row *grown = realloc(b->rows, (size_t)cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "bench: no memory for %lld rows", (long long)cap);
    b->rows = grown;
    b->cap = cap;
  }
  ks_ceilings after;
  KS_TRY(ks_bench_ceilings(b, flops > 0, working_set, &after));
  ks_bench_row *r = &b->rows[b->n_rows++];
  *r = (ks_bench_row){
      .threads = ks_ctx_n_threads(b->ctx), .n = s->n, .memory_mb = (double)ks_mem_peak(b->ctx) / 1e6};
  snprintf(r->name, sizeof r->name, "%s", name);
  snprintf(r->shape, sizeof r->shape, "%s", shape);
  snprintf(r->dtype, sizeof r->dtype, "%s", ks_dtype_name(b->dtype));
  r->min_ms = s->ms[0];
  r->p20_ms = quantile(s, 0.2);
  r->median_ms = quantile(s, 0.5);
  r->p80_ms = quantile(s, 0.8);
  r->p99_ms = quantile(s, 0.99);
  double seconds = r->median_ms / 1e3;
  r->rate = work / seconds;
  r->gflops = flops / seconds / 1e9;
  r->gbytes = bytes / seconds / 1e9;
  r->peak_share = flops > 0 ? 2 * r->gflops / (before->peak + after.peak) : NAN;
  r->read_share = bytes > 0 && working_set ? 2 * r->gbytes / (before->read + after.read) : NAN;
  r->ratio = NAN;
  snprintf(r->verdict, sizeof r->verdict, "%s", verdict(r));
  *out = r;
  return KS_OK;
}

/* ---------------------------------------------------------------- necessary work */

static double layer_parameters(const ks_model_config *c, uint32_t targets, int32_t rank, double *lora) {
  double frozen = 0;
  *lora = 0;
  for (int t = 0; t < KS_N_TARGETS; t++) {
    int64_t n_out, n_in;
    ks_target_shape(c, (ks_target)t, &n_out, &n_in);
    frozen += (double)n_out * (double)n_in;
    if (targets >> t & 1) *lora += (double)rank * (double)(n_out + n_in);
  }
  *lora *= (double)c->n_layers;
  return frozen * (double)c->n_layers;
}

double ks_bench_forward_flops(const ks_model_config *c, int64_t n_tokens, int64_t seq_len, bool head) {
  double lora, frozen = layer_parameters(c, 0, 0, &lora);
  double attention = 2.0 * (double)c->n_layers * (double)(c->n_heads * c->head_dim) * (double)seq_len;
  double head_flops = head ? 2.0 * (double)c->vocab_size * (double)c->hidden_size : 0;
  return (double)n_tokens * (2 * frozen + attention + head_flops);
}

double ks_bench_train_flops(const ks_model_config *c, int32_t rank, uint32_t targets, int64_t n_tokens,
                            int64_t seq_len) {
  double lora, frozen = layer_parameters(c, targets, rank, &lora);
  double attention = 6.0 * (double)c->n_layers * (double)(c->n_heads * c->head_dim) * (double)seq_len;
  return (double)n_tokens *
         (4 * (frozen + (double)c->vocab_size * (double)c->hidden_size) + 6 * lora + attention);
}
