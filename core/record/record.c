#include "core/record/h5.h"

enum { MAX_BLOBS = sizeof((ks_record_state *)0)->blobs / sizeof((ks_record_state *)0)->blobs[0] };

static const char *const status_names[] = {[KS_RUN_RUNNING] = "running",
                                           [KS_RUN_COMPLETE] = "complete",
                                           [KS_RUN_INTERRUPTED] = "interrupted",
                                           [KS_RUN_FAILED] = "failed"};
enum { N_STATUSES = sizeof status_names / sizeof status_names[0] };

const char *ks_run_status_name(ks_run_status s) {
  return (int)s >= 0 && (int)s < N_STATUSES ? status_names[s] : "unknown";
}

static bool is_plain_name(const char *name) {
  return name && *name && !strchr(name, '/') && strcmp(name, ".") != 0 && strlen(name) < 256;
}

static ks_status check_status(const char *path, ks_run_status status) {
  if ((int)status >= 0 && (int)status < N_STATUSES) return KS_OK;
  return KS_FAIL(KS_EINVAL, "%s: %d is not a run status; give one of ks_run_status", path, (int)status);
}

/* ---------------------------------------------------------------- writing */

static ks_status put_root(const ks_h5 *h, const char *format, const char *status_name) {
  hid_t root;
  ks_status status = ks_h5_open_object(h, "/", H5I_GROUP, &root);
  if (status == KS_OK) status = ks_h5_put_text(h, root, "format", format);
  if (status == KS_OK) status = ks_h5_put_i64(h, root, "schema_version", KS_RECORD_SCHEMA_VERSION);
  if (status == KS_OK && status_name) status = ks_h5_put_text(h, root, "status", status_name);
  ks_h5_close(&root);
  return status;
}

static bool is_of_machine(const char *name) {
  return strncmp(name, "time.", 5) == 0 || strncmp(name, "machine.", 8) == 0;
}

static ks_status check_meta(const char *path, const ks_meta *meta, int64_t n_meta) {
  if (n_meta < 0 || (n_meta > 0 && !meta))
    return KS_FAIL(KS_EINVAL, "%s: %lld named strings without an array", path, (long long)n_meta);
  for (int64_t i = 0; i < n_meta; i++) {
    if (!is_plain_name(meta[i].name) || !meta[i].value)
      return KS_FAIL(
          KS_EINVAL,
          "%s: named string %lld has no name, one with a slash, one of over 255 bytes, or no value", path,
          (long long)i);
    for (int64_t j = 0; j < i; j++)
      if (strcmp(meta[i].name, meta[j].name) == 0)
        return KS_FAIL(KS_EINVAL, "%s: the named string %s is given twice; give it once", path, meta[i].name);
  }
  return KS_OK;
}

static ks_status put_meta(const ks_h5 *h, const ks_meta *meta, int64_t n_meta) {
  hid_t groups[2] = {-1, -1};
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_h5_make_group(h, "/meta", &groups[0]));
  KS_TRY_OUT(ks_h5_make_group(h, "/time", &groups[1]));
  for (int64_t i = 0; i < n_meta; i++)
    KS_TRY_OUT(ks_h5_put_text(h, groups[is_of_machine(meta[i].name)], meta[i].name, meta[i].value));
out:
  ks_h5_close(&groups[0]);
  ks_h5_close(&groups[1]);
  return status;
}

static ks_status begin(const char *path, const char *config_text, const ks_meta *meta, int64_t n_meta) {
  ks_h5 h = {path, -1, 0};
  ks_status status = KS_OK;
  KS_TRY_OUT(check_meta(path, meta, n_meta));
  KS_TRY_OUT(ks_h5_make(path, &h));
  KS_TRY_OUT(put_root(&h, "keepsake record", ks_run_status_name(KS_RUN_RUNNING)));
  KS_TRY_OUT(ks_h5_put_text_dataset(&h, "/config", config_text));
  KS_TRY_OUT(put_meta(&h, meta, n_meta));
  for (int t = 0; t < KS_N_TABLES; t++)
    KS_TRY_OUT(ks_table_make(&h, (ks_table)t));
  KS_TRY_OUT(ks_h5_write(&h, "record"));
out:
  ks_h5_end(&h);
  return status;
}

static ks_status put_blob(const ks_h5 *h, hid_t group, const char *name, const void *bytes, size_t n) {
  hsize_t dims = n;
  hid_t space = H5Screate_simple(1, &dims, NULL), create = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_obj_track_times(create, false);
  hid_t dataset = H5Dcreate2(group, name, H5T_STD_U8LE, space, H5P_DEFAULT, create, H5P_DEFAULT);
  ks_status status = KS_OK;
  if (dataset < 0 || (n > 0 && H5Dwrite(dataset, H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes) < 0))
    status = KS_H5_MAKE_FAIL(h->path, "write state", name);
  ks_h5_close(&dataset);
  ks_h5_close(&create);
  ks_h5_close(&space);
  return status;
}

static ks_status check_state(const char *path, const ks_record_state *state) {
  if (state->n_blobs < 0 || state->n_blobs > MAX_BLOBS || state->n_arrivals < 0 || state->n_windows < 0)
    return KS_FAIL(
        KS_EINVAL,
        "%s: state of %lld blobs, %lld arrivals, %lld windows; give at most %d blobs and no negative count",
        path, (long long)state->n_blobs, (long long)state->n_arrivals, (long long)state->n_windows,
        MAX_BLOBS);
  for (int64_t i = 0; i < state->n_blobs; i++) {
    if (!is_plain_name(state->blobs[i].name) || (state->blobs[i].n > 0 && !state->blobs[i].bytes))
      return KS_FAIL(KS_EINVAL, "%s: state blob %lld has no name, one with a slash, or no bytes", path,
                     (long long)i);
    for (int64_t j = 0; j < i; j++)
      if (strcmp(state->blobs[i].name, state->blobs[j].name) == 0)
        return KS_FAIL(KS_EINVAL, "%s: state blob %s is given twice; give it once", path,
                       state->blobs[i].name);
  }
  return KS_OK;
}

static ks_status put_state(const ks_h5 *h, const ks_record_state *state) {
  hid_t group = -1;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_h5_make_group(h, "/state", &group));
  KS_TRY_OUT(ks_h5_put_i64(h, group, "n_arrivals", state->n_arrivals));
  KS_TRY_OUT(ks_h5_put_i64(h, group, "n_windows", state->n_windows));
  for (int64_t i = 0; i < state->n_blobs; i++)
    KS_TRY_OUT(put_blob(h, group, state->blobs[i].name, state->blobs[i].bytes, state->blobs[i].n));
out:
  ks_h5_close(&group);
  return status;
}

/* Everything but the root's attributes and /state, read and written anew: what is left behind leaves no hole
 * in the new file, and equal content gives equal bytes. (H5Ocopy would trust the old file.) */
static ks_status copy_content(const ks_h5 *from, const ks_h5 *to) {
  ks_record_info info = {0};
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_h5_get_text_dataset(from, "/config", &info.config_text));
  KS_TRY_OUT(ks_record_get_meta(from, "/meta", &info));
  KS_TRY_OUT(ks_record_get_meta(from, "/time", &info));
  KS_TRY_OUT(ks_h5_put_text_dataset(to, "/config", info.config_text));
  KS_TRY_OUT(put_meta(to, info.meta, info.n_meta));
  for (int t = 0; t < KS_N_TABLES; t++) {
    void *rows;
    int64_t n;
    KS_TRY_OUT(ks_table_read(from, (ks_table)t, &rows, &n));
    status = ks_table_make(to, (ks_table)t);
    if (status == KS_OK) status = ks_table_append(to, (ks_table)t, rows, n);
    ks_rows_free((ks_table)t, rows, n);
    if (status != KS_OK) goto out;
  }
out:
  ks_record_info_free(&info);
  return status;
}

static ks_status get_state(const ks_h5 *h, ks_record_state *out);

/* rows and state may be NULL; keep_state: the old one stays. */
static ks_status rewrite(const char *path, const ks_record_rows *rows, const ks_record_state *state,
                         bool keep_state, ks_run_status run) {
  ks_h5 old = {path, -1, 0}, h = {path, -1, 0};
  ks_record_state kept = {0};
  ks_status status = KS_OK;
  KS_TRY_OUT(check_status(path, run));
  if (state) KS_TRY_OUT(check_state(path, state));
  KS_TRY_OUT(ks_record_open(path, &old, NULL));
  if (keep_state && ks_h5_has(&old, "/state")) {
    KS_TRY_OUT(get_state(&old, &kept));
    state = &kept;
  }
  KS_TRY_OUT(ks_h5_make(path, &h));
  KS_TRY_OUT(put_root(&h, "keepsake record", ks_run_status_name(run)));
  KS_TRY_OUT(copy_content(&old, &h));
  ks_h5_end(&old);
  for (int t = 0; t < KS_N_TABLES && rows; t++)
    KS_TRY_OUT(ks_table_append(&h, (ks_table)t, rows->rows[t], rows->n_rows[t]));
  if (state) KS_TRY_OUT(put_state(&h, state));
  KS_TRY_OUT(ks_h5_write(&h, "record"));
out:
  ks_h5_end(&h);
  ks_h5_end(&old);
  ks_record_state_free(&kept);
  return status;
}

ks_status ks_record_begin(const char *path, const char *config_text, const ks_meta *meta, int64_t n_meta) {
  if (!path || !config_text) return KS_FAIL(KS_EINVAL, "record: no path or no configuration text");
  ks_h5_enter();
  ks_status status = begin(path, config_text, meta, n_meta);
  ks_h5_leave();
  return status;
}

ks_status ks_record_append(const char *path, const ks_record_rows *rows, const ks_record_state *state,
                           ks_run_status status) {
  if (!path) return KS_FAIL(KS_EINVAL, "record: no path");
  ks_h5_enter();
  ks_status s = rewrite(path, rows, status == KS_RUN_COMPLETE ? NULL : state, false, status);
  ks_h5_leave();
  return s;
}

ks_status ks_record_set_status(const char *path, ks_run_status status) {
  if (!path) return KS_FAIL(KS_EINVAL, "record: no path");
  ks_h5_enter();
  ks_status s = rewrite(path, NULL, NULL, status != KS_RUN_COMPLETE, status);
  ks_h5_leave();
  return s;
}

/* ---------------------------------------------------------------- reading */

static ks_status get_status(const ks_h5 *h, hid_t root, ks_run_status *out) {
  char *name;
  int i = 0;
  KS_TRY(ks_h5_get_text(h, root, "status", &name));
  while (i < N_STATUSES && strcmp(name, status_names[i]) != 0)
    i++;
  free(name);
  if (i == N_STATUSES)
    return KS_FAIL(KS_EDATA, "%s: its status is none that this schema knows; delete the file and run again",
                   h->path);
  *out = (ks_run_status)i;
  return KS_OK;
}

ks_status ks_record_open(const char *path, ks_h5 *h, ks_run_status *run) {
  hid_t root = -1;
  int64_t schema;
  ks_run_status found;
  ks_status status = ks_h5_open(path, "record", h);
  if (status == KS_OK) status = ks_h5_open_object(h, "/", H5I_GROUP, &root);
  if (status == KS_OK) status = ks_h5_get_i64(h, root, "schema_version", &schema);
  if (status == KS_OK && schema != KS_RECORD_SCHEMA_VERSION)
    status = KS_FAIL(KS_EDATA,
                     "%s: has schema %lld, this program reads schema %d; use the version that wrote it, or "
                     "delete the file and run again",
                     path, (long long)schema, KS_RECORD_SCHEMA_VERSION);
  if (status == KS_OK) status = get_status(h, root, run ? run : &found);
  ks_h5_close(&root);
  if (status != KS_OK) ks_h5_end(h);
  return status;
}

static ks_status get_one_meta(const ks_h5 *h, hid_t group, hsize_t i, ks_meta *out) {
  char name[257] = "", *name_copy = NULL, *value = NULL;
  if (H5Aget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT) < 0)
    return KS_H5_READ_FAIL(h->path, "list", "its named strings");
  KS_TRY(ks_h5_get_text(h, group, name, &value));
  ks_status status = ks_strdup(name, &name_copy);
  if (status != KS_OK) free(value);
  if (status == KS_OK) *out = (ks_meta){name_copy, value};
  return status;
}

ks_status ks_record_get_meta(const ks_h5 *h, const char *group_name, ks_record_info *out) {
  H5O_info_t info;
  ks_meta *all = NULL;
  hid_t group;
  ks_status status = KS_OK;
  KS_TRY(ks_h5_open_object(h, group_name, H5I_GROUP, &group));
  if (H5Oget_info(group, &info) < 0 || info.num_attrs > h->n_bytes) {
    status = KS_H5_READ_FAIL(h->path, "list the attributes of", group_name);
    goto out;
  }
  KS_TRY_OUT(ks_alloc_array(&all, (size_t)out->n_meta + info.num_attrs, sizeof *all, "named strings"));
  if (out->n_meta > 0) memcpy(all, out->meta, (size_t)out->n_meta * sizeof *all);
  free(out->meta);
  out->meta = all;
  for (hsize_t i = 0; i < info.num_attrs; i++) {
    KS_TRY_OUT(get_one_meta(h, group, i, &out->meta[out->n_meta]));
    out->n_meta++;
  }
out:
  ks_h5_close(&group);
  return status;
}

static ks_status read_info(const char *path, ks_record_info *out) {
  ks_h5 h;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_record_open(path, &h, &out->status));
  out->schema_version = KS_RECORD_SCHEMA_VERSION;
  KS_TRY_OUT(ks_h5_get_text_dataset(&h, "/config", &out->config_text));
  KS_TRY_OUT(ks_record_get_meta(&h, "/meta", out));
  KS_TRY_OUT(ks_record_get_meta(&h, "/time", out));
out:
  ks_h5_end(&h);
  if (status != KS_OK) ks_record_info_free(out);
  return status;
}

ks_status ks_record_read_info(const char *path, ks_record_info *out) {
  *out = (ks_record_info){0};
  ks_h5_enter();
  ks_status status = read_info(path, out);
  ks_h5_leave();
  return status;
}

void ks_record_info_free(ks_record_info *i) {
  for (int64_t m = 0; m < i->n_meta; m++) {
    free((void *)(uintptr_t)i->meta[m].name);
    free((void *)(uintptr_t)i->meta[m].value);
  }
  free(i->meta);
  free(i->config_text);
  *i = (ks_record_info){0};
}

const char *ks_record_info_meta(const ks_record_info *i, const char *name) {
  for (int64_t m = 0; m < i->n_meta; m++)
    if (strcmp(i->meta[m].name, name) == 0) return i->meta[m].value;
  return NULL;
}

ks_status ks_record_read_rows(const char *path, ks_table t, void **rows, int64_t *n) {
  if ((int)t < 0 || t >= KS_N_TABLES)
    return KS_FAIL(KS_EINVAL, "%s: %d is not a table; give one of ks_table", path, (int)t);
  ks_h5 h;
  *rows = NULL;
  *n = 0;
  ks_h5_enter();
  ks_status status = ks_record_open(path, &h, NULL);
  if (status == KS_OK) status = ks_table_read(&h, t, rows, n);
  if (status != KS_OK) *n = 0;
  ks_h5_end(&h);
  ks_h5_leave();
  return status;
}

/* ---------------------------------------------------------------- state */

static ks_status read_blob(const ks_h5 *h, hid_t dataset, const char *name, unsigned char **bytes,
                           size_t *n) {
  hid_t type = H5Dget_type(dataset), space = H5Dget_space(dataset), create = H5Dget_create_plist(dataset);
  hsize_t dims = 0;
  ks_status status = KS_OK;
  *bytes = NULL;
  bool ok = type >= 0 && space >= 0 && create >= 0 && H5Tequal(type, H5T_STD_U8LE) > 0 &&
            H5Sget_simple_extent_ndims(space) == 1 && H5Sget_simple_extent_dims(space, &dims, NULL) == 1 &&
            H5Pget_layout(create) == H5D_CONTIGUOUS && H5Pget_external_count(create) == 0 &&
            dims <= h->n_bytes;
  if (!ok)
    status = KS_FAIL(KS_EDATA,
                     "%s: /state/%s is not stored as this schema stores state; delete the file and run again",
                     h->path, name);
  else if ((status = ks_alloc_array(bytes, dims, 1, "state")) == KS_OK && dims > 0 &&
           H5Dread(dataset, H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, *bytes) < 0)
    status = KS_H5_READ_FAIL(h->path, "read state", name);
  *n = dims;
  ks_h5_close(&create);
  ks_h5_close(&space);
  ks_h5_close(&type);
  return status;
}

static ks_status read_named_blob(const ks_h5 *h, hid_t group, hsize_t i, ks_record_state *out) {
  char name[257] = "", *name_copy = NULL;
  unsigned char *bytes = NULL;
  size_t n = 0;
  hid_t dataset = -1;
  ks_text t = {0};
  ks_status status = KS_OK;
  if (H5Lget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT) < 0)
    return KS_H5_READ_FAIL(h->path, "list", "/state");
  KS_TRY_OUT(ks_text_addf(&t, "/state/%s", name));
  KS_TRY_OUT(ks_h5_open_object(h, t.data, H5I_DATASET, &dataset));
  KS_TRY_OUT(read_blob(h, dataset, name, &bytes, &n));
  KS_TRY_OUT(ks_strdup(name, &name_copy));
  out->blobs[out->n_blobs].name = name_copy;
  out->blobs[out->n_blobs].bytes = bytes;
  out->blobs[out->n_blobs++].n = n;
  bytes = NULL;
out:
  free(bytes);
  ks_h5_close(&dataset);
  ks_text_free(&t);
  return status;
}

static ks_status get_state(const ks_h5 *h, ks_record_state *out) {
  H5G_info_t info;
  hid_t group = -1;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_h5_open_object(h, "/state", H5I_GROUP, &group));
  KS_TRY_OUT(ks_h5_get_i64(h, group, "n_arrivals", &out->n_arrivals));
  KS_TRY_OUT(ks_h5_get_i64(h, group, "n_windows", &out->n_windows));
  if (H5Gget_info(group, &info) < 0 || info.nlinks > MAX_BLOBS || out->n_arrivals < 0 || out->n_windows < 0) {
    status = KS_FAIL(KS_EDATA,
                     "%s: /state has more than %d parts or negative counts; delete the file and run again",
                     h->path, MAX_BLOBS);
    goto out;
  }
  for (hsize_t i = 0; i < info.nlinks; i++)
    KS_TRY_OUT(read_named_blob(h, group, i, out));
out:
  ks_h5_close(&group);
  if (status != KS_OK) ks_record_state_free(out);
  return status;
}

static ks_status read_state(const char *path, ks_record_state *out) {
  ks_h5 h;
  KS_TRY(ks_record_open(path, &h, NULL));
  ks_status status =
      ks_h5_has(&h, "/state")
          ? get_state(&h, out)
          : KS_FAIL(KS_EDATA,
                    "%s: has no state to resume from: it is complete, or was interrupted before its "
                    "first checkpoint; run it again from the start",
                    path);
  ks_h5_end(&h);
  return status;
}

ks_status ks_record_read_state(const char *path, ks_record_state *out) {
  *out = (ks_record_state){0};
  ks_h5_enter();
  ks_status status = read_state(path, out);
  ks_h5_leave();
  return status;
}

void ks_record_state_free(ks_record_state *s) {
  for (int64_t i = 0; i < s->n_blobs; i++) {
    free((void *)(uintptr_t)s->blobs[i].name);
    free((void *)(uintptr_t)s->blobs[i].bytes);
  }
  *s = (ks_record_state){0};
}
