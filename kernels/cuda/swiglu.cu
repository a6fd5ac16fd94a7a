/* SwiGLU, forward and backward.
 *
 *   h = silu(gate) * up,  silu(z) = z / (1 + exp(-z)),  s = 1 / (1 + exp(-gate))
 *   silu'(z) = s + z s (1 - s):  dgate = dh * up * s * (1 + gate * (1 - s)),  dup = dh * gate * s
 *
 * Bytes, with e those of an activation: forward 3 e n, backward 5 e n. Flops: forward about 20 n, backward
 * about 28 n, most of them in the exponential and the division, so 2 to 4 a byte: bound by memory.
 *
 * Geometry: a thread takes one 16-byte piece of each array, all its loads under way together: 32 (backward
 * 48) bytes a thread, 64 KiB and more a multiprocessor. Unaligned arrays go element by element.
 *
 * Determinism: elementwise; the same operations whatever the path. A thread reads all that it overwrites
 * first, so the outputs may be the inputs.
 *
 * Ladder (H200, bf16, commit f74fb33; an empty kernel measures 3 us)
 *   v1  this; expected: the card's copy bandwidth from a few MB on. Measured, 2048 x 8192: forward 29 us (81 % of a copy),
 *       backward 44 us (89 %).
 *       The two projections that feed gate and up would have to be one product for the forward pass to become its epilogue */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"

enum { SWIGLU_THREADS = 256 };

template <class T>
__global__ void swiglu_forward_kernel(const T *gate, const T *up, T *h, int64_t n, bool aligned) {
  enum { N = ks_piece<T>::N };
  const int64_t at = ((int64_t)blockIdx.x * SWIGLU_THREADS + threadIdx.x) * N;
  if (at >= n) return;
  const ks_piece<T> gate_piece = ks_piece_load(gate + at, n - at, aligned),
                    up_piece = ks_piece_load(up + at, n - at, aligned);
  float z[N], u[N];
  ks_piece_unpack(z, gate_piece);
  ks_piece_unpack(u, up_piece);
#pragma unroll
  for (int i = 0; i < N; i++)
    z[i] = z[i] / (1.0f + expf(-z[i])) * u[i];
  ks_piece_store(h + at, ks_piece_pack<T>(z), n - at, aligned);
}

template <class T>
__global__ void swiglu_backward_kernel(const T *gate, const T *up, const T *dh, T *dgate, T *dup, int64_t n,
                                       bool aligned) {
  enum { N = ks_piece<T>::N };
  const int64_t at = ((int64_t)blockIdx.x * SWIGLU_THREADS + threadIdx.x) * N;
  if (at >= n) return;
  const ks_piece<T> gate_piece = ks_piece_load(gate + at, n - at, aligned),
                    up_piece = ks_piece_load(up + at, n - at, aligned),
                    dh_piece = ks_piece_load(dh + at, n - at, aligned);
  float z[N], u[N], d[N];
  ks_piece_unpack(z, gate_piece);
  ks_piece_unpack(u, up_piece);
  ks_piece_unpack(d, dh_piece);
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float s = 1.0f / (1.0f + expf(-z[i]));
    u[i] = d[i] * u[i] * (s * fmaf(z[i], 1.0f - s, 1.0f));
    d[i] *= z[i] * s;
  }
  ks_piece_store(dgate + at, ks_piece_pack<T>(u), n - at, aligned);
  ks_piece_store(dup + at, ks_piece_pack<T>(d), n - at, aligned);
}

template <class T> static unsigned swiglu_blocks(int64_t n) {
  return ks_blocks_for(n, (int64_t)SWIGLU_THREADS * ks_piece<T>::N);
}

template <class T> static ks_status swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  const bool aligned = ks_is_aligned_16(a->gate) && ks_is_aligned_16(a->up) && ks_is_aligned_16(a->h);
  return ks_launch(ctx, "swiglu_forward", swiglu_forward_kernel<T>, dim3(swiglu_blocks<T>(a->n)),
                   dim3(SWIGLU_THREADS), 0, (const T *)a->gate, (const T *)a->up, (T *)a->h, a->n, aligned);
}

template <class T> static ks_status swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a) {
  const bool aligned = ks_is_aligned_16(a->gate) && ks_is_aligned_16(a->up) && ks_is_aligned_16(a->dh) &&
                       ks_is_aligned_16(a->dgate) && ks_is_aligned_16(a->dup);
  return ks_launch(ctx, "swiglu_backward", swiglu_backward_kernel<T>, dim3(swiglu_blocks<T>(a->n)),
                   dim3(SWIGLU_THREADS), 0, (const T *)a->gate, (const T *)a->up, (const T *)a->dh,
                   (T *)a->dgate, (T *)a->dup, a->n, aligned);
}

extern "C" ks_status ks_cuda_swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  return KS_CUDA_BY_ACT(ctx, swiglu_forward, (ctx, a));
}
extern "C" ks_status ks_cuda_swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a) {
  return KS_CUDA_BY_ACT(ctx, swiglu_backward, (ctx, a));
}
