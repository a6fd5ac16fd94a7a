/* Stands in for operations whose files KS_CUDA_ON_CPU_FILES leaves out. */
#include "kernels/cuda/cuda.h"

#define MISSING(what) KS_FAIL(KS_EUNSUPPORTED, "%s: its file is not part of this build", what)
#define X(op, args)                                                                                          \
  __attribute__((weak)) ks_status ks_cuda_##op(ks_ctx *ctx, const args *a) {                                 \
    (void)ctx, (void)a;                                                                                      \
    return MISSING(#op);                                                                                     \
  }
KS_CUDA_OP_MAP(X)
#undef X
#define X(name, parameters)                                                                                  \
  __attribute__((weak)) ks_status name parameters {                                                          \
    return MISSING(#name);                                                                                   \
  }
#pragma GCC diagnostic ignored "-Wunused-parameter"
X(ks_cuda_weight_create, (ks_ctx * ctx, const ks_weight_params *params, ks_weight *w))
X(ks_cuda_similarity, (ks_ctx * ctx, const ks_similarity_args *a, float *s))
X(ks_cuda_similarity_top,
  (ks_ctx * ctx, const ks_similarity_args *a, int64_t best_k, float *scores, int64_t *index))
X(ks_cuda_similarity_mean, (ks_ctx * ctx, const ks_similarity_args *a, const int32_t *groups,
                            const int32_t *query_groups, double *mean, int64_t *count))
X(ks_cuda_similarity_farthest_first,
  (ks_ctx * ctx, const ks_similarity_args *a, int64_t n_pick, int64_t first, int64_t *picked))
#undef X
__attribute__((weak)) void ks_cuda_weight_destroy(ks_ctx *ctx, ks_weight *w) {}
__attribute__((weak)) size_t ks_cuda_head_loss_workspace(const ks_ctx *ctx, const ks_weight *w,
                                                         int64_t n_rows) {
  return 0;
}
