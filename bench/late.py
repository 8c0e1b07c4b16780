"""How often a release comes too late: `make bench-late`.

After SIGKILL the victim is out of reach of process_mrelease(2) within tens
of microseconds, as soon as it gets to run. Compared are two calls one after
the other in C and in Python (ctypes), mrelease.kill() and the Reaper, as
root and as an ordinary user, on an idle machine and beside two busy
processes for each CPU.

Each kill is of a new victim. All of it by default takes many hours: choose
(--n, --sizes, --victims, --ways, --load, --users), or stop it with Ctrl-C:
then what there is is printed.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import common
import victims
from cgroups import Unavailable
from common import MIB, Load, Run, User, in_turns, size_text
from mrelease.demo import bar
from mrelease.meter import room
from ways import LATE, WAYS, Shot, Side, legend

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(NamedTuple):
    text: str
    threads: int
    spin: bool = False


KINDS = {
    "1": Kind("1 thread asleep", 1),
    "spin": Kind("1 thread spinning", 1, spin=True),
    "8": Kind("8 threads asleep", 8),
    "64": Kind("64 threads asleep", 64),
    "512": Kind("512 threads asleep", 512),
}
THESE = ("c", "ctypes", "kill", "reaper", "c-fifo", "reaper-fifo")
LOADS = ("idle", "busy")


class Job(NamedTuple):
    kind: str
    mib: int
    load: str
    user: User
    way: str


class Range:
    """Makes victims ahead, a few at a time, and has them shot."""

    MOST = 8

    def __init__(
        self, sides: dict[tuple[User, str], Side], load: Load
    ) -> None:
        self.shots: dict[Job, list[Shot]] = {}
        self._sides = sides
        self._load = load
        self._room = min(room() // 2, 8192 * MIB)
        self._makers = ThreadPoolExecutor(load.count // 2)

    def batch(self, jobs: Sequence[Job]) -> int:
        """How many victims fit into memory at once."""
        size = 0
        for count, job in enumerate(jobs[: self.MOST]):
            size += job.mib * MIB
            if size > self._room:
                return max(1, count)
        return min(len(jobs), self.MOST)

    def run(self, jobs: Sequence[Job]) -> None:
        # Made side by side, while nothing else runs: memory takes its time.
        self._load.switch(False)
        futures = [self._makers.submit(self._make, job) for job in jobs]
        made: list[victims.Process] = []
        try:
            # All, for what was made before one failed is to be closed.
            wait(futures)
            made += [f.result() for f in futures if f.exception() is None]
            for future in futures:
                future.result()
            for job, victim in zip(jobs, made, strict=True):
                self._shoot(job, victim)
        finally:
            for victim in made:
                victim.close()

    @staticmethod
    def _make(job: Job) -> victims.Process:
        kind = KINDS[job.kind]
        options: victims.Options = {}
        if job.user.uid is not None:
            options["user"] = job.user.uid
        if not kind.spin:
            return victims.asleep(job.mib, threads=kind.threads, **options)
        victim = victims.spinning(job.mib, threads=kind.threads, **options)
        # Until its turn comes.
        victim.popen.send_signal(signal.SIGSTOP)
        return victim

    def _shoot(self, job: Job, victim: victims.Process) -> None:
        self._load.switch(job.load == "busy")
        if KINDS[job.kind].spin:
            victim.popen.send_signal(signal.SIGCONT)
        time.sleep(0.003)
        shot = self._sides[job.user, job.way].shoot(victim.pid)
        self.shots.setdefault(job, []).append(shot)
        if not victim.ended(0.05):
            self._load.switch(False)  # let it end
        victim.close()

    def close(self) -> None:
        self._makers.shutdown()


def share(shots: Sequence[Shot]) -> float:
    return sum(shot.late for shot in shots) / len(shots)


def percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


def tell(run: Run, shots: dict[Job, list[Shot]], order: list[Job]) -> None:
    ways = [way for way in THESE if any(job.way == way for job in shots)]
    users = list(dict.fromkeys(job.user for job in order))
    rows = []
    for mark in dict.fromkeys((j.load, j.user, j.kind, j.mib) for j in order):
        load, user, kind, mib = mark
        found = {
            way: shots.get(Job(kind, mib, load, user, way), []) for way in ways
        }
        counts = {len(some) for some in found.values() if some}
        if not counts:
            continue
        least, most = min(counts), max(counts)
        rows.append([
            f"{KINDS[kind].text}, {size_text(mib)}", load, user.name,
            f"{least}" if least == most else f"{least}-{most}",
            *(percent(share(some)) if some else "" for some in found.values()),
        ])  # fmt: skip
    common.table(
        "Share of kills in which the release came too late",
        ("victim", "machine", "as", "n", *ways),
        rows,
    )
    print(legend(ways) + "\n" + LATE)
    for job, some in shots.items():
        run.row(
            **job._replace(user=job.user.name)._asdict(),  # type: ignore[arg-type]
            late=share(some), n=len(some), shots=some,
        )  # fmt: skip
    _tell_others(shots)
    for user in users:
        for load in dict.fromkeys(job.load for job in order):
            _chart(shots, ways, user, load, run.cpus)
    _tell_aims(shots)


def _tell_others(shots: dict[Job, list[Shot]]) -> None:
    """What is not plain in the table."""
    all_shots = [(job, shot) for job, some in shots.items() for shot in some]
    for way in THESE:
        late = [
            shot for job, shot in all_shots if job.way == way and shot.late
        ]
        known = [shot for shot in late if shot.held is not None]
        if known:
            held = sum(shot.held is True for shot in known)
            print(
                f"{WAYS[way].text}: {len(known)} late, and in {held} of them "
                "the victim had not ended yet."
            )
        others = [
            shot.outcome
            for job, shot in all_shots
            if job.way == way and not shot.late and shot.released is None
        ]
        for outcome in sorted(set(others)):
            print(
                f"{WAYS[way].text}: {others.count(outcome)} kills neither "
                f"released nor late, but {outcome}."
            )


def _chart(
    shots: dict[Job, list[Shot]],
    ways: Sequence[str],
    user: User,
    load: str,
    cpus: int,
) -> None:
    """Bars, as they can go into a text."""
    beside = f"beside {2 * cpus} busy processes" if load == "busy" else "idle"
    sizes = sorted({job.mib for job in shots})
    print(
        f"\nToo late, of all kills as {user.name}; {cpus} CPUs, {beside}; "
        f"victims of {', '.join(size_text(mib) for mib in sizes)}\n"
    )
    width = max(len(WAYS[way].text) for way in ways)
    for kind, about in KINDS.items():
        lines = []
        for way in ways:
            some = [
                shot
                for job, found in shots.items()
                if (job.kind, job.load, job.user, job.way)
                == (kind, load, user, way)
                for shot in found
            ]
            if some:
                late = share(some)
                drawn = bar(late, 40) if late else ""
                lines.append(
                    f"  {WAYS[way].text:{width}}  {drawn}"
                    f"{' ' * bool(drawn)}{percent(late)}"
                )
        if lines:
            print("\n".join([about.text, *lines]))


def _tell_aims(shots: dict[Job, list[Shot]]) -> None:
    print()
    limit = 0.01
    # Without a right there is no aim beside busy processes.
    for way, loads in (("reaper-fifo", LOADS), ("reaper", ("idle",))):
        cells = {
            job: share(s)
            for job, s in shots.items()
            if job.way == way and job.load in loads
        }
        if not cells:
            continue
        worst = max(cells, key=lambda job: cells[job])
        bad = sum(value > limit for value in cells.values())
        answer = "reached" if not bad else f"MISSED in {bad} of {len(cells)}"
        print(
            f"Aim, {WAYS[way].text}: at most {percent(limit)} late for each "
            f"victim: {answer}; the worst: {percent(cells[worst])} "
            f"({KINDS[worst.kind].text}, {size_text(worst.mib)}, "
            f"{worst.load}, as {worst.user.name})."
        )


def main() -> None:
    parser = common.make_parser(__doc__ or "")
    parser.add_argument(
        "--n", type=int, help="kills of each kind (default: 200; quick: 4)"
    )
    parser.add_argument(
        "--sizes", type=common.numbers, metavar="LIST",
        help="MiB (default: 64,1024,4096; quick: 64)",
    )  # fmt: skip
    for name, known in (
        ("victims", tuple(KINDS)), ("ways", THESE), ("load", LOADS)
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=common.words(known), metavar="LIST",
            default=",".join(known),
        )  # fmt: skip
    args = parser.parse_args()
    count = args.n or (4 if args.quick else 200)
    sizes = args.sizes or ([64] if args.quick else [64, 1024, 4096])
    with Run("late", args) as run:
        sides: dict[tuple[User, str], Side] = {}
        for user in common.users(args.users):
            for way in args.ways:
                if WAYS[way].privileged and not user.privileged:
                    continue
                try:
                    side = WAYS[way].open(user)
                except Unavailable as why:
                    print(f"{WAYS[way].text} as {user.name}: left out: {why}")
                    continue
                run.stack.callback(side.close)
                sides[user, way] = side
                run.note(f"{WAYS[way].text} as {user.name}", side.said)
        load = Load(run.cpus)
        run.stack.callback(load.close)
        jobs = [
            Job(kind, mib, how, user, way)
            for how in args.load
            for kind in args.victims
            for mib in sizes
            for user, way in sides
        ]
        print(f"{count} kills of each of {len(jobs)} kinds, interleaved.")
        field = Range(sides, load)
        run.stack.callback(field.close)
        in_turns(jobs, lambda _: count, field.run, field.batch)
        load.switch(False)
        tell(run, field.shots, jobs)


if __name__ == "__main__":
    main()
