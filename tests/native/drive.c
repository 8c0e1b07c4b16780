/* Drives the native threads of pool.c, and with them reap.c and locks.c, from
   C: no Python, real victims, many threads at once.

       drive [--long] [--seed N] VICTIM [SCENARIO...]

   VICTIM is the program built from victim.c.  Each scenario runs in a process
   of its own, which checks every result against the victim, and at its end
   that no file descriptor and no thread is left.  Exits with 1 if anything
   was wrong.

   It is built with sanitizers too (`make native`).  A victim is a program of
   its own so that it does not have their memory, and it is started with
   posix_spawn(), which does not run this program's code in the child. */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <limits.h>             /* PATH_MAX */
#include <linux/filter.h>       /* struct sock_filter */
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pool.h"
#include "procfs.h"

#ifndef P_PIDFD
#  define P_PIDFD 3
#endif
#ifndef SYS_process_mrelease
#  define SYS_process_mrelease 448
#endif

#define MS INT64_C(1000000)
#define SECOND (1000 * MS)
#define MIB (INT64_C(1) << 20)
#define LONG_GRACE (3600 * SECOND)

/* For what takes no time on an idle machine. */
#define PATIENCE (60 * SECOND)

/* Of the release: long, so that a busy machine gives no other result. */
#define LONG_TIMEOUT (30 * SECOND)

static const char *program;     /* the victim */
static char folder[] = "/tmp/mrelease-drive-XXXXXX";
static int scale = 1;           /* rounds are multiplied by it */
static uint64_t seed;
static atomic_int failures;
static atomic_int kills;
static atomic_int locks_made;

/* ------------------------------------------------------------- checking */

static bool __attribute__((format(printf, 2, 3)))
expect(bool good, const char *format, ...)
{
    if (!good) {
        char text[512];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        fprintf(stderr, "    FAILED: %s\n", text);
        atomic_fetch_add(&failures, 1);
    }
    return good;
}

/* For what has nothing to do with what is tested. */
static _Noreturn void
die(const char *what)
{
    fprintf(stderr, "drive: %s: %s\n", what, strerror(errno));
    _exit(2);
}

static uint64_t
any(uint64_t *state, uint64_t below)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state % below;
}

static void
nap(int64_t ns)
{
    struct timespec time = {
        .tv_sec = (time_t)(ns / SECOND),
        .tv_nsec = (long)(ns % SECOND),
    };
    nanosleep(&time, NULL);
}

static bool
poll_in(int fd, int64_t ns)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    int64_t until = reap_now() + ns;
    int n;
    do {
        int64_t left = (until - reap_now()) / MS;
        n = poll(&p, 1, left > 0 ? (int)left : 0);
    } while (n < 0 && errno == EINTR);
    return n == 1 && (p.revents & POLLIN) != 0;
}

static int
count_threads(void)
{
    struct procfs_tasks tasks;
    int count = 0;

    if (procfs_tasks_open(&tasks, getpid()) != 0) {
        die("/proc/self/task");
    }
    while (procfs_tasks_next(&tasks) > 0) {
        count++;
    }
    procfs_tasks_close(&tasks);
    return count;
}

static int
count_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

/* -------------------------------------------------------------- victims */

enum kind {
    ASLEEP,
    BIG,
    SPINNING,
    THREADS,
    STOPPED,
    HELD,                       /* by a tracer, where it ends */
    SHARED,                     /* its memory, by a process that lives on */
    LOCK, /* it holds a robust lock, one waits for it */
    LOCK_IN_THREAD,
    ZOMBIE,
    REAPED,
    POLITE, /* ends with SIGTERM */
    RUDE, /* does not; the grace is short */
    ESCALATED, /* does not; an eventfd ends the grace */
    KINDS
};

static const char *const kind_names[] = {
    "asleep", "big",    "spinning", "threads",        "stopped",
    "held",   "shared", "lock",     "lock in thread", "zombie",
    "reaped", "polite", "rude",     "escalated",
};

struct process {
    pid_t pid;
    int pidfd;
    int in; /* it lives as long as this is open */
    int out;
    char line[512];
};

struct victim {
    enum kind kind;
    struct process process;
    struct process other; /* the tracer, or who waits for the lock */
    pid_t sharer;
    int escalate;
    bool cut; /* its grace may have been cut short */
    char path[64];
    struct job *job;
};

static void
read_line(struct process *process, int64_t patience)
{
    size_t used = 0;
    while (used + 1 < sizeof(process->line) &&
           poll_in(process->out, patience) &&
           read(process->out, process->line + used, 1) == 1 &&
           process->line[used] != '\n')
    {
        used++;
    }
    process->line[used] = '\0';
}

static void
start_process(struct process *process, const char *const *options)
{
    char *argv[16] = {(char *)(uintptr_t)program};
    posix_spawn_file_actions_t actions;
    int in[2];
    int out[2];

    for (int i = 0; options[i] != NULL; i++) {
        argv[i + 1] = (char *)(uintptr_t)options[i];
    }
    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0) {
        die("pipe2");
    }
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    errno = posix_spawn(&process->pid, program, &actions, NULL, argv, environ);
    if (errno != 0) {
        die(program);
    }
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    process->in = in[1];
    process->out = out[0];
    process->pidfd = (int)syscall(SYS_pidfd_open, process->pid, 0);
    if (process->pidfd < 0) {
        die("pidfd_open");
    }
    read_line(process, PATIENCE);
    if (strncmp(process->line, "ready", 5) != 0) {
        errno = EPROTO;
        die(process->line);
    }
}

#define START(process, ...)                                                   \
    start_process(process, (const char *const[]){__VA_ARGS__, NULL})

static void
send_signal(const struct process *process, int sig)
{
    if (syscall(SYS_pidfd_send_signal, process->pidfd, sig, NULL, 0) < 0 &&
        errno != ESRCH)
    {
        die("pidfd_send_signal");
    }
}

/* Until it has ended, or stopped. */
static void
await_child(const struct process *process, int options)
{
    siginfo_t info;
    int rc;
    do {
        rc = waitid((idtype_t)P_PIDFD, (id_t)process->pidfd, &info, options);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0 && errno != ECHILD) {
        die("waitid");
    }
}

static void
end_process(struct process *process)
{
    if (process->pid != 0) {
        close(process->in);
        send_signal(process, SIGKILL);
        await_child(process, WEXITED);
        close(process->out);
        close(process->pidfd);
        process->pid = 0;
    }
}

static void
make_victim(struct victim *victim, enum kind kind)
{
    struct process *process = &victim->process;
    char number[16];

    memset(victim, 0, sizeof(*victim));
    victim->kind = kind;
    victim->escalate = -1;
    snprintf(victim->path, sizeof(victim->path), "%s/%d", folder,
             atomic_fetch_add(&locks_made, 1));
    switch (kind) {
    case BIG:
        START(process, "--anon", "64");
        break;
    case SPINNING:
        START(process, "--anon", "4", "--threads", "2", "--spin");
        break;
    case THREADS:
        START(process, "--anon", "2", "--threads", "40");
        break;
    case STOPPED:
        START(process, "--anon", "4");
        send_signal(process, SIGSTOP);
        await_child(process, WSTOPPED | WNOWAIT);
        break;
    case HELD:
        START(process, "--anon", "16");
        snprintf(number, sizeof(number), "%d", (int)process->pid);
        START(&victim->other, "--trace", number);
        break;
    case SHARED: {
        START(process, "--anon", "4", "--sharer");
        const char *sharer = strstr(process->line, " sharer=");
        if (sharer == NULL) {
            errno = EPROTO;
            die("sharer");
        }
        victim->sharer = (pid_t)strtol(sharer + 8, NULL, 10);
        break;
    }
    case LOCK:
        START(process, "--robust", victim->path);
        START(&victim->other, "--robust-wait", victim->path);
        break;
    case LOCK_IN_THREAD:
        START(process, "--robust", victim->path, "--robust-in-thread",
              "--threads", "200");
        START(&victim->other, "--robust-wait", victim->path);
        break;
    case ZOMBIE:
    case REAPED:
        START(process, "--anon", "1");
        send_signal(process, SIGKILL);
        await_child(process, WEXITED | (kind == ZOMBIE ? WNOWAIT : 0));
        break;
    case POLITE:
        START(process, "--anon", "4", "--sigterm", "exit");
        break;
    case RUDE:
        START(process, "--anon", "4", "--sigterm", "ignore");
        break;
    case ESCALATED:
        START(process, "--anon", "4", "--sigterm", "ignore");
        victim->escalate = eventfd(0, EFD_CLOEXEC);
        if (victim->escalate < 0) {
            die("eventfd");
        }
        break;
    default:
        START(process, "--anon", "8");
        break;
    }
}

static void
end_victim(struct victim *victim)
{
    if (victim->sharer != 0) {
        kill(victim->sharer, SIGKILL);
        waitpid(victim->sharer, NULL, 0);
    }
    end_process(&victim->other);
    end_process(&victim->process);
    if (victim->escalate >= 0) {
        close(victim->escalate);
    }
    unlink(victim->path);
}

/* ----------------------------------------------------------------- jobs */

static struct reap
ask(const struct victim *victim)
{
    struct reap asked = {
        .pidfd = victim->process.pidfd,
        .pid = victim->process.pid,
        .send = true,
        .protect = true,
        .begun = reap_now(),
        .timeout = victim->kind == SHARED ? 100 * MS : LONG_TIMEOUT,
        .escalate_fd = victim->escalate,
        .memory = -1,
    };
    switch (victim->kind) {
    case POLITE:
    case ESCALATED:
        asked.grace = LONG_GRACE;
        break;
    case RUDE:
        asked.grace = 20 * MS;
        break;
    default:
        break;
    }
    return asked;
}

static void
make_job_of(struct victim *victim, const struct reap *asked)
{
    errno = job_make(asked, &victim->job);
    if (errno != 0) {
        die("job_make");
    }
}

static void
make_job(struct victim *victim)
{
    struct reap asked = ask(victim);
    make_job_of(victim, &asked);
}

static int
submit(struct pool *pool, struct victim *victims, int count)
{
    struct job *jobs[64];
    for (int i = 0; i < count; i++) {
        jobs[i] = victims[i].job;
    }
    atomic_fetch_add(&kills, count);
    return pool_submit(pool, jobs, count);
}

static void
escalate(const struct victim *victim)
{
    if (victim->escalate >= 0 && eventfd_write(victim->escalate, 1) < 0) {
        die("eventfd_write");
    }
}

static int64_t
memory_of(pid_t pid)
{
    struct procfs_status status;
    return procfs_read_status(pid, &status) == 0 ? status.anon + status.swap
                                                 : 0;
}

#define ONE(outcome) (1u << (outcome))

/* Which outcomes there may be; the timeouts are long. */
static unsigned
outcomes_of(enum kind kind)
{
    switch (kind) {
    case HELD:
        return ONE(REAP_RELEASED);
    case SHARED:
        return ONE(REAP_SHARED);
    case LOCK:
    case LOCK_IN_THREAD:
        /* Or the lock had been handed on when the worker looked. */
        return ONE(REAP_LOCKED) | ONE(REAP_EXITED) | ONE(REAP_RELEASED);
    case ZOMBIE:
    case POLITE:
        return ONE(REAP_EXITED);
    default:
        return ONE(REAP_RELEASED) | ONE(REAP_EXITED);
    }
}

/* The job is done, within a time; what it says is true. */
static void
check_job(struct victim *victim)
{
    struct job *job = victim->job;
    const char *name = kind_names[victim->kind];
    const struct process *process = &victim->process;

    if (!expect(poll_in(job_fd(job), PATIENCE), "%s: is not done", name)) {
        return;
    }
    if (!expect(job_is_done(job), "%s: its fd is ready before it", name)) {
        return;
    }
    const struct reap *result = job_result(job);
    if (victim->kind == REAPED) {
        expect(job_refused(job) == ESRCH, "%s: refused %d", name,
               job_refused(job));
        return;
    }
    expect(job_refused(job) == 0, "%s: refused %d", name, job_refused(job));
    expect(
        victim->cut || (ONE(result->outcome) & outcomes_of(victim->kind)) != 0,
        "%s: outcome %d, errno %d", name, (int)result->outcome, result->err);
    bool has_grace = victim->kind == POLITE || victim->kind == RUDE ||
                     victim->kind == ESCALATED;
    expect((result->terminated != 0) == has_grace, "%s: SIGTERM", name);
    expect(victim->cut ||
               (result->signalled != 0) ==
                   (victim->kind != ZOMBIE && victim->kind != POLITE),
           "%s: SIGKILL", name);
    if (victim->kind == RUDE && !victim->cut) {
        expect(result->signalled >= result->terminated + 20 * MS,
               "%s: killed before its grace was over", name);
    }
    if (result->released != 0) {
        expect(job_entered(job) != 0 && job_entered(job) <= result->released,
               "%s: the release began at %lld, ended at %lld", name,
               (long long)job_entered(job), (long long)result->released);
        /* One that is on its way out by SIGTERM may be released before. */
        expect(victim->kind == POLITE || result->released >= result->signalled,
               "%s: released before SIGKILL", name);
    }
    expect((result->released != 0) == (result->outcome == REAP_RELEASED),
           "%s: when was it released?", name);
    if (result->exited != 0) {
        expect(poll_in(process->pidfd, 0), "%s: has not ended", name);
    }
    if (result->freed) {
        expect(memory_of(process->pid) < MIB, "%s: %lld bytes not freed", name,
               (long long)memory_of(process->pid));
    }
    if (victim->kind == HELD) {
        expect(result->exited == 0, "%s: ended", name);
        expect(result->freed, "%s: not freed", name);
    }
    else if (victim->kind == SHARED) {
        expect(!result->freed, "%s: freed", name);
        expect(memory_of(victim->sharer) >= 4 * MIB, "%s: memory lost", name);
    }
    else {
        expect(poll_in(process->pidfd, PATIENCE), "%s: lives", name);
    }
    if (victim->kind == LOCK || victim->kind == LOCK_IN_THREAD) {
        read_line(&victim->other, PATIENCE);
        expect(strcmp(victim->other.line, "got=EOWNERDEAD") == 0, "%s: %s",
               name, victim->other.line);
        expect(result->outcome != REAP_LOCKED ||
                   (result->locks == LOCKS_HELD && result->attempts == 0),
               "%s: released all the same", name);
    }
}

/* Nobody holds the job any more: all that can be seen is the end. */
static void
check_end(struct victim *victim)
{
    const struct process *process = &victim->process;
    int64_t until = reap_now() + PATIENCE;

    if (victim->kind == HELD) {
        while (memory_of(process->pid) >= MIB && reap_now() < until) {
            nap(MS);
        }
        expect(memory_of(process->pid) < MIB, "held: not released");
    }
    else if (victim->kind != REAPED) {
        expect(poll_in(process->pidfd, PATIENCE), "%s: lives",
               kind_names[victim->kind]);
    }
    if (victim->kind == LOCK || victim->kind == LOCK_IN_THREAD) {
        read_line(&victim->other, PATIENCE);
        expect(strcmp(victim->other.line, "got=EOWNERDEAD") == 0,
               "lock: nobody holds the job: %s", victim->other.line);
    }
}

static void
drop_job(struct victim *victim)
{
    job_release(victim->job);
    victim->job = NULL;
}

/* Whatever is known of it. */
static void
check(struct victim *victim)
{
    if (victim->job != NULL) {
        check_job(victim);
        drop_job(victim);
    }
    else {
        check_end(victim);
    }
    end_victim(victim);
}

static struct pool *
make_pool_of(int threads, int spares, enum scheduling_rung best)
{
    struct pool_options options = {
        .threads = threads,
        .spares = spares,
        .best = best,
        .least = SCHEDULING_NONE,
    };
    struct pool_scheduling got;
    struct pool *pool;

    errno = pool_new(&options, &pool, &got);
    if (errno != 0) {
        die("pool_new");
    }
    return pool;
}

static struct pool *
make_pool(int threads, int spares)
{
    return make_pool_of(threads, spares, SCHEDULING_FIFO);
}

static void
close_pool(struct pool *pool)
{
    expect(pool_close(pool, reap_now() + PATIENCE, false), "does not close");
    expect(pool_state(pool) == POOL_CLOSED, "is not closed");
    pool_release(pool);
}

static void
run_kinds(struct pool *pool)
{
    for (int kind = 0; kind < KINDS; kind++) {
        struct victim victim;
        make_victim(&victim, (enum kind)kind);
        make_job(&victim);
        expect(submit(pool, &victim, 1) == POOL_OPEN, "not open");
        escalate(&victim);
        check(&victim);
    }
}

/* ------------------------------------------------------------ scenarios */

/* Every kind, one after the other. */
static void
scenario_kinds(void)
{
    struct pool *pool = make_pool(2, 8);
    for (int round = 0; round < 2 * scale; round++) {
        run_kinds(pool);
    }
    close_pool(pool);
}

struct submitter {
    pthread_t thread;
    struct pool *pool;
    uint64_t random;
    int rounds;
};

/* Any kinds, a few at a time, some of whose jobs are let go of at once. */
static void *
submit_any(void *arg)
{
    struct submitter *self = arg;
    struct victim victims[6];

    for (int round = 0; round < self->rounds; round++) {
        int count = 1 + (int)any(&self->random, 6);
        for (int i = 0; i < count; i++) {
            make_victim(&victims[i], (enum kind)any(&self->random, KINDS));
        }
        for (int i = 0; i < count; i++) {
            make_job(&victims[i]);
        }
        expect(submit(self->pool, victims, count) == POOL_OPEN, "not open");
        for (int i = 0; i < count; i++) {
            escalate(&victims[i]);
            if (any(&self->random, 4) == 0) {
                drop_job(&victims[i]);
            }
        }
        for (int i = 0; i < count; i++) {
            check(&victims[i]);
        }
    }
    return NULL;
}

static void
start_submitters(struct submitter *all, int count, struct pool *pool,
                 int rounds)
{
    for (int i = 0; i < count; i++) {
        all[i].pool = pool;
        all[i].random = seed + 7919 * (uint64_t)(i + 1);
        all[i].rounds = rounds * scale;
        errno = pthread_create(&all[i].thread, NULL, submit_any, &all[i]);
        if (errno != 0) {
            die("pthread_create");
        }
    }
}

static void
join_submitters(const struct submitter *all, int count)
{
    for (int i = 0; i < count; i++) {
        pthread_join(all[i].thread, NULL);
    }
}

static void
scenario_storm(void)
{
    struct submitter submitters[4];
    struct pool *pool = make_pool(2, 2);
    start_submitters(submitters, 4, pool, 10);
    join_submitters(submitters, 4);
    close_pool(pool);
}

/* More victims than threads, in one call. */
static void
scenario_many(void)
{
    static struct victim victims[48];
    struct pool *pool = make_pool(2, 0);

    for (int round = 0; round < scale; round++) {
        for (int i = 0; i < 48; i++) {
            make_victim(&victims[i], i % 8 == 0   ? BIG
                                     : i % 8 == 3 ? HELD
                                     : i % 8 == 5 ? LOCK
                                                  : ASLEEP);
            make_job(&victims[i]);
        }
        expect(submit(pool, victims, 48) == POOL_OPEN, "not open");
        for (int i = 0; i < 48; i++) {
            check(&victims[i]);
        }
    }
    close_pool(pool);
}

/* Pools that end at any moment of a kill; also those without one. */
static void
scenario_moments(void)
{
    uint64_t random = seed;

    for (int round = 0; round < 60 * scale; round++) {
        struct victim victims[3];
        int count = (int)any(&random, 4);
        struct pool *pool =
            make_pool(1 + (int)any(&random, 3), (int)any(&random, 3));
        for (int i = 0; i < count; i++) {
            make_victim(&victims[i], (enum kind)any(&random, KINDS));
            make_job(&victims[i]);
        }
        expect(submit(pool, victims, count) == POOL_OPEN, "not open");
        for (int i = 0; i < count; i++) {
            escalate(&victims[i]);
        }
        uint64_t how = any(&random, 4);
        if (any(&random, 2) == 0) {
            nap((int64_t)any(&random, 2000) * 1000);
        }
        if (how == 0) {
            pool_close(pool, reap_now(), false);
        }
        else if (how == 1) {
            for (int i = 0; i < count; i++) {
                victims[i].cut = true;
            }
            pool_close(pool, reap_now() + (int64_t)any(&random, 2000) * 1000,
                       true);
        }
        else if (how == 2) {
            expect(pool_close(pool, INT64_MAX, false), "gave up");
        }
        pool_release(pool);
        for (int i = 0; i < count; i++) {
            check(&victims[i]);
        }
    }
}

static void *
hurry(void *pool)
{
    pool_hurry(pool);
    return NULL;
}

/* The look at the locks comes after the kill, while threads end. */
static void
scenario_late_looks(void)
{
    static struct victim victims[8];
    struct pool *pool = make_pool(1, 0);

    for (int round = 0; round < 8 * scale; round++) {
        for (int i = 0; i < 8; i++) {
            make_victim(&victims[i], i % 4 == 0 ? BIG : LOCK_IN_THREAD);
            make_job(&victims[i]);
        }
        expect(submit(pool, victims, 8) == POOL_OPEN, "not open");
        for (int i = 0; i < 8; i++) {
            check(&victims[i]);
        }
    }
    close_pool(pool);
}

/* Long graces, cut short: by pool_hurry(), by pool_close(). */
static void
scenario_graces(void)
{
    struct victim victims[8];
    struct job *jobs[1];
    pthread_t thread;

    for (int round = 0; round < 4 * scale; round++) {
        struct pool *pool = make_pool(2, 2);
        for (int i = 0; i < 8; i++) {
            make_victim(&victims[i], ESCALATED);
            make_job(&victims[i]);
        }
        expect(submit(pool, victims, 4) == POOL_OPEN, "not open");
        if (pthread_create(&thread, NULL, hurry, pool) != 0) {
            die("pthread_create");
        }
        pool_hurry(pool);
        pthread_join(thread, NULL);
        for (int i = 0; i < 4; i++) {
            check(&victims[i]);
        }
        expect(submit(pool, victims + 4, 4) == POOL_OPEN, "not open");
        int64_t before = reap_now();
        expect(!pool_close(pool, before + 30 * MS, false), "a grace is over");
        expect(reap_now() >= before + 30 * MS, "did not wait");
        for (int i = 4; i < 8; i++) {
            expect(!job_is_done(victims[i].job), "a grace is over");
        }
        struct victim late;
        make_victim(&late, ASLEEP);
        make_job(&late);
        jobs[0] = late.job;
        expect(pool_submit(pool, jobs, 1) == POOL_CLOSED, "not closed");
        expect(!poll_in(late.process.pidfd, 0), "killed by a closed pool");
        drop_job(&late);
        end_victim(&late);
        expect(!pool_close(pool, reap_now(), true), "in no time");
        for (int i = 4; i < 8; i++) {
            check(&victims[i]);
        }
        close_pool(pool);
    }
}

static void *
just_close(void *pool)
{
    expect(pool_close(pool, INT64_MAX, false), "gave up");
    return NULL;
}

/* Several threads close it at the same time. */
static void
scenario_closers(void)
{
    for (int round = 0; round < 30 * scale; round++) {
        struct pool *pool = make_pool(2, 2);
        struct victim victim;
        pthread_t threads[3];

        make_victim(&victim, ASLEEP);
        make_job(&victim);
        expect(submit(pool, &victim, 1) == POOL_OPEN, "not open");
        for (int i = 0; i < 3; i++) {
            if (pthread_create(&threads[i], NULL, just_close, pool) != 0) {
                die("pthread_create");
            }
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(threads[i], NULL);
        }
        pool_release(pool);
        check(&victim);
    }
}

/* Children of fork() at any moment; all that they do is to ask. */
static void
scenario_fork(void)
{
    struct submitter submitters[2];
    struct pool *pool = make_pool(2, 2);

    start_submitters(submitters, 2, pool, 6);
    for (int i = 0; i < 40 * scale; i++) {
        pid_t child = fork();
        if (child < 0) {
            die("fork");
        }
        if (child == 0) {
            _exit(pool_state(pool) == POOL_FORKED ? 0 : 1);
        }
        int status;
        waitpid(child, &status, 0);
        expect(status == 0, "the child of fork(): status %#x", status);
        nap(2 * MS);
    }
    join_submitters(submitters, 2);
    close_pool(pool);
}

/* Few file descriptors: what is submitted goes well without another. */
static void
scenario_descriptors(void)
{
    static const enum kind kinds[] = {ASLEEP, THREADS, LOCK_IN_THREAD,
                                      LOCK,   HELD,    SPINNING};
    struct pool *pool = make_pool(2, 2);
    struct victim victims[6];
    struct rlimit before;

    getrlimit(RLIMIT_NOFILE, &before);
    for (int spare = 0; spare < 8; spare++) {
        int made = 0;
        for (int i = 0; i < 6; i++) {
            make_victim(&victims[i], kinds[i]);
        }
        int next = dup(0);
        close(next);
        struct rlimit few = {(rlim_t)(next + spare), before.rlim_max};
        setrlimit(RLIMIT_NOFILE, &few);
        for (; made < 6; made++) {
            struct reap asked = ask(&victims[made]);
            int err = job_make(&asked, &victims[made].job);
            if (err != 0) {
                expect(err == EMFILE, "job_make: errno %d", err);
                break;
            }
        }
        expect(made == (spare < 12 ? spare / 2 : 6),
               "%d jobs with %d descriptors", made, spare);
        expect(submit(pool, victims, made) == POOL_OPEN, "not open");
        for (int i = 0; i < made; i++) {
            struct victim *victim = &victims[i];
            expect(poll_in(job_fd(victim->job), PATIENCE), "not done");
            drop_job(victim);
            check_end(victim);
        }
        setrlimit(RLIMIT_NOFILE, &before);
        for (int i = 0; i < 6; i++) {
            end_victim(&victims[i]);
        }
    }
    close_pool(pool);
}

/* Each of the three descriptors of a job may be one too many. */
static void
scenario_job_descriptors(void)
{
    struct pool *pool = make_pool(1, 0);
    struct victim victim;
    struct rlimit before;

    make_victim(&victim, ESCALATED);
    struct reap asked = ask(&victim);
    getrlimit(RLIMIT_NOFILE, &before);
    int next = dup(0);
    close(next);
    for (int spare = 0; spare < 4; spare++) {
        struct rlimit few = {(rlim_t)(next + spare), before.rlim_max};
        int fds = count_fds();
        setrlimit(RLIMIT_NOFILE, &few);
        int err = job_make(&asked, &victim.job);
        setrlimit(RLIMIT_NOFILE, &before);
        expect(err == (spare < 3 ? EMFILE : 0), "with %d: errno %d", spare,
               err);
        expect(count_fds() == fds + (spare < 3 ? 0 : 3), "with %d: fds left",
               spare);
    }
    submit(pool, &victim, 1);
    escalate(&victim);
    check(&victim);
    close_pool(pool);
}

/* A sanitizer cannot do without memory, nor with less of it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define HAS_SANITIZER 1
#else
#  define HAS_SANITIZER 0
#endif

struct chunk {
    struct chunk *next;
};

/* No memory at all: not for a pool, not for a job.  What there is goes on. */
static void
scenario_no_memory(void)
{
    struct pool *pool = make_pool(1, 0);
    struct chunk *all = NULL;
    struct pool_options options = {.threads = 1, .least = SCHEDULING_NONE};
    struct pool_scheduling got;
    struct pool *none;
    struct job *no_job;
    struct victim victim;
    struct rlimit before;

    make_victim(&victim, ASLEEP);
    make_job(&victim);
    struct reap asked = ask(&victim);
    getrlimit(RLIMIT_AS, &before);
    if (!HAS_SANITIZER) {
        struct rlimit few = {1, before.rlim_max};
        setrlimit(RLIMIT_AS, &few);
        for (size_t size = 1 << 20; size >= sizeof(struct chunk); size /= 2) {
            struct chunk *chunk;
            while ((chunk = malloc(size)) != NULL) {
                chunk->next = all;
                all = chunk;
            }
        }
        expect(job_make(&asked, &no_job) == ENOMEM, "a job of no memory");
        expect(pool_new(&options, &none, &got) == ENOMEM, "a pool of none");
    }
    expect(submit(pool, &victim, 1) == POOL_OPEN, "not open");
    expect(poll_in(job_fd(victim.job), PATIENCE), "not done");
    setrlimit(RLIMIT_AS, &before);
    while (all != NULL) {
        struct chunk *next = all->next;
        free(all);
        all = next;
    }
    check(&victim);
    close_pool(pool);
}

/* A pool that cannot be had leaves nothing behind. */
static void
scenario_no_pool(void)
{
    struct pool_options options = {
        .threads = 4,
        .spares = 4,
        .best = SCHEDULING_FIFO,
        .least = SCHEDULING_NONE,
    };
    struct pool_scheduling got;
    struct pool *pool;
    struct rlimit before;
    cpu_set_t cpus;

    CPU_ZERO(&cpus);
    CPU_SET(CPU_SETSIZE - 1, &cpus);
    options.cpus = &cpus;
    expect(pool_new(&options, &pool, &got) == EINVAL, "a CPU too many");
    options.cpus = NULL;
    getrlimit(RLIMIT_NOFILE, &before);
    int next = dup(0);
    close(next);
    for (int spare = 0; spare < 10; spare++) {
        struct rlimit few = {(rlim_t)(next + spare), before.rlim_max};
        setrlimit(RLIMIT_NOFILE, &few);
        expect(pool_new(&options, &pool, &got) == EMFILE,
               "with %d descriptors", spare);
    }
    setrlimit(RLIMIT_NOFILE, &before);
    for (int round = 0; round < 30 * scale; round++) {
        pool = make_pool(1 + round % 16, round % 9);
        if (round % 3 == 0) {
            pool_release(pool);
        }
        else {
            close_pool(pool);
        }
    }
}

/* All on one CPU, where who kills and who releases cannot run side by side. */
static void
scenario_one_cpu(void)
{
    struct submitter submitters[2];
    cpu_set_t cpus;
    cpu_set_t one;

    sched_getaffinity(0, sizeof(cpus), &cpus);
    CPU_ZERO(&one);
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &cpus)) {
            CPU_SET(cpu, &one);
            break;
        }
    }
    sched_setaffinity(0, sizeof(one), &one);
    struct pool *pool = make_pool(2, 2);
    run_kinds(pool);
    start_submitters(submitters, 2, pool, 4);
    join_submitters(submitters, 2);
    close_pool(pool);
}

/* What ends a grace may be closed once the job is submitted: its number then
   means another. */
static void
scenario_numbers(void)
{
    struct pool *pool = make_pool(2, 2);
    struct victim a;
    struct victim b;

    make_victim(&a, ESCALATED);
    make_victim(&b, ESCALATED);
    int to_a = dup(a.escalate);
    int to_b = dup(b.escalate);
    if (a.escalate < 0 || to_a < 0 || to_b < 0) {
        die("dup");
    }
    make_job(&a);
    submit(pool, &a, 1);
    dup2(to_b, a.escalate);
    close(b.escalate);
    b.escalate = a.escalate;
    make_job(&b);
    submit(pool, &b, 1);
    eventfd_write(to_b, 1);
    expect(poll_in(job_fd(b.job), PATIENCE), "b: not done");
    nap(100 * MS);
    expect(!job_is_done(a.job), "a: killed by what is meant for b");
    eventfd_write(to_a, 1);
    a.escalate = -1;
    check(&a);
    check(&b);
    close(to_a);
    close(to_b);
    close_pool(pool);
}

/* What ends a grace has gone: the grace goes on, and nothing is left of it. */
static void
scenario_gone(void)
{
    struct pool *pool = make_pool(2, 2);

    for (int round = 0; round < 4; round++) {
        struct victim victim;
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0) {
            die("pipe2");
        }
        close(ends[0]); /* POLLERR, from now on */
        make_victim(&victim, RUDE);
        victim.escalate = ends[1];
        make_job(&victim);
        submit(pool, &victim, 1);
        check(&victim);
    }
    close_pool(pool);
}

/* process_mrelease() does not come back: held by seccomp, for as long as
   `holding`, as by a victim that keeps its mmap_lock. */
static atomic_bool holding;
static int hold_most = INT_MAX; /* so many at the same time */
static atomic_int held;
static atomic_int to_let_go; /* so many, those that came first */
static atomic_bool supervised;
static int listener;

static void
let_go(uint64_t id)
{
    struct seccomp_notif_resp answer = {
        .id = id,
        .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    };
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}

/* For who must be in time; where that is not allowed, it may be late. */
static void
hasten(void)
{
    struct sched_param param = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &param);
}

static void *
supervise(void *arg)
{
    uint64_t ids[64];
    int count = 0;

    (void)arg;
    hasten();
    while (atomic_load(&supervised)) {
        if (poll_in(listener, MS)) {
            struct seccomp_notif request;
            memset(&request, 0, sizeof(request));
            if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request) != 0) {
                continue;
            }
            if (count == hold_most) {
                let_go(request.id);
                continue;
            }
            ids[count++] = request.id;
            atomic_fetch_add(&held, 1);
        }
        while (count > 0 &&
               (!atomic_load(&holding) || atomic_load(&to_let_go) > 0))
        {
            if (atomic_load(&to_let_go) > 0) {
                atomic_fetch_sub(&to_let_go, 1);
            }
            let_go(ids[0]);
            count--;
            memmove(ids, ids + 1, (size_t)count * sizeof(ids[0]));
        }
    }
    return NULL;
}

static int
filter_calls(struct sock_filter *code, unsigned short length, unsigned flags)
{
    struct sock_fprog filter = {.len = length, .filter = code};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        die("PR_SET_NO_NEW_PRIVS");
    }
    long rc = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &filter);
    if (rc < 0) {
        die("seccomp");
    }
    return (int)rc;
}

static pthread_t
hold_releases(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* the number of the call */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_mrelease, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    pthread_t supervisor;

    listener = filter_calls(code, 4, SECCOMP_FILTER_FLAG_NEW_LISTENER);
    atomic_store(&supervised, true);
    atomic_store(&holding, true);
    if (pthread_create(&supervisor, NULL, supervise, NULL) != 0) {
        die("pthread_create");
    }
    return supervisor;
}

static void
await_held(int count)
{
    int64_t until = reap_now() + PATIENCE;
    while (atomic_load(&held) < count && reap_now() < until) {
        nap(MS);
    }
    expect(atomic_load(&held) == count, "%d are stuck, not %d",
           atomic_load(&held), count);
}

static void
let_all_go(pthread_t supervisor)
{
    atomic_store(&holding, false);
    nap(100 * MS);
    atomic_store(&supervised, false);
    pthread_join(supervisor, NULL);
    close(listener);
}

/* One worker and one spare are stuck, and another victim is in the queue: all
   are dead and done in time, and closing waits for no more. */
static void
scenario_stuck(void)
{
    struct victim victims[4];
    pthread_t supervisor = hold_releases();
    struct pool *pool = make_pool(1, 1);
    for (int i = 0; i < 4; i++) {
        make_victim(&victims[i], ASLEEP);
        struct reap asked = ask(&victims[i]);
        asked.timeout = 200 * MS;
        make_job_of(&victims[i], &asked);
    }
    for (int i = 0; i < 4; i++) {
        submit(pool, &victims[i], 1);
        await_held(i == 0 ? 1 : 2);
        nap(20 * MS);
    }
    for (int i = 0; i < 4; i++) {
        expect(poll_in(victims[i].process.pidfd, PATIENCE), "lives");
        expect(poll_in(job_fd(victims[i].job), PATIENCE) &&
                   job_is_done(victims[i].job),
               "not done");
        const struct reap *result = job_result(victims[i].job);
        expect(result->outcome == REAP_EXITED ||
                   result->outcome == REAP_PARTIAL,
               "stuck: outcome %d", (int)result->outcome);
        drop_job(&victims[i]);
        end_victim(&victims[i]);
    }
    expect(pool_close(pool, reap_now() + 5 * SECOND, false),
           "closing waits for threads that are stuck with what is done");
    pool_release(pool);
    let_all_go(supervisor);
}

/* The watcher kills whose grace is over by itself, if of the workers all are
   stuck, or all but one. */
static void
stuck_watcher(int spares)
{
    struct victim victims[4];
    hold_most = 2;
    pthread_t supervisor = hold_releases();
    struct pool *pool = make_pool(2, spares);

    for (int i = 0; i < 4; i++) {
        make_victim(&victims[i], i < 3 ? ASLEEP : RUDE);
        struct reap asked = ask(&victims[i]);
        if (i < 2 || spares == 0) {
            asked.timeout = 200 * MS;
        }
        make_job_of(&victims[i], &asked);
    }
    for (int i = 0; i < 4; i++) {
        submit(pool, &victims[i], 1);
        if (i < 2) {
            await_held(i + 1);
        }
        nap(20 * MS);
        if (i == 2 && spares > 0) {
            expect(poll_in(job_fd(victims[2].job), PATIENCE), "the spare");
            nap(20 * MS);
        }
    }
    for (int i = 0; i < 4; i++) {
        expect(poll_in(victims[i].process.pidfd, PATIENCE), "lives");
        expect(poll_in(job_fd(victims[i].job), PATIENCE), "not done");
        drop_job(&victims[i]);
        end_victim(&victims[i]);
    }
    expect(pool_close(pool, reap_now() + 5 * SECOND, false), "not closed");
    pool_release(pool);
    let_all_go(supervisor);
}

static void
scenario_all_stuck(void)
{
    stuck_watcher(0);
}

static void
scenario_all_but_one(void)
{
    stuck_watcher(1);
}

/* One is in a release, another waits for its own: nobody is raised meanwhile,
   if the threads have real-time priority. */
static void
hold_raises(enum scheduling_rung best)
{
    hasten();
    pthread_t supervisor = hold_releases();

    for (int round = 0; round < 10; round++) {
        struct victim victims[6];
        struct pool *pool = make_pool_of(1, 0, best);

        atomic_store(&holding, true);
        for (int i = 0; i < 6; i++) {
            make_victim(&victims[i], i < 2 ? ASLEEP : RUDE);
            victims[i].cut = i >= 2; /* not by itself: the grace is short */
            struct reap asked = ask(&victims[i]);
            if (i >= 2) {
                asked.grace = (2 * i - 1) * MS;
            }
            make_job_of(&victims[i], &asked);
        }
        submit(pool, victims + 2, 4);
        submit(pool, victims, 2);
        nap(20 * MS);
        atomic_store(&holding, false);
        for (int i = 0; i < 6; i++) {
            check(&victims[i]);
        }
        close_pool(pool);
    }
    let_all_go(supervisor);
}

static void
scenario_held_raises(void)
{
    hold_raises(SCHEDULING_FIFO);
}

static void
scenario_no_priority(void)
{
    hold_raises(SCHEDULING_NONE);
}

/* The only worker is stuck, with what is done, and others whose results are
   told are in the queue: nobody is left for them, and closing does not wait. */
static void
scenario_nobody_left(void)
{
    hasten();
    pthread_t supervisor = hold_releases();

    for (int round = 0; round < 10; round++) {
        struct victim victims[3];
        struct pool *pool = make_pool(1, 0);
        int count = round % 2 == 0 ? 1 : 3;

        atomic_store(&holding, true);
        for (int i = 0; i < count; i++) {
            make_victim(&victims[i], i < 2 ? HELD : BIG);
            struct reap asked = ask(&victims[i]);
            asked.timeout = 0; /* they are done at once */
            make_job_of(&victims[i], &asked);
        }
        for (int i = 0; i < count; i++) {
            submit(pool, &victims[i], 1);
        }
        pool_close(pool, reap_now(), false); /* it is not stuck for long yet */
        for (int i = 0; i < count; i++) {
            expect(poll_in(job_fd(victims[i].job), PATIENCE) &&
                       job_is_done(victims[i].job),
                   "not told in time");
            expect(i == 2 || !job_result(victims[i].job)->freed, "freed");
        }
        expect(pool_close(pool, reap_now() + 5 * SECOND, false),
               "closing waits for a thread that is stuck with what is done");
        pool_release(pool);
        atomic_store(&holding, false);
        for (int i = 0; i < count; i++) {
            drop_job(&victims[i]);
            end_victim(&victims[i]);
        }
    }
    let_all_go(supervisor);
}

/* One that was stuck comes back while its spare is at work: it takes nothing,
   though somebody waits. */
static void
scenario_back(void)
{
    hasten();
    pthread_t supervisor = hold_releases();

    for (int round = 0; round < 10; round++) {
        struct victim victims[3];
        struct pool *pool = make_pool(1, 1);
        int before = atomic_load(&held);

        atomic_store(&holding, true);
        for (int i = 0; i < 3; i++) {
            /* The last does not end, and so stays in the queue. */
            make_victim(&victims[i], i < 2 ? ASLEEP : HELD);
            make_job(&victims[i]);
        }
        submit(pool, victims, 1);
        await_held(before + 1);
        nap(15 * MS);
        submit(pool, victims + 1, 2);
        atomic_fetch_add(&to_let_go, 1);
        nap((1 + round) * MS);
        atomic_store(&holding, false);
        for (int i = 0; i < 3; i++) {
            check(&victims[i]);
        }
        close_pool(pool);
    }
    let_all_go(supervisor);
}

/* The pool is closed when the only worker comes back, and one whose result is
   told is still in the queue: it is released, too. */
static void
scenario_last(void)
{
    struct victim first;
    struct victim last;
    pthread_t supervisor = hold_releases();
    struct pool *pool = make_pool(1, 0);

    make_victim(&first, ASLEEP);
    make_job(&first);
    make_victim(&last, HELD);
    struct reap asked = ask(&last);
    asked.timeout = 50 * MS;
    make_job_of(&last, &asked);
    submit(pool, &first, 1);
    await_held(1);
    submit(pool, &last, 1);
    expect(poll_in(job_fd(last.job), PATIENCE) && job_is_done(last.job),
           "not told in time");
    expect(job_result(last.job)->outcome == REAP_PARTIAL, "outcome %d",
           (int)job_result(last.job)->outcome);
    expect(!job_result(last.job)->freed, "freed");
    expect(!pool_close(pool, reap_now() + 20 * MS, false), "closed");
    expect(memory_of(last.process.pid) >= 16 * MIB, "released by nobody");
    atomic_store(&holding, false);
    drop_job(&last);
    check(&last);
    check(&first);
    close_pool(pool);
    let_all_go(supervisor);
}

/* The C library has no mutexes that lend priority: the pool does without. */
static void
scenario_no_inheritance(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                 offsetof(struct seccomp_data, args[1])),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0x7f),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, FUTEX_UNLOCK_PI, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };

    filter_calls(code, 7, 0);
    struct pool *pool = make_pool(2, 2);
    run_kinds(pool);
    close_pool(pool);
}

/* As kill() does it, in this thread; with times that are as good as infinite.
 */
static void
scenario_alone(void)
{
    struct victim victim;
    enum reap_progress progress;

    for (int i = 0; i < 2; i++) {
        make_victim(&victim, i == 0 ? ASLEEP : POLITE);
        struct reap reap = ask(&victim);
        reap.timeout = INT64_MAX;
        reap.grace = i == 0 ? 0 : INT64_MAX;
        do {
            progress = reap_run(&reap);
        } while (progress == REAP_PAUSED);
        expect(progress == REAP_DONE, "progress %d", (int)progress);
        expect(reap.freed, "not freed");
        expect((ONE(reap.outcome) & outcomes_of(victim.kind)) != 0,
               "outcome %d", (int)reap.outcome);
        reap_finish(&reap);
        check_end(&victim);
        end_victim(&victim);
    }

    /* poll() also tells of what is not open; that is no end. */
    make_victim(&victim, ASLEEP);
    struct reap reap = ask(&victim);
    reap.send = false;
    reap.pidfd = 1000;
    expect(reap_run(&reap) == REAP_DONE, "not done");
    expect(reap.outcome == REAP_UNSUPPORTED && reap.err == EBADF,
           "outcome %d, errno %d", (int)reap.outcome, reap.err);
    expect(!reap.freed && reap.exited == 0, "ended");
    expect(!poll_in(victim.process.pidfd, 0), "was killed");
    reap_finish(&reap);
    end_victim(&victim);
}

/* ----------------------------------------------------------------- main */

static const struct scenario {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    {"kinds", scenario_kinds},
    {"storm", scenario_storm},
    {"many", scenario_many},
    {"late-looks", scenario_late_looks},
    {"moments", scenario_moments},
    {"graces", scenario_graces},
    {"closers", scenario_closers},
    {"fork", scenario_fork},
    {"descriptors", scenario_descriptors},
    {"job-fds", scenario_job_descriptors},
    {"no-memory", scenario_no_memory},
    {"no-pool", scenario_no_pool},
    {"one-cpu", scenario_one_cpu},
    {"numbers", scenario_numbers},
    {"gone", scenario_gone},
    {"stuck", scenario_stuck},
    {"all-stuck", scenario_all_stuck},
    {"all-but-one", scenario_all_but_one},
    {"held-raises", scenario_held_raises},
    {"no-priority", scenario_no_priority},
    {"nobody-left", scenario_nobody_left},
    {"back", scenario_back},
    {"last", scenario_last},
    {"no-pi", scenario_no_inheritance},
    {"alone", scenario_alone},
};

#define SCENARIOS ((int)(sizeof(scenarios) / sizeof(scenarios[0])))

static void *
do_nothing(void *arg)
{
    return arg;
}

static int
run_scenario(const struct scenario *scenario)
{
    int64_t begun = reap_now();

    if (mkdtemp(folder) == NULL) {
        die(folder);
    }
    /* With the first thread, ThreadSanitizer makes one of its own. */
    pthread_t thread;
    if (pthread_create(&thread, NULL, do_nothing, NULL) != 0) {
        die("pthread_create");
    }
    pthread_join(thread, NULL);
    int fds = count_fds();
    int threads = count_threads();
    scenario->run();
    /* Threads that were let go of end a little later. */
    int64_t until = reap_now() + PATIENCE / 6;
    while ((count_threads() > threads || count_fds() > fds) &&
           reap_now() < until)
    {
        nap(MS);
    }
    expect(count_threads() <= threads, "%d threads too many",
           count_threads() - threads);
    expect(count_fds() <= fds, "%d fds too many", count_fds() - fds);
    rmdir(folder);
    printf("  %-12s %4d kills %7.2f s   %s\n", scenario->name,
           atomic_load(&kills), (double)(reap_now() - begun) / 1e9,
           atomic_load(&failures) == 0 ? "ok" : "FAILED");
    return atomic_load(&failures) == 0 ? 0 : 1;
}

/* In a process of its own, which is this program again. */
static int
spawn_scenario(const char *self, const char *name)
{
    char number[32];
    pid_t pid;
    int status;

    snprintf(number, sizeof(number), "%llu", (unsigned long long)seed);
    const char *argv[] = {
        self,
        "--scenario",
        name,
        "--seed",
        number,
        program,
        scale > 1 ? "--long" : NULL,
        NULL,
    };
    errno = posix_spawn(&pid, "/proc/self/exe", NULL, NULL,
                        (char *const *)(uintptr_t)argv, environ);
    if (errno != 0) {
        die("posix_spawn");
    }
    if (waitpid(pid, &status, 0) < 0) {
        die("waitpid");
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) > 1) {
        printf("  %-12s ended with status %#x\n", name, status);
    }
    return status == 0 ? 0 : 1;
}

int
main(int argc, char **argv)
{
    const char *only = NULL;
    int failed = 0;
    int first = argc;

    setvbuf(stdout, NULL, _IOLBF, 0);
    seed = (uint64_t)reap_now() | 1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--long") == 0) {
            scale = 10;
        }
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 10);
        }
        else if (strcmp(argv[i], "--scenario") == 0 && i + 1 < argc) {
            only = argv[++i];
        }
        else if (program == NULL) {
            program = argv[i];
        }
        else if (first == argc) {
            first = i;
        }
    }
    if (program == NULL) {
        fprintf(stderr,
                "usage: drive [--long] [--seed N] VICTIM [SCENARIO...]\n");
        return 2;
    }
    if (only == NULL) {
        printf("  seed %llu\n", (unsigned long long)seed);
    }
    for (int i = 0; i < SCENARIOS; i++) {
        const char *name = scenarios[i].name;
        bool wanted = first == argc;
        for (int j = first; j < argc; j++) {
            /* No argument is NULL. NOLINTNEXTLINE(clang-analyzer-core.*) */
            wanted = wanted || strcmp(argv[j], name) == 0;
        }
        if (only != NULL && strcmp(only, name) == 0) {
            return run_scenario(&scenarios[i]);
        }
        if (only == NULL && wanted) {
            failed += spawn_scenario(argv[0], name);
        }
    }
    if (failed > 0) {
        printf("  %d of the scenarios FAILED\n", failed);
    }
    return failed > 0;
}
