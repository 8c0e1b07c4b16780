"""Show what it is worth: two starved processes killed, one with mrelease.

Each victim is a real process with a lot of touched private memory that hardly
gets to run: SCHED_IDLE and nice 19, beside two busy processes for each CPU.
That is how a process often stands when a machine is short of everything.  One
is sent SIGKILL alone, the other is killed by mrelease.kill(); measured is how
long it takes until the memory is back, by a memory cgroup of their own where
one can be made.

Nothing outlives the demo: all it starts ends with it, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from errno import EPIPE
from time import monotonic_ns

from mrelease.footprint import in_units
from mrelease.killing import kill
from mrelease.meter import Meter, Watch, open_meter, room
from mrelease.support import Support, support
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mrelease.release import Release

_MIB = 1 << 20
_LARGEST = 1024 * _MIB
_SMALLEST = 16 * _MIB

# All children are plain Python without site: `python -I -S -c`.  Each waits
# for a line first, until it is in its group, and ends when its input does,
# which is when the demo ends, however it ends.

# Looks up every few milliseconds of its CPU time.  One program that forks,
# since hundreds of CPUs would take hundreds of interpreters to start.
_BUSY = """\
import os, sys
os.read(0, 1) or sys.exit()
first, count = os.getpid(), 1
for _ in range(int(sys.argv[1]) - 1):
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        break
    count += 1
if os.getpid() == first:
    print("ready", count, flush=True)
os.set_blocking(0, False)
while True:
    for _ in range(50000):
        pass
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
while os.getpid() == first:
    try:
        os.wait()
    except ChildProcessError:
        break
"""

# Small pages, since huge ones are taken down so fast that there is little to
# see.  Should memory run out all the same, this is the one to be killed.
_VICTIM = """\
import mmap, os, sys
os.read(0, 1) or sys.exit()
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except OSError:
    pass
try:
    memory = mmap.mmap(
        -1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except (AttributeError, OSError):
        pass
    piece = b"m" * (1 << 20)
    for _ in range(len(memory) // len(piece)):
        memory.write(piece)
except (MemoryError, OSError) as error:
    print("error", error, flush=True)
else:
    print("ready", flush=True)
    os.read(0, 1)
"""


class Impossible(Exception):
    """The demo cannot be shown here; the text says why."""


class _Child:
    """A Python program that ends when its input does."""

    def __init__(self, what: str, program: str, argument: int) -> None:
        self._what = what
        if not sys.executable:
            raise Impossible("this Python does not know its own program")
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program, str(argument)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # At Ctrl-C each would print a traceback.
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise Impossible(f"{what} cannot be started: {error}") from None
        self.pid = self._popen.pid

    def go(self) -> list[str]:
        """Let it begin, and wait until it is ready; what it said."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(b"\n")
            self._popen.stdin.flush()
        if not select.select([self._popen.stdout], [], [], 120)[0]:
            raise Impossible(f"{self._what} is not ready after 120 s")
        word, _, rest = self._popen.stdout.readline().decode().partition(" ")
        if word.strip() != "ready":
            why = rest.strip() or "it ended at once"
            raise Impossible(f"{self._what} cannot be made: {why}")
        return rest.split()

    def close_input(self) -> None:
        assert self._popen.stdin is not None
        # A byte that was never read may be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()

    def end(self) -> None:
        """See to it that it ends, and wait for that, 10 s at most."""
        assert self._popen.stdout is not None
        self.close_input()
        self._popen.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(10)
            return
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(10)

    def kill(self) -> None:
        """Send SIGKILL, if it has not been waited for."""
        self._popen.kill()


class _Stage:
    """The meter, the busy processes and the victims; all end with it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cpus = len(os.sched_getaffinity(0))
        self.starved_by = ""
        self._victims: list[_Child] = []
        self._meter: Meter | None = None
        wanted = 2 * self.cpus
        self._busy = _Child("busy process", _BUSY, wanted)
        try:
            self.meter, self.why_not_better = open_meter(self._busy.pid)
            self._meter = self.meter
            self.busy = int(self._busy.go()[0])
        except BaseException:
            self.close()
            raise

    def victim(self) -> _Child:
        """Make a victim: its memory touched, and starved."""
        size = in_units(self.size)
        child = _Child(f"a victim of {size}", _VICTIM, self.size)
        self._victims.append(child)
        self.meter.add(child.pid)
        child.go()
        with contextlib.suppress(OSError), Victim(child.pid) as victim:
            held = victim.footprint()
            if held.anon + held.swap < self.size:
                raise Impossible(f"a victim of {size} holds only {held}")
        self.starved_by = _starve(child.pid)
        return child

    def measure(self, give_up: float, *, with_mrelease: bool) -> _Measure:
        """Kill a new victim, and watch its memory come back."""
        before = self.meter.read()
        child = self.victim()
        held = self.meter.read() - before
        if held < self.size / 2:
            raise Impossible(
                f"{self.meter.name} shows {in_units(max(0, held))} for a "
                f"victim of {in_units(self.size)}: too much else is going on"
            )
        limit = before + int(held * self.meter.slack)
        release = None
        with Watch(self.meter, limit, give_up=give_up) as watch:
            begun = monotonic_ns()
            if with_mrelease:
                release = kill(child.pid)
            else:
                os.kill(child.pid, signal.SIGKILL)
            seconds = watch.wait(begun)
        if seconds is None:
            # So that its memory is not there when the next one is made.
            with contextlib.suppress(OSError), Victim(child.pid) as victim:
                victim.release()
        return _Measure(seconds, watch, release)

    def close(self) -> None:
        """End all that was started: the busy ones first, for the others."""
        for child in self._victims:
            child.kill()
        self._busy.close_input()
        for child in [self._busy, *self._victims]:
            child.end()
        if self._meter is not None:
            self._meter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Measure:
    """How long it took; None: it was given up."""

    def __init__(
        self, seconds: float | None, watch: Watch, release: Release | None
    ) -> None:
        self.seconds = seconds
        self.watch = watch
        self.release = release


def _starve(pid: int) -> str:
    """Take the CPU from a process as far as may be; by what, in words."""
    done = []
    try:
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        done.append("SCHED_IDLE")
    except OSError:
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        done.append("nice 19")
    except OSError:
        pass
    return ", ".join(done) or "not starved, which is not permitted here"


# ------------------------------------------------------------- the words


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    ms = seconds * 1e3
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"


def _times(ratio: float) -> str:
    """Give a ratio with the two digits that such a measurement is good for."""
    if ratio < 10:
        return f"{ratio:.1f}"
    step = 10 ** (len(str(int(ratio))) - 2)
    return str(round(ratio / step) * step)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def bar(share: float, width: int, *, blocks: bool = True) -> str:
    """Draw a share of the whole as a bar; the least is still seen."""
    if not blocks:
        return "#" * round(share * width) or "|"
    eighths = max(1, round(share * width * 8))
    parts = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"]
    return "█" * (eighths // 8) + parts[eighths % 8]


def chart(
    rows: list[tuple[str, float | None]],
    give_up: float,
    width: int,
    *,
    blocks: bool = True,
) -> list[str]:
    """Draw labelled times as bars of one scale; None was given up.

    In a narrow terminal a bar stands below its label and time.
    """
    longest = max(give_up if t is None else t for _, t in rows)
    column = max(len(label) for label, _ in rows)
    lines = []
    for label, seconds in rows:
        share = (give_up if seconds is None else seconds) / longest
        text = (
            f"not yet (given up after {give_up:g} s)"
            if seconds is None
            else _duration(seconds)
        )
        # The longest text is that of a time given up.
        space = min(60, width - column - 39)
        if space >= 12:
            drawn = bar(share, space, blocks=blocks)
            lines.append(f"{label:{column}}  {drawn}  {text}")
        else:
            drawn = bar(share, max(1, width - 1), blocks=blocks)
            lines += [f"{label}: {text}", drawn]
    return lines


def verdict(
    alone: float | None, released: float | None, give_up: float
) -> str:
    """Compare the two times in one sentence."""
    if released is None:
        return "With mrelease the memory was not back either."
    ratio = (give_up if alone is None else alone) / max(released, 1e-6)
    if alone is None:
        return (
            "With mrelease the memory was back more than "
            f"{_times(ratio)} times as fast."
        )
    if ratio < 1:
        return (
            "With mrelease it took longer: this victim was not starved, or "
            "something else disturbed the measurement."
        )
    return f"With mrelease the memory was back {_times(ratio)} times as fast."


def _who(found: Support) -> str:
    raising = (
        f"a dying victim is raised ({found.raising.why})"
        if found.raising.works
        else "a dying victim cannot be raised (no CAP_SYS_NICE)"
    )
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    return f"Run as {who}: {raising}."


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def _fitting() -> int:
    """Give the size of a victim: a quarter of the room, 1 GiB at most."""
    try:
        size = min(_LARGEST, room() // 4) // _SMALLEST * _SMALLEST
    except OSError as error:
        raise Impossible(f"free memory is not known: {error}") from None
    if size < _SMALLEST:
        raise Impossible("there is too little free memory for a victim")
    return size


def _precision(measures: list[_Measure]) -> str:
    looks = sum(measure.watch.looks for measure in measures)
    gap = max(measure.watch.gap for measure in measures)
    return (
        f"Looked {looks} times, in a thread of {measures[0].watch.scheduling};"
        f"\nthe longest time between two looks was {_duration(gap)}."
    )


def _show(size: int, give_up: float) -> int:
    _say(
        f"Two processes, each with {in_units(size)} of private memory, are "
        "killed while they hardly",
        "get any CPU. How long until the memory is back?",
        "",
    )
    with _Stage(size) as stage:
        _say(
            f"Linux {os.uname().release}, {stage.cpus} usable CPUs, "
            f"{stage.busy} busy processes.",
            _who(support()),
            f"Measured by: {stage.meter.name}; "
            f"back is when {1 - stage.meter.slack:.0%} of it is.",
        )
        if not stage.meter.exact:
            _say(
                "This is coarser: other processes count too. No memory cgroup "
                "of its own:",
                f"{stage.why_not_better}.",
            )
        _say("", f"First, SIGKILL alone (given up after {give_up:g} s) ...")
        alone = stage.measure(give_up, with_mrelease=False)
        _say(f"The victim was starved by: {stage.starved_by}.")
        _say("Second, mrelease.kill() ...")
        released = stage.measure(give_up, with_mrelease=True)
        rows = [
            ("SIGKILL alone", alone.seconds),
            ("mrelease", released.seconds),
        ]
        width = shutil.get_terminal_size().columns
        _say(
            "",
            *chart(rows, give_up, width, blocks=_can_print("█▏▎▍▌▋▊▉")),
            "",
            verdict(alone.seconds, released.seconds, give_up),
            str(released.release),
            _precision([alone, released]),
        )
    return 0 if released.seconds is not None else 1


def demo(*, size: int | None = None, give_up: float = 15.0) -> int:
    """Show it in the terminal; give the exit code.

    size of a victim in bytes: what fits, 1 GiB at most, if it is None.
    give_up: seconds after which memory that is not back is called that.

    0 if the memory was back with mrelease, 1 if not or if it cannot be shown.
    Raises BrokenPipeError when nobody reads its output; all is cleaned up
    then, as after any exception.
    """
    found = support()
    if found.release.works is None or found.signal.works is None:
        # Not tried, for a filter that may kill: let a child try.
        found = support(probe=True)
    try:
        if not found:
            bad = found.signal if found.release.works else found.release
            raise Impossible(f"{bad.why}. {bad.advice}")
        return _show(_fitting() if size is None else size, give_up)
    except (Impossible, OSError) as error:
        if isinstance(error, OSError) and error.errno == EPIPE:
            raise
        print(f"mrelease demo cannot be shown: {error}", file=sys.stderr)
        return 1
