"""Kill processes, release their memory, and tell what became of it."""

from __future__ import annotations

from time import monotonic_ns

from mrelease.process import pin
from mrelease.protocol import Terms, carry_out
from mrelease.reaper import Reaper, check_reaper
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal, SupportsIndex

    from mrelease.process import HasPid
    from mrelease.protocol import HasFileno
    from mrelease.release import Release


def kill(
    process: Victim | HasPid | SupportsIndex,
    *,
    grace: float = 0.0,
    escalate_on: HasFileno | int | None = None,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
) -> Release:
    """Kill a process, free its memory, and tell what became of it.

    process is a pid, an object with a pid (subprocess.Popen,
    multiprocessing.Process, asyncio's, psutil's) or a Victim.

    With a grace, in seconds, SIGTERM goes out first.  If the process has not
    ended when the grace is over, or when escalate_on can be read (an eventfd,
    a pipe: a file descriptor or an object with fileno(), open until the call
    returns) or has news (a pressure trigger; not cgroup.events or
    memory.events, which tell of news by an error), SIGKILL follows on the same
    pidfd.

    SIGKILL and process_mrelease(2) leave in one native call, in the calling
    thread, without the GIL.  Then the victim is raised, where permitted, so
    that it can finish dying, and the call waits until it has ended, or its
    memory is known to be back, or timeout seconds have passed since SIGKILL.
    A victim that the scheduler puts behind the caller (SCHED_IDLE,
    SCHED_BATCH, a higher nice, above 0) is raised before the release, since it
    can help.  So the call takes at most grace + timeout, save for what waits
    for the victim's mmap_lock: process_mrelease(2), and the look at the robust
    locks, which comes before SIGKILL, or after it if there are more than 128
    threads.

    A victim with more than 512 threads and less than 160 KiB a thread gets 50
    microseconds a thread (at most half of timeout) to end by itself, which is
    sooner than all that (measured: `make bench-growth`); then it is released.
    Not if the scheduler puts it behind the caller, or if it has shared memory
    or huge pages.

    locks='protect' withholds the release of a victim that holds robust locks,
    since whoever waits for them would never be woken; it is killed all the
    same (Outcome.LOCKED).  A lock that is taken in the microseconds between
    the look and SIGKILL is not seen.  locks='ignore' does not look: a victim
    that never lets go of its mmap_lock is killed then, too.  One that hangs in
    execve(2) has none, and is killed, too; whether its old memory is back is
    not known until it has ended (freed is false).

    Raises, before anything was signalled: TypeError, ValueError for bad
    arguments, pid 1, the caller itself, a kernel thread; ProcessLookupError if
    there is no such process (any more); PermissionError if it may not be
    signalled; OSError if no pidfd can be had.  After a signal nothing is
    raised but what a signal handler of the caller's raises (KeyboardInterrupt,
    say); the process is killed then all the same, its grace cut short.

    Raises an auditing event mrelease.kill with argument pid.
    """
    begun = monotonic_ns()
    terms = Terms(grace, escalate_on, timeout, locks)
    if isinstance(process, Victim):
        return process._carry_out(terms, begun)
    pidfd, pid = pin(process)
    try:
        return carry_out(pidfd, pid, terms, begun)
    finally:
        pidfd.close()


def kill_many(
    processes: Iterable[Victim | HasPid | SupportsIndex],
    *,
    grace: float = 0.0,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
    reaper: Reaper | None = None,
) -> list[Release]:
    """Kill many processes, free their memory, and tell what became of each.

    Reaper.kill_many(), waited for: all are pinned, then all are killed, then
    released side by side, the biggest first.  The results are in the order
    given; a process that is gone or may not be signalled has a Release with
    Outcome.GONE or Outcome.DENIED.  The threads are those of reaper, or of one
    that is made for this call: a program that kills under memory pressure
    makes it in advance.

    Raises TypeError, ValueError for what must not be killed, before any
    process was signalled; OSError if not even one can be pinned, or the
    threads cannot be made.
    """
    check_reaper(reaper)
    if reaper is None:
        with Reaper() as own:
            return kill_many(
                processes,
                grace=grace,
                timeout=timeout,
                locks=locks,
                reaper=own,
            )
    reapings = reaper.kill_many(
        processes, grace=grace, timeout=timeout, locks=locks
    )
    return [reaping.result() for reaping in reapings]
