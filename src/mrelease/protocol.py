"""The terms of a kill, and the native protocol run on a pidfd."""

from __future__ import annotations

import os
from errno import ENOMEM, ENOSPC, EPERM, ESRCH

from mrelease import _mrelease
from mrelease.footprint import Footprint
from mrelease.process import as_int, no_such_process, shown
from mrelease.release import Outcome, Release

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class HasFileno(Protocol):
        """Anything that can be polled: an eventfd, a pressure trigger."""

        def fileno(self) -> int:
            """Give the file descriptor."""


_OUTCOMES = {outcome.value: outcome for outcome in Outcome}
_FOREVER = 2**62  # nanoseconds: 146 years
_LONG = 4e9  # seconds: 127 years


def nanoseconds(name: str, seconds: float) -> int:
    """Give whole nanoseconds; raise TypeError, ValueError by that name."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(
            f"{name} must be a number of seconds, not {type(seconds).__name__}"
        )
    # A plain one: what is derived from them may compare otherwise.
    seconds = int(seconds) if isinstance(seconds, int) else float(seconds)
    if not seconds >= 0:  # a NaN as well
        raise ValueError(
            f"{name} must not be negative or NaN: {shown(seconds)}"
        )
    return _FOREVER if seconds > _LONG else int(seconds * 1e9)


def bounded(seconds: float) -> float:
    """Give checked seconds, or so many that nobody waits for more.

    An int may be too big to be added to a float.
    """
    return float(min(seconds, _LONG))


def _protects(locks: str) -> bool:
    if locks not in ("protect", "ignore"):
        raise ValueError(
            f"locks must be 'protect' or 'ignore', not {shown(locks)}"
        )
    return locks == "protect"


def _escalation(escalate_on: HasFileno | int | None) -> int:
    if escalate_on is None:
        return -1
    if isinstance(escalate_on, bool):
        raise TypeError("escalate_on must be pollable, not bool")
    if isinstance(escalate_on, int):
        fd = int(escalate_on)
    elif hasattr(escalate_on, "fileno"):
        kind = type(escalate_on).__name__
        fd = as_int(escalate_on.fileno(), f"the fileno() of this {kind}")
    else:
        raise TypeError(
            "escalate_on must be a file descriptor or have a fileno(), not "
            f"{type(escalate_on).__name__}"
        )
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        raise ValueError(
            f"escalate_on is not open: file descriptor {shown(fd)}"
        ) from None
    return fd


class Terms:
    """How to kill: the arguments that every way to kill takes, checked."""

    __slots__ = ("escalate", "grace", "protect", "timeout")

    def __init__(
        self,
        grace: float,
        escalate_on: HasFileno | int | None,
        timeout: float,
        locks: str,
    ) -> None:
        self.grace: int = nanoseconds("grace", grace)
        self.timeout: int = nanoseconds("timeout", timeout)
        self.protect: bool = _protects(locks)
        self.escalate: int = _escalation(escalate_on)


def carry_out(
    pidfd: _mrelease.Pidfd,
    pid: int,
    terms: Terms,
    begun: int,
    *,
    send: bool = True,
) -> Release:
    """Run the kill protocol on a pidfd; begun is from monotonic_ns()."""
    result = _mrelease.reap(
        pidfd.fileno(),
        pid,
        begun,
        terms.grace,
        terms.timeout,
        terms.escalate,
        terms.protect,
        send,
    )
    if isinstance(result, int):
        raise refusal(pid, result)
    return as_release(pid, result)


def as_release(pid: int, result: _mrelease._Result) -> Release:
    """Make a Release of what the native protocol gave."""
    (
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
    ) = result
    return Release(
        pid,
        _OUTCOMES[outcome],
        freed,
        None if footprint is None else Footprint(*footprint),
        terminated,
        signalled,
        released,
        exited,
        errno or None,
        attempts,
        locks,
        raised,
    )


def refusal(pid: int, why: int) -> Exception:
    """Say why no signal was sent."""
    if why == -1:
        return kernel_thread(pid)
    if why == ESRCH:
        return no_such_process(pid, "it has ended")
    if why == EPERM:
        return PermissionError(
            EPERM,
            f"cannot kill pid {pid}: it belongs to another user and this "
            "process has no CAP_KILL, or a security policy forbids it; "
            "nothing was signalled",
        )
    if why in (ENOMEM, ENOSPC):
        return OSError(
            why,
            f"cannot kill pid {pid}: its end cannot be watched (epoll: "
            "memory, or fs.epoll.max_user_watches); nothing was signalled",
        )
    return OSError(
        why,
        f"cannot kill pid {pid}: pidfd_send_signal failed: "
        f"{os.strerror(why)}; nothing was signalled",
    )


def may_signal(pidfd: int, pid: int) -> None:
    """Raise ProcessLookupError or PermissionError if it cannot be signalled.

    With signal 0, which is never delivered.
    """
    try:
        _mrelease.pidfd_signal(pidfd, 0)
    except OSError as error:
        raise refusal(pid, error.errno or 0) from None


def kernel_thread(pid: int) -> ValueError:
    """Give the error for a process that is none."""
    return ValueError(
        f"pid {pid} is refused: it is a kernel thread, which has no memory "
        "of its own and cannot be killed"
    )
