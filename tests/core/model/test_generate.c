#include "core/model/generate.h"
#include "core/model/tokenizer.h"
#include "tests/oracle/guard.h"
#include "tests/oracle/model_twin.h"
#include <criterion/criterion.h>
#include <stdio.h>

#define ALL_TARGETS ((1u << KS_N_TARGETS) - 1)
enum { N_REQUESTS = 16, N_ADAPTERS = 3 };

typedef struct {
  ks_ctx *ctx;
  ks_twin twin;
  ks_twin_adapter adapters[N_ADAPTERS];
  ks_adapter_view views[N_ADAPTERS];
  int32_t *prompts[N_REQUESTS];
} world;

static void make_world(world *w, int n_threads, const ks_model_config *c, ks_dtype dtype) {
  w->ctx = ks_twin_ctx_as(n_threads, dtype);
  ks_twin_make(&w->twin, w->ctx, c, dtype, 31);
  for (int i = 0; i < N_ADAPTERS; i++) {
    ks_twin_adapter_make(&w->adapters[i], w->ctx, c, 1 + i, i == 1 ? 1 | 8 : ALL_TARGETS, (uint64_t)i);
    w->views[i] = w->adapters[i].view;
  }
  for (int i = 0; i < N_REQUESTS; i++)
    w->prompts[i] = ks_twin_tokens(63, c->vocab_size, (uint64_t)i);
}

static void free_world(world *w) {
  for (int i = 0; i < N_REQUESTS; i++)
    free(w->prompts[i]);
  for (int i = 0; i < N_ADAPTERS; i++)
    ks_twin_adapter_free(&w->adapters[i]);
  ks_twin_free(&w->twin);
  ks_ctx_destroy(w->ctx);
}

/* Prompts of 1 to 46 tokens, greedy and sampled, with and without adapters. */
static void make_requests(const world *w, ks_request *r) {
  for (int i = 0; i < N_REQUESTS; i++)
    r[i] = (ks_request){.prompt = w->prompts[i],
                        .n_prompt = 1 + 3 * i,
                        .adapter = (i * 7) % 4 - 1,
                        .sampler = {.temperature = i % 3 ? 0.9f : 0,
                                    .top_k = i % 2 ? 10 : 0,
                                    .top_p = 0.95f,
                                    .key = 5,
                                    .counter = (uint64_t)(1000 * i)},
                        .max_new_tokens = 5 + i % 7};
}

static void free_requests(ks_request *r, int n) {
  for (int i = 0; i < n; i++)
    free(r[i].tokens);
}

static void expect_same(const ks_request *a, const ks_request *b, const char *what) {
  for (int i = 0; i < N_REQUESTS; i++) {
    cr_expect_eq(a[i].n_tokens, b[i].n_tokens, "%s: request %d", what, i);
    cr_expect_eq(a[i].stopped, b[i].stopped);
    cr_expect_arr_eq(a[i].tokens, b[i].tokens, (size_t)a[i].n_tokens * sizeof(int32_t), "%s: request %d",
                     what, i);
  }
}

Test(generate, a_request_does_not_depend_on_the_batch) {
  for (int c = 0; c < (ks_test_is_shim() ? 2 : KS_N_TWIN_CASES); c++) {
    ks_request reference[N_REQUESTS];
    for (int threads = 1; threads <= (ks_test_is_shim() ? 1 : 2); threads++) {
      world w;
      make_world(&w, threads, &ks_twin_cases[c].config, c == 1 ? KS_DTYPE_BF16 : KS_DTYPE_F32);
      const ks_model_config *m = &w.twin.model.config;
      int64_t row = m->n_layers * 2 * m->n_kv_heads * m->head_dim * 4;
      const ks_generate_params params[] = {
          {0, 0, 1}, {1, 0, 3}, {3, 0, 0}, {16, 64 * row, 64}, {5, 191 * row, 2}};
      for (size_t k = 0; k < sizeof params / sizeof params[0]; k++) {
        ks_request r[N_REQUESTS];
        ks_generate_stats stats = {0};
        make_requests(&w, r);
        ks_must(ks_generate(&w.twin.model, r, N_REQUESTS, w.views, N_ADAPTERS, &params[k], NULL, &stats));
        int64_t prompts = 0, fresh = 0;
        for (int i = 0; i < N_REQUESTS; i++) {
          cr_expect_eq(r[i].n_tokens, r[i].max_new_tokens);
          prompts += r[i].n_prompt;
          fresh += r[i].n_tokens;
        }
        cr_expect_eq(stats.prompt_tokens, prompts);
        cr_expect_eq(stats.new_tokens, fresh);
        if (threads == 1 && k == 0) {
          memcpy(reference, r, sizeof r);
          continue;
        }
        expect_same(reference, r, ks_twin_cases[c].name);
        free_requests(r, N_REQUESTS);
      }
      if (threads == 1) { /* and one by one */
        ks_request r[N_REQUESTS];
        make_requests(&w, r);
        for (int i = 0; i < N_REQUESTS; i++)
          ks_must(ks_generate(&w.twin.model, &r[i], 1, w.views, N_ADAPTERS, NULL, NULL, NULL));
        expect_same(reference, r, "alone");
        free_requests(r, N_REQUESTS);
      }
      free_world(&w);
    }
    free_requests(reference, N_REQUESTS);
  }
}

/* Each greedy token is the largest logit of a forward pass over all tokens before it: decoding from the cache
 * equals prefill. */
Test(generate, the_cache_gives_what_a_full_pass_gives) {
  for (int c = 0; c < KS_N_TWIN_CASES; c++) {
    world w;
    make_world(&w, 2, &ks_twin_cases[c].config, KS_DTYPE_F32);
    int64_t n_vocab = w.twin.model.config.vocab_size;
    ks_request r = {
        .prompt = w.prompts[0], .n_prompt = 9, .adapter = 2, .sampler = {.top_p = 1}, .max_new_tokens = 55};
    ks_must(ks_generate(&w.twin.model, &r, 1, w.views, N_ADAPTERS, NULL, NULL, NULL));
    cr_expect_eq(r.n_tokens, 55, "prompt and tokens fill the context of 64");
    int32_t tokens[64];
    memcpy(tokens, r.prompt, 9 * sizeof *tokens);
    memcpy(tokens + 9, r.tokens, 55 * sizeof *tokens);
    float *logits = malloc((size_t)(64 * n_vocab) * sizeof *logits);
    ks_run *run = NULL;
    ks_must(
        ks_run_create(&w.twin.model, &(ks_run_params){.max_rows = 64, .max_seqs = 1, .max_rank = 8}, &run));
    int64_t offsets[2] = {0, 64};
    ks_segment s = {0, 64, 2, 0};
    ks_must(ks_forward_logits(run,
                              &(ks_batch){.tokens = tokens,
                                          .n_rows = 64,
                                          .seq_offsets = offsets,
                                          .n_seqs = 1,
                                          .segments = &s,
                                          .n_segments = 1,
                                          .adapters = w.views,
                                          .n_adapters = N_ADAPTERS},
                              logits));
    for (int64_t i = 9; i < 64; i++) {
      int64_t best = 0;
      for (int64_t j = 1; j < n_vocab; j++)
        best = logits[(i - 1) * n_vocab + j] > logits[(i - 1) * n_vocab + best] ? j : best;
      cr_expect_eq(tokens[i], best, "%s: token %ld", ks_twin_cases[c].name, (long)i);
    }
    free(logits);
    free(r.tokens);
    ks_run_destroy(run);
    free_world(&w);
  }
}

/* Requests of several lengths that stop at different tokens: the same for flights of any length, and nothing
 * counted after a stop. */
Test(generate, flights_change_nothing) {
  enum { N = 5 };
  world w;
  make_world(&w, 1, &ks_twin_cases[0].config, KS_DTYPE_F32);
  ks_request reference[N];
  static const int64_t lengths[] = {1, 2, 7, 64};
  for (int k = 0; k < 4; k++) {
    const int64_t ahead = lengths[k];
    ks_request r[N];
    ks_generate_stats stats = {0};
    int32_t stops[N];
    int64_t drawn = 0;
    for (int i = 0; i < N; i++) {
      r[i] = (ks_request){.prompt = w.prompts[0],
                          .n_prompt = 3 + i,
                          .adapter = i % N_ADAPTERS - 1,
                          .sampler = {.temperature = (float)(i % 2), .top_p = 0.9F, .key = (uint64_t)i},
                          .max_new_tokens = 4 + 5 * i};
      if (ahead == 1 || reference[i].n_tokens < 3) continue;
      stops[i] = reference[i].tokens[reference[i].n_tokens * i / N];
      r[i].stop_ids = &stops[i];
      r[i].n_stop = 1;
    }
    ks_must(ks_generate(&w.twin.model, r, N, w.views, N_ADAPTERS,
                        &(ks_generate_params){.max_batch = 3, .ahead = ahead}, NULL, &stats));
    for (int i = 0; i < N; i++) {
      int64_t n = r[i].n_tokens;
      drawn += n + r[i].stopped;
      if (ahead == 1) continue;
      cr_expect(r[i].stopped == (r[i].n_stop > 0), "request %d, %ld ahead", i, (long)ahead);
      cr_expect(r[i].n_stop == 0 || reference[i].tokens[n] == stops[i], "request %d, %ld ahead", i,
                (long)ahead);
      cr_expect_arr_eq(r[i].tokens, reference[i].tokens, (size_t)n * sizeof *stops, "request %d, %ld ahead",
                       i, (long)ahead);
    }
    cr_expect_eq(stats.new_tokens, drawn, "%ld ahead", (long)ahead);
    if (ahead == 1)
      memcpy(reference, r, sizeof r);
    else
      free_requests(r, N);
  }
  free_requests(reference, N);
  free_world(&w);
}

Test(generate, stops_limits_and_context) {
  world w;
  make_world(&w, 1, &ks_twin_cases[0].config, KS_DTYPE_F32);
  ks_model *m = &w.twin.model;
  ks_request r = {
      .prompt = w.prompts[0], .n_prompt = 4, .adapter = -1, .sampler = {.top_p = 1}, .max_new_tokens = 12};
  ks_must(ks_generate(m, &r, 1, NULL, 0, NULL, NULL, NULL));
  int64_t first = 0;
  int32_t all[12], stops[2] = {60000, 0};
  memcpy(all, r.tokens, sizeof all);
  free(r.tokens);
  stops[1] = all[5];
  while (all[first] != stops[1])
    first++;
  r.stop_ids = stops;
  r.n_stop = 2;
  ks_generate_stats stats = {0};
  ks_must(ks_generate(m, &r, 1, NULL, 0, NULL, NULL, &stats));
  cr_expect(r.stopped);
  cr_expect_eq(r.n_tokens, first, "the stop id is not part of the result");
  cr_expect_eq(stats.new_tokens, first + 1);
  cr_expect_arr_eq(r.tokens, all, (size_t)first * sizeof *all);
  free(r.tokens);
  r.n_stop = 0;
  r.max_new_tokens = INT64_MAX;
  ks_must(ks_generate(m, &r, 1, NULL, 0, NULL, NULL, NULL));
  cr_expect_eq(r.n_tokens, 60, "the context ends at 64");
  cr_expect_not(r.stopped);
  free(r.tokens);
  r.max_new_tokens = 0;
  ks_must(ks_generate(m, &r, 1, NULL, 0, NULL, NULL, NULL));
  cr_expect_eq(r.n_tokens, 0);
  cr_expect_neq(r.tokens, NULL);
  free(r.tokens);
  ks_must(ks_generate(m, NULL, 0, NULL, 0, NULL, NULL, NULL));
  free_world(&w);
}

static bool stop_after(void *user, const char *stage, double done, double total) {
  int *calls = user;
  cr_expect_str_eq(stage, "generate");
  cr_expect_leq(done, total);
  return --*calls > 0;
}

Test(generate, refusals_and_interruption) {
  world w;
  make_world(&w, 1, &ks_twin_cases[0].config, KS_DTYPE_F32);
  ks_model *m = &w.twin.model;
  int32_t alien = 61;
  const ks_request good = {
      .prompt = w.prompts[0], .n_prompt = 4, .adapter = -1, .sampler = {.top_p = 1}, .max_new_tokens = 12};
  ks_request first = good;
  ks_must(ks_generate(m, &first, 1, NULL, 0, NULL, NULL, NULL)); /* the context gets its own scratch */
  free(first.tokens);
  size_t before = ks_mem_used(w.ctx);
  ks_request bad[6] = {good, good, good, good, good, good};
  bad[0].n_prompt = 0;
  bad[1].n_prompt = 64;
  bad[2].prompt = &alien;
  bad[2].n_prompt = 1;
  bad[3].adapter = N_ADAPTERS;
  bad[4].max_new_tokens = -1;
  bad[5].n_stop = 1;
  for (int i = 0; i < 6; i++) {
    ks_request r[2] = {good, bad[i]};
    cr_expect_eq(ks_generate(m, r, 2, w.views, N_ADAPTERS, NULL, NULL, NULL), KS_EINVAL, "request %d", i);
    cr_expect_eq(r[0].tokens, NULL);
  }
  ks_request r = good;
  cr_expect_eq(ks_generate(m, &r, 1, NULL, 0, &(ks_generate_params){.cache_bytes = 1000}, NULL, NULL),
               KS_EBUDGET);
  cr_expect_eq(ks_generate(m, &r, 1, NULL, 0, &(ks_generate_params){.ahead = 65}, NULL, NULL), KS_EINVAL);
  r.sampler.temperature = -1;
  cr_expect_eq(ks_generate(m, &r, 1, NULL, 0, NULL, NULL, NULL), KS_EINVAL);
  cr_expect_eq(r.tokens, NULL);
  for (int calls = 1; calls <= 2; calls++) {
    int left = calls;
    r = good;
    cr_expect_eq(ks_generate(m, &r, 1, NULL, 0, NULL, &(ks_progress){stop_after, &left}, NULL),
                 KS_EINTERRUPTED);
    cr_expect_eq(r.tokens, NULL);
  }
  cr_expect_eq(ks_mem_used(w.ctx), before, "nothing stays behind");
  free_world(&w);
}

/* The public golden text of llama2.c's own test; KS_STORIES260K names the folder with stories260K.bin and
 * tok512.bin. */
Test(generate, golden_text_of_stories260K) {
  static const char golden[] =
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
      "she saw a big, red ball. "
      "She wanted to play with it, but it was too high.\n"
      "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, "
      "\"I want to play with your "
      "ball, but I can't find it.\"\n"
      "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
      "Lily didn't want to help her mom, so she";
  const char *folder = getenv("KS_STORIES260K");
  if (!folder) cr_skip_test("set KS_STORIES260K to the folder of stories260K.bin and tok512.bin");
  const char *files[] = {"stories260K.bin", "stories260K_v1.bin"};
  for (int i = 0; i < 2; i++) {
    char path[512];
    ks_ctx *ctx = ks_twin_ctx(2);
    ks_model *model = NULL;
    ks_tokenizer *tokenizer = NULL;
    ks_text text = {0};
    snprintf(path, sizeof path, "%s/%s", folder, files[i]);
    ks_must(ks_model_load(ctx, path, &KS_MODEL_LOAD_DEFAULT, &model));
    snprintf(path, sizeof path, "%s/tok512.bin", folder);
    ks_must(ks_tokenizer_load(path, model->config.vocab_size, &tokenizer));
    int32_t bos = ks_tokenizer_bos(tokenizer);
    ks_request r = {
        .prompt = &bos, .n_prompt = 1, .adapter = -1, .sampler = {.top_p = 1}, .max_new_tokens = 200};
    ks_must(ks_generate(model, &r, 1, NULL, 0, NULL, NULL, NULL));
    ks_must(ks_tokenizer_decode(tokenizer, r.tokens, (size_t)r.n_tokens, &text));
    cr_expect_str_eq(text.data, golden, "%s: %s", files[i], text.data);
    free(r.tokens);
    ks_text_free(&text);
    ks_tokenizer_destroy(tokenizer);
    ks_model_destroy(model);
    ks_ctx_destroy(ctx);
  }
}
