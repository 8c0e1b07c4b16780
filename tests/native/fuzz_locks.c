/* Robust lists of any form, in the memory of a real process, looked at by
   locks_look(), and then walked by the kernel at the end of the threads.

   Where the kernel hands a lock on, it was held: the look must have said so.
   Where the head of each list is in memory that is known here, what must be
   said of it is told from its three words, read once more. */

#define _GNU_SOURCE

#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <time.h>

#include "fuzz.h"
#include "locks.c"
#include "procfs.c"

#define PAGE ((size_t)4096)
#define PAGES 3                 /* and one that cannot be read */
#define NODES 8U
#define THREADS 3

/* What the zygote, a child, and this process share.  Its threads take a list
   each, and end, so that the kernel walks it. */
struct shared {
    sem_t start;
    sem_t started;
    sem_t set[THREADS];
    sem_t is_set;
    sem_t end;
    sem_t ended;
    int count;
    pid_t tids[THREADS];
    uintptr_t heads[THREADS];
};

static struct shared *shared;
static char *memory;            /* at the same address in both */
static pid_t zygote;
static void *own_head;          /* of this process's first thread */
static size_t head_size;

static void
down(sem_t *sem)
{
    while (sem_wait(sem) != 0) {
        NEED(errno == EINTR);
    }
}

static void *
hold(void *arg)
{
    int i = (int)(intptr_t)arg;
    shared->tids[i] = (pid_t)syscall(SYS_gettid);
    sem_post(&shared->started);
    down(&shared->set[i]);
    syscall(SYS_set_robust_list, shared->heads[i], head_size);
    sem_post(&shared->is_set);
    down(&shared->end);
    return NULL;
}

static void
run_zygote(pid_t parent)
{
    end_with_parent(parent);
    for (;;) {
        pthread_t threads[THREADS];
        down(&shared->start);
        int count = shared->count;
        for (int i = 0; i < count; i++) {
            NEED(pthread_create(&threads[i], NULL, hold,
                                (void *)(intptr_t)i) == 0);
        }
        for (int i = 0; i < count; i++) {
            pthread_join(threads[i], NULL);
        }
        sem_post(&shared->ended);
    }
}

static void *
map_shared(size_t size)
{
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    NEED(mapped != MAP_FAILED);
    return mapped;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    pid_t self = getpid();

    (void)argc;
    (void)argv;
    NEED(sys_get_robust_list(0, &own_head, &head_size) == 0);
    memory = map_shared((PAGES + 1) * PAGE);
    NEED(mprotect(memory + PAGES * PAGE, PAGE, PROT_NONE) == 0);
    shared = map_shared(sizeof(*shared));
    sem_t *sems[] = {&shared->start,  &shared->started, &shared->set[0],
                     &shared->set[1], &shared->set[2],  &shared->is_set,
                     &shared->end,    &shared->ended};
    for (size_t i = 0; i < sizeof(sems) / sizeof(sems[0]); i++) {
        NEED(sem_init(sems[i], 1, 0) == 0);
    }
    zygote = fork();
    NEED(zygote >= 0);
    if (zygote == 0) {
        run_zygote(self);
    }
    return 0;
}

struct node {
    uint64_t next;
    uint32_t word;              /* the futex */
    uint32_t unused;
};

static uintptr_t
address_of_node(unsigned number)
{
    return (uintptr_t)memory + PAGE + number % NODES * sizeof(struct node);
}

static uintptr_t
address_of_head(unsigned number)
{
    return (uintptr_t)memory + (size_t)64 * (number % THREADS);
}

static uintptr_t
take_pointer(struct bytes *bytes, uintptr_t own)
{
    uint8_t kind = take(bytes);
    uintptr_t mark = kind >> 7; /* of a mutex with priority inheritance */
    uintptr_t end = (uintptr_t)memory + PAGES * PAGE;

    switch (kind % 16) {
    case 8:
    case 9:
        return own | mark;
    case 10:
        return mark;            /* none */
    case 11:
        return end + take(bytes);
    case 12:
        return end - take(bytes) % 32;
    case 13:
        return (uintptr_t)take_number(bytes, 8);
    case 14:
        return address_of_node(take(bytes)) + take(bytes);
    case 15:
        return address_of_head(take(bytes)) | mark;
    default:
        return address_of_node(kind) | mark;
    }
}

static uint32_t
take_word(struct bytes *bytes, pid_t tid)
{
    uint8_t kind = take(bytes);
    uint32_t owner = (uint32_t)tid;

    switch (kind % 8) {
    case 0:
        return 0;
    case 1:
        return (uint32_t)shared->tids[kind / 8 % THREADS];
    case 2:
        return owner | FUTEX_WAITERS;
    case 3:
        return owner | FUTEX_OWNER_DIED;
    case 4:
        return (uint32_t)take_number(bytes, 4);
    default:
        return owner;
    }
}

static intptr_t
take_offset(struct bytes *bytes)
{
    uint8_t kind = take(bytes);
    if (kind < 192) {
        return offsetof(struct node, word);
    }
    return kind < 224 ? (intptr_t)take(bytes) - 128
                      : (intptr_t)take_number(bytes, 8);
}

/* Is all of it in memory that is ours to write? */
static bool
is_known(uintptr_t at)
{
    uintptr_t begin = (uintptr_t)memory;
    return at >= begin && at <= begin + PAGES * PAGE - sizeof(struct head);
}

/* Does it reach into the page that cannot be read? */
static bool
is_unreadable(uintptr_t at)
{
    uintptr_t end = (uintptr_t)memory + PAGES * PAGE;
    return at > end - sizeof(struct head) && at < end + PAGE;
}

static uintptr_t
take_list(struct bytes *bytes, unsigned number)
{
    uint8_t kind = take(bytes);
    uintptr_t at = address_of_head(number);

    if (kind % 16 == 15) {
        at = take_pointer(bytes, at);
    }
    else if (kind % 16 == 14) {
        at += kind / 16;
    }
    if (is_known(at)) {
        struct head head;
        head.next = take_pointer(bytes, at);
        head.futex_offset = take_offset(bytes);
        head.pending = take(bytes) < 128 ? 0 : take_pointer(bytes, at);
        memcpy((void *)at, &head, sizeof(head));
    }
    return at;
}

static void
fill_memory(struct bytes *bytes, int count)
{
    for (unsigned i = 0; i < NODES; i++) {
        struct node node = {0, 0, 0};
        uintptr_t at = address_of_node(i);
        node.next = take_pointer(bytes, address_of_head(i));
        node.word = take_word(bytes, shared->tids[(int)i % count]);
        memcpy((void *)at, &node, sizeof(node));
    }
    for (int i = 0; i < count; i++) {
        shared->heads[i] = take_list(bytes, (unsigned)i);
    }
}

/* What there is to be said of some lists; false if it is not known here. */
static bool
expect(const uintptr_t *heads, int count, enum locks *expected)
{
    bool known = true;
    bool unreadable = false;

    for (int i = 0; i < count; i++) {
        struct head head;
        uintptr_t at = heads[i];
        if (at == 0) {
            continue;           /* no list: none is held */
        }
        if (is_unreadable(at)) {
            unreadable = true;
            continue;
        }
        if (!is_known(at)) {
            known = false;
            continue;
        }
        memcpy(&head, (void *)at, sizeof(head));
        /* An odd address is not to be got at by a marked pointer. */
        bool is_end = head.next == at || head.next == at + 1;
        if (head.pending != 0 || (head.next > 1 && (!is_end || at % 2 != 0))) {
            *expected = LOCKS_HELD;
            return true;
        }
    }
    *expected = unreadable ? LOCKS_UNKNOWN : LOCKS_FREE;
    return known;
}

/* One list, of this thread itself. */
static void
look_at_own(struct bytes *bytes)
{
    enum locks expected;
    bool no_fd;

    shared->tids[0] = getpid();
    fill_memory(bytes, 1);
    syscall(SYS_set_robust_list, shared->heads[0], head_size);
    enum locks found = locks_look(getpid(), true, &no_fd);
    syscall(SYS_set_robust_list, own_head, head_size);
    if (expect(shared->heads, 1, &expected)) {
        CHECK(found == expected);
    }
}

/* A list that the kernel's walk begins with nothing is none that any library
   makes: its words may lie anywhere. */
static bool
is_well_formed(uintptr_t at)
{
    struct head head;
    if (!is_known(at)) {
        return false;
    }
    memcpy(&head, (void *)at, sizeof(head));
    return head.next > 1;
}

static void
look_at_zygote(struct bytes *bytes, int count)
{
    static char before[PAGES * PAGE];
    enum locks expected;
    bool no_fd;

    shared->count = count;
    sem_post(&shared->start);
    for (int i = 0; i < count; i++) {
        down(&shared->started);
    }
    fill_memory(bytes, count);
    for (int i = 0; i < count; i++) {
        sem_post(&shared->set[i]);
        down(&shared->is_set);
    }
    enum locks found = locks_look(zygote, false, &no_fd);
    bool is_expected = expect(shared->heads, count, &expected);
    bool well_formed = true;
    for (int i = 0; i < count; i++) {
        well_formed &= is_well_formed(shared->heads[i]);
    }

    memcpy(before, memory, sizeof(before));
    for (int i = 0; i < count; i++) {
        sem_post(&shared->end);
    }
    down(&shared->ended);
    if (well_formed && memcmp(before, memory, sizeof(before)) != 0) {
        CHECK(found == LOCKS_HELD);
    }
    if (is_expected) {
        CHECK(found == expected);
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes bytes = {data, size};
    uint8_t kind = take(&bytes);

    if (kind < 9) {             /* seldom: it takes 50 times as long */
        look_at_zygote(&bytes, 1 + kind % THREADS);
    }
    else {
        look_at_own(&bytes);
    }
    return 0;
}
