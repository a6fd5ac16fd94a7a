/* What an experiment will cost, from its configuration, a sample of its texts and a short timed embedding. */
#ifndef KS_ESTIMATE_H
#define KS_ESTIMATE_H

#include "experiments/sim.h"

typedef struct {
  int64_t n_cells;
  double embed_tokens, train_tokens, synth_tokens,
      eval_tokens; /* upper estimates: buffers full, answers of full length */
  double seconds;  /* from the measured embedding rate: training counts 3 x, decoding 4 x an embedded token */
  double bytes;    /* model, embeddings, adapters with moments, buffers, the largest training pass */
} ks_estimate;

/* Adds the cells of one cohort (those of the matrix that share cells[first]'s, owned by the shard) to e. */
ks_status ks_estimate_cohort(ks_ctx *ctx, const ks_matrix *m, int64_t first, const ks_shard *shard,
                             ks_estimate *e);
/* The whole matrix: one line a cell and the totals, as `run --dry-run` prints them. */
ks_status ks_estimate_text(const ks_matrix *m, const ks_shard *shard, ks_text *out);

#endif
