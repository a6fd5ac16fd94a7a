/* Dialogue sets, importers, the held-out split and the order of the stream.
 *
 *   ks_dataset *data;
 *   KS_TRY(ks_dataset_import(&(ks_import_params){.importer = "alpaca", .path = "random_9k.json"}, &data));
 *   KS_TRY(ks_dataset_split(data, &(ks_split_params){.eval_size = 200, .stream_size = 4600, .seed = 1}));
 *   int64_t *order; int64_t n;
 *   KS_TRY(ks_stream_order(data, &(ks_stream_params){.order = KS_ORDER_SHUFFLED, .seed = 7}, &order, &n));
 */
#ifndef KS_DATA_H
#define KS_DATA_H

#include "core/base/base.h"

/* One question and one response. Strings are owned by the dataset, valid UTF-8, NUL-terminated; question and preferred are not empty. */
typedef struct {
  const char *question;
  const char *response;  /* what the assistant said at the time: the selector sees it (file importers: the reference) */
  const char *preferred; /* the user's own answer: only the annotator and the referee see it (file importers: the reference) */
  int32_t topic;         /* the true topic, for bursts and reports, never for a policy; -1: none */
  bool uninformative;    /* persona: chit-chat or a repeat, for reports only */
  int32_t fact;          /* persona: number of the user's own fact on which preferred rests, for reports only; -1: none (style alone) */
} ks_set;

typedef struct {
  char name[64];
  ks_set *sets; /* [n_sets] */
  int64_t n_sets;
  char **topics; /* [n_topics] */
  int64_t n_topics;
  int64_t *stream; /* ids of sets that may arrive, [n_stream], in source order; NULL before the split */
  int64_t n_stream;
  int64_t *eval; /* ids of held-out sets, [n_eval] */
  int64_t n_eval;
  char sha256[65]; /* of the file, or of the generator's parameters and output */
  int64_t n_skipped; /* rows that an option allowed to skip */
  void *arena; /* owns the strings */
} ks_dataset;

typedef struct {
  const char *importer; /* "alpaca", "json", "jsonl", "csv", "tsv" */
  const char *path;
  /* NULL or "": the importer's own (alpaca: instruction, input unless a question is named, output; others: question, none, response; preferred: the response; topic:
   * none). In JSON, dots reach into objects and [i] into arrays, from the end when i < 0: "messages[-1].content"; in tables they are
   * names of columns. A topic may be an integer or missing (-1), every other field is a text. */
  const char *question_field, *input_field, *response_field, *preferred_field, *topic_field;
  bool skip_invalid;    /* rows that are no object or lack question, response or a mapped preferred: skipped and counted, else KS_EDATA with the row's line */
  int64_t max_rows;     /* valid rows to take, from the first; 0: all */
} ks_import_params;

typedef struct {
  const char *name, *what;
  ks_status (*import)(const ks_import_params *params, ks_dataset *out);
} ks_importer;
extern const ks_importer ks_importers[]; /* ends with name NULL */

/* The question is question_field [+ "\n" + input_field, where that is not blank]. KS_EDATA: path:line (JSON: line and column), what, what
 * to do: not UTF-8, a NUL byte or \u0000, bad JSON (also: a name twice in an object, more than 2048 levels), a file cut off, another type at
 * the top, no usable row. KS_ECONFIG: unknown importer, bad field path. sha256 is the file's. */
ks_status ks_dataset_import(const ks_import_params *params, ks_dataset **out);
void ks_dataset_destroy(ks_dataset *d); /* NULL-safe */
/* For importers and tests: an empty dataset; `name` is cut at 63 bytes. */
ks_status ks_dataset_create(const char *name, ks_dataset **out);
/* Adds one set, copying the strings; response may be empty, topic NULL. KS_EDATA when a text is empty or not UTF-8. fact is -1. */
ks_status ks_dataset_add(ks_dataset *d, const char *question, const char *response, const char *preferred, const char *topic, bool uninformative);

typedef struct {
  int64_t stream_size, eval_size; /* explicit, METHOD 5; 0 stream: all the rest; more than there is: KS_ECONFIG with the numbers */
  uint64_t seed;
} ks_split_params;
/* Draws eval_size sets without replacement, then stream_size of the rest. Exact duplicates (same question and preferred) never lie on both sides:
 * copies of held-out sets are left out of the stream, and out of the held-out sets. Both lists are in source order. */
ks_status ks_dataset_split(ks_dataset *d, const ks_split_params *params);

typedef enum { KS_ORDER_FILE = 0, KS_ORDER_SHUFFLED, KS_ORDER_BURSTS } ks_order;
typedef struct {
  ks_order order;
  double correlation; /* BURSTS: probability that the next arrival has the topic of this one (else any topic, by what is left); 0: shuffled by topic weight, 1: topic after topic */
  uint64_t seed;
} ks_stream_params;
/* A permutation of d->stream. *order: free(). BURSTS needs topics, else KS_ECONFIG; sets without one count as one topic. An arrival has the
 * topic of the one before with probability c + (1 - c) * (that topic's share of what is left), while any of it is left. */
ks_status ks_stream_order(const ks_dataset *d, const ks_stream_params *params, int64_t **order, int64_t *n);

#endif
