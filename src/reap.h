/* The kill protocol for one pidfd.
 *
 * SIGTERM and a grace, if asked for; a look at the robust locks; SIGKILL and
 * process_mrelease with nothing between them; then the wait until the victim
 * has ended or what became of its memory is known.  With many threads SIGKILL
 * does not wait for the look, and with very many the release waits for the end.
 *
 * There are two ways to drive it, with the same protocol in both:
 *
 * reap_run() does all of it in the caller's thread.  It returns early, with
 * REAP_PAUSED, when a wait was interrupted, so that the caller can look at its
 * signals; called again, it goes on where it was.
 *
 * reap_advance() never blocks: it says what is due next, and who drives many
 * victims at once waits, strikes and releases wherever it wants to.
 *
 * No allocation, no state outside the struct.
 */

#ifndef MRELEASE_REAP_H
#define MRELEASE_REAP_H

#include <stdbool.h>
#include <stdint.h>             /* int64_t */
#include <sys/types.h>          /* pid_t */

#include "locks.h"
#include "procfs.h"

enum reap_outcome {
    REAP_ALIVE,                 /* the process is not dying */
    REAP_RELEASED,              /* everything releasable is released */
    REAP_EXITED,                /* it ended, its memory went with it */
    REAP_EXITING,               /* too late to release, and not ended yet */
    REAP_PARTIAL,               /* part of it may still be held */
    REAP_SHARED,                /* somebody who is not dying shares it */
    REAP_DUMPING,               /* a core dump is being written from it */
    REAP_LOCKED,                /* withheld: robust locks are held */
    REAP_UNSUPPORTED,           /* the system call is not to be had here */
};

/* Why reap_run() refused: the kernel's errno, or this. */
#define REAP_EKTHREAD (-1)      /* a kernel thread */

enum reap_progress {
    REAP_DONE,
    REAP_REFUSED,               /* no signal was sent; see refused */
    REAP_PAUSED,                /* by reap_run() alone */
    /* By reap_advance() and what it is used with: */
    REAP_WAIT,                  /* until wake_at, or until an fd has news */
    REAP_STRIKE,                /* the look and SIGKILL are due */
    REAP_RELEASE,               /* another try of the release is due */
    REAP_NEXT,                  /* ask reap_advance() */
};

/* All times are nanoseconds of CLOCK_MONOTONIC. */
struct reap {
    /* What is asked. */
    int pidfd;
    pid_t pid;
    bool send;                  /* false: release what is dying already */
    bool protect;               /* withhold the release if locks are held */
    int64_t begun;
    int64_t grace;              /* a duration; 0: SIGKILL at once */
    int64_t timeout;            /* a duration, from SIGKILL on */
    int escalate_fd;            /* ends the grace when it polls; -1: none */

    /* What came of it.  Times are 0 for what did not happen. */
    enum reap_outcome outcome;
    int refused;
    int err;                    /* errno of the last release, or 0 */
    int attempts;               /* calls of process_mrelease */
    enum locks locks;           /* meaningful with protect */
    bool raised;
    bool has_footprint;
    struct procfs_status before;        /* just before the kill */
    int64_t terminated;         /* SIGTERM went out */
    int64_t signalled;          /* SIGKILL went out */
    int64_t released;           /* the release succeeded */
    int64_t exited;             /* the whole thread group was seen ended */
    bool freed;                 /* the memory is known to be back */

    int memory;         /* -1 to begin with; see procfs_open_memory() */
    bool in_exec;       /* see procfs_is_in_exec(): it has no locks */

    /* For who drives it with reap_advance(). */
    int64_t wake_at;            /* with REAP_WAIT */
    bool releasing;             /* a release is to be reported, */
    bool queued;                /* and has not begun yet */
    bool to_raise;              /* it will be raised: give it time to end */

    /* Where it is.  For reap.c alone; zero to begin with. */
    int step;
    short escalate_events;
    bool escalated;
    bool hurried;
    bool retrying;
    bool was_dying;
    bool was_used;
    bool until_end;
    int64_t tried_raise;
    int64_t pause;
    int64_t next_try;
    int64_t deadline;
};

enum reap_progress
reap_run(struct reap *reap);

/* No more waiting: the next reap_run() ends a grace at once and returns
 * REAP_DONE (or REAP_REFUSED) without another pause.
 */
void
reap_hurry(struct reap *reap);

/* Go on as far as is possible without blocking.  REAP_STRIKE is answered with
 * reap_prepare() and, if that says REAP_STRIKE as well, with SIGKILL and
 * reap_struck(); REAP_RELEASE with process_mrelease() and reap_tried().
 */
enum reap_progress
reap_advance(struct reap *reap);

/* Before SIGKILL: read the footprint. */
enum reap_progress
reap_prepare(struct reap *reap);

/* After that: how long, in nanoseconds, the release is to wait once SIGKILL was
 * sent.  0, but for a victim with so many threads and so little memory that its
 * own end is sooner, if it comes to that.
 */
int64_t
reap_patience(const struct reap *reap);

/* SIGKILL went out at this time, or failed with err. */
enum reap_progress
reap_struck(struct reap *reap, int err, int64_t at);

/* Robust locks are held: there will be no release. */
void
reap_withhold(struct reap *reap);

/* process_mrelease() was called, and gave err or 0 at this time. */
void
reap_tried(struct reap *reap, int err, int64_t at);

/* Once SIGKILL went out: raise the victim, if that was not tried yet. */
void
reap_raise(struct reap *reap);

/* What to poll(2) the fd for that ends the grace. */
short
reap_news_of(int fd);

/* The fd that ends the grace has these events of poll(2). */
void
reap_heard(struct reap *reap, short events);

/* Give back what the protocol holds, whatever became of it. */
void
reap_finish(struct reap *reap);

int64_t
reap_now(void);

#endif /* MRELEASE_REAP_H */
