/* The best scheduling that may be had, for one thread.
 *
 * A ladder: SCHED_FIFO 1, else nice -20, else the best nice that the resource
 * limits allow (setrlimit(2), RLIMIT_NICE).  All with reset-on-fork: what the
 * thread starts has none of it.
 */

#ifndef MRELEASE_SCHEDULING_H
#define MRELEASE_SCHEDULING_H

#include <stdbool.h>
#include <stdint.h>             /* uint32_t */
#include <sys/types.h>          /* pid_t */

#include "syscalls.h"

enum scheduling_rung {
    SCHEDULING_FIFO,
    SCHEDULING_NICE,            /* nice -20 */
    SCHEDULING_LIMIT,           /* the best nice within RLIMIT_NICE */
    SCHEDULING_NONE,
};

bool
scheduling_is_realtime(uint32_t policy);

/* Does the scheduler put that thread behind most others, and the caller's? */
bool
scheduling_is_behind(pid_t tid);

/* Without real-time scheduling: ask for the shortest time slice.  It needs no
 * right and gives no more of the CPU, but a thread with a shorter slice than
 * the one that runs gets the CPU at once when it wakes up (Linux 6.12; older
 * kernels take no notice).
 */
void
scheduling_shorten_slice(void);

/* Set the best from rung `*from` on, for thread `tid` (0: the caller's), which
 * had `before`.  `*from` becomes the first rung that is still worth a try.
 *
 * Returns 0, or an errno: EPERM if no better one than before is allowed, ESRCH
 * if there is no such thread, ENOSYS or what else a seccomp policy gives.
 */
int
scheduling_set_best(pid_t tid, const struct sys_sched_attr *before,
                    enum scheduling_rung *from);

#endif /* MRELEASE_SCHEDULING_H */
