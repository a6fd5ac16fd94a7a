/* A configuration file as one text for libconfig, with what libconfig does not tell found beforehand:
 * integers that it would wrap silently, bytes that are no text, includes that never end. Includes are put in
 * place here, so that every version of libconfig sees the same text, and every line remembers its file. */
#include "experiments/config_internal.h"

#include <ctype.h>
#include <errno.h>
#include <libconfig.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

enum { MAX_INCLUDE_DEPTH = 10, MAX_FILE_BYTES = 1 << 20, MAX_LINES = 1 << 20, WHERE_BYTES = 1024 };

typedef struct {
  const char *file; /* as the user named it */
  const char *folder;
  int line;
  bool wraps; /* holds an integer that libconfig would change; reported already */
} source_line;

typedef struct {
  ks_settings *settings;
  ks_text text;
  source_line *lines; /* of text, [n_lines] */
  size_t n_lines, cap_lines;
  const char *chain[MAX_INCLUDE_DEPTH + 1]; /* files being read, outermost first */
  int depth;
  bool wraps;  /* the line being scanned holds such an integer */
  bool broken; /* libconfig must not see the text */
} reader;

static void where_line(char out[WHERE_BYTES], const char *file, int line) {
  snprintf(out, WHERE_BYTES, "%s:%d", file, line);
}

static void failed(reader *r, ks_status s) {
  if (s != KS_OK && r->settings->problems->status == KS_OK) r->settings->problems->status = s;
  if (s != KS_OK) r->broken = true;
}

static void add_line(reader *r, const char *bytes, size_t n, const char *file, const char *folder, int line) {
  if (r->n_lines == r->cap_lines) {
    size_t cap = r->cap_lines ? 2 * r->cap_lines : 256;
    source_line *p = cap <= MAX_LINES ? realloc(r->lines, cap * sizeof *p) : NULL;
    if (!p) {
      failed(r,
             KS_FAIL(KS_ENOMEM, "%s: no memory for more than %zu lines of configuration", file, r->n_lines));
      return;
    }
    r->lines = p;
    r->cap_lines = cap;
  }
  r->lines[r->n_lines++] = (source_line){file, folder, line, r->wraps};
  failed(r, ks_text_add(&r->text, bytes, n));
  failed(r, ks_text_add(&r->text, "\n", 1));
}

/* ---------------------------------------------------------------- scanning */

typedef enum { IN_CODE, IN_COMMENT, IN_STRING } scan_state;

/* An integer literal at s that libconfig 1.5 would wrap: without L past 32 bits, with L past 64. */
static void check_integer(reader *r, const char *s, size_t n, const char *where) {
  char literal[64];
  snprintf(literal, sizeof literal, "%.*s", (int)ks_min_i64((int64_t)n, 63), s);
  const char *digits = literal + (literal[0] == '-' || literal[0] == '+');
  bool hex = digits[0] == '0' && (digits[1] == 'x' || digits[1] == 'X');
  if (!isdigit((unsigned char)digits[0]) || (!hex && strpbrk(literal, ".eE"))) return;
  char *end;
  errno = 0;
  long long v = strtoll(literal, &end, hex ? 16 : 10);
  bool too_long = errno == ERANGE, is_long = *end == 'L';
  if (end[strspn(end, "L")]) return; /* no number at all: libconfig says so */
  r->wraps = r->wraps || too_long || (!is_long && (v > INT_MAX || v < INT_MIN));
  if (too_long)
    ks_problem(r->settings->problems, where, "the integer %s does not fit 64 bits", literal);
  else if (!is_long && (v > INT_MAX || v < INT_MIN))
    ks_problem(r->settings->problems, where, "the integer %s does not fit 32 bits; write %sL", literal,
               literal);
}

/* Scans one line from `state`, checking numbers; returns the state after it. */
static scan_state scan_line(reader *r, scan_state state, const char *s, size_t n, const char *where) {
  for (size_t i = 0; i < n; i++) {
    unsigned char c = (unsigned char)s[i], next = i + 1 < n ? (unsigned char)s[i + 1] : 0;
    if (state == IN_COMMENT) {
      if (c == '*' && next == '/') state = IN_CODE, i++;
    } else if (state == IN_STRING) {
      if (c == '\\') i++;
      if (c == '"') state = IN_CODE;
    } else if (c == '"') {
      state = IN_STRING;
    } else if (c == '#' || (c == '/' && next == '/')) {
      return state;
    } else if (c == '/' && next == '*') {
      state = IN_COMMENT, i++;
    } else if (isalpha(c) || c == '*' || c == '_') {
      while (i + 1 < n && (isalnum((unsigned char)s[i + 1]) || strchr("-_*", s[i + 1])))
        i++;
    } else if (isdigit(c) || c == '-' || c == '+' || c == '.') {
      size_t begin = i;
      while (i + 1 < n && (isalnum((unsigned char)s[i + 1]) || s[i + 1] == '.' ||
                           (strchr("+-", s[i + 1]) && (s[i] == 'e' || s[i] == 'E'))))
        i++;
      check_integer(r, s + begin, i + 1 - begin, where);
    }
  }
  return state;
}

/* ---------------------------------------------------------------- files and includes */

static void read_file(reader *r, const char *path, const char *where);

/* The folder of a path, "." when it has none. */
static const char *folder_of(reader *r, const char *path) {
  const char *slash = strrchr(path, '/'), *out = ".";
  if (!slash) return out;
  char *copy = NULL;
  ks_status s = ks_strndup(path, slash == path ? 1 : (size_t)(slash - path), &copy);
  if (s == KS_OK) s = ks_strings_add(r->settings->strings, copy, &out);
  free(copy);
  failed(r, s);
  return out;
}

/* When the line is an @include, reads what it names and returns true. */
static bool include_line(reader *r, const char *s, size_t n, const char *folder, const char *where) {
  size_t i = 0;
  while (i < n && (s[i] == ' ' || s[i] == '\t'))
    i++;
  if (n - i < 8 || strncmp(s + i, "@include", 8) != 0) return false;
  const char *open = memchr(s + i, '"', n - i);
  const char *close = open ? memchr(open + 1, '"', (size_t)(s + n - open - 1)) : NULL;
  if (!close || close == open + 1) {
    ks_problem(r->settings->problems, where, "@include wants a file name in quotes: @include \"common.cfg\"");
    r->broken = true;
    return true;
  }
  ks_text path = {0};
  const char *kept = NULL;
  ks_status status = KS_OK;
  if (open[1] != '/' && strcmp(folder, ".") != 0) status = ks_text_addf(&path, "%s/", folder);
  if (status == KS_OK) status = ks_text_add(&path, open + 1, (size_t)(close - open - 1));
  if (status == KS_OK) status = ks_strings_add(r->settings->strings, path.data, &kept);
  ks_text_free(&path);
  failed(r, status);
  if (kept) read_file(r, kept, where);
  return true;
}

/* Whether the file may be read now: not too deep, not inside itself. */
static bool may_enter(reader *r, const char *path, const char *where) {
  for (int i = 0; i < r->depth; i++)
    if (strcmp(r->chain[i], path) == 0) {
      ks_problem(r->settings->problems, where, "%s includes itself%s", path,
                 i + 1 < r->depth ? " by way of others" : "");
      return false;
    }
  if (r->depth > MAX_INCLUDE_DEPTH) {
    ks_problem(r->settings->problems, where, "%s: included more than %d deep", path, MAX_INCLUDE_DEPTH);
    return false;
  }
  return true;
}

static bool is_text(reader *r, const char *path, const char *bytes, size_t n) {
  size_t bad = ks_utf8_check(bytes, n), nul = strlen(bytes);
  size_t at = bad < nul ? bad : nul;
  if (at >= n) return true;
  int line = 1;
  for (size_t i = 0; i < at; i++)
    line += bytes[i] == '\n';
  char where[WHERE_BYTES];
  where_line(where, path, line);
  ks_problem(r->settings->problems, where,
             "not a text file: byte %zu is no UTF-8 text; give a configuration, e.g. configs/quickstart.cfg",
             at);
  return false;
}

static void read_lines(reader *r, const char *path, const char *bytes, size_t n) {
  const char *folder = folder_of(r, path);
  scan_state state = IN_CODE;
  int line = 0, opened = 0;
  char where[WHERE_BYTES];
  for (size_t begin = 0; begin < n && !r->broken;) {
    const char *newline = memchr(bytes + begin, '\n', n - begin);
    size_t end = newline ? (size_t)(newline - bytes) : n;
    where_line(where, path, ++line);
    if (state != IN_CODE || !include_line(r, bytes + begin, end - begin, folder, where)) {
      r->wraps = false;
      scan_state after = scan_line(r, state, bytes + begin, end - begin, where);
      if (after != IN_CODE && (state == IN_CODE || after != state)) opened = line;
      state = after;
      add_line(r, bytes + begin, end - begin, path, folder, line);
    }
    begin = end + 1;
  }
  if (state == IN_CODE || r->broken) return;
  where_line(where, path, opened);
  ks_problem(r->settings->problems, where, "the %s that begins here never ends",
             state == IN_STRING ? "string" : "comment");
  r->broken = true;
}

static void read_file(reader *r, const char *path, const char *where) {
  char *bytes = NULL;
  size_t n = 0;
  if (!may_enter(r, path, where)) {
    r->broken = true;
    return;
  }
  if (ks_dir_exists(path)) {
    ks_problem(r->settings->problems, where ? where : path, "%s%sis a folder; give a configuration file",
               where ? path : "", where ? " " : "");
    r->broken = true;
    return;
  }
  ks_status s = ks_file_read(path, MAX_FILE_BYTES, &bytes, &n);
  if (s == KS_ENOMEM) {
    failed(r, s);
  } else if (s != KS_OK) {
    char reason[WHERE_BYTES];
    snprintf(reason, sizeof reason, "%s", ks_error_message());
    ks_problem(r->settings->problems, where, "%s", reason);
    r->broken = true;
  } else if (!is_text(r, path, bytes, n)) {
    r->broken = true;
  } else {
    r->chain[r->depth++] = path;
    read_lines(r, path, bytes, n);
    r->depth--;
  }
  free(bytes);
}

/* ---------------------------------------------------------------- settings from libconfig's tree */

/* The file and line that libconfig's line of the joined text came from. */
static const source_line *source_of(const reader *r, int line, char where[WHERE_BYTES]) {
  size_t i = line < 1 ? 0 : (size_t)line - 1;
  if (i >= r->n_lines) i = r->n_lines - 1;
  where_line(where, r->lines[i].file, r->lines[i].line);
  return &r->lines[i];
}

static bool value_of_setting(const ks_key *k, const config_setting_t *s, ks_value *out, char *why) {
  const char *got = "a group";
  memset(out, 0, sizeof *out);
  switch (config_setting_type(s)) {
  case CONFIG_TYPE_INT:
  case CONFIG_TYPE_INT64: {
    int64_t v =
        config_setting_type(s) == CONFIG_TYPE_INT ? config_setting_get_int(s) : config_setting_get_int64(s);
    got = "an integer";
    if (k->type == KS_TYPE_FLOAT) return out->f = (double)v, ks_value_check(k, *out, why);
    if (k->type == KS_TYPE_INT) return out->i = v, ks_value_check(k, *out, why);
    break;
  }
  case CONFIG_TYPE_FLOAT:
    got = "a number with a point or exponent";
    if (k->type == KS_TYPE_FLOAT) return out->f = config_setting_get_float(s), ks_value_check(k, *out, why);
    break;
  case CONFIG_TYPE_BOOL:
    got = "a boolean";
    if (k->type == KS_TYPE_BOOL) return out->b = config_setting_get_bool(s), true;
    break;
  case CONFIG_TYPE_STRING:
    got = "a string";
    if (k->type == KS_TYPE_STRING || k->type == KS_TYPE_ENUM || k->type == KS_TYPE_PATH)
      return ks_value_parse(k, config_setting_get_string(s), out, why);
    break;
  default:
    got = config_setting_is_group(s) ? "a group" : "a list";
  }
  static const char *const wants[] = {"an integer", "a number", "true or false",
                                      "a string",   "a string", "a path (a string)"};
  snprintf(why, KS_WHY_BYTES, "wants %s, got %s", wants[k->type], got);
  return false;
}

static void read_setting(reader *r, int key, const config_setting_t *s) {
  const ks_key *k = &ks_keys[key];
  char where[WHERE_BYTES], why[KS_WHY_BYTES];
  const source_line *source = source_of(r, (int)config_setting_source_line(s), where);
  bool list = config_setting_is_array(s) || config_setting_is_list(s);
  int n = list ? config_setting_length(s) : 1, good = 0;
  if (list && !k->label) {
    ks_problem(r->settings->problems, where,
               "%s: takes one value; lists are for axes of the matrix (keepsake explain)", k->path);
    return;
  }
  if (n == 0) {
    ks_problem(r->settings->problems, where, "%s: an empty list; give at least one value", k->path);
    return;
  }
  ks_value *values = NULL;
  ks_status status = ks_alloc_array(&values, (size_t)n, sizeof *values, "values of a configuration key");
  failed(r, status);
  for (int i = 0; status == KS_OK && i < n; i++) {
    const config_setting_t *element = list ? config_setting_get_elem(s, (unsigned)i) : s;
    char element_where[WHERE_BYTES];
    const source_line *at = source_of(r, (int)config_setting_source_line(element), element_where);
    if (value_of_setting(k, element, &values[i], why))
      good++;
    else if (!at->wraps || !config_setting_is_number(element))
      ks_problem(r->settings->problems, element_where, "%s: %s", k->path, why);
  }
  const char *kept = NULL;
  if (good == n && status == KS_OK) {
    failed(r, ks_strings_add(r->settings->strings, where, &kept));
    if (kept) ks_setting_replace(r->settings, key, values, n, kept, KS_FROM_FILE, source->folder);
  }
  free(values);
}

static void unknown_key(reader *r, const char *path, const char *where) {
  const char *nearest = ks_key_nearest(path, false);
  if (nearest)
    ks_problem(r->settings->problems, where, "%s: no such key; did you mean %s?", path, nearest);
  else
    ks_problem(r->settings->problems, where, "%s: no such key (keepsake explain lists them)", path);
}

static void read_group(reader *r, const char *group, const config_setting_t *s) {
  int n = config_setting_length(s);
  for (int i = 0; i < n; i++) {
    const config_setting_t *member = config_setting_get_elem(s, (unsigned)i);
    const char *name = config_setting_name(member);
    char where[WHERE_BYTES], path[256];
    source_of(r, (int)config_setting_source_line(member), where);
    snprintf(path, sizeof path, "%s%s%s", group, *group ? "." : "", name ? name : "");
    int key = ks_key_find(path);
    if (key >= 0)
      read_setting(r, key, member);
    else if (!*group && ks_key_group_find(path) && config_setting_is_group(member))
      read_group(r, path, member);
    else if (!*group && ks_key_group_find(path))
      ks_problem(r->settings->problems, where, "%s: is a group; write %s: { key = value; }", path, path);
    else if (!*group && config_setting_is_group(member) && ks_key_nearest(path, true))
      ks_problem(r->settings->problems, where, "%s: no such group; did you mean %s?", path,
                 ks_key_nearest(path, true));
    else
      unknown_key(r, path, where);
  }
}

/* libconfig's errors, with what to do. */
static const char *explain_error(const char *text) {
  static const char *const known[][2] = {
      {"syntax error", "syntax error here or just before; write key = value; and group: { key = value; };"},
      {"duplicate setting name", "a key of this line stands in its group already; keep one of the two"},
      {"mismatched element type in array",
       "an array [...] holds values of one type; write (...) to mix them"},
      {"memory exhausted", "nested too deeply"}};
  for (size_t i = 0; text && i < sizeof known / sizeof *known; i++)
    if (strcmp(text, known[i][0]) == 0) return known[i][1];
  return text ? text : "cannot be read";
}

bool ks_config_read_file(const char *path, ks_settings *settings) {
  reader r = {.settings = settings};
  const char *kept = NULL;
  failed(&r, ks_strings_add(settings->strings, path, &kept));
  if (kept) read_file(&r, kept, NULL);
  if (!r.broken && r.n_lines > 0) {
    config_t config;
    config_init(&config);
    if (config_read_string(&config, r.text.data)) {
      read_group(&r, "", config_root_setting(&config));
    } else {
      char where[WHERE_BYTES];
      const char *text = config_error_text(&config);
      source_of(&r, config_error_line(&config), where);
      r.broken = true;
      ks_problem(settings->problems, where, "%s", explain_error(text));
    }
    config_destroy(&config);
  }
  ks_text_free(&r.text);
  free(r.lines);
  return !r.broken;
}
