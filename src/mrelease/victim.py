"""A process that is pinned by a pidfd, to be killed now or later."""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock
from errno import EBADF, ENOENT, ESRCH
from time import monotonic_ns

from mrelease import _mrelease
from mrelease.footprint import Footprint
from mrelease.process import (
    check_start,
    no_such_process,
    other_process,
    pid_of,
    pin,
)
from mrelease.protocol import Terms, carry_out, kernel_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal, Self, SupportsIndex

    from mrelease.process import HasPid
    from mrelease.protocol import HasFileno
    from mrelease.release import Release


_PIDFD_THREAD = os.O_EXCL  # pidfd_open(2), Linux 6.9


class Victim:
    """A process, pinned: its pid may be reused, this stays with the process.

    process is a pid, or an object with a pid: subprocess.Popen,
    multiprocessing.Process, asyncio's, psutil's.  What such an object knows of
    its process (still a child, create time) is checked once the pidfd is open.
    Of another Victim, the pidfd is duplicated.

    started is the start time that the process must have: field 22 of
    /proc/PID/stat, in clock ticks since boot.  Give it when the pid was read
    some time ago (from a scan of /proc, say).

    Making a Victim needs no right over the process and changes nothing.  It
    holds one file descriptor until close(); a with statement closes it.  Safe
    to use from several threads.

    Raises TypeError for what is no process; ValueError for 0, negative
    numbers, bool, pid 1, the caller itself, a thread, a kernel thread;
    ProcessLookupError if there is no such process, or another one has its pid;
    OSError if no pidfd can be had.
    """

    __slots__ = (
        "__weakref__",
        "_closing",
        "_fd",
        "_lock",
        "_owner",
        "_pid",
        "_started",
        "_users",
    )

    _fd: int

    def __init__(
        self, process: HasPid | SupportsIndex, *, started: int | None = None
    ) -> None:
        self._fd = -1
        check_start(started)
        if isinstance(process, Victim):
            # Its pid may be another process's by now, its pidfd is not.
            with _Use(process) as theirs:
                fd, pid = os.dup(theirs), process.pid
        else:
            fd, pid = pin(process, started)
        self._adopt(fd, pid)
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
        given = pidfd if isinstance(pidfd, int) else pidfd.fileno()
        try:
            fd = os.dup(given)
        except OSError as error:
            if error.errno != EBADF:
                raise
            raise ValueError(f"file descriptor {given} is not open") from None
        self = cls.__new__(cls)
        self._fd = -1
        try:
            pid = _pid_of_pidfd(fd, given)
        except BaseException:
            os.close(fd)
            raise
        self._adopt(fd, pid)
        return self

    def _adopt(self, fd: int, pid: int) -> None:
        """Take over an open pidfd; closes it if the process is refused."""
        try:
            self._started = _start_of(fd, pid)
        except BaseException:
            os.close(fd)
            raise
        self._pid = pid
        self._closing = False
        self._start_anew()
        self._fd = fd

    def _start_anew(self) -> None:
        """Forget who uses the pidfd: here, in a new process, nobody does."""
        self._owner = os.getpid()
        self._lock = allocate_lock()
        self._users = 0

    @property
    def pid(self) -> int:
        """The pid that the process has or had."""
        return self._pid

    @property
    def started(self) -> int | None:
        """Clock ticks from boot to its start (field 22 of /proc/PID/stat).

        None if /proc could not be read.
        """
        return self._started

    @property
    def exited(self) -> bool:
        """Whether the whole process has ended (its pidfd polls readable)."""
        with _Use(self) as fd:
            return _mrelease.pidfd_state(fd) != "running"

    def fileno(self) -> int:
        """Give the pidfd: it polls readable when the process has ended.

        It is the Victim's: do not close it, and do not use it after close().
        """
        if self._closing or self._fd < 0:
            raise _closed()
        return self._fd

    def footprint(self) -> Footprint:
        """Read how much memory the process holds now.

        All zero for a process that has ended but was not waited for.  Raises
        ProcessLookupError if it was waited for; OSError if /proc cannot be
        read.
        """
        with _Use(self) as fd:
            try:
                sizes = _mrelease.read_footprint(self._pid)[1]
            except OSError as error:
                if _mrelease.pidfd_state(fd) == "reaped":
                    raise no_such_process(self._pid, "it has ended") from None
                raise OSError(
                    error.errno,
                    f"cannot read /proc/{self._pid}/status: {error.strerror}",
                ) from None
            # Only now is it certain that the pid was still this process's.
            if _mrelease.pidfd_state(fd) == "reaped":
                raise no_such_process(self._pid, "it has ended")
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
        return self.carry_out(Terms(grace, escalate_on, timeout, locks), begun)

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
        return self.carry_out(terms, begun, send=False)

    def carry_out(
        self, terms: Terms, begun: int, *, send: bool = True
    ) -> Release:
        """Run the kill protocol on checked terms; begun is monotonic_ns()."""
        with _Use(self) as fd:
            return carry_out(fd, self._pid, terms, begun, send=send)

    def close(self) -> None:
        """Close the pidfd, at once or when the last call under way is done.

        The process is left as it is.  Closing twice is no error.
        """
        if self._fd < 0:
            return
        if self._owner != os.getpid():
            self._start_anew()
        with self._lock:
            self._closing = True
            if self._users == 0 and self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Not made whole, or at the end of the interpreter: there is no telling
        # what is left of it.
        if getattr(self, "_fd", -1) >= 0 and sys.meta_path is not None:
            import warnings

            warnings.warn(
                f"unclosed {self!r}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closing or self._fd < 0 else "pinned"
        return f"<Victim pid={self._pid} started={self._started} {state}>"


class _Use:
    """Keeps the pidfd of a Victim open while a call works with it.

    A number that was closed may be opened again for another process: a close()
    from another thread has to wait until nobody uses it.
    """

    __slots__ = ("victim",)

    def __init__(self, victim: Victim) -> None:
        self.victim = victim

    def __enter__(self) -> int:
        victim = self.victim
        if victim._fd < 0:
            raise _closed()
        if victim._owner != os.getpid():
            victim._start_anew()
        with victim._lock:
            if victim._closing:
                raise _closed()
            victim._users += 1
            return victim._fd

    def __exit__(self, *exc: object) -> None:
        victim = self.victim
        if victim._owner != os.getpid():
            return  # forked during the call
        with victim._lock:
            victim._users -= 1
            if victim._closing and victim._users == 0:
                os.close(victim._fd)
                victim._fd = -1


def _closed() -> ValueError:
    return ValueError("this Victim is closed")


def _start_of(fd: int, pid: int) -> int | None:
    """Read the start time of the process; None without /proc."""
    try:
        started, is_kernel_thread = _mrelease.read_stat(pid)
    except OSError:
        started, is_kernel_thread = None, False
    # Only now is it certain that the pid was still this process's.
    if _mrelease.pidfd_state(fd) == "reaped":
        raise no_such_process(pid, "it has ended")
    if is_kernel_thread:
        raise kernel_thread(pid)
    return started


def _pid_of_pidfd(fd: int, given: int) -> int:
    """Find the pid of a pidfd; given is the number to name in errors."""
    if not _mrelease.proc_is_ours():
        raise OSError(
            ENOENT,
            f"cannot tell which process pidfd {given} stands for: /proc is "
            "not mounted, or is of another pid namespace",
        )
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            lines = dict(
                line.rstrip("\n").split(":\t", 1)
                for line in file
                if ":\t" in line
            )
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
