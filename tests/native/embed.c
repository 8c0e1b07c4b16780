/* A program with Python inside, which it ends and begins again.

       embed ROUNDS

   In each round Python is initialized, runs what is below, and is finalized
   while a Reaper lives, with a kill under way that waits for the end of its
   grace.  Afterwards that victim must be dead, and no thread and no file
   descriptor may be left.  Prints a line for each round, "ok" at the end;
   exits with 1 if anything was wrong. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>          /* PR_SET_PDEATHSIG */
#include <sys/wait.h>
#include <time.h>               /* nanosleep() */
#include <unistd.h>

/* In milliseconds: for threads that end by themselves. */
#define PATIENCE 10000

static const char script[] =
    "import mrelease\n"
    "reaper = mrelease.Reaper(2, spares=1)\n"
    "released = reaper.kill(%d).result()\n"
    "assert released.outcome.value in ('released', 'exited'), released\n"
    "assert mrelease.kill(%d).signalled is not None\n"
    "pinned = mrelease.Victim(%d)\n"
    "pending = reaper.kill(pinned, grace=3600)\n"
    "circle = [reaper, pending]\n"
    "circle.append(circle)\n"
    "assert not pending.done()\n";

static int
count_entries(const char *path)
{
    int count = 0;
    DIR *folder = opendir(path);
    if (folder == NULL) {
        perror(path);
        exit(2);
    }
    while (readdir(folder) != NULL) {
        count++;
    }
    closedir(folder);
    return count;
}

/* It does not end with SIGTERM, and not later than this program. */
static pid_t
start_victim(void)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid < 0) {
        perror("fork");
        exit(2);
    }
    if (pid == 0) {
        signal(SIGTERM, SIG_IGN);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (getppid() == parent) {
            pause();
        }
        _exit(1);
    }
    return pid;
}

/* Whether it ended by SIGKILL, or else a sentence about it. */
static int
check_victim(pid_t pid, const char *name)
{
    int status;
    for (int i = 0; i < PATIENCE; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid) {
            if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
                return 0;
            }
            fprintf(stderr, "%s: status %#x\n", name, (unsigned)status);
            return 1;
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    fprintf(stderr, "%s lives\n", name);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return 1;
}

static int
run_round(int number)
{
    pid_t victims[3];
    char text[sizeof(script) + 64];
    int failed = 0;

    for (int i = 0; i < 3; i++) {
        victims[i] = start_victim();
    }
    snprintf(text, sizeof(text), script, (int)victims[0], (int)victims[1],
             (int)victims[2]);
    Py_Initialize();
    failed += PyRun_SimpleString(text) != 0;
    int most = count_entries("/proc/self/task");
    if (Py_FinalizeEx() != 0) {
        fprintf(stderr, "Py_FinalizeEx() failed\n");
        failed++;
    }
    failed += check_victim(victims[0], "the one that was released");
    failed += check_victim(victims[1], "the one that was killed");
    failed += check_victim(victims[2], "the one in its grace");
    printf("round %d: %d threads\n", number, most - 2);
    return failed;
}

int
main(int argc, char **argv)
{
    int rounds = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 3;
    int failed = 0;
    int fds = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i <= rounds; i++) {
        int threads;
        failed += run_round(i);
        /* What the first round opened for good is Python's. */
        if (i == 1) {
            fds = count_entries("/proc/self/fd");
        }
        for (int ms = 0; ms < PATIENCE; ms++) {
            if (count_entries("/proc/self/task") == 3 &&
                count_entries("/proc/self/fd") <= fds)
            {
                break;
            }
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
        threads = count_entries("/proc/self/task") - 2;
        if (threads != 1) {
            fprintf(stderr, "%d threads are left\n", threads - 1);
            failed++;
        }
        int now = count_entries("/proc/self/fd");
        if (now > fds) {
            fprintf(stderr, "%d descriptors are left\n", now - fds);
            failed++;
        }
    }
    if (failed == 0) {
        printf("ok\n");
    }
    return failed == 0 ? 0 : 1;
}
