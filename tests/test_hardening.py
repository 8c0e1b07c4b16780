"""harden(): what the kernel says was done, what was not, and undo()."""

from __future__ import annotations

import codecs
import copy
import ctypes
import errno
import json
import mmap
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest

import kernel_errors
import victims
from cgroups import Unavailable
from kernel_errors import in_child
from mrelease import Hardening, harden
from test_limits import take_away_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conftest import Unprivileged
    from mrelease.hardening import Step

    Answered = Callable[
        [Mapping[str, kernel_errors.Rule]], kernel_errors.answered
    ]
    T = TypeVar("T")

# Loaded now, as resource is: an ordinary user may not be able to read
# Python's files.
codecs.lookup("ascii")

KIB = 1024
MIB = 1024 * KIB
INFINITY = resource.RLIM_INFINITY
WALL = 0x40000000  # wait for children that send no SIGCHLD too
STEPS = ("memory", "oom", "scheduling", "warm_up")
ORDINARY = (os.SCHED_OTHER, 0)

_libc = ctypes.CDLL(None, use_errno=True)

CAP_IPC_LOCK, CAP_SYS_NICE, CAP_SYS_RESOURCE = 14, 23, 24
NAMES = {14: "CAP_IPC_LOCK", 23: "CAP_SYS_NICE", 24: "CAP_SYS_RESOURCE"}


def has(capability: int) -> bool:
    effective = int(victims.status_of(os.getpid())["CapEff"], 16)
    return bool(effective >> capability & 1)


def need(*capabilities: int) -> None:
    for capability in capabilities:
        if not has(capability):
            raise Unavailable(f"needs {NAMES[capability]}")


class State(NamedTuple):
    """What the kernel says of this process and thread."""

    locked: int
    oom: int
    scheduling: tuple[int, int]


def locked() -> int:
    return int(victims.status_of(os.getpid())["VmLck"].split()[0]) * KIB


def oom() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


def set_oom(value: int) -> None:
    Path("/proc/self/oom_score_adj").write_text(str(value))


def scheduling() -> tuple[int, int]:
    """Policy with flags, and nice."""
    return (
        os.sched_getscheduler(0),
        os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
    )


def state() -> State:
    return State(locked(), oom(), scheduling())


FIFO = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK


def only(name: str) -> Step:
    """This step alone."""
    found = harden(**{step: step == name for step in STEPS})
    for step in found.steps:
        assert (step.status == "skipped") is (step.name != name)
    taken: Step = getattr(found, name)
    assert taken.name == name
    return taken


def as_nobody(
    function: Callable[[], T], limits: dict[int, int] | None = None
) -> T:
    """In a child without rights, with these limits (soft and hard)."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def run() -> T:
        # An ordinary limit of the stack, whatever it is here.
        wanted = {resource.RLIMIT_STACK: 8 * MIB, **(limits or {})}
        for limit, value in wanted.items():
            hard = resource.getrlimit(limit)[1]
            if hard != INFINITY and (value == INFINITY or value > hard):
                need(CAP_SYS_RESOURCE)
            resource.setrlimit(limit, (value, value))
        kernel_errors.drop_privileges()
        return function()

    return in_child(run)


NO_LIMIT = {resource.RLIMIT_MEMLOCK: INFINITY}

# -------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("value", [1, 0, None, "yes", [True]])
def test_an_argument_that_is_no_bool_changes_nothing(
    name: str, value: object
) -> None:
    def run() -> None:
        before = state()
        arguments: dict[str, Any] = {name: value}
        with pytest.raises(TypeError, match=f"{name} must be a bool, not "):
            harden(**arguments)
        assert state() == before

    in_child(run)


def test_arguments_go_by_name_only() -> None:
    with pytest.raises(TypeError):
        harden(True)  # type: ignore[call-arg]


def test_without_any_step_nothing_is_done() -> None:
    def run() -> Hardening:
        before = state()
        found = harden(memory=False, oom=False, scheduling=False,
                       warm_up=False)  # fmt: skip
        assert state() == before
        assert [step.status for step in found.undo()] == ["skipped"] * 3
        return found

    found = in_child(run)
    assert [step.status for step in found.steps] == ["skipped"] * 4
    assert not any(step.changed for step in found.steps)


# -------------------------------------------------------- with all rights


@pytest.mark.needs("root")
def test_root_gets_all_of_it_and_undo_puts_all_back() -> None:
    need(CAP_IPC_LOCK, CAP_SYS_NICE)

    def run() -> tuple[State, Hardening, State, tuple[Step, ...], State]:
        before = state()
        found = harden()
        during = state()
        undone = found.undo()
        return before, found, during, undone, state()

    before, found, during, undone, after = in_child(run)
    assert before.locked == 0
    assert found.memory.status == "done"
    assert found.memory.before == 0
    assert isinstance(found.memory.now, int | float)
    assert during.locked >= found.memory.now > MIB
    assert found.scheduling.status == "done"
    assert during.scheduling[0] == FIFO
    assert during.oom == found.oom.now
    if has(CAP_SYS_RESOURCE):
        assert found.oom.status == "done"
        assert during.oom == -1000
    assert found.warm_up.status == "done"
    assert all(
        step.status == ("done" if getattr(found, step.name).changed
                        else "skipped")
        for step in undone
    )  # fmt: skip
    assert after == before


@pytest.mark.needs("root")
def test_what_is_mapped_later_is_locked_and_big_stacks_stay_away() -> None:
    need(CAP_IPC_LOCK)

    def run() -> None:
        rss = victims.status_of(os.getpid())
        assert only("memory").status == "done"
        before = locked()
        with mmap.mmap(-1, 256 * MIB) as later:
            assert locked() - before == 256 * MIB
            later[:1] = b"x"
        threading.stack_size(64 * MIB)
        stop = threading.Event()
        threads = [threading.Thread(target=stop.wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert locked() - before >= 256 * MIB
        now = victims.status_of(os.getpid())
        stop.set()
        for thread in threads:
            thread.join()
        grown = [int(s["VmRSS"].split()[0]) * KIB for s in (rss, now)]
        assert grown[1] - grown[0] < 32 * MIB, grown

    in_child(run)


@pytest.mark.needs("root")
def test_locked_pages_can_not_be_taken_away() -> None:
    need(CAP_IPC_LOCK)

    def run() -> None:
        with mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE) as early:
            early.madvise(mmap.MADV_DONTNEED)
            step = only("memory")
            with pytest.raises(OSError, match="Invalid argument"):
                early.madvise(mmap.MADV_DONTNEED)
            assert step.changed

    in_child(run)


# ------------------------------------------------- memory, without rights


def memory_of_nobody(limit: int) -> tuple[Step, int, int]:
    def run() -> tuple[Step, int, int]:
        step = only("memory")
        during = locked()
        # Whatever was done, memory can be had, and threads.
        with mmap.mmap(-1, 512 * MIB) as much:
            much[:1] = b"x"
            assert len(bytearray(64 * MIB)) == 64 * MIB
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            return step, during, locked()

    return as_nobody(run, {resource.RLIMIT_MEMLOCK: limit})


@pytest.mark.parametrize("limit", [0, 64 * KIB, 8 * MIB])
def test_a_small_limit_is_told_and_nothing_is_locked(limit: int) -> None:
    step, during, after = memory_of_nobody(limit)
    assert step.status == "not allowed"
    assert not step.changed
    assert step.why.startswith("RLIMIT_MEMLOCK is ")
    assert "CAP_IPC_LOCK" in step.why
    assert "LimitMEMLOCK=infinity" in step.why
    assert during == after == step.before == step.now == 0


def test_an_ample_limit_locks_what_there_is_and_not_what_comes() -> None:
    step, during, after = memory_of_nobody(4096 * MIB)
    assert step.status == "done", step
    assert step.changed
    assert "not what is mapped later" in step.why
    assert step.now == during > MIB
    assert after <= during


def test_without_a_limit_what_comes_is_locked_too() -> None:
    step, during, after = memory_of_nobody(INFINITY)
    assert step.status == "done", step
    assert "mapped now or later" in step.why
    assert during > MIB
    assert after >= during + 512 * MIB


def test_mcl_future_with_a_limit_is_the_danger_that_it_is_said_to_be() -> None:
    def run() -> None:
        assert _libc.mlockall(1 | 2 | 4) == 0  # what harden() does not do
        with pytest.raises(OSError, match="temporarily unavailable"):
            mmap.mmap(-1, 4096 * MIB)

    as_nobody(run, {resource.RLIMIT_MEMLOCK: 4096 * MIB})


def test_a_stack_that_may_grow_beyond_the_limit_forbids_it() -> None:
    def tried(stack: int) -> Step:
        return as_nobody(
            lambda: only("memory"),
            {
                resource.RLIMIT_MEMLOCK: 4096 * MIB,
                resource.RLIMIT_STACK: stack,
            },
        )

    assert tried(8 * MIB).status == "done"
    assert tried(4096 * MIB).status == "not allowed"
    if resource.getrlimit(resource.RLIMIT_STACK)[1] == INFINITY:
        unlimited = tried(INFINITY)
        assert unlimited.status == "not allowed"
        assert "the main stack may grow without a limit" in unlimited.why


def test_a_capability_of_a_user_namespace_does_not_count() -> None:
    def run() -> Step:
        if _libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
            raise Unavailable("no user namespaces here")
        assert has(CAP_IPC_LOCK)
        return only("memory")

    step = as_nobody(run, {resource.RLIMIT_MEMLOCK: 8 * MIB})
    assert step.status == "not allowed"


@pytest.mark.needs("root")
def test_the_right_to_lock_should_not_be_given_up_later_or_undo_helps() -> (
    None
):
    need(CAP_IPC_LOCK)

    def run() -> None:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        if limit == INFINITY:
            limit = 8 * MIB
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        found = harden(oom=False, scheduling=False, warm_up=False)
        mmap.mmap(-1, 2 * limit).close()
        kernel_errors.drop_privileges()
        with pytest.raises(OSError, match="temporarily unavailable"):
            mmap.mmap(-1, 2 * limit)
        assert found.undo()[-1].status == "done"
        mmap.mmap(-1, 2 * limit).close()

    in_child(run)


def test_what_mlockall_has_locked_before_is_left_alone() -> None:
    def run() -> None:
        assert _libc.mlockall(1 | 2 | 4) == 0
        before = locked()
        found = harden(oom=False, scheduling=False, warm_up=False)
        assert found.memory.status == "done"
        assert "it was locked before" in found.memory.why
        assert not found.memory.changed
        found.undo()
        assert locked() >= before > 0

    as_nobody(run, NO_LIMIT)


def test_undo_tells_that_it_unlocks_what_mlock_had_locked() -> None:
    def run() -> None:
        with mmap.mmap(-1, MIB) as own:
            at = ctypes.addressof(ctypes.c_char.from_buffer(own))
            assert _libc.mlock(ctypes.c_void_p(at), MIB) == 0
            found = harden(oom=False, scheduling=False, warm_up=False)
            assert found.memory.before == MIB
            memory = found.undo()[-1]
            assert "also 1.0 MiB that were locked before" in memory.why
            assert locked() == 0
            del at
            import gc

            gc.collect()

    as_nobody(run, NO_LIMIT)


# --------------------------------------------------------------------- oom


def test_without_rights_the_oom_score_stays_and_it_says_so(
    unprivileged: Unprivileged,
) -> None:
    def run() -> tuple[int, Step, int]:
        return oom(), only("oom"), oom()

    before, step, after = unprivileged(run)
    if before == -1000:
        pytest.skip("the tests run with an oom_score_adj of -1000")
    assert after <= before
    if after == before:
        assert step.status == "not allowed"
        assert not step.changed
        assert "CAP_SYS_RESOURCE" in step.why
    assert (step.before, step.now) == (before, after)


def test_without_rights_the_lowest_is_found(
    unprivileged: Unprivileged,
) -> None:
    def run(high: int) -> tuple[int, Hardening, int, tuple[Step, ...], int]:
        lowest = oom()
        set_oom(high)
        found = harden(memory=False, scheduling=False, warm_up=False)
        during = oom()
        return lowest, found, during, found.undo(), oom()

    for high in (1000, 777, oom() + 1):
        lowest, found, during, undone, after = unprivileged(run, high)
        assert found.oom.status == "done", found
        assert found.oom.changed
        assert during == found.oom.now
        assert during <= lowest
        assert f"the lowest that is allowed, was {high}" in found.oom.why
        assert undone[1].status == "done"
        assert after == high


@pytest.mark.needs("root")
def test_the_lowest_that_root_has_set_is_found() -> None:
    need(CAP_SYS_RESOURCE)

    def run() -> tuple[Step, int]:
        set_oom(-900)
        kernel_errors.drop_privileges()
        set_oom(300)
        return only("oom"), oom()

    step, now = in_child(run)
    assert (step.status, step.before, step.now, now) == (
        "done", 300, -900, -900
    )  # fmt: skip


@pytest.mark.needs("root")
def test_children_inherit_the_protection_and_may_drop_it() -> None:
    need(CAP_SYS_RESOURCE)

    def child() -> tuple[int, int]:
        before = oom()
        kernel_errors.drop_privileges()
        set_oom(0)
        return before, oom()

    def run() -> tuple[int, int]:
        assert only("oom").status == "done"
        return in_child(child)

    assert in_child(run) == (-1000, 0)


def test_a_score_that_somebody_else_set_since_is_not_undone(
    unprivileged: Unprivileged,
) -> None:
    def run() -> tuple[tuple[Step, ...], int]:
        set_oom(500)
        found = harden(memory=False, scheduling=False, warm_up=False)
        set_oom(700)
        return found.undo(), oom()

    undone, after = unprivileged(run)
    assert undone[1].status == "skipped"
    assert "700, which harden() did not set" in undone[1].why
    assert after == 700


# -------------------------------------------------------------- scheduling


class Scheduled(NamedTuple):
    step: Step
    during: tuple[int, int]
    undone: Step
    after: tuple[int, int]


def schedule() -> Scheduled:
    found = harden(memory=False, oom=False, warm_up=False)
    during = scheduling()
    undone = found.undo()[0]
    return Scheduled(found.scheduling, during, undone, scheduling())


def ladder(**limits: int) -> Scheduled:
    none = {"NICE": 0, "RTPRIO": 0, "RTTIME": INFINITY}
    return as_nobody(
        schedule,
        {
            getattr(resource, f"RLIMIT_{name}"): value
            for name, value in {**none, **limits}.items()
        },
    )


def test_without_rights_the_thread_stays_as_it_is() -> None:
    found = ladder()
    assert found.step.status == "not allowed"
    assert "CAP_SYS_NICE" in found.step.why
    assert not found.step.changed
    assert found.during == found.after == ORDINARY


def test_a_limit_for_nice_gives_the_best_nice() -> None:
    found = ladder(NICE=30)
    assert found.step.status == "done"
    other = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
    assert found.during == (other, -10)
    assert str(found.step.now) == "SCHED_OTHER nice -10"
    # sched(7): the flag stays, which is told.
    assert found.undone.status == "done"
    assert "reset-on-fork stays without CAP_SYS_NICE" in found.undone.why
    assert found.after == (other, 0)


def test_a_limit_for_real_time_gives_that() -> None:
    found = ladder(RTPRIO=1)
    assert found.step.status == "done"
    assert found.during[0] == FIFO
    assert str(found.step.now) == "SCHED_FIFO 1"
    assert found.after == (os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, 0)


def test_where_real_time_may_kill_the_thread_it_is_not_taken() -> None:
    found = ladder(RTPRIO=1, NICE=40, RTTIME=200_000)
    assert found.step.status == "done"
    assert found.during == (os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, -20)
    assert "not real-time since RLIMIT_RTTIME is set" in found.step.why
    found = ladder(RTPRIO=1, RTTIME=200_000)
    assert found.step.status == "not allowed"
    assert "RLIMIT_RTTIME" in found.step.why
    assert found.during == ORDINARY


@pytest.mark.needs("root")
@pytest.mark.parametrize("policy", ["SCHED_BATCH", "SCHED_IDLE"])
def test_undo_puts_back_other_policies(policy: str) -> None:
    need(CAP_SYS_NICE)

    def run() -> Scheduled:
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        return schedule()

    found = in_child(run)
    assert found.during[0] == FIFO
    assert found.after == (getattr(os, policy), 7)
    assert str(found.step.before) == f"{policy} nice 7"


@pytest.mark.needs("root")
def test_a_real_time_thread_is_left_as_it_is() -> None:
    need(CAP_SYS_NICE)

    def run() -> tuple[Scheduled, int]:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(7))
        return schedule(), os.sched_getparam(0).sched_priority

    found, priority = in_child(run)
    assert found.step.status == "done"
    assert not found.step.changed
    assert found.during[0] == found.after[0] == os.SCHED_RR
    assert priority == 7


@pytest.mark.needs("root")
def test_other_threads_and_children_stay_ordinary() -> None:
    need(CAP_SYS_NICE)

    def run() -> None:
        seen: list[tuple[int, int]] = []
        go = threading.Event()

        def look() -> None:
            go.wait()
            seen.append(scheduling())

        early = threading.Thread(target=look)
        early.start()
        assert only("scheduling").status == "done"
        late = threading.Thread(target=look)
        late.start()
        go.set()
        early.join()
        late.join()
        assert seen == [ORDINARY] * 2
        assert in_child(scheduling) == ORDINARY
        assert scheduling()[0] == FIFO

    in_child(run)


@pytest.mark.needs("root")
def test_from_another_thread_its_scheduling_is_not_undone() -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    def run() -> None:
        found = harden(warm_up=False)
        undone: list[Step] = []
        seen: list[tuple[int, int]] = []

        def other() -> None:
            undone.extend(found.undo())
            seen.append(scheduling())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert undone[0].status == "not available"
        assert f"thread {threading.get_native_id()} was" in undone[0].why
        assert undone[2].status == "done"
        assert locked() == 0
        assert seen == [ORDINARY]
        assert scheduling()[0] == FIFO
        assert found.undo()[0].status == "done"
        assert scheduling() == ORDINARY

    in_child(run)


@pytest.mark.needs("root")
def test_a_second_thread_can_be_hardened_too() -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    def run() -> None:
        before = state()
        found: list[Hardening] = []
        seen: list[tuple[int, int]] = []

        def other() -> None:
            with harden() as inner:
                found.append(inner)
                seen.append(scheduling())
            seen.append(scheduling())

        with harden() as outer:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert seen[0][0] == FIFO
            assert seen[1] == ORDINARY
            # What the process has is not the second one's to take away.
            assert locked() > 0
            assert scheduling()[0] == FIFO
            assert oom() == outer.oom.now
        assert found[0].warm_up.status == "done"
        assert state() == before

    in_child(run)


# -------------------------------------------------------- twice, and forks


@pytest.mark.needs("root")
def test_the_second_of_two_changes_nothing_and_undoes_nothing() -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    def run() -> None:
        before = state()
        first = harden()
        during = state()
        second = harden()
        assert not any(step.changed for step in second.steps)
        for step in second.steps[:3]:
            assert step.status == getattr(first, step.name).status
        assert {step.status for step in second.undo()} == {"skipped"}
        now = state()
        assert now[1:] == during[1:]
        assert now.locked > 0
        first.undo()
        assert state() == before
        again = first.undo()
        assert {step.status for step in again} == {"skipped"}, again
        assert state() == before
        assert harden().memory.changed

    in_child(run)


@pytest.mark.needs("root")
def test_in_a_forked_child_undo_touches_only_what_is_its_own() -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    def run() -> None:
        set_oom(min(1000, oom() + 5))
        high = oom()
        found = harden()
        during = state()

        def child() -> None:
            assert locked() == 0
            assert scheduling() == ORDINARY
            assert oom() == during.oom
            undone = found.undo()
            assert undone[0].status == "not available"
            assert undone[1].status == "done"
            assert undone[2].status == "skipped"
            assert oom() == high
            assert scheduling() == ORDINARY

        in_child(child)
        now = state()
        assert now[1:] == during[1:]
        assert now.locked > 0

    in_child(run)


@pytest.mark.needs("root")
def test_with_undoes_at_the_end_whatever_happens() -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    def run() -> None:
        before = state()
        hardening = harden()
        assert state() != before
        with hardening as same:
            assert same is hardening
        assert state() == before
        with pytest.raises(KeyError), harden():
            raise KeyError
        assert state() == before

    in_child(run)


# ----------------------------------------------------------------- warm-up


def test_the_warm_up_says_how_long_it_took() -> None:
    def run() -> tuple[Step, float]:
        begun = time.monotonic()
        return only("warm_up"), (time.monotonic() - begun) * 1e3

    step, most = in_child(run)
    assert step.status == "done"
    assert isinstance(step.now, float)
    assert 0 < step.now <= most
    assert f"{step.now:.1f} ms" in step.why
    assert not step.changed


@pytest.mark.parametrize("how", ["handled", "ignored"])
def test_the_program_does_not_notice_the_child(how: str) -> None:
    def run() -> None:
        heard: list[int] = []
        if how == "ignored":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGCHLD, lambda n, _: heard.append(n))
        files = sorted(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert only("warm_up").status == "done"
            with pytest.raises(ChildProcessError):
                os.waitpid(-1, os.WNOHANG | WALL)
        assert heard == []
        assert sorted(os.listdir("/proc/self/fd")) == files
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()

    in_child(run)


def test_it_works_beside_threads_that_fork_and_wait_for_any_child(
    rounds: Callable[[int], int],
) -> None:
    turns = rounds(100)

    def run() -> list[object]:
        stop = threading.Event()
        strangers: list[int] = []

        def waits() -> None:
            while not stop.is_set():
                try:
                    pid, _ = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    pid = 0
                if pid:
                    strangers.append(pid)
                time.sleep(0.0001)

        def works() -> None:
            while not stop.is_set():
                bytearray(MIB)

        threads = [threading.Thread(target=t) for t in (waits, works, works)]
        for thread in threads:
            thread.start()
        found: list[object] = [only("warm_up").status for _ in range(turns)]
        stop.set()
        for thread in threads:
            thread.join()
        assert strangers == []
        return found

    assert in_child(run) == ["done"] * turns


@pytest.mark.any_kernel
def test_several_threads_warm_up_at_once() -> None:
    def run() -> list[object]:
        found: list[object] = []

        def work() -> None:
            found.extend(only("warm_up").status for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    assert in_child(run) == ["done"] * 60


FAULTS = """
import ctypes, os, resource, sys
import mrelease

libc = ctypes.CDLL(None)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
DONTNEED = 4

def forget_code():
    # As when memory is short, but from the page cache: clean code only.
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file]
    refused = 0
    for where, rights, *_, name in lines:
        if rights == "r-xp" and name.startswith("/"):
            low, high = (int(x, 16) for x in where.split("-"))
            refused += libc.madvise(low, high - low, DONTNEED) != 0
    return refused

def faults():
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_minflt + used.ru_majflt

def measure(function, pid):
    before = faults()
    function(pid)
    return faults() - before

refused = forget_code()
if sys.argv[1] == "warm":
    done = mrelease.harden(memory=False, oom=False, scheduling=False)
elif sys.argv[1] == "locked":
    done = mrelease.harden(oom=False, scheduling=False)
    if done.memory.status == "done":
        refused = forget_code()
for _ in range(3):  # what measuring needs is not the kill's
    measure(lambda pid: None, 0)
print(refused, measure(mrelease.kill, int(sys.argv[2])))
"""


def test_after_the_warm_up_a_kill_has_nearly_no_page_faults() -> None:
    found = {}
    for how in ("cold", "warm", "locked"):
        with victims.asleep(4) as victim:
            done = subprocess.run(
                [sys.executable, "-c", FAULTS, how, str(victim.pid)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
            )  # fmt: skip
            assert done.stderr == ""
            refused, count = map(int, done.stdout.split())
            found[how] = refused, count
            assert victim.wait() == -signal.SIGKILL
    print(found)
    assert found["cold"][0] == found["warm"][0] == 0
    # What is left is of the forks: first writes to pages that they had marked
    # copy-on-write.  With the children gone they are not copied, so they need
    # no memory.
    assert found["warm"][1] <= 3, found
    assert found["locked"][1] <= 3, found
    assert found["cold"][1] >= found["warm"][1] + 5, found
    if has(CAP_IPC_LOCK):
        # The code is locked: it cannot be taken away any more.
        assert found["locked"][0] > 0


@pytest.mark.needs("root")
def test_the_init_of_a_new_pid_namespace_is_not_the_child_to_kill() -> None:
    def run() -> None:
        if _libc.unshare(0x20000000) != 0:  # CLONE_NEWPID
            raise Unavailable("no pid namespaces here")
        step = only("warm_up")
        assert step.status == "not available"
        assert "would be the init" in step.why
        with kernel_errors.Job(lambda: time.sleep(60)) as init:
            assert only("warm_up").status == "done"
            assert in_child(lambda: 1) == 1
            init.signal(signal.SIGKILL)

    in_child(run)


def test_an_audit_hook_that_refuses_is_told_and_no_child_is_left() -> None:
    def run() -> Step:
        heard: list[str] = []

        def refuse(event: str, _: object) -> None:
            if event == "mrelease.kill":
                heard.append(event)
                raise ValueError("not today")

        sys.addaudithook(refuse)
        step = only("warm_up")
        assert heard == ["mrelease.kill"]
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG | WALL)
        return step

    step = in_child(run)
    assert step.status == "not available"
    assert step.why == "ValueError: not today"


def test_an_audit_hook_that_refuses_all_is_told_and_nothing_raised() -> None:
    def run() -> Hardening:
        def refuse(event: str, _: object) -> None:
            if event != "object.__getattr__":
                raise ValueError("not today")

        sys.addaudithook(refuse)
        found = harden()
        found.undo()
        return found

    found = in_child(run)
    assert found.oom.status == found.warm_up.status == "not available"


# ---------------------------------------------- what the kernel may answer

ANSWERS = [
    ("mlockall", errno.EPERM, "memory", "not allowed"),
    ("mlockall", errno.ENOSYS, "memory", "not available"),
    ("mlockall", errno.EINVAL, "memory", "not available"),
    ("sched_setattr", errno.EPERM, "scheduling", "not allowed"),
    ("sched_setattr", errno.ENOSYS, "scheduling", "not available"),
    ("openat", errno.EPERM, "oom", "not allowed"),
    ("openat", errno.EACCES, "oom", "not allowed"),
    ("openat", errno.ENOSYS, "oom", "not available"),
    ("openat", errno.EMFILE, "oom", "not available"),
    ("write", errno.EPERM, "oom", "not allowed"),
    ("clone", errno.EAGAIN, "warm_up", "not allowed"),
    ("clone", errno.ENOSYS, "warm_up", "not available"),
    ("pidfd_open", errno.ENOSYS, "warm_up", "not available"),
    ("pidfd_send_signal", errno.EPERM, "warm_up", "not allowed"),
    ("process_mrelease", errno.ENOSYS, "warm_up", "done"),
]


@pytest.mark.needs("root")
@pytest.mark.parametrize(("call", "code", "name", "status"), ANSWERS)
def test_what_the_kernel_refuses_is_told_and_the_rest_is_done(
    answered: Answered, call: str, code: int, name: str, status: str
) -> None:
    need(CAP_SYS_NICE, CAP_IPC_LOCK)

    plain, found = in_child(harden), answered({call: code}).run(harden)
    step: Step = getattr(found, name)
    assert step.status == status, step
    if status != "done":
        assert not step.changed
        assert step.why
    for other in plain.steps:
        if other.name != name:
            assert getattr(found, other.name).status == other.status
    assert len(str(found).splitlines()) == 4


@pytest.mark.needs("root")
def test_without_mlock2_or_madvise_memory_is_still_judged(
    answered: Answered,
) -> None:
    for rules in ({"mlock2": errno.EPERM}, {"madvise": errno.EPERM}):
        step = answered(rules).run(only, "memory")
        assert step.status in ("done", "not allowed")


@pytest.mark.needs("root")
def test_undo_tells_what_the_kernel_refuses(answered: Answered) -> None:
    need(CAP_IPC_LOCK, CAP_SYS_NICE)

    def run() -> tuple[Step, ...]:
        return harden(oom=False, warm_up=False).undo()

    undone = answered({"munlockall": errno.EPERM}).run(run)
    assert [step.status for step in undone] == [
        "done", "skipped", "not allowed"
    ]  # fmt: skip


@pytest.mark.needs("root")
def test_without_proc_the_rest_is_done_and_undone() -> None:
    need(CAP_IPC_LOCK, CAP_SYS_NICE)

    def run() -> tuple[Hardening, tuple[Step, ...], tuple[Step, ...]]:
        take_away_proc()
        found = harden()
        assert scheduling()[0] == FIFO
        undone = found.undo()
        assert scheduling() == ORDINARY
        with mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE) as later:
            later.madvise(mmap.MADV_DONTNEED)  # EINVAL where it is locked
        return found, undone, found.undo()

    found, undone, again = in_child(run)
    assert found.memory.status == "done"
    assert found.memory.before is found.memory.now is None
    assert found.oom.status == "not available"
    assert "is /proc mounted?" in found.oom.why
    assert found.scheduling.status == "done"
    assert found.warm_up.status == "done"
    assert [s.status for s in undone] == ["done", "skipped", "done"]
    assert {s.status for s in again} == {"skipped"}


@pytest.mark.needs("root")
def test_without_proc_a_finite_limit_can_not_be_judged() -> None:
    def run() -> Step:
        take_away_proc()
        limit = 4096 * MIB
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        os.setresuid(65534, 65534, 65534)
        return only("memory")

    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] != INFINITY:
        need(CAP_SYS_RESOURCE)
    step = in_child(run)
    assert step.status == "not allowed"
    assert "/proc/thread-self/status cannot be read" in step.why


def test_without_a_free_file_descriptor_the_rest_is_done() -> None:
    def run() -> Hardening:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        found = harden()
        found.undo()
        return found

    found = in_child(run)
    assert found.oom.status == "not available"
    assert "Too many open files" in found.oom.why
    assert found.warm_up.status == "not available"


def test_where_no_process_may_be_made_it_says_so() -> None:
    def run() -> Step:
        return only("warm_up")

    step = as_nobody(run, {resource.RLIMIT_NPROC: 0})
    assert step.status == "not allowed"
    assert step.why.startswith("no child could be made: ")


def test_where_one_process_may_be_made_kill_is_warmed_up(
    answered: Answered,
) -> None:
    kernel = answered({"clone": [kernel_errors.ALLOW, errno.EAGAIN]})
    step = kernel.run(only, "warm_up")
    assert step.status == "done"
    assert step.why.endswith(
        f", without a Reaper: {os.strerror(errno.EAGAIN)}"
    )


# ------------------------------------------------------------------ values


def test_an_unprivileged_user_is_told_all_that_is_missing() -> None:
    found = as_nobody(
        harden, {resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_NICE: 0,
                 resource.RLIMIT_RTPRIO: 0}
    )  # fmt: skip
    print(found)
    assert [step.status for step in found.steps] == [
        "not allowed", "not allowed", "not allowed", "done"
    ]  # fmt: skip
    for step in found.steps[:3]:
        assert "grant CAP_" in step.why


def test_as_text_it_is_one_line_a_step() -> None:
    found = in_child(harden)
    print(found)
    lines = str(found).splitlines()
    assert len(lines) == 4
    for line, step in zip(lines, found.steps, strict=True):
        assert line == f"{step.name}: {step.status}: {step.why}"


def test_as_dict_is_ready_for_json() -> None:
    found = in_child(harden)
    told = found.as_dict()
    assert json.loads(json.dumps(told)) == told
    assert list(told) == list(STEPS)
    for name in STEPS:
        step = told[name]
        assert isinstance(step, dict)
        assert list(step) == [
            "name", "status", "why", "changed", "before", "now"
        ]  # fmt: skip
        assert step["name"] == name


def test_it_is_a_value() -> None:
    found = in_child(harden)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == found
        assert hash(twin) == hash(found)
        assert repr(twin) == repr(found)
    with pytest.raises(AttributeError, match="Hardening is immutable"):
        found.oom = found.memory
    with pytest.raises(AttributeError, match="Step is immutable"):
        found.oom.status = "done"
    with pytest.raises(AttributeError):
        del found.memory
