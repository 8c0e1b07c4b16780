/* Watches a memory cgroup until its memory is back, and victims to their end.
 *
 *     watch
 *
 * takes SCHED_FIFO 3 (above the Reaper and its raised victims), if it may,
 * and says what it got: "fifo" or "normal".  For each line on stdin,
 *
 *     FILE LIMIT GIVE_UP PAUSE COUNT PID...
 *
 * (a usage file, bytes, two times in nanoseconds, and so many pids) it says
 * "looking", and reads the file, sleeping for PAUSE between two looks, until
 * it tells LIMIT or less and all the pids have ended, or GIVE_UP has passed;
 * then it prints
 *
 *     WHEN LOOKS GAP ENDED
 *
 * WHEN and ENDED are in nanoseconds of CLOCK_MONOTONIC, 0 if it gave up (or
 * there was no pid); GAP is the longest time between two looks.  It sleeps,
 * since it shares the CPUs with those that it times; and it does not wait for
 * the ends, since each would wake it.  Ends with its stdin.
 */

#include <fcntl.h>              /* open() */
#include <inttypes.h>           /* PRId64, SCNd64 */
#include <poll.h>
#include <sched.h>              /* sched_setscheduler() */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>             /* strtoll() */
#include <sys/prctl.h>          /* PR_SET_TIMERSLACK */
#include <unistd.h>             /* pread() */

#include "clock.h"
#include "syscalls.h"

#define MOST 1000 /* or so are the file descriptors there are */

static struct pollfd ends[MOST];
static int count;

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

/* Whether all have ended, from the first that was not seen to have, on. */
static bool
all_ended(int *first)
{
    while (*first < count && poll(&ends[*first], 1, 0) > 0) {
        ++*first;
    }
    return *first == count;
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
    int64_t ended = 0;
    int first = 0;
    puts("looking");
    fflush(stdout);
    while ((when == 0 || (count > 0 && ended == 0)) && last < until) {
        nanosleep(&nap, NULL);
        bool all = ended == 0 && count > 0 && all_ended(&first);
        int64_t used = when == 0 ? usage(fd) : INT64_MAX;
        int64_t now = now_ns();
        looks++;
        gap = now - last > gap ? now - last : gap;
        last = now;
        if (used <= limit) {
            when = now;
        }
        if (all) {
            ended = now;
        }
    }
    printf("%" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", when, looks,
           gap, ended);
    fflush(stdout);
}

static bool
open_victims(int wanted)
{
    if (wanted > MOST) {
        fprintf(stderr, "watch: at most %d victims\n", MOST);
        return false;
    }
    for (count = 0; count < wanted; count++) {
        int pid;
        if (scanf("%d", &pid) != 1) {
            return false;
        }
        int fd = sys_pidfd_open((pid_t)pid);
        if (fd < 0) {
            perror("watch: pidfd_open");
            return false;
        }
        ends[count] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    return true;
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
    int wanted;
    while (scanf("%511s %" SCNd64 " %" SCNd64 " %" SCNd64 " %d", path, &limit,
                 &give_up, &pause, &wanted) == 5)
    {
        if (!open_victims(wanted)) {
            return 1;
        }
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            perror("watch");
            return 1;
        }
        look(fd, limit, give_up, pause);
        close(fd);
        while (count > 0) {
            close(ends[--count].fd);
        }
    }
    return 0;
}
