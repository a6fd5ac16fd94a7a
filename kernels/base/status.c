#include "kernels/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 16384, ORIGIN_BYTES = 128 };
static _Thread_local char message[MESSAGE_BYTES];
static _Thread_local char origin[ORIGIN_BYTES];

const char *ks_status_name(ks_status s) {
  switch (s) {
#define X(name, value, exit_code, meaning)                                                                   \
  case name:                                                                                                 \
    return #name;
    KS_STATUS_MAP(X)
#undef X
  }
  return "KS_UNKNOWN";
}

const char *ks_status_meaning(ks_status s) {
  switch (s) {
#define X(name, value, exit_code, meaning)                                                                   \
  case name:                                                                                                 \
    return meaning;
    KS_STATUS_MAP(X)
#undef X
  }
  return "unknown status";
}

int ks_status_exit_code(ks_status s) {
  switch (s) {
#define X(name, value, exit_code, meaning)                                                                   \
  case name:                                                                                                 \
    return exit_code;
    KS_STATUS_MAP(X)
#undef X
  }
  return 4;
}

ks_status ks_fail(const char *file, int line, ks_status s, const char *fmt, ...) {
  char text[MESSAGE_BYTES]; /* an argument may point into `message` itself */
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  memcpy(message, text, sizeof message);
  const char *slash = strrchr(file, '/');
  snprintf(origin, sizeof origin, "%s:%d", slash ? slash + 1 : file, line);
  return s;
}

ks_status ks_fail_context(ks_status s, const char *fmt, ...) {
  if (s == KS_OK) return s;
  char text[MESSAGE_BYTES];
  va_list args;
  va_start(args, fmt);
  int used = vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  if (used < 0 || used >= MESSAGE_BYTES - 3) return s;
  snprintf(text + used, sizeof text - (size_t)used, ": %.*s", MESSAGE_BYTES - used - 3, message);
  memcpy(message, text, sizeof message);
  return s;
}

const char *ks_error_message(void) {
  return message[0] ? message : "no error";
}
const char *ks_error_origin(void) {
  return origin;
}

void ks_error_clear(void) {
  message[0] = 0;
  origin[0] = 0;
}

void ks_assert_fail(const char *file, int line, const char *expr, long long a, long long b) {
  fprintf(stderr, "%s:%d: internal error: %s does not hold (%lld, %lld); please report this\n", file, line,
          expr, a, b);
  abort();
}
