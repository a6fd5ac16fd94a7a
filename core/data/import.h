/* What the file importers share. Internal to core/data. */
#ifndef KS_IMPORT_H
#define KS_IMPORT_H

#include "core/data/data.h"

/* One row as an importer found it; NULL: the row has no such field. Borrowed. */
typedef struct {
  int64_t row;  /* 1-based */
  int64_t line; /* of the file, 1-based */
  const char *question, *input, *response, *preferred, *topic;
} ks_import_row;

/* params with NULL fields replaced by the importer's own (input, preferred, topic may stay NULL). */
ks_import_params ks_import_with_fields(const ks_import_params *params, const char *question,
                                       const char *input, const char *response);
/* The whole file (free()), its hash in d->sha256; *text is behind a byte order mark, if any. Empty, not UTF-8
 * or with a NUL byte: KS_EDATA. */
ks_status ks_import_read(const ks_import_params *params, ks_dataset *d, char **bytes, const char **text,
                         size_t *n);
/* Adds the row; question = question [+ "\n" + input]. A row without question or response is skipped and
 * counted, or KS_EDATA. `has`: what the row holds instead, for the message. */
ks_status ks_import_add(const ks_import_params *params, const ks_import_row *row, const char *has,
                        ks_dataset *d);
/* Counts a row that is skipped, or refuses it with this reason. */
ks_status ks_import_refuse(const ks_import_params *params, const ks_import_row *row, const char *reason,
                           ks_dataset *d);
/* Enough rows? */
bool ks_import_full(const ks_import_params *params, const ks_dataset *d);

ks_status ks_import_alpaca(const ks_import_params *params, ks_dataset *out);
ks_status ks_import_json(const ks_import_params *params, ks_dataset *out);
ks_status ks_import_jsonl(const ks_import_params *params, ks_dataset *out);
ks_status ks_import_csv(const ks_import_params *params, ks_dataset *out);
ks_status ks_import_tsv(const ks_import_params *params, ks_dataset *out);

#endif
