/* A child that the program around us does not notice. */

#ifndef MRELEASE_CHILD_H
#define MRELEASE_CHILD_H

#include <sys/types.h>          /* pid_t */

/* A fork() that sends no SIGCHLD when it ends, that no wait() of the program
 * sees (only one with __WALL or __WCLONE), and that runs no handler: in the
 * child all signals are blocked.  Like fork() in what it returns.  The child
 * may call what is safe in a signal handler, and ends with _exit().
 */
pid_t
child_fork(void);

/* Wait until it has ended.  0, or -1 with errno: somebody else has. */
int
child_wait(pid_t pid);

/* A child that does nothing until it is killed, at the latest when the thread
 * that made it ends.  Its pid, or -1 with errno.
 */
pid_t
child_start_idle(void);

/* Kill it if it still runs, and wait for it. */
void
child_end(pid_t pid);

#endif /* MRELEASE_CHILD_H */
