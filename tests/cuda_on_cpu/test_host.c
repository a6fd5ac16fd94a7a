/* The CUDA backend's host side: staging, late outputs, steps, products, errors. Runs on the shim only: it
 * counts and breaks things that a real device does not show. */
#include "host_kernels.h"
#include "kernels/cuda/cuda_impl.h"
#include "ks_shim.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>

static ks_ctx *make_ctx(ks_dtype activations, const char *variants) {
  ks_ctx *ctx = NULL;
  const ks_ctx_params params = {.backend = "cuda", .activations = activations, .variants = variants};
  cr_assert(ks_ctx_create(&ctx, &params) == KS_OK, "%s", ks_error_message());
  return ctx;
}

static float *make_array(ks_ctx *ctx, int64_t n, float first) {
  void *p;
  float *host = ks_floats(n, KS_FILL_SIGNED, 7);
  cr_assert(ks_mem_alloc(ctx, (size_t)n * sizeof *host, &p) == KS_OK, "%s", ks_error_message());
  host[0] = first;
  cr_assert(ks_mem_upload(ctx, p, host, (size_t)n * sizeof *host) == KS_OK);
  free(host);
  return p;
}

static void destroy(ks_ctx *ctx) {
  host_destroy(ctx);
  cr_expect(ks_shim_memory_used() == 0 && ks_shim_pinned_used() == 0,
            "%zu bytes of device memory, %zu pinned left", ks_shim_memory_used(), ks_shim_pinned_used());
}

/* ---------------------------------------------------------------- staging */

Test(cuda_host, staged_arrays_live_until_64_mib_came_after) {
  enum { N = 300000, ROUNDS = 160 };
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  uint32_t *host = malloc(N * sizeof *host), *back = malloc(N * sizeof *back);
  const void *at[ROUNDS];
  const int64_t live =
      ((int64_t)64 << 20) / (int64_t)(N * sizeof *host) - 1; /* that many come after the oldest */
  int64_t bad = 0;
  for (int r = 0; r < ROUNDS; r++) {
    for (int i = 0; i < N; i++)
      host[i] = (uint32_t)(r * 1000003 + i);
    cr_assert(ks_cuda_stage(ctx, host, N * sizeof *host, &at[r]) == KS_OK, "%s", ks_error_message());
    memset(host, 0xee, N * sizeof *host);
    bad += (uintptr_t)at[r] % 16 != 0;
    if (r % 16 != 15) continue;
    const int64_t oldest = r > live ? r - live : 0;
    for (int64_t k = oldest; k <= r; k += 5) {
      cr_assert(ks_mem_download(ctx, back, at[k], N * sizeof *back) == KS_OK);
      for (int i = 0; i < N; i++)
        bad += back[i] != (uint32_t)(k * 1000003 + i);
    }
  }
  cr_expect(bad == 0, "%d elements", (int)bad);
  cr_expect(ks_mem_used(ctx) < (size_t)140 << 20, "%zu bytes",
            ks_mem_used(ctx)); /* segments are filled by two thirds here */
  const void *none = host;
  cr_expect(ks_cuda_stage(ctx, NULL, 0, &none) == KS_OK && none == NULL);
  free(host);
  free(back);
  destroy(ctx);
}

Test(cuda_host, a_host_array_may_change_at_once) {
  enum { N = 777 };
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *x = make_array(ctx, N, 1), *y = make_array(ctx, N, 0), back[N], want = 1;
  cr_assert(ks_mem_copy(ctx, y, x, N * sizeof *x) == KS_OK);
  for (int i = 0; i < 3000; i++) { /* far ahead of the device */
    float p[2] = {1, (float)(i % 7)};
    cr_assert(host_affine(ctx, y, y, p, N) == KS_OK);
    want += p[1];
    p[0] = p[1] = NAN;
  }
  cr_assert(ks_mem_download(ctx, back, y, sizeof back) == KS_OK);
  cr_expect(back[0] == want, "%g, not %g", back[0], want);
  destroy(ctx);
}

Test(cuda_host, workspace_grows) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  void *p, *q;
  const size_t before = ks_mem_used(ctx);
  cr_assert(ks_cuda_workspace(ctx, 1, &p) == KS_OK && (uintptr_t)p % 256 == 0);
  cr_assert(ks_cuda_workspace(ctx, 1000, &q) == KS_OK && p == q);
  cr_assert(ks_cuda_fill(ctx, q, 1, 1000) == KS_OK);
  cr_assert(ks_cuda_workspace(ctx, 5 << 20, &q) == KS_OK && (uintptr_t)q % 256 == 0);
  cr_assert(ks_cuda_fill(ctx, q, 1, 5 << 20) == KS_OK && ks_sync(ctx) == KS_OK);
  cr_expect(ks_mem_used(ctx) >= before + (5 << 20) && ks_mem_used(ctx) < before + (8 << 20));
  destroy(ctx);
}

Test(cuda_host, late_outputs_come_at_the_next_sync) {
  enum { N = 40, BIG = 30000 };
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *x = make_array(ctx, BIG, 5), got[N][3], *big = malloc(BIG * sizeof *big);
  memset(got, 0, sizeof got);
  for (int i = 0; i < N; i++) {
    const float p[2] = {0, (float)i};
    cr_assert(host_affine(ctx, x, x, p, 3) == KS_OK);
    cr_assert(ks_cuda_deliver(ctx, got[i], x, sizeof got[i]) == KS_OK);
  }
  cr_assert(ks_cuda_deliver(ctx, big, x, BIG * sizeof *big) == KS_OK &&
            ks_cuda_deliver(ctx, NULL, NULL, 0) == KS_OK);
  cr_expect(got[N - 1][0] == 0, "delivered before the wait");
  cr_assert(ks_sync(ctx) == KS_OK);
  for (int i = 0; i < N; i++)
    cr_expect(got[i][0] == (float)i && got[i][2] == (float)i, "output %d is %g", i, got[i][0]);
  cr_expect(big[2] == N - 1);
  free(big); /* what was brought once does not come again */
  memset(got, 0, sizeof got);
  cr_assert(ks_sync(ctx) == KS_OK && got[3][0] == 0);
  destroy(ctx);
}

Test(cuda_host, memory) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  enum { N = 3 << 20 }; /* more than the upload ring has */
  float *host = ks_floats(N, KS_FILL_SIGNED, 3), *back = malloc(N * sizeof *back);
  void *p, *q;
  cr_assert(ks_mem_alloc(ctx, N * sizeof *host, &p) == KS_OK &&
            ks_mem_alloc(ctx, N * sizeof *host, &q) == KS_OK);
  cr_assert(ks_mem_download(ctx, back, p, N * sizeof *host) == KS_OK);
  for (int i = 0; i < N; i++)
    cr_assert(back[i] == 0);
  for (int i = 0; i < 100; i++) /* the device is busy */
    cr_assert(ks_mem_zero(ctx, q, 64) == KS_OK);
  cr_assert(ks_mem_upload(ctx, p, host, N * sizeof *host) == KS_OK);
  float first = host[0];
  host[0] = -100;
  cr_assert(ks_mem_copy(ctx, q, p, N * sizeof *host) == KS_OK &&
            ks_mem_zero(ctx, p, N * sizeof *host / 2) == KS_OK);
  cr_assert(ks_mem_download(ctx, back, q, N * sizeof *host) == KS_OK);
  host[0] = first;
  cr_expect(memcmp(back, host, N * sizeof *host) == 0);
  cr_assert(ks_mem_download(ctx, back, p, N * sizeof *host) == KS_OK);
  cr_expect(back[0] == 0 && back[N / 2 - 1] == 0 && back[N / 2] == host[N / 2]);
  const size_t available = ks_mem_available(ctx);
  ks_mem_free(ctx, p);
  cr_expect(ks_mem_available(ctx) >= available + N * sizeof *host);
  ks_mem_free(ctx, q);
  free(host);
  free(back);
  destroy(ctx);
}

Test(cuda_host, out_of_memory_says_how_much_there_is) {
  ks_shim_set_memory((size_t)100 << 20);
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *x = make_array(ctx, 100, 2);
  const float one[2] = {1, 1};
  void *p = NULL;
  cr_assert(ks_mem_available(ctx) < (size_t)100 << 20);
  cr_assert(ks_mem_alloc(ctx, (size_t)200 << 20, &p) == KS_ENOMEM && p == NULL);
  cr_expect(strstr(ks_error_message(), "200 MiB") && strstr(ks_error_message(), "100 MiB") &&
                strstr(ks_error_message(), "batch"),
            "%s", ks_error_message());
  cr_assert(ks_mem_alloc(ctx, SIZE_MAX - 10, &p) != KS_OK && p == NULL);
  cr_assert(ks_cuda_workspace(ctx, (size_t)200 << 20, &p) == KS_ENOMEM && p == NULL);
  cr_assert(ks_cuda_workspace(ctx, (size_t)1 << 20, &p) == KS_OK && p != NULL);
  /* inside a step, and all goes on after it */
  cr_assert(ks_step_begin(ctx, 1) == KS_OK && host_affine(ctx, x, x, one, 100) == KS_OK);
  cr_assert(host_affine_twice(ctx, x, x, one, (int64_t)50 << 20) == KS_ENOMEM);
  cr_assert(ks_step_end(ctx) == KS_OK && ks_sync(ctx) == KS_OK);
  for (int i = 0; i < 3; i++)
    cr_assert(ks_step_begin(ctx, 1) == KS_OK && host_affine(ctx, x, x, one, 100) == KS_OK &&
              ks_step_end(ctx) == KS_OK);
  float back;
  cr_assert(ks_mem_download(ctx, &back, x, sizeof back) == KS_OK && back == 6);
  cr_assert(ks_mem_alloc(ctx, (size_t)20 << 20, &p) == KS_OK);
  destroy(ctx);
}

/* ---------------------------------------------------------------- launches */

Test(cuda_host, launches_that_cannot_be) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *y = make_array(ctx, 4, 0), back;
  const size_t most = (size_t)ks_cuda_device_of(ctx)->smem_per_block;
  const struct {
    dim3 grid, block;
    size_t smem;
    ks_status status;
    const char *says;
  } cases[] = {
      {{1, 1, 1}, {32, 1, 1}, 64, KS_OK, ""},
      {{1, 1, 1}, {1024, 1, 1}, 49152, KS_OK, ""},
      {{1, 1, 1}, {32, 1, 1}, most, KS_OK, ""},
      {{1, 1, 1}, {32, 1, 1}, most + 16, KS_EUNSUPPORTED, "shared memory"},
      {{1, 1, 1}, {1025, 1, 1}, 64, KS_EUNSUPPORTED, "threads"},
      {{1, 1, 1}, {0, 1, 1}, 64, KS_EUNSUPPORTED, "threads"},
      {{1, 1, 1}, {32, 1, 65}, 64, KS_EUNSUPPORTED, "threads"},
      {{1, 65536, 1}, {32, 1, 1}, 64, KS_EUNSUPPORTED, "65536"},
      {{1, 1, 65536}, {32, 1, 1}, 64, KS_EUNSUPPORTED, "65536"},
      {{0x80000000u, 1, 1}, {32, 1, 1}, 64, KS_EUNSUPPORTED, "2147483648"},
      {{0, 1, 1}, {32, 1, 1}, 64, KS_OK, ""},
      {{1, 1, 0}, {9999, 1, 1}, 64, KS_OK, ""},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    const float none = -1;
    cr_assert(ks_mem_upload(ctx, y, &none, sizeof none) == KS_OK);
    ks_status status = host_launch(ctx, y, cases[i].grid, cases[i].block, cases[i].smem);
    cr_expect(status == cases[i].status, "case %zu: %s", i, ks_error_message());
    if (status != KS_OK)
      cr_expect(strstr(ks_error_message(), "shared: ") && strstr(ks_error_message(), cases[i].says),
                "case %zu: %s", i, ks_error_message());
    cr_assert(ks_mem_download(ctx, &back, y, sizeof back) == KS_OK, "case %zu: %s", i, ks_error_message());
    const bool ran = status == KS_OK && cases[i].grid.x > 0 && cases[i].grid.z > 0;
    cr_expect(back == (ran ? (float)(cases[i].smem / 4 - 1) : -1), "case %zu: %g", i, back);
  }
  destroy(ctx);
}

Test(cuda_host, a_lost_device_says_so_at_every_call) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *y = make_array(ctx, 4, 0), back;
  const void *staged;
  void *p;
  cr_assert(host_break(ctx, y) == KS_OK); /* not yet known */
  cr_assert(ks_sync(ctx) == KS_EDEVICE);
  cr_expect(strstr(ks_error_message(), "KS_CUDA_SYNC"), "%s", ks_error_message());
  const ks_status all[] = {ks_sync(ctx),
                           ks_mem_download(ctx, &back, y, sizeof back),
                           ks_mem_upload(ctx, y, &back, sizeof back),
                           ks_mem_zero(ctx, y, 4),
                           ks_mem_alloc(ctx, 4, &p),
                           ks_step_begin(ctx, 1),
                           ks_cuda_stage(ctx, &back, sizeof back, &staged),
                           ks_cuda_workspace(ctx, 4, &p),
                           ks_cuda_deliver(ctx, &back, y, 4),
                           host_break(ctx, y)};
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
    cr_expect(all[i] == KS_EDEVICE, "call %zu", i);
  cr_expect(strstr(ks_error_message(), "failed before"), "%s", ks_error_message());
  ks_shim_clear();
  destroy(ctx);
}

Test(cuda_host, with_ks_cuda_sync_the_kernel_is_named) {
  setenv("KS_CUDA_SYNC", "1", 1);
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *y = make_array(ctx, 4, 0);
  cr_assert(host_launch(ctx, y, (dim3){1, 1, 1}, (dim3){32, 1, 1}, 64) == KS_OK);
  cr_assert(host_break(ctx, y) == KS_EDEVICE);
  cr_expect(strstr(ks_error_message(), "broken") &&
                strstr(ks_error_message(), "grid 1 x 1 x 1, block 32 x 1 x 1"),
            "%s", ks_error_message());
  ks_shim_clear();
  destroy(ctx);
}

Test(cuda_host, a_failure_inside_a_graph) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, NULL);
  float *y = make_array(ctx, 4, 0);
  for (int i = 0; i < 2; i++) /* recorded, and not yet waited for */
    cr_assert(ks_step_begin(ctx, 1) == KS_OK && host_break(ctx, y) == KS_OK && ks_step_end(ctx) == KS_OK);
  cr_assert(ks_sync(ctx) == KS_EDEVICE && ks_step_begin(ctx, 1) == KS_EDEVICE);
  ks_shim_clear();
  destroy(ctx);
}

/* ---------------------------------------------------------------- variants, probing */

Test(cuda_host, variants) {
  const struct {
    ks_dtype activations;
    const char *variants;
    ks_status status;
    const char *says, *no_blas;
  } cases[] = {
      {KS_DTYPE_F32, NULL, KS_OK, "", NULL},
      {KS_DTYPE_F32, "", KS_OK, "", NULL},
      {KS_DTYPE_F32, " linear_forward=simt ,head_loss=chunked,", KS_OK, "", NULL},
      {KS_DTYPE_BF16, "linear_forward=mma,linear_forward=simt", KS_OK, "", NULL},
      {KS_DTYPE_F32, "linear_forward=mma", KS_EINVAL, "mma (bf16 only)", NULL},
      {KS_DTYPE_BF16, "linear_forward=magic", KS_EINVAL, "cublaslt, mma (bf16 only), simt", NULL},
      {KS_DTYPE_BF16, "linear_forward=", KS_EINVAL, "cublaslt", NULL},
      {KS_DTYPE_BF16, "linear_forwar=simt", KS_EINVAL, "linear_forward: cublaslt", NULL},
      {KS_DTYPE_BF16, "linear_forward", KS_EINVAL, "<operation>=<variant>", NULL},
      {KS_DTYPE_BF16, "=simt", KS_EINVAL, "<operation>=<variant>", NULL},
      {KS_DTYPE_BF16, "linear_forward=cublaslt", KS_EENV, "KS_CUDA_NO_BLAS", "1"},
      {KS_DTYPE_BF16, "linear_forward=mma", KS_OK, "", "1"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_ctx *ctx = NULL;
    setenv("KS_CUDA_NO_BLAS", cases[i].no_blas ? cases[i].no_blas : "0", 1);
    const ks_ctx_params params = {
        .backend = "cuda", .activations = cases[i].activations, .variants = cases[i].variants};
    cr_expect(ks_ctx_create(&ctx, &params) == cases[i].status, "case %zu: %s", i, ks_error_message());
    if (cases[i].status != KS_OK)
      cr_expect(strstr(ks_error_message(), cases[i].says), "case %zu: %s", i, ks_error_message());
    destroy(ctx);
  }
  setenv("KS_CUDA_NO_BLAS", "0", 1);
}

Test(cuda_host, variants_chosen) {
  ks_ctx *ctx = make_ctx(KS_DTYPE_F32, "linear_backward=simt");
  cr_expect(ks_cuda_variant_of(ctx, "linear_forward") == KS_CUDA_linear_forward_cublaslt);
  cr_expect(ks_cuda_variant_of(ctx, "linear_backward") == KS_CUDA_linear_backward_simt);
  cr_expect(ks_cuda_variant_of(ctx, "attention_forward") == KS_CUDA_attention_forward_simt);
  destroy(ctx);
  setenv("KS_CUDA_NO_BLAS", "1", 1);
  ctx = make_ctx(KS_DTYPE_BF16, NULL);
  cr_expect(!ks_cuda_has_blas(ctx) &&
            ks_cuda_variant_of(ctx, "linear_forward") == KS_CUDA_linear_forward_mma);
  cr_expect(strstr(ks_ctx_device_name(ctx), ", no cuBLASLt)") != NULL, "%s", ks_ctx_device_name(ctx));
  cr_expect(ks_cuda_matmul(ctx, &(ks_cuda_matmul_params){0}) == KS_EENV);
  destroy(ctx);
  setenv("KS_CUDA_NO_BLAS", "0", 1);
}

Test(cuda_host, devices) {
  ks_ctx *ctx = NULL;
  ks_shim_set_capability(7, 0);
  cr_expect(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cuda"}) == KS_EENV &&
                strstr(ks_error_message(), "7.5"),
            "%s", ks_error_message());
  cr_expect(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "auto"}) == KS_OK &&
            strcmp(ks_ctx_backend_name(ctx), "cpu") == 0);
  ks_ctx_destroy(ctx);
  ks_shim_set_capability(9, 0);
  ctx = make_ctx(KS_DTYPE_BF16, NULL);
  cr_expect(strcmp(ks_ctx_isa_name(ctx), "sm_90") == 0 && strstr(ks_ctx_device_name(ctx), "sm_90") &&
                strstr(ks_ctx_device_name(ctx), "SMs") && strstr(ks_ctx_device_name(ctx), ", cuBLASLt 1"),
            "%s", ks_ctx_device_name(ctx));
  cr_expect(ks_ctx_act_dtype(ctx) == KS_DTYPE_BF16 && ks_ctx_act_size(ctx) == 2);
  destroy(ctx);
  cr_expect(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cuda", .isa = "avx2"}) == KS_EENV &&
            strstr(ks_error_message(), "avx2"));
}

Test(cuda_host, machine_code_and_devices) {
  static const struct {
    const char *archs;
    int capability;
    bool serves;
  } cases[] = {{"", 80, true},
               {"80-real", 80, true},
               {"80-real", 86, true},
               {"86-real", 80, false},
               {"80-real", 90, false},
               {"75-real 80-real 89-real", 89, true},
               {"80-real", 87, false},
               {"87-real", 87, true},
               {"87-real", 89, false},
               {"100-real", 103, true},
               {"100-real", 101, false},
               {"100-real", 110, false},
               {"110-real", 110, true},
               {"90-real 110", 121, true},
               {"80-virtual", 87, true},
               {"75-real 87", 90, true},
               {"75-real 87-virtual", 86, false}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    cr_expect(ks_cuda_archs_serve(cases[i].archs, cases[i].capability) == cases[i].serves, "%s on %d",
              cases[i].archs, cases[i].capability);
}
