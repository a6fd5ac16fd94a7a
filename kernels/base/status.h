/* Status codes and the error message of the calling thread.
 *
 *   if (n_rows < 0) return KS_FAIL(KS_EINVAL, "linear: n_rows is %lld; give 0 or more", (long long)n_rows);
 *   KS_TRY(ks_file_read(path, &bytes));                        // hands a failure up unchanged
 *   KS_TRY_AS(ks_json_parse(&j, bytes), "while reading %s", path);   // and says where it happened
 *
 * The library never prints, exits or aborts on a user, data or device error: a function returns a status, and
 * the reason lies in the thread's message until the next failure. A message says where (file:line of the
 * input or byte offset), what, and what to do. KS_ASSERT is for our own bugs only; it prints and aborts.
 */
#ifndef KS_STATUS_H
#define KS_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, value, exit code of the program, meaning) */
#define KS_STATUS_MAP(X)                                                                                     \
  X(KS_OK, 0, 0, "success")                                                                                  \
  X(KS_EINVAL, -1, 2, "invalid argument")                                                                    \
  X(KS_ECONFIG, -2, 2, "invalid configuration or command line")                                              \
  X(KS_EDATA, -3, 2, "invalid or damaged input file")                                                        \
  X(KS_EOVERFLOW, -4, 2, "size too large")                                                                   \
  X(KS_EUNSUPPORTED, -5, 2, "valid but not supported")                                                       \
  X(KS_EBUDGET, -6, 4, "budget exceeded")                                                                    \
  X(KS_ENOMEM, -7, 3, "out of memory")                                                                       \
  X(KS_EIO, -8, 3, "input or output failed")                                                                 \
  X(KS_EENV, -9, 3, "environment lacks something needed")                                                    \
  X(KS_EDEVICE, -10, 3, "device failed")                                                                     \
  X(KS_ENUMERIC, -11, 1, "not a finite number")                                                              \
  X(KS_EMISMATCH, -12, 1, "result differs from its reference")                                               \
  X(KS_EINTERRUPTED, -13, 130, "interrupted")                                                                \
  X(KS_EINTERNAL, -14, 4, "internal error")

typedef enum {
#define X(name, value, exit_code, meaning) name = value,
  KS_STATUS_MAP(X)
#undef X
} ks_status;

/* "KS_EDATA" */
const char *ks_status_name(ks_status s);
/* "invalid or damaged input file" */
const char *ks_status_meaning(ks_status s);
/* The program's exit code for s: 0 ok, 1 incorrect, 2 user's input, 3 environment, 4 internal. */
int ks_status_exit_code(ks_status s);

/* Sets this thread's message and returns s. Use KS_FAIL. */
ks_status ks_fail(const char *file, int line, ks_status s, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Puts "context: " before this thread's message; returns s unchanged. Does nothing when s is KS_OK. */
ks_status ks_fail_context(ks_status s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* This thread's last message; never NULL. Valid until the thread's next failure. */
const char *ks_error_message(void);
/* Source position of the last failure ("ops.c:12"), for --verbose logs. */
const char *ks_error_origin(void);
void ks_error_clear(void);

/* Prints both sides of a broken invariant of our own and aborts; stays in release builds. */
__attribute__((noreturn)) void ks_assert_fail(const char *file, int line, const char *expr, long long a,
                                              long long b);

#ifdef __cplusplus
}
#endif

/* The value is repeated so that the compiler sees that a failure is one. */
#define KS_FAIL(status, ...) (ks_fail(__FILE__, __LINE__, (status), __VA_ARGS__), (status))
#define KS_TRY(expr)                                                                                         \
  do {                                                                                                       \
    ks_status ks_try_status_ = (expr);                                                                       \
    if (ks_try_status_ != KS_OK) return ks_try_status_;                                                      \
  } while (0)
#define KS_TRY_AS(expr, ...)                                                                                 \
  do {                                                                                                       \
    ks_status ks_try_status_ = (expr);                                                                       \
    if (ks_try_status_ != KS_OK) return ks_fail_context(ks_try_status_, __VA_ARGS__);                        \
  } while (0)
/* For functions that free on one way out: sets `status`, jumps to `out`. */
#define KS_TRY_OUT(expr)                                                                                     \
  do {                                                                                                       \
    status = (expr);                                                                                         \
    if (status != KS_OK) goto out;                                                                           \
  } while (0)
#define KS_ASSERT_EQ(a, b)                                                                                   \
  do {                                                                                                       \
    long long ks_a_ = (long long)(a), ks_b_ = (long long)(b);                                                \
    if (ks_a_ != ks_b_) ks_assert_fail(__FILE__, __LINE__, #a " == " #b, ks_a_, ks_b_);                      \
  } while (0)
#define KS_ASSERT(x)                                                                                         \
  do {                                                                                                       \
    if (!(x)) ks_assert_fail(__FILE__, __LINE__, #x, 0, 1);                                                  \
  } while (0)

#endif
