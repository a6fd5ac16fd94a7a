#include "kernels/backend.h"

const ks_backend *const ks_backends[] = {
#if KS_HAS_CUDA || defined(KS_CUDA_ON_CPU)
    &ks_backend_cuda,
#endif
    &ks_backend_cpu, NULL};
