/* Hopper's barriers in shared memory, bulk copies and products of a warpgroup, after the text of the PTX ISA and not after the
 * kernels that use them. Everything asynchronous happens as late as it may or at once, by the order of threads:
 *
 *            copies                                         products read shared memory
 *   order 0  when no thread can run otherwise, oldest first in wgmma.wait_group
 *   order 1  when they are issued                           in wgmma.wait_group
 *   others   when no thread can run otherwise, any first    when they are issued
 *
 * so that a stage read before its copy is done, and one that is overwritten while products may still read it, both show.
 * Between the first product and the wait the sums are NaN; whoever writes them meanwhile fails the launch.
 *
 * This file is compiled without sanitizers, as the products' loops are the inner ones; it checks what it touches itself. */
#include "ks_shim_threads.h"
#include "runtime.h"
#include "threads.h"
#include <cuda.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 1024, GROUP = 128, MAX_N = 256, K = 16, LINE = 128, ATOM = 1024 };

/* ---------------------------------------------------------------- barriers */

/* The 64 bits of a barrier: bits 0-18 arrivals that are missing in this phase, 19-37 arrivals a phase, 38-58 bytes that are
 * missing plus 2^20, 59 the phase's parity, 60-63 the mark of one that was initialised. */
enum { COUNT_BITS = 19, TX_AT = 38, TX_BITS = 21, PHASE_AT = 59, MARK_AT = 60, MARK = 10 };
#define COUNT_MASK (((uint64_t)1 << COUNT_BITS) - 1)
#define TX_ZERO    ((int64_t)1 << 20)

static uint64_t *usable(const void *b, bool is_new) {
  const uint32_t address = ks_shim_smem_address(b);
  uint64_t *p = ks_shim_smem_pointer(address, 8);
  if (address % 8 != 0) ks_shim_fail("a barrier at address %u, no multiple of 8", address);
  if (!is_new && *p >> MARK_AT != MARK) ks_shim_fail("a barrier that was not initialised");
  return p;
}

static uint64_t make(uint64_t missing, uint64_t arrivals, int64_t tx, uint64_t phase) {
  return missing | arrivals << COUNT_BITS | (uint64_t)(tx + TX_ZERO) << TX_AT | phase << PHASE_AT |
         (uint64_t)MARK << MARK_AT;
}
static uint64_t missing_of(uint64_t b) {
  return b & COUNT_MASK;
}
static uint64_t arrivals_of(uint64_t b) {
  return b >> COUNT_BITS & COUNT_MASK;
}
static int64_t tx_of(uint64_t b) {
  return (int64_t)(b >> TX_AT & (((uint64_t)1 << TX_BITS) - 1)) - TX_ZERO;
}
static uint64_t phase_of(uint64_t b) {
  return b >> PHASE_AT & 1;
}

static void change(uint64_t *b, uint64_t arrivals, int64_t bytes) {
  const uint64_t missing = missing_of(*b), all = arrivals_of(*b);
  const int64_t tx = tx_of(*b) + bytes;
  if (missing < arrivals) ks_shim_fail("a barrier of %llu arrivals got one more", (unsigned long long)all);
  if (tx <= -TX_ZERO || tx >= TX_ZERO) ks_shim_fail("a barrier that misses %lld bytes", (long long)tx);
  if (missing == arrivals && tx == 0)
    *b = make(all, all, 0, phase_of(*b) ^ 1);
  else
    *b = make(missing - arrivals, all, tx, phase_of(*b));
}

void ks_shim_barrier_init(uint64_t *b, uint32_t arrivals) {
  uint64_t *p = usable(b, true);
  if (arrivals < 1 || arrivals > COUNT_MASK) ks_shim_fail("a barrier of %u arrivals", arrivals);
  *p = make(arrivals, arrivals, 0, 0);
}

/* The bytes are announced first. */
void ks_shim_barrier_arrive(uint64_t *b, uint32_t bytes) {
  uint64_t *p = usable(b, false);
  change(p, 1, (int64_t)bytes);
}

bool ks_shim_barrier_is_past(const void *b, unsigned parity) {
  uint64_t now;
  memcpy(&now, b, sizeof now);
  return phase_of(now) != (parity & 1u);
}

void ks_shim_barrier_wait(uint64_t *b, uint32_t parity) {
  if (parity > 1) ks_shim_fail("a barrier's parity is 0 or 1, not %u", parity);
  ks_shim_wait_barrier(usable(b, false), parity);
}

/* ---------------------------------------------------------------- tensor maps */

#define MAP_MARK 0x6b735f74656e736fu
enum { MAP_MARKED, MAP_BASE, MAP_COLS, MAP_ROWS, MAP_STRIDE, MAP_BOX_COLS, MAP_BOX_ROWS };

/* Two-dimensional bf16 with 128-byte swizzle is all that is known here. */
static CUresult encode_tiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                             const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                             const cuuint32_t *step, CUtensorMapInterleave interleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                             CUtensorMapFloatOOBfill fill) {
  const bool is_known = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 &&
                        interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                        swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                        promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  if (!is_known || (uintptr_t)map % 64 || (uintptr_t)base % 16 || stride[0] % 16 || stride[0] >> 40)
    return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; i++)
    if (size[i] < 1 || size[i] >> 32 || box[i] < 1 || box[i] > 256 || step[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * 2 > LINE || box[0] * 2 % 16 || stride[0] < size[0] * 2) return CUDA_ERROR_INVALID_VALUE;
  if (!ks_shim_is_device(base, (size_t)(stride[0] * (size[1] - 1) + size[0] * 2)))
    return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  const cuuint64_t words[] = {MAP_MARK, (cuuint64_t)(uintptr_t)base, size[0], size[1], stride[0], box[0],
                              box[1]};
  memcpy(map->opaque, words, sizeof words);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **func, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  CUresult (*const known)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                          const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                          CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) = encode_tiled;
  const bool is_known =
      strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000 && flags == cudaEnableDefault;
  *func = NULL;
  if (is_known) memcpy(func, &known, sizeof *func);
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return ks_shim_result(cudaSuccess);
}

/* ---------------------------------------------------------------- copies */

typedef struct {
  char *tile, *async; /* as ordinary loads see it, and products */
  uint32_t address;   /* of tile */
  uint64_t *barrier;
  uint64_t map[16];
  int64_t col, row;
} bulk_copy;
static bulk_copy *copies;
static size_t n_copies, cap_copies;

/* Where the byte at `address` of a tile lies when its pieces are swizzled: bits 4 to 6 take on bits 7 to 9. */
static uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7u) << 4;
}

static void copy_box(const bulk_copy *c) {
  const int64_t box_cols = (int64_t)c->map[MAP_BOX_COLS], box_rows = (int64_t)c->map[MAP_BOX_ROWS];
  for (int64_t r = 0; r < box_rows; r++) {
    const bool is_row = c->row + r >= 0 && c->row + r < (int64_t)c->map[MAP_ROWS];
    const char *from =
        (const char *)(uintptr_t)c->map[MAP_BASE] + (is_row ? (c->row + r) * (int64_t)c->map[MAP_STRIDE] : 0);
    if (is_row && __asan_region_is_poisoned((void *)(uintptr_t)from, c->map[MAP_COLS] * 2))
      ks_shim_fail("a bulk copy reads memory that was freed");
    for (int64_t j = 0; j < box_cols; j++) {
      const int64_t col = c->col + j;
      const uint32_t at = swizzled(c->address + (uint32_t)(r * LINE + j * 2)) - c->address;
      if (is_row && col >= 0 && col < (int64_t)c->map[MAP_COLS])
        memcpy(c->tile + at, from + col * 2, 2);
      else
        memset(c->tile + at, 0, 2);
      memcpy(c->async + at, c->tile + at, 2);
    }
  }
  change(c->barrier, 0, -box_cols * box_rows * 2);
}

void ks_shim_tma_load(void *tile, const void *map, int col, int row, uint64_t *b) {
  bulk_copy c = {.address = ks_shim_smem_address(tile), .barrier = usable(b, false), .col = col, .row = row};
  memcpy(c.map, map, sizeof c.map);
  if (c.map[MAP_MARKED] != MAP_MARK) ks_shim_fail("a bulk copy by something that is no tensor map");
  if ((uintptr_t)map % 64) ks_shim_fail("a tensor map at %p, no multiple of 64", map);
  if (c.address % ATOM) ks_shim_fail("a swizzled tile at address %u, no multiple of %d", c.address, ATOM);
  if (c.map[MAP_BOX_COLS] * 2 != LINE) ks_shim_fail("a swizzled box of lines that are not %d bytes", LINE);
  c.tile = ks_shim_smem_pointer(c.address, c.map[MAP_BOX_ROWS] * LINE);
  c.async = ks_shim_smem_async(c.address, c.map[MAP_BOX_ROWS] * LINE);
  if (ks_shim_order() == 1) {
    copy_box(&c);
    return;
  }
  memset(c.tile, 0xff, c.map[MAP_BOX_ROWS] * LINE);
  memset(c.async, 0xff, c.map[MAP_BOX_ROWS] * LINE);
  if (n_copies == cap_copies) {
    const size_t cap = cap_copies ? 2 * cap_copies : 32;
    bulk_copy *grown = realloc(copies, cap * sizeof *grown);
    if (!grown) ks_shim_fail("no memory for bulk copies");
    copies = grown;
    cap_copies = cap;
  }
  copies[n_copies++] = c;
}

bool ks_shim_hopper_advance(void) {
  static uint32_t random;
  if (n_copies == 0) return false;
  random = random * 1664525u + 1013904223u;
  const size_t i = ks_shim_order() == 0 ? 0 : (random >> 8) % n_copies;
  const bulk_copy c = copies[i];
  memmove(copies + i, copies + i + 1, (--n_copies - i) * sizeof c);
  copy_box(&c);
  return true;
}

/* ---------------------------------------------------------------- products */

typedef struct {
  uint64_t a, b;
  int mn_major, keep, group;
  bool is_done;
} product;
/* A thread's products under way, and its sums. */
typedef struct {
  product *products;
  int n_products, cap_products, group;
  bool is_fenced;
  float *acc; /* NULL: none under way */
  int n_sums;
  float sums[MAX_N / 2];
  uint64_t history; /* of all that was issued */
} asynchronous;
static asynchronous threads[MAX_THREADS];
static int n_threads;

static float bf16(uint16_t bits) {
  const uint32_t u = (uint32_t)bits << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

/* What a descriptor says; everything but 128-byte swizzle without base offset fails. */
typedef struct {
  uint32_t start, leading, stride;
} layout;
static layout layout_of(uint64_t d) {
  const layout l = {(uint32_t)(d & 0x3fffu) << 4, (uint32_t)(d >> 16 & 0x3fffu) << 4,
                    (uint32_t)(d >> 32 & 0x3fffu) << 4};
  if (d >> 62 != 1)
    ks_shim_fail("a descriptor of swizzle mode %d; only 1, 128 bytes, is known", (int)(d >> 62));
  if (d >> 49 & 7) ks_shim_fail("a descriptor with base offset %d", (int)(d >> 49 & 7));
  if (d & 0x3ff1c000c000c000u)
    ks_shim_fail("a descriptor with bits that mean nothing: %016llx", (unsigned long long)d);
  if (l.stride % ATOM) ks_shim_fail("a descriptor's stride of %u bytes, no multiple of %d", l.stride, ATOM);
  return l;
}

/* 16 of k of one line (row of A or column of B) of a K-major tile of n lines. */
typedef struct {
  const char *p; /* at `first` */
  uint32_t first, start, leading, stride;
} tile;
static tile tile_k(uint64_t d, uint32_t n) {
  const layout l = layout_of(d);
  if (l.start % ATOM + 2 * K > LINE || l.start % (2 * K))
    ks_shim_fail("a K-major tile at address %u: not in the first line of an atom", l.start);
  const uint32_t first = l.start - l.start % ATOM;
  return (tile){ks_shim_smem_async(first, (n / 8 - 1) * l.stride + ATOM), first, l.start, l.leading,
                l.stride};
}
static void line_k(float *out, const tile *t, uint32_t line) {
  for (uint32_t i = 0; i < 2; i++) {
    uint16_t piece[8];
    memcpy(piece, t->p + (swizzled(t->start + line / 8 * t->stride + line % 8 * LINE + 16 * i) - t->first),
           16);
    for (int j = 0; j < 8; j++)
      out[8 * i + (uint32_t)j] = bf16(piece[j]);
  }
}
static tile tile_mn(uint64_t d, uint32_t n) {
  const layout l = layout_of(d);
  if (l.start % ATOM) ks_shim_fail("an MN-major tile at address %u, no multiple of %d", l.start, ATOM);
  if (l.leading % ATOM)
    ks_shim_fail("a descriptor's leading offset of %u bytes, no multiple of %d", l.leading, ATOM);
  return (tile){ks_shim_smem_async(l.start, (n / 64 - 1) * l.leading + (K / 8 - 1) * l.stride + ATOM),
                l.start, l.start, l.leading, l.stride};
}
/* Columns n and n + 1 at k; n is even. */
static void pair_mn(float out[2], const tile *t, uint32_t k, uint32_t n) {
  uint16_t pair[2];
  memcpy(pair,
         t->p + (swizzled(t->start + n / 64 * t->leading + k / 8 * t->stride + k % 8 * LINE + n % 64 * 2) -
                 t->first),
         4);
  out[0] = bf16(pair[0]);
  out[1] = bf16(pair[1]);
}

/* The thread's own sums of one product: rows 16 w + g and + 8, columns 8 j + 2 t and + 1. Eight products are added at once, as by
 * ks_mma_bf16. */
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void
multiply(asynchronous *self, int thread, const product *p) {
  const uint32_t warp = (uint32_t)thread % GROUP / 32, lane = (uint32_t)thread % 32, g = lane / 4,
                 t = lane % 4;
  const uint32_t n = (uint32_t)self->n_sums * 2, n_mine = n / 4;
  float a[2][K], b[K][MAX_N / 4];
  const tile ta = tile_k(p->a, 64), tb = p->mn_major ? tile_mn(p->b, n) : tile_k(p->b, n);
  line_k(a[0], &ta, 16 * warp + g);
  line_k(a[1], &ta, 16 * warp + g + 8);
  for (uint32_t j = 0; j < n_mine; j++) {
    float line[K];
    const uint32_t col = j / 2 * 8 + 2 * t + j % 2;
    if (p->mn_major) {
      for (uint32_t k = 0; k < K && j % 2 == 0; k++)
        pair_mn(&b[k][j], &tb, k, col);
      continue;
    }
    line_k(line, &tb, col);
    for (int k = 0; k < K; k++)
      b[k][j] = line[k];
  }
  for (int h = 0; h < 2; h++) {
    double sum[MAX_N / 4];
    for (uint32_t j = 0; j < n_mine; j++)
      sum[j] = p->keep ? (double)self->sums[j / 2 * 4 + (uint32_t)(2 * h) + j % 2] : 0;
    for (int half = 0; half < K; half += 8) {
      for (int k = half; k < half + 8; k++)
        for (uint32_t j = 0; j < n_mine; j++)
          sum[j] += (double)a[h][k] * (double)b[k][j];
      for (uint32_t j = 0; j < n_mine; j++)
        sum[j] = (double)ks_shim_truncated(sum[j]);
    }
    for (uint32_t j = 0; j < n_mine; j++)
      self->sums[j / 2 * 4 + (uint32_t)(2 * h) + j % 2] = (float)sum[j];
  }
}

static void check_untouched(const asynchronous *self) {
  const unsigned char *p = (const unsigned char *)self->acc;
  for (size_t i = 0; i < (size_t)self->n_sums * sizeof(float); i++)
    if (p[i] != 0xff) ks_shim_fail("sums were written while products are under way");
}

static void remember(asynchronous *self, uint64_t what) {
  self->history = (self->history ^ what) * 0x9e3779b97f4a7c15u;
  self->history ^= self->history >> 29;
}

void ks_shim_wgmma_fence(const float *acc, int n_sums) {
  asynchronous *self = &threads[ks_shim_thread()];
  self->is_fenced = true;
  if (!self->acc) memcpy(self->sums, acc, (size_t)n_sums * sizeof *acc);
}

void ks_shim_wgmma(float *acc, int n_sums, uint64_t a, uint64_t b, int mn_major, int keep) {
  const int number = ks_shim_thread();
  asynchronous *self = &threads[number];
  if ((number / GROUP + 1) * GROUP > n_threads) ks_shim_fail("wgmma in a warpgroup that is not whole");
  if (!self->is_fenced) ks_shim_fail("wgmma without wgmma.fence after its sums were free to be used");
  if (self->acc && (self->acc != acc || self->n_sums != n_sums))
    ks_shim_fail("products with two sets of sums under way: not known here");
  (void)layout_of(a), (void)layout_of(b);
  if (!self->acc) {
    if (memcmp(self->sums, acc, (size_t)n_sums * sizeof *acc) != 0)
      ks_shim_fail("sums were written between wgmma.fence and the first product");
    self->acc = acc;
    self->n_sums = n_sums;
    memset(acc, 0xff, (size_t)n_sums * sizeof *acc);
  }
  check_untouched(self);
  if (self->n_products == self->cap_products) {
    const int cap = self->cap_products ? 2 * self->cap_products : 16;
    product *grown = realloc(self->products, (size_t)cap * sizeof *grown);
    if (!grown) ks_shim_fail("no memory for products");
    self->products = grown;
    self->cap_products = cap;
  }
  product *p = &self->products[self->n_products++];
  *p = (product){a, b, mn_major, keep, self->group, ks_shim_order() >= 2};
  if (p->is_done) multiply(self, number, p);
  remember(self, a), remember(self, b),
      remember(self, (uint64_t)(mn_major * 4 + (keep != 0) * 2 + n_sums * 8 + 1));
}

void ks_shim_wgmma_commit(void) {
  asynchronous *self = &threads[ks_shim_thread()];
  self->group++;
  remember(self, 2);
}

void ks_shim_wgmma_wait(int n_left) {
  const int number = ks_shim_thread();
  asynchronous *self = &threads[number];
  int n = 0;
  remember(self, (uint64_t)n_left * 4 + 3);
  for (int i = 0; i < self->n_products; i++) {
    const product p = self->products[i];
    if (p.group >= self->group - n_left)
      self->products[n++] = p;
    else if (!p.is_done)
      multiply(self, number, &p);
  }
  self->n_products = n;
  if (n || !self->acc) return;
  check_untouched(self);
  memcpy(self->acc, self->sums, (size_t)self->n_sums * sizeof(float));
  self->acc = NULL;
  self->is_fenced = false;
}

/* ---------------------------------------------------------------- blocks */

void ks_shim_hopper_begin(int n) {
  n_threads = n;
  n_copies = 0;
  for (int i = 0; i < n; i++) {
    asynchronous *t = &threads[i];
    t->n_products = t->group = 0;
    t->is_fenced = false;
    t->acc = NULL;
    t->history = 0;
  }
}

const char *ks_shim_hopper_end(void) {
  if (n_copies) return "the block ends with bulk copies under way";
  for (int i = 0; i < n_threads; i++) {
    if (threads[i].acc) return "the block ends with products under way";
    if (threads[i].history != threads[i - i % GROUP].history)
      return "threads of a warpgroup issued different products";
  }
  return NULL;
}
