/* Fine-tuning of many adapters in lockstep. A round: every active job gives the next piece of its batch,
 * packed with the others' into passes of at most max_rows; jobs whose optimizer step is complete take it.
 *
 * A gradient is one chain of additions over the rows of a batch, however many passes they come in, so that
 * pieces may be cut where memory and caches like it. Dropout's mask counts rows from the start of a piece:
 * there the cuts are fixed. */
#include "core/adapt/packing.h"
#include "core/model/run.h"

enum { DROPOUT_ROWS = 1024 };
#define REPORT_SECONDS 0.1

typedef struct {
  ks_train_job *job;
  int64_t index;           /* of the job, for messages */
  int64_t *order;          /* [n_examples] permutation of this epoch */
  int64_t epoch;           /* that order was made for; -1: none yet */
  int64_t batch, end;      /* examples order[batch .. end) form this optimizer step */
  int64_t next, piece_end; /* order[next ..) comes next; the piece in the pass ends here */
  int64_t step;            /* steps done */
  int64_t n_passes;        /* pieces done, for dropout keys */
  int64_t n_targets;       /* of this step's batch */
  double loss;             /* summed over this step's targets so far */
  ks_adapter_view view;
} trainee;

typedef struct {
  ks_model *model;
  trainee *trainees;
  int64_t n;
  int64_t max_rows; /* of a pass, as asked for */
  int64_t recompute_layers;
  ks_run *run;
  ks_packing packing;
  int64_t *members; /* [n] trainees in the pass being packed */
  int64_t n_members;
  ks_adamw_job *jobs; /* [n] of the members whose batch a pass completes */
  double *norms;      /* [n] theirs */
  int64_t steps_done, steps_all;
  const ks_progress *progress;
  double reported;
} trainer;

/* ---------------------------------------------------------------- sizes and schedule */

static int64_t micro_size(const ks_train_params *p) {
  return p->micro_batch > 0 ? ks_min_i64(p->micro_batch, p->batch_size) : p->batch_size;
}

int64_t ks_train_n_steps(const ks_train_params *p, int64_t n_examples) {
  if (n_examples <= 0) return 0;
  if (p->steps > 0) return p->steps;
  return p->epochs * ((n_examples - 1) / p->batch_size + 1);
}

/* As transformers' get_{constant,linear,cosine}_schedule_with_warmup: the factor of step `step` (0, 1, ...)
 * of n. */
static double schedule_factor(const ks_train_params *p, int64_t step, int64_t n) {
  int64_t warmup = (int64_t)ceil(p->warmup * (double)n);
  if (step < warmup) return (double)step / (double)ks_max_i64(warmup, 1);
  double left = (double)(n - step) / (double)ks_max_i64(n - warmup, 1);
  switch (p->schedule) {
  case KS_SCHEDULE_LINEAR:
    return left > 0 ? left : 0;
  case KS_SCHEDULE_COSINE:
    return 0.5 * (1.0 + cos(3.141592653589793 * (1.0 - left)));
  case KS_SCHEDULE_CONSTANT:
    break;
  }
  return 1;
}

static ks_status check_params(const ks_train_params *p, int64_t index) {
  bool sizes = p->batch_size >= 1 && p->micro_batch >= 0 && p->epochs >= 0 && p->steps >= 0 &&
               p->epochs <= INT32_MAX && p->round < (uint64_t)1 << 56;
  bool rates = p->learning_rate >= 0 && isfinite(p->learning_rate) && p->weight_decay >= 0 && p->beta1 >= 0 &&
               p->beta1 < 1 && p->beta2 >= 0 && p->beta2 < 1 && p->eps > 0 && p->max_grad_norm >= 0 &&
               p->warmup >= 0 && p->warmup < 1 && p->dropout >= 0 && p->dropout < 1;
  if (sizes && rates && (unsigned)p->schedule <= KS_SCHEDULE_COSINE) return KS_OK;
  return KS_FAIL(
      KS_EINVAL,
      "train: job %lld has parameters out of range; need batch_size >= 1, micro_batch, epochs, steps, "
      "learning_rate, weight_decay, max_grad_norm >= 0, beta1, beta2, warmup, dropout in [0, 1), eps > 0",
      (long long)index);
}

static ks_status check_adapter(const trainer *t, int64_t index) {
  const ks_adapter *a = t->trainees[index].job->adapter;
  const ks_model_config *m = &t->model->config, *c;
  if (!a) return KS_FAIL(KS_EINVAL, "train: job %lld has no adapter", (long long)index);
  c = &a->config;
  if (a->ctx != t->model->ctx || c->n_layers != m->n_layers || c->hidden_size != m->hidden_size ||
      c->intermediate_size != m->intermediate_size || c->n_heads != m->n_heads ||
      c->n_kv_heads != m->n_kv_heads || c->head_dim != m->head_dim)
    return KS_FAIL(KS_EINVAL, "train: the adapter of job %lld was made for another model", (long long)index);
  for (int64_t i = 0; i < index; i++) {
    if (t->trainees[i].job->adapter == a)
      return KS_FAIL(KS_EINVAL, "train: jobs %lld and %lld share an adapter", (long long)i, (long long)index);
  }
  return KS_OK;
}

/* Rows that a piece may have when it has more than one example. */
static int64_t piece_rows(const trainer *tr, const ks_train_params *p) {
  return p->dropout > 0 ? DROPOUT_ROWS : tr->max_rows;
}

/* Rows of the largest piece that any order can give, at most. */
static int64_t largest_piece(const trainer *tr, const ks_train_job *job) {
  int64_t longest = 0, total = 0;
  for (int64_t i = 0; i < job->n_examples; i++) {
    longest = ks_max_i64(longest, ks_example_n_rows(&job->examples[i]));
    total += ks_example_n_rows(&job->examples[i]);
  }
  int64_t several, micro = micro_size(&job->params);
  if (!ks_mul_i64(longest, micro, &several)) several = total;
  return ks_max_i64(longest, ks_min_i64(ks_min_i64(several, total), piece_rows(tr, &job->params)));
}

/* ---------------------------------------------------------------- order of examples */

static void shuffle(trainee *t) {
  const ks_train_params *p = &t->job->params;
  ks_rng rng = ks_rng_make(p->seed, KS_RNG_BATCH, p->round);
  rng.next = (uint64_t)t->epoch << 32;
  for (int64_t i = 0; i < t->job->n_examples; i++)
    t->order[i] = i;
  for (int64_t i = t->job->n_examples - 1; i > 0; i--) {
    int64_t j = (int64_t)ks_rng_below(&rng, (uint64_t)i + 1), kept = t->order[i];
    t->order[i] = t->order[j];
    t->order[j] = kept;
  }
}

/* Examples of the next optimizer step; a new order when an epoch begins. */
static void begin_step(trainee *t) {
  if (t->epoch < 0 || t->end == t->job->n_examples) {
    t->epoch++;
    t->end = 0;
    shuffle(t);
  }
  t->batch = t->next = t->end;
  t->end = ks_min_i64(t->job->n_examples, t->batch + t->job->params.batch_size);
  t->n_targets = 0;
  t->loss = 0;
  for (int64_t i = t->batch; i < t->end; i++)
    t->n_targets += ks_example_n_targets(&t->job->examples[t->order[i]]);
}

static bool is_active(const trainee *t) {
  return t->step < t->job->n_steps;
}

/* ---------------------------------------------------------------- one pass */

static ks_status fail_numeric(const trainee *t, const char *what, double value) {
  return KS_FAIL(KS_ENUMERIC, "train: job %lld, step %lld: %s is %g; lower the learning rate",
                 (long long)t->index, (long long)(t->step + 1), what, value);
}

static ks_adamw_job optimizer_job(const trainee *t) {
  const ks_train_params *p = &t->job->params;
  const ks_adapter *a = t->job->adapter;
  return (ks_adamw_job){.p = a->weights,
                        .m = a->m,
                        .v = a->v,
                        .grad = a->grads,
                        .n = a->n_params,
                        .lr = p->learning_rate * schedule_factor(p, t->step, t->job->n_steps),
                        .beta1 = p->beta1,
                        .beta2 = p->beta2,
                        .eps = p->eps,
                        .weight_decay = p->weight_decay,
                        .max_grad_norm = p->max_grad_norm,
                        .step = a->step + 1};
}

/* Whether this pass completes a batch that has something to learn. */
static bool takes_step(const trainee *t) {
  return t->piece_end == t->end && t->n_targets > 0;
}

/* What is packed, and an optimizer step for each member whose batch it completes; queued. */
static ks_status queue_pass(trainer *tr) {
  ks_packing *p = &tr->packing;
  int64_t n_jobs = 0;
  KS_TRY(ks_forward_backward(tr->run, &p->batch, p->rows, p->targets, p->scale, p->n_targets, p->loss));
  for (int64_t m = 0; m < tr->n_members; m++) {
    const trainee *t = &tr->trainees[tr->members[m]];
    if (takes_step(t)) tr->jobs[n_jobs++] = optimizer_job(t);
  }
  return ks_adamw(tr->model->ctx, &(ks_adamw_args){.jobs = tr->jobs, .n_jobs = n_jobs, .norm = tr->norms});
}

/* Passes of the same key queue the same work. */
static uint64_t pass_key(const trainer *tr) {
  const ks_batch *b = &tr->packing.batch;
  uint64_t key = 0x747261696e; /* "train" */
  key = ks_hash_mix(key, (uint64_t)tr->packing.n_targets);
  for (int64_t s = 0; s < b->n_seqs; s++)
    key = ks_hash_mix(key, (uint64_t)b->seq_offsets[s + 1]);
  for (int64_t m = 0; m < tr->n_members; m++)
    key = ks_hash_mix(key, 2 * (uint64_t)tr->members[m] + takes_step(&tr->trainees[tr->members[m]]));
  return key;
}

/* Books a completed batch. */
static ks_status end_batch(trainer *tr, trainee *t, double norm) {
  double mean = t->loss / (double)t->n_targets;
  if (t->n_targets > 0) {
    if (!isfinite(mean)) return fail_numeric(t, "the loss", mean);
    if (!isfinite(norm)) return fail_numeric(t, "the gradient's norm", norm);
    t->job->adapter->step++;
    t->job->step_loss[t->step] = (float)mean;
    t->job->step_grad_norm[t->step] = (float)norm;
  }
  t->step++;
  tr->steps_done++;
  if (is_active(t)) begin_step(t);
  return KS_OK;
}

/* Runs what is packed and hands each member its losses; in the order of the members. */
static ks_status run_pass(trainer *tr) {
  ks_ctx *ctx = tr->model->ctx;
  const float *loss = tr->packing.loss;
  int64_t n_jobs = 0;
  KS_TRY(ks_step_begin(ctx, pass_key(tr)));
  ks_status status = queue_pass(tr), ended = ks_step_end(ctx);
  KS_TRY(status != KS_OK ? status : ended);
  KS_TRY(ks_sync(ctx));
  for (int64_t m = 0; m < tr->n_members; m++) {
    trainee *t = &tr->trainees[tr->members[m]];
    double norm = takes_step(t) ? tr->norms[n_jobs++] : 0;
    for (; t->next < t->piece_end; t->next++) {
      const ks_example *e = &t->job->examples[t->order[t->next]];
      for (int64_t i = ks_example_n_targets(e); i > 0; i--)
        t->loss += *loss++;
      t->job->n_tokens += ks_example_n_rows(e);
    }
    t->n_passes++;
    if (t->next == t->end) KS_TRY(end_batch(tr, t, norm));
  }
  ks_packing_clear(&tr->packing);
  tr->n_members = 0;
  return KS_OK;
}

/* Sets the end of a job's next piece; its rows. */
static int64_t cut_piece(const trainer *tr, trainee *t) {
  const ks_train_params *p = &t->job->params;
  int64_t n_rows = 0, limit = piece_rows(tr, p), end = ks_min_i64(t->end, t->next + micro_size(p));
  for (t->piece_end = t->next; t->piece_end < end; t->piece_end++) {
    int64_t rows = ks_example_n_rows(&t->job->examples[t->order[t->piece_end]]);
    if (t->piece_end > t->next && rows > limit - n_rows) break;
    n_rows += rows;
  }
  return n_rows;
}

/* Adds a job's next piece, after running what is packed when it does not fit beside it. */
static ks_status add_piece(trainer *tr, int64_t index) {
  trainee *t = &tr->trainees[index];
  const ks_train_params *p = &t->job->params;
  ks_batch *b = &tr->packing.batch;
  int64_t n_rows = cut_piece(tr, t);
  bool fits = n_rows <= tr->max_rows - b->n_rows && (b->n_rows == 0 || b->dropout == p->dropout);
  if (!fits && tr->n_members > 0) KS_TRY(run_pass(tr));
  tr->members[tr->n_members++] = index;
  if (n_rows == 0) return KS_OK;
  b->dropout = p->dropout;
  ks_packing_begin_segment(&tr->packing, &t->view,
                           ks_rng_key(p->seed, KS_RNG_DROPOUT, p->round, (uint64_t)t->n_passes));
  for (int64_t i = t->next; i < t->piece_end; i++)
    ks_packing_add(&tr->packing, &t->job->examples[t->order[i]], (float)(1.0 / (double)t->n_targets));
  return KS_OK;
}

static ks_status report(trainer *tr, bool always) {
  double now = ks_clock_seconds();
  if (!always && now - tr->reported < REPORT_SECONDS) return KS_OK;
  tr->reported = now;
  return ks_progress_report(tr->progress, "train", (double)tr->steps_done, (double)tr->steps_all);
}

static ks_status train_all(trainer *tr) {
  KS_TRY(report(tr, true));
  while (tr->steps_done < tr->steps_all) {
    for (int64_t i = 0; i < tr->n; i++) {
      if (is_active(&tr->trainees[i])) KS_TRY(add_piece(tr, i));
    }
    KS_TRY(run_pass(tr));
    KS_TRY(report(tr, false));
  }
  return report(tr, true);
}

/* ---------------------------------------------------------------- begin, end */

static ks_status begin_job(trainer *tr, int64_t index, ks_run_params *run, int64_t *all_rows) {
  trainee *t = &tr->trainees[index];
  ks_train_job *job = t->job;
  int64_t rows = 0;
  KS_TRY(check_params(&job->params, index));
  KS_TRY(check_adapter(tr, index));
  if (job->n_examples < 0 || (job->n_examples > 0 && !job->examples))
    return KS_FAIL(KS_EINVAL, "train: job %lld has %lld examples at a NULL pointer", (long long)index,
                   (long long)job->n_examples);
  for (int64_t i = 0; i < job->n_examples; i++)
    KS_TRY_AS(ks_example_check(tr->model, &job->examples[i], i), "train: job %lld", (long long)index);
  job->n_steps = ks_train_n_steps(&job->params, job->n_examples);
  KS_TRY(ks_alloc_array(&job->step_loss, (size_t)job->n_steps, sizeof(float), "training"));
  KS_TRY(ks_alloc_array(&job->step_grad_norm, (size_t)job->n_steps, sizeof(float), "training"));
  KS_TRY(ks_alloc_array(&t->order, (size_t)job->n_examples, sizeof *t->order, "training"));
  rows = largest_piece(tr, job);
  KS_TRY(ks_mem_zero(tr->model->ctx, job->adapter->grads, (size_t)job->adapter->n_params * sizeof(float)));
  t->epoch = -1;
  t->view = ks_adapter_view_of(job->adapter);
  tr->steps_all += job->n_steps;
  if (job->n_steps > 0) begin_step(t);
  if (t->view.max_rank > run->max_rank) run->max_rank = t->view.max_rank;
  run->max_rows = ks_max_i64(run->max_rows, rows);
  *all_rows += rows;
  return KS_OK;
}

static ks_status begin_training(trainer *tr) {
  ks_run_params run = {.max_rows = 1, .backward = true, .recompute_layers = tr->recompute_layers};
  int64_t all_rows = 0;
  for (int64_t i = 0; i < tr->n; i++)
    KS_TRY(begin_job(tr, i, &run, &all_rows));
  if (tr->steps_all == 0) return KS_OK;
  run.max_rows = ks_max_i64(run.max_rows, ks_min_i64(all_rows, tr->max_rows));
  run.max_seqs = run.max_rows;
  KS_TRY(ks_alloc_array(&tr->members, (size_t)tr->n, sizeof *tr->members, "training"));
  KS_TRY(ks_alloc_array(&tr->jobs, (size_t)tr->n, sizeof *tr->jobs, "training"));
  KS_TRY(ks_alloc_array(&tr->norms, (size_t)tr->n, sizeof *tr->norms, "training"));
  KS_TRY(ks_packing_create(&tr->packing, run.max_rows, run.max_seqs));
  return ks_run_create(tr->model, &run, &tr->run);
}

static void end_training(trainer *tr, bool failed) {
  ks_run_destroy(tr->run);
  ks_packing_destroy(&tr->packing);
  free(tr->members);
  free(tr->jobs);
  free(tr->norms);
  for (int64_t i = 0; i < tr->n; i++) {
    ks_train_job *job = tr->trainees[i].job;
    free(tr->trainees[i].order);
    if (!failed) continue;
    free(job->step_loss);
    free(job->step_grad_norm);
    job->step_loss = job->step_grad_norm = NULL;
    job->n_steps = 0;
  }
  free(tr->trainees);
}

ks_status ks_train(ks_model *model, ks_train_job *jobs, int64_t n_jobs, const ks_train_limits *limits,
                   const ks_progress *progress) {
  const int64_t max_rows = limits ? limits->max_rows : 0;
  if (!model || n_jobs < 0 || (n_jobs > 0 && !jobs) || max_rows < 0)
    return KS_FAIL(KS_EINVAL, "ks_train: NULL argument, n_jobs %lld or max_rows %lld", (long long)n_jobs,
                   (long long)max_rows);
  trainer tr = {.model = model,
                .n = n_jobs,
                .max_rows = max_rows > 0 ? max_rows : ks_run_default_rows(model, true),
                .recompute_layers = limits ? limits->recompute_layers : 0,
                .progress = progress};
  KS_TRY(ks_alloc_array(&tr.trainees, (size_t)n_jobs, sizeof *tr.trainees, "training"));
  for (int64_t i = 0; i < n_jobs; i++) {
    tr.trainees[i] = (trainee){.job = &jobs[i], .index = i};
    jobs[i].step_loss = jobs[i].step_grad_norm = NULL;
    jobs[i].n_steps = jobs[i].n_tokens = 0;
  }
  ks_status status = begin_training(&tr);
  if (status == KS_OK && tr.steps_all > 0) status = train_all(&tr);
  end_training(&tr, status != KS_OK);
  return status;
}
