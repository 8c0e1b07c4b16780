#include "harden.h"

#include <errno.h>
#include <stdint.h>             /* SIZE_MAX */
#include <string.h>             /* memset() */
#include <sys/mman.h>           /* mlockall() */
#include <sys/resource.h>       /* RLIMIT_MEMLOCK */

#include "scheduling.h"
#include "syscalls.h"

/* Not in every libc.  Each architecture's own numbers are in its headers. */
#ifndef MCL_ONFAULT
#  include <linux/mman.h>
#endif
#ifndef MLOCK_ONFAULT
#  define MLOCK_ONFAULT 1
#endif

int
harden_lock(bool future)
{
    int flags = MCL_CURRENT | MCL_ONFAULT | (future ? MCL_FUTURE : 0);
    return mlockall(flags) < 0 ? errno : 0;
}

int
harden_unlock(void)
{
    return munlockall() < 0 ? errno : 0;
}

/* Readable: Linux 5.10 does not lock what cannot be read, 6.12 does.
 * Not writable: that would count as committed and as data.
 */
static void *
reserve(size_t size)
{
    return mmap(NULL, size, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

bool
harden_locks_future(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *fresh = reserve(page);
    if (fresh == MAP_FAILED) {
        return errno == EAGAIN; /* it would be locked, beyond the limit */
    }
    /* Locked pages cannot be thrown away: madvise(2). */
    bool locked = madvise(fresh, page, MADV_DONTNEED) < 0 && errno == EINVAL;
    munmap(fresh, page);
    return locked;
}

bool
harden_may_lock_all(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct rlimit limit;

    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) {
        return false;
    }
    if (limit.rlim_cur == RLIM_INFINITY) {
        return true;
    }
    if (limit.rlim_cur > SIZE_MAX - 2 * page) {
        return false;
    }
    size_t size = ((size_t)limit.rlim_cur / page + 1) * page;
    void *beyond = reserve(size);
    if (beyond == MAP_FAILED) {
        return false;
    }
    /* Nothing of it becomes resident: nobody touches it. */
    bool may = syscall(SYS_mlock2, beyond, size, MLOCK_ONFAULT) == 0;
    munmap(beyond, size);
    return may;
}

int
harden_schedule(bool realtime)
{
    struct sys_sched_attr before;
    enum scheduling_rung from = realtime ? SCHEDULING_FIFO : SCHEDULING_NICE;

    memset(&before, 0, sizeof(before));
    if (sys_sched_getattr(0, &before) != 0) {
        return errno;
    }
    if (scheduling_is_realtime(before.policy)) {
        return 0;               /* it has what we could give */
    }
    return scheduling_set_best(0, &before, &from);
}
