/* Native threads that kill and release many victims at once.
 *
 * Whoever submits a job sends its SIGKILL there and then, so that a kill waits
 * for no thread.  The release is done by a worker, which is called ahead of the
 * kill: it looks at the robust locks and is in a loop of process_mrelease()
 * before the signal goes out, so that the victim cannot be out of reach first.
 * Waiting for it to get there is bounded.  A watcher, one for all jobs, follows
 * the victims to their end, keeps the deadlines and raises the dying.
 *
 * All threads are made by pool_new(); a kill makes none.  A worker that is
 * stuck in the kernel is replaced by a spare one.  Every job completes through
 * an eventfd of its own.  Once it is submitted a job takes no memory and no
 * file descriptor but those that a look at /proc needs for a moment.
 *
 * Every function may be called from any thread.  After fork() a child has no
 * threads: there, pool_state() says POOL_FORKED, and nothing else is asked.
 */

#ifndef MRELEASE_POOL_H
#define MRELEASE_POOL_H

#include <sched.h>              /* cpu_set_t */
#include <stdbool.h>
#include <stdint.h>             /* int64_t */

#include "reap.h"
#include "scheduling.h"

struct pool;
struct job;

struct pool_options {
    int threads;                /* workers at work at the same time */
    int spares;                 /* more of them, for those that are stuck */
    enum scheduling_rung best;  /* where on the ladder to begin, */
    enum scheduling_rung least; /* and what must be had (NONE: nothing) */
    const cpu_set_t *cpus;      /* NULL: the caller's */
};

/* What the threads have obtained. */
struct pool_scheduling {
    struct sys_sched_attr attr;
    int refused;                /* why not the best: an errno, or 0 */
    cpu_set_t cpus;
};

/* 0, or an errno: EPERM if the least scheduling may not be had, EINVAL if none
 * of the CPUs may be used, EAGAIN if there can be no more threads.
 */
int
pool_new(const struct pool_options *options, struct pool **made,
         struct pool_scheduling *got);

#define POOL_OPEN 0
#define POOL_CLOSED 1
#define POOL_FORKED 2

int
pool_state(const struct pool *pool);

/* A job for one victim: what is asked of it stands in `asked` (see reap.h).
 * Its fds are duplicated.  0, or an errno.
 */
int
job_make(const struct reap *asked, struct job **made);

/* Send SIGTERM, or SIGKILL, to the victims of all these jobs, the biggest
 * first, and see to the rest.  Afterwards each is under way, done or refused.
 * Only jobs that were not submitted yet; they are put into another order.
 * POOL_OPEN, or why not: then nothing happened.
 */
int
pool_submit(struct pool *pool, struct job **jobs, int count);

/* End what graces are left: SIGKILL now.  Waits until that is sent, for at
 * most a second.
 */
void
pool_hurry(struct pool *pool);

/* Take no more jobs, and wait until all are done and the threads have ended,
 * or until `deadline` (CLOCK_MONOTONIC); after that, `cut` ends what graces are
 * left.  A thread that is stuck with a job that is done is not waited for.  true
 * if all was done in time.
 */
bool
pool_close(struct pool *pool, int64_t deadline, bool cut);

/* Let go of the pool.  Jobs under way are seen to their end. */
void
pool_release(struct pool *pool);

/* An eventfd that can be read once the job is done.  It is the job's. */
int
job_fd(const struct job *job);

bool
job_is_done(const struct job *job);

/* What came of it.  Only once it is done, or was refused. */
const struct reap *
job_result(const struct job *job);

/* Why nothing was sent, as in reap.h; 0 if something was, or had ended. */
int
job_refused(const struct job *job);

/* When the call of process_mrelease() began that meant something, or 0. */
int64_t
job_entered(const struct job *job);

void
job_release(struct job *job);

#endif /* MRELEASE_POOL_H */
