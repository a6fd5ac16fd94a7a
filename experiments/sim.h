/* The simulator: replays streams of dialogue sets through cells that share a model and a dataset (a cohort),
 * in lockstep.
 *
 *   for each window:  embed (once a cohort) -> score -> offer -> annotate -> synthesize -> fine-tune -> evaluate -> record
 *
 * Everything a cell computes depends on its own configuration alone; the cohort only shares passes through
 * the frozen model.
 */
#ifndef KS_SIM_H
#define KS_SIM_H

#include "core/adapt/adapt.h"
#include "core/annotate/annotate.h"
#include "core/data/data.h"
#include "core/model/generate.h"
#include "core/model/tokenizer.h"
#include "core/record/record.h"
#include "core/select/select.h"
#include "core/synthesize/synthesize.h"
#include "experiments/config.h"
#include "experiments/progress.h"

/* ---------------------------------------------------------------- world: what a cohort shares */

typedef struct {
  bool known;
  double eoe, dss;
  int32_t domain;
  int64_t n_tokens; /* of the scored text, untruncated */
} ks_set_score;

typedef struct {
  const ks_config *config; /* any cell's: the keys that a cohort shares */
  ks_ctx *ctx;
  ks_model *model;
  ks_tokenizer *tokenizer;
  ks_lexicons *lexicons; /* NULL: none configured; DSS is 0 and every domain -1 */
  ks_dataset *data;
  float *embeddings;    /* backend memory [n_sets, hidden_size], by set id; filled as sets arrive */
  ks_set_score *scores; /* [n_sets] */
  char **own_responses; /* [n_sets], the frozen model's greedy answer, made when first needed */
  int64_t n_embedded;   /* passes of a set through the embedding: at most one each */
  double embed_seconds; /* all embedding so far */
} ks_world;

/* Loads model, tokenizer, lexicons and data for config. ctx is borrowed. */
ks_status ks_world_open(ks_ctx *ctx, const ks_config *config, ks_world **out);
void ks_world_close(ks_world *w); /* NULL-safe */
/* Tokens of `text` (with bos when the tokenizer has one): free() *ids. */
ks_status ks_world_encode(const ks_world *w, const char *text, bool add_bos, int32_t **ids, int64_t *n);
/* The answering prompt's tokens for a question, cut from the left of the question so that at most max_tokens
 * remain. free() *ids. */
ks_status ks_world_encode_prompt(const ks_world *w, const char *question, int64_t max_tokens, int32_t **ids,
                                 int64_t *n);
/* Prompt, response, end token; *begin: first token of the response. Longer than max_tokens: the prompt keeps
 * at least half, the response is cut. */
ks_status ks_world_encode_example(const ks_world *w, const char *question, const char *response,
                                  int64_t max_tokens, int32_t **ids, int64_t *n, int64_t *begin);
/* Embeds and scores those of the sets that were not yet. */
ks_status ks_world_score_sets(ks_world *w, const int64_t *set_ids, int64_t n, const ks_progress *progress);
/* Fills own_responses for these sets (batched, greedy, frozen model). */
ks_status ks_world_answer_sets(ks_world *w, const int64_t *set_ids, int64_t n, const ks_progress *progress);
/* KS_ENOMEM when the passes of `n_trials` cells cannot all be held by the device beside what it holds now (model, embeddings,
 * adapters): before the first of them runs, and with what would fit. Where memory is not the device's own (CPU), nothing. */
ks_status ks_world_check_memory(const ks_world *w, int64_t n_trials);
/* Bounds on generation from run.*: where they are 0, the library's own. */
ks_generate_params ks_world_generate_params(const ks_world *w);
/* Ids that end a generated answer. */
void ks_world_stop_ids(const ks_world *w, int32_t ids[9], int64_t *n);

/* ---------------------------------------------------------------- trials: cells at work */

/* A growing array of rows of one table. */
typedef struct {
  void *rows;
  int64_t n, cap;
} ks_rows;

typedef struct {
  const ks_config *config;
  const char *id;    /* the cell's name, "sdss-s1" */
  char *path;        /* of its results file */
  char *config_text; /* the keys that decide the result, as recorded */
  const ks_policy *policy;
  ks_selector *selector;
  ks_annotator *annotator;
  ks_adapter *adapter; /* NULL when the policy does not train */
  int64_t *order;      /* [n_stream] set ids as they arrive */
  int64_t n_stream;
  int64_t n_arrivals, n_windows; /* done */
  int lock;                      /* descriptor of the cell's lock file */
  bool complete;
  bool trained;                /* the adapter has taken a step */
  ks_rows tables[KS_N_TABLES]; /* of the window in work */
  ks_rows untrained_answers; /* the frozen model's answers, which stay the same until the adapter has taken a
                                step */
  ks_row_time time;
  ks_row_checkpoint checkpoint;
} ks_trial;

/* Makes the trial of a cell; when its file holds an earlier run of the same configuration, continues from its
 * last checkpoint (fresh: starts over). A file of another configuration: KS_ECONFIG. */
ks_status ks_trial_open(ks_world *w, const ks_config *config, const char *id, const char *folder, bool fresh,
                        ks_trial **out);
void ks_trial_close(ks_trial *t); /* NULL-safe */
/* Adds one zeroed row and returns it through *row (a pointer to the table's row struct). */
ks_status ks_trial_add_row(ks_trial *t, ks_table table, void *row);
/* Writes the window's rows and the state, then clears the rows. */
ks_status ks_trial_checkpoint(ks_trial *t, bool last);
int64_t ks_trial_n_windows(const ks_trial *t);

/* ---------------------------------------------------------------- stages of a window, for all trials that
 * are at it */

typedef struct {
  ks_world *world;
  ks_trial **trials; /* [n_trials], those at this window */
  int64_t n_trials;
  int64_t window;
  const ks_progress *progress;
  struct ks_lesson *lessons; /* from synthesize to train; ks_stage_end frees it */
} ks_stage;

ks_status ks_stage_embed(ks_stage *s);  /* score and embed what arrives in this window */
ks_status ks_stage_select(ks_stage *s); /* offer; ask on admission */
ks_status
ks_stage_annotate(ks_stage *s); /* ask at the trigger; the model's own answers where they are wanted */
ks_status ks_stage_synthesize(ks_stage *s); /* gather what trains, write variants */
ks_status ks_stage_train(ks_stage *s);
ks_status ks_stage_evaluate(ks_stage *s);
ks_status ks_stage_record(ks_stage *s);
void ks_stage_end(ks_stage *s); /* after the last stage, or the one that failed */

/* The response that a kept set trains on, or NULL when it is left out. */
const char *ks_trial_training_response(const ks_world *w, const ks_trial *t, const ks_kept *kept);

/* ---------------------------------------------------------------- runs */

typedef struct {
  bool fresh;
  ks_shard shard;
  ks_bar *bar; /* may be NULL */
} ks_experiment_options;

/* Runs the matrix's cells of this shard, cohort by cohort, into matrix->output. Interrupted: KS_EINTERRUPTED
 * with every finished checkpoint on disk. */
ks_status ks_experiment_run(const ks_matrix *matrix, const ks_experiment_options *options);

#endif
