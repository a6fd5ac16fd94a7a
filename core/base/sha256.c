/* SHA-256 (FIPS 180-4). */
#include "core/base/sha256_blocks.h"

#include "core/base/base.h"

#include <stdio.h>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n) {
  return x >> n | x << (32 - n);
}

#define ROUND(a, b, c, d, e, f, g, h, i)                                                                     \
  do {                                                                                                       \
    uint32_t t = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) +                  \
                 round_constants[i] + w[(i) % 16];                                                           \
    d += t;                                                                                                  \
    h = t + (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)));                      \
  } while (0)

/* The eight variables stay where they are; their parts in a round move on by one, and are back in place after
 * eight rounds. w: the last 16 words of the schedule. */
void ks_sha256_blocks_plain(uint32_t state[8], const unsigned char *blocks, size_t n_blocks) {
  for (const unsigned char *p = blocks; n_blocks > 0; n_blocks--, p += 64) {
    uint32_t w[16], a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5],
                    g = state[6], h = state[7];
    for (int i = 0; i < 16; i++)
      w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 |
             p[4 * i + 3];
    for (int i = 0; i < 64; i += 8) {
      for (int j = i; i >= 16 && j < i + 8; j++) {
        uint32_t old = w[(j + 1) % 16], late = w[(j + 14) % 16];
        w[j % 16] += (rotate(old, 7) ^ rotate(old, 18) ^ old >> 3) + w[(j + 9) % 16] +
                     (rotate(late, 17) ^ rotate(late, 19) ^ late >> 10);
      }
      ROUND(a, b, c, d, e, f, g, h, i);
      ROUND(h, a, b, c, d, e, f, g, i + 1);
      ROUND(g, h, a, b, c, d, e, f, i + 2);
      ROUND(f, g, h, a, b, c, d, e, i + 3);
      ROUND(e, f, g, h, a, b, c, d, i + 4);
      ROUND(d, e, f, g, h, a, b, c, i + 5);
      ROUND(c, d, e, f, g, h, a, b, i + 6);
      ROUND(b, c, d, e, f, g, h, a, i + 7);
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
  }
}

#ifdef __x86_64__
bool ks_sha256_x86_supported(void) {
  const unsigned ssse3 = 1u << 9, sse41 = 1u << 19, sha = 1u << 29;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & ssse3) || !(c & sse41)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & sha);
}

/* The instructions keep the state as (a, b, e, f) and (c, d, g, h), highest word first, do two rounds at
 * once, and make four words of the schedule from the 16 before them. */
__attribute__((target("sha,sse4.1,ssse3"))) void
ks_sha256_blocks_x86(uint32_t state[8], const unsigned char *blocks, size_t n_blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i dcba = _mm_loadu_si128((const __m128i *)state),
          hgfe = _mm_loadu_si128((const __m128i *)(state + 4));
  __m128i ab = _mm_shuffle_epi32(dcba, 0xb1), ef = _mm_shuffle_epi32(hgfe, 0x1b);
  __m128i abef = _mm_alignr_epi8(ab, ef, 8), cdgh = _mm_blend_epi16(ef, ab, 0xf0);
  for (const unsigned char *p = blocks; n_blocks > 0; n_blocks--, p += 64) {
    __m128i w[4], first = abef, second = cdgh;
    for (int i = 0; i < 4; i++)
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * i)), big_endian);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      __m128i *now = &w[i % 4], last = w[(i + 3) % 4];
      if (i >= 4) {
        __m128i sums = _mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(i + 1) % 4]),
                                     _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        *now = _mm_sha256msg2_epu32(sums, last);
      }
      __m128i k = _mm_add_epi32(*now, _mm_loadu_si128((const __m128i *)(round_constants + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(k, 0x0e));
    }
    abef = _mm_add_epi32(abef, first);
    cdgh = _mm_add_epi32(cdgh, second);
  }
  __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

static ks_sha256_blocks_function compress = ks_sha256_blocks_plain;

__attribute__((constructor)) static void choose_compress(void) {
#ifdef __x86_64__
  if (ks_sha256_x86_supported()) compress = ks_sha256_blocks_x86;
#endif
}

void ks_sha256_init(ks_sha256 *h) {
  static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(h->state, start, sizeof start);
  h->n_bytes = 0;
}

void ks_sha256_add(ks_sha256 *h, const void *bytes, size_t n) {
  const unsigned char *p = bytes;
  size_t held = (size_t)(h->n_bytes % 64);
  h->n_bytes += n;
  if (held > 0) {
    size_t take = n < 64 - held ? n : 64 - held;
    if (take) memcpy(h->block + held, p, take);
    p += take;
    n -= take;
    if (held + take < 64) return;
    compress(h->state, h->block, 1);
  }
  if (n >= 64) compress(h->state, p, n / 64);
  if (n % 64) memcpy(h->block, p + n / 64 * 64, n % 64);
}

void ks_sha256_finish(ks_sha256 *h, char out_hex[65]) {
  unsigned char tail[72] = {0x80};
  uint64_t bits = h->n_bytes * 8;
  size_t held = (size_t)(h->n_bytes % 64), pad = (held < 56 ? 56 : 120) - held;
  for (int i = 0; i < 8; i++)
    tail[pad + (size_t)i] = (unsigned char)(bits >> (56 - 8 * i));
  ks_sha256_add(h, tail, pad + 8);
  for (int i = 0; i < 8; i++)
    snprintf(out_hex + 8 * i, 9, "%08x", h->state[i]);
}

ks_status ks_sha256_file(const char *path, char out_hex[65]) {
  ks_file_map m;
  KS_TRY(ks_file_map_open(path, &m));
  ks_sha256 h;
  ks_sha256_init(&h);
  ks_sha256_add(&h, m.data, m.n);
  ks_sha256_finish(&h, out_hex);
  ks_file_map_close(&m);
  return KS_OK;
}
