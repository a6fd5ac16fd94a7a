/* Inside of this room: what its files share. Not for others.
 *
 * HDF5 works on memory only when a file is made (core driver): the finished image is sealed and written by
 * core/base, so that a full disk never meets HDF5, which cannot give up a file that it failed to flush. The
 * seal is a block of 512 bytes before the HDF5 data, as HDF5 allows for:
 *
 *   keepsake record\nschema 1\nbytes 123456\nsha256 <of the bytes after this block>\n ... zeros
 *
 * It is checked before HDF5 sees a file, so that damage and truncation are found by us; what passes is still
 * checked for types and sizes before it is read.
 */
#ifndef KS_RECORD_H5_H
#define KS_RECORD_H5_H

#include "core/record/record.h"

#include <hdf5.h>

enum { KS_SEAL_BYTES = 512 };

/* Every public function runs between these: one thread at a time (HDF5 may be built without locks), and HDF5
 * does not print. */
void ks_h5_enter(void);
void ks_h5_leave(void);

/* Closes any handle and sets it to -1; does nothing below 0. */
void ks_h5_close(hid_t *id);
/* "path: cannot <what> (HDF5: <its innermost reason>)<remedy>". Call it right after the failure. */
ks_status ks_h5_fail(const char *file, int line, ks_status status, const char *path, const char *what,
                     const char *name);
/* Making an image fails for want of memory only; reading fails because of the file. */
#define KS_H5_MAKE_FAIL(path, what, name) ks_h5_fail(__FILE__, __LINE__, KS_ENOMEM, (path), (what), (name))
#define KS_H5_READ_FAIL(path, what, name) ks_h5_fail(__FILE__, __LINE__, KS_EDATA, (path), (what), (name))

/* An open results file, read only, or the image of one to be made. */
typedef struct {
  const char *path; /* borrowed */
  hid_t file;
  size_t n_bytes; /* of an opened file: no string or table can be larger */
} ks_h5;

/* Checks the seal, opens. kind: "record" or "index". KS_EDATA: foreign, damaged, other schema; KS_EIO. */
ks_status ks_h5_open(const char *path, const char *kind, ks_h5 *out);
ks_status ks_h5_make(const char *path, ks_h5 *out);
/* Seals the image and writes it atomically to its path. */
ks_status ks_h5_write(ks_h5 *h, const char *kind);
void ks_h5_end(ks_h5 *h);

/* A group, dataset by its absolute path, reached by hard links only (links to other files are not followed).
 */
ks_status ks_h5_open_object(const ks_h5 *h, const char *name, H5I_type_t type, hid_t *out);
bool ks_h5_has(const ks_h5 *h, const char *name);
ks_status ks_h5_make_group(const ks_h5 *h, const char *name, hid_t *out);

/* Variable-length UTF-8. */
hid_t ks_h5_string_type(void);
ks_status ks_h5_put_text(const ks_h5 *h, hid_t object, const char *name, const char *value);
ks_status ks_h5_get_text(const ks_h5 *h, hid_t object, const char *name, char **value);
ks_status ks_h5_put_i64(const ks_h5 *h, hid_t object, const char *name, int64_t value);
ks_status ks_h5_get_i64(const ks_h5 *h, hid_t object, const char *name, int64_t *value);
/* A text as a dataset of its own. */
ks_status ks_h5_put_text_dataset(const ks_h5 *h, const char *name, const char *value);
ks_status ks_h5_get_text_dataset(const ks_h5 *h, const char *name, char **value);

/* Valid UTF-8 for any bytes: *fixed is NULL when s is valid already, else a copy with U+FFFD in place of each
 * wrong byte; free(). */
ks_status ks_h5_clean_text(const char *s, char **fixed);

/* Memory for the strings of one read: at most `budget` bytes, and all of it can be given back when the read
 * fails. */
typedef struct {
  void **blocks;
  size_t n, cap, budget;
} ks_h5_strings;
/* A transfer list that takes strings from s; ks_h5_close it. */
hid_t ks_h5_strings_transfer(ks_h5_strings *s);
/* keep: the strings now belong to whoever read them; otherwise they are freed. */
void ks_h5_strings_end(ks_h5_strings *s, bool keep);

/* ---- tables (schema.c) */

typedef enum { KS_COL_i64, KS_COL_i32, KS_COL_f64, KS_COL_str } ks_column_type;
typedef struct {
  const char *name;
  ks_column_type type;
  size_t offset; /* in the row struct */
  const char *what;
} ks_column;
typedef struct {
  const char *path;
  size_t row_bytes;
  const ks_column *columns;
  int n_columns;
} ks_table_schema;
const ks_table_schema *ks_table_schema_of(ks_table t);

ks_status ks_table_make(const ks_h5 *h, ks_table t);
ks_status ks_table_append(const ks_h5 *h, ks_table t, const void *rows, int64_t n);
/* KS_EDATA unless the dataset is as ks_table_make made it. Open handle in *dataset. */
ks_status ks_table_open(const ks_h5 *h, ks_table t, hid_t *dataset, int64_t *n_rows);
ks_status ks_table_read(const ks_h5 *h, ks_table t, void **rows, int64_t *n);

/* ---- names and values (record.c) */

/* Checks schema and status; *status may be NULL. */
ks_status ks_record_open(const char *path, ks_h5 *h, ks_run_status *status);
ks_status ks_record_get_meta(const ks_h5 *h, const char *group, ks_record_info *out);

#endif
