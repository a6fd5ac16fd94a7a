/* What every kernel is written with: types, vectors, warp and block reductions, shared memory, and the few machine
 * instructions that CUDA C does not name. The same files are compiled by nvcc and, over the shim of tests/cuda_on_cpu/, by
 * the host's C++ compiler; there KS_CUDA_ON_CPU is defined and the shim gives threadIdx, __syncthreads(), __shfl_xor_sync()
 * and the wrappers of this file that hold assembly.
 *
 *   template <class T> __global__ void scale_kernel(T *x, int64_t n, float s) {
 *     ks_smem smem;                                       // dynamic shared memory, handed out in order
 *     float *tile = ks_smem_take<float>(&smem, 32);       // every thread of a block takes the same arrays in the same order
 *     ...
 *   }
 *   KS_TRY(ks_launch(ctx, "scale", scale_kernel<T>, dim3(n_blocks), dim3(128), ks_smem_bytes<float>(32), x, n, s));
 *
 * Rules for kernels
 * - Shared memory only through ks_smem_take: the shim makes each array an allocation of its own, filled with NaN, so that
 *   AddressSanitizer sees an index out of bounds and the tests see what was never written.
 * - Warp collectives are called by all 32 lanes with the full mask. Lanes that are done go on with neutral values.
 * - No atomics on floats; reductions in a fixed order that depends on nothing but the row's (or segment's) own shape.
 * - int64_t for element offsets; int for what fits a tile. Sizes come from the host as int or int64_t.
 * - The host checks every argument (kernels/ops_check.c); kernels check only their own edges.
 */
#ifndef KS_CUDA_DEVICE_CUH
#define KS_CUDA_DEVICE_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#define KS_DEVICE __device__ __forceinline__
#define KS_HOST_DEVICE __host__ __device__ __forceinline__

enum { KS_WARP = 32 };
#define KS_FULL_MASK 0xffffffffu

/* ---------------------------------------------------------------- bf16 */

/* The upper half of a float32. */
struct ks_bf16 {
  uint16_t bits;
};

KS_HOST_DEVICE float ks_bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  union {
    uint32_t u;
    float f;
  } v = {bits};
  return v.f;
#endif
}
KS_HOST_DEVICE uint32_t ks_float_to_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  union {
    float f;
    uint32_t u;
  } v = {x};
  return v.u;
#endif
}

KS_HOST_DEVICE float ks_to_float(ks_bf16 x) {
  return ks_bits_to_float((uint32_t)x.bits << 16);
}
KS_HOST_DEVICE float ks_to_float(float x) {
  return x;
}

/* Nearest, ties to even; a NaN stays a (quiet) NaN. */
KS_HOST_DEVICE uint32_t ks_bf16_bits(float x) {
  uint32_t b = ks_float_to_bits(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return (b >> 16) | 0x40u;
  return (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
}

/* Two values as the halves of a register: lo in bits 0 to 15. */
KS_DEVICE uint32_t ks_pack_bf16(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return ks_bf16_bits(lo) | ks_bf16_bits(hi) << 16;
#endif
}
KS_DEVICE float ks_bf16_lo(uint32_t packed) {
  return ks_bits_to_float(packed << 16);
}
KS_DEVICE float ks_bf16_hi(uint32_t packed) {
  return ks_bits_to_float(packed & 0xffff0000u);
}

template <class T> KS_DEVICE T ks_from_float(float x);
template <> KS_DEVICE float ks_from_float<float>(float x) {
  return x;
}
template <> KS_DEVICE ks_bf16 ks_from_float<ks_bf16>(float x) {
  ks_bf16 r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  r.bits = (uint16_t)ks_pack_bf16(x, 0.0f);
#else
  r.bits = (uint16_t)ks_bf16_bits(x);
#endif
  return r;
}

/* ---------------------------------------------------------------- 16-byte vectors */

/* One 16-byte access: 4 floats or 8 bf16. Pointers must be aligned to 16 bytes. */
template <class T> struct ks_vec;
template <> struct ks_vec<float> {
  enum { N = 4 };
  float x[4];
};
template <> struct ks_vec<ks_bf16> {
  enum { N = 8 };
  float x[8];
};

KS_DEVICE void ks_load_vec(ks_vec<float> *v, const float *p) {
  float4 r = *(const float4 *)p;
  v->x[0] = r.x, v->x[1] = r.y, v->x[2] = r.z, v->x[3] = r.w;
}
KS_DEVICE void ks_load_vec(ks_vec<ks_bf16> *v, const ks_bf16 *p) {
  uint4 r = *(const uint4 *)p;
  v->x[0] = ks_bf16_lo(r.x), v->x[1] = ks_bf16_hi(r.x), v->x[2] = ks_bf16_lo(r.y), v->x[3] = ks_bf16_hi(r.y);
  v->x[4] = ks_bf16_lo(r.z), v->x[5] = ks_bf16_hi(r.z), v->x[6] = ks_bf16_lo(r.w), v->x[7] = ks_bf16_hi(r.w);
}
KS_DEVICE void ks_store_vec(float *p, const ks_vec<float> *v) {
  *(float4 *)p = make_float4(v->x[0], v->x[1], v->x[2], v->x[3]);
}
KS_DEVICE void ks_store_vec(ks_bf16 *p, const ks_vec<ks_bf16> *v) {
  *(uint4 *)p = make_uint4(ks_pack_bf16(v->x[0], v->x[1]), ks_pack_bf16(v->x[2], v->x[3]),
                           ks_pack_bf16(v->x[4], v->x[5]), ks_pack_bf16(v->x[6], v->x[7]));
}
/* True when rows of n_cols elements that start at p can be read in vectors. */
template <class T> KS_HOST_DEVICE bool ks_is_vector_aligned(const T *p, int64_t n_cols) {
  return ((uintptr_t)p | (uintptr_t)(n_cols * (int64_t)sizeof(T))) % 16 == 0;
}

/* ---------------------------------------------------------------- shared memory */

/* Each array starts on 16 bytes. Bytes of arrays, for the launch: the sum of ks_smem_bytes of each. */
template <class T> KS_HOST_DEVICE size_t ks_smem_bytes(size_t n) {
  return (n * sizeof(T) + 15) & ~(size_t)15;
}

#ifndef KS_CUDA_ON_CPU
struct ks_smem {
  size_t used;
  KS_DEVICE ks_smem() : used(0) {
  }
};
extern __shared__ __align__(1024) unsigned char ks_smem_base[];
template <class T> KS_DEVICE T *ks_smem_take(ks_smem *s, size_t n) {
  T *p = (T *)(ks_smem_base + s->used);
  s->used += ks_smem_bytes<T>(n);
  return p;
}
#endif

/* ---------------------------------------------------------------- machine instructions */

#ifndef KS_CUDA_ON_CPU

KS_DEVICE uint32_t ks_smem_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* 2^x, relative error about 2^-22; 2^-inf = 0. */
KS_DEVICE float ks_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* log2 x of a normal x > 0, to 2^-22, and where |log2 x| > 1 to 2^-22 of it. */
KS_DEVICE float ks_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Four 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8; register i
 * of lane l then holds elements (2 (l % 4), 2 (l % 4) + 1) of row l / 4 of matrix i. _trans: of the transposed matrices. */
KS_DEVICE void ks_ldmatrix_x4(uint32_t r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ks_smem_address(row))
               : "memory");
}
KS_DEVICE void ks_ldmatrix_x4_trans(uint32_t r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ks_smem_address(row))
               : "memory");
}
/* Two of them; the addresses of lanes 0 to 15 count, the others' must be valid too. */
KS_DEVICE void ks_ldmatrix_x2(uint32_t r[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(ks_smem_address(row))
               : "memory");
}

/* d += a b, a: 16 x 16 (rows of a), b: 16 x 8 (columns of b), bf16 in, float32 out (mma.m16n8k16). With g =
 *   lane / 4, t = lane % 4: a[0]: (g, 2t..), a[1]: (g + 8, 2t..), a[2]: (g, 2t + 8..), a[3]: (g + 8, 2t +
 *   8..);   b[0]: (2t.., g), b[1]: (2t + 8.., g); d[0], d[1]: (g, 2t), (g, 2t + 1);   d[2], d[3]: (g + 8,
 *   2t), (g + 8, 2t + 1).
 * Turing has no such instruction for bf16; there the lanes exchange their operands, which is right and slow. */
KS_DEVICE void ks_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const int lane = (int)(threadIdx.x & 31u), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll 1 /* unrolled, kernels of many products compile for minutes */
    for (int j = 0; j < 4; j++) {
      uint32_t a0 = __shfl_sync(KS_FULL_MASK, a[2 * half], g * 4 + j);
      uint32_t a1 = __shfl_sync(KS_FULL_MASK, a[2 * half + 1], g * 4 + j);
      uint32_t b0 = __shfl_sync(KS_FULL_MASK, b[half], 2 * t * 4 + j);
      uint32_t b1 = __shfl_sync(KS_FULL_MASK, b[half], (2 * t + 1) * 4 + j);
      d[0] = fmaf(ks_bf16_hi(a0), ks_bf16_hi(b0), fmaf(ks_bf16_lo(a0), ks_bf16_lo(b0), d[0]));
      d[1] = fmaf(ks_bf16_hi(a0), ks_bf16_hi(b1), fmaf(ks_bf16_lo(a0), ks_bf16_lo(b1), d[1]));
      d[2] = fmaf(ks_bf16_hi(a1), ks_bf16_hi(b0), fmaf(ks_bf16_lo(a1), ks_bf16_lo(b0), d[2]));
      d[3] = fmaf(ks_bf16_hi(a1), ks_bf16_hi(b1), fmaf(ks_bf16_lo(a1), ks_bf16_lo(b1), d[3]));
    }
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* Copies 16 bytes from device to shared memory, zeros when !pred (the source is then not read), without passing through
 * registers. What was copied may be read by its own thread after ks_cp_async_wait, by others after a barrier behind that. */
KS_DEVICE void ks_cp_async_16(void *smem, const void *src, bool pred) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *(uint4 *)smem = pred ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
#else
  int n = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ks_smem_address(smem)), "l"(src), "r"(n)
               : "memory");
#endif
}
/* The same with 8 and 4 bytes, for rows that are aligned to no more. */
KS_DEVICE void ks_cp_async_8(void *smem, const void *src, bool pred) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *(uint2 *)smem = pred ? *(const uint2 *)src : make_uint2(0, 0);
#else
  int n = pred ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(ks_smem_address(smem)), "l"(src), "r"(n)
               : "memory");
#endif
}
KS_DEVICE void ks_cp_async_4(void *smem, const void *src, bool pred) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *(uint32_t *)smem = pred ? *(const uint32_t *)src : 0;
#else
  int n = pred ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ks_smem_address(smem)), "l"(src), "r"(n)
               : "memory");
#endif
}
/* Ends a group of copies. */
KS_DEVICE void ks_cp_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* Waits until at most N of this thread's latest groups are under way. */
template <int N> KS_DEVICE void ks_cp_async_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#else
#include "ks_shim_device.h" /* tests/cuda_on_cpu/include: the same names */
#endif

/* ---------------------------------------------------------------- reductions */

/* Over the 32 lanes by halving, so in one fixed order; every lane gets the result. */
KS_DEVICE float ks_warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    x += __shfl_xor_sync(KS_FULL_MASK, x, d);
  return x;
}
KS_DEVICE double ks_warp_sum(double x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    x += __shfl_xor_sync(KS_FULL_MASK, x, d);
  return x;
}
/* Over lanes 4 g .. 4 g + 3, which share the rows of a warp's tiles of sums (ks_mma_bf16). */
KS_DEVICE float ks_quad_sum(float x) {
  x += __shfl_xor_sync(KS_FULL_MASK, x, 1);
  return x + __shfl_xor_sync(KS_FULL_MASK, x, 2);
}
/* A NaN among them gives NaN. */
KS_DEVICE float ks_max_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}
KS_DEVICE float ks_warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    x = ks_max_nan(x, __shfl_xor_sync(KS_FULL_MASK, x, d));
  return x;
}

/* Over all threads of a one-dimensional block of whole warps; every thread gets the result. `room`: shared, 32 elements. It may
 * be used again after the call without a barrier between. */
template <class T> KS_DEVICE T ks_block_sum(T x, T *room) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, n = (int)blockDim.x / KS_WARP;
  x = ks_warp_sum(x);
  if (n == 1) return x;
  if (lane == 0) room[warp] = x;
  __syncthreads();
  x = ks_warp_sum(lane < n ? room[lane] : (T)0);
  __syncthreads();
  return x;
}
KS_DEVICE float ks_block_max(float x, float *room) {
  const int warp = (int)threadIdx.x / KS_WARP, lane = (int)threadIdx.x % KS_WARP, n = (int)blockDim.x / KS_WARP;
  x = ks_warp_max(x);
  if (n == 1) return x;
  if (lane == 0) room[warp] = x;
  __syncthreads();
  x = ks_warp_max(lane < n ? room[lane] : -INFINITY);
  __syncthreads();
  return x;
}

/* ---------------------------------------------------------------- the last of several blocks */

/* True in all threads of the block that comes here last of n (at least 1): it may read what every thread of the others wrote to
 * device memory before, by __ldcg. *counter: 0 before the first of them, and after the last again. A barrier for the block.
 * A block's writes happen before its first thread's fence by the barrier, and so before the increment; the increments are in one
 * order, and what came before those that the last one read is there behind its own fence, by the second barrier for all its
 * threads. So one thread's fences do for all. */
KS_DEVICE bool ks_is_last_block(uint32_t *counter, uint32_t n) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, n - 1) == n - 1;
    __threadfence();
  }
  return __syncthreads_or(last);
}

#endif
