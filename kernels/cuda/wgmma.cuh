/* Machine instructions of Hopper (sm_90a) that CUDA C does not name: barriers in shared memory, the bulk copy engine, and the
 * asynchronous products of a warpgroup. The shim of tests/cuda_on_cpu/ has the same names.
 *
 *   ks_barrier_init(&full[s], 1);                      // one thread; then ks_barrier_init_done() and __syncthreads()
 *   ks_barrier_expect(&full[s], bytes);                // the producer: one arrival, and so many bytes to come
 *   ks_tma_load(tile, &map, col, row, &full[s]);       // one box of the map, 64 bf16 wide
 *   ks_barrier_wait(&full[s], parity);                 // consumers
 *   ks_wgmma_fence(acc);
 *   ks_wgmma<0>(acc, ks_wgmma_desc_k(a), ks_wgmma_desc_k(b), 0);       // acc = A B^T, 64 x N x 16
 *   ks_wgmma_commit();
 *   ks_wgmma_wait<0>(acc);
 *   ks_barrier_arrive(&empty[s]);
 *
 * Barriers count arrivals and bytes; a phase ends when both are complete, and ks_barrier_wait(b, p) returns when phase number p
 * (modulo 2) has ended: phase 0 is the first. A barrier that is fresh counts as if phase 1 had ended before.
 *
 * Tiles. A line is 128 bytes, 64 bf16; eight lines make an atom of 1024 bytes, in which piece i (of 16 bytes) of line r lies at
 * i ^ r; atoms begin at multiples of 1024. This is what a tensor map with 128-byte swizzle writes.
 *   K-major   a line is one row (of A, or of B^T), 64 of k: the next atom holds the next eight rows. The next 16 of k begin 32
 *             bytes further (the hardware swizzles the address, so that the atom's own bits do the rest).
 *   MN-major  a line is one k, 64 columns: the next atom holds the next eight k; the next 64 columns begin `group` bytes further.
 *             The next 16 of k begin 2048 bytes further.
 *
 * Sums of a warpgroup's 64 x N tile: warp w of four and lane l = 4 g + t hold in acc[4 j + 2 h + c] the element of row
 * 16 w + 8 h + g and column 8 j + 2 t + c. */
#ifndef KS_CUDA_WGMMA_CUH
#define KS_CUDA_WGMMA_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/tensor_map.h"

#ifdef KS_CUDA_ON_CPU
#include "ks_shim_hopper.h" /* tests/cuda_on_cpu/include: the same names */
#endif

/* Defined where code of these instructions may be generated. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(KS_CUDA_ON_CPU)
#define KS_HAS_WGMMA 1
#endif

enum { KS_WARPGROUP = 128, KS_ATOM_BYTES = 1024 };

/* Where piece `piece` of line `line` of a tile lies, in bytes. */
KS_HOST_DEVICE int ks_swizzle_128(int line, int piece) {
  return line * 128 + ((piece ^ (line & 7)) << 4);
}

/* ---------------------------------------------------------------- descriptors */

/* Bits 0-13: address / 16; 16-29: leading offset / 16; 32-45: stride offset / 16; 62-63: 1 is 128-byte swizzle. */
KS_DEVICE uint64_t ks_wgmma_desc(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t)((address & 0x3ffffu) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         (uint64_t)1 << 62;
}
KS_DEVICE uint64_t ks_wgmma_desc_k(const void *tile) {
  return ks_wgmma_desc(ks_smem_address(tile), 16, KS_ATOM_BYTES);
}
KS_DEVICE uint64_t ks_wgmma_desc_mn(const void *tile, uint32_t group) {
  return ks_wgmma_desc(ks_smem_address(tile), group, KS_ATOM_BYTES);
}
/* A descriptor `bytes` further on. */
KS_DEVICE uint64_t ks_wgmma_advance(uint64_t desc, uint32_t bytes) {
  return desc + (bytes >> 4);
}

#if !defined(KS_CUDA_ON_CPU) && defined(KS_HAS_WGMMA)
/* ---------------------------------------------------------------- barriers */

KS_DEVICE void ks_barrier_init(uint64_t *b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ks_smem_address(b)), "r"(arrivals) : "memory");
}
/* By the thread that made them: the copy engine sees them, and behind a barrier of the block so do all threads. */
KS_DEVICE void ks_barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
KS_DEVICE void ks_barrier_arrive(uint64_t *b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ks_smem_address(b)) : "memory");
}
KS_DEVICE void ks_barrier_expect(uint64_t *b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ks_smem_address(b)), "r"(bytes)
               : "memory");
}
KS_DEVICE void ks_barrier_wait(uint64_t *b, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n"
               "}" ::"r"(ks_smem_address(b)),
               "r"(parity)
               : "memory");
}

/* ---------------------------------------------------------------- copies */

KS_DEVICE void ks_tma_load(void *tile, const ks_tensor_map *map, int col, int row, uint64_t *b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
               "[%2];" ::"r"(ks_smem_address(tile)),
               "l"(map), "r"(ks_smem_address(b)), "r"(col), "r"(row)
               : "memory");
}
KS_DEVICE void ks_tma_prefetch(const ks_tensor_map *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/* What this thread stored in shared memory may be read by products, once they are told behind a barrier. */
KS_DEVICE void ks_async_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---------------------------------------------------------------- registers of a warpgroup */

template <int N> KS_DEVICE void ks_registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> KS_DEVICE void ks_registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---------------------------------------------------------------- products */

/* Keeps uses of the sums on their side of this place. */
template <int SUMS> KS_DEVICE void ks_wgmma_pin(float (&acc)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++)
    asm volatile("" : "+f"(acc[i])::"memory");
}
/* Before the first product after the sums were used otherwise. */
template <int SUMS> KS_DEVICE void ks_wgmma_fence(float (&acc)[SUMS]) {
  ks_wgmma_pin(acc);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
KS_DEVICE void ks_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Until at most N groups are under way. */
template <int N, int SUMS> KS_DEVICE void ks_wgmma_wait(float (&acc)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  ks_wgmma_pin(acc);
}

// clang-format off
#define KS_REGISTERS_0_63 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KS_REGISTERS_64_127 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define KS_ACC_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KS_ACC_16(d, i) KS_ACC_4(d, i), KS_ACC_4(d, i + 4), KS_ACC_4(d, i + 8), KS_ACC_4(d, i + 12)
#define KS_ACC_64(d, i) KS_ACC_16(d, i), KS_ACC_16(d, i + 16), KS_ACC_16(d, i + 32), KS_ACC_16(d, i + 48)
// clang-format on

/* acc (+)= A B, A 64 x 16 (K-major), B 16 x N: K-major (MN_MAJOR 0) or MN-major (1). keep 0: what acc held is dropped.
 * N = 2 * the number of sums. All 128 threads of the warpgroup. */
template <int MN_MAJOR> KS_DEVICE void ks_wgmma(float (&acc)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" KS_REGISTERS_0_63 ", " KS_REGISTERS_64_127
               "}, %128, %129, p, 1, 1, 0, %131;\n}"
               : KS_ACC_64(acc, 0), KS_ACC_64(acc, 64)
               : "l"(a), "l"(b), "r"(keep), "n"(MN_MAJOR));
}
template <int MN_MAJOR> KS_DEVICE void ks_wgmma(float (&acc)[64], uint64_t a, uint64_t b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" KS_REGISTERS_0_63
               "}, %64, %65, p, 1, 1, 0, %67;\n}"
               : KS_ACC_64(acc, 0)
               : "l"(a), "l"(b), "r"(keep), "n"(MN_MAJOR));
}
#endif
#endif
