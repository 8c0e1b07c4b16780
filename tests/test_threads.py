"""Threads: a call that blocks holds up nobody else.

How a call is held: seccomp user notification keeps process_mrelease in
the kernel for as long as the test wants, as mmap_lock would. The answer
comes from the test's process, the calls are made in a child (Job) that
needs no answer for anything else.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from mrelease import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from kill_ways import Kill

FREED = (Outcome.RELEASED, Outcome.EXITED)
TIMEOUT = 60.0


def has_ended(result: mrelease.Release) -> bool:
    """Seen to end, or released and, on a busy machine, not waited for."""
    return result.exited is not None or result.outcome is Outcome.RELEASED


def child_says(read_end: int, timeout: float = TIMEOUT) -> bytes:
    """The next byte from a pipe."""
    assert select.select([read_end], [], [], timeout)[0], "silence"
    return os.read(read_end, 1)


def count_while_blocked(call: Callable[[], object], out: int) -> str:
    """Make a call in a thread, meanwhile count in this one.

    Writes a byte each time that 10,000 Python steps are done, and ends
    with the call. If the call kept the GIL there would be silence.
    """
    error: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as e:  # noqa: BLE001 - for the test
            error.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    steps = 0
    while thread.is_alive():
        steps += 1
        if steps % 10_000 == 0:
            os.write(out, b"x")
    return repr(error[0]) if error else "done"


@pytest.mark.needs("seccomp", "held")
@pytest.mark.parametrize("way", ["process_mrelease", "kill", "release"])
@pytest.mark.needs("release")
def test_another_thread_makes_progress_while_the_call_blocks(way: str) -> None:
    rules = {"process_mrelease": [kernel_errors.BLOCK]}
    read_end, write_end = os.pipe()
    with victims.held(16, killed=way != "kill") as victim:

        def call() -> None:
            if way == "process_mrelease":
                mrelease.process_mrelease(victim.pidfd)
            elif way == "kill":
                mrelease.kill(victim.pid)
            else:
                with mrelease.Victim(victim.pid) as made:
                    made.release()

        def run() -> str:
            return count_while_blocked(call, write_end)

        with kernel_errors.answered(rules) as kernel:
            job = kernel.start(run)
            kernel.blocked()
            # Take what was written before the call blocked; all that comes
            # after it is progress.
            drain(read_end)
            for _ in range(5):
                assert child_says(read_end) == b"x"
            assert len(kernel.blocked()) == 1
            unblock(kernel, read_end, job)
            assert job.result() == "done"
        assert victim.rss_anon() == 0
    os.close(read_end)
    os.close(write_end)


def drain(read_end: int) -> None:
    """Read what is in a pipe now."""
    os.set_blocking(read_end, False)
    with suppress(BlockingIOError):
        while True:
            if len(os.read(read_end, 65_536)) < 65_536:
                break
    os.set_blocking(read_end, True)


def unblock(
    kernel: kernel_errors.answered,
    read_end: int,
    job: kernel_errors.Job[str],
) -> None:
    """Let the call go on, and read on so that the child does not stop."""
    kernel.release()
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        drain(read_end)
        if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)
    raise TimeoutError("the child has not ended")


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_a_stuck_call_does_not_stop_another_threads_kill() -> None:
    rules = {
        "process_mrelease": [kernel_errors.BLOCK, kernel_errors.ALLOW],
    }
    with (
        victims.asleep(16) as stuck,
        victims.asleep(16) as other,
        kernel_errors.answered(rules) as kernel,
    ):

        def run() -> tuple[mrelease.Release, bool, mrelease.Release]:
            with ThreadPoolExecutor(1) as pool:
                first = pool.submit(mrelease.kill, stuck.pid, timeout=0.5)
                # The first is in its call when its victim is dying.
                victims.wait_until(
                    lambda: stuck.states()[:1] in ("Z", "X", ""),
                    "the first is killed",
                )
                second = mrelease.kill(other.pid)
                still = first.running()
                os.write(out, b"2")
                return second, still, first.result()

        read_end, out = os.pipe()
        job = kernel.start(run)
        kernel.blocked()
        # It is told while the first is stuck: nothing was let go yet.
        assert child_says(read_end) == b"2"
        assert len(kernel.blocked()) == 1
        kernel.release()
        second, still, first = job.result()
        os.close(read_end)
        os.close(out)
        assert still
        assert second.outcome in FREED
        assert second.freed
        assert has_ended(second)
        # The stuck one is told as it was, once it is through.
        assert first.outcome in FREED
        assert has_ended(first)
        assert stuck.wait() == -signal.SIGKILL
        assert other.wait() == -signal.SIGKILL


def at_once(
    count: int, function: Callable[[int], object]
) -> list[object | BaseException]:
    """function(0), function(1), ... in threads that begin together."""
    barrier = threading.Barrier(count)
    results: list[object | BaseException] = [None] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = function(i)
        except BaseException as e:  # noqa: BLE001 - for the test
            results[i] = e

    threads = [
        threading.Thread(target=run, args=(i,), daemon=True)
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a thread hangs"
    return results


@pytest.mark.needs("release")
def test_8_threads_kill_8_victims_at_once(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    for _ in range(rounds(20)):
        with ExitStack() as stack:
            made = [
                stack.enter_context(victims.asleep(8, threads=1 + i % 3))
                for i in range(8)
            ]
            results = at_once(
                8,
                lambda i, made=made: kill(made[i].pid),  # type: ignore[misc]
            )
            for victim, result in zip(made, results, strict=True):
                assert isinstance(result, mrelease.Release), result
                assert result.pid == victim.pid
                assert result.outcome in FREED
                assert result.freed
                assert result.footprint is not None
                assert result.footprint.anon >= 8 * victims.MIB
                assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("given", ["pid", "one Victim", "own Victims"])
@pytest.mark.needs("release")
def test_8_threads_kill_the_same_victim_at_once(
    given: str, rounds: Callable[[int], int], kill: Kill
) -> None:
    for turn in range(rounds(25)):
        with (
            victims.asleep(8, threads=1 + turn % 4) as victim,
            mrelease.Victim(victim.pid) as shared,
        ):

            def run(
                _: int,
                victim: victims.Process = victim,
                shared: mrelease.Victim = shared,
            ) -> mrelease.Release:
                if given == "pid":
                    return kill(victim.pid)
                if given == "one Victim":
                    return kill(shared)
                with mrelease.Victim(victim.pid) as own:
                    return kill(own)

            # Nobody has waited for it, so nobody may say that it is gone.
            results = at_once(8, run)
            freed = 0
            for result in results:
                assert isinstance(result, mrelease.Release), result
                assert result.outcome in FREED, result
                assert has_ended(result)
                freed += result.freed
            # Who came when the memory was out of sight can not know; the
            # first one does.
            assert freed >= 1, results
            assert victim.rss_anon() == 0
            assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_8_threads_release_the_same_held_victim_at_once() -> None:
    with victims.held(64, killed=True) as victim:
        results = at_once(8, lambda _: mrelease.process_mrelease(victim.pidfd))
        assert results == [None] * 8
        assert victim.rss_anon() == 0


def pause(seconds: float) -> None:
    """Be busy for so long: sleeping threads wake one after the other."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.needs("release")
def test_a_victim_is_closed_while_8_threads_use_it(
    rounds: Callable[[int], int],
) -> None:
    """Each call works as if before close(), or says that it is closed.

    After a close() the number may be another process's: a call that was
    late and used it would kill a stranger. So strangers take the number.
    """
    outcomes: dict[str, int] = {}
    for _ in range(max(rounds(60), 20)):  # so many that both come up
        with (
            victims.asleep(4) as victim,
            victims.asleep(1) as stranger,
        ):
            made = mrelease.Victim(victim.pid)
            number = made.fileno()
            taken: list[int] = []

            def use(
                i: int,
                made: mrelease.Victim = made,
                stranger: victims.Process = stranger,
                taken: list[int] = taken,
            ) -> object:
                pause(random.uniform(0, 200e-6))
                if i == 8:
                    made.close()
                    # As a thread that opens what it needs would do it.
                    taken.extend(os.dup(stranger.pidfd) for _ in range(20))
                    return "closed"
                if i % 4 == 0:
                    return made.kill()
                if i % 4 == 1:
                    return made.footprint()
                if i % 4 == 2:
                    return made.exited
                return made.release(timeout=5)

            interval = sys.getswitchinterval()
            sys.setswitchinterval(1e-5)  # take turns wherever they may
            try:
                results = at_once(9, use)
            finally:
                sys.setswitchinterval(interval)
            for i, result in enumerate(results[:8]):
                if isinstance(result, ValueError):
                    assert str(result) == "this Victim is closed"
                    outcomes["closed"] = outcomes.get("closed", 0) + 1
                    continue
                outcomes["used"] = outcomes.get("used", 0) + 1
                assert not isinstance(result, BaseException), (i, result)
                if i % 4 == 0:
                    assert isinstance(result, mrelease.Release)
                    assert result.outcome in FREED
                    assert has_ended(result)
                if i % 4 == 3:
                    assert isinstance(result, mrelease.Release)
                    assert result.outcome in (*FREED, Outcome.ALIVE)
            made.close()  # twice is no error
            with pytest.raises(ValueError, match="closed"):
                made.fileno()
            # The descriptor was closed once, and is not the Victim's.
            if number in taken:
                assert os.path.samestat(
                    os.fstat(number), os.fstat(stranger.pidfd)
                )
            else:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(number)
            for fd in taken:
                os.close(fd)
            assert not stranger.ended()
    print(outcomes)
    assert min(outcomes.get("closed", 0), outcomes.get("used", 0)) > 0


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_close_during_a_kill_takes_effect_after_it() -> None:
    rules = {"process_mrelease": [kernel_errors.BLOCK]}
    with (
        victims.asleep(16) as victim,
        kernel_errors.answered(rules) as kernel,
    ):
        read_end, out = os.pipe()

        def run() -> tuple[mrelease.Release, list[str]]:
            seen = []
            made = mrelease.Victim(victim.pid)
            number = made.fileno()
            with ThreadPoolExecutor(1) as pool:
                killing = pool.submit(made.kill)
                victims.wait_until(
                    lambda: victim.states()[:1] in ("Z", "X", ""),
                    "it is killed",
                )
                made.close()  # does not wait
                try:
                    made.kill()
                except ValueError as error:
                    seen.append(str(error))
                os.fstat(number)  # still open: it is being used
                os.write(out, b"c")
                result = killing.result()
            try:
                os.fstat(number)
            except OSError as error:
                seen.append(errno.errorcode[error.errno or 0])
            return result, seen

        job = kernel.start(run)
        kernel.blocked()
        assert child_says(read_end) == b"c"
        assert len(kernel.blocked()) == 1
        kernel.release()
        result, seen = job.result()
        os.close(read_end)
        os.close(out)
        assert seen == ["this Victim is closed", "EBADF"]
        assert result.outcome in FREED
        assert victim.wait() == -signal.SIGKILL


# ---------------------------------------------------------------- fork


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_fork_in_another_thread_during_a_kill() -> None:
    """The child has the Victim, without the thread that was using it.

    It can use and close it. The descriptor that the thread was using stays
    open in the child to its end: the thread never comes back from its call.
    """
    rules = {
        "process_mrelease": [kernel_errors.BLOCK, kernel_errors.ALLOW],
    }
    with (
        victims.asleep(16) as victim,
        victims.asleep(16) as other,
        kernel_errors.answered(rules) as kernel,
    ):
        read_end, out = os.pipe()

        def in_grandchild(made: mrelease.Victim) -> tuple[str, bool, str]:
            outcome = mrelease.kill(other.pid).outcome.value
            exited = made.exited
            made.close()
            try:
                made.kill()
            except ValueError as error:
                return outcome, exited, str(error)
            return outcome, exited, "not closed"

        def run() -> tuple[mrelease.Release, tuple[str, bool, str]]:
            with (
                mrelease.Victim(victim.pid) as made,
                ThreadPoolExecutor(1) as pool,
            ):
                killing = pool.submit(made.kill)
                victims.wait_until(
                    lambda: victim.states()[:1] in ("Z", "X", ""),
                    "it is killed",
                )
                found = kernel_errors.in_child(in_grandchild, made)
                assert killing.running()
                os.write(out, b"f")
                return killing.result(), found

        job = kernel.start(run)
        kernel.blocked()
        assert child_says(read_end) == b"f"
        kernel.release()
        result, (outcome, exited, closed) = job.result()
        os.close(read_end)
        os.close(out)
        assert result.outcome in FREED
        assert outcome in ("released", "exited")
        assert exited
        assert closed == "this Victim is closed"
        assert victim.wait() == -signal.SIGKILL
        assert other.wait() == -signal.SIGKILL


def test_forks_at_any_moment_of_kills_in_other_threads(
    rounds: Callable[[int], int],
) -> None:
    """No child hangs, and each can use and close the Victims it has."""
    turns = rounds(100)

    def use(
        made: mrelease.Victim, begun: threading.Event, stop: threading.Event
    ) -> None:
        begun.set()
        while not stop.is_set():
            made.footprint()
        made.kill()

    def run() -> int:
        sys.setswitchinterval(1e-5)  # take turns wherever they may
        forks = 0
        for _ in range(turns):
            begun, stop = threading.Event(), threading.Event()
            with (
                victims.asleep(1) as victim,
                mrelease.Victim(victim.pid) as made,
                ThreadPoolExecutor(4) as pool,
            ):
                users = [pool.submit(use, made, begun, stop) for _ in range(4)]
                begun.wait()
                for _ in range(5):
                    forks += 1
                    kernel_errors.in_child(use_once, made)
                stop.set()
                for user in users:
                    user.result()
        return forks

    with kernel_errors.Job(run) as job:
        print(f"{job.result(280)} forks")


def use_once(made: mrelease.Victim) -> None:
    # A lock that another thread held at the fork would hang here.
    signal.alarm(10)
    assert made.footprint().anon >= 0
    made.close()
    signal.alarm(0)
