"""What a call costs: `make bench-overhead`.

Three tables, each measured side by side in this one run:

1. process_mrelease() against the same system call in a C loop
   (overhead_loop.c) and through ctypes, where the call fails at once
   (a bad fd), where the process is alive, and where it succeeds.
2. kill(): from its first line to the moment at which SIGKILL leaves.
3. import mrelease: over a bare interpreter, and what it pulls in.

What is compared takes turns, in an order that is shuffled for each
round, so that a busy machine slows down all of it alike. Differences are
taken within a round. The values are pyperf's: medians, with the median
absolute deviation as spread; --json writes them as a pyperf suite, for
`pyperf compare_to`. An aim that is missed is reported, not an error.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import os
import platform
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import pyperf

import mrelease

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

import common
import victims

AIM_CALL = 60e-9
AIM_KILL = 10e-6
AIM_IMPORT = 5e-3

benchmarks: list[pyperf.Benchmark] = []


def benchmark(
    name: str, values: Sequence[float], loops: int = 1
) -> pyperf.Benchmark:
    """A pyperf benchmark of values that were measured here."""
    run = pyperf.Run(
        values,
        metadata={"name": name, "unit": "second", "loops": loops},
        collect_metadata=False,
    )
    result = pyperf.Benchmark([run])
    benchmarks.append(result)
    return result


class Spread(NamedTuple):
    """Of differences, which pyperf does not take: they may be negative."""

    median: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        middle = statistics.median(values)
        return cls(
            middle, statistics.median(abs(value - middle) for value in values)
        )

    @classmethod
    def between(cls, these: Sequence[float], those: Sequence[float]) -> Spread:
        """Of the differences within a round."""
        return cls.of([a - b for a, b in zip(these, those, strict=True)])


def aim(value: float, limit: float, unit: float, name: str) -> str:
    answer = "yes" if value <= limit else "no"
    return f"at most {limit / unit:g} {name}: {answer}"


# ------------------------------------------------------------- the call


def build_loop(folder: str) -> Callable[[int, int, int], int]:
    """overhead_loop.c, compiled now; the loop of it."""
    library = Path(folder) / "overhead_loop.so"
    compiler = shlex.split(
        os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    )[0]
    if shutil.which(compiler) is None:
        compiler = "cc"
    source = common.HERE / "overhead_loop.c"
    subprocess.run(
        [compiler, "-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared",
         f"-I{common.HERE.parent / 'src'}", str(source), "-o", str(library)],
        check=True,
    )  # fmt: skip
    loop = ctypes.CDLL(str(library)).loop_ns
    loop.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    loop.restype = ctypes.c_int64
    return loop


def by_ctypes() -> tuple[str, Callable[[int, int], int]]:
    """The call as one makes it without an extension."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "process_mrelease"):  # glibc 2.36
        call = libc.process_mrelease
        call.argtypes = [ctypes.c_int, ctypes.c_uint]
        call.restype = ctypes.c_int
        return "glibc's process_mrelease()", call
    number = 448  # the same wherever this is run

    def syscall(pidfd: int, flags: int) -> int:
        result: int = libc.syscall(
            ctypes.c_long(number), ctypes.c_int(pidfd), ctypes.c_uint(flags)
        )
        return result

    return "syscall(448)", syscall


def time_python(call: Callable[[int], object], fd: int, count: int) -> int:
    """Nanoseconds for so many calls, none of which fails."""
    turns = itertools.repeat(None, count)
    begun = perf_counter_ns()
    for _ in turns:
        call(fd)
    return perf_counter_ns() - begun


def time_raising(call: Callable[[int], object], fd: int, count: int) -> int:
    """Nanoseconds for so many calls, all of which raise."""
    turns = itertools.repeat(None, count)
    begun = perf_counter_ns()
    for _ in turns:
        try:
            call(fd)
        except OSError:
            pass
    return perf_counter_ns() - begun


class Row(NamedTuple):
    name: str
    fd: int
    expected: int


def make_ways(
    folder: str,
) -> tuple[dict[str, Callable[[Row, int], int]], str]:
    """What is compared: each takes a row and a count, gives nanoseconds."""
    loop = build_loop(folder)
    how, foreign = by_ctypes()
    raw = mrelease.process_mrelease

    def c_loop(row: Row, count: int) -> int:
        taken = loop(row.fd, count, row.expected)
        if taken < 0:
            raise RuntimeError(f"{row.name}: not the result expected")
        return taken

    def ours(row: Row, count: int) -> int:
        timer = time_raising if row.expected else time_python
        return timer(raw, row.fd, count)

    def by_errno(fd: int) -> int:
        return ctypes.get_errno() if foreign(fd, 0) < 0 else 0

    def by_raising(fd: int) -> None:
        if foreign(fd, 0) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def ctypes_errno(row: Row, count: int) -> int:
        return time_python(by_errno, row.fd, count)

    def ctypes_raising(row: Row, count: int) -> int:
        timer = time_raising if row.expected else time_python
        return timer(by_raising, row.fd, count)

    def least(row: Row, count: int) -> int:
        # What CPython itself takes for the least there is: a C function
        # of one argument that does nothing, or that fails with an errno.
        if row.expected:
            return time_raising(os.close, -1, count)
        return time_python(abs, row.fd, count)

    return {
        "C loop": c_loop,
        "mrelease": ours,
        "ctypes": ctypes_errno,
        "ctypes+raise": ctypes_raising,
        "least": least,
    }, how


def check_row(row: Row) -> None:
    """The call really answers what this row says."""
    try:
        mrelease.process_mrelease(row.fd)
        found = 0
    except OSError as error:
        found = error.errno or 0
    if found != row.expected:
        raise RuntimeError(
            f"{row.name}: {errno.errorcode.get(found, found)}, expected "
            f"{errno.errorcode.get(row.expected, row.expected)}"
        )


def calls(rounds: int) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mrelease-bench-") as folder,
        victims.asleep(1) as alive,
        victims.held(1, killed=True) as dying,
    ):
        ways, how = make_ways(folder)
        rows = [
            Row("process_mrelease(-1): EBADF", -1, errno.EBADF),
            Row("a live process: EINVAL", alive.pidfd, errno.EINVAL),
            Row("a held dying one: success", dying.pidfd, 0),
        ]
        mrelease.process_mrelease(dying.pidfd)
        cpus = os.sched_getaffinity(0)
        # One CPU for all that is compared; what is on it, is on it for all.
        os.sched_setaffinity(0, {max(cpus)})
        try:
            _calls(rounds, rows, ways, how)
        finally:
            os.sched_setaffinity(0, cpus)


def _calls(
    rounds: int,
    rows: Sequence[Row],
    ways: dict[str, Callable[[Row, int], int]],
    how: str,
) -> None:
    count = 500
    values: dict[tuple[Row, str], list[float]] = {
        (row, way): [] for row in rows for way in ways
    }
    order = list(ways)
    for turn in range(rounds + 5):
        for row in rows:
            random.shuffle(order)
            for way in order:
                taken = ways[way](row, count)
                if turn >= 5:  # warm by then
                    values[row, way].append(taken / count / 1e9)
    for row in rows:
        check_row(row)

    printed = []
    for row in rows:
        base = values[row, "C loop"]
        bare = benchmark(f"{row.name}, C loop", base, count)
        printed.append([row.name, "C loop", *of_call(bare), "", "", "", ""])
        for way in ways:
            if way == "C loop" or (row.expected, way) == (0, "ctypes+raise"):
                continue  # with success there is nothing to raise
            found = benchmark(f"{row.name}, {way}", values[row, way], count)
            if way == "least":
                printed.append(["", way, *of_call(found), "", "", "", ""])
                continue
            over = Spread.between(values[row, way], base)
            best = found.percentile(5) - bare.percentile(5)
            printed.append([
                "", way, *of_call(found), f"{over.median * 1e9:+.0f}",
                f"{over.deviation * 1e9:.0f}", f"{best * 1e9:+.0f}",
                aim(over.median, AIM_CALL, 1e-9, "ns over")
                if way == "mrelease" else "",
            ])  # fmt: skip
    common.table(
        f"1. The call, in ns: {rounds} rounds of {count} calls, one CPU",
        ("result", "through", "median", "+-", "p5", "over C", "+-", "p5s",
         "aim"),
        printed,
    )  # fmt: skip
    print(
        f"  ctypes: {how}, then get_errno(). ctypes+raise: with OSError "
        "raised and\n"
        "  caught, as with mrelease. least: what CPython itself takes, for "
        "os.close(-1)\n"
        "  raised and caught (a system call too), or for abs(fd). over C: "
        "median of the\n"
        "  differences in a round; p5s: difference of the p5, of the least "
        "disturbed."
    )


def of_call(found: pyperf.Benchmark) -> list[str]:
    return [
        f"{found.median() * 1e9:.0f}",
        f"{found.median_abs_dev() * 1e9:.0f}",
        f"{found.percentile(5) * 1e9:.0f}",
    ]


# ------------------------------------------------------------- the kill


GIVEN: tuple[Literal["pid", "Victim"], ...] = ("pid", "Victim")
LOCKS: tuple[Literal["protect", "ignore"], ...] = ("protect", "ignore")


class Kind(NamedTuple):
    threads: int
    given: Literal["pid", "Victim"]
    locks: Literal["protect", "ignore"]


def kill_once(kind: Kind, pid: int, timeout: float = 1.0) -> float:
    """Seconds from entering kill() to SIGKILL."""
    if kind.given == "pid":
        done = mrelease.kill(pid, locks=kind.locks, timeout=timeout)
    else:
        with mrelease.Victim(pid) as prepared:
            done = mrelease.kill(prepared, locks=kind.locks, timeout=timeout)
    assert done.signalled is not None
    return done.signalled


def kills(rounds: int) -> None:
    kinds = [
        Kind(threads, given, locks)
        for threads in (1, 64)
        for given in GIVEN
        for locks in LOCKS
    ]
    values: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    again: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        # Victims that can be killed again and again: dying, and held there.
        held = {
            threads: stack.enter_context(
                victims.held(1, threads=threads, killed=True)
            )
            for threads in (1, 64)
        }
        for turn in range(rounds + 5):
            random.shuffle(kinds)
            for kind in kinds:
                with victims.asleep(1, threads=kind.threads) as victim:
                    new = kill_once(kind, victim.pid)
                for _ in range(3):
                    hot = kill_once(kind, held[kind.threads].pid, 0.0)
                if turn >= 5:  # warm by then
                    values[kind].append(new)
                    again[kind].append(hot)
    printed = []
    for kind in sorted(values):
        name = (
            f"SIGKILL, {kind.threads} threads, {kind.given}, "
            f"locks={kind.locks}"
        )
        found = benchmark(name, values[kind])
        hot_one = benchmark(f"{name}, again", again[kind])
        wanted = kind.threads == 1 and kind.locks == "protect"
        printed.append([
            f"{kind.threads} thread{'s' * (kind.threads > 1)}",
            kind.given,
            kind.locks,
            f"{found.median() * 1e6:.1f}",
            f"{found.median_abs_dev() * 1e6:.1f}",
            f"{found.percentile(5) * 1e6:.1f}",
            f"{found.percentile(99) * 1e6:.1f}",
            f"{hot_one.median() * 1e6:.1f}",
            f"{hot_one.percentile(5) * 1e6:.1f}",
            aim(found.median(), AIM_KILL, 1e-6, "us") if wanted else "",
        ])  # fmt: skip
    common.table(
        "2. From entering kill() to SIGKILL leaving, in us: "
        f"{rounds} kills each",
        ("victim", "given", "locks", "median", "+-", "p5", "p99", "again",
         "p5", "aim"),
        printed,
    )  # fmt: skip
    print(
        "  Each kill is of a new process, of which nothing is in the caches "
        "yet. again: the\n"
        "  third kill in a row of a process that is held at its end, so with "
        "warm caches."
    )


# ----------------------------------------------------------- the import


class Starts:
    """Starts Python, with its bytecode in a folder of ours.

    Else what is measured is the compiler, where bytecode is not written
    (PYTHONDONTWRITEBYTECODE) or belongs to another user.
    """

    def __init__(self, folder: str) -> None:
        self._command = [sys.executable, "-X", f"pycache_prefix={folder}"]
        self._env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
        }

    def ask(self, code: str, flags: Sequence[str]) -> str:
        return subprocess.run(
            [*self._command, *flags, "-c", code],
            check=True, stdout=subprocess.PIPE, text=True, env=self._env,
        ).stdout  # fmt: skip

    def time(self, code: str, flags: Sequence[str]) -> tuple[float, float]:
        """Seconds from start to end, and of CPU."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = perf_counter_ns()
        self.ask(code, flags)
        taken = (perf_counter_ns() - begun) / 1e9
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return taken, (
            after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        )

    def modules(self, code: str, flags: Sequence[str]) -> set[str]:
        code += "\nimport sys\nprint(*sys.modules)"
        return set(self.ask(code, flags).split())


# From within, and without a clock that is one more module.
WITHIN = """
from time import perf_counter_ns
begun = perf_counter_ns()
import mrelease
print(perf_counter_ns() - begun)
"""

# What the issue of a light import names, and its like.
HEAVY = frozenset({
    "argparse", "ast", "asyncio", "dataclasses", "inspect", "json", "logging",
    "multiprocessing", "re", "resource", "select", "signal", "socket",
    "subprocess", "threading", "typing",
})  # fmt: skip


def imports(rounds: int) -> None:
    source = os.path.dirname(os.path.dirname(mrelease.__file__))
    # -S has no site-packages: it is told where the package is.
    isolated = f"import sys\nsys.path.append({source!r})\n"
    ways: dict[str, tuple[str, tuple[str, ...]]] = {
        "python": ("", ()),
        "python -I -S": (isolated, ("-I", "-S")),
    }
    jobs = [
        (way, code) for way in ways for code in ("", "import mrelease", WITHIN)
    ]
    wall: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    work: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(prefix="mrelease-bench-") as folder:
        starts = Starts(folder)
        for turn in range(rounds + 2):
            random.shuffle(jobs)
            for way, code in jobs:
                first, flags = ways[way]
                if code == WITHIN:
                    taken = int(starts.ask(first + code, flags)) / 1e9, 0.0
                else:
                    taken = starts.time(first + code, flags)
                if turn >= 2:  # the bytecode is written by then
                    wall[way, code].append(taken[0])
                    work[way, code].append(taken[1])
        pulled = {
            way: starts.modules(first + "import mrelease", flags)
            - starts.modules(first, flags)
            for way, (first, flags) in ways.items()
        }
    printed = []
    for way in ways:
        bare = benchmark(f"{way}, bare", wall[way, ""])
        loaded = benchmark(f"{way}, import", wall[way, "import mrelease"])
        alone = benchmark(f"{way}, the import alone", wall[way, WITHIN])
        over = Spread.between(wall[way, "import mrelease"], wall[way, ""])
        cpu = Spread.between(work[way, "import mrelease"], work[way, ""])
        printed.append([
            way,
            f"{bare.median() * 1e3:.2f}",
            f"{loaded.median() * 1e3:.2f}",
            f"{over.median * 1e3:+.2f}",
            f"{over.deviation * 1e3:.2f}",
            f"{cpu.median * 1e3:+.2f}",
            f"{alone.median() * 1e3:.2f}",
            f"{min(wall[way, WITHIN]) * 1e3:.2f}",
            aim(over.median, AIM_IMPORT, 1e-3, "ms over"),
        ])  # fmt: skip
    common.table(
        f"3. import mrelease, in ms: {rounds} starts each",
        ("started as", "bare", "with it", "over", "+-", "over, CPU",
         "the import", "best", "aim"),
        printed,
    )  # fmt: skip
    print(
        "  over: the whole process, start to end; CPU: its time on a CPU, "
        "which a busy machine\n"
        "  does not lengthen by waiting. the import: the statement alone, "
        "timed from within."
    )
    for way, names in pulled.items():
        print(f"  {way} pulls in {len(names)}: {' '.join(sorted(names))}")
        heavy = names & HEAVY
        print(f"    heavy ones: {' '.join(sorted(heavy)) or 'none'}")


# ------------------------------------------------------------------ all


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs.")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the rounds"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the values as a pyperf suite"
    )
    parser.add_argument(
        "tables",
        nargs="*",
        choices=("call", "kill", "import", []),
        help="which tables; all if none is named",
    )
    args = parser.parse_args()
    wanted = args.tables or ["call", "kill", "import"]
    part = 10 if args.quick else 1
    print(
        f"mrelease {mrelease.__version__}, Python {platform.python_version()}"
        f", Linux {platform.release()} {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} CPUs, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    if "call" in wanted:
        calls(600 // part)
    if "kill" in wanted:
        kills(220 // part)
    if "import" in wanted:
        imports(50 // part)
    if args.json:
        pyperf.BenchmarkSuite(benchmarks).dump(args.json, replace=True)


if __name__ == "__main__":
    main()
