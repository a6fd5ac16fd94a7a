/* Internal to core/model's tokenizers: vocabulary, trie, merging, growing arrays, and the table of functions
 * of a kind. */
#ifndef KS_TOK_H
#define KS_TOK_H

#include "core/model/tokenizer.h"

#define KS_SPACE_SYMBOL "\xe2\x96\x81" /* U+2581, how SentencePiece writes a blank */
#define KS_REPLACEMENT  "\xef\xbf\xbd" /* U+FFFD */

/* ---------------------------------------------------------------- kinds */

/* The ids that an encoding appends to: the caller's array. */
typedef struct {
  int32_t **ids;
  size_t *n, *cap;
} ks_ids;
ks_status ks_ids_add(ks_ids *out, int32_t id);

typedef struct {
  /* text: valid UTF-8, n < 2^31. */
  ks_status (*encode)(const ks_tokenizer *t, const char *text, size_t n, ks_ids *out);
  /* Every id is >= 0; ids past the vocabulary give nothing. */
  ks_status (*decode)(const ks_tokenizer *t, const int32_t *ids, size_t n, ks_text *out);
  void (*destroy)(ks_tokenizer *t);
} ks_tok_kind;

/* The head of every kind's own struct. */
struct ks_tokenizer {
  const ks_tok_kind *kind;
  int64_t vocab_size;
  int32_t bos, eos;
  char sha256[65];
};

/* Each takes over `file` (n bytes and a NUL) when it returns KS_OK, and then owns it. vocab_size: the
 * model's, or 0. */
ks_status ks_tok_load_llama2c(const char *path, char *file, size_t n, int64_t vocab_size, ks_tokenizer **out);
ks_status ks_tok_load_sentencepiece(const char *path, char *file, size_t n, int64_t vocab_size,
                                    ks_tokenizer **out);
ks_status ks_tok_load_json(const char *path, char *file, size_t n, int64_t vocab_size, ks_tokenizer **out);
/* The check that the file's n_ids fit the model's vocab_size (0: anything). */
ks_status ks_tok_check_size(const char *path, int64_t n_ids, int64_t vocab_size);

/* ---------------------------------------------------------------- vocabulary */

typedef enum {
  KS_PIECE_NORMAL = 1,
  KS_PIECE_UNKNOWN,
  KS_PIECE_CONTROL,
  KS_PIECE_USER,
  KS_PIECE_UNUSED,
  KS_PIECE_BYTE
} ks_piece_kind;
typedef struct {
  const char *bytes; /* not NUL-terminated; NULL: an id without a token */
  uint32_t n;
  float score;
  uint8_t kind; /* ks_piece_kind */
  uint8_t byte; /* KS_PIECE_BYTE */
} ks_piece;

/* Pieces by id, and ids by bytes for the pieces that were put into the index. */
typedef struct {
  ks_piece *pieces;
  int32_t n_pieces;
  uint32_t *slots; /* id + 1; 0: empty */
  uint32_t mask;
  uint32_t max_n; /* of the indexed pieces' bytes */
} ks_vocab;
/* n_pieces zeroed pieces to be filled, and an empty index. ks_vocab_free also after a failure. */
ks_status ks_vocab_init(ks_vocab *v, int32_t n_pieces);
void ks_vocab_free(ks_vocab *v); /* not the pieces' bytes */
/* false when these bytes are in the index already. */
bool ks_vocab_index(ks_vocab *v, int32_t id);
/* -1: not in the index. */
int32_t ks_vocab_find(const ks_vocab *v, const char *bytes, size_t n);
/* The value of "<0xAB>", or -1. */
int ks_piece_byte(const char *bytes, size_t n);
/* True when no indexed piece has the blank's marker behind another character: then no merge crosses the
 * border between such two, and words may be merged one by one. */
bool ks_vocab_has_words(const ks_vocab *v, const char *marker);
/* Length of the first word of text: up to a marker behind another character. */
size_t ks_tok_word(const char *text, size_t n, const char *marker);

/* ---------------------------------------------------------------- trie */

/* Byte strings with a value each. Edges in one hash table. */
typedef struct {
  uint64_t *keys; /* node << 8 | byte, plus 1; 0: empty */
  uint32_t *next;
  uint32_t mask, n_edges;
  int32_t *values; /* by node; -1: none ends here */
  uint32_t n_nodes;
} ks_trie;
/* Room for strings of n_bytes in total. */
ks_status ks_trie_init(ks_trie *t, size_t n_bytes);
void ks_trie_free(ks_trie *t);
void ks_trie_add(ks_trie *t, const char *bytes, size_t n, int32_t value);
/* The node below `node` (0: the root) along `byte`, or 0 when there is none. */
uint32_t ks_trie_step(const ks_trie *t, uint32_t node, unsigned char byte);
/* Length of the longest string of the trie that `s` begins with, 0: none; *value: its value. */
size_t ks_trie_longest(const ks_trie *t, const char *s, size_t n, int32_t *value);

/* ---------------------------------------------------------------- byte-pair merging */

/* Symbols of a text, a doubly linked list in an array. */
typedef struct {
  uint32_t begin, n;  /* bytes of the text; n = 0: merged into its left neighbour */
  int32_t id;         /* -1: not in the vocabulary */
  int32_t prev, next; /* -1: none */
  bool frozen;        /* takes part in no merge */
} ks_symbol;

/* True when left and right (neighbours) may merge: the rank (lower first) and the new id. */
typedef bool (*ks_merge_rule)(const void *self, const char *text, const ks_symbol *left,
                              const ks_symbol *right, uint32_t *rank, int32_t *id);
typedef struct {
  uint64_t key; /* rank << 32 | index of the left symbol */
  int32_t id;
  uint32_t n; /* bytes of the merged symbol */
} ks_merge;
/* Scratch of one encoding; zero-initialise. */
typedef struct {
  ks_symbol *symbols;
  int32_t n_symbols, cap_symbols;
  ks_merge *heap;
  size_t n_heap, cap_heap;
  /* How a waiting merge is known to be outdated. false: its two symbols have another length now
   * (SentencePiece, llama2.c). true: the pair that stands there now gives another id (Hugging Face's
   * tokenizers: a merge may then run at the rank of another pair that makes the same token). */
  bool compare_ids;
} ks_merger;
void ks_merger_free(ks_merger *m);
ks_status ks_merger_add(ks_merger *m, uint32_t begin, uint32_t n, int32_t id, bool frozen);
/* Merges, always the pair of lowest rank, of these the leftmost, until no pair is left. Runs in n log n. */
ks_status ks_merger_run(ks_merger *m, const char *text, ks_merge_rule rule, const void *self);
/* rank for a rule whose highest score comes first */
uint32_t ks_merge_rank_of_score(float score);

/* ---------------------------------------------------------------- decoding */

/* Appends bytes; every byte that does not belong to a valid character gives U+FFFD. */
ks_status ks_tok_add_bytes(ks_text *out, const char *bytes, size_t n);

#endif
