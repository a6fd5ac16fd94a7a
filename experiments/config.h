/* Configurations: from libconfig files and --set to the matrix of cells.
 *
 *   ks_matrix *m;
 *   KS_TRY(ks_config_load("configs/quickstart.cfg", sets, n_sets, &m));   // sets: {"seed=1,2", "data.path=FILE"}
 *   for (int64_t i = 0; i < m->n_cells; i++) run(m->cells[i].name, &m->cells[i].config);
 *   ks_matrix_destroy(m);
 *
 * All keys stand in config_keys.def, and nowhere else: the fields below, defaults, parsing, `keepsake
 * explain`, resolved text.
 *
 * Values. A key that is an axis takes one value or a list of them ([1, 2, 3] in a file, 1,2,3 after --set);
 * all others take one. An integer is taken where a float is wanted. A later --set wins over an earlier one,
 * --set over the file.
 *
 * Paths. In a file: absolute; "./x" and "../x" from the file's own folder; "~/x" from $HOME; any other from
 * the project's root, where the shipped data lies ("datasets/base"). After --set: from the current directory,
 * as in a shell. experiment.output: always from the current directory. In ks_config every input path is
 * absolute and ready to open; texts show those in the project relative to its root.
 */
#ifndef KS_CONFIG_H
#define KS_CONFIG_H

#include "core/base/base.h"
#include "kernels/ops.h"

/* One field a key: c.seed, c.policy, c.train.learning_rate. INT int64_t; FLOAT double; BOOL bool; STRING and
 * PATH const char * (never NULL, "" when unset; owned by the matrix); ENUM int, numbered as the library's
 * enum of that option. */
#define KS_CTYPE_INT    int64_t
#define KS_CTYPE_FLOAT  double
#define KS_CTYPE_BOOL   bool
#define KS_CTYPE_STRING const char *
#define KS_CTYPE_ENUM   int
#define KS_CTYPE_PATH   const char *
typedef struct {
#define KS_GROUP(name, help) struct {
#define KS_GROUP_END(name)                                                                                   \
  }                                                                                                          \
  name;
#define KS_KEY(type, group, name, flags, label, unit, def, range, help) KS_CTYPE_##type name;
#include "experiments/config_keys.def"
#undef KS_GROUP
#undef KS_GROUP_END
#undef KS_KEY
} ks_config;

/* Values of the enum keys that no enum of the library names. */
typedef enum { KS_TEXT_QUESTION = 0, KS_TEXT_QUESTION_RESPONSE } ks_select_text;
typedef enum { KS_UNIT_BITS = 0, KS_UNIT_NATS } ks_entropy_unit;
typedef enum { KS_UNANSWERED_OWN_RESPONSE = 0, KS_UNANSWERED_LEAVE_OUT } ks_unanswered;
typedef enum { KS_LOSS_ON_RESPONSE = 0, KS_LOSS_ON_ALL } ks_loss_on;

typedef struct {
  char *name;    /* "sdss-s1-b128": policy, seed, then every other axis with several values; unique; fit for a
                    file name */
  int64_t index; /* place in the matrix */
  ks_config config;
} ks_cell;

typedef struct {
  ks_cell *cells; /* in a fixed order: policies as listed, within each the seeds, within each the other axes
                     in the order of the table */
  int64_t n_cells;
  char *name;   /* experiment.name */
  char *output; /* experiment.output: where the results go */
  char *text; /* the resolved configuration: every key, lists as lists; valid libconfig that loads to the same
                 matrix */
  void *arena; /* owns the strings */
} ks_matrix;

/* Reads a file (NULL: defaults alone) and `sets` ("key=value", in order), resolves, checks, and crosses the
 * axes. KS_ECONFIG: the message holds every error, one a line, each with `file:line: ` or `--set key=value: `
 * before it. KS_EIO: the file cannot be read. */
ks_status ks_config_load(const char *path, const char *const *sets, int64_t n_sets, ks_matrix **out);
void ks_matrix_destroy(ks_matrix *m); /* NULL-safe */

/* One cell's resolved configuration as libconfig text. for_results: without the keys that change no result
 * (experiment, run, stats), so that equal texts mean equal cells. Appends to out. */
ks_status ks_config_text(const ks_config *c, bool for_results, ks_text *out);
/* What a context for c is created with; points into c. */
ks_ctx_params ks_config_ctx_params(const ks_config *c);
/* Whether two cells may share a cohort: same model, data, embeddings, window. */
bool ks_config_same_cohort(const ks_config *a, const ks_config *b);

/* Help: all keys (what NULL or ""), a group's, or one key's; KS_ECONFIG with the nearest name when there is
 * no such thing. */
ks_status ks_config_explain(const char *what, ks_text *out);

/* Folder of the shipped data and configurations: $KS_ROOT, else the nearest folder above the program with
 * datasets/ and configs/ in it, else that of the sources it was built from. Absolute; never NULL. */
const char *ks_project_root(void);

/* ---------------------------------------------------------------- shards */

/* Shard i of n owns the cells with index % n == i. */
typedef struct {
  int64_t i, n;
  char why[96]; /* "--shard 0/3", "SLURM_ARRAY_TASK_ID=0 of 3", "" (all) */
} ks_shard;
/* text: "i/n" with 0 <= i < n; "auto": from SLURM_ARRAY_TASK_ID, SLURM_PROCID, OMPI_COMM_WORLD_RANK or
 * PMI_RANK and their counts, KS_ECONFIG when none is set; NULL: as auto, but all cells when none is set;
 * "all": all cells whatever is set. */
ks_status ks_shard_parse(const char *text, ks_shard *out);
static inline bool ks_shard_owns(const ks_shard *s, int64_t cell) {
  return cell % s->n == s->i;
}

#endif
