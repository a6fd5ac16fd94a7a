/* Linear layers with segmented LoRA: which kernels the two operations are made of.
 *
 *   forward    [mask] -> u = drop(x) A^T -> y = x W^T + bias (+ residual) + scale u B^T
 *   backward   [mask] -> v = scale dy B  -> grad_b_t += scale u^T dy,  grad_a += v^T drop(x)
 *                                        -> dx = dy W (+ dx) + drop'(v A)
 *
 * Each arrow is one launch for all adapters of the batch. Derivation: with y = W x + s B A drop(x), the loss
 * gradient g = dy gives dB = s g (A drop(x))^T, dA = (s B^T g) drop(x)^T, dx = W^T g + drop'(A^T (s B^T g));
 * the rank-r products u and v come first and are the only intermediates: nothing of [rows, hidden] size is
 * made besides y and dx.
 *
 * Variants
 *   cublaslt  the product by cuBLASLt, then expand adds the adapters' term: one more pass over y
 *   mma       product and adapters' term in one kernel (linear_mma.cu): no extra pass; bf16 only
 *   simt      plain fma throughout (linear_simt.cu)
 *   wgmma     product and adapters' term in one kernel by Hopper's own products (linear_wgmma.cu); bf16 on sm_90 only, and mma for
 *             what it does not take. Not measured yet, so no default
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
 *       Computed for expand's pass over y: 16 and 4 us. The adapters cost ten times what their bytes do: lora_mma.cu.
 *   mma       no pass, but expected at about 60 % of wgmma's rate on Hopper; on Ampere and Orin mma.sync is the hardware's
 *             own path. Not measured yet.
 *   Next, not built: K-augmentation, [x | s u] [W | B]^T through cuBLASLt, needs x and u in one array.
 *   Next, not built: one shrink for q, k, v (gate, up), which share x: a third of its reads of x; needs them in one call.
 *   Next, not built: wgmma and TMA for sm_90. */
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

/* The product and the adapters' term, from u (or v) on. */
static ks_status run_product(ks_ctx *ctx, const char *op, const ks_linear_args *a, bool backward, way by,
                             const lora_batch *batch) {
  const bool bf16 = ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16;
  const linear_product p = product_of(a, backward);
  const ks_cuda_matmul_params m = matmul_of(ctx, a, &p);
  const void *u = backward ? a->v : a->u;
  bool taken = true;
  if (by == BY_BLAS) KS_TRY(ks_cuda_blas_takes(ctx, &m, &taken));
  if (by == BY_WGMMA) {
    if (ks_wgmma_takes(ctx, &p)) return ks_wgmma_linear(ctx, op, &p, a, batch, u);
    by = BY_MMA;
  }
  if (!taken) by = bf16 ? BY_MMA : BY_SIMT;
  if (by == BY_MMA) return ks_mma_linear(ctx, op, &p, batch, u);
  KS_TRY(by == BY_BLAS ? ks_cuda_matmul(ctx, &m) : ks_simt_product(ctx, op, &p));
  if (batch->max_rank == 0) return KS_OK;
  const lora_expand_args e = {*batch, u, p.y, backward ? a->w->n_in : a->w->n_out, backward};
  return by == BY_BLAS && bf16 ? ks_mma_expand(ctx, op, &e) : ks_simt_expand(ctx, op, &e);
}

static ks_status run_shrink(ks_ctx *ctx, const char *op, const ks_linear_args *a, bool backward,
                            bool tensor_cores, const lora_batch *batch) {
  const lora_shrink_args s = {*batch, backward ? a->dy : a->x, backward ? a->v : a->u,
                              backward ? a->w->n_out : a->w->n_in, backward};
  return tensor_cores ? ks_mma_shrink(ctx, op, &s) : ks_simt_shrink(ctx, op, &s);
}

static ks_status run_gradients(ks_ctx *ctx, const char *op, const ks_linear_args *a, bool tensor_cores,
                               const lora_batch *batch, float *partial_b, float *partial_a) {
  const lora_gradient_args of_b = {*batch, a->u, a->dy, partial_b, a->w->n_out, 0},
                           of_a = {*batch, a->v, a->x, partial_a, a->w->n_in, 1};
  if (a->w->n_out > 0)
    KS_TRY(tensor_cores ? ks_mma_gradient(ctx, op, &of_b) : ks_simt_gradient(ctx, op, &of_b));
  return tensor_cores ? ks_mma_gradient(ctx, op, &of_a) : ks_simt_gradient(ctx, op, &of_a);
}

extern "C" ks_status ks_cuda_linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const char *op = "linear_forward";
  if (a->generation) {
    const ks_linears_args alone = {a, 1, NULL, NULL};
    bool taken = false;
    KS_TRY(ks_decode_linears(ctx, &alone, &taken));
    if (taken) return KS_OK;
  }
  const way by = way_of(ctx, op, a);
  lora_batch batch;
  KS_TRY(ks_lora_describe(ctx, a, &batch));
  if (batch.max_rank > 0) {
    void *mask = NULL;
    if (batch.has_dropout) KS_TRY(ks_cuda_workspace(ctx, ks_lora_mask_bytes(&batch), &mask));
    KS_TRY(ks_lora_make_mask(ctx, &batch, (uint8_t *)mask));
    KS_TRY(run_shrink(ctx, op, a, false, by != BY_SIMT && ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16, &batch));
  }
  return run_product(ctx, op, a, false, by, &batch);
}

extern "C" ks_status ks_cuda_linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  const char *op = "linear_backward";
  const way by = way_of(ctx, op, a);
  const bool tensor_cores = by != BY_SIMT && ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16;
  lora_batch batch;
  KS_TRY(ks_lora_describe(ctx, a, &batch));
  if (batch.max_rank > 0) {
    const size_t mask_bytes = ks_lora_mask_bytes(&batch),
                 b_bytes = ks_lora_partial_bytes(&batch, a->w->n_out),
                 a_bytes = ks_lora_partial_bytes(&batch, a->w->n_in);
    uint8_t *room = NULL;
    KS_TRY(ks_cuda_workspace(ctx, mask_bytes + b_bytes + a_bytes, (void **)&room));
    KS_TRY(ks_lora_make_mask(ctx, &batch, room));
    KS_TRY(run_shrink(ctx, op, a, true, tensor_cores, &batch));
    KS_TRY(run_gradients(ctx, op, a, tensor_cores, &batch, (float *)(void *)(room + mask_bytes),
                         (float *)(void *)(room + mask_bytes + b_bytes)));
  }
  return a->dx ? run_product(ctx, op, a, true, by, &batch) : KS_OK;
}
