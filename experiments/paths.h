/* Where the command line looks for models and tokenizers. */
#ifndef KS_PATHS_H
#define KS_PATHS_H

#include "core/base/base.h"

/* given, or the embedded base model when NULL; free() *out. */
ks_status ks_model_path_default(const char *given, char **out);
/* given; when NULL or empty: the model's folder itself when it is one, else the tokenizer beside the model's
 * file: tokenizer.bin, tokenizer.model, tokenizer.json, or the only tok*.bin, or the only tok*.model.
 * KS_ECONFIG when there is none. free() *out. */
ks_status ks_tokenizer_path_find(const char *given, const char *model_path, char **out);

#endif
