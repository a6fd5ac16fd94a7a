/* results/README.md documents every table as record.h defines it: when this fails, put the text that it shows
 * there. */
#include "tests/core/record/rows.h"

Test(record_readme, documents_every_column) {
  static const char *const types[] = {
      [KS_COL_i64] = "int64", [KS_COL_i32] = "int32", [KS_COL_f64] = "float64", [KS_COL_str] = "string"};
  char *readme, version[64];
  size_t n;
  int n_missing = 0;
  MUST(ks_file_read(KS_SOURCE_DIR "/results/README.md", 1 << 20, &readme, &n));
  for (int t = 0; t < KS_N_TABLES; t++) {
    const ks_table_schema *s = ks_table_schema_of((ks_table)t);
    ks_text want = {0};
    MUST(ks_text_addf(&want, "### %s\n\n| column | type | meaning |\n|---|---|---|\n", s->path));
    for (int c = 0; c < s->n_columns; c++) {
      cr_assert(s->columns[c].what[0] != '\0', "%s %s has no description", s->path, s->columns[c].name);
      MUST(ks_text_addf(&want, "| %s | %s | %s |\n", s->columns[c].name, types[s->columns[c].type],
                        s->columns[c].what));
    }
    MUST(ks_text_add_str(&want, "\n"));
    if (!strstr(readme, want.data)) {
      n_missing++;
      cr_log_error("results/README.md lacks:\n%s", want.data);
    }
    ks_text_free(&want);
  }
  snprintf(version, sizeof version, "Schema version: %d.\n", KS_RECORD_SCHEMA_VERSION);
  if (!strstr(readme, version)) {
    n_missing++;
    cr_log_error("results/README.md lacks: %s", version);
  }
  free(readme);
  cr_assert(eq(int, n_missing, 0));
}
