#include "core/model/tok.h"

/* llama2.c's tokenizer file (karpathy/llama2.c, tokenizer.py, run.c): int32 length of the longest piece, then
 * for each id float32 score, int32 length, bytes. Little-endian. Blanks are blanks, bytes are "<0xAB>". */
enum { BOS = 1, EOS = 2, RECORD = 8, LONGEST = 1 << 20 };

typedef struct {
  ks_tokenizer base;
  char *file;
  ks_vocab vocab;
  int32_t byte_ids[256]; /* -1: none */
  bool has_words;
} tokenizer;

static void destroy(ks_tokenizer *t) {
  tokenizer *self = (tokenizer *)t;
  ks_vocab_free(&self->vocab);
  free(self->file);
  free(self);
}

static bool merge_rule(const void *self, const char *text, const ks_symbol *left, const ks_symbol *right,
                       uint32_t *rank, int32_t *id) {
  const ks_vocab *v = self;
  *id = ks_vocab_find(v, text + left->begin, left->n + right->n);
  if (*id < 0) return false;
  *rank = ks_merge_rank_of_score(v->pieces[*id].score);
  return true;
}

static ks_status emit(const tokenizer *self, const char *text, const ks_merger *m, ks_ids *out) {
  for (int32_t i = 0; i >= 0 && i < m->n_symbols; i = m->symbols[i].next) {
    const ks_symbol *s = &m->symbols[i];
    if (s->id >= 0) {
      KS_TRY(ks_ids_add(out, s->id));
      continue;
    }
    for (uint32_t j = 0; j < s->n; j++) {
      int32_t id = self->byte_ids[(unsigned char)text[s->begin + j]];
      if (id < 0)
        return KS_FAIL(KS_EDATA,
                       "tokenizer: no piece for byte 0x%02x of the text; name a tokenizer with byte pieces",
                       (unsigned char)text[s->begin + j]);
      KS_TRY(ks_ids_add(out, id));
    }
  }
  return KS_OK;
}

static ks_status encode_word(const tokenizer *self, ks_merger *m, const char *text, size_t n, ks_ids *out) {
  m->n_symbols = 0;
  for (size_t i = 0; i < n;) {
    uint32_t cp;
    int len = ks_utf8_decode(text + i, n - i, &cp);
    int32_t id = ks_vocab_find(&self->vocab, text + i, (size_t)len);
    KS_TRY(ks_merger_add(m, (uint32_t)i, (uint32_t)len, id, id < 0));
    i += (size_t)len;
  }
  KS_TRY(ks_merger_run(m, text, merge_rule, &self->vocab));
  return emit(self, text, m, out);
}

/* A blank goes before the text; then characters merge into the piece of the highest score. */
static ks_status encode(const ks_tokenizer *t, const char *text, size_t n, ks_ids *out) {
  const tokenizer *self = (const tokenizer *)t;
  ks_text all = {0};
  ks_merger m = {0};
  ks_status status;
  KS_TRY_OUT(ks_text_add_str(&all, " "));
  KS_TRY_OUT(ks_text_add(&all, text, n));
  for (size_t i = 0, len; i < all.len; i += len) {
    len = self->has_words ? ks_tok_word(all.data + i, all.len - i, " ") : all.len;
    KS_TRY_OUT(encode_word(self, &m, all.data + i, len, out));
  }
out:
  ks_merger_free(&m);
  ks_text_free(&all);
  return status;
}

static ks_status decode(const ks_tokenizer *t, const int32_t *ids, size_t n, ks_text *out) {
  const tokenizer *self = (const tokenizer *)t;
  ks_text bytes = {0};
  ks_status status = KS_OK;
  bool at_start = true;
  for (size_t i = 0; i < n; i++) {
    if (ids[i] >= self->vocab.n_pieces) continue;
    const ks_piece *p = &self->vocab.pieces[ids[i]];
    if (p->kind == KS_PIECE_CONTROL) continue;
    const char *b = p->kind == KS_PIECE_BYTE ? (const char *)&p->byte : p->bytes;
    size_t len = p->kind == KS_PIECE_BYTE ? 1 : p->n;
    size_t skip = at_start && p->kind == KS_PIECE_NORMAL && len > 0 && b[0] == ' ';
    at_start = false;
    KS_TRY_OUT(ks_text_add(&bytes, b + skip, len - skip));
  }
  KS_TRY_OUT(ks_tok_add_bytes(out, bytes.data ? bytes.data : "", bytes.len));
out:
  ks_text_free(&bytes);
  return status;
}

static const ks_tok_kind kind = {encode, decode, destroy};

static int32_t read_i32(const char *at) {
  int32_t v;
  memcpy(&v, at, sizeof v);
  return v;
}

/* Counts the records, checking each against the file's end. */
static ks_status count_pieces(const char *path, const char *file, size_t n, int64_t vocab_size,
                              int32_t *count) {
  if (n < 4)
    return KS_FAIL(KS_EDATA, "%s: byte 0: %zu bytes are too few for a llama2.c tokenizer; name another file",
                   path, n);
  int32_t longest = read_i32(file);
  if (longest < 1 || longest > LONGEST)
    return KS_FAIL(
        KS_EDATA,
        "%s: byte 0: not a tokenizer: neither JSON, nor SentencePiece, nor llama2.c (longest piece %d)", path,
        longest);
  size_t at = 4;
  int32_t i = 0;
  for (; at < n && (vocab_size == 0 || i < vocab_size); i++) {
    if (n - at < RECORD)
      return KS_FAIL(KS_EDATA, "%s: byte %zu: the file ends inside piece %d; is it complete?", path, at, i);
    int32_t len = read_i32(file + at + 4);
    if (len < 0 || len > longest || (size_t)len > n - at - RECORD)
      return KS_FAIL(
          KS_EDATA,
          "%s: byte %zu: piece %d has length %d (longest %d, %zu bytes left); is the file complete?", path,
          at + 4, i, len, longest, n - at - RECORD);
    at += RECORD + (size_t)len;
  }
  if (at < n)
    return KS_FAIL(KS_EDATA,
                   "%s: byte %zu: more pieces than the model's %lld; name the model's own tokenizer", path,
                   at, (long long)vocab_size);
  if (i < vocab_size)
    return KS_FAIL(KS_EDATA, "%s: has %d pieces, the model %lld; name the model's own tokenizer", path, i,
                   (long long)vocab_size);
  *count = i;
  return KS_OK;
}

static ks_status read_pieces(tokenizer *self, const char *path) {
  const char *at = self->file + 4;
  for (int32_t i = 0; i < self->vocab.n_pieces; i++) {
    ks_piece *p = &self->vocab.pieces[i];
    size_t offset = (size_t)(at - self->file);
    p->n = (uint32_t)read_i32(at + 4);
    memcpy(&p->score, at, sizeof p->score);
    p->bytes = at + RECORD;
    at += RECORD + p->n;
    if (p->score != p->score)
      return KS_FAIL(KS_EDATA, "%s: byte %zu: the score of piece %d is not a number", path, offset, i);
    if (ks_utf8_check(p->bytes, p->n) < p->n)
      return KS_FAIL(KS_EDATA, "%s: byte %zu: piece %d is not UTF-8", path, offset + RECORD, i);
    int byte = ks_piece_byte(p->bytes, p->n);
    p->kind = i <= EOS ? KS_PIECE_CONTROL : byte >= 0 ? KS_PIECE_BYTE : KS_PIECE_NORMAL;
    if (p->kind == KS_PIECE_BYTE) {
      p->byte = (uint8_t)byte;
      self->byte_ids[byte] = i;
    }
    /* Two ids may have the same text; a search finds the first, as good as any. */
    if (p->kind == KS_PIECE_NORMAL && p->n > 0) (void)ks_vocab_index(&self->vocab, i);
  }
  return KS_OK;
}

ks_status ks_tok_load_llama2c(const char *path, char *file, size_t n, int64_t vocab_size,
                              ks_tokenizer **out) {
  tokenizer *self = NULL;
  int32_t count = 0;
  ks_status status;
  KS_TRY_OUT(count_pieces(path, file, n, vocab_size, &count));
  KS_TRY_OUT(ks_alloc_array(&self, 1, sizeof *self, "tokenizer"));
  self->base = (ks_tokenizer){
      .kind = &kind, .vocab_size = count, .bos = count > BOS ? BOS : -1, .eos = count > EOS ? EOS : -1};
  self->file = file;
  for (int i = 0; i < 256; i++)
    self->byte_ids[i] = -1;
  KS_TRY_OUT(ks_vocab_init(&self->vocab, count));
  KS_TRY_OUT(read_pieces(self, path));
  self->has_words = ks_vocab_has_words(&self->vocab, " ");
  *out = &self->base;
  return KS_OK;
out:
  if (self) {
    self->file = NULL; /* still the caller's */
    destroy(&self->base);
  }
  return status;
}
