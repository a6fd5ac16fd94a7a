#include "kernels/backend.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>

/* AddressSanitizer ends the program at requests no machine can meet, unless told to refuse them. Weak: the
 * shim has its own. */
const char *__asan_default_options(void);
__attribute__((weak)) const char *__asan_default_options(void) {
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

Test(ctx, every_place_has_every_operation) {
  int found = 0;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    found++;
    if (!ks_test_is_cuda()) cr_assert(strcmp(ks_ctx_isa_name(ctx), *place) == 0);
#define X(name, what) cr_assert(ctx->backend->name != NULL, "%s lacks " #name, *place);
    KS_OPS_MAP(X)
#undef X
    ks_ctx_destroy(ctx);
  }
  cr_assert(found >= 1);
}

Test(ctx, types_of_activations) {
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_ctx *ctx = ks_test_ctx(*place, 1);
    if (!ctx) continue;
    const bool bf16 = strcmp(*place, "cuda-bf16") == 0;
    char x[8];
    cr_assert(ks_ctx_act_dtype(ctx) == (bf16 ? KS_DTYPE_BF16 : KS_DTYPE_F32));
    cr_assert(ks_ctx_act_size(ctx) == (bf16 ? 2 : 4) && ks_act_at(ctx, x, 1) == x + (bf16 ? 2 : 4));
    cr_assert(ks_act_at(ctx, NULL, 3) == NULL);
    ks_ctx_destroy(ctx);
  }
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .activations = KS_DTYPE_BF16}) == KS_OK);
  cr_assert(ks_ctx_act_dtype(ctx) == KS_DTYPE_F32); /* the CPU has no choice */
  ks_ctx_destroy(ctx);
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.activations = KS_DTYPE_F16}) == KS_EINVAL);
}

static bool all_zero(ks_ctx *ctx, const void *p, size_t n) {
  unsigned char host[1000];
  bool zero = n <= sizeof host && ks_mem_download(ctx, host, p, n) == KS_OK;
  for (size_t i = 0; i < n; i++)
    zero &= host[i] == 0;
  return zero;
}

Test(ctx, memory) {
  ks_ctx *ctx = ks_test_any_ctx();
  void *p[100], *big = NULL;
  for (int i = 0; i < 100; i++) {
    cr_assert(ks_mem_alloc(ctx, (size_t)i * 10, &p[i]) == KS_OK && p[i] != NULL && (uintptr_t)p[i] % 64 == 0);
    cr_assert(all_zero(ctx, p[i], (size_t)i * 10));
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
  const unsigned char in[5] = {1, 2, 3, 4, 5};
  unsigned char out[5] = {0}, first[4];
  cr_assert(ks_mem_upload(ctx, big, in, 5) == KS_OK && ks_mem_copy(ctx, (char *)big + 64, big, 5) == KS_OK);
  cr_assert(ks_mem_zero(ctx, big, 2) == KS_OK && ks_mem_download(ctx, out, (char *)big + 64, 5) == KS_OK);
  cr_assert(ks_mem_download(ctx, first, big, 4) == KS_OK);
  cr_assert(memcmp(in, out, 5) == 0 && first[1] == 0 && first[2] == 3);
  cr_assert(ks_mem_upload(ctx, NULL, in, 5) == KS_EINVAL && ks_mem_download(ctx, out, NULL, 5) == KS_EINVAL);
  cr_assert(ks_mem_zero(ctx, NULL, 0) == KS_OK && ks_mem_copy(ctx, NULL, NULL, 0) == KS_OK);
  ks_mem_free(ctx, big);
  cr_assert(ks_mem_alloc(ctx, SIZE_MAX - 10, &big) != KS_OK && big == NULL && ks_mem_used(ctx) == 0);
  cr_assert(ks_mem_alloc(ctx, (size_t)1 << 60, &big) == KS_ENOMEM && big == NULL);
  cr_assert(ks_mem_alloc(NULL, 1, &big) == KS_EINVAL && ks_mem_alloc(ctx, 1, NULL) == KS_EINVAL);
  ks_ctx_destroy(ctx);
}

/* What the host describes anew in each step: positions, indices, learning rate and step, samplers. */
enum { STEPS = 5, ROWS = 6, COLS = 16, N_P = 40 };
typedef struct {
  ks_guard x, y, p, m, v, grad, logits;
} step_arrays;

static step_arrays new_arrays(ks_ctx *ctx) {
  float *x = ks_floats(ROWS * COLS, KS_FILL_SIGNED, 1), *p = ks_floats(N_P, KS_FILL_SIGNED, 2);
  const float zero[N_P] = {0};
  const step_arrays a = {ks_guard_make_act(ctx, x, ROWS * COLS),
                         ks_guard_make_act(ctx, NULL, ROWS * COLS),
                         ks_guard_make(ctx, p, N_P),
                         ks_guard_make(ctx, zero, N_P),
                         ks_guard_make(ctx, zero, N_P),
                         ks_guard_make(ctx, zero, N_P),
                         ks_guard_make(ctx, x, ROWS * COLS)};
  free(x), free(p);
  return a;
}

static void one_step(ks_ctx *ctx, const step_arrays *a, int step, bool recorded, ks_results *out) {
  static const double inv_freq[COLS / 4] = {1, 0.3, 0.1, 0.03};
  int32_t positions[ROWS], tokens[ROWS];
  int64_t index[ROWS];
  ks_sampler samplers[ROWS];
  double norm = NAN;
  float *grad = ks_floats(N_P, KS_FILL_SIGNED, (uint64_t)step + 10);
  for (int i = 0; i < ROWS; i++) {
    positions[i] = 3 * i + step;
    index[i] = (i + step) % ROWS;
    samplers[i] = (ks_sampler){1, 0, 0.9f, 5, (uint64_t)(step * ROWS + i)};
  }
  const ks_adamw_job job = {a->p.p, a->m.p, a->v.p, a->grad.p, N_P, 0.1 / (step + 1),
                            0.9,    0.99,   1e-8,   0.1,       1,   step + 1};
  cr_assert(ks_mem_upload(ctx, a->grad.p, grad, N_P * sizeof *grad) == KS_OK);
  if (recorded) cr_assert(ks_step_begin(ctx, 77) == KS_OK);
  cr_assert(ks_rope(ctx, &(ks_rope_args){a->x.p, positions, inv_freq, ROWS, 2, COLS / 2, false}) == KS_OK);
  cr_assert(ks_rows_gather(ctx, &(ks_rows_args){a->x.p, a->y.p, index, ROWS, ROWS, COLS}) == KS_OK);
  cr_assert(ks_adamw(ctx, &(ks_adamw_args){&job, 1, &norm}) == KS_OK);
  cr_assert(ks_sample(ctx, &(ks_sample_args){a->logits.p, ROWS, COLS, samplers, tokens, NULL}) == KS_OK);
  if (recorded) cr_assert(ks_step_end(ctx) == KS_OK);
  memset(positions, 0xff, sizeof positions); /* the host's arrays are its own again; late outputs are not */
  memset(index, 0xff, sizeof index);
  memset(samplers, 0xff, sizeof samplers);
  cr_assert(ks_sync(ctx) == KS_OK, "%s", ks_error_message());
  ks_results_add_bytes(out, tokens, sizeof tokens);
  ks_results_add_bytes(out, &norm, sizeof norm);
  ks_results_add_guard(out, &a->y);
  ks_results_add_guard(out, &a->p);
  free(grad);
}

/* Steps with the same key bring the same bits as the operations alone. */
Test(ctx, recorded_steps_change_nothing) {
  int64_t bad = 0;
  for (const char *const *place = ks_test_places(); *place; place++) {
    ks_results results[2] = {{0}, {0}};
    for (int recorded = 0; recorded < 2; recorded++) {
      ks_ctx *ctx = ks_test_ctx(*place, 1);
      if (!ctx) continue;
      step_arrays a = new_arrays(ctx);
      for (int step = 0; step < STEPS; step++)
        one_step(ctx, &a, step, recorded, &results[recorded]);
      ks_guard *guards[] = {&a.x, &a.y, &a.p, &a.m, &a.v, &a.grad, &a.logits};
      for (int i = 0; i < 7; i++) {
        bad += ks_guard_check_walls(*place, guards[i]);
        ks_guard_free(guards[i]);
      }
      ks_ctx_destroy(ctx);
    }
    bad += ks_results_check_same(*place, &results[1], &results[0]);
    ks_results_free(&results[0]), ks_results_free(&results[1]);
  }
  cr_assert(bad == 0);
}

Test(ctx, element_types) {
  static const size_t sizes[7] = {
      [KS_DTYPE_F32] = 4, [KS_DTYPE_BF16] = 2, [KS_DTYPE_F16] = 2, [KS_DTYPE_I8] = 1}; /* the others are
                                                                                          blocks */
  ks_dtype t = KS_DTYPE_F32;
  for (int i = 0; i < 7; i++) {
    cr_assert(ks_dtype_size((ks_dtype)i) == sizes[i] &&
              ks_dtype_is_quantized((ks_dtype)i) == (sizes[i] == 0));
    cr_assert(ks_dtype_parse(ks_dtype_name((ks_dtype)i), &t) == KS_OK && t == (ks_dtype)i);
  }
  cr_assert(ks_dtype_size((ks_dtype)7) == 0 && strcmp(ks_dtype_name((ks_dtype)7), "?") == 0);
  cr_assert(ks_dtype_parse("f64", &t) == KS_EINVAL && ks_dtype_parse(NULL, &t) == KS_EINVAL);
  cr_assert(ks_dtype_parse("f32", NULL) == KS_EINVAL);
}
