#include "core/record/h5.h"

/* What is hashed, in this order, all numbers little-endian, a text as its length (8 bytes) and its bytes:
 * "keepsake digest 1"; the configuration; the number of named strings and each name and value, by name; then
 * for each table outside /time its path, its columns' names, the number of rows, and the rows. Every NaN
 * counts as the same NaN. */

static void add_u64(ks_sha256 *h, uint64_t v) {
  unsigned char bytes[8];
  for (int i = 0; i < 8; i++)
    bytes[i] = (unsigned char)(v >> 8 * i);
  ks_sha256_add(h, bytes, sizeof bytes);
}

static void add_text(ks_sha256 *h, const char *s) {
  size_t n = strlen(s);
  add_u64(h, n);
  ks_sha256_add(h, s, n);
}

static void add_f64(ks_sha256 *h, double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  add_u64(h, x == x ? bits : 0x7ff8000000000000u);
}

static void add_cell(ks_sha256 *h, const ks_column *c, const char *row) {
  const void *at = row + c->offset;
  switch (c->type) {
  case KS_COL_i64:
    add_u64(h, (uint64_t) * (const int64_t *)at);
    break;
  case KS_COL_i32:
    add_u64(h, (uint64_t) * (const int32_t *)at);
    break;
  case KS_COL_f64:
    add_f64(h, *(const double *)at);
    break;
  case KS_COL_str:
    add_text(h, *(char *const *)at);
    break;
  }
}

static ks_status add_table(ks_sha256 *sha, const ks_h5 *h, ks_table t) {
  const ks_table_schema *s = ks_table_schema_of(t);
  void *rows;
  int64_t n;
  KS_TRY(ks_table_read(h, t, &rows, &n));
  add_text(sha, s->path);
  for (int c = 0; c < s->n_columns; c++)
    add_text(sha, s->columns[c].name);
  add_u64(sha, (uint64_t)n);
  for (int64_t r = 0; r < n; r++)
    for (int c = 0; c < s->n_columns; c++)
      add_cell(sha, &s->columns[c], (const char *)rows + (size_t)r * s->row_bytes);
  ks_rows_free(t, rows, n);
  return KS_OK;
}

static ks_status digest(const char *path, char out_hex[65]) {
  ks_h5 h;
  ks_sha256 sha;
  char *config = NULL;
  ks_record_info info = {0};
  ks_status status = KS_OK;
  KS_TRY_OUT(ks_record_open(path, &h, NULL));
  KS_TRY_OUT(ks_h5_get_text_dataset(&h, "/config", &config));
  KS_TRY_OUT(ks_record_get_meta(&h, "/meta", &info));
  ks_sha256_init(&sha);
  add_text(&sha, "keepsake digest 1");
  add_text(&sha, config);
  add_u64(&sha, (uint64_t)info.n_meta);
  for (int64_t i = 0; i < info.n_meta; i++) {
    add_text(&sha, info.meta[i].name);
    add_text(&sha, info.meta[i].value);
  }
  for (int t = 0; t < KS_N_TABLES; t++)
    if (strncmp(ks_table_path((ks_table)t), "/time/", 6) != 0) KS_TRY_OUT(add_table(&sha, &h, (ks_table)t));
  ks_sha256_finish(&sha, out_hex);
out:
  free(config);
  ks_record_info_free(&info);
  ks_h5_end(&h);
  return status;
}

ks_status ks_record_digest(const char *path, char out_hex[65]) {
  ks_h5_enter();
  ks_status status = digest(path, out_hex);
  ks_h5_leave();
  return status;
}
