#include "kernels/backend.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>

/* AddressSanitizer ends the program at requests no machine can meet, unless told to refuse them. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
  return "allocator_may_return_null=1";
}

Test(ctx, auto_picks_what_is_there) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, NULL) == KS_OK, "%s", ks_error_message());
  cr_assert(ks_ctx_n_threads(ctx) >= 1);
  cr_assert(strstr(ks_ctx_device_name(ctx), ks_ctx_isa_name(ctx)) != NULL);
  cr_assert(ks_mem_used(ctx) == 0 && ks_mem_peak(ctx) == 0);
  ks_ctx_destroy(ctx);
  ks_ctx_destroy(NULL);
}

Test(ctx, threads_and_names) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 3}) == KS_OK);
  cr_assert(ks_ctx_n_threads(ctx) == 3 && strcmp(ks_ctx_backend_name(ctx), "cpu") == 0);
  cr_assert(strstr(ks_ctx_device_name(ctx), "3 threads") != NULL);
  ks_ctx_destroy(ctx);
}

Test(ctx, refusals_say_why) {
  ks_ctx *ctx = NULL;
  const struct {
    ks_ctx_params params;
    ks_status status;
    const char *says;
  } cases[] = {
      {{.backend = "cuda"}, KS_EENV, "CUDA"},
      {{.backend = "abacus"}, KS_EENV, "abacus"},
      {{.backend = "cpu", .isa = "altivec"}, KS_EENV, "altivec"},
      {{.backend = "cpu", .n_threads = -1}, KS_EINVAL, "n_threads"},
      {{.backend = "cpu", .n_threads = 1 << 20}, KS_EINVAL, "n_threads"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    if (strcmp(cases[i].params.backend, "cuda") == 0 && ks_backends[1]) continue; /* a build that has it */
    cr_assert(ks_ctx_create(&ctx, &cases[i].params) == cases[i].status && ctx == NULL, "case %d", (int)i);
    cr_assert(strstr(ks_error_message(), cases[i].says) != NULL, "%s", ks_error_message());
  }
  cr_assert(ks_ctx_create(NULL, NULL) == KS_EINVAL);
}

Test(ctx, every_instruction_set_has_every_operation) {
  int found = 0;
  for (int s = 0; ks_test_isas[s]; s++) {
    ks_ctx *ctx = ks_test_ctx(ks_test_isas[s], 1);
    if (!ctx) continue;
    found++;
    cr_assert(strcmp(ks_ctx_isa_name(ctx), ks_test_isas[s]) == 0);
#define X(name, what) cr_assert(ctx->backend->name != NULL, "%s lacks " #name, ks_test_isas[s]);
    KS_OPS_MAP(X)
#undef X
    ks_ctx_destroy(ctx);
  }
  cr_assert(found >= 1);
}

Test(ctx, memory) {
  ks_ctx *ctx = NULL;
  void *p[100], *big = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}) == KS_OK);
  for (int i = 0; i < 100; i++) {
    cr_assert(ks_mem_alloc(ctx, (size_t)i * 10, &p[i]) == KS_OK && p[i] != NULL && (uintptr_t)p[i] % 64 == 0);
    for (int k = 0; k < i * 10; k++)
      cr_assert(((char *)p[i])[k] == 0);
  }
  cr_assert(ks_mem_used(ctx) == 49500);
  for (int i = 99; i >= 0; i -= 2)
    ks_mem_free(ctx, p[i]);
  cr_assert(ks_mem_used(ctx) == 49500 - 25000 && ks_mem_peak(ctx) == 49500);
  for (int i = 0; i < 100; i += 2)
    ks_mem_free(ctx, p[i]);
  ks_mem_free(ctx, NULL);
  cr_assert(ks_mem_used(ctx) == 0);
  cr_assert(ks_mem_alloc(ctx, (size_t)10 << 20, &big) == KS_OK && (uintptr_t)big % 64 == 0);
  unsigned char in[5] = {1, 2, 3, 4, 5}, out[5] = {0};
  cr_assert(ks_mem_upload(ctx, big, in, 5) == KS_OK && ks_mem_copy(ctx, (char *)big + 64, big, 5) == KS_OK);
  cr_assert(ks_mem_zero(ctx, big, 2) == KS_OK && ks_mem_download(ctx, out, (char *)big + 64, 5) == KS_OK);
  cr_assert(memcmp(in, out, 5) == 0 && ((char *)big)[1] == 0 && ((char *)big)[2] == 3);
  cr_assert(ks_mem_upload(ctx, NULL, in, 5) == KS_EINVAL && ks_mem_download(ctx, out, NULL, 5) == KS_EINVAL);
  cr_assert(ks_mem_zero(ctx, NULL, 0) == KS_OK && ks_mem_copy(ctx, NULL, NULL, 0) == KS_OK);
  ks_mem_free(ctx, big);
  cr_assert(ks_mem_alloc(ctx, SIZE_MAX - 10, &big) != KS_OK && big == NULL && ks_mem_used(ctx) == 0);
  cr_assert(ks_mem_alloc(ctx, (size_t)1 << 60, &big) == KS_ENOMEM && big == NULL);
  cr_assert(ks_mem_alloc(NULL, 1, &big) == KS_EINVAL && ks_mem_alloc(ctx, 1, NULL) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}

Test(ctx, element_types) {
  ks_dtype t = KS_DTYPE_F32;
  cr_assert(ks_dtype_size(KS_DTYPE_F32) == 4 && ks_dtype_size(KS_DTYPE_BF16) == 2 &&
            ks_dtype_size(KS_DTYPE_F16) == 2);
  cr_assert(ks_dtype_size((ks_dtype)7) == 0 && strcmp(ks_dtype_name((ks_dtype)7), "?") == 0);
  for (int i = 0; i < 3; i++)
    cr_assert(ks_dtype_parse(ks_dtype_name((ks_dtype)i), &t) == KS_OK && t == (ks_dtype)i);
  cr_assert(ks_dtype_parse("f64", &t) == KS_EINVAL && ks_dtype_parse(NULL, &t) == KS_EINVAL);
  cr_assert(ks_dtype_parse("f32", NULL) == KS_EINVAL);
}
