"""Native threads that kill and release: Reaper, and Reaping, one kill."""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock
from errno import EAGAIN, EINVAL, EMFILE, ENFILE, EPERM
from time import monotonic, monotonic_ns, sleep

from mrelease import _mrelease
from mrelease.closing import Closing
from mrelease.process import no_file_left, pid_of, pin, shown, take_files
from mrelease.protocol import Terms, as_release, nanoseconds, refusal
from mrelease.release import Outcome, Release
from mrelease.scheduling import Scheduling, policy_name
from mrelease.victim import Victim, start_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Generator, Iterable
    from types import TracebackType
    from typing import Any, Literal, SupportsIndex
    from weakref import ref

    from mrelease.process import HasPid
    from mrelease.protocol import HasFileno

    _Policy = Literal["auto", "fifo", "nice", "none"]

_SIGKILL = 9  # without the module signal, which takes long to import
_FILES_BACK = 100_000_000  # nanoseconds
_MOST_THREADS = 1024
_FEW_THREADS = 16

# The rungs of scheduling.h: where to begin, and what must be had.
_FIFO, _NICE, _LIMIT, _NONE = range(4)
_RUNGS = {
    "auto": (_FIFO, _NONE),
    "fifo": (_FIFO, _FIFO),
    "nice": (_NICE, _LIMIT),
    "none": (_NONE, _NONE),
}


def _scheduling(
    found: tuple[int, int, int, int, list[int]], policy: str
) -> Scheduling:
    number, priority, nice, refused, cpus = found
    why = ""
    if refused and policy == "auto":
        why = (
            f"SCHED_FIFO is not allowed ({os.strerror(refused)}): it needs "
            "CAP_SYS_NICE or RLIMIT_RTPRIO"
        )
    elif refused:
        why = f"nice -20 is not allowed ({os.strerror(refused)})"
    return Scheduling(policy_name(number), priority, nice, tuple(cpus), why)


class _Readable:
    """A file descriptor that can always be read: of what is done already."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd, end = os.pipe()
        os.close(end)

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        os.close(self._fd)


_first_use = allocate_lock()


class Reaping:
    """The kill of one process by a Reaper: under way, or done.

    It goes on whether anybody waits for it or not; but if its Reaper is
    dropped, the grace is cut short.  It can be awaited in asyncio, by any
    number of tasks; elsewhere fileno() polls readable once it is done.  Safe
    to use from several threads.
    """

    __slots__ = (
        "__weakref__",
        "_job",
        "_pid",
        "_pool",
        "_readable",
        "_release",
        "_victim",
        "_waiters",
    )

    def __init__(
        self,
        pid: int,
        pool: _mrelease.Pool,
        job: _mrelease.Job | None = None,
        *,
        release: Release | None = None,
        victim: Victim | None = None,
    ) -> None:
        self._pid = pid
        self._pool = pool
        self._job = job
        self._release = release
        self._victim = victim
        self._readable: _mrelease.Job | _Readable | None = job
        self._waiters: dict[AbstractEventLoop, list[Future[None]]] = {}

    @property
    def pid(self) -> int:
        """The pid of the victim."""
        return self._pid

    def done(self) -> bool:
        """Whether there is a result."""
        return self._release is not None or (
            self._job is not None and self._job.done()
        )

    def fileno(self) -> int:
        """Give a file descriptor that polls readable once it is done.

        It is the Reaping's: do not read from it or close it, and do not use
        it when the Reaping is no more.
        """
        if self._readable is None:
            with _first_use:
                if self._readable is None:
                    self._readable = _Readable()
        return self._readable.fileno()

    def result(self, timeout: float | None = None) -> Release:
        """Wait for what became of the victim, at most timeout seconds.

        None waits for as long as it takes, which is at most the grace and the
        timeout of the kill.  Raises TimeoutError, and the kill goes on;
        TypeError, ValueError for a bad timeout, and ValueError in a forked
        child for what was not done at the fork: its Reaper has stayed with
        the parent.
        """
        left = -1 if timeout is None else nanoseconds("timeout", timeout)
        if self._release is None:
            job = self._job
            assert job is not None
            if not job.done():
                if self._pool.state() == "forked":
                    raise _forked()
                if not job.wait(left):
                    raise TimeoutError(
                        f"pid {self._pid} is not done after {timeout:g} s; "
                        "the kill goes on"
                    )
            self._release = self._settle(job)
        return self._release

    def _settle(self, job: _mrelease.Job) -> Release:
        result = job.result()
        if isinstance(result, int):
            return _refused(self._pid, refusal(self._pid, result))
        release = as_release(self._pid, result)
        victim = self._victim
        return release if victim is None else victim._remember(release)

    def _refuse(self, error: Exception) -> None:
        """Take it that nothing was done."""
        self._release = _refused(self._pid, error)
        self._job = self._readable = None

    def _detach(self) -> None:
        """Give the file descriptors back, of what is done."""
        self.result(0)
        self._job = self._readable = None

    def __await__(self) -> Generator[Any, None, Release]:
        if not self.done():
            yield from self._wait().__await__()
        return self.result(0)

    async def _wait(self) -> None:
        from asyncio import get_running_loop

        if self._pool.state() == "forked":
            raise _forked()
        loop = get_running_loop()
        waiters = self._waiters.setdefault(loop, [])
        if not waiters:
            loop.add_reader(self.fileno(), self._wake, loop)
        waiter = loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        finally:
            waiters.remove(waiter)
            if not waiters:
                loop.remove_reader(self.fileno())
                self._waiters.pop(loop, None)

    def _wake(self, loop: AbstractEventLoop) -> None:
        loop.remove_reader(self.fileno())
        for waiter in self._waiters.get(loop, ()):
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        state = "done" if self.done() else "under way"
        return f"<Reaping pid={self._pid} {state}>"


def _forked() -> ValueError:
    return ValueError(
        "this Reaper is closed here: its threads stayed with the process that "
        "made it. After fork(), make another one"
    )


def _refused(pid: int, error: Exception) -> Release:
    """Give the result, among many, of a process that was not signalled."""
    if isinstance(error, ProcessLookupError):
        return Release(pid, Outcome.GONE)
    errno = error.errno if isinstance(error, OSError) else None
    return Release(pid, Outcome.DENIED, errno=errno)


def _check_number(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not low <= value <= _MOST_THREADS:
        raise ValueError(
            f"{name} must be from {low} to {_MOST_THREADS}, not {shown(value)}"
        )


def _cpus(cpus: Iterable[object] | None) -> list[int] | None:
    if cpus is None:
        return None
    wanted: list[int] = []
    for cpu in cpus:
        if isinstance(cpu, bool) or not isinstance(cpu, int):
            raise TypeError(f"a CPU must be an int, not {type(cpu).__name__}")
        if not 0 <= cpu < 1024:
            raise ValueError(f"there is no CPU {shown(cpu)}")
        wanted.append(cpu)
    if not wanted:
        raise ValueError("cpus must not be empty")
    return wanted


class Reaper(Closing):
    """Native threads that kill processes and release their memory.

    A kill does not wait for them: SIGKILL leaves in the caller's thread.  It
    is what the release needs: a thread of the Reaper, which never waits for
    Python, is in its loop of process_mrelease(2) before the signal is sent, so
    that the victim cannot put its memory out of reach first.  Waiting for that
    thread takes some tens of microseconds and is bounded: 0.5 ms for it to
    wake up (less each time that it was in vain), 1 ms for its look at the
    robust locks, and 5 microseconds more for each thread of the victim.
    If it is not there by then, the kill goes out first; the locks are looked
    at all the same before the release.

    threads  how many release at the same time; by default one for each CPU
             that the caller may use, at most 16.  Where more victims are
             killed, the others are released in turn, the biggest first; each
             has been sent its SIGKILL by then
    spares   threads that stand in for those that are stuck in the kernel with
             a victim that holds its mmap_lock (a thread is taken to be if it
             is with one victim for 10 ms while others wait).  Beyond that
             many, releases wait, but not kills, nor whoever waits for them
    cpus     the CPUs that the threads may use; by default those of the caller
    policy   their scheduling: 'auto' takes SCHED_FIFO with priority 1 if that
             is allowed, else the best nice that is, else what the caller has;
             'fifo' and 'nice' raise PermissionError if it cannot be had;
             'none' leaves it as it is

    All threads are made here, none when something is killed; they have small
    stacks and all signals blocked, and neither their scheduling nor their CPUs
    are applied to the caller.  One more thread watches the victims to their
    end, and raises them where permitted (CAP_SYS_NICE).

    Safe to use from several threads.  A with statement closes it, and cuts
    graces short if it ends with KeyboardInterrupt or the like.  In a forked
    child it is closed.  At the end of the interpreter what is under way is
    left to itself, but graces are cut short.

    Raises TypeError, ValueError for bad arguments or CPUs that cannot be used;
    PermissionError as above; OSError if the threads cannot be made.
    """

    __slots__ = ("__weakref__", "_pool", "_scheduling")

    _pool: _mrelease.Pool

    def __init__(
        self,
        threads: int | None = None,
        *,
        cpus: Iterable[int] | None = None,
        policy: _Policy = "auto",
        spares: int = 8,
    ) -> None:
        if policy not in tuple(_RUNGS):  # it may be unhashable
            raise ValueError(
                "policy must be 'auto', 'fifo', 'nice' or 'none', not "
                f"{shown(policy)}"
            )
        best, least = _RUNGS[policy]
        wanted = _cpus(cpus)
        if threads is None:
            usable = wanted or os.sched_getaffinity(0)
            threads = min(_FEW_THREADS, len(usable))
        _check_number("threads", threads, 1)
        _check_number("spares", spares, 0)
        try:
            self._pool, found = _mrelease.pool_new(
                threads, spares, best, least, wanted
            )
        except OSError as error:
            raise _cannot_start(error, policy, wanted) from None
        self._scheduling = _scheduling(found, policy)
        _end_with_interpreter(self)

    @property
    def scheduling(self) -> Scheduling:
        """How the threads are scheduled, and why not better."""
        return self._scheduling

    @property
    def closed(self) -> bool:
        """Whether it takes no more kills."""
        return self._pool.state() != "open"

    def kill(
        self,
        process: Victim | HasPid | SupportsIndex,
        *,
        grace: float = 0.0,
        escalate_on: HasFileno | int | None = None,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> Reaping:
        """Kill a process, and have its memory released by native threads.

        The arguments are those of mrelease.kill().  Without a grace SIGKILL
        has been sent on return, else SIGTERM has; escalate_on may be closed
        then.  What became of it is told by the Reaping, at the latest when
        grace and timeout are over, even if the kernel does not come back from
        the release.

        Raises what mrelease.kill() raises, before anything was signalled, and
        ValueError if this Reaper is closed.
        """
        begun = monotonic_ns()
        terms = Terms(grace, escalate_on, timeout, locks)
        self._check_open()
        victim = process if isinstance(process, Victim) else None
        pidfd, pid = _pin(process)
        job = _job(pidfd, pid, terms, begun)
        self._submit([job])
        if job.done():
            result = job.result()
            if isinstance(result, int):
                raise refusal(pid, result)
        return Reaping(pid, self._pool, job, victim=victim)

    def kill_many(
        self,
        processes: Iterable[Victim | HasPid | SupportsIndex],
        *,
        grace: float = 0.0,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> list[Reaping]:
        """Kill many processes, and have their memory released.

        All are pinned first, then all are killed, the biggest first.  If there
        are not enough file descriptors to pin all, it is done for as many as
        there are, and again for the rest when those are done.

        Gives a Reaping for each, in the order given.  A process that is gone
        or may not be signalled has one that is done, with Outcome.GONE or
        Outcome.DENIED.  Raises TypeError, ValueError for what must not be
        killed, before any process was signalled; OSError if not even one can
        be pinned.  After that nothing is raised but what a signal handler or
        an audit hook of the caller's raises.
        """
        begun = monotonic_ns()
        terms = Terms(grace, None, timeout, locks)
        self._check_open()
        return _Batch(self, terms, begun).kill(_listed(processes))

    def close(self, timeout: float | None = None) -> bool:
        """Take no more kills, and wait for what is under way.

        Waits for the results, and for the threads to end, but for those that
        are stuck in the kernel with a victim whose result is there; at most
        timeout seconds (None: as long as it takes).  When the time is over,
        graces are cut short: SIGKILL goes out, and the rest goes on without
        being waited for.  True if all was done in time.  Closing twice is no
        error.  Raises TypeError, ValueError for a bad timeout.
        """
        left = -1 if timeout is None else nanoseconds("timeout", timeout)
        in_time = self._pool.close(left)
        if not in_time:
            self._pool.hurry()  # waits until SIGKILL is out
        return in_time

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # KeyboardInterrupt, say: who wants to end does not wait for a grace.
        urgent = kind is not None and not issubclass(kind, Exception)
        self.close(0 if urgent else None)

    def _check_open(self) -> None:
        state = self._pool.state()
        if state != "open":
            raise _not_open(state)

    def _submit(self, jobs: list[_mrelease.Job]) -> None:
        state = _mrelease.submit(self._pool, jobs)
        if state != "open":
            raise _not_open(state)

    def __del__(self) -> None:
        # Not made whole, or at the end of the interpreter: there is no telling
        # what is left of it.  Of free-threaded Python not even this module.
        if getattr(self, "_pool", None) is None:
            return
        if getattr(sys, "meta_path", None) is None:
            return
        if self.closed:
            return
        import warnings

        try:
            warnings.warn(
                f"unclosed {self!r}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
        finally:
            # Its threads end when what is under way is done.
            self.close(0)

    def __repr__(self) -> str:
        return f"<Reaper {self._pool.state()}, {self._scheduling}>"


def check_reaper(reaper: object) -> None:
    """Raise TypeError, ValueError if it is given and cannot be used."""
    if reaper is None:
        return
    if not isinstance(reaper, Reaper):
        raise TypeError(
            f"reaper must be a Reaper or None, not {type(reaper).__name__}"
        )
    reaper._check_open()


def kill_pinned(
    reaper: Reaper,
    victims: list[Victim],
    grace: float,
    timeout: float,
    locks: Literal["protect", "ignore"],
    *,
    signalled: bool,
) -> list[Reaping]:
    """Kill by a reaper, and in this thread what it does not take.

    It may have been closed meanwhile, or have no file descriptor left.  Raises
    what its kill_many() does, but nothing once something was signalled.
    """
    until = monotonic() + grace + timeout
    found: dict[Victim, Reaping] = {}
    try:
        reapings = reaper.kill_many(
            victims, grace=grace, timeout=timeout, locks=locks
        )
        found.update(zip(victims, reapings, strict=True))
    except (OSError, ValueError):
        if not signalled:
            raise
    left = [v for v in victims if v not in found or _is_not_taken(found[v])]
    here = _kill_here(left, max(0.0, until - monotonic()), locks)
    for victim, release in zip(left, here, strict=True):
        found[victim] = Reaping(victim.pid, reaper._pool, release=release)
    return [found[victim] for victim in victims]


def _is_not_taken(reaping: Reaping) -> bool:
    """Whether it was refused for want of something of the Reaper's own."""
    if not reaping.done():
        return False
    release = reaping.result()
    return release.outcome is Outcome.DENIED and (
        release.errno in (None, EMFILE, ENFILE)
    )


def _kill_here(
    victims: list[Victim], timeout: float, locks: Literal["protect", "ignore"]
) -> list[Release]:
    """Kill them in this thread, when a Reaper cannot, and raise nothing."""
    until = monotonic() + timeout
    for victim in victims:
        try:
            _mrelease.pidfd_signal(victim, _SIGKILL)
        except OSError:
            pass  # told below
    found: list[Release] = []
    for victim in victims:
        left = max(0.0, until - monotonic())
        try:
            release = victim.kill(timeout=left, locks=locks)
        except (OSError, ValueError) as error:
            release = _refused(victim.pid, error)
        found.append(release)
    return found


def _listed(
    processes: Iterable[Victim | HasPid | SupportsIndex],
) -> list[Victim | HasPid | SupportsIndex]:
    try:
        each = iter(processes)
    except TypeError:
        raise TypeError(
            "processes must be an iterable of what kill() takes, not "
            f"{type(processes).__name__}"
        ) from None
    return list(each)


class _Batch:
    """The kill of many processes by a Reaper."""

    def __init__(self, reaper: Reaper, terms: Terms, begun: int) -> None:
        self._reaper = reaper
        self._terms = terms
        self._begun = begun
        self._reapings: list[Reaping] = []
        self._ready: list[Reaping] = []
        self._sent = False

    def kill(
        self, processes: list[Victim | HasPid | SupportsIndex]
    ) -> list[Reaping]:
        pids = [_check(process) for process in processes]
        # For a look at the rest, when all others are in use.
        spare = take_files(3) if len(processes) > 1 else []
        for at, (process, pid) in enumerate(zip(processes, pids, strict=True)):
            if not self._try_to_add(process, pid):
                if not self._sent:
                    spare.clear()
                    _look_at(processes[at:])
                self._flush()
                self._wait()
                self._add_patiently(process, pid)
        self._flush()
        return self._reapings

    def _try_to_add(
        self, process: Victim | HasPid | SupportsIndex, pid: int
    ) -> bool:
        """Give False if no file descriptor was left.

        When it returns, what it had opened is closed: an exception that is
        being handled would keep it.
        """
        try:
            self._add(process, pid)
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                return False
            self._refuse(pid, error)
        except (TypeError, ValueError) as error:
            if not self._sent:
                raise
            self._refuse(pid, error)
        return True

    def _wait(self) -> None:
        for reaping in self._reapings:
            reaping.result()
            reaping._detach()

    def _add_patiently(
        self, process: Victim | HasPid | SupportsIndex, pid: int
    ) -> None:
        """Add it once there are file descriptors again."""
        until = monotonic_ns() + _FILES_BACK
        while True:
            try:
                return self._add(process, pid)
            except OSError as error:
                if not self._sent:
                    raise
                # The threads close them when all have their results.
                if (
                    error.errno not in (EMFILE, ENFILE)
                    or monotonic_ns() > until
                ):
                    return self._refuse(pid, error)
            except (TypeError, ValueError) as error:
                if not self._sent:
                    raise
                return self._refuse(pid, error)
            sleep(0.0005)

    def _add(self, process: Victim | HasPid | SupportsIndex, pid: int) -> None:
        pidfd, pid = _pin(process)
        victim = process if isinstance(process, Victim) else None
        if victim is None:
            _refuse_kernel_thread(pidfd, pid)
        job = _job(pidfd, pid, self._terms, self._begun)
        reaping = Reaping(pid, self._reaper._pool, job, victim=victim)
        self._ready.append(reaping)
        self._reapings.append(reaping)

    def _refuse(self, pid: int, error: Exception) -> None:
        self._reapings.append(
            Reaping(pid, self._reaper._pool, release=_refused(pid, error))
        )

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        if not ready:
            return
        try:
            self._reaper._submit([job for each in ready if (job := each._job)])
        except ValueError as error:  # closed by another thread meanwhile
            if not self._sent:
                raise
            for reaping in ready:
                reaping._refuse(error)
        self._sent = True


def _check(process: Victim | HasPid | SupportsIndex) -> int:
    """Give the pid; raise for what no process of a batch may be."""
    if isinstance(process, Victim):
        process._open()
        return process.pid
    try:
        return pid_of(process)
    except ProcessLookupError:
        return int(process.pid)  # type: ignore[union-attr, arg-type]


def _refuse_kernel_thread(pidfd: _mrelease.Pidfd, pid: int) -> None:
    """Raise ValueError if it is one.

    They are in process group 0; a look at /proc takes 20 times as long.
    """
    try:
        if os.getpgid(pid) != 0:
            return
    except OSError:
        pass
    start_of(pidfd, pid)  # raises if it is one


def _look_at(processes: list[Victim | HasPid | SupportsIndex]) -> None:
    """Raise for what must not be killed, before anything was signalled."""
    for process in processes:
        if isinstance(process, Victim):
            continue
        try:
            pidfd, pid = pin(process)
            _refuse_kernel_thread(pidfd, pid)
            pidfd.close()
        except OSError:
            pass  # told when its turn comes


def _pin(
    process: Victim | HasPid | SupportsIndex,
) -> tuple[_mrelease.Pidfd, int]:
    if isinstance(process, Victim):
        return process._open(), process.pid
    return pin(process)


def _job(
    pidfd: _mrelease.Pidfd, pid: int, terms: Terms, begun: int
) -> _mrelease.Job:
    try:
        return _mrelease.job_new(
            pidfd.fileno(),
            pid,
            begun,
            terms.grace,
            terms.timeout,
            terms.escalate,
            terms.protect,
        )
    except OSError as error:
        if error.errno in (EMFILE, ENFILE):
            raise no_file_left(pid, error.errno) from None
        raise OSError(
            error.errno,
            f"cannot kill pid {pid}: {error.strerror}; nothing was signalled",
        ) from None


def _not_open(state: str) -> ValueError:
    if state == "forked":
        return _forked()
    return ValueError("this Reaper is closed")


def _cannot_start(
    error: OSError, policy: str, cpus: list[int] | None
) -> Exception:
    if error.errno == EPERM:
        what = {
            "fifo": "SCHED_FIFO may not be had: it needs CAP_SYS_NICE or "
            "RLIMIT_RTPRIO",
            "nice": "no better nice may be had: it needs CAP_SYS_NICE or "
            "RLIMIT_NICE",
        }.get(policy, "a thread may not set its scheduling or its CPUs")
        return PermissionError(EPERM, f"policy={policy!r}: {what}")
    if error.errno == EINVAL and cpus is not None:
        return ValueError(f"none of these CPUs may be used here: {cpus}")
    if error.errno == EAGAIN:
        return OSError(
            EAGAIN,
            "cannot start the threads of a Reaper (RLIMIT_NPROC, the pids "
            "cgroup, or memory)",
        )
    return OSError(error.errno, f"cannot start a Reaper: {error.strerror}")


_living: set[ref[Reaper]] = set()
_registered = False


def _end_with_interpreter(reaper: Reaper) -> None:
    """Cut the graces of a Reaper short when the interpreter ends."""
    global _registered
    import atexit
    import weakref

    if not _registered:
        _registered = True
        atexit.register(_hurry_all)
    _living.add(weakref.ref(reaper, _living.discard))


def _hurry_all() -> None:
    for reference in tuple(_living):
        reaper = reference()
        if reaper is not None:
            reaper._pool.hurry()
