/* Steps: what is queued one by one, recorded and replayed as a graph gives the same bits, whatever changes
 * from step to step. */
#include "host_kernels.h"
#include "ks_shim.h"
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>

static ks_ctx *make_ctx(const char *no_graphs) {
  ks_ctx *ctx = NULL;
  setenv("KS_CUDA_NO_GRAPHS", no_graphs, 1);
  cr_assert(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cuda"}) == KS_OK, "%s", ks_error_message());
  setenv("KS_CUDA_NO_GRAPHS", "0", 1);
  return ctx;
}

static void destroy(ks_ctx *ctx) {
  host_destroy(ctx);
  cr_expect(ks_shim_memory_used() == 0 && ks_shim_pinned_used() == 0,
            "%zu bytes of device memory, %zu pinned left", ks_shim_memory_used(), ks_shim_pinned_used());
}

/* ---------------------------------------------------------------- programs */

/* A step is a list of instructions over a few arrays. */
typedef enum { AFFINE = 0, TWICE, ZERO, COPY, UPLOAD, DELIVER, MATMUL, N_KINDS } instruction_kind;
typedef struct {
  instruction_kind kind;
  int a, b;
  int64_t n;
  int value; /* of what is staged: < 0 the same in every step, shared by all that have it; else of its own and
                of the step's */
} instruction;
enum { N_ARRAYS = 5, LENGTH = 256, MAX_INSTRUCTIONS = 24, MAX_STEPS = 10, SIDE = 16 };
typedef struct {
  instruction list[MAX_INSTRUCTIONS];
  int n;
} program;

typedef struct {
  ks_ctx *ctx;
  float *arrays[N_ARRAYS];
  float late[MAX_STEPS][MAX_INSTRUCTIONS][LENGTH];
  float back[N_ARRAYS][LENGTH];
} machine;

static uint64_t state;
static int draw(int n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int)((state >> 33) % (uint64_t)n);
}

static instruction draw_instruction(void) {
  instruction i = {.kind = (instruction_kind)draw(N_KINDS),
                   .a = draw(N_ARRAYS),
                   .n = 1 + draw(LENGTH),
                   .value = draw(40) - 12};
  i.b = (i.a + 1 + draw(N_ARRAYS - 1)) % N_ARRAYS; /* copies do not overlap */
  return i;
}

static void mutate(program *p) {
  const int at = draw(p->n);
  switch (draw(4)) {
  case 0: /* another instruction */
    p->list[at] = draw_instruction();
    break;
  case 1: /* another size */
    p->list[at].n = 1 + draw(LENGTH);
    break;
  case 2: /* one more */
    if (p->n == MAX_INSTRUCTIONS) break;
    memmove(&p->list[at + 1], &p->list[at], (size_t)(p->n - at) * sizeof p->list[0]);
    p->list[at] = draw_instruction();
    p->n++;
    break;
  default: /* one less */
    if (p->n == 1) break;
    memmove(&p->list[at], &p->list[at + 1], (size_t)(p->n - at - 1) * sizeof p->list[0]);
    p->n--;
  }
}

static ks_status run_instruction(machine *m, const instruction *i, int step, int at) {
  float *a = m->arrays[i->a], *b = m->arrays[i->b], host[LENGTH];
  const float of_step = i->value < 0 ? (float)-i->value : (float)(i->value + 100 * step);
  const float p[2] = {0.5f, of_step};
  switch (i->kind) {
  case AFFINE:
    return host_affine(m->ctx, a, b, p, i->n);
  case TWICE:
    return host_affine_twice(m->ctx, a, b, p, i->n);
  case ZERO:
    return ks_mem_zero(m->ctx, a, (size_t)i->n * sizeof *a);
  case COPY:
    return ks_mem_copy(m->ctx, a, b, (size_t)i->n * sizeof *a);
  case UPLOAD:
    for (int64_t k = 0; k < i->n; k++)
      host[k] = of_step + (float)(k % 3);
    return ks_mem_upload(m->ctx, a, host, (size_t)i->n * sizeof *a);
  case DELIVER:
    return ks_cuda_deliver(m->ctx, m->late[step][at], a, (size_t)i->n * sizeof *a);
  default:
    return ks_cuda_matmul(m->ctx, &(ks_cuda_matmul_params){.x = b,
                                                           .w = m->arrays[(i->a + 1) % N_ARRAYS],
                                                           .y = a,
                                                           .n_rows = 1 + i->n % SIDE,
                                                           .n_out = SIDE,
                                                           .n_in = SIDE,
                                                           .w_transposed = i->n % 2 == 0});
  }
}

static void start(machine *m, const char *no_graphs) {
  m->ctx = make_ctx(no_graphs);
  memset(m->late, 0, sizeof m->late);
  for (int k = 0; k < N_ARRAYS; k++) {
    void *p;
    float *host = ks_floats(LENGTH, KS_FILL_SIGNED, (uint64_t)k);
    cr_assert(ks_mem_alloc(m->ctx, LENGTH * sizeof *host, &p) == KS_OK);
    cr_assert(ks_mem_upload(m->ctx, p, host, LENGTH * sizeof *host) == KS_OK);
    m->arrays[k] = p;
    free(host);
  }
}

static void run_step(machine *m, const program *p, int step, uint64_t key) {
  cr_assert(ks_step_begin(m->ctx, key) == KS_OK, "%s", ks_error_message());
  for (int i = 0; i < p->n; i++)
    cr_assert(run_instruction(m, &p->list[i], step, i) == KS_OK, "%s", ks_error_message());
  cr_assert(ks_step_end(m->ctx) == KS_OK, "%s", ks_error_message());
}

static void finish(machine *m) {
  cr_assert(ks_sync(m->ctx) == KS_OK, "%s", ks_error_message());
  for (int k = 0; k < N_ARRAYS; k++)
    cr_assert(ks_mem_download(m->ctx, m->back[k], m->arrays[k], sizeof m->back[k]) == KS_OK);
}

static bool same(const machine *a, const machine *b) {
  return memcmp(a->late, b->late, sizeof a->late) == 0 && memcmp(a->back, b->back, sizeof a->back) == 0;
}

static machine with, without;

Test(cuda_steps, recorded_and_replayed_give_the_bits_of_one_by_one) {
  enum { TRIALS = 60 };
  ks_cuda_counts sum = {0};
  state = 1;
  for (int t = 0; t < TRIALS; t++) {
    program p = {.n = 2 + draw(12)};
    for (int i = 0; i < p.n; i++)
      p.list[i] = draw_instruction();
    start(&with, "0");
    start(&without, "1");
    const int change_every = 1 + draw(4);
    for (int step = 0; step < MAX_STEPS; step++) {
      if (step > 0 && draw(change_every + 1) == 0) mutate(&p);
      const uint64_t key = (uint64_t)draw(2);
      run_step(&with, &p, step, key);
      run_step(&without, &p, step, key);
      if (draw(3) == 0) cr_assert(ks_sync(with.ctx) == KS_OK);
    }
    finish(&with);
    finish(&without);
    cr_expect(same(&with, &without), "trial %d", t);
    const ks_cuda_counts *c = ks_cuda_counts_of(with.ctx), *c0 = ks_cuda_counts_of(without.ctx);
    sum.steps_replayed += c->steps_replayed, sum.steps_differing += c->steps_differing,
        sum.graphs += c->graphs;
    cr_expect(c0->steps_replayed == 0 && c0->graphs == 0 && c0->steps_recorded == MAX_STEPS);
    host_destroy(with.ctx);
    destroy(without.ctx);
  }
  cr_expect(sum.steps_replayed > TRIALS && sum.steps_differing > TRIALS && sum.graphs > TRIALS / 2,
            "%d replayed, %d differing, %d graphs", (int)sum.steps_replayed, (int)sum.steps_differing,
            (int)sum.graphs);
}

/* The same program with a difference at each place and of each kind; before and after it the list is
 * replayed. */
Test(cuda_steps, a_difference_at_each_place) {
  static const program base = {{{AFFINE, 0, 1, 200, 3},
                                {TWICE, 1, 0, 100, 3},
                                {COPY, 2, 1, 50, 0},
                                {UPLOAD, 3, 0, 70, 5},
                                {AFFINE, 2, 3, 90, -1},
                                {DELIVER, 2, 0, 64, 0},
                                {AFFINE, 0, 2, 256, -1},
                                {MATMUL, 4, 2, 8, 0},
                                {ZERO, 1, 0, 33, 0},
                                {DELIVER, 0, 0, 17, 0},
                                {ZERO, 4, 0, 10, 0}},
                               11};
  for (int at = 0; at < base.n; at++)
    for (int kind = 0; kind < 4; kind++) {
      program p = base;
      start(&with, "0");
      start(&without, "1");
      if (kind == 0) p.list[at].n -= 2;
      if (kind == 1)
        p.list[at].b =
            (p.list[at].b + 2) % N_ARRAYS == p.list[at].a ? p.list[at].b : (p.list[at].b + 2) % N_ARRAYS;
      if (kind == 2) p.list[at].value = 99;
      if (kind == 3) p.n = at + 1;
      const program *steps[] = {&base, &base, &base, &p, &base, &base, &p, &p, &base, &p};
      for (int s = 0; s < MAX_STEPS; s++) {
        run_step(&with, steps[s], s, 7);
        run_step(&without, steps[s], s, 7);
      }
      finish(&with);
      finish(&without);
      cr_expect(same(&with, &without), "place %d, kind %d", at, kind);
      host_destroy(with.ctx);
      destroy(without.ctx);
    }
}

Test(cuda_steps, what_is_counted) {
  static const program p = {
      {{AFFINE, 0, 1, 200, 1}, {AFFINE, 1, 0, 100, 1}, {UPLOAD, 3, 0, 70, 5}, {DELIVER, 3, 0, 9, 0}}, 4};
  static const program q = {
      {{AFFINE, 0, 1, 200, 1}, {AFFINE, 1, 0, 100, 2}, {UPLOAD, 3, 0, 70, 5}, {DELIVER, 3, 0, 9, 0}}, 4};
  start(&with, "0");
  const ks_cuda_counts *c = ks_cuda_counts_of(with.ctx);
  for (int s = 0; s < 5; s++)
    run_step(&with, &p, s, 1);
  cr_expect(c->steps_recorded == 1 && c->steps_replayed == 4 && c->graphs == 1 && c->steps_differing == 0 &&
            c->graphs_failed == 0);
  cr_expect(c->launches == 2 && c->stages == 15 && c->stages_shared == 1, "%d launches, %d stages, %d shared",
            (int)c->launches, (int)c->stages, (int)c->stages_shared);
  run_step(&with, &q, 5, 1); /* one array no longer shares its bytes */
  cr_expect(c->steps_recorded == 2 && c->steps_differing == 1 && c->graphs == 1);
  run_step(&with, &q, 6, 1);
  run_step(&with, &p, 7, 1); /* equal bytes in two places are no difference */
  cr_expect(c->steps_recorded == 2 && c->steps_replayed == 6 && c->graphs == 2 && c->graphs_failed == 0);
  cr_expect(ks_shim_count().graph_launches == 6 || ks_sync(with.ctx) == KS_OK);
  finish(&with);
  host_destroy(with.ctx);
}

Test(cuda_steps, without_memory_for_graphs_steps_go_one_by_one) {
  static const program p = {{{AFFINE, 0, 1, 200, 1}, {UPLOAD, 3, 0, 70, 5}, {DELIVER, 3, 0, 9, 0}}, 3};
  start(&with, "0");
  start(&without, "1");
  const ks_cuda_counts *c = ks_cuda_counts_of(with.ctx);
  ks_shim_set_graphs(0);
  for (int s = 0; s < MAX_STEPS; s++) {
    run_step(&with, &p, s, 1);
    run_step(&without, &p, s, 1);
  }
  ks_shim_set_graphs(1);
  finish(&with);
  finish(&without);
  cr_expect(same(&with, &without));
  cr_expect(c->graphs == 0 && c->graphs_failed == 1 && c->steps_replayed == MAX_STEPS - 1);
  host_destroy(with.ctx);
  destroy(without.ctx);
}

Test(cuda_steps, more_keys_than_are_kept) {
  static const program p = {{{AFFINE, 0, 1, 200, 1}, {DELIVER, 0, 0, 9, 0}, {TWICE, 1, 0, 100, 1}}, 3};
  start(&with, "0");
  start(&without, "1");
  for (int round = 0; round < MAX_STEPS; round++)
    for (uint64_t key = 0; key < 40; key++) {
      if (key >= 30 && round % 2) continue;
      run_step(&with, &p, round, key * 77);
      run_step(&without, &p, round, key * 77);
    }
  finish(&with);
  finish(&without);
  cr_expect(same(&with, &without));
  host_destroy(with.ctx);
  destroy(without.ctx);
}

/* Places full of steps that came again give way to two that come in turn from then on. */
Test(cuda_steps, old_graphs_give_way) {
  static const program p = {{{AFFINE, 0, 1, 200, 1}, {DELIVER, 0, 0, 9, 0}}, 2};
  start(&with, "0");
  const ks_cuda_counts *c = ks_cuda_counts_of(with.ctx);
  for (int round = 0; round < 2; round++)
    for (uint64_t key = 0; key < 31; key++)
      run_step(&with, &p, 0, key);
  for (int s = 0; s < 150; s++)
    run_step(&with, &p, 0, 1000 + (uint64_t)s % 2);
  const int64_t before = c->steps_replayed;
  for (int s = 0; s < 10; s++)
    run_step(&with, &p, 0, 1000 + (uint64_t)s % 2);
  cr_expect(c->steps_replayed == before + 10, "%d of 10 replayed", (int)(c->steps_replayed - before));
  finish(&with);
  host_destroy(with.ctx);
}

/* Memory that a held-back list uses is freed, or its workspace grows, in the middle of the step. */
Test(cuda_steps, memory_that_moves) {
  for (int n_steps = 3, round = 0; round < 2; round++) {
    machine *both[] = {&with, &without};
    for (int m = 0; m < 2; m++) {
      start(both[m], m ? "1" : "0");
      ks_ctx *ctx = both[m]->ctx;
      float **a = both[m]->arrays;
      const float p[2] = {0.5f, 2};
      void *big = NULL;
      cr_assert(ks_mem_alloc(ctx, (size_t)8 << 20, &big) == KS_OK);
      for (int s = 0; s < n_steps; s++) {
        cr_assert(ks_step_begin(ctx, 3) == KS_OK);
        cr_assert(host_affine_twice(ctx, a[0], a[1], p, LENGTH) == KS_OK);
        cr_assert(ks_mem_copy(ctx, big, a[0], LENGTH * 4) == KS_OK &&
                  ks_mem_copy(ctx, a[2], big, LENGTH * 4) == KS_OK);
        const bool last = s == n_steps - 1;
        if (last && round == 0) ks_mem_free(ctx, big);
        if (last && round == 1) cr_assert(host_affine_twice(ctx, big, big, p, (int64_t)2 << 20) == KS_OK);
        cr_assert(host_affine_twice(ctx, a[1], a[2], p, LENGTH) == KS_OK);
        cr_assert(ks_step_end(ctx) == KS_OK, "%s", ks_error_message());
      }
      finish(both[m]);
    }
    cr_expect(same(&with, &without), "round %d", round);
    host_destroy(with.ctx);
    destroy(without.ctx);
  }
}

Test(cuda_steps, failures_inside) {
  static const program p = {{{AFFINE, 0, 1, 200, 1}, {DELIVER, 0, 0, 9, 0}, {TWICE, 1, 0, 100, 1}}, 3};
  start(&with, "0");
  for (int s = 0; s < 3; s++)
    run_step(&with, &p, s, 1);
  finish(&with);
  for (int at = 0; at < 3; at++) { /* fails while recording, and twice while comparing */
    cr_assert(ks_step_begin(with.ctx, at == 0 ? 9 : 1) == KS_OK);
    cr_assert(run_instruction(&with, &p.list[0], 0, 0) == KS_OK);
    cr_assert(host_launch(with.ctx, with.arrays[0], (dim3){1, 1, 1}, (dim3){2048, 1, 1}, 64) ==
              KS_EUNSUPPORTED);
    cr_assert(ks_step_end(with.ctx) == KS_OK);
  }
  for (int s = 3; s < 6; s++)
    run_step(&with, &p, s, 1);
  finish(&with);
  host_destroy(with.ctx);
}

Test(cuda_steps, what_a_step_must_not_hold) {
  ks_ctx *ctx = make_ctx("0");
  void *p = NULL, *q = NULL;
  float back;
  cr_assert(ks_mem_alloc(ctx, 64, &p) == KS_OK);
  cr_expect(ks_step_end(ctx) == KS_EINVAL);
  for (int s = 0; s < 3; s++) {
    cr_assert(ks_step_begin(ctx, 1) == KS_OK);
    cr_expect(ks_step_begin(ctx, 1) == KS_EINVAL && strstr(ks_error_message(), "nest"));
    cr_expect(ks_sync(ctx) == KS_EINVAL && ks_mem_alloc(ctx, 64, &q) == KS_EINVAL);
    cr_expect(ks_mem_download(ctx, &back, p, sizeof back) == KS_EINVAL &&
              ks_cuda_finish(ctx) == KS_EINTERNAL);
    cr_assert(ks_mem_zero(ctx, p, 64) == KS_OK && ks_step_end(ctx) == KS_OK);
  }
  cr_expect(ks_sync(ctx) == KS_OK);
  cr_assert(ks_step_begin(ctx, 1) == KS_OK && ks_mem_zero(ctx, p, 64) == KS_OK);
  destroy(ctx); /* in the middle of one */
}
