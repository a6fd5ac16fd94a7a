/* Contexts, memory, element types and weights: the parts of ops.h that are not operations (those:
 * ops_check.c). */
#include "kernels/backend.h"

/* ---------------------------------------------------------------- context */

static ks_status find_backend(const char *name, const ks_backend **out) {
  bool any = strcmp(name, "auto") == 0;
  for (int i = 0; ks_backends[i]; i++) {
    if (!any && strcmp(name, ks_backends[i]->name) != 0) continue;
    ks_status status = ks_backends[i]->probe();
    if (status != KS_OK && !any) return status;
    if (status != KS_OK) continue;
    ks_error_clear(); /* why the preferred ones were passed over is no error */
    *out = ks_backends[i];
    return KS_OK;
  }
  if (strcmp(name, "cuda") == 0)
    return KS_FAIL(
        KS_EENV,
        "this build has no CUDA backend: there was no GPU or no nvcc 12 where it was built, or KS_CUDA=OFF; "
        "build it "
        "again on a machine with both, or anywhere with nvcc and KS_CUDA=ON; or use \"cpu\" or \"auto\"");
  return KS_FAIL(KS_EENV, "there is no backend '%s'; use \"cpu\", \"cuda\" or \"auto\"", name);
}

ks_status ks_ctx_create(ks_ctx **out, const ks_ctx_params *params) {
  if (!out) return KS_FAIL(KS_EINVAL, "ks_ctx_create: out is NULL");
  *out = NULL;
  ks_ctx_params p = params ? *params : KS_CTX_PARAMS_DEFAULT;
  const ks_backend *backend = NULL;
  if (p.activations != KS_DTYPE_F32 && p.activations != KS_DTYPE_BF16)
    return KS_FAIL(KS_EINVAL, "ks_ctx_create: activations are f32 or bf16, not '%s'",
                   ks_dtype_name(p.activations));
  if (p.n_threads < 0 || p.n_threads > 4096)
    return KS_FAIL(KS_EINVAL, "ks_ctx_create: n_threads is %d; give 0 (all) to 4096", p.n_threads);
  KS_TRY(find_backend(p.backend ? p.backend : "auto", &backend));
  ks_ctx *ctx = NULL;
  KS_TRY(ks_alloc_array(&ctx, 1, sizeof *ctx, "context"));
  ctx->backend = backend;
  ks_status status = backend->ctx_init(ctx, &p);
  if (status != KS_OK) {
    ks_ctx_destroy(ctx);
    return status;
  }
  *out = ctx;
  return KS_OK;
}

void ks_ctx_destroy(ks_ctx *ctx) {
  if (!ctx) return;
  ctx->backend->ctx_exit(ctx);
  free(ctx->blocks);
  free(ctx);
}

const char *ks_ctx_backend_name(const ks_ctx *ctx) {
  return ctx->backend->name;
}
const char *ks_ctx_isa_name(const ks_ctx *ctx) {
  return ctx->isa_name;
}
int ks_ctx_n_threads(const ks_ctx *ctx) {
  return ctx->n_threads;
}
const char *ks_ctx_device_name(const ks_ctx *ctx) {
  return ctx->device_name;
}

ks_dtype ks_ctx_act_dtype(const ks_ctx *ctx) {
  return ctx->act_dtype;
}
size_t ks_ctx_act_size(const ks_ctx *ctx) {
  return ctx->act_dtype == KS_DTYPE_BF16 ? 2 : sizeof(float);
}

void *ks_act_at(const ks_ctx *ctx, const void *p, int64_t n) {
  union { /* as strchr: the caller knows whether it may write */
    const char *in;
    void *out;
  } at = {.in = p};
  if (p) at.in += n * (int64_t)ks_ctx_act_size(ctx);
  return at.out;
}

int64_t ks_backend_variants(const char *backend, ks_op_variant *out, int64_t cap) {
  for (int i = 0; ks_backends[i]; i++) {
    if (strcmp(ks_backends[i]->name, backend) != 0) continue;
    for (int64_t v = 0; v < ks_backends[i]->n_variants && v < cap; v++)
      out[v] = ks_backends[i]->variants[v];
    return ks_backends[i]->n_variants;
  }
  return 0;
}

ks_status ks_sync(ks_ctx *ctx) {
  if (!ctx) return KS_FAIL(KS_EINVAL, "ks_sync: ctx is NULL");
  return ctx->backend->sync ? ctx->backend->sync(ctx) : KS_OK;
}

ks_status ks_step_begin(ks_ctx *ctx, uint64_t key) {
  if (!ctx) return KS_FAIL(KS_EINVAL, "ks_step_begin: ctx is NULL");
  return ctx->backend->step_begin ? ctx->backend->step_begin(ctx, key) : KS_OK;
}

ks_status ks_step_end(ks_ctx *ctx) {
  if (!ctx) return KS_FAIL(KS_EINVAL, "ks_step_end: ctx is NULL");
  return ctx->backend->step_end ? ctx->backend->step_end(ctx) : KS_OK;
}

/* ---------------------------------------------------------------- memory */

void ks_mem_account(ks_ctx *ctx, size_t add, size_t remove) {
  ctx->mem_used += add - remove;
  if (ctx->mem_used > ctx->mem_peak) ctx->mem_peak = ctx->mem_used;
}

size_t ks_mem_used(const ks_ctx *ctx) {
  return ctx->mem_used;
}
size_t ks_mem_peak(const ks_ctx *ctx) {
  return ctx->mem_peak;
}

size_t ks_mem_available(ks_ctx *ctx) {
  return ctx && ctx->backend->mem_available ? ctx->backend->mem_available(ctx) : SIZE_MAX;
}

static ks_status grow_blocks(ks_ctx *ctx) {
  if (ctx->n_blocks < ctx->cap_blocks) return KS_OK;
  size_t cap = ctx->cap_blocks ? 2 * ctx->cap_blocks : 64;
  ks_mem_block *grown = realloc(ctx->blocks, cap * sizeof *grown);
  if (!grown) return KS_FAIL(KS_ENOMEM, "ks_mem_alloc: no memory for the list of %zu allocations", cap);
  ctx->blocks = grown;
  ctx->cap_blocks = cap;
  return KS_OK;
}

ks_status ks_mem_alloc(ks_ctx *ctx, size_t bytes, void **out) {
  if (!ctx || !out) return KS_FAIL(KS_EINVAL, "ks_mem_alloc: ctx or out is NULL");
  *out = NULL;
  KS_TRY(grow_blocks(ctx));
  KS_TRY(ctx->backend->mem_alloc(ctx, bytes, out));
  ctx->blocks[ctx->n_blocks++] = (ks_mem_block){*out, bytes};
  ks_mem_account(ctx, bytes, 0);
  return KS_OK;
}

void ks_mem_free(ks_ctx *ctx, void *p) {
  if (!ctx || !p) return;
  size_t i = ctx->n_blocks;
  while (i > 0 && ctx->blocks[i - 1].p != p)
    i--;
  KS_ASSERT(i > 0); /* not from ks_mem_alloc of this context, or freed before */
  ks_mem_account(ctx, 0, ctx->blocks[i - 1].bytes);
  ctx->blocks[i - 1] = ctx->blocks[--ctx->n_blocks];
  ctx->backend->mem_free(ctx, p);
}

static ks_status check_transfer(const char *what, const ks_ctx *ctx, const void *dst, const void *src,
                                size_t bytes) {
  if (!ctx) return KS_FAIL(KS_EINVAL, "%s: ctx is NULL", what);
  if (bytes && (!dst || !src)) return KS_FAIL(KS_EINVAL, "%s: NULL pointer for %zu bytes", what, bytes);
  return KS_OK;
}

ks_status ks_mem_upload(ks_ctx *ctx, void *dst, const void *host_src, size_t bytes) {
  KS_TRY(check_transfer("ks_mem_upload", ctx, dst, host_src, bytes));
  return bytes ? ctx->backend->mem_upload(ctx, dst, host_src, bytes) : KS_OK;
}

ks_status ks_mem_download(ks_ctx *ctx, void *host_dst, const void *src, size_t bytes) {
  KS_TRY(check_transfer("ks_mem_download", ctx, host_dst, src, bytes));
  return bytes ? ctx->backend->mem_download(ctx, host_dst, src, bytes) : KS_OK;
}

ks_status ks_mem_zero(ks_ctx *ctx, void *p, size_t bytes) {
  KS_TRY(check_transfer("ks_mem_zero", ctx, p, p, bytes));
  return bytes ? ctx->backend->mem_zero(ctx, p, bytes) : KS_OK;
}

ks_status ks_mem_copy(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  KS_TRY(check_transfer("ks_mem_copy", ctx, dst, src, bytes));
  return bytes ? ctx->backend->mem_copy(ctx, dst, src, bytes) : KS_OK;
}

/* ---------------------------------------------------------------- element types */

static const struct {
  const char *name;
  size_t size;
} dtypes[] = {[KS_DTYPE_F32] = {"f32", 4}, [KS_DTYPE_BF16] = {"bf16", 2}, [KS_DTYPE_F16] = {"f16", 2},
              [KS_DTYPE_I8] = {"i8", 1},   [KS_DTYPE_Q8_0] = {"q8_0", 0}, [KS_DTYPE_Q4_0] = {"q4_0", 0},
              [KS_DTYPE_NF4] = {"nf4", 0}};
enum { N_DTYPES = sizeof dtypes / sizeof dtypes[0] };

static bool is_dtype(ks_dtype t) {
  return (int)t >= 0 && (int)t < N_DTYPES;
}
size_t ks_dtype_size(ks_dtype t) {
  return is_dtype(t) ? dtypes[t].size : 0;
}
bool ks_dtype_is_weight(ks_dtype t) {
  return is_dtype(t) && t <= KS_DTYPE_NF4;
}
bool ks_dtype_is_quantized(ks_dtype t) {
  return is_dtype(t) && dtypes[t].size == 0;
}
const char *ks_dtype_name(ks_dtype t) {
  return is_dtype(t) ? dtypes[t].name : "?";
}

ks_status ks_dtype_parse(const char *name, ks_dtype *out) {
  if (!name || !out) return KS_FAIL(KS_EINVAL, "ks_dtype_parse: NULL argument");
  for (int i = 0; i < N_DTYPES; i++) {
    if (strcmp(name, dtypes[i].name) != 0) continue;
    *out = (ks_dtype)i;
    return KS_OK;
  }
  return KS_FAIL(KS_EINVAL, "'%s' is no element type; use f32, bf16, f16, i8, q8_0, q4_0 or nf4", name);
}

/* ---------------------------------------------------------------- weights */

static ks_status check_weight_params(const ks_weight_params *p) {
  size_t n;
  if (p->n_out < 0 || p->n_in < 0 || p->n_out > INT32_MAX || p->n_in > INT32_MAX)
    return KS_FAIL(KS_EINVAL, "ks_weight_create: shape [%lld, %lld]; give 0 to 2^31 - 1 rows and columns",
                   (long long)p->n_out, (long long)p->n_in);
  /* Room for padding to whole panels and for both layouts. */
  if (!ks_mul_size((size_t)p->n_out + 256, (size_t)p->n_in + 256, &n) || n > SIZE_MAX / 64)
    return KS_FAIL(KS_EOVERFLOW, "ks_weight_create: [%lld, %lld] does not fit an address space",
                   (long long)p->n_out, (long long)p->n_in);
  if (!ks_dtype_is_weight(p->dtype))
    return KS_FAIL(KS_EINVAL, "ks_weight_create: packed weights are f32, bf16, q8_0, q4_0 or nf4, not '%s'",
                   ks_dtype_name(p->dtype));
  if (p->values_dtype != KS_DTYPE_F32 && p->values_dtype != KS_DTYPE_BF16 && p->values_dtype != KS_DTYPE_F16)
    return KS_FAIL(KS_EINVAL, "ks_weight_create: values_dtype is %d", (int)p->values_dtype);
  if (!p->values && p->n_out > 0 && p->n_in > 0)
    return KS_FAIL(KS_EINVAL, "ks_weight_create: values is NULL");
  return KS_OK;
}

ks_status ks_weight_create(ks_ctx *ctx, const ks_weight_params *params, ks_weight **out) {
  if (!ctx || !params || !out) return KS_FAIL(KS_EINVAL, "ks_weight_create: NULL argument");
  *out = NULL;
  KS_TRY(check_weight_params(params));
  ks_weight *w = NULL;
  KS_TRY(ks_alloc_array(&w, 1, sizeof *w, "weight"));
  w->backend = ctx->backend;
  w->n_out = params->n_out;
  w->n_in = params->n_in;
  w->dtype = params->dtype;
  ks_status status = ctx->backend->weight_create(ctx, params, w);
  if (status != KS_OK) {
    free(w);
    return status;
  }
  ks_mem_account(ctx, w->bytes, 0);
  *out = w;
  return KS_OK;
}

void ks_weight_destroy(ks_ctx *ctx, ks_weight *w) {
  if (!ctx || !w) return;
  ks_mem_account(ctx, 0, w->bytes);
  ctx->backend->weight_destroy(ctx, w);
  free(w);
}

int64_t ks_weight_n_out(const ks_weight *w) {
  return w->n_out;
}
int64_t ks_weight_n_in(const ks_weight *w) {
  return w->n_in;
}
ks_dtype ks_weight_dtype(const ks_weight *w) {
  return w->dtype;
}
size_t ks_weight_bytes(const ks_weight *w) {
  return w->bytes;
}

ks_status ks_weight_prepare_backward(ks_ctx *ctx, ks_weight *w) {
  if (!ctx || !w) return KS_FAIL(KS_EINVAL, "ks_weight_prepare_backward: NULL argument");
  if (w->backend != ctx->backend)
    return KS_FAIL(KS_EINVAL, "ks_weight_prepare_backward: the weight belongs to another backend");
  size_t before = w->bytes;
  KS_TRY(ctx->backend->weight_prepare_backward(ctx, w));
  ks_mem_account(ctx, w->bytes, before);
  return KS_OK;
}
