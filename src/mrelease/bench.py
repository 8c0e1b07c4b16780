"""Does it pay here?  Kinds of victims, ways to kill them, sizes, compared.

Each victim is a new process (mrelease.stage) that is killed once.  Measured is
how long it takes until its memory is back, by a memory cgroup where one can be
made.  The kills of a round come in an order of its own, so that whatever else
the machine does hits all alike; what is told are medians with quartiles.

Nothing outlives the benchmark: all that it starts or changes ends with it.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import stat
import sys
import tempfile
import time
from errno import EAGAIN, EINTR, EPIPE, ESRCH, errorcode

from mrelease import __version__, _mrelease
from mrelease.footprint import in_units
from mrelease.killing import kill
from mrelease.meter import room
from mrelease.reaper import Reaper
from mrelease.release import Release
from mrelease.signals import not_now
from mrelease.stage import KINDS, Impossible, Stage, check_support, kill_alone
from mrelease.support import support

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, TextIO

_MIB = 1 << 20
_LATE = ("exited", "exiting")

METHODS: dict[str, str] = {
    "sigkill": "SIGKILL alone",
    "call": "SIGKILL, then the call",
    "kill": "kill()",
    "reaper": "Reaper",
}
OURS = ("kill", "reaper")


# ------------------------------------------------------------ the methods


def _two_calls(pid: int) -> str:
    """Make the two system calls one after the other, as others do."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        while True:
            try:
                _mrelease.process_mrelease(pidfd)
            except OSError as error:
                if error.errno in (EAGAIN, EINTR):
                    continue
                if error.errno == ESRCH:
                    return "exiting"
                return errorcode.get(error.errno or 0, "error")
            return "released"
    finally:
        os.close(pidfd)


def _outcome(result: object) -> str:
    if isinstance(result, Release):
        return result.outcome.value
    return str(result) if result else "signalled"


# -------------------------------------------------------------- the plan


class Plan:
    """What is measured: kinds x methods x sizes, so many times each.

    kinds    of victims: names of mrelease.stage.KINDS; None: all
    methods  names of METHODS; None: all
    sizes    of a victim in bytes; None: what fits of some
    count    kills of each; None: 7, or 3 if quick
    seed     of the order; None: a new one
    give_up  seconds after which memory that is not back is called that
    quick    few and small ones, and it ends within a minute

    Raises ValueError with a sentence for what cannot be meant.
    """

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        *,
        count: int | None = None,
        seed: int | None = None,
        give_up: float | None = None,
        quick: bool = False,
    ) -> None:
        self.kinds: list[str] = _known("kind", kinds, KINDS)
        self.methods: list[str] = _known("method", methods, METHODS)
        self.count: int = (3 if quick else 7) if count is None else count
        if self.count < 1:
            raise ValueError(f"{self.count} kills of each: at least 1")
        self.give_up: float = (
            (1.0 if quick else 5.0) if give_up is None else give_up
        )
        if not 0 < self.give_up <= 3600:
            raise ValueError(
                f"give up after {self.give_up:g} s: more than 0, at most 3600"
            )
        self.seed: int = random.getrandbits(32) if seed is None else seed
        self.quick = quick
        # What is being made when the time is over takes a few seconds more.
        self.seconds: float = 45.0 if quick else float("inf")
        most = room() // 2
        if sizes is None:
            wanted = (64 * _MIB,) if quick else (64 * _MIB, 1024 * _MIB)
            sizes = [size for size in wanted if size <= most]
            if not sizes and most >= 16 * _MIB:
                sizes = [16 * _MIB]
            if not sizes:
                raise ValueError("there is too little free memory")
        self.sizes: list[int] = sorted(set(sizes))
        if self.sizes[0] < _MIB:
            raise ValueError(
                f"a victim of {in_units(self.sizes[0])}: at least 1 MiB"
            )
        if self.sizes[-1] > most:
            raise ValueError(
                f"a victim of {in_units(self.sizes[-1])} is more than half of "
                f"the free memory, which is {in_units(most)}"
            )


def _known(
    what: str, names: Sequence[str] | None, known: Mapping[str, object]
) -> list[str]:
    if names is None:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no {what}: {', '.join(known)} are")
    return list(dict.fromkeys(names))


class Cell:
    """One kind, method and size, and what was found."""

    def __init__(self, kind: str, method: str, size: int) -> None:
        self.kind = kind
        self.method = method
        self.size = size
        self.seconds: list[float | None] = []
        self.outcomes: list[str] = []

    def median(self) -> float:
        """Seconds; infinite if it was mostly given up, nan if unknown."""
        return self._quantile(0.5)

    def quartiles(self) -> tuple[float, float]:
        """Give the lower and the upper one."""
        return self._quantile(0.25), self._quantile(0.75)

    def ends(self) -> tuple[float, float]:
        """Give quartiles, or of fewer than five the least and the most."""
        if len(self.seconds) < 5:
            return self._quantile(0.0), self._quantile(1.0)
        return self.quartiles()

    def late(self) -> float | None:
        """Give the share of releases that came too late; None: there are none.

        The call answered ESRCH, or the victim had ended before it.
        """
        if self.method == "sigkill" or not self.outcomes:
            return None
        return sum(o in _LATE for o in self.outcomes) / len(self.outcomes)

    def _quantile(self, share: float) -> float:
        known = sorted(float("inf") if s is None else s for s in self.seconds)
        if not known:
            return float("nan")
        if len(known) == 1:
            return known[0]
        at = share * (len(known) - 1)
        low, high = known[int(at)], known[min(int(at) + 1, len(known) - 1)]
        if low == high:
            return low
        return low + (high - low) * (at - int(at)) if at % 1 else low

    def as_dict(self) -> dict[str, object]:
        """Give it for JSON: seconds; null is what was given up."""
        low, high = self.quartiles()
        return {
            "kind": self.kind,
            "method": self.method,
            "size": self.size,
            "n": len(self.seconds),
            "median": _finite(self.median()),
            "quartiles": [_finite(low), _finite(high)],
            "late": self.late(),
            "outcomes": {
                name: self.outcomes.count(name)
                for name in sorted(set(self.outcomes))
            },
            "seconds": self.seconds,
        }


def _finite(seconds: float) -> float | None:
    return seconds if seconds < float("inf") else None


# --------------------------------------------------------------- the run


class Run:
    """The benchmark as it runs, and its report."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.left_out: dict[str, str] = {}
        self.cells: dict[tuple[str, str, int], Cell] = {}
        self.conditions: dict[str, object] = {}
        self.stopped: str = ""

    def run(self, tell: Callable[[int, int, float], None]) -> None:
        """Measure.  tell(done, of, seconds left) is called after each kill.

        Raises Impossible if nothing can be measured here.  KeyboardInterrupt
        and the like go through, and what was measured stays.
        """
        plan = self.plan
        random.seed(plan.seed)
        begun = time.monotonic()
        with Stage() as stage, Reaper() as reaper:
            ways: dict[str, Callable[[int], object]] = {
                "sigkill": kill_alone,
                "call": _two_calls,
                "kill": kill,
                "reaper": lambda pid: reaper.kill(pid).result(),
            }
            self.conditions = _conditions(plan, stage, reaper)
            cells = []
            for kind in plan.kinds:
                try:
                    with stage.make(kind, _MIB):
                        pass
                except Impossible as why:
                    self.left_out[kind] = str(why)
                    continue
                cells += [
                    Cell(kind, method, size)
                    for method in plan.methods
                    for size in plan.sizes
                ]
            self.cells = {(c.kind, c.method, c.size): c for c in cells}
            turns = [
                (cell, turn) for cell in cells for turn in range(plan.count)
            ]
            random.shuffle(turns)
            turns.sort(key=lambda each: each[1])
            for done, (cell, _) in enumerate(turns, 1):
                # Where SIGKILL alone is given up it always will be.
                hopeless = cell.seconds[:2] == [None, None]
                if not hopeless and cell.kind not in self.left_out:
                    self._measure(cell, stage, ways[cell.method])
                spent = time.monotonic() - begun
                tell(done, len(turns), spent / done * (len(turns) - done))
                if spent > plan.seconds and done < len(turns):
                    self.stopped = (
                        f"after {plan.seconds:.0f} s, with {done} of "
                        f"{len(turns)} kills"
                    )
                    break
        if not any(cell.seconds for cell in cells):
            raise Impossible(
                "; ".join(f"{k}: {w}" for k, w in self.left_out.items())
            )

    def _measure(
        self, cell: Cell, stage: Stage, way: Callable[[int], object]
    ) -> None:
        for attempt in range(3):
            try:
                if cell.size > room() // 2:
                    raise Impossible("it is more than half of what is free")
                found = stage.measure(
                    cell.kind, cell.size, way, self.plan.give_up
                )
            except Impossible as why:
                # Without a cgroup others are measured too: once more.
                if attempt < 2 and not stage.meter.exact:
                    continue
                self.left_out[f"{cell.kind}, {in_units(cell.size)}"] = str(why)
                return
            cell.seconds.append(found.seconds)
            cell.outcomes.append(_outcome(found.result))
            return

    def as_dict(self) -> dict[str, object]:
        """Give the report for JSON; durations are seconds, sizes bytes."""
        return {
            "benchmark": "mrelease bench",
            "conditions": self.conditions,
            "left_out": self.left_out,
            "stopped": self.stopped or None,
            "verdict": verdict(self),
            "cells": [cell.as_dict() for cell in self.cells.values()],
        }


def _conditions(plan: Plan, stage: Stage, reaper: Reaper) -> dict[str, object]:
    return {
        "mrelease": __version__,
        "python": platform.python_version(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "cpus": stage.cpus,
        "busy": stage.busy,
        "load": os.getloadavg()[0],
        "huge_pages": huge_pages(),
        "user": os.geteuid(),
        "raising": support().raising.why,
        "reaper": str(reaper.scheduling),
        "meter": stage.meter.name,
        "exact": stage.meter.exact,
        "why_not_better": stage.why_not_better,
        "back": 1 - stage.meter.slack,
        "count": plan.count,
        "seed": plan.seed,
        "give_up": plan.give_up,
    }


def huge_pages() -> str:
    """Give the setting of transparent huge pages, "none" without them."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "none"


# ------------------------------------------------------------- the words


def in_ms(seconds: float) -> str:
    """Give milliseconds with three digits: no measurement is better."""
    ms = seconds * 1e3
    if ms != ms:
        return ""
    if ms == float("inf"):
        return "never"
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _heading(run: Run) -> Iterable[str]:
    c = run.conditions
    who = "root" if c["user"] == 0 else f"user {c['user']}"
    yield (
        f"mrelease {c['mrelease']}, Python {c['python']}, Linux {c['kernel']},"
    )
    yield (
        f"{c['cpus']} usable CPUs, load before {c['load']:.2f}, transparent "
        f"huge pages: {c['huge_pages']}."
    )
    yield f"Run as {who}. The Reaper: {c['reaper']}."
    yield (
        f"Measured by: {c['meter']}; memory is back when {c['back']:.0%} of "
        "it is."
    )
    if not c["exact"]:
        yield (
            "This is coarser: other processes count too. No memory cgroup of "
            f"its own: {c['why_not_better']}."
        )
    for kind, why in run.left_out.items():
        text = KINDS[kind].text if kind in KINDS else kind
        yield f"Left out: {text}: {why}."


def _tables(run: Run) -> Iterable[tuple[str, list[list[str]]]]:
    """Give (title, rows): the first row is the head."""
    methods = run.plan.methods
    for size in run.plan.sizes:
        times, ratios, lates = [], [], []
        for kind in run.plan.kinds:
            cells = [run.cells.get((kind, m, size)) for m in methods]
            if not any(cell and cell.seconds for cell in cells):
                continue
            text = KINDS[kind].text
            times.append([text, *(_time(cell) for cell in cells)])
            base = run.cells.get((kind, "sigkill", size))
            ratios.append([text, *(_ratio(run, base, c) for c in cells)])
            lates.append([text, *(_share(cell) for cell in cells)])
        head = ["victim", *(METHODS[method] for method in methods)]
        units = in_units(size)
        yield (
            f"Until the memory is back, {units}, in ms: median (quartiles)",
            [head, *times],
        )
        if "sigkill" in methods and len(methods) > 1:
            yield (
                f"So many times as fast as SIGKILL alone, {units}",
                [head, *ratios],
            )
        if methods != ["sigkill"]:
            yield f"Released too late, of all kills, {units}", [head, *lates]


def _time(cell: Cell | None) -> str:
    if cell is None or not cell.seconds:
        return ""
    if cell.median() == float("inf"):
        return "never"
    low, high = cell.quartiles()
    return f"{in_ms(cell.median())} ({in_ms(low)}-{in_ms(high)})"


def _ratio(run: Run, base: Cell | None, cell: Cell | None) -> str:
    if base is None or cell is None or not (base.seconds and cell.seconds):
        return ""
    of, to = cell.median(), base.median()
    if of == float("inf"):
        return "" if to == of else "0"
    if to == float("inf"):
        return f"> {run.plan.give_up / of:.0f}"
    ratio = to / of
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _share(cell: Cell | None) -> str:
    late = cell and cell.late()
    return "" if late is None else f"{late:.0%}"


def verdict(run: Run) -> list[str]:
    """Say of each of ours where it pays, where not, and where it harms.

    It does if the quartiles do not overlap; of fewer than five kills, if
    none is among those of the other.
    """
    lines = []
    for method in run.plan.methods:
        if method not in OURS:
            continue
        found: dict[str, list[str]] = {"faster": [], "same": [], "slower": []}
        for cell in run.cells.values():
            base = run.cells.get((cell.kind, "sigkill", cell.size))
            if cell.method != method or not cell.seconds:
                continue
            if base is None or not base.seconds:
                continue
            what = f"{KINDS[cell.kind].text}, {in_units(cell.size)}"
            if cell.ends()[1] < base.ends()[0]:
                found["faster"].append(what)
            elif cell.ends()[0] > base.ends()[1]:
                found["slower"].append(what)
            else:
                found["same"].append(what)
        every = sum(map(len, found.values()))
        if not every:
            continue
        line = (
            f"{METHODS[method]} is faster than SIGKILL alone for "
            f"{len(found['faster'])} of {every}"
        )
        if found["same"]:
            line += f"; no clear difference: {'; '.join(found['same'])}"
        if found["slower"]:
            line += f"; SLOWER: {'; '.join(found['slower'])}"
        lines.append(line + ".")
    return lines


def _rich() -> Any:  # noqa: ANN401 - a module that need not be there
    try:
        import rich
        import rich.progress
        import rich.table
    except ImportError:
        return None
    return rich


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def _print_table(title: str, rows: list[list[str]]) -> None:
    rich = _rich() if _is_terminal(sys.stdout) else None
    if rich is not None:
        made = rich.table.Table(title=title, title_justify="left")
        for at, name in enumerate(rows[0]):
            made.add_column(name, justify="right" if at else "left")
        for row in rows[1:]:
            made.add_row(*row)
        rich.print(made)
        return
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    _say("", title)
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [
            text.rjust(width)
            for text, width in zip(row[1:], widths[1:], strict=True)
        ]
        _say("  " + "  ".join(cells).rstrip())


def _report(run: Run) -> None:
    for title, rows in _tables(run):
        if len(rows) > 1:
            _print_table(title, rows)
    plan = run.plan
    counts = [len(cell.seconds) for cell in run.cells.values()]
    _say(
        "",
        f"{min(counts)} to {max(counts)} kills of each, seed {plan.seed}. "
        f"never: given up after {plan.give_up:g} s (twice; then no more).",
        "too late: the call came when the victim had let go of its memory "
        "already.",
    )
    if run.stopped:
        _say(f"Stopped {run.stopped}: the rest is left out.")
    _say("", *verdict(run))


class _Progress:
    """Progress with the time left, on stderr if that is a terminal."""

    def __init__(self) -> None:
        self._shown = _is_terminal(sys.stderr)
        self._bar: Any = None
        rich = _rich() if self._shown else None
        if rich is not None:
            columns = rich.progress
            self._bar = columns.Progress(
                columns.TextColumn("{task.completed:.0f} of {task.total:.0f}"),
                columns.BarColumn(),
                columns.TextColumn("about {task.fields[left]} left"),
                console=rich.console.Console(stderr=True),
                transient=True,
            )
            with not_now():  # it has a thread
                self._bar.start()
            self._task = self._bar.add_task("", total=1, left="")

    def tell(self, done: int, of: int, left: float) -> None:
        text = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=of, left=text)
        elif self._shown:
            print(
                f"\r{done} of {of}, about {text} left   ",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown:
            print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)


def _is_file(path: str) -> bool:
    """Whether it can be replaced: not a device, a pipe, or our own output."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return True
    own = [os.fstat(fd) for fd in (1, 2) if _is_open(fd)]
    return stat.S_ISREG(found.st_mode) and not any(
        os.path.samestat(found, each) for each in own
    )


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _new_part(path: str) -> tuple[int, str]:
    """Open a file in the folder of another one."""
    return tempfile.mkstemp(prefix=".mrelease-", dir=os.path.dirname(path))


def _check_output(path: str) -> None:
    """Raise ValueError if it cannot be written."""
    if not os.path.basename(path) and not os.path.isdir(path):
        raise ValueError(f"{path!r} is not the name of a file")
    try:
        if _is_file(path):
            fd, part = _new_part(os.path.realpath(path))
            os.close(fd)
            os.unlink(part)
        elif os.path.isdir(path) or not os.access(path, os.W_OK):
            raise ValueError(f"{path} cannot be written")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}"
        ) from None


def _write(path: str, write: Callable[[str], None]) -> None:
    """Write a file whole, or leave what is there.

    A device or a pipe is written into, and stays what it is.
    """
    if not _is_file(path):
        write(path)
        return
    path = os.path.realpath(path)
    fd, part = _new_part(path)
    try:
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(fd, 0o666 & ~mask)
        os.close(fd)
        write(part)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def bench(
    plan: Plan, *, json_file: str | None = None, chart: str | None = None
) -> int:
    """Run it in the terminal; give the exit code.

    json_file gets all values, chart (.svg or .png, needs matplotlib) a chart.
    Raises ValueError before anything is started if they cannot be written.

    0 if it was measured, 1 if it cannot be.  An interruption is raised once
    what there is was told and all is cleaned up.
    """
    if chart is not None:
        from mrelease.chart import check

        check(chart)
        _check_output(chart)
    if json_file is not None:
        _check_output(json_file)
    run = Run(plan)
    stop: BaseException | None = None
    try:
        check_support()
        progress = _Progress()
        try:
            run.run(progress.tell)
        except (Impossible, OSError):
            raise
        except BaseException as error:  # noqa: BLE001 - raised below
            stop = error
            run.stopped = "early"
        finally:
            progress.close()
    except (Impossible, OSError) as error:
        if isinstance(error, OSError) and error.errno == EPIPE:
            raise
        print(f"mrelease bench cannot be run: {error}", file=sys.stderr)
        return 1
    if any(cell.seconds for cell in run.cells.values()):
        _say(*_heading(run))
        _report(run)
        report = run.as_dict()
        if json_file is not None:
            _write(json_file, lambda path: _dump(report, path))
        if chart is not None:
            from mrelease.chart import draw

            kind = chart.rpartition(".")[2]
            _write(chart, lambda path: draw(report, path, kind))
    if stop is not None:
        raise stop
    return 0


def _dump(report: dict[str, object], path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
