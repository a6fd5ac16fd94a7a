/* What every test of an operation needs: contexts of each place that it runs in, guarded backend arrays, inputs,
 * and comparison with the computed tolerance.
 *
 *   static int64_t run(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out) {
 *     ks_act_round(ctx, host_x, n);                       // what a bf16 backend will see
 *     ks_guard x = ks_guard_make_act(ctx, host_x, n), y = ks_guard_make_act(ctx, NULL, n);   // y: all NaN
 *     ks_guard w = ks_guard_make(ctx, host_w, n_w);       // float32 whatever the activations
 *     ... the operation on x.p, y.p, w.p ...; ks_sync(ctx) before looking at late outputs
 *     bad += ks_guard_check_input("x", &x);               // same bits as made, walls whole
 *     bad += ks_guard_check_output("case 3: y", &y, ref, size, chain);
 *     ks_guard_free(&x), ks_guard_free(&y);
 *   }
 *   bad += ks_test_everywhere("rmsnorm", i, &cases[i], run);
 *
 * Backend memory is not host memory: only ks_guard_* and ks_mem_* reach it.
 *
 * Places. With KS_TEST_BACKEND unset or "cpu": every instruction set of this machine, with one and with three threads.
 * With KS_TEST_BACKEND=cuda: "cuda-f32", "cuda-bf16", and these with every variant of the operations whose name begins with what
 * the test is called; each three times, on the shim with the threads of a block in three different orders.
 */
#ifndef KS_TEST_GUARD_H
#define KS_TEST_GUARD_H

#include "kernels/ops.h"
#include <stdbool.h>
#include <stdint.h>

/* NULL-terminated names of the places, without variants: instruction sets, or "cuda-f32", "cuda-bf16". */
const char *const *ks_test_places(void);
/* A context there; NULL: this machine lacks it (says so once). n_threads is for the CPU. */
ks_ctx *ks_test_ctx(const char *place, int n_threads);
/* A context of the first place with float32 activations that there is; for tests that need only one. Never NULL. */
ks_ctx *ks_test_any_ctx(void);
bool ks_test_is_cuda(void); /* KS_TEST_BACKEND=cuda */
bool ks_test_is_shim(void); /* and it is the shim, which is slow: leave out large cases */

/* Rounds in place to the type of ctx's activations. */
void ks_act_round(const ks_ctx *ctx, float *x, int64_t n);
/* Unit roundoff of activations stored by ctx: 2^-24 or 2^-8. */
double ks_act_roundoff(const ks_ctx *ctx);

/* n elements of backend memory between two walls: of 4 KiB, on the shim those of AddressSanitizer. */
typedef struct {
  ks_ctx *ctx;
  unsigned char *base;
  void *p;
  int64_t n;
  ks_dtype dtype; /* F32, BF16 or I8 */
  void *made;     /* host copy of what was put there */
} ks_guard;
/* float32. values NULL: NaN. */
ks_guard ks_guard_make(ks_ctx *ctx, const float *values, int64_t n);
/* Of activations: values are rounded to their type. */
ks_guard ks_guard_make_act(ks_ctx *ctx, const float *values, int64_t n);
/* Of any of the three types (I8: values are whole numbers; NULL: -128). */
ks_guard ks_guard_make_as(ks_ctx *ctx, ks_dtype dtype, const float *values, int64_t n);
void ks_guard_free(ks_guard *g);
/* Host copy of the present content as floats; free() it. */
float *ks_guard_read(const ks_guard *g);
/* The n-th element's address, for arguments. */
void *ks_guard_at(const ks_guard *g, int64_t i);
/* Numbers of errors, each said on stderr (the first few). */
int64_t ks_guard_check_walls(const char *what, const ks_guard *g);
int64_t ks_guard_check_input(const char *what, const ks_guard *g);
/* Walls, and every element i within ks_tolerance(ref[i], size[i], chain); size NULL: |ref|. */
int64_t ks_guard_check_output(const char *what, const ks_guard *g, const double *ref, const double *size,
                              double chain);
/* The same for a chain with n_roundings results in between that are stored as activations (the rank-r intermediate of LoRA, the
 * probabilities of attention): where these are bf16 each may be off by 2^-8 of its size. */
int64_t ks_guard_check_rounded(const char *what, const ks_guard *g, const double *ref, const double *size,
                               double chain, int n_roundings);

/* u_out |ref| + (4 + sqrt(chain)) u_acc size, both u = 2^-24 (float32), and float32's own spacing at 0.
 * size: sum of the absolute values of what was added up to give ref; chain: the longest row of additions. */
double ks_tolerance(double ref, double size, double chain);
/* The same for an output stored with roundoff u_out, with `between` = n_roundings * ks_act_roundoff. */
double ks_tolerance_rounded(double ref, double size, double chain, double u_out, double between);
/* |got - ref| <= tolerance; a NaN or infinite ref wants the same. */
bool ks_close(double got, double ref, double size, double chain);
int64_t ks_check_close(const char *what, const float *got, const double *ref, const double *size, int64_t n,
                       double chain);
/* Bit for bit; any NaN equals any NaN. */
int64_t ks_check_same(const char *what, const float *a, const float *b, int64_t n);

typedef enum {
  KS_FILL_SIGNED,   /* uniform in [-1, 1) */
  KS_FILL_POSITIVE, /* uniform in [0, 1) */
  KS_FILL_NEAR_ONE, /* 1 +- 1e-3 */
  KS_FILL_INTEGER,  /* -3 .. 3: sums are exact */
  KS_FILL_LARGE,    /* +- 1e4 */
  KS_FILL_KINDS
} ks_fill_kind;
void ks_fill(float *x, int64_t n, ks_fill_kind kind, uint64_t seed);
/* New arrays; free() them. At least one element, so never NULL. */
float *ks_floats(int64_t n, ks_fill_kind kind, uint64_t seed);
double *ks_doubles(const float *x, int64_t n); /* x NULL: zeros */

/* Results of one run of a case, to be compared with other runs. */
typedef struct {
  float *floats;
  int64_t n_floats;
  unsigned char *bytes;
  int64_t n_bytes;
} ks_results;
void ks_results_add(ks_results *r, const float *x, int64_t n);
void ks_results_add_guard(ks_results *r, const ks_guard *g);
void ks_results_add_bytes(ks_results *r, const void *x, int64_t n); /* doubles, indices: no NaN */
void ks_results_free(ks_results *r);
int64_t ks_results_check_same(const char *what, const ks_results *a, const ks_results *b);

/* Runs one case and returns how many errors it saw. */
typedef int64_t (*ks_test_run)(ks_ctx *ctx, const void *test_case, const char *name, ks_results *out);
/* In every place (see above); the results must be the same bits for any number of threads or order of them and, on the CPU but for
 * "generic", for any instruction set. Returns the number of errors. */
int64_t ks_test_everywhere(const char *what, int64_t number, const void *test_case, ks_test_run run);

#endif
