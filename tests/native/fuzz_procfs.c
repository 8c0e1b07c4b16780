/* The files of a process, with any content: stat, statm, auxv, status, and
   the folder of its threads.  They lie over those of a real child, in a mount
   namespace of this process's own. */

#define _GNU_SOURCE

#include <ctype.h>              /* isalnum() */
#include <dirent.h>             /* DT_DIR */
#include <fcntl.h>
#include <sched.h>              /* unshare() */
#include <sys/mount.h>
#include <sys/stat.h>           /* mkdirat() */
#include <sys/vfs.h>            /* fstatfs() */

#include "fuzz.h"

/* What is mounted here is to be believed: what comes after is tested. */
static int
always_procfs(int fd, struct statfs *found)
{
    int err = fstatfs(fd, found);
    found->f_type = 0x9fa0;     /* PROC_SUPER_MAGIC */
    return err;
}

#define fstatfs always_procfs
#include "procfs.c"
#undef fstatfs

#define MOST_NAMES 128

static pid_t victim;
static int task = -1;           /* the folder of threads, and the files */

static int
cover(const char *name, int number)
{
    char from[PATH_SIZE];
    char to[PATH_SIZE];
    snprintf(to, sizeof(to), "/proc/%d/%s", (int)victim, name);
    /* What begins with a point is no thread. */
    snprintf(from, sizeof(from), "/proc/%d/task/.%d", (int)victim, number);
    int fd = open(from, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    NEED(fd >= 0);
    NEED(mount(from, to, NULL, MS_BIND, NULL) == 0);
    return fd;
}

static void
put(const char *path, const char *format, unsigned number)
{
    FILE *file = fopen(path, "we");
    NEED(file != NULL);
    NEED(fprintf(file, format, number) > 0 && fclose(file) == 0);
}

/* In namespaces of its own: files can be made by who has a number there. */
static void
become_root(void)
{
    unsigned user = geteuid();
    unsigned group = getegid();

    NEED(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0);
    put("/proc/self/setgroups", "deny\n", 0);
    put("/proc/self/uid_map", "0 %u 1\n", user);
    put("/proc/self/gid_map", "0 %u 1\n", group);
}

static int stat_file;
static int auxv_file;
static int status_file;         /* empty, but for try_status() */
static int thread_file;
static int statm_file;          /* empty, but for try_statm() */

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char path[PATH_SIZE];
    pid_t self = getpid();

    (void)argc;
    (void)argv;
    victim = fork();
    NEED(victim >= 0);
    if (victim == 0) {
        end_with_parent(self);
        for (;;) {
            pause();
        }
    }
    if (unshare(CLONE_NEWNS) != 0) {
        become_root();
    }
    NEED(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0);
    snprintf(path, sizeof(path), "/proc/%d/task", (int)victim);
    NEED(mount("none", path, "tmpfs", 0, NULL) == 0);
    task = open(path, O_DIRECTORY | O_CLOEXEC);
    NEED(task >= 0);
    stat_file = cover("stat", 1);
    auxv_file = cover("auxv", 2);
    status_file = cover("status", 3);
    statm_file = cover("statm", 6);
    snprintf(path, sizeof(path), "/proc/%d/task/.4", (int)victim);
    thread_file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    NEED(thread_file >= 0);
    return 0;
}

static void
fill(int fd, const uint8_t *data, size_t size)
{
    NEED(ftruncate(fd, 0) == 0);
    NEED(pwrite(fd, data, size, 0) == (ssize_t)size);
}

static bool
is_stop(long long number)
{
    return number == SIGSTOP || number == SIGTSTP || number == SIGTTIN ||
           number == SIGTTOU;
}

/* See tells_dying(): what stopped a thread is no exit. */
static bool
expect_dying(char state, const long long *fields)
{
    long long code = fields[52];
    long long number = code & 0x7f;
    bool is_stopped = state == 'T' || state == 't';
    bool is_over = state == 'Z' || state == 'X' || (fields[9] & 4) != 0;

    if (is_stop(number) || (is_stopped && code != SIGKILL)) {
        return false;
    }
    if (is_stopped) {
        return true;
    }
    return fields[20] > 1 ? number != 0 : is_over || code != 0;
}

/* The number at the begin of a stat is the child's; as it is after a 0. */
static size_t
with_pid(char *text, size_t room, const uint8_t *data, size_t size)
{
    size_t have = 0;
    if (size == 0 || *data != '0') {
        have = (size_t)snprintf(text, room, "%d", (int)victim);
        while (size > 0 && isdigit(*data)) {
            data++;
            size--;
        }
    }
    size = size < room - have ? size : room - have;
    memcpy(text + have, data, size);
    return have + size;
}

static void
try_stat(const uint8_t *data, size_t size)
{
    struct procfs_stat found;
    char text[1024];
    long long fields[53] = {0};

    size = with_pid(text, sizeof(text) - 1, data, size);
    fill(stat_file, (const uint8_t *)text, size);
    int err = procfs_read_stat(victim, &found);

    text[size] = '\0';
    const char *end = text + strlen(text);
    const char *name_ends = memrchr(text, ')', (size_t)(end - text));
    if (strtoll(text, NULL, 10) != victim || name_ends == NULL ||
        end - name_ends < 3)
    {
        CHECK(err == ESRCH);
        return;
    }
    CHECK(err == 0);
    const char *at = name_ends + 3;
    for (int field = 4; field <= 52 && at != NULL; field++) {
        at = decimal(at, end, &fields[field]);
    }
    /* It is set: err is 0. NOLINTNEXTLINE(clang-analyzer-core.*) */
    CHECK(found.started == fields[22]);
    CHECK(found.kernel_thread == ((fields[9] >> 21 & 1) != 0));
    CHECK(found.dying == expect_dying(name_ends[2], fields));
    CHECK(procfs_is_dying(victim) == (found.dying && !found.kernel_thread));
}

static void
try_statm(const uint8_t *data, size_t size)
{
    char text[128];
    long long fields[4] = {0};

    fill(statm_file, data, size);
    bool found = has_no_code(victim);
    fill(statm_file, data, 0);

    size = size < sizeof(text) - 1 ? size : sizeof(text) - 1;
    memcpy(text, data, size);
    text[size] = '\0';
    const char *end = text + strlen(text);
    const char *at = text;
    for (int field = 0; field < 4 && at != NULL; field++) {
        at = decimal(at, end, &fields[field]);
    }
    CHECK(found == (fields[0] > 0 && fields[3] == 0));
}

static void
try_auxv(const uint8_t *data, size_t size)
{
    uint32_t halves[8];

    fill(auxv_file, data, size);
    bool found = procfs_has_our_words(victim);
    if (size == 0) {
        CHECK(found);
        return;
    }
    if (size < sizeof(halves)) {
        CHECK(!found);
        return;
    }
    memcpy(halves, data, sizeof(halves));
    const uint16_t one = 1;
    int upper = *(const uint8_t *)&one == 1 ? 1 : 0;
    bool is_64bit = halves[upper] == 0 && halves[4 + upper] == 0;
    CHECK(found == (is_64bit == (sizeof(long) == 8)));
}

/* The status of the process, and that of a thread with any name. */
static void
try_status(const uint8_t *data, size_t size)
{
    struct procfs_status found;
    struct procfs_status own;
    size_t half = size / 2;

    fill(status_file, data, half);
    fill(thread_file, data + half, size - half);
    NEED(mkdirat(task, "5", 0700) == 0);
    NEED(linkat(task, ".4", task, "5/status", 0) == 0);
    int err = procfs_read_status(victim, &found);

    int fd = openat(task, ".3", O_RDONLY | O_CLOEXEC);
    NEED(fd >= 0);
    CHECK(err == read_status_fd(fd, victim, &own));
    close(fd);
    if (err == 0) {
        CHECK(found.tgid == own.tgid);
        CHECK(found.user == own.user || (own.user == 0 && found.user == 5));
        CHECK(found.user != 5 || own.threads > 1);
    }
    fill(status_file, data, 0);
    NEED(unlinkat(task, "5/status", 0) == 0);
    NEED(unlinkat(task, "5", AT_REMOVEDIR) == 0);
}

/* Threads with any names: numbers, mostly. */
static void                     /* NOLINTNEXTLINE(readability-function-*) */
try_tasks(struct bytes bytes)
{
    char names[MOST_NAMES][24];
    long long sum = 0;
    bool has_zero = false;
    int made = 0;
    int wanted = take(&bytes) % MOST_NAMES;
    struct procfs_tasks tasks;

    while (made < wanted) {
        uint8_t kind = take(&bytes);
        char *name = names[made];
        if (kind < 8) {
            int length = 1 + kind;
            for (int i = 0; i < length; i++) {
                uint8_t c = take(&bytes);
                name[i] = isalnum(c) || c == '-' || c == ' ' ? (char)c : '.';
            }
            name[length] = '\0';
        }
        else {
            snprintf(name, sizeof(names[0]), "%llu",
                     (unsigned long long)take_number(&bytes, kind % 9));
        }
        if (mkdirat(task, name, 0700) != 0) {
            break;              /* it is there already */
        }
        made++;
        long long number;
        decimal(name, name + strlen(name), &number);
        if (name[0] != '.') {
            sum += (pid_t)number;
            has_zero |= (pid_t)number <= 0;
        }
    }
    CHECK(procfs_tasks_open(&tasks, victim) == 0);
    CHECK(procfs_tasks_count(&tasks) == made);
    for (int round = 0; round < 2; round++) {
        int count = 0;
        pid_t tid;
        long long found = 0;
        while ((tid = procfs_tasks_next(&tasks)) > 0) {
            found += tid;
            CHECK(++count <= made);
        }
        CHECK(has_zero || found == sum);
        procfs_tasks_rewind(&tasks);
    }
    CHECK(!procfs_tasks_has(&tasks, 0) || has_zero);
    procfs_tasks_close(&tasks);
    while (made > 0) {
        NEED(unlinkat(task, names[--made], AT_REMOVEDIR) == 0);
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    switch (*data) {
    case 'a':
        try_auxv(data + 1, size - 1);
        break;
    case 'm':
        try_statm(data + 1, size - 1);
        break;
    case 't':
        try_tasks((struct bytes){data + 1, size - 1});
        break;
    case 'u':
        try_status(data + 1, size - 1);
        break;
    default:
        try_stat(data + 1, size - 1);
        break;
    }
    return 0;
}
