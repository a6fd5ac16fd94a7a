/* What the tensor-core kernels of adapters share: the maps of a group, and the jobs of a launch, each of which reads one array
 * for some of the maps.
 *
 *                  a job for        reads    ranks of     makes
 *   shrink         all maps         x        A            u          backward: each map, dy, B, v
 *   gradient       each map         dy       u            grad_b_t   and one for all maps: x, v, grad_a
 *   term           each map         u        B            y          backward: maps of one dx, v, A, dx
 */
#ifndef KS_CUDA_LORA_CUH
#define KS_CUDA_LORA_CUH

#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/tile.cuh"

enum {
  LORA_WARPS = 4,
  LORA_THREADS = LORA_WARPS * KS_WARP,
  LORA_MAX_JOBS = KS_LINEARS_MAX + 1,
  LORA_TILE_HALVES = 2, /* shrink may do a tile in two blocks */
  LORA_SLICE = 128      /* columns of a block of the gradient and of the term */
};

struct lora_map {
  const lora_seg *segs;
  ks_bf16 *u, *v;
  const uint8_t *mask;
  int64_t u_stride;
  int64_t max_rank;
};
struct lora_job {
  const ks_bf16 *z; /* read: [n_rows, n_cols]; of a term: NULL, or what is added */
  ks_bf16 *y;       /* of a term */
  float *partial;
  int64_t n_cols;
  int32_t maps;  /* bits */
  int32_t of_b;  /* B's side: x and y are those of its product */
  int32_t ranks; /* of its maps, in eights (in sixteens: of a term) */
  int32_t masked;
};
/* No padding: launches are compared byte by byte. */
struct lora_work {
  const lora_item *tiles, *chunks;
  uint32_t *counters;
  int64_t mask_stride, n_rows, n_segs;
  float keep;
  int32_t n_jobs;
  lora_map map[KS_LINEARS_MAX];
  lora_job job[LORA_MAX_JOBS];
};

/* ---------------------------------------------------------------- host */

static inline int32_t lora_units(int64_t rank, int64_t unit) {
  return (int32_t)((rank + unit - 1) / unit);
}
/* Eights of ranks that a block holds. */
static inline int lora_width(int32_t eights) {
  return eights <= 1 ? 1 : eights <= 3 ? 3 : 8;
}
static inline int64_t lora_blocks_of(int32_t eights) {
  return (eights + lora_width(eights) - 1) / lora_width(eights);
}

static inline int32_t lora_most_ranks(const lora_work &w) {
  int32_t most = 0;
  for (int i = 0; i < w.n_jobs; i++)
    if (w.job[i].ranks > most) most = w.job[i].ranks;
  return most;
}
/* One more map for a job. */
static inline void lora_add(lora_job *job, const lora_group *g, int64_t map, int64_t unit) {
  job->maps |= 1 << map;
  job->ranks += lora_units(g->of[map].max_rank, unit);
}

static inline lora_work lora_work_of(const ks_linear_args *parts, const lora_group *g) {
  lora_work w = {};
  w.tiles = g->of[0].tiles;
  w.chunks = g->of[0].chunks;
  w.counters = g->of[0].counters;
  w.mask_stride = g->of[0].mask_stride;
  w.n_rows = g->of[0].n_rows;
  w.n_segs = g->of[0].n_segs;
  w.keep = g->of[0].keep;
  for (int64_t i = 0; i < g->n; i++)
    w.map[i] = {g->of[i].segs, (ks_bf16 *)parts[i].u, (ks_bf16 *)parts[i].v,
                g->of[i].mask, parts[i].u_stride,     g->of[i].max_rank};
  return w;
}

/* ---------------------------------------------------------------- device */

/* Where unit j (of `unit` ranks) of a job's maps is. */
struct lora_place {
  int map, rank0;
};
KS_DEVICE lora_place lora_place_of(const lora_work &w, const lora_job &job, int j, int unit) {
#pragma unroll
  for (int i = 0; i < KS_LINEARS_MAX; i++) {
    const int n = job.maps >> i & 1 ? ((int)w.map[i].max_rank + unit - 1) / unit : 0;
    if (j < n) return {i, j * unit};
    j -= n;
  }
  return {-1, 0};
}

/* All ones in each half whose byte of `bytes` (0 and 1; UPPER: 2 and 3) has its highest bit set. */
template <bool UPPER> KS_DEVICE uint32_t lora_halves(uint32_t bytes) {
#ifdef __CUDA_ARCH__
  uint32_t halves;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(halves) : "r"(bytes), "n"(UPPER ? 0xbbaa : 0x9988));
  return halves;
#else
  return tile_select(bytes >> (UPPER ? 23 : 7), bytes >> (UPPER ? 31 : 15));
#endif
}
/* An operand of a product under bit q of its mask: bytes 0 and 1 of mask[h] are of the halves of a[2 h], bytes 2 and 3 of those of
 * a[2 h + 1]. */
KS_DEVICE void lora_mask(uint32_t kept[4], const uint32_t a[4], const uint32_t mask[2], int q) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t bytes = mask[h] << (7 - q);
    kept[2 * h] = a[2 * h] & lora_halves<false>(bytes);
    kept[2 * h + 1] = a[2 * h + 1] & lora_halves<true>(bytes);
  }
}

#endif
