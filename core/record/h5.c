#include "core/record/h5.h"

#include <pthread.h>
#include <stdio.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static H5E_auto2_t host_handler;
static void *host_data;

void ks_h5_enter(void) {
  pthread_mutex_lock(&one_at_a_time);
  H5Eget_auto2(H5E_DEFAULT, &host_handler, &host_data);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

void ks_h5_leave(void) {
  H5Eset_auto2(H5E_DEFAULT, host_handler, host_data);
  pthread_mutex_unlock(&one_at_a_time);
}

void ks_h5_close(hid_t *id) {
  if (*id >= 0) H5Idec_ref(*id);
  *id = -1;
}

static herr_t take_first(unsigned n, const H5E_error2_t *e, void *reason) {
  if (n == 0) snprintf(reason, 200, "%s", e->desc ? e->desc : "no reason given");
  return 0;
}

ks_status ks_h5_fail(const char *file, int line, ks_status status, const char *path, const char *what,
                     const char *name) {
  char reason[200] = "no reason given";
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_first, reason);
  const char *remedy = status == KS_EDATA ? "delete the file and run again, or restore it from a copy"
                                          : "free some memory and run again";
  return ks_fail(file, line, status, "%s: cannot %s %s (HDF5: %s); %s", path, what, name, reason, remedy);
}

/* ---------------------------------------------------------------- seal */

static void seal_text(char seal[KS_SEAL_BYTES], const char *kind, size_t n_bytes, const char *sha256) {
  memset(seal, 0, KS_SEAL_BYTES);
  snprintf(seal, KS_SEAL_BYTES,
           "keepsake %s\nschema %d\nbytes %zu\nsha256 %s\nHDF5 begins at byte 512: tail -c +513 FILE | "
           "sha256sum\n",
           kind, KS_RECORD_SCHEMA_VERSION, n_bytes, sha256);
}

static ks_status check_seal(const char *path, const char *kind, const unsigned char *data, size_t n) {
  char head[64], want[KS_SEAL_BYTES], hash[65];
  const char *remedy = "delete the file and run again, or restore it from a copy";
  snprintf(head, sizeof head, "keepsake %s\nschema ", kind);
  if (n < KS_SEAL_BYTES || memcmp(data, head, strlen(head)) != 0)
    return KS_FAIL(KS_EDATA,
                   "%s: is not a keepsake %s; name a file that keepsake wrote (files passed through other "
                   "HDF5 tools lose their seal)",
                   path, kind);
  if (data[KS_SEAL_BYTES - 1] != '\0')
    return KS_FAIL(KS_EDATA, "%s: byte %d: the seal is damaged; %s", path, KS_SEAL_BYTES - 1, remedy);
  long schema = strtol((const char *)data + strlen(head), NULL, 10);
  if (schema != KS_RECORD_SCHEMA_VERSION)
    return KS_FAIL(KS_EDATA,
                   "%s: has schema %ld, this program reads schema %d; use the version that wrote it, or "
                   "delete the file and run again",
                   path, schema, KS_RECORD_SCHEMA_VERSION);
  ks_sha256 h;
  ks_sha256_init(&h);
  ks_sha256_add(&h, data + KS_SEAL_BYTES, n - KS_SEAL_BYTES);
  ks_sha256_finish(&h, hash);
  seal_text(want, kind, n - KS_SEAL_BYTES, hash);
  if (memcmp(data, want, KS_SEAL_BYTES) != 0)
    return KS_FAIL(KS_EDATA,
                   "%s: is damaged or cut short: its %zu bytes are not those that its seal promises; %s",
                   path, n, remedy);
  return KS_OK;
}

/* ---------------------------------------------------------------- files */

ks_status ks_h5_open(const char *path, const char *kind, ks_h5 *out) {
  ks_file_map map;
  hid_t access = -1;
  *out = (ks_h5){path, -1, 0};
  KS_TRY(ks_file_map_open(path, &map));
  out->n_bytes = map.n;
  ks_status status = check_seal(path, kind, map.data, map.n);
  ks_file_map_close(&map);
  if (status != KS_OK) return status;
  access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
#if H5_VERSION_GE(1, 10, 7) && !(H5_VERS_MAJOR == 1 && H5_VERS_MINOR == 12 && H5_VERS_RELEASE == 0)
  H5Pset_file_locking(access, false,
                      true); /* a finished file never changes; network file systems may lack locks */
#endif
  out->file = H5Fopen(path, H5F_ACC_RDONLY, access);
  if (out->file < 0) status = KS_H5_READ_FAIL(path, "open", "it");
  ks_h5_close(&access);
  return status;
}

ks_status ks_h5_make(const char *path, ks_h5 *out) {
  ks_status status = KS_OK;
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  *out = (ks_h5){path, -1, 0};
  if (H5Pset_fapl_core(access, 1 << 20, false) < 0 || H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) < 0 ||
      (out->file = H5Fcreate("keepsake-image", H5F_ACC_TRUNC, H5P_DEFAULT, access)) < 0)
    status = KS_H5_MAKE_FAIL(path, "make", "it");
  ks_h5_close(&access);
  return status;
}

ks_status ks_h5_write(ks_h5 *h, const char *kind) {
  char *bytes = NULL, hash[65];
  ks_status status = KS_OK;
  ssize_t n = H5Fflush(h->file, H5F_SCOPE_GLOBAL) < 0 ? -1 : H5Fget_file_image(h->file, NULL, 0);
  if (n < 0) return KS_H5_MAKE_FAIL(h->path, "finish", "it");
  KS_TRY_OUT(ks_alloc_array(&bytes, (size_t)n + KS_SEAL_BYTES, 1, "results file"));
  if (H5Fget_file_image(h->file, bytes + KS_SEAL_BYTES, (size_t)n) != n) {
    status = KS_H5_MAKE_FAIL(h->path, "finish", "it");
    goto out;
  }
  ks_sha256 sha;
  ks_sha256_init(&sha);
  ks_sha256_add(&sha, bytes + KS_SEAL_BYTES, (size_t)n);
  ks_sha256_finish(&sha, hash);
  seal_text(bytes, kind, (size_t)n, hash);
  status = ks_file_write_atomic(h->path, bytes, (size_t)n + KS_SEAL_BYTES);
  if (status != KS_OK) ks_fail_context(status, "%s keeps what it held before", h->path);
out:
  free(bytes);
  return status;
}

void ks_h5_end(ks_h5 *h) {
  ks_h5_close(&h->file);
}

/* ---------------------------------------------------------------- objects */

bool ks_h5_has(const ks_h5 *h, const char *name) {
  return H5Lexists(h->file, name, H5P_DEFAULT) > 0;
}

ks_status ks_h5_open_object(const ks_h5 *h, const char *name, H5I_type_t type, hid_t *out) {
  char part[512];
  *out = -1;
  for (size_t n = 1; name[1] && n <= strlen(name) && n + 1 < sizeof part; n++) {
    if (name[n] != '/' && name[n] != '\0') continue;
    H5L_info_t link;
    memcpy(part, name, n);
    part[n] = '\0';
    if (H5Lget_info(h->file, part, &link, H5P_DEFAULT) < 0) return KS_H5_READ_FAIL(h->path, "find", part);
    if (link.type != H5L_TYPE_HARD)
      return KS_FAIL(KS_EDATA,
                     "%s: %s is a link to elsewhere, not part of this file; delete the file and run again",
                     h->path, part);
  }
  hid_t id = H5Oopen(h->file, name, H5P_DEFAULT);
  if (id < 0) return KS_H5_READ_FAIL(h->path, "open", name);
  *out = id;
  if (H5Iget_type(id) == type) return KS_OK;
  ks_h5_close(out);
  return KS_FAIL(KS_EDATA,
                 "%s: %s is not of the kind that this schema has there; delete the file and run again",
                 h->path, name);
}

ks_status ks_h5_make_group(const ks_h5 *h, const char *name, hid_t *out) {
  hid_t create = H5Pcreate(H5P_GROUP_CREATE);
  H5Pset_obj_track_times(create, false);
  *out = H5Gcreate2(h->file, name, H5P_DEFAULT, create, H5P_DEFAULT);
  ks_status status = *out < 0 ? KS_H5_MAKE_FAIL(h->path, "make", name) : KS_OK;
  ks_h5_close(&create);
  return status;
}

/* ---------------------------------------------------------------- text and numbers */

hid_t ks_h5_string_type(void) {
  hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, H5T_VARIABLE);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return type;
}

ks_status ks_h5_clean_text(const char *s, char **fixed) {
  size_t n = strlen(s), good = ks_utf8_check(s, n);
  ks_text t = {0};
  ks_status status = KS_OK;
  *fixed = NULL;
  if (good == n) return KS_OK;
  KS_TRY_OUT(ks_text_add(&t, s, good));
  while (good < n) {
    uint32_t cp;
    int length = ks_utf8_decode(s + good, n - good, &cp);
    KS_TRY_OUT(length > 0 ? ks_text_add(&t, s + good, (size_t)length) : ks_text_add_str(&t, "\xef\xbf\xbd"));
    good += length > 0 ? (size_t)length : 1;
  }
  *fixed = t.data;
  return KS_OK;
out:
  ks_text_free(&t);
  return status;
}

ks_status ks_h5_put_text(const ks_h5 *h, hid_t object, const char *name, const char *value) {
  char *fixed;
  KS_TRY(ks_h5_clean_text(value, &fixed));
  const char *text = fixed ? fixed : value;
  hid_t type = ks_h5_string_type(), space = H5Screate(H5S_SCALAR),
        attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  ks_status status = attribute < 0 || H5Awrite(attribute, type, &text) < 0
                         ? KS_H5_MAKE_FAIL(h->path, "write attribute", name)
                         : KS_OK;
  ks_h5_close(&attribute);
  ks_h5_close(&space);
  ks_h5_close(&type);
  free(fixed);
  return status;
}

static bool is_scalar_of(hid_t got_type, hid_t space, hid_t type) {
  return got_type >= 0 && space >= 0 && H5Sget_simple_extent_type(space) == H5S_SCALAR &&
         H5Tequal(got_type, type) > 0;
}

static ks_status wrong_type(const ks_h5 *h, const char *name) {
  return KS_FAIL(KS_EDATA, "%s: %s has not the type that this schema gives it; delete the file and run again",
                 h->path, name);
}

static ks_status get_attribute(const ks_h5 *h, hid_t object, const char *name, hid_t type, void *value) {
  hid_t got_type = -1, space = -1, attribute = H5Aopen(object, name, H5P_DEFAULT);
  ks_status status = KS_OK;
  if (attribute < 0) return KS_H5_READ_FAIL(h->path, "find attribute", name);
  got_type = H5Aget_type(attribute);
  space = H5Aget_space(attribute);
  if (!is_scalar_of(got_type, space, type))
    status = wrong_type(h, name);
  else if (H5Aread(attribute, type, value) < 0)
    status = KS_H5_READ_FAIL(h->path, "read attribute", name);
  ks_h5_close(&space);
  ks_h5_close(&got_type);
  ks_h5_close(&attribute);
  return status;
}

ks_status ks_h5_get_text(const ks_h5 *h, hid_t object, const char *name, char **value) {
  char *text = NULL;
  hid_t type = ks_h5_string_type();
  ks_status status = get_attribute(h, object, name, type, &text);
  ks_h5_close(&type);
  /* HDF5's memory goes back to HDF5 */
  if (status == KS_OK) status = ks_strdup(text ? text : "", value);
  if (text) H5free_memory(text);
  return status;
}

ks_status ks_h5_put_i64(const ks_h5 *h, hid_t object, const char *name, int64_t value) {
  hid_t space = H5Screate(H5S_SCALAR),
        attribute = H5Acreate2(object, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
  ks_status status = attribute < 0 || H5Awrite(attribute, H5T_NATIVE_INT64, &value) < 0
                         ? KS_H5_MAKE_FAIL(h->path, "write attribute", name)
                         : KS_OK;
  ks_h5_close(&attribute);
  ks_h5_close(&space);
  return status;
}

ks_status ks_h5_get_i64(const ks_h5 *h, hid_t object, const char *name, int64_t *value) {
  return get_attribute(h, object, name, H5T_NATIVE_INT64, value);
}

ks_status ks_h5_put_text_dataset(const ks_h5 *h, const char *name, const char *value) {
  char *fixed;
  KS_TRY(ks_h5_clean_text(value, &fixed));
  const char *text = fixed ? fixed : value;
  hid_t type = ks_h5_string_type(), space = H5Screate(H5S_SCALAR), create = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_obj_track_times(create, false);
  hid_t dataset = H5Dcreate2(h->file, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
  ks_status status = dataset < 0 || H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, &text) < 0
                         ? KS_H5_MAKE_FAIL(h->path, "write", name)
                         : KS_OK;
  ks_h5_close(&dataset);
  ks_h5_close(&create);
  ks_h5_close(&space);
  ks_h5_close(&type);
  free(fixed);
  return status;
}

ks_status ks_h5_get_text_dataset(const ks_h5 *h, const char *name, char **value) {
  ks_h5_strings strings = {.budget = h->n_bytes};
  char *text = NULL;
  hid_t dataset;
  KS_TRY(ks_h5_open_object(h, name, H5I_DATASET, &dataset));
  hid_t type = ks_h5_string_type(), got_type = H5Dget_type(dataset), space = H5Dget_space(dataset),
        transfer = ks_h5_strings_transfer(&strings);
  ks_status status = KS_OK;
  if (!is_scalar_of(got_type, space, type))
    status = wrong_type(h, name);
  else if (H5Dread(dataset, type, H5S_ALL, H5S_ALL, transfer, &text) < 0)
    status = KS_H5_READ_FAIL(h->path, "read", name);
  else if (!text)
    status = ks_strdup("", &text);
  ks_h5_strings_end(&strings, status == KS_OK);
  if (status == KS_OK) *value = text;
  ks_h5_close(&transfer);
  ks_h5_close(&space);
  ks_h5_close(&got_type);
  ks_h5_close(&type);
  ks_h5_close(&dataset);
  return status;
}

/* ---------------------------------------------------------------- strings of a read */

static void *strings_take(size_t n, void *user) {
  ks_h5_strings *s = user;
  if (n > s->budget) return NULL;
  if (s->n == s->cap) {
    size_t cap = s->cap ? 2 * s->cap : 64;
    void **more = realloc(s->blocks, cap * sizeof *more);
    if (!more) return NULL;
    s->blocks = more;
    s->cap = cap;
  }
  void *block = malloc(n ? n : 1);
  if (!block) return NULL;
  s->budget -= n;
  return s->blocks[s->n++] = block;
}

static void strings_give_back(void *block, void *user) {
  ks_h5_strings *s = user;
  for (size_t i = s->n; i-- > 0;) {
    if (s->blocks[i] != block) continue;
    s->blocks[i] = s->blocks[--s->n];
    break;
  }
  free(block);
}

hid_t ks_h5_strings_transfer(ks_h5_strings *s) {
  hid_t transfer = H5Pcreate(H5P_DATASET_XFER);
  H5Pset_vlen_mem_manager(transfer, strings_take, s, strings_give_back, s);
  return transfer;
}

void ks_h5_strings_end(ks_h5_strings *s, bool keep) {
  for (size_t i = 0; i < s->n && !keep; i++)
    free(s->blocks[i]);
  free(s->blocks);
  *s = (ks_h5_strings){0};
}
