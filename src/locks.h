/* Are robust locks held by this process?
 *
 * A thread that dies while it holds a robust mutex hands it on: the kernel
 * walks the thread's robust list in the dying address space and wakes the
 * next waiter with EOWNERDEAD.  If that memory was released first, the list
 * reads as nothing and the waiters hang for ever.  So it must be known before
 * the release, and a process that holds such a lock must not be released.
 */

#ifndef MRELEASE_LOCKS_H
#define MRELEASE_LOCKS_H

#include <stdbool.h>
#include <sys/types.h>          /* pid_t */

enum locks {
    LOCKS_UNKNOWN,              /* not permitted to look, or not all seen */
    LOCKS_FREE,                 /* looked at every thread: none holds one */
    LOCKS_HELD,
};

/* Look at every thread of `pid`; `single`: it has only the one.  `no_fd` is set
 * if it is not known for want of a file descriptor.
 *
 * A dying process may be looked at, too: a thread that has ended has handed on
 * its locks, and those that have not still show them.
 *
 * Needs the right to trace the process (ptrace(2), PTRACE_MODE_ATTACH).  It
 * reads three words a thread from the victim's memory, for which the kernel
 * takes the victim's mmap_lock: like the release itself, it waits for a
 * victim that holds that lock for writing.
 */
enum locks
locks_look(pid_t pid, bool single, bool *no_fd);

#endif /* MRELEASE_LOCKS_H */
