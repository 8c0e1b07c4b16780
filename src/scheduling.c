#include "scheduling.h"

#include <errno.h>
#include <sched.h>              /* SCHED_FIFO */
#include <string.h>             /* memset() */
#include <sys/resource.h>       /* RLIMIT_NICE */

#ifndef SCHED_DEADLINE
#  define SCHED_DEADLINE 6
#endif

/* In nanoseconds.  The kernel takes no shorter one; by default it has 0.7 ms
 * with one CPU, more with more.  The shorter the slice, the more seldom is
 * that of who has the CPU nearer to its end, and then nobody is displaced.
 */
#define SHORTEST_SLICE 100000

bool
scheduling_is_realtime(uint32_t policy)
{
    return policy == SCHED_FIFO || policy == SCHED_RR ||
           policy == SCHED_DEADLINE;
}

bool
scheduling_is_behind(pid_t tid)
{
    struct sys_sched_attr its = {0};
    struct sys_sched_attr own = {0};

    return sys_sched_getattr(tid, &its) == 0 &&
           sys_sched_getattr(0, &own) == 0 &&
           !scheduling_is_realtime(its.policy) &&
           (its.policy == SCHED_IDLE || its.policy == SCHED_BATCH ||
            (its.nice > 0 && its.nice > own.nice));
}

/* The best nice value that an unprivileged caller may set (setrlimit(2)). */
static int
best_nice(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NICE, &limit) != 0) {
        return 20;
    }
    return limit.rlim_cur >= 40 ? -20 : 20 - (int)limit.rlim_cur;
}

void
scheduling_shorten_slice(void)
{
    struct sys_sched_attr attr;

    memset(&attr, 0, sizeof(attr));
    if (sys_sched_getattr(0, &attr) == 0 && attr.policy == SCHED_OTHER) {
        attr.size = sizeof(attr);
        attr.runtime = SHORTEST_SLICE;
        sys_sched_setattr(0, &attr);
    }
}

int
scheduling_set_best(pid_t tid, const struct sys_sched_attr *before,
                    enum scheduling_rung *from)
{
    for (; *from < SCHEDULING_NONE; ++*from) {
        struct sys_sched_attr wanted;
        memset(&wanted, 0, sizeof(wanted));
        wanted.size = sizeof(wanted);
        wanted.flags = SYS_SCHED_RESET_ON_FORK;
        if (*from == SCHEDULING_FIFO) {
            wanted.policy = SCHED_FIFO;
            wanted.priority = 1;
        }
        else {
            wanted.policy = SCHED_OTHER;
            wanted.nice = *from == SCHEDULING_NICE ? -20 : best_nice();
            if (wanted.nice > 19 ||
                (before->policy != SCHED_IDLE && before->nice <= wanted.nice))
            {
                return EPERM;   /* no better than what it has */
            }
        }
        if (sys_sched_setattr(tid, &wanted) == 0) {
            return 0;
        }
        if (errno != EPERM) {
            return errno;       /* the thread is gone, or seccomp */
        }
    }
    return EPERM;
}
