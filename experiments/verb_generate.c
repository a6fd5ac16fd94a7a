#include "experiments/cli.h"
#include "experiments/paths.h"
#include "experiments/progress.h"

#include "core/model/generate.h"
#include "core/model/tokenizer.h"
#include <stdio.h>
#include <string.h>

static const ks_option options[] = {
    {"model", "PATH", "llama2.c file or Hugging Face folder; default: the embedded base model"},
    {"tokenizer", "PATH", "default: beside the model"},
    {"prompt", "TEXT", "text to continue; default: empty"},
    {"temperature", "T", "0: the most probable token each time; default 0.5"},
    {"max-new-tokens", "N", "default 128"},
    {"top-k", "N", "sample from the N most probable tokens; 0, the default: all"},
    {"top-p", "P", "sample from the smallest set of tokens with this probability; default 1: all"},
    {"seed", "N", "of the sampling; default 1"},
    {"threads", "N", "0, the default: all cores"},
    {"dtype", "T", "weights in memory: f32 (default), bf16, q8_0, q4_0 or nf4"},
    {"device", "NAME", "cpu, cuda, or auto (default: a GPU when there is one)"},
    {NULL, NULL, NULL}};
static const ks_command command = {"generate",
                                   "",
                                   "Continues a prompt: prints the prompt and what the model adds.",
                                   options,
                                   0,
                                   0,
                                   "Example: keepsake generate --model stories260K.bin --tokenizer "
                                   "tok512.bin --temperature 0 --max-new-tokens 200"};

typedef struct {
  const char *model, *tokenizer, *prompt;
  int64_t max_new_tokens, top_k, seed, threads;
  double temperature, top_p;
  ks_dtype dtype;
  const char *device;
} settings;

static ks_status read_settings(const ks_args *a, settings *s) {
  *s = (settings){.model = ks_args_value(a, "model"),
                  .tokenizer = ks_args_value(a, "tokenizer"),
                  .prompt = ks_args_value(a, "prompt"),
                  .max_new_tokens = 128,
                  .seed = 1,
                  .temperature = 0.5,
                  .top_p = 1,
                  .dtype = KS_DTYPE_F32,
                  .device = ks_args_value(a, "device")};
  if (!s->prompt) s->prompt = "";
  if (!s->device) s->device = "auto";
  KS_TRY(ks_args_int(a, "max-new-tokens", 0, 1000000, &s->max_new_tokens));
  KS_TRY(ks_args_int(a, "top-k", 0, INT32_MAX, &s->top_k));
  KS_TRY(ks_args_int(a, "seed", 0, INT64_MAX, &s->seed));
  KS_TRY(ks_args_int(a, "threads", 0, 4096, &s->threads));
  KS_TRY(ks_args_float(a, "temperature", 0, 100, &s->temperature));
  KS_TRY(ks_args_float(a, "top-p", 0, 1, &s->top_p));
  if (!(s->top_p > 0))
    return KS_FAIL(KS_ECONFIG, "--top-p 0: nothing is left to sample from; give a probability above 0");
  const char *dtype = ks_args_value(a, "dtype");
  if (dtype) KS_TRY_AS(ks_dtype_parse(dtype, &s->dtype), "--dtype %s", dtype);
  if (!ks_dtype_is_weight(s->dtype))
    return KS_FAIL(KS_EUNSUPPORTED, "--dtype %s: weights are kept as f32, bf16, q8_0, q4_0 or nf4", dtype);
  size_t n = strlen(s->prompt), bad = ks_utf8_check(s->prompt, n);
  if (bad < n) return KS_FAIL(KS_ECONFIG, "--prompt: not UTF-8 at byte %zu", bad);
  return KS_OK;
}

/* Ids of prompt and continuation as one list. */
static ks_status continue_prompt(const settings *s, ks_model *model, const ks_tokenizer *tokenizer,
                                 ks_text *out) {
  int32_t *ids = NULL, stop[9];
  size_t n = 0, cap = 0;
  ks_bar *bar = NULL;
  ks_request request = {.adapter = -1, .max_new_tokens = s->max_new_tokens};
  ks_status status;
  KS_TRY_OUT(ks_tokenizer_encode(tokenizer, s->prompt, strlen(s->prompt), true, &ids, &n, &cap));
  if (n == 0) {
    status = KS_FAIL(KS_ECONFIG,
                     "--prompt: empty, and the tokenizer has no token to begin a text with; give some text");
    goto out;
  }
  if ((int64_t)n >= model->config.max_seq_len) {
    status = KS_FAIL(KS_ECONFIG, "--prompt: %zu tokens, but the model reads %lld; give a shorter one", n,
                     (long long)model->config.max_seq_len);
    goto out;
  }
  int n_stop = 0;
  for (int i = 0; i < model->config.n_eos && n_stop < 7; i++)
    stop[n_stop++] = model->config.eos_ids[i];
  if (ks_tokenizer_eos(tokenizer) >= 0) stop[n_stop++] = ks_tokenizer_eos(tokenizer);
  if (ks_tokenizer_bos(tokenizer) >= 0) stop[n_stop++] = ks_tokenizer_bos(tokenizer);
  request.prompt = ids;
  request.n_prompt = (int64_t)n;
  request.stop_ids = stop;
  request.n_stop = n_stop;
  request.sampler = (ks_sampler){.temperature = (float)s->temperature,
                                 .top_k = (int32_t)s->top_k,
                                 .top_p = (float)s->top_p,
                                 .key = ks_rng_key((uint64_t)s->seed, KS_RNG_SAMPLE, 0, 0)};
  KS_TRY_OUT(ks_bar_create(&bar));
  KS_TRY_OUT(ks_generate(model, &request, 1, NULL, 0, &KS_GENERATE_DEFAULT, ks_bar_progress(bar), NULL));
  int32_t *all = realloc(ids, (n + (size_t)request.n_tokens) * sizeof *ids);
  if (!all) {
    status = KS_FAIL(KS_ENOMEM, "no memory for the generated text");
    goto out;
  }
  ids = all;
  if (request.n_tokens > 0) memcpy(ids + n, request.tokens, (size_t)request.n_tokens * sizeof *ids);
  KS_TRY_OUT(ks_tokenizer_decode(tokenizer, ids, n + (size_t)request.n_tokens, out));
out:
  ks_bar_destroy(bar);
  free(request.tokens);
  free(ids);
  return status;
}

static ks_status generate(const settings *s) {
  ks_ctx *ctx = NULL;
  ks_model *model = NULL;
  ks_tokenizer *tokenizer = NULL;
  char *model_path = NULL, *tokenizer_path = NULL;
  ks_text text = {0};
  ks_status status;
  KS_TRY_OUT(ks_model_path_default(s->model, &model_path));
  KS_TRY_OUT(ks_tokenizer_path_find(s->tokenizer, model_path, &tokenizer_path));
  ks_ctx_params params = {.backend = s->device,
                          .n_threads = (int)s->threads,
                          .activations = s->dtype == KS_DTYPE_F32 ? KS_DTYPE_F32 : KS_DTYPE_BF16};
  KS_TRY_OUT(ks_ctx_create(&ctx, &params));
  KS_TRY_OUT(ks_model_load(ctx, model_path, &(ks_model_load_params){.dtype = s->dtype}, &model));
  KS_TRY_OUT(ks_tokenizer_load(tokenizer_path, model->config.vocab_size, &tokenizer));
  KS_TRY_OUT(continue_prompt(s, model, tokenizer, &text));
  printf("%s\n", text.data ? text.data : "");
out:
  ks_text_free(&text);
  ks_tokenizer_destroy(tokenizer);
  ks_model_destroy(model);
  ks_ctx_destroy(ctx);
  free(tokenizer_path);
  free(model_path);
  return status;
}

int ks_verb_generate(int argc, char **argv) {
  ks_args args;
  settings s;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_status status = read_settings(&args, &s);
  if (status == KS_OK) status = generate(&s);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
