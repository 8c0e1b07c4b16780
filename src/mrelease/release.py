"""What became of a victim and of its memory: Outcome and Release."""

from __future__ import annotations

import enum
import errno as errnos

from mrelease.footprint import Footprint, in_units
from mrelease.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Locks = Literal["free", "held", "unknown", "ignored"]


class Outcome(enum.Enum):
    """What became of the memory of a victim."""

    RELEASED = "released"
    """process_mrelease(2) freed everything that it can free."""
    EXITED = "exited"
    """The victim ended first; its memory went with it."""
    EXITING = "exiting"
    """Too late to release, and not ended at the deadline: the memory is on
    its way, but how long it takes is up to the victim's own teardown."""
    PARTIAL = "partial"
    """Part of the memory may still be held: the kernel could not release all
    of it by the deadline (EAGAIN), or the victim stands still in the middle
    of its own teardown."""
    SHARED = "shared"
    """Somebody else uses the memory, and it lives on with them: a process
    that shares it and is not dying (CLONE_VM, vfork), or a reader of
    /proc/PID/maps."""
    DUMPING = "dumping"
    """A core dump is being written from the memory."""
    ALIVE = "alive"
    """The process is not dying, so nothing may be released."""
    LOCKED = "locked"
    """The release was withheld: the victim held robust locks, and whoever
    waits for them would have waited for ever."""
    UNSUPPORTED = "unsupported"
    """The system call is not to be had: the kernel is older than 5.15, or a
    seccomp policy forbids it.  See mrelease.support()."""
    GONE = "gone"
    """In results of many: there was no such process."""
    DENIED = "denied"
    """In results of many: the process may not be signalled."""


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"


class Release(Value):
    """The result of one kill.

    pid        the victim
    outcome    what became of its memory
    freed      whether the memory is known to be back, all of
               Footprint.releasable; never True while it is still held.  If
               only the end of the victim can bring it back (EXITED, LOCKED,
               UNSUPPORTED) and the caller may not trace the victim (ptrace(2),
               PTRACE_MODE_ATTACH), it is False: whether somebody shares the
               memory is not known then.  A victim that had let go of its
               memory before the call held nothing: True, of a footprint of
               zero, once it has ended
    footprint  its memory just before the kill; None if /proc could not be read
    terminated, signalled, released, exited
               when SIGTERM was sent, when SIGKILL was sent, when the release
               succeeded, when the victim was seen to have ended: seconds since
               the call began, or None if it did not happen within the call
    errno      of the last process_mrelease(2), or of SIGKILL if that was
               refused after SIGTERM, or of what DENIED it; None if it
               succeeded or was not called
    attempts   how often process_mrelease(2) was called
    locks      'free': no robust lock was held; 'held'; 'unknown': the caller
               may not look into the victim, or had no file descriptor left to
               look at its threads: it was released all the same; or (with a
               Reaper, or with many threads) the victim ended before it was
               looked at; 'ignored': not looked for
    raised     whether the dying victim was given a better scheduling, or had
               the best already

    Shared memory and huge pages are not meant by freed: they come back when
    the victim has ended, and only if nobody else holds them.  What nobody can
    see is memory that somebody else tears down at that very moment: a second
    killer that releases the same victim (at most some 10,000 pages, huge ones
    too), or a process that shared the memory, outlived the victim and was
    killed as well.  It is back as soon as they get on.  Pages that a fork()ed
    relative still shares copy-on-write stay with it and are not meant.
    """

    __slots__ = (  # noqa: RUF023
        "pid",
        "outcome",
        "freed",
        "footprint",
        "terminated",
        "signalled",
        "released",
        "exited",
        "errno",
        "attempts",
        "locks",
        "raised",
    )

    pid: int
    outcome: Outcome
    freed: bool
    footprint: Footprint | None
    terminated: float | None
    signalled: float | None
    released: float | None
    exited: float | None
    errno: int | None
    attempts: int
    locks: Locks
    raised: bool

    def __init__(
        self,
        pid: int,
        outcome: Outcome,
        freed: bool = False,
        footprint: Footprint | None = None,
        terminated: float | None = None,
        signalled: float | None = None,
        released: float | None = None,
        exited: float | None = None,
        errno: int | None = None,
        attempts: int = 0,
        locks: Locks = "unknown",
        raised: bool = False,
    ) -> None:
        self._set(
            pid,
            outcome,
            freed,
            footprint,
            terminated,
            signalled,
            released,
            exited,
            errno,
            attempts,
            locks,
            raised,
        )

    def with_freed(self, freed: bool) -> Release:
        """Give the same result with another verdict about the memory."""
        values = dict(zip(self.__slots__, self._fields(), strict=True))
        return Release(**(values | {"freed": freed}))  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, object]:
        """Give all of it, ready for JSON: bytes, seconds, names."""
        return {
            "pid": self.pid,
            "outcome": self.outcome.value,
            "freed": self.freed,
            "footprint": self.footprint and self.footprint.as_dict(),
            "terminated": self.terminated,
            "signalled": self.signalled,
            "released": self.released,
            "exited": self.exited,
            "errno": self.errno and errnos.errorcode.get(self.errno),
            "attempts": self.attempts,
            "locks": self.locks,
            "raised": self.raised,
        }

    def _what(self) -> str:
        size = (
            in_units(self.footprint.releasable)
            if self.footprint
            else "unknown size"
        )
        code = errnos.errorcode.get(self.errno or 0, str(self.errno))
        came_back = (
            f"{size} came back with its exit in {_ms(self.exited)}"
            if self.freed and self.exited is not None
            else f"{size} still held"
            if self.exited is None
            else f"it exited in {_ms(self.exited)}, {size} may be shared"
        )
        match self.outcome:
            case Outcome.RELEASED if self.released is not None:
                return f"{size} in {_ms(self.released)}"
            case Outcome.EXITED if self.exited is not None:
                too_late = self.errno == errnos.ESRCH
                late = ", too late to release" if too_late else ""
                known = "" if self.freed else ", not known if it is shared"
                return f"{size} in {_ms(self.exited)}{late}{known}"
            case Outcome.EXITING:
                return f"{size} still held, too late to release"
            case Outcome.PARTIAL:
                return f"part of {size} may still be held"
            case Outcome.SHARED:
                return f"{size} held by a process that shares it"
            case Outcome.DUMPING:
                return f"{size} held until its core dump is written"
            case Outcome.ALIVE:
                return f"{size} held, it is not dying"
            case Outcome.LOCKED:
                return f"release withheld for its robust locks, {came_back}"
            case Outcome.UNSUPPORTED:
                return f"no process_mrelease ({code}), {came_back}"
            case Outcome.GONE:
                return "no such process"
            case Outcome.DENIED:
                return "may not be signalled"
            case _:
                return size

    def __str__(self) -> str:
        times = [
            f"{name} {_ms(when)}"
            for name, when in (
                ("terminated", self.terminated),
                ("signalled", self.signalled),
                ("exited", self.exited),
            )
            if when is not None
        ]
        if times and self.exited is None:
            times.append("not ended yet")
        if self.outcome is Outcome.PARTIAL and self.errno:
            times.append(
                f"{self.attempts} attempts, last "
                f"{errnos.errorcode.get(self.errno, self.errno)}"
            )
        if self.locks == "unknown" and times:
            times.append("locks not checked")
        inside = f" ({', '.join(times)})" if times else ""
        return f"pid {self.pid} {self.outcome.value}: {self._what()}{inside}"
