/* One cell's results as one HDF5 file; the schema is documented in results/README.md and versioned.
 *
 * A file is never changed in place: each checkpoint makes a new one in memory out of the old one and the new
 * rows, writes it aside, syncs and renames, so that a kill or a full disk at any moment leaves the last
 * checkpoint whole. A seal before the HDF5 data (512 bytes: schema, length, SHA-256) tells damage before HDF5
 * reads anything. Everything outside the group /time is a function of configuration, data, model and seed on
 * one backend and machine type; ks_record_digest hashes exactly that.
 *
 *   KS_TRY(ks_record_begin(path, config, meta, n_meta));
 *   KS_TRY(ks_record_append(path, &rows, &state, KS_RUN_RUNNING));   // at each trigger
 *   KS_TRY(ks_record_append(path, &rows, NULL, KS_RUN_COMPLETE));    // at the end
 *
 * Functions may be called from any thread; they run one at a time. Text that is not UTF-8 is stored with
 * U+FFFD for each wrong byte, a NULL string as "".
 */
#ifndef KS_RECORD_H
#define KS_RECORD_H

#include "core/base/base.h"

#define KS_RECORD_SCHEMA_VERSION 1

/* ---- rows; X(type, name, unit or values). Types: i64, i32, f64, str (UTF-8, variable length). */
#define KS_ARRIVAL_COLUMNS(X)                                                                                \
  X(i64, arrival, "index in the stream")                                                                     \
  X(i64, set_id, "row of the dataset")                                                                       \
  X(i64, window, "trigger that follows")                                                                     \
  X(i32, domain, "dominant lexicon, -1 none")                                                                \
  X(i32, topic, "true topic, -1 none")                                                                       \
  X(i32, uninformative, "1: chit-chat or repeat by construction")                                            \
  X(f64, eoe, "entropy of embedding")                                                                        \
  X(f64, dss, "domain specific score")                                                                       \
  X(f64, idd, "in-domain dissimilarity")                                                                     \
  X(i64, n_tokens, "tokens of the scored text")                                                              \
  X(i64, bytes, "size it takes in the buffer")                                                               \
  X(i32, outcome, "0 dropped, 1 kept, 2 replaced, 3 oversize")                                               \
  X(i64, slot, "bin, -1 none")                                                                               \
  X(i64, victim_set_id, "-1 none")
#define KS_CHECKPOINT_COLUMNS(X)                                                                             \
  X(i64, window, "number of the trigger, from 0")                                                            \
  X(i64, arrivals, "arrivals so far")                                                                        \
  X(i64, sets_kept, "in the buffer at the trigger")                                                          \
  X(i64, bytes_used, "by the buffer at the trigger")                                                         \
  X(i64, bytes_peak, "most so far")                                                                          \
  X(i64, admissions, "so far")                                                                               \
  X(i64, annotations_asked, "so far")                                                                        \
  X(i64, annotations_answered, "so far")                                                                     \
  X(i64, annotations_refused, "so far")                                                                      \
  X(i64, annotations_over_budget, "so far")                                                                  \
  X(i64, synth_tried, "this window")                                                                         \
  X(i64, synth_accepted, "this window")                                                                      \
  X(i64, synth_tokens, "generated this window")                                                              \
  X(i64, train_examples, "this window")                                                                      \
  X(i64, train_steps, "this window")                                                                         \
  X(i64, train_tokens, "rows through the model this window")                                                 \
  X(f64, train_loss_first, "mean loss of the first step, NaN none")                                          \
  X(f64, train_loss_last, "mean loss of the last step, NaN none")                                            \
  X(f64, eval_loss, "per token of the preferred responses, NaN when not evaluated")                          \
  X(f64, eval_rouge1_f1, "mean over questions, NaN when not evaluated")
#define KS_ANSWER_COLUMNS(X)                                                                                 \
  X(i64, window, "trigger after which it was asked")                                                         \
  X(i64, set_id, "held-out set")                                                                             \
  X(i32, topic, "true topic, -1 none")                                                                       \
  X(f64, rouge1_p, "ROUGE-1 precision of the answer against the preferred response")                         \
  X(f64, rouge1_r, "ROUGE-1 recall")                                                                         \
  X(f64, rouge1_f1, "ROUGE-1 F1")                                                                            \
  X(f64, rouge2_f1, "ROUGE-2 F1")                                                                            \
  X(f64, rougeL_f1, "ROUGE-L F1")                                                                            \
  X(f64, loss_sum, "nats over the preferred response")                                                       \
  X(i64, loss_tokens, "tokens of the preferred response")                                                    \
  X(i64, n_new_tokens, "generated")                                                                          \
  X(str, answer, "generated text")
#define KS_STEP_COLUMNS(X)                                                                                   \
  X(i64, window, "number of the trigger")                                                                    \
  X(i64, step, "within the window")                                                                          \
  X(f64, loss, "mean over target tokens")                                                                    \
  X(f64, grad_norm, "before clipping")
#define KS_BUFFER_COLUMNS(X)                                                                                 \
  X(i64, window, "number of the trigger")                                                                    \
  X(i64, slot, "bin")                                                                                        \
  X(i64, set_id, "row of the dataset")                                                                       \
  X(i64, arrival, "index in the stream")                                                                     \
  X(i32, domain, "dominant lexicon, -1 none")                                                                \
  X(f64, eoe, "entropy of embedding")                                                                        \
  X(f64, dss, "domain specific score")                                                                       \
  X(f64, idd, "in-domain dissimilarity")                                                                     \
  X(i32, annotated, "1: the response is the user's own")                                                     \
  X(i64, bytes, "size it takes in the buffer")                                                               \
  X(str, question, "of the kept set")                                                                        \
  X(str, response, "its response: the annotation if there is one")
#define KS_SYNTHESIS_COLUMNS(X)                                                                              \
  X(i64, window, "number of the trigger")                                                                    \
  X(i64, set_id, "row of the dataset that it varies")                                                        \
  X(i32, verdict, "ks_variant_verdict; 0 accepted")                                                          \
  X(f64, rouge1, "F1 against the source question")                                                           \
  X(i64, n_tokens, "generated")                                                                              \
  X(str, question, "as the synthesizer wrote it")
#define KS_TIME_COLUMNS(X)                                                                                   \
  X(i64, window, "number of the trigger")                                                                    \
  X(f64, embed, "seconds; shared stages: the cell's equal share of the cohort's time")                       \
  X(f64, select, "seconds")                                                                                  \
  X(f64, annotate, "seconds")                                                                                \
  X(f64, synthesize, "seconds")                                                                              \
  X(f64, train, "seconds")                                                                                   \
  X(f64, evaluate, "seconds")                                                                                \
  X(f64, record, "seconds; of the checkpoint before this one, whose own writing is not over")

/* X(path in the file, row type, columns) */
#define KS_TABLE_MAP(X)                                                                                      \
  X("/arrivals", arrival, KS_ARRIVAL_COLUMNS)                                                                \
  X("/checkpoints", checkpoint, KS_CHECKPOINT_COLUMNS)                                                       \
  X("/answers", answer, KS_ANSWER_COLUMNS)                                                                   \
  X("/steps", step, KS_STEP_COLUMNS)                                                                         \
  X("/buffer", buffer, KS_BUFFER_COLUMNS)                                                                    \
  X("/synthesis", synthesis, KS_SYNTHESIS_COLUMNS)                                                           \
  X("/time/stages", time, KS_TIME_COLUMNS)

typedef int64_t ks_col_i64;
typedef int32_t ks_col_i32;
typedef double ks_col_f64;
typedef char *ks_col_str; /* owned by whoever fills the row; read back: free with ks_rows_free */

#define KS_COLUMN(type, name, what) ks_col_##type name;
typedef struct {
  KS_ARRIVAL_COLUMNS(KS_COLUMN)
} ks_row_arrival;
typedef struct {
  KS_CHECKPOINT_COLUMNS(KS_COLUMN)
} ks_row_checkpoint;
typedef struct {
  KS_ANSWER_COLUMNS(KS_COLUMN)
} ks_row_answer;
typedef struct {
  KS_STEP_COLUMNS(KS_COLUMN)
} ks_row_step;
typedef struct {
  KS_BUFFER_COLUMNS(KS_COLUMN)
} ks_row_buffer;
typedef struct {
  KS_SYNTHESIS_COLUMNS(KS_COLUMN)
} ks_row_synthesis;
typedef struct {
  KS_TIME_COLUMNS(KS_COLUMN)
} ks_row_time;
#undef KS_COLUMN

typedef enum {
  KS_TABLE_arrival = 0,
  KS_TABLE_checkpoint,
  KS_TABLE_answer,
  KS_TABLE_step,
  KS_TABLE_buffer,
  KS_TABLE_synthesis,
  KS_TABLE_time,
  KS_N_TABLES
} ks_table;
const char *ks_table_path(ks_table t);
size_t ks_table_row_bytes(ks_table t);

/* A batch of rows for each table, in table order; rows[t]: array of the table's row struct. */
typedef struct {
  const void *rows[KS_N_TABLES];
  int64_t n_rows[KS_N_TABLES];
} ks_record_rows;

/* What resuming needs besides the configuration; opaque bytes by name, e.g. "selector", "annotator",
 * "adapter". */
typedef struct {
  int64_t n_arrivals; /* consumed so far */
  int64_t n_windows;  /* triggers done */
  int64_t n_blobs;
  struct {
    const char *name; /* written as /state/<name> */
    const void *bytes;
    size_t n;
  } blobs[8];
} ks_record_state;

/* Named strings, written as attributes of /meta (machine, compiler, versions, hashes, seed, ...). Names that
 * begin with "time." or "machine." go to the group /time instead and are left out of the digest. */
typedef struct {
  const char *name, *value;
} ks_meta;

typedef enum { KS_RUN_RUNNING = 0, KS_RUN_COMPLETE, KS_RUN_INTERRUPTED, KS_RUN_FAILED } ks_run_status;
const char *ks_run_status_name(ks_run_status s);

/* Makes path with empty tables, /config (the resolved configuration's text) and /meta. Replaces an existing
 * file. KS_EINVAL: a name of meta that is empty, repeated, longer than 255 bytes or has a slash. KS_EIO: the
 * disk. */
ks_status ks_record_begin(const char *path, const char *config_text, const ks_meta *meta, int64_t n_meta);
/* Appends rows and replaces /state, atomically (see above). rows: NULL or n_rows 0 for none. state: NULL for
 * none, then there is nothing to resume from; the rows and the state belong to the same moment. status:
 * RUNNING, or COMPLETE with the last checkpoint (then /state is dropped). KS_EIO (full disk) leaves the old
 * file. */
ks_status ks_record_append(const char *path, const ks_record_rows *rows, const ks_record_state *state,
                           ks_run_status status);
/* Keeps /state, except with COMPLETE. */
ks_status ks_record_set_status(const char *path, ks_run_status status);

/* Reading. Files of another schema version, damaged or foreign files: KS_EDATA with path and remedy; never a
 * crash. The seal stops damage of any kind; against a file made on purpose, types, layouts, filters, links,
 * counts and lengths are checked before they are used, but HDF5 itself still reads it: take sealed files from
 * people you trust. */
typedef struct {
  ks_run_status status;
  int64_t schema_version;
  char *config_text;
  ks_meta *meta;
  int64_t n_meta;
} ks_record_info;
ks_status ks_record_read_info(const char *path, ks_record_info *out);
void ks_record_info_free(ks_record_info *i);
const char *ks_record_info_meta(const ks_record_info *i, const char *name); /* or NULL */
/* All rows of a table: *rows is an array of its row struct; free with ks_rows_free. */
ks_status ks_record_read_rows(const char *path, ks_table t, void **rows, int64_t *n);
void ks_rows_free(ks_table t, void *rows, int64_t n);
/* State blobs, copied; free with ks_record_state_free. KS_EDATA when there is none. */
ks_status ks_record_read_state(const char *path, ks_record_state *out);
void ks_record_state_free(ks_record_state *s);
/* SHA-256 over all tables, /config and /meta but /time, /state and the run status: equal for equal results,
 * however many checkpoints they were written in. */
ks_status ks_record_digest(const char *path, char out_hex[65]);

/* The index of an experiment: HDF5 with one external link /cells/<name> a cell and the experiment's config;
 * rewritten atomically. cell_files: paths as this process would open them, in folders that exist; links are
 * stored relative to the index's folder, so that the whole can be moved. KS_EINVAL: a name with a slash or
 * twice. */
ks_status ks_record_write_index(const char *path, const char *config_text, const char *const *cell_names,
                                const char *const *cell_files, int64_t n_cells);

#endif
