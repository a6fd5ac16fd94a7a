/* Any safetensors file: open it and read every tensor of a type that is read. */
#include "core/model/safetensors.h"
#include "tests/fuzz/fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
  ks_safetensors st;
  if (ks_safetensors_open(fuzz_file(bytes, n), &st) == KS_OK)
    for (size_t i = 0; i < st.n_tensors; i++) {
      const ks_st_tensor *t = &st.tensors[i];
      ks_tensor view;
      if (ks_safetensors_find(&st, t->name) != t) abort();
      if (t->rank != 2 || ks_safetensors_view(&st, t, t->shape[0], t->shape[1], &view) != KS_OK) continue;
      float *values = malloc((size_t)(view.n_out * view.n_in) * sizeof *values);
      ks_tensor_read_f32(&view, values);
      free(values);
    }
  ks_safetensors_close(&st);
  return 0;
}
