/* Writes what the tiny base model is trained on, or the lexicons of the persona population:
 *
 *   ks-corpus population OUT.jsonl POPULATION_SEED SEED N_LINES
 *   ks-corpus lexicons OUT.tsv POPULATION_SEED
 *   ks-corpus user OUT.jsonl POPULATION_SEED USER STREAM_SIZE EVAL_SIZE    (one user's sets with the generator's other defaults)
 */
#include "core/data/persona.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

static int usage(void) {
  fputs("usage: ks-corpus population OUT.jsonl POPULATION_SEED SEED N_LINES\n"
        "       ks-corpus lexicons OUT.tsv POPULATION_SEED\n"
        "       ks-corpus user OUT.jsonl POPULATION_SEED USER STREAM_SIZE EVAL_SIZE\n",
        stderr);
  return 2;
}

static bool parse_u64(const char *text, uint64_t *out) {
  char *end;
  if (*text < '0' || *text > '9') return false;
  *out = strtoull(text, &end, 10);
  return *end == '\0';
}

static ks_status write_user(const char *path, const ks_persona_params *params) {
  ks_dataset *d = NULL;
  ks_text out = {0};
  ks_status status = ks_persona_create(params, &d);
  for (int64_t i = 0; status == KS_OK && i < d->n_sets; i++) {
    const ks_set *s = &d->sets[i];
    json_t *line =
        json_pack("{s:s, s:s, s:s, s:s, s:s, s:b, s:i}", "part", i < d->n_stream ? "stream" : "eval",
                  "question", s->question, "response", s->response, "preferred", s->preferred, "topic",
                  d->topics[s->topic], "uninformative", (int)s->uninformative, "fact", (int)s->fact);
    char *text = line ? json_dumps(line, JSON_COMPACT) : NULL;
    status = text ? ks_text_addf(&out, "%s\n", text) : KS_FAIL(KS_ENOMEM, "no memory for a line");
    free(text);
    json_decref(line);
  }
  if (status == KS_OK) status = ks_file_write_atomic(path, out.data, out.len);
  ks_text_free(&out);
  ks_dataset_destroy(d);
  return status;
}

int main(int argc, char **argv) {
  uint64_t v[4] = {0};
  for (int i = 3; i < argc && i < 7; i++)
    if (!parse_u64(argv[i], &v[i - 3])) return usage();
  ks_status status;
  if (argc == 6 && strcmp(argv[1], "population") == 0) {
    status = ks_persona_write_population(argv[2], v[0], v[1], (int64_t)v[2]);
  } else if (argc == 4 && strcmp(argv[1], "lexicons") == 0) {
    status = ks_persona_write_lexicons(argv[2], v[0]);
  } else if (argc == 7 && strcmp(argv[1], "user") == 0) {
    ks_persona_params params = KS_PERSONA_DEFAULT;
    params.population_seed = v[0];
    params.user = v[1];
    params.stream_size = (int64_t)v[2];
    params.eval_size = (int64_t)v[3];
    status = write_user(argv[2], &params);
  } else {
    return usage();
  }
  if (status != KS_OK) fprintf(stderr, "ks-corpus: %s\n", ks_error_message());
  return ks_status_exit_code(status);
}
