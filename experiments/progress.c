#include "experiments/progress.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* ---------------------------------------------------------------- interrupts */

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
  (void)number;
  interrupted = 1;
}

void ks_interrupt_catch(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND | SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}

bool ks_interrupted(void) {
  return interrupted;
}

/* ---------------------------------------------------------------- bar */

struct ks_bar {
  ks_progress progress;
  bool drawn;
  char label[64];
  double share_begin, share_end, stage_begin, stage_end;
  double start_seconds, drawn_seconds;
};

static ks_bar *live; /* the one that is on the screen */
static bool forbidden;

void ks_bar_forbid(void) {
  forbidden = true;
}

void ks_bar_clear(ks_bar *b) {
  if (!b || !b->drawn) return;
  fputs("\r\033[K", stderr);
  fflush(stderr);
  b->drawn = false;
}

void ks_bar_clear_all(void) {
  ks_bar_clear(live);
}

static int put_time(char *out, size_t n, double seconds) {
  long t = seconds < 0 ? 0 : seconds > 3.6e6 ? 3600000 : (long)(seconds + 0.5);
  if (t >= 3600) return snprintf(out, n, "%ld:%02ld:%02ld", t / 3600, t / 60 % 60, t % 60);
  return snprintf(out, n, "%ld:%02ld", t / 60, t % 60);
}

static int terminal_columns(void) {
  struct winsize w;
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0 ? w.ws_col : 80;
}

static void draw(ks_bar *b, const char *stage, double part, double now) {
  enum { BAR_CELLS = 20 };
  double in_share = b->stage_begin + (b->stage_end - b->stage_begin) * part;
  double whole = b->share_begin + (b->share_end - b->share_begin) * in_share;
  double gone = now - b->start_seconds;
  char line[256], bar[BAR_CELLS + 1], gone_text[32], left_text[32];
  int full = (int)(whole * BAR_CELLS);
  for (int i = 0; i < BAR_CELLS; i++)
    bar[i] = i < full ? '=' : i == full ? '>' : ' ';
  bar[BAR_CELLS] = 0;
  put_time(gone_text, sizeof gone_text, gone);
  put_time(left_text, sizeof left_text, whole > 0 ? gone * (1 - whole) / whole : 0);
  snprintf(line, sizeof line, "%s%s%s %3.0f%%  [%s] %3.0f%%  %s gone, %s%s", b->label, *b->label ? "  " : "",
           stage, part * 100, bar, whole * 100, gone_text, whole > 0.005 ? left_text : "?", " to go");
  int columns = terminal_columns();
  fprintf(stderr, "\r%.*s\033[K", columns - 1, line);
  fflush(stderr);
  b->drawn = true;
  b->drawn_seconds = now;
}

static bool report_bar(void *user, const char *stage, double done, double total) {
  ks_bar *b = user;
  double now = ks_clock_seconds();
  if (now - b->drawn_seconds >= 0.1 && !forbidden) {
    double part = total > 0 ? done / total : 0;
    draw(b, stage, part < 0 ? 0 : part > 1 ? 1 : part, now);
  }
  return !interrupted;
}

static bool report_nothing(void *user, const char *stage, double done, double total) {
  (void)user, (void)stage, (void)done, (void)total;
  return !interrupted;
}

ks_status ks_bar_create(ks_bar **out) {
  ks_bar *b = calloc(1, sizeof *b);
  *out = b;
  if (!b) return KS_FAIL(KS_ENOMEM, "progress bar: no memory");
  const char *terminal = getenv("TERM");
  bool visible = isatty(STDERR_FILENO) && !forbidden && terminal && strcmp(terminal, "dumb") != 0;
  b->progress = (ks_progress){visible ? report_bar : report_nothing, b};
  b->start_seconds = ks_clock_seconds();
  b->share_end = b->stage_end = 1;
  live = b;
  return KS_OK;
}

void ks_bar_destroy(ks_bar *b) {
  if (!b) return;
  ks_bar_clear(b);
  if (live == b) live = NULL;
  free(b);
}

void ks_bar_share(ks_bar *b, double begin, double end, const char *label) {
  if (!b) return;
  b->share_begin = begin;
  b->share_end = end;
  b->stage_begin = 0;
  b->stage_end = 1;
  snprintf(b->label, sizeof b->label, "%s", label ? label : "");
}

void ks_bar_stage(ks_bar *b, double begin, double end) {
  if (!b) return;
  b->stage_begin = begin;
  b->stage_end = end;
}

const ks_progress *ks_bar_progress(ks_bar *b) {
  static const ks_progress interrupts = {report_nothing, NULL};
  return b ? &b->progress : &interrupts;
}
