/* The limit: a process that gives back memory of its own.
 *
 *     unmap MIB THREADS
 *
 * maps and touches so much private memory, in a piece for each thread (1 to
 * 8), says "ready", and unmaps it at the first line on stdin, each thread its
 * piece.  Then it prints when it began and when all had ended, in nanoseconds
 * of CLOCK_MONOTONIC, and ends with its stdin.
 */

#include <inttypes.h>           /* PRId64 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>             /* strtoul() */
#include <sys/mman.h>
#include <unistd.h>             /* sysconf() */

#include "clock.h"

#define MOST 8

static pthread_barrier_t barrier;
static size_t piece;

static void *
unmap(void *memory)
{
    pthread_barrier_wait(&barrier);
    munmap(memory, piece);
    return NULL;
}

int
main(int argc, char **argv)
{
    size_t mib = argc == 3 ? strtoul(argv[1], NULL, 10) : 0;
    unsigned int threads =
        argc == 3 ? (unsigned int)strtoul(argv[2], NULL, 10) : 0;
    if (mib == 0 || threads == 0 || threads > MOST) {
        fputs("usage: unmap MIB THREADS\n", stderr);
        return 2;
    }
    piece = (mib << 20) / threads;
    pthread_barrier_init(&barrier, NULL, threads);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory[MOST];
    pthread_t thread[MOST];
    for (unsigned int i = 0; i < threads; i++) {
        memory[i] = mmap(NULL, piece, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory[i] == MAP_FAILED) {
            perror("unmap: mmap");
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
