/* The threads of a block as fibers of one thread of the operating system.
 *
 * A fiber runs until it blocks. The lanes of a warp run one after another, in the chosen order, until each
 * waits; when all wait at the same warp collective it is completed and the warp goes round again, when all
 * wait at a block barrier (or are done) the next warp runs. After the last warp the barrier is completed and
 * the round begins again with the first warp. A lane that waits for a barrier in shared memory runs again as
 * soon as that is complete; a warp of which some lanes wait so is left as it is. So every mistake with barriers
 * is found at the end of a warp's or a block's turn, and nothing can hang but a loop that spins.
 *
 * This file is compiled without sanitizers: it switches stacks (which AddressSanitizer is told) and is the
 * inner loop. What kernels access is checked where they access it. */
#include "threads.h"
#include "ks_shim_threads.h"
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WARP = 32, MAX_THREADS = 1024, STACK = 128 << 10, REPORT = 8192 };

typedef enum { READY, AT_WARP, AT_BLOCK, AT_BARRIER, DONE } fiber_state;
typedef struct warp warp;
typedef struct {
  void *dst;
  const void *src;
  uint32_t bytes;
  int group;
} async_copy;

typedef struct {
  void *sp; /* where it waits; NULL: never ran */
  char *stack;
  size_t stack_size;
  void *fake_stack;
  void *const *frame; /* of the function of this file in which it waits */
  uint3 index;
  int number, lane;
  warp *warp;
  fiber_state state;
  ks_shim_at at;
  const void *barrier; /* in shared memory, for which it waits */
  unsigned parity;
  async_copy *copies; /* under way, oldest first */
  int n_copies, cap_copies, group;
} fiber;

struct warp {
  int n, n_live;       /* lanes that exist; that are not done */
  int turn;            /* position in order[] of the lane that runs */
  int arrived, parity; /* lanes at the present collective; which half of the slots it uses */
  bool mixed;          /* they came to different ones */
  ks_shim_at at;
  unsigned size;
  fiber *order[WARP]; /* lanes that are not done, in the order in which they run */
  fiber *lane[WARP];
  uint64_t value[2][WARP];
  unsigned ballot[2];
  uint32_t row[2][WARP][4]; /* of ldmatrix */
  struct {
    float *d;
    const uint32_t *a, *b;
  } mma[WARP];
};

static struct {
  const ks_shim_kernel *kernel;
  int n_threads, n_warps, n_live;
  int turn; /* position in warp_order */
  int warp_order[WARP];
  int arrived, sum, result;
  int n_at_barrier;  /* threads that wait for a barrier in shared memory */
  int n_grid_waits;  /* threads of an early kernel that came to ks_grid_wait */
  bool mixed, hides; /* hides: memory that the graph of an early kernel changes */
  ks_shim_at at;
  bool failed;
} block;

static fiber fibers[MAX_THREADS], caller, *now;
static warp warps[WARP];
static int n_fibers, order;
static uint64_t n_switches;
static char report[REPORT];

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

void ks_shim_set_order(int new_order) {
  order = new_order;
}

uint64_t ks_shim_switch_count(void) {
  return n_switches;
}

const char *ks_shim_report(void) {
  return report;
}

void ks_shim_set_report(const char *text) {
  snprintf(report, sizeof report, "%s", text);
}

/* ---------------------------------------------------------------- switching stacks */

/* Saves what a function must preserve on the stack, its end in *from, and goes on where `to` was saved. */
void ks_shim_swap(void **from, void *to);
#if defined(__x86_64__) && !defined(KS_SHIM_UCONTEXT)
__asm__(".text\n.p2align 4\n.globl ks_shim_swap\n.type ks_shim_swap, @function\nks_shim_swap:\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
        ".size ks_shim_swap, . - ks_shim_swap\n");
#elif defined(__aarch64__) && !defined(KS_SHIM_UCONTEXT)
__asm__(
    ".text\n.p2align 4\n.globl ks_shim_swap\n.type ks_shim_swap, %function\nks_shim_swap:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, "
    "#144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, "
    "#144]\n"
    "  add sp, sp, #160\n  ret\n"
    ".size ks_shim_swap, . - ks_shim_swap\n");
#else
#define KS_SHIM_UCONTEXT 1
#include <ucontext.h>
void ks_shim_swap(void **from, void *to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, to);
}
#endif

static void go(fiber *from, fiber *to) {
  now = to;
  threadIdx = to->index;
  n_switches++;
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_size);
  ks_shim_swap(&from->sp, to->sp);
  __sanitizer_finish_switch_fiber(from->fake_stack, NULL, NULL);
}

static fiber *next_of(warp *w);

static void fiber_main(void) {
  __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
  for (;;) {
    fiber *self = now;
    block.kernel->invoke(block.kernel->func, block.kernel->args);
    self->state = DONE;
    self->n_copies = self->group = 0;
    go(self, next_of(self->warp));
  }
}

/* A stack on which the fiber will begin with fiber_main. */
static void make_fresh(fiber *f) {
  __asan_unpoison_memory_region(f->stack, f->stack_size);
  char *top = f->stack + f->stack_size;
#ifdef KS_SHIM_UCONTEXT
  ucontext_t *context = (ucontext_t *)(void *)f->stack;
  getcontext(context);
  context->uc_stack.ss_sp = (char *)f->stack + sizeof *context;
  context->uc_stack.ss_size = (size_t)(top - f->stack) - sizeof *context;
  makecontext(context, fiber_main, 0);
  f->sp = context;
#elif defined(__x86_64__)
  void **sp = (void **)(void *)top - 8; /* six registers, where to go, where that would return to */
  memset(sp, 0, 64);
  sp[6] = (void *)(uintptr_t)fiber_main;
  f->sp = sp;
#else
  void **sp = (void **)(void *)top - 20;
  memset(sp, 0, 160);
  sp[11] = (void *)(uintptr_t)fiber_main;
  f->sp = sp;
#endif
  f->n_copies = f->group = 0;
}

/* Stacks are kept for the next launch, each above a page that faults. */
static bool make_fibers(int n) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  while (n_fibers < n) {
    fiber *f = &fibers[n_fibers];
    char *p =
        mmap(NULL, STACK + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return false;
    mprotect(p, page, PROT_NONE);
    f->stack = p + page;
    f->stack_size = STACK;
    make_fresh(f);
    n_fibers++;
  }
  return true;
}

/* ---------------------------------------------------------------- failures */

static size_t said; /* length of report */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(report + said, sizeof report - said, format, args);
  va_end(args);
  if (n > 0) said += (size_t)n < sizeof report - said ? (size_t)n : sizeof report - 1 - said;
}

static void say_launch(void) {
  const ks_shim_kernel *k = block.kernel;
  char name[256] = "";
  __sanitizer_symbolize_pc((void *)((uintptr_t)k->func + 1), "%f", name, sizeof name);
  said = 0;
  say("%s, kernel %s, block (%u, %u, %u) of (%u, %u, %u), %d threads, order %d", k->op, name, blockIdx.x,
      blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z, block.n_threads, order);
}

enum { MAX_FRAMES = 16, FRAMES_SAID = 3 };
/* Addresses to which the function in which a fiber waits, its caller, ... return. */
static int trace(const fiber *f, void **pc) {
  const char *low = f->stack, *high = f->stack + f->stack_size;
  void *const *frame = f->frame;
  int n = 0;
  while (n < MAX_FRAMES && (const char *)frame > low && (const char *)(frame + 2) <= high && frame[1]) {
    pc[n++] = frame[1];
    if ((void *const *)frame[0] <= frame) break;
    frame = frame[0];
  }
  return n;
}

static void say_place(const fiber *f, void *const *pc, int n) {
  static const char *const places[] = {
#define X(name, text) text,
      KS_SHIM_PLACES(X)
#undef X
  };
  if (f->state == DONE) {
    say("done");
    return;
  }
  say("wait at %s", places[f->at]);
  for (int i = 0, shown = 0; i < n && shown < FRAMES_SAID; i++) {
    char where[512] = "";
    __sanitizer_symbolize_pc((char *)pc[i] - 1, "%S", where, sizeof where);
    if (!where[0] || strstr(where, "/include/ks_shim_")) continue;
    if (strstr(where, "launch.cuh")) break;
    const char *slash = strrchr(where, '/');
    say("%s%s", shown++ ? " < " : ", ", slash ? slash + 1 : where);
  }
}

static bool is_alike(const fiber *a, const fiber *b) {
  void *pc[2][MAX_FRAMES];
  if (a->state != b->state) return false;
  if (a->state == DONE) return true;
  const int n = trace(a, pc[0]);
  return a->at == b->at && n == trace(b, pc[1]) && memcmp(pc[0], pc[1], (size_t)n * sizeof pc[0][0]) == 0;
}

/* What the threads from..to-1 do: "threads 0-15 20 wait at __syncwarp, norm.cu:88". */
static void say_threads(int from, int to) {
  bool is_said[MAX_THREADS] = {false};
  for (int i = from; i < to; i++) {
    if (is_said[i]) continue;
    say("\n  threads");
    for (int j = i; j < to; j++) {
      if (is_said[j] || !is_alike(&fibers[i], &fibers[j])) continue;
      const int begin = j;
      while (j + 1 < to && is_alike(&fibers[i], &fibers[j + 1]))
        j++;
      for (int k = begin; k <= j; k++)
        is_said[k] = true;
      say(" %d", begin);
      if (j > begin) say("-%d", j);
    }
    void *pc[MAX_FRAMES];
    say(" ");
    say_place(&fibers[i], pc, fibers[i].state == DONE ? 0 : trace(&fibers[i], pc));
  }
}

KS_SHIM_NORETURN static void leave_failed(void) {
  fprintf(stderr, "CUDA on CPU: %s\n", report);
  block.failed = true;
  fiber *self = now;
  now = &caller;
  __sanitizer_start_switch_fiber(NULL, caller.stack, caller.stack_size);
  ks_shim_swap(&self->sp, caller.sp);
  abort();
}

void ks_shim_fail(const char *format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (now == &caller || !now) {
    fprintf(stderr, "CUDA on CPU: device code called by the host: %s\n", text);
    abort();
  }
  say_launch();
  say(", thread (%u, %u, %u): %s", now->index.x, now->index.y, now->index.z, text);
  leave_failed();
}

KS_SHIM_NORETURN static void fail_waiting(const char *what, int from, int to) {
  say_launch();
  say(": %s", what);
  say_threads(from, to);
  leave_failed();
}

/* ---------------------------------------------------------------- turns */

static void complete(warp *w);

static inline bool may_run(const fiber *f) {
  return f->state == READY || (f->state == AT_BARRIER && ks_shim_barrier_is_past(f->barrier, f->parity));
}

/* The first lane from w->turn on that can run. */
static inline fiber *next_lane(warp *w) {
  for (; w->turn < w->n_live; w->turn++)
    if (may_run(w->order[w->turn])) return w->order[w->turn];
  w->turn = 0;
  return NULL;
}

static bool waits_for_barrier(const warp *w) {
  for (int i = 0; i < w->n_live; i++)
    if (w->order[i]->state == AT_BARRIER) return true;
  return false;
}

static void forget_done(warp *w) {
  const int n = w->n_live;
  w->n_live = 0;
  for (int i = 0; i < n; i++)
    if (w->order[i]->state != DONE) w->order[w->n_live++] = w->order[i];
}

/* The first warp from block.turn on with a thread that can run. */
static fiber *next_warp(void) {
  for (; block.turn < block.n_warps; block.turn++) {
    warp *w = &warps[block.warp_order[block.turn]];
    w->turn = 0;
    fiber *f = w->n_live ? next_lane(w) : NULL;
    if (f) return f;
  }
  return NULL;
}

static void set_ready(fiber_state from) {
  for (int i = 0; i < block.n_threads; i++)
    if (fibers[i].state == from) fibers[i].state = READY;
}

/* All warps had their turn: every thread waits or is done. */
static fiber *next_round(void) {
  while (block.n_at_barrier > 0) {
    block.turn = 0;
    fiber *first = next_warp();
    if (first) return first;
    if (!ks_shim_hopper_advance())
      fail_waiting("threads wait for a barrier that nothing completes", 0, block.n_threads);
  }
  if (block.mixed) fail_waiting("threads of one block wait at different barriers", 0, block.n_threads);
  block.result = block.sum;
  block.sum = block.arrived = 0;
  block.turn = 0;
  set_ready(AT_BLOCK);
  fiber *first = next_warp();
  return first ? first : &caller;
}

/* Who runs when a lane of w has stopped. */
static fiber *next_of(warp *w) {
  fiber *next;
  w->turn++;
  if ((next = next_lane(w))) return next;
  if (block.n_at_barrier > 0 && (next = next_lane(w))) return next;
  if (w->arrived) {
    const bool is_whole = w->arrived == w->n && !w->mixed;
    if (!is_whole && (w->mixed || block.n_at_barrier == 0 || !waits_for_barrier(w)))
      fail_waiting("a warp collective wants all lanes of the warp", w->lane[0]->number,
                   w->lane[0]->number + w->n);
    if (is_whole) {
      complete(w);
      return next_lane(w);
    }
  }
  forget_done(w);
  block.turn++;
  next = next_warp();
  return next ? next : next_round();
}

void ks_shim_wait_barrier(const void *b, unsigned parity) {
  fiber *self = now;
  if (ks_shim_barrier_is_past(b, parity)) return;
  self->state = AT_BARRIER;
  self->at = KS_SHIM_BARRIER;
  self->frame = __builtin_frame_address(0);
  self->barrier = b;
  self->parity = parity;
  block.n_at_barrier++;
  fiber *next = next_of(self->warp);
  if (next != self) go(self, next);
  block.n_at_barrier--;
  self->state = READY;
}

int ks_shim_block_wait(ks_shim_at at, int value) {
  fiber *self = now;
  self->state = AT_BLOCK;
  self->at = at;
  self->frame = __builtin_frame_address(0);
  if (block.arrived++ == 0) block.at = at, block.mixed = false;
  block.mixed |= block.at != at;
  block.sum += value;
  fiber *next = next_of(self->warp);
  if (next != self) go(self, next);
  self->state = READY;
  return block.result;
}

static void hide_changing(bool on) {
  if (block.hides != on) ks_shim_hide_changing(on);
  block.hides = on;
}

/* An early kernel's threads wait for each other here too, so that memory can be given back to all of them at once. */
void ks_shim_grid_wait(void) {
  if (!block.kernel->early) return;
  block.n_grid_waits++;
  ks_shim_block_wait(KS_SHIM_GRID_WAIT, 0);
  hide_changing(false);
}

/* ---------------------------------------------------------------- warp collectives */

static unsigned existing(const warp *w) {
  return w->n == WARP ? 0xffffffffu : (1u << w->n) - 1;
}

/* `self->frame` is set. */
static inline void warp_wait(fiber *self, ks_shim_at at, unsigned size, unsigned mask) {
  warp *w = self->warp;
  self->state = AT_WARP;
  self->at = at;
  if (existing(w) & ~mask) ks_shim_fail("mask 0x%08x leaves out lanes of this warp", mask);
  if (w->arrived++ == 0) w->at = at, w->size = size, w->mixed = false;
  if (w->at != at || w->size != size) w->mixed = true;
  fiber *next = next_of(w);
  if (next != self) go(self, next);
  self->state = READY;
}

void ks_shim_warp_sync(unsigned mask) {
  now->frame = __builtin_frame_address(0);
  warp_wait(now, KS_SHIM_SYNCWARP, 0, mask);
}

unsigned ks_shim_warp_lanes(void) {
  return existing(now->warp);
}

unsigned ks_shim_ballot(ks_shim_at at, unsigned mask, int value) {
  fiber *self = now;
  warp *w = self->warp;
  const int half = w->parity;
  w->value[half][self->lane] = (uint64_t)(value != 0);
  self->frame = __builtin_frame_address(0);
  warp_wait(self, at, 0, mask);
  return w->ballot[half];
}

uint64_t ks_shim_shuffle(ks_shim_at at, unsigned size, unsigned mask, uint64_t bits, int lane, int width) {
  fiber *self = now;
  warp *w = self->warp;
  const int half = w->parity, l = self->lane;
  if (width < 1 || width > WARP || (width & (width - 1))) ks_shim_fail("a shuffle of width %d", width);
  const int begin = l & ~(width - 1), end = begin + width;
  int from = at == KS_SHIM_SHFL_UP ? l - lane : at == KS_SHIM_SHFL_DOWN ? l + lane : l ^ lane;
  if (at == KS_SHIM_SHFL) from = begin + (lane & (width - 1));
  if (at == KS_SHIM_SHFL_UP ? from < begin : from >= end) from = l;
  w->value[half][l] = bits;
  self->frame = __builtin_frame_address(0);
  warp_wait(self, at, size, mask);
  return w->value[half][from & (WARP - 1)];
}

void ks_shim_ldmatrix(uint32_t *r, int n, int transposed, const void *row) {
  fiber *self = now;
  warp *w = self->warp;
  const int half = w->parity, l = self->lane;
  memcpy(w->row[half][l], row, 16);
  self->frame = __builtin_frame_address(0);
  warp_wait(self, KS_SHIM_LDMATRIX, (unsigned)(2 * n + transposed), 0xffffffffu);
  for (int i = 0; i < n; i++) {
    uint32_t(*m)[4] = &w->row[half][8 * i];
    const int at = l / 4, pair = l % 4;
    const uint32_t lo = m[2 * pair][at / 2] >> 16 * (at % 2), hi = m[2 * pair + 1][at / 2] >> 16 * (at % 2);
    r[i] = transposed ? (lo & 0xffffu) | hi << 16 : m[at][pair];
  }
}

void ks_shim_mma(float *d, const uint32_t *a, const uint32_t *b) {
  fiber *self = now;
  warp *w = self->warp;
  w->mma[self->lane].d = d, w->mma[self->lane].a = a, w->mma[self->lane].b = b;
  self->frame = __builtin_frame_address(0);
  warp_wait(self, KS_SHIM_MMA, 0, 0xffffffffu);
}

static double bf16(uint32_t bits) {
  uint32_t u = bits << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return (double)f;
}

/* Eight products are added to the sum at once, then it is rounded: Fasi, Higham, Mikaitis, Pranesh,
 * "Numerical behavior of NVIDIA tensor cores" (2021) found this on A100. */
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void
multiply(warp *w) {
  double a[16][16], b[16][8], sum[16][8];
  for (int l = 0; l < WARP; l++) {
    const int g = l / 4, t = l % 4;
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 2; i++) {
        const int k = 2 * t + 8 * half + i, shift = 16 * i;
        a[g][k] = bf16(w->mma[l].a[2 * half] >> shift & 0xffffu);
        a[g + 8][k] = bf16(w->mma[l].a[2 * half + 1] >> shift & 0xffffu);
        b[k][g] = bf16(w->mma[l].b[half] >> shift & 0xffffu);
        sum[g + 8 * half][2 * t + i] = (double)w->mma[l].d[2 * half + i];
      }
  }
  for (int i = 0; i < 16; i++)
    for (int half = 0; half < 16; half += 8) {
      for (int k = half; k < half + 8; k++)
        for (int j = 0; j < 8; j++)
          sum[i][j] += a[i][k] * b[k][j];
      for (int j = 0; j < 8; j++)
        sum[i][j] = (double)ks_shim_truncated(sum[i][j]);
    }
  for (int l = 0; l < WARP; l++)
    for (int i = 0; i < 4; i++)
      w->mma[l].d[i] = (float)sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

/* All lanes of w are at the same collective. */
static void complete(warp *w) {
  if (w->at == KS_SHIM_MMA) {
    if (w->n < WARP) ks_shim_fail("mma in a warp of %d lanes", w->n);
    multiply(w);
  } else if (w->at == KS_SHIM_BALLOT || w->at == KS_SHIM_ANY || w->at == KS_SHIM_ALL) {
    unsigned votes = 0;
    for (int l = 0; l < w->n; l++)
      votes |= (unsigned)w->value[w->parity][l] << l;
    w->ballot[w->parity] = votes;
  }
  w->arrived = 0;
  w->parity ^= 1;
  for (int l = 0; l < w->n; l++)
    w->lane[l]->state = READY;
}

/* ---------------------------------------------------------------- asynchronous copies */

int ks_shim_thread(void) {
  return now->number;
}
int ks_shim_order(void) {
  return order;
}

void ks_shim_cp_async(void *dst, const void *src, uint32_t bytes) {
  fiber *f = now;
  if (f->n_copies == f->cap_copies) {
    int cap = f->cap_copies ? 2 * f->cap_copies : 16;
    async_copy *copies = realloc(f->copies, (size_t)cap * sizeof *copies);
    if (!copies) ks_shim_fail("no memory for asynchronous copies");
    f->copies = copies;
    f->cap_copies = cap;
  }
  f->copies[f->n_copies++] = (async_copy){dst, src, bytes, f->group};
}

void ks_shim_cp_async_commit(void) {
  now->group++;
}

void ks_shim_cp_async_wait(int n_left) {
  fiber *f = now;
  int n = 0;
  for (int i = 0; i < f->n_copies; i++) {
    async_copy c = f->copies[i];
    if (c.group >= f->group - n_left) {
      f->copies[n++] = c;
      continue;
    }
    if (c.src)
      memcpy(c.dst, c.src, c.bytes);
    else
      memset(c.dst, 0, c.bytes);
  }
  f->n_copies = n;
}

/* ---------------------------------------------------------------- blocks and grids */

static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

/* 0 .. n-1 in the chosen order; `key` makes shuffles differ. */
static void permutation(int *out, int n, uint64_t key) {
  for (int i = 0; i < n; i++)
    out[i] = order == 1 ? n - 1 - i : i;
  for (int i = n - 1; order >= 2 && i > 0; i--) {
    key = mix(key);
    int j = (int)(key % (uint64_t)(i + 1)), old = out[i];
    out[i] = out[j];
    out[j] = old;
  }
}

/* The i-th of n blocks to run: shuffles go through them in steps that share no factor with n. */
static uint64_t block_at(uint64_t i, uint64_t n) {
  if (order < 2) return order ? n - 1 - i : i;
  uint64_t step = mix((uint64_t)order) % n | 1u;
  for (;; step += 2) {
    uint64_t a = step, b = n;
    while (b) {
      uint64_t r = a % b;
      a = b;
      b = r;
    }
    if (a == 1) break;
  }
  return (uint64_t)(((unsigned __int128)i * step + mix((uint64_t)order + 1)) % n);
}

static void find_caller_stack(void) {
  static __thread char *low;
  static __thread size_t size;
  pthread_attr_t attr;
  void *p;
  if (!low && pthread_getattr_np(pthread_self(), &attr) == 0) {
    if (pthread_attr_getstack(&attr, &p, &size) == 0) low = p;
    pthread_attr_destroy(&attr);
  }
  caller.stack = low;
  caller.stack_size = size;
}

static void number_threads(dim3 size) {
  block.n_threads = (int)(size.x * size.y * size.z);
  block.n_warps = (block.n_threads + WARP - 1) / WARP;
  for (int i = 0; i < block.n_threads; i++) {
    fiber *f = &fibers[i];
    f->number = i;
    f->index.x = (unsigned)i % size.x;
    f->index.y = (unsigned)i / size.x % size.y;
    f->index.z = (unsigned)i / (size.x * size.y);
    f->lane = i % WARP;
    f->warp = &warps[i / WARP];
    f->warp->lane[f->lane] = f;
    f->warp->n = f->lane + 1;
  }
  for (int i = 0; i < block.n_warps; i++)
    if (warps[i].n < WARP) {
      memset(warps[i].value, 0xff, sizeof warps[i].value);
      memset(warps[i].row, 0xff, sizeof warps[i].row);
    }
}

static void run_block(uint64_t number) {
  blockIdx.x = (unsigned)(number % gridDim.x);
  blockIdx.y = (unsigned)(number / gridDim.x % gridDim.y);
  blockIdx.z = (unsigned)(number / gridDim.x / gridDim.y);
  block.turn = block.arrived = block.sum = block.n_at_barrier = block.n_grid_waits = 0;
  hide_changing(block.kernel->early);
  ks_shim_hopper_begin(block.n_threads);
  ks_shim_smem_begin(block.kernel->smem_bytes);
  const uint64_t key = mix((uint64_t)order) ^ number;
  permutation(block.warp_order, block.n_warps, key);
  for (int i = 0; i < block.n_warps; i++) {
    warp *w = &warps[i];
    int lanes[WARP];
    permutation(lanes, w->n, key + 1 + (uint64_t)i);
    w->n_live = w->n;
    w->turn = w->arrived = 0;
    for (int l = 0; l < w->n; l++) {
      w->order[l] = w->lane[lanes[l]];
      w->order[l]->state = READY;
    }
  }
  go(&caller, next_warp());
  const char *wrong = block.failed ? NULL : ks_shim_hopper_end();
  hide_changing(false);
  if (!block.failed && block.kernel->early && block.n_grid_waits != block.n_threads)
    wrong = "threads of an early kernel end without ks_grid_wait, or come to it twice";
  if (wrong) {
    say_launch();
    say(": %s", wrong);
    fprintf(stderr, "CUDA on CPU: %s\n", report);
    block.failed = true;
  }
  ks_shim_smem_end();
}

bool ks_shim_run(const ks_shim_kernel *kernel) {
  const dim3 g = kernel->grid;
  const uint64_t n_blocks = (uint64_t)g.x * g.y * g.z;
  block.kernel = kernel;
  block.failed = false;
  gridDim = kernel->grid;
  blockDim = kernel->block;
  if (!make_fibers((int)(blockDim.x * blockDim.y * blockDim.z))) {
    ks_shim_set_report("no memory for the stacks of a block's threads");
    return false;
  }
  find_caller_stack();
  number_threads(kernel->block);
  for (uint64_t i = 0; i < n_blocks && !block.failed; i++)
    run_block(block_at(i, n_blocks));
  now = &caller;
  if (block.failed)
    for (int i = 0; i < n_fibers; i++)
      make_fresh(&fibers[i]);
  return !block.failed;
}
