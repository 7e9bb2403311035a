/* A stand-in for file systems that fail, loaded before libc with LD_PRELOAD. Folders are absolute and without links.
 *
 *   REFUSE_UNDER=/folder   files there can only be written once, from front to back. What DBFS and Unity Catalog
 *                          Volumes refuse fails with EPERM, or with ENOTSUP where the system has no such call
 *   FULL_DISK=N:/folder    writes there fail with ENOSPC after N bytes of this process; what fits is written
 *   FLIP_BIT=N:/file       the first byte of the file is written wrong, the first N times that it is written
 *   KILL_AT=N:/folder      the Nth change there (open for writing, write, close after it, mkdir, unlink) is started,
 *                          half of it if it is a write, and the process kills itself
 *
 * Calls inside libc (the buffers of fwrite) are not intercepted; those of Python, Rust and C++ streams are.
 *   gcc -shared -fPIC -O2 -o refusing.so refusing_filesystem.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utime.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(code) return (errno = (code), -1)

/* --- whose file is it? --- */

static int under(const char *path, const char *folder) {
    size_t length = folder ? strlen(folder) : 0;
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path of what may not exist yet: its folder without links, and its name. */
static const char *absolute(int at, const char *path, char *out) {
    char whole[2 * PATH_MAX] = "", folder[PATH_MAX];
    if (path[0] != '/') {
        char link[64];
        if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0) length = 0;
        whole[length++] = '/';
        whole[length] = 0;
    }
    strncat(whole, path, PATH_MAX - 1);
    char *name = strrchr(whole, '/');
    *name = 0;
    int known = realpath(*whole ? whole : "/", folder) != NULL;
    *name = '/';
    if (known) snprintf(out, PATH_MAX, "%s%s", strcmp(folder, "/") ? folder : "", name);
    else snprintf(out, PATH_MAX, "%s", whole);
    return out;
}

static const char *path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
    return out;
}

static int refused(int at, const char *path) {
    char out[PATH_MAX];
    return path && under(absolute(at, path, out), getenv("REFUSE_UNDER"));
}

static int writing(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

static int refused_fd(int fd) {
    char out[PATH_MAX];
    return writing(fd) && under(path_of(fd, out), getenv("REFUSE_UNDER"));
}

/* "N:/folder" -> N, and the folder; -1 where the variable is not set. */
static long long setting(const char *variable, const char **folder) {
    const char *value = getenv(variable);
    const char *colon = value ? strchr(value, ':') : NULL;
    if (!colon) return -1;
    *folder = colon + 1;
    return atoll(value);
}

/* Whether the process is to die at this change. */
static int last_change(const char *path) {
    static long long changes;
    const char *folder;
    long long at = setting("KILL_AT", &folder);
    return at >= 0 && under(path, folder) && __atomic_add_fetch(&changes, 1, __ATOMIC_SEQ_CST) == at;
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

/* --- open --- */

static int open_refused(int at, const char *path, int flags) {
    if (!refused(at, path) || (flags & O_ACCMODE) == O_RDONLY) return 0;
    struct stat found;
    if ((flags & O_ACCMODE) == O_RDWR || flags & O_APPEND) return EPERM;
    return fstatat(at, path, &found, 0) == 0 && S_ISREG(found.st_mode) ? EPERM : 0; /* an update */
}

static int opened(int fd) {
    char out[PATH_MAX];
    if (fd >= 0 && writing(fd) && last_change(path_of(fd, out))) die();
    return fd;
}

static int open_at(int at, const char *path, int flags, mode_t mode) {
    int code = open_refused(at, path, flags);
    if (code) FAIL(code);
    return opened(REAL(openat)(at, path, flags, mode));
}

#define MODE(last)                                                                                                 \
    mode_t mode = 0;                                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
        va_list more;                                                                                              \
        va_start(more, last);                                                                                      \
        mode = va_arg(more, mode_t);                                                                               \
        va_end(more);                                                                                              \
    }
int open(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static int stream_refused(const char *path, const char *mode) {
    int flags = strchr(mode, '+') ? O_RDWR : mode[0] == 'r' ? O_RDONLY : O_WRONLY;
    return open_refused(AT_FDCWD, path, flags | (mode[0] == 'a' ? O_APPEND : 0));
}
FILE *fopen(const char *path, const char *mode) {
    int code = stream_refused(path, mode);
    return code ? (errno = code, NULL) : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    int code = stream_refused(path, mode);
    return code ? (errno = code, NULL) : REAL(fopen64)(path, mode);
}

int close(int fd) {
    char out[PATH_MAX];
    int last = writing(fd) && last_change(path_of(fd, out));
    int result = REAL(close)(fd);
    if (last) die();
    return result;
}

/* --- write --- */

/* How much of `length` bytes the disk takes; -1 and ENOSPC where it takes none. */
static ssize_t room(const char *path, size_t length) {
    static long long written;
    const char *folder;
    long long limit = setting("FULL_DISK", &folder);
    if (limit < 0 || !length || !under(path, folder)) return (ssize_t)length;
    long long before = __atomic_fetch_add(&written, (long long)length, __ATOMIC_SEQ_CST);
    if (before >= limit) FAIL(ENOSPC);
    return before + (long long)length <= limit ? (ssize_t)length : (ssize_t)(limit - before);
}

static int to_be_flipped(const char *path, int fd) {
    static long long flipped;
    const char *file;
    long long times = setting("FLIP_BIT", &file);
    if (times < 0 || strcmp(path, file) || lseek(fd, 0, SEEK_CUR) != 0) return 0;
    return __atomic_add_fetch(&flipped, 1, __ATOMIC_SEQ_CST) <= times;
}

ssize_t write(int fd, const void *buffer, size_t length) {
    char path[PATH_MAX];
    __typeof__(&write) real = REAL(write);
    path_of(fd, path);
    if (path[0] != '/' || !length) return real(fd, buffer, length);
    ssize_t taken = room(path, length);
    if (taken < 0) return -1;
    if (last_change(path)) {
        real(fd, buffer, (size_t)taken / 2);
        die();
    }
    if (!to_be_flipped(path, fd)) return real(fd, buffer, (size_t)taken);
    char first = (char)(*(const char *)buffer ^ 1);
    return real(fd, &first, 1); /* a short write: the caller goes on with the rest */
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ssize_t sum = 0;
    for (int i = 0; i < count; i++) {
        ssize_t written = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (written < 0) return sum ? sum : -1;
        sum += written;
        if ((size_t)written < parts[i].iov_len) break;
    }
    return sum;
}

/* --- what is refused on files that are written --- */

#define AT_A_PLACE(name, buffer_type, length_type, place_type)                                                     \
    ssize_t name(int fd, const buffer_type buffer, length_type length, place_type place) {                         \
        char path[PATH_MAX];                                                                                       \
        if (refused_fd(fd)) FAIL(EPERM);                                                                           \
        if (sizeof(length) == sizeof(size_t) && room(path_of(fd, path), (size_t)length) < (ssize_t)length)         \
            FAIL(ENOSPC);                                                                                          \
        return REAL(name)(fd, buffer, length, place);                                                              \
    }
AT_A_PLACE(pwrite, void *, size_t, off_t)
AT_A_PLACE(pwrite64, void *, size_t, off64_t)
AT_A_PLACE(pwritev, struct iovec *, int, off_t)
AT_A_PLACE(pwritev64, struct iovec *, int, off64_t)

off64_t lseek64(int fd, off64_t offset, int whence) {
    __typeof__(&lseek64) real = REAL(lseek64);
    if (!refused_fd(fd)) return real(fd, offset, whence);
    off64_t here = real(fd, 0, SEEK_CUR), there = real(fd, offset, whence);
    if (there == here || there < 0) return there;
    real(fd, here, SEEK_SET);
    FAIL(EPERM);
}
off_t lseek(int fd, off_t offset, int whence) { return lseek64(fd, offset, whence); }

#define REFUSES_FD(code, type, name, parameters, arguments, fd)                                                    \
    type name parameters {                                                                                         \
        if (refused_fd(fd)) return (errno = (code), (type)-1);                                                     \
        return REAL(name) arguments;                                                                               \
    }
REFUSES_FD(EPERM, int, ftruncate, (int fd, off_t length), (fd, length), fd)
REFUSES_FD(EPERM, int, ftruncate64, (int fd, off64_t length), (fd, length), fd)
REFUSES_FD(ENOTSUP, int, fallocate, (int fd, int mode, off_t place, off_t length), (fd, mode, place, length), fd)
REFUSES_FD(ENOTSUP, int, fallocate64, (int fd, int mode, off64_t place, off64_t length), (fd, mode, place, length), fd)
int posix_fallocate(int fd, off_t place, off_t length) { /* which returns its error */
    return refused_fd(fd) ? ENOTSUP : REAL(posix_fallocate)(fd, place, length);
}
int posix_fallocate64(int fd, off64_t place, off64_t length) { return posix_fallocate(fd, place, length); }
ssize_t sendfile64(int to, int from, off64_t *place, size_t n) {
    char path[PATH_MAX];
    if (refused_fd(to)) FAIL(ENOTSUP);
    ssize_t sent = REAL(sendfile64)(to, from, place, n), taken = sent;
    if (sent > 0) taken = room(path_of(to, path), (size_t)sent);
    if (taken == sent) return sent;
    off64_t end = REAL(lseek64)(to, 0, SEEK_CUR) - sent + (taken < 0 ? 0 : taken); /* what did not fit goes again */
    if (REAL(ftruncate64)(to, end)) return -1;
    FAIL(ENOSPC);
}
ssize_t sendfile(int to, int from, off_t *place, size_t n) { return sendfile64(to, from, place, n); }
REFUSES_FD(ENOTSUP, ssize_t, copy_file_range,
           (int from, off64_t *at, int to, off64_t *place, size_t n, unsigned flags), (from, at, to, place, n, flags), to)
REFUSES_FD(ENOTSUP, ssize_t, splice,
           (int from, off64_t *at, int to, off64_t *place, size_t n, unsigned flags), (from, at, to, place, n, flags), to)
REFUSES_FD(EPERM, int, fchmod, (int fd, mode_t mode), (fd, mode), fd)
REFUSES_FD(EPERM, int, futimens, (int fd, const struct timespec times[2]), (fd, times), fd)

static int mapping_refused(int protection, int flags, int fd) {
    char out[PATH_MAX];
    return (protection & PROT_WRITE) && (flags & MAP_SHARED) && !(flags & MAP_ANONYMOUS) &&
           under(path_of(fd, out), getenv("REFUSE_UNDER"));
}
void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t place) {
    if (mapping_refused(protection, flags, fd)) return (errno = ENOTSUP, MAP_FAILED);
    return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, place);
}
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off64_t place) {
    return mmap(at, length, protection, flags, fd, place);
}

/* --- what is refused on names --- */

#define REFUSES_PATH(name, parameters, arguments, at, path)                                                        \
    int name parameters {                                                                                          \
        if (refused(at, path)) FAIL(EPERM);                                                                        \
        return REAL(name) arguments;                                                                               \
    }
#define REFUSES_PATHS(name, parameters, arguments, at, path, at2, path2)                                           \
    int name parameters {                                                                                          \
        if (refused(at, path) || refused(at2, path2)) FAIL(EPERM);                                                 \
        return REAL(name) arguments;                                                                               \
    }
REFUSES_PATHS(rename, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
REFUSES_PATHS(renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), x, a, y, b)
REFUSES_PATHS(renameat2, (int x, const char *a, int y, const char *b, unsigned flags), (x, a, y, b, flags), x, a, y, b)
REFUSES_PATHS(link, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
REFUSES_PATHS(linkat, (int x, const char *a, int y, const char *b, int flags), (x, a, y, b, flags), x, a, y, b)
REFUSES_PATH(symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path)
REFUSES_PATH(symlinkat, (const char *to, int at, const char *path), (to, at, path), at, path)
REFUSES_PATH(truncate, (const char *path, off_t length), (path, length), AT_FDCWD, path)
REFUSES_PATH(truncate64, (const char *path, off64_t length), (path, length), AT_FDCWD, path)
REFUSES_PATH(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
REFUSES_PATH(fchmodat, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags), at, path)
REFUSES_PATH(utimensat, (int at, const char *path, const struct timespec t[2], int flags), (at, path, t, flags), at, path)
REFUSES_PATH(utimes, (const char *path, const struct timeval t[2]), (path, t), AT_FDCWD, path)
REFUSES_PATH(utime, (const char *path, const struct utimbuf *t), (path, t), AT_FDCWD, path)

#define CHANGES(name, parameters, arguments, at, path)                                                             \
    int name parameters {                                                                                          \
        char out[PATH_MAX];                                                                                        \
        int last = last_change(absolute(at, path, out)), result = REAL(name) arguments;                            \
        if (last) die();                                                                                           \
        return result;                                                                                             \
    }
CHANGES(unlink, (const char *path), (path), AT_FDCWD, path)
CHANGES(unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path)
CHANGES(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
CHANGES(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
