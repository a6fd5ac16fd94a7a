/* Internal: one safetensors file (huggingface/safetensors): uint64 length of the header, the header in JSON,
 * the data. Every offset, length and shape is checked at opening. */
#ifndef KS_SAFETENSORS_H
#define KS_SAFETENSORS_H

#include "core/model/checkpoint.h"

enum { KS_ST_MAX_RANK = 8 };

typedef struct {
  const char *name; /* lives as long as the file is open */
  char dtype[12];   /* "F32", "BF16", ... */
  int rank;
  int64_t shape[KS_ST_MAX_RANK];
  size_t begin, end; /* bytes of data */
} ks_st_tensor;

typedef struct {
  char *path;
  ks_file_map map;
  ks_bytes data;
  ks_st_tensor *tensors; /* by rising name */
  size_t n_tensors;
  void *json; /* holds the names */
} ks_safetensors;

/* ks_safetensors_close also after a failure. */
ks_status ks_safetensors_open(const char *path, ks_safetensors *st);
void ks_safetensors_close(ks_safetensors *st);
/* NULL: there is none of this name. */
const ks_st_tensor *ks_safetensors_find(const ks_safetensors *st, const char *name);
/* A tensor of F32, F16 or BF16 and the given shape (n_in 0: a vector [n_out]). KS_EDATA, KS_EUNSUPPORTED. */
ks_status ks_safetensors_view(const ks_safetensors *st, const ks_st_tensor *t, int64_t n_out, int64_t n_in,
                              ks_tensor *out);

#endif
