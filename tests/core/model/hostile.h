/* Damaged copies of a file, always the same ones: for the tests of loaders. A loader must answer each with
 * KS_OK or with a message that names the file, must not crash, leak, or ask for much memory. */
#ifndef KS_TESTS_HOSTILE_H
#define KS_TESTS_HOSTILE_H

#include "core/base/base.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

/* Loads the file at path and frees what came of it. */
typedef ks_status (*hostile_load)(const char *path);

typedef struct {
  const char *path;      /* where the damaged copy goes */
  const char *load_path; /* what is loaded: path, or its folder */
  hostile_load load;
  int64_t n_loaded, n_refused;
} hostile;

static void hostile_write(const char *path, const char *bytes, size_t n) {
  FILE *f = fopen(path, "wb");
  cr_assert(f, "%s", path);
  cr_assert_eq(fwrite(bytes, 1, n, f), n);
  cr_assert_eq(fclose(f), 0);
}

static void hostile_try(hostile *h, const char *bytes, size_t n, const char *what, size_t where) {
  hostile_write(h->path, bytes, n);
  ks_error_clear();
  ks_status s = h->load(h->load_path);
  bool allowed = s == KS_OK || s == KS_EDATA || s == KS_EUNSUPPORTED || s == KS_EOVERFLOW;
  cr_assert(allowed, "%s at %zu: %s: %s", what, where, ks_status_name(s), ks_error_message());
  if (s != KS_OK)
    cr_assert(strstr(ks_error_message(), h->load_path), "%s at %zu: message without the file: %s", what,
              where, ks_error_message());
  h->n_loaded += s == KS_OK;
  h->n_refused += s != KS_OK;
}

/* Cut after every byte of the first n_dense, and at n_more places behind. */
static void hostile_truncate(hostile *h, const char *bytes, size_t n, size_t n_dense, size_t n_more) {
  ks_rng rng = ks_rng_make(1, KS_RNG_TEST, n);
  for (size_t cut = 0; cut < n && cut < n_dense; cut++)
    hostile_try(h, bytes, cut, "cut", cut);
  for (size_t i = 0; i < n_more && n > n_dense; i++) {
    size_t cut = n_dense + (size_t)ks_rng_below(&rng, n - n_dense);
    hostile_try(h, bytes, cut, "cut", cut);
  }
}

/* One to four places each: a random byte, a flipped bit, 0xFF, a number at its limits, a stretch doubled,
 * dropped or swapped with another. Places lie in the first n_head bytes (where structure is) three times of
 * four. */
static void hostile_mutate(hostile *h, const char *bytes, size_t n, size_t n_head, size_t n_copies) {
  static const uint64_t limits[] = {0,          1,         0x7FFFFFFF, 0x80000000,
                                    0xFFFFFFFF, INT64_MAX, UINT64_MAX, (uint64_t)1 << 40};
  char *copy = malloc(2 * n + 64);
  cr_assert(copy);
  for (size_t i = 0; i < n_copies; i++) {
    ks_rng rng = ks_rng_make(2, KS_RNG_TEST, i);
    size_t len = n;
    memcpy(copy, bytes, n);
    for (uint64_t changes = 1 + ks_rng_below(&rng, 4); changes > 0; changes--) {
      size_t range = n_head < len && ks_rng_below(&rng, 4) > 0 ? n_head : len;
      size_t at = (size_t)ks_rng_below(&rng, range), run = 1 + (size_t)ks_rng_below(&rng, 16);
      if (run > len - at) run = len - at;
      uint64_t limit = limits[ks_rng_below(&rng, sizeof limits / sizeof limits[0])];
      switch (ks_rng_below(&rng, 7)) {
      case 0:
        copy[at] = (char)ks_rng_below(&rng, 256);
        break;
      case 1:
        copy[at] = (char)(copy[at] ^ (1 << ks_rng_below(&rng, 8)));
        break;
      case 2:
        copy[at] = (char)0xFF;
        break;
      case 3:
        memcpy(copy + at, &limit, run < 8 ? run : 8);
        break;
      case 4:
        if (len + run > 2 * n) break;
        memmove(copy + at + run, copy + at, len - at);
        len += run;
        break;
      case 5:
        memmove(copy + at, copy + at + run, len - at - run);
        len -= run;
        break;
      default:
        memmove(copy + at, copy + (size_t)ks_rng_below(&rng, len - run + 1), run);
        break;
      }
      if (len == 0) break;
    }
    hostile_try(h, copy, len, "copy", i);
  }
  free(copy);
}

/* What all of it may take on top of the process as it was, in MB; address sanitizer's own needs are not
 * counted. */
static void hostile_limit_memory(size_t peak_before, size_t most_mb) {
#ifndef __SANITIZE_ADDRESS__
  size_t grown = ks_process_peak_bytes() - peak_before;
  cr_expect_leq(grown >> 20, most_mb, "took %zu MB", grown >> 20);
#else
  (void)peak_before;
  (void)most_mb;
#endif
}

#endif
