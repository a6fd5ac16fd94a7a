/* What CUDA C++ gives to device code: qualifiers, threadIdx and its kin, barriers, warp collectives, atomics,
 * intrinsics. Included by cuda_runtime.h. Barriers and collectives: ks_shim_threads.h. */
#ifndef KS_SHIM_BUILTINS_H
#define KS_SHIM_BUILTINS_H

#include "ks_shim_threads.h"
#include <math.h>
#include <string.h>
#include <tuple> /* here, as the C++ library writes __noinline__ inside of attributes */
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* __shared__ is not defined: shared memory is taken by ks_smem_take. */

extern "C" {
extern uint3 threadIdx, blockIdx;
}
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

/* ---------------------------------------------------------------- make_float4 ... */

#define KS_SHIM_MAKE(name, T)                                                                                \
  static inline name##1 make_##name##1(T x) {                                                                \
    return name##1 {x};                                                                                      \
  }                                                                                                          \
  static inline name##2 make_##name##2(T x, T y) {                                                           \
    return name##2 {x, y};                                                                                   \
  }                                                                                                          \
  static inline name##3 make_##name##3(T x, T y, T z) {                                                      \
    return name##3 {x, y, z};                                                                                \
  }                                                                                                          \
  static inline name##4 make_##name##4(T x, T y, T z, T w) {                                                 \
    return name##4 {x, y, z, w};                                                                             \
  }
KS_SHIM_VECTORS(KS_SHIM_MAKE)
#undef KS_SHIM_MAKE
static inline double2 make_double2(double x, double y) {
  return double2{x, y};
}
static inline longlong2 make_longlong2(long long x, long long y) {
  return longlong2{x, y};
}
static inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) {
  return ulonglong2{x, y};
}

/* ---------------------------------------------------------------- barriers, votes, shuffles */

/* Not inlined, so that reports say which line of a kernel called them. */
#define KS_SHIM_WAITS static __attribute__((noinline, unused))

KS_SHIM_WAITS void __syncthreads() {
  (void)ks_shim_block_wait(KS_SHIM_SYNCTHREADS, 0);
}
KS_SHIM_WAITS int __syncthreads_count(int predicate) {
  return ks_shim_block_wait(KS_SHIM_SYNCTHREADS_COUNT, predicate != 0);
}
KS_SHIM_WAITS int __syncthreads_or(int predicate) {
  return ks_shim_block_wait(KS_SHIM_SYNCTHREADS_OR, predicate != 0) > 0;
}
KS_SHIM_WAITS int __syncthreads_and(int predicate) {
  return ks_shim_block_wait(KS_SHIM_SYNCTHREADS_AND, predicate == 0) == 0;
}
KS_SHIM_WAITS void __syncwarp(unsigned mask = 0xffffffffu) {
  ks_shim_warp_sync(mask);
}
static inline unsigned __activemask() {
  return ks_shim_warp_lanes();
}
KS_SHIM_WAITS unsigned __ballot_sync(unsigned mask, int predicate) {
  return ks_shim_ballot(KS_SHIM_BALLOT, mask, predicate != 0);
}
KS_SHIM_WAITS int __any_sync(unsigned mask, int predicate) {
  return ks_shim_ballot(KS_SHIM_ANY, mask, predicate != 0) != 0;
}
KS_SHIM_WAITS int __all_sync(unsigned mask, int predicate) {
  return ks_shim_ballot(KS_SHIM_ALL, mask, predicate == 0) == 0;
}

template <class T>
static inline T ks_shim_shuffle_any(ks_shim_at at, unsigned mask, T value, int lane, int width) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "a type that a shuffle takes");
  typedef typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type word;
  const word bits = __builtin_bit_cast(word, value);
  return __builtin_bit_cast(T, (word)ks_shim_shuffle(at, (unsigned)sizeof(T), mask, bits, lane, width));
}
template <class T> KS_SHIM_WAITS T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return ks_shim_shuffle_any(KS_SHIM_SHFL, mask, value, lane, width);
}
template <class T> KS_SHIM_WAITS T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return ks_shim_shuffle_any(KS_SHIM_SHFL_XOR, mask, value, lane_mask, width);
}
template <class T> KS_SHIM_WAITS T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ks_shim_shuffle_any(KS_SHIM_SHFL_UP, mask, value, (int)delta, width);
}
template <class T> KS_SHIM_WAITS T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ks_shim_shuffle_any(KS_SHIM_SHFL_DOWN, mask, value, (int)delta, width);
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
[[noreturn]] static inline void __trap() {
  ks_shim_fail("__trap()");
}

/* ---------------------------------------------------------------- atomics on integers; each returns the old
 * value */

#define KS_SHIM_ATOMIC(name, T, expression)                                                                  \
  static inline T name(T *p, T value) {                                                                      \
    T old = *p;                                                                                              \
    *p = (T)(expression);                                                                                    \
    return old;                                                                                              \
  }
#define KS_SHIM_ATOMICS(T, U)                                                                                \
  KS_SHIM_ATOMIC(atomicAdd, T, (U)old + (U)value)                                                            \
  KS_SHIM_ATOMIC(atomicMax, T, old > value ? old : value)                                                    \
  KS_SHIM_ATOMIC(atomicMin, T, old < value ? old : value)                                                    \
  KS_SHIM_ATOMIC(atomicExch, T, value)                                                                       \
  KS_SHIM_ATOMIC(atomicAnd, T, old &value)                                                                   \
  KS_SHIM_ATOMIC(atomicOr, T, old | value)                                                                   \
  KS_SHIM_ATOMIC(atomicXor, T, old ^ value)                                                                  \
  static inline T atomicCAS(T *p, T compare, T value) {                                                      \
    T old = *p;                                                                                              \
    if (old == compare) *p = value;                                                                          \
    return old;                                                                                              \
  }
KS_SHIM_ATOMICS(int, unsigned)
KS_SHIM_ATOMICS(unsigned, unsigned)
KS_SHIM_ATOMICS(unsigned long long, unsigned long long)
#undef KS_SHIM_ATOMICS
#undef KS_SHIM_ATOMIC
static inline unsigned atomicInc(unsigned *p, unsigned limit) {
  unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

/* ---------------------------------------------------------------- loads and stores with a hint */

#define KS_SHIM_LOAD(name)                                                                                   \
  template <class T> static inline T name(const T *p) {                                                      \
    return *p;                                                                                               \
  }
#define KS_SHIM_STORE(name)                                                                                  \
  template <class T> static inline void name(T *p, T value) {                                                \
    *p = value;                                                                                              \
  }
KS_SHIM_LOAD(__ldg)
KS_SHIM_LOAD(__ldca)
KS_SHIM_LOAD(__ldcg)
KS_SHIM_LOAD(__ldcs)
KS_SHIM_LOAD(__ldlu)
KS_SHIM_STORE(__stcg)
KS_SHIM_STORE(__stcs)
KS_SHIM_STORE(__stwb)
#undef KS_SHIM_LOAD
#undef KS_SHIM_STORE

/* ---------------------------------------------------------------- min, max */

#define KS_SHIM_MIN_MAX(T, A, B)                                                                             \
  static inline T min(A a, B b) {                                                                            \
    return (T)a < (T)b ? (T)a : (T)b;                                                                        \
  }                                                                                                          \
  static inline T max(A a, B b) {                                                                            \
    return (T)a > (T)b ? (T)a : (T)b;                                                                        \
  }
KS_SHIM_MIN_MAX(int, int, int)
KS_SHIM_MIN_MAX(unsigned, unsigned, unsigned)
KS_SHIM_MIN_MAX(unsigned, int, unsigned)
KS_SHIM_MIN_MAX(unsigned, unsigned, int)
KS_SHIM_MIN_MAX(long, long, long)
KS_SHIM_MIN_MAX(unsigned long, unsigned long, unsigned long)
KS_SHIM_MIN_MAX(unsigned long, long, unsigned long)
KS_SHIM_MIN_MAX(unsigned long, unsigned long, long)
KS_SHIM_MIN_MAX(long long, long long, long long)
KS_SHIM_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
KS_SHIM_MIN_MAX(unsigned long long, long long, unsigned long long)
KS_SHIM_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef KS_SHIM_MIN_MAX
#define KS_SHIM_MIN_MAX(T, A, B, suffix)                                                                     \
  static inline T min(A a, B b) {                                                                            \
    return fmin##suffix((T)a, (T)b);                                                                         \
  }                                                                                                          \
  static inline T max(A a, B b) {                                                                            \
    return fmax##suffix((T)a, (T)b);                                                                         \
  }
KS_SHIM_MIN_MAX(float, float, float, f)
KS_SHIM_MIN_MAX(double, double, double, )
KS_SHIM_MIN_MAX(double, float, double, )
KS_SHIM_MIN_MAX(double, double, float, )
#undef KS_SHIM_MIN_MAX

/* ---------------------------------------------------------------- bits and integers */

#define KS_SHIM_CAST(name, To, From)                                                                         \
  static inline To name(From x) {                                                                            \
    To y;                                                                                                    \
    static_assert(sizeof(To) == sizeof(From), "same size");                                                  \
    memcpy(&y, &x, sizeof y);                                                                                \
    return y;                                                                                                \
  }
KS_SHIM_CAST(__float_as_uint, unsigned, float)
KS_SHIM_CAST(__float_as_int, int, float)
KS_SHIM_CAST(__uint_as_float, float, unsigned)
KS_SHIM_CAST(__int_as_float, float, int)
KS_SHIM_CAST(__double_as_longlong, long long, double)
KS_SHIM_CAST(__longlong_as_double, double, long long)
#undef KS_SHIM_CAST

static inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
static inline int __ffs(int x) {
  return __builtin_ffs(x);
}
static inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
static inline int __clz(int x) {
  return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x) {
  return x ? __builtin_clzll((unsigned long long)x) : 64;
}
static inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++)
    y |= (x >> i & 1u) << (31 - i);
  return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return (unsigned)((uint64_t)a * b >> 32);
}
static inline int __mulhi(int a, int b) {
  return (int)((int64_t)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
/* Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes b:a; bit 3 of a selector spreads that
 * byte's sign. */
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = selector >> 4 * i & 15u, byte = (unsigned)(both >> 8 * (s & 7u)) & 255u;
    if (s & 8u) byte = byte & 128u ? 255u : 0u;
    r |= byte << 8 * i;
  }
  return r;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return (unsigned)((((uint64_t)hi << 32 | lo) << (shift & 31u)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return (unsigned)(((uint64_t)hi << 32 | lo) >> (shift & 31u));
}
/* Sum of the products of four signed bytes. */
static inline int __dp4a(int a, int b, int c) {
  unsigned sum = (unsigned)c;
  for (int i = 0; i < 4; i++)
    sum += (unsigned)((int)(int8_t)((unsigned)a >> 8 * i) * (int)(int8_t)((unsigned)b >> 8 * i));
  return (int)sum;
}

/* ---------------------------------------------------------------- floating point */

/* The C library has functions of these names. */
#define __powf    ks_shim_powf
#define __expf    ks_shim_expf
#define __exp10f  ks_shim_exp10f
#define __logf    ks_shim_logf
#define __log2f   ks_shim_log2f
#define __log10f  ks_shim_log10f
#define __sinf    ks_shim_sinf
#define __cosf    ks_shim_cosf
#define __tanf    ks_shim_tanf
#define __sincosf ks_shim_sincosf

#define KS_SHIM_BINARY(name, T, expression)                                                                  \
  static inline T name(T a, T b) {                                                                           \
    return expression;                                                                                       \
  }
KS_SHIM_BINARY(__fadd_rn, float, a + b)
KS_SHIM_BINARY(__fsub_rn, float, a - b)
KS_SHIM_BINARY(__fmul_rn, float, a *b)
KS_SHIM_BINARY(__fdiv_rn, float, a / b)
KS_SHIM_BINARY(__fdividef, float, a / b)
KS_SHIM_BINARY(__dadd_rn, double, a + b)
KS_SHIM_BINARY(__dsub_rn, double, a - b)
KS_SHIM_BINARY(__dmul_rn, double, a *b)
KS_SHIM_BINARY(__ddiv_rn, double, a / b)
KS_SHIM_BINARY(__powf, float, powf(a, b))
#undef KS_SHIM_BINARY
#define KS_SHIM_UNARY(name, To, T, expression)                                                               \
  static inline To name(T x) {                                                                               \
    return expression;                                                                                       \
  }
KS_SHIM_UNARY(__frcp_rn, float, float, 1.0f / x)
KS_SHIM_UNARY(__fsqrt_rn, float, float, sqrtf(x))
KS_SHIM_UNARY(__frsqrt_rn, float, float, (float)(1.0 / sqrt((double)x)))
KS_SHIM_UNARY(rsqrtf, float, float, (float)(1.0 / sqrt((double)x)))
KS_SHIM_UNARY(rsqrt, double, double, 1.0 / sqrt(x))
KS_SHIM_UNARY(__saturatef, float, float, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)
KS_SHIM_UNARY(__expf, float, float, expf(x))
KS_SHIM_UNARY(__exp10f, float, float, powf(10.0f, x))
KS_SHIM_UNARY(__logf, float, float, logf(x))
KS_SHIM_UNARY(__log2f, float, float, log2f(x))
KS_SHIM_UNARY(__log10f, float, float, log10f(x))
KS_SHIM_UNARY(__sinf, float, float, sinf(x))
KS_SHIM_UNARY(__cosf, float, float, cosf(x))
KS_SHIM_UNARY(__tanf, float, float, tanf(x))
/* To integers: beyond the range the nearest end, NaN gives 0. */
KS_SHIM_UNARY(__float2int_rn, int, float, x != x ? 0 : (int)fmax(-0x1p31, fmin(0x1p31 - 1, rint((double)x))))
KS_SHIM_UNARY(__float2int_rz, int, float, x != x ? 0 : (int)fmax(-0x1p31, fmin(0x1p31 - 1, trunc((double)x))))
KS_SHIM_UNARY(__float2int_rd, int, float, x != x ? 0 : (int)fmax(-0x1p31, fmin(0x1p31 - 1, floor((double)x))))
KS_SHIM_UNARY(__float2int_ru, int, float, x != x ? 0 : (int)fmax(-0x1p31, fmin(0x1p31 - 1, ceil((double)x))))
KS_SHIM_UNARY(__float2uint_rn, unsigned, float,
              x != x ? 0u : (unsigned)fmax(0.0, fmin(0x1p32 - 1, rint((double)x))))
KS_SHIM_UNARY(__float2uint_rz, unsigned, float,
              x != x ? 0u : (unsigned)fmax(0.0, fmin(0x1p32 - 1, trunc((double)x))))
KS_SHIM_UNARY(__int2float_rn, float, int, (float)x)
KS_SHIM_UNARY(__uint2float_rn, float, unsigned, (float)x)
#undef KS_SHIM_UNARY
static inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
static inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}
static inline void __sincosf(float x, float *s, float *c) {
  *s = sinf(x);
  *c = cosf(x);
}
#endif
