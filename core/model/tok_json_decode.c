#include "core/model/tok_json.h"

/* Tokens on their way through the decoders: one text, cut by ends. */
typedef struct {
  ks_text text;
  size_t *ends;
  size_t n, cap;
} tokens;

static void tokens_free(tokens *k) {
  ks_text_free(&k->text);
  free(k->ends);
}

static ks_status tokens_close(tokens *k) {
  if (k->n == k->cap) {
    size_t cap = k->cap ? 2 * k->cap : 64;
    size_t *ends = realloc(k->ends, cap * sizeof *ends);
    if (!ends) return KS_FAIL(KS_ENOMEM, "tokenizer: no memory for %zu tokens", cap);
    k->ends = ends;
    k->cap = cap;
  }
  k->ends[k->n++] = k->text.len;
  return KS_OK;
}

static ks_status tokens_add(tokens *k, const char *bytes, size_t n) {
  KS_TRY(ks_text_add(&k->text, bytes, n));
  return tokens_close(k);
}

static ks_string token_at(const tokens *k, size_t i) {
  size_t begin = i ? k->ends[i - 1] : 0;
  return (ks_string){k->text.data + begin, k->ends[i] - begin};
}

/* ---------------------------------------------------------------- byte-level characters */

/* GPT-2's table: printable bytes stand for themselves, the others, in order, for U+0100 and on. */
static bool is_plain(unsigned byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

int ks_byte_level_byte(uint32_t cp) {
  if (cp < 0x100) return is_plain(cp) ? (int)cp : -1;
  if (cp < 0x121) return (int)(cp - 0x100);        /* 0x00..0x20 */
  if (cp < 0x143) return (int)(cp - 0x121 + 0x7F); /* 0x7F..0xA0 */
  return cp == 0x143 ? 0xAD : -1;
}

/* A token with a character that stands for no byte gives its own bytes. */
static ks_status add_token_bytes(ks_text *out, ks_string token) {
  size_t before = out->len, len;
  for (size_t i = 0; i < token.n; i += len) {
    uint32_t cp = 0;
    len = (size_t)ks_utf8_decode(token.bytes + i, token.n - i, &cp);
    int byte = len > 0 ? ks_byte_level_byte(cp) : -1;
    if (byte < 0) {
      out->len = before;
      return ks_text_add(out, token.bytes, token.n);
    }
    KS_TRY(ks_text_add(out, &(char){(char)byte}, 1));
  }
  return KS_OK;
}

/* Bytes to text; the longest beginning of a character that broken bytes form gives one U+FFFD (Unicode 3.9,
 * "maximal subparts"), as in the original. */
static size_t broken_length(const char *s, size_t n) {
  const unsigned char *b = (const unsigned char *)s;
  unsigned low = 0x80, high = 0xBF;
  size_t most = b[0] >= 0xF0 && b[0] <= 0xF4   ? 3
                : b[0] >= 0xE0 && b[0] <= 0xEF ? 2
                : b[0] >= 0xC2 && b[0] <= 0xDF ? 1
                                               : 0;
  if (b[0] == 0xE0) low = 0xA0;
  if (b[0] == 0xED) high = 0x9F;
  if (b[0] == 0xF0) low = 0x90;
  if (b[0] == 0xF4) high = 0x8F;
  size_t i = 1;
  while (i < n && i <= most && b[i] >= low && b[i] <= high) {
    low = 0x80;
    high = 0xBF;
    i++;
  }
  return i;
}

static ks_status add_lossy(ks_text *out, const char *bytes, size_t n) {
  for (size_t i = 0; i < n;) {
    size_t good = ks_utf8_check(bytes + i, n - i);
    KS_TRY(ks_text_add(out, bytes + i, good));
    i += good;
    if (i == n) break;
    KS_TRY(ks_text_add_str(out, KS_REPLACEMENT));
    i += broken_length(bytes + i, n - i);
  }
  return KS_OK;
}

static ks_status step_byte_level(const tokens *in, tokens *out) {
  ks_text bytes = {0};
  ks_status status = KS_OK;
  for (size_t i = 0; i < in->n; i++)
    KS_TRY_OUT(add_token_bytes(&bytes, token_at(in, i)));
  KS_TRY_OUT(add_lossy(&out->text, bytes.data, bytes.len));
  KS_TRY_OUT(tokens_close(out));
out:
  ks_text_free(&bytes);
  return status;
}

/* ---------------------------------------------------------------- the other decoders */

static ks_status flush_bytes(tokens *out, ks_text *bytes) {
  if (bytes->len == 0) return KS_OK;
  bool valid = ks_utf8_check(bytes->data, bytes->len) == bytes->len;
  if (valid) KS_TRY(tokens_add(out, bytes->data, bytes->len));
  for (size_t i = 0; !valid && i < bytes->len; i++) /* all of them, once one is broken */
    KS_TRY(tokens_add(out, KS_REPLACEMENT, strlen(KS_REPLACEMENT)));
  ks_text_clear(bytes);
  return KS_OK;
}

static int hex_byte(ks_string token) {
  char upper[6];
  if (token.n != sizeof upper) return -1;
  memcpy(upper, token.bytes, sizeof upper);
  for (size_t i = 3; i < 5; i++)
    if (upper[i] >= 'a' && upper[i] <= 'f') upper[i] = (char)(upper[i] - 'a' + 'A');
  return ks_piece_byte(upper, sizeof upper);
}

static ks_status step_byte_fallback(const tokens *in, tokens *out) {
  ks_text bytes = {0};
  ks_status status = KS_OK;
  for (size_t i = 0; i < in->n; i++) {
    ks_string token = token_at(in, i);
    int byte = hex_byte(token);
    if (byte >= 0) {
      KS_TRY_OUT(ks_text_add(&bytes, &(char){(char)byte}, 1));
      continue;
    }
    KS_TRY_OUT(flush_bytes(out, &bytes));
    KS_TRY_OUT(tokens_add(out, token.bytes, token.n));
  }
  KS_TRY_OUT(flush_bytes(out, &bytes));
out:
  ks_text_free(&bytes);
  return status;
}

static bool has_at(ks_string token, size_t at, ks_string what) {
  return at <= token.n && token.n - at >= what.n && memcmp(token.bytes + at, what.bytes, what.n) == 0;
}

static ks_status step_strip(const ks_decode_step *s, const tokens *in, tokens *out) {
  for (size_t i = 0; i < in->n; i++) {
    ks_string token = token_at(in, i);
    for (size_t taken = 0; taken < s->start && has_at(token, 0, s->text); taken++)
      token = (ks_string){token.bytes + s->text.n, token.n - s->text.n};
    for (size_t taken = 0;
         taken < s->stop && token.n >= s->text.n && has_at(token, token.n - s->text.n, s->text); taken++)
      token.n -= s->text.n;
    KS_TRY(tokens_add(out, token.bytes, token.n));
  }
  return KS_OK;
}

static ks_status step_metaspace(const ks_decode_step *s, const tokens *in, tokens *out) {
  for (size_t i = 0; i < in->n; i++) {
    ks_string token = token_at(in, i);
    bool drop = i == 0 && s->scheme != KS_PREPEND_NEVER;
    for (size_t at = 0; at < token.n;) {
      bool marker = has_at(token, at, s->text);
      if (marker && !drop) KS_TRY(ks_text_add_str(&out->text, " "));
      if (!marker) KS_TRY(ks_text_add(&out->text, token.bytes + at, 1));
      at += marker ? s->text.n : 1;
    }
    KS_TRY(tokens_close(out));
  }
  return KS_OK;
}

static ks_status step_replace(const ks_decode_step *s, const tokens *in, tokens *out) {
  ks_matches m;
  ks_status status = KS_OK;
  KS_TRY(ks_matches_init(&m, s->pattern));
  for (size_t i = 0; i < in->n; i++) {
    ks_string token = token_at(in, i);
    size_t at = 0, begin, end;
    bool found = true;
    ks_matches_start(&m, token.bytes, token.n);
    while (found) {
      KS_TRY_OUT(ks_matches_next(&m, &found, &begin, &end));
      if (!found) begin = end = token.n;
      KS_TRY_OUT(ks_text_add(&out->text, token.bytes + at, begin - at));
      if (found) KS_TRY_OUT(ks_text_add(&out->text, s->text.bytes, s->text.n));
      at = end;
    }
    KS_TRY_OUT(tokens_close(out));
  }
out:
  ks_matches_free(&m);
  return status;
}

static ks_status decode_step(const ks_decode_step *s, const tokens *in, tokens *out) {
  switch (s->kind) {
  case KS_DECODE_BYTE_LEVEL:
    return step_byte_level(in, out);
  case KS_DECODE_REPLACE:
    return step_replace(s, in, out);
  case KS_DECODE_BYTE_FALLBACK:
    return step_byte_fallback(in, out);
  case KS_DECODE_FUSE:
    return tokens_add(out, in->text.data, in->text.len);
  case KS_DECODE_STRIP:
    return step_strip(s, in, out);
  case KS_DECODE_METASPACE:
    return step_metaspace(s, in, out);
  }
  return KS_FAIL(KS_EINTERNAL, "tokenizer: decoder %d", (int)s->kind);
}

ks_status ks_json_decode(const ks_tokenizer *base, const int32_t *ids, size_t n, ks_text *out) {
  const ks_json_tokenizer *t = (const ks_json_tokenizer *)base;
  tokens now = {0}, next = {0};
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_text_add(&now.text, "", 0));
  for (size_t i = 0; i < n; i++) {
    if (ids[i] >= t->vocab.n_pieces) continue;
    const ks_piece *p = &t->vocab.pieces[ids[i]];
    if (!p->bytes || p->kind == KS_PIECE_CONTROL) continue;
    if (!t->has_decoder && now.n > 0) KS_TRY_OUT(ks_text_add_str(&now.text, " "));
    KS_TRY_OUT(tokens_add(&now, p->bytes, p->n));
  }
  for (size_t i = 0; i < t->n_decodes; i++) {
    next.n = 0;
    ks_text_clear(&next.text);
    KS_TRY_OUT(ks_text_add(&next.text, "", 0));
    KS_TRY_OUT(decode_step(&t->decodes[i], &now, &next));
    tokens old = now;
    now = next;
    next = old;
  }
  KS_TRY_OUT(ks_text_add(out, now.text.data, now.text.len));
out:
  tokens_free(&now);
  tokens_free(&next);
  return status;
}
