/* keepsake VERB ...: finds the verb and leaves the rest to it. */
#include "experiments/cli.h"
#include "experiments/progress.h"
#include "experiments/version.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct {
  const char *name, *what;
  int (*run)(int argc, char **argv);
} verb;
static const verb verbs[] = {
#define X(name, what) {#name, what, ks_verb_##name},
    KS_VERB_MAP(X)
#undef X
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void print_usage(FILE *f) {
  fputs("usage: keepsake VERB [options]\n\nA benchmark of on-device personalization of language "
        "models.\n\nverbs:\n",
        f);
  for (int i = 0; i < N_VERBS; i++)
    fprintf(f, "  %-10s %s\n", verbs[i].name, verbs[i].what);
  if (getenv("KS_LAUNCHER")) /* these two are the launcher's own */
    fputs("  test       build and run every test\n  build      build, run nothing\n", f);
  fputs("\nkeepsake VERB --help says more; keepsake --version says which build this is.\n"
        "Begin with: keepsake run configs/quickstart.cfg\n",
        f);
}

static int unknown_verb(const char *word) {
  const char *names[N_VERBS];
  for (int i = 0; i < N_VERBS; i++)
    names[i] = verbs[i].name;
  const char *nearest = ks_cli_nearest(word, names, N_VERBS);
  if (nearest)
    return ks_cli_finish(KS_FAIL(KS_ECONFIG, "there is no verb %s; did you mean %s?", word, nearest));
  return ks_cli_finish(KS_FAIL(KS_ECONFIG, "there is no verb %s; keepsake --help lists them", word));
}

/* Threads of an idle team wait in a loop for milliseconds by libgomp's default: on a machine that others use
 * too, each wait can then cost a time slice (measured: 30 s instead of 2 s). They shall sleep soon. libgomp
 * reads its environment before main, so the program starts itself once more. */
static void wait_briefly(char **argv) {
  if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || setenv("GOMP_SPINCOUNT", "5000", 1) != 0)
    return;
  execv("/proc/self/exe", argv); /* comes back only when it cannot: then all is as before, only slower */
}

int main(int argc, char **argv) {
  wait_briefly(argv);
  signal(SIGXFSZ, SIG_IGN); /* so is a file that may not grow */
  signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error that ks_cli_finish reports */
  ks_cli_log_start();
  ks_interrupt_catch();
  if (argc < 2) {
    print_usage(stderr);
    return ks_status_exit_code(KS_ECONFIG);
  }
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
    print_usage(stdout);
    return ks_cli_finish(KS_OK);
  }
  if (strcmp(argv[1], "--version") == 0) {
    printf("keepsake %s (%s, %s)\n", KS_VERSION, KS_COMMIT, KS_BUILD);
    return ks_cli_finish(KS_OK);
  }
  for (int i = 0; i < N_VERBS; i++)
    if (strcmp(argv[1], verbs[i].name) == 0) return verbs[i].run(argc - 1, argv + 1);
  return unknown_verb(argv[1]);
}
