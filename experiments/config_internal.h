/* The parts of the configuration: schema (config_schema.c), file reading (config_file.c), loading and checks
 * (config.c), matrix (config_matrix.c). Not for others. */
#ifndef KS_CONFIG_INTERNAL_H
#define KS_CONFIG_INTERNAL_H

#include "experiments/config.h"

/* ---------------------------------------------------------------- schema */

typedef enum {
  KS_TYPE_INT,
  KS_TYPE_FLOAT,
  KS_TYPE_BOOL,
  KS_TYPE_STRING,
  KS_TYPE_ENUM,
  KS_TYPE_PATH
} ks_key_type;
enum { KS_HOST = 1, KS_SHARED = 2, KS_TRAINING = 4, KS_STORAGE = 8, KS_WRITING = 16 };

typedef struct {
  const char *path;  /* "train.learning_rate" */
  const char *group; /* "train", "" */
  const char *name;
  ks_key_type type;
  unsigned flags;
  const char *label; /* NULL: not an axis */
  const char *unit, *def, *range, *help;
  size_t offset; /* in ks_config */
} ks_key;
typedef struct {
  const char *name, *help;
} ks_key_group;

extern const ks_key ks_keys[];
extern const int ks_n_keys;
extern const ks_key_group ks_key_groups[];
extern const int ks_n_key_groups;

int ks_key_find(const char *path);                       /* index, or -1 */
const ks_key_group *ks_key_group_find(const char *name); /* or NULL */
/* Nearest key, or group when `groups`; NULL when nothing is near. */
const char *ks_key_nearest(const char *word, bool groups);
const char *ks_key_type_name(ks_key_type t);
/* Name of the i-th value of an enum key as a span, or NULL past the end. */
const char *ks_key_enum_value(const ks_key *k, int i, size_t *n);

typedef union {
  int64_t i;
  double f;
  bool b;
  const char *s;
} ks_value;

enum { KS_WHY_BYTES = 512 };
/* From text as after --set key= (one value). STRING and PATH: *out points to text. False: why says what is
 * wrong. */
bool ks_value_parse(const ks_key *k, const char *text, ks_value *out, char why[KS_WHY_BYTES]);
/* Range, UTF-8. */
bool ks_value_check(const ks_key *k, ks_value v, char why[KS_WHY_BYTES]);
bool ks_value_equal(const ks_key *k, ks_value a, ks_value b);
void ks_value_store(const ks_key *k, ks_value v, ks_config *c);
ks_value ks_value_of(const ks_key *k, const ks_config *c);
/* As libconfig writes it: quoted strings, floats that round-trip. */
ks_status ks_value_write(const ks_key *k, ks_value v, ks_text *out);
/* As it stands in a cell's name, after the label. */
ks_status ks_value_write_short(const ks_key *k, ks_value v, ks_text *out);

/* ---------------------------------------------------------------- strings that live as long as the matrix */

typedef struct {
  char **blocks;
  size_t n, cap;
} ks_strings;
/* A copy owned by `a`. */
ks_status ks_strings_add(ks_strings *a, const char *s, const char **out);
void ks_strings_free(ks_strings *a);

/* ---------------------------------------------------------------- problems: all errors of one pass */

typedef struct {
  ks_text text; /* lines */
  int64_t n;
  ks_status status; /* first failure of our own (memory, reading), else KS_OK */
} ks_problems;
/* Adds the line `where: text`, once. */
void ks_problem(ks_problems *p, const char *where, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---------------------------------------------------------------- settings: what each key was given */

typedef struct {
  ks_value *values; /* [n] */
  int64_t n;
  const char *where; /* "file:12" or "--set key=value"; NULL: the default */
} ks_setting;
typedef struct {
  ks_setting *of; /* [ks_n_keys] */
  ks_strings *strings;
  ks_problems *problems;
} ks_settings;
/* Where a path value was written; decides what it is relative to. folder: of the file; NULL: after --set
 * (current directory), or the default (root). */
typedef enum { KS_FROM_DEFAULT, KS_FROM_FILE, KS_FROM_SET } ks_origin;
/* Replaces a key's values. path values are resolved. values: [n], copied. */
void ks_setting_replace(ks_settings *s, int key, const ks_value *values, int64_t n, const char *where,
                        ks_origin origin, const char *folder);
/* Reads a file with everything it includes into `s`; errors go to its problems. False: it could not be read
 * as a whole. */
bool ks_config_read_file(const char *path, ks_settings *s);

/* ---------------------------------------------------------------- matrix */

/* Crosses the settings' axes into m->cells, names them, adds floor and ceiling. KS_ECONFIG when there are too
 * many. */
ks_status ks_matrix_build(ks_settings *s, ks_matrix *m);
/* Names that must exist in the library's tables, files that must be there: key by key, every value. */
void ks_settings_check(const ks_settings *s);
/* Problems between the keys of one cell. */
void ks_config_check(const ks_config *c, const ks_settings *s);

#endif
