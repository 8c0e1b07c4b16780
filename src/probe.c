#include "probe.h"

#include <errno.h>
#include <fcntl.h>              /* O_CLOEXEC */
#include <sched.h>              /* sched_setaffinity() */
#include <string.h>             /* memset() */
#include <sys/resource.h>       /* RLIMIT_CORE */
#include <sys/uio.h>            /* process_vm_readv() */
#include <unistd.h>             /* pipe2(), _exit() */

#include "child.h"
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

/* Thread ids are below 2**22. */
#define NO_THREAD 0x7fffffff

static int
unless_no_thread(int rc)
{
    return rc < 0 && errno != ESRCH ? errno : 0;
}

static int
try_sched_getattr(void)
{
    struct sys_sched_attr attr;
    return unless_no_thread(sys_sched_getattr(NO_THREAD, &attr));
}

static int
try_sched_setattr(void)
{
    struct sys_sched_attr attr;
    memset(&attr, 0, sizeof(attr));
    attr.size = sizeof(attr);
    return unless_no_thread(sys_sched_setattr(NO_THREAD, &attr));
}

static int
try_sched_setaffinity(void)
{
    cpu_set_t all;
    memset(&all, 0xff, sizeof(all));
    return unless_no_thread(sched_setaffinity(NO_THREAD, sizeof(all), &all));
}

const char *const probe_names[PROBE_CALLS] = {
    "process_mrelease", "pidfd_open",        "pidfd_send_signal",
    "get_robust_list",  "process_vm_readv",  "sched_getattr",
    "sched_setattr",    "sched_setaffinity",
};

static int (*const tries[PROBE_CALLS])(void) = {
    try_process_mrelease, try_pidfd_open,        try_pidfd_send_signal,
    try_get_robust_list,  try_process_vm_readv,  try_sched_getattr,
    try_sched_setattr,    try_sched_setaffinity,
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

/* Fill results from `first` on; returns how many are filled. */
static int
probe_in_child(int first, int results[PROBE_CALLS])
{
    int ends[2];
    int filled = first;

    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
        return first;
    }
    pid_t pid = child_fork();
    if (pid == 0) {
        child(first, ends[1]);
    }
    close(ends[1]);
    if (pid > 0) {
        /* It writes less than a pipe holds, so it ends without a reader.  No
         * reading to the end: a fork() elsewhere may keep the pipe open.
         */
        int rc = child_wait(pid);
        while (rc == 0 && filled < PROBE_CALLS &&
               read(ends[0], &results[filled], sizeof(int)) ==
                   (ssize_t)sizeof(int))
        {
            filled++;
        }
        if (rc == 0 && filled < PROBE_CALLS) {
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
