/* Internal: Hugging Face's tokenizer.json with a BPE model. Facts of the format and of the algorithms from
 * huggingface/tokenizers: added_vocabulary.rs, normalizers/, pre_tokenizers/, models/bpe/, decoders/.
 *
 * Encoding: added tokens are cut out; what lies between is normalized, cut into words by the pre-tokenizers,
 * and each word's characters (byte-level: bytes) are merged. Decoding: tokens pass through the decoders and
 * are joined. */
#ifndef KS_TOK_JSON_H
#define KS_TOK_JSON_H

#include "core/model/tok_pattern.h"

#include <jansson.h>

typedef struct {
  char *bytes;
  size_t n;
} ks_string;

/* ---------------------------------------------------------------- parts */

typedef enum { KS_NORM_UNICODE, KS_NORM_PREPEND, KS_NORM_REPLACE, KS_NORM_STRIP } ks_norm_kind;
typedef struct {
  ks_norm_kind kind;
  int options;         /* UNICODE: utf8proc's */
  ks_pattern *pattern; /* REPLACE */
  ks_string text;      /* PREPEND, REPLACE */
  bool left, right;    /* STRIP */
} ks_norm_step;

typedef enum { KS_PRE_SPLIT, KS_PRE_BLANK, KS_PRE_METASPACE } ks_pre_kind;
typedef enum {
  KS_SPLIT_ISOLATED,
  KS_SPLIT_REMOVED,
  KS_SPLIT_CONTIGUOUS,
  KS_SPLIT_WITH_PREVIOUS,
  KS_SPLIT_WITH_NEXT
} ks_split_behavior;
typedef enum { KS_PREPEND_ALWAYS, KS_PREPEND_FIRST, KS_PREPEND_NEVER } ks_prepend_scheme;
typedef struct {
  ks_pre_kind kind;
  ks_pattern *pattern;        /* SPLIT */
  ks_split_behavior behavior; /* SPLIT */
  bool invert;                /* SPLIT: what matches is the word */
  ks_string marker;           /* METASPACE */
  ks_prepend_scheme scheme;   /* METASPACE */
} ks_pre_step;

typedef enum {
  KS_DECODE_BYTE_LEVEL,
  KS_DECODE_REPLACE,
  KS_DECODE_BYTE_FALLBACK,
  KS_DECODE_FUSE,
  KS_DECODE_STRIP,
  KS_DECODE_METASPACE
} ks_decode_kind;
typedef struct {
  ks_decode_kind kind;
  ks_pattern *pattern;      /* REPLACE */
  ks_string text;           /* REPLACE: content; STRIP, METASPACE: a character */
  size_t start, stop;       /* STRIP: most to take at either end */
  ks_prepend_scheme scheme; /* METASPACE */
} ks_decode_step;

typedef struct {
  int32_t id;
  ks_string content;
  ks_string normalized_content; /* normalized: what is looked for */
  bool single_word, lstrip, rstrip, normalized, special;
} ks_added_token;

/* Pairs of ids that merge. */
typedef struct {
  uint64_t key; /* (left << 32 | right) + 1; 0: empty */
  uint32_t rank;
  int32_t id;
} ks_pair;

typedef struct {
  ks_tokenizer base;
  char *arena;    /* the tokens' bytes */
  ks_vocab vocab; /* by id: the token as it stands in the file */
  ks_vocab
      keys; /* indexed: what is looked up. Byte-level: the bytes that a token stands for, else the token */
  ks_pair *pairs;
  uint32_t pairs_mask;
  int32_t unk;
  bool byte_level, byte_fallback, fuse_unk, ignore_merges;
  int32_t byte_ids[256]; /* byte fallback: of "<0xAB>"; -1: none */
  ks_norm_step *norms;
  size_t n_norms;
  ks_pre_step *pres;
  size_t n_pres;
  ks_decode_step *decodes;
  size_t n_decodes;
  bool has_decoder; /* false: tokens are joined by blanks */
  ks_added_token *added;
  size_t n_added;
  ks_trie raw, normalized; /* contents to indices of `added`; looked for before and after normalizing */
  bool has_raw, has_normalized;
  int64_t model_vocab_size; /* 0: unknown */
} ks_json_tokenizer;

/* ---------------------------------------------------------------- reading (tok_json_parts.c) */

/* A string of JSON, copied. */
ks_status ks_json_string(const json_t *v, const char *what, ks_string *out);
/* fallback: when the key is missing or null. */
ks_status ks_json_bool(const json_t *object, const char *key, bool fallback, bool *out);
/* "type" of a part; KS_EDATA when there is none. */
ks_status ks_json_type(const json_t *part, const char *what, const char **type);
ks_status ks_json_read_normalizer(ks_json_tokenizer *t, const json_t *part);
ks_status ks_json_read_pre_tokenizer(ks_json_tokenizer *t, const json_t *part);
ks_status ks_json_read_decoder(ks_json_tokenizer *t, const json_t *part);
void ks_json_free_parts(ks_json_tokenizer *t);

/* ---------------------------------------------------------------- working */

/* The byte that a character stands for in a byte-level vocabulary (GPT-2); -1: none. */
int ks_byte_level_byte(uint32_t cp);

/* Replaces *text by its normal form. */
ks_status ks_json_normalize(const ks_json_tokenizer *t, ks_text *text);
ks_status ks_json_encode(const ks_tokenizer *t, const char *text, size_t n, ks_ids *out);
ks_status ks_json_decode(const ks_tokenizer *t, const int32_t *ids, size_t n, ks_text *out);
/* Pair of ids to rank and id. */
const ks_pair *ks_json_find_pair(const ks_json_tokenizer *t, int32_t left, int32_t right);

#endif
