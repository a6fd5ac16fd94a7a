/* For kernels that make a norm's factors themselves. */
#ifndef KS_CUDA_NORM_CUH
#define KS_CUDA_NORM_CUH

#include <stdint.h>

/* Threads that share the sum of squares of a row of bf16 in norm.cu: thread i a chain over the 16-byte pieces
 * i, i + threads, ..., then a tree over the lanes of a warp and one over the warps. */
int32_t ks_norm_threads(int64_t n_cols);

#endif
