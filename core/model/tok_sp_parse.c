#include "core/model/tok_sentencepiece.h"

/* A SentencePiece model is a Protocol Buffers message (proto2). A field is a varint `number << 3 | type` and
 * its value: type 0 a varint, 1 eight bytes, 2 a varint length and so many bytes, 5 four bytes. Last value
 * wins; unknown fields are skipped. */
enum { MAX_PIECE = 8000 }; /* as in the original */

typedef struct {
  const char *path;
  const char *file; /* for offsets in messages */
  const char *at, *end;
} reader;

typedef struct {
  uint32_t number, type;
  uint64_t varint; /* types 0 and 5 (the four bytes) */
  ks_span bytes;   /* type 2 */
  size_t offset;   /* of the field in the file */
} field;

static ks_status read_varint(reader *r, uint64_t *out) {
  const char *begin = r->at;
  *out = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    if (r->at == r->end)
      return KS_FAIL(KS_EDATA, "%s: byte %zu: a number is cut off; is the file complete?", r->path,
                     (size_t)(begin - r->file));
    unsigned char b = (unsigned char)*r->at++;
    if (shift < 64) *out |= (uint64_t)(b & 0x7F) << shift;
    if (!(b & 0x80)) return KS_OK;
  }
  return KS_FAIL(KS_EDATA, "%s: byte %zu: a number longer than 64 bits; the file is damaged", r->path,
                 (size_t)(begin - r->file));
}

/* r is not at its end. */
static ks_status read_field(reader *r, field *f) {
  uint64_t tag, n = 0;
  *f = (field){.offset = (size_t)(r->at - r->file)};
  KS_TRY(read_varint(r, &tag));
  f->type = (uint32_t)(tag & 7);
  if (tag >> 3 == 0 || tag >> 3 > 536870911)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: not a field of a message; is this a SentencePiece model?",
                   r->path, f->offset);
  f->number = (uint32_t)(tag >> 3);
  if (f->type == 0) return read_varint(r, &f->varint);
  if (f->type == 2) KS_TRY(read_varint(r, &n));
  if (f->type == 1) n = 8;
  if (f->type == 5) n = 4;
  if (f->type == 3 || f->type == 4 || f->type > 5)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: field %u has type %u; is this a SentencePiece model?", r->path,
                   f->offset, f->number, f->type);
  size_t left = (size_t)(r->end - r->at);
  if (n > left)
    return KS_FAIL(KS_EDATA,
                   "%s: byte %zu: field %u has %llu bytes, but only %zu are left; is the file complete?",
                   r->path, f->offset, f->number, (unsigned long long)n, left);
  f->bytes = (ks_span){r->at, (size_t)n};
  if (f->type == 5) {
    uint32_t four;
    memcpy(&four, r->at, sizeof four);
    f->varint = four;
  }
  r->at += n;
  return KS_OK;
}

static reader sub_reader(const reader *r, const field *f) {
  return (reader){r->path, r->file, f->bytes.bytes, f->bytes.bytes + f->bytes.n};
}

static ks_status expect_type(const reader *r, const field *f, uint32_t type) {
  if (f->type == type) return KS_OK;
  return KS_FAIL(KS_EDATA, "%s: byte %zu: field %u has type %u, expected %u; is this a SentencePiece model?",
                 r->path, f->offset, f->number, f->type, type);
}

static ks_status parse_piece(reader r, ks_piece *p, int32_t id) {
  size_t offset = (size_t)(r.at - r.file);
  *p = (ks_piece){.kind = KS_PIECE_NORMAL};
  while (r.at < r.end) {
    field f;
    KS_TRY(read_field(&r, &f));
    if (f.number == 1) {
      KS_TRY(expect_type(&r, &f, 2));
      p->bytes = f.bytes.bytes;
      if (f.bytes.n >= MAX_PIECE)
        return KS_FAIL(KS_EDATA, "%s: byte %zu: piece %d has %zu bytes", r.path, f.offset, id, f.bytes.n);
      p->n = (uint32_t)f.bytes.n;
    } else if (f.number == 2) {
      KS_TRY(expect_type(&r, &f, 5));
      uint32_t bits = (uint32_t)f.varint;
      memcpy(&p->score, &bits, sizeof bits);
    } else if (f.number == 3) {
      KS_TRY(expect_type(&r, &f, 0));
      if (f.varint < KS_PIECE_NORMAL || f.varint > KS_PIECE_BYTE)
        return KS_FAIL(KS_EUNSUPPORTED, "%s: byte %zu: piece %d is of kind %llu", r.path, f.offset, id,
                       (unsigned long long)f.varint);
      p->kind = (uint8_t)f.varint;
    }
  }
  if (p->n == 0 || memchr(p->bytes, 0, p->n))
    return KS_FAIL(KS_EDATA, "%s: byte %zu: piece %d is empty or has a zero byte", r.path, offset, id);
  if (ks_utf8_check(p->bytes, p->n) < p->n)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: piece %d is not UTF-8", r.path, offset, id);
  if (p->score != p->score)
    return KS_FAIL(KS_EDATA, "%s: byte %zu: the score of piece %d is not a number", r.path, offset, id);
  return KS_OK;
}

static ks_status parse_trainer(ks_sp_tokenizer *self, reader r) {
  while (r.at < r.end) {
    field f;
    KS_TRY(read_field(&r, &f));
    bool is_flag = f.number == 3 || f.number == 24 || f.number == 35;
    bool is_text = f.number == 44 || f.number == 46 || f.number == 47;
    if (is_flag || is_text) KS_TRY(expect_type(&r, &f, is_text ? 2 : 0));
    switch (f.number) {
    case 3:
      self->model = f.varint <= KS_SP_CHAR ? (ks_sp_model)f.varint : 0;
      break;
    case 24:
      self->normalizer.whitespace_as_suffix = f.varint != 0;
      break;
    case 35:
      self->byte_fallback = f.varint != 0;
      break;
    case 44:
      self->unk_surface = f.bytes;
      break;
    case 46:
      self->bos_piece = f.bytes;
      break;
    case 47:
      self->eos_piece = f.bytes;
      break;
    default:
      break;
    }
  }
  if (ks_utf8_check(self->unk_surface.bytes, self->unk_surface.n) < self->unk_surface.n)
    return KS_FAIL(KS_EDATA, "%s: the text for unknown pieces is not UTF-8", r.path);
  return KS_OK;
}

static ks_status parse_normalizer(ks_sp_normalizer *z, reader r, bool only_empty) {
  while (r.at < r.end) {
    field f;
    KS_TRY(read_field(&r, &f));
    if (f.number == 2) KS_TRY(expect_type(&r, &f, 2));
    if (only_empty && f.number == 2 && f.bytes.n > 0)
      return KS_FAIL(KS_EUNSUPPORTED,
                     "%s: byte %zu: rewrites decoded text (denormalizer), which is not supported", r.path,
                     f.offset);
    if (only_empty) continue;
    if (f.number >= 3 && f.number <= 5) KS_TRY(expect_type(&r, &f, 0));
    switch (f.number) {
    case 2:
      KS_TRY_AS(ks_sp_normalizer_set_charsmap(z, f.bytes), "%s: byte %zu", r.path, f.offset);
      break;
    case 3:
      z->add_dummy_prefix = f.varint != 0;
      break;
    case 4:
      z->remove_extra_whitespaces = f.varint != 0;
      break;
    case 5:
      z->escape_whitespaces = f.varint != 0;
      break;
    default:
      break;
    }
  }
  return KS_OK;
}

static ks_status count_pieces(reader r, int32_t *n) {
  *n = 0;
  while (r.at < r.end) {
    field f;
    KS_TRY(read_field(&r, &f));
    if (f.number != 1) continue;
    KS_TRY(expect_type(&r, &f, 2));
    (*n)++; /* a file of less than 2 GB: no overflow */
  }
  return KS_OK;
}

ks_status ks_sp_parse(ks_sp_tokenizer *self, const char *path, size_t n) {
  static const char unk_surface[] = " \xe2\x81\x87 ";
  reader r = {path, self->file, self->file, self->file + n};
  int32_t n_pieces, id = 0;
  self->model = KS_SP_UNIGRAM;
  self->unk_surface = (ks_span){unk_surface, strlen(unk_surface)};
  self->bos_piece = (ks_span){"<s>", 3};
  self->eos_piece = (ks_span){"</s>", 4};
  self->normalizer = (ks_sp_normalizer){
      .add_dummy_prefix = true, .remove_extra_whitespaces = true, .escape_whitespaces = true};
  KS_TRY(count_pieces(r, &n_pieces));
  KS_TRY(ks_vocab_init(&self->vocab, n_pieces));
  while (r.at < r.end) {
    field f;
    KS_TRY(read_field(&r, &f));
    if (f.number == 1) {
      KS_TRY(parse_piece(sub_reader(&r, &f), &self->vocab.pieces[id], id));
      id++;
      continue;
    }
    if (f.number == 2 || f.number == 3 || f.number == 5) KS_TRY(expect_type(&r, &f, 2));
    if (f.number == 2) KS_TRY(parse_trainer(self, sub_reader(&r, &f)));
    if (f.number == 3) KS_TRY(parse_normalizer(&self->normalizer, sub_reader(&r, &f), false));
    if (f.number == 5) KS_TRY(parse_normalizer(&self->normalizer, sub_reader(&r, &f), true));
  }
  if (self->model != KS_SP_UNIGRAM && self->model != KS_SP_BPE)
    return KS_FAIL(KS_EUNSUPPORTED,
                   "%s: a SentencePiece model of kind %d (word or character); BPE and unigram are supported",
                   path, (int)self->model);
  return KS_OK;
}
