#include "core/model/tok_sentencepiece.h"

#include <float.h>

static void destroy(ks_tokenizer *t) {
  ks_sp_tokenizer *self = (ks_sp_tokenizer *)t;
  ks_vocab_free(&self->vocab);
  ks_trie_free(&self->user);
  ks_trie_free(&self->pieces);
  free(self->file);
  free(self);
}

static ks_status encode(const ks_tokenizer *t, const char *text, size_t n, ks_ids *out) {
  const ks_sp_tokenizer *self = (const ks_sp_tokenizer *)t;
  ks_text normalized = {0};
  ks_status status;
  KS_TRY_OUT(ks_sp_normalize(&self->normalizer, text, n, &normalized));
  if (normalized.len >= INT32_MAX) {
    status =
        KS_FAIL(KS_EOVERFLOW, "tokenizer: a text of %zu bytes after normalization; cut it", normalized.len);
    goto out;
  }
  if (normalized.len > 0)
    KS_TRY_OUT((self->model == KS_SP_BPE ? ks_sp_encode_bpe : ks_sp_encode_unigram)(self, normalized.data,
                                                                                    normalized.len, out));
out:
  ks_text_free(&normalized);
  return status;
}

/* ---------------------------------------------------------------- decode */

static ks_status add_piece(const ks_sp_tokenizer *self, const ks_piece *p, bool *at_start, size_t begin,
                           ks_text *out) {
  const size_t marker = strlen(KS_SPACE_SYMBOL);
  const char *bytes = p->bytes;
  size_t n = p->n;
  if (out->len > begin) *at_start = false;
  if (p->kind == KS_PIECE_CONTROL) return KS_OK;
  if (p->kind == KS_PIECE_UNKNOWN) return ks_text_add(out, self->unk_surface.bytes, self->unk_surface.n);
  const ks_sp_normalizer *z = &self->normalizer;
  if (*at_start && (z->add_dummy_prefix || z->remove_extra_whitespaces) && n >= marker &&
      memcmp(bytes, KS_SPACE_SYMBOL, marker) == 0) {
    bytes += marker;
    n -= marker;
    if (!z->remove_extra_whitespaces) *at_start = false;
  }
  while (n > 0) {
    size_t word = 0;
    while (word < n && (n - word < marker || memcmp(bytes + word, KS_SPACE_SYMBOL, marker) != 0))
      word++;
    KS_TRY(ks_text_add(out, bytes, word));
    bytes += word;
    n -= word;
    if (n == 0) break;
    KS_TRY(ks_text_add_str(out, " "));
    bytes += marker;
    n -= marker;
  }
  return KS_OK;
}

static ks_status flush_bytes(ks_text *bytes, ks_text *out) {
  if (bytes->len == 0) return KS_OK;
  KS_TRY(ks_tok_add_bytes(out, bytes->data, bytes->len));
  ks_text_clear(bytes);
  return KS_OK;
}

static ks_status decode(const ks_tokenizer *t, const int32_t *ids, size_t n, ks_text *out) {
  const ks_sp_tokenizer *self = (const ks_sp_tokenizer *)t;
  ks_text bytes = {0};
  ks_status status = KS_OK;
  bool at_start = true;
  size_t begin = out->len;
  for (size_t i = 0; i < n; i++) {
    if (ids[i] >= self->vocab.n_pieces) continue;
    const ks_piece *p = &self->vocab.pieces[ids[i]];
    if (p->kind == KS_PIECE_BYTE) {
      KS_TRY_OUT(ks_text_add(&bytes, (const char *)&p->byte, 1));
      continue;
    }
    KS_TRY_OUT(flush_bytes(&bytes, out));
    KS_TRY_OUT(add_piece(self, p, &at_start, begin, out));
  }
  KS_TRY_OUT(flush_bytes(&bytes, out));
out:
  ks_text_free(&bytes);
  return status;
}

static const ks_tok_kind kind = {encode, decode, destroy};

/* ---------------------------------------------------------------- load */

static int32_t find_control(const ks_sp_tokenizer *self, ks_span name) {
  for (int32_t i = 0; i < self->vocab.n_pieces; i++) {
    const ks_piece *p = &self->vocab.pieces[i];
    if (p->kind == KS_PIECE_CONTROL && p->n == name.n && memcmp(p->bytes, name.bytes, name.n) == 0) return i;
  }
  return -1;
}

/* What the original checks at load, too. */
static ks_status check_pieces(ks_sp_tokenizer *self, const char *path) {
  self->unk = -1;
  self->min_score = FLT_MAX;
  for (int i = 0; i < 256; i++)
    self->byte_ids[i] = -1;
  for (int32_t i = 0; i < self->vocab.n_pieces; i++) {
    ks_piece *p = &self->vocab.pieces[i];
    if (p->kind == KS_PIECE_UNKNOWN) {
      if (self->unk >= 0)
        return KS_FAIL(KS_EDATA, "%s: pieces %d and %d are both the unknown one", path, self->unk, i);
      self->unk = i;
    } else if (p->kind == KS_PIECE_BYTE) {
      int byte = ks_piece_byte(p->bytes, p->n);
      if (byte < 0 || self->byte_ids[byte] >= 0)
        return KS_FAIL(KS_EDATA, "%s: piece %d (\"%.*s\") is no byte piece, or its second", path, i,
                       (int)p->n, p->bytes);
      p->byte = (uint8_t)byte;
      self->byte_ids[byte] = i;
    } else if (p->kind != KS_PIECE_CONTROL && !ks_vocab_index(&self->vocab, i)) {
      return KS_FAIL(KS_EDATA, "%s: piece %d (\"%.*s\") occurs twice", path, i, (int)p->n, p->bytes);
    }
    if (p->kind == KS_PIECE_UNUSED) self->has_unused = true;
    if (p->kind != KS_PIECE_NORMAL) continue;
    if (p->score < self->min_score) self->min_score = p->score;
  }
  if (self->unk < 0) return KS_FAIL(KS_EDATA, "%s: has no unknown piece; the file is damaged", path);
  for (int i = 0; i < 256 && self->byte_fallback; i++)
    if (self->byte_ids[i] < 0)
      return KS_FAIL(KS_EDATA, "%s: byte fallback, but no piece for byte 0x%02x", path, (unsigned)i);
  return KS_OK;
}

static ks_status build_trie(const ks_vocab *v, bool user_only, ks_trie *t) {
  size_t n_bytes = 0;
  for (int32_t i = 0; i < v->n_pieces; i++)
    if (!user_only || v->pieces[i].kind == KS_PIECE_USER) n_bytes += v->pieces[i].n;
  KS_TRY(ks_trie_init(t, n_bytes));
  for (int32_t i = 0; i < v->n_pieces; i++) {
    const ks_piece *p = &v->pieces[i];
    bool normal = p->kind == KS_PIECE_NORMAL || p->kind == KS_PIECE_UNUSED;
    if (p->kind == KS_PIECE_USER || (normal && !user_only)) ks_trie_add(t, p->bytes, p->n, i);
  }
  return KS_OK;
}

static ks_status load(ks_sp_tokenizer *self, const char *path, size_t n, int64_t vocab_size) {
  KS_TRY(ks_sp_parse(self, path, n));
  KS_TRY(ks_tok_check_size(path, self->vocab.n_pieces, vocab_size));
  KS_TRY(check_pieces(self, path));
  KS_TRY(build_trie(&self->vocab, true, &self->user));
  if (self->user.n_nodes > 1) self->normalizer.user = &self->user;
  if (self->model == KS_SP_UNIGRAM) KS_TRY(build_trie(&self->vocab, false, &self->pieces));
  self->has_words = !self->has_unused && ks_vocab_has_words(&self->vocab, KS_SPACE_SYMBOL);
  self->base.vocab_size = self->vocab.n_pieces;
  self->base.bos = find_control(self, self->bos_piece);
  self->base.eos = find_control(self, self->eos_piece);
  return KS_OK;
}

ks_status ks_tok_load_sentencepiece(const char *path, char *file, size_t n, int64_t vocab_size,
                                    ks_tokenizer **out) {
  ks_sp_tokenizer *self = NULL;
  KS_TRY(ks_alloc_array(&self, 1, sizeof *self, "tokenizer"));
  self->base.kind = &kind;
  self->file = file;
  ks_status status = load(self, path, n, vocab_size);
  if (status == KS_OK) {
    *out = &self->base;
    return KS_OK;
  }
  self->file = NULL; /* still the caller's */
  destroy(&self->base);
  return status;
}
