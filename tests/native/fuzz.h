/* For the fuzz targets: libFuzzer calls LLVMFuzzerTestOneInput() with inputs
   that it makes up, `make fuzz` builds and runs them.

   What a target checks it compares with a second source: a parser written for
   it, or what the kernel does.  A difference aborts, and is a finding. */

#ifndef MRELEASE_FUZZ_H
#define MRELEASE_FUZZ_H

#include <errno.h>
#include <limits.h>             /* LLONG_MAX */
#include <signal.h>             /* SIGKILL */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int
LLVMFuzzerInitialize(int *argc, char ***argv);
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must be so, or the input is a finding. */
#define CHECK(so)                                                             \
    do {                                                                      \
        if (!(so)) {                                                          \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #so);  \
            abort();                                                          \
        }                                                                     \
    } while (0)

/* What a target needs to run at all. */
#define NEED(so)                                                              \
    do {                                                                      \
        if (!(so)) {                                                          \
            fprintf(stderr, "cannot be fuzzed here: %s: %s\n", #so,           \
                    strerror(errno));                                         \
            exit(86);                                                         \
        }                                                                     \
    } while (0)

/* The input, taken byte by byte; at its end come zeros. */
struct bytes {
    const uint8_t *at;
    size_t left;
};

static inline uint8_t
take(struct bytes *bytes)
{
    if (bytes->left == 0) {
        return 0;
    }
    bytes->left--;
    return *bytes->at++;
}

static inline uint64_t
take_number(struct bytes *bytes, int size)
{
    uint64_t number = 0;
    while (size-- > 0) {
        number = number << 8 | take(bytes);
    }
    return number;
}

/* A decimal number as the kernel's readers take it: white space, a sign,
   digits, as big as fits.  Gives the text behind it, or NULL if there are no
   digits (then the number is 0). */
static inline const char *
decimal(const char *text, const char *end, long long *number)
{
    bool negative = false;
    unsigned long long size = 0;
    unsigned long long most = LLONG_MAX;

    *number = 0;
    while (text < end && (*text == ' ' || (*text >= '\t' && *text <= '\r'))) {
        text++;
    }
    if (text < end && (*text == '-' || *text == '+')) {
        negative = *text++ == '-';
    }
    if (text == end || *text < '0' || *text > '9') {
        return NULL;
    }
    most += negative;
    for (; text < end && *text >= '0' && *text <= '9'; text++) {
        unsigned digit = (unsigned)(*text - '0');
        size = size > (most - digit) / 10 ? most : size * 10 + digit;
    }
    *number = negative ? (long long)(0 - size) : (long long)size;
    return text;
}

/* A child ends with its maker, however that ends. */
static inline void
end_with_parent(pid_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent) {
        _exit(0);
    }
}

#endif /* MRELEASE_FUZZ_H */
