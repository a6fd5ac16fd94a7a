#include "core/record/h5.h"

enum { CHUNK_ROWS = 1024, MOST_DEFLATED = 1100 /* deflate shrinks by 1032 at most */ };

#define C(type, name, what) {#name, KS_COL_##type, offsetof(ROW, name), what},
#define ROW                 ks_row_arrival
static const ks_column arrival_columns[] = {KS_ARRIVAL_COLUMNS(C)};
#undef ROW
#define ROW ks_row_checkpoint
static const ks_column checkpoint_columns[] = {KS_CHECKPOINT_COLUMNS(C)};
#undef ROW
#define ROW ks_row_answer
static const ks_column answer_columns[] = {KS_ANSWER_COLUMNS(C)};
#undef ROW
#define ROW ks_row_step
static const ks_column step_columns[] = {KS_STEP_COLUMNS(C)};
#undef ROW
#define ROW ks_row_buffer
static const ks_column buffer_columns[] = {KS_BUFFER_COLUMNS(C)};
#undef ROW
#define ROW ks_row_synthesis
static const ks_column synthesis_columns[] = {KS_SYNTHESIS_COLUMNS(C)};
#undef ROW
#define ROW ks_row_time
static const ks_column time_columns[] = {KS_TIME_COLUMNS(C)};
#undef ROW

#define T(path, row, columns)                                                                                \
  [KS_TABLE_##row] = {path, sizeof(ks_row_##row), row##_columns,                                             \
                      (int)(sizeof row##_columns / sizeof row##_columns[0])},
static const ks_table_schema tables[KS_N_TABLES] = {KS_TABLE_MAP(T)};

static const size_t column_bytes[] = {
    [KS_COL_i64] = 8, [KS_COL_i32] = 4, [KS_COL_f64] = 8, [KS_COL_str] = sizeof(char *)};

const ks_table_schema *ks_table_schema_of(ks_table t) {
  return &tables[t];
}
const char *ks_table_path(ks_table t) {
  return t >= 0 && t < KS_N_TABLES ? tables[t].path : NULL;
}
size_t ks_table_row_bytes(ks_table t) {
  return t >= 0 && t < KS_N_TABLES ? tables[t].row_bytes : 0;
}

/* The row struct as it lies in memory, or packed and little-endian as in the file. */
static hid_t row_type(const ks_table_schema *s, bool in_file) {
  const hid_t memory[] = {H5T_NATIVE_INT64, H5T_NATIVE_INT32, H5T_NATIVE_DOUBLE},
              file[] = {H5T_STD_I64LE, H5T_STD_I32LE, H5T_IEEE_F64LE};
  size_t at = 0;
  for (int i = 0; i < s->n_columns; i++)
    at += column_bytes[s->columns[i].type];
  hid_t string = ks_h5_string_type(), type = H5Tcreate(H5T_COMPOUND, in_file ? at : s->row_bytes);
  at = 0;
  for (int i = 0; i < s->n_columns; i++) {
    const ks_column *c = &s->columns[i];
    hid_t member = c->type == KS_COL_str ? string : in_file ? file[c->type] : memory[c->type];
    if (H5Tinsert(type, c->name, in_file ? at : c->offset, member) < 0) ks_h5_close(&type);
    at += column_bytes[c->type];
  }
  ks_h5_close(&string);
  return type;
}

static hid_t creation_list(void) {
  const hsize_t chunk = CHUNK_ROWS;
  hid_t create = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_obj_track_times(create, false);
  H5Pset_chunk(create, 1, &chunk);
  if (H5Zfilter_avail(H5Z_FILTER_DEFLATE) > 0) {
    H5Pset_shuffle(create);
    H5Pset_deflate(create, 1);
  }
  return create;
}

ks_status ks_table_make(const ks_h5 *h, ks_table t) {
  const ks_table_schema *s = &tables[t];
  const hsize_t none = 0, unlimited = H5S_UNLIMITED;
  hid_t type = row_type(s, true), space = H5Screate_simple(1, &none, &unlimited), create = creation_list();
  hid_t dataset = H5Dcreate2(h->file, s->path, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
  ks_status status = dataset < 0 ? KS_H5_MAKE_FAIL(h->path, "make table", s->path) : KS_OK;
  for (int i = 0; i < s->n_columns && status == KS_OK; i++)
    status = ks_h5_put_text(h, dataset, s->columns[i].name, s->columns[i].what);
  ks_h5_close(&dataset);
  ks_h5_close(&create);
  ks_h5_close(&space);
  ks_h5_close(&type);
  return status;
}

/* ---------------------------------------------------------------- append */

static char **cell_text(const ks_table_schema *s, int column, void *rows, int64_t row) {
  return (char **)(void *)((char *)rows + (size_t)row * s->row_bytes + s->columns[column].offset);
}

/* *fixed: a copy of rows with valid UTF-8 and no NULL in place of wrong strings (listed in owned), or NULL
 * when all are well. */
static ks_status fix_texts(const ks_table_schema *s, const void *rows, int64_t n, void **fixed,
                           ks_h5_strings *owned) {
  void *writable = (void *)(uintptr_t)rows;
  for (int c = 0; c < s->n_columns; c++) {
    if (s->columns[c].type != KS_COL_str) continue;
    for (int64_t r = 0; r < n; r++) {
      const char *text = *cell_text(s, c, writable, r);
      char *better = NULL;
      if (text) KS_TRY(ks_h5_clean_text(text, &better));
      if (text && !better) continue;
      if (!*fixed) {
        KS_TRY(ks_alloc_array(fixed, (size_t)n, s->row_bytes, s->path));
        memcpy(*fixed, rows, (size_t)n * s->row_bytes);
        KS_TRY(
            ks_alloc_array(&owned->blocks, (size_t)n * (size_t)s->n_columns, sizeof *owned->blocks, s->path));
      }
      if (better) owned->blocks[owned->n++] = better;
      *cell_text(s, c, *fixed, r) = better ? better : (char *)(uintptr_t) "";
    }
  }
  return KS_OK;
}

static ks_status write_rows(const ks_h5 *h, const ks_table_schema *s, hid_t dataset, int64_t n_before,
                            const void *rows, int64_t n) {
  hsize_t start = (hsize_t)n_before, count = (hsize_t)n, total = start + count;
  hid_t type = row_type(s, false), in_file = -1, in_memory = H5Screate_simple(1, &count, NULL);
  ks_status status = KS_OK;
  if (H5Dset_extent(dataset, &total) < 0 || (in_file = H5Dget_space(dataset)) < 0 ||
      H5Sselect_hyperslab(in_file, H5S_SELECT_SET, &start, NULL, &count, NULL) < 0 ||
      H5Dwrite(dataset, type, in_memory, in_file, H5P_DEFAULT, rows) < 0)
    status = KS_H5_MAKE_FAIL(h->path, "append to", s->path);
  ks_h5_close(&in_memory);
  ks_h5_close(&in_file);
  ks_h5_close(&type);
  return status;
}

ks_status ks_table_append(const ks_h5 *h, ks_table t, const void *rows, int64_t n) {
  const ks_table_schema *s = &tables[t];
  ks_h5_strings owned = {0};
  void *fixed = NULL;
  hid_t dataset = -1;
  int64_t n_before;
  ks_status status = KS_OK;
  if (n == 0) return KS_OK;
  if (n < 0 || !rows)
    return KS_FAIL(KS_EINVAL, "%s: %lld rows at %p; give an array of 0 or more rows", s->path, (long long)n,
                   rows);
  KS_TRY_OUT(ks_table_open(h, t, &dataset, &n_before));
  KS_TRY_OUT(fix_texts(s, rows, n, &fixed, &owned));
  KS_TRY_OUT(write_rows(h, s, dataset, n_before, fixed ? fixed : rows, n));
out:
  ks_h5_close(&dataset);
  free(fixed);
  ks_h5_strings_end(&owned, false);
  return status;
}

/* ---------------------------------------------------------------- read */

/* Chunked, with no filter but ours: a foreign filter would load foreign code, other layouts may lie in other
 * files. */
static bool is_plainly_stored(hid_t dataset) {
  hid_t create = H5Dget_create_plist(dataset);
  bool ok = create >= 0 && H5Pget_layout(create) == H5D_CHUNKED;
  int n = ok ? H5Pget_nfilters(create) : 0;
  for (int i = 0; i < n; i++) {
    unsigned flags, config;
    size_t n_values = 0;
    H5Z_filter_t f = H5Pget_filter2(create, (unsigned)i, &flags, &n_values, NULL, 0, NULL, &config);
    ok = ok && (f == H5Z_FILTER_DEFLATE || f == H5Z_FILTER_SHUFFLE);
  }
  hsize_t chunk = 0;
  ok = ok && H5Pget_chunk(create, 1, &chunk) == 1 && chunk == CHUNK_ROWS;
  ks_h5_close(&create);
  return ok;
}

ks_status ks_table_open(const ks_h5 *h, ks_table t, hid_t *dataset, int64_t *n_rows) {
  const ks_table_schema *s = &tables[t];
  hsize_t n = 0, most = 0;
  KS_TRY(ks_h5_open_object(h, s->path, H5I_DATASET, dataset));
  hid_t type = H5Dget_type(*dataset), want = row_type(s, true), space = H5Dget_space(*dataset);
  bool ok = type >= 0 && space >= 0 && H5Tequal(type, want) > 0 && H5Sget_simple_extent_ndims(space) == 1 &&
            H5Sget_simple_extent_dims(space, &n, &most) == 1 && is_plainly_stored(*dataset);
  /* rows that are announced but stored nowhere would be made up from fill values */
  if (ok)
    ok = n <= H5Dget_storage_size(*dataset) / H5Tget_size(want) * MOST_DEFLATED +
                  MOST_DEFLATED * (H5Dget_storage_size(*dataset) > 0);
  ks_h5_close(&space);
  ks_h5_close(&want);
  ks_h5_close(&type);
  *n_rows = (int64_t)n;
  if (ok) return KS_OK;
  ks_h5_close(dataset);
  return KS_FAIL(
      KS_EDATA, "%s: table %s has not the columns or the storage of schema %d; delete the file and run again",
      h->path, s->path, KS_RECORD_SCHEMA_VERSION);
}

/* HDF5 gives an empty string as NULL. */
static ks_status replace_null_texts(const ks_table_schema *s, void *rows, int64_t n) {
  ks_status status = KS_OK;
  for (int c = 0; c < s->n_columns; c++)
    for (int64_t r = 0; r < n && s->columns[c].type == KS_COL_str; r++)
      if (!*cell_text(s, c, rows, r) && status == KS_OK) status = ks_strdup("", cell_text(s, c, rows, r));
  return status;
}

ks_status ks_table_read(const ks_h5 *h, ks_table t, void **rows, int64_t *n) {
  const ks_table_schema *s = &tables[t];
  ks_h5_strings strings = {.budget = h->n_bytes};
  hid_t dataset = -1, type = -1, transfer = -1;
  void *out = NULL;
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_table_open(h, t, &dataset, n));
  KS_TRY_OUT(ks_alloc_array(&out, (size_t)*n, s->row_bytes, s->path));
  type = row_type(s, false);
  transfer = ks_h5_strings_transfer(&strings);
  bool ok = *n == 0 || H5Dread(dataset, type, H5S_ALL, H5S_ALL, transfer, out) >= 0;
  if (!ok) status = KS_H5_READ_FAIL(h->path, "read table", s->path);
  ks_h5_strings_end(&strings, ok);
  if (ok && (status = replace_null_texts(s, out, *n)) == KS_OK) {
    *rows = out;
    out = NULL;
  } else if (ok) {
    ks_rows_free(t, out, *n);
    out = NULL;
  }
out:
  ks_h5_close(&transfer);
  ks_h5_close(&type);
  ks_h5_close(&dataset);
  free(out);
  return status;
}

void ks_rows_free(ks_table t, void *rows, int64_t n) {
  if (!rows || t < 0 || t >= KS_N_TABLES) return;
  for (int c = 0; c < tables[t].n_columns; c++)
    for (int64_t r = 0; r < n && tables[t].columns[c].type == KS_COL_str; r++)
      free(*cell_text(&tables[t], c, rows, r));
  free(rows);
}
