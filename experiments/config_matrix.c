#include "experiments/config_internal.h"

#include "core/select/select.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { MAX_CELLS = 100000, MAX_AXES = 128 };

/* The axes in the order of nesting: policy, seed, then the table's order. */
static int order_axes(int axes[MAX_AXES]) {
  int n = 0;
  axes[n++] = ks_key_find("policy");
  axes[n++] = ks_key_find("seed");
  for (int i = 0; i < ks_n_keys; i++)
    if (ks_keys[i].label && i != axes[0] && i != axes[1]) {
      KS_ASSERT(n < MAX_AXES);
      axes[n++] = i;
    }
  return n;
}

/* Adds `none` before and `all` after the listed policies where they are missing. */
static void add_floor_and_ceiling(ks_settings *s) {
  int key = ks_key_find("policy");
  ks_setting *policy = &s->of[key];
  bool none = false, all = false;
  for (int64_t i = 0; i < policy->n; i++) {
    none = none || strcmp(policy->values[i].s, "none") == 0;
    all = all || strcmp(policy->values[i].s, "all") == 0;
  }
  ks_value *values = NULL;
  ks_status status = ks_alloc_array(&values, (size_t)policy->n + 2, sizeof *values, "policies");
  if (status != KS_OK) {
    s->problems->status = status;
    return;
  }
  int64_t n = 0;
  if (!none) values[n++].s = "none";
  for (int64_t i = 0; i < policy->n; i++)
    values[n++] = policy->values[i];
  if (!all) values[n++].s = "all";
  ks_setting_replace(s, key, values, n, policy->where, KS_FROM_DEFAULT, NULL);
  free(values);
}

/* Flags of the keys that say nothing to this cell. */
static unsigned silent_flags(const ks_config *c) {
  const ks_policy *p = ks_policy_find(c->policy);
  unsigned flags = c->synth.writer == 0 ? KS_WRITING : 0;
  if (p && !p->trains) flags |= KS_TRAINING;
  if (p && p->unlimited) flags |= KS_STORAGE;
  return flags;
}

static ks_status name_cell(const ks_settings *s, const int *axes, int n_axes, const ks_config *c,
                           unsigned silent, char **out) {
  ks_text name = {0};
  ks_status status = KS_OK;
  for (int i = 0; status == KS_OK && i < n_axes; i++) {
    const ks_key *k = &ks_keys[axes[i]];
    if (i >= 2 && (s->of[axes[i]].n == 1 || (k->flags & silent))) continue;
    if (i) status = ks_text_add_str(&name, "-");
    if (status == KS_OK) status = ks_value_write_short(k, ks_value_of(k, c), &name);
  }
  *out = name.data;
  return status;
}

/* The cell at `place` (one number an axis), unless it is the same as one with a silent axis at its first
 * value. */
static ks_status add_cell(const ks_settings *s, const int *axes, int n_axes, const int64_t *place,
                          ks_matrix *m) {
  ks_cell *cell = &m->cells[m->n_cells];
  for (int i = 0; i < ks_n_keys; i++)
    ks_value_store(&ks_keys[i], s->of[i].values[0], &cell->config);
  for (int i = 0; i < n_axes; i++)
    ks_value_store(&ks_keys[axes[i]], s->of[axes[i]].values[place[i]], &cell->config);
  unsigned silent = silent_flags(&cell->config);
  for (int i = 0; i < n_axes; i++)
    if (place[i] > 0 && (ks_keys[axes[i]].flags & silent)) return KS_OK;
  KS_TRY(name_cell(s, axes, n_axes, &cell->config, silent, &cell->name));
  cell->index = m->n_cells++;
  return KS_OK;
}

ks_status ks_matrix_build(ks_settings *s, ks_matrix *m) {
  int axes[MAX_AXES], n_axes = order_axes(axes);
  int64_t place[MAX_AXES] = {0}, n = 1;
  if (s->of[ks_key_find("experiment.floor_and_ceiling")].values[0].b) add_floor_and_ceiling(s);
  KS_TRY(s->problems->status);
  for (int i = 0; i < n_axes; i++)
    if (!ks_mul_i64(n, s->of[axes[i]].n, &n) || n > MAX_CELLS)
      return KS_FAIL(KS_ECONFIG, "the lists cross to more than %d cells; split the experiment into several",
                     MAX_CELLS);
  KS_TRY(ks_alloc_array(&m->cells, (size_t)n, sizeof *m->cells, "cells"));
  for (int64_t i = 0; i < n; i++) {
    KS_TRY(add_cell(s, axes, n_axes, place, m));
    for (int a = n_axes - 1; a >= 0 && ++place[a] == s->of[axes[a]].n; a--)
      place[a] = 0;
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- shards */

static bool read_number(const char *text, int64_t *out) {
  char *end;
  errno = 0;
  long long v = text && *text >= '0' && *text <= '9' ? strtoll(text, &end, 10) : -1;
  if (v < 0 || errno || *end) return false;
  *out = v;
  return true;
}

/* An array's tasks may begin anywhere and skip: min, min + step, ... */
static bool shard_of_array(ks_shard *out) {
  int64_t id, n, min = 0, step = 1;
  if (!read_number(getenv("SLURM_ARRAY_TASK_ID"), &id) || !read_number(getenv("SLURM_ARRAY_TASK_COUNT"), &n))
    return false;
  read_number(getenv("SLURM_ARRAY_TASK_MIN"), &min);
  read_number(getenv("SLURM_ARRAY_TASK_STEP"), &step);
  if (n < 1 || step < 1 || id < min || (id - min) / step >= n) return false;
  *out = (ks_shard){.i = (id - min) / step, .n = n};
  snprintf(out->why, sizeof out->why, "SLURM_ARRAY_TASK_ID %lld, task %lld of %lld", (long long)id,
           (long long)out->i, (long long)n);
  return true;
}

/* SLURM_PROCID stands in a batch script's own environment too; SLURM_STEP_NUM_TASKS only under srun. */
static const struct {
  const char *rank, *size;
} rank_variables[] = {{"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
                      {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
                      {"PMI_RANK", "PMI_SIZE"}};

static bool shard_of_rank(ks_shard *out) {
  for (size_t v = 0; v < sizeof rank_variables / sizeof *rank_variables; v++) {
    int64_t i, n;
    if (!read_number(getenv(rank_variables[v].rank), &i) ||
        !read_number(getenv(rank_variables[v].size), &n) || i >= n)
      continue;
    *out = (ks_shard){.i = i, .n = n};
    snprintf(out->why, sizeof out->why, "%s %lld of %lld", rank_variables[v].rank, (long long)i,
             (long long)n);
    return true;
  }
  return false;
}

static bool shard_of_environment(ks_shard *out) {
  ks_shard array, rank;
  bool by_array = shard_of_array(&array), by_rank = shard_of_rank(&rank);
  if (by_array && by_rank && rank.n > 1) { /* an array of steps with several tasks each */
    int64_t n;
    if (!ks_mul_i64(array.n, rank.n, &n)) return false;
    *out = (ks_shard){.i = array.i * rank.n + rank.i, .n = n};
    snprintf(out->why, sizeof out->why, "array task %lld of %lld, rank %lld of %lld", (long long)array.i,
             (long long)array.n, (long long)rank.i, (long long)rank.n);
    return true;
  }
  if (by_array)
    *out = array;
  else if (by_rank)
    *out = rank;
  return by_array || by_rank;
}

ks_status ks_shard_parse(const char *text, ks_shard *out) {
  *out = (ks_shard){.i = 0, .n = 1};
  if (text && strcmp(text, "all") == 0) return KS_OK;
  if (!text || strcmp(text, "auto") == 0) {
    if (shard_of_environment(out) || !text) return KS_OK;
    return KS_FAIL(KS_ECONFIG, "--shard auto: none of SLURM_ARRAY_TASK_ID, SLURM_PROCID, "
                               "OMPI_COMM_WORLD_RANK, PMI_RANK is set with its count; write --shard i/n");
  }
  char copy[64];
  snprintf(copy, sizeof copy, "%s", text);
  char *slash = strchr(copy, '/');
  if (slash) *slash = 0;
  if (strlen(text) >= sizeof copy || !slash || !read_number(copy, &out->i) ||
      !read_number(slash + 1, &out->n) || out->i >= out->n) {
    *out = (ks_shard){.i = 0, .n = 1};
    return KS_FAIL(KS_ECONFIG, "--shard %s: wants i/n with 0 <= i < n, e.g. --shard 0/4, or auto, or all",
                   text);
  }
  snprintf(out->why, sizeof out->why, "--shard %lld/%lld", (long long)out->i, (long long)out->n);
  return KS_OK;
}
