/* What the device was given and how long it worked on it, between the waits of the host.
 *
 * A span begins with the first work that is put on the idle stream and ends with the last before a wait or
 * before its results are fetched; two events, read after the wait that comes anyway. Gaps inside it, where the
 * host is too slow with single launches, count as work. */
#include "kernels/cuda/cuda_impl.h"

static ks_status mark(ks_ctx *ctx, cudaEvent_t *event) {
  if (!*event) KS_CUDA_TRY(ctx, "cuda", cudaEventCreate(event));
  KS_CUDA_TRY(ctx, "cuda", cudaEventRecord(*event, ks_cuda_of(ctx)->stream));
  return KS_OK;
}

ks_status ks_cuda_activity_begin(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (cuda->capturing) return KS_OK;
  const bool is_first = cuda->span == KS_CUDA_SPAN_NONE;
  cuda->span = KS_CUDA_SPAN_OPEN;
  return is_first ? mark(ctx, &cuda->span_from) : KS_OK;
}

ks_status ks_cuda_activity_end(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (cuda->span != KS_CUDA_SPAN_OPEN || cuda->capturing) return KS_OK;
  cuda->span = KS_CUDA_SPAN_ENDED;
  return mark(ctx, &cuda->span_to);
}

void ks_cuda_activity_waited(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  float ms = 0;
  cuda->activity.waits++;
  if (cuda->span != KS_CUDA_SPAN_ENDED) return;
  cuda->span = KS_CUDA_SPAN_NONE;
  cuda->n_spans++;
  if (cudaEventElapsedTime(&ms, cuda->span_from, cuda->span_to) == cudaSuccess)
    cuda->activity.busy_seconds += 1e-3 * (double)ms;
  else
    cudaGetLastError();
}

void ks_cuda_activity_exit(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (cuda->span_from) cudaEventDestroy(cuda->span_from);
  if (cuda->span_to) cudaEventDestroy(cuda->span_to);
}

void ks_cuda_activity_of(const ks_ctx *ctx, ks_activity *out) {
  const ks_cuda *cuda = ks_cuda_of(ctx);
  *out = cuda->activity;
  out->is_known = true;
  out->launches = cuda->counts.launches + cuda->counts.matmuls;
}
