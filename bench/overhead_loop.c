/* The same system call in a C loop: what overhead.py compares with.
 *
 * Loaded as a shared library, so that the loops that are compared run in one
 * process, on one CPU, one after the other.
 */

#include <errno.h>
#include <stdint.h>             /* int64_t */

#include "clock.h"
#include "syscalls.h"

/* Nanoseconds for so many calls, each of which must give this errno (0: it
 * succeeds); -1 if one does not.
 */
/* For ctypes: not static.  NOLINTBEGIN(misc-use-internal-linkage) */
int64_t
loop_ns(int pidfd, int64_t count, int expected);
/* NOLINTEND(misc-use-internal-linkage) */

int64_t
loop_ns(int pidfd, int64_t count, int expected)
{
    int64_t begun = now_ns();
    for (int64_t i = 0; i < count; i++) {
        int err = sys_process_mrelease(pidfd, 0) < 0 ? errno : 0;
        if (err != expected) {
            return -1;
        }
    }
    return now_ns() - begun;
}
