"""What the benchmarks of kills share: conditions, machine, figures.

late.py, back.py, latency.py and many.py compare ways to kill (ways.py).
What is compared takes turns in one run, in an order that is shuffled for
each round, so that a busy machine slows down all of it alike. An aim that
is missed is reported, not an error. Nothing that is started or changed
outlives a run, however it ends.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import mrelease  # noqa: E402
import victims  # noqa: E402
from cgroups import Group, Guard, Meter, Unavailable  # noqa: E402
from mrelease.bench import huge_pages  # noqa: E402
from mrelease.closing import Closing  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

T = TypeVar("T")

MIB = 1 << 20
NOBODY = 65534
BACK = 0.05
"""The share that may be missing when memory counts as back."""


# --------------------------------------------------------------- figures


class Spread(NamedTuple):
    """Median and quartiles; math.inf is what never happened."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        known = [math.inf if value is None else value for value in values]
        return cls(
            quantile(known, 0.5),
            quantile(known, 0.25),
            quantile(known, 0.75),
            len(known),
        )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed.

    But the median of an even count is the mean of the middle two.
    """
    if not values:
        return math.nan
    if share == 0.5:
        return statistics.median(values)
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def in_us(seconds: float) -> str:
    us = seconds * 1e6
    if math.isnan(us):
        return ""
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def size_text(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib % 1024 == 0 and mib else f"{mib} MiB"


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print rows under a title: the first column to the left."""
    widths = [
        max(len(row[i]) for row in (head, *rows)) for i in range(len(head))
    ]
    print(f"\n{title}")
    for row in (head, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1])]
        cells += [text.rjust(width) for text, width in others]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


# ----------------------------------------------------- options, conditions


class User(NamedTuple):
    name: str
    uid: int | None
    """Whom to become; None: to stay what one is."""

    @property
    def privileged(self) -> bool:
        return self.uid is None and os.geteuid() == 0


def users(names: Sequence[str]) -> list[User]:
    """Those that were asked for and can be had."""
    if os.geteuid() != 0:
        return [User(f"uid {os.geteuid()}", None)]
    known = {"root": User("root", None), "nobody": User("nobody", NOBODY)}
    return [known[name] for name in names]


def words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: a list of these, with commas."""

    def split(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f"{word!r} is not one of {', '.join(known)}"
                )
        return found

    return split


def numbers(text: str) -> list[int]:
    """For argparse: a list of numbers, with commas."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on")
    return found


def make_parser(
    text: str, who: str = "root,nobody"
) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(
        description=text.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, small victims"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write all values there"
    )
    parser.add_argument(
        "--seed", type=int, help="of the order; printed in each run"
    )
    parser.add_argument(
        "--users",
        type=words(("root", "nobody")),
        default=who,
        metavar="LIST",
        help="as whom to kill; only root can choose",
    )
    return parser


class Run:
    """One run: its conditions, its values, and what ends with it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.args = args
        self.stack = ExitStack()
        self.rows: list[dict[str, object]] = []
        seed = args.seed
        if seed is None:
            seed = random.SystemRandom().randrange(1 << 32)
        random.seed(seed)
        self.cpus = len(os.sched_getaffinity(0))
        self.conditions: dict[str, object] = {
            "mrelease": mrelease.__version__,
            "python": platform.python_version(),
            "kernel": f"{platform.release()} {platform.machine()}",
            "cpus": self.cpus,
            "load": os.getloadavg()[0],
            "huge_pages": huge_pages(),
            "euid": os.geteuid(),
            "users": [user.name for user in users(args.users)],
            "seed": seed,
            "options": {
                key: value for key, value in vars(args).items() if value
            },
        }
        c = self.conditions
        print(
            f"mrelease {c['mrelease']}, Python {c['python']}, Linux "
            f"{c['kernel']}, {self.cpus} usable CPUs,\nload before "
            f"{c['load']:.2f}, transparent huge pages {c['huge_pages']}, run "
            f"as uid {os.geteuid()}, killing as "
            f"{' and '.join(user.name for user in users(args.users))}; "
            f"seed {seed}."
        )
        sys.stdout.flush()

    def note(self, key: str, value: str) -> None:
        """A condition that is known only later."""
        self.conditions[key] = value
        print(f"{key}: {value}")
        sys.stdout.flush()

    def row(self, **values: object) -> None:
        self.rows.append(values)

    def __enter__(self) -> Self:
        # Else nothing is undone.
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGHUP, _leave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stack.close()
        victims.close_all()
        if kind is None and self.args.json:
            found = {
                "benchmark": self.name,
                "conditions": self.conditions,
                "rows": self.rows,
            }
            Path(self.args.json).write_text(json.dumps(found, indent=1) + "\n")


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def in_turns(
    jobs: Sequence[T],
    count: Callable[[T], int],
    do: Callable[[list[T]], None],
    batch: Callable[[list[T]], int] = lambda _: 1,
) -> None:
    """Do each job so often, in rounds, each in an order of its own.

    do() is given the next jobs, as many as batch() of what is left of the
    round says. Ctrl-C ends it, and what there is counts.
    """
    most = max((count(job) for job in jobs), default=0)
    total = sum(count(job) for job in jobs)
    done = 0
    begun = time.monotonic()
    said = begun
    shown = sys.stderr.isatty()
    try:
        for turn in range(most):
            left = [job for job in jobs if turn < count(job)]
            random.shuffle(left)
            while left:
                some = batch(left)
                do(left[:some])
                del left[:some]
                done += some
                now = time.monotonic()
                if done < total and now - said > (0.5 if shown else 60):
                    said = now
                    rest = (now - begun) / done * (total - done)
                    print(
                        f"\r{done} of {total}, about {rest / 60:.1f} min left "
                        if shown
                        else f"{done} of {total}, about {rest / 60:.1f} min "
                        "left\n",
                        end="", file=sys.stderr, flush=True,
                    )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nStopped after {done} of {total}.")
    if shown:
        print(f"\r{'':50}\r", end="", file=sys.stderr, flush=True)


# -------------------------------------------------------- programs, load


@functools.cache
def folder() -> Path:
    """A folder of this run, removed at its end, however it ends."""
    path = Path(tempfile.mkdtemp(prefix="mrelease-bench-"))
    path.chmod(0o755)  # they may run as another user
    # Removes it also if we are killed.
    atexit.register(Guard('rm -r "$1"', str(path)).close)
    return path


@functools.cache
def build(name: str) -> Path:
    """The program of bench/name.c, compiled now."""
    compiler = shlex.split(
        os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    )[0]
    if shutil.which(compiler) is None:
        compiler = "cc"
    program = folder() / name
    subprocess.run(
        [compiler, "-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread",
         f"-I{HERE.parent / 'src'}", str(HERE / f"{name}.c"), "-o",
         str(program)],
        check=True,
    )  # fmt: skip
    return program


class Program(Closing):
    """A C program of ours that takes lines and answers with lines."""

    def __init__(
        self,
        name: str,
        *args: str,
        user: User | None = None,
        groups: Sequence[Group] = (),
    ) -> None:
        argv = [str(build(name)), *args]
        for group in reversed(groups):
            argv = group.enter(argv)
        uid = None if user is None or user.uid is None else user.uid
        if uid is not None and groups:
            # To enter a group is root's: the program changes its user last.
            raise ValueError("a group, or another user")
        self._popen = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is ours alone
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
        self.pid = self._popen.pid
        try:
            self.said = self.answer()
        except BaseException:
            self.close()
            raise

    def tell(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def answer(self) -> str:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._popen.args!r} ended with {self._popen.wait()}"
            )
        return line.strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def ended_by(self, timeout: float) -> bool:
        """Close its input and give it that long to end."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        if not self.ended_by(5.0):
            self._popen.kill()
            self._popen.wait()
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def kill(self) -> None:
        self._popen.kill()
        self.close()


class Load:
    """Busy processes, two for each CPU, that run while it is on."""

    SETTLE = 0.02
    """Seconds until the scheduler has them where they stay."""

    def __init__(self, cpus: int) -> None:
        self.count = 2 * cpus
        self._on = False
        self._stack = ExitStack()
        with self._stack:
            self._busy = [
                self._stack.enter_context(victims.spinning(0))
                for _ in range(self.count)
            ]
            for busy in self._busy:
                busy.popen.send_signal(signal.SIGSTOP)
            self._stack = self._stack.pop_all()

    def switch(self, on: bool) -> None:
        if on == self._on:
            return
        self._on = on
        number = signal.SIGCONT if on else signal.SIGSTOP
        for busy in self._busy:
            busy.popen.send_signal(number)
        time.sleep(self.SETTLE)

    def close(self) -> None:
        self._stack.close()


class Zygote:
    """Makes many cheap victims: see zygote.c."""

    def __init__(
        self,
        mib: int,
        *,
        user: User | None = None,
        groups: Sequence[Group] = (),
    ) -> None:
        self._program = Program("zygote", str(mib), user=user, groups=groups)

    def make(self, count: int) -> list[int]:
        """So many pids; they sleep, with their memory touched."""
        pids = [int(n) for n in self._program.ask(f"make {count}").split()]
        time.sleep(0.001)  # the last one is on its way to sleep
        return pids

    def cpu(self) -> int:
        """Their CPU time so far, in nanoseconds."""
        return int(self._program.ask("cpu"))

    def reap(self) -> int:
        """End all that are left; the CPU time of their lives, in ns."""
        return int(self._program.ask("reap").split()[1])

    def close(self) -> None:
        self._program.close()


def settled(meter: Meter, timeout: float = 2.0) -> int:
    """What is charged to a group once nothing comes back to it any more.

    The stacks and page tables of those that ended do so a little later
    (RCU).
    """
    deadline = time.monotonic() + timeout
    usage, since = meter.usage(), time.monotonic()
    while (now := time.monotonic()) < min(since + 0.03, deadline):
        time.sleep(0.005)
        if (found := meter.usage()) != usage:
            usage, since = found, now
    return usage


class Back(NamedTuple):
    when: int | None
    """In nanoseconds of the monotonic clock; None if it gave up."""
    looks: int
    gap: float
    ended: int | None = None
    """When all had ended that were to be watched; None if it gave up."""


class Watcher:
    """Tells when the memory of a group is back: see watch.c.

    And when all of some processes have ended, if it is to.
    """

    def __init__(self, meter: Meter, pause: float) -> None:
        self._program = Program("watch")
        self.scheduling = {
            "fifo": "SCHED_FIFO 3", "normal": "normal priority"
        }[self._program.said]  # fmt: skip
        file = (
            "memory.usage_in_bytes" if meter.version == 1 else "memory.current"
        )
        self._file = meter.path / file
        self.pause = pause

    def begin(
        self, limit: int, give_up: float, pids: Sequence[int] = ()
    ) -> None:
        said = self._program.ask(
            f"{self._file} {limit} {int(give_up * 1e9)} "
            f"{int(self.pause * 1e9)} {len(pids)} " + " ".join(map(str, pids))
        )
        assert said == "looking", said

    def end(self) -> Back:
        when, looks, gap, ended = map(int, self._program.answer().split())
        return Back(when or None, looks, gap / 1e9, ended or None)

    def close(self) -> None:
        self._program.kill()  # it may be looking


class Cpus(Group):
    """The first so many CPUs: no member can leave them, nor be moved."""

    controller = "cpuset"
    controller_v2 = "cpuset"

    def __init__(self, count: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:count]
        if len(cpus) < count:
            raise Unavailable(f"{len(cpus)} usable CPUs, not {count}")
        super().__init__()
        try:
            self.write("cpuset.cpus", ",".join(map(str, cpus)))
            mems = self.path.parent / "cpuset.mems"
            if self.version == 1:
                self.write("cpuset.mems", mems.read_text().strip())
        except BaseException:
            self.close()
            raise
