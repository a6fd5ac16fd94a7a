/* Semantically similar questions for kept sets, filtered by ROUGE-1 (METHOD 3). The response stays as it is.
 */
#ifndef KS_SYNTHESIZE_H
#define KS_SYNTHESIZE_H

#include "core/model/generate.h"
#include "core/model/tokenizer.h"

typedef enum { KS_SYNTH_NONE = 0, KS_SYNTH_MODEL, KS_SYNTH_RULES } ks_synthesizer_kind;

typedef struct {
  ks_synthesizer_kind kind;
  int64_t count;   /* accepted variants wanted for each kept set */
  int64_t retries; /* further tries for each variant that fails the check. Tries go in rounds: round 0 is the
                      first try of every variant of every source, round t the next try of those still lacking.
                      MODEL at temperature 0 writes the same text at every try: one try a source */
  double min_rouge1; /* sanity check: ROUGE-1 F1 (no stemming) of variant and original >= this ... */
  double max_rouge1; /* ... and <= this (1: a copy passes only if not identical); identical text never passes,
                        nor a repeat of an accepted variant */
  const char *prompt; /* MODEL: the rewriting prompt with {question} (and {response}) in it */
  const char *begin_mark,
      *end_mark; /* MODEL: the variant is what lies between the first begin mark and the next end mark ("[",
                    "]"), blanks around it taken off; empty begin: from the start; empty end: up to a newline
                    or the end. A token that starts with the end mark (or newline, without a begin mark) ends
                    the writing, and so does the model's own end of text: both close an open mark */
  float temperature, top_p;
  int64_t max_new_tokens;      /* MODEL */
  ks_generate_params generate; /* MODEL: bounds of generation; zeros: the defaults */
} ks_synthesize_params;

typedef enum {
  KS_VARIANT_ACCEPTED = 0,
  KS_VARIANT_EMPTY,
  KS_VARIANT_IDENTICAL,
  KS_VARIANT_REPEATED,
  KS_VARIANT_TOO_FAR,
  KS_VARIANT_TOO_NEAR,
  KS_VARIANT_NO_MARK,
  KS_VARIANT_NO_ROOM
} ks_variant_verdict;
/* "accepted"; NO_ROOM: prompt and max_new_tokens pass the model's context; the source is not tried and has
 * this one verdict, question "". (Cutting the prompt would have the model rewrite another question.) NO_MARK:
 * no begin mark, or cut before the end mark. */
const char *ks_variant_verdict_name(ks_variant_verdict v);

typedef struct {
  int64_t source; /* index into sources */
  char *question; /* owned; the text that was judged, accepted or not (NO_MARK: all that was written) */
  double rouge1;  /* F1 against the source's question; 0 where nothing could be judged */
  ks_variant_verdict verdict;
  int64_t n_tokens; /* written by the model for this try; RULES: 0 */
} ks_variant;

typedef struct {
  const char *question, *response;
  uint64_t id;     /* names the source's random stream (arrival index), with `round` */
  uint64_t round;  /* the trigger's number */
  uint64_t seed;   /* the cell's */
  int32_t adapter; /* which adapter writes: -1: the frozen model */
} ks_synth_source;

/* Tries for all sources together (batched over cells); the variants of a source depend on it alone: its text,
 * adapter and ks_rng_key(ks_rng_key(seed, KS_RNG_SYNTHESIS, id, round), KS_RNG_SYNTHESIS, variant, try).
 * *variants: every try in order (source, try, variant); free with ks_variants_free. model, tokenizer,
 * adapters: MODEL only, else NULL. Errors: KS_ECONFIG when the parameters make no sense (prompt without
 * {question}, max_new_tokens that leave no context). */
ks_status ks_synthesize(ks_model *model, const ks_tokenizer *tokenizer, const ks_synthesize_params *params,
                        const ks_synth_source *sources, int64_t n_sources, const ks_adapter_view *adapters,
                        int64_t n_adapters, const ks_progress *progress, ks_variant **variants,
                        int64_t *n_variants);
void ks_variants_free(ks_variant *v, int64_t n);

/* The rule-based rewriter alone: openers ("how do I" / "could you tell me how to"), "what is" / "what's" /
 * "tell me what ... is", clause moves ("if ..., what" / "what ... if"), synonyms and contractions from a
 * small English table, politeness. Draws from rng; out (added to) is valid UTF-8 and never the text itself.
 * Text that is not UTF-8: KS_EDATA. */
ks_status ks_rewrite_rules(const char *text, ks_rng *rng, ks_text *out);

#endif
