#include "core/model/safetensors.h"

#include <jansson.h>

enum { MAX_HEADER = 100 << 20 }; /* as in the original */

static const struct {
  const char *name;
  size_t size;
} dtypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1},
              {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
              {"U32", 4},  {"F32", 4}, {"F64", 8}, {"I64", 8},     {"U64", 8}};

static ks_status read_shape(ks_st_tensor *t, const json_t *shape, size_t *n) {
  *n = 1;
  if (!json_is_array(shape)) return KS_FAIL(KS_EDATA, "its shape is no array");
  if (json_array_size(shape) > KS_ST_MAX_RANK)
    return KS_FAIL(KS_EUNSUPPORTED, "%zu dimensions", json_array_size(shape));
  t->rank = (int)json_array_size(shape);
  for (int i = 0; i < t->rank; i++) {
    const json_t *d = json_array_get(shape, (size_t)i);
    t->shape[i] = json_is_integer(d) ? (int64_t)json_integer_value(d) : -1;
    if (t->shape[i] < 0) return KS_FAIL(KS_EDATA, "dimension %d of its shape is no size", i);
    if (!ks_mul_size(*n, (size_t)t->shape[i], n)) return KS_FAIL(KS_EDATA, "its shape overflows");
  }
  return KS_OK;
}

static ks_status read_entry(ks_st_tensor *t, const json_t *entry, size_t n_data) {
  const char *dtype = json_string_value(json_object_get(entry, "dtype"));
  const json_t *offsets = json_object_get(entry, "data_offsets");
  size_t n, bytes, size = 0;
  if (!dtype) return KS_FAIL(KS_EDATA, "it has no dtype");
  for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
    if (strcmp(dtype, dtypes[i].name) == 0) size = dtypes[i].size;
  if (size == 0) return KS_FAIL(KS_EUNSUPPORTED, "its dtype is \"%.40s\"", dtype);
  strcpy(t->dtype, dtype);
  KS_TRY(read_shape(t, json_object_get(entry, "shape"), &n));
  const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
    return KS_FAIL(KS_EDATA, "its data_offsets are not two numbers");
  int64_t b = (int64_t)json_integer_value(begin), e = (int64_t)json_integer_value(end);
  if (b < 0 || e < b || (size_t)e > n_data)
    return KS_FAIL(KS_EDATA,
                   "its bytes [%lld, %lld) do not lie in the %zu bytes of data; is the file complete?",
                   (long long)b, (long long)e, n_data);
  t->begin = (size_t)b;
  t->end = (size_t)e;
  if (!ks_mul_size(n, size, &bytes) || bytes != t->end - t->begin)
    return KS_FAIL(KS_EDATA, "its shape and dtype need other than the %zu bytes it has", t->end - t->begin);
  return KS_OK;
}

static int compare_begin(const void *a, const void *b) {
  const ks_st_tensor *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return x->end < y->end ? -1 : x->end > y->end;
}

static int compare_name(const void *a, const void *b) {
  return strcmp(((const ks_st_tensor *)a)->name, ((const ks_st_tensor *)b)->name);
}

/* The format wants the data covered without gap or overlap. */
static ks_status check_cover(ks_safetensors *st) {
  size_t at = 0;
  qsort(st->tensors, st->n_tensors, sizeof *st->tensors, compare_begin);
  for (size_t i = 0; i < st->n_tensors; i++) {
    const ks_st_tensor *t = &st->tensors[i];
    if (t->begin != at)
      return KS_FAIL(KS_EDATA, "%s: tensor %.200s begins at byte %zu of the data, the one before ends at %zu",
                     st->path, t->name, t->begin, at);
    at = t->end;
  }
  if (at != st->data.n)
    return KS_FAIL(KS_EDATA, "%s: %zu bytes of data, but the tensors end at %zu", st->path, st->data.n, at);
  qsort(st->tensors, st->n_tensors, sizeof *st->tensors, compare_name);
  return KS_OK;
}

static ks_status read_header(ks_safetensors *st, const char *header, size_t n_header) {
  json_error_t error;
  json_t *json = json_loadb(header, n_header, JSON_REJECT_DUPLICATES, &error);
  st->json = json;
  if (!json)
    return KS_FAIL(KS_EDATA, "%s: byte %d: the header is no JSON: %s", st->path, 8 + error.position,
                   error.text);
  if (!json_is_object(json)) return KS_FAIL(KS_EDATA, "%s: byte 8: the header is no JSON object", st->path);
  KS_TRY(ks_alloc_array(&st->tensors, json_object_size(json), sizeof *st->tensors, "safetensors: header"));
  const char *name;
  json_t *entry;
  json_object_foreach(json, name, entry) {
    if (strcmp(name, "__metadata__") == 0) continue;
    ks_st_tensor *t = &st->tensors[st->n_tensors++];
    t->name = name;
    KS_TRY_AS(read_entry(t, entry, st->data.n), "%s: tensor %.200s", st->path, name);
  }
  return check_cover(st);
}

ks_status ks_safetensors_open(const char *path, ks_safetensors *st) {
  uint64_t n_header;
  *st = (ks_safetensors){0};
  KS_TRY(ks_strdup(path, &st->path));
  KS_TRY(ks_file_map_open(path, &st->map));
  if (st->map.n < sizeof n_header)
    return KS_FAIL(KS_EDATA, "%s: byte 0: %zu bytes are too few for a safetensors file", path, st->map.n);
  memcpy(&n_header, st->map.data, sizeof n_header);
  if (n_header > MAX_HEADER || n_header > st->map.n - sizeof n_header)
    return KS_FAIL(
        KS_EDATA,
        "%s: byte 0: a header of %llu bytes in a file of %zu; is this a safetensors file, and complete?",
        path, (unsigned long long)n_header, st->map.n);
  size_t at = sizeof n_header + (size_t)n_header;
  st->data = (ks_bytes){st->map.data + at, st->map.n - at};
  return read_header(st, (const char *)st->map.data + sizeof n_header, (size_t)n_header);
}

void ks_safetensors_close(ks_safetensors *st) {
  json_decref(st->json);
  free(st->tensors);
  ks_file_map_close(&st->map);
  free(st->path);
  *st = (ks_safetensors){0};
}

const ks_st_tensor *ks_safetensors_find(const ks_safetensors *st, const char *name) {
  ks_st_tensor key = {.name = name};
  return st->n_tensors ? bsearch(&key, st->tensors, st->n_tensors, sizeof key, compare_name) : NULL;
}

ks_status ks_safetensors_view(const ks_safetensors *st, const ks_st_tensor *t, int64_t n_out, int64_t n_in,
                              ks_tensor *out) {
  static const struct {
    const char *name;
    ks_dtype dtype;
  } floats[] = {{"F32", KS_DTYPE_F32}, {"F16", KS_DTYPE_F16}, {"BF16", KS_DTYPE_BF16}};
  bool fits = n_in == 0 ? t->rank == 1 && t->shape[0] == n_out
                        : t->rank == 2 && t->shape[0] == n_out && t->shape[1] == n_in;
  if (!fits)
    return KS_FAIL(KS_EDATA, "%s: tensor %.200s is [%lld, %lld%s], but config.json asks for [%lld, %lld]",
                   st->path, t->name, t->rank > 0 ? (long long)t->shape[0] : 1LL,
                   t->rank > 1 ? (long long)t->shape[1] : 1LL, t->rank > 2 ? ", ..." : "", (long long)n_out,
                   n_in == 0 ? 1LL : (long long)n_in);
  for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++) {
    if (strcmp(t->dtype, floats[i].name) != 0) continue;
    *out = (ks_tensor){st->data.data + t->begin, floats[i].dtype, n_out, n_in == 0 ? 1 : n_in};
    return KS_OK;
  }
  return KS_FAIL(KS_EUNSUPPORTED, "%s: tensor %.200s is %s; F32, F16 and BF16 are supported, convert it",
                 st->path, t->name, t->dtype);
}
