"""SIGTERM first, SIGKILL on time or on an event; and what bounds a call.

Here belongs all about time: grace, escalate_on, timeout, the order of
the times in a Release, and signals that reach the caller meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

import cgroups
import families
import kernel_errors
import mrelease
import victims
from kill_ways import by_reaper
from mrelease import Outcome, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kill_ways import Kill

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

BACK = {Outcome.RELEASED, Outcome.EXITED}
LONG = 20.0
"""A grace that no test waits out."""
SLACK = 2.0
"""How late a bound may be kept on a machine that others use too."""


def sigterm_is_pending(victim: victims.Process) -> bool:
    return int(victim.status()["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1 == 1


def wait_for_sigterm(victim: victims.Process) -> None:
    """Of a stopped victim: until its grace has begun."""
    victims.wait_until(lambda: sigterm_is_pending(victim), "SIGTERM was sent")


def check_order(release: mrelease.Release) -> None:
    # The call may still be on its way back when the victim has ended.
    for last in (release.released, release.exited):
        times = [
            when
            for when in (release.terminated, release.signalled, last)
            if when is not None
        ]
        assert times == sorted(times), release
        assert all(when > 0 for when in times), release


@contextlib.contextmanager
def in_thread(
    function: Callable[[], mrelease.Release],
) -> Iterator[list[mrelease.Release]]:
    """Run a kill beside the test; joined at the end of the with."""
    releases: list[mrelease.Release] = []
    thread = threading.Thread(target=lambda: releases.append(function()))
    thread.start()
    try:
        yield releases
    finally:
        thread.join(3 * LONG)
        assert not thread.is_alive()


# ----------------------------------------------------- SIGTERM is enough


@pytest.mark.parametrize("threads", [1, 8])
def test_a_child_that_exits_on_sigterm_gets_no_sigkill(
    threads: int, kill: Kill
) -> None:
    with victims.asleep(4, threads=threads, sigterm="exit") as victim:
        release = kill(victim.pid, grace=LONG)
        assert release.outcome is Outcome.EXITED
        assert release.freed
        assert release.signalled is None
        assert release.released is None
        assert release.attempts == 0
        assert release.errno is None
        assert release.terminated is not None
        assert release.exited is not None
        assert release.exited < LONG / 2
        check_order(release)
        # Its own exit code, not a signal.
        assert victim.wait() == 0
    assert "terminated" in str(release)
    assert "signalled" not in str(release)


def test_a_child_that_does_not_handle_sigterm_dies_of_it(kill: Kill) -> None:
    with victims.asleep(4) as victim:
        release = kill(victim.pid, grace=LONG)
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None
        assert release.attempts == 0
        assert victim.wait() == -signal.SIGTERM


def test_a_program_that_cleans_up_has_the_time_for_it(
    tmp_path: Path, kill: Kill
) -> None:
    code = (
        "import signal, sys, time\n"
        "def leave(*_):\n"
        "    time.sleep(0.3)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        release = kill(program, grace=LONG)
        assert program.wait(10) == 7
    assert release.outcome is Outcome.EXITED
    assert release.signalled is None
    assert release.exited is not None
    assert release.exited >= 0.3
    assert (tmp_path / "done").exists()


def test_without_a_grace_there_is_no_sigterm(kill: Kill) -> None:
    with victims.asleep(4, sigterm="exit") as victim:
        release = kill(victim.pid, timeout=10.0)
        assert release.terminated is None
        assert release.signalled is not None
        assert victim.wait() == -signal.SIGKILL


def test_a_victim_that_has_ended_already_is_not_signalled(kill: Kill) -> None:
    with victims.zombie(4) as process, Victim(process.pid) as victim:
        for grace in (0.0, LONG):
            release = kill(victim, grace=grace)
            assert release.outcome is Outcome.EXITED
            assert release.terminated is None
            assert release.signalled is None
            check_order(release)


# ------------------------------------------------ SIGTERM is not enough


@pytest.mark.parametrize("grace", [0.001, 0.05, 0.6])
@pytest.mark.needs("release")
def test_one_that_ignores_sigterm_gets_sigkill_when_the_grace_is_over(
    grace: float,
    kill: Kill,
) -> None:
    with victims.asleep(4, sigterm="ignore") as victim:
        release = kill(victim.pid, grace=grace, timeout=10.0)
        assert release.outcome in BACK
        assert release.freed
        assert release.terminated is not None
        assert release.signalled is not None
        given = release.signalled - release.terminated
        assert grace <= given < grace + SLACK
        check_order(release)
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_one_that_can_not_end_of_sigterm_is_killed_and_released(
    kill: Kill,
) -> None:
    """SIGTERM has killed it, so to say, but its memory is still there."""
    with victims.held(16) as victim:
        release = kill(victim.pid, grace=0.1)
        assert release.outcome is Outcome.RELEASED
        assert release.terminated is not None
        assert release.signalled is not None
        assert release.signalled - release.terminated >= 0.1
        check_order(release)
        assert victim.rss_anon() == 0


@pytest.mark.needs("held", "seccomp")
@pytest.mark.needs("release")
def test_there_is_no_release_within_the_grace(
    answered: Answered, kill: Kill
) -> None:
    """Only with SIGKILL, and then as the very next call."""
    with victims.held(4, sigterm="ignore") as victim:
        calls = ("pidfd_send_signal", "process_mrelease")
        kernel = answered({name: [kernel_errors.ALLOW] for name in calls})
        begun = time.monotonic()
        kernel.run(kill, victim.pid, grace=0.1)
        seen = [
            (call.name, call.args[1], call.time)
            for call, _ in kernel.calls
            if call.name == "process_mrelease" or call.args[1] != 0
        ]
    order = [
        ("pidfd_send_signal", signal.SIGTERM),
        ("pidfd_send_signal", signal.SIGKILL),
        ("process_mrelease", 0),
    ]
    assert seen[0][:2] == order[0]
    assert all(when - begun >= 0.1 for _, _, when in seen[1:])
    if kill is by_reaper:
        # A thread is called ahead of SIGKILL: it is in its loop by then.
        assert {call[:2] for call in seen} == set(order)
    else:
        assert [call[:2] for call in seen[:3]] == order


# ------------------------------------------------------------ escalate_on


class Pollable:
    """An object with fileno(): a pressure trigger, say."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def _eventfd() -> tuple[object, Callable[[], object], Callable[[], None]]:
    fd = os.eventfd(0)
    return fd, lambda: os.eventfd_write(fd, 1), lambda: os.close(fd)


def _pipe() -> tuple[object, Callable[[], object], Callable[[], None]]:
    read, write = os.pipe()

    def close() -> None:
        os.close(read)
        os.close(write)

    return read, lambda: os.write(write, b"x"), close


def _object() -> tuple[object, Callable[[], object], Callable[[], None]]:
    fd, fire, close = _eventfd()
    return Pollable(cast("int", fd)), fire, close


def _urgent() -> tuple[object, Callable[[], object], Callable[[], None]]:
    """POLLPRI, as a pressure trigger gives it."""
    server = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(server.getsockname())
    theirs, _ = server.accept()
    server.close()

    def close() -> None:
        ours.close()
        theirs.close()

    return ours, lambda: theirs.send(b"!", socket.MSG_OOB), close


EVENTS = pytest.mark.parametrize(
    "event",
    [_eventfd, _pipe, _object, _urgent],
    ids=lambda f: f.__name__.strip("_"),
)


@EVENTS
def test_escalate_on_cuts_the_grace_short_within_5_ms(
    event: Callable[
        [], tuple[object, Callable[[], object], Callable[[], None]]
    ],
    kill: Kill,
) -> None:
    """From the event to the end of the victim, median of 15."""
    took = []
    for _ in range(15):
        watched, fire, close = event()
        with victims.stopped(0) as victim:
            with in_thread(
                lambda victim=victim, watched=watched: kill(  # type: ignore[misc]
                    victim.pid,
                    grace=LONG,
                    escalate_on=cast("int", watched),
                    timeout=10.0,
                )
            ) as releases:
                wait_for_sigterm(victim)
                begin = time.monotonic()
                fire()
                ended = bool(select.select([victim.pidfd], [], [], 5)[0])
                took.append(time.monotonic() - begin)
            assert ended
            release = releases[0]
            assert release.terminated is not None
            assert release.signalled is not None
            check_order(release)
            assert victim.wait() == -signal.SIGKILL
        close()
    median = statistics.median(took)
    print(
        f"\n{event.__name__}: event to end of victim, median "
        f"{median * 1e3:.2f} ms, worst {max(took) * 1e3:.2f} ms"
    )
    assert median < 0.005 * families.slowness(), sorted(took)


@EVENTS
def test_escalate_on_that_has_fired_already_leaves_no_grace(
    event: Callable[
        [], tuple[object, Callable[[], object], Callable[[], None]]
    ],
    kill: Kill,
) -> None:
    watched, fire, close = event()
    fire()
    select.select([cast("int", watched)], [], [], 0.05)
    with victims.asleep(0, sigterm="ignore") as victim:
        release = kill(
            victim.pid,
            grace=LONG,
            escalate_on=cast("int", watched),
            timeout=10.0,
        )
        assert release.terminated is not None
        assert release.signalled is not None
        assert release.signalled < SLACK
        check_order(release)
        assert victim.wait() == -signal.SIGKILL
    close()


def test_escalate_on_is_not_read_by_the_kill(kill: Kill) -> None:
    """The event is the caller's: others may wait for it too."""
    event = os.eventfd(3)
    with victims.asleep(0, sigterm="ignore") as victim:
        kill(victim.pid, grace=LONG, escalate_on=event, timeout=10.0)
    assert os.eventfd_read(event) == 3
    os.close(event)


def test_escalate_on_without_a_grace_is_of_no_account(kill: Kill) -> None:
    event = os.eventfd(1)
    with victims.asleep(0, sigterm="exit") as victim:
        release = kill(victim.pid, escalate_on=event, timeout=10.0)
        assert release.terminated is None
        assert victim.wait() == -signal.SIGKILL
    os.close(event)


def test_the_end_of_the_victim_ends_a_grace_with_an_event(kill: Kill) -> None:
    event = os.eventfd(0)
    with victims.asleep(0, sigterm="exit") as victim:
        release = kill(victim.pid, grace=LONG, escalate_on=event)
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None
    os.close(event)


@pytest.mark.parametrize("grace", [math.inf, 1e300, 10**400])
def test_a_grace_without_end_is_ended_by_the_event(
    grace: float, kill: Kill
) -> None:
    event = os.eventfd(0)
    with victims.stopped(0) as victim:
        with in_thread(
            lambda: kill(
                victim.pid, grace=grace, escalate_on=event, timeout=10.0
            )
        ) as releases:
            wait_for_sigterm(victim)
            assert not victim.ended(0.3)
            os.eventfd_write(event, 1)
        assert releases[0].signalled is not None
    os.close(event)


# ------------------------------------- an escalate_on that is no good


def _check_whole_grace(
    kill: Kill, victim: victims.Process, watched: int
) -> None:
    release = kill(victim.pid, grace=0.4, escalate_on=watched, timeout=10.0)
    assert release.terminated is not None
    assert release.signalled is not None
    assert release.signalled - release.terminated >= 0.4


def test_escalate_on_in_error_does_not_shorten_the_grace(kill: Kill) -> None:
    """POLLERR: nobody reads from the pipe any more."""
    read, write = os.pipe()
    os.close(read)
    poll = select.poll()
    poll.register(write, select.POLLIN | select.POLLPRI)
    assert poll.poll(0)[0][1] == select.POLLERR
    with victims.asleep(0, sigterm="ignore") as victim:
        _check_whole_grace(kill, victim, write)
    os.close(write)


class _Pressure(cgroups.Group):
    """A control group with a pressure trigger."""

    def __init__(self, resource: str = "memory") -> None:
        super().__init__(version=2)
        self.trigger = -1
        try:
            self.trigger = os.open(
                self.path / f"{resource}.pressure", os.O_RDWR | os.O_NONBLOCK
            )
            os.write(self.trigger, b"some 100000 2000000")
        except OSError as e:
            self.close()
            raise cgroups.Unavailable(
                f"pressure trigger of a cgroup: {e.strerror}"
            ) from None

    def close(self) -> None:
        super().close()
        if self.trigger >= 0:
            os.close(self.trigger)
            self.trigger = -1


def test_a_silent_pressure_trigger_does_not_shorten_the_grace(
    kill: Kill,
) -> None:
    with _Pressure() as group, victims.asleep(0, sigterm="ignore") as victim:
        _check_whole_grace(kill, victim, group.trigger)


def test_a_pressure_trigger_that_fires_cuts_the_grace_short(
    kill: Kill,
) -> None:
    """Processes of one group that wait for a CPU are pressure as well."""
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_Pressure("cpu"))
        victim = stack.enter_context(victims.stopped(0))
        releases = stack.enter_context(
            in_thread(
                lambda: kill(
                    victim.pid,
                    grace=20.0,
                    escalate_on=group.trigger,
                    timeout=10.0,
                )
            )
        )
        wait_for_sigterm(victim)
        assert not victim.ended(0.2)
        with contextlib.ExitStack() as busy:
            for _ in range(2 + len(os.sched_getaffinity(0))):
                busy.enter_context(victims.spinning(0, groups=[group]))
            assert victim.ended(20.0)
    assert releases[0].terminated is not None
    assert releases[0].signalled is not None
    assert releases[0].signalled - releases[0].terminated < 19.0


def test_a_trigger_of_a_removed_cgroup_does_not_shorten_the_grace(
    kill: Kill,
) -> None:
    with _Pressure() as group, victims.asleep(0, sigterm="ignore") as victim:
        group.path.rmdir()
        poll = select.poll()
        poll.register(group.trigger, select.POLLIN | select.POLLPRI)
        assert poll.poll(1000)[0][1] & select.POLLERR
        _check_whole_grace(kill, victim, group.trigger)


def test_a_cgroup_removed_within_the_grace_does_not_shorten_it(
    kill: Kill,
) -> None:
    with _Pressure() as group, victims.stopped(0) as victim:
        with in_thread(
            lambda: kill(
                victim.pid,
                grace=0.6,
                escalate_on=group.trigger,
                timeout=10.0,
            )
        ) as releases:
            wait_for_sigterm(victim)
            group.path.rmdir()
        release = releases[0]
        assert release.terminated is not None
        assert release.signalled is not None
        assert release.signalled - release.terminated >= 0.6


def test_escalate_on_closed_within_the_grace_does_not_shorten_it(
    kill: Kill,
) -> None:
    event = os.eventfd(0)
    with victims.stopped(0) as victim:
        with in_thread(
            lambda: kill(
                victim.pid, grace=0.8, escalate_on=event, timeout=10.0
            )
        ) as releases:
            wait_for_sigterm(victim)
            os.close(event)
        release = releases[0]
        assert release.terminated is not None
        assert release.signalled is not None
        assert release.signalled - release.terminated >= 0.8


def _closed_fd() -> int:
    """A number so high that nothing else is opened under it."""
    fd = os.eventfd(0)
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 500)
    os.close(high)
    os.close(fd)
    return high


def _closed_file() -> object:
    file = Path(os.devnull).open()  # noqa: SIM115
    file.close()
    return file


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        (_closed_fd, ValueError, "escalate_on is not open"),
        (_closed_file, ValueError, "closed file"),
        (lambda: Pollable(_closed_fd()), ValueError, "escalate_on is not op"),
        (lambda: -1, ValueError, "escalate_on is not open: .* -1"),
        (lambda: 2**70, ValueError, "escalate_on is not open"),
        (lambda: True, TypeError, "escalate_on must be pollable, not bool"),
        (lambda: "3", TypeError, "escalate_on must be a file .* not str"),
        (lambda: 3.0, TypeError, "escalate_on must be a file .* not float"),
        (object, TypeError, "escalate_on must be a file .* not object"),
    ],
)
@pytest.mark.parametrize("grace", [0.0, 0.1])
def test_a_bad_escalate_on_is_refused_before_any_signal(
    made: Callable[[], object],
    error: type[Exception],
    text: str,
    grace: float,
    kill: Kill,
) -> None:
    with victims.asleep(4) as victim, Victim(victim.pid) as pinned:
        watched = cast("int", made())
        with pytest.raises(error, match=text):
            kill(victim.pid, grace=grace, escalate_on=watched)
        with pytest.raises(error, match=text):
            kill(pinned, grace=grace, escalate_on=watched)
        _check_untouched(victim)


# -------------------------------------------------------- wrong arguments


def _check_untouched(victim: victims.Process) -> None:
    assert victim.states() == "S"
    assert victim.status()["ShdPnd"] == "0" * 16
    assert victim.popen.poll() is None
    assert not victim.ended(0.02)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1, ValueError, "must not be negative or NaN: -1"),
        (-0.001, ValueError, "must not be negative or NaN"),
        (-math.inf, ValueError, "must not be negative or NaN"),
        (math.nan, ValueError, "must not be negative or NaN: nan"),
        (True, TypeError, "must be a number of seconds, not bool"),
        (False, TypeError, "must be a number of seconds, not bool"),
        ("1", TypeError, "must be a number of seconds, not str"),
        (None, TypeError, "must be a number of seconds, not NoneType"),
        (1j, TypeError, "must be a number of seconds, not complex"),
    ],
)
@pytest.mark.parametrize("name", ["grace", "timeout"])
def test_a_bad_duration_is_refused_before_any_signal(
    name: str, value: object, error: type[Exception], text: str, kill: Kill
) -> None:
    with victims.asleep(4) as victim, Victim(victim.pid) as pinned:
        number = cast("float", value)
        calls: list[Callable[[], object]]
        if name == "grace":
            calls = [
                lambda: kill(victim.pid, grace=number),
                lambda: kill(pinned, grace=number),
            ]
        else:
            calls = [
                lambda: kill(victim.pid, timeout=number),
                lambda: kill(pinned, timeout=number),
                lambda: pinned.release(timeout=number),
            ]
        for call in calls:
            with pytest.raises(error, match=f"{name} {text}"):
                call()
        _check_untouched(victim)


@pytest.mark.parametrize("locks", ["", "Protect", None, True, 1])
def test_a_bad_locks_is_refused_before_any_signal(
    locks: str, kill: Kill
) -> None:
    with victims.asleep(4) as victim:
        with pytest.raises(ValueError, match="locks must be 'protect' or"):
            kill(victim.pid, locks=locks)  # type: ignore[arg-type]
        _check_untouched(victim)


# ---------------------------------------------------------------- timeout


@pytest.mark.needs("held")
@pytest.mark.parametrize("timeout", [0, 0.0])
@pytest.mark.needs("release")
def test_timeout_0_returns_at_once(timeout: float, kill: Kill) -> None:
    with victims.held(4) as victim:
        begin = time.monotonic()
        release = kill(victim.pid, timeout=timeout)
        assert time.monotonic() - begin < SLACK
        # Of a Reaper's it is the result that comes at once; its thread may
        # need some time more.
        assert release.outcome is Outcome.RELEASED or (
            kill is by_reaper and release.outcome is Outcome.PARTIAL
        )
        assert release.exited is None
        assert victim.rss_anon() == 0


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_timeout_0_does_not_wait_for_locks_either(
    tmp_path: Path, kill: Kill
) -> None:
    with victims.held(4, robust=tmp_path / "lock") as victim:
        begin = time.monotonic()
        release = kill(victim.pid, timeout=0)
        assert time.monotonic() - begin < SLACK
        # A Reaper's thread may be looking still.
        assert release.outcome is Outcome.LOCKED or (
            kill is by_reaper and release.outcome is Outcome.PARTIAL
        )
        assert not release.freed
        assert victim.rss_anon() >= 4 * victims.MIB


@pytest.mark.needs("held", "seccomp")
@pytest.mark.parametrize("timeout", [0.05, 0.7])
@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.EAGAIN, Outcome.PARTIAL),
        (errno.EINTR, Outcome.PARTIAL),
        (errno.EINVAL, Outcome.SHARED),
        (errno.ESRCH, Outcome.EXITING),
        (errno.ENOSYS, Outcome.UNSUPPORTED),
        (errno.EPERM, Outcome.UNSUPPORTED),
    ],
)
@pytest.mark.needs("release")
def test_timeout_bounds_the_call_whatever_the_kernel_says(
    number: int,
    outcome: Outcome,
    timeout: float,
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.held(4) as victim:

        def run() -> tuple[mrelease.Release, float]:
            begin = time.monotonic()
            release = kill(victim.pid, timeout=timeout)
            return release, time.monotonic() - begin

        release, took = answered({"process_mrelease": number}).run(run)
        assert release.outcome is outcome
        assert release.errno == number
        assert release.exited is None
        assert not release.freed
        assert timeout <= took < timeout + SLACK
        assert victim.rss_anon() >= 4 * victims.MIB


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_timeout_bounds_the_wait_for_what_only_the_end_gives_back(
    kill: Kill,
) -> None:
    with victims.held(4, shared_anon=4) as victim:
        begin = time.monotonic()
        release = kill(victim.pid, timeout=0.3)
        assert 0.3 <= time.monotonic() - begin < 0.3 + SLACK
        assert release.outcome is Outcome.RELEASED
        assert release.exited is None


@pytest.mark.needs("held")
def test_timeout_bounds_a_release_without_a_kill(tmp_path: Path) -> None:
    with (
        victims.held(4, robust=tmp_path / "lock", killed=True) as process,
        Victim(process.pid) as victim,
    ):
        begin = time.monotonic()
        release = victim.release(timeout=0.3)
        assert 0.3 <= time.monotonic() - begin < 0.3 + SLACK
        assert release.outcome is Outcome.LOCKED


@pytest.mark.needs("held")
def test_timeout_counts_from_sigkill_not_from_the_call(
    tmp_path: Path,
    kill: Kill,
) -> None:
    lock = tmp_path / "lock"
    with victims.held(4, robust=lock, sigterm="ignore") as victim:
        begin = time.monotonic()
        release = kill(victim.pid, grace=0.5, timeout=0.3)
        took = time.monotonic() - begin
    assert release.outcome is Outcome.LOCKED
    assert 0.8 <= took < 0.8 + SLACK


def test_the_end_of_the_victim_ends_the_wait(kill: Kill) -> None:
    with victims.asleep(16) as victim:
        begin = time.monotonic()
        release = kill(victim.pid, timeout=LONG)
        assert time.monotonic() - begin < LONG / 2
        assert release.exited is not None


def test_a_timeout_without_end_is_accepted(kill: Kill) -> None:
    with victims.asleep(4) as victim:
        assert kill(victim.pid, timeout=math.inf).freed


# ------------------------------------------------------------- the times


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_the_times_are_in_order_and_within_the_call(kill: Kill) -> None:
    for grace in (0.0, 0.02):
        with victims.held(16, shared_anon=2, sigterm="ignore") as victim:
            letting_go = threading.Timer(
                0.1 * families.slowness(), victim.let_go
            )
            letting_go.start()
            begin = time.monotonic()
            release = kill(victim.pid, grace=grace, timeout=LONG)
            took = time.monotonic() - begin
            letting_go.join()
        assert release.outcome is Outcome.RELEASED
        assert (release.terminated is None) is (grace == 0)
        assert release.signalled is not None
        assert release.released is not None
        assert release.exited is not None
        check_order(release)
        assert release.exited <= took
        assert release.exited >= 0.05


def test_the_times_of_many_kills_are_in_order(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    for number in range(rounds(100)):
        with victims.asleep(1, threads=1 + number % 3) as victim:
            grace = 0.001 if number % 2 else 0.0
            check_order(kill(victim.pid, grace=grace, timeout=10.0))


# ----------------------------------------------- signals to the caller


class Interrupted(Exception):
    """What a handler of the caller's may raise."""


def _on_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_within_the_grace_is_raised_and_the_victim_is_dead() -> None:
    with victims.stopped(16) as victim:

        def kill() -> None:
            _on_sigint()
            mrelease.kill(victim.pid, grace=LONG, timeout=LONG)

        with kernel_errors.Job(kill) as job:
            wait_for_sigterm(victim)
            begin = time.monotonic()
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result(LONG)
            assert time.monotonic() - begin < LONG / 2
        assert victim.ended(10.0)
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_ctrl_c_within_the_grace_releases_the_memory_too() -> None:
    with victims.held(16, sigterm="default") as victim:

        def kill() -> None:
            _on_sigint()
            mrelease.kill(victim.pid, grace=LONG, timeout=LONG)

        with kernel_errors.Job(kill) as job:
            victims.wait_held(victim)  # of SIGTERM
            assert victim.rss_anon() >= 16 * victims.MIB
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result(LONG)
        assert victim.rss_anon() == 0


@pytest.mark.needs("held")
def test_ctrl_c_within_the_grace_protects_locks_too(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        victims.held(4, robust=path) as victim,
        victims.robust_waiter(path) as waiter,
    ):

        def kill() -> None:
            _on_sigint()
            mrelease.kill(victim.pid, grace=LONG, timeout=LONG)

        with kernel_errors.Job(kill) as job:
            victims.wait_held(victim)
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result(LONG)
        victim.let_go()
        assert victims.got(waiter) == "EOWNERDEAD"


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_ctrl_c_after_sigkill_is_raised_and_the_victim_is_dead() -> None:
    # Shared memory is waited for, and the victim can not end.
    with victims.held(16, shared_anon=4) as victim:

        def kill() -> None:
            _on_sigint()
            mrelease.kill(victim.pid, timeout=LONG)

        with kernel_errors.Job(kill) as job:
            victims.wait_held(victim)
            begin = time.monotonic()
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result(LONG)
            assert time.monotonic() - begin < LONG / 2
        assert victim.rss_anon() == 0
        victim.let_go()
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("held")
def test_ctrl_c_in_the_wait_of_a_release_is_raised(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        victims.held(4, robust=lock, killed=True) as process,
        Victim(process.pid) as victim,
    ):

        def release() -> None:
            _on_sigint()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            victim.release(timeout=LONG)

        with (
            kernel_errors.Job(release) as job,
            pytest.raises(KeyboardInterrupt),
        ):
            job.result(LONG / 2)


def test_what_a_handler_raises_within_the_grace_is_raised() -> None:
    with victims.asleep(4, sigterm="ignore") as victim:

        def kill() -> str:
            def handler(*_: object) -> None:
                raise Interrupted("by the handler")

            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupted, match="by the handler") as caught:
                mrelease.kill(victim.pid, grace=LONG)
            return str(caught.value)

        assert kernel_errors.in_child(kill) == "by the handler"
        assert victim.wait() == -signal.SIGKILL


def _with_a_timer(kill: Callable[[], mrelease.Release]) -> Callable[
    [], tuple[mrelease.Release, int]
]:  # fmt: skip
    """While a signal comes each 10 ms, whose handler returns."""

    def run() -> tuple[mrelease.Release, int]:
        seen = 0

        def handler(*_: object) -> None:
            nonlocal seen
            seen += 1

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        release = kill()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return release, seen

    return run


def test_a_signal_whose_handler_returns_does_not_cut_the_grace_short(
    kill: Kill,
) -> None:
    with victims.asleep(4, sigterm="ignore") as victim:
        release, seen = kernel_errors.in_child(
            _with_a_timer(lambda: kill(victim.pid, grace=0.6, timeout=10.0))
        )
        assert release.terminated is not None
        assert release.signalled is not None
        assert 0.6 <= release.signalled - release.terminated < 0.6 + SLACK
        assert seen >= 10


@pytest.mark.needs("held")
def test_a_signal_whose_handler_returns_does_not_cut_the_wait_short(
    tmp_path: Path,
    kill: Kill,
) -> None:
    with victims.held(4, robust=tmp_path / "lock") as victim:
        begin = time.monotonic()
        release, seen = kernel_errors.in_child(
            _with_a_timer(lambda: kill(victim.pid, timeout=0.6))
        )
        assert time.monotonic() - begin >= 0.6
        assert release.outcome is Outcome.LOCKED
        assert seen >= 10


def test_a_handler_runs_while_the_grace_lasts(kill: Kill) -> None:
    """It need not wait for the end: here it is what ends the grace."""
    event = os.eventfd(0)
    with victims.asleep(4, sigterm="ignore") as victim:

        def run() -> mrelease.Release:
            signal.signal(
                signal.SIGALRM, lambda *_: os.eventfd_write(event, 1)
            )
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return kill(
                victim.pid, grace=LONG, escalate_on=event, timeout=10.0
            )

        release = kernel_errors.in_child(run)
        assert release.signalled is not None
        assert release.signalled < LONG / 2
    os.close(event)


# --------------------------------------------------------- the audit event


@pytest.mark.parametrize("grace", [0.0, LONG])
def test_the_audit_event_comes_before_the_signal(
    grace: float, kill: Kill
) -> None:
    with victims.asleep(4) as victim:

        def run() -> list[tuple[object, ...]]:
            seen: list[tuple[object, ...]] = []

            def hook(event: str, args: tuple[object, ...]) -> None:
                if event.startswith("mrelease."):
                    state = victim.states()
                    pending = victim.status()["ShdPnd"]
                    seen.append((event, args, state, pending))

            sys.addaudithook(hook)
            kill(victim.pid, grace=grace, timeout=10.0)
            return seen

        # Once a kill, not once a signal; and the victim was as before.
        assert kernel_errors.in_child(run) == [
            ("mrelease.kill", (victim.pid,), "S", "0" * 16)
        ]
        assert victim.ended(10.0)


@pytest.mark.parametrize("grace", [0.0, 0.2])
def test_an_audit_hook_that_raises_stops_the_kill(
    grace: float, kill: Kill
) -> None:
    with victims.asleep(4) as victim, Victim(victim.pid) as pinned:

        def run() -> int:
            def hook(event: str, args: tuple[object, ...]) -> None:
                if event == "mrelease.kill":
                    raise Interrupted(f"not {args[0]}")

            sys.addaudithook(hook)
            fds = len(os.listdir("/proc/self/fd"))
            with pytest.raises(Interrupted, match=f"not {victim.pid}"):
                kill(victim.pid, grace=grace)
            with pytest.raises(Interrupted, match=f"not {victim.pid}"):
                kill(pinned, grace=grace)
            return len(os.listdir("/proc/self/fd")) - fds

        assert kernel_errors.in_child(run) == 0
        _check_untouched(victim)


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_a_release_without_a_kill_is_no_audit_event() -> None:
    with (
        victims.held(4, killed=True) as process,
        Victim(process.pid) as victim,
    ):

        def release() -> list[str]:
            seen = []

            def hook(event: str, _: tuple[object, ...]) -> None:
                if event.startswith("mrelease."):
                    seen.append(event)

            sys.addaudithook(hook)
            assert victim.release().outcome is Outcome.RELEASED
            return seen

        assert kernel_errors.in_child(release) == []
