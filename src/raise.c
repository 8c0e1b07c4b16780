#include "raise.h"

#include <errno.h>
#include <sched.h>              /* SCHED_FIFO, sched_setaffinity() */
#include <string.h>             /* memset() */
#include <sys/resource.h>       /* RLIMIT_NICE */

#include "procfs.h"
#include "syscalls.h"

#ifndef SCHED_DEADLINE
#  define SCHED_DEADLINE 6
#endif
#define FLAG_RESET_ON_FORK 1    /* SCHED_FLAG_RESET_ON_FORK */

static bool
is_realtime(uint32_t policy)
{
    return policy == SCHED_FIFO || policy == SCHED_RR ||
           policy == SCHED_DEADLINE;
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

/* Set the best that is allowed.  `*from` is the first rung of the ladder still
 * worth a try: what one thread of the process may not have, the others may not
 * have either.
 */
static bool
set_best(pid_t tid, const struct sys_sched_attr *before, int *from)
{
    for (int rung = *from; rung < 3; rung++) {
        struct sys_sched_attr wanted;
        memset(&wanted, 0, sizeof(wanted));
        wanted.size = sizeof(wanted);
        wanted.flags = FLAG_RESET_ON_FORK;
        if (rung == 0) {
            wanted.policy = SCHED_FIFO;
            wanted.priority = 1;
        }
        else {
            wanted.policy = SCHED_OTHER;
            wanted.nice = rung == 1 ? -20 : best_nice();
            if (wanted.nice > 19 ||
                (before->policy != SCHED_IDLE && before->nice <= wanted.nice))
            {
                return false;   /* no better than what it has */
            }
        }
        if (sys_sched_setattr(tid, &wanted) == 0) {
            return true;
        }
        if (errno != EPERM) {
            return false;       /* the thread is gone, or seccomp */
        }
        *from = rung + 1;
    }
    return false;
}

static bool
raise_thread(const struct procfs_tasks *tasks, pid_t tid, int *from,
             const cpu_set_t *all)
{
    struct sys_sched_attr before;
    bool raised = false;

    memset(&before, 0, sizeof(before));
    if (sys_sched_getattr(tid, &before) != 0) {
        return false;
    }
    if (is_realtime(before.policy)) {
        raised = true;          /* it has what we could give */
    }
    else if (set_best(tid, &before, from)) {
        if (!procfs_tasks_has(tasks, tid)) {
            /* The thread ended meanwhile.  Scheduling goes by number, not by
             * pidfd: should a stranger have got this one within the last
             * microseconds, it gets back what was there.
             */
            before.size = sizeof(before);
            sys_sched_setattr(tid, &before);
            return false;
        }
        raised = true;
    }
    if (procfs_tasks_has(tasks, tid)) {
        /* The kernel cuts this down to the CPUs of the victim's cpuset. */
        sched_setaffinity(tid, sizeof(*all), all);
    }
    return raised;
}

bool
raise_victim(int pidfd, pid_t pid)
{
    struct procfs_tasks tasks;
    cpu_set_t all;
    bool raised = false;
    int from = 0;
    pid_t tid;

    if (procfs_tasks_open(&tasks, pid) != 0) {
        return false;
    }
    /* Not waited for yet, so the number was still the victim's when the list
     * of its threads was opened.
     */
    if (sys_pidfd_send_signal(pidfd, 0) == 0) {
        memset(&all, 0xff, sizeof(all));
        while ((tid = procfs_tasks_next(&tasks)) > 0) {
            raised |= raise_thread(&tasks, tid, &from, &all);
        }
    }
    procfs_tasks_close(&tasks);
    return raised;
}
