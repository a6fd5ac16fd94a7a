/* JSON files: an array of objects, or one object a line. The rows are found by a scan that knows only strings
 * and brackets, so that each has its line; jansson parses each one. */
#include "core/data/import.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

enum { MAX_KEYS_SHOWN = 8, MAX_NAME_BYTES = 255 };

/* ---------------------------------------------------------------- field paths: name(.name | [i])* */

static ks_status bad_path(const char *path, const char *why) {
  return KS_FAIL(
      KS_ECONFIG,
      "field '%s': %s; write names with dots between and indices in brackets, as in messages[1].content",
      path, why);
}

/* Checks a path before any row is read. NULL is fine. */
static ks_status check_path(const char *path) {
  const char *p = path;
  while (p && *p) {
    size_t name = strcspn(p, ".[");
    if (name == 0 && *p != '[') return bad_path(path, "a name is empty");
    if (name > MAX_NAME_BYTES) return bad_path(path, "a name is longer than 255 bytes");
    p += name;
    while (*p == '[') {
      char *end;
      if (!strchr("-0123456789", p[1]) || !p[1]) return bad_path(path, "an index is not a number");
      long long index = strtoll(p + 1, &end, 10);
      if (end == p + 1 || *end != ']' || index > INT32_MAX || index < INT32_MIN)
        return bad_path(path, "an index is not a number");
      p = end + 1;
    }
    if (*p == '.') {
      if (!p[1] || p[1] == '[') return bad_path(path, "a name is empty");
      p++;
    } else if (*p) {
      return bad_path(path, "something follows a bracket");
    }
  }
  return KS_OK;
}

/* The value at a checked path, or NULL. A negative index counts from the end. */
static const json_t *at_path(const json_t *row, const char *path) {
  const json_t *v = json_object_get(row, path); /* a name that has dots itself */
  if (v) return v;
  v = row;
  for (const char *p = path; v && *p; p += *p == '.') {
    size_t name = strcspn(p, ".[");
    if (name > 0) {
      char key[MAX_NAME_BYTES + 1];
      memcpy(key, p, name);
      key[name] = '\0';
      v = json_object_get(v, key);
    }
    p += name;
    while (v && *p == '[') {
      char *end;
      long long index = strtoll(p + 1, &end, 10), n = (long long)json_array_size(v);
      if (index < 0) index += n;
      v = index >= 0 && index < n ? json_array_get(v, (size_t)index) : NULL;
      p = end + 1;
    }
  }
  return v;
}

/* ---------------------------------------------------------------- rows */

typedef struct {
  const ks_import_params *params;
  ks_dataset *data;
  int64_t row, line; /* of the row at hand */
  size_t column;     /* 1-based */
} reader;

static const char *type_name(const json_t *v) {
  static const char *const names[] = {
      [JSON_OBJECT] = "an object", [JSON_ARRAY] = "an array", [JSON_STRING] = "a text",
      [JSON_INTEGER] = "a number", [JSON_REAL] = "a number",  [JSON_TRUE] = "true",
      [JSON_FALSE] = "false",      [JSON_NULL] = "null"};
  return names[json_typeof(v)];
}

/* The row's names, for messages. */
static ks_status list_keys(json_t *row, ks_text *out) {
  const char *key;
  json_t *value;
  int n = 0;
  json_object_foreach(row, key, value) {
    if (n == MAX_KEYS_SHOWN) return ks_text_add_str(out, ", ...");
    KS_TRY(ks_text_addf(out, "%s%.40s", n++ ? ", " : "", key));
  }
  return n ? KS_OK : ks_text_add_str(out, "no fields");
}

/* *text: the text at the field, NULL where it is absent or null. *refused: of another type, and the row was
 * skipped. */
static ks_status get_text(reader *r, const ks_import_row *at, const json_t *row, const char *field,
                          const char **text, bool *refused) {
  const json_t *v = field ? at_path(row, field) : NULL;
  *text = NULL;
  if (!v || json_is_null(v)) return KS_OK;
  if (json_is_string(v)) {
    *text = json_string_value(v);
    return KS_OK;
  }
  char reason[160];
  snprintf(reason, sizeof reason, "has %s in field '%.60s', where a text belongs", type_name(v), field);
  *refused = true;
  return ks_import_refuse(r->params, at, reason, r->data);
}

/* A topic may be a number. digits: room for it. */
static ks_status get_topic(reader *r, const ks_import_row *at, const json_t *row, char digits[32],
                           const char **text, bool *refused) {
  const json_t *v = r->params->topic_field ? at_path(row, r->params->topic_field) : NULL;
  if (!v || !json_is_integer(v)) return get_text(r, at, row, r->params->topic_field, text, refused);
  snprintf(digits, 32, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
  *text = digits;
  return KS_OK;
}

static ks_status add_object(reader *r, json_t *object) {
  const ks_import_params *p = r->params;
  ks_import_row row = {.row = r->row, .line = r->line};
  bool refused = false;
  char digits[32];
  struct {
    const char *field, **text;
  } texts[] = {{p->question_field, &row.question},
               {p->input_field, &row.input},
               {p->response_field, &row.response},
               {p->preferred_field, &row.preferred}};
  for (size_t i = 0; i < sizeof texts / sizeof texts[0] && !refused; i++)
    KS_TRY(get_text(r, &row, object, texts[i].field, texts[i].text, &refused));
  if (!refused) KS_TRY(get_topic(r, &row, object, digits, &row.topic, &refused));
  if (refused) return KS_OK;
  ks_text keys = {0};
  ks_status status = list_keys(object, &keys);
  if (status == KS_OK) status = ks_import_add(p, &row, keys.data, r->data);
  ks_text_free(&keys);
  return status;
}

static ks_status add_row(reader *r, const char *text, size_t n) {
  json_error_t error;
  json_t *value = json_loadb(text, n, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, &error);
  if (!value) {
    bool nul = json_error_code(&error) == json_error_null_character;
    size_t column = (size_t)(error.column > 0 ? error.column : 1);
    return KS_FAIL(KS_EDATA, "%s:%" PRId64 ":%zu: row %" PRId64 " is not valid JSON: %s; correct the file",
                   r->params->path, r->line + (error.line > 0 ? error.line - 1 : 0),
                   error.line <= 1 ? r->column - 1 + column : column, r->row,
                   nul ? "a text holds \\u0000" : error.text);
  }
  ks_status status;
  if (json_is_object(value)) {
    status = add_object(r, value);
  } else {
    char reason[64];
    snprintf(reason, sizeof reason, "is %s, not an object", type_name(value));
    ks_import_row row = {.row = r->row, .line = r->line};
    status = ks_import_refuse(r->params, &row, reason, r->data);
  }
  json_decref(value);
  return status;
}

/* ---------------------------------------------------------------- an array of rows */

typedef struct {
  const char *p, *end, *line_begin;
  int64_t line;
} cursor;

static void step(cursor *c) {
  if (*c->p == '\n') {
    c->line++;
    c->line_begin = c->p + 1;
  }
  c->p++;
}

static void skip_blank(cursor *c) {
  while (c->p < c->end && strchr(" \t\r\n", *c->p))
    step(c);
}

static ks_status fail_at(const reader *r, const cursor *c, const char *what) {
  return KS_FAIL(KS_EDATA, "%s:%" PRId64 ":%zu: %s", r->params->path, c->line,
                 (size_t)(c->p - c->line_begin) + 1, what);
}

/* Moves past one element of an array: to the comma or bracket after it, or to the end of the file. */
static void skip_element(cursor *c) {
  int64_t depth = 0;
  bool in_text = false;
  for (; c->p < c->end; step(c)) {
    char ch = *c->p;
    if (in_text) {
      if (ch == '\\' && c->p + 1 < c->end)
        step(c);
      else if (ch == '"')
        in_text = false;
    } else if (ch == '"') {
      in_text = true;
    } else if (ch == '[' || ch == '{') {
      depth++;
    } else if (depth == 0 && (ch == ',' || ch == ']')) {
      return;
    } else if (ch == ']' || ch == '}') {
      depth--;
    }
  }
}

static ks_status read_rows(reader *r, cursor *c) {
  skip_blank(c);
  if (*c->p != '[')
    return fail_at(
        r, c,
        "the file is not a JSON array of rows (no '['); a file with one object a line is read by the "
        "importer jsonl");
  step(c);
  skip_blank(c);
  bool closed = c->p < c->end && *c->p == ']';
  while (!closed) {
    skip_blank(c);
    r->row++;
    r->line = c->line;
    r->column = (size_t)(c->p - c->line_begin) + 1;
    const char *begin = c->p;
    skip_element(c);
    if (c->p == c->end)
      return fail_at(r, c, "the file ends inside the array of rows; it is cut off, get it again whole");
    if (c->p == begin) return fail_at(r, c, "a row is missing (an empty place between commas or at the end)");
    KS_TRY(add_row(r, begin, (size_t)(c->p - begin)));
    if (ks_import_full(r->params, r->data)) return KS_OK;
    closed = *c->p == ']';
    if (!closed) step(c);
  }
  step(c);
  skip_blank(c);
  if (c->p < c->end) return fail_at(r, c, "something follows the array of rows; remove it");
  return KS_OK;
}

/* ---------------------------------------------------------------- one row a line */

static ks_status read_lines(reader *r, cursor *c) {
  skip_blank(c);
  if (*c->p == '[')
    return fail_at(
        r, c,
        "the file is one JSON array ('['), not one object a line; it is read by the importer json or alpaca");
  while (c->p < c->end && !ks_import_full(r->params, r->data)) {
    const char *newline = memchr(c->p, '\n', (size_t)(c->end - c->p));
    const char *next = newline ? newline : c->end;
    const char *begin = c->p;
    while (begin < next && strchr(" \t\r", *begin))
      begin++;
    if (begin < next) {
      r->row++;
      r->line = c->line;
      r->column = (size_t)(begin - c->line_begin) + 1;
      KS_TRY(add_row(r, begin, (size_t)(next - begin)));
    }
    c->p = newline ? newline + 1 : c->end;
    c->line_begin = c->p;
    c->line++;
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- importers */

static ks_status import(const ks_import_params *p, ks_dataset *out, ks_status (*read)(reader *, cursor *)) {
  const char *fields[] = {p->question_field, p->input_field, p->response_field, p->preferred_field,
                          p->topic_field};
  for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
    KS_TRY(check_path(fields[i]));
  char *bytes;
  const char *text;
  size_t n;
  KS_TRY(ks_import_read(p, out, &bytes, &text, &n));
  reader r = {.params = p, .data = out};
  cursor c = {.p = text, .end = text + n, .line_begin = text, .line = 1};
  ks_status status = read(&r, &c);
  free(bytes);
  return status;
}

ks_status ks_import_alpaca(const ks_import_params *params, ks_dataset *out) {
  bool own_question = params->question_field && *params->question_field;
  ks_import_params p = ks_import_with_fields(params, "instruction", own_question ? NULL : "input", "output");
  return import(&p, out, read_rows);
}

ks_status ks_import_json(const ks_import_params *params, ks_dataset *out) {
  ks_import_params p = ks_import_with_fields(params, "question", NULL, "response");
  return import(&p, out, read_rows);
}

ks_status ks_import_jsonl(const ks_import_params *params, ks_dataset *out) {
  ks_import_params p = ks_import_with_fields(params, "question", NULL, "response");
  return import(&p, out, read_lines);
}
