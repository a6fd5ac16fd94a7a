#include "experiments/config_internal.h"

#include <stdio.h>
#include <string.h>

static ks_status range_text(const ks_key *k, ks_text *out) {
  switch (k->type) {
  case KS_TYPE_INT:
  case KS_TYPE_FLOAT:
    return ks_text_addf(out, "%s", k->range);
  case KS_TYPE_BOOL:
    return ks_text_add_str(out, "true, false");
  case KS_TYPE_ENUM: {
    size_t n;
    const char *v;
    for (int i = 0; (v = ks_key_enum_value(k, i, &n)); i++)
      KS_TRY(ks_text_addf(out, "%s%.*s", i ? ", " : "", (int)n, v));
    return KS_OK;
  }
  case KS_TYPE_PATH:
    return ks_text_add_str(out, strcmp(k->range, "any") == 0      ? "file or folder"
                                : strcmp(k->range, "output") == 0 ? "folder to write"
                                                                  : k->range);
  case KS_TYPE_STRING:
    return KS_OK;
  }
  return KS_OK;
}

static ks_status default_text(const ks_key *k, ks_text *out) {
  ks_value v;
  char why[KS_WHY_BYTES];
  KS_ASSERT(ks_value_parse(k, k->def, &v, why));
  return ks_value_write(k, v, out);
}

/* `  learning_rate  float  (0, 100]  [list]  0.0003` and the help below. */
static ks_status key_lines(const ks_key *k, const char *shown_as, ks_text *out) {
  ks_text range = {0}, def = {0};
  ks_status status;
  KS_TRY_OUT(range_text(k, &range));
  KS_TRY_OUT(default_text(k, &def));
  KS_TRY_OUT(ks_text_addf(out, "  %-18s %s", shown_as, ks_key_type_name(k->type)));
  if (range.len) KS_TRY_OUT(ks_text_addf(out, " %s", range.data));
  if (*k->unit) KS_TRY_OUT(ks_text_addf(out, " %s", k->unit));
  if (k->label) KS_TRY_OUT(ks_text_add_str(out, ", or a list"));
  KS_TRY_OUT(ks_text_addf(out, "; default %s\n      %s\n", def.data, k->help));
out:
  ks_text_free(&range);
  ks_text_free(&def);
  return status;
}

static ks_status group_lines(const char *group, const char *help, ks_text *out) {
  KS_TRY(ks_text_addf(out, "%s: %s\n", group, help));
  size_t n = strlen(group);
  for (int i = 0; i < ks_n_keys; i++)
    if (strncmp(ks_keys[i].group, group, n) == 0 && strcmp(ks_keys[i].group + n, ".") == 0)
      KS_TRY(key_lines(&ks_keys[i], ks_keys[i].name, out));
  return KS_OK;
}

static const char rules[] =
    "\n"
    "A list of values ([1, 2, 3] in a file, 1,2,3 after --set) makes a cell of each; several lists are "
    "crossed.\n"
    "Paths in a file: ./x and ../x from the file's folder, ~/x from $HOME, x from the project's root;\n"
    "after --set: from the current directory. experiment.output: always from the current directory.\n"
    "Override a key for one run with --set group.key=value.\n";

static ks_status explain_all(ks_text *out) {
  const char *group = NULL;
  for (int i = 0; i < ks_n_keys; i++) {
    const ks_key *k = &ks_keys[i];
    if (!*k->group) {
      KS_TRY(key_lines(k, k->name, out));
    } else if (!group || strcmp(group, k->group) != 0) {
      char name[64];
      snprintf(name, sizeof name, "%.*s", (int)strlen(k->group) - 1, k->group);
      KS_TRY(group_lines(name, ks_key_group_find(name)->help, out));
    }
    group = k->group;
  }
  return ks_text_add_str(out, rules);
}

ks_status ks_config_explain(const char *what, ks_text *out) {
  if (!what || !*what) return explain_all(out);
  const ks_key_group *group = ks_key_group_find(what);
  if (group) return group_lines(group->name, group->help, out);
  int key = ks_key_find(what);
  if (key >= 0) {
    KS_TRY(key_lines(&ks_keys[key], ks_keys[key].path, out));
    return ks_keys[key].type == KS_TYPE_PATH ? ks_text_add_str(out, rules) : KS_OK;
  }
  const char *nearest = ks_key_nearest(what, false), *near_group = ks_key_nearest(what, true);
  if (near_group && (!nearest || !strchr(what, '.'))) nearest = near_group;
  if (nearest) return KS_FAIL(KS_ECONFIG, "%s: no such key or group; did you mean %s?", what, nearest);
  return KS_FAIL(KS_ECONFIG, "%s: no such key or group; keepsake explain lists all", what);
}
