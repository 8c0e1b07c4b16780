"""A process that is pinned by a pidfd, to be killed now or later."""

from __future__ import annotations

import os
import sys
from errno import EBADF, ENOENT, ESRCH
from time import monotonic_ns

from mrelease import _mrelease
from mrelease.closing import Closing
from mrelease.footprint import Footprint
from mrelease.process import (
    as_int,
    check_start,
    no_such_process,
    other_process,
    pid_of,
    pin,
    read_fields,
    shown,
)
from mrelease.protocol import Terms, carry_out, kernel_thread
from mrelease.release import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, Self, SupportsIndex

    from mrelease.process import HasPid
    from mrelease.protocol import HasFileno
    from mrelease.release import Release


_PIDFD_THREAD = os.O_EXCL  # pidfd_open(2), Linux 6.9


class Victim(Closing):
    """A process, pinned: its pid may be reused, this stays with the process.

    process is a pid, or an object with a pid: subprocess.Popen,
    multiprocessing.Process, asyncio's, psutil's.  What such an object knows of
    its process (still a child, create time) is checked once the pidfd is open.
    Of another Victim, the pidfd is duplicated.  What cannot be checked: a
    Popen whose child was waited for behind its back, if another child of the
    caller's has the pid now.

    started is the start time that the process must have: field 22 of
    /proc/PID/stat, in clock ticks since boot.  Give it when the pid was read
    some time ago (from a scan of /proc, say).  Within one tick (10 ms) two
    processes of the same pid cannot be told apart by it.

    Making a Victim needs no right over the process and changes nothing.  It
    holds one file descriptor until close(); a with statement closes it.  Safe
    to use from several threads.

    Raises TypeError for what is no process; ValueError for 0, negative
    numbers, bool, pid 1, the caller itself, a thread, a kernel thread;
    ProcessLookupError if there is no such process, or another one has its pid;
    OSError if no pidfd can be had.
    """

    __slots__ = ("__weakref__", "_pid", "_pidfd", "_shared", "_started")

    _pidfd: _mrelease.Pidfd | None

    def __init__(
        self, process: HasPid | SupportsIndex, *, started: int | None = None
    ) -> None:
        self._pidfd = None
        check_start(started)
        if isinstance(process, Victim):
            # Its pid may be another process's by now, its pidfd is not.
            pidfd = _mrelease.pidfd_dup(process._open())
            pid = process.pid
        else:
            pidfd, pid = pin(process, started)
        self._adopt(pidfd, pid)
        if started is not None and self._started != started:
            self.close()
            raise other_process(pid, self._started, started)

    @classmethod
    def from_pidfd(cls, pidfd: HasFileno | int, /) -> Self:
        """Make a Victim of a pidfd, which is duplicated and stays open.

        Raises ValueError if it is no pidfd, one of a thread, or of a process
        that this process cannot see by a pid; ProcessLookupError if its
        process was waited for; else as Victim() does.
        """
        if isinstance(pidfd, bool) or not (
            isinstance(pidfd, int) or hasattr(pidfd, "fileno")
        ):
            raise TypeError(
                "expected a pidfd (int) or an object with fileno(), not "
                f"{type(pidfd).__name__}"
            )
        if isinstance(pidfd, int):
            given = int(pidfd)
        else:
            kind = type(pidfd).__name__
            given = as_int(pidfd.fileno(), f"the fileno() of this {kind}")
        try:
            own = _mrelease.pidfd_dup(given)
        except OverflowError:
            raise ValueError(
                f"{shown(given)} is not a file descriptor"
            ) from None
        except OSError as error:
            if error.errno != EBADF:
                raise
            raise ValueError(f"file descriptor {given} is not open") from None
        return cls._of(own, _pid_of_pidfd(own, given))

    @classmethod
    def _of(cls, pidfd: _mrelease.Pidfd, pid: int) -> Self:
        """Make a Victim of a pidfd, which is its own from now on."""
        self = cls.__new__(cls)
        self._pidfd = None
        self._adopt(pidfd, pid)
        return self

    def _adopt(self, pidfd: _mrelease.Pidfd, pid: int) -> None:
        self._started = start_of(pidfd, pid)
        self._pid = pid
        self._shared = False
        self._pidfd = pidfd

    def _open(self) -> _mrelease.Pidfd:
        """Give the pidfd, which stays open as long as it is referred to."""
        pidfd = self._pidfd
        if pidfd is None:
            raise ValueError("this Victim is closed")
        return pidfd

    @property
    def pid(self) -> int:
        """The pid that the process has or had."""
        return self._pid

    @property
    def started(self) -> int | None:
        """Clock ticks from boot to its start (field 22 of /proc/PID/stat).

        None if /proc could not be read, or the process was in the middle of
        execve(2) and did not come through.
        """
        return self._started

    @property
    def exited(self) -> bool:
        """Whether the whole process has ended (its pidfd polls readable)."""
        return _mrelease.pidfd_state(self._open()) != "running"

    def fileno(self) -> int:
        """Give the pidfd: it polls readable when the process has ended.

        It is the Victim's: do not close it, and do not use it after close().
        """
        return self._open().fileno()

    def footprint(self) -> Footprint:
        """Read how much memory the process holds now.

        All zero for a process that has ended but was not waited for.  Raises
        ProcessLookupError if it was waited for; OSError if /proc cannot be
        read.
        """
        pidfd = self._open()
        problem: OSError | None = None
        try:
            sizes = _mrelease.read_footprint(self._pid)[1]
        except OSError as error:
            problem = error
        # Only now is it certain that the pid was still this process's.
        if _mrelease.pidfd_state(pidfd) == "reaped":
            raise ProcessLookupError(
                ESRCH, f"pid {self._pid} has no memory: it has ended"
            )
        if problem is not None:
            raise OSError(
                problem.errno,
                f"cannot read /proc/{self._pid}/status: {problem.strerror}",
            )
        return Footprint(*sizes)

    def kill(
        self,
        *,
        grace: float = 0.0,
        escalate_on: HasFileno | int | None = None,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> Release:
        """Kill this process and release its memory: see mrelease.kill()."""
        begun = monotonic_ns()
        return self._carry_out(
            Terms(grace, escalate_on, timeout, locks), begun
        )

    def release(
        self,
        *,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> Release:
        """Release the memory of this process without sending a signal.

        For a process that is dying already: somebody else killed it, or an
        earlier kill() ran out of time.  If it is not dying nothing happens to
        it, and the outcome is ALIVE.  timeout, in seconds, counts from the
        call.  Raises ValueError and TypeError for bad arguments only.
        """
        begun = monotonic_ns()
        terms = Terms(0.0, None, timeout, locks)
        return self._carry_out(terms, begun, send=False)

    def _carry_out(
        self, terms: Terms, begun: int, *, send: bool = True
    ) -> Release:
        """Run the kill protocol on checked terms; begun is monotonic_ns()."""
        return self._remember(
            carry_out(self._open(), self._pid, terms, begun, send=send)
        )

    def _remember(self, release: Release) -> Release:
        """Judge a result by what earlier ones have shown."""
        if release.outcome is Outcome.SHARED:
            self._shared = True
        elif self._shared and release.outcome is Outcome.EXITED:
            # It has ended, but what it shared lived on: that is not forgotten.
            release = release.with_freed(False)
        return release

    def close(self) -> None:
        """Close the pidfd, at once or when the last call under way is done.

        The process is left as it is.  Closing twice is no error.
        """
        self._pidfd = None

    def __del__(self) -> None:
        # Not made whole, or at the end of the interpreter: there is no telling
        # what is left of it.  Of free-threaded Python not even this module.
        if getattr(self, "_pidfd", None) is None:
            return
        if getattr(sys, "meta_path", None) is None:
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
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._pidfd is None else "pinned"
        return f"<Victim pid={self._pid} started={self._started} {state}>"


def start_of(pidfd: _mrelease.Pidfd, pid: int) -> int | None:
    """Read the start time of the process; None where it cannot be had.

    Raises ProcessLookupError if it was waited for, ValueError for a kernel
    thread.
    """
    try:
        started, is_kernel_thread = _mrelease.read_stat(pid)
    except OSError:
        started, is_kernel_thread = None, False
    # Only now is it certain that the pid was still this process's.
    if _mrelease.pidfd_state(pidfd) == "reaped":
        raise no_such_process(pid, "it has ended")
    if is_kernel_thread:
        raise kernel_thread(pid)
    return started


def _pid_of_pidfd(own: _mrelease.Pidfd, given: int) -> int:
    """Find the pid of a pidfd; given is the number to name in errors."""
    if not _mrelease.proc_is_ours():
        raise OSError(
            ENOENT,
            f"cannot tell which process pidfd {given} stands for: /proc is "
            "not mounted, or is of another pid namespace",
        )
    try:
        lines = read_fields(f"/proc/self/fdinfo/{own.fileno()}")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot tell which process pidfd {given} stands for: "
            f"{error.strerror}",
        ) from None
    if int(lines.get("flags", "0"), 8) & _PIDFD_THREAD:
        raise ValueError(
            f"pidfd {given} stands for a thread, not for a process"
        )
    if "Pid" not in lines:
        raise ValueError(f"file descriptor {given} is not a pidfd")
    pid = int(lines["Pid"])
    if pid == -1:
        raise ProcessLookupError(
            ESRCH, f"the process of pidfd {given} has ended"
        )
    if pid == 0:
        raise ValueError(
            f"the process of pidfd {given} has no pid here: it is in another "
            "pid namespace"
        )
    pid_of(pid)
    return pid
