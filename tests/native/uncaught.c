/* The system calls that valgrind does not know, past it (LD_PRELOAD).

   It answers ENOSYS to what it does not know, and no version of it knows
   process_mrelease() and pidfd_send_signal(); that of Debian 12 does not know
   pidfd_open() and seccomp() either.  Here syscall() makes these on the real
   CPU (see VALGRIND_NON_SIMD_CALL1 in valgrind.h); all but the last, which is
   the tests', take numbers, of which memcheck has nothing to check but that
   they are defined.

   While such a call is in the kernel no other thread runs.  So a call that
   waits for one of these hangs: what is held by seccomp is not for valgrind. */

#define _GNU_SOURCE

#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <valgrind/memcheck.h>

#ifndef SYS_pidfd_send_signal
#  define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#  define SYS_pidfd_open 434
#endif
#ifndef SYS_process_mrelease
#  define SYS_process_mrelease 448
#endif

/* As libc's, which is not called: it would be caught again.  There is no other
   way.  NOLINTBEGIN(portability-no-assembler) */
static long
call(const long *words)
{
    long result;
#if defined(__x86_64__)
    register long r10 __asm__("r10") = words[4];
    register long r8 __asm__("r8") = words[5];
    register long r9 __asm__("r9") = words[6];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(words[0]), "D"(words[1]), "S"(words[2]),
                       "d"(words[3]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = words[0];
    register long x0 __asm__("x0") = words[1];
    register long x1 __asm__("x1") = words[2];
    register long x2 __asm__("x2") = words[3];
    register long x3 __asm__("x3") = words[4];
    register long x4 __asm__("x4") = words[5];
    register long x5 __asm__("x5") = words[6];
    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    result = x0;
#else
#  error "how does this architecture make a system call?"
#endif
    return result;
}
/* NOLINTEND(portability-no-assembler) */

static long
call_uncaught(unsigned long thread, const long *words)
{
    (void)thread;
    return call(words);
}

/* Instead of libc's.  NOLINTBEGIN(misc-use-internal-linkage) */
long
syscall(long number, ...);
/* NOLINTEND(misc-use-internal-linkage) */

long
syscall(long number, ...)
{
    long words[7] = {number};
    long result;
    va_list args;

    va_start(args, number);
    for (int i = 1; i < 7; i++) {
        words[i] = va_arg(args, long);
    }
    va_end(args);
    switch (number) {
    case SYS_seccomp:
    case SYS_pidfd_send_signal:
    case SYS_pidfd_open:
    case SYS_process_mrelease:
        /* More were read than were given: the others are not looked at. */
        VALGRIND_MAKE_MEM_DEFINED(words, sizeof(words));
        result =
            (long)VALGRIND_NON_SIMD_CALL1(call_uncaught, (const long *)words);
        break;
    default:
        result = call(words);
        break;
    }
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}
