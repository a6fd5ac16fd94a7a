/* Launches with their limits, errors of the runtime in words, and the choice of variants. */
#include "kernels/cuda/cuda_impl.h"
#include "kernels/cuda/tensor_map.h"

#include <ctype.h>
#include <stdio.h>
#ifdef KS_CUDA_ON_CPU
#include "ks_shim.h"
#endif

/* ---------------------------------------------------------------- errors */

#define NO_CODE "this build has no code for this GPU; build with -DKS_CUDA_ARCHS=<its sm number>"
/* With KS_CUDA_SYNC=1 it is the one that the message begins with. */
#define NAMES_IT "; it may have been queued long before: KS_CUDA_SYNC=1 names it"
static const struct {
  cudaError_t error;
  const char *hint;
} hints[] = {
    {cudaErrorInsufficientDriver, "the driver is older than the toolkit of this build; update the driver"},
    {cudaErrorLaunchOutOfResources,
     "the kernel needs more registers or shared memory than a block may have here"},
    {cudaErrorMemoryAllocation, "no memory left; use a smaller batch, or end other programs on this GPU"},
    {cudaErrorInvalidDeviceFunction, NO_CODE},
    {cudaErrorIllegalAddress, "a kernel read or wrote outside its arrays" NAMES_IT},
    {cudaErrorLaunchFailure, "a kernel failed" NAMES_IT},
    {cudaErrorLaunchTimeout, "a kernel took longer than the display driver allows; use a smaller batch"},
#ifndef KS_CUDA_ON_CPU
    {cudaErrorNoKernelImageForDevice, NO_CODE},
    {cudaErrorUnsupportedPtxVersion, "the driver is older than the toolkit of this build; update the driver"},
    {cudaErrorMisalignedAddress, "a kernel used a misaligned address" NAMES_IT},
    {cudaErrorIllegalInstruction, "a kernel failed" NAMES_IT},
    {cudaErrorECCUncorrectable, "the GPU's memory is damaged; see nvidia-smi -q -d ECC"},
    {cudaErrorDevicesUnavailable, "another program has the GPU for itself alone; see nvidia-smi"},
#endif
};

/* An error of the device itself comes back from every later call; only such a one is kept. */
ks_status ks_cuda_failed(ks_ctx *ctx, const char *op, const char *call, cudaError_t e) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  const char *hint = NULL;
  for (size_t i = 0; i < sizeof hints / sizeof hints[0] && !hint; i++)
    if (hints[i].error == e) hint = hints[i].hint;
  cudaGetLastError();
  cudaError_t again = cuda->stream && !cuda->capturing ? cudaStreamQuery(cuda->stream) : cudaSuccess;
  const bool lost = again != cudaSuccess && again != cudaErrorNotReady;
  if (again != cudaSuccess) cudaGetLastError();
  char message[512];
  snprintf(message, sizeof message, "%s (%s)%s%s", cudaGetErrorString(e), cudaGetErrorName(e),
           hint ? "; " : "", hint ? hint : "");
  if (lost && !cuda->broken[0])
    snprintf(cuda->broken, sizeof cuda->broken, "%.400s; this context cannot go on", message);
  const int n = (int)strcspn(call, "(");
  return KS_FAIL(e == cudaErrorMemoryAllocation ? KS_ENOMEM : KS_EDEVICE, "%s: %.*s: %s", op, n, call,
                 lost ? cuda->broken : message);
}

ks_status ks_cuda_alive(const ks_ctx *ctx, const char *op) {
  const ks_cuda *cuda = ks_cuda_of(ctx);
  return cuda->broken[0] ? KS_FAIL(KS_EDEVICE, "%s: the GPU failed before: %s", op, cuda->broken) : KS_OK;
}

ks_status ks_cuda_grow(void *p, size_t *cap, size_t wanted, size_t size, const char *what) {
  void *old, *grown;
  if (wanted <= *cap) return KS_OK;
  size_t bytes, n = *cap ? *cap : 64;
  while (n < wanted)
    n *= 2;
  memcpy(&old, p, sizeof old);
  if (!ks_mul_size(n, size, &bytes) || !(grown = realloc(old, bytes)))
    return KS_FAIL(KS_ENOMEM, "%s: no memory for %zu entries", what, n);
  memcpy(p, &grown, sizeof grown);
  *cap = n;
  return KS_OK;
}

/* ---------------------------------------------------------------- launches */

static ks_status check_launch(const ks_ctx *ctx, const ks_cuda_launch_params *p) {
  const ks_cuda_device *d = &ks_cuda_of(ctx)->device;
  const uint64_t threads = (uint64_t)p->block.x * p->block.y * p->block.z;
  char wanted[32], most[32];
  if (p->n_args > KS_CUDA_MAX_ARGS)
    return KS_FAIL(KS_EINTERNAL, "%s: a kernel of %d arguments; at most %d", p->op, p->n_args,
                   KS_CUDA_MAX_ARGS);
  if (threads == 0 || threads > 1024 || p->block.z > 64)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: a block of %u x %u x %u threads; 1 to 1024 are possible", p->op,
                   p->block.x, p->block.y, p->block.z);
  if (p->grid.x > 0x7fffffffu || p->grid.y > 65535 || p->grid.z > 65535)
    return KS_FAIL(
        KS_EUNSUPPORTED,
        "%s: a grid of %u x %u x %u blocks; 2147483647 x 65535 x 65535 are possible; use a smaller batch",
        p->op, p->grid.x, p->grid.y, p->grid.z);
  if (p->smem_bytes > (size_t)d->smem_per_block)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: %s of shared memory a block; %s has %s", p->op,
                   ks_cuda_human(wanted, p->smem_bytes), d->name,
                   ks_cuda_human(most, (size_t)d->smem_per_block));
  return KS_OK;
}

/* The place of func in the table, or the free one where it belongs. */
static size_t find_limit(const ks_cuda_limit *limits, size_t cap, const void *func) {
  size_t i = ((uintptr_t)func >> 4) * 0x9e3779b97f4a7c15u >> 20 & (cap - 1);
  while (limits[i].func && limits[i].func != func)
    i = (i + 1) & (cap - 1);
  return i;
}

static ks_status grow_limits(ks_cuda *cuda) {
  if (2 * cuda->n_limits < cuda->cap_limits) return KS_OK;
  const size_t cap = cuda->cap_limits ? 2 * cuda->cap_limits : 64;
  ks_cuda_limit *grown = NULL;
  KS_TRY(ks_alloc_array(&grown, cap, sizeof *grown, "cuda kernels"));
  for (size_t i = 0; i < cuda->cap_limits; i++)
    if (cuda->limits[i].func) grown[find_limit(grown, cap, cuda->limits[i].func)] = cuda->limits[i];
  free(cuda->limits);
  cuda->limits = grown;
  cuda->cap_limits = cap;
  return KS_OK;
}

/* More than 48 KiB of shared memory must be asked for, kernel by kernel. Always the most there is: the limit is the kernel's, not
 * the context's, and a smaller one would take from another context what it was promised. */
static ks_status raise_limit(ks_ctx *ctx, const ks_cuda_launch_params *p) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (p->smem_bytes <= KS_CUDA_SHARED_DEFAULT) return KS_OK;
  KS_TRY(grow_limits(cuda));
  ks_cuda_limit *limit = &cuda->limits[find_limit(cuda->limits, cuda->cap_limits, p->func)];
  if (limit->func) return KS_OK;
  KS_CUDA_TRY(ctx, p->op,
              cudaFuncSetAttribute(p->func, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   cuda->device.smem_per_block));
  cuda->n_limits++;
  limit->func = p->func;
  return KS_OK;
}

static cudaError_t launch(const ks_cuda *cuda, const ks_cuda_launch_params *p) {
  const bool is_early = p->early && cuda->capturing && cuda->early_launches;
#ifdef KS_CUDA_ON_CPU
  return ks_shim_launch(p->func, p->invoke, p->grid, p->block, p->args, p->arg_sizes, p->n_args,
                        p->smem_bytes, cuda->stream, is_early, p->op);
#else
  if (!is_early) return cudaLaunchKernel(p->func, p->grid, p->block, p->args, p->smem_bytes, cuda->stream);
  cudaLaunchAttribute early = {.id = cudaLaunchAttributeProgrammaticStreamSerialization,
                               .val.programmaticStreamSerializationAllowed = 1};
  const cudaLaunchConfig_t config = {.gridDim = p->grid,
                                     .blockDim = p->block,
                                     .dynamicSmemBytes = p->smem_bytes,
                                     .stream = cuda->stream,
                                     .attrs = &early,
                                     .numAttrs = 1};
  return cudaLaunchKernelExC(&config, p->func, p->args);
#endif
}

ks_status ks_cuda_launch_now(ks_ctx *ctx, const ks_cuda_launch_params *p) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(raise_limit(ctx, p));
  cudaError_t e = launch(cuda, p);
  if (e == cudaSuccess && cuda->sync_launches) e = cudaStreamSynchronize(cuda->stream);
  cuda->counts.launches++;
  if (e == cudaSuccess) return KS_OK;
  return ks_fail_context(ks_cuda_failed(ctx, p->op, "launch", e),
                         "grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory", p->grid.x,
                         p->grid.y, p->grid.z, p->block.x, p->block.y, p->block.z, p->smem_bytes);
}

ks_status ks_cuda_launch(ks_ctx *ctx, const ks_cuda_launch_params *p) {
  KS_TRY(ks_cuda_alive(ctx, p->op));
  if (p->grid.x == 0 || p->grid.y == 0 || p->grid.z == 0) return KS_OK;
  KS_TRY(check_launch(ctx, p));
  return ks_cuda_queue(ctx, &(ks_cuda_op){.kind = KS_CUDA_OP_LAUNCH, .u.launch = *p});
}

ks_status ks_cuda_fill(ks_ctx *ctx, void *device, int byte, size_t bytes) {
  KS_TRY(ks_cuda_alive(ctx, "fill"));
  if (bytes == 0) return KS_OK;
  return ks_cuda_queue(ctx, &(ks_cuda_op){.kind = KS_CUDA_OP_FILL, .u.fill = {device, bytes, byte}});
}

ks_status ks_cuda_copy(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  KS_TRY(ks_cuda_alive(ctx, "copy"));
  if (bytes == 0 || dst == src) return KS_OK;
  return ks_cuda_queue(ctx, &(ks_cuda_op){.kind = KS_CUDA_OP_COPY, .u.copy = {dst, src, bytes}});
}

ks_status ks_cuda_execute(ks_ctx *ctx, const ks_cuda_op *op) {
  cudaStream_t stream = ks_cuda_of(ctx)->stream;
  KS_TRY(ks_cuda_activity_begin(ctx));
  switch (op->kind) {
  case KS_CUDA_OP_LAUNCH:
    return ks_cuda_launch_now(ctx, &op->u.launch);
  case KS_CUDA_OP_MATMUL:
    return ks_cuda_matmul_now(ctx, &op->u.matmul);
  case KS_CUDA_OP_FILL:
    KS_CUDA_TRY(ctx, "fill", cudaMemsetAsync(op->u.fill.dst, op->u.fill.byte, op->u.fill.bytes, stream));
    return KS_OK;
  case KS_CUDA_OP_COPY:
    KS_CUDA_TRY(
        ctx, "copy",
        cudaMemcpyAsync(op->u.copy.dst, op->u.copy.src, op->u.copy.bytes, cudaMemcpyDeviceToDevice, stream));
    return KS_OK;
  }
  return KS_FAIL(KS_EINTERNAL, "cuda: queued work of kind %d", (int)op->kind);
}

/* ---------------------------------------------------------------- variants */

static const ks_op_variant table[] = {
#define X(op, name, f32, bf16) {#op, #name, f32, bf16},
    KS_CUDA_VARIANT_MAP(X)
#undef X
};

static int find_op(const char *op, size_t n) {
  for (int i = 0; i < KS_CUDA_N_VARIANTS; i++)
    if (strlen(table[i].op) == n && memcmp(table[i].op, op, n) == 0) return i;
  return -1;
}

static bool suits(const ks_ctx *ctx, const ks_op_variant *v) {
  if (strcmp(v->name, "cublaslt") == 0 && !ks_cuda_has_blas(ctx)) return false;
  if (strcmp(v->name, "wgmma") == 0 && !ks_cuda_has_wgmma(ctx, NULL)) return false;
  return ctx->act_dtype == KS_DTYPE_BF16 ? v->bf16 : v->f32;
}

/* "attention_forward: mma (bf16 only), simt; head_loss: ..." of one operation, or of all. */
static void list_variants(char *text, size_t size, const char *op) {
  size_t used = 0;
  text[0] = 0;
  for (int i = 0; i < KS_CUDA_N_VARIANTS && used < size - 1; i++) {
    if (op && strcmp(table[i].op, op) != 0) continue;
    const bool first = i == 0 || strcmp(table[i].op, table[i - 1].op) != 0;
    const char *only = !table[i].f32 ? " (bf16 only)" : !table[i].bf16 ? " (float32 only)" : "";
    int n = snprintf(text + used, size - used, "%s%s%s%s%s",
                     used == 0 ? ""
                     : first   ? "; "
                               : ", ",
                     first && !op ? table[i].op : "", first && !op ? ": " : "", table[i].name, only);
    used += n > 0 ? (size_t)n : 0;
  }
}

/* One "operation=variant" of n characters. */
static ks_status choose_one(ks_ctx *ctx, const char *s, size_t n) {
  char possible[1024];
  const char *equals = memchr(s, '=', n);
  const size_t n_op = equals ? (size_t)(equals - s) : n;
  const int first = find_op(s, n_op);
  if (!equals || first < 0) {
    list_variants(possible, sizeof possible, NULL);
    return KS_FAIL(KS_EINVAL, "cuda: variants: '%.*s' is not <operation>=<variant>; there are %s", (int)n, s,
                   possible);
  }
  const char *op = table[first].op, *name = equals + 1;
  const size_t n_name = n - n_op - 1;
  for (int i = first; i < KS_CUDA_N_VARIANTS && strcmp(table[i].op, op) == 0; i++) {
    if (strlen(table[i].name) != n_name || memcmp(table[i].name, name, n_name) != 0) continue;
    if (strcmp(table[i].name, "cublaslt") == 0 && !ks_cuda_has_blas(ctx))
      return KS_FAIL(KS_EENV, "cuda: variant cublaslt of %s: %s", op, ks_cuda_blas_missing(ctx));
    const char *why = NULL;
    if (strcmp(table[i].name, "wgmma") == 0 && !ks_cuda_has_wgmma(ctx, &why))
      return KS_FAIL(KS_EUNSUPPORTED, "cuda: variant wgmma of %s %s; this is %s", op, why,
                     ks_cuda_of(ctx)->device.name);
    if (!suits(ctx, &table[i])) break;
    ks_cuda_of(ctx)->chosen[first] = (ks_cuda_variant)i;
    return KS_OK;
  }
  list_variants(possible, sizeof possible, op);
  return KS_FAIL(KS_EINVAL, "cuda: %s has no variant '%.*s' for %s activations; there are %s", op,
                 (int)n_name, name, ks_dtype_name(ctx->act_dtype), possible);
}

ks_status ks_cuda_choose_variants(ks_ctx *ctx, const char *wanted) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  for (int i = KS_CUDA_N_VARIANTS - 1; i >= 0; i--) {
    const int first = find_op(table[i].op, strlen(table[i].op));
    if (suits(ctx, &table[i])) cuda->chosen[first] = (ks_cuda_variant)i;
  }
  for (const char *s = wanted; s && *s;) {
    const size_t whole = strcspn(s, ",");
    const char *end = s + whole, *begin = s;
    while (begin < end && isspace((unsigned char)*begin))
      begin++;
    s = end + (*end == ',');
    while (end > begin && isspace((unsigned char)end[-1]))
      end--;
    if (begin < end) KS_TRY(choose_one(ctx, begin, (size_t)(end - begin)));
  }
  return KS_OK;
}

ks_cuda_variant ks_cuda_variant_of(const ks_ctx *ctx, const char *op) {
  const int first = find_op(op, strlen(op));
  KS_ASSERT(first >= 0);
  return ks_cuda_of(ctx)->chosen[first];
}
