#include "locks.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>             /* uintptr_t */
#include <sys/uio.h>            /* process_vm_readv() */

#include "procfs.h"
#include "syscalls.h"

/* struct robust_list_head of <linux/futex.h>, with the victim's pointers as
 * numbers.  It is empty when `next` points back to the head itself; the
 * lowest bit of a pointer marks a priority-inheriting mutex.  `pending` is
 * set around the taking and the giving back of a lock.
 */
struct head {
    uintptr_t next;
    intptr_t futex_offset;
    uintptr_t pending;
};

/* Threads whose heads are read with one system call. */
#define BATCH 32

struct batch {
    int count;
    pid_t tid[BATCH];
    void *address[BATCH];
    struct head head[BATCH];
};

static bool
is_held(const struct head *head, const void *address)
{
    uintptr_t next = head->next & ~(uintptr_t)1;
    return head->pending != 0 || (next != 0 && next != (uintptr_t)address);
}

/* Read the heads of a batch and look at them; the batch is empty after. */
static enum locks
look_at_batch(struct batch *batch)
{
    struct iovec local[BATCH];
    struct iovec remote[BATCH];
    enum locks found = LOCKS_FREE;
    int first = 0;

    for (int i = 0; i < batch->count; i++) {
        local[i].iov_base = &batch->head[i];
        local[i].iov_len = sizeof(batch->head[i]);
        remote[i].iov_base = batch->address[i];
        remote[i].iov_len = sizeof(batch->head[i]);
    }
    while (first < batch->count) {
        unsigned long left = (unsigned long)(batch->count - first);
        ssize_t n = process_vm_readv(batch->tid[first], local + first, left,
                                     remote + first, left, 0);
        bool has_ended = n < 0 && errno == ESRCH;
        int whole = n < 0 ? 0 : (int)((size_t)n / sizeof(struct head));
        for (int i = first; i < first + whole; i++) {
            if (is_held(&batch->head[i], batch->address[i])) {
                batch->count = 0;
                return LOCKS_HELD;
            }
        }
        first += whole;
        if (whole == 0) {
            /* Not even this one could be read.  If that was for ESRCH, the
             * thread has let go of the memory, and its locks were handed on
             * before.  The others are read through the next thread.
             */
            if (!has_ended) {
                found = LOCKS_UNKNOWN;
            }
            first++;
        }
    }
    batch->count = 0;
    return found;
}

/* Held outweighs unknown outweighs free.  Once one is held nobody looks any
 * further, so `before` is not that.
 */
static enum locks
worse(enum locks before, enum locks now)
{
    return before == LOCKS_UNKNOWN && now != LOCKS_HELD ? LOCKS_UNKNOWN : now;
}

/* Add a thread to the batch.  LOCKS_UNKNOWN if its head cannot be had. */
static enum locks
add_thread(struct batch *batch, pid_t tid, bool *registered)
{
    void *address;
    size_t size;

    if (sys_get_robust_list(tid, &address, &size) < 0) {
        /* ESRCH: the thread has ended, its locks were handed on. */
        return errno == ESRCH ? LOCKS_FREE : LOCKS_UNKNOWN;
    }
    if (address != NULL) {
        *registered = true;
        batch->tid[batch->count] = tid;
        batch->address[batch->count++] = address;
    }
    return LOCKS_FREE;
}

/* The kernel's walk through the threads may pass over some while others end.
 * So often is it made again, at most: their number falls each time.
 */
#define WALKS 64

/* Once through the list of threads; `seen` is how many there were. */
static enum locks
walk(struct procfs_tasks *tasks, struct batch *batch, bool *registered,
     int *seen)
{
    enum locks found = LOCKS_FREE;
    pid_t tid = 0;

    *seen = 0;
    while (found != LOCKS_HELD && (tid = procfs_tasks_next(tasks)) > 0) {
        ++*seen;
        found = worse(found, add_thread(batch, tid, registered));
        if (batch->count == BATCH) {
            found = worse(found, look_at_batch(batch));
        }
    }
    if (found != LOCKS_HELD && batch->count > 0) {
        found = worse(found, look_at_batch(batch));
    }
    return tid < 0 ? worse(found, LOCKS_UNKNOWN) : found;
}

/* The threads of /proc/PID/task. */
static enum locks
look_at_threads(pid_t pid, struct batch *batch, bool *registered, bool *no_fd)
{
    struct procfs_tasks tasks;
    enum locks found = LOCKS_UNKNOWN;

    int err = procfs_tasks_open(&tasks, pid);
    if (err != 0) {
        *no_fd = procfs_has_no_file(err);
        /* The leader may still be known to hold one. */
        add_thread(batch, pid, registered);
        return worse(LOCKS_UNKNOWN, look_at_batch(batch));
    }
    for (int i = 0; i < WALKS; i++) {
        int seen;
        int threads = procfs_tasks_count(&tasks);
        found = walk(&tasks, batch, registered, &seen);
        if (found == LOCKS_HELD || seen >= threads) {
            break;
        }
        found = LOCKS_UNKNOWN;
        procfs_tasks_rewind(&tasks);
    }
    procfs_tasks_close(&tasks);
    return found;
}

enum locks
locks_look(pid_t pid, bool single, bool *no_fd)
{
    struct batch batch = {.count = 0};
    bool registered = false;

    *no_fd = false;
    enum locks found;
    if (single) {
        found = add_thread(&batch, pid, &registered);
        found = worse(found, look_at_batch(&batch));
    }
    else {
        found = look_at_threads(pid, &batch, &registered, no_fd);
    }
    /* get_robust_list() shows lists of the caller's own word size only. */
    if (found == LOCKS_FREE && !registered && !procfs_has_our_words(pid)) {
        found = LOCKS_UNKNOWN;
    }
    return found;
}
