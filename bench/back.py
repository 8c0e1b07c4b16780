"""How long until the memory is back: `make bench-back`.

From the start of the kill to the moment at which 5 % of the victim's memory
are left in its memory cgroup; for victims of three sizes, and for victims in
states in which they hardly end by themselves. Compared are SIGKILL alone,
SIGKILL and process_mrelease(2) in C, mrelease.kill(), the Reaper, and the
limit: a process that unmaps as much memory of its own, with one thread and
with two.

The memory is watched by a process that looks each 0.1 ms (--pause) and
sleeps in between, so that it hardly disturbs those who release; how much it
does is measured first.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import common
import victims
from cgroups import Meter, Unavailable
from common import (
    BACK,
    MIB,
    Back,
    Load,
    Program,
    Run,
    Spread,
    User,
    Watcher,
    in_ms,
    in_turns,
    settled,
    size_text,
    users,
)
from ways import WAYS, Shot, Side, legend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Kind(NamedTuple):
    text: str
    make: Callable[..., victims.Process]
    options: victims.Options = {}  # noqa: RUF012 - never changed
    threads: int = 1
    busy: bool = False
    patient: bool = True
    """SIGKILL alone does not take for ever."""
    sized: bool = False
    """Of all sizes; the others of one."""


KINDS = {
    "asleep": Kind("1 thread asleep", victims.asleep, sized=True),
    "spinning": Kind("1 thread spinning", victims.spinning, sized=True),
    "8": Kind("8 threads asleep", victims.asleep, threads=8, sized=True),
    "starved": Kind(
        "starved (SCHED_IDLE)", victims.asleep, {"idle": True}, busy=True,
        patient=False,
    ),
    "quota": Kind("CPU quota 2 %", victims.on_quota),
    "d": Kind("D state", victims.in_d_state, patient=False),
    "frozen": Kind("frozen (v1)", victims.frozen, patient=False),
    "shared": Kind("shared memory", victims.asleep),
}  # fmt: skip
THESE = ("signal", "c", "kill", "reaper-auto", "reaper", "reaper-fifo")
SHORT_GIVE_UP = 2.0
"""Seconds, for SIGKILL alone where it never ends."""
LIMITS = {1: "munmap, 1 thread", 2: "munmap, 2 threads"}
OURS = ("kill", "reaper-auto", "reaper-fifo")
"""Of which something is wanted."""


class Job(NamedTuple):
    kind: str
    mib: int
    way: str
    """One of ways.py, or unmap-1, unmap-2."""


class Found(NamedTuple):
    seconds: float | None
    """None: it was given up."""
    gap: float
    """The longest time between two looks."""
    own: float | None
    """What the unmapping process measured itself."""
    shot: Shot | None


class Bench:
    def __init__(
        self,
        run: Run,
        sides: dict[str, Side],
        user: User,
        give_up: float,
    ) -> None:
        self.found: dict[Job, list[Found]] = {}
        self.meter = Meter()
        run.stack.callback(self.meter.close)
        self.watcher = Watcher(self.meter, run.args.pause * 1e-3)
        run.stack.callback(self.watcher.close)
        self.load = Load(run.cpus)
        run.stack.callback(self.load.close)
        self._sides = sides
        self._user = user
        self._give_up = give_up

    def do(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            found = (
                self.unmap(job.mib, int(job.way[-1]))
                if job.way.startswith("unmap")
                else self._kill(job)
            )
            self.found.setdefault(job, []).append(found)

    def unmap(self, mib: int, threads: int, *, watched: bool = True) -> Found:
        before = settled(self.meter)
        with Program(
            "unmap", str(mib), str(threads), groups=[self.meter]
        ) as program:
            held = self.meter.usage() - before
            time.sleep(0.003)
            if watched:
                self.watcher.begin(before + int(held * BACK), self._give_up)
            begun, ended = map(int, program.ask("").split())
            back = self.watcher.end() if watched else Back(None, 0, 0.0)
        return Found(
            back.when and (back.when - begun) / 1e9,
            back.gap,
            (ended - begun) / 1e9,
            None,
        )

    def give_up(self, kind: Kind) -> float:
        if kind.patient or kind.busy:
            return self._give_up
        return min(SHORT_GIVE_UP, self._give_up)

    def _kill(self, job: Job) -> Found:
        kind = KINDS[job.kind]
        options = kind.options.copy()
        options["groups"] = [self.meter]
        if self._user.uid is not None:
            options["user"] = self._user.uid
        mib = job.mib
        if job.kind == "shared":
            options["shared_anon"] = mib
            mib = 0
        before = settled(self.meter)
        give_up = self.give_up(kind)
        with kind.make(mib, threads=kind.threads, **options) as victim:
            held = self.meter.usage() - before
            if held < job.mib * MIB * 0.9:
                # What was there before came back only now.
                held = job.mib * MIB
                before = self.meter.usage() - held
            try:
                self.load.switch(kind.busy)
                time.sleep(0.003)
                self.watcher.begin(before + int(held * BACK), give_up)
                shot = self._sides[job.way].shoot(victim.pid)
                back = self.watcher.end()
            finally:
                self.load.switch(False)
        return Found(
            back.when and (back.when - shot.begun) / 1e9, back.gap, None, shot
        )


def watch_costs(bench: Bench, rounds: int, mib: int) -> None:
    """What the watching takes from those who release."""
    pauses = (None, 1.0, 0.3, 0.1, 0.05)
    own: dict[tuple[int, float | None], list[float]] = {}
    chosen = bench.watcher.pause

    def do(jobs: Sequence[tuple[int, float | None]]) -> None:
        for threads, pause in jobs:
            bench.watcher.pause = (pause or 1.0) * 1e-3
            found = bench.unmap(mib, threads, watched=pause is not None)
            assert found.own is not None
            own.setdefault((threads, pause), []).append(found.own)

    in_turns([(t, p) for t in LIMITS for p in pauses], lambda _: rounds, do)
    bench.watcher.pause = chosen
    rows = []
    for threads, text in LIMITS.items():
        row = [text]
        for pause in pauses:
            values = own.get((threads, pause))
            row.append(spread_text(Spread.of(values)) if values else "")
        rows.append(row)
    common.table(
        f"What the watch costs: own time of unmapping {size_text(mib)}, in "
        f"ms: median (quartiles) of {rounds}",
        ("", *("not watched" if p is None else f"each {p:g} ms"
               for p in pauses)),
        rows,
    )  # fmt: skip


def spread_text(found: Spread) -> str:
    if math.isinf(found.median):
        return "never"
    return f"{in_ms(found.median)} ({in_ms(found.low)}-{in_ms(found.high)})"


def tell(run: Run, bench: Bench, jobs: Sequence[Job]) -> None:
    found = bench.found
    ways = [*(w for w in THESE if any(j.way == w for j in found)),
            *(f"unmap-{t}" for t in LIMITS)]  # fmt: skip
    times = {
        job: Spread.of(one.seconds for one in found[job])
        for job in jobs
        if job in found
    }
    rows = []
    for kind, mib in dict.fromkeys((job.kind, job.mib) for job in jobs):
        if kind == "unmap":
            continue
        row = [f"{KINDS[kind].text}, {size_text(mib)}"]
        for way in ways:
            key = (
                Job("unmap", mib, way)
                if way.startswith("unmap")
                else Job(kind, mib, way)
            )
            row.append(spread_text(times[key]) if key in times else "")
        rows.append(row)
    counts = sorted({spread.n for spread in times.values()})
    common.table(
        f"From the kill to {BACK:.0%} of the memory left, in ms: median "
        "(quartiles)",
        ("victim", *ways),
        rows,
    )
    print(
        f"{counts[0]} to {counts[-1]} kills each. never: not within "
        f"{bench.give_up(KINDS['asleep']):g} s ("
        f"{bench.give_up(KINDS['d']):g} s for D state and frozen). The unmap "
        "of a size\nis the same in all its rows."
    )
    print(legend([way for way in ways if way in WAYS]))
    print("unmap-1, unmap-2: munmap of as much, with one and two threads.")
    gaps = [one.gap for some in found.values() for one in some]
    if gaps:
        print(
            f"Watched with {bench.watcher.scheduling}, pause "
            f"{bench.watcher.pause * 1e3:g} ms; between two looks: median of "
            f"the longest {in_ms(statistics.median(gaps))} ms, longest "
            f"{in_ms(max(gaps))} ms."
        )
    for job, some in found.items():
        outcomes = [one.shot.outcome for one in some if one.shot]
        run.row(
            **job._asdict(), median=times[job].median, quartiles=[
                times[job].low, times[job].high],
            outcomes={o: outcomes.count(o) for o in set(outcomes)},
            found=some,
        )  # fmt: skip
    _tell_ratios(times, ways)
    _tell_aims(bench, times)


def _ratio(found: Spread | None, base: Spread | None) -> str:
    if found is None or base is None or math.isinf(found.median):
        return ""
    if math.isinf(base.median):
        return "0"
    ratio = found.median / base.median
    return f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def _tell_ratios(times: dict[Job, Spread], ways: Sequence[str]) -> None:
    victims_of = dict.fromkeys(
        (job.kind, job.mib) for job in times if job.kind != "unmap"
    )

    def of(kind: str, mib: int, way: str) -> Spread | None:
        kind = "unmap" if way.startswith("unmap") else kind
        return times.get(Job(kind, mib, way))

    for title, base in (
        ("Ratio to munmap with one thread", "unmap-1"),
        ("Ratio to SIGKILL alone (less is faster; 0: to never)", "signal"),
    ):
        rows = [
            [f"{KINDS[kind].text}, {size_text(mib)}",
             *(_ratio(of(kind, mib, way), of(kind, mib, base))
               for way in ways)]
            for kind, mib in victims_of
        ]  # fmt: skip
        common.table(title, ("victim", *ways), rows)


def _tell_aims(bench: Bench, times: dict[Job, Spread]) -> None:
    rows = []

    def add(job: Job, aim: str, value: float, limit: float) -> None:
        good = value <= limit
        victim = f"{KINDS[job.kind].text}, {size_text(job.mib)}"
        rows.append([
            f"{WAYS[job.way].text}: {victim}", aim, f"{value:.3g}",
            "reached" if good else "MISSED",
        ])  # fmt: skip

    for job, found in times.items():
        if job.way not in OURS:
            continue
        kind = KINDS[job.kind]
        unmap = times.get(Job("unmap", job.mib, "unmap-1"))
        if unmap and kind.sized and job.mib >= 1024:
            add(job, "at most 0.65 of munmap, 1 thread",
                found.median / unmap.median, 0.65)  # fmt: skip
        alone = times.get(Job(job.kind, job.mib, "signal"))
        if alone:
            limit = 0.02 if job.kind == "starved" else 1.0
            aim = (
                "at least 50 times as fast as SIGKILL alone"
                if limit < 1
                else "not slower than SIGKILL alone"
            )
            # At least so long, where it was given up.
            base = min(alone.median, bench.give_up(kind))
            add(job, aim, found.median / base, limit)
        idle = times.get(Job("asleep", job.mib, job.way))
        if idle and job.kind in ("d", "frozen"):
            add(job, "at most twice that of an idle victim",
                found.median / idle.median, 2.0)  # fmt: skip
    if rows:
        common.table("Aims", ("what", "aim", "ratio", ""), rows)


def main() -> None:
    parser = common.make_parser(__doc__ or "", who="root")
    parser.add_argument(
        "--n", type=int, help="kills of each kind (default: 20; quick: 2)"
    )
    parser.add_argument(
        "--n-slow", type=int, metavar="N",
        help="SIGKILL alone where it hardly ends (default: 3; quick: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=common.numbers, metavar="LIST",
        help="MiB (default: 64,1024,4096; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--state-size", type=int, metavar="MIB",
        help="of the victims in other states (default: 1024; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--shared-size", type=int, metavar="MIB",
        help="of shared memory (default: 512; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--give-up", type=float, metavar="S",
        help="seconds (default: 15; quick: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--pause", type=float, default=0.1, help="ms between two looks"
    )
    for name, known in (("victims", tuple(KINDS)), ("ways", THESE)):
        parser.add_argument(
            f"--{name}", type=common.words(known), metavar="LIST",
            default=",".join(known),
        )  # fmt: skip
    parser.add_argument(
        "--no-watch-costs", action="store_true", help="leave that table out"
    )
    args = parser.parse_args()
    quick = args.quick
    count = args.n or (2 if quick else 20)
    slow = args.n_slow or (1 if quick else 3)
    sizes = args.sizes or ([64] if quick else [64, 1024, 4096])
    state = args.state_size or (64 if quick else 1024)
    shared = args.shared_size or (64 if quick else 512)
    give_up = args.give_up or (3.0 if quick else 15.0)
    everybody = users(args.users)
    if len(everybody) != 1:
        parser.error("one user at a time: --users root or --users nobody")
    user = everybody[0]
    with Run("back", args) as run:
        sides: dict[str, Side] = {}
        for way in args.ways:
            if WAYS[way].privileged and not user.privileged:
                continue
            try:
                sides[way] = WAYS[way].open(user)
            except Unavailable as why:
                print(f"{WAYS[way].text}: left out: {why}")
                continue
            run.stack.callback(sides[way].close)
            run.note(WAYS[way].text, sides[way].said)
        try:
            bench = Bench(run, sides, user, give_up)
        except Unavailable as why:
            raise SystemExit(
                f"no memory cgroup to measure with: {why}"
            ) from None
        run.note("watch", f"{bench.watcher.scheduling}, version "
                 f"{bench.meter.version} memory cgroup")  # fmt: skip
        if not args.no_watch_costs:
            watch_costs(bench, 2 if quick else 9, 64 if quick else 1024)
        jobs = []
        for name in args.victims:
            kind = KINDS[name]
            options = kind.options
            try:
                with kind.make(1, threads=kind.threads, **options):
                    pass
            except Unavailable as why:
                print(f"{kind.text}: left out: {why}")
                continue
            these = (
                sizes
                if kind.sized
                else [shared if name == "shared" else state]
            )
            jobs += [Job(name, mib, way) for mib in these for way in sides]
        jobs += [
            Job("unmap", mib, f"unmap-{threads}")
            for mib in dict.fromkeys(job.mib for job in jobs)
            for threads in LIMITS
        ]

        def turns(job: Job) -> int:
            if job.way == "signal" and not KINDS[job.kind].patient:
                return min(slow, count)
            return count

        print(
            f"{count} kills of each of {len(jobs)} kinds, interleaved; "
            f"pid {os.getpid()}."
        )
        in_turns(jobs, turns, bench.do)
        tell(run, bench, jobs)


if __name__ == "__main__":
    main()
