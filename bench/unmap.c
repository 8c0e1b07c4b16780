/* The limit: a process that gives back memory of its own.
 *
 *     unmap MIB THREADS [on|off]
 *
 * maps and touches so much private memory, in a piece for each thread (1 to
 * 8), with transparent huge pages or without (else as the machine has it),
 * says "ready", and unmaps it at the first line on stdin, each thread its
 * piece.  Then it prints when it began and when all had ended, in nanoseconds
 * of CLOCK_MONOTONIC, and ends with its stdin.
 */

#include <inttypes.h>           /* PRId64 */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdint.h>             /* uintptr_t */
#include <stdlib.h>             /* strtoul() */
#include <string.h>             /* strcmp() */
#include <sys/mman.h>
#include <unistd.h>             /* sysconf() */

#include "clock.h"

#define MOST 8
#define HUGE ((size_t)2 << 20)

static pthread_barrier_t barrier;
static size_t piece;

static void *
unmap(void *memory)
{
    pthread_barrier_wait(&barrier);
    munmap(memory, piece);
    return NULL;
}

/* Begins where a huge page may. */
static char *
map_piece(const char *huge_pages)
{
    char *memory = mmap(NULL, piece + HUGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    memory += (HUGE - (uintptr_t)memory % HUGE) % HUGE;
    if (huge_pages != NULL) {
        int on = strcmp(huge_pages, "on") == 0;
        /* A kernel without them refuses, and has none: that is "off". */
        if (madvise(memory, piece, on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) < 0 &&
            on)
        {
            return NULL;
        }
    }
    return memory;
}

int
main(int argc, char **argv)
{
    bool given = argc == 3 || argc == 4;
    size_t mib = given ? strtoul(argv[1], NULL, 10) : 0;
    unsigned int threads =
        given ? (unsigned int)strtoul(argv[2], NULL, 10) : 0;
    if (mib == 0 || threads == 0 || threads > MOST) {
        fputs("usage: unmap MIB THREADS [on|off]\n", stderr);
        return 2;
    }
    piece = (mib << 20) / threads;
    pthread_barrier_init(&barrier, NULL, threads);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory[MOST];
    pthread_t thread[MOST];
    for (unsigned int i = 0; i < threads; i++) {
        memory[i] = map_piece(argc == 4 ? argv[3] : NULL);
        if (memory[i] == NULL) {
            perror("unmap: memory");
            return 1;
        }
        for (size_t at = 0; at < piece; at += page) {
            ((volatile char *)memory[i])[at] = 1;
        }
    }
    for (unsigned int i = 1; i < threads; i++) {
        if (pthread_create(&thread[i], NULL, unmap, memory[i]) != 0) {
            fputs("unmap: no thread\n", stderr);
            return 1;
        }
    }
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) {
        return 1;
    }
    int64_t begun = now_ns();
    unmap(memory[0]);
    for (unsigned int i = 1; i < threads; i++) {
        pthread_join(thread[i], NULL);
    }
    printf("%" PRId64 " %" PRId64 "\n", begun, now_ns());
    fflush(stdout);
    while (getchar() != EOF) {
    }
    return 0;
}
