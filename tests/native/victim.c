/* A process to be killed by tests and benchmarks.

   It makes itself as its options say, prints one line

       ready page=4096 pid=4711 anon=67108864 ...

   and waits for its end.  The facts after "ready" are bytes that are
   mapped and touched, so a test may compare them with what the kernel
   counts.  Nothing here uses stdio or malloc after start, so that the
   process owns no memory that is not asked for, but for what libc needs.

   It must not outlive the test that made it, also if that is killed.
   PR_SET_PDEATHSIG would fire at the end of the parent *thread*, and a
   thread that reads stdin cannot run in a stopped or starved process.
   So the kernel does it: stdin is a pipe with O_ASYNC, its signal is
   SIGKILL, its owner the process group; when the last writer closes, the
   kernel sends SIGKILL, whatever state the process is in.  (The kernel
   does so also if something is written to the pipe.)

   Only libc and POSIX threads are used, and -static works: the same
   program runs in the virtual machines. */

#define _GNU_SOURCE

#include <dirent.h>             /* opendir */
#include <errno.h>
#include <fcntl.h>              /* F_SETSIG, O_ASYNC */
#include <getopt.h>             /* getopt_long */
#include <limits.h>             /* PTHREAD_STACK_MIN */
#include <poll.h>
#include <pthread.h>
#include <sched.h>              /* clone, SCHED_IDLE */
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>              /* vsnprintf */
#include <stdlib.h>             /* strtoul */
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>          /* PR_SET_PTRACER */
#include <sys/ptrace.h>
#include <sys/resource.h>       /* RLIMIT_CORE, setpriority */
#include <sys/stat.h>
#include <sys/syscall.h>        /* SYS_exit */
#include <sys/wait.h>
#include <time.h>               /* clock_gettime */
#include <unistd.h>

#ifndef MADV_PAGEOUT
#  define MADV_PAGEOUT 21       /* Linux 5.4 */
#endif
#ifndef PR_SET_PTRACER
#  define PR_SET_PTRACER 0x59616d61
#endif

#define MIB ((size_t)1 << 20)
#define HUGE ((size_t)2 << 20)  /* of x86-64, and arm64 with 4 KiB pages */
#define THREAD_STACK ((size_t)64 << 10)
#define GROW_STEP ((size_t)256 << 10)
#define LOCK_READY 0x6d72656cU

/* What lies in the file of a robust lock. */
struct shared_lock {
    _Atomic uint32_t ready;
    pthread_mutex_t mutex;
};

/* What lies in the file of --progress: how --grow gets on.  Bytes, and times
   of CLOCK_MONOTONIC in nanoseconds. */
struct progress {
    _Atomic uint64_t touched;
    _Atomic uint64_t began;     /* the first thread was let go */
    _Atomic uint64_t ended;     /* the last one has touched all */
    _Atomic uint64_t longest;   /* that GROW_STEP took */
};

static struct {
    size_t anon, shared_anon, private_memfd, shared_memfd, hugetlb, grow;
    const char *start, *progress;
    const char *file, *dirty_file, *shared_file;
    const char *robust, *robust_wait, *robust_churn;
    const char *fsync_loop;
    const char *sigterm;
    const char *thp;
    unsigned long threads, vmas;
    long trace;
    int mlock, swap, spin, idle, sharer, zombie_leader, core;
    int robust_pi, robust_in_thread, core_handler;
} want = {.threads = 1};

static char line[1024] = "ready";
static size_t page;
static atomic_ulong running;    /* threads that reached their work */
static atomic_ulong sink;

/* ------------------------------------------------------------- output */

static void
write_out(int fd, const char *text)
{
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t n = write(fd, text, left);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            _exit(3);
        }
        text += n;
        left -= (size_t)n;
    }
}

static _Noreturn void
die(const char *what)
{
    int error = errno;
    char text[256];
    snprintf(text, sizeof(text), "victim: %s: %s\n", what, strerror(error));
    write_out(STDERR_FILENO, text);
    _exit(3);
}

/* Adds " key=value" to the line that says "ready". */
static void
fact(const char *key, unsigned long value)
{
    size_t used = strlen(line);
    int n = snprintf(line + used, sizeof(line) - used, " %s=%lu", key, value);
    if (n < 0 || (size_t)n >= sizeof(line) - used) {
        errno = E2BIG;
        die("facts");
    }
}

/* ---------------------------------------------------- ending with stdin */

static void
die_with_stdin(void)
{
    struct stat st;
    if (fstat(STDIN_FILENO, &st) < 0 || !S_ISFIFO(st.st_mode)) {
        return;
    }
    /* The whole group, so that a sharer ends too.  A group that others
       belong to would take them along: make one of our own. */
    if (getpgrp() != getpid() && setpgid(0, 0) < 0) {
        die("setpgid");
    }
    int flags = fcntl(STDIN_FILENO, F_GETFL);
    if (flags < 0 || fcntl(STDIN_FILENO, F_SETOWN, -getpid()) < 0 ||
        fcntl(STDIN_FILENO, F_SETSIG, SIGKILL) < 0 ||
        fcntl(STDIN_FILENO, F_SETFL, flags | O_ASYNC) < 0)
    {
        die("stdin");
    }
    /* The writer may have gone before O_ASYNC was set. */
    struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
    if (poll(&p, 1, 0) > 0) {
        _exit(3);
    }
}

/* -------------------------------------------------------------- memory */

static unsigned char *
map(size_t size, int prot, int flags, int fd, const char *what)
{
    void *p = mmap(NULL, size, prot, flags, fd, 0);
    if (p == MAP_FAILED) {
        die(what);
    }
    return p;
}

static void
write_touch(unsigned char *p, size_t size, size_t step)
{
    volatile unsigned char *v = p;
    for (size_t i = 0; i < size; i += step) {
        v[i] = (unsigned char)(1 + i / step % 251);
    }
}

static void
read_touch(const unsigned char *p, size_t size)
{
    const volatile unsigned char *v = p;
    unsigned long sum = 0;
    for (size_t i = 0; i < size; i += page) {
        sum += v[i];
    }
    atomic_fetch_add(&sink, sum);
}

/* Maps a whole file and touches each page; returns the bytes mapped. */
static size_t
map_file(const char *path, int flags, int writes)
{
    struct stat st;
    int shared = (flags & MAP_SHARED) != 0;
    int fd = open(path, (shared ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || st.st_size <= 0) {
        die(path);
    }
    size_t size = ((size_t)st.st_size + page - 1) / page * page;
    unsigned char *p =
        map(size, PROT_READ | (writes ? PROT_WRITE : 0), flags, fd, path);
    if (writes) {
        write_touch(p, size, page);
    }
    else {
        read_touch(p, size);
    }
    close(fd);
    return size;
}

static void
map_memfd(size_t size, int shared)
{
    int fd = memfd_create("victim", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0) {
        die("memfd");
    }
    /* Pages have to exist before a private mapping can read them. */
    unsigned char *p =
        map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, "memfd");
    write_touch(p, size, page);
    if (!shared) {
        munmap(p, size);
        read_touch(map(size, PROT_READ, MAP_PRIVATE, fd, "memfd"), size);
    }
    close(fd);
}

/* Private anonymous memory that begins where a huge page may. */
static unsigned char *
map_aligned(size_t size)
{
    unsigned char *p = map(size + HUGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, "anon");
    size_t before = (HUGE - (uintptr_t)p % HUGE) % HUGE;
    if ((before > 0 && munmap(p, before) < 0) ||
        munmap(p + before + size, HUGE - before) < 0)
    {
        die("munmap");
    }
    return p + before;
}

/* Makes one mapping many.  The kernel merges neighbours that are alike, so
   each second one is marked as not to be inherited by a fork.  Before the
   touch: then each gets an anon_vma of its own, as mappings do that a
   program makes one by one. */
static void
split(unsigned char *p, size_t size, unsigned long count)
{
    size_t pages = size / page;
    if (count > pages) {
        errno = EINVAL;
        die("--vmas");
    }
    for (unsigned long i = 1; i < count; i += 2) {
        size_t from = pages * i / count;
        size_t to = pages * (i + 1) / count;
        if (madvise(p + from * page, (to - from) * page, MADV_DONTFORK) < 0) {
            die("MADV_DONTFORK");
        }
    }
    fact("vmas", count);
}

static void
set_thp(unsigned char *p, size_t size, const char *how)
{
    int on = strcmp(how, "on") == 0;
    if (!on && strcmp(how, "off") != 0) {
        errno = EINVAL;
        die("--thp");
    }
    /* A kernel without them says EINVAL, and has none: that is "off". */
    if (madvise(p, size, on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) < 0 && on) {
        die("MADV_HUGEPAGE");
    }
}

static void
make_memory(void)
{
    if (want.anon > 0) {
        unsigned char *p;
        if (want.thp != NULL) {
            p = map_aligned(want.anon);
            set_thp(p, want.anon, want.thp);
        }
        else {
            p = map(want.anon, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, "anon");
        }
        if (want.vmas > 1) {
            split(p, want.anon, want.vmas);
        }
        write_touch(p, want.anon, page);
        if (want.mlock && mlock(p, want.anon) < 0) {
            die("mlock");
        }
        if (want.swap && madvise(p, want.anon, MADV_PAGEOUT) < 0) {
            die("MADV_PAGEOUT");
        }
        fact("anon", want.anon);
    }
    if (want.file != NULL) {
        fact("file", map_file(want.file, MAP_PRIVATE, 0));
    }
    if (want.dirty_file != NULL) {
        fact("dirty_file", map_file(want.dirty_file, MAP_PRIVATE, 1));
    }
    if (want.shared_file != NULL) {
        fact("shared_file", map_file(want.shared_file, MAP_SHARED, 0));
    }
    if (want.shared_anon > 0) {
        write_touch(map(want.shared_anon, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, "shared anon"),
                    want.shared_anon, page);
        fact("shared_anon", want.shared_anon);
    }
    if (want.private_memfd > 0) {
        map_memfd(want.private_memfd, 0);
        fact("private_memfd", want.private_memfd);
    }
    if (want.shared_memfd > 0) {
        map_memfd(want.shared_memfd, 1);
        fact("shared_memfd", want.shared_memfd);
    }
    if (want.hugetlb > 0) {
        size_t huge = 2 * MIB;
        write_touch(map(want.hugetlb * huge, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
                            21 << MAP_HUGE_SHIFT,
                        -1, "hugetlb"),
                    want.hugetlb * huge, huge);
        fact("hugetlb", want.hugetlb * huge);
    }
}

/* Before Linux 6.2 a thread counts the pages that it touches in batches of
   64, and what is left of the last one when it unmaps something. */
static void
count_the_rest(void)
{
    unsigned char *p = map(page, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, "counted");
    *p = 1;
    munmap(p, page);
}

static void
say_ready(void)
{
    count_the_rest();
    size_t used = strlen(line);
    line[used] = '\n';
    line[used + 1] = '\0';
    write_out(STDOUT_FILENO, line);
}

/* -------------------------------------------------------------- growing */

static struct {
    unsigned char *memory;
    struct progress *progress;
    int start;
    _Atomic size_t next;
    atomic_ulong done;          /* threads */
} growth;

static uint64_t
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

/* All that growing needs but the pages themselves. */
static void
prepare_to_grow(void)
{
    if (want.start == NULL || want.progress == NULL) {
        errno = EINVAL;
        die("--grow without --start and --progress");
    }
    /* Opened for both, a FIFO does not make us wait for the other end. */
    growth.start = open(want.start, O_RDWR | O_CLOEXEC);
    if (growth.start < 0) {
        die(want.start);
    }
    int fd = open(want.progress, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        die(want.progress);
    }
    growth.progress =
        (void *)map(sizeof(*growth.progress), PROT_READ | PROT_WRITE,
                    MAP_SHARED, fd, want.progress);
    close(fd);
    /* Touched, so that there is no fault of its page later. */
    atomic_store(&growth.progress->touched, 0);
    growth.memory =
        map(want.grow, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, "--grow");
}

/* In each thread: waits for a byte of --start, then touches what no other
   thread has, as fast as it can. */
static void
grow(void)
{
    struct progress *p = growth.progress;
    char byte;
    /* No lock is held. NOLINTNEXTLINE(clang-analyzer-unix.*) */
    while (read(growth.start, &byte, 1) != 1) {
        if (errno != EINTR) {
            die(want.start);
        }
    }
    uint64_t before = now();
    uint64_t none = 0;
    atomic_compare_exchange_strong(&p->began, &none, before);
    for (;;) {
        size_t at = atomic_fetch_add(&growth.next, GROW_STEP);
        if (at >= want.grow) {
            break;
        }
        write_touch(growth.memory + at, GROW_STEP, page);
        atomic_fetch_add(&p->touched, GROW_STEP);
        uint64_t after = now();
        uint64_t took = after - before;
        uint64_t longest = atomic_load(&p->longest);
        while (took > longest &&
               !atomic_compare_exchange_weak(&p->longest, &longest, took))
        {
        }
        before = after;
    }
    if (atomic_fetch_add(&growth.done, 1) + 1 == want.threads) {
        atomic_store(&p->ended, now());
    }
}

/* -------------------------------------------------------- robust locks */

static struct shared_lock *
shared_lock(const char *path, int create)
{
    int fd = open(path, O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0666);
    if (fd < 0 || (create && ftruncate(fd, (off_t)page) < 0)) {
        die(path);
    }
    struct shared_lock *l =
        (void *)map(page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, path);
    close(fd);
    if (atomic_load(&l->ready) != LOCK_READY) {
        if (!create) {
            errno = ENOENT;
            die("robust lock that nobody made");
        }
        pthread_mutexattr_t a;
        pthread_mutexattr_init(&a);
        pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
        if (want.robust_pi) {
            pthread_mutexattr_setprotocol(&a, PTHREAD_PRIO_INHERIT);
        }
        errno = pthread_mutex_init(&l->mutex, &a);
        if (errno != 0) {
            die("pthread_mutex_init");
        }
        atomic_store(&l->ready, LOCK_READY);
    }
    return l;
}

static const char *
lock_result(int error)
{
    switch (error) {
    case 0:
        return "OK";
    case EOWNERDEAD:
        return "EOWNERDEAD";
    case ENOTRECOVERABLE:
        return "ENOTRECOVERABLE";
    default:
        return "OTHER";
    }
}

static void
take(struct shared_lock *l)
{
    int error = pthread_mutex_lock(&l->mutex);
    if (error == EOWNERDEAD) {
        error = pthread_mutex_consistent(&l->mutex);
    }
    if (error != 0) {
        errno = error;
        die("pthread_mutex_lock");
    }
}

/* A waiter is ready before it waits: the one line, then the lock, then a
   line with what it got. */
static _Noreturn void
wait_for_lock(void)
{
    struct shared_lock *l = shared_lock(want.robust_wait, 0);
    say_ready();
    int error = pthread_mutex_lock(&l->mutex);
    char text[64];
    snprintf(text, sizeof(text), "got=%s\n", lock_result(error));
    write_out(STDOUT_FILENO, text);
    if (error == EOWNERDEAD) {
        pthread_mutex_consistent(&l->mutex);
    }
    if (error == 0 || error == EOWNERDEAD) {
        pthread_mutex_unlock(&l->mutex);
    }
    _exit(0);
}

/* ------------------------------------------------------------- threads */

static _Noreturn void
rest(void)
{
    for (;;) {
        if (want.spin) {
            atomic_fetch_add_explicit(&sink, 1, memory_order_relaxed);
        }
        else {
            pause();
        }
    }
}

static void *
thread(void *arg)
{
    if (arg != NULL) {
        take(arg);
    }
    atomic_fetch_add(&running, 1);
    if (want.grow > 0) {
        grow();
    }
    rest();
}

static void
make_threads(struct shared_lock *lock)
{
    pthread_attr_t attr;
    size_t stack = THREAD_STACK;
    if (stack < (size_t)PTHREAD_STACK_MIN) {
        stack = (size_t)PTHREAD_STACK_MIN;
    }
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, stack);
    for (unsigned long i = 1; i < want.threads; i++) {
        pthread_t t;
        /* With --robust-in-thread the last thread holds the lock. */
        void *arg = i + 1 == want.threads ? lock : NULL;
        errno = pthread_create(&t, &attr, thread, arg);
        if (errno != 0) {
            die("pthread_create");
        }
    }
    while (atomic_load(&running) < want.threads - 1) {
        sched_yield();
    }
    fact("threads", want.threads);
}

/* -------------------------------------------------------------- sharer */

static int
sharer(void *arg)
{
    (void)arg;
    for (;;) {
        pause();
    }
    return 0;
}

/* A process with the same memory, as between vfork() and exec().  It is a
   child of *our* parent (CLONE_PARENT), which so can wait for it. */
static void
make_sharer(void)
{
    unsigned char *stack =
        map(THREAD_STACK, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, "stack");
    int pid = clone(sharer, stack + THREAD_STACK,
                    CLONE_VM | CLONE_PARENT | SIGCHLD, NULL);
    if (pid < 0) {
        die("clone");
    }
    fact("sharer", (unsigned long)pid);
}

/* -------------------------------------------------------------- tracer */

static void
seize(pid_t pid)
{
    char path[64];
    int found;
    int first = 1;
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    /* A thread may be made by one that is not traced yet: look again
       until there is none left.  EPERM then means: ours already. */
    do {
        found = 0;
        DIR *d = opendir(path);
        if (d == NULL) {
            die(path);
        }
        struct dirent *e;
        while ((e = readdir(d)) != NULL) {
            if (e->d_name[0] == '.') {
                continue;
            }
            if (ptrace(PTRACE_SEIZE, (pid_t)strtol(e->d_name, NULL, 10), NULL,
                       (void *)(PTRACE_O_TRACEEXIT | PTRACE_O_TRACECLONE)) ==
                0)
            {
                found = 1;
            }
            else if (first && errno != ESRCH) {
                die("PTRACE_SEIZE");
            }
        }
        closedir(d);
        first = 0;
    } while (found);
}

/* Lets every thread run as if it were not traced, but keeps it where it
   ends: in PTRACE_EVENT_EXIT, before it gives its memory back.  The end of
   this process lets go of all of them. */
static _Noreturn void
hold(pid_t pid)
{
    seize(pid);
    say_ready();
    for (;;) {
        int status;
        pid_t tid = waitpid(-1, &status, __WALL);
        if (tid < 0) {
            if (errno == EINTR) {
                continue;
            }
            _exit(errno == ECHILD ? 0 : 3);
        }
        if (!WIFSTOPPED(status)) {
            continue;
        }
        int event = status >> 16;
        int sig = WSTOPSIG(status);
        if (event == PTRACE_EVENT_EXIT) {
            continue;
        }
        if (event == PTRACE_EVENT_STOP && sig != SIGTRAP) {
            ptrace(PTRACE_LISTEN, tid, NULL, NULL);
        }
        else {
            ptrace(PTRACE_CONT, tid, NULL,
                   (void *)(intptr_t)(event != 0 ? 0 : sig));
        }
    }
}

/* -------------------------------------------------------------- others */

static void
exit_on_signal(int sig)
{
    (void)sig;
    _exit(0);
}

static void
set_sigterm(const char *how)
{
    struct sigaction a = {.sa_handler = SIG_DFL};
    if (strcmp(how, "ignore") == 0) {
        a.sa_handler = SIG_IGN;
    }
    else if (strcmp(how, "exit") == 0) {
        a.sa_handler = exit_on_signal;
    }
    else if (strcmp(how, "default") != 0) {
        errno = EINVAL;
        die("--sigterm");
    }
    if (sigaction(SIGTERM, &a, NULL) < 0) {
        die("sigaction");
    }
}

static _Noreturn void
write_for_ever(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        die(path);
    }
    say_ready();
    for (;;) {
        static const char block[4096] = "victim";
        if (pwrite(fd, block, sizeof(block), 0) < 0 || fsync(fd) < 0) {
            die("write");
        }
    }
}

/* What core_pattern starts: takes no byte of the core, so that the dump
   stands still, and goes when the dumping process has gone. */
static _Noreturn void
handle_core(void)
{
    struct pollfd p = {.fd = STDIN_FILENO, .events = 0};
    while (poll(&p, 1, -1) <= 0 || !(p.revents & (POLLHUP | POLLERR))) {
    }
    _exit(0);
}

/* ------------------------------------------------------------- options */

enum {
    ANON = 1000,
    FILE_,
    DIRTY_FILE,
    SHARED_FILE,
    SHARED_ANON,
    PRIVATE_MEMFD,
    SHARED_MEMFD,
    HUGETLB,
    THP,
    VMAS,
    THREADS,
    SIGTERM_,
    ROBUST,
    ROBUST_WAIT,
    ROBUST_CHURN,
    FSYNC_LOOP,
    GROW,
    START,
    PROGRESS,
    TRACE
};

static const struct option options[] = {
    {"anon", required_argument, NULL, ANON},
    {"file", required_argument, NULL, FILE_},
    {"dirty-file", required_argument, NULL, DIRTY_FILE},
    {"shared-file", required_argument, NULL, SHARED_FILE},
    {"shared-anon", required_argument, NULL, SHARED_ANON},
    {"private-memfd", required_argument, NULL, PRIVATE_MEMFD},
    {"shared-memfd", required_argument, NULL, SHARED_MEMFD},
    {"hugetlb", required_argument, NULL, HUGETLB},
    {"mlock", no_argument, &want.mlock, 1},
    {"swap", no_argument, &want.swap, 1},
    {"thp", required_argument, NULL, THP},
    {"vmas", required_argument, NULL, VMAS},
    {"threads", required_argument, NULL, THREADS},
    {"spin", no_argument, &want.spin, 1},
    {"idle", no_argument, &want.idle, 1},
    {"sigterm", required_argument, NULL, SIGTERM_},
    {"sharer", no_argument, &want.sharer, 1},
    {"zombie-leader", no_argument, &want.zombie_leader, 1},
    {"robust", required_argument, NULL, ROBUST},
    {"robust-wait", required_argument, NULL, ROBUST_WAIT},
    {"robust-churn", required_argument, NULL, ROBUST_CHURN},
    {"robust-pi", no_argument, &want.robust_pi, 1},
    {"robust-in-thread", no_argument, &want.robust_in_thread, 1},
    {"fsync-loop", required_argument, NULL, FSYNC_LOOP},
    {"core", no_argument, &want.core, 1},
    {"core-handler", no_argument, &want.core_handler, 1},
    {"grow", required_argument, NULL, GROW},
    {"start", required_argument, NULL, START},
    {"progress", required_argument, NULL, PROGRESS},
    {"trace", required_argument, NULL, TRACE},
    {NULL, 0, NULL, 0},
};

static size_t
number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || n > SIZE_MAX / MIB) {
        errno = EINVAL;
        die(text);
    }
    return n;
}

static void
read_options(int argc, char **argv)
{
    int c;
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 0:
            break;
        case ANON:
            want.anon = number(optarg) * MIB;
            break;
        case FILE_:
            want.file = optarg;
            break;
        case DIRTY_FILE:
            want.dirty_file = optarg;
            break;
        case SHARED_FILE:
            want.shared_file = optarg;
            break;
        case SHARED_ANON:
            want.shared_anon = number(optarg) * MIB;
            break;
        case PRIVATE_MEMFD:
            want.private_memfd = number(optarg) * MIB;
            break;
        case SHARED_MEMFD:
            want.shared_memfd = number(optarg) * MIB;
            break;
        case HUGETLB:
            want.hugetlb = number(optarg);
            break;
        case THP:
            want.thp = optarg;
            break;
        case VMAS:
            want.vmas = number(optarg);
            break;
        case THREADS:
            want.threads = number(optarg);
            break;
        case SIGTERM_:
            want.sigterm = optarg;
            break;
        case ROBUST:
            want.robust = optarg;
            break;
        case ROBUST_WAIT:
            want.robust_wait = optarg;
            break;
        case ROBUST_CHURN:
            want.robust_churn = optarg;
            break;
        case FSYNC_LOOP:
            want.fsync_loop = optarg;
            break;
        case GROW:
            want.grow = number(optarg) * MIB;
            break;
        case START:
            want.start = optarg;
            break;
        case PROGRESS:
            want.progress = optarg;
            break;
        case TRACE:
            want.trace = (long)number(optarg);
            break;
        default:
            _exit(2);
        }
    }
    if (optind != argc || want.threads < 1 ||
        ((want.zombie_leader || want.robust_in_thread) && want.threads < 2))
    {
        errno = EINVAL;
        die("options");
    }
}

int
main(int argc, char **argv)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    read_options(argc, argv);
    if (want.core_handler) {
        handle_core();
    }
    die_with_stdin();
    fact("page", page);
    fact("pid", (unsigned long)getpid());
    if (want.trace > 0) {
        hold((pid_t)want.trace);
    }

    /* Where Yama allows tracing only by ancestors. Fails without Yama. */
    prctl(PR_SET_PTRACER, -1L, 0, 0, 0);
    if (want.core) {
        struct rlimit r;
        if (getrlimit(RLIMIT_CORE, &r) < 0) {
            die("RLIMIT_CORE");
        }
        r.rlim_cur = r.rlim_max;
        if (setrlimit(RLIMIT_CORE, &r) < 0) {
            die("RLIMIT_CORE");
        }
    }
    if (want.sigterm != NULL) {
        set_sigterm(want.sigterm);
    }
    if (want.idle) {
        struct sched_param none = {.sched_priority = 0};
        if (sched_setscheduler(0, SCHED_IDLE, &none) < 0 ||
            setpriority(PRIO_PROCESS, 0, 19) < 0)
        {
            die("SCHED_IDLE");
        }
    }
    make_memory();
    struct shared_lock *lock = NULL;
    if (want.robust != NULL) {
        lock = shared_lock(want.robust, 1);
        if (!want.robust_in_thread) {
            take(lock);
        }
    }
    if (want.grow > 0) {
        prepare_to_grow();
    }
    make_threads(want.robust_in_thread ? lock : NULL);
    if (want.sharer) {
        make_sharer();
    }
    if (want.robust_wait != NULL) {
        wait_for_lock();
    }
    if (want.fsync_loop != NULL) {
        write_for_ever(want.fsync_loop);
    }
    if (want.robust_churn != NULL) {
        lock = shared_lock(want.robust_churn, 1);
        say_ready();
        for (;;) {
            take(lock);
            pthread_mutex_unlock(&lock->mutex);
        }
    }
    say_ready();
    if (want.grow > 0) {
        grow();
    }
    if (want.zombie_leader) {
        /* This thread only: exit() and _exit() would end all. */
        syscall(SYS_exit, 0);
    }
    rest();
}
