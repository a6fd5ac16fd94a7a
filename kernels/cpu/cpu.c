#include "kernels/cpu/cpu.h"
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/utsname.h>

/* ---------------------------------------------------------------- instruction sets */

typedef struct {
  const char *name;
  bool (*supported)(void);
  const ks_backend *table;
} isa;

#if defined(__x86_64__)
static bool has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if KS_HAS_ISA_avx512 || KS_HAS_ISA_avx512bf16
static bool has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if KS_HAS_ISA_avx512bf16
static bool has_avx512bf16(void) {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
static bool always(void) {
  return true;
}

extern const ks_backend ks_cpu_avx512bf16, ks_cpu_avx512, ks_cpu_avx2, ks_cpu_neon, ks_cpu_generic;
/* Best first. */
static const isa isas[] = {
#if KS_HAS_ISA_avx512bf16
    {"avx512bf16", has_avx512bf16, &ks_cpu_avx512bf16},
#endif
#if KS_HAS_ISA_avx512
    {"avx512", has_avx512, &ks_cpu_avx512},
#endif
#if KS_HAS_ISA_avx2
    {"avx2", has_avx2, &ks_cpu_avx2},
#endif
#if KS_HAS_ISA_neon
    {"neon", always, &ks_cpu_neon},
#endif
#if KS_HAS_ISA_generic
    {"generic", always, &ks_cpu_generic},
#endif
};
enum { N_ISAS = sizeof isas / sizeof isas[0] };

static ks_status choose_isa(const char *wanted, const isa **out) {
  bool any = !wanted || strcmp(wanted, "auto") == 0;
  for (int i = 0; i < N_ISAS; i++) {
    if (!any && strcmp(wanted, isas[i].name) != 0) continue;
    if (isas[i].supported()) {
      *out = &isas[i];
      return KS_OK;
    }
    if (!any)
      return KS_FAIL(KS_EENV, "cpu: this processor does not have instruction set '%s'; use \"auto\"", wanted);
  }
  return KS_FAIL(KS_EENV, "cpu: this build has no instruction set '%s'; use \"auto\"", wanted);
}

/* ---------------------------------------------------------------- context */

/* CPUs that a control group (version 2) grants, rounded up; 0: no limit. */
static int cgroup_cpus(void) {
  FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
  if (!f) return 0;
  double quota = 0, period = 0;
  int n = fscanf(f, "%lf %lf", &quota, &period); /* "max 100000" matches no number */
  fclose(f);
  if (n != 2 || !(quota > 0) || !(period > 0) || quota / period > 4096) return 0;
  return (int)(quota / period + 0.999);
}

static int default_threads(void) {
  int n = omp_get_max_threads(); /* OMP_NUM_THREADS, else the cores of the affinity mask */
  int limit = cgroup_cpus();
  if (limit > 0 && limit < n) n = limit;
  return n > 0 ? n : 1;
}

static void describe_device(ks_ctx *ctx) {
  char model[160] = "", line[256];
  FILE *f = fopen("/proc/cpuinfo", "r");
  while (f && !model[0] && fgets(line, sizeof line, f)) {
    char *colon = strchr(line, ':');
    if (!colon || strncmp(line, "model name", 10) != 0) continue;
    colon += strspn(colon, ": \t");
    snprintf(model, sizeof model, "%.*s", (int)strcspn(colon, "\n"), colon);
  }
  if (f) fclose(f);
  struct utsname u;
  if (!model[0]) snprintf(model, sizeof model, "%.64s processor", uname(&u) == 0 ? u.machine : "unknown");
  snprintf(ctx->device_name, sizeof ctx->device_name, "%s (%d thread%s, %s)", model, ctx->n_threads,
           ctx->n_threads == 1 ? "" : "s", ctx->isa_name);
}

ks_status ks_cpu_probe(void) {
  return KS_OK;
}

ks_status ks_cpu_ctx_init(ks_ctx *ctx, const ks_ctx_params *params) {
  const isa *chosen = NULL;
  ks_cpu *cpu = NULL;
  KS_TRY(choose_isa(params->isa, &chosen));
  KS_TRY(ks_alloc_array(&cpu, 1, sizeof *cpu, "cpu context"));
  ctx->impl = cpu;
  ctx->backend = chosen->table;
  ctx->isa_name = chosen->name;
  ctx->n_threads = params->n_threads > 0 ? params->n_threads : default_threads();
  describe_device(ctx);
  return KS_OK;
}

void ks_cpu_ctx_exit(ks_ctx *ctx) {
  ks_cpu *cpu = ctx->impl;
  if (!cpu) return;
  free(cpu->scratch);
  for (int i = 0; i < KS_CPU_N_SHARED; i++)
    free(cpu->shared[i]);
  free(cpu);
  ctx->impl = NULL;
}

/* Contents need not survive growth. */
static ks_status grow(ks_ctx *ctx, void **p, size_t *held, size_t bytes) {
  void *grown = NULL;
  KS_TRY(ks_cpu_alloc(bytes, "cpu workspace", &grown));
  ks_mem_account(ctx, bytes, *held);
  free(*p);
  *p = grown;
  *held = bytes;
  return KS_OK;
}

ks_status ks_cpu_scratch_reserve(ks_ctx *ctx, size_t bytes_per_thread) {
  ks_cpu *cpu = ctx->impl;
  if (bytes_per_thread <= cpu->scratch_bytes) return KS_OK;
  size_t rounded, total, held = cpu->scratch_bytes * (size_t)ctx->n_threads;
  if (!ks_add_size(bytes_per_thread, 4095, &rounded) ||
      !ks_mul_size(rounded &= ~(size_t)4095, (size_t)ctx->n_threads, &total))
    return KS_FAIL(KS_EOVERFLOW, "cpu: workspace of %zu bytes a thread is too large", bytes_per_thread);
  KS_TRY(grow(ctx, &cpu->scratch, &held, total));
  cpu->scratch_bytes = rounded;
  return KS_OK;
}

ks_status ks_cpu_shared_reserve(ks_ctx *ctx, ks_cpu_shared which, size_t bytes, void **out) {
  ks_cpu *cpu = ctx->impl;
  if (bytes > cpu->shared_bytes[which])
    KS_TRY(grow(ctx, &cpu->shared[which], &cpu->shared_bytes[which], bytes));
  *out = cpu->shared[which];
  return KS_OK;
}

/* ---------------------------------------------------------------- memory */

/* Weights are streamed: with 4 KiB pages a good part of the time goes into address translation. */
ks_status ks_cpu_alloc(size_t bytes, const char *what, void **out) {
  const size_t huge = (size_t)2 << 20;
  void *p = NULL;
  if (bytes < 2 * huge) return ks_alloc_array(out, bytes, 1, what);
  if (posix_memalign(&p, huge, bytes) != 0)
    return KS_FAIL(KS_ENOMEM, "%s: no memory for %zu bytes; use a smaller model or batch", what, bytes);
#ifdef MADV_HUGEPAGE
  madvise(p, bytes & ~(huge - 1), MADV_HUGEPAGE); /* a wish: without it all works as well */
#endif
  memset(p, 0, bytes);
  *out = p;
  return KS_OK;
}

ks_status ks_cpu_mem_alloc(ks_ctx *ctx, size_t bytes, void **out) {
  (void)ctx;
  return ks_cpu_alloc(bytes, "backend memory", out);
}

void ks_cpu_mem_free(ks_ctx *ctx, void *p) {
  (void)ctx;
  free(p);
}

ks_status ks_cpu_mem_copy_in(ks_ctx *ctx, void *dst, const void *src, size_t bytes) {
  (void)ctx;
  memmove(dst, src, bytes);
  return KS_OK;
}

ks_status ks_cpu_mem_zero(ks_ctx *ctx, void *p, size_t bytes) {
  (void)ctx;
  memset(p, 0, bytes);
  return KS_OK;
}

const ks_backend ks_backend_cpu = {.name = "cpu",
                                   .what = "portable C with vector instructions and OpenMP",
                                   .probe = ks_cpu_probe,
                                   .ctx_init = ks_cpu_ctx_init,
                                   .ctx_exit = ks_cpu_ctx_exit};
