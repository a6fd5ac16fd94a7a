/* Rows in 16-byte pieces, for kernels that pass over memory once: held in registers as they lie in memory (a
 * bf16 row takes half the registers of its floats), unpacked where they are used.
 *
 *   ks_piece<T> p = ks_piece_load(row + i * ks_piece<T>::N, n_cols - i * ks_piece<T>::N, aligned);   // beyond the end: zeros
 *   float x[ks_piece<T>::N];
 *   ks_piece_unpack(x, p);
 *   ...
 *   ks_piece_store(row + i * ks_piece<T>::N, ks_piece_pack<T>(x), n_left, aligned);
 *
 * Which element belongs to which piece does not depend on `aligned`, and so neither does any sum over pieces.
 */
#ifndef KS_CUDA_ROW_CUH
#define KS_CUDA_ROW_CUH

#include "kernels/cuda/device.cuh"

template <class T> struct ks_piece {
  enum { N = 16 / (int)sizeof(T) };
  uint32_t words[4];
};

KS_HOST_DEVICE bool ks_is_aligned_16(const void *p) {
  return (uintptr_t)p % 16 == 0;
}
/* Pieces that hold n elements. */
template <class T> KS_HOST_DEVICE int64_t ks_pieces_of(int64_t n) {
  return (n + ks_piece<T>::N - 1) / ks_piece<T>::N;
}

KS_DEVICE void ks_piece_set(ks_piece<float> *p, int i, float x) {
  p->words[i] = ks_float_to_bits(x);
}
KS_DEVICE void ks_piece_set(ks_piece<ks_bf16> *p, int i, ks_bf16 x) {
  p->words[i / 2] |= (uint32_t)x.bits << (i % 2 * 16);
}
KS_DEVICE float ks_piece_get(const ks_piece<float> &p, int i) {
  return ks_bits_to_float(p.words[i]);
}
KS_DEVICE ks_bf16 ks_piece_get(const ks_piece<ks_bf16> &p, int i) {
  ks_bf16 x = {(uint16_t)(p.words[i / 2] >> (i % 2 * 16))};
  return x;
}

/* 16 bytes of device memory as one store, which the compiler may make four of when it is written as an assignment. */
KS_DEVICE void ks_store_16(void *p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef KS_CUDA_ON_CPU
  *(uint4 *)p = make_uint4(a, b, c, d);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
#endif
}

/* All N elements, or zeros. p aligned to 16 bytes. */
template <class T> KS_DEVICE ks_piece<T> ks_piece_load_whole(const T *p, bool is_there) {
  ks_piece<T> r = {{0, 0, 0, 0}};
  if (is_there) {
    const uint4 bits = *(const uint4 *)p;
    r.words[0] = bits.x, r.words[1] = bits.y, r.words[2] = bits.z, r.words[3] = bits.w;
  }
  return r;
}
/* Elements 0 to n_left - 1 (at most N) one by one; the others are 0. */
template <class T> KS_DEVICE ks_piece<T> ks_piece_load_part(const T *p, int64_t n_left) {
  ks_piece<T> r = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < ks_piece<T>::N; i++)
    if (i < n_left) ks_piece_set(&r, i, p[i]);
  return r;
}
template <class T> KS_DEVICE ks_piece<T> ks_piece_load(const T *p, int64_t n_left, bool aligned) {
  return aligned && n_left >= ks_piece<T>::N ? ks_piece_load_whole(p, true) : ks_piece_load_part(p, n_left);
}
template <class T> KS_DEVICE void ks_piece_store(T *p, const ks_piece<T> &r, int64_t n_left, bool aligned) {
  if (aligned && n_left >= ks_piece<T>::N) {
    ks_store_16(p, r.words[0], r.words[1], r.words[2], r.words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < ks_piece<T>::N; i++)
    if (i < n_left) p[i] = ks_piece_get(r, i);
}

/* K pieces of an array of n elements, from elements at, at + step, ...: all loads under way together. WHOLE: p is aligned and no
 * piece reaches beyond the array's end (n is a multiple of N), so that no code for single elements is in the way. */
template <int K, bool WHOLE, class T, class I>
KS_DEVICE void ks_pieces_load(ks_piece<T> held[K], const T *p, I at, int step, I n) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    const I j = at + k * step;
    held[k] = WHOLE ? ks_piece_load_whole(p + j, j < n) : ks_piece_load_part(p + j, n - j);
  }
}
/* One back to element `at`. */
template <bool WHOLE, class T, class I> KS_DEVICE void ks_piece_put(T *p, const ks_piece<T> &r, I at, I n) {
  if (!WHOLE)
    ks_piece_store(p + at, r, n - at, false);
  else if (at < n)
    ks_store_16(p + at, r.words[0], r.words[1], r.words[2], r.words[3]);
}

KS_DEVICE void ks_piece_unpack(float x[4], const ks_piece<float> &r) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    x[i] = ks_bits_to_float(r.words[i]);
}
KS_DEVICE void ks_piece_unpack(float x[8], const ks_piece<ks_bf16> &r) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = ks_bf16_lo(r.words[i]);
    x[2 * i + 1] = ks_bf16_hi(r.words[i]);
  }
}
template <class T> KS_DEVICE ks_piece<T> ks_piece_pack(const float *x);
template <> KS_DEVICE ks_piece<float> ks_piece_pack<float>(const float *x) {
  ks_piece<float> r;
#pragma unroll
  for (int i = 0; i < 4; i++)
    r.words[i] = ks_float_to_bits(x[i]);
  return r;
}
template <> KS_DEVICE ks_piece<ks_bf16> ks_piece_pack<ks_bf16>(const float *x) {
  ks_piece<ks_bf16> r;
#pragma unroll
  for (int i = 0; i < 4; i++)
    r.words[i] = ks_pack_bf16(x[2 * i], x[2 * i + 1]);
  return r;
}

/* 1 / x to one unit in the last place, for x from 2^-126 to 2^126. */
KS_DEVICE float ks_quick_reciprocal(float x) {
#ifdef KS_CUDA_ON_CPU
  return 1.0f / x * (ks_float_to_bits(x) & 1u ? 1.0f - 0x1p-24f : 1.0f + 0x1p-23f);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/* N floats of an array beside a row of T (a norm's weights), under the row's own pieces. */
template <int N, bool WHOLE> KS_DEVICE void ks_floats_load(float x[N], const float *p, int64_t n_left) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    ks_piece<float> r[1];
    ks_pieces_load<1, WHOLE, float, int64_t>(r, p, i, 0, n_left);
    ks_piece_unpack(x + i, r[0]);
  }
}

#endif
