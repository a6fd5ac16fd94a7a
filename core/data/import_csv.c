/* Separated values after RFC 4180: a header line, fields in double quotes may hold separators, line ends and
 * doubled quotes. */
#include "core/data/import.h"

#include <inttypes.h>
#include <stdio.h>

enum { MAX_COLUMNS = 4096 };

typedef struct {
  const ks_import_params *params;
  const char *p, *end;
  char separator;
  int64_t line;
  ks_text text;                /* the record's fields, NUL after each */
  size_t offsets[MAX_COLUMNS]; /* of each field in text */
  size_t n_fields;
} csv;

static ks_status quoted_field(csv *c) {
  int64_t line = c->line;
  for (c->p++;; c->p++) {
    if (c->p == c->end)
      return KS_FAIL(KS_EDATA, "%s:%" PRId64 ": a quote opens here and never closes; close it",
                     c->params->path, line);
    if (*c->p == '"') {
      if (c->p + 1 == c->end || c->p[1] != '"') break;
      c->p++;
    }
    c->line += *c->p == '\n';
    KS_TRY(ks_text_add(&c->text, c->p, 1));
  }
  c->p++;
  if (c->p < c->end && *c->p != c->separator && *c->p != '\n' && *c->p != '\r')
    return KS_FAIL(KS_EDATA,
                   "%s:%" PRId64 ": text follows a closing quote; double the quotes inside a quoted field",
                   c->params->path, c->line);
  return KS_OK;
}

/* Reads one record into text and offsets. */
static ks_status read_record(csv *c) {
  ks_text_clear(&c->text);
  c->n_fields = 0;
  for (;;) {
    if (c->n_fields == MAX_COLUMNS)
      return KS_FAIL(KS_EDATA, "%s:%" PRId64 ": more than %d fields; is the separator right?",
                     c->params->path, c->line, MAX_COLUMNS);
    c->offsets[c->n_fields++] = c->text.len;
    if (c->p < c->end && *c->p == '"') {
      KS_TRY(quoted_field(c));
    } else {
      const char *begin = c->p;
      while (c->p < c->end && *c->p != c->separator && *c->p != '\n')
        c->p++;
      size_t n = (size_t)(c->p - begin);
      if (n > 0 && c->p[-1] == '\r' && (c->p == c->end || *c->p == '\n')) n--;
      KS_TRY(ks_text_add(&c->text, begin, n));
    }
    KS_TRY(ks_text_add(&c->text, "", 1));
    if (c->p < c->end && *c->p == c->separator) {
      c->p++;
      continue;
    }
    if (c->p < c->end && *c->p == '\r') c->p++;
    if (c->p < c->end && *c->p == '\n') {
      c->p++;
      c->line++;
    }
    return KS_OK;
  }
}

static const char *field(const csv *c, size_t i) {
  return i < c->n_fields ? c->text.data + c->offsets[i] : NULL;
}

/* Column numbers of the five mapped fields; SIZE_MAX: not mapped. */
typedef struct {
  size_t question, input, response, preferred, topic;
} columns;

static ks_status find_column(const csv *c, const char *name, size_t *out) {
  *out = SIZE_MAX;
  if (!name) return KS_OK;
  ks_text names = {0};
  ks_status status = KS_OK;
  for (size_t i = 0; i < c->n_fields; i++) {
    if (strcmp(field(c, i), name) == 0) {
      *out = i;
      goto out;
    }
    if (i < 12) KS_TRY_OUT(ks_text_addf(&names, "%s%.40s", i ? ", " : "", field(c, i)));
  }
  status = KS_FAIL(KS_EDATA, "%s:1: the header has no column '%s'; its columns are: %s", c->params->path,
                   name, names.data);
out:
  ks_text_free(&names);
  return status;
}

static ks_status find_columns(const csv *c, columns *out) {
  const ks_import_params *p = c->params;
  KS_TRY(find_column(c, p->question_field, &out->question));
  KS_TRY(find_column(c, p->input_field, &out->input));
  KS_TRY(find_column(c, p->response_field, &out->response));
  KS_TRY(find_column(c, p->preferred_field, &out->preferred));
  return find_column(c, p->topic_field, &out->topic);
}

static ks_status read_rows(csv *c, ks_dataset *out) {
  columns at;
  KS_TRY(read_record(c));
  size_t n_columns = c->n_fields;
  KS_TRY(find_columns(c, &at));
  for (int64_t row = 1; c->p < c->end && !ks_import_full(c->params, out); row++) {
    ks_import_row r = {.row = row, .line = c->line};
    KS_TRY(read_record(c));
    if (c->n_fields == 1 && *field(c, 0) == '\0') { /* a blank line */
      row--;
      continue;
    }
    char has[96];
    if (c->n_fields > n_columns) {
      snprintf(has, sizeof has, "has %zu fields, the header %zu", c->n_fields, n_columns);
      KS_TRY(ks_import_refuse(c->params, &r, has, out));
      continue;
    }
    r.question = field(c, at.question);
    r.input = field(c, at.input);
    r.response = field(c, at.response);
    r.preferred = field(c, at.preferred);
    r.topic = field(c, at.topic);
    snprintf(has, sizeof has, "%zu of %zu fields", c->n_fields, n_columns);
    KS_TRY(ks_import_add(c->params, &r, has, out));
  }
  return KS_OK;
}

static ks_status import(const ks_import_params *params, char separator, ks_dataset *out) {
  ks_import_params p = ks_import_with_fields(params, "question", NULL, "response");
  char *bytes;
  const char *text;
  size_t n;
  KS_TRY(ks_import_read(&p, out, &bytes, &text, &n));
  csv *c = NULL;
  ks_status status = ks_alloc_array(&c, 1, sizeof *c, "table reader");
  if (status == KS_OK) {
    c->params = &p;
    c->p = text;
    c->end = text + n;
    c->separator = separator;
    c->line = 1;
    status = read_rows(c, out);
    ks_text_free(&c->text);
  }
  free(c);
  free(bytes);
  return status;
}

ks_status ks_import_csv(const ks_import_params *params, ks_dataset *out) {
  return import(params, ',', out);
}
ks_status ks_import_tsv(const ks_import_params *params, ks_dataset *out) {
  return import(params, '\t', out);
}
