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

import os
import statistics
from typing import TYPE_CHECKING

import common
from cgroups import Unavailable
from common import BACK, Run, Spread, in_turns, size_text, users
from measure import (
    KINDS,
    LIMITS,
    Bench,
    Job,
    available,
    make_parser,
    spread_text,
    tell_ratios,
    tell_times,
)
from mrelease.bench import in_ms
from ways import WAYS, Side, legend

if TYPE_CHECKING:
    from collections.abc import Sequence

VICTIMS = tuple(name for name in KINDS if name != "64")
THESE = ("signal", "c", "kill", "reaper-auto", "reaper", "reaper-fifo")
OURS = ("kill", "reaper-auto", "reaper-fifo")
"""Of which something is wanted."""


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


def tell(run: Run, bench: Bench, jobs: Sequence[Job]) -> None:
    found = bench.found
    ways = [*(w for w in THESE if any(j.way == w for j in found)),
            *(f"unmap-{t}" for t in LIMITS)]  # fmt: skip
    times = {
        job: Spread.of(one.seconds for one in found[job])
        for job in jobs
        if job in found
    }
    counts = sorted({spread.n for spread in times.values()})
    tell_times(
        f"From the kill to {BACK:.0%} of the memory left, in ms: median "
        "(quartiles)",
        times,
        ways,
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
            **job._asdict(), n=times[job].n,
            give_up=bench.give_up(KINDS.get(job.kind, KINDS["asleep"])),
            median=times[job].median,
            quartiles=[times[job].low, times[job].high],
            outcomes={o: outcomes.count(o) for o in set(outcomes)},
            found=some,
        )  # fmt: skip
    tell_ratios(
        times,
        ways,
        (
            ("Ratio to munmap with one thread", "unmap-1"),
            (
                "Ratio to SIGKILL alone (less is faster; 0: to never)",
                "signal",
            ),
        ),
    )
    _tell_aims(bench, times)


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
    parser = make_parser(__doc__ or "", 20, "64,1024,4096", VICTIMS, THESE)
    parser.add_argument(
        "--state-size", type=int, metavar="MIB",
        help="of the victims in other states (default: 1024; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--shared-size", type=int, metavar="MIB",
        help="of shared memory (default: 512; quick: 64)",
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
            if not available(name):
                continue
            kind = KINDS[name]
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
