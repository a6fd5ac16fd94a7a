/* A kernel with one mistake at a time (planted.cu), and the list of them. */
#ifndef KS_TEST_PLANTED_H
#define KS_TEST_PLANTED_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PLANTED_MAP(X)                                                                                       \
  X(NOTHING)                                                                                                 \
  /* seen by AddressSanitizer or UBSan: the program ends */                                                  \
  X(WRITE_PAST_GLOBAL)                                                                                       \
  X(READ_PAST_GLOBAL)                                                                                        \
  X(READ_BEFORE_GLOBAL)                                                                                      \
  X(COPY_PAST_GLOBAL)                                                                                        \
  X(WRITE_PAST_SHARED)                                                                                       \
  X(READ_PAST_SHARED)                                                                                        \
  X(SHARED_OF_ANOTHER_BLOCK)                                                                                 \
  X(MISALIGNED_VECTOR)                                                                                       \
  X(ENDLESS_RECURSION)                                                                                       \
  /* seen by the shim: the launch fails */                                                                   \
  X(BARRIER_IN_A_BRANCH)                                                                                     \
  X(OTHER_BARRIER_IN_A_BRANCH)                                                                               \
  X(COLLECTIVE_IN_A_BRANCH)                                                                                  \
  X(OTHER_COLLECTIVE_IN_A_BRANCH)                                                                            \
  X(RETURN_BEFORE_COLLECTIVE)                                                                                \
  X(PARTIAL_MASK)                                                                                            \
  X(MISALIGNED_COPY)                                                                                         \
  X(MORE_SHARED_THAN_LAUNCHED)                                                                               \
  X(SHARED_OF_UNEQUAL_SIZE)                                                                                  \
  X(HOST_POINTER)                                                                                            \
  /* seen in the results: NaN, or other bits in another order of the threads */                              \
  X(NO_BLOCK_BARRIER)                                                                                        \
  X(NO_WARP_BARRIER)                                                                                         \
  X(NO_COPY_WAIT)                                                                                            \
  X(NO_COPY_COMMIT)                                                                                          \
  X(WRONG_INDEX)                                                                                             \
  X(UNWRITTEN_SHARED)                                                                                        \
  X(BLOCKS_WRITE_THE_SAME)                                                                                   \
  X(WARPS_ADD_IN_TURN)
typedef enum {
#define X(name) PLANTED_##name,
  PLANTED_MAP(X)
#undef X
      PLANTED_N
} planted_bug;

enum { PLANTED_BLOCK = 64 };
/* y[i] = x[m] - 2 x[m ^ 1], m = i's mirror image in its PLANTED_BLOCK elements; n a multiple of
 * PLANTED_BLOCK. */
ks_status planted_run(ks_ctx *ctx, planted_bug bug, const float *x, float *y, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
