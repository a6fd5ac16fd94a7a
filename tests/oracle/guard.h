/* What every test of an operation needs: contexts of each instruction set, guarded backend arrays, inputs,
 * and comparison with the computed tolerance.
 *
 *   for (int i = 0; ks_test_isas[i]; i++) {
 *     ks_ctx *ctx = ks_test_ctx(ks_test_isas[i], 2);      // NULL: this machine lacks it (says so once)
 *     if (!ctx) continue;
 *     ks_guard x = ks_guard_make(ctx, host_x, n), y = ks_guard_make(ctx, NULL, n);   // y: all NaN
 *     ...
 *     bad += ks_guard_check_input("x", &x);               // same bits as made, walls whole
 *     bad += ks_guard_check_output("case 3: y", &y, ref, size, n, chain);
 *     ks_guard_free(&x), ks_guard_free(&y);
 *   }
 */
#ifndef KS_TEST_GUARD_H
#define KS_TEST_GUARD_H

#include "kernels/ops.h"
#include <stdbool.h>
#include <stdint.h>

/* NULL-terminated names of every CPU instruction set. */
extern const char *const ks_test_isas[];
/* Those whose results agree bit for bit: all with fma. */
bool ks_test_isa_has_fma(const char *isa);
ks_ctx *ks_test_ctx(const char *isa, int n_threads);

/* n floats of backend memory between two walls of 4 KiB. */
typedef struct {
  ks_ctx *ctx;
  unsigned char *base;
  float *p;
  int64_t n;
  float *made; /* host copy of what was put there */
} ks_guard;
/* values NULL: NaN. */
ks_guard ks_guard_make(ks_ctx *ctx, const float *values, int64_t n);
void ks_guard_free(ks_guard *g);
/* Host copy of the present content; free() it. */
float *ks_guard_read(const ks_guard *g);
/* Numbers of errors, each said on stderr (the first few). */
int64_t ks_guard_check_walls(const char *what, const ks_guard *g);
int64_t ks_guard_check_input(const char *what, const ks_guard *g);
/* Walls, and every element i within ks_tolerance(ref[i], size[i], chain); size NULL: |ref|. */
int64_t ks_guard_check_output(const char *what, const ks_guard *g, const double *ref, const double *size,
                              double chain);

/* u_out |ref| + (4 + sqrt(chain)) u_acc size, both u = 2^-24 (float32), and float32's own spacing at 0.
 * size: sum of the absolute values of what was added up to give ref; chain: the longest row of additions. */
double ks_tolerance(double ref, double size, double chain);
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
/* On every instruction set of this machine with one and with three threads; the results must be the same bits
 * for any number of threads and, but for "generic", for any instruction set. Returns the number of errors. */
int64_t ks_test_everywhere(const char *what, int64_t number, const void *test_case, ks_test_run run);

#endif
