/* Controls of the shim that runs CUDA kernels on the CPU (README.md of the folder above). C and C++. One
 * thread at a time.
 *
 *   ks_shim_set_order(1);                                   // threads, warps and blocks from the last to the first
 *   ks_shim_set_memory(64 << 20);                           // a device of 64 MiB
 *   ... what the backend does ...
 *   if (cudaStreamSynchronize(s)) puts(ks_shim_report());   // which kernel, block, threads, and what each waits for
 */
#ifndef KS_SHIM_H
#define KS_SHIM_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* In which order the lanes of a warp, the warps of a block and the blocks of a grid run from one barrier to
 * the next: 0 forward, 1 backward, n >= 2 shuffled, seed n. Of two threads between the same two barriers each
 * comes first in one of the orders 0 and 1. */
void ks_shim_set_order(int order);

/* The device as the backend sees it; effective for what is asked afterwards. Defaults: 1 GiB, compute
 * capability 8.9, 99 KiB of shared memory a block, the least of any device with tensor cores for bf16 (48 without
 * cudaFuncSetAttribute, as everywhere); with KS_SHIM_TURING=1 in the environment 7.5 and 64 KiB, with
 * KS_SHIM_HOPPER=1 as by ks_shim_set_hopper. */
void ks_shim_set_memory(size_t bytes);
void ks_shim_set_capability(int major, int minor);
void ks_shim_set_smem(size_t bytes_per_block);
void ks_shim_set_multiprocessors(int n);
/* While on: capability 9.0 and 227 KiB of shared memory a block, whatever was set. */
void ks_shim_set_hopper(int on);
/* While off: there is no memory for a graph on the device (cudaGraphUpload, cudaGraphLaunch). */
void ks_shim_set_graphs(int on);
/* From now on cuBLASLt has no algorithm for matrices that are promised to be aligned to less (1: for all). */
void ks_shim_set_blas_alignment(uint32_t bytes);
/* Device bytes and pinned host bytes held now: 0 when everything was freed. */
size_t ks_shim_memory_used(void);
size_t ks_shim_pinned_used(void);

/* What went wrong in the last launch that failed, in words; "" after ks_shim_clear. */
const char *ks_shim_report(void);
/* Forgets an error that a real device would keep until the end of the process. */
void ks_shim_clear(void);

/* Counted since the program began: kernels run, graphs launched, times one thread of a block gave way to
 * another. */
typedef struct {
  uint64_t launches, graph_launches, switches, products;
} ks_shim_counts;
ks_shim_counts ks_shim_count(void);

/* In place of cudaLaunchKernel, which cannot call a function whose parameters it does not know: `invoke`
 * (launch.cuh) does. Copies the arguments; op is for messages and must live as long as the program. early: as with
 * cudaLaunchAttributeProgrammaticStreamSerialization. In a graph such a kernel may, above its ks_grid_wait, touch no memory
 * that the graph was seen to change (from its second launch on), and all its threads must come to one. */
cudaError_t ks_shim_launch(const void *func, void (*invoke)(const void *func, void **args), dim3 grid,
                           dim3 block, void **args, const size_t *arg_sizes, int n_args, size_t smem_bytes,
                           cudaStream_t stream, int early, const char *op);

/* Queues a function on a stream (captured like everything else); `copy` of `bytes` are its argument. For the
 * shim's cuBLASLt. */
cudaError_t ks_shim_call(cudaStream_t stream, void (*run)(const void *copy), const void *copy, size_t bytes);
/* True when [p, p + bytes) lies in one piece of device memory. */
int ks_shim_is_device(const void *p, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
