#include "probe.h"

#include <errno.h>
#include <signal.h>             /* sigprocmask() */
#include <string.h>             /* memset() */
#include <sys/resource.h>       /* RLIMIT_CORE */
#include <sys/uio.h>            /* process_vm_readv() */
#include <sys/wait.h>           /* waitid() */
#include <unistd.h>             /* pipe2(), _exit() */
#include <fcntl.h>              /* O_CLOEXEC */

#include "syscalls.h"

static int
try_process_mrelease(void)
{
    /* Not an fd: the call looks at it, frees nothing, and says so. */
    return sys_process_mrelease(-1, 0) < 0 && errno != EBADF ? errno : 0;
}

static int
try_pidfd_open(void)
{
    int fd = sys_pidfd_open(getpid());
    if (fd < 0) {
        return errno;
    }
    close(fd);
    return 0;
}

static int
try_pidfd_send_signal(void)
{
    return sys_pidfd_send_signal(-1, 0) < 0 && errno != EBADF ? errno : 0;
}

static int
try_get_robust_list(void)
{
    void *head;
    size_t size;
    return sys_get_robust_list(0, &head, &size) < 0 ? errno : 0;
}

static int
try_process_vm_readv(void)
{
    char from = 0;
    char to;
    struct iovec local = {.iov_base = &to, .iov_len = 1};
    struct iovec remote = {.iov_base = &from, .iov_len = 1};
    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) < 0 ? errno
                                                                    : 0;
}

static int
try_sched_setattr(void)
{
    /* Thread ids are below 2**22: there is no such thread. */
    struct sys_sched_attr attr;
    memset(&attr, 0, sizeof(attr));
    attr.size = sizeof(attr);
    return sys_sched_setattr(0x7fffffff, &attr) < 0 && errno != ESRCH ? errno
                                                                      : 0;
}

const char *const probe_names[PROBE_CALLS] = {
    "process_mrelease", "pidfd_open",       "pidfd_send_signal",
    "get_robust_list",  "process_vm_readv", "sched_setattr",
};

static int (*const tries[PROBE_CALLS])(void) = {
    try_process_mrelease, try_pidfd_open,       try_pidfd_send_signal,
    try_get_robust_list,  try_process_vm_readv, try_sched_setattr,
};

/* In the child: make the calls from `first` on, and write what each gave. */
static void
child(int first, int out)
{
    static const struct rlimit none = {0, 0};

    setrlimit(RLIMIT_CORE, &none);      /* SIGSYS would write a core */
    for (int i = first; i < PROBE_CALLS; i++) {
        int result = tries[i]();
        if (write(out, &result, sizeof(result)) != sizeof(result)) {
            break;
        }
    }
    _exit(0);
}

/* A fork() without the exit signal, and without handlers run in the child. */
static pid_t
fork_quietly(void)
{
    sigset_t all;
    sigset_t before;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = (pid_t)syscall(SYS_clone, 0UL, 0UL, 0UL, 0UL, 0UL);
    if (pid != 0) {
        sigprocmask(SIG_SETMASK, &before, NULL);
    }
    return pid;
}

/* Fill results from `first` on; returns how many are filled. */
static int
probe_in_child(int first, int results[PROBE_CALLS])
{
    int ends[2];
    int filled = first;

    if (pipe2(ends, O_CLOEXEC) < 0) {
        return first;
    }
    pid_t pid = fork_quietly();
    if (pid == 0) {
        child(first, ends[1]);
    }
    close(ends[1]);
    if (pid > 0) {
        siginfo_t info;
        ssize_t n;
        while (filled < PROBE_CALLS) {
            n = read(ends[0], &results[filled], sizeof(int));
            if (n == (ssize_t)sizeof(int)) {
                filled++;
            }
            else if (n >= 0 || errno != EINTR) {
                break;
            }
        }
        while (waitid(P_PID, (id_t)pid, &info, WEXITED | __WALL) < 0 &&
               errno == EINTR)
        {
        }
        if (filled < PROBE_CALLS) {
            results[filled++] = PROBE_KILLED;
        }
    }
    close(ends[0]);
    return filled;
}

void
probe_calls(bool in_child, int results[PROBE_CALLS])
{
    int filled = 0;

    while (filled < PROBE_CALLS) {
        int before = filled;
        if (in_child) {
            filled = probe_in_child(filled, results);
        }
        else {
            results[filled] = tries[filled]();
            filled++;
        }
        if (filled == before) {
            results[filled++] = PROBE_UNKNOWN;
        }
    }
}
