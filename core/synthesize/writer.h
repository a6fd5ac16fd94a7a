/* The model as writer of questions (internal to core/synthesize). */
#ifndef KS_SYNTHESIZE_WRITER_H
#define KS_SYNTHESIZE_WRITER_H

#include "core/synthesize/synthesize.h"

/* One try: variant number `variant` of `source`, for the try-th time. */
typedef struct {
  int64_t source, variant;
  uint64_t key;     /* of its random stream */
  char *text;       /* out, owned: what was written, before the marks are looked for */
  bool ended;       /* out: by the model or a mark, not for length */
  int64_t n_tokens; /* out */
} ks_attempt;

typedef struct {
  ks_model *model;
  const ks_tokenizer *tokenizer;
  const ks_synthesize_params *params;
  const ks_adapter_view *adapters;
  int64_t n_adapters;
  const ks_progress *progress;
  int32_t **prompts; /* [n_sources]; NULL: no room in the context */
  size_t *n_prompts;
  int64_t n_sources;
  int32_t *stops; /* end of text and tokens that start with the end mark */
  int64_t n_stops;
} ks_writer;

/* w: model, tokenizer, params, adapters, n_adapters and progress filled in, the rest zero. */
ks_status ks_writer_open(ks_writer *w, const ks_synth_source *sources, int64_t n_sources);
void ks_writer_close(ks_writer *w);
bool ks_writer_has_room(const ks_writer *w, int64_t source);
/* Writes all of them in one batch. */
ks_status ks_writer_write(ks_writer *w, const ks_synth_source *sources, ks_attempt *attempts, int64_t n);
/* The text between the marks, blanks taken off; false: no mark. It may be empty. */
ks_status ks_writer_extract(const ks_synthesize_params *params, const char *text, bool ended, bool *found,
                            char **out);
/* The prompt with {question} and {response} put in. */
ks_status ks_writer_prompt(const char *prompt, const ks_synth_source *source, ks_text *out);

#endif
