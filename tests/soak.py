"""Kills of all kinds for a long time: ``make soak``; test_soak.py: 20 s.

Four Python threads share one Reaper and kill victims of all kinds, on
terms drawn at random, in all the ways there are: one or many, waited for,
polled, awaited and cancelled, dropped unread; trees, process groups and
control groups; with that Reaper, with one that is made for it, and by
kill(). Meanwhile all CPUs are busy, others kill the same victims, the
process forks, Reapers come and go, and processes that nobody asked to kill
start beside the victims: with the same program, name and user, and with
their pids too.

What each result says is compared with what the kernel says of its victim,
which is a child that was not waited for, so the pid is its own, and of its
memory control group. At the end every victim is dead, every job has ended,
every bystander is as it was, and file descriptors, threads, children and
memory are back where they were when the first victims (the warm-up) had
fallen. A report of what must be so is the last thing that is printed.

The seed draws what is done; how threads and kernel take turns differs
from run to run. Ctrl-C ends it, with the report of what was done so far.

--machine does all that in a virtual machine (tests/vm/run.py), under memory
pressure: a ballast leaves only --left MiB, there is swap on zram, and again
and again a hog takes what is left, until it is killed like the others.
There, the kernel's OOM killer must not have to kill anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import platform
import random
import re
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from array import array
from collections import Counter, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cgroups
import families
import heap
import kernel_errors
import mrelease
import pressure
import report
import victims
from cgroups import Gauge, Unavailable, allowance
from mrelease import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType
    from typing import Any, Literal

    from mrelease import CgroupRelease, Reaper, Reaping, Release

THREADS = 4
MIB = victims.MIB

PATIENCE = 60.0
"""Seconds for what must happen, on a machine as busy as this one."""
LATE = 5.0
"""A result that is later than its terms allow by so many seconds."""
LATE_EMULATED = 60.0
"""The same in QEMU, where a busy host stops a processor for seconds."""
MOST_WRONG = 25
"""After so many false results there is nothing more to learn."""

# What must be so, and is told in the report as how often it was not.
RESULT = "results that are not true"
FREED = "freed, but the memory was there"
ALIVE = "victims that do not die"
WRONG = "wrong kills: bystanders hurt"
LEFT = "leaks: fds, threads, children, memory"
ERROR = "exceptions, and what does not end"
OOM = "kills by the kernel's OOM killer"
INVARIANTS = (RESULT, FREED, ALIVE, WRONG, LEFT, ERROR, OOM)

NOTHING = mrelease.Footprint(0, 0, 0, 0, 0)

# How often each kind is drawn. The last ones take long to make.
KINDS = {
    "asleep": 30.0,
    "spinning": 12.0,
    "asleep_8_threads": 12.0,
    "stopped": 8.0,
    "held": 8.0,
    "robust_holder": 6.0,
    "zombie": 5.0,
    "zombie_leader": 5.0,
    "shared": 4.0,
    "asleep_64_threads": 3.0,
    "spinning_4_threads": 3.0,
    "mlocked": 3.0,
    "held_64_threads": 1.0,
    "on_quota": 0.5,
    "frozen_v2": 0.5,
    "starved": 0.3,
    "frozen": 0.3,
    "in_d_state": 0.3,
    "core_dumping": 0.3,
    "swapped": 0.3,
    "huge": 0.3,
}
# These share what is kept for the next victim, and take turns to be made.
ONE_AT_A_TIME = (
    *("in_d_state", "on_quota", "frozen", "frozen_v2"),
    *("core_dumping", "swapped", "huge"),
)
# What can be in a control group that is killed, and ends then.
ORDINARY = ("asleep", "asleep_8_threads", "spinning", "stopped", "mlocked")

SIZES = (0, 0, 0, 1, 1, 2, 2, 4, 4, 8, 16, 32, 64)  # MiB
TIMEOUTS = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0, 2.0)
GRACES = (0.0, 0.0, 0.0, 0.0, 0.001, 0.01, 0.05, 0.3)

LEAST_METERED = 8  # MiB: what else is charged is not as much as that
HOG_AT = 96 * MIB
"""The hog is killed when no more than that is left."""

BYSTANDERS = 48
FDS_OF_A_VICTIM = 4  # three pipes and its pidfd
NS_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


# ---------------------------------------------------------- what is killed


class Terms(NamedTuple):
    grace: float = 0.0
    timeout: float = 1.0
    locks: Literal["protect", "ignore"] = "protect"
    escalates: float | None = None  # so many seconds after the call


class Subject:
    """A victim, and all that its result is judged by."""

    def __init__(
        self,
        kind: str,
        mib: int,
        sigterm: str | None,
        folder: Path,
        groups: Sequence[cgroups.Group] = (),
    ) -> None:
        options = victims.Options()
        if groups:
            options["groups"] = groups
        self.kind = kind
        self.mib = mib
        self.lock = folder / "lock"
        if kind == "robust_holder":
            options["robust"] = self.lock
        if sigterm is not None:
            options["sigterm"] = sigterm
        self.sigterm = sigterm or "default"
        self.victim = victims.kinds()[kind](mib, **options)
        self.pid = self.victim.pid
        self.terms = Terms()
        self.together = False
        self.others: list[str] = []
        self.meeting: list[Future[None]] = []
        self.code: int | None = None

    def close(self) -> None:
        for each in self.meeting:  # else its pid may be another's by then
            each.exception()
        self.victim.close()

    def exit_codes(self) -> set[int]:
        """How it may have ended."""
        codes = {-signal.SIGKILL}
        if self.kind == "core_dumping":
            codes.add(-signal.SIGABRT)
        if self.terms.grace > 0 and self.kind != "zombie":
            if self.sigterm == "default":
                codes.add(-signal.SIGTERM)
            elif self.sigterm == "exit":
                codes.add(0)
        return codes

    def threads(self) -> int:
        return self.victim.facts["threads"]

    def held_bytes(self) -> int:
        """Anonymous memory that it holds now, as far as it can be seen."""
        status = self.victim.status()
        return sum(
            int(status.get(field, "0 kB").split()[0]) * 1024
            for field in ("RssAnon", "VmSwap")
        )

    def __str__(self) -> str:
        others = f", also killed by {self.others}" if self.others else ""
        return (
            f"{self.kind} pid {self.pid}, {self.mib} MiB, "
            f"SIGTERM {self.sigterm}, {self.terms}{others}"
        )


def lies(
    s: Subject, r: Release, took: float, late: float = LATE
) -> Iterator[str]:
    """What a result says that is not so; the victim is not waited for."""
    ended = s.victim.ended()
    waited = s.terms.timeout
    terms = s.terms
    if r.pid != s.pid:
        yield f"it is of pid {r.pid}"
    # First what the kernel may belie in a moment.
    if r.freed and not ended and s.held_bytes() >= MIB:
        yield f"freed, but {s.held_bytes()} bytes are held"
    if r.exited is not None and not ended:
        yield "exited, but it has not ended"
    if took > terms.grace + waited + late:
        yield f"told after {took:.3f} s"

    match r.outcome:
        case Outcome.RELEASED:
            if r.released is None or r.errno is not None or not r.freed:
                yield "released, but the rest does not say so"
            if s.kind == "zombie":
                yield "a zombie has nothing to release"
        case Outcome.EXITED:
            if r.exited is None:
                yield "the outcome is its exit, which is not told"
        case Outcome.EXITING | Outcome.PARTIAL:
            if r.exited is not None or r.freed:
                yield "still held, but it exited or its memory is free"
            if took < waited - 0.001:
                yield f"given up after {took:.4f} s of {waited} s"
        case Outcome.SHARED:
            if s.kind != "shared" and not s.others:
                yield "nobody shares it"
            if r.freed:
                yield "shared and freed"
        case Outcome.DUMPING:
            if s.kind != "core_dumping":
                yield "no core is dumped"
            if r.freed:
                yield "dumping and freed"
        case Outcome.LOCKED:
            if s.kind != "robust_holder" or terms.locks != "protect":
                yield "withheld for locks that it does not hold"
            if r.attempts or r.released is not None:
                yield "withheld, but it was called"
            if r.freed and r.exited is None:
                yield "withheld and not ended, but freed"
        case _:
            yield "that cannot be"
    if s.kind == "shared" and r.outcome is not Outcome.SHARED:
        if r.freed:
            yield "the sharer lives, but it is freed"
        if r.outcome not in (Outcome.EXITING, Outcome.PARTIAL):
            yield "the sharer lives, and it is not told"

    if (terms.locks == "ignore") != (r.locks == "ignored") and r.signalled:
        yield f"{r.locks=} with locks={terms.locks!r}"
    if r.locks == "held" and s.kind != "robust_holder":
        yield "it holds no lock"
    if s.kind == "zombie":
        if not r.freed or r.footprint != NOTHING:
            yield "a zombie holds nothing"
    elif not s.others:
        # After a grace it is what SIGTERM has left of it.
        whole = terms.grace == 0 or s.sigterm == "ignore"
        least = s.mib * MIB if whole else 0
        if r.footprint is None or r.footprint.anon + r.footprint.swap < least:
            yield "the footprint is less than it holds"
        if terms.grace == 0 and r.signalled is None:
            yield "SIGKILL was not sent"
        if (terms.grace > 0) != (r.terminated is not None):
            yield "SIGTERM was sent and not told, or told and not sent"
        if r.signalled is None and r.exited is None:
            yield "not killed and not ended"
        early = terms.grace if terms.escalates is None else 0
        if r.signalled is not None and r.signalled < early - 0.001:
            yield f"SIGKILL before its grace of {terms.grace} s was over"


def lies_about_the_end(s: Subject, r: Release | None) -> Iterator[str]:
    """The same, of how it ended; it was waited for."""
    if s.code not in s.exit_codes():
        yield f"it ended with {s.code}, not one of {s.exit_codes()}"
    if r is None or s.others or s.kind == "zombie":
        return
    if s.code == -signal.SIGKILL and r.signalled is None:
        yield "it was killed, but SIGKILL is not told"


# -------------------------------------------------------- what must not be


class Bystander:
    """A process that nobody asked to kill."""

    def __init__(self, pid: int | None = None) -> None:
        if pid is not None:
            # The next process gets the number after it, if that is free.
            NS_LAST_PID.write_text(str(pid - 1))
        self.process = victims.Process(1)
        self.pid = self.process.pid
        if os.environ.get("MRELEASE_TEST_DISPOSABLE") == "1":
            # What the OOM killer does is not ours.
            with contextlib.suppress(PermissionError):
                pressure.set_oom_score(self.pid, -1000)
        self.was = self.look()

    def look(self) -> tuple[object, ...]:
        """All that a kill, a release or a raise of it would change."""
        if self.process.ended():
            return ("dead",)
        return (
            os.sched_getscheduler(self.pid),
            os.getpriority(os.PRIO_PROCESS, self.pid),
            tuple(sorted(os.sched_getaffinity(self.pid))),
            self.process.rss_anon() + self.process.vm_swap() >= MIB,
        )

    def harm(self) -> str | None:
        now = self.look()
        if now == self.was and now[-1] is True:
            return None
        return f"bystander {self.pid} was {self.was} and is {now}"


# ------------------------------------------------------------- what is left


class Stock(NamedTuple):
    fds: int
    threads: int
    children: int
    heap: int  # bytes, of the C library
    blocks: int  # of Python's allocator
    rss: int  # bytes, private and anonymous

    def __str__(self) -> str:
        return (
            f"{self.fds} fds, {self.threads} threads, "
            f"{self.children} children, "
            f"{self.heap / 1024:.0f} KiB of the C heap, {self.blocks} blocks "
            f"of Python's, {self.rss / MIB:.1f} MiB resident"
        )


def take_stock() -> Stock:
    """What this process has, once nothing more goes."""
    last: Stock | None = None
    end = time.monotonic() + 10
    while True:
        gc.collect()
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        status = victims.status_of(os.getpid())
        now = Stock(
            len(os.listdir("/proc/self/fd")),
            int(status["Threads"]),
            len(victims.children() - cgroups.guards()),
            heap.in_use(),
            sys.getallocatedblocks(),
            int(status["RssAnon"].split()[0]) * 1024,
        )
        if last is not None and now[:3] == last[:3]:
            return now
        if time.monotonic() > end:
            return now
        last = now
        time.sleep(0.25)


class Times:
    """The slowest of a step and its median, in a few bytes each."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, array[float]] = defaultdict(
            lambda: array("f")
        )

    def add(self, step: str, seconds: float) -> None:
        self._seconds[step].append(seconds)

    def slowest(self) -> dict[str, float]:
        """Of each step, whatever the kind of victim, in ms."""
        found: dict[str, float] = {}
        for step, seconds in self._seconds.items():
            name = re.sub(r"\W+", "_", step.partition(",")[0]).strip("_")
            name = f"slowest_{name.lower()}_ms"
            found[name] = max(
                found.get(name, 0.0), round(max(seconds) * 1e3, 2)
            )
        return found

    def rows(self) -> Iterator[str]:
        for step, seconds in sorted(self._seconds.items()):
            middle = statistics.median(seconds)
            worst = sorted(seconds)[-max(1, len(seconds) // 100)]
            yield (
                f"  {step:<44} {len(seconds):>6} {middle * 1e3:>9.3f} "
                f"{worst * 1e3:>9.2f} {max(seconds) * 1e3:>9.1f}"
            )


# ---------------------------------------------------------------- the soak


class Soak:
    def __init__(
        self,
        minutes: float,
        count: int,
        seed: int,
        say: Callable[[str], None] = print,
        busy: int = 0,
        left: int | None = None,
    ) -> None:
        """left: MiB that are available, under memory pressure."""
        self.busy = busy
        self.left = left
        self.late = LATE if left is None else LATE_EMULATED
        self.asked = 0
        self.seed = seed
        self.count = count
        self.say = say
        self.lasts = minutes * 60
        self.warm_up = max(50, min(1000, count // 5))
        if left is not None:
            self.warm_up = 20  # emulated, it takes a minute
        self.wrong: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.done: Counter[str] = Counter()
        self.fallen = 0
        self.times = Times()
        self.bystanders: list[Bystander] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._forking = threading.Lock()
        self._hogging = threading.Lock()
        self._gauges: list[Gauge] = []
        self._kinds = {
            kind: often
            for kind, often in KINDS.items()
            # Under memory pressure all are, and swap is not to be taken away.
            if not (kind == "swapped" and left is not None)
            and victims.why_not(kind) is None
        }
        self._reuse = os.access(NS_LAST_PID, os.W_OK)
        self._clear = contextlib.ExitStack()
        self.reaper: Reaper

    # -- what is found

    def find(self, what: str, kind: str = RESULT) -> None:
        """Something is false."""
        with self._lock:
            self.wrong[kind] += 1
            count = self.wrong.total()
            if count <= MOST_WRONG:
                self.say(f"FALSE: {what}")
            if count >= MOST_WRONG:
                self._stop.set()

    def note(self, what: str) -> None:
        """Something is rare, and allowed."""
        with self._lock:
            self.notes[what] += 1

    def judge(self, s: Subject, r: Release, took: float) -> None:
        for lie in lies(s, r, took, self.late):
            # Those with the word are of what is told to be free.
            self.find(
                f"{lie}: {r!r} of {s}", FREED if "free" in lie else RESULT
            )
        if (
            s.kind == "robust_holder"
            and s.terms.locks == "protect"
            and r.outcome is not Outcome.LOCKED
            and r.signalled is not None
        ):
            others = ", other killers" if s.others else ""
            self.note(
                f"a lock was held: {r.outcome.value}, {r.locks}, "
                f"grace {s.terms.grace}, timeout {s.terms.timeout}{others}"
            )
        with self._lock:
            self.outcomes[s.kind, r.outcome.value] += 1
            if r.outcome is Outcome.EXITED and not r.freed:
                self.notes[f"exited, not known to be freed: {s.kind}"] += 1
            now = s.terms.grace == 0 and not s.others
            if r.signalled is not None and now:
                many = "of kill_many()" if s.together else "of kill()"
                self.times.add(f"call {many} to SIGKILL", r.signalled)
                if r.released is not None:
                    self.times.add(
                        f"SIGKILL to released, {s.kind}",
                        r.released - r.signalled,
                    )
                    if s.mib == 64:
                        self.times.add(
                            "SIGKILL to released, of 64 MiB",
                            r.released - r.signalled,
                        )
                if r.exited is not None:
                    self.times.add(
                        "SIGKILL to its end", r.exited - r.signalled
                    )
            if now:
                self.times.add(f"call to result, {s.kind}", took)

    def see_end(self, s: Subject, r: Release | None) -> None:
        """It must end by itself, once nothing holds it; then reap it."""
        for each in s.meeting:  # before its pid may be another's
            each.result()
        s.victim.let_go()
        if not s.victim.ended(PATIENCE):
            self.find(
                f"alive after {PATIENCE} s: {s} {s.victim.states()}", ALIVE
            )
            return
        s.code = s.victim.wait()
        for lie in lies_about_the_end(s, r):
            self.find(f"{lie}: {r!r} of {s}")
        if (
            s.kind == "robust_holder"
            and s.terms.locks == "protect"
            and "mrelease, ignoring locks" not in s.others
        ):
            # It may have it before it could be seen to wait.
            with victims.Process(robust_wait=s.lock) as waiter:
                got = victims.got(waiter)
                if got != "EOWNERDEAD":
                    self.find(f"who waits for its lock got {got}: {r!r} {s}")
        with self._lock:
            self.fallen += 1

    # -- what is drawn

    def _draw_terms(self, rng: random.Random, *, one: bool) -> Terms:
        grace = rng.choice(GRACES)
        return Terms(
            grace,
            rng.choice(TIMEOUTS),
            rng.choice(("protect", "protect", "ignore")),
            rng.uniform(0, grace) if one and grace and rng.random() < 0.5
            else None,
        )  # fmt: skip

    @contextlib.contextmanager
    def _made(
        self,
        rng: random.Random,
        count: int,
        terms: Terms,
        gauge: Gauge | None = None,
        kinds: Sequence[str] = (),
    ) -> Iterator[list[Subject]]:
        """So many victims; dead, reaped and cleared away at the end."""
        with contextlib.ExitStack() as stack:
            made: list[Subject] = []
            for _ in range(count):
                often = {
                    kind: often
                    for kind, often in self._kinds.items()
                    if not kinds or kind in kinds
                }
                [kind] = rng.choices(list(often), list(often.values()))
                mib = rng.choice(SIZES if count == 1 else SIZES[:-3])
                if gauge is not None:
                    mib = max(mib, LEAST_METERED)
                if self.left is not None:
                    mib = min(mib, LEAST_METERED)
                sigterm = rng.choice(("ignore", "exit", "default", None))
                folder = Path(tempfile.mkdtemp(dir=self._folder))
                stack.callback(_remove, folder)
                alone = (
                    self._making
                    if kind in ONE_AT_A_TIME
                    else contextlib.nullcontext()
                )
                with alone:
                    s = Subject(
                        kind, mib, sigterm, folder, [gauge] if gauge else ()
                    )
                stack.callback(s.close)
                s.terms = terms
                made.append(s)
                if rng.random() < 0.05:
                    self._add_bystander()
            yield made

    def _add_bystander(self, pid: int | None = None) -> Bystander | None:
        with self._lock:
            if pid is None and len(self.bystanders) >= BYSTANDERS:
                return None
            bystander = Bystander(pid)
            if pid is None:
                self.bystanders.append(bystander)
            return bystander

    def _given(
        self, rng: random.Random, s: Subject, stack: contextlib.ExitStack
    ) -> object:
        """The victim in one of the ways to name it."""
        match rng.randrange(4):
            case 0:
                return s.pid
            case 1:
                return s.victim.popen
            case 2:
                return stack.enter_context(mrelease.Victim(s.pid))
            case _:
                return stack.enter_context(
                    mrelease.Victim.from_pidfd(s.victim.pidfd)
                )

    def _meet(self, rng: random.Random, subjects: Sequence[Subject]) -> None:
        """Let somebody else kill some of them at the same time."""
        for s in subjects:
            # The sharer's end frees what the victim shared with it: no one
            # could say what is true of it then.
            if s.kind == "shared" or rng.random() > 0.2:
                continue
            who = rng.choice(
                ("os.kill", "pidfd", "mrelease", "mrelease, ignoring locks")
            )
            s.others.append(who)
            pause = rng.uniform(0, 0.002)
            s.meeting.append(self._others.submit(_kill_too, s, who, pause))

    # -- what is done

    def _kill(
        self, rng: random.Random, reaper: Reaper, stack: contextlib.ExitStack
    ) -> tuple[list[Subject], list[Reaping], float]:
        """Some victims, killed one by one or together."""
        count = rng.choice((1, 1, 1, 1, 2, 3, 5, 8, 20))
        together = count > 1 and rng.random() < 0.8
        terms = self._draw_terms(rng, one=not together)
        made = stack.enter_context(self._made(rng, count, terms))
        with self._lock:
            self.asked += count
        given = [self._given(rng, s, stack) for s in made]
        if rng.random() < 0.15:
            self._meet(rng, made)
        for s in made:
            s.together = together
        begun = time.monotonic()
        if together:
            reapings = reaper.kill_many(
                given,  # type: ignore[arg-type]
                grace=terms.grace,
                timeout=terms.timeout,
                locks=terms.locks,
            )
            return made, reapings, begun
        escalate: int | None = None
        if terms.escalates is not None:
            escalate = os.eventfd(0)
            stack.callback(os.close, escalate)
        reapings = [
            reaper.kill(
                each,  # type: ignore[arg-type]
                grace=terms.grace,
                escalate_on=escalate,
                timeout=terms.timeout,
                locks=terms.locks,
            )
            for each in given
        ]
        if escalate is not None and terms.escalates is not None:
            # In time, or a little late: both must do.
            later = self._others.submit(
                _write_after, os.dup(escalate), terms.escalates
            )
            stack.callback(later.result)
        return made, reapings, begun

    def _collect(
        self,
        made: Sequence[Subject],
        reapings: Sequence[Reaping],
        begun: float,
        look: Callable[[Reaping], Release],
    ) -> None:
        results: list[Release | None] = []
        for s, reaping in zip(made, reapings, strict=True):
            result = look(reaping)
            took = time.monotonic() - begun
            self.judge(s, result, took)
            if reaping.result() != result:
                self.find(f"told twice, not the same: {result!r} {s}")
            results.append(result)
        for s, each in zip(made, results, strict=True):
            self.see_end(s, each)

    def waited_for(self, rng: random.Random) -> None:
        """result(), after some that were too short, or after a poll."""

        def look(reaping: Reaping) -> Release:
            way = rng.randrange(3)
            if way == 0:
                for _ in range(rng.randrange(4)):
                    with contextlib.suppress(TimeoutError):
                        reaping.result(rng.choice((0, 1e-5, 1e-3)))
            elif way == 1:
                poll = select.poll()
                poll.register(reaping.fileno(), select.POLLIN)
                if not poll.poll(PATIENCE * 1e3):
                    self.find(f"{reaping!r}: its fd never polls readable")
                if not reaping.done():
                    self.find(f"{reaping!r}: polls readable, but is not done")
            return reaping.result(PATIENCE)

        with contextlib.ExitStack() as stack:
            self._collect(*self._kill(rng, self.reaper, stack), look)

    def awaited(self, rng: random.Random) -> None:
        """In asyncio, by two tasks each, some of them cancelled."""
        with contextlib.ExitStack() as stack:
            made, reapings, begun = self._kill(rng, self.reaper, stack)
            told = asyncio.run(self._await(rng, reapings))
            for release in told:
                if release not in [each.result() for each in reapings]:
                    self.find(
                        f"a task was told what result() is not {release!r}"
                    )
            self._collect(
                made, reapings, begun, lambda each: each.result(PATIENCE)
            )

    async def _await(
        self, rng: random.Random, reapings: Sequence[Reaping]
    ) -> list[Release]:
        async def one(reaping: Reaping) -> Release:
            return await reaping

        tasks = [
            asyncio.create_task(one(reaping))
            for reaping in (*reapings, *reapings)
        ]
        await asyncio.sleep(rng.choice((0, 0, 1e-4, 1e-3, 1e-2)))
        for task in tasks:
            if rng.random() < 0.6:
                task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        self.count_done("await", len(tasks))
        told: list[Release] = []
        for each in ended:
            if isinstance(each, asyncio.CancelledError):
                self.count_done("await cancelled")
            elif isinstance(each, BaseException):
                raise each
            else:
                told.append(each)
        return told

    def dropped(self, rng: random.Random) -> None:
        """Nobody keeps the Reapings: the victims die all the same."""
        with contextlib.ExitStack() as stack:
            made, reapings, _ = self._kill(rng, self.reaper, stack)
            del reapings
            for s in made:
                self.see_end(s, None)

    def forked(self, rng: random.Random) -> None:
        """fork() while kills are under way, here and in other threads."""
        with contextlib.ExitStack() as stack:
            made, reapings, begun = self._kill(rng, self.reaper, stack)
            if rng.random() < 0.1:
                for s in made:
                    s.others.append("a forked child")
            kills = [s.pid for s in made if s.others and s.kind != "shared"]
            with self._forking:
                child = kernel_errors.Job(
                    lambda: in_child(self.reaper, reapings, kills)
                )
            with child:
                for lie in child.result(PATIENCE):
                    self.find(f"in a forked child: {lie}")
            self.count_done("fork")
            self._collect(
                made, reapings, begun, lambda each: each.result(PATIENCE)
            )

    def with_an_own_reaper(self, rng: random.Random) -> None:
        """A Reaper that comes and goes, closed early or late."""
        reaper = mrelease.Reaper(
            rng.choice((None, 1, 2, 5)),
            policy=rng.choice(("auto", "nice", "none"))
            if os.geteuid() == 0
            else "auto",
            spares=rng.choice((0, 1, 8)),
        )
        with contextlib.ExitStack() as stack, reaper:
            made, reapings, begun = self._kill(rng, reaper, stack)
            cut = False
            if rng.random() < 0.5:
                cut = not reaper.close(rng.choice((0, 1e-3, 0.1)))
                if not reaper.closed:
                    self.find("it was closed, and is not")
                try:
                    reaper.kill(made[0].pid)
                except ValueError:
                    pass
                else:
                    self.find("a closed Reaper has killed")
            if cut:
                for s in made:  # its grace was cut short
                    s.terms = s.terms._replace(escalates=0.0)
            self._collect(
                made, reapings, begun, lambda each: each.result(PATIENCE)
            )
            closing = time.monotonic()
            ended = reaper.close(PATIENCE)
            self.add_time("close() of a Reaper", time.monotonic() - closing)
            if not ended:
                self.find(f"{reaper!r} does not end", ERROR)
        self.count_done("own Reaper")

    def reused(self, rng: random.Random) -> None:
        """A victim's pid becomes another process's as soon as it can."""
        with contextlib.ExitStack() as stack:
            terms = self._draw_terms(rng, one=False)
            [s] = stack.enter_context(self._made(rng, 1, terms))
            known = stack.enter_context(mrelease.Victim(s.pid))
            reaping = self.reaper.kill(
                known,
                grace=terms.grace,
                timeout=terms.timeout,
                locks=terms.locks,
            )
            s.victim.let_go()
            if not s.victim.ended(PATIENCE):
                self.find(f"alive after {PATIENCE} s: {s}", ALIVE)
                return
            s.victim.wait()
            heir = self._add_bystander(s.pid if self._reuse else None)
            if heir is not None:
                stack.callback(heir.process.close)
                if heir.pid == s.pid:
                    self.count_done("pid reused")
            # What is told of it comes when its pid may be the heir's.
            result = reaping.result(PATIENCE)
            if (
                result.exited is None
                and result.outcome is not Outcome.RELEASED
            ):
                self.note(f"reaped before its result, {result.outcome.value}")
            [late] = self.reaper.kill_many([known])
            if late.result(PATIENCE).outcome is not Outcome.GONE:
                self.find(f"killed when gone: {late.result()!r}", WRONG)
            with contextlib.suppress(ProcessLookupError):
                self.reaper.kill(known)
                self.find(f"killed when gone: {s}", WRONG)
            if heir is not None:
                harm = heir.harm()
                if harm is not None:
                    self.find(f"the heir of {s}: {harm}", WRONG)
                if heir in self.bystanders:
                    self.bystanders.remove(heir)
            with self._lock:
                self.asked += 1
                self.fallen += 1

    def told(
        self,
        rng: random.Random,
        s: Subject,
        stack: contextlib.ExitStack,
        gauge: Gauge | None,
    ) -> tuple[Release, float, int]:
        """Kill one and wait: the result, how long, what is charged then."""
        terms = s.terms
        escalate: int | None = None
        if terms.escalates is not None:
            escalate = os.eventfd(0)
            stack.callback(os.close, escalate)
            later = self._others.submit(
                _write_after, os.dup(escalate), terms.escalates
            )
            stack.callback(later.result)
        options: pressure.Numbers = {
            "grace": terms.grace,
            "escalate_on": escalate,
            "timeout": terms.timeout,
            "locks": terms.locks,
        }
        given: Any = self._given(rng, s, stack)
        way = rng.randrange(3)
        begun = time.monotonic()
        if way == 0:
            result = self.reaper.kill(given, **options).result(PATIENCE)
        elif way == 1 and isinstance(given, mrelease.Victim):
            result = given.kill(**options)
        else:
            result = mrelease.kill(given, **options)
        usage = gauge.usage() if gauge else 0
        return result, time.monotonic() - begun, usage

    def metered(self, rng: random.Random) -> None:
        """By kill() or the Reaper, alone in a memory control group."""
        terms = self._draw_terms(rng, one=True)
        with contextlib.ExitStack() as stack:
            gauge = stack.enter_context(self._gauge())
            base = gauge.usage() if gauge else 0
            [s] = stack.enter_context(self._made(rng, 1, terms, gauge))
            private = s.mib * MIB
            # The page cache of its program may be charged to it.
            base = max(base, gauge.usage() - private) if gauge else 0
            r, took, usage = self.told(rng, s, stack, gauge)
            self.judge(s, r, took)
            if gauge and r.freed and r.exited is None and r.footprint:
                base += r.footprint.shmem + r.footprint.hugetlb
            self.weigh(r, usage - base, private, s.threads(), gauge)
            self.see_end(s, r)
        with self._lock:
            self.asked += 1

    def weigh(
        self,
        what: Release | CgroupRelease,
        left: int,
        private: int,
        threads: int,
        gauge: Gauge | None,
    ) -> None:
        """Compare "freed" with what is charged to the control group."""
        if gauge is None or not what.freed:
            return
        self.count_done("freed, by the memory control group")
        most = private // 20 + allowance(threads, private)
        if left > most:
            self.find(
                f"freed, but {left} bytes are charged, more than {most}: "
                f"{what!r}",
                FREED,
            )

    @contextlib.contextmanager
    def _gauge(self) -> Iterator[Gauge | None]:
        """A memory control group that is nobody else's; None: not here."""
        if not self._gauges:
            yield None
            return
        gauge = self._gauges.pop()
        try:
            yield gauge
        finally:
            self._gauges.append(gauge)

    def at_once(self, rng: random.Random) -> None:
        """kill_many(), with a Reaper or with one that it makes."""
        terms = self._draw_terms(rng, one=False)
        with contextlib.ExitStack() as stack:
            count = rng.choice((1, 2, 3, 8))
            made = stack.enter_context(self._made(rng, count, terms))
            given: Any = [self._given(rng, s, stack) for s in made]
            begun = time.monotonic()
            results = mrelease.kill_many(
                given,
                grace=terms.grace,
                timeout=terms.timeout,
                locks=terms.locks,
                reaper=rng.choice((None, self.reaper)),
            )
            took = time.monotonic() - begun
            for s, r in zip(made, results, strict=True):
                s.together = True
                self.judge(s, r, took)
            for s, r in zip(made, results, strict=True):
                self.see_end(s, r)
        with self._lock:
            self.asked += count

    def family(self, rng: random.Random) -> None:
        """A tree or a process group that forks on: none of it is left."""
        as_group = rng.random() < 0.5
        script, forks = rng.choice(FAMILIES)
        with families.Family(script, new_session=as_group) as family:
            if forks:
                family.wait_forks(forks)
            else:
                family.wait_for(3)
            kill = mrelease.kill_group if as_group else mrelease.kill_tree
            grace = rng.choice(GRACES)
            begun = time.monotonic()
            results = kill(
                family.pid,
                grace=grace,
                timeout=2.0,
                reaper=rng.choice((None, self.reaper)),
            )
            took = time.monotonic() - begun
            self.add_time(f"{kill.__name__}()", took)
            if took > grace + 2.0 + self.late:
                self.find(f"{kill.__name__}() took {took:.3f} s")
            left = family.left(PATIENCE)
            if left:
                self.find(f"{kill.__name__}() has left {left}", ALIVE)
            for r in results:
                if r.freed and r.exited is None and family_holds(r.pid):
                    self.find(f"freed, but it holds memory: {r!r}", FREED)
                if r.outcome in (
                    Outcome.ALIVE,
                    Outcome.DENIED,
                    Outcome.UNSUPPORTED,
                    Outcome.DUMPING,
                ):
                    self.find(f"that cannot be: {r!r}")
                with self._lock:
                    self.outcomes["family", r.outcome.value] += 1
            with self._lock:
                self.asked += len(results)
                self.fallen += len(results)

    def in_a_cgroup(self, rng: random.Random) -> None:
        """All of a control group, by kill_cgroup()."""
        terms = Terms(
            timeout=rng.choice((0.5, 1.0, 2.0)),
            locks=rng.choice(("protect", "ignore")),
        )
        with contextlib.ExitStack() as stack:
            gauge = stack.enter_context(self._gauge())
            if gauge is None:
                return
            base = gauge.usage()
            count = rng.choice((1, 2, 4))
            made = stack.enter_context(
                self._made(rng, count, terms, gauge, ORDINARY)
            )
            private = sum(s.mib for s in made) * MIB
            threads = sum(s.threads() for s in made)
            base = max(base, gauge.usage() - private)
            begun = time.monotonic()
            result = mrelease.kill_cgroup(
                gauge.path,
                timeout=terms.timeout,
                locks=terms.locks,
                reaper=rng.choice((None, self.reaper)),
            )
            usage = gauge.usage()
            took = time.monotonic() - begun
            self.add_time("kill_cgroup()", took)
            self.weigh(result, usage - base, private, threads, gauge)
            by_pid = {r.pid: r for r in result.releases}
            if by_pid.keys() != {s.pid for s in made}:
                self.find(f"not those that were in it: {result!r}", WRONG)
            if not result.populated and not all(
                s.victim.ended() for s in made
            ):
                self.find(f"empty, but not all have ended: {result!r}")
            for s in made:
                s.together = True
                if s.pid in by_pid:
                    self.judge(s, by_pid[s.pid], took)
                self.see_end(s, by_pid.get(s.pid))
        with self._lock:
            self.asked += count

    def hogged(self, _rng: random.Random) -> None:
        """Under memory pressure, something takes all that is left."""
        if self.left is None or not self._hogging.acquire(blocking=False):
            return
        try:
            with self._gauge() as gauge:
                if gauge is not None:
                    self._hog(gauge)
        finally:
            self._hogging.release()
        with self._lock:
            self.asked += 1
            self.fallen += 1

    def _hog(self, gauge: Gauge) -> None:
        meminfo = pressure.Meminfo()
        cpus = len(os.sched_getaffinity(0))
        with pressure.Grower(
            Path(self._folder), gauge, 4096, cpus, idle=False
        ) as hog:
            fd = os.open(hog.start, os.O_WRONLY)
            os.write(fd, bytes(cpus))
            os.close(fd)
            end = time.monotonic() + 20
            while sum(meminfo.look()) > HOG_AT and time.monotonic() < end:
                time.sleep(0.001)
            begun = time.monotonic()
            result = self.reaper.kill(hog.pid, timeout=PATIENCE).result()
            self.add_time("hog: call to result", time.monotonic() - begun)
            if not hog.victim.ended(PATIENCE):
                self.find(f"alive after {PATIENCE} s: hog {hog.pid}", ALIVE)
            with self._lock:
                self.outcomes["hog", result.outcome.value] += 1
        meminfo.close()

    def add_time(self, step: str, seconds: float) -> None:
        with self._lock:
            self.times.add(step, seconds)

    def count_done(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.done[what] += times

    # -- all of it

    def _blow(self, rng: random.Random, enough: int, end: float) -> None:
        ways: dict[Callable[[random.Random], None], float] = {
            self.waited_for: 45,
            self.awaited: 20,
            self.dropped: 12,
            self.forked: 6,
            self.with_an_own_reaper: 6,
            self.reused: 8,
            self.metered: 14,
            self.at_once: 8,
            self.in_a_cgroup: 6,
            self.family: 3,
            self.hogged: 0 if self.left is None else 6,
        }
        while not self._stop.is_set():
            if self.fallen >= enough and time.monotonic() >= end:
                return
            [way] = rng.choices(list(ways), list(ways.values()))
            try:
                way(rng)
            except Exception:  # noqa: BLE001 - it is what is looked for
                self.find(f"{way.__name__}:\n{traceback.format_exc()}", ERROR)
            self.count_done(way.__name__)

    def _run(self, name: str, enough: int, seconds: float) -> None:
        """The four threads, until enough have fallen and time is over."""
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(
                target=self._blow,
                args=(
                    random.Random(f"{self.seed} {name} {i}"),
                    enough,
                    end,
                ),
                name=f"soak {i}",
                daemon=True,
            )
            for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        told = time.monotonic()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.1)
                if time.monotonic() > told + 30:
                    told = time.monotonic()
                    self.say(
                        f"{self.fallen} victims, {self.wrong.total()} false"
                    )
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self.wrong.total() < MOST_WRONG:
            self._stop.clear()

    def run(self) -> None:
        """Raises KeyboardInterrupt; all is cleared away then, too."""
        with self._clear, tempfile.TemporaryDirectory() as folder:
            self._folder = folder
            self._others = self._clear.enter_context(ThreadPoolExecutor(4))
            self._clear.callback(victims.close_all)
            self._clear.callback(self._close_bystanders)
            barrier = threading.Barrier(5)
            for _ in range(4):  # all its threads, now
                self._others.submit(barrier.wait)
            barrier.wait()
            for _ in range(BYSTANDERS // 2):
                self._add_bystander()
            with contextlib.suppress(Unavailable):
                for _ in range(2 * THREADS):
                    gauge = self._clear.enter_context(Gauge())
                    self._gauges.append(gauge)
            if self.left is not None:
                self._ballast(self.left)
            busy = [
                self._clear.enter_context(victims.Process(spin=True))
                for _ in range(self.busy)
            ]
            kills = pressure.vmstat("oom_kill ")
            before = self._take_stock()
            self.reaper = mrelease.Reaper()
            self.say(str(self.reaper.scheduling))
            self._clear.callback(self._close_reaper)
            self._run("warm-up", self.warm_up, 0)
            while len(self.bystanders) < BYSTANDERS:
                self._add_bystander()
            warm = self._take_stock()
            self.say(f"warm after {self.fallen} victims: {warm}")
            begun = self.fallen
            self._run("soak", self.count, self.lasts)
            gone = self.fallen - begun
            over = self._take_stock()
            self.say(f"after {gone} more: {over}")
            self._compare(warm, over, gone)
            if not self.reaper.close(PATIENCE):
                self.find("the Reaper does not end", ERROR)
            del self.reaper  # it keeps its fds until then
            closed = self._take_stock()
            self.say(f"without the Reaper: {closed}; before it: {before}")
            if closed.threads > before.threads:
                self.find(
                    f"threads: {before.threads} became {closed.threads}", LEFT
                )
            if closed.children > before.children:
                self.find(
                    f"children: {before.children} became {closed.children}",
                    LEFT,
                )
            if closed.fds > before.fds:
                self.find(f"fds: {before.fds} became {closed.fds}", LEFT)
            for bystander in self.bystanders:
                harm = bystander.harm()
                if harm is not None:
                    self.find(harm, WRONG)
            for process in busy:
                if process.ended():
                    self.find(f"busy process {process.pid} is dead", WRONG)
            if self.asked != self.fallen:
                self.find(
                    f"{self.asked} were killed, {self.fallen} are dead", ALIVE
                )
            kills = pressure.vmstat("oom_kill ") - kills
            if self.left is not None:  # else the machine is others', too
                for _ in range(kills):
                    self.find("the kernel's OOM killer had to kill", OOM)

    def _ballast(self, left: int) -> None:
        """Take all memory but so many MiB."""
        available, swap = pressure.Meminfo().look()
        ballast = available // MIB - left
        pressure.take(self._clear, ballast)
        self.say(
            f"a ballast of {ballast} MiB leaves {left} MiB; "
            f"{swap // MIB} MiB of swap"
        )

    def _take_stock(self) -> Stock:
        """Without what is kept for the next victim, and the bystanders."""
        victims.close_all()
        stock = take_stock()
        own = len(self.bystanders)
        return stock._replace(
            fds=stock.fds - FDS_OF_A_VICTIM * own,
            children=stock.children - own,
        )

    def _compare(self, warm: Stock, over: Stock, gone: int) -> None:
        if over.fds > warm.fds:
            self.find(f"fds: {warm.fds} became {over.fds}", LEFT)
        if over.children > warm.children:
            self.find(
                f"children: {warm.children} became {over.children}", LEFT
            )
        if over.threads > warm.threads:
            self.find(f"threads: {warm.threads} became {over.threads}", LEFT)
        if over.heap > warm.heap + 64 * gone + MIB:
            self.find(f"C heap: {warm.heap} became {over.heap}", LEFT)
        # With 3.12 each part of a path that pathlib took apart (here, of one
        # in /proc) is there for ever: interned strings are immortal.
        each = 8 if sys.version_info[:2] == (3, 12) else 1
        if over.blocks > warm.blocks + each * gone + 2000:
            self.find(
                f"Python's blocks: {warm.blocks} became {over.blocks}", LEFT
            )
        if over.rss > warm.rss + 8 * MIB:
            self.find(f"resident: {warm.rss} became {over.rss}", LEFT)

    def _close_reaper(self) -> None:
        if hasattr(self, "reaper"):
            self.reaper.close()

    def _close_bystanders(self) -> None:
        for bystander in self.bystanders:
            bystander.process.close()

    def tell(self) -> None:
        """All figures."""
        self.say(f"\n{self.fallen} victims fell, by kind and outcome:")
        names = [o.value for o in Outcome]
        seen = [n for n in names if any(o == n for _, o in self.outcomes)]
        self.say("  " + " " * 18 + "".join(f"{n:>11}" for n in seen))
        for kind in (*self._kinds, "family", "hog"):
            cells = (f"{self.outcomes[kind, n] or '-':>11}" for n in seen)
            self.say(f"  {kind:<18}{''.join(cells)}")
        left = [kind for kind in KINDS if kind not in self._kinds]
        if left:
            self.say(f"  not to be had here: {', '.join(left)}")
        self.say("\ndone:")
        for what, times in sorted(self.done.items()):
            self.say(f"  {what:<44} {times:>6}")
        self.say(f"\n  {'ms':<44} {'count':>6} {'median':>9} "
                 f"{'99 %':>9} {'slowest':>9}")  # fmt: skip
        for row in self.times.rows():
            self.say(row)
        self.say("\nrare, and allowed:")
        for what, times in sorted(self.notes.items()):
            self.say(f"  {what:<64} {times:>6}")
        self.say(
            f"\n{self.asked} kills asked for, {self.fallen} victims dead, "
            f"{len(self.bystanders)} bystanders, {self.busy} busy processes; "
            "to be 0:"
        )
        for kind in INVARIANTS:
            if kind == OOM and self.left is None:
                continue
            count = self.wrong[kind]
            verdict = "FAILED" if count else "ok"
            self.say(f"  {kind:<44} {count:>6}  {verdict}")

    def report(self) -> pressure.Numbers:
        """The figures, by name."""
        told: pressure.Numbers = {
            "kills_asked": self.asked,
            "victims_dead": self.fallen,
            "bystanders": len(self.bystanders),
            "busy": self.busy,
            "left_mib": -1 if self.left is None else self.left,
            "pids_reused": self.done["pid reused"],
            "false_results": self.wrong[RESULT],
            "false_freed": self.wrong[FREED],
            "alive": self.wrong[ALIVE],
            "wrong_kills": self.wrong[WRONG],
            "leaks": self.wrong[LEFT],
            "errors": self.wrong[ERROR],
            "oom_kills": self.wrong[OOM],
            "freed_metered": self.done["freed, by the memory control group"],
        }
        for (_, outcome), count in self.outcomes.items():
            name = f"outcome_{outcome}"
            told[name] = told.get(name, 0) + count
        told |= self.times.slowest()
        return told


FAMILIES = (
    # What it does, and after how many forks it is killed; 0: 3 are there.
    ("child() or child()\nrest()", 0),
    ("child()\nchild()\nrest()", 0),
    (families.storm(30), 5),
    (families.storm(30, pause=0.02), 2),
)


def family_holds(pid: int) -> bool:
    """It has more private memory than a page table's worth."""
    try:
        status = victims.status_of(pid)
    except ProcessLookupError:
        return False
    return int(status.get("RssAnon", "0 kB").split()[0]) * 1024 >= MIB


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _kill_too(s: Subject, who: str, pause: float) -> None:
    """The victim is not waited for before this is done."""
    time.sleep(pause)
    match who:
        case "os.kill":
            os.kill(s.pid, signal.SIGKILL)
        case "pidfd":
            signal.pidfd_send_signal(s.victim.pidfd, signal.SIGKILL)
        case "mrelease":
            mrelease.kill(s.pid, timeout=0.1)
        case _:
            mrelease.kill(s.pid, timeout=0.1, locks="ignore")


def _write_after(fd: int, seconds: float) -> None:
    time.sleep(seconds)
    os.eventfd_write(fd, 1)
    os.close(fd)


def in_child(
    reaper: Reaper, reapings: Sequence[Reaping], kills: Sequence[int]
) -> list[str]:
    """What is not as it should be in a forked child."""
    signal.alarm(30)  # a lock that was held at the fork would hang here
    wrong = []
    for pid in kills:
        os.kill(pid, signal.SIGKILL)
    if not reaper.closed:
        wrong.append("the Reaper is open")
    for name, function in (
        ("kill", lambda: reaper.kill(os.getppid())),
        ("kill_many", lambda: reaper.kill_many([os.getppid()])),
    ):
        try:
            function()
        except ValueError as error:
            if "fork" not in str(error):
                wrong.append(f"{name} says {error}")
        else:
            wrong.append(f"{name} was taken")
    for reaping in reapings:
        done = reaping.done()
        try:
            reaping.result(0)
        except ValueError:
            if done:
                wrong.append(f"{reaping!r} is done, without a result")
        except TimeoutError:
            wrong.append(f"{reaping!r} is waited for")
    if not reaper.close(0):
        wrong.append("close() waits")
    signal.alarm(0)
    return wrong


# ------------------------------------------------------------------ to run


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def in_machine(asked: argparse.Namespace, seed: int) -> int:
    """All of it in a machine, with memory pressure."""
    program = [__file__, "--inside", "--seed", str(seed)]
    for name in ("minutes", "victims", "busy", "left"):
        program += [f"--{name}", str(getattr(asked, name))]
    begun = time.monotonic()
    code, told = pressure.run_in_machine(
        program, asked.kernel, "2G", "256M", asked.minutes * 60 * 3 + 300
    )
    told["took_s"] = round(time.monotonic() - begun)
    told["exit_code"] = code
    report.write("soak-machine", told, asked.json)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Kill many victims in many ways, and check every result."
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="it lasts so long")
    add("--victims", type=int, default=0, help="and at least so many fall")
    add("--seed", type=int, help="to draw the same once more")
    add(
        "--busy",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that keep CPUs busy; one for each",
    )
    add("--json", metavar="FILE", type=Path, help="write the figures there")
    add("--machine", action="store_true", help="in QEMU, memory is short")
    add("--left", type=int, default=300, help="MiB that are left there")
    add("--kernel", default="trixie", help="of this Debian suite")
    add("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    seed = random.randrange(10**6) if asked.seed is None else asked.seed
    if asked.machine:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return in_machine(asked, seed)
        except KeyboardInterrupt:
            print("interrupted: its report went with the machine")
            return 130
    if asked.inside:
        if os.environ.get("MRELEASE_TEST_DISPOSABLE") != "1":
            sys.exit("this takes all memory of a machine")
        pressure.move_to_disk()
        # Less likely than a hog, if the kernel has to choose.
        pressure.set_oom_score(os.getpid(), -500)
    # Whatever hangs: it ends, and victims and guards see the end of Python.
    faulthandler.dump_traceback_later(asked.minutes * 60 * 3 + 300, exit=True)
    signal.signal(signal.SIGTERM, _interrupt)
    print(
        f"seed {seed}: {asked.minutes:g} minutes, at least {asked.victims} "
        f"victims, {THREADS} threads, Linux {platform.release()}",
        flush=True,
    )
    begun = time.monotonic()
    soak = Soak(
        asked.minutes,
        asked.victims,
        seed,
        lambda line: print(line, flush=True),
        busy=asked.busy,
        left=asked.left if asked.inside else None,
    )
    interrupted = False
    try:
        soak.run()
    except KeyboardInterrupt:
        interrupted = True
    soak.tell()
    faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - begun
    false = soak.wrong.total()
    figures: pressure.Numbers = {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "seed": seed,
        "minutes": round(took / 60, 1),
        "interrupted": int(interrupted),
        "false": false,
        **soak.report(),
    }
    if asked.inside:
        print(f"{pressure.MARK}{json.dumps(figures)}", flush=True)
    else:
        report.write("soak", figures, asked.json)
    fallen = soak.fallen
    print(f"\nseed {seed}: {fallen} victims in {took:.0f} s, {false} false")
    if interrupted:
        print("interrupted")
    return 1 if false else 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
