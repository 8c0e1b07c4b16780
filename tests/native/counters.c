/* For `make coverage`: linked into what is measured, and into nothing else.

   gcc writes the counters of a program when it exits.  Here most processes do
   not: they are killed, end by _exit(), or may not open a file any more.  So
   the counters are put into a file that all processes share, from the start
   on, and what each has counted stands there whatever becomes of it.  The
   compiler adds to them atomically (-fprofile-update=atomic).

   With $MRELEASE_COUNTERS set, a program that has this writes the counters
   into that folder, in gcov's format, and ends. */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef COUNTERS
#  define COUNTERS "counters" /* the path of the file */
#endif

#define HIDDEN __attribute__((visibility("hidden")))

extern char counters_begin[] HIDDEN;
extern char counters_end[] HIDDEN;

struct gcov_info;

/* Of each object, from the linker (-fprofile-info-section=gcov_info). */
/* NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */
extern const struct gcov_info *const __start_gcov_info[] HIDDEN;
extern const struct gcov_info *const __stop_gcov_info[] HIDDEN;

/* <gcov.h>, which other compilers do not have. */
extern void
__gcov_info_to_gcda(const struct gcov_info *info,
                    void (*open_file)(const char *path, void *arg),
                    void (*write_part)(const void *data, unsigned size,
                                       void *arg),
                    void *(*allocate)(unsigned size, void *arg), void *arg);
/* NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */

static _Noreturn void
give_up(const char *what)
{
    fprintf(stderr, "counters: %s: %s\n", what, strerror(errno));
    _exit(99);
}

static void
open_file(const char *path, void *arg)
{
    const char *name = strrchr(path, '/');
    char full[4096];
    FILE **file = arg;

    snprintf(full, sizeof(full), "%s/%s", getenv("MRELEASE_COUNTERS"),
             name == NULL ? path : name + 1);
    *file = fopen(full, "we");
    if (*file == NULL) {
        give_up(full);
    }
}

static void
write_part(const void *data, unsigned size, void *arg)
{
    FILE **file = arg;
    if (fwrite(data, 1, size, *file) != size) {
        give_up("fwrite");
    }
}

static void *
allocate(unsigned size, void *arg)
{
    (void)arg;
    return malloc(size); /* this process ends soon */
}

static _Noreturn void
write_all(void)
{
    const struct gcov_info *const *at = __start_gcov_info;

    /* Not the array's end: to the compiler these are two arrays. */
    while ((uintptr_t)at < (uintptr_t)__stop_gcov_info) {
        FILE *file = NULL;
        __gcov_info_to_gcda(*at, open_file, write_part, allocate, &file);
        if (file == NULL || fclose(file) != 0) {
            give_up("fclose");
        }
        at++;
    }
    _exit(0);
}

static void __attribute__((constructor))
share_counters(void)
{
    /* Of one section, by the linker. */
    size_t size = (uintptr_t)counters_end - (uintptr_t)counters_begin;
    struct stat found;
    int fd = open(COUNTERS, O_RDWR | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &found) < 0) {
        give_up(COUNTERS);
    }
    if (found.st_size == 0 && ftruncate(fd, (off_t)size) < 0) {
        give_up("ftruncate");
    }
    if (mmap(counters_begin, size, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
    {
        give_up("mmap");
    }
    close(fd);
    if (getenv("MRELEASE_COUNTERS") != NULL) {
        write_all();
    }
}
