#include "reap.h"

#include <errno.h>
#include <poll.h>               /* ppoll() */
#include <signal.h>             /* SIGKILL, SIGTERM */
#include <sys/stat.h>           /* fstat() */
#include <time.h>               /* clock_gettime() */

#include "raise.h"
#include "scheduling.h"
#include "syscalls.h"

#define US INT64_C(1000)
#define MS INT64_C(1000000)

/* A released victim that has not ended after this long is stuck, stopped or
 * starved.  Its memory is back, so nothing is gained by more waiting.
 */
#define SETTLE (20 * MS)

/* How long after the call victims that are in execve() are waited for. */
#define PATIENCE_IN_EXEC (2 * MS)

/* Memory that only the end of the victim gives back is worth waiting for
 * from this size on; nearly every process has a few pages of it.
 */
#define WORTH_WAITING (INT64_C(1) << 20)

/* Between two attempts of the release: short first, for a notifier that is
 * done in a moment, then longer.
 */
#define PAUSE_FIRST (MS / 2)
#define PAUSE_LAST (8 * MS)

#define LONGEST_WAIT (250 * MS)

/* The locks of more threads are looked at after SIGKILL. */
#define THREADS_LOOKED_AT 128

/* To raise more of them takes longer than it is worth, if the scheduler does
 * not put them behind us.
 */
#define THREADS_RAISED 512

/* With less memory a thread than this, that goes for the release as well (some
 * 20 us a MiB are gained, a look at the locks of a thread takes some 5): such a
 * victim is first given the time in which its threads end by themselves.
 */
#define WORTH_A_THREAD (INT64_C(160) << 10)
#define END_OF_THREAD (50 * US)

enum { BEGIN, GRACE, STRIKE, FOLLOW, ENDED };

int64_t
reap_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 * MS + now.tv_nsec;
}

static int64_t
earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* a + b for a duration b >= 0 that may be as good as infinite. */
static int64_t
after(int64_t a, int64_t b)
{
    return b > INT64_MAX - a ? INT64_MAX : a + b;
}

static enum reap_progress
wait_until(struct reap *reap, int64_t when)
{
    reap->wake_at = when;
    return REAP_WAIT;
}

static void
set_deadline(struct reap *reap)
{
    int64_t from = reap->begun;
    if (reap->send) {
        from = reap->signalled != 0 ? reap->signalled : reap_now();
    }
    reap->deadline = after(from, reap->timeout);
}

/* Has the whole thread group ended?  Notes the time. */
static bool
is_ended(struct reap *reap)
{
    struct pollfd fd = {.fd = reap->pidfd, .events = POLLIN};
    if (reap->exited == 0 && poll(&fd, 1, 0) == 1 && (fd.revents & POLLIN)) {
        reap->exited = reap_now();
    }
    return reap->exited != 0;
}

/* A signal for the caller cuts the wait short. */
static bool
has_ended_within(struct reap *reap, int64_t time)
{
    struct pollfd fd = {.fd = reap->pidfd, .events = POLLIN};
    struct timespec wait = {.tv_sec = (time_t)(time / (1000 * MS)),
                            .tv_nsec = (long)(time % (1000 * MS))};
    ppoll(&fd, 1, &wait, NULL);
    return is_ended(reap);
}

static enum reap_progress
done(struct reap *reap, enum reap_outcome outcome)
{
    reap->outcome = outcome;
    return REAP_DONE;
}

/* The victim has ended; what about its memory? */
static enum reap_progress
ended(struct reap *reap)
{
    reap->step = ENDED;
    return REAP_NEXT;
}

static enum reap_progress
refuse(struct reap *reap, int why)
{
    reap->refused = why;
    return REAP_REFUSED;
}

/* Has it no memory of its own?  Then it has ended, is about to, or it is a
 * kernel thread.
 */
static bool
has_no_memory(const struct reap *reap)
{
    return reap->has_footprint && reap->before.user == 0;
}

/* The victim has ended.  Its memory went with it, unless somebody else still
 * uses it: a process that shares it, or for a moment a reader of /proc.  When
 * they let go of it they tear it down, and nothing tells when that is done.
 */
static enum reap_progress
conclude(struct reap *reap)
{
    if (reap->outcome == REAP_RELEASED) {
        reap->freed = true;
        return REAP_DONE;
    }
    if (has_no_memory(reap)) {
        reap->freed = true;
        return done(reap, REAP_EXITED);
    }
    if (reap->deadline == 0) {
        set_deadline(reap);
    }
    enum procfs_memory memory = procfs_ask_memory(reap->memory);
    if (memory == PROCFS_MEMORY_USED) {
        int64_t now = reap_now();
        reap->was_used = true;
        if (!reap->hurried && now < reap->exited + SETTLE &&
            now < reap->deadline)
        {
            return wait_until(reap, now + PAUSE_FIRST);
        }
    }
    reap->freed = memory == PROCFS_MEMORY_UNUSED && !reap->was_used &&
                  reap->outcome != REAP_SHARED;
    switch (reap->outcome) {
    case REAP_LOCKED:
    case REAP_UNSUPPORTED:
    case REAP_SHARED:
        return REAP_DONE;       /* that tells more than how it ended */
    default:
        return done(reap,
                    memory == PROCFS_MEMORY_USED ? REAP_SHARED : REAP_EXITED);
    }
}

/* Nothing to kill.  REAP_NEXT if there is. */
static enum reap_progress
check_no_memory(struct reap *reap)
{
    if (is_ended(reap)) {
        if (reap->send && reap->terminated == 0 &&
            sys_pidfd_send_signal(reap->pidfd, 0) < 0 && errno == ESRCH)
        {
            return refuse(reap, ESRCH); /* what was read is a stranger's */
        }
        return conclude(reap);
    }
    struct procfs_stat stat;
    if (procfs_read_stat(reap->pid, &stat) == 0 && stat.kernel_thread) {
        return refuse(reap, REAP_EKTHREAD);
    }
    return REAP_NEXT;
}

static void
close_memory(struct reap *reap)
{
    if (reap->memory >= 0) {
        close(reap->memory);
        reap->memory = -1;
    }
}

/* The memory is opened first: what the status then tells of is what it is. */
static void
read_footprint(struct reap *reap)
{
    struct procfs_status now;
    /* So that many do not wait for each of many. */
    bool patient = reap_now() < reap->begun + PATIENCE_IN_EXEC;
    int memory = procfs_open_memory(reap->pid, patient);
    reap->in_exec = memory < 0 && errno == EBUSY;
    int err = procfs_read_status(reap->pid, &now);
    bool is_read = err == 0;
    pid_t user = is_read ? now.user : 0;
    if (user != reap->pid) {
        /* Older kernels open it all the same, and then call it unused. */
        if (memory >= 0) {
            close(memory);
        }
        memory = user != 0 ? procfs_open_memory(user, false) : -1;
    }
    if (user == 0 && reap->terminated != 0) {
        /* It has let go of its memory since SIGTERM: what that was, and who
         * else uses it, is known from before.  Or that cannot be read now, for
         * want of a file descriptor: it may have more threads, or run another
         * program.
         */
        if (procfs_has_no_file(err)) {
            reap->before.threads = 0;
            close_memory(reap);
            /* By the file descriptor of that. */
            reap->in_exec = procfs_is_in_exec(reap->pid, false);
        }
        return;
    }
    close_memory(reap);
    reap->memory = memory;
    reap->has_footprint = is_read;
    if (is_read) {
        reap->before = now;
    }
}

/* If the victim was waited for, what was read of its pid may be of another
 * process.
 */
static void
forget_stranger(struct reap *reap)
{
    if (sys_pidfd_send_signal(reap->pidfd, 0) < 0 && errno == ESRCH) {
        reap->has_footprint = false;
        close_memory(reap);
    }
}

/* What to wait for on the fd that ends the grace.  A file of the kernel's can
 * always be read, and tells of news by POLLPRI (a pressure trigger does).
 */
short
reap_news_of(int fd)
{
    struct stat found;
    bool is_file = fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
    return is_file ? POLLPRI : POLLIN | POLLPRI;
}

static enum reap_progress
begin_grace(struct reap *reap)
{
    reap->escalate_events = reap_news_of(reap->escalate_fd);
    read_footprint(reap);
    if (has_no_memory(reap)) {
        enum reap_progress progress = check_no_memory(reap);
        if (progress != REAP_NEXT) {
            return progress;
        }
    }
    int64_t now = reap_now();
    if (sys_pidfd_send_signal(reap->pidfd, SIGTERM) < 0) {
        return refuse(reap, errno);
    }
    reap->terminated = now;
    reap->step = GRACE;
    return REAP_NEXT;
}

static enum reap_progress
wait_grace(struct reap *reap)
{
    int64_t end = after(reap->terminated, reap->grace);

    if (is_ended(reap)) {
        return ended(reap);
    }
    if (!reap->hurried && !reap->escalated && reap_now() < end) {
        return wait_until(reap, end);
    }
    reap->step = STRIKE;
    return REAP_NEXT;
}

void
reap_heard(struct reap *reap, short events)
{
    if (events & (POLLERR | POLLNVAL)) {
        /* What it watched is gone (a removed cgroup), or it was closed:
         * nothing will ever be told by it.
         */
        reap->escalate_fd = -1;
    }
    else if (events != 0) {
        reap->escalated = true;
    }
}

enum reap_progress
reap_prepare(struct reap *reap)
{
    read_footprint(reap);
    if (has_no_memory(reap)) {
        enum reap_progress progress = check_no_memory(reap);
        if (progress != REAP_NEXT) {
            return progress;
        }
    }
    if (reap->has_footprint) {
        reap->until_end =
            reap->before.shmem + reap->before.hugetlb >= WORTH_WAITING;
    }
    return REAP_STRIKE;
}

static void
look_at_locks(struct reap *reap)
{
    bool single = reap->has_footprint && reap->before.threads == 1;
    bool no_fd;
    if (reap->in_exec) {
        reap->locks = LOCKS_FREE;
        return;
    }
    reap->locks = locks_look(reap->pid, single, &no_fd);
    if (no_fd && reap->memory >= 0) {
        /* That was the last; the locks matter more. */
        close_memory(reap);
        reap->locks = locks_look(reap->pid, single, &no_fd);
    }
}

static bool
is_withheld(const struct reap *reap)
{
    return reap->protect && reap->locks == LOCKS_HELD;
}

static void
lengthen_pause(struct reap *reap)
{
    reap->pause =
        reap->pause == 0 ? PAUSE_FIRST : earlier(2 * reap->pause, PAUSE_LAST);
}

/* Is the victim known to be dying? */
static bool
is_dying(const struct reap *reap)
{
    return reap->signalled != 0 || procfs_is_dying(reap->pid);
}

/* Note what the last call of an attempt to release came to. */
static void
note_attempt(struct reap *reap, int err, int64_t at)
{
    reap->attempts++;
    reap->err = err;
    reap->retrying = false;
    switch (err) {
    case 0:
        reap->released = at;
        reap->outcome = REAP_RELEASED;
        return;
    case ESRCH:
        reap->outcome = REAP_EXITING;
        return;
    case EAGAIN:
    case EINTR:
        reap->outcome = REAP_PARTIAL;
        break;
    case EINVAL: {
        struct procfs_status status;
        if (procfs_read_status(reap->pid, &status) == 0 && status.dumping) {
            reap->outcome = REAP_DUMPING;
        }
        else if (reap->signalled != 0 || reap->was_dying) {
            reap->outcome = REAP_SHARED;
        }
        else if (is_dying(reap)) {
            reap->was_dying = true;
            reap->outcome = REAP_EXITING;
            return;
        }
        else {
            reap->outcome = REAP_ALIVE;
            return;
        }
        break;
    }
    default:
        reap->outcome = REAP_UNSUPPORTED;
        return;
    }
    /* These may change: a notifier lets go, a dump is cut short, the sharer
     * was a vfork() child that calls exec.
     */
    reap->retrying = true;
    lengthen_pause(reap);
    reap->next_try = at + reap->pause;
}

static void
release(struct reap *reap)
{
    int rc = sys_process_mrelease(reap->pidfd, 0);
    note_attempt(reap, rc < 0 ? errno : 0, reap_now());
}

/* Is a core dump being written?  It may be long, and it is not teardown.  As
 * it was before the signal: whoever reads the status of a dying process may
 * come to be the last user of its memory, and then tears it down.
 */
static bool
is_dumping(const struct reap *reap)
{
    return reap->attempts > 0 ? reap->outcome == REAP_DUMPING
                              : reap->has_footprint && reap->before.dumping;
}

/* Has it so many threads that to deal with each takes longer than is gained?
 * Not if the scheduler puts it behind us, or if only its end gives back some
 * memory.
 */
static bool
is_crowd(const struct reap *reap)
{
    return reap->has_footprint && !reap->until_end &&
           reap->before.threads > THREADS_RAISED &&
           !scheduling_is_behind(reap->pid);
}

int64_t
reap_patience(const struct reap *reap)
{
    const struct procfs_status *before = &reap->before;
    int64_t size = before->anon + before->swap + before->file;

    if (!is_crowd(reap) || size / before->threads >= WORTH_A_THREAD) {
        return 0;
    }
    return earlier(before->threads * END_OF_THREAD, reap->timeout / 2);
}

void
reap_raise(struct reap *reap)
{
    if (reap->tried_raise == 0 && !is_ended(reap) && is_dying(reap) &&
        !is_dumping(reap) && !is_crowd(reap))
    {
        reap->tried_raise = reap_now();
        reap->raised = raise_victim(reap->pidfd, reap->pid);
    }
}

/* The victim is dying, and the release is tried or withheld. */
static enum reap_progress
begin_follow(struct reap *reap, bool withhold)
{
    if (withhold) {
        reap->outcome = REAP_LOCKED;
    }
    set_deadline(reap);
    reap->step = FOLLOW;
    return REAP_NEXT;
}

enum reap_progress
reap_struck(struct reap *reap, int err, int64_t at)
{
    if (err == 0) {
        reap->signalled = at;
        return begin_follow(reap, false);
    }
    if (reap->terminated == 0) {
        return refuse(reap, err);
    }
    if (err == ESRCH || is_ended(reap)) {
        /* It ended at the very end of its grace. */
        forget_stranger(reap);
        if (reap->exited == 0) {
            reap->exited = at;
        }
        return ended(reap);
    }
    /* It had SIGTERM but may not have SIGKILL: it has become another user's
     * since.
     */
    reap->err = err;
    return done(reap, REAP_ALIVE);
}

void
reap_withhold(struct reap *reap)
{
    reap->outcome = REAP_LOCKED;
}

void
reap_tried(struct reap *reap, int err, int64_t at)
{
    note_attempt(reap, err, at);
}

/* SIGKILL, and the release if it is not withheld; a look at the locks between
 * them, if `late_look`.
 */
static enum reap_progress
kill_and_release(struct reap *reap, bool late_look)
{
    int64_t patience = reap_patience(reap);
    bool behind = scheduling_is_behind(reap->pid);
    int64_t now = reap_now();
    if (sys_pidfd_send_signal(reap->pidfd, SIGKILL) < 0) {
        return reap_struck(reap, errno, now);
    }
    reap->signalled = now;
    if (patience > 0 && has_ended_within(reap, patience)) {
        return reap_struck(reap, 0, now);
    }
    if (behind) {
        /* It does not get to run soon, so there is no race to be lost; but
         * it can help, where the caller itself has to wait for a CPU.
         */
        reap_raise(reap);
    }
    if (late_look) {
        look_at_locks(reap);
    }
    bool withhold = is_withheld(reap);
    if (!withhold) {
        /* Nothing else may come between the two calls: the victim is out of
         * reach within tens of microseconds.
         */
        release(reap);
    }
    enum reap_progress progress = reap_struck(reap, 0, now);
    if (withhold) {
        reap_withhold(reap);
    }
    reap_raise(reap);
    return progress;
}

/* Without a signal: the process is dying already, or is left alone. */
static enum reap_progress
release_only(struct reap *reap, bool withhold)
{
    if (is_ended(reap)) {
        forget_stranger(reap);
        return ended(reap);
    }
    if (withhold && !is_dying(reap)) {
        return done(reap, REAP_ALIVE);
    }
    if (!withhold) {
        release(reap);
        if (reap->was_dying) {
            release(reap);      /* it may have come after the first call */
        }
        if (reap->outcome == REAP_ALIVE ||
            (reap->outcome == REAP_UNSUPPORTED && !is_dying(reap)))
        {
            return REAP_DONE;
        }
    }
    enum reap_progress progress = begin_follow(reap, withhold);
    reap_raise(reap);
    return progress;
}

static enum reap_progress
strike(struct reap *reap)
{
    enum reap_progress progress = reap_prepare(reap);
    if (progress != REAP_STRIKE) {
        return progress;
    }
    /* SIGKILL must not wait for a look at many threads.  A look after it sees
     * as much, and while they all end there is time for it.  Nor for one that
     * may take for ever: where nothing can be read, it may be in execve().
     */
    bool late_look =
        reap->protect && reap->send &&
        (!reap->has_footprint || reap->before.threads > THREADS_LOOKED_AT);
    if (reap->protect && !late_look) {
        look_at_locks(reap);
    }
    return reap->send ? kill_and_release(reap, late_look)
                      : release_only(reap, is_withheld(reap));
}

/* A released victim has not ended.  If a thread still uses the memory, its
 * teardown has not begun and all was released by our call.  If none does, up
 * to some 10,000 pages may be in the batch that the victim's own teardown was
 * freeing when it lost its CPU, and only its end gives them back.
 */
static bool
is_all_released(const struct reap *reap)
{
    struct procfs_status status;
    /* A look at what is left, too: the call also returns 0, and does nothing,
     * where the kernel's own OOM reaper has given up, and before 5.18 it
     * passed over locked memory.  And in execve() that is the new memory: the
     * old one may still be torn down.
     */
    return procfs_read_status(reap->pid, &status) == 0 && status.user != 0 &&
           status.anon + status.swap < WORTH_WAITING &&
           !procfs_is_in_exec(reap->pid, false);
}

static enum reap_progress
follow(struct reap *reap)
{
    for (;;) {
        int64_t now = reap_now();
        int64_t until = reap->hurried ? now : reap->deadline;
        bool is_last = now >= until;
        if (is_ended(reap) && (!reap->releasing || reap->queued || is_last)) {
            return ended(reap);
        }
        if (reap->outcome == REAP_RELEASED && !reap->until_end &&
            !reap->to_raise)
        {
            int64_t from = reap->released > reap->tried_raise
                               ? reap->released
                               : reap->tried_raise;
            until = earlier(until, from + SETTLE);
        }
        if (now >= until && reap->outcome == REAP_RELEASED) {
            if (is_all_released(reap)) {
                reap->freed = true;
                return REAP_DONE;
            }
            reap->until_end = true;
            if (!is_last) {
                continue;
            }
        }
        if (now >= until) {
            if (is_ended(reap)) {
                return ended(reap);
            }
            /* Of a try that has not come back nothing is known yet: then it
             * is what the one before found.
             */
            bool unknown = reap->releasing && reap->attempts == 0;
            return unknown || reap->outcome == REAP_RELEASED
                       ? done(reap, REAP_PARTIAL)
                       : REAP_DONE;
        }
        if (reap->retrying && !reap->releasing) {
            if (now >= reap->next_try) {
                return REAP_RELEASE;
            }
            until = earlier(until, reap->next_try);
        }
        return wait_until(reap, until);
    }
}

enum reap_progress
reap_advance(struct reap *reap)
{
    enum reap_progress progress;

    if (reap->step == BEGIN && (!reap->send || reap->grace == 0)) {
        reap->step = STRIKE;
    }
    do {
        switch (reap->step) {
        case BEGIN:
            progress = begin_grace(reap);
            break;
        case GRACE:
            progress = wait_grace(reap);
            break;
        case STRIKE:
            return REAP_STRIKE;
        case FOLLOW:
            progress = follow(reap);
            break;
        default:
            progress = conclude(reap);
            break;
        }
    } while (progress == REAP_NEXT);
    return progress;
}

/* Wait as reap_advance() asked for.  false: the caller should look at its
 * signals first.  At the latest after a while, since a signal that arrives
 * just before a wait does not interrupt it.
 */
static bool
wait_here(struct reap *reap, int64_t entered)
{
    struct pollfd fds[2] = {
        {.fd = reap->exited == 0 ? reap->pidfd : -1, .events = POLLIN},
        {.fd = reap->step == GRACE ? reap->escalate_fd : -1,
         .events = reap->escalate_events},
    };
    int64_t now = reap_now();
    int64_t left = earlier(reap->wake_at, now + LONGEST_WAIT) - now;
    if (left < 0) {
        left = 0;
    }
    struct timespec timeout = {
        .tv_sec = (time_t)(left / (1000 * MS)),
        .tv_nsec = (long)(left % (1000 * MS)),
    };
    int n = ppoll(fds, 2, &timeout, NULL);
    if (n < 0 || (n == 0 && reap_now() - entered >= LONGEST_WAIT)) {
        return false;
    }
    reap_heard(reap, fds[1].revents);
    return true;
}

enum reap_progress
reap_run(struct reap *reap)
{
    int64_t entered = reap_now();

    for (;;) {
        enum reap_progress progress = reap_advance(reap);
        if (progress == REAP_STRIKE) {
            progress = strike(reap);
        }
        switch (progress) {
        case REAP_NEXT:
            break;
        case REAP_RELEASE:
            release(reap);
            reap_raise(reap);
            break;
        case REAP_WAIT:
            if (!wait_here(reap, entered)) {
                return REAP_PAUSED;
            }
            break;
        default:
            return progress;
        }
    }
}

void
reap_hurry(struct reap *reap)
{
    reap->hurried = true;
}

void
reap_finish(struct reap *reap)
{
    close_memory(reap);
}
