#include "core/base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static ks_status io_fail(const char *path, const char *what) {
  static const struct {
    int error;
    ks_status status;
    const char *remedy;
  } known[] = {{ENOENT, KS_EDATA, "check the path"},
               {EACCES, KS_EIO, "check its permissions"},
               {EPERM, KS_EIO, "check its permissions"},
               {EROFS, KS_EIO, "choose a place that can be written"},
               {ENOTDIR, KS_EIO, "a file stands where a folder should; choose another place"},
               {ENOSPC, KS_EIO, "free some space, or choose another disk, and run again"},
               {EDQUOT, KS_EIO, "free some space, or choose another disk, and run again"},
               {EFBIG, KS_EIO,
                "free some space, raise the limit on file sizes, or choose another disk, and run again"}};
  int e = errno;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].error == e)
      return KS_FAIL(known[i].status, "%s: cannot %s: %s; %s", path, what, strerror(e), known[i].remedy);
  return KS_FAIL(KS_EIO, "%s: cannot %s: %s", path, what, strerror(e));
}

static ks_status open_regular(const char *path, int *fd, size_t *n) {
  *fd = open(path, O_RDONLY | O_CLOEXEC);
  if (*fd < 0) return io_fail(path, "open");
  struct stat st;
  if (fstat(*fd, &st) != 0) {
    ks_status s = io_fail(path, "stat");
    close(*fd);
    return s;
  }
  if (!S_ISREG(st.st_mode)) {
    close(*fd);
    return KS_FAIL(KS_EDATA, "%s: is not a regular file; name a file", path);
  }
  *n = (size_t)st.st_size;
  return KS_OK;
}

ks_status ks_file_read(const char *path, size_t max_bytes, char **out, size_t *n) {
  int fd;
  size_t size;
  KS_TRY(open_regular(path, &fd, &size));
  ks_status status = KS_OK;
  char *data = NULL;
  if (size > max_bytes) {
    status = KS_FAIL(KS_EDATA, "%s: has %zu bytes, more than the %zu expected here", path, size, max_bytes);
    goto out;
  }
  data = malloc(size + 1);
  if (!data) {
    status = KS_FAIL(KS_ENOMEM, "%s: no memory for its %zu bytes", path, size);
    goto out;
  }
  size_t done = 0;
  while (done < size) {
    ssize_t got = read(fd, data + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      status = io_fail(path, "read");
      goto out;
    }
    if (got == 0) break; /* it shrank meanwhile */
    done += (size_t)got;
  }
  data[done] = 0;
  *out = data;
  *n = done;
  data = NULL;
out:
  free(data);
  close(fd);
  return status;
}

ks_status ks_file_map_open(const char *path, ks_file_map *out) {
  int fd;
  size_t size;
  KS_TRY(open_regular(path, &fd, &size));
  *out = (ks_file_map){NULL, 0};
  if (size > 0) {
    void *p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
      ks_status s = io_fail(path, "map");
      close(fd);
      return s;
    }
    *out = (ks_file_map){p, size};
  }
  close(fd);
  return KS_OK;
}

void ks_file_map_close(ks_file_map *m) {
  if (m->data) munmap((void *)(uintptr_t)m->data, m->n);
  *m = (ks_file_map){NULL, 0};
}

/* The rename itself must reach the disk: the folder is synced too. */
static ks_status sync_folder_of(const char *path) {
  char *folder = NULL;
  const char *slash = strrchr(path, '/');
  KS_TRY(slash ? ks_strndup(path, slash == path ? 1 : (size_t)(slash - path), &folder)
               : ks_strdup(".", &folder));
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  free(folder);
  if (fd < 0) return io_fail(path, "open the folder of");
  (void)fsync(fd); /* some file systems refuse this for folders; the file's own data is safe already */
  close(fd);
  return KS_OK;
}

ks_status ks_file_commit(const char *from, const char *to) {
  int fd = open(from, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return io_fail(from, "open");
  if (fsync(fd) != 0) {
    ks_status s = io_fail(from, "write to disk");
    close(fd);
    return s;
  }
  close(fd);
  if (rename(from, to) != 0) return io_fail(to, "rename into place");
  return sync_folder_of(to);
}

static ks_status write_all(const char *path, const void *bytes, size_t n) {
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return io_fail(path, "create");
  size_t done = 0;
  while (done < n) {
    ssize_t put = write(fd, (const char *)bytes + done, n - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      ks_status s = io_fail(path, "write");
      close(fd);
      return s;
    }
    done += (size_t)put;
  }
  return close(fd) == 0 ? KS_OK : io_fail(path, "write");
}

ks_status ks_file_write_atomic(const char *path, const void *bytes, size_t n) {
  ks_text part = {0};
  ks_status status;
  /* Other processes may be writing the same file: each has a part of its own. */
  KS_TRY_OUT(ks_text_addf(&part, "%s.%ld.part", path, (long)getpid()));
  KS_TRY_OUT(write_all(part.data, bytes, n));
  KS_TRY_OUT(ks_file_commit(part.data, path));
out:
  if (status != KS_OK && part.data) unlink(part.data);
  ks_text_free(&part);
  return status;
}

bool ks_file_exists(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool ks_dir_exists(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

ks_status ks_dir_make(const char *path) {
  char *p = NULL;
  KS_TRY(ks_strdup(path, &p));
  ks_status status = KS_OK;
  for (char *at = p; *at && status == KS_OK; at++) {
    char *slash = strchr(at + 1, '/');
    if (slash) *slash = 0;
    if (mkdir(p, 0777) != 0 && errno != EEXIST) status = io_fail(p, "make the folder");
    if (!slash) break;
    *slash = '/';
    at = slash - 1;
  }
  if (status == KS_OK && !ks_dir_exists(path))
    status = KS_FAIL(KS_EIO, "%s: is not a folder; remove it or choose another output", path);
  free(p);
  return status;
}

ks_status ks_path_join(const char *a, const char *b, char **out) {
  ks_text t = {0};
  size_t na = strlen(a);
  ks_status status = ks_text_addf(&t, "%s%s%s", a, na > 0 && a[na - 1] == '/' ? "" : "/", b);
  if (status != KS_OK) ks_text_free(&t);
  *out = t.data;
  return status;
}
