"""The right process is hit, or none.

What is refused is refused before anything was signalled. Bystanders
are asked whether they live: a process that answers and then exits with
0 was sent no signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import errno
import gc
import multiprocessing
import multiprocessing.connection
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psutil
import pytest

import cgroups
import kernel_errors
import mrelease
import victims
from kill_ways import by_reaper
from mrelease import Outcome, Victim, _mrelease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.process import BaseProcess

    from kill_ways import Kill

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

T = TypeVar("T")

BACK = {Outcome.RELEASED, Outcome.EXITED}


def started_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


class Bystander:
    """A forked child that answers as long as nothing was done to it."""

    def __init__(self) -> None:
        ours, theirs = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(ours[1])
            os.close(theirs[0])
            while os.read(ours[0], 1) == b"?":
                os.write(theirs[1], b"!")
            os._exit(0)
        os.close(ours[0])
        os.close(theirs[1])
        self._ask, self._hear = ours[1], theirs[0]

    def lives(self) -> bool:
        try:
            os.write(self._ask, b"?")
        except BrokenPipeError:
            return False
        return os.read(self._hear, 1) == b"!"

    def end(self) -> int:
        """Let it end and reap it; its exit code."""
        os.close(self._ask)
        os.close(self._hear)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def bystander() -> Iterator[Bystander]:
    """A child that must be left alone by the test."""
    other = Bystander()
    assert other.lives()
    yield other
    lives = other.lives()
    assert other.end() == 0
    assert lives


# ------------------------------------------------------------------ started


def test_a_wrong_started_is_process_lookup_error_and_kills_nothing(
    bystander: Bystander,
) -> None:
    started = started_of(bystander.pid)
    for wrong in (started - 1, started + 1, 0, -1, 2**40):
        with pytest.raises(
            ProcessLookupError,
            match=f"cannot kill pid {bystander.pid}: it is another process "
            rf"now \(started at {started}, expected {wrong}\)",
        ) as caught:
            Victim(bystander.pid, started=wrong)
        assert caught.value.errno == errno.ESRCH


def test_the_right_started_is_accepted() -> None:
    with victims.asleep(4) as process:
        with Victim(process.pid, started=process.started()) as victim:
            assert victim.started == process.started()
            assert victim.kill(timeout=10.0).freed
        assert process.wait() == -signal.SIGKILL


def test_started_of_one_that_is_in_execve_is_waited_for() -> None:
    with victims.starved_in_execve() as (victim, busy):
        begun = time.monotonic()
        with pytest.raises(
            OSError, match=r"cannot be told.*in execve"
        ) as told:
            Victim(victim.pid, started=1)
        assert told.value.errno == errno.EBUSY
        assert time.monotonic() - begun >= 0.1
        busy.kill()
        victims.wait_until(
            lambda: not _mrelease.is_in_exec(victim.pid), "it is through"
        )
        with pytest.raises(ProcessLookupError, match="another process now"):
            Victim(victim.pid, started=1)
        assert victim.poll() is None


def test_started_of_a_process_that_is_gone() -> None:
    with pytest.raises(ProcessLookupError, match="no such process"):
        Victim(victims.reaped_pid(), started=1)


@pytest.mark.parametrize("started", ["1", 1.0, True, b"1"])
def test_started_of_a_wrong_type(
    started: object, bystander: Bystander
) -> None:
    with pytest.raises(TypeError, match="started must be an int"):
        Victim(bystander.pid, started=cast("int", started))


def test_started_is_checked_against_psutil_and_proc() -> None:
    """The same number for all who scan /proc."""
    with victims.asleep(0) as process, Victim(process.pid) as victim:
        ticks = os.sysconf("SC_CLK_TCK")
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert victim.started is not None
        age = uptime - victim.started / ticks
        since = time.time() - psutil.Process(process.pid).create_time()
        assert age == pytest.approx(since, abs=1.5)
        assert victim.started == process.started()


# ------------------------------------------- the pid is reused, 1,000 times

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWPID = 0x00020000, 0x20000000
_PRIVATE, _REC = 1 << 18, 1 << 14


def _check(result: int, what: str) -> None:
    if result != 0:
        error = os.strerror(ctypes.get_errno())
        raise cgroups.Unavailable(f"pid namespaces: {what}: {error}")


def in_pid_namespace(function: Callable[[], T]) -> T:
    """Run a function in a new pid namespace, with a /proc of its own.

    It runs as pid 2: pid 1 is one that mrelease refuses.
    """

    def in_first() -> T:
        _check(_libc.mount(b"proc", b"/proc", b"proc", 0, None), "proc")
        assert os.getpid() == 1
        return kernel_errors.in_child(function)

    def run() -> T:
        _check(_libc.unshare(_NEWNS | _NEWPID), "unshare")
        _check(
            _libc.mount(b"none", b"/", None, _REC | _PRIVATE, None),
            "private mounts",
        )
        return kernel_errors.in_child(in_first)

    with kernel_errors.Job(run) as job:
        return job.result(280.0)


def next_pid(pid: int) -> None:
    """Have the next fork() in this pid namespace give this pid."""
    try:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    except OSError as e:
        raise cgroups.Unavailable(f"ns_last_pid: {e.strerror}") from None


class Spawner:
    """Makes processes on order that are not our children."""

    def __init__(self) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours[1])
            os.close(theirs[0])
            self._serve(ours[0], theirs[1])
        os.close(ours[0])
        os.close(theirs[1])
        self._ask, self._hear = ours[1], theirs[0]

    @staticmethod
    def _serve(ask: int, hear: int) -> None:
        child: Bystander | None = None
        while order := os.read(ask, 1):
            if order == b"b":
                next_pid(int.from_bytes(os.read(ask, 4), "little"))
                child = Bystander()
                os.write(hear, child.pid.to_bytes(4, "little"))
            else:
                assert child is not None
                alive = child.lives()
                good = child.end() == 0 and alive
                os.write(hear, b"!" if good else b"x")
        os._exit(0)

    def bear(self, pid: int) -> int:
        os.write(self._ask, b"b" + pid.to_bytes(4, "little"))
        return int.from_bytes(os.read(self._hear, 4), "little")

    def end_child(self) -> bool:
        """End the child; was it alive and well to the last?"""
        os.write(self._ask, b"e")
        return os.read(self._hear, 1) == b"!"

    def close(self) -> None:
        os.close(self._ask)
        os.close(self._hear)
        os.waitpid(self.pid, 0)


def _wait_for_next_tick(started: int) -> None:
    """The start time of a process is in ticks of 10 ms.

    Two processes of one pid within one tick look the same in /proc, to
    psutil and to everybody. A pid is not reused that fast by itself.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    while int(time.clock_gettime(time.CLOCK_BOOTTIME) * ticks) <= started:
        time.sleep(0.0005)


def _sleep() -> None:
    while True:
        signal.pause()


class First:
    """The process that had the pid first, and what knows it."""

    def __init__(self, pid: int, how: str) -> None:
        next_pid(pid)
        self.popen: subprocess.Popen[bytes] | None = None
        self.process: BaseProcess | None = None
        if how.startswith("popen"):
            self.popen = subprocess.Popen(
                [victims.binary()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            self.pid = self.popen.pid
        elif how in ("multiprocessing", "forkserver"):
            method = "fork" if how == "multiprocessing" else how
            context: Any = multiprocessing.get_context(method)
            process = context.Process(target=_sleep)
            process.start()
            self.process = process
            assert self.process is not None
            assert self.process.pid is not None
            self.pid = self.process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                _sleep()
        self.started = started_of(self.pid)
        self.psutil = psutil.Process(self.pid) if how == "psutil" else None
        self.victim = Victim(self.pid)
        self.pidfd = os.pidfd_open(self.pid)

    def end(self, how: str) -> None:
        os.kill(self.pid, signal.SIGKILL)
        if how == "popen waited for":
            assert self.popen is not None
            self.popen.wait()
        elif how == "forkserver":
            # The server waits for it.
            victims.wait_until(
                lambda: not Path(f"/proc/{self.pid}").exists(), "it is reaped"
            )
        else:
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        self.victim.close()
        os.close(self.pidfd)
        if self.popen is not None:
            assert self.popen.stdin is not None
            self.popen.stdin.close()
            self.popen.returncode = -signal.SIGKILL


def _must_refuse(action: Callable[[], object]) -> str | None:
    try:
        result = action()
    except ProcessLookupError:
        return None
    if isinstance(result, Victim):
        result.close()
    return f"accepted, gave a {type(result).__name__}"


def _after(kill: Kill, first: First, how: str) -> list[str | None]:
    """All that is tried once another process has the pid."""

    def from_pidfd() -> Victim:
        return Victim.from_pidfd(first.pidfd)

    if how == "started":
        return [
            _must_refuse(lambda: Victim(first.pid, started=first.started)),
        ]
    if how == "pinned":
        released = first.victim.release()
        return [
            _must_refuse(lambda: kill(first.victim)),
            _must_refuse(lambda: kill(first.victim, grace=0.01)),
            _must_refuse(first.victim.footprint),
            _must_refuse(from_pidfd),
            None if first.victim.exited else "not exited",
            None if released.footprint is None else "footprint of another",
            None if not released.raised else "raised another",
        ]
    if how == "victim of a victim":
        victim: Any = first.victim
        return [_must_refuse(lambda: Victim(victim))]
    process: Any = first.popen or first.process or first.psutil
    return [
        _must_refuse(lambda: kill(process)),
        _must_refuse(lambda: kill(process, grace=0.01)),
        _must_refuse(lambda: Victim(process)),
    ]


_WAYS = (
    "started",
    "pinned",
    "psutil",
    "popen waited for",
    "popen reaped by others",
    "multiprocessing",
    "victim of a victim",
)


def reuse(kill: Kill, count: int, ways: Sequence[str] = _WAYS) -> Counter[str]:
    """Kill by what is known of a process that is gone, its pid reused."""
    spawner = Spawner()
    found: Counter[str] = Counter()
    try:
        for number in range(count):
            how = ways[number % len(ways)]
            pid = 100 + number % 50
            first = First(pid, how)
            assert first.pid == pid
            first.end(how)
            _wait_for_next_tick(first.started)
            assert spawner.bear(pid) == pid
            assert started_of(pid) != first.started
            wrong = [text for text in _after(kill, first, how) if text]
            if not spawner.end_child():
                wrong.append("the stranger was hit")
            found[f"{how}: {'; '.join(wrong) or 'refused'}"] += 1
            first.close()
    finally:
        spawner.close()
    return found


@pytest.mark.needs("root")
def test_1000_reuses_of_a_pid_kill_no_stranger(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    victims.binary()
    count = rounds(1000)
    found = in_pid_namespace(lambda: reuse(kill, count))
    print(f"\n{count} reuses: {dict(found)}")
    assert sum(found.values()) == count
    assert set(found) == {f"{how}: refused" for how in _WAYS[:count]}


_FORK_SERVER = """
import multiprocessing, sys
sys.path.insert(0, {tests!r})
import mrelease, test_right_process
if __name__ == "__main__":
    # The server itself has a pid; it has to be there before.
    first = multiprocessing.get_context("forkserver").Process(target=int)
    first.start()
    first.join()
    found = test_right_process.reuse(mrelease.kill, {count}, ["forkserver"])
    print(dict(found))
"""


@pytest.mark.needs("root")
def test_reuses_of_a_pid_of_a_fork_server_kill_no_stranger(
    rounds: Callable[[int], int],
) -> None:
    """Its processes are not our children: only the sentinel tells."""
    count = rounds(40)
    code = _FORK_SERVER.format(tests=str(Path(__file__).parent), count=count)
    done = in_pid_namespace(
        lambda: subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
    )
    found = f"{{'forkserver: refused': {count}}}\n"
    assert (done.stdout, done.stderr) == (found, "")


def _reuse_and_kill() -> list[bool]:
    """The same, and then the new process is asked for: it is killed."""
    killed = []
    for pid in (100, 101, 102):
        first = First(pid, "started")
        first.end("started")
        _wait_for_next_tick(first.started)
        second = First(pid, "started")
        assert second.pid == pid
        with Victim(pid, started=second.started) as victim:
            release = victim.kill(timeout=10.0)
        _, status = os.waitpid(pid, 0)
        killed.append(
            release.outcome in BACK
            and os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        )
        first.close()
        second.close()
    return killed


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_the_reused_pid_itself_can_be_killed() -> None:
    """So what is refused above is refused for its identity alone."""
    assert in_pid_namespace(_reuse_and_kill) == [True, True, True]


# ------------------------------------------------------------ other pid spaces


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_pid_1_of_a_child_pid_namespace_can_be_killed(kill: Kill) -> None:
    read, write = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)

        def make() -> None:
            _check(_libc.unshare(_NEWPID), "unshare")
            pid = os.fork()
            if pid == 0:
                assert os.getpid() == 1
                _sleep()
            os.write(write, pid.to_bytes(4, "little"))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9

        job = stack.enter_context(kernel_errors.Job(make))
        os.close(write)
        pid = int.from_bytes(os.read(read, 4), "little")
        assert victims.status_of(pid)["NSpid"].split()[-1] == "1"
        release = kill(pid, timeout=10.0)
        job.result(10.0)
    assert release.outcome in BACK


@pytest.mark.needs("root")
def test_a_pidfd_from_outside_the_pid_namespace_is_refused(
    bystander: Bystander,
) -> None:
    """It has no pid in there, and so could not be checked."""
    fd = os.pidfd_open(bystander.pid)

    def inside() -> str:
        with pytest.raises(ValueError, match="another pid namespace") as e:
            Victim.from_pidfd(fd)
        return str(e.value)

    try:
        assert f"pidfd {fd}" in in_pid_namespace(inside)
    finally:
        os.close(fd)


# ----------------------------------------------------- what is no process

BAD = [
    (0, ValueError, "0 is not a pid: to the kernel, 0 and negative"),
    (-1, ValueError, "-1 is not a pid: to the kernel, 0 and negative"),
    (-(2**70), ValueError, "is not a pid"),
    (True, ValueError, "True is not a pid: a bool"),
    (False, ValueError, "False is not a pid: a bool"),
    (2**40, ValueError, "1099511627776 is not a pid: it is above 2147483647"),
    (2**31, ValueError, "is above 2147483647"),
    (2**31 - 1, ProcessLookupError, "2147483647: there is no such process"),
    (1, ValueError, "pid 1 is refused: it is the init"),
    ("12", TypeError, "expected a pid .* not str"),
    (b"12", TypeError, "expected a pid .* not bytes"),
    (None, TypeError, "expected a pid .* not NoneType"),
    (1.5, TypeError, "expected a pid .* not float"),
    ([12], TypeError, "expected a pid .* not list"),
    (object(), TypeError, "expected a pid .* not object"),
    (types.SimpleNamespace(pid="12"), TypeError, "pid of this .* no int"),
    (types.SimpleNamespace(pid=1.0), TypeError, "pid of this .* no int"),
    (types.SimpleNamespace(pid=True), TypeError, "pid of this .* no int"),
    (types.SimpleNamespace(pid=None), ValueError, "was not started"),
    (types.SimpleNamespace(pid=0), ValueError, "0 is not a pid"),
    (types.SimpleNamespace(pid=-5), ValueError, "-5 is not a pid"),
    (types.SimpleNamespace(pid=1), ValueError, "pid 1 is refused"),
]


@pytest.mark.parametrize(
    ("process", "error", "text"),
    BAD,
    ids=[repr(process)[:30] for process, _, _ in BAD],
)
@pytest.mark.parametrize("way", ["kill", "kill with a grace", "Victim"])
def test_what_is_no_process_is_refused(
    way: str, process: object, error: type[Exception], text: str, kill: Kill
) -> None:
    pid = cast("int", process)
    ways: dict[str, Callable[[], object]] = {
        "kill": lambda: kill(pid),
        "kill with a grace": lambda: kill(pid, grace=0.1),
        "Victim": lambda: Victim(pid),
    }
    with pytest.raises(error, match=text) as caught:
        ways[way]()
    assert type(caught.value) is error


@pytest.mark.needs("seccomp")
def test_nothing_is_signalled_when_a_process_is_refused(
    answered: Answered,
    kill: Kill,
) -> None:
    """Seen by the kernel: no signal but the harmless 0 is sent."""
    with victims.Process() as victim:
        pid = victim.pid

        def refused() -> int:
            # What kill(2) would make of it: this group, this process.
            processes: list[Any] = [p for p, _, _ in BAD]
            processes += [os.getpid(), os.getppid() * 0, -os.getpgrp()]
            for process in processes:
                with pytest.raises((ValueError, TypeError, OSError)):
                    kill(process, grace=0.01)
                with pytest.raises((ValueError, TypeError, OSError)):
                    kill(process)
            return len(processes)

        rule: kernel_errors.Rule = [kernel_errors.ALLOW]
        calls = (
            "pidfd_send_signal",
            "kill",
            "tkill",
            "tgkill",
            "process_mrelease",
        )
        kernel = answered(dict.fromkeys(calls, rule))
        assert kernel.run(refused) == len(BAD) + 3
        sent = [call for call, _ in kernel.calls if call.args[1] != 0]
        assert sent == []
        # And what is accepted is seen, so it was looked for well.
        kernel.run(kill, pid)
        sent = [call for call, _ in kernel.calls if call.args[1] != 0]
        assert [(call.name, call.args[1]) for call in sent] == [
            ("pidfd_send_signal", signal.SIGKILL)
        ]
        # The thread of a Reaper may call some times before SIGKILL is sent.
        count = kernel.count("process_mrelease")
        assert count == 1 or (kill is by_reaper and count > 1)


def test_the_caller_itself_is_refused(kill: Kill) -> None:
    with pytest.raises(ValueError, match="it is the caller itself"):
        kill(os.getpid())
    with pytest.raises(ValueError, match="it is the caller itself"):
        Victim(psutil.Process())
    with pytest.raises(ValueError, match="it is the caller itself"):
        kill(multiprocessing.current_process())


def test_the_caller_itself_is_refused_after_a_fork(kill: Kill) -> None:
    parent = os.getpid()

    def child() -> bool:
        assert os.getpid() != parent
        with pytest.raises(ValueError, match="it is the caller itself"):
            kill(os.getpid())
        return True

    assert kernel_errors.in_child(child)


def test_a_thread_of_the_caller_is_refused(kill: Kill) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(
            ValueError,
            match=f"{thread.native_id} is not a process: it is a thread of "
            f"pid {os.getpid()}",
        ):
            kill(thread.native_id or 0)
    finally:
        stop.set()
        thread.join()


def test_a_thread_of_another_process_is_refused(kill: Kill) -> None:
    with victims.asleep(0, threads=3) as victim:
        for tid in victim.tids():
            if tid != victim.pid:
                with pytest.raises(
                    ValueError, match=f"it is a thread of pid {victim.pid}"
                ):
                    kill(tid)
        assert victim.states() == "SSS"


@pytest.mark.needs("kernel_thread")
@pytest.mark.parametrize("grace", [0.0, 0.1])
def test_a_kernel_thread_is_refused(grace: float, kill: Kill) -> None:
    pid = victims.kernel_thread()
    text = f"pid {pid} is refused: it is a kernel thread"
    with pytest.raises(ValueError, match=text):
        kill(pid, grace=grace)
    with pytest.raises(ValueError, match=text):
        Victim(pid)
    fd = os.pidfd_open(pid)
    try:
        with pytest.raises(ValueError, match=text):
            Victim.from_pidfd(fd)
    finally:
        os.close(fd)
    assert victims.status_of(pid)["ShdPnd"] == "0" * 16


def test_a_process_that_is_gone(kill: Kill) -> None:
    with pytest.raises(ProcessLookupError, match="no such process") as caught:
        kill(victims.reaped_pid())
    assert caught.value.errno == errno.ESRCH


def test_a_popen_that_was_waited_for_is_refused(kill: Kill) -> None:
    with victims.Process() as process:
        process.popen.kill()
        process.popen.wait()
        for grace in (0.0, 0.1):
            with pytest.raises(
                ProcessLookupError,
                match="this Popen has ended and was waited for "
                r"\(returncode=-9\)",
            ):
                kill(process.popen, grace=grace)


def test_a_popen_that_others_waited_for_is_refused(kill: Kill) -> None:
    with victims.Process() as process:
        process.popen.kill()
        os.waitpid(process.pid, 0)
        with pytest.raises(ProcessLookupError, match="no such process"):
            kill(process.popen)


def test_a_popen_of_a_process_that_is_no_child_is_refused(kill: Kill) -> None:
    """The object of a parent, inherited: here the pid may be anybody's."""
    with victims.Process() as process:

        def child() -> bool:
            with pytest.raises(ProcessLookupError, match="not a child"):
                kill(process.popen)
            return True

        assert kernel_errors.in_child(child)
        assert process.popen.poll() is None


def test_a_multiprocessing_process_that_was_not_started_is_refused(
    kill: Kill,
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_sleep)
    with pytest.raises(
        ValueError, match="this ForkProcess has no pid: it was not started"
    ):
        kill(process)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_process_that_has_ended_is_refused(
    method: str,
    kill: Kill,
) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=int)
    process.start()
    pid = process.pid
    assert multiprocessing.connection.wait([process.sentinel], 60.0)
    if method == "forkserver":
        # The fork server waits for it: the pid may be another process now.
        with pytest.raises(
            ProcessLookupError, match=f"cannot kill pid {pid}: "
        ):
            kill(process)
    else:
        # A child keeps its pid, so this is still it.
        result = kill(process)
        assert result.outcome is Outcome.EXITED
        assert process.exitcode in (0, -signal.SIGKILL)
    process.join()
    with pytest.raises(ProcessLookupError, match=f"cannot kill pid {pid}: "):
        kill(process)
    process.close()
    with pytest.raises(ValueError, match="process object is closed"):
        kill(process)
    with pytest.raises(ValueError, match="process object is closed"):
        Victim(process)


def test_a_psutil_process_that_is_gone_is_refused(kill: Kill) -> None:
    with victims.Process() as process:
        known = psutil.Process(process.pid)
        process.popen.kill()
        process.popen.wait()
        with pytest.raises(ProcessLookupError):
            kill(known)


# --------------------------------------------------------- what is accepted


class Pid(int):
    """What a library may give for a pid."""


class Index:
    """As numpy's integers: no int, but to be used as one."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


def _int_enum(pid: int) -> object:
    return enum.IntEnum("Found", {"VICTIM": pid}).VICTIM  # type: ignore[attr-defined]


def _named_tuple(pid: int) -> object:
    return types.SimpleNamespace(pid=pid, name="a row of a scan")


@pytest.mark.parametrize(
    "made",
    [int, Pid, Index, _int_enum, _named_tuple, psutil.Process],
    ids=lambda made: made.__name__.strip("_"),
)
@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("way", ["kill", "Victim"])
@pytest.mark.needs("release")
def test_what_stands_for_a_process_is_accepted(
    way: str, made: Callable[[int], Any], kill: Kill
) -> None:
    with victims.asleep(4) as victim:
        process = made(victim.pid)
        if way == "kill":
            release = kill(process, timeout=10.0)
        else:
            with Victim(process) as pinned:
                assert pinned.pid == victim.pid
                release = kill(pinned, timeout=10.0)
        assert release.pid == victim.pid
        assert type(release.pid) is int
        assert release.outcome in BACK
        assert victim.wait() == -signal.SIGKILL


def _popen() -> subprocess.Popen[bytes]:
    return subprocess.Popen([victims.binary()], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip


def _psutil_popen() -> psutil.Popen:
    return psutil.Popen(
        [str(victims.binary())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("made", [_popen, _psutil_popen])
@pytest.mark.parametrize("grace", [0.0, 10.0])
@pytest.mark.needs("release")
def test_a_popen_is_accepted(
    made: Callable[[], Any], grace: float, kill: Kill
) -> None:
    with made() as process:
        assert process.stdout.readline().startswith(b"ready")
        release = kill(process, grace=grace, timeout=10.0)
        assert release.outcome in BACK
        # Its status is left to the parent.
        assert process.returncode is None
        expected = signal.SIGTERM if grace else signal.SIGKILL
        assert process.wait(10) == -expected


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.needs("release")
def test_a_multiprocessing_process_is_accepted(
    method: str, kill: Kill
) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_sleep)
    process.start()
    release = kill(process, timeout=10.0)
    assert release.outcome in BACK
    assert release.pid == process.pid
    process.join(10)
    # What a fork server says of a killed child is not the signal always.
    assert process.exitcode not in (None, 0)
    process.close()


@pytest.mark.needs("release")
def test_an_asyncio_process_is_accepted(kill: Kill) -> None:
    async def run() -> tuple[mrelease.Release, int]:
        process = await asyncio.create_subprocess_exec(
            str(victims.binary()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"ready")
        release = kill(process, timeout=10.0)
        code = await process.wait()
        with pytest.raises(ProcessLookupError, match="was waited for"):
            kill(process)
        return release, code

    # In a child: up to 3.11 asyncio keeps a thread to wait for each.
    release, code = kernel_errors.in_child(lambda: asyncio.run(run()))
    assert release.outcome in BACK
    assert code == -signal.SIGKILL


@pytest.mark.needs("release")
def test_a_victim_is_accepted_by_kill(kill: Kill) -> None:
    with victims.asleep(4) as process, Victim(process.pid) as victim:
        release = kill(victim, timeout=10.0)
        assert release.outcome in BACK
        os.fstat(victim.fileno())  # the caller's own: left open


# ----------------------------------------------------------- from_pidfd


@pytest.mark.needs("release")
def test_from_pidfd_duplicates_the_pidfd_and_leaves_it_open() -> None:
    with victims.asleep(4) as process:
        given = os.pidfd_open(process.pid)
        try:
            with Victim.from_pidfd(given) as victim:
                assert victim.fileno() != given
                assert victim.pid == process.pid
                assert victim.started == process.started()
            assert not victims.status_of(process.pid)["State"].startswith("Z")
            os.fstat(given)
            with Victim.from_pidfd(given) as victim:
                os.close(given)
                given = -1
                assert victim.kill(timeout=10.0).outcome in BACK
        finally:
            if given >= 0:
                os.close(given)


def test_from_pidfd_is_not_inherited_by_programs() -> None:
    with victims.asleep(0) as process:
        with Victim.from_pidfd(process.pidfd) as victim:
            assert not os.get_inheritable(victim.fileno())
        with Victim(process.pid) as victim:
            assert not os.get_inheritable(victim.fileno())


def test_from_pidfd_takes_what_has_a_fileno() -> None:
    with (
        victims.asleep(0) as process,
        Victim(process.pid) as first,
        Victim.from_pidfd(first) as second,
    ):
        assert second.pid == first.pid
        assert second.fileno() != first.fileno()


def test_from_pidfd_refuses_what_is_no_pidfd(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for fd in (file, file.fileno()):
            with pytest.raises(ValueError, match="is not a pidfd"):
                Victim.from_pidfd(fd)
        number = file.fileno()
    with pytest.raises(ValueError, match=f"{number} is not open"):
        Victim.from_pidfd(number)
    with pytest.raises(ValueError, match="-1 is not open"):
        Victim.from_pidfd(-1)
    with victims.asleep(0) as process:
        folder = os.open(f"/proc/{process.pid}", os.O_RDONLY)
        try:
            with pytest.raises(ValueError, match="is not a pidfd"):
                Victim.from_pidfd(folder)
        finally:
            os.close(folder)
        assert process.states() == "S"


@pytest.mark.parametrize("value", [True, None, "3", 3.0])
def test_from_pidfd_refuses_wrong_types(value: object) -> None:
    with pytest.raises(TypeError, match="expected a pidfd"):
        Victim.from_pidfd(cast("int", value))


def test_from_pidfd_of_a_reaped_process() -> None:
    with victims.Process() as process:
        process.popen.kill()
        process.wait()
        with pytest.raises(
            ProcessLookupError, match=f"pidfd {process.pidfd} has ended"
        ):
            Victim.from_pidfd(process.pidfd)


def test_from_pidfd_of_the_caller_itself() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        with pytest.raises(ValueError, match="it is the caller itself"):
            Victim.from_pidfd(fd)
    finally:
        os.close(fd)


def test_from_pidfd_of_init() -> None:
    try:
        fd = os.pidfd_open(1)
    except OSError as e:
        pytest.skip(f"no pidfd of pid 1: {e.strerror}")
    try:
        with pytest.raises(ValueError, match="pid 1 is refused"):
            Victim.from_pidfd(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("which", [0, 1])
def test_from_pidfd_of_a_thread_is_refused(which: int) -> None:
    """Also that of a leader: it tells the leader's end, not all's."""
    with victims.asleep(0, threads=2) as process:
        try:
            # PIDFD_THREAD
            fd = os.pidfd_open(process.tids()[which], os.O_EXCL)
        except OSError as e:
            pytest.skip(f"no thread pidfds before Linux 6.9: {e.strerror}")
        try:
            with pytest.raises(ValueError, match="thread"):
                Victim.from_pidfd(fd)
        finally:
            os.close(fd)
        assert process.states() == "SS"


def test_no_pidfd_is_leaked_by_what_is_refused(kill: Kill) -> None:
    before = set(os.listdir("/proc/self/fd"))
    null = os.open("/dev/null", os.O_RDONLY)
    with victims.asleep(0) as process:
        inside = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with pytest.raises(ProcessLookupError):
                Victim(process.pid, started=1)
            with pytest.raises(ValueError, match="is not a pidfd"):
                Victim.from_pidfd(null)
            with pytest.raises(ValueError, match="init"):
                kill(1)
        assert len(os.listdir("/proc/self/fd")) == inside
    os.close(null)
    assert set(os.listdir("/proc/self/fd")) == before


# --------------------------------------------------------- after the close


def test_a_closed_victim_refuses_all(kill: Kill) -> None:
    with victims.asleep(0) as process:
        victim = Victim(process.pid)
        victim.close()
        victim.close()
        calls: list[Callable[[], object]] = [
            victim.kill,
            victim.release,
            victim.footprint,
            victim.fileno,
            lambda: victim.exited,
            lambda: kill(victim),
            lambda: mrelease.process_mrelease(victim),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="this Victim is closed"):
                call()
        assert victim.pid == process.pid
        assert victim.started == process.started()
        assert "closed" in repr(victim)
        assert process.states() == "S"


def test_an_unclosed_victim_warns() -> None:
    with victims.asleep(0) as process:
        kept = [Victim(process.pid)]
        fd = kept[0].fileno()
        text = f"unclosed <Victim pid={process.pid} .* pinned>"
        with pytest.warns(ResourceWarning, match=text):
            kept.clear()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_closed_victim_and_one_that_was_never_made_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with victims.asleep(0) as process, Victim(process.pid):
            pass
        with pytest.raises(ValueError, match="pid 1"):
            Victim(1)
        gc.collect()


def test_a_victim_that_has_ended_but_was_not_waited_for() -> None:
    with victims.zombie(4) as process, Victim(process.pid) as victim:
        assert victim.exited
        assert victim.footprint() == mrelease.Footprint(0, 0, 0, 0, 0)
        release = victim.kill()
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None


# --------------------------------------- close() while kill() is under way


@pytest.mark.needs("seccomp")
def test_close_during_a_release_keeps_the_pidfd_to_its_end(
    answered: Answered,
) -> None:
    with victims.asleep(4) as process:
        victim = Victim(process.pid)
        number = victim.fileno()
        kernel = answered({"process_mrelease": kernel_errors.BLOCK})
        releases: list[mrelease.Release] = []
        thread = threading.Thread(
            target=lambda: releases.append(
                kernel.in_thread(victim.kill, timeout=10.0)
            )
        )
        thread.start()
        kernel.blocked()
        victim.close()
        with pytest.raises(ValueError, match="this Victim is closed"):
            victim.kill()
        with pytest.raises(ValueError, match="this Victim is closed"):
            victim.fileno()
        # The number is not free for others until the call is done.
        assert "Pid:" in Path(f"/proc/self/fdinfo/{number}").read_text()
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
        assert number not in others
        kernel.release()
        thread.join(20)
        for fd in others:
            os.close(fd)
        assert releases[0].exited is not None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_close_during_a_grace_does_not_lead_the_kill_astray(
    bystander: Bystander,
) -> None:
    """The bystander's pidfd would get the number, were it free."""
    with victims.stopped(4) as process:
        victim = Victim(process.pid)
        number = victim.fileno()
        event = os.eventfd(0)
        releases: list[mrelease.Release] = []
        thread = threading.Thread(
            target=lambda: releases.append(
                victim.kill(grace=60.0, escalate_on=event, timeout=10.0)
            )
        )
        thread.start()
        victims.wait_until(
            lambda: int(process.status()["ShdPnd"], 16) & 1 << 14 != 0,
            "SIGTERM has been sent",
        )
        victim.close()
        pidfds = [os.pidfd_open(bystander.pid) for _ in range(5)]
        assert number not in pidfds
        os.eventfd_write(event, 1)
        thread.join(20)
        os.close(event)
        for fd in pidfds:
            os.close(fd)
        assert releases[0].signalled is not None
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    assert bystander.lives()


def test_close_against_many_kills_and_looks_hits_no_reused_number(
    bystander: Bystander, rounds: Callable[[int], int]
) -> None:
    """Threads use and close Victims while their numbers are fought for."""
    wrong: list[str] = []
    for _ in range(rounds(100)):
        with victims.Process() as process:
            fds = len(os.listdir("/proc/self/fd"))
            victim = Victim(process.pid)
            go = threading.Barrier(3)

            def use(
                act: Callable[[], object], go: threading.Barrier = go
            ) -> None:
                go.wait(10)
                try:
                    act()
                except ValueError as e:
                    if "closed" not in str(e):
                        wrong.append(repr(e))
                except BaseException as e:  # noqa: BLE001 - the test's find
                    wrong.append(repr(e))

            threads = [
                threading.Thread(target=use, args=(act,))
                for act in (victim.kill, victim.footprint)
            ]
            for thread in threads:
                thread.start()
            go.wait(10)
            victim.close()
            fd = os.pidfd_open(bystander.pid)
            for thread in threads:
                thread.join(20)
            assert not select.select([fd], [], [], 0)[0]
            os.close(fd)
            assert len(os.listdir("/proc/self/fd")) == fds
    assert wrong == []


# ----------------------------------------------- what a kill imports


@pytest.mark.needs("release")
def test_no_psutil_is_imported_by_a_kill() -> None:
    """psutil's objects are known without psutil's help."""
    code = """
        import subprocess, sys
        import mrelease
        child = subprocess.Popen(["sleep", "60"])
        print(mrelease.kill(child, timeout=10.0).outcome.value)
        child.wait()
        child = subprocess.Popen(["sleep", "60"])
        with mrelease.Victim(child.pid) as victim:
            print(victim.kill(grace=1.0, timeout=10.0).outcome.value)
        child.wait()
        print([
            name for name in (
                "psutil", "asyncio", "multiprocessing", "dataclasses",
                "inspect", "logging", "argparse", "ctypes",
            ) if name in sys.modules
        ])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    one, two, loaded = done.stdout.splitlines()
    assert re.fullmatch("released|exited", one)
    assert two == "exited"
    assert loaded == "[]"


def test_only_psutil_s_own_class_is_taken_for_psutil_s(kill: Kill) -> None:
    """A class of the same name in another module is judged by its pid."""

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def is_running(self) -> bool:
            raise AssertionError("not psutil's, not asked")

    with victims.asleep(0) as victim:
        assert kill(Process(victim.pid), timeout=10.0).freed
