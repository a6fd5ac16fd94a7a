/* Batched generation over prompts and adapters, with KV caches. Continuous batching: a finished sequence's place is taken by the
 * next request. Each request's tokens depend on it alone (prompt, adapter, sampler), not on the batch. */
#ifndef KS_GENERATE_H
#define KS_GENERATE_H

#include "core/model/forward.h"

typedef struct {
  const int32_t *prompt; /* at least one token */
  int64_t n_prompt;
  int32_t adapter; /* index into adapters, -1: none */
  ks_sampler sampler; /* counter: the index of the new token is added to it */
  int64_t max_new_tokens;
  const int32_t *stop_ids; /* generation ends after one of these (not part of the result) */
  int64_t n_stop;
  /* results; tokens is allocated, free() it */
  int32_t *tokens;
  int64_t n_tokens;
  bool stopped; /* by a stop id (else by length or context) */
} ks_request;

/* Defaults of the parameters, and the most prompt rows of a pass: what a check of memory must know. */
enum { KS_GENERATE_BATCH = 64, KS_GENERATE_PROMPT_ROWS = 512, KS_GENERATE_CACHE_MB = 512 };
typedef struct {
  int64_t max_batch;  /* sequences at a time; 0: 64 */
  int64_t cache_bytes; /* bound on the KV cache, which comes in pages of KS_ATTENTION_PAGE_UNIT tokens; 0: 512 MB, or what the
                          largest request needs */
  int64_t ahead; /* passes queued before their tokens are looked at, so that a device need not wait for the host: a sequence that
                    stops may have up to ahead - 1 passes in vain. 0: 4 on a device, 1 on the CPU */
} ks_generate_params;
#define KS_GENERATE_DEFAULT ((ks_generate_params){0, 0, 0})

/* new_tokens counts every token drawn, stop ids too, but none after them. A pass that holds prompts and new
 * tokens is shared by rows. The head counts to its pass, drawing to sample_seconds. */
typedef struct {
  int64_t prompt_tokens, new_tokens;
  double prefill_seconds, decode_seconds, sample_seconds;
} ks_generate_stats;

/* A prompt of max_seq_len tokens or more is KS_EINVAL (the caller cuts it). A request whose pages of the
 * cache (prompt + max_new_tokens - 1 tokens, within max_seq_len) pass a given cache_bytes is KS_EBUDGET. On
 * failure no request holds a result. A request whose prompt plus new tokens pass max_seq_len ends there.
 * stats (may be NULL) is added to. */
ks_status ks_generate(ks_model *model, ks_request *requests, int64_t n_requests,
                      const ks_adapter_view *adapters, int64_t n_adapters, const ks_generate_params *params,
                      const ks_progress *progress, ks_generate_stats *stats);

#endif
