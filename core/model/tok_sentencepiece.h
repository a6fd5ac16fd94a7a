/* Internal: what a SentencePiece model file says, and its parts. Facts of the format and of the algorithms
 * from google/sentencepiece: sentencepiece_model.proto, normalizer.cc, bpe_model.cc, unigram_model.cc,
 * sentencepiece_processor.cc. */
#ifndef KS_TOK_SENTENCEPIECE_H
#define KS_TOK_SENTENCEPIECE_H

#include "core/model/tok.h"

typedef struct {
  const char *bytes;
  size_t n;
} ks_span;

/* Rewriting of the text before it is cut. */
typedef struct {
  ks_span charsmap_trie;    /* double array of 32-bit units */
  ks_span charsmap_strings; /* the replacements, each ending in a NUL */
  bool add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces, whitespace_as_suffix;
  const ks_trie *user; /* user-defined symbols are kept as they are; NULL: there are none */
} ks_sp_normalizer;
/* blob: the file's precompiled_charsmap. KS_EDATA says what is wrong with it. */
ks_status ks_sp_normalizer_set_charsmap(ks_sp_normalizer *z, ks_span blob);
ks_status ks_sp_normalize(const ks_sp_normalizer *z, const char *text, size_t n, ks_text *out);

typedef enum { KS_SP_UNIGRAM = 1, KS_SP_BPE = 2, KS_SP_WORD = 3, KS_SP_CHAR = 4 } ks_sp_model;

typedef struct {
  ks_tokenizer base;
  char *file;
  ks_vocab vocab; /* indexed: normal, user-defined and unused pieces */
  ks_sp_model model;
  ks_sp_normalizer normalizer;
  ks_trie user;   /* user-defined pieces */
  ks_trie pieces; /* unigram: all indexed pieces */
  bool byte_fallback, has_unused, has_words;
  int32_t unk;
  int32_t byte_ids[256];
  float min_score; /* of normal pieces */
  ks_span unk_surface, bos_piece, eos_piece;
} ks_sp_tokenizer;

/* Fills everything from self->file. */
ks_status ks_sp_parse(ks_sp_tokenizer *self, const char *path, size_t n);
/* A piece of the normalized text, as the model cut it; id self->unk: unknown. *after_unknown: state, false at
 * first. */
ks_status ks_sp_emit(const ks_sp_tokenizer *self, const char *bytes, size_t n, int32_t id,
                     bool *after_unknown, ks_ids *out);
/* Each takes normalized text. */
ks_status ks_sp_encode_bpe(const ks_sp_tokenizer *self, const char *text, size_t n, ks_ids *out);
ks_status ks_sp_encode_unigram(const ks_sp_tokenizer *self, const char *text, size_t n, ks_ids *out);

#endif
