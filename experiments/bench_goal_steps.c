/* Training steps of `keepsake bench goals`. Steps of a group share the memory of their passes, but for those that
 * compute layers again, and the one that is weighed alone. */
#include "experiments/bench_goals.h"
#include "experiments/bench_step.h"

#include <math.h>
#include <stdio.h>

/* For the largest step of the group. */
static ks_status share_run(ks_goal_run *run) {
  ks_run_params params = {.backward = true};
  if (run->shared) return KS_OK;
  for (int64_t i = 0; i < run->n_subjects; i++) {
    const ks_goal_parameters *p = &run->subjects[i].p;
    params.max_rows = ks_max_i64(params.max_rows, p->n_seqs * p->seq_len);
    params.max_seqs = ks_max_i64(params.max_seqs, p->n_seqs);
    params.max_rank = p->rank > params.max_rank ? (int32_t)p->rank : params.max_rank;
  }
  return ks_run_create(run->model, &params, &run->shared);
}

static ks_status make_step(ks_goal_run *run, ks_goal_subject *s, bool is_frozen) {
  const ks_goal_parameters *p = &s->p;
  ks_bench_step *step = NULL;
  uint32_t targets = 0;
  const bool shares = !run->is_alone && p->recompute_layers == 0;
  if (!is_frozen) KS_TRY(ks_targets_parse(p->targets, &targets));
  KS_TRY(ks_alloc_array(&step, 1, sizeof *step, "bench"));
  s->state = step;
  if (shares) KS_TRY(share_run(run));
  const ks_bench_step_params params = {.model = run->model,
                                       .n_seqs = p->n_seqs,
                                       .seq_len = p->seq_len,
                                       .n_adapters = p->n_adapters,
                                       .rank = (int32_t)p->rank,
                                       .targets = targets,
                                       .is_frozen = is_frozen,
                                       .key = (uint64_t)(s - run->subjects) + 1,
                                       .recompute_layers = p->recompute_layers,
                                       .run = shares ? run->shared : NULL};
  KS_TRY(ks_bench_step_create(&params, step));
  const int64_t n_tokens = p->n_seqs * p->seq_len;
  s->timed.fn = ks_bench_step_once;
  s->timed.arg = step;
  s->timed.waits = true;
  s->load.work = (double)n_tokens;
  s->load.flops = ks_bench_train_flops(&run->model->config, (int32_t)p->rank, targets, n_tokens, p->seq_len);
  const int n =
      snprintf(s->what, sizeof s->what, "%s, %lld x %lld tokens, %s", p->shape, (long long)p->n_seqs,
               (long long)p->seq_len, is_frozen ? "no adapters but one" : p->targets);
  if (p->recompute_layers > 0)
    snprintf(s->what + n, sizeof s->what - (size_t)n, ", %lld layers again", (long long)p->recompute_layers);
  return KS_OK;
}

static ks_status make_lora_step(ks_goal_run *run, ks_goal_subject *s) {
  return make_step(run, s, false);
}
static ks_status make_frozen_step(ks_goal_run *run, ks_goal_subject *s) {
  return make_step(run, s, true);
}

static ks_status step_finish(ks_goal_run *run, ks_goal_subject *s) {
  const ks_bench_step *step = s->state;
  snprintf(s->note, sizeof s->note, "gradient norm %.3g to %.3g, loss %.4f to %.4f in %lld steps%s",
           step->first_norm, step->least_norm, step->first_loss, step->mean_loss, (long long)step->n_steps,
           step->p.is_frozen
               ? "; one adapter at q of the lowest layer, so that gradients go all the way down, "
                 "and no norm is computed again for others"
               : "");
  if (!ks_bench_step_learns(step)) ks_goal_wrong(s, "it does not learn");
  if (run->b->info.has_graphs && (s->launches != 0 || s->graphs != 1 || s->waits != 1))
    ks_goal_wrong(s, "a step is %g launches, %g graphs, %g waits instead of one graph and one wait",
                  s->launches, s->graphs, s->waits);
  return KS_OK;
}

static void step_drop(ks_goal_subject *s) {
  if (s->state) ks_bench_step_destroy(s->state);
  free(s->state);
}

const ks_goal_kind ks_goal_step_kinds[] = {
    {"lora_step", true, make_lora_step, ks_goal_sample_hot, step_finish, step_drop},
    {"frozen_step", true, make_frozen_step, ks_goal_sample_hot, step_finish, step_drop},
    {0}};
