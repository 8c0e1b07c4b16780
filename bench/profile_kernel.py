"""In which functions of the kernel a kill spends its time: with perf.

Samples of all CPUs, taken by a clock (`cpu-clock`, which needs no counter of
the CPU, so that it is to be had in a virtual machine too), are told apart by
process: the killer's, before SIGKILL and after, and the victim's. Where
interrupts are off, a sample is taken as soon as they are on again, so what
holds a spinlock that way shows as the function that gives it back.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import common
from mrelease.bench import in_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

EVENT = "cpu-clock"
USER = "(not in the kernel)"
RATE = 25000
"""Samples a second and CPU, if the kernel allows so many."""
LONGEST = 60
"""Seconds; a perf whose benchmark was killed ends by itself then."""
TOP = 8
"""So many functions of each column are printed,"""
SMALL = 0.03
"""... if it has so large a share of all samples."""


def _program() -> str | None:
    return shutil.which(os.environ.get("PERF", "perf"))


def no_perf() -> str | None:
    """Why perf cannot see the kernel here; None if it can."""
    program = _program()
    if program is None:
        return "perf is not installed, nor named by $PERF"
    paranoid = Path("/proc/sys/kernel/perf_event_paranoid")
    if not paranoid.exists():
        return "the kernel is without perf events"
    with tempfile.TemporaryDirectory(prefix="mrelease-perf-") as folder:
        try:
            done = subprocess.run(
                [program, "record", "-a", "-e", f"{EVENT}:k", "-k",
                 "CLOCK_MONOTONIC", "-o", f"{folder}/data", "--", "true"],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=30,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{program}: {error}"
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:200]
        return (
            f"{program} record fails (perf_event_paranoid is "
            f"{paranoid.read_text().strip()}): {said}"
        )
    return None


class PerfError(Exception):
    """perf did not do what it had done when it was tried."""


class Sample(NamedTuple):
    comm: str
    pid: int
    when: int
    """Nanoseconds of the monotonic clock."""
    symbol: str


_LINE = re.compile(
    r"\s*(?P<comm>.*?)\s+(?P<pid>-?\d+)/(?P<tid>-?\d+)\s+"
    r"(?P<s>\d+)\.(?P<ns>\d{9}):\s+(?P<ip>[0-9a-f]+)\s+(?P<symbol>.*)"
)


class Perf:
    def __init__(self) -> None:
        self._program = _program() or "perf"
        most = Path("/proc/sys/kernel/perf_event_max_sample_rate")
        self._rate = min(RATE, int(most.read_text()))
        self.period = 1 / self._rate
        version = subprocess.run(
            [self._program, "--version"], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
        self.text = f"{version}, {EVENT}, {self._rate} samples/s and CPU"

    def see(
        self, do: Callable[[Callable[[], None]], T]
    ) -> tuple[T, list[Sample]]:
        """do() is called with what begins the seeing."""
        file = common.folder() / "perf.data"
        command, to_perf = os.pipe()
        from_perf, answer = os.pipe()
        popen = subprocess.Popen(
            [self._program, "record", "-a", "-e", EVENT, "-F",
             str(self._rate), "-k", "CLOCK_MONOTONIC", "-D", "-1",
             f"--control=fd:{command},{answer}", "-o", str(file),
             "--", "sleep", str(LONGEST)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(command, answer),
            start_new_session=True,  # Ctrl-C is ours alone
        )  # fmt: skip
        os.close(command)
        os.close(answer)

        def begin() -> None:
            try:
                os.write(to_perf, b"enable\n")
                said = os.read(from_perf, 64)
            except BrokenPipeError:
                said = b""
            if not said.startswith(b"ack"):
                raise PerfError("perf record ended, or does not obey")

        try:
            found = do(begin)
        finally:
            popen.send_signal(signal.SIGINT)
            popen.wait()
            os.close(to_perf)
            os.close(from_perf)
        samples = list(self._read(file))
        file.unlink()
        return found, samples

    def _read(self, file: Path) -> Iterator[Sample]:
        done = subprocess.run(
            [self._program, "script", "-i", str(file), "--ns", "-F",
             "comm,pid,tid,time,ip,sym"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise PerfError(f"perf script: {done.stderr.strip()[-200:]}")
        for line in done.stdout.splitlines():
            match = _LINE.fullmatch(line)
            if match is None:
                continue
            # The upper half, where 64 bits are shared with the user.
            kernel = int(match["ip"], 16) >> 63
            yield Sample(
                match["comm"], int(match["pid"]),
                int(match["s"]) * 1_000_000_000 + int(match["ns"]),
                match["symbol"] if kernel else USER,
            )  # fmt: skip


COLUMNS = ("killer before", "killer after", "victim")


class Profile:
    """What was seen of some kills of a kind."""

    def __init__(self) -> None:
        self.kills = 0
        self._seen: collections.Counter[tuple[str, str]] = (
            collections.Counter()
        )
        """By column of COLUMNS and function."""
        self._others: collections.Counter[str] = collections.Counter()
        """By name of thread: what else ran meanwhile."""

    def add(
        self, samples: Iterable[Sample], killer: int, victim: int,
        times: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """times: when the kill began, SIGKILL was sent, all was over."""
        begun, signalled, ended = times
        self.kills += 1
        for sample in samples:
            if not begun <= sample.when <= ended:
                continue
            if sample.pid == killer:
                column = COLUMNS[sample.when >= signalled]
            elif sample.pid == victim:
                column = COLUMNS[2]
            else:
                self._others[sample.comm] += 1
                continue
            self._seen[column, sample.symbol] += 1

    def _totals(self) -> collections.Counter[str]:
        totals: collections.Counter[str] = collections.Counter()
        for (_, symbol), count in self._seen.items():
            totals[symbol] += count
        return totals

    def as_rows(self) -> list[tuple[str, list[int]]]:
        """Each function, and its samples by column; most first."""
        return [
            (symbol, [self._seen[column, symbol] for column in COLUMNS])
            for symbol, _ in self._totals().most_common()
        ]

    def _top(self) -> set[str]:
        """The first few of each column that matters: each is a question."""
        every = sum(self._seen.values())
        found: set[str] = set()
        for wanted in COLUMNS:
            some = collections.Counter(
                {s: n for (c, s), n in self._seen.items() if c == wanted}
            )
            if sum(some.values()) >= SMALL * every:
                found.update(symbol for symbol, _ in some.most_common(TOP))
        return found

    def tell(self, title: str, period: float) -> None:
        every = sum(self._seen.values())

        def row(name: str, counts: list[int]) -> list[str]:
            return [
                name, f"{sum(counts) / every:.1%}",
                *(in_ms(count * period / self.kills) if count else ""
                  for count in counts),
            ]  # fmt: skip

        if every == 0:
            print(f"\n{title}: perf saw nothing of {self.kills} kills.")
            return
        found = self.as_rows()
        top = self._top()
        rows = [row(name, counts) for name, counts in found if name in top]
        small = [counts for name, counts in found if name not in top]
        if small:
            rest = [sum(column) for column in zip(*small, strict=True)]
            rows.append(row(f"{len(small)} others", rest))
        whole = [
            sum(column)
            for column in zip(*(counts for _, counts in found), strict=True)
        ]
        rows.append(row("all", whole))
        common.table(
            f"perf: {title}: CPU time in ms a kill, mean of {self.kills}",
            ("function of the kernel", "share", *COLUMNS),
            rows,
        )
        idle = "swapper"
        others = ", ".join(
            f"{'idle' if name == idle else name} "
            f"{in_ms(count * period / self.kills)}"
            for name, count in self._others.most_common(5)
        )
        if others:
            print(f"Meanwhile, on all CPUs, in ms a kill: {others}.")


NOTE = (
    "killer before, after: SIGKILL is sent. Where interrupts are off a sample "
    "is taken when they\nare on again: so what holds a lock that way shows as "
    "the function that gives it back. What\nRCU frees later, by whoever is "
    "interrupted, is not the victim's here."
)
