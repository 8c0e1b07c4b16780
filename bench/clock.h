/* The clock that all programs of the benchmarks share, and Python's
 * time.monotonic_ns(): what one stamps can be compared in another.
 */

#ifndef BENCH_CLOCK_H
#define BENCH_CLOCK_H

#include <stdint.h>             /* int64_t */
#include <time.h>               /* clock_gettime() */

static inline int64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif /* BENCH_CLOCK_H */
