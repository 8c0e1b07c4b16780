"""From what a caller has in hand to a pidfd of the right process.

The pidfd is the identity from the moment it is open.  Before, a pid may have
come to name another process; so what the caller's object knows of its process
is checked after the pidfd is open: what holds then holds of the pidfd.
"""

from __future__ import annotations

import os
import sys
from errno import EBUSY, EINVAL, EMFILE, ENFILE, ENOENT, ENOSYS, EPERM, ESRCH
from time import monotonic, sleep

from mrelease import _mrelease
from mrelease.directory import PROC_SUPER_MAGIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, SupportsIndex

    class HasPid(Protocol):
        """An object that stands for a process; pid is None before it runs."""

        @property
        def pid(self) -> int | None:
            """What the kernel calls it."""


# pid_t; the kernel's own limit is lower, and its answer (no such process)
# fits every pid that it could have been asked for.
_PID_MAX = 2**31 - 1
_NS_GET_PID_FROM_PIDNS = 0x8004B706  # linux/nsfs.h
_PATIENCE_IN_EXEC = 0.1
"""How long to wait for one that is in execve() and cannot be read, seconds."""


def shown(value: object) -> str:
    """Give repr(value); of an int too long for it, how long it is."""
    try:
        return repr(value)
    except ValueError:  # more digits than sys.get_int_max_str_digits()
        bits = value.bit_length() if isinstance(value, int) else 0
        return f"a number of {bits} bits" if bits else type(value).__name__


def as_int(value: object, whose: str) -> int:
    """Give a plain int of what an object gave for one; raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{whose} is no int: {shown(value)}")
    return int(value)


def no_such_process(pid: int | str, why: str) -> ProcessLookupError:
    """Give the error for a process that is not there (any more)."""
    return ProcessLookupError(ESRCH, f"cannot kill pid {pid}: {why}")


def other_process(
    pid: int, found: int | None, expected: int
) -> ProcessLookupError:
    """Give the error for a pid that another process has now."""
    return no_such_process(
        pid,
        f"it is another process now (started at {found}, expected "
        f"{shown(expected)})",
    )


def pid_of(process: HasPid | SupportsIndex) -> int:
    """Give the pid of a process; refuse what must never be killed.

    Raises TypeError for what is no process, ValueError for 0, negative
    numbers, bool, pid 1 and the caller itself, ProcessLookupError for an
    object whose process was waited for.
    """
    if isinstance(process, bool):
        raise ValueError(f"{process} is not a pid: a bool is refused")
    if isinstance(process, int):
        pid = int(process)
    elif hasattr(process, "pid"):
        pid = _pid_of_object(process)
    elif hasattr(type(process), "__index__"):  # an integer of numpy's, say
        kind = type(process).__name__
        number: object = process.__index__()
        pid = as_int(number, f"the __index__() of this {kind}")
    else:
        raise TypeError(
            "expected a pid (int), an object with a pid, or a Victim, not "
            f"{type(process).__name__}"
        )
    if pid <= 0:
        raise ValueError(
            f"{shown(pid)} is not a pid: to the kernel, 0 and negative "
            "numbers stand for groups of processes"
        )
    if pid > _PID_MAX:
        raise ValueError(f"{shown(pid)} is not a pid: it is above {_PID_MAX}")
    if pid == 1:
        raise ValueError("pid 1 is refused: it is the init of this system")
    if pid == os.getpid():
        raise ValueError(f"pid {pid} is refused: it is the caller itself")
    return pid


def _pid_of_object(process: object) -> int:
    pid: object = process.pid  # type: ignore[attr-defined]
    kind = type(process).__name__
    if pid is None:
        raise ValueError(f"this {kind} has no pid: it was not started")
    pid = as_int(pid, f"the pid of this {kind}")
    # subprocess, asyncio, trio, anyio: set as soon as it was waited for.
    returncode = getattr(process, "returncode", None)
    if returncode is not None:
        raise no_such_process(
            shown(pid),
            f"this {kind} has ended and was waited for "
            f"(returncode={shown(returncode)})",
        )
    return pid


def pin(
    process: HasPid | SupportsIndex, started: int | None = None
) -> tuple[_mrelease.Pidfd, int]:
    """Open a pidfd: (pidfd, pid).

    started is the start time that the process must have: field 22 of
    /proc/PID/stat, in clock ticks since boot.

    Raises as pid_of() does, and ProcessLookupError if there is no such
    process or another one has its pid, ValueError if the pid is a thread's,
    OSError if no pidfd can be had.  Nothing was signalled then.
    """
    pid = pid_of(process)
    try:
        pidfd = _mrelease.pidfd_open(pid)
    except OSError as error:
        raise _cannot_pin(pid, error) from None
    if started is None and isinstance(process, int):
        return pidfd, pid
    try:
        if started is not None:
            _confirm_start(pid, pidfd, started)
        if not isinstance(process, int):
            _confirm_object(process, pid, pidfd)
    except BaseException:
        pidfd.close()
        raise
    return pidfd, pid


def no_file_left(pid: int, errno: int) -> OSError:
    """Give the error for want of a file descriptor."""
    return OSError(
        errno,
        f"cannot kill pid {pid}: no file descriptor is left for it "
        "(RLIMIT_NOFILE); nothing was signalled. A Victim made in "
        "advance has its own",
    )


def _cannot_pin(pid: int, error: OSError) -> Exception:
    """Say why pidfd_open(2) failed."""
    if error.errno in (EINVAL, ENOENT):
        # So the kernel says of a thread, and of a process that is going.
        try:
            leader = _mrelease.read_footprint(pid)[0]
        except OSError:
            leader = pid
        if leader != pid:
            return ValueError(
                f"{pid} is not a process: it is a thread of pid {leader}"
            )
        return no_such_process(pid, "it has ended")
    if error.errno == ESRCH:
        return no_such_process(pid, "there is no such process")
    if error.errno in (EMFILE, ENFILE):
        return no_file_left(pid, error.errno)
    if error.errno in (ENOSYS, EPERM):
        return OSError(
            error.errno,
            f"cannot kill pid {pid}: pidfd_open is not to be had (Linux "
            "before 5.3, or a seccomp policy), and without it the wrong "
            "process could be hit; nothing was signalled",
        )
    return OSError(
        error.errno,
        f"cannot kill pid {pid}: pidfd_open failed: {error.strerror}",
    )


def read_proc(path: str) -> bytes:
    """Read a file of /proc; one that is mounted there is not taken for it.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if _mrelease.file_system(fd) != PROC_SUPER_MAGIC:
            raise OSError(ENOENT, "it is not a file of procfs", path)
        text = part = os.read(fd, 1 << 16)
        while part and len(part) >= 4000:  # a page may not be all of it
            part = os.read(fd, 1 << 16)
            text += part
        return text
    finally:
        os.close(fd)


def read_lines(path: str) -> list[str]:
    """Read a file whose lines have names in them: of all but a newline.

    Raises OSError.
    """
    with open(path, "rb") as file:
        return os.fsdecode(file.read()).split("\n")[:-1]


def take_files(count: int) -> list[_mrelease.Pidfd]:
    """Open so many file descriptors, or as many as there are, for later.

    They are free again when they are dropped.
    """
    found: list[_mrelease.Pidfd] = []
    while len(found) < count:
        try:
            found.append(_mrelease.pidfd_open(os.getpid()))
        except OSError:
            break
    return found


def read_fields(path: str) -> dict[str, str]:
    """Read a file of /proc whose lines are a name, a colon, a tab, a value.

    Raises OSError.
    """
    # A process may be named in any encoding.
    text = read_proc(path).decode("ascii", "replace")
    return dict(
        line.split(":\t", 1) for line in text.split("\n") if ":\t" in line
    )


def next_child_is_init() -> bool:
    """Whether the next child is the first one of a new pid namespace.

    After unshare(CLONE_NEWPID) it is, and the namespace ends with it.  False
    if that cannot be told (no /proc).
    """
    here = "/proc/thread-self/ns"
    try:
        own = os.stat(f"{here}/pid")
    except OSError:
        return False
    try:
        fd = os.open(f"{here}/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        # It is there once there is an init (6.18), or always (7.2).
        return error.errno == ENOENT
    try:
        if os.path.samestat(own, os.fstat(fd)):
            return False
        from fcntl import ioctl  # not for `import mrelease`

        ioctl(fd, _NS_GET_PID_FROM_PIDNS, 1)
    except OSError as error:
        return error.errno == ESRCH  # Linux 6.11, before that ENOTTY
    finally:
        os.close(fd)
    return False


def check_start(started: int | None) -> None:
    """Raise TypeError unless this can be a start time."""
    if started is not None and (
        isinstance(started, bool) or not isinstance(started, int)
    ):
        raise TypeError(
            "started must be an int, field 22 of /proc/PID/stat in clock "
            f"ticks, not {type(started).__name__}"
        )


def _read_start(pid: int) -> int:
    until = monotonic() + _PATIENCE_IN_EXEC
    while True:
        try:
            return _mrelease.read_stat(pid)[0]
        except OSError as error:
            if error.errno != EBUSY or monotonic() > until:
                raise
        sleep(0.001)


def _confirm_start(pid: int, pidfd: _mrelease.Pidfd, started: int) -> None:
    try:
        found = _read_start(pid)
    except OSError as error:
        if _mrelease.pidfd_state(pidfd) == "reaped":
            raise no_such_process(pid, "it has ended") from None
        why = (
            "(/proc is not mounted, hides the process (hidepid), or is of "
            "another pid namespace)"
        )
        if error.errno == EBUSY:
            why = "while it is in execve()"
        raise OSError(
            error.errno,
            f"cannot kill pid {pid}: whether it started at {shown(started)} "
            f"cannot be told, /proc/{pid}/stat cannot be read {why}",
        ) from None
    if found != started:
        raise other_process(pid, found, started)


def _is_a(process: object, module: str, name: str) -> bool:
    """Is it of this class?  An object whose module is not loaded is not."""
    return isinstance(process, getattr(sys.modules.get(module), name, ()))


def _confirm_object(process: object, pid: int, pidfd: _mrelease.Pidfd) -> None:
    """Check what the object knows of its process, the pidfd being open."""
    if _is_a(process, "psutil", "Process"):
        if not _mrelease.proc_is_ours():
            raise OSError(
                ENOENT,
                f"cannot kill pid {pid}: psutil cannot tell whether it is "
                "the same process, /proc is not mounted or is of another pid "
                "namespace",
            )
        # Compares pid and create time with those of today, its own way.
        if not process.is_running():  # type: ignore[attr-defined]
            raise no_such_process(pid, "it is another process now, or none")
    elif _is_a(process, "multiprocessing.process", "BaseProcess"):
        starter = getattr(process, "_popen", None)
        if getattr(starter, "method", None) in ("fork", "spawn"):
            _confirm_child(pid, pidfd)
        else:  # a fork server's processes are not the caller's children
            _confirm_sentinel(process, pid)
    elif _is_a(process, "subprocess", "Popen") or _is_a(
        process, "asyncio.subprocess", "Process"
    ):
        _confirm_child(pid, pidfd)


def _confirm_sentinel(process: object, pid: int) -> None:
    import select

    sentinel: int = process.sentinel  # type: ignore[attr-defined]
    poll = select.poll()
    poll.register(sentinel, select.POLLIN)
    if poll.poll(0):
        raise no_such_process(pid, "it has ended, or closed its sentinel")


# Python lacks the name if it was built with headers older than Linux 5.4.
_P_PIDFD = getattr(os, "P_PIDFD", 3)


def _confirm_child(pid: int, pidfd: _mrelease.Pidfd) -> None:
    """Check that it is a child: those keep their pid until waited for."""
    try:
        os.waitid(
            _P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG | os.WNOWAIT
        )
    except ChildProcessError:
        raise no_such_process(
            pid,
            "it is not a child of this process, or it was waited for "
            "already, and the pid may be another process now",
        ) from None
    except OSError:
        # Linux 5.3 has no P_PIDFD: then the pid itself must do.
        return
