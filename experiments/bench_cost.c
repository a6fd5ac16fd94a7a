/* What each operation must move and compute: bytes of every input and output once, in the types they have,
 * and the multiplications and additions of its formula (kernels/ops.h). The kernels' own headers
 * (kernels/cuda/<op>.cu) give the same as functions of the shape, and beside it what their data movement
 * adds. Where an operation is one of elements (norms, rotary, ...) operations are not counted: their ceiling
 * is memory.
 *
 * Notation: M rows, K cols, N n_out, e bytes of an activation, W bytes of a frozen matrix, r rank. */
#include "experiments/bench_op.h"
#include "kernels/quant.h"

double ks_bench_weight_bytes(ks_dtype t, int64_t n_out, int64_t n_in) {
  if (!ks_dtype_is_quantized(t)) return (double)n_out * (double)n_in * (double)ks_dtype_size(t);
  return (double)n_out * (double)(ks_quant_row_bytes(t, n_in) + 2 * ks_quant_row_scales(t, n_in));
}

static double act(const ks_bench_op *o) {
  return (double)ks_ctx_act_size(o->ctx);
}
static double elements(const ks_bench_op *o) {
  return (double)o->d.rows * (double)o->d.cols;
}
static double weight(const ks_bench_op *o) {
  return ks_bench_weight_bytes(o->weight_dtype, o->d.n_out, o->d.cols);
}
static ks_bench_cost moves(double bytes) {
  return (ks_bench_cost){.bytes = bytes};
}

/* M rows of W, and of y. */
ks_bench_cost ks_bench_cost_embed_forward(const ks_bench_op *o) {
  return moves((double)o->d.rows * ks_bench_weight_bytes(o->weight_dtype, 1, o->d.cols) +
               act(o) * elements(o));
}

/* x, W, y; of each adapter A and B (float32).   2 M K N + 2 M r (K + N) */
ks_bench_cost ks_bench_cost_linear_forward(const ks_bench_op *o) {
  const double m = (double)o->d.rows, k = (double)o->d.cols, n = (double)o->d.n_out, r = (double)o->d.rank,
               adapters = (double)o->d.n_adapters;
  return (ks_bench_cost){.flops = 2 * m * k * n + (adapters > 0 ? 2 * m * r * (k + n) : 0),
                         .bytes = act(o) * m * (k + n) + weight(o) + 4 * adapters * r * (k + n)};
}

/* dy, W, dx; with adapters x, A, B and both gradients, read and written.   2 M K N + 4 M r (K + N): v and dB,
 * dA and dx */
ks_bench_cost ks_bench_cost_linear_backward(const ks_bench_op *o) {
  const double m = (double)o->d.rows, k = (double)o->d.cols, n = (double)o->d.n_out, r = (double)o->d.rank,
               adapters = (double)o->d.n_adapters;
  return (ks_bench_cost){.flops = 2 * m * k * n + (adapters > 0 ? 4 * m * r * (k + n) : 0),
                         .bytes = act(o) * m * (k + n + (adapters > 0 ? k : 0)) + weight(o) +
                                  12 * adapters * r * (k + n)};
}

/* x, y, rstd, w */
ks_bench_cost ks_bench_cost_rmsnorm_forward(const ks_bench_op *o) {
  return moves(2 * act(o) * elements(o) + 4 * (double)(o->d.rows + o->d.cols));
}
/* x, dy, dx, rstd, w */
ks_bench_cost ks_bench_cost_rmsnorm_backward(const ks_bench_op *o) {
  return moves(3 * act(o) * elements(o) + 4 * (double)(o->d.rows + o->d.cols));
}
/* x in place */
ks_bench_cost ks_bench_cost_rope(const ks_bench_op *o) {
  return moves(2 * act(o) * (double)o->d.rows * (double)(o->d.n_heads * o->d.head_dim));
}
/* gate, up, h */
ks_bench_cost ks_bench_cost_swiglu_forward(const ks_bench_op *o) {
  return moves(3 * act(o) * elements(o));
}
/* gate, up, dh, dgate, dup */
ks_bench_cost ks_bench_cost_swiglu_backward(const ks_bench_op *o) {
  return moves(5 * act(o) * elements(o));
}
/* x, y, index */
ks_bench_cost ks_bench_cost_rows_gather(const ks_bench_op *o) {
  return moves(2 * act(o) * elements(o) + 8 * (double)o->d.rows);
}
ks_bench_cost ks_bench_cost_rows_scatter(const ks_bench_op *o) {
  return ks_bench_cost_rows_gather(o);
}

/* Pairs of a query and a key that it sees: query i of n_q sees n_k - n_q + i + 1. */
static double attention_pairs(const ks_bench_op *o) {
  const double q = (double)o->d.n_queries, k = (double)o->d.n_keys, n_seqs = (double)o->d.rows / q;
  return n_seqs * (double)o->d.n_heads * (q * (k - q) + q * (q + 1) / 2);
}
static double query_bytes(const ks_bench_op *o) {
  return act(o) * (double)o->d.rows * (double)(o->d.n_heads * o->d.head_dim);
}
static double key_bytes(const ks_bench_op *o) {
  return act(o) * (double)(o->d.rows / o->d.n_queries * o->d.n_keys) *
         (double)(o->d.n_kv_heads * o->d.head_dim);
}
/* q, o, k, v, lse.   Two products of head_dim a pair: 4 D */
ks_bench_cost ks_bench_cost_attention_forward(const ks_bench_op *o) {
  return (ks_bench_cost){.flops = 4 * (double)o->d.head_dim * attention_pairs(o),
                         .bytes =
                             2 * query_bytes(o) + 2 * key_bytes(o) + 4 * (double)(o->d.rows * o->d.n_heads)};
}
/* q, o, do, dq, k, v, dk, dv, lse.   Five products a pair: 10 D (one of them the scores again, which are not
 * kept) */
ks_bench_cost ks_bench_cost_attention_backward(const ks_bench_op *o) {
  return (ks_bench_cost){.flops = 10 * (double)o->d.head_dim * attention_pairs(o),
                         .bytes =
                             4 * query_bytes(o) + 4 * key_bytes(o) + 4 * (double)(o->d.rows * o->d.n_heads)};
}

/* x, W, loss; dx.   Logits 2 M K N, and the gradient as much again */
ks_bench_cost ks_bench_cost_head_loss(const ks_bench_op *o) {
  const double sides = o->d.kind == 0 ? 2 : 1;
  return (ks_bench_cost){.flops = 2 * sides * elements(o) * (double)o->d.n_out,
                         .bytes = sides * act(o) * elements(o) + weight(o) + 4 * (double)o->d.rows};
}

/* logits */
ks_bench_cost ks_bench_cost_sample(const ks_bench_op *o) {
  return moves(4 * (double)o->d.rows * (double)o->d.n_out);
}
/* p, m, v, grad read and written */
ks_bench_cost ks_bench_cost_adamw(const ks_bench_op *o) {
  return moves(32 * (double)o->d.n_adapters * (double)o->d.cols);
}
/* MEAN: x; LAST: one row a sequence; y (float32) */
ks_bench_cost ks_bench_cost_pool(const ks_bench_op *o) {
  const double n_seqs = (double)(o->d.rows / o->d.n_queries), cols = (double)o->d.cols;
  const double n_read = o->d.kind == KS_POOL_MEAN ? (double)o->d.rows : n_seqs;
  return moves(act(o) * n_read * cols + 4 * n_seqs * cols);
}
/* x, h */
ks_bench_cost ks_bench_cost_entropy(const ks_bench_op *o) {
  return moves(4 * elements(o) + 8 * (double)o->d.rows);
}

/* q and k once, `out` bytes of results.   2 M N K */
static ks_bench_cost similarity(const ks_bench_op *o, double out) {
  const double cols = (double)o->d.cols, q = (double)o->d.rows, k = (double)o->d.n_keys;
  return (ks_bench_cost){.flops = 2 * q * k * cols,
                         .bytes = (double)ks_dtype_size(o->d.stored) * (q + k) * cols + out};
}
ks_bench_cost ks_bench_cost_similarity(const ks_bench_op *o) {
  return similarity(o, 4 * (double)o->d.rows * (double)o->d.n_keys);
}
ks_bench_cost ks_bench_cost_similarity_top(const ks_bench_op *o) {
  return similarity(o, 12 * (double)o->d.rows * (double)o->d.best_k);
}
ks_bench_cost ks_bench_cost_similarity_mean(const ks_bench_op *o) {
  return similarity(o, 16 * (double)o->d.rows);
}
/* The keys once: what is picked later may still lie in the cache.   2 K n_keys for each pick and each query
 */
ks_bench_cost ks_bench_cost_similarity_farthest_first(const ks_bench_op *o) {
  ks_bench_cost c = similarity(o, 8 * (double)o->d.best_k);
  c.flops = 2 * (double)(o->d.rows + o->d.best_k) * (double)o->d.n_keys * (double)o->d.cols;
  return c;
}
