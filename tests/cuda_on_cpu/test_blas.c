/* cuBLASLt by the CPU's BLAS: against plain loops, same bits wherever a column stands, and what it refuses.
 */
#include "ks_shim.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <cublasLt.h>
#include <math.h>
#include <stdio.h>

typedef struct {
  int m, n, k;
  bool a_turned, b_turned, bias;
  cudaDataType in, out;
  float alpha, beta;
  int gap; /* of leading dimensions */
} product_case;

static const product_case cases[] = {
    {1, 1, 1, false, false, false, CUDA_R_32F, CUDA_R_32F, 1, 0, 0},
    {33, 17, 97, true, false, true, CUDA_R_32F, CUDA_R_32F, 1, 0, 0},
    {64, 16, 48, true, false, false, CUDA_R_16BF, CUDA_R_16BF, 1, 1, 0},
    {40, 35, 31, false, false, false, CUDA_R_16BF, CUDA_R_32F, 0.5f, 1, 3},
    {7, 50, 129, true, true, true, CUDA_R_16BF, CUDA_R_16BF, 1, 0, 5},
    {20, 3, 11, false, true, true, CUDA_R_32F, CUDA_R_32F, -2, 0.25f, 1},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

typedef struct {
  float *values; /* rounded to the type */
  void *device;
  cublasLtMatrixLayout_t layout;
  int ld;
} operand;

static size_t size_of(cudaDataType type) {
  return type == CUDA_R_16BF ? 2 : 4;
}

static void to_bytes(void *to, cudaDataType type, float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &x[i], sizeof bits);
    if (type == CUDA_R_16BF) {
      const uint16_t half = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
      memcpy((char *)to + 2 * i, &half, sizeof half);
      bits = (uint32_t)half << 16;
      memcpy(&x[i], &bits, sizeof bits);
    } else
      memcpy((char *)to + 4 * i, &bits, sizeof bits);
  }
}

static operand make(cudaDataType type, int rows, int cols, int gap, uint64_t seed) {
  operand o = {.ld = rows + gap};
  const int64_t n = (int64_t)o.ld * cols;
  void *bytes = malloc((size_t)n * 4);
  o.values = ks_floats(n, KS_FILL_SIGNED, seed);
  to_bytes(bytes, type, o.values, n);
  cr_assert(cudaMalloc(&o.device, (size_t)n * size_of(type)) == cudaSuccess);
  cr_assert(cudaMemcpy(o.device, bytes, (size_t)n * size_of(type), cudaMemcpyHostToDevice) == cudaSuccess);
  cr_assert(cublasLtMatrixLayoutCreate(&o.layout, type, (uint64_t)rows, (uint64_t)cols, o.ld) == 0);
  free(bytes);
  return o;
}

static float *fetch(const operand *o, cudaDataType type, int64_t n) {
  void *bytes = malloc((size_t)n * 4);
  float *x = malloc((size_t)n * 4);
  cr_assert(cudaMemcpy(bytes, o->device, (size_t)n * size_of(type), cudaMemcpyDeviceToHost) == cudaSuccess);
  for (int64_t i = 0; i < n; i++) {
    uint16_t half;
    uint32_t bits;
    if (type == CUDA_R_16BF)
      memcpy(&half, (char *)bytes + 2 * i, 2), bits = (uint32_t)half << 16;
    else
      memcpy(&bits, (char *)bytes + 4 * i, 4);
    memcpy(&x[i], &bits, 4);
  }
  free(bytes);
  return x;
}

static void drop(operand *o) {
  cudaFree(o->device);
  cublasLtMatrixLayoutDestroy(o->layout);
  free(o->values);
}

static cublasLtMatmulDesc_t make_desc(const product_case *c, const void *bias) {
  cublasLtMatmulDesc_t desc;
  const int32_t turned = CUBLAS_OP_T;
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  cr_assert(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == 0);
  if (c->a_turned)
    cr_assert(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &turned, 4) == 0);
  if (c->b_turned)
    cr_assert(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &turned, 4) == 0);
  if (c->bias) {
    cr_assert(
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == 0);
    cr_assert(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) ==
              0);
  }
  return desc;
}

/* The first algorithm for pointers aligned to `alignment`. */
static cublasLtMatmulAlgo_t choose(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const operand *a,
                                   const operand *b, const operand *d, uint32_t alignment) {
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulHeuristicResult_t found[4];
  const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
  int n = 0;
  cr_assert(cublasLtMatmulPreferenceCreate(&preference) == 0);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none,
                                       sizeof none);
  const cublasLtMatmulPreferenceAttributes_t which[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  for (int i = 0; i < 4; i++)
    cublasLtMatmulPreferenceSetAttribute(preference, which[i], &alignment, sizeof alignment);
  cr_assert(cublasLtMatmulAlgoGetHeuristic(handle, desc, a->layout, b->layout, d->layout, d->layout,
                                           preference, 4, found, &n) == 0);
  cr_assert(n >= 1);
  cublasLtMatmulPreferenceDestroy(preference);
  return found[0].algo;
}

static int64_t check(const product_case *c, int number) {
  cublasLtHandle_t handle;
  cr_assert(cublasLtCreate(&handle) == 0);
  operand a = make(c->in, c->a_turned ? c->k : c->m, c->a_turned ? c->m : c->k, c->gap, 1);
  operand b = make(c->in, c->b_turned ? c->n : c->k, c->b_turned ? c->k : c->n, c->gap, 2);
  operand d = make(c->out, c->m, c->n, c->gap, 3), bias = make(c->out, c->m, 1, 0, 4);
  cublasLtMatmulDesc_t desc = make_desc(c, bias.device);
  const cublasLtMatmulAlgo_t algo = choose(handle, desc, &a, &b, &d, 16);
  cr_assert(cublasLtMatmul(handle, desc, &c->alpha, a.device, a.layout, b.device, b.layout, &c->beta,
                           d.device, d.layout, d.device, d.layout, &algo, NULL, 0, NULL) == 0);
  float *got = fetch(&d, c->out, (int64_t)d.ld * c->n);
  int64_t bad = 0;
  for (int j = 0; j < c->n; j++)
    for (int i = 0; i < d.ld; i++) {
      const int64_t at = (int64_t)j * d.ld + i;
      double ref = (double)c->beta * (double)d.values[at], size = fabs(ref);
      for (int l = 0; i < c->m && l < c->k; l++) {
        const float x = a.values[c->a_turned ? i * a.ld + l : l * a.ld + i];
        const float y = b.values[c->b_turned ? l * b.ld + j : j * b.ld + l];
        ref += (double)c->alpha * (double)x * (double)y,
            size += fabs((double)c->alpha * (double)x * (double)y);
      }
      if (i < c->m && c->bias) ref += (double)bias.values[i], size += fabs((double)bias.values[i]);
      const double tolerance =
          ks_tolerance_rounded(ref, size, c->k + 2, c->out == CUDA_R_16BF ? 0x1p-8 : 0x1p-24, 0);
      const bool fine = i < c->m ? fabs((double)got[at] - ref) <= tolerance : got[at] == d.values[at];
      if (!fine && bad++ < 4)
        fprintf(stderr, "case %d (%d, %d): %g, wants %g\n", number, i, j, (double)got[at], ref);
    }
  free(got);
  drop(&a), drop(&b), drop(&d), drop(&bias);
  cublasLtMatmulDescDestroy(desc);
  cublasLtDestroy(handle);
  return bad;
}

Test(blas, products) {
  int64_t bad = 0;
  for (int i = 0; i < N_CASES; i++)
    bad += check(&cases[i], i);
  cr_assert(bad == 0);
  cr_assert(ks_shim_count().products == N_CASES && ks_shim_memory_used() == 0);
}

/* A column's bits are the same alone, among 40, and at any place among them. */
Test(blas, a_column_depends_on_nothing_else) {
  static const int sizes[][2] = {{5, 7}, {33, 97}, {128, 64}, {257, 200}};
  const float one = 1, zero = 0;
  for (int s = 0; s < 4; s++)
    for (int turned = 0; turned < 2; turned++) {
      enum { N = 40 };
      const product_case c = {.m = sizes[s][0], .n = N, .k = sizes[s][1], .a_turned = turned};
      cublasLtHandle_t handle;
      cr_assert(cublasLtCreate(&handle) == 0);
      operand a = make(CUDA_R_32F, turned ? c.k : c.m, turned ? c.m : c.k, 0, 5),
              b = make(CUDA_R_32F, c.k, N, 0, 6);
      operand all = make(CUDA_R_32F, c.m, N, 0, 7), part = make(CUDA_R_32F, c.m, N, 0, 8);
      cublasLtMatmulDesc_t desc = make_desc(&c, NULL);
      const cublasLtMatmulAlgo_t algo = choose(handle, desc, &a, &b, &all, 4);
      cr_assert(cublasLtMatmul(handle, desc, &one, a.device, a.layout, b.device, b.layout, &zero, all.device,
                               all.layout, all.device, all.layout, &algo, NULL, 0, NULL) == 0);
      for (int from = 0, n = 1; from < N; from += n, n = n % 19 + 2) {
        const uint64_t cols = (uint64_t)(from + n > N ? N - from : n);
        cublasLtMatrixLayoutSetAttribute(b.layout, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, sizeof cols);
        cublasLtMatrixLayoutSetAttribute(part.layout, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, sizeof cols);
        float *to = (float *)part.device + (size_t)from * (size_t)c.m;
        cr_assert(cublasLtMatmul(handle, desc, &one, a.device, a.layout,
                                 (float *)b.device + (size_t)from * (size_t)c.k, b.layout, &zero, to,
                                 part.layout, to, part.layout, &algo, NULL, 0, NULL) == 0);
      }
      float *x = fetch(&all, CUDA_R_32F, (int64_t)c.m * N), *y = fetch(&part, CUDA_R_32F, (int64_t)c.m * N);
      cr_expect(memcmp(x, y, (size_t)c.m * N * sizeof *x) == 0, "%d x %d", c.m, c.k);
      free(x), free(y);
      drop(&a), drop(&b), drop(&all), drop(&part);
      cublasLtMatmulDescDestroy(desc);
      cublasLtDestroy(handle);
    }
}

Test(blas, refuses) {
  const float one = 1, zero = 0;
  const product_case c = {.m = 8, .n = 8, .k = 8};
  cublasLtHandle_t handle;
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulHeuristicResult_t found[4];
  float host[64] = {0};
  int n = 0, split = 0;
  cr_assert(cublasLtCreate(&handle) == 0);
  operand a = make(CUDA_R_32F, 8, 8, 1, 1), d = make(CUDA_R_32F, 8, 8, 0, 2),
          wide = make(CUDA_R_32F, 9, 8, 0, 3);
  cublasLtMatmulDesc_t desc = make_desc(&c, NULL);
  const cublasLtMatmulAlgo_t algo16 = choose(handle, desc, &a, &a, &d, 16),
                             algo4 = choose(handle, desc, &a, &a, &d, 4);
  const struct {
    const void *x;
    const operand *y;
    const cublasLtMatmulAlgo_t *algo;
    cublasStatus_t wants;
  } tries[] = {{a.device, &d, &algo16, CUBLAS_STATUS_SUCCESS},
               {(float *)a.device + 1, &d, &algo16, CUBLAS_STATUS_INVALID_VALUE}, /* promised 16 bytes */
               {(float *)a.device + 1, &d, &algo4, CUBLAS_STATUS_SUCCESS},
               {(float *)a.device + 2, &d, &algo4, CUBLAS_STATUS_INVALID_VALUE}, /* past the end */
               {host, &d, &algo4, CUBLAS_STATUS_INVALID_VALUE},
               {a.device, &wide, &algo4, CUBLAS_STATUS_INVALID_VALUE}};
  for (size_t i = 0; i < sizeof tries / sizeof tries[0]; i++)
    cr_expect(cublasLtMatmul(handle, desc, &one, tries[i].x, a.layout, a.device, a.layout, &zero,
                             tries[i].y->device, tries[i].y->layout, tries[i].y->device, tries[i].y->layout,
                             tries[i].algo, NULL, 0, NULL) == tries[i].wants,
              "case %zu", i);
  /* who does not forbid it gets a split reduction first */
  cr_assert(cublasLtMatmulPreferenceCreate(&preference) == 0);
  cr_assert(cublasLtMatmulAlgoGetHeuristic(handle, desc, a.layout, a.layout, d.layout, d.layout, preference,
                                           4, found, &n) == 0);
  cr_assert(n == 2 && cublasLtMatmulAlgoConfigGetAttribute(&found[0].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
                                                           &split, sizeof split, NULL) == 0);
  cr_assert(split == 2);
  cr_assert(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &one, 3) ==
            CUBLAS_STATUS_INVALID_VALUE);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatmulDescDestroy(desc);
  drop(&a), drop(&d), drop(&wide);
  cublasLtDestroy(handle);
}
