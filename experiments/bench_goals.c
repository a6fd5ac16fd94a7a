#include "experiments/bench_goals.h"

#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

const ks_goal_case ks_goal_cases[] = {
#define KS_CASE(group, name, op, parameters) {#group, #name, #op, parameters},
#include "experiments/bench_goals.def"
    {0}};

const ks_goal ks_goals[] = {
#define KS_GOAL(name, measure, relation, threshold, against)                                                 \
  {#name, #measure, KS_GOAL_##relation, threshold, #against},
#include "experiments/bench_goals.def"
    {0}};

enum { WARM_SAMPLES = 2, MOST_OF_A_GROUP = 32, SCALED_HEADS = 4, SCALED_KEPT = 8 };

/* ---------------------------------------------------------------- parameters */

/* "key=value" of n characters at `word`: its value, or NULL. */
static const char *value_of(const char *word, size_t n, const char *key, size_t *n_value) {
  const size_t n_key = strlen(key);
  if (n <= n_key + 1 || strncmp(word, key, n_key) != 0 || word[n_key] != '=') return NULL;
  *n_value = n - n_key - 1;
  return word + n_key + 1;
}

static bool read_number(const char *word, size_t n, ks_goal_parameters *p) {
  size_t n_value;
  const char *value;
#define X(key, least)                                                                                        \
  if ((value = value_of(word, n, #key, &n_value)) && isdigit((unsigned char)*value)) {                       \
    p->key = strtoll(value, NULL, 10);                                                                       \
    return true;                                                                                             \
  }
  KS_GOAL_NUMBERS(X)
#undef X
  return false;
}

static bool read_word(const char *word, size_t n, ks_goal_parameters *p) {
  const struct {
    const char *key;
    char *to;
    size_t size;
  } words[] = {{"shape", p->shape, sizeof p->shape},       {"targets", p->targets, sizeof p->targets},
               {"sampler", p->sampler, sizeof p->sampler}, {"kind", p->kind, sizeof p->kind},
               {"cache", p->cache, sizeof p->cache},       {"stored", NULL, 0}};
  for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
    size_t n_value;
    const char *value = value_of(word, n, words[i].key, &n_value);
    if (!value) continue;
    if (!words[i].to) return n_value == 4 && strncmp(value, "bf16", 4) == 0;
    snprintf(words[i].to, words[i].size, "%.*s", (int)n_value, value);
    return true;
  }
  return false;
}

/* Every size becomes small; how many adapters share how many sequences stays whole. */
static void scale_down(const ks_goal_case *c, int64_t scale, ks_goal_parameters *p) {
  if (scale == 1) return;
  const bool grouped = p->n_kv_heads < p->n_heads;
#define X(key, least)                                                                                        \
  if (least > 0) p->key = ks_min_i64(p->key, ks_max_i64(least, p->key / scale));
  KS_GOAL_NUMBERS(X)
#undef X
  p->n_heads = ks_min_i64(p->n_heads, SCALED_HEADS);
  p->n_kv_heads = grouped ? ks_min_i64(p->n_kv_heads, SCALED_HEADS / 2) : p->n_heads;
  p->n_adapters = ks_min_i64(p->n_adapters, 2);
  p->best_k = ks_min_i64(p->best_k, SCALED_KEPT);
  if (strncmp(c->op, "attention", 9) == 0 || strcmp(c->op, "pool") == 0) p->rows = 2 * p->seq_len;
}

static void write_parameters(const ks_goal_case *c, ks_goal_parameters *p) {
  size_t used = 0;
  for (const char *at = c->parameters; *at && used < sizeof p->text;) {
    const size_t n = strcspn(at, " ");
    const char *gap = used ? " " : "";
    bool is_number = false;
    size_t n_value;
#define X(key, least)                                                                                        \
  if (!is_number && value_of(at, n, #key, &n_value)) {                                                       \
    used +=                                                                                                  \
        (size_t)snprintf(p->text + used, sizeof p->text - used, "%s%s=%lld", gap, #key, (long long)p->key);  \
    is_number = true;                                                                                        \
  }
    KS_GOAL_NUMBERS(X)
#undef X
    if (!is_number)
      used += (size_t)snprintf(p->text + used, sizeof p->text - used, "%s%.*s", gap, (int)n, at);
    at += n + (at[n] == ' ');
  }
}

ks_status ks_goal_parameters_read(const ks_goal_case *c, int64_t scale, ks_goal_parameters *out) {
  *out = (ks_goal_parameters){0};
  for (const char *at = c->parameters; *at;) {
    const size_t n = strcspn(at, " ");
    if (!read_number(at, n, out) && !read_word(at, n, out))
      return KS_FAIL(KS_EINTERNAL, "bench_goals.def: %s: there is no \"%.*s\"", c->name, (int)n, at);
    at += n + (at[n] == ' ');
  }
  scale_down(c, scale, out);
  write_parameters(c, out);
  return KS_OK;
}

ks_model_config ks_goal_scaled_config(const ks_model_config *c, int64_t scale) {
  ks_model_config s = *c;
  if (scale == 1) return s;
  const bool grouped = c->n_kv_heads < c->n_heads;
  s.n_layers = 2;
  s.n_heads = SCALED_HEADS;
  s.n_kv_heads = grouped ? SCALED_HEADS / 2 : SCALED_HEADS;
  s.hidden_size = ks_max_i64(64, c->hidden_size / scale / 8 * 8);
  s.intermediate_size = ks_max_i64(96, c->intermediate_size / scale / 8 * 8);
  s.vocab_size = ks_max_i64(256, c->vocab_size / scale / 8 * 8);
  s.head_dim = ks_max_i64(16, c->head_dim / scale / 2 * 2);
  return s;
}

/* ---------------------------------------------------------------- subjects */

void ks_goal_wrong(ks_goal_subject *s, const char *format, ...) {
  char old[sizeof s->note];
  va_list args;
  memcpy(old, s->note, sizeof old);
  s->is_wrong = true;
  va_start(args, format);
  vsnprintf(s->note, sizeof s->note, format, args);
  va_end(args);
  const size_t used = strlen(s->note);
  snprintf(s->note + used, sizeof s->note - used, "%s%s", old[0] ? "; " : "", old);
}

static const ks_goal_kind *find_kind(const char *op) {
  const ks_goal_kind *const lists[] = {ks_goal_step_kinds, ks_goal_model_kinds, ks_goal_op_kinds};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
    for (const ks_goal_kind *k = lists[i]; k->op; k++)
      if (strcmp(k->op, op) == 0) return k;
  return NULL;
}

static void blank(ks_goal_run *run, const ks_goal_case *c, ks_goal_subject *s) {
  *s = (ks_goal_subject){.run = run,
                         .c = c,
                         .memory_bytes = NAN,
                         .launches = NAN,
                         .graphs = NAN,
                         .waits = NAN,
                         .idle_share = NAN};
}

/* What this machine has no room or no kernel for is left out, with the reason. */
static ks_status leave_out(ks_goal_subject *s, ks_status status) {
  if (status != KS_ENOMEM && status != KS_EUNSUPPORTED) return status;
  snprintf(s->skipped, sizeof s->skipped, "%s", status == KS_ENOMEM ? "memory" : "unsupported");
  snprintf(s->note, sizeof s->note, "%s", ks_error_message());
  ks_error_clear();
  s->kind->drop(s);
  s->state = NULL;
  return KS_OK;
}

static ks_status make(ks_goal_subject *s) {
  const ks_bench *b = s->run->b;
  s->load = (ks_bench_load){0};
  s->timed = (ks_bench_subject){.b = s->run->b};
  ks_status status = s->kind->make(s->run, s);
  if (status == KS_OK && s->timed.fn && b->info.has_timer) status = ks_bench_warm_up(&s->timed);
  return leave_out(s, status);
}

ks_status ks_goal_sample_hot(void *subject, double *ms) {
  return ks_bench_sample_hot_once(&((ks_goal_subject *)subject)->timed, ms);
}

/* Peak memory of this case by itself: what it makes, and a call. */
static ks_status weigh(ks_goal_subject *s) {
  double ms;
  ks_goal_run *run = s->run;
  KS_TRY(ks_meter_forget(run->b->meter));
  run->is_alone = true;
  ks_status status = make(s);
  if (status == KS_OK && !s->skipped[0]) status = leave_out(s, s->kind->sample(s, &ms));
  if (status == KS_OK && !s->skipped[0]) s->memory_bytes = (double)ks_mem_peak(run->b->ctx);
  if (s->state) s->kind->drop(s);
  s->state = NULL;
  run->is_alone = false;
  return status == KS_OK ? ks_meter_forget(run->b->meter) : status;
}

/* Warm, and then one call with its counts. */
static ks_status warm_and_count(ks_goal_subject *s) {
  ks_activity before, after;
  double ms;
  const int n = s->run->b->info.has_timer ? WARM_SAMPLES : 1;
  for (int i = 0; i < n; i++) {
    KS_TRY(leave_out(s, s->kind->sample(s, &ms)));
    if (s->skipped[0]) return KS_OK;
  }
  ks_activity_of(s->run->b->ctx, &before);
  if (!before.is_known) return KS_OK;
  if (s->timed.fn) { /* without the flush and the delay of a sample */
    KS_TRY(s->timed.fn(s->timed.arg));
    if (!s->timed.waits) KS_TRY(ks_sync(s->run->b->ctx));
  } else
    KS_TRY(s->kind->sample(s, &ms));
  ks_activity_of(s->run->b->ctx, &after);
  s->launches = (double)(after.launches - before.launches);
  s->graphs = (double)(after.graphs - before.graphs);
  s->waits = (double)(after.waits - before.waits);
  return KS_OK;
}

static ks_status add_row(ks_goal_subject *s) {
  ks_goal_run *run = s->run;
  ks_bench *b = run->b;
  ks_bench_row *row;
  if (s->skipped[0]) {
    char verdict[24] = "unsupported";
    if (strcmp(s->skipped, verdict) != 0) snprintf(verdict, sizeof verdict, "skipped(%.13s)", s->skipped);
    KS_TRY(ks_bench_add_verdict(b, s->c->name, s->what, verdict, s->note));
    row = &b->rows[b->n_rows - 1];
  } else {
    const ks_ceilings none = {0};
    s->samples.cold = s->is_device_time && !s->timed.is_warm;
    KS_TRY(ks_bench_add(b, s->c->name, s->what, &s->samples, &s->load, &none, &row));
    if (s->is_wrong) snprintf(row->verdict, sizeof row->verdict, "incorrect");
    snprintf(row->note, sizeof row->note, "%s", s->note);
  }
  row->op = s->c->op;
  row->memory_mb = s->memory_bytes / 1e6;
  row->launches = s->launches;
  row->graphs = s->graphs;
  row->waits = s->waits;
  row->idle_share = s->idle_share;
  snprintf(row->group, sizeof row->group, "%s", s->c->group);
  snprintf(row->parameters, sizeof row->parameters, "%s", s->p.text);
  return KS_OK;
}

/* ---------------------------------------------------------------- groups */

static ks_status have_model(ks_goal_run *run, const char *name) {
  const ks_bench_shape *shape = ks_bench_shapes;
  if (run->model && strcmp(run->shape.name, name) == 0) return KS_OK;
  ks_model_destroy(run->model);
  run->model = NULL;
  while (shape->name && strcmp(shape->name, name) != 0)
    shape++;
  if (!shape->name) return KS_FAIL(KS_EINTERNAL, "bench_goals.def: there is no shape \"%s\"", name);
  run->shape = (ks_bench_shape){shape->name, ks_goal_scaled_config(&shape->config, run->scale)};
  KS_TRY(ks_model_create_random_quickly(run->b->ctx, &run->shape.config, run->b->dtype, 1, &run->model));
  return ks_weight_prepare_backward(run->b->ctx, run->model->head);
}

/* A model that does not fit leaves out the group. */
static ks_status prepare(ks_goal_run *run) {
  for (int64_t i = 0; i < run->n_subjects; i++) {
    ks_goal_subject *s = &run->subjects[i];
    if (!s->kind->has_model) {
      ks_model_destroy(run->model); /* operations get all the memory */
      run->model = NULL;
      continue;
    }
    KS_TRY(leave_out(s, have_model(run, s->p.shape)));
    if (!s->skipped[0]) KS_TRY(weigh(s));
  }
  for (int64_t i = 0; i < run->n_subjects; i++)
    if (!run->subjects[i].skipped[0]) KS_TRY(make(&run->subjects[i]));
  for (int64_t i = 0; i < run->n_subjects; i++)
    if (!run->subjects[i].skipped[0]) KS_TRY(warm_and_count(&run->subjects[i]));
  return KS_OK;
}

static ks_status measure(ks_goal_run *run) {
  ks_bench_turn turns[MOST_OF_A_GROUP];
  int64_t n = 0;
  for (int64_t i = 0; i < run->n_subjects; i++) {
    ks_goal_subject *s = &run->subjects[i];
    if (s->skipped[0]) continue;
    KS_TRY(ks_samples_create(&s->samples));
    turns[n++] = (ks_bench_turn){s->kind->sample, s, &s->samples};
  }
  if (n == 0) return KS_OK;
  KS_TRY(ks_bench_sample_in_turn(run->b, turns, n));
  for (int64_t i = 0; i < run->n_subjects; i++) {
    ks_goal_subject *s = &run->subjects[i];
    if (s->skipped[0]) continue;
    if (s->is_device_time) KS_TRY(ks_bench_batches(&s->timed, &s->samples));
    KS_TRY(s->kind->finish(run, s));
  }
  return KS_OK;
}

static void end_group(ks_goal_run *run) {
  for (int64_t i = 0; i < run->n_subjects; i++) {
    ks_goal_subject *s = &run->subjects[i];
    if (s->state) s->kind->drop(s);
    ks_samples_free(&s->samples);
  }
  ks_run_destroy(run->shared);
  run->shared = NULL;
  run->n_subjects = 0;
}

static ks_status run_group(ks_goal_run *run) {
  ks_status status = ks_meter_forget(run->b->meter);
  if (status == KS_OK) status = prepare(run);
  if (status == KS_OK) status = measure(run);
  for (int64_t i = 0; i < run->n_subjects && status == KS_OK; i++)
    status = add_row(&run->subjects[i]);
  if (status != KS_OK && run->n_subjects > 0) ks_fail_context(status, "group %s", run->subjects[0].c->group);
  end_group(run);
  ks_bench_print_rows(run->b);
  return status;
}

/* ---------------------------------------------------------------- what was reached */

static const ks_bench_row *find_row(const ks_bench *b, const char *name) {
  for (int64_t i = 0; i < b->n_rows; i++)
    if (strcmp(b->rows[i].name, name) == 0) return &b->rows[i];
  return NULL;
}

/* NAN: not among these rows, only beside a peer, or a time that means nothing here. */
static double measured(const ks_bench *b, const ks_goal *goal) {
  const bool has_times = b->info.has_timer && !b->info.is_shim;
  const ks_bench_row *row = find_row(b, goal->name), *against = find_row(b, goal->against);
  const struct {
    const char *measure;
    double value;
  } values[] = {{"matrix_share", row ? row->peak_share : NAN},
                {"read_share", row ? row->read_share : NAN},
                {"copy_share", row ? row->copy_share : NAN},
                {"roofline_share", row ? row->roofline_share : NAN},
                {"device_us", row && has_times ? 1e3 * row->median_ms : NAN},
                {"launches", row ? row->launches : NAN},
                {"graphs", row ? row->graphs : NAN},
                {"waits", row ? row->waits : NAN},
                {"idle_share", row && has_times ? row->idle_share : NAN},
                {"time_ratio", row && against && has_times ? row->median_ms / against->median_ms : NAN},
                {"rate_ratio", row && against && has_times ? row->rate / against->rate : NAN}};
  for (size_t i = 0; i < sizeof values / sizeof *values; i++)
    if (strcmp(values[i].measure, goal->measure) == 0) return values[i].value;
  return NAN;
}

static bool is_reached(const ks_goal *g, double value) {
  switch (g->relation) {
  case KS_GOAL_at_least:
    return value >= g->threshold;
  case KS_GOAL_at_most:
    return value <= g->threshold;
  case KS_GOAL_exactly:
    return value == g->threshold;
  }
  return false;
}

static void print_goals(const ks_bench *b) {
  static const char *const relations[] = {"at least", "at most", "exactly"};
  int n_reached = 0, n_missed = 0;
  printf("\n%-24s  %-14s  %-18s  %-10s  %-8s  %s\n", "case", "measure", "goal", "measured", "", "against");
  for (const ks_goal *g = ks_goals; g->name; g++) {
    const ks_bench_row *row = find_row(b, g->name);
    const double value = measured(b, g);
    if (!row || !isfinite(value) || strncmp(row->verdict, "skipped", 7) == 0) continue;
    const bool reached = is_reached(g, value) && strcmp(row->verdict, "incorrect") != 0;
    printf("%-24s  %-14s  %-8s %-9.4g  %-10.4g  %-8s  %s\n", g->name, g->measure, relations[g->relation],
           g->threshold, value, reached ? "reached" : "MISSED", g->against);
    n_reached += reached;
    n_missed += !reached;
  }
  printf("# %d reached, %d missed; goals beside a peer: experiments/bench_peers.py\n", n_reached, n_missed);
}

/* ---------------------------------------------------------------- all of it */

/* --only: rows, groups, or beginnings of their names with a * behind it, with commas. */
static bool wanted(const ks_bench *b, const ks_goal_case *c) {
  if (!b->only) return true;
  for (const char *at = b->only; *at;) {
    const size_t n = strcspn(at, ",");
    const bool begins = n > 0 && at[n - 1] == '*';
    const char *const names[] = {c->group, c->name};
    for (int i = 0; i < 2; i++)
      if (begins ? strncmp(names[i], at, n - 1) == 0 : strlen(names[i]) == n && memcmp(names[i], at, n) == 0)
        return true;
    at += n + (at[n] == ',');
  }
  return false;
}

static ks_status run_all(ks_goal_run *run) {
  const ks_goal_case *c = ks_goal_cases;
  while (c->name) {
    const char *group = c->group;
    for (; c->name && strcmp(c->group, group) == 0; c++) {
      if (!wanted(run->b, c)) continue;
      ks_goal_subject *s = &run->subjects[run->n_subjects++];
      blank(run, c, s);
      s->kind = find_kind(c->op);
      if (!s->kind)
        return KS_FAIL(KS_EINTERNAL, "bench_goals.def: %s: there is no op \"%s\"", c->name, c->op);
      KS_TRY(ks_goal_parameters_read(c, run->scale, &s->p));
      if (run->n_subjects == MOST_OF_A_GROUP)
        return KS_FAIL(KS_EINTERNAL, "bench_goals.def: group %s is too large", group);
    }
    if (run->n_subjects > 0) KS_TRY(run_group(run));
  }
  return KS_OK;
}

ks_status ks_bench_goals(ks_bench *b, int64_t scale) {
  ks_goal_run run = {.b = b, .scale = scale};
  b->dtype = KS_DTYPE_BF16;
  KS_TRY(ks_bench_open(b, b->variants));
  ks_status status = KS_OK;
  if (!b->info.has_timer && scale < 16)
    status = KS_FAIL(KS_ECONFIG,
                     "goals are for a GPU, and there is none here; --scale 64 makes everything small, to try "
                     "what it does");
  if (status == KS_OK) status = ks_alloc_array(&run.subjects, MOST_OF_A_GROUP, sizeof *run.subjects, "bench");
  if (status == KS_OK) status = run_all(&run);
  ks_model_destroy(run.model);
  free(run.subjects);
  ks_bench_close(b);
  if (status == KS_OK && b->n_rows > 0) print_goals(b);
  return status;
}

void ks_bench_list_goals(void) {
  const char *group = "";
  printf("\ngoals (bench_goals.def), by group:\n");
  for (const ks_goal_case *c = ks_goal_cases; c->name; c++) {
    if (strcmp(group, c->group) != 0) printf("%s\n", c->group);
    printf("  %-24s  %-18s  %s\n", c->name, c->op, c->parameters);
    group = c->group;
  }
}
