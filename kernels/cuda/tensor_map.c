/* Tensor maps are made by the driver (cuTensorMapEncodeTiled), whose function the runtime finds: nothing is linked. */
#include "kernels/cuda/tensor_map.h"

#include "kernels/cuda/cuda_impl.h"
#include <cuda.h>
#include <string.h>

enum { MAX_SIDE = 0x7fffffff };

bool ks_cuda_has_wgmma(const ks_ctx *ctx, const char **why) {
  const ks_cuda_device *d = ks_cuda_device_of(ctx);
  const char *reason = NULL;
  if (d->major != 9 || d->minor != 0) reason = "needs a GPU of compute capability 9.0 (Hopper)";
#if !defined(KS_CUDA_HAS_SM_90A) && !defined(KS_CUDA_ON_CPU)
  else
    reason = "needs code for sm_90a, which this build lacks; build with -DKS_CUDA_ARCHS=90";
#endif
  if (why) *why = reason;
  return !reason;
}

bool ks_tensor_map_takes(const void *p, int64_t n_rows, int64_t n_cols) {
  return (uintptr_t)p % 16 == 0 && n_cols % 8 == 0 && n_rows >= 1 && n_cols >= 1 && n_rows <= MAX_SIDE &&
         n_cols <= MAX_SIDE;
}

typedef CUresult (*encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

/* Asked for each time: the runtime keeps the answer. */
static ks_status find_encode(ks_ctx *ctx, const char *op, encode_tiled *out) {
  void *found = NULL;
  enum cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  KS_CUDA_TRY(
      ctx, op,
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
  KS_CUDA_TRY(ctx, op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || !found)
    return KS_FAIL(KS_EENV, "%s: the driver has no cuTensorMapEncodeTiled; update the driver", op);
  memcpy(out, &found, sizeof *out);
  return KS_OK;
}

ks_status ks_cuda_tensor_map(ks_ctx *ctx, const char *op, const void *p, int64_t n_rows, int64_t n_cols,
                             int box_rows, ks_tensor_map *out) {
  const cuuint64_t size[2] = {(cuuint64_t)n_cols, (cuuint64_t)n_rows}, stride[1] = {(cuuint64_t)n_cols * 2};
  const cuuint32_t box[2] = {KS_TENSOR_MAP_COLS, (cuuint32_t)box_rows}, step[2] = {1, 1};
  encode_tiled encode;
  CUtensorMap map;
  KS_TRY(find_encode(ctx, op, &encode));
  memset(&map, 0, sizeof map);
  const CUresult e = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)(uintptr_t)p, size, stride,
                            box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e != CUDA_SUCCESS)
    return KS_FAIL(KS_EDEVICE, "%s: cuTensorMapEncodeTiled: error %d for %lld rows of %lld bf16", op, (int)e,
                   (long long)n_rows, (long long)n_cols);
  KS_ASSERT(sizeof map == sizeof *out);
  memcpy(out, &map, sizeof *out);
  return KS_OK;
}
