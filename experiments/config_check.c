/* What no single key can tell: keys that must fit each other, names that must exist in tables of the library.
 */
#include "experiments/config_internal.h"

#include "core/adapt/adapt.h"
#include "core/data/data.h"
#include "core/select/select.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Where the first of the keys that was set at all was set; NULL: none was. */
static const char *where_of(const ks_settings *s, const char *first, const char *second) {
  const ks_setting *a = &s->of[ks_key_find(first)];
  return a->where || !second ? a->where : s->of[ks_key_find(second)].where;
}

/* Every value of a key must be one of `names`. */
static void check_name(const ks_settings *s, const char *key, const char *const *names, int64_t n,
                       const char *list_with) {
  const ks_setting *setting = &s->of[ks_key_find(key)];
  for (int64_t v = 0; v < setting->n; v++) {
    const char *value = setting->values[v].s, *nearest = NULL;
    size_t best = 1 + (strlen(value) < 6 ? 2 : strlen(value) / 3);
    for (int64_t i = 0; i < n; i++) {
      size_t d = ks_edit_distance(value, names[i]);
      if (d < best) best = d, nearest = names[i];
    }
    if (nearest && strcmp(nearest, value) == 0) continue;
    if (nearest)
      ks_problem(s->problems, setting->where, "%s: there is no \"%s\"; did you mean \"%s\"?", key, value,
                 nearest);
    else
      ks_problem(s->problems, setting->where, "%s: there is no \"%s\" (%s)", key, value, list_with);
  }
}

enum { MAX_NAMES = 64 };

static void check_names(const ks_settings *s) {
  const char *names[MAX_NAMES];
  int n = 0;
  for (int i = 0; ks_policies[i] && n < MAX_NAMES; i++)
    names[n++] = ks_policies[i]->name;
  check_name(s, "policy", names, n, "keepsake ls policies");
  n = 0;
  names[n++] = "persona";
  for (int i = 0; ks_importers[i].name && n < MAX_NAMES; i++)
    names[n++] = ks_importers[i].name;
  check_name(s, "data.source", names, n, "keepsake ls importers");
  n = 0;
  names[n++] = "auto";
  names[n++] = "cpu";
  names[n++] = "cuda"; /* in a build without it the context says why it is not there */
  check_name(s, "run.backend", names, n, "keepsake ls backends");
}

/* A file that is wanted and not there, found before anything is begun. folder_too: a folder will do. */
static void check_file(const ks_settings *s, const char *key, bool folder_too) {
  const ks_setting *setting = &s->of[ks_key_find(key)];
  const char *path = setting->values[0].s;
  bool folder = ks_dir_exists(path);
  if (!*path || (folder && folder_too)) return;
  if (folder)
    ks_problem(s->problems, setting->where, "%s: %s is a folder; name a file", key, path);
  else if (access(path, F_OK) != 0)
    ks_problem(s->problems, setting->where, "%s: %s is not there (keepsake explain %s)", key, path, key);
  else if (access(path, R_OK) != 0)
    ks_problem(s->problems, setting->where, "%s: %s may not be read; check its permissions", key, path);
}

void ks_settings_check(const ks_settings *s) {
  check_names(s);
  check_file(s, "model.path", true);
  check_file(s, "model.tokenizer", true);
  check_file(s, "select.lexicon", false);
  if (strcmp(s->of[ks_key_find("data.source")].values[0].s, "persona") != 0)
    check_file(s, "data.path", false);
}

static void check_data(const ks_config *c, const ks_settings *s) {
  bool persona = strcmp(c->data.source, "persona") == 0;
  if (!persona && !*c->data.path)
    ks_problem(s->problems, where_of(s, "data.source", NULL),
               "data.source: \"%s\" reads a file; name it with data.path", c->data.source);
  if (persona && c->data.stream_size == 0)
    ks_problem(s->problems, where_of(s, "data.stream_size", NULL),
               "data.stream_size: the generator has no end; give the number of arrivals");
  bool topics = persona || *c->data.topic_field;
  if (c->stream.order == KS_ORDER_BURSTS && !topics)
    ks_problem(s->problems, where_of(s, "stream.order", "data.source"),
               "stream.order: bursts need topics; name the field that holds them with data.topic_field");
  int64_t stream = c->data.stream_size, rows = c->data.max_rows;
  if (!persona && rows > 0 && stream + c->data.eval_size > rows)
    ks_problem(s->problems, where_of(s, "data.max_rows", "data.stream_size"),
               "data.max_rows: %lld rows cannot hold data.stream_size (%lld) and data.eval_size (%lld)",
               (long long)rows, (long long)stream, (long long)c->data.eval_size);
  if (stream > 0 && c->window.size > stream)
    ks_problem(
        s->problems, where_of(s, "window.size", "data.stream_size"),
        "window.size: %lld is more than data.stream_size (%lld): there would be no trigger in the stream",
        (long long)c->window.size, (long long)stream);
}

static void check_text(const ks_config *c, const ks_settings *s) {
  if (!strstr(c->prompt.answer, "{question}"))
    ks_problem(s->problems, where_of(s, "prompt.answer", NULL), "prompt.answer: wants {question} in it");
  if (c->synth.writer == 1 && !strstr(c->synth.prompt, "{question}"))
    ks_problem(s->problems, where_of(s, "synth.prompt", NULL), "synth.prompt: wants {question} in it");
  if (c->synth.min_rouge1 > c->synth.max_rouge1)
    ks_problem(s->problems, where_of(s, "synth.min_rouge1", "synth.max_rouge1"),
               "synth.min_rouge1: %g is above synth.max_rouge1 (%g)", c->synth.min_rouge1,
               c->synth.max_rouge1);
}

static void check_training(const ks_config *c, const ks_settings *s) {
  uint32_t targets;
  if (ks_targets_parse(c->lora.targets, &targets) != KS_OK)
    ks_problem(s->problems, where_of(s, "lora.targets", NULL), "lora.targets: %s", ks_error_message());
  if (c->train.epochs == 0 && c->train.steps == 0)
    ks_problem(s->problems, where_of(s, "train.epochs", "train.steps"),
               "train.epochs: both it and train.steps are 0; to train nothing, use the policy none");
  if (c->train.micro_batch > c->train.batch_size)
    ks_problem(s->problems, where_of(s, "train.micro_batch", "train.batch_size"),
               "train.micro_batch: %lld is more than train.batch_size (%lld)",
               (long long)c->train.micro_batch, (long long)c->train.batch_size);
}

void ks_config_check(const ks_config *c, const ks_settings *s) {
  check_data(c, s);
  check_text(c, s);
  check_training(c, s);
}
