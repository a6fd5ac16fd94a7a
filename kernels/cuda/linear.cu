/* Linear layers with segmented LoRA: which kernels the two operations are made of.
 *
 *   forward    [masks] -> u = drop(x) A^T -> y = scale u B^T (+ residual) -> y += x W^T + bias
 *   backward   [masks] -> v = scale dy B  -> grad_b_t += scale u^T dy, grad_a += v^T drop(x)
 *                                         -> dx = drop'(v A) (+ dx) -> dx += dy W
 *
 * Each arrow is one launch for all adapters of the batch and all maps that read the same x (ks_linears_args),
 * but for the products, one each. Derivation: with y = W x + s B A drop(x), the loss gradient g = dy gives dB
 * = s g (A drop(x))^T, dA = (s B^T g) drop(x)^T, dx = W^T g + drop'(A^T (s B^T g)); the rank-r products u and
 * v come first and are the only intermediates: nothing of [rows, hidden] size is made besides y and dx.
 *
 * Variants
 *   cublaslt  the adapters' term is written first and the product added to it (lora_term.cu)
 *   mma       product and adapters' term in one kernel (linear_mma.cu): no extra pass; bf16 only
 *   simt      plain fma throughout (linear_simt.cu); the term is added afterwards, as it is in float32
 *   wgmma     product and adapters' term in one kernel by Hopper's own products (linear_wgmma.cu); bf16 on
 *             sm_90 only, and mma for what it does not take. Not measured yet, so no default
 *
 * Launches of a layer with adapters on q, k, v and o beside its products: 10, with dropout 14 (one map after another: 32 and 40).
 *
 * Block weights, machines without cuBLASLt and shapes that it has no algorithm for take mma (bf16) or simt (float32; bf16
 * before sm_80, which has no such tensor cores). Generation passes in bf16 take linear_decode.cu for few rows and a form of
 * linear_mma.cu with the same sums for many, whatever the variant but simt.
 *
 * FLOPs: 2 rows n_in n_out + 2 rank rows (n_in + n_out) forward; twice the second term more backward.
 * Bytes: W once, x and y (and dy, dx) once, A, B and their gradients once.
 * H200 at 801 TFLOP/s and 4.25 TB/s (cuBLASLt and a copy, measured): compute-bound above about 190 rows of a large layer;
 * Orin Nano Super (16.7 TFLOP/s, 102 GB/s): above about 160.
 *
 * Ladder (H200, bf16, commit f74fb33, rows x n_out x n_in; one adapter of rank 8)
 *   cublaslt + shrink + expand
 *       2048 x 8192 x 2048   product 98 us, with adapter 184 us;   backward 90 and 196 us
 *       2048 x 2048 x 8192   product 90 us, with adapter 247 us;   backward 97 and 246 us
 *       Computed for expand's pass over y: 16 and 4 us. The adapters cost ten times what their bytes do: lora_shrink.cu.
 *   mma       no pass, but expected at about 60 % of wgmma's rate on Hopper; on Ampere and Orin mma.sync is the hardware's
 *             own path. Not measured yet.
 *   wgmma     no pass; 2048 x 8192 x 2048 with adapter 108 us computed (linear_wgmma.cu). Not measured yet.
 *   maps of one input together, term before the product. Not measured yet. Computed for OpenLLaMA-3B (rank 8 on q, k, v, o), from
 *       lora_shrink.cu, lora_gradient.cu and lora_term.cu, microseconds a layer:
 *                              16384 rows                         2048 rows
 *         forward              30 + 90 + 28 + 58 = 206            5 + 12 + 5 + 8 = 30
 *         backward             85 + 130 + 30 + 28 + 65 + 30 = 368 12 + 16 + 5 + 5 + 10 + 5 = 53
 *         C of five products   50                                 5
 *         frozen layer         12,800                             1,800 (products at 88 and 80 % of 796 TFLOP/s, and the rest)
 *         adapters add         4.9 %                              4.9 %
 *       Dropout comes on top: masks of 3200 columns are 20 us a map and pass at 16384 rows (lora.cu) and 3 at 2048, and three
 *       masked maps 20 and 3 us more in term, some in shrink: 1.5 % for all. Sixteen adapters read and write the same bytes as
 *       one: 1.02 x at most.
 *   Next, not built: K-augmentation, [x | s u] [W | B]^T through cuBLASLt, needs x and u in one array.
 *   Next, not built: products of maps of one input side by side. 2048 rows x 3200 outputs are 200 tiles of
 *       128 x 256, 1.5 waves of 132 SMs at the time of 2; three of them side by side 4.6 waves at the time of
 *       5 instead of 6. */
#include "kernels/cuda/linear.cuh"

typedef enum { BY_BLAS, BY_MMA, BY_SIMT, BY_WGMMA } way;

static way way_of(const ks_ctx *ctx, const char *op, const ks_linear_args *a) {
  const ks_cuda_variant v = ks_cuda_variant_of(ctx, op);
  const bool bf16 = ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16,
             bf16_cores = bf16 && ks_cuda_device_of(ctx)->major >= 8;
  if (v == KS_CUDA_linear_forward_simt || v == KS_CUDA_linear_backward_simt) return BY_SIMT;
  if (a->w->n_in == 0 || a->w->n_out == 0) return BY_SIMT;
  if (v == KS_CUDA_linear_forward_wgmma || v == KS_CUDA_linear_backward_wgmma) return BY_WGMMA;
  if (v == KS_CUDA_linear_forward_mma || v == KS_CUDA_linear_backward_mma) return BY_MMA;
  if (ks_cuda_has_blas(ctx) && !ks_dtype_is_quantized(a->w->dtype) &&
      (!bf16 || (bf16_cores && !a->generation)))
    return BY_BLAS;
  return bf16_cores ? BY_MMA : BY_SIMT;
}

static linear_product product_of(const ks_linear_args *a, bool backward) {
  const ks_cuda_weight *impl = (const ks_cuda_weight *)a->w->impl;
  linear_product p = {};
  p.w = ks_weight_view_of(a->w);
  p.x = backward ? a->dy : a->x;
  p.y = backward ? a->dx : a->y;
  p.bias = backward ? NULL : impl->bias;
  p.n_rows = a->n_rows;
  p.residual = !backward ? a->residual : a->accumulate_dx ? a->dx : NULL;
  p.y_is_f32 = !backward && a->y_is_f32;
  p.backward = backward;
  p.generation = !backward && a->generation;
  return p;
}

static ks_cuda_matmul_params matmul_of(const ks_ctx *ctx, const ks_linear_args *a, const linear_product *p) {
  const ks_cuda_weight *impl = (const ks_cuda_weight *)a->w->impl;
  ks_cuda_matmul_params m = {};
  m.x = p->x;
  m.w = impl->values;
  m.y = p->y;
  m.bias = p->backward ? NULL : p->y_is_f32 ? (const void *)impl->bias : impl->bias_act;
  m.n_rows = p->n_rows;
  m.n_out = a->w->n_out;
  m.n_in = a->w->n_in;
  m.w_transposed = !p->backward;
  m.c = p->residual;
  m.x_dtype = m.w_dtype = ks_ctx_act_dtype(ctx);
  m.y_dtype = p->y_is_f32 ? KS_DTYPE_F32 : ks_ctx_act_dtype(ctx);
  return m;
}

/* A pass over maps of one input. */
typedef struct {
  const char *op;
  const ks_linear_args *parts;
  bool backward;
  bool tensor_cores; /* the adapters' */
  way by[KS_LINEARS_MAX];
  linear_product product[KS_LINEARS_MAX];
  lora_group group;
} pass;

static ks_status begin_pass(ks_ctx *ctx, const ks_linear_args *parts, int64_t n, bool backward, pass *p) {
  *p = {};
  p->op = backward ? "linear_backward" : "linear_forward";
  p->parts = parts;
  p->backward = backward;
  p->tensor_cores = ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16;
  for (int64_t i = 0; i < n; i++) {
    p->by[i] = way_of(ctx, p->op, &parts[i]);
    p->product[i] = product_of(&parts[i], backward);
    p->tensor_cores = p->tensor_cores && p->by[i] != BY_SIMT;
  }
  return ks_lora_describe_group(ctx, parts, n, &p->group);
}

/* What cuBLASLt or Hopper's products do not take goes to other kernels. */
static ks_status ask_products(ks_ctx *ctx, pass *p) {
  for (int64_t i = 0; i < p->group.n; i++) {
    bool taken = true;
    if (!p->product[i].y) continue;
    if (p->by[i] == BY_BLAS) {
      const ks_cuda_matmul_params m = matmul_of(ctx, &p->parts[i], &p->product[i]);
      KS_TRY(ks_cuda_blas_takes(ctx, &m, &taken));
    }
    if (p->by[i] == BY_WGMMA) taken = ks_wgmma_takes(ctx, &p->product[i]);
    if (!taken) p->by[i] = ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 ? BY_MMA : BY_SIMT;
  }
  return KS_OK;
}

/* Starts what cuBLASLt adds its products to. */
static ks_status start_with_terms(ks_ctx *ctx, pass *p) {
  uint32_t which = 0;
  for (int64_t i = 0; i < p->group.n; i++)
    if (p->by[i] == BY_BLAS && p->group.of[i].max_rank > 0 && p->product[i].y) which |= 1u << i;
  if (which == 0) return KS_OK;
  KS_TRY(ks_mma_term(ctx, p->op, p->parts, &p->group, p->backward, which));
  for (int64_t i = 0; i < p->group.n; i++)
    for (int64_t j = 0; j < p->group.n; j++)
      if (which >> j & 1 && p->product[i].y == p->product[j].y) p->product[i].residual = p->product[i].y;
  return KS_OK;
}

static ks_status run_product(ks_ctx *ctx, const pass *p, int64_t i) {
  const ks_linear_args *a = &p->parts[i];
  const linear_product *product = &p->product[i];
  const lora_batch *batch = &p->group.of[i];
  const void *u = p->backward ? a->v : a->u;
  if (p->by[i] == BY_MMA) return ks_mma_linear(ctx, p->op, product, batch, u);
  if (p->by[i] == BY_WGMMA) return ks_wgmma_linear(ctx, p->op, product, batch, u);
  const ks_cuda_matmul_params m = matmul_of(ctx, a, product);
  KS_TRY(p->by[i] == BY_BLAS ? ks_cuda_matmul(ctx, &m) : ks_simt_product(ctx, p->op, product));
  if (batch->max_rank == 0 || (p->by[i] == BY_BLAS && p->tensor_cores)) return KS_OK;
  const lora_expand_args e = {*batch, u, product->y, p->backward ? a->w->n_in : a->w->n_out, p->backward};
  return ks_simt_expand(ctx, p->op, &e);
}

static ks_status run_products(ks_ctx *ctx, pass *p) {
  KS_TRY(ask_products(ctx, p));
  if (p->tensor_cores && p->group.any) KS_TRY(start_with_terms(ctx, p));
  for (int64_t i = 0; i < p->group.n; i++)
    if (p->product[i].y) KS_TRY(run_product(ctx, p, i));
  return KS_OK;
}

static ks_status run_shrinks(ks_ctx *ctx, const pass *p, void *room) {
  if (p->tensor_cores) return ks_mma_shrink(ctx, p->op, p->parts, &p->group, p->backward, room);
  for (int64_t i = 0; i < p->group.n; i++) {
    const ks_linear_args *a = &p->parts[i];
    const lora_shrink_args s = {p->group.of[i], p->backward ? a->dy : a->x, p->backward ? a->v : a->u,
                                p->backward ? a->w->n_out : a->w->n_in, p->backward};
    if (s.batch.max_rank > 0) KS_TRY(ks_simt_shrink(ctx, p->op, &s));
  }
  return KS_OK;
}

static ks_status run_gradients(ks_ctx *ctx, const pass *p, void *room) {
  if (p->tensor_cores) return ks_mma_gradient(ctx, p->op, p->parts, &p->group, room);
  for (int64_t i = 0; i < p->group.n; i++) {
    const ks_linear_args *a = &p->parts[i];
    const lora_gradient_args of_b = {p->group.of[i], a->u, a->dy, (float *)room, a->w->n_out, 0},
                             of_a = {p->group.of[i], a->v, a->x, (float *)room, a->w->n_in, 1};
    if (of_b.batch.max_rank == 0) continue;
    if (a->w->n_out > 0) KS_TRY(ks_simt_gradient(ctx, p->op, &of_b));
    KS_TRY(ks_simt_gradient(ctx, p->op, &of_a));
  }
  return KS_OK;
}

/* Behind the masks: partial sums of one kernel at a time. */
static size_t partial_bytes(const ks_ctx *ctx, const pass *p) {
  size_t most = 0;
  for (int64_t i = 0; i < p->group.n && !p->tensor_cores && p->backward; i++) {
    const ks_weight *w = p->parts[i].w;
    const size_t bytes = ks_lora_partial_bytes(&p->group.of[i], w->n_in > w->n_out ? w->n_in : w->n_out);
    if (bytes > most) most = bytes;
  }
  if (!p->tensor_cores) return most;
  const size_t shrink = ks_mma_shrink_bytes(ctx, p->parts, &p->group, p->backward),
               gradient = p->backward ? ks_mma_gradient_bytes(p->parts, &p->group) : 0;
  return shrink > gradient ? shrink : gradient;
}

/* Maps of one input; none is empty, unless it is alone. */
static ks_status run_pass(ks_ctx *ctx, const ks_linear_args *parts, int64_t n, bool backward) {
  pass p;
  KS_TRY(begin_pass(ctx, parts, n, backward, &p));
  if (p.group.any) {
    const size_t mask_bytes = ks_lora_mask_bytes(&p.group);
    uint8_t *room = NULL;
    KS_TRY(ks_cuda_workspace(ctx, mask_bytes + partial_bytes(ctx, &p), (void **)&room));
    KS_TRY(ks_lora_make_masks(ctx, &p.group, room));
    KS_TRY(run_shrinks(ctx, &p, room + mask_bytes));
    if (backward) KS_TRY(run_gradients(ctx, &p, room + mask_bytes));
  }
  return run_products(ctx, &p);
}

/* ---------------------------------------------------------------- entries */

extern "C" ks_status ks_cuda_linears_forward(ks_ctx *ctx, const ks_linears_args *a) {
  bool taken = false;
  if (a->parts[0].generation) KS_TRY(ks_decode_linears(ctx, a, &taken));
  if (taken) return KS_OK;
  if (a->norm) KS_TRY(ks_cuda_rmsnorm_forward(ctx, a->norm));
  KS_TRY(run_pass(ctx, a->parts, a->n_parts, false));
  if (a->swiglu) KS_TRY(ks_cuda_swiglu_forward(ctx, a->swiglu));
  return a->rope ? ks_cuda_rope_store(ctx, a->rope) : KS_OK;
}

extern "C" ks_status ks_cuda_linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const ks_linears_args alone = {a, 1, NULL, NULL, NULL};
  return ks_cuda_linears_forward(ctx, &alone);
}

extern "C" ks_status ks_cuda_linears_backward(ks_ctx *ctx, const ks_linears_args *a) {
  return run_pass(ctx, a->parts, a->n_parts, true);
}

extern "C" ks_status ks_cuda_linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  return run_pass(ctx, a, 1, true);
}
