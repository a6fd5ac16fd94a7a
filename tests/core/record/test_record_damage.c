/* What must not hurt: damage, foreign and made-up files, a full disk, SIGKILL. */
#include "tests/core/record/rows.h"

#include <errno.h>
#include <hdf5.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

TestSuite(record_damage, .fini = remove_test_folder);

static const int64_t none[KS_N_TABLES] = {0};

/* A record with some of everything. */
static void make_good(const char *path) {
  const int64_t all[KS_N_TABLES] = {40, 2, 20, 30, 10, 25, 2};
  const ks_record_state state = {.n_arrivals = 40,
                                 .n_windows = 2,
                                 .n_blobs = 2,
                                 .blobs = {{"selector", "0123456789", 10}, {"adapter", "abc", 3}}};
  MUST(ks_record_begin(path, "seed = 7;\n", some_meta, N_SOME_META));
  MUST(append_rows(path, none, all, &state, KS_RUN_RUNNING));
}

typedef struct {
  char *bytes;
  size_t n;
} content;
static content read_content(const char *path) {
  content c;
  MUST(ks_file_read(path, 1 << 26, &c.bytes, &c.n));
  return c;
}
static void write_content(const char *path, const void *bytes, size_t n) {
  FILE *f = fopen(path, "wb");
  cr_assert(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

/* Every function that reads; returns how many failed, and how many of these with another status than `want`.
 */
static int read_everything(const char *path, ks_status want, int *n_other) {
  ks_record_info info;
  ks_record_state state;
  char hex[65];
  void *rows;
  int64_t n;
  ks_status results[4 + KS_N_TABLES];
  int n_failed = 0;
  if ((results[0] = ks_record_read_info(path, &info)) == KS_OK) ks_record_info_free(&info);
  if ((results[1] = ks_record_read_state(path, &state)) == KS_OK) ks_record_state_free(&state);
  results[2] = ks_record_digest(path, hex);
  for (int t = 0; t < KS_N_TABLES; t++)
    if ((results[3 + t] = ks_record_read_rows(path, (ks_table)t, &rows, &n)) == KS_OK)
      ks_rows_free((ks_table)t, rows, n);
  results[3 + KS_N_TABLES] = ks_record_append(path, NULL, NULL, KS_RUN_RUNNING);
  for (int i = 0; i < 4 + KS_N_TABLES; i++) {
    n_failed += results[i] != KS_OK;
    *n_other += results[i] != KS_OK && results[i] != want;
  }
  return n_failed;
}

/* All readers refuse the file with KS_EDATA, and say which file it was; the file stays as it is. */
static void all_refuse(const char *path, const char *what) {
  int n_other = 0, n_failed = read_everything(path, KS_EDATA, &n_other);
  cr_assert(n_failed == 4 + KS_N_TABLES && n_other == 0,
            "%s: %d readers refused, %d of them with another status; last: %s", what, n_failed, n_other,
            ks_error_message());
  cr_assert(strstr(ks_error_message(), path) != NULL, "%s: %s", what, ks_error_message());
}

Test(record_damage, cut_short) {
  const char *path = test_file("a.h5");
  make_good(path);
  content c = read_content(path);
  ks_rng rng = ks_rng_make(5, KS_RNG_TEST, 0);
  for (int i = 0; i < 60; i++) {
    size_t n = i < 20 ? (size_t)i * 30 : ks_rng_below(&rng, c.n);
    write_content(path, c.bytes, n);
    all_refuse(path, "cut short");
  }
  write_content(path, c.bytes, c.n - 1);
  all_refuse(path, "the last byte missing");
  char *more = calloc(1, c.n + 1);
  memcpy(more, c.bytes, c.n);
  write_content(path, more, c.n + 1);
  all_refuse(path, "a byte too much");
  free(more);
  free(c.bytes);
}

Test(record_damage, any_bit) {
  const char *path = test_file("a.h5");
  make_good(path);
  content c = read_content(path);
  ks_rng rng = ks_rng_make(6, KS_RNG_TEST, 0);
  for (int i = 0; i < 150; i++) {
    size_t bit = i < 50 ? ks_rng_below(&rng, KS_SEAL_BYTES * 8) : ks_rng_below(&rng, c.n * 8);
    c.bytes[bit / 8] = (char)(c.bytes[bit / 8] ^ 1 << bit % 8);
    write_content(path, c.bytes, c.n);
    ks_record_info info;
    cr_assert(ks_record_read_info(path, &info) == KS_EDATA, "bit %zu", bit);
    if (i % 10 == 0) all_refuse(path, "bit changed");
    c.bytes[bit / 8] = (char)(c.bytes[bit / 8] ^ 1 << bit % 8);
  }
  write_content(path, c.bytes, c.n);
  int n_other = 0;
  cr_assert(eq(int, read_everything(path, KS_EDATA, &n_other), 0));
  free(c.bytes);
}

Test(record_damage, foreign_files) {
  const char *path = test_file("a.h5"), *folder = test_file("folder");
  write_content(path, "", 0);
  all_refuse(path, "empty");
  write_content(path, "hello\n", 6);
  all_refuse(path, "text");
  char zeros[4096] = {0};
  write_content(path, zeros, sizeof zeros);
  all_refuse(path, "zeros");
  cr_assert(unlink(path) == 0);
  all_refuse(path, "missing");
  hid_t plain = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  cr_assert(plain >= 0 && H5Fclose(plain) >= 0);
  all_refuse(path, "HDF5 of another program");
  MUST(ks_record_write_index(path, "", NULL, NULL, 0));
  all_refuse(path, "an index");
  MUST(ks_dir_make(folder));
  all_refuse(folder, "a folder");
}

/* ---------------------------------------------------------------- files with a good seal and bad content */

static void seal(const char *path, const char *bytes, size_t n) {
  ks_sha256 h;
  char hash[65], *all = calloc(1, n + KS_SEAL_BYTES);
  ks_sha256_init(&h);
  ks_sha256_add(&h, bytes, n);
  ks_sha256_finish(&h, hash);
  snprintf(all, KS_SEAL_BYTES,
           "keepsake record\nschema %d\nbytes %zu\nsha256 %s\nHDF5 begins at byte 512: tail -c +513 FILE | "
           "sha256sum\n",
           KS_RECORD_SCHEMA_VERSION, n, hash);
  memcpy(all + KS_SEAL_BYTES, bytes, n);
  write_content(path, all, n + KS_SEAL_BYTES);
  free(all);
}

static void put_i64(hid_t object, const char *name, int64_t value) {
  hid_t space = H5Screate(H5S_SCALAR),
        a = H5Acreate2(object, name, H5T_NATIVE_INT64, space, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(a, H5T_NATIVE_INT64, &value);
  H5Aclose(a);
  H5Sclose(space);
}

static void put_dataset(hid_t file, const char *name, hid_t type, hsize_t n, hid_t create) {
  hsize_t unlimited = H5S_UNLIMITED;
  hid_t space = H5Screate_simple(1, &n, create == H5P_DEFAULT ? NULL : &unlimited),
        d = H5Dcreate2(file, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
  cr_assert(d >= 0, "cannot make %s", name);
  H5Dclose(d);
  H5Sclose(space);
}

static void no_table(hid_t f) {
  H5Ldelete(f, "/steps", H5P_DEFAULT);
}
static void table_is_group(hid_t f) {
  no_table(f);
  H5Gclose(H5Gcreate2(f, "/steps", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
}
static void table_of_numbers(hid_t f) {
  no_table(f);
  put_dataset(f, "/steps", H5T_NATIVE_INT64, 3, H5P_DEFAULT);
}
static void table_links_elsewhere(hid_t f) {
  no_table(f);
  H5Lcreate_external("/etc/passwd", "/", f, "/steps", H5P_DEFAULT, H5P_DEFAULT);
}
static void table_links_softly(hid_t f) {
  H5Lmove(f, "/steps", f, "/other", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/other", f, "/steps", H5P_DEFAULT, H5P_DEFAULT);
}
static hid_t type_of(hid_t f, const char *name) {
  hid_t d = H5Dopen2(f, name, H5P_DEFAULT), t = H5Dget_type(d);
  H5Dclose(d);
  return t;
}
static void remake(hid_t f, hsize_t n, hsize_t chunk) {
  hid_t type = type_of(f, "/steps"), create = H5Pcreate(H5P_DATASET_CREATE);
  if (chunk) H5Pset_chunk(create, 1, &chunk);
  no_table(f);
  put_dataset(f, "/steps", type, n, chunk ? create : H5P_DEFAULT);
  H5Pclose(create);
  H5Tclose(type);
}
static void rows_of_nothing(hid_t f) {
  remake(f, (hsize_t)1 << 40, 1024);
}
static void rows_of_62_bits(hid_t f) {
  remake(f, (hsize_t)1 << 62, 1024);
}
static void small_chunks(hid_t f) {
  remake(f, 4, 1);
}
static void not_chunked(hid_t f) {
  remake(f, 4, 0);
}
static void announced_rows(hid_t f) {
  hid_t d = H5Dopen2(f, "/arrivals", H5P_DEFAULT);
  hsize_t n = (hsize_t)1 << 33;
  cr_assert(H5Dset_extent(d, &n) >= 0);
  H5Dclose(d);
}
static void foreign_filter(hid_t f) {
  hid_t type = type_of(f, "/steps"), create = H5Pcreate(H5P_DATASET_CREATE);
  hsize_t chunk = 1024;
  H5Pset_chunk(create, 1, &chunk);
  H5Pset_filter(create, 32001, H5Z_FLAG_OPTIONAL, 0, NULL);
  no_table(f);
  put_dataset(f, "/steps", type, 0, create);
  H5Pclose(create);
  H5Tclose(type);
}
static void two_dimensions(hid_t f) {
  hid_t type = type_of(f, "/steps");
  hsize_t dims[2] = {2, 2};
  hid_t space = H5Screate_simple(2, dims, NULL);
  no_table(f);
  H5Dclose(H5Dcreate2(f, "/steps", type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  H5Sclose(space);
  H5Tclose(type);
}
static void column_renamed(hid_t f) {
  hid_t type = H5Tcreate(H5T_COMPOUND, 32), create = H5Pcreate(H5P_DATASET_CREATE);
  hsize_t chunk = 1024;
  H5Tinsert(type, "window", 0, H5T_STD_I64LE);
  H5Tinsert(type, "step", 8, H5T_STD_I64LE);
  H5Tinsert(type, "loss", 16, H5T_IEEE_F64LE);
  H5Tinsert(type, "gradient", 24, H5T_IEEE_F64LE);
  H5Pset_chunk(create, 1, &chunk);
  no_table(f);
  put_dataset(f, "/steps", type, 0, create);
  H5Pclose(create);
  H5Tclose(type);
}
static void other_schema(hid_t f) {
  H5Adelete(f, "schema_version");
  put_i64(f, "schema_version", KS_RECORD_SCHEMA_VERSION + 1);
}
static void no_schema(hid_t f) {
  H5Adelete(f, "schema_version");
}
static void schema_is_text(hid_t f) {
  hid_t space = H5Screate(H5S_SCALAR);
  no_schema(f);
  H5Aclose(H5Acreate2(f, "schema_version", H5T_C_S1, space, H5P_DEFAULT, H5P_DEFAULT));
  H5Sclose(space);
}
static void unknown_status(hid_t f) {
  hid_t type = ks_h5_string_type(), space = H5Screate(H5S_SCALAR);
  const char *text = "wonderful";
  H5Adelete(f, "status");
  hid_t a = H5Acreate2(f, "status", type, space, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(a, type, &text);
  H5Aclose(a);
  H5Sclose(space);
  H5Tclose(type);
}
static void status_is_number(hid_t f) {
  H5Adelete(f, "status");
  put_i64(f, "status", 0);
}
static void config_is_numbers(hid_t f) {
  H5Ldelete(f, "/config", H5P_DEFAULT);
  put_dataset(f, "/config", H5T_NATIVE_INT64, 3, H5P_DEFAULT);
}
static void no_meta(hid_t f) {
  H5Ldelete(f, "/meta", H5P_DEFAULT);
}
static void meta_of_numbers(hid_t f) {
  hid_t g = H5Gopen2(f, "/meta", H5P_DEFAULT);
  put_i64(g, "number", 3);
  H5Gclose(g);
}
static void state_of_many(hid_t f) {
  char name[32];
  for (int i = 0; i < 9; i++) {
    snprintf(name, sizeof name, "/state/more-%d", i);
    put_dataset(f, name, H5T_STD_U8LE, 3, H5P_DEFAULT);
  }
}
static void state_with_folder(hid_t f) {
  H5Gclose(H5Gcreate2(f, "/state/folder", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
}
static void state_of_numbers(hid_t f) {
  put_dataset(f, "/state/numbers", H5T_STD_I64LE, 3, H5P_DEFAULT);
}
static void state_of_nothing(hid_t f) {
  put_dataset(f, "/state/huge", H5T_STD_U8LE, (hsize_t)1 << 40, H5P_DEFAULT);
}
static void state_elsewhere(hid_t f) {
  hid_t create = H5Pcreate(H5P_DATASET_CREATE);
  hsize_t n = 3;
  hid_t space = H5Screate_simple(1, &n, NULL);
  H5Pset_external(create, "/etc/passwd", 0, 3);
  H5Dclose(H5Dcreate2(f, "/state/outside", H5T_STD_U8LE, space, H5P_DEFAULT, create, H5P_DEFAULT));
  H5Sclose(space);
  H5Pclose(create);
}
static void negative_state(hid_t f) {
  hid_t g = H5Gopen2(f, "/state", H5P_DEFAULT);
  H5Adelete(g, "n_arrivals");
  put_i64(g, "n_arrivals", -1);
  H5Gclose(g);
}

enum { INFO = 1, STATE = 2, STEPS = 4, DIGEST = 8, ARRIVALS = 16, APPEND = 32, ALL = 63 };
static const struct {
  const char *name;
  void (*change)(hid_t);
  int must_refuse;
} hostile[] = {{"no_table", no_table, STEPS | DIGEST | APPEND},
               {"table_is_group", table_is_group, STEPS | DIGEST | APPEND},
               {"table_of_numbers", table_of_numbers, STEPS | DIGEST | APPEND},
               {"table_links_elsewhere", table_links_elsewhere, STEPS | DIGEST | APPEND},
               {"table_links_softly", table_links_softly, STEPS | DIGEST | APPEND},
               {"rows_of_nothing", rows_of_nothing, STEPS | DIGEST | APPEND},
               {"rows_of_62_bits", rows_of_62_bits, STEPS | DIGEST | APPEND},
               {"small_chunks", small_chunks, STEPS | DIGEST | APPEND},
               {"not_chunked", not_chunked, STEPS | DIGEST | APPEND},
               {"announced_rows", announced_rows, ARRIVALS | DIGEST | APPEND},
               {"foreign_filter", foreign_filter, STEPS | DIGEST | APPEND},
               {"two_dimensions", two_dimensions, STEPS | DIGEST | APPEND},
               {"column_renamed", column_renamed, STEPS | DIGEST | APPEND},
               {"other_schema", other_schema, ALL},
               {"no_schema", no_schema, ALL},
               {"schema_is_text", schema_is_text, ALL},
               {"unknown_status", unknown_status, ALL},
               {"status_is_number", status_is_number, ALL},
               {"config_is_numbers", config_is_numbers, INFO | DIGEST | APPEND},
               {"no_meta", no_meta, INFO | DIGEST | APPEND},
               {"meta_of_numbers", meta_of_numbers, INFO | DIGEST | APPEND},
               {"state_of_many", state_of_many, STATE},
               {"state_with_folder", state_with_folder, STATE},
               {"state_of_numbers", state_of_numbers, STATE},
               {"state_of_nothing", state_of_nothing, STATE},
               {"state_elsewhere", state_elsewhere, STATE},
               {"negative_state", negative_state, STATE}};

/* Which readers refuse, as a set; any status but KS_EDATA fails the test. */
static int refusals(const char *path, const char *name) {
  ks_record_info info;
  ks_record_state state;
  char hex[65];
  void *rows;
  int64_t n;
  int set = 0;
  const struct {
    int flag;
    ks_status status;
  } results[] = {{INFO, ks_record_read_info(path, &info)},
                 {STATE, ks_record_read_state(path, &state)},
                 {DIGEST, ks_record_digest(path, hex)},
                 {STEPS, ks_record_read_rows(path, KS_TABLE_step, &rows, &n)}};
  for (size_t i = 0; i < 4; i++) {
    cr_assert(results[i].status == KS_OK || results[i].status == KS_EDATA, "%s: %s", name,
              ks_status_name(results[i].status));
    if (results[i].status != KS_OK) set |= results[i].flag;
  }
  if (!(set & INFO)) ks_record_info_free(&info);
  if (!(set & STATE)) ks_record_state_free(&state);
  if (!(set & STEPS)) ks_rows_free(KS_TABLE_step, rows, n);
  ks_status arrivals = ks_record_read_rows(path, KS_TABLE_arrival, &rows, &n);
  if (arrivals == KS_OK) ks_rows_free(KS_TABLE_arrival, rows, n);
  ks_status append = ks_record_append(path, NULL, NULL, KS_RUN_RUNNING);
  bool known = (append == KS_OK || append == KS_EDATA) && (arrivals == KS_OK || arrivals == KS_EDATA);
  cr_assert(known, "%s: %s", name, ks_error_message());
  return set | (arrivals != KS_OK ? ARRIVALS : 0) | (append != KS_OK ? APPEND : 0);
}

Test(record_damage, made_on_purpose) {
  const char *good = test_file("good.h5"), *inner = test_file("inner.h5"), *bad = test_file("bad.h5");
  make_good(good);
  cr_assert(eq(int, refusals(good, "good"), 0));
  make_good(good);
  content c = read_content(good);
  for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
    write_content(inner, c.bytes + KS_SEAL_BYTES, c.n - KS_SEAL_BYTES);
    hid_t file = H5Fopen(inner, H5F_ACC_RDWR, H5P_DEFAULT);
    cr_assert(file >= 0);
    hostile[i].change(file);
    cr_assert(H5Fclose(file) >= 0);
    content changed = read_content(inner);
    seal(bad, changed.bytes, changed.n);
    free(changed.bytes);
    int got = refusals(bad, hostile[i].name);
    cr_assert(got == hostile[i].must_refuse, "%s: refused by %d, should be by %d; %s", hostile[i].name, got,
              hostile[i].must_refuse, ks_error_message());
  }
  free(c.bytes);
}

/* Bytes changed under a good seal: HDF5 itself must get through. Only on request (KS_MUTATIONS=count), as it
 * tests HDF5's version more than this project; the loss of a child is counted, shown and allowed. */
Test(record_damage, random_bytes_under_a_good_seal) {
  const char *wanted = getenv("KS_MUTATIONS");
  if (!wanted) cr_skip_test("set KS_MUTATIONS to a number of mutations");
  const char *good = test_file("good.h5"), *bad = test_file("bad.h5");
  int n_refused = 0, n_read = 0, n_died = 0, n_hung = 0;
  make_good(good);
  content c = read_content(good);
  for (int i = 0; i < atoi(wanted); i++) {
    ks_rng rng = ks_rng_make(8, KS_RNG_TEST, (uint64_t)i);
    content m = {malloc(c.n), c.n - KS_SEAL_BYTES};
    memcpy(m.bytes, c.bytes + KS_SEAL_BYTES, m.n);
    for (uint64_t k = 1 + ks_rng_below(&rng, 4); k > 0; k--) {
      size_t at = ks_rng_below(&rng, m.n);
      m.bytes[at] =
          ks_rng_below(&rng, 2) ? (char)ks_rng_u64(&rng) : (char)(m.bytes[at] ^ 1 << ks_rng_below(&rng, 8));
    }
    seal(bad, m.bytes, m.n);
    free(m.bytes);
    pid_t child = fork();
    if (child == 0) {
      int n_other = 0;
      alarm(20);
      _exit(read_everything(bad, KS_EDATA, &n_other) > 0 ? 77 : 0);
    }
    int status;
    cr_assert(waitpid(child, &status, 0) == child);
    n_hung += WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
    bool died = WIFSIGNALED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 77);
    n_died += died;
    n_refused += WIFEXITED(status) && WEXITSTATUS(status) == 77;
    n_read += WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (died) cr_log_warn("mutation %d: child ended with %x", i, (unsigned)status);
  }
  free(c.bytes);
  cr_log_warn("%d refused, %d read, %d died (%d of them hung)", n_refused, n_read, n_died, n_hung);
}

/* ---------------------------------------------------------------- full disk */

/* A limit on the size of files is the full disk that a test can have without rights. */
Test(record_damage, full_disk) {
  const char *path = test_file("a.h5"), *part = test_file("a.h5.part"), *fresh = test_file("b.h5");
  const int64_t more[KS_N_TABLES] = {4000, 2, 500, 30, 10, 25, 2};
  char before[65], after[65];
  struct rlimit old, small;
  make_good(path);
  MUST(ks_sha256_file(path, before));
  cr_assert(getrlimit(RLIMIT_FSIZE, &old) == 0);
  small = old;
  signal(SIGXFSZ, SIG_IGN);
  for (rlim_t limit = 0; limit < 20000; limit = limit * 4 + 100) {
    small.rlim_cur = limit;
    cr_assert(setrlimit(RLIMIT_FSIZE, &small) == 0);
    ks_status append = append_rows(path, none, more, NULL, KS_RUN_RUNNING),
              status = ks_record_set_status(path, KS_RUN_FAILED);
    char message[600];
    snprintf(message, sizeof message, "%s", ks_error_message());
    ks_status begin = ks_record_begin(fresh, "", NULL, 0),
              index = ks_record_write_index(fresh, "", NULL, NULL, 0);
    cr_assert(setrlimit(RLIMIT_FSIZE, &old) == 0);
    cr_assert(append == KS_EIO && status == KS_EIO, "limit %lld: %s", (long long)limit, message);
    cr_assert(strstr(message, path) != NULL, "%s", message);
    cr_assert(begin == KS_EIO && (index == KS_EIO || limit > 4000), "limit %lld: %s", (long long)limit,
              ks_error_message());
    cr_assert(ks_file_exists(part) == false);
  }
  MUST(ks_sha256_file(path, after));
  cr_assert(eq(str, before, after));
  MUST(append_rows(path, none, more, NULL, KS_RUN_RUNNING));
}

/* ---------------------------------------------------------------- SIGKILL */

enum { N_WINDOWS = 40, N_KILLS = 40 };
static const int64_t per_window[KS_N_TABLES] = {50, 1, 8, 10, 6, 5, 1};

/* Goes on from whatever the file holds, as a resumed run does. */
static void run_on(const char *path) {
  ks_record_state state;
  int64_t window = 0;
  if (ks_record_read_state(path, &state) == KS_OK) {
    window = state.n_windows;
    ks_record_state_free(&state);
  } else {
    MUST(ks_record_begin(path, "config", some_meta, N_SOME_META));
  }
  for (; window < N_WINDOWS; window++) {
    int64_t first[KS_N_TABLES];
    unsigned char blob[5000];
    for (int t = 0; t < KS_N_TABLES; t++)
      first[t] = window * per_window[t];
    memset(blob, (int)(window & 255), sizeof blob);
    state = (ks_record_state){.n_arrivals = 50 * (window + 1),
                              .n_windows = window + 1,
                              .n_blobs = 1,
                              .blobs = {{"selector", blob, sizeof blob}}};
    MUST(append_rows(path, first, per_window, &state, KS_RUN_RUNNING));
  }
}

static int64_t check_whole(const char *path) {
  ks_record_info info;
  ks_record_state state;
  if (!ks_file_exists(path)) return 0; /* killed before the first commit */
  MUST(ks_record_read_info(path, &info));
  cr_assert(eq(str, info.config_text, (char *)"config"));
  ks_record_info_free(&info);
  int64_t n_windows = 0;
  if (ks_record_read_state(path, &state) == KS_OK) {
    n_windows = state.n_windows;
    cr_assert(state.n_arrivals == 50 * n_windows && state.n_blobs == 1 && state.blobs[0].n == 5000);
    cr_assert(eq(int, ((const unsigned char *)state.blobs[0].bytes)[4999], (int)(n_windows - 1)));
    ks_record_state_free(&state);
  }
  for (int t = 0; t < KS_N_TABLES; t++) {
    void *got, *want;
    int64_t n;
    MUST(ks_record_read_rows(path, (ks_table)t, &got, &n));
    cr_assert(eq(i64, n, n_windows * per_window[t]));
    want = make_rows((ks_table)t, 0, n);
    cr_assert(eq(i64, count_differences((ks_table)t, got, want, n), 0));
    ks_rows_free((ks_table)t, got, n);
    ks_rows_free((ks_table)t, want, n);
  }
  return n_windows;
}

Test(record_damage, killed_at_random_moments) {
  const char *path = test_file("killed.h5"), *straight = test_file("straight.h5");
  char want[65], got[65];
  int64_t n_before = 0;
  int n_steps = 0, n_killed = 0;
  ks_rng rng = ks_rng_make(9, KS_RNG_TEST, 0);
  double start = ks_clock_seconds();
  run_on(straight);
  MUST(ks_record_digest(straight, want));
  double one = (ks_clock_seconds() - start) / N_WINDOWS; /* seconds a checkpoint takes here */
  while (n_killed < N_KILLS) {
    pid_t child = fork();
    if (child == 0) {
      run_on(path);
      _exit(0);
    }
    double wait = one * 2.5 * ks_rng_uniform(&rng);
    struct timespec t = {(time_t)wait, (long)((wait - floor(wait)) * 1e9)};
    nanosleep(&t, NULL);
    kill(child, SIGKILL);
    int status;
    cr_assert(waitpid(child, &status, 0) == child);
    n_killed += WIFSIGNALED(status);
    int64_t n = check_whole(path);
    cr_assert(n >= n_before, "a checkpoint was lost: %lld after %lld", (long long)n, (long long)n_before);
    n_steps += n > n_before;
    n_before = n;
    if (n == N_WINDOWS) {
      cr_assert(unlink(path) == 0);
      n_before = 0;
    }
  }
  cr_log_info("%d kills, %d of them after progress", n_killed, n_steps);
  cr_assert(n_steps >= 5, "only %d of %d kills let the writer get on", n_steps, n_killed);
  run_on(path);
  MUST(ks_record_digest(path, got));
  cr_assert(eq(str, got, want));
}
