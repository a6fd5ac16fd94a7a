/* Similarities of bf16 and I8 rows on tensor cores (similarity.cu). I8 is exact in bf16. Types and
 * launches of few, mid and big; the kernel is in similarity_kernel.cuh; bytes, flops, predicted times (256 x
 * 2048 for mid) and ladder (v1) are in similarity.cu. */
#include "kernels/cuda/similarity_kernel.cuh"

/* Keys by queries 64 x 8, 128 x 32, 128 x 128; NORMS: computes those that were not prepared. */
struct sim_few : product_mma<4, 1, 1, 1, 6> {
  enum { SHAPE = SIM_FEW, NORMS = 1, BLOCKS = 4, BLOCKS_ANY = 3 };
};
struct sim_mid : product_mma<8, 1, 1, 4, 3> {
  enum { SHAPE = SIM_MID, NORMS = 1, BLOCKS = 2, BLOCKS_ANY = 1 };
};
struct sim_big : product_mma<2, 4, 4, 4, 2> {
  enum { SHAPE = SIM_BIG, NORMS = 0, BLOCKS = 2, BLOCKS_ANY = 1 };
};

ks_status sim_launch_mma(ks_ctx *ctx, const char *op, sim_shape shape, bool is_any, const sim_job *j) {
  if (shape == SIM_BIG)
    return is_any ? sim_launch_as<sim_big, false, true>(ctx, op, j)
                  : sim_launch_as<sim_big, false, false>(ctx, op, j);
  if (shape == SIM_MID)
    return is_any ? sim_launch_as<sim_mid, true, true>(ctx, op, j)
                  : sim_launch_as<sim_mid, false, false>(ctx, op, j);
  return is_any ? sim_launch_as<sim_few, true, true>(ctx, op, j)
                : sim_launch_as<sim_few, false, false>(ctx, op, j);
}
