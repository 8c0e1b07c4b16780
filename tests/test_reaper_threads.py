"""The threads of a Reaper: how many, how scheduled, and what they block.

They are looked at in /proc: what a Reaper says of itself must be what the
kernel says of each of its threads, and of no other thread.
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

import kernel_errors
import mrelease
import victims
from kill_ways import native_threads
from mrelease import Outcome, Reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal

    from conftest import Unprivileged

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]
    Policy = Literal["auto", "fifo", "nice", "none"]

BACK = {Outcome.RELEASED, Outcome.EXITED}
RESET_ON_FORK = 0x40000000
WATCHER = 1
"""The thread that a Reaper has besides the threads and spares."""


def has_nice() -> bool:
    """Is CAP_SYS_NICE effective?"""
    return int(victims.status_of(os.getpid())["CapEff"], 16) >> 23 & 1 != 0


needs_nice = pytest.mark.skipif(not has_nice(), reason="needs CAP_SYS_NICE")


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """A Reaper that was closed has left no thread behind."""
    yield
    assert native_threads() == {}


Scheduled = tuple[int, int, int, bool]


def scheduled(tid: int) -> Scheduled:
    """Policy, priority, nice, and whether a child is without them."""
    policy = os.sched_getscheduler(tid)
    return (
        policy & ~RESET_ON_FORK,
        os.sched_getparam(tid).sched_priority,
        os.getpriority(os.PRIO_PROCESS, tid),
        bool(policy & RESET_ON_FORK),
    )


def others() -> dict[int, tuple[Scheduled, set[int]]]:
    """The scheduling of all threads but those of Reapers."""
    tids = {int(tid) for tid in os.listdir("/proc/self/task")}
    return {
        tid: (scheduled(tid), os.sched_getaffinity(tid))
        for tid in tids - set(native_threads())
    }


def check_unchanged(before: dict[int, tuple[Scheduled, set[int]]]) -> None:
    """Of those that have not ended, the caller among them."""
    now = others()
    assert threading.get_native_id() in now
    for tid in before.keys() & now.keys():
        assert now[tid] == before[tid]


# ------------------------------------------------------- how many, and when


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("spares", [0, 1, 8])
def test_all_threads_are_made_with_the_reaper(
    threads: int, spares: int
) -> None:
    with Reaper(threads, spares=spares):
        assert len(native_threads()) == threads + spares + WATCHER


def test_by_default_there_is_a_thread_for_each_cpu_and_8_spares() -> None:
    cpus = len(os.sched_getaffinity(0))
    with Reaper():
        assert len(native_threads()) == min(16, cpus) + 8 + WATCHER
    with Reaper(cpus=[min(os.sched_getaffinity(0))]):
        assert len(native_threads()) == 1 + 8 + WATCHER


@pytest.mark.needs("release")
def test_no_kill_makes_a_thread(rounds: Callable[[int], int]) -> None:
    with Reaper(threads=2, spares=2) as reaper:
        made = native_threads()
        for _ in range(rounds(20)):
            with ExitStack() as stack:
                pids = [
                    stack.enter_context(victims.asleep(1)).pid
                    for _ in range(10)
                ]
                reapings = reaper.kill_many(pids[:5], grace=0.001)
                reapings += [reaper.kill(pid) for pid in pids[5:]]
                assert native_threads() == made
                for reaping in reapings:
                    assert reaping.result().outcome in BACK
                assert native_threads() == made


def test_a_name_tells_whose_threads_they_are() -> None:
    with Reaper(threads=1, spares=1):
        names = native_threads().values()
        assert len(set(names)) == 3
        assert all(name.startswith("mrelease/") for name in names)


def test_all_their_signals_are_blocked_and_the_caller_s_are_not() -> None:
    def blocked(tid: int) -> int:
        status = Path(f"/proc/self/task/{tid}/status").read_text()
        fields = dict(line.split(":\t") for line in status.splitlines())
        return int(fields["SigBlk"], 16)

    before = blocked(threading.get_native_id())
    # All but SIGKILL and SIGSTOP, which cannot be, and the two that the C
    # library keeps for itself.
    every = sum(
        1 << (number - 1)
        for number in signal.valid_signals()
        if number not in (signal.SIGKILL, signal.SIGSTOP)
    )
    with Reaper(threads=1, spares=1):
        for tid in native_threads():
            assert blocked(tid) & every == every
        assert blocked(threading.get_native_id()) == before


def test_signals_reach_the_main_thread_while_a_reaper_is_there() -> None:
    def run() -> int:
        heard = 0

        def hear(*_: object) -> None:
            nonlocal heard
            heard += 1

        signal.signal(signal.SIGUSR1, hear)
        with Reaper():
            for _ in range(100):
                os.kill(os.getpid(), signal.SIGUSR1)
        return heard

    assert kernel_errors.in_child(run) == 100


def test_the_stacks_are_small() -> None:
    """So that a Reaper costs little where all memory is locked."""

    def address_space() -> int:
        return int(victims.status_of(os.getpid())["VmSize"].split()[0]) * 1024

    def run() -> int:
        with Reaper(threads=1, spares=0):
            pass
        before = address_space()
        with Reaper(threads=1, spares=31):
            return address_space() - before

    # 32 threads with stacks of the default size would be 256 MiB.
    assert kernel_errors.in_child(run) < 32 * victims.MIB


# ----------------------------------------------------------- the scheduling


@needs_nice
@pytest.mark.parametrize("policy", ["auto", "fifo"])
def test_real_time_for_the_threads_alone(policy: Policy) -> None:
    before = others()
    with Reaper(threads=2, spares=1, policy=policy) as reaper:
        for tid in native_threads():
            assert scheduled(tid) == (os.SCHED_FIFO, 1, 0, True)
        got = reaper.scheduling
        assert (got.policy, got.priority, got.nice) == ("SCHED_FIFO", 1, 0)
        assert got.why == ""
        assert set(got.cpus) == os.sched_getaffinity(0)
        cpus = ", ".join(str(cpu) for cpu in got.cpus)
        assert str(got) == f"SCHED_FIFO 1 on CPUs {cpus}"
        check_unchanged(before)


@needs_nice
def test_nice_for_the_threads_alone() -> None:
    before = others()
    with Reaper(threads=2, spares=1, policy="nice") as reaper:
        for tid in native_threads():
            policy, priority, nice, _ = scheduled(tid)
            assert (policy, priority, nice) == (os.SCHED_OTHER, 0, -20)
        got = reaper.scheduling
        assert (got.policy, got.priority, got.nice) == ("SCHED_OTHER", 0, -20)
        assert got.why == ""
        check_unchanged(before)


def test_none_leaves_it_as_it_is() -> None:
    before = others()
    with Reaper(threads=2, spares=1, policy="none") as reaper:
        own = scheduled(threading.get_native_id())
        assert all(scheduled(tid) == own for tid in native_threads())
        got = reaper.scheduling
        assert (got.policy, got.priority) == ("SCHED_OTHER", 0)
        assert got.nice == own[2]
        assert got.why == ""
        check_unchanged(before)


def test_none_of_a_caller_with_another_nice_is_that_nice() -> None:
    def run() -> tuple[int, set[Scheduled]]:
        os.nice(7)
        with Reaper(threads=1, spares=0, policy="none") as reaper:
            return reaper.scheduling.nice, {
                scheduled(tid) for tid in native_threads()
            }

    nice, seen = kernel_errors.in_child(run)
    assert nice == 7
    assert seen == {(os.SCHED_OTHER, 0, 7, False)}


@needs_nice
def test_a_caller_with_real_time_is_not_lowered() -> None:
    def run() -> tuple[str, int, set[tuple[int, int]]]:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(9))
        with Reaper(threads=1, spares=0) as reaper:
            got = reaper.scheduling
            return (
                got.policy,
                got.priority,
                {scheduled(tid)[:2] for tid in native_threads()},
            )

    policy, priority, seen = kernel_errors.in_child(run)
    assert (policy, priority) == ("SCHED_RR", 9)
    assert seen == {(os.SCHED_RR, 9)}


@needs_nice
def test_a_child_forked_by_a_program_with_a_reaper_is_ordinary() -> None:
    with Reaper():
        own = kernel_errors.in_child(lambda: scheduled(0))
    assert own[:3] == scheduled(0)[:3]


@pytest.mark.needs("seccomp")
@needs_nice
def test_auto_says_why_it_is_no_better(answered: Answered) -> None:
    def run() -> tuple[mrelease.Scheduling, str]:
        with Reaper(threads=1, spares=0) as reaper:
            return reaper.scheduling, str(reaper.scheduling)

    # EPERM for all: what the caller has it is then.
    got, line = answered({"sched_setattr": 1}).run(run)
    assert got.policy == "SCHED_OTHER"
    assert "SCHED_FIFO is not allowed" in got.why
    assert "CAP_SYS_NICE or RLIMIT_RTPRIO" in got.why
    assert line.endswith(got.why)


@pytest.mark.needs("root")
@pytest.mark.parametrize("policy", ["fifo", "nice"])
def test_an_explicit_policy_that_may_not_be_had_is_permission_error(
    policy: Policy, unprivileged: Unprivileged
) -> None:
    def run() -> tuple[str, int, int]:
        if max(resource.getrlimit(resource.RLIMIT_NICE)[0] - 1,
               resource.getrlimit(resource.RLIMIT_RTPRIO)[0]) > 0:  # fmt: skip
            pytest.skip("RLIMIT_NICE or RLIMIT_RTPRIO allow it")
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(PermissionError) as caught:
            Reaper(policy=policy)
        # And nothing is left of it.
        left = len(os.listdir("/proc/self/fd")) - fds
        return str(caught.value), left, len(native_threads())

    text, fds, threads = unprivileged(run)
    assert f"policy='{policy}'" in text
    assert "CAP_SYS_NICE or RLIMIT_" in text
    assert (fds, threads) == (0, 0)


@pytest.mark.needs("root")
def test_auto_of_an_unprivileged_user_works_and_says_why(
    unprivileged: Unprivileged,
) -> None:
    def run() -> tuple[mrelease.Scheduling, mrelease.Release]:
        with victims.asleep(4) as victim, Reaper() as reaper:
            return reaper.scheduling, reaper.kill(victim.pid).result()

    got, release = unprivileged(run)
    assert release.freed
    if got.policy != "SCHED_FIFO":
        assert "SCHED_FIFO is not allowed (Operation not permitted)" in got.why


def test_the_scheduling_is_a_value() -> None:
    with Reaper(threads=1, spares=0) as reaper:
        got = reaper.scheduling
        assert got.as_dict()["cpus"] == list(got.cpus)
        assert got == reaper.scheduling
        assert hash(got) == hash(reaper.scheduling)
        assert eval(repr(got), vars(mrelease)) == got
        with pytest.raises(AttributeError):
            reaper.scheduling = got  # type: ignore[misc]


# ------------------------------------------------------------------ the CPUs


def test_cpus_for_the_threads_alone() -> None:
    own = os.sched_getaffinity(0)
    before = others()
    for cpu in sorted(own):
        with Reaper(cpus=[cpu, cpu]) as reaper:
            assert {
                frozenset(os.sched_getaffinity(tid))
                for tid in native_threads()
            } == {frozenset({cpu})}
            assert reaper.scheduling.cpus == (cpu,)
            check_unchanged(before)


def test_cpus_are_taken_from_any_iterable() -> None:
    own = sorted(os.sched_getaffinity(0))
    with Reaper(cpus=(cpu for cpu in own)) as reaper:
        assert list(reaper.scheduling.cpus) == own
    with Reaper(cpus=set(own)) as reaper:
        assert list(reaper.scheduling.cpus) == own


def test_by_default_the_cpus_are_the_caller_s() -> None:
    cpu = max(os.sched_getaffinity(0))

    def run() -> tuple[tuple[int, ...], set[frozenset[int]]]:
        os.sched_setaffinity(0, {cpu})
        with Reaper() as reaper:
            return reaper.scheduling.cpus, {
                frozenset(os.sched_getaffinity(tid))
                for tid in native_threads()
            }

    assert kernel_errors.in_child(run) == ((cpu,), {frozenset({cpu})})


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.needs("release")
def test_on_one_cpu_all_of_it_works(threads: int) -> None:
    cpu = min(os.sched_getaffinity(0))

    def run(pids: list[int]) -> list[mrelease.Release]:
        os.sched_setaffinity(0, {cpu})
        with Reaper(threads=2) as reaper:
            results = [reaper.kill(pid).result() for pid in pids[:5]]
            reapings = reaper.kill_many(pids[5:])
            return results + [reaping.result() for reaping in reapings]

    with ExitStack() as stack:
        made = [
            stack.enter_context(victims.asleep(8, threads=threads))
            for _ in range(10)
        ]
        results = kernel_errors.in_child(run, [victim.pid for victim in made])
        for victim, result in zip(made, results, strict=True):
            assert result.outcome in BACK, result
            assert result.freed, result
            assert result.signalled is not None
            assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_on_one_cpu_all_are_killed_before_one_is_released() -> None:
    cpu = min(os.sched_getaffinity(0))

    def run(pids: list[int]) -> list[mrelease.Release]:
        os.sched_setaffinity(0, {cpu})
        with Reaper(policy="fifo") as reaper:
            reapings = reaper.kill_many(pids)
            return [reaping.result() for reaping in reapings]

    with ExitStack() as stack:
        # Idle: on a slow machine others end between two signals.
        made = [
            stack.enter_context(victims.asleep(32, idle=True))
            for _ in range(8)
        ]
        for victim in made:
            os.sched_setaffinity(victim.pid, {cpu})
        results = kernel_errors.in_child(run, [victim.pid for victim in made])
        last = max(cast("float", result.signalled) for result in results)
        released = [
            result.released
            for result in results
            if result.released is not None
        ]
        assert released, results
        assert min(released) > last, results


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_the_starved_of_a_batch_are_raised_once_all_are_released() -> None:
    with ExitStack() as stack:
        made = [
            stack.enter_context(victims.asleep(16, idle=True))
            for _ in range(30)
        ]
        made.append(stack.enter_context(victims.starved(16)))
        with Reaper(policy="fifo") as reaper:
            reapings = reaper.kill_many(
                [victim.pid for victim in made], timeout=10
            )
            results = [reaping.result() for reaping in reapings]
        for result in results:
            assert result.outcome in BACK, result
            assert result.freed, result
            assert result.exited is not None or result.raised, result
        for victim in made:
            assert victim.wait() == -signal.SIGKILL


# ---------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"threads": 0}, ValueError, "threads must be from 1 to 1024, not 0"),
        ({"threads": -1}, ValueError, "threads must be from 1 to 1024"),
        ({"threads": 1025}, ValueError, "threads must be from 1 to 1024"),
        ({"threads": 2**70}, ValueError, "threads must be from 1 to 1024"),
        ({"threads": True}, TypeError, "threads must be an int, not bool"),
        ({"threads": 1.0}, TypeError, "threads must be an int, not float"),
        ({"threads": "1"}, TypeError, "threads must be an int, not str"),
        ({"spares": -1}, ValueError, "spares must be from 0 to 1024"),
        ({"spares": 1025}, ValueError, "spares must be from 0 to 1024"),
        ({"spares": None}, TypeError, "spares must be an int, not NoneType"),
        ({"cpus": []}, ValueError, "cpus must not be empty"),
        ({"cpus": [-1]}, ValueError, "there is no CPU -1"),
        ({"cpus": [2**70]}, ValueError, "there is no CPU"),
        ({"cpus": [1023]}, ValueError, "none of these CPUs may be used"),
        ({"cpus": [True]}, TypeError, "a CPU must be an int, not bool"),
        ({"cpus": ["0"]}, TypeError, "a CPU must be an int, not str"),
        ({"cpus": 0}, TypeError, "not iterable"),
        ({"policy": "best"}, ValueError, "policy must be 'auto', 'fifo', 'ni"),
        ({"policy": None}, ValueError, "policy must be .* not None"),
        ({"policy": 1}, ValueError, "policy must be .* not 1"),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_refused_and_leaves_nothing(
    arguments: dict[str, object], error: type[Exception], text: str
) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=text) as caught:
        cast("Callable[..., Reaper]", Reaper)(**arguments)
    assert type(caught.value) is error
    assert native_threads() == {}
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("policy", [[], {}], ids=repr)
def test_a_policy_that_cannot_be_looked_up_is_a_type_error(
    policy: object,
) -> None:
    with pytest.raises((TypeError, ValueError)):
        Reaper(policy=cast("Policy", policy))


@pytest.mark.needs("root")
def test_where_there_can_be_no_thread_it_says_so(
    unprivileged: Unprivileged,
) -> None:
    def run() -> tuple[str, int, int]:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BlockingIOError) as caught:
            Reaper()
        left = len(os.listdir("/proc/self/fd")) - fds
        return str(caught.value), left, len(native_threads())

    text, fds, threads = unprivileged(run)
    assert "cannot start the threads of a Reaper (RLIMIT_NPROC" in text
    assert (fds, threads) == (0, 0)


@pytest.mark.parametrize("left", range(12))
def test_where_there_are_no_fds_it_says_so_and_leaves_nothing(
    left: int,
) -> None:
    """Wherever on the way they run out."""

    def run() -> tuple[str, int, int]:
        with Reaper(threads=1, spares=1):
            pass
        kernel_errors.leave_files(64)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        fds = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (limits[0] - 64 + left, limits[1])
        )
        text = ""
        try:
            Reaper(threads=1, spares=1).close()
        except OSError as error:
            text = str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return (
            text,
            len(os.listdir("/proc/self/fd")) - fds,
            len(native_threads()),
        )

    text, fds, threads = kernel_errors.in_child(run)
    assert "Too many open files" in text or left >= 4
    assert text == "" or left < 8
    assert (fds, threads) == (0, 0)


# ----------------------------------------------------- from many threads


@pytest.mark.needs("release")
def test_8_threads_kill_with_one_reaper(rounds: Callable[[int], int]) -> None:
    for turn in range(rounds(20)):
        with ExitStack() as stack:
            reaper = stack.enter_context(Reaper(threads=1 + turn % 3))
            made = [
                stack.enter_context(victims.asleep(2, threads=1 + i % 3))
                for i in range(24)
            ]
            results: list[mrelease.Release] = []
            barrier = threading.Barrier(8)

            def work(
                i: int,
                reaper: Reaper = reaper,
                made: list[victims.Process] = made,
                results: list[mrelease.Release] = results,
                barrier: threading.Barrier = barrier,
            ) -> None:
                mine = [victim.pid for victim in made[i::8]]
                barrier.wait()
                reapings = [reaper.kill(mine[0]), *reaper.kill_many(mine[1:])]
                results += [reaping.result() for reaping in reapings]

            threads = [
                threading.Thread(target=work, args=(i,)) for i in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(result.pid for result in results) == sorted(
                victim.pid for victim in made
            )
            for result in results:
                assert result.outcome in BACK, result
                assert result.freed, result
            for victim in made:
                assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.needs("release")
def test_the_same_victim_is_killed_many_times_at_once(threads: int) -> None:
    with victims.held(16, threads=threads) as victim, Reaper() as reaper:
        reapings = [reaper.kill(victim.pid) for _ in range(20)]
        for reaping in reapings:
            release = reaping.result()
            assert release.outcome is Outcome.RELEASED, release
        assert victim.rss_anon() == 0


# ---------------------------------------------------------------- never late


@pytest.mark.parametrize("threads", [1, 8, 64])
def test_the_release_comes_no_later_than_with_kill(
    threads: int, rounds: Callable[[int], int]
) -> None:
    """What the call-ahead is for; the figures are the benchmark's.

    A release is too late when the victim is past exit_mm() before the call:
    ESRCH, and then it is EXITED. Here each way kills as many, in turn; a busy
    machine adds noise, so only a gross difference fails.
    """
    count = max(12, rounds(60))
    late = {"kill": 0, "Reaper": 0}
    signalled: dict[str, list[float]] = {"kill": [], "Reaper": []}
    with Reaper() as reaper:
        for number in range(2 * count):
            with victims.asleep(16, threads=threads) as victim:
                way = "Reaper" if number % 2 else "kill"
                if way == "kill":
                    release = mrelease.kill(victim.pid, timeout=30)
                else:
                    release = reaper.kill(victim.pid, timeout=30).result()
                assert release.freed, release
                assert release.signalled is not None
                late[way] += release.outcome is not Outcome.RELEASED
                signalled[way].append(release.signalled)
    print(
        f"\n{threads} threads, {count} kills each, too late: "
        + ", ".join(
            f"{way} {late[way] / count:.0%} (SIGKILL after "
            f"{statistics.median(signalled[way]) * 1e6:.0f} us)"
            for way in late
        )
    )
    assert late["Reaper"] <= late["kill"] + count // 2


def test_submitting_a_kill_takes_little_time(
    rounds: Callable[[int], int],
) -> None:
    took = []
    with Reaper() as reaper:
        for _ in range(rounds(60)):
            with victims.asleep(4) as victim:
                begun = time.perf_counter()
                reaping = reaper.kill(victim.pid)
                took.append(time.perf_counter() - begun)
                assert reaping.result().freed
    print(
        f"\nReaper.kill(): median {statistics.median(took) * 1e6:.0f} us, "
        f"worst {max(took) * 1e3:.1f} ms"
    )
    assert statistics.median(took) < 0.05
