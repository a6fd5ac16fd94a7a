/* Every operation of the CPU backend for one instruction set. Compiled several times: kernels/kernels.cmake.
 */
#include "kernels/cpu/cpu.h"

#include "kernels/cpu/adamw.c"
#include "kernels/cpu/attention.c"
#include "kernels/cpu/attention_back.c"
#include "kernels/cpu/entropy.c"
#include "kernels/cpu/head_loss.c"
#include "kernels/cpu/linear.c"
#include "kernels/cpu/norm.c"
#include "kernels/cpu/pool.c"
#include "kernels/cpu/rope.c"
#include "kernels/cpu/rows.c"
#include "kernels/cpu/sample.c"
#include "kernels/cpu/similarity.c"
#include "kernels/cpu/swiglu.c"
#include "kernels/cpu/weight.c"

#define KS_ISA_CAT2(a, b) a##b
#define KS_ISA_CAT(a, b)  KS_ISA_CAT2(a, b)
#define KS_ISA_TABLE      KS_ISA_CAT(ks_cpu_, KS_ISA)

extern const ks_backend KS_ISA_TABLE;
const ks_backend KS_ISA_TABLE = {
    .name = "cpu",
    .what = "portable C with vector instructions and OpenMP",
    .probe = ks_cpu_probe,
    .ctx_init = ks_cpu_ctx_init,
    .ctx_exit = ks_cpu_ctx_exit,
    .mem_alloc = ks_cpu_mem_alloc,
    .mem_free = ks_cpu_mem_free,
    .mem_upload = ks_cpu_mem_copy_in,
    .mem_download = ks_cpu_mem_copy_in,
    .mem_zero = ks_cpu_mem_zero,
    .mem_copy = ks_cpu_mem_copy_in,
    .weight_create = weight_create,
    .weight_destroy = weight_destroy,
    .weight_prepare_backward = weight_prepare_backward,
    .head_loss_workspace = head_loss_workspace,
    .embed_forward = embed_forward,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .rows_gather = rows_gather,
    .rows_scatter = rows_scatter,
    .head_loss = head_loss,
    .rmsnorm_forward = rmsnorm_forward,
    .rmsnorm_backward = rmsnorm_backward,
    .rope = rope,
    .swiglu_forward = swiglu_forward,
    .swiglu_backward = swiglu_backward,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .sample = sample,
    .adamw = adamw,
    .pool = pool,
    .entropy = entropy,
    .similarity = similarity,
    .similarity_top = similarity_top,
    .similarity_mean = similarity_mean,
    .similarity_farthest_first = similarity_farthest_first,
};
