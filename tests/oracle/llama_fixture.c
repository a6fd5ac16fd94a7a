#include "tests/oracle/llama_fixture.h"
#include "kernels/base/status.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const ks_llama_cases[] = {"llama_head100", "llama_scaled", "qwen2", "qwen3", NULL};

static double value_at(const char *type, const unsigned char *bytes, int64_t i) {
  if (strcmp(type, "f64") == 0) {
    double v;
    memcpy(&v, bytes + 8 * i, sizeof v);
    return v;
  }
  if (strcmp(type, "f32") == 0) {
    float v;
    memcpy(&v, bytes + 4 * i, sizeof v);
    return (double)v;
  }
  int32_t v;
  memcpy(&v, bytes + 4 * i, sizeof v);
  return v;
}

static unsigned char *read_all(const char *path, long *n) {
  FILE *f = fopen(path, "rb");
  KS_ASSERT(f != NULL);
  KS_ASSERT_EQ(fseek(f, 0, SEEK_END), 0);
  *n = ftell(f);
  rewind(f);
  unsigned char *bytes = malloc((size_t)*n + 1);
  KS_ASSERT(bytes != NULL);
  KS_ASSERT_EQ(fread(bytes, 1, (size_t)*n, f), *n);
  bytes[*n] = 0;
  fclose(f);
  return bytes;
}

void ks_fixture_load(ks_fixture *f, const char *source_dir, const char *case_name) {
  char path[640], type[8];
  long n_index, n_bytes, offset;
  memset(f, 0, sizeof *f);
  snprintf(f->folder, sizeof f->folder, "%s/tests/fixtures/llama/%s", source_dir, case_name);
  snprintf(path, sizeof path, "%s/reference.txt", f->folder);
  char *index = (char *)read_all(path, &n_index), *rest = NULL;
  snprintf(path, sizeof path, "%s/reference.bin", f->folder);
  unsigned char *bytes = read_all(path, &n_bytes);
  for (char *line = strtok_r(index, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    KS_ASSERT(f->n_arrays < KS_FIXTURE_ARRAYS);
    ks_fixture_array *a = &f->arrays[f->n_arrays++];
    long n;
    KS_ASSERT_EQ(sscanf(line, "%31s %7s %ld %ld", a->name, type, &n, &offset), 4);
    KS_ASSERT(offset + n * (strcmp(type, "f64") == 0 ? 8 : 4) <= n_bytes);
    a->n = n;
    a->values = malloc((size_t)n * sizeof *a->values + 1);
    KS_ASSERT(a->values != NULL);
    for (long i = 0; i < n; i++)
      a->values[i] = value_at(type, bytes + offset, i);
  }
  free(index);
  free(bytes);
}

void ks_fixture_free(ks_fixture *f) {
  for (int i = 0; i < f->n_arrays; i++)
    free(f->arrays[i].values);
}

const ks_fixture_array *ks_fixture_get(const ks_fixture *f, const char *name) {
  for (int i = 0; i < f->n_arrays; i++) {
    if (strcmp(f->arrays[i].name, name) == 0) return &f->arrays[i];
  }
  KS_ASSERT(!"an array of this name");
  return NULL;
}

int32_t *ks_fixture_ints(const ks_fixture *f, const char *name) {
  const ks_fixture_array *a = ks_fixture_get(f, name);
  int32_t *out = malloc((size_t)a->n * sizeof *out + 1);
  KS_ASSERT(out != NULL);
  for (int64_t i = 0; i < a->n; i++)
    out[i] = (int32_t)a->values[i];
  return out;
}

float *ks_fixture_floats(const ks_fixture *f, const char *name) {
  const ks_fixture_array *a = ks_fixture_get(f, name);
  float *out = malloc((size_t)a->n * sizeof *out + 1);
  KS_ASSERT(out != NULL);
  for (int64_t i = 0; i < a->n; i++)
    out[i] = (float)a->values[i];
  return out;
}

double ks_fixture_ulp(ks_dtype dtype) {
  return dtype == KS_DTYPE_BF16 ? 0x1p-7 : 0x1p-23;
}
