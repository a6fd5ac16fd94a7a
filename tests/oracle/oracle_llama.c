#include "tests/oracle/oracle_llama.h"
#include <math.h>

void ks_oracle_llama_shape(const ks_model_config *c, int target, int64_t *n_out, int64_t *n_in) {
  int64_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
  int64_t h = c->hidden_size, f = c->intermediate_size;
  const int64_t shapes[KS_N_TARGETS][2] = {{q, h}, {kv, h}, {kv, h}, {h, q}, {f, h}, {f, h}, {h, f}};
  *n_out = shapes[target][0];
  *n_in = shapes[target][1];
}

static double *zeros(int64_t n) {
  double *p = calloc((size_t)n + 1, sizeof *p);
  KS_ASSERT(p != NULL);
  return p;
}

/* Where A of (layer, target) begins; NULL: no adapter there. */
static const double *lora_at(const ks_oracle_llama *m, const ks_oracle_lora *lora, int64_t layer,
                             int target) {
  if (!lora || !(lora->targets >> target & 1)) return NULL;
  int64_t at = 0;
  for (int64_t i = 0; i < layer * KS_N_TARGETS + target; i++) {
    int64_t n_out, n_in;
    ks_oracle_llama_shape(&m->config, (int)(i % KS_N_TARGETS), &n_out, &n_in);
    if (lora->targets >> (i % KS_N_TARGETS) & 1) at += lora->rank * (n_out + n_in);
  }
  return lora->weights + at;
}

/* y += x W^T + bias + scale B (A x) */
static void add_linear(const ks_oracle_llama *m, const ks_oracle_lora *lora, int64_t layer, int target,
                       const double *x, double *y, int64_t n_rows) {
  int64_t n_out, n_in;
  ks_oracle_llama_shape(&m->config, target, &n_out, &n_in);
  const double *w = m->layers[layer].linear[target], *bias = m->layers[layer].bias[target];
  const double *a = lora_at(m, lora, layer, target);
  for (int64_t i = 0; i < n_rows; i++) {
    for (int64_t o = 0; o < n_out; o++) {
      double sum = bias ? bias[o] : 0;
      for (int64_t j = 0; j < n_in; j++)
        sum += x[i * n_in + j] * w[o * n_in + j];
      y[i * n_out + o] += sum;
    }
    for (int64_t r = 0; a && r < lora->rank; r++) {
      const double *b = a + lora->rank * n_in + r * n_out;
      double u = 0;
      for (int64_t j = 0; j < n_in; j++)
        u += x[i * n_in + j] * a[r * n_in + j];
      for (int64_t o = 0; o < n_out; o++)
        y[i * n_out + o] += lora->scale * u * b[o];
    }
  }
}

static void norm(const double *x, const double *w, double *y, int64_t n_rows, int64_t n_cols, double eps) {
  for (int64_t i = 0; i < n_rows; i++) {
    double squares = 0;
    for (int64_t j = 0; j < n_cols; j++)
      squares += x[i * n_cols + j] * x[i * n_cols + j];
    for (int64_t j = 0; j < n_cols; j++)
      y[i * n_cols + j] = x[i * n_cols + j] / sqrt(squares / (double)n_cols + eps) * w[j];
  }
}

static void rotate(double *x, const double *inv_freq, int64_t n_rows, int64_t n_heads, int64_t head_dim) {
  for (int64_t i = 0; i < n_rows * n_heads; i++) {
    double *head = x + i * head_dim;
    for (int64_t j = 0; j < head_dim / 2; j++) {
      double angle = (double)(i / n_heads) * inv_freq[j], c = cos(angle), s = sin(angle);
      double x1 = head[j], x2 = head[j + head_dim / 2];
      head[j] = x1 * c - x2 * s;
      head[j + head_dim / 2] = x2 * c + x1 * s;
    }
  }
}

/* o of query `i`, head `h`. */
static void attend(const ks_model_config *c, const double *q, const double *k, const double *v, int64_t i,
                   int64_t h, double *p, double *o) {
  int64_t d = c->head_dim, kv = c->n_kv_heads * d, at = h / (c->n_heads / c->n_kv_heads) * d;
  double largest = -INFINITY, sum = 0;
  for (int64_t j = 0; j <= i; j++) {
    p[j] = 0;
    for (int64_t e = 0; e < d; e++)
      p[j] += q[(i * c->n_heads + h) * d + e] * k[j * kv + at + e];
    p[j] /= sqrt((double)d);
    largest = fmax(largest, p[j]);
  }
  for (int64_t j = 0; j <= i; j++)
    sum += p[j] = exp(p[j] - largest);
  for (int64_t j = 0; j <= i; j++) {
    for (int64_t e = 0; e < d; e++)
      o[(i * c->n_heads + h) * d + e] += p[j] / sum * v[j * kv + at + e];
  }
}

static void attention_block(const ks_oracle_llama *m, const ks_oracle_lora *lora, int64_t layer, double *h,
                            double *x, int64_t n) {
  const ks_model_config *c = &m->config;
  const ks_oracle_layer *w = &m->layers[layer];
  double *q = zeros(n * c->n_heads * c->head_dim), *k = zeros(n * c->n_kv_heads * c->head_dim);
  double *v = zeros(n * c->n_kv_heads * c->head_dim), *o = zeros(n * c->n_heads * c->head_dim), *p = zeros(n);
  norm(h, w->attn_norm, x, n, c->hidden_size, (double)c->rms_eps);
  add_linear(m, lora, layer, KS_TARGET_q, x, q, n);
  add_linear(m, lora, layer, KS_TARGET_k, x, k, n);
  add_linear(m, lora, layer, KS_TARGET_v, x, v, n);
  if (w->q_norm) {
    norm(q, w->q_norm, q, n * c->n_heads, c->head_dim, (double)c->rms_eps);
    norm(k, w->k_norm, k, n * c->n_kv_heads, c->head_dim, (double)c->rms_eps);
  }
  rotate(q, m->inv_freq, n, c->n_heads, c->head_dim);
  rotate(k, m->inv_freq, n, c->n_kv_heads, c->head_dim);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t head = 0; head < c->n_heads; head++)
      attend(c, q, k, v, i, head, p, o);
  }
  add_linear(m, lora, layer, KS_TARGET_o, o, h, n);
  free(q);
  free(k);
  free(v);
  free(o);
  free(p);
}

static void mlp_block(const ks_oracle_llama *m, const ks_oracle_lora *lora, int64_t layer, double *h,
                      double *x, int64_t n) {
  const ks_model_config *c = &m->config;
  double *gate = zeros(n * c->intermediate_size), *up = zeros(n * c->intermediate_size);
  norm(h, m->layers[layer].mlp_norm, x, n, c->hidden_size, (double)c->rms_eps);
  add_linear(m, lora, layer, KS_TARGET_gate, x, gate, n);
  add_linear(m, lora, layer, KS_TARGET_up, x, up, n);
  for (int64_t i = 0; i < n * c->intermediate_size; i++)
    gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
  add_linear(m, lora, layer, KS_TARGET_down, gate, h, n);
  free(gate);
  free(up);
}

void ks_oracle_llama_logits(const ks_oracle_llama *m, const ks_oracle_lora *lora, const int32_t *tokens,
                            int64_t n_tokens, double *logits) {
  int64_t n_cols = m->config.hidden_size, n_vocab = m->config.vocab_size;
  double *h = zeros(n_tokens * n_cols), *x = zeros(n_tokens * n_cols);
  for (int64_t i = 0; i < n_tokens; i++)
    memcpy(h + i * n_cols, m->embedding + tokens[i] * n_cols, (size_t)n_cols * sizeof *h);
  for (int64_t l = 0; l < m->config.n_layers; l++) {
    attention_block(m, lora, l, h, x, n_tokens);
    mlp_block(m, lora, l, h, x, n_tokens);
  }
  norm(h, m->final_norm, x, n_tokens, n_cols, (double)m->config.rms_eps);
  for (int64_t i = 0; i < n_tokens * n_vocab; i++) {
    const double *w = m->head + i % n_vocab * n_cols, *row = x + i / n_vocab * n_cols;
    logits[i] = 0;
    for (int64_t j = 0; j < n_cols; j++)
      logits[i] += row[j] * w[j];
  }
  free(h);
  free(x);
}

void ks_oracle_llama_losses(const ks_oracle_llama *m, const ks_oracle_lora *lora, const int32_t *tokens,
                            int64_t n_tokens, int64_t loss_begin, double *losses) {
  int64_t n_vocab = m->config.vocab_size;
  double *logits = zeros(n_tokens * n_vocab);
  ks_oracle_llama_logits(m, lora, tokens, n_tokens, logits);
  for (int64_t i = loss_begin; i < n_tokens; i++) {
    const double *row = logits + (i - 1) * n_vocab;
    double largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n_vocab; j++)
      largest = fmax(largest, row[j]);
    for (int64_t j = 0; j < n_vocab; j++)
      sum += exp(row[j] - largest);
    losses[i - loss_begin] = largest + log(sum) - row[tokens[i]];
  }
  free(logits);
}
