"""Release.freed is never True while the memory is there.

More than 1,000 kills over all kinds of victims, sizes and timeouts varied.
Each victim is alone in a memory control group, whose usage (swap included)
is read as the first thing after the kill returned. What "there" means:

    freed  =>  usage <= base + shared + 5 % + allowance

base       what the group is charged with before the victim starts, when
           it is empty; itself at most 1 MiB
shared     what the release can not free: shared memory (Footprint.shmem)
           and, where huge pages are charged to the group, hugetlb; nothing
           of it once the victim has ended, as nobody else has it. Pages of
           files are the page cache of who read them first, never the
           victim: it is allowed none
5 %        of the private memory, as the project's figures of "memory is
           back" have it
allowance  what is charged to the group but is not the victim's memory, see
           allowance(): pages that the kernel charges ahead for each CPU,
           pages on their way to an LRU list, kernel stacks, page tables

Victims are so large that 5 % and the allowance together are less than half
of what they hold: with the memory there no check can pass.

What is in the hands of somebody else who tears down the same memory at that
very moment (a second killer, a sharer that was killed as well) nobody can see:
the docstring of Release has it. Such rows are marked; there, the memory must
be gone by itself soon after.

The table of outcomes is printed at the end of the run.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from errno import EAGAIN, ENOSYS, EPERM
from typing import NamedTuple

import pytest

import cgroups
import kernel_errors
import mrelease
import victims
from cgroups import Gauge, allowance
from kill_ways import Kill, by_reaper, kept
from mrelease import Outcome, Release

MIB = 1 << 20
SIZES = (8, 16, 10, 24, 8, 12, 64, 9)  # MiB
LARGEST_BASE = MIB


class Reading(NamedTuple):
    release: Release
    usage: int  # of the group, just after the kill returned


Run = Callable[[Kill, victims.Process, float, Gauge], list[Reading]]
"""How a victim is killed, by either way, and who else does something."""


def plainly(
    kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
) -> list[Reading]:
    with kept(kill) as kill_now:
        release = kill_now(victim.pid, timeout=timeout)
        usage = gauge.usage()
    return [Reading(release, usage)]


def from_two_threads(
    kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
) -> list[Reading]:
    readings: list[Reading] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        with mrelease.Victim(victim.pid) as pinned, kept(kill) as kill_now:
            barrier.wait()
            release = kill_now(pinned, timeout=timeout)
            usage = gauge.usage()
        readings.append(Reading(release, usage))

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(readings) == 2
    return readings


def killed_by_another(
    kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
) -> list[Reading]:
    """We come when the victim is already on its way out."""
    with mrelease.Victim(victim.pid) as pinned, kept(kill) as kill_now:
        victim.popen.kill()
        release = (
            kill_now(pinned, timeout=timeout)
            if kill is by_reaper
            else pinned.release(timeout=timeout)
        )
        usage = gauge.usage()
        return [Reading(release, usage)]


def and_the_sharer_next(
    kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
) -> list[Reading]:
    """The sharer is killed as soon as the victim has ended."""

    def run() -> None:
        victim.ended(10)
        os.kill(victim.facts["sharer"], signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return plainly(kill, victim, timeout, gauge)
    finally:
        thread.join()


def without_raising(
    kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
) -> list[Reading]:
    """By one who may not raise the victim."""
    with kernel_errors.answered({"sched_setattr": EPERM}) as kernel:
        return kernel.in_thread(plainly, kill, victim, timeout, gauge)


def where_mrelease_fails(errno: int) -> Run:
    def run(
        kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
    ) -> list[Reading]:
        with kernel_errors.answered({"process_mrelease": errno}) as kernel:
            return kernel.in_thread(plainly, kill, victim, timeout, gauge)

    return run


Make = Callable[[int, Gauge], victims.Process]


def kind(name: str, **options: object) -> Make:
    def make(mib: int, gauge: Gauge) -> victims.Process:
        if name == "swapped" or "swap" in options:
            if not gauge.with_swap:
                raise cgroups.Unavailable("the kernel does not account swap")
            victims.use_swap()
        factory: Callable[..., victims.Process] = victims.kinds()[name]
        return factory(mib, groups=[gauge], **options)

    return make


class Row(NamedTuple):
    kills: int
    make: Make
    run: Run = plainly
    threads: int = 1
    # Nothing keeps it from ending: nearly all must be freed.
    ordinary: bool = False
    # Somebody else may be tearing down the same memory.
    rivals: bool = False


ROWS = {
    # These need nothing but the meter.
    "asleep": Row(100, kind("asleep"), ordinary=True),
    "asleep, 8 threads": Row(
        80, kind("asleep", threads=8), threads=8, ordinary=True
    ),
    "asleep, 64 threads": Row(
        30, kind("asleep", threads=64), threads=64, ordinary=True
    ),
    "spinning": Row(60, kind("spinning"), ordinary=True),
    "spinning, 4 threads": Row(
        40, kind("spinning", threads=4), threads=4, ordinary=True
    ),
    "starved": Row(16, kind("starved")),
    "starved, not raised": Row(10, kind("starved"), without_raising),
    "stopped": Row(50, kind("stopped"), ordinary=True),
    "held": Row(40, kind("held")),
    "held, 64 threads": Row(10, kind("held", threads=64), threads=64),
    "shared anon": Row(50, kind("asleep", shared_anon=8), ordinary=True),
    "shared anon, held": Row(20, kind("held", shared_anon=8)),
    "shared memfd": Row(40, kind("asleep", shared_memfd=8), ordinary=True),
    "private memfd": Row(40, kind("asleep", private_memfd=8), ordinary=True),
    "sharer": Row(40, kind("shared")),
    "sharer, 8 threads": Row(20, kind("shared", threads=8), threads=8),
    "sharer, stopped": Row(10, kind("stopped", sharer=True)),
    "mlocked": Row(40, kind("mlocked"), ordinary=True),
    "robust lock": Row(40, kind("robust_holder")),
    "sharer, killed next": Row(
        40, kind("shared"), and_the_sharer_next, rivals=True
    ),
    "robust lock, sharer": Row(10, kind("robust_holder", sharer=True)),
    "zombie": Row(10, kind("zombie")),
    "dead leader": Row(
        30, kind("zombie_leader", threads=4), threads=4, ordinary=True
    ),
    "two kill it": Row(40, kind("asleep"), from_two_threads, rivals=True),
    "two kill 8 threads": Row(
        30, kind("asleep", threads=8), from_two_threads, 8, rivals=True
    ),
    "two kill a held one": Row(
        20, kind("held"), from_two_threads, rivals=True
    ),
    "killed by another": Row(50, kind("asleep"), killed_by_another),
    # These need root or what the kernel may not have.
    "ENOSYS": Row(20, kind("asleep"), where_mrelease_fails(ENOSYS)),
    "ENOSYS, held": Row(6, kind("held"), where_mrelease_fails(ENOSYS)),
    "ENOSYS, sharer": Row(6, kind("shared"), where_mrelease_fails(ENOSYS)),
    "EAGAIN for ever": Row(20, kind("asleep"), where_mrelease_fails(EAGAIN)),
    "EAGAIN, held": Row(6, kind("held"), where_mrelease_fails(EAGAIN)),
    "EAGAIN, sharer": Row(6, kind("shared"), where_mrelease_fails(EAGAIN)),
    "D state": Row(15, kind("in_d_state")),
    "frozen": Row(20, kind("frozen")),
    "frozen, 8 threads": Row(6, kind("frozen", threads=8), threads=8),
    "frozen, version 2": Row(15, kind("frozen_v2")),
    "frozen, sharer": Row(6, kind("frozen", sharer=True)),
    "CPU quota": Row(15, kind("on_quota")),
    "CPU quota, not raised": Row(10, kind("on_quota"), without_raising),
    "swapped": Row(15, kind("swapped")),
    "swapped, held": Row(6, kind("held", swap=True)),
    "huge pages": Row(10, kind("huge")),
    "core dump": Row(10, kind("core_dumping")),
}


class Table:
    """What was seen, by row; printed by pytest as it ends."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[Outcome]] = defaultdict(Counter)
        self.freed: Counter[str] = Counter()
        self.held: Counter[str] = Counter()  # not freed, and there
        self.left: Counter[str] = Counter()  # most bytes, of freed ones
        self.lies: Counter[str] = Counter()
        self.rivals: Counter[str] = Counter()  # gone a moment later
        self.kills: Counter[Kill] = Counter()

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        if not self.outcomes:
            return
        terminalreporter.section("Release.freed against the memory cgroup")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> Iterator[str]:
        shown = [
            outcome
            for outcome in Outcome
            if any(seen[outcome] for seen in self.outcomes.values())
        ]
        yield (
            f"{'victim':30}"
            + "".join(f"{outcome.name[:8]:>9}" for outcome in shown)
            + "   freed  WRONG  in other  not freed,  most left"
        )
        yield " " * (30 + 9 * len(shown)) + (
            "                   hands   and there  when freed"
        )
        for row, seen in self.outcomes.items():
            counts = "".join(f"{seen[outcome] or '.':>9}" for outcome in shown)
            share = self.freed[row] / sum(seen.values())
            most = (
                f"{self.left[row] / 1024:.0f} KiB" if self.freed[row] else "."
            )
            yield (
                f"{row:30}{counts}{share:8.1%}{self.lies[row] or '.':>7}"
                f"{self.rivals[row] or '.':>10}"
                f"{self.held[row] or '.':>12}{most:>12}"
            )
        yield (
            f"{self.kills.total()} victims killed; "
            f"{sum(self.freed.values())} results with freed, "
            f"{sum(self.lies.values())} of them with the memory there, "
            f"{sum(self.rivals.values())} with part of it in the hands "
            "of another who was tearing it down"
        )


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    table = Table()
    # Removed by nobody: its one hook runs after all tests.
    request.config.pluginmanager.register(table)
    return table


def shared_of(release: Release, gauge: Gauge) -> int:
    """Bytes charged to the group that the release can not free."""
    if release.footprint is None or release.exited is not None:
        return 0
    shared = release.footprint.shmem
    if gauge.version == 2:  # charged with memory_hugetlb_accounting
        shared += release.footprint.hugetlb
    return shared


def limit(private: int, threads: int) -> int:
    """Bytes above base and shared that may be left of a freed victim."""
    return private // 20 + allowance(threads, private)


def size_for(row: Row, number: int) -> int:
    """MiB: various, but at least so much that the check means something."""
    size = SIZES[number % len(SIZES)]
    while limit(size * MIB, row.threads) >= size * MIB // 2:
        size += 8
    return size


def timeout_for(row: Row, number: int) -> float:
    """Most have time to end; some are asked to return as it comes."""
    timeout = (1.0, 1.0, 0.0, 1.0, 0.003, 1.0, 0.02)[number % 7]
    # What stands still or is shared would take all the time that it has.
    return timeout if row.ordinary else min(timeout, 0.1)


def left_behind(
    row: Row, kill: Kill, number: int, gauge: Gauge
) -> Iterator[tuple[Release, int, int]]:
    """Kill one: its results, bytes left above base and shared, the limit."""
    assert gauge.wait_below(LARGEST_BASE, 10) is not None, "not empty"
    base = gauge.usage()
    mib = size_for(row, number)
    most = limit(mib * MIB, row.threads)
    with row.make(mib, gauge) as victim:
        if victim.has_mm():
            assert gauge.usage() - base >= mib * MIB - allowance(1, 0)
        readings = row.run(kill, victim, timeout_for(row, number), gauge)
        for release, usage in readings:
            yield release, usage - base - shared_of(release, gauge), most


@pytest.mark.parametrize("name", ROWS)
def test_freed_is_never_true_while_the_memory_is_there(
    name: str, kill: Kill, table: Table, rounds: Callable[[int], int]
) -> None:
    row = ROWS[name]
    if kill is by_reaper:
        name += ", reaper"
    count = rounds(row.kills)
    lies = []
    with Gauge() as gauge:
        for number in range(count):
            table.kills[kill] += 1
            for release, left, most in left_behind(row, kill, number, gauge):
                table.outcomes[name][release.outcome] += 1
                if not release.freed:
                    table.held[name] += left > most
                    continue
                table.freed[name] += 1
                if left > most and row.rivals:
                    table.rivals[name] += 1
                    most_of_all = LARGEST_BASE + shared_of(release, gauge)
                    assert gauge.wait_below(most_of_all + most, 5) is not None
                    continue
                table.left[name] = max(table.left[name], left)
                if left > most:
                    table.lies[name] += 1
                    lies.append(
                        f"{left / MIB:.1f} MiB left, allowed are "
                        f"{most / MIB:.1f} MiB: {release!r}"
                    )
    assert not lies, f"{len(lies)} times:\n" + "\n".join(lies[:5])
    if row.ordinary:
        # The other direction: False would be true always.
        patient = sum(timeout_for(row, n) == 1.0 for n in range(count))
        assert table.freed[name] >= 0.97 * patient, table.outcomes[name]


def test_the_kills_that_were_checked_are_at_least_1000(
    table: Table, request: pytest.FixtureRequest
) -> None:
    if not set(ROWS) <= set(table.outcomes) or request.config.getoption(
        "--quick"
    ):
        pytest.skip("not all kinds of victims, or not all rounds, were tried")
    assert table.kills[mrelease.kill] >= 1000


@pytest.mark.needs("release")
@pytest.mark.parametrize("kill_now", [mrelease.kill, by_reaper])
def test_the_old_memory_of_one_starved_in_execve_is_not_said_to_be_freed(
    kill_now: Kill,
) -> None:
    """It has a new memory already, and nothing else tells of the old one."""
    with Gauge() as gauge:
        base = gauge.usage()
        with victims.starved_in_execve([gauge]) as (victim, _):
            # By one who may neither raise it nor let it run elsewhere.
            refused = {"sched_setattr": EPERM, "sched_setaffinity": EPERM}
            with kernel_errors.answered(refused) as kernel:
                release, usage = kernel.in_thread(
                    lambda: (kill_now(victim.pid, timeout=0.3), gauge.usage())
                )
            assert usage - base > 64 * MIB, "it was not starved"
            assert not release.freed, release
            assert release.outcome is Outcome.PARTIAL


@pytest.mark.parametrize("threads", [1, 64])
def test_the_check_fails_for_a_victim_that_is_not_released(
    threads: int,
) -> None:
    def make(mib: int, gauge: Gauge) -> victims.Process:
        return victims.held(
            mib, threads=threads, shared_anon=8, groups=[gauge]
        )

    def lie(
        kill: Kill, victim: victims.Process, timeout: float, gauge: Gauge
    ) -> list[Reading]:
        del kill, timeout
        with mrelease.Victim(victim.pid) as pinned:
            footprint = pinned.footprint()
            os.kill(victim.pid, signal.SIGKILL)
            release = Release(
                victim.pid, Outcome.RELEASED, freed=True, footprint=footprint
            )
            return [Reading(release, gauge.usage())]

    row = Row(1, make, lie, threads)
    with Gauge() as gauge:
        for number in range(len(SIZES)):
            for release, left, most in left_behind(
                row, mrelease.kill, number, gauge
            ):
                assert release.freed
                assert left > 1.5 * most
