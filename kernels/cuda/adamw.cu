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
 * Bytes, n the parameters of all adapters: 32 n are necessary (16 n read, 16 n written); 4 n more where L2 does not hold the
 * gradients from the norm to the update. Flops: 16 n, of them a root and two divisions: some 55 instructions
 * a parameter, of the 250 that its bytes leave time for; the sum of squares takes 2 n double operations,
 * which cards with double at 1 : 64 hide behind the 4 n bytes down to 4 bytes a clock and multiprocessor.
 * Bound by memory.
 *
 * Geometry: adapters follow one another in groups whose gradients fill half of L2 (one adapter at least), and a launch more than
 * there are groups: each updates one group and adds up the squares of the next, its blocks evenly mixed, so
 * that one kind of block fills what the other leaves. Updates go from the last chunk of a group to the first,
 * which is the longest in L2; what nothing reads again (all but the gradients on their first way) is loaded
 * and stored as the first to leave it. Small adapters: two launches for all. A chunk is 4096 parameters of
 * one adapter, counted from its own beginning; a block of 256 threads takes one and finds its adapter by
 * bisection in the staged table. The last chunk of an adapter's squares to be done, by a counter, makes its
 * norm. 61 registers: 4 blocks, 64 KiB of loads under way a multiprocessor (64 bytes a thread, all before the
 * first use). Learning rates, steps and addresses are in the table, not in the launches: a recorded step
 * stays valid. The counters are staged with the table, as zeros, and left as zeros.
 *
 * Determinism: the sum of squares has one order that depends on n alone: 16 elements a thread in rising
 * order, a tree over the block, chunks 256 apart in rising order, a tree over the block; double throughout. The
 * rest is elementwise. Alignment changes nothing.
 *
 * Ladder (H200; share of a copy's 4.25 TB/s, 32 n bytes)
 *   considered  three launches an adapter: launch-bound for the 10^5 parameters of a small adapter
 *   considered  one launch, whose updates wait for the norm on a flag in memory: no launches between groups,
 *               but a grid that spins
 *   v1  squares, norms, updates, each of all adapters in a launch: 36 n bytes. 8 adapters of 5.6 M: 427 us, 80 %, 3.8 TB/s moved
 *       (89 %); one of 5.6 M: 73 us, 58 %
 *   v2  this. Computed: 8 adapters of 5.6 M (gradients of 22 MB, a group each): 32 n bytes at 92 % of a copy
 *       and 8 launches' ends of 2 us, 385 us, 88 %; 16 of 2 M: 89 %; 12 M each (48 MB of gradient: half of
 *       them read twice) 84 %; one of 5.6 M: 60 us, 71 %, its squares cannot hide. Not measured yet */
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

/* An adapter of no parameters has a chunk too, which makes its norm. */
KS_HOST_DEVICE int64_t adamw_chunks(int64_t n) {
  return n > ADAMW_CHUNK ? (n + ADAMW_CHUNK - 1) / ADAMW_CHUNK : 1;
}

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

/* Where the blocks of a launch find and leave things; no padding. */
typedef struct {
  const adamw_task *tasks;
  uint32_t *n_done; /* [n_tasks]: chunks whose squares are there; zeros before and after */
  double *partial;  /* [n_chunks]: their sums */
  double *norm;     /* [n_tasks] */
  float *clip;      /* [n_tasks]: c, or NaN where the norm is not finite */
  int64_t n_tasks;
} adamw_arrays;

/* Chunks [begin, begin + n) of all. */
typedef struct {
  int64_t begin, n;
} adamw_stretch;

/* By the block that was last to add up a chunk of this task. */
KS_DEVICE void adamw_norm(const adamw_arrays &a, const adamw_task *t, double *room) {
  const int64_t n_chunks = adamw_chunks(t->n), task = t - a.tasks;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n_chunks; i += ADAMW_THREADS)
    sum += __ldcg(&a.partial[t->first_chunk + i]);
  sum = sqrt(ks_block_sum(sum, room));
  if (threadIdx.x > 0) return;
  a.norm[task] = sum;
  a.clip[task] = !(sum < INFINITY)      ? NAN
                 : t->max_grad_norm > 0 ? (float)fmin(1.0, t->max_grad_norm / (sum + 1e-6))
                                        : 1.0f;
}

KS_DEVICE void adamw_squares(const adamw_arrays &a, int64_t chunk, double *room) {
  enum { N = ks_piece<float>::N };
  const adamw_task *t = adamw_find(a.tasks, a.n_tasks, chunk);
  const int64_t begin = (chunk - t->first_chunk) * ADAMW_CHUNK;
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
  if (threadIdx.x == 0) a.partial[chunk] = sum;
  if (ks_is_last_block(&a.n_done[t - a.tasks], (uint32_t)adamw_chunks(t->n))) adamw_norm(a, t, room);
}

KS_DEVICE void adamw_at(const adamw_task *t, float clip, float *p, float *m, float *v, float g) {
  g = __fmul_rn(g, clip);
  *m = fmaf(g - *m, t->one_minus_b1, *m);
  *v = fmaf(__fmul_rn(g, t->one_minus_b2), g, __fmul_rn(*v, t->b2));
  const float step = *m / __fadd_rn(sqrtf(*v) / t->root, t->eps);
  *p = __fsub_rn(__fmul_rn(*p, t->decay), __fmul_rn(step, t->step_size));
}

/* Four parameters or moments. Nothing reads them again soon: whole ones leave L2 before the gradients do. */
KS_DEVICE void adamw_load(float x[4], const float *p, int n_left, bool whole) {
  if (whole) {
    const float4 v = __ldcs((const float4 *)p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    ks_piece_unpack(x, ks_piece_load_part(p, n_left));
  }
}
KS_DEVICE void adamw_store(float *p, const float x[4], int n_left, bool whole) {
  if (whole)
    __stcs((float4 *)p, make_float4(x[0], x[1], x[2], x[3]));
  else
    ks_piece_store(p, ks_piece_pack<float>(x), n_left, false);
}

/* Four of them; WHOLE: all are there, and aligned. */
template <bool WHOLE> KS_DEVICE void adamw_four(const adamw_task &t, float clip, int64_t at, int n_left) {
  enum { N = 4 };
  const float zero[N] = {0, 0, 0, 0};
  float p[N], m[N], v[N], g[N];
  adamw_load(p, t.p + at, n_left, WHOLE);
  adamw_load(m, t.m + at, n_left, WHOLE);
  adamw_load(v, t.v + at, n_left, WHOLE);
  adamw_load(g, t.grad + at, n_left, WHOLE);
#pragma unroll
  for (int i = 0; i < N; i++)
    adamw_at(&t, clip, &p[i], &m[i], &v[i], g[i]);
  adamw_store(t.p + at, p, n_left, WHOLE);
  adamw_store(t.m + at, m, n_left, WHOLE);
  adamw_store(t.v + at, v, n_left, WHOLE);
  adamw_store(t.grad + at, zero, n_left, WHOLE);
}

KS_DEVICE void adamw_update(const adamw_arrays &a, int64_t chunk) {
  enum { N = 4 };
  const adamw_task *found = adamw_find(a.tasks, a.n_tasks, chunk), t = *found;
  const float clip = a.clip[found - a.tasks];
  if (clip != clip) return;
  const int64_t begin = (chunk - t.first_chunk) * ADAMW_CHUNK;
  const int n = (int)min((int64_t)ADAMW_CHUNK, t.n - begin);
#pragma unroll 1
  for (int j = (int)threadIdx.x * N; j < n; j += ADAMW_THREADS * N)
    if (t.aligned && n - j >= N)
      adamw_four<true>(t, clip, begin + j, N);
    else
      adamw_four<false>(t, clip, begin + j, n - j);
}

/* A block a chunk: updates of one stretch, last chunk first, evenly among the squares of the next. */
__global__ void __launch_bounds__(ADAMW_THREADS, 4)
    adamw_kernel(const adamw_arrays a, const adamw_stretch update, const adamw_stretch squares) {
  ks_smem smem;
  double *room = ks_smem_take<double>(&smem, KS_WARP);
  const int64_t n = update.n + squares.n, n_before = blockIdx.x * update.n / n;
  if ((blockIdx.x + 1) * update.n / n > n_before)
    adamw_update(a, update.begin + (update.n - 1 - n_before));
  else
    adamw_squares(a, squares.begin + (blockIdx.x - n_before), room);
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

/* The next adapters whose gradients L2 holds until they are read again, one at least: their chunks. */
static adamw_stretch adamw_group(const ks_adamw_args *a, int64_t *job, int64_t begin, int64_t most_bytes) {
  adamw_stretch s = {begin, 0};
  int64_t n = 0;
  do {
    n += a->jobs[*job].n;
    s.n += adamw_chunks(a->jobs[*job].n);
    (*job)++;
  } while (*job < a->n_jobs && a->jobs[*job].n <= most_bytes / (int64_t)sizeof(float) - n);
  return s;
}

static ks_status adamw_launches(ks_ctx *ctx, const ks_adamw_args *a, const adamw_arrays *arrays) {
  const int64_t most_bytes = ks_cuda_device_of(ctx)->l2_bytes / 2;
  adamw_stretch update = {0, 0}, squares;
  for (int64_t job = 0; job < a->n_jobs || update.n > 0; update = squares) {
    squares = {0, 0};
    if (job < a->n_jobs) squares = adamw_group(a, &job, update.begin + update.n, most_bytes);
    KS_TRY(ks_launch(ctx, "adamw", adamw_kernel, dim3(ks_blocks_for(update.n + squares.n, 1)),
                     dim3(ADAMW_THREADS), ks_smem_bytes<double>(KS_WARP), *arrays, update, squares));
  }
  return KS_OK;
}

/* The table of adapters, and behind it their counters, as zeros. */
static ks_status adamw_stage(ks_ctx *ctx, const ks_adamw_args *a, adamw_arrays *arrays, int64_t *n_chunks) {
  const size_t n = (size_t)a->n_jobs, bytes = n * (sizeof(adamw_task) + sizeof(uint32_t));
  char *host;
  const void *device;
  KS_TRY(ks_alloc_array(&host, bytes, 1, "adamw: table of adapters"));
  *n_chunks = 0;
  for (int64_t i = 0; i < a->n_jobs; i++) {
    const adamw_task t = adamw_task_of(&a->jobs[i], *n_chunks);
    memcpy(host + (size_t)i * sizeof t, &t, sizeof t);
    *n_chunks += adamw_chunks(t.n);
  }
  const ks_status status = ks_cuda_stage(ctx, host, bytes, &device);
  free(host);
  arrays->tasks = (const adamw_task *)device;
  arrays->n_done = (uint32_t *)((uintptr_t)device + n * sizeof(adamw_task));
  arrays->n_tasks = a->n_jobs;
  return status;
}

extern "C" ks_status ks_cuda_adamw(ks_ctx *ctx, const ks_adamw_args *a) {
  adamw_arrays arrays;
  int64_t n_chunks;
  const size_t n = (size_t)a->n_jobs;
  KS_TRY(adamw_stage(ctx, a, &arrays, &n_chunks));
  KS_TRY(ks_cuda_workspace(ctx, (n + (size_t)n_chunks) * sizeof(double) + n * sizeof(float),
                           (void **)&arrays.norm));
  arrays.partial = arrays.norm + n;
  arrays.clip = (float *)(arrays.partial + n_chunks);
  KS_TRY(adamw_launches(ctx, a, &arrays));
  return ks_cuda_deliver(ctx, a->norm, arrays.norm, n * sizeof *arrays.norm);
}
