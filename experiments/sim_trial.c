#include "experiments/sim.h"

#include "experiments/version.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

/* ---------------------------------------------------------------- rows */

ks_status ks_trial_add_row(ks_trial *c, ks_table t, void *row) {
  ks_rows *r = &c->tables[t];
  size_t size = ks_table_row_bytes(t);
  if (r->n == r->cap) {
    int64_t cap = r->cap ? r->cap * 2 : 64;
    void *rows = realloc(r->rows, (size_t)cap * size);
    if (!rows) return KS_FAIL(KS_ENOMEM, "%s: no memory for %lld rows", ks_table_path(t), (long long)cap);
    r->rows = rows;
    r->cap = cap;
  }
  void *added = (char *)r->rows + (size_t)r->n++ * size;
  memset(added, 0, size);
  memcpy(row, &added, sizeof added);
  return KS_OK;
}

static void clear_rows(ks_trial *c) {
  for (int t = 0; t < KS_N_TABLES; t++) {
    ks_rows_free((ks_table)t, c->tables[t].rows, c->tables[t].n);
    c->tables[t] = (ks_rows){0};
  }
}

/* ---------------------------------------------------------------- state */

typedef struct {
  int64_t step, n_params;
} adapter_header;

static ks_status save_adapter(const ks_adapter *a, ks_text *out) {
  size_t n = (size_t)a->n_params;
  float *values;
  KS_TRY(ks_alloc_array(&values, 3 * n, sizeof *values, "adapter snapshot"));
  ks_status status = ks_adapter_save(a, values, values + n, values + 2 * n);
  adapter_header header = {a->step, a->n_params};
  if (status == KS_OK) status = ks_text_add(out, (const char *)&header, sizeof header);
  if (status == KS_OK) status = ks_text_add(out, (const char *)values, 3 * n * sizeof *values);
  free(values);
  return status;
}

static ks_status load_adapter(ks_adapter *a, const void *bytes, size_t n) {
  adapter_header header;
  size_t want = sizeof header + 3 * (size_t)a->n_params * sizeof(float);
  if (n != want)
    return KS_FAIL(KS_EDATA, "its adapter state has %zu bytes, not %zu; delete the file to start over", n,
                   want);
  memcpy(&header, bytes, sizeof header);
  float *values;
  KS_TRY(ks_alloc_array(&values, 3 * (size_t)a->n_params, sizeof *values, "adapter snapshot"));
  memcpy(values, (const char *)bytes + sizeof header, want - sizeof header);
  ks_status status = ks_adapter_load(a, values, values + a->n_params, values + 2 * a->n_params,
                                     header.n_params, header.step);
  free(values);
  return status;
}

static ks_status find_blob(const ks_record_state *s, const char *name, const void **bytes, size_t *n) {
  for (int64_t i = 0; i < s->n_blobs; i++)
    if (strcmp(s->blobs[i].name, name) == 0) {
      *bytes = s->blobs[i].bytes;
      *n = s->blobs[i].n;
      return KS_OK;
    }
  return KS_FAIL(KS_EDATA, "it has no state \"%s\"; delete the file to start over", name);
}

static ks_status restore_state(ks_trial *c) {
  ks_record_state state = {0};
  KS_TRY(ks_record_read_state(c->path, &state));
  const void *bytes;
  size_t n;
  ks_status status;
  KS_TRY_OUT(find_blob(&state, "selector", &bytes, &n));
  KS_TRY_OUT(ks_selector_restore(c->selector, bytes, n));
  KS_TRY_OUT(find_blob(&state, "annotator", &bytes, &n));
  KS_TRY_OUT(ks_annotator_restore(c->annotator, bytes, n));
  if (c->adapter) {
    KS_TRY_OUT(find_blob(&state, "adapter", &bytes, &n));
    KS_TRY_OUT(load_adapter(c->adapter, bytes, n));
    c->trained = c->adapter->step > 0;
  }
  if (state.n_arrivals < 0 || state.n_arrivals > c->n_stream || state.n_windows < 0 ||
      state.n_windows > ks_trial_n_windows(c)) {
    status = KS_FAIL(KS_EDATA, "its checkpoint lies outside the stream; delete the file to start over");
    goto out;
  }
  c->n_arrivals = state.n_arrivals;
  c->n_windows = state.n_windows;
out:
  ks_record_state_free(&state);
  return ks_fail_context(status, "%s: cannot resume", c->path);
}

/* ---------------------------------------------------------------- opening */

static ks_status begin_file(ks_world *w, ks_trial *c) {
  char seed[24], threads[16], when[32], n_params[24];
  snprintf(seed, sizeof seed, "%lld", (long long)c->config->seed);
  snprintf(threads, sizeof threads, "%d", ks_ctx_n_threads(w->ctx));
  snprintf(n_params, sizeof n_params, "%lld", (long long)w->model->n_params);
  ks_clock_utc(when);
  const ks_meta meta[] = {{"keepsake.version", KS_VERSION},
                          {"cell", c->id},
                          {"policy", c->policy->name},
                          {"seed", seed},
                          {"model.format", w->model->format},
                          {"model.sha256", w->model->sha256},
                          {"model.parameters", n_params},
                          {"tokenizer.sha256", ks_tokenizer_sha256(w->tokenizer)},
                          {"data.name", w->data->name},
                          {"data.sha256", w->data->sha256},
                          {"lexicon.sha256", w->lexicons ? ks_lexicons_sha256(w->lexicons) : ""},
                          {"backend", ks_ctx_backend_name(w->ctx)},
                          {"machine.isa", ks_ctx_isa_name(w->ctx)},
                          {"machine.device", ks_ctx_device_name(w->ctx)},
                          {"machine.threads", threads},
                          {"machine.build", KS_BUILD},
                          {"machine.commit", KS_COMMIT},
                          {"time.started", when}};
  return ks_record_begin(c->path, c->config_text, meta, sizeof meta / sizeof *meta);
}

/* Fails when the file cannot be this very cell's. */
static ks_status check_file(ks_world *w, ks_trial *c, ks_run_status *file_status) {
  ks_record_info info = {0};
  KS_TRY(ks_record_read_info(c->path, &info));
  const struct {
    const char *what, *now, *then;
  } facts[] = {
      {"configuration", c->config_text, info.config_text},
      {"model", w->model->sha256, ks_record_info_meta(&info, "model.sha256")},
      {"tokenizer", ks_tokenizer_sha256(w->tokenizer), ks_record_info_meta(&info, "tokenizer.sha256")},
      {"dataset", w->data->sha256, ks_record_info_meta(&info, "data.sha256")},
      {"lexicon", w->lexicons ? ks_lexicons_sha256(w->lexicons) : "",
       ks_record_info_meta(&info, "lexicon.sha256")},
      {"backend", ks_ctx_backend_name(w->ctx), ks_record_info_meta(&info, "backend")},
      {"instruction set", ks_ctx_isa_name(w->ctx), ks_record_info_meta(&info, "machine.isa")},
      {"version of keepsake", KS_VERSION, ks_record_info_meta(&info, "keepsake.version")}};
  enum { N_CONTENT_FACTS = 5 };
  ks_status status = KS_OK;
  bool unfinished =
      info.status != KS_RUN_COMPLETE; /* a cell is computed in one way from its beginning to its end */
  for (size_t i = 0; i < sizeof facts / sizeof *facts && status == KS_OK; i++)
    if ((unfinished || i < N_CONTENT_FACTS) && (!facts[i].then || strcmp(facts[i].now, facts[i].then) != 0))
      status = KS_FAIL(KS_ECONFIG,
                       "%s: holds results of another %s; choose another folder with --set "
                       "experiment.output=FOLDER, or replace "
                       "them with --fresh",
                       c->path, facts[i].what);
  *file_status = info.status;
  ks_record_info_free(&info);
  return status;
}

/* Two runs that write the same cell would each undo the other's checkpoints. The lock is held while the trial
 * is open; different shards meet in no cell. */
static ks_status lock_cell(ks_trial *c, const char *folder) {
  ks_text path = {0};
  ks_status status;
  KS_TRY_OUT(ks_text_addf(&path, "%s/cells/.%s.lock", folder, c->id));
  c->lock = open(path.data, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (c->lock < 0)
    status = KS_FAIL(KS_EIO, "%s: cannot create: %s; choose another experiment.output", path.data,
                     strerror(errno));
  else if (flock(c->lock, LOCK_EX | LOCK_NB) != 0)
    status = KS_FAIL(KS_EENV,
                     "%s: another run is writing this cell; wait for it or choose another experiment.output",
                     c->path);
out:
  ks_text_free(&path);
  return status;
}

/* *started: the file holds at least one checkpoint, and the trial stands there now. */
static ks_status resume(ks_world *w, ks_trial *c, bool *started) {
  ks_run_status file_status;
  void *checkpoints;
  int64_t n;
  KS_TRY(check_file(w, c, &file_status));
  KS_TRY(ks_record_read_rows(c->path, KS_TABLE_checkpoint, &checkpoints, &n));
  ks_rows_free(KS_TABLE_checkpoint, checkpoints, n);
  *started = n > 0;
  c->complete = file_status == KS_RUN_COMPLETE;
  return n > 0 && !c->complete ? restore_state(c) : KS_OK;
}

static ks_status make_parts(ks_world *w, ks_trial *c) {
  const ks_config *k = c->config;
  uint64_t seed = (uint64_t)k->seed;
  ks_selector_params selector = {.policy = c->policy,
                                 .n_bins = k->buffer.bins,
                                 .bin_bytes = (size_t)k->buffer.bin_bytes,
                                 .n_dim = w->model->config.hidden_size,
                                 .idd_empty = k->select.idd_empty,
                                 .idd_refresh = k->select.idd_refresh,
                                 .seed = seed};
  KS_TRY_AS(ks_selector_create(w->ctx, &selector, &c->selector), "buffer.bin_bytes, buffer.bins");
  /* The ceiling trains on everything: no budget holds for it, and its user answers everything. */
  ks_annotator_params annotator = {.ask = k->annotate.ask,
                                   .budget = c->policy->unlimited ? -1 : k->annotate.budget,
                                   .refusal = c->policy->unlimited ? 0 : k->annotate.refusal,
                                   .noise = c->policy->unlimited ? 0 : k->annotate.noise,
                                   .seed = seed};
  KS_TRY(ks_annotator_create(&annotator, w->data, &c->annotator));
  if (c->policy->trains) {
    ks_adapter_params adapter = {.rank = (int32_t)k->lora.rank, .alpha = (float)k->lora.alpha};
    KS_TRY(ks_targets_parse(k->lora.targets, &adapter.targets));
    KS_TRY(ks_adapter_create(w->ctx, &w->model->config, &adapter, seed, &c->adapter));
  }
  ks_stream_params stream = {.order = k->stream.order, .correlation = k->stream.correlation, .seed = seed};
  return ks_stream_order(w->data, &stream, &c->order, &c->n_stream);
}

ks_status ks_trial_open(ks_world *w, const ks_config *config, const char *id, const char *folder, bool fresh,
                        ks_trial **out) {
  ks_trial *c;
  ks_text name = {0}, text = {0};
  KS_TRY(ks_alloc_array(&c, 1, sizeof *c, "cell"));
  c->config = config;
  c->id = id;
  c->lock = -1;
  c->policy = ks_policy_find(config->policy);
  ks_status status;
  if (!c->policy) {
    status = KS_FAIL(KS_ECONFIG, "there is no policy \"%s\"; see keepsake ls policies", config->policy);
    goto out;
  }
  KS_TRY_OUT(ks_text_addf(&name, "cells/%s.h5", id));
  KS_TRY_OUT(ks_path_join(folder, name.data, &c->path));
  KS_TRY_OUT(lock_cell(c, folder));
  KS_TRY_OUT(ks_config_text(config, true, &text));
  c->config_text = text.data;
  text = (ks_text){0};
  KS_TRY_OUT(make_parts(w, c));
  bool started = false;
  if (!fresh && ks_file_exists(c->path)) KS_TRY_OUT(resume(w, c, &started));
  if (!started) KS_TRY_OUT(begin_file(w, c));
  *out = c;
  c = NULL;
out:
  ks_text_free(&name);
  ks_text_free(&text);
  ks_trial_close(c);
  return status;
}

void ks_trial_close(ks_trial *c) {
  if (!c) return;
  if (c->lock >= 0) close(c->lock);
  clear_rows(c);
  ks_rows_free(KS_TABLE_answer, c->untrained_answers.rows, c->untrained_answers.n);
  ks_adapter_destroy(c->adapter);
  ks_annotator_destroy(c->annotator);
  ks_selector_destroy(c->selector);
  free(c->order);
  free(c->config_text);
  free(c->path);
  free(c);
}

int64_t ks_trial_n_windows(const ks_trial *c) {
  int64_t window = c->config->window.size;
  return (c->n_stream + window - 1) / window;
}

ks_status ks_trial_checkpoint(ks_trial *c, bool last) {
  ks_record_rows rows;
  for (int t = 0; t < KS_N_TABLES; t++) {
    rows.rows[t] = c->tables[t].rows;
    rows.n_rows[t] = c->tables[t].n;
  }
  ks_text selector = {0}, annotator = {0}, adapter = {0};
  ks_status status;
  KS_TRY_OUT(ks_selector_snapshot(c->selector, &selector));
  KS_TRY_OUT(ks_annotator_snapshot(c->annotator, &annotator));
  if (c->adapter) KS_TRY_OUT(save_adapter(c->adapter, &adapter));
  ks_record_state state = {.n_arrivals = c->n_arrivals,
                           .n_windows = c->n_windows,
                           .n_blobs = c->adapter ? 3 : 2,
                           .blobs = {{"selector", selector.data, selector.len},
                                     {"annotator", annotator.data, annotator.len},
                                     {"adapter", adapter.data, adapter.len}}};
  KS_TRY_OUT(ks_record_append(c->path, &rows, &state, last ? KS_RUN_COMPLETE : KS_RUN_RUNNING));
  clear_rows(c);
  if (last) c->complete = true;
out:
  ks_text_free(&selector);
  ks_text_free(&annotator);
  ks_text_free(&adapter);
  return status;
}
