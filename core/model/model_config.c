#include "core/model/model.h"

#include <math.h>

const char *ks_target_name(ks_target t) {
  static const char *const names[] = {
#define X(name) #name,
      KS_TARGET_MAP(X)
#undef X
  };
  return (unsigned)t < KS_N_TARGETS ? names[t] : "?";
}

void ks_target_shape(const ks_model_config *c, ks_target t, int64_t *n_out, int64_t *n_in) {
  const int64_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
  const int64_t shapes[KS_N_TARGETS][2] = {{q, c->hidden_size},
                                           {kv, c->hidden_size},
                                           {kv, c->hidden_size},
                                           {c->hidden_size, q},
                                           {c->intermediate_size, c->hidden_size},
                                           {c->intermediate_size, c->hidden_size},
                                           {c->hidden_size, c->intermediate_size}};
  *n_out = shapes[t][0];
  *n_in = shapes[t][1];
}

/* ---------------------------------------------------------------- configuration */

static ks_status check_sizes(const ks_model_config *c) {
  const struct {
    const char *name;
    int64_t value;
  } sizes[] = {{"n_layers", c->n_layers},
               {"hidden_size", c->hidden_size},
               {"intermediate_size", c->intermediate_size},
               {"vocab_size", c->vocab_size},
               {"max_seq_len", c->max_seq_len},
               {"n_heads", c->n_heads},
               {"n_kv_heads", c->n_kv_heads},
               {"head_dim", c->head_dim}};
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
    if (sizes[i].value < 1 || sizes[i].value > INT32_MAX)
      return KS_FAIL(KS_EDATA, "%s is %lld; it must lie in 1..%d", sizes[i].name, (long long)sizes[i].value,
                     INT32_MAX);
  if (c->n_heads % c->n_kv_heads != 0)
    return KS_FAIL(KS_EDATA, "n_heads %lld is no multiple of n_kv_heads %lld", (long long)c->n_heads,
                   (long long)c->n_kv_heads);
  if (c->head_dim % 2 != 0) return KS_FAIL(KS_EDATA, "head_dim %lld is odd", (long long)c->head_dim);
  return KS_OK;
}

static bool add_i64(int64_t a, int64_t b, int64_t *out) {
  return !__builtin_add_overflow(a, b, out);
}

/* The bytes of all weights in float32 must be a size. */
static ks_status check_products(const ks_model_config *c) {
  int64_t q, attention, mlp, layer, all, vocab, bytes;
  bool fits = ks_mul_i64(c->n_heads, c->head_dim, &q) && q <= INT32_MAX &&
              ks_mul_i64(q, c->hidden_size, &attention) && ks_mul_i64(attention, 4, &attention) &&
              ks_mul_i64(c->intermediate_size, c->hidden_size, &mlp) && ks_mul_i64(mlp, 3, &mlp) &&
              add_i64(attention, mlp, &layer);
  /* norms and biases */
  fits = fits && add_i64(layer, 4 * c->hidden_size + 2 * c->intermediate_size + 5 * q, &layer) &&
         ks_mul_i64(layer, c->n_layers, &all) && ks_mul_i64(c->vocab_size, c->hidden_size, &vocab) &&
         ks_mul_i64(vocab, 2, &vocab) && add_i64(all, vocab, &all) && add_i64(all, c->hidden_size, &all) &&
         ks_mul_i64(all, 4, &bytes);
  return fits ? KS_OK : KS_FAIL(KS_EDATA, "the sizes of the weights overflow");
}

static ks_status check_rope(const ks_model_config *c) {
  bool low_high = c->rope_low_freq_factor > 0 && c->rope_high_freq_factor > c->rope_low_freq_factor &&
                  isfinite(c->rope_high_freq_factor);
  if (!(c->rope_theta > 0) || !isfinite(c->rope_theta))
    return KS_FAIL(KS_EDATA, "rope_theta is %g; it must be above 0", c->rope_theta);
  if (c->rope_scaling == KS_ROPE_PLAIN) return KS_OK;
  if (!(c->rope_factor > 0) || !isfinite(c->rope_factor))
    return KS_FAIL(KS_EDATA, "rope_factor is %g; it must be above 0", c->rope_factor);
  if (c->rope_scaling == KS_ROPE_LINEAR) return KS_OK;
  if (c->rope_scaling != KS_ROPE_LLAMA3) return KS_FAIL(KS_EDATA, "rope_scaling is %d", (int)c->rope_scaling);
  if (!low_high)
    return KS_FAIL(KS_EDATA, "rope_low_freq_factor %g and rope_high_freq_factor %g must rise from above 0",
                   c->rope_low_freq_factor, c->rope_high_freq_factor);
  if (!(c->rope_original_max >= 1) || !isfinite(c->rope_original_max))
    return KS_FAIL(KS_EDATA, "rope_original_max is %g; it must be 1 or more", c->rope_original_max);
  return KS_OK;
}

ks_status ks_model_config_check(const ks_model_config *c) {
  KS_TRY(check_sizes(c));
  KS_TRY(check_products(c));
  if (!(c->rms_eps >= 0) || !isfinite(c->rms_eps))
    return KS_FAIL(KS_EDATA, "rms_eps is %g; it must be 0 or more", (double)c->rms_eps);
  KS_TRY(check_rope(c));
  if (c->bos_id < -1 || c->bos_id >= c->vocab_size)
    return KS_FAIL(KS_EDATA, "bos_id %d is no id below vocab_size %lld", c->bos_id, (long long)c->vocab_size);
  if (c->n_eos < 0 || c->n_eos > (int)(sizeof c->eos_ids / sizeof c->eos_ids[0]))
    return KS_FAIL(KS_EDATA, "n_eos is %d", c->n_eos);
  for (int i = 0; i < c->n_eos; i++)
    if (c->eos_ids[i] < 0 || c->eos_ids[i] >= c->vocab_size)
      return KS_FAIL(KS_EDATA, "eos id %d is no id below vocab_size %lld", c->eos_ids[i],
                     (long long)c->vocab_size);
  return KS_OK;
}

/* Scaling as in transformers' modeling_rope_utils (Llama 3.1): wavelengths beyond original_max / low are
 * stretched by factor, those below original_max / high stay, between them a blend. */
static double scale_llama3(const ks_model_config *c, double freq) {
  const double pi = 3.14159265358979323846;
  double turns = c->rope_original_max * freq / (2 * pi); /* original_max / wavelength */
  if (turns < c->rope_low_freq_factor) return freq / c->rope_factor;
  if (turns > c->rope_high_freq_factor) return freq;
  double blend = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
  return (1 - blend) * freq / c->rope_factor + blend * freq;
}

void ks_model_inv_freq(const ks_model_config *c, double *out) {
  for (int64_t j = 0; j < c->head_dim / 2; j++) {
    double freq = pow(c->rope_theta, -(double)(2 * j) / (double)c->head_dim);
    out[j] = c->rope_scaling == KS_ROPE_LINEAR   ? freq / c->rope_factor
             : c->rope_scaling == KS_ROPE_LLAMA3 ? scale_llama3(c, freq)
                                                 : freq;
  }
}
