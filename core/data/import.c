#include "core/data/import.h"

#include <inttypes.h>

enum {
  MAX_FILE_BYTES = INT32_MAX
}; /* far above any dialogue dataset; keeps a wrong path from filling the memory */

const ks_importer ks_importers[] = {
    {"alpaca", "JSON array of {instruction, input, output}", ks_import_alpaca},
    {"json", "JSON array of objects, fields by mapping", ks_import_json},
    {"jsonl", "JSON Lines: one object a line, fields by mapping", ks_import_jsonl},
    {"csv", "comma-separated values with a header line, fields by mapping", ks_import_csv},
    {"tsv", "tab-separated values with a header line, fields by mapping", ks_import_tsv},
    {0},
};

static const ks_importer *find_importer(const char *name) {
  for (const ks_importer *i = ks_importers; i->name; i++)
    if (strcmp(i->name, name) == 0) return i;
  return NULL;
}

static ks_status unknown_importer(const char *name) {
  ks_text names = {0};
  for (const ks_importer *i = ks_importers; i->name; i++)
    if (ks_text_addf(&names, "%s%s", i == ks_importers ? "" : ", ", i->name) != KS_OK) break;
  ks_status status =
      KS_FAIL(KS_ECONFIG, "no importer is called '%s'; there are: %s", name, names.data ? names.data : "");
  ks_text_free(&names);
  return status;
}

static const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

ks_status ks_dataset_import(const ks_import_params *params, ks_dataset **out) {
  if (!params->importer || !params->path || !*params->path)
    return KS_FAIL(KS_ECONFIG, "a dataset file needs an importer and a path");
  const ks_importer *importer = find_importer(params->importer);
  if (!importer) return unknown_importer(params->importer);
  if (params->max_rows < 0)
    return KS_FAIL(KS_ECONFIG, "max_rows is %" PRId64 "; give 0 for all rows, or more", params->max_rows);
  ks_dataset *d = NULL;
  KS_TRY(ks_dataset_create(base_name(params->path), &d));
  ks_status status = importer->import(params, d);
  if (status == KS_OK && d->n_sets == 0)
    status =
        KS_FAIL(KS_EDATA, "%s: no usable row among %" PRId64 "; check the file and the names of the fields",
                params->path, d->n_skipped);
  if (status != KS_OK) {
    ks_dataset_destroy(d);
    return status;
  }
  *out = d;
  return KS_OK;
}

static const char *or_default(const char *given, const char *own) {
  return given && *given ? given : own;
}

ks_import_params ks_import_with_fields(const ks_import_params *params, const char *question,
                                       const char *input, const char *response) {
  ks_import_params p = *params;
  p.question_field = or_default(p.question_field, question);
  p.input_field = or_default(p.input_field, input);
  p.response_field = or_default(p.response_field, response);
  p.preferred_field = or_default(p.preferred_field, NULL);
  p.topic_field = or_default(p.topic_field, NULL);
  return p;
}

static int64_t line_of(const char *text, const char *at) {
  int64_t line = 1;
  for (const char *p = text; (p = memchr(p, '\n', (size_t)(at - p))) != NULL; p++)
    line++;
  return line;
}

static ks_status check_bytes(const char *path, const char *text, size_t n) {
  size_t blank = strspn(text, " \t\r\n"), bad = ks_utf8_check(text, n);
  const char *nul = memchr(text, '\0', n);
  if (blank == n) return KS_FAIL(KS_EDATA, "%s:1: the file is empty; give one with at least one row", path);
  if (nul)
    return KS_FAIL(KS_EDATA,
                   "%s:%" PRId64 ": a NUL byte at offset %zu; this is not a text file, or a damaged one",
                   path, line_of(text, nul), (size_t)(nul - text));
  if (bad < n)
    return KS_FAIL(KS_EDATA,
                   "%s:%" PRId64 ": not UTF-8 at byte offset %zu (0x%02x); convert the file to UTF-8", path,
                   line_of(text, text + bad), bad, (unsigned)(unsigned char)text[bad]);
  return KS_OK;
}

ks_status ks_import_read(const ks_import_params *params, ks_dataset *d, char **bytes, const char **text,
                         size_t *n) {
  *bytes = NULL;
  KS_TRY(ks_file_read(params->path, MAX_FILE_BYTES, bytes, n));
  ks_sha256 h;
  ks_sha256_init(&h);
  ks_sha256_add(&h, *bytes, *n);
  ks_sha256_finish(&h, d->sha256);
  *text = *bytes;
  ks_status status = check_bytes(params->path, *text, *n);
  if (status != KS_OK) {
    free(*bytes);
    *bytes = NULL;
    return status;
  }
  if (*n >= 3 && memcmp(*text, "\xEF\xBB\xBF", 3) == 0) {
    *text += 3;
    *n -= 3;
  }
  return KS_OK;
}

bool ks_import_full(const ks_import_params *params, const ks_dataset *d) {
  return params->max_rows > 0 && d->n_sets >= params->max_rows;
}

ks_status ks_import_refuse(const ks_import_params *params, const ks_import_row *row, const char *reason,
                           ks_dataset *d) {
  if (params->skip_invalid) {
    d->n_skipped++;
    return KS_OK;
  }
  return KS_FAIL(KS_EDATA,
                 "%s:%" PRId64 ": row %" PRId64 " %s; correct it, or allow invalid rows to be skipped",
                 params->path, row->line, row->row, reason);
}

static bool is_blank(const char *text) {
  return !text || text[strspn(text, " \t\r\n")] == '\0';
}

static ks_status refuse_missing(const ks_import_params *params, const ks_import_row *row, const char *what,
                                const char *field, const char *has, bool present, ks_dataset *d) {
  ks_text reason = {0};
  ks_status status = present
                         ? ks_text_addf(&reason, "has an empty %s (field '%s')", what, field)
                         : ks_text_addf(&reason, "has no %s (field '%s'; the row has %s)", what, field, has);
  if (status == KS_OK) status = ks_import_refuse(params, row, reason.data, d);
  ks_text_free(&reason);
  return status;
}

ks_status ks_import_add(const ks_import_params *params, const ks_import_row *row, const char *has,
                        ks_dataset *d) {
  if (is_blank(row->question))
    return refuse_missing(params, row, "question", params->question_field, has, row->question, d);
  if (is_blank(row->response))
    return refuse_missing(params, row, "response", params->response_field, has, row->response, d);
  if (params->preferred_field && is_blank(row->preferred))
    return refuse_missing(params, row, "preferred response", params->preferred_field, has, row->preferred, d);
  const char *topic = is_blank(row->topic) ? NULL : row->topic;
  const char *preferred = params->preferred_field ? row->preferred : row->response;
  if (is_blank(row->input)) return ks_dataset_add(d, row->question, row->response, preferred, topic, false);
  ks_text question = {0};
  ks_status status = ks_text_addf(&question, "%s\n%s", row->question, row->input);
  if (status == KS_OK) status = ks_dataset_add(d, question.data, row->response, preferred, topic, false);
  ks_text_free(&question);
  return status;
}
