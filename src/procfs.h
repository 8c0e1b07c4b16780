/* What /proc/PID says about a process, read without touching its memory map.
 *
 * Only status, stat, statm, auxv and the list of threads are read: they come
 * from the kernel's own memory and do not wait for its mmap_lock, so they are
 * harmless beside a kill (cmdline, environ, maps and smaps are not).  For
 * another lock, see procfs_is_in_exec().
 *
 * A path with a pid in it names whoever has that pid at the moment of open().
 * Callers hold a pidfd: what was read is about the right process if the pidfd
 * shows afterwards that it had not been waited for yet.  A /proc of another
 * pid namespace names others by the same numbers: nothing is read there, as if
 * none were mounted.  Nor is anything read from a file that is not procfs's
 * own, or that tells another pid: both may have been mounted over it.
 */

#ifndef MRELEASE_PROCFS_H
#define MRELEASE_PROCFS_H

#include <stdbool.h>
#include <stdint.h>             /* int64_t */
#include <sys/types.h>          /* pid_t, ssize_t */

/* Is /proc mounted, and do its numbers mean what ours mean? */
bool
procfs_is_ours(void);

/* Does this errno mean that no file descriptor was left? */
bool
procfs_has_no_file(int err);

/* Memory is in bytes. */
struct procfs_status {
    int64_t anon;               /* RssAnon */
    int64_t file;               /* RssFile */
    int64_t shmem;              /* RssShmem */
    int64_t swap;               /* VmSwap */
    int64_t hugetlb;            /* HugetlbPages */
    pid_t pid;                  /* as it was asked for */
    pid_t tgid;                 /* differs from the pid asked for a thread */
    pid_t user;                 /* a thread that uses the memory, or 0 */
    int threads;
    bool dumping;               /* a core dump is being written */
    bool kill_pending;          /* SIGKILL was sent to it */
};

/* 0, or an errno: ENOENT or ESRCH when there is no such process. */
int
procfs_read_status(pid_t pid, struct procfs_status *status);

/* Is it in the middle of execve(2), where it has let go of its old memory and
 * of its robust locks, and has no code yet?  Until it is through, it holds a
 * lock (exec_update_lock) that others come to wait for: who opens its mem, asks
 * for its robust lists, or (6.18) reads its stat.  What it does meanwhile may
 * take for ever: it tears the old memory down, and closes files, of a FUSE file
 * system, say.  The patient wait for 2 ms first.
 */
bool
procfs_is_in_exec(pid_t tid, bool patient);

struct procfs_stat {
    int64_t started;            /* clock ticks since boot */
    bool kernel_thread;
    bool dying;                 /* it will not run user code again */
};

/* 0, or an errno: ENOENT or ESRCH when there is no such process, EBUSY when it
 * is in execve(2).
 */
int
procfs_read_stat(pid_t pid, struct procfs_stat *stat);

/* Will it never run user code again?  false when unreadable. */
bool
procfs_is_dying(pid_t pid);

/* The memory of a process, to be asked about even after it has ended.
 *
 * An fd for a thread that uses it, or -1: there is no such thread, it is in
 * execve(2) (see procfs_is_in_exec(); errno is EBUSY then), or the caller may
 * not trace the process (PTRACE_MODE_ATTACH).  It keeps no page, and what is
 * asked waits for no lock of the victim's.
 */
int
procfs_open_memory(pid_t tid, bool patient);

enum procfs_memory {
    PROCFS_MEMORY_UNKNOWN,      /* the fd is -1 */
    PROCFS_MEMORY_USED,         /* by its threads or other processes */
    PROCFS_MEMORY_UNUSED,       /* its last user has begun its teardown */
};

enum procfs_memory
procfs_ask_memory(int fd);

/* Is it a program of our own word size, or one without memory?  false also
 * when that is not known.
 */
bool
procfs_has_our_words(pid_t pid);

/* The threads of a process, without allocation. */
struct procfs_tasks {
    int fd;
    ssize_t have;               /* bytes in buffer */
    ssize_t at;                 /* the next entry */
    _Alignas(8) char buffer[2048];
};

/* 0, or an errno.  Only an opened list may be read or closed. */
int
procfs_tasks_open(struct procfs_tasks *tasks, pid_t pid);

/* How many threads there are now, or -1.  Other than the list, and than what
 * status says, it is exact, and asks nothing of the memory.
 */
int
procfs_tasks_count(const struct procfs_tasks *tasks);

/* Begin again with the first one. */
void
procfs_tasks_rewind(struct procfs_tasks *tasks);

/* A thread id, 0 at the end, or -1 if the list cannot be read on. */
pid_t
procfs_tasks_next(struct procfs_tasks *tasks);

/* Is this thread still one of the process the list was opened for? */
bool
procfs_tasks_has(const struct procfs_tasks *tasks, pid_t tid);

void
procfs_tasks_close(struct procfs_tasks *tasks);

#endif /* MRELEASE_PROCFS_H */
