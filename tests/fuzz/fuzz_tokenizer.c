/* Any tokenizer file: load, encode, decode. */
#include "core/model/tokenizer.h"
#include "tests/fuzz/fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
  static const char probe[] =
      "The harbour's 12 boats <s> \n\n  \xc3\xa9\xe6\x97\xa5 <|endoftext|> mask</s>\t1,000 ab->the";
  ks_tokenizer *t;
  if (ks_tokenizer_load(fuzz_file(bytes, n), 0, &t) != KS_OK) return 0;
  int32_t *ids = NULL;
  size_t n_ids = 0, cap = 0;
  ks_text text = {0};
  if (ks_tokenizer_encode(t, probe, sizeof probe - 1, true, &ids, &n_ids, &cap) == KS_OK &&
      ks_tokenizer_decode(t, ids, n_ids, &text) == KS_OK &&
      ks_utf8_check(text.data ? text.data : "", text.len) != text.len)
    abort();
  ks_text_free(&text);
  free(ids);
  ks_tokenizer_destroy(t);
  return 0;
}
