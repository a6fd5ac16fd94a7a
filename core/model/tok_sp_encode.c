#include "core/model/tok_sentencepiece.h"

ks_status ks_sp_emit(const ks_sp_tokenizer *self, const char *bytes, size_t n, int32_t id,
                     bool *after_unknown, ks_ids *out) {
  bool unknown = id == self->unk;
  if (!unknown) {
    KS_TRY(ks_ids_add(out, id));
  } else if (self->byte_fallback) {
    for (size_t i = 0; i < n; i++)
      KS_TRY(ks_ids_add(out, self->byte_ids[(unsigned char)bytes[i]]));
  } else if (!*after_unknown) { /* unknown neighbours are one token */
    KS_TRY(ks_ids_add(out, id));
  }
  *after_unknown = unknown;
  return KS_OK;
}

/* ---------------------------------------------------------------- BPE */

typedef struct {
  const ks_sp_tokenizer *self;
  ks_merger merger;
  uint32_t *splits; /* by id, for unused pieces: length of the left part it was last offered from; NULL: there
                       are none */
  bool after_unknown;
} bpe;

static bool merge_rule(const void *state, const char *text, const ks_symbol *left, const ks_symbol *right,
                       uint32_t *rank, int32_t *id) {
  const bpe *b = state;
  const ks_vocab *v = &b->self->vocab;
  *id = ks_vocab_find(v, text + left->begin, left->n + right->n);
  if (*id < 0) return false;
  *rank = ks_merge_rank_of_score(v->pieces[*id].score);
  if (v->pieces[*id].kind == KS_PIECE_UNUSED) b->splits[*id] = left->n;
  return true;
}

/* An unused piece serves merging only: it is taken apart again. */
static ks_status bpe_emit(bpe *b, const char *bytes, uint32_t n, int32_t id, ks_ids *out) {
  if (id < 0) id = b->self->unk;
  uint32_t left = b->self->vocab.pieces[id].kind == KS_PIECE_UNUSED ? b->splits[id] : 0;
  if (left == 0 || left >= n) return ks_sp_emit(b->self, bytes, n, id, &b->after_unknown, out);
  const ks_vocab *v = &b->self->vocab;
  KS_TRY(bpe_emit(b, bytes, left, ks_vocab_find(v, bytes, left), out));
  return bpe_emit(b, bytes + left, n - left, ks_vocab_find(v, bytes + left, n - left), out);
}

static ks_status bpe_word(bpe *b, const char *text, size_t n, ks_ids *out) {
  const ks_sp_tokenizer *self = b->self;
  ks_merger *m = &b->merger;
  m->n_symbols = 0;
  for (size_t i = 0; i < n;) {
    int32_t id = -1;
    uint32_t cp;
    size_t len = self->normalizer.user ? ks_trie_longest(&self->user, text + i, n - i, &id) : 0;
    bool frozen = len > 0;
    if (!frozen) {
      len = (size_t)ks_utf8_decode(text + i, n - i, &cp);
      id = ks_vocab_find(&self->vocab, text + i, len);
    }
    KS_TRY(ks_merger_add(m, (uint32_t)i, (uint32_t)len, id, frozen));
    i += len;
  }
  KS_TRY(ks_merger_run(m, text, merge_rule, b));
  for (int32_t i = 0; i >= 0 && i < m->n_symbols; i = m->symbols[i].next)
    KS_TRY(bpe_emit(b, text + m->symbols[i].begin, m->symbols[i].n, m->symbols[i].id, out));
  return KS_OK;
}

ks_status ks_sp_encode_bpe(const ks_sp_tokenizer *self, const char *text, size_t n, ks_ids *out) {
  bpe b = {.self = self};
  ks_status status = KS_OK;
  if (self->has_unused)
    KS_TRY_OUT(
        ks_alloc_array(&b.splits, (size_t)self->vocab.n_pieces, sizeof *b.splits, "tokenizer: splits"));
  for (size_t i = 0, len; i < n; i += len) {
    len = self->has_words ? ks_tok_word(text + i, n - i, KS_SPACE_SYMBOL) : n;
    KS_TRY_OUT(bpe_word(&b, text + i, len, out));
  }
out:
  free(b.splits);
  ks_merger_free(&b.merger);
  return status;
}

/* ---------------------------------------------------------------- unigram */

/* The best way to cut the text up to a byte. */
typedef struct {
  float score;
  int32_t begin; /* of the last piece; -1: nothing ends here yet */
  int32_t id;
} best_end;

/* Sums are float32, as in the original (0.2.3): ties fall the same way. */
static void improve(best_end *end, float score, size_t begin, int32_t id) {
  if (end->begin >= 0 && !(score > end->score)) return;
  *end = (best_end){score, (int32_t)begin, id};
}

static void unigram_step(const ks_sp_tokenizer *self, const char *text, size_t n, size_t begin,
                         best_end *ends) {
  const float unknown_score = self->min_score - 10.0f;
  float so_far = ends[begin].score;
  uint32_t node = 0, cp;
  size_t len = (size_t)ks_utf8_decode(text + begin, n - begin, &cp);
  bool has_character = false;
  for (size_t at = begin; at < n;) {
    node = ks_trie_step(&self->pieces, node, (unsigned char)text[at++]);
    if (node == 0) break;
    int32_t id = self->pieces.values[node];
    if (id < 0 || self->vocab.pieces[id].kind == KS_PIECE_UNUSED) continue;
    const ks_piece *p = &self->vocab.pieces[id];
    float score = p->kind == KS_PIECE_USER ? 0.1f * (float)(at - begin) - 0.1f : p->score;
    improve(&ends[at], score + so_far, begin, id);
    has_character |= at - begin == len;
  }
  if (!has_character) improve(&ends[begin + len], unknown_score + so_far, begin, self->unk);
}

ks_status ks_sp_encode_unigram(const ks_sp_tokenizer *self, const char *text, size_t n, ks_ids *out) {
  best_end *ends = NULL;
  KS_TRY(ks_alloc_array(&ends, n + 1, sizeof *ends, "tokenizer: best cuts"));
  for (size_t i = 1; i <= n; i++)
    ends[i].begin = -1;
  uint32_t cp;
  for (size_t i = 0; i < n; i += (size_t)ks_utf8_decode(text + i, n - i, &cp))
    unigram_step(self, text, n, i, ends);
  /* The path runs backwards; turned round, `begin` is where the following piece ends. */
  int32_t next = -1;
  for (int32_t at = (int32_t)n; at > 0;) {
    int32_t begin = ends[at].begin;
    ends[at].begin = next;
    next = at;
    at = begin;
  }
  ks_status status = KS_OK;
  bool after_unknown = false;
  for (int32_t begin = 0; next > 0 && status == KS_OK; next = ends[begin].begin) {
    status = ks_sp_emit(self, text + begin, (size_t)(next - begin), ends[next].id, &after_unknown, out);
    begin = next;
  }
  free(ends);
  return status;
}
