/* Which of the system calls that a kill needs are to be had here?
 *
 * Each is made once, with arguments that change nothing.  A seccomp policy may
 * answer with an errno or kill the caller; in a child it kills the child.
 */

#ifndef MRELEASE_PROBE_H
#define MRELEASE_PROBE_H

#include <stdbool.h>

#define PROBE_CALLS 8
#define PROBE_KILLED (-1)       /* the caller of this call is killed */
#define PROBE_UNKNOWN (-2)      /* no child could be made */

/* In the order of the results. */
extern const char *const probe_names[PROBE_CALLS];

/* For each call: 0 (it works), an errno, or one of the above.  In a child of
 * the caller's if `in_child`: one that sends no SIGCHLD and that no wait() of
 * the caller's program sees.
 */
void
probe_calls(bool in_child, int results[PROBE_CALLS]);

#endif /* MRELEASE_PROBE_H */
