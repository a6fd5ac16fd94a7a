/* The loaders take paths: the fuzzer's bytes go to a file in memory. */
#ifndef KS_FUZZ_FILE_H
#define KS_FUZZ_FILE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static inline const char *fuzz_file(const uint8_t *bytes, size_t n) {
  static char path[64];
  static int fd = -1;
  if (fd < 0) fd = memfd_create("fuzz", 0);
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, bytes, n, 0) != (ssize_t)n) abort();
  return path;
}

#endif
