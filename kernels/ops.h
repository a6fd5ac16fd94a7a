/* Every numerical operation of Keepsake: formula, shapes, aliasing, workspace, errors.
 *
 *   ks_ctx *ctx;
 *   ks_ctx_params params = KS_CTX_PARAMS_DEFAULT;
 *   KS_TRY(ks_ctx_create(&ctx, &params));                       // backend "cpu", all cores
 *   ks_weight *w;
 *   KS_TRY(ks_weight_create(ctx, &(ks_weight_params){.n_out = 8, .n_in = 4, .values = host_w}, &w));
 *   KS_TRY(ks_linear_forward(ctx, &(ks_linear_args){.w = w, .x = x, .y = y, .n_rows = 3}));
 *
 * Conventions
 * - Matrices are row-major; `x: [n_rows, n_cols]`. "rows" are tokens of all sequences packed one after another.
 * - Pointers called x, y, q, ... lie in the backend's memory (ks_mem_alloc); arrays that describe work
 *   (sequences, segments, adapters) and everything marked "host" lie in host memory and may be changed or freed
 *   after the call.
 * - `void *` is an array of activations: elements of the type ks_ctx_act_dtype(ctx), which is float32 on the CPU and
 *   float32 or bf16 on a GPU (ks_act_at steps through one). Everything else is float32 unless said otherwise: sums,
 *   statistics, adapters and their gradients always are.
 * - Sizes of zero are legal and do nothing. Illegal arguments: KS_EINVAL. What is legal, but more than a backend takes:
 *   KS_EUNSUPPORTED. "CUDA:" names such limits; a launch has its own (blocks, memory).
 * - Operations are queued: their results are there for the operations after them. "host out" arrays are filled when
 *   the call returns, but those marked "late" only after the next ks_sync, and must live until then.
 * - No operation allocates or waits inside a training or decoding step except where "workspace" says so.
 * - Outputs must not overlap inputs except where "aliasing" allows it.
 * - Determinism: every output element is one fixed chain of operations, which depends on nothing but the shape of its own
 *   row, sequence or segment. The same bits therefore come out for any number of threads, any batch and any
 *   position of a row in it. On the CPU the chain of a product is fma over the reduction index in rising order, starting
 *   from the old value when accumulating; so there it does not matter either in how many pieces a sum comes.
 * - NaN and infinity pass through; no operation crashes on them.
 */
#ifndef KS_OPS_H
#define KS_OPS_H

#include "kernels/base/size.h"
#include "kernels/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- element types */

/* Frozen weights are kept as one of the first five; Q8_0, Q4_0 and NF4 are blocks (kernels/quant.h). I8 is for stored
 * embeddings. */
typedef enum {
  KS_DTYPE_F32 = 0,
  KS_DTYPE_BF16,
  KS_DTYPE_Q8_0,
  KS_DTYPE_Q4_0,
  KS_DTYPE_NF4,
  KS_DTYPE_F16,
  KS_DTYPE_I8
} ks_dtype;
bool ks_dtype_is_weight(ks_dtype t); /* one of the first five */
size_t ks_dtype_size(ks_dtype t); /* bytes an element; 0: blocks */
bool ks_dtype_is_quantized(ks_dtype t);
const char *ks_dtype_name(ks_dtype t); /* "f32" */
ks_status ks_dtype_parse(const char *name, ks_dtype *out);

/* ---------------------------------------------------------------- context, memory */

typedef struct ks_backend ks_backend; /* constant table of functions: kernels/backend.h */
typedef struct ks_ctx ks_ctx;         /* one device and its threads; not thread-safe */

typedef struct {
  const char *backend; /* "cpu", "cuda", or "auto" (a GPU when there is one) */
  int n_threads;       /* 0: all cores this process may use */
  const char *isa;     /* NULL or "auto"; "avx512bf16", "avx512", "avx2", "neon", "generic" to force one (tests) */
  ks_dtype activations; /* F32 or BF16, where the backend has a choice; the CPU always takes F32 */
  const char *variants; /* NULL, or kernels other than the default: "attention_forward=simt,head_loss=chunked" */
} ks_ctx_params;
#define KS_CTX_PARAMS_DEFAULT ((ks_ctx_params){.backend = "auto", .n_threads = 0, .isa = NULL})

/* KS_EENV when the named backend or instruction set is not there, with the reason. */
ks_status ks_ctx_create(ks_ctx **out, const ks_ctx_params *params);
void ks_ctx_destroy(ks_ctx *ctx); /* NULL-safe */
const char *ks_ctx_backend_name(const ks_ctx *ctx); /* "cpu" */
const char *ks_ctx_isa_name(const ks_ctx *ctx);     /* "avx512bf16" */
int ks_ctx_n_threads(const ks_ctx *ctx);
/* Host description of device for records: "AMD EPYC ... (2 threads, avx512bf16)". */
const char *ks_ctx_device_name(const ks_ctx *ctx);
/* Type of activations (see above): KS_DTYPE_F32 or KS_DTYPE_BF16. */
ks_dtype ks_ctx_act_dtype(const ks_ctx *ctx);
size_t ks_ctx_act_size(const ks_ctx *ctx); /* bytes of one */
/* The n-th element of an array of activations. NULL stays NULL. */
void *ks_act_at(const ks_ctx *ctx, const void *p, int64_t n);
/* What ks_ctx_params.variants may name on this backend: fills out[0 .. min(cap, return)), valid as long as the program runs. */
typedef struct {
  const char *op, *name;
  bool f32, bf16; /* activations that it works on */
} ks_op_variant;
int64_t ks_backend_variants(const char *backend, ks_op_variant *out, int64_t cap);

/* Waits until everything that was queued is done and brings the late outputs. KS_EDEVICE: something failed on the device since
 * the last wait. */
ks_status ks_sync(ks_ctx *ctx);
/* A step is a run of operations that comes again and again: a training step, a decoding step. A backend may keep what it queued
 * under `key` and queue it as a whole the next time (CUDA graphs). Steps do not nest and hold no ks_mem_alloc, ks_mem_free,
 * ks_mem_download, ks_sync or operation whose host outputs are not late; between begin and end the same key should bring the same
 * operations with the same sizes and pointers: when it does not, all works and nothing is gained. After a failure inside
 * a step call ks_step_end too. The CPU does nothing here. */
ks_status ks_step_begin(ks_ctx *ctx, uint64_t key);
ks_status ks_step_end(ks_ctx *ctx);

/* Backend memory, 64-byte aligned, zeroed. KS_ENOMEM says how much there is. */
ks_status ks_mem_alloc(ks_ctx *ctx, size_t bytes, void **out);
void ks_mem_free(ks_ctx *ctx, void *p); /* NULL-safe */
ks_status ks_mem_upload(ks_ctx *ctx, void *dst, const void *host_src, size_t bytes);
ks_status ks_mem_download(ks_ctx *ctx, void *host_dst, const void *src, size_t bytes);
ks_status ks_mem_zero(ks_ctx *ctx, void *p, size_t bytes);
ks_status ks_mem_copy(ks_ctx *ctx, void *dst, const void *src, size_t bytes);
/* Bytes now held and the most ever held by this context. */
size_t ks_mem_used(const ks_ctx *ctx);
size_t ks_mem_peak(const ks_ctx *ctx);
/* Bytes that ks_mem_alloc can still get on a device of its own memory; SIZE_MAX where nobody knows (CPU). */
size_t ks_mem_available(ks_ctx *ctx);

/* ---------------------------------------------------------------- frozen weights */

/* A frozen matrix in the backend's own packed layout. With dtype KS_DTYPE_BF16 the stored weights are rounded to
 * bf16 and products round their activations to bf16 too (round to nearest even), accumulating in float32. With Q8_0, Q4_0 or
 * NF4 they are rounded to blocks (kernels/quant.h): a GPU keeps the blocks and unpacks them inside its products, into the type of
 * its activations; the CPU keeps the rounded values as float32, to check with and to compare. */
typedef struct ks_weight ks_weight;
typedef struct {
  int64_t n_out, n_in;
  ks_dtype dtype;        /* of the packed weight: F32, BF16, Q8_0, Q4_0, NF4; on a GPU BF16 needs bf16 activations, F32 float32 */
  ks_dtype values_dtype; /* of `values`: F32, BF16 or F16 */
  const void *values;    /* host, [n_out, n_in] */
  const float *bias;     /* host, [n_out] or NULL */
} ks_weight_params;
ks_status ks_weight_create(ks_ctx *ctx, const ks_weight_params *params, ks_weight **out);
void ks_weight_destroy(ks_ctx *ctx, ks_weight *w); /* NULL-safe */
int64_t ks_weight_n_out(const ks_weight *w);
int64_t ks_weight_n_in(const ks_weight *w);
ks_dtype ks_weight_dtype(const ks_weight *w);
size_t ks_weight_bytes(const ks_weight *w); /* memory it holds, all layouts */
/* Keeps the second layout that input gradients read. Without it every backward step makes it anew, in memory that all
 * weights share: half the bytes for some percent of the time. */
ks_status ks_weight_prepare_backward(ks_ctx *ctx, ks_weight *w);

/* y[i, :] = w[tokens[i], :].  tokens: host [n_rows], each in [0, n_out) else KS_EINVAL;  y: [n_rows, n_in]. */
typedef struct {
  const ks_weight *w;
  const int32_t *tokens;
  void *y;
  int64_t n_rows;
  const int32_t *drawn; /* NULL, or in place of tokens: backend memory [n_rows], what ks_sample left there; a number that is no
                           row of w reads row 0 */
} ks_embed_args;
ks_status ks_embed_forward(ks_ctx *ctx, const ks_embed_args *a);

/* ---------------------------------------------------------------- linear with segmented LoRA */

/* Rows [row_begin, row_begin + n_rows) use adapter number `adapter` (-1: none). Segments of a batch are sorted and
 * do not overlap; rows outside every segment use no adapter; an adapter appears in at most one segment. */
typedef struct {
  int64_t row_begin, n_rows;
  int32_t adapter;
  uint64_t dropout_key; /* with dropout: the segment's own key, so that its mask does not depend on the batch */
} ks_segment;

/* One adapter at one linear layer (Hu et al. 2021, arXiv 2106.09685): y += scale * B (A x), scale = alpha / rank. */
typedef struct {
  int32_t rank;         /* 1..256; 0: this adapter does not touch this layer */
  float scale;          /* alpha / rank */
  const float *a;       /* [rank, n_in] */
  const float *b_t;     /* [rank, n_out]: B transposed */
  float *grad_a;        /* backward, accumulated into: [rank, n_in] */
  float *grad_b_t;      /* backward, accumulated into: [rank, n_out] */
} ks_lora;

/* Forward:  y = x W^T + bias (+ residual), then for each segment with adapter l:
 *             u = drop(x) A_l^T,   y += scale_l * u B_l^T.
 *   drop(x)[i, j] = keep(i, j) ? x[i, j] / (1 - p) : 0, with p rounded to t / 65536. With e = i * stride + j, i the row
 *   within its segment and stride n_in rounded up to a multiple of 128, keep(i, j) = h >= t, h the lower (even) or upper
 *   (odd) half, by q % 2, of word q / 2, q = e / 16 % 8, of Philox(key = dropout_key, hi = dropout_site,
 *   lo = e / 128 * 16 + e % 16): eight elements a block, in the lanes of vectors.   p = 0: x itself.
 * Backward: v = scale_l * dy B_l;  grad_b_t += scale_l * u^T dy;  grad_a += v^T drop(x);
 *           dx = dy W (+ dx when accumulate_dx) + drop'(v A_l).   The frozen weight and bias get no gradient.
 * u: [n_rows, u_stride] is written by forward (columns 0..rank-1) and read by backward; v likewise is scratch.
 * dx may be NULL (first layer). CUDA: n_rows up to 2^31 - 129. */
typedef struct {
  const ks_weight *w;
  const void *x;        /* [n_rows, n_in] */
  void *y;              /* forward out: [n_rows, n_out] */
  bool y_is_f32;        /* y holds float32 whatever the activations (logits); no residual, no LoRA then */
  bool generation;      /* rows of a generation pass: where there are several kernels, one whose rows come out the same
                           whether one or many are computed, at its best with few */
  int64_t n_rows;
  const void *residual; /* NULL, or [n_rows, n_out], added (residual connection); may be y itself */
  const ks_segment *segments; /* host */
  int64_t n_segments;
  const ks_lora *loras;       /* host, [n_loras], indexed by segment.adapter; the pointers inside: backend memory */
  int64_t n_loras;
  void *u;              /* [n_rows, u_stride]; needed when any segment has an adapter with rank > 0 */
  int64_t u_stride;     /* >= the largest rank */
  float dropout;        /* p in [0, 1) */
  uint64_t dropout_site; /* different for every linear layer of the model and every step */
  /* backward only */
  const void *dy;       /* [n_rows, n_out] */
  void *dx;             /* [n_rows, n_in] or NULL */
  bool accumulate_dx;
  void *v;              /* scratch [n_rows, u_stride] */
} ks_linear_args;
ks_status ks_linear_forward(ks_ctx *ctx, const ks_linear_args *a);
ks_status ks_linear_backward(ks_ctx *ctx, const ks_linear_args *a);

/* ---------------------------------------------------------------- norm, rotary, SwiGLU, residual */

/* y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)   (Zhang & Sennrich 2019). Aliasing: y = x allowed.
 * Backward: dx = (dx if accumulate_dx) + rstd * (dy*w - x * rstd^2 * mean(dy*w*x)); w is frozen.
 * CUDA: n_cols up to 2^30. */
typedef struct {
  const void *x;  /* [n_rows, n_cols] */
  const float *w; /* [n_cols] */
  void *y;        /* [n_rows, n_cols] */
  float *rstd;    /* [n_rows]: forward out (may be NULL), backward in */
  int64_t n_rows, n_cols;
  float eps;
  const void *dy;  /* backward */
  void *dx;        /* backward; may alias dy */
  bool accumulate_dx; /* dx += ; then dx must not alias dy */
} ks_rmsnorm_args;
ks_status ks_rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a);
ks_status ks_rmsnorm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a);

/* Rotary embedding, half-split form (Su et al. 2021 as in GPT-NeoX and Hugging Face Llama), in place:
 *   (x1, x2) = (x[h, j], x[h, j + d/2]);  x1' = x1 cos - x2 sin;  x2' = x2 cos + x1 sin,  angle = position * inv_freq[j].
 * The angle is a product in double, reduced in double; cos and sin are right to two units in the last place of float32.
 * inverse: rotates back, which is the backward pass. CUDA: n_heads head_dim below 2^32. */
typedef struct {
  void *x; /* [n_rows, n_heads * head_dim], in place */
  const int32_t *positions; /* host [n_rows], each >= 0 */
  const double *inv_freq;   /* host [head_dim / 2] */
  int64_t n_rows, n_heads, head_dim; /* head_dim even */
  bool inverse;
} ks_rope_args;
ks_status ks_rope(ks_ctx *ctx, const ks_rope_args *a);

/* h = silu(gate) * up,  silu(z) = z / (1 + exp(-z)).
 * Backward: dgate = dh * up * s * (1 + gate * (1 - s)), s = sigmoid(gate);  dup = dh * silu(gate).
 * Aliasing: h = gate, h = up, dgate = gate, dup = up allowed. */
typedef struct {
  const void *gate, *up; /* [n] */
  void *h;               /* [n], forward */
  const void *dh;
  void *dgate, *dup;
  int64_t n;
} ks_swiglu_args;
ks_status ks_swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a);
ks_status ks_swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a);

/* y[i, :] = x[index[i], :];  index host [n_rows] in [0, n_x_rows). */
typedef struct {
  const void *x;
  void *y; /* [n_rows, n_cols] */
  const int64_t *index;
  int64_t n_rows, n_x_rows, n_cols;
} ks_rows_args;
ks_status ks_rows_gather(ks_ctx *ctx, const ks_rows_args *a);
/* y[index[i], :] = x[i, :]; index without repeats; other rows of y [n_x_rows, n_cols] keep their values. */
ks_status ks_rows_scatter(ks_ctx *ctx, const ks_rows_args *a);

/* Queries and keys on their way to attention, in one call: same results as ks_rope of each of `rope`, then ks_rows_scatter of
 * each of `store` (keys and values into a cache). */
typedef struct {
  const ks_rope_args *rope;  /* host [n_rope], same positions, head_dim and inv_freq */
  int64_t n_rope;            /* 0..2 */
  const ks_rows_args *store; /* host [n_store], same index */
  int64_t n_store;           /* 0..2; x may be the x of a rope */
} ks_rope_store_args;
ks_status ks_rope_store(ks_ctx *ctx, const ks_rope_store_args *a);

/* Linear maps that read the same x, in one call, so that a backend may share what they have in common: one pass over x for the
 * adapters of all, one launch where each is small. Same results as, one after another,
 *   ks_rmsnorm_forward(norm), ks_linear_forward of each part, ks_swiglu_forward(swiglu), ks_rope_store(rope).
 * parts: host [n_parts], of the same x, n_rows and generation, and where they have segments of the same
 * segments and dropout; each its own weight, loras, y, u (and v).
 * norm: NULL, or what makes x: norm->y is x.   swiglu: NULL, or of two parts: gate and up are their y.
 * rope: NULL, or without swiglu: every x that it rotates or stores is the y of a part.
 * In generation, norm->y, with swiglu the parts' y, and what rope stores are left undefined where they were: scratch.
 * Residuals are no other part's y; h and what is stored overlap neither x nor the norm's.
 * Backward: ks_linear_backward of each part; parts may share dx, all but the first with accumulate_dx; norm, swiglu and rope
 * NULL. */
enum { KS_LINEARS_MAX = 4 };
typedef struct {
  const ks_linear_args *parts;
  int64_t n_parts; /* 1..KS_LINEARS_MAX */
  const ks_rmsnorm_args *norm;
  const ks_swiglu_args *swiglu;
  const ks_rope_store_args *rope;
} ks_linears_args;
ks_status ks_linears_forward(ks_ctx *ctx, const ks_linears_args *a);
ks_status ks_linears_backward(ks_ctx *ctx, const ks_linears_args *a);

/* ---------------------------------------------------------------- attention */

enum { KS_ATTENTION_PAGE_UNIT = 64 };

/* One sequence of a packed batch. Its n_q query rows start at row q_begin of q; its n_k >= n_q keys are rows
 * 0..n_k-1 of k and v (training and prefill: inside the packed buffers; decoding: its KV cache). Query i of the
 * sequence sits at position n_k - n_q + i and sees keys 0 .. n_k - n_q + i. Sequences are sorted by q_begin and share
 * no query row; outputs of rows that belong to none are left as they are. Keys that no query sees are not read. */
typedef struct {
  int64_t q_begin, n_q, n_k;
  const void *k, *v; /* [n_k, n_kv_heads * head_dim], row stride kv_stride */
  void *dk, *dv;     /* backward, written (=): same layout; every key row is written */
  /* host [ceil(n_k / page_rows)] or NULL: key j lies at row pages[j / page_rows] * page_rows + j % page_rows
   * of k and v (a paged cache; forward only). NULL: at row j */
  const int32_t *pages;
} ks_attention_seq;

/* o = softmax(q k^T * scale, causal) v per head; query head h reads key head h / (n_heads / n_kv_heads).
 * lse[i, h] = log sum exp of the scaled scores. One pass of online softmax over blocks of keys in rising order
 * (Milakov & Gimelshein 2018; Dao 2023, arXiv 2307.08691), blocks counted from key 0: prefill and decode give the same bits.
 * Backward: D = rowsum(do * o); p = exp(s - lse); dv = p^T do; ds = p * (do v^T - D); dq = scale ds k; dk = scale ds^T q.
 * CUDA: head_dim up to 256; of a sequence n_k, n_q n_heads and n_q (n_heads / n_kv_heads)^2 up to 2^30; pages of up to 2^30
 * rows. */
typedef struct {
  const void *q;  /* [n_rows, n_heads * head_dim] */
  void *o;        /* [n_rows, n_heads * head_dim] */
  float *lse;     /* [n_rows, n_heads]; forward out (NULL: not kept), backward in */
  const ks_attention_seq *seqs; /* host */
  int64_t n_seqs, n_rows;
  int64_t n_heads, n_kv_heads, head_dim, kv_stride;
  int64_t page_rows; /* rows of a page, a multiple of KS_ATTENTION_PAGE_UNIT; 0: no sequence has pages */
  int64_t n_page_rows; /* rows behind k and v of paged sequences: every page lies within them */
  float scale; /* usually 1 / sqrt(head_dim) */
  const void *d_o; /* backward: [n_rows, n_heads * head_dim] */
  void *dq;        /* backward: [n_rows, n_heads * head_dim], written */
} ks_attention_args;
ks_status ks_attention_forward(ks_ctx *ctx, const ks_attention_args *a);
ks_status ks_attention_backward(ks_ctx *ctx, const ks_attention_args *a);

/* ---------------------------------------------------------------- head and loss */

/* Cross-entropy of the language-model head without keeping all logits: z = x W^T,
 *   loss[i] = log sum exp(z[i, :]) - z[i, target[i]]
 *   dx[i, :] = row_scale[i] * (softmax(z[i, :]) - onehot(target[i])) W        (dx NULL: loss only)
 * Holds logits (or their gradients) of a fixed block of rows only: workspace ks_head_loss_workspace(ctx, w, n_rows) bytes of
 * backend memory. */
typedef struct {
  const ks_weight *w;     /* [n_vocab, n_in] */
  const void *x;          /* [n_rows, n_in] */
  const int32_t *targets; /* host [n_rows], in [0, n_vocab) */
  const float *row_scale; /* host [n_rows] or NULL (all 1) */
  float *loss;            /* host out, late: [n_rows] */
  void *dx;               /* [n_rows, n_in] or NULL; may not alias x */
  int64_t n_rows;
  void *workspace;
} ks_head_loss_args;
size_t ks_head_loss_workspace(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows);
ks_status ks_head_loss(ks_ctx *ctx, const ks_head_loss_args *a);

/* One token a row from logits. temperature 0: the largest logit, ties to the lower id. Else softmax(logits /
 * temperature) restricted to the top_k largest (0: all), then to the smallest set of the most probable of these with at
 * least top_p of their probability (1: all; Holtzman et al. 2020), ties to the lower id; drawn with
 * Philox(key, hi = 0, lo = counter), whose words 1 and 0 make one 64-bit number. Probabilities are integers times one
 * constant: a token less probable than 2^-31 times the first is never drawn. A row that holds a NaN or has no finite
 * maximum gives the token -1. */
typedef struct {
  float temperature; /* >= 0 */
  int32_t top_k;     /* >= 0 */
  float top_p;       /* (0, 1] */
  uint64_t key, counter;
} ks_sampler;
typedef struct {
  const float *logits; /* [n_rows, n_vocab] */
  int64_t n_rows, n_vocab;
  const ks_sampler *samplers; /* host [n_rows] */
  int32_t *tokens;            /* host out, late: [n_rows] */
  int32_t *drawn;             /* NULL, or backend memory [n_rows] that gets them at once */
} ks_sample_args;
ks_status ks_sample(ks_ctx *ctx, const ks_sample_args *a);

/* ---------------------------------------------------------------- optimizer */

/* One step of AdamW with decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101), as torch.optim.AdamW after
 * torch.nn.utils.clip_grad_norm_, for each of n_jobs adapters on their own:
 *   norm = sqrt(sum grad^2);  c = min(1, max_grad_norm / (norm + 1e-6))  (max_grad_norm 0: c = 1);   g = grad * c;
 *   p -= lr * weight_decay * p;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
 *   p -= lr * (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps);   then grad = 0.
 * The sum of squares is taken in double, in a fixed order. The factors c, 1 - lr * weight_decay, 1 - b1, b2, 1 - b2,
 * lr / (1 - b1^step) and sqrt(1 - b2^step) are computed in double and rounded to float32 once.
 * When the norm is not finite, p, m, v and grad are left as they are. */
typedef struct {
  float *p, *m, *v, *grad; /* [n] */
  int64_t n;
  double lr, beta1, beta2, eps, weight_decay, max_grad_norm;
  int64_t step; /* 1, 2, ... */
} ks_adamw_job;
typedef struct {
  const ks_adamw_job *jobs; /* host [n_jobs] */
  int64_t n_jobs;
  double *norm; /* host out, late: [n_jobs], before clipping */
} ks_adamw_args;
ks_status ks_adamw(ks_ctx *ctx, const ks_adamw_args *a);

/* ---------------------------------------------------------------- embeddings */

typedef enum { KS_POOL_LAST = 0, KS_POOL_MEAN = 1 } ks_pooling;
/* y[s, :] = x at the last row of sequence s, or the mean of its rows. A sequence of no rows is KS_EINVAL. */
typedef struct {
  const void *x;              /* [n_rows, n_cols] */
  const int64_t *seq_offsets; /* host [n_seqs + 1], rising; sequence s: rows [offsets[s], offsets[s+1]) */
  float *y;                   /* [n_seqs, n_cols], float32 */
  int64_t n_seqs, n_rows, n_cols;
  ks_pooling pooling;
} ks_pool_args;
ks_status ks_pool(ks_ctx *ctx, const ks_pool_args *a);

/* Entropy of the components of each row in bits, H = -sum p log2 p (0 log 0 = 0):
 *   HISTOGRAM  p: mass of n_bins equal bins over [min, max] of the row; value v goes to
 *              min(n_bins - 1, floor((v - min) / (max - min) * n_bins)), computed in double, and from there to the
 *              neighbour when v lies beyond the bin's edges min + i * ((max - min) / n_bins): numpy.histogram of the
 *              row in float64; max = min: H = 0
 *   CLIPPED    the same after clipping the row to mean +- clip * standard deviation
 *   SOFTMAX    p = softmax(row)
 *   ABS        p = |row| / sum |row|; an all-zero row: H = 0
 * Computed in double; on a GPU the masses of SOFTMAX and ABS in float32: H is then within 2^-18 (1 + H) bits of
 * that. A row that holds a NaN or infinity gives NaN. CUDA: n_cols up to 2^20. */
typedef enum { KS_ENTROPY_HISTOGRAM = 0, KS_ENTROPY_CLIPPED, KS_ENTROPY_SOFTMAX, KS_ENTROPY_ABS } ks_entropy_kind;
typedef struct {
  const float *x; /* [n_rows, n_cols] */
  double *h;      /* host [n_rows] */
  int64_t n_rows, n_cols;
  ks_entropy_kind kind;
  int64_t n_bins; /* 1..4096; the scripts: 100 */
  double clip;    /* standard deviations, > 0; CLIPPED only */
} ks_entropy_args;
ks_status ks_entropy(ks_ctx *ctx, const ks_entropy_args *a);

/* ---------------------------------------------------------------- similarity */

typedef enum { KS_METRIC_COSINE = 0, KS_METRIC_DOT = 1 } ks_metric;
/* s[i, j] = <q_i, k_j> (DOT), or <q_i, k_j> / (|q_i| |k_j|) (COSINE; 0 when a norm is 0 and the other is finite).
 * Products of the stored values accumulate in float32, norms in double; the factors of I8 rows come last. The
 * whole [n_q, n_k] matrix is written only by ks_similarity. */
typedef struct {
  const void *q; /* [n_q, n_cols] */
  const void *k; /* [n_k, n_cols] */
  int64_t n_q, n_k, n_cols;
  ks_metric metric;
  ks_dtype q_dtype, k_dtype;        /* F32, BF16 or I8, whatever the activations */
  const float *q_scales, *k_scales; /* I8: one factor a row ([n_q], [n_k], backend memory); NULL: all 1 */
} ks_similarity_args;
/* s: [n_q, n_k], backend memory. */
ks_status ks_similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s);
/* The best_k largest of each query, falling, ties to the lower index; host out [n_q, best_k]; rows with fewer keys are
 * filled with index -1 and score -inf. best_k 1..1024. NaN scores sort last. CUDA: n_k below 2^32 - 1. */
ks_status ks_similarity_top(ks_ctx *ctx, const ks_similarity_args *a, int64_t best_k, float *scores, int64_t *index);
/* Which keys a query's mean is taken over. All arrays host. */
typedef struct {
  const int32_t *keys, *queries; /* [n_k], [n_q]: keys of the query's group; both NULL: all */
  const int64_t *except;         /* [n_q]: but for this key (none: no key's index, as -1); NULL: none */
} ks_similarity_groups;
/* Mean over such keys: host out mean [n_q] (double) and count [n_q]; count 0: mean NaN. groups NULL: over all keys. */
ks_status ks_similarity_mean(ks_ctx *ctx, const ks_similarity_args *a, const ks_similarity_groups *groups, double *mean,
                             int64_t *count);
/* Farthest-first traversal (Gonzalez 1985; greedy core-set of Sener & Savarese, arXiv 1708.00489) over the rows of k
 * under the distance 1 - s: starting from the centres q (n_q may be 0: then from row `first`), n_pick times take the row
 * whose largest similarity to the chosen is smallest, ties to the lower index; a row with a NaN similarity comes last.
 * host out picked [n_pick <= n_k]. */
ks_status ks_similarity_farthest_first(ks_ctx *ctx, const ks_similarity_args *a, int64_t n_pick, int64_t first,
                                       int64_t *picked);

/* ---------------------------------------------------------------- what there is */

/* X(name, what) for `keepsake ls operations`, tests and benchmarks; those that run several of them in one
 * call are not named again. */
#define KS_OPS_MAP(X)                                                                                        \
  X(embed_forward, "token embedding lookup")                                                                 \
  X(linear_forward, "x W^T + bias with segmented LoRA")                                                      \
  X(linear_backward, "input gradient and LoRA gradients")                                                    \
  X(rmsnorm_forward, "root mean square norm")                                                                \
  X(rmsnorm_backward, "its input gradient")                                                                  \
  X(rope, "rotary embedding and its inverse")                                                                \
  X(swiglu_forward, "silu(gate) * up")                                                                       \
  X(swiglu_backward, "its gradients")                                                                        \
  X(rows_gather, "row gather")                                                                               \
  X(rows_scatter, "row scatter")                                                                             \
  X(attention_forward, "causal grouped-query attention, packed or cached")                                   \
  X(attention_backward, "its gradients")                                                                     \
  X(head_loss, "language-model head with cross-entropy, loss and gradient")                                  \
  X(sample, "greedy, temperature, top-k, top-p")                                                             \
  X(adamw, "gradient norms, clipping and AdamW of many adapters")                                            \
  X(pool, "last-token or mean pooling")                                                                      \
  X(entropy, "entropy of an embedding's components")                                                         \
  X(similarity, "cosine or dot, full matrix")                                                                \
  X(similarity_top, "best k per query")                                                                      \
  X(similarity_mean, "mean by group")                                                                        \
  X(similarity_farthest_first, "greedy k-center order")

#ifdef __cplusplus
}
#endif

#endif
