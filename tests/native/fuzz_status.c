/* /proc/PID/status: read_status_fd() over any text, in a file and, where the
   end of a read is anywhere, in packets.  Compared with a parser of lines. */

#define _GNU_SOURCE

#include <sys/mman.h>           /* memfd_create() */
#include <sys/socket.h>         /* socketpair() */

#include "fuzz.h"
#include "procfs.c"

#define TID 4711
#define LONGEST_LINE 4094       /* in the 4096 bytes of the reader */
#define PACKETS 64

struct expected {
    struct procfs_status status;
    bool has_mm;
    bool odd;                   /* a mask that no kernel writes */
};

static bool
is_key(const char *line, const char *colon, const char *key)
{
    return (size_t)(colon - line) == strlen(key) &&
           memcmp(line, key, strlen(key)) == 0;
}

static int
digit_of(char c)
{
    const char *digits = "00112233445566778899aAbBcCdDeEfF";
    const char *found = c == '\0' ? NULL : strchr(digits, c);
    return found == NULL ? -1 : (int)(found - digits) / 2;
}

static unsigned long long
mask_of(const char *text, const char *end, bool *odd)
{
    unsigned long long mask = 0;
    while (text < end && (*text == ' ' || *text == '\t')) {
        text++;
    }
    *odd |= text == end || digit_of(*text) < 0 ||
            (end - text > 1 && (text[1] == 'x' || text[1] == 'X'));
    for (; text < end && digit_of(*text) >= 0; text++) {
        mask = mask >> 60 != 0 ? ~0ULL : mask << 4 | (unsigned)digit_of(*text);
        if (mask == ~0ULL) {
            break;              /* more is as much */
        }
    }
    return mask;
}

static void
expect_line(struct expected *expected, const char *line, const char *end)
{
    struct procfs_status *status = &expected->status;
    const struct {
        const char *key;
        int64_t *bytes;
    } sizes[] = {
        {"RssAnon", &status->anon},         {"RssFile", &status->file},
        {"RssShmem", &status->shmem},       {"VmSwap", &status->swap},
        {"HugetlbPages", &status->hugetlb},
    };
    const char *colon = memchr(line, ':', (size_t)(end - line));
    long long number;

    if (colon == NULL) {
        return;
    }
    decimal(colon + 1, end, &number);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (is_key(line, colon, sizes[i].key)) {
            const long long most = INT64_MAX / 8 / 1024;
            number = number < 0 ? 0 : number > most ? most : number;
            *sizes[i].bytes = number * 1024;
            expected->has_mm = true;
        }
    }
    if (is_key(line, colon, "Tgid")) {
        status->tgid = (pid_t)number;
    }
    if (is_key(line, colon, "Pid")) {
        status->pid = (pid_t)number;
    }
    if (is_key(line, colon, "Threads")) {
        status->threads = (int)number;
    }
    if (is_key(line, colon, "CoreDumping")) {
        status->dumping = number != 0;
    }
    if (is_key(line, colon, "ShdPnd")) {
        status->kill_pending |=
            mask_of(colon + 1, end, &expected->odd) >> (SIGKILL - 1) & 1;
    }
}

static void
compare(const char *text, size_t size, int err, struct procfs_status *found)
{
    struct expected expected = {.odd = false};
    const char *line = text;
    const char *end;

    while ((end = memchr(line, '\n', (size_t)(text + size - line))) != NULL) {
        if (end - line <= LONGEST_LINE) {
            expect_line(&expected, line, end);
        }
        line = end + 1;
    }
    const struct procfs_status *wanted = &expected.status;
    bool known = wanted->threads > 0 && wanted->pid == TID;
    CHECK(err == (known ? 0 : ESRCH));
    CHECK(found->anon == wanted->anon && found->file == wanted->file);
    CHECK(found->shmem == wanted->shmem && found->swap == wanted->swap);
    CHECK(found->hugetlb == wanted->hugetlb);
    CHECK(found->tgid == wanted->tgid && found->threads == wanted->threads);
    CHECK(found->dumping == wanted->dumping);
    CHECK(found->user == (expected.has_mm ? TID : 0));
    CHECK(expected.odd || found->kill_pending == wanted->kill_pending);
}

static void
in_packets(const uint8_t *data, size_t size)
{
    struct procfs_status found;
    int ends[2];
    size_t step = size / PACKETS + 1;

    NEED(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    while (size > 0) {
        size_t part = step < size ? step : size;
        NEED(send(ends[1], data, part, MSG_DONTWAIT) == (ssize_t)part);
        data += part;
        size -= part;
    }
    close(ends[1]);
    int err = read_status_fd(ends[0], TID, &found);
    CHECK(err == 0 || err == ESRCH);
    close(ends[0]);
}

static int file = -1;

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    file = memfd_create("status", MFD_CLOEXEC);
    NEED(file >= 0);
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static size_t before;
    struct procfs_status found;

    NEED(pwrite(file, data, size, 0) == (ssize_t)size);
    if (size < before) {
        NEED(ftruncate(file, (off_t)size) == 0);
    }
    before = size;
    lseek(file, 0, SEEK_SET);
    int err = read_status_fd(file, TID, &found);
    CHECK(found.anon >= 0 && found.anon + found.swap + found.file >= 0);
    /* A NUL ends the text for a reader of strings; the kernel writes none. */
    if (memchr(data, '\0', size) == NULL) {
        compare((const char *)data, size, err, &found);
    }
    if (size % 16 == 1) {
        in_packets(data, size);
    }
    return 0;
}
