/* Mistakes of every kind are planted in a kernel, and seen: by the sanitizers, by the shim, or in the
 * results. */
#include "ks_shim.h"
#include "planted.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 3 * PLANTED_BLOCK };

static const char *const names[] = {
#define X(name) #name,
    PLANTED_MAP(X)
#undef X
};

/* As the test of an operation does it. */
static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
  const planted_bug bug = *(const planted_bug *)test_case;
  float *x = ks_floats(N, KS_FILL_SIGNED, 3);
  double *ref = ks_doubles(x, N), *size = ks_doubles(x, N);
  for (int i = 0; i < N; i++) {
    const int m = i / PLANTED_BLOCK * PLANTED_BLOCK + PLANTED_BLOCK - 1 - i % PLANTED_BLOCK;
    ref[i] = (double)x[m] - 2 * (double)x[m ^ 1];
    size[i] = fabs((double)x[m]) + 2 * fabs((double)x[m ^ 1]);
  }
  ks_guard gx = ks_guard_make(ctx, x, N), gy = ks_guard_make(ctx, NULL, N);
  int64_t bad = planted_run(ctx, bug, gx.p, gy.p, N) != KS_OK || ks_sync(ctx) != KS_OK;
  if (!bad) {
    bad += ks_guard_check_input(name, &gx) + ks_guard_check_output(name, &gy, ref, size, 2);
    ks_results_add_guard(out, &gy);
  }
  ks_guard_free(&gx), ks_guard_free(&gy);
  free(x), free(ref), free(size);
  return bad;
}

/* Runs a function in a process of its own; returns how it ended and what it wrote to stderr. */
static int in_child(void (*f)(const void *), const void *arg, char *said, size_t cap) {
  int fd[2], status = 0;
  size_t n = 0;
  ssize_t got;
  fflush(NULL);
  cr_assert(pipe(fd) == 0);
  const pid_t child = fork();
  cr_assert(child >= 0);
  if (child == 0) {
    dup2(fd[1], 2);
    close(fd[0]), close(fd[1]);
    f(arg);
    _exit(0);
  }
  close(fd[1]);
  while (n + 1 < cap && (got = read(fd[0], said + n, cap - 1 - n)) > 0)
    n += (size_t)got;
  said[n] = 0;
  close(fd[0]);
  cr_assert(waitpid(child, &status, 0) == child);
  return status;
}

static ks_ctx *cuda_ctx(void) {
  ks_ctx *ctx = NULL;
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cuda"}) == KS_OK, "%s", ks_error_message());
  return ctx;
}

Test(planted, nothing) {
  const planted_bug bug = PLANTED_NOTHING;
  cr_assert(ks_test_everywhere("planted", 0, &bug, run) == 0);
}

/* ---------------------------------------------------------------- by the sanitizers */

static void run_once(const void *bug) {
  ks_ctx *ctx = cuda_ctx();
  ks_results out = {0};
  run(ctx, bug, "planted", &out);
}

Test(planted, sanitizers_see) {
  static const struct {
    planted_bug bug;
    const char *wants[3];
  } cases[] = {{PLANTED_WRITE_PAST_GLOBAL, {"heap-buffer-overflow", "WRITE of size 4", "planted.cu"}},
               {PLANTED_READ_PAST_GLOBAL, {"heap-buffer-overflow", "READ of size 4", "planted.cu"}},
               {PLANTED_READ_BEFORE_GLOBAL, {"heap-buffer-overflow", "READ of size 4", "planted.cu"}},
               {PLANTED_COPY_PAST_GLOBAL, {"heap-buffer-overflow", "READ of size 4", "planted.cu"}},
               {PLANTED_WRITE_PAST_SHARED, {"heap-buffer-overflow", "WRITE of size 4", "ks_shim_smem"}},
               {PLANTED_READ_PAST_SHARED, {"heap-buffer-overflow", "READ of size 4", "ks_shim_smem"}},
               {PLANTED_SHARED_OF_ANOTHER_BLOCK, {"heap-use-after-free", "READ of size 4", "planted.cu"}},
               {PLANTED_MISALIGNED_VECTOR, {"planted.cu", "misaligned address", "16 byte alignment"}},
               {PLANTED_ENDLESS_RECURSION, {"stack-overflow", "planted", ""}}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    static char said[1 << 16];
    const int status = in_child(run_once, &cases[i].bug, said, sizeof said);
    cr_expect(!(WIFEXITED(status) && WEXITSTATUS(status) == 0), "%s was not seen", names[cases[i].bug]);
    for (int w = 0; w < 3; w++)
      cr_expect(strstr(said, cases[i].wants[w]), "%s: no '%s' in: %s", names[cases[i].bug], cases[i].wants[w],
                said);
  }
}

static void touch_device_memory(const void *what) {
  ks_ctx *ctx = cuda_ctx();
  void *p;
  cr_assert(ks_mem_alloc(ctx, 64, &p) == KS_OK && ks_sync(ctx) == KS_OK);
  volatile float *f = p;
  if (*(const int *)what == 0) fprintf(stderr, "read %g", (double)f[3]);
  if (*(const int *)what == 1) f[3] = 1;
  if (*(const int *)what == 2) memset(p, 0, 64);
}

Test(planted, the_host_does_not_touch_device_memory) {
  for (int what = 0; what < 3; what++) {
    static char said[1 << 16];
    const int status = in_child(touch_device_memory, &what, said, sizeof said);
    cr_expect(!(WIFEXITED(status) && WEXITSTATUS(status) == 0), "%d was not seen", what);
    cr_expect(strstr(said, "use-after-poison"), "%d: %s", what, said);
  }
}

/* ---------------------------------------------------------------- by the shim */

Test(planted, the_launch_fails) {
  static const struct {
    planted_bug bug;
    const char *wants[4];
  } cases[] = {
      {PLANTED_BARRIER_IN_A_BRANCH,
       {"all lanes of the warp", "threads 0 2 4 6 8 ",
        " 28 30 wait at __syncthreads, planted.cu:", "block (0, 0, 0)"}},
      {PLANTED_OTHER_BARRIER_IN_A_BRANCH,
       {"different barriers", "threads 0-31 wait at __syncthreads, planted.cu:",
        "threads 32-63 wait at __syncthreads_or, planted.cu:", "planted_kernel"}},
      {PLANTED_COLLECTIVE_IN_A_BRANCH,
       {"all lanes of the warp", "threads 0-15 wait at __syncwarp, planted.cu:", "threads 16-31 done",
        "planted_kernel"}},
      {PLANTED_OTHER_COLLECTIVE_IN_A_BRANCH,
       {"all lanes of the warp",
        "threads 0-15 wait at __syncwarp, planted.cu:", "threads 16-31 wait at __any_sync, planted.cu:", ""}},
      {PLANTED_RETURN_BEFORE_COLLECTIVE,
       {"all lanes of the warp", "threads 32-39 41-63 wait at __syncwarp", "threads 40 done",
        "block (0, 0, 0)"}},
      {PLANTED_PARTIAL_MASK, {"mask 0x0000ffff", "thread (0, 0, 0)", "", ""}},
      {PLANTED_MISALIGNED_COPY, {"cp.async", "not a multiple of 16", "", ""}},
      {PLANTED_MORE_SHARED_THAN_LAUNCHED,
       {"first 3 arrays of shared memory take 528 bytes, the launch gives 512", "", "", ""}},
      {PLANTED_SHARED_OF_UNEQUAL_SIZE,
       {"array 0 of shared memory has 260 bytes for this thread and 256", "thread (63, 0, 0)", "", ""}},
      {PLANTED_HOST_POINTER, {"argument 0 of the kernel points to host memory", "planted", "", ""}}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_shim_clear();
    ks_shim_set_order(0);
    ks_ctx *ctx = cuda_ctx();
    ks_results out = {0};
    cr_expect(run(ctx, &cases[i].bug, "planted", &out) > 0, "%s was not seen", names[cases[i].bug]);
    for (int w = 0; w < 4; w++)
      cr_expect(strstr(ks_shim_report(), cases[i].wants[w]), "%s: no '%s' in: %s", names[cases[i].bug],
                cases[i].wants[w], ks_shim_report());
    ks_results_free(&out);
    ks_ctx_destroy(ctx);
  }
}

/* After a failed launch nothing runs, and after ks_shim_clear all is well again. */
Test(planted, the_shim_recovers) {
  for (int i = 0; i < 3; i++) {
    const planted_bug bugs[] = {PLANTED_COLLECTIVE_IN_A_BRANCH, PLANTED_NOTHING};
    for (int b = 0; b < 2; b++) {
      ks_ctx *ctx = cuda_ctx();
      ks_results out = {0};
      cr_assert((run(ctx, &bugs[b], "planted", &out) > 0) == (b == 0));
      ks_results_free(&out);
      ks_ctx_destroy(ctx);
      ks_shim_clear();
    }
  }
}

/* ---------------------------------------------------------------- in the results */

Test(planted, results_differ) {
  for (planted_bug bug = PLANTED_NO_BLOCK_BARRIER; bug < PLANTED_N; bug++)
    cr_expect(ks_test_everywhere("planted", (int64_t)bug, &bug, run) > 0, "%s was not seen", names[bug]);
}
