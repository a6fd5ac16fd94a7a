/* One safetensors file: what must be refused, and what must be found. */
#include "core/model/safetensors.h"
#include "tests/core/model/hostile.h"

static char path[] = "/tmp/ks_safetensors_XXXXXX";

static void make(void) {
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
}

static void clean(void) {
  unlink(path);
}

TestSuite(safetensors, .init = make, .fini = clean);

/* A file of a header and n_data bytes 0, 1, 2, ... n_header < 0: the header's own length. */
static void put(const char *header, int64_t n_header, size_t n_data) {
  ks_text t = {0};
  uint64_t n = n_header < 0 ? strlen(header) : (uint64_t)n_header;
  cr_assert_eq(ks_text_add(&t, (const char *)&n, 8), KS_OK);
  cr_assert_eq(ks_text_add_str(&t, header), KS_OK);
  for (size_t i = 0; i < n_data; i++)
    cr_assert_eq(ks_text_add(&t, &(char){(char)i}, 1), KS_OK);
  hostile_write(path, t.data, t.len);
  ks_text_free(&t);
}

static ks_status open_file(const char *name) {
  ks_safetensors st;
  ks_status s = ks_safetensors_open(name, &st);
  ks_safetensors_close(&st);
  return s;
}

Test(safetensors, finds_and_views) {
  put("{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[4,16]"
      "},"
      "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"e\":{\"dtype\":\"F32\",\"shape\":[0,"
      "7],\"data_offsets\":[16,16]},"
      "\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[16,24]}}   ",
      -1, 24);
  ks_safetensors st;
  ks_tensor t;
  cr_assert_eq(ks_safetensors_open(path, &st), KS_OK, "%s", ks_error_message());
  cr_expect_eq(st.n_tensors, 4);
  cr_expect_null(ks_safetensors_find(&st, "c"));
  cr_expect_null(ks_safetensors_find(&st, "__metadata__"));
  const ks_st_tensor *b = ks_safetensors_find(&st, "b"), *a = ks_safetensors_find(&st, "a"),
                     *s = ks_safetensors_find(&st, "s");
  cr_assert(a && b && s);
  cr_assert_eq(ks_safetensors_view(&st, b, 2, 3, &t), KS_OK);
  cr_expect_eq(t.dtype, KS_DTYPE_F16);
  cr_expect_eq(t.data[0], 4);
  cr_expect_eq(ks_tensor_bytes(&t), 12);
  cr_expect_eq(ks_safetensors_view(&st, b, 3, 2, &t), KS_EDATA);
  cr_expect_eq(ks_safetensors_view(&st, b, 6, 0, &t), KS_EDATA);
  cr_expect_eq(ks_safetensors_view(&st, a, 1, 0, &t), KS_OK);
  cr_expect_eq(t.n_in, 1);
  cr_expect_eq(ks_safetensors_view(&st, a, 1, 1, &t), KS_EDATA, "a vector is no matrix");
  cr_expect_eq(ks_safetensors_view(&st, s, 1, 0, &t), KS_EDATA);
  ks_safetensors_close(&st);
}

Test(safetensors, other_types_are_named) {
  put("{\"a\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]}}", -1, 16);
  ks_safetensors st;
  ks_tensor t;
  cr_assert_eq(ks_safetensors_open(path, &st), KS_OK, "%s", ks_error_message());
  cr_expect_eq(ks_safetensors_view(&st, &st.tensors[0], 2, 0, &t), KS_EUNSUPPORTED);
  cr_expect(strstr(ks_error_message(), "I64"), "%s", ks_error_message());
  ks_safetensors_close(&st);
}

#define ONE(rest) "{\"a\":{" rest "}}"

Test(safetensors, refused) {
  static const struct {
    const char *header;
    int64_t n_header;
    size_t n_data;
    ks_status status;
    const char *says;
  } cases[] = {
      {"{}", -1, 0, KS_OK, NULL},
      {"{}", -1, 1, KS_EDATA, "1 bytes of data"},
      {"{}", 3, 0, KS_EDATA, "header of 3"},
      {"{}", INT64_MAX, 0, KS_EDATA, "byte 0"},
      {"{}", (int64_t)200 << 20, 0, KS_EDATA, "byte 0"},
      {"{}", 0, 0, KS_EDATA, "byte 8"},
      {"[]", -1, 0, KS_EDATA, "object"},
      {"{\"a\"", -1, 0, KS_EDATA, "byte "},
      {"{\"a\":1}", -1, 0, KS_EDATA, "dtype"},
      {"{\"a\":{},\"a\":{}}", -1, 0, KS_EDATA, "duplicate"},
      {"{\"\xff\":{}}", -1, 0, KS_EDATA, "0xff"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]"), -1, 4, KS_OK, NULL},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]"), -1, 3, KS_EDATA, "complete"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]"), -1, 8, KS_EDATA, "begins at byte 4"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]"), -1, 8, KS_EDATA, "shape and dtype"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]"), -1, 4, KS_EDATA, "[4, 0)"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]"), -1, 4, KS_EDATA, "[-4, 0)"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]"), -1, 4, KS_EDATA, "two numbers"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]"), -1, 4, KS_EDATA, "two numbers"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0.0,4.0]"), -1, 4, KS_EDATA, "two numbers"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,99999999999999999999]"), -1, 4, KS_EDATA,
       "too big"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1]"), -1, 4, KS_EDATA, "two numbers"},
      {ONE("\"dtype\":\"F32\",\"data_offsets\":[0,4]"), -1, 4, KS_EDATA, "shape"},
      {ONE("\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]"), -1, 4, KS_EDATA, "dimension 0"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]"), -1, 4, KS_EDATA, "dimension 0"},
      {ONE("\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]"), -1, 4, KS_EUNSUPPORTED,
       "9 dimensions"},
      {ONE("\"dtype\":\"F32\",\"shape\":[4294967296,4294967297],\"data_offsets\":[0,4]"), -1, 4, KS_EDATA,
       "overflow"},
      {ONE("\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]"), -1, 4, KS_EDATA,
       "shape and dtype"},
      {ONE("\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,4]"), -1, 4, KS_EUNSUPPORTED, "F4"},
      {ONE("\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]"), -1, 4, KS_EDATA, "dtype"},
      {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
       "\"data_offsets\":[2,6]}}",
       -1, 6, KS_EDATA, "begins at byte 2"},
      {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
       "\"data_offsets\":[0,4]}}",
       -1, 4, KS_EDATA, "begins at byte 0"},
      {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],"
       "\"data_offsets\":[4,6]}}",
       -1, 6, KS_EDATA, "begins at byte 4"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    put(cases[i].header, cases[i].n_header, cases[i].n_data);
    ks_error_clear();
    ks_status s = open_file(path);
    cr_expect_eq(s, cases[i].status, "%s: %s: %s", cases[i].header, ks_status_name(s), ks_error_message());
    if (cases[i].says)
      cr_expect(strstr(ks_error_message(), cases[i].says) && strstr(ks_error_message(), path), "%s: %s",
                cases[i].header, ks_error_message());
  }
}

Test(safetensors, short_files) {
  for (size_t n = 0; n < 8; n++) {
    hostile_write(path, "\0\0\0\0\0\0\0", n);
    cr_expect_eq(open_file(path), KS_EDATA, "%zu bytes", n);
  }
  unlink(path);
  cr_expect_eq(open_file(path), KS_EDATA);
  cr_expect_eq(open_file("/"), KS_EDATA);
}

Test(safetensors, deep_header) {
  enum { DEEP = 100000 };
  ks_text t = {0};
  for (int i = 0; i < DEEP; i++)
    cr_assert_eq(ks_text_add_str(&t, "{\"a\":"), KS_OK);
  put(t.data, -1, 0);
  cr_expect_eq(open_file(path), KS_EDATA);
  ks_text_free(&t);
}

Test(safetensors, mutated) {
  static const char header[] =
      "{\"__metadata__\":{\"format\":\"pt\"},\"a.weight\":{\"dtype\":\"BF16\",\"shape\":[4,8],"
      "\"data_offsets\":[0,64]},\"b\":{\"dtype\":\"F32\",\"shape\":[16],\"data_offsets\":[64,128]}}";
  char *bytes;
  size_t n, before = ks_process_peak_bytes();
  put(header, -1, 128);
  cr_assert_eq(ks_file_read(path, 4096, &bytes, &n), KS_OK);
  hostile h = {.path = path, .load_path = path, .load = open_file};
  hostile_try(&h, bytes, n, "whole", n);
  cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
  hostile_truncate(&h, bytes, n, n, 0);
  cr_expect_eq(h.n_loaded, 1, "a cut file was taken for a whole one");
  hostile_mutate(&h, bytes, n, 8 + sizeof header - 1, 5000);
  cr_expect_gt(h.n_refused, 3000, "%lld", (long long)h.n_refused);
  hostile_limit_memory(before, 64);
  free(bytes);
}

/* Halves and brain floats: every value there is. */
Test(safetensors, small_floats_are_exact) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    uint16_t h = (uint16_t)bits;
    float f16, bf16;
    ks_tensor t = {(const unsigned char *)&h, KS_DTYPE_F16, 1, 1};
    ks_tensor_read_f32(&t, &f16);
    t.dtype = KS_DTYPE_BF16;
    ks_tensor_read_f32(&t, &bf16);
    int exponent = (int)(bits >> 10 & 31), mantissa = (int)(bits & 1023);
    double sign = bits >> 15 ? -1 : 1, value = exponent ? (1024 + mantissa) * 0x1p-25 : mantissa * 0x1p-24;
    for (int e = 0; e < exponent; e++)
      value *= 2;
    if (exponent == 31)
      cr_assert_eq(f16 != f16, mantissa != 0, "half 0x%04x", bits);
    else
      cr_assert(f16 == sign * value && !!__builtin_signbit(f16) == (bits >> 15), "half 0x%04x is %g", bits,
                (double)f16);
    uint32_t wide;
    memcpy(&wide, &bf16, 4);
    cr_assert_eq(wide, bits << 16, "brain float 0x%04x", bits);
  }
}
