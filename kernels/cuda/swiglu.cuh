/* The sigmoid of SwiGLU, for swiglu.cu and for products that end in it. */
#ifndef KS_CUDA_SWIGLU_CUH
#define KS_CUDA_SWIGLU_CUH

#include "kernels/cuda/row.cuh"

/* s = 1 / (1 + exp(-z)) and 1 - s. */
typedef struct {
  float s, rest;
} swiglu_sigmoid;

template <class T> KS_DEVICE swiglu_sigmoid swiglu_sigmoid_of(float z);
template <> KS_DEVICE swiglu_sigmoid swiglu_sigmoid_of<float>(float z) {
  const float s = 1.0f / (1.0f + expf(-z));
  return {s, 1.0f - s};
}
/* Far below what bf16 shows: two instructions of approximation, no slow paths. e = exp(-|z|) lies in [0, 1], so that nothing
 * overflows; it may be below the normal range, which the instruction would make 0. */
template <> KS_DEVICE swiglu_sigmoid swiglu_sigmoid_of<ks_bf16>(float z) {
  const float t = fabsf(z) * -1.4426950408889634f;
  const bool tiny = t < -126.0f;
  float e = ks_exp2(tiny ? t + 64.0f : t);
  if (tiny) e *= 0x1p-64f;
  const float r = ks_quick_reciprocal(1.0f + e), er = e * r;
  return z < 0.0f ? swiglu_sigmoid{er, r} : swiglu_sigmoid{r, er};
}

#endif
