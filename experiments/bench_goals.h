/* `keepsake bench goals`: the cases of bench_goals.def (its head says what each op and key is), group by group.
 *
 *   bench_goals.c        the list, parameters, groups in turn, rows, what was reached
 *   bench_goal_steps.c   training steps with and without adapters
 *   bench_goal_models.c  decode, prefill, a whole run
 *   bench_goal_ops.c     single operations
 */
#ifndef KS_BENCH_GOALS_H
#define KS_BENCH_GOALS_H

#include "experiments/bench.h"

typedef struct {
  const char *group, *name, *op, *parameters;
} ks_goal_case;
extern const ks_goal_case ks_goal_cases[]; /* ends with name NULL */

typedef enum { KS_GOAL_at_least, KS_GOAL_at_most, KS_GOAL_exactly } ks_goal_relation;
typedef struct {
  const char *name, *measure;
  ks_goal_relation relation;
  double threshold;
  const char *against;
} ks_goal;
extern const ks_goal ks_goals[]; /* ends with name NULL */

/* Whole numbers among a case's parameters: X(key, what is left when --scale divides it, at least; 0: not divided). */
#define KS_GOAL_NUMBERS(X)                                                                                   \
  X(rows, 8)                                                                                                 \
  X(n_seqs, 2)                                                                                               \
  X(seq_len, 16)                                                                                             \
  X(n_adapters, 2)                                                                                           \
  X(rank, 0)                                                                                                 \
  X(n_heads, 4)                                                                                              \
  X(n_kv_heads, 2)                                                                                           \
  X(head_dim, 0)                                                                                             \
  X(n_out, 64)                                                                                               \
  X(n_cols, 32)                                                                                              \
  X(n_keys, 64)                                                                                              \
  X(best_k, 4)                                                                                               \
  X(batch, 2)                                                                                                \
  X(prompt, 4)                                                                                               \
  X(new, 3)                                                                                                  \
  X(gradient, 0)                                                                                             \
  X(recompute_layers, 0)

typedef struct {
#define X(key, least) int64_t key;
  KS_GOAL_NUMBERS(X)
#undef X
  char shape[8], targets[40], sampler[16], kind[16], cache[8];
  char text[160]; /* as in the list, with what --scale left */
} ks_goal_parameters;
/* KS_EINTERNAL for a list that says what nobody knows. */
ks_status ks_goal_parameters_read(const ks_goal_case *c, int64_t scale, ks_goal_parameters *out);

typedef struct ks_goal_run ks_goal_run;
typedef struct ks_goal_subject ks_goal_subject;

/* What an op of the list is. */
typedef struct {
  const char *op;
  bool has_model; /* run->model is that of the shape; also run once by itself, for its memory */
  /* Fills what, load, state and how it is timed; leaves skipped set where this machine has nothing to measure. */
  ks_status (*make)(ks_goal_run *run, ks_goal_subject *s);
  /* A sample: milliseconds of what `load` describes. */
  ks_status (*sample)(void *subject, double *ms);
  /* After the samples: is_wrong and the note. */
  ks_status (*finish)(ks_goal_run *run, ks_goal_subject *s);
  void (*drop)(ks_goal_subject *s);
} ks_goal_kind;
extern const ks_goal_kind ks_goal_step_kinds[], ks_goal_model_kinds[],
    ks_goal_op_kinds[]; /* end with op NULL */

struct ks_goal_subject {
  ks_goal_run *run;
  const ks_goal_case *c;
  const ks_goal_kind *kind;
  ks_goal_parameters p;
  char what[96];
  ks_bench_load load;
  ks_bench_subject timed; /* its fn is one call; fn NULL: sample knows how */
  bool is_device_time;    /* samples are the device's: hot_ms and step_ms follow */
  void *state;
  ks_samples samples;
  double memory_bytes, launches, graphs, waits, idle_share; /* NAN: unknown */
  bool is_wrong;
  char skipped[24]; /* the reason */
  char note[320];
};

struct ks_goal_run {
  ks_bench *b;
  int64_t scale;
  ks_bench_shape shape; /* of the model there is */
  ks_model *model;
  ks_goal_subject *subjects; /* of the group at work */
  int64_t n_subjects;
  bool is_alone;  /* one of them is run by itself */
  ks_run *shared; /* by the group's training steps */
};

/* For kinds: is_wrong, and the reason in front of the note. */
__attribute__((format(printf, 2, 3))) void ks_goal_wrong(ks_goal_subject *s, const char *format, ...);
/* A model shape divided by --scale. */
ks_model_config ks_goal_scaled_config(const ks_model_config *c, int64_t scale);

/* The sample of subjects whose `timed` is run hot. */
ks_status ks_goal_sample_hot(void *subject, double *ms);

#endif
