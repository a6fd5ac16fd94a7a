/* One token a row from logits: greedy, temperature, top-k, top-p.
 *
 * Every token has the integer weight W = round(2^30 exp((z - max z) / temperature)); sums of weights are
 * exact, so that neither threads nor instruction sets can change a draw. In the order of falling logit and
 * rising id
 *   - top-k keeps the first k;
 *   - top-p keeps the fewest first tokens whose weights sum to at least p times the sum of what top-k left;
 *   - the draw r = floor(random64 * total / 2^64) takes the token in whose stretch of the running sum (by
 *     id) it falls.
 * A token whose probability is below 2^-31 of the most probable one's weighs nothing.
 *
 * Bytes: 4 n once for greedy; about 40 n from cache for top-p.
 *
 * Work: one exponential a token; the border of a truncation is found by a histogram over SAMPLE_BINS equal
 * stretches of logits and a radix selection inside one of them, never by sorting.
 *
 * Determinism: exact integer arithmetic after the elementwise exponential. */
#include "kernels/base/rng.h"
#include "kernels/cpu/cpu.h"
#include <math.h>

enum { SAMPLE_BINS = 2048, SAMPLE_COPIES = 4, SAMPLE_CHUNK = 256, SAMPLE_SPARSE = 1024 };

/* exp(-21.5) 2^30 + 1/2 < 1: from here on a token weighs nothing. */
#define SAMPLE_REACH 21.5f

/* Floats as unsigned integers in the same order; both zeros are one. */
KS_INLINE uint32_t sample_key(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* The largest of n > 0 values, or NaN when there is a NaN; and the smallest. */
static float sample_max(const float *x, int64_t n, float *smallest) {
  ks_v top = ks_v_set(-INFINITY), low = ks_v_set(INFINITY), bad = ks_v_zero();
  int64_t j = 0;
  for (; j + KS_LANES <= n; j += KS_LANES) {
    ks_v v = ks_v_load(x + j);
    top = ks_v_max(v, top);
    low = ks_v_min(v, low);
    bad = ks_v_select(ks_v_ne(v, v), v, bad);
  }
  float max = ks_v_max_lane(top), min = -ks_v_max_lane(ks_v_sub(ks_v_zero(), low)), nan = ks_v_sum(bad);
  for (; j < n; j++) {
    max = x[j] > max ? x[j] : max;
    min = x[j] < min ? x[j] : min;
    nan = x[j] != x[j] ? x[j] : nan;
  }
  *smallest = min;
  return nan != nan ? nan : max;
}

static int32_t sample_first_equal(const float *x, int64_t n, float value) {
  int64_t j = 0;
  for (; j + SAMPLE_CHUNK <= n; j += SAMPLE_CHUNK) {
    int any = 0;
    for (int64_t c = 0; c < SAMPLE_CHUNK; c++)
      any |= x[j + c] == value;
    if (any) break;
  }
  while (x[j] != value)
    j++;
  return (int32_t)j;
}

typedef uint16_t sample_u16 __attribute__((vector_size(KS_PART_LANES * 2)));

typedef struct {
  const float *x;
  int64_t n;
  uint64_t (*mass)[SAMPLE_BINS]; /* [SAMPLE_COPIES] scratch */
  uint32_t *w;                   /* [n]: weights */
  uint32_t *list;                /* [n] scratch: ids */
  uint16_t *bin;                 /* [n]: stretch of the logit, rising as the logit falls */
} sample_row;

/* Bytes of a row's memory; w and bin are written in whole vectors. */
static size_t sample_row_bytes(int64_t n) {
  const size_t rounded = (size_t)(n + KS_LANES - 1) / KS_LANES * KS_LANES;
  return SAMPLE_COPIES * SAMPLE_BINS * sizeof(uint64_t) + rounded * (2 * sizeof(uint32_t) + sizeof(uint16_t));
}

static sample_row sample_row_at(void *memory, const float *x, int64_t n) {
  const size_t rounded = (size_t)(n + KS_LANES - 1) / KS_LANES * KS_LANES;
  sample_row r = {.x = x, .n = n, .mass = memory};
  r.w = (uint32_t *)(void *)(r.mass + SAMPLE_COPIES);
  r.list = r.w + rounded;
  r.bin = (uint16_t *)(void *)(r.list + rounded);
  return r;
}

static uint64_t sample_total(const sample_row *r) {
  uint64_t total = 0;
  for (int64_t j = 0; j < r->n; j++)
    total += r->w[j];
  return total;
}

/* Weights and bins. */
static void sample_weights(const sample_row *r, float max, float min, float temperature) {
  const float range = fminf(max - min, SAMPLE_REACH * temperature);
  const ks_v top = ks_v_set(max), rate = ks_v_set(fminf(1 / temperature, 3e38f));
  const ks_v per_bin = ks_v_set(range > 0 ? fminf((SAMPLE_BINS - 1) / range, 3e38f) : 0.0f);
  const ks_v last = ks_v_set(SAMPLE_BINS - 1);
  for (int64_t j = 0; j < r->n; j += KS_LANES) {
    ks_v below = ks_v_sub(ks_v_load_n(r->x + j, r->n - j), top);
    ks_v e = ks_v_fma(ks_v_exp(ks_v_mul(below, rate)), ks_v_set(0x1p30f), ks_v_set(0.5f));
    ks_v b = ks_v_min(ks_v_mul(ks_v_sub(ks_v_zero(), below), per_bin), last); /* 0 * inf: the last */
    KS_EACH_PART(i) {
      ks_ipart w = __builtin_convertvector(e.p[i], ks_ipart);
      sample_u16 bin = __builtin_convertvector(__builtin_convertvector(b.p[i], ks_ipart), sample_u16);
      memcpy(r->w + j + i * KS_PART_LANES, &w, sizeof w);
      memcpy(r->bin + j + i * KS_PART_LANES, &bin, sizeof bin);
    }
  }
}

/* The ids that still weigh something, in rising order. */
static int64_t sample_candidates(const sample_row *r) {
  int64_t n = 0;
  for (int64_t j = 0; j < r->n; j += KS_LANES) {
    const int64_t end = ks_min_i64(j + KS_LANES, r->n);
    uint32_t any = 0;
    for (int64_t c = j; c < end; c++)
      any |= r->w[c];
    for (int64_t c = j; any && c < end; c++) {
      r->list[n] = (uint32_t)c;
      n += r->w[c] != 0;
    }
  }
  return n;
}

/* Finds the bin in which the target is reached, takes the weight of later bins and lists the ids of that one.
 * *above: the weight (or number) of the bins before it. Nothing to do when all are less than the target. */
static int64_t sample_border_bin(const sample_row *r, bool count, uint64_t target, uint64_t *above) {
  memset(r->mass, 0, SAMPLE_COPIES * sizeof *r->mass);
  for (int64_t j = 0; j < r->n; j++)
    r->mass[j % SAMPLE_COPIES][r->bin[j]] += count ? 1 : r->w[j];
  uint64_t mass = 0;
  int border = -1;
  do {
    *above += mass;
    if (++border == SAMPLE_BINS) return 0;
    mass = r->mass[0][border] + r->mass[1][border] + r->mass[2][border] + r->mass[3][border];
  } while (*above + mass < target);
  for (int64_t j = 0; j < r->n; j++)
    r->w[j] = r->bin[j] <= border ? r->w[j] : 0;
  int64_t n = 0;
  for (int64_t j = 0; j < r->n; j += KS_LANES) {
    const int64_t end = ks_min_i64(j + KS_LANES, r->n);
    int any = 0;
    for (int64_t c = j; c < end; c++)
      any |= r->bin[c] == border;
    for (int64_t c = j; any && c < end; c++) {
      r->list[n] = (uint32_t)c;
      n += r->bin[c] == border;
    }
  }
  return n;
}

/* Of the listed ids keeps those that come first in the order until with `above` the target is reached; the
 * others' weights become 0. Radix selection, eight bits of the key a pass, from the first byte in which keys
 * differ. */
static void sample_keep_listed(const sample_row *r, int64_t n, bool count, uint64_t target, uint64_t above) {
  uint32_t any = 0, common = UINT32_MAX;
  for (int64_t i = 0; i < n; i++) {
    uint32_t key = sample_key(r->x[r->list[i]]);
    any |= key, common &= key;
  }
  const uint32_t differ = any ^ common;
  int shift = differ >> 24 ? 24 : differ >> 16 ? 16 : differ >> 8 ? 8 : differ ? 0 : -8;
  uint64_t border = (uint64_t)common >> (shift + 8) << (shift + 8);
  for (; shift >= 0; shift -= 8) {
    uint64_t mass[256] = {0};
    for (int64_t i = 0; i < n; i++) {
      const uint32_t id = r->list[i];
      const uint64_t key = sample_key(r->x[id]), one = count ? 1 : r->w[id];
      mass[key >> shift & 255] += key >> (shift + 8) == border >> (shift + 8) ? one : 0;
    }
    uint64_t byte = 255;
    for (; byte > 0 && above + mass[byte] < target; byte--)
      above += mass[byte];
    border |= byte << shift;
  }
  for (int64_t i = 0; i < n; i++) { /* equal logits: the lower ids */
    const uint32_t id = r->list[i], key = sample_key(r->x[id]);
    if (key > border) continue;
    if (key < border || above >= target)
      r->w[id] = 0;
    else
      above += count ? 1 : r->w[id];
  }
}

/* Keeps the tokens that come first in the order until their weight (count: their number) reaches the target;
 * the others' weights become 0. sparse: few weigh anything. */
static void sample_keep(const sample_row *r, bool count, uint64_t target, bool sparse) {
  uint64_t above = 0;
  int64_t n = sparse ? sample_candidates(r) : sample_border_bin(r, count, target, &above);
  if (n > 0) sample_keep_listed(r, n, count, target, above);
}

static void sample_keep_p(const sample_row *r, float top_p, bool sparse) {
  const uint64_t total = sample_total(r);
  const double exact = (double)top_p * (double)total;
  uint64_t target = (uint64_t)exact;
  target += (double)target < exact;
  if (target < total) sample_keep(r, false, target, sparse);
}

static int32_t sample_draw(const sample_row *r, uint64_t random) {
  uint64_t left = (uint64_t)(((__uint128_t)random * sample_total(r)) >> 64);
  int64_t j = 0;
  for (; j < r->n; j += SAMPLE_CHUNK) {
    int64_t end = ks_min_i64(j + SAMPLE_CHUNK, r->n);
    uint64_t sum = 0;
    for (int64_t c = j; c < end; c++)
      sum += r->w[c];
    if (left < sum) break;
    left -= sum;
  }
  for (;; j++) {
    if (left < r->w[j]) return (int32_t)j;
    left -= r->w[j];
  }
}

/* -1: no finite maximum. */
static int32_t sample_one(const sample_row *r, const ks_sampler *s) {
  float min, max = sample_max(r->x, r->n, &min);
  if (!(fabsf(max) < INFINITY)) return -1;
  if (s->temperature == 0) return sample_first_equal(r->x, r->n, max);
  sample_weights(r, max, min, s->temperature);
  bool sparse = r->n <= SAMPLE_SPARSE;
  if (s->top_k > 0 && s->top_k < r->n) {
    sample_keep(r, true, (uint64_t)s->top_k, sparse);
    sparse |= s->top_k <= SAMPLE_SPARSE;
  }
  if (s->top_p < 1) sample_keep_p(r, s->top_p, sparse);
  ks_philox_block b = ks_philox(s->key, 0, s->counter);
  return sample_draw(r, (uint64_t)b.v[1] << 32 | b.v[0]);
}

static ks_status sample(ks_ctx *ctx, const ks_sample_args *a) {
  KS_TRY(ks_cpu_scratch_reserve(ctx, sample_row_bytes(a->n_vocab)));
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 4 * a->n_rows * a->n_vocab)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    const float *x = a->logits + i * a->n_vocab;
    sample_row row = sample_row_at(ks_cpu_scratch(ctx, omp_get_thread_num()), x, a->n_vocab);
    a->tokens[i] = sample_one(&row, &a->samplers[i]);
    if (a->drawn) a->drawn[i] = a->tokens[i];
  }
  return KS_OK;
}
