/* Streaming k-center within the storage budget: the doubling algorithm (Charikar, Chekuri, Feder, Motwani
 * 1997) under d = 1 - cosine.
 *
 * An arrival farther than r from every centre becomes a centre. When that finds no bin, r doubles (its first
 * value is twice the smallest distance among centres and arrival) and centres within r of an older centre are
 * merged into it, again and again, until a bin is to be had or the arrival itself lies within r of a centre.
 * A merged centre stays in its bin, as a spare, until a new centre needs the bin: the storage budget is used
 * to the full, the centres alone decide.
 *
 * Bound: sqrt(2 d) is the distance between the two directions, a metric in which r grows by sqrt(2) at a
 * time. Every arrival then lies within c (1 + 1/sqrt(2) + 1/2 + ...) < 3.42 c of a centre, c = sqrt(2 r), and
 * no choice of as many centres does better than c / (2 sqrt(2)): within a factor 9.7 of the best. (Doubling
 * the chord itself would bound it by 8, in coarser steps.)
 *
 * Ties and duplicates: a distance equal to r is not farther; distances up to the rounding error of a float32
 * cosine, (4 + sqrt(n_dim)) 2^-24, count as 0, so that an exact repeat is dropped. A zero embedding lies at
 * distance 1 from everything, itself included. An embedding with NaN or infinity has no distance: dropped.
 * Scores are not read. When the buffer is cleared, r starts anew. */
#include "core/select/bytes.h"
#include "core/select/select.h"

typedef struct {
  ks_ctx *ctx;
  int64_t n_bins, n_dim;
  double r, rounding;
  bool *spare;       /* [n_bins]: merged away; means nothing for a free bin */
  float *similarity; /* backend memory [n_bins] */
  float *host;       /* [n_bins] */
  double *distance;  /* [n_bins]: of the arrival to each centre */
} k_center;

static void destroy(void *state) {
  k_center *k = state;
  ks_mem_free(k->ctx, k->similarity);
  free(k->spare);
  free(k->host);
  free(k->distance);
  free(k);
}

static ks_status create(const ks_policy_params *params, void **state) {
  k_center *k = NULL;
  KS_TRY(ks_alloc_array(&k, 1, sizeof *k, "policy k_center"));
  k->ctx = params->ctx;
  k->n_bins = params->n_bins;
  k->n_dim = params->n_dim;
  k->rounding = (4.0 + sqrt((double)k->n_dim)) * 0x1p-24;
  size_t n = (size_t)params->n_bins;
  void *similarity = NULL;
  ks_status status = ks_alloc_array(&k->spare, n, sizeof *k->spare, "policy k_center: spare bins");
  if (status == KS_OK) status = ks_alloc_array(&k->host, n, sizeof *k->host, "policy k_center: similarities");
  if (status == KS_OK)
    status = ks_alloc_array(&k->distance, n, sizeof *k->distance, "policy k_center: distances");
  if (status == KS_OK) status = ks_mem_alloc(k->ctx, n * sizeof(float), &similarity);
  k->similarity = similarity;
  if (status != KS_OK) {
    destroy(k);
    return status;
  }
  *state = k;
  return KS_OK;
}

static bool is_centre(const k_center *k, const ks_buffer *b, int64_t i) {
  return b->bins[i].used && !k->spare[i];
}

/* Cosines of an embedding with rows 0 .. n - 1 of `rows`, in k->host. */
static ks_status similarities(k_center *k, const float *embedding, const float *rows, int64_t n) {
  const ks_similarity_args args = {
      .q = embedding, .k = rows, .n_q = 1, .n_k = n, .n_cols = k->n_dim, .metric = KS_METRIC_COSINE};
  KS_TRY(ks_similarity(k->ctx, &args, k->similarity));
  return ks_mem_download(k->ctx, k->host, k->similarity, (size_t)n * sizeof *k->host);
}

/* What cannot be told apart, for rounding or because products overflowed, is at distance 0. */
static double distance_of(const k_center *k, float similarity) {
  double d = 1.0 - (double)similarity;
  return isfinite(similarity) && d > k->rounding ? d : 0.0;
}

/* Distances from an embedding to every centre; INFINITY where there is none. */
static ks_status centre_distances(k_center *k, const ks_buffer *b, const float *embedding, double *out) {
  int64_t n = b->n_bins;
  while (n > 0 && !b->bins[n - 1].used)
    n--;
  if (n > 0) KS_TRY(similarities(k, embedding, b->embeddings, n));
  for (int64_t i = 0; i < b->n_bins; i++)
    out[i] = is_centre(k, b, i) ? distance_of(k, k->host[i]) : INFINITY;
  return KS_OK;
}

static double smallest(const double *v, int64_t n) {
  double least = INFINITY;
  for (int64_t i = 0; i < n; i++)
    if (v[i] < least) least = v[i];
  return least;
}

static ks_status smallest_between_centres(k_center *k, const ks_buffer *b, double *row, double *least) {
  for (int64_t i = 0; i < b->n_bins; i++) {
    if (!is_centre(k, b, i)) continue;
    KS_TRY(centre_distances(k, b, b->embeddings + i * b->n_dim, row));
    row[i] = INFINITY;
    double d = smallest(row, b->n_bins);
    if (d < *least) *least = d;
  }
  return KS_OK;
}

/* Centres within r of an older centre become spares; the oldest are looked at first. */
static ks_status merge(k_center *k, const ks_buffer *b, double *row) {
  int64_t last = -1;
  for (;;) {
    int64_t next = -1;
    for (int64_t i = 0; i < b->n_bins; i++)
      if (is_centre(k, b, i) && b->bins[i].arrival > last &&
          (next < 0 || b->bins[i].arrival < b->bins[next].arrival))
        next = i;
    if (next < 0) return KS_OK;
    last = b->bins[next].arrival;
    KS_TRY(centre_distances(k, b, b->embeddings + next * b->n_dim, row));
    for (int64_t i = 0; i < b->n_bins; i++)
      if (b->bins[i].arrival > last && row[i] <= k->r) k->spare[i] = true;
  }
}

static int64_t find_spare(const k_center *k, const ks_buffer *b) {
  for (int64_t i = 0; i < b->n_bins; i++)
    if (b->bins[i].used && k->spare[i]) return i;
  return -1;
}

/* Doubles r until a centre gives its bin or the arrival, whose distances k->distance holds, is within r of
 * one. */
static ks_status double_radius(k_center *k, const ks_buffer *b) {
  double *row = NULL;
  KS_TRY(ks_alloc_array(&row, (size_t)b->n_bins, sizeof *row, "policy k_center: distances"));
  ks_status status = KS_OK;
  if (k->r == 0) {
    k->r = smallest(k->distance, b->n_bins);
    status = smallest_between_centres(k, b, row, &k->r);
    if (k->r < k->rounding) k->r = k->rounding; /* whatever was restored: doubling it must come to an end */
  }
  while (status == KS_OK && find_spare(k, b) < 0 && smallest(k->distance, b->n_bins) > k->r) {
    k->r *= 2;
    status = merge(k, b, row);
    for (int64_t i = 0; i < b->n_bins; i++)
      if (k->spare[i]) k->distance[i] = INFINITY;
  }
  free(row);
  return status;
}

static ks_status offer(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out) {
  (void)rng;
  k_center *k = state;
  *out = (ks_decision){.keep = false, .slot = KS_SLOT_FREE};
  KS_TRY(similarities(k, a->embedding, a->embedding, 1));
  if (!isfinite(k->host[0])) return KS_OK;
  KS_TRY(centre_distances(k, b, a->embedding, k->distance));
  if (!(smallest(k->distance, b->n_bins) > k->r)) return KS_OK;
  if (!ks_buffer_has_room(b)) {
    int64_t slot = find_spare(k, b);
    if (slot < 0) KS_TRY(double_radius(k, b));
    if (!(smallest(k->distance, b->n_bins) > k->r)) return KS_OK;
    out->slot = find_spare(k, b);
    k->spare[out->slot] = false;
  }
  out->keep = true;
  return KS_OK;
}

static void cleared(void *state) {
  k_center *k = state;
  k->r = 0;
  memset(k->spare, 0, (size_t)k->n_bins * sizeof *k->spare);
}

static ks_status snapshot(const void *state, ks_text *out) {
  const k_center *k = state;
  KS_TRY(ks_bytes_put_f64(out, k->r));
  KS_TRY(ks_bytes_put_i64(out, k->n_bins));
  for (int64_t i = 0; i < k->n_bins; i++)
    KS_TRY(ks_text_add(out, k->spare[i] ? "\1" : "\0", 1));
  return KS_OK;
}

static ks_status restore(void *state, const void *bytes, size_t n) {
  k_center *k = state;
  ks_bytes_reader r = {.p = bytes, .n = n, .what = "snapshot of policy k_center"};
  KS_TRY(ks_bytes_get_f64(&r, &k->r));
  if (!(k->r >= 0 && isfinite(k->r)))
    return KS_FAIL(KS_EDATA, "%s: impossible radius; it is damaged", r.what);
  KS_TRY(ks_bytes_expect_u64(&r, (uint64_t)k->n_bins, "number of bins"));
  KS_TRY(ks_bytes_need(&r, (size_t)k->n_bins));
  for (int64_t i = 0; i < k->n_bins; i++) {
    unsigned char flag = r.p[r.pos++];
    if (flag > 1)
      return KS_FAIL(KS_EDATA, "%s: impossible mark of bin %lld; it is damaged", r.what, (long long)i);
    k->spare[i] = flag;
  }
  return ks_bytes_end(&r);
}

const ks_policy ks_policy_k_center = {.name = "k_center",
                                      .what = "keeps sets far from each other (streaming k-center, doubling)",
                                      .trains = true,
                                      .create = create,
                                      .offer = offer,
                                      .cleared = cleared,
                                      .snapshot = snapshot,
                                      .restore = restore,
                                      .destroy = destroy};
