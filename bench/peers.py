"""What else kills, side by side: `make bench-peers`.

How long until 5 % of the victim's memory are left in its memory cgroup, for
victims of some kinds. Compared are what one has without the package: os.kill
and waitid; glibc's process_mrelease by ctypes, also in a thread with a
queue; the programs pkill -m, earlyoom and nohang, as Debian builds and
configures them (get_peers.py fetches them); then mrelease.kill(), the Reaper,
and the limit: a process that unmaps as much memory of its own.

Each program kills in a pid namespace of its own, in which there are only the
first process, itself and the victim. This is made sure of each time before
it is started or let run. earlyoom and nohang choose their victim themselves:
they are stopped until there is one, and are told, by a /proc/meminfo that
only they see, that the memory is short.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING

import common
import get_peers
from cgroups import Unavailable
from common import (
    BACK,
    Run,
    Spread,
    User,
    in_turns,
    size_text,
    table,
    users,
)
from debian import Unreachable
from measure import (
    KINDS,
    LIMITS,
    Bench,
    Found,
    Job,
    available,
    make_parser,
    tell_ratios,
    tell_times,
)
from namespaces import PidNamespace
from tracing import Tracer
from victims import wait_until
from ways import WAYS, Shot, Side, outcome_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import victims
    from get_peers import Peer
    from tracing import Event

VICTIMS = ("asleep", "8", "64", "spinning", "starved", "d", "frozen", "shared")
TEXTS = {
    "os-kill": "os.kill of a child, and waitid: SIGKILL alone",
    "ctypes": WAYS["ctypes"].text,
    "thread": WAYS["thread"].text,
    "pkill": "pkill -m, started for each kill",
    "earlyoom": "earlyoom, which chooses and releases",
    "nohang": "nohang, which chooses, and does not release",
    "kill": WAYS["kill"].text,
    "reaper-auto": WAYS["reaper-auto"].text,
}
UNKNOWN = "not known"
ALONE = ("os-kill", "nohang")
"""They send SIGKILL and release nothing."""
REST = 0.3
"""Seconds in which a daemon finds that there is nobody left."""
LONGEST_SLEEP = 1.2
"""Seconds after which all its sleeps are over, when it is let run again."""


class _OsKill:
    """As one has it without anything."""

    said = "by the victim's parent"

    def __init__(self) -> None:
        self.patience = 1.0

    def shoot(self, pid: int) -> Shot:
        pidfd = os.pidfd_open(pid)
        try:
            begun = monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            # waitid() has no timeout: a victim may never end.
            if select.select([pidfd], [], [], self.patience)[0]:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        finally:
            os.close(pidfd)
        return Shot(begun, 0.0, None, None, "signalled", None, 0, None)

    def close(self) -> None:
        pass


class _Traced:
    """One that tells SIGKILL as the trace does, like the programs."""

    def __init__(self, side: Side, tracer: Tracer) -> None:
        self.said = side.said
        self.side = side
        self._tracer = tracer

    def shoot(self, pid: int) -> Shot:
        self._tracer.look()  # past what was before
        shot = self.side.shoot(pid)
        for event in self._tracer.look():
            if event.what == "kill" and event.value == pid:
                sent = (event.when - shot.begun) / 1e9
                return shot._replace(signalled=sent)
        return shot

    def close(self) -> None:
        self.side.close()


class _Memory:
    """A meminfo for a daemon, by which memory is short, or just is not.

    Both act below 5 % at the latest, and at 11 % sleep for as short as they
    ever do, but for a second or less.
    """

    ENOUGH = 11
    SHORT = 1

    def __init__(self, name: str) -> None:
        self.path = common.folder() / f"{name}.meminfo"
        self.path.touch()
        self.tell(self.ENOUGH)

    def tell(self, percent: int) -> None:
        lines = []
        total = 0
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split()[:2]
            if name == "MemTotal:":
                total = int(value)
            share = {
                "MemFree:": percent, "MemAvailable:": percent,
                "AnonPages:": 99 - percent, "SwapFree:": 0,
            }.get(name)  # fmt: skip
            lines.append(
                line if share is None
                else f"{name:15} {total * share // 100:8} kB"
            )  # fmt: skip
        # The same file: it is mounted, and may be open.
        with self.path.open("r+") as file:
            file.write("\n".join(lines) + "\n")
            file.truncate()


class Program:
    """A program that kills, in a namespace of its own."""

    def __init__(
        self, peer: Peer, options: Sequence[str], tracer: Tracer | None
    ) -> None:
        self.peer = peer
        self.patience = 1.0
        """Seconds for one kill."""
        nice = f", nice {peer.nice}" if peer.nice else ""
        command = " ".join([peer.name, *options])
        command = command.replace(str(peer.tree), "")  # as it is in Debian
        self.said = f"{peer.said}: {command}{nice}"
        self.memory = _Memory(peer.name)
        self.inside = PidNamespace({"/proc/meminfo": self.memory.path})
        self._options = options
        self._tracer = tracer
        self._log = common.folder() / f"{peer.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return self.inside.start(
                [*self.peer.argv, *self._options],
                nice=self.peer.nice,
                stdin=subprocess.DEVNULL,
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
            )

    def trouble(self, what: str) -> RuntimeError:
        said = self._log.read_text(errors="replace")[-2000:]
        return RuntimeError(f"{self.peer.name} {what}:\n{said}")

    def prepare(self) -> None:
        """Before a victim is made."""

    def rest(self) -> None:
        """When there is no victim any more."""

    def begin(self, victim: int) -> tuple[int, int]:
        """Make it kill: when that was, and the pid of the killer."""
        raise NotImplementedError

    def over(self) -> bool:
        """It will do nothing more."""
        return False

    def shoot(self, pid: int) -> Shot:
        events: list[Event] = []
        pidfd = os.pidfd_open(pid)
        try:
            self._look()  # past what was before
            begun, killer = self.begin(pid)
            until = time.monotonic() + self.patience
            while time.monotonic() < until:
                ended = bool(select.select([pidfd], [], [], 0.001)[0])
                over = self.over()
                events += [e for e in self._look() if e.who == killer]
                if over or any(event.what == "exit" for event in events):
                    break
                if ended and (self._tracer is None or self.peer.name in ALONE):
                    break
            ended = bool(select.select([pidfd], [], [], 0)[0])
        finally:
            os.close(pidfd)
        return self._told(begun, pid, events, ended)

    def _look(self) -> list[Event]:
        return self._tracer.look() if self._tracer is not None else []

    def _told(
        self, begun: int, pid: int, events: list[Event], ended: bool
    ) -> Shot:
        by: dict[str, list[Event]] = {"kill": [], "enter": [], "exit": []}
        for event in events:
            by[event.what].append(event)

        def first(what: str) -> float | None:
            return (by[what][0].when - begun) / 1e9 if by[what] else None

        if any(event.value != pid for event in by["kill"]):
            raise self.trouble(f"killed another than {pid}")
        code = by["exit"][-1].value if by["exit"] else None
        if self._tracer is None:
            outcome = UNKNOWN
        elif not by["kill"]:
            outcome = "not killed"
        elif code is None:
            outcome = "signalled"
        else:
            outcome = outcome_of(code, ended=ended)
        return Shot(
            begun,
            first("kill"),
            first("enter"),
            (by["exit"][-1].when - begun) / 1e9 if code == 0 else None,
            outcome,
            code or None,
            len(by["exit"]),
            None,  # who looks from outside looks too late
        )

    def close(self) -> None:
        self.inside.close()


class Command(Program):
    """Is started for each kill."""

    def __init__(
        self, peer: Peer, options: Sequence[str], tracer: Tracer | None
    ) -> None:
        super().__init__(peer, options, tracer)
        self._popen: subprocess.Popen[bytes] | None = None

    def begin(self, victim: int) -> tuple[int, int]:
        self.inside.only(victim)
        begun = monotonic_ns()
        self._popen = self.start()
        return begun, self._popen.pid

    def over(self) -> bool:
        return self._popen is not None and self._popen.poll() is not None

    def rest(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            if self._popen.wait() not in (0, -signal.SIGKILL):
                raise self.trouble(f"ended with {self._popen.returncode}")
            self._popen = None


class Daemon(Program):
    """Waits, stopped, until there is a victim; then it is let run."""

    def __init__(
        self, peer: Peer, options: Sequence[str], tracer: Tracer | None
    ) -> None:
        super().__init__(peer, options, tracer)
        self._stopped = 0.0
        try:
            self.inside.only(None)
            self._popen = self.start()
            time.sleep(1.0)  # it starts
            self.rest()
        except BaseException:
            self.close()
            raise

    def rest(self) -> None:
        self.memory.tell(self.memory.ENOUGH)
        self._popen.send_signal(signal.SIGCONT)
        time.sleep(REST)
        if self._popen.poll() is not None:
            raise self.trouble(f"ended with {self._popen.returncode}")
        self._popen.send_signal(signal.SIGSTOP)
        wait_until(self._stands, "stopped")
        self._stopped = time.monotonic()
        self.inside.only(None, self._popen.pid)

    def _stands(self) -> bool:
        return all(
            Path(f"/proc/{self._popen.pid}/task/{tid}/stat").read_text()
            .rpartition(")")[2].split()[0] == "T"
            for tid in os.listdir(f"/proc/{self._popen.pid}/task")
        )  # fmt: skip

    def prepare(self) -> None:
        left = self._stopped + LONGEST_SLEEP - time.monotonic()
        if left > 0:
            time.sleep(left)

    def begin(self, victim: int) -> tuple[int, int]:
        self.inside.only(victim, self._popen.pid)
        self.memory.tell(self.memory.SHORT)
        begun = monotonic_ns()
        self._popen.send_signal(signal.SIGCONT)
        return begun, self._popen.pid


def open_side(
    way: str, user: User, cache: Path, tracer: Tracer | None
) -> Side:
    """The one who kills so; Unavailable if it is not to be had."""
    if way == "os-kill" or way in WAYS:
        side = _OsKill() if way == "os-kill" else WAYS[way].open(user)
        return side if tracer is None else _Traced(side, tracer)
    try:
        peer = get_peers.get(way, cache)
    except Unreachable as why:
        raise Unavailable(str(why)) from None
    match way:
        case "pkill":
            # The name of victims.binary().
            options = ["-KILL", "--mrelease", "-x", "victim"]
            return Command(peer, options, tracer)
        case "earlyoom":
            return Daemon(peer, ["-r", "3600"], tracer)  # Debian's default
        case _:
            config = str(peer.tree / "etc/nohang/nohang.conf")
            return Daemon(peer, ["--monitor", "--config", config], tracer)


# ------------------------------------------------------- the benchmark


class Peers(Bench):
    """One after the other kills victims that only it can see."""

    def options(self, way: str) -> victims.Options:
        side = self.sides[way]
        if isinstance(side, Program):
            return {"pid_namespace": side.inside}
        return {}

    def kill(self, job: Job) -> Found:
        side = self.sides[job.way]
        killer = side.side if isinstance(side, _Traced) else side
        if isinstance(killer, Program | _OsKill):
            killer.patience = self.give_up(KINDS[job.kind])
        if not isinstance(side, Program):
            return super().kill(job)
        side.prepare()
        try:
            return super().kill(job)
        finally:
            side.rest()


def since_signal(found: Found) -> float | None:
    """Seconds from SIGKILL; of an unmap, from its start."""
    if found.seconds is None or found.shot is None:
        return found.seconds
    if found.shot.signalled is None:
        return None if found.shot.outcome == "not killed" else found.seconds
    return max(0.0, found.seconds - found.shot.signalled)


LEGEND = """\
SIGKILL is when the kernel's trace saw it sent, of all ways alike. The start
of a decision is the call (os-kill, ctypes, thread, kill, reaper-auto); the
start of the program, with nsenter before it (pkill); the moment at which it
is let run, its sleep being over (earlyoom, nohang): then it reads that the
memory is short, looks at three processes, where a machine has hundreds, and
kills. How long it would have slept before is not in it. That the memory is
short is told by a /proc/meminfo which only they see; all else is as Debian
has it, but that they are root with all rights."""


def tell(run: Run, bench: Peers, jobs: Sequence[Job], traced: bool) -> None:
    found = bench.found
    ways = [*(w for w in TEXTS if any(j.way == w for j in found)),
            *(f"unmap-{t}" for t in LIMITS)]  # fmt: skip
    done = [job for job in jobs if job in found]
    signalled = {
        job: Spread.of(since_signal(one) for one in found[job]) for job in done
    }
    begun = {job: Spread.of(one.seconds for one in found[job]) for job in done}
    left = f"to {BACK:.0%} of the memory left"
    tell_times(
        f"From SIGKILL {left}, in ms: median (quartiles)", signalled, ways
    )
    tell_times(
        f"From the start of the decision {left}, in ms: median (quartiles)",
        begun,
        ways,
    )
    counts = sorted({spread.n for spread in begun.values()})
    if counts:
        print(
            f"{counts[0]} to {counts[-1]} kills each. never: not within "
            f"{bench.give_up(KINDS['asleep']):g} s "
            f"({bench.give_up(KINDS['d']):g} s for D state and frozen)."
        )
    print(LEGEND)
    if not traced:
        print(
            "There was no trace: SIGKILL is what each tells itself; of "
            "pkill, earlyoom and nohang it is\nthe start of the decision, "
            "and what their release came to is not known."
        )
    for way in ways:
        if way in TEXTS:
            print(f"{way}: {TEXTS[way]}.")
    print("unmap-1, unmap-2: munmap of as much, with one and two threads.")
    tell_ratios(
        signalled,
        ways,
        (
            ("Ratio to the Reaper, from SIGKILL", "reaper-auto"),
            ("Ratio to munmap with one thread, from SIGKILL", "unmap-1"),
        ),
    )
    tell_outcomes(found, done, ways)
    for job in done:
        outcomes = [one.shot.outcome for one in found[job] if one.shot]
        run.row(
            **job._asdict(),
            n=begun[job].n,
            give_up=bench.give_up(KINDS.get(job.kind, KINDS["asleep"])),
            median=signalled[job].median,
            quartiles=[signalled[job].low, signalled[job].high],
            begun_median=begun[job].median,
            begun_quartiles=[begun[job].low, begun[job].high],
            outcomes={o: outcomes.count(o) for o in set(outcomes)},
            found=found[job],
        )


def tell_outcomes(
    found: dict[Job, list[Found]], jobs: Sequence[Job], ways: Sequence[str]
) -> None:
    """Print how often a release came too late, and what else went wrong."""
    ways = [way for way in ways if way in TEXTS and way not in ALONE]
    rows: dict[tuple[str, int], dict[str, str]] = {}
    others: dict[tuple[str, str], int] = {}
    for job in jobs:
        shots = [one.shot for one in found[job] if one.shot is not None]
        for shot in shots:
            usual = ("released", "signalled", UNKNOWN)
            if not shot.late and shot.outcome not in usual:
                key = (job.way, shot.outcome)
                others[key] = others.get(key, 0) + 1
        if job.way in ways:
            text = f"{KINDS[job.kind].text}, {size_text(job.mib)}"
            row = rows.setdefault((job.kind, job.mib), {"": text})
            late = sum(shot.late for shot in shots)
            known = [shot for shot in shots if shot.outcome != UNKNOWN]
            row[job.way] = f"{late} of {len(known)}" if known else UNKNOWN
    table(
        "process_mrelease(2) too late: it answered ESRCH, or the victim had "
        "ended before the call",
        ("victim", *ways),
        [[row[""], *(row.get(way, "") for way in ways)]
         for row in rows.values()],
    )  # fmt: skip
    for (way, outcome), count in others.items():
        print(f"{way}: {count} kills came to {outcome!r}.")


def main() -> None:
    parser = make_parser(__doc__ or "", 10, "64,1024", VICTIMS, tuple(TEXTS))
    parser.add_argument(
        "--cache", metavar="FOLDER",
        help="where the programs are kept (default: ~/.cache/mrelease-peers)",
    )  # fmt: skip
    parser.add_argument(
        "--no-trace", action="store_true",
        help="do not have the kernel trace what the programs do",
    )  # fmt: skip
    args = parser.parse_args()
    cache = Path(args.cache) if args.cache else get_peers.default_cache()
    quick = args.quick
    count = args.n or (2 if quick else 10)
    slow = args.n_slow or (1 if quick else 3)
    sizes = args.sizes or ([64] if quick else [64, 1024])
    give_up = args.give_up or (3.0 if quick else 15.0)
    (user, *others) = users(args.users)
    if others or user.uid is not None:
        parser.error("all kill as whoever runs this: --users root")
    with Run("peers", args) as run:
        tracer = None
        if not args.no_trace:
            try:
                tracer = Tracer()
                run.stack.callback(tracer.close)
            except Unavailable as why:
                print(why)
        sides: dict[str, Side] = {}
        for way in args.ways:
            try:
                sides[way] = open_side(way, user, cache, tracer)
            except Unavailable as why:
                print(f"{way}: left out: {why}")
                continue
            run.stack.callback(sides[way].close)
            run.note(way, sides[way].said)
        try:
            bench = Peers(run, sides, user, give_up)
        except Unavailable as why:
            raise SystemExit(
                f"no memory cgroup to measure with: {why}"
            ) from None
        run.note("watch", f"{bench.watcher.scheduling}, version "
                 f"{bench.meter.version} memory cgroup")  # fmt: skip
        jobs = [
            Job(name, mib, way)
            for name in args.victims
            if available(name)
            for mib in sizes
            for way in sides
        ]
        jobs += [
            Job("unmap", mib, f"unmap-{threads}")
            for mib in sizes
            for threads in LIMITS
        ]

        def turns(job: Job) -> int:
            if job.way in ALONE and not KINDS[job.kind].patient:
                return min(slow, count)
            return count

        print(
            f"{count} kills of each of {len(jobs)} kinds, interleaved; "
            f"pid {os.getpid()}."
        )
        in_turns(jobs, turns, bench.do)
        tell(run, bench, jobs, tracer is not None)


if __name__ == "__main__":
    main()
