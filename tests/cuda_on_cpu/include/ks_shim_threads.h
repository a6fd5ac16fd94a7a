/* What barriers, collectives, shared memory and asynchronous copies of the shim's headers call; threads.c.
 * Kernels do not call these themselves. Each fails the launch (and does not return) when it is used against
 * CUDA's rules. */
#ifndef KS_SHIM_THREADS_H
#define KS_SHIM_THREADS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define KS_SHIM_NORETURN [[noreturn]]
extern "C" {
#else
#define KS_SHIM_NORETURN _Noreturn
#endif

/* Where a thread can wait. Lanes of one warp must wait at the same, with operands of the same size. */
#define KS_SHIM_PLACES(X)                                                                                    \
  X(SHFL, "__shfl_sync")                                                                                     \
  X(SHFL_UP, "__shfl_up_sync")                                                                               \
  X(SHFL_DOWN, "__shfl_down_sync")                                                                           \
  X(SHFL_XOR, "__shfl_xor_sync")                                                                             \
  X(BALLOT, "__ballot_sync")                                                                                 \
  X(ANY, "__any_sync")                                                                                       \
  X(ALL, "__all_sync")                                                                                       \
  X(SYNCWARP, "__syncwarp")                                                                                  \
  X(LDMATRIX, "ks_ldmatrix")                                                                                 \
  X(MMA, "ks_mma_bf16")                                                                                      \
  X(BARRIER, "ks_barrier_wait")                                                                              \
  X(GRID_WAIT, "ks_grid_wait")                                                                               \
  X(SYNCTHREADS, "__syncthreads")                                                                            \
  X(SYNCTHREADS_COUNT, "__syncthreads_count")                                                                \
  X(SYNCTHREADS_OR, "__syncthreads_or")                                                                      \
  X(SYNCTHREADS_AND, "__syncthreads_and")
typedef enum {
#define X(name, text) KS_SHIM_##name,
  KS_SHIM_PLACES(X)
#undef X
      KS_SHIM_N_PLACES
} ks_shim_at;

/* All threads of the block; the sum of their values. */
int ks_shim_block_wait(ks_shim_at at, int value);
/* ks_grid_wait: in a launch that is not early nothing. */
void ks_shim_grid_wait(void);
void ks_shim_warp_sync(unsigned mask);
unsigned ks_shim_warp_lanes(void);
/* Bit i: the value (0 or 1) of lane i. */
unsigned ks_shim_ballot(ks_shim_at at, unsigned mask, int value);
/* Bits of the value of the lane that (at, lane, width) selects. */
uint64_t ks_shim_shuffle(ks_shim_at at, unsigned size, unsigned mask, uint64_t bits, int lane, int width);

/* Rows of n 8x8 matrices of 16-bit elements; `row`: the 16 bytes that this lane read. */
void ks_shim_ldmatrix(uint32_t *r, int n, int transposed, const void *row);
/* d [4], a [4], b [2]: this lane's registers of mma.m16n8k16. */
void ks_shim_mma(float *d, const uint32_t *a, const uint32_t *b);

/* The k-th array of shared memory of this block: the same for all its threads, `bytes` long and no more. */
void *ks_shim_smem(int k, size_t bytes);
/* Addresses of shared memory as instructions know them: the first array begins at 1024, as on sm_90. A pointer outside every
 * array, and a range that leaves its array, fail. */
uint32_t ks_shim_smem_address(const void *p);
void *ks_shim_smem_pointer(uint32_t address, size_t bytes);
/* The same place as the copy engine and products see it: what the former wrote, and of ordinary stores those before the last
 * fence. A fence is one for the stores of all threads that ran until then, where the hardware's is for the thread's own. */
void *ks_shim_smem_async(uint32_t address, size_t bytes);
void ks_shim_async_fence(void);

void ks_shim_cp_async(void *dst, const void *src, uint32_t bytes); /* src NULL: zeros */
void ks_shim_cp_async_commit(void);
void ks_shim_cp_async_wait(int n_left);

/* Ends the launch with cudaErrorLaunchFailure. */
KS_SHIM_NORETURN void ks_shim_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

#ifdef __cplusplus
}
#endif
#endif
