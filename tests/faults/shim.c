/* LD_PRELOAD: one system call of a process fails, or is where the process is killed.

   FAULT="CALL N ERRNO"  the N-th CALL (open, write, fsync, rename, mkdir, unlink, or any) on a path that contains
                         FAULT_PATH fails with ERRNO; with ERRNO 0 the process gets SIGKILL instead of the call
   FAULT="CALL N+ ERRNO" so do all later ones
   FAULT="count"         nothing fails; the number of calls goes to the file FAULT_COUNT at each of them

   Both are read at each call, so that a forked child can set them for itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int hits;

static void count_to_file(void) {
    char text[32];
    int length = snprintf(text, sizeof text, "%d\n", hits);
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int file = real_open(getenv("FAULT_COUNT"), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file >= 0 && real_write(file, text, length) < 0) abort();
    close(file);
}

static int fails(const char *call, const char *path) {
    const char *fault = getenv("FAULT"), *part = getenv("FAULT_PATH");
    char wanted[16], number[16];
    int code = 0;
    if (!fault || !part || !path || !strstr(path, part)) return 0;
    if (!strcmp(fault, "count")) {
        hits++;
        count_to_file();
        return 0;
    }
    if (sscanf(fault, "%15s %15s %d", wanted, number, &code) != 3) return 0;
    if (strcmp(wanted, "any") && strcmp(wanted, call)) return 0;
    int at = atoi(number);
    hits++;
    if (hits != at && !(hits > at && strchr(number, '+'))) return 0;
    if (code == 0) kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}

static const char *path_of(int descriptor, const char *name) {
    static __thread char path[PATH_MAX];
    char link[64];
    if (name && name[0] == '/') return name;
    if (descriptor == AT_FDCWD) return name;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 300);
    if (length < 0) return name;
    snprintf(path + length, 299, "/%s", name ? name : "");
    return path;
}

#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, name)

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    REAL(int, "open64", const char *, int, ...);
    return (flags & O_CREAT) && fails("open", path) ? -1 : real(path, flags, mode);
}

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return getenv("FAULT") && fails("write", path_of(file, NULL)) ? -1 : real(file, data, size);
}

int fsync(int file) {
    REAL(int, "fsync", int);
    return fails("fsync", path_of(file, NULL)) ? -1 : real(file);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return fails("rename", to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return fails("mkdir", path) ? -1 : real(path, mode);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return fails("unlink", path_of(folder, path)) ? -1 : real(folder, path, flags);
}
