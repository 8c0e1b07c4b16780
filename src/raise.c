#include "raise.h"

#include <sched.h>              /* sched_setaffinity() */
#include <string.h>             /* memset() */

#include "procfs.h"
#include "scheduling.h"
#include "syscalls.h"

/* `*from` is the first rung of the ladder still worth a try: what one thread of
 * the process may not have, the others may not have either.
 */
static bool
raise_thread(const struct procfs_tasks *tasks, pid_t tid,
             enum scheduling_rung *from, const cpu_set_t *all)
{
    struct sys_sched_attr before;
    bool raised = false;

    memset(&before, 0, sizeof(before));
    if (sys_sched_getattr(tid, &before) != 0) {
        return false;
    }
    if (scheduling_is_realtime(before.policy)) {
        raised = true;          /* it has what we could give */
    }
    else if (scheduling_set_best(tid, &before, from) == 0) {
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
    enum scheduling_rung from = SCHEDULING_FIFO;

    if (procfs_tasks_open(&tasks, pid) != 0) {
        return false;
    }
    /* Not waited for yet, so the number was still the victim's when the list
     * of its threads was opened.
     */
    if (sys_pidfd_send_signal(pidfd, 0) == 0) {
        pid_t tid;
        memset(&all, 0xff, sizeof(all));
        while ((tid = procfs_tasks_next(&tasks)) > 0) {
            raised |= raise_thread(&tasks, tid, &from, &all);
        }
    }
    procfs_tasks_close(&tasks);
    return raised;
}
