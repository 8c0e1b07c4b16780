"""A Reaper and fork(), and Reapers in several interpreters.

The threads stay with the parent. The child must not wait for them, nor be
held up by a lock that one of them had at that moment.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from kill_ways import native_threads
from mrelease import Outcome, Reaper, Reaping, Release
from test_interpreters import Interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BACK = {Outcome.RELEASED, Outcome.EXITED}
LONG = 20.0
"""A grace that no test waits out."""
SENTENCE = (
    "this Reaper is closed here: its threads stayed with the process that "
    "made it. After fork(), make another one"
)


@pytest.fixture
def reaper() -> Iterator[Reaper]:
    with Reaper(threads=2, spares=1) as reaper:
        yield reaper
    assert native_threads() == {}


# --------------------------------------------------------------------- fork


def test_in_a_forked_child_it_is_closed_and_says_why(reaper: Reaper) -> None:
    with victims.asleep(1) as victim:

        def run() -> tuple[bool, str, list[str], list[bool]]:
            errors = []
            calls: list[Callable[[], object]] = [
                lambda: reaper.kill(victim.pid),
                lambda: reaper.kill(victim.pid, grace=1.0),
                lambda: reaper.kill_many([victim.pid]),
                lambda: mrelease.kill_many([victim.pid], reaper=reaper),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="fork") as caught:
                    call()
                errors.append(str(caught.value))
            with reaper:
                pass
            return (
                reaper.closed, repr(reaper), errors,
                [reaper.close(), reaper.close(0)],
            )  # fmt: skip

        closed, text, errors, closing = kernel_errors.in_child(run)
        assert closed
        assert text.startswith("<Reaper forked, ")
        assert errors == [SENTENCE] * 4
        assert closing == [True, True]
        # Nothing happened to it, nor to the victim.
        assert not reaper.closed
        assert victim.states() == "S"
        assert reaper.kill(victim.pid).result().freed


@pytest.mark.needs("release")
def test_results_that_were_there_stay_readable_in_a_forked_child(
    reaper: Reaper,
) -> None:
    event = os.eventfd(0)
    with ExitStack() as stack:
        one, two = (stack.enter_context(victims.asleep(1)) for _ in range(2))
        with victims.stopped(1) as three:
            read = reaper.kill(one.pid)
            read.result()
            unread = reaper.kill(two.pid)
            victims.wait_until(unread.done, "it is done")
            pending = reaper.kill(three.pid, grace=LONG, escalate_on=event)

            def run() -> tuple[Release, Release, bool, str, bool]:
                with pytest.raises(ValueError, match="fork") as caught:
                    pending.result(5)
                polled = select.select([unread], [], [], 0)[0] == [unread]
                return (
                    read.result(), unread.result(0), pending.done(),
                    str(caught.value), polled,
                )  # fmt: skip

            first, second, done, text, polled = kernel_errors.in_child(run)
            assert first == read.result()
            assert second == unread.result()
            assert not done
            assert text == SENTENCE
            assert polled
            # The parent goes on.
            os.eventfd_write(event, 1)
            assert pending.result(LONG).outcome in BACK
    os.close(event)


@pytest.mark.needs("release")
def test_what_ends_in_the_parent_is_told_in_the_child_or_refused(
    reaper: Reaper,
) -> None:
    """The eventfd is shared: polling tells it, but the result is not here."""
    event = os.eventfd(0)
    with victims.stopped(1) as victim:
        pending = reaper.kill(victim.pid, grace=LONG, escalate_on=event)

        def run() -> str:
            os.eventfd_write(event, 1)
            assert select.select([pending], [], [], LONG)[0]
            with pytest.raises(ValueError, match="fork") as caught:
                pending.result()
            return str(caught.value)

        assert kernel_errors.in_child(run) == SENTENCE
        assert pending.result(LONG).outcome in BACK
    os.close(event)


def test_a_new_reaper_in_the_child_works(reaper: Reaper) -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:

        def run() -> tuple[Release, int, int]:
            assert native_threads() == {}
            with Reaper(threads=1, spares=1) as own:
                threads = len(native_threads())
                release = own.kill(one.pid).result()
            return release, threads, len(native_threads())

        release, threads, left = kernel_errors.in_child(run)
        assert release.freed
        assert (threads, left) == (3, 0)
        assert reaper.kill(two.pid).result().freed


def test_a_child_of_a_child_makes_its_own(reaper: Reaper) -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:

        def inner() -> Release:
            with Reaper() as own:
                return own.kill(two.pid).result()

        def outer() -> list[Release]:
            with Reaper() as own:
                pending = own.kill(one.pid)
                return [kernel_errors.in_child(inner), pending.result()]

        assert all(r.freed for r in kernel_errors.in_child(outer))
        assert not reaper.closed


def _leave(how: str) -> str:
    """A program that forks with a live Reaper; the child leaves so."""
    return f"""
import gc, mrelease, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
reaper = mrelease.Reaper()
reaping = reaper.kill(int(sys.argv[1]), grace=600)
pid = os.fork()
if pid == 0:
    if {how!r} == "drop":
        del reaper, reaping
        gc.collect()
    if {how!r} == "close":
        reaper.close()
    sys.exit(5)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status), reaping.done(), reaper.closed)
reaper.close(0)
print(reaping.result().signalled is not None)
"""


@pytest.mark.parametrize("how", ["leave", "drop", "close"])
def test_the_end_of_a_forked_child_is_clean(how: str) -> None:
    with victims.asleep(1, sigterm="ignore") as victim:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", _leave(how),
             str(victim.pid)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == (
            "5 False False\nTrue\n", "", 0
        )  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_starts_beside_a_reaper(
    method: str, reaper: Reaper
) -> None:
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=_import_and_see)  # type: ignore[attr-defined]
        process.start()
    process.join(240)
    assert process.exitcode == 7
    process.close()
    with victims.asleep(1) as victim:
        assert reaper.kill(victim.pid).result().freed


def _import_and_see() -> None:
    with Reaper(threads=1, spares=0):
        sys.exit(7)


@pytest.mark.needs("release")
def test_forks_at_any_moment_while_others_kill(
    rounds: Callable[[int], int],
) -> None:
    """Whatever a thread of the Reaper holds just then: no child hangs."""
    count = rounds(60)
    stop = threading.Event()
    killed = [0]
    failures: list[BaseException] = []
    with Reaper(threads=2, spares=1) as reaper:

        def work() -> None:
            try:
                while not stop.is_set():
                    with ExitStack() as stack:
                        pids = [
                            stack.enter_context(victims.Process()).pid
                            for _ in range(4)
                        ]
                        for reaping in reaper.kill_many(pids, grace=0.0005):
                            assert reaping.result().outcome in BACK
                        killed[0] += 4
            except BaseException as error:  # noqa: BLE001 - for the test
                failures.append(error)

        def child() -> bool:
            closed = reaper.closed and reaper.close()
            gc.collect()
            return closed

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(count):
                with kernel_errors.Job(child) as job:
                    assert job.result()
        finally:
            stop.set()
            thread.join(LONG)
    assert failures == []
    assert killed[0] > 0
    print(f"\n{count} forks while {killed[0]} were killed")


# ------------------------------------------------------------- interpreters

KILL = """
import mrelease
with mrelease.Reaper(threads=2, spares=1) as reaper:
    results = [reaper.kill({pids}[0]).result()]
    results += mrelease.kill_many({pids}[1:], reaper=reaper)
answer([(r.pid, r.outcome.value, r.freed) for r in results])
"""


def check_answer(answer: object, made: list[victims.Process]) -> None:
    assert isinstance(answer, list)
    for victim, (pid, outcome, freed) in zip(made, answer, strict=True):
        assert pid == victim.pid
        assert outcome in ("released", "exited")
        assert freed
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_a_reaper_in_a_subinterpreter() -> None:
    def run(pids: list[int]) -> tuple[object, int]:
        with Interpreter() as other:
            answer = other.run(KILL.format(pids=pids))
        return answer, len(native_threads())

    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(1)) for _ in range(3)]
        answer, left = kernel_errors.in_child(run, [v.pid for v in made])
        check_answer(answer, made)
        assert left == 0


@pytest.mark.needs("release")
def test_each_interpreter_has_its_own_reaper_at_once() -> None:
    def run(pids: list[list[int]]) -> list[object]:
        answers: list[object] = [None] * len(pids)

        def work(i: int) -> None:
            answers[i] = others[i].run(KILL.format(pids=pids[i]))

        with ExitStack() as stack:
            # One after the other: see test_interpreters.
            others = [stack.enter_context(Interpreter()) for _ in pids]
            for other in others:
                other.run("import mrelease")
            threads = [
                threading.Thread(target=work, args=(i,))
                for i in range(len(pids))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return [*answers, len(native_threads())]

    with ExitStack() as stack:
        made = [
            [stack.enter_context(victims.asleep(1)) for _ in range(4)]
            for _ in range(4)
        ]
        *answers, left = kernel_errors.in_child(
            run, [[victim.pid for victim in row] for row in made]
        )
        for answer, row in zip(answers, made, strict=True):
            check_answer(answer, row)
        assert left == 0


@pytest.mark.parametrize("pending", [False, True])
def test_an_interpreter_that_ends_takes_its_reaper_along(
    pending: bool,
) -> None:
    """Unclosed, also with a kill that is under way."""

    def run(pid: int) -> bool:
        with Interpreter() as other:
            other.run(
                "import mrelease, builtins\n"
                "builtins.reaper = mrelease.Reaper(threads=1, spares=0)\n"
                + (
                    f"builtins.reaping = reaper.kill({pid}, grace=600)\n"
                    if pending
                    else ""
                )
            )
            assert len(native_threads()) == 2
        victims.wait_until(lambda: not native_threads(), "they end", 20)
        # The main interpreter has its own still.
        with Reaper() as reaper:
            return reaper.closed

    with victims.asleep(1, sigterm="ignore") as victim:
        assert kernel_errors.in_child(run, victim.pid) is False
        if pending:
            assert victim.ended(10)
        else:
            assert victim.states() == "S"


def test_a_reaping_s_repr_survives_the_fork(reaper: Reaper) -> None:
    with victims.asleep(1) as victim:
        reaping: Reaping = reaper.kill(victim.pid)
        reaping.result()
        text = kernel_errors.in_child(lambda: repr(reaping))
        assert text == f"<Reaping pid={victim.pid} done>"


NESTED = """
import ctypes, os, subprocess, sys
import mrelease
assert os.getpid() == 1
reaper = mrelease.Reaper(threads=1)
last = subprocess.Popen(["sleep", "60"])  # before its children have another
assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID
child = os.fork()
if child == 0:
    assert os.getpid() == 1
    popen = subprocess.Popen(["sleep", "60"])
    try:
        reaper.kill(popen)
    except ValueError as error:
        print(str(error).partition(":")[0], reaper.closed, popen.poll())
    print(reaper.close(1))
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print(reaper.kill(last).result().freed, reaper.close(5))
"""


@pytest.mark.needs("root", "release")
def test_a_child_with_the_pid_of_its_parent_is_known_for_a_child() -> None:
    """Both are the first in their pid namespaces."""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child",
         sys.executable, "-X", "dev", "-c", NESTED],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unshare failed" in done.stderr:
        pytest.skip(f"no pid namespace: {done.stderr.strip()}")
    assert (done.returncode, done.stdout) == (
        0,
        "this Reaper is closed here True None\nTrue\nTrue True\n",
    ), done
