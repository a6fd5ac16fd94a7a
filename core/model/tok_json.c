#include "core/model/tok.h"
ks_status ks_tok_load_json(const char *path, char *file, size_t n, int64_t vocab_size, ks_tokenizer **out) {
  (void)file;
  (void)n;
  (void)vocab_size;
  (void)out;
  return KS_FAIL(KS_EUNSUPPORTED, "%s: json", path);
}
