/* One token a row from logits: greedy, temperature, top-k, top-p.
 * Every token has the integer weight W = round(2^30 exp((z - max z) / temperature)); sums of weights are
 * exact, so that neither threads nor instruction sets can change a draw. In the order of falling logit and
 * rising id top-k keeps the first k; top-p keeps the fewest first tokens whose weights sum to at least p
 * times the sum of what top-k left; the draw r = floor(random64 * total / 2^64) takes the token in whose
 * stretch of the running sum (by id) it falls. A token whose probability is below 2^-31 of the most probable
 * one's weighs nothing. Bytes: 4 n once for greedy; about 30 n from cache for top-p. Work: one exponential a
 * token; the borders are found by radix selection (11, 11 and 10 bits of the logit's order), never by
 * sorting. Determinism: exact integer arithmetic after the elementwise exponential. */
#include "kernels/base/rng.h"
#include "kernels/cpu/cpu.h"

enum { SAMPLE_BITS = 11, SAMPLE_BINS = 1 << SAMPLE_BITS, SAMPLE_COPIES = 4, SAMPLE_CHUNK = 256 };

/* Floats as unsigned integers in the same order; both zeros are one. */
KS_INLINE uint32_t sample_key(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* The largest of n > 0 values, or NaN when there is a NaN. */
static float sample_max(const float *x, int64_t n) {
  ks_v top = ks_v_set(-INFINITY), bad = ks_v_zero();
  int64_t j = 0;
  for (; j + KS_LANES <= n; j += KS_LANES) {
    ks_v v = ks_v_load(x + j);
    top = ks_v_max(v, top);
    bad = ks_v_select(ks_v_ne(v, v), v, bad);
  }
  float max = ks_v_max_lane(top), nan = ks_v_sum(bad);
  for (; j < n; j++) {
    max = x[j] > max ? x[j] : max;
    nan = x[j] != x[j] ? x[j] : nan;
  }
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

/* Fills w and returns its sum. */
static uint64_t sample_weights(const float *x, int64_t n, float max, float temperature, uint32_t *w) {
  const ks_v top = ks_v_set(max), heat = ks_v_set(temperature);
  for (int64_t j = 0; j < n; j += KS_LANES) {
    ks_v e = ks_v_exp(ks_v_div(ks_v_sub(ks_v_load_n(x + j, n - j), top), heat));
    e = ks_v_fma(e, ks_v_set(0x1p30f), ks_v_set(0.5f));
    ks_vi whole;
    KS_EACH_PART(i) whole.p[i] = __builtin_convertvector(e.p[i], ks_ipart);
    memcpy(w + j, &whole, (size_t)ks_min_i64(n - j, KS_LANES) * sizeof *w);
  }
  uint64_t total = 0;
  for (int64_t j = 0; j < n; j++)
    total += w[j];
  return total;
}

typedef struct {
  const float *x;
  uint32_t *w;                   /* [n] */
  uint32_t *list;                /* [n] scratch */
  uint64_t (*bins)[SAMPLE_BINS]; /* [SAMPLE_COPIES] scratch */
  int64_t n;
} sample_row;

/* The ids that still weigh something, in rising order. */
static int64_t sample_candidates(const sample_row *r) {
  int64_t n = 0, j = 0;
  for (; j + KS_LANES <= r->n; j += KS_LANES) {
    uint32_t any = 0;
    for (int c = 0; c < KS_LANES; c++)
      any |= r->w[j + c];
    if (!any) continue;
    for (int c = 0; c < KS_LANES; c++) {
      r->list[n] = (uint32_t)(j + c);
      n += r->w[j + c] != 0;
    }
  }
  for (; j < r->n; j++) {
    r->list[n] = (uint32_t)j;
    n += r->w[j] != 0;
  }
  return n;
}

/* Keeps the candidates that come first in the order until their weight (count: their number) reaches
 * `target`; the others' weights become 0. */
static void sample_keep(const sample_row *r, bool count, uint64_t target) {
  static const struct { int shift, bits; } digits[] = {{21, 11}, {10, 11}, {0, 10}};
  int64_t n = sample_candidates(r);
  uint32_t border = 0;
  uint64_t above = 0;
  for (int d = 0; d < 3; d++) {
    const int shift = digits[d].shift, n_bins = 1 << digits[d].bits;
    const uint32_t mask = (uint32_t)n_bins - 1;
    /* Neighbours often share a bin; copies keep such additions from waiting for each other. */
    const int copies = n < 4 * SAMPLE_BINS ? 1 : SAMPLE_COPIES;
    memset(r->bins, 0, (size_t)copies * sizeof *r->bins);
    for (int64_t i = 0; i < n; i++) {
      uint32_t id = r->list[i];
      r->bins[i & (copies - 1)][sample_key(r->x[id]) >> shift & mask] += count ? 1 : r->w[id];
    }
    for (int c = 1; c < copies; c++)
      for (int bin = 0; bin < n_bins; bin++)
        r->bins[0][bin] += r->bins[c][bin];
    int bin = n_bins;
    uint64_t mass = 0;
    do {
      above += mass;
      if (--bin < 0) return; /* all of it is less than the target */
      mass = r->bins[0][bin];
    } while (above + mass < target);
    border |= (uint32_t)bin << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
      r->list[kept] = r->list[i];
      kept += (sample_key(r->x[r->list[i]]) >> shift & mask) == (uint32_t)bin;
    }
    n = kept;
  }
  for (int64_t i = 0; i < n; i++) { /* equal logits: the lower ids */
    uint32_t id = r->list[i];
    if (above >= target)
      r->w[id] = 0;
    else
      above += count ? 1 : r->w[id];
  }
  for (int64_t j = 0; j < r->n; j++)
    r->w[j] = sample_key(r->x[j]) >= border ? r->w[j] : 0;
}

static uint64_t sample_total(const sample_row *r) {
  uint64_t total = 0;
  for (int64_t j = 0; j < r->n; j++)
    total += r->w[j];
  return total;
}

static void sample_keep_p(const sample_row *r, uint64_t total, float top_p) {
  double exact = (double)top_p * (double)total;
  uint64_t target = (uint64_t)exact;
  target += (double)target < exact;
  if (target >= total) return;
  /* All tokens of a weight below this one together cannot make up the rest: none of them is kept. */
  uint32_t least = (uint32_t)((total - target) / (uint64_t)r->n + 1);
  for (int64_t j = 0; j < r->n; j++)
    r->w[j] = r->w[j] >= least ? r->w[j] : 0;
  sample_keep(r, false, target);
}

static int32_t sample_draw(const sample_row *r, uint64_t total, uint64_t random) {
  uint64_t left = (uint64_t)(((__uint128_t)random * total) >> 64);
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
  float max = sample_max(r->x, r->n);
  if (!(__builtin_fabsf(max) < INFINITY)) return -1;
  if (s->temperature == 0) return sample_first_equal(r->x, r->n, max);
  uint64_t total = sample_weights(r->x, r->n, max, s->temperature, r->w);
  if (s->top_k > 0 && s->top_k < r->n) {
    sample_keep(r, true, (uint64_t)s->top_k);
    total = sample_total(r);
  }
  if (s->top_p < 1) {
    sample_keep_p(r, total, s->top_p);
    total = sample_total(r);
  }
  ks_philox_block b = ks_philox(s->key, 0, s->counter);
  return sample_draw(r, total, (uint64_t)b.v[1] << 32 | b.v[0]);
}

static ks_status sample(ks_ctx *ctx, const ks_sample_args *a) {
  const size_t bins_bytes = SAMPLE_COPIES * SAMPLE_BINS * sizeof(uint64_t);
  KS_TRY(ks_cpu_scratch_reserve(ctx, bins_bytes + 2 * (size_t)a->n_vocab * sizeof(uint32_t)));
#pragma omp parallel for num_threads(ks_cpu_threads(ctx, 4 * a->n_rows * a->n_vocab)) schedule(static)
  for (int64_t i = 0; i < a->n_rows; i++) {
    unsigned char *scratch = ks_cpu_scratch(ctx, omp_get_thread_num());
    uint32_t *w = (uint32_t *)(void *)(scratch + bins_bytes);
    sample_row row = {a->logits + i * a->n_vocab, w, w + a->n_vocab, (void *)scratch, a->n_vocab};
    a->tokens[i] = sample_one(&row, &a->samplers[i]);
  }
  for (int64_t i = 0; i < a->n_rows; i++)
    if (a->tokens[i] < 0)
      return KS_FAIL(KS_ENUMERIC,
                     "sample: the logits of row %lld hold a NaN or have no finite maximum; the model's "
                     "weights or its adapter are damaged or training diverged",
                     (long long)i);
  return KS_OK;
}
