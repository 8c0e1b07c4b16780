/* Makes many cheap victims: children that touch their memory and sleep.
 *
 *     zygote MIB
 *
 * Commands, a line each on stdin, and the answers:
 *
 *     make N   N pids, when all have touched their memory
 *     cpu      the CPU time of those that were made, in nanoseconds
 *     reap     kills those that are left, waits for all: how many, and the CPU
 *              time of their whole lives
 *
 * All ends with its stdin, at once if its parent is killed, and the children
 * also if it is killed itself.
 */

#include <inttypes.h>           /* PRId64 */
#include <signal.h>             /* kill() */
#include <stdio.h>
#include <stdlib.h>             /* calloc() */
#include <string.h>             /* strcmp() */
#include <sys/mman.h>
#include <sys/prctl.h>          /* PR_SET_PDEATHSIG */
#include <sys/resource.h>       /* struct rusage */
#include <sys/wait.h>           /* wait4() */
#include <time.h>               /* clock_getcpuclockid() */
#include <unistd.h>

static pid_t *made;
static size_t count;

static _Noreturn void
be_victim(pid_t parent, size_t size, const int pipe_of_ready[2])
{
    prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0, 0, 0);
    if (getppid() != parent) {
        _exit(1);
    }
    close(STDIN_FILENO);
    close(STDOUT_FILENO);
    close(pipe_of_ready[0]);
    if (size > 0) {
        volatile char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            _exit(1);
        }
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        for (size_t at = 0; at < size; at += page) {
            memory[at] = 1;
        }
    }
    if (write(pipe_of_ready[1], "", 1) != 1) {
        _exit(1);
    }
    close(pipe_of_ready[1]);
    for (;;) {
        pause();
    }
}

static int64_t
ns_of(struct timeval time)
{
    return (int64_t)time.tv_sec * 1000000000 + (int64_t)time.tv_usec * 1000;
}

static void
reap(void)
{
    int64_t cpu = 0;
    for (size_t i = 0; i < count; i++) {
        kill(made[i], SIGKILL); /* not waited for: the pid is still its own */
    }
    for (size_t i = 0; i < count; i++) {
        struct rusage used;
        if (wait4(made[i], NULL, 0, &used) == made[i]) {
            cpu += ns_of(used.ru_utime) + ns_of(used.ru_stime);
        }
    }
    printf("%zu %" PRId64 "\n", count, cpu);
    free(made);
    made = NULL;
    count = 0;
}

static void
make(size_t wanted, size_t size)
{
    int ready[2];
    made = calloc(wanted, sizeof(*made));
    if (made == NULL || pipe(ready) < 0) {
        perror("zygote");
        exit(1);
    }
    pid_t parent = getpid();
    while (count < wanted) {
        pid_t pid = fork();
        if (pid == 0) {
            be_victim(parent, size, ready);
        }
        if (pid < 0) {
            perror("zygote: fork");
            exit(1); /* the others end with it */
        }
        made[count++] = pid;
    }
    close(ready[1]);
    char byte;
    for (size_t i = 0; i < wanted; i++) {
        if (read(ready[0], &byte, 1) != 1) {
            fputs("zygote: a victim ended early\n", stderr);
            exit(1);
        }
    }
    close(ready[0]);
    for (size_t i = 0; i < wanted; i++) {
        printf(i + 1 < wanted ? "%d " : "%d\n", (int)made[i]);
    }
}

static void
tell_cpu(void)
{
    int64_t cpu = 0;
    for (size_t i = 0; i < count; i++) {
        clockid_t id;
        struct timespec used;
        if (clock_getcpuclockid(made[i], &id) == 0 &&
            clock_gettime(id, &used) == 0)
        {
            cpu += (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
        }
    }
    printf("%" PRId64 "\n", cpu);
}

int
main(int argc, char **argv)
{
    size_t size = argc == 2 ? strtoul(argv[1], NULL, 10) << 20 : 0;
    /* Also in the middle of a command, which may take seconds. */
    prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0, 0, 0);
    char line[64];
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (strncmp(line, "make ", 5) == 0 && count == 0) {
            make(strtoul(line + 5, NULL, 10), size);
        }
        else if (strcmp(line, "cpu\n") == 0) {
            tell_cpu();
        }
        else if (strcmp(line, "reap\n") == 0) {
            reap();
        }
        else {
            fputs("zygote: what?\n", stderr);
            return 2;
        }
        fflush(stdout);
    }
    reap();
    return 0;
}
