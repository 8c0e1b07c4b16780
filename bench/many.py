"""Many victims at once: `make bench-many`.

From the start of the kill to the moment at which 5 % of the memory of all
the victims are left in their one memory cgroup, what that is for each
victim, and the CPU time of the killer and of the dying victims. Compared are
os.kill() for all, mrelease.kill() one after the other, mrelease.kill_many(),
and kill_many() of a Reaper that is there already; with one CPU for killer
and victims, and with two (a cpuset, which nothing that raises them leaves).
"""

from __future__ import annotations

import os
import resource
import signal
import time
from time import monotonic_ns
from typing import TYPE_CHECKING, NamedTuple

import common
import mrelease
from cgroups import Meter, Unavailable
from common import (
    BACK,
    Cpus,
    Run,
    Spread,
    User,
    Watcher,
    Zygote,
    in_turns,
    settled,
    size_text,
    users,
)
from mrelease.bench import in_ms
from ways import Helper, new_reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ways import Handler, Maker, Policy


# ------------------------------------------------------- in the helper


class Shots(NamedTuple):
    begun: int
    """Nanoseconds of the monotonic clock."""
    returned: float
    """Seconds until the call had returned."""
    cpu: float
    """Seconds of CPU time of the killer, all its threads."""
    outcomes: dict[str, int]
    signalled: float | None
    """Seconds until the last SIGKILL was sent, where it is known."""
    released: float | None
    """... and until the last release was done; None: there was none."""


def _handler(
    kill: Callable[[list[int]], list[mrelease.Release]],
    *,
    together: bool = True,
) -> Handler:
    """together: all times of the releases began with the one call."""

    def handle(pids: list[int]) -> Shots:
        before = _cpu()
        begun = monotonic_ns()
        found = kill(pids)
        returned = (monotonic_ns() - begun) / 1e9
        outcomes = [each.outcome.value for each in found]
        times = found if together else []
        return Shots(
            begun, returned, _cpu() - before,
            {name: outcomes.count(name) for name in set(outcomes)},
            max((each.signalled for each in times if each.signalled),
                default=None if found else returned),
            max((each.released for each in times if each.released),
                default=None),
        )  # fmt: skip

    return handle


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _make_signals() -> tuple[Handler, str]:
    def kill(pids: list[int]) -> list[mrelease.Release]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return []

    return _handler(kill), "in the calling thread"


def _make_one_by_one() -> tuple[Handler, str]:
    def kill(pids: list[int]) -> list[mrelease.Release]:
        return [mrelease.kill(pid) for pid in pids]

    return _handler(kill, together=False), "in the calling thread"


def _make_kill_many() -> tuple[Handler, str]:
    def kill(pids: list[int]) -> list[mrelease.Release]:
        return mrelease.kill_many(pids, timeout=60)

    return _handler(kill), "a Reaper of its own for each call"


def _make_reaper(policy: Policy) -> Maker:
    def make() -> tuple[Handler, str]:
        reaper = new_reaper(policy)

        def kill(pids: list[int]) -> list[mrelease.Release]:
            reapings = reaper.kill_many(pids, timeout=60)
            return [each.result(120) for each in reapings]

        return _handler(kill), str(reaper.scheduling)

    return make


class Way(NamedTuple):
    text: str
    make: Maker


WAYS = {
    "signals": Way("os.kill for all", _make_signals),
    "kill": Way("mrelease.kill() in turn", _make_one_by_one),
    "kill-many": Way("mrelease.kill_many()", _make_kill_many),
    "reaper": Way("Reaper.kill_many()", _make_reaper("auto")),
}
OURS = ("kill-many", "reaper")


# ------------------------------------------------------- the benchmark


class Job(NamedTuple):
    victims: int
    mib: int
    cpus: int
    way: str


class Found(NamedTuple):
    seconds: float | None
    """Until the memory was back; None: it was given up."""
    cpu: float
    """Seconds of CPU time, of killer and dying victims."""
    shots: Shots


class Bench:
    GIVE_UP = 60.0

    def __init__(
        self,
        helpers: dict[tuple[int, str], Helper],
        zygotes: dict[tuple[int, int], Zygote],
        meter: Meter,
        watcher: Watcher,
    ) -> None:
        self.found: dict[Job, list[Found]] = {}
        self._helpers = helpers
        self._zygotes = zygotes
        self._meter = meter
        self._watcher = watcher

    def do(self, jobs: list[Job]) -> None:
        for job in jobs:
            found = self._kill(job)
            self.found.setdefault(job, []).append(found)

    def _kill(self, job: Job) -> Found:
        zygote = self._zygotes[job.mib, job.cpus]
        before = settled(self._meter)
        pids = zygote.make(job.victims)
        lived = zygote.cpu()
        held = self._meter.usage() - before
        if held < job.victims * job.mib * common.MIB * 0.9:
            raise RuntimeError(f"{job}: only {held} bytes are charged")
        time.sleep(0.01)
        self._watcher.begin(before + int(held * BACK), self.GIVE_UP)
        shots = Shots(*self._helpers[job.cpus, job.way].ask(pids))
        back = self._watcher.end()
        died = zygote.reap()
        return Found(
            back.when and (back.when - shots.begun) / 1e9,
            shots.cpu + max(0, died - lived) / 1e9,
            shots,
        )


def text_of(found: Spread) -> str:
    return f"{in_ms(found.median)} ({in_ms(found.low)}-{in_ms(found.high)})"


def tell(run: Run, found: dict[Job, list[Found]], jobs: Sequence[Job]) -> None:
    times = {
        job: Spread.of(one.seconds for one in found[job])
        for job in jobs
        if job in found
    }
    rows = []
    for job, spread in times.items():
        some = found[job]
        base = times.get(job._replace(way="signals"))
        outcomes: dict[str, int] = {}
        for one in some:
            for name, count in one.shots.outcomes.items():
                outcomes[name] = outcomes.get(name, 0) + count
        every = sum(outcomes.values())
        released = outcomes.get("released", 0)
        rows.append([
            f"{job.victims} x {size_text(job.mib)}", str(job.cpus),
            WAYS[job.way].text, str(spread.n), text_of(spread),
            f"{spread.median / job.victims * 1e6:.0f}",
            f"{spread.median / base.median:.2f}" if base else "",
            text_of(Spread.of(one.cpu for one in some)),
            text_of(Spread.of(one.shots.returned for one in some)),
            f"{released / every:.0%}" if every else "",
        ])  # fmt: skip
        run.row(
            **job._asdict(), n=spread.n, median=spread.median,
            quartiles=[spread.low, spread.high], outcomes=outcomes,
            found=some,
        )  # fmt: skip
    common.table(
        "Many victims: median (quartiles)",
        ("victims", "CPUs", "way", "n", "memory back, ms", "us each",
         "to os.kill", "CPU time, ms", "call, ms", "released"),
        rows,
    )  # fmt: skip
    print(
        f"memory back: {BACK:.0%} left. to os.kill: ratio of the medians. CPU "
        "time: of the killer and\nof the victims from the kill on. call: "
        "until the call, or the last result, had returned."
    )
    _tell_aims(times)


def _tell_aims(times: dict[Job, Spread]) -> None:
    rows = []
    for job, spread in times.items():
        if job.way not in OURS:
            continue
        for way in ("signals", "kill"):
            base = times.get(job._replace(way=way))
            if base:
                ratio = spread.median / base.median
                these = f"{job.victims} x {size_text(job.mib)}"
                rows.append([
                    f"{WAYS[job.way].text}: {these}, CPUs: {job.cpus}",
                    f"not slower than {WAYS[way].text}", f"{ratio:.2f}",
                    "reached" if ratio <= 1 else "MISSED",
                ])  # fmt: skip
    if rows:
        common.table("Aims", ("what", "aim", "ratio", ""), rows)


def main() -> None:
    parser = common.make_parser(__doc__ or "", who="root")
    parser.add_argument(
        "--n", type=int, help="kills of each kind (default: 10; quick: 2)"
    )
    parser.add_argument(
        "--counts", type=common.numbers, metavar="LIST",
        help="how many of 10 MiB (default: 1,10,100,1000; quick: 1,10,100)",
    )  # fmt: skip
    parser.add_argument(
        "--big", type=int, metavar="MIB",
        help="size of 8 more victims (default: 1024; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--cpus", type=common.numbers, metavar="LIST", default="1,2",
        help="with so many CPUs",
    )  # fmt: skip
    parser.add_argument(
        "--pause", type=float, default=0.1, help="ms between two looks"
    )
    parser.add_argument(
        "--ways", type=common.words(tuple(WAYS)), metavar="LIST",
        default=",".join(WAYS),
    )  # fmt: skip
    args = parser.parse_args()
    quick = args.quick
    count = args.n or (2 if quick else 10)
    sizes = [
        (number, 10)
        for number in args.counts or ([1, 10, 100] if quick else
                                      [1, 10, 100, 1000])
    ]  # fmt: skip
    sizes.append((8, args.big or (64 if quick else 1024)))
    everybody = users(args.users)
    if everybody != [User(everybody[0].name, None)]:
        parser.error("the victims' groups are root's: --users root")
    with Run("many", args) as run:
        try:
            _run(run, count, sizes, everybody[0])
        except Unavailable as why:
            raise SystemExit(f"not possible here: {why}") from None


def _run(
    run: Run, count: int, sizes: Sequence[tuple[int, int]], user: User
) -> None:
    args = run.args
    groups: dict[int, Cpus] = {}
    for cpus in args.cpus:
        try:
            groups[cpus] = Cpus(cpus)
        except Unavailable as why:
            print(f"CPUs: {cpus}: left out: {why}")
            continue
        run.stack.callback(groups[cpus].close)
    helpers: dict[tuple[int, str], Helper] = {}
    for cpus, group in groups.items():
        for way in args.ways:
            try:
                helper = Helper(WAYS[way].make, user, (group,))
            except Unavailable as why:
                print(f"{WAYS[way].text}: left out: {why}")
                continue
            run.stack.callback(helper.close)
            helpers[cpus, way] = helper
            run.note(f"{WAYS[way].text}, CPUs: {cpus}", helper.said)
    meter = Meter()
    run.stack.callback(meter.close)
    watcher = Watcher(meter, args.pause * 1e-3)
    run.stack.callback(watcher.close)
    run.note("watch", f"{watcher.scheduling}, each {args.pause:g} ms")
    zygotes: dict[tuple[int, int], Zygote] = {}
    for cpus, group in groups.items():
        for mib in dict.fromkeys(mib for _, mib in sizes):
            zygotes[mib, cpus] = Zygote(mib, groups=(meter, group))
            run.stack.callback(zygotes[mib, cpus].close)
    jobs = [
        Job(number, mib, cpus, way)
        for number, mib in sizes
        for cpus, way in helpers
    ]
    print(f"{count} kills of each of {len(jobs)} kinds, interleaved.")
    bench = Bench(helpers, zygotes, meter, watcher)
    in_turns(jobs, lambda _: count, bench.do)
    tell(run, bench.found, jobs)


if __name__ == "__main__":
    main()
