#include "core/base/base.h"
#include "core/base/sha256_blocks.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

Test(base, philox_matches_the_published_vectors) {
  /* Known-answer vectors of the Random123 distribution for philox4x32-10. */
  static const struct {
    uint64_t key, hi, lo;
    uint32_t want[4];
  } cases[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822,
       0x0370734413198a2e,
       0x85a308d3243f6a88,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_philox_block b = ks_philox(cases[i].key, cases[i].hi, cases[i].lo);
    for (int j = 0; j < 4; j++)
      cr_expect(b.v[j] == cases[i].want[j], "case %zu word %d: %08x", i, j, b.v[j]);
  }
}

Test(base, below_is_in_range_and_roughly_uniform) {
  ks_rng r = ks_rng_make(7, KS_RNG_TEST, 0);
  int counts[10] = {0};
  for (int i = 0; i < 100000; i++)
    counts[ks_rng_below(&r, 10)]++;
  double chi = 0;
  for (int i = 0; i < 10; i++)
    chi += (counts[i] - 1e4) * (counts[i] - 1e4) / 1e4;
  cr_expect(chi < 27.9, "chi-square %g on 9 degrees of freedom, 0.999 quantile 27.9", chi);
  cr_expect(ks_rng_below(&r, 0) == 0);
  cr_expect(ks_rng_below(&r, 1) == 0);
}

Test(base, streams_do_not_depend_on_each_other) {
  ks_rng a = ks_rng_make(1, KS_RNG_POLICY, 5), b = ks_rng_make(1, KS_RNG_SHUFFLE, 5);
  cr_expect(ks_rng_u64(&a) != ks_rng_u64(&b));
  ks_rng again = ks_rng_make(1, KS_RNG_POLICY, 5);
  again.next = 1;
  cr_expect(ks_rng_u64(&a) == ks_rng_u64(&again), "a draw depends on its index alone");
}

Test(base, sha256_of_known_messages) {
  static const struct {
    const char *text;
    int repeat;
    const char *want;
  } cases[] = {{"", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
               {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
               {"a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ks_sha256 h;
    char hex[65];
    ks_sha256_init(&h);
    for (int j = 0; j < cases[i].repeat; j++)
      ks_sha256_add(&h, cases[i].text, strlen(cases[i].text));
    ks_sha256_finish(&h, hex);
    cr_expect_str_eq(hex, cases[i].want);
  }
}

static const struct {
  const char *name;
  ks_sha256_blocks_function blocks;
} sha256_ways[] = {{"plain", ks_sha256_blocks_plain},
#ifdef __x86_64__
                   {"x86", ks_sha256_blocks_x86}
#endif
};

static bool sha256_way_runs(size_t way) {
#ifdef __x86_64__
  if (sha256_ways[way].blocks == ks_sha256_blocks_x86) return ks_sha256_x86_supported();
#endif
  return sha256_ways[way].blocks == ks_sha256_blocks_plain;
}

/* One way over a message padded here, in calls of random numbers of blocks. */
static void sha256_of_blocks(ks_sha256_blocks_function blocks, const unsigned char *message, size_t n,
                             ks_rng *rng, char hex[65]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  size_t n_blocks = (n + 9 + 63) / 64;
  unsigned char *padded = calloc(n_blocks, 64);
  cr_assert(padded != NULL);
  if (n) memcpy(padded, message, n);
  padded[n] = 0x80;
  for (size_t i = 0; i < 8; i++)
    padded[64 * n_blocks - 1 - i] = (unsigned char)((uint64_t)n * 8 >> 8 * i);
  for (size_t at = 0, take; at < n_blocks; at += take) {
    take = (size_t)ks_rng_below(rng, n_blocks - at + 1);
    blocks(state, padded + 64 * at, take);
  }
  for (int i = 0; i < 8; i++)
    snprintf(hex + 8 * i, 9, "%08x", state[i]);
  free(padded);
}

Test(base, sha256_is_the_same_both_ways_and_in_all_pieces) {
  enum { N_CASES = 600, LONGEST = 700 };
  unsigned char bytes[LONGEST + 64];
  ks_rng rng = ks_rng_make(21, KS_RNG_TEST, 0);
  char want[65], got[65];
  for (int c = 0; c < N_CASES; c++) {
    size_t n = c < 200 ? (size_t)c : (size_t)ks_rng_below(&rng, LONGEST + 1);
    unsigned char *message = bytes + ks_rng_below(&rng, 64); /* at any alignment */
    for (size_t i = 0; i < n; i++)
      message[i] = (unsigned char)ks_rng_u64(&rng);
    sha256_of_blocks(ks_sha256_blocks_plain, message, n, &rng, want);
    for (size_t way = 1; way < sizeof sha256_ways / sizeof *sha256_ways; way++) {
      if (!sha256_way_runs(way)) continue;
      sha256_of_blocks(sha256_ways[way].blocks, message, n, &rng, got);
      cr_assert_str_eq(got, want, "%s, %zu bytes: %s", sha256_ways[way].name, n, got);
    }
    ks_sha256 h;
    ks_sha256_init(&h);
    for (size_t at = 0, take; at < n; at += take) {
      take = (size_t)ks_rng_below(&rng, n - at + 1);
      ks_sha256_add(&h, message + at, take);
    }
    ks_sha256_finish(&h, got);
    cr_assert_str_eq(got, want, "%zu bytes in pieces: %s", n, got);
  }
}

Test(base, sha256_ways_know_the_published_message) {
  /* "abc" (FIPS 180-2, appendix B.1) */
  char hex[65];
  ks_rng rng = ks_rng_make(22, KS_RNG_TEST, 0);
  for (size_t way = 0; way < sizeof sha256_ways / sizeof *sha256_ways; way++) {
    if (!sha256_way_runs(way)) {
      cr_log_warn("%s: not on this machine", sha256_ways[way].name);
      continue;
    }
    sha256_of_blocks(sha256_ways[way].blocks, (const unsigned char *)"abc", 3, &rng, hex);
    cr_expect_str_eq(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "%s",
                     sha256_ways[way].name);
  }
}

Test(base, utf8_accepts_exactly_what_is_well_formed) {
  static const struct {
    const char *bytes;
    size_t n, first_bad;
  } cases[] = {{"", 0, 0},
               {"az", 2, 2},
               {"\xc3\xa9", 2, 2},
               {"\xe2\x82\xac", 3, 3},
               {"\xf0\x9f\x98\x80", 4, 4},
               {"a\x80", 2, 1},            /* lone continuation */
               {"a\xc0\xaf", 3, 1},        /* overlong */
               {"\xed\xa0\x80", 3, 0},     /* surrogate */
               {"\xf4\x90\x80\x80", 4, 0}, /* above U+10FFFF */
               {"ab\xe2\x82", 4, 2},       /* cut */
               {"\xff", 1, 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    cr_expect(ks_utf8_check(cases[i].bytes, cases[i].n) == cases[i].first_bad, "case %zu", i);
  for (uint32_t cp = 0; cp < 0x110000; cp++) {
    if (cp >= 0xD800 && cp <= 0xDFFF) continue;
    char out[4];
    uint32_t back;
    int n = ks_utf8_encode(cp, out);
    cr_assert(ks_utf8_decode(out, (size_t)n, &back) == n && back == cp, "U+%04X", cp);
  }
}

Test(base, edit_distance) {
  cr_expect(ks_edit_distance("", "abc") == 3);
  cr_expect(ks_edit_distance("kitten", "sitting") == 3);
  cr_expect(ks_edit_distance("same", "same") == 0);
}

Test(base, errors_carry_their_context) {
  ks_status s = KS_FAIL(KS_EDATA, "byte %d: bad", 7);
  s = ks_fail_context(s, "while reading %s", "x.bin");
  cr_expect(s == KS_EDATA);
  cr_expect_str_eq(ks_error_message(), "while reading x.bin: byte 7: bad");
  s = KS_FAIL(KS_EIO, "again: %s", ks_error_message());
  cr_expect_str_eq(ks_error_message(), "again: while reading x.bin: byte 7: bad");
  cr_expect(ks_status_exit_code(KS_EDATA) == 2);
  cr_expect(ks_status_exit_code(KS_EIO) == 3);
}

Test(base, sizes_that_overflow_are_refused) {
  void *p = NULL;
  cr_expect(ks_alloc_array(&p, SIZE_MAX / 2, 4, "things") == KS_EOVERFLOW);
  cr_expect(ks_alloc_array(&p, SIZE_MAX, 1, "things") == KS_EOVERFLOW);
  cr_expect(ks_alloc_array(&p, 0, 8, "things") == KS_OK && p != NULL);
  free(p);
}

static void scratch(char *path, const char *name) {
  char folder[] = "/tmp/ks_test_XXXXXX";
  cr_assert(mkdtemp(folder) != NULL);
  snprintf(path, 256, "%s/%s", folder, name);
}

Test(base, files_are_replaced_whole_or_not_at_all) {
  char path[256], *back;
  size_t n;
  scratch(path, "f");
  cr_assert(ks_file_write_atomic(path, "old", 3) == KS_OK);
  signal(SIGXFSZ, SIG_IGN);
  struct rlimit tight = {100, 100};
  static char big[4096];
  setrlimit(RLIMIT_FSIZE, &tight); /* stands in for a full disk */
  cr_expect(ks_file_write_atomic(path, big, sizeof big) == KS_EIO, "%s", ks_error_message());
  cr_assert(ks_file_read(path, 100, &back, &n) == KS_OK);
  cr_expect(n == 3 && memcmp(back, "old", 4) == 0, "the old bytes are there");
  free(back);
  char part[300];
  snprintf(part, sizeof part, "%s.%ld.part", path, (long)getpid());
  cr_expect(ks_file_exists(part) == false);
}

Test(base, unreadable_files_say_why) {
  char *data;
  size_t n;
  ks_file_map m;
  cr_expect(ks_file_read("/nonexistent/x", 10, &data, &n) == KS_EDATA);
  cr_expect(strstr(ks_error_message(), "/nonexistent/x") != NULL);
  cr_expect(ks_file_read("/tmp", 10, &data, &n) == KS_EDATA);
  cr_expect(ks_file_map_open("/tmp", &m) == KS_EDATA);
  char path[256];
  scratch(path, "g");
  cr_assert(ks_file_write_atomic(path, "", 0) == KS_OK);
  cr_assert(ks_file_map_open(path, &m) == KS_OK && m.n == 0);
  ks_file_map_close(&m);
  cr_assert(ks_file_write_atomic(path, "12345", 5) == KS_OK);
  cr_expect(ks_file_read(path, 4, &data, &n) == KS_EDATA);
}

Test(base, folders_are_made_with_their_parents) {
  char path[256], deep[300], *joined;
  scratch(path, "a");
  snprintf(deep, sizeof deep, "%s/b/c", path);
  cr_expect(ks_dir_make(deep) == KS_OK && ks_dir_exists(deep));
  cr_expect(ks_dir_make(deep) == KS_OK, "twice is fine");
  cr_assert(ks_path_join(deep, "f", &joined) == KS_OK);
  cr_assert(ks_file_write_atomic(joined, "x", 1) == KS_OK);
  cr_expect(ks_dir_make(joined) == KS_EIO, "a file stands in the way");
  free(joined);
}

static bool stop_at_two(void *user, const char *stage, double done, double total) {
  (void)user, (void)stage, (void)total;
  return done < 2;
}

Test(base, progress_can_interrupt) {
  ks_progress p = {stop_at_two, NULL};
  cr_expect(ks_progress_report(NULL, "x", 9, 9) == KS_OK);
  cr_expect(ks_progress_report(&p, "x", 1, 3) == KS_OK);
  cr_expect(ks_progress_report(&p, "x", 2, 3) == KS_EINTERRUPTED);
}
