/* Random models and adapters for tests, each twice: for the library, and in float64 for the oracle. */
#ifndef KS_MODEL_TWIN_H
#define KS_MODEL_TWIN_H

#include "core/model/forward.h"
#include "tests/oracle/oracle_llama.h"

/* Shapes that differ in head size, grouping, biases, norms of q and k, tying. */
typedef struct {
  const char *name;
  ks_model_config config;
} ks_twin_case;
enum { KS_N_TWIN_CASES = 4 };
extern const ks_twin_case ks_twin_cases[KS_N_TWIN_CASES];

typedef struct {
  ks_model model; /* all fields that passes read; freed by ks_twin_free only */
  ks_oracle_llama oracle;
} ks_twin;
/* Aborts on failure. */
void ks_twin_make(ks_twin *t, ks_ctx *ctx, const ks_model_config *config, ks_dtype dtype, uint64_t seed);
void ks_twin_free(ks_twin *t);

/* An adapter with random A and B, in the layout of ks_adapter. */
typedef struct {
  ks_ctx *ctx;
  int64_t n;
  float *weights, *grads; /* backend memory [n] */
  double *oracle_weights; /* [n] */
  ks_lora *loras;
  ks_adapter_view view;
  ks_oracle_lora oracle;
} ks_twin_adapter;
void ks_twin_adapter_make(ks_twin_adapter *a, ks_ctx *ctx, const ks_model_config *c, int32_t rank,
                          uint32_t targets, uint64_t seed);
void ks_twin_adapter_free(ks_twin_adapter *a);
/* Copies of grads or weights; free() it. */
float *ks_twin_download(ks_ctx *ctx, const float *x, int64_t n);

/* Random tokens, each below n_vocab. free() it. */
int32_t *ks_twin_tokens(int64_t n, int64_t n_vocab, uint64_t seed);

/* Aborts with the library's message unless s is KS_OK. */
void ks_must(ks_status s);
/* A CPU context of n threads, or with KS_TEST_BACKEND=cuda a GPU (guard.h); activations float32, or of a given type where
 * the backend has a choice. */
ks_ctx *ks_twin_ctx(int n_threads);
ks_ctx *ks_twin_ctx_as(int n_threads, ks_dtype activations);

#endif
