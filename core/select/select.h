/* What to keep: quality scores, the buffer of bins, the policies, and the referee that enforces the storage budget.
 *
 * For every arrival: EOE (ks_entropy, ks_eoe_normalise), DSS and the dominant domain (ks_lexicons_score) depend on the text alone: once per
 * cohort. The selector adds IDD against the cell's own buffer, asks the policy, checks and carries out the decision, and counts.
 *
 *   ks_selector *s;
 *   KS_TRY(ks_selector_create(ctx, &(ks_selector_params){.policy = ks_policy_find("sdss"), .n_bins = 128, .bin_bytes = 22528,
 *                                                        .n_dim = 288, .seed = 1}, &s));
 *   ks_offer_result r;
 *   KS_TRY(ks_selector_offer(s, &arrival, &r));                  // r.outcome, r.slot, r.idd
 *   ks_selector_destroy(s);
 *
 * Nothing here is thread-safe within one object; objects of different cells are independent (they share the context).
 */
#ifndef KS_SELECT_H
#define KS_SELECT_H

#include "core/base/base.h"
#include "kernels/ops.h"

/* ---------------------------------------------------------------- lexicons, scores (METHOD 1) */

typedef struct ks_lexicons ks_lexicons;
/* Lines `name TAB w1, w2, ...` (comma or TAB between words, '#' comments, lower-cased; a name may come again and adds words; a word twice in one
 * lexicon counts once). Fixed order: that of the file. An entry that is not one token ("a.m.", "9/11") can never match: kept out, with one
 * warning that counts them. Errors: KS_EDATA path:line (no TAB, no name, no word, not UTF-8, no lexicon at all, more than 4096 lexicons). */
ks_status ks_lexicons_load(const char *path, ks_lexicons **out);
void ks_lexicons_destroy(ks_lexicons *l);
int64_t ks_lexicons_n(const ks_lexicons *l);
const char *ks_lexicons_name(const ks_lexicons *l, int64_t i);
const char *ks_lexicons_sha256(const ks_lexicons *l);

/* DSS = (1/m) sum_i |T n l_i| / n and Dom = argmax_i |T n l_i| (METHOD 1.1): tokens are words and punctuation marks (a run of letters,
 * digits and inner apostrophes or hyphens; any other mark alone), lower-cased, counted with multiplicity. Ties of Dom: the earlier lexicon;
 * no match: -1. n = 0: DSS 0. l = NULL (no lexicons, m = 0): DSS 0, domain -1. Unicode text is compared in composed form (NFC); a typographic
 * apostrophe or hyphen inside a word equals the plain one. Text that is not UTF-8: KS_EDATA with the offset. */
ks_status ks_lexicons_score(const ks_lexicons *l, const char *text, double *dss, int32_t *domain);

/* EOE = H / log(n) in the chosen reading (METHOD 1.1, 1.2); both logarithms to base 2, so that their base cancels. NaN stays NaN. */
typedef enum { KS_EOE_LOG_N = 0, KS_EOE_LOG_N1 } ks_eoe_norm; /* log n (paper) or log(n + 1) (scripts); n < 2 (resp. 1): EOE 0 */
double ks_eoe_normalise(double entropy_bits, int64_t n_tokens, ks_eoe_norm norm);

/* ---------------------------------------------------------------- buffer */

typedef struct {
  double eoe, dss, idd;
} ks_scores;

/* One kept dialogue set. Its bytes: question + response + 2 (length bytes as NULs) + 4 (domain) + 4 * n_dim (embedding). */
typedef struct {
  bool used;
  int64_t arrival, set_id;
  int32_t domain;
  ks_scores scores; /* as at admission (idd: or refreshed) */
  char *question, *response; /* owned */
  bool annotated; /* the response is the user's */
  bool asked;     /* had its turn to be asked about: put to the user, or lost to the budget */
  size_t bytes;
} ks_kept;

typedef struct {
  ks_ctx *ctx;
  int64_t n_bins;     /* capacity now */
  bool unlimited;     /* grows (policy `all` only); the storage budget, bins and their bytes, does not hold and is reported as such */
  size_t bin_bytes;
  int64_t n_dim;
  ks_kept *bins;      /* [n_bins] */
  float *embeddings;  /* backend memory [n_bins, n_dim]; rows of free bins are zero */
  int64_t n_used;
  size_t used_bytes, peak_bytes; /* sum of the kept sets' bytes */
} ks_buffer;
ks_status ks_buffer_create(ks_ctx *ctx, int64_t n_bins, size_t bin_bytes, int64_t n_dim, bool unlimited, ks_buffer **out);
void ks_buffer_destroy(ks_buffer *b);
/* Bytes a set would take. */
size_t ks_buffer_set_bytes(int64_t n_dim, const char *question, const char *response);
/* Puts a set into bin `slot` (its old set, if any, goes). embedding: backend memory [n_dim], copied; the texts are copied too. KS_EBUDGET when
 * bytes > bin_bytes or slot is out of range. On failure the bin keeps what it had. */
ks_status ks_buffer_put(ks_buffer *b, int64_t slot, int64_t arrival, int64_t set_id, int32_t domain, const ks_scores *scores, const char *question, const char *response, const float *embedding);
/* New response for a kept set (annotation). One that does not fit its bin is cut at a UTF-8 border; *cut says so. */
ks_status ks_buffer_set_response(ks_buffer *b, int64_t slot, const char *response, bool *cut);
void ks_buffer_clear(ks_buffer *b);
/* Lowest free bin, or -1 (an unlimited buffer grows instead). */
ks_status ks_buffer_free_slot(ks_buffer *b, int64_t *slot);
/* Whether another set can come in without replacing one. */
static inline bool ks_buffer_has_room(const ks_buffer *b) { return b->unlimited || b->n_used < b->n_bins; }
/* Recounts: the kept sets and their bytes equal n_used and used_bytes, and no set is larger than its bin. */
bool ks_buffer_is_sound(const ks_buffer *b);

/* ---------------------------------------------------------------- policies: one file and one line each */

typedef struct {
  int64_t arrival, set_id; /* index in the stream; id in the dataset */
  int32_t domain;
  ks_scores scores;
  const float *embedding;    /* backend memory [n_dim] */
  const char *question, *response;
} ks_arrival;

#define KS_SLOT_FREE ((int64_t)-1) /* any free bin: the selector takes the lowest; an unlimited buffer grows */
typedef struct {
  bool keep;
  int64_t slot; /* keep: a bin to be replaced (or free), or KS_SLOT_FREE */
} ks_decision;

typedef struct {
  int64_t n_bins, n_dim;
  ks_ctx *ctx;
} ks_policy_params;

/* What a policy may see: this arrival, the buffer (read only: the selector carries out what it decides), its own random stream (same draws
 * whatever the other policies do). Not the future, not the preferred answers, not the topics. `rng` is positioned by the arrival's index, so a
 * policy may draw any number of values. A policy's file says what it does with scores or embeddings that are not numbers. */
typedef struct {
  const char *name, *what;
  bool trains;    /* false: `none` */
  bool unlimited; /* true: `all` */
  bool uses_idd;  /* reads the arrival's idd */
  ks_status (*create)(const ks_policy_params *params, void **state); /* NULL: no state */
  ks_status (*offer)(void *state, const ks_arrival *a, const ks_buffer *b, ks_rng *rng, ks_decision *out);
  void (*cleared)(void *state); /* the buffer was cleared at a trigger; may be NULL */
  /* State as bytes, for checkpoints; NULL: none. */
  ks_status (*snapshot)(const void *state, ks_text *out);
  ks_status (*restore)(void *state, const void *bytes, size_t n); /* into a state fresh from create; hostile bytes: KS_EDATA */
  void (*destroy)(void *state);
} ks_policy;
extern const ks_policy *const ks_policies[]; /* ends with NULL */
const ks_policy *ks_policy_find(const char *name); /* or NULL */

/* ---------------------------------------------------------------- selector: the referee */

typedef enum { KS_IDD_EMPTY_ONE = 0, KS_IDD_EMPTY_ZERO, KS_IDD_EMPTY_INF } ks_idd_empty;
typedef struct {
  const ks_policy *policy;
  int64_t n_bins;
  size_t bin_bytes;
  int64_t n_dim;
  ks_idd_empty idd_empty; /* IDD of a domain with nothing in the buffer: 1 (default), 0, or +infinity */
  bool idd_refresh;       /* recompute the kept sets' idd (against the others of their domain) when their domain changes; for policies that use it */
  bool idd_only_if_used;  /* idd is NaN for policies that do not use it; otherwise it is computed for all, for the record */
  uint64_t seed;          /* of the policy's stream */
} ks_selector_params;

typedef enum { KS_DROPPED = 0, KS_KEPT = 1, KS_REPLACED = 2, KS_OVERSIZE = 3 } ks_outcome; /* OVERSIZE: does not fit a bin; dropped, the policy was not asked */

typedef struct {
  ks_outcome outcome;
  int64_t slot, victim_set_id; /* -1: none */
  double idd;
} ks_offer_result;

typedef struct ks_selector ks_selector;
ks_status ks_selector_create(ks_ctx *ctx, const ks_selector_params *params, ks_selector **out);
void ks_selector_destroy(ks_selector *s);
/* Offers one arrival (idd is filled in here: mean of 1 - cosine to the kept sets of its domain; domain -1 counts as a domain of its own).
 * KS_EBUDGET when the policy breaks a budget or writes into the buffer: the arrival is then not counted. offered = kept + dropped holds after
 * every call (asserted), and so does ks_buffer_is_sound. */
ks_status ks_selector_offer(ks_selector *s, const ks_arrival *a, ks_offer_result *out);
ks_buffer *ks_selector_buffer(ks_selector *s);
/* At a trigger, when the option says that the buffer is cleared. */
void ks_selector_clear(ks_selector *s);
typedef struct {
  int64_t offered, dropped, kept, replaced, oversize; /* kept: admissions, replaced among them */
  double seconds;
} ks_selector_counts;
ks_selector_counts ks_selector_get_counts(const ks_selector *s);
/* Everything that the next offer depends on, as bytes (buffer, embeddings, policy state, counts without seconds), little-endian. Restoring into a
 * selector of the same parameters gives exactly the same future. Bytes that are damaged or of other parameters: KS_EDATA, and the selector
 * stays as it was. */
ks_status ks_selector_snapshot(const ks_selector *s, ks_text *out);
ks_status ks_selector_restore(ks_selector *s, const void *bytes, size_t n);

#endif
