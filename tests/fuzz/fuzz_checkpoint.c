/* Any llama2.c checkpoint: open it and read every tensor that it says it has. */
#include "core/model/checkpoint.h"
#include "tests/fuzz/fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
  ks_checkpoint c;
  if (ks_checkpoint_open(fuzz_file(bytes, n), &c) == KS_OK) {
    char hex[65];
    ks_checkpoint_hash(&c, hex);
    for (int64_t i = 0; i < c.config.n_layers; i++)
      for (int t = 0; t < KS_N_TARGETS; t++) {
        const ks_tensor *w = &c.layers[i].linear[t];
        void *copy = malloc(ks_tensor_bytes(w));
        ks_tensor_read_halves(w, t <= KS_TARGET_k ? c.config.head_dim : 2, copy);
        free(copy);
      }
  }
  ks_checkpoint_close(&c);
  return 0;
}
