#include "core/model/checkpoint.h"

#include <sys/mman.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "checkpoints are read as they lie in the file: little-endian"
#endif

ks_status ks_checkpoint_open(const char *path, ks_checkpoint *c) {
  *c = (ks_checkpoint){0};
  return ks_dir_exists(path) ? ks_checkpoint_open_hf(path, c) : ks_checkpoint_open_llama2c(path, c);
}

void ks_checkpoint_close(ks_checkpoint *c) {
  for (size_t i = 0; i < c->n_maps; i++)
    ks_file_map_close(&c->maps[i]);
  free(c->maps);
  free(c->weights);
  free(c->layers);
  *c = (ks_checkpoint){0};
}

void ks_bytes_release(const unsigned char *data, size_t n) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + n;
  begin = (begin + page - 1) & ~(page - 1);
  end &= ~(page - 1);
  if (begin < end) (void)madvise((void *)begin, end - begin, MADV_DONTNEED); /* advice: it may fail */
}

void ks_checkpoint_hash(const ks_checkpoint *c, char hex[65]) {
  enum { STEP = 8 << 20 };
  ks_sha256 h;
  ks_sha256_init(&h);
  for (size_t i = 0; i < c->n_maps; i++) {
    const ks_bytes *w = &c->weights[i];
    for (size_t at = 0, n; at < w->n; at += n) {
      n = w->n - at < STEP ? w->n - at : STEP;
      ks_sha256_add(&h, w->data + at, n);
      ks_bytes_release(w->data + at, n);
    }
  }
  ks_sha256_finish(&h, hex);
}

size_t ks_tensor_bytes(const ks_tensor *t) {
  return (size_t)t->n_out * (size_t)t->n_in * ks_dtype_size(t->dtype);
}

static float f32_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Exact: every half is a float. Subnormals by arithmetic: m * 2^-24. */
static float f32_of_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 0x1F, mantissa = h & 0x3FF;
  if (exponent == 0) return f32_of_bits(sign | 0x3F800000u) * (float)mantissa * 0x1p-24f;
  if (exponent == 31) return f32_of_bits(sign | 0x7F800000u | mantissa << 13);
  return f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

void ks_tensor_read_f32(const ks_tensor *t, float *out) {
  size_t n = (size_t)t->n_out * (size_t)t->n_in;
  if (t->dtype == KS_DTYPE_F32) {
    memcpy(out, t->data, n * sizeof *out);
    return;
  }
  for (size_t i = 0; i < n; i++) {
    uint16_t h;
    memcpy(&h, t->data + 2 * i, sizeof h);
    out[i] = t->dtype == KS_DTYPE_BF16 ? f32_of_bits((uint32_t)h << 16) : f32_of_f16(h);
  }
}

void ks_tensor_read_halves(const ks_tensor *t, int64_t head_dim, void *out) {
  size_t row = (size_t)t->n_in * ks_dtype_size(t->dtype);
  for (int64_t i = 0; i < t->n_out; i++) {
    int64_t head = i / head_dim * head_dim, within = i % head_dim;
    int64_t half = within / 2 + (within % 2) * (head_dim / 2);
    memcpy((char *)out + (size_t)(head + half) * row, t->data + (size_t)i * row, row);
  }
}
