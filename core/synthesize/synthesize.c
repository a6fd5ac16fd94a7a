#include "core/synthesize/synthesize.h"
#include "core/score/score.h"
#include "core/synthesize/writer.h"

const char *ks_variant_verdict_name(ks_variant_verdict v) {
  static const char *const names[] = {
      [KS_VARIANT_ACCEPTED] = "accepted",   [KS_VARIANT_EMPTY] = "empty",
      [KS_VARIANT_IDENTICAL] = "identical", [KS_VARIANT_REPEATED] = "repeated",
      [KS_VARIANT_TOO_FAR] = "too far",     [KS_VARIANT_TOO_NEAR] = "too near",
      [KS_VARIANT_NO_MARK] = "no mark",     [KS_VARIANT_NO_ROOM] = "no room"};
  return (size_t)v < sizeof names / sizeof *names ? names[v] : "unknown";
}

void ks_variants_free(ks_variant *v, int64_t n) {
  if (!v) return;
  for (int64_t i = 0; i < n; i++)
    free(v[i].question);
  free(v);
}

typedef struct {
  const ks_synthesize_params *params;
  const ks_synth_source *sources;
  int64_t n_sources, count, n_rounds; /* count variants of each source, n_rounds tries of each */
  const char **accepted;              /* [n_sources, count]; borrowed from variants */
  ks_variant *variants;
  int64_t n_variants, cap_variants;
  ks_writer writer;
} synthesis;

static ks_status add_variant(synthesis *s, ks_variant v) {
  if (s->n_variants == s->cap_variants) {
    int64_t cap = s->cap_variants ? 2 * s->cap_variants : 64;
    ks_variant *grown = realloc(s->variants, (size_t)cap * sizeof *grown);
    if (!grown) return KS_FAIL(KS_ENOMEM, "synthesis: no memory for %lld variants", (long long)cap);
    s->variants = grown;
    s->cap_variants = cap;
  }
  s->variants[s->n_variants++] = v;
  return KS_OK;
}

static bool is_identical(const char *original, const char *variant) {
  size_t n = strlen(original), blank = strspn(original, " \t\r\n\f\v");
  while (n > blank && strchr(" \t\r\n\f\v", original[n - 1]))
    n--;
  return strlen(variant) == n - blank && memcmp(variant, original + blank, n - blank) == 0;
}

static bool is_repeated(const synthesis *s, const ks_variant *v) {
  for (int64_t i = 0; i < s->count; i++) {
    const char *other = s->accepted[v->source * s->count + i];
    if (other && strcmp(other, v->question) == 0) return true;
  }
  return false;
}

static ks_status judge(const synthesis *s, bool found, ks_variant *v) {
  const char *original = s->sources[v->source].question;
  ks_prf rouge = {0};
  if (found) KS_TRY(ks_rouge(KS_ROUGE_1, false, original, v->question, &rouge));
  v->rouge1 = rouge.f1;
  v->verdict = !found                                  ? KS_VARIANT_NO_MARK
               : v->question[0] == 0                   ? KS_VARIANT_EMPTY
               : is_identical(original, v->question)   ? KS_VARIANT_IDENTICAL
               : is_repeated(s, v)                     ? KS_VARIANT_REPEATED
               : !(v->rouge1 >= s->params->min_rouge1) ? KS_VARIANT_TOO_FAR
               : !(v->rouge1 <= s->params->max_rouge1) ? KS_VARIANT_TOO_NEAR
                                                       : KS_VARIANT_ACCEPTED;
  return KS_OK;
}

static bool is_model(const synthesis *s) {
  return s->params->kind == KS_SYNTH_MODEL;
}

/* What is still lacking, as tries of this round, in order (source, variant). */
static int64_t list_attempts(const synthesis *s, int64_t round, ks_attempt *attempts) {
  int64_t n = 0;
  for (int64_t i = 0; i < s->n_sources; i++) {
    if (is_model(s) && !ks_writer_has_room(&s->writer, i)) continue;
    const ks_synth_source *source = &s->sources[i];
    uint64_t stream = ks_rng_key(source->seed, KS_RNG_SYNTHESIS, source->id, source->round);
    for (int64_t v = 0; v < s->count; v++)
      if (!s->accepted[i * s->count + v])
        attempts[n++] =
            (ks_attempt){.source = i,
                         .variant = v,
                         .key = ks_rng_key(stream, KS_RNG_SYNTHESIS, (uint64_t)v, (uint64_t)round)};
  }
  return n;
}

static ks_status write_by_rules(const synthesis *s, ks_attempt *attempts, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    ks_rng rng = ks_rng_make(attempts[i].key, KS_RNG_SYNTHESIS, 0);
    ks_text text = {0};
    ks_status status = ks_rewrite_rules(s->sources[attempts[i].source].question, &rng, &text);
    if (status == KS_OK) status = ks_text_add(&text, "", 0);
    attempts[i].text = text.data;
    attempts[i].ended = true;
    KS_TRY(status);
  }
  return KS_OK;
}

static ks_status judge_attempt(synthesis *s, const ks_attempt *attempt) {
  ks_variant v = {.source = attempt->source, .n_tokens = attempt->n_tokens};
  bool found = true;
  if (is_model(s))
    KS_TRY(ks_writer_extract(s->params, attempt->text, attempt->ended, &found, &v.question));
  else
    KS_TRY(ks_strdup(attempt->text, &v.question));
  ks_status status = judge(s, found, &v);
  if (status == KS_OK) status = add_variant(s, v);
  if (status != KS_OK) {
    free(v.question);
    return status;
  }
  if (v.verdict == KS_VARIANT_ACCEPTED) s->accepted[v.source * s->count + attempt->variant] = v.question;
  return KS_OK;
}

static ks_status run_round(synthesis *s, int64_t round, ks_attempt *attempts, bool *done) {
  int64_t n = list_attempts(s, round, attempts);
  *done = n == 0;
  if (*done) return KS_OK;
  ks_status status =
      is_model(s) ? ks_writer_write(&s->writer, s->sources, attempts, n) : write_by_rules(s, attempts, n);
  for (int64_t i = 0; i < n && status == KS_OK; i++)
    status = judge_attempt(s, &attempts[i]);
  for (int64_t i = 0; i < n; i++)
    free(attempts[i].text);
  return status;
}

static ks_status note_sources_without_room(synthesis *s) {
  for (int64_t i = 0; i < s->n_sources; i++) {
    if (ks_writer_has_room(&s->writer, i)) continue;
    ks_variant v = {.source = i, .verdict = KS_VARIANT_NO_ROOM};
    KS_TRY(ks_strdup("", &v.question));
    ks_status status = add_variant(s, v);
    if (status != KS_OK) {
      free(v.question);
      return status;
    }
  }
  return KS_OK;
}

/* From the order of the rounds to the order (source, try, variant). */
static ks_status sort_variants(synthesis *s) {
  ks_variant *sorted = NULL;
  int64_t *next = NULL;
  KS_TRY(ks_alloc_array(&sorted, (size_t)s->n_variants, sizeof *sorted, "synthesis: variants"));
  ks_status status = ks_alloc_array(&next, (size_t)s->n_sources + 1, sizeof *next, "synthesis: variants");
  if (status != KS_OK) {
    free(sorted);
    return status;
  }
  for (int64_t i = 0; i < s->n_variants; i++)
    next[s->variants[i].source + 1]++;
  for (int64_t i = 0; i < s->n_sources; i++)
    next[i + 1] += next[i];
  for (int64_t i = 0; i < s->n_variants; i++)
    sorted[next[s->variants[i].source]++] = s->variants[i];
  free(next);
  free(s->variants);
  s->variants = sorted;
  return KS_OK;
}

static ks_status check(const ks_synthesize_params *p, const ks_synth_source *sources, int64_t n_sources) {
  if (p->kind != KS_SYNTH_MODEL && p->kind != KS_SYNTH_RULES)
    return KS_FAIL(KS_EINVAL, "synthesis: kind is %d", (int)p->kind);
  if (n_sources < 0 || p->count < 0 || p->retries < 0 || p->retries == INT64_MAX)
    return KS_FAIL(KS_EINVAL, "synthesis: %lld sources, count %lld, retries %lld; give 0 or more",
                   (long long)n_sources, (long long)p->count, (long long)p->retries);
  if (!(p->min_rouge1 <= p->max_rouge1))
    return KS_FAIL(KS_ECONFIG, "synthesis: the least ROUGE-1 %g is above the greatest %g", p->min_rouge1,
                   p->max_rouge1);
  for (int64_t i = 0; i < n_sources; i++)
    if (!sources[i].question || sources[i].id >> 56)
      return KS_FAIL(KS_EINVAL, "synthesis: source %lld has no question, or an id beyond 2^56", (long long)i);
  return KS_OK;
}

ks_status ks_synthesize(ks_model *model, const ks_tokenizer *tokenizer, const ks_synthesize_params *params,
                        const ks_synth_source *sources, int64_t n_sources, const ks_adapter_view *adapters,
                        int64_t n_adapters, const ks_progress *progress, ks_variant **variants,
                        int64_t *n_variants) {
  *variants = NULL;
  *n_variants = 0;
  if (params->kind == KS_SYNTH_NONE) return KS_OK;
  KS_TRY(check(params, sources, n_sources));
  if (n_sources == 0 || params->count == 0) return KS_OK;
  synthesis s = {.params = params,
                 .sources = sources,
                 .n_sources = n_sources,
                 .count = params->count,
                 .n_rounds = 1 + params->retries,
                 .writer = {.model = model,
                            .tokenizer = tokenizer,
                            .params = params,
                            .adapters = adapters,
                            .n_adapters = n_adapters,
                            .progress = progress}};
  if (params->kind == KS_SYNTH_MODEL && params->temperature == 0) s.count = s.n_rounds = 1;
  ks_attempt *attempts = NULL;
  int64_t n_places;
  ks_status status = KS_OK;
  if (!ks_mul_i64(n_sources, s.count, &n_places))
    return KS_FAIL(KS_EOVERFLOW, "synthesis: %lld variants of %lld sets are too many", (long long)s.count,
                   (long long)n_sources);
  KS_TRY_OUT(ks_alloc_array(&s.accepted, (size_t)n_places, sizeof *s.accepted, "synthesis: variants"));
  KS_TRY_OUT(ks_alloc_array(&attempts, (size_t)n_places, sizeof *attempts, "synthesis: tries"));
  if (is_model(&s)) {
    KS_TRY_OUT(ks_writer_open(&s.writer, sources, n_sources));
    KS_TRY_OUT(note_sources_without_room(&s));
  }
  bool done = false;
  for (int64_t round = 0; round < s.n_rounds && !done; round++)
    KS_TRY_OUT(run_round(&s, round, attempts, &done));
  KS_TRY_OUT(sort_variants(&s));
  *variants = s.variants;
  *n_variants = s.n_variants;
  s.variants = NULL;
out:
  ks_variants_free(s.variants, s.n_variants);
  if (is_model(&s)) ks_writer_close(&s.writer);
  free(s.accepted);
  free(attempts);
  return status;
}
