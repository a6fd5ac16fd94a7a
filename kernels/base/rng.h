/* Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011). A draw depends on (seed, purpose, id, index) alone, never on what was drawn before elsewhere, so
 * that changing the policy changes no other draw. The same code runs on host and device.
 *
 *   ks_rng rng = ks_rng_make(seed, KS_RNG_SHUFFLE, user_id);
 *   uint64_t j = ks_rng_below(&rng, n);
 */
#ifndef KS_RNG_H
#define KS_RNG_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define KS_RNG_FN __host__ __device__
#else
#define KS_RNG_FN
#endif

/* One purpose, one family of streams. Append only: the values are part of every recorded result. */
typedef enum {
  KS_RNG_SHUFFLE = 1,      /* stream order */
  KS_RNG_SPLIT = 2,        /* which sets are held out */
  KS_RNG_ADAPTER_INIT = 3, /* LoRA A */
  KS_RNG_DROPOUT = 4,
  KS_RNG_POLICY = 5,
  KS_RNG_SAMPLE = 6,    /* token sampling at evaluation */
  KS_RNG_SYNTHESIS = 7, /* token sampling and choices in synthesis */
  KS_RNG_BATCH = 8,     /* order of training examples */
  KS_RNG_ANNOTATOR = 9, /* noise and refusal */
  KS_RNG_DATA = 10,     /* persona generator */
  KS_RNG_BOOTSTRAP = 11,
  KS_RNG_TEST = 12
} ks_rng_purpose;

typedef struct {
  uint32_t v[4];
} ks_philox_block;

/* a * b. Said in PTX where nvcc would widen both first: a quarter more instructions in ks_philox. */
KS_RNG_FN static inline uint64_t ks_rng_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return (uint64_t)a * b;
#endif
}

/* The 128 random bits of counter (hi, lo) under `key`. */
KS_RNG_FN static inline ks_philox_block ks_philox(uint64_t key, uint64_t hi, uint64_t lo) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  uint32_t c0 = (uint32_t)lo, c1 = (uint32_t)(lo >> 32), c2 = (uint32_t)hi, c3 = (uint32_t)(hi >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = ks_rng_product(0xD2511F53u, c0), p1 = ks_rng_product(0xCD9E8D57u, c2);
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  ks_philox_block b = {{c0, c1, c2, c3}};
  return b;
}

/* A stream of draws; copy it to fork it, set `next` to jump. One draw uses one counter value. */
typedef struct {
  uint64_t key;    /* the seed */
  uint64_t stream; /* purpose and id */
  uint64_t next;   /* index of the next draw */
} ks_rng;

/* The stream of `purpose` and `id` (id < 2^56) under `seed`. */
KS_RNG_FN static inline ks_rng ks_rng_make(uint64_t seed, ks_rng_purpose purpose, uint64_t id) {
  ks_rng r = {seed, ((uint64_t)purpose << 56) ^ id, 0};
  return r;
}

/* A key derived from (seed, purpose, id, sub): for operations that take a 64-bit key and count for
 * themselves. */
KS_RNG_FN static inline uint64_t ks_rng_key(uint64_t seed, ks_rng_purpose purpose, uint64_t id,
                                                 uint64_t sub) {
  ks_philox_block b = ks_philox(seed, ((uint64_t)purpose << 56) ^ id, sub);
  return ((uint64_t)b.v[1] << 32) | b.v[0];
}

KS_RNG_FN static inline uint64_t ks_rng_u64(ks_rng *r) {
  ks_philox_block b = ks_philox(r->key, r->stream, r->next++);
  return ((uint64_t)b.v[1] << 32) | b.v[0];
}

/* Uniform in [0, 1), 53 bits. */
KS_RNG_FN static inline double ks_rng_uniform(ks_rng *r) {
  return (double)(ks_rng_u64(r) >> 11) * 0x1p-53;
}

/* Uniform in {0 .. n-1}, unbiased (Lemire's multiply and reject); 0 when n is 0. */
static inline uint64_t ks_rng_below(ks_rng *r, uint64_t n) {
  if (n == 0) return 0;
  uint64_t threshold = (0 - n) % n;
  for (;;) {
    __uint128_t m = (__uint128_t)ks_rng_u64(r) * n;
    if ((uint64_t)m >= threshold) return (uint64_t)(m >> 64);
  }
}

/* Standard normal (Box-Muller; one draw a value, so that streams stay countable). */
static inline double ks_rng_normal(ks_rng *r) {
  ks_philox_block b = ks_philox(r->key, r->stream, r->next++);
  double u = ((double)b.v[0] + 1.0) * 0x1p-32; /* (0, 1] */
  double v = (double)b.v[1] * 0x1p-32;
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

#endif
