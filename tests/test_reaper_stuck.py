"""A Reaper whose threads are stuck in the kernel with a victim.

As with a victim that never lets go of its mmap_lock: seccomp notification
keeps process_mrelease(2), or the look at the robust locks, from coming back.
The Reaper is made in the child that has the filter; its threads inherit it.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kernel_errors
import victims
from kernel_errors import ALLOW, BLOCK, Call
from kill_ways import native_threads
from mrelease import Outcome, Reaper, Release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

pytestmark = pytest.mark.needs("seccomp", "held")

BACK = {Outcome.RELEASED, Outcome.EXITED}
SLACK = 2.0
"""How late a bound may be kept on a machine that others use too."""
AT_ONCE = 0.1
"""The median of what is some 10 ms at the most on an idle machine."""


class Stuck:
    """Rules that keep a thread in a call for one of these victims."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = set(pids)

    def release(self, call: Call) -> kernel_errors.Plain:
        """Of process_mrelease(): whose pidfd is it?"""
        info = Path(f"/proc/{call.tid}/fdinfo/{call.args[0]}").read_text()
        fields = dict(line.split(":\t") for line in info.splitlines())
        return BLOCK if int(fields["Pid"]) in self.pids else ALLOW

    def look(self, call: Call) -> kernel_errors.Plain:
        """Of process_vm_readv(): its first argument is the victim."""
        return BLOCK if call.args[0] in self.pids else ALLOW

    def rules(self, where: str) -> dict[str, kernel_errors.Rule]:
        if where == "look":
            return {"process_vm_readv": [self.look]}
        return {"process_mrelease": [self.release]}


WHERE = pytest.mark.parametrize("where", ["release", "look"])


def is_sent(pid: int) -> bool:
    """SIGKILL has reached the victim: it is held at its end, or gone."""
    try:
        return victims.status_of(pid)["State"][0] in "tZX"
    except ProcessLookupError:
        return True


def wait_sent(pids: Iterable[int]) -> None:
    for pid in pids:
        victims.wait_until(lambda pid=pid: is_sent(pid), f"{pid} is killed")  # type: ignore[misc]


class Seen(NamedTuple):
    """What the child saw."""

    first: Release  # of the victim that is stuck
    sending: float  # seconds that kill() took
    took: float  # until the result
    others: list[Release]
    others_took: float
    closed: bool
    closing: float
    left: int  # threads


@WHERE
@pytest.mark.needs("release")
def test_one_victim_that_is_stuck_holds_up_neither_others_nor_the_caller(
    where: str, answered: Answered
) -> None:
    with ExitStack() as stack:
        stuck = stack.enter_context(victims.held(4))
        others = [stack.enter_context(victims.asleep(1)) for _ in range(100)]

        def run() -> Seen:
            reaper = Reaper(threads=2)
            begun = time.monotonic()
            reaping = reaper.kill(stuck.pid, timeout=0.2)
            sending = time.monotonic() - begun
            wait_sent([stuck.pid])
            first = reaping.result(10)
            took = time.monotonic() - begun
            begun = time.monotonic()
            releases = [
                reaping.result()
                for reaping in reaper.kill_many(
                    [other.pid for other in others], timeout=30
                )
            ]
            others_took = time.monotonic() - begun
            begun = time.monotonic()
            closed = reaper.close()
            closing = time.monotonic() - begun
            return Seen(
                first, sending, took, releases, others_took, closed, closing,
                len(native_threads()),
            )  # fmt: skip

        seen = answered(Stuck([stuck.pid]).rules(where)).run(run)
        print(
            f"\nstuck in the {where}: SIGKILL after {seen.sending * 1e3:.1f} "
            f"ms, result after {seen.took * 1e3:.1f} ms of 200; 100 others "
            f"in {seen.others_took * 1e3:.0f} ms"
        )
        assert seen.first.outcome is Outcome.PARTIAL
        assert not seen.first.freed
        assert seen.first.signalled is not None
        assert seen.first.released is None
        assert 0.2 <= seen.took < 0.2 + SLACK
        # The caller waits for the look, but not for long; then it kills.
        assert seen.sending < SLACK
        assert [release.pid for release in seen.others] == [
            other.pid for other in others
        ]
        for release in seen.others:
            assert release.outcome in BACK, release
            assert release.freed, release
        # It is closed, and has left behind the one that is stuck.
        assert seen.closed
        assert seen.closing < SLACK
        assert seen.left == 1
        assert stuck.rss_anon() >= 4 * victims.MIB


@WHERE
@pytest.mark.needs("release")
def test_when_all_threads_are_stuck_kills_and_results_are_still_on_time(
    where: str, answered: Answered
) -> None:
    """And what waits for a thread has one as soon as one comes back."""
    read_end, out = os.pipe()
    with ExitStack() as stack:
        stuck = [stack.enter_context(victims.held(4)) for _ in range(5)]
        others = [stack.enter_context(victims.held(4)) for _ in range(8)]

        def run() -> tuple[list[Release], list[bool], list[Release], float]:
            times = []
            with Reaper(threads=2, spares=1) as reaper:
                firsts = []
                for victim in stuck:
                    begun = time.monotonic()
                    firsts.append(reaper.kill(victim.pid, timeout=0.3))
                    times.append(time.monotonic() - begun)
                ends = [first.result(10) for first in firsts]
                waiting = []
                for victim in others:
                    begun = time.monotonic()
                    waiting.append(reaper.kill(victim.pid, timeout=60))
                    times.append(time.monotonic() - begun)
                # No thread is free, yet all are dying.
                wait_sent(victim.pid for victim in stuck + others)
                time.sleep(0.1)
                done = [reaping.done() for reaping in waiting]
                os.write(out, b"!")
                rest = [reaping.result() for reaping in waiting]
            assert native_threads() == {}
            return ends, done, rest, statistics.median(times)

        rule = Stuck([victim.pid for victim in stuck])
        kernel = answered(rule.rules(where))
        job = kernel.start(run)
        assert select.select([read_end], [], [], victims.TIMEOUT)[0]
        assert len(kernel.blocked(count=3)) == 3
        assert all(other.rss_anon() >= 4 * victims.MIB for other in others)
        rule.pids.clear()
        kernel.release()
        ends, done, rest, median = job.result()
        print(f"\nwith no thread: SIGKILL after {median * 1e3:.1f} ms, median")
        assert median < AT_ONCE
        for end in ends:
            assert end.outcome is Outcome.PARTIAL, end
            assert not end.freed
            assert end.signalled is not None
        assert not any(done)
        for release in rest:
            assert release.outcome is Outcome.RELEASED, release
            assert release.freed
        assert all(other.rss_anon() == 0 for other in others)
    os.close(read_end)
    os.close(out)


def test_kills_go_out_at_once_without_a_free_thread(
    answered: Answered,
) -> None:
    with ExitStack() as stack:
        stuck = stack.enter_context(victims.held(1))
        others = [stack.enter_context(victims.asleep(1)) for _ in range(20)]

        def run() -> tuple[list[float], list[Release], bool]:
            reaper = Reaper(threads=1, spares=0)
            reaper.kill(stuck.pid, timeout=0.1).result()
            times, reapings = [], []
            for other in others:
                begun = time.monotonic()
                reapings.append(reaper.kill(other.pid, timeout=0.5))
                times.append(time.monotonic() - begun)
            threads = len(native_threads())
            results = [reaping.result() for reaping in reapings]
            return times, results, threads == 2

        times, results, as_before = answered(
            Stuck([stuck.pid]).rules("release")
        ).run(run)
        print(
            f"\nkill() without a free thread: median "
            f"{statistics.median(times) * 1e3:.2f} ms, worst "
            f"{max(times) * 1e3:.2f} ms"
        )
        assert statistics.median(times) < AT_ONCE / 2
        assert as_before
        for result in results:
            # Nobody has released them; they have ended.
            assert result.outcome is Outcome.EXITED, result
            assert result.freed
            assert result.attempts == 0


def test_without_a_free_thread_an_end_is_told_when_it_comes(
    answered: Answered,
) -> None:
    """What is in a queue for a release needs none any more."""
    with victims.held(1) as stuck, victims.asleep(1) as other:

        def run() -> tuple[float, Release]:
            reaper = Reaper(threads=1, spares=0)
            reaper.kill(stuck.pid, timeout=0.1).result()
            begun = time.monotonic()
            release = reaper.kill(other.pid, timeout=5).result()
            return time.monotonic() - begun, release

        took, release = answered(Stuck([stuck.pid]).rules("release")).run(run)
        assert release.outcome is Outcome.EXITED
        assert release.freed
        assert took < 4


def test_close_returns_though_nobody_is_left_for_the_queue(
    answered: Answered,
) -> None:
    with victims.held(1) as stuck, victims.held(1) as other:

        def run() -> tuple[Outcome, bool, float]:
            reaper = Reaper(threads=1, spares=0)
            reaper.kill(stuck.pid, timeout=0.1).result()
            release = reaper.kill(other.pid, timeout=0.1).result()
            begun = time.monotonic()
            return release.outcome, reaper.close(5), time.monotonic() - begun

        outcome, closed, took = answered(
            Stuck([stuck.pid]).rules("release")
        ).run(run)
        assert outcome is Outcome.PARTIAL
        assert closed
        assert took < 4


@pytest.mark.needs("release")
def test_kill_many_sends_all_though_the_biggest_is_stuck(
    answered: Answered,
) -> None:
    with ExitStack() as stack:
        stuck = stack.enter_context(victims.held(64))
        others = [stack.enter_context(victims.asleep(1)) for _ in range(20)]

        def run() -> tuple[float, list[Release]]:
            with Reaper(threads=1, spares=2) as reaper:
                begun = time.monotonic()
                reapings = reaper.kill_many([*others, stuck], timeout=0.5)
                took = time.monotonic() - begun
                return took, [reaping.result() for reaping in reapings]

        took, results = answered(Stuck([stuck.pid]).rules("look")).run(run)
        assert took < SLACK
        *rest, last = results
        assert last.outcome is Outcome.PARTIAL
        for result in rest:
            assert result.outcome in BACK, result
            assert result.freed


def test_close_with_a_timeout_does_not_wait_for_who_is_stuck(
    answered: Answered,
) -> None:
    with victims.held(1) as stuck:

        def run() -> tuple[bool, float, Release, bool]:
            reaper = Reaper()
            reaping = reaper.kill(stuck.pid, timeout=1.0)
            begun = time.monotonic()
            in_time = reaper.close(0.1)
            took = time.monotonic() - begun
            # What is under way goes on.
            return in_time, took, reaping.result(), reaper.close()

        in_time, took, release, later = answered(
            Stuck([stuck.pid]).rules("release")
        ).run(run)
        assert not in_time
        assert 0.1 <= took < 0.1 + SLACK
        assert release.outcome is Outcome.PARTIAL
        assert later


@pytest.mark.parametrize("end", ["close", "drop", "leave"])
def test_the_end_of_the_interpreter_does_not_wait_for_who_is_stuck(
    end: str, answered: Answered
) -> None:
    with victims.held(1) as stuck:
        code = f"""
import mrelease, sys
reaper = mrelease.Reaper()
print(reaper.kill({stuck.pid}, timeout=0.1).result().outcome.value)
if {end!r} == "close":
    reaper.close()
if {end!r} == "drop":
    import warnings
    warnings.simplefilter("ignore")
    del reaper
"""
        kernel = answered(Stuck([stuck.pid]).rules("release"))
        begun = time.monotonic()
        done = kernel.command([sys.executable, "-X", "dev", "-c", code])
        assert (done.stdout, done.stderr, done.returncode) == (
            "partial\n", "", 0
        )  # fmt: skip
        assert time.monotonic() - begun < 30


def test_at_the_end_of_the_interpreter_graces_are_cut_though_all_are_stuck(
    answered: Answered,
) -> None:
    with (
        victims.held(1) as stuck,
        victims.asleep(1, sigterm="ignore") as other,
    ):
        code = f"""
import mrelease
reaper = mrelease.Reaper(threads=1, spares=0)
reaper.kill({stuck.pid}, timeout=0.1).result()
reaper.kill({other.pid}, grace=600)
"""
        kernel = answered(Stuck([stuck.pid]).rules("release"))
        done = kernel.command([sys.executable, "-X", "dev", "-c", code])
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
        assert other.ended(10)
        assert other.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_a_kill_whose_thread_comes_back_late_is_told_as_it_was(
    answered: Answered,
) -> None:
    """The result stands; that the memory went later changes nothing."""
    read_end, out = os.pipe()
    with victims.held(4) as stuck:

        def run() -> tuple[Release, Release, bool]:
            with Reaper() as reaper:
                reaping = reaper.kill(stuck.pid, timeout=0.1)
                first = reaping.result()
                os.write(out, b"!")
                victims.wait_until(lambda: stuck.rss_anon() == 0, "released")
                return first, reaping.result(), reaping.done()

        kernel = answered(Stuck([stuck.pid]).rules("release"))
        job = kernel.start(run)
        assert os.read(read_end, 1) == b"!"
        kernel.release()
        first, second, done = job.result()
        assert first.outcome is Outcome.PARTIAL
        assert first == second
        assert done
    os.close(read_end)
    os.close(out)


# ------------------------------------------------ who waits meanwhile


def test_a_dropped_reaping_of_a_stuck_victim_harms_nobody(
    answered: Answered,
) -> None:
    read_end, out = os.pipe()
    with victims.held(4) as stuck, victims.asleep(4) as other:

        def run() -> tuple[Release, int]:
            reaper = Reaper(threads=1, spares=1)
            reaper.kill(stuck.pid, timeout=0.05)  # nobody keeps it
            time.sleep(0.2)
            release = reaper.kill(other.pid).result()
            reaper.close()
            os.write(out, b"!")
            # The thread comes back to a Reaper that is no more.
            del reaper
            victims.wait_until(lambda: not native_threads(), "it ends")
            return release, len(native_threads())

        kernel = answered(Stuck([stuck.pid]).rules("release"))
        job = kernel.start(run)
        assert os.read(read_end, 1) == b"!"
        kernel.release()
        release, left = job.result()
        assert release.freed
        assert left == 0
    os.close(read_end)
    os.close(out)


def test_a_wait_for_a_stuck_victim_can_be_interrupted(
    answered: Answered,
) -> None:
    with victims.held(4) as stuck:

        def run() -> tuple[str, float]:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            with Reaper() as reaper:
                reaping = reaper.kill(stuck.pid, timeout=0.7)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                begun = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    reaping.result()
                took = time.monotonic() - begun
                return reaping.result().outcome.value, took

        outcome, took = answered(Stuck([stuck.pid]).rules("release")).run(run)
        assert outcome == "partial"
        assert took < 0.7


@pytest.mark.needs("held")
def test_python_goes_on_while_the_threads_are_stuck(
    answered: Answered,
) -> None:
    """Neither submit nor wait nor close keeps the GIL."""
    with victims.held(1) as stuck:

        def run() -> int:
            steps = 0
            with Reaper() as reaper:
                reaping = reaper.kill(stuck.pid, timeout=0.3)
                thread = threading.Thread(target=reaping.result)
                closing = threading.Thread(target=reaper.close)
                thread.start()
                closing.start()
                while thread.is_alive() or closing.is_alive():
                    steps += 1
                    time.sleep(0.001)
            return steps

        steps = answered(Stuck([stuck.pid]).rules("release")).run(run)
        assert steps > 20


@pytest.mark.needs("release")
def test_without_a_filter_nobody_is_stuck() -> None:
    """What makes the tests above mean something."""
    with victims.held(4) as victim, Reaper(threads=1, spares=0) as reaper:
        assert reaper.kill(victim.pid).result().outcome is Outcome.RELEASED
        assert victim.rss_anon() == 0
