#include "pool.h"

#include <errno.h>
#include <fcntl.h>              /* F_DUPFD_CLOEXEC */
#include <linux/kcmp.h>         /* KCMP_FILE */
#include <limits.h>             /* INT_MAX */
#include <poll.h>               /* POLLIN */
#include <pthread.h>
#include <signal.h>             /* SIGKILL, pthread_sigmask() */
#include <stdatomic.h>
#include <stdio.h>              /* snprintf() */
#include <stdlib.h>             /* calloc(), qsort() */
#include <string.h>             /* memset() */
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>           /* fstat() */
#include <time.h>               /* struct timespec */
#include <unistd.h>             /* sysconf() */

#include "locks.h"
#include "procfs.h"
#include "syscalls.h"

#ifndef F_DUPFD_QUERY
#  define F_DUPFD_QUERY 1027    /* Linux 6.10 */
#endif

#define US INT64_C(1000)
#define MS INT64_C(1000000)

/* How long a kill waits for the worker that was called ahead to wake up.  Some
 * ten microseconds are enough, but in a virtual machine it may take 300 until
 * a CPU that was idle gets to run.  Where all CPUs are busy it is in vain:
 * each time that it was, half as long is waited the next time.
 */
#define ARRIVE (300 * US)
#define ARRIVE_LEAST (50 * US)

/* If it has not come by then, it is waiting for a CPU.  It gets the one of who
 * waits for it, and has so long to use it.
 */
#define PULLED (200 * US)

/* And once it is there, to look at the locks.  It takes some ten microseconds,
 * and some two more for each thread; a victim that holds its mmap_lock takes
 * for ever.
 */
#define LOOK MS
#define LOOK_EACH (5 * US)

/* A worker that has taken the kill upon itself may have lost its CPU: after so
 * long it is sent by who asked for it, too.
 */
#define CLAIM (200 * US)

/* Whoever waits for longer lets go of the CPU meanwhile: where all CPUs are
 * busy, the worker may be waiting for this one.
 */
#define SPIN_FOR_ARRIVAL (100 * US)
#define SPIN_FOR_LOOK (200 * US)

/* A worker that is ahead of the kill for so long waits for it asleep. */
#define AHEAD (2 * MS)

/* With one CPU the worker sends the signal itself; it has so long to wake. */
#define ALONE (2 * MS)

/* A worker that is with one victim for so long while others wait is replaced
 * by a spare one.  1 GiB takes some 15 ms where nothing hinders it; that one
 * more is at work then does no harm.
 */
#define STUCK (10 * MS)

/* Whoever was killed in a batch has so long, once nobody waits for a release
 * any more, to end unraised: most do.
 */
#define UNRAISED (5 * MS)

/* A look at the locks for which there is no file descriptor is tried again. */
#define FD_TRIES 50
#define FD_PAUSE (200 * US)

#define STACK ((size_t)64 << 10)
#define EVENTS 64

/* job->ahead */
enum {
    NOBODY,
    ARRIVED,                    /* a worker is awake, looking at the locks */
    INSIDE,                     /* it is in its loop: the kill may go out */
    OUTSIDE,                    /* it will not release, or it kills itself */
};

/* job->sent */
enum {
    NOT_SENT,
    CLAIMED,                    /* somebody is about to send it */
    SENT,
    NOT_ALLOWED,                /* it failed, or will not be sent */
};

/* What a worker has to tell of a victim. */
struct report {
    enum locks locks;
    bool looked;
    bool tried;                 /* there was a release */
    int err;
    int64_t entered;
    int64_t at;
};

struct job {
    struct job *next;           /* all of the pool's, until buried */
    struct job *previous;
    struct job *after;          /* in the queue for a release, */
    struct job *before;         /* the biggest first */
    struct job *attended;       /* the next for the watcher to look at */
    struct pool *pool;

    /* The protocol.  It is its driver's: see drive(). */
    struct reap reap;
    int escalate_fd;            /* a duplicate */
    int escalate_asked;         /* of this one */
    int64_t entered;

    /* The handshake between who kills and who is called ahead. */
    _Atomic uint32_t ahead;
    _Atomic uint32_t sent;
    _Atomic int sender_cpu;
    struct worker *called;      /* by its driver: ahead of the kill */
    _Atomic int64_t kill_at;    /* by the first who has sent it, */
    int kill_err;               /* then this, and then `sent` */

    /* Under the lock of the pool. */
    bool submitted;
    bool driven;
    bool news;
    bool reported;
    bool attending;
    bool queued;
    int64_t patience;           /* so long its release is left to its end */
    int64_t due_at;             /* when it is to be queued; 0: it is not */
    bool raise_due;
    bool cut;                   /* its grace is over */
    short heard;
    struct report report;
    int64_t wake_at;
    int users;                  /* who may still use its fds */

    int done_fd;
    atomic_bool done;
    atomic_int refs;
};

/* What a worker has to do for a victim. */
enum task {
    AHEAD_OF_KILL,              /* be ahead of its kill, and release */
    RELEASE,
    STRIKE,                     /* kill it, with another one ahead */
};

struct worker {
    struct pool *pool;
    struct worker *next_idle;
    pthread_t thread;
    int number;
    int spare_fd;               /* given up for a look without another fd */
    _Atomic uint32_t go;        /* there is a task, or the end */

    /* Under the lock of the pool. */
    struct job *job;
    enum task task;
    bool stuck;                 /* and not counted as busy any more */
    bool made;
    bool exited;
    pid_t tid;
    int cpu;                    /* where it was last */
    bool moved;                 /* it may not use all of its CPUs */
    int64_t since;              /* when it took its task */
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t changed;     /* a thread is ready or ended, a job done */
    pid_t owner;                /* and the forks that led to it */
    unsigned int forks;
    atomic_int refs;            /* its handle, and each thread */
    int epoll;
    int wake_fd;
    bool alone;                 /* there is one CPU for all of us */
    int most_ahead;             /* workers ahead of kills at the same time */
    struct pool_options asked;
    cpu_set_t cpus;             /* what asked.cpus points to */

    struct job *jobs;
    int unfinished;
    struct job *queue;          /* the biggest first */
    struct job *queue_end;
    struct job *attention;
    struct job *attention_end;
    struct worker *idle;
    int busy;                   /* at work and not stuck */
    int live;                   /* threads that have not ended */
    int ready;
    int err;                    /* of a thread that could not start well */
    struct pool_scheduling got;
    int64_t next_wake;
    bool watcher_sleeps;
    bool held;                  /* raises are due; see holds_raises() */
    bool closing;
    atomic_bool closed;         /* `closing`, to be read without the lock */
    _Atomic int64_t patience;   /* ARRIVE, or less where that was in vain */

    pthread_t watcher;
    bool watcher_made;
    bool watcher_exited;
    int count;
    struct worker workers[];
};

/* The forks that led to this process.  Its pid may be its parent's, too: both
 * may be the first in their pid namespaces.
 */
static atomic_uint forks;

static void
count_fork(void)
{
    atomic_fetch_add(&forks, 1);
}

static void
count_forks(void)
{
    pthread_atfork(NULL, NULL, count_fork);
}

static bool
is_forked(const struct pool *pool)
{
    return getpid() != pool->owner || atomic_load(&forks) != pool->forks;
}

static void
lock(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
}

static void
unlock(struct pool *pool)
{
    pthread_mutex_unlock(&pool->lock);
}

/* ------------------------------------------------------- the life of a job */

static void
close_fd(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

/* Not the fd that ends the grace: that may be the last one of a file whose
 * close takes long (some 10 ms of a pressure trigger).
 */
static void
close_fds(struct job *job)
{
    reap_finish(&job->reap);
    close_fd(job->reap.pidfd);
}

void
job_release(struct job *job)
{
    if (atomic_fetch_sub(&job->refs, 1) == 1) {
        if (!job->submitted) {
            close_fds(job);
            close_fd(job->escalate_fd);
        }
        close_fd(job->done_fd);
        free(job);
    }
}

/* Its fds are not needed (here) any more.  With the lock held. */
static void
unuse(struct job *job)
{
    if (--job->users == 0) {
        close_fds(job);
    }
}

static int
open_fds(struct job *job, const struct reap *asked)
{
    job->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (job->done_fd < 0) {
        return errno;
    }
    job->reap.pidfd = fcntl(asked->pidfd, F_DUPFD_CLOEXEC, 0);
    if (job->reap.pidfd < 0) {
        return errno;
    }
    if (asked->grace > 0 && asked->escalate_fd >= 0) {
        job->escalate_asked = asked->escalate_fd;
        job->escalate_fd = fcntl(asked->escalate_fd, F_DUPFD_CLOEXEC, 0);
        if (job->escalate_fd < 0) {
            return errno;
        }
        job->reap.escalate_fd = job->escalate_fd;
    }
    return 0;
}

int
job_make(const struct reap *asked, struct job **made)
{
    struct job *job = calloc(1, sizeof(*job));
    if (job == NULL) {
        return ENOMEM;
    }
    job->reap = *asked;
    job->reap.pidfd = -1;
    job->reap.escalate_fd = -1;
    job->escalate_fd = -1;
    job->escalate_asked = -1;
    job->wake_at = INT64_MAX;
    atomic_init(&job->refs, 1);
    int err = open_fds(job, asked);
    if (err != 0) {
        job_release(job);
        return err;
    }
    *made = job;
    return 0;
}

int
job_fd(const struct job *job)
{
    return job->done_fd;
}

bool
job_is_done(const struct job *job)
{
    return atomic_load_explicit(&job->done, memory_order_acquire);
}

const struct reap *
job_result(const struct job *job)
{
    return &job->reap;
}

int
job_refused(const struct job *job)
{
    return job->reap.refused;
}

int64_t
job_entered(const struct job *job)
{
    return job->entered;
}

/* ------------------------------------- lists and counts, with the lock held */

/* Make an eventfd readable; an errno, or 0. */
static int
signal_fd(int fd)
{
    uint64_t one = 1;
    return write(fd, &one, sizeof(one)) < 0 ? errno : 0;
}

static void
kick(struct pool *pool)
{
    if (pool->watcher_sleeps) {
        pool->watcher_sleeps = false;
        signal_fd(pool->wake_fd);
    }
}

/* The watcher should look at this job. */
static void
attend(struct pool *pool, struct job *job)
{
    if (job->attending) {
        return;
    }
    job->attending = true;
    job->attended = NULL;
    if (pool->attention_end == NULL) {
        pool->attention = job;
    }
    else {
        pool->attention_end->attended = job;
    }
    pool->attention_end = job;
    kick(pool);
}

/* The watcher is to look at its timers at that time. */
static void
look_again_at(struct pool *pool, int64_t when)
{
    if (when < pool->next_wake) {
        pool->next_wake = when;
        kick(pool);
    }
}

static void
wake_at(struct pool *pool, struct job *job, int64_t when)
{
    job->wake_at = when;
    look_again_at(pool, when);
}

static bool
is_realtime(const struct pool *pool)
{
    return scheduling_is_realtime(pool->got.attr.policy);
}

/* While releases wait for a worker nobody is raised: it would take the CPU of
 * the workers for what they do with less.  Unless all of them are stuck, or
 * have to wait for a CPU themselves.
 */
static bool
holds_raises(const struct pool *pool)
{
    return pool->queue != NULL && pool->busy > 0 && is_realtime(pool);
}

/* For its driver.  Some memory comes back at the end of the victim alone. */
static bool
may_raise(const struct pool *pool, const struct job *job)
{
    return job->reap.until_end || !holds_raises(pool);
}

/* Those that were held back may be raised at that time. */
static void
raise_held(struct pool *pool, int64_t when)
{
    if (pool->held) {
        pool->held = false;
        look_again_at(pool, when);
    }
}

static int64_t
size_of(const struct job *job)
{
    const struct procfs_status *before = &job->reap.before;
    return before->anon + before->swap + before->file;
}

/* The biggest first: the most memory comes back the soonest. */
static void
queue_up(struct pool *pool, struct job *job)
{
    struct job *before = pool->queue_end;

    job->queued = true;
    job->users++;
    atomic_fetch_add(&job->refs, 1);
    while (before != NULL && size_of(before) < size_of(job)) {
        before = before->before;
    }
    job->before = before;
    job->after = before == NULL ? pool->queue : before->after;
    if (before == NULL) {
        pool->queue = job;
    }
    else {
        before->after = job;
    }
    if (job->after == NULL) {
        pool->queue_end = job;
    }
    else {
        job->after->before = job;
    }
}

static void
leave_queue(struct pool *pool, struct job *job)
{
    if (job->before == NULL) {
        pool->queue = job->after;
    }
    else {
        job->before->after = job->after;
    }
    if (job->after == NULL) {
        pool->queue_end = job->before;
    }
    else {
        job->after->before = job->before;
    }
    job->queued = false;
    if (pool->queue == NULL) {
        raise_held(pool, reap_now() + UNRAISED);
    }
}

/* It will not be released.  What the queue has of it is given back. */
static void
drop_from_queue(struct pool *pool, struct job *job)
{
    leave_queue(pool, job);
    unuse(job);
    job_release(job);
}

/* For a worker, who takes over what the queue has of it. */
static struct job *
queue_pop(struct pool *pool)
{
    struct job *job = pool->queue;
    leave_queue(pool, job);
    return job;
}

/* Take those who are with one victim for long out of the count. */
static void
count_stuck(struct pool *pool)
{
    int64_t since = reap_now() - STUCK;

    for (int i = 0; i < pool->count; i++) {
        struct worker *worker = &pool->workers[i];
        if (worker->job != NULL && !worker->stuck && worker->since < since) {
            worker->stuck = true;
            pool->busy--;
        }
    }
}

/* An idle worker, one that was last on another CPU than `cpu` if there is
 * one; NULL if there is none or enough are at work.
 */
static struct worker *
take_idle(struct pool *pool, int cpu)
{
    if (pool->busy >= pool->asked.threads || pool->idle == NULL) {
        count_stuck(pool);
    }
    if (pool->busy >= pool->asked.threads || pool->idle == NULL) {
        return NULL;
    }
    struct worker **best = &pool->idle;
    for (struct worker **at = best; *at != NULL; at = &(*at)->next_idle) {
        if ((*at)->cpu != cpu) {
            best = at;
            break;
        }
    }
    struct worker *worker = *best;
    *best = worker->next_idle;
    return worker;
}

static void
give(struct pool *pool, struct worker *worker, struct job *job, enum task task)
{
    worker->job = job;
    worker->task = task;
    worker->stuck = false;
    worker->since = reap_now();
    pool->busy++;
    atomic_store(&worker->go, 1);
}

static void
wake(struct worker *worker)
{
    sys_futex_wake(&worker->go, 1);
}

/* A real-time thread wakes up where it was last, and who is there stands still
 * until it is done: not the CPU of who is about to kill.
 */
static void
keep_off(struct pool *pool, struct worker *worker, int cpu)
{
    if (worker->cpu == cpu && cpu >= 0 && cpu < CPU_SETSIZE &&
        is_realtime(pool))
    {
        cpu_set_t others = pool->got.cpus;
        CPU_CLR((size_t)cpu, &others);
        worker->moved =
            CPU_COUNT(&others) > 0 &&
            sched_setaffinity(worker->tid, sizeof(others), &others) == 0;
    }
}

/* Let idle workers take what is in the queue. */
static void
dispatch(struct pool *pool)
{
    while (pool->queue != NULL) {
        struct worker *worker = take_idle(pool, -1);
        if (worker == NULL) {
            if (pool->busy == 0) {
                raise_held(pool, 0);
            }
            kick(pool); /* it looks for those that are stuck */
            return;
        }
        give(pool, worker, queue_pop(pool), RELEASE);
        wake(worker);
    }
}

/* ------------------------------------------------------------- the workers */

static void
look(struct worker *self, struct job *job, struct report *report)
{
    const struct reap *reap = &job->reap;
    bool no_fd;

    if (!job->reap.protect || report->looked) {
        return;
    }
    if (reap->in_exec) {
        report->locks = LOCKS_FREE;
        return;
    }
    bool single = reap->has_footprint && reap->before.threads == 1;
    report->locks = locks_look(reap->pid, single, &no_fd);
    for (int i = 0; no_fd && report->locks == LOCKS_UNKNOWN && i < FD_TRIES;
         i++)
    {
        /* Ours is for this.  If somebody else was quicker to take it, another
         * will be free in a moment: those of the pool are needed for no longer.
         */
        if (self->spare_fd < 0) {
            sys_futex_wait(&self->go, atomic_load(&self->go), FD_PAUSE);
        }
        close_fd(self->spare_fd);
        report->locks = locks_look(reap->pid, single, &no_fd);
        self->spare_fd = fcntl(self->pool->wake_fd, F_DUPFD_CLOEXEC, 0);
    }
    if (report->locks == LOCKS_HELD &&
        sys_pidfd_send_signal(reap->pidfd, 0) < 0 && errno == ESRCH)
    {
        report->locks = LOCKS_UNKNOWN;  /* it may have been a stranger */
    }
    report->looked = true;
}

/* The kill is ours, if nobody else has begun to send it. */
static bool
claim(struct job *job)
{
    uint32_t expected = NOT_SENT;
    return atomic_compare_exchange_strong(&job->sent, &expected, CLAIMED);
}

static int
send_kill(const struct job *job)
{
    return sys_pidfd_send_signal(job->reap.pidfd, SIGKILL) < 0 ? errno : 0;
}

/* SIGKILL was sent at this time, or failed. */
static void
note_kill(struct job *job, int err, int64_t at)
{
    int64_t never = 0;
    if (atomic_compare_exchange_strong(&job->kill_at, &never, at)) {
        job->kill_err = err;
        atomic_store(&job->sent, err != 0 ? NOT_ALLOWED : SENT);
    }
}

static void
announce(struct job *job, uint32_t state)
{
    atomic_store(&job->ahead, state);
    sys_futex_wake(&job->ahead, INT_MAX);
}

/* process_mrelease() until it means something: as long as SIGKILL is not out,
 * EINVAL says that the victim lives.
 */
static void
release(struct job *job, struct report *report)
{
    int64_t begun = reap_now();

    for (;;) {
        uint32_t sent = atomic_load(&job->sent);
        if (sent == NOT_ALLOWED) {
            return;
        }
        int64_t now = reap_now();
        int rc = sys_process_mrelease(job->reap.pidfd, 0);
        int err = rc < 0 ? errno : 0;
        if (err != EINVAL || sent == SENT) {
            report->tried = true;
            report->err = err;
            report->entered = now;
            report->at = reap_now();
            return;
        }
        if (now - begun > AHEAD) {
            sys_futex_wait(&job->sent, sent, MS);
        }
    }
}

static void
work_ahead(struct worker *self, struct job *job, struct report *report)
{
    atomic_store(&job->ahead, ARRIVED);
    look(self, job, report);
    if (report->locks == LOCKS_HELD) {
        announce(job, OUTSIDE);
        return;
    }
    if ((self->pool->alone || sched_getcpu() == job->sender_cpu) && claim(job))
    {
        /* Who wants to send it cannot run beside us.  It looks up now and
         * then: there is no time to wake it.
         */
        int64_t now = reap_now();
        note_kill(job, send_kill(job), now);
        release(job, report);
        announce(job, OUTSIDE);
        return;
    }
    announce(job, INSIDE);
    release(job, report);
}

static void
drive(struct job *job);

static void
carry_on(struct job *job, enum reap_progress progress);

static void
work(struct worker *self, struct job *job, enum task task)
{
    struct pool *pool = self->pool;
    struct report report;

    if (task == STRIKE) {
        carry_on(job, REAP_STRIKE); /* it is not closed before it is done */
        return;
    }
    lock(pool);
    report = job->report; /* did an earlier try look at the locks? */
    unlock(pool);
    report.tried = false;
    if (task == AHEAD_OF_KILL) {
        work_ahead(self, job, &report);
    }
    else {
        look(self, job, &report);
        if (report.locks != LOCKS_HELD) {
            release(job, &report);
        }
    }
    lock(pool);
    job->report = report;
    job->reported = true;
    unuse(job);
    unlock(pool);
    drive(job);
}

static void
park(struct worker *self)
{
    struct pool *pool = self->pool;

    self->cpu = sched_getcpu();
    self->next_idle = pool->idle;
    pool->idle = self;
    unlock(pool);
    while (atomic_load(&self->go) == 0) {
        sys_futex_wait(&self->go, 0, 3600 * (1000 * MS));
    }
    lock(pool);
    atomic_store(&self->go, 0);
}

static bool
is_over(const struct pool *pool)
{
    return pool->closing && pool->unfinished == 0 && pool->queue == NULL;
}

static void
wake_all(struct pool *pool)
{
    while (pool->idle != NULL) {
        struct worker *worker = pool->idle;
        pool->idle = worker->next_idle;
        atomic_store(&worker->go, 1);
        wake(worker);
    }
    kick(pool);
    pthread_cond_broadcast(&pool->changed);
}

static void
work_on(struct worker *self)
{
    struct pool *pool = self->pool;

    while (!is_over(pool) || self->job != NULL) {
        if (self->job == NULL) {
            park(self);
            continue;
        }
        struct job *job = self->job;
        unlock(pool);
        work(self, job, self->task);
        lock(pool);
        if (self->moved) {
            sched_setaffinity(0, sizeof(pool->got.cpus), &pool->got.cpus);
            self->moved = false;
        }
        job_release(job);
        self->job = NULL;
        if (!self->stuck) {
            pool->busy--;
        }
        if (is_over(pool)) {
            wake_all(pool);
        }
        if (pool->queue != NULL && pool->busy < pool->asked.threads) {
            give(pool, self, queue_pop(pool), RELEASE);
            atomic_store(&self->go, 0);
        }
    }
}

/* ------------------------------------------------- the kill, by who sends it */

/* Bring the worker that was called to the CPU that its caller is about to let
 * go of.  It finds itself there, and kills.
 */
static void
pull(struct pool *pool, struct job *job)
{
    lock(pool);
    struct worker *worker = job->called;
    int cpu = sched_getcpu();
    if (worker->job == job && atomic_load(&job->ahead) == NOBODY && cpu >= 0 &&
        cpu < CPU_SETSIZE && CPU_ISSET((size_t)cpu, &pool->got.cpus))
    {
        cpu_set_t here;
        CPU_ZERO(&here);
        CPU_SET((size_t)cpu, &here);
        job->sender_cpu = cpu;
        worker->moved |=
            sched_setaffinity(worker->tid, sizeof(here), &here) == 0;
    }
    unlock(pool);
}

/* Wait until the worker that was called ahead is there; not for long. */
static void
await_ahead(struct pool *pool, struct job *job)
{
    int64_t begun = reap_now();
    int64_t patience = atomic_load(&pool->patience);
    int64_t arrive = pool->alone ? ALONE : patience;
    bool pulled = pool->alone;
    int64_t there = LOOK + LOOK_EACH * job->reap.before.threads;

    for (;;) {
        uint32_t ahead = atomic_load(&job->ahead);
        if (ahead >= INSIDE || atomic_load(&job->sent) != NOT_SENT) {
            if (!pulled) {
                atomic_store(&pool->patience, ARRIVE);
            }
            return;
        }
        int64_t waited = reap_now() - begun;
        int64_t most = ahead == NOBODY ? arrive : there;
        int64_t spin = ahead == NOBODY ? SPIN_FOR_ARRIVAL : SPIN_FOR_LOOK;
        if (waited > most && ahead == NOBODY && !pulled) {
            pulled = true;
            arrive += PULLED;
            if (patience > ARRIVE_LEAST) {
                atomic_store(&pool->patience, patience / 2);
            }
            pull(pool, job);
            continue;
        }
        if (waited > most) {
            return;
        }
        if (waited >= spin || pulled) {
            sys_futex_wait(&job->ahead, ahead, most - waited);
        }
    }
}

/* Call a worker ahead of the kill that is about to be sent, if one is to be
 * had.
 */
static void
call_ahead(struct job *job)
{
    struct pool *pool = job->pool;

    lock(pool);
    job->sender_cpu = sched_getcpu();
    struct worker *worker = take_idle(pool, job->sender_cpu);
    if (worker != NULL) {
        job->called = worker;
        job->users++;
        atomic_fetch_add(&job->refs, 1);
        keep_off(pool, worker, job->sender_cpu);
        give(pool, worker, job, AHEAD_OF_KILL);
    }
    unlock(pool);
    if (worker != NULL) {
        wake(worker);
    }
}

/* SIGKILL, once the worker that was called is there. */
static void
send_out(struct job *job)
{
    if (job->called != NULL) {
        await_ahead(job->pool, job);
    }
    int64_t now = reap_now();
    if (claim(job)) {
        note_kill(job, send_kill(job), now);
        if (job->called != NULL) {
            sys_futex_wake(&job->sent, INT_MAX);
        }
        return;
    }
    while (atomic_load(&job->sent) == CLAIMED) {
        sys_futex_wait(&job->sent, CLAIMED, CLAIM);
        now = reap_now();
        /* Twice does no harm, and that it fails may mean that it was sent. */
        if (atomic_load(&job->sent) == CLAIMED && send_kill(job) == 0) {
            note_kill(job, 0, now);
        }
    }
}

/* SIGKILL was sent or failed: have it released and raised.  With the lock held;
 * then dispatch() is due.
 */
static void
hand_in(struct job *job)
{
    if (job->kill_err == 0) {
        job->reap.releasing = true;
        job->reap.to_raise = true;
        job->raise_due = true;
        if (job->patience > 0) {
            job->due_at = reap_now() + job->patience;
            look_again_at(job->pool, job->due_at);
        }
        else if (job->called == NULL) {
            queue_up(job->pool, job);
        }
    }
}

static enum reap_progress
struck(struct job *job)
{
    return reap_struck(&job->reap, job->kill_err, atomic_load(&job->kill_at));
}

static enum reap_progress
strike(struct job *job)
{
    job->patience = reap_patience(&job->reap);
    if (job->patience == 0) {
        call_ahead(job);
    }
    send_out(job);
    lock(job->pool);
    hand_in(job);
    dispatch(job->pool);
    unlock(job->pool);
    return struck(job);
}

/* ------------------------------------------------------------ the protocol */

/* The job is done, or nothing was sent.  With the lock held. */
static void
finish(struct pool *pool, struct job *job)
{
    /* A worker that is called ahead of a kill that is not sent goes home. */
    claim(job);
    if (atomic_load(&job->sent) == CLAIMED) {
        atomic_store(&job->sent, NOT_ALLOWED);
        sys_futex_wake(&job->sent, INT_MAX);
    }
    if (job->queued && job->reap.exited != 0) {
        drop_from_queue(pool, job);
    }
    /* A duplicate of an fd may live on, and with it the registration. */
    epoll_ctl(pool->epoll, EPOLL_CTL_DEL, job->reap.pidfd, NULL);
    if (job->escalate_fd >= 0) {
        epoll_ctl(pool->epoll, EPOLL_CTL_DEL, job->escalate_fd, NULL);
    }
    unuse(job);
    atomic_store_explicit(&job->done, true, memory_order_release);
    signal_fd(job->done_fd);
    pool->unfinished--;
    job->wake_at = INT64_MAX;
    job->due_at = 0;
    attend(pool, job); /* to be buried */
    if (is_over(pool)) {
        wake_all(pool);
    }
    pthread_cond_broadcast(&pool->changed);
}

static bool
is_watcher(const struct pool *pool)
{
    return pthread_equal(pthread_self(), pool->watcher) != 0;
}

/* What was heard of the job since.  With the lock held; gives it up. */
static void
take_news(struct pool *pool, struct job *job)
{
    struct reap *reap = &job->reap;
    struct report report = job->report;
    bool reported = job->reported;
    short heard = job->heard;
    bool cut = job->cut;
    bool raise = job->raise_due && is_watcher(pool) && may_raise(pool, job);

    job->news = false;
    job->reported = false;
    job->heard = 0;
    job->cut = false;
    if (raise) {
        job->raise_due = false;
    }
    bool queued = job->queued || job->due_at != 0;
    bool to_raise = job->raise_due;
    unlock(pool);
    reap->queued = queued;
    reap->to_raise = to_raise;
    if (reported) {
        reap->releasing = false;
        reap->locks = report.locks;
        if (report.locks == LOCKS_HELD) {
            reap_withhold(reap);
        }
        else if (report.tried) {
            job->entered = report.entered;
            reap_tried(reap, report.err, report.at);
        }
    }
    if (heard != 0) {
        reap_heard(reap, heard);
    }
    if (cut) {
        reap_heard(reap, POLLIN);
    }
    if (raise) {
        reap_raise(reap);
    }
}

/* A kill may take some milliseconds, and all others wait for the watcher: if
 * two workers are to be had, one kills with the other ahead of it.
 */
static bool
hand_over(struct pool *pool, struct job *job)
{
    struct worker *worker = NULL;

    if (!is_watcher(pool)) {
        return false;
    }
    lock(pool);
    if (pool->busy + 2 <= pool->asked.threads && pool->idle != NULL &&
        pool->idle->next_idle != NULL)
    {
        worker = take_idle(pool, -1);
        atomic_fetch_add(&job->refs, 1);
        give(pool, worker, job, STRIKE);
    }
    unlock(pool);
    if (worker != NULL) {
        wake(worker);
    }
    return worker != NULL;
}

/* Carry the job on from what came last, as far as it goes without waiting.
 * For its driver; also takes the news that others leave meanwhile.
 */
static void
carry_on(struct job *job, enum reap_progress progress)
{
    struct pool *pool = job->pool;

    for (;;) {
        while (progress == REAP_NEXT || progress == REAP_STRIKE) {
            if (progress == REAP_NEXT) {
                progress = reap_advance(&job->reap);
            }
            if (progress == REAP_STRIKE) {
                if (hand_over(pool, job)) {
                    return; /* it is driven by that worker now */
                }
                progress = reap_prepare(&job->reap);
                if (progress == REAP_STRIKE) {
                    progress = strike(job);
                }
            }
        }
        lock(pool);
        switch (progress) {
        case REAP_WAIT:
            wake_at(pool, job, job->reap.wake_at);
            break;
        case REAP_RELEASE:
            job->reap.releasing = true;
            queue_up(pool, job);
            dispatch(pool);
            job->news = true;
            break;
        default:
            finish(pool, job);
            break;
        }
        if (atomic_load(&job->done) || !job->news) {
            job->driven = false;
            if (job->raise_due && may_raise(pool, job)) {
                attend(pool, job); /* now it may drive it */
            }
            else if (job->raise_due) {
                pool->held = true;
            }
            unlock(pool);
            return;
        }
        take_news(pool, job);
        progress = REAP_NEXT;
    }
}

/* There is news of the job.  One thread at a time drives it: who comes while
 * another does leaves the news with that one.
 */
static void
drive(struct job *job)
{
    struct pool *pool = job->pool;

    lock(pool);
    job->news = true;
    if (job->driven || atomic_load(&job->done)) {
        unlock(pool);
        return;
    }
    job->driven = true;
    take_news(pool, job);
    carry_on(job, REAP_NEXT);
}

static int
by_size(const void *a, const void *b)
{
    int64_t left = size_of(*(struct job *const *)a);
    int64_t right = size_of(*(struct job *const *)b);
    return (left < right) - (left > right);
}

int
pool_state(const struct pool *pool)
{
    /* After fork() the lock may be held by a thread that is no more. */
    if (is_forked(pool)) {
        return POOL_FORKED;
    }
    return atomic_load(&pool->closed) ? POOL_CLOSED : POOL_OPEN;
}

static int
watch_fd(struct pool *pool, int fd, uint32_t events, void *what)
{
    struct epoll_event event = {.events = events, .data.ptr = what};
    return epoll_ctl(pool->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

/* Do both wait for the same open file of the kernel's?  `b` has one. */
static bool
is_same_trigger(const struct job *a, const struct job *b)
{
    struct stat of_a;
    struct stat of_b;

    if (a->escalate_fd < 0 || fstat(a->escalate_fd, &of_a) != 0 ||
        fstat(b->escalate_fd, &of_b) != 0 || !S_ISREG(of_a.st_mode) ||
        of_a.st_dev != of_b.st_dev || of_a.st_ino != of_b.st_ino)
    {
        return false;
    }
    int same = fcntl(a->escalate_fd, F_DUPFD_QUERY, b->escalate_fd);
    if (same < 0) { /* before Linux 6.10 */
        pid_t pid = getpid();
        long order = syscall(SYS_kcmp, pid, pid, KCMP_FILE, a->escalate_fd,
                             b->escalate_fd);
        same = order < 0 ? a->escalate_asked == b->escalate_asked : order == 0;
    }
    return same != 0;
}

/* What the fd that ends its grace has to tell.  With the lock held.  A pressure
 * trigger tells of its news once: it is meant for all.
 */
static void
tell_news(struct pool *pool, struct job *job, short events)
{
    for (struct job *each = pool->jobs; each != NULL; each = each->next) {
        if (each == job || (!(events & POLLERR) && is_same_trigger(each, job)))
        {
            each->heard |= events;
            attend(pool, each);
        }
    }
}

/* What marks the events of the fd that ends a grace. */
#define ESCALATES ((uintptr_t)1)

static int
watch_job(struct pool *pool, struct job *job)
{
    int err = watch_fd(pool, job->reap.pidfd, EPOLLIN | EPOLLONESHOT, job);
    if (err != 0 || job->escalate_fd < 0) {
        return err;
    }
    /* First: to be watched takes the news from a pressure trigger. */
    struct pollfd fd = {.fd = job->escalate_fd,
                        .events = reap_news_of(job->escalate_fd)};
    if (poll(&fd, 1, 0) == 1) {
        if (fd.revents & POLLNVAL) {
            return 0;           /* it cannot be polled (O_PATH) */
        }
        lock(pool);
        tell_news(pool, job, fd.revents);
        unlock(pool);
    }
    err = watch_fd(pool, job->escalate_fd, (uint32_t)fd.events | EPOLLONESHOT,
                   (void *)((uintptr_t)job | ESCALATES));
    /* EPERM: it has no news, or always had (a plain file, /dev/null). */
    return err == EPERM ? 0 : err;
}

static void
enlist(struct pool *pool, struct job *job)
{
    job->submitted = true;
    job->pool = pool;
    job->previous = NULL;
    job->next = pool->jobs;
    if (pool->jobs != NULL) {
        pool->jobs->previous = job;
    }
    pool->jobs = job;
    pool->unfinished++;
    job->driven = true;
    job->users = 1;
    atomic_fetch_add(&job->refs, 1);
}

int
pool_submit(struct pool *pool, struct job **jobs, int count)
{
    lock(pool);
    if (pool->closing) {
        unlock(pool);
        return POOL_CLOSED;
    }
    for (int i = 0; i < count; i++) {
        enlist(pool, jobs[i]);
    }
    unlock(pool);

    int due = 0;
    for (int i = 0; i < count; i++) {
        struct job *job = jobs[i];
        enum reap_progress progress = REAP_REFUSED;
        job->reap.refused = watch_job(pool, job);
        if (job->reap.refused == 0) {
            progress = reap_advance(&job->reap);
        }
        if (progress == REAP_STRIKE) {
            progress = reap_prepare(&job->reap);
        }
        if (progress == REAP_STRIKE) {
            job->patience = reap_patience(&job->reap);
            jobs[i] = jobs[due];
            jobs[due++] = job;
        }
        else {
            carry_on(job, progress);
        }
    }
    qsort(jobs, (size_t)due, sizeof(struct job *), by_size);

    /* Workers may be more urgent than we are, and raised victims are: none of
     * them is set to work before all have been sent their SIGKILL, but for
     * those that are ahead of a kill, which leave one CPU to us.  Where there
     * is one only, a more urgent one would release before the other kills.
     */
    bool together = due > 1 && pool->alone && is_realtime(pool);
    for (int i = 0; !together && i < due && i < pool->most_ahead; i++) {
        if (jobs[i]->patience == 0) {
            call_ahead(jobs[i]);
        }
    }
    for (int i = 0; i < due; i++) {
        send_out(jobs[i]);
    }
    /* With the lock, for which more urgent threads lend us their priority: the
     * dying would keep us from it.  All at once, so that no worker is woken
     * for each, and none is raised while others wait.
     */
    lock(pool);
    for (int i = 0; i < due; i++) {
        hand_in(jobs[i]);
    }
    dispatch(pool);
    unlock(pool);
    for (int i = 0; i < due; i++) {
        carry_on(jobs[i], struck(jobs[i]));
    }
    return POOL_OPEN;
}

/* ------------------------------------------------------------- the watcher */

/* Nobody will ask the watcher about this job any more.  Gives the lock up. */
static void
bury(struct pool *pool, struct job *job)
{
    if (job->next != NULL) {
        job->next->previous = job->previous;
    }
    if (job->previous != NULL) {
        job->previous->next = job->next;
    }
    else {
        pool->jobs = job->next;
    }
    unlock(pool);
    close_fd(job->escalate_fd);
    job_release(job);
    lock(pool);
}

static void
attend_all(struct pool *pool)
{
    while (pool->attention != NULL) {
        struct job *job = pool->attention;
        pool->attention = job->attended;
        if (pool->attention == NULL) {
            pool->attention_end = NULL;
        }
        job->attending = false;
        if (atomic_load(&job->done)) {
            bury(pool, job);
            continue;
        }
        unlock(pool);
        drive(job);
        lock(pool);
    }
}

static void
hear(struct pool *pool, struct epoll_event *event)
{
    uintptr_t what = (uintptr_t)event->data.ptr;

    if (what == 0) {
        uint64_t count;
        /* It does not block. NOLINTNEXTLINE(clang-analyzer-unix.*) */
        ssize_t n = read(pool->wake_fd, &count, sizeof(count));
        (void)n;
        return;
    }
    struct job *job = (struct job *)(what & ~ESCALATES);
    if ((what & ESCALATES) == 0) {
        attend(pool, job);
        return;
    }
    tell_news(pool, job, (short)event->events);
}

static void
look_at_timers(struct pool *pool)
{
    int64_t now = reap_now();

    if (now < pool->next_wake) {
        return;
    }
    pool->next_wake = INT64_MAX;
    for (struct job *job = pool->jobs; job != NULL; job = job->next) {
        if (job->wake_at <= now) {
            job->wake_at = INT64_MAX;
            attend(pool, job);
        }
        else if (job->wake_at < pool->next_wake) {
            pool->next_wake = job->wake_at;
        }
        if (job->due_at != 0 && job->due_at <= now) {
            job->due_at = 0;
            queue_up(pool, job);
        }
        else if (job->due_at != 0 && job->due_at < pool->next_wake) {
            pool->next_wake = job->due_at;
        }
        if (job->raise_due && !holds_raises(pool)) {
            attend(pool, job);
        }
        else if (job->raise_due) {
            pool->held = true;
        }
    }
}

/* In milliseconds, for epoll_wait(). */
static int
time_to_sleep(const struct pool *pool)
{
    int64_t until = pool->next_wake;
    int64_t now = reap_now();

    if (pool->queue != NULL && until > now + STUCK / 2) {
        until = now + STUCK / 2;
    }
    if (until == INT64_MAX) {
        return -1;
    }
    int64_t left = until <= now ? 0 : (until - now + MS - 1) / MS;
    return left > INT_MAX ? INT_MAX : (int)left;
}

static void
watch(struct pool *pool)
{
    struct epoll_event events[EVENTS];

    while (!is_over(pool) || pool->jobs != NULL) {
        /* Nobody is left for attend_all() since it had the lock. */
        pool->watcher_sleeps = true;
        int ms = time_to_sleep(pool);
        unlock(pool);
        int n = epoll_wait(pool->epoll, events, EVENTS, ms);
        lock(pool);
        pool->watcher_sleeps = false;
        for (int i = 0; i < n; i++) {
            hear(pool, &events[i]);
        }
        look_at_timers(pool);
        attend_all(pool);
        dispatch(pool);
    }
}

/* ------------------------------------------------------ the life of threads */

static void
close_pool_fds(struct pool *pool)
{
    for (int i = 0; i < pool->count; i++) {
        close_fd(pool->workers[i].spare_fd);
        pool->workers[i].spare_fd = -1;
    }
    close_fd(pool->epoll);
    close_fd(pool->wake_fd);
    pool->epoll = -1;
    pool->wake_fd = -1;
}

static void
free_pool(struct pool *pool)
{
    close_pool_fds(pool);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static void
unref(struct pool *pool)
{
    if (atomic_fetch_sub(&pool->refs, 1) == 1) {
        free_pool(pool);
    }
}

/* Take the CPUs and the scheduling that were asked for, for this thread. */
static int
settle_in(const struct pool_options *asked, struct pool_scheduling *got)
{
    struct sys_sched_attr before;
    enum scheduling_rung rung = asked->best;
    int err = 0;

    if (asked->cpus != NULL &&
        sched_setaffinity(0, sizeof(*asked->cpus), asked->cpus) < 0)
    {
        return errno;
    }
    memset(&before, 0, sizeof(before));
    if (sys_sched_getattr(0, &before) < 0) {
        err = errno;
        rung = SCHEDULING_NONE;
    }
    else if (scheduling_is_realtime(before.policy)) {
        rung = SCHEDULING_FIFO; /* as who made the pool */
    }
    else if (rung != SCHEDULING_NONE) {
        err = scheduling_set_best(0, &before, &rung);
        if (err != 0) {
            rung = rung > SCHEDULING_FIFO && before.nice < 0 ? SCHEDULING_LIMIT
                                                             : SCHEDULING_NONE;
        }
    }
    if (rung > asked->least) {
        return err;
    }
    scheduling_shorten_slice();
    memset(got, 0, sizeof(*got));
    sys_sched_getattr(0, &got->attr);
    got->refused = rung == asked->best ? 0 : err != 0 ? err : EPERM;
    sched_getaffinity(0, sizeof(got->cpus), &got->cpus);
    return 0;
}

/* Have the pages of the stack that a kill needs: it makes none then. */
static void
touch_stack(void)
{
    volatile char pages[STACK / 4];

    for (size_t i = 0; i < sizeof(pages); i += 1024) {
        pages[i] = 0;
    }
}

/* In a new thread; true if it may go on.  Takes the lock. */
static bool
begin(struct pool *pool, const char *name, int number)
{
    struct pool_scheduling got;
    char full[16];

    snprintf(full, sizeof(full), "mrelease/%.4s%d", name, number);
    pthread_setname_np(pthread_self(), full);
    touch_stack();
    int err = settle_in(&pool->asked, &got);
    lock(pool);
    pool->ready++;
    if (err == 0) {
        pool->got = got;
    }
    else if (pool->err == 0) {
        pool->err = err;
    }
    pthread_cond_broadcast(&pool->changed);
    return err == 0;
}

/* At the end of a thread: gives up the lock. */
static void
end(struct pool *pool, bool *exited)
{
    *exited = true;
    pool->live--;
    if (pool->closing && pool->live == 0) {
        close_pool_fds(pool); /* who keeps the pool keeps none */
    }
    pthread_cond_broadcast(&pool->changed);
    unlock(pool);
    unref(pool);
}

static void *
run_worker(void *arg)
{
    struct worker *self = arg;
    struct pool *pool = self->pool;

    self->tid = (pid_t)syscall(SYS_gettid);
    if (begin(pool, "", self->number)) {
        work_on(self);
    }
    end(pool, &self->exited);
    return NULL;
}

static void *
run_watcher(void *arg)
{
    struct pool *pool = arg;

    if (begin(pool, "w", 0)) {
        watch(pool);
    }
    end(pool, &pool->watcher_exited);
    return NULL;
}

static int
start(pthread_t *thread, void *(*run)(void *), void *arg)
{
    long least = sysconf(_SC_THREAD_STACK_MIN);
    size_t stack = STACK + (least > 0 ? (size_t)least : 0);
    pthread_attr_t attr;
    int err = pthread_attr_init(&attr);
    if (err != 0) {
        return err;
    }
    /* EINVAL: thread-local storage of the program needs more. */
    do {
        err = pthread_attr_setstacksize(&attr, stack);
        if (err == 0) {
            err = pthread_create(thread, &attr, run, arg);
        }
        stack *= 2;
    } while (err == EINVAL && stack < ((size_t)16 << 20));
    pthread_attr_destroy(&attr);
    return err;
}

static int
start_all(struct pool *pool)
{
    sigset_t all;
    sigset_t before;
    int err;

    /* A thread begins with the signals blocked that its maker has blocked. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    lock(pool);
    err = start(&pool->watcher, run_watcher, pool);
    if (err == 0) {
        pool->watcher_made = true;
        pool->live++;
        atomic_fetch_add(&pool->refs, 1);
    }
    for (int i = 0; err == 0 && i < pool->count; i++) {
        struct worker *worker = &pool->workers[i];
        err = start(&worker->thread, run_worker, worker);
        if (err == 0) {
            worker->made = true;
            pool->live++;
            atomic_fetch_add(&pool->refs, 1);
        }
    }
    while (pool->ready < pool->live) {
        pthread_cond_wait(&pool->changed, &pool->lock);
    }
    unlock(pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err != 0 ? err : pool->err;
}

/* Of two who close the pool at once, one does it. */
static void
part_with(struct pool *pool, pthread_t thread, bool *made, const bool *exited)
{
    lock(pool);
    bool is_ours = *made;
    bool ended = *exited;
    *made = false;
    unlock(pool);
    if (is_ours && ended) {
        pthread_join(thread, NULL);
    }
    else if (is_ours) {
        pthread_detach(thread);
    }
}

/* Join those that have ended; the others end by themselves, or never. */
static void
part_with_threads(struct pool *pool)
{
    part_with(pool, pool->watcher, &pool->watcher_made, &pool->watcher_exited);
    for (int i = 0; i < pool->count; i++) {
        struct worker *worker = &pool->workers[i];
        part_with(pool, worker->thread, &worker->made, &worker->exited);
    }
}

static int
open_pool(struct pool *pool)
{
    pthread_mutexattr_t mutex;
    pthread_condattr_t cond;
    cpu_set_t cpus;

    pthread_mutexattr_init(&mutex);
    /* Who submits may be less urgent than the threads. */
    pthread_mutexattr_setprotocol(&mutex, PTHREAD_PRIO_INHERIT);
    if (pthread_mutex_init(&pool->lock, &mutex) != 0) {
        pthread_mutex_init(&pool->lock, NULL);
    }
    pthread_mutexattr_destroy(&mutex);
    pthread_condattr_init(&cond);
    pthread_condattr_setclock(&cond, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->changed, &cond);
    pthread_condattr_destroy(&cond);

    CPU_ZERO(&cpus);
    sched_getaffinity(0, sizeof(cpus), &cpus);
    if (pool->asked.cpus != NULL) {
        pool->cpus = *pool->asked.cpus;
        pool->asked.cpus = &pool->cpus;
        CPU_OR(&cpus, &cpus, &pool->cpus);
    }
    int usable = CPU_COUNT(&cpus);
    pool->alone = usable == 1;
    pool->most_ahead = usable > 2 ? usable - 1 : 1;
    pool->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (pool->epoll < 0) {
        return errno;
    }
    pool->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (pool->wake_fd < 0) {
        return errno;
    }
    for (int i = 0; i < pool->count; i++) {
        pool->workers[i].spare_fd = fcntl(pool->wake_fd, F_DUPFD_CLOEXEC, 0);
        if (pool->workers[i].spare_fd < 0) {
            return errno;
        }
    }
    int err = watch_fd(pool, pool->wake_fd, EPOLLIN, NULL);
    /* A seccomp policy that forbids write(2) is found out now, not later. */
    return err != 0 ? err : signal_fd(pool->wake_fd);
}

int
pool_new(const struct pool_options *options, struct pool **made,
         struct pool_scheduling *got)
{
    int count = options->threads + options->spares;
    struct pool *pool =
        calloc(1, sizeof(*pool) + (size_t)count * sizeof(struct worker));
    if (pool == NULL) {
        return ENOMEM;
    }
    pool->asked = *options;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, count_forks);
    pool->owner = getpid();
    pool->forks = atomic_load(&forks);
    pool->epoll = -1;
    pool->wake_fd = -1;
    pool->next_wake = INT64_MAX;
    pool->patience = ARRIVE;
    pool->count = count;
    for (int i = 0; i < count; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].number = i;
        pool->workers[i].spare_fd = -1;
    }
    atomic_init(&pool->refs, 1);
    int err = open_pool(pool);
    if (err == 0) {
        err = start_all(pool);
    }
    if (err != 0) {
        pool_close(pool, INT64_MAX, false);
        pool_release(pool);
        return err;
    }
    *got = pool->got;
    *made = pool;
    return 0;
}

/* With the lock held: all graces are over. */
static void
cut_graces(struct pool *pool)
{
    for (struct job *job = pool->jobs; job != NULL; job = job->next) {
        if (!atomic_load(&job->done) && atomic_load(&job->sent) == NOT_SENT) {
            job->cut = true;
            attend(pool, job);
        }
    }
}

/* How many wait for their SIGKILL?  With the lock held. */
static int
count_unsent(const struct pool *pool)
{
    int count = 0;
    for (struct job *job = pool->jobs; job != NULL; job = job->next) {
        count += !atomic_load(&job->done) && atomic_load(&job->sent) < SENT;
    }
    return count;
}

/* Wait for a change, or until then.  With the lock held. */
static void
wait_for_change(struct pool *pool, int64_t deadline)
{
    struct timespec until = {
        .tv_sec = (time_t)(deadline / (1000 * MS)),
        .tv_nsec = (long)(deadline % (1000 * MS)),
    };
    pthread_cond_timedwait(&pool->changed, &pool->lock, &until);
}

void
pool_hurry(struct pool *pool)
{
    int64_t deadline = reap_now() + 1000 * MS;

    lock(pool);
    cut_graces(pool);
    while (count_unsent(pool) > 0 && reap_now() < deadline) {
        wait_for_change(pool, reap_now() + MS);
    }
    unlock(pool);
}

/* Workers that are stuck with a job that is done.  With the lock held. */
static int
count_lost(const struct pool *pool)
{
    int count = 0;
    for (int i = 0; i < pool->count; i++) {
        const struct worker *worker = &pool->workers[i];
        count += worker->job != NULL && atomic_load(&worker->job->done) &&
                 worker->since < reap_now() - STUCK;
    }
    return count;
}

/* Is there nothing left to wait for?  With the lock held. */
static bool
is_closed(struct pool *pool)
{
    int lost = count_lost(pool);

    if (pool->unfinished > 0) {
        return false;
    }
    if (lost == pool->count && pool->queue != NULL) {
        /* These were killed and their results are told; nobody is left who
         * could release them.
         */
        while (pool->queue != NULL) {
            drop_from_queue(pool, pool->queue);
        }
        wake_all(pool);
    }
    return pool->live == lost;
}

bool
pool_close(struct pool *pool, int64_t deadline, bool cut)
{
    bool in_time = true;

    lock(pool);
    pool->closing = true;
    atomic_store(&pool->closed, true);
    if (is_over(pool)) {
        wake_all(pool);
    }
    while (in_time && !is_closed(pool)) {
        int64_t soon = reap_now() + STUCK;
        wait_for_change(pool, soon < deadline ? soon : deadline);
        in_time = reap_now() < deadline;
    }
    in_time = is_closed(pool);
    if (!in_time && cut) {
        cut_graces(pool);
    }
    unlock(pool);
    if (in_time) {
        part_with_threads(pool);
    }
    return in_time;
}

void
pool_release(struct pool *pool)
{
    if (is_forked(pool)) {
        return; /* the threads are the parent's */
    }
    lock(pool);
    pool->closing = true;
    atomic_store(&pool->closed, true);
    if (is_over(pool)) {
        wake_all(pool);
    }
    unlock(pool);
    part_with_threads(pool);
    unref(pool);
}
