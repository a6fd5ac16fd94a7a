/* Text to token ids and back: SentencePiece .model (BPE and unigram, byte fallback), llama2.c tokenizer .bin,
 * Hugging Face tokenizer.json (BPE, byte-level or with byte fallback). Results equal the original libraries'
 * (fixtures). */
#ifndef KS_TOKENIZER_H
#define KS_TOKENIZER_H

#include "core/base/base.h"

typedef struct ks_tokenizer ks_tokenizer;

/* path: a file, or a folder that holds tokenizer.json or tokenizer.model (the first when it holds both, as
 * transformers reads it). vocab_size: the model's; a llama2.c file, which does not store its size, must have
 * exactly so many pieces, the others at most. 0: take the file's. Errors: KS_EDATA with path, byte offset,
 * what is wrong; KS_EUNSUPPORTED names the kind of part that is not supported. */
ks_status ks_tokenizer_load(const char *path, int64_t vocab_size, ks_tokenizer **out);
void ks_tokenizer_destroy(ks_tokenizer *t); /* NULL-safe */
int64_t ks_tokenizer_vocab_size(const ks_tokenizer *t);
int32_t ks_tokenizer_bos(const ks_tokenizer *t);        /* -1: none */
int32_t ks_tokenizer_eos(const ks_tokenizer *t);        /* -1: none */
const char *ks_tokenizer_sha256(const ks_tokenizer *t); /* of the file */

/* Appends the ids of text (n bytes) to a growing array: *ids, *n_ids, *cap; start from NULL, 0, 0; free() it.
 * Control tokens written out in the text ("</s>") are ordinary text for SentencePiece and llama2.c;
 * tokenizer.json's added tokens are recognised. No bos, no eos, except what add_bos asks (nothing when the
 * tokenizer has no bos). Text that is not UTF-8: KS_EDATA with the offset. After a failure the array holds
 * what it held before. */
ks_status ks_tokenizer_encode(const ks_tokenizer *t, const char *text, size_t n, bool add_bos, int32_t **ids,
                              size_t *n_ids, size_t *cap);
/* Appends the text of ids to out. Control tokens give nothing; the first word's marker blank is dropped at
 * the start of the text (as SentencePiece does). Byte tokens are joined; bytes that do not form UTF-8 become
 * U+FFFD. An id past the vocabulary gives nothing (a model's vocabulary may be padded); a negative one is
 * KS_EINVAL. */
ks_status ks_tokenizer_decode(const ks_tokenizer *t, const int32_t *ids, size_t n_ids, ks_text *out);

#endif
