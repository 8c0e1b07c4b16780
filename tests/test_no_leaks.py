"""No leaks: fds, threads, references and memory stay flat.

Each function is called 100,000 times in a fresh interpreter, its ways to
succeed and its ways to fail in turn. The first third is the warm-up; in
the second half of the calls these must not grow:

- open file descriptors and threads: not by one,
- blocks of Python's allocator and bytes of the C heap: by no more than a
  few for all the calls,
- references to what all calls share (None, the classes, the module),
- resident memory: by less than half a MiB, so less than 11 bytes a call.

Less than 100,000 are: kill() of victims that can not end (20,000: each is
raised, which walks its threads), Victims that are not closed (20,000: a
warning each), support() (6,000: it reads four files in /proc), all with
probe=True (300: a child each, which on a busy machine is some ms), Reapers
(4,000: each starts its threads), kills by one (10,000: each goes through its
threads) and kills of real victims, which have to be started (500).

One fresh interpreter, without development mode, forks a child for each.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import heap
import kernel_errors
import mrelease
import victims
from mrelease import _mrelease

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.any_kernel

MANY = 100_000
# glibc keeps 7 chunks of a size for each thread that has freed some: what one
# thread has made and another freed. A job of a Reaper has less than 1 KiB.
CACHES = 7 * 4 * 1024
KILLED = (mrelease.Outcome.RELEASED, mrelease.Outcome.EXITED)

# ------------------------------------------------------------ the calls


class Case(NamedTuple):
    many: int
    """Of all its calls, which take turns."""
    good: list[Callable[[], object]]
    bad: list[Callable[[], object]]
    """Each raises one of FAILURES, each time."""
    caches: int = 0
    """Bytes of freed heap that the C library may keep for other threads."""


FAILURES = (
    OSError, TypeError, ValueError, OverflowError, KeyError, AttributeError
)  # fmt: skip


class BadFileno:
    def fileno(self) -> str:
        return "3"


class RaisingFileno:
    def fileno(self) -> int:
        raise KeyError("no fileno today")


class WithPid:
    def __init__(self, pid: object, returncode: object = None) -> None:
        self.pid = pid
        self.returncode = returncode


def process_mrelease(stack: ExitStack) -> Case:
    dying = stack.enter_context(victims.held(1, killed=True))
    alive = stack.enter_context(victims.asleep(1))
    victim = stack.enter_context(mrelease.Victim(alive.pid))
    call: Callable[..., None] = mrelease.process_mrelease
    return Case(MANY, [
        lambda: call(dying.pidfd),
        lambda: call(dying.pidfd, 0),
    ], [
        lambda: call(-1),
        lambda: call(alive.pidfd),
        lambda: call(victim),
        lambda: call(dying.pidfd, 1),
        lambda: call(0),
        call,
        lambda: call(1, 2, 3),
        lambda: call("1"),
        lambda: call(True),
        lambda: call(2**70),
        lambda: call(2**40),
        lambda: call(-1, -1),
        lambda: call(-1, 2**70),
        lambda: call(-1, "1"),
        lambda: call(BadFileno()),
        lambda: call(RaisingFileno()),
    ])  # fmt: skip


def pidfd_open(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    gone = victims.reaped_pid()
    call: Callable[..., _mrelease.Pidfd] = _mrelease.pidfd_open
    return Case(MANY, [
        lambda: call(alive.pid),  # closed with its last reference
        lambda: call(alive.pid).close(),
    ], [
        lambda: call(gone),
        lambda: call(0),
        lambda: call(2**40),
        lambda: call("1"),
        lambda: call(None),
    ])  # fmt: skip


def pidfd_dup(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    first = _mrelease.pidfd_open(alive.pid)
    closed = _mrelease.pidfd_open(alive.pid)
    closed.close()
    call: Callable[..., _mrelease.Pidfd] = _mrelease.pidfd_dup

    def each_method() -> None:
        copy = call(first)
        copy.fileno()
        copy.close()
        copy.close()

    return Case(MANY, [
        lambda: call(alive.pidfd),
        each_method,
    ], [
        lambda: call(-1),
        lambda: call("1"),
        lambda: call(True),
        lambda: call(closed),
        lambda: call(RaisingFileno()),
        closed.fileno,
    ])  # fmt: skip


def proc_is_ours(stack: ExitStack) -> Case:
    del stack
    return Case(MANY, [_mrelease.proc_is_ours], [])


def pidfd_state(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    zombie = stack.enter_context(victims.zombie(1))
    reaped = subprocess.Popen(["true"])
    fd = os.pidfd_open(reaped.pid)
    stack.callback(os.close, fd)
    reaped.wait()
    call: Callable[..., str] = _mrelease.pidfd_state
    assert [call(f) for f in (alive.pidfd, zombie.pidfd, fd)] == [
        "running", "ended", "reaped"
    ]  # fmt: skip
    return Case(MANY, [
        lambda: call(alive.pidfd),
        lambda: call(zombie.pidfd),
        lambda: call(fd),
    ], [
        lambda: call(-1),
        lambda: call("1"),
        lambda: call(RaisingFileno()),
    ])  # fmt: skip


def read_footprint(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    gone = victims.reaped_pid()
    call: Callable[..., object] = _mrelease.read_footprint
    return Case(MANY, [
        lambda: call(alive.pid),
    ], [
        lambda: call(gone),
        lambda: call(0),
        lambda: call(None),
    ])  # fmt: skip


def read_stat(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    dying = stack.enter_context(victims.held(1, killed=True))
    gone = victims.reaped_pid()
    call: Callable[..., object] = _mrelease.read_stat
    return Case(MANY, [
        lambda: call(alive.pid),
        lambda: call(dying.pid),
    ], [
        lambda: call(gone),
        lambda: call(-1),
        lambda: call(None),
    ])  # fmt: skip


def look_at_locks(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    threads = stack.enter_context(victims.asleep(1, threads=3))
    holder = stack.enter_context(victims.robust_holder(1))
    gone = victims.reaped_pid()
    call: Callable[..., str] = _mrelease.look_at_locks
    assert [call(v.pid) for v in (alive, threads, holder)] == [
        "free", "free", "held"
    ]  # fmt: skip
    return Case(MANY, [
        lambda: call(alive.pid),
        lambda: call(threads.pid),
        lambda: call(holder.pid),
        lambda: call(gone),
    ], [
        lambda: call(0),
        lambda: call(1.5),
    ])  # fmt: skip


def reap(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    zombie = stack.enter_context(victims.zombie(1))
    reaped = subprocess.Popen(["true"])
    fd = os.pidfd_open(reaped.pid)
    stack.callback(os.close, fd)
    reaped.wait()
    call: Callable[..., object] = _mrelease.reap

    def run(pidfd: object, pid: int, *, send: bool) -> object:
        now = time.monotonic_ns()
        return call(pidfd, pid, now, 0, 0, -1, True, send)

    return Case(MANY, [
        lambda: run(alive.pidfd, alive.pid, send=False),
        lambda: run(zombie.pidfd, zombie.pid, send=True),
        lambda: run(zombie.pidfd, zombie.pid, send=False),
        lambda: run(fd, reaped.pid, send=True),
        lambda: run(-1, reaped.pid, send=True),
    ], [
        lambda: run("1", reaped.pid, send=True),
        call,
        lambda: call(-1, 5, 0, 0, 2**70, -1, True, True),
    ])  # fmt: skip


def reap_with_a_hook_that_refuses(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))

    def refuse(event: str, args: tuple[object, ...]) -> None:
        if event == "mrelease.kill":
            raise ValueError(f"refused: {args}")

    sys.addaudithook(refuse)
    return Case(MANY, [], [lambda: mrelease.kill(alive.pid)])


def probe(stack: ExitStack) -> Case:
    del stack
    return Case(MANY, [lambda: _mrelease.probe(False)], [])


def probe_in_child(stack: ExitStack) -> Case:
    del stack
    return Case(300, [lambda: _mrelease.probe(True)], [])


def victim(stack: ExitStack) -> Case:
    """Making and closing, and every way in which it is refused."""
    alive = stack.enter_context(victims.asleep(1))
    gone = victims.reaped_pid()
    started = alive.started()
    ended = subprocess.Popen(["true"])
    ended.wait()
    make: Callable[..., mrelease.Victim] = mrelease.Victim

    def with_statement() -> None:
        with make(alive.pid, started=started) as made:
            made.fileno()

    return Case(MANY, [
        lambda: make(alive.pid).close(),
        with_statement,
        lambda: make(alive.popen).close(),
        lambda: make(WithPid(alive.pid)).close(),
    ], [
        lambda: make(alive.pid, started=1),
        lambda: make(alive.pid, started="1"),
        lambda: make(gone),
        lambda: make(ended),
        lambda: make(0),
        lambda: make(-1),
        lambda: make(1),
        lambda: make(2),
        lambda: make(True),
        lambda: make(2**40),
        lambda: make(os.getpid()),
        lambda: make("12"),
        lambda: make(None),
        lambda: make(WithPid(None)),
        lambda: make(WithPid("12")),
    ])  # fmt: skip


def victim_from_pidfd(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    other = stack.enter_context(mrelease.Victim(alive.pid))
    make: Callable[..., mrelease.Victim] = mrelease.Victim.from_pidfd
    return Case(MANY, [
        lambda: make(alive.pidfd).close(),
        lambda: make(other).close(),
    ], [
        lambda: make(-1),
        lambda: make(0),
        lambda: make(True),
        lambda: make("1"),
        lambda: make(RaisingFileno()),
    ])  # fmt: skip


def victim_not_closed(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))

    def drop() -> None:
        mrelease.Victim(alive.pid)

    warnings.simplefilter("ignore", ResourceWarning)
    return Case(20_000, [drop], [])


def victim_methods(stack: ExitStack) -> Case:
    """On a live one, a reaped one and a closed one; none is killed."""
    alive = stack.enter_context(victims.asleep(1))
    live = stack.enter_context(mrelease.Victim(alive.pid))
    child = subprocess.Popen(["sleep", "600"])
    reaped = stack.enter_context(mrelease.Victim(child))
    child.kill()
    child.wait()
    closed = mrelease.Victim(alive.pid)
    closed.close()
    return Case(MANY, [
        live.footprint,
        live.fileno,
        lambda: live.exited,
        lambda: live.release(timeout=0),
        lambda: live.release(timeout=0, locks="ignore"),
        lambda: repr(live),
        reaped.fileno,
        lambda: reaped.exited,
        lambda: reaped.release(timeout=0),
        lambda: repr(closed),
        closed.close,
    ], [
        lambda: live.kill(grace=-1),
        lambda: live.release(timeout=float("nan")),
        reaped.footprint,
        reaped.kill,
        closed.footprint,
        closed.fileno,
        lambda: closed.exited,
        closed.release,
        closed.kill,
    ])  # fmt: skip


def kill_refused(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    gone = victims.reaped_pid()
    ended = subprocess.Popen(["true"])
    ended.wait()
    call: Callable[..., object] = mrelease.kill
    pid = alive.pid
    return Case(MANY, [], [
        call,
        lambda: call(gone),
        lambda: call(ended),
        lambda: call(0),
        lambda: call(-1),
        lambda: call(1),
        lambda: call(2),
        lambda: call(True),
        lambda: call(2**40),
        lambda: call(os.getpid()),
        lambda: call("12"),
        lambda: call(WithPid(1.5)),
        lambda: call(pid, grace=-1),
        lambda: call(pid, grace="1"),
        lambda: call(pid, timeout=None),
        lambda: call(pid, timeout=float("nan")),
        lambda: call(pid, locks="maybe"),
        lambda: call(pid, escalate_on="x"),
        lambda: call(pid, escalate_on=-1),
        lambda: call(pid, escalate_on=RaisingFileno()),
        lambda: call(pid, unknown=1),
    ])  # fmt: skip


def kill_of_the_dying(stack: ExitStack) -> Case:
    """The whole protocol, on victims that can be killed again and again."""
    dying = stack.enter_context(victims.held(1, killed=True))
    threads = stack.enter_context(victims.held(1, threads=3, killed=True))
    zombie = stack.enter_context(victims.zombie(1))
    made = stack.enter_context(mrelease.Victim(dying.pid))
    call = mrelease.kill
    assert call(dying.pid, timeout=0).outcome is mrelease.Outcome.RELEASED
    return Case(20_000, [
        lambda: call(dying.pid, timeout=0),
        lambda: call(made, timeout=0),
        lambda: made.release(timeout=0),
        lambda: call(threads.pid, timeout=0, locks="ignore"),
        lambda: call(zombie.pid),
        lambda: str(call(zombie.popen)),
        lambda: call(zombie.pid, grace=1).as_dict(),
    ], [])  # fmt: skip


def kill_of_the_living(stack: ExitStack) -> Case:
    """Victims are made here, so that it is theirs what is not flat."""
    turn = itertools.count()
    del stack

    def kill() -> None:
        number = next(turn)
        with victims.Process(1, threads=1 + number % 3) as victim:
            if number % 2:
                result = mrelease.kill(victim.pid)
            else:
                with mrelease.Victim(victim.popen) as made:
                    result = made.kill(grace=0.5 * (number % 4 == 0))
            assert result.outcome in KILLED
            assert victim.wait() in (-signal.SIGKILL, -signal.SIGTERM)

    return Case(500, [kill], [])


def reaper(stack: ExitStack) -> Case:
    """Making and closing, with threads each time, and what is refused."""
    alive = stack.enter_context(victims.asleep(1))
    make: Callable[..., mrelease.Reaper] = mrelease.Reaper
    closed = make(1, spares=0)
    closed.close()

    def with_statement() -> None:
        with make(2, spares=1, policy="none") as made:
            str(made.scheduling)

    return Case(4_000, [
        lambda: make(1, spares=0).close(),
        with_statement,
        closed.close,
    ], [
        lambda: make(0),
        lambda: make("1"),
        lambda: make(1, spares=-1),
        lambda: make(policy="best"),
        lambda: make(cpus=[]),
        lambda: make(cpus=["0"]),
        lambda: make(1, spares=0, cpus=[1023]),
        lambda: closed.kill(alive.pid),
        lambda: closed.kill_many([alive.pid]),
    ])  # fmt: skip


def reaper_not_closed(stack: ExitStack) -> Case:
    del stack

    def drop() -> None:
        mrelease.Reaper(1, spares=0)
        # Its threads end by themselves: so that they do not pile up.
        while len(os.listdir("/proc/self/task")) > 1:
            time.sleep(0)

    warnings.simplefilter("ignore", ResourceWarning)
    # Of how many stacks it keeps the table of thread-local storage (1.1 KiB)
    # depends on how many threads were there at the same time.
    return Case(2_000, [drop], [], caches=8192)


def reaper_kill_refused(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    gone = victims.reaped_pid()
    made = stack.enter_context(mrelease.Reaper(1, spares=0))
    call: Callable[..., object] = made.kill
    many: Callable[..., object] = made.kill_many
    pid = alive.pid
    return Case(MANY, [
        lambda: many([]),
        lambda: many([gone]),
    ], [
        call,
        lambda: call(gone),
        lambda: call(0),
        lambda: call(2),
        lambda: call("12"),
        lambda: call(pid, grace=-1),
        lambda: call(pid, timeout=None),
        lambda: call(pid, locks="maybe"),
        lambda: call(pid, grace=1, escalate_on=-1),
        lambda: many([pid, 0]),
        lambda: many([pid, "12"]),
        lambda: many([pid], grace=-1),
        lambda: many(pid),
    ])  # fmt: skip


def reaper_with_a_hook_that_refuses(stack: ExitStack) -> Case:
    alive = stack.enter_context(victims.asleep(1))
    made = stack.enter_context(mrelease.Reaper(1, spares=0))

    def refuse(event: str, args: tuple[object, ...]) -> None:
        if event == "mrelease.kill":
            raise ValueError(f"refused: {args}")

    sys.addaudithook(refuse)
    return Case(MANY, [], [
        lambda: made.kill(alive.pid),
        lambda: made.kill(alive.pid, grace=1, escalate_on=0),
        lambda: made.kill_many([alive.pid, alive.pid]),
    ])  # fmt: skip


def reaper_kill_of_the_dying(stack: ExitStack) -> Case:
    """The whole protocol, on victims that can be killed again and again."""
    dying = stack.enter_context(victims.held(1, killed=True))
    zombie = stack.enter_context(victims.zombie(1))
    pinned = stack.enter_context(mrelease.Victim(dying.pid))
    made = stack.enter_context(mrelease.Reaper(2, spares=1))
    event = os.eventfd(1)
    stack.callback(os.close, event)

    def await_it() -> object:
        reaping = made.kill(zombie.pid)
        select.select([reaping], [], [])
        return reaping.result()

    def drop() -> None:
        made.kill(zombie.pid)

    return Case(10_000, [
        lambda: made.kill(dying.pid, timeout=0).result(),
        lambda: made.kill(pinned, timeout=0, locks="ignore").result(),
        lambda: made.kill(
            dying.pid, grace=1, escalate_on=event, timeout=0
        ).result(),
        lambda: str(made.kill(zombie.pid).result()),
        lambda: [r.result() for r in made.kill_many([zombie.pid] * 3)],
        lambda: mrelease.kill_many([zombie.pid], reaper=made),
        await_it,
        drop,
    ], [], CACHES)  # fmt: skip


def reaper_kill_of_the_living(stack: ExitStack) -> Case:
    """Awaited on a loop of its own; some of them with a grace."""
    made = stack.enter_context(mrelease.Reaper(2, spares=1))
    turn = itertools.count()
    # Not Runner.run(): it sets a handler of SIGINT each time, for which the
    # task is printed, and types keep the names that reprlib asks them for.
    loop = stack.enter_context(asyncio.Runner()).get_loop()

    async def kill(pid: int, grace: float) -> mrelease.Release:
        return await made.kill(pid, grace=grace)

    def once() -> None:
        number = next(turn)
        with victims.Process(1, threads=1 + number % 3) as victim:
            grace = 0.5 * (number % 4 == 0)
            result = loop.run_until_complete(kill(victim.pid, grace))
            assert result.outcome in KILLED
            assert victim.wait() in (-signal.SIGKILL, -signal.SIGTERM)

    return Case(500, [once], [], CACHES)


def kill_many_by_itself(stack: ExitStack) -> Case:
    """With a Reaper for each call."""
    zombie = stack.enter_context(victims.zombie(1))
    return Case(2_000, [
        lambda: mrelease.kill_many([zombie.pid] * 2),
        lambda: mrelease.kill_many([]),
    ], [
        lambda: mrelease.kill_many([0]),
    ], CACHES)  # fmt: skip


def support(stack: ExitStack) -> Case:
    del stack
    call: Callable[..., mrelease.Support] = mrelease.support
    return Case(6_000, [call, lambda: str(call())], [lambda: call(probe=1)])


def support_with_probe(stack: ExitStack) -> Case:
    del stack
    # Caches of Python fill up only in the course of some hundred calls:
    # without a child each that is quick.
    for _ in range(500):
        mrelease.support().as_dict()
    return Case(300, [lambda: mrelease.support(probe=True).as_dict()], [])


def results(stack: ExitStack) -> Case:
    """What the values do: print, compare, copy, refuse."""
    del stack
    footprint = mrelease.Footprint(1, 2, 3, 4, 5)
    release = mrelease.Release(
        7, mrelease.Outcome.RELEASED, footprint=footprint, released=0.5
    )
    make: Callable[..., object] = mrelease.Release

    def assign() -> None:
        release.pid = 8

    return Case(MANY, [
        lambda: str(release),
        lambda: repr(release),
        lambda: hash(release),
        lambda: release == footprint,
        release.as_dict,
        release.__reduce__,
        lambda: footprint.releasable + footprint.rss,
    ], [
        make,
        assign,
    ])  # fmt: skip


# Leaks, made on purpose, to show that they would be seen.


def leak_of_a_block(stack: ExitStack) -> Case:
    # In one of ten ways to call it, as an error branch might.
    del stack
    kept: list[bytearray] = []
    return Case(MANY, [
        *([lambda: None] * 9),
        lambda: kept.append(bytearray()),
    ], [])  # fmt: skip


def leak_of_a_reference(stack: ExitStack) -> Case:
    del stack
    increase = ctypes.pythonapi.Py_IncRef
    increase.argtypes = [ctypes.py_object]
    increase.restype = None
    return Case(MANY, [lambda: increase(mrelease.Victim), lambda: None], [])


def leak_of_c_memory(stack: ExitStack) -> Case:
    del stack
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    return Case(MANY, [lambda: malloc(1), *([lambda: None] * 9)], [])


def leak_of_an_fd(stack: ExitStack) -> Case:
    del stack
    opened = itertools.count()

    def leak() -> None:
        if next(opened) % 1000 == 0:
            os.dup(0)

    return Case(MANY, [leak], [])


def leak_of_a_thread(stack: ExitStack) -> Case:
    del stack
    begun = itertools.count()

    def leak() -> None:
        if next(begun) % 10_000 == 0:
            threading.Thread(
                target=threading.Event().wait, daemon=True
            ).start()

    return Case(MANY, [leak], [])


CASES = {
    make.__name__: make
    for make in (
        process_mrelease, pidfd_open, pidfd_dup, pidfd_state,
        proc_is_ours, read_footprint, read_stat,
        look_at_locks, reap, reap_with_a_hook_that_refuses, probe,
        probe_in_child, victim, victim_from_pidfd, victim_not_closed,
        victim_methods, kill_refused, kill_of_the_dying, kill_of_the_living,
        reaper, reaper_not_closed, reaper_kill_refused,
        reaper_with_a_hook_that_refuses, reaper_kill_of_the_dying,
        reaper_kill_of_the_living, kill_many_by_itself, support,
        support_with_probe, results,
    )
}  # fmt: skip
LEAKS = {
    make.__name__: make
    for make in (
        leak_of_a_block, leak_of_a_reference, leak_of_c_memory,
        leak_of_an_fd, leak_of_a_thread,
    )
}  # fmt: skip

# ---------------------------------------------------------- the measure

# Growth that is allowed over half of the calls. One a call is more, also in
# the case with the fewest, of 300 calls: it is looked at over 120 of them.
ALLOWED = {
    "fds": 0,
    "threads": 0,
    "blocks": 100,
    "heap": 2 << 10,
    "references": 100,
    "memory": 512 << 10,
}


_SHARED: list[object] = [
    None, True, False, (), "", b"", int, str, dict, tuple, OSError, ValueError,
    TypeError, ProcessLookupError, OverflowError, _mrelease, sys.audit,
    mrelease.Victim, mrelease.Footprint, mrelease.Release, mrelease.Support,
    mrelease.Feature, *mrelease.Outcome, _mrelease.__dict__,
]  # fmt: skip


def take_stock() -> dict[str, int]:
    gc.collect()
    total = getattr(sys, "gettotalrefcount", None)  # debug builds
    status = dict(
        line.split(":\t")
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("Threads", "RssAnon"))
    )
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "blocks": sys.getallocatedblocks(),
        "heap": heap.in_use(),
        "references": (
            total()
            if total is not None
            else sum(sys.getrefcount(each) for each in _SHARED)
        ),
        "memory": int(status["RssAnon"].split()[0]) * 1024,
    }


def call_all(case: Case, times: int) -> None:
    for _ in range(times):
        for call in case.good:
            call()
        for call in case.bad:
            try:
                call()
            except FAILURES:
                continue
            raise AssertionError(f"no error: {call}")


def measure(name: str) -> dict[str, object]:
    """Make the calls of a case in this process; the growth."""
    with ExitStack() as stack:
        case = {**CASES, **LEAKS}[name](stack)
        batch = max(case.many // 10 // (len(case.good) + len(case.bad)), 1)
        taken = 0.0
        # Made in advance: what is measured must not grow by measuring.
        stock = [array("q", [0] * len(ALLOWED)) for _ in range(10)]
        for row in stock:
            begun = time.perf_counter()
            call_all(case, batch)
            taken += time.perf_counter() - begun
            for i, value in enumerate(take_stock().values()):
                row[i] = value
        # Caches and free lists fill up first. And what is flat goes up and
        # down a little: the least of the last batches is compared with the
        # most of those after the warm-up.
        first, last = stock[3:5], stock[-2:]
        growth = {
            key: min(row[i] for row in last) - max(row[i] for row in first)
            for i, key in enumerate(ALLOWED)
        }
        return {
            "caches": case.caches,
            "calls": 10 * batch * (len(case.good) + len(case.bad)),
            "failing": 10 * batch * len(case.bad),
            "seconds": round(taken, 2),
            "growth": growth,
        }


Measure = Callable[[str], dict[str, object]]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """measured(name): in a child of a fresh interpreter of our own."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MRELEASE_TEST_VICTIM": str(victims.binary())},
    ) as server:

        def ask(name: str) -> dict[str, object]:
            assert server.stdin is not None
            assert server.stdout is not None
            print(name, file=server.stdin, flush=True)
            line = server.stdout.readline()
            print(f"{name}: {line.strip()}")
            assert line, "no result: see stderr"
            found: dict[str, object] = json.loads(line)
            assert "error" not in found, found["error"]
            return found

        try:
            yield ask
        finally:
            assert server.stdin is not None
            server.stdin.close()


def serve() -> None:
    for line in sys.stdin:
        try:
            with kernel_errors.Job(
                functools.partial(measure, line.strip())
            ) as job:
                found = job.result(280)
        except Exception as error:  # noqa: BLE001 - for the asker
            found = {"error": "\n".join([repr(error), *error.__notes__])}
        print(json.dumps(found), flush=True)


def excess(found: dict[str, object]) -> dict[str, int]:
    growth = found["growth"]
    calls = found["calls"]
    assert isinstance(growth, dict)
    assert isinstance(calls, int)
    assert isinstance(found["caches"], int)
    # Where there are many calls, one in 250 is noise of the interpreter's.
    noise = {
        "blocks": calls // 250,
        "references": calls // 250,
        "heap": found["caches"],
    }
    return {
        key: n
        for key, n in growth.items()
        if n > max(ALLOWED[key], noise.get(key, 0))
    }


NEEDS = {
    "process_mrelease": ["held"],
    "read_stat": ["held"],
    "look_at_locks": ["robust_holder"],
    "kill_of_the_dying": ["held"],
    "reap_with_a_hook_that_refuses": [],
    "reaper_kill_of_the_dying": ["held"],
}


@pytest.mark.parametrize(
    "name",
    CASES,
)
def test_no_leak_in(name: str, measured: Measure) -> None:
    victims.need(*NEEDS.get(name, []))
    found = measured(name)
    assert excess(found) == {}, found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("leak_of_a_block", "blocks"),
        ("leak_of_a_reference", "references"),
        ("leak_of_c_memory", "heap"),
        ("leak_of_an_fd", "fds"),
        ("leak_of_a_thread", "threads"),
    ],
)
def test_the_measure_sees_a(name: str, kind: str, measured: Measure) -> None:
    assert kind in excess(measured(name))


if __name__ == "__main__":
    serve()
