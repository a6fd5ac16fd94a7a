/* Matrices in device memory as the bulk copy engine of sm_90 reads them (tensor_map.c). C and C++.
 *
 *   ks_tensor_map x;                                                       // goes to a kernel by value, as __grid_constant__
 *   KS_TRY(ks_cuda_tensor_map(ctx, "linear", p, n_rows, n_cols, 128, &x)); // boxes of 128 rows x 64 columns
 *
 * A box arrives in shared memory as `box_rows` lines of 128 bytes, swizzled: its 16-byte piece i of line r lies at piece
 * i ^ (r % 8). What lies outside the matrix arrives as zeros. */
#ifndef KS_CUDA_TENSOR_MAP_H
#define KS_CUDA_TENSOR_MAP_H

#include "kernels/cuda/cuda.h"

enum { KS_TENSOR_MAP_COLS = 64 };

/* The driver's CUtensorMap. */
typedef struct {
#ifdef __cplusplus
  alignas(128)
#else
  _Alignas(128)
#endif
      uint64_t words[16];
} ks_tensor_map;

#ifdef __cplusplus
extern "C" {
#endif

/* Whether the device has wgmma and this program the code for it (sm_90a). If not, `why` (may be NULL) is told. */
bool ks_cuda_has_wgmma(const ks_ctx *ctx, const char **why);
/* Whether rows of n_cols bf16 at p can be read this way: 16-byte aligned, and sizes that fit. */
bool ks_tensor_map_takes(const void *p, int64_t n_rows, int64_t n_cols);
/* A map of bf16 [n_rows, n_cols]; box_rows 1 to 256. */
ks_status ks_cuda_tensor_map(ks_ctx *ctx, const char *op, const void *p, int64_t n_rows, int64_t n_cols,
                             int box_rows, ks_tensor_map *out);

#ifdef __cplusplus
}
#endif
#endif
