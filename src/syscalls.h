/* The system calls that libc may not wrap: their numbers and their shapes.
 *
 * Each wrapper is the bare call: it returns what syscall(2) returns and
 * leaves errno as the kernel set it.
 */

#ifndef MRELEASE_SYSCALLS_H
#define MRELEASE_SYSCALLS_H

#include <signal.h>             /* siginfo_t */
#include <stddef.h>             /* size_t */
#include <stdint.h>             /* uint32_t */
#include <sys/syscall.h>        /* SYS_* */
#include <sys/types.h>          /* pid_t */
#include <unistd.h>             /* syscall() */

/* Headers older than Linux 5.15 lack the number (manylinux images).  It is
 * the same on every architecture but alpha and mips; x32 adds its bit.
 */
#ifndef SYS_process_mrelease
#  if defined(__alpha__)
#    define SYS_process_mrelease 558
#  elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_ABI32
#    define SYS_process_mrelease 4448
#  elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_NABI32
#    define SYS_process_mrelease 6448
#  elif defined(__mips__)
#    define SYS_process_mrelease 5448
#  elif defined(__x86_64__) && defined(__ILP32__)
#    define SYS_process_mrelease (0x40000000 | 448)
#  else
#    define SYS_process_mrelease 448
#  endif
#endif

/* Linux 5.1 and 5.3: younger than the headers of some build images. */
#ifndef SYS_pidfd_send_signal
#  if defined(__alpha__)
#    define SYS_pidfd_send_signal 534
#    define SYS_pidfd_open 544
#  elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_ABI32
#    define SYS_pidfd_send_signal 4424
#    define SYS_pidfd_open 4434
#  elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_NABI32
#    define SYS_pidfd_send_signal 6424
#    define SYS_pidfd_open 6434
#  elif defined(__mips__)
#    define SYS_pidfd_send_signal 5424
#    define SYS_pidfd_open 5434
#  elif defined(__x86_64__) && defined(__ILP32__)
#    define SYS_pidfd_send_signal (0x40000000 | 424)
#    define SYS_pidfd_open (0x40000000 | 434)
#  else
#    define SYS_pidfd_send_signal 424
#    define SYS_pidfd_open 434
#  endif
#endif

static inline int
sys_process_mrelease(int pidfd, unsigned int flags)
{
    return (int)syscall(SYS_process_mrelease, pidfd, flags);
}

static inline int
sys_pidfd_open(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0U);
}

static inline int
sys_pidfd_send_signal(int pidfd, int signum)
{
    return (int)syscall(SYS_pidfd_send_signal, pidfd, signum,
                        (siginfo_t *)NULL, 0U);
}

static inline long
sys_get_robust_list(pid_t tid, void **head, size_t *size)
{
    return syscall(SYS_get_robust_list, tid, head, size);
}

/* struct sched_attr as Linux 3.14 had it (SCHED_ATTR_SIZE_VER0).  Not
 * <linux/sched/types.h>: it cannot be included beside every <sched.h>.
 */
struct sys_sched_attr {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;
    uint64_t deadline;
    uint64_t period;
};

static inline int
sys_sched_setattr(pid_t tid, struct sys_sched_attr *attr)
{
    return (int)syscall(SYS_sched_setattr, tid, attr, 0U);
}

static inline int
sys_sched_getattr(pid_t tid, struct sys_sched_attr *attr)
{
    return (int)syscall(SYS_sched_getattr, tid, attr, sizeof(*attr), 0U);
}

#endif /* MRELEASE_SYSCALLS_H */
