#include "child.h"

#include <errno.h>
#include <signal.h>             /* pthread_sigmask(), kill() */
#include <stddef.h>             /* NULL */
#include <sys/prctl.h>          /* PR_SET_PDEATHSIG */
#include <sys/resource.h>       /* RLIMIT_CORE */
#include <sys/syscall.h>        /* SYS_clone */
#include <sys/wait.h>           /* waitid() */
#include <unistd.h>             /* syscall(), pause(), _exit() */

pid_t
child_fork(void)
{
    sigset_t all;
    sigset_t before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = (pid_t)syscall(SYS_clone, 0UL, 0UL, 0UL, 0UL, 0UL);
    if (pid != 0) {
        int err = errno;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        errno = err;
    }
    return pid;
}

int
child_wait(pid_t pid)
{
    siginfo_t info;
    int rc;

    do {
        rc = waitid(P_PID, (id_t)pid, &info, WEXITED | __WALL);
    } while (rc < 0 && errno == EINTR);
    return rc;
}

pid_t
child_start_idle(void)
{
    static const struct rlimit none = {0, 0};
    pid_t parent = getpid();
    pid_t pid = child_fork();

    if (pid != 0) {
        return pid;
    }
    setrlimit(RLIMIT_CORE, &none);      /* SIGSYS would write a core */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent) {
        for (;;) {
            pause();
        }
    }
    _exit(0);
}

void
child_end(pid_t pid)
{
    siginfo_t info = {.si_pid = 0};
    if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) <
        0)
    {
        return;                 /* not a child any more: a stranger's pid */
    }
    if (info.si_pid == 0) {
        kill(pid, SIGKILL);
    }
    child_wait(pid);
}
