"""Many at once: Reaper.kill_many() and mrelease.kill_many()."""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import resource
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, cast

import psutil
import pytest

import kernel_errors
import mrelease
import victims
from kill_ways import native_threads
from mrelease import Outcome, Reaper, Release, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from conftest import Unprivileged

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

BACK = {Outcome.RELEASED, Outcome.EXITED}


class KillMany(Protocol):
    def __call__(
        self,
        processes: Iterable[Any],
        *,
        grace: float = ...,
        timeout: float = ...,
    ) -> list[Release]: ...


def with_a_reaper(
    processes: Iterable[Any], *, grace: float = 0.0, timeout: float = 1.0
) -> list[Release]:
    with Reaper(threads=2) as reaper:
        return mrelease.kill_many(
            processes, grace=grace, timeout=timeout, reaper=reaper
        )


def by_reaper(
    processes: Iterable[Any], *, grace: float = 0.0, timeout: float = 1.0
) -> list[Release]:
    with Reaper(threads=2) as reaper:
        reapings = reaper.kill_many(processes, grace=grace, timeout=timeout)
        return [reaping.result() for reaping in reapings]


WAYS: dict[str, KillMany] = {
    "kill_many": mrelease.kill_many,
    "kill_many, reaper given": with_a_reaper,
    "Reaper.kill_many": by_reaper,
}


@pytest.fixture(params=WAYS)
def kill_many(request: pytest.FixtureRequest) -> Iterator[KillMany]:
    yield WAYS[request.param]
    assert native_threads() == {}


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def check_untouched(victim: victims.Process) -> None:
    assert victim.states() == "S"
    assert victim.status()["ShdPnd"] == "0" * 16
    assert not victim.ended()


# ---------------------------------------------------------------- the results


@pytest.mark.needs("release")
def test_the_results_are_in_the_order_given(kill_many: KillMany) -> None:
    with ExitStack() as stack:
        sizes = [1, 16, 2, 8, 1, 32, 4] * 3
        made = [stack.enter_context(victims.asleep(size)) for size in sizes]
        results = kill_many([victim.pid for victim in made], timeout=30)
        for size, victim, result in zip(sizes, made, results, strict=True):
            assert result.pid == victim.pid
            assert result.outcome in BACK
            assert result.freed
            assert result.footprint is not None
            anon = result.footprint.anon
            assert size * victims.MIB <= anon
            assert anon < (size + 1) * victims.MIB
            assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("seccomp")
def test_the_biggest_is_signalled_first(
    kill_many: KillMany, answered: Answered
) -> None:
    with ExitStack() as stack:
        sizes = [2, 16, 1, 8, 4]
        made = [stack.enter_context(victims.asleep(size)) for size in sizes]
        order: list[int] = []

        def seen(call: kernel_errors.Call) -> kernel_errors.Plain:
            if call.args[1] == signal.SIGKILL:
                path = f"/proc/{call.tid}/fdinfo/{call.args[0]}"
                with open(path) as file:
                    order.extend(
                        int(line.split()[1])
                        for line in file
                        if line.startswith("Pid:")
                    )
            return kernel_errors.ALLOW

        answered({"pidfd_send_signal": [seen]}).run(
            kill_many, [victim.pid for victim in made]
        )
        by_size = sorted(zip(sizes, made, strict=True), key=lambda x: -x[0])
        assert order == [victim.pid for _, victim in by_size]


@pytest.mark.needs("release")
def test_who_is_gone_is_gone(kill_many: KillMany) -> None:
    gone = victims.reaped_pid()
    waited_for = subprocess.Popen(["true"])
    waited_for.wait()
    with (
        victims.asleep(1) as one,
        victims.asleep(1) as two,
        victims.asleep(1) as reaped,
        Victim(reaped.pid) as victim,
        victims.zombie(1) as zombie,
    ):
        reaped.popen.kill()
        reaped.wait()
        results = kill_many(
            [gone, one.pid, waited_for, victim, zombie.pid, two.pid]
        )
        assert [result.outcome in BACK for result in results] == [
            False, True, False, False, True, True
        ]  # fmt: skip
        for number, pid in ((0, gone), (2, waited_for.pid), (3, reaped.pid)):
            result = results[number]
            assert result.pid == pid
            assert result.outcome is Outcome.GONE
            assert not result.freed
            assert result.signalled is None
            assert str(result)


@pytest.mark.needs("root")
@pytest.mark.parametrize("grace", [0.0, 0.05])
@pytest.mark.needs("release")
def test_who_may_not_be_signalled_is_denied(
    grace: float, kill_many: KillMany, unprivileged: Unprivileged
) -> None:
    nobody = 65534
    with (
        victims.asleep(1) as foreign,
        victims.asleep(1, user=nobody) as one,
        victims.asleep(1, user=nobody) as two,
    ):
        results = unprivileged(
            kill_many, [one.pid, foreign.pid, two.pid], grace=grace
        )
        assert results[0].outcome in BACK
        assert results[1].outcome is Outcome.DENIED
        assert results[1].errno == 1
        assert results[1].signalled is None
        assert not results[1].freed
        assert results[2].outcome in BACK
        check_untouched(foreign)


def test_an_empty_list(kill_many: KillMany) -> None:
    assert kill_many([]) == []
    assert kill_many(iter(())) == []


@pytest.mark.needs("release")
def test_a_process_that_is_given_twice_has_two_results(
    kill_many: KillMany,
) -> None:
    with victims.asleep(4) as one, victims.asleep(4) as two:
        results = kill_many([one.pid, two.pid, one.popen, one.pid])
        assert [result.pid for result in results] == [
            one.pid, two.pid, one.pid, one.pid
        ]  # fmt: skip
        for result in results:
            assert result.outcome in BACK, result
        assert one.wait() == two.wait() == -signal.SIGKILL


def test_all_that_stands_for_a_process_may_be_mixed(
    kill_many: KillMany,
) -> None:
    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(1)) for _ in range(4)]
        pinned = stack.enter_context(Victim(made[3].pid))

        def generate() -> Iterator[object]:
            yield made[0].pid
            yield made[1].popen
            yield psutil.Process(made[2].pid)
            yield pinned

        results = kill_many(generate())
        assert [result.pid for result in results] == [v.pid for v in made]
        assert all(result.freed for result in results)
        # A Victim that was given is the caller's still.
        assert pinned.exited


def test_a_grace_is_that_of_each(kill_many: KillMany) -> None:
    with (
        victims.asleep(1, sigterm="exit") as polite,
        victims.asleep(1, sigterm="ignore") as deaf,
    ):
        first, second = kill_many([polite.pid, deaf.pid], grace=0.3)
        assert first.outcome is Outcome.EXITED
        assert first.signalled is None
        assert polite.wait() == 0
        assert second.terminated is not None
        assert second.signalled is not None
        assert second.signalled - second.terminated >= 0.3
        assert deaf.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_the_timeout_is_that_of_each(kill_many: KillMany) -> None:
    with ExitStack() as stack:
        made = [
            stack.enter_context(victims.held(1, shared_anon=4))
            for _ in range(5)
        ]
        results = kill_many([victim.pid for victim in made], timeout=0.3)
        for result in results:
            assert result.outcome is Outcome.RELEASED
            assert result.exited is None


# ------------------------------------------------------------- wrong arguments

BAD: list[tuple[object, type[Exception], str]] = [
    (0, ValueError, "0"),
    (-1, ValueError, "-1"),
    (1, ValueError, "pid 1 is refused"),
    (True, ValueError, "True"),
    ("12", TypeError, "str"),
    (None, TypeError, "NoneType"),
    (1.5, TypeError, "float"),
    (os.getpid(), ValueError, "the caller itself"),
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("bad", "error", "text"), BAD, ids=repr)
def test_a_bad_one_anywhere_means_that_none_is_signalled(
    bad: object,
    error: type[Exception],
    text: str,
    place: int,
    kill_many: KillMany,
) -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:
        batch: list[object] = [one.pid, two.popen]
        batch.insert(place, bad)
        before = fds()
        with pytest.raises(error, match=text):
            kill_many(batch)
        assert fds() == before
        check_untouched(one)
        check_untouched(two)


@pytest.mark.needs("kernel_thread")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_kernel_thread_or_a_thread_means_that_none_is_signalled(
    place: int, kill_many: KillMany
) -> None:
    with victims.asleep(1) as one, victims.asleep(1, threads=2) as two:
        for bad in (victims.kernel_thread(), two.tids()[1]):
            batch = [one.pid, two.pid]
            batch.insert(place, bad)
            with pytest.raises(ValueError, match="thread"):
                kill_many(batch)
        check_untouched(one)
        assert two.states() == "SS"


def test_a_closed_victim_means_that_none_is_signalled(
    kill_many: KillMany,
) -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:
        closed = Victim(two.pid)
        closed.close()
        with pytest.raises(ValueError, match="closed"):
            kill_many([one.pid, closed])
        check_untouched(one)
        check_untouched(two)


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"grace": -1}, ValueError),
        ({"grace": "1"}, TypeError),
        ({"timeout": math.nan}, ValueError),
        ({"timeout": None}, TypeError),
    ],
    ids=repr,
)
def test_bad_terms_mean_that_none_is_signalled(
    terms: dict[str, object], error: type[Exception], kill_many: KillMany
) -> None:
    with victims.asleep(1) as victim:
        with pytest.raises(error, match=f"{next(iter(terms))} must"):
            cast("Callable[..., object]", kill_many)([victim.pid], **terms)
        check_untouched(victim)


def test_what_is_no_iterable_is_a_type_error(kill_many: KillMany) -> None:
    with victims.asleep(1) as victim:
        for bad in (victim.pid, victim.popen, None):
            with pytest.raises(TypeError, match="must be an iterable of what"):
                kill_many(cast("list[int]", bad))
        check_untouched(victim)


def test_what_an_iterable_raises_comes_out_and_none_is_signalled(
    kill_many: KillMany,
) -> None:
    with victims.asleep(1) as victim:

        def generate() -> Iterator[int]:
            yield victim.pid
            raise KeyError("no more")

        with pytest.raises(KeyError, match="no more"):
            kill_many(generate())
        check_untouched(victim)


def test_an_audit_hook_that_raises_means_that_none_is_signalled(
    kill_many: KillMany,
) -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:

        def run() -> list[int]:
            import sys

            asked = []

            def hook(event: str, args: tuple[int, ...]) -> None:
                if event == "mrelease.kill":
                    asked.append(args[0])
                    if len(asked) == 2:
                        raise KeyError("refused")

            sys.addaudithook(hook)
            with pytest.raises(KeyError, match="refused"):
                kill_many([one.pid, two.pid])
            return asked

        assert kernel_errors.in_child(run) == [one.pid, two.pid]
        check_untouched(one)
        check_untouched(two)


# ----------------------------------------------------- file descriptors

MANY = 300


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Victims that need no file descriptor of ours, so there may be many."""
    made: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            made.append(subprocess.Popen(["sleep", "600"]))  # noqa: PERF401
        yield made
    finally:
        for sleeper in made:
            sleeper.kill()
            sleeper.wait()


@pytest.mark.parametrize("grace", [0.0, 0.01])
@pytest.mark.parametrize("left", [4, 10, 60])
@pytest.mark.needs("release")
def test_300_are_killed_with_few_file_descriptors(
    left: int, grace: float, kill_many: KillMany
) -> None:
    """In as many turns as it takes."""

    def run(pids: list[int]) -> tuple[list[Release], int]:
        before = fds()
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A Reaper itself has an epoll, an eventfd and one for each thread.
        own = 2 + max(2, min(16, len(os.sched_getaffinity(0)))) + 8
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (highest + 1 + own + left, limits[1])
        )
        results = kill_many(pids, grace=grace, timeout=30)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return results, fds() - before

    with sleepers(MANY) as made:
        pids = [sleeper.pid for sleeper in made]
        results, leaked = kernel_errors.in_child(run, pids)
        assert [result.pid for result in results] == pids
        for sleeper, result in zip(made, results, strict=True):
            assert result.outcome in BACK, result
            assert sleeper.wait(10) == (
                -signal.SIGKILL if grace == 0 else -signal.SIGTERM
            )
        assert leaked == 0


@pytest.mark.parametrize("left", [3, 4, 5])
@pytest.mark.needs("release")
def test_none_is_left_alive_for_want_of_a_file_descriptor(left: int) -> None:
    """Each turn waits for the file descriptors of the one before."""

    def run(pids: list[int]) -> list[Release]:
        with Reaper(threads=2, policy="none") as reaper:
            kernel_errors.leave_files(left)
            return mrelease.kill_many(pids, timeout=30, reaper=reaper)

    with sleepers(100) as made:
        pids = [sleeper.pid for sleeper in made]
        results = kernel_errors.in_child(run, pids)
        assert {result.outcome for result in results} <= BACK


def test_with_no_file_descriptor_nothing_is_signalled() -> None:
    with victims.asleep(1) as one, victims.asleep(1) as two:

        def run() -> str:
            with Reaper() as reaper:
                lowest = os.dup(0)
                os.close(lowest)
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
                with pytest.raises(OSError, match="no file descriptor") as e:
                    reaper.kill_many([one.pid, two.pid])
                return str(e.value)

        assert "nothing was signalled" in kernel_errors.in_child(run)
        check_untouched(one)
        check_untouched(two)


# ------------------------------------------------------------- many batches


def test_batches_from_several_threads(rounds: Callable[[int], int]) -> None:
    for _ in range(rounds(5)):
        with ExitStack() as stack:
            reaper = stack.enter_context(Reaper(threads=2))
            made = [stack.enter_context(victims.asleep(1)) for _ in range(60)]
            results: list[Release] = []

            def work(
                i: int,
                made: list[victims.Process] = made,
                results: list[Release] = results,
                reaper: Reaper = reaper,
            ) -> None:
                pids = [victim.pid for victim in made[i::4]]
                results += mrelease.kill_many(pids, reaper=reaper)

            threads = [
                threading.Thread(target=work, args=(i,)) for i in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert {result.pid for result in results} == {
                victim.pid for victim in made
            }
            assert all(result.freed for result in results)


@pytest.mark.needs("release")
def test_a_thousand_are_killed_in_one_call(
    rounds: Callable[[int], int],
) -> None:
    count = rounds(1000)
    with sleepers(count) as made:
        results = mrelease.kill_many(made, timeout=30)
        assert [result.pid for result in results] == [s.pid for s in made]
        assert all(result.outcome in BACK for result in results)
        assert all(s.wait(10) == -signal.SIGKILL for s in made)


@pytest.mark.any_kernel
@pytest.mark.needs("kernel_thread")
@pytest.mark.parametrize("bad", ["a kernel thread", "a thread"])
def test_a_bad_one_is_seen_though_no_file_descriptor_is_left_for_it(
    bad: str, kill_many: KillMany
) -> None:
    """It comes after so many that some would have been killed by then."""

    def run(pids: list[int]) -> None:
        own = 2 + max(2, min(16, len(os.sched_getaffinity(0)))) + 8
        kernel_errors.leave_files(own + 12)
        with pytest.raises(ValueError, match="thread"):
            kill_many(pids)

    with sleepers(12) as made, victims.asleep(0, threads=2) as other:
        tids = {int(tid) for tid in os.listdir(f"/proc/{other.pid}/task")}
        last = 2 if bad == "a kernel thread" else max(tids - {other.pid})
        kernel_errors.in_child(run, [*(each.pid for each in made), last])
        assert all(each.poll() is None for each in made)
        assert not other.ended(0.05)


@pytest.mark.parametrize("way", [mrelease.kill_many, mrelease.kill])
def test_ctrl_c_in_a_grace_does_not_wait_for_its_end(
    way: Callable[..., object],
) -> None:
    with victims.asleep(0, sigterm="ignore") as victim:
        timer = threading.Timer(0.3, _thread.interrupt_main)
        what = victim.pid if way is mrelease.kill else [victim.pid]
        begun = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            way(what, grace=30)
        assert time.monotonic() - begun < 15
        assert victim.wait() == -signal.SIGKILL
        timer.join()
