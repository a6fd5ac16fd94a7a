/* Norms, clipping and AdamW of many adapters.
 *
 *   norm = sqrt(sum grad^2);  c = min(1, max_grad_norm / (norm + 1e-6));  g = grad * c
 *   m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
 *   p = p * (1 - lr wd) - lr / (1 - b1^step) * (m / (sqrt(v) / sqrt(1 - b2^step) + eps));  grad = 0
 *
 * in the order of operations of torch.optim.AdamW and of the CPU backend. The factors are computed in double
 * on the host and rounded once, c in double on the device; all else is float32. Products are kept apart from
 * the sums behind them (no contraction to fma but where written), so that only c can differ from the CPU's
 * bits.
 *
 * Bytes: 36 n (4 n for the norms; then 16 n read, 16 n written), n the parameters of all adapters. Flops: 16
 * n, of them a root and two divisions; the sum of squares takes 2 n double operations, which cards with
 * double at 1 : 64 hide behind the 4 n bytes down to 4 bytes a clock and multiprocessor. Bound by memory.
 *
 * Geometry: three launches for any number of adapters. Each adapter is cut into chunks of 4096 parameters,
 * counted from its own beginning; a block of 256 threads takes one chunk and finds its adapter by bisection
 * in the staged table.
 *   squares   a partial sum a chunk
 *   norms     a warp an adapter adds its partial sums
 *   update    parameters, moments and gradient in one pass, 64 bytes under way a thread
 * Learning rates, steps and addresses are in the table, not in the launches: a recorded step stays valid.
 *
 * Determinism: the sum of squares has one order that depends on n alone: 16 elements a thread in rising
 * order, a tree over the block, chunks 32 apart in rising order, a tree over the warp; double throughout. The
 * rest is elementwise. Alignment changes nothing.
 *
 * Ladder (times: not measured yet)
 *   considered  three launches an adapter: launch-bound for the 10^5 parameters of a small adapter
 *   v1          this; expected: the card's copy bandwidth from 10^6 parameters in all on, launch time below */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"

enum { ADAMW_THREADS = 256, ADAMW_CHUNK = 4096 };

/* One adapter, as the device reads it. */
typedef struct {
  float *p, *m, *v, *grad;
  int64_t n, first_chunk;
  double max_grad_norm;
  float decay, one_minus_b1, b2, one_minus_b2, step_size, root, eps;
  uint32_t aligned; /* all four arrays to 16 bytes */
} adamw_task;

/* The task that holds chunk `chunk`: the last whose first chunk is not after it. */
KS_DEVICE const adamw_task *adamw_find(const adamw_task *tasks, int64_t n_tasks, int64_t chunk) {
  int64_t low = 0, high = n_tasks;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (tasks[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle;
  }
  return tasks + low;
}

__global__ void adamw_squares_kernel(const adamw_task *tasks, int64_t n_tasks, double *partial) {
  enum { N = ks_piece<float>::N };
  ks_smem smem;
  double *room = ks_smem_take<double>(&smem, KS_WARP);
  const adamw_task *t = adamw_find(tasks, n_tasks, blockIdx.x);
  const int64_t begin = (blockIdx.x - t->first_chunk) * ADAMW_CHUNK;
  const int n = (int)min((int64_t)ADAMW_CHUNK, t->n - begin);
  const float *grad = t->grad + begin;
  const bool aligned = ks_is_aligned_16(grad);
  ks_piece<float> held[ADAMW_CHUNK / ADAMW_THREADS / N];
#pragma unroll
  for (int k = 0; k < ADAMW_CHUNK / ADAMW_THREADS / N; k++) {
    const int j = (k * ADAMW_THREADS + (int)threadIdx.x) * N;
    held[k] = ks_piece_load(grad + j, n - j, aligned);
  }
  double sum = 0;
#pragma unroll
  for (int k = 0; k < ADAMW_CHUNK / ADAMW_THREADS / N; k++) {
    float g[N];
    ks_piece_unpack(g, held[k]);
#pragma unroll
    for (int i = 0; i < N; i++)
      sum = fma((double)g[i], (double)g[i], sum);
  }
  sum = ks_block_sum(sum, room);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/* clip: c, or NaN where the norm is not finite. */
__global__ void adamw_norms_kernel(const adamw_task *tasks, int64_t n_tasks, const double *partial,
                                   double *norm, float *clip) {
  const int64_t task = (int64_t)blockIdx.x * (ADAMW_THREADS / KS_WARP) + (int)threadIdx.x / KS_WARP;
  const int lane = (int)threadIdx.x % KS_WARP;
  const adamw_task *t = tasks + (task < n_tasks ? task : n_tasks - 1);
  const int64_t n_chunks = (t->n + ADAMW_CHUNK - 1) / ADAMW_CHUNK;
  double sum = 0;
  for (int64_t i = lane; i < n_chunks; i += KS_WARP)
    sum += partial[t->first_chunk + i];
  sum = sqrt(ks_warp_sum(sum));
  if (lane > 0 || task >= n_tasks) return;
  norm[task] = sum;
  clip[task] = !(sum < INFINITY)      ? NAN
               : t->max_grad_norm > 0 ? (float)fmin(1.0, t->max_grad_norm / (sum + 1e-6))
                                      : 1.0f;
}

KS_DEVICE void adamw_at(const adamw_task *t, float clip, float *p, float *m, float *v, float g) {
  g = __fmul_rn(g, clip);
  *m = fmaf(g - *m, t->one_minus_b1, *m);
  *v = fmaf(__fmul_rn(g, t->one_minus_b2), g, __fmul_rn(*v, t->b2));
  const float step = *m / __fadd_rn(sqrtf(*v) / t->root, t->eps);
  *p = __fsub_rn(__fmul_rn(*p, t->decay), __fmul_rn(step, t->step_size));
}

__global__ void adamw_update_kernel(const adamw_task *tasks, int64_t n_tasks, const float *clips) {
  enum { N = ks_piece<float>::N };
  const adamw_task *found = adamw_find(tasks, n_tasks, blockIdx.x), t = *found;
  const float clip = clips[found - tasks];
  if (clip != clip) return;
  const int64_t begin = (blockIdx.x - t.first_chunk) * ADAMW_CHUNK;
  const int n = (int)min((int64_t)ADAMW_CHUNK, t.n - begin);
  for (int j = (int)threadIdx.x * N; j < n; j += ADAMW_THREADS * N) {
    const int64_t at = begin + j;
    const ks_piece<float> pieces[4] = {
        ks_piece_load(t.p + at, n - j, t.aligned), ks_piece_load(t.m + at, n - j, t.aligned),
        ks_piece_load(t.v + at, n - j, t.aligned), ks_piece_load(t.grad + at, n - j, t.aligned)};
    const float zero[N] = {0, 0, 0, 0};
    float p[N], m[N], v[N], g[N];
    ks_piece_unpack(p, pieces[0]);
    ks_piece_unpack(m, pieces[1]);
    ks_piece_unpack(v, pieces[2]);
    ks_piece_unpack(g, pieces[3]);
#pragma unroll
    for (int i = 0; i < N; i++)
      adamw_at(&t, clip, &p[i], &m[i], &v[i], g[i]);
    ks_piece_store(t.p + at, ks_piece_pack<float>(p), n - j, t.aligned);
    ks_piece_store(t.m + at, ks_piece_pack<float>(m), n - j, t.aligned);
    ks_piece_store(t.v + at, ks_piece_pack<float>(v), n - j, t.aligned);
    ks_piece_store(t.grad + at, ks_piece_pack<float>(zero), n - j, t.aligned);
  }
}

static adamw_task adamw_task_of(const ks_adamw_job *job, int64_t first_chunk) {
  const double correct1 = 1 - pow(job->beta1, (double)job->step),
               correct2 = 1 - pow(job->beta2, (double)job->step);
  adamw_task t;
  memset(&t, 0, sizeof t);
  t.p = job->p, t.m = job->m, t.v = job->v, t.grad = job->grad;
  t.n = job->n;
  t.first_chunk = first_chunk;
  t.max_grad_norm = job->max_grad_norm;
  t.decay = (float)(1 - job->lr * job->weight_decay);
  t.one_minus_b1 = (float)(1 - job->beta1);
  t.b2 = (float)job->beta2;
  t.one_minus_b2 = (float)(1 - job->beta2);
  t.step_size = (float)(job->lr / correct1);
  t.root = (float)sqrt(correct2);
  t.eps = (float)job->eps;
  t.aligned = ks_is_aligned_16(job->p) && ks_is_aligned_16(job->m) && ks_is_aligned_16(job->v) &&
              ks_is_aligned_16(job->grad);
  return t;
}

static ks_status adamw_launch(ks_ctx *ctx, const ks_adamw_args *a, const adamw_task *tasks,
                              int64_t n_chunks) {
  double *norm;
  const unsigned blocks = ks_blocks_for(n_chunks, 1);
  const size_t doubles = (size_t)(a->n_jobs + n_chunks);
  KS_TRY(
      ks_cuda_workspace(ctx, doubles * sizeof(double) + (size_t)a->n_jobs * sizeof(float), (void **)&norm));
  double *partial = norm + a->n_jobs;
  float *clip = (float *)(partial + n_chunks);
  KS_TRY(ks_launch(ctx, "adamw_squares", adamw_squares_kernel, dim3(blocks), dim3(ADAMW_THREADS),
                   ks_smem_bytes<double>(KS_WARP), tasks, a->n_jobs, partial));
  KS_TRY(ks_launch(ctx, "adamw_norms", adamw_norms_kernel,
                   dim3(ks_blocks_for(a->n_jobs, ADAMW_THREADS / KS_WARP)), dim3(ADAMW_THREADS), 0, tasks,
                   a->n_jobs, partial, norm, clip));
  KS_TRY(ks_launch(ctx, "adamw_update", adamw_update_kernel, dim3(blocks), dim3(ADAMW_THREADS), 0, tasks,
                   a->n_jobs, clip));
  return ks_cuda_deliver(ctx, a->norm, norm, (size_t)a->n_jobs * sizeof *norm);
}

extern "C" ks_status ks_cuda_adamw(ks_ctx *ctx, const ks_adamw_args *a) {
  adamw_task *host;
  const adamw_task *tasks;
  int64_t n_chunks = 0;
  KS_TRY(ks_alloc_array(&host, (size_t)a->n_jobs, sizeof *host, "adamw: table of adapters"));
  for (int64_t i = 0; i < a->n_jobs; i++) {
    host[i] = adamw_task_of(&a->jobs[i], n_chunks);
    n_chunks += (a->jobs[i].n + ADAMW_CHUNK - 1) / ADAMW_CHUNK;
  }
  const ks_status status = ks_cuda_stage(ctx, host, (size_t)a->n_jobs * sizeof *host, (const void **)&tasks);
  free(host);
  KS_TRY(status);
  return adamw_launch(ctx, a, tasks, n_chunks);
}
