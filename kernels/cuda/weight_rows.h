/* Rows of a weight on the host, from the values of a file to what the device keeps. */
#ifndef KS_CUDA_WEIGHT_ROWS_H
#define KS_CUDA_WEIGHT_ROWS_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Converts rows [row, row + n_rows) of p->values into values [n_rows, impl->row_bytes] and, for blocks, scales
 * [n_rows, impl->scales_per_row], with all cores of this process (OMP_NUM_THREADS). Rounding is to nearest even; each row is one
 * thread's. Values that blocks cannot hold: KS_EDATA with the first such row. */
ks_status ks_cuda_convert_rows(const ks_weight_params *p, const ks_cuda_weight *impl, int64_t row,
                               int64_t n_rows, uint8_t *values, uint16_t *scales);

#ifdef __cplusplus
}
#endif
#endif
