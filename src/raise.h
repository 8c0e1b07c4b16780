/* Raise a dying process so that it can finish dying.
 *
 * A process that was sent SIGKILL only runs its own teardown, so it may have
 * the best scheduling there is; what the release cannot free (shared memory,
 * huge pages, page tables) comes back when it gets to run.
 */

#ifndef MRELEASE_RAISE_H
#define MRELEASE_RAISE_H

#include <stdbool.h>
#include <sys/types.h>          /* pid_t */

/* Give every thread of the process SCHED_FIFO 1, or else nice -20, or else
 * the best nice that is allowed, and all CPUs.  Never call it on a process
 * that is not dying.
 *
 * Returns true if at least one thread was raised; false if it was not
 * permitted (CAP_SYS_NICE, RLIMIT_RTPRIO, RLIMIT_NICE), or nothing was left.
 */
bool
raise_victim(int pidfd, pid_t pid);

#endif /* MRELEASE_RAISE_H */
