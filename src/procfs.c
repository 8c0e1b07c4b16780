#include "procfs.h"

#include <errno.h>
#include <fcntl.h>              /* open() */
#include <linux/magic.h>        /* PROC_SUPER_MAGIC */
#include <signal.h>             /* SIGKILL */
#include <stdio.h>              /* snprintf() */
#include <stdlib.h>             /* strtoll() */
#include <string.h>
#include <sys/stat.h>           /* fstatat() */
#include <sys/vfs.h>            /* fstatfs() */
#include <time.h>               /* nanosleep() */
#include <unistd.h>             /* read() */

#include "syscalls.h"

/* "/proc/2147483647/task/2147483647/status" and room to spare */
#define PATH_SIZE 64

/* Bits of the flags in /proc/PID/stat: <linux/sched.h>, unchanged since they
 * were introduced, and what ps and systemd rely on as well.
 */
#define PF_EXITING 0x00000004
#define PF_KTHREAD 0x00200000

static bool
has_our_numbers(void)
{
    /* Our number, as that /proc has it. */
    char self[16];
    ssize_t n = readlink("/proc/self", self, sizeof(self) - 1);
    if (n <= 0) {
        return false;
    }
    self[n] = '\0';
    return strtol(self, NULL, 10) == getpid();
}

bool
procfs_is_ours(void)
{
    struct statfs found;
    return has_our_numbers() && statfs("/proc", &found) == 0 &&
           (uint32_t)found.f_type == PROC_SUPER_MAGIC;
}

static int
open_proc(pid_t pid, const char *name, int flags)
{
    char path[PATH_SIZE];
    struct statfs found;
    if (!has_our_numbers()) {
        errno = ENOENT;
        return -1;
    }
    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_CLOEXEC | O_NOCTTY | flags);
    /* Files of another kind that were mounted there say what they like. */
    if (fd >= 0 && (fstatfs(fd, &found) < 0 ||
                    (uint32_t)found.f_type != PROC_SUPER_MAGIC))
    {
        close(fd);
        errno = ENOENT;
        return -1;
    }
    return fd;
}

/* If `line` begins with `key`, the text behind it, else NULL. */
static const char *
value_of(const char *line, const char *key)
{
    size_t length = strlen(key);
    return strncmp(line, key, length) == 0 ? line + length : NULL;
}

/* A size in kB, in bytes.  No more than that a few of them can be added. */
static int64_t
bytes_of(const char *value)
{
    const long long most = INT64_MAX / 8 / 1024;
    long long size = strtoll(value, NULL, 10);
    return (size < 0 ? 0 : size > most ? most : size) * 1024;
}

static void
take_line(struct procfs_status *status, const char *line, bool *has_mm)
{
    static const struct {
        const char *key;
        size_t offset;
    } sizes[] = {
        {"RssAnon:", offsetof(struct procfs_status, anon)},
        {"RssFile:", offsetof(struct procfs_status, file)},
        {"RssShmem:", offsetof(struct procfs_status, shmem)},
        {"VmSwap:", offsetof(struct procfs_status, swap)},
        {"HugetlbPages:", offsetof(struct procfs_status, hugetlb)},
    };
    const char *value;

    /* The first letters of nearly all lines rule them out. */
    switch (line[0]) {
    case 'R':
    case 'V':
    case 'H':
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            value = value_of(line, sizes[i].key);
            if (value != NULL) {
                *(int64_t *)((char *)status + sizes[i].offset) =
                    bytes_of(value);
                *has_mm = true;
                return;
            }
        }
        return;
    case 'T':
        if ((value = value_of(line, "Tgid:")) != NULL) {
            status->tgid = (pid_t)strtol(value, NULL, 10);
        }
        else if ((value = value_of(line, "Threads:")) != NULL) {
            status->threads = (int)strtol(value, NULL, 10);
        }
        return;
    case 'S':
        /* Not SigPnd: execve() by another thread sets SIGKILL there. */
        if ((value = value_of(line, "ShdPnd:")) != NULL) {
            unsigned long long pending = strtoull(value, NULL, 16);
            status->kill_pending |= (pending >> (SIGKILL - 1)) & 1;
        }
        return;
    case 'P':
        if ((value = value_of(line, "Pid:")) != NULL) {
            status->pid = (pid_t)strtol(value, NULL, 10);
        }
        return;
    case 'C':
        if ((value = value_of(line, "CoreDumping:")) != NULL) {
            status->dumping = strtol(value, NULL, 10) != 0;
        }
        return;
    default:
        return;
    }
}

static int
read_status_fd(int fd, pid_t tid, struct procfs_status *status)
{
    char buffer[4096];
    size_t have = 0;
    bool skipping = false;      /* inside a line longer than the buffer */
    bool has_mm = false;

    memset(status, 0, sizeof(*status));
    for (;;) {
        ssize_t n = read(fd, buffer + have, sizeof(buffer) - 1 - have);
        if (n < 0) {
            return errno;
        }
        if (n == 0) {
            status->user = has_mm ? tid : 0;
            /* The folder of another process may be mounted there. */
            return status->threads > 0 && status->pid == tid ? 0 : ESRCH;
        }
        have += (size_t)n;
        buffer[have] = '\0';

        char *line = buffer;
        char *end;
        while ((end = strchr(line, '\n')) != NULL) {
            *end = '\0';
            if (!skipping) {
                take_line(status, line, &has_mm);
            }
            skipping = false;
            line = end + 1;
        }
        have -= (size_t)(line - buffer);
        if (have == sizeof(buffer) - 1) {
            /* Groups: of a process in thousands of them */
            skipping = true;
            have = 0;
        }
        memmove(buffer, line, have);
    }
}

/* The leader may have ended before the others: then take the memory from a
 * thread that still uses it.
 */
static void
take_memory_of_threads(pid_t pid, struct procfs_status *status)
{
    struct procfs_tasks tasks;
    pid_t tid;

    if (procfs_tasks_open(&tasks, pid) != 0) {
        return;
    }
    while (status->user == 0 && (tid = procfs_tasks_next(&tasks)) > 0) {
        struct procfs_status thread;
        char path[PATH_SIZE];
        snprintf(path, sizeof(path), "%d/status", (int)tid);
        int fd = openat(tasks.fd, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            continue;           /* it has ended */
        }
        if (read_status_fd(fd, tid, &thread) == 0 && thread.user != 0) {
            thread.tgid = status->tgid;
            *status = thread;
        }
        close(fd);
    }
    procfs_tasks_close(&tasks);
}

bool
procfs_has_no_file(int err)
{
    return err == EMFILE || err == ENFILE;
}

int
procfs_read_status(pid_t pid, struct procfs_status *status)
{
    int fd = open_proc(pid, "status", 0);
    if (fd < 0) {
        return errno;
    }
    int err = read_status_fd(fd, pid, status);
    close(fd);
    if (err == 0 && status->user == 0 && status->threads > 1) {
        take_memory_of_threads(pid, status);
    }
    return err;
}

/* What fields 3, 9, 20 and 52 of /proc/PID/stat tell.  The exit code is the
 * group's as soon as the group is dying (Linux 5.17).
 */
static bool
tells_dying(char state, unsigned long flags, long long threads,
            long long exit_code)
{
    int number = (int)(exit_code & 0x7f);
    if (number == SIGSTOP || number == SIGTSTP || number == SIGTTIN ||
        number == SIGTTOU)
    {
        return false;           /* what stopped it stands there too */
    }
    if (state == 'T' || state == 't') {
        return exit_code == SIGKILL;    /* as does what a tracer stopped */
    }
    if (threads > 1) {
        /* The leader may have ended alone; then its code is no signal. */
        return number != 0;
    }
    return state == 'Z' || state == 'X' || (flags & PF_EXITING) ||
           exit_code != 0;
}

static bool
has_no_code(pid_t tid)
{
    char buffer[128] = "";
    int fd = open_proc(tid, "statm", 0);
    if (fd < 0) {
        return false;
    }
    ssize_t n = read(fd, buffer, sizeof(buffer) - 1);
    close(fd);
    if (n <= 0) {
        return false;
    }
    long long pages[4] = {0};   /* size, resident, shared, text */
    char *at = buffer;
    for (int i = 0; i < 4; i++) {
        pages[i] = strtoll(at, &at, 10);
    }
    return pages[0] > 0 && pages[3] == 0;
}

bool
procfs_is_in_exec(pid_t tid, bool patient)
{
    const struct timespec moment = {.tv_nsec = 100000};

    /* Most are through in less, as a child that was started just now is. */
    for (int i = 0; has_no_code(tid); i++) {
        if (i == 20 || !patient) {
            return true;
        }
        nanosleep(&moment, NULL);
    }
    return false;
}

int
procfs_read_stat(pid_t pid, struct procfs_stat *stat)
{
    char buffer[1024];
    if (procfs_is_in_exec(pid, true)) {
        return EBUSY;
    }
    int fd = open_proc(pid, "stat", 0);
    if (fd < 0) {
        return errno;
    }
    ssize_t n = read(fd, buffer, sizeof(buffer) - 1);
    int err = n < 0 ? errno : ESRCH;
    close(fd);
    if (n <= 0) {
        return err;
    }
    buffer[n] = '\0';
    if (strtol(buffer, NULL, 10) != pid) {
        return ESRCH;           /* the folder of another process */
    }

    /* The name, field 2, may hold anything, but it ends at the last ')'. */
    char *at = strrchr(buffer, ')');
    if (at == NULL || at[1] == '\0' || at[2] == '\0') {
        return ESRCH;
    }
    char state = at[2];         /* field 3 */
    long long fields[53] = {0}; /* by their numbers, from 4 on */
    at += 3;
    for (int field = 4; field <= 52; field++) {
        fields[field] = strtoll(at, &at, 10);
    }
    unsigned long flags = (unsigned long)fields[9];
    stat->kernel_thread = (flags & PF_KTHREAD) != 0;
    stat->started = fields[22];
    stat->dying = tells_dying(state, flags, fields[20], fields[52]);
    return 0;
}

bool
procfs_is_dying(pid_t pid)
{
    struct procfs_stat stat = {0};
    struct procfs_status status = {.kill_pending = false};

    /* First, as it waits for nothing. */
    if (procfs_read_status(pid, &status) == 0 && status.kill_pending) {
        return true;
    }
    return procfs_read_stat(pid, &stat) == 0 && !stat.kernel_thread &&
           stat.dying;
}

int
procfs_open_memory(pid_t tid, bool patient)
{
    if (procfs_is_in_exec(tid, patient)) {
        errno = EBUSY;
        return -1;
    }
    return open_proc(tid, "mem", O_RDWR);
}

enum procfs_memory
procfs_ask_memory(int fd)
{
    /* Through a pointer to nothing, so that nothing can be written.  The
     * kernel asks first whether the memory has users (if not, it is the end of
     * the file), then for the byte to write (EFAULT), and only then for the
     * victim's mmap_lock: it never comes to wait for that (mem_rw() in
     * fs/proc/base.c).  A read would.
     */
    static const char *const volatile nothing = NULL;

    if (fd < 0) {
        return PROCFS_MEMORY_UNKNOWN;
    }
    return pwrite(fd, nothing, 1, 0) == 0 ? PROCFS_MEMORY_UNUSED
                                          : PROCFS_MEMORY_USED;
}

bool
procfs_has_our_words(pid_t pid)
{
    /* Two entries of 64 bits, or four of 32: type and value, type and value.
     * Types are small numbers, so in an entry of 64 bits the upper half of
     * the type is empty; of 32, it holds a value, or the type itself.
     */
    uint64_t words[4];
    int fd = open_proc(pid, "auxv", 0);
    if (fd < 0) {
        return false;
    }
    ssize_t n = read(fd, words, sizeof(words));
    close(fd);
    if (n == 0) {
        return true;            /* it has let go of its memory: no words */
    }
    if (n != (ssize_t)sizeof(words)) {
        return false;
    }
    bool is_64bit = words[0] >> 32 == 0 && words[2] >> 32 == 0;
    return is_64bit == (sizeof(void *) == 8);
}

/* struct linux_dirent64: no header has it. */
struct entry {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

int
procfs_tasks_open(struct procfs_tasks *tasks, pid_t pid)
{
    tasks->have = 0;
    tasks->at = 0;
    tasks->fd = open_proc(pid, "task", O_DIRECTORY);
    return tasks->fd < 0 ? errno : 0;
}

int
procfs_tasks_count(const struct procfs_tasks *tasks)
{
    struct stat found;
    /* Each thread is a folder, and a folder has two links more than it has
     * folders (proc_task_getattr() in fs/proc/base.c).
     */
    return fstat(tasks->fd, &found) == 0 ? (int)found.st_nlink - 2 : -1;
}

void
procfs_tasks_rewind(struct procfs_tasks *tasks)
{
    tasks->have = 0;
    tasks->at = 0;
    lseek(tasks->fd, 0, SEEK_SET);
}

pid_t
procfs_tasks_next(struct procfs_tasks *tasks)
{
    for (;;) {
        if (tasks->at >= tasks->have) {
            tasks->at = 0;
            tasks->have = syscall(SYS_getdents64, tasks->fd, tasks->buffer,
                                  sizeof(tasks->buffer));
            if (tasks->have <= 0) {
                pid_t end = tasks->have < 0 ? -1 : 0;
                tasks->have = 0;
                return end;
            }
        }
        const struct entry *entry =
            (const struct entry *)(const void *)(tasks->buffer + tasks->at);
        tasks->at += entry->length;
        if (entry->name[0] != '.') {
            return (pid_t)strtol(entry->name, NULL, 10);
        }
    }
}

bool
procfs_tasks_has(const struct procfs_tasks *tasks, pid_t tid)
{
    char name[PATH_SIZE];
    struct stat found;
    snprintf(name, sizeof(name), "%d", (int)tid);
    return fstatat(tasks->fd, name, &found, 0) == 0;
}

void
procfs_tasks_close(struct procfs_tasks *tasks)
{
    close(tasks->fd);
    tasks->fd = -1;
}
