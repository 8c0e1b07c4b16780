/* The system calls that libc may not wrap: their numbers and their shapes.
 *
 * Each wrapper is the bare call: it returns what syscall(2) returns and
 * leaves errno as the kernel set it.
 */

#ifndef MRELEASE_SYSCALLS_H
#define MRELEASE_SYSCALLS_H

#include <linux/futex.h>        /* FUTEX_WAIT */
#include <signal.h>             /* siginfo_t */
#include <stddef.h>             /* size_t */
#include <stdint.h>             /* uint32_t */
#include <sys/syscall.h>        /* SYS_* */
#include <sys/types.h>          /* pid_t */
#include <unistd.h>             /* syscall() */

/* Numbers from 424 on are the same on every architecture, but for an offset.
 * (_MIPS_SIM is compared with the compiler's own names: those of <sgidefs.h>
 * are not there with every libc.)
 */
#if defined(__alpha__)
#  define SYSCALL_OFFSET 110
#elif defined(__mips__) && _MIPS_SIM == _ABIO32
#  define SYSCALL_OFFSET 4000
#elif defined(__mips__) && _MIPS_SIM == _ABIN32
#  define SYSCALL_OFFSET 6000
#elif defined(__mips__)
#  define SYSCALL_OFFSET 5000
#elif defined(__x86_64__) && defined(__ILP32__)
#  define SYSCALL_OFFSET 0x40000000
#else
#  define SYSCALL_OFFSET 0
#endif

/* Build images may have headers older than the calls: Linux 5.1, 5.3, 5.6,
 * 5.15.
 */
#ifndef SYS_pidfd_send_signal
#  define SYS_pidfd_send_signal (SYSCALL_OFFSET + 424)
#endif
#ifndef SYS_pidfd_open
#  define SYS_pidfd_open (SYSCALL_OFFSET + 434)
#endif
#ifndef SYS_openat2
#  define SYS_openat2 (SYSCALL_OFFSET + 437)
#endif
#ifndef SYS_process_mrelease
#  define SYS_process_mrelease (SYSCALL_OFFSET + 448)
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

/* To the process group that has this process's number.  Linux 6.9; EINVAL
 * before that.
 */
static inline int
sys_pidfd_signal_group(int pidfd, int signum)
{
    /* PIDFD_SIGNAL_PROCESS_GROUP */
    return (int)syscall(SYS_pidfd_send_signal, pidfd, signum,
                        (siginfo_t *)NULL, 1U << 2);
}

/* struct open_how and RESOLVE_* of <linux/openat2.h>. */
struct sys_open_how {
    uint64_t flags;
    uint64_t mode;
    uint64_t resolve;
};

#define SYS_RESOLVE_NO_XDEV 0x01
#define SYS_RESOLVE_NO_MAGICLINKS 0x02
#define SYS_RESOLVE_NO_SYMLINKS 0x04
#define SYS_RESOLVE_BENEATH 0x08

static inline int
sys_openat2(int at, const char *name, const struct sys_open_how *how)
{
    return (int)syscall(SYS_openat2, at, name, how, sizeof(*how));
}

static inline long
sys_get_robust_list(pid_t tid, void **head, size_t *size)
{
    return syscall(SYS_get_robust_list, tid, head, size);
}

/* Wait while *word is `expected`, for so many nanoseconds at most, or wake up
 * to `count` who wait.  Among threads of this process.
 */
static inline int
sys_futex_wait(_Atomic uint32_t *word, uint32_t expected, int64_t ns)
{
#if defined(SYS_futex_time64) && !defined(__LP64__)
    /* 32 bits: libc's own struct timespec may have a 64-bit time_t. */
    struct {
        int64_t tv_sec, tv_nsec;
    } timeout = {ns / 1000000000, ns % 1000000000};
    long number = SYS_futex_time64;
#else
    struct {
        long tv_sec, tv_nsec;
    } timeout = {(long)(ns / 1000000000), (long)(ns % 1000000000)};
    long number = SYS_futex;
#endif
    return (int)syscall(number, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG,
                        expected, &timeout, NULL, 0);
}

static inline int
sys_futex_wake(_Atomic uint32_t *word, int count)
{
#if defined(SYS_futex_time64) && !defined(__LP64__)
    long number = SYS_futex_time64;
#else
    long number = SYS_futex;
#endif
    return (int)syscall(number, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, count,
                        NULL, NULL, 0);
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

#define SYS_SCHED_RESET_ON_FORK 1       /* SCHED_FLAG_RESET_ON_FORK */

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
