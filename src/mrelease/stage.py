"""Processes to be killed for show: victims of all kinds, and busy ones.

    with Stage(wanted) as stage:
        with stage.make("starved", 64 << 20) as victim:
            stage.busy_now(True)
            ...                         # kill victim.pid

A victim is a real process with touched memory in a state in which processes
stand when a machine is short of everything.  Only what is on the stage is
ever killed.  Nothing outlives it, however it ends, also if it is killed: the
kernel itself kills the children when the pipe that is their input closes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from mrelease.closing import Closing
from mrelease.footprint import in_units
from mrelease.holds import Disk, Freezer, Quota, Unavailable, mounted
from mrelease.meter import CgroupMeter, Meter, Watch, open_meter
from mrelease.signals import not_now
from mrelease.support import Support, support
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# All children are plain Python without site: `python -I -S -c`.  Each waits
# for a line first, until it is in its group.  From then on its input signals
# SIGKILL (O_ASYNC) when the last writer closes it: that reaches a process
# that is stopped, starved or frozen, too.

# One program that forks, since hundreds of CPUs would take hundreds of
# interpreters to start.  The first only waits for the others, which stand
# still until they are wanted.
_BUSY = """\
import fcntl, os, signal, sys
os.read(0, 1) or sys.exit()
# If this process is killed too early, the kernel sends SIGHUP and SIGCONT to
# those that stand still: blocked or ignored, they would be busy for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
children = []
try:
    for _ in range(int(sys.argv[1])):
        try:
            child = os.fork()
        except OSError:
            break
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                pass
        children.append(child)
        try:
            os.setpgid(child, children[0])
        except OSError:
            pass
    for child in children:
        os.waitid(os.P_PID, child, os.WSTOPPED)
    fcntl.fcntl(0, fcntl.F_SETOWN, -children[0])
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    print("ready", len(children), children[0], flush=True)
    os.read(0, 1)
finally:
    # Also if nobody reads what is printed.
    os.killpg(children[0], signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
"""

# Should memory run out all the same, this is the one to be killed.
_VICTIM = """\
import _thread, fcntl, mmap, os, signal, sys
os.read(0, 1) or sys.exit()
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except OSError:
    pass
words = dict(word.partition("=")[::2] for word in sys.argv[2:])
try:
    how = mmap.MAP_SHARED if "shared" in words else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, int(sys.argv[1]), flags=how | mmap.MAP_ANONYMOUS)
    if "small" in words:
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except (AttributeError, OSError):
            pass
    piece = b"m" * (1 << 20)
    for _ in range(len(memory) // len(piece)):
        memory.write(piece)
    if "swap" in words:
        memory.madvise(21)  # MADV_PAGEOUT, Linux 5.4
    never = _thread.allocate_lock()
    never.acquire()
    _thread.stack_size(1 << 18)  # aarch64: 1 << 17 or more
    for _ in range(int(words.get("threads", 1)) - 1):
        _thread.start_new_thread(never.acquire, ())
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    try:
        os.read(0, 1) or sys.exit()
    except BlockingIOError:
        pass
    if "write" in words:
        file = os.open(words["write"], os.O_WRONLY | os.O_CREAT, 0o600)
except (MemoryError, OSError, RuntimeError) as error:
    print("error", error, flush=True)
    sys.exit()
print("ready", flush=True)
while "spin" in words:
    pass
while "write" in words:
    os.pwrite(file, b"w", 0)
    os.fsync(file)
never.acquire()
"""


class Impossible(Exception):
    """It cannot be shown here; the text says why."""


class Child:
    """A Python program that ends when its input does."""

    def __init__(self, what: str, program: str, *arguments: object) -> None:
        self._what = what
        if not sys.executable:
            raise Impossible("this Python does not know its own program")
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program]
                + [str(argument) for argument in arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is not for it
            )
        except OSError as error:
            raise Impossible(f"{what} cannot be started: {error}") from None
        self.pid: int = self._popen.pid

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

    def end(self) -> None:
        """See to it that it ends, and wait for that, 10 s at most."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        # A byte that was never read may be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
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


class Kind:
    """A kind of victim: what it is told, and what is done to it."""

    def __init__(
        self,
        text: str,
        *words: str,
        hold: str = "",
        shared: bool = False,
    ) -> None:
        self.text = text
        self.words = words
        self.hold = hold
        self.shared = shared


KINDS: dict[str, Kind] = {
    "asleep": Kind("asleep"),
    "spinning": Kind("spinning", "spin"),
    "threads": Kind("64 threads asleep", "threads=64"),
    # Small pages, since huge ones are taken down so fast that there is little
    # to see.
    "starved": Kind("starved of CPU", "small", hold="starve"),
    "quota": Kind("CPU quota of 2 %", hold="quota"),
    "disk": Kind("waiting for a disk", hold="disk"),
    "frozen": Kind("frozen", hold="freeze"),
    "swapped": Kind("swapped out", "swap"),
    "shared": Kind("shared memory", "shared", shared=True),
}


@contextlib.contextmanager
def _or_impossible() -> Iterator[None]:
    try:
        yield
    except (Unavailable, OSError) as error:
        raise Impossible(str(error)) from None


class Measure:
    """What came of one kill.

    seconds     until the memory was back; None: it was given up
    begun       when the kill began, in nanoseconds of the monotonic clock
    held        bytes that the meter showed for the victim
    result      what the kill returned
    starved_by  by what it was starved, in words
    watch       who looked at the meter, and how often
    """

    def __init__(
        self, victim: Specimen, held: int, begun: int, watch: Watch
    ) -> None:
        self.held = held
        self.begun = begun
        self.watch = watch
        self.starved_by: str = victim.starved_by
        self.seconds: float | None = None
        self.result: object = None


def kill_alone(pid: int) -> None:
    """Send SIGKILL, and nothing else."""
    os.kill(pid, signal.SIGKILL)


class Specimen(Closing):
    """A victim on the stage; it ends with the with statement."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.pid: int = child.pid
        self.starved_by: str = ""
        self.let_go: contextlib.ExitStack[bool | None] = contextlib.ExitStack()
        self.undo: contextlib.ExitStack[bool | None] = contextlib.ExitStack()

    def close(self) -> None:
        """Kill it, let it run to its end, undo what was done for it.

        Closing twice is no error.
        """
        with not_now(), self.undo:
            self._child.kill()
            try:
                self.let_go.close()
            finally:
                self._child.end()


class Stage(Closing):
    """The meter, the busy processes and what victims need.

    meter           what counts the memory of the victims
    why_not_better  why it is not a better one, "" if there is none
    cpus, busy      usable CPUs, and busy processes: two for each

    Raises Impossible if it cannot be made.
    """

    def __init__(self) -> None:
        self.cpus: int = len(os.sched_getaffinity(0))
        self._undo = contextlib.ExitStack()
        self._disk: Disk | None = None
        self._last: Specimen | None = None
        self._group = 0
        with not_now(), contextlib.ExitStack() as failed:
            child = Child("busy process", _BUSY, 2 * self.cpus)
            failed.callback(child.end)
            self.meter: Meter
            self.why_not_better: str
            self.meter, self.why_not_better = open_meter(child.pid)
            self._undo.callback(self.meter.close)
            self._undo.push(failed.pop_all())
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            said = child.go()
            self.busy: int = int(said[0])
            self._group = int(said[1])
            failed.pop_all()

    def busy_now(self, on: bool) -> None:
        """Let the busy processes run, or stand still."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGCONT if on else signal.SIGSTOP)

    def measure(
        self,
        name: str,
        size: int,
        kill: Callable[[int], object],
        give_up: float,
    ) -> Measure:
        """Kill a new victim, and watch its memory come back.

        Raises Impossible where there can be no such victim, or where the
        meter does not show its memory.
        """
        before = self.settled()
        with self.make(name, size) as victim:
            held = self.meter.read() - before
            if held < size / 2:
                raise Impossible(
                    f"{self.meter.name} shows {in_units(max(0, held))} for a "
                    f"victim of {in_units(size)}: too much else is going on"
                )
            limit = before + int(held * self.meter.slack)
            with Watch(self.meter, limit, give_up=give_up) as watch:
                found = Measure(victim, held, time.monotonic_ns(), watch)
                found.result = kill(victim.pid)
                found.seconds = watch.wait(found.begun)
        return found

    def settled(self) -> int:
        """Read the meter once nothing comes back to it any more.

        Stacks and page tables of those that ended do so a little later.
        """
        usage = self.meter.read()
        for _ in range(20):
            time.sleep(0.01)
            last, usage = usage, self.meter.read()
            if usage == last or not self.meter.exact:
                break
        return usage

    def make(self, name: str, size: int) -> Specimen:
        """Make a victim with so many bytes touched, in the state of its kind.

        Raises Impossible, with the reason, where there can be none.
        """
        kind = KINDS[name]
        words = list(kind.words)
        text = f"a victim of {in_units(size)}"
        with _or_impossible():
            if kind.hold == "disk":
                self._disk = self._disk or self._new_disk()
                words.append(f"write={self._disk.path}/written")
            with contextlib.ExitStack() as failed:
                with not_now():
                    child = Child(text, _VICTIM, size, *words)
                    victim = Specimen(child)
                    failed.callback(victim.close)
                self.meter.add(child.pid)
                hold = self._prepare(kind.hold, victim)
                child.go()
                self._check(kind, child.pid, size, text)
                hold()
                # For an interruption before the with statement has it.
                self._last = victim
                failed.pop_all()
        return victim

    def _check(self, kind: Kind, pid: int, size: int, text: str) -> None:
        try:
            with Victim(pid) as victim:
                held = victim.footprint()
        except OSError:
            return  # no /proc
        if "swap" in kind.words and held.swap < size // 2:
            raise Impossible(
                f"of {text} only {in_units(held.swap)} went to swap"
            )
        if (held.shmem if kind.shared else held.anon) + held.swap < size:
            raise Impossible(f"{text} holds only {held}")

    def _prepare(self, hold: str, victim: Specimen) -> Callable[[], object]:
        """Do what comes before it touches memory; give what comes after."""
        if hold == "starve":

            def starve_it() -> None:
                self.busy_now(True)
                time.sleep(0.02)  # until each runs where it stays
                victim.starved_by = starve(victim.pid)

            victim.let_go.callback(self.busy_now, False)
            return starve_it
        if hold == "quota":
            with not_now():
                quota = Quota(at=self._own_v2("cpu.max", "cpu"))
                victim.undo.callback(quota.close)
            quota.add(victim.pid)
            victim.let_go.callback(quota.let_go)
            return lambda: quota.limit(2.0)
        if hold == "freeze":
            with not_now():
                freezer = Freezer(at=self._own_v2("cgroup.freeze", "freezer"))
                victim.undo.callback(freezer.close)
            freezer.add(victim.pid)
            victim.let_go.callback(freezer.let_go)
            return freezer.freeze
        if hold == "disk":
            disk = self._disk
            assert disk is not None
            victim.let_go.callback(disk.thaw)

            def freeze_disk() -> None:
                disk.freeze()
                _until_stuck(victim.pid)

            return freeze_disk
        return lambda: None

    def _own_v2(self, file: str, controller: str) -> Path | None:
        """Give the meter's group if it must hold, too: version 2 has one."""
        if not isinstance(self.meter, CgroupMeter) or self.meter.version == 1:
            return None
        root = mounted(controller)
        if root is not None and os.access(root, os.W_OK):
            return None  # in version 1, beside the meter's
        path = Path(self.meter.path)
        if not (path / file).exists():
            raise Unavailable(
                f"the memory cgroup has no {controller} controller"
            )
        return path

    def _new_disk(self) -> Disk:
        with not_now():
            disk = Disk()
            self._undo.callback(disk.close)
        return disk

    def close(self) -> None:
        """End all that was started."""
        with not_now(), self._undo:
            if self._last is not None:
                self._last.close()


def check_support() -> Support:
    """Give what works here; Impossible if nothing can be shown by a kill."""
    found = support()
    if found.release.works is None or found.signal.works is None:
        # Not tried, for a filter that may kill: let a child try.
        found = support(probe=True)
    if not found:
        bad = found.signal if found.release.works else found.release
        raise Impossible(f"{bad.why}. {bad.advice}")
    return found


def starve(pid: int) -> str:
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


def _until_stuck(pid: int) -> None:
    """Wait until it is in D state for good: fsync is for a moment each time.

    Raises Impossible if it does not come to that within 10 seconds.
    """
    deadline = time.monotonic() + 10
    last = ""
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        now = "".join(
            line
            for line in status.splitlines(keepends=True)
            if line.startswith(("State:", "voluntary_ctxt"))
        )
        if now == last and "State:\tD" in now:
            return
        last = now
        time.sleep(0.01)
    raise Impossible("a victim does not come to wait for its disk")
