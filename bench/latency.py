"""How soon SIGKILL leaves: `make bench-latency`.

From the first line of .kill() to SIGKILL, and until the release has been
entered and has succeeded, for many kills of small victims: the killing
process alone, with 8 busy threads of Python in it, and beside two busy
processes for each CPU. Compared are the Reaper, mrelease.kill() in the
calling thread, and what one writes without them: a Python thread with a
queue that sends the signal and calls process_mrelease(2) by ctypes.
"""

from __future__ import annotations

import threading
import time
from time import monotonic_ns
from typing import TYPE_CHECKING, NamedTuple

import common
import mrelease
from cgroups import Unavailable
from common import (
    Load,
    Run,
    User,
    Zygote,
    in_turns,
    in_us,
    quantile,
    users,
)
from ways import Helper, Shot, Worker, new_reaper, of_reaping, of_release

if TYPE_CHECKING:
    from collections.abc import Callable

    from ways import Handler, Maker, Policy

PAUSE = 0.0005
"""Seconds between two kills, so that the killer has slept before each."""
BUSY_THREADS = 8
MIB = 1


# ------------------------------------------------------- in the helper


class _Busy:
    """Threads that compete for the GIL, while it is open."""

    def __init__(self, count: int) -> None:
        self._going = True
        self._threads = [
            threading.Thread(target=self._run, daemon=True)
            for _ in range(count)
        ]

    def _run(self) -> None:
        n = 0
        while self._going:
            n += 1

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()


def _handler(kill: Callable[[int], Shot]) -> Handler:
    """Kills some, one after the other, beside so many busy threads."""

    def handle(question: tuple[list[int], int]) -> list[Shot]:
        pids, busy = question
        shots = []
        with _Busy(busy):
            for pid in pids:
                time.sleep(PAUSE)
                shots.append(kill(pid))
        return shots

    return handle


def _make_reaper(policy: Policy) -> Maker:
    def make() -> tuple[Handler, str]:
        reaper = new_reaper(policy)

        def kill(pid: int) -> Shot:
            begun = monotonic_ns()
            reaping = reaper.kill(pid)
            return of_reaping(reaping, begun)

        return _handler(kill), str(reaper.scheduling)

    return make


def _make_kill() -> tuple[Handler, str]:
    def kill(pid: int) -> Shot:
        begun = monotonic_ns()
        return of_release(mrelease.kill(pid), begun)

    return _handler(kill), "in the calling thread"


def _make_worker() -> tuple[Handler, str]:
    worker = Worker()
    return _handler(worker.kill), worker.said


class Way(NamedTuple):
    text: str
    make: Maker
    privileged: bool = False


WAYS = {
    "thread": Way("thread and queue", _make_worker),
    "kill": Way("mrelease.kill()", _make_kill),
    "reaper": Way("Reaper, policy none", _make_reaper("none")),
    "reaper-fifo": Way(
        "Reaper, policy fifo", _make_reaper("fifo"), privileged=True
    ),
}
OURS = ("reaper", "reaper-fifo")


# ------------------------------------------------------- the benchmark


class State(NamedTuple):
    text: str
    threads: int = 0
    load: bool = False


STATES = {
    "alone": State("alone"),
    "threads": State(f"{BUSY_THREADS} busy threads", threads=BUSY_THREADS),
    "load": State("2 x CPUs busy processes", load=True),
}


class Job(NamedTuple):
    state: str
    user: User
    way: str


class Bench:
    def __init__(
        self,
        helpers: dict[tuple[User, str], Helper],
        zygotes: dict[User, Zygote],
        load: Load,
        batch: int,
    ) -> None:
        self.shots: dict[Job, list[Shot]] = {}
        self._helpers = helpers
        self._zygotes = zygotes
        self._load = load
        self._batch = batch

    def do(self, jobs: list[Job]) -> None:
        for job in jobs:
            state = STATES[job.state]
            zygote = self._zygotes[job.user]
            self._load.switch(False)
            pids = zygote.make(self._batch)
            try:
                self._load.switch(state.load)
                helper = self._helpers[job.user, job.way]
                answer = helper.ask((pids, state.threads))
                shots = [Shot(*values) for values in answer]
            finally:
                self._load.switch(False)
                zygote.reap()
            self.shots.setdefault(job, []).extend(shots)


def known(shots: list[Shot], name: str) -> list[float]:
    values = [getattr(shot, name) for shot in shots]
    return [value for value in values if value is not None]


def tell(run: Run, shots: dict[Job, list[Shot]], jobs: list[Job]) -> None:
    for name, title in (
        ("signalled", "From the first line of the kill to SIGKILL, in us"),
        ("entered", "... until the release enters the kernel, where known"),
        ("released", "... until the release has succeeded, if it has"),
    ):
        rows = []
        for job in jobs:
            values = known(shots.get(job, []), name)
            if not values:
                continue
            rows.append([
                STATES[job.state].text, job.user.name, WAYS[job.way].text,
                str(len(values)),
                *(in_us(quantile(values, q))
                  for q in (0.25, 0.5, 0.75, 0.99, 0.999, 1.0)),
            ])  # fmt: skip
        if rows:
            common.table(
                title,
                ("killer", "as", "way", "n", "p25", "p50", "p75", "p99",
                 "p99.9", "most"),
                rows,
            )  # fmt: skip
    print(
        f"Victims of {MIB} MiB, asleep; each kill ended before the next, and "
        f"{PAUSE * 1e3:g} ms between two."
    )
    late = [
        [STATES[job.state].text, job.user.name, WAYS[job.way].text,
         f"{sum(shot.late for shot in shots[job]) / len(shots[job]):.2%}"]
        for job in jobs if job in shots
    ]  # fmt: skip
    common.table("Too late", ("killer", "as", "way", "share"), late)
    for job, some in shots.items():
        run.row(
            state=job.state, user=job.user.name, way=job.way, n=len(some),
            late=sum(shot.late for shot in some) / len(some),
            signalled={
                name: quantile(known(some, "signalled"), q)
                for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))
            },
            shots=some,
        )  # fmt: skip
    _tell_aims(shots, jobs)


def _tell_aims(shots: dict[Job, list[Shot]], jobs: list[Job]) -> None:
    rows = []
    for job in jobs:
        if job.way not in OURS or job not in shots:
            continue
        other = shots.get(job._replace(way="thread"))
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
            value = quantile(known(shots[job], "signalled"), share)
            if other is None:
                continue
            base = quantile(known(other, "signalled"), share)
            state = STATES[job.state].text
            rows.append([
                f"{WAYS[job.way].text}, {state}, as {job.user.name}", name,
                f"{in_us(value)} us", f"{in_us(base)} us",
                "faster" if value < base else "MISSED",
            ])  # fmt: skip
    if rows:
        common.table(
            "Aim: SIGKILL leaves sooner than from a thread with a queue",
            ("what", "of", "Reaper", "thread", ""),
            rows,
        )


def main() -> None:
    parser = common.make_parser(__doc__ or "")
    parser.add_argument(
        "--n", type=int, help="kills of each kind (default: 10000; quick: 100)"
    )
    parser.add_argument(
        "--batch", type=int, help="kills in a row (default: 50; quick: 20)"
    )
    for name, names in (("ways", tuple(WAYS)), ("states", tuple(STATES))):
        parser.add_argument(
            f"--{name}", type=common.words(names), metavar="LIST",
            default=",".join(names),
        )  # fmt: skip
    args = parser.parse_args()
    count = args.n or (100 if args.quick else 10000)
    batch = min(args.batch or (20 if args.quick else 50), count)
    with Run("latency", args) as run:
        helpers: dict[tuple[User, str], Helper] = {}
        zygotes: dict[User, Zygote] = {}
        for user in users(args.users):
            for way in args.ways:
                if WAYS[way].privileged and not user.privileged:
                    continue
                try:
                    helper = Helper(WAYS[way].make, user)
                except Unavailable as why:
                    print(f"{WAYS[way].text} as {user.name}: left out: {why}")
                    continue
                run.stack.callback(helper.close)
                helpers[user, way] = helper
                run.note(f"{WAYS[way].text} as {user.name}", helper.said)
        for user in users(args.users):
            zygotes[user] = Zygote(MIB, user=user)
            run.stack.callback(zygotes[user].close)
        load = Load(run.cpus)
        run.stack.callback(load.close)
        jobs = [
            Job(state, user, way)
            for state in args.states
            for user, way in helpers
        ]
        turns = -(-count // batch)
        print(
            f"{turns * batch} kills of each of {len(jobs)} kinds, "
            f"interleaved in batches of {batch}."
        )
        bench = Bench(helpers, zygotes, load, batch)
        in_turns(jobs, lambda _: turns, bench.do)
        tell(run, bench.shots, jobs)


if __name__ == "__main__":
    main()
