/* Resource limits of any size: what harden.c and scheduling.c make of them,
   with CAP_IPC_LOCK and without. */

#define _GNU_SOURCE

#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "fuzz.h"
#include "harden.c"
#include "scheduling.c"

/* CAP_IPC_LOCK, for this process, if it may have it at all. */
static bool
set_right(bool wanted)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    const uint32_t bit = UINT32_C(1) << CAP_IPC_LOCK;

    NEED(syscall(SYS_capget, &header, data) == 0);
    bool may = (data[0].permitted & bit) != 0;
    data[0].effective =
        wanted && may ? data[0].effective | bit : data[0].effective & ~bit;
    NEED(syscall(SYS_capset, &header, data) == 0);
    return wanted && may;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};

    (void)argc;
    (void)argv;
    setrlimit(RLIMIT_MEMLOCK, &all);    /* else there is a hard limit */
    setrlimit(RLIMIT_NICE, &all);
    return 0;
}

static rlim_t
set_limit(__rlimit_resource_t resource, rlim_t wanted)
{
    struct rlimit limit;
    NEED(getrlimit(resource, &limit) == 0);
    limit.rlim_cur = wanted < limit.rlim_max ? wanted : limit.rlim_max;
    NEED(setrlimit(resource, &limit) == 0);
    return limit.rlim_cur;
}

static bool
can_be_mapped(size_t size)
{
    void *at = mmap(NULL, size, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        return false;
    }
    munmap(at, size);
    return true;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes bytes = {data, size};
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t kind = take(&bytes);
    rlim_t number = take_number(&bytes, kind / 2 % 9);

    if (kind >= 128) {
        number = ~number;       /* as much below the greatest */
    }
    bool right = set_right(kind % 2 == 1);
    rlim_t locked = set_limit(RLIMIT_MEMLOCK, number);
    bool found = harden_may_lock_all();
    CHECK(found || locked != RLIM_INFINITY);
    if (locked != RLIM_INFINITY) {
        CHECK(!found || right);
        CHECK(found == (right && locked < SIZE_MAX - 2 * page &&
                        can_be_mapped((size_t)locked + page)));
        CHECK(!harden_locks_future());
    }

    rlim_t nice_limit = set_limit(RLIMIT_NICE, number);
    int best = best_nice();
    CHECK(best >= -20 && best <= 20);
    CHECK(best == -20 ? nice_limit >= 40 : best + (int)nice_limit == 20);
    return 0;
}
