/* Reads what tests/fixtures/make_llama_fixtures.py wrote. */
#ifndef KS_LLAMA_FIXTURE_H
#define KS_LLAMA_FIXTURE_H

#include "kernels/ops.h"
#include <stdint.h>

enum { KS_FIXTURE_ARRAYS = 32 };
typedef struct {
  char name[32];
  double *values;
  int64_t n;
} ks_fixture_array;
typedef struct {
  char folder[512];
  ks_fixture_array arrays[KS_FIXTURE_ARRAYS];
  int n_arrays;
} ks_fixture;

/* The folders under tests/fixtures/llama/; NULL-terminated. */
extern const char *const ks_llama_cases[];
/* One unit in the last place of 1, in the type of a run: what an error may be beside twice PyTorch's own. */
double ks_fixture_ulp(ks_dtype dtype);
/* Aborts when the fixture cannot be read: it is part of the tree. */
void ks_fixture_load(ks_fixture *f, const char *source_dir, const char *case_name);
void ks_fixture_free(ks_fixture *f);
/* All values as doubles; aborts when there is no such array. */
const ks_fixture_array *ks_fixture_get(const ks_fixture *f, const char *name);
int32_t *ks_fixture_ints(const ks_fixture *f, const char *name); /* free() it */
float *ks_fixture_floats(const ks_fixture *f, const char *name); /* free() it */

#endif
