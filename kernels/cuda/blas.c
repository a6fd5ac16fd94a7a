/* Dense products by cuBLASLt, which is loaded when a context is made: a program runs without it.
 *
 * cuBLASLt is column-major. A row-major [r, c] is a column-major [c, r], so y = x W^T is read as y' = (W')^T
 * x' with m = n_out, n = n_rows, k = n_in, and dx = dy W as dx' = W' dy' with m = n_in, k = n_out. W is A,
 * rows are B.
 *
 * The algorithm. One is chosen for each (n_out, n_in, direction, types, bias), whether C is added or not, at NOMINAL_ROWS
 * rows, among those that neither split the reduction nor sum in a second pass: an element is then one chain
 * over k, in an order that belongs to the algorithm, and rows do not meet. Pointers are promised the
 * alignment of a row (at most 16 bytes), which is a property of the shape too. Before an algorithm runs with
 * a row count for the first time cuBLASLt is asked whether it may; where it may not, another is chosen for
 * that row count and counted (ks_cuda_counts.blas_exceptions). Where there is none that is remembered too, and
 * ks_cuda_blas_takes says so. */
#include "kernels/cuda/cuda_impl.h"

#ifdef KS_CUDA_HAS_CUBLASLT
#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>

enum { NOMINAL_ROWS = 2048, N_CANDIDATES = 16, MAX_ALIGN = 16, MAX_ASKED = 64 };
#ifdef KS_CUDA_ON_CPU
static const size_t workspace_bytes =
    64 << 10; /* there allocations are filled, which takes longer than the products */
#else
static const size_t workspace_bytes = (size_t)32 << 20;
#endif

/* ---------------------------------------------------------------- library */

#define FUNCTIONS(X)                                                                                         \
  X(cublasLtCreate)                                                                                          \
  X(cublasLtDestroy)                                                                                         \
  X(cublasLtGetVersion)                                                                                      \
  X(cublasLtMatmul)                                                                                          \
  X(cublasLtMatmulDescCreate)                                                                                \
  X(cublasLtMatmulDescDestroy)                                                                               \
  X(cublasLtMatmulDescSetAttribute)                                                                          \
  X(cublasLtMatrixLayoutCreate)                                                                              \
  X(cublasLtMatrixLayoutDestroy)                                                                             \
  X(cublasLtMatrixLayoutSetAttribute)                                                                        \
  X(cublasLtMatmulPreferenceCreate)                                                                          \
  X(cublasLtMatmulPreferenceDestroy)                                                                         \
  X(cublasLtMatmulPreferenceSetAttribute)                                                                    \
  X(cublasLtMatmulAlgoGetHeuristic)                                                                          \
  X(cublasLtMatmulAlgoCheck)                                                                                 \
  X(cublasLtMatmulAlgoConfigGetAttribute)

/* What belongs to one shape of W, direction, types and bias. */
typedef struct {
  ks_cuda_matmul_params key; /* pointers and n_rows are not part of it */
  bool has_bias;
  uint32_t align[3]; /* of W, rows in, rows out */
  bool is_exception; /* less than that of a row */
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulPreference_t preference;
  bool has_algo;
  cublasLtMatmulAlgo_t algo;
  struct row_count { /* that was asked for; the oldest goes */
    int64_t n_rows;  /* 0: none */
    bool as_planned; /* it may run with the plan's algorithm */
    bool has_algo;   /* else: there is another */
    cublasLtMatmulAlgo_t algo;
  } * asked; /* [MAX_ASKED] */
  size_t n_asked;
} plan;

struct ks_cuda_blas {
#define X(name) __typeof__(&name) name;
  FUNCTIONS(X)
#undef X
  void *library;
  cublasLtHandle_t handle;
  void *workspace;
  plan *plans;
  size_t n_plans, cap_plans;
  char missing[256]; /* why there is no handle */
};

#ifdef KS_CUDA_ON_CPU
static bool load_from(ks_cuda_blas *blas, const char *file) {
  (void)file;
#define X(name) blas->name = name;
  FUNCTIONS(X)
#undef X
  return blas->cublasLtCreate(&blas->handle) == CUBLAS_STATUS_SUCCESS;
}
#else
static bool load_from(ks_cuda_blas *blas, const char *file) {
  void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(blas->missing, sizeof blas->missing, "%.200s", dlerror());
    return false;
  }
  bool all = true;
#define X(name)                                                                                              \
  void *at_##name = dlsym(library, #name);                                                                   \
  memcpy(&blas->name, &at_##name, sizeof blas->name);                                                        \
  if (!at_##name) snprintf(blas->missing, sizeof blas->missing, "%.160s lacks " #name, file), all = false;
  FUNCTIONS(X)
#undef X
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  if (all) status = blas->cublasLtCreate(&blas->handle);
  if (all && status == CUBLAS_STATUS_SUCCESS) {
    blas->library = library;
    return true;
  }
  if (all)
    snprintf(blas->missing, sizeof blas->missing, "%.160s: cublasLtCreate fails with %d", file, (int)status);
  blas->handle = NULL;
  dlclose(library);
  return false;
}
#endif

static const char *const places[] = {
    "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so",
    "/usr/local/cuda/lib64/libcublasLt.so" /* toolkits that were not told to the loader */
};

ks_status ks_cuda_blas_init(ks_ctx *ctx) {
  ks_cuda_blas *blas = NULL;
  KS_TRY(ks_alloc_array(&blas, 1, sizeof *blas, "cuBLASLt"));
  ks_cuda_of(ctx)->blas = blas;
  const char *none = getenv("KS_CUDA_NO_BLAS"), *named = getenv("KS_CUBLASLT");
  if (none && *none && strcmp(none, "0") != 0) {
    snprintf(blas->missing, sizeof blas->missing, "KS_CUDA_NO_BLAS is set");
    return KS_OK;
  }
  if (named && *named) {
    if (load_from(blas, named)) return KS_OK;
    return KS_FAIL(KS_EENV, "cuda: KS_CUBLASLT: %s", blas->missing);
  }
  for (size_t i = 0; i < sizeof places / sizeof places[0]; i++)
    if (load_from(blas, places[i])) return KS_OK;
  snprintf(blas->missing, sizeof blas->missing,
           "there is no libcublasLt.so.13 or .12 here; install libcublas, or name the file in KS_CUBLASLT");
  return KS_OK;
}

bool ks_cuda_has_blas(const ks_ctx *ctx) {
  const ks_cuda_blas *blas = ks_cuda_of(ctx)->blas;
  return blas && blas->handle;
}
const char *ks_cuda_blas_missing(const ks_ctx *ctx) {
  return ks_cuda_of(ctx)->blas->missing;
}
const char *ks_cuda_blas_name(const ks_ctx *ctx, char text[32]) {
  const ks_cuda_blas *blas = ks_cuda_of(ctx)->blas;
  const size_t v = ks_cuda_has_blas(ctx) ? blas->cublasLtGetVersion() : 0;
  if (v == 0) return "no cuBLASLt";
  snprintf(text, 32, "cuBLASLt %d.%d.%d", (int)(v / 10000), (int)(v / 100 % 100), (int)(v % 100));
  return text;
}
size_t ks_cuda_blas_pending_bytes(const ks_ctx *ctx) {
  return ks_cuda_has_blas(ctx) && !ks_cuda_of(ctx)->blas->workspace ? workspace_bytes : 0;
}

static void plan_free(const ks_cuda_blas *blas, plan *p) {
  if (p->desc) blas->cublasLtMatmulDescDestroy(p->desc);
  if (p->preference) blas->cublasLtMatmulPreferenceDestroy(p->preference);
  cublasLtMatrixLayout_t layouts[] = {p->a, p->b, p->d};
  for (int i = 0; i < 3; i++)
    if (layouts[i]) blas->cublasLtMatrixLayoutDestroy(layouts[i]);
  free(p->asked);
}

void ks_cuda_blas_exit(ks_ctx *ctx) {
  ks_cuda_blas *blas = ks_cuda_of(ctx)->blas;
  if (!blas) return;
  for (size_t i = 0; i < blas->n_plans; i++)
    plan_free(blas, &blas->plans[i]);
  if (blas->handle) blas->cublasLtDestroy(blas->handle);
  if (blas->workspace) ks_mem_account(ctx, 0, workspace_bytes);
  cudaFree(blas->workspace);
  free(blas->plans);
  free(blas); /* the library stays: unloading it does not give everything back */
  ks_cuda_of(ctx)->blas = NULL;
}

/* ---------------------------------------------------------------- plans */

static ks_status blas_failed(const char *what, const ks_cuda_matmul_params *p, cublasStatus_t status) {
  return KS_FAIL(KS_EDEVICE, "matmul [%lld, %lld] x [%lld, %lld]%s, %s to %s: %s fails with cuBLAS status %d",
                 (long long)p->n_rows, (long long)(p->w_transposed ? p->n_in : p->n_out), (long long)p->n_out,
                 (long long)p->n_in, p->w_transposed ? " transposed" : "", ks_dtype_name(p->x_dtype),
                 ks_dtype_name(p->y_dtype), what, (int)status);
}
#define BLAS_TRY(p, expr)                                                                                    \
  do {                                                                                                       \
    cublasStatus_t blas_try_ = (expr);                                                                       \
    if (blas_try_ != CUBLAS_STATUS_SUCCESS) return blas_failed(#expr, p, blas_try_);                         \
  } while (0)

static cudaDataType_t type_of(ks_dtype t) {
  return t == KS_DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* What rows of n elements share, up to what the widest loads want, and less where the array does not begin
 * so. */
static uint32_t alignment(const void *p, int64_t n, ks_dtype t, bool *is_less) {
  const uint64_t row = ((uint64_t)n * ks_dtype_size(t)) | MAX_ALIGN, all = row | (uintptr_t)p;
  const uint64_t low_row = row & (~row + 1), low_all = all & (~all + 1);
  if (low_all < low_row) *is_less = true;
  return (uint32_t)low_all;
}

static void find_alignment(const ks_cuda_matmul_params *p, uint32_t align[3], bool *is_less) {
  const int64_t m = p->w_transposed ? p->n_out : p->n_in, k = p->w_transposed ? p->n_in : p->n_out;
  *is_less = false;
  align[0] = alignment(p->w, p->n_in, p->w_dtype, is_less);
  align[1] = alignment(p->x, k, p->x_dtype, is_less);
  align[2] = alignment(p->y, m, p->y_dtype, is_less);
  if (!p->c) return;
  const uint32_t of_c = alignment(p->c, m, p->y_dtype, is_less);
  if (of_c < align[2]) align[2] = of_c;
}

static ks_status make_desc(const ks_cuda_blas *blas, plan *e) {
  const ks_cuda_matmul_params *p = &e->key;
  const cublasOperation_t a_op = p->w_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  BLAS_TRY(p, blas->cublasLtMatmulDescCreate(&e->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  BLAS_TRY(p, blas->cublasLtMatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_TRANSA, &a_op, sizeof a_op));
  if (!e->has_bias) return KS_OK;
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  const int32_t type = (int32_t)type_of(p->y_dtype);
  BLAS_TRY(p, blas->cublasLtMatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                                   sizeof epilogue));
  BLAS_TRY(p, blas->cublasLtMatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type,
                                                   sizeof type));
  return KS_OK;
}

static ks_status make_layouts(const ks_cuda_blas *blas, plan *e) {
  const ks_cuda_matmul_params *p = &e->key;
  const int64_t m = p->w_transposed ? p->n_out : p->n_in, k = p->w_transposed ? p->n_in : p->n_out;
  const struct {
    cublasLtMatrixLayout_t *out;
    ks_dtype type;
    int64_t rows, cols;
  } layouts[] = {{&e->a, p->w_dtype, p->n_in, p->n_out},
                 {&e->b, p->x_dtype, k, NOMINAL_ROWS},
                 {&e->d, p->y_dtype, m, NOMINAL_ROWS}};
  for (int i = 0; i < 3; i++)
    BLAS_TRY(p, blas->cublasLtMatrixLayoutCreate(layouts[i].out, type_of(layouts[i].type),
                                                 (uint64_t)layouts[i].rows, (uint64_t)layouts[i].cols,
                                                 layouts[i].rows));
  return KS_OK;
}

static ks_status make_preference(const ks_cuda_blas *blas, plan *e) {
  const ks_cuda_matmul_params *p = &e->key;
  const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  const struct {
    cublasLtMatmulPreferenceAttributes_t which;
    const void *value;
    size_t bytes;
  } wanted[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes},
                {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction, sizeof no_reduction},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &e->align[0], sizeof e->align[0]},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &e->align[1], sizeof e->align[1]},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &e->align[2], sizeof e->align[2]},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &e->align[2], sizeof e->align[2]}};
  BLAS_TRY(p, blas->cublasLtMatmulPreferenceCreate(&e->preference));
  for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
    BLAS_TRY(p, blas->cublasLtMatmulPreferenceSetAttribute(e->preference, wanted[i].which, wanted[i].value,
                                                           wanted[i].bytes));
  return KS_OK;
}

static bool is_one_chain(const ks_cuda_blas *blas, const cublasLtMatmulAlgo_t *algo) {
  int32_t split_k = 0;
  uint32_t scheme = 0;
  size_t n = 0;
  return blas->cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split_k,
                                                    sizeof split_k, &n) == CUBLAS_STATUS_SUCCESS &&
         blas->cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                                    sizeof scheme, &n) == CUBLAS_STATUS_SUCCESS &&
         split_k <= 1 && scheme == CUBLASLT_REDUCTION_SCHEME_NONE;
}

static ks_status set_rows(const ks_cuda_blas *blas, const plan *e, const ks_cuda_matmul_params *p,
                          int64_t n_rows) {
  const uint64_t cols = (uint64_t)n_rows;
  BLAS_TRY(p, blas->cublasLtMatrixLayoutSetAttribute(e->b, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, sizeof cols));
  BLAS_TRY(p, blas->cublasLtMatrixLayoutSetAttribute(e->d, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, sizeof cols));
  return KS_OK;
}

/* For the row count that the layouts have now. */
static ks_status choose(const ks_cuda_blas *blas, const plan *e, const ks_cuda_matmul_params *p,
                        cublasLtMatmulAlgo_t *out, bool *has_algo) {
  cublasLtMatmulHeuristicResult_t found[N_CANDIDATES];
  int n = 0;
  *has_algo = false;
  const cublasStatus_t status = blas->cublasLtMatmulAlgoGetHeuristic(
      blas->handle, e->desc, e->a, e->b, e->d, e->d, e->preference, N_CANDIDATES, found, &n);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return KS_OK;
  BLAS_TRY(p, status);
  for (int i = 0; i < n && !*has_algo; i++) {
    if (found[i].state != CUBLAS_STATUS_SUCCESS || !is_one_chain(blas, &found[i].algo)) continue;
    *out = found[i].algo;
    *has_algo = true;
  }
  return KS_OK;
}

static bool same_plan(const plan *a, const plan *b) {
  return a->key.n_out == b->key.n_out && a->key.n_in == b->key.n_in &&
         a->key.w_transposed == b->key.w_transposed && a->key.x_dtype == b->key.x_dtype &&
         a->key.w_dtype == b->key.w_dtype && a->key.y_dtype == b->key.y_dtype && a->has_bias == b->has_bias &&
         memcmp(a->align, b->align, sizeof a->align) == 0;
}

static ks_status find_plan(ks_cuda_blas *blas, const ks_cuda_matmul_params *p, plan **out) {
  plan made = {.key = *p, .has_bias = p->bias != NULL};
  find_alignment(p, made.align, &made.is_exception);
  for (size_t i = 0; i < blas->n_plans; i++) {
    if (!same_plan(&blas->plans[i], &made)) continue;
    *out = &blas->plans[i];
    return KS_OK;
  }
  KS_TRY(ks_cuda_grow(&blas->plans, &blas->cap_plans, blas->n_plans + 1, sizeof *blas->plans, "matmul"));
  ks_status status = make_desc(blas, &made);
  if (status == KS_OK) status = make_layouts(blas, &made);
  if (status == KS_OK) status = make_preference(blas, &made);
  if (status == KS_OK) status = choose(blas, &made, p, &made.algo, &made.has_algo);
  if (status != KS_OK) {
    plan_free(blas, &made);
    return status;
  }
  blas->plans[blas->n_plans] = made;
  *out = &blas->plans[blas->n_plans++];
  return KS_OK;
}

static ks_status ask(const ks_cuda_blas *blas, const plan *e, const ks_cuda_matmul_params *p,
                     struct row_count *out) {
  cublasLtMatmulHeuristicResult_t result;
  *out = (struct row_count){.n_rows = p->n_rows};
  out->as_planned = blas->cublasLtMatmulAlgoCheck(blas->handle, e->desc, e->a, e->b, e->d, e->d, &e->algo,
                                                  &result) == CUBLAS_STATUS_SUCCESS &&
                    result.workspaceSize <= workspace_bytes;
  return out->as_planned ? KS_OK : choose(blas, e, p, &out->algo, &out->has_algo);
}

/* The plan's algorithm, or the exception for this row count; NULL: there is none. The layouts have the row
 * count already. */
static ks_status algo_for(const ks_cuda_blas *blas, plan *e, const ks_cuda_matmul_params *p,
                          const cublasLtMatmulAlgo_t **out) {
  struct row_count *r = NULL;
  *out = NULL;
  if (!e->has_algo) return KS_OK;
  if (!e->asked) KS_TRY(ks_alloc_array(&e->asked, MAX_ASKED, sizeof *e->asked, "matmul"));
  for (size_t i = 0; i < MAX_ASKED && !r; i++)
    if (e->asked[i].n_rows == p->n_rows) r = &e->asked[i];
  if (!r) {
    struct row_count made;
    KS_TRY(ask(blas, e, p, &made));
    r = &e->asked[e->n_asked++ % MAX_ASKED];
    *r = made;
  }
  *out = r->as_planned ? &e->algo : r->has_algo ? &r->algo : NULL;
  return KS_OK;
}

static ks_status find_algo(ks_cuda_blas *blas, const ks_cuda_matmul_params *p, plan **e,
                           const cublasLtMatmulAlgo_t **algo) {
  KS_TRY(find_plan(blas, p, e));
  KS_TRY(set_rows(blas, *e, p, p->n_rows));
  return algo_for(blas, *e, p, algo);
}

ks_status ks_cuda_blas_takes(ks_ctx *ctx, const ks_cuda_matmul_params *p, bool *out) {
  const cublasLtMatmulAlgo_t *algo = NULL;
  plan *e;
  *out = false;
  if (!ks_cuda_has_blas(ctx)) return KS_OK;
  KS_TRY(find_algo(ks_cuda_of(ctx)->blas, p, &e, &algo));
  *out = algo != NULL;
  return KS_OK;
}

/* ---------------------------------------------------------------- products */

ks_status ks_cuda_matmul_now(ks_ctx *ctx, const ks_cuda_matmul_params *p) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  ks_cuda_blas *blas = cuda->blas;
  const float one = 1, beta = p->c ? 1 : 0;
  const cublasLtMatmulAlgo_t *algo;
  plan *e;
  if (!blas->workspace) {
    KS_TRY(ks_cuda_alloc(ctx, "matmul workspace", workspace_bytes, &blas->workspace));
    ks_mem_account(ctx, workspace_bytes, 0);
  }
  KS_TRY(find_algo(blas, p, &e, &algo));
  if (!algo)
    return blas_failed("a search for an algorithm that does not split its sums", p,
                       CUBLAS_STATUS_NOT_SUPPORTED);
  if (p->bias)
    BLAS_TRY(p, blas->cublasLtMatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias,
                                                     sizeof p->bias));
  cuda->counts.matmuls++;
  cuda->counts.blas_exceptions += e->is_exception + (algo != &e->algo);
  BLAS_TRY(p, blas->cublasLtMatmul(blas->handle, e->desc, &one, p->w, e->a, p->x, e->b, &beta,
                                   p->c ? p->c : p->y, e->d, p->y, e->d, algo, blas->workspace,
                                   workspace_bytes, cuda->stream));
  if (cuda->sync_launches) KS_CUDA_TRY(ctx, "matmul", cudaStreamSynchronize(cuda->stream));
  return KS_OK;
}

#else /* built without cublasLt.h */

ks_status ks_cuda_blas_init(ks_ctx *ctx) {
  (void)ctx;
  return KS_OK;
}
void ks_cuda_blas_exit(ks_ctx *ctx) {
  (void)ctx;
}
bool ks_cuda_has_blas(const ks_ctx *ctx) {
  (void)ctx;
  return false;
}
size_t ks_cuda_blas_pending_bytes(const ks_ctx *ctx) {
  (void)ctx;
  return 0;
}
const char *ks_cuda_blas_missing(const ks_ctx *ctx) {
  (void)ctx;
  return "this build was made without cublasLt.h; install libcublas-dev and build again";
}
const char *ks_cuda_blas_name(const ks_ctx *ctx, char text[32]) {
  (void)ctx, (void)text;
  return "no cuBLASLt";
}
ks_status ks_cuda_blas_takes(ks_ctx *ctx, const ks_cuda_matmul_params *p, bool *out) {
  (void)ctx, (void)p;
  *out = false;
  return KS_OK;
}
ks_status ks_cuda_matmul_now(ks_ctx *ctx, const ks_cuda_matmul_params *p) {
  (void)p;
  return KS_FAIL(KS_EENV, "matmul: %s", ks_cuda_blas_missing(ctx));
}

#endif

ks_status ks_cuda_matmul(ks_ctx *ctx, const ks_cuda_matmul_params *p) {
  KS_TRY(ks_cuda_alive(ctx, "matmul"));
  if (!ks_cuda_has_blas(ctx)) return KS_FAIL(KS_EENV, "matmul: %s", ks_cuda_blas_missing(ctx));
  const int64_t m = p->w_transposed ? p->n_out : p->n_in, k = p->w_transposed ? p->n_in : p->n_out;
  const bool known = (p->x_dtype == KS_DTYPE_F32 || p->x_dtype == KS_DTYPE_BF16) &&
                     p->w_dtype == p->x_dtype && (p->y_dtype == KS_DTYPE_F32 || p->y_dtype == p->x_dtype) &&
                     (p->w_transposed || !p->bias);
  if (!known)
    return KS_FAIL(KS_EINTERNAL, "matmul: %s times %s to %s%s", ks_dtype_name(p->x_dtype),
                   ks_dtype_name(p->w_dtype), ks_dtype_name(p->y_dtype),
                   p->bias && !p->w_transposed ? " with a bias backward" : "");
  if (p->n_rows == 0 || m == 0) return KS_OK;
  if (k == 0) return KS_FAIL(KS_EUNSUPPORTED, "matmul: sums of no elements");
  return ks_cuda_queue(ctx, &(ks_cuda_op){.kind = KS_CUDA_OP_MATMUL, .u.matmul = *p});
}
