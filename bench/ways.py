"""The ways to kill that the benchmarks compare.

Each is a process of its own that stays: it is told a pid, kills it, and
tells what came of it (a Shot). So root and an ordinary user are compared in
one run, and neither a start nor an import is part of a kill. In C: killer.c.
In Python: a fork of the benchmark, which becomes that user.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import gc
import json
import os
import platform
import queue
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
)

import common
import mrelease
from cgroups import Unavailable
from kernel_errors import drop_privileges

if TYPE_CHECKING:
    from cgroups import Group
    from common import User


class Shot(NamedTuple):
    """What came of one kill; durations are seconds since it began."""

    begun: int
    """Nanoseconds of the monotonic clock."""
    signalled: float | None
    entered: float | None
    """When the release entered the kernel, where it is known."""
    released: float | None
    """When the release had succeeded."""
    outcome: str
    errno: int | None
    attempts: int
    held: bool | None
    """Too late, and the victim had not ended yet; None: not known."""

    @property
    def late(self) -> bool:
        """The release came too late: see LATE."""
        return self.released is None and self.outcome in ("exited", "exiting")


def outcome_of(err: int, *, ended: bool) -> str:
    """What process_mrelease(2) came to, in the words of Outcome."""
    if err == 0:
        return "released"
    if err == errnos.ESRCH:
        return "exited" if ended else "exiting"
    return errnos.errorcode.get(err, str(err))


LATE = (
    "Late: process_mrelease(2) answered ESRCH, or the victim had ended "
    "before it could be\ncalled; so the memory was left to the victim's own "
    "teardown. By Release: outcome EXITED\nor EXITING, and released is None."
)


def of_reaping(reaping: mrelease.Reaping, begun: int) -> Shot:
    shot = of_release(reaping.result(60.0), begun)
    job = reaping._job
    return shot._replace(entered=job.entered() if job else None)


def of_release(release: mrelease.Release, begun: int) -> Shot:
    return Shot(
        begun,
        release.signalled,
        None,  # between the two, and nobody takes the time
        release.released,
        release.outcome.value,
        release.errno,
        release.attempts,
        None,
    )


# --------------------------------------------------- a Python helper


Handler = Callable[[Any], tuple[Any, ...] | list[Any]]
Maker = Callable[[], tuple[Handler, str]]
"""Run in the helper: what answers questions, and what it got, in words."""


class Helper:
    """A fork of this process that answers questions.

    To be made before anything that its end is to end: it holds no file
    descriptor of ours. May enter control groups, then become a user.
    """

    def __init__(
        self,
        make: Maker,
        user: User,
        groups: tuple[Group, ...] = (),
    ) -> None:
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(theirs, make, user, groups)
        theirs.close()
        self._socket = ours
        self._file = ours.makefile("rw", encoding="utf-8")
        try:
            self.said = str(self._answer()[0])
        except BaseException:
            self.close()
            raise

    def _answer(self) -> list[Any]:
        line = self._file.readline()
        if not line:
            raise RuntimeError("a helper ended without an answer")
        found = json.loads(line)
        if "unavailable" in found:
            raise Unavailable(found["unavailable"])
        if "error" in found:
            raise RuntimeError("in a helper:\n" + found["error"])
        result: list[Any] = found["result"]
        return result

    def ask(self, question: object) -> list[Any]:
        self._file.write(json.dumps(question) + "\n")
        self._file.flush()
        return self._answer()

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        pidfd = os.pidfd_open(self.pid)
        try:
            if not select.select([pidfd], [], [], 5.0)[0]:
                os.kill(self.pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
        os.waitpid(self.pid, 0)


def _serve(
    channel: socket.socket,
    make: Maker,
    user: User,
    groups: tuple[Group, ...],
) -> NoReturn:
    try:
        # Its end is the end of the channel.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _close_all_but({0, 1, 2, channel.fileno()})
        file = channel.makefile("rw", encoding="utf-8")

        def say(**what: object) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        try:
            for group in groups:
                group.write("cgroup.procs", str(os.getpid()))
            if user.uid is not None:
                drop_privileges(user.uid)
            gc.collect()
            gc.freeze()  # what it took over is not to be looked at again
            handler, said = make()
            say(result=[said])
            for line in file:
                say(result=handler(json.loads(line)))
        except Unavailable as why:
            say(unavailable=str(why))
        except Exception:  # noqa: BLE001 - told to the one who asked
            say(error=traceback.format_exc())
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # the one of listdir()


Policy = Literal["auto", "fifo", "none"]


def new_reaper(policy: Policy) -> mrelease.Reaper:
    """A Reaper of this policy; Unavailable if it is not to be had."""
    try:
        return mrelease.Reaper(policy=policy)
    except OSError as error:
        raise Unavailable(f"Reaper(policy={policy!r}): {error}") from None


# ---------------------------------------------------- one kill at a time


class Side(Protocol):
    """Whoever kills: a process that waits to be told whom."""

    said: str

    def shoot(self, pid: int) -> Shot: ...

    def close(self) -> None: ...


class Standing(Side, Protocol):
    """One of a process of its own."""

    pid: int


class _InC:
    def __init__(self, user: User, *args: str) -> None:
        self.said = "SCHED_FIFO 1" if "fifo" in args else "normal priority"
        self._alone = "signal" in args
        self._program = common.Program("killer", *args, user=user)
        self.pid = self._program.pid

    def shoot(self, pid: int) -> Shot:
        begun, signalled, done, err, calls, ended = map(
            int, self._program.ask(str(pid)).split()
        )
        outcome = (
            "signalled" if self._alone
            else outcome_of(err, ended=bool(ended))
        )  # fmt: skip
        return Shot(
            begun,
            (signalled - begun) / 1e9,
            None,
            (done - begun) / 1e9 if outcome == "released" else None,
            outcome,
            err or None,
            calls,
            err == errnos.ESRCH and not ended,
        )

    def close(self) -> None:
        self._program.close()


class _InPython:
    def __init__(self, user: User, make: Maker) -> None:
        self._helper = Helper(make, user)
        self.said = self._helper.said
        self.pid = self._helper.pid

    def shoot(self, pid: int) -> Shot:
        return Shot(*self._helper.ask(pid))

    def close(self) -> None:
        self._helper.close()


def _make_kill() -> tuple[Handler, str]:
    def shoot(pid: int) -> Shot:
        begun = monotonic_ns()
        return of_release(mrelease.kill(pid), begun)

    return shoot, "normal priority"


class Libc:
    """The two calls as one makes them without an extension."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "process_mrelease"):  # glibc 2.36
            self.how = "glibc's wrappers"
            self._send = libc.pidfd_send_signal
            self._release = libc.process_mrelease
            self._first: tuple[object, ...] = ()
            self._second: tuple[object, ...] = ()
        else:
            machine = platform.machine()
            if machine in ("alpha", "mips", "mips64"):
                raise Unavailable(f"numbers of system calls of {machine}")
            self.how = "syscall()"
            self._send = self._release = libc.syscall
            self._first = (ctypes.c_long(424),)
            self._second = (ctypes.c_long(448),)

    def kill(self, pidfd: int) -> None:
        if self._send(*self._first, pidfd, 9, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_send_signal")

    def release(self, pidfd: int) -> int:
        """The errno."""
        if self._release(*self._second, pidfd, 0) < 0:
            return ctypes.get_errno()
        return 0

    def shoot(
        self, pid: int, begun: int, kill: Callable[[int], None] | None = None
    ) -> Shot:
        """Open a pidfd, kill (by it, unless said otherwise), release."""
        pidfd = os.pidfd_open(pid)
        try:
            signalled = monotonic_ns()
            if kill is None:
                self.kill(pidfd)
            else:
                kill(pid)
            entered = monotonic_ns()
            attempts = 0
            code = errnos.EAGAIN
            while code in (errnos.EAGAIN, errnos.EINTR):
                code = self.release(pidfd)
                attempts += 1
            done = monotonic_ns()
            ended = bool(select.select([pidfd], [], [], 0)[0])
        finally:
            os.close(pidfd)
        outcome = outcome_of(code, ended=ended)
        return Shot(
            begun,
            (signalled - begun) / 1e9,
            (entered - begun) / 1e9,
            (done - begun) / 1e9 if code == 0 else None,
            outcome,
            code or None,
            attempts,
            code == errnos.ESRCH and not ended,
        )


def _make_ctypes() -> tuple[Handler, str]:
    libc = Libc()

    def shoot(pid: int) -> Shot:
        return libc.shoot(pid, monotonic_ns())

    return shoot, f"normal priority, {libc.how}"


class Worker:
    """What one writes without the package: a thread, a queue, ctypes."""

    def __init__(self) -> None:
        self._libc = Libc()
        self._jobs: queue.Queue[tuple[int, int]] = queue.Queue()
        self._done: queue.Queue[Shot] = queue.Queue()
        self.said = f"a thread of Python, {self._libc.how}"
        threading.Thread(target=self._run, daemon=True).start()

    def kill(self, pid: int) -> Shot:
        self._jobs.put((pid, monotonic_ns()))
        return self._done.get()

    def _run(self) -> None:
        while True:
            pid, begun = self._jobs.get()
            self._done.put(self._libc.shoot(pid, begun, _os_kill))


def _os_kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _make_worker() -> tuple[Handler, str]:
    worker = Worker()
    return worker.kill, worker.said


def _make_reaper(policy: Policy) -> Maker:
    def make() -> tuple[Handler, str]:
        reaper = new_reaper(policy)

        def shoot(pid: int) -> Shot:
            begun = monotonic_ns()
            reaping = reaper.kill(pid)
            return of_reaping(reaping, begun)

        return shoot, str(reaper.scheduling)

    return make


class Way(NamedTuple):
    text: str
    open: Callable[[User], Standing]
    privileged: bool = False
    """Only root has it."""


def legend(ways: Sequence[str]) -> str:
    """What the heads of columns mean."""
    return "\n".join(f"{way}: {WAYS[way].text}." for way in ways)


WAYS = {
    "signal": Way("C, SIGKILL alone", lambda user: _InC(user, "signal")),
    "c": Way("C, one thread", lambda user: _InC(user, "release")),
    "c-fifo": Way(
        "C, one thread, FIFO",
        lambda user: _InC(user, "release", "fifo"),
        privileged=True,
    ),
    "ctypes": Way(
        "ctypes, two calls", lambda user: _InPython(user, _make_ctypes)
    ),
    "thread": Way(
        "thread and queue, ctypes",
        lambda user: _InPython(user, _make_worker),
    ),
    "kill": Way("mrelease.kill()", lambda user: _InPython(user, _make_kill)),
    "reaper": Way(
        "Reaper, policy none",
        lambda user: _InPython(user, _make_reaper("none")),
    ),
    "reaper-fifo": Way(
        "Reaper, policy fifo",
        lambda user: _InPython(user, _make_reaper("fifo")),
        privileged=True,
    ),
    "reaper-auto": Way(
        "Reaper, policy auto",
        lambda user: _InPython(user, _make_reaper("auto")),
    ),
}
