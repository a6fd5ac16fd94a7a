/* Similarities of rows of any type in plain fma (similarity.cu): wherever float32 takes part, and on devices
 * without bf16 tensor cores. The kernel is in similarity_kernel.cuh; bytes, flops, norms and ladder (v2 f32:
 * one query, 0.067 ms measured before, 0.02 expected) are in similarity.cu. */
#define KS_SIMILARITY_ON_ALL 1
#include "kernels/cuda/similarity_kernel.cuh"

/* Keys by queries 64 x 8, 128 x 32, 128 x 128; NORMS: computes those that were not prepared. */
struct sim_few_f32 : product_simt_few<2, 6, 4> {
  enum { SHAPE = SIM_FEW, NORMS = 1, BLOCKS = 2, BLOCKS_ANY = 2 };
};
struct sim_mid_f32 : product_simt<8, 1, 4, 4, 3> {
  enum { SHAPE = SIM_MID, NORMS = 1, BLOCKS = 2, BLOCKS_ANY = 1 };
};
struct sim_big_f32 : product_simt<4, 2, 8, 8, 2> {
  enum { SHAPE = SIM_BIG, NORMS = 0, BLOCKS = 2, BLOCKS_ANY = 1 };
};

ks_status sim_launch_simt(ks_ctx *ctx, const char *op, sim_shape shape, bool is_any, const sim_job *j) {
  if (shape == SIM_BIG)
    return is_any ? sim_launch_as<sim_big_f32, false, true>(ctx, op, j)
                  : sim_launch_as<sim_big_f32, false, false>(ctx, op, j);
  if (shape == SIM_MID)
    return is_any ? sim_launch_as<sim_mid_f32, true, true>(ctx, op, j)
                  : sim_launch_as<sim_mid_f32, false, false>(ctx, op, j);
  return is_any ? sim_launch_as<sim_few_f32, true, true>(ctx, op, j)
                : sim_launch_as<sim_few_f32, false, false>(ctx, op, j);
}
