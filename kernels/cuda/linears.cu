/* Linear maps of one input in one call: which kernels they are made of. No kernel is here: bytes, FLOPs,
 * predicted times and ladder are in linear.cu (training, prefill) and in the files that linear_decode.cuh
 * names (generation). */
#include "kernels/cuda/linear.cuh"

extern "C" ks_status ks_cuda_linears_forward(ks_ctx *ctx, const ks_linears_args *a) {
  bool taken = false;
  if (a->parts[0].generation) KS_TRY(ks_decode_linears(ctx, a, &taken));
  if (taken) return KS_OK;
  if (a->norm) KS_TRY(ks_cuda_rmsnorm_forward(ctx, a->norm));
  KS_TRY(ks_linear_group_forward(ctx, a->parts, a->n_parts));
  return a->swiglu ? ks_cuda_swiglu_forward(ctx, a->swiglu) : KS_OK;
}

extern "C" ks_status ks_cuda_linears_backward(ks_ctx *ctx, const ks_linears_args *a) {
  return ks_linear_group_backward(ctx, a->parts, a->n_parts);
}
