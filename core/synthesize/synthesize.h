/* Semantically similar questions for kept sets, filtered by ROUGE-1 (METHOD 3). The response stays as it is. */
#ifndef KS_SYNTHESIZE_H
#define KS_SYNTHESIZE_H

#include "core/model/generate.h"
#include "core/model/tokenizer.h"

typedef enum { KS_SYNTH_NONE = 0, KS_SYNTH_MODEL, KS_SYNTH_RULES } ks_synthesizer_kind;

typedef struct {
  ks_synthesizer_kind kind;
  int64_t count;   /* accepted variants wanted for each kept set */
  int64_t retries; /* further tries for each variant that fails the check */
  double min_rouge1; /* sanity check: ROUGE-1 F1 (no stemming) of variant and original >= this ... */
  double max_rouge1; /* ... and <= this (1: a copy passes only if not identical); identical text never passes, nor a repeat of an accepted variant */
  const char *prompt; /* MODEL: the rewriting prompt with {question} (and {response}) in it */
  const char *begin_mark, *end_mark; /* MODEL: the variant is what lies between them ("[", "]"); empty strings: the whole text up to a newline */
  float temperature, top_p;
  int64_t max_new_tokens;
  uint64_t seed;
} ks_synthesize_params;

typedef enum { KS_VARIANT_ACCEPTED = 0, KS_VARIANT_EMPTY, KS_VARIANT_IDENTICAL, KS_VARIANT_REPEATED, KS_VARIANT_TOO_FAR, KS_VARIANT_TOO_NEAR, KS_VARIANT_NO_MARK } ks_variant_verdict;
const char *ks_variant_verdict_name(ks_variant_verdict v);

typedef struct {
  int64_t source; /* index into sources */
  char *question; /* owned; the text that was judged, accepted or not */
  double rouge1;
  ks_variant_verdict verdict;
  int64_t n_tokens;
} ks_variant;

typedef struct {
  const char *question, *response;
  uint64_t id;      /* names the source's random stream (arrival index), with `round` */
  uint64_t round;   /* the trigger's number */
  uint64_t seed;    /* the cell's */
  int32_t adapter;  /* which adapter writes: -1: the frozen model */
} ks_synth_source;

/* Tries for all sources together (batched over cells); the variants of a source depend on it alone. *variants: every try in order (source, try); free with
 * ks_variants_free. */
ks_status ks_synthesize(ks_model *model, const ks_tokenizer *tokenizer, const ks_synthesize_params *params, const ks_synth_source *sources, int64_t n_sources, const ks_adapter_view *adapters, int64_t n_adapters, const ks_progress *progress, ks_variant **variants, int64_t *n_variants);
void ks_variants_free(ks_variant *v, int64_t n);

/* The rule-based rewriter alone: variant number `index` of text: polite openers, "what is" / "what's" / "tell me", word order, synonyms from a small table.
 * Draws from rng. */
ks_status ks_rewrite_rules(const char *text, ks_rng *rng, ks_text *out);

#endif
