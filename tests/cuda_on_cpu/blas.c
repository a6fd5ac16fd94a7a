/* cuBLASLt by the CPU's BLAS: operands as float32, always COLS columns of the result at once, so that a
 * column's bits depend neither on how many there are nor on its place among them. One: with sixteen the
 * columns at the edges of OpenBLAS's tiles have other last bits. */
#include "ks_shim.h"
#include <cblas.h>
#include <cublasLt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COLS = 1, DEFAULT_ALIGNMENT = 256, ALGO = 7 };

struct cublasLtContext {
  bool is_open;
};
struct cublasLtMatmulDescOpaque {
  int32_t a_op, b_op, epilogue, bias_type;
  const void *bias;
};
struct cublasLtMatrixLayoutOpaque {
  cudaDataType type;
  uint64_t rows, cols;
  int64_t ld;
};
struct cublasLtMatmulPreferenceOpaque {
  uint64_t workspace;
  uint32_t reduction;
  uint32_t alignment[4]; /* of a, b, c, d */
};
/* What cublasLtMatmulAlgo_t holds. */
typedef struct {
  uint32_t id, reduction;
  int32_t split;
  uint32_t alignment[4];
} algo_config;
_Static_assert(sizeof(algo_config) <= sizeof(cublasLtMatmulAlgo_t), "an algorithm fits");

#define TRY(condition, status)                                                                               \
  do {                                                                                                       \
    if (!(condition)) return status;                                                                         \
  } while (0)

/* ---------------------------------------------------------------- objects */

#define CREATE(out, ...)                                                                                     \
  TRY(out, CUBLAS_STATUS_INVALID_VALUE);                                                                     \
  TRY(*(out) = malloc(sizeof **(out)), CUBLAS_STATUS_ALLOC_FAILED);                                          \
  **(out) = (__typeof__(**(out)))__VA_ARGS__;                                                                \
  return CUBLAS_STATUS_SUCCESS

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  openblas_set_num_threads(1);
  CREATE(handle, {true});
}
size_t cublasLtGetVersion(void) {
  return 130000;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  cudaDeviceSynchronize();
  free(handle);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  TRY(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F, CUBLAS_STATUS_NOT_SUPPORTED);
  CREATE(desc, {.epilogue = CUBLASLT_EPILOGUE_DEFAULT, .bias_type = -1});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  free(desc);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  TRY((type == CUDA_R_32F || type == CUDA_R_16BF) && ld >= (int64_t)rows, CUBLAS_STATUS_INVALID_VALUE);
  CREATE(layout, {type, rows, cols, ld});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  free(layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  CREATE(preference,
         {.reduction = CUBLASLT_REDUCTION_SCHEME_MASK,
          .alignment = {DEFAULT_ALIGNMENT, DEFAULT_ALIGNMENT, DEFAULT_ALIGNMENT, DEFAULT_ALIGNMENT}});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  free(preference);
  return CUBLAS_STATUS_SUCCESS;
}

typedef struct {
  int attr;
  void *at;
  size_t bytes;
} attribute;
#define ATTRIBUTE(attr, member)                                                                              \
  { attr, &(member), sizeof(member) }

static cublasStatus_t set(const attribute *known, size_t n, int attr, const void *value, size_t bytes) {
  for (size_t i = 0; i < n; i++)
    if (known[i].attr == attr) {
      TRY(value && bytes == known[i].bytes, CUBLAS_STATUS_INVALID_VALUE);
      memcpy(known[i].at, value, bytes);
      return CUBLAS_STATUS_SUCCESS;
    }
  return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr,
                                              const void *value, size_t bytes) {
  const attribute known[] = {ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSA, desc->a_op),
                             ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSB, desc->b_op),
                             ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE, desc->epilogue),
                             ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_POINTER, desc->bias),
                             ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, desc->bias_type)};
  return set(known, sizeof known / sizeof known[0], (int)attr, value, bytes);
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attr, const void *value,
                                                size_t bytes) {
  const attribute known[] = {ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_TYPE, layout->type),
                             ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_ROWS, layout->rows),
                             ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_COLS, layout->cols),
                             ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_LD, layout->ld)};
  return set(known, sizeof known / sizeof known[0], (int)attr, value, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attr,
                                                    const void *value, size_t bytes) {
  const attribute known[] = {ATTRIBUTE(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, preference->workspace),
                             ATTRIBUTE(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, preference->reduction),
                             ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, preference->alignment[0]),
                             ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, preference->alignment[1]),
                             ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, preference->alignment[2]),
                             ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, preference->alignment[3])};
  return set(known, sizeof known / sizeof known[0], (int)attr, value, bytes);
}

/* ---------------------------------------------------------------- algorithms */

/* m, n, k of op(a) op(b), when the shapes fit. */
static bool shapes(const struct cublasLtMatmulDescOpaque *desc, cublasLtMatrixLayout_t a,
                   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                   uint64_t out[3]) {
  const bool a_turned = desc->a_op != CUBLAS_OP_N, b_turned = desc->b_op != CUBLAS_OP_N;
  out[0] = a_turned ? a->cols : a->rows;
  out[1] = b_turned ? b->rows : b->cols;
  out[2] = a_turned ? a->rows : a->cols;
  const cublasLtMatrixLayout_t all[] = {a, b, c, d};
  for (int i = 0; i < 4; i++)
    if (all[i]->ld < (int64_t)all[i]->rows || all[i]->rows == 0 || all[i]->cols == 0) return false;
  return (b_turned ? b->cols : b->rows) == out[2] && d->rows == out[0] && d->cols == out[1] &&
         c->rows == d->rows && c->cols == d->cols && a->type == b->type && c->type == d->type &&
         (d->type == CUDA_R_32F || d->type == a->type);
}

static uint32_t least_alignment = 1;
void ks_shim_set_blas_alignment(uint32_t bytes) {
  least_alignment = bytes;
}

/* Where reductions may be split the first proposal splits them: callers that want one chain must look. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int n_wanted,
                                              cublasLtMatmulHeuristicResult_t found[], int *n_found) {
  uint64_t mnk[3];
  *n_found = 0;
  TRY(handle && n_wanted > 0 && shapes(desc, a, b, c, d, mnk), CUBLAS_STATUS_INVALID_VALUE);
  for (int i = 0; i < 4; i++)
    TRY(preference->alignment[i] >= least_alignment, CUBLAS_STATUS_NOT_SUPPORTED);
  const bool may_split = preference->reduction & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  for (int split = may_split ? 2 : 1; split >= 1 && *n_found < n_wanted; split--) {
    algo_config config = {.id = ALGO, .split = split};
    config.reduction = split > 1 ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    memcpy(config.alignment, preference->alignment, sizeof config.alignment);
    cublasLtMatmulHeuristicResult_t result = {.state = CUBLAS_STATUS_SUCCESS, .wavesCount = 1};
    memcpy(&result.algo, &config, sizeof config);
    found[(*n_found)++] = result;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result) {
  algo_config config;
  uint64_t mnk[3];
  memcpy(&config, algo, sizeof config);
  TRY(handle && shapes(desc, a, b, c, d, mnk), CUBLAS_STATUS_INVALID_VALUE);
  TRY(config.id == ALGO, CUBLAS_STATUS_NOT_SUPPORTED);
  *result = (cublasLtMatmulHeuristicResult_t){.algo = *algo, .state = CUBLAS_STATUS_SUCCESS, .wavesCount = 1};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attr, void *value,
                                                    size_t bytes, size_t *written) {
  algo_config config;
  memcpy(&config, algo, sizeof config);
  const uint32_t got = attr == CUBLASLT_ALGO_CONFIG_SPLITK_NUM         ? (uint32_t)config.split
                       : attr == CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME ? config.reduction
                                                                       : config.id;
  if (written) *written = sizeof got;
  TRY(bytes == sizeof got, CUBLAS_STATUS_INVALID_VALUE);
  memcpy(value, &got, sizeof got);
  return CUBLAS_STATUS_SUCCESS;
}

/* ---------------------------------------------------------------- products */

typedef struct {
  const void *p;
  struct cublasLtMatrixLayoutOpaque layout;
} matrix;
typedef struct {
  matrix a, b, c, d;
  struct cublasLtMatmulDescOpaque desc;
  uint64_t m, n, k;
  float alpha, beta;
  int split;
} product;

static size_t size_of(cudaDataType type) {
  return type == CUDA_R_16BF ? 2 : 4;
}

static float load(const void *p, cudaDataType type, size_t at) {
  uint16_t half;
  uint32_t bits;
  float x;
  if (type == CUDA_R_32F)
    memcpy(&bits, (const char *)p + 4 * at, sizeof bits);
  else
    memcpy(&half, (const char *)p + 2 * at, sizeof half), bits = (uint32_t)half << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void store(void *p, cudaDataType type, size_t at, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (type == CUDA_R_32F) {
    memcpy((char *)p + 4 * at, &bits, sizeof bits);
    return;
  }
  const uint16_t half =
      (uint16_t)(x != x ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  memcpy((char *)p + 2 * at, &half, sizeof half);
}

static void *need(size_t n) {
  void *p = malloc(n * sizeof(float) + 1);
  if (p) return p;
  fputs("CUDA on CPU: no memory for a product\n", stderr);
  abort();
}

static void run(const void *copy) {
  const product *p = copy;
  const size_t m = p->m, k = p->k, rows = p->a.layout.rows, cols = p->a.layout.cols;
  float *a = need(rows * cols), *b = need(k * COLS), *sum = need(m * COLS);
  for (size_t j = 0; j < cols; j++)
    for (size_t i = 0; i < rows; i++)
      a[j * rows + i] = load(p->a.p, p->a.layout.type, j * (size_t)p->a.layout.ld + i);
  for (size_t at = 0; at < p->n; at += COLS) {
    const size_t n = p->n - at < COLS ? p->n - at : COLS;
    const size_t ld = (size_t)p->b.layout.ld;
    for (size_t j = 0; j < COLS; j++)
      for (size_t l = 0; l < k; l++)
        b[j * k + l] = j >= n ? 0
                              : load(p->b.p, p->b.layout.type,
                                     p->desc.b_op == CUBLAS_OP_N ? (at + j) * ld + l : l * ld + at + j);
    for (int s = 0; s < p->split; s++) {
      const size_t from = k * (size_t)s / (size_t)p->split, to = k * (size_t)(s + 1) / (size_t)p->split;
      const bool turned = p->desc.a_op != CUBLAS_OP_N;
      cblas_sgemm(CblasColMajor, turned ? CblasTrans : CblasNoTrans, CblasNoTrans, (int)m, COLS,
                  (int)(to - from), 1, a + (turned ? from : from * rows), (int)rows, b + from, (int)k, s > 0,
                  sum, (int)m);
    }
    for (size_t j = 0; j < n; j++)
      for (size_t i = 0; i < m; i++) {
        float x = p->alpha * sum[j * m + i];
        if (p->beta != 0)
          x += p->beta * load(p->c.p, p->c.layout.type, (at + j) * (size_t)p->c.layout.ld + i);
        if (p->desc.bias) x += load(p->desc.bias, (cudaDataType)p->desc.bias_type, i);
        store((void *)(uintptr_t)p->d.p, p->d.layout.type, (at + j) * (size_t)p->d.layout.ld + i, x);
      }
  }
  free(a);
  free(b);
  free(sum);
}

/* Inside device memory, and aligned as the caller promised when it chose the algorithm. */
static bool is_usable(const matrix *x, uint32_t alignment) {
  const size_t last = (size_t)x->layout.ld * (x->layout.cols - 1) + x->layout.rows;
  return (uintptr_t)x->p % alignment == 0 && ks_shim_is_device(x->p, last * size_of(x->layout.type));
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  uint64_t mnk[3];
  algo_config config;
  TRY(handle && handle->is_open && algo && shapes(desc, a_layout, b_layout, c_layout, d_layout, mnk),
      CUBLAS_STATUS_INVALID_VALUE);
  TRY(!workspace_bytes || ((uintptr_t)workspace % 256 == 0 && ks_shim_is_device(workspace, workspace_bytes)),
      CUBLAS_STATUS_INVALID_VALUE);
  memcpy(&config, algo, sizeof config);
  product p = {
      {a, *a_layout}, {b, *b_layout}, {c, *c_layout}, {d, *d_layout}, *desc, mnk[0], mnk[1], mnk[2], 0, 0,
      config.split};
  memcpy(&p.alpha, alpha, sizeof p.alpha);
  memcpy(&p.beta, beta, sizeof p.beta);
  if (desc->epilogue != CUBLASLT_EPILOGUE_BIAS)
    p.desc.bias = NULL;
  else
    TRY(desc->bias, CUBLAS_STATUS_INVALID_VALUE);
  if (p.desc.bias_type < 0) p.desc.bias_type = (int32_t)d_layout->type;
  const matrix *all[] = {&p.a, &p.b, &p.c, &p.d};
  for (int i = 0; i < 4; i++)
    TRY(is_usable(all[i], config.alignment[i]), CUBLAS_STATUS_INVALID_VALUE);
  TRY(!p.desc.bias || ks_shim_is_device(p.desc.bias, p.m * size_of((cudaDataType)p.desc.bias_type)),
      CUBLAS_STATUS_INVALID_VALUE);
  return ks_shim_call(stream, run, &p, sizeof p) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                : CUBLAS_STATUS_EXECUTION_FAILED;
}
