"""A killer service when memory is nearly gone: ``make pressure``.

Two machines are booted (tests/vm/run.py, in software emulation), one without
swap and one with swap on zram. In each, nearly all memory is held by a
ballast that is locked; what is left is 5 % of it (--left). Then, in rounds:

- a hog takes memory as fast as it can (native code, a thread for each CPU);
- a killer, which watches what is left, kills it at a threshold (--kill-at);
- at once the hog's successor starts, with twice as many threads, and takes
  more than there would be if the hog's memory did not come back.

There are two killers, which take turns, a block of rounds each:

reaper    has called harden(), and has a Reaper that was made beforehand
os.kill   the same loop in a process that did nothing of that

and two kinds of hogs, in turn: an ordinary one, and a batch job (SCHED_IDLE,
nice 19) that waits for its successor's threads when it is to end.

What is left is MemAvailable + SwapFree of /proc/meminfo, which the killer
reads, then sleeps for a millisecond (--pause), and so on: a look costs little
and cannot block. A PSI trigger would tell of stalls, that is, when memory is
gone already; without swap it fires too late or never.

The memory of a hog is back when its memory cgroup, swap included, is down to
5 % of what it was. The killer kills one at a time: the next round begins when
that is so.

In the machine all programs and libraries lie on an ext4 file system, so that
the kernel can drop their pages, as it can anywhere.

0 kills by the kernel's OOM killer are promised for the first killer, with the
exit code 1 if it is not so, and for the other one they are told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mrelease
import report
import victims
from cgroups import Gauge
from mrelease.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
MIB = victims.MIB
WAYS = ("reaper", "os.kill")
HOGS = ("ordinary", "batch")
SWAPS = {"no_swap": "0", "zram": "48M"}
"""The machines, and how much swap each has."""
BACK = 0.05
"""Of the hog's memory: when no more than that is left, it is back."""
PATIENCE = 20.0
"""Seconds for what must happen in a round."""
LONG = ("passes", "gaps")
"""Of a round, what is not printed with --verbose."""
PASSES = 1 << 16
"""Room for the times of so many passes of the loop, in a round."""

MARK = "@pressure "
"""Begins the line of the machine that has the figures."""

Numbers = dict[str, Any]


# ------------------------------------------------------------ the killer


class Meminfo:
    """What is left, by /proc/meminfo: opened once, read anew each time."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)

    def look(self) -> tuple[int, int]:
        """MemAvailable and SwapFree, in bytes."""
        text = os.pread(self._fd, 4096, 0)
        return self._field(text, b"\nMemAvailable:"), self._field(
            text, b"\nSwapFree:"
        )

    def close(self) -> None:
        os.close(self._fd)

    def total(self) -> int:
        return self._field(os.pread(self._fd, 4096, 0), b"MemTotal:")

    @staticmethod
    def _field(text: bytes, name: bytes) -> int:
        at = text.index(name) + len(name)
        return int(text[at : text.index(b"kB", at)]) * 1024


class Progress:
    """What victim.c says of its growing: struct progress."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> tuple[int, int, int, int]:
        """Bytes touched; of ns, when it began, ended, its longest step."""
        touched, began, ended, longest = struct.unpack(
            "=4Q", os.pread(self._fd, 32, 0)
        )
        return touched, began, ended, longest

    def close(self) -> None:
        os.close(self._fd)


class Faults(NamedTuple):
    major: int
    minor: int


def faults() -> Faults:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Faults(used.ru_majflt, used.ru_minflt)


class Killer:
    """The loop of a killer service. It is told whom to watch by lines."""

    def __init__(self, way: str, pause: float) -> None:
        self.pause = pause
        self.meminfo = Meminfo()
        self.reaper: mrelease.Reaper | None = None
        self.prepared = "nothing"
        if way == "reaper":
            hardened = mrelease.harden()
            self.reaper = mrelease.Reaper()
            self.prepared = "; ".join(
                f"{step.name} {step.status}" for step in hardened.steps
            )
            self.prepared += f"; threads {self.reaper.scheduling}"
        # Written to, so that the times need no new page.
        self._passes = array("q", bytes(8 * PASSES))
        self._gaps = array("q", bytes(8 * PASSES))

    def _kill(self, victim: mrelease.Victim) -> mrelease.Reaping | None:
        if self.reaper is None:
            os.kill(victim.pid, signal.SIGKILL)
            return None
        return self.reaper.kill(victim, timeout=PATIENCE)

    def round(self, job: Numbers) -> Numbers:
        """Let the hog go, kill it in time, let its successor go."""
        victim = mrelease.Victim(job["hog"])
        start_hog = os.open(job["start_hog"], os.O_WRONLY)
        start_next = os.open(job["start_next"], os.O_WRONLY)
        hog = Progress(job["hog_progress"])
        successor = Progress(job["next_progress"])
        pidfd = os.pidfd_open(job["next"])
        gauges = [os.open(path, os.O_RDONLY) for path in job["gauges"]]
        try:
            return self._watch(
                job,
                victim,
                (start_hog, start_next),
                hog,
                successor,
                pidfd,
                gauges,
            )
        finally:
            for fd in (start_hog, start_next, pidfd, *gauges):
                os.close(fd)
            successor.close()
            hog.close()
            victim.close()

    def _watch(
        self,
        job: Numbers,
        victim: mrelease.Victim,
        starts: tuple[int, int],
        hog: Progress,
        successor: Progress,
        pidfd: int,
        gauges: Sequence[int],
    ) -> Numbers:
        now = time.monotonic_ns
        look = self.meminfo.look
        passes, gaps, count = self._passes, self._gaps, 0
        limit: int = job["limit"]
        before = faults()
        lowest = look()[0]
        base = sum(int(os.pread(fd, 32, 0)) for fd in gauges)
        above = at = begun = now()
        os.write(starts[0], bytes(job["hog_threads"]))
        while True:
            last, at = at, now()
            available, swap = look()
            lowest = min(lowest, available)
            decided = available + swap < limit
            passes[count] = now() - at
            gaps[count] = at - last
            count += 1
            if decided:
                break
            above = at
            if at - begun > PATIENCE * 1e9:
                raise TimeoutError(f"the hog leaves {available + swap} bytes")
            time.sleep(self.pause)
        decision, called = at, now()
        reaping = self._kill(victim)
        sent = returned = now()
        os.write(starts[1], bytes(job["next_threads"]))
        # The loop goes on as before, and nobody else is killed meanwhile.
        held = hog.read()[0]
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        back = 0
        while at - sent < PATIENCE * 1e9:
            last, at = at, now()
            lowest = min(lowest, look()[0])
            passes[count] = now() - at
            gaps[count] = at - last
            count += 1
            if not back:
                used = sum(int(os.pread(fd, 32, 0)) for fd in gauges)
                if used <= base + held * BACK:
                    back = now()
            if back and (successor.read()[2] or poll.poll(0)):
                break
            time.sleep(self.pause)
        after = faults()
        if reaping:
            # A Reaper tells when SIGKILL went out; os.kill() only returns.
            signalled = reaping.result().signalled
            assert signalled is not None
            sent = called + int(signalled * 1e9)
        touched, started, ended, longest = successor.read()
        return {
            "left": available + swap,
            "held": held,
            "above": sent - above,
            "sent": sent - decision,
            "sent_at": sent,
            "returned": returned - decision,
            "back": back - sent if back else None,
            "lowest": lowest,
            "major": after.major - before.major,
            "minor": after.minor - before.minor,
            "outcome": reaping.result().outcome.value if reaping else None,
            "passes": list(passes[:count]),
            "gaps": list(gaps[:count]),
            "touched": touched,
            "need": ended - sent if ended else None,
            "took": ended - started if ended else None,
            "longest": longest,
        }

    def serve(self) -> None:
        print(json.dumps({"prepared": self.prepared}), flush=True)
        for line in sys.stdin:
            try:
                answer = self.round(json.loads(line))
            except Exception as error:  # noqa: BLE001 - told where it counts
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


class KillerProcess(Closing):
    """A Killer in a process of its own."""

    def __init__(self, way: str, pause: float) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, __file__, "--killer", way, "--pause", str(pause)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._popen.pid
        set_oom_score(self.pid, 0)
        self.prepared: str = self.answer()["prepared"]

    def ask(self, job: Numbers) -> Numbers:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(job) + "\n")
        return self.answer()

    def answer(self) -> Numbers:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(f"the killer ended: {self._popen.wait()}")
        found: Numbers = json.loads(line)
        return found

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# --------------------------------------------------------- in the machine


def set_oom_score(pid: int, score: int) -> None:
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))


def move_to_disk() -> None:
    """Copy all programs to ext4 and go there: else they lie in memory."""
    disk = Path(tempfile.gettempdir())
    root = disk / "root"
    root.mkdir()
    kept = {"dev", "disk", "mnt", "modules", "proc", "run", "sys", "var"}
    for path in Path("/").iterdir():
        if path.name not in kept:
            subprocess.run(["cp", "-a", path, root], check=True)
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir()
        subprocess.run(
            ["mount", "--rbind", f"/{name}", root / name], check=True
        )
    (root / disk.relative_to("/")).mkdir(parents=True)
    subprocess.run(
        ["mount", "--bind", disk, root / disk.relative_to("/")], check=True
    )
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    Path("/proc/sys/vm/percpu_pagelist_high_fraction").write_text("1024")
    here = os.getcwd()
    os.chroot(root)
    os.chdir(here)


def take(stack: contextlib.ExitStack, mib: int) -> None:
    """Lock so much memory; in parts, each of which is soon touched."""
    while mib > 0:
        part = min(mib, 256)
        ballast = stack.enter_context(victims.mlocked(part))
        set_oom_score(ballast.pid, -1000)
        mib -= part


def vmstat(*names: str) -> int:
    """The sum of all counters whose names begin with one of these."""
    return sum(
        int(line.split()[1])
        for line in Path("/proc/vmstat").read_text().splitlines()
        if line.startswith(names)
    )


def oom_kills_in_log() -> int:
    """What the kernel's log has of them."""
    count = 0
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                count += b"Killed process" in os.read(fd, 8192)
            except BlockingIOError:
                return count
            except BrokenPipeError:  # it was overwritten: the next one
                continue
    finally:
        os.close(fd)


def stalled() -> float:
    """Seconds in which some process waited for memory, so far."""
    text = Path("/proc/pressure/memory").read_text()
    found = re.search(r"some .*total=(\d+)", text)
    assert found is not None
    return int(found[1]) / 1e6


class Grower(Closing):
    """A hog, or its successor: a process that takes memory when let go."""

    def __init__(
        self, folder: Path, gauge: Gauge, mib: int, threads: int, *, idle: bool
    ) -> None:
        self.threads = threads
        self.gauge = gauge
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.start = self.folder / "start"
        self.progress = self.folder / "progress"
        os.mkfifo(self.start)
        self.progress.write_bytes(bytes(32))
        try:
            self.victim = victims.asleep(
                0,
                threads=threads,
                groups=[gauge],
                grow=mib,
                start=self.start,
                progress=self.progress,
                idle=idle,
            )
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        self.pid = self.victim.pid
        set_oom_score(self.pid, 0)

    def close(self) -> None:
        self.victim.close()
        shutil.rmtree(self.folder)


class Rounds:
    """All that happens in one machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cpus = len(os.sched_getaffinity(0))
        self.meminfo = Meminfo()
        self.total = self.meminfo.total()
        self.limit = int(self.total * args.kill_at / 100)
        self.found: dict[str, list[Numbers]] = {way: [] for way in WAYS}
        self.oom: Counter[str] = Counter()
        self.wrong: list[str] = []
        """What must not be; and the same of os.kill, which is told only."""
        self.trouble: list[str] = []
        self._stack = contextlib.ExitStack()

    def run(self) -> Numbers:
        with self._stack as stack:
            self.folder = Path(stack.enter_context(
                tempfile.TemporaryDirectory(dir="/dev/shm")
            ))  # fmt: skip
            self.hogs = stack.enter_context(Gauge())
            self.others = stack.enter_context(Gauge())
            killers = {
                way: stack.enter_context(KillerProcess(way, self.args.pause))
                for way in WAYS
            }
            for way, killer in killers.items():
                print(f"{way}: prepared: {killer.prepared}", flush=True)
            available, swap = self.meminfo.look()
            left = int(self.total * self.args.left / 100)
            ballast = (available - left) // MIB
            take(stack, ballast)
            available, swap = self.meminfo.look()
            self.start = available + swap
            # More than there would be without the hog's memory.
            self.need = max(8, int(available * 0.65)) // MIB
            print(
                f"{self.total / MIB:.0f} MiB of memory, of which a ballast "
                f"of {ballast} MiB; {available / MIB:.0f} MiB are available, "
                f"{swap / MIB:.0f} MiB of swap are free; killed when "
                f"{self.limit / MIB:.0f} MiB are left; the successor needs "
                f"{self.need} MiB",
                flush=True,
            )
            alone = [self.alone() for _ in range(5)]
            for block, count in enumerate(self._blocks()):
                ways = list(WAYS)
                random.shuffle(ways)
                for way in ways:
                    self.block(way, killers[way], count)
                    print(
                        f"block {block + 1}: {way}: {len(self.found[way])} "
                        f"rounds, {self.oom[way]} OOM kills",
                        flush=True,
                    )
            return self.told(alone, ballast, available, swap)

    def _blocks(self) -> Iterator[int]:
        left = self.args.rounds
        while left > 0:
            yield min(self.args.block, left)
            left -= self.args.block

    def settle(self) -> None:
        """Wait until those that ended have given all back."""
        end = time.monotonic() + 10
        while any(g.usage() > 2 * MIB for g in (self.hogs, self.others)):
            if time.monotonic() > end:
                self.wrong.append("the groups do not get empty")
                return
            time.sleep(0.01)
        left = sum(self.meminfo.look())
        if left < 1.25 * self.limit:
            self.wrong.append(f"only {left / MIB:.0f} MiB before a round")

    def successor(self) -> Grower:
        return Grower(
            self.folder, self.others, self.need, 2 * self.cpus, idle=False
        )

    def alone(self) -> Numbers:
        """A successor that nobody has gone before."""
        self.settle()
        with self.successor() as grower:
            fd = os.open(grower.start, os.O_WRONLY)
            os.write(fd, bytes(grower.threads))
            os.close(fd)
            progress = Progress(str(grower.progress))
            with contextlib.closing(progress):
                victims.wait_until(
                    lambda: progress.read()[2] > 0, "touched", PATIENCE
                )
                _, began, ended, longest = progress.read()
        return {"took": ended - began, "longest": longest}

    def block(self, way: str, killer: KillerProcess, count: int) -> None:
        """Some rounds; one before them, to be warm, counts for OOM kills."""
        problems = self.trouble if way == "os.kill" else self.wrong
        for number in range(-1, count):
            kind = HOGS[number % len(HOGS)]
            self.settle()
            kills = vmstat("oom_kill ")
            stalls = vmstat("allocstall")
            waited = stalled()
            with (
                Grower(
                    self.folder, self.hogs, 4096, self.cpus,
                    idle=kind == "batch",
                ) as hog,
                self.successor() as successor,
            ):  # fmt: skip
                found = killer.ask({
                    "hog": hog.pid,
                    "next": successor.pid,
                    "start_hog": str(hog.start),
                    "start_next": str(successor.start),
                    "hog_threads": hog.threads,
                    "next_threads": successor.threads,
                    "hog_progress": str(hog.progress),
                    "next_progress": str(successor.progress),
                    "gauges": [
                        str(hog.gauge.path / f"memory.{name}")
                        for name in ("current", "swap.current")
                        if (hog.gauge.path / f"memory.{name}").exists()
                    ],
                    "limit": self.limit,
                })  # fmt: skip
                ended = hog.victim.ended(PATIENCE)
                hurt = successor.victim.ended()
                with contextlib.closing(Progress(str(hog.progress))) as p:
                    touched, began, _, _ = p.read()
            kills = vmstat("oom_kill ") - kills
            self.oom[way] += kills
            what = f"{way}, round {len(self.found[way])}, {kind}"
            if "error" in found:
                problems.append(f"{what}: {found['error']}")
                continue
            if found["back"] is None:
                problems.append(f"{what}: not back after {PATIENCE} s")
            if not ended:
                problems.append(f"{what}: the hog lives")
            if hurt and not kills:
                problems.append(f"{what}: the successor ended")
            found |= {
                "kind": kind,
                "hog": touched,
                "grew": found["sent_at"] - began,
                "kills": kills,
                "hurt": hurt,
                "stalls": vmstat("allocstall") - stalls,
                "stalled": stalled() - waited,
            }
            if number >= 0:
                self.found[way].append(found)
            if self.args.verbose:
                brief = {k: v for k, v in found.items() if k not in LONG}
                print(f"{time.monotonic():.2f} {what}: {brief}", flush=True)

    def told(
        self, alone: list[Numbers], ballast: int, available: int, swap: int
    ) -> Numbers:
        events = 0
        for gauge in (self.hogs, self.others):
            text = (gauge.path / "memory.events").read_text()
            found = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
            assert found is not None
            events += int(found[1])
        log = oom_kills_in_log()
        told: Numbers = {
            "memory_mib": self.total // MIB,
            "ballast_mib": ballast,
            "available_mib": available // MIB,
            "swap_mib": swap // MIB,
            "threshold_mib": self.limit // MIB,
            "successor_mib": self.need,
            "oom_kills_cgroups": events,
            "oom_kills_log": log,
        }
        told |= times("alone_ms", [each["took"] for each in alone])
        told |= times("alone_step_ms", [each["longest"] for each in alone])
        for way in WAYS:
            name = way.replace(".", "_")
            told |= {
                f"{name}_{key}": value
                for key, value in self.of_way(self.found[way]).items()
            }
            told[f"{name}_oom_kills"] = self.oom[way]
        seen = sum(self.oom.values())
        if not seen == log >= events:
            self.wrong.append(
                f"OOM kills: {seen} in /proc/vmstat, {log} in the log, "
                f"{events} in the cgroups"
            )
        return told

    def of_way(self, rounds: list[Numbers]) -> Numbers:
        """The figures of one killer."""
        told: Numbers = {
            "rounds": len(rounds),
            "major_faults": sum(each["major"] for each in rounds),
            "minor_faults": sum(each["minor"] for each in rounds),
            "successors_killed": sum(each["hurt"] for each in rounds),
            "allocstalls": sum(each["stalls"] for each in rounds),
            "stalled_s": round(sum(each["stalled"] for each in rounds), 3),
            "passes": sum(len(each["passes"]) for each in rounds),
            "outcomes": ", ".join(
                f"{name} {count}"
                for name, count in Counter(
                    each["outcome"] or "not told" for each in rounds
                ).most_common()
            ),
        }
        if not rounds:
            return told
        told["lowest_mib"] = round(min(e["lowest"] for e in rounds) / MIB, 1)
        told["left_at_kill_mib"] = round(
            statistics.median(each["left"] for each in rounds) / MIB, 1
        )
        told["hog_mib"] = round(
            statistics.median(each["hog"] for each in rounds) / MIB, 1
        )
        told |= times("pass_ms", [t for e in rounds for t in e["passes"]])
        told |= times("gap_ms", [t for e in rounds for t in e["gaps"]])
        told |= times("above_ms", [each["above"] for each in rounds])
        told |= times("sent_ms", [each["sent"] for each in rounds])
        told |= times("returned_ms", [each["returned"] for each in rounds])
        for kind in HOGS:
            of = [each for each in rounds if each["kind"] == kind]
            told |= times(f"{kind}_back_ms", [each["back"] for each in of])
            told |= times(f"{kind}_need_ms", [each["need"] for each in of])
            told |= times(f"{kind}_step_ms", [each["longest"] for each in of])
            told[f"{kind}_hog_mib_s"] = round(
                statistics.median(
                    [each["hog"] / each["grew"] * 1e9 / MIB for each in of]
                    or [0]
                )
            )
        return told


def times(name: str, found: Sequence[int | None]) -> Numbers:
    """Median, 99 % and slowest, of nanoseconds, in ms; of None, no end."""
    if not found:
        return {}
    ordered = sorted(math.inf if t is None else t / 1e6 for t in found)
    chosen = {
        "p50": ordered[(len(ordered) - 1) // 2],
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "max": ordered[-1],
    }
    return {
        f"{name}_{key}": round(t, 3) if math.isfinite(t) else "never"
        for key, t in chosen.items()
    }


def inside(args: argparse.Namespace) -> int:
    """In the machine: all rounds, and the figures as one line of JSON."""
    if os.environ.get("MRELEASE_TEST_DISPOSABLE") != "1":
        sys.exit("this takes all memory of a machine: see --help")
    # Those that it starts begin with this, but for the ballast.
    set_oom_score(os.getpid(), -1000)
    move_to_disk()
    random.seed(args.seed)
    rounds = Rounds(args)
    told: Numbers = {
        "kernel": platform.release(),
        "cpus": rounds.cpus,
        "thp": re.findall(
            r"\[(\w+)\]",
            Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
        )[0],
    }
    told |= rounds.run()
    told["wrong"] = len(rounds.wrong)
    told["os_kill_trouble"] = len(rounds.trouble)
    for line in rounds.wrong:
        print(f"WRONG: {line}")
    for line in rounds.trouble:
        print(f"trouble: {line}")
    print(f"{MARK}{json.dumps(told)}", flush=True)
    return 1 if rounds.wrong else 0


# ------------------------------------------------------------ on the host


def run_in_machine(
    program: Sequence[str], kernel: str, memory: str, swap: str, limit: float
) -> tuple[int, Numbers]:
    """Run a program of the tests in a machine; print what it says.

    Gives its exit code, and the figures of its line that begins with MARK.
    The OOM killer may find nobody, and the kernel panic: that is a failure,
    also if all is well in the machine that is booted then.
    """
    command = [
        sys.executable, str(ROOT / "tests/vm/run.py"), "--program",
        "--kernel", kernel, "--memory", memory, "--swap", swap,
        "--limit", str(limit), *program,
    ]  # fmt: skip
    told: Numbers = {}
    panic = 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        try:
            for line in run.stdout:
                if line.startswith(MARK):
                    told = json.loads(line.removeprefix(MARK))
                else:
                    panic |= "deadlocked on memory" in line
                    print(line, end="", flush=True)
        except BaseException:
            run.terminate()  # it ends the machine
            raise
    return run.returncode or panic, told


SHOWN = (
    ("rounds", "rounds", ("",)),
    ("oom_kills", "OOM kills", ("",)),
    ("successors_killed", "... of successors", ("",)),
    ("passes", "passes of the loop", ("",)),
    ("pass_ms", "a pass: read the meter, decide", ("p50", "p99", "max")),
    ("gap_ms", "from pass to pass, with the pause", ("p50", "p99", "max")),
    ("major_faults", "major faults of the killer", ("",)),
    ("minor_faults", "minor faults of the killer", ("",)),
    ("sent_ms", "deciding pass to SIGKILL sent", ("p50", "p99", "max")),
    ("returned_ms", "... to the call's return", ("p50", "p99", "max")),
    ("above_ms", "last pass above to SIGKILL sent", ("p50", "p99", "max")),
    *(
        (f"{kind}_{name}", f"{kind} hog: {what}", ("p50", "p99", "max"))
        for kind in HOGS
        for name, what in (
            ("back_ms", "SIGKILL to memory back"),
            ("need_ms", "SIGKILL to successor done"),
            ("step_ms", "its longest 256 KiB"),
        )
    ),
    ("left_at_kill_mib", "left at the kill, MiB", ("",)),
    ("lowest_mib", "lowest MemAvailable, MiB", ("",)),
    ("allocstalls", "direct reclaims", ("",)),
    ("stalled_s", "some process stalled (PSI), s", ("",)),
    ("ordinary_hog_mib_s", "ordinary hog, MiB/s", ("",)),
    ("batch_hog_mib_s", "batch hog, MiB/s", ("",)),
    ("outcomes", "outcomes", ("",)),
)  # fmt: skip
"""Figures of a killer: the name, what it is, what of it."""


def rows(told: Numbers, swap: str) -> Iterator[list[str]]:
    """A table: each figure of both killers, the times in ms."""
    for name, what, parts in SHOWN:
        row = [what]
        for way in WAYS:
            prefix = f"{swap}_{way.replace('.', '_')}_{name}"
            cells = [
                told.get(f"{prefix}_{part}" if part else prefix, "-")
                for part in parts
            ]
            row.append(" / ".join(map(in_short, cells)))
        yield row


def in_short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def circumstances(told: Numbers, swap: str) -> str:
    """What the figures of one machine were found with."""

    basis = told.get("conditions", told)

    def of(name: str) -> object:
        return told[f"{swap}_{name}"]

    swaps = "no swap" if swap == "no_swap" else f"{of('swap_mib')} MiB zram"
    return (
        f"Linux {basis['kernel']} in QEMU's software emulation, "
        f"{basis['cpus']} CPUs, on a machine with {basis['host_cpus']} CPUs "
        f"and a load of {basis['load']} before; transparent huge pages "
        f"{told['thp']}; "
        f"{swaps}; {of('memory_mib')} MiB of memory, {of('ballast_mib')} MiB "
        f"locked by the ballast, {of('available_mib')} MiB available; killed "
        f"at {of('threshold_mib')} MiB; the successor takes "
        f"{of('successor_mib')} MiB, with no hog before it in "
        f"{in_short(of('alone_ms_p50'))} ms (longest 256 KiB: "
        f"{in_short(of('alone_step_ms_max'))} ms)."
    )


def print_table(told: Numbers, swap: str) -> None:
    print(f"\n{circumstances(told, swap)}\n")
    table = [["median / 99 % / slowest, ms", *WAYS], *rows(told, swap)]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for first, *others in table:
        cells = [
            text.rjust(width)
            for text, width in zip(others, widths[1:], strict=True)
        ]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print(
        f"OOM kills by the kernel's log: {told[f'{swap}_oom_kills_log']}, "
        f"by memory.events: {told[f'{swap}_oom_kills_cgroups']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=100, help="of each killer (100)")
    add("--block", type=int, default=10, help="rounds in a row (10)")
    add("--left", type=float, default=5, help="%% the ballast leaves (5)")
    add("--kill-at", type=float, default=2.5, help="%% of memory left (2.5)")
    add("--pause", type=float, default=0.001, help="s between looks (0.001)")
    add("--swap", choices=SWAPS, action="append", help="one machine only")
    add("--kernel", default="trixie", help="of this Debian suite")
    add("--memory", default="1G", help="of the machine")
    add("--limit", type=float, default=1800, help="seconds for a machine")
    add("--seed", type=int, help="of the order of the killers")
    add("--verbose", action="store_true", help="print each round")
    add("--json", metavar="FILE", type=Path, help="write the figures there")
    add("--inside", action="store_true", help=argparse.SUPPRESS)
    add("--killer", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.killer:
        Killer(args.killer, args.pause).serve()
        return 0
    if args.inside:
        return inside(args)

    seed = args.seed if args.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begun = time.monotonic()
    figures: Numbers = {
        "seed": seed,
        "load": round(os.getloadavg()[0], 1),
        "host_cpus": len(os.sched_getaffinity(0)),
    }
    failed = []
    machines = args.swap or list(SWAPS)
    for swap in machines:
        program = [__file__, "--inside", "--seed", str(seed)]
        for name in ("rounds", "block", "left", "kill_at", "pause"):
            option = f"--{name.replace('_', '-')}"
            program += [option, str(getattr(args, name))]
        if args.verbose:
            program.append("--verbose")
        code, told = run_in_machine(
            program, args.kernel, args.memory, SWAPS[swap], args.limit
        )
        if code:
            failed.append(f"{swap}: exit code {code}")
        for name in ("kernel", "cpus", "thp"):
            if name in told:
                figures[name] = told.pop(name)
        figures |= {f"{swap}_{name}": value for name, value in told.items()}
        kills = told.get("reaper_oom_kills")
        if kills is None:
            failed.append(f"{swap}: no figures")
        elif kills or told["reaper_successors_killed"]:
            failed.append(f"{swap}: {kills} OOM kills with the Reaper")
    for swap in machines:
        if f"{swap}_memory_mib" in figures:
            print_table(figures, swap)
    figures["took_s"] = round(time.monotonic() - begun)
    figures["failed"] = "; ".join(failed)
    report.write("pressure", figures, args.json)
    print(f"\n{figures['took_s']} s; {figures['failed'] or 'all as promised'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
