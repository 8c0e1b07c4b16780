"""How the time of a kill grows with its victim: `make bench-growth`.

Four curves: the victim's size (with small pages, and with transparent huge
pages), its threads, its mappings (VMAs), and how many victims there are at
once. For each point: how long from the start of the kill until SIGKILL is
sent, the release is done, 5 % of all that was charged for the victim are
left in its memory cgroup, and the victim has ended; and the CPU time of
killer and victim. From these the exponent of the growth (time ~ x^k), the
fixed cost, and the cost of one more unit.

Where the time goes is told by the steps of the kill; by perf also in the
kernel's functions, where there is a perf that may see it (profile_kernel.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import common
import many
import victims
from cgroups import Meter, Unavailable
from common import (
    BACK,
    MIB,
    Back,
    Program,
    Run,
    Spread,
    User,
    Watcher,
    Zygote,
    in_turns,
    in_us,
    settled,
    size_text,
    users,
)
from mrelease.bench import in_ms
from profile_kernel import NOTE, Perf, PerfError, Profile, no_perf
from ways import WAYS, Helper, Standing, legend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GIVE_UP = 30.0
"""Seconds."""
BIG = 4096
"""MiB from which on a victim takes so long to make that it is killed less
often."""
SETTLE = 10e-6
"""Seconds that each thread is given to fall asleep."""
EACH = 10
"""MiB of each of many victims."""
THESE = ("signal", "kill", "reaper-auto")
UNMAP = "unmap-1"
MANY = {"signal": "signals", "kill": "kill", "reaper-auto": "reaper"}
"""The same way, in many.py."""


class Curve(NamedTuple):
    text: str
    unit: str
    """Of which there are more and more."""
    points: tuple[int, ...]
    quick: tuple[int, ...]
    mib: int = 0
    """The victim's size; 0: it is the point."""


CURVES = {
    "size": Curve(
        "The victim's size, in small pages", "MiB",
        tuple(16 << i for i in range(10)), (16, 64, 256),
    ),
    "thp": Curve(
        "The victim's size, in transparent huge pages", "MiB",
        tuple(16 << i for i in range(10)), (16, 64, 256),
    ),
    "threads": Curve(
        "Threads, of a victim of 64 MiB", "thread",
        (1, 4, 16, 64, 256, 1024, 2048, 4096), (1, 64, 512), 64,
    ),
    "vmas": Curve(
        "Mappings, of a victim of 256 MiB", "VMA",
        (1, 64, 512, 4096, 16384, 32768, 60000), (1, 1000, 16000), 256,
    ),
    "victims": Curve(
        f"Victims at once, of {EACH} MiB each", "victim",
        (1, 4, 16, 64, 256, 512, 1000), (1, 10, 100),
    ),
}  # fmt: skip
NAMES = ("size", "threads", "vmas", "victims")
"""As --curves has them; size is two curves."""


class Job(NamedTuple):
    curve: str
    point: int
    way: str


class Found(NamedTuple):
    """One kill, or one of many victims; seconds since it began."""

    x: int
    """As the kernel counts it: MiB, threads, VMAs."""
    held: int
    """Bytes charged for it: its memory, and the kernel's for it."""
    huge: int
    """Bytes of it that were in huge pages."""
    signalled: float | None
    entered: float | None
    released: float | None
    back: float | None
    ended: float | None
    cpu_killer: float | None
    cpu_victim: float | None
    outcomes: dict[str, int]


class Killed(NamedTuple):
    found: Found
    begun: int
    """Nanoseconds of the monotonic clock."""
    victim: int
    killer: int


MEASURES: dict[str, tuple[str, Callable[[Found], float | None]]] = {
    "signalled": ("SIGKILL sent", lambda one: one.signalled),
    "released": ("release done", lambda one: one.released),
    "back": ("memory back", lambda one: one.back),
    "ended": ("victim ended", lambda one: one.ended),
    "cpu": (
        "CPU time of both",
        lambda one: None if one.cpu_victim is None or one.cpu_killer is None
        else one.cpu_victim + one.cpu_killer,
    ),
}  # fmt: skip


# --------------------------------------------------------------- limits


def _first_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text().split()[0])
    except (OSError, ValueError):
        return None


def available() -> int:
    """Bytes that new memory may take without anything being swapped."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Unavailable("/proc/meminfo has no MemAvailable")


def size_of(curve: str, point: int) -> int:
    """MiB that such a victim takes, with what the kernel needs for it."""
    if curve == "victims":
        return point * (EACH + 1)
    mib = CURVES[curve].mib or point
    # Of a thread: its stacks, in the kernel and of its own, and its task.
    # Of a VMA: itself, and its anon_vma.
    each = {"threads": 40, "vmas": 1}.get(curve, 0)
    return mib + mib // 256 + each * point // 1024 + 8


def why_not(curve: str, point: int) -> str | None:
    """Why there can be no such victim; None if there can."""
    need = size_of(curve, point)
    half = available() // 2 // MIB
    if need > half:
        return (
            f"it takes {need} MiB, more than half of the available memory "
            f"({half} MiB)"
        )
    # A stack and its guard for each thread; and what every process has.
    mappings = {"threads": 2 * point, "vmas": point}.get(curve, 0) + 100
    limit = _first_number("/proc/sys/vm/max_map_count")
    if limit is not None and mappings > limit:
        return f"it needs {mappings} mappings, max_map_count is {limit}"
    if curve in ("threads", "victims"):
        for name in ("threads-max", "pid_max"):
            limit = _first_number(f"/proc/sys/kernel/{name}")
            if limit is not None and point + 200 > limit:
                return f"kernel.{name} is {limit}"
    return None


def no_thp() -> str | None:
    """Why there are no transparent huge pages here; None if there are."""
    where = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not where.exists():
        return "the kernel has none"
    setting = where.read_text().partition("[")[2].partition("]")[0]
    if setting == "never":
        return f"{where} says never"
    try:
        with victims.asleep(16, thp="on") as victim:
            if huge_pages(victim.pid) == 0:
                return f"the kernel gave none, though {where} says {setting}"
    except Unavailable as why:
        return str(why)
    return None


def huge_pages(pid: int) -> int:
    """Bytes of its memory that are in transparent huge pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def mappings(pid: int) -> int:
    with open(f"/proc/{pid}/maps", "rb") as file:
        return sum(1 for _ in file)


def cpu_of(pid: int) -> float:
    """Seconds of CPU time of a process that lives."""
    # CPUCLOCK_SCHED of the process: MAKE_PROCESS_CPUCLOCK() in the kernel,
    # and what clock_getcpuclockid(3) answers.
    return time.clock_gettime((~pid << 3) | 2)


def cpu_of_children() -> float:
    """Seconds of CPU time of all children that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ------------------------------------------------------------ the kills


class Bench:
    def __init__(
        self,
        run: Run,
        user: User,
        sides: dict[str, Standing],
        helpers: dict[str, Helper],
    ) -> None:
        self.found: dict[Job, list[Found]] = {}
        self.gaps: list[float] = []
        self.left_out: dict[tuple[str, int], str] = {}
        self.meter = Meter()
        run.stack.callback(self.meter.close)
        self.watcher = Watcher(self.meter, run.args.pause * 1e-3)
        run.stack.callback(self.watcher.close)
        self._zygote = None
        if helpers:
            self._zygote = Zygote(EACH, groups=(self.meter,))
            run.stack.callback(self._zygote.close)
        self._run = run
        self._user = user
        self._sides = sides
        self._helpers = helpers

    def fits(self, curve: str, point: int) -> bool:
        """Whether there can be such a victim; says why not, once."""
        known = curve, point
        if known in self.left_out:
            return False
        why = why_not(curve, point)
        if why is not None:
            self._leave_out(curve, point, why)
        return why is None

    def _leave_out(self, curve: str, point: int, why: str) -> None:
        self.left_out[curve, point] = why
        self._run.note(f"left out: {curve} {point}", why)

    def do(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            # Others may have taken memory since the start.
            if not self.fits(job.curve, job.point):
                continue
            try:
                found = self.one(job)
            except Unavailable as why:
                self._leave_out(job.curve, job.point, str(why))
                continue
            self.found.setdefault(job, []).append(found)

    def one(self, job: Job) -> Found:
        if job.curve == "victims":
            return self._many(job)
        if job.way == UNMAP:
            return self._unmap(job)
        return self.kill(job, lambda: None).found

    def _begin(self, held: int, pids: Sequence[int]) -> None:
        """Watch for the end of so much of what is charged now."""
        time.sleep(0.003)
        limit = self.meter.usage() - int(held * (1 - BACK))
        self.watcher.begin(limit, GIVE_UP, pids)

    def _end(self) -> Back:
        back = self.watcher.end()
        self.gaps.append(back.gap)
        return back

    def kill(self, job: Job, begin: Callable[[], None]) -> Killed:
        """begin() is called just before the kill."""
        options: victims.Options = {
            "groups": [self.meter],
            # Not as the machine has it: so each curve is of one kind.
            "thp": "on" if job.curve == "thp" else "off",
        }
        if self._user.uid is not None:
            options["user"] = self._user.uid
        threads = job.point if job.curve == "threads" else 1
        if job.curve == "vmas":
            options["vmas"] = job.point
        mib = CURVES[job.curve].mib or job.point
        side = self._sides[job.way]
        before = settled(self.meter)
        with victims.Process(mib, threads, **options) as victim:
            # All are on their way to sleep. Not victims.asleep(): a look at
            # /proc/PID/task makes the entries of all threads, which the next
            # look finds and the end of each thread takes away.
            time.sleep(0.003 + threads * SETTLE)
            held = max(self.meter.usage() - before, mib * MIB)
            huge = huge_pages(victim.pid)
            x = {
                "threads": lambda: int(victim.status()["Threads"]),
                "vmas": lambda: mappings(victim.pid),
            }.get(job.curve, lambda: mib)()
            lived = cpu_of(victim.pid)
            killer = cpu_of(side.pid)
            pid = victim.pid
            self._begin(held, [pid])
            begin()
            shot = side.shoot(pid)
            back = self._end()
            killer = cpu_of(side.pid) - killer
            children = cpu_of_children()
        died = cpu_of_children() - children
        return Killed(
            Found(
                x, held, huge, shot.signalled, shot.entered, shot.released,
                _since(back.when, shot.begun), _since(back.ended, shot.begun),
                killer, max(0.0, died - lived), {shot.outcome: 1},
            ),
            shot.begun, pid, side.pid,
        )  # fmt: skip

    def _unmap(self, job: Job) -> Found:
        before = settled(self.meter)
        how = "on" if job.curve == "thp" else "off"
        with Program(
            "unmap", str(job.point), "1", how, groups=[self.meter]
        ) as program:
            held = max(self.meter.usage() - before, job.point * MIB)
            huge = huge_pages(program.pid)
            used = cpu_of(program.pid)
            self._begin(held, ())
            begun, ended = map(int, program.ask("").split())
            back = self._end()
            used = cpu_of(program.pid) - used
        return Found(
            job.point, held, huge, None, None, (ended - begun) / 1e9,
            _since(back.when, begun), None, used, 0.0, {},
        )  # fmt: skip

    def _many(self, job: Job) -> Found:
        assert self._zygote is not None
        before = settled(self.meter)
        pids = self._zygote.make(job.point)
        lived = self._zygote.cpu()
        held = max(self.meter.usage() - before, job.point * EACH * MIB)
        self._begin(held, pids)
        shots = many.Shots(*self._helpers[job.way].ask(pids))
        back = self._end()
        died = self._zygote.reap()
        return Found(
            job.point, held, 0, shots.signalled, None, shots.released,
            _since(back.when, shots.begun), _since(back.ended, shots.begun),
            shots.cpu, max(0, died - lived) / 1e9, shots.outcomes,
        )  # fmt: skip


def _since(when: int | None, begun: int) -> float | None:
    return None if when is None else (when - begun) / 1e9


# -------------------------------------------------------------- the fits


class Power(NamedTuple):
    """time ~ x ** exponent, over the points from `first` on."""

    exponent: float
    error: float
    """Its standard error; nan with two points."""
    first: float
    points: int


class Line(NamedTuple):
    """time = fixed + each * x; seconds."""

    fixed: float
    each: float


def fit_power(points: Sequence[tuple[float, float]]) -> Power | None:
    """Least squares of log(time) over log(x), on the upper part.

    That is the points from the largest x down to the last one that took
    twice the shortest time, or more: there the fixed cost is the smaller
    part. None where there are not two of these: nothing grows.
    """
    shortest = min(t for _, t in points)
    upper: list[tuple[float, float]] = []
    for x, t in sorted(points, reverse=True):
        if t < 2 * shortest:
            break
        upper.append((math.log(x), math.log(t)))
    if len(upper) < 2:
        return None
    xs, ts = zip(*upper, strict=True)
    slope, cut = statistics.linear_regression(xs, ts)
    spread = sum((x - statistics.mean(xs)) ** 2 for x in xs)
    left = sum((t - cut - slope * x) ** 2 for x, t in upper)
    n = len(upper)
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else math.nan
    return Power(slope, error, math.exp(min(xs)), n)


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares of the relative error, so that small points count.

    Neither is below 0: a negative fixed cost means that there is none.
    """
    weights = [1 / t**2 for _, t in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True))
    t_mean = sum(w * t for w, (_, t) in zip(weights, points, strict=True))
    x_mean /= total
    t_mean /= total
    both = [
        (w, x - x_mean, t - t_mean)
        for w, (x, t) in zip(weights, points, strict=True)
    ]
    each = sum(w * x * t for w, x, t in both) / sum(
        w * x * x for w, x, _ in both
    )
    if each < 0:
        return Line(t_mean, 0.0)
    if t_mean - each * x_mean >= 0:
        return Line(t_mean - each * x_mean, each)
    top = sum(w * x * t for w, (x, t) in zip(weights, points, strict=True))
    return Line(
        0.0,
        top
        / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True)),
    )


# ------------------------------------------------------------- the report


def median_of(some: Sequence[Found], measure: str) -> float:
    """Of those that had it; nan if none had it."""
    get = MEASURES[measure][1]
    known = [t for one in some if (t := get(one)) is not None]
    return statistics.median(known) if known else math.nan


def jobs_of(bench: Bench, curve: str) -> list[Job]:
    """Those that were done, as the table has them."""
    order = [*THESE, UNMAP]
    return sorted(
        (job for job in bench.found if job.curve == curve),
        key=lambda job: (job.point, order.index(job.way)),
    )


def outcomes_of(some: Sequence[Found]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in some:
        for name, count in one.outcomes.items():
            total[name] = total.get(name, 0) + count
    return total


def tell_curve(run: Run, bench: Bench, curve: str) -> None:
    rows = []
    for job in jobs_of(bench, curve):
        some = bench.found[job]
        outcomes = outcomes_of(some)
        every = sum(outcomes.values())
        x = round(statistics.median(one.x for one in some))
        held = statistics.median(one.held for one in some)
        huge = statistics.median(one.huge for one in some)
        rows.append([
            f"{x}", job.way, str(len(some)), f"{held / MIB:.0f}",
            f"{huge / MIB:.0f}",
            in_us(median_of(some, "signalled")),
            *(in_ms(median_of(some, name))
              for name in ("released", "back", "ended")),
            *(in_ms(Spread.of(cpus).median) for cpus in (
                [one.cpu_killer for one in some],
                [one.cpu_victim for one in some])),
            f"{outcomes.get('released', 0) / every:.0%}"
            if job.way not in ("signal", UNMAP) else "",
        ])  # fmt: skip
        back = Spread.of(one.back for one in some)
        run.row(
            kind="point",
            **job._asdict(),
            x=x,
            median=back.median,
            quartiles=[back.low, back.high],
            n=len(some),
            held=held,
            huge=huge,
            medians={
                name: None if math.isnan(t := median_of(some, name)) else t
                for name in MEASURES
            },
            shares=shares_of(some),
            outcomes=outcomes,
            found=[one._asdict() for one in some],
        )
    if rows:
        common.table(
            f"{CURVES[curve].text}: medians, in ms where not told",
            (f"{CURVES[curve].unit}s", "way", "n", "charged", "huge",
             "SIGKILL, us",
             *(MEASURES[name][0] for name in ("released", "back", "ended")),
             "CPU killer", "CPU victim", "released"),
            rows,
        )  # fmt: skip


STEPS = ("before SIGKILL", "release", "then: memory back", "then: the end")


def shares_of(some: Sequence[Found]) -> list[float] | None:
    """The mean share of each of STEPS in the time to the victim's end."""
    each = []
    for one in some:
        if one.signalled is None or one.back is None or one.ended is None:
            continue
        # SIGKILL alone has no release, nor has one that came too late.
        released = max(one.released or 0.0, one.signalled)
        # 5 % may be left while the release goes on.
        back = max(one.back, released)
        end = max(one.ended, back)
        times = (0.0, one.signalled, released, back, end)
        each.append([(b - a) / end for a, b in itertools.pairwise(times)])
    if not each:
        return None
    return [statistics.mean(column) for column in zip(*each, strict=True)]


def tell_shares(bench: Bench, curve: str) -> None:
    rows = []
    for job in jobs_of(bench, curve):
        some = bench.found[job]
        shares = shares_of(some)
        if shares is None:
            continue
        x = round(statistics.median(one.x for one in some))
        rows.append([
            str(x), job.way, in_ms(median_of(some, "ended")),
            *(f"{share:.1%}" for share in shares),
        ])  # fmt: skip
    if rows:
        common.table(
            f"{CURVES[curve].text}: where the time goes, mean shares",
            (f"{CURVES[curve].unit}s", "way", "whole, ms", *STEPS),
            rows,
        )


def tell_growth(run: Run, bench: Bench, curves: Sequence[str]) -> None:
    rows = []
    for curve in curves:
        jobs = jobs_of(bench, curve)
        unit = CURVES[curve].unit
        for way in (*THESE, UNMAP):
            for measure, (text, _) in MEASURES.items():
                points = [
                    (statistics.median(one.x for one in some), t)
                    for job in jobs
                    if job.way == way
                    and (some := bench.found[job])
                    and (t := median_of(some, measure)) > 0
                ]
                if len(points) < 2:
                    continue
                power, line = fit_power(points), fit_line(points)
                rows.append([
                    f"{curve}, {way}", text, *_power_text(power),
                    in_us(line.fixed),
                    f"{line.each * 1e6:.3g} / {unit}",
                ])  # fmt: skip
                run.row(
                    kind="fit",
                    curve=curve,
                    way=way,
                    measure=measure,
                    points=points,
                    power=None if power is None else {
                        **power._asdict(),
                        "error": None if math.isnan(power.error)
                        else power.error,
                    },
                    line=line._asdict(),
                )  # fmt: skip
    if not rows:
        return
    common.table(
        "How it grows: time ~ x^exponent, and time = fixed + each * x",
        ("curve", "until", "exponent", "s.e.", "from x", "points",
         "fixed, us", "each, us"),
        rows,
    )  # fmt: skip
    print(
        "exponent: least squares of log(median) over log(x), with its "
        "standard error, on the\nupper part: the points from the largest x "
        "down to the last one with at least twice\nthe shortest time, since "
        "below that most is fixed cost. flat: fewer than two points\nare so. "
        "fixed, each: least squares of the relative error on all points, both "
        "at least 0."
    )


def _power_text(power: Power | None) -> tuple[str, str, str, str]:
    if power is None:
        return "flat", "", "", ""
    error = "" if math.isnan(power.error) else f"{power.error:.2f}"
    return (
        f"{power.exponent:.2f}", error, f"{power.first:.0f}",
        str(power.points),
    )  # fmt: skip


def tell(run: Run, bench: Bench, curves: Sequence[str]) -> None:
    for curve in curves:
        tell_curve(run, bench, curve)
    print(
        "SIGKILL: until it is sent. charged: MiB, the victim's and the "
        "kernel's for it (stacks, VMAs,\npage tables); huge: of these, in "
        f"transparent huge pages (median). memory back: {BACK:.0%} of what\n"
        "was charged are left. release done: of those that were not too late; "
        "released: how many\nthese are. CPU: of the victim since the kill; of "
        "the killer, all threads. Of many victims,\neach time is that of the "
        "last one; signal is os.kill() for all, kill is mrelease.kill() in "
        "turn,\nreaper-auto is kill_many() of that Reaper."
    )
    print(legend([way for way in WAYS if way in THESE]))
    print(f"{UNMAP}: munmap of as much by a process of its own, 1 thread.")
    if bench.gaps:
        print(
            f"Watched with {bench.watcher.scheduling}, each "
            f"{bench.watcher.pause * 1e3:g} ms; the longest time between two "
            f"looks: median {in_ms(statistics.median(bench.gaps))} ms, "
            f"longest {in_ms(max(bench.gaps))} ms."
        )
    for curve in curves:
        tell_shares(bench, curve)
    print(
        "release: from SIGKILL (the sending included) until the release is "
        "done; none with SIGKILL\nalone, or if it came too late. then: what "
        "comes after it. Memory that is back before the\nrelease is done "
        "counts there as no time."
    )
    tell_growth(run, bench, curves)


# ------------------------------------------------------------------- perf


def scenes(quick: bool) -> list[tuple[str, int]]:
    """The points that perf looks at."""
    if quick:
        return [("size", 256), ("thp", 256), ("vmas", 16000),
                ("threads", 512)]  # fmt: skip
    return [("size", 1024), ("thp", 1024), ("vmas", 60000),
            ("threads", 4096)]  # fmt: skip


def profile(
    run: Run, bench: Bench, perf: Perf, way: str,
    these: Sequence[tuple[str, int]], count: int,
) -> None:  # fmt: skip
    jobs = [Job(curve, point, way) for curve, point in these]
    profiles = {job: Profile() for job in jobs}

    def do(some: Sequence[Job]) -> None:
        for job in some:
            if not bench.fits(job.curve, job.point):
                continue
            killed, samples = perf.see(functools.partial(bench.kill, job))
            found = killed.found
            steps = (
                0.0,
                found.signalled or 0.0,
                max(found.released or 0.0, found.ended or 0.0),
            )
            begun, signalled, ended = (
                killed.begun + int(step * 1e9) for step in steps
            )
            profiles[job].add(
                samples,
                killed.killer,
                killed.victim,
                (begun, signalled, ended),
            )

    try:
        in_turns(jobs, lambda _: count, do)
    except PerfError as failed:
        # What there is counts all the same.
        run.note("perf failed", str(failed))
    for job, seen in profiles.items():
        if seen.kills == 0:
            continue
        curve = CURVES[job.curve]
        text = (
            size_text(job.point) if not curve.mib
            else f"{job.point} {curve.unit}s"
        )  # fmt: skip
        seen.tell(f"{text} ({job.curve}), {WAYS[way].text}", perf.period)
        run.row(
            kind="perf", **job._asdict(), kills=seen.kills,
            period=perf.period, samples=seen.as_rows(),
        )  # fmt: skip


# ------------------------------------------------------------------- main


def main() -> None:
    parser = common.make_parser(__doc__ or "", who="root")
    parser.add_argument(
        "--n", type=int, help="kills of each kind (default: 5; quick: 2)"
    )
    parser.add_argument(
        "--curves", type=common.words(NAMES), metavar="LIST",
        default=",".join(NAMES),
    )  # fmt: skip
    for name, text in (
        ("sizes", "MiB"), ("threads", "threads"), ("vmas", "mappings"),
        ("counts", f"victims of {EACH} MiB"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=common.numbers, metavar="LIST",
            help=f"the points of that curve: {text}",
        )  # fmt: skip
    parser.add_argument(
        "--ways", type=common.words((*THESE, UNMAP)), metavar="LIST",
        default=",".join((*THESE, UNMAP)),
    )  # fmt: skip
    parser.add_argument(
        "--pause", type=float, default=0.1, help="ms between two looks"
    )
    parser.add_argument(
        "--n-perf", type=int, metavar="N",
        help="kills that perf looks at, of each kind (default: 5; quick: 1; "
        "0: none)",
    )  # fmt: skip
    args = parser.parse_args()
    everybody = users(args.users)
    if len(everybody) != 1:
        parser.error("one user at a time: --users root or --users nobody")
    with Run("growth", args) as run:
        try:
            _run(run, everybody[0])
        except Unavailable as why:
            raise SystemExit(f"not possible here: {why}") from None


def _points(run: Run) -> dict[str, Sequence[int]]:
    """Of each curve that was asked for and can be had."""
    args = run.args
    given = {
        "size": args.sizes, "thp": args.sizes, "threads": args.threads,
        "vmas": args.vmas, "victims": args.counts,
    }  # fmt: skip
    wanted = list(args.curves)
    if "size" in wanted:
        why = no_thp()
        if why is None:
            wanted.insert(wanted.index("size") + 1, "thp")
        else:
            run.note("left out: transparent huge pages", why)
    return {
        name: given[name]
        or (CURVES[name].quick if args.quick else CURVES[name].points)
        for name in wanted
    }


def _run(run: Run, user: User) -> None:
    args = run.args
    count = args.n or (2 if args.quick else 5)
    points = _points(run)
    if "victims" in points and user.uid is not None:
        # A zygote cannot enter a group, and be another user.
        del points["victims"]
        run.note("left out: victims", "needs --users root")
    sides: dict[str, Standing] = {}
    helpers: dict[str, Helper] = {}
    for way in THESE:
        if way not in args.ways:
            continue
        try:
            sides[way] = WAYS[way].open(user)
            run.stack.callback(sides[way].close)
            run.note(WAYS[way].text, sides[way].said)
            if "victims" in points:
                helpers[way] = Helper(many.WAYS[MANY[way]].make, user)
                run.stack.callback(helpers[way].close)
        except Unavailable as why:
            run.note(f"left out: {WAYS[way].text}", str(why))
    # Built now, not in the middle of a kill.
    victims.binary()
    common.build("unmap")
    bench = Bench(run, user, sides, helpers)
    run.note("watch", f"{bench.watcher.scheduling}, version "
             f"{bench.meter.version} memory cgroup")  # fmt: skip
    jobs = []
    for curve, these in points.items():
        ways = list(helpers if curve == "victims" else sides)
        if curve in ("size", "thp") and UNMAP in args.ways:
            ways.append(UNMAP)
        jobs += [
            Job(curve, point, way)
            for point in these
            if bench.fits(curve, point)
            for way in ways
        ]

    few = math.ceil(count * 0.6)

    def turns(job: Job) -> int:
        return few if size_of(job.curve, job.point) >= BIG else count

    print(
        f"{count} kills of each of {len(jobs)} kinds ({few} of those that "
        f"take {size_text(BIG)} or\nmore), interleaved; pid {os.getpid()}."
    )
    in_turns(jobs, turns, bench.do)
    tell(run, bench, list(points))
    n_perf = args.n_perf
    if n_perf is None:
        n_perf = 1 if args.quick else 5
    if n_perf == 0:
        return
    seen = [scene for scene in scenes(args.quick) if scene[0] in points]
    seeing = next((way for way in reversed(THESE) if way in sides), None)
    missing = no_perf()
    if missing is not None:
        run.note("left out: perf", missing)
    elif seen and seeing is not None:
        perf = Perf()
        run.note("perf", perf.text)
        profile(run, bench, perf, seeing, seen, n_perf)
        print(NOTE)


if __name__ == "__main__":
    main()
