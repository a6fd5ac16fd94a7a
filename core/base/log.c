#include "core/base/base.h"

#include <stdarg.h>
#include <stdio.h>

static struct {
  ks_log_sink sink;
  void *user;
  int64_t counts[KS_LOG_ERROR + 1];
} logger;

void ks_log_set_sink(ks_log_sink sink, void *user) {
  logger.sink = sink;
  logger.user = user;
}

void ks_log(ks_log_level level, const char *module, const char *fmt, ...) {
  __atomic_fetch_add(&logger.counts[level], 1, __ATOMIC_RELAXED);
  if (!logger.sink) return;
  char text[2048];
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  logger.sink(logger.user, level, module, text);
}

int64_t ks_log_count(ks_log_level level) {
  return __atomic_load_n(&logger.counts[level], __ATOMIC_RELAXED);
}

ks_status ks_progress_report(const ks_progress *p, const char *stage, double done, double total) {
  if (!p || !p->report || p->report(p->user, stage, done, total)) return KS_OK;
  return KS_FAIL(KS_EINTERRUPTED, "interrupted during %s; run the same command again to resume", stage);
}
