/* What a killer does for itself before memory is short. */

#ifndef MRELEASE_HARDEN_H
#define MRELEASE_HARDEN_H

#include <stdbool.h>

/* Lock what is mapped now, and with `future` what will be: each page from its
 * first use on (MCL_ONFAULT, Linux 4.4), so that what is mapped but never
 * used, such as most of a stack, takes no memory.  0 or an errno.
 */
int
harden_lock(bool future);

/* 0 or an errno. */
int
harden_unlock(void);

/* Is what gets mapped now locked at once: is MCL_FUTURE in force? */
bool
harden_locks_future(void);

/* May this process lock more than RLIMIT_MEMLOCK?  Asked of the kernel by a
 * trial: a capability in a user namespace does not count for this.
 */
bool
harden_may_lock_all(void);

/* Give the calling thread the best scheduling that is allowed, real-time only
 * if asked for.  Children do not inherit it.  0 (also if it is a real-time
 * thread already); EPERM if nothing better is allowed; another errno.
 */
int
harden_schedule(bool realtime);

#endif /* MRELEASE_HARDEN_H */
