#include "kernels/backend.h"

const ks_backend *const ks_backends[] = {&ks_backend_cpu, NULL};
