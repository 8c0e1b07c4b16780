/* Watches a memory cgroup until its memory is back.
 *
 *     watch
 *
 * takes SCHED_FIFO 3 (above the Reaper and its raised victims), if it may,
 * and says what it got: "fifo" or "normal".  For each line on stdin,
 *
 *     FILE LIMIT GIVE_UP PAUSE
 *
 * (a usage file, bytes, and two times in nanoseconds) it says "looking", and
 * reads the file, sleeping for PAUSE between two looks, until it tells LIMIT
 * or less or GIVE_UP has passed; then it prints
 *
 *     WHEN LOOKS GAP
 *
 * WHEN is in nanoseconds of CLOCK_MONOTONIC, 0 if it gave up; GAP is the
 * longest time between two looks.  It sleeps, since it shares the CPUs with
 * those that it times.  Ends with its stdin.
 */

#include <fcntl.h>              /* open() */
#include <inttypes.h>           /* PRId64, SCNd64 */
#include <sched.h>              /* sched_setscheduler() */
#include <stdio.h>
#include <stdlib.h>             /* strtoll() */
#include <sys/prctl.h>          /* PR_SET_TIMERSLACK */
#include <unistd.h>             /* pread() */

#include "clock.h"

static int64_t
usage(int fd)
{
    char text[32];
    ssize_t got = pread(fd, text, sizeof(text) - 1, 0);
    if (got <= 0) {
        return INT64_MAX;
    }
    text[got] = '\0';
    return strtoll(text, NULL, 10);
}

static void
look(int fd, int64_t limit, int64_t give_up, int64_t pause)
{
    struct timespec nap = {.tv_sec = pause / 1000000000,
                           .tv_nsec = pause % 1000000000};
    int64_t last = now_ns();
    int64_t until = last + give_up;
    int64_t gap = 0;
    int64_t looks = 0;
    int64_t when = 0;
    puts("looking");
    fflush(stdout);
    while (when == 0 && last < until) {
        nanosleep(&nap, NULL);
        int64_t used = usage(fd);
        int64_t now = now_ns();
        looks++;
        gap = now - last > gap ? now - last : gap;
        last = now;
        if (used <= limit) {
            when = now;
        }
    }
    printf("%" PRId64 " %" PRId64 " %" PRId64 "\n", when, looks, gap);
    fflush(stdout);
}

int
main(void)
{
    struct sched_param three = {.sched_priority = 3};
    int rc = sched_setscheduler(0, SCHED_FIFO, &three);
    prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0);
    puts(rc == 0 ? "fifo" : "normal");
    fflush(stdout);
    char path[512];
    int64_t limit;
    int64_t give_up;
    int64_t pause;
    while (scanf("%511s %" SCNd64 " %" SCNd64 " %" SCNd64, path, &limit,
                 &give_up, &pause) == 4)
    {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            perror("watch");
            return 1;
        }
        look(fd, limit, give_up, pause);
        close(fd);
    }
    return 0;
}
