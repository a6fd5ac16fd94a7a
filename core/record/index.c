#include "core/record/h5.h"

#include <errno.h>

/* The folder of a file (the file itself need not be there yet) without links and dots, and where its name
 * begins. */
static ks_status real_folder(const char *path, char **folder, const char **name) {
  const char *slash = strrchr(path, '/');
  char *given = NULL;
  *name = slash ? slash + 1 : path;
  KS_TRY(slash ? ks_strndup(path, slash == path ? 1 : (size_t)(slash - path), &given)
               : ks_strdup(".", &given));
  *folder = realpath(given, NULL);
  ks_status status = *folder ? KS_OK
                             : KS_FAIL(KS_EIO, "%s: cannot find its folder %s: %s; make the folder first",
                                       path, given, strerror(errno));
  free(given);
  return status;
}

/* The way from folder a to folder b, "" or ending in a slash. */
static ks_status add_way(ks_text *t, const char *a, const char *b) {
  size_t common = 0;
  for (size_t i = 0;; i++) {
    bool a_ends = a[i] == '/' || a[i] == '\0', b_ends = b[i] == '/' || b[i] == '\0';
    if (a_ends && b_ends) common = i;
    if (a[i] != b[i] || a[i] == '\0') break;
  }
  for (const char *up = a + common; *up; up++)
    if (*up == '/' && up[1]) KS_TRY(ks_text_add_str(t, "../"));
  const char *down = b + common + (b[common] == '/');
  return *down ? ks_text_addf(t, "%s/", down) : KS_OK;
}

static ks_status link_cell(const ks_h5 *h, const char *index_folder, hid_t cells, const char *name,
                           const char *file) {
  char *folder = NULL;
  const char *base;
  ks_text t = {0};
  ks_status status = KS_OK;
  if (!name || !*name || strchr(name, '/') || strcmp(name, ".") == 0)
    return KS_FAIL(KS_EINVAL, "%s: \"%s\" cannot name a cell: give a name without a slash", h->path,
                   name ? name : "");
  if (H5Lexists(cells, name, H5P_DEFAULT) > 0)
    return KS_FAIL(KS_EINVAL, "%s: two cells are named %s; give each its own name", h->path, name);
  KS_TRY_OUT(real_folder(file, &folder, &base));
  KS_TRY_OUT(add_way(&t, index_folder, folder));
  KS_TRY_OUT(ks_text_add_str(&t, base));
  if (H5Lcreate_external(t.data, "/", cells, name, H5P_DEFAULT, H5P_DEFAULT) < 0)
    status = KS_H5_MAKE_FAIL(h->path, "link cell", name);
out:
  free(folder);
  ks_text_free(&t);
  return status;
}

static ks_status write_index(const char *path, const char *config_text, const char *const *names,
                             const char *const *files, int64_t n) {
  ks_h5 h = {path, -1, 0};
  char *folder = NULL;
  const char *base;
  hid_t root = -1, cells = -1;
  ks_status status = KS_OK;
  KS_TRY_OUT(real_folder(path, &folder, &base));
  KS_TRY_OUT(ks_h5_make(path, &h));
  KS_TRY_OUT(ks_h5_open_object(&h, "/", H5I_GROUP, &root));
  KS_TRY_OUT(ks_h5_put_text(&h, root, "format", "keepsake index"));
  KS_TRY_OUT(ks_h5_put_i64(&h, root, "schema_version", KS_RECORD_SCHEMA_VERSION));
  KS_TRY_OUT(ks_h5_put_text_dataset(&h, "/config", config_text));
  KS_TRY_OUT(ks_h5_make_group(&h, "/cells", &cells));
  for (int64_t i = 0; i < n; i++)
    KS_TRY_OUT(link_cell(&h, folder, cells, names[i], files[i]));
  KS_TRY_OUT(ks_h5_write(&h, "index"));
out:
  ks_h5_close(&cells);
  ks_h5_close(&root);
  ks_h5_end(&h);
  free(folder);
  return status;
}

ks_status ks_record_write_index(const char *path, const char *config_text, const char *const *cell_names,
                                const char *const *cell_files, int64_t n_cells) {
  if (!path || !config_text || n_cells < 0 || (n_cells > 0 && (!cell_names || !cell_files)))
    return KS_FAIL(KS_EINVAL, "index: no path, no configuration text, or cells without names and files");
  ks_h5_enter();
  ks_status status = write_index(path, config_text, cell_names, cell_files, n_cells);
  ks_h5_leave();
  return status;
}
