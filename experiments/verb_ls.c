#include "experiments/cli.h"

#include "core/data/data.h"
#include "core/select/select.h"
#include "kernels/backend.h"
#include <stdio.h>
#include <string.h>

/* ---------------------------------------------------------------- what there is */

static void list_policies(void) {
  for (int i = 0; ks_policies[i]; i++)
    printf("  %-14s %s\n", ks_policies[i]->name, ks_policies[i]->what);
}

static void list_importers(void) {
  printf("  %-14s %s\n", "persona", "the embedded generator: a simulated user; no file");
  for (int i = 0; ks_importers[i].name; i++)
    printf("  %-14s %s\n", ks_importers[i].name, ks_importers[i].what);
}

/* "  [cuda: mma, simt]": the kernels that a backend has for an operation, its default first. */
static void print_variants(const ks_backend *b, const char *op) {
  int shown = 0;
  for (int64_t i = 0; i < b->n_variants; i++) {
    const ks_op_variant *v = &b->variants[i];
    if (strcmp(v->op, op) != 0) continue;
    if (shown++ == 0)
      printf("  [%s: ", b->name);
    else
      printf(", ");
    printf("%s%s", v->name, v->f32 ? "" : " (bf16)");
  }
  if (shown > 0) printf("]");
}

static void print_operation(const char *name, const char *what) {
  printf("  %-26s %s", name, what);
  for (int i = 0; ks_backends[i]; i++)
    print_variants(ks_backends[i], name);
  printf("\n");
}

static void list_operations(void) {
#define X(name, what) print_operation(#name, what);
  KS_OPS_MAP(X)
#undef X
}

static void list_backends(void) {
  for (int i = 0; ks_backends[i]; i++) {
    const ks_backend *b = ks_backends[i];
    ks_ctx *ctx = NULL;
    ks_ctx_params params = {.backend = b->name};
    ks_status s = b->probe();
    if (s == KS_OK) s = ks_ctx_create(&ctx, &params);
    if (s == KS_OK)
      printf("  %-14s %s: ready on %s\n", b->name, b->what, ks_ctx_device_name(ctx));
    else
      printf("  %-14s %s: not here: %s\n", b->name, b->what, ks_error_message());
    ks_ctx_destroy(ctx);
  }
}

static void list_synthesizers(void) {
  static const char *const synthesizers[][2] = {{"none", "no variants"},
                                                {"model", "the language model rewrites the question"},
                                                {"rules", "fixed rules rewrite the question"}};
  for (size_t i = 0; i < sizeof synthesizers / sizeof *synthesizers; i++)
    printf("  %-14s %s\n", synthesizers[i][0], synthesizers[i][1]);
}

static const struct {
  const char *name, *what;
  void (*list)(void);
} kinds[] = {{"policies", "what decides on each arrival (policy)", list_policies},
             {"importers", "where dialogue sets come from (data.source)", list_importers},
             {"synthesizers", "who writes variants (synth.writer)", list_synthesizers},
             {"backends", "what computes (run.backend)", list_backends},
             {"operations", "numerical operations of a backend", list_operations}};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static ks_status list_kind(const char *word) {
  const char *names[N_KINDS];
  for (int i = 0; i < N_KINDS; i++) {
    names[i] = kinds[i].name;
    if (strcmp(word, kinds[i].name) == 0) {
      printf("%s: %s\n", kinds[i].name, kinds[i].what);
      kinds[i].list();
      return KS_OK;
    }
  }
  const char *nearest = ks_cli_nearest(word, names, N_KINDS);
  return KS_FAIL(KS_ECONFIG, "ls %s: there is policies, importers, synthesizers, backends, operations%s%s%s",
                 word, nearest ? "; did you mean " : "", nearest ? nearest : "", nearest ? "?" : "");
}

static const ks_command command = {
    "ls", "[policies|importers|synthesizers|backends|operations]", "What this build has.", NULL, 0, -1, NULL};

int ks_verb_ls(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_status status = KS_OK;
  for (int i = 0; args.n_operands == 0 && i < N_KINDS; i++)
    status = list_kind(kinds[i].name);
  for (int64_t i = 0; status == KS_OK && i < args.n_operands; i++)
    status = list_kind(args.operands[i]);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
