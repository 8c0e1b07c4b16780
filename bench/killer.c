/* Kills by C alone: what the Reaper is compared with.
 *
 *     killer signal|release [fifo]
 *
 * Stays, so that exec and start are no part of a kill.  For each pid, a line
 * on stdin, it sends SIGKILL and, with "release", calls process_mrelease(2)
 * next, in the same thread.  Then it prints
 *
 *     BEGUN SIGNALLED DONE ERRNO CALLS ENDED
 *
 * the first three in nanoseconds of CLOCK_MONOTONIC; ERRNO is that of the
 * last call, ENDED whether the victim had ended when the call had failed.
 * With "fifo" it takes SCHED_FIFO 1.  Ends with its stdin.
 */

#include <errno.h>
#include <inttypes.h>           /* PRId64 */
#include <poll.h>
#include <sched.h>              /* sched_setscheduler() */
#include <signal.h>             /* SIGKILL */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>             /* strtol() */
#include <string.h>             /* strcmp() */
#include <unistd.h>             /* close() */

#include "clock.h"
#include "syscalls.h"

static bool
kill_one(pid_t pid, bool release)
{
    int64_t begun = now_ns();
    int pidfd = sys_pidfd_open(pid);
    if (pidfd < 0) {
        return false;
    }
    int64_t signalled = now_ns();
    if (sys_pidfd_send_signal(pidfd, SIGKILL) < 0) {
        close(pidfd);
        return false;
    }
    int err = 0;
    int calls = 0;
    while (release) {
        err = sys_process_mrelease(pidfd, 0) < 0 ? errno : 0;
        calls++;
        release = err == EAGAIN || err == EINTR;
    }
    int64_t done = now_ns();
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    int ended = poll(&end, 1, 0);
    close(pidfd);
    printf("%" PRId64 " %" PRId64 " %" PRId64 " %d %d %d\n", begun, signalled,
           done, err, calls, ended > 0);
    return true;
}

int
main(int argc, char **argv)
{
    bool release = argc > 1 && strcmp(argv[1], "release") == 0;
    if (argc > 2 && strcmp(argv[2], "fifo") == 0) {
        struct sched_param one = {.sched_priority = 1};
        if (sched_setscheduler(0, SCHED_FIFO, &one) < 0) {
            perror("killer: SCHED_FIFO");
            return 1;
        }
    }
    char line[64];
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (!kill_one((pid_t)strtol(line, NULL, 10), release)) {
            perror("killer");
            return 1;
        }
        fflush(stdout);
    }
    return 0;
}
