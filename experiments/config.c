#include "experiments/config_internal.h"
#include "experiments/paths.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---------------------------------------------------------------- strings, problems */

ks_status ks_strings_add(ks_strings *a, const char *s, const char **out) {
  if (a->n == a->cap) {
    size_t cap = a->cap ? 2 * a->cap : 64;
    char **p = realloc(a->blocks, cap * sizeof *p);
    if (!p) return KS_FAIL(KS_ENOMEM, "configuration: no memory for its strings");
    a->blocks = p;
    a->cap = cap;
  }
  KS_TRY(ks_strdup(s, &a->blocks[a->n]));
  *out = a->blocks[a->n++];
  return KS_OK;
}

void ks_strings_free(ks_strings *a) {
  for (size_t i = 0; a && i < a->n; i++)
    free(a->blocks[i]);
  if (a) free(a->blocks);
}

void ks_problem(ks_problems *p, const char *where, const char *fmt, ...) {
  char text[1024];
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  ks_text line = {0};
  ks_status s = ks_text_addf(&line, "%s%s%s", where ? where : "", where ? ": " : "", text);
  const char *found = s == KS_OK && p->text.data ? strstr(p->text.data, line.data) : NULL;
  bool repeated =
      found && (found[line.len] == '\n' || !found[line.len]) && (found == p->text.data || found[-1] == '\n');
  if (s == KS_OK && !repeated) {
    if (p->n > 0) s = ks_text_add(&p->text, "\n", 1);
    if (s == KS_OK) s = ks_text_add(&p->text, line.data, line.len);
    p->n++;
  }
  if (s != KS_OK && p->status == KS_OK) p->status = s;
  ks_text_free(&line);
}

/* ---------------------------------------------------------------- paths */

/* Removes "." and resolves ".." in an absolute path, by its text alone: links stay as the user named them. */
static void normalise(char *path) {
  char *out = path;
  for (char *in = path; *in;) {
    size_t n = strcspn(in + 1, "/");
    bool none = n == 0 || (n == 1 && in[1] == '.');
    if (n == 2 && in[1] == '.' && in[2] == '.') {
      while (out > path && *--out != '/') {
      }
    } else if (!none) {
      memmove(out, in, n + 1);
      out += n + 1;
    }
    in += n + 1;
  }
  if (out == path) *out++ = '/';
  *out = 0;
}

static bool has_datasets(const char *folder) {
  char path[PATH_MAX + 16];
  snprintf(path, sizeof path, "%s/datasets", folder);
  if (!ks_dir_exists(path)) return false;
  snprintf(path, sizeof path, "%s/configs", folder);
  return ks_dir_exists(path);
}

const char *ks_project_root(void) {
  static char root[PATH_MAX + 1];
  if (root[0]) return root;
  const char *given = getenv("KS_ROOT");
  char path[PATH_MAX] = "";
  if (given && *given && realpath(given, root)) return root;
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
  path[n > 0 ? n : 0] = 0;
  for (char *slash; (slash = strrchr(path, '/')) && slash > path;) {
    *slash = 0;
    if (has_datasets(path)) return memcpy(root, path, strlen(path) + 1);
  }
  if (!has_datasets(KS_SOURCE_DIR) && getcwd(root, sizeof root) && has_datasets(root)) return root;
  return snprintf(root, sizeof root, "%s", KS_SOURCE_DIR), root;
}

static ks_status join_absolute(const char *base, const char *path, ks_text *out) {
  char cwd[PATH_MAX];
  if (*base != '/') {
    if (!getcwd(cwd, sizeof cwd))
      return KS_FAIL(KS_EIO, "the current directory cannot be read; change to one that exists");
    KS_TRY(ks_text_addf(out, "%s/", cwd));
  }
  return ks_text_addf(out, "%s/%s", base, path);
}

/* The rule of config.h. */
static ks_status resolve_path(const ks_key *k, const char *path, ks_origin origin, const char *folder,
                              ks_strings *strings, const char **out) {
  ks_text text = {0};
  const char *home = getenv("HOME");
  ks_status s;
  bool dotted = strncmp(path, "./", 2) == 0 || strncmp(path, "../", 3) == 0 || strcmp(path, ".") == 0 ||
                strcmp(path, "..") == 0;
  if (strncmp(path, "~/", 2) == 0 && home && *home == '/')
    s = ks_text_addf(&text, "%s%s", home, path + 1);
  else if (!*path || *path == '/' || strcmp(k->range, "output") == 0)
    s = ks_text_add_str(&text, path);
  else if (origin == KS_FROM_SET)
    s = join_absolute(".", path, &text);
  else if (origin == KS_FROM_FILE && dotted)
    s = join_absolute(folder, path, &text);
  else
    s = join_absolute(ks_project_root(), path, &text);
  if (s == KS_OK && text.data && *text.data == '/') normalise(text.data);
  if (s == KS_OK) s = ks_strings_add(strings, text.data ? text.data : "", out);
  ks_text_free(&text);
  return s;
}

/* ---------------------------------------------------------------- settings */

void ks_setting_replace(ks_settings *s, int key, const ks_value *values, int64_t n, const char *where,
                        ks_origin origin, const char *folder) {
  const ks_key *k = &ks_keys[key];
  ks_value *copy = NULL;
  ks_status status = ks_alloc_array(&copy, (size_t)n, sizeof *copy, "values of a configuration key");
  for (int64_t i = 0; status == KS_OK && i < n; i++) {
    copy[i] = values[i];
    if (k->type == KS_TYPE_PATH)
      status = resolve_path(k, values[i].s, origin, folder, s->strings, &copy[i].s);
    else if (k->type == KS_TYPE_STRING)
      status = ks_strings_add(s->strings, values[i].s, &copy[i].s);
    for (int64_t j = 0; status == KS_OK && j < i; j++)
      if (ks_value_equal(k, copy[i], copy[j])) {
        ks_problem(s->problems, where, "%s: the same value stands in the list twice", k->path);
        break;
      }
  }
  if (status != KS_OK) {
    if (s->problems->status == KS_OK) s->problems->status = status;
    free(copy);
    return;
  }
  free(s->of[key].values);
  s->of[key] = (ks_setting){copy, n, where};
}

static void set_defaults(ks_settings *s) {
  char why[KS_WHY_BYTES];
  for (int i = 0; i < ks_n_keys; i++) {
    ks_value v;
    KS_ASSERT(ks_value_parse(&ks_keys[i], ks_keys[i].def, &v, why));
    ks_setting_replace(s, i, &v, 1, NULL, KS_FROM_DEFAULT, NULL);
  }
}

/* Takes brackets off "[1, 2]" and quotes off "\"x\"" in place; returns the inner text without blanks around
 * it. */
static char *strip(char *text, char open, char close) {
  while (*text == ' ')
    text++;
  size_t n = strlen(text);
  while (n > 0 && text[n - 1] == ' ')
    text[--n] = 0;
  if (n >= 2 && text[0] == open && text[n - 1] == close) {
    text[n - 1] = 0;
    text++;
  }
  return text;
}

static void set_value(ks_settings *s, int key, const char *where, char *text) {
  const ks_key *k = &ks_keys[key];
  ks_value *values = NULL;
  int64_t n = 0, n_max = 1;
  char why[KS_WHY_BYTES];
  if (k->label) text = strip(text, '[', ']');
  for (const char *p = text; k->label && *p; p++)
    n_max += *p == ',';
  ks_status status = ks_alloc_array(&values, (size_t)n_max, sizeof *values, "values after --set");
  if (status != KS_OK && s->problems->status == KS_OK) s->problems->status = status;
  bool good = status == KS_OK;
  for (char *next = text; good && next;) {
    char *comma = k->label ? strchr(next, ',') : NULL;
    if (comma) *comma = 0;
    bool verbatim = !k->label && (k->type == KS_TYPE_STRING || k->type == KS_TYPE_PATH);
    char *one = verbatim ? next : strip(next, '"', '"');
    if (!ks_value_parse(k, one, &values[n], why)) {
      ks_problem(s->problems, where, "%s", why);
      good = false;
    }
    n++;
    next = comma ? comma + 1 : NULL;
  }
  if (good) ks_setting_replace(s, key, values, n, where, KS_FROM_SET, NULL);
  free(values);
}

static void apply_set(ks_settings *s, const char *given) {
  ks_text line = {0};
  const char *where = NULL;
  char *key_text = NULL;
  ks_status status = ks_text_addf(&line, "--set %s", given);
  if (status == KS_OK) status = ks_strings_add(s->strings, line.data, &where);
  if (status == KS_OK) status = ks_strdup(given, &key_text);
  ks_text_free(&line);
  if (status != KS_OK) {
    if (s->problems->status == KS_OK) s->problems->status = status;
    return;
  }
  char *equals = strchr(key_text, '=');
  if (equals) *equals = 0;
  int key = ks_key_find(key_text);
  const char *nearest = key < 0 ? ks_key_nearest(key_text, false) : NULL;
  if (!equals)
    ks_problem(s->problems, where, "wants key=value");
  else if (key >= 0)
    set_value(s, key, where, equals + 1);
  else if (nearest)
    ks_problem(s->problems, where, "%s: no such key; did you mean %s?", key_text, nearest);
  else
    ks_problem(s->problems, where, "%s: no such key (keepsake explain lists them)", key_text);
  free(key_text);
}

/* ---------------------------------------------------------------- loading */

/* Name and output of the experiment, when they were not given. */
static ks_status fill_names(ks_settings *s, const char *path, ks_matrix *m) {
  int name_key = ks_key_find("experiment.name"), output_key = ks_key_find("experiment.output");
  const char *name = s->of[name_key].values[0].s, *output = s->of[output_key].values[0].s;
  const char *slash = path ? strrchr(path, '/') : NULL, *stem = !path ? "default" : slash ? slash + 1 : path;
  size_t n = strlen(stem);
  if (n > 4 && strcmp(stem + n - 4, ".cfg") == 0) n -= 4;
  KS_TRY(*name ? ks_strdup(name, &m->name) : ks_strndup(stem, n, &m->name));
  if (strspn(m->name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") !=
          strlen(m->name) ||
      *m->name == '.')
    ks_problem(s->problems, s->of[name_key].where,
               "experiment.name: \"%s\" is no plain file name; use letters, digits, '.', '_' and '-'",
               m->name);
  if (*output) return ks_strdup(output, &m->output);
  return ks_path_join("results", m->name, &m->output);
}

static ks_status set_string(ks_settings *s, const char *key, const char *value) {
  int k = ks_key_find(key);
  ks_setting_replace(s, k, &(ks_value){.s = value}, 1, s->of[k].where, KS_FROM_DEFAULT, NULL);
  return s->problems->status;
}

/* A model that is one file has its tokenizer beside it: named here, so that the resolved text says which. */
static ks_status fill_tokenizer(ks_settings *s) {
  const ks_setting *model = &s->of[ks_key_find("model.path")],
                   *tokenizer = &s->of[ks_key_find("model.tokenizer")];
  char *found = NULL;
  if (*tokenizer->values[0].s || !ks_file_exists(model->values[0].s)) return KS_OK;
  ks_status status = ks_tokenizer_path_find(NULL, model->values[0].s, &found);
  if (status == KS_ECONFIG)
    ks_problem(s->problems, model->where, "model.tokenizer: none beside %s; name it", model->values[0].s);
  else if (status != KS_OK)
    return status;
  if (found) status = set_string(s, "model.tokenizer", found);
  free(found);
  return status == KS_ECONFIG ? KS_OK : status;
}

static ks_status text_of(const ks_settings *settings, const ks_config *c, bool for_results, ks_text *out) {
  const char *group = "";
  for (int i = 0; i < ks_n_keys; i++) {
    const ks_key *k = &ks_keys[i];
    if (for_results && (k->flags & KS_HOST)) continue;
    if (strcmp(k->group, group) != 0) {
      if (*group) KS_TRY(ks_text_add_str(out, "};\n"));
      if (*k->group) KS_TRY(ks_text_addf(out, "%.*s: {\n", (int)strlen(k->group) - 1, k->group));
      group = k->group;
    }
    KS_TRY(ks_text_addf(out, "%s%s = ", *group ? "  " : "", k->name));
    int64_t n = settings ? settings->of[i].n : 1;
    if (n > 1) KS_TRY(ks_text_add_str(out, "(")); /* [...] cannot mix integers with and without L */
    for (int64_t j = 0; j < n; j++) {
      if (j) KS_TRY(ks_text_add_str(out, ", "));
      KS_TRY(ks_value_write(k, settings ? settings->of[i].values[j] : ks_value_of(k, c), out));
    }
    KS_TRY(ks_text_add_str(out, n > 1 ? ");\n" : ";\n"));
  }
  return *group ? ks_text_add_str(out, "};\n") : KS_OK;
}

ks_status ks_config_text(const ks_config *c, bool for_results, ks_text *out) {
  return text_of(NULL, c, for_results, out);
}

ks_ctx_params ks_config_ctx_params(const ks_config *c) {
  return (ks_ctx_params){.backend = c->run.backend,
                         .n_threads = (int)c->run.threads,
                         .isa = c->run.isa,
                         .activations = c->model.dtype == KS_DTYPE_F32 ? KS_DTYPE_F32 : KS_DTYPE_BF16,
                         .variants = c->run.variants[0] ? c->run.variants : NULL};
}

bool ks_config_same_cohort(const ks_config *a, const ks_config *b) {
  for (int i = 0; i < ks_n_keys; i++)
    if ((ks_keys[i].flags & KS_SHARED) &&
        !ks_value_equal(&ks_keys[i], ks_value_of(&ks_keys[i], a), ks_value_of(&ks_keys[i], b)))
      return false;
  return true;
}

static ks_status problems_status(const ks_problems *p) {
  if (p->status != KS_OK) return p->status;
  if (p->n == 0) return KS_OK;
  return KS_FAIL(KS_ECONFIG, "%s", p->text.data);
}

static ks_status load(ks_settings *s, const char *path, const char *const *sets, int64_t n_sets,
                      ks_matrix *m) {
  set_defaults(s);
  bool whole = !path || ks_config_read_file(path, s);
  for (int64_t i = 0; i < n_sets; i++)
    apply_set(s, sets[i]);
  KS_TRY(fill_names(s, path, m));
  if (whole) ks_settings_check(s);
  if (whole) KS_TRY(fill_tokenizer(s));
  KS_TRY(problems_status(s->problems));
  KS_TRY(set_string(s, "experiment.name", m->name));
  KS_TRY(set_string(s, "experiment.output", m->output));
  KS_TRY_AS(ks_matrix_build(s, m), "%s", path ? path : "--set");
  for (int64_t i = 0; i < m->n_cells; i++)
    ks_config_check(&m->cells[i].config, s);
  KS_TRY(problems_status(s->problems));
  ks_text text = {0};
  ks_status status = text_of(s, NULL, false, &text);
  m->text = text.data;
  return status;
}

ks_status ks_config_load(const char *path, const char *const *sets, int64_t n_sets, ks_matrix **out) {
  *out = NULL;
  ks_matrix *m = calloc(1, sizeof *m);
  ks_strings *strings = calloc(1, sizeof *strings);
  ks_problems problems = {0};
  ks_settings s = {.strings = strings, .problems = &problems};
  ks_status status = ks_alloc_array(&s.of, (size_t)ks_n_keys, sizeof *s.of, "configuration");
  if (!m || !strings) status = KS_FAIL(KS_ENOMEM, "configuration: no memory");
  if (m) m->arena = strings;
  if (status == KS_OK) status = load(&s, path, sets, n_sets, m);
  for (int i = 0; s.of && i < ks_n_keys; i++)
    free(s.of[i].values);
  free(s.of);
  ks_text_free(&problems.text);
  if (status == KS_OK) {
    *out = m;
  } else {
    if (!m) free(strings);
    ks_matrix_destroy(m);
  }
  return status;
}

void ks_matrix_destroy(ks_matrix *m) {
  if (!m) return;
  for (int64_t i = 0; i < m->n_cells; i++)
    free(m->cells[i].name);
  free(m->cells);
  free(m->name);
  free(m->output);
  free(m->text);
  ks_strings_free(m->arena);
  free(m->arena);
  free(m);
}
