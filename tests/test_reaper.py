"""A Reaper and its Reapings: results, graces, the end of it, refusals.

What a kill itself comes to is tested with that of kill(): see the fixture
``kill``. Here is what only a Reaper has.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import errno
import gc
import math
import os
import pickle
import re
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import pytest

import cgroups
import kernel_errors
import mrelease
import victims
from kill_ways import native_threads
from mrelease import Outcome, Reaper, Reaping, Release, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Unprivileged

BACK = {Outcome.RELEASED, Outcome.EXITED}
LONG = 20.0
"""A grace that no test waits out."""
SLACK = 2.0
"""How late a bound may be kept on a machine that others use too."""


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def sigterm_is_pending(victim: victims.Process) -> bool:
    return int(victim.status()["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1 == 1


def check_untouched(victim: victims.Process) -> None:
    assert victim.states() == "S"
    assert victim.status()["ShdPnd"] == "0" * 16
    assert not victim.ended(0.02)


@pytest.fixture
def reaper() -> Iterator[Reaper]:
    with Reaper(threads=2, spares=1) as reaper:
        yield reaper


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert native_threads() == {}


# ------------------------------------------------------------- the Reaping


def test_sigkill_has_been_sent_when_kill_returns(reaper: Reaper) -> None:
    with victims.held(1) as victim:
        reaping = reaper.kill(victim.pid)
        victims.wait_held(victim, 5)
        assert reaping.result().signalled is not None


def test_sigterm_has_been_sent_when_kill_with_a_grace_returns(
    reaper: Reaper,
) -> None:
    with victims.stopped(1) as victim:
        reaping = reaper.kill(victim.pid, grace=LONG)
        assert sigterm_is_pending(victim)
        assert not reaping.done()
        assert not victim.ended(0.05)
        reaper.close(0)
        assert reaping.result(LONG).terminated is not None


@pytest.mark.needs("release")
def test_a_reaping_tells_when_it_is_done(reaper: Reaper) -> None:
    event = os.eventfd(0)
    with victims.stopped(4) as victim:
        reaping = reaper.kill(victim.pid, grace=LONG, escalate_on=event)
        assert reaping.pid == victim.pid
        assert not reaping.done()
        assert repr(reaping) == f"<Reaping pid={victim.pid} under way>"
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=f"pid {victim.pid} is not don"):
            reaping.result(0.2)
        assert 0.2 <= time.monotonic() - begun < 0.2 + SLACK
        with pytest.raises(TimeoutError, match="the kill goes on"):
            reaping.result(0)
        os.eventfd_write(event, 1)
        release = reaping.result()
        assert reaping.done()
        assert repr(reaping) == f"<Reaping pid={victim.pid} done>"
        assert release.outcome in BACK
        # Again, and with any timeout: the same.
        assert reaping.result() is release
        assert reaping.result(0) is release
        assert reaping.result(math.inf) is release
    os.close(event)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (-1, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
        (1j, TypeError),
    ],
)
def test_a_bad_timeout_of_a_result_is_refused(
    timeout: object, error: type[Exception], reaper: Reaper
) -> None:
    with victims.asleep(1) as victim:
        reaping = reaper.kill(victim.pid)
        with pytest.raises(error, match="timeout must"):
            reaping.result(cast("float", timeout))
        assert reaping.result().freed
        with pytest.raises(error, match="timeout must"):
            reaping.result(cast("float", timeout))
        with pytest.raises(error, match="timeout must"):
            reaper.close(cast("float", timeout))


def _by_select(fd: Reaping, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def _by_poll(fd: Reaping, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _by_epoll(fd: Reaping, seconds: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return bool(epoll.poll(seconds))


def _by_selectors(fd: Reaping, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(seconds))


@pytest.mark.parametrize(
    "poll",
    [_by_select, _by_poll, _by_epoll, _by_selectors],
    ids=lambda f: f.__name__.removeprefix("_by_"),
)
def test_a_reaping_can_be_polled(
    poll: Callable[[Reaping, float], bool], reaper: Reaper
) -> None:
    event = os.eventfd(0)
    with victims.stopped(1) as victim:
        reaping = reaper.kill(victim.pid, grace=LONG, escalate_on=event)
        assert not poll(reaping, 0.05)
        assert not reaping.done()
        os.eventfd_write(event, 1)
        assert poll(reaping, LONG)
        assert reaping.done()
        assert reaping.result(0).freed
        # It stays readable for whoever comes later.
        assert poll(reaping, 0)
        assert reaping.fileno() == reaping.fileno()
    os.close(event)


def test_many_threads_wait_for_one_reaping(reaper: Reaper) -> None:
    event = os.eventfd(0)
    results: list[Release] = []
    with victims.stopped(1) as victim:
        reaping = reaper.kill(victim.pid, grace=LONG, escalate_on=event)
        threads = [
            threading.Thread(target=lambda: results.append(reaping.result()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        os.eventfd_write(event, 1)
        for thread in threads:
            thread.join(LONG)
        assert len(results) == 8
        assert all(result == results[0] for result in results)
    os.close(event)


def test_a_dropped_reaping_kills_all_the_same(reaper: Reaper) -> None:
    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(1)) for _ in range(10)]
        for number, victim in enumerate(made):
            gone = weakref.ref(
                reaper.kill(victim.pid, grace=0.05 if number % 2 else 0.0)
            )
            gc.collect()
            assert gone() is None
        for victim in made:
            assert victim.ended(10)


def test_ctrl_c_in_result_is_raised_and_the_kill_goes_on() -> None:
    with victims.asleep(1, sigterm="ignore") as victim:

        def run() -> tuple[float, Release]:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            with Reaper() as reaper:
                reaping = reaper.kill(victim.pid, grace=1.0)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                begun = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    reaping.result()
                return time.monotonic() - begun, reaping.result()

        took, release = kernel_errors.in_child(run)
        assert took < 1.0
        assert release.terminated is not None
        assert release.signalled is not None
        # The grace was not cut short: it is not the caller's wait.
        assert release.signalled - release.terminated >= 1.0


def test_a_handler_that_returns_does_not_end_the_wait_of_result() -> None:
    with victims.asleep(1, sigterm="ignore") as victim:

        def run() -> tuple[int, Release]:
            heard = 0

            def hear(*_: object) -> None:
                nonlocal heard
                heard += 1

            with Reaper() as reaper:
                reaping = reaper.kill(victim.pid, grace=0.5)
                signal.signal(signal.SIGALRM, hear)
                signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
                with pytest.raises(TimeoutError):
                    reaping.result(0.2)
                release = reaping.result()
                signal.setitimer(signal.ITIMER_REAL, 0)
            return heard, release

        heard, release = kernel_errors.in_child(run)
        assert heard >= 5
        assert release.signalled is not None
        assert release.signalled >= 0.5


def test_a_result_outlives_its_reaper() -> None:
    with victims.asleep(1) as victim:
        with Reaper() as reaper:
            reaping = reaper.kill(victim.pid)
        del reaper
        gc.collect()
        assert reaping.done()
        assert _by_select(reaping, 0)
        assert reaping.result().freed


def test_a_victim_remembers_what_a_reaper_did(reaper: Reaper) -> None:
    with victims.asleep(4) as process:
        with Victim(process.pid) as victim:
            release = reaper.kill(victim).result()
            assert release.freed
        process.wait()


@pytest.mark.needs("release")
def test_a_victim_may_be_closed_as_soon_as_kill_has_returned(
    reaper: Reaper,
) -> None:
    with victims.stopped(4) as process:
        victim = Victim(process.pid)
        reaping = reaper.kill(victim, grace=0.1)
        victim.close()
        # Were its pidfd used still, that would now be another file.
        with open(os.devnull):
            assert reaping.result().outcome in BACK
        with pytest.raises(ValueError, match="closed"):
            reaper.kill(victim)
        assert process.wait() == -signal.SIGKILL


# ---------------------------------------------------------------- the graces


def test_one_event_cuts_all_graces_that_wait_for_it(reaper: Reaper) -> None:
    event = os.eventfd(0)
    with ExitStack() as stack:
        made = [stack.enter_context(victims.stopped(0)) for _ in range(20)]
        reapings = [
            reaper.kill(victim.pid, grace=LONG, escalate_on=event)
            for victim in made
        ]
        assert not any(reaping.done() for reaping in reapings)
        os.eventfd_write(event, 1)
        begun = time.monotonic()
        for reaping in reapings:
            release = reaping.result()
            assert release.signalled is not None
            assert release.signalled < LONG / 2
        assert time.monotonic() - begun < LONG / 2
        assert os.eventfd_read(event) == 1  # nobody has read it
    os.close(event)


class _Pressure(cgroups.Group):
    """A control group with a CPU pressure trigger."""

    def __init__(self) -> None:
        super().__init__(version=2)
        self.trigger = -1
        try:
            self.trigger = os.open(
                self.path / "cpu.pressure", os.O_RDWR | os.O_NONBLOCK
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


def test_one_pressure_trigger_cuts_all_graces_that_wait_for_it(
    reaper: Reaper,
) -> None:
    """It tells of its news once, to one who polls: the others must know."""
    with ExitStack() as stack:
        group = stack.enter_context(_Pressure())
        made = [stack.enter_context(victims.stopped(0)) for _ in range(5)]
        reapings = [
            reaper.kill(victim.pid, grace=LONG, escalate_on=group.trigger)
            for victim in made
        ]
        time.sleep(0.1)
        assert not any(reaping.done() for reaping in reapings)
        with ExitStack() as busy:
            for _ in range(2 + len(os.sched_getaffinity(0))):
                busy.enter_context(victims.spinning(0, groups=[group]))
            for reaping in reapings:
                release = reaping.result(LONG)
                assert release.signalled is not None
                assert release.signalled < LONG - 1


def test_escalate_on_may_be_closed_once_kill_has_returned(
    reaper: Reaper,
) -> None:
    read, write = os.pipe()
    with victims.stopped(0) as victim:
        reaping = reaper.kill(victim.pid, grace=LONG, escalate_on=read)
        os.close(read)
        assert not _by_select(reaping, 0.1)
        os.write(write, b"!")
        release = reaping.result()
        assert release.signalled is not None
        assert release.signalled < LONG / 2
    os.close(write)


def test_a_number_that_is_used_again_is_another_event(reaper: Reaper) -> None:
    with victims.stopped(0) as one, victims.stopped(0) as two:
        event = os.eventfd(0)
        first = reaper.kill(one.pid, grace=LONG, escalate_on=event)
        os.close(event)
        other = os.eventfd(0)
        assert other == event  # the number
        second = reaper.kill(two.pid, grace=LONG, escalate_on=other)
        os.eventfd_write(other, 1)
        assert second.result(LONG / 2).freed
        assert not _by_select(first, 0.1)
        assert not one.ended()
        reaper.close(0)
        assert first.result().freed
        os.close(other)


def test_each_event_cuts_its_own_grace(reaper: Reaper) -> None:
    events = [os.eventfd(0) for _ in range(4)]
    with ExitStack() as stack:
        reapings = []
        for event in events:
            victim = stack.enter_context(victims.stopped(0))
            reapings.append(
                reaper.kill(victim.pid, grace=LONG, escalate_on=event)
            )
        waiting = {0, 1, 2, 3}
        for number in (2, 0, 3, 1):
            os.eventfd_write(events[number], 1)
            assert reapings[number].result(LONG / 2).freed
            waiting.remove(number)
            assert not any(reapings[other].done() for other in waiting)
    for event in events:
        os.close(event)


def test_many_graces_end_each_at_its_time(reaper: Reaper) -> None:
    with ExitStack() as stack:
        graces = [0.4, 0.1, 0.3, 0.2, 0.0, 0.25]
        reapings = []
        for grace in graces:
            victim = stack.enter_context(victims.stopped(0))
            reapings.append(reaper.kill(victim.pid, grace=grace))
        for grace, reaping in zip(graces, reapings, strict=True):
            release = reaping.result()
            assert release.signalled is not None
            if grace == 0:
                assert release.terminated is None
            else:
                assert release.terminated is not None
                given = release.signalled - release.terminated
                assert grace <= given < grace + SLACK


def test_a_victim_that_ends_in_its_grace_is_told_at_once(
    reaper: Reaper,
) -> None:
    with victims.asleep(0, sigterm="exit") as victim:
        release = reaper.kill(victim.pid, grace=LONG).result(LONG / 2)
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None
        assert victim.wait() == 0


# --------------------------------------------------------- the end of a Reaper


def test_close_waits_for_what_is_under_way() -> None:
    with ExitStack() as stack:
        made = [stack.enter_context(victims.stopped(0)) for _ in range(10)]
        reaper = Reaper()
        reapings = [reaper.kill(victim.pid, grace=0.3) for victim in made]
        begun = time.monotonic()
        assert reaper.close()
        assert time.monotonic() - begun >= 0.2
        assert all(reaping.done() for reaping in reapings)
        for reaping in reapings:
            release = reaping.result(0)
            assert release.signalled is not None
            assert release.signalled >= 0.3
        assert reaper.closed
        assert native_threads() == {}


@pytest.mark.needs("release")
def test_close_with_a_timeout_cuts_graces_short() -> None:
    with victims.stopped(0) as one, victims.stopped(0) as two:
        reaper = Reaper()
        event = os.eventfd(0)
        reapings = [
            reaper.kill(one.pid, grace=LONG),
            reaper.kill(two.pid, grace=math.inf, escalate_on=event),
        ]
        begun = time.monotonic()
        in_time = reaper.close(0.2)
        assert 0.2 <= time.monotonic() - begun < 0.2 + SLACK
        assert not in_time
        for reaping in reapings:
            release = reaping.result(LONG / 2)
            assert release.signalled is not None
            assert release.outcome in BACK
        assert reaper.close()
    os.close(event)


def test_close_twice_and_kill_after_close() -> None:
    reaper = Reaper()
    states = [reaper.closed, reaper.close(), reaper.closed]
    assert states == [False, True, True]
    assert reaper.close()
    assert reaper.close(0)
    assert repr(reaper).startswith("<Reaper closed, ")
    with victims.asleep(1) as victim:
        for call in (
            lambda: reaper.kill(victim.pid),
            lambda: reaper.kill(victim.pid, grace=1.0),
            lambda: reaper.kill_many([victim.pid]),
            lambda: reaper.kill_many([]),
            lambda: mrelease.kill_many([victim.pid], reaper=reaper),
        ):
            with pytest.raises(ValueError, match="this Reaper is closed"):
                call()
        check_untouched(victim)


def test_a_with_statement_closes_it_also_after_an_exception() -> None:
    reaping: Reaping | None = None
    with victims.stopped(0) as victim:
        with contextlib.suppress(ZeroDivisionError), Reaper() as reaper:
            reaping = reaper.kill(victim.pid, grace=0.1)
            1 / 0  # noqa: B018
        assert reaper.closed
        assert reaping is not None
        assert reaping.done()


def test_a_reaper_that_is_dropped_warns_and_does_what_was_asked() -> None:
    with victims.stopped(0) as victim:
        reaper = Reaper()
        reaping = reaper.kill(victim.pid, grace=LONG)
        with pytest.warns(ResourceWarning, match="unclosed <Reaper open, SCH"):
            del reaper
        # Its grace is cut short: nobody is left who could end it.
        assert reaping.result(LONG / 2).signalled is not None
        del reaping
        victims.wait_until(lambda: not native_threads(), "the threads end")


def test_the_threads_of_a_dropped_reaper_end_when_all_is_done() -> None:
    with victims.asleep(0) as victim:
        reaper = Reaper()
        reaping = reaper.kill(victim.pid)
        with pytest.warns(ResourceWarning):
            del reaper
        assert reaping.result().freed
        try:
            victims.wait_until(lambda: not native_threads(), "an end", 2)
        finally:
            del reaping


def test_close_gives_all_fds_back() -> None:
    """But for one of each Reaping that is kept, to be polled."""
    gc.collect()
    before = fds()
    with victims.asleep(0) as victim:
        of_victim = fds() - before
        with Reaper(threads=2, spares=2) as reaper:
            reaping = reaper.kill(victim.pid)
        assert fds() == before + of_victim + 1
    assert reaping.done()


def test_a_reaper_that_was_closed_or_never_made_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Reaper() as reaper:
            pass
        del reaper
        with pytest.raises(ValueError, match="threads"):
            Reaper(threads=0)
        Reaper.__new__(Reaper)
        gc.collect()


@pytest.mark.needs("release")
def test_close_from_another_thread_while_kills_are_submitted(
    rounds: Callable[[int], int],
) -> None:
    """Each kill is done, or refused as the Reaper is closed; none is lost."""
    seen = {"killed": 0, "refused": 0}
    for turn in range(rounds(40)):
        with ExitStack() as stack:
            made = [stack.enter_context(victims.asleep(0)) for _ in range(12)]
            reaper = Reaper(threads=2, spares=0)
            thread = threading.Timer(0.0004 * (turn % 10), reaper.close)
            thread.start()
            reapings: dict[int, Reaping] = {}
            for victim in made:
                try:
                    reapings[victim.pid] = reaper.kill(
                        victim.pid, grace=0.001 if turn % 2 else 0.0
                    )
                except ValueError:
                    assert reaper.closed
            thread.join()
            assert reaper.close()
            for victim in made:
                if victim.pid in reapings:
                    assert reapings[victim.pid].result(0).outcome in BACK
                    assert victim.ended(5)
                else:
                    check_untouched(victim)
            seen["killed"] += len(reapings)
            seen["refused"] += len(made) - len(reapings)
    print(f"\nclosed meanwhile: {seen}")


def test_two_threads_close_at_once() -> None:
    for _ in range(20):
        with victims.asleep(0) as victim:
            reaper = Reaper()
            reaping = reaper.kill(victim.pid, grace=0.01)
            results: list[bool] = []
            threads = [
                threading.Thread(target=lambda: results.append(reaper.close()))  # noqa: B023
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LONG)
            assert results == [True] * 4
            assert reaping.done()


def test_a_signal_whose_handler_raises_ends_the_wait_of_close() -> None:
    with victims.stopped(0) as victim:

        def run() -> tuple[float, bool, bool]:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            reaper = Reaper()
            reaping = reaper.kill(victim.pid, grace=1.0)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            begun = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                reaper.close()
            took = time.monotonic() - begun
            closed = reaper.closed
            # It can be waited for again.
            return took, closed, reaper.close() and reaping.done()

        took, closed, later = kernel_errors.in_child(run)
        assert took < 1.0
        assert closed
        assert later


def test_signals_that_come_all_the_time_do_not_keep_close_from_its_end() -> (
    None
):
    with victims.stopped(0) as victim:

        def run() -> tuple[bool, float, int]:
            heard = 0

            def hear(*_: object) -> None:
                nonlocal heard
                heard += 1

            reaper = Reaper()
            reaper.kill(victim.pid, grace=0.5)
            signal.signal(signal.SIGALRM, hear)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            begun = time.monotonic()
            in_time = reaper.close()
            took = time.monotonic() - begun
            signal.setitimer(signal.ITIMER_REAL, 0)
            return in_time, took, heard

        in_time, took, heard = kernel_errors.in_child(run)
        assert in_time
        assert 0.4 <= took < 0.5 + SLACK
        assert heard >= 3


# -------------------------------------------- the end of the interpreter

_EXIT = """
import mrelease, sys
reaper = mrelease.Reaper()
reaping = reaper.kill({pid}, grace=600)
kept = [reaper, reaping] if {kept} else None
if {how!r} == "exit":
    sys.exit(3)
if {how!r} == "raise":
    raise SystemExit(3)
if {how!r} == "thread":
    import threading
    threading.Thread(target=reaping.result, daemon=True).start()
sys.exit(3)
"""


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("how", ["exit", "raise", "thread"])
def test_at_the_end_of_the_interpreter_graces_are_cut_short(
    how: str, kept: bool
) -> None:
    with victims.asleep(1, sigterm="ignore") as victim:
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c",
             _EXIT.format(pid=victim.pid, how=how, kept=kept)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 3)
        assert time.monotonic() - begun < 60
        assert victim.ended(10)
        assert victim.wait() == -signal.SIGKILL


def test_the_end_of_the_interpreter_while_a_kill_is_under_way() -> None:
    with victims.held(1, shared_anon=4) as victim:
        code = f"""
import mrelease
reaper = mrelease.Reaper()
reaper.kill({victim.pid}, timeout=600)
"""
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", code],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
        victims.wait_held(victim, 10)


# --------------------------------------------------------------- refusals


@pytest.mark.needs("root")
@pytest.mark.parametrize("grace", [0.0, 0.2])
def test_another_user_s_process_is_permission_error_from_kill_itself(
    grace: float, unprivileged: Unprivileged
) -> None:
    with victims.asleep(4) as victim:

        def run() -> tuple[str, int]:
            with Reaper(threads=1, spares=0) as reaper:
                before = fds()
                for _ in range(20):
                    with pytest.raises(PermissionError) as caught:
                        reaper.kill(victim.pid, grace=grace)
                text = str(caught.value)
            return text, before

        text, _ = unprivileged(run)
        assert "nothing was signalled" in text
        check_untouched(victim)


def test_a_process_that_is_gone_is_process_lookup_error(
    reaper: Reaper,
) -> None:
    with pytest.raises(ProcessLookupError):
        reaper.kill(victims.reaped_pid())
    with victims.asleep(1) as process, Victim(process.pid) as victim:
        process.popen.kill()
        process.wait()
        with pytest.raises(ProcessLookupError, match="it has ended"):
            reaper.kill(victim)
        with pytest.raises(ProcessLookupError, match="it has ended"):
            reaper.kill(victim, grace=0.1)


def test_without_a_free_fd_nothing_is_signalled_and_the_error_says_why() -> (
    None
):
    """A job has two of its own, three with an escalate_on."""
    import resource

    with victims.asleep(4) as process:

        def run(left: int) -> tuple[int | None, str]:
            event = os.eventfd(0)
            with Victim(process.pid) as victim, Reaper() as reaper:
                lowest = os.dup(0)
                os.close(lowest)
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(
                    resource.RLIMIT_NOFILE, (lowest + left, hard)
                )
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    reaper.kill(victim, grace=0.1, escalate_on=event)
                return caught.value.errno, str(caught.value)

        for left in range(3):
            code, text = kernel_errors.in_child(run, left)
            assert code == errno.EMFILE
            assert f"cannot kill pid {process.pid}" in text
            assert "nothing was signalled" in text
            check_untouched(process)


@pytest.mark.needs("release")
def test_a_reaping_of_a_busy_reaper_has_the_right_result(
    reaper: Reaper, rounds: Callable[[int], int]
) -> None:
    """Results do not get mixed up."""
    for _ in range(rounds(5)):
        with ExitStack() as stack:
            sizes = [2, 4, 8, 3, 6, 12, 1, 9] * 3
            made = [stack.enter_context(victims.asleep(s)) for s in sizes]
            reapings = [reaper.kill(victim.popen) for victim in made]
            for size, victim, reaping in zip(
                sizes, made, reapings, strict=True
            ):
                release = reaping.result()
                assert release.pid == victim.pid == reaping.pid
                assert release.footprint is not None
                anon = release.footprint.anon
                assert size * victims.MIB <= anon
                assert anon < (size + 1) * victims.MIB


def test_no_exception_of_a_submit_leaves_anything_behind(
    reaper: Reaper,
) -> None:
    with victims.asleep(1) as victim:
        before = fds()
        for _ in range(50):
            for bad in (
                {"grace": -1},
                {"timeout": math.nan},
                {"locks": "no"},
                {"escalate_on": "x"},
            ):
                with (
                    contextlib.suppress(ValueError, TypeError),
                ):
                    cast("Callable[..., Reaping]", reaper.kill)(
                        victim.pid, **bad
                    )
                    raise AssertionError(bad)
        assert fds() == before
        check_untouched(victim)


# --------------------------------------- interrupts, copies, odd descriptors


def test_an_interrupt_from_a_thread_ends_the_wait_for_a_result(
    reaper: Reaper,
) -> None:
    """It is no signal that cuts a system call short."""
    with victims.asleep(0, sigterm="ignore") as victim:
        reaping = reaper.kill(victim.pid, grace=LONG)
        timer = threading.Timer(0.2, _thread.interrupt_main)
        begun = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            reaping.result()
        assert time.monotonic() - begun < LONG / 2
        timer.join()
        assert not reaping.done()


def test_an_interrupt_leaves_the_with_statement_when_sigkill_is_out() -> None:
    victims.need("held")

    def interrupted(pid: int) -> None:
        with Reaper() as reaper:
            reaper.kill(pid, grace=60)
            raise KeyboardInterrupt

    for _ in range(30):
        with (
            victims.held(1, sigterm="ignore") as victim,
            open(f"/proc/{victim.pid}/status", "rb", buffering=0) as status,
        ):
            with pytest.raises(KeyboardInterrupt):
                interrupted(victim.pid)
            fields = os.pread(status.fileno(), 8192, 0)  # at once
            pending = re.findall(rb"(?:Sig|Shd)Pnd:\t(\w+)", fields)
            assert any(int(p, 16) >> (signal.SIGKILL - 1) & 1 for p in pending)


def test_an_interrupt_leaves_the_with_statement_at_once() -> None:
    with victims.asleep(0, sigterm="ignore") as victim:
        begun = time.monotonic()

        def leave() -> None:
            with Reaper() as reaper:
                reaper.kill(victim.pid, grace=LONG)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            leave()
        assert time.monotonic() - begun < LONG / 2
        assert victim.wait() == -signal.SIGKILL


def test_the_fd_of_one_that_was_refused_is_the_same_in_all_threads(
    reaper: Reaper,
) -> None:
    def tell(reaping: Reaping, found: list[int]) -> None:
        found.append(reaping.fileno())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        gone = victims.reaped_pid()
        for _ in range(200):
            (reaping,) = reaper.kill_many([gone])
            found: list[int] = []
            threads = [
                threading.Thread(target=tell, args=(reaping, found))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert set(found) == {reaping.fileno()}
    finally:
        sys.setswitchinterval(before)


def test_what_is_closed_cannot_be_copied(reaper: Reaper) -> None:
    with victims.asleep(0) as process, Victim(process.pid) as victim:
        for made in (reaper, victim):
            for twice in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="copied nor pickled"):
                    twice(made)
        gc.collect()
        assert not reaper.closed
        assert victim.fileno() >= 0


@pytest.mark.parametrize("kind", ["/dev/null", "/", "O_PATH", "closed end"])
def test_escalate_on_means_the_same_to_a_reaper_and_to_kill(
    kind: str, reaper: Reaper
) -> None:
    """What can always be read has news; what cannot be polled has none."""
    if kind == "O_PATH":
        fd = os.open("/", os.O_PATH)
    elif kind == "closed end":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open(kind, os.O_RDONLY)
    try:
        for how in (mrelease.kill, reaper.kill):
            with victims.asleep(0, sigterm="ignore") as victim:
                made = how(victim.pid, grace=0.4, escalate_on=fd)
                release = made.result() if isinstance(made, Reaping) else made
                assert release.signalled is not None
                at_once = release.signalled < 0.39
                assert at_once is (kind != "O_PATH")
    finally:
        os.close(fd)


def test_a_trigger_that_has_news_already_cuts_the_grace(
    reaper: Reaper,
) -> None:
    """To be watched takes its news from it."""
    with _Pressure() as group, victims.stopped(0) as victim:
        with ExitStack() as busy:
            for _ in range(2 + len(os.sched_getaffinity(0))):
                busy.enter_context(victims.spinning(0, groups=[group]))
            time.sleep(3)  # it has had time to stall, and nobody asked
        release = reaper.kill(
            victim.pid, grace=LONG, escalate_on=group.trigger
        ).result(LONG)
        assert release.signalled is not None
        assert release.signalled < LONG - 1
