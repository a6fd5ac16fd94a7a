/* Held-out questions: every trial answers all of them, in shared batches. */
#include "experiments/sim.h"

#include "core/score/score.h"

#include <math.h>

typedef struct {
  ks_trial **trials; /* [n_trials] that answer now */
  int64_t n_trials;
  ks_adapter_view *views; /* [n_trials] */
  int32_t *adapters;      /* [n_trials] index into views, -1: none yet */
  ks_request *requests;   /* [n_trials * n_eval] */
  ks_example *examples;   /* [n_trials * n_eval]; tokens of a question are shared by all trials */
  int32_t *adapter_of;    /* [n_trials * n_eval] */
  double *loss;
  int64_t *n_targets;
} exam;

static ks_status exam_create(const ks_stage *s, exam *e) {
  int64_t total;
  if (!ks_mul_i64(s->n_trials, s->world->data->n_eval, &total))
    return KS_FAIL(KS_EOVERFLOW, "too many questions");
  size_t n = (size_t)s->n_trials, all = (size_t)total;
  KS_TRY(ks_alloc_array(&e->trials, n, sizeof *e->trials, "evaluation"));
  KS_TRY(ks_alloc_array(&e->views, n, sizeof *e->views, "evaluation"));
  KS_TRY(ks_alloc_array(&e->adapters, n, sizeof *e->adapters, "evaluation"));
  KS_TRY(ks_alloc_array(&e->requests, all, sizeof *e->requests, "evaluation"));
  KS_TRY(ks_alloc_array(&e->examples, all, sizeof *e->examples, "evaluation"));
  KS_TRY(ks_alloc_array(&e->adapter_of, all, sizeof *e->adapter_of, "evaluation"));
  KS_TRY(ks_alloc_array(&e->loss, all, sizeof *e->loss, "evaluation"));
  return ks_alloc_array(&e->n_targets, all, sizeof *e->n_targets, "evaluation");
}

static void exam_free(exam *e, int64_t n_eval) {
  if (e->requests && e->examples) {
    for (int64_t i = 0; i < e->n_trials * n_eval; i++)
      free(e->requests[i].tokens);
    for (int64_t i = 0; i < n_eval && e->n_trials > 0; i++) {
      free((void *)(uintptr_t)e->requests[i].prompt);
      free((void *)(uintptr_t)e->examples[i].tokens);
    }
  }
  free(e->trials);
  free(e->views);
  free(e->adapters);
  free(e->requests);
  free(e->examples);
  free(e->adapter_of);
  free(e->loss);
  free(e->n_targets);
}

/* What was answered by the frozen model before still stands while no adapter has taken a step. */
static ks_status answers_again(ks_trial *t, int64_t window) {
  const ks_row_answer *old = t->untrained_answers.rows;
  for (int64_t i = 0; i < t->untrained_answers.n; i++) {
    ks_row_answer *row;
    KS_TRY(ks_trial_add_row(t, KS_TABLE_answer, &row));
    *row = old[i];
    row->answer = NULL;
    row->window = window;
    KS_TRY(ks_strdup(old[i].answer, &row->answer));
  }
  return KS_OK;
}

static ks_status keep_untrained_answers(ks_trial *t) {
  const ks_rows *now = &t->tables[KS_TABLE_answer];
  ks_rows *kept = &t->untrained_answers;
  KS_TRY(ks_alloc_array(&kept->rows, (size_t)now->n, sizeof(ks_row_answer), "answers"));
  ks_row_answer *to = kept->rows;
  for (; kept->n < now->n; kept->n++) {
    to[kept->n] = ((const ks_row_answer *)now->rows)[kept->n];
    to[kept->n].answer = NULL;
    KS_TRY(ks_strdup(((const ks_row_answer *)now->rows)[kept->n].answer, &to[kept->n].answer));
  }
  return KS_OK;
}

/* Questions as tokens once, shared by all trials: prompts and eval settings are a cohort's. */
static ks_status exam_ask(const ks_stage *s, exam *e, const int32_t *stop, int64_t n_stop) {
  const ks_world *w = s->world;
  const ks_config *c = w->config;
  int64_t n_eval = w->data->n_eval, context = w->model->config.max_seq_len;
  int64_t n_new = ks_min_i64(c->eval.max_new_tokens, context / 2);
  for (int64_t i = 0; i < n_eval; i++) {
    const ks_set *set = &w->data->sets[w->data->eval[i]];
    int32_t *prompt, *text;
    int64_t n_prompt, n_text, begin;
    KS_TRY(ks_world_encode_prompt(w, set->question, context - n_new, &prompt, &n_prompt));
    e->requests[i] = (ks_request){.prompt = prompt, .n_prompt = n_prompt};
    KS_TRY(ks_world_encode_example(w, set->question, set->preferred, context, &text, &n_text, &begin));
    e->examples[i] = (ks_example){text, n_text, begin};
  }
  for (int64_t j = 0; j < e->n_trials; j++) {
    const ks_config *k = e->trials[j]->config;
    for (int64_t i = 0; i < n_eval; i++) {
      int64_t at = j * n_eval + i;
      uint64_t key = ks_rng_key((uint64_t)k->seed, KS_RNG_SAMPLE, (uint64_t)w->data->eval[i], 0);
      e->requests[at] = (ks_request){
          .prompt = e->requests[i].prompt,
          .n_prompt = e->requests[i].n_prompt,
          .adapter = e->adapters[j],
          .sampler = {(float)k->eval.temperature, (int32_t)k->eval.top_k, (float)k->eval.top_p, key, 0},
          .max_new_tokens = n_new,
          .stop_ids = stop,
          .n_stop = n_stop};
      e->examples[at] = e->examples[i];
      e->adapter_of[at] = e->adapters[j];
    }
  }
  return KS_OK;
}

static ks_status score_answer(const ks_stage *s, const exam *e, ks_trial *t, int64_t at, int64_t set_id) {
  const ks_world *w = s->world;
  const ks_set *set = &w->data->sets[set_id];
  const ks_request *r = &e->requests[at];
  ks_text text = {0};
  ks_row_answer *row;
  ks_prf one, two, longest;
  bool stem = t->config->eval.stem;
  ks_status status;
  KS_TRY_OUT(ks_text_add(&text, "", 0));
  KS_TRY_OUT(ks_tokenizer_decode(w->tokenizer, r->tokens, (size_t)r->n_tokens, &text));
  KS_TRY_OUT(ks_rouge(KS_ROUGE_1, stem, set->preferred, text.data, &one));
  KS_TRY_OUT(ks_rouge(KS_ROUGE_2, stem, set->preferred, text.data, &two));
  KS_TRY_OUT(ks_rouge(KS_ROUGE_L, stem, set->preferred, text.data, &longest));
  KS_TRY_OUT(ks_trial_add_row(t, KS_TABLE_answer, &row));
  *row = (ks_row_answer){.window = s->window,
                         .set_id = set_id,
                         .topic = set->topic,
                         .rouge1_p = one.precision,
                         .rouge1_r = one.recall,
                         .rouge1_f1 = one.f1,
                         .rouge2_f1 = two.f1,
                         .rougeL_f1 = longest.f1,
                         .loss_sum = e->loss[at],
                         .loss_tokens = e->n_targets[at],
                         .n_new_tokens = r->n_tokens};
  KS_TRY_OUT(ks_strdup(t->config->eval.save_answers ? text.data : "", &row->answer));
out:
  ks_text_free(&text);
  return status;
}

static void note_means(ks_trial *t) {
  const ks_rows *answers = &t->tables[KS_TABLE_answer];
  const ks_row_answer *a = answers->rows;
  double loss = 0, rouge = 0;
  int64_t tokens = 0;
  for (int64_t i = 0; i < answers->n; i++) {
    loss += a[i].loss_sum;
    tokens += a[i].loss_tokens;
    rouge += a[i].rouge1_f1;
  }
  t->checkpoint.eval_loss = tokens > 0 ? loss / (double)tokens : NAN;
  t->checkpoint.eval_rouge1_f1 = answers->n > 0 ? rouge / (double)answers->n : NAN;
}

/* Who answers now, and who repeats what the frozen model said. */
static ks_status call_trials(const ks_stage *s, exam *e) {
  for (int64_t i = 0; i < s->n_trials; i++) {
    ks_trial *t = s->trials[i];
    t->checkpoint.eval_loss = t->checkpoint.eval_rouge1_f1 = NAN;
    bool last = s->window + 1 == ks_trial_n_windows(t);
    if (!last && !t->config->eval.every_trigger) continue;
    if (!t->trained && t->untrained_answers.n > 0) {
      KS_TRY(answers_again(t, s->window));
      note_means(t);
      continue;
    }
    int64_t j = e->n_trials++;
    e->trials[j] = t;
    e->adapters[j] = t->trained ? (int32_t)j : -1;
    if (t->trained) e->views[j] = ks_adapter_view_of(t->adapter);
  }
  return KS_OK;
}

ks_status ks_stage_evaluate(ks_stage *s) {
  double start = ks_clock_seconds();
  const ks_world *w = s->world;
  const ks_config *c = w->config;
  int64_t n_eval = w->data->n_eval, n_stop;
  int32_t stop[9];
  exam e = {0};
  ks_status status;
  KS_TRY_OUT(exam_create(s, &e));
  KS_TRY_OUT(call_trials(s, &e));
  ks_world_stop_ids(w, stop, &n_stop);
  if (e.n_trials == 0) goto out;
  KS_TRY_OUT(exam_ask(s, &e, stop, n_stop));
  ks_generate_params params = ks_world_generate_params(w);
  KS_TRY_OUT(ks_generate(w->model, e.requests, e.n_trials * n_eval, e.views, e.n_trials, &params, s->progress,
                         NULL));
  KS_TRY_OUT(ks_evaluate_loss(w->model, e.examples, e.adapter_of, e.n_trials * n_eval, e.views, e.n_trials,
                              c->run.max_rows, s->progress, e.loss, e.n_targets));
  for (int64_t j = 0; j < e.n_trials; j++) {
    for (int64_t i = 0; i < n_eval; i++)
      KS_TRY_OUT(score_answer(s, &e, e.trials[j], j * n_eval + i, w->data->eval[i]));
    note_means(e.trials[j]);
    if (!e.trials[j]->trained) KS_TRY_OUT(keep_untrained_answers(e.trials[j]));
  }
out:;
  double share = (ks_clock_seconds() - start) / (double)ks_max_i64(e.n_trials, 1);
  for (int64_t j = 0; j < e.n_trials; j++)
    e.trials[j]->time.evaluate += share;
  exam_free(&e, n_eval);
  return status;
}
