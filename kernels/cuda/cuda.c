/* The CUDA backend's device, context and memory, and its table of functions. */
#include "kernels/cuda/cuda_impl.h"
#include "kernels/cuda/meter.cuh"

#include <stdio.h>

/* ---------------------------------------------------------------- device */

#ifndef KS_CUDA_ARCHS
#define KS_CUDA_ARCHS "" /* the shim: no machine code at all */
#endif
enum { MIN_CAPABILITY = 75 };

/* Tegra's chips: machine code for them and for others of the same major version is not interchangeable. */
static bool is_tegra(int capability) {
  static const int all[] = {87, 88, 101, 110};
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
    if (all[i] == capability) return true;
  return false;
}

bool ks_cuda_archs_serve(const char *archs, int capability) {
  const char *s = archs;
  if (!*s) return true;
  while (*s) {
    char *end;
    const int arch = (int)strtol(s, &end, 10);
    const size_t n = strcspn(end, " ");
    const char *real = strstr(end, "-real"), *ptx = strstr(end, "-virtual");
    const bool is_real = !(ptx && ptx < end + n), is_ptx = !(real && real < end + n);
    const bool kin =
        arch / 10 == capability / 10 && arch <= capability && !is_tegra(arch) && !is_tegra(capability);
    if (is_real && (arch == capability || kin)) return true;
    if (is_ptx && arch <= capability) return true;
    s = end + n + (end[n] == ' ');
  }
  return false;
}

static ks_status get_attribute(int *out, enum cudaDeviceAttr which, int device) {
  cudaError_t e = cudaDeviceGetAttribute(out, which, device);
  if (e == cudaSuccess) return KS_OK;
  cudaGetLastError();
  return KS_FAIL(KS_EENV, "cuda: the device does not answer: %s", cudaGetErrorString(e));
}

static ks_status get_capability(int *out) {
  int major = 0, minor = 0;
  KS_TRY(get_attribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  KS_TRY(get_attribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  *out = 10 * major + minor;
  return KS_OK;
}

static ks_status cuda_probe(void) {
  int driver = 0, runtime = 0, n_devices = 0, capability = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaError_t e = cudaGetDeviceCount(&n_devices);
  if (e != cudaSuccess) cudaGetLastError();
  if (driver == 0)
    return KS_FAIL(
        KS_EENV, "cuda: there is no NVIDIA driver here (libcuda.so.1); install one, or use backend \"cpu\"");
  if (e == cudaErrorInsufficientDriver)
    return KS_FAIL(
        KS_EENV,
        "cuda: the driver knows CUDA %d.%d and this build needs %d.%d; update the driver, or build with an "
        "older toolkit",
        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  if (e == cudaErrorNoDevice || (e == cudaSuccess && n_devices == 0)) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    return KS_FAIL(KS_EENV, "cuda: there is no GPU here%s%s%s", visible ? " (CUDA_VISIBLE_DEVICES is \"" : "",
                   visible ? visible : "", visible ? "\")" : "");
  }
  if (e != cudaSuccess) return KS_FAIL(KS_EENV, "cuda: %s (%s)", cudaGetErrorString(e), cudaGetErrorName(e));
  KS_TRY(get_capability(&capability));
  if (capability < MIN_CAPABILITY)
    return KS_FAIL(KS_EENV, "cuda: the GPU has compute capability %d.%d; 7.5 (Turing) or newer is needed",
                   capability / 10, capability % 10);
  if (!ks_cuda_archs_serve(KS_CUDA_ARCHS, capability))
    return KS_FAIL(
        KS_EENV, "cuda: this build has no code for sm_%d; it was built for %s; build with -DKS_CUDA_ARCHS=%d",
        capability, KS_CUDA_ARCHS, capability);
  return KS_OK;
}

static ks_status describe_device(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  ks_cuda_device *d = &cuda->device;
  const struct {
    int *out;
    enum cudaDeviceAttr which;
  } attributes[] = {{&d->major, cudaDevAttrComputeCapabilityMajor},
                    {&d->minor, cudaDevAttrComputeCapabilityMinor},
                    {&d->n_sm, cudaDevAttrMultiProcessorCount},
                    {&d->smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                    {&d->smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                    {&d->l2_bytes, cudaDevAttrL2CacheSize},
                    {&cuda->integrated, cudaDevAttrIntegrated}};
  for (size_t i = 0; i < sizeof attributes / sizeof attributes[0]; i++)
    KS_TRY(get_attribute(attributes[i].out, attributes[i].which, 0));
  struct cudaDeviceProp properties;
  KS_CUDA_TRY(ctx, "cuda", cudaGetDeviceProperties(&properties, 0));
  snprintf(d->name, sizeof d->name, "%.*s", (int)sizeof d->name - 1, properties.name);
  d->total_bytes = properties.totalGlobalMem;
  snprintf(cuda->isa_name, sizeof cuda->isa_name, "sm_%d", 10 * d->major + d->minor);
  ctx->isa_name = cuda->isa_name;
  return KS_OK;
}

static ks_status name_device(ks_ctx *ctx) {
  const ks_cuda *cuda = ks_cuda_of(ctx);
  const ks_cuda_device *d = &cuda->device;
  int driver = 0, runtime = 0;
  KS_CUDA_TRY(ctx, "cuda", cudaDriverGetVersion(&driver));
  KS_CUDA_TRY(ctx, "cuda", cudaRuntimeGetVersion(&runtime));
  char total[32], blas[32];
  snprintf(ctx->device_name, sizeof ctx->device_name, "%s (%s, %d SMs, %s; driver %d.%d, runtime %d.%d, %s)",
           d->name, cuda->isa_name, d->n_sm, ks_cuda_human(total, d->total_bytes), driver / 1000,
           driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, ks_cuda_blas_name(ctx, blas));
  return KS_OK;
}

const ks_cuda_device *ks_cuda_device_of(const ks_ctx *ctx) {
  return &ks_cuda_of(ctx)->device;
}

const ks_cuda_counts *ks_cuda_counts_of(const ks_ctx *ctx) {
  return &ks_cuda_of(ctx)->counts;
}

/* ---------------------------------------------------------------- context */

static bool env_is_set(const char *name) {
  const char *value = getenv(name);
  return value && *value && strcmp(value, "0") != 0;
}

/* Graphs hold launches that begin early from CUDA 12.3 on; before, a step with one could not be captured. */
static bool may_begin_early(const ks_cuda *cuda) {
  enum { EDGES_WITH_DATA = 12030 };
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return env_is_set("KS_CUDA_PDL") && cuda->device.major >= 9 && driver >= EDGES_WITH_DATA &&
         runtime >= EDGES_WITH_DATA;
}

static ks_status cuda_ctx_init(ks_ctx *ctx, const ks_ctx_params *params) {
  ks_cuda *cuda = NULL;
  KS_TRY(ks_alloc_array(&cuda, 1, sizeof *cuda, "cuda context"));
  ctx->impl = cuda;
  ctx->isa_name = "";
  ctx->n_threads = 1;
  ctx->act_dtype = params->activations;
  cuda->staging.with_device = true;
  cuda->staging.life_bytes = (size_t)64 << 20;
  cuda->sync_launches = env_is_set("KS_CUDA_SYNC");
  cuda->no_graphs = cuda->sync_launches || env_is_set("KS_CUDA_NO_GRAPHS");
  KS_CUDA_TRY(ctx, "cuda", cudaSetDevice(0));
  KS_CUDA_TRY(ctx, "cuda", cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
  KS_TRY(describe_device(ctx));
  cuda->early_launches = may_begin_early(cuda);
  if (params->isa && strcmp(params->isa, "auto") != 0 && strcmp(params->isa, cuda->isa_name) != 0)
    return KS_FAIL(KS_EENV, "cuda: the GPU is %s, not '%s'; use \"auto\"", cuda->isa_name, params->isa);
  KS_TRY(ks_cuda_blas_init(ctx));
  KS_TRY(name_device(ctx));
  return ks_cuda_choose_variants(ctx, params->variants);
}

static void cuda_ctx_exit(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (!cuda) return;
  if (cuda->stream) cudaStreamSynchronize(cuda->stream);
  ks_cuda_steps_exit(ctx);
  ks_cuda_blas_exit(ctx);
  ks_cuda_stage_exit(ctx);
  ks_cuda_activity_exit(ctx);
  if (cuda->stream) cudaStreamDestroy(cuda->stream);
  free(cuda->limits);
  free(cuda);
  ctx->impl = NULL;
  cudaGetLastError();
}

/* ---------------------------------------------------------------- memory */

const char *ks_cuda_human(char text[32], size_t bytes) {
  static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double value = (double)bytes;
  int unit = 0;
  while (value >= 1024 && unit < 4)
    value /= 1024, unit++;
  snprintf(text, 32, "%.*f %s", unit == 0 || value >= 100 ? 0 : 1, value, units[unit]);
  return text;
}

/* "MemAvailable:  123 kB" of Linux: free, and what its caches would give back. 0: unknown. */
static size_t system_available(void) {
  unsigned long long kib = 0;
  char line[128];
  FILE *f = fopen("/proc/meminfo", "re");
  while (f && kib == 0 && fgets(line, sizeof line, f))
    if (sscanf(line, "MemAvailable: %llu kB", &kib) != 1) kib = 0;
  if (f) fclose(f);
  return (size_t)kib << 10;
}

/* What can still be allocated. A device that shares the system's memory counts caches as used, which the
 * system gives back on demand. */
static size_t free_bytes(const ks_ctx *ctx, size_t *total) {
  size_t n_free = 0;
  *total = 0;
  if (cudaMemGetInfo(&n_free, total) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const size_t available = ks_cuda_of(ctx)->integrated ? system_available() : 0;
  if (available > n_free) n_free = available < *total ? available : *total;
  return n_free;
}

ks_status ks_cuda_alloc(ks_ctx *ctx, const char *what, size_t bytes, void **out) {
  *out = NULL;
  cudaError_t e = cudaMalloc(out, bytes ? bytes : 1);
  if (e == cudaSuccess) return KS_OK;
  *out = NULL;
  if (e != cudaErrorMemoryAllocation) return ks_cuda_failed(ctx, what, "cudaMalloc", e);
  cudaGetLastError();
  size_t total;
  const size_t n_free = free_bytes(ctx, &total);
  char wanted[32], left[32], all[32];
  return KS_FAIL(
      KS_ENOMEM,
      "%s: no GPU memory for %s; %s of %s are free on %s; use a smaller batch, shorter sequences, bf16 or "
      "quantised weights, or end other programs on this GPU",
      what, ks_cuda_human(wanted, bytes), ks_cuda_human(left, n_free), ks_cuda_human(all, total),
      ks_cuda_of(ctx)->device.name);
}

static ks_status not_in_step(const ks_ctx *ctx, const char *what) {
  if (!ks_cuda_in_step(ctx)) return KS_OK;
  return KS_FAIL(KS_EINVAL, "%s: not inside a step; end it before (ks_step_end)", what);
}

static ks_status cuda_mem_alloc(ks_ctx *ctx, size_t bytes, void **out) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(ks_cuda_alive(ctx, "ks_mem_alloc"));
  KS_TRY(not_in_step(ctx, "ks_mem_alloc"));
  KS_TRY(ks_cuda_alloc(ctx, "ks_mem_alloc", bytes, out));
  cudaError_t e = cudaMemsetAsync(*out, 0, bytes, cuda->stream);
  if (e == cudaSuccess) return KS_OK;
  cudaFree(*out);
  *out = NULL;
  return ks_cuda_failed(ctx, "ks_mem_alloc", "cudaMemsetAsync", e);
}

static void cuda_mem_free(ks_ctx *ctx, void *p) {
  ks_cuda_step_flush(ctx);
  cudaFree(p); /* waits for the device */
  cudaGetLastError();
}

static ks_status cuda_mem_upload(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  KS_TRY(ks_cuda_alive(ctx, "ks_mem_upload"));
  if (!ks_cuda_in_step(ctx)) return ks_cuda_send(ctx, "ks_mem_upload", dst, src, bytes);
  const void *staged;
  KS_TRY(ks_cuda_stage(ctx, src, bytes, &staged));
  return ks_cuda_copy(ctx, dst, staged, bytes);
}

static ks_status cuda_mem_download(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(ks_cuda_alive(ctx, "ks_mem_download"));
  KS_TRY(not_in_step(ctx, "ks_mem_download"));
  KS_TRY(ks_cuda_activity_end(ctx));
  KS_CUDA_TRY(ctx, "ks_mem_download", cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda->stream));
  KS_CUDA_TRY(ctx, "ks_mem_download", cudaStreamSynchronize(cuda->stream));
  ks_cuda_activity_waited(ctx);
  return KS_OK;
}

static ks_status cuda_mem_zero(ks_ctx *ctx, void *p, size_t bytes) {
  return ks_cuda_fill(ctx, p, 0, bytes);
}
static ks_status cuda_mem_copy(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  return ks_cuda_copy(ctx, dst, src, bytes);
}

static size_t cuda_mem_available(ks_ctx *ctx) {
  size_t total;
  const size_t n_free = free_bytes(ctx, &total), pending = ks_cuda_blas_pending_bytes(ctx);
  return n_free > pending ? n_free - pending : 0;
}

static ks_status cuda_sync(ks_ctx *ctx) {
  KS_TRY(not_in_step(ctx, "ks_sync"));
  return ks_cuda_finish(ctx);
}

/* Products read the one layout there is in both directions. */
static ks_status cuda_weight_prepare_backward(ks_ctx *ctx, ks_weight *w) {
  (void)ctx, (void)w;
  return KS_OK;
}

/* ---------------------------------------------------------------- table */

static const ks_op_variant variants[] = {
#define X(op, name, f32, bf16) {#op, #name, f32, bf16},
    KS_CUDA_VARIANT_MAP(X)
#undef X
};

const ks_backend ks_backend_cuda = {
    .name = "cuda",
    .what = "NVIDIA GPUs, Turing and newer",
    .probe = cuda_probe,
    .ctx_init = cuda_ctx_init,
    .ctx_exit = cuda_ctx_exit,
    .mem_alloc = cuda_mem_alloc,
    .mem_free = cuda_mem_free,
    .mem_upload = cuda_mem_upload,
    .mem_download = cuda_mem_download,
    .mem_zero = cuda_mem_zero,
    .mem_copy = cuda_mem_copy,
    .weight_create = ks_cuda_weight_create,
    .weight_destroy = ks_cuda_weight_destroy,
    .weight_prepare_backward = cuda_weight_prepare_backward,
    .head_loss_workspace = ks_cuda_head_loss_workspace,
    .sync = cuda_sync,
    .step_begin = ks_cuda_step_begin,
    .step_end = ks_cuda_step_end,
    .mem_available = cuda_mem_available,
    .variants = variants,
    .n_variants = sizeof variants / sizeof variants[0],
    .meter = &ks_cuda_meter,
#define X(op, args) .op = ks_cuda_##op,
    KS_CUDA_OP_MAP(X)
#undef X
        .similarity = ks_cuda_similarity,
    .similarity_top = ks_cuda_similarity_top,
    .similarity_mean = ks_cuda_similarity_mean,
    .similarity_farthest_first = ks_cuda_similarity_farthest_first,
};
