/* What every room of core/ stands on: log sink, text, files, hashes, clock.
 * Status, checked sizes and random numbers lie one floor down, in kernels/base/. */
#ifndef KS_BASE_H
#define KS_BASE_H

#include "kernels/base/rng.h"
#include "kernels/base/size.h"
#include "kernels/base/status.h"

/* ---------------------------------------------------------------- log: a callback, never a terminal */

typedef enum { KS_LOG_DEBUG, KS_LOG_INFO, KS_LOG_WARN, KS_LOG_ERROR } ks_log_level;
typedef void (*ks_log_sink)(void *user, ks_log_level level, const char *module, const char *text);
/* Set once at start, before threads. NULL: silent. */
void ks_log_set_sink(ks_log_sink sink, void *user);
void ks_log(ks_log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Warnings and errors logged since start. */
int64_t ks_log_count(ks_log_level level);

/* Progress of long work, for whoever shows it. Called at most some times a second per stage; `total` may be 0
 * (unknown). Returns false when the user wants the work to stop: the caller unwinds with KS_EINTERRUPTED. */
typedef struct {
  bool (*report)(void *user, const char *stage, double done, double total);
  void *user;
} ks_progress;
/* KS_OK, or KS_EINTERRUPTED. p may be NULL. */
ks_status ks_progress_report(const ks_progress *p, const char *stage, double done, double total);

/* ---------------------------------------------------------------- text */

/* A growing string; zero-initialise, free with ks_text_free. data is always NUL-terminated once anything was
 * added. */
typedef struct {
  char *data;
  size_t len, cap;
} ks_text;
ks_status ks_text_add(ks_text *t, const char *bytes, size_t n);
ks_status ks_text_add_str(ks_text *t, const char *s);
ks_status ks_text_addf(ks_text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void ks_text_clear(ks_text *t);
void ks_text_free(ks_text *t);
ks_status ks_strdup(const char *s, char **out);
ks_status ks_strndup(const char *s, size_t n, char **out);

/* Index of the first byte that is not valid UTF-8 (RFC 3629: no surrogates, no overlong forms), or n. */
size_t ks_utf8_check(const char *s, size_t n);
/* Decodes one code point at s (n >= 1 bytes left) into *cp; returns its length 1..4, or 0 when invalid. */
int ks_utf8_decode(const char *s, size_t n, uint32_t *cp);
/* Writes cp as 1..4 bytes; returns the length. */
int ks_utf8_encode(uint32_t cp, char out[4]);
/* Levenshtein distance, for "did you mean". */
size_t ks_edit_distance(const char *a, const char *b);

/* ---------------------------------------------------------------- files */

/* Whole file, NUL-terminated one past *n. KS_EIO names path and reason; larger than max_bytes: KS_EDATA. */
ks_status ks_file_read(const char *path, size_t max_bytes, char **out, size_t *n);
/* Read-only map; an empty file gives n = 0. */
typedef struct {
  const unsigned char *data;
  size_t n;
} ks_file_map;
ks_status ks_file_map_open(const char *path, ks_file_map *out);
void ks_file_map_close(ks_file_map *m);
/* Writes aside (path.PID.part), fsyncs, renames: path holds the old bytes or the new, never a half. */
ks_status ks_file_write_atomic(const char *path, const void *bytes, size_t n);
/* fsync of an existing file and its folder, then rename over `to`. */
ks_status ks_file_commit(const char *from, const char *to);
bool ks_file_exists(const char *path);
bool ks_dir_exists(const char *path);
/* mkdir -p */
ks_status ks_dir_make(const char *path);
/* a + "/" + b; free() it. */
ks_status ks_path_join(const char *a, const char *b, char **out);

/* ---------------------------------------------------------------- hash, clock */

/* Mixes v into the running 64-bit value h (finalizer of SplitMix64): keys for tables, not for secrets. */
static inline uint64_t ks_hash_mix(uint64_t h, uint64_t v) {
  h = (h ^ v) + 0x9e3779b97f4a7c15u;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 27) * 0x94d049bb133111ebu;
  return h ^ h >> 31;
}

typedef struct {
  uint32_t state[8];
  uint64_t n_bytes;
  unsigned char block[64];
} ks_sha256;
void ks_sha256_init(ks_sha256 *h);
void ks_sha256_add(ks_sha256 *h, const void *bytes, size_t n);
/* 64 hexadecimal digits and NUL. */
void ks_sha256_finish(ks_sha256 *h, char out_hex[65]);
ks_status ks_sha256_file(const char *path, char out_hex[65]);

/* Monotonic seconds. */
double ks_clock_seconds(void);
/* RFC 3339 UTC: "2026-01-31T12:00:00Z". */
void ks_clock_utc(char out[32]);
/* Peak resident set of this process in bytes. */
size_t ks_process_peak_bytes(void);

#endif
