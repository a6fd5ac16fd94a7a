/* SwiGLU, forward and backward.
 *
 *   h = silu(gate) * up,  silu(z) = z / (1 + exp(-z)),  s = 1 / (1 + exp(-gate))
 *   silu'(z) = s + z s (1 - s):  dgate = dh * up * s * (1 + gate * (1 - s)),  dup = dh * gate * s
 *
 * Bytes, with e those of an activation: forward 3 e n, backward 5 e n. Instructions of bf16 (sm_90, from the
 * machine code): 17.5 an element forward, 26 backward, two of them on the slow unit: a third of what the
 * bytes leave time for. Bound by memory.
 *
 * Geometry: a thread takes two 16-byte pieces of each array, one while there are not enough to fill the device; all its loads are
 * under way before the first use: 64 (backward 96) bytes a thread, 4 blocks of 256 threads, 64 (96) KiB a multiprocessor; 51 (62)
 * registers. Arrays at odd addresses or of odd length go element by element, in a kernel of their own.
 *
 * Determinism: elementwise; the same operations whatever the path. A thread reads all that it overwrites
 * first, so the outputs may be the inputs.
 *
 * Ladder (H200, bf16; an empty kernel measures 3 us; shares of a copy's 4.25 TB/s)
 *   v1  expf and a division as float32 has them, one piece a thread: 31 and more instructions an element, 15
 *       of 26 us at 2048 x 8192. Forward 29 us (81 %), backward 44 us (89 %); one row 1.7 us in a recorded
 *       step
 *   v2  this: one approximate exponential and one reciprocal where activations are bf16 (swiglu.cuh).
 *       Computed, 2048 x 8192: forward 27.5 us (86 %; 3 of them the launch), backward 43 us (92 %); at 16384
 *       rows 93 %. Not measured yet
 *   The two projections that feed gate and up would have to be one product for the forward pass to become its
 *       epilogue */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/swiglu.cuh"

enum { SWIGLU_THREADS = 256, SWIGLU_MANY = 2 };

/* First of this thread's ITEMS pieces, SWIGLU_THREADS pieces apart. */
template <class T, int ITEMS> KS_DEVICE int64_t swiglu_at() {
  return ((int64_t)blockIdx.x * (SWIGLU_THREADS * ITEMS) + threadIdx.x) * ks_piece<T>::N;
}

template <class T, int ITEMS, bool WHOLE>
__global__ void __launch_bounds__(SWIGLU_THREADS, 4)
    swiglu_forward_kernel(const T *gate, const T *up, T *h, int64_t n) {
  enum { N = ks_piece<T>::N, STEP = SWIGLU_THREADS * N };
  const int64_t at = swiglu_at<T, ITEMS>();
  ks_grid_wait();
  ks_grid_start_next();
  ks_piece<T> gates[ITEMS], ups[ITEMS];
  ks_pieces_load<ITEMS, WHOLE>(gates, gate, at, STEP, n);
  ks_pieces_load<ITEMS, WHOLE>(ups, up, at, STEP, n);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const int64_t j = at + k * STEP;
    float z[N], u[N];
    ks_piece_unpack(z, gates[k]);
    ks_piece_unpack(u, ups[k]);
#pragma unroll
    for (int i = 0; i < N; i++)
      z[i] = z[i] * swiglu_sigmoid_of<T>(z[i]).s * u[i];
    ks_piece_put<WHOLE>(h, ks_piece_pack<T>(z), j, n);
  }
}

template <class T, int ITEMS, bool WHOLE>
__global__ void __launch_bounds__(SWIGLU_THREADS, 4)
    swiglu_backward_kernel(const T *gate, const T *up, const T *dh, T *dgate, T *dup, int64_t n) {
  enum { N = ks_piece<T>::N, STEP = SWIGLU_THREADS * N };
  const int64_t at = swiglu_at<T, ITEMS>();
  ks_grid_wait();
  ks_grid_start_next();
  ks_piece<T> gates[ITEMS], ups[ITEMS], dhs[ITEMS];
  ks_pieces_load<ITEMS, WHOLE>(gates, gate, at, STEP, n);
  ks_pieces_load<ITEMS, WHOLE>(ups, up, at, STEP, n);
  ks_pieces_load<ITEMS, WHOLE>(dhs, dh, at, STEP, n);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const int64_t j = at + k * STEP;
    float z[N], u[N], d[N];
    ks_piece_unpack(z, gates[k]);
    ks_piece_unpack(u, ups[k]);
    ks_piece_unpack(d, dhs[k]);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const swiglu_sigmoid g = swiglu_sigmoid_of<T>(z[i]);
      u[i] = d[i] * u[i] * (g.s * fmaf(z[i], g.rest, 1.0f));
      d[i] *= z[i] * g.s;
    }
    ks_piece_put<WHOLE>(dgate, ks_piece_pack<T>(u), j, n);
    ks_piece_put<WHOLE>(dup, ks_piece_pack<T>(d), j, n);
  }
}

/* By what a thread takes: several pieces once every multiprocessor is full of threads with one; what lies at odd addresses
 * goes element by element. */
template <class T> struct swiglu_kernels {
  int items;
  void (*forward)(const T *, const T *, T *, int64_t);
  void (*backward)(const T *, const T *, const T *, T *, T *, int64_t);
};
template <class T> static const swiglu_kernels<T> *swiglu_choose(ks_ctx *ctx, int64_t n, bool aligned) {
#define SWIGLU_KERNELS(items, whole)                                                                         \
  { items, swiglu_forward_kernel<T, items, whole>, swiglu_backward_kernel<T, items, whole> }
  static const swiglu_kernels<T> odd = SWIGLU_KERNELS(1, false), few = SWIGLU_KERNELS(1, true),
                                 many = SWIGLU_KERNELS(SWIGLU_MANY, true);
#undef SWIGLU_KERNELS
  if (!aligned || n % ks_piece<T>::N != 0) return &odd;
  return n >= (int64_t)2048 * ks_piece<T>::N * ks_cuda_device_of(ctx)->n_sm ? &many : &few;
}
template <class T> static dim3 swiglu_blocks(int64_t n, int items) {
  return dim3(ks_blocks_for(n, (int64_t)SWIGLU_THREADS * items * ks_piece<T>::N));
}

template <class T> static ks_status swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  const swiglu_kernels<T> *k = swiglu_choose<T>(
      ctx, a->n, ks_is_aligned_16(a->gate) && ks_is_aligned_16(a->up) && ks_is_aligned_16(a->h));
  return ks_launch_early(ctx, "swiglu_forward", k->forward, swiglu_blocks<T>(a->n, k->items),
                         dim3(SWIGLU_THREADS), 0, (const T *)a->gate, (const T *)a->up, (T *)a->h, a->n);
}

template <class T> static ks_status swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a) {
  const swiglu_kernels<T> *k =
      swiglu_choose<T>(ctx, a->n,
                       ks_is_aligned_16(a->gate) && ks_is_aligned_16(a->up) && ks_is_aligned_16(a->dh) &&
                           ks_is_aligned_16(a->dgate) && ks_is_aligned_16(a->dup));
  return ks_launch_early(ctx, "swiglu_backward", k->backward, swiglu_blocks<T>(a->n, k->items),
                         dim3(SWIGLU_THREADS), 0, (const T *)a->gate, (const T *)a->up, (const T *)a->dh,
                         (T *)a->dgate, (T *)a->dup, a->n);
}

extern "C" ks_status ks_cuda_swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  return KS_CUDA_BY_ACT(ctx, swiglu_forward, (ctx, a));
}
extern "C" ks_status ks_cuda_swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a) {
  return KS_CUDA_BY_ACT(ctx, swiglu_backward, (ctx, a));
}
