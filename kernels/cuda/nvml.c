/* Clocks, power and heat by the driver's management library, loaded at run time: its header is no part of
 * every toolkit, and a Jetson's driver has no such library. Signatures and numbers are those of NVML's public
 * interface, which keeps them. */
#include "kernels/cuda/meter.cuh"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>

typedef struct nvml_device *nvml_handle;
enum { NVML_OK = 0, NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2, NVML_TEMPERATURE_GPU = 0 };
/* Software and hardware slowdown for heat, hardware slowdown, power brake. The power cap is not among them:
 * it is how large cards work all day, and the ceilings are measured under it too. */
static const unsigned long long slowed_down = 0x08 | 0x20 | 0x40 | 0x80;

#define FUNCTIONS(X)                                                                                         \
  X(nvmlInit_v2, (void))                                                                                     \
  X(nvmlShutdown, (void))                                                                                    \
  X(nvmlDeviceGetHandleByPciBusId_v2, (const char *, nvml_handle *))                                         \
  X(nvmlDeviceGetClockInfo, (nvml_handle, int, unsigned *))                                                  \
  X(nvmlDeviceGetMaxClockInfo, (nvml_handle, int, unsigned *))                                               \
  X(nvmlDeviceGetPowerUsage, (nvml_handle, unsigned *))                                                      \
  X(nvmlDeviceGetEnforcedPowerLimit, (nvml_handle, unsigned *))                                              \
  X(nvmlDeviceGetTemperature, (nvml_handle, int, unsigned *))                                                \
  X(nvmlDeviceGetCurrentClocksThrottleReasons, (nvml_handle, unsigned long long *))                          \
  X(nvmlSystemGetDriverVersion, (char *, unsigned))

struct ks_cuda_nvml {
  void *library;
  nvml_handle device;
#define X(name, args) int(*name) args;
  FUNCTIONS(X)
#undef X
};

static void *find(void *library, const char *name) {
  return library ? dlsym(library, name) : NULL;
}

#ifdef KS_CUDA_ON_CPU
static cudaError_t find_bus(char *bus, int size) {
  bus[0] = 0;
  return size > 0 ? cudaErrorNotSupported : cudaErrorInvalidValue;
}
#else
static cudaError_t find_bus(char *bus, int size) {
  return cudaDeviceGetPCIBusId(bus, size, 0);
}
#endif

ks_cuda_nvml *ks_cuda_nvml_open(void) {
  char bus[32];
  ks_cuda_nvml *nvml = calloc(1, sizeof *nvml);
  if (!nvml) return NULL;
  nvml->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  union { /* ISO C has no conversion between the two kinds of pointers; POSIX has */
    void *object;
    void (*function)(void);
  } symbol;
  bool whole = nvml->library != NULL;
#define X(name, args)                                                                                        \
  symbol.object = find(nvml->library, #name);                                                                \
  nvml->name = (int(*) args)symbol.function;                                                                 \
  whole = whole && symbol.object;
  FUNCTIONS(X)
#undef X
  if (whole && nvml->nvmlInit_v2() == NVML_OK) {
    if (find_bus(bus, (int)sizeof bus) == cudaSuccess &&
        nvml->nvmlDeviceGetHandleByPciBusId_v2(bus, &nvml->device) == NVML_OK)
      return nvml;
    cudaGetLastError();
    nvml->nvmlShutdown();
  }
  if (nvml->library) dlclose(nvml->library);
  free(nvml);
  return NULL;
}

void ks_cuda_nvml_close(ks_cuda_nvml *nvml) {
  if (!nvml) return;
  nvml->nvmlShutdown();
  dlclose(nvml->library);
  free(nvml);
}

static double scaled(int error, unsigned value, double scale) {
  return error == NVML_OK ? scale * (double)value : NAN;
}

void ks_cuda_nvml_read(ks_cuda_nvml *nvml, ks_meter_clocks *out) {
  unsigned v = 0;
  unsigned long long reasons = 0;
  int e = nvml->nvmlDeviceGetClockInfo(nvml->device, NVML_CLOCK_SM, &v);
  out->sm_mhz = scaled(e, v, 1);
  e = nvml->nvmlDeviceGetMaxClockInfo(nvml->device, NVML_CLOCK_SM, &v);
  out->sm_max_mhz = scaled(e, v, 1);
  e = nvml->nvmlDeviceGetClockInfo(nvml->device, NVML_CLOCK_MEM, &v);
  out->memory_mhz = scaled(e, v, 1);
  e = nvml->nvmlDeviceGetPowerUsage(nvml->device, &v);
  out->watts = scaled(e, v, 1e-3);
  e = nvml->nvmlDeviceGetEnforcedPowerLimit(nvml->device, &v);
  out->watts_limit = scaled(e, v, 1e-3);
  e = nvml->nvmlDeviceGetTemperature(nvml->device, NVML_TEMPERATURE_GPU, &v);
  out->celsius = scaled(e, v, 1);
  e = nvml->nvmlDeviceGetCurrentClocksThrottleReasons(nvml->device, &reasons);
  out->throttled = e == NVML_OK && (reasons & slowed_down) != 0;
}

void ks_cuda_nvml_driver(ks_cuda_nvml *nvml, char *text, size_t size) {
  if (nvml->nvmlSystemGetDriverVersion(text, (unsigned)size) != NVML_OK) text[0] = 0;
}
