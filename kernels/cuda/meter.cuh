/* Between meter.cu (kernels) and meter_host.c (events, rates, clocks). C and C++. */
#ifndef KS_CUDA_METER_CUH
#define KS_CUDA_METER_CUH

#include "kernels/cuda/cuda.h"
#include "kernels/meter.h"

#ifdef __cplusplus
extern "C" {
#endif

ks_status ks_cuda_meter_null(ks_ctx *ctx);
ks_status ks_cuda_meter_delay(ks_ctx *ctx, int64_t cycles);
/* Reads `bytes` at x; `never` is a place for the compiler to believe in. */
ks_status ks_cuda_meter_touch(ks_ctx *ctx, const void *x, size_t bytes, void *never);
/* n elements, F32 or BF16, uniform in [-1, 1). */
ks_status ks_cuda_meter_random(ks_ctx *ctx, ks_dtype dtype, void *x, int64_t n, uint32_t seed);

extern const ks_meter_ops ks_cuda_meter; /* the backend's slot */

/* Clocks and power of CUDA device 0 by NVML, which is loaded when it is there; NULL: it is not. */
typedef struct ks_cuda_nvml ks_cuda_nvml;
ks_cuda_nvml *ks_cuda_nvml_open(void);
void ks_cuda_nvml_close(ks_cuda_nvml *nvml); /* NULL-safe */
void ks_cuda_nvml_read(ks_cuda_nvml *nvml, ks_meter_clocks *out);
/* "580.95.05" */
void ks_cuda_nvml_driver(ks_cuda_nvml *nvml, char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
