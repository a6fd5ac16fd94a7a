#include "experiments/config_internal.h"

#include "core/adapt/adapt.h"
#include "core/annotate/annotate.h"
#include "core/model/forward.h"
#include "core/synthesize/synthesize.h"
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

const ks_key ks_keys[] = {
#define KS_GROUP(name, help)
#define KS_GROUP_END(name)
#define KS_KEY(type, group, name, flags, label, unit, def, range, help)                                      \
  {#group #name,                                                                                             \
   #group,                                                                                                   \
   #name,                                                                                                    \
   KS_TYPE_##type,                                                                                           \
   (flags),                                                                                                  \
   label,                                                                                                    \
   unit,                                                                                                     \
   def,                                                                                                      \
   range,                                                                                                    \
   help,                                                                                                     \
   offsetof(ks_config, group name)},
#include "experiments/config_keys.def"
#undef KS_GROUP
#undef KS_GROUP_END
#undef KS_KEY
};
const int ks_n_keys = (int)(sizeof ks_keys / sizeof *ks_keys);

const ks_key_group ks_key_groups[] = {
#define KS_GROUP(name, help) {#name, help},
#define KS_GROUP_END(name)
#define KS_KEY(type, group, name, flags, label, unit, def, range, help)
#include "experiments/config_keys.def"
#undef KS_GROUP
#undef KS_GROUP_END
#undef KS_KEY
};
const int ks_n_key_groups = (int)(sizeof ks_key_groups / sizeof *ks_key_groups);

/* Enum keys are numbered as the library's enums; their first and last values hold the orders together. */
_Static_assert(KS_ORDER_FILE == 0 && KS_ORDER_SHUFFLED == 1 && KS_ORDER_BURSTS == 2, "stream.order");
_Static_assert(KS_POOL_LAST == 0 && KS_POOL_MEAN == 1, "select.pooling");
_Static_assert(KS_ENTROPY_HISTOGRAM == 0 && KS_ENTROPY_CLIPPED == 1 && KS_ENTROPY_SOFTMAX == 2 &&
                   KS_ENTROPY_ABS == 3,
               "select.entropy");
_Static_assert(KS_EOE_LOG_N == 0 && KS_EOE_LOG_N1 == 1, "select.eoe_norm");
_Static_assert(KS_IDD_EMPTY_ONE == 0 && KS_IDD_EMPTY_ZERO == 1 && KS_IDD_EMPTY_INF == 2, "select.idd_empty");
_Static_assert(KS_ASK_ADMISSION == 0 && KS_ASK_TRIGGER == 1, "annotate.ask");
_Static_assert(KS_SYNTH_NONE == 0 && KS_SYNTH_MODEL == 1 && KS_SYNTH_RULES == 2, "synth.writer");
_Static_assert(KS_SCHEDULE_CONSTANT == 0 && KS_SCHEDULE_LINEAR == 1 && KS_SCHEDULE_COSINE == 2,
               "train.schedule");
_Static_assert(KS_DTYPE_F32 == 0 && KS_DTYPE_BF16 == 1 && KS_DTYPE_Q8_0 == 2 && KS_DTYPE_Q4_0 == 3 && KS_DTYPE_NF4 == 4,
               "model.dtype");

int ks_key_find(const char *path) {
  for (int i = 0; i < ks_n_keys; i++)
    if (strcmp(ks_keys[i].path, path) == 0) return i;
  return -1;
}

const ks_key_group *ks_key_group_find(const char *name) {
  for (int i = 0; i < ks_n_key_groups; i++)
    if (strcmp(ks_key_groups[i].name, name) == 0) return &ks_key_groups[i];
  return NULL;
}

const char *ks_key_nearest(const char *word, bool groups) {
  const char *dot = strrchr(word, '.');
  const char *last = dot ? dot + 1 : word, *best = NULL;
  size_t best_distance = 1 + (strlen(last) < 6 ? 2 : strlen(last) / 3);
  for (int i = 0; i < (groups ? ks_n_key_groups : ks_n_keys); i++) {
    const char *name = groups ? ks_key_groups[i].name : ks_keys[i].path;
    size_t d = ks_edit_distance(word, name);
    if (!groups) { /* the right key in the wrong group is nearer than it looks */
      size_t in_other_group = ks_edit_distance(last, ks_keys[i].name) + 1;
      if (in_other_group < d) d = in_other_group;
    }
    if (d < best_distance) best_distance = d, best = name;
  }
  return best;
}

const char *ks_key_type_name(ks_key_type t) {
  static const char *const names[] = {"integer", "float", "boolean", "string", "choice", "path"};
  return names[t];
}

const char *ks_key_enum_value(const ks_key *k, int i, size_t *n) {
  const char *p = k->range;
  for (; i > 0 && p; i--)
    if ((p = strchr(p, '|'))) p++;
  if (p) *n = strcspn(p, "|");
  return p;
}

/* ---------------------------------------------------------------- values */

static bool parse_enum(const ks_key *k, const char *text, ks_value *out, char *why) {
  const char *nearest = NULL, *v;
  size_t n, nearest_n = 0, best = 4;
  for (int i = 0; (v = ks_key_enum_value(k, i, &n)); i++) {
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)n, v);
    size_t d = ks_edit_distance(text, name);
    if (d == 0) return out->i = i, true;
    if (d < best) best = d, nearest = v, nearest_n = n;
  }
  char list[256];
  size_t used = 0;
  for (int i = 0; (v = ks_key_enum_value(k, i, &n)) && used < sizeof list; i++)
    used += (size_t)snprintf(list + used, sizeof list - used, "%s%.*s", i ? ", " : "", (int)n, v);
  used = (size_t)snprintf(why, KS_WHY_BYTES, "\"%.64s\" is none of %s", text, list);
  if (nearest) snprintf(why + used, KS_WHY_BYTES - used, "; did you mean \"%.*s\"?", (int)nearest_n, nearest);
  return false;
}

static bool parse_int(const char *text, ks_value *out, char *why) {
  char *end;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  bool digits = end != text && !isspace((unsigned char)*text);
  if (digits && *end == 'L') end++;
  if (!digits || *end) return snprintf(why, KS_WHY_BYTES, "wants an integer, got \"%.64s\"", text), false;
  if (errno == ERANGE) return snprintf(why, KS_WHY_BYTES, "%.64s does not fit 64 bits", text), false;
  out->i = v;
  return true;
}

static bool parse_float(const char *text, ks_value *out, char *why) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || strspn(text, "+-.0123456789eE") != strlen(text))
    return snprintf(why, KS_WHY_BYTES, "wants a number, got \"%.64s\"", text), false;
  out->f = v;
  return true;
}

bool ks_value_parse(const ks_key *k, const char *text, ks_value *out, char why[KS_WHY_BYTES]) {
  memset(out, 0, sizeof *out);
  switch (k->type) {
  case KS_TYPE_INT:
    if (!parse_int(text, out, why)) return false;
    break;
  case KS_TYPE_FLOAT:
    if (!parse_float(text, out, why)) return false;
    break;
  case KS_TYPE_ENUM:
    return parse_enum(k, text, out, why);
  case KS_TYPE_BOOL:
    out->b = strcmp(text, "true") == 0;
    if (!out->b && strcmp(text, "false") != 0)
      return snprintf(why, KS_WHY_BYTES, "wants true or false, got \"%.64s\"", text), false;
    break;
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    out->s = text;
    break;
  }
  return ks_value_check(k, *out, why);
}

static bool in_range(const char *range, double v) {
  char open, close;
  double low, high;
  int n = sscanf(range, "%c%lf, %lf%c", &open, &low, &high, &close);
  KS_ASSERT_EQ(n, 4);
  return (open == '(' ? v > low : v >= low) && (close == ')' ? v < high : v <= high);
}

bool ks_value_check(const ks_key *k, ks_value v, char why[KS_WHY_BYTES]) {
  if (k->type == KS_TYPE_INT && !in_range(k->range, (double)v.i))
    return snprintf(why, KS_WHY_BYTES, "%lld is outside %s", (long long)v.i, k->range), false;
  if (k->type == KS_TYPE_FLOAT && !in_range(k->range, v.f))
    return snprintf(why, KS_WHY_BYTES, "%g is outside %s", v.f, k->range), false;
  if (k->type == KS_TYPE_STRING || k->type == KS_TYPE_PATH) {
    size_t n = strlen(v.s), bad = ks_utf8_check(v.s, n);
    if (bad < n) return snprintf(why, KS_WHY_BYTES, "not UTF-8 at byte %zu of its value", bad), false;
  }
  return true;
}

bool ks_value_equal(const ks_key *k, ks_value a, ks_value b) {
  switch (k->type) {
  case KS_TYPE_INT:
  case KS_TYPE_ENUM:
    return a.i == b.i;
  case KS_TYPE_FLOAT:
    return !(a.f < b.f) && !(a.f > b.f);
  case KS_TYPE_BOOL:
    return a.b == b.b;
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    return strcmp(a.s, b.s) == 0;
  }
  return false;
}

void ks_value_store(const ks_key *k, ks_value v, ks_config *c) {
  char *field = (char *)c + k->offset;
  switch (k->type) {
  case KS_TYPE_INT:
    memcpy(field, &v.i, sizeof v.i);
    break;
  case KS_TYPE_FLOAT:
    memcpy(field, &v.f, sizeof v.f);
    break;
  case KS_TYPE_BOOL:
    memcpy(field, &v.b, sizeof v.b);
    break;
  case KS_TYPE_ENUM: {
    int number = (int)v.i;
    memcpy(field, &number, sizeof number);
    break;
  }
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    memcpy(field, &v.s, sizeof v.s);
    break;
  }
}

ks_value ks_value_of(const ks_key *k, const ks_config *c) {
  const char *field = (const char *)c + k->offset;
  ks_value v = {0};
  switch (k->type) {
  case KS_TYPE_INT:
    memcpy(&v.i, field, sizeof v.i);
    break;
  case KS_TYPE_FLOAT:
    memcpy(&v.f, field, sizeof v.f);
    break;
  case KS_TYPE_BOOL:
    memcpy(&v.b, field, sizeof v.b);
    break;
  case KS_TYPE_ENUM: {
    int number;
    memcpy(&number, field, sizeof number);
    v.i = number;
    break;
  }
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    memcpy(&v.s, field, sizeof v.s);
    break;
  }
  return v;
}

/* ---------------------------------------------------------------- writing */

static ks_status write_float(double v, ks_text *out) {
  char text[40];
  for (int digits = 1; digits <= 17; digits++) {
    snprintf(text, sizeof text, "%.*g", digits, v);
    double back = strtod(text, NULL);
    if (memcmp(&back, &v, sizeof v) == 0) break;
  }
  KS_TRY(ks_text_add_str(out, text));
  return strpbrk(text, ".e") ? KS_OK : ks_text_add_str(out, ".0");
}

static ks_status write_string(const char *s, ks_text *out) {
  static const char plain[] = "\"\\\n\t\r\f", escaped[] = "\"\\ntrf";
  KS_TRY(ks_text_add(out, "\"", 1));
  for (; *s; s++) {
    const char *p = strchr(plain, *s);
    if (p)
      KS_TRY(ks_text_addf(out, "\\%c", escaped[p - plain]));
    else if ((unsigned char)*s < 0x20 || *s == 0x7f)
      KS_TRY(ks_text_addf(out, "\\x%02x", (unsigned)*s));
    else
      KS_TRY(ks_text_add(out, s, 1));
  }
  return ks_text_add(out, "\"", 1);
}

/* A path inside the project is written from its root, so that texts are the same wherever it lies. */
static const char *portable(const ks_key *k, const char *path) {
  const char *root = ks_project_root();
  size_t n = strlen(root);
  bool input = k->type == KS_TYPE_PATH && strcmp(k->range, "output") != 0;
  bool inside = input && strncmp(path, root, n) == 0 && path[n] == '/' && path[n + 1];
  return inside && path[n + 1] != '.' && path[n + 1] != '~' ? path + n + 1 : path;
}

ks_status ks_value_write(const ks_key *k, ks_value v, ks_text *out) {
  size_t n;
  const char *name;
  switch (k->type) {
  case KS_TYPE_INT:
    return ks_text_addf(out, v.i > INT32_MAX || v.i < INT32_MIN ? "%lldL" : "%lld", (long long)v.i);
  case KS_TYPE_FLOAT:
    return write_float(v.f, out);
  case KS_TYPE_BOOL:
    return ks_text_add_str(out, v.b ? "true" : "false");
  case KS_TYPE_ENUM:
    name = ks_key_enum_value(k, (int)v.i, &n);
    KS_ASSERT(name);
    return ks_text_addf(out, "\"%.*s\"", (int)n, name);
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    return write_string(portable(k, v.s), out);
  }
  return KS_OK;
}

ks_status ks_value_write_short(const ks_key *k, ks_value v, ks_text *out) {
  size_t n;
  const char *name;
  switch (k->type) {
  case KS_TYPE_INT:
    return ks_text_addf(out, "%s%lld", k->label, (long long)v.i);
  case KS_TYPE_FLOAT:
    return ks_text_addf(out, "%s%.12g", k->label, v.f);
  case KS_TYPE_BOOL:
    return ks_text_addf(out, "%s%s", v.b ? "" : "no", k->label);
  case KS_TYPE_ENUM:
    name = ks_key_enum_value(k, (int)v.i, &n);
    KS_ASSERT(name);
    return ks_text_addf(out, "%s%.*s", k->label, (int)n, name);
  case KS_TYPE_STRING:
  case KS_TYPE_PATH:
    return ks_text_addf(out, "%s%s", k->label, v.s);
  }
  return KS_OK;
}
