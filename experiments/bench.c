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

/* ---------------------------------------------------------------- where */

ks_status ks_bench_open(ks_bench *b, const char *variants) {
  ks_ctx_params params = {.backend = b->device,
                          .n_threads = b->n_threads,
                          .isa = b->isa,
                          .activations = b->dtype == KS_DTYPE_F32 ? KS_DTYPE_F32 : KS_DTYPE_BF16,
                          .variants = variants};
  KS_TRY(ks_ctx_create(&b->ctx, &params));
  b->chosen = variants;
  ks_status status = ks_meter_create(b->ctx, &b->meter);
  if (status != KS_OK)
    ks_bench_close(b);
  else
    ks_meter_describe(b->meter, &b->info);
  return status;
}

void ks_bench_close(ks_bench *b) {
  ks_meter_destroy(b->meter);
  ks_ctx_destroy(b->ctx);
  b->meter = NULL;
  b->ctx = NULL;
}

void ks_bench_free(ks_bench *b) {
  for (int64_t i = 0; i < b->n_rows; i++)
    free(b->rows[i].samples);
  free(b->rows);
  b->rows = NULL;
  b->n_rows = b->cap = 0;
}

ks_status ks_bench_measure_rates(ks_bench *b) {
  if (b->has_rates || b->seconds == 0 || !b->info.has_timer || b->info.is_shim) return KS_OK;
  KS_TRY(ks_meter_copy_rate(b->meter, &b->rates.copy));
  KS_TRY(ks_meter_read_rate(b->meter, &b->rates.read));
  KS_TRY(ks_meter_matrix_rate(b->meter, KS_DTYPE_F32, &b->rates.matrix_f32));
  KS_TRY(ks_meter_matrix_rate(b->meter, KS_DTYPE_BF16, &b->rates.matrix_bf16));
  b->has_rates = true;
  return KS_OK;
}

/* ---------------------------------------------------------------- rows */

ks_status ks_bench_ceilings(ks_bench *b, const ks_bench_load *load, ks_ceilings *out) {
  *out = (ks_ceilings){0};
  if (b->info.has_timer || b->seconds == 0) return KS_OK;
  out->peak = load->flops > 0 ? ks_bench_peak(b->ctx, b->dtype) : 0;
  if (load->flops > 0 && out->peak == 0)
    out->peak = ks_bench_peak(b->ctx, KS_DTYPE_F32); /* bf16 without its instruction: expanded to float32 */
  out->read = load->working_set ? ks_bench_read(b->ctx, load->working_set) : 0;
  return ks_progress_report(b->progress, "bench", 0, 0);
}

static ks_status new_row(ks_bench *b, const char *name, const char *shape, ks_bench_row **out) {
  if (b->n_rows == b->cap) {
    int64_t cap = b->cap ? 2 * b->cap : 32;
    ks_bench_row *grown = realloc(b->rows, (size_t)cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "bench: no memory for %lld rows", (long long)cap);
    b->rows = grown;
    b->cap = cap;
  }
  ks_bench_row *r = &b->rows[b->n_rows++];
  *r = (ks_bench_row){0};
#define RESET_str(field)           (void)0
#define RESET_i64(field)           (void)0
#define RESET_f64(field)           r->field = NAN
#define RESET_pct(field)           r->field = NAN
#define X(type, field, unit, what) RESET_##type(field);
  KS_BENCH_COLUMNS(X)
#undef X
  snprintf(r->name, sizeof r->name, "%s", name);
  snprintf(r->shape, sizeof r->shape, "%s", shape);
  snprintf(r->dtype, sizeof r->dtype, "%s", ks_dtype_name(b->dtype));
  snprintf(r->acts, sizeof r->acts, "%s", ks_dtype_name(ks_ctx_act_dtype(b->ctx)));
  snprintf(r->variant, sizeof r->variant, "%s", b->chosen ? b->chosen : "");
  r->threads = ks_ctx_n_threads(b->ctx);
  r->memory_mb = (double)ks_mem_peak(b->ctx) / 1e6;
  *out = r;
  return KS_OK;
}

ks_status ks_bench_add_verdict(ks_bench *b, const char *name, const char *shape, const char *verdict,
                               const char *note) {
  ks_bench_row *r;
  KS_TRY(new_row(b, name, shape, &r));
  snprintf(r->verdict, sizeof r->verdict, "%s", verdict);
  snprintf(r->note, sizeof r->note, "%s", note);
  return KS_OK;
}

static double quantile(const ks_samples *s, double q) {
  double at = q * (double)(s->n - 1);
  int64_t i = (int64_t)at;
  return i + 1 < s->n ? s->ms[i] + (at - (double)i) * (s->ms[i + 1] - s->ms[i]) : s->ms[s->n - 1];
}

static double share(double value, double ceiling) {
  return value > 0 && ceiling > 0 ? value / ceiling : NAN;
}

/* A GPU's ceilings are one measurement of a long load, with 2 % of their own spread; what moves more bytes
 * than copies and reads alike did not move them. A CPU's are measured anew beside each row and drift more. */
static const char *verdict_of(const ks_bench *b, const ks_bench_row *r, bool throttled) {
  const bool over_memory =
      b->info.has_timer ? r->copy_share > 1.02 && r->read_share > 1.02 : r->read_share > 1.15;
  if (r->peak_share > 1.02 || over_memory) return "suspect";
  if (throttled) return "throttled";
  return r->p80_ms > 1.25 * r->p20_ms ? "noisy" : "ok";
}

static void fill_times(ks_bench_row *r, ks_samples *s) {
  r->n = s->n;
  r->min_ms = s->ms[0];
  r->p20_ms = quantile(s, 0.2);
  r->p25_ms = quantile(s, 0.25);
  r->median_ms = quantile(s, 0.5);
  r->p75_ms = quantile(s, 0.75);
  r->p80_ms = quantile(s, 0.8);
  r->p99_ms = quantile(s, 0.99);
  r->iqr = (r->p75_ms - r->p25_ms) / r->median_ms;
  r->hot_ms = s->hot_ms;
  r->step_ms = s->step_ms;
  r->sm_mhz_before = s->before.sm_mhz;
  r->sm_mhz_after = s->after.sm_mhz;
  snprintf(r->mode, sizeof r->mode, "%s", s->cold ? "cold" : "hot");
  snprintf(r->ended, sizeof r->ended, "%s", s->ended);
  r->samples = s->raw;
  s->raw = NULL;
}

ks_status ks_bench_add(ks_bench *b, const char *name, const char *shape, ks_samples *s,
                       const ks_bench_load *load, const ks_ceilings *before, ks_bench_row **out) {
  ks_ceilings after;
  ks_bench_row *r;
  KS_TRY(ks_bench_ceilings(b, load, &after));
  KS_TRY(new_row(b, name, shape, &r));
  fill_times(r, s);
  const double seconds = r->median_ms / 1e3;
  r->rate = load->work / seconds;
  r->gflops = load->flops / seconds / 1e9;
  r->gbytes = load->bytes / seconds / 1e9;
  if (b->info.has_timer) {
    const bool bf16 = load->products == KS_PRODUCTS_OF_ACTS ? ks_ctx_act_dtype(b->ctx) == KS_DTYPE_BF16
                                                            : load->products == KS_PRODUCTS_BF16;
    r->peak_share = share(r->gflops, bf16 ? b->rates.matrix_bf16 : b->rates.matrix_f32);
    r->read_share = share(r->gbytes, b->rates.read);
    r->copy_share = share(r->gbytes, b->rates.copy);
    r->roofline_share = fmax(r->peak_share, r->read_share); /* NAN where neither is known */
  } else {
    r->peak_share = share(r->gflops, (before->peak + after.peak) / 2);
    r->read_share = share(r->gbytes, (before->read + after.read) / 2);
  }
  snprintf(r->verdict, sizeof r->verdict, "%s", verdict_of(b, r, s->before.throttled || s->after.throttled));
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
