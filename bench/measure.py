"""How long until the memory of one victim is back, by kind of victim.

What back.py and peers.py share: the kinds, one kill or munmap of each, and
the form in which times and ratios are printed.
"""

from __future__ import annotations

import math
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
    settled,
    size_text,
    table,
)
from mrelease.bench import in_ms

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from ways import Shot, Side


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
    "64": Kind("64 threads asleep", victims.asleep, threads=64),
    "starved": Kind(
        "starved (SCHED_IDLE)", victims.asleep, {"idle": True}, busy=True,
        patient=False,
    ),
    "quota": Kind("CPU quota 2 %", victims.on_quota),
    "d": Kind("D state", victims.in_d_state, patient=False),
    "frozen": Kind("frozen (v1)", victims.frozen, patient=False),
    "shared": Kind("shared memory", victims.asleep),
}  # fmt: skip
SHORT_GIVE_UP = 2.0
"""Seconds, for SIGKILL alone where it never ends."""
LIMITS = {1: "munmap, 1 thread", 2: "munmap, 2 threads"}


def make_parser(
    text: str, count: int, sizes: str, kinds: Sequence[str],
    ways: Sequence[str],
) -> argparse.ArgumentParser:  # fmt: skip
    """The options that both have."""
    parser = common.make_parser(text, who="root")
    parser.add_argument(
        "--n", type=int,
        help=f"kills of each kind (default: {count}; quick: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--n-slow", type=int, metavar="N",
        help="SIGKILL alone where it hardly ends (default: 3; quick: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=common.numbers, metavar="LIST",
        help=f"MiB (default: {sizes}; quick: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--give-up", type=float, metavar="S",
        help="seconds (default: 15; quick: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--pause", type=float, default=0.1, help="ms between two looks"
    )
    for name, known in (("victims", kinds), ("ways", ways)):
        parser.add_argument(
            f"--{name}", type=common.words(known), metavar="LIST",
            default=",".join(known),
        )  # fmt: skip
    return parser


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
    """Makes victims, has them killed, and tells when the memory is back."""

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
        self.sides = sides
        self._user = user
        self._give_up = give_up

    def do(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            found = (
                self.unmap(job.mib, int(job.way[-1]))
                if job.way.startswith("unmap")
                else self.kill(job)
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

    def options(self, _way: str) -> victims.Options:
        """What else a victim of this way has."""
        return {}

    def kill(self, job: Job) -> Found:
        kind = KINDS[job.kind]
        options = kind.options.copy()
        options.update(self.options(job.way))
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
                shot = self.sides[job.way].shoot(victim.pid)
                back = self.watcher.end()
            finally:
                self.load.switch(False)
        return Found(
            back.when and (back.when - shot.begun) / 1e9, back.gap, None, shot
        )


def spread_text(found: Spread) -> str:
    if math.isinf(found.median):
        return "never"
    return f"{in_ms(found.median)} ({in_ms(found.low)}-{in_ms(found.high)})"


def _ratio(found: Spread | None, base: Spread | None) -> str:
    if found is None or base is None or math.isinf(found.median):
        return ""
    if math.isinf(base.median):
        return "0"
    ratio = found.median / base.median
    return f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def available(name: str) -> bool:
    """Whether there can be victims of a kind here; else it is told."""
    kind = KINDS[name]
    try:
        with kind.make(1, threads=kind.threads, **kind.options):
            return True
    except Unavailable as why:
        print(f"{kind.text}: left out: {why}")
        return False


def _victims(times: dict[Job, Spread]) -> dict[tuple[str, int], str]:
    """What rows are of, and how they are called."""
    return {
        (job.kind, job.mib): f"{KINDS[job.kind].text}, {size_text(job.mib)}"
        for job in times
        if job.kind != "unmap"
    }


def _of(
    times: dict[Job, Spread], kind: str, mib: int, way: str
) -> Spread | None:
    """An unmap is the same for all victims of a size."""
    kind = "unmap" if way.startswith("unmap") else kind
    return times.get(Job(kind, mib, way))


def tell_times(
    title: str, times: dict[Job, Spread], ways: Sequence[str]
) -> None:
    """Print a table of times, a row a victim, a column a way."""
    rows = []
    for victim, text in _victims(times).items():
        found = [_of(times, *victim, way) for way in ways]
        rows.append(
            [text, *(spread_text(one) if one else "" for one in found)]
        )
    table(title, ("victim", *ways), rows)


def tell_ratios(
    times: dict[Job, Spread],
    ways: Sequence[str],
    bases: Sequence[tuple[str, str]],
) -> None:
    """Print a table of ratios for each (title, way to compare with)."""
    for title, base in bases:
        rows = []
        for victim, text in _victims(times).items():
            one = _of(times, *victim, base)
            found = [_of(times, *victim, way) for way in ways]
            rows.append([text, *(_ratio(other, one) for other in found)])
        table(title, ("victim", *ways), rows)
